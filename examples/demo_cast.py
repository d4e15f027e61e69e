"""Who plays in the demo: game-server processes, devices of players, and the timeline that hears what they all say."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import socketio
from socketio.packet import DISCONNECT, Packet

if TYPE_CHECKING:
    from collections.abc import Callable

Found = TypeVar("Found")

START_SECONDS = 30
"""A Python process and its imports, on a busy machine."""
WAIT_SECONDS = 10
"""Everything else that is waited for happens within milliseconds, or within the stale threshold of three seconds."""


class StuckError(Exception):
    """Something that had to happen did not, so the rest of the story cannot be told."""


@dataclass(frozen=True)
class Answer:
    """What the library answered to one server, as its JSON."""

    server: str
    operation: str
    arguments: list[Any]
    value: Any


class Timeline:
    """Prints what happens, remembers what was answered, and collects what differs from what should have been."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.answers: list[Answer] = []
        self.held: set[str] = set()
        self.events: dict[str, list[dict[str, Any]]] = {}
        """What each server saw, in its order."""
        self.differences: list[str] = []
        self.checks = 0
        self.is_over = False
        self.changed = asyncio.Event()
        self._names: dict[str, str] = {}
        self._beaten: set[str] = set()

    def chapter(self, text: str) -> None:
        """Print a heading."""
        print(f"\n{text}")

    def say(self, who: str, text: str) -> None:
        """Print one line of the timeline."""
        print(f"{self.seconds():7.2f} s  {who:<14} {text}", flush=True)

    def seconds(self) -> float:
        """Tell how long the story has been going on."""
        return time.monotonic() - self.started

    def differ(self, text: str) -> None:
        """Note a difference, and print it where it was noticed."""
        if text not in self.differences:
            self.differences.append(text)
        self.say("DIFFERS", text)

    def expect(self, what: str, found: Any, expected: Any) -> None:
        """Compare what was found with what should have been."""
        self.checks += 1
        if found != expected:
            self.differ(f"{what}: found {self.words(found)}, expected {self.words(expected)}")

    async def until(self, condition: Callable[[], Found | None], what: str, seconds: float = WAIT_SECONDS) -> Found:
        """Wait until a condition gives something true, and give that.

        Raises:
            StuckError: it did not become true in time.

        """
        try:
            async with asyncio.timeout(seconds):
                while not (found := condition()):
                    self.changed.clear()
                    await self.changed.wait()
                return found
        except TimeoutError:
            raise StuckError(f"waited {seconds:g} s for this: {what}") from None

    async def answer(self, operation: str, sid: str) -> Answer:
        """Wait for the first answer to an operation on a connection."""

        def find() -> Answer | None:
            return next((it for it in self.answers if it.operation == operation and it.arguments[0] == sid), None)

        return await self.until(find, f"an answer to {operation}({self.words(sid)})")

    def hear(self, server: str, line: dict[str, Any]) -> None:
        """Take in one line of a server's stdout."""
        if "held" in line:
            self.held.add(line["held"])
            self.say(server, f"unregister_connection({self.words(line['held'])}) is held up")
        elif "operation" in line:
            self._hear_answer(server, line)
        elif "event" in line:
            self._hear_event(server, line["event"])
        self.changed.set()

    def _hear_event(self, server: str, event: dict[str, Any]) -> None:
        self.events.setdefault(server, []).append(event)
        self._give_name(event["connection"]["sid"], event["connection"]["user_id"])
        # All servers see all events: these two kinds are told by events only.
        if event["type"] in ("detached", "resumed"):
            self.say(server, f"sees the event: {event['type']} {self.words(event['connection'])}")

    def _hear_answer(self, server: str, line: dict[str, Any]) -> None:
        operation, arguments = line["operation"], line["arguments"]
        if operation == "register_connection" and "answer" in line:
            # Of two servers' registrations the later one may be heard first: those it displaced need their names now.
            for connection in (*line["answer"]["displaced"], line["answer"]["connection"]):
                self._give_name(connection["sid"], connection["user_id"])
        notes = []
        if operation == "update_server_heartbeat":
            # The call itself has no arguments: these are the server's id and its boot epoch.
            call = f"{operation}()"
            notes.append(arguments[0])
        else:
            call = f"{operation}({', '.join(self.words(it) for it in arguments if it is not None)})"
        if "error" in line:
            self.differ(f"{call} on {server} failed: {line['error']}")
            return
        answer = Answer(server, operation, arguments, line["answer"])
        self.answers.append(answer)
        if operation in ("update_heartbeat", "update_server_heartbeat") and answer.value:
            # They go on all the time: one line for each connection is enough.
            if arguments[0] in self._beaten:
                return
            self._beaten.add(arguments[0])
            notes.append("repeats not shown")
        note = f" ({', '.join(notes)})" if notes else ""
        self.say(server, f"{call} -> {self.words(answer.value)}{note}")

    def _give_name(self, sid: str, user_id: str) -> None:
        if sid not in self._names:
            number = sum(name.partition("#")[0] == user_id for name in self._names.values()) + 1
            self._names[sid] = f"{user_id}#{number}"

    def words(self, value: Any) -> str:
        """Put an answer into words; a connection is called by its user and a number instead of by its sid."""
        match value:
            case {"type": "ConnectionInfo"}:
                place = f"in {value['game_id']}" if value["game_id"] else "in no game"
                return f"{self.words(value['sid'])} ({place}{', detached' if value['detached_until'] else ''})"
            case {"type": "Registration", "resumed": True}:
                return f"registered {self.words(value['connection'])}, resumed {self.words(value['resumed_from'])}"
            case {"type": "Registration"}:
                return f"registered {self.words(value['connection'])}, displaced {self.words(value['displaced'])}"
            case {"type": "JoinResult"}:
                left = f", left {value['left_game_id']}" if value["left_game_id"] else ""
                return ("joined" if value["joined"] else "not joined, no such connection") + left
            case {"type": "CleanupResult"}:
                parts = [name for name in ("removed", "detached") if value[name]]
                return "; ".join(f"{name} {self.words(value[name])}" for name in parts)
            case dict():
                return "{" + ", ".join(f"{self.words(key)}: {self.words(it)}" for key, it in value.items()) + "}"
            case list() | tuple() | set():
                return ", ".join(sorted(self.words(it) for it in value)) or "none"
            case str():
                return self._names.get(value, value)
        return str(value)

    def words_in(self, text: str) -> str:
        """Put the names of connections for their sids in a text."""
        for sid, name in self._names.items():
            text = text.replace(sid, name)
        return text


class ServerProcess:
    """One game server, a process of its own."""

    def __init__(self, timeline: Timeline, name: str, redis_url: str, *options: str) -> None:
        self.timeline = timeline
        self.name = f"server {name}"
        self.server_id = f"server-{name}"
        self.port = 0
        self._redis_url = redis_url
        self._options = options
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, stop() closes it
        self._obeyed: list[str] = []
        self._exit_status = 0
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start it, and wait until it serves."""
        # A session of its own: at Ctrl-C the demo ends it in good order, not the terminal.
        process = self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "examples.demo_server", f"--server-id={self.server_id}", *self._options),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._errors,
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"PRESENCE_REDIS_URL": self._redis_url},
            start_new_session=True,
        )
        listening = self._listening = asyncio.create_task(self._listen(process))
        await self.timeline.until(lambda: self.port or listening.done(), f"{self.name} serves", START_SECONDS)
        if not self.port:
            raise StuckError(f"{self.name} did not start, see its stderr below")
        self.timeline.say(self.name, f"serves on 127.0.0.1:{self.port}, process {process.pid}")

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        try:
            async for text in process.stdout:
                try:
                    line = json.loads(text)
                except ValueError:
                    self.timeline.say(self.name, f"says: {text.decode(errors='replace').rstrip()}")
                    continue
                self.port = line.get("port", self.port)
                if "obeyed" in line:
                    self._obeyed.append(line["obeyed"])
                self.timeline.hear(self.name, line)
        finally:
            self.timeline.changed.set()

    async def tell(self, command: str) -> None:
        """Give it one of the commands of ``demo_server``, and wait until it has obeyed."""
        assert self._process is not None
        assert self._process.stdin is not None
        before = len(self._obeyed)
        self._process.stdin.write(f"{command}\n".encode())
        await self.timeline.until(lambda: len(self._obeyed) > before, f"{self.name} obeys {command!r}")

    async def kill(self) -> None:
        """End it by its process id with SIGKILL, like a crash: it does nothing more."""
        assert self._process is not None
        self.timeline.say("demo", f"kills {self.name}, process {self._process.pid}, with SIGKILL")
        self._exit_status = -signal.SIGKILL
        self._process.kill()
        await self._process.wait()

    async def stop(self) -> None:
        """End it by the end of its stdin, or by its process id if it does not heed that; then show its stderr."""
        process = self._process
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), WAIT_SECONDS)
            except TimeoutError:
                self.timeline.differ(f"{self.name} did not end within {WAIT_SECONDS} s and was killed")
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            self.timeline.expect(f"exit status of {self.name}", process.returncode, self._exit_status)
        if self._listening is not None:
            await self._listening
        self._errors.seek(0)
        errors = self._errors.read().decode(errors="replace").strip()
        self._errors.close()
        if errors:
            print(f"\nstderr of {self.name}:\n{errors}\n", flush=True)
        if "Traceback" in errors:
            self.timeline.differ(f"{self.name} wrote a traceback to its stderr")


class Device:
    """A Socket.IO client: one socket of one player to one server. It never reconnects by itself."""

    def __init__(self, timeline: Timeline, user_id: str, server: ServerProcess) -> None:
        self.timeline = timeline
        self.user_id = user_id
        self.server = server
        self.sid = ""
        self.closed = ""
        self.told: list[tuple[str, str]] = []
        self.told_before = 0
        self._beating: asyncio.Task[None] | None = None
        self._client = socketio.AsyncClient(reconnection=False, handle_sigint=False)
        self._client.on("connect", self._on_connect)
        self._client.on("disconnect", self._on_disconnect)
        for event in ("opponent_joined", "opponent_left", "opponent_away", "opponent_back", "resumed"):
            self._client.on(event, self._make_listener(event))

    async def connect(self) -> dict[str, Any]:
        """Connect, and give what the library answered to the registration."""
        self.timeline.say(self.user_id, f"connects to {self.server.name}")
        url = f"http://127.0.0.1:{self.server.port}"
        await self._client.connect(url, auth={"user_id": self.user_id}, transports=["websocket"], wait=False)
        await self.timeline.until(lambda: self.sid, f"{self.user_id} is connected to {self.server.name}")
        registration: dict[str, Any] = (await self.timeline.answer("register_connection", self.sid)).value
        return registration

    async def call(self, event: str, *arguments: str) -> Any:
        """Send an event, and give what the server's handler answered."""
        try:
            return await self._client.call(event, arguments, timeout=WAIT_SECONDS)
        except socketio.exceptions.SocketIOError as error:
            raise StuckError(f"{self.user_id}'s call of {event} failed: {type(error).__name__} {error}") from error

    def beat(self, interval_seconds: float) -> None:
        """Send heartbeats from now on."""
        self._beating = asyncio.create_task(self._beat(interval_seconds))

    async def _beat(self, interval_seconds: float) -> None:
        try:
            while not self.closed:
                await self.call("heartbeat")
                await asyncio.sleep(interval_seconds)
        except StuckError as error:
            if not self.closed:
                self.timeline.differ(str(error))

    def fall_silent(self) -> None:
        """Send no more heartbeats; the socket stays open."""
        if self._beating is not None:
            self._beating.cancel()

    def cut(self) -> None:
        """Lose the network: the socket ends without the closing handshake of a WebSocket."""
        self.fall_silent()
        self._client.eio.ws.get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    async def leave(self) -> None:
        """Tell the server that it leaves on purpose; close it once the server knows.

        Other clients do that when they disconnect; this one closes the socket before the packet is on its way.
        """
        self.fall_silent()
        self.timeline.say(self.user_id, "disconnects on purpose")
        await self._client.eio.send(Packet(DISCONNECT).encode())

    async def close(self) -> None:
        """End the socket, if it is still open."""
        self.fall_silent()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._client.disconnect(), WAIT_SECONDS)

    async def _on_connect(self) -> None:
        self.sid = self._client.get_sid()
        self.timeline.changed.set()

    async def _on_disconnect(self, reason: str) -> None:
        self.closed = reason
        self.fall_silent()
        self.timeline.say(self.user_id, f"socket {self.timeline.words(self.sid)} is closed: {reason}")
        self.timeline.changed.set()

    def _make_listener(self, event: str) -> Callable[[dict[str, str]], None]:
        def listen(news: dict[str, str]) -> None:
            user_id = news.get("user_id", self.user_id)
            self.told.append((event, user_id))
            self.timeline.say(self.user_id, f"is told: {event}, {user_id} in {news['game_id']}")
            self.timeline.changed.set()

        return listen
