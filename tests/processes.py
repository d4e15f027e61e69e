"""Several processes that begin at the same moment, for tests of what servers do at once."""

from __future__ import annotations

import multiprocessing
import time

PROCESSES = 4

# A forked child would share the parent's sockets.
spawn = multiprocessing.get_context("spawn")


def sleep_until(moment: float) -> None:
    """Wait for a moment of this machine's clock."""
    time.sleep(max(0, moment - time.time()))
