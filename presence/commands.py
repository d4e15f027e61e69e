"""What goes to the server: commands, how they are packed, and how one is made the same call again or another; no I/O.

The command of a call is EVALSHA, the script's SHA1, the number of keys, the keys, and its arguments.
"""

from __future__ import annotations

import os
from binascii import b2a_base64
from typing import TYPE_CHECKING, Any, TypeAlias

from hiredis import pack_command

from presence.scripts import BY_SHA

if TYPE_CHECKING:
    from collections.abc import Iterable

    from presence.scripts import Script

Command: TypeAlias = "tuple[str | bytes, ...]"
"""A command: its name, then its arguments as bytes. (redis-py encodes a text as its client was told to, and hiredis 3.5
can crash where a signal handler raises while it makes a text of an int.)"""

SCRIPT_LOAD = "SCRIPT LOAD"
AS_BYTES = {"NEVER_DECODE": True}
"""redis-py's option for replies that stay bytes, however the client decodes."""

TOKEN_BYTES = 9
"""Of the random token that a reply key ends with: 12 characters."""


def load_command(script: Script) -> Command:
    """Give the command that loads a script. It has no key; a cluster needs it on the node of the namespace."""
    return (SCRIPT_LOAD, script.source.encode())


class SecondLoad(tuple[str | bytes, ...]):
    """The command that loads a script once more, since the call has missed it nevertheless.

    There was a failover between the first and the call; or the slot is on its way to a node that does not have the
    script, so on a cluster every primary gets it; and once more, for the node may have been out of reach just then.
    """

    __slots__ = ()

    def __new__(cls, script: Script) -> SecondLoad:  # noqa: D102
        return super().__new__(cls, load_command(script))


class Repeated(list[Command]):
    """Commands of calls that were answered that they did not run, but may have run before, in an earlier attempt."""

    __slots__ = ("since",)

    def __init__(self, commands: Iterable[Command], since: float) -> None:
        super().__init__(commands)
        self.since = since
        """When they were first to be sent, by ``monotonic``: see :data:`presence.retrying.RETRYING_SECONDS`."""


def pack(command: Command) -> bytes:
    """Give a command as it goes to the server, whatever encoding a client was made with."""
    if command[0] == SCRIPT_LOAD:
        command = (*SCRIPT_LOAD.split(), *command[1:])
    # hiredis declares a tuple of one item, and takes any.
    packed: bytes = pack_command(command)  # type: ignore[arg-type]
    return packed


def new_token() -> bytes:
    """Draw the token of a call, by which it is known when it is sent again."""
    return b2a_base64(os.urandom(TOKEN_BYTES), newline=False)


def renewed_keys(script: Script, keys: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give a call's keys with another token, if it has one: this makes it another call, which acts as a new one."""
    if script.keys[-1] != "reply":
        return keys
    token = new_token()
    return (*keys[:-1], keys[-1][: -len(token)] + token)


def renewed(command: Command) -> Command:
    """Give a call with another token."""
    script = BY_SHA[command[1]]
    end = 3 + len(script.keys)
    return (*command[:3], *renewed_keys(script, command[3:end]), *command[end:])


def sent_again(command: Command) -> Command:
    """Let a command that may have been sent before, or that others follow, keep its answer in any case.

    Even if it finds nothing to do: see lua/include/answer_nothing.lua.
    """
    script = BY_SHA.get(command[1])
    if script is None or script.arguments[-1:] != ("keep",):
        return command
    missing = 3 + len(script.keys) + len(script.arguments) - len(command)
    return (*command, *[b""] * (missing - 1), b"1") if missing else command
