"""A card that is taken but for a few multiprocessors, by CTAs that leave no room beside them."""

import time
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

WARPS, NUMBERS = 32, 32768  # 32 numbers a thread, in registers: half of a multiprocessor's
PATIENCE = 5_000_000_000  # ns, after which a CTA goes by itself: a test shall fail, not hang


@triton.jit
def sit(here, leave, numbers, patience: tl.constexpr, N: tl.constexpr):
    own = numbers + tl.program_id(0) * N + tl.arange(0, N)
    held = tl.load(own)
    until = globaltimer() + patience
    tl.atomic_add(here, 1)
    while (tl.atomic_add(leave, 0) == 0) & (globaltimer() < until):
        pass
    tl.store(own, held + 1)


@contextmanager
def crowd(free: int):
    """Leaves `free` multiprocessors until the end of the block; gives an event, over once nobody sits."""
    CTAs = torch.cuda.get_device_properties().multi_processor_count - free
    here, leave = torch.zeros(2, 1, dtype=torch.int32, device="cuda")
    numbers = torch.zeros(CTAs * NUMBERS, device="cuda")
    yes = torch.ones(1, dtype=torch.int32).pin_memory()
    stream, other, over = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        sit[(CTAs,)](here, leave, numbers, PATIENCE, NUMBERS, num_warps=WARPS)
        over.record()
    with torch.cuda.stream(other):
        while here.item() < CTAs:
            time.sleep(0.001)
    try:
        yield over
    finally:
        with torch.cuda.stream(other):
            leave.copy_(yes, non_blocking=True)
        torch.cuda.synchronize()
