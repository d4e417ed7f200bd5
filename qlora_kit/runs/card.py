"""Model cards: what a run is, how it was made, how good it is, and the metadata that the hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..config.experiment import Experiment
from ..data.rows import leak_in_words
from ..errors import KitError
from ..metrics.differences import with_interval
from ..metrics.verdict import unsure, untested_labels, weakest
from ..models import inventory
from ..models.embedded import EMBEDDED
from ..models.sources import find_base
from ..system.showing import counted
from .folder import RunFolder

# The most labels that a card lists; a longer list helps nobody.
MOST_LABELS = 100
MOST_CHARACTERS = 100
"""The most characters that a card shows of a name or a label."""

CARD = """---
{metadata}
---

# {name}

A text classifier with {classes} classes: {model} fine-tuned on {data} by {method}, with qlora_kit.

{warning}## Use

{use}

**Intended use.** Texts like those that it was trained on, in their language and about their subject. It answers with
one of its {classes} labels whatever it is given: a text that belongs to none gets one all the same, often with a high
probability. Whoever uses it answers for checking it on their own data first.

Labels: {labels}

## Data

{data}: {train} rows for training, {validation} for validation, {test} for testing; texts of up to {length} tokens.
{source}

## Method

{method_sentence} {steps} of {rows_a_step}, learning rate {rate:g}, seed {seed}, {precision}, {optimizer};
{trainable:,} of {parameters:,} parameters trained.{made_on}
{inventory}
## Metrics

{metrics}

An interval is a 95% bootstrap interval over the rows of its split: it is about other rows of the same kind, not about
another seed or other data. Validation rows served for choosing (epochs, settings), so their score flatters.
{merged}
## Limits

{limits}

## Licence

The base: {base_licence}. The data: {data_licence}. The licence of what was trained is for its owner to choose
within these.
"""

ADAPTER_USE = """```python
import qlora_kit as qk

print(qk.load_run("this-folder").predict(["a text"]).labels)
```"""

BANKING77 = (
    "Questions of bank customers, in English (Casanueva et al., Efficient Intent Detection with Dual Sentence "
    "Encoders, [arXiv 2003.04807](https://arxiv.org/abs/2003.04807)).\n"
)


def model_card(
    experiment: Experiment,
    training: Mapping[str, Any],
    licence: str | None,
    *,
    evaluation: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    merged: Mapping[str, Any] | None = None,
    use: str = ADAPTER_USE,
) -> str:
    """Return a run's model card.

    Args:
        experiment: The run's experiment.
        training: What `training.json` holds.
        licence: The base's licence as an SPDX identifier, if known.
        evaluation: What `evaluation.json` holds, once the run is evaluated.
        environment: What `environment.json` holds.
        merged: What `Run.merge` returns, for a merged model's card.
        use: Markdown that shows how to use the model.

    Returns:
        YAML metadata, then Markdown. Names and labels are formatted as code, so that none of them acts as markup.
    """
    spec, rows, labels = experiment.training, training["rows"], [str(name) for name in training["labels"]]
    banking77 = experiment.data.name == "banking77"
    method = _method(experiment, merged)
    return CARD.format(
        metadata=_metadata(experiment, training, licence, evaluation, merged).to_yaml(),
        name=experiment.name,
        classes=len(labels),
        model=code(_model_name(experiment)),
        data=code(_data_name(experiment)),
        method=method,
        method_sentence=f"{method[0].upper()}{method[1:]}.",
        warning="The base has random weights: its scores say nothing, only its memory and speed do.\n\n"
        if training["random_weights"]
        else "",
        use=use,
        labels=", ".join(code(name) for name in labels[:MOST_LABELS])
        + (f" and {len(labels) - MOST_LABELS} more (`training.json`)" if len(labels) > MOST_LABELS else ""),
        train=f"{rows['train']:,}",
        validation=f"{rows['validation']:,}",
        test=f"{rows['test']:,}",
        length=experiment.data.max_length,
        source=BANKING77 if banking77 else "",
        steps=counted(training["steps"], "step"),
        rows_a_step=counted(spec.batch_size * spec.gradient_accumulation, "row"),
        rate=spec.learning_rate,
        seed=spec.seed,
        precision=training["precision"],
        optimizer=training["optimizer"],
        trainable=training["parameters"]["trainable"],
        parameters=training["parameters"]["all"],
        made_on=_made_on(training, environment),
        inventory="" if merged else _inventory(training.get("inventory")),
        metrics=_metrics_table(training, evaluation),
        merged=_merged_section(merged),
        limits="\n".join(f"- {line}" for line in [*_few(training, evaluation), *_limits(evaluation)]),
        base_licence=licence or "unknown to this kit; see the base's own card",
        data_licence="CC BY 4.0" if banking77 else "unknown to this kit; see where the data comes from",
    )


def of_run(run: RunFolder, *, tested: bool = True, **more: Any) -> str:
    """Return a run's model card from its folder.

    Args:
        run: A finished run.
        tested: With the scores of its `evaluation.json`, if there is one.
        **more: `merged` and `use`, as `model_card` takes them.
    """
    return model_card(
        run.experiment,
        run.training,
        find_base(run.experiment.model).licence,
        evaluation=run.evaluation if tested else None,
        environment=run.environment,
        **more,
    )


def is_as_written(run: RunFolder) -> bool:
    """Return whether a run's `README.md` is what this version of the kit wrote, before a test or after it.

    A missing one counts as written. One that a person has changed, or another version has written, does not: then it
    is not the kit's to replace.
    """
    file = run.path / "README.md"
    if not file.is_file():
        return True
    found = file.read_bytes()
    try:
        return found in (of_run(run, tested=False).encode(), of_run(run).encode())
    except KitError:  # of a damaged evaluation.json, which a new test replaces
        return False


def code(text: str) -> str:
    """Return a name or label as Markdown code on one line.

    In code nothing acts as markup, neither HTML nor a link. What is no printable character is spelled out (a line feed
    as two characters, a backslash and an n). Backticks are kept by a fence that is longer than any row of them.

    Args:
        text: Any text; it is cut off after `MOST_CHARACTERS`.
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(line) > MOST_CHARACTERS:
        line = f"{line[: MOST_CHARACTERS - 1]}…"
    fence = "`" * (max((len(row) for row in re.findall("`+", line)), default=0) + 1)
    # Markdown takes one space off both ends, if both ends have one and there is more than spaces between them.
    ends = "`" in (line[:1], line[-1:]) or (line.strip() and line[0] == line[-1] == " ")
    return f"{fence} {line} {fence}" if ends else f"{fence}{line or ' '}{fence}"


def _model_name(experiment: Experiment) -> str:
    # Show only the folder's name: the path on the user's disk is private.
    name = experiment.model.name
    return Path(name).name if Path(name).expanduser().is_dir() else name


def _data_name(experiment: Experiment) -> str:
    return Path(experiment.data.name).name


def _hub_model(experiment: Experiment) -> str | None:
    """Return the base's name on the hub, or None where it has none."""
    name = experiment.model.name
    if name.startswith("embedded:"):
        return EMBEDDED[name.removeprefix("embedded:")].hub
    if name.startswith("shape:") or Path(name).expanduser().is_dir():
        return None
    return name


def _method(experiment: Experiment, merged: Mapping[str, Any] | None) -> str:
    lora = experiment.lora
    if lora is None:
        return "full fine-tuning"
    text = (
        f"LoRA (r={lora.r}, alpha={lora.alpha:g}, dropout={lora.dropout:g}) on a base stored as "
        f"{experiment.quantization.label}"
    )
    return f"{text}, merged into the base in full precision" if merged else text


def _metadata(
    experiment: Experiment,
    training: Mapping[str, Any],
    licence: str | None,
    evaluation: Mapping[str, Any] | None,
    merged: Mapping[str, Any] | None,
) -> ModelCardData:
    adapter = experiment.lora is not None and not merged
    base = _hub_model(experiment)
    results = []
    for split, scores in _scores(training, evaluation).items():
        for metric, name, kind in (("accuracy", "Accuracy", "accuracy"), ("f1_macro", "Macro F1", "f1")):
            if not training["random_weights"]:
                results.append(
                    EvalResult(
                        task_type="text-classification",
                        dataset_type=_data_name(experiment),
                        dataset_name=_data_name(experiment),
                        dataset_split=split,
                        metric_type=kind,
                        metric_name=f"{name} ({split})",
                        metric_value=round(scores[metric]["value"], 4),
                    )
                )
    return ModelCardData(
        model_name=experiment.name,
        license=licence.lower() if licence else None,
        base_model=base,
        base_model_relation=("adapter" if adapter else "finetune") if base else None,
        datasets=["PolyAI/banking77"] if experiment.data.name == "banking77" else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-classification",
        metrics=["accuracy", "f1"],
        tags=["text-classification", "qlora_kit", *(["lora"] if experiment.lora is not None else [])],
        eval_results=results or None,
    )


def _scores(training: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    scores = {"validation": training["metrics"]["validation"]}
    if evaluation:
        scores["test"] = evaluation["metrics"]["test"]
    return scores


def _metrics_table(training: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> str:
    shown = (("accuracy", "accuracy"), ("f1_macro", "macro F1"), ("f1_weighted", "weighted F1"), ("loss", "loss"))
    lines = [f"| split | {' | '.join(label for _, label in shown)} |", "|---|---|---|---|---|"]
    lines += [
        f"| {split} | {' | '.join(with_interval(scores[metric]) for metric, _ in shown)} |"
        for split, scores in _scores(training, evaluation).items()
    ]
    if not evaluation:
        lines += ["", "Not tested yet: `qlora_kit.evaluate` does it, and brings the figures here."]
    return "\n".join(lines)


def _made_on(training: Mapping[str, Any], environment: Mapping[str, Any] | None) -> str:
    if not environment:
        return ""
    versions = environment["versions"]
    packages = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes") if name in versions
    )
    return f"\nTrained in {training['timing']['train_seconds']:,.0f} s on {environment['device']}, with {packages}."


def _inventory(groups: Sequence[Mapping[str, Any]] | None) -> str:
    """Return a table of the base's parts; empty for runs made before these were recorded."""
    if not groups:
        return ""
    lines = ["", "| of the base | numbers | share | stored as | trained | why |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {group['kind']} | {group['parameters']:,} | {group['share']:.1%} | {group['stored_as']} | "
        f"{inventory.TRAINED.get(group['trained'], '')} | {group['reason']} |"
        for group in groups
    ]
    return "\n".join([*lines, ""])


def _merged_section(merged: Mapping[str, Any] | None) -> str:
    if not merged:
        return ""
    why = ""
    if merged["trained_on"] != "none":
        why = (
            f"The adapters were trained beside a base stored as {merged['trained_on']} and are added to\n"
            "full-precision weights here: that is not the same function, and these tables say how far apart the two "
            "are.\n\n"
        )
    was = (
        "the base as it was trained on, and adapters beside it" if merged["adapters"] else "the model as it was trained"
    )
    splits = {name: merged[name] for name in ("validation", "test") if merged[name] is not None}
    tables = "\n".join(_before_and_after(name, rows, was, merged["dtype"]) for name, rows in splits.items())
    name, most = max(splits.items(), key=lambda split: float(split[1]["limit"]["share"]))
    moved = "on these rows no limit makes a difference, on others one may"
    if most["limit"]["share"]:
        moved = (
            f"at worst, with a limit of {most['limit']['at']:.3f}, {most['limit']['share']:.2%} of the {name} rows are "
            "rejected by one of the two alone"
        )
    limit = (
        "A probability below which labels are rejected, if it was chosen for the run, has to be chosen again for this\n"
        f"model: {moved}."
    )
    return f"\n## Before and after\n\n{why}{tables}\n{limit}\n"


def _before_and_after(name: str, rows: Mapping[str, Any], was: str, dtype: str) -> str:
    gap = rows["difference"]
    return f"""| on the {rows["rows"]:,} {name} rows | macro F1 |
|---|---|
| {was} | {with_interval(rows["before"]["f1_macro"])} |
| this model, in {dtype} | {with_interval(rows["after"]["f1_macro"])} |
| after minus before, on the same rows | {gap["value"]:+.4f} ({gap["low"]:+.4f} to {gap["high"]:+.4f}) |

Both give the same label to {rows["same_label"]:.2%} of the {name} rows; their probabilities differ by up to
{rows["largest_difference"]:.3f}.
"""


def _few(training: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> list[str]:
    """Return a line for each split whose rows are too few for a sure score."""
    said = [
        (split, unsure(scores["f1_macro"], training["rows"][split], split))
        for split, scores in _scores(training, evaluation).items()
    ]
    return [f"Its {split} score is {few}." for split, few in said if few]


def _limits(evaluation: Mapping[str, Any] | None) -> list[str]:
    lines = ["One run with one seed; another seed gives another model with a somewhat different score."]
    if not evaluation:
        return lines
    if tested := evaluation.get("data"):  # the first run folders do not have it
        lines.append(f"{leak_in_words(len(tested['leaked_test_indices']), tested['rows']['test'])}.")
    lines.append(
        "Weakest on the test rows: "
        + ", ".join(
            f"{code(row['label'])} (F1 {row['f1']:.2f}, {row['support']} row{'s' if row['support'] > 1 else ''})"
            for row in weakest(evaluation["per_label"])
        )
        + "."
    )
    lacking = untested_labels(evaluation["per_label"])
    if lacking:
        lines.append(f"{lacking}: nothing is known of how well such a label is recognised.")
    for pair in evaluation["confusions"][:1]:
        lines.append(
            f"Most often confused: {code(pair['true'])} taken for {code(pair['predicted'])}, {pair['count']} times."
        )
    lines.append(
        f"Expected calibration error on the test rows: {evaluation['calibration']['ece']:.3f} (0: it is right as often "
        "as it is sure)."
    )
    return lines
