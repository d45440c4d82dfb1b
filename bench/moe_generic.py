"""Outputs of torch.ops.nvfp4.moe from the kernels that run on every chip, for comparison with a chip's own.

The core takes a chip library over its own kernels once that is loaded, so they run in another process, which
finds the core alone in a folder (NVFP4_LIBRARY) and makes the same layers and tokens from the same seeds."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from cases import MODELS, Model
from moe_layer import make_layer, make_tokens
from peers_ours import ours

import nvfp4_moe

MOST_TOKENS = 256  # beyond, the reference has to do


def key(model: Model, T: int, compute: str) -> str:
    return f"{model.name} T={T} {compute}"


def outputs(args) -> dict[str, torch.Tensor]:
    """key -> bf16 [T, H] on the CPU, for the models, tokens and computes of `args`."""
    core = nvfp4_moe._library.resolve()
    with tempfile.TemporaryDirectory() as folder:
        alone, result = Path(folder, core.name), Path(folder, "outputs.pt")
        alone.symlink_to(core)
        wanted = json.dumps([args.models, [T for T in args.tokens if T <= MOST_TOKENS], args.compute])
        environment = {**os.environ, "NVFP4_LIBRARY": str(alone)}
        subprocess.run([sys.executable, __file__, wanted, str(result)], check=True, env=environment)
        return torch.load(result)


def main() -> None:
    names, tokens, computes = json.loads(sys.argv[1])
    results = {}
    for model in (m for m in MODELS if m.name in names):
        layer = make_layer(model)
        for compute in computes:
            run = ours(layer, compute)
            for T in tokens:
                results[key(model, T, compute)] = run(make_tokens(model, T)).cpu()
        del layer, run
    torch.save(results, sys.argv[2])


if __name__ == "__main__":
    with torch.no_grad():
        main()
