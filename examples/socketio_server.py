"""A Socket.IO game server on presence. Run any number of them on one Redis or Valkey, and copy what you need.

    PRESENCE_REDIS_URL=redis://localhost:6379/0 python examples/socketio_server.py --port 8001

A client connects with ``auth={"user_id": ...}``, calls ``join_game``, ``leave_game`` and, every 30 seconds,
``heartbeat``, and is told ``opponent_joined`` and ``opponent_left``. A call that fails is answered ``{"error": ...}``.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any

import socketio
import uvicorn

from presence import CleanupResult, ConnectionManager, PresenceError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)


class GameServer:
    """The Socket.IO handlers of one process; who is online and in which game, only ``manager`` knows."""

    def __init__(self, manager: ConnectionManager, redis_url: str, *, cleanup_seconds: float = 30) -> None:
        self.manager = manager
        self.cleanup_seconds = cleanup_seconds
        # Through this, emit() and disconnect() reach a socket on whichever server it is. It keeps no keys.
        channel = f"socketio:{manager.operations.namespace}"
        self.sio = socketio.AsyncServer(
            async_mode="asgi", client_manager=socketio.AsyncRedisManager(redis_url, channel=channel)
        )
        self.sio.on("connect", self.connect)
        self.sio.on("disconnect", self.disconnect)
        for handler in (self.join_game, self.leave_game, self.heartbeat):
            self.sio.on(handler.__name__, answering_errors(handler))
        self.app = socketio.ASGIApp(self.sio, on_startup=self.start, on_shutdown=manager.aclose)

    async def start(self) -> None:
        """Clean up in the background, as every server of the fleet does; closing the manager ends it."""
        cleanup = self.manager.run_cleanup(self.cleanup_seconds, on_removed=self.connections_removed)
        self.cleanup_task = asyncio.create_task(cleanup)

    async def connect(self, sid: str, _environ: dict[str, Any], auth: Any) -> None:
        """Register the connection, and close the sockets of those that it displaced."""
        user_id = verified_user_id(auth)
        try:
            registration = await self.manager.register_connection(sid, user_id)
        except ValueError as error:
            raise socketio.exceptions.ConnectionRefusedError(str(error)) from error
        except PresenceError as error:
            logger.exception("connect failed")
            raise socketio.exceptions.ConnectionRefusedError("try again") from error
        await self.sio.save_session(sid, {"user_id": user_id})
        for displaced in registration.displaced:
            # In vain for a socket whose own connect() is still under way; that one learns it from its first heartbeat.
            await self.sio.disconnect(displaced.sid)

    async def disconnect(self, sid: str, _reason: str) -> None:
        """Forget the connection, and tell the opponent.

        This may run late, when the user is back on another server, or after cleanup: then it finds nothing to remove.
        """
        connection = await self.manager.unregister_connection(sid)
        if connection and connection.game_id:
            await self.tell_opponent("opponent_left", connection.game_id, connection.user_id)

    async def join_game(self, sid: str, game_id: str) -> dict[str, Any]:
        """Join a game, leaving the one before, and tell the opponents in both."""
        user_id = (await self.sio.get_session(sid))["user_id"]
        result = await self.manager.join_game(sid, game_id)
        if result.left_game_id:
            await self.tell_opponent("opponent_left", result.left_game_id, user_id)
        if result.joined:
            await self.tell_opponent("opponent_joined", game_id, user_id)
        return {"joined": result.joined}

    async def leave_game(self, sid: str) -> dict[str, Any]:
        """Leave the game, and tell the opponent."""
        user_id = (await self.sio.get_session(sid))["user_id"]
        game_id = await self.manager.leave_game(sid)
        if game_id:
            await self.tell_opponent("opponent_left", game_id, user_id)
        return {"left_game_id": game_id}

    async def heartbeat(self, sid: str) -> dict[str, Any]:
        """Keep the connection alive; close the socket of one that was displaced or removed."""
        alive = await self.manager.update_heartbeat(sid)
        if not alive:
            await self.sio.disconnect(sid)
        return {"alive": alive}

    async def connections_removed(self, result: CleanupResult) -> None:
        """Close the sockets of the connections that cleanup removed, and tell their opponents."""
        for connection in result:
            await self.sio.disconnect(connection.sid)
            if connection.game_id:
                await self.tell_opponent("opponent_left", connection.game_id, connection.user_id)

    async def tell_opponent(self, event: str, game_id: str, user_id: str) -> None:
        """Tell the other player of a game what a user did, on whichever server that player is."""
        try:
            opponent_sid = await self.manager.get_opponent_sid(game_id, user_id)
        except PresenceError:
            # What the user did is done; the news of it must not make it look like a failure.
            logger.exception("%s of %s: could not look up the opponent", event, game_id)
            return
        if opponent_sid:
            await self.sio.emit(event, {"game_id": game_id, "user_id": user_id}, to=opponent_sid)


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
    redis_url = os.environ.get("PRESENCE_REDIS_URL", "redis://localhost:6379/0")
    uvicorn.run(GameServer(ConnectionManager.from_url(redis_url), redis_url).app, host="127.0.0.1", port=port)


if __name__ == "__main__":
    main()
