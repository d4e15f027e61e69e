"""Checks of what callers pass in, made before anything is sent: a clear error that names the argument."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeAlias, TypeVar
from uuid import UUID

Choice = TypeVar("Choice", bound=str)

Encoder: TypeAlias = Callable[[str, object], bytes]
"""Checks an id, and encodes it: :func:`encode` or :func:`encode_user_id`."""

MAX_ID_LENGTH = 1024
"""The most characters in a sid, user id, game id or namespace."""

MAX_METADATA_BYTES = 4096
"""The most bytes of metadata of one connection."""

MAX_SECONDS = 10 * 365 * 24 * 60 * 60
"""Ten years: the longest duration. The server's arithmetic on times stays exact far beyond it."""

MAX_NUMBER = (1 << 63) - 1
"""More than any epoch will ever be; Python does not format an int of more than 4,300 digits."""


def shown(value: object) -> str:
    """Show the beginning of a refused value; it may have no repr, like an int of more than 4,300 digits."""
    try:
        return f"{value!r:.80}"
    except Exception:
        return "(it cannot be shown)"


def encode(name: str, value: object) -> bytes:
    """Check an id, and encode it as UTF-8, whatever encoding the client was made with."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}: {shown(value)}")
    if not value:
        raise ValueError(f"{name} must not be empty")
    if len(value) > MAX_ID_LENGTH:
        raise ValueError(f"{name} must be at most {MAX_ID_LENGTH} characters long, not {len(value)}")
    return _as_utf8(name, value)


def _as_utf8(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must not contain lone surrogates, which have no UTF-8 form: {shown(text)}") from error


def encode_user_id(name: str, value: object) -> bytes:
    """Check a user id, text or UUID, and encode it."""
    if isinstance(value, str):
        return encode(name, value)
    if isinstance(value, UUID):
        return str(value).encode()
    raise TypeError(f"{name} must be a str or a UUID, not {type(value).__name__}: {shown(value)}")


def milliseconds(name: str, seconds: object, *, allow_zero: bool = False) -> int:
    """Check a duration in seconds, and give it in whole milliseconds."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"{name} must be a number of seconds, not {type(seconds).__name__}: {shown(seconds)}")
    if seconds != seconds:  # NaN, the one number that is neither below nor above a limit
        raise ValueError(f"{name} must be a number of seconds, not {seconds}")
    if seconds < 0 or (seconds == 0 and not allow_zero):
        raise ValueError(f"{name} must be {'0 or more' if allow_zero else 'positive'}, not {shown(seconds)}")
    if seconds > MAX_SECONDS:
        raise ValueError(f"{name} must be at most {MAX_SECONDS} seconds (ten years), not {shown(seconds)}")
    whole = round(seconds * 1000)
    if whole == 0 and seconds > 0:
        raise ValueError(f"{name} must be at least 0.001 seconds, not {seconds}")
    return whole


def encode_number(name: str, value: object) -> bytes:
    """Check an epoch or a time, and give it as the scripts take it: empty for None."""
    if value is None:
        return b""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int or None, not {type(value).__name__}: {shown(value)}")
    if value < 0:
        raise ValueError(f"{name} must be 0 or more, not {shown(value)}")
    if value > MAX_NUMBER:
        raise ValueError(f"{name} must be at most {MAX_NUMBER}, not {shown(value)}")
    return b"%d" % value


def check_choice(name: str, value: object, choices: tuple[Choice, ...]) -> Choice:
    """Check that a value is one of several texts, and give that text: ``str()`` of a str that is an Enum differs."""
    if isinstance(value, str):
        for choice in choices:
            if value == choice:
                return choice
    quoted = [f'"{choice}"' for choice in choices]
    error = ValueError if isinstance(value, str) else TypeError
    raise error(f"{name} must be {', '.join(quoted[:-1])} or {quoted[-1]}, not {shown(value)}")


def encode_metadata(metadata: object) -> bytes:
    """Check metadata, and give it as bytes."""
    if isinstance(metadata, str):
        metadata = _as_utf8("metadata", metadata)
    if not isinstance(metadata, bytes):
        raise TypeError(f"metadata must be bytes or a str, not {type(metadata).__name__}: {shown(metadata)}")
    if len(metadata) > MAX_METADATA_BYTES:
        raise ValueError(f"metadata must be at most {MAX_METADATA_BYTES} bytes long, not {len(metadata)}")
    return metadata


def encode_several(name: str, values: object, encode_one: Encoder = encode) -> list[bytes]:
    """Check that several ids were given, not one, and encode each."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be several ids, as a list, not {type(values).__name__}: {shown(values)}")
    # The list is made in one step: another thread may change what it is made of.
    return list(map(partial(encode_one, f"each of {name}"), list(values)))


def encode_batch(name: str, values: object, maximum: int, encode_one: Encoder = encode) -> list[bytes]:
    """Check the ids that one script is to take, and encode each."""
    encoded = encode_several(name, values, encode_one)
    if not 1 <= len(encoded) <= maximum:
        raise ValueError(f"{name} must be 1 to {maximum} ids, not {len(encoded)}")
    return encoded


def check_callback(name: str, callback: object, *, is_awaited: bool) -> None:
    """Check a callback, if there is one; a coroutine that nobody awaits would do nothing."""
    if callback is None:
        return
    is_async = callable(callback) and any(map(inspect.iscoroutinefunction, (callback, callback.__call__)))
    if not callable(callback) or (is_async and not is_awaited):
        kind = "a function" if is_awaited else "a function without async"
        raise TypeError(f"{name} must be {kind}, or None, not {shown(callback)}")


def check_namespace(namespace: object) -> str:
    """Check a namespace: it is the hash tag of every key, so it may hold no brace."""
    text = encode("namespace", namespace).decode()
    if "{" in text or "}" in text:
        raise ValueError(f"namespace must not contain braces, which would move its keys to other slots: {shown(text)}")
    return text


def check_count(name: str, value: object, maximum: int) -> int:
    """Check a whole number from 1 to a maximum."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}: {shown(value)}")
    if not 1 <= value <= maximum:
        raise ValueError(f"{name} must be from 1 to {maximum}, not {shown(value)}")
    return int(value)
