"""JSON Schemas of public files, and a check of files against them.

`read` reads one file and checks it against a schema; `python -m qlora_kit check OUT results` checks every record, run
folder and results file below those folders.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import KitError
from ..system.manifest import NAME, problem_of_run
from ..system.parsing import read_json, refuse_newer

# results/ files whose rows have a schema; other files are only checked for the common structure.
RESULTS = (
    *("accuracy", "tuning", "schemes", "memory", "quantization", "speed", "inference", "architectures"),
    *("int4_step", "t4", "paging", "merging", "export"),
)
OF_A_RUN = ("training.json", "evaluation.json")
_RECORD = re.compile(r"\d\d_\w+")
_MOST_WORDS = 300  # characters of a message, which quotes the value


def read(path: str | Path, schema: str, *, finite: bool = True) -> Any:
    """Read a JSON file and check it against a schema.

    Args:
        path: The file.
        schema: The schema: a file of this package, or `FILE#/$defs/NAME`.
        finite: Refuse NaN and infinity, which JSON does not have.

    Returns:
        Its content.

    Raises:
        KitError: When it is missing, is not JSON (see `parsing.parse_json`), was made by a newer version of the kit, or
            does not match the schema; the message has the first mismatch.
    """
    value = read_json(path, finite=finite)
    refuse_newer(value, path)
    for problem in problems(value, schema):
        raise KitError(f"{path}: {problem}")
    return value


def problems(value: Any, schema: str) -> list[str]:
    """Return a line for each place where a value does not match a schema.

    Args:
        value: The content of a JSON file.
        schema: A file of this package, or `FILE#/$defs/NAME`.
    """
    found = sorted(_validator(schema).iter_errors(value), key=lambda error: str(error.json_path))
    return [" ".join(f"{_place(error)}: {error.message[:_MOST_WORDS]}".split()) for error in found]


def schema_of(path: Path) -> str | None:
    """Return the schema for a file, as `FILE#/$defs/NAME`, or None for a file of unknown kind."""
    if path.name in OF_A_RUN and (path.parent / "experiment.yaml").is_file():
        return path.name
    if is_of_results(path):
        return of_results(path.stem)
    if path.name == "export.json" and (path.parent / "classifier.py").is_file():
        return "export.json"
    return "record.json" if _RECORD.fullmatch(path.stem) else None


def is_of_results(path: Path) -> bool:
    """Return whether a file is a record of results/, in a clone or an installed package."""
    return path.parent.name in ("results", "_results")


def of_results(name: str) -> str:
    """Return the schema of `results/NAME.json`."""
    return f"results.json#/$defs/{name if name in RESULTS else 'file'}"


def check(paths: Sequence[str | Path]) -> tuple[list[Path], list[str]]:
    """Check files against the schemas, and finished run folders against their manifests.

    Args:
        paths: Files, or folders to search for files of a known kind.

    Returns:
        The files that were checked against a schema, and a line for each problem.

    Raises:
        KitError: When a path does not exist, or a file is of unknown kind.
    """
    checked, found = [], []
    for path, schema in _files(paths):
        checked.append(path)
        try:
            value = read_json(path)
            refuse_newer(value, path)
            found += [f"{path}: {problem}" for problem in problems(value, schema)]
        except KitError as error:
            found.append(str(error))
    # Found by their manifests, so that a run is found even if other files are missing.
    for folder in _finished_runs(paths):
        try:
            changed = problem_of_run(folder)
            found += [f"{folder}: {changed}"] if changed else []
        except KitError as error:
            found.append(str(error))
    return checked, found


@functools.cache
def _validator(schema: str) -> Any:
    # Imported here, so that only users who open runs wait for these imports.
    import jsonschema
    import referencing
    import referencing.jsonschema

    registry: Any = referencing.Registry().with_resources(
        (item.name, referencing.jsonschema.DRAFT202012.create_resource(json.loads(item.read_text(encoding="utf-8"))))
        for item in resources.files(__name__).iterdir()
        if item.name.endswith(".json")
    )
    return jsonschema.Draft202012Validator({"$ref": schema}, registry=registry)


def _place(error: Any) -> str:
    return str(error.json_path).removeprefix("$").removeprefix(".") or "the whole"


def _files(paths: Iterable[str | Path]) -> Iterator[tuple[Path, str]]:
    for path in map(Path, paths):
        if path.is_dir():
            for file in _below(path, "*.json"):
                schema = schema_of(file)
                if schema is not None:
                    yield file, schema
        elif path.is_file():
            schema = schema_of(path.resolve())
            if schema is None:
                raise KitError(f"{path} is none of the files that have a schema: records, run folders, results")
            yield path, schema
        else:
            raise KitError(f"there is no file or folder {str(path)!r}")


def _finished_runs(paths: Iterable[str | Path]) -> Iterator[Path]:
    """Find the folders of finished runs: below the given folders, or containing the given files."""
    for path in map(Path, paths):
        found = _below(path, NAME) if path.is_dir() else [path.resolve().parent / NAME]
        for file in found:
            if file.exists() and "checkpoints" not in file.parts:  # a checkpoint has a manifest of its own
                yield file.parent


def _below(folder: Path, pattern: str) -> list[Path]:
    """List the files with a name below a folder, except below `cut_off`, where the runner moves interrupted work."""
    return sorted(file for file in folder.resolve().rglob(pattern) if "cut_off" not in file.parts)
