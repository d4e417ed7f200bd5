"""Predict with a run folder."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from ..errors import KitError
from ..system.arguments import COUNT, TEXT, takes
from .folder import RunFolder

if TYPE_CHECKING:
    import numpy as np


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A run's predictions for some texts.

    Args:
        labels: Predicted label of each text.
        label_ids: Predicted class id of each text, int64 `[texts]`.
        probabilities: Softmax of the logits, float64 `[texts, classes]`.
        logits: Float32 `[texts, classes]`.
    """

    labels: list[str]
    label_ids: np.ndarray
    probabilities: np.ndarray
    logits: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


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

    @takes(batch_size=COUNT, progress=TEXT)
    def predict(
        self,
        texts: Any,
        *,
        text: str | None = None,
        batch_size: int | None = None,
        progress: str | None = None,
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

        Returns:
            Labels, probabilities and logits, in the order of the texts.

        Raises:
            KitError: For an input that holds no texts, an empty text, an item that is not a text or not valid Unicode.
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
        return Predictions([self.label_names[index] for index in ids], ids, probabilities(logits), logits)
