"""Calls of the blocking manager: each takes a connection of the client's pool, and nothing else sees what is on it."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import redis

from presence import HeartbeatStatus
from presence.sync import ConnectionManager

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.server import LocalServer

PAUSE_MS = 300
MANY = 150
"""Sids for more than one script."""


class InterruptedConnection(redis.Connection):
    """Reads a reply only after what a signal's handler may raise there."""

    interruption: ClassVar[type[BaseException] | None] = None

    def read_response(self, *args: Any, **options: Any) -> Any:
        interruption, InterruptedConnection.interruption = self.interruption, None
        if interruption is not None:
            raise interruption
        return super().read_response(*args, **options)


class OutOfTimeError(Exception):
    """As a handler raises that bounds the time of a call."""


def beat_one(manager: ConnectionManager) -> object:
    return manager.update_heartbeat("sid")


def beat_many(manager: ConnectionManager) -> object:
    return manager.update_heartbeats([f"sid {number}" for number in range(MANY)])


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, OutOfTimeError])
@pytest.mark.parametrize("interrupted_call", [beat_one, beat_many])
def test_the_reply_to_a_call_that_was_interrupted_answers_no_other(
    own_server: LocalServer,
    interrupted_call: Callable[[ConnectionManager], object],
    interruption: type[BaseException],
) -> None:
    """A signal's handler raises between the request and the reply, and the server is slow to reply."""
    with (
        redis.Redis.from_url(own_server.url) as other,
        ConnectionManager.from_url(own_server.url, connection_class=InterruptedConnection) as manager,
    ):
        manager.register_connection("sid", "alice")
        beat_many(manager)
        other.client_pause(PAUSE_MS)
        InterruptedConnection.interruption = interruption
        with pytest.raises(interruption):
            interrupted_call(manager)

        assert manager.get_connection("unknown") is None
        assert manager.get_connection_count() == 1
        assert beat_many(manager) == {f"sid {number}": HeartbeatStatus.UNKNOWN for number in range(MANY)}


class TestWhatSeesEachCallOfAClient:
    """Tracing wraps ``execute_command``, or an application overrides it."""

    def test_does_so_where_a_subclass_overrides_it(self, server_url: str, namespace: str) -> None:
        class Traced(redis.Redis):
            def execute_command(self, *args: Any, **options: Any) -> Any:
                seen.append(args[0])
                return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

        seen: list[str] = []
        with Traced.from_url(server_url) as client:
            self.check(ConnectionManager(client, namespace=namespace), seen)

    def test_does_so_where_the_client_s_own_is_replaced(self, server_url: str, namespace: str) -> None:
        seen: list[str] = []
        with redis.Redis.from_url(server_url) as client:
            execute = client.execute_command

            def traced(*args: Any, **options: Any) -> Any:
                seen.append(args[0])
                return execute(*args, **options)

            client.execute_command = traced
            self.check(ConnectionManager(client, namespace=namespace), seen)

    @pytest.mark.parametrize("is_given", [True, False])
    def test_does_so_where_the_class_is_wrapped(
        self, server_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch, is_given: bool
    ) -> None:
        seen: list[str] = []
        execute = redis.Redis.execute_command

        @wraps(execute)
        def traced(self: redis.Redis, *args: Any, **options: Any) -> Any:
            seen.append(args[0])
            return execute(self, *args, **options)  # type: ignore[no-untyped-call]

        monkeypatch.setattr(redis.Redis, "execute_command", traced)
        with redis.Redis.from_url(server_url) as client:
            if is_given:
                self.check(ConnectionManager(client, namespace=namespace), seen)
            else:
                with ConnectionManager.from_url(server_url, namespace=namespace) as manager:
                    self.check(manager, seen)

    @staticmethod
    def check(manager: ConnectionManager, seen: list[str]) -> None:
        assert manager.register_connection("sid", "alice")
        assert manager.update_heartbeat("sid")
        before = len(seen)
        for _ in range(3):
            assert manager.update_heartbeat("sid")
        assert seen[before:] == ["EVALSHA"] * 3
