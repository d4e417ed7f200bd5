"""A run that several requests share, and the training texts nearest to a text."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..errors import KitError
from ..evaluation.report import data_of
from ..models.forward import forward_texts
from ..models.precision import precision_of
from ..run import Run
from ..runs.predictor import Predictions
from ..system.devices import default_device

CHUNK = 64
"""Texts at a time where there are many: a question that comes meanwhile waits for one chunk."""
MOST_TRAINING_TEXTS = 20_000
"""The most training texts that a text is compared with; of more, as many are drawn."""


class SharedRun:
    """A loaded run; one forward pass at a time, whoever asks.

    Args:
        run: The run. Its model is loaded here.

    Raises:
        KitError: As `Predictor.load`.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._lock = threading.Lock()
        self._asking, self._asked = threading.Condition(), 0
        run.load()

    def predict(self, texts: Sequence[str], reject_below: float | None = None) -> Predictions:
        """Classify texts; see `Predictor.predict`.

        Args:
            texts: The texts.
            reject_below: The probability under which a label is not given.

        Raises:
            KitError: For a text that cannot be classified.
        """
        with self._lock:
            return self.run.predict(list(texts), reject_below=reject_below)

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Go before whoever has many chunks, within a block: between two of them they give way."""
        with self._asking:
            self._asked += 1
        try:
            yield
        finally:
            with self._asking:
                self._asked -= 1
                self._asking.notify_all()

    def give_way(self) -> None:
        """Wait until nobody goes first."""
        with self._asking:
            self._asking.wait_for(lambda: not self._asked)

    def directions(self, texts: Sequence[str]) -> np.ndarray:
        """Return the trained model's pooled states of texts, each of length 1, float32 `[texts, hidden]`."""
        model, tokenizer = self.run.load()
        spec, device = self.run.experiment, default_device()
        with self._lock:
            states = forward_texts(
                model,
                tokenizer,
                texts,
                device=device,
                precision=precision_of(spec, device),
                max_length=spec.data.max_length,
                batch_size=self.run.evaluation_rows,
                too_long=spec.data.too_long,
                states=True,
            )
        return states / np.maximum(np.linalg.norm(states, axis=1, keepdims=True), np.finfo(np.float32).tiny)


class Near(NamedTuple):
    """A training text near a text: its label, and the cosine of both texts' states (-1 to 1)."""

    text: str
    label: str
    cosine: float


class TrainingTexts:
    """The texts that a run was trained on, by the states that its model has for them.

    Args:
        shared: The run.

    Attributes:
        problem: Why there are none to compare with, in a line; empty if there are.
        of: How many training texts there are in all.
        texts: Those that are compared with, in a random order, so that the first of them have all kinds of labels.
        done: For how many of them the states are there; a text is compared with these.
    """

    def __init__(self, shared: SharedRun) -> None:
        self._shared = shared
        self.problem, self.of, self.done = "", 0, 0
        self.texts: tuple[str, ...] = ()
        self._labels: list[str] = []
        self._directions = np.zeros((0, 0), np.float32)

    def read(self, stop: threading.Event) -> None:
        """Read the rows and compute their states, chunk by chunk; a reason why that cannot be is kept as `problem`.

        Args:
            stop: Set to end early.
        """
        try:
            data = data_of(self._shared.run)
            self.of = len(data.train)
            order = np.random.default_rng(0).permutation(self.of)[:MOST_TRAINING_TEXTS]
            split = data.train.take(order.tolist())
            self.texts, self._labels = split.texts, [data.label_names[label] for label in split.labels]
            for start in range(0, len(self.texts), CHUNK):
                if stop.is_set():
                    return
                found = self._shared.directions(self.texts[start : start + CHUNK])
                if not start:
                    self._directions = np.zeros((len(self.texts), found.shape[1]), np.float32)
                self._directions[start : start + len(found)] = found
                self.done = start + len(found)
                self._shared.give_way()
        except (KitError, OSError) as error:
            self.problem = " ".join(str(error).split())
        except Exception as error:  # of a thread, so that nobody else would hear of it
            self.problem = f"{type(error).__name__}: {' '.join(str(error).split())}"

    def nearest(self, text: str, count: int) -> list[Near]:
        """Return the training texts most similar to a text, the nearest first; none before any is read.

        Args:
            text: The text.
            count: How many.
        """
        done = self.done
        if not done:
            return []
        cosines = self._directions[:done] @ self._shared.directions([text])[0]
        order = np.argsort(-cosines, kind="stable")[:count]
        return [Near(self.texts[row], self._labels[row], float(cosines[row])) for row in order]
