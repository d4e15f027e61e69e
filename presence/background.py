"""What ``run_cleanup`` and ``run_server_heartbeat`` do next, and what they log; no I/O."""

from __future__ import annotations

import logging
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING

from presence.errors import PresenceError
from presence.operations import HEARTBEATS_UNTIL_STALE, KEPT_SECONDS

if TYPE_CHECKING:
    from presence.operations import Operation, Operations
    from presence.replies import CleanupBatch

logger: logging.Logger = logging.getLogger("presence")

RESENDING_SECONDS = 5
"""The pause of a ``run_cleanup``, at most, after a fault of a batch whose answer may be kept."""

LEAST_SECONDS = 0.1
"""The time that a batch of a ``run_cleanup`` has at least, for its round trip."""


class RepeatedCleanup:
    """What a ``run_cleanup`` sends next, and how many seconds it pauses after the answer or the fault.

    A batch that failed is sent again as the same operation: if only its reply was lost, it is answered as before while
    the answer is kept, and what it removed is still reported.

    While the server is away or stands still, no heartbeat comes through, and all may come to look stale; a batch that
    was sent meanwhile may run before them when it goes on. So a batch says until when it may run, by the server's own
    clock: within the time after the one before it in which nobody who was there then can come to look stale. One that
    comes later does nothing, and the next one comes after a heartbeat of everyone; if that meets a fault, so may the
    heartbeats, and it is late again. The first is late in any case, since nobody knows what was before.
    """

    def __init__(self, operations: Operations, interval: float, threshold_seconds: float | None) -> None:
        self._operations = operations
        self._interval = interval
        self._threshold_seconds = threshold_seconds
        heartbeat = operations.heartbeat_seconds
        # Game servers look dead after three heartbeats, whatever the threshold.
        heartbeats = HEARTBEATS_UNTIL_STALE * heartbeat
        shortest = heartbeats if threshold_seconds is None else min(heartbeats, threshold_seconds)
        # With a shorter threshold, cleanup does not go by heartbeats.
        self._goes_by_heartbeats = shortest > heartbeat
        # With a threshold of few heartbeats a compromise, or a pause of one would make each batch late.
        self._harmless_seconds = max(shortest - heartbeat, 1.5 * heartbeat, LEAST_SECONDS)
        self._batch = self._describe(not_after_ms=0)
        self._has_waited = False
        """Whether the batch before this one was late."""
        self._sent_at: float | None = None
        """When this batch was sent first."""

    def _describe(self, not_after_ms: float) -> Operation[CleanupBatch]:
        not_after = round(not_after_ms) if self._goes_by_heartbeats else None
        return self._operations.repeated_cleanup_batch(self._threshold_seconds, not_after)

    def next(self) -> Operation[CleanupBatch]:
        """Give the operation to send."""
        self._sent_at = self._sent_at or monotonic()
        return self._batch

    def fail(self, error: Exception) -> float:
        """Log a fault; give the seconds to pause after it."""
        if self._has_waited and self._goes_by_heartbeats:
            # It may not run any more; if it has, it is answered as before.
            self._batch = replace(self._batch, arguments=(*self._batch.arguments[:-1], b"0"))
        # The answer to a batch that was sent is kept for a minute, of which the call has used up some.
        is_kept = self._sent_at is not None and monotonic() - self._sent_at < KEPT_SECONDS
        pause = min(self._interval, RESENDING_SECONDS) if is_kept else self._interval
        _log_failure("cleanup failed", pause, error)
        return pause

    def succeed(self, done: CleanupBatch) -> float:
        """Give the seconds to pause after an answer, none when there is more to remove."""
        self._sent_at, self._has_waited = None, done.is_late
        heartbeat = self._operations.heartbeat_seconds
        if done.is_late:
            # Not much later than that, for the server may stand still once more.
            self._batch = self._describe(done.now_ms + 1000 * (heartbeat + max(heartbeat / 2, LEAST_SECONDS)))
            return heartbeat
        self._batch = self._describe(done.now_ms + 1000 * self._harmless_seconds)
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
