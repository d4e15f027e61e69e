"""Which operations meet, what was there before, and what any serial order of them may lead to."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bench.contenders.interface import CONN_TTL_SECONDS, STALE_SECONDS
from presence.operations import CLEANUP_BATCH_SIZE
from tests.model import Model

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bench.contenders import Contender, State

# A schedule takes milliseconds and the set-up is repeated every few seconds, so real time moves nothing over a limit.
STALE_AGE_SECONDS = 1000
THRESHOLD_SECONDS = 500


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a contender's method."""

    method: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.method}({', '.join(map(str, self.arguments))})"

    async def run(self, contender: Contender) -> object:
        """Make the call; the sids that a cleanup gives have no order."""
        answer = await getattr(contender, self.method)(*self.arguments)
        return sorted(answer) if self.method == "cleanup" else answer


@dataclass(frozen=True, slots=True)
class Pair:
    """Two or three operations that run at the same time, on a keyspace that the set-up left."""

    name: str
    set_up: tuple[Call, ...]
    calls: tuple[Call, ...]
    forget_scripts: bool = False
    """Whether the server has lost its scripts: then a call may take an EVALSHA, a SCRIPT LOAD and another EVALSHA."""

    def with_scripts_lost(self) -> Pair:
        """Give the same on a server that has lost its scripts."""
        return replace(self, name=f"{self.name}, scripts lost", forget_scripts=True)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the calls answered (None for one that died), and the keyspace in the end."""

    answers: tuple[object, ...]
    records: dict[str, tuple[str, str | None]]
    users: dict[str, list[str]]
    games: dict[str, set[str]]

    @classmethod
    def of(cls, answers: Iterable[object], state: State) -> Outcome:
        """Put together what a run led to."""
        return cls(tuple(answers), state.records, state.users, state.games)


class Specification:
    """The tests' model of a presence, called as the contenders are: it knows no commands and no concurrency.

    A call is one atomic part, but for a cleanup: that is a part for each batch, the longest silent first, until one
    finds less than a whole batch.
    """

    def __init__(self, set_up: Iterable[Call]) -> None:
        self._model = Model(CONN_TTL_SECONDS * 1000, STALE_SECONDS * 1000)
        self._now = 1_000_000_000_000
        self._epoch = 0
        for call in set_up:
            self.run(call)

    def copy(self) -> Specification:
        """Give another one that has come to the same point."""
        other = copy(self)
        other._model = replace(
            self._model, connections=dict(self._model.connections), registered=list(self._model.registered)
        )
        return other

    def run(self, call: Call) -> object:
        """Make a call, with all its parts."""
        answer, is_over = self.run_part(call, None)
        while not is_over:
            answer, is_over = self.run_part(call, answer)
        return answer

    def run_part(self, call: Call, answered: object) -> tuple[object, bool]:
        """Make the next part of a call; give its answer, the parts before it included, and whether it is the last."""
        if call.method == "cleanup":
            batch = self._clean_up_batch(*call.arguments)
            earlier = answered if isinstance(answered, list) else []
            return sorted([*earlier, *batch]), len(batch) < CLEANUP_BATCH_SIZE
        answer: object = getattr(self, f"_{call.method}")(*call.arguments)
        return answer, True

    def _register(self, sid: str, user_id: str) -> list[str]:
        self._epoch += 1
        return [gone.sid for gone in self._model.register(sid, user_id, self._now, self._epoch).displaced]

    def _unregister(self, sid: str) -> bool:
        return self._model.unregister(sid, self._now) is not None

    def _join(self, sid: str, game_id: str) -> tuple[bool, str | None]:
        return self._model.join(sid, game_id, self._now)[:2]

    def _leave(self, sid: str) -> str | None:
        return self._model.leave(sid, self._now)

    def _heartbeat(self, sid: str) -> bool:
        return self._model.heartbeat(sid, self._now)

    def _clean_up_batch(self, threshold_seconds: int) -> list[str]:
        stale = self.copy()._model.cleanup(threshold_seconds * 1000, self._now)
        batch = sorted(stale, key=lambda one: one.last_seen)[:CLEANUP_BATCH_SIZE]
        for one in batch:
            del self._model.connections[one.sid]
            self._model.registered.remove(one.sid)
        return [one.sid for one in batch]

    def _is_online(self, user_id: str) -> bool:
        return self._model.is_online(user_id, self._now)

    def _get_game(self, game_id: str) -> dict[str, str]:
        return {member.sid: member.user_id for member in self._model.game(game_id, self._now)}

    def _age(self, seconds: int) -> None:
        self._model.age(seconds * 1000)

    def outcome(self, answers: Iterable[object]) -> Outcome:
        """Give these answers, and what is there now."""
        connections = self._model.connections
        records = {sid: (connection.user_id, connection.game_id) for sid, connection in connections.items()}
        games: dict[str, set[str]] = {}
        for sid, (_, game_id) in records.items():
            if game_id is not None:
                games.setdefault(game_id, set()).add(sid)
        users = {user_id: [own.sid for own in self._model.of_user(user_id)] for user_id, _ in records.values()}
        return Outcome(tuple(answers), records, users, games)


def serial_outcomes(pair: Pair, crashed: int | None = None) -> list[Outcome]:
    """Give what the serial orders of the atomic parts of a pair's calls lead to.

    Each part of a call whose caller died took effect whole or not at all, and none after one that did not.
    """
    outcomes: list[Outcome] = []

    def go_on(specification: Specification, answers: tuple[object, ...], pending: frozenset[int]) -> None:
        if pending <= {crashed}:
            told = (None if index == crashed else answer for index, answer in enumerate(answers))
            outcome = specification.outcome(told)
            if outcome not in outcomes:
                outcomes.append(outcome)
        for index in pending:
            after = specification.copy()
            answer, is_over = after.run_part(pair.calls[index], answers[index])
            go_on(after, (*answers[:index], answer, *answers[index + 1 :]), pending - {index} if is_over else pending)

    everyone = range(len(pair.calls))
    go_on(Specification(pair.set_up), (None,) * len(pair.calls), frozenset(everyone))
    return outcomes


def _register(sid: str, user_id: str = "user") -> Call:
    return Call("register", (sid, user_id))


def _join(game_id: str, sid: str = "old") -> Call:
    return Call("join", (sid, game_id))


_LEAVE = Call("leave", ("old",))
_UNREGISTER = Call("unregister", ("old",))
_HEARTBEAT = Call("heartbeat", ("old",))
_CLEANUP = Call("cleanup", (THRESHOLD_SECONDS,))

_PLAYING = (_register("old"), _join("game"))
_STALE = (*_PLAYING, Call("age", (STALE_AGE_SECONDS,)))

_ALL = (
    # The user has no connection yet: this is the pair with 260 schedules of plain commands.
    Pair("register‖register", (), (_register("new-1"), _register("new-2"))),
    Pair("register‖register, displacing", _PLAYING, (_register("new-1"), _register("new-2"))),
    Pair("register‖late unregister", _PLAYING, (_register("new"), _UNREGISTER)),
    Pair("register‖heartbeat", _PLAYING, (_register("new"), _HEARTBEAT)),
    Pair("register‖join", _PLAYING, (_register("new"), _join("game-2"))),
    Pair("join‖join", _PLAYING, (_join("game-2"), _join("game-3"))),
    Pair("join‖leave", _PLAYING, (_join("game-2"), _LEAVE)),
    Pair("unregister‖heartbeat", _PLAYING, (_UNREGISTER, _HEARTBEAT)),
    Pair("unregister‖join", _PLAYING, (_UNREGISTER, _join("game-2"))),
    Pair("cleanup‖heartbeat", _STALE, (_CLEANUP, _HEARTBEAT)),
    Pair("cleanup‖register", _STALE, (_CLEANUP, _register("new"))),
    Pair("cleanup‖join", _STALE, (_CLEANUP, _join("game-2"))),
    Pair("cleanup‖cleanup", _STALE, (_CLEANUP, _CLEANUP)),
    Pair("register‖unregister‖cleanup", _STALE, (_register("new"), _UNREGISTER, _CLEANUP)),
    # More that meet in the same keys.
    Pair("register‖register‖register", (), (_register("new-1"), _register("new-2"), _register("new-3"))),
    Pair("register‖leave", _PLAYING, (_register("new"), _LEAVE)),
    Pair("register‖is online", _PLAYING, (_register("new"), Call("is_online", ("user",)))),
    Pair("unregister‖unregister", _PLAYING, (_UNREGISTER, _UNREGISTER)),
    Pair("leave‖leave", _PLAYING, (_LEAVE, _LEAVE)),
    Pair("join‖heartbeat‖register", _PLAYING, (_join("game-2"), _HEARTBEAT, _register("new"))),
)
PAIRS = {pair.name: pair for pair in _ALL}
"""What every contender offers."""

# A cleanup takes two whole batches of them and a part of a third, in which the last of them is.
_MANY = tuple(f"stale-{number:02}" for number in range(2 * CLEANUP_BATCH_SIZE + 5))
_MANY_STALE = (
    *(Call("register", (sid, f"user of {sid}")) for sid in _MANY),
    *(_join("game", sid) for sid in _MANY[::11]),
    Call("age", (STALE_AGE_SECONDS,)),
)
_LATE = _MANY[-1]

_BATCHES = (
    Pair("cleanup‖cleanup, three batches", _MANY_STALE, (_CLEANUP, _CLEANUP)),
    Pair("cleanup‖heartbeat, three batches", _MANY_STALE, (_CLEANUP, Call("heartbeat", (_LATE,)))),
    Pair("cleanup‖register, three batches", _MANY_STALE, (_CLEANUP, _register("new", f"user of {_LATE}"))),
    Pair("cleanup‖cleanup‖heartbeat, three batches", _MANY_STALE, (_CLEANUP, _CLEANUP, Call("heartbeat", (_LATE,)))),
)
_AGAIN = (
    Pair("register‖register, one sid", (), (_register("new"), _register("new"))),
    Pair("register‖register, one sid, playing", _PLAYING, (_register("old"), _register("old"))),
    Pair("register‖register, one sid, two users", (), (_register("new", "user-1"), _register("new", "user-2"))),
    Pair("register‖register, one sid, another's", _PLAYING, (_register("old"), _register("old", "user-2"))),
    Pair("register again‖unregister", _PLAYING, (_register("old"), _UNREGISTER)),
    Pair("register again‖join", _PLAYING, (_register("old"), _join("game-2"))),
    Pair("register for another‖unregister", _PLAYING, (_register("old", "user-2"), _UNREGISTER)),
    Pair("register for another‖heartbeat", _PLAYING, (_register("old", "user-2"), _HEARTBEAT)),
    Pair("register for another‖join", _PLAYING, (_register("old", "user-2"), _join("game-2"))),
    Pair("register for another‖register", _PLAYING, (_register("old", "user-2"), _register("new"))),
    Pair("register again‖cleanup", _STALE, (_register("old"), _CLEANUP)),
)
BATCH_PAIRS = {pair.name: pair for pair in _BATCHES}
"""Cleanups of several batches: only *presence* has such."""
SAME_SID_PAIRS = {pair.name: pair for pair in _AGAIN}
"""A sid that is registered again (guarantee 4): the others do not offer that, even to one caller at a time."""
PRESENCE_PAIRS = PAIRS | BATCH_PAIRS | SAME_SID_PAIRS
