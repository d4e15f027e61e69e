"""Random sequences of operations, with time moving: every answer and every key equals those of a plain model."""

from __future__ import annotations

import asyncio
import os
import uuid
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import redis
from hypothesis import HealthCheck, seed, settings
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
from tests.follower import Follower
from tests.invariants import read_keyspace, violations
from tests.model import Model, ModelCleanup, ModelConnection

if TYPE_CHECKING:
    from presence import ConnectionInfo

# Few names, so that sequences meet: the same user on two sids, the same sid for two users.
NAMES = ["sid-1", "sid-2", "sid-3", "a longer sid", "ß"]
SIDS = st.sampled_from(NAMES)
TARGETS = st.integers(0, 59)
"""Whom an operation is about, see ``target``."""
USERS = st.sampled_from(["user-1", "user-2", "user-3"])
GAMES = st.sampled_from(["game-1", "game-2"])
# Time moves in steps of ten seconds and every limit lies at five, so the few real seconds of a run cannot matter.
STEPS = st.sampled_from([10, 30, 70, 100, 250, 310])
METADATA = st.sampled_from([b"", b"1:2 3", b"\x00\xff"])
SERVER_IDS = st.sampled_from(["server-1", "server-2"])
GRACES = st.sampled_from([5, 45, 105, 255])
CAPACITIES = st.sampled_from([1, 2, None])
THRESHOLDS = st.sampled_from([5, 45, 95, 1005])
CONN_TTL_SECONDS = 305
HEARTBEAT_SECONDS = 95 / 3


def without_last_seen(connection: ConnectionInfo) -> ConnectionInfo:
    """Make it what it was before its heartbeats, of which no event tells."""
    return replace(connection, last_seen=connection.connected_at)


class Sequences(RuleBasedStateMachine):
    """Every operation through an asyncio and a blocking manager of no game server and of two, at random."""

    url: str
    connections_per_user = 1
    displacement = "newest_wins"
    server_grace_seconds = 0

    def __init__(self) -> None:
        super().__init__()
        self.namespace = f"stateful-{uuid.uuid4()}"
        self.stack = ExitStack()
        options: dict[str, Any] = {
            "namespace": self.namespace,
            "conn_ttl_seconds": CONN_TTL_SECONDS,
            "heartbeat_seconds": HEARTBEAT_SECONDS,
            "connections_per_user": self.connections_per_user,
            "displacement": self.displacement,
            "server_grace_seconds": self.server_grace_seconds,
            "events": "stream",
        }
        self.options = options
        self.client = self.stack.enter_context(redis.Redis.from_url(self.url))
        self.runner = self.stack.enter_context(asyncio.Runner())
        self.managers: list[Any] = [self.new_manager(None, is_blocking=is_blocking) for is_blocking in (False, True)]
        self.servers: dict[str, Any] = {
            "server-1": self.new_manager("server-1", is_blocking=False),
            "server-2": self.new_manager("server-2", is_blocking=True),
        }
        self.replaced: dict[str, Any] = {}
        self.model = Model(
            CONN_TTL_SECONDS * 1000,
            95_000,
            self.connections_per_user,
            displacement=self.displacement,
        )
        self.events = self.stack.enter_context(self.managers[1].subscribe())
        self.follower = Follower(without_last_seen)
        self.calls = 0

    def new_manager(self, server_id: str | None, *, is_blocking: bool) -> Any:
        options = self.options | {"server_id": server_id}
        if is_blocking:
            return self.stack.enter_context(presence.sync.ConnectionManager.from_url(self.url, **options))
        awaited = Awaited(presence.ConnectionManager.from_url(self.url, **options), self.runner)
        self.stack.callback(awaited.close)
        return awaited

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
            server_id=connection.server.partition(":")[2] if connection.server else None,
            metadata=connection.metadata,
        )

    def target(self, number: int) -> str:
        """Choose a sid for an operation: mostly one that is stored, be it live, detached or expired."""
        stored = self.model.registered
        return stored[number % len(stored)] if stored and number % 5 else NAMES[number % len(NAMES)]

    def written_at(self, sid: str, before: int) -> int:
        """Read when the server wrote a connection's last_seen: the one thing that the model cannot know itself."""
        written: Any = self.client.zscore(f"{{{self.namespace}}}:last_seen", sid)
        assert before <= int(written) <= self.now()
        return int(written)

    @initialize(seated=st.integers(0, 3))
    def start(self, seated: int) -> None:
        """Begin with a connection for each user, some of them in a game: most of what matters needs some."""
        assert self.manager.get_connection_count() == 0
        for number, (sid, user_id) in enumerate(zip(NAMES, ("user-1", "user-2", "user-3"), strict=False)):
            self.register_through(self.manager, None, sid, user_id, b"")
            if number < seated:
                self.put_in_game(sid, "game-1", None)

    @rule(sid=SIDS, user_id=USERS, metadata=METADATA)
    def register(self, sid: str, user_id: str, metadata: bytes) -> None:
        self.register_through(self.manager, None, sid, user_id, metadata)

    @rule(sid=SIDS, user_id=USERS, metadata=METADATA, server_id=SERVER_IDS)
    def register_on_a_server(self, sid: str, user_id: str, metadata: bytes, server_id: str) -> None:
        manager = self.servers[server_id]
        if manager.operations.boot_epoch is None:
            self.start_server(manager)
        self.register_through(manager, self.start_of(manager), sid, user_id, metadata)

    @precondition(lambda self: self.replaced)
    @rule(sid=SIDS, user_id=USERS, server_id=SERVER_IDS)
    def register_on_a_server_that_was_replaced(self, sid: str, user_id: str, server_id: str) -> None:
        manager = self.replaced.get(server_id)
        if manager:
            self.register_through(manager, self.start_of(manager), sid, user_id, b"")

    def register_through(self, manager: Any, server: str | None, sid: str, user_id: str, metadata: bytes) -> None:
        before = self.now()
        registration = manager.register_connection(sid, user_id, metadata=metadata)
        if registration.refused:
            refused = self.model.register(sid, user_id, before, 0)
            assert refused.refused
            self.same(registration.connection, refused.connection)
            return
        # The epoch is the one thing besides the time that the model cannot know: it must be the largest.
        epoch = registration.connection.epoch
        assert epoch > max((connection.epoch for connection in self.model.connections.values()), default=0)
        now = self.written_at(sid, before)
        expected = self.model.register(sid, user_id, now, epoch, server=server, metadata=metadata)
        assert not expected.refused
        self.same(registration.connection, expected.connection)
        assert registration.displaced == tuple(map(self.typed, expected.displaced))
        self.same(registration.replaced, expected.replaced)
        self.same(registration.resumed_from, expected.resumed_from)
        assert registration.resumed is (expected.resumed_from is not None)
        assert registration

    @staticmethod
    def start_of(manager: Any) -> str:
        return f"{manager.operations.boot_epoch}:{manager.operations.server_id}"

    def start_server(self, manager: Any) -> None:
        epochs = [int(server.partition(":")[0]) for server in self.model.servers]
        epoch = manager.start_server()
        assert epoch > max(epochs + [connection.epoch for connection in self.model.connections.values()], default=0)
        server = self.start_of(manager)
        self.model.start_server(server, self.beaten_at(server))

    def beaten_at(self, server: str) -> int:
        """Read when the server wrote a game server's heartbeat; the model cannot know it itself."""
        return read_keyspace(self.client, self.namespace).known_servers[server]

    @rule(server_id=SERVER_IDS)
    def restart(self, server_id: str) -> None:
        before = self.servers[server_id]
        manager = self.new_manager(server_id, is_blocking=isinstance(before, Awaited))
        if before.operations.boot_epoch is not None:
            self.replaced[server_id] = before
        self.servers[server_id] = manager
        self.start_server(manager)

    @rule(server_id=SERVER_IDS)
    def beat_for_a_server(self, server_id: str) -> None:
        manager = self.servers[server_id]
        if manager.operations.boot_epoch is None:
            self.start_server(manager)
        server = self.start_of(manager)
        assert manager.update_server_heartbeat()
        assert self.model.beat(server, self.beaten_at(server))

    @precondition(lambda self: self.replaced)
    @rule(server_id=SERVER_IDS)
    def beat_for_a_server_that_was_replaced(self, server_id: str) -> None:
        manager = self.replaced.get(server_id)
        if manager:
            server = self.start_of(manager)
            is_known = manager.update_server_heartbeat()
            # Once cleanup has taken its successor as well, nothing tells that there was one.
            assert is_known is self.model.beat(server, self.beaten_at(server) if is_known else self.now())

    @rule(number=TARGETS, metadata=METADATA)
    def update_metadata(self, number: int, metadata: bytes) -> None:
        sid = self.target(number)
        assert self.manager.update_metadata(sid, metadata) is self.model.update_metadata(sid, metadata, self.now())

    @rule()
    def beat_in_bulk(self) -> None:
        before = self.now()
        live = {sid: bool(self.model.live(sid, before)) for sid in ("ß", "sid-1", "sid-2", "unknown")}
        statuses = self.manager.update_heartbeats(live)
        assert {sid: bool(status) for sid, status in statuses.items()} == live
        for sid, is_live in live.items():
            if is_live:
                self.model.heartbeat(sid, self.written_at(sid, before))

    @rule(
        server_id=SERVER_IDS,
        grace_seconds=st.sampled_from([None, 0, 45]),
        by=st.sampled_from(["another", "itself", "the one that was replaced"]),
    )
    def clean_up_a_server(self, server_id: str, grace_seconds: int | None, by: str) -> None:
        own = self.servers if by == "itself" else self.replaced if by == "the one that was replaced" else {}
        manager = own.get(server_id, self.manager)
        result = manager.cleanup_server(server_id, grace_seconds=grace_seconds)
        grace = self.server_grace_seconds if grace_seconds is None else grace_seconds
        newest_start = manager.operations.boot_epoch
        self.same_cleanup(result, self.model.clean_up_server(server_id, self.now(), grace * 1000, newest_start))

    def same_cleanup(self, result: presence.CleanupResult, expected: ModelCleanup) -> None:
        for detached in result.detached:
            # When a grace ends depends on the server's time, which the model cannot know.
            assert detached.detached_until is not None
            until = round(detached.detached_until.timestamp() * 1000)
            guessed = self.model.connections[detached.sid]
            assert guessed.detached_until is not None
            assert 0 <= guessed.detached_until - until < 5_000
            self.model.connections[detached.sid] = replace(guessed, detached_until=until)
        assert len(result.removed) == len(expected.removed)
        assert set(result.removed) == set(map(self.typed, expected.removed))
        assert len(result.detached) == len(expected.detached)
        assert set(result.detached) == {
            self.typed(self.model.connections[detached.sid]) for detached in expected.detached
        }

    @rule(number=TARGETS)
    def unregister(self, number: int) -> None:
        sid = self.target(number)
        self.same(self.manager.unregister_connection(sid), self.model.unregister(sid, self.now()))

    @rule(number=TARGETS, grace_seconds=GRACES)
    def detach(self, number: int, grace_seconds: int) -> None:
        sid = self.target(number)
        before = self.now()
        detached = self.manager.unregister_connection(sid, grace_seconds=grace_seconds)
        score = self.client.zscore(f"{{{self.namespace}}}:last_seen", sid)
        if self.model.live(sid, before):
            assert score is not None
            assert before <= -int(score) - grace_seconds * 1000 <= self.now()
        self.same(detached, self.model.detach(sid, before, -int(score or 0)))

    @rule(number=TARGETS, game_id=GAMES, capacity=CAPACITIES)
    def join(self, number: int, game_id: str, capacity: int | None) -> None:
        self.put_in_game(self.target(number), game_id, capacity)

    def put_in_game(self, sid: str, game_id: str, capacity: int | None) -> None:
        joined, left_game_id, is_full = self.model.join(sid, game_id, self.now(), capacity)
        result = self.manager.join_game(sid, game_id, capacity=capacity)
        assert result == presence.JoinResult(joined, left_game_id, is_full)

    @rule(number=TARGETS, other=SIDS)
    def act_for_another_registration(self, number: int, other: str) -> None:
        sid = self.target(number)
        mine, another = self.model.live(sid, self.now()), self.model.connections.get(other)
        epoch = another.epoch if another and sid != other else 1
        if mine:
            assert not self.manager.update_heartbeat(sid, epoch=epoch)
            assert not self.manager.join_game(sid, "game-1", epoch=epoch)
            assert self.manager.leave_game(sid, epoch=epoch) is None
            assert self.manager.unregister_connection(sid, epoch=epoch) is None

    @rule(number=TARGETS)
    def leave(self, number: int) -> None:
        sid = self.target(number)
        assert self.manager.leave_game(sid) == self.model.leave(sid, self.now())

    @rule(number=TARGETS)
    def heartbeat(self, number: int) -> None:
        sid = self.target(number)
        before = self.now()
        is_known = self.manager.update_heartbeat(sid)
        assert is_known == (self.model.live(sid, before) is not None)
        if is_known:
            self.model.heartbeat(sid, self.written_at(sid, before))

    @rule(threshold_seconds=THRESHOLDS)
    def cleanup(self, threshold_seconds: int) -> None:
        result = self.manager.cleanup_stale_connections(threshold_seconds)
        now = self.now()
        expected = self.model.clean_up(threshold_seconds * 1000, now, self.server_grace_seconds * 1000)
        self.same_cleanup(result, expected)
        # The stale ones come first, longest silent first; then those past their grace, then those of dead servers.
        oldest_kept = now - min(threshold_seconds, CONN_TTL_SECONDS) * 1000
        stale = [gone for gone in expected.removed if not gone.detached_until and gone.last_seen < oldest_kept]
        stale.sort(key=lambda gone: (gone.last_seen, gone.sid))
        assert list(result.removed[: len(stale)]) == list(map(self.typed, stale))

    @rule()
    def cleanup_by_default_threshold(self) -> None:
        result = self.manager.cleanup_stale_connections()
        self.same_cleanup(result, self.model.clean_up(95_000, self.now(), self.server_grace_seconds * 1000))

    # Without a precondition that asks the model: on a machine that stalls, whether a connection has expired by now may
    # differ when hypothesis tries the same steps again, and it takes that for a strategy that is flaky.
    @rule(seconds=STEPS)
    def let_time_pass(self, seconds: int) -> None:
        let_time_pass(self.client, self.namespace, seconds)
        self.model.age(seconds * 1000)
        self.follower.age(seconds)

    @invariant()
    def every_read_answers_as_the_model_does(self) -> None:
        now = self.now()
        manager, model = self.manager, self.model
        for sid in (*NAMES, "unknown"):
            self.same(manager.get_connection(sid), model.known(sid, now))
        for number in range(1, 4):
            user_id = f"user-{number}"
            self.same(manager.get_user_connection(user_id), model.user_connection(user_id, now))
            listed = [self.typed(one) for one in model.of_user(user_id) if model.holds(one, now)]
            assert manager.get_all_user_connections(user_id) == listed
            assert manager.is_user_online(user_id) == model.is_online(user_id, now)
        for game_id in ("game-1", "game-2"):
            assert manager.get_game_connections(game_id) == list(map(self.typed, model.game(game_id, now)))
            assert manager.get_game_user_sids(game_id) == model.user_sids(game_id, now)
            assert manager.get_opponent_sid(game_id, "user-1") == model.opponent(game_id, "user-1", now)
            assert manager.get_game_connection_count(game_id) == model.game_count(game_id, now)
        assert manager.get_connection_count() == model.count(now)
        users, games = ["user-3", "user-1", "user-2", "unknown"], ["game-2", "unknown", "game-1"]
        assert manager.are_users_online(users) == {user: model.is_online(user, now) for user in users}
        active = {user: model.user_connection(user, now) for user in users}
        assert manager.get_users_connections(users) == {user: one and self.typed(one) for user, one in active.items()}
        members = {game: list(map(self.typed, model.game(game, now))) for game in games}
        assert manager.get_games_connections(games) == members

    @invariant()
    def every_key_holds_what_the_model_holds_and_outlives_it(self) -> None:
        now = self.now()
        keyspace = read_keyspace(self.client, self.namespace)
        assert violations(keyspace, self.connections_per_user) == []
        connections = self.model.connections
        assert {
            sid: {name: record[name] for name in ("user_id", "game_id", "server", "metadata")}
            for sid, record in keyspace.records.items()
        } == {
            sid: {
                "user_id": connection.user_id,
                "game_id": connection.game_id or "",
                "server": connection.server or "",
                "metadata": connection.metadata.decode("latin-1"),
            }
            for sid, connection in connections.items()
        }
        users = {connection.user_id for connection in connections.values()}
        assert keyspace.users == {user: [own.sid for own in self.model.of_user(user)] for user in users}
        games = {connection.game_id for connection in connections.values() if connection.game_id}
        assert {game: set(members) for game, members in keyspace.games.items()} == {
            game: {sid for sid, connection in connections.items() if connection.game_id == game} for game in games
        }
        of_servers = [connection for connection in connections.values() if connection.server]
        assert keyspace.servers == {
            server: {one.sid for one in of_servers if one.server == server}
            for server in {one.server for one in of_servers}
        }
        assert keyspace.known_servers == self.model.servers
        assert keyspace.last_seen == {
            sid: -connection.detached_until if connection.detached_until else connection.last_seen
            for sid, connection in connections.items()
        }
        prefix = f"{{{self.namespace}}}:"
        for sid, connection in connections.items():
            remaining = (connection.detached_until or connection.last_seen + self.model.conn_ttl_ms) - now
            keys = [f"conn:{sid}", f"user_conns:{connection.user_id}", "last_seen"]
            if connection.game_id:
                keys.append(f"game_conns:{connection.game_id}")
            if connection.server:
                keys.append(f"server_conns:{connection.server}")
            for key in keys:
                assert keyspace.ttls_ms[prefix + key] >= remaining

    @invariant()
    def who_follows_the_events_knows_all_but_the_heartbeats(self) -> None:
        end = self.manager.get_game_snapshot("game-1").position
        while self.events.position != end:
            self.follower.follow(next(self.events))
        assert self.follower.misfits == []
        connections = self.model.connections
        assert self.follower.parts == {sid: without_last_seen(self.typed(one)) for sid, one in connections.items()}
        assert self.follower.online == {one.user_id for one in connections.values() if not one.detached_until}


class SequencesWithTwoConnectionsPerUser(Sequences):
    """The same where a user may have two, and the seats of a dead server's connections are kept."""

    connections_per_user = 2
    server_grace_seconds = 105


class SequencesThatRejectWhileAlive(Sequences):
    """The same where the connections that are alive win."""

    displacement = "reject_while_alive"
    server_grace_seconds = 45


class SequencesThatResume(Sequences):
    """The same where the newest takes over the seat of the one that it displaces."""

    displacement = "newest_resumes"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "machine",
    [Sequences, SequencesWithTwoConnectionsPerUser, SequencesThatRejectWhileAlive, SequencesThatResume],
)
def test_any_sequence_answers_and_stores_what_the_model_does(machine: type[Sequences], server_url: str) -> None:
    class OnThisServer(machine):  # type: ignore[misc, valid-type]
        url = server_url

    if "PRESENCE_EXAMPLES" not in os.environ:
        # The same sequences in every run, and others for each machine.
        seed(machine.__name__)(OnThisServer)
    run_state_machine_as_test(  # type: ignore[no-untyped-call, unused-ignore]
        OnThisServer,
        settings=settings(
            max_examples=int(os.environ.get("PRESENCE_EXAMPLES", "24")),
            stateful_step_count=40,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
