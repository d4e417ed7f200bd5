"""What notebook 00 does with a user's file: find it, choose columns and model, and say what the data holds."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.experiment import Experiment
from ..config.names import presets
from ..config.preset import preset as load_preset
from ..config.sections import ModelSpec
from ..data.loading import banking77, text_classification
from ..data.rows import TextData, leak_in_words
from ..errors import KitError
from ..models.sources import find_base
from ..system.arguments import FLAG, NUMBER, PRESET, TEXT, WHOLE, a_path, takes
from ..system.files import saving
from ..system.host import COLAB, host
from ..system.showing import counted
from .opening import choose_experiment

SAMPLE_LABELS, SAMPLE_ROWS = 12, 40
"""How many of Banking77's labels the sample has, and how many rows of each."""
TEST_SHARE = 0.2
"""Share of the user's rows that is held out for the test, if no file with test rows is named."""


@takes(file=TEXT, out=a_path("runs/latest"), upload=FLAG)
def own_file(file: str, *, out: str | Path = "runs/latest", upload: bool = False) -> tuple[Path, str]:
    """Return the file to work on: the named one, one that is uploaded in Colab, or a sample.

    Args:
        file: The user's file; empty for an upload or the sample.
        out: The folder OUT; the sample is written into `OUT/00_your_data`.
        upload: In Colab, ask for a file with the browser.

    Returns:
        The file, and one sentence on which it is.

    Raises:
        KitError: When a file is both named and to be uploaded, or an upload is asked for outside Colab.
    """
    if file and upload:
        raise KitError(f"own_file is {file!r} and upload is True: name a file or upload one")
    if file:
        return Path(file), f"The file {file}, as asked for"
    if upload:
        if host() is not COLAB:
            raise KitError("upload = True is for Colab: here, give the file's path as own_file")
        names = list(importlib.import_module("google.colab.files").upload())
        if names:
            return Path(names[0]), f"The file {names[0]}, uploaded"
    path = write_sample(Path(out) / "00_your_data" / "sample.csv")
    why = "Nothing was uploaded" if upload else "No file was named"
    return path, (
        f"{why}, so this runs on a small sample of Banking77: questions of bank customers, {SAMPLE_LABELS} of its "
        "labels. Its scores say little. Set own_file to use your own rows."
    )


def write_sample(path: Path) -> Path:
    """Write a small sample of Banking77's training rows as CSV.

    Args:
        path: The file; its folder is created.

    Returns:
        The file: columns `id`, `question` and `topic`, with `SAMPLE_ROWS` rows of each of `SAMPLE_LABELS` labels.
    """
    data = banking77()
    # Every sixth label: neighbours in the list are near in meaning.
    chosen = list(range(0, len(data.label_names), len(data.label_names) // SAMPLE_LABELS))[:SAMPLE_LABELS]
    left = dict.fromkeys(chosen, SAMPLE_ROWS)
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["id", "question", "topic"])
            for number, (text, label) in enumerate(zip(data.train.texts, data.train.labels, strict=True)):
                if left.get(label):
                    left[label] -= 1
                    writer.writerow([number, text, data.label_names[label]])
    return path


@takes(preset=PRESET, model=TEXT, seed=WHOLE, epochs=NUMBER, rows=WHOLE, wandb=TEXT)
def own_experiment(
    preset: str, *, model: str = "", seed: int = 0, epochs: float = 0, rows: int = 0, wandb: str = "none"
) -> tuple[Experiment, str]:
    """Return the experiment for a user's rows.

    Args:
        preset: A preset, the path of an experiment's YAML file, or `auto`; its model is used unless another is named.
        model: `embedded:minilm`, `embedded:mpnet`, `embedded:smollm2-135m`, a name on the hub, or a folder. If a QLoRA
            preset has this model, its settings are used; else the kit's defaults.
        seed: Seed of the head, the adapters, the order of rows and dropout.
        epochs: Passes over the training rows; 0 for the preset's own.
        rows: Train on about this many rows; 0 for all, or as many as the preset takes.
        wandb: Where it is logged, see `TrackingSpec`.

    Returns:
        The experiment, and one sentence on why it is this one.

    Raises:
        KitError: For an unknown preset or model, or a setting that is not allowed.
    """
    experiment, why = choose_experiment(preset, seed=seed, epochs=epochs, wandb=wandb)
    if model and model != experiment.model.name:
        known = next((each for each in map(load_preset, presets()) if _is_qlora_of(each, model)), None)
        if known is not None:
            experiment, why = choose_experiment(known.name, seed=seed, epochs=epochs, wandb=wandb)
            why = f"{model} was asked for, and {known.name} has settings for it"
        else:
            find_base(ModelSpec(model))  # so that a wrong name is refused before anything is read
            short = "".join(c if c.isalnum() or c in ".-" else "-" for c in model.rpartition("/")[2]).lstrip(".-")
            changes: dict[str, Any] = {"training.seed": seed, "tracking.wandb": wandb}
            changes |= {"training.epochs": epochs} if epochs else {}
            experiment = Experiment(f"{short or 'own'}_banking77_qlora", ModelSpec(model)).override(changes)
            why = f"{model} was asked for; no preset has it, so the settings are the kit's defaults"
    limits = [number for number in (rows, experiment.data.limit) if number]
    return experiment.override({"data.limit": min(limits, default=None)}), why


def _is_qlora_of(experiment: Experiment, model: str) -> bool:
    return experiment.model.name == model and experiment.name.endswith("_qlora")


@takes(file=a_path("rows.csv"), text=TEXT, label=TEXT, test_file=TEXT)
def own_rows(file: str | Path, text: str, label: str, experiment: Experiment, *, test_file: str = "") -> TextData:
    """Read the two columns and split the rows.

    Args:
        file: The user's file.
        text: Its column of texts.
        label: Its column of labels.
        experiment: Its data section has the limit of rows and the longest text in tokens.
        test_file: A file with test rows and the same columns; empty to hold out `TEST_SHARE` of the rows.

    Returns:
        The rows in three splits.

    Raises:
        KitError: For a bad row or too few rows, with the file and the line.
    """
    spec = experiment.data
    return text_classification(
        str(file), test=test_file or TEST_SHARE, text=text, label=label, limit=spec.limit, max_length=spec.max_length
    )


def troubles(report: Mapping[str, Any], most: int = 3) -> str:
    """Say what in the data makes a score worth less: leaks, texts with two labels, labels that look alike, small ones.

    Args:
        report: What `TextData.report` returned.
        most: How many examples to quote.

    Returns:
        One line each; one line that says so where nothing was found.
    """
    lines = []
    leaked = report["leaked_test"]
    if leaked["count"]:
        lines.append(
            leak_in_words(leaked["count"], report["rows"]["test"]) + _quoted(leaked["texts"], most)
            + ". The score without them is given below"
        )  # fmt: skip
    two = report["conflicting_labels"]
    if two:
        count = f"{len(two):,} text{'s have' if len(two) > 1 else ' has'} two different labels"
        lines.append(count + _quoted([f"{row['text']} ({', '.join(row['labels'])})" for row in two], most))
    for group in report["labels_alike"]:
        lines.append(f"labels that look alike: {', '.join(map(repr, group))}. Are they one?")
    few = {label: sum(sizes.values()) for label, sizes in report["class_sizes"].items()}
    few = {label: rows for label, rows in few.items() if rows < 8}
    if few:
        shown = ", ".join(f"{label} ({rows})" for label, rows in list(few.items())[:most])
        are = "labels have" if len(few) > 1 else "label has"
        lines.append(f"{len(few)} {are} fewer than 8 rows, too few to learn or to test: {shown}")
    long = (report.get("tokens") or {}).get("train", {}).get("over_max_length", 0)
    if long:
        are = "is" if long == 1 else "are"
        lines.append(f"{counted(long, 'training text')} {are} longer than {report['max_length']} tokens and cut there")
    return "\n".join(lines) or (
        "No test text stands in the training rows, no text has two labels, and no label has too few rows."
    )


def _quoted(texts: list[str], most: int) -> str:
    shown = [text if len(text) <= 70 else text[:70] + "…" for text in texts[:most]]
    return ", such as " + "; ".join(map(repr, shown)) if shown else ""
