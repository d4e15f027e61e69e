"""*lock*: the steps of *plain*, each operation of a connection under its user's lock (redis-py's ``Lock``)."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, ClassVar

from bench.contenders.plain import SCAN_COUNT, Plain

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

LOCK_SECONDS = 10
"""The lock of a caller that died is free after this time, and its half-done work stays."""
POLL_SECONDS = 0.01
"""How often a waiting caller asks again; redis-py's own 0.1 would only make it slower."""


class Locked(Plain):
    """An operation on a user locks it; one on a sid reads the sid's user, locks that, and reads again.

    A game has members of many users and no lock, so its snapshot is as it is without; and whose a sid is, and whether
    it is there, is read before there is a lock.
    """

    name: ClassVar[str] = "lock"
    poll_seconds = POLL_SECONDS

    def _lock(self, user_id: str) -> AbstractAsyncContextManager[object]:
        lock: AbstractAsyncContextManager[object] = self._client.lock(
            f"{self._prefix}lock:{user_id}", timeout=LOCK_SECONDS, sleep=self.poll_seconds
        )
        return lock

    @asynccontextmanager
    async def _lock_user_of(self, sid: str) -> AsyncIterator[bool]:
        """Lock the user of a connection; give whether there is such a connection."""
        user_id = await self._client.hget(self._conn(sid), "user_id")
        while user_id is not None:
            async with self._lock(user_id):
                user_id_now = await self._client.hget(self._conn(sid), "user_id")
                if user_id_now == user_id:
                    yield True
                    return
            user_id = user_id_now
        yield False

    async def register(self, sid: str, user_id: str) -> list[str]:
        """As *plain* does, under the user's lock."""
        async with self._lock(user_id):
            return await super().register(sid, user_id)

    async def unregister(self, sid: str) -> bool:
        """As *plain* does, under the lock of the connection's user."""
        async with self._lock_user_of(sid) as is_known:
            return is_known and await super().unregister(sid)

    async def join(self, sid: str, game_id: str) -> tuple[bool, str | None]:
        """As *plain* does, under the lock of the connection's user."""
        async with self._lock_user_of(sid) as is_known:
            return await super().join(sid, game_id) if is_known else (False, None)

    async def leave(self, sid: str) -> str | None:
        """As *plain* does, under the lock of the connection's user."""
        async with self._lock_user_of(sid) as is_known:
            return await super().leave(sid) if is_known else None

    async def heartbeat(self, sid: str) -> bool:
        """As *plain* does, under the lock of the connection's user."""
        async with self._lock_user_of(sid) as is_known:
            return is_known and await super().heartbeat(sid)

    async def is_online(self, user_id: str) -> bool:
        """As *plain* does, under the user's lock."""
        async with self._lock(user_id):
            return await super().is_online(user_id)

    async def cleanup(self, threshold_seconds: float) -> list[str]:
        """As *plain* does, but before it removes a stale connection it locks its user and looks again."""
        removed = []
        for sid in await self._all_sids():
            record = await self._client.hgetall(self._conn(sid))
            if not record or not self._is_stale(record, threshold_seconds):
                continue
            async with self._lock(record.get("user_id", "")):
                record = await self._client.hgetall(self._conn(sid))
                if record and self._is_stale(record, threshold_seconds) and await self._clean(sid):
                    removed.append(sid)
        return removed

    async def expire_locks(self) -> None:
        """Let every lock go, as after ``LOCK_SECONDS``."""
        keys = [key async for key in self._client.scan_iter(match=f"{self._prefix}lock:*", count=SCAN_COUNT)]
        if keys:
            await self._client.delete(*keys)
