"""*plain*: the common manager, in which each step is a command of its own and nothing holds the steps together."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, ClassVar

from bench.contenders.interface import CONN_TTL_SECONDS, STALE_SECONDS, State

if TYPE_CHECKING:
    from collections.abc import Mapping

    from redis.asyncio import Redis

SCAN_COUNT = 1000
FIELDS = {"user_id", "game_id", "connected_at", "last_seen"}


class Plain:
    """``conn:<sid>`` hash, ``user_conn:<user>`` string, ``game_conns:<game>`` set, under the namespace as a prefix.

    As it is commonly written: a SET could have set the TTL that the EXPIRE after it sets, a displacing register need
    not GET and DEL the entry that its SET replaces, and a heartbeat's HGET tells what its EXISTS does. The replies of
    DEL and SREM tell which of several callers removed a connection or took it out of its game: what can be told once
    without more commands is told once.
    """

    name: ClassVar[str] = "plain"

    def __init__(self, client: Redis, namespace: str) -> None:
        self._client: Any = client
        self._prefix = f"{namespace}:"

    def _conn(self, sid: str) -> str:
        return f"{self._prefix}conn:{sid}"

    def _user_conn(self, user_id: str) -> str:
        return f"{self._prefix}user_conn:{user_id}"

    def _game_conns(self, game_id: str) -> str:
        return f"{self._prefix}game_conns:{game_id}"

    @staticmethod
    def _new_record(user_id: str) -> dict[str, str]:
        now = repr(time.time())
        return {"user_id": user_id, "game_id": "", "connected_at": now, "last_seen": now}

    @staticmethod
    def _is_stale(record: Mapping[str, str], threshold_seconds: float) -> bool:
        """Tell whether a record was not seen for so long; one without a time is the rest of a lost connection."""
        return float(record.get("last_seen", 0)) < time.time() - threshold_seconds

    async def _clean(self, sid: str) -> bool:
        """Remove a connection from every structure; tell whether this call removed it."""
        record = await self._client.hgetall(self._conn(sid))
        if not record:
            return False
        if record.get("game_id"):
            await self._client.srem(self._game_conns(record["game_id"]), sid)
        # A newer connection of the user stays.
        user_conn = self._user_conn(record.get("user_id", ""))
        if await self._client.get(user_conn) == sid:
            await self._client.delete(user_conn)
        return bool(await self._client.delete(self._conn(sid)))

    async def register(self, sid: str, user_id: str) -> list[str]:
        """GET; for an earlier connection HGETALL, SREM, GET, DEL, DEL; HSET, EXPIRE, SET, EXPIRE."""
        earlier = await self._client.get(self._user_conn(user_id))
        displaced = earlier is not None and await self._clean(earlier)
        await self._client.hset(self._conn(sid), mapping=self._new_record(user_id))
        await self._client.expire(self._conn(sid), CONN_TTL_SECONDS)
        await self._client.set(self._user_conn(user_id), sid)
        await self._client.expire(self._user_conn(user_id), CONN_TTL_SECONDS)
        return [earlier] if displaced and earlier != sid else []

    async def unregister(self, sid: str) -> bool:
        """HGETALL, SREM, GET, DEL, DEL."""
        return await self._clean(sid)

    async def join(self, sid: str, game_id: str) -> tuple[bool, str | None]:
        """HGET; to leave another game SREM; HSET, SADD, EXPIRE."""
        current = await self._client.hget(self._conn(sid), "game_id")
        if current is None:
            return False, None
        if current == game_id:
            return True, None
        if current:
            await self._client.srem(self._game_conns(current), sid)
        await self._client.hset(self._conn(sid), "game_id", game_id)
        await self._client.sadd(self._game_conns(game_id), sid)
        await self._client.expire(self._game_conns(game_id), CONN_TTL_SECONDS)
        return True, current or None

    async def leave(self, sid: str) -> str | None:
        """HGET, SREM, HSET."""
        game_id: str | None = await self._client.hget(self._conn(sid), "game_id")
        if not game_id:
            return None
        has_left = await self._client.srem(self._game_conns(game_id), sid)
        await self._client.hset(self._conn(sid), "game_id", "")
        return game_id if has_left else None

    async def heartbeat(self, sid: str) -> bool:
        """EXISTS, HSET, EXPIRE, HGET, EXPIRE."""
        if not await self._client.exists(self._conn(sid)):
            return False
        await self._client.hset(self._conn(sid), "last_seen", repr(time.time()))
        await self._client.expire(self._conn(sid), CONN_TTL_SECONDS)
        user_id = await self._client.hget(self._conn(sid), "user_id")
        if user_id is not None:
            await self._client.expire(self._user_conn(user_id), CONN_TTL_SECONDS)
        return True

    async def _all_sids(self) -> list[str]:
        """SCAN, which may name a key twice."""
        prefix = self._conn("")
        keys = [key async for key in self._client.scan_iter(match=f"{prefix}*", count=SCAN_COUNT)]
        return [key.removeprefix(prefix) for key in dict.fromkeys(keys)]

    async def cleanup(self, threshold_seconds: float) -> list[str]:
        """SCAN; HGETALL of every connection; HGETALL, SREM, GET, DEL, DEL of a stale one."""
        removed = []
        for sid in await self._all_sids():
            record = await self._client.hgetall(self._conn(sid))
            if record and self._is_stale(record, threshold_seconds) and await self._clean(sid):
                removed.append(sid)
        return removed

    async def get_game(self, game_id: str) -> dict[str, str]:
        """SMEMBERS; HGETALL of every member."""
        found = {}
        for sid in await self._client.smembers(self._game_conns(game_id)):
            record = await self._client.hgetall(self._conn(sid))
            if "user_id" in record:
                found[sid] = record["user_id"]
        return found

    async def get_game_in_pipelines(self, game_id: str) -> dict[str, str]:
        """SMEMBERS; HGETALL of all members together."""
        sids = list(await self._client.smembers(self._game_conns(game_id)))
        async with self._client.pipeline(transaction=False) as pipeline:
            for sid in sids:
                pipeline.hgetall(self._conn(sid))
            records = await pipeline.execute()
        return {sid: record["user_id"] for sid, record in zip(sids, records, strict=True) if "user_id" in record}

    async def is_online(self, user_id: str) -> bool:
        """GET, HGET."""
        sid = await self._client.get(self._user_conn(user_id))
        if sid is None:
            return False
        last_seen = await self._client.hget(self._conn(sid), "last_seen")
        return last_seen is not None and float(last_seen) >= time.time() - STALE_SECONDS

    async def count(self) -> int:
        """SCAN."""
        return len(await self._all_sids())

    async def read_state(self) -> State:
        """Read every key of the namespace."""
        state = State()
        keys = [key async for key in self._client.scan_iter(match=f"{self._prefix}*", count=SCAN_COUNT)]
        for start in range(0, len(keys), SCAN_COUNT):
            chunk = keys[start : start + SCAN_COUNT]
            async with self._client.pipeline(transaction=False) as pipeline:
                for key in chunk:
                    kind = self._kind_and_name(key)[0]
                    {"conn": pipeline.hgetall, "game_conns": pipeline.smembers}.get(kind, pipeline.get)(key)
                    pipeline.ttl(key)
                replies = await pipeline.execute()
            for key, value, ttl in zip(chunk, replies[::2], replies[1::2], strict=True):
                self._add_key(state, key, value, ttl)
        return state

    def _kind_and_name(self, key: str) -> tuple[str, str]:
        kind, _, name = key.removeprefix(self._prefix).partition(":")
        return kind, name

    def _add_key(self, state: State, key: str, value: Any, ttl: int) -> None:
        kind, name = self._kind_and_name(key)
        if ttl == -1:
            state.without_ttl.append(key)
        if kind == "conn" and value.keys() == FIELDS:
            state.records[name] = value["user_id"], value["game_id"] or None
        elif kind == "conn":
            state.partial[name] = value
        elif kind == "user_conn":
            state.users[name] = [value]
        elif kind == "game_conns":
            state.games[name] = set(value)

    async def age(self, seconds: float) -> None:
        """Move the time at which every connection was last seen into the past."""
        sids = await self._all_sids()
        async with self._client.pipeline(transaction=False) as pipeline:
            for sid in sids:
                pipeline.hincrbyfloat(self._conn(sid), "last_seen", -seconds)
            await pipeline.execute()

    async def expire_locks(self) -> None:
        """There are none."""

    async def aclose(self) -> None:
        """There is nothing to free."""
