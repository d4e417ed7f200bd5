"""Values of an experiment: check their types, and refuse wrong ones with the nearest allowed name."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import numbers
import re
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import KitError, shown, unknown

# --- checking -----------------------------------------------------------------------------------------------


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _typed(section: str, spec: Any) -> None:
    """Refuse a field with the wrong type or a value that is not listed, and convert numbers to the field's type.

    `8.0` becomes the integer 8 in an integer field; any number becomes a float in a float field.
    """
    for name, hint in _hints(spec.__class__).items():
        dotted = f"{section}.{name}" if section else name
        value = getattr(spec, name)
        if get_origin(hint) is Literal:
            if not isinstance(value, str) or value not in get_args(hint):
                raise unknown(f"{dotted} called", value, get_args(hint))
        else:
            object.__setattr__(spec, name, _value(hint, value, dotted))


def _names(section: str, spec: Any, fields: Iterable[str]) -> None:
    """Refuse names that no file or branch can have."""
    for field in fields:
        name = getattr(spec, field)
        if not isinstance(name, str):
            continue
        longest = max(len(part) for part in name.encode().split(b"/"))
        if (
            not name.strip()
            or re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", name)
            or len(name) > 4096
            or longest > 255
        ):
            raise KitError(
                f"{section}.{field} is {shown(name)}: allowed is a name without control characters, of up to 255 bytes "
                "between two slashes"
            )


def _count(name: str, value: float | None, least: float, most: float) -> None:
    if value is not None and not least <= value <= most:
        raise KitError(f"{name} is {shown(value)}: allowed is {least} or more, up to {most}")


def _above_0(name: str, value: float | None, most: float) -> None:
    if value is not None and not 0 < value <= most:
        raise KitError(f"{name} is {shown(value)}: allowed is a finite number above 0, up to {most:g}")


def _between(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise KitError(f"{name} is {shown(value)}: allowed is {low} to {high}")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def _section(hint: Any) -> type | None:
    """Return the dataclass in a type hint (`LoraSpec` in `LoraSpec | None`), or None."""
    for option in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        if dataclasses.is_dataclass(option) and isinstance(option, type):
            return option
    return None


def _value(hint: Any, value: Any, name: str) -> Any:
    """Return `value` converted to the hint's type, or raise KitError."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if dataclasses.is_dataclass(option):
            if isinstance(value, option):  # type: ignore[arg-type]  # a class, in a hint
                return value
        elif get_origin(option) is tuple:
            if isinstance(value, (list, tuple)) and all(map(_is_text, value)):
                return tuple(value)
        elif option is bool:
            if isinstance(value, bool):
                return value
        elif option is int:
            if _is_number(value) and isinstance(value, numbers.Integral):
                return int(value)
            if _is_number(value) and float not in options and float(value).is_integer():
                return int(value)
        elif option is float:
            if _is_number(value):
                with contextlib.suppress(OverflowError):  # a whole number of 400 digits
                    if math.isfinite(value):
                        return float(value) + 0.0  # without the sign of -0.0
        elif option is str and _is_text(value):
            return value
    wanted = " or ".join(_spoken(option) for option in options)
    raise KitError(f"{name} is {shown(value)}: allowed is {wanted}")


def _is_number(value: Any) -> bool:
    # numpy registers its numbers with these abstract types; np.int64 is no int.
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    # A lone surrogate cannot be written to a file.
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _spoken(option: Any) -> str:
    if option is type(None):
        return "null"
    if get_origin(option) is tuple:
        return "a list of names"
    if dataclasses.is_dataclass(option):
        return f"a section ({option.__name__})"  # type: ignore[union-attr]  # a class, in a hint
    return {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}[option]
