"""What the tests, the demo and the benchmarks run on ends with them."""

from __future__ import annotations

import os

import pytest
import redis

from tests.server import LocalServer, program


def test_a_server_ends_if_its_start_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    server = LocalServer(program())
    pids: list[int] = []

    def interrupt(_client: redis.Redis) -> None:
        pids.append(server.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(redis.Redis, "ping", interrupt)
    with pytest.raises(KeyboardInterrupt):
        server.start()
    (pid,) = pids
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not server.folder.exists()
