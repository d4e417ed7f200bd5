"""Test reports: metrics with intervals, where a classifier errs, how far to trust it, what it is up against.

A score on a few thousand rows is an estimate: with 3,080 rows an accuracy of 0.93 has a standard error of
0.0045. So every metric here has a 95% interval, and contenders are compared on the same resampled rows.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import evaluate as hf_evaluate
import numpy as np
import scipy.special
import sklearn.metrics

from . import data as kit_data
from . import records
from .errors import KitError, unknown

if TYPE_CHECKING:
    from .data import TextData
    from .records import Run

METRICS = ("accuracy", "f1_macro", "f1_weighted", "loss")
RESAMPLES = 2000
# Tried for each baseline; the one with the best macro F1 on validation is taken.
BASELINE_C = {"tfidf_svm": (0.1, 0.3, 1.0), "embedding_svm": (0.3, 1.0, 3.0)}
# What figures and tables call them, in the order in which they stand there.
BASELINE_NAMES = {"embedding_svm": "SVM on frozen states", "tfidf_svm": "SVM on TF-IDF"}

_DRAWN = 1_000_000  # row numbers drawn at a time, to bound memory


class KitMetrics(hf_evaluate.Metric):
    """Accuracy, macro and weighted F1 as one `evaluate.Metric`, computed by scikit-learn.

    `evaluate.load("f1")` fetches a script from the hub when it runs, and fails without one; this class is the
    same thing without a hub and without a cache file.
    """

    def __init__(self, **kwargs: Any) -> None:
        # Nothing is written, but the base class makes a folder all the same: not in a home that may be read-only.
        super().__init__(**{"keep_in_memory": True, "cache_dir": tempfile.gettempdir(), **kwargs})

    def _info(self) -> hf_evaluate.MetricInfo:
        return hf_evaluate.MetricInfo(
            description="Accuracy, macro F1 and weighted F1 of a single-label classification.",
            citation="Pedregosa et al.: Scikit-learn: Machine Learning in Python, JMLR 12, 2011",
            inputs_description="predictions and references: a class, as a whole number, each row",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        macro, weighted = (
            float(sklearn.metrics.f1_score(references, predictions, average=average, zero_division=0))
            for average in ("macro", "weighted")
        )
        accuracy = float(sklearn.metrics.accuracy_score(references, predictions))
        return {"accuracy": accuracy, "f1_macro": macro, "f1_weighted": weighted}


def compute_metrics(logits: np.ndarray, labels: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Score predictions, without intervals: what a Trainer wants after each epoch.

    Args:
        logits: `[rows, classes]`, or predicted classes `[rows]`.
        labels: True classes `[rows]`.

    Returns:
        `accuracy`, `f1_macro`, `f1_weighted`; F1 over the classes that occur among labels or predictions.
    """
    predictions, truth = _predictions(logits), _labels(labels)
    _same_length(predictions, truth)
    result = KitMetrics().compute(predictions=predictions, references=truth)
    assert result is not None  # None is for helper processes of a distributed metric
    return dict(result)


def metrics(
    logits: np.ndarray, labels: Sequence[int] | np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Score predictions, with 95% bootstrap intervals.

    Args:
        logits: `[rows, classes]`, or predicted classes `[rows]` (then there is no loss).
        labels: True classes `[rows]`.
        resamples: How often the rows are drawn anew, with replacement.
        seed: Seed of the drawing.

    Returns:
        `accuracy`, `f1_macro`, `f1_weighted` and `loss` (mean cross-entropy, nats), each `{"value", "low",
        "high"}`: the percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13). With
        only a few rows a class, resampled macro F1 tends to lie below the value, and so does its interval.
    """
    predictions, truth = _predictions(logits), _labels(labels)
    _same_length(predictions, truth)
    losses = cross_entropy(logits, truth) if np.ndim(logits) == 2 else None
    cells, cell_of_row = np.unique(np.stack([truth, predictions]), axis=1, return_inverse=True)
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in METRICS}
    for rows in _draws(len(truth), resamples, seed):
        scores = _scores(_counts(cell_of_row.ravel()[rows], cells.shape[1]), cells[0], cells[1])
        for name, drawn_scores in scores.items():
            drawn[name].append(drawn_scores)
        if losses is not None:
            drawn["loss"].append(losses[rows].mean(axis=1))
    once = np.bincount(cell_of_row.ravel(), minlength=cells.shape[1])[None]
    values = {name: float(v[0]) for name, v in _scores(once, cells[0], cells[1]).items()}
    if losses is not None:
        values["loss"] = float(losses.mean())
    return {name: _interval(value, np.concatenate(drawn[name])) for name, value in values.items()}


def paired_difference(
    a: Any,
    b: Any,
    labels: Sequence[int] | np.ndarray,
    metric: str = "f1_macro",
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, float]:
    """Compare two contenders on the same test rows: mean of `a` minus mean of `b`.

    Each resample draws rows once and scores every prediction on them, so what makes rows hard for both cancels
    out. Seeds are averaged over, not resampled: the interval is about other test rows, for these runs.

    Args:
        a: Predicted classes `[rows]` or logits `[rows, classes]`; or a list of such, one a seed.
        b: The same for the other contender; the number of seeds may differ.
        labels: True classes `[rows]`.
        metric: One of `METRICS`; `loss` needs logits.
        resamples: How often the rows are drawn.
        seed: Seed of the drawing.

    Returns:
        `{"value", "low", "high"}`: a 95% percentile interval. It excludes 0 where the test rows tell the
        contenders apart.

    Raises:
        KitError: For a metric that there is not, predictions of other rows than the labels', or a loss without logits.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    truth = _labels(labels)
    sides = [_contender(side) for side in (a, b)]
    for prediction in (p for side in sides for p in side):
        _same_length(prediction, truth)
    if metric == "loss":
        if any(np.ndim(p) != 2 for side in sides for p in side):
            raise KitError("a paired difference of the loss needs logits, not predicted classes")
        means = [np.mean([cross_entropy(p, truth) for p in side], axis=0) for side in sides]
        gap = means[0] - means[1]
        drawn = np.concatenate([gap[rows].mean(axis=1) for rows in _draws(len(truth), resamples, seed)])
        return _interval(float(gap.mean()), drawn)
    guesses = [[_predictions(p) for p in side] for side in sides]
    stack = np.stack([truth, *guesses[0], *guesses[1]])
    # Rows on which all contenders agree in the same way are one cell; a few hundred cells stand for all rows.
    cells, cell_of_row = np.unique(stack, axis=1, return_inverse=True)
    cell_of_row = cell_of_row.ravel()
    sizes = [len(side) for side in guesses]

    def difference(counts: np.ndarray) -> np.ndarray:
        scores = [_scores(counts, cells[0], cells[1 + i])[metric] for i in range(sum(sizes))]
        gap: np.ndarray = np.mean(scores[: sizes[0]], axis=0) - np.mean(scores[sizes[0] :], axis=0)
        return gap

    drawn = np.concatenate(
        [difference(_counts(cell_of_row[rows], cells.shape[1])) for rows in _draws(len(truth), resamples, seed)]
    )
    value = float(difference(np.bincount(cell_of_row, minlength=cells.shape[1])[None])[0])
    return _interval(value, drawn)


def lead_in_words(difference: Mapping[str, float]) -> str:
    """Say what a difference of scores shows of its first contender against the other: higher is better.

    Args:
        difference: `value`, `low` and `high`, from `paired_difference` of any metric but the loss.

    Returns:
        `ahead`, `behind`, or, where the interval has 0 in it, `not told apart by these test rows`.
    """
    if difference["low"] > 0:
        return "ahead"
    return "behind" if difference["high"] < 0 else "not told apart by these test rows"


def cross_entropy(logits: np.ndarray, labels: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return each row's cross-entropy in nats, float64 `[rows]`, from logits `[rows, classes]`.

    Raises:
        KitError: For a label that has no logit.
    """
    scores, truth = _logits(logits), _labels(labels)
    if len(truth) and truth.max() >= scores.shape[1]:
        raise KitError(f"label {truth.max()} has no logit: there are {scores.shape[1]} classes")
    peak = scores.max(axis=1, keepdims=True)
    total = np.log(np.exp(scores - peak).sum(axis=1)) + peak[:, 0]
    losses: np.ndarray = total - scores[np.arange(len(truth)), truth]
    return losses


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the softmax of logits `[rows, classes]` in float64."""
    shares: np.ndarray = scipy.special.softmax(_logits(logits), axis=1)
    return shares


def per_label(logits: np.ndarray, labels: Sequence[int] | np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Score each label on its own.

    Args:
        logits: `[rows, classes]`, or predicted classes `[rows]`.
        labels: True classes `[rows]`.
        names: Label of each class.

    Returns:
        A row a label, in the order of `names`: `label`, `support` (test rows of it), `predicted` (rows taken
        for it), `precision`, `recall`, `f1` (0 where there is nothing to divide by).
    """
    predicted = confusion_matrix(logits, labels, len(names)).sum(axis=0)
    scores = sklearn.metrics.precision_recall_fscore_support(
        _labels(labels), _predictions(logits), labels=range(len(names)), zero_division=0
    )
    return [
        {
            "label": name,
            "support": int(support),
            "predicted": int(taken),
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
        }
        for name, taken, precision, recall, f1, support in zip(names, predicted, *scores, strict=True)
    ]


def confusion_matrix(logits: np.ndarray, labels: Sequence[int] | np.ndarray, classes: int) -> np.ndarray:
    """Count rows by true class (first axis) and predicted class (second): int64 `[classes, classes]`.

    Raises:
        KitError: For a class below 0 or beyond `classes`, or other rows than the labels'.
    """
    predictions, truth = _predictions(logits), _labels(labels)
    _same_length(predictions, truth)
    lowest, highest = min(truth.min(), predictions.min()), max(truth.max(), predictions.max())
    if lowest < 0 or highest >= classes:
        raise KitError(f"class {lowest if lowest < 0 else highest} has no name: there are {classes}")
    matrix: np.ndarray = sklearn.metrics.confusion_matrix(truth, predictions, labels=range(classes))
    return matrix


def confusions(
    logits: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    names: Sequence[str],
    texts: Sequence[str],
    most: int = 10,
    *,
    examples: int = 3,
) -> list[dict[str, Any]]:
    """List the labels that are most often taken for one another, with texts.

    Args:
        logits: `[rows, classes]`, or predicted classes `[rows]` (then examples have no confidence).
        labels: True classes `[rows]`.
        names: Label of each class.
        texts: The texts `[rows]`.
        most: How many pairs.
        examples: How many texts a pair; the ones the classifier was surest of.

    Returns:
        Rows `{"true", "predicted", "count", "share" (of the true label's rows), "examples": [{"text",
        "confidence"}]}`, the most frequent first.
    """
    predictions, truth = _predictions(logits), _labels(labels)
    matrix = confusion_matrix(logits, labels, len(names))
    support = matrix.sum(axis=1)
    sure = probabilities(logits).max(axis=1) if np.ndim(logits) == 2 else None
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix, axis=None, kind="stable")[:most]
    rows = []
    for place in order:
        true, guess = divmod(int(place), len(names))
        count = int(matrix[true, guess])
        if count == 0:
            break
        found = np.flatnonzero((truth == true) & (predictions == guess))
        if sure is not None:
            found = found[np.argsort(-sure[found], kind="stable")]
        rows.append(
            {
                "true": names[true],
                "predicted": names[guess],
                "count": count,
                "share": count / int(support[true]),
                "examples": [
                    {"text": texts[i], **({} if sure is None else {"confidence": float(sure[i])})}
                    for i in found[:examples]
                ],
            }
        )
    return rows


def calibration(logits: np.ndarray, labels: Sequence[int] | np.ndarray, bins: int = 10) -> dict[str, Any]:
    """Compare how sure a classifier is with how often it is right.

    Args:
        logits: `[rows, classes]`.
        labels: True classes `[rows]`.
        bins: Bins of equal width between 0 and 1.

    Returns:
        `ece`: the expected calibration error, the mean over rows of their bin's |accuracy - confidence| (Guo
        et al., On Calibration of Modern Neural Networks, arXiv 1706.04599, equation 3); `confidence`: the mean;
        `accuracy`; and `rows`: a bin each, `low`, `high`, `count`, `confidence`, `accuracy` (None where
        empty).
    """
    shares, truth = probabilities(logits), _labels(labels)
    _same_length(shares, truth)
    sure, right = shares.max(axis=1), shares.argmax(axis=1) == truth
    place = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)  # bins are (low, high], as in the paper
    rows, ece = [], 0.0
    for i in range(bins):
        inside = place == i
        count = int(inside.sum())
        confidence = float(sure[inside].mean()) if count else None
        accuracy = float(right[inside].mean()) if count else None
        if confidence is not None and accuracy is not None:
            ece += count / len(truth) * abs(accuracy - confidence)
        rows.append(
            {"low": i / bins, "high": (i + 1) / bins, "count": count, "confidence": confidence, "accuracy": accuracy}
        )
    return {"ece": ece, "confidence": float(sure.mean()), "accuracy": float(right.mean()), "rows": rows}


# ---- what a fine-tuned model has to beat ----


def baselines(
    data: TextData,
    embed: Callable[[list[str]], np.ndarray] | None = None,
    *,
    resamples: int = RESAMPLES,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Fit what takes seconds: linear SVMs on the same training rows as the fine-tuned model.

    Each one's C is chosen by macro F1 on validation among `BASELINE_C`; then the fit on the training rows with
    that C is tested (it is not fitted again with validation, which the fine-tuned model doesn't see either).

    Args:
        data: The data.
        embed: Gives the frozen base's states for texts, `[texts, hidden]`; without it there is no
            `embedding_svm`.
        resamples: For the intervals.
        progress: Show a progress bar.

    Returns:
        `tfidf_svm` (TF-IDF of words and word pairs, and of 2 to 5 characters within words) and
        `embedding_svm`: `accuracy`, `f1_macro`, `f1_weighted` with intervals on the test rows, `C`,
        `validation` (macro F1 by C), `train_rows`, `seconds` (fitting and choosing, embedding included) and
        `predictions`, the test rows' classes.
    """
    from tqdm.auto import tqdm

    kinds: dict[str, Callable[[], tuple[Any, Any, Any]]] = {"tfidf_svm": lambda: _tfidf(data)}
    if embed is not None:
        kinds["embedding_svm"] = lambda: _embedded(data, embed)
    total = sum(len(BASELINE_C[name]) for name in kinds)
    result: dict[str, dict[str, Any]] = {}
    with tqdm(total=total, desc="baselines", unit="fit", disable=not progress) as bar:
        for name, features in kinds.items():
            start = time.perf_counter()
            train, validation, test = features()
            best: Any = None
            scores: dict[str, float] = {}
            for c in BASELINE_C[name]:
                bar.set_postfix_str(f"{name}, C={c:g}")
                machine = _linear_svm(c).fit(train, data.train.labels)
                score = compute_metrics(machine.predict(validation), data.validation.labels)["f1_macro"]
                scores[f"{c:g}"] = score
                if best is None or score > best[0]:  # the smallest C among equals: the strongest regularization
                    best = (score, c, machine)
                bar.update()
            predictions = best[2].predict(test).astype(np.int64)
            result[name] = {
                **metrics(predictions, data.test.labels, resamples=resamples),
                "C": best[1],
                "validation": scores,
                "train_rows": len(data.train),
                "seconds": time.perf_counter() - start,
                "predictions": predictions.tolist(),
            }
    return result


def _tfidf(data: TextData) -> tuple[Any, Any, Any]:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_union

    union = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b", dtype=np.float64),
        TfidfVectorizer(ngram_range=(2, 5), sublinear_tf=True, analyzer="char_wb", dtype=np.float64),
    )
    train = union.fit_transform(data.train.texts)
    return train, union.transform(data.validation.texts), union.transform(data.test.texts)


def _embedded(data: TextData, embed: Callable[[list[str]], np.ndarray]) -> tuple[Any, Any, Any]:
    from sklearn.preprocessing import normalize

    splits = (data.train, data.validation, data.test)
    texts = [text for split in splits for text in split.texts]
    states = np.asarray(embed(texts), dtype=np.float64)
    if len(states) != len(texts):
        raise KitError(f"embed gave {len(states)} rows for {len(texts)} texts")
    states = normalize(states)
    ends = np.cumsum([len(split) for split in splits])
    train, validation, test, _ = np.split(states, ends)
    return train, validation, test


def _linear_svm(c: float) -> Any:
    from sklearn.svm import LinearSVC

    return LinearSVC(C=c, random_state=0)


# ---- a run's report ----


def data_of(run: Run, data: TextData | None = None) -> TextData:
    """Return the rows that a run was trained on: those in its folder, or those that its experiment names.

    Args:
        run: A run.
        data: The data, where it is at hand already; it is checked all the same.

    Raises:
        KitError: When the rows are not what the run was trained on.
    """
    trained_on = run.environment["checksums"]["data"]
    if data is None:
        saved = run.path / "data"
        data = kit_data.load_saved(saved) if saved.is_dir() else kit_data.load(run.experiment.data)
    if data.checksum != trained_on:
        raise KitError(
            f"{run.path} was trained on other rows than {data.spec.name!r} now gives (checksum {trained_on[:12]}… "
            f"against {data.checksum[:12]}…): a score on these would mean nothing. Bring the data back as it was, "
            "or train again"
        )
    return data


def evaluate(
    run: Run | str | Path,
    *,
    baselines: bool | Mapping[str, Mapping[str, Any]] = True,
    data: TextData | None = None,
    resamples: int = RESAMPLES,
    batch_size: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Test a finished run, from its folder alone, and write its `evaluation.json`.

    Where W&B has tracked the training, the test is logged in the same W&B run (see `tracking.log_test`).

    Args:
        run: A run or its folder.
        baselines: True fits the baselines on the same rows; False leaves them out; what `baselines` returned
            for another run on the same data and base is taken as it is.
        data: The data, where it is at hand already; it must be the rows that the run was trained on.
        resamples: For the intervals.
        batch_size: Texts a forward pass; None takes as many as evaluations during its training have here
            (`qlora_kit.training.evaluation_rows`).
        progress: Show progress bars.

    Returns:
        What is written: `resamples`, `metrics` (`test`, `test_without_leaked`, `validation`, `baselines`), `labels`,
        `per_label`, `confusions`, `confusion_matrix` (true by predicted), `calibration`, `predictions` (test
        classes of the run and of the baselines), `data`, `timing` in seconds, `environment`.

    Raises:
        KitError: The folder holds no finished run, or the data is not what the run was trained on; or, with all
            written, W&B does not let in who asked for `online`.
    """
    start = time.perf_counter()
    if not isinstance(run, records.Run):
        run = records.load_run(run)
    data = data_of(run, data)
    names = data.label_names
    run.load()  # so that the timing below is of predictions, not of reading weights
    batch_size = run.evaluation_rows if batch_size is None else batch_size
    predict_start = time.perf_counter()
    test = run.predict(data.test.texts, batch_size=batch_size, progress="test" if progress else None).logits
    predict_seconds = time.perf_counter() - predict_start
    validation = run.predict(
        data.validation.texts, batch_size=batch_size, progress="validation" if progress else None
    ).logits
    leaked = data.leaked_test_indices
    clean = np.setdiff1d(np.arange(len(data.test)), leaked)
    truth = np.asarray(data.test.labels)
    scores: dict[str, Any] = {
        "test": metrics(test, truth, resamples=resamples),
        "validation": metrics(validation, data.validation.labels, resamples=resamples),
    }
    if len(clean):
        scores["test_without_leaked"] = metrics(test[clean], truth[clean], resamples=resamples)
    predictions = {"test": _predictions(test).tolist()}
    if baselines is True:
        found: Mapping[str, Mapping[str, Any]] = _all_baselines(run, data, resamples, batch_size, progress)
    else:
        found = baselines or {}
    scores["baselines"] = {}
    for name, row in found.items():
        predictions[name] = list(row["predictions"])
        kept = {key: value for key, value in row.items() if key != "predictions"}
        # How far the run is ahead of it, on the same test rows.
        kept["ahead"] = {
            key: paired_difference(test, np.asarray(row["predictions"]), truth, key, resamples=resamples)
            for key in ("accuracy", "f1_macro")
        }
        scores["baselines"][name] = kept
    environment = run.environment
    result = records.plain(
        {
            "schema": records.SCHEMA,
            "preset": run.experiment.name,
            "resamples": resamples,
            "metrics": scores,
            "labels": list(names),
            "per_label": per_label(test, truth, names),
            "confusions": confusions(test, truth, names, data.test.texts),
            "confusion_matrix": confusion_matrix(test, truth, len(names)),
            "calibration": calibration(test, truth),
            "predictions": predictions,
            "data": {
                "name": data.spec.name,
                "rows": {key: len(split) for key, split in data.splits().items()},
                "leaked_test_indices": list(leaked),
                "checksum": data.checksum,
            },
            "timing": {
                "predict_seconds": predict_seconds,
                "samples_per_second": len(data.test) / predict_seconds,
                "total_seconds": time.perf_counter() - start,
            },
            "environment": records.environment(
                _device(run),
                data_checksum=data.checksum,
                base_checksum=environment["checksums"].get("base"),
            ),
        }
    )
    records.write_json(run.path / "evaluation.json", result)
    from . import tracking

    tracking.log_test(run, data.test.labels, result)
    return dict(result)


def _all_baselines(
    run: Run, data: TextData, resamples: int, batch_size: int, progress: bool
) -> dict[str, dict[str, Any]]:
    from . import models

    def embed(texts: list[str]) -> np.ndarray:
        return models.embed(run.experiment, texts, batch_size=batch_size, progress="embedding" if progress else None)

    return baselines(data, embed, resamples=resamples, progress=progress)


def _device(run: Run) -> Any:
    model, _ = run.load()
    return next(model.parameters()).device


# ---- small things ----


def _draws(rows: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield drawn row indices `[some, rows]`, `resamples` of them in all."""
    rng = np.random.default_rng(seed)
    some = max(1, _DRAWN // rows)
    for start in range(0, resamples, some):
        yield rng.integers(0, rows, size=(min(some, resamples - start), rows))


def _counts(cells: np.ndarray, n: int) -> np.ndarray:
    """Count cells in each resample: `[some, rows]` of cell numbers to `[some, n]`."""
    some = cells.shape[0]
    flat = (cells + n * np.arange(some)[:, None]).ravel()
    return np.bincount(flat, minlength=some * n).reshape(some, n)


def _scores(counts: np.ndarray, truth: np.ndarray, predictions: np.ndarray) -> dict[str, np.ndarray]:
    """Score many resamples at once.

    Args:
        counts: How often each cell was drawn, `[resamples, cells]`.
        truth: Each cell's true class.
        predictions: Each cell's predicted class.

    Returns:
        `accuracy`, `f1_macro`, `f1_weighted`, each `[resamples]`, as scikit-learn computes them: F1 is
        averaged over the classes that occur among the drawn labels or predictions.
    """
    classes = int(max(truth.max(), predictions.max())) + 1
    eye = np.eye(classes)
    weights = counts.astype(np.float64)
    right = truth == predictions
    hits = weights[:, right] @ eye[truth[right]]
    support, predicted = weights @ eye[truth], weights @ eye[predictions]
    both = support + predicted
    f1 = np.divide(2 * hits, both, out=np.zeros_like(both), where=both > 0)
    total = weights.sum(axis=1)
    return {
        "accuracy": hits.sum(axis=1) / total,
        "f1_macro": f1.sum(axis=1) / (both > 0).sum(axis=1),
        "f1_weighted": (f1 * support).sum(axis=1) / total,
    }


def _interval(value: float, drawn: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high)}


def _logits(logits: Any) -> np.ndarray:
    scores = np.asarray(logits, dtype=np.float64)
    if scores.ndim != 2:
        raise KitError(f"logits are [rows, classes], not of shape {list(scores.shape)}")
    if not np.isfinite(scores).all():
        row = int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
        raise KitError(f"the logits of row {row} are not finite: the model has diverged, or its weights are damaged")
    return scores


def _predictions(thing: Any) -> np.ndarray:
    """Return predicted classes from logits `[rows, classes]` or from classes `[rows]`."""
    array = np.asarray(thing)
    return _logits(array).argmax(axis=1) if array.ndim == 2 else array.astype(np.int64)


def _contender(side: Any) -> list[np.ndarray]:
    """Tell one prediction from a list of several: an array is one; a list of arrays or lists is several."""
    if isinstance(side, np.ndarray) or not np.ndim(side[0]):
        return [np.asarray(side)]
    return [np.asarray(one) for one in side]


def _labels(labels: Any) -> np.ndarray:
    truth = np.asarray(labels, dtype=np.int64)
    if truth.ndim != 1 or not len(truth):
        raise KitError(f"labels are one class a row and at least one row, not of shape {list(truth.shape)}")
    return truth


def _same_length(predictions: np.ndarray, truth: np.ndarray) -> None:
    if len(predictions) != len(truth):
        raise KitError(f"{len(predictions)} predictions for {len(truth)} labels")
