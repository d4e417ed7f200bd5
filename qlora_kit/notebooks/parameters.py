"""Read the notebooks' parameters from their cells, and check the given values before anything runs.

papermill alone only warns about a parameter that a notebook does not have, and runs the defaults. Here an unknown one
is refused, and the error names the nearest one.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import KitError, nearest
from ..system.arguments import TEXTS, a_path, takes
from ..system.files import plain
from ..system.parsing import parse_yaml, read_json
from .finding import find_notebook, source_of

# Parameters that a run sets once for all notebooks, or does not use.
_NOT_PARAMS = ("preset", "out", "keep_in_drive")


@takes(path=a_path("notebooks/02_finetune.ipynb"))
def notebook_parameters(path: str | Path) -> dict[str, Any]:
    """Read a notebook's parameters and their defaults from its cell tagged `parameters`.

    Args:
        path: The notebook.

    Returns:
        Default by name; empty if the notebook has no such cell.

    Raises:
        KitError: When the file is no notebook, or a default is not a plain value.
    """
    try:
        cells = read_json(path, finite=False)["cells"]
        sources = [source_of(cell) for cell in cells if "parameters" in cell["metadata"].get("tags", ())]
    except OSError as error:
        raise KitError(f"{path} cannot be read: {os.strerror(error.errno or errno.ENOENT)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KitError(f"{path} is no Jupyter notebook: {error}") from error
    values: dict[str, Any] = {}
    for source in sources[:1]:
        for node in ast.parse(source).body:
            target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
            if isinstance(node, ast.AnnAssign):
                target = node.target
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value and isinstance(target, ast.Name):
                try:
                    values[target.id] = ast.literal_eval(node.value)
                except ValueError as error:
                    raise KitError(f"{path}: the default of {target.id} is not a plain value") from error
    return values


@takes(text=TEXTS)
def split_params(text: str | Iterable[str]) -> dict[str, str]:
    """Read `name=value 04_memory.batch=4` into a mapping; a value with spaces needs quotes.

    Raises:
        KitError: For a piece that has no `=`, or a name that is given twice.
    """
    pieces: list[str] = []
    for part in [text] if isinstance(text, str) else text:
        try:
            pieces += shlex.split(part)
        except ValueError as error:
            raise KitError(f"the parameters {part!r} have an open quote: {error}") from error
    values: dict[str, str] = {}
    for piece in pieces:
        name, equals, value = piece.partition("=")
        if not equals or not name:
            raise KitError(f"{piece!r} is no parameter: write name=value, or 04_memory.name=value for one notebook")
        if name in values:
            raise KitError(f"the parameter {name!r} is given twice")
        values[name] = value
    return values


def assign_params(
    params: Mapping[str, Any], chosen: Mapping[str, Path], available: Mapping[str, Path] | None = None
) -> dict[str, dict[str, Any]]:
    """Give every parameter to the notebooks it is meant for.

    Args:
        params: Values by `name` (for every notebook that has it) or `NOTEBOOK.name`. Texts are read as YAML scalars;
            where the notebook's default is a text, they are taken as they are.
        chosen: The notebooks that are to run.
        available: All notebooks, so that an error can say which of them has a name; None for `chosen`.

    Returns:
        Values by notebook and name.

    Raises:
        KitError: For a name that no chosen notebook has, a notebook that is not chosen, or a value of another type than
            the default.
    """
    available = available or chosen
    defaults = {name: notebook_parameters(path) for name, path in chosen.items()}
    everywhere = sorted({name for known in defaults.values() for name in known})
    values: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    # Values for one notebook come last, so that they override the general ones.
    for key, value in sorted(params.items(), key=lambda item: "." in item[0]):
        prefix, dot, name = key.rpartition(".")
        if dot:
            notebook = find_notebook(prefix, available)
            if notebook not in chosen:
                raise KitError(f"{key} is for {notebook}, which is not to be run: {', '.join(chosen)}")
            if name not in defaults[notebook]:
                raise _unknown_parameter(name, f" in {notebook}", defaults[notebook])
            takers = [notebook]
        else:
            takers = [notebook for notebook in chosen if name in defaults[notebook]]
            if not takers:
                elsewhere = [other for other in available if other not in chosen and _has(available[other], name)]
                hint = f" ({', '.join(elsewhere)} has it, but is not to be run)" if elsewhere else ""
                raise _unknown_parameter(name, hint, everywhere)
        if name in ("preset", "out"):
            raise KitError(f"{name} is no parameter of one notebook: give {name.upper()}=... (--{name}) for all")
        if name == "keep_in_drive":
            raise KitError("keep_in_drive is for a notebook that is opened in Colab: here OUT=... (--out) says it all")
        for notebook in takers:
            values[notebook][name] = _convert(key, value, defaults[notebook][name])
    return values


def _has(path: Path, name: str) -> bool:
    with contextlib.suppress(KitError):
        return name in notebook_parameters(path)
    return False


def _unknown_parameter(name: str, where: str, allowed: Iterable[str]) -> KitError:
    names = [candidate for candidate in allowed if candidate not in _NOT_PARAMS]
    guess = nearest(name, names)
    hint = f" Did you mean {guess!r}?" if guess else ""
    return KitError(f"there is no parameter {name!r}{where}.{hint} Allowed: {', '.join(names)}.")


def _convert(key: str, value: Any, default: Any) -> Any:
    """Return a value in the default's type, or raise KitError."""
    parsed = value
    # A text parameter takes the text as it is (`wandb=off` is not false), without quotes around it.
    quoted = isinstance(value, str) and re.fullmatch(r"""'[^']*'|"[^"]*\"""", value.strip())
    if isinstance(value, str) and (quoted or not isinstance(default, str)):
        try:
            parsed = parse_yaml(value, "the value")
        except KitError as error:
            raise KitError(f"{key}={value!r} is no YAML scalar: {error}") from error
    if isinstance(default, bool):
        if isinstance(parsed, bool):
            return parsed
        raise KitError(f"{key} is {value!r}: allowed is true or false")
    if isinstance(default, int):
        if isinstance(parsed, float) and parsed.is_integer():
            parsed = int(parsed)
        if isinstance(parsed, int) and not isinstance(parsed, bool):
            return parsed
        raise KitError(f"{key} is {value!r}: allowed is a whole number")
    if isinstance(default, float):
        if isinstance(parsed, (int, float)) and not isinstance(parsed, bool):
            return float(parsed)
        raise KitError(f"{key} is {value!r}: allowed is a number")
    if isinstance(default, str):
        if isinstance(parsed, str):
            return parsed
        raise KitError(f"{key} is {value!r}: allowed is a text")
    if isinstance(default, (list, tuple)):
        if isinstance(parsed, (list, tuple)):
            return list(parsed)
        raise KitError(f"{key} is {value!r}: allowed is a list, as in {key}='[1, 2]'")
    return plain(parsed)
