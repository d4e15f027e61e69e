"""*presence*: this library, as an application uses it."""

from __future__ import annotations

import asyncio
from collections import Counter
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import redis
from redis.asyncio.connection import SSLConnection

import presence
from bench.contenders.interface import CONN_TTL_SECONDS, State, Told
from presence.replies import Position
from tests.clock import let_time_pass
from tests.follower import Follower
from tests.invariants import read_keyspace, violations

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from presence import ConnectionInfo
    from tests.invariants import Keyspace

Result = TypeVar("Result")


def told(connection: ConnectionInfo) -> Told:
    """Give what is told of a connection."""
    is_detached, server_id, metadata = connection.is_detached, connection.server_id, connection.metadata
    return Told(connection.sid, connection.user_id, connection.game_id, is_detached, server_id, metadata)


def _told_if_any(connection: ConnectionInfo | None) -> Told | None:
    return told(connection) if connection else None


class _SendsTwice:
    """A manager's operations of one call each, sent twice with the same token: as where the first reply was lost."""

    def __init__(self, manager: presence.ConnectionManager) -> None:
        self._manager = manager

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        describe = getattr(self._manager.operations, name)

        async def send_twice(*arguments: object, **options: object) -> object:
            operation = describe(*arguments, **options)
            await self._manager.pipeline([operation])
            (answer,) = await self._manager.pipeline([operation])
            return answer

        return send_twice


class Presence:
    """A ``presence.ConnectionManager`` on the given client, with these settings beside its namespace."""

    name: ClassVar[str] = "presence"

    def __init__(self, client: redis.asyncio.Redis, namespace: str, **settings: Any) -> None:
        self._client: Any = client
        self._namespace = namespace
        self._connections_per_user: int = settings.get("connections_per_user", 1)
        self._make_manager = partial(
            presence.ConnectionManager, client, namespace=namespace, conn_ttl_seconds=CONN_TTL_SECONDS, **settings
        )
        self._manager = self._make_manager()

    async def register(self, sid: str, user_id: str) -> list[str]:
        """``register_connection``."""
        registration = await self._manager.register_connection(sid, user_id)
        return [displaced.sid for displaced in registration.displaced]

    async def unregister(self, sid: str, *, epoch: int | None = None) -> bool:
        """``unregister_connection``."""
        return await self._manager.unregister_connection(sid, epoch=epoch) is not None

    async def join(self, sid: str, game_id: str, *, epoch: int | None = None) -> tuple[bool, str | None]:
        """``join_game``."""
        result = await self._manager.join_game(sid, game_id, epoch=epoch)
        return result.joined, result.left_game_id

    async def leave(self, sid: str, *, epoch: int | None = None) -> str | None:
        """``leave_game``."""
        return await self._manager.leave_game(sid, epoch=epoch)

    async def heartbeat(self, sid: str, *, epoch: int | None = None) -> bool:
        """``update_heartbeat``."""
        return await self._manager.update_heartbeat(sid, epoch=epoch)

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

    # What only this library offers, whose answers tell all but times.

    async def register_and_tell(
        self, sid: str, user_id: str, metadata: bytes = b""
    ) -> tuple[bool, Told, list[Told], Told | None, Told | None]:
        """``register_connection``: refused, the connection, displaced, replaced, resumed from."""
        made = await self._manager.register_connection(sid, user_id, metadata=metadata)
        displaced = [told(one) for one in made.displaced]
        replaced, resumed_from = _told_if_any(made.replaced), _told_if_any(made.resumed_from)
        return made.refused, told(made.connection), displaced, replaced, resumed_from

    async def register_for(self, server_id: str, sid: str, user_id: str) -> bool:
        """``register_connection`` of a game server that starts for it."""
        async with self._make_manager(server_id=server_id) as manager:
            return bool(await manager.register_connection(sid, user_id))

    async def detach(self, sid: str, grace_seconds: float, *, epoch: int | None = None) -> Told | None:
        """``unregister_connection`` with a grace."""
        detached = await self._manager.unregister_connection(sid, grace_seconds=grace_seconds, epoch=epoch)
        return _told_if_any(detached)

    async def join_with_room(self, sid: str, game_id: str, capacity: int) -> tuple[bool, str | None, bool]:
        """``join_game`` with a capacity: joined, the game left, full."""
        result = await self._manager.join_game(sid, game_id, capacity=capacity)
        return result.joined, result.left_game_id, result.is_full

    async def update_metadata(self, sid: str, metadata: bytes, *, epoch: int | None = None) -> bool:
        """``update_metadata``."""
        return await self._manager.update_metadata(sid, metadata, epoch=epoch)

    async def heartbeats(self, *sids: str) -> list[bool]:
        """``update_heartbeats``: which were seen."""
        statuses = await self._manager.update_heartbeats(sids)
        return [statuses[sid] is presence.HeartbeatStatus.SEEN for sid in sids]

    async def clean_up_server(self, server_id: str, grace_seconds: float) -> tuple[list[Told], list[Told]]:
        """``cleanup_server``: removed and detached."""
        result = await self._manager.cleanup_server(server_id, grace_seconds=grace_seconds)
        return sorted(map(told, result.removed)), sorted(map(told, result.detached))

    async def if_the_same(self, method: str, sid: str, *arguments: object) -> tuple[Told, object] | None:
        """``get_connection``, and then a method of this class for the registration that was found: both answers."""
        found = await self._manager.get_connection(sid)
        return (told(found), await getattr(self, method)(sid, *arguments, epoch=found.epoch)) if found else None

    async def sent_twice(self, method: str, *arguments: object) -> object:
        """Call a method of this class whose call is sent twice; give the second answer."""
        twice = copy(self)
        twice._manager = cast("presence.ConnectionManager", _SendsTwice(self._manager))
        answer: object = await getattr(twice, method)(*arguments)
        return answer

    async def get_connection(self, sid: str) -> Told | None:
        """``get_connection``."""
        return _told_if_any(await self._manager.get_connection(sid))

    async def get_user_connection(self, user_id: str) -> Told | None:
        """``get_user_connection``."""
        return _told_if_any(await self._manager.get_user_connection(user_id))

    async def get_all_user_connections(self, user_id: str) -> list[Told]:
        """``get_all_user_connections``."""
        return [told(one) for one in await self._manager.get_all_user_connections(user_id)]

    async def get_members(self, game_id: str) -> list[Told]:
        """``get_game_connections``."""
        return [told(member) for member in await self._manager.get_game_connections(game_id)]

    async def get_game_count(self, game_id: str) -> int:
        """``get_game_connection_count``."""
        return await self._manager.get_game_connection_count(game_id)

    async def get_opponent(self, game_id: str, user_id: str) -> str | None:
        """``get_opponent_sid``."""
        return await self._manager.get_opponent_sid(game_id, user_id)

    async def _with_blocking_client(self, work: Callable[[redis.Redis], Result]) -> Result:
        """Run what the tests have for a blocking client, on the same server."""
        pool = self._client.connection_pool
        options = {
            name: value
            for name, value in pool.connection_kwargs.items()
            if name in ("db", "username", "password", "host", "port") or name.startswith("ssl_")
        }
        options["ssl"] = issubclass(pool.connection_class, SSLConnection)
        options["unix_socket_path"] = pool.connection_kwargs.get("path")

        def run() -> Result:
            with redis.Redis(**options) as client:
                return work(client)

        return await asyncio.to_thread(run)

    async def read_state(self) -> State:
        """Read every key, and ask the tests' own check what is wrong in them and in what the events told."""
        keyspace = await self._with_blocking_client(lambda client: read_keyspace(client, self._namespace))
        tells = [
            Told(
                sid,
                record["user_id"],
                record["game_id"] or None,
                "last_seen" in record,
                record["server"].partition(":")[2] or None,
                record["metadata"].encode("latin-1"),
            )
            for sid, record in sorted(keyspace.records.items(), key=lambda item: int(item[1]["epoch"]))
        ]
        wrong = violations(keyspace, self._connections_per_user, CONN_TTL_SECONDS * 1000)
        wrong += await self._wrong_counts(keyspace)
        if self._manager.operations.events_mode == "stream":
            wrong += await self._violations_of_events(tells)
        return State(
            records={sid: (record["user_id"], record["game_id"] or None) for sid, record in keyspace.records.items()},
            users=keyspace.users,
            games={game_id: set(members) for game_id, members in keyspace.games.items()},
            own_violations=[f"presence: {violation}" for violation in wrong],
            told=tells,
            game_servers=sorted((start.partition(":")[2], beat == 0) for start, beat in keyspace.known_servers.items()),
            connections_per_user=self._connections_per_user,
        )

    async def _wrong_counts(self, keyspace: Keyspace) -> list[str]:
        """Tell where counts, and who is online, are not what is stored."""
        seconds, microseconds = await self._client.time()
        now = 1000 * seconds + microseconds // 1000
        live = {
            sid: record
            for sid, record in keyspace.records.items()
            if keyspace.last_seen.get(sid, 0) >= now - 1000 * CONN_TTL_SECONDS
        }
        oldest = now - 3000 * self._manager.operations.heartbeat_seconds
        seen = {record["user_id"] for sid, record in live.items() if keyspace.last_seen[sid] >= oldest}
        in_games = Counter(record["game_id"] for record in live.values())
        users, games = list(keyspace.users), list(keyspace.games)
        count = await self._manager.get_connection_count()
        is_online = await self._manager.are_users_online(users)
        game_counts = await asyncio.gather(*map(self._manager.get_game_connection_count, games))
        wrong = [f"the count is {count} of {len(live)}"] if count != len(live) else []
        wrong += [f"user {user!r} is online: {is_online[user]}" for user in users if is_online[user] != (user in seen)]
        return wrong + [
            f"the count of game {game!r} is {count} of {in_games[game]}"
            for game, count in zip(games, game_counts, strict=True)
            if count != in_games[game]
        ]

    async def _violations_of_events(self, tells: list[Told]) -> list[str]:
        """Tell where who follows the events from the first on knows anything else than what is stored."""
        follower, position, is_at_end = Follower(told), Position(), False
        while not is_at_end:
            (batch,) = await self._manager.pipeline([self._manager.operations.read_events(position)])
            for event in batch.events:
                follower.follow(event)
            is_at_end, position = batch.position == position, batch.position
        wrong = [f"event {event.type.value} does not fit those before: {event}" for event in follower.misfits]
        if follower.parts != {one.sid: one for one in tells}:
            wrong.append(f"events told of {follower.parts}, stored is {tells}")
        online = {one.user_id for one in tells if not one.is_detached}
        if follower.online != online:
            wrong.append(f"events told that {follower.online} are online, and {online} are")
        return wrong

    async def age(self, seconds: float) -> None:
        """Move every time in the namespace into the past."""
        await self._with_blocking_client(lambda client: let_time_pass(client, self._namespace, seconds))

    async def expire_locks(self) -> None:
        """There are none."""

    async def aclose(self) -> None:
        """Close the manager; the client stays open."""
        await self._manager.aclose()
