"""Metadata: what the application keeps with a connection comes back byte for byte, and ends with it."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import presence.sync
from presence.arguments import MAX_METADATA_BYTES
from tests.invariants import read_keyspace, violations

if TYPE_CHECKING:
    from collections.abc import Callable

    import redis

    from presence.sync import ConnectionManager
    from tests.conftest import Keys, ManagerFactory

VALUES: dict[str, str | bytes] = {
    "text": "text",
    "unicode": "Zoë 🎲",
    "bytes": b"\xff\x00\xfe not UTF-8",
    "NUL": b"\x00",
    "digits": b"12:34",
    "like a record": b"3:abc1700000000000000:1:2:3:4 user",
    "spaces and newlines": b"  \n\r\n \t",
    "the longest": b"x" * MAX_METADATA_BYTES,
    "the longest, of a byte that is no text": b"\xff" * MAX_METADATA_BYTES,
}
every_value = pytest.mark.parametrize("value", VALUES.values(), ids=list(VALUES))


def as_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


@every_value
class TestEveryRead:
    """It is in every connection that an answer holds."""

    def test_of_a_connection_that_is_there(self, manager: ConnectionManager, value: str | bytes) -> None:
        registered = manager.register_connection("sid", "user", metadata=value).connection
        manager.join_game("sid", "game")
        found = [
            registered,
            manager.get_connection("sid"),
            manager.get_user_connection("user"),
            manager.get_users_connections(["user"])["user"],
            *manager.get_game_connections("game"),
            *manager.get_games_connections(["game"])["game"],
            *manager.get_game_snapshot("game").connections,
        ]
        assert [connection and connection.metadata for connection in found] == [as_bytes(value)] * 7

    def test_of_one_that_ends(
        self, make_manager: ManagerFactory, wait: Callable[[float], None], value: str | bytes
    ) -> None:
        manager = make_manager(server_id="server")

        def register(sid: str = "sid", user: str = "user", **options: Any) -> Any:
            return manager.register_connection(sid, user, **options)

        register(metadata=value)
        ended = [*register("newer", metadata=value).displaced]
        ended += [register("newer", "other user", metadata=value).replaced]
        ended += [manager.unregister_connection("newer")]
        register(metadata=value)
        ended += [manager.unregister_connection("sid", grace_seconds=30)]
        ended += [register("resumed").resumed_from]
        wait(91)
        manager.update_server_heartbeat()
        ended += manager.cleanup_stale_connections().removed
        register(metadata=value)
        ended += manager.cleanup_server("server", grace_seconds=30).detached
        ended += manager.cleanup_stale_connections().removed
        wait(31)
        ended += manager.cleanup_stale_connections().removed
        assert [connection.metadata for connection in ended] == [as_bytes(value)] * 8

    def test_after_an_update(self, manager: ConnectionManager, keys: Keys, value: str | bytes) -> None:
        before = manager.register_connection("sid", "user", metadata="before").connection
        manager.join_game("sid", "game")
        assert manager.update_metadata("sid", value)
        after = manager.get_connection("sid")
        assert after is not None
        assert (after.metadata, after.epoch, after.connected_at, after.user_id, after.game_id) == (
            as_bytes(value),
            before.epoch,
            before.connected_at,
            "user",
            "game",
        )
        assert manager.get_game_connections("game") == [after]
        assert all(ttl > 3_600_000 for ttl in keys().ttls_ms.values())
        assert manager.update_metadata("sid", "")
        assert manager.get_game_connections("game") == [manager.get_connection("sid")]
        assert [connection.metadata for connection in manager.get_game_connections("game")] == [b""]


def test_an_update_leaves_no_key_without_ttl_where_the_game_was_evicted(
    manager: ConnectionManager, client: redis.Redis, namespace: str, keys: Keys
) -> None:
    manager.register_connection("sid", "user")
    manager.join_game("sid", "game")
    client.delete(f"{{{namespace}}}:game_conns:game")
    assert manager.update_metadata("sid", "metadata")
    assert keys().games.keys() == {"game"}
    assert min(keys().ttls_ms.values()) > 0


class TestBadValues:
    """They are refused before anything is sent, by a manager that has no server to send it to."""

    BAD: tuple[tuple[Any, type[Exception], str], ...] = (
        (b"x" * (MAX_METADATA_BYTES + 1), ValueError, "metadata must be at most 4096 bytes long, not 4097"),
        ("é" * (MAX_METADATA_BYTES // 2) + "x", ValueError, "metadata must be at most 4096 bytes long, not 4097"),
        ("\ud800", ValueError, "metadata must not contain lone surrogates"),
        (1, TypeError, "metadata must be bytes or a str, not int"),
        ({"a": 1}, TypeError, "metadata must be bytes or a str, not dict"),
        (bytearray(b"x"), TypeError, "metadata must be bytes or a str, not bytearray"),
    )

    @pytest.mark.parametrize(("value", "error", "message"), BAD)
    @pytest.mark.parametrize("method", ["register_connection", "update_metadata"])
    def test_it_is_refused(
        self, make_manager: ManagerFactory, method: str, value: Any, error: type[Exception], message: str
    ) -> None:
        manager = make_manager("redis://127.0.0.1:1/0")
        ids = ("sid", "user") if method == "register_connection" else ("sid",)
        with pytest.raises(error, match=message):
            getattr(manager, method)(*ids, metadata=value)

    def test_an_update_to_nothing_says_so(self, make_manager: ManagerFactory) -> None:
        nothing: Any = None
        with pytest.raises(TypeError, match="metadata must be bytes or a str, not NoneType"):
            make_manager("redis://127.0.0.1:1/0").update_metadata("sid", nothing)

    def test_bad_ids_and_epochs_are_refused(self, make_manager: ManagerFactory) -> None:
        manager = make_manager("redis://127.0.0.1:1/0")
        with pytest.raises(ValueError, match="sid must not be empty"):
            manager.update_metadata("", "value")
        with pytest.raises(ValueError, match="epoch must be 0 or more"):
            manager.update_metadata("sid", "value", epoch=-1)


class TestItStays:
    """A connection that is refreshed or resumed keeps it, unless it is given another."""

    @pytest.mark.parametrize(("given", "kept"), [(None, b"first"), ("", b"first"), (b"", b"first"), ("2nd", b"2nd")])
    @pytest.mark.parametrize("way", ["again", "resumed", "resumed with the same sid"])
    def test_through_a_register(
        self, manager: ConnectionManager, way: str, given: str | bytes | None, kept: bytes
    ) -> None:
        manager.register_connection("sid", "user", metadata="first")
        if way != "again":
            manager.unregister_connection("sid", grace_seconds=30)
        sid = "new" if way == "resumed" else "sid"
        registration = manager.register_connection(sid, "user", metadata=given)
        assert registration.connection.metadata == kept
        assert manager.get_connection(sid) == registration.connection

    def test_but_not_in_another_connection(self, manager: ConnectionManager, wait: Callable[[float], None]) -> None:
        manager.register_connection("sid", "user", metadata="first")
        assert manager.register_connection("new", "user").connection.metadata == b""
        manager.update_metadata("new", "second")
        assert manager.register_connection("new", "another user").connection.metadata == b""
        manager.update_metadata("new", "third")
        wait(3601)
        assert manager.register_connection("new", "another user").connection.metadata == b""

    def test_through_heartbeats_joins_and_leaves(
        self, manager: ConnectionManager, wait: Callable[[float], None]
    ) -> None:
        manager.register_connection("sid", "user", metadata="kept")
        for number in range(4):
            wait(1000)
            assert manager.update_heartbeat("sid")
            manager.join_game("sid", f"game-{number}")
        manager.leave_game("sid")
        connection = manager.get_connection("sid")
        assert connection is not None
        assert connection.metadata == b"kept"


class TestALateUpdate:
    """On what is not a live connection of that epoch it changes nothing, and answers False."""

    @pytest.mark.parametrize("state", ["unknown", "displaced", "detached", "expired", "of an older epoch"])
    def test_it_changes_nothing(
        self, manager: ConnectionManager, wait: Callable[[float], None], keys: Keys, state: str
    ) -> None:
        epoch = None
        if state != "unknown":
            epoch = manager.register_connection("sid", "user", metadata="before").connection.epoch
            manager.join_game("sid", "game")
        match state:
            case "displaced":
                manager.register_connection("newer", "user", metadata="newer")
            case "detached":
                manager.unregister_connection("sid", grace_seconds=30)
            case "expired":
                wait(3601)
            case "of an older epoch":
                manager.register_connection("sid", "user")
        before = keys()

        assert not manager.update_metadata("sid", "late", epoch=epoch if state == "of an older epoch" else None)

        after = keys()
        assert (after.records, after.users, after.games) == (before.records, before.users, before.games)
        assert after.last_seen == before.last_seen

    def test_that_of_the_current_epoch_acts(self, manager: ConnectionManager) -> None:
        manager.register_connection("sid", "user")
        epoch = manager.register_connection("sid", "user").connection.epoch
        assert manager.update_metadata("sid", "value", epoch=epoch)
        connection = manager.get_connection("sid")
        assert connection is not None
        assert connection.metadata == b"value"

    def test_sent_again_it_answers_the_same_and_does_not_undo_the_next_one(self, manager: ConnectionManager) -> None:
        manager.register_connection("sid", "user")
        operation = manager.operations.update_metadata("sid", "first")
        assert manager.pipeline([operation]) == [True]
        assert manager.update_metadata("sid", "second")
        assert manager.pipeline([operation, operation]) == [True, True]
        connection = manager.get_connection("sid")
        assert connection is not None
        assert connection.metadata == b"second"
        manager.unregister_connection("sid")
        assert manager.pipeline([operation]) == [True]
        assert manager.get_connection("sid") is None


# Texts of the characters with which records are written come up often.
IDS = st.one_of(
    st.text("0123456789: ", min_size=1, max_size=12), st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
)
METADATA = st.one_of(st.text("0123456789: ").map(str.encode), st.binary(max_size=60))


@settings(max_examples=150, database=None, suppress_health_check=list(HealthCheck))
@given(user_id=IDS, game_id=IDS, server_id=IDS, metadata=METADATA)
@example(user_id="1", game_id="2", server_id="3:4", metadata=b"5")
@example(user_id=" ", game_id=" ", server_id=" ", metadata=b" ")
@example(user_id="1:2:3 4", game_id="7:1:2", server_id="1:1", metadata=b"0:0 ")
@example(user_id="\n", game_id="\x00", server_id="\x00:\n", metadata=b"\x00\n")
def test_any_texts_come_back_as_they_were_and_are_never_confused(
    server_url: str, client: redis.Redis, user_id: str, game_id: str, server_id: str, metadata: bytes
) -> None:
    namespace = f"metadata-{uuid.uuid4()}"
    with presence.sync.ConnectionManager.from_url(
        server_url, namespace=namespace, server_id=server_id, server_grace_seconds=30
    ) as manager:
        try:
            manager.register_connection("sid", user_id, metadata=metadata)
            manager.join_game("sid", game_id)
            connection = manager.get_connection("sid")
            assert connection is not None
            told = (connection.user_id, connection.game_id, connection.server_id, connection.metadata)
            assert told == (user_id, game_id, server_id, metadata)
            assert manager.get_user_connection(user_id) == connection
            assert manager.get_game_connections(game_id) == [connection]
            assert manager.is_user_online(user_id)

            (detached,) = manager.cleanup_server(server_id).detached
            told = (detached.user_id, detached.game_id, detached.server_id, detached.metadata)
            assert told == (user_id, game_id, None, metadata)
            resumed = manager.register_connection("new", user_id).connection
            told = (resumed.user_id, resumed.game_id, resumed.server_id, resumed.metadata)
            assert told == (user_id, game_id, server_id, metadata)
            assert manager.update_metadata("new", metadata[::-1])
            assert violations(read_keyspace(client, namespace)) == []
            (gone,) = manager.register_connection("newest", user_id).displaced
            told = (gone.user_id, gone.game_id, gone.server_id, gone.metadata)
            assert told == (user_id, game_id, server_id, metadata[::-1])
        finally:
            keyspace = read_keyspace(client, namespace)
            client.delete(*[key.encode() for key in keyspace.ttls_ms | keyspace.other_ttls_ms])
