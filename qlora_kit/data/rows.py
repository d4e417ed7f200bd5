"""Texts with their labels: one split, and a data set of three splits."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..config.sections import DataSpec
from ..errors import KitError, warn
from ..system.arguments import a_path, takes
from ..system.files import move_into_place, saving
from ..system.parsing import parse_json, read_json
from ..system.showing import MOST_SHOWN, counted, lines_as_html, one_line
from .batches import token_ids, unknown_share
from .labels import composed, look_of
from .splitting import fold
from .tables import Rows, first_line, short

_SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, repr=False)
class Split:
    """Rows of one split, in the order of their source.

    Args:
        texts: The texts, unchanged from the source.
        labels: For each text, the index of its label in `TextData.label_names`.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        first = f", the first one {_quoted(self.texts[0])}" if self.texts else ""
        return f"Split of {counted(len(self), 'text')}{first}"

    def take(self, indices: Iterable[int]) -> Split:
        """Return the rows at `indices`, in that order."""
        chosen = list(indices)
        return Split(tuple(self.texts[i] for i in chosen), tuple(self.labels[i] for i in chosen))


@dataclasses.dataclass(frozen=True, repr=False)
class TextData:
    """A text classification data set, split and checked.

    It shows itself in five lines, in a terminal and in Jupyter.

    Args:
        spec: Where it came from and how it was split.
        label_names: The labels; a label's index here is its class.
        train: Rows for training the weights.
        validation: Rows for choosing epochs, learning rates or a baseline's C.
        test: Rows for measuring only.
    """

    spec: DataSpec
    label_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        return lines_as_html(self._lines())

    def _lines(self) -> list[str]:
        names, sizes = self.label_names, {name: len(split) for name, split in self.splits().items()}
        shown = [_quoted(name, 40) for name in names[:3]]
        more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
        lines = [
            f"Data {one_line(self.spec.name)}: {counted(sum(sizes.values()), 'text')} with "
            f"{counted(len(names), 'label')}",
            f"  {', '.join(f'{name} {size:,}' for name, size in sizes.items())}",
            f"  labels {', '.join(shown)}{more}",
        ]
        if self.train.texts:
            lines.append(f"  first text {_quoted(self.train.texts[0])} ({one_line(names[self.train.labels[0]], 40)})")
        if self.test.texts:
            lines.append(f"  {leak_in_words(len(self.leaked_test_indices), len(self.test))}")
        return lines

    @functools.cached_property
    def checksum(self) -> str:
        """SHA-256 over labels, texts and splits: equal if two runs had the same rows in the same splits."""
        content = [self.label_names, *((s.texts, s.labels) for s in (self.train, self.validation, self.test))]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()

    @functools.cached_property
    def leaked_test_indices(self) -> tuple[int, ...]:
        """Indices of test texts that are also in training or validation (compared by `splitting.fold`)."""
        seen = {fold(text) for split in (self.train, self.validation) for text in split.texts}
        return tuple(i for i, text in enumerate(self.test.texts) if fold(text) in seen)

    def splits(self) -> dict[str, Split]:
        """Return the three splits by name, in the order train, validation, test."""
        return {name: getattr(self, name) for name in _SPLITS}

    def report(self, tokenizer: Any = None) -> dict[str, Any]:
        """Describe the data: sizes, leaks, duplicates and lengths that matter for trusting a score.

        Args:
            tokenizer: A transformers tokenizer; with it, lengths in tokens and how many texts exceed
                `spec.max_length` are reported too.

        Returns:
            Plain JSON: `rows` by split; `class_sizes` by label and split; `leaked_test` (test texts that are also
            in training or validation; `count`, `indices`, `texts`); `duplicates` (texts that occur more than
            once in training and validation); `conflicting_labels` (equal texts with different labels,
            anywhere); `labels_alike` (labels that `fold` makes equal); `characters` and, with a tokenizer,
            `tokens` by split: `mean`, `median`, `p95`, `max`, and for tokens `over_max_length` and `unknown`
            (share of unknown tokens). Texts are equal if `fold` makes them equal.
        """
        names = self.label_names
        sizes = {name: Counter(split.labels) for name, split in self.splits().items()}
        fitted = Counter(fold(t) for split in (self.train, self.validation) for t in split.texts)
        labels_of: dict[str, set[int]] = {}
        alike: dict[str, list[str]] = {}
        for split in self.splits().values():
            for text, label in zip(split.texts, split.labels, strict=True):
                labels_of.setdefault(fold(text), set()).add(label)
        for name in names:
            alike.setdefault(fold(name.replace("_", " ")), []).append(name)
        repeated = [text for text, count in fitted.items() if count > 1]
        leaked = self.leaked_test_indices
        result: dict[str, Any] = {
            "name": self.spec.name,
            "checksum": self.checksum,
            "rows": {name: len(split) for name, split in self.splits().items()},
            "classes": len(names),
            "class_sizes": {label: {split: sizes[split][i] for split in _SPLITS} for i, label in enumerate(names)},
            "leaked_test": {
                "count": len(leaked),
                "indices": list(leaked),
                "texts": [self.test.texts[i] for i in leaked],
            },
            "duplicates": {"count": sum(fitted[t] - 1 for t in repeated), "texts": sorted(repeated)},
            "conflicting_labels": [
                {"text": text, "labels": sorted(names[i] for i in labels)}
                for text, labels in labels_of.items()
                if len(labels) > 1
            ],
            "labels_alike": [group for group in alike.values() if len(group) > 1],
            "characters": {name: _summary([len(t) for t in s.texts]) for name, s in self.splits().items()},
        }
        if tokenizer is not None:
            limit = self.spec.max_length
            result["max_length"] = limit
            result["tokens"] = {}
            for name, split in self.splits().items():
                ids = token_ids(tokenizer, list(split.texts))
                lengths = np.array([len(tokens) for tokens in ids], dtype=np.int64)
                result["tokens"][name] = {
                    **_summary(lengths),
                    "over_max_length": int((lengths > limit).sum()),
                    "unknown": unknown_share(tokenizer, ids),
                }
        return result

    def save(self, folder: str | Path) -> Path:
        """Write the rows into `folder` as JSON lines, whole or not at all.

        Args:
            folder: Created here; if it exists, it must hold the same data.

        Returns:
            The folder: `train.jsonl`, `validation.jsonl`, `test.jsonl`, `labels.json`, and `data.json` with
            the spec and the checksum.

        Raises:
            KitError: When the folder holds other data, or cannot be read.
        """
        folder = Path(folder)
        if folder.exists():
            if load_saved(folder).checksum == self.checksum:
                return folder  # a run that was interrupted right after saving is restarted
            raise KitError(f"{folder} holds other data already: it is never written over")
        files = {
            "data.json": json.dumps(
                {"spec": dataclasses.asdict(self.spec), "checksum": self.checksum}, indent=2, ensure_ascii=False
            ),
            "labels.json": json.dumps(self.label_names, indent=2, ensure_ascii=False),
        }
        for name, split in self.splits().items():
            files[f"{name}.jsonl"] = "\n".join(
                json.dumps({"text": text, "label": self.label_names[label]}, ensure_ascii=False)
                for text, label in zip(split.texts, split.labels, strict=True)
            )
        aside = folder.with_name(f".{folder.name}.partial")
        with saving(folder):
            try:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
                for name, content in files.items():
                    (aside / name).write_text(content + "\n", encoding="utf-8", newline="")
                move_into_place(aside, folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        return folder


@takes(folder=a_path("runs/NAME/data"))
def load_saved(folder: str | Path) -> TextData:
    """Read what `TextData.save` wrote, and check that nothing in it has changed.

    Args:
        folder: The folder it was saved to.

    Returns:
        The same rows in the same splits.

    Raises:
        KitError: A file is missing, damaged or changed.
    """
    folder = Path(folder)
    about = read_json(folder / "data.json")
    names = read_json(folder / "labels.json")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise KitError(f"{folder / 'labels.json'} does not hold a list of labels")
    index = {name: i for i, name in enumerate(names)}
    splits = {}
    for name in _SPLITS:
        texts, labels = [], []
        path = folder / f"{name}.jsonl"
        # Not splitlines: a text may contain U+2028, which JSON does not escape.
        for number, line in enumerate(_read_text(path).removesuffix("\n").split("\n"), 1):
            place = f"{path}, line {number}"
            row = parse_json(line, place)
            text, label = (row.get("text"), row.get("label")) if isinstance(row, dict) else (None, None)
            if not isinstance(text, str) or not isinstance(label, str) or label not in index:
                raise KitError(f"{place}: no row of text and label, or a label that labels.json does not have")
            texts.append(text)
            labels.append(index[label])
        splits[name] = Split(tuple(texts), tuple(labels))
    if not isinstance(about, dict) or not isinstance(about.get("spec"), dict):
        raise KitError(f"{folder / 'data.json'} is damaged: allowed is a spec and a checksum")
    try:
        spec = DataSpec(**about["spec"])
    except TypeError as error:
        raise KitError(f"{folder / 'data.json'} is damaged: {error}") from error
    data = TextData(spec=spec, label_names=tuple(names), **splits)
    if data.checksum != about.get("checksum"):
        raise KitError(f"the rows in {folder} have changed since they were saved: their checksum differs")
    warn_of_leaks(data)
    return data


def leak_in_words(leaked: int, rows: int, split: str = "test") -> str:
    """Say how many texts of a split are also in the training rows; terminal, report and card all use this sentence.

    Args:
        leaked: How many of its texts are also in training or validation (`TextData.leaked_test_indices`).
        rows: How many texts the split has.
        split: `test` or `validation`.
    """
    seen = "training or validation" if split == "test" else "training"
    stand = "stands" if leaked == 1 else "stand"
    words = (
        f"{leaked:,} of {counted(rows, f'{split} text')} ({leaked / rows:.1%}) also {stand} in {seen} (case, spaces, "
        "punctuation and Unicode form aside)"
    )
    return words if leaked < rows else f"{words}: no text is left that a score on new texts could come from"


# Loading warns if at least this share of a split's texts is also in the training rows.
LEAK_WARNED = 0.01


def twins(label: str, other: str) -> str:
    """Describe two labels that look the same, with the code points in which they differ."""

    def codes(text: str) -> str:
        return " ".join(f"U+{ord(c):04X}" for c in text if not " " <= c <= "~") or "ASCII alone"

    return (
        f"the labels {short(other)} and {short(label)} look the same and are not ({codes(other)}; {codes(label)}): "
        "make them one"
    )


def warn_of_leaks(data: TextData) -> None:
    """Warn if `LEAK_WARNED` or more of the test or validation texts are also trained on."""
    trained = {fold(text) for text in data.train.texts}
    known = sum(fold(text) in trained for text in data.validation.texts)
    for split, leaked in (("test", len(data.leaked_test_indices)), ("validation", known)):
        rows = len(getattr(data, split))
        if rows and leaked / rows >= LEAK_WARNED:
            warn(f"{data.spec.name}: {leak_in_words(leaked, rows, split)}")


def _quoted(text: str, most: int = MOST_SHOWN) -> str:
    return f"'{one_line(text, most)}'"


def _summary(values: Iterable[int]) -> dict[str, float]:
    array = np.asarray(list(values), dtype=np.int64)
    return {
        "mean": round(float(array.mean()), 2),
        "median": float(np.median(array)),
        "p95": float(np.percentile(array, 95)),
        "max": int(array.max()),
    }


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise KitError(f"there is no {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise KitError(f"{path} cannot be read: {first_line(error)}") from error


def names_of_labels(rows: Rows) -> tuple[str, ...]:
    """Return the sorted labels (whole numbers by value), each in its first spelling in the rows.

    Unicode-equivalent forms (é as one character or two) are one label. Labels that look the same but differ, e.g. by an
    invisible character, are refused with their code points.
    """
    first: dict[str, str] = {}
    for label in rows.labels:
        first.setdefault(composed(label), label)
    seen: dict[str, str] = {}
    for label in first.values():
        other = seen.setdefault(look_of(label), label)
        if other != label:
            raise KitError(f"{rows.source}: {twins(label, other)}")
    whole = all(re.fullmatch(r"-?(0|[1-9]\d*)", name, re.ASCII) for name in first)
    return tuple(sorted(first.values(), key=int) if whole else sorted(first.values()))
