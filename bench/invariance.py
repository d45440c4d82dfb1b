"""What batch invariance costs a decoding layer: each sum is one chain in ascending K, never split.

    python bench/invariance.py [--rows N ..]

Beside each product of a model the same bytes as twice and four times as many rows of a half and a quarter of
K, which is what a split of K would take, less adding up what comes out; "-" where K does not allow it.
Packed weights on Hopper, cold, one graph each, replayed in turns; `rows` experts have one row each."""

import argparse
import json

import cold
import torch
from cases import MODELS
from moe import commit
from peers_ours import runs_packed

from nvfp4_moe import ops

SPLITS = (1, 2, 4)


def product(E: int, N: int, K: int):
    """A call of one row for each of E experts; None where no kernel of the chip takes the shape."""
    if K % 32 or N % 64:
        return None
    codes = torch.randint(0, 256, (E, N, K // 2), dtype=torch.uint8, device="cuda")
    sf = torch.randint(40, 64, (E, N, K // 16), dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    b, b_sf = codes, ops.remap_sf(sf)
    if runs_packed():
        b, b_sf = ops.pack_sm90(b, b_sf), b_sf.new_empty(0)
    alpha, offsets = torch.rand(E, device="cuda"), torch.arange(E + 1, dtype=torch.int32, device="cuda")
    a = torch.randn(E, K, device="cuda").bfloat16()
    return lambda: ops.grouped_gemm(a, None, None, b, b_sf, alpha, offsets)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", type=int, help="experts hit; default: a token's, and all")
    args = parser.parse_args()
    clock = cold.Clock()
    print(json.dumps(cold.about(commit())))
    print(f"{'':16} {'product':>20} {'rows':>5} | {'one chain':>10} {'halves':>7} {'quarters':>8}  us")
    for model in MODELS:
        for N, K in ((2 * model.intermediate, model.hidden), (model.hidden, model.intermediate)):
            for rows in args.rows or (model.top_k, model.experts):
                runs = [product(rows, split * N, K // split) for split in SPLITS]
                graphs = [clock.capture(run)[0] for run in runs if run]
                times = iter(clock.in_turns(graphs))
                us = [f"{next(times).us:.1f}" if run else "-" for run in runs]
                size = f"[{rows}, {N}, {K}]"
                print(f"{model.name:16} {size:>20} {rows:5} | {us[0]:>10} {us[1]:>7} {us[2]:>8}", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
