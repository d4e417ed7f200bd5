"""The arguments that describe an experiment: its name, the user's own data, changed fields."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import KitError

if TYPE_CHECKING:
    from ..config.experiment import Experiment


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that describe an experiment to a command's parser."""
    parser.add_argument("experiment", help="a preset, auto, or an experiment's YAML file")
    parser.add_argument("--data", metavar="FILE", help="your own data: a file, a pattern or a hub data set's name")
    parser.add_argument("--test", metavar="FILE|FRACTION", help="its test data: a file, a split, or a share of it")
    parser.add_argument("--text", metavar="COLUMN", help="its column of texts (text)")
    parser.add_argument("--label", metavar="COLUMN", help="its column of labels (label)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field, as training.epochs=2"
    )


def read_experiment(options: argparse.Namespace) -> Experiment:
    """Return the experiment that a command line describes."""
    from ..config.names import named_after
    from ..config.preset import preset, resolve_preset

    name, why = resolve_preset(options.experiment)
    if options.experiment == "auto":
        print(f"auto: {name} ({why})")
    changes = read_changes(options.set)
    given = {"name": options.data, "text": options.text, "label": options.label}
    given["test"] = None if options.test is None else _number_or_text(options.test)
    for field, value in given.items():
        if value is not None:
            _add(changes, f"data.{field}", value)
    known = preset(name)
    experiment = known.override(changes)
    if known.data.name == "banking77" and "name" not in changes:
        # As Python names it, where the user's data is handed to `finetune`.
        experiment = experiment.override({"name": named_after(known.name, experiment.data.name)})
    return experiment


def in_options(message: str, options: argparse.Namespace) -> str:
    """Return a message with the options that were given in place of the names that the library has for them.

    Args:
        message: Of a KitError.
        options: What the parser has read.
    """
    for field in ("name", "test", "text", "label"):
        option = "data" if field == "name" else field
        by_field = any(piece.startswith(f"data.{field}=") for piece in getattr(options, "set", None) or ())
        if isinstance(getattr(options, option, None), str) and not by_field:
            message = re.sub(rf"\bdata\.{field}\b", f"--{option}", message)
    found = re.match(r"(\w+) is ", message)
    actions = getattr(getattr(options, "own_parser", None), "_option_string_actions", {})
    if found and f"--{found[1].replace('_', '-')}" in actions:
        message = f"--{found[1].replace('_', '-')}{message[found.end(1) :]}"
    return message


def read_changes(pieces: Sequence[str]) -> dict[str, Any]:
    """Return the changed fields by name, from the options `--set FIELD=VALUE`."""
    from ..system.parsing import parse_yaml

    changes: dict[str, Any] = {}
    for piece in pieces:
        field, equals, value = piece.partition("=")
        if not equals:
            raise KitError(f"--set {piece!r} has no value: write --set training.epochs=2")
        _add(changes, field, parse_yaml(value, f"--set {piece}"))
    return changes


def _add(changes: dict[str, Any], field: str, value: Any) -> None:
    """Add a change; refuse two values for one field, of which a dict would keep the last."""
    if field in changes and changes[field] != value:
        raise KitError(f"{field} is given twice, as {changes[field]!r} and as {value!r}: give one")
    changes[field] = value


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
