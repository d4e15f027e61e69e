"""How many round trips each operation of each contender takes, where nobody disturbs it."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING, Any

import redis.asyncio

from bench.contenders import CONTENDERS
from bench.crowd import PRESENCE
from bench.measure import Spread
from bench.report import Row

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bench.contenders import Contender
    from bench.report import Findings
    from bench.scale import Scale
    from bench.servers import Server

HOW = """What a caller sends and waits for, one after the other, with a warm client that has this server to itself,
counted as the server's reads of its sockets (`total_reads_processed`). A contender that meets another, as in the storm,
takes more of them: *transaction* begins again, *lock* waits."""

MEMBERS = 10
"""Of the room, and of what a cleanup finds stale."""


async def _scenes(contender: Contender) -> AsyncIterator[str]:
    """Run each operation once, and give its name right after it; a name is empty where the scene was set."""
    for number in range(MEMBERS):
        await contender.register(f"sid-{number}", f"user-{number}")
        await contender.join(f"sid-{number}", "room")
    yield ""
    await contender.register("first", "user")
    yield "register, the first of its user"
    await contender.join("first", "game")
    yield "join"
    await contender.register("second", "user")
    yield "register, displacing one in a game"
    await contender.unregister("first")
    yield "late unregister of the one displaced"
    await contender.heartbeat("second")
    yield "heartbeat"
    await contender.join("second", "game")
    yield ""
    await contender.leave("second")
    yield "leave"
    await contender.is_online("user")
    yield "is online"
    await contender.unregister("second")
    yield "unregister"
    await contender.get_game("room")
    yield f"snapshot of a room of {MEMBERS}"
    await contender.age(1000)
    yield ""
    await contender.cleanup(500)
    yield f"cleanup of {MEMBERS}"


async def _count(name: str, url: str) -> dict[str, int]:
    client: Any = redis.asyncio.Redis.from_url(url, decode_responses=True)
    watcher: Any = redis.asyncio.Redis.from_url(url)

    async def reads() -> int:
        return int((await watcher.info("stats"))["total_reads_processed"])

    async with client, watcher:
        # The first time the connection is opened and scripts are loaded.
        for _ in range(2):
            contender = CONTENDERS[name](client, f"round-trips-{uuid.uuid4()}")
            counts: dict[str, int] = {}
            before = await reads()
            async for operation in _scenes(contender):
                after = await reads()
                if operation:
                    counts[operation] = after - before - 1  # The watcher's own.
                before = after
            await contender.aclose()
    return counts


def measure_round_trips(server: Server, _: Scale) -> Findings:
    """Count them for each operation of each contender; of *presence* each must take one."""
    return [
        Row(f"{name}: {operation}", Spread.exactly(count), "", target=1 if name == PRESENCE else None)
        for name in CONTENDERS
        for operation, count in asyncio.run(_count(name, server.url)).items()
    ]
