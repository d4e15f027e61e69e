"""Which operations meet, and what was there before."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from presence.operations import CLEANUP_BATCH_SIZE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bench.contenders import Contender

# A schedule takes milliseconds and the set-up is repeated every few seconds, so real time moves nothing over a limit.
STALE_AGE_SECONDS = 1000
THRESHOLD_SECONDS = 500
GRACE_SECONDS = 500
SENT_TWICE = (
    "register",
    "register_and_tell",
    "unregister",
    "detach",
    "join",
    "join_with_room",
    "leave",
    "update_metadata",
)
"""Methods of one call each, which answers the same when it is sent again, if it changed anything."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a contender's method."""

    method: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.method}({', '.join(map(str, self.arguments))})"

    async def run(self, contender: Contender) -> object:
        """Make the call; the sids that a cleanup gives have no order."""
        answer = await getattr(contender, self.method)(*self.arguments)
        return sorted(answer) if self.method == "cleanup" else answer


@dataclass(frozen=True, slots=True)
class Pair:
    """Two or three operations that run at the same time, on a keyspace that the set-up left."""

    name: str
    set_up: tuple[Call, ...]
    calls: tuple[Call, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of *presence*'s manager, beside its namespace."""
    forget_scripts: bool = False
    """Whether the server has lost its scripts: then a call may take an EVALSHA, a SCRIPT LOAD and another EVALSHA."""

    def with_scripts_lost(self) -> Pair:
        """Give the same on a server that has lost its scripts."""
        return replace(self, name=f"{self.name}, scripts lost", forget_scripts=True)

    def with_calls_sent_twice(self) -> Pair:
        """Give the same with every call of these methods sent twice, as where the first reply was lost."""
        calls = tuple(
            Call("sent_twice", (call.method, *call.arguments)) if call.method in SENT_TWICE else call
            for call in self.calls
        )
        return replace(self, name=f"{self.name}, sent twice", calls=calls)


def _register(sid: str, user_id: str = "user") -> Call:
    return Call("register", (sid, user_id))


def _join(game_id: str, sid: str = "old") -> Call:
    return Call("join", (sid, game_id))


def _connect(sid: str, user_id: str = "user", metadata: bytes = b"") -> Call:
    return Call("register_and_tell", (sid, user_id, metadata))


def _if_the_same(method: str, *arguments: object) -> Call:
    return Call("if_the_same", (method, *arguments))


_LEAVE = Call("leave", ("old",))
_UNREGISTER = Call("unregister", ("old",))
_HEARTBEAT = Call("heartbeat", ("old",))
_CLEANUP = Call("cleanup", (THRESHOLD_SECONDS,))

_PLAYING = (_register("old"), _join("game"))
_STALE = (*_PLAYING, Call("age", (STALE_AGE_SECONDS,)))

_ALL = (
    # The user has no connection yet: this is the pair with 260 schedules of plain commands.
    Pair("register‖register", (), (_register("new-1"), _register("new-2"))),
    Pair("register‖register, displacing", _PLAYING, (_register("new-1"), _register("new-2"))),
    Pair("register‖late unregister", _PLAYING, (_register("new"), _UNREGISTER)),
    Pair("register‖heartbeat", _PLAYING, (_register("new"), _HEARTBEAT)),
    Pair("register‖join", _PLAYING, (_register("new"), _join("game-2"))),
    Pair("join‖join", _PLAYING, (_join("game-2"), _join("game-3"))),
    Pair("join‖leave", _PLAYING, (_join("game-2"), _LEAVE)),
    Pair("unregister‖heartbeat", _PLAYING, (_UNREGISTER, _HEARTBEAT)),
    Pair("unregister‖join", _PLAYING, (_UNREGISTER, _join("game-2"))),
    Pair("cleanup‖heartbeat", _STALE, (_CLEANUP, _HEARTBEAT)),
    Pair("cleanup‖register", _STALE, (_CLEANUP, _register("new"))),
    Pair("cleanup‖join", _STALE, (_CLEANUP, _join("game-2"))),
    Pair("cleanup‖cleanup", _STALE, (_CLEANUP, _CLEANUP)),
    Pair("register‖unregister‖cleanup", _STALE, (_register("new"), _UNREGISTER, _CLEANUP)),
    # More that meet in the same keys.
    Pair("register‖register‖register", (), (_register("new-1"), _register("new-2"), _register("new-3"))),
    Pair("register‖leave", _PLAYING, (_register("new"), _LEAVE)),
    Pair("register‖is online", _PLAYING, (_register("new"), Call("is_online", ("user",)))),
    Pair("unregister‖unregister", _PLAYING, (_UNREGISTER, _UNREGISTER)),
    Pair("leave‖leave", _PLAYING, (_LEAVE, _LEAVE)),
    Pair("join‖heartbeat‖register", _PLAYING, (_join("game-2"), _HEARTBEAT, _register("new"))),
)
PAIRS = {pair.name: pair for pair in _ALL}
"""What every contender offers."""

# A cleanup takes two whole batches of them and a part of a third, in which the last of them is.
_MANY = tuple(f"stale-{number:02}" for number in range(2 * CLEANUP_BATCH_SIZE + 5))
_MANY_STALE = (
    *(Call("register", (sid, f"user of {sid}")) for sid in _MANY),
    *(_join("game", sid) for sid in _MANY[::11]),
    Call("age", (STALE_AGE_SECONDS,)),
)
_LATE = _MANY[-1]

_BATCHES = (
    Pair("cleanup‖cleanup, three batches", _MANY_STALE, (_CLEANUP, _CLEANUP)),
    Pair("cleanup‖heartbeat, three batches", _MANY_STALE, (_CLEANUP, Call("heartbeat", (_LATE,)))),
    Pair("cleanup‖register, three batches", _MANY_STALE, (_CLEANUP, _register("new", f"user of {_LATE}"))),
    Pair("cleanup‖cleanup‖heartbeat, three batches", _MANY_STALE, (_CLEANUP, _CLEANUP, Call("heartbeat", (_LATE,)))),
)
_AGAIN = (
    Pair("register‖register, one sid", (), (_connect("new"), _connect("new"))),
    Pair("register‖register, one sid, playing", _PLAYING, (_connect("old"), _connect("old"))),
    Pair("register‖register, one sid, two users", (), (_connect("new", "user-1"), _connect("new", "user-2"))),
    Pair("register‖register, one sid, another's", _PLAYING, (_register("old"), _register("old", "user-2"))),
    Pair("register again‖unregister", _PLAYING, (_connect("old"), _UNREGISTER)),
    Pair("register again‖join", _PLAYING, (_connect("old"), _join("game-2"))),
    Pair("register for another‖unregister", _PLAYING, (_connect("old", "user-2"), _UNREGISTER)),
    Pair("register for another‖heartbeat", _PLAYING, (_connect("old", "user-2"), _HEARTBEAT)),
    Pair("register for another‖join", _PLAYING, (_connect("old", "user-2"), _join("game-2"))),
    Pair("register for another‖register", _PLAYING, (_connect("old", "user-2"), _connect("new"))),
    Pair("register again‖cleanup", _STALE, (_connect("old"), _CLEANUP)),
)


def _room(sid: str, capacity: int) -> Call:
    return Call("join_with_room", (sid, "game", capacity))


_DETACH = Call("detach", ("old", GRACE_SECONDS))
_MEMBERS = Call("get_members", ("game",))
_TAGGED = (_connect("old", metadata=b"old's"), _join("game"))
_DETACHED = (*_TAGGED, _DETACH)
_PAST_GRACE = (*_DETACHED, Call("age", (STALE_AGE_SECONDS,)))
_TWO = (*_TAGGED, _connect("other", "opponent"), _join("game", "other"))
_TWO_APART = (*_TAGGED, _connect("other", "opponent"))
_OF_SERVER = (
    Call("register_for", ("server", "old", "user")),
    _join("game"),
    Call("register_for", ("server-2", "other", "opponent")),
    _join("game", "other"),
)
_CLEAN_UP_SERVER = Call("clean_up_server", ("server", 0))
_RESTART = Call("register_for", ("server", "new", "another user"))
_ELSEWHERE = Call("register_for", ("server-3", "old", "user"))
_DETACH_SERVER = Call("clean_up_server", ("server", GRACE_SECONDS))

_SEATS = (
    Pair("detach‖register", _TAGGED, (_DETACH, _connect("new"))),
    Pair("detach‖register‖register", _TAGGED, (_DETACH, _connect("new-1"), _connect("new-2", metadata=b"new"))),
    Pair("detach‖register again", _TAGGED, (_DETACH, _connect("old"))),
    Pair("detach‖detach", _TAGGED, (_DETACH, _DETACH)),
    Pair("detach‖unregister", _TAGGED, (_DETACH, _UNREGISTER)),
    Pair("detach‖heartbeat", _TAGGED, (_DETACH, _HEARTBEAT)),
    Pair("detach‖join", _TAGGED, (_DETACH, _join("game-2"))),
    Pair("detach‖leave", _TAGGED, (_DETACH, _LEAVE)),
    Pair("detach‖update metadata", _TAGGED, (_DETACH, Call("update_metadata", ("old", b"new")))),
    Pair("detach‖members", _TWO, (_DETACH, _MEMBERS)),
    Pair("detach‖opponent", _TWO, (_DETACH, Call("get_opponent", ("game", "opponent")))),
    Pair("detach‖count", _TWO, (_DETACH, Call("count", ()))),
    Pair("detach‖game's count", _TWO, (_DETACH, Call("get_game_count", ("game",)))),
    Pair("resume‖resume", _DETACHED, (_connect("new-1"), _connect("new-2"))),
    Pair("resume‖register for another", _DETACHED, (_connect("new"), _connect("old", "user-2"))),
    Pair("resume‖unregister", _DETACHED, (_connect("new"), _UNREGISTER)),
    Pair("resume‖heartbeats", _DETACHED, (_connect("new"), Call("heartbeats", ("old", "new")))),
    Pair("resume‖members", _DETACHED, (_connect("new"), _MEMBERS)),
    Pair("resume‖the user's connection", _DETACHED, (_connect("new"), Call("get_user_connection", ("user",)))),
    Pair("resume‖cleanup, past the grace", _PAST_GRACE, (_connect("new"), _CLEANUP)),
    Pair("resume again‖cleanup, past the grace", _PAST_GRACE, (_connect("old"), _CLEANUP)),
    Pair("cleanup‖cleanup, past the grace", _PAST_GRACE, (_CLEANUP, _CLEANUP)),
    Pair("register‖connection, past the grace", _PAST_GRACE, (_connect("new"), Call("get_connection", ("old",)))),
    Pair("register‖unregister, past the grace", _PAST_GRACE, (_connect("new"), _UNREGISTER)),
    Pair("register‖members, past the grace", _PAST_GRACE, (_connect("new"), _MEMBERS)),
)
_POLICIES = tuple(
    Pair(f"{name}, {displacement}", set_up, calls, {"displacement": displacement})
    for displacement in ("newest_resumes", "reject_while_alive")
    for name, set_up, calls in (
        ("first‖first", (), (_connect("new-1"), _connect("new-2"))),
        ("register‖register", _TAGGED, (_connect("new-1"), _connect("new-2", metadata=b"new"))),
        ("register‖unregister", _TAGGED, (_connect("new"), _UNREGISTER)),
        ("register‖detach", _TAGGED, (_connect("new"), _DETACH)),
        ("register‖leave", _TAGGED, (_connect("new"), _LEAVE)),
        ("register‖join", _TAGGED, (_connect("new"), _join("game-2"))),
        ("register‖members", _TWO, (_connect("new"), _MEMBERS)),
        ("register‖join with room", _TWO_APART, (_connect("new"), _room("other", 1))),
        ("register‖register, stale", _STALE, (_connect("new-1"), _connect("new-2"))),
        ("register‖heartbeat, stale", _STALE, (_connect("new"), _HEARTBEAT)),
        ("register‖cleanup, stale", _STALE, (_connect("new"), _CLEANUP)),
        ("register‖register for another", _TAGGED, (_connect("new"), _connect("old", "user-2"))),
    )
)
_TWO_OF_A_USER = (*_TAGGED, _connect("second", metadata=b"second's"), _join("game-2", "second"))
_POLICIES_OF_TWO = tuple(
    Pair(f"{name}, two of a user, {displacement}", set_up, calls, settings)
    for displacement in ("newest_wins", "newest_resumes", "reject_while_alive")
    for settings in ({"displacement": displacement, "connections_per_user": 2},)
    for name, set_up, calls in (
        ("register‖register", _TWO_OF_A_USER, (_connect("new-1"), _connect("new-2"))),
        ("register‖register again", _TWO_OF_A_USER, (_connect("new"), _connect("old"))),
        ("register‖detach", _TWO_OF_A_USER, (_connect("new"), _DETACH)),
        ("register again‖detach", _TWO_OF_A_USER, (_connect("old"), _DETACH)),
        (
            "register‖register, both detached",
            (*_TWO_OF_A_USER, _DETACH, Call("detach", ("second", GRACE_SECONDS))),
            (_connect("new-1"), _connect("new-2")),
        ),
        ("register‖register, one stale", (*_STALE, _connect("second")), (_connect("new-1"), _connect("new-2"))),
        ("register‖register, both stale", (*_TWO_OF_A_USER, *_STALE[-1:]), (_connect("new-1"), _connect("new-2"))),
    )
)
_SEVERAL = _POLICIES_OF_TWO + tuple(
    Pair(f"{name}, two of a user", (*_TAGGED, _connect("second")), calls, {"connections_per_user": 2})
    for name, calls in (
        ("register‖register", (_connect("new-1"), _connect("new-2"))),
        ("register‖register‖register", (_connect("new-1"), _connect("new-2"), _connect("new-3"))),
        ("register‖unregister", (_connect("new"), _UNREGISTER)),
        ("register‖unregister the second", (_connect("new"), Call("unregister", ("second",)))),
        ("register‖detach", (_connect("new"), _DETACH)),
        ("register‖register again", (_connect("new"), _connect("old"))),
        ("register‖all of the user", (_connect("new"), Call("get_all_user_connections", ("user",)))),
        ("unregister‖is online", (_UNREGISTER, Call("unregister", ("second",)), Call("is_online", ("user",)))),
    )
)
_ROOM = (
    Pair(
        "join with room‖join with room",
        (_connect("old"), _connect("other", "opponent")),
        (_room("old", 1), _room("other", 1)),
    ),
    Pair("join with room‖leave", _TWO_APART, (_room("other", 1), _LEAVE)),
    Pair("join with room‖unregister", _TWO_APART, (_room("other", 1), _UNREGISTER)),
    Pair("join with room‖detach", _TWO_APART, (_room("other", 1), _DETACH)),
    Pair("join with room‖resume", (*_TWO_APART, _DETACH), (_room("other", 1), _connect("new"))),
    Pair(
        "join with room‖register, past the grace",
        (*_TWO_APART, _DETACH, Call("age", (STALE_AGE_SECONDS,))),
        (_room("other", 1), _connect("new", "a third")),
    ),
    Pair("join with room‖cleanup", (*_STALE, _connect("other", "opponent")), (_room("other", 1), _CLEANUP)),
)
_EPOCHS = tuple(
    Pair(f"{other}‖{name} of the same epoch", _TAGGED, (call, _if_the_same(method, "old", *arguments)))
    for other, call in (
        ("register again", _connect("old", metadata=b"again")),
        ("register for another", _connect("old", "user-2")),
    )
    for name, method, *arguments in (
        ("heartbeat", "heartbeat"),
        ("join", "join", "game-2"),
        ("leave", "leave"),
        ("unregister", "unregister"),
        ("detach", "detach", GRACE_SECONDS),
        ("update metadata", "update_metadata", b"new"),
    )
)
_SERVERS = (
    Pair("clean up server‖clean up server", _OF_SERVER, (_CLEAN_UP_SERVER, _CLEAN_UP_SERVER)),
    Pair("clean up server‖detach server", _OF_SERVER, (_CLEAN_UP_SERVER, _DETACH_SERVER)),
    Pair("detach server‖register", _OF_SERVER, (_DETACH_SERVER, _connect("new"))),
    Pair(
        "detach server‖register for server-3",
        _OF_SERVER,
        (_DETACH_SERVER, Call("register_for", ("server-3", "new", "user"))),
    ),
    Pair("restart‖clean up server", _OF_SERVER, (_RESTART, _CLEAN_UP_SERVER)),
    Pair("restart‖cleanup", _OF_SERVER, (_RESTART, _CLEANUP)),
    Pair("restart‖cleanup‖heartbeat", _OF_SERVER, (_RESTART, _CLEANUP, _HEARTBEAT)),
    Pair("register again for server-3‖heartbeat", _OF_SERVER, (_ELSEWHERE, _HEARTBEAT)),
    Pair("register again for server-3‖clean up server", _OF_SERVER, (_ELSEWHERE, _CLEAN_UP_SERVER)),
    Pair("detach server‖unregister", _OF_SERVER, (_DETACH_SERVER, _UNREGISTER)),
    Pair("detach server‖heartbeat", _OF_SERVER, (_DETACH_SERVER, _HEARTBEAT)),
    Pair("detach server‖members", _OF_SERVER, (_DETACH_SERVER, _MEMBERS)),
    Pair("clean up server‖join", _OF_SERVER, (_CLEAN_UP_SERVER, _join("game-2"))),
)
_SILENT = (*_OF_SERVER, Call("age", (STALE_AGE_SECONDS,)), _HEARTBEAT, Call("heartbeat", ("other",)))
"""The connections were seen just now, and their game servers were not."""
_SILENT_SERVERS = tuple(
    Pair(f"{name}, silent servers{of_what}", _SILENT, calls, settings)
    for of_what, settings in (("", {}), (" whose seats are kept", {"server_grace_seconds": GRACE_SECONDS}))
    for name, calls in (
        ("cleanup‖cleanup", (_CLEANUP, _CLEANUP)),
        ("cleanup‖register", (_CLEANUP, _connect("new"))),
        ("cleanup‖register‖register", (_CLEANUP, _connect("new-1"), _connect("new-2"))),
        ("cleanup‖register again for server-3", (_CLEANUP, _ELSEWHERE)),
        ("cleanup‖restart", (_CLEANUP, _RESTART)),
        ("cleanup‖detach server", (_CLEANUP, _DETACH_SERVER)),
        ("cleanup‖heartbeat", (_CLEANUP, _HEARTBEAT)),
        ("cleanup‖join", (_CLEANUP, _join("game-2"))),
        ("cleanup‖unregister", (_CLEANUP, _UNREGISTER)),
        ("cleanup‖members", (_CLEANUP, _MEMBERS)),
    )
)
_METADATA = (
    Pair(
        "update metadata‖update metadata",
        _TAGGED,
        (Call("update_metadata", ("old", b"1")), Call("update_metadata", ("old", b"2"))),
    ),
    Pair("update metadata‖register", _TAGGED, (Call("update_metadata", ("old", b"new")), _connect("new"))),
    Pair("update metadata‖register again", _TAGGED, (Call("update_metadata", ("old", b"new")), _connect("old"))),
    Pair(
        "update metadata‖join‖connection",
        _TAGGED,
        (Call("update_metadata", ("old", b"new")), _join("game-2"), Call("get_connection", ("old",))),
    ),
)
FLEET_GROUPS = {
    "detached and resumed": _SEATS,
    "displacement policies": _POLICIES,
    "two connections of a user": _SEVERAL,
    "capacity": _ROOM,
    "epochs": _EPOCHS,
    "game servers": _SERVERS,
    "silent game servers": _SILENT_SERVERS,
    "metadata": _METADATA,
}
FLEET_PAIRS = {pair.name: pair for group in FLEET_GROUPS.values() for pair in group}
"""What a fleet of game servers needs beyond that: only *presence* has it."""
BATCH_PAIRS = {pair.name: pair for pair in _BATCHES}
"""Cleanups of several batches: only *presence* has such."""
SAME_SID_PAIRS = {pair.name: pair for pair in _AGAIN}
"""A sid that is registered again (guarantee 4): the others do not offer that, even to one caller at a time."""
SENT_TWICE_PAIRS = {
    pair.name: pair
    for pair in (
        pair.with_calls_sent_twice()
        for pair in (PAIRS | SAME_SID_PAIRS | FLEET_PAIRS).values()
        if any(call.method in SENT_TWICE for call in pair.calls)
    )
}
"""The same with calls whose first reply is lost: only *presence* keeps answers."""
PRESENCE_PAIRS = PAIRS | BATCH_PAIRS | SAME_SID_PAIRS | FLEET_PAIRS
