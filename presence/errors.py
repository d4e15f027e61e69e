"""The errors that a fault of the server, the network or the configuration raises: one family, each saying what to do.

Bad arguments are not faults: they raise ``TypeError`` or ``ValueError`` before anything is sent.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from redis import exceptions


class PresenceError(Exception):
    """Base of every error that an operation raises; its ``__cause__`` is the error behind it, mostly redis-py's."""


class ServerUnreachableError(PresenceError):
    """The server could not be reached, or the connection broke and the retries were used up.

    An operation that was under way may have taken effect or not, or may still do so; each is safe to call again.
    """


class ServerBusyError(PresenceError):
    """The server is loading its data or held by another script, and did not run the operation."""


class AuthenticationFailedError(PresenceError):
    """The server did not accept the user name and password."""


class PermissionDeniedError(PresenceError):
    """The ACL user may not run a command, or not on the keys of this namespace."""


class ReadOnlyServerError(PresenceError):
    """The server is a read-only replica, or cannot save or replicate its data, and refused to write."""


class OutOfMemoryError(PresenceError):
    """The server's memory is full, and it refused to write; only an earlier attempt may have changed something."""


class UnexpectedReplyError(PresenceError):
    """The server refused the operation for a reason that has no error of its own; the message quotes it."""


class EventsLostError(PresenceError):
    """A subscription may have missed events: its connection broke, it was too slow, or the stream was trimmed.

    ``position`` is where what is left of the stream begins: ``subscribe(after=error.position)`` reads that. It is None
    through pub/sub, which keeps nothing.
    """

    def __init__(self, reason: str, position: str | None = None) -> None:
        super().__init__(f"events may be lost: {reason}; read a snapshot and subscribe again")
        self.reason = reason
        self.position = position

    def __reduce__(self) -> tuple[type[EventsLostError], tuple[str, str | None]]:
        return type(self), (self.reason, self.position)


class PipelineError(PresenceError):
    """Some or all operations of a pipeline failed, or some ids of a bulk call.

    ``results`` has an item for each operation or, of a bulk call, for each different id, in order: its result, or its
    ``PresenceError``. The first error is the cause of this one, and redis-py's error is the cause of that.
    """

    def __init__(self, results: list[Any]) -> None:
        failed = [result for result in results if isinstance(result, PresenceError)]
        super().__init__(f"{len(failed)} of {len(results)} operations failed, the first with: {failed[0]}")
        self.results = results
        self.__cause__: BaseException | None = failed[0]

    def __reduce__(self) -> tuple[type[PipelineError], tuple[list[Any]]]:
        return type(self), (self.results,)


MAX_SHOWN = 200
"""How many characters of a long message's beginning, and of its end, are quoted."""

FAULTS = (exceptions.RedisError, exceptions.RedisClusterException, OSError)
"""What redis-py raises for a fault; its cluster exception is no RedisError."""


WRITE_REFUSALS = (RuntimeError, TypeError)
"""What writing to a closed connection raises, as in the midst of another's call: see :func:`as_fault`."""


def as_fault(error: Any) -> Any:
    """Turn what writing to a closed connection raises into redis-py's ConnectionError; others stay as they are.

    uvloop raises a RuntimeError; asyncio's ``writelines``, since Python 3.12, the TypeError of calling what is None.
    """
    is_uvloops = isinstance(error, RuntimeError) and "handler is closed" in str(error)
    is_asyncios = isinstance(error, TypeError) and _raised_in(error) == "writelines"
    if not is_uvloops and not is_asyncios:
        return error
    fault = exceptions.ConnectionError("the connection was closed")
    fault.__cause__ = error
    return fault


def as_cluster_fault(error: Any) -> Any:
    """Turn AttributeError (a node came or went) and RuntimeError (a connection was closed); others stay as they are."""
    if not isinstance(error, AttributeError):
        return as_fault(error)
    fault = exceptions.ClusterError("a node came or went during the call")
    fault.__cause__ = error
    return fault


def _raised_in(error: BaseException) -> str:
    """Name the function that raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_name if trace is not None else ""


_Explanation: TypeAlias = "tuple[type[PresenceError], str]"
"""The presence error, and the message: what is wrong, and what to do."""

_CREDENTIALS: _Explanation = (
    AuthenticationFailedError,
    "the server asks for a user name and password, or did not accept these; correct them in the URL "
    "(redis://user:password@host:port/0, or redis://:password@host:port/0 where there is no user) or in the server's "
    "ACL",
)
_SENTINEL_CREDENTIALS: _Explanation = (
    AuthenticationFailedError,
    "the sentinels ask for a user name and password, or did not accept these; correct sentinel_username and "
    "sentinel_password in the URL's query",
)
_PERMISSION: _Explanation = (
    PermissionDeniedError,
    "the ACL user lacks a permission; the README lists the rights that presence needs",
)
_CLUSTER_DOWN: _Explanation = (
    ServerUnreachableError,
    "the cluster cannot serve this namespace's slot now; check CLUSTER INFO on its nodes",
)
_NOT_A_CLUSTER_CLIENT: _Explanation = (
    UnexpectedReplyError,
    "the server is part of a cluster; use a redis+cluster:// URL or a RedisCluster client",
)
_POOL_IN_USE: _Explanation = (
    ServerUnreachableError,
    "every connection of the client's pool is in use; raise max_connections of the client",
)
_UNFIT_SERVER: _Explanation = (
    UnexpectedReplyError,
    "the server cannot run presence's scripts; they need Redis 7.0.1 or newer, or Valkey 8 or newer, with every "
    "command under its name (to a sentinel, a URL begins with redis+sentinel://)",
)
_FOREIGN_DATA: _Explanation = (
    UnexpectedReplyError,
    "a key of this namespace holds what presence did not write; another program writes there, so use another namespace",
)
_NO_REDIS: _Explanation = (
    UnexpectedReplyError,
    "what answers there does not speak the protocol of Redis; correct the host and port in the URL (rediss:// for a "
    "server with TLS)",
)
_UNREACHABLE: _Explanation = (
    ServerUnreachableError,
    "the server cannot be reached; check that it runs, the host and port in the URL (rediss:// for a server with TLS, "
    "redis:// for one without), and the network",
)

# By the code that the server's message starts with, if redis-py leaves it there or keeps it separately.
_BY_CODE: dict[str, _Explanation] = {
    "BUSY": (
        ServerBusyError,
        "another script holds the server; see SLOWLOG for which one, and SCRIPT KILL to end it",
    ),
    "MISCONF": (
        ReadOnlyServerError,
        "the server cannot save its data and refuses to write; fix its disk or set stop-writes-on-bgsave-error no",
    ),
    "NOREPLICAS": (
        ReadOnlyServerError,
        "the server has fewer replicas than min-replicas-to-write asks for and refuses to write; "
        "start the missing replicas or lower it",
    ),
    "WRONGTYPE": _FOREIGN_DATA,
    "NOAUTH": (
        AuthenticationFailedError,
        "the server asks for a password; put it into the URL, after a colon: redis://:password@host:port/0, or "
        "redis://user:password@host:port/0 for an ACL user",
    ),
}

# By the server's words, if its code says no more than ERR.
_BY_WORDS: dict[str, _Explanation] = {
    "ACL failure in script": _PERMISSION,
    "The user executing the script can't": _PERMISSION,  # Redis 7.0
    "max number of clients reached": (
        ServerUnreachableError,
        "the server takes no more connections; raise its maxclients, or lower max_connections of the clients",
    ),
    "No connection available": _POOL_IN_USE,
    "Too many open files": (
        ServerUnreachableError,
        "this process may open no more files and sockets; raise its limit (ulimit -n), or look for what it does not "
        "close",
    ),
    "CERTIFICATE_VERIFY_FAILED": (
        ServerUnreachableError,
        "the server's certificate is not trusted, or is for another host; set ssl_ca_certs to the file of who signed "
        "it, and use the host that it names",
    ),
    "No such file or directory": (
        ServerUnreachableError,
        "a file that the URL names is not there; correct ssl_ca_certs, ssl_certfile and ssl_keyfile or, of a server "
        "behind a unix socket, the path, and check that it runs",
    ),
    "DB index is out of range": (
        UnexpectedReplyError,
        "the server has no database of the number in the URL; correct it, or raise the server's `databases`",
    ),
    "unknown command 'SENTINEL'": (
        UnexpectedReplyError,
        "a server that the URL names is no sentinel; name the sentinels and their port, 26379 by default, or use a "
        "redis:// URL",
    ),
    # What the sentinels answered, as redis-py 8 and 7.4 quote it.
    " - auth:AuthenticationError": _SENTINEL_CREDENTIALS,
    " - AuthenticationError(": _SENTINEL_CREDENTIALS,
    "No master found for": (
        ServerUnreachableError,
        "no sentinel that answers knows a primary of the service that is up; wait for a failover, or check that the "
        "sentinels run and correct their hosts and ports and the service in the URL "
        "(redis+sentinel://host:26379/service; rediss+sentinel:// and ssl_ca_certs if they use TLS)",
    ),
    "Protocol error, got": _NO_REDIS,  # from hiredis
    "Protocol Error: ": _NO_REDIS,  # from redis-py's own parsers
    "client-side caching is supported": (
        UnexpectedReplyError,
        "the client asks for client-side caching, for which the server is too old; make it without a cache_config",
    ),
    "Error compiling script": _UNFIT_SERVER,
    "unknown command": _UNFIT_SERVER,
    "command called from script": _UNFIT_SERVER,
    "nonexistent global variable": _UNFIT_SERVER,
    "attempt to call ": _UNFIT_SERVER,
    "attempt to index global ": _UNFIT_SERVER,
    "attempt to ": _FOREIGN_DATA,  # What a script then fails at: to "perform arithmetic" on a value that is not there.
}

# By redis-py's class. The first that the error is an instance of decides, so a subclass comes before its base.
_BY_CLASS: dict[type[Exception], _Explanation] = {
    exceptions.AuthenticationError: _CREDENTIALS,
    exceptions.AuthenticationWrongNumberOfArgsError: _CREDENTIALS,
    exceptions.NoPermissionError: _PERMISSION,
    exceptions.AuthorizationError: _PERMISSION,
    exceptions.BusyLoadingError: (
        ServerBusyError,
        "the server is still loading its data after a start; call again in a moment",
    ),
    exceptions.MaxConnectionsError: _POOL_IN_USE,
    exceptions.ReadOnlyError: (
        ReadOnlyServerError,
        "the server is a read-only replica; point the URL at the primary, or use a redis+sentinel:// URL, "
        "which follows a failover",
    ),
    exceptions.OutOfMemoryError: (
        OutOfMemoryError,
        "the server's memory is full, and this attempt changed nothing; raise maxmemory or remove other data",
    ),
    exceptions.NoScriptError: (
        UnexpectedReplyError,
        "the server lost the script right after it was loaded; look for a SCRIPT FLUSH that runs all the time, "
        "or for a proxy that spreads one client over several servers",
    ),
    exceptions.AskError: _NOT_A_CLUSTER_CLIENT,  # MovedError among them
    exceptions.MasterDownError: (
        ServerBusyError,
        "the replica has lost its primary and serves no stale data; wait for the failover or use the primary",
    ),
    exceptions.ClusterError: _CLUSTER_DOWN,
    exceptions.RedisClusterException: (
        ServerUnreachableError,
        "the cluster cannot be used; check that its nodes run in cluster mode, that every slot is covered, "
        "and that the ACL user may run CLUSTER SLOTS",
    ),
    exceptions.TimeoutError: (
        ServerUnreachableError,
        "the server did not answer in time; check that it runs, the network, socket_timeout, and the URL (rediss:// "
        "for a server with TLS, redis:// for one without)",
    ),
    exceptions.ConnectionError: _UNREACHABLE,
    OSError: _UNREACHABLE,
}

_OTHER: _Explanation = (UnexpectedReplyError, "the server refused the operation")


def unreadable(error: Exception) -> PresenceError:
    """Give the error to raise for the one that a parser met in a reply."""
    kind, advice = _FOREIGN_DATA
    return kind(f"{advice} ({error})")


def explain(error: Exception) -> PresenceError:
    """Turn a redis-py error into the presence error that names the cause and the remedy, with the cause chained.

    Args:
        error: what redis-py raised or returned.

    Returns:
        The error to raise, its ``__cause__`` set.

    """
    text = str(error)
    kind, advice = _explanation(error, text)
    explained = kind(f"{advice} (the server or client said: {_shortened(text)})")
    explained.__cause__ = error
    return explained


def _shortened(text: str) -> str:
    """Leave out the middle of a long text: redis-py may quote all options of a client before the fault itself."""
    return text if len(text) <= 2 * MAX_SHOWN else f"{text[:MAX_SHOWN]} … {text[-MAX_SHOWN:]}"


def _explanation(error: BaseException, text: str) -> _Explanation:
    # What a cluster client meets while it reads the layout is the cause of its own exception.
    if isinstance(error, exceptions.RedisClusterException) and isinstance(error.__cause__, exceptions.RedisError):
        error = error.__cause__
    # redis-py cuts off a code that it has a class for; since 7.2 it keeps it as status_code.
    code = getattr(error, "status_code", None) or text.partition(" ")[0]
    if code in _BY_CODE:
        return _BY_CODE[code]
    by_words = (explanation for words, explanation in _BY_WORDS.items() if words in text)
    by_class = (explanation for kind, explanation in _BY_CLASS.items() if isinstance(error, kind))
    return next(by_words, None) or next(by_class, _OTHER)
