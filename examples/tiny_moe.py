"""A Mixture-of-Experts language model small enough to train while you watch.

`MoE` has the attribute names that Nvfp4MoE.from_float reads: gate, experts, top_k, norm_topk_prob.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100  # cross_entropy's own mark for a target that does not count
# Small expert weights behind a large norm gain compute what larger ones behind a smaller gain would, and they
# are what a global scale is for: E4M3 by itself does not reach down to them.
EXPERT_STD, NORM_GAIN = 1e-3, 100.0
LR, EXPERT_LR = 2e-3, 1e-4


class Expert(nn.Module):
    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        for weight in self.parameters():
            nn.init.normal_(weight, std=EXPERT_STD)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    norm_topk_prob = True

    def __init__(self, hidden: int, intermediate: int, experts: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, intermediate) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        # in float32, as in nvfp4_moe.Router: rounding must not send a token to other experts
        logits = F.linear(tokens.float(), self.gate.weight.float())
        weights, ids = logits.softmax(-1).topk(self.top_k)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        y = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            row, choice = (ids == e).nonzero(as_tuple=True)
            y = y.index_add(0, row, expert(tokens[row]) * weights[row, choice, None])
        return y.view_as(x)


class Attention(nn.Module):
    """Narrow on purpose: it can carry a country along, but the capital has to come from the experts."""

    def __init__(self, hidden: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # three times [B, heads, T, head_dim]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int, head_dim: int, **moe):
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(hidden), Attention(hidden, heads, head_dim)
        self.moe_norm, self.moe = nn.RMSNorm(hidden), MoE(hidden, **moe)
        nn.init.constant_(self.moe_norm.weight, NORM_GAIN)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.moe(self.moe_norm(x))


class TinyMoE(nn.Module):
    """ids [B, T] -> logits [B, T, vocabulary]

    The experts' weights are no whole tiles of 128 rows and 64 columns, so their scale factors have tile
    padding, as in many a real model.
    """

    def __init__(self, vocabulary: int, length: int, layers: int = 2, hidden: int = 96):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, hidden), nn.Embedding(length, hidden)
        sizes = {"heads": 2, "head_dim": 12, "intermediate": 96, "experts": 8, "top_k": 2}
        self.blocks = nn.Sequential(*(Block(hidden, **sizes) for _ in range(layers)))
        self.norm, self.head = nn.RMSNorm(hidden), nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position.weight[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def batch(sentences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token lists -> (ids, targets) [B, T]: each token's target is the next one, padding is ignored."""
    length = max(map(len, sentences))
    ids = torch.tensor([s + [0] * (length - len(s)) for s in sentences])
    targets = torch.tensor([s[1:] + [IGNORED] * (length - len(s) + 1) for s in sentences])
    return ids, targets


def loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


def train(model: TinyMoE, sentences: list[list[int]], steps: int, batch_size: int = 64) -> list[float]:
    """The loss of every step."""
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    others = [p for name, p in model.named_parameters() if ".experts." not in name]
    groups = [{"params": others}, {"params": experts}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [LR, EXPERT_LR], steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(sentences), (batch_size,))
        step_loss = loss(model, *batch([sentences[i] for i in chosen]))
        optimizer.zero_grad()
        step_loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(step_loss.item())
    return losses


@torch.inference_mode()
def perplexity(model: nn.Module, sentences: list[list[int]]) -> float:
    return loss(model, *batch(sentences)).exp().item()


@torch.inference_mode()
def generate(model: nn.Module, ids: list[int], most: int = 8, stop: int = 0) -> list[int]:
    """The likeliest continuation, up to and with `stop`."""
    new = []
    while len(new) < most and stop not in new:
        new.append(int(model(torch.tensor([ids + new]))[0, -1].argmax()))
    return new
