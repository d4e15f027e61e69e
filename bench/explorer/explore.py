"""Explores the schedules of a pair, checks what each led to, and counts."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import permutations
from typing import TYPE_CHECKING, NamedTuple

from bench.contenders import CONTENDERS, kind_of, violations
from bench.contenders.library import Presence
from bench.explorer.gate import readable
from bench.explorer.schedules import AtRandom, DepthFirst, InOrder
from bench.explorer.specification import Outcome, scheduled_outcome, serial_outcomes
from bench.explorer.stage import Crash, Stage
from tests.processes import spawn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.explorer.pairs import Pair
    from bench.explorer.schedules import Schedule
    from bench.explorer.stage import ScheduleRun

LIMIT = 20_000
SEED = "2026"
PROBES, PROBES_OF_A_CRASH = 100, 10
"""Schedules that are drawn to estimate how many there are, where that cannot be told before."""
UNSURE = 1.5
"""How far such an estimate may be off: up to this many times the limit all schedules are tried first."""
RUNS_PER_SCHEDULE = 3
"""How many runs may be made for each schedule that is wanted, since some repeat one or are none of the wanted kind."""

WRONG_ANSWERS = "answers of no serial order"
WRONG_END = "end state of no serial order"
"""Where all invariants hold and the answers would be right."""


@dataclass(slots=True)
class Tally:
    """Schedules that were run, and what was wrong in them."""

    schedules: int = 0
    of: int = 0
    """How many there are; about, where not all were run."""
    is_complete: bool = True
    wrong: int = 0
    """With anything wrong."""
    kinds: Counter[str] = field(default_factory=Counter)
    """What was wrong: in how many schedules."""
    example: str = ""
    """One that was wrong, with the fewest turns between the callers, step by step."""
    turns: float = math.inf

    def add(self, pair: Pair, run: ScheduleRun, outcomes: list[Outcome]) -> None:
        """Check what a schedule led to, and count it."""
        self.schedules += 1
        broken = violations(run.state)
        outcome = Outcome.of(run.answers, run.state)
        kinds = {kind_of(violation) for violation in broken}
        if all(outcome.answers != serial.answers for serial in outcomes):
            kinds.add(WRONG_ANSWERS)
        elif not broken and not any(map(outcome.agrees, outcomes)):
            kinds.add(WRONG_END)
        if not kinds:
            return
        self.wrong += 1
        self.kinds.update(kinds)
        turns = sum(one != other for one, other in zip(run.schedule, run.schedule[1:], strict=False))
        if turns < self.turns:
            self.turns = turns
            self.example = "\n".join(_tell(pair, run, broken, kinds))

    def __add__(self, other: Tally) -> Tally:
        first = min(self, other, key=lambda tally: tally.turns)
        return Tally(
            self.schedules + other.schedules,
            self.of + other.of,
            self.is_complete and other.is_complete,
            self.wrong + other.wrong,
            self.kinds + other.kinds,
            first.example,
            first.turns,
        )


@dataclass(frozen=True, slots=True)
class Result:
    """What the schedules of one pair of one contender led to: with all callers alive, and with one that dies."""

    contender: str
    pair: str
    alive: Tally
    crashed: Tally

    @property
    def wrong(self) -> int:
        """Schedules with anything wrong."""
        return self.alive.wrong + self.crashed.wrong


def _tell(pair: Pair, run: ScheduleRun, broken: list[str], kinds: set[str]) -> Iterator[str]:
    """Tell a schedule step by step, what it answered and what is wrong."""
    names = [f"{chr(ord('A') + index)} {call}" for index, call in enumerate(pair.calls)]
    yield f"before: {', '.join(map(str, pair.set_up)) or 'nothing'}"
    width = max(map(len, names))
    for index, written in zip(run.schedule, run.written, strict=True):
        yield f"  {names[index]:<{width}}  {readable(written)}"
    for index, (name, answer) in enumerate(zip(names, run.answers, strict=True)):
        is_dead = run.crash is not None and run.crash.index == index
        yield f"{name} " + (f"died after step {run.steps_of(index)}" if is_dead else f"answered {answer!r}")
    yield from (f"wrong: {violation}" for violation in broken)
    yield from (f"wrong: {kind}" for kind in sorted(kinds & {WRONG_ANSWERS, WRONG_END}))
    if WRONG_END in kinds:
        yield f"  {run.state}"


def _who_dies(crash: Crash | None) -> int | None:
    return crash.index if crash else None


def multinomial(steps: Sequence[int]) -> int:
    """Count the orders in which callers can make so many steps each."""
    return math.factorial(sum(steps)) // math.prod(map(math.factorial, steps))


class _Explorer:
    """Explores one pair on its stage."""

    def __init__(self, stage: Stage, limit: int, seed: str, progress: Callable[[], None], *, is_atomic: bool) -> None:
        self._stage = stage
        self._is_atomic = is_atomic
        """Whether each step is an atomic part of a call: then only one order of these can be told by the answers."""
        self._serial_outcomes: dict[int | None, list[Outcome]] = {}
        self._limit = limit
        self._seed = seed
        self._progress = progress
        self._orders = list(permutations(range(len(stage.pair.calls))))
        self._most_steps = [0] * len(stage.pair.calls)

    async def explore(self, crashes: bool) -> tuple[Tally, Tally]:
        """Run the schedules in which all live, and then those in which one dies."""
        for order in self._orders:
            await self._run(InOrder(order), None)
        alive = await self._tally([None], PROBES)
        if not crashes:
            return alive, Tally()
        points = [
            Crash(index, after_steps)
            for index, most_steps in enumerate(self._most_steps)
            for after_steps in range(1, most_steps + 1)
        ]
        return alive, await self._tally(points, PROBES_OF_A_CRASH)

    async def _run(self, chooser: InOrder | AtRandom | DepthFirst, crash: Crash | None) -> ScheduleRun:
        run = await self._stage.run(chooser, crash)
        for index, most_steps in enumerate(self._most_steps):
            self._most_steps[index] = max(most_steps, run.steps_of(index))
        return run

    def _expected_steps(self, crash: Crash | None) -> list[int]:
        expected = list(self._most_steps)
        if crash:
            expected[crash.index] = crash.after_steps
        return expected

    def _at_random(self, crash: Crash | None) -> AtRandom:
        return AtRandom(self._expected_steps(crash), f"{self._seed} {crash}")

    async def _tally(self, points: Sequence[Crash | None], probes: int) -> Tally:
        """Run all schedules of these points, or a sample where there are more than the limit."""
        # All probes together are no more runs than the limit.
        estimates = await self._estimate(points, max(min(probes, self._limit // len(points)), 1))
        if sum(estimates) <= self._limit * UNSURE:
            tally = await self._tally_all(points)
            if tally:
                return tally
        return await self._tally_sample(points, estimates)

    async def _estimate(self, points: Sequence[Crash | None], probes: int) -> list[int]:
        """Tell about how many schedules each point has; exactly enough to decide whether all of them can be run.

        If every caller always took as many steps as it can, there would be so many as the multinomial says. That is
        often far too many, since a caller that takes many steps leaves the others few; then some are drawn.
        """
        most = [multinomial(self._expected_steps(crash)) for crash in points]
        if sum(most) <= self._limit:
            return most
        return [await self._draw_estimate(crash, probes) for crash in points]

    async def _draw_estimate(self, crash: Crash | None, probes: int) -> int:
        chooser = self._at_random(crash)
        total = 0.0
        for _ in range(probes):
            chooser.next_run()
            if (await self._run(chooser, crash)).crash == crash:
                total += 1 / chooser.probability
        return round(total / probes)

    def _outcomes(self, run: ScheduleRun) -> list[Outcome]:
        """Give what may come out."""
        dies = _who_dies(run.crash)
        if self._is_atomic:
            return [scheduled_outcome(self._stage.pair, run.schedule, dies)]
        if dies not in self._serial_outcomes:
            self._serial_outcomes[dies] = serial_outcomes(self._stage.pair, dies)
        return self._serial_outcomes[dies]

    async def _tally_all(self, points: Sequence[Crash | None]) -> Tally | None:
        """Run every schedule; give None when there are more than the limit."""
        tally = Tally()
        for crash in points:
            chooser = DepthFirst()
            runs = 0
            while not chooser.is_exhausted:
                # Those in which the call ended before its caller was to die are another point's, but take as long.
                if tally.schedules > self._limit or runs > RUNS_PER_SCHEDULE * self._limit:
                    return None
                run = await self._run(chooser, crash)
                runs += 1
                if run.crash == crash:
                    tally.add(self._stage.pair, run, self._outcomes(run))
                    self._progress()
                chooser.next_run()
        tally.of = tally.schedules
        return tally

    async def _tally_sample(self, points: Sequence[Crash | None], estimates: Sequence[int]) -> Tally:
        """Run serial orders, and different schedules that are drawn, until there are as many as the limit.

        Half of them are drawn evenly from the points, and half in proportion to how many schedules each has, since such
        an estimate may be far off. A caller that was to die after more steps than its call took dies at the call's end.
        """
        tally = Tally(is_complete=False)
        seen: set[tuple[Crash | None, Schedule]] = set()

        def add(run: ScheduleRun) -> None:
            if (run.crash, run.schedule) not in seen:
                seen.add((run.crash, run.schedule))
                tally.add(self._stage.pair, run, self._outcomes(run))
                self._progress()

        choice = random.Random(self._seed)
        serial = [(InOrder(order), crash) for crash in points for order in self._orders]
        for in_order, crash in choice.sample(serial, min(len(serial), self._limit // 2)):
            add(await self._run(in_order, crash))
        choosers = [self._at_random(crash) for crash in points]
        draws, totals = [0] * len(points), [0.0] * len(points)
        weights = [estimate / max(sum(estimates), 1) + 1 / len(points) for estimate in estimates]
        while len(seen) < self._limit and sum(draws) < RUNS_PER_SCHEDULE * self._limit:
            (position,) = choice.choices(range(len(points)), weights)
            chooser, crash = choosers[position], points[position]
            chooser.next_run()
            run = await self._run(chooser, crash)
            draws[position] += 1
            totals[position] += 1 / chooser.probability if run.crash == crash else 0
            add(run)
        about = [
            total / drawn if drawn else estimate
            for total, drawn, estimate in zip(totals, draws, estimates, strict=True)
        ]
        tally.of = max(round(sum(about)), tally.schedules)
        return tally


def explore(
    contender: str,
    pair: Pair,
    *,
    url: str,
    limit: int = LIMIT,
    seed: str = SEED,
    crashes: bool = True,
    progress: Callable[[], None] = lambda: None,
) -> Result:
    """Run a pair of operations of a contender through all schedules, or a sample where there are more than the limit.

    Args:
        contender: its name in ``CONTENDERS``.
        pair: the operations, and what was there before.
        url: a server's; only the keys of a namespace of its own are touched.
        limit: schedules to run at most with all callers alive, and about as many again in which one of them dies.
        seed: of the samples.
        crashes: whether to run also the schedules in which one of the callers dies after each of its steps.
        progress: called for each schedule.

    Returns:
        What was wrong, and in how many schedules.

    """

    async def run() -> Result:
        async with Stage(url, CONTENDERS[contender], pair) as stage:
            is_atomic = contender == Presence.name and not pair.forget_scripts
            explorer = _Explorer(stage, limit, f"{seed} {contender} {pair.name}", progress, is_atomic=is_atomic)
            return Result(contender, pair.name, *await explorer.explore(crashes))

    return asyncio.run(run())


class Exploration(NamedTuple):
    """What is to be explored, see ``explore``."""

    contender: str
    pair: Pair
    limit: int = LIMIT


def measure_interleavings(
    url: str,
    explorations: Sequence[Exploration],
    *,
    processes: int | None = None,
    progress: Callable[[Result], None] = lambda _: None,
) -> list[Result]:
    """Explore pairs of contenders in several processes.

    Args:
        url: a server's, reachable for all of them.
        explorations: those to make.
        processes: how many explore at a time; None for as many as there are processors. Only one may where scripts are
            forgotten, as a server has the same ones for all.
        progress: called with each result as it comes.

    Returns:
        The results, in the order of the explorations.

    """
    results = {}
    with ProcessPoolExecutor(processes, mp_context=spawn) as executor:
        futures = {
            executor.submit(explore, contender, pair, url=url, limit=limit): number
            for number, (contender, pair, limit) in enumerate(explorations)
        }
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            progress(future.result())
    return [results[number] for number in range(len(explorations))]
