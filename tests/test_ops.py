"""Every operator: opcheck, torch.compile, fakes that refuse what the kernels refuse in the same words."""

import pytest
import torch
from cases import lively, random_packed, random_sf, random_weights
from compare import REFUSED, assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from nvfp4_moe import ops, reference

OPS = torch.ops.nvfp4


def sample_calls(device="cpu") -> dict[str, tuple]:
    """One valid call of every operator."""
    w13, w2 = random_weights(3, 64, 48, 2), random_weights(3, 48, 32)
    x, offsets = lively(7, 48, dtype=torch.bfloat16), torch.tensor([0, 2, 2, 7], dtype=torch.int32)
    ids = torch.randint(-1, 4, (7, 2), dtype=torch.int32)
    experts = (w13.b, w13.b_sf, w13.alpha, w2.b, w2.b_sf, w2.alpha)
    packed, sf, scale = reference.quantize_rows(x)
    public = random_packed(2, 64, 48), reference.remap_sf(random_sf(2, 64, 6))
    one = torch.ones(())
    calls = {
        "tensor_scale": (x,),
        "quantize": (x, reference.tensor_scale(x)),
        "quantize_rows": (x, torch.tensor([3, 1], dtype=torch.int32)),
        "dequantize": (packed, sf, scale, torch.bfloat16),
        "remap_sf": (random_sf(2, 130, 5),),
        "unmap_sf": (reference.remap_sf(random_sf(2, 130, 5)), 130, 5),
        "mxfp4_to_nvfp4": (
            random_packed(2, 8, 32),
            torch.randint(110, 125, (2, 8, 2), dtype=torch.uint8),
            "best",
        ),
        "pack_sm90": public,
        "unpack_sm90": (reference.pack_sm90(*public), 96),
        "grouped_gemm": (packed, sf, scale, w13.b, w13.b_sf, w13.alpha, offsets, torch.randn(3, 64)),
        "linear": (
            x,
            w2.b[0].repeat(1, 2)[:, :24].contiguous(),
            reference.remap_sf(random_sf(48, 3)),
            one,
            "nvfp4",
            None,
        ),
        "route": (torch.randn(7, 8), torch.randn(8), 3, "sigmoid", 4, 2, True, 2.5),
        "permute": (ids, 3, 0),
        "swiglu": (lively(7, 64, dtype=torch.bfloat16), "swiglu_oai", 1.702, 7.0),
        "swiglu_quantize": (lively(7, 64, dtype=torch.bfloat16), "silu", 1.0, 0.0),
        "combine": (lively(14, 48, dtype=torch.bfloat16), reference.permute(ids, 3, 0)[2], torch.rand(7, 2)),
        "moe": (
            x,
            ids,
            torch.rand(7, 2),
            *experts,
            0,
            "nvfp4",
            "silu",
            1.0,
            0.0,
            torch.randn(3, 64),
            torch.randn(3, 48),
        ),
    }
    move = lambda a: a.to(device) if isinstance(a, torch.Tensor) else a  # noqa: E731
    return {name: tuple(move(a) for a in args) for name, args in calls.items()}


NAMES = sorted(sample_calls())


def test_these_are_all_the_operators():
    assert {
        n.removeprefix("nvfp4::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("nvfp4::")
    } == {*NAMES, "gemm_plan"}


@pytest.mark.parametrize("name", NAMES)
class TestEveryOperator:
    def test_passes_opcheck(self, name, device):
        args = sample_calls(device)[name]
        checks = {"test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"}
        if any(isinstance(a, torch.Tensor) and a.dtype == torch.float8_e4m3fn for a in args):
            checks -= {
                "test_schema"
            }  # it multiplies float8 tensors, which torch cannot (CPU; CUDA before 2.13)
        library.opcheck(getattr(OPS, name), args, test_utils=sorted(checks))

    def test_compiles_without_a_graph_break(self, name, device):
        args = sample_calls(device)[name]
        op = getattr(OPS, name)
        torch._dynamo.reset()  # one lambda for all operators would meet the recompile limit
        compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
        assert_same_bits(compiled(*args), _cpu(op(*args)), name)

    def test_fake_gives_the_same_shapes_and_dtypes(self, name, device):
        args = sample_calls(device)[name]
        meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
        one = lambda t: t if isinstance(t, tuple) else (t,)  # noqa: E731
        for real, fake in zip(one(getattr(OPS, name)(*args)), one(getattr(OPS, name)(*meta)), strict=True):
            assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())

    def test_two_calls_give_the_same_bits(self, name, device):
        args = sample_calls(device)[name]
        assert_same_bits(getattr(OPS, name)(*args), _cpu(getattr(OPS, name)(*args)))

    def test_refuses_autograd(self, name, device):
        args = [
            a.clone().requires_grad_()
            if isinstance(a, torch.Tensor) and a.is_floating_point() and a.element_size() > 1
            else a
            for a in sample_calls(device)[name]
        ]
        if not any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            pytest.skip("no operand of this operator can require grad")
        with pytest.raises(RuntimeError, match=f"nvfp4::{name} is for inference only"):
            getattr(OPS, name)(*args)
        with torch.no_grad():
            getattr(OPS, name)(*args)

    def test_refuses_operands_on_two_devices(self, name):
        args = list(sample_calls()[name])
        tensors = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
        if len(tensors) < 2:
            pytest.skip("one operand")
        args[tensors[-1]] = args[tensors[-1]].to("meta")
        with pytest.raises(
            ValueError, match=f"nvfp4::{name}: `.*` must be on .* with the other operands, got"
        ):
            getattr(OPS, name)(*args)


def _cpu(out):
    return tuple(t.cpu() for t in out) if isinstance(out, tuple) else out.cpu()


def spoil(args: tuple, i: int, how: str):
    """The call with operand i made wrong, or None where `how` does not apply."""
    t = args[i]
    if isinstance(t, torch.Tensor):
        if how == "dtype":
            t = t.view(torch.uint8).to(torch.int64) if t.element_size() == 1 else t.to(torch.float64)
        elif how == "rank":
            t = t[None]
        elif how == "last":
            t = torch.cat([t, t], -1) if t.dim() else t[None].expand(5)
        elif how == "first" and t.dim():
            t = torch.cat([t, t[:1]], 0)
        elif how == "stride" and t.dim():
            t = (
                torch.stack([t.view(torch.uint8), t.view(torch.uint8)], -1)[..., 0].view(t.dtype)
                if t.element_size() == 1
                else torch.stack([t, t], -1)[..., 0]
            )
        elif how == "drop" and t.dim():
            t = t[0]
    elif isinstance(t, str):
        t = "nonsense"
    elif isinstance(t, int) and not isinstance(t, bool):
        t = -3 if how == "dtype" else 10**6
    return (*args[:i], t, *args[i + 1 :])


def outcome(name, args):
    """The error text of a call, or 'ok' and what came out."""
    try:
        out = getattr(OPS, name)(*args)
    except ValueError as error:
        return str(error)
    except RuntimeError as error:  # torch's own schema errors, or (REFUSED) a refusal
        return str(error) if str(error).startswith("nvfp4::") else "RuntimeError"
    return [(t.shape, t.dtype) for t in (out if isinstance(out, tuple) else (out,))]


@pytest.mark.parametrize("name", NAMES)
def test_kernel_and_fake_accept_and_refuse_the_same_calls_in_the_same_words(name):
    args = sample_calls()[name]
    refused = 0
    for i in range(len(args)):
        for how in ("dtype", "rank", "last", "first", "stride", "drop"):
            bad = spoil(args, i, how)
            got, want = outcome(name, bad), outcome(name, tuple(_meta_like(a) for a in bad))
            if isinstance(got, str):
                refused += 1
                assert got.startswith(f"nvfp4::{name}: ") or got == "RuntimeError", got
            assert _place(got) == _place(want), f"operand {i}, {how}"
    assert refused >= 1


def _meta_like(a):
    """A meta copy that keeps the strides, since they are among the things checked."""
    return (
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")
        if isinstance(a, torch.Tensor)
        else a
    )


def _place(outcome):
    return outcome.replace(" meta ", " cpu ") if isinstance(outcome, str) else outcome


def test_error_texts_name_operand_wanted_and_got():
    args = list(sample_calls()["moe"])
    args[7] = args[7].view(torch.uint8)
    with pytest.raises(REFUSED) as error:
        OPS.moe(*args)
    want = "nvfp4::moe: `w2_sf` must be float8_e4m3fn [E, cosize(N, K/16)] = [3, 512], got uint8 [3, 512]"
    assert str(error.value) == want


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_random_bad_calls_end_in_python_exceptions(data):
    name = data.draw(st.sampled_from(NAMES))
    args = sample_calls()[name]
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, len(args) - 1))
        args = spoil(
            args, i, data.draw(st.sampled_from(["dtype", "rank", "last", "first", "stride", "drop"]))
        )
    outcome(name, args)


def test_dynamic_shapes_compile_once():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    f = torch.compile(lambda x: ops.quantize_rows(x)[0], fullgraph=True, dynamic=True, backend=counter)
    for T in (3, 5, 9):
        f(torch.randn(T, 64).bfloat16())
    assert counter.frame_count == 1
