"""Subscriptions of either kind, read alike, and what they tell, as tables name it."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from presence import EventsLostError
from tests.conftest import Awaited

if TYPE_CHECKING:
    from collections.abc import Iterator

    from presence import Event

MODES = ("pubsub", "stream")

BOUND_SECONDS = 20
"""What comes at all comes long before."""

Told = tuple[str, str, str | None]
"""An event as the tables name it: its type, the sid and the game."""


class Subscribed:
    """A subscription of either kind, entered, and read like a blocking one."""

    def __init__(self, manager: Any, subscription: Any) -> None:
        self._runner = manager._runner if isinstance(manager, Awaited) else None
        self._subscription = subscription
        self._call("enter")

    def _call(self, name: str) -> Any:
        if self._runner is None:
            return getattr(self._subscription, {"next": "__next__", "enter": "__enter__"}.get(name, name))()
        method = getattr(self._subscription, {"next": "__anext__", "enter": "__aenter__", "close": "aclose"}[name])

        async def run() -> Any:
            async with asyncio.timeout(BOUND_SECONDS):
                return await method()

        return self._runner.run(run())

    def next(self) -> Event:
        event: Event = self._call("next")
        return event

    def close(self) -> None:
        self._call("close")

    @property
    def position(self) -> str | None:
        position: str | None = self._subscription.position
        return position

    def read_on(self, seconds: float) -> None:
        """Wait for an event that does not come, until the subscription is closed."""
        if self._runner is None:
            timer = threading.Timer(seconds, self._subscription.close)
            timer.start()
            assert list(self._subscription) == []
            timer.join()
            return

        async def run() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(self._subscription), seconds)

        self._runner.run(run())

    def take(self, count: int) -> list[Event]:
        return [self.next() for _ in range(count)]

    def tells_the_loss(self, match: str) -> None:
        """Meet the error that says what was lost, and meet it again, as whoever goes on does."""
        for _ in range(2):
            with pytest.raises(EventsLostError, match=match):
                self.next()


@contextmanager
def subscribed(manager: Any, **about: Any) -> Iterator[Subscribed]:
    events = Subscribed(manager, manager.subscribe(**about))
    try:
        yield events
    finally:
        events.close()


END = "the end"
"""The user whose registration marks the end of what a test looks at."""


def told(event: Event) -> Told:
    return event.type.value, event.connection.sid, event.connection.game_id


def until_the_end(manager: Any, events: Subscribed) -> list[Event]:
    """Give what was published, up to a last change that the test makes for that."""
    manager.register_connection(END, END)
    found: list[Event] = []
    while (event := events.next()).connection.user_id != END:
        found.append(event)
    manager.unregister_connection(END)
    assert [event.type.value for event in events.take(3)] == ["user_online", "unregistered", "user_offline"]
    return found
