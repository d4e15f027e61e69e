"""What tests watch a server with: a state that is about to come, the scripts that were run, a reply that is held."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import redis

from tests.fault_proxy import BOUND_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from tests.fault_proxy import Proxy
    from tests.server import LocalServer

# Long enough for a process that is spawned, and has to import the library first.
WAIT_SECONDS = 30


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for a state that another process or thread is about to reach."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


async def is_held(proxy: Proxy) -> None:
    """Wait until a call waits for nothing but the reply that the proxy holds."""
    assert await asyncio.to_thread(proxy.is_holding.wait, BOUND_SECONDS)
    for _ in range(10):
        # The task that wrote the request ends. (In Python 3.11 its wait_for swallows a cancellation at that moment.)
        await asyncio.sleep(0)


@contextmanager
def admin(server: LocalServer) -> Iterator[Any]:
    """A plain client of the test's own server, to look into it and to reconfigure it."""
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        yield client


REFUSALS = {
    "uvloop": RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed"),
    "asyncio since Python 3.12": TypeError("'NoneType' object is not callable"),
}
"""What is said to who writes to a connection that is closed."""
every_refusal = pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)


def refuse_next_write(monkeypatch: pytest.MonkeyPatch, refusal: Exception) -> None:
    """Let redis-py's next asyncio write meet what is said of a connection that is closed."""

    def writelines(writer: asyncio.StreamWriter, _: object) -> None:
        monkeypatch.undo()
        writer.transport.abort()
        raise refusal

    monkeypatch.setattr(asyncio.StreamWriter, "writelines", writelines)


@contextmanager
def traced(trace: Callable[[FrameType, str, object], Any]) -> Iterator[None]:
    """Let a function see the lines that this thread runs meanwhile; what it raises is raised there."""
    tracing_before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(tracing_before)


@contextmanager
def raising_after(seconds: float, error: Exception) -> Iterator[None]:
    """Let a signal handler raise meanwhile."""

    def handle(*_: object) -> None:
        raise error

    handled_before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handled_before)


def evalsha_calls(client: redis.Redis) -> int:
    """How many scripts the server was asked to run since it was last asked to forget."""
    stats: Any = client.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {"calls": 0})["calls"])


def scripts_run(client: redis.Redis) -> int:
    """How many scripts the server has run to their end since it was last asked to forget."""
    stats: Any = client.info("commandstats")
    evalsha = stats.get("cmdstat_evalsha", {"calls": 0, "failed_calls": 0})
    return int(evalsha["calls"]) - int(evalsha["failed_calls"])


@contextmanager
def counted(client: redis.Redis) -> Iterator[dict[str, int]]:
    """Count the scripts that are run and loaded meanwhile, as the server counts them."""
    client.config_resetstat()
    counts: dict[str, int] = {}
    yield counts
    stats: Any = client.info("commandstats")
    evalsha = stats["cmdstat_evalsha"]
    counts["evalsha"] = evalsha["calls"]
    counts["evalsha that failed"] = evalsha["failed_calls"] + evalsha["rejected_calls"]
    counts["script|load"] = stats.get("cmdstat_script|load", {"calls": 0})["calls"]
