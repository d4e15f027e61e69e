"""What is said to the server to run operations, and in which order; no I/O.

An exchange yields commands to send together and is sent their replies. So a conversation is written once, and the two
managers repeat only how it is carried.
"""

from __future__ import annotations

from collections.abc import Iterable
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from redis.exceptions import NoScriptError

from presence.commands import Repeated, SecondLoad, load_command, sent_again
from presence.errors import PipelineError, PresenceError, ReadOnlyServerError, explain
from presence.operations import Operation, ServerNotStartedError
from presence.results import CleanupResult
from presence.retrying import with_what_follows

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from presence import scripts
    from presence.commands import Command
    from presence.operations import Batches, Operations
    from presence.replies import CleanupBatch
    from presence.results import ConnectionInfo

Result = TypeVar("Result")

Exchange: TypeAlias = "Generator[Sequence[Command], list[Any], Result]"
"""A conversation with the server: it yields commands to send together and is sent their replies, errors among them."""


def attempt_all(
    operations: Sequence[Operation[Any]], *, in_order: bool, since: float | None = None
) -> Exchange[list[Any]]:
    """Converse with the server to run operations together.

    A script that the server does not have is loaded, and the calls that missed it are repeated; none of them had run.
    Scripts are gone after SCRIPT FLUSH, a restart or a failover. If some were there and others not, or another client
    loaded one between two calls, calls would run after those that follow them. If the order matters, the scripts are
    therefore loaded at the head of the same request; and what follows a call that was refused even so is repeated as
    well, if it has only read or found nothing to do.

    Args:
        operations: what to run.
        in_order: whether the order matters.
        since: when they were first to be sent, if they are repeated.

    Returns:
        An item for each operation: its result, or the ``PresenceError`` that it met.

    """
    calls = [operation.command() for operation in operations]
    in_order = in_order and len(calls) > 1
    if in_order:
        # What finds nothing to do keeps that answer, too: if all replies are lost, and all run again, it may find some.
        calls = [sent_again(call) for call in calls]
    needed = dict.fromkeys(operation.script for operation in operations) if in_order else ()
    request = [*map(load_command, needed), *calls]
    begun = monotonic() if since is None else since
    replies = yield request if since is None else Repeated(request, since)
    return (yield from _settle(operations, replies[len(needed) :], begun, in_order=in_order))


def _settle(
    operations: Sequence[Operation[Any]], replies: list[Any], since: float, *, in_order: bool
) -> Exchange[list[Any]]:
    """Do what the first replies ask for, and give the results."""
    operations = list(operations)

    def to_repeat(refused: list[int]) -> dict[int, Operation[Any]]:
        """Give the operations by their indexes; what had run, and is to run as if it had not, with another token."""
        commands = [operation.command() for operation in operations] if in_order else []
        indexes = with_what_follows(refused, commands, replies) if in_order else refused
        for index in indexes:
            if index not in refused:
                operations[index] = operations[index].renewed()  # And stays so, if it is refused in its turn.
        return {index: operations[index] for index in indexes}

    def take_over(answered: list[Any], again: Iterable[int], repeated: list[Any], refused: list[int]) -> None:
        """Put the answers to repeated calls in their places; what a call has read is not replaced by a fault."""
        for index, answer in zip(again, repeated, strict=True):
            if index in refused or not (isinstance(answer, Exception) and operations[index].script.is_repeatable):
                answered[index] = answer

    goes_with_others = len(operations) > 1
    for load in (load_command, SecondLoad, SecondLoad):
        missed = [index for index, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if not missed:
            break
        named = list(dict.fromkeys(operations[index].script for index in missed))
        again = to_repeat(missed)
        if load is load_command:
            # Apart from the calls, as many may wait for the same load.
            loaded: list[Any] = []
            for script in named:
                loaded += yield [load(script)]
            # What was answered is still to be reported: only the calls of a script that cannot be loaded have failed.
            failed = _faults(named, loaded)
            again = {index: each for index, each in again.items() if each.script not in failed}
            repeated = (yield Repeated(_sent_again(again), since)) if again else []
        else:
            # Together, so that hardly anything can come between.
            goes_with_others = True
            answers = yield Repeated([*map(load, named), *_sent_again(again)], since)
            failed, repeated = _faults(named, answers), answers[len(named) :]
        take_over(replies, again, repeated, missed)
        replies = [
            failed.get(operation.script, reply) if isinstance(reply, NoScriptError) else reply
            for operation, reply in zip(operations, replies, strict=True)
        ]
    results = [_outcome(operation, reply) for operation, reply in zip(operations, replies, strict=True)]
    refused = [index for index, result in enumerate(results) if isinstance(result, ReadOnlyServerError)]
    if refused and goes_with_others:
        # None of these ran. redis-py leaves a server that became a replica for a single command only: one goes ahead.
        rest = to_repeat(refused)
        first = min(rest)
        ahead = rest.pop(first)
        answer = yield Repeated([sent_again(ahead.command())], since)
        (results[first],) = yield from _settle((ahead,), answer, since, in_order=False)
        if rest and not isinstance(results[first], ReadOnlyServerError):
            repeated = yield from attempt_all([*rest.values()], in_order=in_order, since=since)
            take_over(results, rest, repeated, refused)
    return results


def _sent_again(operations: dict[int, Operation[Any]]) -> list[Command]:
    # Of a call whose first copy was held up, these may be the third.
    return [sent_again(operation.command()) for operation in operations.values()]


def _faults(named: list[scripts.Script], answers: list[Any]) -> dict[scripts.Script, Exception]:
    """Give the scripts that could not be loaded, and why; the answers to their loads come first."""
    return {script: answer for script, answer in zip(named, answers, strict=False) if isinstance(answer, Exception)}


def _outcome(operation: Operation[Any], reply: Any) -> Any:
    """Give the result of an operation, or the ``PresenceError`` that it met."""
    if isinstance(reply, Exception):
        return explain(reply)
    try:
        return operation.result(reply)
    except PresenceError as error:
        return error


def check_operations(operations: object) -> tuple[Operation[Any], ...]:
    """Check what is to go through a pipeline, before anything is sent."""
    if not isinstance(operations, Iterable):
        raise TypeError(f"operations must be an iterable of Operation, not {type(operations).__name__}")
    checked = tuple(operations)
    for operation in checked:
        if not isinstance(operation, Operation):
            raise TypeError(
                f"operations must hold what manager.operations makes, not {type(operation).__name__}: "
                "manager.operations.update_heartbeat(sid), not manager.update_heartbeat(sid)"
            )
    return checked


def perform_all(operations: Sequence[Operation[Result]]) -> Exchange[list[Result]]:
    """Converse with the server to run operations together; raises ``PipelineError`` when some failed."""
    if not operations:
        return []
    results = yield from attempt_all(operations, in_order=True)
    if any(isinstance(result, PresenceError) for result in results):
        raise PipelineError(results)
    return results


def for_server(
    operations: Operations, describe: Callable[[], Operation[Result]]
) -> Operation[Result] | Exchange[Result]:
    """Describe an operation that needs the boot epoch; the first one asks for that before.

    It is described twice then: a bad argument is to be refused before the server is asked for the epoch.
    """
    try:
        return describe()
    except ServerNotStartedError:
        return _start_before(operations, describe)


def _start_before(operations: Operations, describe: Callable[[], Operation[Result]]) -> Exchange[Result]:
    yield from perform(operations.start_server())
    return (yield from perform(describe()))


def perform(operation: Operation[Result]) -> Exchange[Result]:
    """Converse with the server to run one operation; raises the ``PresenceError`` that it met."""
    since = monotonic()
    (reply,) = yield [operation.command()]
    return (yield from recover(operation, reply, since)) if isinstance(reply, Exception) else operation.result(reply)


def recover(operation: Operation[Result], reply: Exception, since: float) -> Exchange[Result]:
    """Go on with an operation whose first reply is an error; raises the ``PresenceError`` that it met in the end."""
    (result,) = yield from _settle((operation,), [reply], since, in_order=False)
    if isinstance(result, PresenceError):
        raise result
    return result  # type: ignore[no-any-return]


def perform_batches(batches: Batches[Result]) -> Exchange[dict[str, Result]]:
    """Converse with the server to run the scripts together, and give what was answered for each id.

    Raises ``PipelineError`` when some failed, its ``results`` by ids. A fault that all of them met is raised as it is:
    one call is one script or many, by the number of ids.
    """
    results: list[Any] = (yield from attempt_all(batches.operations, in_order=False)) if batches.operations else []
    faults = [result for result in results if isinstance(result, PresenceError)]
    if faults and len(faults) == len(results):
        raise faults[0]
    answers: list[Any] = batches.answers(results)
    if faults:
        raise PipelineError(answers)
    return dict(zip(batches.ids, answers, strict=True))


def clean_up(describe_batch: Callable[[], Operation[CleanupBatch]]) -> Exchange[CleanupResult]:
    """Converse with the server batch by batch until nothing stale is left.

    What was removed before a fault is still reported: nobody else could report it.
    """
    removed: list[ConnectionInfo] = []
    detached: list[ConnectionInfo] = []
    while True:
        try:
            done = yield from perform(describe_batch())
        except PresenceError as error:
            if not removed and not detached:
                raise
            return CleanupResult(tuple(removed), error, tuple(detached))
        removed += done.removed
        detached += done.detached
        if done.is_last:
            return CleanupResult(tuple(removed), None, tuple(detached))
