"""The manager for blocking code: the same methods as :class:`presence.ConnectionManager`, without ``await``."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any, Self, TypeVar

from redis.exceptions import RedisError

from presence import arguments, clients
from presence.errors import PipelineError, PresenceError
from presence.operations import Command, Exchange, Operation, Operations, perform, perform_all

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from uuid import UUID

    from redis import Redis, RedisCluster

    from presence.results import CleanupResult, ConnectionInfo, JoinResult, Registration

logger = logging.getLogger("presence")

Result = TypeVar("Result")


class ConnectionManager:
    """Who is online, on which connection and in which game: one namespace, for blocking code.

    Every method but ``cleanup_stale_connections`` and ``run_cleanup`` is one atomic script and one round trip (two more
    when the server has lost the script). All raise ``TypeError`` or ``ValueError`` for a bad argument, before anything
    is sent, and a :class:`presence.PresenceError` for a fault. An id is 1 to 1,024 characters of any kind except lone
    surrogates. An expired connection (no heartbeat for ``conn_ttl_seconds``) is unknown to all of them; only cleanup,
    and a new registration of its user, still find it and report it.

    One manager serves any number of threads. It connects on first use.

    Args:
        client: a redis-py client (``Redis`` or ``RedisCluster``) to use, whatever its ``decode_responses``,
            protocol and parser; it stays the caller's to close, and its retry policy holds. None: a client of its own,
            whose URL is ``PRESENCE_REDIS_URL`` or ``REDIS_URL`` from the environment when it first connects, else
            ``redis://localhost:6379/0``.
        namespace: the keyspace; all servers of one fleet use the same. No braces.
        conn_ttl_seconds: how long a connection without a heartbeat stays known, the same on all servers of a
            namespace; 0.001 s to ten years.
        heartbeat_seconds: how often clients beat; a user is online for three times as long after the last one.
        connections_per_user: live connections that a user may have, 1 to 100; registering displaces the oldest ones.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of its bounds.

    """

    def __init__(
        self,
        client: Redis | RedisCluster | None = None,
        *,
        namespace: str = "presence",
        conn_ttl_seconds: float = 3600,
        heartbeat_seconds: float = 30,
        connections_per_user: int = 1,
    ) -> None:
        self.operations = Operations(
            namespace,
            conn_ttl_seconds=conn_ttl_seconds,
            heartbeat_seconds=heartbeat_seconds,
            connections_per_user=connections_per_user,
        )
        """The same operations as descriptions, for :meth:`pipeline`."""
        self._given_client = client
        self._address: clients.Address | None = None
        self._client_options: dict[str, Any] = {}
        self._own_client: Redis | RedisCluster | None = None
        self._lock = threading.Lock()
        self._cleanups: dict[threading.Event, threading.Thread] = {}
        self._cleanup_ended = threading.Condition(self._lock)

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        namespace: str = "presence",
        conn_ttl_seconds: float = 3600,
        heartbeat_seconds: float = 30,
        connections_per_user: int = 1,
        **client_options: Any,
    ) -> Self:
        """Make a manager with a client of its own, which connects on first use.

        Args:
            url: ``redis://``, ``rediss://``, ``unix://``, ``redis+sentinel://host,host/service`` or
                ``redis+cluster://host,host``, with user, password, database and redis-py options as in redis-py.
            namespace: see the class.
            conn_ttl_seconds: see the class.
            heartbeat_seconds: see the class.
            connections_per_user: see the class.
            client_options: more options for redis-py's client, over the defaults of presence.

        Returns:
            The manager; close it with ``close()`` or use it as ``with``.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an argument is out of its bounds, or the URL is malformed.

        """
        manager = cls(
            namespace=namespace,
            conn_ttl_seconds=conn_ttl_seconds,
            heartbeat_seconds=heartbeat_seconds,
            connections_per_user=connections_per_user,
        )
        manager._address = clients.parse(url)
        manager._client_options = client_options
        return manager

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every ``run_cleanup`` of this manager and close its own client; a client that was passed in stays open.

        A closed manager connects again when it is used again.
        """
        this_thread = threading.current_thread()
        with self._lock:
            for stop in self._cleanups:
                stop.set()
            self._cleanup_ended.wait_for(lambda: all(thread is this_thread for thread in self._cleanups.values()))
            client, self._own_client = self._own_client, None
        if client is not None:
            client.close()

    def register_connection(self, sid: str, user_id: str | UUID) -> Registration:
        """Create a connection, make it its user's active one, and displace the earlier one out of every structure.

        Registering a known sid again for the same user refreshes it and keeps its game; for another user it first
        removes the old owner's connection completely (``Registration.replaced``).

        Args:
            sid: the connection's id.
            user_id: the user's id.

        Returns:
            The connection, and the displaced ones, whose sockets are now the caller's to close: no other call on any
            server reports them.

        Cost: one round trip; O(log N) in the server, N = connections in the namespace.

        """
        return self._run(perform(self.operations.register_connection(sid, user_id)))

    def unregister_connection(self, sid: str) -> ConnectionInfo | None:
        """Remove a connection everywhere; a newer connection of the same user is never touched.

        Args:
            sid: the connection's id.

        Returns:
            What was removed; None when there was no such connection, as after it was displaced.

        Cost: one round trip; O(log N).

        """
        return self._run(perform(self.operations.unregister_connection(sid)))

    def join_game(self, sid: str, game_id: str) -> JoinResult:
        """Put a connection into a game; if it is in another, it leaves that first.

        Args:
            sid: the connection's id.
            game_id: the game's id.

        Returns:
            Whether it is in the game, and the game that it left. Falsy when there is no such connection.

        Cost: one round trip; O(1).

        """
        return self._run(perform(self.operations.join_game(sid, game_id)))

    def leave_game(self, sid: str) -> str | None:
        """Take a connection out of its game.

        Args:
            sid: the connection's id.

        Returns:
            The game that it left; None when it was in none, or there is no such connection.

        Cost: one round trip; O(1).

        """
        return self._run(perform(self.operations.leave_game(sid)))

    def update_heartbeat(self, sid: str) -> bool:
        """Mark a connection as seen now, and keep every key that it lives in from expiring.

        Args:
            sid: the connection's id.

        Returns:
            Whether there is such a connection. False is final: it was displaced, removed or has expired, and a
            heartbeat never brings it back; close its socket, or register it again.

        Cost: one round trip; O(log N).

        """
        return self._run(perform(self.operations.update_heartbeat(sid)))

    def get_connection(self, sid: str) -> ConnectionInfo | None:
        """Read one connection.

        Args:
            sid: the connection's id.

        Returns:
            The connection, or None.

        Cost: one round trip; O(1).

        """
        return self._run(perform(self.operations.get_connection(sid)))

    def get_user_connection(self, user_id: str | UUID) -> ConnectionInfo | None:
        """Read a user's active connection: the one that registered last.

        Args:
            user_id: the user's id.

        Returns:
            The connection, or None. It may be stale, see ``ConnectionInfo.is_stale``.

        Cost: one round trip; O(M), M = connections of the user.

        """
        return self._run(perform(self.operations.get_user_connection(user_id)))

    def is_user_online(self, user_id: str | UUID) -> bool:
        """Tell whether a user has a connection that was seen within three times ``heartbeat_seconds``.

        Args:
            user_id: the user's id.

        Returns:
            Whether the user is online.

        Cost: one round trip; O(M), M = connections of the user.

        """
        return self._run(perform(self.operations.is_user_online(user_id)))

    def get_game_connections(self, game_id: str) -> list[ConnectionInfo]:
        """Read all connections in a game, as they are at one moment.

        Args:
            game_id: the game's id.

        Returns:
            The connections by the time of their registration; an empty list when there are none.

        Cost: one round trip; O(M), M = connections in the game, all read by one script.

        """
        return self._run(perform(self.operations.get_game_connections(game_id)))

    def get_game_user_sids(self, game_id: str) -> dict[str, str]:
        """Read who is in a game, and on which connection.

        Args:
            game_id: the game's id.

        Returns:
            user_id -> sid; for a user with several connections in the game, the newest.

        Cost: one round trip; O(M), M = connections in the game.

        """
        return self._run(perform(self.operations.get_game_user_sids(game_id)))

    def get_opponent_sid(self, game_id: str, current_user_id: str | UUID) -> str | None:
        """Find the other player of a two-player game.

        Args:
            game_id: the game's id.
            current_user_id: the user who asks.

        Returns:
            The newest sid of the other user; None when there is none. With several others, the one who connected first.

        Cost: one round trip; O(M), M = connections in the game.

        """
        return self._run(perform(self.operations.get_opponent_sid(game_id, current_user_id)))

    def get_connection_count(self) -> int:
        """Count the live connections of the namespace.

        Returns:
            How many have not expired.

        Cost: one round trip; O(log N).

        """
        return self._run(perform(self.operations.get_connection_count()))

    def get_game_connection_count(self, game_id: str) -> int:
        """Count the live connections in a game.

        Args:
            game_id: the game's id.

        Returns:
            How many have not expired.

        Cost: one round trip; O(M), M = connections in the game.

        """
        return self._run(perform(self.operations.get_game_connection_count(game_id)))

    def cleanup_stale_connections(self, threshold_seconds: float | None = None) -> CleanupResult:
        """Remove the connections that were not seen for longer than a threshold, in bounded batches.

        Any number of servers may do so at once: each connection is reported by exactly one of them.

        Args:
            threshold_seconds: seconds, 0 or more; None is three times ``heartbeat_seconds``, 90 by default.

        Returns:
            The removed connections. If a fault stopped it after some were removed, they are reported all the same
            and ``CleanupResult.error`` holds the fault; before any, the fault is raised.

        Cost: a round trip for each 100 removed connections; O(log N) for each removed connection.

        """
        return self._run(self.operations.cleanup_stale_connections(threshold_seconds))

    def run_cleanup(
        self,
        interval_seconds: float = 30,
        *,
        threshold_seconds: float | None = None,
        on_removed: Callable[[CleanupResult], object] | None = None,
    ) -> None:
        """Clean up again and again, until the manager is closed; run it in a background thread.

        ``Thread(target=manager.run_cleanup, kwargs={"on_removed": tell_the_opponents}).start()``. Every server of a
        fleet may run it. A fault, of the server or of ``on_removed``, is logged and does not end it.

        Args:
            interval_seconds: seconds between the end of one cleanup and the start of the next; positive.
            threshold_seconds: as in :meth:`cleanup_stale_connections`.
            on_removed: called with each result that removed something. An exception that it raises is logged, and what it
                had not dealt with is not reported again: catch errors for each connection inside.

        Cost: as :meth:`cleanup_stale_connections`, each time.

        """
        interval = arguments.milliseconds("interval_seconds", interval_seconds) / 1000
        self.operations.cleanup_batch(threshold_seconds)
        stop = threading.Event()
        with self._lock:
            self._cleanups[stop] = threading.current_thread()
        try:
            while not stop.is_set():
                self._clean_up_once(interval, threshold_seconds, on_removed)
                stop.wait(interval)
        finally:
            with self._lock:
                del self._cleanups[stop]
                self._cleanup_ended.notify_all()

    def _clean_up_once(
        self,
        interval: float,
        threshold_seconds: float | None,
        on_removed: Callable[[CleanupResult], object] | None,
    ) -> None:
        try:
            result = self.cleanup_stale_connections(threshold_seconds)
            if result and on_removed is not None:
                on_removed(result)
            if result.error is not None:
                raise result.error
        except PresenceError as error:
            logger.warning("cleanup failed, next attempt in %g s: %s", interval, error)
        except Exception:
            logger.exception("on_removed failed for connections that cleanup removed")

    def pipeline(self, operations: Sequence[Operation[Result]]) -> list[Result]:
        """Run several operations in one round trip, each atomic in itself, in their order.

        ``manager.pipeline([manager.operations.update_heartbeat(sid) for sid in sids])``. A cluster serves them
        all from the namespace's one node.

        Args:
            operations: descriptions, from :attr:`operations`.

        Returns:
            The result of each, in order.

        Raises:
            PipelineError: some failed; its ``results`` holds what every one of them answered or met.

        Cost: one round trip; the sum of the operations in the server.

        """
        if not operations:
            return []
        results = self._run(perform_all(operations))
        if any(isinstance(result, PresenceError) for result in results):
            raise PipelineError(results)
        return results

    def _client(self) -> Redis | RedisCluster:
        if self._given_client is not None:
            return self._given_client
        with self._lock:
            if self._own_client is None:
                address = self._address or clients.parse(clients.default_url())
                self._own_client = clients.connect_blocking(address, self._client_options)
            return self._own_client

    def _run(self, exchange: Exchange[Result]) -> Result:
        try:
            request = next(exchange)
            while True:
                request = exchange.send(self._send(request))
        except StopIteration as finished:
            result: Result = finished.value
            return result

    def _send(self, request: Sequence[Command]) -> list[Any]:
        """Send commands together; give their replies, never decoded by the client, with errors in their places."""
        client = self._client()
        try:
            if len(request) == 1:
                return [client.execute_command(*request[0], NEVER_DECODE=True)]  # type: ignore[no-untyped-call]
            pipeline = client.pipeline(transaction=False)
            for command in request:
                pipeline.execute_command(*command, NEVER_DECODE=True)
            return pipeline.execute(raise_on_error=False)
        except (RedisError, OSError) as error:
            return [error] * len(request)
