"""What the operations must do, as plain Python over dictionaries: no Redis, no Lua, no concurrency."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class ModelConnection:
    """A connection; times in milliseconds of the server's clock."""

    sid: str
    user_id: str
    game_id: str | None
    connected_at: int
    last_seen: int


@dataclass
class Model:
    """A namespace. Every operation is told what time it is."""

    conn_ttl_ms: int
    stale_ms: int
    connections_per_user: int = 1
    connections: dict[str, ModelConnection] = field(default_factory=dict)
    """All records by sid, those that have expired and were not cleaned up among them."""
    registered: list[str] = field(default_factory=list)
    """Their sids in the order of registration."""

    def is_live(self, connection: ModelConnection, now: int) -> bool:
        return connection.last_seen >= now - self.conn_ttl_ms

    def live(self, sid: str, now: int) -> ModelConnection | None:
        connection = self.connections.get(sid)
        return connection if connection and self.is_live(connection, now) else None

    def of_user(self, user_id: str) -> list[ModelConnection]:
        """All connections of a user, in the order of registration."""
        return [self.connections[sid] for sid in self.registered if self.connections[sid].user_id == user_id]

    def _remove(self, sid: str) -> ModelConnection:
        self.registered.remove(sid)
        return self.connections.pop(sid)

    def register(
        self, sid: str, user_id: str, now: int
    ) -> tuple[ModelConnection, list[ModelConnection], ModelConnection | None]:
        """Give the connection, the displaced ones and the replaced one."""
        replaced = self._remove(sid) if sid in self.connections else None
        connection = ModelConnection(sid, user_id, None, now, now)
        if replaced and replaced.user_id == user_id and self.is_live(replaced, now):
            connection = replace(replaced, last_seen=now)
            replaced = None
        others = self.of_user(user_id)
        expired = [other for other in others if not self.is_live(other, now)]
        live = [other for other in others if self.is_live(other, now)]
        too_many = max(0, len(live) + 1 - self.connections_per_user)
        gone = expired + live[:too_many]
        displaced = [self._remove(other.sid) for other in others if other in gone]
        self.connections[sid] = connection
        self.registered.append(sid)
        return connection, displaced, replaced

    def unregister(self, sid: str, now: int) -> ModelConnection | None:
        return self._remove(sid) if self.live(sid, now) else None

    def join(self, sid: str, game_id: str, now: int) -> tuple[bool, str | None]:
        connection = self.live(sid, now)
        if not connection:
            return False, None
        self.connections[sid] = replace(connection, game_id=game_id)
        return True, connection.game_id if connection.game_id != game_id else None

    def leave(self, sid: str, now: int) -> str | None:
        connection = self.live(sid, now)
        if not connection:
            return None
        self.connections[sid] = replace(connection, game_id=None)
        return connection.game_id

    def heartbeat(self, sid: str, now: int) -> bool:
        connection = self.live(sid, now)
        if not connection:
            return False
        self.connections[sid] = replace(connection, last_seen=now)
        return True

    def cleanup(self, threshold_ms: int, now: int) -> list[ModelConnection]:
        oldest_kept = now - min(threshold_ms, self.conn_ttl_ms)
        stale = [connection for connection in self.connections.values() if connection.last_seen < oldest_kept]
        return [self._remove(connection.sid) for connection in stale]

    def user_connection(self, user_id: str, now: int) -> ModelConnection | None:
        live = [connection for connection in self.of_user(user_id) if self.is_live(connection, now)]
        return live[-1] if live else None

    def is_online(self, user_id: str, now: int) -> bool:
        oldest_online = now - min(self.stale_ms, self.conn_ttl_ms)
        return any(connection.last_seen >= oldest_online for connection in self.of_user(user_id))

    def game(self, game_id: str, now: int) -> list[ModelConnection]:
        """The live connections in a game, in the order of registration."""
        registered = (self.connections[sid] for sid in self.registered)
        return [
            connection for connection in registered if connection.game_id == game_id and self.is_live(connection, now)
        ]

    def user_sids(self, game_id: str, now: int) -> dict[str, str]:
        return {member.user_id: member.sid for member in self.game(game_id, now)}

    def opponent(self, game_id: str, user_id: str, now: int) -> str | None:
        return next((sid for other, sid in self.user_sids(game_id, now).items() if other != user_id), None)

    def count(self, now: int) -> int:
        return sum(self.is_live(connection, now) for connection in self.connections.values())

    def age(self, milliseconds: int) -> None:
        """Move everything into the past."""
        for sid, connection in self.connections.items():
            self.connections[sid] = replace(
                connection,
                connected_at=connection.connected_at - milliseconds,
                last_seen=connection.last_seen - milliseconds,
            )
