"""Fine-tune MiniLM on Banking77 with its base stored in each scheme, and compare: results/schemes.json and .png.

    python benchmarks/schemes.py --seeds 0 1 2 --device cuda --jobs 6

Each row is a process of its own and leaves its run folder, so a benchmark that is cut off goes on where it was. With
`--jobs` several run at once on one device; `train_seconds` are then those of a shared device, and `jobs` says so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from processes import run_all

from qlora_kit import records
from qlora_kit.errors import KitError, unknown
from qlora_kit.experiment import Experiment, preset
from qlora_kit.quantization import Quantization

CONTENDERS = {
    "none": Quantization("none"),
    "int8": Quantization("int8"),
    "nf4": Quantization("nf4"),
    "nf4-single": Quantization("nf4", double_quantization=False),
    "fp4": Quantization("fp4"),
    "int4": Quantization("int4"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="minilm_banking77_qlora")
    parser.add_argument("--schemes", nargs="+", default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="change the preset (for a try-out)")
    parser.add_argument("--runs", default="runs/schemes", help="folder of the run folders")
    parser.add_argument("--out", default="results/schemes.json")
    parser.add_argument("--one", nargs=2, metavar=("SCHEME", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        for name in options.schemes:
            if name not in CONTENDERS:
                raise unknown("contender", name, CONTENDERS)
        if options.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if options.one:
            name, seed = options.one
            one(experiment(options, name, int(seed)), name, Path(options.runs), options.jobs)
            return 0
        return everything(options)
    except KitError as error:
        print(error, file=sys.stderr)
        return 2


def experiment(options: argparse.Namespace, name: str, seed: int) -> Experiment:
    changes = dict(pair.partition("=")[::2] for pair in options.set)
    spec = CONTENDERS[name]
    return preset(options.preset).override(
        {
            **{key: json.loads(value) for key, value in changes.items()},
            "quantization.scheme": spec.scheme,
            "quantization.double_quantization": spec.double_quantization,
            "training.seed": seed,
            "tracking.wandb": "none",
        }
    )


def row_file(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name}_seed{seed}.json"


def everything(options: argparse.Namespace) -> int:
    """Run what is missing, `--jobs` at a time, then put the rows together."""
    folder = Path(options.runs)
    wanted = [(name, seed) for seed in options.seeds for name in options.schemes]
    todo = {
        f"{name}_seed{seed}": [sys.executable, __file__, *sys.argv[1:], "--one", name, str(seed)]
        for name, seed in wanted
        if not finished(options, folder, name, seed)
    }
    print(f"{len(wanted)} rows, {len(wanted) - len(todo)} of them there already")
    failed = run_all(todo, folder / "logs", options.jobs)
    rows = [records.read_json(row_file(folder, name, seed)) for name, seed in wanted if exists(folder, name, seed)]
    if rows:
        write(options, rows)
    return 1 if failed else 0


def exists(folder: Path, name: str, seed: int) -> bool:
    return row_file(folder, name, seed).is_file()


def finished(options: argparse.Namespace, folder: Path, name: str, seed: int) -> bool:
    """Whether the row is there and was made with these settings."""
    if not exists(folder, name, seed):
        return False
    made = records.read_json(row_file(folder, name, seed))
    return bool(made["experiment"] == records.plain(experiment(options, name, seed).to_dict()))


def one(settings: Experiment, name: str, folder: Path, jobs: int) -> None:
    """Train and test one contender with one seed, and write its row."""
    import torch

    import qlora_kit
    from qlora_kit import evaluation, models, quantization

    if jobs > 1 and not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    run = qlora_kit.finetune(settings, out=folder, name=f"{name}_seed{settings.training.seed}", progress=False)
    report = evaluation.evaluate(run, baselines=False, progress=False)
    base = models.build_classifier(settings, run.label_names, device=models.default_device())
    stored = quantization.storage(base, models.head_modules(base))
    scores, training = report["metrics"]["test"], run.training
    records.write_json(
        row_file(folder, name, settings.training.seed),
        {
            "model": settings.model.name,
            "scheme": settings.quantization.scheme,
            "double_quantization": settings.quantization.nested,
            "seed": settings.training.seed,
            "accuracy": scores["accuracy"]["value"],
            "f1_macro": scores["f1_macro"]["value"],
            "validation_f1_macro": report["metrics"]["validation"]["f1_macro"]["value"],
            "bits_per_parameter": stored.bits_per_parameter,
            "whole_model_bits_per_parameter": stored.whole_bits_per_parameter,
            "whole_model_bytes": stored.bytes,
            "train_seconds": training["timing"]["train_seconds"],
            "jobs": jobs,
            "device": report["environment"]["device"],
            "contender": name,
            "predictions": report["predictions"]["test"],
            "experiment": settings.to_dict(),
            "environment": run.environment,
        },
    )


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the table, each contender's lead over the unquantized base, and the figure."""
    import numpy as np

    from qlora_kit import data, evaluation, plots

    labels = np.asarray(data.load(Experiment.from_dict(rows[0]["experiment"]).data).test.labels)
    predictions: dict[str, dict[int, Any]] = {}
    for row in rows:
        predictions.setdefault(row["contender"], {})[row["seed"]] = np.asarray(row.pop("predictions"))
    differences = []
    for name, by_seed in predictions.items():
        seeds = sorted(set(by_seed) & set(predictions.get("none", {})))
        if name != "none" and seeds:
            sides = ([by_seed[seed] for seed in seeds], [predictions["none"][seed] for seed in seeds])
            difference = evaluation.paired_difference(*sides, labels, "f1_macro")
            differences.append({"contender": name, "against": "none", "seeds": seeds, "f1_macro": difference})
    environment = rows[0]["environment"]
    changes = {}
    for row in rows:
        changes = row.pop("experiment")
        if row["environment"] == environment:
            del row["environment"]
    result = {
        "schema": records.SCHEMA,
        "environment": environment,
        "command": " ".join(["python benchmarks/schemes.py", *sys.argv[1:]]),
        "preset": options.preset,
        "training": changes["training"],
        "rows": rows,
        "differences": differences,
    }
    out = Path(options.out)
    records.write_json(out, result)
    plots.save(plots.schemes(rows), out.parent, out.stem)
    for name in predictions:
        scores = [row["f1_macro"] for row in rows if row["contender"] == name]
        print(
            f"{name:12} macro F1 {np.mean(scores):.4f} of {len(scores)} seeds: {', '.join(f'{s:.4f}' for s in scores)}"
        )
    print(f"written: {out}")


if __name__ == "__main__":
    sys.exit(main())
