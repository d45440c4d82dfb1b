"""nvfp4 bench: what an MoE layer costs on this machine."""

import statistics
import time

import torch

from .. import ops
from ..checkpoint.rewrite import check_device
from ..tensor import Nvfp4Tensor
from .common import add_command, positive

EXAMPLES = """\
  nvfp4 bench                                     a Qwen3-30B-A3B layer on the CPU
  nvfp4 bench --device cuda --tokens 1 64 4096
  nvfp4 bench --hidden 7168 --intermediate 3072 --experts 48 --top-k 6
"""


def add_bench(commands) -> None:
    parser = add_command(commands, "bench", run, "what an MoE layer costs here", EXAMPLES)
    parser.add_argument("--hidden", type=positive, default=2048)
    parser.add_argument("--intermediate", type=positive, default=768)
    parser.add_argument("--experts", type=positive, default=128)
    parser.add_argument("--top-k", type=positive, default=8)
    parser.add_argument("--tokens", type=positive, nargs="+", default=[1, 8, 64])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each line")


def run(args) -> int:
    check_device(args.device)
    try:
        return _measure(args)
    except (ValueError, RuntimeError) as error:  # sizes that the operators do not take
        raise SystemExit(f"nvfp4 bench: {str(error).splitlines()[0]}") from None


def _measure(args) -> int:
    H, I, E = args.hidden, args.intermediate, args.experts
    torch.manual_seed(0)
    with torch.inference_mode():
        w13, w2 = (_experts(E, n, k, args.device) for n, k in ((2 * I, H), (H, I)))
        shapes = f"{E} experts [{2 * I}, {H}] and [{H}, {I}], top {args.top_k}"
        where = f"{args.device}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}"
        print(f"torch.ops.nvfp4.moe, {shapes}, {where}, median")
        print(f"{'tokens':>7} {'compute':>8} {'us':>10} {'GFLOP/s':>9} {'weights GB/s':>13}  plan")
        for T in args.tokens:
            for compute in ("bf16", "nvfp4"):
                _line(T, compute, w13, w2, args)
    return 0


def _experts(E: int, N: int, K: int, device: str) -> tuple:
    """Random codes under plausible scales: speed does not depend on the values."""
    w = Nvfp4Tensor(
        torch.randint(0, 256, (E, N, K // 2), dtype=torch.uint8),
        torch.randint(0x30, 0x48, (E, N, K // 16)).to(torch.uint8).view(torch.float8_e4m3fn),
        torch.full((E,), 0.01),
    ).to(device)
    return w.packed, w.interleaved_sf(), w.alpha


def _line(T: int, compute: str, w13: tuple, w2: tuple, args) -> None:
    H, I, E, k = args.hidden, args.intermediate, args.experts, args.top_k
    x = torch.randn(T, H, device=args.device).bfloat16()
    weights, ids = ops.route(torch.randn(T, E, device=args.device), None, k)
    us = _microseconds(lambda: ops.moe(x, ids, weights, *w13, *w2, compute=compute), args)
    flops, used = 6 * T * k * H * I, len(ids.unique())
    weight_bytes = used * 3 * H * I * 9 / 16
    print(f"{T:>7} {compute:>8} {us:>10.0f} {flops / us / 1e3:>9.0f} {weight_bytes / us / 1e3:>13.1f}"
          f"  {ops.gemm_plan(T * k, 2 * I, H, E, compute)}")  # fmt: skip


def _microseconds(call, args) -> float:
    cuda = args.device.startswith("cuda")
    times, stop = [], None
    while stop is None or time.perf_counter() < stop or len(times) < 5:
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        stop = stop or time.perf_counter() + args.seconds
    return statistics.median(times[1:]) * 1e6
