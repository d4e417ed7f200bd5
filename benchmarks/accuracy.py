r"""Fine-tune presets with several seeds and compare their scores: results/accuracy.json, or a tuning table.

    python benchmarks/accuracy.py --tune --seeds 0 1 2 3 4 --jobs 12   # MiniLM: qlora, lora, full, tuned alike
    python benchmarks/accuracy.py                                   # the presets as they are; seeds 0 1 2
    python benchmarks/accuracy.py --presets smollm2-135m_banking77_qlora --jobs 3
    python benchmarks/accuracy.py --presets minilm_banking77_qlora --grid model.head=linear,cosine \
        training.learning_rate=5e-4,1e-3,2e-3 --out results/tuning.json

With `--grid` every combination is tried and only validation scores are read: that is how presets are tuned. Without
it the test set is read, once a run, and the runs are set beside a linear SVM on the frozen base's embeddings of the
same rows, by paired bootstrap intervals over the test rows and by Student's interval over paired seeds.

`--tune` gives every preset the same budget first: its learning rate times each of `FACTORS`, with one seed that is
none of the measured ones, on validation rows alone; results/tuning.json has every setting tried. Then each preset is
trained with the setting that did best, with all seeds, and tested.

Each row is a process of its own and leaves its run folder and a file, so a benchmark that was cut off goes on where
it was: the same command again. `--seconds` cuts it off by itself. With `--jobs` several share one device, and their
`train_seconds` are those of a shared device. Rows of different devices are never compared.

A row keeps its predictions of the test (`checking.packing`), so that everything that is computed from rows can be
computed again: `python -m qlora_kit check results`. A difference with `over_what` has an interval over other test rows
and other seeds together, corrected for how many of them the record shows; the others are over rows alone, with
`over_seeds` beside them. `--rows-only` leaves all that out, which takes minutes on one core; `python
benchmarks/recording.py merge` then adds it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import recording
from common.processes import run_all
from common.refusals import told_in_a_line

from qlora_kit.checking import packing
from qlora_kit.config.experiment import Experiment
from qlora_kit.config.preset import preset
from qlora_kit.errors import KitError
from qlora_kit.system.environment import environment, is_gpu
from qlora_kit.system.files import plain, write_json, write_text
from qlora_kit.system.parsing import parse_yaml, read_json

DEFAULT = ["minilm_banking77_qlora", "minilm_banking77_lora", "minilm_banking77_full"]
RATE = "training.learning_rate"
FACTORS = (0.25, 0.5, 1, 2, 4, 8)
TUNING_SEED = 99
KEY = ("device", "preset", "seed")
TUNING_KEY = ("device", "preset", "tried")
# Pairs whose difference gets an interval over rows and seeds. Few, because each interval is corrected for their number.
LEADS = (("qlora", "lora"), ("qlora", "full"))
BASELINE = "embedding_svm"
TOLERANCE = 1e-5  # error allowed at the ends of these intervals: a tenth of the last digit shown


@told_in_a_line
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=DEFAULT, metavar="PRESET")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--grid", nargs="+", default=[], metavar="NAME=V1,V2", help="try these; validation only")
    parser.add_argument("--tune", action="store_true", help="choose each preset's learning rate on validation first")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change every preset")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--runs", default="runs/accuracy", help="folder of the run folders")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so long")
    parser.add_argument("--out", default="results/accuracy.json")
    parser.add_argument("--tuning", default="results/tuning.json", help="where --tune writes what it tried")
    parser.add_argument("--no-baseline", action="store_true", help="leave the SVM on embeddings out")
    parser.add_argument("--rows-only", action="store_true", help="compute nothing from all rows: a merge does it")
    recording.add_options(parser)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--no-test", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tune and (options.grid or TUNING_SEED in options.seeds):
        parser.error(f"--tune brings its own --grid, and seed {TUNING_SEED} is its own")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    deadline = time.monotonic() + options.seconds
    if options.one:
        one(Experiment.from_yaml(Path(options.one)), Path(options.one).stem, options)
        return 0
    provenance = recording.begin(options)
    chosen: dict[str, dict[str, Any]] = {}
    if options.tune:
        tried = {name: row for source in options.presets for name, row in settings(options, source).items()}
        if not run(tried, options, provenance, deadline, test=False):
            print("not every setting was tried: the same command again goes on", file=sys.stderr)
            return 1
        made = [read_json(Path(options.runs) / f"{name}.json") for name in tried]
        chosen = write_tuning(options, provenance, made)
    rows = wanted(options, chosen)
    complete = run(rows, options, provenance, deadline, test=not options.grid)
    made = [row for name, experiment in rows.items() if (row := finished(options, provenance, name, experiment))]
    if made:
        write(options, provenance, made, list(rows.values()), complete)
    return 0 if complete else 1


def run(
    rows: Mapping[str, Experiment],
    options: argparse.Namespace,
    provenance: recording.Provenance,
    deadline: float,
    *,
    test: bool,
) -> bool:
    """Make the missing rows; return whether all rows are complete."""
    folder = Path(options.runs)
    todo = {}
    for name, experiment in rows.items():
        if finished(options, provenance, name, experiment) is None:
            (folder / f"{name}.json").unlink(missing_ok=True)
            settled = folder / "experiments" / f"{name}.yaml"
            write_text(settled, experiment.to_yaml())
            todo[name] = [sys.executable, __file__, "--one", str(settled), "--runs", options.runs, "--jobs",
                          str(options.jobs), "--device", options.device, *([] if test else ["--no-test"])]  # fmt: skip
    print(f"{len(rows)} rows, {len(rows) - len(todo)} of them there already", flush=True)
    run_all(todo, folder / "logs", options.jobs, deadline)
    return all(finished(options, provenance, name, experiment) for name, experiment in rows.items())


def settings(options: argparse.Namespace, source: str) -> dict[str, Experiment]:
    """Return the experiments that `--tune` tries for a preset: the same number of learning rates for each preset."""
    base = preset(source).override({**fixed(options), "training.seed": TUNING_SEED, "tracking.wandb": "none"})
    rates = [base.training.learning_rate * factor for factor in FACTORS]
    return {f"{base.name}_{rate:.3g}_seed{TUNING_SEED}": base.override({RATE: rate}) for rate in rates}


def fixed(options: argparse.Namespace) -> dict[str, Any]:
    """Return the changes that `--set` makes to every preset."""
    return {name: parse_yaml(value, name) for name, _, value in (item.partition("=") for item in options.set)}


def wanted(options: argparse.Namespace, chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, Experiment]:
    """Return the experiments by row name; `chosen` are changes by preset, from `--tune`."""
    grid = [(name, values.split(",")) for name, _, values in (item.partition("=") for item in options.grid)]
    rows = {}
    for source, seed in itertools.product(options.presets, options.seeds):
        for values in itertools.product(*(values for _, values in grid)):
            tried = {name: parse_yaml(value, name) for (name, _), value in zip(grid, values, strict=True)}
            common = {**fixed(options), "training.seed": seed, "tracking.wandb": "none"}
            experiment = preset(source).override({**common, **tried})
            best = chosen.get(experiment.name, {})
            words = [*values, *(f"{value:.3g}" for value in best.values())]
            rows["_".join([experiment.name, *words, f"seed{seed}"])] = experiment.override(best)
    return rows


def finished(
    options: argparse.Namespace, provenance: recording.Provenance, name: str, experiment: Experiment
) -> dict[str, Any] | None:
    """Return an earlier call's row if it was made with these settings and committed code, else None."""
    file = Path(options.runs) / f"{name}.json"
    if not file.is_file():
        return None
    row: dict[str, Any] = read_json(file)
    same = row["experiment"] == plain(experiment.to_dict())
    return row if same and provenance.takes(row) else None


def one(experiment: Experiment, name: str, options: argparse.Namespace) -> None:
    """Train one row, test it unless `--no-test`, and write its file."""
    import torch

    import qlora_kit as qk

    if options.jobs > 1 and not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.jobs))
    file = Path(options.runs) / f"{name}.json"
    row = {
        "preset": experiment.name,
        "model": experiment.model.name,
        "method": method(experiment),
        "scheme": experiment.quantization.scheme,
        "double_quantization": experiment.quantization.nested,
        "seed": experiment.training.seed,
        "learning_rate": experiment.training.learning_rate,
        "jobs": options.jobs,
        "experiment": experiment.to_dict(),
    }
    try:
        run = qk.finetune(experiment, out=options.runs, name=name, progress=options.jobs == 1)
    except qk.training.TrainingError as error:
        if not options.no_test:
            raise
        # A diverged learning rate is recorded as tried, so that it is not tried again.
        here = environment(qk.models.default_device())
        row |= {"validation_f1_macro": None, "diverged": str(error), "device": here["device"]}
        write_json(file, recording.stamped(row, here))
        return
    timing = run.training["timing"]
    row |= {
        "validation_f1_macro": run.training["metrics"]["validation"]["f1_macro"]["value"],
        "validation_accuracy": run.training["metrics"]["validation"]["accuracy"]["value"],
        "train_seconds": timing["train_seconds"],
        "samples_per_second": timing["samples_per_second"],
        "device": run.environment["device"],
    }
    if not options.no_test:
        report = qk.evaluate(run, baselines=False, progress=options.jobs == 1)
        test = report["metrics"]["test"]
        row |= {
            "accuracy": test["accuracy"]["value"],
            "f1_macro": test["f1_macro"]["value"],
            "loss": test["loss"]["value"],
            **predicted(report["predictions"]["test"], qk.evaluation.data_of(run).test.labels),
            "curve": curve(run.training["losses"]),
        }
    write_json(file, recording.stamped(row, run.environment))


def predicted(classes: Sequence[int], labels: Sequence[int]) -> dict[str, Any]:
    """Return what a row keeps of its test: the predicted classes, and the checksum of the true ones."""
    return {"predictions": packing.pack_classes(classes), "labels": packing.checksum(labels)}


def method(experiment: Experiment) -> str:
    """Return a row's `method`: `recipe` by the experiment's name, the others by its settings."""
    if experiment.name.endswith("_recipe"):
        return "recipe"
    if experiment.lora is None:
        return "full"
    return "lora" if experiment.quantization.scheme == "none" else "qlora"


def curve(losses: Sequence[Mapping[str, Any]], most: int = 60) -> dict[str, list[Any]]:
    """Return steps, losses and gradient norms, thinned to at most `most` logs and rounded to four digits."""
    kept = losses[:: max(1, -(-len(losses) // most))]
    digits = {key: [row.get(key) for row in kept] for key in ("loss", "grad_norm")}
    rounded = {key: [None if v is None else float(f"{v:.4g}") for v in values] for key, values in digits.items()}
    return {"step": [row["step"] for row in kept], **rounded}


def _field(experiment: Experiment, dotted: str) -> Any:
    node: Any = experiment
    for part in dotted.split("."):
        node = getattr(node, part)
    return node


def write_tuning(
    options: argparse.Namespace, provenance: recording.Provenance, rows: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Write what `--tune` tried and chose; return each preset's best setting, as changes of the preset."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        row["tried"] = {RATE: row.pop("learning_rate")}
        del row["experiment"]
        groups.setdefault((row["preset"], row["device"]), []).append(row)
    chosen = []
    for (name, device), group in groups.items():
        known = [row for row in group if row["validation_f1_macro"] is not None]
        if not known:
            raise KitError(f"every learning rate that was tried of {name} diverged")
        best = max(known, key=lambda row: row["validation_f1_macro"])
        rates = sorted(row["tried"][RATE] for row in group)
        chosen.append(
            {
                "preset": name,
                "device": device,
                "settings": len(group),
                "tried": best["tried"],
                "validation_f1_macro": best["validation_f1_macro"],
                # Then the best rate may lie beyond the tried ones.
                "at_the_edge": best["tried"][RATE] in (rates[0], rates[-1]),
            }
        )
    others = []
    if options.append and Path(options.tuning).is_file():
        made = [line["preset"] for line in chosen]
        others = [line for line in read_json(options.tuning)["chosen"] if line["preset"] not in made]
    recording.write(
        options.tuning,
        rows,
        provenance=provenance,
        command=recording.command_line("accuracy.py"),
        makes=rows,
        key=TUNING_KEY,
        append=options.append,
        chosen=others + chosen,
    )
    for line in chosen:
        edge = ", at the edge of what was tried" if line["at_the_edge"] else ""
        print(
            f"{line['preset']}: {line['tried'][RATE]:.3g} of {line['settings']} learning rates, validation macro F1 "
            f"{line['validation_f1_macro']:.4f}{edge}"
        )
    print(f"written: {options.tuning}", flush=True)
    return {line["preset"]: line["tried"] for line in chosen}


def write(
    options: argparse.Namespace,
    provenance: recording.Provenance,
    rows: list[dict[str, Any]],
    wanted: Sequence[Experiment],
    complete: bool,
) -> None:
    """Write the rows made so far, and the values computed from all rows once they are complete."""
    from qlora_kit import models, plots

    fields = [item.partition("=")[0] for item in options.grid]
    key = (*KEY, "tried") if fields else KEY
    device = environment(models.default_device())["device"]
    makes = [
        {
            "device": device,
            "preset": experiment.name,
            "seed": experiment.training.seed,
            "tried": tried(experiment, fields),
        }
        for experiment in wanted
    ]
    more: dict[str, Any] = {}
    if not fields:
        more["labels"] = labels_of(wanted)
        if complete and not options.no_baseline:
            more["baselines"] = baselines_of(options, provenance, wanted[0])
    for row in rows:
        experiment = Experiment.from_dict(row.pop("experiment"))
        if fields:
            row["tried"] = tried(experiment, fields)
    result = recording.write(
        options.out,
        rows,
        provenance=provenance,
        command=recording.command_line("accuracy.py"),
        makes=makes,
        key=key,
        append=options.append,
        **more,
    )
    out = Path(options.out)
    if not options.rows_only:
        result = derived(result)
        write_json(out, result)
    if not (fields or options.rows_only):
        plots.save(figure(result), out.parent, out.stem)
    for line in result.get("summary", []):
        print(
            "  ".join(
                f"{key}={value:.4f}" if isinstance(value, float) else f"{key}={value}" for key, value in line.items()
            )
        )
    for line in result.get("differences", []):
        f1 = line["f1_macro"]
        about = f", over {line['over_what']}" if "over_what" in line else ""
        ends = f"{f1['value']:+.4f} ({f1['low']:+.4f} to {f1['high']:+.4f}{about})"
        print(f"{line['of']} over {line['over']}: macro F1 {ends}")
    print(f"written: {out}")


def tried(experiment: Experiment, fields: Sequence[str]) -> dict[str, Any]:
    """Return the values of the fields that `--grid` changes."""
    return {field: _field(experiment, field) for field in fields}


def labels_of(wanted: Sequence[Experiment]) -> dict[str, str]:
    """Return the packed true classes of the test rows, by checksum."""
    from qlora_kit import data

    found = {}
    for spec in {repr(experiment.data): experiment.data for experiment in wanted}.values():
        labels = data.load(spec).test.labels
        found[packing.checksum(labels)] = packing.pack_classes(labels)
    return found


def baselines_of(
    options: argparse.Namespace, provenance: recording.Provenance, experiment: Experiment
) -> dict[str, dict[str, Any]]:
    """Fit the SVM baselines on an experiment's rows; return them with their device and model (None without one)."""
    from qlora_kit import data, evaluation, models

    rows = data.load(experiment.data)
    here = environment(models.default_device(), data_checksum=rows.checksum)
    fitted = evaluation.baselines(rows, lambda texts: models.embed(experiment, texts))
    return {
        name: provenance.stamped(
            {
                **baseline,
                **predicted(baseline["predictions"], rows.test.labels),
                "model": experiment.model.name if name == BASELINE else None,
                "device": here["device"],
                "command": recording.command_line("accuracy.py"),
            },
            here,
        )
        for name, baseline in fitted.items()
    }


def derived(result: dict[str, Any]) -> dict[str, Any]:
    """Return a record with the values computed from all its rows: means, differences, the device of each baseline.

    Older differences of rows without predictions are kept if they still match these rows.
    """
    import numpy as np

    from qlora_kit import claims, evaluation

    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["preset"], str(row.get("tried", "")), row["device"]), []).append(row)
    score = "validation_f1_macro" if any("tried" in row for row in result["rows"]) else "f1_macro"
    result["summary"] = [
        {
            "preset": name,
            **group[0].get("tried", {}),
            "seeds": [row["seed"] for row in group],
            f"mean_{score}": float(np.mean([row[score] for row in group])),
            "standard_deviation": float(np.std([row[score] for row in group], ddof=1)) if len(group) > 1 else None,
            "device": device,
        }
        for (name, _, device), group in groups.items()
    ]
    if score != "f1_macro":
        return result
    baselines = result.get("baselines") or {}
    for row in result["rows"]:
        baseline = baselines.get(BASELINE, {})
        row["baseline_device"] = baseline.get("device") if baseline.get("model") == row["model"] else None
    labels = {told: packing.unpack(packed).astype(np.int64) for told, packed in result.get("labels", {}).items()}
    older = [line for line in result.get("differences", []) if "over_what" not in line and _is_of(line, result)]
    lines = []
    leads: dict[str, list[tuple[str, str]]] = {}
    contenders: dict[str, dict[str, Any]] = {}
    truths: dict[str, Any] = {}
    for device in dict.fromkeys(row["device"] for row in result["rows"]):
        mine = {name: group for (name, _, where), group in groups.items() if where == device}
        kept = {name: group for name, group in mine.items() if all("predictions" in row for row in group)}
        of = {name: {"model": group[0]["model"], "labels": group[0]["labels"]} for name, group in kept.items()}
        of |= {name: {"model": b.get("model"), "labels": b["labels"]} for name, b in baselines.items() if "labels" in b}
        sides: dict[str, Any] = {
            name: {row["seed"]: packing.unpack(row["predictions"]).astype(np.int64) for row in group}
            for name, group in kept.items()
        }
        sides |= {
            name: packing.unpack(baseline["predictions"]).astype(np.int64)
            for name, baseline in baselines.items()
            if "labels" in baseline
        }
        for first, second in itertools.combinations(sides, 2):
            models = {of[name]["model"] for name in (first, second)} - {None}
            if len(models) > 1 or of[first]["labels"] != of[second]["labels"]:
                continue
            truth = labels[of[first]["labels"]]
            pair = [list(s.values()) if isinstance(s := sides[name], dict) else [s] for name in (first, second)]
            line: dict[str, Any] = {"of": first, "over": second, "device": device}
            for metric in ("f1_macro", "accuracy"):
                line[metric] = evaluation.paired_difference(*pair, truth, metric)
                if first in kept and second in kept:
                    gaps = claims.by_seed(kept[first], kept[second], metric)
                    line.setdefault("over_seeds", {"pairs": len(gaps)})[metric] = claims.seed_interval(gaps)
            lines.append(line)
            told = tuple(kept[name][0]["method"] if name in kept else name for name in (first, second))
            enough = all(not isinstance(sides[name], dict) or len(sides[name]) > 1 for name in (first, second))
            if enough and first in kept and (told in LEADS or second == BASELINE):
                leads.setdefault(device, []).append((first, second))
                truths[device] = truth
        contenders[device] = sides
    again = {(line["of"], line["over"], line["device"]) for line in lines}
    lines += [line for line in older if (line["of"], line["over"], line["device"]) not in again]
    shown = sum(map(len, leads.values()))
    for device, pairs in leads.items():
        found = evaluation.differences_over_rows_and_seeds(
            contenders[device], pairs, truths[device], shown=shown, tolerance=TOLERANCE
        )
        for (first, second), difference in zip(pairs, found, strict=True):
            about = {"of": first, "over": second, "device": device, "over_what": "rows and seeds"}
            lines.append({**about, "shown": difference.pop("shown"), "f1_macro": difference})
    return {**result, "differences": lines}


def _is_of(line: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """Return whether an older difference matches these rows: its value is the difference of their means."""
    means = []
    for name in (line["of"], line["over"]):
        scores = [row["f1_macro"] for row in result["rows"] if (row["preset"], row["device"]) == (name, line["device"])]
        baseline = (result.get("baselines") or {}).get(name)
        if not scores and baseline is None:
            return False
        means.append(sum(scores) / len(scores) if scores else baseline["f1_macro"]["value"])
    return abs(means[0] - means[1] - line["f1_macro"]["value"]) < 1e-6


def figure(result: Mapping[str, Any]) -> Any:
    """Draw the scores of `results/accuracy.json`."""
    from qlora_kit import evaluation, plots

    def place(row: Mapping[str, Any]) -> tuple[bool, int]:
        # The CPU, which everybody has, before a GPU; then the default model before others.
        name = row["preset"]
        return is_gpu(row["device"]), DEFAULT.index(name) if name in DEFAULT else 99

    scores: dict[str, list[float]] = {}
    for row in sorted(result["rows"], key=place):
        name = row["preset"].replace("_banking77", "").replace("_", " ")
        scores.setdefault(f"{name}, {plots.short_device(row['device'])}", []).append(row["f1_macro"])
    baselines = {
        evaluation.BASELINE_NAMES[name]: baseline["f1_macro"]["value"]
        for name, baseline in (result.get("baselines") or {}).items()
    }
    return plots.accuracy(scores, baselines)


if __name__ == "__main__":
    sys.exit(main())
