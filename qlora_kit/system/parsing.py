"""Read JSON and YAML from others strictly: ambiguous files are refused.

The usual readers guess: for a name that occurs twice they take the last value; a YAML reader takes `010` for 8 and `no`
for false; a JSON reader takes `1e999` for infinity. Here all of these are refused.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import KitError
from .arguments import a_path, takes

SCHEMA = 1  # the format version of this version's records and run folders
MOST_JSON = 128 * 2**20  # bytes; predictions of a million test rows are smaller
MOST_YAML = 256 * 2**10  # bytes; the largest experiment names some hundred layers
DEEPEST = 100  # levels of nested lists and mappings

# --- files ------------------------------------------------------------------------------------------------------


def read_text(path: str | Path, most: int) -> str:
    """Read a UTF-8 text file of a limited size.

    Args:
        path: The file.
        most: Its largest allowed size in bytes.

    Returns:
        Its text.

    Raises:
        KitError: When it is missing, is no regular file, is too large, or is not UTF-8.
    """
    path = Path(path)
    try:
        if not os.path.lexists(path):
            raise KitError(f"{path} is missing")
        if not path.is_file():  # opening a named pipe would wait forever
            raise KitError(f"{path} is no file")
        if path.stat().st_size > most:
            raise KitError(f"{path} is too large: allowed are {most / 2**20:g} MiB")
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # an impossible file name is a ValueError
        if isinstance(error, KitError):
            raise
        raise KitError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise KitError(f"{path} is no UTF-8 text: {error}") from error


@takes(path=a_path("record.json"))
def read_json(path: str | Path, *, finite: bool = True) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        finite: Refuse NaN and infinity, which JSON does not have (but Python writes).

    Returns:
        Its content.

    Raises:
        KitError: When it is missing, is no regular file, is larger than 128 MiB, or is not JSON (see `parse_json`).
    """
    try:
        text = read_text(path, MOST_JSON)
    except KitError as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise KitError(f"{path} is no JSON: {error.__cause__}") from error
        raise
    return parse_json(text, str(path), finite=finite)


def refuse_newer(value: Any, where: str | Path) -> None:
    """Refuse content that a newer version of the kit has written: its keys may mean something else.

    Args:
        value: The content.
        where: Its source, for the message.

    Raises:
        KitError: When its `schema` is above this version's.
    """
    schema = value.get("schema") if isinstance(value, Mapping) else None
    if isinstance(schema, int) and not isinstance(schema, bool) and schema > SCHEMA:
        raise KitError(
            f"{where} was made by a newer version of qlora_kit (schema {schema}, this one reads {SCHEMA}): bring "
            "qlora_kit up to date"
        )


# --- JSON -------------------------------------------------------------------------------------------------------


def parse_json(text: str, where: str, *, finite: bool = True) -> Any:
    """Read JSON text.

    Args:
        text: The text.
        where: Its source, for messages.
        finite: Refuse NaN and infinity.

    Returns:
        Dicts, lists, strings, numbers, booleans, None.

    Raises:
        KitError: When it is not JSON, a name occurs twice in an object, a number is not finite or has more than 64
            bits, a string is not valid Unicode, or values are nested more than 100 deep.
    """
    try:
        number = _finite if finite else float
        value = json.loads(
            text, object_pairs_hook=_named_once, parse_constant=number, parse_float=number, parse_int=_whole
        )
        _refuse_depth(value)
        if re.search(r"\\u[dD]", text):  # a lone surrogate fails to encode
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise KitError(f"{where} is no JSON: values are nested more than {DEEPEST} deep") from error
    except ValueError as error:
        raise KitError(f"{where} is no JSON: {error}") from error
    return value


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is no finite number")
    return number


def _whole(text: str) -> int:
    if len(text) > 20:  # 2 ** 64 has 20 digits
        raise ValueError(f"{text[:20]}… has {len(text)} digits")
    return int(text)


def _refuse_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        inner = [item for item in level if isinstance(item, (dict, list))]
        if not inner:
            return
        level = [child for item in inner for child in (item.values() if isinstance(item, dict) else item)]
    raise RecursionError


# --- YAML -------------------------------------------------------------------------------------------------------

_TEXT, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float"))
# YAML 1.2's core schema, section 10.3.2. PyYAML itself reads YAML 1.1.
_CORE = {
    "tag:yaml.org,2002:null": re.compile(r"~|null|Null|NULL|"),
    "tag:yaml.org,2002:bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    _INT: re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    _FLOAT: re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
}


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML text by version 1.2, and refuse everything ambiguous.

    Args:
        text: The text.
        where: Its source, for messages.

    Returns:
        Dicts with text keys, lists, strings, numbers, booleans, None.

    Raises:
        KitError: With the line, if it is not YAML; if a name occurs twice or is not text; for tags, anchors, aliases
            and merge keys; for values that YAML 1.1 and 1.2 read differently (`010`, `1:30`, `1_000`, `yes`, dates);
            for text over 256 KiB, and values nested more than 100 deep.
    """
    if len(text) > MOST_YAML:
        raise KitError(f"{where} is too large: allowed are {MOST_YAML // 2**10} KiB")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f", line {mark.line + 1}"
        raise KitError(f"{where} is no valid YAML{line}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise KitError(f"{where} is no valid YAML: {' '.join(str(error).split())}") from error


def dump_yaml(value: Any) -> str:
    """Return plain values as YAML that `parse_yaml`, and also a YAML 1.1 reader, reads back unchanged.

    Args:
        value: Dicts with text keys, lists, strings, numbers, booleans, None.
    """
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


class _Loader(yaml.SafeLoader):
    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _fault(event, "anchors (&) and aliases (*) are not read: write the value itself")
        if event.tag is not None:
            raise _fault(event, f"tags ({event.tag}) are not read: write the value without")
        if self.depth > DEEPEST:
            raise _fault(event, f"values are nested more than {DEEPEST} deep")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def compose_scalar_node(self, anchor: Any) -> Any:
        event: Any = self.peek_event()
        node: Any = super().compose_scalar_node(anchor)
        if event.implicit[0]:  # not in quotes
            tag = next((tag for tag, pattern in _CORE.items() if pattern.fullmatch(node.value)), _TEXT)
            # YAML 1.1 reads 1e-3 as text; everybody means the number.
            same = tag == node.tag or (tag == _FLOAT and node.tag == _TEXT)
            octal = tag == _INT and re.fullmatch(r"[-+]?0[0-9]+", node.value)
            if not same or octal:
                raise _fault(
                    node,
                    f"{node.value[:40]} is read differently by YAML 1.1 and 1.2: write true or false, a plain decimal "
                    "number, or the text in quotes",
                )
            node.tag = tag
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node: Any = super().compose_mapping_node(anchor)
        names = set()
        for key, _ in node.value:
            if key.tag != _TEXT:
                raise _fault(key, "a name is a text: put it in quotes")
            if key.value in names:
                raise _fault(key, f"the name {key.value!r} stands twice")
            names.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


# Text that one of the two versions would read as a number is written in quotes.
for _tag in (_INT, _FLOAT):
    _Dumper.add_implicit_resolver(_tag, re.compile(f"(?:{_CORE[_tag].pattern})$"), list("-+.0123456789"))


def _fault(place: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)
