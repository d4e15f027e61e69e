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
    server: str | None = None
    """The start of the game server that it is registered for: '<boot epoch>:<server_id>'."""
    metadata: bytes = b""


@dataclass(frozen=True)
class ModelRegistration:
    """What a register answers; of one that was refused, the connection that is alive."""

    connection: ModelConnection
    displaced: list[ModelConnection]
    replaced: ModelConnection | None
    resumed_from: ModelConnection | None
    refused: bool = False


@dataclass(frozen=True)
class ModelCleanup:
    """What a cleanup answers, in no particular order."""

    removed: list[ModelConnection]
    detached: list[ModelConnection]


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
    displacement: str = "newest_wins"
    servers: dict[str, int] = field(default_factory=dict)
    """The known starts of game servers, and when each was seen; 0 of one that a later start has replaced."""

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

    def register(
        self, sid: str, user_id: str, now: int, epoch: int, *, server: str | None = None, metadata: bytes = b""
    ) -> ModelRegistration:
        refusing = self.refusing(sid, user_id, now)
        if refusing:
            return ModelRegistration(refusing, [], None, None, refused=True)
        own = self._remove(sid) if sid in self.connections else None
        kept = own if own and own.user_id == user_id and self.holds(own, now) else None
        connection = ModelConnection(sid, user_id, None, now, now, epoch, None, server, metadata)
        resumed_from = None
        if kept:
            connection = replace(connection, game_id=kept.game_id, connected_at=kept.connected_at)
            connection = replace(connection, metadata=metadata or kept.metadata)
            resumed_from = kept if self.is_seat(kept, now) else None
        others = self.of_user(user_id)
        seats = [other for other in others if self.is_seat(other, now)]
        if seats and not kept:
            resumed_from = seats[-1]
            self._remove(resumed_from.sid)
            others.remove(resumed_from)
        gone = [other for other in others if not self.holds(other, now)]
        holding = [other for other in others if self.holds(other, now)]
        excess = max(0, len(holding) + 1 - self.connections_per_user)
        gone += [other for other in holding if not self.is_alive(other, now)][:excess]
        displaced = [self._remove(other.sid) for other in others if other in gone]
        if self.displacement == "newest_resumes" and not kept and not resumed_from:
            resumed_from = next((other for other in reversed(displaced) if self.holds(other, now)), None)
        if resumed_from and not kept:
            connection = replace(connection, game_id=resumed_from.game_id, metadata=metadata or resumed_from.metadata)
        self.connections[sid] = connection
        self.registered.append(sid)
        if server and server not in self.servers:
            self.servers[server] = 0 if self._is_replaced(server) else self._replace_earlier(server, now)
        return ModelRegistration(connection, displaced, None if kept else own, resumed_from)

    def is_alive(self, connection: ModelConnection, now: int) -> bool:
        """Whether it displaces rather than gives way; none is where the newest wins."""
        rejects = self.displacement == "reject_while_alive"
        return rejects and self.is_live(connection, now) and connection.last_seen >= now - self.stale_ms

    def refusing(self, sid: str, user_id: str, now: int) -> ModelConnection | None:
        """Give the connection that is alive and for which a register is refused, if it is."""
        own = self.live(sid, now)
        if own and own.user_id == user_id:
            return None
        alive = [other for other in self.of_user(user_id) if other.sid != sid and self.is_alive(other, now)]
        return alive[-1] if len(alive) >= self.connections_per_user else None

    def unregister(self, sid: str, now: int) -> ModelConnection | None:
        return self._remove(sid) if self.known(sid, now) else None

    def detach(self, sid: str, now: int, until: int) -> ModelConnection | None:
        connection = self.known(sid, now)
        if connection and self.is_live(connection, now):
            connection = self._detach(connection, until)
        return connection

    def _detach(self, connection: ModelConnection, until: int) -> ModelConnection:
        detached = self.connections[connection.sid] = replace(connection, detached_until=until, server=None)
        return detached

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

    def update_metadata(self, sid: str, metadata: bytes, now: int) -> bool:
        connection = self.live(sid, now)
        if not connection:
            return False
        self.connections[sid] = replace(connection, metadata=metadata)
        return True

    def cleanup(self, threshold_ms: int, now: int) -> list[ModelConnection]:
        """Remove what is stale, and the connections of dead servers."""
        return self.clean_up(threshold_ms, now).removed

    def clean_up(self, threshold_ms: int, now: int, grace_ms: int = 0) -> ModelCleanup:
        """Do the same; with a grace, detach those of servers that are dead or have missed a heartbeat."""
        oldest_kept = now - min(threshold_ms, self.conn_ttl_ms)
        dead = [server for server, seen in self.servers.items() if seen < now - self.stale_ms]
        ended = [
            connection
            for connection in self.connections.values()
            if connection.server in dead
            or (connection.detached_until or connection.last_seen) < (now if connection.detached_until else oldest_kept)
        ]
        beating = {server for server, seen in self.servers.items() if seen >= now - self.stale_ms / 2}
        seats = [one for one in ended if one.server and one.server not in beating and self.is_live(one, now)]
        return self._end(ended, seats, dead, now, grace_ms)

    def clean_up_server(
        self, server_id: str, now: int, grace_ms: int = 0, newest_start: int | None = None
    ) -> ModelCleanup:
        known = [(int(server.partition(":")[0]), server) for server in self.servers]
        starts = [
            server
            for epoch, server in known
            if server.partition(":")[2] == server_id and (newest_start is None or epoch <= newest_start)
        ]
        ended = [connection for connection in self.connections.values() if connection.server in starts]
        dead = [server for server in starts if self.servers[server] < now - self.stale_ms]
        return self._end(ended, [one for one in ended if self.is_live(one, now)], dead, now, grace_ms)

    def _end(
        self, ended: list[ModelConnection], seats: list[ModelConnection], servers: list[str], now: int, grace_ms: int
    ) -> ModelCleanup:
        for server in servers:
            del self.servers[server]
        detached = seats if grace_ms else []
        return ModelCleanup(
            [self._remove(one.sid) for one in ended if one not in detached],
            [self._detach(one, now + grace_ms) for one in detached],
        )

    def start_server(self, server: str, now: int) -> None:
        self.servers[server] = self._replace_earlier(server, now)

    def _replace_earlier(self, server: str, now: int) -> int:
        server_id = server.partition(":")[2]
        for earlier in self.servers:
            if earlier != server and earlier.partition(":")[2] == server_id:
                self.servers[earlier] = 0
        return now

    def _is_replaced(self, server: str) -> bool:
        epoch, _, server_id = server.partition(":")
        others = (other.partition(":") for other in self.servers)
        return any(other_id == server_id and int(other) > int(epoch) for other, _, other_id in others)

    def beat(self, server: str, now: int) -> bool:
        """Mark a start of a game server as seen now, unless it was replaced."""
        if self._is_replaced(server) or self.servers.get(server) == 0:
            return False
        self.servers[server] = self._replace_earlier(server, now)
        return True

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
        self.servers = {server: seen and seen - milliseconds for server, seen in self.servers.items()}
