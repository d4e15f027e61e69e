"""run_cleanup and run_server_heartbeat: when they pause, when they do not, and how a close ends them.

When run_cleanup lets heartbeats come first is looked at more closely in ``test_outages.py``.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import redis

import presence
import presence.background
import presence.sync
from presence.operations import CLEANUP_BATCH_SIZE, Operations
from presence.replies import CleanupBatch
from tests.clock import let_time_pass
from tests.fault_calls import one_attempt
from tests.fault_proxy import BOUND_SECONDS, Fate, Proxy
from tests.server import free_port
from tests.test_cleanup import register_many
from tests.watching import scripts_run, wait_until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator

    from presence import CleanupResult
    from tests.server import LocalServer

HOUR = 3600
A_MOMENT = 0.1

both_managers = pytest.mark.parametrize("kind", ["asyncio", "blocking"])


class Background:
    """A manager that repeats something, with callbacks that may block, until ``close`` is called."""

    def __init__(self, kind: str, url: str, **options: Any) -> None:
        self._kind = kind
        self._url = url
        # A cleanup comes after some heartbeats.
        self._options = {"heartbeat_seconds": 0.1, "conn_ttl_seconds": 4 * HOUR} | options
        self._is_to_close = threading.Event()
        self.is_closed = threading.Event()
        self.has_ended = threading.Event()

    def start(self, name: str, interval: float, report: Callable[[CleanupResult], object] | None) -> None:
        def run() -> None:
            if self._kind == "asyncio":
                asyncio.run(self._run(name, interval, report))
            else:
                self._run_blocking(name, interval, report)
            self.has_ended.set()

        threading.Thread(target=run, daemon=True).start()

    def close(self) -> None:
        self._is_to_close.set()

    def _run_blocking(self, name: str, interval: float, report: Callable[[CleanupResult], object] | None) -> None:
        named = {} if report is None else {"on_removed": report}
        with presence.sync.ConnectionManager.from_url(self._url, **self._options) as manager:
            thread = threading.Thread(target=getattr(manager, name), args=(interval,), kwargs=named, daemon=True)
            thread.start()
            self._is_to_close.wait()
        self.is_closed.set()
        thread.join()

    async def _run(self, name: str, interval: float, report: Callable[[CleanupResult], object] | None) -> None:
        async def on_removed(result: CleanupResult) -> None:
            assert report is not None
            await asyncio.to_thread(report, result)

        named = {} if report is None else {"on_removed": on_removed}
        async with presence.ConnectionManager.from_url(self._url, **self._options) as manager:
            task = asyncio.create_task(getattr(manager, name)(interval, **named))
            await asyncio.to_thread(self._is_to_close.wait)
        self.is_closed.set()
        await task


@contextmanager
def repeating(
    background: Background, name: str, interval: float, report: Callable[[CleanupResult], object] | None = None
) -> Iterator[None]:
    """Run it meanwhile; in the end its manager is closed, and that ends it at once, however long its pause is."""
    background.start(name, interval, report)
    try:
        yield
    finally:
        background.close()
    assert background.has_ended.wait(BOUND_SECONDS), "the close did not end it"


def sids_of(result: CleanupResult) -> list[str]:
    return [connection.sid for connection in result.removed]


@contextmanager
def standing_still(server: LocalServer) -> Iterator[None]:
    """Let the server neither answer nor close anything meanwhile; then it goes on with what was sent."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


def register_two(manager: presence.sync.ConnectionManager) -> None:
    for sid in ("there", "gone"):
        manager.register_connection(sid, f"user of {sid}")


def until_it_cleans_up(manager: presence.sync.ConnectionManager, client: redis.Redis, reported: list[str]) -> None:
    """Wait until it has taken a connection: then it waits for no heartbeats any more, and sends batch after batch.

    Of a manager whose heartbeats are half a second apart, as in the tests that use it.
    """
    manager.register_connection("before", "before")
    let_time_pass(client, "presence", 1.6)
    wait_until(lambda: reported == ["before"])
    reported.clear()


def who_beats_stays(manager: presence.sync.ConnectionManager, reported: list[str]) -> None:
    """Let one of the two beat, and see that a cleanup takes the other alone."""

    def beats_until_then() -> bool:
        assert manager.update_heartbeat("there")
        return bool(reported)

    wait_until(beats_until_then)
    time.sleep(A_MOMENT)
    assert reported == ["gone"]


@both_managers
class TestRunCleanup:
    """It pauses when nothing is left or it met a fault."""

    def test_does_not_pause_before_nothing_is_left_but_then(
        self, own_server: LocalServer, own_client: redis.Redis, kind: str
    ) -> None:
        batches: list[tuple[int, int]] = []

        def report(result: CleanupResult) -> None:
            batches.append((len(result), scripts_run(own_client)))

        with presence.sync.ConnectionManager.from_url(own_server.url) as manager:
            register_many(manager, 2 * CLEANUP_BATCH_SIZE + 1)
            let_time_pass(own_client, "presence", 91)
            with repeating(Background(kind, own_server.url), "run_cleanup", HOUR, report):
                wait_until(lambda: len(batches) == 3)
                manager.register_connection("later", "later")
                let_time_pass(own_client, "presence", 91)
                looks = scripts_run(own_client)
                wait_until(lambda: scripts_run(own_client) >= looks + 5)
        first = batches[0][1]  # No look at the server comes between them.
        assert batches == [(CLEANUP_BATCH_SIZE, first), (CLEANUP_BATCH_SIZE, first + 1), (1, first + 2)]

    def test_reports_nothing_when_it_removed_nothing(
        self, own_server: LocalServer, own_client: redis.Redis, kind: str
    ) -> None:
        reported: list[CleanupResult] = []
        with repeating(Background(kind, own_server.url), "run_cleanup", 0.01, reported.append):
            wait_until(lambda: scripts_run(own_client) >= 6)  # The first four only look.
        assert reported == []

    def test_has_reported_when_a_close_has_ended(
        self, own_server: LocalServer, own_client: redis.Redis, kind: str
    ) -> None:
        is_reporting, may_go_on = threading.Event(), threading.Event()

        def report(_: CleanupResult) -> None:
            is_reporting.set()
            assert may_go_on.wait(BOUND_SECONDS)

        with presence.sync.ConnectionManager.from_url(own_server.url) as manager:
            manager.register_connection("sid", "user")
            let_time_pass(own_client, "presence", 91)
        background = Background(kind, own_server.url)
        with repeating(background, "run_cleanup", HOUR, report):
            assert is_reporting.wait(BOUND_SECONDS)
            background.close()
            try:
                assert not background.is_closed.wait(A_MOMENT)
            finally:
                may_go_on.set()

    def test_after_an_outage_lets_the_heartbeats_come_first(
        self, own_server: LocalServer, own_client: redis.Redis, kind: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        reported: list[str] = []
        with (
            presence.sync.ConnectionManager.from_url(own_server.url, heartbeat_seconds=0.5) as manager,
            Proxy(own_server.port) as proxy,
        ):
            background = Background(kind, proxy.url, heartbeat_seconds=0.5, **one_attempt(kind))
            with repeating(background, "run_cleanup", 0.05, lambda result: reported.extend(sids_of(result))):
                until_it_cleans_up(manager, own_client, reported)
                register_two(manager)
                proxy.fates = [Fate.LOSE_REQUEST] * 1000
                wait_until(lambda: "cleanup failed" in caplog.text)
                let_time_pass(own_client, "presence", 1.6)
                own_client.config_resetstat()
                proxy.fates.clear()
                wait_until(lambda: scripts_run(own_client) >= 1)  # It has seen that the server answers again.
                who_beats_stays(manager, reported)

    def test_what_waits_in_a_server_that_stands_still_lets_the_heartbeats_come_first(
        self, own_server: LocalServer, own_client: redis.Redis, kind: str
    ) -> None:
        reported: list[str] = []
        with presence.sync.ConnectionManager.from_url(own_server.url, heartbeat_seconds=0.5) as manager:
            background = Background(kind, own_server.url, heartbeat_seconds=0.5)
            with repeating(background, "run_cleanup", 0.05, lambda result: reported.extend(sids_of(result))):
                until_it_cleans_up(manager, own_client, reported)
                register_two(manager)
                let_time_pass(own_client, "presence", 0.4)
                with standing_still(own_server):
                    time.sleep(1.2)  # Longer than answers may be apart, and with that they are stale.
                who_beats_stays(manager, reported)

    def test_lets_the_heartbeats_come_before_its_first_batch(
        self, own_server: LocalServer, own_client: redis.Redis, kind: str
    ) -> None:
        """Nobody knows whether there was an outage before its process began."""
        reported: list[str] = []
        with presence.sync.ConnectionManager.from_url(own_server.url, heartbeat_seconds=0.5) as manager:
            register_two(manager)
            let_time_pass(own_client, "presence", 1.6)
            own_client.config_resetstat()
            background = Background(kind, own_server.url, heartbeat_seconds=0.5)
            with repeating(background, "run_cleanup", HOUR, lambda result: reported.extend(sids_of(result))):
                wait_until(lambda: scripts_run(own_client) >= 1)
                who_beats_stays(manager, reported)

    @pytest.mark.parametrize(("fate", "interval"), [(Fate.LOSE_REQUEST, 0.05), (Fate.LOSE_REPLY, HOUR)])
    def test_reports_after_a_fault_what_a_batch_removed_or_would_have(
        self,
        own_server: LocalServer,
        own_client: redis.Redis,
        kind: str,
        fate: Fate,
        interval: float,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("presence.background.RESENDING_SECONDS", 0.1)
        reported: list[str] = []
        with presence.sync.ConnectionManager.from_url(own_server.url) as manager, Proxy(own_server.port) as proxy:
            manager.register_connection("sid", "user")
            assert not manager.cleanup_stale_connections()  # The server has the script now.
            let_time_pass(own_client, "presence", 91)
            proxy.fates = [*[Fate.PASS] * 4, fate]  # The looks before the batch.
            background = Background(kind, proxy.url, **one_attempt(kind))
            with repeating(background, "run_cleanup", interval, lambda result: reported.extend(sids_of(result))):
                wait_until(lambda: reported)
        assert reported == ["sid"]


@both_managers
@pytest.mark.parametrize("is_batch", [True, False])
def test_what_ends_before_a_batch_was_answered_is_logged(
    own_server: LocalServer, kind: str, is_batch: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with presence.sync.ConnectionManager.from_url(own_server.url) as manager, Proxy(own_server.port) as proxy:
        assert not manager.cleanup_stale_connections()  # The server has the script now.
        proxy.fates = [*[Fate.PASS] * 4 * is_batch, Fate.LOSE_REPLY]  # The looks before the batch.
        with repeating(Background(kind, proxy.url, **one_attempt(kind)), "run_cleanup", HOUR):
            wait_until(lambda: caplog.records)
    told = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert [message[:55] for message in told] == ["run_cleanup ended before the answer to a batch got thro"] * is_batch


@pytest.mark.parametrize(
    ("threshold_seconds", "not_after_ms"), [(None, b"0"), (90, b"0"), (30.001, b"0"), (30, b""), (1, b"")]
)
def test_a_threshold_of_more_than_a_heartbeat_lets_the_heartbeats_come_first(
    threshold_seconds: float | None, not_after_ms: bytes
) -> None:
    """It begins with a look, which comes too late to do anything."""
    first = presence.background.RepeatedCleanup(Operations(), 60, threshold_seconds).next()
    assert dict(zip(first.script.arguments, first.arguments, strict=True))["not_after_ms"] == not_after_ms


@pytest.mark.parametrize("threshold_seconds", [None, 1])
def test_each_batch_of_a_cleanup_is_another_call(threshold_seconds: float | None) -> None:
    """Under the same token, it would be given the answer of the one before for a minute."""
    cleanup = presence.background.RepeatedCleanup(Operations(), 60, threshold_seconds)
    reply_keys = set()
    for second in range(100):
        reply_keys.add(cleanup.next().keys[-1])
        cleanup.succeed(CleanupBatch((), is_last=True, now_ms=1000 * second, is_late=second < 50))
    assert len(reply_keys) == 100


def test_a_cleanup_is_sent_again_soon_while_its_answer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a minute after it was first sent; later a fault is met at leisure."""
    now = 100.0
    monkeypatch.setattr("presence.background.monotonic", lambda: now)
    cleanup = presence.background.RepeatedCleanup(Operations(), 60, None)
    pauses = []
    for _ in range(4):
        cleanup.next()
        now += 25
        pauses.append(cleanup.fail(redis.ConnectionError()))
    assert pauses == [5, 5, 30, 30]


@both_managers
@pytest.mark.parametrize("name", ["run_cleanup", "run_server_heartbeat"])
def test_a_fault_is_followed_by_the_pause(kind: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    background = Background(kind, url, server_id="server", heartbeat_seconds=HOUR, **one_attempt(kind))
    with repeating(background, name, HOUR):
        wait_until(lambda: caplog.records)
        time.sleep(A_MOMENT)
    assert [bool(record.exc_info) for record in caplog.records] == [False]


@both_managers
def test_a_heartbeat_of_the_server_that_met_a_fault_is_sent_again_long_before_the_next_is_due(
    kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence.background, "RESENDING_SECONDS", 0.05)
    url = f"redis://127.0.0.1:{free_port()}/0"
    beating = Background(kind, url, server_id="server", heartbeat_seconds=HOUR, **one_attempt(kind))
    with repeating(beating, "run_server_heartbeat", HOUR):
        wait_until(lambda: len(caplog.records) > 2)
    assert "next attempt in 0.05 s" in caplog.records[0].getMessage()


class BrokenOnce(redis.CredentialProvider):
    """Its service fails with an error that is no fault of the server or the network."""

    def __init__(self) -> None:
        self.asked = 0

    def get_credentials(self) -> tuple[str, str]:
        self.asked += 1
        if self.asked == 1:
            raise LookupError("the service is away")
        return "default", "any password"


@both_managers
@pytest.mark.parametrize("name", ["run_cleanup", "run_server_heartbeat"])
def test_an_unexpected_error_is_logged_with_its_traceback_and_ends_neither(
    own_server: LocalServer, own_client: redis.Redis, kind: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    background = Background(kind, own_server.url, server_id="server", credential_provider=BrokenOnce())
    with repeating(background, name, 0.01):
        wait_until(lambda: scripts_run(own_client) > 2)
    (record,) = [record for record in caplog.records if record.name == "presence"]
    assert "next attempt in 0.01 s: the service is away" in record.getMessage()
    assert record.exc_info
    assert record.exc_info[0] is LookupError


@both_managers
def test_a_close_ends_the_pause_of_run_server_heartbeat(
    own_server: LocalServer, own_client: redis.Redis, kind: str
) -> None:
    background = Background(kind, own_server.url, server_id="server", heartbeat_seconds=HOUR)
    with repeating(background, "run_server_heartbeat", HOUR):
        wait_until(lambda: scripts_run(own_client) == 2)  # The start, and the heartbeat.
        time.sleep(A_MOMENT)
    assert scripts_run(own_client) == 2


def reporting(url: str, on_removed: Callable[[presence.ConnectionManager, CleanupResult], Awaitable[object]]) -> None:
    """Let a cleanup report a connection, and wait until what runs it has ended, in good order."""

    async def run() -> None:
        async with presence.ConnectionManager.from_url(url, heartbeat_seconds=0.1) as manager:
            async with asyncio.timeout(BOUND_SECONDS):
                await manager.run_cleanup(0.01, on_removed=lambda result: on_removed(manager, result))

    asyncio.run(run())


def test_who_cancels_a_task_and_awaits_it_in_the_callback_does_not_end_the_cleanup(
    own_server: LocalServer, own_client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    reported: list[str] = []

    async def on_removed(manager: presence.ConnectionManager, result: CleanupResult) -> None:
        reported.extend(sids_of(result))
        if len(reported) == 2:
            await manager.aclose()
            return
        await manager.register_connection("another sid", "another user")
        let_time_pass(own_client, "presence", 91)
        of_the_player = asyncio.create_task(asyncio.sleep(HOUR))
        of_the_player.cancel()
        await of_the_player

    with presence.sync.ConnectionManager.from_url(own_server.url) as manager:
        manager.register_connection("sid", "user")
    let_time_pass(own_client, "presence", 91)
    reporting(own_server.url, on_removed)
    assert reported == ["sid", "another sid"]
    assert ["on_removed failed" in record.getMessage() for record in caplog.records] == [True]


def test_a_shutdown_that_cancels_the_callback_is_no_error_of_it(
    own_server: LocalServer, own_client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        is_reporting = asyncio.Event()

        async def on_removed(_: CleanupResult) -> None:
            is_reporting.set()
            await asyncio.sleep(HOUR)

        async with presence.ConnectionManager.from_url(own_server.url, heartbeat_seconds=0.1) as manager:
            cleaning = asyncio.create_task(manager.run_cleanup(HOUR, on_removed=on_removed))
            async with asyncio.timeout(BOUND_SECONDS):
                await is_reporting.wait()
                for task in asyncio.all_tasks() - {asyncio.current_task()}:
                    task.cancel()
                await asyncio.wait([cleaning])
            assert cleaning.cancelled()

    with presence.sync.ConnectionManager.from_url(own_server.url) as manager:
        manager.register_connection("sid", "user")
    let_time_pass(own_client, "presence", 91)
    asyncio.run(run())
    assert caplog.records == []


async def _in_a_group(closing: Coroutine[Any, Any, None]) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(closing)


@pytest.mark.parametrize(
    "wait",
    [
        asyncio.gather,
        asyncio.create_task,
        asyncio.shield,
        _in_a_group,
        lambda closing: asyncio.wait_for(closing, BOUND_SECONDS),
        lambda closing: closing,
    ],
    ids=["gather", "task", "shield", "group", "wait_for", "directly"],
)
def test_the_callback_may_close_the_manager_in_any_way(
    own_server: LocalServer, own_client: redis.Redis, wait: Callable[[Coroutine[Any, Any, None]], Awaitable[object]]
) -> None:
    async def on_removed(manager: presence.ConnectionManager, _: CleanupResult) -> None:
        await wait(manager.aclose())

    with presence.sync.ConnectionManager.from_url(own_server.url) as manager:
        manager.register_connection("sid", "user")
    let_time_pass(own_client, "presence", 91)
    reporting(own_server.url, on_removed)


def test_the_callback_may_close_the_manager_beside_other_repetitions(
    own_server: LocalServer, own_client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        manager = presence.ConnectionManager.from_url(own_server.url, server_id="server", heartbeat_seconds=0.1)

        async def on_removed(_: CleanupResult) -> None:
            await manager.aclose()

        repetitions = [manager.run_cleanup(0.01, on_removed=on_removed)]
        repetitions += [manager.run_server_heartbeat() for _ in range(4)]
        tasks = [asyncio.create_task(each) for each in repetitions]
        assert (await asyncio.wait(tasks, timeout=BOUND_SECONDS))[1] == set()
        await manager.aclose()

    with presence.sync.ConnectionManager.from_url(own_server.url) as manager:
        manager.register_connection("sid", "user")
    let_time_pass(own_client, "presence", 91)
    asyncio.run(run())
    assert not caplog.records


def test_the_callbacks_of_two_cleanups_may_close_the_manager_at_the_same_time(
    own_server: LocalServer, own_client: redis.Redis
) -> None:
    async def run() -> None:
        manager = presence.ConnectionManager.from_url(own_server.url, heartbeat_seconds=0.1)
        are_both_there = asyncio.Barrier(2)

        async def on_removed(_: CleanupResult) -> None:
            await are_both_there.wait()
            await manager.aclose()

        cleanups = [asyncio.create_task(manager.run_cleanup(0.01, on_removed=on_removed)) for _ in range(2)]
        assert (await asyncio.wait(cleanups, timeout=BOUND_SECONDS))[1] == set()
        await manager.aclose()

    with presence.sync.ConnectionManager.from_url(own_server.url) as manager:
        register_many(manager, 2 * CLEANUP_BATCH_SIZE)
    let_time_pass(own_client, "presence", 91)
    asyncio.run(run())


def test_a_task_that_outlives_the_callback_that_began_it_closes_in_good_order(
    own_server: LocalServer, own_client: redis.Redis
) -> None:
    done: list[str] = []

    async def run() -> None:
        manager = presence.ConnectionManager.from_url(own_server.url, heartbeat_seconds=0.1)
        is_second = asyncio.Event()

        async def close() -> None:
            await is_second.wait()
            await manager.aclose()
            done.append("closed")

        async def on_removed(result: CleanupResult) -> None:
            if not closing:
                closing.append(asyncio.create_task(close()))
                await manager.register_connection("another sid", "another user")
                let_time_pass(own_client, "presence", 91)
                return
            is_second.set()
            await asyncio.sleep(A_MOMENT)
            done.append("dealt with")

        closing: list[asyncio.Task[None]] = []
        await manager.run_cleanup(0.01, on_removed=on_removed)
        await closing[0]

    with presence.sync.ConnectionManager.from_url(own_server.url) as manager:
        manager.register_connection("sid", "user")
    let_time_pass(own_client, "presence", 91)
    asyncio.run(run())
    assert done == ["dealt with", "closed"]


def test_what_a_step_leaves_is_freed_without_the_garbage_collector(server_url: str, namespace: str) -> None:
    """A game server may do without one, and these steps go on as long as it lives."""

    async def work() -> int:
        async with presence.ConnectionManager.from_url(server_url, namespace=namespace, server_id="one") as manager:
            running = asyncio.create_task(manager.run_server_heartbeat(0.001))
            await asyncio.sleep(0.1)
            gc.collect()
            await asyncio.sleep(0.3)
            left = gc.collect()
        await running
        return left

    gc.disable()
    try:
        assert asyncio.run(work()) < 10
    finally:
        gc.enable()


def test_a_plain_callback_may_give_anything(
    own_server: LocalServer, own_client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    reported: list[str] = []

    async def run() -> None:
        async with presence.ConnectionManager.from_url(own_server.url, heartbeat_seconds=0.1) as manager:

            def report(result: CleanupResult) -> int:
                reported.extend(sids_of(result))
                return len(reported)

            cleaning = asyncio.create_task(manager.run_cleanup(0.01, on_removed=report))
            await asyncio.to_thread(wait_until, lambda: reported)
        await cleaning

    with presence.sync.ConnectionManager.from_url(own_server.url) as manager:
        manager.register_connection("sid", "user")
    let_time_pass(own_client, "presence", 91)
    asyncio.run(run())
    assert reported == ["sid"]
    assert caplog.records == []
