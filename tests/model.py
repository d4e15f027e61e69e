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
    epoch: int = 0
    detached_until: int | None = None


@dataclass(frozen=True)
class ModelRegistration:
    """What a register answers."""

    connection: ModelConnection
    displaced: list[ModelConnection]
    replaced: ModelConnection | None
    resumed_from: ModelConnection | None


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
        return connection.detached_until is None and connection.last_seen >= now - self.conn_ttl_ms

    def is_seat(self, connection: ModelConnection, now: int) -> bool:
        """Whether it is detached, and within its grace."""
        return connection.detached_until is not None and connection.detached_until >= now

    def holds(self, connection: ModelConnection, now: int) -> bool:
        return self.is_live(connection, now) or self.is_seat(connection, now)

    def known(self, sid: str, now: int) -> ModelConnection | None:
        """Give a connection that is live, or detached and within its grace."""
        connection = self.connections.get(sid)
        return connection if connection and self.holds(connection, now) else None

    def live(self, sid: str, now: int) -> ModelConnection | None:
        connection = self.connections.get(sid)
        return connection if connection and self.is_live(connection, now) else None

    def of_user(self, user_id: str) -> list[ModelConnection]:
        """All connections of a user, in the order of registration."""
        return [self.connections[sid] for sid in self.registered if self.connections[sid].user_id == user_id]

    def _remove(self, sid: str) -> ModelConnection:
        self.registered.remove(sid)
        return self.connections.pop(sid)

    def register(self, sid: str, user_id: str, now: int, epoch: int) -> ModelRegistration:
        own = self._remove(sid) if sid in self.connections else None
        kept = own if own and own.user_id == user_id and self.holds(own, now) else None
        connection = ModelConnection(sid, user_id, None, now, now, epoch)
        resumed_from = None
        if kept:
            connection = replace(kept, last_seen=now, epoch=epoch, detached_until=None)
            resumed_from = kept if self.is_seat(kept, now) else None
        others = self.of_user(user_id)
        seats = [other for other in others if self.is_seat(other, now)]
        if seats and not kept:
            resumed_from = seats[-1]
            connection = replace(connection, game_id=resumed_from.game_id)
            self._remove(resumed_from.sid)
            others.remove(resumed_from)
        gone = [other for other in others if not self.holds(other, now)]
        holding = [other for other in others if self.holds(other, now)]
        gone += holding[: max(0, len(holding) + 1 - self.connections_per_user)]
        displaced = [self._remove(other.sid) for other in others if other in gone]
        self.connections[sid] = connection
        self.registered.append(sid)
        return ModelRegistration(connection, displaced, None if kept else own, resumed_from)

    def unregister(self, sid: str, now: int) -> ModelConnection | None:
        return self._remove(sid) if self.known(sid, now) else None

    def detach(self, sid: str, now: int, until: int) -> ModelConnection | None:
        connection = self.known(sid, now)
        if connection and self.is_live(connection, now):
            connection = self.connections[sid] = replace(connection, detached_until=until)
        return connection

    def join(self, sid: str, game_id: str, now: int, capacity: int | None = None) -> tuple[bool, str | None, bool]:
        """Tell whether it joined, the game that it left, and whether the other one was full."""
        connection = self.live(sid, now)
        if not connection:
            return False, None, False
        if capacity is not None and connection.game_id != game_id and len(self.game(game_id, now)) >= capacity:
            return False, None, True
        self.connections[sid] = replace(connection, game_id=game_id)
        return True, connection.game_id if connection.game_id != game_id else None, False

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
        stale = [
            connection
            for connection in self.connections.values()
            if (connection.detached_until or connection.last_seen) < (now if connection.detached_until else oldest_kept)
        ]
        return [self._remove(connection.sid) for connection in stale]

    def user_connection(self, user_id: str, now: int) -> ModelConnection | None:
        live = [connection for connection in self.of_user(user_id) if self.is_live(connection, now)]
        return live[-1] if live else None

    def is_online(self, user_id: str, now: int) -> bool:
        oldest_online = now - min(self.stale_ms, self.conn_ttl_ms)
        own = [connection for connection in self.of_user(user_id) if self.is_live(connection, now)]
        return any(connection.last_seen >= oldest_online for connection in own)

    def game(self, game_id: str, now: int) -> list[ModelConnection]:
        """The live and the detached connections in a game, in the order of registration."""
        registered = (self.connections[sid] for sid in self.registered)
        return [
            connection for connection in registered if connection.game_id == game_id and self.holds(connection, now)
        ]

    def game_count(self, game_id: str, now: int) -> int:
        return sum(self.is_live(member, now) for member in self.game(game_id, now))

    def user_sids(self, game_id: str, now: int) -> dict[str, str]:
        return {member.user_id: member.sid for member in self.game(game_id, now) if self.is_live(member, now)}

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
                epoch=connection.epoch - 1000 * milliseconds,
                detached_until=connection.detached_until and connection.detached_until - milliseconds,
            )
