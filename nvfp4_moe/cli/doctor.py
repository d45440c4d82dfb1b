"""nvfp4 doctor: this machine, or a checkpoint."""

import importlib.util
import json
from pathlib import Path

from ..checkpoint import CheckpointError
from .common import add_command, progress_bar

EXAMPLES = """\
  nvfp4 doctor
  nvfp4 doctor DeepSeek-V4-Flash-NVFP4 --html report.html
  nvfp4 doctor Qwen3-NVFP4 --json | jq '.findings[].title'
exit code: 0 nothing above information, 1 warnings, 2 errors
"""


def add_doctor(commands) -> None:
    parser = add_command(
        commands, "doctor", run, "what is wrong: with this machine, or a checkpoint", EXAMPLES
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", help="folder; none: the environment")
    parser.add_argument(
        "--activations", type=Path, metavar="FILE",
        help="JSON {module: largest |x| of its input}, to hold against the input scales (ActivationProbe)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write the report with histograms (matplotlib)"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the histograms (matplotlib)")


def run(args) -> int:
    from ..diagnostics import check_checkpoint, environment, exit_code
    from ..diagnostics.text import print_environment, print_report

    if args.checkpoint is None:
        findings = environment()
        if args.json:
            print(json.dumps([finding.to_dict() for finding in findings], indent=2))
        else:
            print_environment(findings)
        return exit_code(findings)
    activations = _read_activations(args.activations) if args.activations else None
    _check_outputs([path for path in (args.html, args.png) if path])
    with progress_bar(f"reading {args.checkpoint.name}", 0) as advance:
        report = check_checkpoint(args.checkpoint, _advancing(advance), activations)
    if args.html:
        report.write_html(args.html)
    if args.png:
        report.write_png(args.png)
    if args.json:
        print(report.to_json())
    else:
        print_report(report)
    return report.exit_code


def _check_outputs(paths: list[Path]) -> None:
    """Before reading for an hour."""
    for path in paths:
        if not path.parent.is_dir():
            raise CheckpointError(f"{path}: there is no folder {path.parent}")
    if paths and importlib.util.find_spec("matplotlib") is None:
        raise CheckpointError("--html and --png need matplotlib: pip install 'nvfp4-moe[plot]'")


def _read_activations(path: Path) -> dict[str, float]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict) or not all(type(v) in (int, float) for v in found.values()):
        raise CheckpointError(f"{path}: must be a JSON object that maps modules to numbers")
    return found


def _advancing(advance):
    done = 0

    def progress(now: int, total: int) -> None:
        nonlocal done
        advance(now - done, total)
        done = now

    return progress
