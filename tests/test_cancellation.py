"""Calls of one event loop that are cancelled or interrupted: none harms another, or a connection."""

from __future__ import annotations

import asyncio
import gc
import linecache
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import redis
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

import presence
from presence import pipelining, retrying
from tests.fault_proxy import BOUND_SECONDS, Fate, Proxy
from tests.one_loop import SlowConnection, run, until, warm_manager
from tests.server import LocalServer, free_port
from tests.watching import is_held, scripts_run, traced

if TYPE_CHECKING:
    from types import FrameType


class SwallowingConnection(redis.asyncio.Connection):
    """Loses a cancellation while it writes, as Python 3.11's asyncio.wait_for can."""

    is_slow: ClassVar[bool] = False

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        await super().send_packed_command(command, check_health)
        if self.is_slow:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(2 * BOUND_SECONDS)


class TestCancellationOfOne:
    """It ends that call, and no other notices."""

    @pytest.mark.parametrize("is_busy", [False, True], ids=["", "while others wait for their replies"])
    def test_before_it_is_sent_keeps_it_from_being_sent(
        self, own_server: LocalServer, admin: Any, is_busy: bool
    ) -> None:
        async def work() -> None:
            with Proxy(own_server.port) as proxy:
                async with warm_manager(proxy.url, 1) as manager:
                    admin.config_resetstat()
                    first = []
                    if is_busy:
                        proxy.fates = [Fate.HOLD_REPLY]
                        first = [asyncio.create_task(manager.update_heartbeat("sid-0"))]
                        await is_held(proxy)
                    cancelled = asyncio.create_task(manager.register_connection("cancelled", "user"))
                    other = asyncio.create_task(manager.update_heartbeat("sid-0"))
                    await asyncio.sleep(0)
                    cancelled.cancel()
                    if is_busy:
                        proxy.release()
                    assert all(await asyncio.gather(other, *first))
                    assert cancelled.cancelled()
                    assert scripts_run(admin) == 1 + is_busy
                    assert await manager.get_connection("cancelled") is None

        run(work())

    @pytest.mark.parametrize("number", [0, 3, 9])
    def test_after_it_is_sent_lets_it_take_effect(self, own_server: LocalServer, number: int) -> None:
        async def work() -> None:
            with Proxy(own_server.port) as proxy:
                async with warm_manager(proxy.url, 10) as manager:
                    proxy.fates = [Fate.HOLD_REPLY]
                    calls = [
                        asyncio.create_task(manager.register_connection(f"next-{n}", f"user-{n}")) for n in range(10)
                    ]
                    await is_held(proxy)
                    calls[number].cancel()
                    proxy.release()
                    answers = await asyncio.gather(*calls, return_exceptions=True)
                    assert isinstance(answers.pop(number), asyncio.CancelledError)
                    others = [n for n in range(10) if n != number]
                    for n, answer in zip(others, answers, strict=True):
                        assert isinstance(answer, presence.Registration)
                        assert [gone.sid for gone in answer.displaced] == [f"sid-{n}"]
                    taken = await manager.get_user_connection(f"user-{number}")
                    assert taken is not None
                    assert taken.sid == f"next-{number}"

        run(work())

    def test_does_not_make_a_close_wait_for_a_reply_that_never_comes(self, own_server: LocalServer) -> None:
        async def work() -> None:
            with Proxy(own_server.port) as proxy:
                async with warm_manager(proxy.url, 1, socket_timeout=None) as manager:
                    proxy.fates = [Fate.HOLD_REPLY]
                    call = asyncio.create_task(manager.update_heartbeat("sid-0"))
                    await is_held(proxy)
                    call.cancel()
                    await asyncio.wait_for(manager.aclose(), BOUND_SECONDS)
                    assert call.cancelled()
                    assert await manager.update_heartbeat("sid-0")

        run(work())

    def test_does_not_even_where_redis_py_swallows_that_of_the_close(self, own_server: LocalServer) -> None:
        async def work() -> None:
            with Proxy(own_server.port) as proxy:
                options: dict[str, Any] = {"connection_class": SwallowingConnection, "socket_timeout": None}
                async with warm_manager(proxy.url, 1, **options) as manager:
                    proxy.fates = [Fate.HOLD_REPLY]
                    SwallowingConnection.is_slow = True
                    call = asyncio.create_task(manager.update_heartbeat("sid-0"))
                    await is_held(proxy)
                    SwallowingConnection.is_slow = False
                    call.cancel()
                    closing = asyncio.create_task(manager.aclose())
                    in_time, _ = await asyncio.wait([closing], timeout=BOUND_SECONDS)
                    proxy.release()
                    assert in_time

        run(work())

    def test_and_a_close_leave_no_connection_half_read_in_the_pool(self, own_server: LocalServer) -> None:
        async def work() -> None:
            with Proxy(own_server.port) as proxy:
                pool = redis.asyncio.BlockingConnectionPool.from_url(proxy.url, max_connections=1)
                async with redis.asyncio.Redis.from_pool(pool) as client:
                    manager = presence.ConnectionManager(client)
                    await manager.update_heartbeat("unknown")
                    proxy.fates = [Fate.HOLD_REPLY]
                    call = asyncio.create_task(manager.update_heartbeat("unknown"))
                    await is_held(proxy)
                    call.cancel()
                    await asyncio.wait([call])
                    await manager.aclose()
                    answer = asyncio.ensure_future(client.echo("the answer"))
                    await asyncio.sleep(0)
                    proxy.release()
                    assert await answer == b"the answer"

        run(work())

    def test_by_a_signals_handler_in_any_line_harms_no_other_call(self, own_server: LocalServer) -> None:
        """As asyncio.run's handler of Ctrl-C does, which cancels the main task wherever the loop is just then."""

        async def work(manager: presence.ConnectionManager, at_line: int) -> bool:
            """Tell whether it was cancelled while the calls were carried."""
            calls = [asyncio.create_task(manager.update_heartbeat(f"sid-{number}")) for number in range(4)]
            lines = 0

            def cancel(frame: FrameType, event: str, _: object) -> Any:
                nonlocal lines
                if frame.f_code.co_filename != pipelining.__file__:
                    return None
                if event == "line":
                    lines += 1
                    if lines == at_line:
                        calls[1].cancel()
                return cancel

            with traced(cancel):
                first, _, *others = await asyncio.gather(*calls, return_exceptions=True)
            assert [first, *others] == [True] * 3
            return lines >= at_line

        async def count_lines() -> None:
            async with warm_manager(own_server.url, 4) as manager:
                at_line = 1
                while await work(manager, at_line):
                    at_line += 1
                assert at_line > 50

        run(count_lines())

    def test_ends_a_subscription_even_where_redis_py_swallows_it(
        self, own_server: LocalServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("presence.subscriptions.ASKING_SECONDS", 0.02)

        async def work() -> None:
            options: dict[str, Any] = {"connection_class": SwallowingConnection, "events": "pubsub"}
            manager = presence.ConnectionManager.from_url(own_server.url, **options)
            async with manager, manager.subscribe() as events:
                monkeypatch.setattr(SwallowingConnection, "is_slow", True)
                waiting = asyncio.ensure_future(anext(events))
                await asyncio.sleep(0.1)  # Now it asks the server whether it is still there.
                waiting.cancel()
                ended, _ = await asyncio.wait([waiting], timeout=1)
                assert ended

        run(work())


class TestCancellationOfAllTasks:
    """As a shutdown does it, and asyncio.run in its end: the task that carries the calls is one of them."""

    @pytest.mark.parametrize("turns", [0, 1, 2, 3, 5])
    def test_does_not_cancel_the_calls_that_are_made_after_it(self, own_server: LocalServer, turns: int) -> None:
        removed: list[str] = []

        async def work() -> None:
            async with asyncio.timeout(BOUND_SECONDS), warm_manager(own_server.url, 20) as manager:

                async def unregister(number: int) -> None:
                    gone = await manager.unregister_connection(f"sid-{number}")
                    assert gone is not None
                    removed.append(gone.sid)

                async def play(number: int) -> None:
                    try:
                        while True:
                            assert await manager.update_heartbeat(f"sid-{number}")
                    finally:
                        await unregister(number)

                players = [asyncio.create_task(play(number)) for number in range(1, 20)]
                await manager.update_heartbeat("sid-0")
                await cancel_all_after(turns)
                await unregister(0)
                await asyncio.wait(players)
                assert all(player.cancelled() for player in players)

        asyncio.run(work())
        assert sorted(removed) == sorted(f"sid-{number}" for number in range(20))

    @pytest.mark.parametrize("turns", range(4))
    def test_in_any_turn_of_a_call_harms_no_later_one(self, own_server: LocalServer, turns: int) -> None:
        async def work() -> None:
            async with warm_manager(own_server.url, 1) as manager:
                for _ in range(3):
                    await asyncio.sleep(0.01)  # Nothing is under way, so the call begins everything anew.
                    call = asyncio.create_task(manager.update_heartbeat("sid-0"))
                    await cancel_all_after(turns)
                    await asyncio.wait([call])
                    async with asyncio.timeout(BOUND_SECONDS):
                        assert await manager.update_heartbeat("sid-0")

        asyncio.run(work())

    @pytest.mark.parametrize("turns", range(6))
    def test_in_any_turn_of_a_close_leaves_it_to_the_next(self, own_server: LocalServer, turns: int) -> None:
        async def work() -> None:
            manager = presence.ConnectionManager.from_url(own_server.url)
            for _ in range(3):
                await manager.update_heartbeat("unknown")
                closing = asyncio.create_task(manager.aclose())
                await cancel_all_after(turns)
                await asyncio.wait([closing])
                async with asyncio.timeout(BOUND_SECONDS):
                    await manager.aclose()
            gc.collect()  # A connection that was left open would warn.

        asyncio.run(work())

    @pytest.mark.parametrize("turns", range(6))
    def test_in_any_turn_of_a_close_that_follows_a_cancellation_leaves_nothing_open(
        self, own_server: LocalServer, turns: int
    ) -> None:
        async def play() -> None:
            async with presence.ConnectionManager.from_url(own_server.url) as manager:
                await manager.update_heartbeat("unknown")
                await asyncio.sleep(BOUND_SECONDS)

        async def work() -> None:
            playing = asyncio.create_task(play())
            await asyncio.sleep(0.1)
            playing.cancel()
            await cancel_all_after(turns, but=playing)
            await asyncio.wait([playing])
            assert playing.cancelled()
            gc.collect()  # A connection that was left open would warn.

        asyncio.run(work())

    def test_between_two_replies_leaves_no_connection_half_read_in_the_pool(
        self, own_server: LocalServer, admin: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pipelining, "REPLIES_PER_TURN", 1)

        async def work() -> None:
            pool = redis.asyncio.BlockingConnectionPool.from_url(own_server.url, max_connections=1)
            async with redis.asyncio.Redis.from_pool(pool) as client, presence.ConnectionManager(client) as manager:
                assert await manager.get_connection_count() == 0
                assert not await manager.update_heartbeat("unknown")
                admin.client_pause(300, all=False)  # So the server answers the read, and not yet the write after it.

                async def read() -> None:
                    assert await manager.get_connection_count() == 0
                    await cancel_all_after(0, but=shutting_down)

                shutting_down = asyncio.current_task()
                await asyncio.gather(read(), manager.update_heartbeat("unknown"), return_exceptions=True)
                assert await client.echo("the answer") == b"the answer"

        asyncio.run(work())

    def test_while_replies_are_read_lets_nothing_be_written_into_the_next_greeting(
        self, own_server: LocalServer
    ) -> None:
        async def work(proxy: Proxy) -> None:
            async with asyncio.timeout(BOUND_SECONDS), warm_manager(proxy.url, 2) as manager:
                proxy.fates = [Fate.HOLD_REPLY]
                call = asyncio.create_task(manager.update_heartbeat("sid-0"))
                await is_held(proxy)
                proxy.delay, accepted = 0.1, proxy.accepted
                await cancel_all_after(0, but=call)
                await until(lambda: proxy.accepted > accepted)
                assert await manager.get_connection_count() == 2
                assert await call is True

        with Proxy(own_server.port) as proxy:
            asyncio.run(work(proxy))


def test_a_call_that_a_cancellation_of_all_tasks_lets_be_sent_again_has_no_more_time_for_it(
    own_server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer that the server keeps is as old as the first time that it was sent."""
    monkeypatch.setattr(retrying, "RETRYING_SECONDS", 1)

    async def work(proxy: Proxy) -> None:
        async with presence.ConnectionManager.from_url(proxy.url) as manager:
            await manager.update_heartbeat("sid")
            proxy.fates = [Fate.HOLD_REPLY, Fate.LOSE_REPLY]
            call = asyncio.create_task(manager.update_heartbeat("sid"))
            await until(proxy.is_holding.is_set)
            await asyncio.sleep(0.8)
            proxy.delay = 0.3
            await cancel_all_after(0, but=call)
            with pytest.raises(presence.ServerUnreachableError):
                await call
            assert proxy.fates == []

    with Proxy(own_server.port) as proxy:
        asyncio.run(work(proxy))


async def cancel_all_after(turns: int, but: asyncio.Task[Any] | None = None) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)
    for task in asyncio.all_tasks() - {asyncio.current_task(), but}:
        task.cancel()


def test_a_runner_whose_end_went_unnoticed_harms_no_later_call(own_server: LocalServer) -> None:
    """As where a signal handler raised in the midst of its callback."""

    async def work() -> None:
        async with warm_manager(own_server.url, 1) as manager:
            shared = manager._open_client().shared
            assert shared is not None
            await asyncio.sleep(0.05)  # The calls before are over, and so is their runner.
            shared._runner = asyncio.create_task(asyncio.sleep(0))
            await shared._runner
            assert await manager.update_heartbeat("sid-0")

    run(work())


class InterruptedConnection(redis.asyncio.Connection):
    """Reads a reply, after so many others, only after what a signal handler may raise there."""

    interruption: ClassVar[type[BaseException] | None] = None
    replies_before: ClassVar[int] = 0

    async def read_response(self, *arguments: Any, **options: Any) -> Any:
        if self.replies_before:
            InterruptedConnection.replies_before -= 1
            return await super().read_response(*arguments, **options)
        interruption, InterruptedConnection.interruption = self.interruption, None
        if interruption is not None:
            raise interruption
        return await super().read_response(*arguments, **options)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_a_loop_that_is_interrupted_can_still_close_the_manager(
    own_server: LocalServer, interruption: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever is interrupted closes the manager in a `finally`, and that waits for the calls under way."""

    async def call(manager: presence.ConnectionManager) -> bool:
        return await manager.update_heartbeat("unknown")

    url = f"redis://127.0.0.1:{own_server.port}/0"
    pool = redis.asyncio.ConnectionPool.from_url(url, connection_class=InterruptedConnection)
    manager = presence.ConnectionManager(redis.asyncio.Redis.from_pool(pool))
    loop = asyncio.new_event_loop()
    try:
        assert loop.run_until_complete(call(manager)) is False
        calls = [loop.create_task(call(manager)) for _ in range(3)]
        InterruptedConnection.interruption = interruption
        with pytest.raises(interruption):
            loop.run_until_complete(asyncio.gather(*calls))
        loop.run_until_complete(asyncio.wait_for(manager.aclose(), BOUND_SECONDS))
        assert [task.result() for task in calls] == [False] * 3
        loop.run_until_complete(pool.aclose())
    finally:
        loop.close()
    gc.collect()  # A task whose exception nobody has looked at would be logged.
    assert caplog.records == []


def test_an_interruption_within_a_pipeline_gives_no_call_the_reply_to_another(
    own_server: LocalServer, admin: Any
) -> None:
    """The call that was refused goes first on the next connection, and the pipeline has to wait for room there."""
    count = pipelining.MAX_COMMANDS - 6

    async def register_all(manager: presence.ConnectionManager) -> None:
        for number in range(count):
            await manager.register_connection(f"sid-{number}", f"user-{number}")
        await manager.update_heartbeat("sid-0")

    url = f"redis://127.0.0.1:{own_server.port}/0"
    pool = redis.asyncio.ConnectionPool.from_url(
        url, connection_class=InterruptedConnection, retry=Retry(NoBackoff(), 3)
    )
    manager = presence.ConnectionManager(redis.asyncio.Redis.from_pool(pool))
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(register_all(manager))
        admin.replicaof("127.0.0.1", str(free_port()))
        reads = [manager.operations.get_connection(f"sid-{number}") for number in range(count)]
        beat, reading = loop.create_task(manager.update_heartbeat("sid-0")), loop.create_task(manager.pipeline(reads))
        InterruptedConnection.interruption, InterruptedConnection.replies_before = KeyboardInterrupt, 40
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(asyncio.gather(beat, reading))
        admin.replicaof("NO", "ONE")
        found = loop.run_until_complete(asyncio.wait_for(reading, BOUND_SECONDS))
        assert [one.user_id if one else None for one in found] == [f"user-{number}" for number in range(count)]
        assert loop.run_until_complete(beat) is True
        assert loop.run_until_complete(manager.get_connection_count()) == count
        loop.run_until_complete(manager.aclose())
        loop.run_until_complete(pool.aclose())
    finally:
        loop.close()


def test_an_interruption_in_any_line_gives_no_call_the_reply_to_another(
    own_server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler may raise wherever the loop is just then; who was not interrupted goes on with the loop."""
    monkeypatch.setattr(SlowConnection, "seconds", 0.0002)  # So calls come while the replies to others are awaited.
    carrying = {"_take", "_take_more", "_write_beside", "_write", "_read", "_converse", "_keep_unanswered", "_answer"}
    lines = 0
    interrupted: Counter[str] = Counter()

    async def ask_twice(manager: presence.ConnectionManager, number: int) -> list[str | None]:
        found: list[presence.ConnectionInfo | None] = []
        for _ in range(2):
            for _ in range(number):
                await asyncio.sleep(0)
            read = manager.operations.get_connection(f"sid-{number}")
            found += await manager.pipeline([read] * number) if number else [await manager.get_connection("sid-0")]
        return [one.user_id if one else None for one in found]

    async def register_all(manager: presence.ConnectionManager) -> None:
        for number in range(3):
            await manager.register_connection(f"sid-{number}", f"user-{number}")

    def interrupt(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        code = frame.f_code
        if code.co_filename != pipelining.__file__ or code.co_name not in carrying:
            return None
        # Python looks for signals at calls and jumps, and a `try` is neither.
        if event == "line" and linecache.getline(code.co_filename, frame.f_lineno).strip() != "try:":
            lines += 1
            if lines == at_line:
                caller = frame.f_back and frame.f_back.f_back
                interrupted["beside" if caller and caller.f_code.co_name == "_write_beside" else code.co_name] += 1
                raise KeyboardInterrupt
        return interrupt

    pool = redis.asyncio.ConnectionPool.from_url(own_server.url, connection_class=SlowConnection)
    manager = presence.ConnectionManager(redis.asyncio.Redis.from_pool(pool))
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(register_all(manager))
        at_line = 1
        while lines >= at_line - 1:
            lines = 0
            asking = asyncio.gather(*(loop.create_task(ask_twice(manager, number)) for number in range(3)))
            with suppress(KeyboardInterrupt), traced(interrupt):
                loop.run_until_complete(asking)
            with suppress(RuntimeError):  # The loop that was interrupted was about to stop, and stops now.
                loop.run_until_complete(asyncio.sleep(0.002))
            answers = loop.run_until_complete(asyncio.wait_for(asking, BOUND_SECONDS))
            expected = [[f"user-{number}"] * 2 * max(number, 1) for number in range(3)]
            assert answers == expected, f"interrupted in line {at_line}"
            at_line += 1
        assert interrupted["beside"] > 5
        assert interrupted["_read"] > 50
        loop.run_until_complete(manager.aclose())
        loop.run_until_complete(pool.aclose())
    finally:
        loop.close()
