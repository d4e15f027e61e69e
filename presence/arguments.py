"""Checks of what callers pass in, made before anything is sent: a clear error that names the argument."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from uuid import UUID

if TYPE_CHECKING:
    from presence.operations import EventsMode

MAX_ID_LENGTH = 1024
"""Characters in a sid, user id, game id or namespace, at most."""

MAX_METADATA_BYTES = 4096
"""Bytes of metadata of one connection, at most."""

MAX_SECONDS = 10 * 365 * 24 * 60 * 60
"""Ten years: the longest duration. The server's arithmetic on times stays exact far beyond it."""


def check_text(name: str, value: object) -> str:
    """Check an id, and give it back."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}: {value!r:.80}")
    if not value:
        raise ValueError(f"{name} must not be empty")
    if len(value) > MAX_ID_LENGTH:
        raise ValueError(f"{name} must be at most {MAX_ID_LENGTH} characters long, not {len(value)}")
    return value


def encode(name: str, value: object) -> bytes:
    """Check a sid or game id, and encode it as UTF-8, whatever encoding the client was made with."""
    try:
        return check_text(name, value).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must not contain lone surrogates, which have no UTF-8 form: {value!r:.80}") from error


def encode_user_id(name: str, value: object) -> bytes:
    """Check a user id, text or UUID, and encode it."""
    if isinstance(value, UUID):
        return str(value).encode()
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str or a UUID, not {type(value).__name__}: {value!r:.80}")
    return encode(name, value)


def milliseconds(name: str, seconds: object, *, allow_zero: bool = False) -> int:
    """Check a duration in seconds, and give it in whole milliseconds."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"{name} must be a number of seconds, not {type(seconds).__name__}: {seconds!r:.80}")
    if seconds != seconds:  # NaN, the one number that is neither below nor above a limit
        raise ValueError(f"{name} must be a number of seconds, not {seconds}")
    if seconds < 0 or (seconds == 0 and not allow_zero):
        raise ValueError(f"{name} must be {'0 or more' if allow_zero else 'positive'}, not {seconds!r:.80}")
    if seconds > MAX_SECONDS:
        raise ValueError(f"{name} must be at most {MAX_SECONDS} seconds (ten years), not {seconds!r:.80}")
    whole = round(seconds * 1000)
    if whole == 0 and seconds > 0:
        raise ValueError(f"{name} must be at least 0.001 seconds, not {seconds}")
    return whole


def check_epoch(epoch: object) -> int | str:
    """Check the epoch of a registration, and give it as the scripts take it: empty for any."""
    if epoch is None:
        return ""
    if isinstance(epoch, bool) or not isinstance(epoch, int):
        raise TypeError(f"epoch must be an int or None, not {type(epoch).__name__}: {epoch!r:.80}")
    if epoch < 0:
        raise ValueError(f"epoch must be 0 or more, not {epoch!r:.80}")
    return epoch


def check_displacement(displacement: object) -> str:
    """Check the policy by which one connection gives way to another."""
    if displacement not in ("newest_wins", "reject_while_alive"):
        raise ValueError(f'displacement must be "newest_wins" or "reject_while_alive", not {displacement!r:.80}')
    return str(displacement)


def check_events(events: object) -> EventsMode:
    """Check whether and how changes are to be published."""
    if events not in ("off", "pubsub", "stream"):
        raise ValueError(f'events must be "off", "pubsub" or "stream", not {events!r:.80}')
    return events


def encode_metadata(metadata: object) -> bytes:
    """Check metadata, and give it as bytes."""
    if isinstance(metadata, str):
        try:
            metadata = metadata.encode()
        except UnicodeEncodeError as error:
            raise ValueError("metadata must not contain lone surrogates, which have no UTF-8 form") from error
    if not isinstance(metadata, bytes):
        raise TypeError(f"metadata must be bytes or a str, not {type(metadata).__name__}: {metadata!r:.80}")
    if len(metadata) > MAX_METADATA_BYTES:
        raise ValueError(f"metadata must be at most {MAX_METADATA_BYTES} bytes long, not {len(metadata)}")
    return metadata


def check_iterable(name: str, values: object) -> list[Any]:
    """Check that several ids were given, not one."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be several ids, as a list, not {type(values).__name__}: {values!r:.80}")
    return list(values)


def check_users(name: str, values: object) -> list[str]:
    """Check several user ids, and give each once, as text."""
    return list(dict.fromkeys(encode_user_id(name, value).decode() for value in check_iterable(name, values)))


def check_namespace(namespace: object) -> str:
    """Check a namespace: it is the hash tag of every key, so it may hold no brace."""
    text = check_text("namespace", namespace)
    if "{" in text or "}" in text:
        raise ValueError(f"namespace must not contain braces, which would move its keys to other slots: {text!r:.80}")
    encode("namespace", text)
    return text


def check_count(name: str, value: object, maximum: int) -> int:
    """Check a whole number from 1 to a maximum."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}: {value!r:.80}")
    if not 1 <= value <= maximum:
        raise ValueError(f"{name} must be from 1 to {maximum}, not {value}")
    return value
