"""Prove an export: the labels of its own file beside the run's, row by row, and what one text and many take."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import KitError

if TYPE_CHECKING:
    from ...runs.predictor import Predictions

# Texts that are timed one by one, and batches of `AT_ONCE` texts that are timed.
SINGLE, BATCHES, AT_ONCE = 200, 8, 64


def opened(folder: Path) -> Any:
    """Return the classifier that a folder's own classifier.py makes, before it has read anything.

    Args:
        folder: What `export` writes.
    """
    spec = importlib.util.spec_from_file_location(f"classifier_of_{abs(hash(folder))}", folder / "classifier.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TextClassifier(folder)


def proof(folder: Path, texts: Sequence[str], expected: Predictions) -> dict[str, Any]:
    """Compare a folder's classifier with its run, and time it.

    Args:
        folder: What `export` writes.
        texts: Texts, at least one.
        expected: The run's predictions for them.

    Returns:
        `rows`; `equal_rows`, which get the run's label, together with others and, for those that are timed, alone;
        `largest_difference` of a probability, 0 to 1; `start_seconds` to open the files; `latency_seconds_p50` and
        `latency_seconds_p95` of one text, tokenizer included, warm; `samples_per_second`, 64 texts at once; `bytes` of
        the folder's files.

    Raises:
        KitError: When ONNX Runtime does not run the file.
    """
    classifier = opened(folder)
    some = np.unique(np.linspace(0, len(texts) - 1, min(SINGLE, len(texts))).astype(int))
    many = [[texts[(start + place) % len(texts)] for place in range(AT_ONCE)] for start in range(0, BATCHES * 64, 64)]
    try:
        start_seconds = _seconds(classifier.open)[0]
        labels = classifier.predict(texts)
        probabilities = classifier.predict_proba(texts)
        alone = [_seconds(classifier.predict, [texts[place]]) for place in some]
        batches = [_seconds(classifier.predict, batch)[0] for batch in many]
    except Exception as error:  # ONNX Runtime's own errors have no common class
        first = " ".join(str(error).split())[:200]
        raise KitError(f"ONNX Runtime does not run what was written ({type(error).__name__}: {first})") from error
    wanted = np.array([expected.label_names[place] for place in expected.label_ids], dtype=object)
    equal = labels == wanted
    for place, (_, (label,)) in zip(some, alone, strict=True):
        equal[place] &= label == wanted[place]
    columns = [expected.label_names.index(name) for name in classifier.classes_]
    seconds = [second for second, _ in alone]
    return {
        "rows": len(texts),
        "equal_rows": int(equal.sum()),
        "largest_difference": float(np.abs(probabilities - expected.probabilities[:, columns]).max()),
        "start_seconds": start_seconds,
        "latency_seconds_p50": float(np.percentile(seconds, 50)),
        "latency_seconds_p95": float(np.percentile(seconds, 95)),
        "samples_per_second": AT_ONCE / float(np.median(batches)),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
    }


def _seconds(call: Any, *arguments: Any) -> tuple[float, Any]:
    """Return the seconds that a call takes, and what it returns."""
    began = time.perf_counter()
    result = call(*arguments)
    return time.perf_counter() - began, result
