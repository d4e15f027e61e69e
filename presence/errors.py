"""The errors that a fault of the server, the network or the configuration raises: one family, each saying what to do.

Bad arguments are no faults: they raise ``TypeError`` or ``ValueError`` before anything is sent.
"""

from __future__ import annotations

from typing import Any

from redis import exceptions


class PresenceError(Exception):
    """Base of every error that an operation raises; the redis-py error is chained as ``__cause__``."""


class ServerUnreachableError(PresenceError):
    """The server could not be reached, or the connection broke and the retries were used up.

    Whether an operation that was under way took effect is not known; each is safe to call again.
    """


class ServerBusyError(PresenceError):
    """The server is loading its data or held by another script, and did not run the operation."""


class AuthenticationFailedError(PresenceError):
    """The server did not accept the user name and password."""


class PermissionDeniedError(PresenceError):
    """The ACL user may not run a command, or not on the keys of this namespace."""


class ReadOnlyServerError(PresenceError):
    """The server is a read-only replica and refused to write."""


class OutOfMemoryError(PresenceError):
    """The server's memory is full and it refused to write; nothing was changed."""


class UnexpectedReplyError(PresenceError):
    """The server refused the operation for a reason that has no error of its own; the message quotes it."""


class PipelineError(PresenceError):
    """Some operations of a pipeline failed.

    ``results`` has an item for each operation, in order: its result, or its ``PresenceError``.
    """

    def __init__(self, results: list[Any]) -> None:
        failed = [result for result in results if isinstance(result, PresenceError)]
        super().__init__(f"{len(failed)} of {len(results)} operations failed, the first with: {failed[0]}")
        self.results = results


# The first entry that the error is an instance of decides, so a subclass comes before its base.
_ADVICE: tuple[tuple[type[Exception], type[PresenceError], str], ...] = (
    (
        exceptions.AuthenticationError,
        AuthenticationFailedError,
        "the server did not accept the user name and password; correct them in the URL "
        "(redis://user:password@host:port/0) or in the server's ACL",
    ),
    (
        exceptions.AuthenticationWrongNumberOfArgsError,
        AuthenticationFailedError,
        "the server takes no user name or has no password set; correct the URL or the server's ACL",
    ),
    (
        exceptions.NoPermissionError,
        PermissionDeniedError,
        "the ACL user lacks a permission; the README lists the rights that presence needs",
    ),
    (
        exceptions.AuthorizationError,
        PermissionDeniedError,
        "the ACL user lacks a permission; the README lists the rights that presence needs",
    ),
    (
        exceptions.BusyLoadingError,
        ServerBusyError,
        "the server is still loading its data after a start; call again in a moment",
    ),
    (
        exceptions.MaxConnectionsError,
        ServerUnreachableError,
        "every connection of the client's pool is in use; raise max_connections of the client",
    ),
    (
        exceptions.ReadOnlyError,
        ReadOnlyServerError,
        "the server is a read-only replica; point the URL at the primary, or use a redis+sentinel:// URL, "
        "which follows a failover",
    ),
    (
        exceptions.OutOfMemoryError,
        OutOfMemoryError,
        "the server's memory is full and nothing was changed; raise maxmemory or remove other data",
    ),
    (
        exceptions.NoScriptError,
        UnexpectedReplyError,
        "the server lost the script right after it was loaded; look for a SCRIPT FLUSH that runs all the time, "
        "or for a proxy that spreads one client over several servers",
    ),
    (
        exceptions.MasterDownError,
        ServerBusyError,
        "the replica has lost its primary and serves no stale data; wait for the failover or use the primary",
    ),
    (
        exceptions.ClusterError,
        ServerUnreachableError,
        "the cluster cannot serve this namespace's slot now; check CLUSTER INFO on its nodes",
    ),
    (
        exceptions.RedisClusterException,
        ServerUnreachableError,
        "the cluster cannot be used; check that its nodes can be reached and that every slot is covered",
    ),
    (
        exceptions.TimeoutError,
        ServerUnreachableError,
        "the server did not answer in time; check that it runs, the network, and socket_timeout",
    ),
    (
        exceptions.ConnectionError,
        ServerUnreachableError,
        "the server cannot be reached; check that it runs, the host and port in the URL, and the network",
    ),
)

# Errors for which redis-py has no class of its own, by the code that the server's message starts with.
_ADVICE_BY_CODE: dict[str, tuple[type[PresenceError], str]] = {
    "BUSY": (
        ServerBusyError,
        "another script holds the server; see SLOWLOG for which one, and SCRIPT KILL to end it",
    ),
    "MISCONF": (
        ReadOnlyServerError,
        "the server cannot save its data and refuses to write; mend its disk or set stop-writes-on-bgsave-error no",
    ),
    "NOREPLICAS": (
        ReadOnlyServerError,
        "the server has fewer replicas than min-replicas-to-write asks for and refuses to write",
    ),
    "WRONGTYPE": (
        UnexpectedReplyError,
        "a key of this namespace holds another type of value; another program writes there, so use another namespace",
    ),
    "MOVED": (
        UnexpectedReplyError,
        "the server is part of a cluster; use a redis+cluster:// URL or a RedisCluster client",
    ),
    "CLUSTERDOWN": (
        ServerUnreachableError,
        "the cluster cannot serve this namespace's slot now; check CLUSTER INFO on its nodes",
    ),
    "NOAUTH": (
        AuthenticationFailedError,
        "the server asks for a password; put it into the URL (redis://user:password@host:port/0)",
    ),
}


def explain(error: Exception) -> PresenceError:
    """Turn a redis-py error into the presence error that names the cause and the remedy, with the cause chained.

    Args:
        error: what redis-py raised or returned.

    Returns:
        The error to raise, its ``__cause__`` set.

    """
    text = str(error)
    code = text.partition(" ")[0]
    # Older redis-py releases know fewer classes and leave the code in the message; newer ones cut the code off.
    if code in _ADVICE_BY_CODE:
        kind, advice = _ADVICE_BY_CODE[code]
    else:
        kind, advice = UnexpectedReplyError, "the server refused the operation"
        for cause, explained, remedy in _ADVICE:
            if isinstance(error, cause):
                kind, advice = explained, remedy
                break
    explained_error = kind(f"{advice} (the server or client said: {text})")
    explained_error.__cause__ = error
    return explained_error
