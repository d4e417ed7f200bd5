"""The tables and lines that notebooks show, from reports, runs and records.

A function that returns a table returns a pandas DataFrame, ready to be the last line of a cell. One that returns lines
returns a text to print.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation import BASELINE_NAMES, METRICS, lead_in_words
from ..system.showing import counted
from .names import size, words
from .screen import duration

if TYPE_CHECKING:
    import pandas as pd

    from ..claims import Records
    from ..memory import Plan
    from ..runs.folder import RunFolder
    from ..searching.search import Search

MIB = 2**20
NO_MEMORY = "out of memory"
RANDOM_WEIGHTS = "This base has random weights: its memory and speed mean something, its scores do not."


class Lines:
    """A table whose cells may have several lines; pandas shows such a line break as two characters.

    Args:
        frame: The table.
    """

    def __init__(self, frame: pd.DataFrame) -> None:
        self.frame = frame

    def __repr__(self) -> str:
        return self.frame.to_string()

    def _repr_html_(self) -> str:
        import pandas as pd

        def cell(value: Any) -> str:
            return html.escape(str(value)).replace("\n", "<br>")

        shown = self.frame.map(cell).rename(index=cell, columns=cell)
        with pd.option_context("display.max_colwidth", None):
            return str(shown.to_html(escape=False))


def wrapped(text: str, width: int = 100) -> str:
    """Return a sentence broken into lines, which an output would not do by itself.

    Args:
        text: The sentence.
        width: Most characters of a line.
    """
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def _frame(rows: Iterable[Mapping[str, Any]], index: str) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(list(rows)).set_index(index)


# ---- data ----


def columns(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a file's columns as a table.

    Args:
        rows: What `Columns.table` returned.
    """
    named = {"filled": "rows filled", "different": "different values", "words": "words a value", "first": "such as"}
    return _frame(rows, "column").rename(columns=named)


def data_facts(report: Mapping[str, Any]) -> pd.DataFrame:
    """Return the facts about data that decide whether a score can be trusted.

    Args:
        report: What `TextData.report` returned.

    Returns:
        One column, named as the data, and a row for each fact.
    """
    facts = {
        "training, validation, test rows": ", ".join(f"{rows:,}" for rows in report["rows"].values()),
        "labels": report["classes"],
        "test texts that also stand in training or validation": report["leaked_test"]["count"],
        "texts that stand twice in training and validation": report["duplicates"]["count"],
        "texts with two different labels": len(report["conflicting_labels"]),
    }
    if "tokens" in report:
        facts["training texts longer than the limit"] = report["tokens"]["train"]["over_max_length"]
    import pandas as pd

    return pd.DataFrame({Path(report["name"]).name: facts}, dtype=object)


# ---- a training ----


def epochs(training: Mapping[str, Any]) -> pd.DataFrame:
    """Return a training's epochs: losses, validation scores, seconds and rows a second.

    Args:
        training: A run's `training`.
    """
    rows = (
        {
            "epoch": f"{entry['epoch']:g}",
            "training loss": entry["loss"],
            "validation loss": entry["validation"]["loss"],
            "accuracy": entry["validation"]["accuracy"],
            "macro F1": entry["validation"]["f1_macro"],
            "seconds": entry["timing"]["seconds"],
            "texts a second": entry["timing"]["samples_per_second"],
        }
        for entry in training["epochs"]
    )
    return _frame(rows, "epoch").round(4)


def outcome(run: RunFolder, plan: Plan | None = None) -> str:
    """Return lines on what came of a training: validation scores, trained parameters, time and memory.

    Args:
        run: The run.
        plan: What was planned for its step, to stand beside what was measured.
    """
    training = run.training
    counts, timing, memory = (training[key] for key in ("parameters", "timing", "memory"))
    lines = [RANDOM_WEIGHTS, ""] if run.experiment.model.random_weights else []
    lines.append(f"validation, {training['rows']['validation']:,} rows")
    lines += [
        f"  {name:12} {score['value']:.4f}   {score['low']:.4f} to {score['high']:.4f}"
        for name, score in training["metrics"]["validation"].items()
    ]
    share = counts["trainable"] / counts["all"]
    took = f"{duration(timing['train_seconds'])}, {timing['samples_per_second']:.1f} texts a second"
    planned = f"; planned {plan.total / MIB:,.0f} MiB" if plan is not None else ""
    lines += [
        "",
        f"trained    {counts['trainable']:,} of {counts['all']:,} parameters ({share:.4%})",
        f"time       {took}",
        f"memory     {memory['peak_bytes'] / MIB:,.0f} MiB at most ({memory.get('measure', 'measured')}){planned}",
    ]
    return "\n".join(lines)


def run_files(folder: Path) -> str:
    """Return lines with the size and the name of each file of a run folder, hidden files left out."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    return "\n".join(f"{size(file.stat().st_size):>10}  {file.relative_to(folder)}" for file in files)


# ---- a test ----


def contenders(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores of the run and of the baselines beside it, by the names that figures show.

    Args:
        metrics: The section `metrics` of a report.
    """
    baselines = metrics["baselines"]
    return {
        "fine-tuned": metrics["test"],
        **{BASELINE_NAMES[key]: baselines[key] for key in BASELINE_NAMES if key in baselines},
    }


def scores(metrics: Mapping[str, Any]) -> pd.DataFrame:
    """Return the scores of the run and of the baselines with their 95% intervals.

    Args:
        metrics: The section `metrics` of a report.
    """
    rows = contenders(metrics)
    if "test_without_leaked" in metrics:  # only where texts leaked
        rows["fine-tuned, leaked texts left out"] = metrics["test_without_leaked"] or {}
    shown = (
        {
            "contender": name,
            **{
                words(key): f"{found[key]['value']:.4f}  ({found[key]['low']:.4f} to {found[key]['high']:.4f})"
                for key in METRICS
                if key in found
            },
        }
        for name, found in rows.items()
    )
    return _frame(shown, "contender").rename_axis(None).fillna("")


def leads(metrics: Mapping[str, Any]) -> str:
    """Return a line for each baseline: how far the run is ahead in macro F1, with the interval, in words.

    Args:
        metrics: The section `metrics` of a report.
    """
    lines = []
    for key, baseline in metrics["baselines"].items():
        ahead = baseline["ahead"]["f1_macro"]
        lines.append(
            f"macro F1, fine-tuned minus {BASELINE_NAMES[key]}: {ahead['value']:+.4f}  "
            f"({ahead['low']:+.4f} to {ahead['high']:+.4f}): {lead_in_words(ahead)}"
        )
    return "\n".join(lines)


def errors(confusions: Sequence[Mapping[str, Any]], most: int = 12) -> str:
    """Return the labels that are most often taken for one another, with texts.

    Args:
        confusions: The section `confusions` of a report.
        most: How many pairs of labels to show.
    """
    lines = []
    for row in confusions[:most]:
        lines.append(f"{row['count']} of {row['true']} taken for {row['predicted']}")
        lines += [f"     {example['confidence']:4.0%} sure: {example['text']}" for example in row["examples"]]
    return "\n".join(lines) or "No test text was given a wrong label."


# ---- memory ----


def compared(row: Mapping[str, Any]) -> str:
    """Return a row of `memory.compare` as one line: what was planned and what was measured."""
    measured = f"{row['measured'] / MIB:8,.1f} MiB" if row["measured"] else NO_MEMORY
    return f"{row['label']:32} planned {row['planned'] / MIB:8,.1f} MiB   measured {measured}"


def comparison(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return the rows of `memory.compare` as a table, in MiB.

    The step's time is the median of a few steps that were timed once: it shows what is several times slower, no less.
    """
    shown = (
        {
            "method": row["label"],
            "planned MiB": f"{row['planned'] / MIB:,.1f}",
            "measured MiB": f"{row['measured'] / MIB:,.1f}" if row["measured"] else NO_MEMORY,
            "difference": f"{row['planned'] / row['measured'] - 1:+.2%}" if row["measured"] else "",
            "base's linear layers MiB": f"{row['parts']['base, linear layers'] / MIB:,.1f}",
            "activations MiB": f"{row['parts'].get('activations', 0) / MIB:,.1f}",
            "seconds a step, timed once": f"{row['step_seconds']:.3f}" if row["step_seconds"] else "",
        }
        for row in rows
    )
    return _frame(shown, "method")


def saved_by_quantization(rows: Sequence[Mapping[str, Any]], lora: str = "LoRA", qlora: str = "QLoRA nf4") -> str:
    """Return one sentence: what becomes smaller from LoRA to QLoRA, and how much the whole does.

    Args:
        rows: Rows of `memory.compare`.
        lora: The label of LoRA's row.
        qlora: The label of QLoRA's row.
    """
    first, second = (next(row for row in rows if row["label"] == label) for label in (lora, qlora))
    linear = [row["parts"]["base, linear layers"] / MIB for row in (first, second)]
    return (
        f"from LoRA to QLoRA the linear layers go from {linear[0]:,.1f} to {linear[1]:,.1f} MiB, "
        f"and the whole becomes {1 - second['planned'] / first['planned']:.0%} smaller"
    )


def measured_parts(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return the measured parts of each row of `memory.compare` in MiB, their sum, and the measured whole."""
    import pandas as pd

    from ..memory import PARTS

    known = [row for row in rows if row["measured"]]
    table = pd.DataFrame({row["label"]: row["measured_parts"] for row in known}).reindex(PARTS).dropna(how="all") / MIB
    table.loc["sum of the parts"] = table.sum()
    table.loc["measured whole"] = [row["measured"] / MIB for row in known]
    return table.fillna(0).round(1)


def parts_against_whole(rows: Sequence[Mapping[str, Any]]) -> tuple[float, str]:
    """Compare the counted parts with the measured whole, and the plan with the measurement.

    Args:
        rows: Rows of `memory.compare`.

    Returns:
        The largest gap between parts and whole as a share of the whole, and lines that say both; with a warning where
        the gap is a twentieth or more.
    """
    known = [row for row in rows if row["measured"]]
    gap = max(abs(row["counted"] / row["measured"] - 1) for row in known)
    worst = max(known, key=lambda row: abs(row["planned"] / row["measured"] - 1))
    lines = [
        f"sum of parts against whole: at most {gap:.2%} apart",
        f"plan against measurement, worst: {worst['label']}, {worst['planned'] / worst['measured'] - 1:+.2%}",
    ]
    if gap >= 0.05:
        lines.append("WARNING: the parts do not add up to the whole on this device. Please report it.")
    return gap, "\n".join(lines)


def race(times: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of `memory.race` as lines: the range of the rounds and their median, and what they tell.

    Args:
        times: Two or more rows; the first is what the others are compared with.
    """
    lines = []
    for row in times:
        each = row["step_seconds_each"]
        took = f"{min(each):.3f} to {max(each):.3f} s, median {row['step_seconds']:.3f} s" if each else NO_MEMORY
        lines.append(f"{row['label']:12} a step, {len(each)} rounds: {took}")
    timed = [row for row in times if row["step_seconds_each"]]
    for first, other in ((timed[0], other) for other in timed[1:]):
        ours, theirs = other["step_seconds_each"], first["step_seconds_each"]
        apart = "faster" if max(ours) < min(theirs) else "slower" if min(ours) > max(theirs) else ""
        lines.append(
            f"{other['label']} is {apart} than {first['label']} here: no round of one was as "
            f"{'slow' if apart == 'faster' else 'fast'} as any of the other"
            if apart
            else f"{other['label']} and {first['label']} are not told apart here: their ranges overlap"
        )
    return "\n".join(lines)


def pages(plans: Mapping[int, Plan]) -> pd.DataFrame:
    """Return what of the optimizer's state lies in pages, by the rank of the adapters.

    Args:
        plans: A plan for each rank.
    """
    rows = (
        {
            "adapters of rank": rank,
            "trained parameters": f"{plan.parameters[0]:,}",
            "state in torch's allocator, MiB": f"{plan.parts.get('optimizer', 0) / MIB:,.0f}",
            "state in pages, MiB": f"{plan.paged / MIB:,.0f}",
        }
        for rank, plan in plans.items()
    )
    return _frame(rows, "adapters of rank")


def room(plans: Mapping[str, Plan]) -> str:
    """Return a line for each plan: what it reserves, and what that leaves of its GPU or lacks.

    Args:
        plans: Plans for a GPU by name.
    """
    lines = []
    for label, plan in plans.items():
        left = (plan.device.bytes - plan.reserved) / MIB
        verdict = f"leaves {left:,.0f} MiB free" if left >= 0 else f"lacks {-left:,.0f} MiB"
        paged = f", and {plan.paged / MIB:,.0f} MiB in pages beside it" if plan.paged else ""
        reserved = f"{plan.reserved / MIB:8,.0f} MiB{paged}"
        lines.append(f"{label:24} reserves {reserved}; on a {plan.device.name} that {verdict}")
    return "\n".join(lines)


def reach(rows: Sequence[Mapping[str, Any]], most: int = 4096) -> pd.DataFrame:
    """Return the rows of `memory.fits`: the largest batch and the longest text of each method.

    Args:
        rows: What `memory.fits` returned.
        most: The largest batch that was tried; a `+` marks it.
    """
    shown = (
        {
            "method": {"full": "full fine-tuning", "lora": "LoRA"}.get(row["method"], f"QLoRA {row['scheme']}"),
            "checkpointing": "yes" if row["checkpointing"] else "",
            f"largest batch at length {row['length']}": (
                f"{row['batch']:,}{'+' * (row['batch'] == most)}" if row["batch"] else "does not fit"
            ),
            "longest text at batch 1, tokens": row["longest"] or "does not fit",
        }
        for row in rows
    )
    return _frame(shown, "method")


# ---- claims ----


def claims(rows: Sequence[Mapping[str, Any]], *columns: str) -> Lines:
    """Return verdicts on claims as a table, with each measured figure on a line of its own.

    Args:
        rows: What `claims.table` returned, with a line break between figures.
        *columns: The columns to show, in their order.
    """
    return Lines(_frame(rows, "#").rename_axis(None)[list(columns)])


def found_records(records: Records, out: str | Path, folder: Path) -> str:
    """Return lines on what there is to judge claims by: this machine, the notebooks' records, runs and references.

    Args:
        records: What `claims.read` returned.
        out: The folder OUT.
        folder: The folder of the reference records.
    """
    return "\n".join(
        [
            f"this machine: {records.device}",
            f"notebooks' records in {out}: {', '.join(records.notebooks) or 'none'}",
            f"runs on Banking77: {', '.join(run['name'] for run in records.runs) or 'none'}",
            f"reference records: {', '.join(records.results) or 'none'} in {folder}",
        ]
    )


# ---- a search ----


def trials(found: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a search's trials: their settings and scores.

    Args:
        found: `Search.trials`.
    """
    rows = (
        {
            "trial": trial["number"],
            **{name.partition(".")[2]: value for name, value in trial["parameters"].items()},
            "macro F1 by epoch": ", ".join(f"{score:.4f}" for score in trial["epochs"]),
            "macro F1": f"{trial['f1_macro']:.4f}"
            if trial["state"] == "complete"
            else trial["error"] or "stopped early",
            "seconds": f"{trial['seconds']:.0f}",
        }
        for trial in found
    )
    return _frame(rows, "trial")


def best_trial(search: Search) -> str:
    """Return lines on a search's best trial: its score, its settings, and the first trial's score beside it.

    Args:
        search: The search.
    """
    best, first = search.best_trial, search.trials[0]
    rows = search.record["rows"]["validation"]
    lines = [f"best: trial {best['number']}, macro F1 {best['f1_macro']:.4f} on {counted(rows, 'validation row')}"]
    for name, value in best["parameters"].items():
        lines.append(f"  {name}: {value:g}" if isinstance(value, (int, float)) else f"  {name}: {value}")
    if first["f1_macro"] is not None:
        lines.append(f"the preset's settings, trial {first['number']}: {first['f1_macro']:.4f}")
    return "\n".join([*lines, "", f"as an experiment: {search.path / 'best.yaml'}"])
