r"""Fine-tune presets with several seeds and compare their scores: results/accuracy.json, or a tuning table.

    python benchmarks/accuracy.py                                   # MiniLM: qlora, lora, full; seeds 0 1 2
    python benchmarks/accuracy.py --presets smollm2-135m_banking77_qlora --jobs 3
    python benchmarks/accuracy.py --presets minilm_banking77_qlora --grid model.head=linear,cosine \
        training.learning_rate=5e-4,1e-3,2e-3 --out results/tuning.json

With `--grid` every combination is tried and only validation scores are read: that is how presets are tuned. Without
it the test set is read, once a run, and the runs are set beside a linear SVM on the frozen base's embeddings of the
same rows, by paired bootstrap intervals over the test rows. Each row is a process of its own and leaves its run
folder, so a benchmark that was cut off goes on where it was. With `--jobs` several share one device, and their
`train_seconds` are those of a shared device.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from processes import run_all

from qlora_kit import records
from qlora_kit.errors import KitError
from qlora_kit.experiment import Experiment, preset

DEFAULT = ["minilm_banking77_qlora", "minilm_banking77_lora", "minilm_banking77_full"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=DEFAULT, metavar="PRESET")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--grid", nargs="+", default=[], metavar="NAME=V1,V2", help="try these; validation only")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change every preset")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--runs", default="runs/accuracy", help="folder of the run folders")
    parser.add_argument("--out", default="results/accuracy.json")
    parser.add_argument("--no-baseline", action="store_true", help="leave the SVM on embeddings out")
    parser.add_argument("--append", action="store_true", help="keep the rows of --out that this command does not make")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        rows = wanted(options)
        if options.one:
            one(rows[options.one], options)
            return 0
        for name, experiment in rows.items():
            if finished(options, name, experiment) is None:
                (Path(options.runs) / f"{name}.json").unlink(missing_ok=True)
        todo = {
            name: [sys.executable, __file__, *sys.argv[1:], "--one", name]
            for name, experiment in rows.items()
            if finished(options, name, experiment) is None
        }
        print(f"{len(rows)} rows, {len(rows) - len(todo)} of them there already")
        failed = run_all(todo, Path(options.runs) / "logs", options.jobs)
        made = [row for name, experiment in rows.items() if (row := finished(options, name, experiment))]
        if made:
            write(options, made)
        return 1 if failed else 0
    except KitError as error:
        print(error, file=sys.stderr)
        return 2


def wanted(options: argparse.Namespace) -> dict[str, Experiment]:
    """Return the experiments by the names of their rows."""
    grid = [(name, values.split(",")) for name, _, values in (item.partition("=") for item in options.grid)]
    fixed = {name: yaml.safe_load(value) for name, _, value in (item.partition("=") for item in options.set)}
    rows = {}
    for source, seed in itertools.product(options.presets, options.seeds):
        for values in itertools.product(*(values for _, values in grid)):
            tried = {name: yaml.safe_load(value) for (name, _), value in zip(grid, values, strict=True)}
            experiment = preset(source).override({**fixed, **tried, "training.seed": seed, "tracking.wandb": "none"})
            rows["_".join([experiment.name, *values, f"seed{seed}"])] = experiment
    return rows


def finished(options: argparse.Namespace, name: str, experiment: Experiment) -> dict[str, Any] | None:
    """Return the row of an earlier call, where it was made with these settings."""
    file = Path(options.runs) / f"{name}.json"
    if not file.is_file():
        return None
    row: dict[str, Any] = records.read_json(file)
    return row if row["experiment"] == records.plain(experiment.to_dict()) else None


def one(experiment: Experiment, options: argparse.Namespace) -> None:
    """Train one row, and test it unless it is one of a grid."""
    import torch

    import qlora_kit as qk

    if options.jobs > 1 and not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.jobs))
    name = options.one
    run = qk.finetune(experiment, out=options.runs, name=name, progress=options.jobs == 1)
    timing = run.training["timing"]
    row = {
        "preset": experiment.name,
        "model": experiment.model.name,
        "method": experiment.name.rpartition("_")[2],
        "scheme": experiment.quantization.scheme,
        "double_quantization": experiment.quantization.nested,
        "seed": experiment.training.seed,
        "validation_f1_macro": run.training["metrics"]["validation"]["f1_macro"]["value"],
        "validation_accuracy": run.training["metrics"]["validation"]["accuracy"]["value"],
        "train_seconds": timing["train_seconds"],
        "samples_per_second": timing["samples_per_second"],
        "jobs": options.jobs,
        "device": run.environment["device"],
        "environment": run.environment,
        "experiment": experiment.to_dict(),
    }
    if options.grid:
        row["tried"] = dict(item.partition("=")[::2] for item in options.grid)
        row["tried"] = {field: _field(experiment, field) for field in row["tried"]}
    else:
        report = qk.evaluate(run, baselines=False, progress=options.jobs == 1)
        test = report["metrics"]["test"]
        row |= {
            "accuracy": test["accuracy"]["value"],
            "f1_macro": test["f1_macro"]["value"],
            "loss": test["loss"]["value"],
            "predictions": report["predictions"]["test"],
        }
    records.write_json(Path(options.runs) / f"{name}.json", row)


def _field(experiment: Experiment, dotted: str) -> Any:
    node: Any = experiment
    for part in dotted.split("."):
        node = getattr(node, part)
    return node


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the rows, and for test scores each method's mean and what separates it from the others."""
    import numpy as np

    from qlora_kit import data, evaluation, models, plots

    result: dict[str, Any] = {
        "schema": records.SCHEMA,
        "environment": rows[0]["environment"],
        "command": " ".join(["python", "benchmarks/accuracy.py", *sys.argv[1:]]),
        "rows": rows,
    }
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["preset"] + str(row.get("tried", "")), []).append(row)
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
        sides = {name: [np.asarray(row["predictions"]) for row in group] for name, group in groups.items()}
        if not options.no_baseline:
            fitted = evaluation.baselines(rows_of, lambda texts: models.embed(experiment, texts))
            result["baselines"] = {
                name: {key: value for key, value in baseline.items() if key != "predictions"}
                for name, baseline in fitted.items()
            }
            sides |= {name: [np.asarray(baseline["predictions"])] for name, baseline in fitted.items()}
        result["differences"] = [
            {
                "of": first,
                "over": second,
                "device": rows[0]["device"],
                **{
                    metric: evaluation.paired_difference(sides[first], sides[second], labels, metric)
                    for metric in ("f1_macro", "accuracy")
                },
            }
            for first, second in itertools.combinations(sides, 2)
        ]
    for row in rows:
        for key in ("predictions", "experiment"):
            row.pop(key, None)
        if row["environment"] == result["environment"]:
            del row["environment"]
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
    from qlora_kit import plots

    scores: dict[str, list[float]] = {}
    for row in result["rows"]:
        device = row["device"].removeprefix("NVIDIA ").split(" ")[0] if "NVIDIA" in row["device"] else "CPU"
        scores.setdefault(f"{row['preset'].replace('_banking77', '').replace('_', ' ')}, {device}", []).append(
            row["f1_macro"]
        )
    names = {"embedding_svm": "SVM on frozen states", "tfidf_svm": "SVM on TF-IDF"}
    baselines = {
        names[name]: baseline["f1_macro"]["value"] for name, baseline in (result.get("baselines") or {}).items()
    }
    return plots.accuracy(scores, baselines)


def _appended(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return both, rows of other machines keeping their own environment."""
    made = {(row["preset"], row["device"]) for row in now["rows"]}
    kept = [row for row in before["rows"] if (row["preset"], row["device"]) not in made]
    for row in kept:
        row.setdefault("environment", before["environment"])
    devices = {(line["preset"], line["device"]) for line in now["summary"]}
    return {
        **now,
        "command": f"{before['command']}; {now['command']}",
        "rows": now["rows"] + kept,
        "summary": now["summary"] + [s for s in before["summary"] if (s["preset"], s["device"]) not in devices],
        "differences": [
            *now.get("differences", []),
            *[line for line in before.get("differences", []) if line not in now.get("differences", [])],
        ],
        "baselines": now.get("baselines") or before.get("baselines"),
    }


if __name__ == "__main__":
    sys.exit(main())
