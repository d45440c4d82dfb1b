"""What commands share: sub-parsers with examples, a progress bar, sizes."""

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def add_command(commands, name: str, run: Callable, help: str, examples: str = "", **more):
    parser = commands.add_parser(
        name, help=help, description=help, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"examples:\n{examples}" if examples else None, **more,
    )  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def size(text: str) -> int:
    """'5GB', '500 MB', '123' -> bytes."""
    m = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    if not m or float(m[1]) == 0:
        raise argparse.ArgumentTypeError(f"a size such as 5GB, got {text!r}")
    return round(float(m[1]) * UNITS[m[2].upper()])


def positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,9}", text):
        raise argparse.ArgumentTypeError(f"a positive number, got {text!r}")
    return int(text)


def show_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable]:
    """Bytes done, rate and time left, on stderr; yields advance(nbytes, total=total)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), Speed(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda nbytes, total=total: bar.update(task, advance=nbytes, total=total)
