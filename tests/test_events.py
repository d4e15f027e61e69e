"""Events: every change is published once, by the script that makes it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import redis

import presence
import presence.sync
from presence import EventType
from tests.subscribed import END, MODES, Subscribed, Told, subscribed, told, until_the_end

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from presence import Event
    from presence.sync import ConnectionManager
    from tests.conftest import ManagerFactory
    from tests.server import LocalServer


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
@pytest.mark.parametrize(
    ("sid", "user_id", "told_of"),
    [
        ("b", "alice", ["displaced a", "registered b", "user_online b"]),
        ("a", "bob", ["displaced a", "user_offline a", "registered a", "user_online a"]),
    ],
    ids=["is online again", "is offline when another takes the sid"],
)
def test_who_has_lost_the_score_of_the_last_connection(
    make_manager: ManagerFactory,
    client: redis.Redis,
    namespace: str,
    sid: str,
    user_id: str,
    told_of: list[str],
    mode: str,
) -> None:
    """Without it nothing tells that it was detached, and no later call would tell that its user is gone."""
    manager = make_manager(events=mode)
    manager.register_connection("a", "alice")
    client.zrem(f"{{{namespace}}}:last_seen", "a")
    with subscribed(manager) as events:
        manager.register_connection(sid, user_id)
        found = until_the_end(manager, events)
    assert [f"{event.type} {event.connection.sid}" for event in found] == told_of


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
        ("stream", {"after": "1-0/0+1"}, ValueError, "after must be the position"),
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
