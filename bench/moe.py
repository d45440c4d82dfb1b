"""The MoE layer after routing, beside its floor and every NVFP4 layer that can be imported, in one run.

    python bench/moe.py [--models NAME ..] [--tokens T ..] [--peers humming marlin bf16] [--json FILE]

x bf16 [T, H], ids int32 [T, k], weights float32 [T, k] -> bf16 [T, H]; uniform routing, weights cold in L2,
one CUDA graph a point, its launch included (cold.py). floor: max((NVFP4 bytes of the experts hit +
activations) / 4.55 TB/s, FLOP / 790 TFLOP/s). GB/s counts the NVFP4 bytes of the experts hit; roof is
the share of the rate measured in this run that binds: of reading, net of the launch, or of cuBLAS BF16. Every
system's output (the graph's, on memory that held NaN) is compared with float32 arithmetic on the exactly
dequantized weights, ours also with the generic CUDA kernels in a process without chip libraries. A peer that
is not installed shows n/a and the reason.

On Hopper "ours" reads weights in its own order, as a layer does after pack_(); "public" is the same call on
the layout that every chip reads. Elsewhere "ours" is the public layout and "public" n/a.

peers: peers_humming.py (pip: humming-kernels), peers_vllm.py (pip: vllm, of which one .so is enough)."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import cold
import moe_generic
import peers_humming
import peers_ours
import peers_vllm
import torch
from cases import MODELS, MOE_TOKENS, Model
from moe_layer import Layer, Tokens, make_layer, make_tokens, reference, relative_error, work
from moe_table import show_breakdown, show_model, show_summary

PEERS = {"humming": peers_humming.make, "marlin": peers_vllm.make, "bf16": peers_ours.bf16}
# Sums in another order, rounded to BF16 in three places, differ by 0.004 to 0.006; a wrong scale by 1.
LIMIT = 2.0**-7
START = time.perf_counter()

Run = Callable[[Tokens], torch.Tensor]


def commit() -> str:
    if known := os.environ.get("NVFP4_COMMIT"):
        return known
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return head.stdout.strip() or "unknown"


def say(what: str) -> None:
    print(f"[{time.perf_counter() - START:4.0f} s] {what}", file=sys.stderr)


def reason(error: Exception) -> str:
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]


def systems(layer: Layer, computes: list[str], peers: list[str]) -> dict[str, Run | str]:
    """Name -> what runs it, or why it cannot run."""
    runs: dict[str, Run | str] = {**peers_ours.orders(layer, computes)}
    for peer in peers:
        try:
            runs |= PEERS[peer](layer)
        except ImportError as missing:
            runs[peer] = str(missing)
        except Exception as error:  # a peer must not stop ours
            runs[peer] = reason(error)
    return runs


def measure(
    clock: cold.Clock, runs: dict[str, Run | str], tokens: Tokens, wanted: dict
) -> tuple[dict, dict, dict]:
    """Times, relative errors and failures by system, of those that run."""
    captured, failed = {}, {name: run for name, run in runs.items() if isinstance(run, str)}
    for name, run in runs.items():
        if name in failed:
            continue
        try:
            captured[name] = clock.capture(lambda run=run: run(tokens))
        except Exception as error:
            failed[name] = reason(error)
    took = clock.in_turns([graph for graph, _ in captured.values()], tokens.all)
    times = {name: dataclasses.asdict(time) for name, time in zip(captured, took, strict=True)}
    errors = {}
    for name, (_, out) in captured.items():
        reference_of = "nvfp4" if name.startswith("ours nvfp4") else "bf16"
        if reference_of in wanted:
            errors[name] = relative_error(out, wanted[reference_of])
    return times, errors, failed


def point(clock: cold.Clock, layer: Layer, runs: dict[str, Run | str], T: int, args, known: dict) -> dict:
    tokens = make_tokens(layer.model, T)
    least = work(layer.model, tokens)
    wanted = {c: reference(layer, tokens, c) for c in {"bf16", *args.compute}} if args.check else {}
    times, errors, failed = measure(clock, runs, tokens, wanted)
    row = {
        "model": layer.model.name, "T": T, "hit": least.hit, "weight_bytes": least.weight_bytes,
        "flop": least.flop, "floor_us": least.floor_us, "memory_us": least.memory_us,
        "times": times, "errors": errors, "failed": failed,
    }  # fmt: skip
    for compute in args.compute:
        run = runs[f"ours {compute}"]
        if args.breakdown and f"ours {compute}" in times:
            kernels = clock.nanoseconds_of_kernels(lambda run=run: run(tokens), tokens.all)
            row.setdefault("kernels", {})[compute] = kernels
        if (key := moe_generic.key(layer.model, T, compute)) in known:
            row["errors"][f"ours {compute} / generic"] = relative_error(
                run(tokens), known[key].cuda().float()
            )
    return row


def measure_model(clock: cold.Clock, model: Model, args, known: dict) -> list[dict]:
    layer = make_layer(model)
    runs = systems(layer, args.compute, args.peers)
    say(f"{model.name}: weights ready")
    rows = []
    for T in args.tokens:
        rows.append({**point(clock, layer, runs, T, args, known), "gpu after": cold.gpu()})
        say(f"{model.name} T={T}")
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [m.name for m in MODELS]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(MOE_TOKENS))
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--compute", nargs="+", choices=("bf16", "nvfp4"), default=["bf16", "nvfp4"])
    parser.add_argument("--replays", type=int, default=cold.REPLAYS)
    parser.add_argument("--no-check", dest="check", action="store_false", help="no references: times only")
    parser.add_argument("--no-breakdown", dest="breakdown", action="store_false", help="no profiler")
    parser.add_argument("--json", type=Path, help="written after every model")
    return parser.parse_args()


def wrong(rows: list[dict]) -> list[str]:
    """Outputs, ours and the peers', that are not what they should be, and points where ours did not run."""
    found = []
    for r in rows:
        at = f"{r['model']} T={r['T']}"
        found += [f"{at} {n}: relative error {e:.3g}" for n, e in r["errors"].items() if not e < LIMIT]
        found += [f"{at} {n}: {why}" for n, why in r["failed"].items() if n.startswith("ours")]
    return found


def write(report: dict, path: Path) -> None:
    """A point a line."""
    head, rows = {k: v for k, v in report.items() if k != "rows"}, report["rows"]
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n')


def main() -> None:
    args = arguments()
    known = moe_generic.outputs(args) if args.check else {}
    say("the generic kernels' outputs are known")
    clock = cold.Clock(args.replays)
    report = {"about": cold.about(commit()), "ceilings": cold.ceilings(clock), "rows": []}
    print(json.dumps(report["about"]))
    print(json.dumps({name: round(value, 2) for name, value in report["ceilings"].items()}))
    for model in (m for m in MODELS if m.name in args.models):
        rows = measure_model(clock, model, args, known)
        report["rows"] += rows
        show_model(model, rows, report["ceilings"])
        torch.cuda.empty_cache()
        if args.json:
            write(report, args.json)
    if args.breakdown:
        show_breakdown(report["rows"])
    show_summary(report["rows"])
    mistakes = wrong(report["rows"])
    print("\n".join(["", *(mistakes or [f"all outputs within {LIMIT:.3g} of their references"])]))
    raise SystemExit(bool(mistakes))


if __name__ == "__main__":
    with torch.no_grad():
        main()
