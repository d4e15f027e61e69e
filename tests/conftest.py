"""Fixtures: one real server for the session, and for each test a namespace of its own that is checked at the end."""

from __future__ import annotations

import asyncio
import inspect
import signal
import uuid
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import hypothesis
import pytest
import redis

import presence
import presence.sync
from tests import watching
from tests.clock import let_time_pass
from tests.fault_calls import one_attempt
from tests.invariants import Keyspace, read_keyspace, violations
from tests.processes import PROCESSES, get_ready, spawn
from tests.server import LocalServer, NoServerError, Server, program, running_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from presence.sync import ConnectionManager

hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

_SERVER = pytest.StashKey[Server]()
_CLEANUP = pytest.StashKey[ExitStack]()


def pytest_configure(config: pytest.Config) -> None:
    """Start the session's server; without one, fail with one clear line instead of skipping anything."""
    # By itself pytest ends what its fixtures have started where it is interrupted, but not where it is terminated.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    stack = config.stash[_CLEANUP] = ExitStack()
    try:
        config.stash[_SERVER] = stack.enter_context(running_server(docker=True))
    except NoServerError as error:
        pytest.exit(str(error), returncode=1)


def pytest_report_header(config: pytest.Config) -> str:
    return f"server: {config.stash[_SERVER].description}"


def pytest_unconfigure(config: pytest.Config) -> None:
    if _CLEANUP in config.stash:
        config.stash[_CLEANUP].close()


@pytest.fixture(scope="session")
def server_url(pytestconfig: pytest.Config) -> str:
    return pytestconfig.stash[_SERVER].url


@pytest.fixture
def client(server_url: str) -> Iterator[redis.Redis]:
    """A plain client, to look at the keys from outside."""
    with redis.Redis.from_url(server_url) as client:
        yield client


@pytest.fixture
def namespace(client: redis.Redis) -> Iterator[str]:
    """A namespace of the test's own; whatever the test did, its keys must be whole and have a TTL in the end."""
    name = f"test-{uuid.uuid4()}"
    yield name
    keyspace = read_keyspace(client, name)
    if keyspace.ttls_ms or keyspace.other_ttls_ms:
        client.delete(*[key.encode() for key in keyspace.ttls_ms | keyspace.other_ttls_ms])
    assert violations(keyspace, connections_per_user=presence.operations.MAX_CONNECTIONS_PER_USER) == []


class Keys(Protocol):
    """Reads every key of the test's namespace."""

    def __call__(self) -> Keyspace: ...


@pytest.fixture
def keys(client: redis.Redis, namespace: str) -> Keys:
    return lambda: read_keyspace(client, namespace)


@pytest.fixture
def wait(client: redis.Redis, namespace: str) -> Callable[[float], None]:
    """Let seconds pass in the test's namespace, without waiting."""
    return lambda seconds: let_time_pass(client, namespace, seconds)


class Awaited:
    """An asyncio manager whose methods are called like blocking ones, so one test serves both managers."""

    def __init__(self, manager: presence.ConnectionManager, runner: asyncio.Runner) -> None:
        self._manager = manager
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._manager, name)
        if not inspect.ismethod(attribute):
            return attribute

        def call(*arguments: Any, **named: Any) -> Any:
            result = attribute(*arguments, **named)
            return self._runner.run(result) if inspect.iscoroutine(result) else result

        return call

    def close(self) -> None:
        self._runner.run(self._manager.aclose())


class ManagerFactory(Protocol):
    """Makes managers of the kind that the test runs for; typed as the blocking one, whose methods are the same."""

    def __call__(self, url: str | None = None, **options: Any) -> ConnectionManager: ...


@pytest.fixture(params=["asyncio", "blocking"])
def make_manager(request: pytest.FixtureRequest, server_url: str, namespace: str) -> Iterator[ManagerFactory]:
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())

        def make(url: str | None = None, **options: Any) -> Any:
            options = {"namespace": namespace} | options
            if request.param == "blocking":
                return stack.enter_context(presence.sync.ConnectionManager.from_url(url or server_url, **options))
            manager = Awaited(presence.ConnectionManager.from_url(url or server_url, **options), runner)
            stack.callback(manager.close)
            return manager

        yield make


@pytest.fixture
def manager(make_manager: ManagerFactory) -> ConnectionManager:
    return make_manager()


@pytest.fixture
def hasty(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The client options of a manager that does not try again, for tests of the error alone."""
    return one_attempt(request.node.callspec.params["make_manager"])


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(PROCESSES, mp_context=spawn) as executor:
        # All of them are up before the first test starts its clock.
        list(executor.map(get_ready, range(PROCESSES)))
        yield executor


@pytest.fixture
def own_server() -> Iterator[LocalServer]:
    """A server process that the test may stop, restart, fill and reconfigure."""
    with LocalServer(program()) as server:
        yield server


@pytest.fixture
def own_client(own_server: LocalServer) -> Iterator[redis.Redis]:
    """A plain client of the test's own server, to look into it and to reconfigure it."""
    with redis.Redis.from_url(own_server.url) as client:
        yield client


@pytest.fixture
def admin(own_server: LocalServer) -> Iterator[Any]:
    """The same, which decodes replies."""
    with watching.admin(own_server) as client:
        yield client


@pytest.fixture
def own_manager(make_manager: ManagerFactory, own_server: LocalServer) -> ConnectionManager:
    """A manager, on the test's own server, that tries again as managers do."""
    return make_manager(own_server.url)


@pytest.fixture
def hasty_manager(make_manager: ManagerFactory, own_server: LocalServer, hasty: dict[str, Any]) -> ConnectionManager:
    """A manager, on the test's own server, that does not try again."""
    return make_manager(own_server.url, **hasty)
