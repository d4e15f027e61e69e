"""Whether a recorded history is linearizable: for each user, some order of the calls must explain every answer.

The order has to agree with real time: a call that ended before another one began comes first. What a call must answer
is said by the model of the stateful test and by nothing else. No operation of the storm lets two users meet, so the
users are checked one by one (linearizability is local), each by a search of the kind of Wing, Gong and Lowe: a call is
given its place only when one that returns needs it, and no pair of state and placed calls is looked at twice.

The model of the search has no time. That a cleanup took only who was silent for as long as its threshold is a check of
its own, by the times at which the calls began and ended.

A history is a folder of text files, a call a line, so it can be read, kept, and edited by hand.
"""

from __future__ import annotations

import json
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from tests.model import Model
from tests.processes import spawn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from tests.model import ModelConnection

REGISTER = "register"
UNREGISTER = "unregister"
JOIN = "join"
LEAVE = "leave"
HEARTBEAT = "heartbeat"
CLEAN_UP = "clean_up"
"""A cleanup reported this sid. It says nothing of what it left, and nobody looks whether that was stale.

Nobody knows the sids of a cleanup that never returned: it has none, and may remove whatever the user has, repeatedly.
"""
READ = "read"
"""The user's connections were read, each with its game."""

PARTS = 8
"""A process writes so many files, each with the calls of some of the users, so that a checker reads only its own."""

MAX_STEPS = 2_000_000
"""So many steps of a search for one user, then it is undecided: the search is exponential in calls at the same time."""

RELATED_CALLS = 12

NOW = 0
"""Nothing expires in a history: for the model, all of it is one moment."""
CONN_TTL_MS = 3_600_000

CLOCK_MARGIN_NS = 2_000_000
"""How much less than its threshold a connection that a cleanup took may seem to have been silent: thresholds are
rounded to milliseconds, and so are the server's times."""

State = tuple["ModelConnection", ...]
"""What a user has, in the order of registration."""


class RecordedCall(NamedTuple):
    """One call; times in nanoseconds of the clock that all processes of the machine share."""

    start: int
    end: int | None
    """None: it never returned, so it may have taken effect at any later time, or not at all."""
    operation: str
    user_id: str
    sid: str
    game_id: str | None
    answer: Any
    """Hashable; for a register the displaced sids, for a join whether it joined and the game left."""
    threshold_ns: int | None = None
    """For a cleanup, how long it let connections be silent; None: the times of what it took are not looked at."""

    def changes_nothing(self) -> bool:
        """Tell whether its answer says that it changed nothing, in whichever state it gave that answer."""
        return (
            self.operation in (HEARTBEAT, READ)
            or (self.operation == UNREGISTER and self.answer is False)
            or (self.operation == JOIN and self.answer is not None and self.answer[0] is False)
            or (self.operation == LEAVE and self.end is not None and self.answer is None)
        )

    def may_repeat(self) -> bool:
        """Tell whether it may take effect more than once: a cleanup of which nobody knows what it removed, and when."""
        return self.operation == CLEAN_UP and not self.sid

    def sids(self) -> set[str]:
        """Give the connections that it names."""
        displaced = self.answer or () if self.operation == REGISTER else ()
        return {sid for sid in (self.sid, *displaced) if sid}

    def describe(self, origin: int) -> str:
        """Give one line for people, with times in milliseconds since the origin."""
        arguments = ", ".join(filter(None, (self.sid, self.game_id)))
        begin = f"{(self.start - origin) / 1e6:.6f}"
        if self.end is None:
            return f"{begin} to ?  {self.operation}({arguments}) never returned"
        return f"{begin} to {(self.end - origin) / 1e6:.6f}  {self.operation}({arguments}) answered {self.answer!r}"


class UndecidedError(Exception):
    """The search was given up."""


@dataclass(frozen=True)
class Violation:
    """Calls of one user that no order explains."""

    user_id: str
    before: State
    """The one state that the user can have been in before these calls."""
    effective: list[RecordedCall]
    """Those of the window that had begun, and must have taken effect, before."""
    window: list[RecordedCall]
    """The last one to return is the one whose answer cannot be."""
    related: list[RecordedCall]
    """Earlier calls that name the same connections."""

    def __str__(self) -> str:
        calls = [*self.related, *self.window]
        origin = min(call.start for call in calls)
        had = ", ".join(f"{one.sid} in {one.game_id or 'no game'}" for one in self.before) or "no connection"
        lines = [f"user {self.user_id!r}: no order of these calls explains the answers; before them the user had {had}"]
        for call in self.window:
            note = "  (had taken effect)" if call in self.effective else ""
            lines.append(f"  {call.describe(origin)}{note}")
        if self.related:
            lines.append("  earlier calls that name the same connections:")
            lines += [f"    {call.describe(origin)}" for call in self.related]
        return "\n".join(lines)


@dataclass(frozen=True)
class EarlyCleanup:
    """A cleanup took a connection of a user that was seen within its threshold."""

    cleanup: RecordedCall
    seen: RecordedCall
    """The last call that saw the connection."""

    def __str__(self) -> str:
        origin = min(self.cleanup.start, self.seen.start)
        milliseconds = (self.cleanup.threshold_ns or 0) / 1e6
        return (
            f"user {self.cleanup.user_id!r}: a cleanup took a connection that was seen within its threshold of "
            f"{milliseconds:.3f} ms\n  {self.seen.describe(origin)}\n  {self.cleanup.describe(origin)}"
        )


class _States:
    """The states that a user can be in, as numbers, and what each call does and answers in each of them."""

    def __init__(self) -> None:
        self._numbers: dict[State, int] = {(): 0}
        self._states: list[State] = [()]
        self._steps: dict[tuple[int, str, str, str | None], tuple[Any, int]] = {}

    def state(self, number: int) -> State:
        return self._states[number]

    def step(self, number: int, call: RecordedCall) -> tuple[Any, int]:
        """Give the call's answer in a state, and the state after it."""
        key = (number, call.operation, call.sid, call.game_id)
        known = self._steps.get(key)
        if known is None:
            known = self._steps[key] = self._ask_model(self._states[number], call)
        return known

    def _ask_model(self, state: State, call: RecordedCall) -> tuple[Any, int]:
        model = Model(
            CONN_TTL_MS,
            CONN_TTL_MS,
            connections={connection.sid: connection for connection in state},
            registered=[connection.sid for connection in state],
        )
        answer = _OPERATIONS[call.operation](model, call)
        after = tuple(model.of_user(call.user_id))
        number = self._numbers.setdefault(after, len(self._states))
        if number == len(self._states):
            self._states.append(after)
        return answer, number


def _join(model: Model, call: RecordedCall) -> tuple[bool, str | None]:
    assert call.game_id is not None
    joined, left_game_id, *_ = model.join(call.sid, call.game_id, NOW)
    return joined, left_game_id


def _unregister(model: Model, call: RecordedCall) -> bool:
    return model.unregister(call.sid, NOW) is not None


def _clean_up(model: Model, call: RecordedCall) -> bool:
    sids = [call.sid] if call.sid else [connection.sid for connection in model.of_user(call.user_id)]
    removed = [model.unregister(sid, NOW) for sid in sids]
    return any(removed)


_OPERATIONS: dict[str, Callable[[Model, RecordedCall], Any]] = {
    REGISTER: lambda model, call: tuple(
        gone.sid for gone in model.register(call.sid, call.user_id, NOW, epoch=0).displaced
    ),
    UNREGISTER: _unregister,
    CLEAN_UP: _clean_up,
    JOIN: _join,
    LEAVE: lambda model, call: model.leave(call.sid, NOW),
    HEARTBEAT: lambda model, call: model.heartbeat(call.sid, NOW),
    READ: lambda model, call: tuple((one.sid, one.game_id) for one in model.of_user(call.user_id)),
}

_Configuration = tuple[int, int]
"""A state, and as bits those of the open calls that have their place already."""


@dataclass
class _Search:
    """All that can have happened up to a moment; calls are given to it in the order of real time."""

    states: _States
    changing: dict[int, RecordedCall] = field(default_factory=dict)
    """The calls that have begun and have not returned, each under a bit of its own."""
    reading: dict[int, RecordedCall] = field(default_factory=dict)
    """Those of them whose answers say that they changed nothing."""
    configurations: set[_Configuration] = field(default_factory=lambda: {(0, 0)})
    steps: int = 0

    def copy(self) -> _Search:
        return _Search(self.states, dict(self.changing), dict(self.reading), self.configurations, self.steps)

    def begin(self, call: RecordedCall) -> int:
        """Take a call in, and give its bit."""
        bit = 1
        while bit in self.changing or bit in self.reading:
            bit <<= 1
        if call.changes_nothing():
            self.reading[bit] = call
            self.configurations = {(state, self._place_readers(state, placed)) for state, placed in self.configurations}
        else:
            self.changing[bit] = call
        return bit

    def end(self, bit: int) -> bool:
        """Let a call return; tell whether its answer can be."""
        after = set()
        seen: set[_Configuration] = set()
        pending = list(self.configurations)
        while pending:
            configuration = pending.pop()
            if configuration in seen:
                continue
            seen.add(configuration)
            state, placed = configuration
            if placed & bit:
                after.add((state, placed & ~bit))
                continue
            for other, call in self.changing.items():
                if placed & other:
                    continue
                self.steps += 1
                answer, next_state = self.states.step(state, call)
                # Nobody knows what a lost call answered; where it would change nothing, it need not have happened.
                if next_state != state if call.end is None else answer == call.answer:
                    next_placed = placed if call.may_repeat() else placed | other
                    pending.append((next_state, self._place_readers(next_state, next_placed)))
            if self.steps > MAX_STEPS:
                raise UndecidedError
        self.configurations = after
        self.changing.pop(bit, None)
        self.reading.pop(bit, None)
        return bool(after)

    def _place_readers(self, state: int, placed: int) -> int:
        """Give every open call that changes nothing its place as soon as its answer fits: no later one is better."""
        for bit, call in self.reading.items():
            if not placed & bit and self.states.step(state, call)[0] == call.answer:
                placed |= bit
        return placed


_Event = tuple[int, bool, RecordedCall]
"""When, whether it is an end, and the call."""


def _events(calls: Iterable[RecordedCall]) -> list[_Event]:
    """List begins and ends in the order of time; what touches in time overlaps, so begins come first."""
    events = []
    for call in calls:
        if call.end is not None:
            events.append((call.end, True, call))
        elif call.operation in (HEARTBEAT, READ):
            continue
        events.append((call.start, False, call))
    events.sort(key=lambda event: event[:2])
    return events


def _run(search: _Search, events: list[_Event]) -> Iterator[bool]:
    """Give the events to a search one by one; tell after each whether the answers so far can be."""
    bits = {id(call): bit for bit, call in (search.changing | search.reading).items()}
    for _, is_end, call in events:
        if is_end:
            yield search.end(bits[id(call)])
        else:
            bits[id(call)] = search.begin(call)
            yield True


def check_user(calls: Iterable[RecordedCall]) -> Violation | EarlyCleanup | None:
    """Check all the calls of one user, who had no connection before; give the first calls that cannot be.

    Raises:
        UndecidedError: too many calls were under way at once to look at all their orders.

    """
    calls = list(calls)
    return _find_early_cleanup(calls) or _find_violation(calls)


def _find_early_cleanup(calls: list[RecordedCall]) -> EarlyCleanup | None:
    """Find a cleanup that took a connection which was seen for certain within its threshold.

    A register, and a heartbeat that found its connection, saw it no earlier than they began, and a cleanup looked no
    later than it ended: so the silence was at most the time between these two, and nobody has to know the server's
    clock, only that it was not set meanwhile. They ran before the removal, even where they returned after it: only a
    register brings a sid back that is gone, so one that was registered twice is not judged. A lost register must have
    run, since there was something to take; a lost heartbeat need not have.
    """
    registered: set[str] = set()
    registered_again: set[str] = set()
    seen: dict[str, RecordedCall] = {}
    for call in calls:
        if call.operation == REGISTER:
            (registered_again if call.sid in registered else registered).add(call.sid)
        elif call.operation != HEARTBEAT or call.answer is not True:
            continue
        if call.sid not in seen or call.start > seen[call.sid].start:
            seen[call.sid] = call
    for call in calls:
        if call.operation != CLEAN_UP or call.threshold_ns is None or call.end is None:
            continue
        last = seen.get(call.sid)
        if last is None or call.sid in registered_again:
            continue
        if call.end - last.start < call.threshold_ns - CLOCK_MARGIN_NS:
            return EarlyCleanup(call, last)
    return None


def _find_violation(calls: list[RecordedCall]) -> Violation | None:
    search = _Search(_States())
    events = _events(calls)
    certain, certain_from = search.copy(), 0
    for position, is_possible in enumerate(_run(search, events), 1):
        if not is_possible:
            return _explain(certain, events[:certain_from], events[certain_from:position])
        if len(search.configurations) == 1:
            certain, certain_from = search.copy(), position
    return None


def _explain(certain: _Search, past: list[_Event], events: list[_Event]) -> Violation:
    """Find the smallest window that shows it, from the last moment at which the state was certain."""
    ((state, placed),) = certain.configurations
    under_way = certain.changing | certain.reading
    culprit = events[-1][2]
    window = [*under_way.values(), *(call for _, is_end, call in events if not is_end)]
    # What still fails without a call that changed nothing is as wrong, and shorter.
    for reader in [call for call in window if call.changes_nothing() and call is not culprit]:
        fewer = [event for event in events if event[2] is not reader]
        if not all(_run(certain.copy(), fewer)):
            events = fewer
            window = [call for call in window if call is not reader]
    before = certain.states.state(state)
    named = {one.sid for one in before}.union(*(call.sids() for call in window))
    related = [call for _, is_end, call in past if not is_end and call not in window and named & call.sids()]
    effective = [call for bit, call in under_way.items() if placed & bit and call in window]
    return Violation(culprit.user_id, before, effective, window, related[-RELATED_CALLS:])


class Recorder:
    """Writes down the calls of one process; what belongs to no user is left out."""

    def __init__(self, folder: Path, process: int) -> None:
        self._stack = ExitStack()
        self._files = [
            self._stack.enter_context((folder / f"part-{part}-process-{process}.jsonl").open("w", encoding="utf-8"))
            for part in range(PARTS)
        ]

    def add(self, call: RecordedCall) -> None:
        """Write a call that has ended, or was lost."""
        self._files[zlib.crc32(call.user_id.encode()) % PARTS].write(json.dumps(call) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def read_calls(folder: Path, part: int) -> dict[str, list[RecordedCall]]:
    """Read the recorded calls of one part of the users, user by user."""
    calls: dict[str, list[RecordedCall]] = {}
    for path in sorted(folder.glob(f"part-{part}-*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                call = RecordedCall._make(map(_hashable, json.loads(line)))
                calls.setdefault(call.user_id, []).append(call)
    return calls


def _hashable(answer: Any) -> Any:
    return tuple(_hashable(part) for part in answer) if isinstance(answer, list) else answer


@dataclass(frozen=True)
class HistoryReport:
    """The outcome of a check."""

    users: int = 0
    calls: int = 0
    overlapping: int = 0
    """Those that began while another call of the same user was under way; without any, nothing was proved."""
    wrong: list[str] = field(default_factory=list)
    """For each user whose history is not linearizable, or of whom a cleanup took what was not silent, why."""
    undecided: list[str] = field(default_factory=list)
    """The users whose search was given up."""

    def __add__(self, other: HistoryReport) -> HistoryReport:
        return HistoryReport(
            self.users + other.users,
            self.calls + other.calls,
            self.overlapping + other.overlapping,
            self.wrong + other.wrong,
            self.undecided + other.undecided,
        )


def check_part(folder: Path, part: int) -> HistoryReport:
    """Check the users of one part."""
    wrong, undecided = [], []
    calls = read_calls(folder, part)
    for user_id, of_user in calls.items():
        try:
            violation = check_user(of_user)
        except UndecidedError:
            undecided.append(user_id)
        else:
            if violation:
                wrong.append(str(violation))
    return HistoryReport(
        users=len(calls),
        calls=sum(map(len, calls.values())),
        overlapping=sum(map(_overlapping, calls.values())),
        wrong=wrong,
        undecided=undecided,
    )


def _overlapping(calls: Iterable[RecordedCall]) -> int:
    count = under_way = 0
    for _, is_end, _ in _events(calls):
        count += not is_end and under_way > 0
        under_way += -1 if is_end else 1
    return count


def check_history(folder: Path, *, processes: int) -> HistoryReport:
    """Check a whole recorded history, in several processes."""
    report = HistoryReport()
    with ProcessPoolExecutor(processes, mp_context=spawn) as executor:
        for future in as_completed([executor.submit(check_part, folder, part) for part in range(PARTS)]):
            report += future.result()
    return report
