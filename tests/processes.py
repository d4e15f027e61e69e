"""Processes of tests: several that begin at the same moment, for what servers do at once, and one that is forked."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import ProcessPoolExecutor

PROCESSES = 4

# A forked child would share the parent's sockets.
spawn = multiprocessing.get_context("spawn")


def sleep_until(moment: float) -> None:
    """Wait for a moment of this machine's clock."""
    time.sleep(max(0, moment - time.time()))


def get_ready(_: int) -> None:
    """Load what the work needs, and take long enough for each of the processes to have one call of this."""
    import presence.sync  # noqa: F401

    time.sleep(0.2)


def at_once(processes: ProcessPoolExecutor, *work: tuple[Any, ...]) -> list[Any]:
    """Run each function in a process of its own, with a moment to begin at and its arguments; give what they return."""
    start = time.time() + 0.2
    futures = [processes.submit(function, start, *arguments) for function, *arguments in work]
    return [future.result(timeout=120) for future in futures]


def in_each(processes: ProcessPoolExecutor, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run a function in each process, with the moment to begin at and its number; give what each returns."""
    return at_once(processes, *((work, number, *arguments) for number in range(PROCESSES)))


def in_child(work: Callable[[], object]) -> None:
    """Do something in a forked process, which has ten seconds for it."""
    child = os.fork()
    if not child:
        signal.alarm(10)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
