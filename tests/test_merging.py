"""Heartbeats that one event loop awaits at the same time become one call of a script; each is answered as if alone."""

from __future__ import annotations

import asyncio
import gc
from contextlib import suppress
from math import ceil, inf
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import redis
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff, NoBackoff

import presence
from presence import merging, pipelining
from presence.operations import HEARTBEAT, HEARTBEAT_BATCH_SIZE, HEARTBEATS, MAX_CONNECTIONS_PER_USER, Operations
from tests.fault_calls import one_attempt
from tests.fault_proxy import CuttingProxy, Fate, Proxy
from tests.one_loop import run, until, warm_manager
from tests.server import LocalServer, free_port
from tests.watching import counted, evalsha_calls, is_held, scripts_run

if TYPE_CHECKING:
    from collections.abc import Coroutine

QUARTER_OF_AN_HOUR_MS = 15 * 60 * 1000
LAST_SEEN = "{presence}:last_seen"
MOST = merging.MOST_MERGED


def beats(manager: presence.ConnectionManager, players: int) -> list[Coroutine[Any, Any, bool]]:
    return [manager.update_heartbeat(f"sid-{number}") for number in range(players)]


def last_seen(admin: Any) -> dict[str, float]:
    """When each was seen; the last epoch, which has an entry there too, is left out."""
    return {sid: score for sid, score in admin.zrange(LAST_SEEN, 0, -1, withscores=True) if sid}


def overwrite_a_record(admin: Any, sid: str) -> None:
    """As another program would; the next heartbeat reads it, to refresh the TTLs."""
    admin.delete("{presence}:conn:" + sid)
    admin.lpush("{presence}:conn:" + sid, "what another program wrote")
    admin.zincrby(LAST_SEEN, -QUARTER_OF_AN_HOUR_MS, sid)


def test_heartbeats_awaited_at_once_are_one_script(own_server: LocalServer, admin: Any) -> None:
    async def work() -> None:
        async with warm_manager(own_server.url, MOST) as manager:
            before = last_seen(admin)
            await asyncio.sleep(0.01)
            admin.config_resetstat()
            assert await asyncio.gather(*beats(manager, MOST)) == [True] * MOST
            assert scripts_run(admin) == 1
            after = last_seen(admin)
            assert len(after) == MOST
            assert all(after[sid] > before[sid] for sid in before)

    run(work())


def test_no_script_takes_more_than_the_least_that_a_batch_may_have(own_server: LocalServer, admin: Any) -> None:
    """However many connections the manager's users may have: lists of a hundred make a script of a hundred too long."""
    with pytest.raises(ValueError, match="1 to 30 ids"):
        Operations(connections_per_user=MAX_CONNECTIONS_PER_USER).heartbeat_batch([str(n) for n in range(MOST + 1)])
    assert MOST < HEARTBEAT_BATCH_SIZE

    async def work() -> None:
        async with warm_manager(own_server.url, 1) as manager:
            admin.config_resetstat()
            calls = [manager.update_heartbeat("sid-0" if n % 2 else "unknown") for n in range(2 * MOST + 1)]
            assert await asyncio.gather(*calls) == [bool(n % 2) for n in range(2 * MOST + 1)]
            assert scripts_run(admin) == 3

    run(work())


def test_one_alone_is_the_script_for_one(own_server: LocalServer, admin: Any) -> None:
    async def work() -> None:
        async with presence.ConnectionManager.from_url(own_server.url) as manager:
            await manager.register_connection("sid", "user")
            assert await manager.update_heartbeat("sid")
            assert admin.script_exists(HEARTBEAT.sha, HEARTBEATS.sha) == [True, False]

    run(work())


def test_each_is_answered_as_if_it_were_alone(own_server: LocalServer, admin: Any) -> None:
    async def work() -> None:
        async with warm_manager(own_server.url, 6) as manager:
            await manager.register_connection("new", "user-1")
            await manager.unregister_connection("sid-2", grace_seconds=60)
            await manager.unregister_connection("sid-3")
            admin.zincrby(LAST_SEEN, -3_600_001, "sid-4")
            admin.delete("{presence}:conn:sid-5")
            admin.zincrby(LAST_SEEN, -QUARTER_OF_AN_HOUR_MS, "sid-5")
            before = last_seen(admin)
            admin.config_resetstat()
            sids = ["sid-0", "sid-1", "sid-2", "new", "sid-3", "sid-4", "sid-5", "no one's", "sid-0"]
            answers = await asyncio.gather(*map(manager.update_heartbeat, sids))
            assert scripts_run(admin) == 1
            assert answers == [True, False, False, True, False, False, False, False, True]
            after = last_seen(admin)
            assert {sid for sid in after if after[sid] != before[sid]} <= {"sid-0", "new"}
            assert before.keys() - after.keys() == {"sid-5"}, "evicted, so that nothing but this entry was left"

    run(work())


def test_the_same_sid_is_answered_the_same(own_server: LocalServer, admin: Any) -> None:
    """Also where the first heartbeat finds that the record was evicted, and removes what was left."""

    async def work() -> None:
        async with warm_manager(own_server.url, 2) as manager:
            admin.delete("{presence}:conn:sid-0")
            admin.zincrby(LAST_SEEN, -QUARTER_OF_AN_HOUR_MS, "sid-0")
            calls = map(manager.update_heartbeat, ("sid-0", "sid-1", "sid-0", "sid-1"))
            assert await asyncio.gather(*calls) == [False, True, False, True]

    run(work())


@pytest.mark.parametrize("sid", ["conn:x", "a:b}c", " {presence}:last_seen", "\n\0", "ü" * 1024])
def test_any_id_is_found(own_server: LocalServer, admin: Any, sid: str) -> None:
    async def work() -> None:
        async with warm_manager(own_server.url, 1) as manager:
            await manager.register_connection(sid, "user")
            admin.config_resetstat()
            calls = map(manager.update_heartbeat, ("sid-0", sid, sid + "x" if len(sid) < 1024 else "x"))
            assert await asyncio.gather(*calls) == [True, True, False]
            assert scripts_run(admin) == 1

    run(work())


def test_calls_between_them_stay_in_their_order(own_server: LocalServer, admin: Any) -> None:
    async def work() -> None:
        async with warm_manager(own_server.url, 2) as manager:
            await manager.unregister_connection("unknown")  # The server has the script now.
            admin.config_resetstat()
            answers = await asyncio.gather(
                manager.update_heartbeat("sid-0"),
                manager.update_heartbeat("sid-1"),
                manager.unregister_connection("sid-0"),
                manager.update_heartbeat("sid-0"),
                manager.update_heartbeat("sid-1"),
                manager.update_heartbeat("sid-1", epoch=1),
                manager.update_heartbeat("sid-1"),
            )
            assert answers[2] is not None
            assert [*answers[:2], *answers[3:]] == [True, True, False, True, False, True]
            assert scripts_run(admin) == 5

    run(work())


def test_those_of_two_namespaces_do_not_mix(own_server: LocalServer, admin: Any) -> None:
    async def work() -> None:
        async with warm_manager(own_server.url, 1) as manager:
            other = Operations("other").update_heartbeat("sid-0")
            admin.config_resetstat()
            answers: Any = await asyncio.gather(
                manager.update_heartbeat("sid-0"), manager.pipeline([other]), manager.update_heartbeat("sid-0")
            )
            assert answers == [True, [False], True]
            assert scripts_run(admin) == 3

    run(work())


def test_nor_do_those_with_an_epoch(own_server: LocalServer, admin: Any) -> None:
    async def work() -> None:
        async with warm_manager(own_server.url, 2) as manager:
            admin.config_resetstat()
            calls = [manager.update_heartbeat(f"sid-{number}", epoch=1) for number in range(2)]
            assert await asyncio.gather(*calls) == [False, False]
            assert scripts_run(admin) == 2

    run(work())


def test_nor_do_other_calls_that_are_alike(own_server: LocalServer) -> None:
    async def work() -> None:
        async with warm_manager(own_server.url, 1) as manager:
            await manager.join_game("sid-0", "game")
            leave = manager.operations.leave_game("sid-0")
            assert await asyncio.gather(*(manager.pipeline([leave]) for _ in range(3))) == [["game"]] * 3

    run(work())


def test_nor_do_those_that_are_sent_together(own_server: LocalServer) -> None:
    """They have their replies in one answer."""

    async def work() -> None:
        async with warm_manager(own_server.url, 1) as manager:
            shared = manager._open_client().shared
            assert shared is not None
            both = [manager.operations.update_heartbeat(sid).command() for sid in ("sid-0", "unknown")]
            assert await asyncio.gather(*(shared.send(both) for _ in range(3))) == [[1, 0]] * 3

    run(work())


class BrokenConnection(redis.asyncio.Connection):
    """Meets an error that is no fault of the network, after some more replies."""

    replies_left: ClassVar[float] = inf

    async def read_response(self, *arguments: Any, **options: Any) -> Any:
        BrokenConnection.replies_left -= 1
        if BrokenConnection.replies_left < 0:
            raise ZeroDivisionError
        return await super().read_response(*arguments, **options)


@pytest.mark.parametrize("replies", [0, 1], ids=["", "while the script is loaded"])
def test_an_error_that_is_no_fault_reaches_all(
    own_server: LocalServer, admin: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, replies: int
) -> None:
    async def work() -> None:
        async with warm_manager(own_server.url, 3, connection_class=BrokenConnection) as manager:
            admin.script_flush()
            monkeypatch.setattr(BrokenConnection, "replies_left", replies)
            errors = await asyncio.gather(*beats(manager, 3), return_exceptions=True)
            monkeypatch.undo()
            assert [type(error) for error in errors] == [ZeroDivisionError] * 3
            assert await asyncio.gather(*beats(manager, 3)) == [True] * 3

    run(work())
    gc.collect()
    assert caplog.messages == []


class TestAnError:
    """It reaches the call that it belongs to: what fails together is sent once more, each alone."""

    @pytest.mark.parametrize("retry_on_error", [[], [redis.exceptions.ResponseError]], ids=["", "that is retried"])
    def test_of_one_is_not_that_of_the_others(
        self, own_server: LocalServer, admin: Any, retry_on_error: list[type[Exception]]
    ) -> None:
        async def work() -> None:
            options = {"retry": Retry(NoBackoff(), 1), "retry_on_error": retry_on_error}
            async with warm_manager(own_server.url, 10, **options) as manager:
                overwrite_a_record(admin, "sid-4")
                answers: list[Any] = await asyncio.gather(*beats(manager, 10), return_exceptions=True)
                assert isinstance(answers.pop(4), presence.UnexpectedReplyError)
                assert answers == [True] * 9

        run(work())

    @pytest.mark.parametrize("is_script_lost", [False, True], ids=["", "for want of the script"])
    def test_lets_them_go_again_before_what_waits(
        self, own_server: LocalServer, admin: Any, is_script_lost: bool
    ) -> None:
        async def work() -> None:
            async with warm_manager(own_server.url, 3) as manager:
                if is_script_lost:
                    admin.script_flush()
                    await manager.update_heartbeat("sid-0")
                    await manager.get_connection_count()
                else:
                    overwrite_a_record(admin, "sid-1")
                order: list[int] = []

                async def ask(number: int, call: Coroutine[Any, Any, Any]) -> None:
                    with suppress(presence.UnexpectedReplyError):
                        await call
                    order.append(number)

                calls = [*beats(manager, 3), *(manager.get_connection_count() for _ in range(300))]
                with counted(admin) as counts:
                    await asyncio.gather(*(ask(number, call) for number, call in enumerate(calls)))
                assert counts["evalsha that failed"] == (1 if is_script_lost else 2)
                assert [number for number in order if number < 3] == [0, 1, 2]
                assert order.index(2) < 300

        run(work())

    def test_of_a_script_that_may_not_be_loaded_is_not_noticed(self, own_server: LocalServer, admin: Any) -> None:
        """They go on alone, as long as the script for one is there."""

        async def work() -> None:
            async with warm_manager(own_server.url, 3) as manager:
                admin.script_flush()
                await manager.update_heartbeat("sid-0")
                admin.acl_setuser("default", commands=["-script|load"])
                assert await asyncio.gather(*beats(manager, 3)) == [True] * 3

        run(work())

    def test_of_a_lost_script_is_not_noticed(self, own_server: LocalServer, admin: Any) -> None:
        """It is loaded together with the call."""

        async def work() -> None:
            async with warm_manager(own_server.url, 10) as manager:
                for _ in range(2):
                    admin.script_flush()
                    with counted(admin) as counts:
                        assert await asyncio.gather(*beats(manager, 10)) == [True] * 10
                    assert counts == {"evalsha": 2, "evalsha that failed": 1, "script|load": 1}
                    admin.config_resetstat()
                    assert await asyncio.gather(*beats(manager, 10)) == [True] * 10
                    assert evalsha_calls(admin) == 1

        run(work())

    def test_of_a_lost_script_is_not_noticed_by_thousands(self, own_server: LocalServer, admin: Any) -> None:
        calls = 8 * pipelining.MAX_COMMANDS

        async def work() -> None:
            async with warm_manager(own_server.url, 1) as manager:
                admin.script_flush()
                with counted(admin) as counts:
                    assert all(await asyncio.gather(*(manager.update_heartbeat("sid-0") for _ in range(calls))))
                on_the_wire = ceil(pipelining.MAX_COMMANDS / MOST)
                assert counts["script|load"] == counts["evalsha that failed"] == on_the_wire

        run(work())

    def test_of_a_replica_is_retried(self, own_server: LocalServer, admin: Any) -> None:
        async def work() -> None:
            options = {"retry": Retry(ConstantBackoff(0.02), 500)}
            async with warm_manager(own_server.url, 10, **options) as manager:
                admin.replicaof("127.0.0.1", str(free_port()))
                calls = [asyncio.create_task(call) for call in beats(manager, 10)]
                await until(lambda: admin.info("errorstats").get("errorstat_READONLY", {"count": 0})["count"] >= 30)
                assert not any(call.done() for call in calls)
                admin.replicaof("NO", "ONE")
                assert await asyncio.gather(*calls) == [True] * 10

        run(work())

    def test_of_a_replica_that_stays_one_is_named_to_each(self, own_server: LocalServer, admin: Any) -> None:
        async def work() -> None:
            async with warm_manager(own_server.url, 10, **one_attempt("asyncio")) as manager:
                admin.replicaof("127.0.0.1", str(free_port()))
                errors = await asyncio.gather(*beats(manager, 10), return_exceptions=True)
                assert {type(error) for error in errors} == {presence.ReadOnlyServerError}
                assert len({id(error) for error in errors}) == 10

        run(work())

    def test_of_a_connection_is_named_to_each(self, own_server: LocalServer) -> None:
        async def work() -> None:
            with Proxy(own_server.port) as proxy:
                async with warm_manager(proxy.url, 10, **one_attempt("asyncio")) as manager:
                    proxy.fates = [Fate.LOSE_REPLY]
                    errors = await asyncio.gather(*beats(manager, 10), return_exceptions=True)
                    assert {type(error) for error in errors} == {presence.ServerUnreachableError}
                    assert len({id(error) for error in errors}) == 10
                    assert await asyncio.gather(*beats(manager, 10)) == [True] * 10

        run(work())

    @pytest.mark.parametrize("cut", [0, 1, 4, 10])
    def test_of_a_connection_is_not_noticed_where_it_is_tried_again(self, own_server: LocalServer, cut: int) -> None:
        async def work(proxy: CuttingProxy) -> None:
            async with warm_manager(proxy.url, 40, retry=Retry(NoBackoff(), 3)) as manager:
                await manager.unregister_connection("sid-3")
                proxy.cuts = [cut, cut]
                assert await asyncio.gather(*beats(manager, 40)) == [n != 3 for n in range(40)]
                assert proxy.cuts == []

        with CuttingProxy(own_server.port) as proxy:
            run(work(proxy))


async def cancel_once_sent(manager: presence.ConnectionManager, proxy: Proxy) -> None:
    proxy.fates = [Fate.HOLD_REPLY]
    calls = [asyncio.create_task(call) for call in beats(manager, 3)]
    await is_held(proxy)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)


class TestACancelledOne:
    """It is not sent, or nobody gets its reply; the others notice nothing."""

    @pytest.mark.parametrize(("players", "number"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
    def test_before_it_is_sent(self, own_server: LocalServer, admin: Any, players: int, number: int) -> None:
        async def work() -> None:
            async with warm_manager(own_server.url, players) as manager:
                before = last_seen(admin)
                await asyncio.sleep(0.01)
                calls = [asyncio.create_task(call) for call in beats(manager, players)]
                await asyncio.sleep(0)
                calls[number].cancel()
                answers = await asyncio.gather(*calls, return_exceptions=True)
                assert calls[number].cancelled()
                assert answers[:number] + answers[number + 1 :] == [True] * (players - 1)
                after = last_seen(admin)
                assert [sid for sid in before if after[sid] == before[sid]] == [f"sid-{number}"]

        run(work())

    def test_while_there_is_no_room_for_it(
        self, own_server: LocalServer, admin: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pipelining, "MAX_COMMANDS", 1)

        async def work() -> None:
            with Proxy(own_server.port) as proxy:
                async with warm_manager(proxy.url, 3) as manager:
                    admin.config_resetstat()
                    proxy.fates = [Fate.HOLD_REPLY]
                    first = asyncio.create_task(manager.update_heartbeat("sid-0"))
                    await is_held(proxy)
                    second = asyncio.create_task(manager.update_heartbeat("sid-1"))
                    await asyncio.sleep(0)
                    second.cancel()
                    third = asyncio.create_task(manager.update_heartbeat("sid-2"))
                    await asyncio.sleep(0.01)
                    proxy.release()
                    assert all(await asyncio.gather(first, third))
                    assert scripts_run(admin) == 2

        run(work())

    @pytest.mark.parametrize("is_lost", [False, True], ids=["", "whose reply is lost"])
    def test_after_it_is_sent(self, own_server: LocalServer, is_lost: bool) -> None:
        async def work() -> None:
            with Proxy(own_server.port) as proxy:
                async with warm_manager(proxy.url, 3, socket_timeout=0.3) as manager:
                    proxy.fates = [Fate.HOLD_REPLY]
                    calls = [asyncio.create_task(call) for call in beats(manager, 3)]
                    await is_held(proxy)
                    calls[1].cancel()
                    if not is_lost:
                        proxy.release()
                    answers = await asyncio.gather(*calls, return_exceptions=True)
                    assert [answers[0], answers[2]] == [True, True]
                    assert calls[1].cancelled()
                    proxy.release()

        run(work())

    def test_as_all_the_others_keeps_no_manager_open(
        self, own_server: LocalServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def work() -> None:
            with Proxy(own_server.port) as proxy:
                async with warm_manager(proxy.url, 3) as manager:
                    await cancel_once_sent(manager, proxy)
                await asyncio.sleep(0.1)
                assert proxy.accepted == 1, "they are not sent again"

        run(work())
        gc.collect()
        assert caplog.messages == []

    def test_as_all_the_others_is_not_sent_again(self, own_server: LocalServer, admin: Any) -> None:
        async def work() -> None:
            with Proxy(own_server.port) as proxy:
                async with warm_manager(proxy.url, 3, socket_timeout=0.2) as manager:
                    admin.config_resetstat()
                    await cancel_once_sent(manager, proxy)
                    assert await manager.get_connection_count() == 3, "on another connection"
                    assert (proxy.accepted, scripts_run(admin)) == (2, 3), "the count was sent twice"

        run(work())

    @pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "not closed"])
    def test_while_the_script_is_loaded_leaves_nothing_behind(
        self, own_server: LocalServer, admin: Any, caplog: pytest.LogCaptureFixture, is_closed: bool
    ) -> None:
        managers = []

        async def work(proxy: Proxy) -> None:
            manager = presence.ConnectionManager.from_url(proxy.url)
            managers.append(manager)
            await manager.update_heartbeat("sid-0")
            proxy.command, proxy.fates = b"LOAD", [Fate.HOLD_REPLY]
            calls = [asyncio.create_task(call) for call in beats(manager, 3)]
            await is_held(proxy)
            if is_closed:
                for call in calls:
                    call.cancel()
                await asyncio.wait(calls)
                await manager.aclose()

        with Proxy(own_server.port) as proxy:
            run(work(proxy))  # Its end cancels all tasks.
            managers.clear()
            gc.collect()
            assert (caplog.messages, proxy.accepted) == ([], 1)


def test_each_counts_as_a_command_on_the_wire(
    own_server: LocalServer, admin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelining, "MAX_COMMANDS", MOST + 10)

    async def work() -> None:
        with Proxy(own_server.port) as proxy:
            async with warm_manager(proxy.url, 3 * MOST) as manager:
                before = last_seen(admin)
                await asyncio.sleep(0.01)
                proxy.fates = [Fate.HOLD_REPLY]
                calls = [asyncio.create_task(call) for call in beats(manager, 3 * MOST)]
                await is_held(proxy)
                after = last_seen(admin)
                assert sum(after[sid] != before[sid] for sid in before) == MOST + 10
                proxy.release()
                assert await asyncio.gather(*calls) == [True] * 3 * MOST

    run(work())


@pytest.mark.parametrize(
    "reply", [b"OK", 1, None, [0, 0], [3, 0], [b"1", 0], redis.ResponseError("WRONGTYPE")], ids=repr
)
def test_a_reply_of_another_kind_is_no_answer(reply: Any) -> None:
    """A broken proxy sends such; each heartbeat, alone, then gets its own."""
    heartbeats = [Operations().update_heartbeat(sid).command() for sid in ("sid-0", "sid-1")]
    assert merging.Merge(heartbeats).replies(reply) is None


def test_the_server_works_on_some_while_the_callers_of_the_others_ask_again(own_server: LocalServer) -> None:
    """Otherwise it would wait for them, and they for it: the throughput of 64 tasks hangs on it."""

    async def work() -> None:
        async with warm_manager(own_server.url, 1) as manager:
            answered: list[int] = []
            turns = 0

            async def beat(number: int) -> None:
                assert await manager.update_heartbeat("sid-0")
                answered.append(turns)

            calls = [asyncio.create_task(beat(number)) for number in range(2 * MOST)]
            while len(answered) < 2 * MOST:
                await asyncio.sleep(0)
                turns += 1
            await asyncio.gather(*calls)
            assert answered.count(answered[0]) == answered.count(answered[-1]) == MOST

    run(work())
