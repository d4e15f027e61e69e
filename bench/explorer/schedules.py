"""Which task steps next: every order once, or a sample of them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

Schedule = tuple[int, ...]
"""The task that made each step."""


class Chooser(Protocol):
    """Chooses the task that makes the next step of a run."""

    def choose(self, runnable: Sequence[int], steps: Sequence[int]) -> int:
        """Choose one of the tasks that can step, given how many steps each has made."""


class InOrder:
    """One task after the other: a serial order."""

    def __init__(self, order: Sequence[int]) -> None:
        self._order = order

    def choose(self, runnable: Sequence[int], steps: Sequence[int]) -> int:  # noqa: ARG002
        """Let the first that can step do so."""
        return next(index for index in self._order if index in runnable)


class DepthFirst:
    """Every schedule exactly once, each a run of its own, whatever the number of a task's steps depends on.

    A run follows the schedule before it up to the last point where another task could have stepped, lets the next one
    step there, and from then on takes the first that can.
    """

    def __init__(self) -> None:
        self.is_exhausted = False
        self._prefix: list[int] = []
        self._run: list[tuple[int, Sequence[int]]] = []

    def choose(self, runnable: Sequence[int], steps: Sequence[int]) -> int:  # noqa: ARG002
        """Follow the schedule; the same prefix must find the same tasks runnable."""
        position = len(self._run)
        chosen = self._prefix[position] if position < len(self._prefix) else runnable[0]
        if chosen not in runnable:
            raise RuntimeError(f"a repeated schedule took another course: task {chosen} cannot step, only {runnable}")
        self._run.append((chosen, tuple(runnable)))
        return chosen

    def next_run(self) -> None:
        """Go on to the schedule after the one that was run."""
        while self._run:
            chosen, runnable = self._run.pop()
            later = runnable[runnable.index(chosen) + 1 :]
            if later:
                self._prefix = [choice for choice, _ in self._run] + [later[0]]
                self._run = []
                return
        self.is_exhausted = True


class AtRandom:
    """Schedules drawn at random.

    A task steps next with a probability in proportion to the steps that it has left; where their numbers are fixed,
    that makes all schedules equally likely. Where they depend on the others' steps, some come more often: the share of
    those drawn that end wrong is no estimate of the share of all. One over the probability of a schedule that was drawn
    is, on average, the number of schedules that there are.
    """

    def __init__(self, expected_steps: Sequence[int], seed: str) -> None:
        self._expected_steps = expected_steps
        self._random = random.Random(seed)
        self.probability = 1.0

    def next_run(self) -> None:
        """Begin another schedule."""
        self.probability = 1.0

    def choose(self, runnable: Sequence[int], steps: Sequence[int]) -> int:
        """Draw one."""
        weights = [max(self._expected_steps[index] - steps[index], 1) for index in runnable]
        (position,) = self._random.choices(range(len(runnable)), weights)
        self.probability *= weights[position] / sum(weights)
        return runnable[position]
