"""When ``run_cleanup`` cleans up, in outages of every kind and length: in simulated time, for what decides has no I/O.

That it does so against a real server is in ``test_background.py``.
"""

from __future__ import annotations

import random
from bisect import bisect
from itertools import pairwise, product
from typing import TYPE_CHECKING, NamedTuple

import pytest

import presence
from presence import retrying
from presence.background import RepeatedCleanup
from presence.operations import CLEANUP, Operations
from presence.replies import CleanupBatch

if TYPE_CHECKING:
    from collections.abc import Iterator

HEARTBEAT = 30
HELD_UP = 7.5
WAIT = HEARTBEAT + HELD_UP

# As retrying.RETRIES and what bounds them have it, without chance.
TIMEOUT = 5
PAUSES = (0.04, 0.1, 0.2, 0.4, 0.8, 1)

ROUND_TRIP = 0.001
NOT_AFTER = CLEANUP.arguments.index("not_after_ms")
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
        if pause is None or at - began > retrying.RETRYING_SECONDS:
            break
        at += pause
    # What has been sent to a server that stands still may run when it goes on, long after the call.
    return Call(at, outage.end if outage.kind == "frozen" else None, is_answered=False)


def heartbeats(outages: list[Outage], heartbeat: float, first: float, until: float) -> list[float]:
    """Give when the heartbeats of a player run, who sends each a heartbeat after the end of the one before."""
    ran, at = [first - heartbeat], first
    while at < until:
        one = call(outages, at)
        if one.is_answered:
            assert one.runs_at is not None
            # Of what waits in a server that stands still, it runs last.
            ran.append(one.runs_at + 2 * ROUND_TRIP)
        at = one.ends + heartbeat
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
            if token not in kept and now_ms <= int(operation.arguments[NOT_AFTER]):
                kept[token] = now_ms
                yield one.runs_at
            done = CleanupBatch((), is_last=True, now_ms=kept.get(token, now_ms), is_late=token not in kept)
        monkeypatch.setattr("presence.background.monotonic", lambda at=one.ends: at)
        if one.is_answered:
            assert done is not None
            at = one.ends + cleanup.succeed(done)
        else:
            at = one.ends + cleanup.fail(presence.ServerUnreachableError())


@pytest.mark.parametrize(
    ("heartbeat", "interval"), [*product([30], [1, 10, 30, 50, 100]), (120, 30), (15, 30), (10, 10), (5, 30)]
)
@pytest.mark.parametrize("kind", ["refused", "silent", "frozen"])
def test_who_sends_heartbeats_is_never_removed_after_an_outage_and_cleanups_go_on(
    kind: str, heartbeat: float, interval: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = random.Random(f"{kind} {heartbeat} {interval}")
    wait = heartbeat + max(heartbeat / 4, HELD_UP)
    for _ in range(40):
        begin = 4 * heartbeat + choice.uniform(0, 100)
        outage = Outage(begin, begin + choice.choice([choice.uniform(1, 40), choice.uniform(1, 200)]), kind)
        until = outage.end + 2 * wait + 2 * interval + 50
        players = [heartbeats([outage], heartbeat, heartbeat * phase / 30, until) for phase in range(30)]
        # The fault that met the end of the outage has ended after 40 seconds, and the look after it comes within a
        # heartbeat; and what it found due before may not have been so for an interval.
        longest = {
            True: outage.end - outage.begin + 40 + heartbeat + wait + interval,
            False: max(wait, interval) + heartbeat / 4,
        }
        for first in [choice.uniform(0, heartbeat), choice.uniform(0, begin), outage.end]:
            cleanup = RepeatedCleanup(Operations(heartbeat_seconds=heartbeat), interval, None)
            ran = [first]
            for at in cleanups([outage], cleanup, first, until, monkeypatch):
                for beats in players:
                    assert at - beats[bisect(beats, at) - 1] <= 3 * heartbeat, f"{outage} {beats} {ran}"
                ran.append(at)
            for earlier, later in pairwise(ran):
                is_around_it = earlier <= outage.end and later > outage.begin
                assert later - earlier < longest[is_around_it], f"{outage} {ran}"
            assert until - ran[-1] < longest[False]


def test_two_outages_at_the_worst_moment_remove_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a long one the server is back, and away again in the very time in which all were to send a heartbeat."""
    choice = random.Random(0)
    for _ in range(60):
        begin = choice.uniform(100, 130)
        first = Outage(begin, begin + choice.uniform(60, 120), choice.choice(["refused", "silent"]))
        back = first.end + choice.uniform(3, WAIT)
        outages = [first, Outage(back, back + choice.uniform(10, 60), first.kind)]
        until = outages[-1].end + 100
        players = [heartbeats(outages, HEARTBEAT, phase, until) for phase in range(HEARTBEAT)]
        for at in cleanups(
            outages, RepeatedCleanup(Operations(), HEARTBEAT, None), choice.uniform(0, HEARTBEAT), until, monkeypatch
        ):
            for beats in players:
                assert at - beats[bisect(beats, at) - 1] <= 3 * HEARTBEAT, f"{outages} {beats} {at}"


class Answers:
    """Answers what a ``run_cleanup`` asks, and says in seconds what it is told then."""

    def __init__(
        self, interval: float = 20, threshold_seconds: float | None = None, heartbeat: float = HEARTBEAT
    ) -> None:
        self.cleanup = RepeatedCleanup(Operations(heartbeat_seconds=heartbeat), interval, threshold_seconds)
        self.seconds = 0.0

    def give(self, after: float = 0, *, is_last: bool = True) -> tuple[float, float | None]:
        """Answer so many seconds after the answer before; give the pause, and for how long the next may run."""
        self.seconds += after
        now_ms = TODAY_MS + round(1000 * self.seconds)
        not_after = self.cleanup.next().arguments[NOT_AFTER]
        is_late = not_after != b"" and now_ms > int(not_after)
        pause = self.cleanup.succeed(CleanupBatch((), is_last=is_last, now_ms=now_ms, is_late=is_late))
        return pause, self.may_run_for()

    def may_run_for(self) -> float | None:
        not_after = self.cleanup.next().arguments[NOT_AFTER]
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


def test_nor_does_a_round_trip_that_is_long_beside_the_heartbeats() -> None:
    answers = Answers(heartbeat=1)
    assert [answers.give(0.4)[1] is None for _ in range(9)] == [*[True] * 8, False]


def test_answers_that_always_come_too_late_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    answers = Answers()
    for _ in range(31):
        answers.give(8)
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        f"no cleanup since {count} waits for heartbeats: the server's answers came more than 7.5 s apart each time, "
        "at last 8 s"
        for count in (10, 20, 30)
    ]


def test_those_before_a_cleanup_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    answers = Answers()
    answers.give()
    for _ in range(9):
        answers.give(8)
    answers.wait()
    answers.give(2.5)
    for _ in range(9):
        answers.give(8)
    assert not caplog.records


def test_a_fault_begins_it_anew_and_what_met_it_may_run_no_more() -> None:
    """If it has run, and only its reply was lost, it is the same call, and answers what it did."""
    answers = Answers()
    answers.give()
    answers.wait()
    first = answers.cleanup.next()
    answers.cleanup.fail(presence.ServerUnreachableError())
    again = answers.cleanup.next()
    assert (again.keys, *again.arguments[:NOT_AFTER]) == (first.keys, *first.arguments[:NOT_AFTER])
    assert (first.arguments[NOT_AFTER] > b"0", again.arguments[NOT_AFTER]) == (True, b"0")
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
    assert answers.cleanup.next().keys == first.keys
    assert answers.may_run_for() == float("inf")
