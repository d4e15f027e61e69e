"""How the calls that one event loop awaits at the same time share a connection instead of taking one each.

Calls made within one turn of the loop go out in one write, heartbeats in a row as one command
(:mod:`presence.merging`), and the replies are handed out as they come. An exchange (:mod:`presence.exchanges`) notices
nothing: it gets the replies to its own commands, in their order.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from redis.asyncio.connection import AbstractConnection
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.exceptions import NoScriptError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from presence import clients, merging, retrying
from presence.commands import SCRIPT_LOAD, Repeated, pack, sent_again
from presence.errors import FAULTS, WRITE_REFUSALS, as_fault

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from redis.asyncio import ConnectionPool, Redis

    from presence.commands import Command

MAX_COMMANDS = 256
"""The most commands on the wire that are not answered yet, merged ones counted each; further ones wait."""

MAX_BYTES = 1 << 20
"""The most bytes of these commands; only a single request may be larger."""

REPLIES_PER_TURN = merging.MOST_MERGED
"""Replies that are handed out before the loop turns: the callers may ask again while the server is still at work."""

SESSION_SECONDS = 1.0
"""How long a connection is kept under load. Then the pool has it for a moment: others may wait for one, and the pool
may have things to do with it, such as renewing credentials."""

OF_ANOTHER_LOOP = "attached to a different loop"
"""What asyncio says of a connection that another event loop opened."""

_PLAIN_WRITES = (AbstractConnection.send_packed_command, clients.AsyncSentinelConnection.send_packed_command)
"""The methods that send to an open connection and do nothing else."""


class _Request:
    """Commands that are sent together, and the future for their replies."""

    __slots__ = (
        "answer",
        "asked_at",
        "calls",
        "commands",
        "mergeable",
        "packed",
        "replies",
        "since",
        "size",
        "taken_at",
    )

    def __init__(self, commands: Sequence[Command], answer: asyncio.Future[list[Any]], now: float) -> None:
        self.commands = commands
        self.calls = len(commands)
        self.mergeable = merging.shared_part(commands)
        """See there. What may be merged is packed when it is taken."""
        if self.mergeable is None:
            self.pack()
        else:
            self.packed, self.size = b"", 0
        self.replies: list[Any] = []
        self.answer = answer
        self.asked_at = now
        self.taken_at = 0.0
        """When it was first due to be sent by itself; like ``asked_at``, by the loop's clock."""
        self.since = now - (monotonic() - commands.since) if isinstance(commands, Repeated) else 0.0
        """When its calls were first to be sent, if it repeats some."""

    def pack(self) -> None:
        commands = self.commands
        self.packed = pack(commands[0]) if len(commands) == 1 else b"".join(map(pack, commands))
        self.size = len(self.packed)

    def parts(self) -> Sequence[_Request]:
        """Give the requests that it was made of."""
        return (self,)

    def is_done(self) -> bool:
        return self.answer.done()

    def finish(self, replies: list[Any]) -> None:
        try:  # noqa: SIM105  # suppress() costs a microsecond.
            self.answer.set_result(replies)
        except asyncio.InvalidStateError:
            pass  # It was cancelled, perhaps at this moment, by a signal handler such as asyncio.run's.

    def give_up_if_late(self, now: float) -> None:
        if self.since and now - self.since > retrying.RETRYING_SECONDS:
            self.finish([retrying.too_late()] * len(self.commands))

    def begin_anew(self) -> None:
        """Make it ready to be sent, marked as sent again if it may have been sent before."""
        self.replies = []
        if self.taken_at:
            self.packed = b"".join([pack(sent_again(command)) for command in self.commands])
            self.size = len(self.packed)


class _Merged(_Request):
    """Heartbeats that are sent as one command, if need be after the load of its script.

    It has no answer of its own: it is done when each of them is.
    """

    __slots__ = ("merge", "requests")

    def __init__(self, requests: Sequence[_Request], *, loads: bool = False) -> None:
        self.requests = requests
        self.merge = merging.Merge([request.commands[0] for request in requests])
        self.commands = (merging.LOAD, self.merge.command) if loads else (self.merge.command,)
        self.calls = len(requests)
        self.mergeable = None
        self.pack()
        self.replies = []
        self.asked_at = requests[0].asked_at
        self.taken_at = self.since = 0.0  # Heartbeats may be repeated at any time.

    def parts(self) -> Sequence[_Request]:
        return self.requests

    def is_done(self) -> bool:
        return all(request.is_done() for request in self.requests)

    def finish(self, replies: list[Any]) -> None:
        """Give all of them the last reply, an error."""
        self.hand_out(replies[-1:] * self.calls)

    def hand_out(self, replies: list[Any]) -> None:
        for request, reply in zip(self.requests, replies, strict=True):
            request.finish([reply])


class _Load:
    """A load of a script, for all calls that wait for it; when the last of them is cancelled, so is the load."""

    __slots__ = ("_waiting", "answer")

    def __init__(self, answer: asyncio.Future[list[Any]]) -> None:
        self.answer = answer
        self._waiting = 0

    def join(self) -> asyncio.Future[list[Any]]:
        self._waiting += 1
        waiter = asyncio.shield(self.answer)
        waiter.add_done_callback(self._leave)
        return waiter

    def _leave(self, _: object) -> None:
        self._waiting -= 1
        if not self._waiting:
            self.answer.cancel()  # Does nothing if it is there.


class SharedConnection:
    """Carries the requests of one event loop over one connection, taken from a client's pool while there are any.

    If the connection fails, or the server refuses a call because it became a replica or with an error that the client's
    ``retry_on_error`` names, what is not answered is sent again on a new connection, as the client's retry policy says:
    every script may run twice. Requests made meanwhile wait until that has succeeded or failed, so each gets as many
    attempts as it would alone. Requests made before, for which there was no room on the wire, have waited for all of
    these attempts, and fail with the rest.
    """

    def __init__(self, client: Redis) -> None:
        self._pool = client.connection_pool
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Request] = deque()
        self._sent: deque[_Request] = deque()
        self._refused: list[_Request] = []
        self._loads: dict[Command, _Load] = {}
        self._commands_sent = 0
        self._bytes_sent = 0
        self._runner: asyncio.Task[None] | None = None
        self._session_start = self._session_end = 0.0
        self._fault: Exception | None = None
        """Of the attempt before this one."""
        # The connection, while the runner is busy reading: then each new request must see to it that it is written.
        self._reading: AbstractConnection | None = None
        self._write_is_due = False

    def send(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        """Send commands together; give their replies as bytes, with errors in their places.

        If it is cancelled before they are sent, they are not; after that they take effect and nobody gets the replies.
        """
        if len(commands) == 1 and commands[0][0] == SCRIPT_LOAD:
            return self._load(commands)
        return self._ask(commands, self._waiting.append)

    def _load(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        """Load a script once for all who miss it at the same time: after a failover these are thousands."""
        load = self._loads.get(commands[0])
        if load is None or load.answer.cancelled():
            # Before all that waits, much of which would miss the script as well.
            load = self._loads[commands[0]] = _Load(self._ask(commands, self._waiting.appendleft))
            # Those run first whose replies were handed out in the same turn, before that of the load.
            load.answer.add_done_callback(partial(self._forget_load, commands[0], load))
        return load.join()

    def _forget_load(self, command: Command, load: _Load, _: object) -> None:
        if self._loads.get(command) is load:
            del self._loads[command]

    def _ask(self, commands: Sequence[Command], enqueue: Callable[[_Request], None]) -> asyncio.Future[list[Any]]:
        answer: asyncio.Future[list[Any]] = self._loop.create_future()
        enqueue(_Request(commands, answer, self._loop.time()))
        # Both run after everything that is ready now, so they find all requests of this turn.
        if self._runner is None or self._runner.done():
            self._start()
        elif self._reading is not None and not self._write_is_due:
            self._write_is_due = True
            self._loop.call_soon(self._write_beside)
        return answer

    def _start(self) -> None:
        # Not through the loop's task factory: an eager task would begin, and might even end, within this call.
        self._runner = asyncio.Task(self._run(), loop=self._loop)
        # Not in the `finally` of its coroutine, which a task that is cancelled before it has begun never reaches.
        self._runner.add_done_callback(self._go_on)

    def _go_on(self, ended: asyncio.Task[None]) -> None:
        if not ended.cancelled():
            # Asked for, or asyncio would log it: what a signal handler raised in there has ended the loop already.
            ended.exception()
        if self._runner is not ended:
            return  # A call has already started another.
        self._runner = None
        if self._waiting:
            self._start()

    async def aclose(self) -> None:
        """Give the connection back to the pool; by now, nobody waits for a reply."""
        if self._runner is not None:
            if self._sent:
                self._runner.cancel()
            await asyncio.wait([self._runner])

    async def _run(self) -> None:
        try:
            while self._take():
                self._session_start = self._loop.time()
                connection = await self._take_connection()
                if connection is None:
                    continue
                try:
                    await self._use(connection)
                finally:
                    try:  # noqa: SIM105  # suppress() costs a microsecond.
                        await self._pool.release(connection)
                    except FAULTS:
                        pass  # It cannot renew its credentials. The pool has it all the same.
                    # Others that wait for a connection of the pool come first.
                    await asyncio.sleep(0)
        except Exception as error:
            for request in self._take_unanswered():
                with suppress(asyncio.InvalidStateError):  # See _Request.finish.
                    request.answer.set_exception(error)
        except BaseException:
            # Code that cancels all tasks, as asyncio.run does at its end, cancels this one, but not calls made after
            # that, such as an unregister in a `finally`. Nor does a signal handler that raises in here.
            self._waiting = deque(self._take_unanswered())
            raise

    async def _take_connection(self) -> AbstractConnection | None:
        """Take a connection out of the pool; None after a fault, of which all who wait are told."""
        failures = 0
        while True:
            try:
                connection: AbstractConnection = await self._pool.get_connection()
            except BaseException as met:
                error = as_fault(met)
                if not isinstance(error, RedisError):
                    # Perhaps while a connection was greeted: then redis-py has put it back as if it were ready.
                    await _close_free(self._pool)
                if not isinstance(error, FAULTS):
                    raise
                failures += 1
                if retrying.opens_again(error, self._pool, failures):
                    continue
                self._fail(error)
                return None
            return connection

    def _take_unanswered(self) -> list[_Request]:
        """Take all that is not answered off the wire, as if nothing of it had been sent."""
        # A request that was moving from one to another when a signal handler raised is in both.
        listed = dict.fromkeys(
            part for request in (*self._refused, *self._sent, *self._waiting) for part in request.parts()
        )
        requests = [request for request in listed if not request.is_done()]
        for taken_from in (self._refused, self._sent, self._waiting):
            taken_from.clear()
        self._commands_sent = self._bytes_sent = 0
        for request in requests:
            request.begin_anew()
        return requests

    async def _use(self, connection: AbstractConnection) -> None:
        """Converse over a connection until there is nothing left to send, or it was kept for long enough."""
        if getattr(connection._reader, "_loop", self._loop) is not self._loop:
            # Otherwise the requests would reach the server, and then asyncio would refuse to read the replies.
            raise RuntimeError(OF_ANOTHER_LOOP)
        self._session_end = self._loop.time() + SESSION_SECONDS
        self._fault = None
        for request in self._sent:
            request.give_up_if_late(self._loop.time())  # It may have waited for the connection.
        self._write_is_due = False  # Even if a signal handler has kept one from being made.
        try:
            await connection.retry.call_with_retry(
                partial(self._attempt, connection), partial(self._disconnect, connection)
            )
        except BaseException as error:
            if self._sent or isinstance(error, ReadOnlyError):
                # Replies may still come, and must not reach the next user of the connection; or it leads to a replica.
                await connection.disconnect(nowait=True)
            if not isinstance(error, FAULTS):
                raise
            self._fail(error)

    async def _disconnect(self, connection: AbstractConnection, error: Exception) -> None:
        # The next attempt is for what is not answered yet. What waits gets attempts of its own after it.
        self._session_end = 0
        self._fault = error
        await connection.disconnect(nowait=True)
        self._give_up_the_late(error)

    def _give_up_the_late(self, error: Exception) -> None:
        """Answer the requests that may not be sent again any more."""
        self._give_up(error, self._loop.time() - retrying.RETRYING_SECONDS)

    def _give_up(self, error: Exception, taken_before: float) -> None:
        for request in self._refused:
            if (request.since or request.taken_at) < taken_before:
                request.finish(request.replies)
        for request in self._sent:
            if (request.since or request.taken_at) < taken_before:
                request.finish([error] * len(request.commands))

    def _fail(self, error: Exception) -> None:
        """Answer everything that was sent, or was to be, with an error."""
        self._give_up(error, math.inf)
        if self._sent:  # Otherwise the error is only the answer to the refused ones.
            # Requests that found no room have waited for as many attempts; the queue must not grow in an outage.
            for request in tuple(self._waiting):
                if request.asked_at <= self._session_start:
                    request.finish([error] * len(request.commands))
        self._refused.clear()
        self._sent.clear()
        self._commands_sent = self._bytes_sent = 0

    def _keep_unanswered(self) -> None:
        """Choose what is to be sent again."""
        self._sent = deque(request for request in (*self._refused, *self._sent) if not request.is_done())
        self._refused.clear()
        self._commands_sent = self._bytes_sent = 0
        for request in self._sent:
            if self._fault is not None:
                request.begin_anew()
            self._commands_sent += request.calls
            self._bytes_sent += request.size

    async def _attempt(self, connection: AbstractConnection) -> None:
        try:
            await self._converse(connection)
        except WRITE_REFUSALS as error:
            fault = as_fault(error)
            if fault is error:
                raise
            raise fault from error

    async def _converse(self, connection: AbstractConnection) -> None:
        """Send what is to be sent, again if it was sent before, and more as it comes, until all is answered."""
        self._keep_unanswered()
        if self._sent and self._fault is not None and not connection.is_connected:
            # Before it sends, as connecting may take as long as its timeouts allow.
            await retrying.connect_once(connection)
            self._give_up_the_late(self._fault)
            self._keep_unanswered()
        if not self._sent:
            return
        packed = b"".join([request.packed for request in self._sent])
        if connection.is_connected and not connection.health_check_interval and _writes_plainly(connection):
            _write(connection, packed)
        else:
            # It has more to do first: connecting, a health check, or what its class adds.
            await connection.send_packed_command(packed)
        try:
            while self._sent:
                if self._runner is not None and self._runner.cancelling():
                    # Python 3.11's asyncio.wait_for, through which redis-py connects, can swallow a cancellation.
                    raise asyncio.CancelledError
                self._reading = connection
                await self._read(connection)
                self._reading = None
                await asyncio.sleep(0)  # Now the callers that got replies run.
                taken = self._take_more(connection)
                if taken and _writes_plainly(connection):
                    _write(connection, taken)
                elif taken:
                    await connection.send_packed_command(taken, check_health=False)
        finally:
            self._reading = None
        if self._refused:
            # redis-py tries again on a new connection if it was told to, as presence's own clients are.
            raise self._refused[0].replies[0]

    async def _read(self, connection: AbstractConnection) -> None:
        """Hand out some replies."""
        sent = self._sent
        try:
            # The connection's own timeout would be set anew for each reply, at several times the cost of reading it.
            seconds, since = connection.socket_timeout, self._loop.time()
            async with asyncio.timeout(seconds) as limit:
                handed_out = 0
                while handed_out < REPLIES_PER_TURN:
                    reply: Any
                    try:
                        reply = await connection.read_response(disable_decoding=True, timeout=math.inf)
                    except ResponseError as error:
                        reply = error
                    if reply is None:
                        # No script answers None. redis-py does for a TimeoutError, even the socket's own (ETIMEDOUT),
                        # and would do so for each reply: the connection stays broken.
                        raise TimeoutError
                    if seconds is not None and (now := self._loop.time()) > since + seconds / 10:
                        limit.reschedule(now + seconds)  # The next reply has as much time, to within a tenth.
                        since = now
                    request = sent[0]
                    request.replies.append(reply)
                    handed_out += 1
                    if len(request.replies) < len(request.commands):
                        continue
                    is_alone = request.calls == 1
                    # At each moment the request is answered or listed, as a signal handler may raise here.
                    if isinstance(request, _Merged):
                        handed_out += request.calls - 1
                        self._answer_merged(request, reply)
                    elif is_alone and isinstance(reply, ResponseError) and _is_to_be_retried(connection, reply):
                        self._refused.append(request)
                    else:
                        request.finish(request.replies)
                    sent.popleft()
                    self._commands_sent -= request.calls
                    self._bytes_sent -= request.size
                    if not sent:
                        break
        except TimeoutError:
            raise RedisTimeoutError(f"Timeout reading from {connection!r}") from None

    def _answer_merged(self, merged: _Merged, reply: Any) -> None:
        """Answer merged heartbeats; if they have failed together, they are sent again before all that waits."""
        replies = merged.merge.replies(reply)
        if replies is not None:
            merged.hand_out(replies)
        elif isinstance(reply, NoScriptError) and len(merged.commands) == 1:
            self._waiting.appendleft(_Merged(merged.requests, loads=True))
        else:
            for request in reversed(merged.requests):
                request.mergeable = None
                request.pack()
                self._waiting.appendleft(request)

    def _take(self) -> list[bytes]:
        """Take as many waiting requests as may be sent now, and count them as sent; give their commands, packed."""
        taken: list[bytes] = []
        now = self._loop.time()
        while self._waiting and self._commands_sent < MAX_COMMANDS:
            request, places = self._waiting[0], 1
            if request.mergeable is not None:
                request, places = self._merge_first()
            request.give_up_if_late(now)
            if not request.is_done():
                if not request.packed:
                    request.pack()
                if self._sent and (
                    self._commands_sent + request.calls > MAX_COMMANDS or self._bytes_sent + request.size > MAX_BYTES
                ):
                    break
                request.taken_at = request.taken_at or now
                taken.append(request.packed)
                self._sent.append(request)
                self._commands_sent += request.calls
                self._bytes_sent += request.size
            for _ in range(places):
                self._waiting.popleft()
        return taken

    def _merge_first(self) -> tuple[_Request, int]:
        """Make the first that wait in a row one request, as far as they can be merged; tell how many that are."""
        most = min(merging.MOST_MERGED, MAX_COMMANDS - self._commands_sent)
        first = self._waiting[0]
        row: list[_Request] = []
        places = 0
        for request in self._waiting:
            if request.mergeable != first.mergeable or len(row) == most:
                break
            if not request.is_done():
                row.append(request)
            places += 1
        return _Merged(row) if len(row) > 1 else (*row, first)[0], places

    def _take_more(self, connection: AbstractConnection) -> bytes:
        # Without a connection, requests go on waiting: the reader meets the fault.
        if connection.is_connected and not self._refused and self._loop.time() < self._session_end:
            return b"".join(self._take())
        return b""

    def _write_beside(self) -> None:
        """Write what came while replies are read; if the connection does more, the reader writes between replies."""
        self._write_is_due = False
        connection = self._reading
        if connection is not None and _writes_plainly(connection):
            try:
                taken = self._take_more(connection)
                if taken:
                    _write(connection, taken)
            except BaseException:
                # A signal handler raised: what counts as sent may not be on the wire, so all of it begins anew.
                if self._runner is not None:
                    self._runner.cancel()
                raise


async def _close_free(pool: ConnectionPool) -> None:
    """Close the connections of a pool that are not in use, and those to the sentinels that it asks."""
    pools = [pool]
    if isinstance(pool, SentinelConnectionPool):
        pools += [sentinel.connection_pool for sentinel in pool.sentinel_manager.sentinels]
    for each in pools:
        with suppress(*FAULTS):  # Over TLS, the other end's farewell may not come. It is closed all the same.
            await each.disconnect(inuse_connections=False)


def _is_to_be_retried(connection: AbstractConnection, error: ResponseError) -> bool:
    named: Any = connection.retry_on_error
    return isinstance(error, (ReadOnlyError, *named))


def _writes_plainly(connection: AbstractConnection) -> bool:
    """Tell whether its class only writes: another may count or delay what it sends."""
    return type(connection).send_packed_command in _PLAIN_WRITES


def _write(connection: AbstractConnection, packed: bytes) -> None:
    """Write without waiting: what is on the wire is bounded, and the reader meets a fault and the timeout.

    redis-py's own way waits until the system has taken the bytes; Python 3.11 makes a task and a timer for that.
    """
    try:  # noqa: SIM105  # suppress() costs a microsecond.
        connection._writer.write(packed)  # type: ignore[union-attr]  # It is connected.
    except RuntimeError:
        pass  # This is how uvloop says that it is closed; the reader is about to be told.
