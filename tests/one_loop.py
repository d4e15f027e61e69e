"""What tests of the calls of one event loop share: a manager that is ready for them, and waits beside them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import redis.asyncio

import presence
from tests.fault_proxy import BOUND_SECONDS
from tests.watching import wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 6 * BOUND_SECONDS))


@asynccontextmanager
async def warm_manager(url: str, players: int, **options: Any) -> AsyncIterator[presence.ConnectionManager]:
    """A manager whose server has the scripts that the tests use, and players 0, 1, … each with a connection."""
    async with presence.ConnectionManager.from_url(url, client_name="shared", **options) as manager:
        await manager.update_heartbeat("unknown")
        await manager.update_heartbeats(["unknown"])
        await manager.leave_game("unknown")
        await manager.get_connection_count()
        for number in range(players):
            await manager.register_connection(f"sid-{number}", f"user-{number}")
        yield manager


async def until(condition: Callable[[], object]) -> None:
    """Wait for a state that the server is about to reach."""
    await asyncio.to_thread(wait_until, condition)


class SlowConnection(redis.asyncio.Connection):
    """Takes a while for each reply, as a slow link does for a large one."""

    seconds: ClassVar[float] = 0

    async def read_response(self, *arguments: Any, **options: Any) -> Any:
        await asyncio.sleep(self.seconds)
        return await super().read_response(*arguments, **options)
