"""A finished run: its records, its predictions and its exports (merged model, card, push to the hub)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .config.experiment import Experiment
from .errors import KitError
from .runs.predictor import Predictor
from .system.arguments import FLAG, FOLDER, RUN_FOLDER, SHARE, TEXT, a_path, takes
from .system.files import write_text
from .system.showing import counted, harmless, lines_as_html, one_line

logger = logging.getLogger(__name__)


class Run(Predictor):
    """A finished run: its records, its predictions and its exports.

    Opening it reads its records and checks that no file that must stay the same has changed since the run was finished.

    Args:
        path: The folder.

    Raises:
        KitError: When the folder is missing or holds no finished run; when a file of it is damaged, was changed, is
            missing or was added; when a newer version of the kit made it.
    """

    @property
    def verdict(self) -> str:
        """One sentence: how good the run is, and whether a simpler classifier does as well.

        Before `qlora_kit.evaluate`, it tells the score on the validation rows, and that the run is not tested.
        """
        from .metrics.verdict import untested, verdict

        report = self.evaluation
        if report is None:
            return untested(self.training)
        # Reports of version 0.1.0's first runs do not say whether the weights are random.
        return verdict({"random_weights": self.training["random_weights"], **report})

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        return lines_as_html(self._lines())

    def _lines(self) -> list[str]:
        title = f"Run {harmless(str(self.path))}"
        try:
            spec, training = self.experiment, self.training
            method = "full fine-tuning" if spec.lora is None else f"LoRA of rank {spec.lora.r}"
            base = "" if spec.quantization.scheme == "none" else f" on a base in {spec.quantization.label}"
            rows, timing = training["rows"], training["timing"]
            return [
                f"{title}: {one_line(spec.name)}",
                f"  {one_line(spec.model.name)}, {method}{base}, seed {spec.training.seed}",
                f"  data {one_line(spec.data.name)}: {counted(len(self.label_names), 'label')}; rows "
                f"{rows['train']:,} train, {rows['validation']:,} validation, {rows['test']:,} test",
                f"  {counted(training['steps'], 'step')} in {timing['train_seconds']:,.0f} s, {training['precision']}",
                self.verdict,
            ]
        except (KitError, OSError, KeyError, TypeError) as error:
            # Files may be damaged or gone by now, and an object has to show itself all the same.
            return [title, f"  {one_line(str(error))}"]

    @takes(to=a_path("merged"), dtype=TEXT, progress=FLAG)
    def merge(self, to: str | Path, *, dtype: str = "fp32", progress: bool = True) -> dict[str, Any]:
        """Merge the adapters into the full-precision base, for plain transformers (see `export.merge`)."""
        from .export.merge import merge

        return merge(self, to, dtype=dtype, progress=progress)

    @takes(runtime=TEXT, to=a_path("served"), weights=TEXT, embeddings=TEXT, least_equal=SHARE, progress=FLAG)
    def export(
        self,
        runtime: str,
        to: str | Path,
        *,
        weights: str = "as_trained",
        embeddings: str = "fp32",
        least_equal: float = 1.0,
        progress: bool = True,
    ) -> dict[str, Any]:
        """Write a folder for ONNX Runtime (`onnx`), proved row by row, or for `peft` (see `export.export`)."""
        from .export.runtimes import export

        return export(
            self, runtime, to, weights=weights, embeddings=embeddings, least_equal=least_equal, progress=progress
        )

    def write_card(self) -> Path:
        """Write the model card again, with test scores if the run was evaluated; return its path."""
        from .export.card import card

        write_text(self.path / "README.md", card(self))
        return self.path / "README.md"

    @takes(repo=TEXT, private=FLAG, token=TEXT, merged=FLAG)
    def push_to_hub(self, repo: str, *, private: bool = True, token: str | None = None, merged: bool = False) -> str:
        """Upload adapters, tokenizer, card and records to the hub, or the merged model (see `export.push`)."""
        from .export.hub import push

        return push(self, repo, private=private, token=token, merged=merged)


def __getattr__(name: str) -> Any:
    # This module is also `qlora_kit.records`.
    from .public import handed_on

    return handed_on("records", name)


@takes(folder=RUN_FOLDER)
def load_run(folder: str | Path) -> Run:
    """Open a finished run's folder; its model is loaded at the first prediction.

    Args:
        folder: The run folder.

    Returns:
        The run.

    Raises:
        KitError: When the folder is missing or holds no finished run.
    """
    return Run(folder)


@takes(preset=TEXT, root=FOLDER)
def newest_run(preset: str, root: str | Path = "runs") -> Path | None:
    """Find the newest finished run of a preset anywhere under a folder.

    Args:
        preset: Name of the experiment.
        root: Where to look.

    Returns:
        Its run folder, or None if there is none.
    """
    return next((run.path for run in finished_runs(root, preset)), None)


def finished_runs(root: str | Path, preset: str | None = None) -> Iterator[Run]:
    """Open the finished runs anywhere under a folder, the newest first; log those that cannot be opened.

    Args:
        root: Where to look.
        preset: Name of the experiment; None for all.

    Yields:
        The runs. Each is opened, and its files are checked, only when the iterator reaches it.
    """
    files = sorted(Path(root).glob("**/training.json"), key=lambda file: (file.stat().st_mtime, file), reverse=True)
    for file in files:
        try:
            if preset in (None, Experiment.from_yaml(file.with_name("experiment.yaml")).name):
                yield Run(file.parent)
        except (KitError, OSError) as error:
            logger.warning("Passed over %s: %s", file.parent, error)
