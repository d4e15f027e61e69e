"""A Socket.IO game server on presence. Run any number of them on one Redis or Valkey, and copy what you need.

    PRESENCE_REDIS_URL=redis://localhost:6379/0 python examples/socketio_server.py --port 8001

A client connects with ``auth={"user_id": ...}``, calls ``join_game``, ``leave_game`` and, every 30 seconds,
``heartbeat`` (after an error again in 5). It is told ``opponent_joined`` and ``opponent_left``, ``opponent_away`` (the
network failed, the seat is kept) and ``opponent_back``, and ``resumed`` when it is back itself. A call that fails is
answered ``{"error": ...}``. A client that the server disconnects connects again, unless it was told ``logged_out``
before: another device of its user has displaced it, or it was removed.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import socketio
import uvicorn

from presence import AsyncSubscription, ConnectionManager, Event, EventsLostError, EventType, PresenceError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)


NEWS = {
    EventType.JOINED: "opponent_joined",
    EventType.DETACHED: "opponent_away",
    EventType.RESUMED: "opponent_back",
    EventType.LEFT: "opponent_left",
    EventType.DISPLACED: "opponent_left",
    EventType.UNREGISTERED: "opponent_left",
    EventType.EXPIRED: "opponent_left",
}
"""What players are told about what happens in their game."""


class GameServer:
    """The Socket.IO handlers of one process; only ``manager`` knows who is online and in which game.

    Every server hears of every change and acts on it for its own sockets, so Socket.IO needs no message queue.
    """

    def __init__(self, manager: ConnectionManager, *, cleanup_seconds: float = 30, grace_seconds: float = 30) -> None:
        self.manager = manager
        self.cleanup_seconds = cleanup_seconds
        self.grace_seconds = grace_seconds
        self.is_ready = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []
        self.sio = socketio.AsyncServer(async_mode="asgi")
        self.sio.on("connect", self.connect)
        self.sio.on("disconnect", self.disconnect)
        for handler in (self.join_game, self.leave_game, self.heartbeat):
            self.sio.on(handler.__name__, answering_errors(handler))
        self.app = socketio.ASGIApp(self.sio, on_startup=self.start, on_shutdown=self.stop)

    async def start(self) -> None:
        """Beat, clean up and follow the events in the background, as every server of the fleet does."""
        try:
            events = self.manager.subscribe()
            work = (
                self.manager.run_server_heartbeat(),
                self.manager.run_cleanup(self.cleanup_seconds),
                self.follow_events(events),
            )
        except ValueError:
            logger.exception("the manager does not suit")  # python-socketio says only that the start failed, not why.
            raise
        self.tasks = [asyncio.create_task(part) for part in work]
        await self.is_ready.wait()

    async def stop(self) -> None:
        """End what runs in the background."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.manager.aclose()

    async def connect(self, sid: str, _environ: dict[str, Any], auth: Any) -> None:
        """Register the connection; the events tell what that displaces or resumes."""
        try:
            user_id = verified_user_id(auth)
            await self.sio.save_session(sid, {"user_id": user_id})
            await self.manager.register_connection(sid, user_id)
        except ValueError as error:
            raise socketio.exceptions.ConnectionRefusedError(str(error)) from error
        except PresenceError as error:
            logger.exception("connect failed")
            raise socketio.exceptions.ConnectionRefusedError("try again") from error

    async def disconnect(self, sid: str, reason: str) -> None:
        """Forget the connection of a user who left; keep the seat of one whose network failed.

        This may run late, when the user is back on another server, or after cleanup: then it finds nothing. A client
        that closes its socket before saying so, as python-socketio's does, counts as one whose network failed.
        """
        has_left = reason == self.sio.reason.CLIENT_DISCONNECT
        try:
            await self.manager.unregister_connection(sid, grace_seconds=None if has_left else self.grace_seconds)
        except PresenceError:
            # Cleanup takes the connection. If this got out, python-socketio would keep the sid in its rooms for good.
            logger.exception("disconnect failed")

    async def join_game(self, sid: str, game_id: str) -> dict[str, Any]:
        """Join a game, leaving the previous one."""
        result = await self.manager.join_game(sid, game_id)
        return {"joined": result.joined}

    async def leave_game(self, sid: str) -> dict[str, Any]:
        """Leave the game."""
        return {"left_game_id": await self.manager.leave_game(sid)}

    async def heartbeat(self, sid: str) -> dict[str, Any]:
        """Keep the connection alive; close the socket of one that was displaced or removed."""
        alive = await self.manager.update_heartbeat(sid)
        if not alive:
            # Where its user has no other connection, the others took this server for dead, or the data was lost: the
            # client is to come back.
            with suppress(KeyError):  # The socket may be closed already, and its session gone.
                session = await self.sio.get_session(sid)
                await self.end(sid, is_final=await self.manager.get_user_connection(session["user_id"]) is not None)
        return {"alive": alive}

    async def end(self, sid: str, *, is_final: bool) -> None:
        """Close a socket; unless that is final, the client connects again."""
        if is_final:
            await self.sio.emit("logged_out", to=sid)
        await self.sio.disconnect(sid)

    async def follow_events(self, events: AsyncSubscription) -> None:
        """Act on what happens on any server; after a fault, go on where this server was in the stream."""
        is_lost = False
        while True:
            try:
                async with events:
                    if is_lost:
                        # Rooms may be wrong now. The seats are kept, so those who reconnect are resumed and right.
                        here = self.sio.manager.get_participants("/", None)
                        await asyncio.gather(*(self.sio.disconnect(sid) for sid, _ in here))
                        is_lost = False
                    self.is_ready.set()
                    async for event in events:
                        await self.act_on(event)
            except Exception as error:  # Of any kind: a server that goes on without the events would be wrong for good.
                logger.exception("following the events failed")
                # A subscription that never began has no position, and players may join before the next one begins.
                is_lost = is_lost or isinstance(error, EventsLostError) or events.position is None
                events = self.manager.subscribe(after=None if is_lost else events.position)
                self.is_ready.set()  # Those who connect meanwhile are asked to try again.
                await asyncio.sleep(1)

    async def act_on(self, event: Event) -> None:
        """Tell the players of the game who are on this server; keep rooms and sockets in step with the connections.

        A player enters the room when the event of the join or the resume comes by, so the room is told exactly what has
        happened since.
        """
        sid, game_id = event.connection.sid, event.connection.game_id
        if event.type in NEWS and game_id:
            news = {"game_id": game_id, "user_id": event.connection.user_id}
            await self.sio.emit(NEWS[event.type], news, to=room_of(game_id), skip_sid=sid)
        if not self.is_here(sid):
            return
        if event.type in (EventType.JOINED, EventType.RESUMED) and game_id:
            await self.sio.enter_room(sid, room_of(game_id))
            if event.type is EventType.RESUMED:
                await self.sio.emit("resumed", {"game_id": game_id}, to=sid)
        elif event.type is EventType.LEFT and game_id:
            await self.sio.leave_room(sid, room_of(game_id))
        elif event.type in (EventType.DISPLACED, EventType.UNREGISTERED, EventType.EXPIRED):
            # In vain for a socket whose own connect() is still under way; that one learns it from its first heartbeat.
            await self.end(sid, is_final=event.type is not EventType.EXPIRED)

    def is_here(self, sid: str) -> bool:
        """Tell whether this server has the socket."""
        return any(known == sid for known, _ in self.sio.manager.get_participants("/", sid))


def room_of(game_id: str) -> str:
    """Name a game's room in Socket.IO, where a player's sid is a room too."""
    return f"game:{game_id}"


def verified_user_id(auth: Any) -> str:
    """Tell who connects. Verify a signed token here: this takes the client's word for it."""
    user_id = auth.get("user_id") if isinstance(auth, dict) else None
    if not isinstance(user_id, str):
        raise socketio.exceptions.ConnectionRefusedError("auth must hold a user_id")
    return user_id


def answering_errors(handler: Callable[..., Awaitable[dict[str, Any]]]) -> Callable[..., Awaitable[dict[str, Any]]]:
    """Let a client know of its bad arguments and of our faults, instead of leaving its call without an answer."""

    async def handle(*arguments: Any) -> dict[str, Any]:
        try:
            return await handler(*arguments)
        except (TypeError, ValueError) as error:
            return {"error": str(error)}
        except PresenceError:
            logger.exception("%s failed", handler.__name__)
            return {"error": "try again"}

    return handle


def main() -> None:
    """Serve on a port, with the Redis that the environment names."""
    parser = argparse.ArgumentParser(description="A Socket.IO game server on presence.")
    parser.add_argument("--port", type=int, default=8000)
    port = parser.parse_args().port
    manager = ConnectionManager(
        server_id=f"{socket.gethostname()}:{port}",
        server_grace_seconds=30,
        displacement="newest_resumes",
        events="stream",
    )
    uvicorn.run(GameServer(manager).app, host="127.0.0.1", port=port)


if __name__ == "__main__":
    main()
