"""Say in one sentence whether fine-tuning was worth it, from what `evaluation.json` holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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
        (random weights; every test text was also trained on), when no baseline was fitted, and when few test rows leave
        the score unsure.
    """
    metrics = evaluation["metrics"]
    test = metrics["test"]["f1_macro"]
    score = f"macro F1 {_with_interval(test)}"
    if evaluation.get("random_weights"):
        return f"The base has random weights, so the scores mean nothing: {score}."
    clean = metrics.get("test_without_leaked", metrics["test"])
    if clean is None:
        return f"Every test text was also trained on, so the scores say nothing about new texts: {score}."
    notes, rows = [], _test_rows(evaluation)
    # Rows that are all right give an interval of no width, but up to 3 / rows of others may be wrong (rule of three).
    if max(test["high"] - test["low"], 3 / rows) >= WIDE:
        notes.append(f"unsure, as there {'is' if rows == 1 else 'are'} only {counted(rows, 'test row')}")
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
    score += f" on {counted(training['rows']['validation'], 'validation row')}"
    if training["random_weights"]:
        return f"The base has random weights, so the scores mean nothing: {score}."
    return f"Not tested yet: {score}; `evaluate` says whether a plain SVM does as well."


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
        """One sentence: how good the run is, and whether a simpler classifier does as well (see `verdict`)."""
        return verdict(self)

    def to_frame(self) -> pd.DataFrame:
        """Return the test scores of the run and of each baseline.

        Returns:
            A row for the run (`run`) and for each baseline (`tfidf_svm`, `embedding_svm`), with the columns
            `accuracy`, `accuracy_low`, `accuracy_high`, `f1_macro`, `f1_macro_low` and `f1_macro_high`: shares of 1,
            float64, and the ends of their 95% intervals.
        """
        import pandas as pd

        ends = {"": "value", "_low": "low", "_high": "high"}
        return pd.DataFrame.from_dict(
            {
                name: {f"{key}{end}": row[key][which] for key in _SHOWN for end, which in ends.items()}
                for name, row in self._rows().items()
            },
            orient="index",
        )

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
        except (KeyError, TypeError, AttributeError):
            return dict.__repr__(self)  # somebody's dict with other keys: shown as it is

    def _repr_html_(self) -> str | None:
        try:
            rows = [
                ["this run" if name == "run" else _spoken(name), *(_with_interval(row[key]) for key in _SHOWN)]
                for name, row in self._rows().items()
            ]
            table = table_as_html(["on the test rows", *_SHOWN.values()], rows)
            return lines_as_html([self._title()]) + table + lines_as_html([self.verdict], titled=False)
        except (KeyError, TypeError, AttributeError):
            return None  # Jupyter then shows the text
