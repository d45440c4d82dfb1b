"""nvfp4 convert and nvfp4 quantize: a checkpoint in, another out."""

import sys
import time
from pathlib import Path

from ..checkpoint.convert import METHODS as CONVERT_METHODS
from ..checkpoint.convert import plan_conversion, surely_exact
from ..checkpoint.quantize import plan_quantization
from ..checkpoint.rewrite import REPORT, Plan, Result, summarize
from ..checkpoint.writer import SHARD_BYTES
from ..tensor import METHODS as QUANTIZE_METHODS
from .common import add_command, progress_bar, show_bytes, size

CONVERT_EXAMPLES = """\
  nvfp4 convert gpt-oss-20b gpt-oss-20b-NVFP4
  nvfp4 convert DeepSeek-V4-Flash DeepSeek-V4-Flash-NVFP4 --dry-run
  nvfp4 convert Kimi-K3 Kimi-K3-NVFP4 --to compressed-tensors --activation-amax 400
"""
QUANTIZE_EXAMPLES = """\
  nvfp4 quantize Qwen3-30B-A3B Qwen3-30B-A3B-NVFP4 --method mse
  nvfp4 quantize Mixtral-8x7B Mixtral-NVFP4 --layers linears --exclude '*.self_attn.*'
  nvfp4 quantize model out --include lm_head --exclude 're:model\\.layers\\.(0|1)\\.' --dry-run
"""
RESUME = "; finished shards are kept: the same command goes on from there"


def add_convert(commands) -> None:
    parser = add_command(commands, "convert", run_convert, "MXFP4 to NVFP4, resumable", CONVERT_EXAMPLES)
    _add_common(parser, CONVERT_METHODS, "best")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ..: where scales are chosen")


def add_quantize(commands) -> None:
    parser = add_command(commands, "quantize", run_quantize, "BF16 to NVFP4, resumable", QUANTIZE_EXAMPLES)
    _add_common(parser, QUANTIZE_METHODS, "amax")
    parser.add_argument(
        "--layers", choices=("experts", "linears"), default="experts", help="routed experts, or all linears"
    )
    help = "modules too: a name, a glob or re:pattern; may be repeated"
    parser.add_argument("--include", action="append", default=[], metavar="PATTERN", help=f"these {help}")
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help=f"not these {help}")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ..: where it is computed")


def _add_common(parser, methods: tuple[str, ...], method: str) -> None:
    parser.add_argument("source", type=Path, help="folder with *.safetensors and config.json")
    parser.add_argument("target", type=Path, help="new folder, or one an interrupted run left")
    parser.add_argument("--method", choices=methods, default=method, help=f"default: {method}")
    parser.add_argument(
        "--to", choices=("modelopt", "compressed-tensors"), help="names and config of the target"
    )
    parser.add_argument(
        "--activation-amax",
        type=float,
        metavar="X",
        help="largest |activation|: write input scales X / 2688 for engines that quantize activations by a"
        " static scale; too large by 1000 costs nothing. Without it: weights only (W4A16)",
    )
    parser.add_argument(
        "--shard-size", type=size, default=SHARD_BYTES, metavar="SIZE", help="largest file; default 5GB"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, write nothing")
    parser.set_defaults(hint="")


def run_convert(args) -> int:
    plan = plan_conversion(args.source, args.to, args.method, args.activation_amax, args.device)
    if args.dry_run:
        _describe(plan, args)
        with progress_bar(f"reading the scales of {args.source.name}", 0) as advance:
            sure, total = surely_exact(args.source, advance)
        if total:
            print(f"exact by their exponents alone: {sure} of {total} matrices")
        return 0
    return _execute(plan, args, "converting")


def run_quantize(args) -> int:
    plan = plan_quantization(
        args.source, args.to or "modelopt", args.method, args.layers, args.include, args.exclude,
        args.activation_amax, args.device,
    )  # fmt: skip
    if args.dry_run:
        _describe(plan, args)
        for name in plan.modules[:6]:
            print(f"  {name}")
        print(f"  .. {len(plan.modules)} modules in all")
        return 0
    return _execute(plan, args, "quantizing")


def _describe(plan: Plan, args) -> None:
    for note in plan.notes:
        print(f"note: {note}")
    shards = -(-plan.target_bytes // args.shard_size)
    print(
        f"{args.source}: {show_bytes(plan.source_bytes)}, {len(plan.shards.files)} files\n"
        f"{args.target}: {show_bytes(plan.target_bytes)}, about {shards} files, {plan.target},"
        f" {len(plan.modules)} modules in NVFP4, method {args.method}"
    )


def _execute(plan: Plan, args, verb: str) -> int:
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    args.hint = RESUME
    start = time.perf_counter()
    with progress_bar(f"{verb} {args.source.name}", plan.source_bytes) as advance:
        result = plan.run(args.target, advance, max_shard_bytes=args.shard_size)
    seconds = time.perf_counter() - start
    rate = show_bytes(plan.source_bytes / seconds)
    print(
        f"{args.target}: {show_bytes(plan.target_bytes)} in {result.shards} files,"
        f" {seconds:.1f} s, {rate}/s of input" + (" (resumed)" if result.skipped else "")
    )
    _summary(result, verb)
    return 0


def _summary(result: Result, verb: str) -> None:
    total = summarize(result.reports.values())
    if verb == "converting":
        print(f"{total['exact']} of {total['modules']} matrices kept every bit")
        if total["rounded"]:
            print(
                f"{total['rounded']} kept codes and block scales, and their global scale but for the rounding"
                f" of 1 / x: {total['largest_rounding']:.2g} at most"
            )
    elif result.reports:
        mean = sum(r["relative_rms"] for r in result.reports.values()) / len(result.reports)
        print(f"{total['modules']} matrices; mean relative RMS error {100 * mean:.2f} %")
    for worst in total["worst"][:5] if verb == "converting" else total["worst"][:2]:
        span = f", exponents span {worst['spread']}" if "spread" in worst else ""
        print(f"  {worst['module']}: relative RMS error {100 * worst['relative_rms']:.3g} %{span}")
    if total["changed"] > 5 and verb == "converting":
        print(f"  .. {total['changed']} in all: {result.path / REPORT}")
