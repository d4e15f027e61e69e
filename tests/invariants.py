"""What must hold in a namespace at every moment (guarantees 1 and 6), read from the keys themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import redis


RECORD_FIELDS = ("user_id", "game_id", "epoch", "connected_at", "last_seen")
"""The last two only where they are needed: registered again, detached."""


@dataclass
class Keyspace:
    """Every key of a namespace, as it is stored, read in one transaction."""

    records: dict[str, dict[str, str]] = field(default_factory=dict)
    users: dict[str, list[str]] = field(default_factory=dict)
    registered_at: dict[tuple[str, str], int] = field(default_factory=dict)
    games: dict[str, dict[str, str]] = field(default_factory=dict)
    last_seen: dict[str, int] = field(default_factory=dict)
    epoch: int = 0
    ttls_ms: dict[str, int] = field(default_factory=dict)
    """Of the keys in which connections live."""
    other_ttls_ms: dict[str, int] = field(default_factory=dict)
    """Of the namespace's last epoch, and of the answers that are kept for a minute for calls that are sent again."""


def read_keyspace(client: redis.Redis, namespace: str) -> Keyspace:
    """Read all keys of a namespace; nothing may write to it meanwhile."""
    prefix = f"{{{namespace}}}:"
    pattern = "".join(f"\\{character}" if character in "*?[]\\^-" else character for character in prefix)
    keyspace = Keyspace()
    for raw in client.scan_iter(match=(pattern + "*").encode(), count=10_000):
        key = (raw if isinstance(raw, bytes) else raw.encode()).decode()
        kind, _, name = key.removeprefix(prefix).partition(":")
        ttls = keyspace.other_ttls_ms if kind in ("epoch", "reply") else keyspace.ttls_ms
        ttls[key] = int(_ask(client, "PTTL", key))
        if kind == "conn":
            keyspace.records[name] = _pairs(_ask(client, "HGETALL", key))
        elif kind == "user_conns":
            keyspace.users[name] = [sid.decode() for sid in _ask(client, "ZRANGE", key, 0, -1)]
            for sid in keyspace.users[name]:
                keyspace.registered_at[name, sid] = int(float(_ask(client, "ZSCORE", key, sid)))
        elif kind == "game_conns":
            keyspace.games[name] = _pairs(_ask(client, "HGETALL", key))
        elif key == prefix + "last_seen":
            scores = _ask(client, "ZRANGE", key, 0, -1)
            for sid in scores:
                keyspace.last_seen[sid.decode()] = int(float(_ask(client, "ZSCORE", key, sid)))
        elif key == prefix + "epoch":
            keyspace.epoch = int(_ask(client, "GET", key))
        elif kind != "reply":
            raise AssertionError(f"unknown key {key!r}")
    return keyspace


def _ask(client: redis.Redis, *command: Any) -> Any:
    return client.execute_command(*command, NEVER_DECODE=True)


def _pairs(reply: Any) -> dict[str, str]:
    if not isinstance(reply, dict):
        reply = dict(zip(reply[::2], reply[1::2], strict=True))
    return {name.decode(): value.decode() for name, value in reply.items()}


def _game_entry(keyspace: Keyspace, sid: str, record: dict[str, str]) -> str:
    """What a game must keep of a member: see lua/include/game_entry.lua."""
    times = [record["epoch"], record.get("connected_at", "")]
    if "last_seen" in record:
        times.append(record["last_seen"])
    return ":".join(times).removesuffix(":") + f" {record['user_id']}"


def violations(keyspace: Keyspace, connections_per_user: int = 1) -> list[str]:
    """Name everything that is wrong in a namespace."""
    wrong = []
    for sid, record in keyspace.records.items():
        if not {"epoch", "game_id", "user_id"} <= record.keys() <= {*RECORD_FIELDS}:
            wrong.append(f"connection {sid!r} is partial: {record}")
            continue
        if sid not in keyspace.users.get(record["user_id"], []):
            wrong.append(f"connection {sid!r} is not among the connections of its user {record['user_id']!r}")
        if keyspace.registered_at.get((record["user_id"], sid)) != int(record["epoch"]):
            wrong.append(f"connection {sid!r} has another epoch than its user's list says: {record}")
        if int(record["epoch"]) > keyspace.epoch:
            wrong.append(f"connection {sid!r} has an epoch above the namespace's, {keyspace.epoch}: {record}")
        if sid not in keyspace.last_seen:
            wrong.append(f"connection {sid!r} is not in last_seen")
        elif (keyspace.last_seen[sid] < 0) is not ("last_seen" in record):
            wrong.append(f"connection {sid!r} is half detached: {record}, {keyspace.last_seen[sid]}")
        game_id = record["game_id"]
        if game_id and keyspace.games.get(game_id, {}).get(sid) != _game_entry(keyspace, sid, record):
            wrong.append(f"connection {sid!r} says game {game_id!r}, which does not list it so")
    for user_id, sids in keyspace.users.items():
        if len(sids) > connections_per_user:
            wrong.append(f"user {user_id!r} has {len(sids)} connections: {sids}")
        wrong += [
            f"user {user_id!r} lists {sid!r}, which is not a connection of that user"
            for sid in sids
            if keyspace.records.get(sid, {}).get("user_id") != user_id
        ]
    for game_id, members in keyspace.games.items():
        wrong += [
            f"game {game_id!r} lists {sid!r}, whose connection does not say so"
            for sid in members
            if keyspace.records.get(sid, {}).get("game_id") != game_id
        ]
    wrong += [f"last_seen lists {sid!r}, which has no record" for sid in keyspace.last_seen.keys() - keyspace.records]
    ttls_ms = keyspace.ttls_ms | keyspace.other_ttls_ms
    wrong += [f"key {key!r} has no TTL" for key, ttl in ttls_ms.items() if ttl == -1]
    return wrong
