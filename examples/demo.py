"""The demo: two game servers, one Redis and real Socket.IO clients; everything that is answered is checked.

    python -m examples.demo

It tells a story in chapters, prints what the library answered to whom, and checks every answer and, after each chapter,
the keys themselves. It exits with 0 if everything was as it should be, and with 1 otherwise.

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

from examples.demo_cast import Device, ServerProcess, StuckError, Timeline
from presence import ConnectionManager, PresenceError
from tests.invariants import read_keyspace, violations
from tests.server import NoServerError, Server, running_server

HEARTBEAT_SECONDS = 1.0
STALE_SECONDS = 3 * HEARTBEAT_SECONDS
BEAT_SECONDS = 0.4
"""More often than needed, so that a machine with other things to do does not make anyone stale."""
CLEANUP_SECONDS = 0.5
GRACE_SECONDS = 30.0
"""How long a seat is kept; nobody here stays away for that long, however busy the machine."""
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

    async def told(self, device: Device, *expected: tuple[str, str]) -> None:
        """Wait until a player has been told this much since this was last asked, and check that it was exactly this."""
        await self.timeline.until(
            lambda: len(device.told) >= device.told_before + len(expected), f"{device.user_id} is told {expected}"
        )
        news = device.told[device.told_before :]
        device.told_before = len(device.told)
        self.timeline.expect(f"news to {device.user_id}", news, list(expected))

    async def ask(self, expected: Any, operation: str, *arguments: str) -> None:
        """Call an operation from here, a third place beside the two servers, and check the answer."""
        answer = await getattr(self.manager, operation)(*arguments)
        words = self.timeline.words
        call = f"{operation}({', '.join(words(argument) for argument in arguments)})"
        self.timeline.say("demo", f"{call} -> {words(answer)}")
        self.timeline.expect(call, answer, expected)

    async def check_keys(self, *, users: list[str]) -> None:
        """Check that every invariant holds, and that exactly these users have a connection, or a seat that is kept."""
        try:
            keyspace = await asyncio.to_thread(read_keyspace, self.client, self.namespace)
        except AssertionError as error:
            self.timeline.differ(str(error))
            return
        broken = violations(keyspace)
        for violation in broken:
            self.timeline.differ(self.timeline.words_in(violation))
        self.timeline.checks += 1
        self.timeline.expect("users with a connection or a seat", sorted(keyspace.users), users)
        if not users:
            self.timeline.expect("keys of connections that are left", sorted(keyspace.ttls_ms), [])
        verdict = f"{len(broken)} invariants are broken" if broken else "every invariant holds"
        self.timeline.say("demo", f"read all {len(keyspace.ttls_ms)} keys of connections: {verdict}")


async def meet(stage: Stage) -> tuple[Device, Device]:
    """Let two players on different servers meet in a game, and beat."""
    stage.timeline.chapter("alice and bob, on different servers, meet in a game")
    alice, bob = stage.device("alice", stage.one), stage.device("bob", stage.two)
    for player in (alice, bob):
        registration = await player.connect()
        stage.timeline.expect(f"displaced by {player.user_id}'s first connection", displaced_by(registration), [])
    for player in (alice, bob):
        stage.timeline.expect(f"{player.user_id} joins", await player.call("join_game", GAME), {"joined": True})
    await stage.told(alice, ("opponent_joined", "bob"))
    for player in (alice, bob):
        player.beat(BEAT_SECONDS)
        beat = await stage.timeline.answer("update_heartbeat", player.sid)
        stage.timeline.expect(f"{player.user_id}'s heartbeat", beat.value, True)
    await stage.ask(bob.sid, "get_opponent_sid", GAME, "alice")
    await stage.ask({"alice": alice.sid, "bob": bob.sid}, "get_game_user_sids", GAME)
    await stage.ask(2, "get_connection_count")
    await stage.check_keys(users=["alice", "bob"])
    return alice, bob


async def come_back_within_the_grace(stage: Stage, old: Device, opponent: Device) -> Device:
    """Drop a player, whose seat is kept, and let the player take it again through the other server."""
    stage.timeline.chapter("alice's network fails; her seat is kept, and she takes it again through server two")
    stage.timeline.say(old.user_id, "loses the network")
    old.cut()
    detached = (await stage.timeline.answer("unregister_connection", old.sid)).value
    stage.timeline.expect("the game of the seat that is kept", detached and detached["game_id"], GAME)
    # Server one detached her, bob is on server two: only the event tells that server.
    await stage.told(opponent, ("opponent_away", "alice"))
    await stage.ask(False, "is_user_online", "alice")
    await stage.ask(None, "get_opponent_sid", GAME, "bob")
    await stage.ask(1, "get_connection_count")
    await stage.check_keys(users=["alice", "bob"])

    new = stage.device("alice", stage.two)
    await resume(stage, new, old, GAME)
    await stage.told(opponent, ("opponent_back", "alice"))
    await leave_and_join(stage, opponent, new)
    await stage.ask({"alice": new.sid, "bob": opponent.sid}, "get_game_user_sids", GAME)
    await stage.ask(False, "update_heartbeat", old.sid)
    await stage.check_keys(users=["alice", "bob"])
    return new


async def resume(stage: Stage, new: Device, old: Device, game_id: str) -> None:
    """Connect a player whose seat is kept: the registration that resumes it names the game."""
    registration = await new.connect()
    stage.timeline.expect(f"displaced by {new.user_id}'s return", displaced_by(registration), [])
    resumed_from = registration["resumed_from"]
    found = (registration["resumed"], resumed_from and resumed_from["sid"], registration["connection"]["game_id"])
    stage.timeline.expect(
        f"resumed by {new.user_id}'s return, from what, in which game", found, (True, old.sid, game_id)
    )
    await stage.told(new, ("resumed", new.user_id))
    new.beat(BEAT_SECONDS)


async def leave_and_join(stage: Stage, player: Device, opponent: Device) -> None:
    """Let a player leave and join again: a resumed opponent is told, so the resume has put it back into the room."""
    left = await player.call("leave_game")
    stage.timeline.expect(f"the game that {player.user_id} leaves", left, {"left_game_id": GAME})
    stage.timeline.expect(f"{player.user_id} joins again", await player.call("join_game", GAME), {"joined": True})
    await stage.told(opponent, ("opponent_left", player.user_id), ("opponent_joined", player.user_id))


async def come_back_before_the_disconnect(stage: Stage, old: Device, opponent: Device) -> Device:
    """Drop a player, who is back on the other server before the first one has handled the disconnect."""
    stage.timeline.chapter("alice drops; while server two still handles that, she comes back through server one")
    await old.server.tell("hold")
    stage.timeline.say(old.user_id, "loses the network")
    old.cut()
    await stage.timeline.until(lambda: old.sid in stage.timeline.held, "the disconnect is under way on server two")
    await stage.ask(True, "is_user_online", "alice")

    new = stage.device("alice", stage.one)
    registration = await new.connect()
    stage.timeline.expect("displaced by alice's return", displaced_by(registration), [old.sid])
    stage.timeline.expect("the game that she is in", registration["connection"]["game_id"], GAME)
    new.beat(BEAT_SECONDS)
    await stage.told(new, ("resumed", "alice"))
    await stage.told(opponent, ("opponent_left", "alice"), ("opponent_back", "alice"))

    # The old disconnect has still not run, and nothing is in disorder because of that.
    await stage.check_keys(users=["alice", "bob"])

    stage.timeline.say("demo", "lets server two finish the old disconnect")
    await old.server.tell("release")
    late = await stage.timeline.answer("unregister_connection", old.sid)
    stage.timeline.expect("the late disconnect removes", late.value, None)
    await stage.ask(True, "is_user_online", "alice")
    await stage.ask(False, "update_heartbeat", old.sid)
    await stage.ask({"alice": new.sid, "bob": opponent.sid}, "get_game_user_sids", GAME)
    await stage.told(opponent)
    await stage.check_keys(users=["alice", "bob"])
    return new


async def change_devices(stage: Stage, old: Device, opponent: Device) -> Device:
    """Let a player connect once more while the old socket is open; the server that holds it sees that and closes it."""
    stage.timeline.chapter("bob takes up his phone, through server one; his laptop is still open, on server two")
    old.fall_silent()  # Otherwise a heartbeat may be what closes it.
    new = stage.device("bob", stage.one)
    registration = await new.connect()
    stage.timeline.expect("displaced by bob's phone", displaced_by(registration), [old.sid])
    stage.timeline.expect("the game that he is in", registration["connection"]["game_id"], GAME)
    await stage.timeline.until(lambda: old.closed, "server two closes bob's displaced socket, as it sees the event")
    late = await stage.timeline.answer("unregister_connection", old.sid)
    stage.timeline.expect("the disconnect of bob's displaced socket removes", late.value, None)
    await stage.told(new, ("resumed", "bob"))
    await stage.told(opponent, ("opponent_left", "bob"), ("opponent_back", "bob"))
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

    # A loser that was displaced while its server was still connecting it learns that from its first heartbeat.
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

    (removed,) = await stage.timeline.until(lambda: reported_by_cleanup(stage, "removed"), "a cleanup removes bob")
    stage.timeline.expect("removed by cleanup", (removed["sid"], removed["game_id"]), (silent.sid, GAME))
    seconds = (instant(removed["observed_at"]) - instant(removed["last_seen"])).total_seconds()
    stage.timeline.say("demo", f"by Redis's clock that was {seconds:.2f} s after his last heartbeat")
    stage.timeline.expect("silent for longer than three heartbeats", seconds > STALE_SECONDS, True)
    await stage.told(opponent, ("opponent_left", "bob"))
    await stage.timeline.until(lambda: silent.closed, "bob's socket is closed")
    late = await stage.timeline.answer("unregister_connection", silent.sid)
    stage.timeline.expect("the disconnect of a removed socket removes", late.value, None)
    await stage.ask(False, "is_user_online", "bob")
    await stage.ask(None, "get_opponent_sid", GAME, "alice")
    await stage.check_keys(users=["alice", "carol"])
    # Both servers clean up at once, all the time: the one that was removed was reported by one of them.
    stage.timeline.expect("removed by all cleanups together", len(reported_by_cleanup(stage, "removed")), 1)


async def lose_a_server(stage: Stage, alice: Device, carol: Device) -> tuple[Device, Device, Device]:
    """Kill a game server: the other one finds it dead, keeps the seats of its players, and they take them again."""
    stage.timeline.chapter("bob is back, through server two; server one dies, and its players go on through server two")
    bob = stage.device("bob", stage.two)
    stage.timeline.expect("displaced by bob's return", displaced_by(await bob.connect()), [])
    bob.beat(BEAT_SECONDS)
    for player, game_id in ((bob, GAME), (carol, OTHER_GAME)):
        stage.timeline.expect(f"{player.user_id} joins", await player.call("join_game", game_id), {"joined": True})
    await stage.told(alice, ("opponent_joined", "bob"))

    # Her race has decided where carol is.
    lost = [(player, game) for player, game in ((alice, GAME), (carol, OTHER_GAME)) if player.server is stage.one]
    await stage.one.kill()
    for player, _ in lost:
        await stage.timeline.until(lambda player=player: player.closed, "the sockets to server one end")  # type: ignore[misc]

    sids = sorted(player.sid for player, _ in lost)
    await stage.timeline.until(lambda: len(reported_by_cleanup(stage, "detached")) >= len(sids), "the seats are kept")
    detached = reported_by_cleanup(stage, "detached")
    stage.timeline.expect("detached by cleanup, each once", sorted(it["sid"] for it in detached), sids)
    await stage.told(bob, ("opponent_away", "alice"))
    await stage.ask(False, "is_user_online", "alice")
    await stage.ask(3 - len(lost), "get_connection_count")
    await stage.check_keys(users=["alice", "bob", "carol"])

    back = {player.user_id: player for player in (alice, carol)}
    for player, game_id in lost:
        back[player.user_id] = stage.device(player.user_id, stage.two)
        await resume(stage, back[player.user_id], player, game_id)
    await stage.told(bob, ("opponent_back", "alice"))
    await leave_and_join(stage, bob, back["alice"])
    await stage.ask({"alice": back["alice"].sid, "bob": bob.sid}, "get_game_user_sids", GAME)
    await stage.ask({"carol": back["carol"].sid}, "get_game_user_sids", OTHER_GAME)
    await stage.ask(3, "get_connection_count")
    await stage.check_keys(users=["alice", "bob", "carol"])
    stage.timeline.expect("detached by all cleanups", len(reported_by_cleanup(stage, "detached")), len(sids))
    return back["alice"], bob, back["carol"]


async def leave(stage: Stage, alice: Device, bob: Device, carol: Device) -> None:
    """Let everyone leave in good order, one in the middle of a game: no key of a connection is left."""
    stage.timeline.chapter("alice leaves, carol takes her place, and everyone leaves")
    await close(stage, alice, GAME)
    await stage.told(bob, ("opponent_left", "alice"))
    await stage.ask(1, "get_game_connection_count", GAME)

    stage.timeline.expect("carol joins", await carol.call("join_game", GAME), {"joined": True})
    await stage.told(bob, ("opponent_joined", "carol"))
    await stage.ask(0, "get_game_connection_count", OTHER_GAME)
    await stage.ask({"bob": bob.sid, "carol": carol.sid}, "get_game_user_sids", GAME)

    stage.timeline.expect("the game that bob leaves", await bob.call("leave_game"), {"left_game_id": GAME})
    await stage.told(carol, ("opponent_left", "bob"))
    await close(stage, bob, None)
    await close(stage, carol, GAME)
    await stage.ask(0, "get_connection_count")
    await stage.check_keys(users=[])
    check_that_each_connection_went_once(stage)
    await check_the_events(stage)


async def close(stage: Stage, device: Device, game_id: str | None) -> None:
    """Let a player disconnect on purpose: no seat is kept."""
    await device.leave()
    removed = (await stage.timeline.answer("unregister_connection", device.sid)).value
    found = removed and (removed["sid"], removed["game_id"], removed["detached_until"])
    stage.timeline.expect(f"removed by {device.user_id}'s disconnect", found, (device.sid, game_id, None))
    await device.close()


def reported_by_cleanup(stage: Stage, what: str) -> list[dict[str, Any]]:
    """Give the connections that all cleanups on both servers have reported as removed, or as detached."""
    cleanups = [answer.value for answer in stage.timeline.answers if answer.operation == "run_cleanup"]
    return [connection for cleanup in cleanups for connection in cleanup[what]]


def check_that_each_connection_went_once(stage: Stage) -> None:
    """Compare all registered connections with all that were reported as gone, by whatever operation."""
    registered, gone = [], []
    for answer in stage.timeline.answers:
        match answer.value:
            case {"type": "Registration"}:
                registered.append(answer.value["connection"]["sid"])
                gone += displaced_by(answer.value)
                gone += detached_before(answer.value)
            case {"type": "CleanupResult"}:
                gone += [connection["sid"] for connection in answer.value["removed"]]
            case {"type": "ConnectionInfo", "detached_until": None} if answer.operation == "unregister_connection":
                gone.append(answer.value["sid"])
    stage.timeline.say("demo", f"{len(registered)} connections were registered, {len(gone)} were reported as gone")
    stage.timeline.expect("connections reported as gone, each once", sorted(gone), sorted(registered))


async def check_the_events(stage: Stage) -> None:
    """Check that both servers saw the same events while they lived, in which each connection came and went once."""
    one, two = (stage.timeline.events.setdefault(server.name, []) for server in (stage.one, stage.two))
    came: list[str] = []
    gone: list[str] = []

    def all_are_gone() -> bool:
        came[:] = [it["connection"]["sid"] for it in two if it["type"] in ("registered", "resumed")]
        gone[:] = [it["connection"]["sid"] for it in two if it["type"] in ("displaced", "unregistered", "expired")]
        gone.extend(sid for it in two for sid in detached_before(it))
        return len(gone) >= len(stage.devices)

    await stage.timeline.until(all_are_gone, "server two sees all events")
    stage.timeline.expect("connections that came and went in the events", sorted(gone), sorted(came))
    stage.timeline.expect("connections that came in the events", sorted(came), sorted(it.sid for it in stage.devices))
    stage.timeline.expect("the events that server two saw while server one lived", two[: len(one)], one)
    saw = f"{stage.one.name} saw {len(one)} events, {stage.two.name} the same and {len(two) - len(one)} more"
    stage.timeline.say("demo", saw)


def displaced_by(registration: dict[str, Any]) -> list[str]:
    """Give the sids that a registration displaced."""
    return [connection["sid"] for connection in registration["displaced"]]


def detached_before(registration_or_event: dict[str, Any]) -> list[str]:
    """Give the sid whose kept seat was taken over; a displaced one is reported as displaced."""
    taken_over = registration_or_event["resumed_from"]
    return [taken_over["sid"]] if taken_over and taken_over["detached_until"] else []


def instant(text: str) -> datetime:
    """Read a time as ``demo_server`` reports it."""
    return datetime.fromisoformat(text)


async def tell_the_story(stage: Stage) -> None:
    """Play all chapters in their order."""
    stage.timeline.chapter("two game servers start")
    await asyncio.gather(stage.one.start(), stage.two.start())
    for server in (stage.one, stage.two):
        beat = await stage.timeline.answer("update_server_heartbeat", server.server_id)
        stage.timeline.expect(f"{server.name}'s own heartbeat", beat.value, True)
    alice, bob = await meet(stage)
    alice = await come_back_within_the_grace(stage, alice, bob)
    alice = await come_back_before_the_disconnect(stage, alice, bob)
    bob = await change_devices(stage, bob, alice)
    carol = await race(stage)
    await fall_silent(stage, bob, alice)
    alice, bob, carol = await lose_a_server(stage, alice, carol)
    await leave(stage, alice, bob, carol)
    stage.timeline.is_over = True


def remove_leftovers(timeline: Timeline, client: redis.Redis, namespace: str) -> None:
    """Look once more for keys, now that the servers have ended, and take away what is there."""
    keyspace = read_keyspace(client, namespace)
    if timeline.is_over and not timeline.differences:
        timeline.expect("keys of connections after the servers have ended", list(keyspace.ttls_ms), [])
        timeline.expect("keys without a TTL", [key for key, ttl in keyspace.other_ttls_ms.items() if ttl < 0], [])
        kinds = sorted({key.removeprefix(f"{{{namespace}}}:").partition(":")[0] for key in keyspace.other_ttls_ms})
        timeline.say("demo", f"what is left expires by itself, and is removed now: {', '.join(kinds)}")
    keys = [*keyspace.ttls_ms, *keyspace.other_ttls_ms]
    if keys:
        client.delete(*keys)


async def run(server: Server) -> Timeline:
    """Set the stage, play the story, and end everything that was started, whatever happens."""
    timeline = Timeline()
    # A namespace of its own: PRESENCE_REDIS_URL may name a server that others use.
    namespace = f"demo-{secrets.token_hex(4)}"
    options = [f"--namespace={namespace}", f"--heartbeat-seconds={HEARTBEAT_SECONDS}"]
    options += [f"--cleanup-seconds={CLEANUP_SECONDS}", f"--grace-seconds={GRACE_SECONDS}"]
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
    # A polite kill ends everything as Ctrl-C does, and Ctrl-C does so even if a shell had it ignored.
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
    passed = f"all {timeline.checks} checks passed in {timeline.seconds():.1f} s"
    print(f"\ndemo: {passed}; no key of a connection is left, what else was left had a TTL")
    return 0


if __name__ == "__main__":
    sys.exit(main())
