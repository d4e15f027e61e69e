"""What a run tells about its progress: a bar that moves on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys

BAR_WIDTH = 24
PLAIN_STEP_PERCENT = 25


class Progress:
    """The progress of one piece of work of known size."""

    def __init__(self, work: str, total: int) -> None:
        self._work = work
        self._total = total
        self._done = 0
        self._shown_percent = -1
        self._show()

    def advance(self, count: int = 1) -> None:
        """Count what was done."""
        self._done += count
        self._show()

    def _show(self) -> None:
        percent = 100 * self._done // self._total
        on_terminal = sys.stdout.isatty()
        if percent == self._shown_percent or (not on_terminal and (percent == 0 or percent % PLAIN_STEP_PERCENT)):
            return
        self._shown_percent = percent
        counts = f"{self._done:,} of {self._total:,}"
        if not on_terminal:
            print(f"  {self._work}: {counts} ({percent} %)", flush=True)
            return
        filled = BAR_WIDTH * percent // 100
        bar = "#" * filled + "." * (BAR_WIDTH - filled)
        end = "\n" if percent == 100 else ""
        print(f"\r  [{bar}] {percent:3} %  {self._work}: {counts}\x1b[K", end=end, flush=True)
