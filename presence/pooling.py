"""How the calls of the blocking manager go over the connections of a redis-py client's pool, each over one of its own.

Connections and retries are as in redis-py's ``execute_command``, but each attempt connects only once, and none begins
when the answer may be forgotten. With redis-py's own method, the reply that an interrupted call did not read may answer
the next one, and each call spends microseconds on options and telemetry that these calls do not need.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any

from redis import ConnectionPool, Redis, RedisCluster
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, RedisError, ResponseError
from redis.sentinel import SentinelConnectionPool

from presence import retrying
from presence.commands import pack, sent_again
from presence.errors import FAULTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from redis.connection import AbstractConnection

    from presence.commands import Command


PIECE_BYTES = 1 << 16
"""The most bytes of a request that are sent at once: the socket's timeout is for each piece."""


def pool_of(client: Redis | RedisCluster) -> ConnectionPool | None:
    """Give the pool of a client whose connections :func:`send` may use.

    None if something else has to see each call: a cluster client, a cache, the lock of the only connection, a subclass,
    or a wrapper of ``execute_command``.
    """
    if type(client) is not Redis or client.connection:
        return None
    pool = client.connection_pool
    execute = client.execute_command
    # A wrapper may replace it in redis-py's class, and then has `__wrapped__` or a module of its own.
    is_redis_pys = execute.__module__ == Redis.__module__ and not hasattr(execute, "__wrapped__")
    return pool if is_redis_pys and getattr(pool, "cache", None) is None else None


def close_unread(client: Redis | RedisCluster) -> None:
    """Close a client's connections that are not in use: an interrupted call may have left a reply unread on one."""
    if isinstance(client, RedisCluster):
        nodes = [node.redis_connection for node in client.get_nodes()]
        pools = [node.connection_pool for node in nodes if node]
    else:
        pools = [client.connection_pool]
        if client.connection:
            with client.single_connection_lock:
                client.connection.disconnect()
    for pool in pools:
        _close_free(pool)


def _close_free(pool: ConnectionPool, *, and_used: bool = False) -> None:
    """Close the connections of a pool that are not in use, and those to the sentinels that it asks.

    With ``and_used``, in the same step those in use are marked, to be closed when they are released.
    """
    # Meanwhile no other thread takes one out of the pool.
    with getattr(getattr(pool, "pool", None), "mutex", None) or pool._lock:
        if and_used:
            pool.update_active_connections_for_reconnect()
        pool.disconnect(inuse_connections=False)
    if isinstance(pool, SentinelConnectionPool):
        for sentinel in pool.sentinel_manager.sentinels:
            sentinel.connection_pool.disconnect(inuse_connections=False)


def send(pool: ConnectionPool, request: Sequence[Command]) -> list[Any]:
    """Send commands together and read the replies; send again as the connection's policy says and the time allows.

    Args:
        pool: gives the connection, and gets it back.
        request: the commands, one or more.

    Returns:
        The replies as bytes; of several, with errors in their places.

    Raises:
        RedisError: a fault, or the error that is the reply to a single command.

    """
    pieces = _in_pieces(request)
    fault: Exception | None = None

    def attempt() -> list[Any]:
        nonlocal pieces
        if fault is not None:
            # Before it sends, as connecting may take as long as its timeouts allow.
            retrying.connect_once(connection)
            give_up_if_late(fault)
            pieces = _in_pieces([sent_again(command) for command in request])
        connection.send_packed_command(pieces)
        if len(request) > 1:
            return [_read(connection) for _ in request]
        try:
            return [connection.read_response(disable_decoding=True, disconnect_on_error=True)]
        except ReadOnlyError:
            # The server has become a replica. It would answer reads for ever, with what it knew.
            _close_free(pool, and_used=True)
            raise

    def fail(error: Exception) -> None:
        nonlocal fault
        fault = error
        connection.disconnect()
        give_up_if_late(error)

    def give_up_if_late(error: Exception) -> None:
        if monotonic() > end:
            raise error

    try:
        connection = _take(pool)
        try:
            end = retrying.end_of(request)
            if monotonic() > end:
                raise retrying.too_late()  # It has waited for the connection.
            return connection.retry.call_with_retry(attempt, fail)  # type: ignore[no-any-return]
        except ResponseError:
            raise  # It was read as the reply; or a signal handler met it, and reading has closed the connection.
        except BaseException:
            # A signal handler may have raised before the replies were read, and they are not for the next call.
            connection.disconnect()
            raise
        finally:
            try:  # noqa: SIM105  # suppress() costs a microsecond.
                pool.release(connection)
            except FAULTS:
                pass  # It cannot renew its credentials. The pool has it all the same, and the answer is here.
    except RedisError:
        raise
    except BaseException:
        # Perhaps while a connection was opened: then redis-py has put it back half greeted, as if it were ready.
        _close_free(pool)
        raise


def _in_pieces(request: Sequence[Command]) -> list[bytes]:
    packed = b"".join(map(pack, request))
    if len(packed) <= PIECE_BYTES:
        return [packed]
    return [packed[start : start + PIECE_BYTES] for start in range(0, len(packed), PIECE_BYTES)]


def _take(pool: ConnectionPool) -> Any:
    """Take a connection out of the pool, opening one if need be."""
    failures = 0
    while True:
        try:
            return pool.get_connection()
        except RedisConnectionError as error:
            failures += 1
            if not retrying.opens_again(error, pool, failures):
                raise


def _read(connection: AbstractConnection) -> Any:
    try:
        return connection.read_response(disable_decoding=True, disconnect_on_error=True)
    except ResponseError as error:
        return error
