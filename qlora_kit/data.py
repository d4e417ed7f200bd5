"""Texts and labels: reading, checking, splitting, reporting, tokenizing and batching them.

Banking77 comes with the package. Anything else is a CSV or Parquet file, a `datasets.Dataset`, a pandas
DataFrame or a data set on the hub, with one column of texts and one of labels. What cannot be trained on is
refused with the file and the row; nothing is guessed at in silence, and no remote code is run.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import records
from .errors import KitError, nearest, unknown
from .experiment import DataSpec

if TYPE_CHECKING:
    import torch

# Checked on every load: a line-ending filter or a hand edit would otherwise change scores unseen.
BANKING77_SHA256 = {
    "train.csv": "b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b",
    "test.csv": "d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d",
    "categories.json": "53261da888122daf2d120d925458631d9619e15d82e56052e7a42e535ce32b63",
}
TEST_SHARE = 0.1  # held out where a single file or table comes without test data
# Widths for fixed shapes: fine where short texts are, so that little is padded; few: each costs a CUDA graph.
BUCKET_EDGES = (8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
PADDINGS = ("buckets", "longest", "max_length")

_SUFFIXES = (".csv", ".tsv", ".parquet")
# Names that end like this are files, never asked of the hub, even where no such file exists.
_OTHER_SUFFIXES = (".txt", ".json", ".jsonl", ".xls", ".xlsx", ".gz", ".zip", ".arrow", ".feather", ".pq")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DELIMITERS = (",", ";", "\t", "|")
_SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows of one split, in the order of their source.

    Args:
        texts: The texts, as they stand in the source.
        labels: For each text the index of its label in `TextData.label_names`.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Iterable[int]) -> Split:
        """Return the rows at `indices`, in that order."""
        chosen = list(indices)
        return Split(tuple(self.texts[i] for i in chosen), tuple(self.labels[i] for i in chosen))


@dataclasses.dataclass(frozen=True)
class TextData:
    """A text classification data set, split and checked.

    Args:
        spec: Where it came from and how it was split.
        label_names: The labels; a label's index here is its class.
        train: Rows that weights are fitted on.
        validation: Rows that choices are made on (epochs, learning rates, a baseline's C).
        test: Rows that are only measured on.
    """

    spec: DataSpec
    label_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split

    @functools.cached_property
    def checksum(self) -> str:
        """SHA-256 over labels, texts and splits: equal where two runs saw the same rows, split alike."""
        content = [self.label_names, *((s.texts, s.labels) for s in (self.train, self.validation, self.test))]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()

    @functools.cached_property
    def leaked_test_indices(self) -> tuple[int, ...]:
        """Indices of test texts that also stand in training or validation, case and spaces folded."""
        seen = {_fold(text) for split in (self.train, self.validation) for text in split.texts}
        return tuple(i for i, text in enumerate(self.test.texts) if _fold(text) in seen)

    def splits(self) -> dict[str, Split]:
        """Return the three splits by name, in the order train, validation, test."""
        return {name: getattr(self, name) for name in _SPLITS}

    def report(self, tokenizer: Any = None) -> dict[str, Any]:
        """Describe the data: what a reader should know before trusting a score on it.

        Args:
            tokenizer: A transformers tokenizer; with it, lengths in tokens and how many texts exceed
                `spec.max_length` are reported too.

        Returns:
            Plain JSON: `rows` by split; `class_sizes` by label and split; `leaked_test` (test texts seen in
            training or validation; `count`, `indices`, `texts`); `duplicates` (texts that stand more than
            once in training and validation; case and spaces folded); `conflicting_labels` (equal texts with
            different labels, anywhere); `labels_alike` (labels that differ in case or spaces alone);
            `characters` and, with a tokenizer, `tokens` by split: `mean`, `median`, `p95`, `max`, and for
            tokens `over_max_length`.
        """
        names = self.label_names
        sizes = {name: Counter(split.labels) for name, split in self.splits().items()}
        fitted = Counter(_fold(t) for split in (self.train, self.validation) for t in split.texts)
        labels_of: dict[str, set[int]] = {}
        alike: dict[str, list[str]] = {}
        for split in self.splits().values():
            for text, label in zip(split.texts, split.labels, strict=True):
                labels_of.setdefault(_fold(text), set()).add(label)
        for name in names:
            alike.setdefault(_fold(name.replace("_", " ")), []).append(name)
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
                lengths = token_lengths(tokenizer, split.texts)
                over = int((lengths > limit).sum())
                result["tokens"][name] = {**_summary(lengths), "over_max_length": over}
        return result

    def save(self, folder: str | Path) -> Path:
        """Write the rows into `folder` as JSON lines, whole or not at all.

        Args:
            folder: Made here; if it exists, it must hold the same data.

        Returns:
            The folder: `train.jsonl`, `validation.jsonl`, `test.jsonl`, `labels.json`, and `data.json` with
            the spec and the checksum.

        Raises:
            KitError: When the folder holds other data, or cannot be read.
        """
        folder = Path(folder)
        if folder.exists():
            if load_saved(folder).checksum == self.checksum:
                return folder  # a run that was cut off right after this begins again
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
        with records.saving(folder):
            try:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
                for name, content in files.items():
                    (aside / name).write_text(content + "\n", encoding="utf-8", newline="")
                records.move_into_place(aside, folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        return folder


def load(spec: DataSpec) -> TextData:
    """Load what a spec names.

    Args:
        spec: Its `name` is `banking77`, a CSV, TSV or Parquet file, or a data set on the hub (`owner/name`,
            tried only where no such file exists and the name is no path).

    Returns:
        The data, split by `spec.split_seed` alone: equal specs on equal files give equal rows.

    Raises:
        KitError: The file, column, row or name is at fault; the message says which and what is allowed.
    """
    if spec.name == "memory":
        raise KitError(
            "data.name is 'memory': such rows live in Python objects or in a run folder's data/; hand them "
            "over as finetune(..., data=text_classification(...)) or read them with load_saved(folder)"
        )
    if spec.name == "banking77":
        return _banking77(spec)
    path = _existing_file(spec.name)
    if path is None:
        return _from_parts(spec, *_hub_tables(spec))
    if spec.revision is not None:
        raise KitError(f"data.revision is for data sets on the hub, and {spec.name} is a file: leave it out")
    return _from_parts(spec, _read_file(path, spec.text, spec.label), _test_table(spec))


def banking77(**fields: Any) -> TextData:
    """Load Banking77, which comes with the package: 77 intents of bank customers, 13,083 questions.

    Args:
        **fields: Fields of `DataSpec`, e.g. `limit=300`, `split_seed=1`, `max_length=64`.

    Returns:
        9,002 training, 1,001 validation and 3,080 test rows, unless `fields` say otherwise. Labels are in
        the order of the data set's own categories.json.
    """
    return load(_spec(name="banking77", **fields))


def text_classification(
    train: Any,
    *,
    test: Any = None,
    text: str = "text",
    label: str = "label",
    validation: float = 0.1,
    seed: int = 0,
    **fields: Any,
) -> TextData:
    """Make a data set of your own rows.

    Args:
        train: Path to a CSV, TSV or Parquet file; a `datasets.Dataset` or `DatasetDict` (its `train`); a
            pandas DataFrame; or a data set on the hub (`owner/name`).
        test: The same kinds of thing for testing; or a fraction of the rows; or, for a DatasetDict or a hub
            data set, the name of a split. None takes the split `test` where there is one, and else holds out
            10% and says so.
        text: The column of the texts.
        label: The column of the labels: text or whole numbers.
        validation: Fraction of the training rows held out for validation, stratified by label.
        seed: Seed of the splits.
        **fields: Further fields of `DataSpec`: `max_length`, `too_long`, `limit`, `revision`.

    Returns:
        The data, stratified; labels sorted (whole numbers by value, text by code point).

    Raises:
        KitError: With the file, the row and what is allowed.
    """
    shared: dict[str, Any] = {
        "text": text,
        "label": label,
        "validation": validation,
        "split_seed": seed,
        **fields,
    }
    if isinstance(train, os.PathLike):
        train = os.fspath(train)
    if isinstance(test, os.PathLike):
        test = os.fspath(test)
    if isinstance(test, np.floating | np.integer):
        test = test.item()
    if isinstance(train, str) and (test is None or isinstance(test, str | float)):
        return load(_spec(name=train, test=test, **shared))
    fraction = test if isinstance(test, float) else None
    spec = _spec(name="memory", test=fraction, **shared)
    if isinstance(train, str):
        path = _existing_file(train)
        from_hub = dataclasses.replace(spec, name=train)
        rows = _read_file(path, text, label) if path is not None else _hub_tables(from_hub)[0]
        return _from_parts(spec, rows, _table(test, text, label, "test"))
    if _is_dict_of_tables(train):
        return _from_parts(spec, *_dict_tables(train, test, spec, "the data"))
    rows = _table(train, text, label, "train")
    if isinstance(test, str):
        path = _existing_file(test)
        if path is None:
            raise KitError(f"there is no file {test!r} to test on")
        return _from_parts(spec, rows, _read_file(path, text, label))
    return _from_parts(spec, rows, fraction if test is None or fraction else _table(test, text, label, "test"))


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
    about = records.read_json(folder / "data.json")
    names = records.read_json(folder / "labels.json")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise KitError(f"{folder / 'labels.json'} does not hold a list of labels")
    index = {name: i for i, name in enumerate(names)}
    splits = {}
    for name in _SPLITS:
        texts, labels = [], []
        path = folder / f"{name}.jsonl"
        # Not splitlines: a text may hold U+2028, which JSON leaves as it is.
        for number, line in enumerate(_read_text(path).removesuffix("\n").split("\n"), 1):
            try:
                row = json.loads(line)
                texts.append(row["text"])
                labels.append(index[row["label"]])
            except (ValueError, KeyError, TypeError) as error:
                raise KitError(f"{path}, line {number}: no row of text and label ({error})") from error
        splits[name] = Split(tuple(texts), tuple(labels))
    try:
        data = TextData(spec=DataSpec(**about["spec"]), label_names=tuple(names), **splits)
        expected = about["checksum"]
    except (KeyError, TypeError) as error:
        raise KitError(f"{folder / 'data.json'} is damaged: {error}") from error
    if data.checksum != expected:
        raise KitError(f"the rows in {folder} have changed since they were saved: their checksum differs")
    return data


# ---- tokens and batches ----


def tokenize(
    tokenizer: Any,
    texts: Sequence[str],
    max_length: int,
    too_long: str = "cut",
    *,
    what: str = "text",
) -> list[list[int]]:
    """Turn texts into token ids, special tokens included.

    Args:
        tokenizer: A transformers tokenizer.
        texts: The texts.
        max_length: The most tokens a text may have, special tokens included.
        too_long: `cut` shortens a longer text and says once how many were; `refuse` raises on the first.
        what: What the texts are, for messages, e.g. `"training text"`.

    Returns:
        A list of token ids a text, at most `max_length` each, not padded.

    Raises:
        KitError: A text is too long and `too_long` is `refuse`, a text gives no token at all, or `max_length`
            is more than the tokenizer's `model_max_length`.
    """
    if max_length > tokenizer.model_max_length:
        raise KitError(
            f"data.max_length is {max_length}, but this model reads at most {tokenizer.model_max_length} tokens"
        )
    texts = list(texts)
    ids = _token_ids(tokenizer, texts)
    for i, tokens in enumerate(ids):
        if not tokens:
            raise KitError(f"{what} {i + 1} ({_short(texts[i])}) has no token that this tokenizer knows")
    long = [i for i, tokens in enumerate(ids) if len(tokens) > max_length]
    if long and too_long == "refuse":
        raise KitError(
            f"{what} {long[0] + 1} ({_short(texts[long[0]])}) has {len(ids[long[0]])} tokens, more than "
            f"data.max_length={max_length} ({len(long)} such of {len(texts)}); raise max_length, or set "
            "too_long='cut'"
        )
    if long:
        cut = tokenizer([texts[i] for i in long], truncation=True, max_length=max_length)["input_ids"]
        tokenizer(" ")  # a fast tokenizer keeps its last truncation, and would be saved with it
        for i, tokens in zip(long, cut, strict=True):
            ids[i] = tokens
        plural = "s" if len(texts) > 1 else ""
        warnings.warn(f"{len(long)} of {len(texts)} {what}{plural} cut to {max_length} tokens", stacklevel=2)
    return ids


def token_lengths(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """Return each text's number of tokens, special tokens included, before any cut."""
    return np.array([len(tokens) for tokens in _token_ids(tokenizer, list(texts))], dtype=np.int64)


class TokenizedDataset:
    """Tokenized rows for a DataLoader: item i is `{"input_ids", "attention_mask", "labels"}`, not padded.

    Args:
        input_ids: A list of token ids a row.
        labels: A class a row, or None (then items have no `labels`).

    Raises:
        KitError: When there are not as many labels as rows.
    """

    def __init__(self, input_ids: Sequence[Sequence[int]], labels: Sequence[int] | None = None) -> None:
        if labels is not None and len(labels) != len(input_ids):
            raise KitError(f"{len(input_ids)} texts but {len(labels)} labels")
        self.input_ids = [list(ids) for ids in input_ids]
        self.labels = None if labels is None else [int(label) for label in labels]
        self.lengths = [len(ids) for ids in self.input_ids]

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.input_ids[index]
        item: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if self.labels is not None:
            item["labels"] = self.labels[index]
        return item


@dataclasses.dataclass(frozen=True)
class Collator:
    """Makes a batch of tensors from rows; see `collator`."""

    pad_token_id: int
    padding: str = "longest"
    max_length: int = 128
    pad_to_multiple_of: int | None = None
    side: str = "right"
    edges: tuple[int, ...] | None = None

    def width(self, longest: int) -> int:
        """Return the padded length of a batch whose longest row has `longest` tokens."""
        width = self.max_length if self.padding == "max_length" else longest
        if self.edges is not None:
            width = min(bucket_width(width, self.edges), max(width, self.max_length))
        if self.pad_to_multiple_of:
            width = math.ceil(width / self.pad_to_multiple_of) * self.pad_to_multiple_of
        return max(width, longest)  # rows longer than max_length were let through on purpose

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad rows of `TokenizedDataset` to one width: int64 tensors [rows, width], labels [rows]."""
        import torch

        width = self.width(max(len(row["input_ids"]) for row in rows))
        ids = torch.full((len(rows), width), self.pad_token_id, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            tokens = torch.tensor(row["input_ids"], dtype=torch.long)
            place = slice(width - len(tokens), width) if self.side == "left" else slice(0, len(tokens))
            ids[i, place] = tokens
            mask[i, place] = torch.tensor(row["attention_mask"], dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": mask}
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows], dtype=torch.long)
        return batch


def collator(
    pad_token_id: int,
    padding: str = "longest",
    max_length: int = 128,
    *,
    pad_to_multiple_of: int | None = None,
    side: str = "right",
    edges: Sequence[int] | None = None,
) -> Collator:
    """Return the function that pads rows to a batch.

    Args:
        pad_token_id: The token to fill with; the attention mask is 0 there.
        padding: `longest` pads to the batch's longest row, and so does `buckets` (there it is the order of
            `LengthBatchSampler` that makes rows of a batch alike); `max_length` pads to `max_length`.
        max_length: Used by `max_length`; edges never pad wider than this.
        pad_to_multiple_of: Round the width up to a multiple of this.
        side: `right` or `left`.
        edges: With these (ascending, e.g. `BUCKET_EDGES`), pad to the first that holds the longest row, so
            that few shapes occur: a CUDA graph is captured once a shape.

    Returns:
        A picklable callable, so that loader workers can have it.

    Raises:
        KitError: For a padding or a side that there is not, with the nearest that there is.
    """
    if padding not in PADDINGS:
        raise unknown("padding", padding, PADDINGS)
    if side not in ("right", "left"):
        raise unknown("padding side", side, ("right", "left"))
    return Collator(
        pad_token_id, padding, max_length, pad_to_multiple_of, side, None if edges is None else tuple(edges)
    )


def bucket_width(length: int, edges: Sequence[int] = BUCKET_EDGES) -> int:
    """Return the first of the ascending `edges` that is at least `length`; `length` beyond the last."""
    return next((edge for edge in edges if edge >= length), length)


def edges_of(device: torch.device) -> tuple[int, ...] | None:
    """Return the widths that batches are padded to on a device: CUDA graphs have fixed shapes; None for any."""
    return BUCKET_EDGES if device.type == "cuda" else None


class LengthBatchSampler:
    """Order of the rows of an epoch in which each `batch_size` consecutive rows have like lengths.

    Rows are shuffled, sorted by length within windows of `window` batches, cut into batches, and the batches
    shuffled: batches stay random, yet hardly anything is padded. A batch that is not full comes last, so that
    a DataLoader cutting every `batch_size` rows cuts at the batches. In the first epoch the batch with the
    longest row comes first: what does not fit into memory fails at once, not in an hour.

    The order is a function of (lengths, batch_size, window, edges, seed, epoch) alone: a resumed run, another
    process or another number of workers sees the same.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a batch.
        seed: Seed of the order.
        window: About how many batches are sorted together. More pads less and is less random.
        edges: With these, rows are sorted by bucket (see `collator`) over the whole set and random within a
            bucket, rather than by length in windows.
        longest_first: Whether the first epoch begins with the longest batch.

    Raises:
        KitError: For a batch or a window below 1.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int = 0,
        *,
        window: int = 100,
        edges: Sequence[int] | None = None,
        longest_first: bool = True,
    ) -> None:
        if batch_size < 1 or window < 1:
            raise KitError(f"batch_size {batch_size} and window {window}: both must be at least 1")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size = batch_size
        self.seed = seed
        self.window = window
        self.edges = None if edges is None else tuple(edges)
        self.longest_first = longest_first
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration has."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch).tolist())

    def order(self, epoch: int) -> np.ndarray:
        """Return the rows' indices in the order of `epoch`, shape [rows]."""
        n, size = len(self.lengths), self.batch_size
        # RandomState, not Generator: its streams are frozen, so that an old run can be made again.
        rng = np.random.RandomState([self.seed % 2**32, epoch % 2**32])
        rows = rng.permutation(n)
        keys, windows = self.lengths, max(1, round(n / size / self.window))
        if self.edges is not None:
            keys, windows = np.array([bucket_width(int(length), self.edges) for length in self.lengths]), 1
        rest = rows[n - n % size :]  # random rows, so that the short batch is no haven of the longest
        full = rows[: n - n % size]
        batches: list[np.ndarray] = []
        for some in np.array_split(np.arange(len(full) // size), windows):  # windows of like size: no small last one
            part = full[some[0] * size : (some[-1] + 1) * size] if len(some) else full[:0]
            part = part[np.argsort(keys[part], kind="stable")]
            batches += [part[i : i + size] for i in range(0, len(part), size)]
        batches = [batches[i] for i in rng.permutation(len(batches))]
        if self.longest_first and epoch == 0 and batches:
            longest = max(range(len(batches)), key=lambda i: self.lengths[batches[i]].max())
            batches.insert(0, batches.pop(longest))
        return np.concatenate([*batches, rest]).astype(np.int64)


def padding_waste(
    lengths: Sequence[int], batch_size: int, max_length: int = 128, *, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Compare ways of padding one epoch.

    Args:
        lengths: Tokens of each row, already cut.
        batch_size: Rows of a batch.
        max_length: What `max_length` pads to.
        seed: Seed of the order.

    Returns:
        For `max_length`, `longest` (random batches padded to their longest row), `grouped`
        (`LengthBatchSampler`, padded to the longest row) and `fixed_shapes` (the same by `BUCKET_EDGES`):
        `tokens` (with padding), `real` (without) and `wasted`, the share of padding, 0 to 1.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    shuffled = np.random.RandomState(seed).permutation(len(sizes))
    grouped = LengthBatchSampler(sizes.tolist(), batch_size, seed).order(0)
    bucketed = LengthBatchSampler(sizes.tolist(), batch_size, seed, edges=BUCKET_EDGES).order(0)
    longest = collator(0, "longest", max_length)
    ways = {
        "max_length": (shuffled, collator(0, "max_length", max_length)),
        "longest": (shuffled, longest),
        "grouped": (grouped, longest),
        "fixed_shapes": (bucketed, collator(0, "longest", max_length, edges=BUCKET_EDGES)),
    }
    real = int(sizes.sum())
    result = {}
    for name, (order, pad) in ways.items():
        batches = [sizes[order[i : i + batch_size]] for i in range(0, len(order), batch_size)]
        tokens = sum(pad.width(int(batch.max())) * len(batch) for batch in batches)
        result[name] = {"tokens": tokens, "real": real, "wasted": 1 - real / tokens if tokens else 0.0}
    return result


# ---- reading ----


class _Rows(NamedTuple):
    """A table's two columns, checked cell by cell."""

    source: str  # how messages call it: a file's path, or e.g. "train"
    texts: list[str]
    labels: list[str]
    places: Sequence[str]  # "line 17" or "row 17", for messages


def _banking77(spec: DataSpec) -> TextData:
    if spec.test is not None or spec.revision is not None:
        raise KitError("banking77 comes with its own test rows, in one version: leave data.test and data.revision out")
    folder = resources.files(__package__) / "datasets" / "banking77"
    content = {}
    for name, expected in BANKING77_SHA256.items():
        try:
            content[name] = (folder / name).read_bytes()
        except OSError as error:
            raise KitError(f"{folder / name} is missing: install qlora_kit again") from error
        if hashlib.sha256(content[name]).hexdigest() != expected:
            raise KitError(f"{folder / name} is not Banking77's as published (its checksum differs): install again")
    names = tuple(json.loads(content["categories.json"]))
    train = _parse_csv(content["train.csv"], "banking77/train.csv", "text", "category")
    test = _parse_csv(content["test.csv"], "banking77/test.csv", "text", "category")
    return _from_parts(spec, train, test, names)


def _spec(**fields: Any) -> DataSpec:
    known = [field.name for field in dataclasses.fields(DataSpec)]
    for name in fields:
        if name not in known:
            raise unknown("field of DataSpec", name, known)
    return DataSpec(**fields)


def _existing_file(name: str) -> Path | None:
    """Return the file called `name`, or None where it can only be a hub name; else raise."""
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() not in _SUFFIXES:
            raise KitError(f"{name}: files end in {', '.join(_SUFFIXES)}; this one has {path.suffix or 'no ending'!r}")
        return path
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)[:5]
        raise KitError(f"{name} is a folder: name the file in it" + (f", e.g. {path / inside[0]}" if inside else ""))
    pathlike = (
        path.suffix.lower() in (*_SUFFIXES, *_OTHER_SUFFIXES)
        or path.is_absolute()
        or name.startswith(("./", "../", "~"))
    )
    # A folder of that name here: the hub is not asked for what is more likely a mistyped path.
    pathlike = pathlike or (path.parent != Path() and path.parent.is_dir())
    if not pathlike and _HUB_NAME.fullmatch(name):
        return None
    guess = _nearest_file(path)
    raise KitError(
        f"there is no file {name!r}."
        + (f" Did you mean {guess!r}?" if guess else "")
        + f" Allowed: banking77, a file that ends in {', '.join(_SUFFIXES)}, or a hub data set as owner/name."
    )


def _nearest_file(path: Path) -> str | None:
    """Return the existing data file most like `path`: in its folder (or the current one), or one level below."""
    folder = path.parent if path.parent.is_dir() else Path()
    try:
        found = [p for pattern in ("*", "*/*") for p in folder.glob(pattern) if p.suffix.lower() in _SUFFIXES][:1000]
    except OSError:
        return None
    by_path = nearest(str(path), [str(p) for p in found])
    if by_path is not None:
        return by_path
    by_name = nearest(path.name, [p.name for p in found])
    return next((str(p) for p in found if p.name == by_name), None)


def _read_file(path: Path, text: str, label: str) -> _Rows:
    if text == label:
        raise KitError(f"data.text and data.label are the same column, {text!r}")
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, text, label)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise KitError(f"{path} cannot be read: {error.strerror}") from error
    return _parse_csv(raw, str(path), text, label, "\t" if path.suffix.lower() == ".tsv" else ",")


def _parse_csv(raw: bytes, source: str, text: str, label: str, delimiter: str = ",") -> _Rows:
    for mark, encoding in ((b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16")):
        if raw.startswith(mark):
            raise KitError(f"{source} is encoded as {encoding}: save it as UTF-8")
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if not raw.strip():
        raise KitError(f"{source} is empty")
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = _line_at(raw, error.start)
        raise KitError(
            f"{source}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8: save the file as UTF-8"
        ) from error
    if "\0" in content:
        line = _line_at(raw, raw.index(b"\0"))
        raise KitError(f"{source}, line {line}: a NUL character; the file is damaged, or encoded as UTF-16 or 32")
    previous_limit = csv.field_size_limit(max(csv.field_size_limit(), len(content) + 1))
    try:
        delimiter, header_lines, columns = _csv_header(content, source, text, label, delimiter)
        reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
        text_at, label_at = columns.index(text), columns.index(label)
        texts, labels, places = [], [], []
        start = 1
        try:
            for cells in reader:
                place, start = start, reader.line_num + 1
                if place <= header_lines or not cells:
                    continue
                if len(cells) != len(columns):
                    raise KitError(
                        f"{source}, line {place}: {len(cells)} columns where the header has {len(columns)}; a "
                        f"text with a {delimiter!r}, a quote or a line break in it must stand in double quotes"
                    )
                texts.append(cells[text_at])
                labels.append(cells[label_at].strip())
                places.append(f"line {place}")
        except csv.Error as error:
            raise KitError(
                f"{source}, line {start}: a double quote is opened and never rightly closed ({error}); "
                'a quote within a quoted text is written twice: ""'
            ) from error
    finally:
        csv.field_size_limit(previous_limit)
    rows = _checked(source, texts, labels, places, text, label)
    _refuse_cut_off(raw, rows)
    return rows


def _csv_header(content: str, source: str, text: str, label: str, delimiter: str) -> tuple[str, int, list[str]]:
    """Find the delimiter under which the header has both columns: delimiter, the header's lines, columns."""
    seen: list[tuple[str, int, list[str]]] = []
    for candidate in (delimiter, *(d for d in _DELIMITERS if d != delimiter)):
        reader = csv.reader(io.StringIO(content, newline=""), delimiter=candidate, strict=True)
        try:
            columns = next((cells for cells in reader if cells), [])
        except csv.Error:
            continue
        columns = [name.strip() for name in columns]
        if text in columns and label in columns:
            for name in (text, label):
                if columns.count(name) > 1:
                    raise KitError(f"{source}: the header has {columns.count(name)} columns called {name!r}")
            return candidate, reader.line_num, columns
        seen.append((candidate, reader.line_num, columns))
    if not seen:
        raise KitError(f"{source}, line 1: a double quote is opened and never rightly closed")
    columns = max(seen, key=lambda item: len(item[2]))[2]
    missing = text if text not in columns else label
    shown = [_short(name) for name in columns[:20]]
    error = unknown("column", missing, [name.strip("'") for name in shown])
    raise KitError(f"{source}: {error} The first line names the columns; choose them with text= and label=.")


def _read_parquet(path: Path, text: str, label: str) -> _Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = file.schema_arrow.names
        for name in (text, label):
            if name not in columns:
                raise KitError(f"{path}: {unknown('column', name, columns)}")
            if columns.count(name) > 1:
                raise KitError(f"{path}: there are {columns.count(name)} columns called {name!r}")
        table = file.read(columns=[text, label])
        texts, labels = table.column(text).to_pylist(), table.column(label).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise KitError(f"{path} cannot be read as Parquet: it is damaged or cut off ({_first_line(error)})") from error
    return _checked(str(path), texts, labels, _RowNumbers(len(texts)), text, label)


class _RowNumbers(Sequence[str]):
    """`row 1`, `row 2`, ... without making them all."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: Any) -> Any:
        return f"row {index + 1}"


def _table(thing: Any, text: str, label: str, source: str) -> _Rows:
    """Read the two columns of a datasets.Dataset or a pandas DataFrame."""
    if text == label:
        raise KitError(f"data.text and data.label are the same column, {text!r}")
    if hasattr(thing, "column_names") and hasattr(thing, "features") and not _is_dict_of_tables(thing):
        columns = list(thing.column_names or [])
        for name in (text, label):
            if name not in columns:
                raise KitError(f"{source}: {unknown('column', name, columns)}")
        if not hasattr(thing, "with_format") or not hasattr(thing, "__len__"):
            raise KitError(f"{source}: a streamed data set has no length: load it without streaming")
        plain = thing.with_format(None)
        texts, labels = list(plain[text]), list(plain[label])
        names = getattr(thing.features[label], "names", None)
        if names is not None:  # a ClassLabel: numbers with names; -1 stands for none
            labels = [names[v] if isinstance(v, int) and 0 <= v < len(names) else None for v in labels]
    elif type(thing).__module__.partition(".")[0] == "pandas" and hasattr(thing, "columns"):
        columns = list(thing.columns)
        for name in (text, label):
            if columns.count(name) != 1:
                problem = unknown("column", name, columns) if name not in columns else f"two columns called {name!r}"
                raise KitError(f"{source}: {problem}")
        texts, labels = thing[text].tolist(), thing[label].tolist()
    else:
        raise KitError(
            f"{source} is a {type(thing).__name__}. Allowed: the path of a {', '.join(_SUFFIXES)} file, a "
            "datasets.Dataset or DatasetDict, a pandas DataFrame, or a hub data set as owner/name."
        )
    return _checked(source, texts, labels, _RowNumbers(len(texts)), text, label)


def _is_dict_of_tables(thing: Any) -> bool:
    return isinstance(thing, Mapping) and all(hasattr(value, "column_names") for value in thing.values())


def _dict_tables(tables: Any, test: Any, spec: DataSpec, source: str) -> tuple[_Rows, _Rows | float | None]:
    """Take training and test rows out of a DatasetDict."""
    if "train" not in tables:
        raise KitError(f"{source}: {unknown('split', 'train', tables)}")
    if isinstance(test, str) and test not in tables:
        raise KitError(f"{source}: {unknown('split', test, tables)}")
    train = _table(tables["train"], spec.text, spec.label, f"{source}, split train")
    if test is None and "test" in tables:
        test = "test"
    if isinstance(test, str):
        return train, _table(tables[test], spec.text, spec.label, f"{source}, split {test}")
    if test is None or isinstance(test, float):
        return train, test
    return train, _table(test, spec.text, spec.label, "test")


def _hub_tables(spec: DataSpec) -> tuple[_Rows, _Rows | float | None]:
    import datasets

    try:
        tables = datasets.load_dataset(spec.name, revision=spec.revision)
    except Exception as error:  # the hub's errors have no common base: network, name, licence, format
        raise KitError(
            f"the hub data set {spec.name!r} could not be loaded ({type(error).__name__}: "
            f"{_first_line(error)}). A file is named with its ending, e.g. data/train.csv."
        ) from error
    test: Any = spec.test
    if isinstance(test, str) and test not in tables and Path(test).suffix.lower() in _SUFFIXES:
        return _dict_tables(tables, None, spec, spec.name)[0], _test_table(spec)
    return _dict_tables(tables, test, spec, spec.name)


def _test_table(spec: DataSpec) -> _Rows | float | None:
    if not isinstance(spec.test, str):
        return spec.test
    path = _existing_file(spec.test)
    if path is None:
        raise KitError(f"data.test: there is no file {spec.test!r}")
    return _read_file(path, spec.text, spec.label)


def _checked(source: str, texts: list[Any], labels: list[Any], places: Sequence[str], text: str, label: str) -> _Rows:
    """Check every cell; name the first row at fault and how many more there are."""
    if not texts:
        raise KitError(f"{source} has no rows")

    def refuse(bad: list[int], problem: str) -> None:
        if bad:
            more = f" ({len(bad) - 1} more such row{'s' if len(bad) > 2 else ''})" if len(bad) > 1 else ""
            raise KitError(f"{source}, {places[bad[0]]}: {problem}{more}")

    rows = range(len(texts))
    refuse([i for i in rows if _missing(texts[i])], f"no text in column {text!r}")
    bad = [i for i in rows if not isinstance(texts[i], str)]
    if bad:
        kind = type(texts[bad[0]]).__name__
        refuse(bad, f"column {text!r} holds {texts[bad[0]]!r:.60} ({kind}), which is no text")
    refuse([i for i in rows if not texts[i].strip()], f"the text in column {text!r} is empty")
    refuse([i for i in rows if "\0" in texts[i]], f"the text in column {text!r} holds a NUL character")
    refuse([i for i in rows if not _encodable(texts[i])], f"the text in column {text!r} is no valid Unicode")
    refuse([i for i in rows if _missing(labels[i]) or labels[i] == ""], f"no label in column {label!r}")
    kinds = Counter(_kind(value) for value in labels)
    bad = [i for i in rows if _kind(labels[i]) is None]
    if bad:
        value = labels[bad[0]]
        refuse(bad, f"label {value!r:.60} ({type(value).__name__}); labels are text or whole numbers")
    if len(kinds) > 1:
        usual = kinds.most_common(1)[0][0]
        bad = [i for i in rows if _kind(labels[i]) != usual]
        refuse(bad, f"label {labels[bad[0]]!r:.60} where most labels are {usual}: make them one type")
    names = [value.strip() if isinstance(value, str) else str(value) for value in labels]
    refuse([i for i in rows if not names[i]], f"the label in column {label!r} is empty")
    refuse(
        [i for i in rows if "\0" in names[i] or not _encodable(names[i])],
        f"label {label!r} is no valid Unicode",
    )
    return _Rows(source, texts, names, places)


def _kind(label: Any) -> str | None:
    if isinstance(label, bool | np.bool_):
        return "true or false"
    if isinstance(label, int | np.integer):
        return "whole numbers"
    return "text" if isinstance(label, str) else None


def _missing(value: Any) -> bool:
    # pandas' NA and NaT are told by name, so that pandas is not imported for it.
    return (
        value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    )


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _refuse_cut_off(raw: bytes, rows: _Rows) -> None:
    """Refuse a last row that was cut off within its label: `card_arri` would become a class of its own."""
    last = rows.labels[-1]
    if raw.endswith((b"\n", b"\r")) or rows.labels.count(last) > 1:
        return
    whole = next((label for label in rows.labels if label != last and label.startswith(last)), None)
    if whole is not None:
        raise KitError(
            f"{rows.source}, {rows.places[-1]}: the file ends without a line break in label {last!r}, which "
            f"begins like {whole!r}: it seems to be cut off there. If it is whole, end it with a line break."
        )


# ---- splitting ----


def _from_parts(
    spec: DataSpec, train: _Rows, test: _Rows | float | None, names: tuple[str, ...] | None = None
) -> TextData:
    """Split, limit and check: the one way from rows to TextData."""
    if names is None:
        present = set(train.labels)
        whole = all(re.fullmatch(r"-?(0|[1-9]\d*)", name) for name in present)
        names = tuple(sorted(present, key=int) if whole else sorted(present))
    if len(names) < 2:
        raise KitError(f"{train.source}: every row has the label {names[0]!r}; a classifier needs two or more")
    index = {name: i for i, name in enumerate(names)}
    rng = np.random.RandomState(spec.split_seed % 2**32)
    pool = _as_split(train, index)
    if isinstance(test, _Rows):
        held = _as_split(test, index)
    else:
        if test is None:
            test = TEST_SHARE
            warnings.warn(
                f"no test data was named: {TEST_SHARE:.0%} of {train.source} is held out for it "
                f"(test={TEST_SHARE} says so without this message)",
                stacklevel=4,
            )
        pool, held = _hold_out(pool, test, rng, train.source, "test")
    pool, validation = _hold_out(pool, spec.validation, rng, train.source, "validation")
    single = [names[i] for i, count in sorted(Counter(pool.labels).items()) if count == 1]
    kept_whole = [name for name in single if train.labels.count(name) == 1]
    if kept_whole:
        warnings.warn(
            f"{train.source}: {len(kept_whole)} label{'s have' if len(kept_whole) > 1 else ' has'} one row only, "
            f"which is trained on and never validated: {', '.join(map(_short, kept_whole[:5]))}",
            stacklevel=4,
        )
    if spec.limit is not None and spec.limit < len(pool):
        classes = len(set(pool.labels))
        if spec.limit < classes:
            raise KitError(f"data.limit is {spec.limit}, but there are {classes} labels: allowed is {classes} or more")
        share = spec.limit / len(pool)
        pool = pool.take(_stratified(pool.labels, spec.limit, rng, least=1))
        validation = validation.take(_stratified(validation.labels, max(1, round(len(validation) * share)), rng))
        held = held.take(_stratified(held.labels, max(1, round(len(held) * share)), rng))
    return TextData(spec=spec, label_names=names, train=pool, validation=validation, test=held)


def _as_split(rows: _Rows, index: Mapping[str, int]) -> Split:
    for i, name in enumerate(rows.labels):
        if name not in index:
            guess = nearest(name, index)
            raise KitError(
                f"{rows.source}, {rows.places[i]}: label {_short(name)} is none of the {len(index)} labels of "
                "the training rows" + (f"; did you mean {guess!r}?" if guess else "")
            )
    return Split(tuple(rows.texts), tuple(index[name] for name in rows.labels))


def _hold_out(pool: Split, share: float, rng: np.random.RandomState, source: str, what: str) -> tuple[Split, Split]:
    """Split `share` of the rows off, stratified; every label keeps at least one row in the first part."""
    size = math.ceil(len(pool) * share - 1e-9)
    classes = len(set(pool.labels))
    if size > len(pool) - classes:
        raise KitError(
            f"{source}: {len(pool)} rows of {classes} labels are too few to hold out {size} for {what} "
            f"(data.{what}={share:g}) and keep one of each label to train on"
        )
    chosen = _stratified(pool.labels, size, rng, keep=1)
    rest = np.setdiff1d(np.arange(len(pool)), chosen)
    return pool.take(rest.tolist()), pool.take(chosen)


def _stratified(
    labels: Sequence[int], size: int, rng: np.random.RandomState, *, least: int = 0, keep: int = 0
) -> list[int]:
    """Choose `size` rows, each label by its share (largest remainder), in the order they stand.

    Args:
        labels: A class a row.
        size: How many to choose.
        rng: Random state; equal states choose equal rows.
        least: Fewest rows of each label to choose.
        keep: Fewest rows of each label to leave.

    Returns:
        Ascending indices.
    """
    array = np.asarray(labels)
    classes, counts = np.unique(array, return_counts=True)
    exact = counts * (size / len(array))
    upper = counts - keep
    quota = np.clip(np.floor(exact).astype(int), np.minimum(least, upper), upper)
    tie = rng.permutation(len(classes))  # so that equal remainders don't always favour the first labels
    while quota.sum() < size:
        gain = np.where(quota < upper, exact - quota, -np.inf)
        quota[max(range(len(classes)), key=lambda i: (gain[i], tie[i]))] += 1
    while quota.sum() > size:
        loss = np.where(quota > least, quota - exact, -np.inf)
        quota[max(range(len(classes)), key=lambda i: (loss[i], tie[i]))] -= 1
    chosen = [rng.permutation(np.flatnonzero(array == c))[:q] for c, q in zip(classes, quota, strict=True)]
    return sorted(np.concatenate(chosen).tolist())


# ---- small things ----


def _token_ids(tokenizer: Any, texts: list[str], chunk: int = 10_000) -> list[list[int]]:
    ids: list[list[int]] = []
    for start in range(0, len(texts), chunk):
        part = texts[start : start + chunk]
        ids += tokenizer(part, truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
    return ids


def _fold(text: str) -> str:
    return " ".join(text.casefold().split())


def _summary(values: Iterable[int]) -> dict[str, float]:
    array = np.asarray(list(values), dtype=np.int64)
    return {
        "mean": round(float(array.mean()), 2),
        "median": float(np.median(array)),
        "p95": float(np.percentile(array, 95)),
        "max": int(array.max()),
    }


def _short(text: str, most: int = 40) -> str:
    return repr(text if len(text) <= most else text[:most] + "…")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _line_at(raw: bytes, position: int) -> int:
    """Return the line of a byte, counted from 1 as an editor does (CRLF, LF and CR each end a line)."""
    return raw[:position].replace(b"\r\n", b"\n").replace(b"\r", b"\n").count(b"\n") + 1


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise KitError(f"there is no {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise KitError(f"{path} cannot be read: {_first_line(error)}") from error
