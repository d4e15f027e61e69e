"""Connections whose every write waits until it is let through, so that any client runs command by command."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from redis.asyncio.connection import Connection, ConnectionPool, UnixDomainSocketConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

if TYPE_CHECKING:
    from collections.abc import Iterable


class Crashed(asyncio.CancelledError):
    """The caller has died: nothing that it would still send is sent.

    A cancellation, as no code handles one by going on, and the caller need not be the task that writes.
    """


class Gate:
    """What one task is about to write. Open, it holds nothing back."""

    def __init__(self) -> None:
        self.is_open = True
        self.is_crashed = False
        self.waiting: bytes | None = None
        """What would be written now."""
        self._may_go: asyncio.Future[None] | None = None
        self._has_stopped: asyncio.Future[None] | None = None

    def close(self) -> asyncio.Future[None]:
        """Hold back what comes from now on; the future is done when something waits."""
        self.is_open = False
        return self._expect_stop()

    def _expect_stop(self) -> asyncio.Future[None]:
        self._has_stopped = asyncio.get_running_loop().create_future()
        return self._has_stopped

    def stopped(self) -> None:
        """Note that the task waits here, or has ended."""
        if self._has_stopped and not self._has_stopped.done():
            self._has_stopped.set_result(None)

    def let_through(self) -> asyncio.Future[None]:
        """Let one write through; the future is done when the task waits for the next, or has ended."""
        assert self._may_go is not None
        self.waiting = None
        stopped = self._expect_stop()
        self._may_go.set_result(None)
        return stopped

    def crash(self) -> None:
        """Let nothing through any more: whoever waits here to write dies, and whoever comes to write."""
        assert self._may_go is not None
        self.waiting = None
        self.is_crashed = True
        self._may_go.set_exception(Crashed)

    def open(self) -> None:
        """Hold nothing back any more."""
        self.is_open, self.is_crashed = True, False

    async def wait(self, written: bytes) -> None:
        """Wait until the write may go through."""
        if self.is_open:
            return
        if self.is_crashed:
            raise Crashed
        self.waiting = written
        self._may_go = asyncio.get_running_loop().create_future()
        self.stopped()
        await self._may_go


class _Gated:
    """Over a class of connections: a write, which may hold several commands, passes the gate first."""

    def __init__(self, *, gate: Gate, **options: Any) -> None:
        super().__init__(**options)
        self._gate = gate

    async def send_packed_command(self, command: bytes | str | Iterable[bytes], check_health: bool = True) -> None:
        if not self._gate.is_open:
            chunks = [command] if isinstance(command, str | bytes) else list(command)
            command = b"".join(chunk.encode() if isinstance(chunk, str) else bytes(chunk) for chunk in chunks)
            await self._gate.wait(command)
        await super().send_packed_command(command, check_health)  # type: ignore[misc]


class GatedConnection(_Gated, Connection):
    """Over TCP."""


class GatedUnixDomainSocketConnection(_Gated, UnixDomainSocketConnection):
    """Over a Unix domain socket."""


def gated_pool(url: str, gate: Gate) -> ConnectionPool:
    """Make a pool of the one connection that a task uses."""
    options: dict[str, Any] = dict(parse_url(url))
    is_local = options.pop("connection_class", Connection) is UnixDomainSocketConnection
    return ConnectionPool(
        connection_class=GatedUnixDomainSocketConnection if is_local else GatedConnection,
        max_connections=1,
        gate=gate,
        decode_responses=True,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=None,  # a write waits as long as the schedule lets it
        **options,
    )


def readable(written: bytes) -> str:
    """Show what was written as a person would type it: one command, or several with semicolons between them."""
    commands = []
    rest = written
    while rest:
        count, _, rest = rest[1:].partition(b"\r\n")
        words = []
        for _ in range(int(count)):
            length, _, rest = rest[1:].partition(b"\r\n")
            words.append(rest[: int(length)].decode(errors="replace"))
            rest = rest[int(length) + 2 :]
        commands.append(" ".join(word or "''" for word in words))
    return "; ".join(commands)
