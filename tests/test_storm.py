"""The storm: presence comes through it whole, and the same checks see what it does to plain commands."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import redis

from bench import storm
from bench.history import REGISTER, RecordedCall, check_history
from bench.storm import Registering, StormError, StormResult, run_storm
from bench.storm_worker import WorkerOutcome

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.server import LocalServer

ROOT = Path(__file__).resolve().parent.parent
OPERATIONS = 8_000
USERS = 40


@pytest.fixture(autouse=True)
def no_process_stays() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


class Storm(NamedTuple):
    result: StormResult
    record: Path
    progress: list[int]


@pytest.fixture(scope="module")
def presence_storm(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> Storm:
    record = tmp_path_factory.mktemp("history")
    progress: list[int] = []
    result = run_storm(
        "presence",
        server_url,
        operations=OPERATIONS,
        processes=4,
        tasks=8,
        users=USERS,
        record=record,
        progress=progress.append,
    )
    return Storm(result, record, progress)


def test_presence_comes_through_a_storm_whole(presence_storm: Storm) -> None:
    result = presence_storm.result
    assert result.examples == []
    assert result.history is not None
    assert result.history.wrong == []
    assert result.faults() == []


def test_every_way_to_end_a_connection_was_met_and_calls_of_a_user_overlapped(presence_storm: Storm) -> None:
    result, history = presence_storm.result, presence_storm.result.history
    assert min(result.displaced, result.unregistered, result.cleaned_up) > result.registered // 100
    assert result.registered == result.displaced + result.unregistered + result.cleaned_up + result.remaining
    assert history is not None
    assert history.users == USERS
    # Every operation, a line for each connection that was cleaned up, and the last read of each user.
    assert history.calls == OPERATIONS + result.cleaned_up + USERS
    assert history.overlapping > OPERATIONS // 10


def test_the_result_tells_what_was_measured_and_can_be_written_as_json(presence_storm: Storm) -> None:
    result = presence_storm.result
    assert result.operations == sum(presence_storm.progress) == OPERATIONS
    assert result.operations_per_second == OPERATIONS / result.seconds
    every = result.latencies[storm.ALL]
    assert every.calls == OPERATIONS
    assert 0 < every.p50 <= every.p99 <= every.p999 < 1000 * result.seconds
    assert json.loads(json.dumps(asdict(result)))["latencies"][REGISTER]["calls"] == result.registered


def test_one_displaced_connection_that_is_taken_out_of_the_history_is_missed(
    presence_storm: Storm, tmp_path: Path
) -> None:
    edited = None
    for file in sorted(presence_storm.record.iterdir()):
        lines = file.read_text().splitlines()
        for number, line in enumerate(lines):
            one = RecordedCall._make(json.loads(line))
            if edited is None and one.operation == REGISTER and one.answer:
                edited = one.user_id
                lines[number] = json.dumps(one._replace(answer=[]))
        (tmp_path / file.name).write_text("\n".join(lines) + "\n")

    (wrong,) = check_history(tmp_path, processes=2).wrong
    assert wrong.startswith(f"user {edited!r}")


def break_script(folder: Path, script: str, right: str, wrong: str) -> None:
    """Make a copy of the library in which a script is another."""
    for part in ("presence", "lua"):
        shutil.copytree(ROOT / part, folder / part)
    text = (folder / "lua" / script).read_text()
    assert right in text
    (folder / "lua" / script).write_text(text.replace(right, wrong))


BROKEN = {
    "a cleanup that takes everyone": (
        "cleanup.lua",
        "find_by_score('0', '(' .. as_argument(now_ms - math.min(threshold_ms, conn_ttl_ms)))",
        "find_by_score('0', '+inf')",
    ),
    "a heartbeat that marks nothing": ("heartbeat.lua", "redis.call('ZADD', last_seen_key, 'XX', now_ms, sid)", ""),
    "a register that was seen ten minutes ago": ("register.lua", "'', now_ms, sid)", "'', now_ms - 600000, sid)"),
}


@pytest.mark.parametrize(("script", "right", "wrong"), BROKEN.values(), ids=BROKEN)
def test_a_storm_shows_scripts_by_which_players_who_are_there_are_cleaned_up(
    server_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, right: str, wrong: str
) -> None:
    break_script(tmp_path, script, right, wrong)
    monkeypatch.syspath_prepend(tmp_path)  # for the processes of the storm, which import the library anew
    record = tmp_path / "history"
    record.mkdir()

    result = run_storm("presence", server_url, operations=4_000, processes=2, record=record)

    assert result.violations == 0
    assert result.history is not None
    assert "a cleanup took a connection that was seen within its threshold" in result.history.wrong[0]


STORM = """
import sys
from bench.storm import run_storm

if __name__ == "__main__":
    print(run_storm("presence", sys.argv[1], operations=1_500, processes=2).faults())
"""
BROKEN_IN_THE_END = {
    "a record that expires early": (
        "register.lua",
        "'GET', 'PX', key_lifetime_ms)",
        "'GET', 'PX', '60000')",
        "violations",
    ),
    "a count of one more": ("get_connection_count.lua", "redis.call('ZCOUNT'", "1 + redis.call('ZCOUNT'", "violations"),
    "a room's count of one more": ("get_game_connection_count.lua", "return count", "return count + 1", "violations"),
    "a user who is never online": ("are_users_online.lua", "reply[index] = 1", "reply[index] = 0", "violations"),
    "a cleanup of one batch": (
        "cleanup.lua",
        "and batch_size or #found\n",
        "and batch_size or 0\n",
        "missed by a last cleanup",
    ),
}


@pytest.mark.parametrize(("script", "right", "wrong", "fault"), BROKEN_IN_THE_END.values(), ids=BROKEN_IN_THE_END)
def test_the_checks_after_a_storm_show_what_its_calls_do_not(
    server_url: str, tmp_path: Path, script: str, right: str, wrong: str, fault: str
) -> None:
    break_script(tmp_path, script, right, wrong)
    command = [sys.executable, "-c", STORM, server_url]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert fault in done.stdout


def test_the_checks_see_what_a_storm_does_to_plain_commands(server_url: str, tmp_path: Path) -> None:
    result = run_storm("plain", server_url, operations=4_000, processes=4, tasks=8, users=USERS, record=tmp_path)
    assert result.violations > 0
    # The cleaners find the orphans in time, but nobody ever takes a stray member out of a game.
    assert result.violations_by_kind["stray member"] > 0
    assert result.violations_per_10_000 == pytest.approx(result.violations / 4_000 * 10_000)
    assert result.reported_twice > 0
    assert result.history is not None
    assert result.history.wrong
    assert result.server_reads_per_operation > 2


def test_a_storm_leaves_no_keys_and_a_calm_is_none(server_url: str, client: redis.Redis) -> None:
    before = client.dbsize()
    with pytest.raises(StormError, match="only 0 were"):
        run_storm("presence", server_url, operations=4, processes=2, tasks=1)
    assert client.dbsize() == before


@pytest.fixture
def storm_admin(own_server: LocalServer) -> Iterator[redis.Redis]:
    """A client of a server of the test's own, on which the storm's user may do what the test allows."""
    with redis.Redis.from_url(own_server.url) as client:
        client.acl_setuser("storm", enabled=True, passwords="+secret", commands=["+@all"], keys="*")
        yield client


@pytest.fixture
def storm_url(own_server: LocalServer) -> str:
    return own_server.url.replace("//", "//storm:secret@")


def test_calls_that_raise_are_counted(storm_admin: redis.Redis, storm_url: str) -> None:
    storm_admin.execute_command("ACL", "SETUSER", "storm", "-exists")
    result = run_storm("plain", storm_url, operations=1_000, processes=2, tasks=4, users=USERS)
    assert list(result.errors) == ["heartbeat: NoPermissionError"]
    assert result.operations == 1_000 == result.latencies[storm.ALL].calls + sum(result.errors.values())
    assert any("raised" in fault for fault in result.faults())


def test_a_cleanup_that_raises_may_have_removed_anything(
    storm_admin: redis.Redis, storm_url: str, tmp_path: Path
) -> None:
    operations = 6_000
    done = 0

    def forbid_cleanups_for_a_while(count: int) -> None:
        nonlocal done
        done += count
        rule = "-scan" if done < operations / 2 else "+scan"
        storm_admin.execute_command("ACL", "SETUSER", "storm", rule)

    result = run_storm(
        "transaction",
        storm_url,
        operations=operations,
        processes=2,
        tasks=4,
        users=USERS,
        record=tmp_path,
        progress=forbid_cleanups_for_a_while,
    )
    assert list(result.errors) == ["clean_up: NoPermissionError"]
    assert result.operations == operations
    history, lost = result.history, result.errors["clean_up: NoPermissionError"]
    assert history is not None
    assert history.calls == operations + result.cleaned_up + USERS + lost * USERS
    assert history.wrong == []


def test_a_process_that_fails_ends_the_storm_and_the_other_processes(server_url: str) -> None:
    with pytest.raises(StormError, match="died"):
        run_storm("nobody", server_url, operations=1_000, processes=4)


def test_a_storm_ends_at_its_time_limit(server_url: str) -> None:
    result = run_storm("presence", server_url, operations=10**9, processes=2, tasks=8, users=10, limit_seconds=1)
    assert 0 < result.operations < 10**9
    assert result.faults() == []


def test_the_throughput_counts_the_registers_of_all_processes(server_url: str, client: redis.Redis) -> None:
    before = client.dbsize()
    with Registering("presence", server_url, users=50) as registering:
        for processes in (1, 2):
            assert registering.throughput(processes=processes, tasks=4, seconds=0.2) > 0
    assert client.dbsize() == before


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        (WorkerOutcome(0, 1, registered=["a", "b"], displaced=["c"]), "1 displaced nobody"),
        (WorkerOutcome(0, 1, registered=["a"], displaced=["c"], errors=Counter({"register: OSError": 1})), "OSError"),
    ],
)
def test_registers_that_displace_nobody_or_raise_are_no_measurement(
    server_url: str, monkeypatch: pytest.MonkeyPatch, outcome: WorkerOutcome, told: str
) -> None:
    with Registering("presence", server_url, users=50) as registering:
        monkeypatch.setattr(storm, "_run_processes", lambda *_: [outcome])
        with pytest.raises(StormError, match=told):
            registering.throughput(processes=2, tasks=4, seconds=0.2)
