"""The longest scripts of a run, by the server's own SLOWLOG."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Self

from bench.measure import Spread
from bench.report import Row
from presence import operations
from presence.scripts import Script

if TYPE_CHECKING:
    from types import TracebackType

    import redis

LONGEST_SCRIPT_MS = 5
"""What no script may exceed."""
SETTINGS = {"slowlog-log-slower-than": 200, "slowlog-max-len": 20_000}
"""Microseconds, and entries: enough for all that is run between two looks."""
LISTED = 5


class SlowScripts:
    """Which of the library's scripts held the server longest, while this is entered."""

    def __init__(self, client: redis.Redis) -> None:
        self._client: Any = client
        self._names = {script.sha: script.name for script in vars(operations).values() if isinstance(script, Script)}
        self._longest_us: defaultdict[str, list[int]] = defaultdict(list)
        """Of each script, the longest call in each round in which it was logged."""
        self._last_id = -1
        self._settings_before: dict[str, str] = {}

    def __enter__(self) -> Self:
        for name, value in SETTINGS.items():
            self._settings_before |= self._client.config_get(name)
            self._client.config_set(name, value)
        self.skip()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, value in self._settings_before.items():
            self._client.config_set(name, value)

    def skip(self) -> None:
        """Leave out what was logged until now."""
        newest = self._client.slowlog_get(1)
        self._last_id = newest[0]["id"] if newest else self._last_id

    def look(self) -> None:
        """Take in what was logged since the last look, as one round."""
        longest: dict[str, int] = {}
        for entry in self._client.slowlog_get(SETTINGS["slowlog-max-len"]):
            if entry["id"] <= self._last_id:
                break
            command, sha = [*entry["command"].split(b" ", 2), b""][:2]
            name = self._names.get(sha.decode(errors="replace"))
            if command.upper() == b"EVALSHA" and name:
                longest[name] = max(longest.get(name, 0), entry["duration"])
        for name, microseconds in longest.items():
            self._longest_us[name].append(microseconds)
        self.skip()

    def rows(self) -> list[Row]:
        """Give the longest call of all, and for the longest scripts what is usual in a round."""
        of_all = max(((max(calls), name) for name, calls in self._longest_us.items()), default=None)
        if of_all is None:
            return []
        rows = [Row(f"longest script: {of_all[1]}", Spread.exactly(of_all[0] / 1000), "ms", target=LONGEST_SCRIPT_MS)]
        usual = {
            name: Spread.of([microseconds / 1000 for microseconds in calls]) for name, calls in self._longest_us.items()
        }
        rows += [
            Row(f"the longest {name} of each round", spread, "ms")
            for name, spread in sorted(usual.items(), key=lambda item: -item[1].median)[:LISTED]
        ]
        return rows
