"""The rights that an ACL user needs, as the README lists them."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def rights(pattern: str) -> list[str]:
    """Give the rights that the README lists."""
    listed = re.search(pattern, README, re.MULTILINE)
    assert listed
    return listed[1].split()


LEAST_RIGHTS = rights(r"^ACL SETUSER game-server on >password (.*)$")
MORE_TO_SUBSCRIBE = {
    mode: rights(rf"^To subscribe,.*?`([^`]*)` with `events=\"{mode}\"`") for mode in ("pubsub", "stream")
}
MORE_FOR_ANOTHER_DATABASE = rights(r"^For a database other than 0, it also needs `([^`]*)`")
MORE_ON_A_CLUSTER = rights(r"^On a cluster, it also needs `([^`]*)`")
RIGHTS_ON_SENTINELS = rights(r"^Where the sentinels ask for a user, .*? `([^`]*)`")
