"""How a URL becomes a redis-py client, asyncio or blocking, with the defaults that presence chooses on purpose."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import redis
import redis.asyncio
import redis.asyncio.retry
import redis.asyncio.sentinel
import redis.cluster
import redis.connection
import redis.retry
import redis.sentinel
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ReadOnlyError

ENVIRONMENT_VARIABLES = ("PRESENCE_REDIS_URL", "REDIS_URL")
DEFAULT_URL = "redis://localhost:6379/0"
DEFAULT_SENTINEL_PORT = 26379
DEFAULT_CLUSTER_PORT = 6379

SCHEMES = (
    "redis",
    "rediss",
    "unix",
    "redis+sentinel",
    "rediss+sentinel",
    "redis+cluster",
    "rediss+cluster",
)

MAX_CONNECTIONS = 64
"""Connections of one manager's pool. Operations beyond it wait for a free one instead of failing."""

RETRIES = 6
"""Attempts after the first. With the backoff below they span about two seconds: a restart, not a long outage.

Every script leaves the same state when it runs twice, so to send one again after a lost reply is safe.
"""


def default_url() -> str:
    """Give the URL from the environment, else that of the local server."""
    return next((url for name in ENVIRONMENT_VARIABLES if (url := os.environ.get(name))), DEFAULT_URL)


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed URL: which kind of deployment, which hosts, and what redis-py is to be told."""

    url: str = field(repr=False)
    deployment: str = "server"
    hosts: tuple[tuple[str, int], ...] = ()
    service_name: str = ""
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    sentinel_options: dict[str, Any] = field(default_factory=dict, repr=False)


def parse(url: str) -> Address:
    """Check a URL and take it apart, without connecting.

    Args:
        url: ``redis://``, ``rediss://`` (TLS) and ``unix://`` as redis-py has them;
            ``redis+sentinel://[user:password@]host[:port][,host[:port]…]/service[/db]``, whose query may hold
            ``sentinel_username`` and ``sentinel_password``; ``redis+cluster://[user:password@]host[:port][,…]``.
            With ``rediss+`` both use TLS. The query may hold redis-py's options, as in redis-py's own URLs.

    Returns:
        The address.

    Raises:
        TypeError: it is not a str.
        ValueError: the scheme is unknown, or a part is missing.

    """
    if not isinstance(url, str):
        raise TypeError(f"url must be a str, not {type(url).__name__}")
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        raise ValueError(f"url must start with one of {', '.join(f'{known}://' for known in SCHEMES)}")
    base, _, deployment = scheme.partition("+")
    if not deployment:
        redis.connection.parse_url(url)
        return Address(url)

    parts = urlsplit(url)
    credentials, at, host_list = parts.netloc.rpartition("@")
    default_port = DEFAULT_SENTINEL_PORT if deployment == "sentinel" else DEFAULT_CLUSTER_PORT
    hosts = tuple(_parse_host(host, default_port) for host in host_list.split(","))
    service_name, _, database = parts.path.strip("/").partition("/")
    if deployment == "cluster":
        service_name, database = "", service_name
    elif not service_name:
        raise ValueError("a sentinel url must name the service: redis+sentinel://host:26379/service")
    # What is left is one of redis-py's own URLs; it knows its options and their types.
    plain = urlunsplit((base, f"{credentials}{at}{hosts[0][0]}", f"/{database}", parts.query, ""))
    options = dict(redis.connection.parse_url(plain))
    sentinel_options = {
        name.removeprefix("sentinel_"): options.pop(name)
        for name in ("sentinel_username", "sentinel_password")
        if name in options
    }
    for name in ("host", "port", "connection_class"):
        options.pop(name, None)
    if base == "rediss":
        options["ssl"] = True
        sentinel_options |= {name: value for name, value in options.items() if name.startswith("ssl")}
    return Address(url, deployment, hosts, service_name, options, sentinel_options)


def _parse_host(text: str, default_port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("url names no host")
    return parts.hostname, parts.port or default_port


def _options(address: Address, given: dict[str, Any], retry: object) -> dict[str, Any]:
    """Give the options for a client of ours: the caller's, else the URL's, else these."""
    return {
        "retry": retry,
        # A primary that became a replica answers READONLY: connect again, the name may lead to the new primary.
        "retry_on_error": [ReadOnlyError],
        "socket_timeout": 5,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        **address.options,
        **given,
    }


def _backoff() -> ExponentialWithJitterBackoff:
    return ExponentialWithJitterBackoff(base=0.05, cap=1)


def connect_blocking(address: Address, given: dict[str, Any]) -> redis.Redis | redis.RedisCluster:
    """Make the blocking client of an address; ``given`` are options for redis-py."""
    options = _options(address, given, redis.retry.Retry(_backoff(), RETRIES))
    match address.deployment:
        case "sentinel":
            sentinel = redis.sentinel.Sentinel(list(address.hosts), sentinel_kwargs=address.sentinel_options, **options)
            client: redis.Redis = sentinel.master_for(address.service_name)
            return client
        case "cluster":
            nodes = [redis.cluster.ClusterNode(host, port) for host, port in address.hosts]
            del options["retry_on_error"]
            return redis.RedisCluster(startup_nodes=nodes, **options)
    options = {"max_connections": MAX_CONNECTIONS} | options
    pool = redis.BlockingConnectionPool.from_url(address.url, **options)
    return redis.Redis.from_pool(pool)


def connect_asyncio(address: Address, given: dict[str, Any]) -> redis.asyncio.Redis | redis.asyncio.RedisCluster:
    """Make the asyncio client of an address; ``given`` are options for redis-py."""
    options = _options(address, given, redis.asyncio.retry.Retry(_backoff(), RETRIES))
    match address.deployment:
        case "sentinel":
            sentinel = redis.asyncio.sentinel.Sentinel(
                list(address.hosts), sentinel_kwargs=address.sentinel_options, **options
            )
            client: redis.asyncio.Redis = sentinel.master_for(address.service_name)
            return client
        case "cluster":
            nodes = [redis.asyncio.cluster.ClusterNode(host, port) for host, port in address.hosts]
            del options["retry_on_error"]
            return redis.asyncio.RedisCluster(startup_nodes=nodes, **options)
    options = {"max_connections": MAX_CONNECTIONS} | options
    pool = redis.asyncio.BlockingConnectionPool.from_url(address.url, **options)
    return redis.asyncio.Redis.from_pool(pool)
