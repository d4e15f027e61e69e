"""What ``run_cleanup`` and ``run_server_heartbeat`` do next, and what they log; no I/O."""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING

from presence import arguments
from presence.errors import PresenceError
from presence.operations import HEARTBEATS_UNTIL_STALE, KEPT_SECONDS

if TYPE_CHECKING:
    from presence.operations import Operation, Operations
    from presence.replies import CleanupBatch

logger: logging.Logger = logging.getLogger("presence")

RESENDING_SECONDS = 5
"""The longest pause of a ``run_cleanup`` after a fault of a batch whose answer may still be kept, and of a
``run_server_heartbeat`` after a fault: it may be silent for three heartbeats, of which the call has used up some."""

LEAST_SECONDS = 0.1
"""The least time between two looks of a ``run_cleanup`` at the server, to leave room for their round trips."""

HELD_UP_SECONDS = 7.5
"""How long a call may be held up beyond the end of an outage: the client's timeout, of 5 seconds, and pauses."""

ROUND_TRIP_SECONDS = 1
"""How far apart the answers may be even if heartbeats are short."""

GAPS_UNTIL_WARNING = 10
"""How often a ``run_cleanup`` begins its wait again, without a cleanup in between, before that is logged."""


class RepeatedCleanup:
    """What a ``run_cleanup`` sends next, and how many seconds it pauses after the answer or the fault.

    A batch that failed is sent again as the same operation: if only its reply was lost, it gets the same answer while
    that is kept, and what it removed is still reported.

    While the server is away or stands still, no heartbeat comes through, and everyone may look stale. This therefore
    looks at the server twelve times a heartbeat, and cleans up only once it has answered regularly for a heartbeat and
    a quarter. In that time everyone has sent a heartbeat; the quarter is for those whose last call the outage held up
    beyond its end. The first answer begins that time, and so does one after a fault, or more than a quarter of a
    heartbeat after the previous one. (If heartbeats are short, both quarters are longer: see the constants above.)

    A look is a batch that is too late to do anything. Other batches may be held up as well, such as in a server that
    stands still, and run before the heartbeats when it goes on. Each therefore says until when it may run, by the
    server's own clock, which also tells how far apart the answers were given.
    """

    def __init__(self, operations: Operations, interval_seconds: float, threshold_seconds: float | None) -> None:
        self._operations = operations
        self._interval = interval = arguments.milliseconds("interval_seconds", interval_seconds) / 1000
        self._threshold_seconds = threshold_seconds
        self._describe(0)
        heartbeat = operations.heartbeat_seconds
        look = max(heartbeat / 12, LEAST_SECONDS)
        quarter = 3 * look
        held_up = max(quarter, min(HELD_UP_SECONDS, 2 * heartbeat))
        longest_gap = max(quarter, min(ROUND_TRIP_SECONDS, 2 * heartbeat))
        # With a shorter threshold, even those who send heartbeats may be removed.
        self._goes_by_heartbeats = threshold_seconds is None or threshold_seconds > heartbeat
        self._interval_ms, self._look_ms, self._longest_gap_ms, self._wait_ms = (
            round(1000 * seconds) for seconds in (interval, look, longest_gap, heartbeat + held_up)
        )
        if not self._goes_by_heartbeats:
            self._describe(None)
        self._sent_at: float | None = None
        """When this operation was first sent."""
        # The server's times:
        self._answered_ms: int | None = None
        """Of the last answer; None if a fault came after it."""
        self._regular_since_ms = 0
        self._due_ms = 0
        """From when on the next cleanup is due."""
        self._gaps = 0
        """How often the answers came too far apart since the last cleanup."""

    def _describe(self, not_after_ms: int | None) -> None:
        self._may_remove = not_after_ms != 0
        self._operation = self._operations.cleanup_batch(self._threshold_seconds, not_after_ms=not_after_ms)

    def next(self) -> Operation[CleanupBatch]:
        """Give the operation to send."""
        self._sent_at = self._sent_at or monotonic()
        return self._operation

    def fail(self, error: Exception) -> float:
        """Log a fault; give the seconds to pause after it."""
        self._answered_ms = None
        # The same operation, which may have run: then it is answered as before; see commands.sent_again.
        self._operation = self._operation.having(keep=b"1")
        if self._goes_by_heartbeats:
            self._operation = self._operation.having(not_after_ms=b"0")  # If it has not, it may not do so any more.
        # The answer to a batch that was sent is kept for a minute, of which the call has used up some.
        is_kept = self._sent_at is not None and monotonic() - self._sent_at < KEPT_SECONDS
        pause = min(self._interval, RESENDING_SECONDS if is_kept else self._operations.heartbeat_seconds)
        _log_failure("cleanup failed", pause, error)
        return pause

    def succeed(self, done: CleanupBatch) -> float:
        """Give the seconds to pause after an answer: 0 if there is more to do at once."""
        self._sent_at = None
        if not self._goes_by_heartbeats:
            self._describe(None)
            return self._interval if done.is_last else 0
        now_ms, answered_ms = done.now_ms, self._answered_ms
        if answered_ms is None and not done.is_late:
            # It had run before the fault, and this is its answer from then, which does not tell the time now.
            self._describe(0)
            return 0
        if answered_ms is None or not 0 <= now_ms - answered_ms <= self._longest_gap_ms:
            self._regular_since_ms = now_ms
            if answered_ms is not None:
                self._note_gap(now_ms - answered_ms)
        self._answered_ms = now_ms
        if not done.is_late:
            self._gaps = 0
        has_cleaned_up = done.is_last and not done.is_late
        # Not later than an interval from now, in case the clock was set back.
        self._due_ms = now_ms + self._interval_ms if has_cleaned_up else min(self._due_ms, now_ms + self._interval_ms)
        pause_ms = max(self._regular_since_ms + self._wait_ms, self._due_ms, now_ms) - now_ms
        may_run = pause_ms <= self._look_ms
        self._describe(now_ms + self._longest_gap_ms if may_run else 0)
        return min(pause_ms, self._look_ms) / 1000

    def end(self) -> None:
        """Log an error if a batch may have removed somebody whom nobody will report."""
        if self._sent_at is not None and self._may_remove:
            logger.error(
                "run_cleanup ended before the answer to a batch got through: if it has removed anyone, nobody will be "
                "told of them"
            )

    def _note_gap(self, gap_ms: int) -> None:
        self._gaps += 1
        if self._gaps % GAPS_UNTIL_WARNING == 0:
            logger.warning(
                "no cleanup since %d waits for heartbeats: the server's answers came more than %g s apart each time, "
                "at last %g s; see whether the server, the network, this process or on_removed takes so long",
                self._gaps,
                self._longest_gap_ms / 1000,
                gap_ms / 1000,
            )

    def fail_to_report(self, done: CleanupBatch) -> None:
        """Log the error of ``on_removed`` that is being handled."""
        count = len(done.removed) + len(done.detached)
        logger.exception("on_removed failed for some of %d connections that were removed or detached", count)


class RepeatedServerHeartbeat:
    """How many seconds a ``run_server_heartbeat`` pauses after an answer or a fault."""

    def __init__(self, operations: Operations, interval_seconds: float | None) -> None:
        operations.start_server()  # Refuses a manager without a server_id.
        self._server_id = operations.server_id
        seconds = operations.heartbeat_seconds if interval_seconds is None else interval_seconds
        self._interval = arguments.milliseconds("interval_seconds", seconds) / 1000
        dead_after = HEARTBEATS_UNTIL_STALE * operations.heartbeat_seconds
        if self._interval >= dead_after:
            raise ValueError(
                f"interval_seconds must be less than three heartbeat_seconds, {dead_after:g}, not {self._interval:g}: "
                "after three without a heartbeat of the server, cleanups take all of its players"
            )
        half_way = (self._interval + dead_after) / 2
        operations.silent_after_seconds = max(operations.silent_after_seconds, half_way)

    def fail(self, error: Exception) -> float:
        """Log a fault; give the seconds to pause after it."""
        # The call may have taken 40 of the 90 seconds that the server may be silent.
        pause = min(self._interval, RESENDING_SECONDS)
        _log_failure("the server's heartbeat failed", pause, error)
        return pause

    def succeed(self, is_known: bool) -> float | None:
        """Give the seconds to pause after an answer; None, and log it, when a later start has replaced this one."""
        if is_known:
            return self._interval
        logger.error(
            "a later start of the game server %r has replaced this one: its heartbeat ends. If this process should go "
            "on, another one has the same server_id, perhaps from before a fork; give each its own",
            self._server_id,
        )
        return None


def _log_failure(what: str, pause: float, error: Exception) -> None:
    # An error that is not one of presence's, such as one of a credential provider, needs its traceback.
    is_explained = isinstance(error, PresenceError)
    logger.warning(what + ", next attempt in %g s: %s", pause, error, exc_info=None if is_explained else error)
