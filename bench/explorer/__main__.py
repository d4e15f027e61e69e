"""Explore the interleavings: ``python -m bench.explorer [--contender NAME] [--pair NAME] [--limit N]``.

Ends with 1 when presence shows anything wrong, or plain shows nothing wrong: then the explorer sees nothing.
"""

from __future__ import annotations

import argparse
import sys
import time

from bench.contenders import CONTENDERS
from bench.crowd import PRESENCE
from bench.explorer import (
    FLEET_PAIRS,
    LIMIT,
    PAIRS,
    PRESENCE_PAIRS,
    SEED,
    SENT_TWICE_PAIRS,
    Exploration,
    Result,
    Tally,
    measure_interleavings,
)
from bench.progress import Progress
from tests.server import NoServerError, running_server

HEADINGS = ("contender", "pair", "schedules", "wrong", "keys", "answers", "with a crash", "wrong", "keys", "answers")


def _roughly(count: int) -> int:
    """Keep the two digits that an estimate is good for."""
    return round(count, 2 - len(str(count)))


def _cells(tally: Tally) -> tuple[str, ...]:
    count = f"{tally.schedules:,}" if tally.is_complete else f"{tally.schedules:,} of about {_roughly(tally.of):,}"
    return count, f"{tally.wrong:,}", f"{tally.with_violations:,}", f"{tally.with_wrong_answers:,}"


def table(results: list[Result]) -> str:
    """Show a line for each pair of each contender, and what was wrong in all of them."""
    rows: list[tuple[str, ...]] = [HEADINGS]
    rows += [(result.contender, result.pair, *_cells(result.alive), *_cells(result.crashed)) for result in results]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    for contender in dict.fromkeys(result.contender for result in results):
        own = [result for result in results if result.contender == contender]
        for what, tally in (
            ("all callers alive", sum((result.alive for result in own), Tally())),
            ("one caller dies", sum((result.crashed for result in own), Tally())),
        ):
            kinds = ", ".join(f"{kind} {count:,}" for kind, count in tally.kinds.most_common()) or "nothing"
            lines.append(f"{contender}, {what}: {tally.wrong:,} of {tally.schedules:,} schedules wrong: {kinds}")
    return "\n".join(lines)


def main() -> int:
    """Explore, print what was found, and give the exit code."""
    of_presence = PRESENCE_PAIRS | SENT_TWICE_PAIRS
    only_presence = FLEET_PAIRS | SENT_TWICE_PAIRS
    parser = argparse.ArgumentParser(prog="python -m bench.explorer", description=__doc__)
    parser.add_argument("--contender", action="append", choices=CONTENDERS, help="one of them; may be repeated")
    parser.add_argument(
        "--pair",
        action="append",
        metavar="NAME",
        choices=[name.replace("‖", "|") for name in of_presence],
        help="as 'register|heartbeat'; another name gets a list; may be repeated; default: what the contender offers",
    )
    parser.add_argument("--limit", type=int, default=LIMIT, help="schedules of a pair; where there are more, a sample")
    parser.add_argument("--seed", default=SEED, help="of the samples")
    parser.add_argument("--examples", action="store_true", help="print a schedule for each pair that went wrong")
    options = parser.parse_args()
    contenders = options.contender or list(CONTENDERS)
    pairs = [name.replace("|", "‖") for name in options.pair or ()]
    if not only_presence.keys().isdisjoint(pairs) and contenders != [PRESENCE]:
        parser.error(
            f"only {PRESENCE} offers {', '.join(only_presence.keys() & set(pairs))}: add --contender {PRESENCE}"
        )
    explorations = [
        Exploration(contender, of_presence[pair], options.limit)
        for contender in contenders
        for pair in pairs or (of_presence if contender == PRESENCE else PAIRS)
    ]

    start = time.monotonic()
    try:
        with running_server(docker=False) as server:
            print(f"Every interleaving, on {server.description}")
            progress = Progress("pairs of contenders explored", len(explorations))
            results = measure_interleavings(
                server.url, explorations, seed=options.seed, progress=lambda _: progress.advance()
            )
    except NoServerError as error:
        print(error)
        return 1
    print(table(results))
    for result in results:
        if result.wrong and (options.examples or result.contender == PRESENCE):
            print(f"\n{result.contender}, {result.pair}")
            print("\n".join(tally.example for tally in (result.alive, result.crashed) if tally.example))
    print(f"Took {time.monotonic() - start:.0f} s")
    wrong = {contender: sum(own.wrong for own in results if own.contender == contender) for contender in contenders}
    if wrong.get(PRESENCE):
        print("presence went wrong: see above")
    if wrong.get("plain") == 0:
        print("plain commands went wrong nowhere, so this exploration proves nothing")
    return 1 if wrong.get(PRESENCE) or wrong.get("plain") == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
