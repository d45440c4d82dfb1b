"""What the doctor hands back: findings, and the report they stand in. Data only; nothing here prints."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

OK, INFO, WARNING, ERROR = SEVERITIES = ("ok", "info", "warning", "error")
EXIT_CODE = {OK: 0, INFO: 0, WARNING: 1, ERROR: 2}


@dataclass(frozen=True)
class Place:
    """One tensor or module, by its full name, and what was seen there."""

    name: str
    detail: str = ""
    size: float = 0.0  # how bad, for the order


@dataclass(frozen=True)
class Finding:
    check: str  # a name of CHECKS (faults.py), or of an environment's row
    severity: str
    title: str  # what is the matter
    advice: str = ""  # what to do
    fault: str = ""
    places: tuple[Place, ...] = ()  # the worst first; all of them

    def to_dict(self) -> dict:
        found = asdict(self)
        found["places"] = [{"name": p.name, "detail": p.detail} for p in self.places]
        return found


@dataclass(frozen=True)
class Histogram:
    """counts[i] values in edges[i] .. edges[i + 1]; edges as drawn, so log2 or log10 where `unit` says so."""

    title: str
    counted: str  # blocks, tensors, ..
    unit: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    note: str = ""


@dataclass
class Report:
    path: str
    format: str
    facts: dict[str, object] = field(default_factory=dict)  # what was read, in numbers
    findings: list[Finding] = field(default_factory=list)  # errors first
    checks: dict[str, str] = field(
        default_factory=dict
    )  # every check: worst severity, or why it did not apply
    histograms: list[Histogram] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return exit_code(self.findings)

    def to_dict(self) -> dict:
        found = asdict(self)
        found["findings"] = [f.to_dict() for f in self.findings]
        return {**found, "exit_code": self.exit_code}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, default=str)

    def write_html(self, path) -> None:
        from .html import page

        Path(path).write_text(page(self), encoding="utf-8")

    def write_png(self, path) -> None:
        from .plots import draw

        Path(path).write_bytes(draw(self.histograms, self.path))


def exit_code(findings) -> int:
    """0: nothing above information · 1: warnings · 2: errors."""
    return max((EXIT_CODE[f.severity] for f in findings), default=0)
