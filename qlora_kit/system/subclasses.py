"""Subclasses that are made while a program runs, once for each class, and whose instances can be pickled."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def subclass(name: str, *bases: Any) -> Any:
    """Return the class of a name and bases; the same at each call.

    Pickle finds a class by its name in a module, and this one stands in none: its instances are pickled and copied by
    the bases from which their class is made again.

    Args:
        name: What `print` shows.
        *bases: The classes that it inherits from, the first of which has its docstring.
    """

    def reduce(self: Any, protocol: int) -> tuple[Any, ...]:
        return _empty, (name, *bases), self.__dict__

    members = {"__doc__": bases[0].__doc__, "__module__": bases[0].__module__, "__reduce_ex__": reduce}
    return type(name, bases, members)


def _empty(name: str, *bases: Any) -> Any:
    kind = subclass(name, *bases)
    return kind.__new__(kind)
