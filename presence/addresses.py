"""How a URL names a server, sentinels or a cluster, and which options go with it; no I/O."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from inspect import signature
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import redis.connection

from presence import arguments

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

_QUOTING = {
    "Port could not": "the port is no number",
    "netloc ": "a character before the path is not allowed there",
}
"""Beginnings of errors that quote what may be a password, and what is said instead."""

_QUOTING_HINT = "special characters in a password must be percent-encoded"

LARGEST_POOL = 1 << 31
"""The most connections that redis-py's own pools may be given."""

PROTOCOLS = (None, 2, 3, "2", "3")
"""The versions of RESP, as redis-py takes them."""


def default_url() -> str:
    """Give the URL from the environment, else that of the local server."""
    return next((url for name in ENVIRONMENT_VARIABLES if (url := os.environ.get(name))), DEFAULT_URL)


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed URL: which kind of deployment, which hosts, and which options for redis-py."""

    url: str = field(repr=False)
    deployment: str = "server"
    hosts: tuple[tuple[str, int], ...] = ()
    service_name: str = ""
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    sentinel_options: dict[str, Any] = field(default_factory=dict, repr=False)


def parse(url: str) -> Address:
    """Check a URL and take it apart, without connecting.

    Args:
        url: ``redis://``, ``rediss://`` (TLS) and ``unix://`` as in redis-py;
            ``redis+sentinel://[user:password@]host[:port][,host[:port]…]/service[/db]``, whose query may hold
            ``sentinel_username`` and ``sentinel_password``; ``redis+cluster://[user:password@]host[:port][,…]``. Both
            use TLS with ``rediss+``. The query may hold redis-py's options, as in redis-py's own URLs.

    Returns:
        The address.

    Raises:
        TypeError: the URL is not a str.
        ValueError: the scheme is unknown, or a part is missing or malformed.

    """
    if not isinstance(url, str):
        raise TypeError(f"url must be a str, not {type(url).__name__}")
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        raise ValueError(f"url must start with one of {', '.join(f'{known}://' for known in SCHEMES)}")
    try:
        if "+" in scheme:
            return _parse_several_hosts(url, *scheme.split("+"))
        _check_host(redis.connection.parse_url(url).get("host", ""))
        parts = urlsplit(url)
        if scheme != "unix":
            _parse_database(parts.path.strip("/"))
        elif parts.hostname or not parts.path:
            raise ValueError("it must name the socket's path after three slashes: unix:///path/to.sock")
    except ValueError as error:
        for beginning, problem in _QUOTING.items():
            if str(error).startswith(beginning):
                raise ValueError(f"url is malformed: {problem}; {_QUOTING_HINT}") from None
        raise ValueError(f"url is malformed: {error}") from error
    return Address(url)


def parse_default(module: Any, manager: type) -> Address:
    """Take the default URL apart; raises ``ValueError`` as :func:`parse` and :func:`check_options` do."""
    try:
        address = parse(default_url())
        check_options(address, {}, module, manager)
    except ValueError as error:
        raise ValueError(f"{' or '.join(ENVIRONMENT_VARIABLES)} in the environment: {error}") from error
    return address


def _parse_several_hosts(url: str, base: str, deployment: str) -> Address:
    # In Python versions that check the brackets, urlsplit refuses several hosts if one of them is an IPv6 address.
    location = url.partition("://")[2]
    netloc = re.split("[/?#]", location, maxsplit=1)[0]
    parts = urlsplit("//hosts" + location[len(netloc) :])
    credentials, at, host_list = netloc.rpartition("@")
    if "@" in credentials:
        raise ValueError(f"user and password stand there once, before the first host; {_QUOTING_HINT}")
    default_port = DEFAULT_SENTINEL_PORT if deployment == "sentinel" else DEFAULT_CLUSTER_PORT
    hosts = tuple(_parse_host(host, default_port) for host in host_list.split(","))
    service_name, _, database = parts.path.strip("/").partition("/")
    # What is left is one of redis-py's own URLs; redis-py knows its options and their types.
    plain = urlunsplit((base, f"{credentials}{at}localhost", "", parts.query, ""))
    options = dict(redis.connection.parse_url(plain))
    for name in ("host", "connection_class"):
        options.pop(name, None)
    if deployment == "cluster":
        service_name, database = "", service_name
    elif not service_name:
        raise ValueError("it must name the sentinels' service: redis+sentinel://host:26379/service")
    if database:
        options["db"] = _parse_database(database)
    if deployment == "cluster" and options.pop("db", 0):
        raise ValueError("a cluster has no database but 0")
    sentinel_options = {
        name.removeprefix("sentinel_"): options.pop(name)
        for name in ("sentinel_username", "sentinel_password")
        if name in options and deployment == "sentinel"
    }
    if base == "rediss":
        options["ssl"] = True
    return Address(url, deployment, hosts, unquote(service_name), options, sentinel_options)


def _parse_host(text: str, default_port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("a host is missing")
    _check_host(parts.hostname)
    return parts.hostname, parts.port or default_port


def _parse_database(text: str) -> int:
    # If redis-py cannot read the number, it takes another database, 0.
    if not re.fullmatch(r"\d*", text, re.ASCII):
        # It is not quoted: it may be half a password.
        raise ValueError(f"the database is no number; {_QUOTING_HINT}")
    return int(text or 0)


def _check_host(host: str) -> None:
    try:
        # As the socket module will, whose error would not count as a fault of the network.
        host.encode("idna")
    except UnicodeError:
        # It is not quoted: it may be half a password.
        raise ValueError("a host is no host name: a part of it is empty or too long") from None


def check_options(address: Address, given: dict[str, Any], module: Any, manager: type) -> None:
    """Refuse an option that no client of this redis-py module takes; perhaps one of the manager's was meant.

    redis-py itself would do so on first use, perhaps in a background task, and its blocking cluster client never.
    """
    if "connection_class" in given or "connection_pool_class" in given:
        return  # The caller's own class may take more.
    known, own = _options_of(module), signature(manager).parameters.keys() - {"client"}
    in_url = redis.connection.parse_url(address.url) if address.deployment == "server" else address.options
    for name in (*given, *in_url):
        if name not in known:
            meant = get_close_matches(name, {*known, *own}, 1)
            if name in given:
                raise TypeError(
                    f"from_url() has no option {name!r}" + (f"; did you mean {meant[0]!r}?" if meant else "")
                )
            # It is not quoted: it may be a part of a password.
            hint = f"did you mean {meant[0]!r}?" if meant else _QUOTING_HINT
            if name in own:
                hint = f"{name} is one of from_url() itself"
            raise ValueError(f"url is malformed: an option in it does not exist; {hint}")
    _check_values(given)
    try:
        _check_values(in_url)
    except ValueError as error:
        raise ValueError(f"url is malformed: {error}") from None
    retry = given.get("retry")
    kind = module.retry.Retry
    if retry is not None and not isinstance(retry, kind):
        what = f"{type(retry).__module__}.{type(retry).__name__}"
        raise TypeError(f"retry must be a {kind.__module__}.Retry, not {what}: {arguments.shown(retry)}")
    # Two that exist, but would make every call fail.
    if "ssl" in given and address.deployment == "server":
        raise TypeError("from_url() has no option 'ssl' for one server: its URL says so, redis:// or rediss://")
    if of_code := next((name for name in _OF_CODE if name in in_url), None):
        raise ValueError(f"url is malformed: {of_code} is no option in it; pass {of_code}= to from_url()")
    if isinstance(in_url.get("ssl"), str):
        raise ValueError("url is malformed: ssl is no option in it; write rediss instead of redis")
    if not given.get("ssl", address.url.startswith("rediss")):
        # redis-py's clients of one server refuse it in each call, and those of a cluster would go on without TLS.
        is_cluster = address.deployment == "cluster"
        of_tls = [name for name in given if name.startswith("ssl_") and not (is_cluster and given[name] is None)]
        if of_tls:
            raise TypeError(f"from_url() has no option {of_tls[0]!r} without TLS, which begins the URL with rediss")
        if misplaced := next((name for name in in_url if name.startswith("ssl_")), None):
            raise ValueError(f"url is malformed: {misplaced} is an option of TLS, with which it begins with rediss")
    if given.get("protocol") not in PROTOCOLS:
        raise ValueError(f"protocol must be 2 or 3, not {arguments.shown(given['protocol'])}")
    if in_url.get("protocol") not in PROTOCOLS:
        raise ValueError("url is malformed: protocol must be 2 or 3")


_OF_CODE = ("retry", "retry_on_error", "credential_provider", "redis_connect_func")
"""Options whose values are no text, but that redis-py takes out of a URL."""


def _check_values(options: dict[str, Any]) -> None:
    """Refuse what redis-py would stumble over in a call."""
    for name in ("socket_timeout", "socket_connect_timeout"):
        if options.get(name) is not None:
            arguments.milliseconds(name, options[name])
    if "max_connections" in options:
        arguments.check_count("max_connections", options["max_connections"], LARGEST_POOL)


@cache
def _options_of(module: Any) -> frozenset[str]:
    """Name the options of a module's clients, pools and connections, with those passed on to their base classes."""
    connections = module.connection
    kinds = (
        module.RedisCluster,
        module.sentinel.Sentinel,
        module.BlockingConnectionPool,
        connections.Connection,
        connections.SSLConnection,
        connections.UnixDomainSocketConnection,
    )
    classes = {base for kind in kinds for base in kind.__mro__ if "__init__" in vars(base)}
    # Two are taken out of **kwargs, so no signature names them.
    return frozenset({"ssl", "check_connection"}.union(*(signature(base.__init__).parameters for base in classes)))
