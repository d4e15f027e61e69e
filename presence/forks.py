"""Hooks that reset an instance in a process that was forked from this one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Callable

Instance = TypeVar("Instance")

_in_child: WeakKeyDictionary[Any, Callable[[Any], object]] = WeakKeyDictionary()


def call_in_child(instance: Instance, method: Callable[[Instance], object]) -> None:
    """Let a method of an instance be called in each process that is forked while the instance exists."""
    _in_child[instance] = method


def _call_all() -> None:
    for instance, method in tuple(_in_child.items()):
        method(instance)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_call_all)
