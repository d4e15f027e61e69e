"""Subscriptions to events: what a feed of events is, without I/O, and the two kinds that carry it.

Through pub/sub a subscription has a connection of its own, outside the client's pool. That is never opened again: what
was published meanwhile would be missing, so its end is an :class:`presence.EventsLostError`. The stream is read with
the client like any other operation, and a fault there loses nothing.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, Self

import redis
import redis.asyncio
from redis.exceptions import MovedError, ReadOnlyError, ResponseError

from presence import arguments
from presence.cancellation import heeding_cancellation
from presence.errors import (
    FAULTS,
    WRITE_REFUSALS,
    EventsLostError,
    ServerUnreachableError,
    UnexpectedReplyError,
    as_fault,
    explain,
    unreadable,
)
from presence.exchanges import perform
from presence.operations import EVENTS_BATCH_SIZE
from presence.replies import Position, parse_message

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from types import TracebackType
    from uuid import UUID

    from presence.commands import Command
    from presence.exchanges import Exchange
    from presence.operations import Operations
    from presence.results import Event

MAX_BLOCK_MS = 1000
"""How long the server holds a read of the stream for new events."""

LATE_MS = 150
"""How much later the server may end such a wait: it looks ten times a second."""

ASKING_SECONDS = 10
"""How often the server is asked, through pub/sub, whether it is still there and the primary, and how long it may be
silent after that."""

OVERDUE_SECONDS = 1
"""How much longer an answer is looked for that seems to be missing."""

LEAVING_SECONDS = 1
"""How long a task that was cancelled may take to leave a subscription to the next one: a turn of the loop, or, where
Python 3.11's asyncio.wait_for has swallowed the cancellation, until the reply that it waits for is there."""

LEAST_WAIT_SECONDS = 0.001
"""The shortest wait, to see what has come meanwhile."""

READ_BYTES = 1 << 16
"""About how much of the stream is read at once: the asyncio client's timeout is for the whole of a reply."""

FIRST_READ = 20
"""How many changes are read before it is known how much they take."""

_BEYOND = Position(number=10**15 - 1)
"""No stream has come this far: reading after it tells where the stream ends."""

_CONNECTION_LOST = "the connection broke, or the server ended it because its events were read too slowly"
_NO_PRIMARY = "the server is no longer the primary, so events may be published elsewhere"


class _Received:
    """What was read at once: its events, how many of them were given out, and the positions before and after it."""

    __slots__ = ("before", "end", "events", "given")

    def __init__(self, before: Position, events: Sequence[Event], end: Position) -> None:
        self.before = before
        self.events = events
        self.given = 0
        self.end = end


class Feed:
    """What one subscription is about, how far it has come, and what it makes of what the server says."""

    def __init__(
        self, operations: Operations, game_id: str | None, user_id: str | UUID | None, after: str | None
    ) -> None:
        if operations.events_mode == "off":
            raise ValueError(
                'events are off: make the managers of all game servers with events="pubsub" or events="stream"'
            )
        if game_id is not None and user_id is not None:
            raise ValueError("at most one of game_id and user_id can be given; for both, subscribe twice")
        self.is_stream: bool = operations.events_mode == "stream"
        if after is not None and not self.is_stream:
            raise ValueError('after needs events="stream": pub/sub keeps nothing')
        self._operations = operations
        start = _BEYOND if after is None else Position.parse(after)
        # Replaced as a whole, so that an interruption here loses nothing.
        self._received = _Received(start, (), start)
        self._game_id = self._user_id = None
        self._absent_key = operations.absent_key
        self._due_at = 0.0
        """When the server is asked next through pub/sub, or its answer is missed."""
        self._is_asked = self._is_overdue = False
        self._limit = FIRST_READ
        self.is_at_end: bool = False
        self.key: bytes = operations.events_key
        self.channel: bytes = self.key
        if game_id is not None:
            self._game_id = game_id
            self.channel += b":game:" + arguments.encode("game_id", game_id)
        elif user_id is not None:
            user_bytes = arguments.encode_user_id("user_id", user_id)
            self._user_id = user_bytes.decode()
            self.channel += b":user:" + user_bytes

    @property
    def position(self) -> str | None:
        """The position of the last event that was given, or beyond it if what followed is not asked for."""
        received = self._received
        if self.has_events and received.given:
            return received.events[received.given - 1].position
        reached = received.before if self.has_events else received.end
        return reached.text() if self.is_stream and reached is not _BEYOND else None

    @property
    def has_events(self) -> bool:
        """Whether an event was received that was not given yet."""
        return self._received.given < len(self._received.events)

    def give(self) -> Event:
        """Give the next event that was received."""
        received = self._received
        event = received.events[received.given]
        # Last: no signal handler runs between this and the return, as Python looks for one only at calls and jumps.
        # (Nor in a `for` before its variable is set; but in `event = next(events)` one may.)
        received.given += 1
        return event

    def _concerns(self, event: Event) -> bool:
        if self._game_id is not None:
            return event.connection.game_id == self._game_id
        return self._user_id is None or event.connection.user_id == self._user_id

    def start(self) -> Exchange[None]:
        """Converse with the server to find where the stream ends.

        Pub/sub needs it as well: an ordinary call meets a fault with the client's retries, and leads a cluster's client
        to the node that has the namespace now.
        """
        batch = yield from perform(self._operations.read_events(_BEYOND))
        if self._received.end is _BEYOND:
            self._received = _Received(batch.position, (), batch.position)

    def read(self) -> Exchange[None]:
        """Converse with the server to read on in the stream."""
        before = self._received.end
        try:
            batch = yield from perform(self._operations.read_events(before, self._limit))
        except ServerUnreachableError:
            self._limit = 1  # Perhaps they are too large now to arrive in time.
            raise
        if batch.bytes_of_a_change:
            self._limit = min(max(1, READ_BYTES // batch.bytes_of_a_change), EVENTS_BATCH_SIZE)
        if batch.beginning is not None:
            reason = "the stream was trimmed up to the position, or is another one now"
            raise EventsLostError(reason, batch.beginning.text())
        self.is_at_end = batch.position == before
        self._received = _Received(before, list(filter(self._concerns, batch.events)), batch.position)

    def wait(self, socket_timeout: float | None) -> Exchange[Exception | None]:
        """Converse with the server to wait a moment for what is new in the stream; give the fault, if any."""
        block_ms = MAX_BLOCK_MS
        if socket_timeout is not None:
            # Well under the client's own timeout, which would take the wait for a fault.
            timeout_ms = int(socket_timeout * 1000)
            block_ms = max(1, min(MAX_BLOCK_MS, timeout_ms // 2, timeout_ms - LATE_MS))
        last = self._received.end.entry_id.encode()
        # In lower case: a client with a cache would take XREAD for a read that it has to cache.
        (reply,) = yield [("xread", b"BLOCK", b"%d" % block_ms, b"COUNT", b"1", b"STREAMS", self.key, last)]
        # A primary that becomes a replica ends all waits like this; the next read decides what to make of it.
        is_over = not isinstance(reply, Exception) or str(reply).startswith("UNBLOCKED")
        return None if is_over else reply

    def begin(self) -> None:
        """Note that it is subscribed now, through pub/sub."""
        self._is_asked = self._is_overdue = False
        self._due_at = monotonic() + ASKING_SECONDS

    def take(self, reply: Any) -> None:
        """Receive the events in what came through pub/sub, or the answer to what was asked."""
        self._is_asked = self._is_overdue = False
        if isinstance(reply, (ReadOnlyError, MovedError)):
            raise EventsLostError(_NO_PRIMARY) from reply
        kind, *rest = reply if isinstance(reply, list) else (reply,)
        if kind == b"sunsubscribe":
            raise EventsLostError("the namespace's slot has moved to another node of the cluster")
        if kind == b"smessage":
            try:
                self._received = _Received(_BEYOND, tuple(filter(self._concerns, parse_message(rest[1]))), _BEYOND)
            except ValueError as error:
                raise unreadable(error) from error

    def seconds_until_question(self) -> float:
        """How long to wait for what comes through pub/sub before it is time to ask."""
        return max(self._due_at - monotonic(), LEAST_WAIT_SECONDS)

    def question(self, connection: Any) -> Command | None:
        """Give what to ask the server now, if it is time.

        A write tells whether it is still the primary: it deletes a key that is never there. (With RESP2, a connection
        that is subscribed can only ping.) What a replica passes on begins with a gap, and may end unnoticed.
        """
        now = monotonic()
        if now < self._due_at:
            return None
        if self._is_overdue:
            raise EventsLostError("the server does not answer on the connection any more")
        if self._is_asked:
            # The answer may be here, unread, if this process was busy elsewhere: then the next read finds it.
            self._is_overdue, self._due_at = True, now + OVERDUE_SECONDS
            return None
        self._is_asked, self._due_at = True, now + ASKING_SECONDS
        return ("DEL", self._absent_key) if str(connection.protocol) == "3" else ("PING",)


def _own_connection(source: Any) -> Any:
    """Make a connection like those of a pool or node, but without decoding, as redis-py 7.4's ``can_read`` would do."""
    return source.connection_class(**(source.connection_kwargs | {"decode_responses": False}))


class _Subscription:
    """What the asyncio and the blocking subscription have in common."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._is_open: bool | None = None
        self._closes = 0
        """How often it was closed: perhaps elsewhere, while it began."""
        self._lost: EventsLostError | None = None
        self._connection: Any = None
        """Through pub/sub, its own."""
        self._socket_timeout: float | None = None

    @property
    def position(self) -> str | None:
        """The position in the stream that it has reached: ``subscribe(after=position)`` goes on where this one is.

        It is that of the last event, or beyond it if what followed was not asked for. None through pub/sub, and before
        the block is entered (unless ``after`` was given).
        """
        return self._feed.position

    def _check_that_it_was_entered(self, how: str) -> None:
        """Refuse to iterate if the block was never entered: it would be over at once, as if nothing had happened."""
        if self._is_open is None:
            raise RuntimeError(
                f"the subscription has not begun: enter it first, {how} manager.subscribe(...) as events"
            )

    def _check_that_nothing_is_lost(self) -> None:
        """Raise at every step of the iteration that events are lost, if they are."""
        if self._lost is not None:
            raise self._lost.with_traceback(None)  # Otherwise it would keep the frames of each time.

    def _lose(self, error: Exception) -> None:
        """Note that events are lost."""
        if not isinstance(error, EventsLostError):
            lost = EventsLostError(_CONNECTION_LOST)
            lost.__cause__ = error
            error = lost
        self._lost = error


class AsyncSubscription(_Subscription):
    """The events that ``ConnectionManager.subscribe`` was asked for; ``async with`` it, then ``async for`` over it.

    Cancelling a wait for the next event, as ``asyncio.wait_for`` does, loses none. It is for one task only.
    """

    def __init__(
        self,
        feed: Feed,
        run: Callable[[Exchange[Any]], Awaitable[Any]],
        wait: Callable[[Exchange[Exception | None]], Awaitable[Exception | None]],
        client: Callable[[], redis.asyncio.Redis | redis.asyncio.RedisCluster],
    ) -> None:
        super().__init__(feed)
        self._run = run
        self._wait = wait
        self._client = client
        self._waiting: asyncio.Task[Any] | None = None
        """The task that waits for the next event."""
        self._is_free = asyncio.Event()

    async def __aenter__(self) -> Self:
        feed, closes = self._feed, self._closes
        await self._run(feed.start())
        self._lost = None
        client = self._client()
        source: Any = (
            client.get_node_from_key(feed.key)  # type: ignore[arg-type]
            if isinstance(client, redis.asyncio.RedisCluster)
            else client.connection_pool
        )
        self._socket_timeout = source.connection_kwargs.get("socket_timeout")
        if not feed.is_stream:
            connection = _own_connection(source)
            try:
                with heeding_cancellation():
                    await connection.connect()
                    await connection.send_command("SSUBSCRIBE", feed.channel)
                    await connection.read_response(disable_decoding=True, push_request=True)
                    feed.begin()
                    self._connection = connection
            except BaseException as met:
                self._connection = connection
                await self.aclose()
                error = as_fault(met)
                if isinstance(error, FAULTS):
                    raise explain(error) from error
                raise
        self._is_open = True
        if self._closes != closes:
            await self.aclose()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the subscription; an ``async for`` that waits in another task ends.

        Where another task is just entering the block, it ends as soon as that has succeeded.
        """
        self._closes += 1
        self._is_open = False
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        task = asyncio.current_task()
        waiting = self._waiting
        if waiting is not None and waiting is not task and waiting.cancelling():
            with suppress(TimeoutError):
                async with asyncio.timeout(LEAVING_SECONDS):
                    await self._is_free.wait()
        if self._waiting not in (None, task):
            raise RuntimeError("another task waits for this subscription's next event: subscribe once for each task")
        try:
            self._waiting = task
            self._is_free.clear()
            while self._is_open:
                if self._feed.has_events:
                    return self._feed.give()
                self._check_that_nothing_is_lost()
                if self._feed.is_stream:
                    await self._run(self._feed.read())
                    if self._feed.is_at_end:
                        fault = await self._wait(self._feed.wait(self._socket_timeout))
                        if fault is not None:
                            raise explain(fault)
                else:
                    await self._receive()
        finally:
            self._waiting = None
            self._is_free.set()
        self._check_that_it_was_entered("async with")
        raise StopAsyncIteration

    async def _receive(self) -> None:
        connection, feed = self._connection, self._feed
        try:
            try:
                # A message that is incomplete when the wait ends, or is cancelled, stays in the connection's buffer.
                reply = await connection.read_response(
                    disable_decoding=True,
                    timeout=feed.seconds_until_question(),
                    disconnect_on_error=False,
                    push_request=True,
                )
            except ResponseError as refusal:
                reply = refusal
            if reply is not None:
                feed.take(reply)
            question = feed.question(connection)
            if question:
                with heeding_cancellation():
                    await connection.send_command(*question, check_health=False)
        except (*FAULTS, EventsLostError, *WRITE_REFUSALS) as met:
            error = as_fault(met)
            if isinstance(error, WRITE_REFUSALS):
                raise
            if self._is_open:
                self._lose(error)


class Subscription(_Subscription):
    """The events that ``ConnectionManager.subscribe`` was asked for; ``with`` it, then ``for`` over it, in one thread.

    ``close()`` in another thread ends the loop.
    """

    def __init__(
        self,
        feed: Feed,
        run: Callable[[Exchange[Any]], Any],
        client: Callable[[], redis.Redis | redis.RedisCluster],
    ) -> None:
        super().__init__(feed)
        self._run = run
        self._client = client
        self._is_receiving = False
        """Whether a read of what comes through pub/sub has begun and not ended in good order."""

    def __enter__(self) -> Self:
        feed, closes = self._feed, self._closes
        self._run(feed.start())
        self._lost = None
        client: Any = self._client()
        if isinstance(client, redis.RedisCluster):
            client = client.get_redis_connection(client.get_node_from_key(feed.key))
        source = client.connection_pool
        self._socket_timeout = source.connection_kwargs.get("socket_timeout")
        if not feed.is_stream:
            connection = _own_connection(source)
            self._is_receiving = False
            try:
                connection.connect()
                connection.send_command("SSUBSCRIBE", feed.channel)
                connection.read_response(disable_decoding=True, push_request=True)
                feed.begin()
                self._connection = connection
            except BaseException as error:
                self._connection = connection
                self.close()
                if isinstance(error, FAULTS):
                    raise explain(error) from error
                raise
        self._is_open = True
        if self._closes != closes:
            self.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the subscription; a ``for`` that waits in another thread ends.

        Where another thread is just entering the block, it ends as soon as that has succeeded.
        """
        self._closes += 1
        self._is_open = False
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        while self._is_open:
            if self._feed.has_events:
                return self._feed.give()
            self._check_that_nothing_is_lost()
            if self._feed.is_stream:
                self._run(self._feed.read())
                if self._feed.is_at_end:
                    fault = self._run(self._feed.wait(self._socket_timeout))
                    if fault is not None:
                        raise explain(fault)
            else:
                self._receive()
        self._check_that_it_was_entered("with")
        raise StopIteration

    def _receive(self) -> None:
        connection, feed = self._connection, self._feed
        if self._is_receiving:
            self._lose(EventsLostError("a read was interrupted, such as by a signal handler that raised"))
            return
        self._is_receiving = True
        try:
            if connection.can_read(timeout=feed.seconds_until_question()):
                try:
                    reply = connection.read_response(
                        disable_decoding=True, disconnect_on_error=False, push_request=True
                    )
                except ResponseError as refusal:
                    reply = refusal
                feed.take(reply)
            question = feed.question(connection)
            if question:
                connection.send_command(*question, check_health=False)
            self._is_receiving = False
        except (*FAULTS, EventsLostError) as error:
            if self._is_open:
                self._lose(error)
        except UnexpectedReplyError:
            self._is_receiving = False
            raise
        except Exception:
            # A socket that another thread closes under a read fails in more ways.
            if self._is_open:
                raise
