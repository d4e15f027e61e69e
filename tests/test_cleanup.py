"""cleanup_stale_connections and run_cleanup: bounded batches, everything reported, by one caller only."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

import presence
import presence.sync
from presence.arguments import MAX_METADATA_BYTES
from presence.operations import CLEANUP_BATCH_SIZE, MAX_CONNECTIONS_PER_USER

if TYPE_CHECKING:
    from collections.abc import Callable

    import redis

    from presence import CleanupResult
    from presence.sync import ConnectionManager
    from tests.conftest import Keys, ManagerFactory


def register_many(manager: ConnectionManager, count: int) -> None:
    operations = manager.operations
    numbers = range(count)
    manager.pipeline([operations.register_connection(f"sid-{number}", f"user-{number}") for number in numbers])
    manager.pipeline([operations.join_game(f"sid-{number}", f"game-{number // 2}") for number in numbers])


def test_it_removes_what_was_silent_for_longer_than_the_threshold(
    manager: ConnectionManager, wait: Callable[[float], None], keys: Keys
) -> None:
    for sid in ("silent", "beating"):
        manager.register_connection(sid, f"user of {sid}")
        manager.join_game(sid, "game")
    wait(91)
    manager.update_heartbeat("beating")
    silent = manager.get_connection("silent")

    result = manager.cleanup_stale_connections()

    assert result.removed == (silent,)
    assert len(result) == 1
    assert list(result) == [silent]
    assert result.error is None
    assert list(keys().records) == ["beating"]
    assert manager.get_game_user_sids("game") == {"user of beating": "beating"}


def test_it_removes_nothing_that_was_seen_within_the_threshold(
    manager: ConnectionManager, wait: Callable[[float], None]
) -> None:
    manager.register_connection("sid", "user")
    wait(89)
    assert not manager.cleanup_stale_connections()
    assert manager.cleanup_stale_connections(threshold_seconds=1000).removed == ()
    assert manager.cleanup_stale_connections(threshold_seconds=88.5)


def test_no_key_of_an_expired_connection_remains(
    make_manager: ManagerFactory, wait: Callable[[float], None], keys: Keys
) -> None:
    manager = make_manager(conn_ttl_seconds=60)
    manager.register_connection("sid", "user")
    manager.join_game("sid", "game")
    wait(61)

    # The threshold is longer than the TTL: an expired connection goes nevertheless.
    removed = manager.cleanup_stale_connections(threshold_seconds=1000).removed

    assert [(gone.sid, gone.user_id, gone.game_id) for gone in removed] == [("sid", "user", "game")]
    assert keys().ttls_ms == {}


def test_a_connection_that_expired_long_ago_is_taken_out_of_a_game_that_others_keep_alive(
    make_manager: ManagerFactory, wait: Callable[[float], None], keys: Keys
) -> None:
    manager = make_manager(conn_ttl_seconds=60)
    for sid in ("expired", "live"):
        manager.register_connection(sid, f"user of {sid}")
        manager.join_game(sid, "game")
    for _ in range(100):
        wait(59)
        manager.update_heartbeat("live")

    assert [gone.sid for gone in manager.cleanup_stale_connections()] == ["expired"]
    assert list(keys().games["game"]) == ["live"]


def test_it_reports_who_expired_within_a_day(make_manager: ManagerFactory, wait: Callable[[float], None]) -> None:
    """Not all keys live as long after the last heartbeat: they refresh TTLs by chance."""
    manager = make_manager(conn_ttl_seconds=3600)
    sids = [f"sid-{number}" for number in range(400)]
    register_many(manager, len(sids))
    for _ in range(60):
        wait(300)
        assert all(manager.update_heartbeats(sids).values())
    wait(3600 + 23.9 * 3600)
    assert {gone.sid for gone in manager.cleanup_stale_connections()} == set(sids)


@pytest.mark.parametrize("count", [2, 2 * CLEANUP_BATCH_SIZE + 5])
def test_it_finds_who_falls_silent_when_the_clock_is_set_back(
    manager: ConnectionManager, wait: Callable[[float], None], keys: Keys, count: int
) -> None:
    """Their last heartbeats are still to come, and so they count from the first cleanup on."""
    register_many(manager, count)
    wait(-7200)
    assert not manager.cleanup_stale_connections()
    wait(60)
    manager.update_heartbeat("sid-0")
    assert not manager.cleanup_stale_connections()
    wait(31)
    assert {gone.sid for gone in manager.cleanup_stale_connections()} == {f"sid-{number}" for number in range(1, count)}
    wait(60)
    assert [gone.sid for gone in manager.cleanup_stale_connections()] == ["sid-0"]
    assert keys().records == {}


def test_it_finds_all_of_them_beside_one_that_is_stale(
    manager: ConnectionManager, wait: Callable[[float], None], keys: Keys
) -> None:
    register_many(manager, 2 * CLEANUP_BATCH_SIZE + 5)
    wait(-7200)
    manager.register_connection("stale", "another")
    wait(91)
    assert [gone.sid for gone in manager.cleanup_stale_connections()] == ["stale"]
    wait(91)
    assert len(manager.cleanup_stale_connections()) == 2 * CLEANUP_BATCH_SIZE + 5
    assert keys().records == {}


def test_it_goes_on_until_nothing_stale_is_left(
    manager: ConnectionManager, wait: Callable[[float], None], keys: Keys
) -> None:
    count = 2 * CLEANUP_BATCH_SIZE + 1
    register_many(manager, count)
    wait(91)

    removed = manager.cleanup_stale_connections().removed

    assert {gone.sid for gone in removed} == {f"sid-{number}" for number in range(count)}
    assert all(gone.user_id == gone.sid.replace("sid", "user") for gone in removed)
    assert keys().ttls_ms == {}


def test_each_script_brings_a_bounded_batch_back_to_a_clock_that_was_set_back(
    manager: ConnectionManager, wait: Callable[[float], None], keys: Keys
) -> None:
    register_many(manager, 2 * CLEANUP_BATCH_SIZE + 5)
    wait(-7200)

    for left in (CLEANUP_BATCH_SIZE + 5, 5, 0):
        (batch,) = manager.pipeline([manager.operations.cleanup_batch()])
        seen = keys().last_seen.values()
        assert sum(score > min(seen) + 3_600_000 for score in seen) == left
        assert batch.is_last is (left == 0)


@pytest.mark.parametrize("count", [CLEANUP_BATCH_SIZE - 1, CLEANUP_BATCH_SIZE, CLEANUP_BATCH_SIZE + 1])
def test_each_script_removes_a_bounded_batch(
    manager: ConnectionManager, wait: Callable[[float], None], count: int
) -> None:
    register_many(manager, count)
    wait(91)

    (batch,) = manager.pipeline([manager.operations.cleanup_batch()])

    assert len(batch.removed) == min(count, CLEANUP_BATCH_SIZE)
    assert batch.is_last is (count < CLEANUP_BATCH_SIZE)


def test_a_batch_is_bounded_by_what_its_records_hold(
    make_manager: ManagerFactory, wait: Callable[[float], None], keys: Keys
) -> None:
    manager = make_manager(server_id="server")
    names = {f"sid-{number}" for number in range(CLEANUP_BATCH_SIZE)}
    manager.start_server()
    register = manager.operations.register_connection
    manager.pipeline([register(sid, f"user of {sid}", metadata=b"x" * MAX_METADATA_BYTES) for sid in names])
    wait(91)

    (batch,) = manager.pipeline([manager.operations.cleanup_batch()])
    removed = [*batch.removed, *manager.cleanup_stale_connections()]

    assert 1 <= len(batch.removed) <= 25 * 1024 // MAX_METADATA_BYTES
    assert not batch.is_last
    assert len(removed) == len(names)
    assert {gone.sid for gone in removed} == names
    assert keys().known_servers == {}
    assert keys().ttls_ms == {}


def test_a_record_that_is_larger_than_a_batch_may_hold_is_a_batch(
    make_manager: ManagerFactory, wait: Callable[[float], None], keys: Keys
) -> None:
    manager = make_manager(connections_per_user=MAX_CONNECTIONS_PER_USER)
    longest = [f"{number}".rjust(1024, "\N{VIDEO GAME}") for number in range(2)]
    for sid in longest:
        manager.register_connection(sid, longest[0], metadata=b"x" * MAX_METADATA_BYTES)
    wait(91)

    batches = manager.pipeline([manager.operations.cleanup_batch() for _ in range(3)])

    assert [[gone.sid for gone in batch.removed] for batch in batches] == [longest[:1], longest[1:], []]
    assert [batch.is_last for batch in batches] == [False, True, True]
    assert keys().ttls_ms == {}


@pytest.mark.parametrize(
    ("connections_per_user", "sid_length", "removed_at_once"), [(30, 8, 20), (100, 8, 6), (100, 1024, 1)]
)
def test_a_batch_is_bounded_by_what_is_listed_for_its_users(
    make_manager: ManagerFactory,
    wait: Callable[[float], None],
    keys: Keys,
    connections_per_user: int,
    sid_length: int,
    removed_at_once: int,
) -> None:
    """Each connection that goes has the list of its user's connections read and written."""
    manager = make_manager(connections_per_user=connections_per_user)
    names = [f"{number:08}".rjust(sid_length, "\N{VIDEO GAME}") for number in range(100)]
    users = [f"user-{number // connections_per_user}" for number in range(100)]
    manager.pipeline(list(map(manager.operations.register_connection, names, users)))
    wait(91)

    (batch,) = manager.pipeline([manager.operations.cleanup_batch()])
    removed = [*batch.removed, *manager.cleanup_stale_connections()]

    assert len(batch.removed) == removed_at_once
    assert not batch.is_last
    assert sorted(gone.sid for gone in removed) == sorted(names)
    assert keys().ttls_ms == {}


def test_an_entry_without_a_record_is_dropped_unreported(
    manager: ConnectionManager, client: redis.Redis, namespace: str, wait: Callable[[float], None], keys: Keys
) -> None:
    """A server that evicts keys can lose a record; the index must not keep it for ever."""
    manager.register_connection("sid", "user")
    client.delete(f"{{{namespace}}}:conn:sid", f"{{{namespace}}}:user_conns:user")
    wait(91)

    assert manager.cleanup_stale_connections().removed == ()
    assert keys().ttls_ms == {}


def test_run_cleanup_reports_what_it_removes_until_the_manager_is_closed(
    server_url: str, namespace: str, wait: Callable[[float], None]
) -> None:
    reported: list[CleanupResult] = []

    async def run() -> None:
        async with presence.ConnectionManager.from_url(
            server_url, namespace=namespace, heartbeat_seconds=0.1
        ) as manager:
            cleaned = asyncio.Event()

            async def on_removed(result: CleanupResult) -> None:
                reported.append(result)
                cleaned.set()
                raise RuntimeError("what the application does with it does not end the cleanup")

            task = asyncio.create_task(manager.run_cleanup(0.01, on_removed=on_removed))
            for sid in ("sid-1", "sid-2"):
                await manager.register_connection(sid, "user")
                wait(91)
                await asyncio.wait_for(cleaned.wait(), 10)
                cleaned.clear()
        await asyncio.wait_for(task, 10)

    asyncio.run(run())
    assert [[gone.sid for gone in result] for result in reported] == [["sid-1"], ["sid-2"]]


@pytest.mark.parametrize("interval", [0, -1, float("nan")])
def test_run_cleanup_refuses_an_interval_that_would_spin(manager: ConnectionManager, interval: float) -> None:
    with pytest.raises(ValueError, match="interval_seconds"):
        manager.run_cleanup(interval)


@pytest.mark.parametrize("stale", [CLEANUP_BATCH_SIZE - 1, CLEANUP_BATCH_SIZE])
def test_stale_ones_and_those_past_their_grace_are_bounded_together(
    manager: ConnectionManager, wait: Callable[[float], None], keys: Keys, stale: int
) -> None:
    register_many(manager, stale + 2)
    for sid in ("sid-0", "sid-1"):
        manager.unregister_connection(sid, grace_seconds=30)
    wait(91)

    batches = manager.pipeline([manager.operations.cleanup_batch() for _ in range(2)])

    assert [len(batch.removed) for batch in batches] == [CLEANUP_BATCH_SIZE, stale + 2 - CLEANUP_BATCH_SIZE]
    assert [batch.is_last for batch in batches] == [False, True]
    assert keys().ttls_ms == {}


def test_a_batch_that_finds_nobody_is_the_last_and_not_late(manager: ConnectionManager) -> None:
    (done,) = manager.pipeline([manager.operations.cleanup_batch()])
    assert (done.removed, done.is_last, done.is_late) == ((), True, False)
