"""The longest scripts of a run, by the server's own SLOWLOG."""

from __future__ import annotations

import statistics
from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from bench.measure import Spread
from bench.report import Row
from presence import operations
from presence.scripts import Script

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    import redis

LONGEST_SCRIPT_MS = 5
"""What no script may exceed."""
LIMIT = "slowlog-log-slower-than"
SETTINGS = {LIMIT: 200, "slowlog-max-len": 20_000}
"""Microseconds, and entries: enough for all that is run between two looks."""
LISTED = 5
COUNTING = "for _ = 1, 100000 do end"
"""A script that touches no data and always takes the same: what it takes longer now and then is the machine's."""
COUNTS_NOTHING_ELSE = "a script that only counts"
COUNTS = 5
"""How often it runs between two steps."""


class SlowScripts:
    """Which of the library's scripts held the server longest, while this is entered."""

    def __init__(self, client: redis.Redis) -> None:
        self._client: Any = client
        self._names = {script.sha: script.name for script in vars(operations).values() if isinstance(script, Script)}
        self._counting = str(client.script_load(COUNTING))
        self._names[self._counting] = COUNTS_NOTHING_ELSE
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

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Let nothing be logged: of calls that are not measured, in pipelines that keep the CPUs of both sides busy."""
        self._client.config_set(LIMIT, -1)
        try:
            yield
        finally:
            self._client.config_set(LIMIT, SETTINGS[LIMIT])

    def count(self) -> None:
        """Run the script that only counts, between the others, so that it meets what they meet of the machine."""
        for _ in range(COUNTS):
            self._client.evalsha(self._counting, 0)

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
        longest_ms = {name: [us / 1000 for us in longest] for name, longest in self._longest_us.items()}
        counting_ms = longest_ms.pop(COUNTS_NOTHING_ELSE, None)
        rows = []
        if longest_ms:
            of_all, name = max((max(longest), name) for name, longest in longest_ms.items())
            rows.append(Row(f"longest script: {name}", Spread.exactly(of_all), "ms", target=LONGEST_SCRIPT_MS))
        if counting_ms:
            rows.append(Row(f"longest of {COUNTS_NOTHING_ELSE}", Spread.exactly(max(counting_ms)), "ms"))
        usual = sorted(longest_ms.items(), key=lambda item: -statistics.median(item[1]))
        rows += [Row(f"the longest {name} of each round", Spread.of(longest), "ms") for name, longest in usual[:LISTED]]
        return rows
