"""How heartbeats that are sent at the same time become one call of the script for many; no I/O.

Most of what a heartbeat costs the server is the call of its script, and one of each command in it: together with others
it costs less than half. A heartbeat may run any number of times, so where the one call for all fails, each is sent
alone, and what goes wrong with one reaches that one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from presence.commands import Command, load_command
from presence.operations import HEARTBEAT, HEARTBEATS, LISTED_PER_HEARTBEAT_BATCH, MAX_CONNECTIONS_PER_USER

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_MERGED = LISTED_PER_HEARTBEAT_BATCH // MAX_CONNECTIONS_PER_USER
"""The most heartbeats that become one call: as many as one script takes however many connections users may have."""

LOAD: Command = load_command(HEARTBEATS)
"""Loads the script that they call together."""

_LENGTH = len((*HEARTBEAT.call, *HEARTBEAT.keys, "key_lifetime_ms"))
"""Of a heartbeat without an epoch. With one, the script for many cannot take it."""

_CONN_KEY = len(HEARTBEAT.call)
"""Where the connection's key stands in the command: between the call and the shared part."""


def shared_part(commands: Sequence[Command]) -> Command | None:
    """Give what a heartbeat has in common with those that it can be merged with; None for all other commands."""
    command = commands[0]
    if len(command) == _LENGTH and command[:_CONN_KEY] == HEARTBEAT.call and len(commands) == 1:
        return command[_CONN_KEY + 1 :]
    return None


class Merge:
    """Heartbeats that have the shared part in common, as one command, and what its reply says of each."""

    __slots__ = ("_places", "_sids", "command")

    def __init__(self, heartbeats: Sequence[Command]) -> None:
        shared: Any = heartbeats[0][_CONN_KEY + 1 :]
        # A sid is what its key ends with, as in lua/include/sid.lua.
        start = len(shared[0]) - len("last_seen") + len("conn:")
        self._sids = [command[_CONN_KEY][start:] for command in heartbeats]
        self._places = {sid: place for place, sid in enumerate(dict.fromkeys(self._sids), 1)}
        self.command: Command = (*HEARTBEATS.call, *shared, *self._places)

    def replies(self, reply: Any) -> list[int] | None:
        """Give the reply to each of the heartbeats; None if the call for all has failed."""
        if not isinstance(reply, list):
            return None
        not_seen = reply[::2]
        if not all(isinstance(place, int) and 0 < place <= len(self._places) for place in not_seen):
            return None
        return [int(self._places[sid] not in not_seen) for sid in self._sids]
