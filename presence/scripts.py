"""The Lua scripts: found, spliced with their includes, and named by their SHA1. Nothing here talks to a server.

A line ``-- @include name`` in a script stands for ``lua/include/name.lua``, which may include others; each is spliced
in once, where it is first asked for.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_INCLUDE = re.compile(r"^-- @include (?P<name>\w+)$")


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
    """Read ``name.lua`` with every include spliced in once.

    Args:
        folder: the folder that holds the scripts and ``include/``.
        name: the script's name, without ``.lua``.

    Returns:
        The whole source text.

    Raises:
        ScriptError: a file is missing, or an include leads back to itself; the message names the chain of includes.

    """
    included: set[str] = set()

    def read(file: Traversable, chain: tuple[str, ...]) -> list[str]:
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ScriptError(f"there is no {chain[-1]}.lua, included through {' -> '.join(chain)}") from None
        lines: list[str] = []
        for line in text.splitlines():
            include = _INCLUDE.match(line)
            if not include:
                lines.append(line)
                continue
            target = include["name"]
            if target in chain:
                raise ScriptError(f"an include leads back to itself: {' -> '.join((*chain, target))}")
            if target not in included:
                lines += read(folder / "include" / f"{target}.lua", (*chain, target))
                included.add(target)
        return lines

    return "\n".join(read(folder / f"{name}.lua", (name,))) + "\n"


@dataclass(frozen=True, slots=True)
class Script:
    """One Lua script and the slots that its header declares; a test holds them against the header and the callers."""

    name: str
    keys: tuple[str, ...]
    arguments: tuple[str, ...]
    source: str = field(repr=False)
    sha: str = field(repr=False)


@cache
def load(name: str, keys: tuple[str, ...], arguments: tuple[str, ...]) -> Script:
    """Load a script by name; its SHA1 is computed here, so no round trip is spent on asking for it."""
    source = splice(lua_folder(), name)
    return Script(name, keys, arguments, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())
