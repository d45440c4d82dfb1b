"""nvfp4 inspect: what a checkpoint is, from its headers alone."""

import json
from collections import Counter
from pathlib import Path

from ..checkpoint import Checkpoint, open_checkpoint
from .common import add_command, show_bytes

EXAMPLES = """\
  nvfp4 inspect gpt-oss-20b
  nvfp4 inspect DeepSeek-V4-Flash --modules | grep 'layers.3.'
"""


def add_inspect(commands) -> None:
    parser = add_command(commands, "inspect", run, "what a checkpoint is; reads headers only", EXAMPLES)
    parser.add_argument("checkpoint", type=Path, help="folder")
    parser.add_argument("--modules", action="store_true", help="a line for every quantized module")
    parser.add_argument("--json", action="store_true")


def run(args) -> int:
    checkpoint = open_checkpoint(args.checkpoint, strict=False)
    facts = summary(checkpoint)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    if args.modules:
        for name, module in checkpoint.modules.items():
            lead = [] if module.experts is None else [module.experts]
            print(f"{name}  {module.kind}  {[*lead, *module.shape]}  {module.compute}")
        return 0
    for name, value in facts.items():
        for line in value if isinstance(value, list) else [value]:
            print(f"{name.replace('_', ' '):>12}  {_show(line)}")
    return 0


def _show(value) -> str:
    return ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def summary(checkpoint: Checkpoint) -> dict:
    tensors = checkpoint.shards.tensors
    modules, layers = checkpoint.modules, list(checkpoint.moe_layers())
    sizes = Counter()
    for info in tensors.values():
        sizes[info.dtype] += info.nbytes
    kinds = Counter(f"{m.kind}, compute {m.compute}" for m in modules.values())
    weights = sum(m.shape[0] * m.shape[1] * (m.experts or 1) for m in modules.values())
    facts = {
        "path": str(checkpoint.shards.path),
        "format": checkpoint.format.name,
        "model": checkpoint.shards.config.get("model_type", "unknown"),
        "files": len(checkpoint.shards.files),
        "tensors": len(tensors),
        "size": show_bytes(sum(sizes.values())),
        "by_type": {dtype: show_bytes(n) for dtype, n in sizes.most_common()},
        "quantized": dict(kinds) or "nothing",
        "weights": f"{weights:,} in 4 bits",
        "MoE_layers": f"{len(layers)}" + (f": {layers[0]} .. {layers[-1]}" if layers else ""),
        "warning": checkpoint.warnings,
        "error": checkpoint.errors,
    }
    return facts
