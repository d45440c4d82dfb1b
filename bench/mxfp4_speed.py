"""mxfp4_to_nvfp4 on the CPU: input bytes (codes and exponents) a second, by method and span of the exponents.

Random codes of 8 experts of 2048 x 4096, exponents uniform over the span; median wall time, outputs
allocated within, inputs from memory (36 MB and more).
"""

import os
from functools import partial

import torch
from timing import cpu_microseconds, heading

from nvfp4_moe import ops

METHODS = ("best", "hybrid", "verbatim_search", "requantize")


def convert(source: tuple, method: str, _: int) -> None:
    ops.mxfp4_to_nvfp4(*source, method)


def main() -> None:
    print(heading("mxfp4_to_nvfp4"))
    print(f"{'threads':>7} {'span':>5} {'method':>16} {'MB/s':>8}")
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        for span in (5, 17, 20):
            packed = torch.randint(0, 256, (8, 2048, 2048), dtype=torch.uint8)
            e8m0 = torch.randint(110, 111 + span, (8, 2048, 128)).to(torch.uint8)
            for method in METHODS:
                experts = 1 if method == "best" and span > 17 else 8  # a second each
                source = packed[:experts], e8m0[:experts]
                call = partial(convert, source, method)
                speed = sum(t.numel() for t in source) / cpu_microseconds(call, 1)
                print(f"{threads:>7} {span:>5} {method:>16} {speed:>8.0f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.inference_mode():
        main()
