"""The demo: two game servers, one Redis and real Socket.IO clients; everything that is answered is checked.

    python -m examples.demo

It tells a story in chapters, prints what the library answered to whom, and checks every answer, and the keys
themselves after each chapter. It exits with 0 if everything was as it should be, and with 1 if anything was not.

``socketio_server`` is the game server, ``demo_server`` runs it for the demo, ``demo_cast`` is what plays in it.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import redis

from examples.demo_cast import WAIT_SECONDS, Device, ServerProcess, StuckError, Timeline
from presence import ConnectionManager, PresenceError
from tests.invariants import read_keyspace, violations
from tests.server import NoServerError, Server, running_server

HEARTBEAT_SECONDS = 1.0
STALE_SECONDS = 3 * HEARTBEAT_SECONDS
BEAT_SECONDS = 0.4
"""Twice as often as need be, so that a machine with other things to do does not make anyone stale."""
CLEANUP_SECONDS = 0.5
WHOLE_DEMO_SECONDS = 90

GAME, OTHER_GAME = "chess-1", "chess-2"


@dataclass
class Stage:
    """Everything that the chapters of the story share."""

    timeline: Timeline
    one: ServerProcess
    two: ServerProcess
    manager: ConnectionManager
    client: redis.Redis
    namespace: str
    devices: list[Device] = field(default_factory=list)

    def device(self, user_id: str, server: ServerProcess) -> Device:
        """Give a player a new device, for one socket to a server."""
        device = Device(self.timeline, user_id, server)
        self.devices.append(device)
        return device

    async def both_servers_listen(self) -> None:
        """Wait until both hear each other: python-socketio subscribes only when it gets its first client."""
        channel = f"socketio:{self.namespace}"
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while self.client.pubsub_numsub(channel)[0][1] < 2:  # noqa: ASYNC110, no event says so
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise StuckError(f"the servers did not both subscribe to {channel}") from None

    async def ask(self, expected: Any, operation: str, *arguments: str) -> None:
        """Call an operation from here, a third place beside the two servers, and check the answer."""
        answer = await getattr(self.manager, operation)(*arguments)
        words = self.timeline.words
        call = f"{operation}({', '.join(words(argument) for argument in arguments)})"
        self.timeline.say("demo", f"{call} -> {words(answer)}")
        self.timeline.expect(call, answer, expected)

    async def check_keys(self, *, users: list[str]) -> None:
        """Check that every invariant holds, and that just these users have a connection."""
        try:
            keyspace = await asyncio.to_thread(read_keyspace, self.client, self.namespace)
        except AssertionError as error:
            self.timeline.differ(str(error))
            return
        broken = violations(keyspace)
        for violation in broken:
            self.timeline.differ(self.timeline.words_in(violation))
        self.timeline.checks += 1
        self.timeline.expect("users with a connection", sorted(keyspace.users), users)
        if not users:
            self.timeline.expect("keys that are left", sorted(keyspace.ttls_ms), [])
        verdict = f"{len(broken)} invariants are broken" if broken else "every invariant holds"
        self.timeline.say("demo", f"read all {len(keyspace.ttls_ms)} keys: {verdict}")


async def meet(stage: Stage) -> tuple[Device, Device]:
    """Let two players on different servers meet in a game, and beat."""
    stage.timeline.chapter("alice and bob, on different servers, meet in a game")
    alice, bob = stage.device("alice", stage.one), stage.device("bob", stage.two)
    for player in (alice, bob):
        registration = await player.connect()
        stage.timeline.expect(f"displaced by {player.user_id}'s first connection", displaced_by(registration), [])
    await stage.both_servers_listen()
    for player in (alice, bob):
        stage.timeline.expect(f"{player.user_id} joins", await player.call("join_game", GAME), {"joined": True})
    await stage.timeline.until(lambda: ("opponent_joined", "bob") in alice.told, "alice hears that bob joined")
    for player in (alice, bob):
        player.beat(BEAT_SECONDS)
        beat = await stage.timeline.answer("update_heartbeat", player.sid)
        stage.timeline.expect(f"{player.user_id}'s heartbeat", beat.value, True)
    await stage.ask(bob.sid, "get_opponent_sid", GAME, "alice")
    await stage.ask({"alice": alice.sid, "bob": bob.sid}, "get_game_user_sids", GAME)
    await stage.ask(2, "get_connection_count")
    await stage.check_keys(users=["alice", "bob"])
    return alice, bob


async def come_back_before_the_disconnect(stage: Stage, old: Device, opponent: Device) -> Device:
    """Drop a player, who is back on the other server before the first one has handled the disconnect."""
    stage.timeline.chapter("alice drops; while server one still handles that, she comes back through server two")
    await old.server.tell("hold")
    stage.timeline.say(old.user_id, "loses the network")
    old.cut()
    await stage.timeline.until(lambda: old.sid in stage.timeline.held, "the disconnect is under way on server one")
    await stage.ask(True, "is_user_online", "alice")

    new = stage.device("alice", stage.two)
    stage.timeline.expect("displaced by alice's return", displaced_by(await new.connect()), [old.sid])
    stage.timeline.expect("alice joins again", await new.call("join_game", GAME), {"joined": True})
    new.beat(BEAT_SECONDS)
    await stage.timeline.until(
        lambda: opponent.told.count(("opponent_joined", "alice")) == 1, "bob hears that alice is back"
    )

    # The old disconnect has still not run, and nothing is in disorder because of that.
    await stage.check_keys(users=["alice", "bob"])

    stage.timeline.say("demo", "lets server one finish the old disconnect")
    await old.server.tell("release")
    late = await stage.timeline.answer("unregister_connection", old.sid)
    stage.timeline.expect("the late disconnect removes", late.value, None)
    await stage.ask(True, "is_user_online", "alice")
    await stage.ask(False, "update_heartbeat", old.sid)
    await stage.ask({"alice": new.sid, "bob": opponent.sid}, "get_game_user_sids", GAME)
    stage.timeline.expect("news to bob that alice left", ("opponent_left", "alice") in opponent.told, False)
    await stage.check_keys(users=["alice", "bob"])
    return new


async def change_devices(stage: Stage, old: Device, opponent: Device) -> Device:
    """Let a player connect once more while the old socket is open and beats; the server that holds it closes it."""
    stage.timeline.chapter("bob takes up his phone, through server one; his laptop still beats, through server two")
    new = stage.device("bob", stage.one)
    stage.timeline.expect("displaced by bob's phone", displaced_by(await new.connect()), [old.sid])
    await stage.timeline.until(lambda: old.closed, "server two closes bob's displaced socket at server one's word")
    late = await stage.timeline.answer("unregister_connection", old.sid)
    stage.timeline.expect("the disconnect of bob's displaced socket removes", late.value, None)
    stage.timeline.expect("bob joins again", await new.call("join_game", GAME), {"joined": True})
    new.beat(BEAT_SECONDS)
    await stage.ask(new.sid, "get_opponent_sid", GAME, "alice")
    await stage.ask(opponent.sid, "get_opponent_sid", GAME, "bob")
    await stage.check_keys(users=["alice", "bob"])
    return new


async def race(stage: Stage) -> Device:
    """Connect one user several times at once, through both servers: one connection stays."""
    stage.timeline.chapter("carol connects four times at once, twice through each server")
    devices = [stage.device("carol", server) for server in (stage.one, stage.two, stage.one, stage.two)]
    registrations = await asyncio.gather(*(device.connect() for device in devices))
    reported = sorted(sid for registration in registrations for sid in displaced_by(registration))
    stage.timeline.expect("displaced connections, and how often each was reported", len(reported), 3)
    survivors = [device for device in devices if device.sid not in reported]
    stage.timeline.expect("connections of carol that nobody displaced", len(survivors), 1)
    if len(survivors) != 1:
        raise StuckError("the race had no single winner")
    winner = survivors[0]
    losers = [device for device in devices if device is not winner]
    stage.timeline.expect("displaced connections", reported, sorted(device.sid for device in losers))

    # A loser whose server was still connecting it, when it was displaced, learns it from its first heartbeat.
    for device in devices:
        device.beat(BEAT_SECONDS)
    for loser in losers:
        await stage.timeline.until(lambda loser=loser: loser.closed, "the displaced sockets are closed")  # type: ignore[misc]
        late = await stage.timeline.answer("unregister_connection", loser.sid)
        stage.timeline.expect("the disconnect of a displaced socket removes", late.value, None)
    beat = await stage.timeline.answer("update_heartbeat", winner.sid)
    stage.timeline.expect("the heartbeat of the one that stays", beat.value, True)
    await stage.ask(3, "get_connection_count")
    await stage.check_keys(users=["alice", "bob", "carol"])
    return winner


async def fall_silent(stage: Stage, silent: Device, opponent: Device) -> None:
    """Let a player stop beating, with the socket still open, until cleanup takes the connection."""
    stage.timeline.chapter("bob falls silent, his socket stays open, and cleanup takes him")
    silent.fall_silent()
    stage.timeline.say(silent.user_id, "sends no more heartbeats")

    def removals() -> list[dict[str, Any]]:
        cleanups = [it.value for it in stage.timeline.answers if it.operation == "run_cleanup"]
        return [connection for cleanup in cleanups for connection in cleanup["removed"]]

    await stage.timeline.until(removals, "a cleanup removes bob")
    removed = removals()[0]
    stage.timeline.expect("removed by cleanup", (removed["sid"], removed["game_id"]), (silent.sid, GAME))
    seconds = (instant(removed["observed_at"]) - instant(removed["last_seen"])).total_seconds()
    stage.timeline.say("demo", f"by Redis's clock that was {seconds:.2f} s after his last heartbeat")
    stage.timeline.expect("silent for longer than three heartbeats", seconds > STALE_SECONDS, True)
    await stage.timeline.until(lambda: ("opponent_left", "bob") in opponent.told, "alice hears that bob is gone")
    await stage.timeline.until(lambda: silent.closed, "bob's socket is closed")
    late = await stage.timeline.answer("unregister_connection", silent.sid)
    stage.timeline.expect("the disconnect of a removed socket removes", late.value, None)
    await stage.ask(False, "is_user_online", "bob")
    await stage.ask(None, "get_opponent_sid", GAME, "alice")
    await stage.check_keys(users=["alice", "carol"])
    # Both servers clean up at once, all the time: whoever was removed, and that was one, was reported by one of them.
    stage.timeline.expect("removed by all cleanups together", len(removals()), 1)


async def leave(stage: Stage, alice: Device, carol: Device) -> None:
    """Let everyone leave in good order, one in the middle of a game: no key is left."""
    stage.timeline.chapter("carol takes bob's place, and everyone leaves")
    for game_id in (OTHER_GAME, GAME):
        stage.timeline.expect("carol joins", await carol.call("join_game", game_id), {"joined": True})
    await stage.ask(0, "get_game_connection_count", OTHER_GAME)
    await stage.ask({"alice": alice.sid, "carol": carol.sid}, "get_game_user_sids", GAME)

    await alice.close()
    removed = (await stage.timeline.answer("unregister_connection", alice.sid)).value
    found = removed and (removed["sid"], removed["game_id"])
    stage.timeline.expect("removed by alice's disconnect", found, (alice.sid, GAME))
    await stage.timeline.until(lambda: ("opponent_left", "alice") in carol.told, "carol hears that alice left")
    await stage.ask(1, "get_game_connection_count", GAME)

    stage.timeline.expect("the game that carol leaves", await carol.call("leave_game"), {"left_game_id": GAME})
    await stage.ask(0, "get_game_connection_count", GAME)
    await carol.close()
    removed = (await stage.timeline.answer("unregister_connection", carol.sid)).value
    found = removed and (removed["sid"], removed["game_id"])
    stage.timeline.expect("removed by carol's disconnect", found, (carol.sid, None))
    await stage.ask(0, "get_connection_count")
    await stage.check_keys(users=[])
    check_that_each_connection_went_once(stage)


def check_that_each_connection_went_once(stage: Stage) -> None:
    """Compare all registered connections with all that were reported as gone, by whatever operation."""
    registered, gone = [], []
    for answer in stage.timeline.answers:
        match answer.value:
            case {"type": "Registration"}:
                registered.append(answer.value["connection"]["sid"])
                gone += displaced_by(answer.value)
            case {"type": "CleanupResult"}:
                gone += [connection["sid"] for connection in answer.value["removed"]]
            case {"type": "ConnectionInfo"} if answer.operation == "unregister_connection":
                gone.append(answer.value["sid"])
    stage.timeline.say("demo", f"{len(registered)} connections were registered, {len(gone)} were reported as gone")
    stage.timeline.expect("connections reported as gone, each once", sorted(gone), sorted(registered))


def displaced_by(registration: dict[str, Any]) -> list[str]:
    """Give the sids that a registration displaced."""
    return [connection["sid"] for connection in registration["displaced"]]


def instant(text: str) -> datetime:
    """Read a time as ``demo_server`` reports it."""
    return datetime.fromisoformat(text)


async def tell_the_story(stage: Stage) -> None:
    """Play all chapters in their order."""
    stage.timeline.chapter("two game servers start")
    await asyncio.gather(stage.one.start(), stage.two.start())
    alice, bob = await meet(stage)
    alice = await come_back_before_the_disconnect(stage, alice, bob)
    bob = await change_devices(stage, bob, alice)
    carol = await race(stage)
    await fall_silent(stage, bob, alice)
    await leave(stage, alice, carol)


def remove_leftovers(timeline: Timeline, client: redis.Redis, namespace: str) -> None:
    """Look once more for keys, now that the servers have ended; after a failure, take away what is there."""
    keyspace = read_keyspace(client, namespace)
    keys = [*keyspace.ttls_ms, *keyspace.other_ttls_ms]
    if not timeline.differences:
        timeline.expect("keys that are left after the servers have ended", list(keyspace.ttls_ms), [])
    if keys:
        client.delete(*keys)


async def run(server: Server) -> Timeline:
    """Set the stage, play the story, and end everything that was started, whatever happens."""
    timeline = Timeline()
    # A namespace of its own: the server may be one that PRESENCE_REDIS_URL names and others use.
    namespace = f"demo-{secrets.token_hex(4)}"
    options = [f"--namespace={namespace}", f"--heartbeat-seconds={HEARTBEAT_SECONDS}"]
    options.append(f"--cleanup-seconds={CLEANUP_SECONDS}")
    one, two = (ServerProcess(timeline, name, server.url, *options) for name in ("one", "two"))
    async with AsyncExitStack() as ends:
        client = ends.enter_context(redis.Redis.from_url(server.url))
        manager = ConnectionManager.from_url(server.url, namespace=namespace, heartbeat_seconds=HEARTBEAT_SECONDS)
        await ends.enter_async_context(manager)
        ends.callback(remove_leftovers, timeline, client, namespace)
        ends.push_async_callback(two.stop)
        ends.push_async_callback(one.stop)
        stage = Stage(timeline, one, two, manager, client, namespace)
        try:
            async with asyncio.timeout(WHOLE_DEMO_SECONDS):
                await tell_the_story(stage)
        except (StuckError, PresenceError) as error:
            timeline.differ(str(error))
        except TimeoutError:
            timeline.differ(f"the demo was not over after {WHOLE_DEMO_SECONDS} s")
        finally:
            for device in stage.devices:
                await device.close()
    return timeline


def main() -> int:
    """Run the demo; 0 if everything was as it should be."""
    # A polite kill ends everything as Ctrl-C does, and Ctrl-C does so even where a shell had it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with running_server(docker=False) as server:
            print(f"presence demo on {server.description}")
            timeline = asyncio.run(run(server))
    except NoServerError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; everything that it started is ended", file=sys.stderr)
        return 130
    if timeline.differences:
        print("\ndemo: FAILED, this differs from what should be:")
        for difference in timeline.differences:
            print(f"  - {difference}")
        return 1
    print(f"\ndemo: all {timeline.checks} checks passed, no key of a connection is left; {timeline.seconds():.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
