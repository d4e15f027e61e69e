"""What the README shows works as it is shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def test_the_demo_ends_well(server_url: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "examples.demo"],
        cwd=CHECKOUT,
        # Of all servers, make test-all means one that the demo would not find.
        env=os.environ | {"PRESENCE_REDIS_URL": server_url, "PRESENCE_SERVER": "PRESENCE_REDIS_URL"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    first_line, *_, last_line = finished.stdout.splitlines()
    assert re.fullmatch(r"presence demo on .*, PRESENCE_REDIS_URL", first_line), "it ran on the server under test"
    assert re.fullmatch(r"demo: all \d+ checks passed in .* s; no key of a connection is left, .*", last_line)


def test_the_readmes_example_prints_what_it_says(server_url: str, namespace: str) -> None:
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    code, printed = re.search(r"```python\n(.*?)```.*?```\n(.*?)```", readme, re.DOTALL).groups()  # type: ignore[union-attr]
    assert run(code, server_url, namespace) == printed


def test_the_readmes_example_of_events_prints_what_it_says(server_url: str, namespace: str) -> None:
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"## Events\n.*?```python\n(.*?)```", readme, re.DOTALL)[1]  # type: ignore[index]
    (printed,) = re.findall(r"print\(.*\)  # (.*)", code)
    assert run(code, server_url, namespace) == f"{printed}\n"


def run(code: str, server_url: str, namespace: str) -> str:
    """Run an example in a namespace of the test's; give what it prints."""
    here = code.replace('"redis://localhost:6379/0"', f"{server_url!r}, namespace={namespace!r}")
    assert here != code
    finished = subprocess.run([sys.executable, "-c", here], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout
