"""Memory that a connection in a game takes: records, indexes, user and game keys, hash tables, and what is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.fill import Population, forget, load_scripts, new_uuid
from bench.measure import MeasurementError, Spread, send, used_memory
from bench.report import Row

if TYPE_CHECKING:
    from bench.scale import Scale
    from bench.servers import Server

HOW = """The difference in `used_memory` between an empty server and the filled one, for each connection: records,
indexes, user and game keys, the server's own tables. The last answer of a register is among them: it is kept with the
user's list until the TTLs are refreshed. Another register within a minute moves it to its own key. The answers that
joins, leaves, unregisters and updates of metadata keep for a minute have keys of their own: right after the fill, which
takes less than a minute, that of every join is still there. The row with the target is after all these are gone; the
server's tables stay as large as they have grown for them."""

REDIS_TARGET = 700
VALKEY_TARGET = 540
ANSWERS = 10_000
RIGHT_AFTER = "the same, right after it joined (its answers are kept for a minute)"


def measure_memory(server: Server, scale: Scale) -> list[Row]:
    """Measure the memory per connection, with user ids like user-000005."""
    info: Any = server.client.info("server")
    target = VALKEY_TARGET if "valkey_version" in info else REDIS_TARGET
    population = Population(server.client, scale.connections)
    fresh, cost = _bytes_per_connection(population)
    registered_again, joined = _bytes_per_answer(population)
    return [
        Row("connection in a game, 11-character user id", cost, "bytes", target=target),
        Row(RIGHT_AFTER, fresh, "bytes"),
        Row("more for a minute after it is registered again", registered_again, "bytes"),
        Row("more for a minute after it joins a game", joined, "bytes"),
    ]


def measure_memory_with_uuids(server: Server, scale: Scale) -> list[Row]:
    """Measure the memory per connection, with UUIDs as user ids."""
    population = Population(server.client, scale.connections, make_user_id=lambda _: new_uuid())
    fresh, cost = _bytes_per_connection(population)
    return [Row("connection in a game, UUID as user id", cost, "bytes"), Row(RIGHT_AFTER, fresh, "bytes")]


def _bytes_per_connection(population: Population) -> tuple[Spread, Spread]:
    """Fill; give the bytes for each connection while the answers of the joins are kept, and after they are gone."""
    load_scripts(population.client)
    size = len(population.sids)
    empty = used_memory(population.client)
    replies = population.fill_and_keep()
    fresh = used_memory(population.client)
    count = forget(population.client, replies)
    if count != size:
        raise MeasurementError(f"{count} answers instead of {size} were there still: the fill took too long")
    full = used_memory(population.client)
    return Spread.exactly((fresh - empty) / size), Spread.exactly((full - empty) / size)


def _bytes_per_answer(population: Population) -> tuple[Spread, Spread]:
    """Give how many bytes more a connection takes once it has registered again, and once it has joined."""
    full = used_memory(population.client)
    again = range(min(ANSWERS, len(population.sids)))
    send(population.client, [population.register(index).command() for index in again])
    registered = used_memory(population.client)
    # Two by two into the game of the next two, so that there are as many games as before, but for one at each end.
    joins = [population.operations.join_game(population.sids[n], population.game_id(n + 2)) for n in again]
    send(population.client, [join.command() for join in joins])
    joined = used_memory(population.client)
    return Spread.exactly((registered - full) / len(again)), Spread.exactly((joined - registered) / len(again))
