"""Test a run: metrics with intervals, its errors, its calibration, and the baselines.

A score on a few thousand rows is an estimate: with 3,080 rows an accuracy of 0.93 has a standard error of 0.0045. So
every metric has a 95% interval, and classifiers are compared on the same resampled rows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.sections import DataSpec
from ..data.loading import load
from ..data.rows import load_saved
from ..errors import KitError
from ..metrics.confusions import calibration, confusions
from ..metrics.differences import paired_difference
from ..metrics.inputs import as_predictions
from ..metrics.resampling import RESAMPLES
from ..metrics.scores import confusion_matrix, metrics, per_label
from ..metrics.verdict import Report
from ..runs import card as cards
from ..runs.predictor import Predictor
from ..system.arguments import COUNT, DATA, FLAG, RUN_OR_FOLDER, takes
from ..system.environment import environment as describe_environment
from ..system.files import plain, write_json, write_text
from ..system.parsing import SCHEMA
from .baselines import baselines_of

if TYPE_CHECKING:
    from ..data.rows import TextData

logger = logging.getLogger(__name__)


def data_of(run: Predictor, data: TextData | None = None) -> TextData:
    """Return the rows that a run was trained on: those in its folder, or those that its experiment names.

    Args:
        run: A run.
        data: The data, if it is already loaded; it is still checked.

    Raises:
        KitError: When the rows are not what the run was trained on.
    """
    trained_on = run.environment["checksums"]["data"]
    if data is None:
        saved = run.path / "data"
        data = load_saved(saved) if saved.is_dir() else load(run.experiment.data)
    else:
        _refuse_other_length(run, data.spec)
    if data.checksum != trained_on:
        raise KitError(
            f"{run.path} was trained on other rows than {data.spec.name!r} now gives (checksum {trained_on[:12]}… "
            f"against {data.checksum[:12]}…): a score on these would mean nothing. Bring the data back as it was, "
            "or train again"
        )
    if list(data.label_names) != run.label_names:
        raise KitError(f"{run.path} has other labels than {data.spec.name!r}, or in another order: train again")
    return data


def _refuse_other_length(run: Predictor, asked: DataSpec) -> None:
    """Refuse data whose settings of text length differ from those that the run was trained with."""
    trained, usual = run.experiment.data, DataSpec()
    for name in ("max_length", "too_long"):
        if getattr(asked, name) not in (getattr(usual, name), getattr(trained, name)):
            raise KitError(
                f"data.{name} is {getattr(asked, name)!r} in the data that was handed over, and {run.path} was trained "
                f"with {getattr(trained, name)!r}, which holds for its predictions too: leave it out"
            )


@takes(run=RUN_OR_FOLDER, data=DATA, resamples=COUNT, batch_size=COUNT, progress=FLAG)
def evaluate(
    run: Predictor | str | Path,
    *,
    baselines: bool | Mapping[str, Mapping[str, Any]] = True,
    data: TextData | None = None,
    resamples: int = RESAMPLES,
    batch_size: int | None = None,
    progress: bool = True,
) -> Report:
    """Test a finished run from its folder alone, write its `evaluation.json`, and bring its card up to date.

    A card, `README.md`, that somebody has changed is left as it is: `Run.write_card` replaces it. If W&B tracked the
    training, the test is logged in the same W&B run (see `tracking.log_test`).

    Args:
        run: A run or its folder.
        baselines: True fits the baselines on the same rows; False leaves them out; a result of `baselines` for another
            run on the same data and base is used as it is.
        data: The data, if it is already loaded; it must be the rows that the run was trained on.
        resamples: Number of resamples for the intervals.
        batch_size: Texts per forward pass; None for as many as `Run.evaluation_rows` says.
        progress: Show progress bars.

    Returns:
        The content of `evaluation.json`, as a dict that shows itself in a few lines; its `verdict` is one sentence.
        Keys: `resamples`, `random_weights`, `metrics` (`test`, `validation`, `baselines` and, only if test texts were
        trained on, `test_without_leaked`, which is None where no text is left), `labels`, `per_label`, `confusions`,
        `confusion_matrix` (true by predicted), `calibration`, `predictions` (test classes of the run and of the
        baselines), `data`, `timing` in seconds, `environment`.

    Raises:
        KitError: When the folder holds no finished run, the data is not what the run was trained on, or the note on the
            W&B run is damaged.
    """
    from .. import tracking

    start = time.perf_counter()
    if not isinstance(run, Predictor):
        run = Predictor(run)
    tracking.read_note(run)  # refuses a damaged note before any work
    data = data_of(run, data)
    run.load()  # now, so that the timing below does not include reading weights
    batch_size = run.evaluation_rows if batch_size is None else batch_size
    predict_start = time.perf_counter()
    test = run.predict(data.test.texts, batch_size=batch_size, progress="test" if progress else None).logits
    predict_seconds = time.perf_counter() - predict_start
    validation = run.predict(
        data.validation.texts, batch_size=batch_size, progress="validation" if progress else None
    ).logits
    scores = _scores(test, validation, data, resamples)
    if baselines is True:
        baselines = baselines_of(run, data, resamples, batch_size, progress)
    found: Mapping[str, Mapping[str, Any]] = baselines or {}
    scores["baselines"] = {name: _beside(row, test, data, resamples) for name, row in found.items()}
    result = plain(
        {
            "schema": SCHEMA,
            "preset": run.experiment.name,
            "resamples": resamples,
            "random_weights": run.experiment.model.random_weights,
            "metrics": scores,
            **_errors(test, data),
            "predictions": {
                "test": as_predictions(test).tolist(),
                **{name: list(row["predictions"]) for name, row in found.items()},
            },
            "data": _about(data),
            "timing": {
                "predict_seconds": predict_seconds,
                "samples_per_second": len(data.test) / predict_seconds,
                "total_seconds": time.perf_counter() - start,
            },
            "environment": _environment(run, data),
        }
    )
    _write(run, result)
    tracking.log_test(run, data.test.labels, result)
    report = Report(result)
    logger.info("%s", report.verdict)
    return report


def _write(run: Predictor, result: Mapping[str, Any]) -> None:
    """Write `evaluation.json`, and the card with its scores unless somebody has changed the card."""
    untouched = cards.is_as_written(run)
    write_json(run.path / "evaluation.json", result)
    if untouched:
        write_text(run.path / "README.md", cards.of_run(run))
    else:
        logger.warning(
            "%s was changed by hand or written by another version of the kit, so it is left as it is, without the "
            "test's scores. Run.write_card() writes it again.",
            run.path / "README.md",
        )


def _scores(test: np.ndarray, validation: np.ndarray, data: TextData, resamples: int) -> dict[str, Any]:
    """Return the scores of a run's logits `[rows, classes]` on both splits, and on test rows that did not leak."""
    truth = np.asarray(data.test.labels)
    scores: dict[str, Any] = {
        "test": metrics(test, truth, resamples=resamples),
        "validation": metrics(validation, data.validation.labels, resamples=resamples),
    }
    if data.leaked_test_indices:  # where nothing leaked, it would be the score of the test again
        clean = np.setdiff1d(np.arange(len(data.test)), data.leaked_test_indices)
        # None says that all test rows leaked; a missing key says that none did.
        scores["test_without_leaked"] = metrics(test[clean], truth[clean], resamples=resamples) if len(clean) else None
    return scores


def _beside(row: Mapping[str, Any], test: np.ndarray, data: TextData, resamples: int) -> dict[str, Any]:
    """Return a baseline's scores, and how far the run is ahead of it on the same test rows."""
    kept = {key: value for key, value in row.items() if key != "predictions"}
    kept["ahead"] = {
        key: paired_difference(test, np.asarray(row["predictions"]), data.test.labels, key, resamples=resamples)
        for key in ("accuracy", "f1_macro")
    }
    return kept


def _environment(run: Predictor, data: TextData) -> dict[str, Any]:
    """Return the report's section on the machine and on what was tested."""
    return describe_environment(
        next(run.load()[0].parameters()).device,
        data_checksum=data.checksum,
        base_checksum=run.environment["checksums"].get("base"),
    )


def _about(data: TextData) -> dict[str, Any]:
    """Return the report's section on the data."""
    return {
        "name": data.spec.name,
        "rows": {key: len(split) for key, split in data.splits().items()},
        "leaked_test_indices": list(data.leaked_test_indices),
        "checksum": data.checksum,
    }


def _errors(test: np.ndarray, data: TextData) -> dict[str, Any]:
    """Return scores by label, confusions and calibration from a run's test logits `[rows, classes]`."""
    names, truth = data.label_names, np.asarray(data.test.labels)
    return {
        "labels": list(names),
        "per_label": per_label(test, truth, names),
        "confusions": confusions(test, truth, names, data.test.texts),
        "confusion_matrix": confusion_matrix(test, truth, len(names)),
        "calibration": calibration(test, truth),
    }
