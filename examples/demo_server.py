"""One game server of the demo: ``socketio_server`` itself, with a manager that reports what it answers.

Each answer goes to stdout as a line of JSON. Lines on stdin steer it: ``hold`` makes disconnects wait before they
unregister, as on a server that is slow, and ``release`` lets them go on. The end of stdin ends the server, so that none
outlives the demo, however it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import inspect
import json
import os
import sys
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import uvicorn

from examples.socketio_server import GameServer
from presence import CleanupResult, ConnectionInfo, ConnectionManager, Event

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")


def report(**line: Any) -> None:
    """Write one line to the demo."""
    print(json.dumps(line, default=plain), flush=True)


def plain(answer: Any) -> Any:
    """Turn a result of presence into what JSON can carry, named by its type."""
    if isinstance(answer, datetime):
        return answer.isoformat()
    if isinstance(answer, Enum):
        return answer.value
    if isinstance(answer, bytes):
        return answer.decode()
    fields = {field.name: getattr(answer, field.name) for field in dataclasses.fields(answer)}
    return {"type": type(answer).__name__, **fields}


def reported(
    method: Callable[Concatenate[ConnectionManager, Parameters], Coroutine[Any, Any, Answer]],
) -> Callable[Concatenate[ConnectionManager, Parameters], Coroutine[Any, Any, Answer]]:
    """Make a method report its arguments and what it answered or raised."""

    @functools.wraps(method)
    async def call(self: ConnectionManager, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Answer:
        try:
            answer = await method(self, *args, **kwargs)
        except Exception as error:
            report(operation=method.__name__, arguments=args, error=f"{type(error).__name__}: {error}")
            raise
        report(operation=method.__name__, arguments=args, answer=answer)
        return answer

    return call


class ReportingManager(ConnectionManager):
    """A manager that reports what it answers, and whose disconnects can be held up."""

    may_unregister = asyncio.Event()

    register_connection = reported(ConnectionManager.register_connection)
    join_game = reported(ConnectionManager.join_game)
    leave_game = reported(ConnectionManager.leave_game)
    update_heartbeat = reported(ConnectionManager.update_heartbeat)
    report_unregister = reported(ConnectionManager.unregister_connection)

    async def unregister_connection(
        self, sid: str, *, grace_seconds: float | None = None, epoch: int | None = None
    ) -> ConnectionInfo | None:
        """Unregister as usual, but not before the demo lets it."""
        if not self.may_unregister.is_set():
            report(held=sid)
            await self.may_unregister.wait()
        return await self.report_unregister(sid, grace_seconds=grace_seconds, epoch=epoch)

    async def update_server_heartbeat(self) -> bool:
        """Beat for the server as usual, and report its boot epoch."""
        is_known = await super().update_server_heartbeat()
        start = (self.operations.server_id, self.operations.boot_epoch)
        report(operation="update_server_heartbeat", arguments=start, answer=is_known)
        return is_known

    async def run_cleanup(
        self,
        interval_seconds: float = 30,
        *,
        threshold_seconds: float | None = None,
        on_removed: Callable[[CleanupResult], object] | None = None,
    ) -> None:
        """Clean up as usual, and report what that removes and detaches."""

        async def report_and_pass_on(result: CleanupResult) -> None:
            report(operation="run_cleanup", arguments=(), answer=result)
            handled = on_removed(result) if on_removed is not None else None
            if inspect.isawaitable(handled):
                await handled

        await super().run_cleanup(interval_seconds, threshold_seconds=threshold_seconds, on_removed=report_and_pass_on)


class ReportingGameServer(GameServer):
    """A game server that reports the events that it sees."""

    async def act_on(self, event: Event) -> None:
        """Act on it as usual."""
        report(event=event)
        await super().act_on(event)


async def obey(manager: ReportingManager, server: uvicorn.Server) -> None:
    """Do what the lines on stdin say; at their end, end the server."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async for line in lines:
        if line == b"hold\n":
            manager.may_unregister.clear()
        elif line == b"release\n":
            manager.may_unregister.set()
        report(obeyed=line.decode().strip())
    manager.may_unregister.set()
    server.should_exit = True


async def serve(url: str, options: argparse.Namespace) -> None:
    """Serve on a free port of the loopback, and report the port."""
    manager = ReportingManager.from_url(
        url,
        namespace=options.namespace,
        heartbeat_seconds=options.heartbeat_seconds,
        server_id=options.server_id,
        server_grace_seconds=options.grace_seconds,
        displacement="newest_resumes",
        events="stream",
    )
    manager.may_unregister.set()
    app = ReportingGameServer(manager, cleanup_seconds=options.cleanup_seconds, grace_seconds=options.grace_seconds).app
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    serving = asyncio.create_task(server.serve())
    while not server.started and not serving.done():  # noqa: ASYNC110, uvicorn has no event for it
        await asyncio.sleep(0.01)
    if server.started:
        report(port=server.servers[0].sockets[0].getsockname()[1])
        obeying = asyncio.create_task(obey(manager, server))
        await serving
        obeying.cancel()


def main() -> None:
    """Take the arguments from the demo, and the URL, which may hold a password, from the environment; serve."""
    parser = argparse.ArgumentParser(description="One game server of the demo.")
    for name in ("--namespace", "--server-id"):
        parser.add_argument(name, required=True)
    for name in ("--heartbeat-seconds", "--cleanup-seconds", "--grace-seconds"):
        parser.add_argument(name, type=float, required=True)
    asyncio.run(serve(os.environ["PRESENCE_REDIS_URL"], parser.parse_args()))


if __name__ == "__main__":
    main()
