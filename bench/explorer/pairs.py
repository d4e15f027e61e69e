"""Which operations meet, what was there before, and what they may lead to: in any serial order, or in one schedule."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.contenders.interface import CONN_TTL_SECONDS, STALE_SECONDS, Told
from presence.operations import CLEANUP_BATCH_SIZE
from tests.model import Model

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from bench.contenders import Contender, State
    from bench.explorer.schedules import Schedule
    from tests.model import ModelConnection

# A schedule takes milliseconds and the set-up is repeated every few seconds, so real time moves nothing over a limit.
STALE_AGE_SECONDS = 1000
THRESHOLD_SECONDS = 500
GRACE_SECONDS = 500
TOO_MANY_STEPS, TOO_FEW_STEPS = "a call of fewer steps", "a call of more steps"
"""In the place of an answer, where a step is no atomic part of a call."""
ANSWER_IS_KEPT = (
    "register",
    "register_and_tell",
    "unregister",
    "detach",
    "join",
    "join_with_room",
    "leave",
    "update_metadata",
)
"""Methods whose call answers the same when it is sent again, if it changed anything."""


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
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of *presence*'s manager, beside its namespace."""
    forget_scripts: bool = False
    """Whether the server has lost its scripts: then a call may take an EVALSHA, a SCRIPT LOAD and another EVALSHA."""

    def with_scripts_lost(self) -> Pair:
        """Give the same on a server that has lost its scripts."""
        return replace(self, name=f"{self.name}, scripts lost", forget_scripts=True)

    def with_calls_sent_twice(self) -> Pair:
        """Give the same with every call that keeps its answer sent twice, as where the first reply was lost."""
        calls = tuple(
            Call("sent_twice", (call.method, *call.arguments)) if call.method in ANSWER_IS_KEPT else call
            for call in self.calls
        )
        return replace(self, name=f"{self.name}, sent twice", calls=calls)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the calls answered (None for one that died), and the keyspace in the end."""

    answers: tuple[object, ...]
    records: dict[str, tuple[str, str | None]]
    users: dict[str, list[str]]
    games: dict[str, set[str]]
    told: list[Told] | None = None
    """As in ``State``."""

    @classmethod
    def of(cls, answers: Iterable[object], state: State) -> Outcome:
        """Put together what a run led to."""
        return cls(tuple(answers), state.records, state.users, state.games, state.told)

    def agrees(self, other: Outcome) -> bool:
        """Tell whether both are the same, as far as both tell."""
        if self.told is None or other.told is None:
            return replace(self, told=None) == replace(other, told=None)
        return self == other


class _Found(NamedTuple):
    """What the first part of a call has read."""

    told: Told
    epoch: int


class _Answered(NamedTuple):
    """What a call that is sent twice answered at first, and whether it keeps that, having changed something."""

    answer: object
    is_kept: bool


class Specification:
    """The tests' model of a presence, called as the contenders are: it knows no commands and no concurrency.

    A call is one atomic part, but for a cleanup: that is a part for each batch, the longest silent first, until one
    finds less than a whole batch. To start a game server and register for it are two, and so are to read an epoch and
    to act for it.
    """

    def __init__(self, set_up: Iterable[Call], settings: Mapping[str, Any] | None = None) -> None:
        self._model = Model(CONN_TTL_SECONDS * 1000, STALE_SECONDS * 1000, **(settings or {}))
        self._now = 1_000_000_000_000
        self._epoch = 0
        for call in set_up:
            self.run(call)

    def copy(self) -> Specification:
        """Give another one that has come to the same point."""
        other = copy(self)
        other._model = replace(
            self._model,
            connections=dict(self._model.connections),
            registered=list(self._model.registered),
            servers=dict(self._model.servers),
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
        if call.method == "sent_twice":
            if isinstance(answered, _Answered) and answered.is_kept:
                return answered.answer, True
            before = self.copy()._model
            one = self.run(Call(call.arguments[0], call.arguments[1:]))
            return (one, True) if answered else (_Answered(one, is_kept=self._model != before), False)
        if call.method == "register_for":
            server_id, sid, user_id = call.arguments
            self._epoch += 1
            if answered is None:
                server = f"{self._epoch}:{server_id}"
                self._model.start_server(server, self._now)
                return server, False
            made = self._model.register(sid, user_id, self._now, self._epoch, server=str(answered))
            return not made.refused, True
        if call.method == "if_the_same":
            method, sid, *arguments = call.arguments
            found = self._model.known(sid, self._now)
            if not isinstance(answered, _Found):
                return (_Found(_told(found), found.epoch), False) if found else (None, True)
            is_the_same = found is not None and found.epoch == answered.epoch
            return (answered.told, getattr(self, f"_{method}")(sid if is_the_same else "nobody", *arguments)), True
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

    def _register_and_tell(self, sid: str, user_id: str, metadata: bytes = b"") -> tuple[object, ...]:
        self._epoch += 1
        made = self._model.register(sid, user_id, self._now, self._epoch, metadata=metadata)
        displaced = [_told(one) for one in made.displaced]
        return (
            made.refused,
            _told(made.connection),
            displaced,
            _told_if_any(made.replaced),
            _told_if_any(made.resumed_from),
        )

    def _detach(self, sid: str, grace_seconds: int) -> Told | None:
        return _told_if_any(self._model.detach(sid, self._now, self._now + 1000 * grace_seconds))

    def _join_with_room(self, sid: str, game_id: str, capacity: int) -> tuple[bool, str | None, bool]:
        return self._model.join(sid, game_id, self._now, capacity)

    def _update_metadata(self, sid: str, metadata: bytes) -> bool:
        return self._model.update_metadata(sid, metadata, self._now)

    def _heartbeats(self, *sids: str) -> list[bool]:
        return [self._model.heartbeat(sid, self._now) for sid in sids]

    def _clean_up_server(self, server_id: str, grace_seconds: int) -> tuple[list[Told], ...]:
        ended = self._model.clean_up_server(server_id, self._now, 1000 * grace_seconds)
        return tuple(sorted(map(_told, some)) for some in (ended.removed, ended.detached))

    def _get_connection(self, sid: str) -> Told | None:
        return _told_if_any(self._model.known(sid, self._now))

    def _get_user_connection(self, user_id: str) -> Told | None:
        return _told_if_any(self._model.user_connection(user_id, self._now))

    def _get_all_user_connections(self, user_id: str) -> list[Told]:
        return [_told(one) for one in self._model.of_user(user_id) if self._model.holds(one, self._now)]

    def _get_members(self, game_id: str) -> list[Told]:
        return [_told(member) for member in self._model.game(game_id, self._now)]

    def _count(self) -> int:
        return self._model.count(self._now)

    def _get_game_count(self, game_id: str) -> int:
        return self._model.game_count(game_id, self._now)

    def _get_opponent(self, game_id: str, user_id: str) -> str | None:
        return self._model.opponent(game_id, user_id, self._now)

    def outcome(self, answers: Iterable[object]) -> Outcome:
        """Give these answers, and what is there now."""
        connections = self._model.connections
        records = {sid: (connection.user_id, connection.game_id) for sid, connection in connections.items()}
        games: dict[str, set[str]] = {}
        for sid, (_, game_id) in records.items():
            if game_id is not None:
                games.setdefault(game_id, set()).add(sid)
        users = {user_id: [own.sid for own in self._model.of_user(user_id)] for user_id, _ in records.values()}
        told = [_told(connections[sid]) for sid in self._model.registered]
        return Outcome(tuple(answers), records, users, games, told)


def _told_if_any(connection: ModelConnection | None) -> Told | None:
    return _told(connection) if connection else None


def _told(connection: ModelConnection) -> Told:
    is_detached = connection.detached_until is not None
    server_id = connection.server.partition(":")[2] if connection.server else None
    return Told(connection.sid, connection.user_id, connection.game_id, is_detached, server_id, connection.metadata)


def scheduled_outcome(pair: Pair, schedule: Schedule, crashed: int | None = None) -> Outcome:
    """Give what a pair's calls lead to where each step of a schedule is one of their atomic parts.

    All parts of a call whose caller died took effect, but nobody was told. A call that takes another number of steps
    than it has parts can have no right answer.
    """
    specification = Specification(pair.set_up, pair.settings)
    answers: list[object] = [None] * len(pair.calls)
    pending = set(range(len(pair.calls)))
    for index in schedule:
        answers[index], is_over = specification.run_part(pair.calls[index], answers[index])
        if index not in pending:
            answers[index] = TOO_MANY_STEPS
        elif is_over:
            pending.remove(index)
    for index in pending - {crashed}:
        answers[index] = TOO_FEW_STEPS
    return specification.outcome(None if index == crashed else answer for index, answer in enumerate(answers))


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
    go_on(Specification(pair.set_up, pair.settings), (None,) * len(pair.calls), frozenset(everyone))
    return outcomes


def _register(sid: str, user_id: str = "user") -> Call:
    return Call("register", (sid, user_id))


def _join(game_id: str, sid: str = "old") -> Call:
    return Call("join", (sid, game_id))


def _tell(sid: str, user_id: str = "user", metadata: bytes = b"") -> Call:
    return Call("register_and_tell", (sid, user_id, metadata))


def _if_the_same(method: str, *arguments: object) -> Call:
    return Call("if_the_same", (method, *arguments))


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
    Pair("register‖register, one sid", (), (_tell("new"), _tell("new"))),
    Pair("register‖register, one sid, playing", _PLAYING, (_tell("old"), _tell("old"))),
    Pair("register‖register, one sid, two users", (), (_tell("new", "user-1"), _tell("new", "user-2"))),
    Pair("register‖register, one sid, another's", _PLAYING, (_register("old"), _register("old", "user-2"))),
    Pair("register again‖unregister", _PLAYING, (_tell("old"), _UNREGISTER)),
    Pair("register again‖join", _PLAYING, (_tell("old"), _join("game-2"))),
    Pair("register for another‖unregister", _PLAYING, (_tell("old", "user-2"), _UNREGISTER)),
    Pair("register for another‖heartbeat", _PLAYING, (_tell("old", "user-2"), _HEARTBEAT)),
    Pair("register for another‖join", _PLAYING, (_tell("old", "user-2"), _join("game-2"))),
    Pair("register for another‖register", _PLAYING, (_tell("old", "user-2"), _tell("new"))),
    Pair("register again‖cleanup", _STALE, (_tell("old"), _CLEANUP)),
)


def _room(sid: str, capacity: int) -> Call:
    return Call("join_with_room", (sid, "game", capacity))


_DETACH = Call("detach", ("old", GRACE_SECONDS))
_MEMBERS = Call("get_members", ("game",))
_TAGGED = (_tell("old", metadata=b"old's"), _join("game"))
_DETACHED = (*_TAGGED, _DETACH)
_PAST_GRACE = (*_DETACHED, Call("age", (STALE_AGE_SECONDS,)))
_TWO = (*_TAGGED, _tell("other", "opponent"), _join("game", "other"))
_TWO_APART = (*_TAGGED, _tell("other", "opponent"))
_OF_SERVER = (
    Call("register_for", ("server", "old", "user")),
    _join("game"),
    Call("register_for", ("server-2", "other", "opponent")),
    _join("game", "other"),
)
_CLEAN_UP_SERVER = Call("clean_up_server", ("server", 0))
_RESTART = Call("register_for", ("server", "new", "another user"))
_ELSEWHERE = Call("register_for", ("server-3", "old", "user"))
_DETACH_SERVER = Call("clean_up_server", ("server", GRACE_SECONDS))

_SEATS = (
    Pair("detach‖register", _TAGGED, (_DETACH, _tell("new"))),
    Pair("detach‖register‖register", _TAGGED, (_DETACH, _tell("new-1"), _tell("new-2", metadata=b"new"))),
    Pair("detach‖register again", _TAGGED, (_DETACH, _tell("old"))),
    Pair("detach‖detach", _TAGGED, (_DETACH, _DETACH)),
    Pair("detach‖unregister", _TAGGED, (_DETACH, _UNREGISTER)),
    Pair("detach‖heartbeat", _TAGGED, (_DETACH, _HEARTBEAT)),
    Pair("detach‖join", _TAGGED, (_DETACH, _join("game-2"))),
    Pair("detach‖leave", _TAGGED, (_DETACH, _LEAVE)),
    Pair("detach‖update metadata", _TAGGED, (_DETACH, Call("update_metadata", ("old", b"new")))),
    Pair("detach‖members", _TWO, (_DETACH, _MEMBERS)),
    Pair("detach‖opponent", _TWO, (_DETACH, Call("get_opponent", ("game", "opponent")))),
    Pair("detach‖count", _TWO, (_DETACH, Call("count", ()))),
    Pair("detach‖game's count", _TWO, (_DETACH, Call("get_game_count", ("game",)))),
    Pair("resume‖resume", _DETACHED, (_tell("new-1"), _tell("new-2"))),
    Pair("resume‖register for another", _DETACHED, (_tell("new"), _tell("old", "user-2"))),
    Pair("resume‖unregister", _DETACHED, (_tell("new"), _UNREGISTER)),
    Pair("resume‖heartbeats", _DETACHED, (_tell("new"), Call("heartbeats", ("old", "new")))),
    Pair("resume‖members", _DETACHED, (_tell("new"), _MEMBERS)),
    Pair("resume‖the user's connection", _DETACHED, (_tell("new"), Call("get_user_connection", ("user",)))),
    Pair("resume‖cleanup, past the grace", _PAST_GRACE, (_tell("new"), _CLEANUP)),
    Pair("resume again‖cleanup, past the grace", _PAST_GRACE, (_tell("old"), _CLEANUP)),
    Pair("cleanup‖cleanup, past the grace", _PAST_GRACE, (_CLEANUP, _CLEANUP)),
    Pair("register‖connection, past the grace", _PAST_GRACE, (_tell("new"), Call("get_connection", ("old",)))),
    Pair("register‖unregister, past the grace", _PAST_GRACE, (_tell("new"), _UNREGISTER)),
    Pair("register‖members, past the grace", _PAST_GRACE, (_tell("new"), _MEMBERS)),
)
_POLICIES = tuple(
    Pair(f"{name}, {displacement}", set_up, calls, {"displacement": displacement})
    for displacement in ("newest_resumes", "reject_while_alive")
    for name, set_up, calls in (
        ("first‖first", (), (_tell("new-1"), _tell("new-2"))),
        ("register‖register", _TAGGED, (_tell("new-1"), _tell("new-2", metadata=b"new"))),
        ("register‖unregister", _TAGGED, (_tell("new"), _UNREGISTER)),
        ("register‖detach", _TAGGED, (_tell("new"), _DETACH)),
        ("register‖leave", _TAGGED, (_tell("new"), _LEAVE)),
        ("register‖join", _TAGGED, (_tell("new"), _join("game-2"))),
        ("register‖members", _TWO, (_tell("new"), _MEMBERS)),
        ("register‖join with room", _TWO_APART, (_tell("new"), _room("other", 1))),
        ("register‖register, stale", _STALE, (_tell("new-1"), _tell("new-2"))),
        ("register‖heartbeat, stale", _STALE, (_tell("new"), _HEARTBEAT)),
        ("register‖cleanup, stale", _STALE, (_tell("new"), _CLEANUP)),
        ("register‖register for another", _TAGGED, (_tell("new"), _tell("old", "user-2"))),
    )
)
_TWO_OF_A_USER = (*_TAGGED, _tell("second", metadata=b"second's"), _join("game-2", "second"))
_POLICIES_OF_TWO = tuple(
    Pair(f"{name}, two of a user, {displacement}", set_up, calls, settings)
    for displacement in ("newest_wins", "newest_resumes", "reject_while_alive")
    for settings in ({"displacement": displacement, "connections_per_user": 2},)
    for name, set_up, calls in (
        ("register‖register", _TWO_OF_A_USER, (_tell("new-1"), _tell("new-2"))),
        ("register‖register again", _TWO_OF_A_USER, (_tell("new"), _tell("old"))),
        ("register‖detach", _TWO_OF_A_USER, (_tell("new"), _DETACH)),
        ("register again‖detach", _TWO_OF_A_USER, (_tell("old"), _DETACH)),
        (
            "register‖register, both detached",
            (*_TWO_OF_A_USER, _DETACH, Call("detach", ("second", GRACE_SECONDS))),
            (_tell("new-1"), _tell("new-2")),
        ),
        ("register‖register, one stale", (*_STALE, _tell("second")), (_tell("new-1"), _tell("new-2"))),
        ("register‖register, both stale", (*_TWO_OF_A_USER, *_STALE[-1:]), (_tell("new-1"), _tell("new-2"))),
    )
)
_SEVERAL = _POLICIES_OF_TWO + tuple(
    Pair(f"{name}, two of a user", (*_TAGGED, _tell("second")), calls, {"connections_per_user": 2})
    for name, calls in (
        ("register‖register", (_tell("new-1"), _tell("new-2"))),
        ("register‖register‖register", (_tell("new-1"), _tell("new-2"), _tell("new-3"))),
        ("register‖unregister", (_tell("new"), _UNREGISTER)),
        ("register‖unregister the second", (_tell("new"), Call("unregister", ("second",)))),
        ("register‖detach", (_tell("new"), _DETACH)),
        ("register‖register again", (_tell("new"), _tell("old"))),
        ("register‖all of the user", (_tell("new"), Call("get_all_user_connections", ("user",)))),
        ("unregister‖is online", (_UNREGISTER, Call("unregister", ("second",)), Call("is_online", ("user",)))),
    )
)
_ROOM = (
    Pair(
        "join with room‖join with room",
        (_tell("old"), _tell("other", "opponent")),
        (_room("old", 1), _room("other", 1)),
    ),
    Pair("join with room‖leave", _TWO_APART, (_room("other", 1), _LEAVE)),
    Pair("join with room‖unregister", _TWO_APART, (_room("other", 1), _UNREGISTER)),
    Pair("join with room‖detach", _TWO_APART, (_room("other", 1), _DETACH)),
    Pair("join with room‖resume", (*_TWO_APART, _DETACH), (_room("other", 1), _tell("new"))),
    Pair(
        "join with room‖register, past the grace",
        (*_TWO_APART, _DETACH, Call("age", (STALE_AGE_SECONDS,))),
        (_room("other", 1), _tell("new", "a third")),
    ),
    Pair("join with room‖cleanup", (*_STALE, _tell("other", "opponent")), (_room("other", 1), _CLEANUP)),
)
_EPOCHS = tuple(
    Pair(f"{other}‖{name} of the same epoch", _TAGGED, (call, _if_the_same(method, "old", *arguments)))
    for other, call in (
        ("register again", _tell("old", metadata=b"again")),
        ("register for another", _tell("old", "user-2")),
    )
    for name, method, *arguments in (
        ("heartbeat", "heartbeat"),
        ("join", "join", "game-2"),
        ("leave", "leave"),
        ("unregister", "unregister"),
        ("detach", "detach", GRACE_SECONDS),
        ("update metadata", "update_metadata", b"new"),
    )
)
_SERVERS = (
    Pair("clean up server‖clean up server", _OF_SERVER, (_CLEAN_UP_SERVER, _CLEAN_UP_SERVER)),
    Pair("clean up server‖detach server", _OF_SERVER, (_CLEAN_UP_SERVER, _DETACH_SERVER)),
    Pair("detach server‖register", _OF_SERVER, (_DETACH_SERVER, _tell("new"))),
    Pair(
        "detach server‖register for server-3",
        _OF_SERVER,
        (_DETACH_SERVER, Call("register_for", ("server-3", "new", "user"))),
    ),
    Pair("restart‖clean up server", _OF_SERVER, (_RESTART, _CLEAN_UP_SERVER)),
    Pair("restart‖cleanup", _OF_SERVER, (_RESTART, _CLEANUP)),
    Pair("restart‖cleanup‖heartbeat", _OF_SERVER, (_RESTART, _CLEANUP, _HEARTBEAT)),
    Pair("register again for server-3‖heartbeat", _OF_SERVER, (_ELSEWHERE, _HEARTBEAT)),
    Pair("register again for server-3‖clean up server", _OF_SERVER, (_ELSEWHERE, _CLEAN_UP_SERVER)),
    Pair("detach server‖unregister", _OF_SERVER, (_DETACH_SERVER, _UNREGISTER)),
    Pair("detach server‖heartbeat", _OF_SERVER, (_DETACH_SERVER, _HEARTBEAT)),
    Pair("detach server‖members", _OF_SERVER, (_DETACH_SERVER, _MEMBERS)),
    Pair("clean up server‖join", _OF_SERVER, (_CLEAN_UP_SERVER, _join("game-2"))),
)
_METADATA = (
    Pair(
        "update metadata‖update metadata",
        _TAGGED,
        (Call("update_metadata", ("old", b"1")), Call("update_metadata", ("old", b"2"))),
    ),
    Pair("update metadata‖register", _TAGGED, (Call("update_metadata", ("old", b"new")), _tell("new"))),
    Pair("update metadata‖register again", _TAGGED, (Call("update_metadata", ("old", b"new")), _tell("old"))),
    Pair(
        "update metadata‖join‖connection",
        _TAGGED,
        (Call("update_metadata", ("old", b"new")), _join("game-2"), Call("get_connection", ("old",))),
    ),
)
FLEET_GROUPS = {
    "detached and resumed": _SEATS,
    "displacement policies": _POLICIES,
    "two connections of a user": _SEVERAL,
    "capacity": _ROOM,
    "epochs": _EPOCHS,
    "game servers": _SERVERS,
    "metadata": _METADATA,
}
FLEET_PAIRS = {pair.name: pair for group in FLEET_GROUPS.values() for pair in group}
"""What a fleet of game servers needs beyond that: only *presence* has it."""
BATCH_PAIRS = {pair.name: pair for pair in _BATCHES}
"""Cleanups of several batches: only *presence* has such."""
SAME_SID_PAIRS = {pair.name: pair for pair in _AGAIN}
"""A sid that is registered again (guarantee 4): the others do not offer that, even to one caller at a time."""
SENT_TWICE_PAIRS = {
    pair.name: pair
    for pair in (
        pair.with_calls_sent_twice()
        for pair in (PAIRS | SAME_SID_PAIRS | FLEET_PAIRS).values()
        if any(call.method in ANSWER_IS_KEPT for call in pair.calls)
    )
}
"""The same with calls whose first reply is lost: only *presence* keeps answers."""
PRESENCE_PAIRS = PAIRS | BATCH_PAIRS | SAME_SID_PAIRS | FLEET_PAIRS
