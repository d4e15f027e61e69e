"""A grace at disconnect: the seat in the game is kept, and a new connection of the same user takes it over."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

import presence.sync
from presence import ConnectionInfo, JoinResult
from tests.invariants import violations
from tests.processes import at_once, sleep_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import ProcessPoolExecutor

    from presence.sync import ConnectionManager
    from tests.conftest import Keys, ManagerFactory

GRACE = 30


@pytest.fixture
def detached(manager: ConnectionManager) -> ConnectionInfo:
    """The connection "sid" of "user", who lost it in a game against "opponent"."""
    return detach(manager)


def detach(manager: ConnectionManager, grace_seconds: float = GRACE) -> ConnectionInfo:
    manager.register_connection("sid", "user")
    manager.join_game("sid", "game")
    manager.register_connection("opponent's sid", "opponent")
    manager.join_game("opponent's sid", "game")
    connection = manager.unregister_connection("sid", grace_seconds=grace_seconds)
    assert connection is not None
    return connection


def stored(keys: Keys) -> tuple[object, ...]:
    keyspace = keys()
    return keyspace.records, keyspace.users, keyspace.games, keyspace.last_seen


def test_detaching_says_until_when_the_seat_is_kept(
    manager: ConnectionManager, wait: Callable[[float], None], keys: Keys
) -> None:
    manager.register_connection("sid", "user")
    manager.join_game("sid", "game")
    wait(10)
    before = manager.get_connection("sid")
    assert before is not None
    assert (before.is_detached, before.detached_until) == (False, None)

    connection = manager.unregister_connection("sid", grace_seconds=GRACE)

    assert connection is not None
    assert connection.is_detached
    assert connection.detached_until == connection.observed_at + timedelta(seconds=GRACE)
    assert (connection.sid, connection.user_id, connection.game_id) == ("sid", "user", "game")
    assert (connection.connected_at, connection.last_seen) == (before.connected_at, before.last_seen)
    assert connection.epoch == before.epoch
    assert keys().users == {"user": ["sid"]}


def seats(connections: list[ConnectionInfo]) -> list[tuple[str, bool]]:
    return [(connection.sid, connection.is_detached) for connection in connections]


def sid_of(connection: ConnectionInfo | None) -> str | None:
    return connection.sid if connection else None


READS: dict[str, tuple[Callable[[ConnectionManager], Any], Any, Any]] = {
    "get_connection": (lambda manager: sid_of(manager.get_connection("sid")), "sid", None),
    "get_user_connection": (lambda manager: manager.get_user_connection("user"), None, None),
    "get_all_user_connections": (
        lambda manager: seats(manager.get_all_user_connections("user")),
        [("sid", True)],
        [],
    ),
    "is_user_online": (lambda manager: manager.is_user_online("user"), False, False),
    "get_game_connections": (
        lambda manager: seats(manager.get_game_connections("game")),
        [("sid", True), ("opponent's sid", False)],
        [("opponent's sid", False)],
    ),
    "get_game_user_sids": (
        lambda manager: manager.get_game_user_sids("game"),
        {"opponent": "opponent's sid"},
        {"opponent": "opponent's sid"},
    ),
    "get_opponent_sid": (lambda manager: manager.get_opponent_sid("game", "opponent"), None, None),
    "get_opponent_sid of the one who left": (
        lambda manager: manager.get_opponent_sid("game", "user"),
        "opponent's sid",
        "opponent's sid",
    ),
    "get_connection_count": (lambda manager: manager.get_connection_count(), 1, 1),
    "get_game_connection_count": (lambda manager: manager.get_game_connection_count("game"), 1, 1),
}


@pytest.mark.parametrize("name", READS)
class TestWhatReadsSay:
    """The user is offline; only the three reads that tell of seats still know the connection, and only in its grace."""

    def test_during_the_grace(
        self, manager: ConnectionManager, detached: ConnectionInfo, wait: Callable[[float], None], name: str
    ) -> None:
        read, during, _ = READS[name]
        assert read(manager) == during
        wait(GRACE - 5)
        assert read(manager) == during

    def test_after_the_grace_even_where_nothing_was_cleaned_up(
        self, manager: ConnectionManager, detached: ConnectionInfo, wait: Callable[[float], None], name: str
    ) -> None:
        read, _, after = READS[name]
        wait(GRACE + 0.001)
        assert read(manager) == after

    def test_after_it_was_removed(self, manager: ConnectionManager, detached: ConnectionInfo, name: str) -> None:
        read, _, after = READS[name]
        manager.unregister_connection("sid")
        assert read(manager) == after


def test_every_read_that_knows_it_gives_the_same(manager: ConnectionManager, detached: ConnectionInfo) -> None:
    assert manager.get_connection("sid") == detached
    assert manager.get_game_connections("game")[0] == detached


LATE_CALLS: dict[str, tuple[Callable[[ConnectionManager], Any], Any]] = {
    "join another game": (lambda manager: manager.join_game("sid", "another game"), JoinResult(False)),
    "join its own game": (lambda manager: manager.join_game("sid", "game"), JoinResult(False)),
    "join with its epoch": (
        lambda manager: manager.join_game("sid", "another game", epoch=epoch_of(manager)),
        JoinResult(False),
    ),
    "leave": (lambda manager: manager.leave_game("sid"), None),
    "heartbeat": (lambda manager: manager.update_heartbeat("sid"), False),
    "detach": (lambda manager: end_of(manager.unregister_connection("sid", grace_seconds=1)), ...),
    "clean up all": (lambda manager: manager.cleanup_stale_connections(90).removed, ()),
}


def end_of(connection: ConnectionInfo | None) -> datetime | None:
    return connection.detached_until if connection else None


def epoch_of(manager: ConnectionManager) -> int:
    connection = manager.get_connection("sid")
    assert connection is not None
    return connection.epoch


@pytest.mark.parametrize("name", LATE_CALLS)
def test_what_comes_late_for_a_detached_connection_changes_nothing(
    manager: ConnectionManager, detached: ConnectionInfo, keys: Keys, wait: Callable[[float], None], name: str
) -> None:
    wait(10)
    before = stored(keys)
    connection = manager.get_connection("sid")
    assert connection is not None
    call, expected = LATE_CALLS[name]

    assert call(manager) == (connection.detached_until if expected is ... else expected)

    assert stored(keys) == before


class TestDetachingAgain:
    """Of several disconnects that are told for one socket the first counts."""

    @pytest.mark.parametrize("grace_seconds", [1, GRACE, 3600])
    def test_moves_no_end_of_a_grace(
        self, manager: ConnectionManager, detached: ConnectionInfo, grace_seconds: float
    ) -> None:
        assert manager.unregister_connection("sid", grace_seconds=grace_seconds) == detached
        assert manager.get_connection("sid") == detached

    @pytest.mark.parametrize("grace_seconds", [None, 0, 0.0])
    def test_without_a_grace_gives_the_seat_up(
        self, manager: ConnectionManager, detached: ConnectionInfo, keys: Keys, grace_seconds: float | None
    ) -> None:
        assert manager.unregister_connection("sid", grace_seconds=grace_seconds) == detached
        assert list(keys().records) == ["opponent's sid"]
        assert manager.unregister_connection("sid") is None

    @pytest.mark.parametrize("grace_seconds", [None, GRACE])
    def test_after_the_grace_finds_nothing(
        self,
        manager: ConnectionManager,
        detached: ConnectionInfo,
        wait: Callable[[float], None],
        keys: Keys,
        grace_seconds: float | None,
    ) -> None:
        wait(GRACE + 1)
        before = stored(keys)
        assert manager.unregister_connection("sid", grace_seconds=grace_seconds) is None
        assert stored(keys) == before


class TestResuming:
    """The next register of the same user within the grace has the seat, on whichever server it arrives."""

    def test_a_new_sid_takes_the_seat_over(
        self, make_manager: ManagerFactory, manager: ConnectionManager, detached: ConnectionInfo, keys: Keys
    ) -> None:
        registration = make_manager().register_connection("new", "user")

        assert registration.resumed
        assert registration.resumed_from == detached
        assert (registration.displaced, registration.replaced) == ((), None)
        connection = registration.connection
        assert (connection.sid, connection.game_id, connection.is_detached) == ("new", "game", False)
        assert connection.epoch > detached.epoch
        assert connection.connected_at == connection.last_seen == connection.observed_at
        assert manager.get_connection("sid") is None
        assert manager.get_user_connection("user") == connection
        assert manager.get_game_user_sids("game") == {"user": "new", "opponent": "opponent's sid"}
        assert manager.get_opponent_sid("game", "opponent") == "new"
        assert manager.get_game_connections("game")[-1] == connection
        assert set(keys().games["game"]) == {"new", "opponent's sid"}

    def test_the_same_sid_goes_on(
        self, manager: ConnectionManager, detached: ConnectionInfo, wait: Callable[[float], None], keys: Keys
    ) -> None:
        wait(10)
        before = manager.get_connection("sid")
        assert before is not None

        registration = manager.register_connection("sid", "user")

        assert registration.resumed
        assert registration.resumed_from == before
        assert (registration.displaced, registration.replaced) == ((), None)
        connection = registration.connection
        assert (connection.sid, connection.game_id, connection.is_detached) == ("sid", "game", False)
        assert connection.connected_at == before.connected_at
        assert connection.epoch > before.epoch
        assert connection.last_seen == connection.observed_at
        assert connection in manager.get_game_connections("game")
        assert "last_seen" not in keys().records["sid"]

    @pytest.mark.parametrize("sid", ["sid", "new"])
    def test_is_possible_until_the_end_of_the_grace(
        self, manager: ConnectionManager, detached: ConnectionInfo, wait: Callable[[float], None], sid: str
    ) -> None:
        wait(GRACE - 5)
        assert manager.register_connection(sid, "user").resumed

    def test_a_connection_in_no_game_is_resumed_too(self, manager: ConnectionManager) -> None:
        manager.register_connection("sid", "user")
        manager.unregister_connection("sid", grace_seconds=GRACE)

        registration = manager.register_connection("new", "user")

        assert (registration.resumed, registration.connection.game_id) == (True, None)

    @pytest.mark.parametrize("sid", ["sid", "new"])
    def test_what_was_resumed_can_play_leave_and_be_detached_again(self, manager: ConnectionManager, sid: str) -> None:
        detach(manager)
        manager.register_connection(sid, "user")

        assert manager.update_heartbeat(sid)
        assert manager.join_game(sid, "next game") == JoinResult(True, "game")
        again = manager.unregister_connection(sid, grace_seconds=GRACE)
        assert again is not None
        assert again.is_detached
        assert manager.register_connection("third", "user").connection.game_id == "next game"
        assert manager.leave_game("third") == "next game"

    def test_a_grace_that_was_resumed_ends_nothing(
        self, manager: ConnectionManager, detached: ConnectionInfo, wait: Callable[[float], None]
    ) -> None:
        manager.register_connection("sid", "user")
        wait(GRACE + 1)

        assert manager.cleanup_stale_connections().removed == ()
        assert manager.get_game_connection_count("game") == 2

    def test_nobody_else_gets_the_seat(self, manager: ConnectionManager, detached: ConnectionInfo) -> None:
        registration = manager.register_connection("another sid", "another user")

        assert not registration.resumed
        assert registration.connection.game_id is None
        assert manager.get_connection("sid") == detached

    def test_another_user_who_registers_the_sid_replaces_it(
        self, manager: ConnectionManager, detached: ConnectionInfo, keys: Keys
    ) -> None:
        registration = manager.register_connection("sid", "another user")

        assert not registration.resumed
        assert (registration.replaced, registration.resumed_from, registration.displaced) == (detached, None, ())
        assert registration.connection.game_id is None
        assert set(keys().games["game"]) == {"opponent's sid"}
        assert not manager.register_connection("new", "user").resumed


class TestAfterTheGrace:
    """The seat is given up, and told once: by cleanup, or to whom the user's next register is answered."""

    def test_a_new_sid_displaces_it(
        self, manager: ConnectionManager, detached: ConnectionInfo, wait: Callable[[float], None], keys: Keys
    ) -> None:
        wait(GRACE + 1)

        registration = manager.register_connection("new", "user")

        assert not registration.resumed
        assert registration.resumed_from is None
        assert [(gone.sid, gone.game_id) for gone in registration.displaced] == [("sid", "game")]
        assert registration.connection.game_id is None
        assert set(keys().games["game"]) == {"opponent's sid"}
        assert manager.cleanup_stale_connections().removed == ()

    def test_the_same_sid_replaces_it(
        self, manager: ConnectionManager, detached: ConnectionInfo, wait: Callable[[float], None]
    ) -> None:
        wait(GRACE + 1)

        registration = manager.register_connection("sid", "user")

        assert (registration.resumed, registration.displaced) == (False, ())
        assert registration.replaced is not None
        assert (registration.replaced.sid, registration.replaced.game_id) == ("sid", "game")
        assert registration.connection.game_id is None
        assert registration.connection.connected_at == registration.connection.last_seen

    def test_cleanup_reports_it_once(
        self, manager: ConnectionManager, detached: ConnectionInfo, wait: Callable[[float], None], keys: Keys
    ) -> None:
        wait(GRACE + 1)

        removed = manager.cleanup_stale_connections().removed

        assert [(gone.sid, gone.user_id, gone.game_id) for gone in removed] == [("sid", "user", "game")]
        assert removed[0].is_detached
        assert manager.cleanup_stale_connections().removed == ()
        assert list(keys().records) == ["opponent's sid"]

    def test_cleanup_does_not_report_it_before_however_long_it_was_not_seen(
        self, make_manager: ManagerFactory, wait: Callable[[float], None]
    ) -> None:
        manager = make_manager(conn_ttl_seconds=600)
        detach(manager, grace_seconds=600)
        wait(590)

        removed = manager.cleanup_stale_connections().removed

        assert [gone.sid for gone in removed] == ["opponent's sid"]
        connection = manager.get_connection("sid")
        assert connection is not None
        assert connection.is_detached
        assert manager.register_connection("new", "user").resumed

    def test_cleanup_reports_many_of_both_kinds_each_once(
        self, manager: ConnectionManager, wait: Callable[[float], None], keys: Keys
    ) -> None:
        operations, numbers = manager.operations, range(130)
        manager.pipeline([operations.register_connection(f"sid-{number}", f"user-{number}") for number in numbers])
        manager.pipeline(
            [operations.unregister_connection(f"sid-{number}", grace_seconds=GRACE) for number in numbers if number % 2]
        )
        wait(91)

        removed = manager.cleanup_stale_connections().removed

        assert Counter(gone.sid for gone in removed) == Counter(f"sid-{number}" for number in numbers)
        assert {gone.sid for gone in removed if gone.is_detached} == {
            f"sid-{number}" for number in numbers if number % 2
        }
        assert keys().ttls_ms == {}


class TestCapacity:
    """A seat that is kept is taken."""

    def test_a_detached_connection_holds_its_seat(
        self, manager: ConnectionManager, detached: ConnectionInfo, wait: Callable[[float], None]
    ) -> None:
        manager.register_connection("third", "third user")
        assert manager.join_game("third", "game", capacity=2) == JoinResult(False, is_full=True)
        wait(GRACE + 1)
        assert manager.join_game("third", "game", capacity=2)

    def test_whoever_resumes_has_it(self, manager: ConnectionManager, detached: ConnectionInfo) -> None:
        manager.register_connection("third", "third user")
        manager.register_connection("new", "user")

        assert manager.join_game("new", "game", capacity=2)
        assert manager.join_game("third", "game", capacity=2).is_full


class TestSeveralConnectionsPerUser:
    """connections_per_user above one: a detached one is the user's too."""

    def test_a_resume_leaves_the_live_ones_alone(self, make_manager: ManagerFactory) -> None:
        manager = make_manager(connections_per_user=2)
        for sid in ("phone", "desktop"):
            manager.register_connection(sid, "user")
            manager.join_game(sid, f"game on the {sid}")
        manager.unregister_connection("phone", grace_seconds=GRACE)
        assert manager.is_user_online("user")

        registration = manager.register_connection("new phone", "user")

        assert (registration.resumed, registration.displaced) == (True, ())
        assert registration.connection.game_id == "game on the phone"
        assert manager.get_connection("desktop") is not None

    def test_of_several_seats_the_newest_is_taken_over_and_the_other_kept(self, make_manager: ManagerFactory) -> None:
        manager = make_manager(connections_per_user=2)
        for sid in ("first", "second"):
            manager.register_connection(sid, "user")
            manager.join_game(sid, f"{sid} game")
        for sid in ("second", "first"):
            manager.unregister_connection(sid, grace_seconds=GRACE)

        taken = [manager.register_connection(sid, "user") for sid in ("new-1", "new-2")]

        assert [sid_of(registration.resumed_from) for registration in taken] == ["second", "first"]
        assert [registration.displaced for registration in taken] == [(), ()]
        assert {registration.connection.game_id for registration in taken} == {"first game", "second game"}

    def test_a_seat_that_is_taken_over_makes_room_for_one_under_a_lower_limit(
        self, make_manager: ManagerFactory, keys: Keys
    ) -> None:
        for sid in ("first", "seat", "third"):
            make_manager(connections_per_user=3).register_connection(sid, "user")
        manager = make_manager(connections_per_user=2)
        manager.unregister_connection("seat", grace_seconds=GRACE)

        registration = manager.register_connection("new", "user")

        assert sid_of(registration.resumed_from) == "seat"
        assert [gone.sid for gone in registration.displaced] == ["first"]
        assert keys().users == {"user": ["third", "new"]}

    @pytest.mark.parametrize("resumed_from", [None, "own"])
    def test_a_sid_that_is_registered_again_keeps_its_own_place_and_leaves_the_other_seat(
        self, make_manager: ManagerFactory, resumed_from: str | None
    ) -> None:
        manager = make_manager(connections_per_user=2)
        for sid in ("own", "other"):
            manager.register_connection(sid, "user")
            manager.join_game(sid, f"{sid} game")
        for sid in ("own", "other") if resumed_from else ("other",):
            manager.unregister_connection(sid, grace_seconds=GRACE)
        seat = manager.get_connection("other")

        registration = manager.register_connection("own", "user")

        assert sid_of(registration.resumed_from) == resumed_from
        assert registration.connection.game_id == "own game"
        assert manager.get_connection("other") == seat


@pytest.mark.parametrize(
    ("grace_seconds", "error", "message"),
    [
        (-1, ValueError, "grace_seconds must be 0 or more"),
        (0.0001, ValueError, r"grace_seconds must be at least 0\.001"),
        (60.001, ValueError, r"grace_seconds must be at most conn_ttl_seconds \(60\)"),
        (math.inf, ValueError, "grace_seconds must be at most"),
        (math.nan, ValueError, "grace_seconds must be a number"),
        ("30", TypeError, "grace_seconds must be a number of seconds, not str"),
        (True, TypeError, "grace_seconds must be a number of seconds, not bool"),
        (timedelta(seconds=30), TypeError, "grace_seconds must be a number of seconds, not timedelta"),
    ],
)
def test_a_grace_out_of_bounds_is_refused_before_anything_changes(
    make_manager: ManagerFactory, grace_seconds: Any, error: type[Exception], message: str
) -> None:
    manager = make_manager(conn_ttl_seconds=60)
    connection = manager.register_connection("sid", "user").connection

    with pytest.raises(error, match=message):
        manager.unregister_connection("sid", grace_seconds=grace_seconds)

    assert manager.get_connection("sid") == connection


@pytest.mark.parametrize("grace_seconds", [0.001, 60, 60.0])
def test_a_grace_may_be_as_long_as_the_ttl(make_manager: ManagerFactory, grace_seconds: float) -> None:
    manager = make_manager(conn_ttl_seconds=60)
    manager.register_connection("sid", "user")
    connection = manager.unregister_connection("sid", grace_seconds=grace_seconds)
    assert connection is not None
    assert connection.detached_until == connection.observed_at + timedelta(seconds=grace_seconds)


TEN_DAYS = 10 * 24 * 60 * 60


@pytest.mark.parametrize(("conn_ttl_seconds", "seen_before_seconds"), [(60, 0), (60, 59), (TEN_DAYS, TEN_DAYS - 1)])
def test_a_long_grace_keeps_the_seat_however_old_the_keys_are(
    make_manager: ManagerFactory, wait: Callable[[float], None], conn_ttl_seconds: float, seen_before_seconds: float
) -> None:
    """Keys outlive their connections by 27 hours, less than a long TTL, so the detaching refreshes them all."""
    manager = make_manager(conn_ttl_seconds=conn_ttl_seconds)
    manager.register_connection("sid", "user")
    manager.join_game("sid", "game")
    wait(seen_before_seconds)
    manager.unregister_connection("sid", grace_seconds=conn_ttl_seconds)
    wait(conn_ttl_seconds - 1)
    assert [seat.sid for seat in manager.get_game_connections("game")] == ["sid"]

    registration = manager.register_connection("new", "user")

    assert (registration.resumed, registration.connection.game_id) == (True, "game")


# Several processes at once. Each round begins at the same moment in all of them.

ROUNDS = 200
ROUND_SECONDS = 0.003


def detach_many(manager: ConnectionManager, graces: list[float]) -> list[float]:
    """Detach a connection in a game for each grace; give when they end."""
    operations = manager.operations
    for describe in (
        lambda number: operations.register_connection(f"old-{number}", f"user-{number}"),
        lambda number: operations.join_game(f"old-{number}", f"game-{number}"),
    ):
        manager.pipeline([describe(number) for number in range(len(graces))])
    detached = manager.pipeline(
        [operations.unregister_connection(f"old-{n}", grace_seconds=grace) for n, grace in enumerate(graces)]
    )
    return [
        connection.detached_until.timestamp() for connection in detached if connection and connection.detached_until
    ]


def register_each(
    start: float, url: str, namespace: str, sid: str, moments: list[float] | None = None
) -> list[tuple[str, bool, str | None, list[str]]]:
    """Register a connection for each user; give its sid, whether it resumed, its game, and whom it displaced."""
    answers = []
    with presence.sync.ConnectionManager.from_url(url, namespace=namespace) as manager:
        manager.get_connection_count()
        for number in range(ROUNDS):
            sleep_until(moments[number] if moments else start + number * ROUND_SECONDS)
            registration = manager.register_connection(sid.format(number), f"user-{number}")
            displaced = [gone.sid for gone in registration.displaced]
            answers.append((sid.format(number), registration.resumed, registration.connection.game_id, displaced))
    return answers


def test_of_two_resumes_at_once_one_has_the_seat_and_the_other_displaces_it(
    processes: ProcessPoolExecutor, server_url: str, namespace: str, make_manager: ManagerFactory, keys: Keys
) -> None:
    detach_many(make_manager(), [GRACE] * ROUNDS)

    one, other = at_once(
        processes,
        (register_each, server_url, namespace, "one-{}"),
        (register_each, server_url, namespace, "other-{}"),
    )

    keyspace = keys()
    assert violations(keyspace) == []
    for number, answers in enumerate(zip(one, other, strict=True)):
        (second, _, second_game, displaced), (first, _, first_game, none) = sorted(answers, key=lambda told: told[1])
        assert [resumed for _, resumed, _, _ in sorted(answers)].count(True) == 1
        assert (first_game, none) == (f"game-{number}", [])
        assert (second_game, displaced) == (None, [first])
        assert keyspace.users[f"user-{number}"] == [second]
    assert keyspace.games == {}


def clean_up_until(start: float, url: str, namespace: str, end: float) -> list[str]:
    removed: list[str] = []
    with presence.sync.ConnectionManager.from_url(url, namespace=namespace) as manager:
        while time.time() < end:
            removed += [gone.sid for gone in manager.cleanup_stale_connections()]
    return removed


def test_when_the_grace_ends_a_seat_is_resumed_or_removed_and_reported_once_and_never_both(
    processes: ProcessPoolExecutor, server_url: str, namespace: str, make_manager: ManagerFactory, keys: Keys
) -> None:
    ends = detach_many(make_manager(), [2 + number * ROUND_SECONDS for number in range(ROUNDS)])
    choice = random.Random(0)
    # Some come well before and after, most within a millisecond or two of the end (or all late, on a busy machine).
    early, others = [end - 1 for end in ends[:10]], [-0.02, -0.001, -0.0005, 0, 0.0005, 0.001, 0.002, 0.02]
    moments = early + [end + choice.choice(others) for end in ends[10:]]

    answers, *cleaned_up = at_once(
        processes,
        (register_each, server_url, namespace, "new-{}", moments),
        (clean_up_until, server_url, namespace, ends[-1] + 0.1),
        (clean_up_until, server_url, namespace, ends[-1] + 0.1),
    )

    keyspace = keys()
    assert violations(keyspace) == []
    told = Counter(sid for removed in cleaned_up for sid in removed)
    for number, (sid, resumed, game_id, displaced) in enumerate(answers):
        told.update(displaced)
        assert told[f"old-{number}"] == (0 if resumed else 1)
        assert game_id == (f"game-{number}" if resumed else None)
        assert keyspace.users[f"user-{number}"] == [sid]
        assert set(keyspace.games.get(f"game-{number}", {})) == ({sid} if resumed else set())
    assert set(told) <= {f"old-{number}" for number in range(ROUNDS)}
    assert 0 < sum(resumed for _, resumed, _, _ in answers) < ROUNDS


def join_each(start: float, url: str, namespace: str, sids: tuple[str, ...]) -> list[list[JoinResult]]:
    """In each round, join another game on the one connection and then on the next; give what each was answered."""
    answers = []
    with presence.sync.ConnectionManager.from_url(url, namespace=namespace) as manager:
        manager.get_connection_count()
        for number in range(ROUNDS):
            sleep_until(start + number * ROUND_SECONDS)
            answers.append([manager.join_game(sid.format(number), f"another-{number}") for sid in sids])
    return answers


@pytest.mark.parametrize("new_sid", ["new-{}", "old-{}"], ids=["a new sid", "the same sid"])
def test_a_join_during_a_resume_is_refused_or_moves_the_whole_new_connection(
    processes: ProcessPoolExecutor,
    server_url: str,
    namespace: str,
    make_manager: ManagerFactory,
    keys: Keys,
    new_sid: str,
) -> None:
    detach_many(make_manager(), [GRACE] * ROUNDS)

    registered, joined = at_once(
        processes,
        (register_each, server_url, namespace, new_sid),
        (join_each, server_url, namespace, ("old-{}", new_sid)),
    )

    keyspace = keys()
    assert violations(keyspace) == []
    for number, (on_the_old, on_the_new) in enumerate(joined):
        sid, resumed, game_id, displaced = registered[number]
        assert (resumed, game_id, displaced) == (True, f"game-{number}", [])
        if new_sid == "new-{}":
            assert on_the_old == JoinResult(False)
            assert on_the_new in (JoinResult(False), JoinResult(True, f"game-{number}"))
        else:
            assert (on_the_old, on_the_new) in (
                (JoinResult(False), JoinResult(False)),
                (JoinResult(False), JoinResult(True, f"game-{number}")),
                (JoinResult(True, f"game-{number}"), JoinResult(True)),
            )
        game, left = (f"another-{number}", f"game-{number}") if on_the_new else (f"game-{number}", f"another-{number}")
        assert set(keyspace.games[game]) == {sid}
        assert left not in keyspace.games
