"""Proxies in front of a real server, to break what no server breaks when it is asked to."""

from __future__ import annotations

import asyncio
import enum
import select
import socket
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import ssl
    from types import TracebackType

BOUND_SECONDS = 10
CHUNK = 1 << 20


class Fate(enum.Enum):
    """What happens to one request that runs a script."""

    PASS = enum.auto()
    LOSE_REQUEST = enum.auto()
    """The connection breaks before the server gets it."""
    LOSE_REPLY = enum.auto()
    """The connection breaks after the server has run it."""
    HOLD_REPLY = enum.auto()
    """The reply waits for ``release()``."""
    HOLD_REQUEST = enum.auto()
    """The request itself does, and then reaches the server, whether the client is still there or not."""


class Proxy:
    """Passes bytes between its clients and the server on a port of the loopback; its clients' side may be TLS.

    The requests with the ``command``, EVALSHA, meet the ``fates`` in their order; when these are used up, they pass.
    (What the tests send at once is small enough to arrive at once.) ``server_port`` may change: connections that are
    opened later lead there. ``accepted`` counts the connections, and each waits for ``delay`` seconds before it leads
    to the server. While it ``is_silent``, what comes from either side goes nowhere.
    """

    def __init__(self, server_port: int, *, tls: ssl.SSLContext | None = None) -> None:
        self.server_port = server_port
        self.command = b"EVALSHA"
        self.fates: list[Fate] = []
        self.port = 0
        self.accepted = 0
        self.delay = 0.0
        self.is_silent = False
        self.is_holding = threading.Event()
        self._tls = tls
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    @property
    def url(self) -> str:
        return f"{'rediss' if self._tls else 'redis'}://127.0.0.1:{self.port}/0"

    def release(self) -> None:
        """Let what is held pass."""
        self._loop.call_soon_threadsafe(self._released.set)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(BOUND_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(BOUND_SECONDS)
        assert not self._thread.is_alive()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._released, self._ended = asyncio.Event(), asyncio.Event()
        self._connections: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0, ssl=self._tls)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._ended.wait()
        server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connect(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self.accepted += 1
        connection = _Connection(self)
        writers = [to_client]
        try:
            await asyncio.sleep(self.delay)
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self.server_port)
            writers.append(to_server)
            pumps = [
                asyncio.ensure_future(connection.pass_requests(from_client, to_server)),
                asyncio.ensure_future(connection.pass_replies(from_server, to_client)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for writer in writers:
                writer.transport.abort()
            self._connections.discard(task)

    async def hold(self) -> None:
        self.is_holding.set()
        await self._released.wait()


class _Connection:
    """One client's connection through the proxy."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._fate = Fate.PASS

    async def pass_requests(self, from_client: asyncio.StreamReader, to_server: asyncio.StreamWriter) -> None:
        while chunk := await from_client.read(CHUNK):
            if self._proxy.is_silent:
                continue
            if self._proxy.command in chunk:
                self._fate = self._proxy.fates.pop(0) if self._proxy.fates else Fate.PASS
            if self._fate is Fate.LOSE_REQUEST:
                return
            if self._fate is Fate.HOLD_REQUEST:
                await self._proxy.hold()
            to_server.write(chunk)
            await to_server.drain()
            if self._fate is Fate.HOLD_REQUEST:
                await asyncio.sleep(0.2)  # Else the client's end may close the connection before the server reads.

    async def pass_replies(self, from_server: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        while chunk := await from_server.read(CHUNK):
            if self._proxy.is_silent:
                continue
            if self._fate is Fate.LOSE_REPLY:
                return
            if self._fate is Fate.HOLD_REPLY:
                await self._proxy.hold()
            to_client.write(chunk)
            await to_client.drain()


class CuttingProxy:
    """Passes bytes between one manager and the server, and can cut a connection within a reply.

    Each EVALSHA meets the next of the ``cuts``: None, or how many bytes of its reply pass before the connection is cut.
    When these are used up, replies pass. ``replies`` are the whole replies, as the server sent them.
    """

    def __init__(self, server_port: int) -> None:
        self.cuts: list[int | None] = []
        self.replies: list[bytes] = []
        self._server_port = server_port
        self._cut: int | None = None
        self._is_of_a_script = False
        self._peers: dict[socket.socket, socket.socket] = {}
        self._clients: set[socket.socket] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(BOUND_SECONDS)
        assert not self._thread.is_alive()
        for open_socket in (self._listener, *self._peers):
            open_socket.close()

    def _serve(self) -> None:
        while not self._ended.is_set():
            for ready in select.select([self._listener, *self._peers], [], [], 0.05)[0]:
                if ready is self._listener:
                    client = self._listener.accept()[0]
                    server = socket.create_connection(("127.0.0.1", self._server_port))
                    for each in (client, server):
                        # Or the kernel may hold a short message for 40 ms, until the one before is acknowledged.
                        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._peers |= {client: server, server: client}
                    self._clients.add(client)
                elif ready in self._peers and not self._pass_on(ready):
                    peer = self._peers.pop(ready)
                    del self._peers[peer]
                    self._clients -= {ready, peer}
                    ready.close()
                    peer.close()

    def _pass_on(self, source: socket.socket) -> bool:
        """Pass on what has arrived; tell whether the connection stays."""
        try:
            chunk = source.recv(CHUNK)
            if source in self._clients:
                self._is_of_a_script = b"EVALSHA" in chunk
                if self._is_of_a_script:
                    self._cut = self.cuts.pop(0) if self.cuts else None
                    self.replies.append(b"")
            elif self._is_of_a_script:
                self.replies[-1] += chunk
                if self._cut is not None:
                    self._peers[source].sendall(chunk[: self._cut])
                    return False
            self._peers[source].sendall(chunk)
        except OSError:
            return False
        return chunk != b""
