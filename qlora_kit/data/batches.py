"""Tokenize texts, and make batches of texts of similar length."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import KitError, unknown, warn
from ..system.showing import counted
from .tables import short, texts_of

if TYPE_CHECKING:
    import torch

# Widths for fixed shapes. Fine steps for short texts keep padding small; there are few because each costs a CUDA graph.
BUCKET_EDGES = (8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
PADDINGS = ("buckets", "longest", "max_length")
UNKNOWN_SHARE = 0.05  # warn from this share of unknown tokens on: the tokenizer does not fit the texts


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
        too_long: `cut` shortens longer texts and warns once how many; `refuse` raises on the first.
        what: What the texts are, for messages, e.g. `"training text"`.

    Returns:
        A list of token ids for each text, at most `max_length` each, not padded.

    Raises:
        KitError: If a text is too long and `too_long` is `refuse`, a text gives no token or a token without an
            embedding in the base, `max_length` is more than the tokenizer's `model_max_length`, or `texts` are not
            texts (see `sources.texts_of`).
    """
    if max_length > tokenizer.model_max_length:
        raise KitError(
            f"data.max_length is {max_length}, but this model reads at most {tokenizer.model_max_length} tokens"
        )
    texts = texts_of(texts, call="tokenize")
    ids = token_ids(tokenizer, texts)
    rows = getattr(tokenizer, "embeddings", None)
    for i, tokens in enumerate(ids):
        if not tokens:
            raise KitError(f"{what} {i + 1} ({short(texts[i])}) has no token that this tokenizer knows")
        if rows is not None and max(tokens) >= rows:
            token = tokenizer.convert_ids_to_tokens(max(tokens))
            raise KitError(
                f"{what} {i + 1} ({short(texts[i])}) has the token {token!r}, number {max(tokens)}, and the base "
                f"embeddings for {rows} tokens"
            )
    share = unknown_share(tokenizer, ids)
    if share >= UNKNOWN_SHARE:
        warn(
            f"{share:.0%} of the tokens of {counted(len(texts), what)} are unknown to this "
            "tokenizer: the model cannot tell them apart. Take a base that was trained on such texts"
        )
    long = [i for i, tokens in enumerate(ids) if len(tokens) > max_length]
    if long and too_long == "refuse":
        raise KitError(
            f"{what} {long[0] + 1} ({short(texts[long[0]])}) has {len(ids[long[0]])} tokens, more than "
            f"data.max_length={max_length} ({len(long)} such of {len(texts)}); raise it, or set "
            "data.too_long to cut"
        )
    if long:
        cut = tokenizer([texts[i] for i in long], truncation=True, max_length=max_length)["input_ids"]
        tokenizer(" ")  # reset: a fast tokenizer keeps its last truncation setting and would be saved with it
        for i, tokens in zip(long, cut, strict=True):
            ids[i] = tokens
        warn(f"{len(long)} of {counted(len(texts), what)} cut to {max_length} tokens")
    return ids


def token_lengths(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """Return the number of tokens of each text, special tokens included, before cutting."""
    return np.array(
        [len(tokens) for tokens in token_ids(tokenizer, texts_of(texts, call="token_lengths"))], dtype=np.int64
    )


def unknown_share(tokenizer: Any, ids: Iterable[Sequence[int]]) -> float:
    """Return the share of unknown tokens in texts, without the special tokens around the texts.

    Args:
        tokenizer: A transformers tokenizer.
        ids: The tokens of each text.
    """
    # If the unknown token is also the start or end token (GPT-2), the tokenizer knows every byte.
    around = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
    if tokenizer.unk_token_id is None or tokenizer.unk_token_id in around:
        return 0.0
    counts = Counter(token for tokens in ids for token in tokens)
    known = sum(count for token, count in counts.items() if token not in around)
    return counts[tokenizer.unk_token_id] / known if known else 0.0


class TokenizedDataset:
    """Tokenized rows for a DataLoader: item i is `{"input_ids", "attention_mask", "labels"}`, not padded.

    Args:
        input_ids: A list of token ids for each row.
        labels: The class of each row, or None (then items have no `labels`).

    Raises:
        KitError: When the numbers of labels and rows differ.
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
    """Make a batch of tensors from rows; see `collator`."""

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
        return max(width, longest)  # rows longer than max_length are allowed here on purpose

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
        padding: `longest` and `buckets` pad to the batch's longest row (with `buckets`, `LengthBatchSampler` puts
            rows of similar length into a batch); `max_length` pads to `max_length`.
        max_length: The width for `max_length`; `edges` never pad wider than this.
        pad_to_multiple_of: Round the width up to a multiple of this.
        side: `right` or `left`.
        edges: Ascending widths, e.g. `BUCKET_EDGES`: pad to the first that is wide enough, so that there are few
            shapes. A CUDA graph is captured once for each shape.

    Returns:
        A picklable callable, so that loader workers can use it.

    Raises:
        KitError: For an unknown padding or side, with the nearest known one.
    """
    if padding not in PADDINGS:
        raise unknown("padding", padding, PADDINGS)
    if side not in ("right", "left"):
        raise unknown("padding side", side, ("right", "left"))
    return Collator(
        pad_token_id, padding, max_length, pad_to_multiple_of, side, None if edges is None else tuple(edges)
    )


def bucket_width(length: int, edges: Sequence[int] = BUCKET_EDGES) -> int:
    """Return the first of the ascending `edges` that is at least `length`, or `length` if it is beyond the last."""
    return next((edge for edge in edges if edge >= length), length)


def edges_of(device: torch.device) -> tuple[int, ...] | None:
    """Return the widths to pad batches to on a device (CUDA graphs need fixed shapes), or None for any width."""
    return BUCKET_EDGES if device.type == "cuda" else None


class LengthBatchSampler:
    """Order the rows of an epoch so that each `batch_size` consecutive rows have similar lengths.

    Rows are shuffled, sorted by length within windows of `window` batches, cut into batches, and the batches are
    shuffled: batches stay random, with hardly any padding. An incomplete batch comes last, so that a DataLoader
    that cuts every `batch_size` rows cuts at the batch borders. In the first epoch the batch with the longest row
    comes first, so that running out of memory happens at once, not after an hour.

    The order depends only on (lengths, batch_size, window, edges, seed, epoch): a resumed run, another process or
    another number of workers sees the same.

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
        """Set the epoch whose order the next iteration uses."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch).tolist())

    def order(self, epoch: int) -> np.ndarray:
        """Return the rows' indices in the order of `epoch`, shape [rows]."""
        n, size = len(self.lengths), self.batch_size
        # RandomState, not Generator: numpy guarantees its streams, so that an old run can be reproduced.
        rng = np.random.RandomState([self.seed % 2**32, epoch % 2**32])
        rows = rng.permutation(n)
        keys, windows = self.lengths, max(1, round(n / size / self.window))
        if self.edges is not None:
            keys, windows = np.array([bucket_width(int(length), self.edges) for length in self.lengths]), 1
        rest = rows[n - n % size :]  # random rows, so that the incomplete batch does not always get the longest
        full = rows[: n - n % size]
        batches: list[np.ndarray] = []
        for some in np.array_split(np.arange(len(full) // size), windows):  # windows of equal size, no small last one
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
        max_length: The width for `max_length`.
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


# ---- small things ----


def token_ids(tokenizer: Any, texts: list[str], chunk: int = 10_000) -> list[list[int]]:
    """Return texts as token ids, not cut; tokenize `chunk` texts at a time."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), chunk):
        part = texts[start : start + chunk]
        ids += tokenizer(part, truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
    return ids
