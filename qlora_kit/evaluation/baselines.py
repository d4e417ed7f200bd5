"""Fit the baselines that a model has to beat: linear SVMs on TF-IDF and on embeddings."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import KitError
from ..metrics.resampling import RESAMPLES
from ..metrics.scores import compute_metrics, metrics

if TYPE_CHECKING:
    from ..data.rows import TextData
    from ..runs.predictor import Predictor

# Values of C tried for each baseline; the one with the best macro F1 on validation is taken.
BASELINE_C = {"tfidf_svm": (0.1, 0.3, 1.0), "embedding_svm": (0.3, 1.0, 3.0)}


def baselines(
    data: TextData,
    embed: Callable[[list[str]], np.ndarray] | None = None,
    *,
    resamples: int = RESAMPLES,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Fit linear SVMs, in seconds, on the same training rows as the fine-tuned model.

    Each one's C is chosen from `BASELINE_C` by macro F1 on validation. The fit on the training rows with that C is then
    tested; it is not fitted again with the validation rows, which the fine-tuned model doesn't see either.

    Args:
        data: The data.
        embed: Returns the frozen base's states for texts, `[texts, hidden]`; without it there is no `embedding_svm`.
        resamples: Number of resamples for the intervals.
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
                if best is None or score > best[0]:  # on a tie keep the smallest C: the strongest regularization
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


def baselines_of(
    run: Predictor, data: TextData, resamples: int, batch_size: int, progress: bool
) -> dict[str, dict[str, Any]]:
    """Fit all baselines for a run, including the one on its frozen base's states; see `baselines`."""
    from ..models import forward

    def embed(texts: list[str]) -> np.ndarray:
        return forward.embed(run.experiment, texts, batch_size=batch_size, progress="embedding" if progress else None)

    return baselines(data, embed, resamples=resamples, progress=progress)
