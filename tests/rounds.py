"""The same layers and products over and over on a Hopper, and how often their bits are not what they were:
alone, under compute-sanitizer, or beside as many processes of its own.

python tests/rounds.py [--seconds N] [--seed N]

A round is a layer in one launch, one in two, and two products, all in tiles of 256x8 that hand on sums.
"""

import argparse
import sys
import time

import torch
from test_sm90 import DEVICE, tokens
from test_sm90_moe import NARROW, WIDE, layer

from nvfp4_moe import ops


def calls():
    one, two = layer(20, *NARROW), layer(30, *WIDE)
    offsets = [ops.permute(args[1], len(args[3]))[1] for args in (one, two)]
    hidden, x = tokens(one[1].numel(), NARROW[3]), tokens(two[1].numel(), WIDE[2])
    return {
        "one launch, bf16": lambda: ops.moe(*one, 0, "bf16"),
        "two launches, nvfp4": lambda: ops.moe(*two, 0, "nvfp4", "swiglu_limit", 1.702, 3.0),
        "w2": lambda: ops.grouped_gemm(hidden, None, None, *one[6:9], offsets[0]),
        "w13": lambda: ops.grouped_gemm(x, None, None, *two[3:6], offsets[1]),
    }


def most_say(outs: list[torch.Tensor]) -> torch.Tensor:
    return max(outs, key=lambda out: sum(torch.equal(out, other) for other in outs))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    run = calls()
    want = {name: most_say([call().cpu() for _ in range(7)]).to(DEVICE) for name, call in run.items()}
    rounds, wrong, end = 0, dict.fromkeys(run, 0), time.monotonic() + args.seconds
    while time.monotonic() < end:
        rounds += 1
        for name, call in run.items():
            differ = call().view(torch.int16) != want[name].view(torch.int16)
            if differ.any():
                wrong[name] += 1
                rows, columns = (sorted({*at.tolist()}) for at in differ.nonzero().T)
                print(f"round {rounds}, {name}: rows {rows}, columns {columns}", flush=True)
    print(f"{rounds} rounds, wrong: {wrong}")
    sys.exit(any(wrong.values()))


if __name__ == "__main__":
    main()
