"""The Lua scripts: found, spliced with their includes, and named by their SHA1. Nothing here talks to a server.

A line ``-- @include name`` in a script stands for ``lua/include/name.lua``, which may include others; each is spliced
in once, where it is first asked for. An indented one is there for its block only: the functions that only rare calls
need are made by those alone, since Lua makes every function of a script anew in each call.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.resources.abc import Traversable

_INCLUDE = re.compile(r"^(?P<indent> *)-- @include (?P<name>\w+)$")
_COMMENT = re.compile(r"^--\[\[.*?^\]\]\n|^ *--[^\n]*\n|^\n", re.DOTALL | re.MULTILINE)
"""A block of comment, a line of it, or an empty line."""


class ScriptError(Exception):
    """A Lua file that is missing or includes itself: a broken installation, or a mistake while working on a script."""


def lua_folder() -> Traversable:
    """Find the Lua files: inside the installed package, else beside it in a checkout (an editable install)."""
    packaged = resources.files("presence") / "lua"
    if packaged.is_dir():
        return packaged
    beside = Path(__file__).resolve().parent.parent / "lua"
    if beside.is_dir():
        return beside
    raise ScriptError(f"presence's Lua files are neither in {packaged} nor in {beside}; install the package again")


def splice(folder: Traversable, name: str) -> str:
    """Read ``name.lua`` with every include spliced in, once in each block that it is visible in.

    Args:
        folder: the folder that holds the scripts and ``include/``.
        name: the script's name, without ``.lua``.

    Returns:
        The whole source text.

    Raises:
        ScriptError: a file is missing, or an include leads back to itself; the message names the chain of includes.

    """
    # Of each block that is open, how far it is indented and what it includes; the script itself is the first.
    blocks: list[tuple[int, set[str]]] = [(0, set())]

    def read(file: Traversable, chain: tuple[str, ...], outer: str) -> list[str]:
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ScriptError(f"there is no {chain[-1]}.lua, included through {' -> '.join(chain)}") from None
        lines: list[str] = []
        for line in text.splitlines():
            indent = len(outer) + len(line) - len(line.lstrip())
            while line and indent < blocks[-1][0]:
                blocks.pop()
            include = _INCLUDE.match(line)
            if not include:
                lines.append((outer + line).rstrip())
                continue
            target = include["name"]
            if target in chain:
                raise ScriptError(f"an include leads back to itself: {' -> '.join((*chain, target))}")
            if indent > blocks[-1][0]:
                blocks.append((indent, set()))
            if not any(target in included for _, included in blocks):
                lines += read(folder / "include" / f"{target}.lua", (*chain, target), outer + include["indent"])
                blocks[-1][1].add(target)
        return lines

    return "\n".join(read(folder / f"{name}.lua", (name,), "")) + "\n"


def without_comments(source: str) -> str:
    """Leave out what the server does not run: nearly half of the text, which some pipelines send along."""
    return _COMMENT.sub("", source)


@dataclass(frozen=True, slots=True)
class Script:
    """One Lua script and the slots that its header declares; a test holds them against the header and the callers."""

    name: str
    keys: tuple[str, ...]
    arguments: tuple[str, ...]
    source: str = field(repr=False)
    sha: str = field(repr=False)
    tells_of_change: Callable[[Any], bool] | None = field(repr=False, compare=False)
    """Tells by its reply whether a call has changed something that must not be done, or undone, a second time. None if
    no call ever does: the script only reads, or what it does may be done any number of times."""
    reaches_others: bool
    """Whether it acts on connections, or is refused because of some, that its keys do not name."""
    call: tuple[str | bytes, ...] = field(init=False, repr=False, compare=False)
    """The command that calls it, up to its keys."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "call", ("EVALSHA", self.sha.encode(), b"%d" % len(self.keys)))

    @property
    def is_repeatable(self) -> bool:
        """Whether all that the script does may be done any number of times."""
        return self.tells_of_change is None

    def has_acted(self, reply: Any) -> bool:
        """Tell by the reply to a call whether neither it nor what came before it may be repeated."""
        return self.tells_of_change is not None and self.tells_of_change(reply)


BY_SHA: dict[str | bytes, Script] = {}
"""The scripts that were loaded, by their SHA1s as commands name them."""


def load(
    name: str,
    keys: tuple[str, ...],
    arguments: tuple[str, ...],
    *,
    tells_of_change: Callable[[Any], bool] | None = bool,
    reaches_others: bool = False,
) -> Script:
    """Load a script by name; its SHA1 is computed here, so no round trip is spent on asking for it."""
    source = without_comments(splice(lua_folder(), name))
    sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
    if source.startswith("#!lua flags=no-writes\n"):
        tells_of_change = None
    script = BY_SHA[sha.encode()] = Script(name, keys, arguments, source, sha, tells_of_change, reaches_others)
    return script
