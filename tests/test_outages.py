"""When ``run_cleanup`` cleans up, in outages of every kind and length: in simulated time, for what decides has no I/O.

That it does so against a real server is in ``test_background.py``.
"""

from __future__ import annotations

import random
from bisect import bisect
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import pytest

import presence
from presence import clients
from presence.background import RepeatedCleanup
from presence.operations import Operations
from presence.replies import CleanupBatch

if TYPE_CHECKING:
    from collections.abc import Iterator

HEARTBEAT = 30
THRESHOLD = 90
WAIT = 37.5
"""A heartbeat and a quarter."""

# As clients.RETRIES and what bounds them have it, without chance.
TIMEOUT = 5
PAUSES = (0.04, 0.1, 0.2, 0.4, 0.8, 1)

ROUND_TRIP = 0.001
TODAY_MS = 1_800_000_000_000
"""The server's time when the simulation begins."""


class Outage(NamedTuple):
    begin: float
    end: float
    kind: str
    """``"refused"``: connections are; ``"silent"``: whatever is sent gets lost; ``"frozen"``: it runs at the end."""


class Call(NamedTuple):
    ends: float
    runs_at: float | None
    is_answered: bool


def call(outages: list[Outage], at: float) -> Call:
    """Make a call as a manager does, with its retries."""
    began = at
    for pause in (*PAUSES, None):
        now = [one for one in outages if one.begin <= at < one.end]
        if not now:
            return Call(at + ROUND_TRIP, at + ROUND_TRIP, is_answered=True)
        (outage,) = now
        if outage.kind == "frozen" and outage.end - at <= TIMEOUT:
            return Call(outage.end + ROUND_TRIP, outage.end, is_answered=True)
        at += 0 if outage.kind == "refused" else TIMEOUT
        if pause is None or at - began > clients.RETRYING_SECONDS:
            break
        at += pause
    # What has been sent to a server that stands still may run when it goes on, long after the call.
    return Call(at, outage.end if outage.kind == "frozen" else None, is_answered=False)


def heartbeats(outages: list[Outage], first: float, until: float) -> list[float]:
    """Give when the heartbeats of a player run, who sends each a heartbeat after the end of the one before."""
    ran, at = [-HEARTBEAT + first], first
    while at < until:
        one = call(outages, at)
        if one.is_answered:
            assert one.runs_at is not None
            # Of what waits in a server that stands still, it runs last.
            ran.append(one.runs_at + 2 * ROUND_TRIP)
        at = one.ends + HEARTBEAT
    return ran


def cleanups(
    outages: list[Outage], cleanup: RepeatedCleanup, first: float, until: float, monkeypatch: pytest.MonkeyPatch
) -> Iterator[float]:
    """Give when the batches run that remove whoever is stale."""
    kept: dict[bytes, int] = {}
    at = first
    while at < until:
        monkeypatch.setattr("presence.background.monotonic", lambda at=at: at)
        operation = cleanup.next()
        one = call(outages, at)
        done = None
        if one.runs_at is not None:
            now_ms, token = TODAY_MS + round(1000 * one.runs_at), operation.keys[-1]
            if token not in kept and now_ms <= int(operation.arguments[-1]):
                kept[token] = now_ms
                yield one.runs_at
            done = CleanupBatch((), is_last=True, now_ms=kept.get(token, now_ms), is_late=token not in kept)
        monkeypatch.setattr("presence.background.monotonic", lambda at=one.ends: at)
        if one.is_answered:
            assert done is not None
            at = one.ends + cleanup.succeed(done)
        else:
            at = one.ends + cleanup.fail(presence.ServerUnreachableError())


@pytest.mark.parametrize("interval", [1, 10, 30, 50, 100])
@pytest.mark.parametrize("kind", ["refused", "silent", "frozen"])
def test_who_sends_heartbeats_is_never_removed_after_an_outage_and_cleanups_go_on(
    kind: str, interval: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = random.Random(f"{kind} {interval}")
    for _ in range(200):
        begin = choice.uniform(100, 200)
        outage = Outage(begin, begin + choice.choice([choice.uniform(1, 40), choice.uniform(1, 200)]), kind)
        until = outage.end + 200
        beats = heartbeats([outage], choice.uniform(0, HEARTBEAT), until)
        cleanup = RepeatedCleanup(Operations(heartbeat_seconds=HEARTBEAT), interval, None)
        ran = [choice.uniform(0, HEARTBEAT)]
        for at in cleanups([outage], cleanup, ran[0], until, monkeypatch):
            assert at - beats[bisect(beats, at) - 1] <= THRESHOLD, f"{outage} {beats} {ran}"
            ran.append(at)
        # The fault that met the end of the outage has ended after 40 seconds, and then it looks again at the latest
        # after the interval; and what it found due before may not have been so for an interval.
        longest = {True: outage.end - outage.begin + 40 + WAIT + 2 * interval, False: max(WAIT, interval) + 5}
        for earlier, later in pairwise(ran):
            assert later - earlier < longest[earlier <= outage.end and later > outage.begin], f"{outage} {ran}"
        assert until - ran[-1] < longest[False]


def test_two_outages_at_the_worst_moment_remove_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a long one the server is back, and away again in the very time in which all were to send a heartbeat."""
    choice = random.Random(0)
    for _ in range(300):
        begin = choice.uniform(100, 130)
        first = Outage(begin, begin + choice.uniform(60, 120), choice.choice(["refused", "silent"]))
        back = first.end + choice.uniform(3, WAIT)
        second = Outage(back, back + choice.uniform(10, 60), first.kind)
        until = second.end + 100
        beats = heartbeats([first, second], choice.uniform(0, HEARTBEAT), until)
        cleanup = RepeatedCleanup(Operations(heartbeat_seconds=HEARTBEAT), HEARTBEAT, None)
        for at in cleanups([first, second], cleanup, choice.uniform(0, HEARTBEAT), until, monkeypatch):
            assert at - beats[bisect(beats, at) - 1] <= THRESHOLD, f"{first} {second} {beats} {at}"


class Answers:
    """Answers what a ``run_cleanup`` asks, and says in seconds what it is told then."""

    def __init__(self, interval: float = 20, threshold_seconds: float | None = None) -> None:
        self.cleanup = RepeatedCleanup(Operations(heartbeat_seconds=HEARTBEAT), interval, threshold_seconds)
        self.seconds = 0.0

    def give(self, after: float = 0, *, is_last: bool = True) -> tuple[float, float | None]:
        """Answer so many seconds after the answer before; give the pause, and for how long the next may run."""
        self.seconds += after
        now_ms = TODAY_MS + round(1000 * self.seconds)
        not_after = self.cleanup.next().arguments[-1]
        is_late = not_after != b"" and now_ms > int(not_after)
        pause = self.cleanup.succeed(CleanupBatch((), is_last=is_last, now_ms=now_ms, is_late=is_late))
        return pause, self.may_run_for()

    def may_run_for(self) -> float | None:
        not_after = self.cleanup.next().arguments[-1]
        if not_after == b"0":
            return None
        return (int(not_after) - TODAY_MS) / 1000 - self.seconds if not_after else float("inf")

    def wait(self) -> None:
        """Answer all looks of a whole wait, of which the first has been answered."""
        for _ in range(13):
            assert self.give(2.5) == (2.5, None)
        assert self.give(2.5) == (2.5, 7.5)


def test_the_first_cleanup_comes_after_a_heartbeat_and_a_quarter_and_the_next_after_the_interval() -> None:
    answers = Answers()
    assert answers.may_run_for() is None
    assert answers.give() == (2.5, None)
    answers.wait()
    assert answers.give(2.5, is_last=False) == (0, 7.5)
    assert answers.give(is_last=False) == (0, 7.5)
    assert answers.give() == (2.5, None)
    for _ in range(6):
        assert answers.give(2.5) == (2.5, None)
    assert answers.give(2.5) == (2.5, 7.5)


@pytest.mark.parametrize("after", [8, -3600])
def test_an_answer_that_comes_late_or_after_the_clock_was_set_back_begins_the_wait_anew(after: float) -> None:
    answers = Answers()
    answers.give()
    for _ in range(8):
        answers.give(2.5)
    assert answers.give(after) == (2.5, None)
    answers.wait()
    answers.give(2.5)
    assert answers.give(after) == (2.5, None)
    answers.wait()


def test_an_answer_that_is_not_very_late_does_not() -> None:
    answers = Answers()
    answers.give()
    for _ in range(5):
        answers.give(7.5)
    assert answers.may_run_for() == 7.5


def test_a_fault_begins_it_anew_and_what_met_it_may_run_no_more() -> None:
    """If it has run, and only its reply was lost, it is the same call, and answers what it did."""
    answers = Answers()
    answers.give()
    answers.wait()
    first = answers.cleanup.next()
    answers.cleanup.fail(presence.ServerUnreachableError())
    again = answers.cleanup.next()
    assert (again.keys, *again.arguments[:-1]) == (first.keys, *first.arguments[:-1])
    assert (first.arguments[-1] > b"0", again.arguments[-1]) == (True, b"0")
    assert answers.give(1) == (2.5, None)
    answers.wait()

    answers.cleanup.fail(presence.ServerUnreachableError())
    done = CleanupBatch((), is_last=False, now_ms=TODAY_MS)  # It had run: the time is that of then.
    assert answers.cleanup.succeed(done) == 0
    assert answers.may_run_for() is None
    assert answers.give(60) == (2.5, None)
    answers.wait()


@pytest.mark.parametrize("threshold_seconds", [0, HEARTBEAT])
def test_with_a_threshold_of_a_heartbeat_or_less_none_waits(threshold_seconds: float) -> None:
    answers = Answers(threshold_seconds=threshold_seconds)
    assert answers.may_run_for() == float("inf")
    assert answers.give(is_last=False) == (0, float("inf"))
    assert answers.give() == (20, float("inf"))
    first = answers.cleanup.next()
    answers.cleanup.fail(presence.ServerUnreachableError())
    assert answers.cleanup.next() is first
