"""A card that is taken but for a few multiprocessors, by CTAs that leave no room beside them."""

import time
from contextlib import contextmanager

import torch
import triton
import triton.language as tl

WARPS, NUMBERS = 32, 32768  # 32 numbers a thread, in registers: half of a multiprocessor's
PATIENCE = (
    3_000_000  # looks, of a microsecond or more, until a CTA leaves untold: a test shall fail, not hang
)


@triton.jit
def sit(here, leave, untold, numbers, patience: tl.constexpr, N: tl.constexpr):
    own = numbers + tl.program_id(0) * N + tl.arange(0, N)
    held = tl.load(own)
    tl.atomic_add(here, 1)
    told, looks = tl.atomic_add(leave, 0), 0
    while (told == 0) & (looks < patience):
        told = tl.atomic_add(leave, 0)
        looks += 1
    if told == 0:
        tl.atomic_add(untold, 1)
    tl.store(own, held + 1)


@contextmanager
def crowd(free: int):
    """Leaves `free` multiprocessors to the block, which must end while all others are taken."""
    CTAs = torch.cuda.get_device_properties().multi_processor_count - free
    here, leave, untold = torch.zeros(3, 1, dtype=torch.int32, device="cuda")
    numbers = torch.zeros(CTAs * NUMBERS, device="cuda")
    yes = torch.ones(1, dtype=torch.int32).pin_memory()
    stream, other = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        sit[(CTAs,)](here, leave, untold, numbers, PATIENCE, NUMBERS, num_warps=WARPS)
    with torch.cuda.stream(other):
        while here.item() < CTAs:
            time.sleep(0.001)
    try:
        yield
    finally:
        with torch.cuda.stream(other):
            leave.copy_(yes, non_blocking=True)
        torch.cuda.synchronize()
    assert not untold.item(), f"it ended only when {untold.item()} of {CTAs} CTAs had left untold"
