"""Train a tiny MoE language model, quantize its experts to NVFP4 and compare the two; then plant four
well-known bugs in the quantized model, one at a time, and look again. All numbers are measured in this run.

    python examples/demo.py [--steps 1000] [--json report.json]
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from capitals import Tokenizer, countries, sentences
from rich.console import Console
from rich.table import Table
from tiny_moe import IGNORED, MoE, TinyMoE, batch, generate, perplexity, train
from torch import Tensor, nn

from nvfp4_moe import Nvfp4MoE, Nvfp4Tensor, ops
from nvfp4_moe.formats import BLOCK, MX_BLOCK, e2m1_encode, e4m3_encode, pack
from nvfp4_moe.layers.moe import expert_weights
from nvfp4_moe.reference.gemm import spread_alpha

PROMPTS = ("The capital of France is", "On the map of Japan")
STALE = 16  # how many times too small bug 3's activation scales are


# ---- quantized models -----------------------------------------------------------------------------------


def with_experts(model: TinyMoE, convert: Callable[[MoE], nn.Module]) -> TinyMoE:
    """A copy of the model, its MoE layers converted."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.moe = convert(block.moe)
    return model


def experts_from(quantize: Callable[[Tensor], Nvfp4Tensor], moe: MoE) -> Nvfp4MoE:
    """Nvfp4MoE.from_float with a quantizer of one's own."""
    return Nvfp4MoE.from_float(moe).load_weights(*map(quantize, expert_weights(moe.experts)))


def to_mxfp4(w: Tensor) -> tuple[Tensor, Tensor]:
    """[.., K] -> packed [.., K/2], e8m0 [.., K/32]: powers of two that bring a block's maximum to 4 .. 8."""
    blocks = w.float().unflatten(-1, (-1, MX_BLOCK))
    exponent = torch.frexp(blocks.abs().amax(-1)).exponent - 3
    codes = e2m1_encode(torch.ldexp(blocks, -exponent[..., None]))
    return pack(codes.flatten(-2)), (exponent + 127).to(torch.uint8)


def through_mxfp4(w: Tensor) -> Nvfp4Tensor:
    """What an MXFP4 checkpoint of w becomes; "best" keeps its every value."""
    return Nvfp4Tensor(*ops.mxfp4_to_nvfp4(*to_mxfp4(w), "best"))


# ---- bugs -----------------------------------------------------------------------------------------------


def folded_alpha(w: Tensor) -> Nvfp4Tensor:
    """Bug 1: alpha folded into the block scales. E4M3 rounds their product, or flushes it to zero."""
    right = Nvfp4Tensor.quantize(w)
    sf = e4m3_encode(right.sf.float() * right.alpha[:, None, None])
    return Nvfp4Tensor(right.packed, sf, torch.ones_like(right.alpha))


def size_for_cosize(moe: MoE) -> Nvfp4MoE:
    """Bug 2: the remap fills rows * columns bytes of the interleaved buffer, and the rest stays zero."""
    layer = Nvfp4MoE.from_float(moe)
    for weights, sf in ((layer.w13, layer.w13_sf), (layer.w2, layer.w2_sf)):
        _, rows, half = weights.shape
        size = rows * (2 * half // BLOCK)
        sf.view(torch.uint8)[:, size:] = 0
    return layer


class StaleScales(Nvfp4MoE):
    """Bug 3: activation scales calibrated once, on values STALE times smaller, not taken from each row."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scales = {}

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.hidden)
        weights, ids = self.router(tokens)
        rows, offsets, slots = ops.permute(ids, len(self.w13))
        a = self.quantize("w13", tokens[rows])
        hidden = ops.swiglu(ops.grouped_gemm(*a, self.w13, self.w13_sf, self.w13_alpha, offsets))
        a = self.quantize("w2", hidden)
        y = ops.grouped_gemm(*a, self.w2, self.w2_sf, self.w2_alpha, offsets)
        return ops.combine(y, slots, weights).view(x.shape)

    def quantize(self, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if name not in self.scales:
            self.scales[name] = ops.tensor_scale(x) / STALE
        return *ops.quantize(x, self.scales[name]), self.scales[name]


def requantized(w: Tensor) -> Nvfp4Tensor:
    """Bug 4: an MXFP4 checkpoint decoded and quantized again, as if it had been a float checkpoint."""
    return Nvfp4Tensor.quantize(through_mxfp4(w).dequantize())


# ---- measurements ---------------------------------------------------------------------------------------


class Exam:
    """What every model is asked. The BF16 model sets the standard for its layers."""

    def __init__(self, model: TinyMoE, tokenizer: Tokenizer, training: list[str], held_out: list[str]):
        self.tokenizer = tokenizer
        self.held_out = [tokenizer.encode(s) for s in held_out]
        self.layers = []  # (input, output)
        ids, targets = batch([tokenizer.encode(s) for s in training + held_out])
        real = targets != IGNORED
        hooks = [
            block.moe.register_forward_hook(lambda _, args, y: self.layers.append((args[0][real], y[real])))
            for block in model.blocks
        ]
        model(ids)
        for hook in hooks:
            hook.remove()

    def take(self, name: str, model: TinyMoE, right: TinyMoE | None = None) -> dict:
        """One row of the table; `right` is the model without the bug."""
        layers = zip(model.blocks, self.layers, strict=True)
        return {
            "model": name,
            "expert_bytes": expert_bytes(model),
            "weights": damage(model, right) if right else None,
            "layer_errors": [rms_error(block.moe(x), y) for block, (x, y) in layers],
            "perplexity": perplexity(model, self.held_out),
            "capitals": sum(self.answer(model, f"The capital of {c} is", 1) == k for c, k, _ in countries()),
            "text": [self.answer(model, prompt) for prompt in PROMPTS],
        }

    def answer(self, model: TinyMoE, prompt: str, most: int = 8) -> str:
        return self.tokenizer.decode(generate(model, self.tokenizer.encode(prompt), most)).strip()


def rms_error(got: Tensor, wanted: Tensor) -> float:
    """Relative to the RMS of `wanted`."""
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


def expert_bytes(model: TinyMoE) -> int:
    """The experts as held: BF16 weights; or codes, scales (with their tile padding) and alphas."""
    layers = [block.moe for block in model.blocks]
    held = [m.experts.parameters() if isinstance(m, MoE) else m.buffers(recurse=False) for m in layers]
    return sum(t.nbytes for tensors in held for t in tensors)


def expert_values(model: TinyMoE) -> Tensor:
    """Every expert weight a quantized model computes with, float32, flat."""
    values = []
    for m in (block.moe for block in model.blocks):
        for packed, sf, alpha in ((m.w13, m.w13_sf, m.w13_alpha), (m.w2, m.w2_sf, m.w2_alpha)):
            _, N, half = packed.shape
            linear = ops.unmap_sf(sf, N, 2 * half // BLOCK)
            values.append(ops.dequantize(packed, linear, spread_alpha(alpha, N)).flatten())
    return torch.cat(values)


def damage(model: TinyMoE, right: TinyMoE) -> dict:
    """The share of weights a bug changed, and by how much, relative, it changed the worst hit."""
    got, wanted = expert_values(model), expert_values(right)
    change = (got - wanted).abs()
    return {
        "changed": (change > 0).double().mean().item(),
        "largest": (change / wanted.abs())[wanted != 0].max().item(),
    }


def compare(model: TinyMoE, exam: Exam) -> tuple[list[dict], list[dict]]:
    """The rows of the models and of the bugs."""
    nvfp4 = with_experts(model, Nvfp4MoE.from_float)
    mxfp4 = with_experts(model, partial(experts_from, through_mxfp4))
    models = {
        "BF16": model,
        "NVFP4 weights (compute=bf16)": with_experts(model, partial(Nvfp4MoE.from_float, compute="bf16")),
        "NVFP4 all through (compute=nvfp4)": nvfp4,
        "MXFP4 copy, converted without loss": mxfp4,
    }
    bugs = {
        "bug 1: alpha folded into E4M3": (partial(experts_from, folded_alpha), nvfp4),
        "bug 2: size taken for cosize": (size_for_cosize, nvfp4),
        f"bug 3: stale activation scale, 1/{STALE}": (StaleScales.from_float, nvfp4),
        "bug 4: MXFP4 copy, quantized again": (partial(experts_from, requantized), mxfp4),
    }
    return (
        [exam.take(name, m) for name, m in models.items()],
        [exam.take(name, with_experts(model, convert), right) for name, (convert, right) in bugs.items()],
    )


# ---- the report -----------------------------------------------------------------------------------------


def cells(row: dict) -> list[str]:
    weights = row["weights"]
    return [
        row["model"],
        f"{row['expert_bytes']:,}",
        f"{weights['changed']:.0%}\n{weights['largest']:.0%}" if weights else "",
        "\n".join(f"{error:.1%}" for error in row["layer_errors"]),
        f"{row['perplexity']:.2f}",
        str(row["capitals"]),
        "\n".join(row["text"]),
    ]


def table(models: list[dict], bugs: list[dict]) -> Table:
    caption = (
        "Expert bytes: scale factors with their tile padding. Weights: the share of expert weights a bug "
        "changes, and the largest relative change. Layer errors: relative RMS of the output of MoE layers 1 "
        "and 2, against BF16 on the same input. Perplexity: on sentences held out of the training, which "
        "states their facts in other words. Capitals: countries whose capital the model knows."
    )
    result = Table(caption=caption, caption_justify="left")
    result.add_column("model")
    headings = ("expert\nbytes", "weights\nchanged", "layer\nerrors", "held-out\nperplexity")
    for heading in (*headings, f"capitals\nof {len(countries())}"):
        result.add_column(heading, justify="right")
    asked = [f"{prompt} .." for prompt in PROMPTS]
    result.add_column("\n".join(asked), width=max(map(len, asked)), no_wrap=True)
    for rows in (models, bugs):
        for row in rows:
            result.add_row(*cells(row))
        result.add_section()
    return result


def train_model(tokenizer: Tokenizer, training: list[str], steps: int) -> tuple[TinyMoE, list[float]]:
    """The trained model in BF16, and its losses."""
    torch.manual_seed(0)
    encoded = [tokenizer.encode(s) for s in training]
    model = TinyMoE(len(tokenizer), length=max(map(len, encoded)))
    losses = train(model, encoded, steps)
    return model.bfloat16(), losses


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train, quantize, compare; then plant four bugs.")
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--json", type=Path, help="write the rows of the table here as well")
    args = parser.parse_args(argv)
    # tensors this small gain nothing from a second thread, and lose much to it on a busy machine
    torch.set_num_threads(1)
    console = Console(width=110)
    start = time.perf_counter()
    training, held_out = sentences()
    tokenizer = Tokenizer(training + held_out)
    console.print(f"Training a tiny MoE on {len(training)} sentences, {args.steps} steps ..")
    model, losses = train_model(tokenizer, training, args.steps)
    console.print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {time.perf_counter() - start:.0f} s")
    with torch.inference_mode():
        models, bugs = compare(model, Exam(model, tokenizer, training, held_out))
    console.print(table(models, bugs))
    seconds = time.perf_counter() - start
    console.print(f"{seconds:.0f} s in all")
    if args.json:
        report = {"steps": args.steps, "losses": losses, "seconds": seconds, "models": models, "bugs": bugs}
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
