"""Comparisons, with the tolerances of GEMMs and layers, each with its derivation."""

import torch
from torch import Tensor

# What a kernel's refusal arrives as: up to 2.13 torch's stable ABI hands the exception's class over, 2.15 its
# text only.
REFUSED = ValueError if torch.__version__ < "2.14" else (ValueError, RuntimeError)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_same_bits(got: Tensor, want: Tensor, what: str = "") -> None:
    """Every byte equal (so -0 is not 0), except that any NaN equals any NaN."""
    if isinstance(want, tuple):
        assert len(got) == len(want)
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            assert_same_bits(g, w, f"{what} output {i}")
        return
    assert got.dtype == want.dtype and got.shape == want.shape, (
        f"{what}: {got.dtype} {got.shape} is not {want.dtype} {want.shape}"
    )
    g, w = (t.detach().cpu().contiguous().view(_BITS[t.element_size()]) for t in (got, want))
    differ = g != w
    if got.dtype.is_floating_point and got.element_size() > 1:
        differ &= ~(got.cpu().isnan() & want.cpu().isnan())
    if differ.any():
        first = tuple(differ.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {differ.numel()} differ, first at {list(first)}: "
            f"got {got.cpu()[first].float():.9g}, want {want.cpu()[first].float():.9g}"
        )


def gemm_bound(a: Tensor, w: Tensor, acc: Tensor) -> Tensor:
    """How far float32 sums may lie from the float64 sum `acc` of exact products a w^T.

    Adding K terms in any order, each addition off by at most 2^-24 of its result (we allow 2^-23:
    instructions that truncate), and no partial sum above sum |a||w|: K * 2^-23 * sum |a||w|. Subnormal terms
    may be flushed: 2^-126 each."""
    K = a.shape[-1]
    return K * 2.0**-23 * (a.double().abs() @ w.double().abs().mT) + K * 2.0**-126


def chain_bound(a: Tensor, w: Tensor, order: Tensor) -> Tensor:
    """gemm_bound, tighter, for one chain of tensor-core products of 16 terms each, in `order` of every 64 k.

    An instruction aligns 16 products and the accumulator to the largest of them, keeps 24 bits or more of
    each and of the sum: 18 cuts below 2^-23 M each, M = |accumulator| + sum of |products| in it, which no
    addend or partial sum exceeds. An error made grows by 1 + 18 * 2^-23 an instruction, by less than 19/18
    in all up to K = 400,000: hence 19. The accumulator is that of exact sums, so cancellation tightens the
    bound: for Gaussian data at K = 7168 it is 1/1700 of an output's RMS (gemm_bound: 1/21; a product: 1/130).
    Kernels may sum in units of 2^7, so a flushed subnormal is 2^-119 at most."""
    K, missing = a.shape[-1], -a.shape[-1] % len(order)
    steps = (torch.arange(0, K + missing, len(order))[:, None] + order).view(-1, 16)
    xs, ys = (torch.nn.functional.pad(t.double(), (0, missing))[..., steps].movedim(-2, 0) for t in (a, w))
    acc = torch.zeros(*a.shape[:-1], w.shape[-2], dtype=torch.float64, device=a.device)
    cuts = torch.zeros_like(acc)
    for x, y in zip(xs.split(8), ys.mT.split(8), strict=True):  # eight instructions
        products = x @ y
        before = torch.cat((acc[None], acc + products[:-1].cumsum(0)))
        cuts += (before.abs() + x.abs() @ y.abs()).sum(0)
        acc += products.sum(0)
    return 19 * 2.0**-23 * cuts + K * 2.0**-119


def assert_gemm(
    got: Tensor, a: Tensor, w: Tensor, alpha, a_scale=None, bias=None, what: str = "", order=None
) -> None:
    """got bf16 [.., R, N] is bf16((acc * alpha) * a_scale + bias), a_scale [.., R], for some acc within
    gemm_bound of a w^T, or, where the chip sums in a known `order`, within chain_bound.

    Rounding is monotone, so got lies between the epilogue of the two ends; the epilogue's own float32
    roundings are the contract's, so the ends are computed with them. A NaN must be where float64 has one."""
    acc = a.double() @ w.double().mT
    bound = gemm_bound(a, w, acc) if order is None else chain_bound(a, w, order)
    ends = []
    for end in (acc - bound, acc + bound):
        out = end.float() * alpha
        out = out if a_scale is None else out * a_scale[..., None]
        out = out if bias is None else out + bias
        ends.append(out.bfloat16().float())
    got = got.to(acc.device).float()
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    assert torch.equal(got.isnan(), low.isnan()), f"{what}: NaN in other places"
    wrong = ~((got >= low) & (got <= high)) & ~got.isnan()
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} outside the bound, in {int(wrong.any(-1).sum())} "
            f"rows and {int(wrong.flatten(0, -2).any(0).sum())} columns, first at {list(at)}: "
            f"got {got[at]:.9g}, want {low[at]:.9g} .. {high[at]:.9g}"
        )


def assert_close_layers(got: Tensor, want: Tensor, what: str = "") -> None:
    """A whole layer against the reference: sums in another order move a BF16 by one unit now and then (2^-8),
    and a moved activation may quantize to the neighbouring E2M1 code, a quarter of a value at worst. With
    tens of terms an output and few such events the relative RMS error stays below 2^-8; a swapped expert,
    gate or scale gives about 1."""
    error = (got.cpu().double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
    assert error < 2.0**-8, f"{what}: relative RMS error {error:.3g}"


def relative_rms(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())
