"""Where a figure stands: its record in results/, its row and its key."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qlora_kit.errors import KitError, nearest  # noqa: E402
from qlora_kit.system.environment import is_gpu  # noqa: E402


class Row:
    """A row of a record, or an object within one; every value that is read from it is noted.

    Args:
        name: The record's stem, as `speed`.
        path: Keys and indices that lead to it.
        data: What stands there.
        seen: Takes `(name, path)` of each value that is read.
    """

    def __init__(self, name: str, path: tuple[Any, ...], data: Mapping[str, Any], seen: dict[Any, Any]) -> None:
        self._name, self._path, self._data, self._seen = name, path, data, seen

    def __getitem__(self, key: str) -> Any:
        if key not in self._data:
            near = nearest(key, self._data)
            raise KitError(
                f"{self} has no {key!r}; " + (f"nearest is {near!r}" if near else f"it has {_list(self._data)}")
            )
        value = self._data[key]
        if isinstance(value, Mapping):
            return Row(self._name, (*self._path, key), value, self._seen)
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            return [Row(self._name, (*self._path, key, i), item, self._seen) for i, item in enumerate(value)]
        self._seen[self._name, (*self._path, key)] = value
        return value

    def get(self, key: str) -> Any:
        """Return a value, or None where there is none."""
        return self[key] if key in self._data else None

    def keys(self) -> list[str]:
        """Return the names of its values."""
        return list(self._data)

    def __contains__(self, key: object) -> bool:
        return key in self._data

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Row) and (self._name, self._path) == (other._name, other._path)

    def __hash__(self) -> int:
        return hash((self._name, self._path))

    def __str__(self) -> str:
        return f"results/{self._name}.json: {'.'.join(map(str, self._path))}"


class Records:
    """The records of results/, and how a value in them is addressed.

    Args:
        folder: Where they are.
        changed: Records by stem that stand in the place of the folder's.
    """

    def __init__(self, folder: Path = ROOT / "results", changed: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self._loaded: dict[str, Any] = dict(changed or {})
        self.seen: dict[tuple[str, tuple[Any, ...]], Any] = {}

    def names(self) -> list[str]:
        """Return the stems of all records, in the order of the alphabet."""
        return sorted(path.stem for path in self.folder.glob("*.json"))

    def load(self, name: str) -> Any:
        """Return a record as it is read."""
        if name not in self._loaded:
            path = self.folder / f"{name}.json"
            if not path.is_file():
                near = nearest(name, self.names())
                raise KitError(f"there is no results/{name}.json" + (f"; nearest is {near}" if near else ""))
            self._loaded[name] = json.loads(path.read_text(encoding="utf-8"))
        return self._loaded[name]

    def record(self, name: str) -> Row:
        """Return a whole record; its rows are found by `row` and `rows`."""
        return Row(name, (), self.load(name), self.seen)

    def rows(self, place: str, **wanted: Any) -> list[Row]:
        """Return the rows of a record that have these values, in the record's order.

        Args:
            place: The record's stem, as `speed`; with another list of it, as `accuracy.differences`.
            **wanted: Values by key. None is what a row lacks, too; device may be `GPU` or `CPU`.

        Raises:
            KitError: A key that no row of the record has.
        """
        return [row for row, missed in self._matched(place, wanted) if not missed]

    def row(self, place: str, **wanted: Any) -> Row:
        """Return the one row that has these values; the arguments are those of `rows`.

        Raises:
            KitError: None has them, or several have; the message says what was matched and what is nearest.
        """
        matched = self._matched(place, wanted)
        found = [row for row, missed in matched if not missed]
        if len(found) == 1:
            return found[0]
        file = f"results/{place.partition('.')[0]}.json"
        if found:
            raise KitError(f"{file} has {len(found)} rows of {_told(wanted)}, and one is asked for: {_apart(found)}")
        left = [row for row, _ in matched]
        held: dict[str, Any] = {}
        for key, value in wanted.items():
            still = [row for row in left if _has(row, key, value)]
            if not still:
                there = [row._data.get(key) for row in left]
                raise KitError(
                    f"{file} has no row of {_told(wanted)}: {len(left)} rows are of {_told(held) or 'any kind'}, "
                    f"and none of them has {key}={value!r}; {_near(value, there)}"
                )
            left, held = still, {**held, key: value}
        raise AssertionError("a row matched after all")

    def row_if_any(self, place: str, **wanted: Any) -> Row | None:
        """Return the row that has these values, None where there is none; keys that no row has count as lacking.

        Raises:
            KitError: Several rows have them.
        """
        data = self._list(place)
        if any(value is not None and not any(key in row for row in data) for key, value in wanted.items()):
            return None
        return self.row(place, **wanted) if self.rows(place, **wanted) else None

    def device(self, place: str, kind: str, **wanted: Any) -> str:
        """Return the name of the GPU or CPU that has such rows.

        Where several have, it is the one all of whose rows say of which commit they are; among such, one of a clean
        tree; among such, the one that was measured last.

        Args:
            place: See `rows`.
            kind: `GPU` or `CPU`.
            **wanted: See `rows`.

        Raises:
            KitError: No device has.
        """
        found = self.rows(place, device=kind, **wanted)
        names = list(dict.fromkeys(str(row["device"]) for row in found))
        if not names:
            raise KitError(f"results/{place}.json has {kind} rows of no device for {_told(wanted)}")

        def rank(name: str) -> tuple[bool, bool, int]:
            commits = [self.commit(row) or "" for row in found if row["device"] == name]
            return all(commits), not any(commit.endswith("+changes") for commit in commits), names.index(name)

        return max(names, key=rank)

    def commit(self, row: Row) -> str | None:
        """Return the commit that a row was made by, with `+changes` where the tree was changed; None if unknown."""
        data = row._data
        environment = data.get("environment") or self.load(row._name).get("environment", {})
        found = data["commit"] if "commit" in data else environment.get("commit")
        return str(found) if found else None

    def origins(self, name: str) -> list[dict[str, Any]]:
        """Return how many rows of a record each device and commit made: `device`, `commit`, `clean` and `rows`."""
        found: dict[tuple[str, str | None], int] = {}
        for row in self.rows(name):
            device = str(row.get("device") or self.environment(row)["device"])
            key = device, self.commit(row)
            found[key] = found.get(key, 0) + 1
        return [
            {
                "device": device,
                "commit": commit and commit.removesuffix("+changes")[:12],
                "clean": bool(commit) and not str(commit).endswith("+changes"),
                "rows": count,
            }
            for (device, commit), count in found.items()
        ]

    def environment(self, row: Row) -> Row:
        """Return the environment of a row: its own, or the record's."""
        return row["environment"] if "environment" in row else self.record(row._name)["environment"]

    def _list(self, place: str) -> list[dict[str, Any]]:
        name, _, where = place.partition(".")
        data: list[dict[str, Any]] = self.load(name)[where or "rows"]
        return data

    def _matched(self, place: str, wanted: Mapping[str, Any]) -> list[tuple[Row, list[str]]]:
        name, _, where = place.partition(".")
        data = self._list(place)
        keys = {key for row in data for key in row}
        for key, value in wanted.items():
            if key not in keys and value is not None:
                near = nearest(key, keys)
                raise KitError(
                    f"no row of results/{name}.json has {key!r}; "
                    + (f"nearest is {near!r}" if near else f"they have {_list(sorted(keys))}")
                )
        rows = [Row(name, (where or "rows", number), row, self.seen) for number, row in enumerate(data)]
        return [(row, [key for key, value in wanted.items() if not _has(row, key, value)]) for row in rows]


def kind(device: str) -> str:
    """Return `GPU` or `CPU` for a device's name."""
    return "GPU" if is_gpu(device) else "CPU"


def _has(row: Row, key: str, value: Any) -> bool:
    own = row._data.get(key)
    if key == "device" and value in ("GPU", "CPU"):
        return kind(str(own or "")) == value
    return own == value and isinstance(own, bool) == isinstance(value, bool)


def _told(wanted: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in wanted.items())


def _list(names: Any, most: int = 12) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _near(value: Any, there: Sequence[Any]) -> str:
    """Say which of the values that are there is nearest to the one that was asked for."""
    plain = [item for item in there if isinstance(item, (int, float)) and not isinstance(item, bool)]
    if plain and isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"nearest is {min(plain, key=lambda item: abs(item - value))!r}"
    near = nearest(str(value), {str(item) for item in there}, cutoff=0.3)
    return f"nearest is {near!r}" if near else f"there are {_list(dict.fromkeys(map(repr, there)))}"


def _apart(found: Sequence[Row]) -> str:
    """Say which keys tell rows apart."""
    told = []
    for key in found[0]._data:
        values = dict.fromkeys(repr(row._data.get(key)) for row in found)
        if len(values) > 1 and all(len(value) < 60 for value in values):
            told.append(f"{key} ({_list(values, 4)})")
    return "they differ in " + _list(told, 6) if told else "they differ in nothing short"


# --- what templates ask of several rows ---


def same(rows: Sequence[Row], key: str) -> Any:
    """Return the value of a key that all rows share.

    Raises:
        KitError: There are no rows, or they differ in it.
    """
    found = distinct(rows, key)
    if len(found) != 1:
        raise KitError(f"{len(rows)} rows are to have one {key}, and they have {_list(map(repr, found)) or 'none'}")
    return found[0]


def distinct(rows: Sequence[Row], key: str) -> list[Any]:
    """Return the values of a key in the rows' order, each once."""
    return list(dict.fromkeys(row.get(key) for row in rows))


def mean(rows: Sequence[Row], key: str) -> float:
    """Return the mean of a key over the rows.

    Raises:
        KitError: There are no rows.
    """
    if not rows:
        raise KitError(f"there are no rows to take the mean of {key} of")
    return float(sum(row[key] for row in rows) / len(rows))


def beside(row: Row) -> dict[str, Any]:
    """Return what selects the rows of one race: they were measured in turns, by one command."""
    key = "race" if row.get("race") else "command"
    return {key: row[key]}


def fullest(rows: Sequence[Row], among: Sequence[Row]) -> list[Row]:
    """Return the row of each batch whose race has the most contenders, the batches in their order.

    Args:
        rows: Rows of one contender, which may have raced more than once.
        among: All rows of which races may be.
    """

    def rank(row: Row) -> tuple[int, bool, int]:
        wanted = {**beside(row), "batch": row["batch"]}
        count = sum(all(_has(other, key, value) for key, value in wanted.items()) for other in among)
        return count, bool(row.get("commit")), rows.index(row)

    batches = sorted(distinct(rows, "batch"))
    return [max((row for row in rows if row["batch"] == batch), key=rank) for batch in batches]


def busy(row: Row) -> bool:
    """Say whether a row's `device_seconds` is the time that the GPU is busy, and not a sum over kernels."""
    return bool(row.get("device_seconds_means") == "busy")
