"""One small call of every operator, held against the reference."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import ops, reference

T, E, TOP_K, H, I = 5, 4, 2, 64, 32


def operators(device: str) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """(operator, run): run() gives None, or what is wrong with the result; it raises what the operator
    raises."""
    calls = _calls()
    for name in reference.__all__:
        yield name, lambda name=name: _differs(name, calls[name], device)


def _calls() -> dict[str, tuple]:
    """Operands by operator, on the CPU; the same at every call."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=rng).to(dtype)

    def weights(*shape) -> tuple[Tensor, Tensor, Tensor]:
        w = normal(*shape)
        alpha = w.float().abs().amax((-1, -2)) / 2688
        packed, sf = reference.quantize(w, alpha[..., None])
        return packed, reference.remap_sf(sf), alpha

    x = normal(T, H)
    w13, w2 = weights(E, 2 * I, H), weights(E, H, I)
    packed, sf, scale = reference.quantize_rows(x)
    probabilities, ids = reference.route(normal(T, E), None, TOP_K, "softmax", 1, 1, True, 1.0)
    _, offsets, slots = reference.permute(ids, E, 0)
    gate_up = normal(T, 2 * I)
    one = (w13[0][0], w13[1][0], w13[2][0])
    codes = torch.randint(0, 256, (8, 32), dtype=torch.uint8, generator=rng)
    exponents = torch.randint(110, 125, (8, 2), dtype=torch.uint8, generator=rng)
    rows = torch.arange(T * TOP_K) % T
    return {
        "tensor_scale": (x,),
        "quantize": (x, torch.tensor(0.01)),
        "quantize_rows": (x,),
        "dequantize": (packed, sf, scale, torch.float32),
        "remap_sf": (sf,),
        "unmap_sf": (reference.remap_sf(sf), T, H // 16),
        "pack_sm90": w13[:2],
        "unpack_sm90": (reference.pack_sm90(*w13[:2]), H),
        "mxfp4_to_nvfp4": (codes, exponents, "best"),
        "grouped_gemm": (x[rows], None, None, *w13, offsets),
        "linear": (x, *one, "nvfp4"),
        "route": (normal(T, E), None, TOP_K, "sigmoid", 1, 1, True, 1.0),
        "permute": (ids, E, 0),
        "swiglu": (gate_up, "silu", 1.0, 0.0),
        "swiglu_quantize": (gate_up, "silu", 1.0, 0.0),
        "combine": (normal(T * TOP_K, H), slots, probabilities),
        "moe": (x, ids, probabilities, *w13, *w2, 0, "nvfp4", "silu", 1.0, 0.0),
    }


# Sums in another order may move a BF16 result by one unit, 2^-8 of it (and moe quantizes such a result again,
# a quarter of a value at worst, in a few of hundreds); a wrong scale, expert or half gives about 1.
SUMS = {"grouped_gemm": 2.0**-7, "linear": 2.0**-7, "moe": 2.0**-5}


def _differs(name: str, operands: tuple, device: str) -> str | None:
    wanted = getattr(reference, name)(*operands)
    got = getattr(ops, name)(*(v.to(device) if isinstance(v, Tensor) else v for v in operands))
    wanted, got = ((v,) if isinstance(v, Tensor) else tuple(v) for v in (wanted, got))
    for i, (g, w) in enumerate(zip(got, wanted, strict=True)):
        g = g.cpu()
        if name in SUMS:
            error = float((g.double() - w.double()).norm() / w.double().norm())
            if not error <= SUMS[name]:
                return f"relative RMS error {error:.3g}, at most {SUMS[name]:.3g} is rounding"
        elif not torch.equal(*(t.flatten().view(torch.uint8) for t in (g, w))):
            return f"output {i} is not the reference's, bit for bit"
    return None
