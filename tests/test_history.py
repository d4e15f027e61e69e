"""The history checker: it takes every history that some order explains, and no other."""

from __future__ import annotations

import itertools
import json
import random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import history
from bench.history import (
    CLEAN_UP,
    HEARTBEAT,
    JOIN,
    LEAVE,
    READ,
    REGISTER,
    UNREGISTER,
    RecordedCall,
    Recorder,
    UndecidedError,
    Violation,
    check_history,
    check_user,
)
from tests.model import Model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

USER = "alice"
MS = 1_000_000


def call(
    start: int, end: int | None, operation: str, sid: str = "", game_id: str | None = None, answer: Any = None
) -> RecordedCall:
    return RecordedCall(start, end, operation, USER, sid, game_id, answer)


def register(start: int, end: int | None, sid: str, *displaced: str) -> RecordedCall:
    return call(start, end, REGISTER, sid, answer=displaced)


RIGHT = [
    register(0, 10, "a"),
    call(20, 30, JOIN, "a", "game-1", (True, None)),
    register(40, 50, "b", "a"),
    call(60, 70, UNREGISTER, "a", answer=False),
    call(80, 90, HEARTBEAT, "a", answer=False),
    call(80, 100, HEARTBEAT, "b", answer=True),
    call(110, 120, JOIN, "b", "game-1", (True, None)),
    call(130, 140, JOIN, "b", "game-2", (True, "game-1")),
    call(150, 160, READ, answer=(("b", "game-2"),)),
    call(170, 180, LEAVE, "b", answer="game-2"),
    call(190, 200, CLEAN_UP, "b", answer=True),
    register(210, 220, "c"),
    call(230, 240, UNREGISTER, "c", answer=True),
    call(250, 260, READ, answer=()),
]


def edited(**changes: Any) -> list[RecordedCall]:
    """Give the right history with one call edited: the one that starts at ``start``."""
    start = changes.pop("at")
    return [one._replace(**changes) if one.start == start else one for one in RIGHT]


def test_a_right_history_is_taken() -> None:
    assert check_user(RIGHT) is None


WRONG = {
    "a displaced sid is reported twice": [
        register(0, 10, "a"),
        register(20, 30, "b", "a"),
        register(40, 50, "c", "b", "a"),
    ],
    "a displaced sid is reported to two callers at once": [
        register(0, 10, "a"),
        register(20, 50, "b", "a"),
        register(30, 60, "c", "a"),
    ],
    "a displaced sid is never reported": edited(at=40, answer=()),
    "a displaced sid is reported to the wrong caller": [
        register(0, 10, "a"),
        register(20, 30, "b"),
        register(40, 50, "c", "a", "b"),
    ],
    "a displaced sid was never registered": edited(at=0, answer=("x",)),
    "a heartbeat answers true after the removal": edited(at=80, answer=True),
    "a heartbeat answers false while the connection is there": edited(at=80, answer=False),
    "a join answers a game that it was not in": edited(at=110, answer=(True, "game-1")),
    "a join misses the game that it was in": edited(at=130, answer=(True, None)),
    "a join of a displaced connection succeeds": [
        register(0, 10, "a"),
        register(20, 30, "b", "a"),
        call(40, 50, JOIN, "a", "game-1", (True, None)),
    ],
    "a leave answers the wrong game": edited(at=170, answer="game-1"),
    "two registers each claim to displace the other": [register(0, 10, "a", "b"), register(5, 15, "b", "a")],
    "a late unregister removes a newer connection": [
        register(0, 10, "a"),
        register(20, 30, "b", "a"),
        call(40, 50, UNREGISTER, "a", answer=True),
        register(60, 70, "c"),
    ],
    "a late unregister removes a newer connection silently": [
        register(0, 10, "a"),
        register(20, 30, "b", "a"),
        call(40, 50, UNREGISTER, "a", answer=False),
        call(60, 70, HEARTBEAT, "b", answer=False),
    ],
    "two unregisters remove the same connection": [
        register(0, 10, "a"),
        call(20, 50, UNREGISTER, "a", answer=True),
        call(30, 60, UNREGISTER, "a", answer=True),
    ],
    "a cleanup reports what was displaced": [
        register(0, 10, "a"),
        register(20, 30, "b", "a"),
        call(40, 50, CLEAN_UP, "a", answer=True),
    ],
    "two cleanups report the same connection": [
        register(0, 10, "a"),
        call(20, 50, CLEAN_UP, "a", answer=True),
        call(30, 60, CLEAN_UP, "a", answer=True),
    ],
    "a call sees what had not begun": [call(0, 10, HEARTBEAT, "a", answer=True), register(20, 30, "a")],
    "the last read finds a connection that was removed": edited(at=250, answer=(("c", None),)),
    "the last read finds another game": edited(at=150, answer=(("b", "game-1"),)),
    "what a lost call may have done happens once": [
        register(0, 10, "a"),
        call(20, None, UNREGISTER, "a"),
        call(30, 40, HEARTBEAT, "a", answer=False),
        call(50, 60, HEARTBEAT, "a", answer=True),
    ],
    "a lost cleanup brings a connection back": [
        register(0, 10, "a"),
        call(20, None, CLEAN_UP),
        call(30, 40, HEARTBEAT, "a", answer=False),
        call(50, 60, HEARTBEAT, "a", answer=True),
    ],
    "a lost cleanup has an effect before it begins": [
        register(0, 10, "a"),
        call(20, 30, HEARTBEAT, "a", answer=False),
        call(40, None, CLEAN_UP),
    ],
    "a lost call has an effect before it begins": [
        register(0, 10, "a"),
        call(20, 30, HEARTBEAT, "a", answer=False),
        call(40, None, UNREGISTER, "a"),
    ],
}


@pytest.mark.parametrize("calls", WRONG.values(), ids=WRONG)
def test_a_history_that_was_edited_to_be_wrong_is_caught(calls: list[RecordedCall]) -> None:
    assert check_user(calls) is not None


def clean_up(start: int, end: int, sid: str, threshold_ns: int) -> RecordedCall:
    return call(start, end, CLEAN_UP, sid, answer=True)._replace(threshold_ns=threshold_ns)


TOO_EARLY = {
    "a cleanup takes who registered within its threshold": [
        register(0, 1 * MS, "a"),
        clean_up(50 * MS, 60 * MS, "a", 90 * MS),
    ],
    "a cleanup takes who beat within its threshold": [
        register(0, 1 * MS, "a"),
        call(200 * MS, 201 * MS, HEARTBEAT, "a", answer=True),
        clean_up(210 * MS, 220 * MS, "a", 90 * MS),
    ],
    "a cleanup takes who beat while it ran": [
        register(0, 1 * MS, "a"),
        call(215 * MS, 225 * MS, HEARTBEAT, "a", answer=True),
        clean_up(210 * MS, 220 * MS, "a", 90 * MS),
    ],
    "a cleanup takes whose register was lost, though it began within the threshold": [
        call(0, None, REGISTER, "a"),
        clean_up(50 * MS, 60 * MS, "a", 90 * MS),
    ],
    "an earlier and a later heartbeat do not hide the one that matters": [
        register(0, 1 * MS, "a"),
        call(200 * MS, 201 * MS, HEARTBEAT, "a", answer=True),
        call(100 * MS, 101 * MS, HEARTBEAT, "a", answer=True),
        call(230 * MS, 231 * MS, HEARTBEAT, "a", answer=False),
        clean_up(210 * MS, 220 * MS, "a", 90 * MS),
    ],
    "a cleanup takes the second connection of a user, and only the first was silent": [
        register(0, 1 * MS, "a"),
        clean_up(210 * MS, 220 * MS, "a", 90 * MS),
        register(230 * MS, 231 * MS, "b"),
        clean_up(240 * MS, 250 * MS, "b", 90 * MS),
    ],
    "a connection began one nanosecond too late to be stale": [
        register(10 * MS + history.CLOCK_MARGIN_NS + 1, 20 * MS, "a"),
        clean_up(50 * MS, 100 * MS, "a", 90 * MS),
    ],
}


@pytest.mark.parametrize("calls", TOO_EARLY.values(), ids=TOO_EARLY)
def test_a_cleanup_that_takes_who_was_seen_within_its_threshold_is_caught(calls: list[RecordedCall]) -> None:
    assert check_user(calls) is not None
    # It is the time that is wrong, and nothing else.
    assert check_user([one._replace(threshold_ns=None) for one in calls]) is None


OVERLAPPING = {
    "calls at once in the order in which they did not begin": [register(0, 10, "a", "b"), register(5, 15, "b")],
    "a heartbeat at the time of the removal": [
        register(0, 10, "a"),
        call(20, 60, UNREGISTER, "a", answer=True),
        call(30, 40, HEARTBEAT, "a", answer=True),
        call(35, 70, HEARTBEAT, "a", answer=False),
    ],
    "of two removals at once one finds the connection": [
        register(0, 10, "a"),
        call(20, 60, UNREGISTER, "a", answer=False),
        call(30, 40, CLEAN_UP, "a", answer=True),
    ],
    "a chain of registers within one long call": [
        register(0, 100, "a", "c"),
        register(10, 20, "b"),
        register(30, 40, "c", "b"),
        register(50, 60, "d", "a"),
    ],
    "a join between a register and its reply": [
        register(0, 50, "a"),
        call(10, 20, JOIN, "a", "game-1", (True, None)),
        call(30, 40, LEAVE, "a", answer="game-1"),
    ],
    "a call that begins when another ends": [register(0, 10, "a", "b"), register(10, 20, "b")],
    "a lost register that took effect late": [
        call(0, None, REGISTER, "a"),
        register(10, 20, "b"),
        register(30, 40, "c", "a"),
    ],
    "a lost cleanup that removed more than one": [
        register(0, 10, "a"),
        call(20, None, CLEAN_UP),
        call(30, 40, HEARTBEAT, "a", answer=False),
        register(50, 60, "b"),
        call(70, 80, HEARTBEAT, "b", answer=True),
        call(90, 100, HEARTBEAT, "b", answer=False),
    ],
    "a lost cleanup that removed nothing": [
        register(0, 10, "a"),
        call(20, None, CLEAN_UP),
        register(30, 40, "b", "a"),
    ],
    "a lost register that did nothing": [call(0, None, REGISTER, "a"), register(10, 20, "b")],
    "a cleanup of who was silent for as long as its threshold, to the margin": [
        register(10 * MS + history.CLOCK_MARGIN_NS, 20 * MS, "a"),
        clean_up(50 * MS, 100 * MS, "a", 90 * MS),
    ],
    "a cleanup that may have looked long after the register": [
        register(0, 1 * MS, "a"),
        clean_up(2 * MS, 100 * MS, "a", 90 * MS),
    ],
    "a cleanup of who beat in vain, joined, left and lost a heartbeat within its threshold": [
        register(0, 1 * MS, "a"),
        call(200 * MS, 201 * MS, JOIN, "a", "game-1", (True, None)),
        call(202 * MS, 203 * MS, LEAVE, "a", answer="game-1"),
        call(204 * MS, None, HEARTBEAT, "a"),
        call(205 * MS, 225 * MS, HEARTBEAT, "a", answer=False),
        clean_up(210 * MS, 220 * MS, "a", 90 * MS),
    ],
    "a cleanup of one connection, while another of the user was seen": [
        register(0, 1 * MS, "a"),
        register(150 * MS, 300 * MS, "b"),
        call(218 * MS, 219 * MS, HEARTBEAT, "b", answer=True),
        clean_up(210 * MS, 220 * MS, "a", 90 * MS),
    ],
    "a cleanup of a sid that came back while it ran": [
        register(0, 1 * MS, "a"),
        clean_up(210 * MS, 220 * MS, "a", 90 * MS),
        register(215 * MS, 216 * MS, "a"),
        call(217 * MS, 218 * MS, HEARTBEAT, "a", answer=True),
    ],
    "lost calls of every kind": [
        register(0, 10, "a"),
        call(20, None, JOIN, "a", "game-1"),
        call(30, None, HEARTBEAT, "a"),
        call(40, None, JOIN, "a", "game-2"),
        call(50, 60, LEAVE, "a", answer="game-2"),
        call(70, 80, LEAVE, "a", answer="game-1"),
        call(90, None, UNREGISTER, "a"),
        call(100, 110, HEARTBEAT, "a", answer=False),
    ],
}


@pytest.mark.parametrize("calls", OVERLAPPING.values(), ids=OVERLAPPING)
def test_a_history_that_some_order_explains_is_taken(calls: list[RecordedCall]) -> None:
    assert check_user(calls) is None


def test_the_error_names_the_user_and_shows_the_smallest_window() -> None:
    violation = check_user(edited(at=130, answer=(True, None)))
    assert isinstance(violation, Violation)
    assert violation.window == [call(130, 140, JOIN, "b", "game-2", (True, None))]
    assert [(one.sid, one.game_id) for one in violation.before] == [("b", "game-1")]
    lines = str(violation).splitlines()
    assert lines[0].startswith("user 'alice': ")
    assert lines[0].endswith("the user had b in game-1")
    assert lines[1].split("  ")[-1] == "join(b, game-2) answered (True, None)"
    assert [one.start for one in violation.related] == [40, 80, 110]


def test_the_error_of_a_cleanup_that_came_too_early_shows_it_and_when_the_connection_was_seen() -> None:
    last_beat = call(200 * MS, 201 * MS, HEARTBEAT, "a", answer=True)
    calls = [register(0, 1 * MS, "a"), last_beat, clean_up(210 * MS, 220 * MS, "a", 90 * MS)]
    assert str(check_user(calls)).splitlines() == [
        "user 'alice': a cleanup took a connection that was seen within its threshold of 90.000 ms",
        "  0.000000 to 1.000000  heartbeat(a) answered True",
        "  10.000000 to 20.000000  clean_up(a) answered True",
    ]


def test_the_window_holds_the_calls_that_were_under_way_and_no_reader_that_does_not_matter() -> None:
    long_ago = [register(0, 1, "x"), register(2, 3, "a", "x")]
    claims = [register(10, 20, "b", "c"), register(12, 22, "c", "b")]
    readers = [call(11, 13, HEARTBEAT, "a", answer=True), call(14, 30, HEARTBEAT, "x", answer=False)]
    violation = check_user([*long_ago, *claims, *readers])
    assert isinstance(violation, Violation)
    assert violation.window == claims
    assert violation.related == [long_ago[1], readers[0]]


def test_too_many_calls_at_once_are_undecided_and_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MAX_STEPS", 1_000)
    lost = [call(0, None, REGISTER, f"sid-{number}") for number in range(12)]
    with pytest.raises(UndecidedError):
        check_user([*lost, call(0, 10, HEARTBEAT, "x", answer=True)])


def expected(model: Model, one: RecordedCall) -> Any:
    """What the model answers, asked here without the checker's own code."""
    match one.operation:
        case history.REGISTER:
            return tuple(gone.sid for gone in model.register(one.sid, USER, 0, 0).displaced)
        case history.UNREGISTER | history.CLEAN_UP:
            return model.unregister(one.sid, 0) is not None
        case history.JOIN:
            return model.join(one.sid, str(one.game_id), 0)[:2]
        case history.LEAVE:
            return model.leave(one.sid, 0)
        case history.HEARTBEAT:
            return model.heartbeat(one.sid, 0)
    return tuple((connection.sid, connection.game_id) for connection in model.of_user(USER))


SIDS = st.sampled_from(["a", "b", "c"])
GAMES = st.sampled_from(["game-1", "game-2"])
CALLS = st.one_of(
    st.builds(call, st.just(0), st.just(0), st.sampled_from([REGISTER, UNREGISTER, LEAVE, HEARTBEAT]), SIDS),
    st.builds(call, st.just(0), st.just(0), st.just(JOIN), SIDS, GAMES),
    st.builds(call, st.just(0), st.just(0), st.just(READ)),
)


@st.composite
def histories(draw: st.DrawFn, most: int, longest: int) -> list[RecordedCall]:
    """Give the calls of a run of the model, one after the other, each with an interval around its moment."""
    model = Model(history.CONN_TTL_MS, history.CONN_TTL_MS)
    calls = []
    for number, one in enumerate(draw(st.lists(CALLS, min_size=1, max_size=most))):
        before, after = draw(st.integers(0, longest)), draw(st.integers(0, longest))
        moment = 10 * number
        calls.append(one._replace(start=moment - before, end=moment + after, answer=expected(model, one)))
    return calls


@given(histories(most=60, longest=25))
def test_every_run_of_the_model_with_overlaps_is_taken(calls: list[RecordedCall]) -> None:
    assert check_user(calls) is None
    assert check_user(random.Random(0).sample(calls, len(calls))) is None


def wrong_answers(one: RecordedCall) -> list[Any]:
    every: dict[str, Sequence[Any]] = {
        REGISTER: [(), ("a",), ("b",), ("c",), ("x",), ("a", "b")],
        UNREGISTER: [True, False],
        JOIN: [(True, None), (True, "game-1"), (True, "game-2"), (False, None)],
        LEAVE: [None, "game-1", "game-2"],
        HEARTBEAT: [True, False],
        READ: [(), (("a", None),), (("b", "game-1"),)],
    }
    return [answer for answer in every[one.operation] if answer != one.answer]


@given(histories(most=30, longest=4), st.data())
def test_every_corruption_of_a_run_without_overlaps_is_caught(calls: list[RecordedCall], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(calls) - 1))
    wrong = calls[place]._replace(answer=data.draw(st.sampled_from(wrong_answers(calls[place]))))
    violation = check_user([*calls[:place], wrong, *calls[place + 1 :]])
    assert isinstance(violation, Violation)
    # With another answer the later ones may be what cannot be, as long as no earlier one is.
    assert violation.window[-1].start == wrong.start


def some_order_explains(calls: list[RecordedCall]) -> bool:
    """Try all orders, and for each lost call to leave it out."""
    lost = [one for one in calls if one.end is None]
    returned = [one for one in calls if one.end is not None]
    chosen = itertools.chain.from_iterable(itertools.combinations(lost, count) for count in range(len(lost) + 1))
    return any(explains(order) for more in chosen for order in itertools.permutations([*returned, *more]))


def explains(order: tuple[RecordedCall, ...]) -> bool:
    for earlier, later in itertools.combinations(order, 2):
        if later.end is not None and later.end < earlier.start:
            return False
    model = Model(history.CONN_TTL_MS, history.CONN_TTL_MS)
    return all(expected(model, one) == one.answer or one.end is None for one in order)


@settings(max_examples=300)
@given(histories(most=5, longest=25), st.data())
def test_the_verdict_is_that_of_trying_every_order(calls: list[RecordedCall], data: st.DataObject) -> None:
    for place in data.draw(st.sets(st.integers(0, len(calls) - 1), max_size=2)):
        answer = data.draw(st.sampled_from(wrong_answers(calls[place])))
        calls[place] = calls[place]._replace(answer=answer)
    for place in data.draw(st.sets(st.integers(0, len(calls) - 1), max_size=2)):
        calls[place] = calls[place]._replace(end=None, answer=None)
    assert (check_user(calls) is None) is some_order_explains(calls)


@given(CALLS, st.lists(CALLS, max_size=5))
def test_what_is_said_to_change_nothing_changes_nothing(one: RecordedCall, before: list[RecordedCall]) -> None:
    model = Model(history.CONN_TTL_MS, history.CONN_TTL_MS)
    for earlier in before:
        expected(model, earlier)
    connections = dict(model.connections)
    answered = one._replace(answer=expected(model, one))
    if answered.changes_nothing():
        assert model.connections == connections


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[list[RecordedCall]], Path]:
    """Write a history as several processes would."""

    def write(calls: list[RecordedCall]) -> Path:
        for process in range(2):
            with Recorder(tmp_path, process) as recorder:
                for one in calls[process::2]:
                    recorder.add(one)
        return tmp_path

    return write


def test_a_recorded_history_of_several_processes_is_checked_user_by_user(
    folder: Callable[[list[RecordedCall]], Path],
) -> None:
    users = [f"user-{number}" for number in range(20)]
    report = check_history(folder([one._replace(user_id=user) for user in users for one in RIGHT]), processes=2)
    assert (report.users, report.calls, report.wrong, report.undecided) == (20, 20 * len(RIGHT), [], [])


def test_a_recorded_history_in_which_one_line_is_edited_is_caught(folder: Callable[[list[RecordedCall]], Path]) -> None:
    users = [f"user-{number}" for number in range(20)]
    path = folder([one._replace(user_id=user) for user in users for one in RIGHT])
    right = json.dumps([40, 50, REGISTER, "user-7", "b", None, ["a"], None])
    (file,) = (file for file in path.iterdir() if right in file.read_text())
    file.write_text(file.read_text().replace(right, json.dumps([40, 50, REGISTER, "user-7", "b", None, [], None])))

    report = check_history(path, processes=2)

    (wrong,) = report.wrong
    assert wrong.startswith("user 'user-7'")
    assert "register(b) answered ()" in wrong
