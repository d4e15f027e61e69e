"""*presence*: this library, as an application uses it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import redis
from redis.asyncio.connection import UnixDomainSocketConnection

import presence
from bench.contenders.interface import CONN_TTL_SECONDS, State
from tests.clock import let_time_pass
from tests.invariants import read_keyspace, violations

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")


class Presence:
    """A ``presence.ConnectionManager`` on the given client."""

    name: ClassVar[str] = "presence"

    def __init__(self, client: redis.asyncio.Redis, namespace: str) -> None:
        self._client: Any = client
        self._namespace = namespace
        self._manager = presence.ConnectionManager(client, namespace=namespace, conn_ttl_seconds=CONN_TTL_SECONDS)

    async def register(self, sid: str, user_id: str) -> list[str]:
        """``register_connection``."""
        registration = await self._manager.register_connection(sid, user_id)
        return [displaced.sid for displaced in registration.displaced]

    async def unregister(self, sid: str) -> bool:
        """``unregister_connection``."""
        return await self._manager.unregister_connection(sid) is not None

    async def join(self, sid: str, game_id: str) -> tuple[bool, str | None]:
        """``join_game``."""
        result = await self._manager.join_game(sid, game_id)
        return result.joined, result.left_game_id

    async def leave(self, sid: str) -> str | None:
        """``leave_game``."""
        return await self._manager.leave_game(sid)

    async def heartbeat(self, sid: str) -> bool:
        """``update_heartbeat``."""
        return await self._manager.update_heartbeat(sid)

    async def cleanup(self, threshold_seconds: float) -> list[str]:
        """``cleanup_stale_connections``."""
        return [removed.sid for removed in await self._manager.cleanup_stale_connections(threshold_seconds)]

    async def get_game(self, game_id: str) -> dict[str, str]:
        """``get_game_connections``."""
        return {member.sid: member.user_id for member in await self._manager.get_game_connections(game_id)}

    async def is_online(self, user_id: str) -> bool:
        """``is_user_online``."""
        return await self._manager.is_user_online(user_id)

    async def count(self) -> int:
        """``get_connection_count``."""
        return await self._manager.get_connection_count()

    async def _with_blocking_client(self, work: Callable[[redis.Redis], Result]) -> Result:
        """Run what the tests have for a blocking client, on the same server."""
        pool = self._client.connection_pool
        options = {name: pool.connection_kwargs.get(name) for name in ("db", "username", "password")}
        if issubclass(pool.connection_class, UnixDomainSocketConnection):
            options["unix_socket_path"] = pool.connection_kwargs["path"]
        else:
            options |= {name: pool.connection_kwargs[name] for name in ("host", "port")}

        def run() -> Result:
            with redis.Redis(**options) as client:
                return work(client)

        return await asyncio.to_thread(run)

    async def read_state(self) -> State:
        """Read every key, and ask the tests' own check what is wrong in them."""
        keyspace = await self._with_blocking_client(lambda client: read_keyspace(client, self._namespace))
        return State(
            records={sid: (record["user_id"], record["game_id"] or None) for sid, record in keyspace.records.items()},
            users=keyspace.users,
            games={game_id: set(members) for game_id, members in keyspace.games.items()},
            last_seen={sid: milliseconds / 1000 for sid, milliseconds in keyspace.last_seen.items()},
            more_violations=[f"presence: {violation}" for violation in violations(keyspace)],
        )

    async def age(self, seconds: float) -> None:
        """Move every time in the namespace into the past."""
        await self._with_blocking_client(lambda client: let_time_pass(client, self._namespace, seconds))

    async def expire_locks(self) -> None:
        """There are none."""

    async def aclose(self) -> None:
        """Close the manager; the client stays open."""
        await self._manager.aclose()
