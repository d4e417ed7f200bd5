"""Read what rules need: all records, in a fixed order, and values that are computed without measuring.

Rows are sorted when they are read, rows that measured the same thing are merged, and no rule takes a row because it
comes first. So neither the order of a record's rows nor a copied row can change a verdict.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .. import schemas
from ..errors import KitError
from ..run import finished_runs
from ..system.arguments import FLAG, NUMBER, a_path, takes
from ..system.environment import environment as describe
from ..system.environment import is_gpu
from .arithmetic import compute
from .limits import MARGIN

logger = logging.getLogger(__name__)

_RESULTS = ("accuracy", "tuning", "schemes", "memory", "quantization", "speed", "inference", "paging")
_NOTEBOOKS = ("01_quantization", "02_finetune", "03_evaluate", "04_memory")
_PACKAGE = Path(__file__).resolve().parents[1]
MEMORY_ALIKE = (
    "source", "device", "model", "precision", "optimizer", "batch", "length", "graphs", "lora_r", "lean", "embeddings",
    "prepare_for_kbit_training", "limit_bytes", "cublas_workspace",
)  # fmt: skip
"""Keys in which two rows of memory have to be equal, whatever else a rule compares."""

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
"""Bytes of a number in each precision."""

# Rows are sorted by these keys first, and only then by their other content.
_ORDER = (
    "model", "preset", "method", "contender", "subject", "scheme", "double_quantization", "precision", "batch",
    "length", "device", "of", "over", "name", "seed",
)  # fmt: skip

Item = TypeVar("Item")
Pair = tuple[Mapping[str, Any], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Records:
    """Everything that rules read.

    Args:
        results: Files of results/ by their stem.
        notebooks: Records of notebooks by the notebook's name.
        runs: Run folders: each with `name`, `experiment`, `training`, `evaluation` (or None), `environment`.
        computed: What `compute` returned; empty for nothing.
        device: This machine's device. Its records are preferred unless a rule says otherwise.
        margin: Difference of macro F1 within which two methods count as equal.
    """

    results: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notebooks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    runs: Sequence[Mapping[str, Any]] = ()
    computed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    device: str = ""
    margin: float = MARGIN

    def rows(self, name: str, section: str = "rows") -> list[dict[str, Any]]:
        """Return the rows of results/NAME.json, sorted, each with a `device`; none if there is no file.

        Args:
            name: The record.
            section: Another list of rows in it, e.g. `differences`.
        """
        result = self.results.get(name, {})
        device = result.get("environment", {}).get("device", "")
        return ordered({"device": device, **row} for row in result.get(section) or [])

    def notebook(self, name: str) -> tuple[Mapping[str, Any], str]:
        """Return a notebook's record and its device; an empty record if there is none."""
        record = self.notebooks.get(name, {})
        return record, record.get("environment", {}).get("device", "")

    def preferred(self, found: Iterable[Item], device: Any = None) -> list[Item]:
        """Return the items that decide if there are several devices: this machine's, else all GPUs', else all CPUs'.

        All GPUs count, not just one: which of two GPUs comes first in a record says nothing.

        Args:
            found: Rows, figures or pairs.
            device: Return the device of an item; by default its attribute or key `device`.
        """
        of = device or (lambda item: item["device"] if isinstance(item, Mapping) else item.device)
        items = list(found)
        ranks = [0 if of(item) == self.device else 1 if is_gpu(of(item)) else 2 for item in items]
        return [item for item, rank in zip(items, ranks, strict=True) if rank == min(ranks)]


def ordered(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows sorted by their content only, without duplicates."""
    keyed = {}
    for row in rows:
        content = json.dumps(row, sort_keys=True, default=str)
        keyed[tuple(str(row.get(key)) for key in _ORDER), content] = dict(row)
    return [keyed[key] for key in sorted(keyed)]


def short_model(name: str) -> str:
    """Return a model's name as in results/memory.json: e.g. `dialogpt-medium` for `microsoft/DialoGPT-medium`."""
    return name.rpartition(":")[2].rpartition("/")[2].lower()


def only(rows: Iterable[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    """Return the rows that have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def grouped(rows: Iterable[Mapping[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """Split rows into comparable groups: the same device and equal `keys`."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["device"], *(row.get(key) for key in keys)), []).append(row)
    return {key: groups[key] for key in sorted(groups, key=str)}


def pairs(
    rows: Iterable[Mapping[str, Any]], first: Mapping[str, Any], second: Mapping[str, Any], *alike: str
) -> list[Pair]:
    """Pair rows that match `first` with rows that match `second` and have equal values of `alike`.

    Rows that measured the same thing are merged, with the medians of their bytes and seconds.
    """
    sides = []
    for wanted in (first, second):
        cells: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for row in only(rows, **wanted):
            cells.setdefault(tuple(row.get(key) for key in alike), []).append(row)
        sides.append({key: merged(cell) for key, cell in cells.items()})
    return [(sides[0][key], sides[1][key]) for key in sorted(sides[0], key=str) if key in sides[1]]


def merged(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Merge rows that measured the same thing: medians of bytes and seconds, the widest range."""
    if len(rows) == 1:
        return rows[0]
    one = dict(rows[0])
    for key in ("peak_bytes", "reserved_bytes", "paged_bytes", "step_seconds", "device_seconds", "samples_per_second"):
        values = [row[key] for row in rows if isinstance(row.get(key), (int, float))]
        if values:
            one[key] = statistics.median(values)
    ranges = [row["samples_per_second_range"] for row in rows if row.get("samples_per_second_range")]
    if ranges:
        one["samples_per_second_range"] = [min(low for low, _ in ranges), max(high for _, high in ranges)]
    return one


def memory_rows(records: Records) -> list[dict[str, Any]]:
    """Return the rows of results/memory.json and of notebook 04 that have a measured peak, with the same keys."""
    rows = [{"source": "results/memory.json", **row} for row in records.rows("memory")]
    record, device = records.notebook("04_memory")
    spec = record.get("experiment", {})
    for row in ordered(record.get("rows", [])):
        changes = row.get("changes", {})
        training = {**spec["training"], **{k.partition(".")[2]: v for k, v in changes.items() if k[:9] == "training."}}
        rows.append(
            {
                "source": "04_memory.json",
                "device": device,
                "model": short_model(spec["model"]["name"]),
                "method": row["method"],
                "scheme": row["scheme"],
                "double_quantization": changes.get("quantization.double_quantization", row["scheme"] != "none" or None),
                "embeddings": changes.get("quantization.embeddings", "none"),
                "precision": training["precision"],
                "optimizer": training["optimizer"],
                "checkpointing": training["gradient_checkpointing"],
                "batch": row["batch"],
                "length": row["length"],
                "planned_bytes": row["planned"],
                "peak_bytes": row["measured"],
                "paged_bytes": row.get("paged"),
                "step_seconds": row["step_seconds"],
                "parts": row["parts"],
            }
        )
    return [row for row in rows if row.get("peak_bytes")]


def of_methods(rows: Iterable[Mapping[str, Any]]) -> list[Pair]:
    """Pair QLoRA (NF4, double quantization) with LoRA: same record, device and shape, only storage differs."""
    qlora = {"method": "qlora", "scheme": "nf4", "double_quantization": True}
    return pairs(rows, qlora, {"method": "lora", "scheme": "none"}, *MEMORY_ALIKE, "checkpointing")


# --- reading ----------------------------------------------------------------------------------------------------


@takes(results=a_path("results"), out=a_path("runs/latest"), margin=NUMBER, computed=FLAG)
def read(
    results: str | Path = "", out: str | Path = "runs/latest", *, margin: float = MARGIN, computed: bool = True
) -> Records:
    """Read all records.

    Args:
        results: Folder of the reference records; empty for the project's own (see `find_results`).
        out: The folder OUT, with notebooks' records and `runs/`; if it has no finished run, `runs` is read.
        margin: Difference of macro F1 within which two methods count as equal.
        computed: Whether to compute what needs no measurement (see `compute`; it takes some seconds).

    Returns:
        The records. What is missing is left out.

    Raises:
        KitError: When a named folder is missing, a record is not JSON, or the margin is not above 0.
    """
    from ..system.devices import cuda_available

    if not margin > 0:
        raise KitError(f"margin is {margin}: allowed is a difference of macro F1 above 0, as {MARGIN}")
    folder = find_results(results)
    files = {name: folder / f"{name}.json" for name in _RESULTS}
    found = {name: schemas.read(file, schemas.of_results(name)) for name, file in files.items() if file.is_file()}
    files = {name: Path(out) / f"{name}.json" for name in _NOTEBOOKS}
    books = {name: schemas.read(file, "record.json") for name, file in files.items() if file.is_file()}
    cuda = cuda_available()
    return Records(
        results=found,
        notebooks=books,
        runs=_runs(Path(out) / "runs") or _runs(Path("runs")),
        computed=compute() if computed else {},
        device=describe("cuda" if cuda else None)["device"],
        margin=margin,
    )


@takes(results=a_path("results"))
def find_results(results: str | Path = "") -> Path:
    """Return the folder of the reference records.

    Args:
        results: The folder; empty for the copy in an installed package, or `results/` of a clone.

    Raises:
        KitError: When the named folder does not exist, or the package was copied without its records.
    """
    if results:
        if not Path(results).is_dir():
            raise KitError(f"there is no folder {str(results)!r}: name one with records, as results/ of a clone")
        return Path(results)
    places = [_PACKAGE / "_results"]
    if (_PACKAGE.parent / "pyproject.toml").is_file():  # a clone; in site-packages, `results` would be somebody else's
        places.append(_PACKAGE.parent / "results")
    for place in places:
        if place.is_dir():
            return place
    raise KitError("the reference records are not installed with this package; run from a clone, or name their folder")


def _runs(root: Path) -> list[dict[str, Any]]:
    found = []
    for run in sorted(finished_runs(root), key=lambda run: run.path):
        try:
            experiment = run.experiment.to_dict()
            if experiment["data"]["name"] != "banking77":
                continue  # the claims are about Banking77: a run on a user's own rows is no evidence
            found.append(
                {
                    "name": run.path.name,
                    "experiment": experiment,
                    "training": run.training,
                    "evaluation": run.evaluation,
                    "environment": run.environment,
                }
            )
        except KitError as error:
            logger.warning("Passed over %s: %s", run.path, error)
    return found


def of_one_model(found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of the model with the most methods; across models, methods cannot be compared.

    Args:
        found: Each with `model` and `method`: from `curves`, or rows of results/accuracy.json.
    """
    methods: dict[str, set[str]] = {}
    for row in found:
        methods.setdefault(row["model"], set()).add(row["method"])
    chosen = max(sorted(methods), key=lambda model: len(methods[model]), default=None)
    return [row for row in found if row["model"] == chosen]
