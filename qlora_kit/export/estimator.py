"""A finished run as a classifier of scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin

from ..errors import KitError, unknown
from ..runs.predictor import Predictor
from ..system.arguments import COUNT, RUN_OR_FOLDER, takes


class RunClassifier(ClassifierMixin, BaseEstimator):
    """A finished run as a classifier of scikit-learn: texts in, labels or probabilities out.

    It fits in at the end of a `Pipeline`, in a `VotingClassifier`, and in a `CalibratedClassifierCV` around a
    `FrozenEstimator`. It is trained already: `fit` trains nothing. So do not cross-validate it, whose rows it may have
    been trained on; score it on other rows.

    A pickle of it holds the run folder's path alone, and no weights: take the folder with it.

    Args:
        run: A finished run, or its folder. The folder is opened, and its model is loaded, at the first use.
        batch_size: Texts per forward pass; None takes the run's.

    Raises:
        KitError: When `run` is neither, at the first use when the folder holds no finished run.
    """

    @takes(run=RUN_OR_FOLDER, batch_size=COUNT)
    def __init__(self, run: Predictor | str | Path, batch_size: int | None = None) -> None:
        self._opened = run if isinstance(run, Predictor) else None
        # scikit-learn copies an estimator by its arguments, and a copy of a model would take its memory again.
        self.run = str(run.path) if isinstance(run, Predictor) else str(run)
        self.batch_size = batch_size

    @property
    def classes_(self) -> np.ndarray:
        """The labels in the order of `predict_proba`'s columns, which is the alphabet's: texts, `[classes]`."""
        return np.unique(np.array(self._predictor().label_names))

    def fit(self, X: Any, y: Any = None, **more: Any) -> RunClassifier:
        """Check that the labels are the run's; train nothing.

        Args:
            X: Texts; not looked at.
            y: Their labels, or None.
            **more: No effect, such as `sample_weight`.

        Returns:
            The classifier itself.

        Raises:
            KitError: When a label is none of the run's.
        """
        if y is not None:
            self._labels(y)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Classify texts.

        Args:
            X: A list, Series or array of texts `[rows]`, or a table or array of one column `[rows, 1]`.

        Returns:
            Labels, `[rows]`: those of `Run.predict`.

        Raises:
            KitError: When this holds no texts, as `Run.predict` says.
        """
        found = self._predictions(X)
        return np.array(self._predictor().label_names)[found.label_ids]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return probabilities, float64 `[rows, classes]`, with columns as in `classes_`; see `predict`."""
        probabilities: np.ndarray = self._predictions(X).probabilities[:, self._order()]
        return probabilities

    def decision_function(self, X: Any) -> np.ndarray:
        """Return logits, float64 `[rows, classes]`; with two classes `[rows]`, the second's minus the first's.

        Calibrators of scikit-learn start from these; see `predict`.
        """
        logits = self._predictions(X).logits.astype(np.float64)[:, self._order()]
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy on texts and their labels.

        Args:
            X: As `predict` takes it.
            y: Labels, `[rows]`.
            sample_weight: Weights of the rows, or None.

        Raises:
            KitError: As `predict`, and when a label is none of the run's.
        """
        return float(super().score(X, self._labels(y), sample_weight))

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.two_d_array = True, False
        tags.requires_fit = False
        return tags

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {**state, "_opened": None}

    def _predictor(self) -> Predictor:
        if self._opened is None:
            self._opened = Predictor(self.run)
        return self._opened

    def _order(self) -> np.ndarray:
        return np.argsort(np.array(self._predictor().label_names))

    def _predictions(self, X: Any) -> Any:
        return self._predictor().predict(_texts(X), batch_size=self.batch_size)

    def _labels(self, y: Any) -> np.ndarray:
        """Return labels as texts, refusing those that the run does not know."""
        labels = np.array([str(label) for label in np.asarray(y).reshape(-1)])
        known = self._predictor().label_names
        for label in dict.fromkeys(labels.tolist()):
            if label not in known:
                raise unknown("label of the run called", label, known)
        return labels


def _texts(X: Any) -> Any:
    """Return the only column of a table or of a two-dimensional array, and anything else as it is."""
    shape: Sequence[int] = getattr(X, "shape", ())
    if len(shape) != 2:
        return X
    if shape[1] != 1:
        raise KitError(f"texts are one column, and this has {shape[1]}: hand over the column, as table['text']")
    return np.asarray(X, dtype=object)[:, 0]
