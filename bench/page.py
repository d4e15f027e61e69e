"""The Markdown page, with its plots: ``python -m bench.page`` makes it of what the last runs left as JSON.

``python -m bench.page docs`` makes ``docs/benchmarks.md`` of it, with the plots in ``docs/images/``. What that file
holds from its line ``<!-- written by hand -->`` to ``<!-- measured -->`` stays as it is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bench import report
from bench.plots import draw

if TYPE_CHECKING:
    from collections.abc import Sequence

DOCS = Path(__file__).resolve().parent.parent / "docs"
PUBLISHED_NAME = "benchmarks.md"
BY_HAND = "<!-- written by hand -->"
MEASURED = "<!-- measured -->"
MOST_ROWS = 20
"""A longer table is folded up, and those of its rows that have a target stand before it, unless all have."""

HEAD = """# Benchmarks

One run of `make bench` and one of `make prove` on the machine below (`python -m bench.page docs` then wrote this page).
Each names the Lua scripts that it ran. No absolute time is promised: what counts are the ratios, each taken within one
run, and mostly within one short round of it, on the same server and the same data. On another machine, or beside other
load, the values move by far more than the ratios do; the range beside each is that of the middle 80 % of its rounds.
"""


def write(
    bench: report.Run | None, proof: report.Run | None, page: Path, images: Path, by_hand: Sequence[str] = ()
) -> list[Path]:
    """Write the page and its plots.

    Args:
        bench: the last ``make bench``, if there is one.
        proof: the last ``make prove``, if there is one.
        page: the Markdown file.
        images: the folder for the plots, in the page's folder or below.
        by_hand: what stands between the conclusions and the measurements.

    Returns:
        Everything that was written.

    """
    images.mkdir(parents=True, exist_ok=True)
    runs = [(title, run) for title, run in (("`make bench`", bench), ("`make prove`", proof)) if run]
    lines, plots = [HEAD], [page]
    for title, run in runs:
        lines += [f"{title}:", "", "```", *report.conclusion(run.servers), "```", ""]
    lines += by_hand
    for title, run in runs:
        told, drawn = _tell(run, title, page, images)
        lines += told
        plots += drawn
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return plots


def _tell(run: report.Run, title: str, page: Path, images: Path) -> tuple[list[str], list[Path]]:
    """Give the lines of one run, and the plots that were drawn for them."""
    lines = [f"## {title}", "", *([run.caution, ""] if run.caution else [])]
    lines += [f"- {name}: {value}" for name, value in run.machine.items()]
    lines += [f"- Took: {run.seconds / 60:.1f} minutes", ""]
    plots = []
    for number, server in enumerate(run.servers, 1):
        for section in server.sections:
            lines += [f"### {section.title}: {server.name}", ""]
            lines += [section.how, ""] if section.how else []
            lines += [f"**Failed**: {section.failure}", ""] if section.failure else []
            lines += _side_by_side(section.rows) if section.is_side_by_side else _table(section.rows)
            for figure in section.figures:
                path = images / f"{figure.name}-{number}.png"
                draw(figure, path)
                plots.append(path)
                lines += [f"![{figure.title}]({path.relative_to(page.parent).as_posix()})", ""]
    return lines, plots


def _table(rows: Sequence[report.Row]) -> list[str]:
    """Lay rows out; of many, those with a target first."""
    if not rows:
        return []
    head = [_line(report.HEADINGS), _line(["---"] * len(report.HEADINGS))]
    lines = [*head, *(_line(row.cells()) for row in rows), ""]
    judged = [_line(row.cells()) for row in rows if row.verdict]
    if len(rows) <= MOST_ROWS or len(judged) == len(rows):
        return lines
    shown = [*head, *judged, ""] if judged else []
    return [*shown, "<details>", f"<summary>All {len(rows)} rows</summary>", "", *lines, "</details>", ""]


def _side_by_side(rows: Sequence[report.Row]) -> list[str]:
    """Lay rows out that are named ``<column>: <row>``."""
    columns = list(dict.fromkeys(row.what.partition(": ")[0] for row in rows))
    cells: dict[str, dict[str, report.Row]] = {}
    for row in rows:
        column, _, what = row.what.partition(": ")
        cells.setdefault(what, {})[column] = row
    lines = [_line(["measured", *columns, "target"]), _line(["---"] * (len(columns) + 2))]
    for what, of in cells.items():
        values = [_value(of[column]) if column in of else "" for column in columns]
        judged = [of[column] for column in columns if column in of and of[column].verdict]
        targets = [row.cells()[4].partition(" of ")[0] for row in judged]
        lines.append(_line([what, *values, ", ".join(targets if len(set(targets)) > 1 else targets[:1])]))
    return [*lines, ""]


def _value(row: report.Row) -> str:
    return f"{row.cells()[1]}{' **MISS**' if row.verdict == 'MISS' else ''}"


def publish(bench: report.Run | None, proof: report.Run | None, docs: Path = DOCS) -> list[Path]:
    """Write the page into the documentation, and keep what is written there by hand."""
    page = docs / PUBLISHED_NAME
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    by_hand = text.partition(BY_HAND)[2].partition(MEASURED)[0].strip()
    return write(bench, proof, page, docs / "images", [BY_HAND, "", by_hand, "", MEASURED, ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str]) -> int:
    """Make the page of the last run; give the exit code."""
    if list(arguments) not in ([], ["docs"]):
        print("usage: python -m bench.page [docs]")
        return 2
    bench, proof = (report.read(path) if path.exists() else None for path in (report.RESULTS, report.PROOF))
    if not (bench or proof):
        print(f"There is no run to tell of in {report.FOLDER}: make bench")
        return 1
    for run in (bench, proof):
        if run and run.machine.get("Scripts") != report.scripts():
            print(f"The run of {run.machine['Date']} was of other Lua scripts than these: measure again")
    folder = report.FOLDER
    written = publish(bench, proof) if arguments else write(bench, proof, folder / "latest.md", folder / "images")
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
