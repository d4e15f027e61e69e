"""What operations that meet may lead to: in any serial order of their atomic parts, or in one schedule."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.contenders.interface import CONN_TTL_SECONDS, STALE_SECONDS, Told
from bench.explorer.pairs import Call
from presence.operations import CLEANUP_BATCH_SIZE
from tests.model import Model

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from bench.contenders import State
    from bench.explorer.pairs import Pair
    from bench.explorer.schedules import Schedule
    from tests.model import ModelConnection

TOO_MANY_STEPS, TOO_FEW_STEPS = "a call of fewer steps", "a call of more steps"
"""In the place of an answer, where a step is no atomic part of a call."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the calls answered (None for one that died), and the keyspace in the end."""

    answers: tuple[object, ...]
    records: dict[str, tuple[str, str | None]]
    users: dict[str, list[str]]
    games: dict[str, set[str]]
    told: list[Told] | None = None
    """As in ``State``."""
    game_servers: list[tuple[str, bool]] | None = None
    """As in ``State``."""

    @classmethod
    def of(cls, answers: Iterable[object], state: State) -> Outcome:
        """Put together what a run led to."""
        return cls(tuple(answers), state.records, state.users, state.games, state.told, state.game_servers)

    def agrees(self, other: Outcome) -> bool:
        """Tell whether both are the same, as far as both tell."""
        if self.told is None or other.told is None:
            return replace(self, told=None, game_servers=None) == replace(other, told=None, game_servers=None)
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
    finds less than a whole batch. To start a game server and register for it are two, so are to read an epoch and to
    act for it, and a call that is sent twice.
    """

    def __init__(self, set_up: Iterable[Call], settings: Mapping[str, Any] | None = None) -> None:
        settings = dict(settings or {})
        self._server_grace_ms = 1000 * settings.pop("server_grace_seconds", 0)
        self._model = Model(CONN_TTL_SECONDS * 1000, STALE_SECONDS * 1000, **settings)
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
            batch, is_last = self._clean_up_batch(*call.arguments)
            earlier = answered if isinstance(answered, list) else []
            return sorted([*earlier, *batch]), is_last
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

    def _clean_up_batch(self, threshold_seconds: int) -> tuple[list[str], bool]:
        after = self.copy()._model
        ended = after.clean_up(threshold_seconds * 1000, self._now, self._server_grace_ms)
        is_last = len(ended.removed) + len(ended.detached) < CLEANUP_BATCH_SIZE
        removed = sorted(ended.removed, key=lambda one: one.last_seen)
        if is_last:
            self._model = after
        else:
            removed = removed[:CLEANUP_BATCH_SIZE]
            for one in removed:
                del self._model.connections[one.sid]
                self._model.registered.remove(one.sid)
        return [one.sid for one in removed], is_last

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
        game_servers = sorted((start.partition(":")[2], seen == 0) for start, seen in self._model.servers.items())
        return Outcome(tuple(answers), records, users, games, told, game_servers)


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
