"""Events: every change is published once, by the script that makes it, and what is lost is told."""

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
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import redis
from redis.backoff import NoBackoff

import presence
import presence.sync
from presence import EventsLostError, EventType
from presence.operations import EVENTS_BATCH_SIZE, Operations
from presence.replies import Position
from presence.subscriptions import Feed
from tests.conftest import Awaited
from tests.processes import spawn
from tests.server import free_port
from tests.test_pooling import raising_after
from tests.watching import admin, traced, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.synchronize import Event as Flag
    from types import FrameType

    from presence import Event
    from presence.operations import EventsMode
    from presence.sync import ConnectionManager
    from tests.conftest import ManagerFactory
    from tests.server import LocalServer

MODES = ("pubsub", "stream")

BOUND_SECONDS = 20
"""What comes at all comes long before."""

Told = tuple[str, str, str | None]
"""An event as the tables name it: its type, the sid and the game."""


class Subscribed:
    """A subscription of either kind, entered, and read like a blocking one."""

    def __init__(self, manager: Any, subscription: Any) -> None:
        self._runner = manager._runner if isinstance(manager, Awaited) else None
        self._subscription = subscription
        self._call("enter")

    def _call(self, name: str) -> Any:
        if self._runner is None:
            return getattr(self._subscription, {"next": "__next__", "enter": "__enter__"}.get(name, name))()
        method = getattr(self._subscription, {"next": "__anext__", "enter": "__aenter__", "close": "aclose"}[name])

        async def run() -> Any:
            async with asyncio.timeout(BOUND_SECONDS):
                return await method()

        return self._runner.run(run())

    def next(self) -> Event:
        event: Event = self._call("next")
        return event

    def close(self) -> None:
        self._call("close")

    @property
    def position(self) -> str | None:
        position: str | None = self._subscription.position
        return position

    def read_on(self, seconds: float) -> None:
        """Wait for an event that does not come, until the subscription is closed."""
        if self._runner is None:
            timer = threading.Timer(seconds, self._subscription.close)
            timer.start()
            assert list(self._subscription) == []
            timer.join()
            return

        async def run() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(self._subscription), seconds)

        self._runner.run(run())

    def take(self, count: int) -> list[Event]:
        return [self.next() for _ in range(count)]


@contextmanager
def subscribed(manager: Any, **about: Any) -> Iterator[Subscribed]:
    events = Subscribed(manager, manager.subscribe(**about))
    try:
        yield events
    finally:
        events.close()


END = "the end"
"""The user whose registration marks the end of what a test looks at."""


def told(event: Event) -> Told:
    return event.type.value, event.connection.sid, event.connection.game_id


def until_the_end(manager: Any, events: Subscribed) -> list[Event]:
    """Give what was published, up to a last change that the test makes for that."""
    manager.register_connection(END, END)
    found: list[Event] = []
    while (event := events.next()).connection.user_id != END:
        found.append(event)
    manager.unregister_connection(END)
    assert [event.type.value for event in events.take(3)] == ["user_online", "unregistered", "user_offline"]
    return found


def stale(client: redis.Redis, namespace: str, *sids: str) -> None:
    """Let connections not have been seen for a day."""
    key = f"{{{namespace}}}:last_seen"
    for sid in sids:
        score = client.zscore(key, sid)
        assert score is not None
        client.zadd(key, {sid: score - 86_400_000 if score > 0 else -1}, xx=True)


class Scene:
    """A manager, and the means to make time pass."""

    def __init__(self, manager: ConnectionManager, client: redis.Redis, namespace: str) -> None:
        self.manager = manager
        self._client = client
        self._namespace = namespace

    def __getattr__(self, name: str) -> Any:
        return getattr(self.manager, name)

    def forget(self, *sids: str) -> None:
        stale(self._client, self._namespace, *sids)


def nothing(scene: Scene) -> None:
    """Begin with an empty namespace."""


def online(scene: Scene) -> None:
    scene.register_connection("a", "alice")


def playing(scene: Scene) -> None:
    online(scene)
    scene.join_game("a", "g")


def detached(scene: Scene) -> None:
    playing(scene)
    scene.unregister_connection("a", grace_seconds=30)


def twice(scene: Scene) -> None:
    playing(scene)
    scene.register_connection("b", "alice")


def resting(scene: Scene) -> None:
    playing(scene)
    scene.forget("a")


def resting_twice(scene: Scene) -> None:
    twice(scene)
    scene.forget("a", "b")


CASES: dict[str, tuple[Any, Any, list[Told]]] = {
    "register": (
        nothing,
        lambda scene: scene.register_connection("a", "alice"),
        [("registered", "a", None), ("user_online", "a", None)],
    ),
    "register again": (
        playing,
        lambda scene: scene.register_connection("a", "alice"),
        [("registered", "a", "g")],
    ),
    "register displaces": (
        playing,
        lambda scene: scene.register_connection("b", "alice"),
        [("displaced", "a", "g"), ("registered", "b", None)],
    ),
    "register replaces another user": (
        playing,
        lambda scene: scene.register_connection("a", "bob"),
        [
            ("displaced", "a", "g"),
            ("user_offline", "a", "g"),
            ("registered", "a", None),
            ("user_online", "a", None),
        ],
    ),
    "register replaces a detached one of another user": (
        detached,
        lambda scene: scene.register_connection("a", "bob"),
        [("displaced", "a", "g"), ("registered", "a", None), ("user_online", "a", None)],
    ),
    "register resumes": (
        detached,
        lambda scene: scene.register_connection("b", "alice"),
        [("resumed", "b", "g"), ("user_online", "b", "g")],
    ),
    "register resumes the same sid": (
        detached,
        lambda scene: scene.register_connection("a", "alice"),
        [("resumed", "a", "g"), ("user_online", "a", "g")],
    ),
    "register displaces a stale one": (
        resting,
        lambda scene: scene.register_connection("b", "alice"),
        [("displaced", "a", "g"), ("registered", "b", None)],
    ),
    "register again when it had expired": (
        resting,
        lambda scene: scene.register_connection("a", "alice"),
        [("displaced", "a", "g"), ("registered", "a", None)],
    ),
    "register again after a grace": (
        detached,
        lambda scene: (scene.forget("a"), scene.register_connection("a", "alice")),
        [("displaced", "a", "g"), ("registered", "a", None), ("user_online", "a", None)],
    ),
    "join": (online, lambda scene: scene.join_game("a", "g"), [("joined", "a", "g")]),
    "join another": (
        playing,
        lambda scene: scene.join_game("a", "h"),
        [("left", "a", "g"), ("joined", "a", "h")],
    ),
    "join the same": (playing, lambda scene: scene.join_game("a", "g"), []),
    "join a full one": (
        playing,
        lambda scene: scene.register_connection("c", "carol") and scene.join_game("c", "g", capacity=1),
        [("registered", "c", None), ("user_online", "c", None)],
    ),
    "join of nobody": (nothing, lambda scene: scene.join_game("a", "g"), []),
    "join of an older epoch": (online, lambda scene: scene.join_game("a", "g", epoch=1), []),
    "leave": (playing, lambda scene: scene.leave_game("a"), [("left", "a", "g")]),
    "leave nothing": (online, lambda scene: scene.leave_game("a"), []),
    "update metadata": (
        playing,
        lambda scene: scene.update_metadata("a", b"\xff"),
        [("metadata_updated", "a", "g")],
    ),
    "update metadata to the same": (online, lambda scene: scene.update_metadata("a", b""), []),
    "heartbeat": (online, lambda scene: scene.update_heartbeat("a"), []),
    "unregister": (
        playing,
        lambda scene: scene.unregister_connection("a"),
        [("unregistered", "a", "g"), ("user_offline", "a", "g")],
    ),
    "late disconnect": (twice, lambda scene: scene.unregister_connection("a"), []),
    "detach": (
        playing,
        lambda scene: scene.unregister_connection("a", grace_seconds=30),
        [("detached", "a", "g"), ("user_offline", "a", "g")],
    ),
    "detach again": (detached, lambda scene: scene.unregister_connection("a", grace_seconds=30), []),
    "unregister a detached one": (
        detached,
        lambda scene: scene.unregister_connection("a"),
        [("unregistered", "a", "g")],
    ),
    "cleanup of a stale one": (
        resting,
        lambda scene: scene.cleanup_stale_connections(),
        [("expired", "a", "g"), ("user_offline", "a", "g")],
    ),
    "cleanup after a grace": (
        detached,
        lambda scene: (scene.forget("a"), scene.cleanup_stale_connections()),
        [("expired", "a", "g")],
    ),
    "cleanup of nothing": (playing, lambda scene: scene.cleanup_stale_connections(), []),
}
"""What was before, the call, and what it publishes."""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_every_change_publishes_what_it_did(
    make_manager: ManagerFactory, client: redis.Redis, namespace: str, mode: str, case: str
) -> None:
    before, act, expected = CASES[case]
    scene = Scene(make_manager(events=mode), client, namespace)
    before(scene)
    with subscribed(scene.manager) as events:
        act(scene)
        found = until_the_end(scene.manager, events)
    assert [told(event) for event in found] == expected
    assert all((event.position is not None) is (mode == "stream") for event in found)


CASES_OF_TWO: dict[str, tuple[Any, Any, list[Told]]] = {
    "register the second": (
        playing,
        lambda scene: scene.register_connection("b", "alice"),
        [("registered", "b", None)],
    ),
    "register the third": (
        twice,
        lambda scene: scene.register_connection("c", "alice"),
        [("displaced", "a", "g"), ("registered", "c", None)],
    ),
    "unregister one": (twice, lambda scene: scene.unregister_connection("a"), [("unregistered", "a", "g")]),
    "unregister both": (
        twice,
        lambda scene: (scene.unregister_connection("a"), scene.unregister_connection("b")),
        [("unregistered", "a", "g"), ("unregistered", "b", None), ("user_offline", "b", None)],
    ),
    "detach one and unregister the other": (
        twice,
        lambda scene: (scene.unregister_connection("a", grace_seconds=9), scene.unregister_connection("b")),
        [("detached", "a", "g"), ("unregistered", "b", None), ("user_offline", "b", None)],
    ),
    "resume beside another": (
        twice,
        lambda scene: (scene.unregister_connection("a", grace_seconds=9), scene.register_connection("c", "alice")),
        [("detached", "a", "g"), ("resumed", "c", "g")],
    ),
    "resume beside an older one": (
        twice,
        lambda scene: (scene.unregister_connection("b", grace_seconds=9), scene.register_connection("c", "alice")),
        [("detached", "b", None), ("resumed", "c", None)],
    ),
    "replace one of two": (
        twice,
        lambda scene: scene.register_connection("a", "bob"),
        [("displaced", "a", "g"), ("registered", "a", None), ("user_online", "a", None)],
    ),
    "cleanup of both": (
        resting_twice,
        lambda scene: scene.cleanup_stale_connections(),
        [("expired", "a", "g"), ("expired", "b", None), ("user_offline", "b", None)],
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES_OF_TWO)
def test_a_user_with_two_connections_is_online_while_any_is(
    make_manager: ManagerFactory, client: redis.Redis, namespace: str, mode: str, case: str
) -> None:
    before, act, expected = CASES_OF_TWO[case]
    scene = Scene(make_manager(events=mode, connections_per_user=2), client, namespace)
    before(scene)
    with subscribed(scene.manager) as events:
        act(scene)
        found = until_the_end(scene.manager, events)
    assert [told(event) for event in found] == expected


@pytest.mark.parametrize("mode", MODES)
def test_a_first_registration_is_told_as_any_when_the_clock_ran_back(
    make_manager: ManagerFactory, client: redis.Redis, namespace: str, mode: str
) -> None:
    manager = make_manager(events=mode)
    ahead = manager.register_connection("b", "bob").connection.epoch + 3_600_000_000
    client.zadd(f"{{{namespace}}}:last_seen", {"": -ahead})
    with subscribed(manager) as events:
        epoch = manager.register_connection("a", "alice").connection.epoch
        found = until_the_end(manager, events)
    assert [told(event) for event in found] == [("registered", "a", None), ("user_online", "a", None)]
    assert [event.connection.epoch for event in found] == [epoch, epoch] == [ahead + 1, ahead + 1]


@pytest.mark.parametrize("mode", MODES)
def test_who_comes_back_after_the_score_of_the_last_connection_was_lost_is_online_again(
    make_manager: ManagerFactory, client: redis.Redis, namespace: str, mode: str
) -> None:
    manager = make_manager(events=mode)
    manager.register_connection("a", "alice")
    client.zrem(f"{{{namespace}}}:last_seen", "a")
    with subscribed(manager) as events:
        manager.register_connection("b", "alice")
        found = until_the_end(manager, events)
    assert [told(event) for event in found] == [
        ("displaced", "a", None),
        ("registered", "b", None),
        ("user_online", "b", None),
    ]


@pytest.mark.parametrize("mode", MODES)
def test_a_user_goes_offline_with_the_last_connection_whose_score_is_there(
    make_manager: ManagerFactory, client: redis.Redis, namespace: str, mode: str
) -> None:
    manager = make_manager(events=mode, connections_per_user=2)
    for sid in ("a", "b"):
        manager.register_connection(sid, "alice")
    client.zrem(f"{{{namespace}}}:last_seen", "a")
    with subscribed(manager) as events:
        manager.unregister_connection("b")
        found = until_the_end(manager, events)
    assert [told(event) for event in found] == [("unregistered", "b", None), ("user_offline", "b", None)]
    manager.register_connection("a", "alice")


@pytest.mark.parametrize("mode", MODES)
def test_the_connections_of_a_dead_server_are_detached_and_told(make_manager: ManagerFactory, mode: str) -> None:
    dead = make_manager(events=mode, server_id="dead")
    dead.register_connection("a", "alice")
    manager = make_manager(events=mode)
    with subscribed(manager) as events:
        manager.cleanup_server("dead", grace_seconds=30)
        manager.register_connection("b", "alice")
        found = until_the_end(manager, events)
    assert [told(event) for event in found] == [
        ("detached", "a", None),
        ("user_offline", "a", None),
        ("resumed", "b", None),
        ("user_online", "b", None),
    ]


@pytest.mark.parametrize("mode", MODES)
def test_who_takes_the_seat_of_the_one_that_it_displaces_tells_of_both(make_manager: ManagerFactory, mode: str) -> None:
    manager = make_manager(events=mode, displacement="newest_resumes")
    manager.register_connection("a", "alice")
    manager.join_game("a", "g")
    with subscribed(manager) as events, subscribed(manager, game_id="g") as of_game:
        registration = manager.register_connection("b", "alice")
        found, found_of_game = until_the_end(manager, events), of_game.take(2)
    assert [told(event) for event in found] == [("displaced", "a", "g"), ("resumed", "b", "g")]
    assert found == found_of_game
    displaced, resumed = found
    assert (displaced.connection,) == registration.displaced
    assert (resumed.connection, resumed.resumed_from) == (registration.connection, displaced.connection)


@pytest.mark.parametrize("mode", MODES)
def test_a_refused_register_publishes_nothing(make_manager: ManagerFactory, mode: str) -> None:
    manager = make_manager(events=mode, displacement="reject_while_alive")
    manager.register_connection("a", "alice")
    with subscribed(manager) as events:
        assert manager.register_connection("b", "alice").refused
        assert until_the_end(manager, events) == []


@pytest.mark.parametrize("mode", MODES)
def test_an_event_carries_what_the_reads_say(make_manager: ManagerFactory, mode: str) -> None:
    metadata = bytes(range(256))
    manager = make_manager(events=mode)
    with subscribed(manager) as events:
        connection = manager.register_connection("a", "alice", metadata=metadata).connection
        registered, online_now = events.take(2)
        assert registered.connection == online_now.connection == connection
        assert registered.at == registered.connection.observed_at == connection.connected_at
        manager.join_game("a", "g")
        assert events.next().connection == manager.get_connection("a")
        removed = manager.unregister_connection("a", grace_seconds=30)
        gone, _ = events.take(2)
        assert gone.connection == removed
        assert gone.connection.metadata == metadata
        resumed = manager.register_connection("b", "alice")
        event, _ = events.take(2)
        assert (event.connection, event.resumed_from) == (resumed.connection, removed)


AGAIN: dict[str, tuple[Any, Any]] = {
    "register": (lambda make: make.register_connection("a", "bob"), lambda make: make.register_connection("b", "bob")),
    "join": (lambda make: make.join_game("a", "g"), lambda make: make.leave_game("a")),
    "leave": (lambda make: make.leave_game("a"), lambda make: make.join_game("a", "f")),
    "update": (lambda make: make.update_metadata("a", "new"), lambda make: make.update_metadata("a", "newer")),
    "detach": (
        lambda make: make.unregister_connection("a", grace_seconds=5),
        lambda make: make.register_connection("a", "alice"),
    ),
    "unregister": (
        lambda make: make.unregister_connection("a"),
        lambda make: make.register_connection("a", "alice"),
    ),
}
"""A call, and another after which the first would change something again."""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", AGAIN)
def test_a_call_that_is_sent_again_publishes_once(make_manager: ManagerFactory, mode: str, case: str) -> None:
    manager = make_manager(events=mode)
    manager.register_connection("a", "alice")
    manager.join_game("a", "f")
    call, other = (describe(manager.operations) for describe in AGAIN[case])
    with subscribed(manager) as events:
        manager.pipeline([call])
        assert until_the_end(manager, events) != []
        manager.pipeline([call])
        assert until_the_end(manager, events) == []
        manager.pipeline([other])
        assert until_the_end(manager, events) != []
        manager.pipeline([call])
        assert until_the_end(manager, events) == []


@contextmanager
def both_owners_and_the_game(manager: Any) -> Iterator[tuple[Subscribed, Subscribed, Subscribed]]:
    """Subscribe for alice, for bob and for the game g."""
    with (
        subscribed(manager, user_id="alice") as of_alice,
        subscribed(manager, user_id="bob") as of_bob,
        subscribed(manager, game_id="g") as of_game,
    ):
        yield of_alice, of_bob, of_game


@pytest.mark.parametrize("mode", MODES)
class TestAFilter:
    """What concerns one game or one user, whole and once."""

    def play(self, manager: Any) -> None:
        """Let two users meet in two games, with every kind of a change of game."""
        for sid, user in (("a", "alice"), ("b", "bob")):
            manager.register_connection(sid, user)
            manager.join_game(sid, "g")
        manager.join_game("a", "h")
        manager.update_metadata("b", "x")
        manager.unregister_connection("b", grace_seconds=30)
        manager.register_connection("b2", "bob")
        manager.register_connection("b3", "bob")
        manager.register_connection("a", "carol")

    def end(self, manager: Any) -> None:
        for user in ("alice", "bob", END):
            manager.register_connection(user, user)
            manager.join_game(user, "g")

    def test_is_that_of_all_events(self, make_manager: ManagerFactory, mode: str) -> None:
        manager = make_manager(events=mode)
        filters: dict[str, Callable[[Event], bool]] = {
            "game_id": lambda event: event.connection.game_id == "g",
            "user_id": lambda event: event.connection.user_id == "bob",
        }
        with (
            subscribed(manager) as all_events,
            subscribed(manager, game_id="g") as of_game,
            subscribed(manager, user_id="bob") as of_user,
        ):
            self.play(manager)
            self.end(manager)
            everything: list[Event] = []
            while (event := all_events.next()).connection.user_id != END or event.type is not EventType.JOINED:
                everything.append(event)
            everything.append(event)
            for name, events in (("game_id", of_game), ("user_id", of_user)):
                expected = [event for event in everything if filters[name](event)]
                assert len(expected) > 5
                assert events.take(len(expected)) == expected

    def test_takes_a_uuid_and_odd_ids(self, make_manager: ManagerFactory, mode: str) -> None:
        manager = make_manager(events=mode)
        odd = "{g} \n:user:\u20ac\0"
        with subscribed(manager, game_id=odd) as of_game, subscribed(manager, user_id=odd) as of_user:
            manager.register_connection("other", "other")
            manager.join_game("other", "user:other")
            manager.register_connection(odd, odd)
            manager.join_game(odd, odd)
            assert told(of_game.next()) == ("joined", odd, odd)
            assert [event.type.value for event in of_user.take(3)] == ["registered", "user_online", "joined"]

    def test_tells_the_old_owner_and_the_game_of_a_sid_that_changes_hands(
        self, make_manager: ManagerFactory, mode: str
    ) -> None:
        manager = make_manager(events=mode)
        playing(manager)  # type: ignore[arg-type]
        with both_owners_and_the_game(manager) as (of_alice, of_bob, of_game):
            manager.register_connection("a", "bob")
            # Who was not told would be told of this first.
            manager.register_connection("b", "alice")
            manager.join_game("b", "g")
            manager.join_game("a", "h")
            assert [told(event) for event in of_alice.take(2)] == [("displaced", "a", "g"), ("user_offline", "a", "g")]
            assert [told(event) for event in of_bob.take(2)] == [("registered", "a", None), ("user_online", "a", None)]
            assert told(of_game.next()) == ("displaced", "a", "g")

    @pytest.mark.parametrize("game_id", ["g", None])
    def test_tells_both_owners_and_the_game_of_a_sid_whose_old_owner_stays_online(
        self, make_manager: ManagerFactory, mode: str, game_id: str | None
    ) -> None:
        manager = make_manager(events=mode, connections_per_user=2)
        for sid in ("a", "b"):
            manager.register_connection(sid, "alice")
        if game_id:
            manager.join_game("a", game_id)
        with both_owners_and_the_game(manager) as (of_alice, of_bob, of_game):
            manager.register_connection("a", "bob")
            # Who was not told would be told of this first.
            manager.join_game("a", "h")
            manager.join_game("b", "g")
            assert [told(event) for event in of_alice.take(2)] == [("displaced", "a", game_id), ("joined", "b", "g")]
            assert [told(event) for event in of_bob.take(2)] == [("registered", "a", None), ("user_online", "a", None)]
            assert told(of_game.next()) == (("displaced", "a", "g") if game_id else ("joined", "b", "g"))


class TestOff:
    """It publishes nothing, and says so to who wants to subscribe."""

    def test_nothing_is_published(self, make_manager: ManagerFactory, own_server: LocalServer) -> None:
        with redis.Redis.from_url(own_server.url) as client:
            for mode, expected in (("off", set()), ("pubsub", {"cmdstat_spublish"}), ("stream", {"cmdstat_xadd"})):
                client.config_resetstat()
                manager = make_manager(own_server.url, namespace=mode, events=mode)
                for case in CASES.values():
                    scene = Scene(manager, client, mode)
                    for sid in "abc":
                        manager.unregister_connection(sid)
                    case[0](scene)
                    case[1](scene)
                stats: Any = client.info("commandstats")
                assert {"cmdstat_spublish", "cmdstat_xadd"} & set(stats) == expected
                assert client.exists(f"{{{mode}}}:events") == (mode == "stream")

    def test_a_subscription_is_refused(self) -> None:
        for kind in (presence.ConnectionManager, presence.sync.ConnectionManager):
            with pytest.raises(ValueError, match='events="pubsub" or events="stream"'):
                kind.from_url("redis://nowhere:1").subscribe()


@pytest.mark.parametrize("kind", [presence.ConnectionManager, presence.sync.ConnectionManager])
@pytest.mark.parametrize(
    ("mode", "about", "error", "match"),
    [
        ("pubsub", {"game_id": "g", "user_id": "u"}, ValueError, "at most one"),
        ("pubsub", {"after": "0-0/0"}, ValueError, 'after needs events="stream"'),
        ("stream", {"after": "yesterday"}, ValueError, "after must be the position"),
        ("stream", {"after": f"{1 << 64}-0/1"}, ValueError, "after must be the position"),
        ("stream", {"after": 5}, TypeError, "after must be a str"),
        ("stream", {"game_id": ""}, ValueError, "game_id"),
        ("stream", {"user_id": 5}, TypeError, "user_id"),
    ],
)
def test_bad_arguments_are_refused_before_the_network(
    kind: Any, mode: str, about: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        kind.from_url("redis://nowhere:1", events=mode).subscribe(**about)


def events_key(namespace: str) -> str:
    return f"{{{namespace}}}:events"


class TestTheStream:
    """It goes on after a position: nothing twice, nothing missed, and what is lost is told."""

    def act(self, manager: Any) -> None:
        """Make changes of which some publish several events."""
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
            for _ in range(2):  # Whoever goes on is told again.
                with pytest.raises(EventsLostError, match="read a snapshot and subscribe again"):
                    events.next()

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
        client.delete(events_key(namespace))
        for _ in range(EVENTS_BATCH_SIZE):
            self.act(manager)
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
        for _ in range(turns):
            self.act(manager)
        self.lost(manager, position)

    def test_that_is_another_one_with_an_entry_of_the_same_moment_says_so(
        self, make_manager: ManagerFactory, client: redis.Redis, namespace: str
    ) -> None:
        manager, position = self.acted(make_manager)
        key, last_id = events_key(namespace), position.partition("/")[0]
        ((_, entry),) = client.execute_command("XRANGE", key, last_id, last_id, NEVER_DECODE=True)
        client.delete(key)
        client.execute_command("XADD", key, last_id, "message", entry[b"message"])
        for _ in range(2):
            self.act(manager)
        self.lost(manager, position)

    def test_that_is_another_one_and_was_trimmed_as_far_says_so(
        self, make_manager: ManagerFactory, client: redis.Redis, namespace: str
    ) -> None:
        manager, position = self.acted(make_manager)
        gone = client.xlen(events_key(namespace))
        client.delete(events_key(namespace))
        for _ in range(2):
            self.act(manager)
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


def test_a_game_that_is_left_twice_beside_another_is_told_once(make_manager: ManagerFactory) -> None:
    crowded, single = make_manager(connections_per_user=3, events="pubsub"), make_manager(events="pubsub")
    for sid, game_id in (("a", "game"), ("b", "another"), ("c", "game")):
        crowded.register_connection(sid, "user")
        crowded.join_game(sid, game_id)
    with subscribed(single, game_id="game") as events:
        single.register_connection("new", "user")
        single.join_game("new", "game")
        assert [told(event) for event in events.take(3)] == [
            ("displaced", "a", "game"),
            ("displaced", "c", "game"),
            ("joined", "new", "game"),
        ]


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
