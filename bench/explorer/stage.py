"""Runs the operations of a pair step by step: one command at a time reaches the server, in the order asked for."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from bench.contenders.library import Presence
from bench.contenders.lock import Locked
from bench.explorer.gate import Gate, gated_pool

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from bench.contenders import Contender, State
    from bench.explorer.pairs import Call, Pair
    from bench.explorer.schedules import Chooser, Schedule

MOST_STEPS = 1000
"""Of one schedule; operations that keep each other from ending would go on for ever."""
LONGEST_RUN_SECONDS = 60
"""Of one schedule, which takes milliseconds: a call that neither writes nor ends is an error, and not a long wait."""
FRESH_SECONDS = 30
"""How long a set-up is used: far less than makes one of its connections stale."""

_RESTORE = """
local keys = redis.call('KEYS', ARGV[1])
if #keys > 0 then
  redis.call('DEL', unpack(keys))
end
for index = 2, #ARGV, 3 do
  redis.call('RESTORE', ARGV[index], ARGV[index + 1], ARGV[index + 2])
end
"""
_DUMP = """
local dump = {}
for _, key in ipairs(redis.call('KEYS', ARGV[1])) do
  dump[#dump + 1] = key
  dump[#dump + 1] = math.max(redis.call('PTTL', key), 0)
  dump[#dump + 1] = redis.call('DUMP', key)
end
return dump
"""


@dataclass(frozen=True, slots=True)
class Crash:
    """One of the callers dies after so many steps of its call: the server has run them, but the last reply is lost.

    Of a call that is one command nothing but the reply can be lost: it took effect, and nobody is told.
    """

    index: int
    after_steps: int


@dataclass(frozen=True, slots=True)
class ScheduleRun:
    """What one schedule led to."""

    schedule: Schedule
    written: tuple[bytes, ...]
    """What each step sent."""
    answers: tuple[object, ...]
    """None for a call whose caller died."""
    state: State
    crash: Crash | None = None
    """Who died, and after how many steps: all of its call's, where that took fewer than it was to die after."""

    def steps_of(self, index: int) -> int:
        """Count the steps of one of the calls."""
        return self.schedule.count(index)


class _Actor:
    """One caller: a contender on a connection of its own, behind a gate."""

    def __init__(
        self, url: str, contender: type[Contender], namespace: str, settings: Mapping[str, Any], call: Call
    ) -> None:
        self.gate = Gate()
        self.client: Any = Redis(connection_pool=gated_pool(url, self.gate))
        self._make_contender = partial(_make, contender, self.client, namespace, settings)
        self.contender = self._make_contender()
        self.call = call
        self.task: asyncio.Task[object] | None = None

    async def start(self) -> None:
        """Begin the call, up to its first write."""
        stopped = self.gate.close()
        self.task = asyncio.create_task(self._answer())
        self.task.add_done_callback(lambda _: self.gate.stopped())
        await stopped

    async def _answer(self) -> object:
        try:
            return await self.call.run(self.contender)
        except RedisConnectionError:
            raise
        except Exception as error:
            # A call that fails answers nothing that a serial order could.
            return f"raised {error!r}"

    @property
    def is_done(self) -> bool:
        return self.task is not None and self.task.done()

    async def die(self) -> None:
        """Send nothing any more, and be replaced by another caller that knows nothing of this one."""
        assert self.task is not None
        if not self.is_done:
            # What writes may be another task than the caller's, as presence shares one connection among all callers.
            self.gate.crash()
            self.task.cancel()
            await asyncio.wait([self.task])
            if not self.task.cancelled():
                raise RuntimeError(f"{self.call} went on after its crash: {self.task!r}")
            await self.contender.aclose()
            self.contender = self._make_contender()
            self.gate.open()
            # The connection that a dead caller leaves is closed, and with it what it watched.
            await self.client.execute_command("UNWATCH")

    async def aclose(self) -> None:
        await self.contender.aclose()
        await self.client.aclose(close_connection_pool=True)


def _make(contender: Any, client: Redis, namespace: str, settings: Mapping[str, Any]) -> Contender:
    made: Contender = contender(client, namespace, **settings)
    if isinstance(made, Locked):
        made.poll_seconds = 0  # The schedule says when it asks again.
    return made


def _asks_for_a_lock(written: bytes) -> bool:
    return b"\r\nSET\r\n" in written and b"\r\nNX\r\n" in written


def _may_free_a_lock(written: bytes) -> bool:
    return b"\r\nEVALSHA\r\n" in written


class Stage:
    """A server's namespace, in which one pair of one contender runs again and again, each time from the same set-up."""

    def __init__(self, url: str, contender: type[Contender], pair: Pair) -> None:
        self.pair = pair
        self._namespace = f"explorer-{uuid.uuid4().hex[:8]}"
        self._pattern = f"*{self._namespace}*"
        self._admin: Any = Redis.from_url(url, socket_timeout=None)
        self._client: Any = Redis.from_url(url, decode_responses=True, socket_timeout=None)
        settings = dict(pair.settings)
        if contender is Presence:
            # At the end the events are compared with what is stored.
            settings["events"] = "stream"
        self._observer = _make(contender, self._client, self._namespace, settings)
        self._actors = [_Actor(url, contender, self._namespace, settings, call) for call in pair.calls]
        self._restore = self._admin.register_script(_RESTORE)
        self._dump: list[bytes | int] = []
        self._dumped_at = -float("inf")

    async def __aenter__(self) -> Self:
        # Once without a schedule: afterwards all scripts are loaded and all connections open, so neither is a step.
        await self._set_up()
        for actor in self._actors:
            await actor.call.run(self._observer)
            await actor.client.ping()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._restore(args=[self._pattern])
        for actor in self._actors:
            await actor.aclose()
        await self._observer.aclose()
        await self._client.aclose()
        await self._admin.aclose()

    async def _set_up(self) -> None:
        await self._put_keys()
        if self.pair.forget_scripts:
            await self._admin.script_flush()

    async def _put_keys(self) -> None:
        """Make the set-up with the contender itself, or put back what it had made a short time ago."""
        if time.monotonic() < self._dumped_at + FRESH_SECONDS:
            await self._restore(args=[self._pattern, *self._dump])
            return
        await self._restore(args=[self._pattern])
        for call in self.pair.set_up:
            await call.run(self._observer)
        self._dump = await self._admin.eval(_DUMP, 0, self._pattern)
        self._dumped_at = time.monotonic()

    async def run(self, chooser: Chooser, crash: Crash | None = None) -> ScheduleRun:
        """Run one schedule to its end.

        A step is one write and its replies; a pipeline, MULTI to EXEC among them, is one write. A caller that asked for
        a lock in vain asks again only when one may have been freed: the same question again would change nothing. When
        nobody else is left, the lock is a dead caller's, and expires.

        Args:
            chooser: who steps next.
            crash: who dies, if anyone; at the end of its call, where that ends before.

        Returns:
            What came out.

        """
        async with asyncio.timeout(LONGEST_RUN_SECONDS):
            return await self._run(chooser, crash)

    async def _run(self, chooser: Chooser, crash: Crash | None) -> ScheduleRun:
        await self._set_up()
        for actor in self._actors:
            await actor.start()
        schedule: list[int] = []
        written: list[bytes] = []
        steps = [0] * len(self._actors)
        waiting_for_a_lock: set[int] = set()
        while True:
            pending = [index for index, actor in enumerate(self._actors) if not actor.is_done]
            if not pending:
                break
            runnable = [index for index in pending if index not in waiting_for_a_lock]
            if not runnable:
                await self._observer.expire_locks()
                waiting_for_a_lock.clear()
                continue
            index = chooser.choose(runnable, steps)
            actor = self._actors[index]
            sent = actor.gate.waiting
            assert sent is not None
            await actor.gate.let_through()
            steps[index] += 1
            schedule.append(index)
            written.append(sent)
            if len(schedule) > MOST_STEPS:
                raise RuntimeError(f"{self.pair.name} takes more than {MOST_STEPS} steps: {schedule}")
            if _may_free_a_lock(sent):
                waiting_for_a_lock.clear()
            elif _asks_for_a_lock(sent) and actor.gate.waiting == sent:
                waiting_for_a_lock.add(index)
            if crash and index == crash.index and steps[index] == crash.after_steps:
                await actor.die()
        for actor in self._actors:
            actor.gate.open()
        answers = tuple(
            None if (crash and index == crash.index) or actor.task is None else actor.task.result()
            for index, actor in enumerate(self._actors)
        )
        died = Crash(crash.index, steps[crash.index]) if crash else None
        return ScheduleRun(tuple(schedule), tuple(written), answers, await self._observer.read_state(), died)
