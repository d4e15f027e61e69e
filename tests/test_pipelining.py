"""Calls that one event loop awaits at the same time share a connection; each is answered as if it were alone."""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import redis
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff, NoBackoff

import presence
from presence import pipelining, retrying
from presence.commands import SCRIPT_LOAD
from tests.fault_calls import load_late, one_attempt
from tests.fault_proxy import BOUND_SECONDS, CuttingProxy, Fate, Proxy
from tests.invariants import read_keyspace, violations
from tests.one_loop import SlowConnection, run, until, warm_manager
from tests.server import LocalServer, free_port
from tests.watching import counted, every_refusal, is_held, refuse_next_write, scripts_run

if TYPE_CHECKING:
    from collections.abc import Coroutine


class TestWhatIsAwaitedAtOnce:
    """It takes one connection, and one write for each turn of the event loop."""

    def test_goes_out_in_one_write_on_one_connection(self, own_server: LocalServer, admin: Any) -> None:
        async def work() -> None:
            async with warm_manager(own_server.url, 50) as manager:
                admin.config_resetstat()
                before = admin.info("stats")["total_reads_processed"]
                counts = await asyncio.gather(*(manager.get_connection_count() for _ in range(50)))
                assert admin.info("stats")["total_reads_processed"] - before == 2, "one, and one for INFO"
                assert (counts, scripts_run(admin)) == ([50] * 50, 50)
                assert [client["name"] for client in admin.client_list()].count("shared") == 1

        run(work())

    @pytest.mark.parametrize("is_interrupted", [False, True], ids=["", "after an interruption"])
    def test_does_not_wait_for_the_replies_to_what_was_sent_before(
        self, own_server: LocalServer, admin: Any, is_interrupted: bool
    ) -> None:
        async def until_so_many_ran(count: int) -> None:
            await until(lambda: scripts_run(admin) == count)

        async def work() -> None:
            with Proxy(own_server.port) as proxy:
                async with warm_manager(proxy.url, 30) as manager:
                    shared = manager._open_client().shared
                    assert shared is not None
                    # As where a signal handler has raised before the loop was asked to write.
                    shared._write_is_due = is_interrupted
                    admin.config_resetstat()
                    proxy.fates = [Fate.HOLD_REPLY]
                    first = asyncio.create_task(manager.get_connection_count())
                    await is_held(proxy)
                    others: list[asyncio.Task[int]] = []
                    for count in (9, 20):
                        others += [asyncio.create_task(manager.get_connection_count()) for _ in range(count)]
                        await until_so_many_ran(1 + len(others))
                    assert not first.done()
                    proxy.release()
                    assert await asyncio.gather(first, *others) == [30] * 30
                assert proxy.accepted == 1

        run(work())

    def test_is_answered_in_its_order_beside_pipelines_of_any_size(self, own_server: LocalServer) -> None:
        async def work() -> None:
            async with warm_manager(own_server.url, 10) as manager:
                operations = manager.operations
                size = 3 * pipelining.MAX_COMMANDS
                beats = [operations.update_heartbeat("sid-1" if n % 3 else "unknown") for n in range(size)]
                expected = [bool(n % 3) for n in range(size)]
                answers: Any = await asyncio.gather(
                    manager.update_heartbeat("sid-0"),
                    manager.pipeline(beats),
                    manager.get_connection_count(),
                    manager.pipeline(beats[:5]),
                    manager.update_heartbeat("unknown"),
                )
                assert list(answers) == [True, expected, 10, expected[:5], False]

        run(work())

    @pytest.mark.parametrize("calls", [1, 64])
    def test_costs_one_task_at_most(self, own_server: LocalServer, calls: int) -> None:
        async def work() -> None:
            async with warm_manager(own_server.url, 1) as manager:
                gathered = [asyncio.create_task(manager.update_heartbeat("sid-0")) for _ in range(calls)]
                made: list[asyncio.Task[Any]] = []

                def make(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
                    made.append(asyncio.Task(coroutine, loop=loop))
                    return made[-1]

                asyncio.get_running_loop().set_task_factory(make)  # type: ignore[arg-type]
                assert await asyncio.gather(*gathered) == [True] * calls
                assert made == [], "the one that carries the calls does not come from the factory"

        run(work())

    def test_leaves_the_connections_of_a_client_to_its_owner(self, own_server: LocalServer) -> None:
        async def work() -> None:
            pool = redis.asyncio.BlockingConnectionPool.from_url(own_server.url, max_connections=1)
            async with redis.asyncio.Redis.from_pool(pool) as client:
                manager = presence.ConnectionManager(client)
                await asyncio.gather(*(manager.register_connection(f"sid-{n}", f"user-{n}") for n in range(50)))
                assert await client.ping()

        run(work())

    def test_lets_others_have_a_pools_last_connection_under_load(
        self, own_server: LocalServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pipelining, "SESSION_SECONDS", 0.01)

        async def work() -> None:
            pool = redis.asyncio.BlockingConnectionPool.from_url(own_server.url, max_connections=1, timeout=None)
            async with redis.asyncio.Redis.from_pool(pool) as client:
                manager = presence.ConnectionManager(client)
                is_over, is_answered = False, asyncio.Event()

                async def beat() -> None:
                    while not is_over:
                        assert not await manager.update_heartbeat("unknown")
                        is_answered.set()

                load = [asyncio.create_task(beat()) for _ in range(8)]
                for _ in range(5):
                    is_answered.clear()
                    await is_answered.wait()
                    assert await client.ping()
                is_over = True
                await asyncio.gather(*load)

        run(work())

    def test_works_on_a_client_with_a_single_connection(self, own_server: LocalServer, admin: Any) -> None:
        async def work() -> None:
            client = redis.asyncio.Redis.from_url(own_server.url, single_connection_client=True, client_name="single")
            async with client:
                manager = presence.ConnectionManager(client)
                await asyncio.gather(*(manager.register_connection(f"sid-{n}", f"user-{n}") for n in range(20)))
                assert await manager.get_connection_count() == 20
                assert [one["name"] for one in admin.client_list()].count("single") == 1

        run(work())


class TestAnErrorOfOne:
    """It reaches the call that it belongs to, and no other."""

    def test_whose_key_another_program_wrote(self, own_server: LocalServer, admin: Any) -> None:
        async def work() -> None:
            async with warm_manager(own_server.url, 2) as manager:
                admin.set("{presence}:game_conns:foreign", "what another program wrote")
                await manager.join_game("sid-0", "game")
                seen, failed, left, count = await asyncio.gather(
                    manager.update_heartbeat("sid-0"),
                    manager.get_game_user_sids("foreign"),
                    manager.leave_game("sid-0"),
                    manager.get_connection_count(),
                    return_exceptions=True,
                )
                assert isinstance(failed, presence.UnexpectedReplyError)
                assert (seen, left, count) == (True, "game", 2)

        run(work())

    def test_that_a_full_memory_refuses(self, own_server: LocalServer, admin: Any) -> None:
        async def work() -> None:
            async with warm_manager(own_server.url, 2) as manager:
                admin.config_set("maxmemory", 1)
                seen, joined, registered, online = await asyncio.gather(
                    manager.update_heartbeat("sid-0"),
                    manager.join_game("sid-0", "game"),
                    manager.register_connection("new", "user"),
                    manager.is_user_online("user-1"),
                    return_exceptions=True,
                )
                assert isinstance(joined, presence.OutOfMemoryError)
                assert isinstance(registered, presence.OutOfMemoryError)
                assert joined is not registered
                assert (seen, online) == (True, True)

        run(work())

    def test_that_a_replica_refuses(self, own_server: LocalServer, admin: Any) -> None:
        async def work() -> None:
            async with warm_manager(own_server.url, 2, **one_attempt("asyncio")) as manager:
                admin.replicaof("127.0.0.1", str(free_port()))
                answers = await asyncio.gather(
                    manager.get_connection_count(),
                    manager.register_connection("new", "user"),
                    manager.is_user_online("user-1"),
                    manager.leave_game("sid-0"),
                    manager.get_connection_count(),
                    return_exceptions=True,
                )
                assert [answers[0], answers[2], answers[4]] == [2, True, 2]
                assert isinstance(answers[1], presence.ReadOnlyServerError)
                assert isinstance(answers[3], presence.ReadOnlyServerError)

        run(work())

    def test_that_a_replica_refuses_until_it_is_promoted(self, own_server: LocalServer, admin: Any) -> None:
        """presence's own clients try again, and nobody notices."""

        async def work() -> None:
            async with warm_manager(own_server.url, 20) as manager:
                admin.replicaof("127.0.0.1", str(free_port()))
                registers = [
                    asyncio.create_task(manager.register_connection(f"next-{n}", f"user-{n}")) for n in range(20)
                ]
                counts = [asyncio.create_task(manager.get_connection_count()) for _ in range(5)]
                assert await asyncio.gather(*counts) == [20] * 5
                assert not any(register.done() for register in registers)
                admin.replicaof("NO", "ONE")
                registrations = await asyncio.gather(*registers)
                displaced = [[gone.sid for gone in one.displaced] for one in registrations]
                assert displaced == [[f"sid-{n}"] for n in range(20)]

        run(work())

    def test_that_a_replica_refuses_is_tried_again_under_load_too(
        self, own_server: LocalServer, admin: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What others ask for meanwhile waits until the connection is another."""
        monkeypatch.setattr(pipelining, "SESSION_SECONDS", 10 * BOUND_SECONDS)

        async def work() -> None:
            async with warm_manager(own_server.url, 1) as manager:
                is_over = False

                async def read() -> None:
                    while not is_over:
                        assert await manager.get_connection_count() == 1

                admin.replicaof("127.0.0.1", str(free_port()))
                load = [asyncio.create_task(read()) for _ in range(8)]
                register = asyncio.create_task(manager.register_connection("next", "user-0"))
                await asyncio.sleep(0.05)
                admin.replicaof("NO", "ONE")
                await asyncio.wait([register], timeout=BOUND_SECONDS)
                is_over = True
                assert register.done()
                await asyncio.gather(*load)

        run(work())

    def test_that_the_client_s_policy_names_is_tried_again(self, own_server: LocalServer, admin: Any) -> None:
        async def work() -> None:
            options = {"retry": Retry(ConstantBackoff(0.02), 500), "retry_on_error": [redis.OutOfMemoryError]}
            async with warm_manager(own_server.url, 1, **options) as manager:
                admin.config_set("maxmemory", 1)
                admin.config_resetstat()
                register = asyncio.create_task(manager.register_connection("new", "user"))
                seen, count = await asyncio.gather(manager.update_heartbeat("sid-0"), manager.get_connection_count())
                await until(lambda: admin.info("errorstats").get("errorstat_OOM", {"count": 0})["count"] >= 2)
                assert not register.done()
                admin.config_set("maxmemory", 0)
                assert await register
                assert (seen, count) == (True, 1)

        run(work())

    def test_that_stays_refused_is_not_that_of_those_there_was_no_room_for(
        self, own_server: LocalServer, admin: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pipelining, "MAX_COMMANDS", 10)

        async def work() -> None:
            options = {"retry": Retry(NoBackoff(), 1), "retry_on_error": [redis.exceptions.ResponseError]}
            async with warm_manager(own_server.url, 1, **options) as manager:
                await manager.get_game_connection_count("game")  # Its script is there now.
                admin.set("{presence}:game_conns:foreign", "what another program wrote")
                refused = manager.get_game_connection_count("foreign")
                calls = [manager.update_heartbeat("sid-0") for _ in range(50)]
                error, *answers = await asyncio.gather(refused, *calls, return_exceptions=True)
                assert isinstance(error, presence.UnexpectedReplyError)
                assert answers == [True] * 50

        run(work())

    def test_whose_script_the_server_lost(self, own_server: LocalServer, admin: Any) -> None:
        """All others run once, and so does this one when its script is there again."""

        async def work() -> None:
            async with warm_manager(own_server.url, 20) as manager:
                admin.script_flush()
                await manager.update_heartbeat("sid-0")
                admin.config_resetstat()
                answers: Any = await asyncio.gather(
                    manager.update_heartbeat("sid-0"),
                    *(manager.register_connection(f"next-{n}", f"user-{n}") for n in range(20)),
                )
                seen, *registrations = answers
                assert seen
                displaced = [[gone.sid for gone in one.displaced] for one in registrations]
                assert displaced == [[f"sid-{n}"] for n in range(20)]
                assert scripts_run(admin) == 21

        run(work())

    def test_that_is_a_bad_argument(self, own_server: LocalServer) -> None:
        async def work() -> None:
            async with warm_manager(own_server.url, 1) as manager:
                answers: Any = await asyncio.gather(
                    manager.update_heartbeat("sid-0"), manager.update_heartbeat(""), return_exceptions=True
                )
                assert answers[0] is True
                assert isinstance(answers[1], ValueError)

        run(work())


class TestALostScript:
    """It is loaded once for all calls that miss it at the same time."""

    @pytest.mark.parametrize("replies_per_turn", [7, 30, 1_000])
    def test_is_loaded_before_what_still_waits(
        self, own_server: LocalServer, admin: Any, monkeypatch: pytest.MonkeyPatch, replies_per_turn: int
    ) -> None:
        """Which would miss it as well: after a failover all players of a game server come back at once."""
        monkeypatch.setattr(pipelining, "REPLIES_PER_TURN", replies_per_turn)
        calls = 8 * pipelining.MAX_COMMANDS

        async def work() -> None:
            async with warm_manager(own_server.url, 1) as manager:
                admin.script_flush()
                with counted(admin) as counts:
                    assert await asyncio.gather(*(manager.get_connection_count() for _ in range(calls)))
                assert counts["script|load"] == 1
                assert counts["evalsha that failed"] < 2 * pipelining.MAX_COMMANDS
                assert scripts_run(admin) == calls

        run(work())

    def test_is_loaded_for_the_others_if_the_first_is_cancelled(self, own_server: LocalServer, admin: Any) -> None:
        async def work() -> None:
            with Proxy(own_server.port) as proxy:
                async with warm_manager(proxy.url, 1) as manager:
                    admin.script_flush()
                    proxy.command, proxy.fates = b"LOAD", [Fate.HOLD_REPLY]
                    with counted(admin) as counts:
                        first, *others = [asyncio.create_task(manager.get_connection_count()) for _ in range(3)]
                        await is_held(proxy)
                        first.cancel()
                        await asyncio.wait([first])
                        proxy.release()
                        assert await asyncio.gather(*others) == [1, 1]
                    assert first.cancelled()
                    assert counts["script|load"] == 1

        run(work())

    def test_that_is_lost_again_is_loaded_by_each_together_with_its_call(
        self, own_server: LocalServer, admin: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However often it is lost between a load and the calls that wait for it."""

        async def work() -> None:
            async with warm_manager(own_server.url, 1) as manager:
                shared = manager._open_client().shared
                assert shared is not None
                send = shared.send

                def load_and_flush(commands: Any) -> Any:
                    answer = send(commands)
                    if all(command[0] == SCRIPT_LOAD for command in commands):
                        send([("SCRIPT", b"FLUSH")])
                    return answer

                monkeypatch.setattr(shared, "send", load_and_flush)
                admin.script_flush()
                with counted(admin) as counts:
                    assert await asyncio.gather(*(manager.get_connection_count() for _ in range(5))) == [1] * 5
                assert counts["script|load"] == 1 + 5

        run(work())

    def test_is_not_called_any_more_if_the_call_has_waited_too_long_for_a_connection(
        self, own_server: LocalServer, admin: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(retrying, "RETRYING_SECONDS", 0.3)
        monkeypatch.setattr(pipelining, "SESSION_SECONDS", 0)

        async def use_the_connection(pool: redis.asyncio.ConnectionPool) -> None:
            connection = await pool.get_connection()
            await asyncio.sleep(0.4)
            await pool.release(connection)

        async def work(proxy: Proxy) -> None:
            pool = redis.asyncio.BlockingConnectionPool.from_url(proxy.url, max_connections=1, timeout=5)
            manager = presence.ConnectionManager(redis.asyncio.Redis.from_pool(pool))
            await manager.register_connection("another", "another user")
            admin.script_flush()
            proxy.command, proxy.fates = b"LOAD", [Fate.HOLD_REPLY]
            with counted(admin) as counts:
                registering = asyncio.create_task(manager.register_connection("sid", "user"))
                await is_held(proxy)
                # It gets the connection as soon as the script is loaded.
                using = asyncio.create_task(use_the_connection(pool))
                await asyncio.sleep(0)
                proxy.release()
                with pytest.raises(presence.ServerUnreachableError, match="may be forgotten"):
                    await registering
                await using
            assert counts == {"evalsha": 1, "evalsha that failed": 1, "script|load": 1}
            await manager.aclose()
            await pool.aclose()

        with Proxy(own_server.port) as proxy:
            run(work(proxy))

    def test_is_not_called_any_more_if_loading_it_took_too_long_while_others_were_answered(
        self, own_server: LocalServer, admin: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(retrying, "RETRYING_SECONDS", 0.2)

        async def work() -> None:
            async with warm_manager(own_server.url, 1) as manager:

                async def keep_the_connection_busy() -> None:
                    while True:
                        await manager.get_connection_count()

                admin.script_flush()
                await manager.get_connection_count()
                busy = asyncio.create_task(keep_the_connection_busy())
                monkeypatch.setattr("presence.exchanges.load_command", load_late)
                with pytest.raises(presence.ServerUnreachableError, match="may be forgotten"):
                    await manager.register_connection("sid", "user")
                busy.cancel()
                await asyncio.wait([busy])
                monkeypatch.undo()
                assert await manager.get_connection("sid") is None

        run(work())

    def test_whose_load_all_leave_at_the_end_of_the_loop_ends_with_it(
        self, own_server: LocalServer, admin: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def work(proxy: Proxy) -> None:
            manager = presence.ConnectionManager.from_url(proxy.url)
            await manager.get_connection_count()
            admin.script_flush()
            proxy.command, proxy.fates = b"LOAD", [Fate.HOLD_REPLY]
            calls = [asyncio.create_task(manager.get_connection_count()) for _ in range(3)]
            await is_held(proxy)
            assert not any(call.done() for call in calls)

        with Proxy(own_server.port) as proxy:
            run(work(proxy))
            gc.collect()
            assert (caplog.messages, proxy.accepted) == ([], 1)

    def test_that_nobody_waits_for_any_more_does_not_keep_a_manager_open(
        self, own_server: LocalServer, admin: Any
    ) -> None:
        async def work() -> None:
            with Proxy(own_server.port) as proxy:
                async with warm_manager(proxy.url, 1) as manager:
                    admin.script_flush()
                    proxy.command, proxy.fates = b"LOAD", [Fate.HOLD_REPLY]
                    call = asyncio.create_task(manager.get_connection_count())
                    await is_held(proxy)
                    call.cancel()
                    await asyncio.wait([call])
                await asyncio.sleep(0.1)
                assert proxy.accepted == 1, "it is not sent again"

        run(work())


def test_what_has_failed_does_not_count_as_on_the_wire(own_server: LocalServer) -> None:
    """Otherwise, in a long outage, each call would wait for the failure of the one before."""

    async def work(proxy: Proxy) -> None:
        async with presence.ConnectionManager.from_url(proxy.url, **one_attempt("asyncio")) as manager:
            for count in (2 * pipelining.MAX_COMMANDS, 50):
                accepted = proxy.accepted
                calls = [manager.update_heartbeat("sid") for _ in range(count)]
                for failed in await asyncio.gather(*calls, return_exceptions=True):
                    assert isinstance(failed, presence.ServerUnreachableError)
            assert proxy.accepted <= accepted + 5
            shared = manager._open_client().shared
            assert shared is not None
            assert not shared._sent, "what has failed is kept no longer"

    with Proxy(free_port()) as proxy:
        run(work(proxy))


def test_a_connection_that_was_silent_is_checked_first_where_the_client_is_to(
    own_server: LocalServer, admin: Any
) -> None:
    async def work() -> None:
        async with warm_manager(own_server.url, 1, health_check_interval=0.1) as manager:
            admin.config_resetstat()
            await asyncio.sleep(0.2)
            assert await manager.update_heartbeat("sid-0")
            assert admin.info("commandstats")["cmdstat_ping"]["calls"] == 1

    run(work())


def test_no_attempts_are_made_for_calls_that_were_given_up(
    own_server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their time is over, though the policy would go on, and other calls would wait for that."""
    monkeypatch.setattr(retrying, "RETRYING_SECONDS", 0.3)

    async def work(proxy: Proxy) -> None:
        retry = Retry(ConstantBackoff(0.05), 1000)
        async with presence.ConnectionManager.from_url(proxy.url, retry=retry) as manager:
            await manager.update_heartbeat("sid")
            proxy.fates, proxy.server_port = [Fate.LOSE_REPLY], free_port()
            with pytest.raises(presence.ServerUnreachableError):
                await manager.update_heartbeat("sid")
            accepted = proxy.accepted
            await asyncio.sleep(0.5)
            assert proxy.accepted <= accepted + 1
            proxy.server_port = own_server.port
            assert not await manager.update_heartbeat("sid")

    with Proxy(own_server.port) as proxy:
        run(work(proxy))


TASK_FACTORIES: list[Any] = [None]
if sys.version_info >= (3, 12):
    TASK_FACTORIES.append(asyncio.eager_task_factory)


@pytest.mark.parametrize("factory", TASK_FACTORIES)
def test_a_pool_that_was_exhausted_once_harms_no_later_call(own_server: LocalServer, factory: Any) -> None:
    async def work() -> None:
        asyncio.get_running_loop().set_task_factory(factory)
        pool = redis.asyncio.ConnectionPool.from_url(own_server.url, max_connections=1)
        async with redis.asyncio.Redis.from_pool(pool) as client:
            manager = presence.ConnectionManager(client)
            taken = await pool.get_connection()
            with pytest.raises(presence.ServerUnreachableError, match="every connection of the client's pool"):
                await manager.update_heartbeat("unknown")
            await pool.release(taken)
            beats = (manager.update_heartbeat("unknown") for _ in range(100))
            assert await asyncio.gather(*beats) == [False] * 100
            await manager.aclose()

    run(work())


class TestTheBound:
    """However many calls are made at once, so many commands are on the wire; the others wait and do not fail."""

    def test_holds_for_ten_thousand_calls(self, own_server: LocalServer, admin: Any) -> None:
        async def work() -> None:
            with Proxy(own_server.port) as proxy:
                async with warm_manager(proxy.url, 1) as manager:
                    admin.config_resetstat()
                    proxy.fates = [Fate.HOLD_REPLY] * 8  # What is written at once may arrive in pieces.
                    calls: list[asyncio.Task[Any]] = [
                        asyncio.create_task(manager.get_connection_count() if n % 2 else manager.leave_game("unknown"))
                        for n in range(10_000)
                    ]
                    await is_held(proxy)
                    await until(lambda: scripts_run(admin) >= pipelining.MAX_COMMANDS)
                    for _ in range(20):
                        await asyncio.sleep(0)
                        assert scripts_run(admin) == pipelining.MAX_COMMANDS
                    proxy.release()
                    assert await asyncio.gather(*calls) == [None, 1] * 5_000
                    assert proxy.accepted == 1

        run(work())

    def test_holds_in_bytes_too(self, own_server: LocalServer, admin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pipelining, "MAX_BYTES", 2_000)

        async def work() -> None:
            with Proxy(own_server.port) as proxy:
                async with warm_manager(proxy.url, 0) as manager:
                    admin.config_resetstat()
                    proxy.fates = [Fate.HOLD_REPLY] * 8
                    calls = [asyncio.create_task(manager.update_heartbeat(f"{n:0100}", epoch=1)) for n in range(50)]
                    await is_held(proxy)
                    calls += [
                        asyncio.create_task(manager.update_heartbeat(f"{n:0100}", epoch=1)) for n in range(50, 100)
                    ]
                    for _ in range(20):
                        await asyncio.sleep(0)
                        assert 0 < scripts_run(admin) < 10
                    proxy.release()
                    assert await asyncio.gather(*calls) == [False] * 100

        run(work())


class CountingConnection(redis.asyncio.Connection):
    """As an instrumented one: it sees what it sends."""

    sent: ClassVar[list[bytes]] = []

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        self.sent.append(command if isinstance(command, bytes) else b"".join(command))
        await super().send_packed_command(command, check_health)


def test_a_connection_of_another_class_is_given_all_that_is_sent(own_server: LocalServer) -> None:
    async def work() -> None:
        pool = redis.asyncio.BlockingConnectionPool.from_url(own_server.url, connection_class=CountingConnection)
        client = redis.asyncio.Redis.from_pool(pool)
        async with client, presence.ConnectionManager(client) as manager:
            await manager.register_connection("sid", "user")
            CountingConnection.sent.clear()
            await asyncio.gather(*(ask_again(manager) for _ in range(100)))

    async def ask_again(manager: presence.ConnectionManager) -> None:
        for _ in range(3):
            assert await manager.get_connection_count()

    run(work())
    # One more where the script was not there yet.
    assert b"".join(CountingConnection.sent).count(b"EVALSHA") >= 300


def test_nor_is_one_written_past_while_replies_are_awaited(own_server: LocalServer, admin: Any) -> None:
    async def work() -> None:
        with Proxy(own_server.port) as proxy:
            async with warm_manager(proxy.url, 1, connection_class=CountingConnection) as manager:
                proxy.fates = [Fate.HOLD_REPLY]
                first = asyncio.create_task(manager.update_heartbeat("sid-0"))
                await is_held(proxy)
                CountingConnection.sent.clear()
                second = asyncio.create_task(manager.update_heartbeat("sid-0"))
                await asyncio.sleep(0.02)
                proxy.release()
                assert all(await asyncio.gather(first, second))

    run(work())
    assert b"".join(CountingConnection.sent).count(b"EVALSHA") == 1


def test_nor_is_it_checked_while_replies_are_to_come(own_server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next of them would be taken for the reply to the check."""
    monkeypatch.setattr(pipelining, "REPLIES_PER_TURN", 1)

    async def work() -> None:
        options: dict[str, Any] = {"connection_class": CountingConnection, "health_check_interval": 0.05}
        async with warm_manager(own_server.url, 2, **options, **one_attempt("asyncio")) as manager:

            async def ask_twice() -> None:
                assert await manager.update_heartbeat("sid-0")
                time.sleep(0.1)  # noqa: ASYNC251  (so a check is due in the very next turn)
                assert await manager.update_heartbeat("sid-0")

            await asyncio.gather(ask_twice(), manager.get_connection_count())

    run(work())


class Credentials(redis.CredentialProvider):
    """A service that may be away, which is no fault of the server or the network."""

    error: Exception | None = None

    def get_credentials(self) -> tuple[str, str]:
        if self.error is not None:
            raise self.error
        return "default", "any password"


@pytest.mark.parametrize("error", [LookupError(), RuntimeError(), TypeError()], ids=repr)
def test_credentials_that_cannot_be_fetched_harm_no_connection_in_use(
    own_server: LocalServer, error: Exception
) -> None:
    async def work() -> None:
        provider = Credentials()
        pool = redis.asyncio.ConnectionPool.from_url(own_server.url, credential_provider=provider)
        async with redis.asyncio.Redis.from_pool(pool) as client, presence.ConnectionManager(client) as manager:
            in_use = await pool.get_connection()
            provider.error = error
            with pytest.raises(type(error)):
                await manager.update_heartbeat("unknown")
            await in_use.send_command("PING")
            assert await in_use.read_response() == b"PONG"
            await pool.release(in_use)

    run(work())


class RefusedConnection(redis.asyncio.Connection):
    """Sends streamed credentials to a server that does not accept them."""

    is_renewing: ClassVar[asyncio.Event]

    async def re_auth(self) -> None:
        self.is_renewing.set()
        await asyncio.sleep(0.01)
        raise redis.AuthenticationError("WRONGPASS")


def test_credentials_that_cannot_be_renewed_between_calls_harm_none(own_server: LocalServer) -> None:
    """redis-py renews them when the connection is given back."""

    async def work() -> None:
        pool = redis.asyncio.ConnectionPool.from_url(own_server.url, connection_class=RefusedConnection)
        async with redis.asyncio.Redis.from_pool(pool) as client, presence.ConnectionManager(client) as manager:
            RefusedConnection.is_renewing = asyncio.Event()
            for _ in range(3):
                assert await manager.update_heartbeat("unknown") is False
                await asyncio.wait_for(RefusedConnection.is_renewing.wait(), BOUND_SECONDS)
                assert await manager.update_heartbeat("unknown") is False
                RefusedConnection.is_renewing.clear()

    run(work())


class SlowPool(redis.asyncio.ConnectionPool):
    """Takes a while to have a connection back, as where it closes it first."""

    async def release(self, connection: Any) -> None:
        await asyncio.sleep(0.01)
        await super().release(connection)


def test_a_close_has_given_the_connection_back_when_it_ends(own_server: LocalServer) -> None:
    async def work() -> None:
        pool = SlowPool.from_url(own_server.url, max_connections=1)
        async with redis.asyncio.Redis.from_pool(pool) as client:
            manager = presence.ConnectionManager(client)
            assert not await manager.update_heartbeat("unknown")
            await manager.aclose()
            assert await client.echo("the answer") == b"the answer"

    run(work())


def test_each_reply_has_the_whole_timeout_however_many_come_together(
    own_server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        options = {"connection_class": SlowConnection, "socket_timeout": 0.8, "retry": Retry(NoBackoff(), 0)}
        pool = redis.asyncio.ConnectionPool.from_url(own_server.url, **options)
        async with redis.asyncio.Redis.from_pool(pool) as client, presence.ConnectionManager(client) as manager:
            assert await manager.update_heartbeat("unknown") is False
            monkeypatch.setattr(SlowConnection, "seconds", 0.06)
            beats = (manager.update_heartbeat("unknown") for _ in range(20))
            assert await asyncio.gather(*beats) == [False] * 20

    assert pipelining.REPLIES_PER_TURN > 20
    run(work())


def test_nor_is_one_written_past_by_calls_that_come_one_by_one(own_server: LocalServer) -> None:
    async def work() -> None:
        async with warm_manager(own_server.url, 1, connection_class=CountingConnection) as manager:
            await asyncio.sleep(0.05)
            CountingConnection.sent.clear()
            for _ in range(3):
                assert await manager.update_heartbeat("sid-0")
                await asyncio.sleep(0.05)  # Now nothing is under way, so the next begins everything anew.

    run(work())
    assert b"".join(CountingConnection.sent).count(b"EVALSHA") == 3


class TestABrokenConnection:
    """Each of the calls that were in flight is answered as if it had been alone."""

    @pytest.mark.parametrize("unlucky", [1, 3, 6])
    def test_as_soon_as_it_is_there_is_not_noticed(self, own_server: LocalServer, admin: Any, unlucky: int) -> None:
        class UnluckyConnection(redis.asyncio.Connection):
            """Some are closed right after the server has greeted them."""

            closed_next: ClassVar[int] = 0

            async def on_connect_check_health(self, check_health: bool = True) -> None:
                await super().on_connect_check_health(check_health)
                if UnluckyConnection.closed_next:
                    UnluckyConnection.closed_next -= 1
                    writer: Any = self._writer
                    writer.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
                    await asyncio.sleep(0.01)

        async def work() -> None:
            # With RESP3, redis-py's own pool does not look whether a connection is still there.
            options: dict[str, Any] = {"protocol": 2, "retry": Retry(NoBackoff(), 6)}
            pool = redis.asyncio.ConnectionPool.from_url(
                own_server.url, connection_class=UnluckyConnection, client_name="unlucky", **options
            )
            async with redis.asyncio.Redis.from_pool(pool) as client:
                manager = presence.ConnectionManager(client)
                await manager.register_connection("sid", "user")
                for each in admin.client_list():
                    if each["name"] == "unlucky":
                        admin.client_kill_filter(each["id"])
                await asyncio.sleep(0.05)
                UnluckyConnection.closed_next = unlucky
                assert await manager.update_heartbeat("sid")
                assert UnluckyConnection.closed_next == 0

        run(work())

    @pytest.mark.parametrize("size", [1, 20], ids=["calls", "pipelines"])
    @pytest.mark.parametrize("cut", [0, 1, 50, 500, 1_500, 2_600])
    def test_within_the_replies_is_not_noticed(self, own_server: LocalServer, admin: Any, cut: int, size: int) -> None:
        players = range(40)

        async def work(proxy: CuttingProxy) -> None:
            retry = Retry(NoBackoff(), 6)
            async with warm_manager(proxy.url, len(players), retry=retry, namespace="cut") as manager:
                await manager.unregister_connection("unknown")  # The server has the script now.
                proxy.cuts = [cut]
                unregisters = [manager.operations.unregister_connection(f"sid-{n}") for n in players]
                answers = await asyncio.gather(
                    *(manager.pipeline(unregisters[start : start + size]) for start in players[::size])
                )
                assert proxy.cuts == []
                assert len(proxy.replies[-2]) > cut
                removed = [one for answer in answers for one in answer]
                assert [one and one.user_id for one in removed] == [f"user-{n}" for n in players]

        with CuttingProxy(own_server.port) as proxy:
            run(work(proxy))
        keyspace = read_keyspace(admin, "cut")
        assert violations(keyspace) == []
        assert keyspace.records == {}

    def test_that_stays_broken_is_named_to_each(self, own_server: LocalServer) -> None:
        async def work() -> None:
            with Proxy(own_server.port) as proxy:
                async with warm_manager(proxy.url, 10, **one_attempt("asyncio")) as manager:
                    proxy.fates = [Fate.LOSE_REPLY]
                    calls = (manager.update_heartbeat(f"sid-{n}") for n in range(10))
                    errors = await asyncio.gather(*calls, return_exceptions=True)
                    assert {type(error) for error in errors} == {presence.ServerUnreachableError}
                    assert len({id(error) for error in errors}) == 10
                    assert await manager.update_heartbeat("sid-0")

        run(work())

    def test_that_is_mended_makes_no_later_call_one_that_is_sent_again(
        self, own_server: LocalServer, admin: Any
    ) -> None:
        """Such a call keeps its answer even if it has found nothing to do, which costs the server a write."""

        async def work() -> None:
            with Proxy(own_server.port) as proxy:
                async with warm_manager(proxy.url, 1) as manager:
                    proxy.fates = [Fate.LOSE_REPLY]
                    assert await manager.update_heartbeat("sid-0")
                    assert proxy.fates == []
                    kept = admin.keys("*reply:*")
                    assert await manager.leave_game("sid-0") is None
                    assert admin.keys("*reply:*") == kept

        run(work())

    def test_by_its_owner_is_not_noticed_by_what_is_asked_for_in_the_same_turn(self, own_server: LocalServer) -> None:
        async def work() -> None:
            unhandled: list[object] = []
            asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
            with Proxy(own_server.port) as proxy:
                client: Any = redis.asyncio.Redis.from_url(proxy.url, retry=Retry(NoBackoff(), 3))
                async with client:
                    manager = presence.ConnectionManager(client)
                    await manager.register_connection("sid", "user")
                    await manager.update_heartbeat("sid")
                    proxy.fates = [Fate.HOLD_REPLY]
                    first = asyncio.create_task(manager.update_heartbeat("sid"))
                    await is_held(proxy)
                    second = asyncio.create_task(manager.update_heartbeat("sid"))
                    await asyncio.sleep(0)
                    (connection,) = client.connection_pool._in_use_connections
                    await connection.disconnect(nowait=True)
                    assert all(await asyncio.gather(first, second))
                    proxy.release()
            assert unhandled == []

        run(work())

    @pytest.mark.parametrize("is_busy", [False, True], ids=["", "while others wait for their replies"])
    def test_that_refuses_a_write_is_not_noticed(
        self, own_server: LocalServer, monkeypatch: pytest.MonkeyPatch, is_busy: bool
    ) -> None:
        """As uvloop's do, from when they are closed until the reader is told."""

        def refuse(writer: asyncio.StreamWriter, _: bytes) -> None:
            monkeypatch.undo()
            writer.transport.abort()
            raise RuntimeError("unable to perform operation; the handler is closed")

        async def work() -> None:
            unhandled: list[object] = []
            asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
            with Proxy(own_server.port) as proxy:
                async with warm_manager(proxy.url, 1) as manager:
                    calls = []
                    if is_busy:
                        proxy.fates = [Fate.HOLD_REPLY]
                        calls = [asyncio.create_task(manager.update_heartbeat("sid-0"))]
                        await is_held(proxy)
                    monkeypatch.setattr(asyncio.StreamWriter, "write", refuse)
                    calls.append(asyncio.create_task(manager.update_heartbeat("sid-0")))
                    assert all(await asyncio.gather(*calls))
                    proxy.release()
            assert unhandled == []

        run(work())

    @pytest.mark.parametrize("is_under_way", [False, True], ids=["between calls", "under a call"])
    def test_by_the_timeout_of_the_socket_itself_is_not_noticed(
        self, own_server: LocalServer, is_under_way: bool
    ) -> None:
        """Its error, ETIMEDOUT, is a TimeoutError to Python, and redis-py makes None of that instead of a reply."""

        async def work() -> None:
            with Proxy(own_server.port) as proxy:
                async with (
                    redis.asyncio.Redis.from_url(proxy.url, retry=Retry(NoBackoff(), 1)) as client,
                    presence.ConnectionManager(client) as manager,
                ):
                    await manager.register_connection("sid", "user")
                    connection: Any = await client.connection_pool.get_connection()
                    await client.connection_pool.release(connection)
                    proxy.fates = [Fate.HOLD_REPLY] if is_under_way else []
                    call = asyncio.create_task(manager.update_heartbeat("sid"))
                    if is_under_way:
                        await is_held(proxy)
                    # What it does where the kernel has sent keepalives, or data, for too long in vain.
                    connection._writer.transport._fatal_error(TimeoutError(errno.ETIMEDOUT, "Connection timed out"))
                    assert await call
                    assert await manager.update_heartbeat("sid")
                    proxy.release()

        run(work())

    @every_refusal
    def test_that_refuses_the_greeting_is_named(
        self, own_server: LocalServer, monkeypatch: pytest.MonkeyPatch, refusal: Exception
    ) -> None:
        async def work() -> None:
            async with presence.ConnectionManager.from_url(own_server.url) as manager:
                refuse_next_write(monkeypatch, refusal)
                with pytest.raises(presence.ServerUnreachableError):
                    await manager.get_connection_count()
                assert await manager.get_connection_count() == 0

        run(work())

    @every_refusal
    def test_that_refuses_the_health_check_is_not_noticed(
        self, own_server: LocalServer, monkeypatch: pytest.MonkeyPatch, refusal: Exception
    ) -> None:
        async def work() -> None:
            async with presence.ConnectionManager.from_url(own_server.url, health_check_interval=0.01) as manager:
                await manager.register_connection("sid", "user")
                await asyncio.sleep(0.05)
                refuse_next_write(monkeypatch, refusal)
                assert await manager.update_heartbeat("sid")

        run(work())

    @pytest.mark.parametrize("mode", ["pubsub", "stream"])
    @every_refusal
    def test_that_refuses_what_a_subscription_writes_is_named(
        self, own_server: LocalServer, monkeypatch: pytest.MonkeyPatch, mode: str, refusal: Exception
    ) -> None:
        async def work() -> None:
            options = {"events": mode, **one_attempt("asyncio")}
            async with presence.ConnectionManager.from_url(own_server.url, **options) as manager:
                await manager.register_connection("sid", "user")
                if mode == "pubsub":
                    refuse_next_write(monkeypatch, refusal)
                    with pytest.raises(presence.ServerUnreachableError):
                        await anext(await manager.subscribe().__aenter__())
                    return
                async with manager.subscribe() as events:
                    refuse_next_write(monkeypatch, refusal)
                    with pytest.raises(presence.ServerUnreachableError):
                        await anext(events)

        run(work())

    @every_refusal
    def test_that_refuses_the_question_of_a_subscription_ends_it(
        self, own_server: LocalServer, monkeypatch: pytest.MonkeyPatch, refusal: Exception
    ) -> None:
        monkeypatch.setattr("presence.subscriptions.ASKING_SECONDS", 0.02)

        async def work() -> None:
            manager = presence.ConnectionManager.from_url(own_server.url, events="pubsub")
            async with manager, manager.subscribe() as events:
                refuse_next_write(monkeypatch, refusal)
                with pytest.raises(presence.EventsLostError, match="the connection broke"):
                    await anext(events)

        run(work())

    def test_leaves_what_comes_meanwhile_all_its_attempts(self, own_server: LocalServer) -> None:
        async def work() -> None:
            with Proxy(own_server.port) as proxy:
                options = {"retry": Retry(NoBackoff(), 1), "socket_timeout": 0.3}
                async with warm_manager(proxy.url, 2, **options) as manager:
                    # Both attempts of the first are lost, and the first attempt of the second.
                    proxy.fates = [Fate.LOSE_REPLY, Fate.HOLD_REPLY, Fate.LOSE_REPLY]
                    first = asyncio.create_task(manager.update_heartbeat("sid-0"))
                    await is_held(proxy)
                    second = asyncio.create_task(manager.update_heartbeat("sid-1"))
                    with pytest.raises(presence.ServerUnreachableError):
                        await first
                    assert await second
                    assert proxy.fates == []
                    proxy.release()

        run(work())

    def test_that_stays_broken_ends_what_there_was_no_room_for_as_well(
        self, own_server: LocalServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each that has to wait for a place on the wire would have its attempts after all those of the others."""
        monkeypatch.setattr(pipelining, "MAX_COMMANDS", 10)

        async def work() -> None:
            with Proxy(own_server.port) as proxy:
                options = {"socket_timeout": 0.2, **one_attempt("asyncio")}
                async with warm_manager(proxy.url, 1, **options) as manager:
                    proxy.fates = [Fate.LOSE_REPLY] * 100
                    calls = [asyncio.create_task(manager.update_heartbeat("sid-0")) for _ in range(100)]
                    with pytest.raises(presence.ServerUnreachableError):
                        await calls[0]
                    later = asyncio.create_task(manager.update_heartbeat("sid-0"))
                    proxy.fates = []
                    errors = await asyncio.gather(*calls, return_exceptions=True)
                    assert {type(error) for error in errors} == {presence.ServerUnreachableError}
                    assert await later

        run(work())

    def test_ends_what_there_was_no_room_for_behind_the_load_of_a_script_too(
        self, own_server: LocalServer, admin: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pipelining, "MAX_COMMANDS", 2)
        monkeypatch.setattr(pipelining, "SESSION_SECONDS", 0)  # So that the load waits for another connection.

        async def work() -> None:
            with CuttingProxy(own_server.port) as proxy:
                async with warm_manager(proxy.url, 1, **one_attempt("asyncio")) as manager:
                    admin.script_flush()
                    proxy.cuts = [60]  # Within the second reply.
                    calls = [asyncio.create_task(manager.get_connection_count()) for _ in range(10)]
                    count, *errors = await asyncio.gather(*calls, return_exceptions=True)
                    assert count == 1
                    assert {type(error) for error in errors} == {presence.ServerUnreachableError}

        run(work())

    def test_by_a_server_that_does_not_answer_ends_all_in_time(self, own_server: LocalServer) -> None:
        async def work() -> None:
            with Proxy(own_server.port) as proxy:
                options = {"socket_timeout": 0.05, **one_attempt("asyncio")}
                async with warm_manager(proxy.url, 5, **options) as manager:
                    proxy.fates = [Fate.HOLD_REPLY]
                    calls = (manager.update_heartbeat(f"sid-{n}") for n in range(5))
                    errors = await asyncio.gather(*calls, return_exceptions=True)
                    for error in errors:
                        assert isinstance(error, presence.ServerUnreachableError)
                        assert "did not answer in time" in str(error)
                    proxy.release()

        run(work())


def test_several_event_loops_on_one_manager_do_not_mix(own_server: LocalServer, admin: Any) -> None:
    manager = presence.ConnectionManager.from_url(own_server.url, client_name="shared")
    together = threading.Barrier(4)
    displaced: list[str] = []

    def work(loop: int) -> int:
        async def use() -> int:
            async with manager:
                await manager.update_heartbeat("unknown")
                together.wait(BOUND_SECONDS)
                registrations = await asyncio.gather(
                    *(manager.register_connection(f"sid-{loop}-{n}", f"user-{n % 10}") for n in range(100))
                )
                assert [one.connection.sid for one in registrations] == [f"sid-{loop}-{n}" for n in range(100)]
                displaced.extend(gone.sid for one in registrations for gone in one.displaced)
                together.wait(BOUND_SECONDS)
                connections = [client["name"] for client in admin.client_list()].count("shared")
                together.wait(BOUND_SECONDS)
                return connections

        return asyncio.run(use())

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(4))) == [4] * 4
    left = set(read_keyspace(admin, "presence").records)
    assert (len(left), len(displaced)) == (10, 390)
    assert left.isdisjoint(displaced)
    assert len(set(displaced)) == 390


def test_a_call_in_the_turn_in_which_the_runner_ends_has_one_runner_too(own_server: LocalServer, admin: Any) -> None:
    """It finds the runner done, and begins anew before that one's callback runs."""

    async def work() -> None:
        async with warm_manager(own_server.url, 1) as manager:
            shared = manager._open_client().shared
            assert shared is not None
            await asyncio.sleep(0.05)  # The calls before are over, and so is their runner.
            admin.config_resetstat()

            async def call_when_it_ends() -> None:
                while shared._runner is None or not shared._runner.done():  # noqa: ASYNC110  (it must see each turn)
                    await asyncio.sleep(0)
                admin.client_pause(300, all=False)  # Scripts only: a connection may be opened.
                assert await manager.update_heartbeat("sid-0")

            second = asyncio.create_task(call_when_it_ends())
            await asyncio.sleep(0)
            assert await manager.update_heartbeat("sid-0")
            await asyncio.sleep(0.05)
            assert await manager.update_heartbeat("sid-0")
            await second
            assert scripts_run(admin) == 3

    run(work())
