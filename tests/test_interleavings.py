"""Every order of the commands of operations that meet (guarantees 1 to 3), and that the explorer sees what goes wrong.

A short part of ``make prove``, which runs all schedules of all pairs of all contenders.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import replace
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING, Any

import pytest
import redis.asyncio

from bench import prove
from bench.contenders import CONTENDERS, PLAIN, PRESENCE, State, kind_of, violations
from bench.contenders.library import Presence
from bench.explorer import (
    BATCH_PAIRS,
    FLEET_PAIRS,
    PAIRS,
    PRESENCE_PAIRS,
    SAME_SID_PAIRS,
    SENT_TWICE_PAIRS,
    Call,
    Pair,
    explore,
)
from bench.explorer.explore import WRONG_ANSWERS, WRONG_END, multinomial
from bench.explorer.schedules import AtRandom, DepthFirst, InOrder
from bench.explorer.specification import Specification, serial_outcomes
from bench.explorer.stage import Crash, Stage
from bench.history import HistoryReport
from bench.report import Row
from bench.scale import QUICK
from bench.servers import Server
from tests.server import LocalServer, program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.explorer.schedules import Schedule
    from bench.explorer.stage import ScheduleRun

SEED = "short"


def each(pairs: dict[str, Pair]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("pair", pairs.values(), ids=list(pairs))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server of our own: where other tests' keys were, a SCAN takes more steps at one time than at another."""
    with LocalServer(program()) as server:
        yield server.url


@each(PAIRS | SAME_SID_PAIRS)
def test_nothing_goes_wrong_in_any_order_and_with_any_caller_dying(pair: Pair, url: str) -> None:
    result = explore("presence", pair, url=url)

    # Each operation is one step, so the orders of the operations are all that there are; one dies after its only step.
    calls = len(pair.calls)
    orders = multinomial([1] * calls)
    assert (result.alive.schedules, result.crashed.schedules) == (orders, calls * orders)
    assert (result.alive.kinds, result.crashed.kinds) == (Counter(), Counter())
    assert result.wrong == 0


@each(FLEET_PAIRS)
def test_nothing_goes_wrong_with_what_a_fleet_needs(pair: Pair, url: str) -> None:
    result = explore("presence", pair, url=url)

    orders = multinomial([1] * len(pair.calls))
    assert result.alive.schedules >= orders
    assert result.crashed.schedules >= len(pair.calls) * orders
    assert result.alive.is_complete
    assert (result.alive.kinds, result.crashed.kinds) == (Counter(), Counter())


@each(SENT_TWICE_PAIRS)
def test_a_call_that_is_sent_again_takes_effect_once_whatever_came_between(pair: Pair, url: str) -> None:
    result = explore("presence", pair, url=url, limit=30, seed=SEED)

    twice = sum(call.method == "sent_twice" for call in pair.calls)
    orders = multinomial([2] * twice + [1] * (len(pair.calls) - twice))
    assert result.alive.schedules >= min(orders, 30)
    assert result.crashed.schedules >= min(len(pair.calls) * multinomial([1] * len(pair.calls)), 30)
    assert result.alive.is_complete == (orders <= 30)
    assert (result.alive.kinds, result.crashed.kinds) == (Counter(), Counter())


@pytest.mark.parametrize(
    ("name", "method", "breaks"),
    [
        ("detach‖game's count", "get_game_count", lambda right: 2),
        ("detach‖register", "register_and_tell", lambda right: (*right[:4], None)),
        ("register again‖heartbeat of the same epoch", "heartbeat", lambda right: True),
        ("update metadata‖join‖connection", "get_connection", lambda right: right._replace(metadata=b"old's")),
    ],
)
def test_an_answer_that_another_order_would_explain_is_wrong(
    name: str, method: str, breaks: Callable[[Any], object], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = getattr(Presence, method)

    async def answer_wrongly(self: Presence, *arguments: Any, **options: Any) -> object:
        return breaks(await call(self, *arguments, **options))

    monkeypatch.setattr(Presence, method, answer_wrongly)
    result = explore("presence", FLEET_PAIRS[name], url=url, crashes=False)

    assert 0 < result.alive.kinds[WRONG_ANSWERS] < result.alive.schedules


def test_a_connection_that_is_stored_otherwise_is_wrong(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read_state = Presence.read_state

    async def read_otherwise(self: Presence) -> State:
        state = await read_state(self)
        assert state.told is not None
        return replace(state, told=[one._replace(metadata=b"") for one in state.told])

    monkeypatch.setattr(Presence, "read_state", read_otherwise)
    result = explore("presence", FLEET_PAIRS["update metadata‖join‖connection"], url=url, crashes=False)

    assert result.alive.kinds == {WRONG_END: result.alive.schedules}


@each(BATCH_PAIRS)
def test_nothing_goes_wrong_between_the_batches_of_a_cleanup(pair: Pair, url: str) -> None:
    result = explore("presence", pair, url=url, limit=40, seed=SEED)

    assert result.alive.schedules > multinomial([1] * len(pair.calls))
    assert result.crashed.schedules >= result.alive.schedules
    assert (result.alive.kinds, result.crashed.kinds) == (Counter(), Counter())


def test_cleanups_share_what_is_stale_batch_by_batch() -> None:
    def shares(dies: int | None = None) -> set[tuple[int | None, ...]]:
        """Give how many connections each of the two reports."""
        answers = [outcome.answers for outcome in serial_outcomes(BATCH_PAIRS["cleanup‖cleanup, three batches"], dies)]
        return {tuple(len(answer) if isinstance(answer, list) else None for answer in each) for each in answers}

    assert shares() == {(45, 0), (40, 5), (25, 20), (20, 25), (5, 40), (0, 45)}
    # What a dead one had removed, up to all of it, nobody reports.
    assert shares(0) == {(None, 45), (None, 25), (None, 5), (None, 0)} | {(None, 40), (None, 20)}


@pytest.mark.parametrize("name", ["register‖register, one sid, another's", "cleanup‖cleanup, three batches"])
def test_the_explorer_sees_where_only_presence_keeps_its_word(name: str, url: str) -> None:
    result = explore("plain", PRESENCE_PAIRS[name], url=url, limit=10, seed=SEED, crashes=False)

    assert result.alive.wrong > 0


def with_each_method(pairs: dict[str, Pair]) -> dict[str, Pair]:
    """Leave out the pairs that have no method which is in none before them."""
    chosen: dict[str, Pair] = {}
    met: set[str] = set()
    for name, pair in pairs.items():
        methods = {call.method for call in pair.calls}
        if not methods <= met:
            chosen[name] = pair
            met |= methods
    return chosen


# A call that has missed its script has done nothing, whatever it meets: so once for each kind of call will do.
@each(with_each_method(PAIRS | FLEET_PAIRS))
def test_nothing_goes_wrong_where_the_server_has_lost_the_scripts(pair: Pair, url: str) -> None:
    orders = multinomial([1] * len(pair.calls))
    limit = len(pair.calls) * orders + 2
    result = explore("presence", replace(pair, forget_scripts=True), url=url, limit=limit, seed=SEED)

    # A call may take an EVALSHA, a SCRIPT LOAD and another EVALSHA, and its caller die between them.
    assert result.alive.schedules > orders
    assert result.crashed.schedules > len(pair.calls) * orders
    assert (result.alive.kinds, result.crashed.kinds) == (Counter(), Counter())


@pytest.mark.parametrize(("after_steps", "is_registered"), [(1, False), (2, False), (3, True)])
def test_a_caller_dies_between_the_steps_of_one_operation(after_steps: int, is_registered: bool, url: str) -> None:
    pair = replace(PAIRS["register‖register, displacing"], forget_scripts=True)

    async def run() -> list[ScheduleRun]:
        async with Stage(url, CONTENDERS["presence"], pair) as stage:
            # More than once, as the next run needs all that the dead caller had.
            async with asyncio.timeout(10):
                return [await stage.run(InOrder((0, 1)), Crash(0, after_steps)) for _ in range(3)]

    for run_of_it in asyncio.run(run()):
        assert run_of_it.steps_of(0) == after_steps
        assert run_of_it.answers == (None, ["new-1" if is_registered else "old"])
        assert violations(run_of_it.state) == []


def test_two_registers_by_plain_commands_leave_an_orphan_in_240_of_260_schedules(url: str) -> None:
    result = explore("plain", PAIRS["register‖register"], url=url, crashes=False)

    assert (result.alive.schedules, result.alive.is_complete) == (260, True)
    assert result.alive.kinds == {"orphan": 240, "two connections": 240, WRONG_ANSWERS: 240}
    assert "answered []" in result.alive.example


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("register‖register, displacing", "two connections"),
        ("register‖join", "stray member"),
        ("register‖leave", "partial record"),
        ("register‖is online", WRONG_ANSWERS),
        ("join‖join", "stray member"),
        ("join‖leave", "stray member"),
        ("unregister‖join", "stray member"),
        ("cleanup‖heartbeat", WRONG_ANSWERS),
        ("cleanup‖join", "stray member"),
        ("register‖register‖register", "orphan"),
    ],
)
def test_plain_commands_go_wrong(name: str, kind: str, url: str) -> None:
    result = explore("plain", PAIRS[name], url=url, limit=60, seed=SEED, crashes=False)

    assert result.alive.kinds[kind] >= 10
    assert result.alive.wrong < result.alive.schedules


def test_plain_commands_bring_a_connection_back_in_5_of_252_schedules(url: str) -> None:
    result = explore("plain", PAIRS["unregister‖heartbeat"], url=url, crashes=False)

    # EXISTS before the DEL of the record, HSET after it.
    assert (result.alive.schedules, result.alive.kinds) == (252, {"partial record": 5})


def test_plain_commands_leave_half_a_connection_where_the_caller_dies(url: str) -> None:
    result = explore("plain", PAIRS["join‖leave"], url=url)
    assert result.crashed.kinds["unlisted member"] > 0


@pytest.mark.skipif(
    int(redis.__version__.partition(".")[0]) < 8,
    reason="before 8.0, a pipeline of redis-py that dies loses its connection",
)
@pytest.mark.parametrize("name", ["register‖register", "join‖join", "cleanup‖heartbeat"])
def test_transactions_are_not_accused(name: str, url: str) -> None:
    result = explore("transaction", PAIRS[name], url=url, limit=100, seed=SEED)

    assert result.alive.schedules > 10
    assert (result.alive.kinds, result.crashed.kinds) == (Counter(), Counter())


def test_a_lock_keeps_order_until_its_holder_dies(url: str) -> None:
    result = explore("lock", PAIRS["register‖register"], url=url, limit=300, seed=SEED)

    assert result.alive.schedules > 2
    assert result.alive.kinds == Counter()
    assert result.crashed.kinds["orphan"] > 0
    assert result.crashed.kinds["no TTL"] > 0


def test_every_schedule_is_run_exactly_once(url: str) -> None:
    one, other = Call("join", ("sid-1", "game")), Call("join", ("sid-2", "game"))
    steps = 4  # HGET, HSET, SADD, EXPIRE, whatever the other does
    set_up = Call("register", ("sid-1", "user-1")), Call("register", ("sid-2", "user-2"))

    async def run_all() -> list[Schedule]:
        schedules = []
        async with Stage(url, CONTENDERS["plain"], Pair("joins", set_up, (one, other))) as stage:
            chooser = DepthFirst()
            while not chooser.is_exhausted:
                run = await stage.run(chooser)
                schedules.append(run.schedule)
                assert {sid: game_id for sid, (_, game_id) in run.state.records.items()} == {
                    "sid-1": "game",
                    "sid-2": "game",
                }
                chooser.next_run()
        return schedules

    schedules = asyncio.run(run_all())

    positions = range(2 * steps)
    possible = {tuple(int(position in others) for position in positions) for others in combinations(positions, steps)}
    assert len(schedules) == len(possible) == comb(2 * steps, steps)
    assert set(schedules) == possible


def test_a_drawn_schedule_is_as_likely_as_any_other() -> None:
    steps = [3, 2, 1]
    chooser = AtRandom(steps, SEED)
    for _ in range(50):
        chooser.next_run()
        done = [0, 0, 0]
        while done != steps:
            done[chooser.choose([index for index in range(3) if done[index] < steps[index]], done)] += 1
        assert chooser.probability == pytest.approx(1 / multinomial(steps))


@pytest.mark.parametrize(
    ("state", "kinds"),
    [
        (State({"sid": ("user", "game")}, {"user": ["sid"]}, {"game": {"sid"}}), set()),
        (State({"sid": ("user", None)}), {"orphan"}),
        (State({"sid": ("user", None)}, {"user": ["other"]}), {"orphan", "dangling entry"}),
        (State({"1": ("user", None), "2": ("user", None)}, {"user": ["1", "2"]}), {"two connections"}),
        (State({"sid": ("user", "game")}, {"user": ["sid"]}), {"unlisted member"}),
        (State({"sid": ("user", None)}, {"user": ["sid"]}, {"game": {"sid"}}), {"stray member"}),
        (State(games={"game": {"gone"}}), {"stray member"}),
        (State(users={"user": ["gone"]}), {"dangling entry"}),
        (State(partial={"sid": {"last_seen": "1"}}), {"partial record"}),
        (State(without_ttl=["conn:sid"]), {"no TTL"}),
        (State({"sid": ("user", None)}, own_violations=["presence: anything"]), {"presence"}),
    ],
)
def test_each_invariant_is_checked(state: State, kinds: set[str]) -> None:
    assert {kind_of(violation) for violation in violations(state)} == kinds


@pytest.mark.parametrize("contender", CONTENDERS)
def test_alone_each_contender_does_what_the_model_says(contender: str, url: str) -> None:
    choice = random.Random(contender)

    def draw(number: int) -> Call:
        sid, game_id = f"sid-{max(0, number - choice.randrange(12))}", f"game-{choice.randrange(2)}"
        user_id = f"user-{choice.randrange(3)}"
        return choice.choice(
            [
                Call("register", (f"sid-{number}", user_id)),
                Call("register", (f"sid-{number}", user_id)),
                Call("unregister", (sid,)),
                Call("join", (sid, game_id)),
                Call("join", (sid, game_id)),
                Call("leave", (sid,)),
                Call("heartbeat", (sid,)),
                Call("cleanup", (150,)),
                Call("age", (40,)),
                Call("is_online", (user_id,)),
                Call("get_game", (game_id,)),
            ]
        )

    async def compare() -> None:
        async with redis.asyncio.Redis.from_url(url, decode_responses=True) as client:
            tried = CONTENDERS[contender](client, f"alone-{contender}")
            specification = Specification(())
            for number in range(300):
                call = draw(number)
                assert (number, call, await call.run(tried)) == (number, call, specification.run(call))
            state = await tried.read_state()
            assert violations(state) == []
            assert state.records == specification.outcome(()).records
            await tried.aclose()

    asyncio.run(compare())


def test_a_proof_shows_what_a_dying_caller_costs_a_lock_but_not_a_transaction(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["register‖register", "register‖is online", "cleanup‖join"]
    monkeypatch.setattr(prove, "PAIRS", {name: PAIRS[name] for name in names})
    monkeypatch.setattr(prove, "SAMPLE", 40)
    with redis.Redis.from_url(url) as client:
        rows = [row for row in prove.prove_others(Server(client, url), QUICK) if isinstance(row, Row)]

    assert len(rows) == 2 * 2 * len(names)
    assert {row.what.partition(":")[0] for row in rows if row.value.median} == {"lock, one dying"}
    assert {row.verdict for row in rows} == {""}


def test_a_proof_explores_presence_with_the_scripts_lost(url: str) -> None:
    alive, dying = prove.lost_scripts_rows(url, [PAIRS["register‖register"], PAIRS["join‖leave"]])

    assert alive.cells()[:2] == ("presence, all alive: 2 pairs with the scripts lost", "0 of 36")
    assert dying.cells()[:2] == ("presence, one dying: 2 pairs with the scripts lost", "0 of 118")
    assert (alive.verdict, dying.verdict) == ("PASS", "PASS")


@pytest.mark.parametrize(
    ("contender", "history", "verdict"),
    [
        (PLAIN, HistoryReport(users=100, calls=1000, overlapping=900, wrong=["a user"]), "PASS"),
        (PLAIN, HistoryReport(users=100, calls=1000, overlapping=900), "MISS"),
        (PRESENCE, HistoryReport(users=100, calls=1000, overlapping=100), "PASS"),
        (PRESENCE, HistoryReport(users=100, calls=1000, overlapping=99), "MISS"),
    ],
)
def test_a_proof_that_checks_no_history_is_none(contender: str, history: HistoryReport, verdict: str) -> None:
    assert [row.verdict for row in prove.control_rows(contender, history)] == [verdict]


def test_of_too_many_schedules_as_many_are_drawn_as_asked_for(url: str) -> None:
    # A caller seldom takes as many steps as it is to die after; then it dies at the end of its call.
    result = explore("plain", PAIRS["register‖register‖register"], url=url, limit=100, seed=SEED)

    for tally in (result.alive, result.crashed):
        assert (tally.schedules, tally.is_complete) == (100, False)
        assert tally.of > 10_000
        assert tally.wrong < tally.schedules
