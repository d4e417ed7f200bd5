"""A text classifier that ONNX Runtime runs: this file, model.onnx and the other files of its folder are all of it.

    from classifier import TextClassifier

    classify = TextClassifier()
    print(classify.predict(["My card has not arrived"]), classify.predict_proba(["My card has not arrived"]))

It needs the packages onnxruntime, tokenizers and numpy. Where scikit-learn is installed, `TextClassifier` is one of its
estimators, for a `Pipeline` and whatever else takes one.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import tokenizers

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
except ImportError:  # it predicts without it as well

    class BaseEstimator:  # type: ignore[no-redef]
        """Stands in for scikit-learn's class."""

    class ClassifierMixin:  # type: ignore[no-redef]
        """Stands in for scikit-learn's class."""


class TextClassifier(ClassifierMixin, BaseEstimator):
    """A trained classifier of texts. The files are read at the first prediction.

    Args:
        folder: The folder with model.onnx, tokenizer.json, labels.json and settings.json; None for this file's own.
        threads: Threads of a prediction; None for as many as this process has cores.
        batch_size: Most texts that are computed at once. Texts of like length go together. Small batches are fastest on
            a CPU, since fewer places are padded. Weights in int8 take one text at a time, whatever is said here: else
            a text's label would depend on the texts beside it.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, threads: int | None = None, batch_size: int = 8
    ) -> None:
        self.folder = folder
        self.threads = threads
        self.batch_size = batch_size

    def open(self) -> TextClassifier:
        """Read the files now rather than at the first prediction, once; return the classifier."""
        if "_session" in self.__dict__:
            return self
        folder = Path(__file__).resolve().parent if self.folder is None else Path(self.folder)
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(settings["max_length"], direction=settings["truncation_side"])
        options = onnxruntime.SessionOptions()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        options.intra_op_num_threads = self.threads or cores or 1
        # A thread without work would turn in a circle, and take the core from whatever else the machine does.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        # scikit-learn wants classes in sorted order; the model has its own.
        self._order = np.array(sorted(range(len(labels)), key=labels.__getitem__))
        self._labels = np.array([*labels, None], dtype=object)[:-1]
        self._settings, self._tokenizer, self._session = settings, tokenizer, session
        return self

    @property
    def classes_(self) -> np.ndarray:
        """The labels in sorted order, which is that of `predict_proba`'s columns: texts, `[classes]`."""
        opened = self.open()
        return opened._labels[opened._order]

    def predict(self, X: Iterable[str]) -> np.ndarray:
        """Return each text's most probable label.

        Args:
            X: Texts: a list, a pandas Series, a NumPy array of one dimension.

        Returns:
            Texts, `[texts]`.

        Raises:
            ValueError: For what is no list of texts, a text without a visible character or token, a text that is no
                valid Unicode, and a longer text than allowed if the model refuses those (it cuts them otherwise).
        """
        logits = self._run(X)[0]
        return self._labels[logits.argmax(axis=1)]

    def predict_proba(self, X: Iterable[str]) -> np.ndarray:
        """Return the probability of each class, float32 `[texts, classes]`, the columns in the order of `classes_`.

        Args:
            X: As `predict` takes it.

        Raises:
            ValueError: As `predict`.
        """
        return self._run(X)[1][:, self._order]

    def fit(self, X: Any, y: Any = None) -> TextClassifier:
        """Refuse: it is trained.

        Raises:
            NotImplementedError: Always. scikit-learn's `FrozenEstimator` keeps others from calling this.
        """
        raise NotImplementedError(
            "this classifier is trained and cannot be trained here; where something calls fit, hand over "
            "sklearn.frozen.FrozenEstimator(classifier)"
        )

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __getstate__(self) -> dict[str, Any]:
        # What is opened cannot be pickled; it is opened again.
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)

    def _run(self, given: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return logits and probabilities, float32 `[texts, classes]`, in the order of the texts and of the labels."""
        self.open()
        ids = self._ids(_texts(given))
        logits, probabilities = np.zeros((2, len(ids), len(self._labels)), np.float32)
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        size = 1 if self._settings["one_at_a_time"] else self.batch_size
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            fed = self._padded([ids[row] for row in rows])
            logits[rows], probabilities[rows] = self._session.run(["logits", "probabilities"], fed)
        return logits, probabilities

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the texts' token ids, cut to the most that are allowed."""
        encoded = self._tokenizer.encode_batch(texts) if len(texts) > 1 else [*map(self._tokenizer.encode, texts)]
        for place, one in enumerate(encoded):
            if not one.ids:
                raise ValueError(f"text {place} ({texts[place]!r:.60}) has no token that this tokenizer knows")
            if one.overflowing and self._settings["too_long"] == "refuse":
                raise ValueError(
                    f"text {place} ({texts[place]!r:.60}) has more than {self._settings['max_length']} tokens"
                )
        return [one.ids for one in encoded]

    def _padded(self, ids: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        width = max(map(len, ids))
        tokens = np.full((len(ids), width), self._settings["pad_token_id"], np.int64)
        mask = np.zeros((len(ids), width), np.int64)
        for row, one in enumerate(ids):
            left = width - len(one) if self._settings["padding_side"] == "left" else 0
            tokens[row, left : left + len(one)] = one
            mask[row, left : left + len(one)] = 1
        return {"input_ids": tokens, "attention_mask": mask}


def _texts(given: Any) -> list[str]:
    """Return texts as a list, or refuse what is none."""
    if isinstance(given, (str, bytes, Mapping, set, frozenset)) or not isinstance(given, Iterable):
        raise ValueError(f"a list of texts is needed, as in predict(['a text']), not a {type(given).__name__}")
    if getattr(given, "ndim", 1) != 1:
        raise ValueError("one column of texts is needed, as in predict(table['text'])")
    texts = list(given)
    for place, text in enumerate(texts):
        # Category Z are spaces, C what has no form: control characters, marks of width zero, half of a character.
        if not isinstance(text, str) or all(unicodedata.category(letter)[0] in "CZ" for letter in text):
            raise ValueError(f"text {place} is {text!r:.60}: allowed are texts with at least one visible character")
        if any(unicodedata.category(letter) == "Cs" for letter in text):
            raise ValueError(
                f"text {place} ({ascii(text)[:60]}) is no valid Unicode: it was read with a wrong encoding"
            )
    return [str(text) for text in texts]
