"""Random sequences of operations, with time moving: every answer and every key equals those of a plain model."""

from __future__ import annotations

import asyncio
import os
import uuid
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import presence
import presence.sync
from tests.clock import let_time_pass
from tests.conftest import Awaited
from tests.invariants import read_keyspace, violations
from tests.model import Model, ModelConnection

if TYPE_CHECKING:
    from presence import ConnectionInfo

# Few names, so that sequences meet: the same user on two sids, the same sid for two users.
SIDS = st.sampled_from(["sid-1", "sid-2", "sid-3", "sid-4", "sid-5"])
USERS = st.sampled_from(["user-1", "user-2", "user-3"])
GAMES = st.sampled_from(["game-1", "game-2"])
# Time moves in steps of ten seconds and every limit lies at five, so the few real seconds of a run cannot matter.
STEPS = st.sampled_from([10, 30, 70, 100, 250, 310])
GRACES = st.sampled_from([5, 45, 105, 255])
CAPACITIES = st.sampled_from([1, 2, None])
THRESHOLDS = st.sampled_from([5, 45, 95, 1005])
CONN_TTL_SECONDS = 305
HEARTBEAT_SECONDS = 95 / 3


class Sequences(RuleBasedStateMachine):
    """Every operation through one of the two managers, at random."""

    url: str
    connections_per_user = 1

    def __init__(self) -> None:
        super().__init__()
        self.namespace = f"stateful-{uuid.uuid4()}"
        self.stack = ExitStack()
        options: dict[str, Any] = {
            "namespace": self.namespace,
            "conn_ttl_seconds": CONN_TTL_SECONDS,
            "heartbeat_seconds": HEARTBEAT_SECONDS,
            "connections_per_user": self.connections_per_user,
        }
        self.client = self.stack.enter_context(redis.Redis.from_url(self.url))
        runner = self.stack.enter_context(asyncio.Runner())
        awaited = Awaited(presence.ConnectionManager.from_url(self.url, **options), runner)
        self.stack.callback(awaited.close)
        blocking = self.stack.enter_context(presence.sync.ConnectionManager.from_url(self.url, **options))
        self.managers: list[Any] = [awaited, blocking]
        self.model = Model(CONN_TTL_SECONDS * 1000, 95_000, self.connections_per_user)
        self.calls = 0

    def teardown(self) -> None:
        keyspace = read_keyspace(self.client, self.namespace)
        keys = [*keyspace.ttls_ms, *keyspace.other_ttls_ms]
        if keys:
            self.client.delete(*keys)
        self.stack.close()

    @property
    def manager(self) -> Any:
        self.calls += 1
        return self.managers[self.calls % 2]

    def now(self) -> int:
        seconds, microseconds = self.client.time()
        return int(seconds) * 1000 + int(microseconds) // 1000

    def same(self, actual: ConnectionInfo | None, expected: ModelConnection | None) -> None:
        if expected is None:
            assert actual is None
        else:
            assert actual == self.typed(expected)

    @staticmethod
    def typed(connection: ModelConnection) -> ConnectionInfo:
        def time(milliseconds: int) -> datetime:
            return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=milliseconds)

        return presence.ConnectionInfo(
            connection.sid,
            connection.user_id,
            connection.game_id,
            time(connection.connected_at),
            time(connection.last_seen),
            epoch=connection.epoch,
            detached_until=time(connection.detached_until) if connection.detached_until else None,
        )

    def written_at(self, sid: str, before: int) -> int:
        """Read when the server wrote a connection's last_seen: the one thing that the model cannot know itself."""
        written: Any = self.client.zscore(f"{{{self.namespace}}}:last_seen", sid)
        assert before <= int(written) <= self.now()
        return int(written)

    @initialize()
    def start_empty(self) -> None:
        assert self.manager.get_connection_count() == 0

    @rule(sid=SIDS, user_id=USERS)
    def register(self, sid: str, user_id: str) -> None:
        before = self.now()
        registration = self.manager.register_connection(sid, user_id)
        # The epoch is the one thing besides the time that the model cannot know: it must be the largest.
        epoch = registration.connection.epoch
        assert epoch > max((connection.epoch for connection in self.model.connections.values()), default=0)
        expected = self.model.register(sid, user_id, self.written_at(sid, before), epoch)
        self.same(registration.connection, expected.connection)
        assert registration.displaced == tuple(map(self.typed, expected.displaced))
        self.same(registration.replaced, expected.replaced)
        self.same(registration.resumed_from, expected.resumed_from)
        assert registration.resumed is (expected.resumed_from is not None)
        assert registration

    @rule(sid=SIDS)
    def unregister(self, sid: str) -> None:
        self.same(self.manager.unregister_connection(sid), self.model.unregister(sid, self.now()))

    @rule(sid=SIDS, grace_seconds=GRACES)
    def detach(self, sid: str, grace_seconds: int) -> None:
        before = self.now()
        detached = self.manager.unregister_connection(sid, grace_seconds=grace_seconds)
        score = self.client.zscore(f"{{{self.namespace}}}:last_seen", sid)
        if self.model.live(sid, before):
            assert score is not None
            assert before <= -int(score) - grace_seconds * 1000 <= self.now()
        self.same(detached, self.model.detach(sid, before, -int(score or 0)))

    @rule(sid=SIDS, game_id=GAMES, capacity=CAPACITIES)
    def join(self, sid: str, game_id: str, capacity: int | None) -> None:
        joined, left_game_id, is_full = self.model.join(sid, game_id, self.now(), capacity)
        result = self.manager.join_game(sid, game_id, capacity=capacity)
        assert result == presence.JoinResult(joined, left_game_id, is_full)

    @rule(sid=SIDS, other=SIDS)
    def act_for_another_registration(self, sid: str, other: str) -> None:
        mine, another = self.model.live(sid, self.now()), self.model.connections.get(other)
        epoch = another.epoch if another and sid != other else 1
        if mine:
            assert not self.manager.update_heartbeat(sid, epoch=epoch)
            assert not self.manager.join_game(sid, "game-1", epoch=epoch)
            assert self.manager.leave_game(sid, epoch=epoch) is None
            assert self.manager.unregister_connection(sid, epoch=epoch) is None

    @rule(sid=SIDS)
    def leave(self, sid: str) -> None:
        assert self.manager.leave_game(sid) == self.model.leave(sid, self.now())

    @rule(sid=SIDS)
    def heartbeat(self, sid: str) -> None:
        before = self.now()
        is_known = self.manager.update_heartbeat(sid)
        assert is_known == (self.model.live(sid, before) is not None)
        if is_known:
            self.model.heartbeat(sid, self.written_at(sid, before))

    @rule(threshold_seconds=THRESHOLDS)
    def cleanup(self, threshold_seconds: int) -> None:
        removed = self.manager.cleanup_stale_connections(threshold_seconds).removed
        expected = self.model.cleanup(threshold_seconds * 1000, self.now())
        stale = sorted(
            (gone for gone in expected if not gone.detached_until), key=lambda gone: (gone.last_seen, gone.sid)
        )
        past_grace = sorted(
            (gone for gone in expected if gone.detached_until), key=lambda gone: (gone.detached_until, gone.sid)
        )
        assert list(removed)[: len(stale)] == list(map(self.typed, stale))
        assert set(removed[len(stale) :]) == set(map(self.typed, past_grace))

    @rule()
    def cleanup_by_default_threshold(self) -> None:
        removed = self.manager.cleanup_stale_connections().removed
        assert set(removed) == set(map(self.typed, self.model.cleanup(95_000, self.now())))

    @precondition(lambda self: self.model.connections)
    @rule(seconds=STEPS)
    def let_time_pass(self, seconds: int) -> None:
        let_time_pass(self.client, self.namespace, seconds)
        self.model.age(seconds * 1000)

    @invariant()
    def every_read_answers_as_the_model_does(self) -> None:
        now = self.now()
        manager, model = self.manager, self.model
        for number in range(1, 6):
            sid = f"sid-{number}"
            self.same(manager.get_connection(sid), model.known(sid, now))
        for number in range(1, 4):
            user_id = f"user-{number}"
            self.same(manager.get_user_connection(user_id), model.user_connection(user_id, now))
            assert manager.is_user_online(user_id) == model.is_online(user_id, now)
        for game_id in ("game-1", "game-2"):
            assert manager.get_game_connections(game_id) == list(map(self.typed, model.game(game_id, now)))
            assert manager.get_game_user_sids(game_id) == model.user_sids(game_id, now)
            assert manager.get_opponent_sid(game_id, "user-1") == model.opponent(game_id, "user-1", now)
            assert manager.get_game_connection_count(game_id) == model.game_count(game_id, now)
        assert manager.get_connection_count() == model.count(now)

    @invariant()
    def every_key_holds_what_the_model_holds(self) -> None:
        keyspace = read_keyspace(self.client, self.namespace)
        assert violations(keyspace, self.connections_per_user) == []
        connections = self.model.connections
        assert {
            sid: {"user_id": record["user_id"], "game_id": record["game_id"]}
            for sid, record in keyspace.records.items()
        } == {
            sid: {
                "user_id": connection.user_id,
                "game_id": connection.game_id or "",
            }
            for sid, connection in connections.items()
        }
        users = {connection.user_id for connection in connections.values()}
        assert keyspace.users == {user: [own.sid for own in self.model.of_user(user)] for user in users}
        games = {connection.game_id for connection in connections.values() if connection.game_id}
        assert {game: set(members) for game, members in keyspace.games.items()} == {
            game: {sid for sid, connection in connections.items() if connection.game_id == game} for game in games
        }
        assert keyspace.last_seen == {
            sid: -connection.detached_until if connection.detached_until else connection.last_seen
            for sid, connection in connections.items()
        }

    @invariant()
    def every_key_outlives_the_connections_in_it(self) -> None:
        now = self.now()
        keyspace = read_keyspace(self.client, self.namespace)
        prefix = f"{{{self.namespace}}}:"
        for sid, connection in self.model.connections.items():
            remaining = (connection.detached_until or connection.last_seen + self.model.conn_ttl_ms) - now
            keys = [f"conn:{sid}", f"user_conns:{connection.user_id}", "last_seen"]
            if connection.game_id:
                keys.append(f"game_conns:{connection.game_id}")
            for key in keys:
                assert keyspace.ttls_ms[prefix + key] >= remaining


class SequencesWithTwoConnectionsPerUser(Sequences):
    """The same where a user may have two."""

    connections_per_user = 2


@pytest.mark.timeout(600)
@pytest.mark.parametrize("machine", [Sequences, SequencesWithTwoConnectionsPerUser])
def test_any_sequence_answers_and_stores_what_the_model_does(machine: type[Sequences], server_url: str) -> None:
    class OnThisServer(machine):  # type: ignore[misc, valid-type]
        url = server_url

    run_state_machine_as_test(  # type: ignore[no-untyped-call, unused-ignore]
        OnThisServer,
        settings=settings(
            max_examples=int(os.environ.get("PRESENCE_EXAMPLES", "60")),
            stateful_step_count=40,
            deadline=None,
            derandomize="PRESENCE_EXAMPLES" not in os.environ,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
