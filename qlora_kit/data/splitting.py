"""Splitting: stratified by label, with equal texts kept on one side of a split."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

# Invisible characters: control characters other than spaces, Unicode's Default_Ignorable_Code_Point (zero-width
# characters, joiners, fillers, variation selectors, tags), and the Braille blank.
_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]"
)
_ASCII_MARKS = {
    ord(mark): plain for plain, marks in (("'", "‘’‚‛ʼ′"), ('"', "“”„‟″"), ("-", "‐‑‒–—―−")) for mark in marks
}


def as_seen(text: str) -> str:
    """Return a text without invisible characters, in NFKC, with plain ASCII quotation marks and dashes."""
    return unicodedata.normalize("NFKC", _UNSEEN.sub("", text)).translate(_ASCII_MARKS)


def fold(text: str) -> str:
    """Return a normalized text; the kit treats two texts as equal if their normalized texts are equal.

    Ignored are case, spaces, punctuation at the ends of words, Unicode's compatible and composed forms (NFKC), the
    forms of quotation marks and dashes, and invisible characters (such as the zero-width space).

    Args:
        text: A text.
    """
    text = as_seen(text).casefold()
    # Marks inside a word are kept, and so are # % & @: in C#, 50% or R&D they are part of the meaning.
    marks = "".join(c for c in set(text) if unicodedata.category(c).startswith("P") and c not in "#%&@")
    words = [word for word in (word.strip(marks) for word in text.split()) if word]
    return " ".join(words or text.split())


def stratified(
    labels: Sequence[int], size: int, rng: np.random.RandomState, *, least: int = 0, keep: int = 0
) -> list[int]:
    """Choose `size` rows in proportion to the labels (largest remainder method).

    Args:
        labels: The class of each row.
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


def undivided(texts: Sequence[str], labels: Sequence[int], chosen: list[int], rng: np.random.RandomState) -> list[int]:
    """Exchange chosen rows so that equal texts (see `fold`) are all chosen or all not chosen.

    Groups of equal texts that were split are removed from the choice. Whole groups are chosen instead, with the same
    labels if possible. At least one row of each label stays unchosen.

    Args:
        texts: The rows' texts.
        labels: The class of each row.
        chosen: Indices of the chosen rows.
        rng: Random state of the split. Only a copy is drawn from, so that later draws do not change.

    Returns:
        Ascending indices, about as many as before. If no group of equal texts can be chosen (e.g. every row has the
        same text), `chosen` unchanged.
    """
    groups: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        groups.setdefault(fold(text), []).append(row)
    taken = set(chosen)
    divided = [row for rows in groups.values() if len({row in taken for row in rows}) > 1 for row in rows]
    if not divided:
        return chosen
    missing = Counter(labels[row] for row in divided if row in taken)
    taken.difference_update(divided)
    left = Counter(label for row, label in enumerate(labels) if row not in taken)
    draw = np.random.RandomState()
    draw.set_state(rng.get_state())
    waiting = [rows for rows in groups.values() if rows[0] not in taken]
    waiting = [waiting[i] for i in draw.permutation(len(waiting))]

    def take(rows: list[int]) -> None:
        counts = Counter(labels[row] for row in rows)
        if rows[0] not in taken and all(count < left[label] for label, count in counts.items()):
            taken.update(rows)
            left.subtract(counts)
            missing.subtract(counts)

    for rows in waiting:
        if Counter(labels[row] for row in rows) <= missing:
            take(rows)
    for rows in waiting:  # of any label, if a group was larger than the rows its label still needed
        if len(rows) <= len(chosen) - len(taken):
            take(rows)
    for rows in sorted(waiting, key=len):
        if not taken:  # every group is too large: take the smallest possible one
            take(rows)
    return sorted(taken) or chosen
