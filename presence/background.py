"""What ``run_cleanup`` and ``run_server_heartbeat`` do next, and what they log; no I/O."""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING

from presence.errors import PresenceError
from presence.operations import HEARTBEATS_UNTIL_STALE, KEPT_SECONDS, Operation
from presence.replies import CleanupBatch

if TYPE_CHECKING:
    from presence.operations import Operations

logger = logging.getLogger("presence")

RESENDING_SECONDS = 5
"""The pause of a ``run_cleanup``, at most, after a fault of a batch whose answer may be kept."""


class RepeatedCleanup:
    """What a ``run_cleanup`` sends next, and how many seconds it pauses after the answer or the fault.

    A batch that failed is sent again as the same operation: if only its reply was lost, it is answered as before while
    the answer is kept, and what it removed is still reported. While no batch comes through, no heartbeat may either:
    when that has lasted so long that all may look stale, the next one waits until the server answers, and then for a
    heartbeat of everyone. So it does after a pause that may hide such a time.
    """

    def __init__(self, operations: Operations, interval: float, threshold_seconds: float | None) -> None:
        self._operations = operations
        self._interval = interval
        self._threshold_seconds = threshold_seconds
        self._batch = operations.cleanup_batch(threshold_seconds)
        self._sent_at: float | None = None
        """When this batch was sent first."""
        self._cleaned_at = monotonic()
        self._has_failed = self._only_asks = self._has_waited = False
        # Game servers look dead after three heartbeats, whatever the threshold.
        heartbeats = HEARTBEATS_UNTIL_STALE * operations.heartbeat_seconds
        shortest = heartbeats if threshold_seconds is None else min(heartbeats, threshold_seconds)
        self._harmless_seconds = shortest - operations.heartbeat_seconds

    def next(self) -> Operation[CleanupBatch]:
        """Give the operation to send."""
        now = monotonic()
        seconds = now - self._cleaned_at
        # With a threshold below a heartbeat, cleanup does not go by heartbeats.
        may_look_stale = 0 < self._harmless_seconds <= seconds
        may_be_outage = self._has_failed or seconds > self._operations.heartbeat_seconds
        self._only_asks = may_look_stale and may_be_outage and not self._has_waited
        if self._only_asks:
            count = self._operations.get_connection_count()
            return Operation(count.script, count.keys, count.arguments, lambda _: CleanupBatch((), is_last=True))
        self._sent_at = self._sent_at or now
        return self._batch

    def fail(self, error: Exception) -> float:
        """Log a fault; give the seconds to pause after it."""
        self._has_failed, self._has_waited = True, False
        # The answer to a batch that was sent is kept for a minute, of which the call has used up some.
        is_kept = self._sent_at is not None and monotonic() - self._sent_at < KEPT_SECONDS
        pause = min(self._interval, RESENDING_SECONDS) if is_kept else self._interval
        _log_failure("cleanup failed", pause, error)
        return pause

    def succeed(self, done: CleanupBatch) -> float:
        """Give the seconds to pause after an answer, none when there is more to remove."""
        if self._only_asks:
            self._has_waited = True
            return self._operations.heartbeat_seconds
        self._batch = self._operations.cleanup_batch(self._threshold_seconds)
        self._sent_at, self._has_failed, self._has_waited = None, False, False
        self._cleaned_at = monotonic()
        return self._interval if done.is_last else 0

    def fail_to_report(self, done: CleanupBatch) -> None:
        """Log the error of ``on_removed`` that is being handled."""
        count = len(done.removed) + len(done.detached)
        logger.exception("on_removed failed for some of %d connections that were removed or detached", count)


class RepeatedServerHeartbeat:
    """How many seconds a ``run_server_heartbeat`` pauses after an answer or a fault."""

    def __init__(self, operations: Operations, interval: float) -> None:
        self._server_id = operations.server_id
        self._interval = interval

    def fail(self, error: Exception) -> float:
        """Log a fault; give the seconds to pause after it."""
        _log_failure("the server's heartbeat failed", self._interval, error)
        return self._interval

    def succeed(self, is_known: bool) -> float | None:
        """Give the seconds to pause after an answer; None, and log it, when a later start has replaced this one."""
        if is_known:
            return self._interval
        logger.error("a later start of the game server %r has replaced this one: its heartbeat ends", self._server_id)
        return None


def _log_failure(what: str, pause: float, error: Exception) -> None:
    # An error that is none of presence's, such as one of a credential provider, needs its traceback.
    is_explained = isinstance(error, PresenceError)
    logger.warning(what + ", next attempt in %g s: %s", pause, error, exc_info=None if is_explained else error)
