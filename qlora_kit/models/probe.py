"""Test that tokenizer and base fit together, and that a text's result does not depend on other texts.

A classifier's result for a text must not change if the text is padded, if a longer text is in the same batch, or after
another text was read. Some models break this rule: they mix padding into the text, pool the last column even if it is
padding, or change themselves while they run.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import KitError

Forward = Callable[[dict[str, torch.Tensor]], torch.Tensor]

# The name in records for layers that also round their input.
ROUNDED = "int8"
# How far a text's logits may move, as a share of the distance between the logits of different texts. Rounding alone
# stays well below it (MiniLM, SmolLM2). Models that read their padding, as ConvBERT's convolution and FNet do, are
# above it in 32 bits. int8 layers also round their input, and leave out columns with large values in any row of the
# batch.
TOLERANCE = {"fp32": 0.001, "fp16": 0.05, "bf16": 0.05, ROUNDED: 0.1}


def check_vocabulary(tokenizer: Any, rows: int | None, name: str) -> None:
    """Refuse a tokenizer that knows no words, or whose texts get tokens that the base has no embedding for.

    Args:
        tokenizer: A transformers tokenizer.
        rows: Tokens that the base has embeddings for; None where its configuration does not say.
        name: What the base is called.

    Raises:
        KitError: When it does not fit; the message has both numbers of tokens where they differ.
    """
    ids = tokenizer.get_vocab()
    if not ids.keys() - {*tokenizer.all_special_tokens, *tokenizer.special_tokens_map.values()}:
        # transformers makes such a tokenizer if a folder has none; every word is then unknown.
        raise KitError(
            f"the tokenizer of {name} knows no words, only {len(ids)} special tokens: its files (tokenizer.json, or "
            "vocab.txt and the like) are missing"
        )
    if tokenizer.pad_token_id is None:
        raise KitError(f"the tokenizer of {name} does not know its own pad token {tokenizer.pad_token!r}")
    if rows is None:
        return
    # Some tokenizers have a token for the end or for images that texts do not normally contain, and the base has no
    # embedding for it (Gemma 3). A text that does contain it is refused when it is read (`data.tokenize`).
    named = {token for kind, token in tokenizer.special_tokens_map.items() if kind not in ("pad_token", "unk_token")}
    around = set(tokenizer("a")["input_ids"])
    beyond = [
        (place, token) for token, place in ids.items() if place >= rows and (token not in named or place in around)
    ]
    if beyond:
        place, token = min(beyond)
        raise KitError(
            f"the tokenizer of {name} has {max(ids.values()) + 1} tokens and the base embeddings for {rows}, allowed "
            f"are no more: {token!r} is number {place}. Take the base's own tokenizer, or leave out what was added"
        )


@dataclasses.dataclass(frozen=True)
class Texts:
    """The few texts that a model is tested with.

    Args:
        vocabulary: Their token ids are below this.
        special: Token ids that they do not contain.
        pad_token_id: The token that they are padded with; one of them ends in it.
        side: The side on which they are padded: `right` or `left`.
        shortest: Tokens of the shortest text.
        longest: Tokens of the longest text.
    """

    vocabulary: int
    special: set[int]
    pad_token_id: int
    side: str
    shortest: int
    longest: int

    def ids(self) -> list[list[int]]:
        """Return the token ids of five texts; they are the same in every call."""
        drawn = torch.randperm(self.vocabulary, generator=torch.Generator().manual_seed(0)).tolist()[:256]
        words = [word for word in drawn if word not in self.special]
        lengths = [min(length, self.longest) for length in (self.longest, 9, 5, self.shortest)]
        found = [
            [words[(7 * row + place) % len(words)] for place in range(length)] for row, length in enumerate(lengths)
        ]
        return [*found, [*found[1][:-1], self.pad_token_id]]

    def batch(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """Return texts padded to the longest: `input_ids` and `attention_mask`, int64 `[texts, length]`."""
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad_token_id)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for row, text in enumerate(rows):
            place = slice(width - len(text), width) if self.side == "left" else slice(0, len(text))
            ids[row, place], mask[row, place] = torch.tensor(text), 1
        return {"input_ids": ids, "attention_mask": mask}


def neighbours(forward: Forward, model: nn.Module, texts: Texts, *, name: str, precision: str) -> dict[str, Any]:
    """Run a few texts alone, again, and padded beside each other, and compare their logits.

    Args:
        forward: Runs a batch of `input_ids` and `attention_mask`, int64 `[texts, length]`, and returns the logits,
            `[texts, classes]`.
        model: The model that `forward` runs; its modules are searched for values that change.
        texts: The texts that it is tested with.
        name: What the model is called.
        precision: The precision of `forward`, a key of `TOLERANCE`.

    Returns:
        For the run's record: `texts`, `side`, `precision`; `padded` and `again`, the most that a text's logits moved
        beside others and after others, as a share of the distance between different texts (None if all texts have the
        same result); `tolerance` of these; `seconds`.

    Raises:
        KitError: When a text's result depends on texts beside it or before it, or is not finite.
    """
    began, before = time.perf_counter(), _switches(model)
    rows = texts.ids()
    alone = torch.cat([forward(texts.batch([row])) for row in rows])
    again = forward(texts.batch(rows[:1]))
    # One batch of all texts, as wide as the longest, would take seconds on a CPU.
    companies = [[1, 2, 3, 4], [4, 3, 2, 1], [2, 0]]
    together = torch.cat([forward(texts.batch([rows[place] for place in places])) for places in companies])
    wanted = torch.cat([alone[places] for places in companies])
    if not all(bool(logits.isfinite().all()) for logits in (alone, again, together)):
        raise KitError(
            f"{name} gives logits that are not finite in {precision} before any training: its weights are damaged"
            + ("" if precision == "fp32" else ", or overflow: training.precision: fp32 may work")
        )
    between = float((alone.amax(0) - alone.amin(0)).max())

    def moved(found: torch.Tensor, wanted: torch.Tensor) -> float | None:
        return float((found - wanted).abs().max()) / between if between else None

    result = {
        "texts": len(rows),
        "side": texts.side,
        "precision": precision,
        "padded": moved(together, wanted),
        "again": moved(again, alone[:1]),
        "tolerance": TOLERANCE[precision],
        "seconds": time.perf_counter() - began,
    }
    for kind, where in (("again", "after a short one"), ("padded", f"padded on the {texts.side} beside a longer one")):
        share: Any = result[kind]
        if share is not None and share > result["tolerance"]:
            now = _switches(model)
            changed = [f"{key} is now {now.get(key)!r}" for key, value in before.items() if now.get(key) != value]
            raise KitError(
                f"{name} gives a text another result {where}: its logits move by {share:.1%} of what lies between "
                f"different texts, allowed is {result['tolerance']:.1%}. Predictions would depend on other texts"
                + (f"; it changes itself: {', '.join(changed[:3])}" if changed else "")
                + ". Choose another base, or try a smaller data.max_length"
            )
    return result


def _switches(model: nn.Module) -> dict[str, Any]:
    """Return the plain values that a model's modules hold, by name."""
    return {
        f"{type(module).__name__} {f'{name}.{key}'.lstrip('.')}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, bool | int | str)
    }
