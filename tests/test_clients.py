"""Clients: whichever redis-py client it is given or makes for itself, a manager answers the same, in one round trip."""

from __future__ import annotations

import asyncio
import gc
import random
import re
import signal
import sys
import threading
import time
import traceback
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count, product
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
import redis
import redis.asyncio
import redis.asyncio.retry
import redis.retry
from redis._parsers import (
    _AsyncHiredisParser,
    _AsyncRESP2Parser,
    _AsyncRESP3Parser,
    _HiredisParser,
    _RESP2Parser,
    _RESP3Parser,
)
from redis.backoff import ConstantBackoff, NoBackoff

import presence
import presence.sync
from presence import CleanupResult, ConnectionInfo, JoinResult, Registration, addresses, clients, retrying
from tests.clock import let_time_pass
from tests.conftest import Awaited
from tests.fault_calls import CALLS, call, check, set_the_scene
from tests.fault_proxy import BOUND_SECONDS, Fate, Proxy
from tests.watching import is_held, traced, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from presence.sync import ConnectionManager
    from tests.conftest import ManagerFactory
    from tests.server import LocalServer

SID, RIVAL_SID, NEW_SID = "sid ключ 🎲", "a:b{c}\n\0", "新"
USER, RIVAL = "Zoë", "ユーザー"
GAME, NEXT_GAME = "ß{presence}:conn:", "game 2"


@contextmanager
def open_client(kind: str, url: str, parser: str, **options: Any) -> Iterator[tuple[Any, asyncio.Runner]]:
    """Make a client as an application makes its own, and a runner of the event loop that it belongs to."""
    parsers = {
        ("asyncio", "hiredis", 2): _AsyncHiredisParser,
        ("asyncio", "hiredis", 3): _AsyncHiredisParser,
        ("asyncio", "python", 2): _AsyncRESP2Parser,
        ("asyncio", "python", 3): _AsyncRESP3Parser,
        ("blocking", "hiredis", 2): _HiredisParser,
        ("blocking", "hiredis", 3): _HiredisParser,
        ("blocking", "python", 2): _RESP2Parser,
        ("blocking", "python", 3): _RESP3Parser,
    }
    options["parser_class"] = parsers[kind, parser, options["protocol"]]
    with asyncio.Runner() as runner:
        if kind == "asyncio":
            client: Any = redis.asyncio.Redis.from_pool(redis.asyncio.ConnectionPool.from_url(url, **options))
            try:
                yield client, runner
            finally:
                runner.run(client.aclose())
        else:
            with redis.Redis.from_pool(redis.ConnectionPool.from_url(url, **options)) as client:
                yield client, runner


def manager_of(client: Any, runner: asyncio.Runner, **options: Any) -> Any:
    """Make the manager of a client's kind; an asyncio one is called like a blocking one."""
    if isinstance(client, redis.asyncio.Redis):
        return Awaited(presence.ConnectionManager(client, **options), runner)
    return presence.sync.ConnectionManager(client, **options)


class TestAClientThatTheCallerMade:
    """Its decoding, protocol, parser and encoding make no difference, and it stays the caller's."""

    @pytest.mark.parametrize("kind", ["asyncio", "blocking"])
    def test_sends_nothing_again_when_the_answer_may_be_forgotten(
        self, own_server: LocalServer, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However often its policy tries: a register would displace who has connected elsewhere meanwhile."""
        monkeypatch.setattr(retrying, "RETRYING_SECONDS", 0.2)
        module: Any = redis.asyncio if kind == "asyncio" else redis
        with Proxy(own_server.port) as proxy:
            retry = module.retry.Retry(ConstantBackoff(0.05), 50)
            with open_client(kind, proxy.url, "hiredis", protocol=3, retry=retry) as (given, runner):
                manager: ConnectionManager = manager_of(given, runner)
                manager.register_connection("another", "user")
                proxy.fates = [Fate.LOSE_REPLY] * 51
                with pytest.raises(presence.ServerUnreachableError, match="check that it runs"):
                    manager.register_connection("sid", "user")
                assert 40 <= len(proxy.fates) < 50
                assert proxy.accepted < 20, "it goes on to connect"

    @pytest.mark.parametrize(
        ("kind", "parser", "protocol", "decoding"),
        list(
            product(
                ["asyncio", "blocking"],
                ["hiredis", "python"],
                [2, 3],
                [{}, {"decode_responses": True}, {"decode_responses": True, "encoding": "latin-1"}],
            )
        ),
    )
    def test_answers_the_same_typed_results(
        self,
        server_url: str,
        namespace: str,
        client: redis.Redis,
        kind: str,
        parser: str,
        protocol: int,
        decoding: dict[str, Any],
    ) -> None:
        with open_client(kind, server_url, parser, protocol=protocol, **decoding) as (given, runner):
            manager: ConnectionManager = manager_of(given, runner, namespace=namespace)

            first = manager.register_connection(SID, USER)
            assert first == Registration(first.connection)
            assert first.connection == ConnectionInfo(
                SID,
                USER,
                None,
                first.connection.connected_at,
                first.connection.connected_at,
                epoch=first.connection.epoch,
            )
            assert manager.register_connection(RIVAL_SID, RIVAL).connection.sid == RIVAL_SID
            assert manager.join_game(SID, NEXT_GAME) == JoinResult(joined=True)
            assert manager.join_game(SID, GAME) == JoinResult(joined=True, left_game_id=NEXT_GAME)
            assert manager.join_game(RIVAL_SID, GAME) == JoinResult(joined=True)
            assert manager.join_game("unknown", GAME) == JoinResult(joined=False)
            assert manager.update_heartbeat(SID) is True
            assert manager.update_heartbeat("unknown") is False

            info = manager.get_connection(SID)
            assert info is not None
            assert (info.sid, info.user_id, info.game_id) == (SID, USER, GAME)
            assert info.connected_at == first.connection.connected_at <= info.last_seen <= info.observed_at
            assert manager.get_connection("unknown") is None
            assert manager.get_user_connection(USER) == info
            assert manager.get_user_connection("unknown") is None
            assert manager.is_user_online(USER) is True
            assert manager.is_user_online("unknown") is False
            rival = manager.get_connection(RIVAL_SID)
            assert sorted(manager.get_game_connections(GAME), key=lambda each: each.user_id) == [info, rival]
            assert manager.get_game_connections("unknown") == []
            assert manager.get_game_user_sids(GAME) == {USER: SID, RIVAL: RIVAL_SID}
            assert manager.get_opponent_sid(GAME, USER) == RIVAL_SID
            assert manager.get_opponent_sid("unknown", USER) is None
            assert (manager.get_connection_count(), manager.get_game_connection_count(GAME)) == (2, 2)

            assert manager.register_connection(NEW_SID, USER).displaced == (info,)
            assert manager.leave_game(RIVAL_SID) == GAME
            assert manager.leave_game(RIVAL_SID) is None
            new = manager.get_connection(NEW_SID)
            assert manager.unregister_connection(NEW_SID) == new
            assert manager.unregister_connection(NEW_SID) is None
            let_time_pass(client, namespace, 91)
            rival = manager.get_connection(RIVAL_SID)
            assert rival is not None
            assert manager.cleanup_stale_connections() == CleanupResult((rival,))
            assert manager.cleanup_stale_connections() == CleanupResult()
            counts = manager.pipeline([manager.operations.get_connection_count()] * 3)
            assert counts == [0, 0, 0]

    @pytest.mark.parametrize("kind", ["asyncio", "blocking"])
    def test_stays_open_when_the_manager_is_closed(self, server_url: str, namespace: str, kind: str) -> None:
        with open_client(kind, server_url, "hiredis", protocol=3) as (given, runner):

            def connection_id() -> Any:
                answer = given.client_id()
                return runner.run(answer) if kind == "asyncio" else answer

            manager = manager_of(given, runner, namespace=namespace)
            manager.get_connection_count()
            before = connection_id()
            manager.close()
            assert connection_id() == before

            manager.get_connection_count()
            assert connection_id() == before


class TestEventLoops:
    """A client's connections belong to one event loop; a manager serves several, and an old one's end harms nothing."""

    def test_one_manager_serves_two_event_loops(self, server_url: str, namespace: str) -> None:
        manager = presence.ConnectionManager.from_url(server_url, namespace=namespace)
        with asyncio.Runner() as one, asyncio.Runner() as other:
            one.run(manager.register_connection("sid", "user"))
            assert other.run(manager.is_user_online("user"))
            assert one.run(manager.update_heartbeat("sid"))
            assert other.run(manager.get_connection_count()) == 1
            one.run(manager.aclose())
            assert other.run(manager.get_connection_count()) == 1
            other.run(manager.aclose())

    def test_one_manager_serves_asyncio_run_again_and_again(self, server_url: str, namespace: str) -> None:
        manager = presence.ConnectionManager.from_url(server_url, namespace=namespace)

        async def use() -> int:
            async with manager:
                await manager.register_connection(f"sid-{uuid4()}", "user")
                return await manager.get_connection_count()

        assert [asyncio.run(use()), asyncio.run(use())] == [1, 1]

    def test_the_ready_manager_does_too(self, server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PRESENCE_REDIS_URL", server_url)
        sid, user_id = f"sid-{uuid4()}", uuid4()

        async def register() -> None:
            async with presence.connection_manager as manager:
                await manager.register_connection(sid, user_id)

        async def unregister() -> presence.ConnectionInfo | None:
            async with presence.connection_manager as manager:
                return await manager.unregister_connection(sid)

        asyncio.run(register())
        removed = asyncio.run(unregister())
        assert removed is not None
        assert (removed.sid, removed.user_id) == (sid, str(user_id))

    def test_the_ready_blocking_one_is_used_again_and_again(
        self, server_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PRESENCE_REDIS_URL", server_url)
        sid, user_id = f"sid-{uuid4()}", uuid4()
        with presence.sync.connection_manager as manager:
            manager.register_connection(sid, user_id)
        with presence.sync.connection_manager as manager:
            removed = manager.unregister_connection(sid)
        assert removed is not None
        assert (removed.sid, removed.user_id) == (sid, str(user_id))

    @pytest.mark.parametrize("is_closed", [True, False])
    @pytest.mark.filterwarnings("ignore::ResourceWarning")  # Nobody can close what belongs to a loop that is closed.
    def test_a_client_of_another_one_is_named_and_nothing_is_sent(
        self, server_url: str, namespace: str, is_closed: bool, client: redis.Redis
    ) -> None:
        manager = presence.ConnectionManager(redis.asyncio.Redis.from_url(server_url), namespace=namespace)
        with asyncio.Runner() as one, asyncio.Runner() as other:
            assert one.run(manager.get_connection_count()) == 0
            if is_closed:
                one.close()
            with pytest.raises(RuntimeError, match="connections of another event loop: make it, and the manager"):
                other.run(manager.register_connection("sid", "user"))
        assert client.keys(f"{{{namespace}}}*") == []
        del manager
        gc.collect()


def forget(call: Callable[[], object]) -> None:
    call()
    gc.collect()


def test_a_loop_that_was_forgotten_has_its_name(server_url: str) -> None:
    manager = presence.ConnectionManager.from_url(server_url, server_id="server")
    for name in ("run_cleanup", "run_server_heartbeat"):
        with pytest.warns(RuntimeWarning, match=f"coroutine 'ConnectionManager.{name}' was never awaited"):
            forget(getattr(manager, name))


@pytest.mark.parametrize("kind", [presence.ConnectionManager, presence.sync.ConnectionManager])
def test_a_manager_shows_which_one_it_is(kind: Any) -> None:
    assert repr(kind(namespace="eu")) == f"<{kind.__module__}.ConnectionManager namespace='eu'>"
    shown = repr(kind.from_url("redis://:secret@host", server_id="eu-7"))
    assert shown == f"<{kind.__module__}.ConnectionManager namespace='presence' server_id='eu-7'>"


@pytest.mark.parametrize(
    ("conn_ttl_seconds", "is_told"), [(30, True), (30.1, False)], ids=["as short as the heartbeats", "longer"]
)
def test_connections_that_expire_between_two_heartbeats_are_told_of(
    caplog: pytest.LogCaptureFixture, conn_ttl_seconds: float, is_told: bool
) -> None:
    presence.ConnectionManager(conn_ttl_seconds=conn_ttl_seconds)
    told = "conn_ttl_seconds (30) is not longer than heartbeat_seconds (30)"
    assert [message.startswith(told) for message in caplog.messages] == [True] * is_told


OPENING_SECONDS = 0.4


class OutOfTimeError(Exception):
    """As a signal handler raises that bounds the time of a call."""


class Instant(redis.Redis):
    """Answers at once, since redis-py and hiredis may break where a handler raises in the midst of them."""

    def execute_command(self, *_: Any, **__: Any) -> list[Any]:
        return []


class TestClosing:
    """It waits for the calls under way, and leaves no connection open that belongs to what it closes."""

    @pytest.fixture
    def connections(self, own_server: LocalServer) -> Iterator[Callable[[], int]]:
        """Counts the connections of the managers that the test names "presence"."""
        with redis.Redis.from_url(own_server.url, decode_responses=True) as admin:

            def count() -> int:
                clients: Any = admin.client_list()
                return [client["name"] for client in clients].count("presence")

            yield count

    @pytest.fixture
    def slow_to_open(self, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
        """A blocking client takes a moment to open, as a cluster's does; the event tells that one has begun."""
        has_begun = threading.Event()
        connect = clients.connect_blocking

        def connect_slowly(*given: Any) -> Any:
            has_begun.set()
            time.sleep(OPENING_SECONDS)
            return connect(*given)

        monkeypatch.setattr(clients, "connect_blocking", connect_slowly)
        return has_begun

    def test_keeps_nothing_of_a_client_that_it_has_closed(self, server_url: str, namespace: str) -> None:
        async def run() -> None:
            manager = presence.ConnectionManager.from_url(server_url, namespace=namespace)
            for _ in range(2):
                assert await manager.get_connection_count() == 0
                client = weakref.ref(manager._open_client().client)
                await manager.aclose()
                gc.collect()
                assert client() is None

        asyncio.run(run())

    def test_waits_for_the_calls_under_way(self, own_server: LocalServer) -> None:
        async def run() -> None:
            with Proxy(own_server.port) as proxy:
                manager = presence.ConnectionManager.from_url(proxy.url)
                await manager.register_connection("sid", "user")
                proxy.fates = [Fate.HOLD_REPLY]
                calls = [asyncio.create_task(manager.unregister_connection("sid")) for _ in range(2)]
                await is_held(proxy)
                closing = asyncio.create_task(manager.aclose())
                assert not (await asyncio.wait([closing], timeout=0.1))[0]
                proxy.release()
                await asyncio.wait_for(closing, BOUND_SECONDS)
                removed, unknown = await asyncio.gather(*calls)
                assert removed is not None
                assert (removed.sid, unknown) == ("sid", None)
                assert proxy.accepted == 1

        asyncio.run(run())

    def test_waits_for_the_calls_under_way_in_other_threads(self, own_server: LocalServer) -> None:
        with Proxy(own_server.port) as proxy, ThreadPoolExecutor(1) as threads:
            manager = presence.sync.ConnectionManager.from_url(proxy.url)
            manager.register_connection("sid", "user")
            proxy.fates = [Fate.HOLD_REPLY]
            call = threads.submit(manager.unregister_connection, "sid")
            assert proxy.is_holding.wait(BOUND_SECONDS)
            closing = threading.Thread(target=manager.close, daemon=True)
            closing.start()
            closing.join(0.1)
            was_waiting = closing.is_alive()
            proxy.release()
            closing.join(BOUND_SECONDS)
            assert (was_waiting, closing.is_alive()) == (True, False)
            removed = call.result(BOUND_SECONDS)
            assert removed is not None
            assert removed.sid == "sid"
            assert proxy.accepted == 1

    def test_waits_for_the_calls_under_way_though_another_close_does(self, own_server: LocalServer) -> None:
        async def run() -> None:
            with Proxy(own_server.port) as proxy:
                manager = presence.ConnectionManager.from_url(proxy.url)
                await manager.get_connection_count()
                proxy.fates = [Fate.HOLD_REPLY]
                call = asyncio.create_task(manager.get_connection_count())
                await is_held(proxy)
                closing = [asyncio.create_task(manager.aclose()) for _ in range(2)]
                assert not (await asyncio.wait(closing, timeout=0.1, return_when=asyncio.FIRST_COMPLETED))[0]
                proxy.release()
                assert await call == 0
                await asyncio.wait_for(asyncio.gather(*closing), BOUND_SECONDS)

        asyncio.run(run())

    def test_in_another_thread_waits_though_another_close_does(self, own_server: LocalServer) -> None:
        with Proxy(own_server.port) as proxy, ThreadPoolExecutor(3) as threads:
            manager = presence.sync.ConnectionManager.from_url(proxy.url)
            assert manager.get_connection_count() == 0
            proxy.fates = [Fate.HOLD_REPLY]
            call = threads.submit(manager.get_connection_count)
            assert proxy.is_holding.wait(BOUND_SECONDS)
            closing = [threads.submit(manager.close) for _ in range(2)]
            time.sleep(0.1)
            were_waiting = [not each.done() for each in closing]
            proxy.release()
            assert call.result(BOUND_SECONDS) == 0
            for each in closing:
                each.result(BOUND_SECONDS)
            assert were_waiting == [True, True]

    def test_ends_a_cleanup_that_another_close_has_told_to_end(self, own_server: LocalServer) -> None:
        with Proxy(own_server.port) as proxy, ThreadPoolExecutor(3) as threads:
            manager = presence.sync.ConnectionManager.from_url(proxy.url)
            proxy.fates = [Fate.HOLD_REPLY]
            cleaning = threads.submit(manager.run_cleanup)
            assert proxy.is_holding.wait(BOUND_SECONDS)
            closing = [threads.submit(manager.close) for _ in range(2)]
            time.sleep(0.05)
            proxy.release()
            for each in (cleaning, *closing):
                each.result(BOUND_SECONDS)

    def test_in_a_signal_handler_waits_for_nobody_when_it_has_interrupted_a_call(
        self, own_server: LocalServer, connections: Callable[[], int]
    ) -> None:
        """What that call holds, such as a lock of the pool, the others may need to end theirs."""
        is_closed = False

        def close(*_: object) -> None:
            nonlocal is_closed
            manager.close()
            is_closed = True
            proxy.release()

        with Proxy(own_server.port) as proxy, ThreadPoolExecutor(1) as threads:
            manager = presence.sync.ConnectionManager.from_url(proxy.url, client_name="presence")
            manager.register_connection("sid", "user")
            proxy.fates = [Fate.HOLD_REPLY, Fate.HOLD_REPLY]
            other = threads.submit(manager.get_connection_count)
            assert proxy.is_holding.wait(BOUND_SECONDS)
            before = signal.signal(signal.SIGALRM, close)
            release = threading.Timer(BOUND_SECONDS / 2, proxy.release)
            release.start()
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.2)
                assert manager.update_heartbeat("sid")
            finally:
                signal.signal(signal.SIGALRM, before)
                was_at_once = release.is_alive()
                release.cancel()
            assert other.result(BOUND_SECONDS) == 1
            assert is_closed
            assert was_at_once
            wait_until(lambda: connections() == 0)

    def test_that_is_interrupted_is_ended_by_the_last_call(
        self, own_server: LocalServer, connections: Callable[[], int]
    ) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with Proxy(own_server.port) as proxy, ThreadPoolExecutor(1) as threads:
            manager = presence.sync.ConnectionManager.from_url(proxy.url, client_name="presence")
            assert manager.get_connection_count() == 0
            proxy.fates = [Fate.HOLD_REPLY]
            call = threads.submit(manager.get_connection_count)
            assert proxy.is_holding.wait(BOUND_SECONDS)
            before = signal.signal(signal.SIGALRM, interrupt)
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                with pytest.raises(KeyboardInterrupt):
                    manager.close()
            finally:
                signal.signal(signal.SIGALRM, before)
            proxy.release()
            assert call.result(BOUND_SECONDS) == 0
            wait_until(lambda: connections() == 0)
            manager.close()

    @pytest.mark.xfail(
        sys.version_info[:2] == (3, 14),
        reason="where a signal handler raises, `with lock` may leave the lock held: python/cpython#148874",
        strict=False,  # A later 3.14 may have it mended, as 3.15 has.
    )
    def test_ends_all_after_calls_that_were_interrupted_at_any_moment(self) -> None:
        """Python may run a signal handler at any call of a function, as in what is done before and after a call."""

        def interrupt(*_: object) -> None:
            raise OutOfTimeError

        manager = presence.sync.ConnectionManager(Instant())
        cleaning = threading.Thread(target=manager.run_cleanup, daemon=True)
        moment = random.Random(0)
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            with manager:
                cleaning.start()
                for _ in range(500):
                    with suppress(OutOfTimeError):
                        signal.setitimer(signal.ITIMER_REAL, moment.uniform(1e-5, 2e-4))
                        while True:
                            manager.get_connection("sid")
        finally:
            signal.signal(signal.SIGALRM, before)
        assert not cleaning.is_alive()
        assert manager._calls == {}
        closing = threading.Thread(target=manager.close, daemon=True)
        closing.start()
        closing.join(BOUND_SECONDS)
        assert not closing.is_alive()

    def test_waits_for_no_client_whose_opening_was_interrupted_before_it_began(self) -> None:
        def interrupt(frame: FrameType, event: str, _: object) -> None:
            if event == "call" and frame.f_code.co_name == "_try_to_open":
                raise OutOfTimeError

        manager = presence.sync.ConnectionManager(Instant())
        with traced(interrupt), pytest.raises(OutOfTimeError):
            manager.get_connection("sid")
        for use in (lambda: manager.get_connection("sid"), manager.close):
            thread = threading.Thread(target=use, daemon=True)
            thread.start()
            thread.join(BOUND_SECONDS)
            assert not thread.is_alive()

    def test_does_not_wait_for_the_call_that_a_signal_has_interrupted(self, own_server: LocalServer) -> None:
        """The handler runs in the thread of that call, which goes on when the handler has ended."""
        signals = 0

        def close(*_: object) -> None:
            nonlocal signals
            signals += 1
            assert signals == 1, "the close waits for ever"
            manager.close()
            proxy.release()

        with Proxy(own_server.port) as proxy:
            manager = presence.sync.ConnectionManager.from_url(proxy.url)
            manager.register_connection("sid", "user")
            proxy.fates = [Fate.HOLD_REPLY]
            before = signal.signal(signal.SIGALRM, close)
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.2, BOUND_SECONDS)
                assert manager.update_heartbeat("sid")
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
            manager.close()

    def test_waits_for_the_calls_that_wait_until_the_client_is_open(
        self, own_server: LocalServer, connections: Callable[[], int], slow_to_open: threading.Event
    ) -> None:
        with ThreadPoolExecutor(9) as threads:
            manager = presence.sync.ConnectionManager.from_url(own_server.url, client_name="presence")
            calls = [threads.submit(manager.get_connection_count) for _ in range(8)]
            assert slow_to_open.wait(BOUND_SECONDS)
            time.sleep(OPENING_SECONDS / 2)  # Now all of them wait.
            threads.submit(manager.close).result(BOUND_SECONDS)
            assert [call.done() and call.result() for call in calls] == [0] * 8
            wait_until(lambda: connections() == 0)
            manager.run_cleanup()  # It ends at once: the manager is closed.

    def test_in_a_signal_handler_waits_for_nobody_when_it_has_interrupted_the_opening(
        self, own_server: LocalServer, connections: Callable[[], int], slow_to_open: threading.Event
    ) -> None:
        handled = threading.Event()

        def close(*_: object) -> None:
            manager.close()
            handled.set()

        manager = presence.sync.ConnectionManager.from_url(own_server.url, client_name="presence")
        cleaning = threading.Thread(target=manager.run_cleanup, daemon=True)
        before = signal.signal(signal.SIGALRM, close)
        try:
            signal.setitimer(signal.ITIMER_REAL, OPENING_SECONDS / 2)
            threading.Timer(OPENING_SECONDS / 4, cleaning.start).start()
            assert manager.get_connection_count() == 0
        finally:
            signal.signal(signal.SIGALRM, before)
        assert handled.is_set()
        cleaning.join(BOUND_SECONDS)
        assert not cleaning.is_alive()
        wait_until(lambda: connections() == 0)

    def test_that_is_cancelled_leaves_the_rest_to_the_next(
        self, own_server: LocalServer, connections: Callable[[], int]
    ) -> None:
        """Also when a call that came meanwhile has connected anew."""

        async def run() -> None:
            with Proxy(own_server.port) as proxy:
                manager = presence.ConnectionManager.from_url(proxy.url, client_name="presence")
                await manager.get_connection_count()
                proxy.fates = [Fate.HOLD_REPLY]
                call = asyncio.create_task(manager.get_connection_count())
                await is_held(proxy)
                for _ in range(2):
                    closing = asyncio.create_task(manager.aclose())
                    await asyncio.sleep(0)
                    assert await manager.get_connection_count() == 0
                    closing.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await closing
                closing = asyncio.create_task(manager.aclose())
                assert not (await asyncio.wait([closing], timeout=0.1))[0]
                proxy.release()
                assert await call == 0
                await asyncio.wait_for(closing, BOUND_SECONDS)
                await asyncio.to_thread(wait_until, lambda: connections() == 0)

        asyncio.run(run())


class TestTheDefaultUrl:
    """A manager that is told no URL takes it from the environment, when it first connects."""

    @pytest.fixture
    def environment(self, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
        for name in addresses.ENVIRONMENT_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        return monkeypatch

    def test_is_that_of_the_local_server(self, environment: pytest.MonkeyPatch) -> None:
        assert addresses.default_url() == "redis://localhost:6379/0"

    def test_is_the_environments(self, environment: pytest.MonkeyPatch) -> None:
        environment.setenv("REDIS_URL", "redis://second")
        assert addresses.default_url() == "redis://second"
        environment.setenv("PRESENCE_REDIS_URL", "redis://first")
        assert addresses.default_url() == "redis://first"
        environment.setenv("PRESENCE_REDIS_URL", "")
        assert addresses.default_url() == "redis://second"

    def test_is_read_when_it_is_first_needed(
        self, environment: pytest.MonkeyPatch, server_url: str, namespace: str
    ) -> None:
        manager = presence.sync.ConnectionManager(namespace=namespace)
        environment.setenv("PRESENCE_REDIS_URL", server_url)
        with manager:
            assert manager.get_connection_count() == 0

    @pytest.mark.parametrize("url", ["redis://one?max_conections=5", "redis+cluster://one?max_conections=5"])
    def test_with_an_option_that_does_not_exist_is_refused_by_the_name_of_the_variable(
        self, environment: pytest.MonkeyPatch, url: str
    ) -> None:
        environment.setenv("REDIS_URL", url)
        message = r"REDIS_URL in the environment: .*; did you mean 'max_connections'\?"
        with pytest.raises(ValueError, match=message):
            presence.sync.ConnectionManager().get_connection_count()
        with pytest.raises(ValueError, match=message):
            asyncio.run(presence.ConnectionManager().get_connection_count())


@pytest.mark.parametrize("manager_type", [presence.ConnectionManager, presence.sync.ConnectionManager])
class TestAUrl:
    """A wrong URL is refused when the manager is made, before anything is sent; a good one is not tried out yet."""

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("", "url must start with one of redis://"),
            ("localhost:6379", "url must start with one of redis://"),
            ("http://localhost", "url must start with one of redis://"),
            ("sentinel://localhost/service", "url must start with .*redis\\+sentinel://"),
            ("redis://localhost:port", "url is malformed: the port is no number"),
            ("redis://localhost:65536", "url is malformed: Port out of range"),
            ("redis://localhost?socket_timeout=soon", "url is malformed: .*socket_timeout"),
            ("redis://.example", "url is malformed: a host is no host name"),
            (f"redis://{'x' * 64}.example", "url is malformed: a host is no host name"),
            ("redis+sentinel://one,two..example/service", "url is malformed: a host is no host name"),
            ("redis+cluster://.example", "url is malformed: a host is no host name"),
            ("redis+sentinel://localhost", "url is malformed: it must name the sentinels' service"),
            ("redis+sentinel://localhost/", "url is malformed: it must name the sentinels' service"),
            ("redis+sentinel:///service", "url is malformed: a host is missing"),
            ("redis+sentinel://one,,two/service", "url is malformed: a host is missing"),
            ("redis://localhost/O", "url is malformed: the database is no number"),
            ("rediss://localhost/-1", "url is malformed: the database is no number"),
            ("redis://user:p@ss/word@localhost", "^url is malformed: the database is no number; .* percent-encoded$"),
            ("redis+sentinel://localhost/service/database", "url is malformed: the database is no number"),
            ("redis+sentinel://one,two:65536/service", "url is malformed: Port out of range"),
            ("redis+cluster://", "url is malformed: a host is missing"),
            ("redis+cluster://localhost/1", "url is malformed: a cluster has no database but 0"),
            ("redis+cluster://localhost/database", "url is malformed: the database is no number"),
            ("unix://", "url is malformed: it must name the socket's path"),
            ("unix://path/to.sock", "url is malformed: it must name the socket's path"),
        ],
    )
    def test_that_is_wrong_is_refused_with_what_is_wrong(self, manager_type: Any, url: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            manager_type.from_url(url)

    @pytest.mark.parametrize(
        "url",
        [
            "redis://:half/secret@localhost",
            "redis+cluster://user:half/secret@localhost",
            "redis://:half\N{ACCOUNT OF}secret@localhost",
            "redis+sentinel://:half\N{ACCOUNT OF}secret@localhost/service",
            "redis://:secret?half=secret@localhost",
        ],
    )
    def test_that_is_wrong_shows_nothing_of_a_password(self, manager_type: Any, url: str) -> None:
        with pytest.raises(ValueError, match=r"special characters in a password must be percent-encoded$") as caught:
            manager_type.from_url(url)
        assert "half" not in "".join(traceback.format_exception(caught.value))

    @pytest.mark.parametrize("url", [None, b"redis://localhost", 6379])
    def test_that_is_no_text_is_refused(self, manager_type: Any, url: Any) -> None:
        with pytest.raises(TypeError, match="url must be a str"):
            manager_type.from_url(url)

    @pytest.mark.parametrize("url", ["redis://one", "redis+sentinel://one/two", "redis+cluster://one"])
    def test_with_an_option_that_does_not_exist_is_refused(self, manager_type: Any, url: str) -> None:
        with pytest.raises(TypeError, match="no option 'server_grace_second'; did you mean 'server_grace_seconds'"):
            manager_type.from_url(url, server_grace_second=60)
        with pytest.raises(TypeError, match="no option 'socket_timeouts'; did you mean 'socket_timeout'"):
            manager_type.from_url(url, socket_timeouts=60)
        with pytest.raises(ValueError, match=r"does not exist; namespace is one of from_url\(\) itself"):
            manager_type.from_url(f"{url}?namespace=blue")
        with pytest.raises(TypeError, match="no option 'client'; did you mean 'client_"):
            manager_type.from_url(url, client=None)
        for of_one in ("redis://localhost", "rediss://localhost", "unix:///path"):
            with pytest.raises(TypeError, match=r"no option 'ssl' for one server: its URL says so"):
                manager_type.from_url(of_one, ssl=True)
        with pytest.raises(ValueError, match=r"^url is malformed: ssl is no option in it; write rediss"):
            manager_type.from_url(f"{url}?ssl=true")
        with pytest.raises(ValueError, match=r"^url is malformed: ssl_ca_certs is an option of TLS, .*rediss"):
            manager_type.from_url(f"{url}?ssl_ca_certs=/certificates")
        with pytest.raises(TypeError, match=r"no option 'ssl_cert_reqs' without TLS, .*rediss"):
            manager_type.from_url(url, ssl_cert_reqs="none")
        if url.startswith("redis+"):
            with pytest.raises(TypeError, match=r"no option 'ssl_ca_certs' without TLS"):
                manager_type.from_url(url.replace("redis+", "rediss+"), ssl=False, ssl_ca_certs="/certificates")
        with pytest.raises(ValueError, match=r"^url is malformed: protocol must be 2 or 3$"):
            manager_type.from_url(f"{url}?protocol=4")
        with pytest.raises(ValueError, match=r"^protocol must be 2 or 3, not 'three'$"):
            manager_type.from_url(url, protocol="three")
        for wrong in ("socket_timeout=-1", "socket_timeout=nan", "socket_connect_timeout=0", "max_connections=-3"):
            with pytest.raises(ValueError, match=rf"^url is malformed: {wrong.partition('=')[0]} must be "):
                manager_type.from_url(f"{url}?{wrong}")
        for name in ("retry", "retry_on_error", "credential_provider"):
            with pytest.raises(
                ValueError, match=rf"^url is malformed: {name} is no option in it; pass {name}= to from_url"
            ):
                manager_type.from_url(f"{url}?{name}=3")
        if not url.startswith("redis+sentinel"):
            with pytest.raises(ValueError, match="an option in it does not exist"):
                manager_type.from_url(f"{url}?sentinel_password=secret")
        with pytest.raises(TypeError, match=r"no option 'colour'$"):
            manager_type.from_url(url, colour="red")
        with pytest.raises(ValueError, match="an option in it does not exist; did you mean 'socket_timeout'"):
            manager_type.from_url(f"{url}?socket_timeouts=60")

    def test_with_a_class_of_connections_of_the_callers_may_have_any_option(self, manager_type: Any) -> None:
        assert manager_type.from_url("redis://one", connection_class=object, colour="red")
        assert manager_type.from_url("redis+cluster://one", connection_pool_class=object, colour="red")

    def test_may_have_the_options_of_a_sentinels_pool(self, manager_type: Any) -> None:
        assert manager_type.from_url("redis+sentinel://one/two", check_connection=True, min_other_sentinels=1)

    @pytest.mark.parametrize("scheme", addresses.SCHEMES)
    def test_that_leads_nowhere_is_accepted_until_it_is_used(self, manager_type: Any, scheme: str) -> None:
        host = "" if scheme == "unix" else "nowhere.invalid"
        path = "/service" if scheme in ("unix", "redis+sentinel", "rediss+sentinel") else "/0"
        assert manager_type.from_url(f"{scheme}://{host}{path}").operations.namespace == "presence"


class TestTheUrlOfSeveralServers:
    """What redis-py has no URL for: the hosts and credentials of sentinels and of a cluster's nodes."""

    def test_names_hosts_with_their_default_ports(self) -> None:
        sentinels = addresses.parse("redis+sentinel://[::1],one.example:26380/the%20service")
        assert sentinels.hosts == (("::1", 26379), ("one.example", 26380))
        assert (sentinels.service_name, sentinels.options) == ("the service", {})
        nodes = addresses.parse("redis+cluster://one.example,two.example:7000/0")
        assert nodes.hosts == (("one.example", 6379), ("two.example", 7000))
        assert nodes.options == {}

    def test_holds_credentials_database_and_options_for_the_servers_and_others_for_the_sentinels(self) -> None:
        address = addresses.parse(
            "redis+sentinel://user:p%40ss@one,two/service/3?socket_timeout=2"
            "&sentinel_username=watcher&sentinel_password=other"
        )
        assert address.options == {"username": "user", "password": "p@ss", "db": 3, "socket_timeout": 2.0}
        assert address.sentinel_options == {"username": "watcher", "password": "other"}

    @pytest.mark.parametrize("url", ["redis+sentinel://u:p@one,u:p@two/service", "redis+cluster://u:p@one,u:p@two"])
    def test_has_its_credentials_once(self, url: str) -> None:
        with pytest.raises(ValueError, match=r"once, before the first host; .* must be percent-encoded$"):
            addresses.parse(url)

    def test_with_tls_has_the_option_for_it(self) -> None:
        address = addresses.parse("rediss+sentinel://one/service?ssl_ca_certs=/certificates")
        assert address.options == {"ssl": True, "ssl_ca_certs": "/certificates"}

    def test_does_not_show_its_password(self) -> None:
        for url in ("redis://:secret@one", "redis+sentinel://:secret@one/service?sentinel_password=secret"):
            assert "secret" not in repr(addresses.parse(url))


def test_on_a_cluster_no_call_is_sent_again_after_a_fault_that_lasts() -> None:
    replies = [
        redis.exceptions.ConnectionError(),
        redis.exceptions.AuthenticationError(),
        b"reply",
        redis.exceptions.AuthorizationError(),
        redis.exceptions.TryAgainError(),
    ]
    assert retrying.transient_faults(replies) == [0, 4]


def test_options_reach_redis_py_from_the_url_and_from_the_call(
    make_manager: ManagerFactory, own_server: LocalServer
) -> None:
    make_manager(f"{own_server.url}?client_name=from-the-url").get_connection_count()
    make_manager(own_server.url, client_name="from-the-call").get_connection_count()
    with redis.Redis.from_url(own_server.url, decode_responses=True) as admin:
        assert {"from-the-url", "from-the-call"} < {client["name"] for client in admin.client_list()}


CONNECT: dict[str, Any] = {"asyncio": clients.connect_asyncio, "blocking": clients.connect_blocking}

URLS_OF_A_POOL = ["redis://one", "rediss://one", "unix:///one", "redis+sentinel://one/two", "rediss+sentinel://one/two"]
"""Those whose client has one pool, and needs no server before it is used."""


@pytest.mark.parametrize("kind", CONNECT)
class TestTheOptionsOfAClient:
    """The call's, else the URL's, else the defaults that the README names."""

    @pytest.mark.parametrize("url", URLS_OF_A_POOL)
    def test_are_by_default_those_of_the_readme(self, kind: str, url: str) -> None:
        client = CONNECT[kind](addresses.parse(url), {})
        pool = client.connection_pool
        options = pool.connection_kwargs
        assert (pool.max_connections, options["socket_timeout"]) == (64, 5)
        # A unix socket connects at once, and redis-py may be unable to speak RESP3 over it, so that is left to it.
        expected = (None, None) if url.startswith("unix") else (5, 3)
        assert (options.get("socket_connect_timeout"), options.get("protocol")) == expected
        assert isinstance(pool, redis.BlockingConnectionPool | redis.asyncio.BlockingConnectionPool)
        check_the_retries(client.get_retry())
        assert options["retry_on_error"] == [redis.exceptions.ReadOnlyError]

    def test_of_sentinels_have_the_same_timeouts_for_all_together(self, kind: str) -> None:
        """To ask them takes part of the time in which a call may be sent again."""
        client = CONNECT[kind](addresses.parse("redis+sentinel://one,two/service"), {"socket_timeout": 2})
        for sentinel in client.connection_pool.sentinel_manager.sentinels:
            options = sentinel.connection_pool.connection_kwargs
            assert (options["socket_timeout"], options["socket_connect_timeout"]) == (1, 2.5)

    def test_of_sentinels_may_be_without_a_timeout(self, kind: str) -> None:
        client = CONNECT[kind](addresses.parse("redis+sentinel://one,two/service"), {"socket_timeout": None})
        options = client.connection_pool.sentinel_manager.sentinels[0].connection_pool.connection_kwargs
        assert (options["socket_timeout"], options["socket_connect_timeout"]) == (None, 2.5)

    @pytest.mark.parametrize("url", URLS_OF_A_POOL)
    def test_are_the_calls_rather_than_the_urls(self, kind: str, url: str) -> None:
        address = addresses.parse(f"{url}?max_connections=7&socket_timeout=2")
        assert self.limits(CONNECT[kind](address, {})) == (7, 2)
        assert self.limits(CONNECT[kind](address, {"max_connections": 9})) == (9, 2)
        assert self.limits(CONNECT[kind](address, {"socket_timeout": 3})) == (7, 3)

    def test_over_a_unix_socket_may_name_the_protocol(self, kind: str) -> None:
        for url, given in (("unix:///one?protocol=2", {}), ("unix:///one", {"protocol": 2})):
            protocol = CONNECT[kind](addresses.parse(url), given).connection_pool.connection_kwargs["protocol"]
            assert int(protocol) == 2  # redis-py 7.4 takes it from a URL as text.

    @pytest.mark.parametrize(
        ("given", "told"),
        [
            ({"socket_timeout": "5"}, "socket_timeout must be a number of seconds, not str: '5'"),
            ({"socket_connect_timeout": -1}, "socket_connect_timeout must be positive, not -1"),
            ({"max_connections": "64"}, "max_connections must be an int, not str: '64'"),
            ({"max_connections": 0}, "max_connections must be from 1 to"),
        ],
    )
    def test_that_redis_py_would_stumble_over_are_named(self, kind: str, given: dict[str, Any], told: str) -> None:
        manager = presence.ConnectionManager if kind == "asyncio" else presence.sync.ConnectionManager
        with pytest.raises((TypeError, ValueError), match=re.escape(told)):
            manager.from_url("redis://localhost", **given)
        manager.from_url("redis://localhost", socket_timeout=None, socket_connect_timeout=None, max_connections=1)

    def test_of_retries_must_be_the_client_s_kind(self, kind: str) -> None:
        manager = presence.ConnectionManager if kind == "asyncio" else presence.sync.ConnectionManager
        kinds: list[Any] = [redis.asyncio.retry.Retry, redis.retry.Retry]
        own, other = kinds if kind == "asyncio" else reversed(kinds)
        for retry in (3, other(ConstantBackoff(1), 1)):
            with pytest.raises(TypeError, match=rf"^retry must be a {own.__module__}.Retry, not "):
                manager.from_url("redis://localhost", retry=retry)
        manager.from_url("redis://localhost", retry=own(ConstantBackoff(1), 1))

    @staticmethod
    def limits(client: Any) -> tuple[int, float]:
        pool = client.connection_pool
        return pool.max_connections, pool.connection_kwargs["socket_timeout"]


def test_a_connection_of_a_clusters_pool_comes_back_once_and_from_the_thread_that_took_it() -> None:
    in_use = clients._InUse({"taken before"})
    with ThreadPoolExecutor(1) as other_thread:
        for _ in range(2):  # In turns: first the other thread has it, then this one.
            other_thread.submit(in_use.add, "taken").result()
            with pytest.raises(KeyError):
                in_use.remove("taken")
            other_thread.submit(in_use.remove, "taken").result()
            with pytest.raises(KeyError):
                in_use.remove("taken")
            in_use.add("taken")
            in_use.remove("taken")
        other_thread.submit(in_use.remove, "taken before").result()
    assert in_use == set()
    assert in_use._takers == {}


class TestTheLayoutOfACluster:
    """A blocking client asks for it once for all threads that wait for it."""

    @pytest.mark.parametrize(
        ("outcome", "told"),
        [(None, None), (LookupError(), LookupError), (KeyboardInterrupt(), redis.ConnectionError)],
        ids=["an answer", "an error", "an interruption"],
    )
    def test_is_told_to_all_by_who_asks(self, outcome: BaseException | None, told: type[Exception] | None) -> None:
        asked, is_answered = count(), threading.Event()

        def ask() -> None:
            next(asked)
            is_answered.wait(BOUND_SECONDS)
            if outcome is not None:
                raise outcome

        def learn() -> None:
            try:
                learner()
            except BaseException as error:
                met.append(error)
            else:
                met.append(None)

        learner = clients._LayoutLearner(ask)
        met: list[BaseException | None] = []
        threads = [threading.Thread(target=learn, daemon=True) for _ in range(4)]
        for each in threads:
            each.start()
        time.sleep(0.3)  # Now all wait.
        assert met == []
        is_answered.set()
        for each in threads:
            each.join(BOUND_SECONDS)
        assert next(asked) == 1
        met.remove(outcome)
        assert [error and type(error) for error in met] == [told] * 3

    def test_is_asked_for_again_by_a_signal_handler_that_interrupts_who_asks(self) -> None:
        asked = count()

        def ask() -> None:
            if next(asked) == 0:
                learner()  # As by a call of the handler.

        learner = clients._LayoutLearner(ask)
        asking = threading.Thread(target=learner, daemon=True)
        asking.start()
        asking.join(BOUND_SECONDS)
        assert next(asked) == 2

    def test_is_asked_for_again_later(self) -> None:
        asked: list[None] = []
        learner = clients._LayoutLearner(lambda: asked.append(None))
        # As where a signal handler has raised at the end of another thread's.
        learner._outcome = Future()
        learner._outcome.set_result(None)
        for _ in range(3):
            learner()
        assert len(asked) == 3


def test_an_interruption_before_the_first_attempt_takes_no_time_from_later_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In whichever line of what bounds the time of a blocking client's retries."""
    now = 1.0
    monkeypatch.setattr(retrying, "monotonic", lambda: now)
    client: Any = clients.connect_blocking(addresses.parse("redis://localhost"), {})
    retry = client.get_retry()
    for line in count():
        was_interrupted = not retry_until_interrupted(retry, line)
        now += retrying.RETRYING_SECONDS + 1
        attempts = iter((redis.ConnectionError(), None))

        def attempt(attempts: Iterator[Exception | None] = attempts) -> str:
            error = next(attempts)
            if error is not None:
                raise error
            return "done"

        assert retry.call_with_retry(attempt, lambda _: None) == "done"
        if not was_interrupted:
            break
    assert line > 2


def retry_until_interrupted(retry: Any, line: int) -> bool:
    """Raise in a line, counted from 0, of a call that would succeed at once; tell whether it was called before that."""
    lines = count()
    is_called = False

    def call() -> None:
        nonlocal is_called
        is_called = True

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if is_called or frame.f_code.co_filename != retrying.__file__:
            return None
        if event == "line" and next(lines) == line:
            raise KeyboardInterrupt
        return trace

    with suppress(KeyboardInterrupt), traced(trace):
        retry.call_with_retry(call, lambda _: None)
    return is_called


def check_the_retries(retry: Any) -> None:
    """Up to 6 retries over two to three seconds: on average, because of the jitter."""
    assert retry.get_retries() == 6
    pauses = [sum(retry._backoff.compute(failures) for failures in range(1, 7)) for _ in range(200)]
    assert 2 < sum(pauses) / len(pauses) < 3


def test_an_attempt_within_an_attempt_has_no_more_time_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    now, connects = 0.0, 0
    monkeypatch.setattr(retrying, "monotonic", lambda: now)
    retry = retrying.TimelyRetry(NoBackoff(), 1000)

    def connect() -> None:
        nonlocal now, connects
        now += retrying.RETRYING_SECONDS / 4
        connects += 1
        raise redis.ConnectionError("the connection broke")

    def send() -> None:
        nonlocal now
        now += retrying.RETRYING_SECONDS / 2
        retry.call_with_retry(connect, lambda _: None)

    with pytest.raises(redis.ConnectionError):
        retry.call_with_retry(send, lambda _: None)
    assert connects == 3


def test_more_calls_at_once_than_connections_wait_for_a_free_one(own_server: LocalServer) -> None:
    async def run() -> None:
        async with presence.ConnectionManager.from_url(own_server.url, max_connections=3) as manager:
            with redis.Redis.from_url(own_server.url) as admin:
                admin.config_set("maxclients", 4)
                results = await asyncio.gather(
                    *(manager.register_connection(f"sid-{number}", f"user-{number}") for number in range(100))
                )
                assert len({result.connection.sid for result in results}) == 100
                assert await manager.get_connection_count() == 100

    asyncio.run(run())


class TestOneRoundTrip:
    """The server reads from its sockets once for each operation, and once for a pipeline (guarantee 7)."""

    @pytest.fixture
    def warm_manager(self, make_manager: ManagerFactory, own_server: LocalServer) -> ConnectionManager:
        """A manager with an open connection to a server that has the scripts."""
        manager = make_manager(own_server.url)
        for name in CALLS:
            call(manager, name)
        set_the_scene(manager)
        return manager

    @contextmanager
    def one_round_trip(self, admin: Any, calls: int) -> Iterator[None]:
        admin.config_resetstat()
        before = admin.info("stats")["total_reads_processed"]
        yield
        after = admin.info("stats")["total_reads_processed"]
        assert after - before == 2, "one read for the operation, one for INFO"
        evalsha = admin.info("commandstats")["cmdstat_evalsha"]
        assert (evalsha["calls"], evalsha["failed_calls"]) == (calls, 0)

    @pytest.mark.parametrize("name", CALLS)
    def test_is_all_that_an_operation_takes(self, warm_manager: ConnectionManager, admin: Any, name: str) -> None:
        with self.one_round_trip(admin, calls=1):
            check(warm_manager, name)

    def test_is_all_that_a_pipeline_takes(self, warm_manager: ConnectionManager, admin: Any) -> None:
        operations = warm_manager.operations
        with self.one_round_trip(admin, calls=10):
            assert warm_manager.pipeline([operations.update_heartbeat("sid-1")] * 10) == [True] * 10

    def test_is_all_that_a_pipeline_of_different_operations_takes(
        self, warm_manager: ConnectionManager, admin: Any
    ) -> None:
        operations = warm_manager.operations
        described: list[presence.Operation[Any]] = [
            operations.update_heartbeat("sid-1"),
            operations.leave_game("sid-1"),
            operations.get_game_connection_count("game"),
            operations.get_connection_count(),
        ]
        with self.one_round_trip(admin, calls=4):
            assert warm_manager.pipeline(described) == [True, "game", 1, 2]

    def test_an_empty_pipeline_takes_none(self, make_manager: ManagerFactory) -> None:
        assert make_manager("redis://nowhere.invalid").pipeline([]) == []

    def test_the_operations_in_a_pipeline_answer_in_their_order(self, warm_manager: ConnectionManager) -> None:
        operations = warm_manager.operations
        described: list[presence.Operation[Any]] = [
            operations.leave_game("sid-1"),
            operations.leave_game("sid-1"),
            operations.join_game("sid-1", "game"),
            operations.get_game_connection_count("game"),
        ]
        assert warm_manager.pipeline(described) == ["game", None, JoinResult(joined=True), 2]
