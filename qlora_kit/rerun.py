"""Run a record's experiment again, and report differences in the environment and in the results.

The same versions, machine and number of threads give the same bits. If bits differ, this says which of version, device,
data or weights changed, and by how much the results differ.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .config.experiment import Experiment
from .errors import KitError
from .run import Run, load_run
from .system import files as system_files
from .system.arguments import FLAG, FOLDER, RUN_FOLDER, takes
from .system.files import move_aside
from .system.parsing import read_json, refuse_newer

logger = logging.getLogger(__name__)

OF_A_RUN = ("experiment.yaml", "training.json", "evaluation.json", "environment.json")
# Times and memory are not results, and the environment is compared separately.
LEFT_OUT = ("timing", "seconds", "memory", "environment")


@dataclasses.dataclass(frozen=True)
class Difference:
    """One value that differs from the record's.

    Args:
        where: Its place, e.g. `metrics.validation.f1_macro.value`.
        recorded: What the record says.
        now: The new value; None if there is none.
        by: The absolute difference of two numbers, or the largest over a tensor's elements; None for anything else.
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
        name: Its name, e.g. `training.json, losses`.
        values: Number of values that the record has in it.
        differences: The values that are not the same to the last bit.
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
    """A record compared with its rerun.

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
        """Return the comparison as a dict for JSON, with `same` beside the fields."""
        plain: dict[str, Any] = system_files.plain(self)
        return {**plain, "same": self.same}

    def __str__(self) -> str:
        lines = [f"run again as {self.run}", "made with:"]
        lines += [f"  {found}" for found in self.made_with] or ["  the same device, threads, versions, commit, data"]
        lines += ["results, times and memory aside:", *(f"  {section}" for section in self.results)]
        return "\n".join([*lines, "the same results" if self.same else "different results"])


@dataclasses.dataclass(frozen=True)
class _Record:
    """A record's content: the experiment, its results by file, and the run folder if there is one."""

    experiment: Experiment
    results: dict[str, dict[str, Any]]  # by the name of the run folder's file that holds the same
    environment: Mapping[str, Any]
    run: Run | None


@takes(record=RUN_FOLDER, out=FOLDER, progress=FLAG)
def run_again(record: str | Path, out: str | Path = "runs/reruns", *, progress: bool = True) -> Comparison:
    """Run a record's experiment again, into another folder, and compare.

    The rows are those kept in the run folder, if it has any, else those that the experiment names. The number of
    threads is the recorded one. Nothing is logged outside the folder, even if the record was tracked.

    Args:
        record: A finished run's folder or one of its files (`training.json`, `experiment.yaml`, ...), or the record of
            a notebook that trained or tested (`02_finetune.json`, `03_evaluate.json`).
        out: Folder in which the new run's folder is made. An interrupted rerun there continues; a finished one is moved
            aside.
        progress: Show progress bars.

    Returns:
        The comparison.

    Raises:
        KitError: When `record` is no record or holds no results, or the new run would go into the same folder.
    """
    old = _read(Path(record))
    # No tracking: the project belongs to whoever made the record, and changes no result.
    experiment = old.experiment.override({"tracking.to": "none"})
    target = Path(out) / f"{experiment.name}_seed{experiment.training.seed}"
    if old.run is not None and target.resolve() == old.run.path.resolve():
        raise KitError(f"{target} is the record itself: name another folder for the new run")
    if (target / "training.json").is_file():
        logger.warning("%s holds an earlier rerun; it is now %s.", target, move_aside(target))

    import torch

    from .data.rows import load_saved
    from .evaluation.report import evaluate
    from .metrics.scores import RESAMPLES
    from .training.finetune import finetune

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(_threads(old.environment) or threads)
        saved = old.run.path / "data" if old.run is not None else None
        rows = load_saved(saved) if saved is not None and saved.is_dir() else None
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
    run = load_run(path)
    results = {"training.json": run.training}
    if run.evaluation is not None:
        results["evaluation.json"] = run.evaluation
    return _Record(run.experiment, results, _mapping(run.environment), run)


def _of_notebook(path: Path) -> _Record:
    content = read_json(path) if path.suffix == ".json" else None
    refuse_newer(content, path)
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
        # Leave intervals out: the record does not say how often the rows were drawn for them.
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
    words = {"data": "data (SHA-256)", "base": "base weights (SHA-256)", "base_config": "base configuration (SHA-256)"}
    for name in ("versions", "checksums"):
        before, after = _mapping(recorded.get(name)), _mapping(now.get(name))
        # A checksum that an older record lacks is no difference.
        keys = before if name == "checksums" else {**before, **after}
        yield from _differing((words.get(key, key), before.get(key), after.get(key)) for key in keys)


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
    """Yield each value of the record with the new one in its place; skip what only the new one has."""
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
