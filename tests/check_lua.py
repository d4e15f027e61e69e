"""Check every script with its includes spliced in: it parses, and luacheck finds nothing in it.

luacheck is not on PyPI: it is used where it is installed (Debian: lua-check); the parser is always used.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from luaparser import ast

from presence.scripts import lua_folder, splice

MAX_LINE_LENGTH = 120


def main() -> int:
    for source in Path(str(lua_folder())).rglob("*.lua"):
        for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= MAX_LINE_LENGTH, f"{source}:{number} has {len(line)} characters"
            # The server gets the scripts without comments, and only these blocks are known: see presence/scripts.py.
            is_header = line == "--[[" and number == 2 and source.parent.name != "include"
            assert "--[[" not in line or is_header, f"{source}:{number} begins a block of comment that is no header"
    names = sorted(Path(file.name).stem for file in lua_folder().iterdir() if file.name.endswith(".lua"))
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name in names:
            shebang, _, body = splice(lua_folder(), name).partition("\n")
            assert shebang.startswith("#!lua"), f"{name}.lua must start with #!lua"
            ast.parse(body)
            file = Path(folder, f"{name}.lua")
            file.write_text(f"--\n{body}")
            files.append(str(file))
        luacheck = shutil.which("luacheck")
        if luacheck:
            standard = [
                "--std",
                "lua51",
                "--read-globals",
                "redis",
                "cmsgpack",
                "struct",
                "KEYS",
                "ARGV",
                # An include that is spliced into a block is moved to the right, and names its own parameters.
                "--no-max-line-length",
                "--ignore",
                "43[12]",
            ]
            finished = subprocess.run([luacheck, "--no-color", "--codes", "-q", *standard, "--", *files], check=False)
            if finished.returncode:
                return finished.returncode
    print(
        f"{len(names)} Lua scripts parse" + (", luacheck finds nothing" if luacheck else " (luacheck is not installed)")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
