"""nvfp4: look at checkpoints, convert them, and see what this machine can do."""

import argparse
import os
import sys
from collections.abc import Sequence

from ..checkpoint import CheckpointError
from . import bench, inspect, layout, rewrite
from .doctor import add_doctor

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

EXAMPLES = """\
examples:
  nvfp4 doctor                                  what this machine has, and whether it works
  nvfp4 doctor Qwen3-30B-A3B-NVFP4              every scale of a checkpoint
  nvfp4 inspect gpt-oss-20b                     format, modules, sizes
  nvfp4 convert gpt-oss-20b gpt-oss-20b-NVFP4   MXFP4 to NVFP4, resumable
  nvfp4 quantize Qwen3-30B-A3B Qwen3-NVFP4      BF16 to NVFP4
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="nvfp4",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    for add in (
        add_doctor, inspect.add_inspect, rewrite.add_convert, rewrite.add_quantize, layout.add_layout,
        bench.add_bench,
    ):  # fmt: skip
        add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"nvfp4 {args.command}: interrupted{getattr(args, 'hint', '')}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `nvfp4 .. | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CheckpointError, OSError) as error:
        print(f"nvfp4 {args.command}: {error}{getattr(args, 'hint', '')}", file=sys.stderr)
        return 2
