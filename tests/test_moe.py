"""route, permute, swiglu, combine bit for bit; the layer equals its own composition, and a float layer."""

import pytest
import torch
from cases import lively, poison, random_weights
from compare import assert_close_layers, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from nvfp4_moe import ops, reference

ROUTINGS = [  # E, top_k, score, n_group, topk_group
    (256, 8, "sigmoid", 8, 4),  # DeepSeek-V3, R1
    (384, 6, "sqrt_softplus", 1, 1),  # DeepSeek-V4
    (128, 8, "softmax", 1, 1),  # Qwen3
    (32, 4, "softmax", 1, 1),  # gpt-oss
    (8, 2, "softmax", 1, 1),  # Mixtral
    (5, 5, "sigmoid", 5, 2),  # more wanted than the winning groups hold
    (7, 3, "softmax", 1, 1),
    (1, 1, "sigmoid", 1, 1),
    (1024, 32, "softmax", 4, 2),
]


def awkward_logits(T, E, dtype=torch.float32):
    """Ties, NaN, infinities, all equal, nothing left to choose."""
    x = (torch.randn(T, E) * 3).round(decimals=1)  # one decimal: many ties
    x[0], x[1], x[2, ::2], x[3, : E // 2], x[4, -1:], x[5] = (
        0,
        torch.nan,
        torch.nan,
        -torch.inf,
        torch.inf,
        -torch.inf,
    )
    x[6], x[7] = 100, -100
    return x.to(dtype)


def tied_logits(E):
    """As many equal ones as a GPU's list of 32 holds, fewer and more, the last of them greater, all others
    less."""
    counts = [n for n in (1, 2, 5, 31, 32, 33, 34, 64, E) if n <= E]
    x = torch.rand(len(counts), E)
    for row, n in zip(x, counts, strict=True):
        row[torch.randperm(E)[:n].sort().values] = torch.tensor([4.0] * (n - 1) + [5.0])
    return x


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
class TestRoute:
    @pytest.mark.parametrize("biased", [False, True])
    @pytest.mark.parametrize("renormalize", [False, True])
    def test_matches_the_reference_bit_for_bit(self, routing, biased, renormalize, device):
        E, k, score, n_group, topk_group = routing
        logits = awkward_logits(24, E)
        bias = torch.randn(E) if biased else None
        got = ops.route(
            logits.to(device),
            None if bias is None else bias.to(device),
            k,
            score,
            n_group,
            topk_group,
            renormalize,
            2.5,
        )
        assert_same_bits(got, reference.route(logits, bias, k, score, n_group, topk_group, renormalize, 2.5))

    def test_takes_half_precision_logits(self, routing, device):
        E, k, score, n_group, topk_group = routing
        for dtype in (torch.bfloat16, torch.float16):
            logits = awkward_logits(9, E, dtype)
            got = ops.route(logits.to(device), None, k, score, n_group, topk_group)
            assert_same_bits(got, reference.route(logits, None, k, score, n_group, topk_group, True, 1.0))


def test_route_agrees_with_plain_torch_softmax_topk(device):
    logits = torch.randn(50, 64, device=device)
    weights, ids = ops.route(logits, None, 6, "softmax", renormalize=False)
    probabilities = logits.double().softmax(-1)
    want, order = probabilities.topk(6)
    assert torch.equal(ids.long(), order)
    torch.testing.assert_close(weights.double(), want, rtol=1e-6, atol=0)


def test_route_matches_deepseek_grouped_topk_with_noaux_bias():
    """Written out with plain loops, as the model's paper says it."""
    logits, bias = torch.randn(20, 32), torch.randn(32) * 0.3
    weights, ids = ops.route(logits, bias, 4, "sigmoid", 8, 3, True, 2.5)
    for t in range(20):
        score = torch.sigmoid(logits[t].double())
        choice = score + bias.double()
        groups = choice.view(8, 4)
        best = sorted(range(8), key=lambda g: -groups[g].topk(2).values.sum().item())[:3]
        allowed = [e for e in range(32) if e // 4 in best]
        chosen = sorted(allowed, key=lambda e: -choice[e].item())[:4]
        assert ids[t].tolist() == chosen
        want = score[chosen] / score[chosen].sum() * 2.5
        torch.testing.assert_close(weights[t].double(), want, rtol=1e-6, atol=0)


def test_where_choices_run_out_ids_are_minus_one_and_weights_zero(device):
    logits = torch.full((2, 4), torch.nan, device=device)
    logits[1, 2] = 0.5
    weights, ids = ops.route(logits, None, 3)
    assert ids.tolist() == [[-1, -1, -1], [2, -1, -1]]
    assert weights.tolist() == [[0, 0, 0], [1, 0, 0]]


def test_groups_of_infinities_are_ranked_alike_everywhere(device):
    """inf and -inf in one group make its score a NaN."""
    logits, bias = torch.zeros(3, 12), torch.zeros(12)
    bias[0], bias[1], bias[4:6], bias[8] = torch.inf, -torch.inf, torch.inf, -torch.inf
    args = (6, "sigmoid", 6, 2, True, 1.0)
    assert_same_bits(
        ops.route(logits.to(device), bias.to(device), *args), reference.route(logits, bias, *args)
    )


@pytest.mark.parametrize(
    "E, k", [(32, 6), (33, 32), (384, 1), (384, 6), (384, 16), (384, 17), (384, 33), (700, 8)], ids=str
)
def test_as_many_ties_as_a_list_holds_fewer_and_more(E, k, device):
    logits = tied_logits(E)
    assert_same_bits(
        ops.route(logits.to(device), None, k), reference.route(logits, None, k, "softmax", 1, 1, True, 1.0)
    )


def test_ties_go_to_the_lower_expert(device):
    _, ids = ops.route(torch.zeros(1, 64, device=device), None, 5)
    assert ids.tolist() == [[0, 1, 2, 3, 4]]


class TestPermute:
    @given(
        T=st.integers(0, 40),
        k=st.integers(0, 5),
        E=st.integers(0, 12),
        first=st.integers(-3, 6),
        seed=st.integers(0, 99),
    )
    def test_matches_the_reference(self, T, k, E, first, seed):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(-2, 14, (T, k), dtype=torch.int32, generator=generator)
        poison((T * k,), torch.int32)
        assert_same_bits(ops.permute(ids, E, first), reference.permute(ids, E, first))

    @pytest.mark.parametrize(
        "T, k, E, first",
        [
            (64, 6, 384, 0),
            (170, 6, 384, 9),
            (40, 3, 3000, 10),
            (300, 3, 2100, -5),
            (3000, 1, 700, 0),
            (700, 3, 20, 4),
        ],
        ids=str,
    )
    def test_one_tile_or_several_of_few_choices_a_warp_or_many(self, T, k, E, first, device):
        ids = torch.randint(first - 2, first + E + 2, (T, k), dtype=torch.int32)
        poison((T * k,), torch.int32)
        assert_same_bits(ops.permute(ids.to(device), E, first), reference.permute(ids, E, first))

    def test_extreme_ids_are_skipped(self, device):
        ids = torch.tensor([[2**31 - 1, -(2**31), 1, 1]], dtype=torch.int32, device=device)
        rows, offsets, slots = ops.permute(ids, 3, 0)
        assert (
            offsets.tolist() == [0, 0, 2, 2]
            and slots.tolist() == [[-1, -1, 0, 1]]
            and rows.tolist() == [0, 0, 0, 0]
        )


@pytest.mark.parametrize("act", ops.ACTS)
class TestSwiglu:
    def test_matches_the_reference_bit_for_bit_where_clamps_bite(self, act, device):
        x = (torch.randn(37, 256) * 12).bfloat16()  # beyond the limit of 7 in half the places
        x[0, :16], x[1, 5], x[2, 200], x[3] = 0, torch.nan, torch.inf, -torch.inf
        x[4], x[5] = 3e38, -3e38
        assert (x[6:].abs() > 7).float().mean() > 0.3
        got = ops.swiglu(x.to(device), act, 1.702, 7.0)
        assert_same_bits(got, reference.swiglu(x, act, 1.702, 7.0))
        assert_same_bits(
            ops.swiglu_quantize(x.to(device), act, 1.702, 7.0), reference.swiglu_quantize(x, act, 1.702, 7.0)
        )

    def test_is_the_models_formula(self, act, device):
        x = (torch.randn(16, 64) * 6).bfloat16()
        got = ops.swiglu(x.to(device), act, 1.702, 7.0).cpu().double()
        g, u = x.double().chunk(2, -1)
        want = {
            "silu": lambda: torch.nn.functional.silu(g) * u,
            "swiglu_limit": lambda: torch.nn.functional.silu(g.clamp(max=7)) * u.clamp(-7, 7),
            "swiglu_oai": lambda: (
                g.clamp(max=7) * torch.sigmoid(1.702 * g.clamp(max=7)) * (u.clamp(-7, 7) + 1)
            ),
            "relu2": lambda: torch.relu(x.double()) ** 2,
        }[act]()
        torch.testing.assert_close(
            got, want, rtol=2**-8, atol=1e-30
        )  # one rounding to BF16, half a unit is 2^-9

    def test_any_leading_shape(self, act, device):
        for lead in ((), (0,), (2, 3)):
            x = torch.randn(*lead, 32, device=device).bfloat16()
            assert_same_bits(ops.swiglu(x, act, 1.0, 1.0), reference.swiglu(x.cpu(), act, 1.0, 1.0))


class TestCombine:
    def test_matches_the_reference_bit_for_bit(self, device):
        y, weights = lively(90, 200, dtype=torch.bfloat16), torch.randn(30, 6)
        slots = torch.randint(-1, 90, (30, 6), dtype=torch.int32)
        slots[0] = -1
        got = ops.combine(y.to(device), slots.to(device), weights.to(device))
        assert_same_bits(got, reference.combine(y, slots, weights))
        assert not got[0].any()

    def test_adds_with_one_rounding_a_term(self, device):
        """Terms that cancel leave what a product rounded by itself would have lost."""
        y = lively(64, 32, dtype=torch.bfloat16)
        weight = torch.rand(64, 1) + 0.5
        weights = torch.cat([weight, -weight.nextafter(torch.full((64, 1), 9.0))], 1)
        slots = torch.arange(64, dtype=torch.int32)[:, None].expand(64, 2).contiguous()
        want = reference.combine(y, slots, weights)
        rounded_twice = (y.float() * weights[:, :1] + y.float() * weights[:, 1:]).bfloat16()
        assert not torch.equal(want, rounded_twice)
        assert_same_bits(ops.combine(y.to(device), slots.to(device), weights.to(device)), want)

    def test_slots_that_lie_are_skipped(self, device):
        y = torch.ones(2, 16, device=device).bfloat16()
        slots = torch.tensor([[0, 7, -9, 2**31 - 1]], dtype=torch.int32, device=device)
        assert ops.combine(y, slots, torch.ones(1, 4, device=device)).unique().tolist() == [1.0]


def layer(T, k, E, H, I, act, bias=False, local=None):
    """Arguments of ops.moe; routing over `local or E` experts so that some ids belong to nobody."""
    halves = 1 if act == "relu2" else 2
    w13, w2 = random_weights(E, halves * I, H, halves), random_weights(E, H, I)
    if halves == 2:  # gate and up far apart: swapping them, or one alpha for both, must show
        w13.alpha[:, 1] *= 5
    x = lively(T, H, dtype=torch.bfloat16)
    weights, ids = reference.route(torch.randn(T, local or E), None, k, "softmax", 1, 1, True, 1.0)
    biases = (torch.randn(E, halves * I), torch.randn(E, H)) if bias else (None, None)
    return [x, ids, weights, w13.b, w13.b_sf, w13.alpha, w2.b, w2.b_sf, w2.alpha], biases


def to(args, device):
    return [t.to(device) if isinstance(t, torch.Tensor) else t for t in args]


def composed(
    x, ids, weights, w13, w13_sf, w13_alpha, w2, w2_sf, w2_alpha,
    first_expert, compute, act, act_alpha, limit, w13_bias=None, w2_bias=None,
):  # fmt: skip
    """ops.moe by the public operators it is made of."""
    rows, offsets, slots = ops.permute(ids, len(w13), first_expert)
    a = ops.quantize_rows(x, rows) if compute == "nvfp4" else (x[rows.long()], None, None)
    gate_up = ops.grouped_gemm(*a, w13, w13_sf, w13_alpha, offsets, w13_bias)
    if compute == "nvfp4":
        hidden = ops.swiglu_quantize(gate_up, act, act_alpha, limit)
    else:
        hidden = (ops.swiglu(gate_up, act, act_alpha, limit), None, None)
    y = ops.grouped_gemm(*hidden, w2, w2_sf, w2_alpha, offsets, w2_bias)
    return ops.combine(y, slots, weights)


MOES = [(1, 2, 4, 64, 48), (33, 3, 6, 96, 80), (0, 2, 3, 32, 32), (20, 1, 30, 64, 32), (5, 4, 4, 1040, 16)]


@pytest.mark.parametrize("act", ops.ACTS)
@pytest.mark.parametrize("compute", ops.COMPUTES)
@pytest.mark.parametrize("shape", MOES, ids=str)
class TestMoe:
    def test_equals_its_composition_bit_for_bit(self, shape, compute, act, device):
        args, biases = layer(*shape, act, bias=True)
        args = (*to(args, device), 0, compute, act, 1.702, 7.0, *to(biases, device))
        want = composed(*args)
        got = ops.moe(*args)
        assert_same_bits(got, want.cpu())

    def test_is_close_to_the_reference(self, shape, compute, act, device):
        args, _ = layer(*shape, act)
        args += [0, compute, act, 1.702, 7.0]
        got = ops.moe(*to(args, device))
        assert_close_layers(got, reference.moe(*args))

    def test_a_token_has_the_same_bits_alone_and_in_a_batch(self, shape, compute, act, device):
        args, _ = layer(*shape, act)
        args = [*to(args, device), 0, compute, act, 1.702, 7.0]
        together = ops.moe(*args)
        for t in range(0, shape[0], 5):
            alone = ops.moe(args[0][t : t + 1], args[1][t : t + 1], args[2][t : t + 1], *args[3:])
            assert_same_bits(alone[0], together[t].cpu(), f"token {t}")


def test_expert_parallel_shards_add_up_to_the_whole(device):
    E, k = 8, 3
    args, _ = layer(25, k, E, 64, 48, "silu")
    x, ids, weights, *experts = to(args, device)
    whole = ops.moe(x, ids, weights, *experts, 0, "bf16").float()
    parts = [ops.moe(x, ids, weights, *(t[f : f + 4] for t in experts), f, "bf16").float() for f in (0, 4)]
    # each part is rounded to BF16 once more than the whole: half a unit of its own size, 2^-9, each
    bound = 2.0**-8 * (parts[0].abs() + parts[1].abs() + whole.abs())
    assert bool(((parts[0] + parts[1] - whole).abs() <= bound).all())
    assert all(bool((p != 0).any()) for p in parts)


def test_ids_of_no_expert_and_duplicates_are_harmless(device):
    args, _ = layer(6, 3, 4, 64, 32, "silu")
    args[1][0], args[1][1], args[1][2] = -1, 99, torch.tensor([2, 2, 2])
    got = ops.moe(*to(args, device), 0, "nvfp4", "silu", 1.0, 0.0).cpu()
    assert not got[0].any() and not got[1].any()
    assert_close_layers(got, reference.moe(*args, 0, "nvfp4", "silu", 1.0, 0.0))


@pytest.mark.parametrize(
    "mutation",
    ["gate and up swapped", "one alpha for both halves", "neighbour expert's alpha", "weights not applied"],
)
def test_these_tests_tell_right_from_wrong(mutation, device):
    """Each planted mistake must be far outside the tolerance the correct layer is held to."""
    args, _ = layer(17, 2, 5, 96, 64, "silu")
    want = reference.moe(*args, 0, "nvfp4", "silu", 1.0, 0.0)
    if mutation == "gate and up swapped":
        args[3] = torch.cat(args[3].chunk(2, 1)[::-1], 1)
    elif mutation == "one alpha for both halves":
        args[5] = args[5][:, 0].contiguous()
    elif mutation == "neighbour expert's alpha":
        args[8] = args[8].roll(1)
    else:
        args[2] = torch.ones_like(args[2])
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_close_layers(ops.moe(*to(args, device), 0, "nvfp4", "silu", 1.0, 0.0), want)
