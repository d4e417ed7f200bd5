"""Building blocks of rules: figures, findings, verdicts, intervals, and numbers as text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .limits import RELEVANT

if TYPE_CHECKING:
    from .records import Records

HOLDS, IN_PART, FAILS, UNMEASURED = "holds", "holds in part", "does not hold", "not measured here"
UNDECIDED = "not told apart here"
NO_MEASUREMENT = "no measurement decides"
VERDICTS = (HOLDS, IN_PART, FAILS, UNDECIDED, UNMEASURED, NO_MEASUREMENT)

EXPLANATION, REPORT, IMPLIED = "the explanation", "the run's later report", "read into the explanation"
SAYS = (EXPLANATION, REPORT, IMPLIED)
ARITHMETIC = "arithmetic"
"""The `device` of a figure that is computed, not measured."""

_UNITS = ("", "bytes", "share", "seconds", "macro F1")  # `number` formats these; others follow the number


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number that a verdict rests on.

    Args:
        name: What it is.
        value: The number, in the unit.
        unit: `bytes`, `seconds`, `share` (shown in percent), `macro F1` (a difference of it), any other word, or
            empty for a plain number.
        device: Where it was measured; `arithmetic` or `planned for a T4` if it was not measured.
        source: The record that it is from.
        low: Lower end of its 95% interval, if it has one.
        high: Upper end.
    """

    name: str
    value: float
    unit: str
    device: str
    source: str
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        text = f"{self.name}: {number(self.value, self.unit)}"
        if self.low is not None and self.high is not None:
            text += f" ({span((self.low, self.high), self.unit)})"
        return text + (f" {self.unit}" if self.unit not in _UNITS else "")


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a rule returns.

    Args:
        verdict: One of `VERDICTS`.
        reason: One or a few sentences with the figures that decided.
        figures: The figures that decided.
        beside: Other measured figures, which decided nothing.
        command: The command that measures missing evidence, on a suitable machine; empty if nothing is missing.
    """

    verdict: str
    reason: str
    figures: tuple[Figure, ...] = ()
    beside: tuple[Figure, ...] = ()
    command: str = ""


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence, or half of one, and how to judge it.

    Args:
        number: Its number.
        group: What it is about: `size`, `memory`, `speed`, `schemes`, `stability`, `accuracy`, `bookkeeping` or
            `pictures`.
        text: The claim's wording.
        why: Why it is worth checking.
        rule: From records to a finding.
        part: `a`, `b`, ... if a sentence says several things that are judged separately; else empty.
        says: Its source, one of `SAYS`.
    """

    number: int
    group: str
    text: str
    why: str
    rule: Callable[[Records], Finding]
    part: str = ""
    says: str = EXPLANATION

    @property
    def name(self) -> str:
        """Number and part, e.g. `3a`."""
        return f"{self.number}{self.part}"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A claim and its rule's finding."""

    claim: Claim
    finding: Finding

    @property
    def devices(self) -> tuple[str, ...]:
        """Devices of the figures that decided, each once."""
        return tuple(dict.fromkeys(figure.device for figure in self.finding.figures))


# --- from parts to a verdict ------------------------------------------------------------------------------------


def judge(parts: Iterable[bool]) -> str:
    """Return the verdict: `HOLDS` if all parts of a claim are true, `IN_PART` if some are, `FAILS` if none is."""
    known = list(parts)
    return HOLDS if all(known) else IN_PART if any(known) else FAILS


def judge_sides(sides: Iterable[int]) -> str:
    """Judge several comparisons, some of which may be undecided.

    Args:
        sides: For each comparison: 1 if it supports the claim, -1 if it contradicts it, 0 if undecided.

    Returns:
        `HOLDS` if all support the claim, `IN_PART` if some do. If none does: `FAILS` if one contradicts it, else
        `UNDECIDED`.
    """
    known = list(sides)
    if known and all(side > 0 for side in known):
        return HOLDS
    if any(side > 0 for side in known):
        return IN_PART
    return FAILS if any(side < 0 for side in known) else UNDECIDED


def side(low: float, high: float, level: float = 0.0) -> int:
    """Return 1 for an interval above `level`, -1 for one below, 0 for one that contains it."""
    return 1 if low > level else -1 if high < level else 0


def unmeasured(missing: str, command: str, figures: Sequence[Figure] = ()) -> Finding:
    """Return the finding for missing evidence, with the command that measures it and other figures to show."""
    return Finding(UNMEASURED, f"{missing}. To measure it: {command}", (), tuple(figures), command)


# --- seeds ------------------------------------------------------------------------------------------------------


def seed_interval(differences: Sequence[float] | np.ndarray) -> dict[str, float] | None:
    """Return the mean of paired differences with Student's 95% interval over seeds.

    Args:
        differences: One for each seed, first contender minus second.

    Returns:
        `{"value", "low", "high"}`, or None for fewer than two: mean ± t(n - 1) · s / √n (Student 1908).
    """
    import scipy.stats

    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return None
    mean, error = float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
    reach = float(scipy.stats.t.ppf(0.975, len(values) - 1)) * error
    return {"value": mean, "low": mean - reach, "high": mean + reach}


def by_seed(first: Iterable[Mapping[str, Any]], second: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    """Return first minus second of `key` for each common seed, in the order of the seeds.

    A seed with several rows counts once, with the mean of its values; rows without the value are left out.
    """
    sides = []
    for rows in (first, second):
        found: dict[int, list[float]] = {}
        for row in rows:
            if row.get(key) is not None:
                found.setdefault(row["seed"], []).append(row[key])
        sides.append({seed: math.fsum(values) / len(values) for seed, values in found.items()})
    return [sides[0][seed] - sides[1][seed] for seed in sorted(set(sides[0]) & set(sides[1]))]


# --- times ------------------------------------------------------------------------------------------------------


def told_apart(ratio: Figure) -> str:
    """Say what a ratio of two times shows: `faster`, `not faster`, or `not told apart` if its range includes 1.

    Args:
        ratio: First time divided by second, with its range `low` to `high`.
    """
    assert ratio.low is not None and ratio.high is not None
    return "faster" if ratio.high < 1 else "not faster" if ratio.low >= 1 else "not told apart"


def in_words(ratios: Sequence[Figure], other: str = "LoRA") -> tuple[str, str]:
    """Judge `the first is faster` by ratios of times, with the verdict in words.

    Args:
        ratios: The first's time divided by the other's, each with its range; at least one.
        other: The name of the other.

    Returns:
        The verdict, and the words, e.g. `not faster in 2 of 3 comparisons (1.1 to 1.2 times LoRA's time)`.
    """
    names = ("faster", "not faster", "not told apart")
    found_by_side = {name: [one for one in ratios if told_apart(one) == name] for name in names}
    words = []
    for name, found in found_by_side.items():
        if found:
            count = "" if len(found) == len(ratios) else f" in {len(found)} of {len(ratios)} comparisons"
            values = [one.value for one in found]
            if name == "not told apart":
                # For undecided ratios, the ends of the ranges say more than the values.
                values = [end for one in found for end in (one.low, one.high) if end is not None]
            ends = list(dict.fromkeys(_beside_one(value) for value in (min(values), max(values))))
            words.append(f"{name}{count} ({' to '.join(ends)} times {other}'s time)")
    sides = {"faster": 1, "not faster": -1, "not told apart": 0}
    return judge_sides(sides[told_apart(one)] for one in ratios), ", ".join(words)


def _beside_one(value: float) -> str:
    """Return a ratio with enough digits to show which side of 1 it is on: 0.9999 must not read 1."""
    texts = (f"{value:.{digits}g}" for digits in range(4, 18))
    return next(text for text in texts if (float(text) > 1, float(text) < 1) == (value > 1, value < 1))


def ratio(first: tuple[float, float, float], second: tuple[float, float, float]) -> dict[str, float]:
    """Return the ratio of two times with its range, which excludes 1 only if the two ranges do not overlap."""
    return {"value": first[0] / second[0], "low": first[1] / second[2], "high": first[2] / second[1]}


# --- numbers as text --------------------------------------------------------------------------------------------


def number(value: float, unit: str) -> str:
    """Return a number as text in its unit. A number that rounds to zero has no sign: 0.0000, not -0.0000."""
    if unit == "bytes":
        text = f"{value / 2**30:,.2f} GiB" if abs(value) >= 2**31 else f"{value / 2**20:,.1f} MiB"
    elif unit == "share":
        text = f"{value:.2%}" if abs(value) < RELEVANT else f"{value:.1%}"
    elif unit == "seconds":
        text = f"{value * 1000:.1f} ms" if abs(value) < 1 else f"{value:,.1f} s"
    elif unit == "macro F1":
        text = f"{value:+.4f}"
    else:
        text = f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.4g}"
    return text if any(digit in text for digit in "123456789") else text.lstrip("+-")


def span(values: Iterable[float], unit: str = "share") -> str:
    """Return the smallest and the largest of some numbers as text, or just one if both texts are the same."""
    known = list(values)
    low, high = number(min(known), unit), number(max(known), unit)
    return low if low == high else f"{low} to {high}"
