"""*transaction*: the steps of *plain*; what is read is watched, and all writes are one MULTI/EXEC, with retries."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from redis.exceptions import WatchError

from bench.contenders.interface import CONN_TTL_SECONDS, STALE_SECONDS
from bench.contenders.plain import Plain

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

Result = TypeVar("Result")


class Transaction(Plain):
    """Every key is watched before it is read, so EXEC succeeds only where nothing that was read has changed since."""

    name: ClassVar[str] = "transaction"

    async def _transact(self, attempt: Callable[[Any], Awaitable[Result]]) -> Result:
        """Run an attempt on a pipeline until no watched key was changed meanwhile."""
        async with self._client.pipeline(transaction=True) as pipeline:
            while True:
                with suppress(WatchError):
                    return await attempt(pipeline)

    async def _read_to_clean(self, pipeline: Any, sid: str) -> tuple[dict[str, str], bool]:
        """Watch and read a connection's record, and whether its user's entry names it."""
        await pipeline.watch(self._conn(sid))
        record = await pipeline.hgetall(self._conn(sid))
        if not record:
            return record, False
        user_conn = self._user_conn(record.get("user_id", ""))
        await pipeline.watch(user_conn)
        return record, await pipeline.get(user_conn) == sid

    def _queue_clean(self, pipeline: Any, sid: str, record: dict[str, str], is_named: bool) -> None:
        if record.get("game_id"):
            pipeline.srem(self._game_conns(record["game_id"]), sid)
        if is_named:
            pipeline.delete(self._user_conn(record.get("user_id", "")))
        pipeline.delete(self._conn(sid))

    async def register(self, sid: str, user_id: str) -> list[str]:
        """WATCH, GET; for an earlier connection WATCH, HGETALL; all writes in one EXEC."""

        async def attempt(pipeline: Any) -> list[str]:
            await pipeline.watch(self._user_conn(user_id))
            earlier = await pipeline.get(self._user_conn(user_id))
            record = {}
            if earlier is not None:
                await pipeline.watch(self._conn(earlier))
                record = await pipeline.hgetall(self._conn(earlier))
            pipeline.multi()
            if record:
                self._queue_clean(pipeline, earlier, record, is_named=False)  # the SET below replaces the entry
            pipeline.hset(self._conn(sid), mapping=self._new_record(user_id))
            pipeline.expire(self._conn(sid), CONN_TTL_SECONDS)
            pipeline.set(self._user_conn(user_id), sid, ex=CONN_TTL_SECONDS)
            await pipeline.execute()
            return [earlier] if record and earlier != sid else []

        return await self._transact(attempt)

    async def _clean(self, sid: str, older_than_seconds: float | None = None) -> bool:
        """WATCH, HGETALL, WATCH, GET; all writes in one EXEC."""

        async def attempt(pipeline: Any) -> bool:
            record, is_named = await self._read_to_clean(pipeline, sid)
            is_wanted = record and (older_than_seconds is None or self._is_stale(record, older_than_seconds))
            if not is_wanted:
                return False
            pipeline.multi()
            self._queue_clean(pipeline, sid, record, is_named)
            await pipeline.execute()
            return True

        return await self._transact(attempt)

    async def join(self, sid: str, game_id: str) -> tuple[bool, str | None]:
        """WATCH, HGET; all writes in one EXEC."""

        async def attempt(pipeline: Any) -> tuple[bool, str | None]:
            await pipeline.watch(self._conn(sid))
            current = await pipeline.hget(self._conn(sid), "game_id")
            if current is None:
                return False, None
            if current == game_id:
                return True, None
            pipeline.multi()
            if current:
                pipeline.srem(self._game_conns(current), sid)
            pipeline.hset(self._conn(sid), "game_id", game_id)
            pipeline.sadd(self._game_conns(game_id), sid)
            pipeline.expire(self._game_conns(game_id), CONN_TTL_SECONDS)
            await pipeline.execute()
            return True, current or None

        return await self._transact(attempt)

    async def leave(self, sid: str) -> str | None:
        """WATCH, HGET; all writes in one EXEC."""

        async def attempt(pipeline: Any) -> str | None:
            await pipeline.watch(self._conn(sid))
            game_id: str | None = await pipeline.hget(self._conn(sid), "game_id")
            if not game_id:
                return None
            pipeline.multi()
            pipeline.srem(self._game_conns(game_id), sid)
            pipeline.hset(self._conn(sid), "game_id", "")
            await pipeline.execute()
            return game_id

        return await self._transact(attempt)

    async def heartbeat(self, sid: str) -> bool:
        """WATCH, HGET; all writes in one EXEC."""

        async def attempt(pipeline: Any) -> bool:
            await pipeline.watch(self._conn(sid))
            user_id = await pipeline.hget(self._conn(sid), "user_id")
            if user_id is None:
                return False
            pipeline.multi()
            pipeline.hset(self._conn(sid), "last_seen", repr(time.time()))
            pipeline.expire(self._conn(sid), CONN_TTL_SECONDS)
            pipeline.expire(self._user_conn(user_id), CONN_TTL_SECONDS)
            await pipeline.execute()
            return True

        return await self._transact(attempt)

    async def cleanup(self, threshold_seconds: float) -> list[str]:
        """SCAN; HGETALL of every connection; a stale one is watched, read again and removed in one EXEC."""
        removed = []
        for sid in await self._all_sids():
            record = await self._client.hgetall(self._conn(sid))
            if record and self._is_stale(record, threshold_seconds) and await self._clean(sid, threshold_seconds):
                removed.append(sid)
        return removed

    async def get_game(self, game_id: str) -> dict[str, str]:
        """WATCH, SMEMBERS; HGET of all members in one EXEC, which holds where the members are still the same."""

        async def attempt(pipeline: Any) -> dict[str, str]:
            await pipeline.watch(self._game_conns(game_id))
            sids = list(await pipeline.smembers(self._game_conns(game_id)))
            pipeline.multi()
            for sid in sids:
                pipeline.hget(self._conn(sid), "user_id")
            user_ids = await pipeline.execute()
            return {sid: user_id for sid, user_id in zip(sids, user_ids, strict=True) if user_id is not None}

        return await self._transact(attempt)

    async def is_online(self, user_id: str) -> bool:
        """WATCH, GET; HGET in an EXEC."""

        async def attempt(pipeline: Any) -> bool:
            await pipeline.watch(self._user_conn(user_id))
            sid = await pipeline.get(self._user_conn(user_id))
            if sid is None:
                return False
            pipeline.multi()
            pipeline.hget(self._conn(sid), "last_seen")
            (last_seen,) = await pipeline.execute()
            return last_seen is not None and float(last_seen) >= time.time() - STALE_SECONDS

        return await self._transact(attempt)
