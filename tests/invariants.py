"""What must hold in a namespace at every moment (guarantees 1 and 6), read from the keys themselves.

What a key holds is taken apart here by code of its own: it must find what the scripts and the library get wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import redis


@dataclass
class Keyspace:
    """Every key of a namespace, as it is stored; nothing may write to it while it is read."""

    records: dict[str, dict[str, str]] = field(default_factory=dict)
    """sid -> user_id, game_id, epoch, server, metadata (Latin-1), and where they are there connected_at, last_seen."""
    users: dict[str, list[str]] = field(default_factory=dict)
    games: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)
    """game -> sid -> the same as in records, without the game."""
    servers: dict[str, set[str]] = field(default_factory=dict)
    """boot epoch and server_id -> sids"""
    known_servers: dict[str, int] = field(default_factory=dict)
    last_seen: dict[str, int] = field(default_factory=dict)
    epoch: int = 0
    ttls_ms: dict[str, int] = field(default_factory=dict)
    """Of the keys in which connections live."""
    other_ttls_ms: dict[str, int] = field(default_factory=dict)
    """Of last_seen while it holds no more than the namespace's last epoch, of the answers that are kept for a minute
    for calls that are sent again, of the known servers and the stream of events."""


def key_pattern(prefix: str) -> str:
    """Give the pattern of KEYS and SCAN for the keys that begin so."""
    return "".join(f"\\{character}" if character in "*?[]\\^-" else character for character in prefix) + "*"


_READS = {
    "conn": ("GET",),
    "user_conns": ("GET",),
    "game_conns": ("HGETALL",),
    "server_conns": ("SMEMBERS",),
    "servers": ("ZRANGE", 0, -1),
    "last_seen": ("ZRANGE", 0, -1),
    "reply": ("EXISTS",),
    "events": ("EXISTS",),
}
"""How each kind of key is read; of two kinds, only the TTL counts. There must be no other."""


def read_keyspace(client: redis.Redis, namespace: str) -> Keyspace:
    """Read all keys of a namespace; nothing may write to it meanwhile."""
    prefix = f"{{{namespace}}}:"
    keyspace = Keyspace()
    found = client.scan_iter(match=key_pattern(prefix).encode(), count=10_000)
    keys = [(key if isinstance(key, bytes) else key.encode()).decode() for key in found]
    parts = [key.removeprefix(prefix).partition(":") for key in keys]
    commands: list[tuple[Any, ...]] = []
    for key, (kind, _, _) in zip(keys, parts, strict=True):
        command, *rest = _READS[kind]
        commands += [("PTTL", key), (command, key, *rest)]
    replies = _ask(client, commands)
    for key, (kind, _, name), ttl_ms, value in zip(keys, parts, replies[::2], replies[1::2], strict=True):
        ttls = keyspace.other_ttls_ms if kind in ("reply", "servers", "events") else keyspace.ttls_ms
        ttls[key] = int(ttl_ms)
        if kind == "conn":
            length, _, rest = value.partition(b":")
            keyspace.records[name] = _body(rest[int(length) :]) | {"game_id": rest[: int(length)].decode()}
        elif kind == "user_conns":
            keyspace.users[name] = _sids(value)
        elif kind == "game_conns":
            keyspace.games[name] = {sid.decode(): _body(body) for sid, body in _pairs(value)}
        elif kind == "server_conns":
            keyspace.servers[name] = {sid.decode() for sid in value}
        elif kind == "servers":
            keyspace.known_servers = _scores(client, key, value)
        elif kind == "last_seen":
            keyspace.last_seen = _scores(client, key, value)
            keyspace.epoch = -keyspace.last_seen.pop("", 0)
            if not keyspace.last_seen:
                keyspace.other_ttls_ms[key] = keyspace.ttls_ms.pop(key)
    return keyspace


def _ask(client: redis.Redis, commands: list[tuple[Any, ...]]) -> list[Any]:
    """Run commands, in one round trip."""
    with client.pipeline(transaction=False) as pipeline:
        for command in commands:
            pipeline.execute_command(*command, NEVER_DECODE=True)
        return pipeline.execute()


def _pairs(reply: Any) -> list[tuple[bytes, bytes]]:
    return list(reply.items()) if isinstance(reply, dict) else list(zip(reply[::2], reply[1::2], strict=True))


def _scores(client: redis.Redis, key: str, members: list[bytes]) -> dict[str, int]:
    (scores,) = _ask(client, [("ZMSCORE", key, *members)])
    return {member.decode(): int(float(score)) for member, score in zip(members, scores, strict=True)}


def _sids(text: bytes) -> list[str]:
    """Take apart ``<length>:<sid>`` of each, and then maybe ``=`` and the kept answer of a register."""
    sids = []
    while text and not text.startswith(b"="):
        length, _, text = text.partition(b":")
        sids.append(text[: int(length)].decode())
        text = text[int(length) :]
    return sids


def _body(body: bytes) -> dict[str, str]:
    """Take apart ``<epoch>[:<connected_at>[:<last_seen>[:<length>:<length>]]] <user_id><server><metadata>``."""
    head, _, payload = body.partition(b" ")
    numbers = head.decode().split(":") + [""] * 4
    user_end = int(numbers[3] or len(payload))
    server_end = user_end + int(numbers[4] or 0)
    fields = {
        "epoch": numbers[0],
        "user_id": payload[:user_end].decode(),
        "server": payload[user_end:server_end].decode(),
        "metadata": payload[server_end:].decode("latin-1"),
    }
    return fields | {name: text for name, text in zip(("connected_at", "last_seen"), numbers[1:3], strict=True) if text}


def violations(keyspace: Keyspace, connections_per_user: int = 1, least_ttl_ms: int = 0) -> list[str]:
    """Name everything that is wrong in a namespace; no key in which connections live may expire earlier than that."""
    wrong = []
    for sid, record in keyspace.records.items():
        if sid not in keyspace.users.get(record["user_id"], []):
            wrong.append(f"connection {sid!r} is not among the connections of its user {record['user_id']!r}")
        if int(record["epoch"]) > keyspace.epoch:
            wrong.append(f"connection {sid!r} has an epoch above the namespace's, {keyspace.epoch}: {record}")
        if sid not in keyspace.last_seen:
            wrong.append(f"connection {sid!r} is not in last_seen")
        elif (keyspace.last_seen[sid] < 0) is not ("last_seen" in record):
            wrong.append(f"connection {sid!r} is half detached: {record}, {keyspace.last_seen[sid]}")
        game_id = record["game_id"]
        body = {name: value for name, value in record.items() if name != "game_id"}
        if game_id and keyspace.games.get(game_id, {}).get(sid) != body:
            wrong.append(f"connection {sid!r} says game {game_id!r}, which does not list it so")
        server = record["server"]
        if server and sid not in keyspace.servers.get(server, ()):
            wrong.append(f"connection {sid!r} says server {server!r}, which does not list it")
        if server and server not in keyspace.known_servers:
            wrong.append(f"connection {sid!r} says server {server!r}, which no cleanup will find")
    for user_id, sids in keyspace.users.items():
        if not sids:
            wrong.append(f"user {user_id!r} has an empty list")
        if len(sids) > connections_per_user:
            wrong.append(f"user {user_id!r} has {len(sids)} connections: {sids}")
        epochs = [int(keyspace.records[sid]["epoch"]) for sid in sids if sid in keyspace.records]
        if sorted(set(epochs)) != epochs:
            wrong.append(f"user {user_id!r} does not list the connections by their epochs: {sids}, {epochs}")
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
    for server, sids_of_server in keyspace.servers.items():
        wrong += [
            f"server {server!r} lists {sid!r}, whose connection does not say so"
            for sid in sids_of_server
            if keyspace.records.get(sid, {}).get("server") != server
        ]
    wrong += [f"last_seen lists {sid!r}, which has no record" for sid in keyspace.last_seen.keys() - keyspace.records]
    ttls_ms = keyspace.ttls_ms | keyspace.other_ttls_ms
    wrong += [f"key {key!r} has no TTL" for key, ttl in ttls_ms.items() if ttl == -1]
    wrong += [
        f"key {key!r} expires early, in {ttl} ms" for key, ttl in keyspace.ttls_ms.items() if -1 < ttl < least_ttl_ms
    ]
    return wrong
