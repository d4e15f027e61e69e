"""The package as users get it: built, installed into an empty environment, with its Lua files and types."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

CHECKOUT = Path(__file__).resolve().parent.parent

USE_IT = """
import sys
from pathlib import Path
import presence, presence.sync
from presence.scripts import lua_folder

package = Path(presence.__file__).parent
assert sys.prefix in str(package), package
assert Path(str(lua_folder())) == package / "lua", lua_folder()
with presence.sync.ConnectionManager.from_url(sys.argv[1], namespace=sys.argv[2]) as manager:
    manager.register_connection("sid", "user")
    assert manager.join_game("sid", "game")
    assert manager.get_game_user_sids("game") == {"user": "sid"}
    assert manager.unregister_connection("sid")
print("installed and used")
"""


def run(command: Sequence[str | Path], folder: Path) -> str:
    finished = subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True, timeout=170, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel by way of the source distribution, so that one is known to be complete too."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, CHECKOUT], folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_the_wheel_holds_every_lua_file_and_the_types_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    scripts = {f"presence/{file.relative_to(CHECKOUT)}" for file in (CHECKOUT / "lua").rglob("*.lua")}
    modules = {str(file.relative_to(CHECKOUT)) for file in (CHECKOUT / "presence").glob("*.py")}
    assert names == scripts | modules | {"presence/py.typed"}


def test_it_works_in_an_empty_environment(wheel: Path, tmp_path: Path, server_url: str, namespace: str) -> None:
    run([sys.executable, "-m", "venv", tmp_path / "venv"], tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel], tmp_path)
    # -I: whoever runs the tests may have a PYTHONPATH, which would lead to the checkout.
    assert run([python, "-I", "-c", USE_IT, server_url, namespace], tmp_path) == "installed and used\n"
