"""Memory that a connection in a game takes: records, indexes, user and game keys, hash tables, and what is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.fill import Population, load_scripts, new_uuid
from bench.measure import Spread, send, used_memory
from bench.report import Row

if TYPE_CHECKING:
    from bench.scale import Scale
    from bench.servers import Server

HOW = """The difference in `used_memory` between an empty server and the filled one, for each connection: records,
indexes, user and game keys, the server's own tables. The last answer of a register is among them: it is kept with the
user's list until the TTLs are refreshed. Another register within a minute moves it to its own key. The answers that
joins, leaves, unregisters and updates of metadata keep for a minute are not among them: what one takes is told
apart."""

REDIS_TARGET = 700
VALKEY_TARGET = 540
ANSWERS = 10_000


def measure_memory(server: Server, scale: Scale) -> list[Row]:
    """Measure the memory per connection, with user ids like user-000005."""
    info: Any = server.client.info("server")
    target = VALKEY_TARGET if "valkey_version" in info else REDIS_TARGET
    cost, registered_again, joined = _bytes_per_connection(Population(server.client, scale.connections))
    return [
        Row("connection in a game, 11-character user id", cost, "bytes", target=target),
        Row("more for a minute after it is registered again", registered_again, "bytes"),
        Row("more for a minute after it joins a game", joined, "bytes"),
    ]


def measure_memory_with_uuids(server: Server, scale: Scale) -> list[Row]:
    """Measure the memory per connection, with UUIDs as user ids."""
    cost, *_ = _bytes_per_connection(Population(server.client, scale.connections, make_user_id=lambda _: new_uuid()))
    return [Row("connection in a game, UUID as user id", cost, "bytes")]


def _bytes_per_connection(population: Population) -> tuple[Spread, Spread, Spread]:
    """Give the bytes for each connection, and how many more once it has registered again, and once it has joined."""
    load_scripts(population.client)
    empty = used_memory(population.client)
    population.fill()
    full = used_memory(population.client)
    again = range(min(ANSWERS, len(population.sids)))
    send(population.client, [population.register(index).command() for index in again])
    registered = used_memory(population.client)
    # Two by two into the game of the next two, so that there are as many games as before, but for one at each end.
    joins = [population.operations.join_game(population.sids[n], population.game_id(n + 2)) for n in again]
    send(population.client, [join.command() for join in joins])
    joined = used_memory(population.client)
    return (
        Spread.exactly((full - empty) / len(population.sids)),
        Spread.exactly((registered - full) / len(again)),
        Spread.exactly((joined - registered) / len(again)),
    )
