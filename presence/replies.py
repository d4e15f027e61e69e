"""How the replies of the scripts become types; no I/O. The headers of the scripts say what they reply."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from presence.results import (
    ConnectionInfo,
    Event,
    EventType,
    HeartbeatStatus,
    JoinResult,
    Registration,
    make_connection,
    to_time,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

NOT_SEEN = {0: HeartbeatStatus.UNKNOWN, -1: HeartbeatStatus.EXPIRED, -2: HeartbeatStatus.DETACHED}
"""Why one of many heartbeats was not counted, as the script answers it."""

RESUMED_FROM = "resumed_from"
"""What the scripts publish right after ``resumed``: the connection whose seat was taken over."""


_EPOCH = attrgetter("epoch")

_TIME = struct.Struct("<d")
"""The time in microseconds that the answer of a registration begins with."""


@dataclass(frozen=True, slots=True)
class Position:
    """A position in the stream of events, an entry of which holds all events of one change."""

    entry_id: str = "0-0"
    """The last entry with events before the position."""
    number: int = 0
    """How many entries there were up to that one."""
    events_seen: int | None = None
    """How many of its events come before the position; None for all of them."""

    def text(self) -> str:
        """Give it as the text that users keep."""
        return f"{self.entry_id}/{self.number}" + ("" if self.events_seen is None else f"+{self.events_seen}")

    @classmethod
    def parse(cls, text: object) -> Position:
        """Check a text and make it a position."""
        if not isinstance(text, str):
            raise TypeError(f"after must be a str, the position of an event or a snapshot, not {type(text).__name__}")
        match = re.fullmatch(r"((\d{1,20})-(\d{1,20}))/(\d{1,15})(?:\+(\d{1,9}))?", text, re.ASCII)
        if not match or max(int(match[2]), int(match[3])) >= 1 << 64 or (match[5] and not int(match[4])):
            raise ValueError(f"after must be the position of an event or a snapshot, not {text!r:.80}")
        return cls(match[1], int(match[4]), int(match[5]) if match[5] else None)


@dataclass(frozen=True, slots=True)
class EventsBatch:
    """Events from the stream and the position after them, or that some after the position asked for are lost."""

    events: tuple[Event, ...]
    position: Position
    beginning: Position | None = None
    """If some are lost, where what is left of the stream begins."""
    bytes_of_a_change: int = 0
    """How much each took, on average; 0 if there was none."""


class CleanupBatch(NamedTuple):
    """What one run of the cleanup script removed and detached, and whether nothing was left to do."""

    removed: tuple[ConnectionInfo, ...]
    is_last: bool
    detached: tuple[ConnectionInfo, ...] = ()
    now_ms: int = 0
    """The server's time."""
    is_late: bool = False
    """Whether it did nothing, because it ran after the time that it was given."""


def parse_body(sid: str, game_id: str | None, body: bytes, score: bytes | int, observed_at: int) -> ConnectionInfo:
    """Parse the body of a record, see lua/include/split_record.lua, with the score, see lua/include/find_record.lua."""
    head, _, payload = body.partition(b" ")
    if head.isdigit():
        epoch = int(head)
        return make_connection(sid, payload.decode(), game_id, epoch // 1000, int(score), observed_at, epoch)
    number, connected_at, heartbeat_at, user, server = (head.split(b":") + [b""] * 3)[:5]
    epoch = int(number)
    user_end = int(user) if user else len(payload)
    server_end = user_end + int(server or 0)
    return make_connection(
        sid,
        payload[:user_end].decode(),
        game_id,
        int(connected_at or epoch // 1000),
        int(heartbeat_at or score),
        observed_at,
        epoch,
        -int(score) if heartbeat_at else None,
        payload[user_end:server_end].partition(b":")[2].decode() or None,
        payload[server_end:],
    )


def parse_record(sid: str, record: bytes, score: bytes | int, observed_at: int) -> ConnectionInfo:
    """Parse a record, see lua/include/split_record.lua."""
    length, _, rest = record.partition(b":")
    game_end = int(length)
    return parse_body(sid, rest[:game_end].decode() or None, rest[game_end:], score, observed_at)


def parse_records(fields: Sequence[Any], observed_at: int) -> tuple[ConnectionInfo, ...]:
    """Parse connections as replies list them: sid, record and score of each."""
    return tuple(
        parse_record(sid.decode(), record, score, observed_at)
        for sid, record, score in zip(fields[::3], fields[1::3], fields[2::3], strict=True)
    )


def parse_connection(sid: str, reply: list[Any]) -> ConnectionInfo | None:
    """Parse the answer about one connection."""
    return parse_record(sid, reply[1], reply[2], int(reply[0])) if reply else None


def parse_users(reply: list[Any]) -> list[ConnectionInfo | None]:
    """Parse the active connections of several users."""
    observed_at = int(reply[0])
    return [
        parse_record(sid.decode(), record, score, observed_at) if sid else None
        for sid, record, score in zip(reply[1::3], reply[2::3], reply[3::3], strict=True)
    ]


def parse_users_online(reply: list[int]) -> list[bool]:
    """Parse which of several users are online."""
    return [bool(is_online) for is_online in reply]


def parse_listed(reply: list[Any]) -> list[ConnectionInfo]:
    """Parse all connections of one user."""
    now, *fields = reply
    return list(parse_records(fields, int(now)))


def parse_registration(sid: str, user_id: str, server_id: str | None, metadata: bytes, reply: bytes) -> Registration:
    """Parse the answer of a registration; the usual one leaves out what the caller knows."""
    epoch = int(_TIME.unpack_from(reply)[0])
    now = epoch // 1000
    resumed_from = replaced = connection = None
    displaced: list[ConnectionInfo] = []
    for kind, told in _parse_events(reply[_TIME.size + 1 :], now):
        if kind == "displaced":
            displaced.append(told)
        elif kind == "registered":
            connection = told
        elif kind == "replaced":
            replaced = told
        elif kind == RESUMED_FROM:
            resumed_from = told
        else:
            return Registration(told, refused=True)
    return Registration(
        connection or make_connection(sid, user_id, None, now, now, now, epoch, None, server_id, metadata),
        tuple(displaced),
        resumed_from is not None,
        replaced,
        resumed_from,
    )


def has_registered(reply: bytes) -> bool:
    """Tell whether a registration has done anything: it has, unless it was refused."""
    return not reply.startswith(b" refused ", _TIME.size)


def has_joined(reply: bytes | int) -> bool:
    """Tell whether a join has taken place: then the answer is the game left, or empty."""
    return isinstance(reply, bytes)


def has_cleaned_up(reply: list[Any]) -> bool:
    """Tell whether a batch of a cleanup reports anybody."""
    return len(reply) > 2


def parse_join(reply: bytes | int) -> JoinResult:
    """Parse the answer of a join."""
    return JoinResult(True, text_or_none(reply)) if isinstance(reply, bytes) else JoinResult(False, is_full=reply == 1)


def text_or_none(reply: bytes) -> str | None:
    """Parse an id that is empty if there is none."""
    return reply.decode() or None


def parse_game(game_id: str, conn_ttl_ms: int, reply: list[Any]) -> list[ConnectionInfo]:
    """Parse a snapshot: keep those that are live, or detached and within the grace, in the order of registration."""
    now, size = int(reply[-1]), len(reply) // 3
    oldest_live = now - conn_ttl_ms
    connections = []
    members = iter(reply)  # sid and body in turns, as many of each as there are scores
    for sid, body, score in zip(members, members, reply[2 * size : -1], strict=False):
        seen = int(score or 0)
        if seen < oldest_live and -seen < now:
            continue
        head, _, user_id = body.partition(b" ")
        if not head.isdigit():  # Eight times as fast as looking for a colon.
            connections.append(parse_body(sid.decode(), game_id, body, seen, now))
            continue
        # Most hold no more than a user; snapshots are read so often that these are parsed without another call.
        epoch = int(head)
        connections.append(make_connection(sid.decode(), user_id.decode(), game_id, epoch // 1000, seen, now, epoch))
    connections.sort(key=_EPOCH)
    return connections


def parse_events(position: Position, reply: list[Any]) -> EventsBatch:
    """Parse what was read from the stream of events after a position."""
    is_lost, last_id, added = reply[:3]
    end = Position(last_id.decode(), added)
    if is_lost:
        return EventsBatch((), end, _beginning(*reply[3:]))
    events: list[Event] = []
    seen = position.events_seen
    # An entry of which not all was seen was read again.
    first = position.number + 1 if seen is None else position.number
    for number, (entry_id, message) in enumerate(zip(reply[3::2], reply[4::2], strict=True), first):
        of_entry = parse_message(message)
        position = Position(entry_id.decode(), number)
        for index, event in enumerate(of_entry, 1):
            if index > (seen or 0):
                reached = position if index == len(of_entry) else replace(position, events_seen=index)
                events.append(replace(event, position=reached.text()))
        seen = None
    messages = reply[4::2]
    average = sum(map(len, messages)) // len(messages) if messages else 0
    return EventsBatch(tuple(events), position, bytes_of_a_change=average)


def _beginning(gone: int, first_id: bytes) -> Position:
    """Give the position before the first entry that is left, which tells that it is still the same stream."""
    return Position(number=gone) if first_id == b"0-0" else Position(first_id.decode(), gone + 1, 0)


def parse_message(message: bytes) -> list[Event]:
    """Parse the events of one change, see lua/include/publish.lua."""
    now, _, rest = message.partition(b" ")
    at = to_time(int(now))
    events: list[Event] = []
    for kind, connection in _parse_events(rest, int(now)):
        if kind == RESUMED_FROM:
            events[-1] = replace(events[-1], resumed_from=connection)
        else:
            events.append(Event(EventType(kind), connection, at))
    return events


def _parse_events(text: bytes, observed_at: int) -> list[tuple[str, ConnectionInfo]]:
    """Take events apart, kind and connection, see lua/include/event.lua."""
    events = []
    while text:
        kind, sid_length, record_length, score, text = text.split(b" ", 4)
        sid_end = int(sid_length)
        record_end = sid_end + int(record_length) if record_length else len(text)
        connection = parse_record(text[:sid_end].decode(), text[sid_end:record_end], score, observed_at)
        events.append((kind.decode(), connection))
        text = text[record_end + 1 :]
    return events


def parse_heartbeats(count: int, reply: list[int]) -> list[HeartbeatStatus]:
    """Parse the exceptions among many heartbeats."""
    statuses = [HeartbeatStatus.SEEN] * count
    for position, status in zip(reply[::2], reply[1::2], strict=True):
        statuses[position - 1] = NOT_SEEN[status]
    return statuses


def parse_cleanup(batch_size: int, has_server_grace: bool, reply: list[Any]) -> CleanupBatch:
    """Parse a batch of a cleanup; ``batch_size`` is what was asked for."""
    now, examined, *fields = reply
    # Most cleanups find nothing, and parsing nothing takes a microsecond.
    ended = parse_records(fields, int(now)) if fields else ()
    detached: tuple[ConnectionInfo, ...] = ()
    if has_server_grace:
        # One whose grace is over was detached before; for one that is detached now, the grace is still to come.
        detached = tuple(gone for gone in ended if gone.detached_until and gone.detached_until > gone.observed_at)
        ended = tuple(gone for gone in ended if not gone.detached_until or gone.detached_until <= gone.observed_at)
    return CleanupBatch(ended, examined < batch_size, detached, int(now), is_late=examined < 0)
