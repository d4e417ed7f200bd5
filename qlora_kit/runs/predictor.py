"""Predict with a run folder."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

from ..errors import KitError, described
from ..system.arguments import COUNT, SHARE, TEXT, takes
from ..system.showing import counted, lines_as_html, one_line, table_as_html
from .folder import RunFolder

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


# Rows of predictions that are shown, and labels a text in a table unless `top_k` says how many.
SHOWN_ROWS, TOP = 3, 3


@dataclasses.dataclass(frozen=True, repr=False)
class Predictions:
    """A run's predictions for some texts.

    They are a sequence of labels: `len(predictions)`, `for label in predictions` and `predictions[0]` are about
    `labels`, in the order of the texts; a slice gives the `Predictions` of some of the texts. `to_frame` gives a table
    with texts and probabilities.

    Args:
        labels: Predicted label of each text; None where `reject_below` rejected it.
        label_ids: Class id of each text's most probable label, rejected or not, int64 `[texts]`.
        probabilities: Softmax of the logits, float64 `[texts, classes]`.
        logits: Float32 `[texts, classes]`.
        label_names: Names of the classes, in the order of their ids; empty where they are not known.
        texts: The texts; empty where they are not known.
        top_k: How many labels a text `to_frame` shows by default.
        reject_below: The probability under which a label was rejected; None if none was.
    """

    labels: list[str | None]
    label_ids: np.ndarray
    probabilities: np.ndarray
    logits: np.ndarray
    label_names: Sequence[str] = ()
    texts: Sequence[str] = ()
    top_k: int = TOP
    reject_below: float | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[str | None]:
        return iter(self.labels)

    @overload
    def __getitem__(self, place: int) -> str | None: ...

    @overload
    def __getitem__(self, place: slice) -> Predictions: ...

    def __getitem__(self, place: int | slice) -> str | Predictions | None:
        """Return the label at a place (negative ones count from the end), or the predictions in a slice.

        Raises:
            KitError: For what is no whole number and no slice of them; True and False are none.
            IndexError: For a place that there is not, as of a list: `for` loops and `reversed` go by it.
        """
        try:
            if isinstance(place, slice):
                names = ("labels", "label_ids", "probabilities", "logits", "texts")
                return dataclasses.replace(self, **{name: getattr(self, name)[place] for name in names})
            if isinstance(place, bool):
                raise TypeError("a yes or no is no place")
            return self.labels[operator.index(place)]
        except (TypeError, ValueError) as error:  # ValueError: a slice with a step of 0
            raise KitError(f"predictions have a place or a slice, as predictions[0], not {described(place)}") from error
        except IndexError as error:
            raise IndexError(f"there is no prediction {place}: there are {len(self):,}") from error

    @takes(top=COUNT)
    def to_frame(self, top: int | None = None) -> pd.DataFrame:
        """Return a table with a row for each text.

        Args:
            top: How many labels a text, the most probable first; by default `top_k`. There are never more than classes.

        Returns:
            The columns `text` (where the texts are known), `label` and `probability` (float64, 0 to 1), then
            `label_2`, `probability_2` and so on. If `reject_below` was given, `rejected` says whether the most probable
            label was under it; its `label` is then None.

        Raises:
            KitError: When `top` is not a whole number of 1 or more.
        """
        import pandas as pd

        columns: dict[str, Any] = {"text": list(self.texts)} if len(self.texts) == len(self) else {}
        columns |= {"label": self.labels, "probability": self._best(1)[1][:, 0]}
        if self.reject_below is not None:
            columns["rejected"] = [label is None for label in self.labels]
        ids, shares = self._best(top or self.top_k)
        for place in range(1, ids.shape[1]):
            columns[f"label_{place + 1}"] = [self._name(index) for index in ids[:, place]]
            columns[f"probability_{place + 1}"] = shares[:, place]
        return pd.DataFrame(columns)

    def top(self, count: int) -> list[list[tuple[str, float]]]:
        """Return for each text its most probable labels with their probabilities, the most probable first.

        Args:
            count: How many; there are never more than classes.
        """
        ids, shares = self._best(count)
        return [
            [(self._name(index), float(share)) for index, share in zip(*row, strict=True)]
            for row in zip(ids, shares, strict=True)
        ]

    def _best(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the most probable classes of each text and their probabilities, both `[texts, count]`."""
        import numpy as np

        # Stable, so that of equal probabilities the first is the one in `label_ids`.
        ids = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :count]
        return ids, np.take_along_axis(self.probabilities, ids, axis=1)

    def _name(self, index: int) -> str:
        return self.label_names[index] if len(self.label_names) else str(index)

    def _title(self) -> str:
        rejected = sum(label is None for label in self.labels)
        more = (
            f", {rejected:,} rejected as less probable than {self.reject_below:g}"
            if self.reject_below is not None
            else ""
        )
        return (
            f"Predictions for {counted(len(self), 'text')} with {counted(self.probabilities.shape[1], 'label')}{more}"
        )

    def _rows(self, most: int) -> list[list[str]]:
        """Return the first rows as text, label and probability; without the text where it is not known."""
        shares = self._best(1)[1][:most, 0]
        texts = [[one_line(text, 60)] for text in self.texts[:most]] or [[] for _ in shares]
        labels = ["(rejected)" if label is None else one_line(label, 60) for label in self.labels[:most]]
        return [[*text, label, f"{share:.1%}"] for text, label, share in zip(texts, labels, shares, strict=True)]

    def _left(self, most: int) -> list[str]:
        left = len(self) - most
        return [f"and {left:,} more: to_frame() has all"] if left > 0 else []

    def __repr__(self) -> str:
        rows = [f"  {': '.join(row[:-1])}, {row[-1]}" for row in self._rows(SHOWN_ROWS)]
        return "\n".join([self._title(), *rows, *(f"  {line}" for line in self._left(SHOWN_ROWS))])

    def _repr_html_(self) -> str:
        rows = self._rows(SHOWN_ROWS)
        columns = ["text", "label", "probability"][-len(rows[0]) :] if rows else []
        table = table_as_html(columns, rows) if rows else ""
        left = self._left(SHOWN_ROWS)
        return lines_as_html([self._title()]) + table + (lines_as_html(left, titled=False) if left else "")


class Predictor(RunFolder):
    """A finished run that predicts: its model is loaded once, at the first prediction.

    Args:
        path: The folder.

    Raises:
        KitError: As `RunFolder`.
    """

    _model: Any = None
    _tokenizer: Any = None

    def load(self) -> tuple[Any, Any]:
        """Load the trained model, once.

        Returns:
            The model in eval mode, on the GPU if there is one, and its tokenizer.

        Raises:
            KitError: When the base is not the one that the run was trained on, or weights are missing or do not fit.
        """
        if self._model is None:
            from ..models.tokenizers import load_tokenizer
            from ..models.weights import load_trained

            self._check_base()
            self._tokenizer = load_tokenizer(self.experiment.model, self.path / "tokenizer")
            self._model = load_trained(
                self.experiment,
                self.label_names,
                self.path / "adapter",
                pad_token_id=self._tokenizer.pad_token_id,
            )
        return self._model, self._tokenizer

    def _check_base(self) -> None:
        """Refuse a base other than the one the run was trained on, if the checksums of both are known."""
        from ..models.sources import find_base

        spec = self.experiment.model
        # A run folder without environment.json still predicts; random weights come from no file.
        if spec.random_weights or not (self.path / "environment.json").is_file():
            return
        checksums, base = self.environment["checksums"], find_base(spec)
        for what, trained_on, found in (
            ("other weights", checksums["base"], base.checksum),
            ("another config.json", checksums.get("base_config"), base.configuration),
        ):
            if trained_on and found and trained_on != found:
                raise KitError(
                    f"{self.path} was trained on {what} than {spec.name} now holds (checksum {trained_on[:12]}… "
                    f"against {found[:12]}…): its adapters mean nothing on this base. Bring the base back as it "
                    "was, or train again"
                )

    @functools.cached_property
    def evaluation_rows(self) -> int:
        """Default number of texts per forward pass: that of evaluations during training on this device."""
        from ..models.forward import evaluation_rows
        from ..system.devices import default_device

        return evaluation_rows(self.experiment, default_device().type)

    @takes(batch_size=COUNT, progress=TEXT, top_k=COUNT, reject_below=SHARE)
    def predict(
        self,
        texts: Any,
        *,
        text: str | None = None,
        batch_size: int | None = None,
        progress: str | None = None,
        top_k: int = TOP,
        reject_below: float | None = None,
    ) -> Predictions:
        """Classify texts.

        Args:
            texts: A list of texts, or another sequence of them: a generator, a pandas Series, a NumPy or Arrow array, a
                column of a `datasets.Dataset`. Inputs that are no sequence of texts are refused: a dict, a set, and a
                single string, whose letters would be taken for texts.
            text: The column of the texts, if `texts` is a table: a DataFrame, a Dataset, an Arrow table, a list of
                dicts, a dict of columns.
            batch_size: Texts per forward pass, by default `evaluation_rows`; it changes the result only by rounding.
            progress: Label of a progress bar, or None for none.
            top_k: How many labels a text the result's `to_frame` shows, 1 or more.
            reject_below: A probability, 0 to 1: a text whose most probable label has less gets the label None. None
                rejects no text. The probabilities of a run are as sure as its report's `calibration` says.

        Returns:
            Labels, probabilities and logits, in the order of the texts.

        Raises:
            KitError: For an input that holds no texts, an empty text, an item that is not a text or not valid Unicode;
                for a `top_k` or a `reject_below` out of its range.
        """
        from ..data.tables import texts_of

        texts = texts_of(texts, text)
        import numpy as np

        from ..metrics.scores import probabilities
        from ..models.forward import forward_texts
        from ..models.precision import precision_of
        from ..system.devices import default_device

        model, tokenizer = self.load()
        device = default_device()
        logits = forward_texts(
            model,
            tokenizer,
            texts,
            device=device,
            precision=precision_of(self.experiment, device),
            max_length=self.experiment.data.max_length,
            batch_size=self.evaluation_rows if batch_size is None else batch_size,
            too_long=self.experiment.data.too_long,
            progress=progress,
        ).reshape(len(texts), len(self.label_names))
        ids = logits.argmax(axis=1) if len(texts) else np.zeros(0, np.int64)
        names, shares = self.label_names, probabilities(logits)
        kept = [reject_below is None or row[index] >= reject_below for row, index in zip(shares, ids, strict=True)]
        labels = [names[index] if keep else None for index, keep in zip(ids, kept, strict=True)]
        return Predictions(labels, ids, shares, logits, names, texts, top_k, reject_below)
