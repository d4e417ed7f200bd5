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

import yaml
from processes import run_all

from qlora_kit import records
from qlora_kit.errors import KitError
from qlora_kit.experiment import Experiment, preset

DEFAULT = ["minilm_banking77_qlora", "minilm_banking77_lora", "minilm_banking77_full"]
RATE = "training.learning_rate"
FACTORS = (0.25, 0.5, 1, 2, 4, 8)
TUNING_SEED = 99


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
    parser.add_argument("--append", action="store_true", help="keep the rows of --out that this command does not make")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--no-test", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tune and (options.grid or TUNING_SEED in options.seeds):
        parser.error(f"--tune brings its own --grid, and seed {TUNING_SEED} is its own")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    deadline = time.monotonic() + options.seconds
    try:
        if options.one:
            one(Experiment.from_yaml(Path(options.one)), Path(options.one).stem, options)
            return 0
        chosen: dict[str, dict[str, Any]] = {}
        if options.tune:
            tried = {name: row for source in options.presets for name, row in settings(options, source).items()}
            if not run(tried, options, deadline, test=False):
                print("not every setting was tried: the same command again goes on", file=sys.stderr)
                return 1
            chosen = write_tuning(options, [records.read_json(Path(options.runs) / f"{name}.json") for name in tried])
        rows = wanted(options, chosen)
        complete = run(rows, options, deadline, test=not options.grid)
        made = [row for name, experiment in rows.items() if (row := finished(options, name, experiment))]
        if made:
            write(options, made)
        return 0 if complete else 1
    except KitError as error:
        print(error, file=sys.stderr)
        return 2


def run(rows: Mapping[str, Experiment], options: argparse.Namespace, deadline: float, *, test: bool) -> bool:
    """Make the rows that are missing; return whether all are there."""
    folder = Path(options.runs)
    todo = {}
    for name, experiment in rows.items():
        if finished(options, name, experiment) is None:
            (folder / f"{name}.json").unlink(missing_ok=True)
            settled = folder / "experiments" / f"{name}.yaml"
            records.write_text(settled, experiment.to_yaml())
            todo[name] = [sys.executable, __file__, "--one", str(settled), "--runs", options.runs, "--jobs",
                          str(options.jobs), "--device", options.device, *([] if test else ["--no-test"])]  # fmt: skip
    print(f"{len(rows)} rows, {len(rows) - len(todo)} of them there already", flush=True)
    run_all(todo, folder / "logs", options.jobs, deadline)
    return all(finished(options, name, experiment) for name, experiment in rows.items())


def settings(options: argparse.Namespace, source: str) -> dict[str, Experiment]:
    """Return what `--tune` tries of a preset: the same number of learning rates for each."""
    base = preset(source).override({**fixed(options), "training.seed": TUNING_SEED, "tracking.wandb": "none"})
    rates = [base.training.learning_rate * factor for factor in FACTORS]
    return {f"{base.name}_{rate:.3g}_seed{TUNING_SEED}": base.override({RATE: rate}) for rate in rates}


def fixed(options: argparse.Namespace) -> dict[str, Any]:
    """Return what `--set` changes in every preset."""
    return {name: yaml.safe_load(value) for name, _, value in (item.partition("=") for item in options.set)}


def wanted(options: argparse.Namespace, chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, Experiment]:
    """Return the experiments by the names of their rows; `chosen` are changes by preset, from `--tune`."""
    grid = [(name, values.split(",")) for name, _, values in (item.partition("=") for item in options.grid)]
    rows = {}
    for source, seed in itertools.product(options.presets, options.seeds):
        for values in itertools.product(*(values for _, values in grid)):
            tried = {name: yaml.safe_load(value) for (name, _), value in zip(grid, values, strict=True)}
            common = {**fixed(options), "training.seed": seed, "tracking.wandb": "none"}
            experiment = preset(source).override({**common, **tried})
            best = chosen.get(experiment.name, {})
            words = [*values, *(f"{value:.3g}" for value in best.values())]
            rows["_".join([experiment.name, *words, f"seed{seed}"])] = experiment.override(best)
    return rows


def finished(options: argparse.Namespace, name: str, experiment: Experiment) -> dict[str, Any] | None:
    """Return the row of an earlier call, where it was made with these settings."""
    file = Path(options.runs) / f"{name}.json"
    if not file.is_file():
        return None
    row: dict[str, Any] = records.read_json(file)
    return row if row["experiment"] == records.plain(experiment.to_dict()) else None


def one(experiment: Experiment, name: str, options: argparse.Namespace) -> None:
    """Train one row, test it if it is to be tested, and write its file."""
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
        # A learning rate at which training diverges was tried all the same, and is not to be tried again.
        here = records.environment(qk.models.default_device())
        row |= {"validation_f1_macro": None, "diverged": str(error), "device": here["device"], "environment": here}
        records.write_json(file, row)
        return
    timing = run.training["timing"]
    row |= {
        "validation_f1_macro": run.training["metrics"]["validation"]["f1_macro"]["value"],
        "validation_accuracy": run.training["metrics"]["validation"]["accuracy"]["value"],
        "train_seconds": timing["train_seconds"],
        "samples_per_second": timing["samples_per_second"],
        "device": run.environment["device"],
        "environment": run.environment,
    }
    if not options.no_test:
        report = qk.evaluate(run, baselines=False, progress=options.jobs == 1)
        test = report["metrics"]["test"]
        row |= {
            "accuracy": test["accuracy"]["value"],
            "f1_macro": test["f1_macro"]["value"],
            "loss": test["loss"]["value"],
            "predictions": report["predictions"]["test"],
            "curve": curve(run.training["losses"]),
        }
    records.write_json(file, row)


def method(experiment: Experiment) -> str:
    """Return what a row's `method` is: the recipe by its name, the others by what they do."""
    if experiment.name.endswith("_recipe"):
        return "recipe"
    if experiment.lora is None:
        return "full"
    return "lora" if experiment.quantization.scheme == "none" else "qlora"


def curve(losses: Sequence[Mapping[str, Any]], most: int = 60) -> dict[str, list[Any]]:
    """Return steps, losses and gradient norms, thinned to `most` logs, in four digits."""
    kept = losses[:: max(1, -(-len(losses) // most))]
    digits = {key: [row.get(key) for row in kept] for key in ("loss", "grad_norm")}
    rounded = {key: [None if v is None else float(f"{v:.4g}") for v in values] for key, values in digits.items()}
    return {"step": [row["step"] for row in kept], **rounded}


def _field(experiment: Experiment, dotted: str) -> Any:
    node: Any = experiment
    for part in dotted.split("."):
        node = getattr(node, part)
    return node


def write_tuning(options: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Write what `--tune` tried and chose; return each preset's best setting, as changes of the preset."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        row["tried"] = {RATE: row.pop("learning_rate")}
        del row["experiment"]
        groups.setdefault(row["preset"], []).append(row)
    chosen = []
    for name, group in groups.items():
        known = [row for row in group if row["validation_f1_macro"] is not None]
        if not known:
            raise KitError(f"every learning rate that was tried of {name} diverged")
        best = max(known, key=lambda row: row["validation_f1_macro"])
        rates = sorted(row["tried"][RATE] for row in group)
        chosen.append(
            {
                "preset": name,
                "settings": len(group),
                "tried": best["tried"],
                "validation_f1_macro": best["validation_f1_macro"],
                # The best of all may lie beyond the last that was tried.
                "at_the_edge": best["tried"][RATE] in (rates[0], rates[-1]),
            }
        )
    result = {
        "schema": records.SCHEMA,
        "environment": rows[0]["environment"],
        "command": command(),
        "rows": rows,
        "chosen": chosen,
    }
    shared_environment(result)
    records.write_json(options.tuning, result)
    for line in chosen:
        edge = ", at the edge of what was tried" if line["at_the_edge"] else ""
        print(
            f"{line['preset']}: {line['tried'][RATE]:.3g} of {line['settings']} learning rates, validation macro F1 "
            f"{line['validation_f1_macro']:.4f}{edge}"
        )
    print(f"written: {options.tuning}", flush=True)
    return {line["preset"]: line["tried"] for line in chosen}


def command() -> str:
    return " ".join(["python", "benchmarks/accuracy.py", *sys.argv[1:]])


def shared_environment(result: dict[str, Any]) -> None:
    """Leave a row's environment out where it is the file's."""
    for row in result["rows"]:
        if row["environment"] == result["environment"]:
            del row["environment"]


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the rows, and for test scores each method's mean and what separates it from the others."""
    import numpy as np

    from qlora_kit import claims, data, evaluation, models, plots

    for row in rows:
        if options.grid:
            experiment = Experiment.from_dict(row["experiment"])
            row["tried"] = {field: _field(experiment, field) for field in (g.partition("=")[0] for g in options.grid)}
    result: dict[str, Any] = {
        "schema": records.SCHEMA,
        "environment": rows[0]["environment"],
        "command": command(),
        "rows": rows,
    }
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["preset"] + str(row.get("tried", "")), row["device"]), []).append(row)
    score = "validation_f1_macro" if options.grid else "f1_macro"
    result["summary"] = [
        {
            "preset": group[0]["preset"],
            **group[0].get("tried", {}),
            "seeds": [row["seed"] for row in group],
            f"mean_{score}": float(np.mean([row[score] for row in group])),
            "standard_deviation": float(np.std([row[score] for row in group], ddof=1)) if len(group) > 1 else None,
            "device": group[0]["device"],
        }
        for group in groups.values()
    ]
    if not options.grid:
        experiment = Experiment.from_dict(rows[0]["experiment"])
        rows_of = data.load(experiment.data)
        labels = np.asarray(rows_of.test.labels)
        baselines = {}
        if not options.no_baseline:
            fitted = evaluation.baselines(rows_of, lambda texts: models.embed(experiment, texts))
            baselines = {name: [np.asarray(baseline["predictions"])] for name, baseline in fitted.items()}
            result["baselines"] = {
                name: {key: value for key, value in baseline.items() if key != "predictions"}
                for name, baseline in fitted.items()
            }
        result["differences"] = []
        for device in dict.fromkeys(row["device"] for row in rows):
            mine = {name: group for (name, where), group in groups.items() if where == device}
            sides = {name: [np.asarray(row["predictions"]) for row in group] for name, group in mine.items()}
            for first, second in itertools.combinations({**sides, **baselines}, 2):
                line: dict[str, Any] = {"of": first, "over": second, "device": device}
                for metric in ("f1_macro", "accuracy"):
                    pair = [{**sides, **baselines}[name] for name in (first, second)]
                    line[metric] = evaluation.paired_difference(*pair, labels, metric)
                    if first in mine and second in mine:
                        gaps = claims.by_seed(mine[first], mine[second], metric)
                        line.setdefault("over_seeds", {"pairs": len(gaps)})[metric] = claims.seed_interval(gaps)
                result["differences"].append(line)
    for row in rows:
        for key in ("predictions", "experiment"):
            row.pop(key, None)
    shared_environment(result)
    out = Path(options.out)
    if options.append and out.is_file():
        result = _appended(records.read_json(out), result)
    records.write_json(out, result)
    if not options.grid:
        plots.save(figure(result), out.parent, out.stem)
    for line in result["summary"]:
        print(
            "  ".join(
                f"{key}={value:.4f}" if isinstance(value, float) else f"{key}={value}" for key, value in line.items()
            )
        )
    for line in result.get("differences", []):
        f1 = line["f1_macro"]
        print(f"{line['of']} over {line['over']}: macro F1 {f1['value']:+.4f} ({f1['low']:+.4f} to {f1['high']:+.4f})")
    print(f"written: {out}")


def figure(result: dict[str, Any]) -> Any:
    """Draw the scores of `results/accuracy.json`."""
    from qlora_kit import evaluation, plots

    def place(row: Mapping[str, Any]) -> tuple[bool, int]:
        # The default model before others; a CPU, which everybody has, before a GPU.
        name = row["preset"]
        return "GPU" in row["device"] or "NVIDIA" in row["device"], DEFAULT.index(name) if name in DEFAULT else 99

    scores: dict[str, list[float]] = {}
    for row in sorted(result["rows"], key=place):
        name = row["preset"].replace("_banking77", "").replace("_", " ")
        scores.setdefault(f"{name}, {plots.short_device(row['device'])}", []).append(row["f1_macro"])
    baselines = {
        evaluation.BASELINE_NAMES[name]: baseline["f1_macro"]["value"]
        for name, baseline in (result.get("baselines") or {}).items()
    }
    return plots.accuracy(scores, baselines)


def _appended(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return both, rows of other machines keeping their own environment."""
    made = {(row["preset"], row["device"]) for row in now["rows"]}
    kept = [row for row in before["rows"] if (row["preset"], row["device"]) not in made]
    for row in kept:
        row.setdefault("environment", before["environment"])
    devices = {(line["preset"], line["device"]) for line in now["summary"]}
    again = {(line["of"], line["over"], line["device"]) for line in now.get("differences", [])}
    return {
        **now,
        "command": f"{before['command']}; {now['command']}",
        "rows": now["rows"] + kept,
        "summary": now["summary"] + [s for s in before["summary"] if (s["preset"], s["device"]) not in devices],
        "differences": [
            *now.get("differences", []),
            *[
                line
                for line in before.get("differences", [])
                if (line["of"], line["over"], line["device"]) not in again
                # What is made anew was compared as it had been.
                and not {(line["of"], line["device"]), (line["over"], line["device"])} & made
            ],
        ],
        "baselines": now.get("baselines") or before.get("baselines"),
    }


if __name__ == "__main__":
    sys.exit(main())
