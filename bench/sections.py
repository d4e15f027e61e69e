"""Sections: what is measured, one after the other, each on an empty server."""

from __future__ import annotations

import subprocess
import time
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, NamedTuple

from redis.exceptions import RedisError

from bench import report
from bench.measure import MeasurementError
from bench.storm import StormError
from presence import PresenceError
from tests.server import NoServerError, version

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.report import Findings
    from bench.scale import Scale
    from bench.servers import Place, Server

FAILURES = (
    MeasurementError,
    StormError,
    NoServerError,
    PresenceError,
    RedisError,
    OSError,
    BrokenProcessPool,
    subprocess.SubprocessError,
)


class Plan(NamedTuple):
    """A section to measure."""

    title: str
    how: str
    run: Callable[[Server, Scale], Findings]
    is_side_by_side: bool = False
    """See :class:`report.Section`."""


def measure(place: Place, scale: Scale, plans: Sequence[Plan]) -> report.ServerReport:
    """Run sections on one server; one that fails does not keep the others from running."""
    result = report.ServerReport(place.name)
    try:
        with place.server() as server:
            result.name = f"{version(server.client)} ({place.name})"
    except FAILURES as error:
        result.sections.append(report.Section("The server", failure=f"{type(error).__name__}: {error}"))
        return result
    for number, plan in enumerate(plans, 1):
        print(f"\n[{number}/{len(plans)}] {plan.title}, on {result.name}", flush=True)
        section = report.Section(plan.title, plan.how, is_side_by_side=plan.is_side_by_side)
        start = time.monotonic()
        try:
            with place.server() as server:
                section.add(plan.run(server, scale))
        except FAILURES as error:
            section.failure = f"{type(error).__name__}: {error}"
            print(f"  FAILED  {section.failure}", flush=True)
        print(f"  took {time.monotonic() - start:.0f} s", flush=True)
        result.sections.append(section)
    return result
