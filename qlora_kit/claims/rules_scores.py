"""Rules about scores: those of the explained run, and how close 4 bits come to full precision.

Every rule's docstring says which evidence it prefers and why.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .judging import (
    ARITHMETIC,
    FAILS,
    HOLDS,
    UNDECIDED,
    Figure,
    Finding,
    by_seed,
    judge,
    judge_sides,
    number,
    seed_interval,
    span,
    unmeasured,
)
from .limits import EXPLAINED, FEWEST_SEEDS, METHODS, ONE_SCORE, RECIPE, RELEVANT, SIGNIFICANT
from .records import Records, grouped, only, short_model

STEP_OF_BEST, VALIDATION_F1 = 7_200, 0.91
RATE, SECONDS, TEST_F1 = 20.4, 1_568, 0.9350
TEST_LOSS, TRAIN_ROWS, LABELS = 4.155, 9_002, 77
_RECIPE_RUNS = f"python benchmarks/accuracy.py --presets {RECIPE}"


def _recipe_runs(records: Records, key: str) -> list[dict[str, Any]]:
    """Return the explained recipe's runs on its real weights: `device`, `source`, `score`."""
    found = [
        {
            "score": run["evaluation"]["metrics"][key]["f1_macro"]["value"],
            "device": run["environment"]["device"],
            "source": f"runs/{run['name']}",
        }
        for run in sorted(records.runs, key=lambda run: str(run["name"]))
        if run["experiment"]["name"] == RECIPE
        and run["evaluation"]
        and not run["experiment"]["model"]["random_weights"]
    ]
    name = {"test": "f1_macro", "validation": "validation_f1_macro"}[key]
    found += [
        {"source": "results/accuracy.json", "score": row[name], "device": row["device"]}
        for row in only(records.rows("accuracy"), model="microsoft/DialoGPT-medium", method="recipe")
        if row.get(name) is not None
    ]
    return records.preferred(found)


def validation_score(records: Records) -> Finding:
    """Judge claim 11's first half: whether the recipe's validation F1 is about 0.91, and whether it has a step 7,200.

    Evidence: only runs of the explained recipe on DialoGPT-medium's real weights; scores of random weights or other
    models say nothing. Whether there is a step 7,200 is arithmetic, and decides nothing without such a run: the four
    epochs are the later report's, so a longer run may have been meant.
    """
    steps, figures, words = _steps(records)
    found = _recipe_runs(records, "validation")
    if not found:
        return unmeasured(f"{words}no run on the real weights is recorded", _RECIPE_RUNS, figures)
    score = statistics.fmean(row["score"] for row in found)
    figures.append(Figure("validation macro F1", score, "", found[0]["device"], found[0]["source"]))
    reason = f"{words}validation macro F1 {score:.4f} against {VALIDATION_F1:.2f}"
    return Finding(judge([abs(score - VALIDATION_F1) <= ONE_SCORE, steps >= STEP_OF_BEST]), reason, tuple(figures))


def _steps(records: Records) -> tuple[float, list[Figure], str]:
    known, recipe = records.computed.get("data"), records.computed.get("recipe")
    if not known or not recipe:
        return 0, [], ""
    steps = math.ceil(known["train"] / recipe["batch_size"]) * recipe["epochs"]
    figures = [Figure("steps", steps, "", ARITHMETIC, "the data and the recipe")]
    words = (
        f"the later report's {recipe['epochs']:g} epochs at batch {recipe['batch_size']} have {steps:,.0f} steps, "
        f"{f'step {STEP_OF_BEST:,} among them' if steps >= STEP_OF_BEST else f'and no step {STEP_OF_BEST:,}'}; "
    )
    return steps, figures, words


def scores(records: Records) -> Finding:
    """Judge claim 11's second half, from the later report: a rate and a time, and a score.

    Evidence: rows a second times seconds must be within `RELEVANT` of the rows of the epochs, which is arithmetic. The
    score must be within `ONE_SCORE` of the reported one; it needs the recipe's runs on the real weights. Without such a
    run the claim is not measured, whatever the arithmetic says.
    """
    known, recipe = records.computed.get("data"), records.computed.get("recipe")
    if not known or not recipe:
        return unmeasured("the rows were not counted", _RECIPE_RUNS)
    rows, seen = known["train"] * recipe["epochs"], RATE * SECONDS
    fine = abs(seen / rows - 1) < RELEVANT
    source = "the data and the recipe"
    figures = [
        Figure("rows in all epochs", rows, "", ARITHMETIC, source),
        Figure("rows that the rate and the time give", seen, "", ARITHMETIC, "the claim itself"),
        Figure("rows an epoch that these give", seen / recipe["epochs"], "", ARITHMETIC, "the claim itself"),
    ]
    words = (
        f"{RATE} rows a second for {SECONDS:,} s are {seen:,.0f} rows, {recipe['epochs']:g} epochs of "
        f"{known['train']:,} are {rows:,.0f} ({'these agree' if fine else 'these do not agree'})"
    )
    found = _recipe_runs(records, "test")
    if not found:
        return unmeasured(f"{words}; no run on the real weights is recorded", _RECIPE_RUNS, figures)
    score = statistics.fmean(row["score"] for row in found)
    figures.append(Figure("test macro F1", score, "", found[0]["device"], found[0]["source"]))
    reason = f"test macro F1 {score:.4f} against {TEST_F1:.4f}; {words}"
    return Finding(judge([abs(score - TEST_F1) <= ONE_SCORE, fine]), reason, tuple(figures))


def loss(records: Records) -> Finding:
    """Judge claim 12: whether 4.155 is the test loss of a trained model, or of one that has learned nothing.

    Evidence: the test losses of trained models on this data: DialoGPT-medium's if there are some, else all models'. The
    median of each model counts, so that one odd run decides nothing. The claim holds if a median is within a tenth of
    4.155. It holds in part if 4.155 is near neither a median nor chance (ln of the number of labels, the loss of a
    uniform guess). Else it fails.
    """
    labels = records.computed.get("data", {}).get("labels")
    command = 'make run-notebooks NOTEBOOKS="02 03"'
    if not labels:
        return unmeasured("the labels were not counted", command)
    found = [
        (short_model(run["experiment"]["model"]["name"]),
         Figure("test loss", run["evaluation"]["metrics"]["test"]["loss"]["value"], "",
                run["environment"]["device"], f"runs/{run['name']}"))
        for run in sorted(records.runs, key=lambda run: str(run["name"]))
        if run["evaluation"] and not run["experiment"]["model"]["random_weights"]
        and run["experiment"]["data"]["name"] == "banking77"
    ]  # fmt: skip
    found += [
        (short_model(row["model"]),
         Figure(f"test loss, {row['method']}, seed {row['seed']}", row["loss"], "", row["device"],
                "results/accuracy.json"))
        for row in records.rows("accuracy") if row.get("loss") is not None
    ]  # fmt: skip
    chance = Figure(f"chance, ln {labels}", math.log(labels), "", ARITHMETIC, "the data")
    if not found:
        return unmeasured("no test loss of a trained model is recorded", command, [chance])
    found = [item for item in found if item[0] == EXPLAINED] or found
    losses: dict[str, list[float]] = {}
    for model, figure in found:
        losses.setdefault(model, []).append(figure.value)
    medians = [statistics.median(values) for values in losses.values()]
    near = any(abs(value / TEST_LOSS - 1) < SIGNIFICANT for value in medians)
    at_chance = abs(TEST_LOSS / chance.value - 1) < SIGNIFICANT
    reason = (
        f"{TEST_LOSS} is {abs(TEST_LOSS / chance.value - 1):.0%} off the {chance.value:.3f} of a guess among {labels}; "
        f"trained models' test loss is {span([figure.value for _, figure in found], '')}"
    )
    figures = sorted((figure for _, figure in found), key=lambda figure: figure.device != records.device)
    return Finding(judge([near, near or not at_chance]), reason, (chance, *figures))


def rows(records: Records) -> Finding:
    """Judge claim 13: training rows and labels. Evidence: counts of the data that comes with the kit."""
    known = records.computed.get("data")
    if not known:
        return unmeasured("the data was not counted", "make run-notebooks NOTEBOOKS=02")
    figures = tuple(Figure(name, known[name], "", ARITHMETIC, "the data") for name in ("train", "labels", "rows"))
    reason = f"{known['train']:,} of {known['rows']:,} rows to train on, {known['labels']} labels"
    return Finding(judge([known["train"] == TRAIN_ROWS, known["labels"] == LABELS]), reason, figures)


# --- near full precision ----------------------------------------------------------------------------------------


def near(records: Records) -> Finding:
    """Judge claim 15: macro F1 of QLoRA minus LoRA and minus full fine-tuning, same device, seeds and rows.

    Evidence: an interval over test rows and seeds together (results/accuracy.json, `differences` with `over_what`:
    "rows and seeds"). An interval over only one of them is too narrow: other questions and other seeds would both give
    other scores. If there is no joint interval, the two separate ones are read; they can show that QLoRA is worse, but
    not that methods are equal. Every model with `FEWEST_SEEDS` seeds or more counts.

    Equal means a difference below the margin. The margin must be below what fine-tuning gains over the SVM on the
    frozen states, or that SVM would count as equal too; if the recorded gain is smaller than the margin asked for, the
    gain is the margin. The claim says equivalence, which is more than a missing difference. It holds if every
    comparison's interval is within the margin, in part if some are. If none is, it fails if one lies completely below
    the margin; else it is undecided.
    """
    command = "python benchmarks/accuracy.py --tune --seeds 0 1 2 3 4 --append"
    figures: list[Figure] = []
    sides, words, models, joint_everywhere = [], [], set(), True
    for model, other, seeds, joint, apart in _differences(records, ("lora", "full")):
        known = joint or apart
        figures += known
        models.add(model)
        margin, gain = _margin(records, model, known[0].device, other)
        low, high = min(one.low or 0.0 for one in known), max(one.high or 0.0 for one in known)
        within = -margin <= low and high <= margin
        # Separate intervals are narrower than a joint one, so they cannot show equality.
        sides.append(-1 if high < -margin else 1 if within and joint else 0)
        joint_everywhere = joint_everywhere and bool(joint)
        words.append(
            f"{short_model(model)}: {number(known[0].value, 'macro F1')} against {METHODS[other]} "
            f"({span((low, high), 'macro F1')}, {seeds} seeds; level is within {margin:.4f}"
            + (f", the gain over an SVM is {gain:.4f})" if gain is not None else ")")
        )
    if not sides:
        return unmeasured(f"no device has {FEWEST_SEEDS} seeds of QLoRA and of what it is compared with", command)
    reason = f"QLoRA minus the other, macro F1: {'; '.join(words)}"
    if not joint_everywhere:
        reason += (
            ". No interval over seeds and rows together is recorded for all of these; either alone is too narrow to "
            "show that two methods are level"
        )
    if len(models) == 1:
        reason += ". One model was measured with all methods"
    return Finding(judge_sides(sides), reason, tuple(figures))


def _margin(records: Records, model: str, device: str, other: str) -> tuple[float, float | None]:
    """Return the margin for one comparison, and the smaller of its two methods' gains over the best recorded SVM."""
    baselines = records.results.get("accuracy", {}).get("baselines") or {}
    svms = [one["f1_macro"]["value"] for one in baselines.values() if one.get("f1_macro")]
    if not svms:
        return records.margin, None
    rows = only(records.rows("accuracy"), model=model, device=device)
    means = [
        statistics.fmean(row["f1_macro"] for row in only(rows, method=method, **scheme))
        for method, scheme in (("qlora", {"scheme": "nf4"}), (other, {}))
    ]
    gain = min(means) - max(svms)
    return (min(records.margin, gain) if gain > 0 else records.margin), gain


def _differences(records: Records, others: Sequence[str]) -> list[tuple[str, str, int, list[Figure], list[Figure]]]:
    """Return QLoRA (NF4) minus each other method, for each model and preferred device.

    Returns:
        Model, the other method, number of paired seeds, joint intervals over rows and seeds, and separate intervals
        (rows first).
    """
    recorded = records.rows("accuracy", "differences")
    found = []
    groups = grouped(records.rows("accuracy"), "model")
    complete = [
        (key, other) for key, group in groups.items() for other in others if len(_paired(group, other)) >= FEWEST_SEEDS
    ]
    for (device, model), other in records.preferred(complete, lambda item: item[0][0]):
        group = groups[device, model]
        pairs = _paired(group, other)
        sides = [{row["preset"] for row in only(group, method=method)} for method in ("qlora", other)]
        words = f"{short_model(model)}: QLoRA minus {METHODS[other]}"
        joint: list[Figure] = []
        alone: list[Figure] = []
        for row in recorded:
            turned = row["of"] in sides[1] and row["over"] in sides[0]
            if row["device"] != device or not (turned or (row["of"] in sides[0] and row["over"] in sides[1])):
                continue
            interval = {key: row["f1_macro"][key] for key in ("value", "low", "high")}
            if turned:
                interval = {"value": -interval["value"], "low": -interval["high"], "high": -interval["low"]}
            both = row.get("over_what") == "rows and seeds"
            name = f"{words}, over {'test rows and seeds' if both else 'test rows'}"
            (joint if both else alone).append(
                Figure(name, unit="macro F1", device=device, source="results/accuracy.json", **interval)
            )
        interval_of_seeds = seed_interval(pairs)
        assert interval_of_seeds is not None
        alone.append(Figure(f"{words}, over {len(pairs)} seeds", unit="macro F1", device=device,
                            source="results/accuracy.json", **interval_of_seeds))  # fmt: skip
        found.append((str(model), other, len(pairs), joint, alone))
    return found


def _paired(group: Sequence[Mapping[str, Any]], other: str) -> list[float]:
    return by_seed(only(group, method="qlora", scheme="nf4"), only(group, method=other), "f1_macro")


def lora_ahead(records: Records) -> Finding:
    """Judge claim 18: whether LoRA is ahead of QLoRA in a measured case.

    Evidence: as for claim 15, but without a margin, because the sentence only says `slightly`. LoRA is ahead in a case
    (a model on a device) if the joint interval over rows and seeds is below 0, or, if there is none, if both separate
    ones are. One such case is enough, because the sentence says `in some cases`.
    """
    sides, words, figures = [], [], []
    for model, _, seeds, joint, apart in _differences(records, ("lora",)):
        known = joint or apart
        figures += known
        ends = [(one.low or 0.0, one.high or 0.0) for one in known]
        sides.append(1 if all(high < 0 for _, high in ends) else -1 if all(low > 0 for low, _ in ends) else 0)
        pairs = _seeds_ahead(records, model, known[0].device)
        reach = span([end for pair in ends for end in pair], "macro F1")
        words.append(
            f"{short_model(model)}: LoRA was ahead in {pairs} of {seeds} seeds; QLoRA minus LoRA is "
            f"{number(known[0].value, 'macro F1')} macro F1 ({reach})"
        )
    if not sides:
        command = "python benchmarks/accuracy.py --tune --seeds 0 1 2 3 4 --append"
        return unmeasured(f"no device has {FEWEST_SEEDS} seeds of QLoRA and of LoRA", command)
    verdict = HOLDS if 1 in sides else UNDECIDED if 0 in sides else FAILS
    return Finding(verdict, "; ".join(words), tuple(figures))


def _seeds_ahead(records: Records, model: str, device: str) -> int:
    """Return the number of seeds in which LoRA was ahead."""
    group = [row for row in records.rows("accuracy") if (row["model"], row["device"]) == (model, device)]
    return sum(difference < 0 for difference in _paired(group, "lora"))
