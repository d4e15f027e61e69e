"""The manager for blocking code: the same methods as :class:`presence.ConnectionManager`, without ``await``."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

import redis
from redis import Redis, RedisCluster
from redis.cluster import PipelineCommand

from presence import addresses, arguments, clients, pooling, retrying
from presence.background import RepeatedCleanup, RepeatedServerHeartbeat
from presence.commands import AS_BYTES, SCRIPT_LOAD, Repeated, SecondLoad
from presence.errors import FAULTS, as_cluster_fault, explain
from presence.exchanges import (
    Exchange,
    check_operations,
    clean_up,
    for_server,
    perform_all,
    perform_batches,
    recover,
)
from presence.forks import call_in_child
from presence.operations import Operation, Operations, shown_with
from presence.results import CleanupResult
from presence.subscriptions import Feed, Subscription

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType
    from uuid import UUID

    from presence.commands import Command
    from presence.operations import Displacement, EventsMode
    from presence.results import ConnectionInfo, GameSnapshot, HeartbeatStatus, JoinResult, Registration

logger: logging.Logger = logging.getLogger("presence")

Result = TypeVar("Result")


LONGEST_WAIT_SECONDS = 0.1
"""How long a close waits before it looks for itself: a signal handler may have kept a call from telling of its end."""

_left_behind: list[RedisCluster] = []
"""Clients that a forked process can neither use nor close."""


class _OpenClient:
    """A client that the manager uses, the call that opens it, and how far that has come."""

    client: Redis | RedisCluster

    def __init__(self, call: object) -> None:
        self.call = call
        self.opener = threading.get_ident()
        self.is_open = False
        self.has_tried = False
        self.error: Exception | None = None
        self.tries_again = False
        """Whether calls of a cluster are sent again here, and not by the client."""


class _Repetition:
    """What ``close`` needs to end a ``run_cleanup`` or ``run_server_heartbeat``."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.is_to_end = False
        # A signal handler may run in the midst of what a threading.Event does, but not of what a lock does.
        self._until_the_end = threading.Lock()
        self._until_the_end.acquire()

    def pause(self, seconds: float) -> None:
        """Wait, at most until it is to end."""
        self._until_the_end.acquire(timeout=seconds)

    def end(self) -> None:
        """Let it end, however long its pause is."""
        self.is_to_end = True
        with suppress(RuntimeError):  # It was released before.
            self._until_the_end.release()


class ConnectionManager:
    """Who is online, on which connection and in which game: one namespace, for blocking code.

    Every method for one connection, user or game is one atomic script and one round trip (two more if the server has
    lost the script). Methods for many ids send scripts of bounded size in one round trip, each atomic in itself, and a
    cleanup takes a round trip for each batch. All raise ``TypeError`` or ``ValueError`` for a bad argument, before
    anything is sent, and a :class:`presence.PresenceError` for a fault. An id is 1 to 1,024 characters of any kind
    except lone surrogates. An expired connection (no heartbeat for ``conn_ttl_seconds``) is unknown to all of them;
    only cleanup, and a registration of its user or its sid, still find it and report it, and ``update_heartbeats``
    tells it from an unknown one. In the costs, N is the number of connections in the namespace.

    One manager serves any number of threads. It connects on first use.

    Args:
        client: a redis-py client (``Redis`` or ``RedisCluster``) to use, whatever its ``decode_responses``, protocol
            and parser; closing it is up to the caller, and its retry policy holds. None: a client of its own, with the
            URL that ``PRESENCE_REDIS_URL`` or ``REDIS_URL`` in the environment holds when it first connects, else
            ``redis://localhost:6379/0``.
        namespace: the keyspace; all game servers of one fleet share it. 1 to 1,024 characters, no braces.
        conn_ttl_seconds: how long a connection without a heartbeat stays known, the same on all game servers of a
            namespace; 0.001 s to ten years.
        heartbeat_seconds: how often clients send heartbeats, 0.001 s to ten years; a user is online for three times as
            long after the last one.
        connections_per_user: live connections that a user may have, 1 to 100; registering displaces the oldest ones.
        displacement: ``"newest_wins"``; ``"newest_resumes"``: the newest wins and takes over the seat of the one that
            it displaces, as if that had been detached before; or ``"reject_while_alive"``: a registration is refused
            while the user has as many connections as are allowed that are not stale.
        server_id: the id of this game server: connections are registered for it, and when it dies (see
            ``run_server_heartbeat``) the cleanup of any other takes them. 1 to 1,024 characters; None for none.
        server_grace_seconds: how long cleanup keeps the seats of a dead game server's connections, 0 to
            ``conn_ttl_seconds``; 0 removes them at once. The same on all game servers.
        events: whether every change is published for ``subscribe``: ``"off"``; ``"pubsub"``, at most once; or
            ``"stream"``, durable. The same on all game servers.
        events_max_length: about how many changes the stream keeps, 1 to 100,000,000.

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
        displacement: Displacement = "newest_wins",
        server_id: str | None = None,
        server_grace_seconds: float = 0,
        events: EventsMode = "off",
        events_max_length: int = 100_000,
    ) -> None:
        self.operations: Operations = Operations(
            namespace,
            conn_ttl_seconds=conn_ttl_seconds,
            heartbeat_seconds=heartbeat_seconds,
            connections_per_user=connections_per_user,
            displacement=displacement,
            server_id=server_id,
            server_grace_seconds=server_grace_seconds,
            events=events,
            events_max_length=events_max_length,
        )
        """Descriptions of every operation that is one script, for :meth:`pipeline`."""
        if client is not None and not clients.is_client(client, Redis, RedisCluster):
            raise TypeError(clients.not_a_client(client, "redis"))
        self._given_client = client
        self._address: addresses.Address | None = None
        self._client_options: dict[str, Any] = {}
        self._open_client: _OpenClient | None = None
        self._closing: list[_OpenClient] = []
        """Those that a close has put aside: the end of their last call closes them."""
        self._calls: dict[object, tuple[int, _OpenClient]] = {}
        """The calls that are under way or wait until a client is open: the thread and the client of each."""
        self._repetitions: set[_Repetition] = set()
        self._is_closed = False
        # A signal handler may close the manager in the midst of what its thread does here, so all waiting here is by
        # this lock alone, which a thread may take twice and releases while it waits.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        call_in_child(self, ConnectionManager._forget_other_threads)

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        namespace: str = "presence",
        conn_ttl_seconds: float = 3600,
        heartbeat_seconds: float = 30,
        connections_per_user: int = 1,
        displacement: Displacement = "newest_wins",
        server_id: str | None = None,
        server_grace_seconds: float = 0,
        events: EventsMode = "off",
        events_max_length: int = 100_000,
        **client_options: Any,
    ) -> Self:
        """Make a manager with a client of its own, which connects on first use.

        Args:
            url: ``redis://``, ``unix://``, ``redis+sentinel://host,host/service`` or ``redis+cluster://host,host``,
                with TLS ``rediss://``, ``rediss+sentinel://`` or ``rediss+cluster://``; with user, password, database
                and redis-py options as in redis-py.
            namespace: see the class.
            conn_ttl_seconds: see the class.
            heartbeat_seconds: see the class.
            connections_per_user: see the class.
            displacement: see the class.
            server_id: see the class.
            server_grace_seconds: see the class.
            events: see the class.
            events_max_length: see the class.
            client_options: more options for redis-py's client, which override presence's defaults. redis-py checks
                their values when it connects.

        Returns:
            The manager; close it with ``close()`` or use it as ``with``.

        Raises:
            TypeError: an argument has the wrong type, or there is no such option.
            ValueError: an argument is out of its bounds, or the URL is malformed.

        Cost: none before its first use.

        """
        manager = cls(
            namespace=namespace,
            conn_ttl_seconds=conn_ttl_seconds,
            heartbeat_seconds=heartbeat_seconds,
            connections_per_user=connections_per_user,
            displacement=displacement,
            server_id=server_id,
            server_grace_seconds=server_grace_seconds,
            events=events,
            events_max_length=events_max_length,
        )
        manager._address = addresses.parse(url)
        addresses.check_options(manager._address, client_options, redis, cls)
        manager._client_options = client_options
        return manager

    def _forget_other_threads(self) -> None:
        """Stop waiting for them in a forked process, which has only the thread that forked it."""
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._repetitions.clear()
        own_thread = threading.get_ident()
        self._calls = {call: about for call, about in self._calls.items() if about[0] == own_thread}
        in_use = self._in_use()
        self._closing = [known for known in self._closing if known in in_use]
        open_client = self._open_client
        if open_client and open_client.is_open and open_client not in in_use and self._given_client is None:
            self._leave_behind(open_client)

    def _leave_behind(self, open_client: _OpenClient) -> None:
        """Stop using a cluster's client: a thread of the parent may hold a lock of it, as to ask for the layout."""
        if isinstance(open_client.client, RedisCluster):
            _left_behind.append(open_client.client)  # Finalizing it would take the lock, too.
            self._open_client = None

    def _in_use(self) -> list[_OpenClient]:
        # The list is made in one step; going through the dict itself would take several.
        return [known for _, known in list(self._calls.values())]

    def __repr__(self) -> str:
        return shown_with(self.operations, self)

    def __enter__(self) -> Self:
        self._is_closed = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every ``run_cleanup`` and ``run_server_heartbeat`` of this manager, and close its own client.

        A client that was passed in stays open. Operations under way are waited for (those of other threads). Closing
        asks the server nothing and raises no fault. A closed manager connects again when it is used again, such as by a
        subscription that was not ended before.
        """
        own_thread = threading.get_ident()
        with self._lock:
            self._is_closed = True
            for running in tuple(self._repetitions):
                running.end()
            # A signal handler has interrupted a call of its own thread, which may hold what the others need to end
            # theirs: it waits for nobody, and the last call to end closes the client.
            has_interrupted = any(thread == own_thread for thread, _ in list(self._calls.values()))
            # A callback of a cleanup may close the manager, and cannot wait for its own end.
            is_callback = any(running.thread == own_thread for running in tuple(self._repetitions))
            while self._repetitions and not has_interrupted and not is_callback:
                self._changed.wait(LONGEST_WAIT_SECONDS)
            open_client, self._open_client = self._open_client, None
            if open_client is not None:
                self._closing.append(open_client)
        self._close_unused()
        while self._closing and not has_interrupted:
            with self._lock:
                self._changed.wait_for(lambda: not self._closing, LONGEST_WAIT_SECONDS)
            self._close_unused()

    def register_connection(
        self, sid: str, user_id: str | UUID, *, metadata: str | bytes | None = None
    ) -> Registration:
        """Create a connection, make it its user's active one, and displace the earlier one out of every structure.

        Registering a known sid again for the same user refreshes it and keeps its game; for another user it first
        removes the old owner's connection completely (``Registration.replaced``). If the user has a detached
        connection within its grace, the new one takes over its seat, game and all (``Registration.resumed``).

        Args:
            sid: the connection's id.
            user_id: the user's id.
            metadata: what to keep with it, at most 4,096 bytes, text as UTF-8. None or empty keeps that of a connection
                that is refreshed or resumed.

        Returns:
            The connection, and the displaced ones, whose sockets are now the caller's to close: no other call reports
            them, on any game server. Falsy when ``displacement`` is ``"reject_while_alive"`` and it was refused.

        Raises:
            OutOfMemoryError: the server's memory is full; nothing was changed.

        Cost: one round trip, with a ``server_id`` one more until its start is answered; O(log N) in the server for
        itself and for each connection that it displaces.

        """
        return self._run(
            for_server(self.operations, partial(self.operations.register_connection, sid, user_id, metadata=metadata))
        )

    def unregister_connection(
        self, sid: str, *, grace_seconds: float | None = None, epoch: int | None = None
    ) -> ConnectionInfo | None:
        """Remove a connection everywhere, or keep its seat for a grace; the user's newer ones are never touched.

        With a grace the connection is detached: the user is offline, but ``get_game_connections`` still lists the seat,
        and a registration of the same user within the grace, on any game server, takes it over with its game. After
        the grace, cleanup removes it and reports it. Detaching it again changes nothing, but returns it once more;
        without a grace it is removed.

        Args:
            sid: the connection's id.
            grace_seconds: how long the seat is kept, 0 to ``conn_ttl_seconds``; None or 0 keeps none.
            epoch: act only for this registration of the sid (``ConnectionInfo.epoch``); None for any.

        Returns:
            What was removed, or is detached now; None when there was none, such as after it was displaced.

        Cost: one round trip; O(log N).

        """
        return self._run(self.operations.unregister_connection(sid, grace_seconds=grace_seconds, epoch=epoch))

    def join_game(self, sid: str, game_id: str, *, capacity: int | None = None, epoch: int | None = None) -> JoinResult:
        """Put a connection into a game; if it is in another, it leaves that first.

        Args:
            sid: the connection's id.
            game_id: the game's id.
            capacity: refuse when this many connections, 1 to 1,000,000, have a seat in the game, detached ones
                included; None for any number.
            epoch: act only for this registration of the sid (``ConnectionInfo.epoch``); None for any.

        Returns:
            Whether it is in the game, and the game that it left. Falsy when there is no such connection, or the game
            ``is_full``: then the connection stays in the game that it was in.

        Raises:
            OutOfMemoryError: the server's memory is full; nothing was changed.

        Cost: one round trip; O(1), or O(M) when the capacity is reached, M = connections in the game.

        """
        return self._run(self.operations.join_game(sid, game_id, capacity=capacity, epoch=epoch))

    def leave_game(self, sid: str, *, epoch: int | None = None) -> str | None:
        """Take a connection out of its game.

        Args:
            sid: the connection's id.
            epoch: act only for this registration of the sid (``ConnectionInfo.epoch``); None for any.

        Returns:
            The game that it left; None when it was in none, or there is no such connection.

        Cost: one round trip; O(1).

        """
        return self._run(self.operations.leave_game(sid, epoch=epoch))

    def update_metadata(self, sid: str, metadata: str | bytes, *, epoch: int | None = None) -> bool:
        """Replace what the application keeps with a connection.

        Args:
            sid: the connection's id.
            metadata: at most 4,096 bytes, text as UTF-8; empty for none.
            epoch: act only for this registration of the sid (``ConnectionInfo.epoch``); None for any.

        Returns:
            Whether there is such a connection.

        Raises:
            OutOfMemoryError: the server's memory is full; nothing was changed.

        Cost: one round trip; O(1).

        """
        return self._run(self.operations.update_metadata(sid, metadata, epoch=epoch))

    def update_heartbeat(self, sid: str, *, epoch: int | None = None) -> bool:
        """Mark a connection as seen now, and keep every key that it lives in from expiring.

        Args:
            sid: the connection's id.
            epoch: act only for this registration of the sid (``ConnectionInfo.epoch``); None for any.

        Returns:
            Whether there is such a connection. False: it was displaced, removed or detached, or has expired, and no
            heartbeat brings it back. Close its socket: registering it again would displace what displaced it.
            ``update_heartbeats`` tells which of these it is, as far as that is still known.

        Cost: one round trip; O(log N).

        """
        return self._run(self.operations.update_heartbeat(sid, epoch=epoch))

    def update_heartbeats(self, sids: Iterable[str]) -> dict[str, HeartbeatStatus]:
        """Mark many connections as seen now, such as all of one game server, as ``update_heartbeat`` does for one.

        Args:
            sids: the connections' ids, any number.

        Returns:
            For each sid, what became of it; false unless it was seen.

        Raises:
            PipelineError: some of the scripts failed, and the others took effect; its ``results`` has an item for each
                different sid, in order. A fault that all of them met is raised as in any other call.

        Cost: one round trip; O(log N) for each sid, in scripts of 100 (fewer if ``connections_per_user`` is over 30).

        """
        return self._run(perform_batches(self.operations.heartbeat_batches(sids)))

    def get_connection(self, sid: str) -> ConnectionInfo | None:
        """Read one connection, live or detached (``ConnectionInfo.is_detached``).

        Args:
            sid: the connection's id.

        Returns:
            The connection, or None.

        Cost: one round trip; O(1).

        """
        return self._run(self.operations.get_connection(sid))

    def get_user_connection(self, user_id: str | UUID) -> ConnectionInfo | None:
        """Read a user's active connection: of those that are not detached, the one that registered last.

        Args:
            user_id: the user's id.

        Returns:
            The connection, or None. It may be stale, see ``ConnectionInfo.is_stale``.

        Cost: one round trip; O(M), M = connections of the user.

        """
        return self._run(self.operations.get_user_connection(user_id))

    def get_all_user_connections(self, user_id: str | UUID) -> list[ConnectionInfo]:
        """Read all connections of a user, including detached ones, as they are at one moment.

        There is more than one only if ``connections_per_user`` is more than 1.

        Args:
            user_id: the user's id.

        Returns:
            The connections in the order of their registration. Some may be stale, see ``ConnectionInfo.is_stale``.

        Cost: one round trip; O(M), M = connections of the user.

        """
        return self._run(self.operations.get_all_user_connections(user_id))

    def is_user_online(self, user_id: str | UUID) -> bool:
        """Tell whether a user has a connection that was seen within three times ``heartbeat_seconds``.

        Args:
            user_id: the user's id.

        Returns:
            Whether the user is online.

        Cost: one round trip; O(M), M = connections of the user.

        """
        return self._run(self.operations.is_user_online(user_id))

    def get_game_connections(self, game_id: str) -> list[ConnectionInfo]:
        """Read all connections in a game, including detached ones, as they are at one moment.

        Args:
            game_id: the game's id.

        Returns:
            The connections by their epoch, so the earliest registration comes first; an empty list when there are none.

        Cost: one round trip; O(M), M = connections in the game, all read by one script.

        """
        return self._run(self.operations.get_game_connections(game_id))

    def get_game_snapshot(self, game_id: str) -> GameSnapshot:
        """Read all connections in a game with the position in the stream of events at that same moment.

        ``subscribe(game_id=game_id, after=snapshot.position)`` then tells what has happened since, without gap or
        overlap. The position means nothing unless the game servers that make the changes have ``events="stream"``.

        Args:
            game_id: the game's id.

        Returns:
            The connections, as ``get_game_connections`` gives them, and the position.

        Cost: one round trip; O(M), M = connections in the game.

        """
        return self._run(self.operations.get_game_snapshot(game_id))

    def get_game_user_sids(self, game_id: str) -> dict[str, str]:
        """Read who is in a game, and on which connection; detached ones are left out.

        Args:
            game_id: the game's id.

        Returns:
            user_id -> sid; for a user with several connections in the game, the newest.

        Cost: one round trip; O(M), M = connections in the game.

        """
        return self._run(self.operations.get_game_user_sids(game_id))

    def get_opponent_sid(self, game_id: str, current_user_id: str | UUID) -> str | None:
        """Find the other player of a two-player game.

        Args:
            game_id: the game's id.
            current_user_id: the user who asks.

        Returns:
            The newest sid of the other user; None when there is none, or it is detached. With several others, that of
            the one with the earliest registration by epoch; one that is refreshed or resumed counts as new.

        Cost: one round trip; O(M), M = connections in the game.

        """
        return self._run(self.operations.get_opponent_sid(game_id, current_user_id))

    def are_users_online(self, user_ids: Iterable[str | UUID]) -> dict[str, bool]:
        """Tell which of many users, such as a list of friends, are online, as ``is_user_online`` does for one.

        Args:
            user_ids: the users' ids, any number.

        Returns:
            user id, as text -> whether the user is online.

        Raises:
            PipelineError: some of the scripts failed; its ``results`` has an item for each different id, in order. A
                fault that all of them met is raised as in any other call.

        Cost: one round trip; O(M) for each user, M = connections of the user, in scripts of 100 users (fewer if
        ``connections_per_user`` is more than ten).

        """
        return self._run(perform_batches(self.operations.users_online_batches(user_ids)))

    def get_users_connections(self, user_ids: Iterable[str | UUID]) -> dict[str, ConnectionInfo | None]:
        """Read the active connection of each of many users, as ``get_user_connection`` does for one.

        Args:
            user_ids: the users' ids, any number.

        Returns:
            user id, as text -> the connection, or None.

        Raises:
            PipelineError: some of the scripts failed; its ``results`` has an item for each different id, in order. A
                fault that all of them met is raised as in any other call.

        Cost: one round trip; O(M) for each user, M = connections of the user, in scripts of 100 users (fewer if
        ``connections_per_user`` is more than ten).

        """
        return self._run(perform_batches(self.operations.users_connections_batches(user_ids)))

    def get_games_connections(self, game_ids: Iterable[str]) -> dict[str, list[ConnectionInfo]]:
        """Read all connections in many games, as ``get_game_connections`` does for one.

        Args:
            game_ids: the games' ids, any number.

        Returns:
            game id -> the connections by their epoch.

        Raises:
            PipelineError: some of the scripts failed; its ``results`` has an item for each different id, in order. A
                fault that all of them met is raised as in any other call.

        Cost: one round trip; O(M) for each game, M = connections in the game, in scripts of 10 games.

        """
        return self._run(perform_batches(self.operations.games_connections_batches(game_ids)))

    def get_connection_count(self) -> int:
        """Count the live connections of the namespace; detached ones do not count.

        Returns:
            How many have not expired.

        Cost: one round trip; O(log N).

        """
        return self._run(self.operations.get_connection_count())

    def get_game_connection_count(self, game_id: str) -> int:
        """Count the live connections in a game; detached ones do not count.

        Args:
            game_id: the game's id.

        Returns:
            How many have not expired.

        Cost: one round trip; O(M), M = connections in the game; if more than 50, O(log N + D), D = the namespace's
        detached and expired connections, unless D reaches M or 1,000.

        """
        return self._run(self.operations.get_game_connection_count(game_id))

    def cleanup_stale_connections(self, threshold_seconds: float | None = None) -> CleanupResult:
        """Remove, in batches, the connections not seen for longer than a threshold, or whose grace is over.

        Those of dead game servers go too, or are detached if ``server_grace_seconds`` keeps their seats. Any number of
        game servers may clean up at once: each connection is reported by exactly one of them.

        Args:
            threshold_seconds: seconds, 0 to ten years; None is three times ``heartbeat_seconds``, 90 by default.

        Returns:
            The removed and the detached connections. If a fault stopped it after some of them, they are reported all
            the same and ``CleanupResult.error`` holds the fault.

        Raises:
            PresenceError: a fault stopped it before anything was removed or detached.

        Cost: a round trip for each 20 removed connections or 25 KiB of records (fewer if ``connections_per_user`` is
        more than 30); O(log N) for each removed connection.

        """
        return self._run(clean_up(partial(self.operations.cleanup_batch, threshold_seconds)))

    def cleanup_server(self, server_id: str, *, grace_seconds: float | None = None) -> CleanupResult:
        """Remove or detach, in batches, all connections of one game server, such as one that is known to be dead.

        Args:
            server_id: the game server's id; the connections of every start of it go, those of a running one too. With
                the manager's own id, once it has started, those of a later start stay.
            grace_seconds: how long their seats are kept, 0 to ``conn_ttl_seconds``; 0 removes them, None is the
                manager's ``server_grace_seconds``.

        Returns:
            The removed and the detached connections; no other call reports them. After a fault, as in
            :meth:`cleanup_stale_connections`.

        Raises:
            PresenceError: a fault stopped it before anything was removed or detached.

        Cost: as :meth:`cleanup_stale_connections`, and O(S), S = game servers, for each round trip.

        """
        describe_batch = partial(self.operations.cleanup_server_batch, server_id, grace_seconds=grace_seconds)
        return self._run(clean_up(describe_batch))

    def start_server(self) -> int:
        """Give this game server its boot epoch, and leave the connections of its earlier starts to cleanup.

        The first registration or server heartbeat does this if it was not called before. A manager starts its server
        once: called again, this gives the same boot epoch and sends nothing.

        Returns:
            The boot epoch, larger than every epoch before it in the namespace.

        Raises:
            ValueError: the manager has no ``server_id``.
            OutOfMemoryError: the server's memory is full; nothing was changed.

        Cost: one round trip the first time, then none; O(S log S), S = game servers.

        """
        start = self.operations.start_server()
        if self.operations.boot_epoch is None:
            return self._run(start)
        return self.operations.boot_epoch

    def update_server_heartbeat(self) -> bool:
        """Mark this game server as seen now; without it for three ``heartbeat_seconds``, cleanup takes it for dead.

        Returns:
            Whether it is known. False when a later start of the same ``server_id`` has replaced it: stop beating.

        Raises:
            ValueError: the manager has no ``server_id``.
            OutOfMemoryError: the server's memory is full, and this first heartbeat could not start the game server.

        Cost: one round trip, one more until the start, which gives the boot epoch, is answered; O(log S), S = game
        servers, and O(S log S) if it is not known any more.

        """
        return self._run(for_server(self.operations, self.operations.update_server_heartbeat))

    def run_cleanup(
        self,
        interval_seconds: float = 30,
        *,
        threshold_seconds: float | None = None,
        on_removed: Callable[[CleanupResult], object] | None = None,
    ) -> None:
        """Clean up again and again, until the manager is closed; run it in a background thread.

        ``Thread(target=manager.run_cleanup, kwargs={"on_removed": tell_the_opponents}).start()``. All game
        servers may run it. Any error, of a call or of ``on_removed``, is logged and does not end it. Before the first
        cleanup, and after an outage, it waits for a heartbeat and 7.5 seconds (or a quarter of a heartbeat, if that is
        longer; for three heartbeats, if they are shorter than 3.75 seconds), so that everyone's heartbeat comes first.
        (With a threshold below two heartbeats that is less reliable, and with one of a heartbeat or less it does not
        wait.) On a manager that is closed already it ends at once, and logs an error: it may have been closed before
        the thread began. ``on_removed`` may close the manager, but not in another thread that it waits for.

        Args:
            interval_seconds: seconds between the end of one cleanup and the start of the next, 0.001 to ten years.
            threshold_seconds: as in :meth:`cleanup_stale_connections`.
            on_removed: called with each batch that removed or detached something; it may close the manager. What it
                raises is logged, and what it had not dealt with is not reported again: catch errors for each connection
                inside. If it takes longer than a sixth of a heartbeat, the next batch waits as after an outage.

        Raises:
            TypeError: ``on_removed`` cannot be called, or another argument has the wrong type.
            ValueError: an interval or threshold is out of its bounds.

        Cost: as :meth:`cleanup_stale_connections`, each time; and, twelve times a heartbeat, a look at the server: one
        round trip that asks for the time.

        """
        arguments.check_callback("on_removed", on_removed, is_awaited=False)
        cleanup = RepeatedCleanup(self.operations, interval_seconds, threshold_seconds)
        try:
            self._repeat(lambda: self._clean_up_batch(cleanup, on_removed))
        finally:
            cleanup.end()

    def run_server_heartbeat(self, interval_seconds: float | None = None) -> None:
        """Beat for this game server at once and then again and again, until the manager is closed.

        Run it in the background wherever there is a ``server_id``: a game server that has not beaten for three
        ``heartbeat_seconds`` is dead to all cleanups, which take its connections. Any error is logged and does not end
        it. It ends, and logs an error, when a later start of the same ``server_id`` has replaced this one. On a manager
        that is closed already it ends at once, and logs an error.

        Args:
            interval_seconds: seconds between two heartbeats, 0.001 to less than three ``heartbeat_seconds``. None is
                one of these. After an error it pauses for at most 5 seconds.

        Raises:
            TypeError: the interval has the wrong type.
            ValueError: the manager has no ``server_id``, or the interval is out of its bounds.

        Cost: as :meth:`update_server_heartbeat`, each time.

        """
        heartbeat = RepeatedServerHeartbeat(self.operations, interval_seconds)
        self._repeat(lambda: self._beat_for_server(heartbeat))

    def _repeat(self, step: Callable[[], float | None]) -> None:
        """Do the step until the manager is closed; it answers how many seconds to pause, or None to end."""
        running = _Repetition()
        try:
            with self._lock:
                if self._is_closed:
                    logger.error(
                        "the manager was already closed, so run_cleanup() or run_server_heartbeat() ends at once: "
                        "start it inside `with manager:`"
                    )
                    return
                self._repetitions.add(running)
            while not running.is_to_end:
                pause = step()
                if pause is None:
                    return
                running.pause(pause)
        finally:
            self._repetitions.discard(running)  # The first step: see _begin.
            with self._lock:
                self._changed.notify_all()

    def _beat_for_server(self, heartbeat: RepeatedServerHeartbeat) -> float | None:
        """Send one heartbeat of the server; give the seconds to pause, or None when another has replaced it."""
        try:
            is_known = self.update_server_heartbeat()
        except Exception as error:
            return heartbeat.fail(error)
        return heartbeat.succeed(is_known)

    def _clean_up_batch(
        self,
        cleanup: RepeatedCleanup,
        on_removed: Callable[[CleanupResult], object] | None,
    ) -> float:
        """Remove and report one batch; give the seconds to pause: 0 if there is more to remove."""
        try:
            done = self._run(cleanup.next())
        except Exception as error:
            return cleanup.fail(error)
        pause = cleanup.succeed(done)
        if on_removed is not None and (done.removed or done.detached):
            try:
                on_removed(CleanupResult(done.removed, None, done.detached))
            except Exception:
                cleanup.fail_to_report(done)
        return pause

    def pipeline(self, operations: Iterable[Operation[Result]]) -> list[Result]:
        """Run several operations in one round trip, each atomic in itself, in their order.

        ``manager.pipeline([manager.operations.update_heartbeat(sid) for sid in sids])``. A cluster serves them
        all from the namespace's one node.

        If one cannot run, because the server lost its script or is a replica, or (on a cluster) a node is away or the
        slot moves, it is sent again, together with those behind it that have only read or found nothing to do (unless
        one behind those has acted on the same connection). But those that have already changed something have then run
        before it (only a join that left no game is repeated, behind a call on the same connection; and one that found
        its game full may get a seat that one behind it has freed): if that would do harm, call the operations one by
        one.

        If the connection breaks before all replies are there, all are sent again. Those that change something answer as
        they did, but those that read, and heartbeats, then see what those behind them have done.

        Args:
            operations: descriptions, from :attr:`operations`.

        Returns:
            The result of each, in order.

        Raises:
            TypeError: one of them is not a description.
            ValueError: raised by :attr:`operations`, not by this method: with a ``server_id``, a registration or a
                server heartbeat cannot be described before ``start_server`` (the manager's own methods see to the
                start).
            PipelineError: some or all failed; its ``results`` holds what every one of them answered or met.

        Cost: one round trip, on a cluster one more for each different script; the sum of the operations in the server
        and, if there are several, a microsecond for each KB of their scripts' sources, which are sent along: 22 KB for
        a registration, 10 for an unregister, mostly 1 to 6.

        """
        return self._run(perform_all(check_operations(operations)))

    def subscribe(
        self, *, game_id: str | None = None, user_id: str | UUID | None = None, after: str | None = None
    ) -> Subscription:
        """Iterate over what happens, as the scripts that make the changes publish it.

        ``with manager.subscribe(game_id="chess-7") as events:`` and then ``for event in events:``. The
        subscription begins when the block is entered, and one ``Event`` comes for each change of a connection: in the
        whole namespace, in one game or of one user. Events that may be missing are not passed over in silence: the
        iteration ends with ``EventsLostError``. (Two exceptions: a subscription that is still at the position
        ``0-0/0``, begun before anything was published, cannot notice that the server has lost its data; nor one through
        pub/sub with RESP2 that the server has become a replica.)

        Through pub/sub it has a connection of its own, and events are lost when that breaks or they are read too
        slowly. A subscription to the stream loses none unless the stream is trimmed first: a fault is raised as by any
        operation, and the iteration may go on after it. While it waits, it takes a connection of the client's pool: one
        for all subscriptions of an event loop, one each in threads.

        Args:
            game_id: only the events of connections in this game (including those that leave it).
            user_id: only the events of this user's connections; not together with ``game_id``. With neither, all events
                of the namespace.
            after: begin after this position, ``Event.position``, ``GameSnapshot.position`` or
                ``EventsLostError.position``, instead of now; needs ``events="stream"``. Any other text is a ValueError.

        Returns:
            The subscription.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: events are off, arguments that exclude each other are given, or one is out of its bounds.
            EventsLostError: while it iterates: events may be missing. Read a snapshot and subscribe again, or read
                what is left of the stream, after the error's ``position``.
            PresenceError: when the block is entered or, with the stream, while it iterates: a fault.
            RuntimeError: it is iterated over without ``with``.

        Cost: a connection; through pub/sub, a command every ten seconds; with the stream, one or two round trips for
        each 100 changes of the namespace and, while nothing happens, each second one read by each subscription, and one
        wait on each connection that waits.

        """
        feed = Feed(self.operations, game_id, user_id, after)
        return Subscription(feed, self._run, self._client)

    def _client(self) -> Redis | RedisCluster:
        call = object()
        try:
            return self._begin(call).client
        finally:
            self._calls.pop(call, None)
            self._close_unused()

    def _begin(self, call: object) -> _OpenClient:
        """Give the client, opened if there is none, and note that this call uses it.

        A call must begin within a ``try`` and end in the first step of its ``finally``: then it does not matter where a
        signal handler raises. (Python looks for one after each call of a function.)
        """
        own_thread = threading.get_ident()
        while True:
            with self._lock:
                open_client = self._open_client
                if open_client is None or self._is_given_up(open_client):
                    open_client = self._open_client = _OpenClient(call)
                    self._is_closed = False
                elif not open_client.is_open and open_client.opener == own_thread:
                    # A signal handler cannot wait for the opening that it has interrupted: this client is for its call.
                    open_client = _OpenClient(call)
                    self._closing.append(open_client)
                self._calls[call] = own_thread, open_client
            if open_client.is_open or self._open(open_client):
                return open_client

    def _open(self, open_client: _OpenClient) -> bool:
        """Open a client, once for all who wait; tell whether it is open: not if its opener was interrupted."""
        if open_client.opener == threading.get_ident():
            self._try_to_open(open_client)
        else:
            with self._lock:
                while not open_client.has_tried and not self._is_given_up(open_client):
                    self._changed.wait(LONGEST_WAIT_SECONDS)
        if open_client.error is not None:
            raise open_client.error
        return open_client.is_open

    def _is_given_up(self, open_client: _OpenClient) -> bool:
        """Tell whether a client is not open, and nobody is about to open it, as after an interruption."""
        is_opening = not open_client.has_tried and self._calls.get(open_client.call, (0, None))[1] is open_client
        return not open_client.is_open and not is_opening

    def _try_to_open(self, open_client: _OpenClient) -> None:
        # Without a lock, since a cluster's client connects when it is made.
        try:
            open_client.client, open_client.tries_again = self._make_client()
            open_client.is_open = True
        except Exception as error:
            open_client.error = error
        finally:
            open_client.has_tried = True
            with self._lock:
                self._changed.notify_all()

    def _make_client(self) -> tuple[Redis | RedisCluster, bool]:
        if self._given_client is not None:
            return self._given_client, False
        address = self._address or addresses.parse_default(redis, type(self))
        tries_again = retrying.tries_again(address, self._client_options)
        pauses = retrying.cluster_pauses() if tries_again else iter(())
        while True:
            try:
                return clients.connect_blocking(address, self._client_options), tries_again
            except FAULTS as error:
                pause = next(pauses, None)
                if pause is None or not retrying.transient_faults([error]):
                    raise
                time.sleep(pause)

    def _close_unused(self) -> None:
        """Close what was put aside and serves no call any more (closing twice does no harm)."""
        while self._closing:
            with self._lock:
                in_use = self._in_use()
                unused = next((known for known in self._closing if known not in in_use), None)
            if unused is None:
                return
            if unused.is_open and self._given_client is None:
                with suppress(*FAULTS):  # Over TLS, the other end's farewell may not come. It is closed all the same.
                    unused.client.close()
            with self._lock:
                if unused in self._closing:
                    self._closing.remove(unused)
                self._changed.notify_all()

    def _run(self, asked: Operation[Result] | Exchange[Result]) -> Result:
        try:
            # What asks for nothing, such as for no ids, needs no client.
            request = (asked.command(),) if isinstance(asked, Operation) else next(asked)
        except StopIteration as finished:
            return finished.value  # type: ignore[no-any-return]
        call = object()
        try:
            try:
                open_client = self._begin(call)
            except FAULTS as error:
                # A cluster's client connects when it is made.
                raise explain(error) from error
            if isinstance(asked, Operation):
                # The answer of nearly every call, without the cost of a conversation.
                since = time.monotonic()
                (reply,) = self._send(open_client, request)
                if not isinstance(reply, Exception):
                    return asked.result(reply)
                exchange = recover(asked, reply, since)
                request = next(exchange)
            else:
                exchange = asked
            while True:
                request = exchange.send(self._send(open_client, request))
        except StopIteration as finished:
            return finished.value  # type: ignore[no-any-return]
        finally:
            self._calls.pop(call, None)
            self._close_unused()

    def _send(self, open_client: _OpenClient, request: Sequence[Command]) -> list[Any]:
        """Send commands together; give their replies, never decoded by the client, with errors in their places."""
        if isinstance(request, Repeated) and time.monotonic() > retrying.end_of(request):
            return [retrying.too_late()] * len(request)
        if not isinstance(open_client.client, RedisCluster):
            return self._send_once(open_client.client, request)
        replies: dict[int, Any] = {}
        for pause, part in retrying.attempts(request, replies, tries_again=open_client.tries_again):
            if pause:
                time.sleep(pause)
            replies |= zip(part, self._send_once(open_client.client, [*part.values()]), strict=True)
        return [*replies.values()]

    def _send_once(self, client: Redis | RedisCluster, request: Sequence[Command]) -> list[Any]:
        pool = pooling.pool_of(client)
        try:
            if pool is not None:
                return pooling.send(pool, request)
            if request[0][0] == SCRIPT_LOAD and isinstance(client, RedisCluster):
                # Only the node of the namespace needs a script, and a cluster's pipeline would not send it there.
                node = client.get_node_from_key(self.operations.last_seen_key)
                loads = [command for command in request if command[0] == SCRIPT_LOAD]
                replies = [client.execute_command(*command, target_nodes=node) for command in loads]
                for second in (command for command in loads if isinstance(command, SecondLoad)):
                    for other in client.get_primaries():
                        with suppress(*FAULTS, AttributeError, RuntimeError):  # A node may come or go meanwhile.
                            client.execute_command(*second, target_nodes=other)
                rest = request[len(loads) :]
                return replies + (self._send_once(client, rest) if rest else [])
            if len(request) == 1:
                return [client.execute_command(*request[0], **AS_BYTES)]  # type: ignore[no-untyped-call]
            pipeline: Any = client.pipeline(transaction=False)
            if isinstance(client, RedisCluster):
                # If the node is not named, it asks the default one, which may be down, for the keys of each call.
                options = {**AS_BYTES, "target_nodes": client.get_node_from_key(self.operations.last_seen_key)}
                commands = [PipelineCommand(command, {**options}, number) for number, command in enumerate(request)]
                # For redirections, see retrying.attempts.
                replies = pipeline.send_cluster_commands(commands, raise_on_error=False, allow_redirections=False)
            else:
                for command in request:
                    pipeline.execute_command(*command, **AS_BYTES)
                replies = pipeline.execute(raise_on_error=False)
        except (*FAULTS, AttributeError) as met:
            error = as_cluster_fault(met) if isinstance(client, RedisCluster) else met
            if not isinstance(error, FAULTS):
                raise
            return [error] * len(request)
        except BaseException:
            if pool is None:
                pooling.close_unread(client)
            raise
        return [as_cluster_fault(reply) for reply in replies] if isinstance(client, RedisCluster) else replies


connection_manager: ConnectionManager = ConnectionManager()
"""A ready-made manager, as :data:`presence.connection_manager` is for asyncio."""
