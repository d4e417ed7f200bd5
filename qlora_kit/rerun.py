"""Run a record again, and say what differs: where it was made, and what came of it.

Equal versions on an equal machine at an equal number of threads give equal bits. Where they do not, this says which
of version, device, data or weights is another, and by how much the results differ.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from . import records
from .errors import KitError
from .experiment import Experiment
from .records import Run

logger = logging.getLogger(__name__)

OF_A_RUN = ("experiment.yaml", "training.json", "evaluation.json", "environment.json")
# Times and memory are no results, and where it was made is compared apart.
LEFT_OUT = ("timing", "seconds", "memory", "environment")


@dataclasses.dataclass(frozen=True)
class Difference:
    """One value that is another than the record's.

    Args:
        where: Its place, e.g. `metrics.validation.f1_macro.value`.
        recorded: What the record says.
        now: What it is now; None where there is none.
        by: The absolute difference of two numbers, the largest of a tensor's elements; None for anything else.
    """

    where: str
    recorded: Any
    now: Any
    by: float | None = None

    def __str__(self) -> str:
        return f"{self.where}: {_spoken(self.recorded)} -> {_spoken(self.now)}"


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the results, compared value by value.

    Args:
        name: What it is, e.g. `training.json, losses`.
        values: How many values the record has in it.
        differences: Those that are not the same to the last bit.
    """

    name: str
    values: int
    differences: tuple[Difference, ...]

    def __str__(self) -> str:
        if not self.differences:
            return f"{self.name}: the same to the last bit ({self.values:,} values)"
        worst = max(self.differences, key=lambda found: -1 if found.by is None else found.by)
        most = f", by {worst.by:.3g} at most" if worst.by is not None else ""
        values = "" if worst.recorded is None and worst.now is None else f": {worst}"
        return f"{self.name}: {len(self.differences):,} of {self.values:,} values differ{most}{values}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A record beside what running it again gave.

    Args:
        run: The new run's folder.
        made_with: Differences in device, threads, versions, commit and checksums.
        results: The results, by section.
    """

    run: Path
    made_with: tuple[Difference, ...]
    results: tuple[Section, ...]

    @property
    def same(self) -> bool:
        """Whether every result is the same to the last bit."""
        return not any(section.differences for section in self.results)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it, with `same` beside the fields."""
        plain: dict[str, Any] = records.plain(self)
        return {**plain, "same": self.same}

    def __str__(self) -> str:
        lines = [f"run again as {self.run}", "made with:"]
        lines += [f"  {found}" for found in self.made_with] or ["  the same device, threads, versions, commit, data"]
        lines += ["results, times and memory aside:", *(f"  {section}" for section in self.results)]
        return "\n".join([*lines, "the same results" if self.same else "different results"])


@dataclasses.dataclass(frozen=True)
class _Record:
    """What a record says: the experiment, what came of it by file, and the run folder where there is one."""

    experiment: Experiment
    results: dict[str, dict[str, Any]]  # by the file of a run folder that holds the same
    environment: Mapping[str, Any]
    run: Run | None


def run_again(record: str | Path, out: str | Path = "runs/reruns", *, progress: bool = True) -> Comparison:
    """Run a record's experiment again, into another folder, and compare.

    The rows are those kept in the run folder, where it has any; else what the experiment names. The number of threads
    is the recorded one. Nothing is logged outside the folder, whatever the record's tracking says.

    Args:
        record: A finished run's folder or one of its files (`training.json`, `experiment.yaml`, ...), or the record of
            a notebook that trained or tested (`02_finetune.json`, `03_evaluate.json`).
        out: Folder that the new run's folder is made in. A rerun that was cut off there goes on; a finished one is
            moved aside.
        progress: Show progress bars.

    Returns:
        The comparison.

    Raises:
        KitError: The record is none, holds no results, or stands in the place where the new run would go.
    """
    old = _read(Path(record))
    # What is private to whoever made the record (their W&B project) is none of the results.
    experiment = old.experiment.override({"tracking.wandb": "none"})
    target = Path(out) / f"{experiment.name}_seed{experiment.training.seed}"
    if old.run is not None and target.resolve() == old.run.path.resolve():
        raise KitError(f"{target} is the record itself: name another folder for the new run")
    if (target / "training.json").is_file():
        logger.warning("%s holds an earlier rerun; it is now %s.", target, records.move_aside(target))

    import torch

    from . import data as kit_data
    from .evaluation import RESAMPLES, evaluate
    from .training import finetune

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(_threads(old.environment) or threads)
        saved = old.run.path / "data" if old.run is not None else None
        rows = kit_data.load_saved(saved) if saved is not None and saved.is_dir() else None
        run = finetune(experiment, data=rows, out=out, progress=progress)
        now = {"training.json": run.training}
        tested = old.results.get("evaluation.json")
        if tested is not None:
            torch.set_num_threads(_threads(tested.get("environment")) or torch.get_num_threads())
            now["evaluation.json"] = evaluate(
                run,
                baselines=bool(tested["metrics"].get("baselines")),
                resamples=tested.get("resamples", RESAMPLES),
                progress=progress,
            )
    finally:
        torch.set_num_threads(threads)
    sections = [section for file, recorded in old.results.items() for section in _sections(file, recorded, now[file])]
    if old.run is not None:
        sections.append(_weights(old.run, run))
    return Comparison(run.path, tuple(_made_with(old.environment, run.environment)), tuple(sections))


# --- reading ----------------------------------------------------------------------------------------------------


def _read(path: Path) -> _Record:
    if path.name in OF_A_RUN and path.is_file():
        path = path.parent
    if path.is_file():
        return _of_notebook(path)
    run = records.load_run(path)
    results = {"training.json": run.training}
    if run.evaluation is not None:
        results["evaluation.json"] = run.evaluation
    for file, content in results.items():
        if not _mapping(_mapping(content).get("metrics")):
            raise KitError(f"{path / file} holds no metrics: it is no record of this kit")
    return _Record(run.experiment, results, _mapping(run.environment), run)


def _of_notebook(path: Path) -> _Record:
    content = records.read_json(path) if path.suffix == ".json" else None
    if not isinstance(content, dict) or not all(_mapping(content.get(part)) for part in ("experiment", "metrics")):
        raise KitError(
            f"{path} is no record of a training. Allowed: a run folder, one of {', '.join(OF_A_RUN)} in it, or a "
            "notebook's 02_finetune.json or 03_evaluate.json"
        )
    experiment = Experiment.from_dict(content["experiment"], where=str(path))
    if experiment.data.name == "memory":
        raise KitError(f"{path}: its rows are kept in the run folder alone ({content.get('run')}): name that folder")
    environment, metrics = _mapping(content.get("environment")), _mapping(content["metrics"])
    results = {"training.json": {"parameters": _mapping(content.get("parameters"))}}
    if "test" in metrics:
        # How often the rows were drawn for the intervals does not stand in it.
        results["evaluation.json"] = {"metrics": _without_intervals(metrics), "environment": environment}
    else:
        results["training.json"]["metrics"] = metrics
    return _Record(experiment, results, environment, None)


def _without_intervals(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_intervals(item) for key, item in value.items() if key not in ("low", "high")}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _threads(environment: Any) -> int | None:
    threads = _mapping(environment).get("threads")
    return threads if isinstance(threads, int) and threads > 0 else None


# --- comparing --------------------------------------------------------------------------------------------------


def _made_with(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    for name in ("device", "cpu", "threads", "commit"):
        yield from _differing([(name, recorded.get(name), now.get(name))])
    for name in ("versions", "checksums"):
        before, after = _mapping(recorded.get(name)), _mapping(now.get(name))
        word = {"data": "data (SHA-256)", "base": "base weights (SHA-256)"}
        yield from _differing((word.get(key, key), before.get(key), after.get(key)) for key in {**before, **after})


def _sections(file: str, recorded: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Section]:
    """Compare a file part by part; its single values make one part."""
    whole = {part: value for part, value in recorded.items() if part not in LEFT_OUT}
    parts = {part: value for part, value in whole.items() if isinstance(value, (dict, list))}
    single = {part: value for part, value in whole.items() if part not in parts}
    for name, value, found in (
        *((f"{file}, {part}", value, now.get(part)) for part, value in parts.items()),
        *([(f"{file}, single values", single, now)] if single else []),
    ):
        values = list(_leaves("", value, found))
        yield Section(name, len(values), tuple(_differing(values)))


def _differing(values: Iterable[tuple[str, Any, Any]]) -> Iterator[Difference]:
    for where, recorded, now in values:
        if recorded != now:
            numbers = all(isinstance(value, (int, float)) for value in (recorded, now))
            yield Difference(where, recorded, now, float(abs(recorded - now)) if numbers else None)


def _leaves(where: str, recorded: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield each value of the record and the one in its place now; what only the new one has is no difference."""
    if isinstance(recorded, Mapping):
        for key, value in recorded.items():
            if key not in LEFT_OUT:
                found = now.get(key) if isinstance(now, Mapping) else None
                yield from _leaves(f"{where}.{key}" if where else str(key), value, found)
    elif isinstance(recorded, list):
        others = now if isinstance(now, list) else []
        if len(recorded) != len(others):
            yield f"{where or 'list'}, length", len(recorded), len(others)
        for place, (value, found) in enumerate(zip(recorded, others, strict=False)):
            yield from _leaves(f"{where}[{place}]", value, found)
    else:
        yield where or "value", recorded, now


def _weights(old: Run, new: Run) -> Section:
    """Compare the trained weights, tensor by tensor."""
    import torch
    from safetensors.torch import load_file

    def read(run: Run) -> dict[str, torch.Tensor]:
        files = sorted((run.path / "adapter").glob("*.safetensors"))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    before, after = read(old), read(new)
    differences = []
    for name in sorted({**before, **after}):
        one, other = before.get(name), after.get(name)
        if one is None or other is None or one.shape != other.shape:
            shapes = [None if tensor is None else list(tensor.shape) for tensor in (one, other)]
            differences.append(Difference(f"{name}, shape", shapes[0], shapes[1]))
        elif not torch.equal(one, other):
            differences.append(Difference(name, None, None, float((one.double() - other.double()).abs().max())))
    return Section("weights, by tensor", len(before), tuple(differences))


def _spoken(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.7g}"
    text = str(value)
    return text if len(text) <= 64 else f"{text[:12]}…"
