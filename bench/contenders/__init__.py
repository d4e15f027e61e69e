"""The ways to keep presence in Redis that the proofs and the benchmark hold against each other, behind one interface.

``CONTENDERS`` names them: *plain*, each step a command of its own; *transaction*, the same under WATCH/MULTI/EXEC;
*lock*, the same under a lock for each user; *presence*, this library. Each is written as a competent engineer would
write it under that description; what it cannot know, it does not answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.contenders.interface import Contender, State, kind_of, violations
from bench.contenders.library import Presence
from bench.contenders.lock import Locked
from bench.contenders.plain import Plain
from bench.contenders.transaction import Transaction

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CONTENDERS", "PLAIN", "PRESENCE", "Contender", "State", "kind_of", "violations"]

PLAIN, PRESENCE = Plain.name, Presence.name
"""The control, and what is to be shown."""

CONTENDERS: Mapping[str, type[Contender]] = {
    contender.name: contender for contender in (Plain, Transaction, Locked, Presence)
}
