"""What the README and the documentation show works as it is shown."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import types
from contextlib import ExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import socketio
import uvicorn
from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType, web
from aiohttp.test_utils import TestServer

import presence
from examples import socketio_server
from presence.sync import ConnectionManager
from tests.fault_calls import one_attempt
from tests.server import free_port
from tests.watching import wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    import redis

    from presence import Event
    from tests.server import LocalServer

CHECKOUT = Path(__file__).resolve().parent.parent


def test_the_demo_ends_well(server_url: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "examples.demo"],
        cwd=CHECKOUT,
        # Of all servers, make test-all means one that the demo would not find.
        env=os.environ | {"PRESENCE_REDIS_URL": server_url, "PRESENCE_SERVER": "PRESENCE_REDIS_URL"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    first_line, *_, last_line = finished.stdout.splitlines()
    assert re.fullmatch(r"presence demo on .*, PRESENCE_REDIS_URL", first_line), "it ran on the server under test"
    assert re.fullmatch(r"demo: all \d+ checks passed in .* s; no key of a connection is left, .*", last_line)


def test_the_readmes_example_prints_what_it_says(server_url: str, namespace: str) -> None:
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    code, printed = re.search(r"```python\n(.*?)```.*?```\n(.*?)```", readme, re.DOTALL).groups()  # type: ignore[union-attr]
    assert run(code, server_url, namespace) == printed


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110, what a socket brings about has no event
            await asyncio.sleep(0.01)


def snippet(file: str, heading: str, index: int = 0) -> str:
    """Give the first piece of Python below a heading, or a later one."""
    text = (CHECKOUT / file).read_text(encoding="utf-8")
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)[1]  # type: ignore[index]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)[index]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("file", "heading"),
    [("README.md", "Game servers and metadata"), ("README.md", "Events")],
)
def test_the_other_examples_print_what_they_say(server_url: str, namespace: str, file: str, heading: str) -> None:
    code = snippet(file, heading)
    (printed,) = re.findall(r"print\(.*\)  # (.*)", code)
    assert run(code, server_url, namespace) == f"{printed}\n"


def test_the_example_of_tests_passes() -> None:
    code = snippet("docs/game_servers.md", "Tests of an application")
    finished = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stderr) == (0, "")


def test_the_example_of_plain_websockets_serves_them(server_url: str, namespace: str) -> None:
    example: dict[str, Any] = {}
    exec(in_namespace(snippet("docs/game_servers.md", "Plain WebSockets"), server_url, namespace), example)
    manager, sockets = example["presence"], example["sockets"]

    async def accept(request: web.Request) -> web.WebSocketResponse:
        websocket = web.WebSocketResponse()
        await websocket.prepare(request)
        await example["serve"](websocket, request.match_info["user"])
        return websocket

    async def run() -> None:
        app = web.Application()
        app.add_routes([web.get("/{user}", accept)])
        async with TestServer(app) as server, ClientSession() as session:
            background = asyncio.create_task(example["run_in_background"]())
            first = await session.ws_connect(server.make_url("/alice"))
            await until(lambda: len(sockets) == 1)
            second = await session.ws_connect(server.make_url("/alice"))
            # What the second displaced is closed.
            assert await close_code(first) == 4001
            await until(lambda: len(sockets) == 1)
            assert (await manager.get_user_connection("alice")).sid in sockets

            # So is what another server's register displaced, at the next heartbeat.
            await manager.register_connection("elsewhere", "alice")
            beating = asyncio.create_task(example["beat"]())
            assert await close_code(second) == 4001
            await until(lambda: not sockets)
            assert (await manager.get_user_connection("alice")).sid == "elsewhere"
            beating.cancel()

            # Who was only detached, as if this server were dead, is asked to come back.
            third = await session.ws_connect(server.make_url("/bob"))
            await until(lambda: len(sockets) == 1)
            await manager.unregister_connection(next(iter(sockets)), grace_seconds=60)
            beating = asyncio.create_task(example["beat"]())
            assert await close_code(third) == 1013
            await until(lambda: not sockets)
            beating.cancel()

            # So is one whose connection is gone though its user has no other, as if the server had lost its data.
            fourth = await session.ws_connect(server.make_url("/bob"))
            await until(lambda: len(sockets) == 1)
            await manager.unregister_connection(next(iter(sockets)))
            beating = asyncio.create_task(example["beat"]())
            assert await close_code(fourth) == 1013
            await until(lambda: not sockets)
            for task in (beating, background):
                task.cancel()
            await asyncio.gather(beating, background, return_exceptions=True)
        assert not await manager.is_user_online("bob")
        await manager.unregister_connection("elsewhere")
        await manager.aclose()

    asyncio.run(run())


async def close_code(websocket: ClientWebSocketResponse) -> int:
    """Wait until a WebSocket is closed, and tell with which code."""
    message = await websocket.receive(timeout=10)
    assert message.type is WSMsgType.CLOSE
    return int(message.data)


def test_the_example_of_plain_websockets_does_not_keep_who_cannot_be_registered_waiting(namespace: str) -> None:
    class Socket:
        code = None

        async def close(self, code: int) -> None:
            self.code = code

    async def run() -> None:
        example: dict[str, Any] = {}
        url = f"redis://127.0.0.1:{free_port()}/0"
        exec(in_namespace(snippet("docs/game_servers.md", "Plain WebSockets"), url, namespace), example)
        socket = Socket()
        serving = asyncio.create_task(example["serve"](socket, "alice"))
        await until(lambda: socket.code == 1013)
        with pytest.raises(presence.ServerUnreachableError):
            await serving  # To unregister has failed as well.
        await example["presence"].aclose()

    asyncio.run(run())


@pytest.mark.parametrize(("heartbeat_seconds", "pause"), [("30", 5), ("0.5", 0.5)])
@pytest.mark.parametrize("heading", ["Plain WebSockets", "Blocking code"])
def test_the_examples_of_game_servers_beat_again_soon_after_a_failure(
    namespace: str, heading: str, heartbeat_seconds: str, pause: float
) -> None:
    """Else cleanup, which waits for a heartbeat of everyone, would come before them."""
    example: dict[str, Any] = {}
    code = in_namespace(snippet("docs/game_servers.md", heading), f"redis://127.0.0.1:{free_port()}/0", namespace)
    exec(code.replace("HEARTBEAT_SECONDS = 30", f"HEARTBEAT_SECONDS = {heartbeat_seconds}"), example)
    pauses: list[float] = []

    def fail(_sids: object) -> None:
        raise presence.ServerUnreachableError("it is away")

    def is_over(seconds: float) -> bool:
        pauses.append(seconds)
        return len(pauses) == 3

    async def sleep(seconds: float) -> None:
        if is_over(seconds):
            raise asyncio.CancelledError

    if heading == "Blocking code":
        example["manager"].update_heartbeats = fail
        example["stopping"] = types.SimpleNamespace(wait=is_over)
        example["beat"]()
        assert pauses[1:] == [pause] * 2, "the first is before its first heartbeat"
    else:
        example["presence"].update_heartbeats = fail
        example["asyncio"] = types.SimpleNamespace(sleep=sleep)
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(example["beat"]())
        assert pauses == [pause] * 3


def test_the_example_that_follows_displacements_closes_the_socket_at_once(
    server_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Socket:
        code = None

        async def close(self, code: int) -> None:
            self.code = code

    async def run() -> None:
        online, following = types.ModuleType("online"), dict[str, Any]()
        code = in_namespace(snippet("docs/game_servers.md", "Plain WebSockets"), server_url, namespace)
        exec(code.replace("server_id=", 'events="pubsub", server_id='), vars(online))
        monkeypatch.setitem(sys.modules, "online", online)
        exec(snippet("docs/game_servers.md", "Plain WebSockets", 2), following)
        socket = Socket()
        online.sockets["first"] = socket, "alice"
        await online.presence.register_connection("first", "alice")
        closing = asyncio.create_task(following["close_displaced"]())
        number = 0
        async with presence.ConnectionManager.from_url(server_url, namespace=namespace, events="pubsub") as elsewhere:
            # It takes a moment until it has subscribed.
            async with asyncio.timeout(10):
                while socket.code is None:
                    number += 1
                    await online.presence.register_connection("first", "alice")
                    await elsewhere.register_connection(f"elsewhere-{number}", "alice")
                    await asyncio.sleep(0.05)
            assert socket.code == 4001
            closing.cancel()
            await asyncio.gather(closing, return_exceptions=True)
            await elsewhere.unregister_connection(f"elsewhere-{number}")
        await online.presence.aclose()

    asyncio.run(run())


def test_the_example_of_messages_closes_a_socket_that_would_hold_up_all_others(
    server_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Socket:
        code, sent = None, 0

        async def send(self, _text: str) -> None:
            self.sent += 1
            await asyncio.Event().wait()

        async def close(self, code: int) -> None:
            self.code = code

    async def run() -> None:
        online, messages = types.ModuleType("online"), dict[str, Any]()
        exec(in_namespace(snippet("docs/game_servers.md", "Plain WebSockets"), server_url, namespace), vars(online))
        monkeypatch.setitem(sys.modules, "online", online)
        exec(snippet("docs/game_servers.md", "Messages to other players"), messages)
        socket = Socket()
        online.sockets["slow"] = socket, "alice"
        for text in ("one", "two"):
            await messages["pass_on"]("slow", text)
        await until(lambda: socket.code)
        assert (socket.code, socket.sent) == (1013, 1)

    asyncio.run(run())


def test_the_example_of_messages_reaches_the_opponent_on_another_process(
    server_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Socket:
        def __init__(self) -> None:
            self.received: list[str] = []

        async def send(self, text: str) -> None:
            self.received.append(text)

    def process() -> tuple[Any, dict[str, Any]]:
        online, messages = types.ModuleType("online"), dict[str, Any]()
        code = in_namespace(snippet("docs/game_servers.md", "Plain WebSockets"), server_url, namespace)
        exec(code, vars(online))
        monkeypatch.setitem(sys.modules, "online", online)
        code = snippet("docs/game_servers.md", "Messages to other players")
        exec(code.replace('"redis://localhost:6379/0"', repr(server_url)), messages)
        return online, messages

    async def run() -> None:
        processes = [process(), process()]
        socket = Socket()
        for (online, _), user_id in zip(processes, ("alice", "bob"), strict=True):
            await online.presence.register_connection(user_id, user_id)
            await online.presence.join_game(user_id, "game")
            online.sockets[user_id] = socket, user_id
        delivering = [asyncio.create_task(messages["deliver"]()) for _, messages in processes]
        channels = processes[0][1]["channels"]
        names = [f"to:{online.SERVER_ID}" for online, _ in processes]
        async with asyncio.timeout(10):
            while {count for _, count in await channels.pubsub_numsub(*names)} != {1}:  # noqa: ASYNC110, it has no event
                await asyncio.sleep(0.01)
        await processes[0][1]["send"]("game", "your turn", "alice")
        await until(lambda: socket.received)
        assert socket.received == ["your turn"]
        for task in delivering:
            task.cancel()
        await asyncio.gather(*delivering, return_exceptions=True)
        for (online, messages), user_id in zip(processes, ("alice", "bob"), strict=True):
            await online.presence.unregister_connection(user_id)
            await online.presence.aclose()
            await messages["channels"].aclose()

    asyncio.run(run())


def test_the_example_that_follows_the_events_counts_each_join_once_though_it_is_killed(
    server_url: str, namespace: str, tmp_path: Path
) -> None:
    code = in_namespace(snippet("docs/game_servers.md", "Following the events"), server_url, namespace)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")])}

    def ask(query: str) -> list[Any]:
        with closing(sqlite3.connect(tmp_path / "joins.db")) as database:
            try:
                return database.execute(query).fetchall()
            except sqlite3.OperationalError:  # It has no tables yet.
                return []

    with ConnectionManager.from_url(server_url, namespace=namespace, events="stream") as manager:
        for joins in range(3):
            with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment) as follower:
                try:
                    # Once it has kept a position, it misses nothing.
                    wait_until(lambda: ask("SELECT * FROM reached"))
                    wait_until(lambda joins=joins: sum(number for _, number in ask("SELECT * FROM joins")) == joins)  # type: ignore[misc]
                finally:
                    follower.kill()
            manager.register_connection("sid", "alice")
            manager.leave_game("sid")
            manager.join_game("sid", "game")
        manager.unregister_connection("sid")


class BlockingSocket:
    """A WebSocket as a thread of a server has it."""

    def __init__(self) -> None:
        self.is_closed = threading.Event()
        self.code = 0

    def close(self, code: int) -> None:
        self.code = code
        self.is_closed.set()
        raise OSError("it is dead already")

    def __iter__(self) -> Iterator[str]:
        self.is_closed.wait()
        return iter(())


def run_blocking_example(
    server_url: str, namespace: str, number: signal.Signals, play: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run the process of the example until the thread that plays has ended and sent a signal; give its names."""
    code = in_namespace(snippet("docs/game_servers.md", "Blocking code"), server_url, namespace)
    example: dict[str, Any] = {}
    exec(code.replace("HEARTBEAT_SECONDS = 30", "HEARTBEAT_SECONDS = 1"), example)
    failures = []

    def run() -> None:
        try:
            play(example)
        except BaseException as error:
            failures.append(error)
            example["stopping"].set()

    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        player = threading.Thread(target=run)
        player.start()
        example["main"]()
        player.join(10)
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    assert failures == []
    assert example["sockets"] == {}
    return example


def serve_in_thread(example: dict[str, Any], socket: BlockingSocket, user_id: str) -> threading.Thread:
    thread = threading.Thread(target=example["serve"], args=(socket, user_id))
    thread.start()
    wait_until(lambda: any(known is socket for known, _ in example["sockets"].copy().values()))
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_example_of_blocking_code_serves_sockets_in_threads_until_it_is_told_to_end(
    server_url: str, namespace: str, number: signal.Signals
) -> None:
    def play(example: dict[str, Any]) -> None:
        first, second, bob, carol = BlockingSocket(), BlockingSocket(), BlockingSocket(), BlockingSocket()
        users = {first: "alice", second: "alice", bob: "bob", carol: "carol"}
        threads = [serve_in_thread(example, socket, user_id) for socket, user_id in users.items()]
        assert first.is_closed.wait(10)
        assert not second.is_closed.is_set()
        # What another server's register displaces is closed at the next heartbeat, and so is what was removed.
        with ConnectionManager.from_url(server_url, namespace=namespace) as elsewhere:
            elsewhere.register_connection("elsewhere", "alice")
            elsewhere.unregister_connection(elsewhere.get_user_connection("carol").sid)  # type: ignore[union-attr]
            assert second.is_closed.wait(10)
            assert carol.is_closed.wait(10)
            elsewhere.unregister_connection("elsewhere")
        assert example["manager"].is_user_online("bob")
        os.kill(os.getpid(), number)
        for thread in threads:
            thread.join(10)
        assert [socket.code for socket in users] == [4001, 4001, 1013, 1013]

    example = run_blocking_example(server_url, namespace, number, play)
    with ConnectionManager.from_url(server_url, namespace=namespace) as after:
        assert not after.is_user_online("bob")
        assert after.register_connection("resuming", "bob").resumed
        after.unregister_connection("resuming")
    example["manager"].close()


def test_the_example_of_blocking_code_leaves_the_players_of_a_later_start_of_its_id_alone(
    server_url: str, namespace: str
) -> None:
    with ExitStack() as stack:

        def play(example: dict[str, Any]) -> None:
            example["manager"].start_server()
            later = ConnectionManager.from_url(server_url, namespace=namespace, server_id=example["SERVER_ID"])
            stack.enter_context(later).register_connection("sid", "alice")
            os.kill(os.getpid(), signal.SIGTERM)

        run_blocking_example(server_url, namespace, signal.SIGTERM, play)
        with ConnectionManager.from_url(server_url, namespace=namespace) as after:
            assert after.is_user_online("alice")
            after.unregister_connection("sid")


def test_the_example_of_blocking_code_does_not_keep_who_cannot_be_registered_waiting(namespace: str) -> None:
    example: dict[str, Any] = {}
    url = f"redis://127.0.0.1:{free_port()}/0"
    exec(in_namespace(snippet("docs/game_servers.md", "Blocking code"), url, namespace), example)
    socket = BlockingSocket()
    with pytest.raises(presence.ServerUnreachableError):
        example["serve"](socket, "alice")  # To unregister has failed as well.
    assert socket.code == 1013
    example["manager"].close()


def test_the_example_of_socketio_misses_nothing_in_an_outage(own_server: LocalServer) -> None:
    """Not even where nothing had happened before it."""
    happened: list[str] = []

    class Observed(socketio_server.GameServer):
        async def act_on(self, event: Event) -> None:
            happened.append(event.type.value)

    async def run() -> None:
        manager = presence.ConnectionManager.from_url(
            own_server.url, server_id="one", events="stream", socket_timeout=0.2, **one_attempt("asyncio")
        )
        server = Observed(manager)
        await server.start()
        with ConnectionManager.from_url(own_server.url, events="stream") as other:
            os.kill(own_server.pid, signal.SIGSTOP)
            await asyncio.sleep(0.5)
            os.kill(own_server.pid, signal.SIGCONT)
            other.register_connection("sid", "alice")
            await until(lambda: len(happened) >= 2)
        await server.stop()

    asyncio.run(run())
    assert happened == ["registered", "user_online"]


def game_manager(url: str, **options: Any) -> presence.ConnectionManager:
    """Make a manager for the example of Socket.IO that meets faults at once."""
    options = {"server_id": "one", "events": "stream", "displacement": "newest_resumes"} | options
    return presence.ConnectionManager.from_url(url, socket_timeout=0.2, **one_attempt("asyncio"), **options)


@asynccontextmanager
async def served(server: socketio_server.GameServer) -> AsyncIterator[str]:
    """Serve the example of Socket.IO on a free port."""
    uvicorn_server = uvicorn.Server(uvicorn.Config(server.app, host="127.0.0.1", port=0, log_level="critical"))
    serving = asyncio.create_task(uvicorn_server.serve())
    await until(lambda: uvicorn_server.started or serving.done())
    try:
        yield f"http://127.0.0.1:{uvicorn_server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        uvicorn_server.should_exit = True
        await serving


@asynccontextmanager
async def player(url: str, user_id: str) -> AsyncIterator[tuple[socketio.AsyncClient, list[str]]]:
    """Connect a user; give the client and the names of what it is told."""
    told: list[str] = []
    client = socketio.AsyncClient(reconnection=False, handle_sigint=False)
    client.on("disconnect", lambda _reason: told.append("disconnect"))
    client.on("*", lambda name, *_arguments: told.append(name))
    await client.connect(url, auth={"user_id": user_id}, transports=["websocket"])
    try:
        yield client, told
    finally:
        await client.disconnect()


def test_the_example_of_socketio_tells_who_must_not_connect_again(
    server_url: str, namespace: str, client: redis.Redis
) -> None:
    async def run() -> None:
        server = socketio_server.GameServer(game_manager(server_url, namespace=namespace, displacement="newest_wins"))
        elsewhere = server.manager
        async with served(server) as url, player(url, "alice") as (_, first), player(url, "alice") as (alice, second):
            await until(lambda: first == ["logged_out", "disconnect"])
            # Detached while its socket is open, as if this server were dead: it is to come back.
            await elsewhere.unregister_connection(alice.get_sid(), grace_seconds=60)
            await alice.emit("heartbeat")
            await until(lambda: second == ["disconnect"])
            async with player(url, "alice") as (alice, third):
                await elsewhere.unregister_connection(alice.get_sid())
                await until(lambda: third == ["logged_out", "disconnect"])
            # Where the server has lost its data, all are to come back.
            async with player(url, "alice") as (alice, fourth):
                client.delete(f"{{{namespace}}}:last_seen")
                await alice.emit("heartbeat")
                await until(lambda: fourth == ["disconnect"])
            # A heartbeat may be answered when its socket is gone already.
            assert await server.heartbeat("closed meanwhile") == {"alive": False}

    asyncio.run(run())
    client.delete(*client.keys(f"{{{namespace}}}:*"))  # What is left of it.


def test_the_example_of_socketio_forgets_who_leaves_in_an_outage(own_server: LocalServer) -> None:
    async def run() -> None:
        server = socketio_server.GameServer(game_manager(own_server.url))
        async with served(server) as url, player(url, "alice") as (alice, _), player(url, "bob") as (bob, told):
            for client in (alice, bob):
                assert await client.call("join_game", "game") == {"joined": True}
            own_server.kill()
            await alice.disconnect()
            # As act_on() does it.
            await server.sio.disconnect(bob.get_sid())
            await until(lambda: not server.sio.environ)
            assert server.sio.manager.rooms.get("/", {}) == {}
            await until(lambda: told == ["disconnect"])

    asyncio.run(run())


def test_the_example_of_socketio_has_all_come_again_who_joined_before_it_followed_the_events(
    own_server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is away when the game server starts, and is back before that subscribes again."""
    has_joined, begun = asyncio.Event(), asyncio.Event()
    begin = presence.AsyncSubscription.__aenter__

    async def begin_late(events: presence.AsyncSubscription) -> presence.AsyncSubscription:
        if server.is_ready.is_set():
            await has_joined.wait()
        entered = await begin(events)
        begun.set()
        return entered

    monkeypatch.setattr(presence.AsyncSubscription, "__aenter__", begin_late)
    server = socketio_server.GameServer(game_manager(own_server.url))

    async def run() -> None:
        own_server.kill()
        async with served(server) as url:
            own_server.start()
            async with player(url, "alice") as (alice, told):
                assert await alice.call("join_game", "game") == {"joined": True}
                has_joined.set()
                await begun.wait()
                await until(lambda: told)
                assert told == ["disconnect"]
            async with player(url, "alice") as (_, told), player(url, "bob") as (bob, _):
                await until(lambda: told)
                await bob.call("join_game", "game")
                await until(lambda: len(told) >= 2)
                assert told == ["resumed", "opponent_joined"]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("options", "message"), [({"events": "off"}, "events are off"), ({"server_id": None}, "server_id")]
)
def test_the_example_of_socketio_does_not_start_on_an_unfit_manager(
    server_url: str, caplog: pytest.LogCaptureFixture, options: dict[str, Any], message: str
) -> None:
    async def run() -> None:
        server = socketio_server.GameServer(game_manager(server_url, **options))
        with pytest.raises(ValueError, match=message):
            async with asyncio.timeout(5):
                await server.start()
        await server.stop()

    asyncio.run(run())
    assert message in caplog.text, "python-socketio itself logs no error of on_startup"


def test_the_example_of_socketio_says_so_where_it_cannot_subscribe_for_another_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PRESENCE_REDIS_URL", "localhost:6379")

    async def run() -> None:
        server = socketio_server.GameServer(presence.ConnectionManager(server_id="one", events="stream"))
        async with asyncio.timeout(5):
            await server.start()
        await server.stop()

    asyncio.run(run())
    (record,) = [record for record in caplog.records if record.name == socketio_server.__name__]
    assert record.exc_info is not None
    assert "PRESENCE_REDIS_URL" in str(record.exc_info[1])


def test_the_example_of_socketio_follows_on_after_an_event_that_it_fails_at(
    server_url: str, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    happened: list[str] = []

    class Failing(socketio_server.GameServer):
        async def act_on(self, event: Event) -> None:
            happened.append(event.type.value)
            if event.type is presence.EventType.REGISTERED:
                raise KeyError("a mistake")

    async def run() -> None:
        manager = game_manager(server_url, namespace=namespace)
        server = Failing(manager)
        await server.start()
        await manager.register_connection("sid", "alice")
        await until(lambda: len(happened) >= 2)
        await manager.unregister_connection("sid")
        await server.stop()

    asyncio.run(run())
    assert happened[:2] == ["registered", "user_online"]
    assert "a mistake" in caplog.text


def test_the_example_of_fastapi_serves_them(server_url: str, namespace: str, tmp_path: Path) -> None:
    online = in_namespace(snippet("docs/game_servers.md", "Plain WebSockets"), server_url, namespace)
    (tmp_path / "online.py").write_text(online, encoding="utf-8")
    (tmp_path / "app.py").write_text(snippet("docs/game_servers.md", "FastAPI"), encoding="utf-8")
    command = [sys.executable, "-m", "uvicorn", "app:app", "--port", "0"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")])}

    async def play(url: str) -> None:
        async with ClientSession() as session:
            first = await session.ws_connect(f"{url}/play/alice")
            async with asyncio.timeout(10):
                while not manager.is_user_online("alice"):  # noqa: ASYNC110, it is accepted before it is registered
                    await asyncio.sleep(0.05)
            second = await session.ws_connect(f"{url}/play/alice")
            # What the second displaced is closed.
            assert (await first.receive(timeout=10)).type is WSMsgType.CLOSE
            await second.close()

    with (
        subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as server,
        ConnectionManager.from_url(server_url, namespace=namespace) as manager,
    ):
        assert server.stderr is not None
        try:
            lines = iter(server.stderr.readline, "")
            url = next(found[1] for line in lines if (found := re.search(r"running on (http://\S+)", line)))
            asyncio.run(play(url))
        finally:
            server.terminate()
            log = server.stderr.read()
        assert "Application shutdown complete" in log, log
        assert "Traceback" not in log, log
        # Both sockets are unregistered; the seat that is kept is that of the second.
        assert manager.get_connection_count() == 0
        assert manager.register_connection("resuming", "alice").resumed
        manager.unregister_connection("resuming")


def in_namespace(code: str, server_url: str, namespace: str) -> str:
    here = code.replace('"redis://localhost:6379/0"', f"{server_url!r}, namespace={namespace!r}")
    assert here != code
    return here


def run(code: str, server_url: str, namespace: str) -> str:
    """Run an example in a namespace of the test's; give what it prints."""
    here = in_namespace(code, server_url, namespace)
    finished = subprocess.run([sys.executable, "-c", here], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout
