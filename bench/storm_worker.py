"""One process of the storm: many tasks that connect, play, beat, drop and come late, and perhaps a cleaner."""

from __future__ import annotations

import asyncio
import random
import time
import zlib
from array import array
from collections import Counter, defaultdict, deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import redis.asyncio
from redis.exceptions import RedisError

from bench.contenders import CONTENDERS
from bench.history import CLEAN_UP, HEARTBEAT, JOIN, LEAVE, REGISTER, UNREGISTER, RecordedCall, Recorder
from presence import PresenceError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.synchronize import Barrier
    from pathlib import Path

    from bench.contenders import Contender

LATE_UNREGISTER = "late unregister"
"""A choice of the storm: unregister a connection that is known to be displaced."""

STORM_MIX = {REGISTER: 25, LATE_UNREGISTER: 12, UNREGISTER: 9, JOIN: 22, LEAVE: 8, HEARTBEAT: 24}
"""How often each operation is chosen."""

CLEANERS = 2
OPERATIONS_BETWEEN_CLEANUPS = 100
"""Of one cleaner's own process."""
IDLE_OPERATIONS = 5
"""Stale is who was not seen for the time of so many operations of an average user: a few at any moment, whatever the
speed. (About a third of the operations are registers and heartbeats that find their connection.)"""

OWN, OTHERS = 0.65, 0.25
"""How often an operation is about a connection of this process, or of another one; else about an old one."""

HASTY = 0.5
"""How often a late unregister is of the connection that was displaced last; else of the one that waits longest."""

START_SECONDS = 60
ANSWER_SECONDS = 60
"""How long a call waits for its answer. On a machine that is busy with the storm, a process can stand still for
seconds; redis-py's own 5 would then lose an answer, which no contender could help."""


def user_name(number: int) -> str:
    """Name a user of the storm."""
    return f"user-{number}"


@dataclass(frozen=True)
class StormPlan:
    """What all processes of a storm have in common."""

    contender: str
    url: str
    namespace: str
    operations: int
    processes: int
    tasks: int
    users: int
    games: int
    seed: int
    limit_seconds: float
    """No operation begins after this time."""
    only_registers: bool = False
    """Whether it does nothing else, for all of that time."""
    registers_everyone: bool = False
    """Whether it does nothing but register every user once."""
    sid_prefix: str = ""
    """What makes the sids others than those of another plan in the same namespace."""
    cleaners: int = CLEANERS
    record: Path | None = None

    def user_of(self, sid: str) -> str:
        """Every process can tell whose a sid is, also one that another process made."""
        return user_name(zlib.crc32(sid.encode()) % self.users)

    def operations_of(self, process: int) -> int:
        """Give a process's share."""
        return self.operations // self.processes + (process < self.operations % self.processes)

    def cleaners_of(self, process: int) -> int:
        """Spread the cleaners over the processes."""
        return sum(cleaner % self.processes == process for cleaner in range(self.cleaners))


def _no_latencies() -> array[int]:
    return array("Q")


@dataclass
class WorkerOutcome:
    """What the calls of one process were answered, and how long they took; times on the machine's monotonic clock."""

    start_ns: int = 0
    end_ns: int = 0
    latencies_ns: defaultdict[str, array[int]] = field(default_factory=lambda: defaultdict(_no_latencies))
    registered: list[str] = field(default_factory=list)
    displaced: list[str] = field(default_factory=list)
    unregistered: list[str] = field(default_factory=list)
    cleaned_up: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


class Worker:
    """The tasks of one process."""

    def __init__(
        self, plan: StormPlan, process: int, contender: Contender, recorder: Recorder | None, done: Any
    ) -> None:
        self._plan = plan
        self._process = process
        self._contender = contender
        self._recorder = recorder
        self._done = done
        self._left = plan.operations_of(process)
        self._begun = 0
        self._own: deque[str] = deque(maxlen=max(1, plan.users // plan.processes))
        self._old: deque[str] = deque(maxlen=10 * plan.users)
        self._late: deque[str] = deque()
        self._sids = 0
        self._cleanup_is_due = asyncio.Event()
        self.outcome = WorkerOutcome()

    async def run(self) -> None:
        """Do this process's share of the operations."""
        self.outcome.start_ns = time.monotonic_ns()
        cleaners = [asyncio.create_task(self._clean_up()) for _ in range(self._plan.cleaners_of(self._process))]
        await asyncio.gather(*(self._play(task) for task in range(self._plan.tasks)))
        self.outcome.end_ns = time.monotonic_ns()
        self._cleanup_is_due.set()
        await asyncio.gather(*cleaners)

    async def register_everyone(self) -> None:
        """Let all users be there, so that each register that is measured displaces a connection."""
        users = range(self._process, self._plan.users, self._plan.processes)
        await self._register_in_tasks(map(user_name, users))

    async def run_registers(self) -> None:
        """Register users chosen at random until the time is over."""
        self.outcome.start_ns = time.monotonic_ns()
        await self._register_in_tasks(self._random_users())
        self.outcome.end_ns = time.monotonic_ns()

    def _random_users(self) -> Iterator[str]:
        users = [user_name(number) for number in range(self._plan.users)]
        choice = random.Random(f"{self._plan.seed} {self._plan.sid_prefix} {self._process}")
        end_ns = self.outcome.start_ns + self._plan.limit_seconds * 1e9
        while time.monotonic_ns() < end_ns:
            yield users[int(choice.random() * len(users))]

    async def _register_in_tasks(self, users: Iterator[str]) -> None:
        """Register with as little of our own around it as can be: it counts as the contender's time."""

        async def work() -> None:
            for user_id in users:
                self._sids += 1
                sid = f"{self._plan.sid_prefix}{self._process}-{self._sids}"
                try:
                    self.outcome.displaced += await self._contender.register(sid, user_id)
                except (RedisError, PresenceError, TimeoutError) as error:
                    self.outcome.errors[f"{REGISTER}: {_name(error)}"] += 1
                else:
                    self.outcome.registered.append(sid)

        await asyncio.gather(*(work() for _ in range(self._plan.tasks)))

    def _seconds(self) -> float:
        return (time.monotonic_ns() - self.outcome.start_ns) / 1e9

    def _take_one(self) -> bool:
        """Tell whether there is another operation to do."""
        if not self._left or self._seconds() > self._plan.limit_seconds:
            return False
        self._left -= 1
        self._begun += 1
        self._done[self._process] = self._begun
        if self._begun % OPERATIONS_BETWEEN_CLEANUPS == 0:
            self._cleanup_is_due.set()
        return True

    async def _play(self, task: int) -> None:
        choice = random.Random(f"{self._plan.seed} {self._process} {task}")
        kinds, weights = list(STORM_MIX), list(accumulate(STORM_MIX.values()))
        while self._take_one():
            (kind,) = choice.choices(kinds, cum_weights=weights)
            if kind == REGISTER:
                await self._register()
            elif kind == LATE_UNREGISTER and self._late:
                # Some come right after the displacement, some long after.
                await self._unregister(self._late.pop() if choice.random() < HASTY else self._late.popleft())
            elif kind in (UNREGISTER, LATE_UNREGISTER):
                await self._unregister(self._some_sid(choice))
            elif kind == JOIN:
                sid, game_id = self._some_sid(choice), f"game-{choice.randrange(self._plan.games)}"
                await self._call(JOIN, sid, self._contender.join(sid, game_id), game_id)
            elif kind == LEAVE:
                sid = self._some_sid(choice)
                await self._call(LEAVE, sid, self._contender.leave(sid))
            else:
                sid = self._some_sid(choice)
                await self._call(HEARTBEAT, sid, self._contender.heartbeat(sid))

    def _some_sid(self, choice: random.Random) -> str:
        """Choose a connection: most of the recent ones are there, the older ones are not, and some never were."""
        place = choice.random()
        if place < OWN and self._own:
            return choice.choice(self._own)
        if place < OWN + OTHERS:
            process = choice.randrange(self._plan.processes)
            return f"{process}-{max(1, self._sids - choice.randrange(len(self._own) + 1))}"
        return choice.choice(self._old) if self._old else "unknown"

    async def _register(self) -> None:
        self._sids += 1
        sid = f"{self._process}-{self._sids}"
        displaced = await self._call(REGISTER, sid, self._contender.register(sid, self._plan.user_of(sid)))
        if displaced is not None:
            self.outcome.registered.append(sid)
            self.outcome.displaced += displaced
            self._late.extend(displaced)
            if len(self._own) == self._own.maxlen:
                self._old.append(self._own[0])
            self._own.append(sid)

    async def _unregister(self, sid: str) -> None:
        if await self._call(UNREGISTER, sid, self._contender.unregister(sid)):
            self.outcome.unregistered.append(sid)

    async def _clean_up(self) -> None:
        since, begun = self._seconds(), 0
        while True:
            await self._cleanup_is_due.wait()
            if self.outcome.end_ns:
                return
            self._cleanup_is_due.clear()
            seconds_each = (self._seconds() - since) / (self._begun - begun)
            threshold = max(0.001, IDLE_OPERATIONS * self._plan.users * seconds_each / self._plan.processes)
            since, begun = self._seconds(), self._begun
            start = time.monotonic_ns()
            try:
                removed = await self._contender.cleanup(threshold)
            except (RedisError, PresenceError, TimeoutError) as error:
                self.outcome.errors[f"{CLEAN_UP}: {_name(error)}"] += 1
                self._record_lost_cleanup(start)
                continue
            end = time.monotonic_ns()
            self.outcome.latencies_ns[CLEAN_UP].append(end - start)
            self.outcome.cleaned_up += removed
            for sid in removed:
                self._record(start, end, CLEAN_UP, sid, answer=True, threshold_ns=round(threshold * 1e9))

    def _record_lost_cleanup(self, start: int) -> None:
        """Write down for every user that a cleanup may have removed something."""
        if self._recorder:
            for user_id in map(user_name, range(self._plan.users)):
                self._recorder.add(RecordedCall(start, None, CLEAN_UP, user_id, "", None, None))

    async def _call(self, operation: str, sid: str, call: Awaitable[Any], game_id: str | None = None) -> Any:
        """Wait for a call, and write down when it was and what it answered; one that raises was lost."""
        start = time.monotonic_ns()
        try:
            answer = await call
        except (RedisError, PresenceError, TimeoutError) as error:
            self.outcome.errors[f"{operation}: {_name(error)}"] += 1
            self._record(start, None, operation, sid, game_id)
            return None
        end = time.monotonic_ns()
        self.outcome.latencies_ns[operation].append(end - start)
        self._record(start, end, operation, sid, game_id, answer)
        return answer

    def _record(
        self,
        start: int,
        end: int | None,
        operation: str,
        sid: str,
        game_id: str | None = None,
        answer: Any = None,
        threshold_ns: int | None = None,
    ) -> None:
        if self._recorder:
            user_id = self._plan.user_of(sid)
            self._recorder.add(RecordedCall(start, end, operation, user_id, sid, game_id, answer, threshold_ns))


def _name(error: Exception) -> str:
    """Name an error, and the one of redis-py that the library explains by it."""
    cause = error.__cause__ if isinstance(error, PresenceError) else None
    return type(error).__name__ + (f" from {type(cause).__name__}" if cause else "")


def connect(plan: StormPlan) -> redis.asyncio.Redis:
    """Make a client for all tasks of a process."""
    connections = 2 * (plan.tasks + plan.cleaners)
    return redis.asyncio.Redis.from_url(
        plan.url,
        decode_responses=True,
        max_connections=connections,
        socket_timeout=ANSWER_SECONDS,
        socket_connect_timeout=ANSWER_SECONDS,
    )


def run_process(plan: StormPlan, process: int, start: Barrier, done: Any, outcome: Connection) -> None:
    """Be one process of a storm: start together with the others, and send the outcome."""

    async def run() -> WorkerOutcome:
        recording = Recorder(plan.record, process) if plan.record else nullcontext()
        async with connect(plan) as client:
            # All connections are open before the clock starts.
            await asyncio.gather(*(client.ping() for _ in range(plan.tasks)))
            contender = CONTENDERS[plan.contender](client, plan.namespace)
            with recording as recorder:
                worker = Worker(plan, process, contender, recorder, done)
                await asyncio.to_thread(start.wait, START_SECONDS)
                if plan.registers_everyone:
                    await worker.register_everyone()
                else:
                    await (worker.run_registers() if plan.only_registers else worker.run())
            await contender.aclose()
        return worker.outcome

    outcome.send(asyncio.run(run()))
