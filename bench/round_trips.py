"""How many round trips each operation of each contender takes, where nobody disturbs it."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING, Any

import redis.asyncio

from bench.contenders import CONTENDERS, PRESENCE
from bench.measure import MeasurementError, Spread
from bench.report import Row

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from bench.contenders import Contender
    from bench.report import Findings
    from bench.scale import Scale
    from bench.servers import Server

HOW = """What a caller sends and waits for, one after the other, with a warm client that has this server to itself,
counted as the server's reads of its sockets (`total_reads_processed`). A contender that meets another, as in the storm,
takes more of them: *transaction* begins again, *lock* waits."""

MEMBERS = 10
"""Of the room, and of what a cleanup finds stale."""


def _steps(contender: Contender) -> Iterator[tuple[str, Coroutine[Any, Any, object], object]]:
    """Give each operation once, by its name, and what it must answer; without a name, what only sets the scene."""
    members = {f"sid-{number}": f"user-{number}" for number in range(MEMBERS)}
    for sid, user_id in members.items():
        yield "", contender.register(sid, user_id), []
        yield "", contender.join(sid, "room"), (True, None)
    yield "register, the first of its user", contender.register("first", "user"), []
    yield "join", contender.join("first", "game"), (True, None)
    yield "register, displacing one in a game", contender.register("second", "user"), ["first"]
    yield "late unregister of the one displaced", contender.unregister("first"), False
    yield "heartbeat", contender.heartbeat("second"), True
    yield "", contender.join("second", "game"), (True, None)
    yield "leave", contender.leave("second"), "game"
    yield "is online", contender.is_online("user"), True
    yield "unregister", contender.unregister("second"), True
    yield f"snapshot of a room of {MEMBERS}", contender.get_game("room"), members
    yield "", contender.age(1000), None
    yield f"cleanup of {MEMBERS}", _sorted(contender.cleanup(500)), sorted(members)


async def _sorted(call: Coroutine[Any, Any, list[str]]) -> list[str]:
    return sorted(await call)


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
            for operation, call, expected in _steps(contender):
                before = await reads()
                answer = await call
                after = await reads()
                if answer != expected:
                    what = operation or "a preparation"
                    raise MeasurementError(f"{what} of {name} answered {answer!r}, and not {expected!r}")
                if operation:
                    counts[operation] = after - before - 1  # The watcher's own.
            await contender.aclose()
    return counts


def measure_round_trips(server: Server, _: Scale) -> Findings:
    """Count them for each operation of each contender; of *presence* each must take one."""
    return [
        Row(f"{name}: {operation}", Spread.exactly(count), "", target=1 if name == PRESENCE else None)
        for name in CONTENDERS
        for operation, count in asyncio.run(_count(name, server.url)).items()
    ]
