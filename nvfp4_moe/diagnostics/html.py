"""A report as one HTML file: no script, nothing fetched, pictures inside."""

import base64
from html import escape

from .faults import CHECKS
from .finding import Finding, Report
from .plots import draw

SHOWN = 200  # places of one finding; the JSON has them all
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .25em .8em; vertical-align: top }
tr { border-bottom: 1px solid #ddd } code { font-size: 13px; word-break: break-all } img { max-width: 100% }
.error { color: #b00020 } .warning { color: #96600a } .info { color: #1a5fa0 } .ok { color: #1b7a3a }
h3 { margin-bottom: 0 } p { margin: .2em 0 } .quiet { color: #777 }
"""


def page(report: Report) -> str:
    facts = "".join(
        f"<tr><td>{escape(k)}</td><td>{escape(_words(v))}</td></tr>" for k, v in report.facts.items()
    )
    checks = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(CHECKS[name])}</td>"
        f'<td class="{_css(verdict)}">{escape(verdict)}</td></tr>'
        for name, verdict in report.checks.items()
    )
    found = "".join(map(_finding, report.findings)) or '<p class="ok">Nothing found.</p>'
    picture = ""
    if report.histograms:
        data = base64.b64encode(draw(report.histograms)).decode()
        picture = f'<h2>Distributions</h2><img alt="histograms" src="data:image/png;base64,{data}">'
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(report.path)}</title>'
        f"<style>{STYLE}</style>"
        f"<h1>nvfp4 doctor</h1><p><code>{escape(report.path)}</code>: {escape(report.format)}</p>"
        f"<h2>Findings</h2>{found}{picture}<h2>Checks</h2><table>{checks}</table><h2>What was read</h2>"
        f"<table>{facts}</table></html>\n"
    )


def _finding(finding: Finding) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(p.name)}</code></td><td>{escape(p.detail)}</td></tr>"
        for p in finding.places[:SHOWN]
    )
    more = len(finding.places) - SHOWN
    rest = f'<p class="quiet">and {more} more; the JSON report names them all</p>' if more > 0 else ""
    return (
        f'<h3 class="{_css(finding.severity)}">{finding.severity}: {escape(finding.title)}</h3>'
        f"<p>{escape(finding.advice)}</p><table>{rows}</table>{rest}"
    )


def _css(verdict: str) -> str:
    return verdict if verdict in ("ok", "info", "warning", "error") else "quiet"


def _words(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
