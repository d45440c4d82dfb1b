"""mxfp4_to_nvfp4 on the CPU: input bytes (codes and exponents) a second, by method and span of the exponents.

Random codes of 8 experts of 2048 x 4096, exponents uniform over the span; the median of 7 wall times, outputs
allocated within, inputs from memory (36 MB and more).
"""

import os

import torch
from timing import cpu_microseconds, heading

from nvfp4_moe import ops

METHODS = ("best", "hybrid", "verbatim_search", "requantize")


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
                run = lambda _, source=source, method=method: ops.mxfp4_to_nvfp4(*source, method)  # noqa: E731
                bytes_read = sum(t.numel() for t in source)
                speed = bytes_read / cpu_microseconds(run, 1)
                print(f"{threads:>7} {span:>5} {method:>16} {speed:>8.0f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.inference_mode():
        main()
