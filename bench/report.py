"""What a run found, as a table on the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bench.measure import Spread
    from bench.scale import Scale

FOLDER = Path(__file__).resolve().parent / "results"
HEADINGS = ("measured", "value (80 % range)", "ratio (80 % range)", "to", "target", "")
CPU_FILE = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. The target is a bound of the ratio, or of the value where there is no ratio."""

    what: str
    value: Spread
    unit: str
    ratio: Spread | None = None
    baseline: str = ""
    target: float | None = None
    at_least: bool = False
    """The target is a lower bound instead of an upper one."""

    @property
    def verdict(self) -> str:
        """PASS or MISS, by the median; empty without a target."""
        if self.target is None:
            return ""
        median = (self.ratio or self.value).median
        return "PASS" if (median >= self.target if self.at_least else median <= self.target) else "MISS"

    def cells(self) -> tuple[str, ...]:
        """Give the texts of the columns."""
        unit = "x" if self.ratio else self.unit
        target = "" if self.target is None else f"{'>=' if self.at_least else '<='} {self.target:g} {unit}"
        ratio = _text(self.ratio, "x") if self.ratio else ""
        return self.what, _text(self.value, self.unit), ratio, self.baseline, target, self.verdict

    def as_json(self) -> dict[str, Any]:
        """Give everything as plain values."""
        return {
            "measured": self.what,
            "value": _plain(self.value),
            "unit": self.unit,
            "ratio": _plain(self.ratio) if self.ratio else None,
            "to": self.baseline or None,
            "target": self.target,
            "target_is": "at least" if self.at_least else "at most",
            "verdict": self.verdict or None,
        }


@dataclass(frozen=True, slots=True)
class Section:
    """What one section found on one server, or why it failed."""

    title: str
    rows: Sequence[Row] = ()
    failure: str = ""


@dataclass(slots=True)
class ServerReport:
    """What was found on one server."""

    name: str
    sections: list[Section] = field(default_factory=list)

    def missed(self) -> list[str]:
        """Name the targets that were missed."""
        return [row.what for section in self.sections for row in section.rows if row.verdict == "MISS"]

    def failures(self) -> list[str]:
        """Say which sections failed, and why."""
        return [f"{section.title}: {section.failure}" for section in self.sections if section.failure]


def _text(spread: Spread, unit: str) -> str:
    digits = 0 if spread.high >= 1000 else 1 if spread.high >= 100 else 2
    median = f"{spread.median:,.{digits}f} {unit}"
    if spread.low == spread.high:
        return median
    return f"{median} ({spread.low:,.{digits}f}-{spread.high:,.{digits}f})"


def _plain(spread: Spread) -> dict[str, float]:
    return {"median": round(spread.median, 4), "p10": round(spread.low, 4), "p90": round(spread.high, 4)}


def machine() -> dict[str, str]:
    """Describe the machine and the software of this side."""
    model = platform.processor() or platform.machine()
    if CPU_FILE.exists():
        for line in CPU_FILE.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "CPU": f"{model}, {os.cpu_count()} cores",
        "System": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "Python": platform.python_version(),
        "redis-py": f"{version('redis')}, hiredis {version('hiredis')}",
        "Date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def table(rows: Iterable[Row]) -> str:
    """Lay rows out for a terminal."""
    lines = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    return "\n".join(
        "  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def conclusion(reports: Sequence[ServerReport]) -> list[str]:
    """Say of each server which targets were missed and what failed."""
    lines = []
    for report in reports:
        judged = sum(1 for section in report.sections for row in section.rows if row.verdict)
        missed = report.missed()
        lines.append(f"{report.name}: {judged - len(missed)} of {judged} targets met")
        lines += [f"  MISS  {what}" for what in missed]
        lines += [f"  FAILED  {failure}" for failure in report.failures()]
    return lines


def caution(scale: Scale) -> str:
    """Say what the numbers are worth."""
    text = (
        f"{scale.connections:,} connections, each in a two-player game. Values and ratios are medians of short rounds, "
        "with the range of the middle 80 %; a ratio compares within one round. Other machines and moments give others."
    )
    return text if scale.name == "full" else f"QUICK RUN: the targets are meant for the full run. {text}"


def write(reports: Sequence[ServerReport], scale: Scale) -> tuple[Path, Path]:
    """Write the results as JSON and as Markdown; returns both paths."""
    facts = machine()
    FOLDER.mkdir(exist_ok=True)
    as_json, as_markdown = FOLDER / "latest.json", FOLDER / "latest.md"
    document = {
        "scale": scale.name,
        "connections": scale.connections,
        "machine": facts,
        "servers": [
            {
                "server": report.name,
                "sections": [
                    {
                        "title": section.title,
                        "failure": section.failure or None,
                        "rows": [row.as_json() for row in section.rows],
                    }
                    for section in report.sections
                ],
            }
            for report in reports
        ],
    }
    as_json.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    lines = ["# Results of `make bench`", "", caution(scale), ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    for report in reports:
        lines += ["", f"## {report.name}"]
        for section in report.sections:
            lines += ["", f"### {section.title}", ""]
            if section.failure:
                lines.append(f"Failed: {section.failure}")
                continue
            lines += [_markdown(HEADINGS), _markdown(["---"] * len(HEADINGS))]
            lines += [_markdown(row.cells()) for row in section.rows]
    as_markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return as_json, as_markdown


def _markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
