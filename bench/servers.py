"""The servers to measure: the one that ``PRESENCE_REDIS_URL`` names, else each server program of this machine.

A program gets a process of its own for each section, so that no section inherits another's memory; it is ended when the
section ends. A given server is only measured while it is empty, and is empty again afterwards.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.fill import remove_all
from bench.measure import MeasurementError
from presence import addresses, clients
from tests.server import LocalServer, programs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import redis


class Server(NamedTuple):
    """A running server: a connection to it, and its URL for more."""

    client: redis.Redis
    url: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server is had; without a program it is the one of the URL."""

    name: str
    program: Path | None
    url: str

    @contextmanager
    def server(self) -> Iterator[Server]:
        """Give an empty server.

        Raises:
            MeasurementError: it holds data, which the benchmark neither touches nor measures.

        """
        if self.program:
            with LocalServer(self.program) as server, _connect(server.url) as client:
                yield Server(client, server.url)
            return
        with _connect(self.url) as client:
            keyspace: Any = client.info("keyspace")
            if keyspace:
                raise MeasurementError(
                    f"the server of PRESENCE_REDIS_URL holds data ({', '.join(keyspace)}), which was not touched; "
                    "give the URL of an empty one"
                )
            try:
                yield Server(client, self.url)
            finally:
                remove_all(client)


def _connect(url: str) -> redis.Redis:
    client: Any = clients.connect_blocking(addresses.parse(url), {})
    return client  # type: ignore[no-any-return]


def places() -> list[Place]:
    """List the servers to measure."""
    url = os.environ.get("PRESENCE_REDIS_URL")
    if url:
        return [Place("PRESENCE_REDIS_URL", None, url)]
    return [Place(name, program, "") for name, program in programs().items()]
