"""JSON Schemas of the files that others rely on, and a check of files against them.

`python -m qlora_kit check OUT results` checks every record, run folder and results file below those folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import KitError

# results/ files whose rows the contracts spell out; any other has the common frame alone.
RESULTS = ("accuracy", "tuning", "schemes", "memory", "speed", "inference")
_RECORD = re.compile(r"\d\d_\w+")


def schema_of(path: Path) -> str | None:
    """Return which schema a file is checked against, as `FILE#/$defs/NAME`, or None for a file of no known kind."""
    if path.name in ("training.json", "evaluation.json") and (path.parent / "experiment.yaml").is_file():
        return path.name
    if path.parent.name == "results":
        return f"results.json#/$defs/{path.stem if path.stem in RESULTS else 'file'}"
    return "record.json" if _RECORD.fullmatch(path.stem) else None


def check(paths: Iterable[str | Path]) -> tuple[list[Path], list[str]]:
    """Check files against the schemas.

    Args:
        paths: Files, or folders that are searched for files of a known kind.

    Returns:
        The files that were checked, and a line for each problem.

    Raises:
        KitError: When a path does not exist, a file is of no known kind, or jsonschema is not installed.
    """
    try:
        import jsonschema
        import referencing
        import referencing.jsonschema
    except ImportError as error:
        raise KitError('checking records needs the package jsonschema: pip install "qlora_kit[dev]"') from error
    loaded = {
        item.name: json.loads(item.read_text(encoding="utf-8"))
        for item in resources.files(__name__).iterdir()
        if item.name.endswith(".json")
    }
    registry: Any = referencing.Registry().with_resources(
        (name, referencing.jsonschema.DRAFT202012.create_resource(schema)) for name, schema in loaded.items()
    )
    checked, problems = [], []
    for path, schema in _files(paths):
        checked.append(path)
        try:
            value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
        except ValueError as error:
            problems.append(f"{path}: no JSON: {error}")
            continue
        validator = jsonschema.Draft202012Validator({"$ref": schema}, registry=registry)
        for found in sorted(validator.iter_errors(value), key=lambda found: found.json_path):
            problems.append(f"{path}: {found.json_path}: {found.message[:300]}")
    return checked, problems


def _files(paths: Iterable[str | Path]) -> Iterator[tuple[Path, str]]:
    for path in map(Path, paths):
        if path.is_dir():
            for file in sorted(path.resolve().rglob("*.json")):
                # What was moved aside by the runner is kept as it was left.
                schema = schema_of(file) if "cut_off" not in file.parts else None
                if schema is not None:
                    yield file, schema
        elif path.is_file():
            schema = schema_of(path.resolve())
            if schema is None:
                raise KitError(f"{path} is none of the files that have a schema: records, run folders, results")
            yield path, schema
        else:
            raise KitError(f"there is no file or folder {str(path)!r}")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number in JSON")
