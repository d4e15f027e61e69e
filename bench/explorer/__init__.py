"""Every interleaving: operations of a contender, driven command by command against a real server, in every order.

A schedule says which caller makes each step; a step is one write and its replies, so a transaction's EXEC with all that
it executes is one, and so is a script. Every schedule starts from the same keys, runs to its end, and then the
invariants of the keyspace are checked, and that the answers and the end are those of some serial order, as the model of
the tests has it: an order of atomic parts, of which an operation is one, and a cleanup one for each of its batches. Of
*presence*, each step is such a part, so they must be those of the very order in which the steps were made, and its
events must tell of what is there in the end.

Then each of the callers dies after each of its steps, while the others run on. What it sent takes effect, the reply to
its last step is lost, and it sends nothing more; where its operation is one step, nothing else can be lost. A server
that has lost its scripts makes up to three steps of it.

In more pairs of *presence* calls are sent twice, as where the first reply was lost: one that changed something must
have taken effect once and answers the same again, one that changed nothing acts as a new call.

How many schedules there are: two operations of a and b steps have (a + b)! / (a! b!). Of plain commands a first
register has five (GET, HSET, EXPIRE, SET, EXPIRE), so two of them would have 252; but in 12 of those one caller's SET
comes before the other's GET, which then finds a connection to clean and takes nine steps (GET, HGETALL, GET, DEL, DEL,
HSET, EXPIRE, SET, EXPIRE), and of which there are 2 x 10 schedules instead: 260. In the other 240 both find no
connection, and the one whose SET comes first is left an orphan.
"""

from bench.explorer.explore import Exploration, Result, Tally, explore, measure_interleavings
from bench.explorer.pairs import (
    BATCH_PAIRS,
    FLEET_GROUPS,
    FLEET_PAIRS,
    PAIRS,
    PRESENCE_PAIRS,
    SAME_SID_PAIRS,
    SENT_TWICE_PAIRS,
    Call,
    Pair,
)

__all__ = [
    "BATCH_PAIRS",
    "FLEET_GROUPS",
    "FLEET_PAIRS",
    "PAIRS",
    "PRESENCE_PAIRS",
    "SAME_SID_PAIRS",
    "SENT_TWICE_PAIRS",
    "Call",
    "Exploration",
    "Pair",
    "Result",
    "Tally",
    "explore",
    "measure_interleavings",
]
