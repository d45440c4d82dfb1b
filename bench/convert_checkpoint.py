"""`nvfp4 convert` on a synthetic checkpoint with DeepSeek-V4-Flash's names and shapes: MB/s and peak memory.

    python bench/convert_checkpoint.py FOLDER [--gigabytes 2] [--runs 3] [--device cuda]

Experts are Gaussian in MXFP4 (I8 codes, E8M0 scales), attention and shared experts FP8; layers are added till
the size is reached, experts 64 a layer. A conversion runs in a process of its own with the source's pages
dropped from the page cache first; MB/s counts source bytes over its whole wall time, from the command (with
the start of Python and the import of torch) to the last fsync; the command's own line leaves the start out.
Peak memory is the process's largest resident set; beside it that of a process that only imports
the package.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from mxfp4_study import to_mxfp4
from timing import cpu_name

from nvfp4_moe.checkpoint import ShardWriter

HIDDEN, INTER, EXPERTS = 4096, 2048, 64
E8M0 = "F8_E8M0"
CONFIG = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "hidden_size": HIDDEN,
    "moe_intermediate_size": INTER, "n_routed_experts": EXPERTS, "num_experts_per_tok": 6,
    "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
}  # fmt: skip
SHAPES = {"w1": (INTER, HIDDEN), "w2": (HIDDEN, INTER), "w3": (INTER, HIDDEN)}


def layer_plan(layer: int) -> list:
    plan = []
    for proj in ("wq_a", "wkv", "wo_b"):
        name = f"layers.{layer}.attn.{proj}"
        plan += [(f"{name}.weight", "F8_E4M3", (1024, HIDDEN)), (f"{name}.scale", E8M0, (8, HIDDEN // 128))]
    for w, (n, k) in SHAPES.items():
        name = f"layers.{layer}.ffn.shared_experts.{w}"
        plan += [(f"{name}.weight", "F8_E4M3", (n, k)), (f"{name}.scale", E8M0, (n // 128, k // 128))]
    plan += [(f"layers.{layer}.ffn.gate.weight", "BF16", (EXPERTS, HIDDEN))]
    for e in range(EXPERTS):
        for w, (n, k) in SHAPES.items():
            name = f"layers.{layer}.ffn.experts.{e}.{w}"
            plan += [(f"{name}.weight", "I8", (n, k // 2)), (f"{name}.scale", E8M0, (n, k // 32))]
    return plan


def make(path: Path, gigabytes: float, shard_bytes: int) -> None:
    """Every expert gets one of eight random matrices, its rows rolled: drawing them all takes minutes."""
    layer_bytes = EXPERTS * 3 * HIDDEN * INTER * 17 // 32
    layers = max(1, round(gigabytes * 1e9 / layer_bytes))
    plan = [("embed.weight", "BF16", (4096, HIDDEN)), ("head.weight", "BF16", (4096, HIDDEN))]
    for layer in range(layers):
        plan += layer_plan(layer)
    torch.manual_seed(0)
    drawn = {w: [to_mxfp4(0.02 * torch.randn(shape)) for _ in range(8)] for w, shape in SHAPES.items()}
    writer = ShardWriter(path, plan, {"config.json": json.dumps(CONFIG).encode()}, shard_bytes)
    for i, (name, dtype, shape) in enumerate(plan):
        if ".ffn.experts." in name:
            *_, expert, w, kind = name.split(".")
            tensor = drawn[w][int(expert) % 8][kind == "scale"].roll(i % 61, 0)
            tensor = tensor.view(torch.float8_e8m0fnu if kind == "scale" else torch.int8)
        elif dtype == E8M0:
            tensor = torch.full(shape, 115, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        else:
            tensor = torch.randn(shape).to({"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}[dtype])
        writer.add(name, tensor)
    writer.close()


def forget_pages(path: Path) -> None:
    os.sync()
    for file in path.glob("*.safetensors"):
        with open(file, "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(command: list[str]) -> tuple[float, float]:
    """Seconds, and the peak resident set in MB: of a fresh interpreter, which reports about its one child."""
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    )
    start = time.perf_counter()
    out = subprocess.run(
        [sys.executable, "-c", code, *command], check=True, stdout=subprocess.PIPE, text=True
    )
    seconds = time.perf_counter() - start
    print("".join(line + "\n" for line in out.stdout.splitlines()[:-1]))
    return seconds, float(out.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--shard-megabytes", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ..")
    parser.add_argument("--keep", action="store_true", help="do not delete the two checkpoints")
    args = parser.parse_args()
    source, target = args.folder / "source", args.folder / "target"
    if not source.exists():
        make(source, args.gigabytes, args.shard_megabytes * 10**6)
    largest = max(f.stat().st_size for f in source.glob("*.safetensors")) / 1e6
    size = sum(f.stat().st_size for f in source.glob("*.safetensors")) / 1e6
    _, base = run([sys.executable, "-c", "import nvfp4_moe.cli"])
    options = [f"--shard-size={args.shard_megabytes}MB", f"--device={args.device}"]
    print(f"{cpu_name()}, {os.cpu_count()} cores, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print(f"{size:.0f} MB of input, largest shard {largest:.0f} MB, on {args.device}")
    for _ in range(args.runs):
        shutil.rmtree(target, ignore_errors=True)
        forget_pages(source)
        load = os.getloadavg()[0]
        seconds, peak = run(
            [sys.executable, "-m", "nvfp4_moe", "convert", str(source), str(target), *options]
        )
        print(f"{seconds:.1f} s: {size / seconds:.0f} MB/s with start-up; load before {load:.1f};"
              f" peak resident set {peak:.0f} MB, {base:.0f} of it the import")  # fmt: skip
    if not args.keep:
        shutil.rmtree(source)
        shutil.rmtree(target)


if __name__ == "__main__":
    main()
