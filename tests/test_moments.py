"""To the millisecond: where a time ends, it ends for every script at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from presence import HeartbeatStatus
from presence.results import to_time

if TYPE_CHECKING:
    from collections.abc import Callable

    import redis

    from presence import ConnectionInfo, Operation
    from presence.sync import ConnectionManager
    from tests.conftest import Keys, ManagerFactory


class Moment:
    """The moment of the server's clock at which operations run."""

    def __init__(self, client: redis.Redis, now_ms: int) -> None:
        self._client = client
        self.time = to_time(now_ms)
        self._clock = f"{{'{now_ms // 1000}', '{now_ms % 1000 * 1000:06}'}}"

    def __call__(self, operation: Operation[Any]) -> Any:
        source = operation.script.source.replace("redis.call('TIME')", self._clock)
        assert source != operation.script.source
        return operation.parse(self._client.eval(source, len(operation.keys), *operation.keys, *operation.arguments))


ACTS: dict[str, tuple[Callable[[ConnectionManager], Operation[Any]], Callable[[Any], bool]]] = {
    "heartbeat": (lambda manager: manager.operations.update_heartbeat("sid"), bool),
    "heartbeats": (
        lambda manager: manager.operations.heartbeat_batch(["sid"]),
        lambda statuses: statuses == [HeartbeatStatus.SEEN],
    ),
    "join": (lambda manager: manager.operations.join_game("sid", "another"), bool),
    "register again": (
        lambda manager: manager.operations.register_connection("sid", "user"),
        lambda registration: registration.replaced is None,
    ),
    "cleanup": (lambda manager: manager.operations.cleanup_batch(), lambda batch: not batch.removed),
}
"""What finds a connection that is live, and how its answer tells."""


@pytest.mark.parametrize("late_ms", [0, 1])
class TestTheVeryMillisecond:
    """Every script draws the line at the same millisecond: over is what ended before it."""

    @pytest.fixture
    def expiring(
        self, make_manager: ManagerFactory, client: redis.Redis, namespace: str, late_ms: int
    ) -> tuple[ConnectionManager, Moment]:
        manager = make_manager(conn_ttl_seconds=60, heartbeat_seconds=20)
        manager.register_connection("sid", "user")
        manager.join_game("sid", "game")
        last_seen = client.zscore(f"{{{namespace}}}:last_seen", "sid")
        assert last_seen is not None
        return manager, Moment(client, int(last_seen) + 60_000 + late_ms)

    @pytest.mark.parametrize("others", [0, 50])
    def test_in_which_a_connection_expires_for_the_reads(
        self,
        expiring: tuple[ConnectionManager, Moment],
        client: redis.Redis,
        namespace: str,
        others: int,
        late_ms: int,
    ) -> None:
        (manager, at), operations = expiring, expiring[0].operations
        for number in range(others):
            manager.register_connection(f"sid-{number}", f"user-{number}")
            manager.join_game(f"sid-{number}", "game")
            client.zincrby(f"{{{namespace}}}:last_seen", 1000, f"sid-{number}")
        live = not late_ms

        assert bool(at(operations.get_connection("sid"))) is live
        assert bool(at(operations.get_user_connection("user"))) is live
        assert at(operations.is_user_online("user")) is live
        assert at(operations.get_connection_count()) == others + live
        assert at(operations.get_game_connection_count("game")) == others + live
        assert len(at(operations.get_game_connections("game"))) == others + live

    @pytest.mark.parametrize("metadata", [b"", b"a record of another form"])
    def test_is_what_every_read_observed(
        self,
        expiring: tuple[ConnectionManager, Moment],
        client: redis.Redis,
        namespace: str,
        metadata: bytes,
        late_ms: int,
    ) -> None:
        """The server's, and no client's, which is a minute behind here: a connection is stale by that."""
        (manager, at), operations = expiring, expiring[0].operations
        manager.register_connection("other", "other user", metadata=metadata)
        manager.join_game("other", "game")
        client.zincrby(f"{{{namespace}}}:last_seen", 1000, "other")
        reads = {
            "connection": [at(operations.get_connection("other"))],
            "user": [at(operations.get_user_connection("other user"))],
            "all of a user": at(operations.get_all_user_connections("other user")),
            "game": at(operations.get_game_connections("game")),
            "snapshot": at(operations.get_game_snapshot("game")).connections,
            "users": at(operations.users_connections_batch(["other user"])),
            "games": at(operations.games_connections_batch(["game"]))[0],
        }
        of_game = ["other"] if late_ms else ["sid", "other"]
        sids = {name: [one.sid for one in found] for name, found in reads.items()}
        assert sids == {name: of_game if name in ("game", "snapshot", "games") else ["other"] for name in reads}
        assert {one.observed_at for found in reads.values() for one in found} == {at.time}

    @pytest.mark.parametrize("act", ACTS)
    def test_in_which_a_connection_expires_for_what_acts_on_it(
        self, expiring: tuple[ConnectionManager, Moment], act: str, late_ms: int
    ) -> None:
        manager, at = expiring
        operation, finds_it = ACTS[act]
        assert finds_it(at(operation(manager))) is not bool(late_ms)

    def test_in_which_a_grace_ends(self, manager: ConnectionManager, client: redis.Redis, late_ms: int) -> None:
        operations = manager.operations
        manager.register_connection("sid", "user")
        manager.join_game("sid", "game")
        detached = manager.unregister_connection("sid", grace_seconds=30)
        assert detached is not None
        assert detached.detached_until is not None
        at, is_over = Moment(client, round(detached.detached_until.timestamp() * 1000) + late_ms), bool(late_ms)

        assert bool(at(operations.get_connection("sid"))) is not is_over
        assert bool(at(operations.get_game_connections("game"))) is not is_over
        status = HeartbeatStatus.EXPIRED if is_over else HeartbeatStatus.DETACHED
        assert at(operations.heartbeat_batch(["sid"])) == [status]
        assert len(at(operations.cleanup_batch()).removed) == is_over
        assert at(operations.register_connection("new", "user")).resumed is not is_over

    @pytest.mark.parametrize("grace_seconds", [None, 30])
    def test_in_which_a_seat_is_free(
        self,
        make_manager: ManagerFactory,
        client: redis.Redis,
        namespace: str,
        grace_seconds: float | None,
        late_ms: int,
    ) -> None:
        manager = make_manager(conn_ttl_seconds=60, heartbeat_seconds=20)
        manager.register_connection("sid", "user")
        manager.join_game("sid", "game")
        ends = manager.unregister_connection("sid", grace_seconds=grace_seconds) if grace_seconds else None
        score = client.zscore(f"{{{namespace}}}:last_seen", "sid")
        assert score is not None
        manager.register_connection("new", "another")
        client.zincrby(f"{{{namespace}}}:last_seen", 1000, "new")
        at = Moment(client, (-int(score) if ends else int(score) + 60_000) + late_ms)

        assert bool(at(manager.operations.join_game("new", "game", capacity=1))) is bool(late_ms)

    def test_in_which_an_alive_one_refuses_nobody_any_more(
        self, make_manager: ManagerFactory, client: redis.Redis, late_ms: int
    ) -> None:
        manager = make_manager(displacement="reject_while_alive")
        alive: ConnectionInfo = manager.register_connection("alive", "user").connection
        at = Moment(client, round(alive.last_seen.timestamp() * 1000) + 90_000 + late_ms)

        assert at(manager.operations.register_connection("new", "user")).refused is not bool(late_ms)

    def test_in_which_a_server_is_dead(
        self, make_manager: ManagerFactory, client: redis.Redis, namespace: str, keys: Keys, late_ms: int
    ) -> None:
        make_manager(server_id="server").register_connection("sid", "user")
        (seen_ms,) = keys().known_servers.values()
        client.zadd(f"{{{namespace}}}:last_seen", {"sid": seen_ms + 1000}, xx=True)

        batch = Moment(client, seen_ms + 90_000 + late_ms)(make_manager().operations.cleanup_batch())

        assert len(batch.removed) == late_ms

    def test_in_which_a_connection_of_a_dead_server_has_expired(
        self, make_manager: ManagerFactory, client: redis.Redis, namespace: str, late_ms: int
    ) -> None:
        """Until then its seat is kept; whoever has expired leaves none."""
        manager = make_manager(conn_ttl_seconds=60, heartbeat_seconds=20, server_id="server")
        manager.register_connection("sid", "user")
        last_seen = client.zscore(f"{{{namespace}}}:last_seen", "sid")
        assert last_seen is not None
        operations = manager.operations

        batch = Moment(client, int(last_seen) + 60_000 + late_ms)(
            operations.cleanup_server_batch("server", grace_seconds=30)
        )

        assert [len(batch.removed), len(batch.detached)] == [late_ms, not late_ms]

    def test_in_which_a_server_that_is_cleaned_up_by_its_id_is_dead(
        self, make_manager: ManagerFactory, client: redis.Redis, keys: Keys, late_ms: int
    ) -> None:
        """A live one stays known; a dead one that has nobody left is forgotten."""
        manager = make_manager(server_id="server")
        manager.register_connection("sid", "user")
        (seen_ms,) = keys().known_servers.values()

        batch = Moment(client, seen_ms + 90_000 + late_ms)(manager.operations.cleanup_server_batch("server"))

        assert len(batch.removed) == 1
        assert len(keys().known_servers) == (not late_ms)

    def test_in_which_a_server_has_missed_half_of_its_heartbeats(
        self, make_manager: ManagerFactory, client: redis.Redis, namespace: str, keys: Keys, late_ms: int
    ) -> None:
        make_manager(server_id="server").register_connection("sid", "user")
        (seen_ms,) = keys().known_servers.values()
        client.zadd(f"{{{namespace}}}:last_seen", {"sid": seen_ms - 60_000}, xx=True)
        operations = make_manager(server_grace_seconds=30).operations

        batch = Moment(client, seen_ms + 45_000 + late_ms)(operations.cleanup_batch())

        assert [len(batch.removed), len(batch.detached)] == [not late_ms, late_ms]

    def test_in_which_a_cleanup_is_late(self, manager: ConnectionManager, client: redis.Redis, late_ms: int) -> None:
        connection = manager.register_connection("sid", "user").connection
        not_after_ms = round(connection.last_seen.timestamp() * 1000) + 100_000

        batch = Moment(client, not_after_ms + late_ms)(manager.operations.cleanup_batch(not_after_ms=not_after_ms))

        assert [len(batch.removed), batch.is_late] == [not late_ms, bool(late_ms)]
