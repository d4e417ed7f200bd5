"""Say in one sentence whether fine-tuning was worth it, from what `evaluation.json` holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import schemas
from ..errors import KitError
from ..system.arguments import COUNT, takes
from ..system.showing import counted, lines_as_html, one_line, table_as_html
from .differences import lead_in_words, with_interval

if TYPE_CHECKING:
    import pandas as pd

# Names of the baselines in figures, tables and sentences, in the order in which they are shown.
BASELINE_NAMES = {"embedding_svm": "SVM on frozen states", "tfidf_svm": "SVM on TF-IDF"}
# A score is called unsure if its 95% interval is at least this wide.
WIDE = 0.1
_SHOWN = {"accuracy": "accuracy", "f1_macro": "macro F1"}


def verdict(evaluation: Mapping[str, Any]) -> str:
    """Say in one sentence how good a run is on its test rows, and whether a simpler classifier does as well.

    The run counts as ahead of a baseline, or behind it, if the 95% interval of the paired difference in macro F1 does
    not contain 0. Otherwise the test rows do not tell the two apart.

    Args:
        evaluation: What `evaluation.json` holds, or what `evaluate` returned.

    Returns:
        One sentence. A baseline that is ahead of the run is named first. It also says when scores mean nothing
        (random weights; every test text was also trained on), when no baseline was fitted, when labels have no test
        rows, and when few test rows leave the score unsure.

    Raises:
        KitError: For what is not, or not wholly, what `evaluate` returns.
    """
    with _as_a_report(evaluation):
        return _verdict(evaluation)


@contextlib.contextmanager
def _as_a_report(evaluation: Any) -> Iterator[None]:
    """Refuse in one line what turns out, while it is read, not to be a whole report of `evaluate`."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        found = schemas.problems(evaluation, "evaluation.json")
        what = found[0] if found else f"{type(error).__name__} {error}"
        raise KitError(f"this is no whole report of evaluate, which made evaluation.json: {what}") from error


def _verdict(evaluation: Mapping[str, Any]) -> str:
    """Return the sentence; see `verdict`."""
    metrics = evaluation["metrics"]
    test = metrics["test"]["f1_macro"]
    score = f"macro F1 {_with_interval(test)}"
    if evaluation.get("random_weights"):
        return f"The base has random weights, so the scores mean nothing: {score}."
    clean = metrics.get("test_without_leaked", metrics["test"])
    if clean is None:
        return f"Every test text was also trained on, so the scores say nothing about new texts: {score}."
    notes = [note for note in (unsure(test, _test_rows(evaluation)), untested_labels(evaluation["per_label"])) if note]
    if not test["low"] <= clean["f1_macro"]["value"] <= test["high"]:
        notes.append(f"{clean['f1_macro']['value']:.3f} without the test texts that were also trained on")
    score = "; ".join([score.removesuffix(")"), *notes]) + ")"
    leads = {
        name: row["ahead"]["f1_macro"]
        for name, row in _in_order(metrics.get("baselines") or {}).items()
        if "ahead" in row  # older records do not compare on the same rows
    }
    if not leads:
        return f"M{score[1:]}; no baseline was tested beside it, so whether a plain SVM does as well is not known."
    return _compared(score, leads)


def untested(training: Mapping[str, Any]) -> str:
    """Say in one sentence how good a run is on its validation rows, before it is tested.

    Args:
        training: What `training.json` holds.
    """
    score = f"macro F1 {_with_interval(training['metrics']['validation']['f1_macro'])}"
    rows = training["rows"]["validation"]
    score += f" on {counted(rows, 'validation row')}"
    if training["random_weights"]:
        return f"The base has random weights, so the scores mean nothing: {score}."
    few = unsure(training["metrics"]["validation"]["f1_macro"], rows, "validation")
    score += f" ({few})" if few else ""
    return f"Not tested yet: {score}; `evaluate` says whether a plain SVM does as well."


def unsure(score: Mapping[str, float], rows: int | None = None, split: str = "test") -> str:
    """Say whether a score is unsure, as too few rows were tested: its 95% interval is at least `WIDE` wide.

    Args:
        score: `value`, `low` and `high`.
        rows: How many rows were tested, if that is known.
        split: Which rows they are, `test` or `validation`.

    Returns:
        Some words, or nothing if the score is sure enough.
    """
    # In older records rows that are all right have an interval of no width; up to 3 / rows of others may be wrong (rule
    # of three).
    if max(score["high"] - score["low"], 3 / rows if rows else 0) < WIDE:
        return ""
    many = f"only {counted(rows, f'{split} row')}" if rows else f"few {split} rows"
    return f"unsure, as there {'is' if rows == 1 else 'are'} {many}"


def untested_labels(per_label: Sequence[Mapping[str, Any]]) -> str:
    """Say how many labels have no test row, so that nothing is known of them; nothing if all have some.

    Args:
        per_label: What `per_label` returned.
    """
    lacking = sum(not row["support"] for row in per_label)
    return (
        f"{lacking:,} of {len(per_label):,} labels {'has' if lacking == 1 else 'have'} no test row" if lacking else ""
    )


def weakest(per_label: Iterable[Mapping[str, Any]], most: int = 3) -> list[dict[str, Any]]:
    """Return the labels with the lowest F1, the lowest first; labels without test rows are left out.

    Args:
        per_label: What `per_label` returned.
        most: How many.

    Returns:
        Their rows of `per_label`.
    """
    tested = (dict(row) for row in per_label if row["support"])
    return sorted(tested, key=lambda row: (row["f1"], row["label"]))[:most]


def _compared(score: str, leads: Mapping[str, Mapping[str, float]]) -> str:
    """Return the sentence about a score and the run's lead over each baseline."""
    sides: dict[str, list[str]] = {"behind": [], "ahead": [], "apart": []}
    for name, gap in leads.items():
        place = lead_in_words(gap)
        if place in ("ahead", "behind"):
            sides[place].append(f"the {_spoken(name)} by {_size(gap['value'])}")
        else:
            sides["apart"].append(f"the {_spoken(name)}")
    parts = {
        "behind": f"behind {' and '.join(sides['behind'])}",
        "ahead": f"ahead of {' and '.join(sides['ahead'])}",
        "apart": f"no clear difference from {' or '.join(sides['apart'])}",
    }
    said = {side: parts[side] for side in ("behind", "ahead", "apart") if sides[side]}
    simpler = "the simpler one" if len(sides["behind"] or sides["apart"]) == 1 else "one of the simpler ones"
    if "behind" in said:
        first, *rest = said.values()
        more = f"; {'; '.join(rest)}" if rest else ""
        return f"B{first[1:]}, with {score}{more}: take {simpler}, or look for better settings."
    end = f"{simpler} may be enough" if "apart" in said else "fine-tuning gave the better classifier"
    return f"M{score[1:]}: {'; '.join(said.values())}: {end}."


def _in_order(baselines: Mapping[str, Any]) -> dict[str, Any]:
    """Return the baselines with TF-IDF, the simplest, first."""
    known = [name for name in reversed(BASELINE_NAMES) if name in baselines]
    return {name: baselines[name] for name in [*known, *(name for name in baselines if name not in known)]}


def _spoken(name: str) -> str:
    return BASELINE_NAMES.get(name, one_line(name))


def _size(value: float) -> str:
    return f"{abs(value):.3f}" if abs(value) >= 0.0005 else "less than 0.001"


def _with_interval(score: Mapping[str, float]) -> str:
    return with_interval(score, digits=3)


def _test_rows(evaluation: Mapping[str, Any]) -> int:
    return sum(row["support"] for row in evaluation["per_label"])


class Report(dict[str, Any]):
    """What `evaluation.json` holds, as a dict that shows itself in a few lines.

    It is used as any dict: its keys are those of the file, and `json.dumps`, `==` and pickling work as of a dict. Its
    `copy` is a plain dict.
    """

    @property
    def verdict(self) -> str:
        """One sentence: how good the run is, and whether a simpler classifier does as well (see `verdict`).

        Raises:
            KitError: When this is not, or not wholly, what `evaluate` returns.
        """
        return verdict(self)

    @takes(most=COUNT)
    def weakest(self, most: int = 3) -> list[dict[str, Any]]:
        """Return the labels that are recognised worst; labels without test rows are left out.

        Args:
            most: How many, 1 or more.

        Returns:
            Their rows of `per_label`, the lowest F1 first.

        Raises:
            KitError: When `most` is not a whole number of 1 or more, or this is not, or not wholly, what `evaluate`
                returns.
        """
        with _as_a_report(self):
            return weakest(self["per_label"], most)

    def to_frame(self) -> pd.DataFrame:
        """Return the test scores of the run and of each baseline.

        Returns:
            A row for the run (`run`) and for each baseline (`tfidf_svm`, `embedding_svm`), with the columns
            `accuracy`, `accuracy_low`, `accuracy_high`, `f1_macro`, `f1_macro_low` and `f1_macro_high`: shares of 1,
            float64, and the ends of their 95% intervals.

        Raises:
            KitError: When this is not, or not wholly, what `evaluate` returns.
        """
        import pandas as pd

        ends = {"": "value", "_low": "low", "_high": "high"}
        with _as_a_report(self):
            rows = {
                name: {f"{key}{end}": float(row[key][which]) for key in _SHOWN for end, which in ends.items()}
                for name, row in self._rows().items()
            }
        return pd.DataFrame.from_dict(rows, orient="index")

    def _rows(self) -> dict[str, Mapping[str, Any]]:
        metrics = self["metrics"]
        return {"run": metrics["test"], **_in_order(metrics.get("baselines") or {})}

    def _title(self) -> str:
        name = one_line(str(self.get("preset", "a run")))
        return f"Test of {name}: {counted(_test_rows(self), 'row')}, {counted(len(self['per_label']), 'label')}"

    def __repr__(self) -> str:
        try:
            lines = [self._title()]
            for name, row in list(self._rows().items())[:3]:
                scores = ", ".join(f"{words} {_with_interval(row[key])}" for key, words in _SHOWN.items())
                lines.append(f"  {'this run' if name == 'run' else _spoken(name)}: {scores}")
            return "\n".join([*lines, self.verdict])
        except (KitError, KeyError, TypeError, AttributeError, ValueError):
            return dict.__repr__(self)  # somebody's dict with other keys: shown as it is

    def _repr_html_(self) -> str | None:
        try:
            rows = [
                ["this run" if name == "run" else _spoken(name), *(_with_interval(row[key]) for key in _SHOWN)]
                for name, row in self._rows().items()
            ]
            table = table_as_html(["on the test rows", *_SHOWN.values()], rows)
            return lines_as_html([self._title()]) + table + lines_as_html([self.verdict], titled=False)
        except (KitError, KeyError, TypeError, AttributeError, ValueError):
            return None  # Jupyter then shows the text
