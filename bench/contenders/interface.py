"""What every contender offers, and what must hold in its keys at the end of any run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:
    from redis.asyncio import Redis

CONN_TTL_SECONDS = 3600
STALE_SECONDS = 90


class Told(NamedTuple):
    """What *presence* tells of a connection, but for its times, which are not the same in any two schedules."""

    sid: str
    user_id: str
    game_id: str | None
    is_detached: bool
    server_id: str | None
    metadata: bytes


@dataclass(frozen=True, slots=True)
class State:
    """What the keys of a namespace say, read while nobody writes to it."""

    records: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    """sid → user id and game id, of the whole records."""
    users: dict[str, list[str]] = field(default_factory=dict)
    """User id → the sids that the user's entry names."""
    games: dict[str, set[str]] = field(default_factory=dict)
    """Game id → sids."""
    partial: dict[str, dict[str, str]] = field(default_factory=dict)
    """sid → the fields of a record that lacks some."""
    without_ttl: list[str] = field(default_factory=list)
    """Keys that never expire."""
    own_violations: list[str] | None = None
    """What is wrong as the contender's own check has it, where there is one that sees more than this one."""
    told: list[Told] | None = None
    """Every connection in the order of registration, where the contender keeps as much."""
    game_servers: list[tuple[str, bool]] | None = None
    """The known starts of game servers, sorted: its id, and whether a later one has replaced it; likewise."""
    connections_per_user: int = 1


class Contender(Protocol):
    """Presence in one namespace, through one client; any number of them share the namespace.

    The client decodes replies (``decode_responses=True``); it stays the caller's to close.
    """

    name: ClassVar[str]

    def __init__(self, client: Redis, namespace: str) -> None: ...

    async def register(self, sid: str, user_id: str) -> list[str]:
        """Make a connection the user's active one; give the displaced sids that this caller is told of."""

    async def unregister(self, sid: str) -> bool:
        """Remove a connection; tell whether this call removed it."""

    async def join(self, sid: str, game_id: str) -> tuple[bool, str | None]:
        """Put a connection into a game; tell whether it is in it, and the other game that it left."""

    async def leave(self, sid: str) -> str | None:
        """Take a connection out of its game; give that game."""

    async def heartbeat(self, sid: str) -> bool:
        """Mark a connection as seen now; tell whether there is such a connection."""

    async def cleanup(self, threshold_seconds: float) -> list[str]:
        """Remove the connections not seen for longer; give the sids that this caller removed."""

    async def get_game(self, game_id: str) -> dict[str, str]:
        """Give sid → user id of the connections in a game."""

    async def is_online(self, user_id: str) -> bool:
        """Tell whether the user has a connection seen within ``STALE_SECONDS``."""

    async def count(self) -> int:
        """Count the connections."""

    async def read_state(self) -> State:
        """Read all keys of the namespace, which nobody may write to meanwhile."""

    async def age(self, seconds: float) -> None:
        """Make every connection older, as if so much time had passed."""

    async def expire_locks(self) -> None:
        """Let the locks that a dead caller holds expire now, as they would by themselves."""

    async def aclose(self) -> None:
        """Free what the contender itself holds."""


def violations(state: State) -> list[str]:
    """Name everything that breaks the invariants of a presence: ``"<kind>: <what>"`` each, and each once.

    Every record is whole, its user's entry names it, and its game lists it; a user has one connection, or as many as
    are allowed; entries and games name only connections that agree; every key has a TTL.
    """
    if state.own_violations is not None:
        return state.own_violations
    wrong = [f"partial record: {sid} has only {sorted(fields)}" for sid, fields in state.partial.items()]
    for sid, (user_id, game_id) in state.records.items():
        if sid not in state.users.get(user_id, []):
            wrong.append(f"orphan: connection {sid} is not in the entry of its user {user_id}")
        if game_id is not None and sid not in state.games.get(game_id, set()):
            wrong.append(f"unlisted member: connection {sid} says game {game_id}, which does not list it")
    connections = Counter(user_id for user_id, _ in state.records.values())
    wrong += [
        f"two connections: user {user_id} has {count}"
        for user_id, count in connections.items()
        if count > state.connections_per_user
    ]
    for user_id, sids in state.users.items():
        wrong += [
            f"dangling entry: user {user_id} names {sid}, which is no connection of that user"
            for sid in sids
            if state.records.get(sid, (None, None))[0] != user_id
        ]
    for game_id, members in state.games.items():
        wrong += [
            f"stray member: game {game_id} lists {sid}, whose connection does not say so"
            for sid in sorted(members)
            if state.records.get(sid, (None, None))[1] != game_id
        ]
    return wrong + [f"no TTL: {key}" for key in state.without_ttl]


def kind_of(violation: str) -> str:
    """Give the kind of a violation that ``violations`` named."""
    return violation.partition(":")[0]
