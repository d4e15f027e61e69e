"""The benchmark: its report tells what was found, misses and failures included, and it measures what it says."""

from __future__ import annotations

import asyncio
import signal
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import redis

from bench import __main__ as bench
from bench import measure, page, prove, report
from bench.contenders import CONTENDERS, PLAIN, PRESENCE, violations
from bench.crowd import Crowd
from bench.fill import NAMESPACE, Population, load_scripts
from bench.growth import measure_growth
from bench.measure import MeasurementError, Spread, send
from bench.report import Figure, Row
from bench.round_trips import measure_round_trips
from bench.scale import QUICK
from bench.sections import Plan
from bench.servers import Place, Server
from bench.speed import DISPLACING, DISPLACING_SOON, measure_speed
from tests.server import LocalServer, program

if TYPE_CHECKING:
    from pathlib import Path

    from bench.report import Findings

TINY = replace(QUICK, connections=400, rounds=1, calls=20)

ROWS = [
    Row("fast enough", Spread(2, 1, 3), "µs", target=2),
    Row("too slow", Spread(2.5, 1, 3), "µs", target=2),
    Row("often enough", Spread(9, 8, 10), "/s", Spread(5, 4, 6), "plain", 5, at_least=True),
    Row("too seldom", Spread(9, 8, 10), "/s", Spread(4.9, 4, 6), "plain", 5, at_least=True),
    Row("only shown", Spread.exactly(3), ""),
]
FIGURE = Figure("a-figure", "A figure", "connections", "µs", {"plain": [(1_000, 2.0), (10_000, 3.0)]}, log_x=True)
RUN = report.Run(
    "Take care.",
    61,
    {"CPU": "one"},
    [report.ServerReport("Redis 7", [report.Section("A section", "How it was measured.", ROWS, [FIGURE])])],
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the results go, instead of those of a real run."""
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "latest.json")
    monkeypatch.setattr(report, "PROOF", tmp_path / "proof.json")
    return tmp_path


@pytest.fixture
def local_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the benchmark find one server program."""
    found = [Place("a server", program(), "")]
    monkeypatch.setattr(bench, "places", lambda: found)
    monkeypatch.setattr(prove, "places", lambda: found)


def give(*findings: Row | Figure) -> Plan:
    return Plan("Gives", "", lambda server, scale: findings)


def _fail(_server: Server, _scale: Any) -> Findings:
    raise MeasurementError("the server laughed")


FAILS = Plan("Fails", "", _fail)


def test_a_target_is_missed_on_its_wrong_side_only() -> None:
    assert [row.verdict for row in ROWS] == ["PASS", "MISS", "PASS", "MISS", ""]
    assert [row.cells()[4] for row in ROWS] == ["<= 2 µs", "<= 2 µs", ">= 5 x", ">= 5 x", ""]


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    report.write(RUN, tmp_path / "run.json")
    read = report.read(tmp_path / "run.json")
    assert read.servers[0].sections[0].rows == ROWS
    (figure,) = read.servers[0].sections[0].figures
    assert [tuple(point) for point in figure.series["plain"]] == FIGURE.series["plain"]
    assert report.text(read) == report.text(RUN)


def test_the_page_shows_every_row_and_the_misses_and_has_its_plots(tmp_path: Path) -> None:
    written = page.write(RUN, None, tmp_path / "page.md", tmp_path / "images")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "Redis 7: 2 of 4 targets met\n  MISS  too slow\n  MISS  too seldom\n" in text
    assert "| too seldom | 9.00 /s (8.00-10.00) | 4.90 x (4.00-6.00) | plain | >= 5 x | MISS |" in text
    assert "| only shown | 3 |  |  |  |  |" in text
    assert "How it was measured." in text
    assert "![A figure](images/a-figure-1.png)" in text
    assert written == [tmp_path / "page.md", tmp_path / "images" / "a-figure-1.png"]
    assert written[1].read_bytes().startswith(b"\x89PNG")


def test_bars_are_drawn_with_zeros_on_a_logarithmic_axis(tmp_path: Path) -> None:
    bars = replace(FIGURE, kind="bars", log_x=False, log_y=True, series={"violations": [("plain", 240), ("lock", 0)]})
    section = report.Section("Bars", figures=[bars])
    run = replace(RUN, servers=[report.ServerReport("Redis 7", [section])])
    written = page.write(None, run, tmp_path / "page.md", tmp_path)
    assert written[1].read_bytes().startswith(b"\x89PNG")


def test_publishing_keeps_what_was_written_by_hand(tmp_path: Path) -> None:
    docs = tmp_path / "benchmarks.md"
    docs.write_text(f"old\n{page.BY_HAND}\nWhy it is so.\n{page.MEASURED}\nold\n", encoding="utf-8")
    for _ in range(2):
        page.publish(RUN, None, tmp_path)
        text = docs.read_text(encoding="utf-8")
        assert f"\n{page.BY_HAND}\n\nWhy it is so.\n\n{page.MEASURED}\n" in text
        assert "old" not in text
        # In short before it, all rows after it.
        assert text.index("2 of 4 targets met") < text.index("Why it is so.") < text.index("| too seldom |")


def test_of_a_long_table_the_page_shows_the_rows_with_a_target_and_folds_up_the_rest(tmp_path: Path) -> None:
    rows = [*ROWS, *[Row(f"row {number}", Spread.exactly(number), "") for number in range(page.MOST_ROWS)]]
    run = replace(RUN, servers=[report.ServerReport("Redis 7", [report.Section("Long", rows=rows)])])
    page.write(run, None, tmp_path / "page.md", tmp_path)
    shown, _, folded = (tmp_path / "page.md").read_text(encoding="utf-8").partition("<details>")
    assert [row.what for row in ROWS if f"\n| {row.what} |" in shown] == [row.what for row in ROWS if row.verdict]
    assert [row.what for row in rows if f"\n| {row.what} |" in folded] == [row.what for row in rows]


def test_the_page_puts_rows_of_several_contenders_side_by_side(tmp_path: Path) -> None:
    rows = [
        Row("plain: orders that end wrong", Spread.exactly(240), "of 260"),
        Row("plain: seconds", Spread.exactly(1.5), "s"),
        Row("presence: orders that end wrong", Spread.exactly(1), "of 2", target=0),
    ]
    section = report.Section("A contest", rows=rows, is_side_by_side=True)
    run = replace(RUN, servers=[report.ServerReport("Redis 7", [section])])
    page.write(run, None, tmp_path / "page.md", tmp_path)
    lines = (tmp_path / "page.md").read_text(encoding="utf-8").splitlines()
    first = lines.index("| measured | plain | presence | target |")
    assert lines[first + 2 : first + 4] == [
        "| orders that end wrong | 240 of 260 | 1 of 2 **MISS** | <= 0 |",
        "| seconds | 1.50 s |  |  |",
    ]


@pytest.mark.usefixtures("local_place")
def test_a_section_that_fails_is_reported_and_keeps_no_other_from_running(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "CORE", (FAILS,))
    monkeypatch.setattr(bench, "LONGER", (give(*ROWS, FIGURE),))
    assert bench.main() == 1
    assert "FAILED  Fails: MeasurementError: the server laughed" in capsys.readouterr().out
    failed, given = report.read(folder / "latest.json").servers[0].sections
    assert failed.failure == "MeasurementError: the server laughed"
    assert given.rows == ROWS
    text = (folder / "latest.md").read_text(encoding="utf-8")
    assert "**Failed**: MeasurementError: the server laughed" in text
    assert "too seldom" in text


@pytest.mark.usefixtures("local_place", "folder")
def test_a_missed_target_fails_the_proof_and_a_broken_promise_the_benchmark_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_sigterm = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(bench, "CORE", (give(*ROWS),))
    monkeypatch.setattr(bench, "LONGER", ())
    assert bench.main() == 0
    broken = Row("orders that end wrong", Spread.exactly(1), "", target=0, is_promise=True)
    monkeypatch.setattr(bench, "CORE", (give(broken),))
    assert bench.main() == 1
    monkeypatch.setattr(prove, "PLANS", (give(*ROWS),))
    assert prove.main() == 1
    monkeypatch.setattr(prove, "PLANS", (give(ROWS[0], ROWS[2]),))
    assert prove.main() == 0
    monkeypatch.setattr(prove, "PLANS", (FAILS, give(ROWS[0])))
    assert prove.main() == 1
    assert signal.getsignal(signal.SIGTERM) is on_sigterm, "a test run would not end any more when it is told to"


def test_server_time_is_measured_beside_the_commands_of_each_script(own_server: LocalServer) -> None:
    with redis.Redis.from_url(own_server.url) as client:
        rows = {row.what: row for row in measure_speed(Server(client, own_server.url), TINY) if isinstance(row, Row)}
    displacing = {name: rows[f"the commands within: {name}"].baseline for name in (DISPLACING, DISPLACING_SOON)}
    assert [commands.startswith("GET, GETDEL, ") for commands in displacing.values()] == [True, False]
    heartbeat, within = rows["heartbeat"], rows["the commands within: heartbeat"]
    assert {"TIME", "ZADD", "ZSCORE"} <= {*within.baseline.split(", ")}
    assert within.ratio
    assert 0 < within.value.median < heartbeat.value.median
    assert within.ratio.median == pytest.approx(heartbeat.value.median / within.value.median)


def test_answers_that_are_kept_with_the_lists_can_be_made_too_old_to_be_given_again(own_server: LocalServer) -> None:
    with redis.Redis.from_url(own_server.url) as client:
        population = Population(client, 4)
        population.fill()
        registers = [population.register(index) for index in range(4)]
        first = send(client, [register.command() for register in registers])
        population.age_answers([0, 1], 30)
        population.age_answers([2, 3], 90)
        again = send(client, [register.command() for register in registers])
        time = struct.calcsize("<d")  # which an answer begins with
        is_same = [one[time:] == other[time:] for one, other in zip(first, again, strict=True)]
        assert is_same == [True, True, False, False]
        population.forget_answers([0])
        population.age_answers([0], 90)
        users_list = client.get(f"{{{NAMESPACE}}}:user_conns:{population.user_ids[0]}")
        assert users_list == f"20:{population.sids[0]}".encode()


@pytest.mark.parametrize("contender", [PLAIN, PRESENCE])
def test_a_crowd_is_what_the_contender_itself_would_have_made(own_server: LocalServer, contender: str) -> None:
    crowd = Crowd(contender, own_server.url, database=3, size=250)
    with crowd.connect() as client:
        load_scripts(client)
        crowd.add(client, range(crowd.size))
        assert client.keys(f"*{NAMESPACE}*:reply:*") == []

    async def look() -> None:
        async with redis.asyncio.Redis.from_url(crowd.url, decode_responses=True) as asyncio_client:
            keeper = CONTENDERS[contender](asyncio_client, NAMESPACE)
            state = await keeper.read_state()
            assert violations(state) == []
            assert state.records == {
                crowd.sid(number): (crowd.user_id(number), crowd.game_id(number)) for number in range(crowd.size)
            }
            assert {len(await keeper.get_game(game)) for game in state.games} == {2, 10} == {*crowd.rooms}
            await keeper.aclose()

    asyncio.run(look())


def test_each_operation_takes_as_many_round_trips_as_its_contender_has_steps(own_server: LocalServer) -> None:
    with redis.Redis.from_url(own_server.url) as client:
        rows = [row for row in measure_round_trips(Server(client, own_server.url), QUICK) if isinstance(row, Row)]
    trips = {row.what: row.value.median for row in rows}
    assert {count for what, count in trips.items() if what.startswith("presence: ")} == {1}
    assert {row.verdict for row in rows if row.what.startswith("presence: ")} == {"PASS"}
    steps = {
        "heartbeat": "EXISTS HSET EXPIRE HGET EXPIRE",
        "join": "HGET HSET SADD EXPIRE",
        "register, the first of its user": "GET HSET EXPIRE SET EXPIRE",
        "register, displacing one in a game": "GET HGETALL SREM GET DEL DEL HSET EXPIRE SET EXPIRE",
    }
    for operation, commands in steps.items():
        assert trips[f"plain: {operation}"] == len(commands.split())
    for name in CONTENDERS:
        assert sum(what.startswith(f"{name}: ") for what in trips) == len(trips) / len(CONTENDERS)


def test_growth_is_measured_beside_that_of_the_commands_within(
    own_server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "STABLE_SECONDS", 0.1)  # The memory is not what is looked at here.
    scale = replace(TINY, sizes=(100, 200), growth_rounds=1, growth_calls=5, growth_cleanups=1)
    with redis.Redis.from_url(own_server.url) as client:
        found = [row for row in measure_growth(Server(client, own_server.url), scale) if isinstance(row, Row)]
    grown = {row.what: row for row in found if row.baseline == "100"}
    for name in ("heartbeat", DISPLACING, "cleanup, for each removed"):
        whole, within = (grown[f"{before}{name}, among 200"] for before in ("", "the commands within: "))
        assert whole.ratio
        assert within.ratio
        assert 0 < within.value.median < whole.value.median
