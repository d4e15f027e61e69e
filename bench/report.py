"""What a run found: rows and figures, as tables on a terminal and as JSON, of which ``bench.page`` makes a page."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

from bench.measure import Spread
from presence.scripts import lua_folder, splice, without_comments

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from bench.scale import Scale

FOLDER = Path(__file__).resolve().parent / "results"
RESULTS = FOLDER / "latest.json"
"""Of the last ``make bench``."""
PROOF = FOLDER / "proof.json"
"""Of the last ``make prove``."""
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
    """Whether the target is a lower bound instead of an upper one."""
    is_promise: bool = False
    """Whether to miss it is a fault of the library, which no machine and no moment excuses."""

    @property
    def verdict(self) -> str:
        """PASS or MISS, by the median; empty without a target."""
        if self.target is None:
            return ""
        reached = (self.ratio or self.value).median
        return "PASS" if (reached >= self.target if self.at_least else reached <= self.target) else "MISS"

    def cells(self) -> tuple[str, ...]:
        """Give the texts of the columns."""
        unit = "x" if self.ratio else self.unit
        target = "" if self.target is None else f"{'>=' if self.at_least else '<='} {self.target:g} {unit}".rstrip()
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
            "at_least": self.at_least,
            "is_promise": self.is_promise,
            "verdict": self.verdict or None,
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Self:
        """Make a row of what ``as_json`` gave."""
        return cls(
            plain["measured"],
            _spread(plain["value"]),
            plain["unit"],
            _spread(plain["ratio"]) if plain["ratio"] else None,
            plain["to"] or "",
            plain["target"],
            plain["at_least"],
            plain.get("is_promise", False),
        )


@dataclass(frozen=True, slots=True)
class Figure:
    """What a plot shows: points of named series, as lines, or as groups of bars (then x is the name of a group)."""

    name: str
    """Of the file."""
    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[tuple[float | str, float]]]
    kind: Literal["lines", "bars"] = "lines"
    log_x: bool = False
    log_y: bool = False


Findings: TypeAlias = "Sequence[Row | Figure]"
"""What a section gives."""


@dataclass(slots=True)
class Section:
    """What one section found on one server, or why it failed."""

    title: str
    how: str = ""
    """How it is measured."""
    rows: list[Row] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    failure: str = ""
    is_side_by_side: bool = False
    """Whether the rows are named ``<column>: <row>``, for a table of as many columns."""

    def add(self, findings: Findings) -> None:
        """Take in what was found."""
        self.rows += [finding for finding in findings if isinstance(finding, Row)]
        self.figures += [finding for finding in findings if isinstance(finding, Figure)]

    def as_json(self) -> dict[str, Any]:
        """Give everything as plain values."""
        return {
            "title": self.title,
            "how": self.how,
            "failure": self.failure or None,
            "is_side_by_side": self.is_side_by_side,
            "rows": [row.as_json() for row in self.rows],
            "figures": [asdict(figure) for figure in self.figures],
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Self:
        """Make a section of what ``as_json`` gave."""
        return cls(
            plain["title"],
            plain["how"],
            [Row.from_json(row) for row in plain["rows"]],
            [Figure(**figure) for figure in plain["figures"]],
            plain["failure"] or "",
            plain.get("is_side_by_side", False),
        )


@dataclass(slots=True)
class ServerReport:
    """What was found on one server."""

    name: str
    sections: list[Section] = field(default_factory=list)

    def missed(self) -> list[str]:
        """Name the targets that were missed."""
        return [row.what for section in self.sections for row in section.rows if row.verdict == "MISS"]

    def failures(self) -> list[str]:
        """Say which sections failed, and why, and which promises of the library were broken."""
        failed = [f"{section.title}: {section.failure}" for section in self.sections if section.failure]
        rows = (row for section in self.sections for row in section.rows)
        return failed + [row.what for row in rows if row.is_promise and row.verdict == "MISS"]


def _text(spread: Spread, unit: str) -> str:
    is_count = (not unit or spread.low == spread.high) and spread.median.is_integer()
    digits = 0 if is_count or spread.high >= 1000 else 1 if spread.high >= 100 else 2
    median = f"{spread.median:,.{digits}f} {unit}".rstrip()
    if spread.low == spread.high:
        return median
    return f"{median} ({spread.low:,.{digits}f}-{spread.high:,.{digits}f})"


def _plain(spread: Spread) -> dict[str, float]:
    return {"median": round(spread.median, 4), "p10": round(spread.low, 4), "p90": round(spread.high, 4)}


def _spread(plain: Mapping[str, float]) -> Spread:
    return Spread(plain["median"], plain["p10"], plain["p90"])


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
        "Commit": commit(),
        "Scripts": scripts(),
        "Date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def commit() -> str:
    """Tell which commit is measured, if this is a checkout, and whether it was changed since."""
    git = ("git", "-C", str(FOLDER.parent), "describe", "--always", "--dirty", "--exclude=*")
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not known"


def scripts() -> str:
    """Tell which Lua scripts are measured, so that two runs can be told to be of the same ones."""
    folder = lua_folder()
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".lua"))
    code = "".join(without_comments(splice(folder, name.removesuffix(".lua"))) for name in names)
    digest = hashlib.sha1(code.encode(), usedforsecurity=False).hexdigest()
    return f"{len(names)}, the SHA1 of all without comments is {digest[:12]}"


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
        "Values and ratios are medians of short rounds, with the range of the middle 80 % (of fewer than eleven rounds "
        "of all); a ratio compares within one round, and a storm is one run. Other machines and moments give others."
    )
    return text if scale.name == "full" else f"QUICK RUN: the targets are meant for the full run. {text}"


@dataclass(slots=True)
class Run:
    """A whole run."""

    caution: str
    seconds: float
    machine: Mapping[str, str]
    servers: Sequence[ServerReport]


def text(run: Run) -> str:
    """Lay a whole run out for a terminal."""
    lines = []
    for report in run.servers:
        lines.append(f"\n=== {report.name}")
        for section in report.sections:
            lines.append(f"\n{section.title}")
            lines += [f"  FAILED  {section.failure}"] if section.failure else [table(section.rows)]
    return "\n".join([*lines, "", *conclusion(run.servers), run.caution, f"Took {run.seconds:.0f} s"])


def write(run: Run, path: Path) -> None:
    """Write a run as JSON."""
    document = {
        "caution": run.caution,
        "seconds": round(run.seconds),
        "machine": run.machine,
        "servers": [
            {"server": report.name, "sections": [section.as_json() for section in report.sections]}
            for report in run.servers
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read(path: Path) -> Run:
    """Read a run that ``write`` wrote."""
    document = json.loads(path.read_text(encoding="utf-8"))
    servers = [
        ServerReport(server["server"], [Section.from_json(section) for section in server["sections"]])
        for server in document["servers"]
    ]
    return Run(document["caution"], document["seconds"], document["machine"], servers)
