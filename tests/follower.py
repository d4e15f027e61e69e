"""What a game server knows that reads nothing but the events."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING

from presence import EventType

if TYPE_CHECKING:
    from collections.abc import Callable

    from presence import ConnectionInfo, Event


@dataclass
class Follower:
    """All connections and who is online, as the events told it; each event must fit what was told before it."""

    part_that_counts: Callable[[ConnectionInfo], object]
    """What of a connection no heartbeat changes, for there is no event of one, nor a test."""
    connections: dict[str, ConnectionInfo] = field(default_factory=dict)
    online: set[str] = field(default_factory=set)
    misfits: list[Event] = field(default_factory=list)

    def follow(self, event: Event) -> None:
        """Learn of one change."""
        connection = event.connection
        known = self.connections.get(connection.sid)
        after: ConnectionInfo | None = connection
        match event.type:
            case EventType.USER_ONLINE:
                fits, after = connection.user_id not in self.online, known
                self.online.add(connection.user_id)
            case EventType.USER_OFFLINE:
                fits, after = connection.user_id in self.online, known
                self.online.discard(connection.user_id)
            case EventType.DISPLACED | EventType.UNREGISTERED | EventType.EXPIRED:
                fits, after = self._are_same(known, connection), None
            case EventType.LEFT:
                fits, after = self._are_same(known, connection), replace(connection, game_id=None)
            case EventType.JOINED:
                joined = known and replace(known, game_id=connection.game_id)
                fits = self._are_same(joined, connection) and known is not None and known.game_id is None
            case EventType.DETACHED:
                until = connection.detached_until
                fits = self._are_same(known and replace(known, detached_until=until, server_id=None), connection)
            case EventType.METADATA_UPDATED:
                fits = self._are_same(known and replace(known, metadata=connection.metadata), connection)
            case EventType.REGISTERED:
                fits = known is None or (known.user_id, known.game_id) == (connection.user_id, connection.game_id)
            case EventType.RESUMED:
                resumed = event.resumed_from
                fits = resumed is not None and resumed.game_id == connection.game_id
                if resumed:
                    # One that was displaced is told to be so before, and gone already.
                    self.connections.pop(resumed.sid, None)
        if after:
            self.connections[connection.sid] = after
        else:
            self.connections.pop(connection.sid, None)
        if not fits:
            self.misfits.append(event)

    def _are_same(self, known: ConnectionInfo | None, told: ConnectionInfo) -> bool:
        return known is not None and self.part_that_counts(known) == self.part_that_counts(told)

    @property
    def parts(self) -> dict[str, object]:
        """What counts of each connection, by its sid."""
        return {sid: self.part_that_counts(connection) for sid, connection in self.connections.items()}

    def age(self, seconds: float) -> None:
        """Move all times into the past, as a test does with what is stored."""
        past = timedelta(seconds=seconds)
        for sid, connection in self.connections.items():
            self.connections[sid] = replace(
                connection,
                connected_at=connection.connected_at - past,
                last_seen=connection.last_seen - past,
                epoch=connection.epoch - round(seconds * 1_000_000),
                detached_until=connection.detached_until and connection.detached_until - past,
            )
