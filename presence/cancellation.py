"""How asyncio code tells whether its own task was cancelled, or only what it awaits."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def heeding_cancellation() -> Iterator[None]:
    """Raise a cancellation that was swallowed within; put this around what redis-py awaits.

    Python 3.11's asyncio.wait_for, through which redis-py connects and writes, can lose one.
    """
    before = cancellations()
    yield
    if cancellations() > before:
        raise asyncio.CancelledError


def cancellations() -> int:
    """Count how often the current task has been cancelled."""
    task = asyncio.current_task()
    return task.cancelling() if task else 0
