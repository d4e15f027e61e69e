"""Subscriptions: nothing is told twice, and what is lost is told."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import redis
from redis.backoff import NoBackoff

import presence
import presence.sync
from presence import EventsLostError, EventType
from presence.arguments import MAX_METADATA_BYTES
from presence.operations import EVENTS_BATCH_SIZE, Operations
from presence.replies import Position
from presence.subscriptions import Feed
from tests.conftest import Awaited
from tests.fault_calls import one_attempt
from tests.fault_proxy import Fate, Proxy
from tests.processes import spawn
from tests.server import free_port
from tests.subscribed import BOUND_SECONDS, END, MODES, Subscribed, subscribed, told, until_the_end
from tests.watching import admin, is_held, raising_after, traced, wait_until

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event as Flag
    from types import FrameType

    from presence import Event
    from presence.operations import EventsMode
    from tests.conftest import ManagerFactory
    from tests.server import LocalServer


def events_key(namespace: str) -> str:
    return f"{{{namespace}}}:events"


class TestTheStream:
    """It goes on after a position: nothing twice, nothing missed, and what is lost is told."""

    def act(self, manager: Any, times: int = 1) -> None:
        """Make changes of which some publish several events."""
        for _ in range(times):
            for turn in range(3):
                manager.register_connection(f"a{turn}", "alice")
                manager.join_game(f"a{turn}", "g")
                manager.join_game(f"a{turn}", "h")
            manager.unregister_connection("a2")

    def test_goes_on_after_the_position_of_any_event(self, make_manager: ManagerFactory) -> None:
        manager = make_manager(events="stream")
        start = manager.get_game_snapshot("g").position
        self.act(manager)
        with subscribed(manager, after=start) as events:
            everything = events.take(17)
        positions = [event.position for event in everything]
        assert len(set(positions)) == len(positions)
        assert any("+" in position for position in positions if position), "no position within a change"
        for index, position in enumerate(positions[:-1], 1):
            with subscribed(manager, after=position) as events:
                assert events.take(len(everything) - index) == everything[index:]
        with subscribed(manager, after=positions[-1]) as events:
            assert until_the_end(manager, events) == []

    def test_waits_on_where_the_server_is_a_replica_for_a_moment(
        self, make_manager: ManagerFactory, own_server: LocalServer, own_client: redis.Redis
    ) -> None:
        """A primary that becomes one ends all waits with an error."""
        manager = make_manager(own_server.url, events="stream")

        def fail_over() -> None:
            own_client.replicaof("127.0.0.1", "1")
            own_client.replicaof("NO", "ONE")
            with presence.sync.ConnectionManager.from_url(
                own_server.url, namespace=manager.operations.namespace, events="stream"
            ) as other:
                other.register_connection("sid", "user")

        manager.register_connection("there", "other")
        with subscribed(manager) as events:
            timer = threading.Timer(0.3, fail_over)
            timer.start()
            assert [event.connection.sid for event in events.take(2)] == ["sid", "sid"]
            timer.join()

    def test_tells_how_far_it_has_come(self, make_manager: ManagerFactory) -> None:
        manager = make_manager(events="stream")
        assert manager.subscribe().position is None
        start = manager.get_game_snapshot("g").position
        assert manager.subscribe(after=start).position == start
        self.act(manager)
        with subscribed(manager, after=start) as events:
            assert events.position == start
            for _ in range(17):
                assert events.next().position == events.position
            end = events.position
        with subscribed(manager) as events:
            assert events.position == end

    def test_has_come_past_what_others_did(
        self, make_manager: ManagerFactory, client: redis.Redis, namespace: str
    ) -> None:
        """Or it would have lost what was none of its own, once that is trimmed."""
        manager = make_manager(events="stream")
        manager.register_connection("sid", "user")
        with subscribed(manager, game_id="quiet") as events:
            manager.join_game("sid", "quiet")
            assert told(events.next()) == ("joined", "sid", "quiet")
            self.act(manager)
            events.read_on(0.5)
            client.xtrim(events_key(namespace), maxlen=1, approximate=False)
            manager.leave_game("sid")
            with subscribed(manager, game_id="quiet", after=events.position) as again:
                assert told(again.next()) == ("left", "sid", "quiet")

    def test_has_come_past_what_others_did_right_after_its_own(self, make_manager: ManagerFactory) -> None:
        """What it read together, and has given the last of its own of."""
        manager = make_manager(events="stream")
        manager.register_connection("sid", "user")
        start = manager.get_game_snapshot("quiet").position
        manager.join_game("sid", "quiet")
        self.act(manager)
        with subscribed(manager, game_id="quiet", after=start) as events:
            assert told(events.next()) == ("joined", "sid", "quiet")
            assert events.position == manager.get_game_snapshot("quiet").position

    def test_has_not_come_past_what_it_was_interrupted_before_it_gave(
        self, client: redis.Redis, namespace: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manager = presence.sync.ConnectionManager(client, namespace=namespace, events="stream")
        start = manager.get_game_snapshot("g").position
        manager.register_connection("sid", "user")
        with manager.subscribe(after=start) as events:

            def raise_once(_: object) -> Event:
                monkeypatch.undo()
                raise KeyboardInterrupt

            monkeypatch.setattr(Feed, "give", raise_once)
            with pytest.raises(KeyboardInterrupt):
                next(events)
            assert events.position == start
            assert next(events).connection.sid == "sid"

    def test_tells_no_position_through_pubsub(self, make_manager: ManagerFactory) -> None:
        with subscribed(make_manager(events="pubsub")) as events:
            assert events.position is None

    def test_is_read_in_batches(self, make_manager: ManagerFactory) -> None:
        manager = make_manager(events="stream")
        start = manager.get_game_snapshot("g").position
        sids = [f"sid-{number:03}" for number in range(250)]
        manager.pipeline([manager.operations.register_connection(sid, sid) for sid in sids])
        (batch,) = manager.pipeline([manager.operations.read_events(Position.parse(start))])
        assert [event.connection.sid for event in batch.events[::2]] == sids[:EVENTS_BATCH_SIZE]
        with subscribed(manager, after=start) as events:
            assert [event.connection.sid for event in events.take(500)[::2]] == sids
            assert until_the_end(manager, events) == []

    def test_a_filter_may_go_on_after_the_position_of_any_event(self, make_manager: ManagerFactory) -> None:
        manager = make_manager(events="stream")
        start = manager.get_game_snapshot("g").position
        self.act(manager)
        with subscribed(manager, after=start) as events:
            everything = events.take(17)
        for index, event in enumerate(everything[:-4], 1):
            expected = [later for later in everything[index:] if later.connection.game_id == "h"]
            with subscribed(manager, game_id="h", after=event.position) as of_game:
                assert of_game.take(len(expected)) == expected

    def test_begins_when_it_is_entered(self, make_manager: ManagerFactory) -> None:
        manager = make_manager(events="stream")
        self.act(manager)
        with subscribed(manager) as events:
            assert until_the_end(manager, events) == []

    def test_waits_for_what_comes_later(self, make_manager: ManagerFactory, client: redis.Redis) -> None:
        manager = make_manager(events="stream")
        with subscribed(manager) as events:
            writer = presence.sync.ConnectionManager(client, namespace=manager.operations.namespace, events="stream")
            later = threading.Timer(1.5, writer.register_connection, ("a", "alice"))  # Longer than one wait.
            later.start()
            assert told(events.next()) == ("registered", "a", None)
            later.join()

    def acted(self, make_manager: ManagerFactory) -> tuple[Any, str]:
        """Make changes; give the manager, and the position after them."""
        manager = make_manager(events="stream")
        self.act(manager)
        return manager, manager.get_game_snapshot("g").position

    def lost(self, manager: Any, position: str | None) -> None:
        with subscribed(manager, after=position) as events:
            events.tells_the_loss("read a snapshot and subscribe again")

    def test_that_was_trimmed_says_so(self, make_manager: ManagerFactory, client: redis.Redis, namespace: str) -> None:
        manager = make_manager(events="stream")
        start = manager.get_game_snapshot("g").position
        self.act(manager)
        with subscribed(manager, after=start) as events:
            everything = events.take(17)
        client.xtrim(events_key(namespace), maxlen=5, approximate=False)
        kept = [event for event in everything if event.position is not None]
        numbers = [Position.parse(event.position).number for event in kept]
        for index, (event, number) in enumerate(zip(kept, numbers, strict=True), 1):
            if number <= 5:
                self.lost(manager, event.position)
            else:
                with subscribed(manager, after=event.position) as events:
                    assert events.take(17 - index) == everything[index:]
        self.lost(manager, start)

    def test_that_was_trimmed_can_be_read_on_where_it_begins_now(
        self, make_manager: ManagerFactory, client: redis.Redis, namespace: str
    ) -> None:
        manager = make_manager(events="stream")
        start = manager.get_game_snapshot("g").position

        def loss(position: str | None) -> str | None:
            with subscribed(manager, after=position) as events, pytest.raises(EventsLostError) as raised:
                events.next()
            return raised.value.position

        self.act(manager)
        with subscribed(manager, after=start) as events:
            everything = events.take(17)
        client.xtrim(events_key(namespace), maxlen=5, approximate=False)
        left = loss(start)
        with subscribed(manager, after=left) as events:
            rest = events.take(len([1 for event in everything if Position.parse(event.position).number > 5]))
            assert rest == everything[-len(rest) :]
            assert until_the_end(manager, events) == []
        client.xtrim(events_key(namespace), maxlen=3, approximate=False)
        assert loss(left) not in (left, None), "it was trimmed once more"
        client.xtrim(events_key(namespace), maxlen=0, approximate=False)
        with subscribed(manager, after=loss(left)) as events:
            assert until_the_end(manager, events) == [], "nothing is left, and nothing more is lost"
        client.delete(events_key(namespace))
        self.act(manager, EVENTS_BATCH_SIZE)
        assert str(loss(left)).endswith("/1+0"), "it is another one"
        with subscribed(manager, after=loss(left)) as events:
            assert [told(event) for event in events.take(17)] == [told(event) for event in everything]

    def test_that_was_trimmed_says_so_from_its_beginning_on_however_much_is_left(
        self, make_manager: ManagerFactory, client: redis.Redis, namespace: str
    ) -> None:
        manager = make_manager(events="stream")
        start = manager.get_game_snapshot("g").position
        register = manager.operations.register_connection
        manager.pipeline([register("sid", "alice") for _ in range(EVENTS_BATCH_SIZE + 2)])
        client.xtrim(events_key(namespace), maxlen=EVENTS_BATCH_SIZE + 1, approximate=False)
        self.lost(manager, start)

    def test_that_is_trimmed_under_a_subscriber_says_so(
        self, make_manager: ManagerFactory, client: redis.Redis, namespace: str
    ) -> None:
        manager = make_manager(events="stream")
        with subscribed(manager) as events:
            self.act(manager)
            client.xtrim(events_key(namespace), maxlen=1, approximate=False)
            with pytest.raises(EventsLostError, match="trimmed"):
                events.next()

    @pytest.mark.parametrize("turns", [0, 1, 2])
    def test_that_is_another_one_now_says_so(
        self, make_manager: ManagerFactory, client: redis.Redis, namespace: str, turns: int
    ) -> None:
        manager, position = self.acted(make_manager)
        client.delete(events_key(namespace))
        self.act(manager, turns)
        self.lost(manager, position)

    def test_that_is_another_one_with_an_entry_of_the_same_moment_says_so(
        self, make_manager: ManagerFactory, client: redis.Redis, namespace: str
    ) -> None:
        manager, position = self.acted(make_manager)
        key, last_id = events_key(namespace), position.partition("/")[0]
        ((_, entry),) = client.execute_command("XRANGE", key, last_id, last_id, NEVER_DECODE=True)
        client.delete(key)
        client.execute_command("XADD", key, last_id, "message", entry[b"message"])
        self.act(manager, 2)
        self.lost(manager, position)

    def test_that_is_another_one_and_was_trimmed_as_far_says_so(
        self, make_manager: ManagerFactory, client: redis.Redis, namespace: str
    ) -> None:
        manager, position = self.acted(make_manager)
        gone = client.xlen(events_key(namespace))
        client.delete(events_key(namespace))
        self.act(manager, 2)
        assert client.xtrim(events_key(namespace), maxlen=gone, approximate=False) == gone
        self.lost(manager, position)

    @pytest.mark.parametrize("is_first", [False, True])
    def test_that_lost_the_change_of_which_a_part_was_seen_says_so(
        self, make_manager: ManagerFactory, client: redis.Redis, namespace: str, is_first: bool
    ) -> None:
        manager = make_manager(events="stream")
        if not is_first:
            self.act(manager)
        older: Any = client.dump(events_key(namespace))
        with subscribed(manager) as events:
            manager.register_connection("lost", "bob")  # Two events in one entry.
            position = events.next().position
        time.sleep(0.01)  # The id of an entry is its time in ms.
        client.delete(events_key(namespace))
        if older:
            client.restore(events_key(namespace), 86_400_000, older)
        manager.register_connection("next", "carol")
        self.lost(manager, position)

    def test_keeps_about_as_many_as_it_was_told(
        self, make_manager: ManagerFactory, client: redis.Redis, namespace: str
    ) -> None:
        manager = make_manager(events="stream", events_max_length=10)
        position = manager.get_game_snapshot("g").position
        register = manager.operations.register_connection
        manager.pipeline([register(f"sid-{number % 3}", "alice") for number in range(500)])
        assert 10 <= client.xlen(events_key(namespace)) < 250
        self.lost(manager, position)


@pytest.mark.parametrize("mode", MODES)
class TestAConnection:
    """Whose events are lost is told; who leaves, leaves nothing behind."""

    def test_that_is_killed_is_told(
        self, make_manager: ManagerFactory, own_server: LocalServer, mode: EventsMode
    ) -> None:
        manager = make_manager(own_server.url, events=mode)
        with redis.Redis.from_url(own_server.url) as client, subscribed(manager) as events:
            manager.register_connection("a", "alice")
            events.take(2)
            client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            manager.register_connection("b", "alice")
            if mode == "stream":
                assert [told(event)[0] for event in events.take(2)] == ["displaced", "registered"]
                return
            lengths = set()
            for _ in range(3):
                with pytest.raises(EventsLostError, match="the connection broke") as raised:
                    events.next()
                assert isinstance(raised.value.__cause__, redis.ConnectionError)
                lengths.add(len(traceback.extract_tb(raised.value.__traceback__)))
            # It is raised again from the beginning, and does not keep the frames of each time.
            assert len(lengths) == 1

    def test_is_closed_at_the_end(
        self, make_manager: ManagerFactory, own_server: LocalServer, mode: EventsMode
    ) -> None:
        manager = make_manager(own_server.url, events=mode)
        with redis.Redis.from_url(own_server.url) as client:
            with subscribed(manager) as events:
                manager.register_connection("a", "alice")
                events.take(2)
                if mode == "pubsub":
                    assert len(client.execute_command("PUBSUB", "SHARDCHANNELS")) == 1
            manager.close()
            # The server learns of it a moment later.
            wait_until(lambda: [found["cmd"] for found in client.client_list()] == ["client|list"])

    def test_is_refused_with_the_reason(
        self, make_manager: ManagerFactory, hasty: dict[str, Any], mode: EventsMode
    ) -> None:
        manager = make_manager("redis://127.0.0.1:1", events=mode, **hasty)
        with pytest.raises(presence.ServerUnreachableError, match="check that it runs"), subscribed(manager):
            pass

    def test_may_decode_and_speak_either_protocol(self, server_url: str, namespace: str, mode: EventsMode) -> None:
        for protocol in (2, 3):
            for decode_responses in (False, True):
                with redis.Redis.from_url(server_url, protocol=protocol, decode_responses=decode_responses) as client:
                    manager = presence.sync.ConnectionManager(client, namespace=namespace, events=mode)
                    with manager.subscribe() as events:
                        for number in range(3):  # All are there before one is read.
                            manager.register_connection("a", "alice", metadata=b"\xff%d" % number)
                        registered = (event for event in events if event.type is EventType.REGISTERED)
                        for number in range(3):
                            assert next(registered).connection.metadata == b"\xff%d" % number

                async def run(protocol: int = protocol, decode_responses: bool = decode_responses) -> None:
                    client = redis.asyncio.Redis.from_url(
                        server_url, protocol=protocol, decode_responses=decode_responses
                    )
                    manager = presence.ConnectionManager(client, namespace=namespace, events=mode)
                    async with client, manager, manager.subscribe() as events:
                        for number in range(3):
                            await manager.register_connection("a", "alice", metadata=b"\xfe%d" % number)
                        registered = (event async for event in events if event.type is EventType.REGISTERED)
                        for number in range(3):
                            assert (await anext(registered)).connection.metadata == b"\xfe%d" % number

                asyncio.run(run())

    def test_may_have_any_encoding(self, server_url: str, namespace: str, mode: EventsMode) -> None:
        with redis.Redis.from_url(server_url, encoding="utf-16") as client:
            manager = presence.sync.ConnectionManager(client, namespace=namespace, events=mode)
            with manager.subscribe() as events:
                later = threading.Timer(0.2, manager.register_connection, ("ä", "alice"))
                later.start()
                assert next(events).connection.sid == "ä"
                later.join()

        async def run() -> None:
            client = redis.asyncio.Redis.from_url(server_url, encoding="utf-16")
            manager = presence.ConnectionManager(client, namespace=namespace, events=mode)
            async with client, manager, manager.subscribe() as events:
                waiting = asyncio.create_task(anext(events))
                await asyncio.sleep(0.2)
                await manager.register_connection("ö", "bob")
                assert (await waiting).connection.sid == "ö"

        asyncio.run(run())

    def test_a_wait_that_is_cancelled_loses_nothing(self, server_url: str, namespace: str, mode: EventsMode) -> None:
        async def run() -> None:
            async with (
                presence.ConnectionManager.from_url(server_url, namespace=namespace, events=mode) as manager,
                manager.subscribe() as events,
            ):
                found = []
                for number in range(50):
                    waiting = asyncio.ensure_future(anext(events))
                    for _ in range(number % 7):
                        await asyncio.sleep(0)
                    await manager.register_connection(f"sid-{number}", f"user-{number}")
                    waiting.cancel()
                    found += [waiting.result()] if (await asyncio.wait([waiting])) and not waiting.cancelled() else []
                found += [await anext(events) for _ in range(100 - len(found))]
                assert [event.connection.sid for event in found[::2]] == [f"sid-{number}" for number in range(50)]

        asyncio.run(run())

    def test_a_wait_that_is_cancelled_before_anything_comes_loses_nothing(
        self, server_url: str, namespace: str, mode: EventsMode
    ) -> None:
        async def run() -> None:
            async with (
                presence.ConnectionManager.from_url(server_url, namespace=namespace, events=mode) as manager,
                manager.subscribe() as events,
            ):
                for number in range(3):
                    with pytest.raises(TimeoutError):
                        await asyncio.wait_for(anext(events), 0.05)
                    await manager.register_connection(f"sid-{number}", f"user-{number}")
                    assert [(await anext(events)).connection.sid for _ in range(2)] == [f"sid-{number}"] * 2

        asyncio.run(run())

    def test_heeds_a_cancellation_at_any_moment_of_its_beginning(
        self, server_url: str, namespace: str, mode: EventsMode
    ) -> None:
        async def run() -> None:
            async with presence.ConnectionManager.from_url(server_url, namespace=namespace, events=mode) as manager:

                async def follow() -> None:
                    async with manager.subscribe() as events:
                        async for _ in events:
                            pass

                await manager.get_connection_count()
                for attempt in range(200):
                    following = asyncio.create_task(follow())
                    await asyncio.sleep(attempt / 50_000)  # Up to 4 ms.
                    following.cancel()
                    done, _ = await asyncio.wait([following], timeout=BOUND_SECONDS)
                    assert done, attempt

        asyncio.run(run())

    def test_that_is_closed_elsewhere_ends_the_loop(self, make_manager: ManagerFactory, mode: EventsMode) -> None:
        manager = make_manager(events=mode)
        if isinstance(manager, Awaited):

            async def run() -> None:
                async with manager._manager.subscribe() as events:

                    async def read() -> list[Event]:
                        return [event async for event in events]

                    reading = asyncio.ensure_future(read())
                    await asyncio.sleep(0.05)
                    await events.aclose()
                    async with asyncio.timeout(BOUND_SECONDS):
                        assert await reading == []

            manager._runner.run(run())
            return
        with manager.subscribe() as events:
            closing = threading.Timer(0.05, events.close)
            closing.start()
            assert list(events) == []
            closing.join()

    def test_that_was_not_entered_is_refused(self, make_manager: ManagerFactory, mode: EventsMode) -> None:
        """Or it would be over at once, as if nothing had happened."""
        manager = make_manager(events=mode)
        if isinstance(manager, Awaited):

            async def run() -> list[Event]:
                return [event async for event in manager._manager.subscribe()]

            with pytest.raises(RuntimeError, match=r"enter it first, async with manager\.subscribe"):
                manager._runner.run(run())
            return
        with pytest.raises(RuntimeError, match=r"enter it first, with manager\.subscribe"):
            list(manager.subscribe())


def test_more_subscribers_to_the_stream_than_connections_hold_up_no_call(
    server_url: str, namespace: str, client: redis.Redis
) -> None:
    games = [f"game-{number}" for number in range(20)]

    async def run() -> None:
        url = f"{server_url}?client_name=of-{namespace}"
        # A wait takes a second, so a call for which all waits left no connection would fail.
        options: dict[str, Any] = {"max_connections": 2, "timeout": 0.5}
        async with presence.ConnectionManager.from_url(url, namespace=namespace, events="stream", **options) as manager:
            entered = asyncio.Semaphore(0)

            async def watch(game_id: str) -> list[str]:
                async with manager.subscribe(game_id=game_id) as events:
                    entered.release()
                    return [(await anext(events)).connection.sid for _ in range(2)]

            watching = [asyncio.create_task(watch(game_id)) for game_id in games]
            for _ in games:
                await entered.acquire()
            for _ in range(10):
                await asyncio.sleep(0.02)  # Now all wait, and this call wakes none of them.
                assert await manager.get_connection_count() == 0
            for sid in ("first", "second"):
                await manager.register_connection(sid, sid)
                for game_id in games:
                    await manager.join_game(sid, game_id)
                await manager.leave_game(sid)
            names = [one["name"] for one in client.client_list()]
            assert names.count(f"of-{namespace}") <= 2
            assert await asyncio.gather(*watching) == [["first", "first"]] * len(games)

    asyncio.run(asyncio.wait_for(run(), 3 * BOUND_SECONDS))


def test_a_reader_on_a_slow_line_gets_on_and_holds_up_no_call(own_server: LocalServer) -> None:
    """The timeout is for the whole of a reply: a hundred changes with much metadata would not arrive in time."""
    bytes_per_second, socket_timeout, players = 1_000_000, 0.5, 120

    async def pass_slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while chunk := await reader.read(4096):
                await asyncio.sleep(len(chunk) / bytes_per_second)
                writer.write(chunk)
                await writer.drain()
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", own_server.port)
        await asyncio.gather(pass_slowly(reader, to_server), pass_slowly(from_server, writer))

    async def follow(manager: presence.ConnectionManager) -> list[str]:
        async with manager.subscribe(after="0-0/0") as events:
            return [(await anext(events)).connection.sid for _ in range(2 * players)][::2]

    async def work() -> None:
        sids = [f"sid-{number}" for number in range(players)]
        async with presence.ConnectionManager.from_url(own_server.url, events="stream") as manager:
            for sid in sids:
                await manager.register_connection(sid, f"user of {sid}", metadata=b"x" * MAX_METADATA_BYTES)
        line = await asyncio.start_server(connect, "127.0.0.1", 0)
        url = f"redis://127.0.0.1:{line.sockets[0].getsockname()[1]}/0"
        options: dict[str, Any] = {"events": "stream", "socket_timeout": socket_timeout, **one_attempt("asyncio")}
        async with presence.ConnectionManager.from_url(url, **options) as manager:
            following = asyncio.create_task(follow(manager))
            while not following.done():
                assert await manager.update_heartbeat("sid-1")
            assert await following == sids
        line.close()
        await line.wait_closed()

    asyncio.run(asyncio.wait_for(work(), BOUND_SECONDS))


def test_what_has_grown_too_large_to_be_read_in_time_is_read_in_smaller_parts() -> None:
    feed = Feed(Operations("ns", events="stream"), None, None, "0-0/0")

    def limit(reply: Any) -> Any:
        """Give how many changes a read asks for, and let it be answered."""
        exchange = feed.read()
        (command,) = next(exchange)
        with suppress(StopIteration, presence.ServerUnreachableError):
            exchange.send([reply])
        return command[6]

    def changes(count: int, size: int) -> list[Any]:
        message = b"1 registered 3  1 sid0:1 user of "
        return [0, b"9-9", 999, *[b"1-1", message.ljust(size, b"x")] * count]

    lost = redis.exceptions.TimeoutError()
    read = [limit(changes(1, 8_000)), limit(changes(8, 100)), limit(lost), limit(lost), limit(changes(1, 100_000))]
    assert [*read, limit(lost)] == [b"20", b"8", b"100", b"1", b"1", b"1"]


def test_one_wait_serves_all_who_wait_for_the_stream_and_outlives_each(
    own_server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence.subscriptions, "MAX_BLOCK_MS", 2_000 * BOUND_SECONDS)

    async def run(admin: Any) -> None:
        manager = presence.ConnectionManager.from_url(own_server.url, events="stream", socket_timeout=None)
        async with asyncio.timeout(BOUND_SECONDS), manager:
            entered = asyncio.Semaphore(0)

            async def watch() -> str:
                async with manager.subscribe() as events:
                    entered.release()
                    return (await anext(events)).connection.sid

            watching = [asyncio.create_task(watch()) for _ in range(10)]
            for _ in watching:
                await entered.acquire()
            seen: list[int] = []
            while seen.count(1) < 10:
                seen.append(admin.info("clients")["blocked_clients"])
                await asyncio.sleep(0.01)
            assert max(seen) == 1
            assert await manager.get_connection_count() == 0, "the wait holds up no call"
            # Of the task that began the wait, and of one that joined it.
            for gone in (watching[0], watching[-1]):
                gone.cancel()
                await asyncio.wait([gone])
                assert gone.cancelled()
            # As a shutdown cancels all tasks there are: that of the wait is nobody's own.
            for task in asyncio.all_tasks() - {asyncio.current_task(), *watching}:
                task.cancel()
            await manager.register_connection("sid", "user")
            assert await asyncio.gather(*watching[1:-1]) == ["sid"] * 8

    with redis.Redis.from_url(own_server.url, decode_responses=True) as admin:
        asyncio.run(run(admin))


def test_a_subscriber_that_is_too_slow_is_told(make_manager: ManagerFactory, own_server: LocalServer) -> None:
    manager = make_manager(own_server.url, namespace="presence", events="pubsub")
    with redis.Redis.from_url(own_server.url) as client, subscribed(manager) as events:
        client.config_set("client-output-buffer-limit", "pubsub 32kb 32kb 0")
        writer = presence.sync.ConnectionManager(client, namespace="presence", events="pubsub")
        update = writer.operations.update_metadata
        writer.register_connection("a", "alice")
        number = 0
        while client.execute_command("PUBSUB", "SHARDNUMSUB", "{presence}:events")[1]:
            assert number < 1_000_000
            writer.pipeline([update("a", f"{number + more}".rjust(4000)) for more in range(100)])
            number += 100
        seen = [event.connection.metadata for event in events.take(2)]
        with pytest.raises(EventsLostError, match="too slowly"):
            seen.extend(event.connection.metadata for event in iter(events.next, None))
        numbers = [int(metadata) for metadata in seen[2:]]
        assert numbers == list(range(len(numbers))), "what came before the loss is whole"


def test_a_server_that_falls_silent_is_told(
    monkeypatch: pytest.MonkeyPatch, make_manager: ManagerFactory, own_server: LocalServer
) -> None:
    monkeypatch.setattr("presence.subscriptions.ASKING_SECONDS", 0.2)
    monkeypatch.setattr("presence.subscriptions.OVERDUE_SECONDS", 0.1)
    manager = make_manager(own_server.url, namespace="presence", events="pubsub")
    with subscribed(manager) as events:
        with redis.Redis.from_url(own_server.url) as client:
            writer = presence.sync.ConnectionManager(client, namespace="presence", events="pubsub")
            later = threading.Timer(1, writer.register_connection, ("a", "alice"))
            later.start()
            assert told(events.next()) == ("registered", "a", None), "silence alone is no loss"
            later.join()
        events.next()
        os.kill(own_server.pid, signal.SIGSTOP)
        try:
            with pytest.raises(EventsLostError, match="does not answer"):
                events.next()
        finally:
            os.kill(own_server.pid, signal.SIGCONT)


def test_an_answer_that_is_there_is_not_missed_by_who_was_busy_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that begins when the answer is due, and ends before the loop has turned, does not see it yet."""
    now = 100.0
    monkeypatch.setattr("presence.subscriptions.monotonic", lambda: now)
    feed, connection = Feed(Operations(events="pubsub"), None, None, None), redis.Connection(protocol=3)
    feed.begin()
    now += 10
    assert feed.question(connection) == ("DEL", b"{presence}:absent")
    assert feed.seconds_until_question() == 10
    now += 11
    assert feed.question(connection) is None
    assert feed.seconds_until_question() == 1
    feed.take(0)
    now += 10
    assert feed.question(connection) == ("DEL", b"{presence}:absent")
    now += 10
    assert feed.question(connection) is None
    now += 1
    with pytest.raises(EventsLostError, match="does not answer"):
        feed.question(connection)
    feed.begin()  # Entered again, on another connection.
    now += 10
    assert feed.question(connection) == ("DEL", b"{presence}:absent")


@pytest.mark.parametrize("refusal", [redis.exceptions.ReadOnlyError("READONLY"), redis.exceptions.MovedError("1 a:2")])
def test_the_answer_that_it_is_no_primary_any_more_is_told(refusal: Exception) -> None:
    """On a cluster, a replica names the primary."""
    feed = Feed(Operations(events="pubsub"), None, None, None)
    feed.begin()
    with pytest.raises(EventsLostError, match="no longer the primary"):
        feed.take(refusal)


@pytest.mark.parametrize("is_silent", [True, False])
def test_a_server_that_becomes_a_replica_is_told(
    monkeypatch: pytest.MonkeyPatch, make_manager: ManagerFactory, own_server: LocalServer, is_silent: bool
) -> None:
    """Its own events come no more, though it answers; what it passes on of another's began with a gap."""
    monkeypatch.setattr("presence.subscriptions.ASKING_SECONDS", 0.2)
    monkeypatch.setattr("presence.subscriptions.OVERDUE_SECONDS", 0.1)
    manager = make_manager(own_server.url, namespace="presence", events="pubsub")
    with subscribed(manager) as events, admin(own_server) as server:
        server.replicaof("127.0.0.1", str(free_port()))
        passed_on = threading.Event()

        def pass_events_on() -> None:
            while not passed_on.wait(0.02):
                server.execute_command("SPUBLISH", "{presence}:events", "1")

        others = threading.Thread(target=pass_events_on)
        if not is_silent:
            others.start()
        try:
            with pytest.raises(EventsLostError, match="no longer the primary"):
                events.next()
        finally:
            passed_on.set()
            if not is_silent:
                others.join()


@pytest.mark.parametrize("refusal", ["NOPERM", "BUSY"])
def test_a_server_that_refuses_to_say_whether_it_is_one_is_still_there(
    monkeypatch: pytest.MonkeyPatch, make_manager: ManagerFactory, own_server: LocalServer, refusal: str
) -> None:
    monkeypatch.setattr("presence.subscriptions.ASKING_SECONDS", 0.03)
    manager = make_manager(own_server.url, namespace="presence", events="pubsub")
    with (
        subscribed(manager) as events,
        admin(own_server) as server,
        presence.sync.ConnectionManager.from_url(own_server.url, events="pubsub") as writer,
    ):
        if refusal == "NOPERM":
            server.execute_command("ACL SETUSER", "default", "-del")
        server.config_set("busy-reply-threshold", 1)

        def refuse_and_register() -> None:
            if refusal == "BUSY":
                server.eval("for _ = 1, 1e8 do end", 0)
            else:
                time.sleep(0.3)
            writer.register_connection("a", "alice")

        refusing = threading.Thread(target=refuse_and_register)
        refusing.start()
        assert told(events.next()) == ("registered", "a", None)
        refusing.join()
        assert f"errorstat_{refusal}" in server.info("errorstats")


def test_a_server_that_falls_silent_is_told_to_who_waits_for_a_moment_each_time(
    monkeypatch: pytest.MonkeyPatch, own_server: LocalServer
) -> None:
    monkeypatch.setattr("presence.subscriptions.ASKING_SECONDS", 0.2)
    monkeypatch.setattr("presence.subscriptions.OVERDUE_SECONDS", 0.1)

    async def poll(events: presence.AsyncSubscription, times: int) -> None:
        for _ in range(times):
            with suppress(TimeoutError):
                await asyncio.wait_for(anext(events), 0.05)

    async def run() -> None:
        manager = presence.ConnectionManager.from_url(own_server.url, events="pubsub")
        async with manager, manager.subscribe() as events:
            await poll(events, 20)  # Silence alone is no loss.
            os.kill(own_server.pid, signal.SIGSTOP)
            with pytest.raises(EventsLostError, match="does not answer"):
                await poll(events, 100)

    try:
        asyncio.run(run())
    finally:
        os.kill(own_server.pid, signal.SIGCONT)


def play_at_full_speed(url: str, namespace: str, writer: int, enough: Flag) -> None:
    """Join, leave, drop and come back at random, in a process of its own."""
    chance = random.Random(writer)
    with presence.sync.ConnectionManager.from_url(url, namespace=namespace, events="stream") as manager:
        for _ in range(20_000):
            if enough.is_set():
                break
            number = chance.randrange(6)
            sid, user = f"sid-{number}-{chance.randrange(2)}", f"user-{number}"
            match chance.randrange(7):
                case 0 | 1:
                    manager.register_connection(sid, user)
                case 2 | 3:
                    manager.join_game(sid, chance.choice(["game", "other"]))
                case 4:
                    manager.leave_game(sid)
                case 5:
                    manager.update_metadata(sid, str(chance.random()))
                case 6:
                    manager.unregister_connection(sid, grace_seconds=chance.choice([0, 60]))


GONE = (EventType.LEFT, EventType.DISPLACED, EventType.UNREGISTERED, EventType.EXPIRED)


def fold(seats: dict[str, presence.ConnectionInfo], event: Event) -> None:
    """Apply an event of a game to a snapshot of it."""
    if event.resumed_from is not None:
        seats.pop(event.resumed_from.sid, None)
    if event.type in GONE:
        seats.pop(event.connection.sid, None)
    elif event.type not in (EventType.USER_ONLINE, EventType.USER_OFFLINE):
        seats[event.connection.sid] = event.connection


def seats_of(snapshot: presence.GameSnapshot) -> dict[str, presence.ConnectionInfo]:
    return {connection.sid: connection for connection in snapshot.connections}


def test_a_snapshot_and_the_events_after_it_are_the_state_at_any_moment(server_url: str, namespace: str) -> None:
    """However fast others write: a snapshot, folded with the events up to a later one, equals that."""
    enough = spawn.Event()
    writers = [
        spawn.Process(target=play_at_full_speed, args=(server_url, namespace, number, enough), daemon=True)
        for number in range(2)
    ]

    async def run() -> None:
        async with presence.ConnectionManager.from_url(server_url, namespace=namespace, events="stream") as manager:
            for writer in writers:
                writer.start()
            snapshots = [await manager.get_game_snapshot("game")]
            while len({snapshot.position for snapshot in snapshots}) <= 40:
                assert any(writer.is_alive() for writer in writers)
                snapshots.append(await manager.get_game_snapshot("game"))
                await asyncio.sleep(random.random() / 100)
            enough.set()
            for writer in writers:
                await asyncio.to_thread(writer.join)
            await manager.register_connection(END, END)
            await manager.join_game(END, "game")
            snapshots.append(await manager.get_game_snapshot("game"))

            async def check(start: int) -> int:
                """Fold from one snapshot on, and compare with each later one."""
                seats = seats_of(snapshots[start])
                later = [(Position.parse(snapshot.position).number, snapshot) for snapshot in snapshots[start + 1 :]]
                compared = 0
                about = {"game_id": "game", "after": snapshots[start].position}
                async with manager.subscribe(**about) as events:
                    async for event in events:
                        assert event.position is not None
                        number = Position.parse(event.position).number
                        while later[0][0] < number:
                            assert seats == seats_of(later.pop(0)[1])
                            compared += 1
                        fold(seats, event)
                        if event.connection.sid == END:
                            break
                assert seats == seats_of(snapshots[-1])
                return compared

            chosen = range(0, len(snapshots) - 1, max(1, len(snapshots) // 12))
            compared = await asyncio.gather(*(check(start) for start in chosen))
            assert sum(compared) > len(chosen)

    try:
        asyncio.run(run())
    finally:
        for writer in writers:
            writer.kill()
            writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]


def test_a_subscription_may_be_entered_again_after_another_thread_has_closed_it(
    server_url: str, namespace: str
) -> None:
    with presence.sync.ConnectionManager.from_url(server_url, namespace=namespace, events="pubsub") as manager:
        subscription = manager.subscribe()
        for _ in range(2):
            with subscription as events:
                manager.register_connection("sid", "user")
                assert next(events).connection.sid == "sid"
                later = threading.Timer(0.2, events.close)
                later.start()
                list(events)
                later.join()


@pytest.mark.parametrize(("mode", "held"), [("stream", b"EVALSHA"), ("pubsub", b"EVALSHA"), ("pubsub", b"SSUBSCRIBE")])
def test_a_subscription_that_is_closed_elsewhere_while_it_begins_is_over(
    make_manager: ManagerFactory, own_server: LocalServer, mode: EventsMode, held: bytes
) -> None:
    with Proxy(own_server.port) as proxy:
        manager = make_manager(proxy.url, events=mode)
        manager.register_connection("sid", "user")
        proxy.command, proxy.fates = held, [Fate.HOLD_REPLY]
        if isinstance(manager, Awaited):

            async def run() -> list[Event]:
                subscription = manager._manager.subscribe()

                async def read() -> list[Event]:
                    async with subscription as events:
                        return [event async for event in events]

                reading = asyncio.ensure_future(read())
                await is_held(proxy)
                await subscription.aclose()
                proxy.release()
                async with asyncio.timeout(BOUND_SECONDS):
                    return await reading

            assert manager._runner.run(run()) == []
        else:
            subscription = manager.subscribe()

            def read() -> list[Event]:
                with subscription as events:
                    return list(events)

            with ThreadPoolExecutor(1) as threads:
                reading = threads.submit(read)
                assert proxy.is_holding.wait(BOUND_SECONDS)
                subscription.close()
                proxy.release()
                try:
                    assert reading.result(BOUND_SECONDS) == []
                finally:
                    subscription.close()
        manager.close()


def test_a_subscription_may_be_entered_again_after_a_loss(
    make_manager: ManagerFactory, own_server: LocalServer
) -> None:
    manager = make_manager(own_server.url, events="pubsub")
    subscription = manager.subscribe()
    with redis.Redis.from_url(own_server.url) as client:
        for _ in range(2):
            events = Subscribed(manager, subscription)
            manager.register_connection("sid", "user")
            assert [event.type.value for event in events.take(1)] == ["registered"]
            manager.unregister_connection("sid")
            client.client_kill_filter(_type="pubsub")
            with pytest.raises(EventsLostError):
                events.take(100)
            events.close()


def test_who_may_not_read_a_channel_is_told_and_leaves_no_connection(
    make_manager: ManagerFactory, own_server: LocalServer, admin: Any
) -> None:
    admin.acl_setuser("deaf", enabled=True, nopass=True, keys=["*"], commands=["+@all"])
    manager = make_manager(own_server.url.replace("//", "//deaf:any@"), events="pubsub")
    subscription = manager.subscribe()
    with pytest.raises(presence.PermissionDeniedError):
        Subscribed(manager, subscription)
    manager.close()
    wait_until(lambda: len(admin.client_list()) == 1)


def test_an_error_of_a_signal_handler_ends_a_wait_and_is_not_taken_for_one_of_the_connection(
    client: redis.Redis, namespace: str
) -> None:
    manager = presence.sync.ConnectionManager(client, namespace=namespace, events="pubsub")
    with manager.subscribe() as events:
        with pytest.raises(LookupError, match="of the handler"), raising_after(0.1, LookupError("of the handler")):
            next(events)
        with pytest.raises(EventsLostError, match="a read was interrupted"):
            next(events)


def test_after_a_message_of_another_program_the_subscription_goes_on(
    make_manager: ManagerFactory, client: redis.Redis, namespace: str
) -> None:
    manager = make_manager(events="pubsub")
    with subscribed(manager) as events:
        client.execute_command("SPUBLISH", events_key(namespace), "a message of another program")
        manager.register_connection("sid", "user")
        with pytest.raises(presence.UnexpectedReplyError):
            events.next()
        assert events.next().connection.sid == "sid"


@pytest.mark.parametrize(
    ("socket_timeout", "wait_ms"), [(None, 1000), (60, 1000), (1, 500), (0.4, 200), (0.2, 50), (0.1, 1)]
)
def test_a_wait_for_the_stream_takes_a_second_or_half_of_a_shorter_timeout_with_room_for_a_tick_of_the_server(
    socket_timeout: float | None, wait_ms: int
) -> None:
    feed = Feed(Operations(events="stream"), None, None, "0-0/0")
    (command,) = next(feed.wait(socket_timeout))
    assert command[:3] == ("xread", b"BLOCK", b"%d" % wait_ms)


@pytest.mark.parametrize("kind", ["asyncio", "blocking"])
def test_an_idle_reader_of_the_stream_times_out_with_no_timeout_that_calls_can_do_with(
    server_url: str, namespace: str, kind: str
) -> None:
    """The server ends a wait at one of its ticks, a tenth of a second later than it was asked to."""
    options: dict[str, Any] = {"socket_timeout": 0.2}
    if kind == "blocking":
        once: Any = redis.retry.Retry(NoBackoff(), 0)
        with redis.Redis.from_url(server_url, retry=once, **options) as client:
            manager = presence.sync.ConnectionManager(client, namespace=namespace, events="stream")
            with subscribed(manager) as events:
                events.read_on(2)
        return

    async def run() -> None:
        once: Any = redis.asyncio.retry.Retry(NoBackoff(), 0)
        async with redis.asyncio.Redis.from_url(server_url, retry=once, **options) as client:
            manager = presence.ConnectionManager(client, namespace=namespace, events="stream")
            async with manager, manager.subscribe() as events:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(events), 2)

    asyncio.run(run())


GIVE = Feed.give.__code__
"""Its last two lines are interrupted by no signal, as it says."""


class _Interrupted(BaseException):
    """What a signal handler raises."""


def _next_or_interrupted(events: Any, at_line: int) -> Event | None:
    """Take an event, or raise in a line, counted from 0, of the library or of redis-py; None where that was it."""
    lines = count()

    def trace(frame: FrameType, what: str, _: object) -> Any:
        if not frame.f_globals.get("__name__", "").startswith(("presence.", "redis.")) or frame.f_code is GIVE:
            return None
        if what == "line" and next(lines) == at_line:
            raise _Interrupted
        return trace

    try:
        with traced(trace):
            event: Event = next(events)
    except _Interrupted:
        return None
    return event


def interrupt_everywhere(server_url: str, namespace: str, mode: EventsMode) -> None:
    """Be interrupted in each line of a step, one after the other, and miss nothing, or be told."""
    make_manager = partial(presence.sync.ConnectionManager.from_url, server_url, namespace=namespace, events=mode)
    with make_manager() as manager:
        manager.register_connection("sid", "user")
        interruptions = 0
        for line in count():
            # Of another manager each time: redis-py may lose a connection of the pool that it was about to give.
            with make_manager() as reading, reading.subscribe() as events:
                numbers = range(3)
                for number in numbers:
                    manager.update_metadata("sid", b"%d" % number)
                was_interrupted = False
                found: list[bytes] = []
                try:
                    while len(found) < len(numbers):
                        event = next(events) if was_interrupted else _next_or_interrupted(events, line)
                        was_interrupted = was_interrupted or event is None
                        found += [event.connection.metadata] if event else []
                        if event and not was_interrupted:
                            break  # The first step has no such line.
                except EventsLostError:
                    assert mode == "pubsub"
                    interruptions += 1
                    continue
            if not was_interrupted:
                break
            interruptions += 1
            assert found == [b"%d" % number for number in numbers]
        assert interruptions > 50


@pytest.mark.parametrize("mode", MODES)
def test_who_is_interrupted_anywhere_misses_nothing_or_is_told(
    server_url: str, namespace: str, mode: EventsMode
) -> None:
    """As by a signal handler that raises."""
    with ThreadPoolExecutor(1) as thread:  # Where a trace function raises in a handler, Python may never leave that.
        thread.submit(interrupt_everywhere, server_url, namespace, mode).result()


@pytest.mark.parametrize("mode", MODES)
def test_two_tasks_cannot_wait_for_one_subscription(server_url: str, namespace: str, mode: EventsMode) -> None:
    """Both would be given the same event."""

    async def work() -> None:
        manager = presence.ConnectionManager.from_url(server_url, namespace=namespace, events=mode)
        async with manager, manager.subscribe() as events:
            waiting = asyncio.create_task(anext(events))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="another task waits for this subscription's next event"):
                await anext(events)
            await manager.register_connection("sid", "user")
            assert (await waiting).type == EventType.REGISTERED
            # One task after the other may, also where the one before was cancelled.
            assert (await asyncio.create_task(anext(events))).type == EventType.USER_ONLINE
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(events), 0.01)
            await manager.unregister_connection("sid")
            assert json.dumps((await anext(events)).type) == '"unregistered"'

    asyncio.run(work())


@pytest.mark.parametrize("mode", MODES)
def test_one_task_may_go_on_where_another_was_cancelled_just_now(
    server_url: str, namespace: str, mode: EventsMode
) -> None:
    async def work() -> None:
        manager = presence.ConnectionManager.from_url(server_url, namespace=namespace, events=mode)
        async with manager, manager.subscribe() as events:
            cancelled = asyncio.create_task(anext(events))
            await asyncio.sleep(0.05)
            registering = asyncio.create_task(manager.register_connection("sid", "user"))
            cancelled.cancel()
            assert (await anext(events)).type == EventType.REGISTERED
            assert cancelled.cancelled()
            await registering

    asyncio.run(work())


@pytest.mark.parametrize("mode", MODES)
def test_none_may_where_it_has_not_heeded_that(
    server_url: str, namespace: str, mode: EventsMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("presence.subscriptions.LEAVING_SECONDS", 0.1)

    async def work() -> None:
        manager = presence.ConnectionManager.from_url(server_url, namespace=namespace, events=mode)
        async with manager, manager.subscribe() as events:

            async def read_on() -> Event:
                with suppress(asyncio.CancelledError):
                    await anext(events)
                return await anext(events)

            reading = asyncio.create_task(read_on())
            await asyncio.sleep(0.05)
            reading.cancel()
            await asyncio.sleep(0.05)
            with pytest.raises(RuntimeError, match="another task waits for this subscription's next event"):
                await asyncio.wait_for(anext(events), BOUND_SECONDS)
            await manager.register_connection("sid", "user")
            assert (await reading).type == EventType.REGISTERED

    asyncio.run(work())
