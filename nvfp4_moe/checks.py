"""The checks of csrc/ops/tensor.h, for the fakes: the same conditions, the same words."""

import torch
from torch import Tensor

ANY = None  # in a wanted shape: any size
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check(cond: bool, op: str, message: str) -> None:
    if not cond:
        raise ValueError(f"nvfp4::{op}: {message}")


def show_shape(shape) -> str:
    return "[" + ", ".join("*" if s is ANY else str(s) for s in shape) + "]"


def _fits(got, wanted) -> bool:
    return len(got) == len(wanted) and all(w is ANY or g == w for g, w in zip(got, wanted, strict=True))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def expect(
    op: str, name: str, t: Tensor, home: Tensor, dtypes, symbols: str, wanted, tail=False, fits=None
) -> None:
    """`t` must have one of `dtypes` and the shape `wanted` (its last dimensions if `tail`), and be where
    `home` is."""
    if fits is None:
        got = t.shape[t.dim() - len(wanted) :] if tail and t.dim() >= len(wanted) else t.shape
        fits = _fits(got, wanted)
    names = " | ".join(map(_name, dtypes))
    want, got = f"{names} {symbols} = {show_shape(wanted)}", f"{_name(t.dtype)} {show_shape(t.shape)}"
    check(t.dtype in dtypes and fits, op, f"`{name}` must be {want}, got {got}")
    check(
        t.device == home.device,
        op,
        f"`{name}` must be on {home.device} with the other operands, got {t.device}",
    )


def expect_contiguous(op: str, name: str, t: Tensor) -> None:
    check(
        t.is_contiguous(),
        op,
        f"`{name}` must be contiguous, got shape {show_shape(t.shape)} with strides {show_shape(t.stride())}",
    )


def expect_multiple(op: str, what: str, value: int, of: int) -> None:
    check(value > 0 and value % of == 0, op, f"{what} must be a positive multiple of {of}, got {value}")


def expect_scale(op: str, name: str, scale: Tensor, home: Tensor, lead) -> None:
    """float32 [] or broadcastable to `lead`."""
    got = scale.shape
    fits = len(got) <= len(lead) and all(
        g == w or g == 1 for g, w in zip(got, lead[len(lead) - len(got) :], strict=True)
    )
    expect(op, name, scale, home, (torch.float32,), "[] or broadcastable to [..]", lead, fits=fits)


def expect_one_of(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    check(value in choices, op, f"`{name}` must be {' | '.join(choices)}, got {value}")


def size(t: Tensor, i: int):
    """The size of dimension i, ANY if there is none: the shape check that follows says what was wanted."""
    return t.shape[i] if -t.dim() <= i < t.dim() else ANY
