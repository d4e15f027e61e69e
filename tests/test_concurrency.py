"""Several processes at once (guarantees 1 to 3): nothing is left half changed, or reported twice or never."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import presence
import presence.sync
from tests.invariants import violations
from tests.processes import PROCESSES, at_once, sleep_until, spawn
from tests.watching import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import ProcessPoolExecutor

    import redis

    from tests.conftest import Keys, ManagerFactory

TASKS = 8
USERS = 6
STORM_USERS = 40
GAMES = 4


@dataclass
class History:
    """What the calls of one process were answered."""

    registered: list[str] = field(default_factory=list)
    displaced: list[str] = field(default_factory=list)
    unregistered: list[str] = field(default_factory=list)
    cleaned_up: list[str] = field(default_factory=list)

    def __add__(self, other: History) -> History:
        return History(
            self.registered + other.registered,
            self.displaced + other.displaced,
            self.unregistered + other.unregistered,
            self.cleaned_up + other.cleaned_up,
        )


def history_of(processes: ProcessPoolExecutor, work: Callable[..., History], *arguments: Any) -> History:
    """Run the work in each process, with its number, from the same moment on; give all their answers."""
    return sum(at_once(processes, *((begin, work, number, *arguments) for number in range(PROCESSES))), History())


def begin(start: float, work: Callable[..., History], *arguments: Any) -> History:
    sleep_until(start)
    return work(*arguments)


def register_for_the_same_users(process: int, url: str, namespace: str, rounds: int) -> History:
    history = History()
    with presence.sync.ConnectionManager.from_url(url, namespace=namespace) as manager:
        for number in range(rounds):
            sid = f"sid-{process}-{number}"
            registration = manager.register_connection(sid, f"user-{number % USERS}")
            history.registered.append(sid)
            history.displaced += [gone.sid for gone in registration.displaced]
    return history


def test_of_many_registers_for_one_user_one_stays_and_each_other_is_reported_once(
    processes: ProcessPoolExecutor, server_url: str, namespace: str, keys: Keys
) -> None:
    history = history_of(processes, register_for_the_same_users, server_url, namespace, 500)

    keyspace = keys()
    assert violations(keyspace) == []
    assert len(keyspace.records) == USERS
    assert len(history.registered) == PROCESSES * 500
    assert Counter(history.displaced) == Counter(set(history.registered) - keyspace.records.keys())


def live_through_a_storm(process: int, url: str, namespace: str, rounds: int) -> History:
    """Connect, play, beat, drop, come late and clean up, at random, in several tasks of one process."""
    history = History()

    async def one_task(manager: presence.ConnectionManager, task: int) -> None:
        choice = random.Random(f"{process} {task}")
        sids = ["unknown"]
        for number in range(rounds):
            # Of old sids most are gone by now: displaced, removed or cleaned up, by any process.
            sid = choice.choice(sids[-3:])
            match choice.randrange(8):
                case 0 | 1:
                    sid = f"sid-{process}-{task}-{number}"
                    user_id = f"user-{choice.randrange(STORM_USERS)}"
                    sids.append(sid)
                    registration = await manager.register_connection(sid, user_id)
                    history.registered.append(sid)
                    history.displaced += [gone.sid for gone in registration.displaced]
                case 2 | 3:
                    await manager.join_game(sid, f"game-{choice.randrange(GAMES)}")
                case 4:
                    await manager.leave_game(sid)
                case 5:
                    await manager.update_heartbeat(sid)
                case 6:
                    if removed := await manager.unregister_connection(sid):
                        history.unregistered.append(removed.sid)
                case 7:
                    cleanup = await manager.cleanup_stale_connections(choice.choice([0.003, 0.01, 90]))
                    history.cleaned_up += [gone.sid for gone in cleanup]

    async def all_tasks() -> None:
        async with presence.ConnectionManager.from_url(url, namespace=namespace) as manager:
            await asyncio.gather(*(one_task(manager, task) for task in range(TASKS)))

    asyncio.run(all_tasks())
    return history


def test_a_storm_leaves_every_structure_whole_and_reports_every_end_once(
    processes: ProcessPoolExecutor, server_url: str, namespace: str, keys: Keys
) -> None:
    history = history_of(processes, live_through_a_storm, server_url, namespace, 250)

    keyspace = keys()
    assert violations(keyspace) == []
    ended = history.displaced + history.unregistered + history.cleaned_up
    assert Counter(ended) == Counter(set(history.registered) - keyspace.records.keys())
    # The storm was one: every way to end a connection was met often.
    assert min(map(len, (history.displaced, history.unregistered, history.cleaned_up))) > 10


def test_processes_that_die_in_the_middle_leave_every_structure_whole(
    server_url: str, namespace: str, client: redis.Redis, keys: Keys
) -> None:
    rounds_that_never_end = 1_000_000
    workers = [
        spawn.Process(target=live_through_a_storm, args=(number, server_url, namespace, rounds_that_never_end))
        for number in range(PROCESSES)
    ]
    met: set[bytes] = set()

    def have_all_registered() -> bool:
        sids: Any = client.zrange(f"{{{namespace}}}:last_seen", 0, -1)
        met.update(sid.split(b"-")[1] for sid in sids if sid)
        return len(met) == PROCESSES

    started = []
    try:
        for worker in workers:
            worker.start()
            started.append(worker)
        wait_until(have_all_registered)
        for worker in workers:
            time.sleep(0.2)
            assert worker.is_alive()
            worker.kill()
    finally:
        for worker in started:
            worker.kill()
            worker.join(30)

    keyspace = keys()
    assert violations(keyspace) == []


def clean_up(process: int, url: str, namespace: str) -> History:
    with presence.sync.ConnectionManager.from_url(url, namespace=namespace) as manager:
        return History(cleaned_up=[gone.sid for gone in manager.cleanup_stale_connections()])


def test_of_many_cleanups_exactly_one_reports_each_connection(
    processes: ProcessPoolExecutor,
    server_url: str,
    namespace: str,
    make_manager: ManagerFactory,
    wait: Callable[[float], None],
    keys: Keys,
) -> None:
    count = 5_000
    manager = make_manager()
    operations = manager.operations
    manager.pipeline([operations.register_connection(f"sid-{number}", f"user-{number}") for number in range(count)])
    wait(91)

    history = history_of(processes, clean_up, server_url, namespace)

    assert Counter(history.cleaned_up) == Counter(f"sid-{number}" for number in range(count))
    assert keys().ttls_ms == {}


def join_and_leave(process: int, url: str, namespace: str, rounds: int) -> History:
    with presence.sync.ConnectionManager.from_url(url, namespace=namespace) as manager:
        for number in range(rounds):
            manager.join_game("sid", f"game-{process}")
            if number % 7 == process:
                manager.leave_game("sid")
    return History()


def test_joins_of_one_connection_from_everywhere_leave_it_in_one_game(
    processes: ProcessPoolExecutor, server_url: str, namespace: str, make_manager: ManagerFactory, keys: Keys
) -> None:
    make_manager().register_connection("sid", "user")

    history_of(processes, join_and_leave, server_url, namespace, 500)

    keyspace = keys()
    assert violations(keyspace) == []
    assert len(keyspace.games) <= 1


def beat(process: int, url: str, namespace: str, rounds: int) -> History:
    with presence.sync.ConnectionManager.from_url(url, namespace=namespace) as manager:
        for number in range(rounds):
            manager.update_heartbeat(f"sid-{number}")
            manager.join_game(f"sid-{number}", f"game-{process}")
    return History()


def register_and_unregister(process: int, url: str, namespace: str, rounds: int) -> History:
    with presence.sync.ConnectionManager.from_url(url, namespace=namespace) as manager:
        for number in range(rounds):
            manager.register_connection(f"sid-{number}", "user")
            manager.unregister_connection(f"sid-{number}")
    return History()


def beat_or_register(process: int, *arguments: Any) -> History:
    return (beat if process % 2 else register_and_unregister)(process, *arguments)


def test_a_heartbeat_or_join_never_brings_a_removed_connection_back(
    processes: ProcessPoolExecutor, server_url: str, namespace: str, keys: Keys
) -> None:
    history_of(processes, beat_or_register, server_url, namespace, 500)
    assert keys().ttls_ms == {}
