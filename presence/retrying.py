"""What is sent again, when, and for how long: the policy for faults that may pass."""

from __future__ import annotations

from itertools import takewhile
from time import monotonic
from typing import TYPE_CHECKING, Any

import redis.asyncio.sentinel
import redis.exceptions
import redis.retry
import redis.sentinel
from redis.backoff import EqualJitterBackoff

from presence.commands import Repeated, renewed, sent_again
from presence.scripts import BY_SHA

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from presence.addresses import Address
    from presence.commands import Command

RETRIES = 6
"""Attempts after the first. With the backoff below they span 1.75 to 3.5 seconds: a restart, not a long outage.

Every script that is sent again after a lost reply changes nothing more and answers the same, for a minute.
"""

CLUSTER_RETRIES = 10
"""The same for a cluster, 3.75 to 7.5 seconds: a node refuses all for two seconds more after its restart."""

RETRYING_SECONDS = 33
"""A call is not sent again later than this after it was first to be sent, however few attempts it had: the answers are
kept for a minute. The rest of that is for a cluster's client, which connects within its last attempt: a pause, the
socket and the greeting, with a timeout of 5 seconds each. Elsewhere the manager looks at the time once more when it is
connected.
"""


def end_of(request: Sequence[Command]) -> float:
    """Give until when a request may be sent that was sent before, or is now first to be sent; by ``monotonic``."""
    return (request.since if isinstance(request, Repeated) else monotonic()) + RETRYING_SECONDS


def too_late() -> redis.exceptions.TimeoutError:
    """Make the fault of a call that may not be sent any more."""
    return redis.exceptions.TimeoutError("the first attempt was so long ago that its answer may be forgotten soon")


def backoff() -> EqualJitterBackoff:
    """Give the growing pauses between attempts."""
    # Half of each wait is certain, so that the attempts cannot all fall into the first moment of an outage.
    return EqualJitterBackoff(base=0.05, cap=1)


def tries_again(address: Address, given: dict[str, Any]) -> bool:
    """Tell whether the manager sends calls again; else the client does, as its own policy says."""
    return address.deployment == "cluster" and "retry" not in given


def cluster_pauses(request: Sequence[Command] = ()) -> Iterator[float]:
    """Give the seconds to wait before each further attempt on a cluster; redis-py's clients would not wait at all.

    Call it before the first attempt: the time within which a call may be sent again begins then.
    """
    pauses, end = backoff(), end_of(request)
    failures = takewhile(lambda _: monotonic() < end, range(1, CLUSTER_RETRIES + 1))
    return map(pauses.compute, failures)


def attempts(
    request: Sequence[Command], replies: dict[int, Any], *, tries_again: bool
) -> Iterator[tuple[float, dict[int, Command]]]:
    """Give the seconds to wait before each attempt on a cluster, and the commands to send then, by their indexes.

    At first these are all of a request, then those which met a fault that may pass, with what follows them. The caller
    notes each reply, by its index, before it asks for the next attempt.

    What was redirected in a pipeline, as the slot moves, goes again at once, one by one, up to the first fault:
    redis-py follows the redirections of single calls. (It would do so by itself, but without what follows.) Of a client
    that tries again itself, nothing else is sent again here.
    """
    pauses = cluster_pauses(request) if tries_again else iter(())
    yield 0, dict(enumerate(request))
    answers: dict[int, Any] = {}
    latest = dict(enumerate(request))
    were_together = len(request) > 1
    while failed := transient_faults([*replies.values()]):
        alone = [index for index in failed if were_together and isinstance(replies[index], _REDIRECTIONS)]
        pause = 0 if alone else next(pauses, None)
        if pause is None:
            break
        failed = alone or failed
        again = with_what_follows(failed, request, replies)
        answers |= {
            index: replies[index] for index in again if index not in failed and BY_SHA[request[index][1]].is_repeatable
        }
        # What is renewed stays so, if it fails in its turn.
        latest |= {index: sent_again(latest[index]) if index in failed else renewed(latest[index]) for index in again}
        part = {index: latest[index] for index in again}
        were_together = not alone and len(part) > 1
        if not alone:
            yield pause, part
            continue
        for index, command in part.items():
            yield 0, {index: command}
            if transient_faults([replies[index]]):
                # What was not sent again has met the same: a redirection would tell the caller nothing.
                replies |= dict.fromkeys([later for later in alone if later > index], replies[index])
                break
    # What was read once has an answer, though its repetition met a fault. (What has missed its script is still to run.)
    for index, answer in answers.items():
        met = replies[index]
        if isinstance(met, Exception) and not isinstance(met, redis.exceptions.NoScriptError):
            replies[index] = answer


def with_what_follows(
    refused: Sequence[int], commands: Sequence[Command], replies: Sequence[Any] | dict[int, Any]
) -> list[int]:
    """Give the indexes of the calls that were refused and are to be repeated, and of those behind the first as well.

    Of those behind, only the ones that have just read, or have answered that they found nothing to do: they may depend
    on what was refused, and nothing is lost, as their answers have reported no change. But not if a call behind them
    has acted on the same connection: an unregister that found nobody would end what was registered after it.
    """
    repeated, acted_on = set(refused), set[Any]()
    for index in range(len(commands) - 1, refused[0], -1):
        script, reply = BY_SHA.get(commands[index][1]), replies[index]
        if script is None or isinstance(reply, Exception):
            continue
        conn_key = commands[index][3] if script.keys[0] == "conn" else None
        is_undone = bool(acted_on) if script.reaches_others else conn_key in acted_on
        has_acted = script.has_acted(reply)
        # A join that left no game has nothing to report either. It has to be repeated if what was refused may undo it.
        is_endangered = not reply and any(commands[earlier][3] == conn_key for earlier in refused if earlier < index)
        if not is_undone and (not has_acted or is_endangered):
            repeated.add(index)
        if has_acted and (conn_key or script.reaches_others):
            acted_on.add(conn_key or script.name)
    return sorted(repeated)


_REDIRECTIONS = (redis.exceptions.AskError, redis.exceptions.TryAgainError)
"""MOVED is one of the first kind."""


def transient_faults(replies: Sequence[Any]) -> list[int]:
    """Indexes of the replies worth sending again: the node is away or the slot is moving."""
    return [index for index, reply in enumerate(replies) if isinstance(reply, Exception) and _is_transient(reply)]


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, redis.exceptions.RedisClusterException) and error.__cause__:
        return _is_transient(error.__cause__)  # It could not read the layout.
    return isinstance(error, _TRANSIENT) and not isinstance(error, _PERMANENT)


_TRANSIENT = (
    OSError,
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
    redis.exceptions.ClusterError,
    redis.exceptions.SlotNotCoveredError,
    redis.exceptions.AskError,
    redis.exceptions.TryAgainError,
)

_PERMANENT = (redis.exceptions.AuthenticationError, redis.exceptions.AuthorizationError)


def connect_once(connection: Any) -> Any:
    """Connect, trying only once, since the attempt that this is a part of is repeated; with asyncio, await it.

    redis-py's own ``connect``, and its sending on a connection that is not open, would retry within each attempt.
    """
    if isinstance(connection, _ASKING_SENTINELS):
        return connection._connect_retry()
    return connection.connect_check_health(retry_socket_connect=False)


def opens_again(error: BaseException, pool: Any, failures: int) -> bool:
    """Tell whether to take a connection out of a pool again after so many failures, as often as its policy says.

    Where the server closes each connection as soon as it has greeted it, redis-py's pools give up at once. (Where one
    cannot connect at all, redis-py has tried again already.)
    """
    # A pool checks that a connection is there, opens it once more, and checks again: this error follows another.
    is_closed_when_greeted = type(error) is redis.exceptions.ConnectionError and isinstance(
        error.__context__, redis.exceptions.ConnectionError
    )
    retry = pool.connection_kwargs.get("retry")
    return is_closed_when_greeted and retry is not None and failures <= retry.get_retries()


_ASKING_SENTINELS = (redis.sentinel.SentinelManagedConnection, redis.asyncio.sentinel.SentinelManagedConnection)


class AsyncRetry(redis.asyncio.retry.Retry):
    """Does not try again what no attempt can mend; to redis-py, a wrong password is one more broken connection."""

    async def call_with_retry(
        self, do: Callable[[], Any], fail: Callable[..., Any], *arguments: Any, **options: Any
    ) -> Any:
        """Call until it succeeds, as redis-py does."""

        async def fail_or_end(error: Exception, *failures: int) -> None:
            await fail(error, *failures)
            if isinstance(error, _PERMANENT):
                raise error

        return await super().call_with_retry(do, fail_or_end, *arguments, **options)


class TimelyRetry(redis.retry.Retry):
    """The same for blocking clients. It gives up in time, too.

    redis-py only counts, and tries to connect as often again within each attempt to send. Each connection has a copy of
    its own. Where the managers send themselves, they see to the time: this is for the first time that a connection is
    opened, and for calls that go through redis-py's ``execute_command``.
    """

    _end: float | None = None

    def call_with_retry(self, do: Callable[[], Any], fail: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call until it succeeds, as redis-py does; attempts within an attempt have no more time than that."""
        outer_end = self._end
        end = monotonic() + RETRYING_SECONDS if outer_end is None else outer_end

        def fail_or_end(error: Exception, *failures: int) -> None:
            fail(error, *failures)
            if monotonic() > end or isinstance(error, _PERMANENT):
                raise error

        try:
            self._end = end  # Not before, where an interruption would leave it for good.
            return super().call_with_retry(do, fail_or_end, *arguments, **options)
        finally:
            self._end = outer_end
