"""A call whose reply was lost is sent again: it has taken effect once, and its answer is the one that was lost."""

from __future__ import annotations

import struct
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, product
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import redis
import redis.asyncio.retry
import redis.retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, ReadOnlyError

from presence import (
    CleanupResult,
    ConnectionInfo,
    HeartbeatStatus,
    JoinResult,
    PipelineError,
    Registration,
    ServerUnreachableError,
    UnexpectedReplyError,
    pooling,
)
from presence.background import RepeatedCleanup
from presence.commands import Repeated, load_command, sent_again
from presence.exchanges import perform, perform_all
from presence.operations import CLEANUP_BATCH_SIZE, Operations
from presence.retrying import attempts, transient_faults, with_what_follows
from presence.sync import ConnectionManager
from tests.clock import let_time_pass
from tests.fault_proxy import CuttingProxy, Fate, Proxy
from tests.invariants import Keyspace, read_keyspace, violations
from tests.watching import scripts_run, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from presence import Operation
    from presence.commands import Command
    from presence.operations import Displacement
    from tests.conftest import Keys, ManagerFactory
    from tests.server import LocalServer


@pytest.fixture
def proxy(own_server: LocalServer) -> Iterator[CuttingProxy]:
    with CuttingProxy(own_server.port) as proxy:
        yield proxy


@pytest.fixture
def without_backoff(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The client options of a manager that tries again as often as managers do, but does not wait before it."""
    is_asyncio = request.node.callspec.params["make_manager"] == "asyncio"
    retry = redis.asyncio.retry.Retry if is_asyncio else redis.retry.Retry
    return {"retry": retry(NoBackoff(), 6)}


def told(result: Any) -> Any:
    """What an answer says, without times and epochs: those of a twin differ."""
    match result:
        case ConnectionInfo():
            assert result.epoch > 0
            of_connection = (result.sid, result.user_id, result.game_id, result.is_detached)
            return (*of_connection, result.server_id, result.metadata)
        case Registration():
            return {
                "connection": told(result.connection),
                "displaced": [told(gone) for gone in result.displaced],
                "replaced": told(result.replaced),
                "resumed": result.resumed,
                "resumed_from": told(result.resumed_from),
                "refused": result.refused,
            }
        case CleanupResult():
            assert result.error is None
            return [told(gone) for gone in (*result.removed, None, *result.detached)]
        case bool():
            return result
        case int():
            return "a boot epoch"
        case None | str() | JoinResult():
            return result
    raise AssertionError(result)


def stored(keyspace: Keyspace, connections_per_user: int = 1) -> Any:
    """What a namespace holds, without times and epochs."""
    assert violations(keyspace, connections_per_user) == []
    return (
        {
            sid: (record["user_id"], record["game_id"], "last_seen" in record, record["metadata"])
            for sid, record in keyspace.records.items()
        },
        keyspace.users,
        {game_id: set(members) for game_id, members in keyspace.games.items()},
        set(keyspace.last_seen),
        sorted((server.partition(":")[2], sorted(sids)) for server, sids in keyspace.servers.items()),
        sorted((server.partition(":")[2], beat == 0) for server, beat in keyspace.known_servers.items()),
    )


@dataclass(frozen=True)
class Case:
    """A call, the scene in which it is made, and how much time passes between."""

    scene: Callable[[ConnectionManager], object]
    call: Callable[[ConnectionManager], Any]
    seconds: float = 0
    options: dict[str, Any] = field(default_factory=dict)
    changes_something: bool = True


def nothing(manager: ConnectionManager) -> None:
    """Nobody is there."""


def one_is_there(manager: ConnectionManager) -> None:
    manager.register_connection("old", "user")


def one_plays(manager: ConnectionManager) -> None:
    manager.register_connection("old", "user")
    manager.join_game("old", "game")


def one_is_detached(manager: ConnectionManager) -> None:
    one_plays(manager)
    manager.unregister_connection("old", grace_seconds=30)


def the_next_game_is_full(manager: ConnectionManager) -> None:
    one_plays(manager)
    for number in range(2):
        manager.register_connection(f"sid-{number}", f"user-{number}")
        manager.join_game(f"sid-{number}", "next game")


def some_are_stale(manager: ConnectionManager) -> None:
    one_is_detached(manager)
    for number in range(2):
        manager.register_connection(f"sid-{number}", f"user-{number}")
        manager.join_game(f"sid-{number}", "game")


def one_has_metadata(manager: ConnectionManager) -> None:
    manager.register_connection("old", "user", metadata="before")
    manager.join_game("old", "game")


def another_start_has_players(manager: ConnectionManager) -> None:
    """Players of an earlier start of the server, as a manager of its own in an earlier process had them."""
    operations = manager.operations
    for name in ("server", "server", "other"):
        earlier = Operations(operations.namespace, server_id=name)
        (earlier.boot_epoch,) = manager.pipeline([earlier.start_server()])
        for number in range(2):
            manager.pipeline([earlier.register_connection(f"{name}-{number}", f"user of {name}-{number}")])


def start_the_server(manager: ConnectionManager) -> int:
    manager.operations.boot_epoch = None  # Otherwise it is asked for only once.
    return manager.start_server()


CASES = {
    "register the first": Case(nothing, lambda manager: manager.register_connection("new", "user")),
    "register the same again": Case(one_plays, lambda manager: manager.register_connection("old", "user")),
    "register and displace": Case(one_plays, lambda manager: manager.register_connection("new", "user")),
    "register beside another": Case(
        one_plays, lambda manager: manager.register_connection("new", "user"), options={"connections_per_user": 2}
    ),
    "register and resume": Case(one_is_detached, lambda manager: manager.register_connection("new", "user")),
    "register and resume the same sid": Case(
        one_is_detached, lambda manager: manager.register_connection("old", "user")
    ),
    "register another user's sid": Case(one_plays, lambda manager: manager.register_connection("old", "new user")),
    "register, displace and resume": Case(
        one_plays,
        lambda manager: manager.register_connection("new", "user"),
        options={"displacement": "newest_resumes"},
    ),
    "register and be refused": Case(
        one_plays,
        lambda manager: manager.register_connection("new", "user"),
        options={"displacement": "reject_while_alive"},
        changes_something=False,
    ),
    "register while the earlier one is stale": Case(
        one_plays,
        lambda manager: manager.register_connection("new", "user"),
        seconds=91,
        options={"displacement": "reject_while_alive"},
    ),
    "join the first game": Case(one_is_there, lambda manager: manager.join_game("old", "game")),
    "join from another game": Case(one_plays, lambda manager: manager.join_game("old", "next game", capacity=1)),
    "join a full game": Case(
        the_next_game_is_full,
        lambda manager: manager.join_game("old", "next game", capacity=2),
        changes_something=False,
    ),
    "leave": Case(one_plays, lambda manager: manager.leave_game("old")),
    "unregister": Case(one_plays, lambda manager: manager.unregister_connection("old")),
    "unregister with a grace": Case(one_plays, lambda manager: manager.unregister_connection("old", grace_seconds=30)),
    "unregister a detached one": Case(one_is_detached, lambda manager: manager.unregister_connection("old")),
    "update metadata": Case(one_has_metadata, lambda manager: manager.update_metadata("old", "after")),
    "start the server": Case(another_start_has_players, start_the_server, options={"server_id": "server"}),
    "clean up a server": Case(another_start_has_players, lambda manager: manager.cleanup_server("server")),
    "clean up a server with a grace": Case(
        another_start_has_players, lambda manager: manager.cleanup_server("server", grace_seconds=30)
    ),
    "clean up": Case(some_are_stale, lambda manager: manager.cleanup_stale_connections(), seconds=91),
}


@pytest.mark.parametrize("name", CASES)
def test_wherever_the_reply_is_cut_the_call_takes_effect_once_and_answers_the_same(
    make_manager: ManagerFactory,
    own_server: LocalServer,
    own_client: redis.Redis,
    proxy: CuttingProxy,
    without_backoff: dict[str, Any],
    namespace: str,
    name: str,
) -> None:
    case = CASES[name]
    direct = make_manager(own_server.url, **case.options)
    manager = make_manager(proxy.url, **case.options, **without_backoff)

    def set_the_scene() -> None:
        own_client.flushdb()
        case.scene(direct)
        if case.seconds:
            let_time_pass(own_client, namespace, case.seconds)

    set_the_scene()
    expected = told(case.call(direct))
    connections_per_user = case.options.get("connections_per_user", 1)
    expected_state = stored(read_keyspace(own_client, namespace), connections_per_user)

    cut = length = 0
    while cut <= length:
        # The last round cuts nothing: so the call is seen to need one script when nothing is lost.
        set_the_scene()
        proxy.replies, proxy.cuts = [], [] if cut == length > 0 else [cut]
        result = case.call(manager)

        where = f"cut after {cut} of {len(proxy.replies[0])} bytes"
        assert told(result) == expected, where
        assert stored(read_keyspace(own_client, namespace), connections_per_user) == expected_state, where
        assert proxy.cuts == []
        assert len(proxy.replies) == (1 if cut == length > 0 else 2), where
        if case.changes_something:
            assert proxy.replies[0] == proxy.replies[-1], where
        if isinstance(result, Registration):
            assert direct.get_connection(result.connection.sid) == result.connection, where
        if isinstance(result, ConnectionInfo) and expected_state[0]:
            assert direct.get_connection(result.sid) == result, where
        length = len(proxy.replies[0])
        cut += 1
    manager.close()


@pytest.mark.parametrize("batch", range(3))
@pytest.mark.parametrize("share", [0, 0.5, 0.999], ids=["at its start", "in its middle", "at its end"])
def test_a_long_cleanup_reports_each_connection_once_when_the_reply_of_a_batch_is_cut(
    make_manager: ManagerFactory,
    own_server: LocalServer,
    own_client: redis.Redis,
    proxy: CuttingProxy,
    without_backoff: dict[str, Any],
    namespace: str,
    batch: int,
    share: float,
) -> None:
    direct, manager = make_manager(own_server.url), make_manager(proxy.url, **without_backoff)
    sids = [f"sid-{number:03}" for number in range(2 * CLEANUP_BATCH_SIZE + 10)]

    def clean_up(cuts: list[int | None]) -> list[str]:
        direct.pipeline([direct.operations.register_connection(sid, f"user {sid}") for sid in sids])
        let_time_pass(own_client, namespace, 91)
        proxy.replies, proxy.cuts = [], cuts
        return sorted(gone.sid for gone in manager.cleanup_stale_connections())

    # The manager meets its script first, so that every reply in the second round is one of a batch.
    assert clean_up([]) == sids
    assert clean_up([]) == sids
    length = len(proxy.replies[batch])

    assert clean_up([*[None] * batch, int(share * length)]) == sids

    assert len(proxy.replies) == 4
    assert read_keyspace(own_client, namespace).ttls_ms == {}
    manager.close()


def send(client: redis.Redis, operation: Operation[Any]) -> Any:
    """Send the very command of an operation, as a client does that sends it again."""
    client.script_load(operation.script.source)
    return operation.parse(client.execute_command(*operation.command(), NEVER_DECODE=True))


class TestTheSameOperationTwice:
    """A description made once is one call, however often it is run: for another call there is another description."""

    @pytest.mark.parametrize("name", sorted(name for name in CASES if not name.startswith("clean up")))
    def test_in_pipelines_it_answers_the_same_and_takes_effect_once(
        self, make_manager: ManagerFactory, wait: Callable[[float], None], keys: Keys, name: str
    ) -> None:
        case = CASES[name]
        manager = make_manager(**case.options)
        case.scene(manager)
        wait(case.seconds)
        operation = case.call(_Describing(manager))  # type: ignore[arg-type]

        (first,) = manager.pipeline([operation])
        before = keys()
        (second,) = manager.pipeline([operation])
        third, fourth = manager.pipeline([operation, operation])

        assert first == second == third == fourth
        after = keys()
        assert (after.records, after.users, after.games) == (before.records, before.users, before.games)
        assert after.last_seen == before.last_seen

    def test_two_descriptions_of_the_same_are_two_calls(self, manager: ConnectionManager) -> None:
        operations = manager.operations
        first, second = manager.pipeline([operations.register_connection("sid", "user") for _ in range(2)])
        assert second.connection.epoch > first.connection.epoch

    def test_a_batch_of_a_cleanup_removes_no_others_when_it_is_sent_again(
        self, manager: ConnectionManager, client: redis.Redis, wait: Callable[[float], None]
    ) -> None:
        operation = manager.operations.cleanup_batch(threshold_seconds=30)
        manager.register_connection("first", "user-1")
        wait(31)
        assert [gone.sid for gone in send(client, operation).removed] == ["first"]
        manager.register_connection("second", "user-2")
        wait(31)

        assert [gone.sid for gone in send(client, operation).removed] == ["first"]
        assert manager.get_connection("second") is not None


class _Describing:
    """Calls a manager's operations by the names of its methods, and gives their descriptions."""

    def __init__(self, manager: ConnectionManager) -> None:
        self.operations = manager.operations

    def __getattr__(self, name: str) -> Any:
        return getattr(self.operations, name)


class TestACallThatComesAgainLate:
    """Between the two times others have acted: it touches nothing of theirs, and answers as at first."""

    def test_a_register_does_not_displace_the_newer_connection(
        self, manager: ConnectionManager, client: redis.Redis, keys: Keys
    ) -> None:
        operation = manager.operations.register_connection("sid", "user")
        first = send(client, operation)
        newer = manager.register_connection("newer", "user")
        assert newer.displaced == (first.connection,)

        assert send(client, operation) == first

        assert manager.get_user_connection("user") == newer.connection
        assert list(keys().records) == ["newer"]

    def test_a_register_that_displaced_reports_the_same_ones_and_no_newer_one(
        self, manager: ConnectionManager, client: redis.Redis
    ) -> None:
        manager.register_connection("old", "user")
        manager.join_game("old", "game")
        operation = manager.operations.register_connection("sid", "user")
        first = send(client, operation)
        manager.register_connection("newer", "user")

        again = send(client, operation)

        assert again == first
        assert [(gone.sid, gone.game_id) for gone in again.displaced] == [("old", "game")]
        assert manager.get_connection("newer") is not None

    def test_a_register_does_not_come_back_after_the_disconnect(
        self, manager: ConnectionManager, client: redis.Redis, keys: Keys
    ) -> None:
        operation = manager.operations.register_connection("sid", "user")
        first = send(client, operation)
        manager.unregister_connection("sid")

        assert send(client, operation) == first
        assert keys().ttls_ms == {}

    def test_a_register_does_not_take_the_sid_from_its_next_owner(
        self, manager: ConnectionManager, client: redis.Redis
    ) -> None:
        operation = manager.operations.register_connection("sid", "user")
        first = send(client, operation)
        next_owner = manager.register_connection("sid", "next owner")

        assert send(client, operation) == first
        assert manager.get_connection("sid") == next_owner.connection

    def test_a_register_that_resumed_does_not_resume_again(
        self, manager: ConnectionManager, client: redis.Redis
    ) -> None:
        one_is_detached(manager)
        operation = manager.operations.register_connection("sid", "user")
        first = send(client, operation)
        manager.unregister_connection("sid", grace_seconds=30)
        detached = manager.get_connection("sid")

        again = send(client, operation)

        assert (again, again.resumed) == (first, True)
        assert manager.get_connection("sid") == detached
        assert not manager.is_user_online("user")

    def test_a_register_that_was_accepted_is_not_refused_because_a_newer_one_is_alive(
        self, make_manager: ManagerFactory, client: redis.Redis
    ) -> None:
        manager = make_manager(displacement="reject_while_alive")
        operation = manager.operations.register_connection("sid", "user")
        first = send(client, operation)
        manager.unregister_connection("sid")
        newer = manager.register_connection("newer", "user")

        again = send(client, operation)

        assert (again, again.refused) == (first, False)
        assert manager.get_user_connection("user") == newer.connection

    def test_a_join_does_not_join_again_after_a_leave(
        self, manager: ConnectionManager, client: redis.Redis, keys: Keys
    ) -> None:
        one_plays(manager)
        operation = manager.operations.join_game("old", "next game")
        first = send(client, operation)
        manager.leave_game("old")

        assert send(client, operation) == first == JoinResult(True, "game")
        assert keys().games == {}

    def test_a_join_does_not_take_the_connection_out_of_its_next_game(
        self, manager: ConnectionManager, client: redis.Redis
    ) -> None:
        one_is_there(manager)
        operation = manager.operations.join_game("old", "game")
        first = send(client, operation)
        manager.join_game("old", "next game")

        assert send(client, operation) == first == JoinResult(True)
        assert manager.get_game_user_sids("next game") == {"user": "old"}
        assert manager.get_game_connections("game") == []

    @pytest.mark.parametrize("by_now", ["gone", "registered again"])
    def test_a_join_or_an_update_still_says_what_it_did_when_its_registration_is_no_more(
        self, manager: ConnectionManager, by_now: str
    ) -> None:
        epoch = manager.register_connection("sid", "user").connection.epoch
        operations: list[Any] = [
            manager.operations.join_game("sid", "game", epoch=epoch),
            manager.operations.update_metadata("sid", "metadata", epoch=epoch),
        ]
        first = manager.pipeline(operations)
        assert all(first)
        if by_now == "gone":
            manager.unregister_connection("sid")
        else:
            manager.register_connection("sid", "user")
        assert manager.pipeline(operations) == first

    def test_a_join_still_says_that_it_joined_when_the_game_is_full_by_now(
        self, manager: ConnectionManager, client: redis.Redis
    ) -> None:
        one_is_there(manager)
        operation = manager.operations.join_game("old", "game", capacity=1)
        first = send(client, operation)
        manager.leave_game("old")
        manager.register_connection("other", "other user")
        manager.join_game("other", "game", capacity=1)

        assert send(client, operation) == first == JoinResult(True)
        assert manager.get_game_user_sids("game") == {"other user": "other"}

    def test_a_leave_does_not_leave_the_next_game(self, manager: ConnectionManager, client: redis.Redis) -> None:
        one_plays(manager)
        operation = manager.operations.leave_game("old")
        assert send(client, operation) == "game"
        manager.join_game("old", "next game")

        assert send(client, operation) == "game"
        assert manager.get_game_user_sids("next game") == {"user": "old"}

    @pytest.mark.parametrize("grace_seconds", [None, 30])
    def test_an_unregister_does_not_touch_the_sid_that_was_registered_anew(
        self, manager: ConnectionManager, client: redis.Redis, grace_seconds: float | None
    ) -> None:
        one_plays(manager)
        operation = manager.operations.unregister_connection("old", grace_seconds=grace_seconds)
        first = send(client, operation)
        anew = manager.register_connection("old", "user")
        assert anew.resumed is (grace_seconds is not None)

        assert send(client, operation) == first
        assert manager.get_connection("old") == anew.connection
        assert manager.is_user_online("user")

    def test_an_unregister_without_a_grace_leaves_the_one_that_is_detached_by_now(
        self, manager: ConnectionManager, client: redis.Redis
    ) -> None:
        one_plays(manager)
        operation = manager.operations.unregister_connection("old")
        first = send(client, operation)
        manager.register_connection("old", "user")
        manager.unregister_connection("old", grace_seconds=30)
        detached = manager.get_connection("old")

        assert send(client, operation) == first
        assert manager.get_connection("old") == detached


def another_has_the_sid(manager: ConnectionManager) -> None:
    manager.register_connection("old", "another user", metadata="another")
    manager.join_game("old", "next game")


SCENES = (
    nothing,
    one_is_there,
    one_plays,
    one_is_detached,
    the_next_game_is_full,
    one_has_metadata,
    another_has_the_sid,
)
"""What a call may find when it runs, and what has come since when it is sent again."""


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda operations: operations.join_game("old", "next game"), id="join"),
        pytest.param(lambda operations: operations.join_game("old", "next game", capacity=2), id="join if free"),
        pytest.param(lambda operations: operations.join_game("old", "game", epoch=1), id="join by epoch"),
        pytest.param(lambda operations: operations.leave_game("old"), id="leave"),
        pytest.param(lambda operations: operations.unregister_connection("old"), id="unregister"),
        pytest.param(lambda operations: operations.unregister_connection("old", grace_seconds=30), id="detach"),
        pytest.param(lambda operations: operations.unregister_connection("old", epoch=1), id="unregister by epoch"),
        pytest.param(lambda operations: operations.update_metadata("old", "before"), id="set the metadata"),
        pytest.param(lambda operations: operations.update_metadata("old", ""), id="clear the metadata"),
    ],
)
def test_a_call_that_is_sent_again_says_the_same_and_changes_nothing_whatever_has_come_since(
    server_url: str, client: redis.Redis, namespace: str, keys: Keys, call: Callable[[Operations], Operation[Any]]
) -> None:
    """Also one that found nothing to do: of those that may be sent again, that answer is kept, too."""

    def forget(kinds: str) -> None:
        if names := client.keys(f"{{{namespace}}}:{kinds}"):
            client.delete(*names)

    with ConnectionManager.from_url(server_url, namespace=namespace) as manager:
        for found, has_come in product(SCENES, repeat=2):
            found(manager)
            operation = call(manager.operations).having(keep=b"1")
            first = send(client, operation)
            forget("[^r]*")  # All but the answers.
            has_come(manager)
            before = keys()

            assert send(client, operation) == first, (found.__name__, has_come.__name__)

            after = keys()
            assert (after.records, after.users, after.games) == (before.records, before.users, before.games)
            assert after.last_seen == before.last_seen
            forget("*")


def test_an_answer_is_kept_for_a_minute_and_no_longer(manager: ConnectionManager, keys: Keys) -> None:
    one_plays(manager)
    manager.leave_game("old")
    manager.unregister_connection("old")

    answers = [ttl for key, ttl in keys().other_ttls_ms.items() if ":reply:" in key]

    assert len(answers) == 4
    assert all(0 < ttl <= 60_000 for ttl in answers)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda manager: manager.register_connection("new", "user"), id="register, refused"),
        pytest.param(lambda manager: manager.unregister_connection("unknown"), id="unregister"),
        pytest.param(lambda manager: manager.unregister_connection("rests", grace_seconds=60), id="detach again"),
        pytest.param(lambda manager: manager.join_game("unknown", "game"), id="join"),
        pytest.param(lambda manager: manager.join_game("sid", "game"), id="join the own game"),
        pytest.param(lambda manager: manager.join_game("sid", "full", capacity=1), id="join a full game"),
        pytest.param(lambda manager: manager.leave_game("rests"), id="leave"),
        pytest.param(lambda manager: manager.update_metadata("rests", "new"), id="update the metadata"),
        pytest.param(lambda manager: manager.update_metadata("sid", "old"), id="update to the same metadata"),
        pytest.param(lambda manager: manager.cleanup_stale_connections(), id="clean up"),
        pytest.param(lambda manager: manager.cleanup_server("unknown"), id="clean up a server"),
    ],
)
def test_a_call_that_finds_nothing_to_do_keeps_no_answer(
    make_manager: ManagerFactory, keys: Keys, call: Callable[[ConnectionManager], object]
) -> None:
    manager = make_manager(displacement="reject_while_alive")
    for sid, user_id, game_id in (("sid", "user", "game"), ("rests", "another user", "full")):
        manager.register_connection(sid, user_id, metadata="old")
        manager.join_game(sid, game_id)
    manager.unregister_connection("rests", grace_seconds=60)
    call(manager)  # The server has the script now: the copy after a script was loaded keeps its answer.
    before = keys()

    call(manager)

    after = keys()
    assert after.other_ttls_ms.keys() == before.other_ttls_ms.keys()
    assert (after.records, after.last_seen) == (before.records, before.last_seen)


def test_a_batch_of_a_cleanup_that_comes_late_removes_nothing_and_answers_what_it_had_removed_in_time(
    manager: ConnectionManager, client: redis.Redis, wait: Callable[[float], None], keys: Keys
) -> None:
    one_plays(manager)
    wait(91)
    before = keys()

    def now_ms() -> int:
        seconds, microseconds = client.time()
        return int(seconds) * 1000 + int(microseconds) // 1000

    late = send(client, manager.operations.cleanup_batch(not_after_ms=now_ms() - 1))
    assert (late.removed, late.is_late, late.is_last) == ((), True, True)
    assert keys().records == before.records
    assert keys().other_ttls_ms.keys() == before.other_ttls_ms.keys()

    operation = manager.operations.cleanup_batch(not_after_ms=now_ms() + 60_000)
    in_time = send(client, operation)
    assert ([gone.sid for gone in in_time.removed], in_time.is_late) == (["old"], False)
    # The same call, whose time is over now.
    assert send(client, operation.having(not_after_ms=b"%d" % (now_ms() - 1))) == in_time


class TestTheAnswerOfARegister:
    """It is kept with the user's list of connections, and in its first minute outlives it under its own key."""

    @pytest.fixture
    def kept(self, client: redis.Redis, namespace: str) -> Callable[[], tuple[int, bool]]:
        """Tell how many answers have a key of their own, and whether the list of the user holds one."""

        def read() -> tuple[int, bool]:
            names = [str(name) for name in client.scan_iter(match=f"{{{namespace}}}:*")]
            users_list = client.get(f"{{{namespace}}}:user_conns:user")
            return sum(":reply:" in name for name in names), "=" in str(users_list)

        return read

    @pytest.mark.parametrize(("seconds", "moved"), [(59, 1), (61, 0)])
    def test_it_moves_in_its_first_minute_when_another_comes_or_the_list_goes(
        self,
        manager: ConnectionManager,
        kept: Callable[[], tuple[int, bool]],
        wait: Callable[[float], None],
        seconds: float,
        moved: int,
    ) -> None:
        manager.register_connection("sid", "user")
        assert kept() == (0, True)
        wait(seconds)
        manager.register_connection("newer", "user")
        assert kept() == (moved, True)
        wait(seconds)
        manager.unregister_connection("newer")
        assert kept() == (2 * moved + 1, False)  # The unregister's own one is there too.

    def test_it_goes_when_the_ttls_are_refreshed(
        self,
        manager: ConnectionManager,
        client: redis.Redis,
        namespace: str,
        kept: Callable[[], tuple[int, bool]],
        wait: Callable[[float], None],
    ) -> None:
        def refresh() -> None:
            # A heartbeat refreshes the TTLs for certain when the one before was long ago.
            client.zincrby(f"{{{namespace}}}:last_seen", -15 * 60_000, "sid")
            assert manager.update_heartbeat("sid")

        manager.register_connection("sid", "user")
        wait(55)
        refresh()  # The answer may still be asked for.
        assert kept() == (0, True)
        wait(55)
        refresh()
        assert kept() == (0, False)
        assert manager.register_connection("newer", "user").displaced[0].sid == "sid"

    @pytest.mark.parametrize(("seconds", "runs_again"), [(-3600, False), (59, False), (61, True)])
    def test_it_is_given_for_a_minute(
        self,
        manager: ConnectionManager,
        client: redis.Redis,
        wait: Callable[[float], None],
        seconds: float,
        runs_again: bool,
    ) -> None:
        operation = manager.operations.register_connection("sid", "user")
        send(client, operation)
        wait(seconds)
        before = manager.get_connection("sid")
        assert before
        send(client, operation)
        after = manager.get_connection("sid")
        assert after
        assert (after.epoch > before.epoch) is runs_again


@pytest.mark.parametrize("how", ["unregistered", "cleaned up"])
def test_a_register_sent_again_answers_the_same_when_another_of_the_users_connections_has_gone_meanwhile(
    make_manager: ManagerFactory, wait: Callable[[float], None], how: str
) -> None:
    manager = make_manager(connections_per_user=2)
    for sid in ("a", "b"):
        manager.register_connection(sid, "user")
    register = manager.operations.register_connection("c", "user")
    wait(91)
    (first,) = manager.pipeline([register])
    if how == "unregistered":
        assert manager.unregister_connection("b")
    else:
        assert [gone.sid for gone in manager.cleanup_stale_connections().removed] == ["b"]

    (again,) = manager.pipeline([register])

    assert again == first
    assert [gone.sid for gone in again.displaced] == ["a"]


def carried(exchange: Any, request: Sequence[Command], answer: Callable[[Sequence[Command]], list[Any]]) -> Any:
    """Carry an exchange to its end; give its result."""
    try:
        while True:
            request = exchange.send(answer(request))
    except StopIteration as finished:
        return finished.value


LOST = redis.ConnectionError("the connection broke")


def fault_of_a_read(command: Command) -> Exception | None:
    is_read = command[1] == Operations("ns").get_connection_count().command()[1]
    return redis.ConnectionError("the connection broke") if is_read else None


class TestWhatFollowsACallThatWasRefused:
    """In a pipeline it is asked again where it has left no trace; an answer that reports a change stays."""

    @pytest.mark.parametrize("refusal", [NoScriptError("NOSCRIPT"), ReadOnlyError("READONLY")])
    def test_is_asked_again_only_where_it_has_read_or_found_nothing_to_do(self, refusal: Exception) -> None:
        operations = Operations("ns")
        described: list[Operation[Any]] = [
            operations.leave_game("changed nothing, but came before"),
            operations.leave_game("refused"),
            operations.leave_game("changed something"),
            operations.leave_game("changed nothing"),
            operations.get_connection_count(),
        ]
        exchange = perform_all(described)
        load, _, *calls = next(exchange)
        asked = exchange.send([b"sha", b"sha", b"", refusal, b"game", b"", 1])
        if isinstance(refusal, NoScriptError):
            assert asked == [load]
            asked = exchange.send([b"sha"])
            assert asked[0] == calls[1]
        else:
            assert list(asked) == [sent_again(described[1].command())]
            asked = exchange.send([b"game"])
        *before, next_to_last, last = asked
        # What had run already has another token: it keeps no answer that it would be given again.
        reply_key = calls[3][5]
        assert next_to_last[:5] == calls[3][:5]
        assert next_to_last[5] != reply_key
        assert last == calls[4]
        answers: list[Any] = [b"game"] * (isinstance(refusal, NoScriptError) or len(before))
        with pytest.raises(StopIteration) as finished:
            exchange.send([*answers, b"next game", 2])
        assert finished.value.value == [None, "game", "game", "next game", 2]

    def test_may_be_nothing(self) -> None:
        operations = Operations("ns")
        exchange = perform_all([operations.get_connection_count(), operations.leave_game("refused")])
        next(exchange)
        asked = exchange.send([b"sha", b"sha", 7, ReadOnlyError("READONLY")])
        assert len(asked) == 1
        with pytest.raises(StopIteration) as finished:
            exchange.send([b"game"])
        assert finished.value.value == [7, "game"]

    NOW = struct.pack("<d", 1_795_000_000_000_000)
    FOLLOWING: ClassVar[dict[str, tuple[list[tuple[str, tuple[Any, ...], Any]], list[int]]]] = {
        "a register that was refused": (
            [("register_connection", ("b", "user"), NOW + b" refused 1  1 a0:1 user")],
            [1],
        ),
        "a register": ([("register_connection", ("b", "user"), NOW)], []),
        "a join that found the game full": ([("join_game", ("b", "game"), 1)], [1]),
        "a join that found no connection": ([("join_game", ("b", "game"), 0)], [1]),
        "a join that left no game": ([("join_game", ("b", "game"), b"")], []),
        "a join that left no game, of the connection that was refused": (
            [("join_game", ("refused", "game"), b"")],
            [1],
        ),
        "a join that left one": ([("join_game", ("b", "game"), b"another")], []),
        "heartbeats of which one was unknown": ([("heartbeat_batch", (["a", "b"],), [1, 0])], [1]),
        "heartbeats that were all seen": ([("heartbeat_batch", (["a", "b"],), [])], [1]),
        "a heartbeat": ([("update_heartbeat", ("b",), 1)], [1]),
        "a heartbeat of the game server": ([("update_server_heartbeat", (), 1)], [1]),
        "a cleanup that found nobody": ([("cleanup_batch", (), [b"1795000000000", 0])], [1]),
        "a cleanup before a register": (
            [("cleanup_server_batch", ("server",), [b"1795000000000", 0]), ("register_connection", ("b", "user"), NOW)],
            [],
        ),
        "a leave before a heartbeat": ([("leave_game", ("b",), b""), ("update_heartbeat", ("b",), 1)], [1, 2]),
        "a leave before a join": ([("leave_game", ("b",), b""), ("join_game", ("b", "game"), b"")], []),
        "a count before a start": ([("get_connection_count", (), 1), ("start_server", (), 1_795_000_000_000_000)], [1]),
        "a refused register before an unregister of its user": (
            [
                ("register_connection", ("b", "user"), NOW + b" refused 1  1 a0:1 user"),
                ("unregister_connection", ("a",), [b"1", b"0:1 user", b"1"]),
            ],
            [],
        ),
        "a cleanup that removed one": ([("cleanup_batch", (), [b"1795000000000", 1, b"c", b"0:1 user", b"1"])], []),
        "an unregister before its register": (
            [("unregister_connection", ("b",), []), ("register_connection", ("b", "user"), NOW)],
            [],
        ),
        "an unregister before another's register": (
            [("unregister_connection", ("b",), []), ("register_connection", ("c", "user"), NOW)],
            [1],
        ),
        "a cleanup before a start": (
            [("cleanup_batch", (), [b"1795000000000", 0]), ("start_server", (), 1_795_000_000_000_000)],
            [1],
        ),
        "a read before a register that was refused as well": (
            [("get_connection", ("b",), []), ("register_connection", ("b", "user"), ReadOnlyError("READONLY"))],
            [1],
        ),
        "two reads among changes": (
            [
                ("leave_game", ("b",), b"game"),
                ("get_connection", ("c",), []),
                *[("leave_game", ("b",), b"game")] * 6,
                ("get_connection", ("c",), []),
            ],
            [2, 9],
        ),
        "a read before the change": (
            [("get_connection", ("b",), []), ("update_metadata", ("b", "metadata"), 1), ("get_connection", ("b",), [])],
            [3],
        ),
    }

    @pytest.mark.parametrize(("following", "again"), FOLLOWING.values(), ids=FOLLOWING)
    def test_is_told_by_each_script_in_its_own_way(
        self, following: list[tuple[str, tuple[Any, ...], Any]], again: list[int]
    ) -> None:
        operations = Operations("ns", server_id="server")
        operations.boot_epoch = 1
        described = [getattr(operations, name)(*arguments) for name, arguments, _ in following]
        commands = [operations.leave_game("refused").command(), *(operation.command() for operation in described)]
        replies = [ReadOnlyError("READONLY"), *(reply for *_, reply in following)]
        assert with_what_follows([0], commands, replies) == [0, *again]

    @pytest.mark.parametrize(
        ("settings", "describe", "answers", "games"),
        [
            (
                {"displacement": "reject_while_alive"},
                lambda o: [o.unregister_connection("a"), o.register_connection("b", "user")],
                lambda removed, made: removed.sid == "a" and made,
                {"b": None},
            ),
            (
                {"connections_per_user": 2},
                lambda o: [o.leave_game("a"), o.register_connection("b", "user"), o.join_game("b", "game", capacity=1)],
                lambda left, made, joined: left == "game" and made and joined,
                {"a": None, "b": "game"},
            ),
            (
                {},
                lambda o: [o.register_connection("b", "user"), o.heartbeat_batch(["b"])],
                lambda made, statuses: made and statuses == [HeartbeatStatus.SEEN],
                {"b": None},
            ),
            (
                {},
                lambda o: [o.update_metadata("a", b"x"), o.join_game("a", "game"), o.leave_game("a")],
                lambda is_there, joined, left: is_there and joined and left == "game",
                {"a": None},
            ),
            (
                {"connections_per_user": 2},
                lambda o: [o.leave_game("a"), o.unregister_connection("b"), o.register_connection("b", "user")],
                lambda left, removed, made: left == "game" and removed is None and made,
                {"a": None, "b": None},
            ),
            (
                {"displacement": "reject_while_alive"},
                lambda o: [o.leave_game("a"), o.register_connection("b", "user"), o.cleanup_batch(0.001)],
                lambda _, made, cleanup: made.refused and [gone.sid for gone in cleanup.removed] == ["a"],
                {},
            ),
        ],
        ids=[
            "refused register",
            "full game",
            "unknown heartbeat",
            "join of who is there",
            "unregister before register",
            "refused register before cleanup",
        ],
    )
    def test_leaves_what_all_would_in_their_order(
        self,
        server_url: str,
        namespace: str,
        monkeypatch: pytest.MonkeyPatch,
        settings: dict[str, Any],
        describe: Callable[[Operations], list[Operation[Any]]],
        answers: Callable[..., object],
        games: dict[str, str | None],
    ) -> None:
        send, has_lost_one = pooling.send, False

        def lose_the_first_script(pool: Any, request: Any) -> list[Any]:
            nonlocal has_lost_one
            if has_lost_one:
                return send(pool, request)
            has_lost_one = True
            lost = next(index for index, command in enumerate(request) if command[0] == "EVALSHA")
            replies = send(pool, [command for index, command in enumerate(request) if index != lost])
            return [*replies[:lost], NoScriptError("NOSCRIPT"), *replies[lost:]]

        with ConnectionManager.from_url(server_url, namespace=namespace, **settings) as manager:
            manager.register_connection("a", "user")
            manager.join_game("a", "game")
            monkeypatch.setattr(pooling, "send", lose_the_first_script)
            time.sleep(0.005)
            assert answers(*manager.pipeline(describe(manager.operations)))
            assert {one.sid: one.game_id for one in manager.get_all_user_connections("user")} == games

    @pytest.mark.parametrize("refusal", [NoScriptError("NOSCRIPT"), ReadOnlyError("READONLY")])
    def test_keeps_its_answer_where_its_repetition_meets_a_fault(self, refusal: Exception) -> None:
        operations = Operations("ns")
        exchange = perform_all([operations.leave_game("sid"), operations.get_connection_count()])
        load, *_ = next(exchange)

        def answer(request: Sequence[Command]) -> list[Any]:
            """Let what was refused run now, and then the connection break."""
            return [b"sha" if command[0] == load[0] else fault_of_a_read(command) or b"game" for command in request]

        assert carried(exchange, exchange.send([b"sha", b"sha", refusal, 7]), answer) == ["game", 7]

    @pytest.mark.parametrize("refusal", [NoScriptError("NOSCRIPT"), ReadOnlyError("READONLY")])
    def test_does_not_keep_it_where_that_may_have_changed_something(self, refusal: Exception) -> None:
        operations = Operations("ns")
        described = [operations.leave_game("refused"), operations.leave_game("in no game yet")]
        exchange = perform_all(described)
        load, refused, _ = next(exchange)

        def answer(request: Sequence[Command]) -> list[Any]:
            """Let what was refused run now, and lose the reply to what follows it."""
            return [b"sha" if command == load else b"game" if command == refused else LOST for command in request]

        with pytest.raises(PipelineError) as raised:
            carried(exchange, exchange.send([b"sha", refusal, b""]), answer)
        left, error = raised.value.results
        assert left == "game"
        assert isinstance(error, ServerUnreachableError)

    @pytest.mark.parametrize("met", [LOST, redis.ResponseError("BUSY"), NoScriptError("NOSCRIPT")])
    def test_so_does_it_on_a_cluster(self, monkeypatch: pytest.MonkeyPatch, met: Exception) -> None:
        """Unless it has missed its script, and is still to run."""
        monkeypatch.setattr("presence.retrying.cluster_pauses", lambda _request: iter([0.1, 0.2]))
        operations = Operations("ns")
        request = [operations.leave_game("sid").command(), operations.get_connection_count().command()]
        fault, replies = redis.ConnectionError("the connection broke"), dict[int, Any]()
        for pause, part in attempts(request, replies, tries_again=True):
            first = {0: fault, 1: 7} if not pause else {0: b"game", 1: met}
            # What may have run keeps its answer in any case.
            assert 0 not in part or part[0][7:] == ((b"", b"", b"1") if pause else ())
            replies |= {index: first[index] for index in part}
        assert replies == {0: b"game", 1: met if isinstance(met, NoScriptError) else 7}

    @pytest.mark.parametrize(
        ("following", "answers", "told"),
        [
            (lambda o: o.get_connection_count(), (7, 8), 8),
            (lambda o: o.leave_game("b"), (b"", b"game"), b"game"),
            (lambda o: o.leave_game("b"), (b"", LOST), LOST),
        ],
        ids=["a read", "a change", "a change whose reply is lost"],
    )
    def test_has_the_answer_to_its_repetition_on_a_cluster(
        self,
        monkeypatch: pytest.MonkeyPatch,
        following: Callable[[Operations], Operation[Any]],
        answers: tuple[Any, Any],
        told: Any,
    ) -> None:
        monkeypatch.setattr("presence.retrying.cluster_pauses", lambda _request: iter([0.1]))
        operations = Operations("ns")
        request = [operations.leave_game("a").command(), following(operations).command()]
        replies: dict[int, Any] = {}
        for pause, part in attempts(request, replies, tries_again=True):
            assert list(part) == [0, 1]
            replies |= {0: b"game" if pause else LOST, 1: answers[bool(pause)]}
        assert replies == {0: b"game", 1: told}

    def test_has_its_new_token_for_good(self) -> None:
        """Under the first one it has an answer, which it would be given again."""
        operations = Operations("ns")
        request = [operations.leave_game("a").command(), operations.leave_game("b").command()]
        fault, replies, tokens = redis.ConnectionError("the connection broke"), dict[int, Any](), []
        for _, part in islice(attempts(request, replies, tries_again=True), 3):
            tokens.append([command[5] for command in part.values()])
            replies |= {0: fault, 1: fault} if len(tokens) > 1 else {0: fault, 1: b""}
        (of_a, of_b), (again_of_a, new_of_b), last = tokens
        assert again_of_a == of_a
        assert new_of_b != of_b
        assert last == [of_a, new_of_b]

    def test_so_it_is_on_a_cluster(self) -> None:
        fault = redis.ConnectionError("the connection broke")
        read = Operations("ns").get_connection_count().command()
        request: list[Any] = [("EVALSHA", b"changed nothing"), ("EVALSHA", b"refused"), ("EVALSHA", b"changed"), read]
        replies: dict[int, Any] = {}
        attempt = attempts(request, replies, tries_again=True)
        assert next(attempt) == (0, dict(enumerate(request)))
        replies |= {0: b"", 1: fault, 2: b"game", 3: 1}
        _, part = next(attempt)
        assert part == {1: request[1], 3: read}

    @pytest.mark.parametrize("tries_again", [True, False])
    @pytest.mark.parametrize(
        "redirection",
        [
            redis.exceptions.TryAgainError("TRYAGAIN"),
            redis.exceptions.AskError("1 host:2"),
            redis.exceptions.MovedError("1 host:2"),
        ],
    )
    def test_goes_again_one_by_one_and_at_once_where_the_slot_moves(
        self, redirection: Exception, tries_again: bool
    ) -> None:
        """Only a call that is sent alone is redirected by the client."""
        operations = Operations("ns")
        described: list[Operation[Any]] = [
            operations.leave_game("a"),
            operations.join_game("b", "game"),
            operations.leave_game("b"),
            operations.get_connection("b"),
        ]
        request = [operation.command() for operation in described]
        replies: dict[int, Any] = {}
        attempt = attempts(request, replies, tries_again=tries_again)
        assert next(attempt) == (0, dict(enumerate(request)))
        replies |= {0: b"game", 1: redirection, 2: b"", 3: []}
        assert next(attempt) == (0, {1: sent_again(request[1])})
        replies[1] = b""
        pause, part = next(attempt)
        assert (pause, list(part), part[2][:5]) == (0, [2], request[2][:5])
        assert part[2][5] != request[2][5]
        replies[2] = LOST
        again = next(attempt, None)
        if not tries_again:
            assert again is None
            return
        # Under the token that it has got: under the first it has found nothing.
        assert again is not None
        assert again[0] > 0
        assert again[1] == {2: sent_again(part[2]), 3: request[3]}
        replies |= {2: redirection, 3: redirection}
        assert next(attempt) == (0, {2: sent_again(part[2])})
        again = next(attempt)
        assert again[0] > 0, "it does not go at once for ever"
        assert list(again[1]) == [2, 3]


REJECT: Displacement = "reject_while_alive"


@pytest.mark.parametrize(
    ("error", "may_pass"),
    [
        (OSError(), True),
        (redis.ConnectionError(), True),
        (redis.TimeoutError(), True),
        (redis.exceptions.ClusterDownError("CLUSTERDOWN"), True),
        (redis.exceptions.SlotNotCoveredError(), True),
        (redis.exceptions.AskError("1 host:2"), True),
        (redis.exceptions.MovedError("1 host:2"), True),
        (redis.exceptions.TryAgainError(), True),
        (redis.exceptions.RedisClusterException(), False),
        (redis.AuthenticationError(), False),
        (redis.exceptions.AuthorizationError(), False),
        (redis.ResponseError("BUSY"), False),
        (NoScriptError(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_on_a_cluster_a_fault_that_may_pass_is_met_by_trying_again(error: Exception, may_pass: bool) -> None:
    without_layout = redis.exceptions.RedisClusterException("the layout cannot be read")
    without_layout.__cause__ = error
    assert transient_faults([None, error, without_layout]) == ([1, 2] if may_pass else [])


class TestAFirstCopyThatComesLate:
    """Lost packets hold a request up for longer than its timeout: it arrives when another copy has been answered."""

    @pytest.fixture
    def late(self, own_server: LocalServer, own_client: redis.Redis, make_manager: ManagerFactory) -> Iterator[Late]:
        with Proxy(own_server.port) as proxy:
            yield Late(proxy, own_client, make_manager(own_server.url, displacement=REJECT), make_manager)

    def test_leaves_no_game_that_was_joined_since(self, late: Late) -> None:
        late.other.register_connection("sid", "alice")
        with late.held():
            assert late.manager.leave_game("sid") is None
            assert late.manager.join_game("sid", "game")
        assert late.game_of("sid") == "game"

    def test_joins_no_game_that_was_full(self, late: Late) -> None:
        for sid in ("sid", "another"):
            late.other.register_connection(sid, f"user of {sid}")
        late.other.join_game("another", "game")
        with late.held():
            assert late.manager.join_game("sid", "game", capacity=1).is_full
            late.other.leave_game("another")
            assert late.manager.join_game("sid", "next game")
        assert late.game_of("sid") == "next game"

    def test_joins_no_game_that_it_was_in_already(self, late: Late) -> None:
        late.other.register_connection("sid", "alice")
        late.other.join_game("sid", "game")
        with late.held():
            assert late.manager.join_game("sid", "game").left_game_id is None
            assert late.manager.leave_game("sid") == "game"
        assert late.game_of("sid") is None

    def test_removes_no_connection_that_was_registered_since(self, late: Late) -> None:
        with late.held():
            assert late.manager.unregister_connection("sid") is None
            assert late.manager.register_connection("sid", "alice")
        assert late.other.update_heartbeat("sid")

    @pytest.mark.parametrize("metadata", ["later", "first"])
    def test_sets_no_metadata_of_one_that_was_registered_since(self, late: Late, metadata: str) -> None:
        """Nor where it had found its own value there."""
        if metadata == "first":
            late.other.register_connection("sid", "alice", metadata="late")
        with late.held():
            assert late.manager.update_metadata("sid", "late") is (metadata == "first")
            late.other.register_connection("sid", "alice", metadata=metadata)
        found = late.other.get_connection("sid")
        assert found is not None
        assert found.metadata == metadata.encode()

    def test_registers_nobody_who_was_refused(self, late: Late) -> None:
        late.other.register_connection("first", "alice")
        with late.held():
            assert late.manager.register_connection("sid", "alice").refused
            late.other.unregister_connection("first")
        assert not late.other.is_user_online("alice")

    def test_undoes_nothing_in_a_pipeline_all_of_whose_replies_were_lost(self, late: Late) -> None:
        describe = late.manager.operations
        late.proxy.fates = [Fate.LOSE_REPLY]
        removed, made = late.manager.pipeline(
            [describe.unregister_connection("sid"), describe.register_connection("sid", "alice")]
        )
        assert removed is None
        assert made
        assert late.other.update_heartbeat("sid")

    def test_cleans_up_nobody_who_is_reported_to_no_one(self, late: Late) -> None:
        with late.held():
            assert not late.manager.cleanup_stale_connections(0.05)
            late.other.register_connection("sid", "alice")
            time.sleep(0.1)
        assert [gone.sid for gone in late.other.cleanup_stale_connections(0.05)] == ["sid"]


def test_the_copy_after_a_script_was_loaded_keeps_its_answer_as_well() -> None:
    """One before it may be on its way still."""
    operation = Operations("ns").leave_game("sid")
    exchange = perform(operation)
    assert list(next(exchange)) == [operation.command()]
    exchange.send([NoScriptError("NOSCRIPT")])
    assert exchange.send([b"sha"]) == [sent_again(operation.command())]


def test_a_script_that_is_lost_again_is_loaded_twice_more_together_with_its_call() -> None:
    operation = Operations("ns").leave_game("sid")
    load, call = load_command(operation.script), sent_again(operation.command())
    exchange = perform(operation)
    next(exchange)
    lost = NoScriptError("NOSCRIPT")
    asked = [list(exchange.send(replies)) for replies in ([lost], [b"sha"], [lost], [b"sha", lost])]
    assert asked == [[load], [call], [load, call], [load, call]]
    with pytest.raises(UnexpectedReplyError, match="lost the script right after it was loaded"):
        exchange.send([b"sha", lost])


def test_what_is_sent_again_says_when_it_was_first_to_be_sent() -> None:
    operations = Operations("ns")
    before = monotonic()
    exchange = perform_all([operations.leave_game("a"), operations.leave_game("b")])
    request: Any = next(exchange)
    after = monotonic()
    assert not isinstance(request, Repeated)
    requests = []
    for replies in (
        [b"sha", NoScriptError("NOSCRIPT"), NoScriptError("NOSCRIPT")],
        [b"sha"],
        [NoScriptError("NOSCRIPT"), NoScriptError("NOSCRIPT")],
        [b"sha", ReadOnlyError("READONLY"), ReadOnlyError("READONLY")],
        [b"game"],
    ):
        time.sleep(0.001)
        request = exchange.send(replies)
        requests.append(request)
    load, *calls = requests
    assert not isinstance(load, Repeated), "a load may be sent at any time"
    assert [len(request) for request in calls] == [2, 3, 1, 1]
    assert len({request.since for request in calls}) == 1
    assert before <= calls[0].since <= after


@pytest.mark.parametrize("values", [{"keep": b"1", "not_after_ms": b"0"}, {"keep": b"1"}])
def test_a_batch_of_a_cleanup_does_nothing_after_another_copy_of_it_has_found_nothing(
    manager: ConnectionManager, values: dict[str, bytes]
) -> None:
    first = manager.operations.cleanup_batch(0.01, not_after_ms=1 << 50)
    assert manager.pipeline([first.having(**values)])[0].removed == ()
    manager.register_connection("sid", "user")
    time.sleep(0.05)
    assert manager.pipeline([first])[0].removed == ()
    assert manager.get_connection("sid") is not None


@pytest.mark.parametrize("threshold_seconds", [None, 0.01])
def test_run_cleanup_sends_such_a_copy_after_a_fault(threshold_seconds: float | None) -> None:
    repeated = RepeatedCleanup(Operations("ns"), 30, threshold_seconds)
    first = repeated.next()
    repeated.fail(ServerUnreachableError("away"))
    assert (repeated.next().keys, repeated.next().arguments[-1]) == (first.keys, b"1")


class Late:
    """A manager whose next call is held up on its way, another that is not, and a look at the server."""

    def __init__(
        self, proxy: Proxy, client: redis.Redis, other: ConnectionManager, make_manager: ManagerFactory
    ) -> None:
        self.client = client
        self.proxy = proxy
        self.other = other
        self.manager = make_manager(proxy.url, displacement=REJECT, socket_timeout=0.3)
        # The server has the scripts, and the manager a connection.
        for call in (self.manager.leave_game, self.manager.unregister_connection):
            call("unknown")
        for sid in ("first", "second"):
            self.manager.register_connection(sid, "warm")
        self.manager.join_game("first", "warm", capacity=2)
        self.manager.update_metadata("first", "warm")
        self.manager.unregister_connection("first")
        self.manager.cleanup_stale_connections()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the first request of the block up until its end."""
        self.proxy.fates = [Fate.HOLD_REQUEST]
        yield
        assert self.proxy.is_holding.is_set()
        before = scripts_run(self.client)
        self.proxy.release()
        wait_until(lambda: scripts_run(self.client) > before)

    def game_of(self, sid: str) -> str | None:
        found = self.other.get_connection(sid)
        assert found is not None
        return found.game_id
