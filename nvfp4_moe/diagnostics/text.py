"""Findings on a terminal. The only part of the diagnostics that prints; needs rich."""

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .faults import CHECKS
from .finding import ERROR, INFO, OK, WARNING, Finding, Report

SHOWN = 4  # places of one finding; --json and --html name more
COLOURS = {OK: "green", INFO: "blue", WARNING: "yellow", ERROR: "bold red"}


def print_environment(findings: Iterable[Finding], console: Console | None = None) -> None:
    console = console or Console()
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for finding in findings:
        advice = f"\n[dim]{escape(finding.advice)}[/]" if finding.advice else ""
        table.add_row(_coloured(finding.severity), escape(finding.check), escape(finding.title) + advice)
    console.print(table)


def print_report(report: Report, console: Console | None = None) -> None:
    console = console or Console()
    console.print(f"[bold]{escape(report.path)}[/]: {escape(report.format)}", soft_wrap=True)
    facts = {k: f"{v:,}" if isinstance(v, int) else v for k, v in report.facts.items() if k != "compute"}
    console.print("[dim]" + escape(", ".join(f"{k} {v}" for k, v in facts.items())) + "[/]", soft_wrap=True)
    for finding in report.findings:
        console.print(f"\n{_coloured(finding.severity)}  {escape(finding.title)}", soft_wrap=True)
        for place in finding.places[:SHOWN]:
            detail = f": {place.detail}" if place.detail else ""
            console.print(f"    {escape(place.name + detail)}", soft_wrap=True, highlight=False)
        if len(finding.places) > SHOWN:
            console.print(f"    and {len(finding.places) - SHOWN} more")
        console.print(f"    [dim]{escape(finding.advice)}[/]", soft_wrap=True)
    console.print()
    quiet = [name for name, verdict in report.checks.items() if verdict not in COLOURS]
    ok = sum(verdict == OK for verdict in report.checks.values())
    console.print(f"{len(CHECKS)} checks: {ok} without a finding, {len(quiet)} with nothing to check"
                  + (f" ({', '.join(quiet)})" if quiet else ""), highlight=False, soft_wrap=True)  # fmt: skip


def _coloured(severity: str) -> str:
    return f"[{COLOURS[severity]}]{severity:7}[/]"
