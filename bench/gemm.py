"""The CPU grouped GEMM beside torch.matmul, on one thread and on all.

included: one call on prepared operands          excluded: quantizing, remapping, decoding ahead of time
torch: matmul with the dequantized weights, the faster of BF16 and FP32; dequantize+matmul: what a model does
that has only the packed weights and torch. % of torch compares with the former. GB/s counts packed weights
and scales."""

import argparse
import os

import torch
from cases import GEMM_ROWS, GEMM_SHAPES
from timing import cpu_microseconds, heading

from nvfp4_moe import Nvfp4Tensor, ops

COPIES = 6  # sets of weights: 6 x 9 MB packed, 6 x 32 MB in BF16


def time_shape(N: int, K: int, rows: tuple[int, ...]) -> list[dict]:
    weights = [Nvfp4Tensor.quantize(torch.randn(N, K) * 0.02) for _ in range(COPIES)]
    sfs = [w.interleaved_sf() for w in weights]
    dense = [w.dequantize(torch.bfloat16) for w in weights]
    single = [d.float() for d in dense]
    results = []
    for R in rows:
        x = torch.randn(R, K).bfloat16()
        x32 = x.float()
        results.append(
            {
                "R": R,
                "ours": cpu_microseconds(
                    lambda i, x=x: ops.linear(x, weights[i].packed, sfs[i], weights[i].alpha, "bf16"), COPIES
                ),
                "bf16": cpu_microseconds(lambda i, x=x: x @ dense[i].T, COPIES),
                "fp32": cpu_microseconds(lambda i, x32=x32: x32 @ single[i].T, COPIES),
                "dequantize": cpu_microseconds(
                    lambda i, x=x: x @ weights[i].dequantize(torch.bfloat16).T, COPIES
                ),
            }
        )
    return results


def row(N: int, K: int, threads: int, r: dict) -> str:
    R, ours, torch_us = r["R"], r["ours"], min(r["bf16"], r["fp32"])
    gflops, gigabytes = 2e-3 * R * N * K / ours, N * K * 9 / 16 / 1e3 / ours
    return (
        f"{N:>6} {K:>6} {threads:>7} {R:>5} {ours:>8.0f} {gflops:>8.0f} {gigabytes:>6.1f} {torch_us:>9.0f}"
        f" {100 * torch_us / ours:>9.0f}% {r['dequantize']:>18.0f}  {ops.gemm_plan(R, N, K, 1, 'bf16')}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=GEMM_ROWS)
    args = parser.parse_args()
    print(heading("grouped GEMM (linear, W4A16)"))
    print(f"{'N':>6} {'K':>6} {'threads':>7} {'R':>5} {'us':>8} {'GFLOP/s':>8} {'GB/s':>6}", end="")
    print(f" {'torch us':>9} {'% of torch':>10} {'dequantize+matmul':>18}  plan")
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        for N, K in GEMM_SHAPES:
            for r in time_shape(N, K, tuple(args.rows)):
                print(row(N, K, threads, r))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
