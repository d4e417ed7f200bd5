"""Compare tested runs: their scores on the same test rows, the paired differences, the settings that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import KitError, either
from ..metrics.differences import paired_difference
from ..metrics.resampling import RESAMPLES
from ..metrics.verdict import unsure
from ..runs.predictor import Predictor
from ..system.arguments import COUNT, takes
from .report import data_of

COMPARED = ("accuracy", "f1_macro")


@takes(resamples=COUNT)
def compare_runs(runs: Sequence[Predictor | str | Path], *, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Compare two or more tested runs on the same test rows.

    Args:
        runs: Runs or their folders, each tested by `evaluate`.
        resamples: Number of resamples for the intervals of the differences.

    Returns:
        `rows` (number of test rows); `notes`: sentences on what makes the comparison unsure or empty (few test rows,
        random weights, runs that give every row the same label); `runs`: for each its folder `run`, `preset`, and
        `accuracy` and `f1_macro` with their 95% intervals; `differences`: for each run after the first, `run`, `minus`
        (the first one's folder), and the paired differences of `accuracy` and `f1_macro`; `settings`: by name, the
        values of each setting of the experiments that differs, in the order of the runs.

    Raises:
        KitError: For fewer than two runs or the same one twice, a run that is not tested, a damaged evaluation.json,
            and runs that were tested on other rows or labels than the first. Labels in another order are no other ones.
    """
    if isinstance(runs, str | Path | Predictor) or len(runs) < 2:
        raise KitError("compare_runs takes two or more runs: write compare_runs(['runs/ONE', 'runs/OTHER'])")
    opened = [run if isinstance(run, Predictor) else Predictor(run) for run in runs]
    seen: set[Path] = set()
    for run in opened:
        if run.path.resolve() in seen:
            raise KitError(f"{run.path} is given twice: a run is compared with others")
        seen.add(run.path.resolve())
    reports = [_report(run) for run in opened]
    first, guesses = opened[0], []
    for run, report in zip(opened, reports, strict=True):
        texts, labels, predictions = _on_test_rows(run, report, first)
        if run is first:
            truth, rows = labels, texts
        elif texts != rows or not np.array_equal(labels, truth):
            raise KitError(
                f"{run.path} was tested on other rows than {first.path}: their scores cannot be compared. Train and "
                "test both on the same data"
            )
        guesses.append(predictions)
    return {
        "rows": len(truth),
        "notes": _notes(opened, reports, guesses),
        "runs": [
            {
                "run": str(run.path),
                "preset": run.experiment.name,
                **{name: report["metrics"]["test"][name] for name in COMPARED},
            }
            for run, report in zip(opened, reports, strict=True)
        ],
        "differences": [
            {
                "run": str(run.path),
                "minus": str(first.path),
                **{name: paired_difference(guess, guesses[0], truth, name, resamples=resamples) for name in COMPARED},
            }
            for run, guess in zip(opened[1:], guesses[1:], strict=True)
        ],
        "settings": _differing(opened),
    }


def _notes(runs: Sequence[Predictor], reports: Sequence[Mapping[str, Any]], guesses: Sequence[np.ndarray]) -> list[str]:
    """Return what has to be known before a comparison is believed, in sentences without a full stop."""
    notes = [
        f"{run.path} has random weights: its scores mean nothing" for run in runs if run.training["random_weights"]
    ]
    few = [unsure(report["metrics"]["test"]["f1_macro"], len(guesses[0])) for report in reports]
    notes += [f"the scores are {max(few)}"] if any(few) else []
    for run, guess in zip(runs[1:], guesses[1:], strict=True):
        if np.array_equal(guess, guesses[0]):
            notes.append(f"{run.path} gives every test row the same label as {runs[0].path}")
    return notes


def _report(run: Predictor) -> Mapping[str, Any]:
    report = run.evaluation
    if report is None:
        how = either(f"evaluate({str(run.path)!r})", f"qlora-kit evaluate {run.path}")
        raise KitError(f"{run.path} is not tested yet: call {how} first")
    if "test" not in report.get("predictions", {}):
        raise KitError(f"{run.path / 'evaluation.json'} has no predictions of the test rows: call evaluate again")
    return report


def _on_test_rows(
    run: Predictor, report: Mapping[str, Any], first: Predictor
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Return a run's test texts, true and predicted classes `[rows]`, these as places in the first run's labels."""
    names = first.label_names
    if set(run.label_names) != set(names):
        other = sorted(set(run.label_names) ^ set(names))[0]
        raise KitError(f"{run.path} has other labels than {first.path}: only one of them has {other!r}")
    place = np.array([names.index(name) for name in run.label_names])
    test, guess = data_of(run).test, np.asarray(report["predictions"]["test"], dtype=np.int64)
    if len(guess) != len(test):
        raise KitError(f"{run.path / 'evaluation.json'} has {len(guess)} predictions for {len(test)} test rows")
    if guess.max() >= len(names):  # the schema refuses those below 0
        raise KitError(
            f"{run.path / 'evaluation.json'} predicts class {guess.max()}, and {len(names)} labels have the classes 0 "
            f"to {len(names) - 1}: call evaluate again"
        )
    return test.texts, place[np.asarray(test.labels)], place[guess]


def _differing(runs: Sequence[Predictor]) -> dict[str, list[Any]]:
    """Return the settings that differ, by name; those that do not change a result (name, tracking) are left out."""
    flat = [_flat(run.experiment.to_dict()) for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    found = {name: [settings.get(name) for settings in flat] for name in names}
    return {
        name: values
        for name, values in found.items()
        if any(value != values[0] for value in values) and name != "name" and not name.startswith("tracking.")
    }


def _flat(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{name}.")
        else:
            flat[f"{before}{name}"] = value
    return flat
