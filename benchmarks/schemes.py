"""Fine-tune MiniLM on Banking77 with its base stored in each scheme, and compare: results/schemes.json and .png.

    python benchmarks/schemes.py --seeds 0 1 2 --device cuda --jobs 6

Each row is a process of its own and leaves its run folder, so a benchmark that is cut off goes on where it was. With
`--jobs` several run at once on one device; `train_seconds` are then those of a shared device, and `jobs` says so.
`--seconds` cuts it off by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from accuracy import curve, predicted
from common import recording
from common.processes import run_all
from common.refusals import told_in_a_line

from qlora_kit.checking import packing
from qlora_kit.config.experiment import Experiment
from qlora_kit.config.preset import preset
from qlora_kit.config.quantization import Quantization
from qlora_kit.errors import unknown
from qlora_kit.system.environment import environment
from qlora_kit.system.files import plain, write_json
from qlora_kit.system.parsing import read_json

CONTENDERS = {
    "none": Quantization("none"),
    "int8": Quantization("int8"),
    "nf4": Quantization("nf4"),
    "nf4-single": Quantization("nf4", double_quantization=False),
    "fp4": Quantization("fp4"),
    "int4": Quantization("int4"),
}
KEY = ("device", "contender", "seed")


@told_in_a_line
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="minilm_banking77_qlora")
    parser.add_argument("--schemes", nargs="+", default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="change the preset (for a try-out)")
    parser.add_argument("--runs", default="runs/schemes", help="folder of the run folders")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so long")
    parser.add_argument("--out", default="results/schemes.json")
    recording.add_options(parser)
    parser.add_argument("--one", nargs=2, metavar=("SCHEME", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in options.schemes:
        if name not in CONTENDERS:
            raise unknown("contender", name, CONTENDERS)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.one:
        name, seed = options.one
        one(experiment(options, name, int(seed)), name, Path(options.runs), options.jobs)
        return 0
    return everything(options, recording.begin(options))


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


def everything(options: argparse.Namespace, provenance: recording.Provenance) -> int:
    """Run the missing rows, `--jobs` at a time, then write the record."""
    folder, deadline = Path(options.runs), time.monotonic() + options.seconds
    wanted = [(name, seed) for seed in options.seeds for name in options.schemes]
    todo = {
        f"{name}_seed{seed}": [sys.executable, __file__, *sys.argv[1:], "--one", name, str(seed)]
        for name, seed in wanted
        if not finished(options, provenance, folder, name, seed)
    }
    print(f"{len(wanted)} rows, {len(wanted) - len(todo)} of them there already")
    run_all(todo, folder / "logs", options.jobs, deadline)
    made = [(name, seed) for name, seed in wanted if finished(options, provenance, folder, name, seed)]
    if made:
        write(options, provenance, [read_json(row_file(folder, name, seed)) for name, seed in made], wanted)
    return 0 if len(made) == len(wanted) else 1


def finished(options: argparse.Namespace, provenance: recording.Provenance, folder: Path, name: str, seed: int) -> bool:
    """Return whether the row exists and was made with these settings and committed code."""
    if not row_file(folder, name, seed).is_file():
        return False
    made = read_json(row_file(folder, name, seed))
    same = made["experiment"] == plain(experiment(options, name, seed).to_dict())
    return bool(same and provenance.takes(made))


def one(settings: Experiment, name: str, folder: Path, jobs: int) -> None:
    """Train and test one contender with one seed, and write its row."""
    import torch

    import qlora_kit as qlora_kit
    from qlora_kit import evaluation, models, quantization
    from qlora_kit.errors import TrainingError

    if jobs > 1 and not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    file = row_file(folder, name, settings.training.seed)
    what = {
        "model": settings.model.name,
        "scheme": settings.quantization.scheme,
        "double_quantization": settings.quantization.nested,
        "seed": settings.training.seed,
        "learning_rate": settings.training.learning_rate,
        "contender": name,
        "experiment": settings.to_dict(),
    }
    try:
        run = qlora_kit.finetune(settings, out=folder, name=f"{name}_seed{settings.training.seed}", progress=False)
    except TrainingError as error:
        # A diverged seed is kept because it says something about stability; it has no score.
        here = environment(models.default_device())
        write_json(file, recording.stamped({**what, "diverged": str(error), "device": here["device"]}, here))
        return
    report = evaluation.evaluate(run, baselines=False, progress=False)
    base = models.build_classifier(settings, run.label_names, device=models.default_device())
    stored = quantization.storage(base, models.head_modules(base))
    scores, training = report["metrics"]["test"], run.training
    row = {
        **what,
        "accuracy": scores["accuracy"]["value"],
        "f1_macro": scores["f1_macro"]["value"],
        "validation_f1_macro": report["metrics"]["validation"]["f1_macro"]["value"],
        "bits_per_parameter": stored.bits_per_parameter,
        "whole_model_bits_per_parameter": stored.whole_bits_per_parameter,
        "whole_model_bytes": stored.bytes,
        "train_seconds": training["timing"]["train_seconds"],
        "jobs": jobs,
        "device": report["environment"]["device"],
        **predicted(report["predictions"]["test"], evaluation.data_of(run).test.labels),
        "curve": curve(training["losses"]),
    }
    write_json(file, recording.stamped(row, run.environment))


def write(
    options: argparse.Namespace,
    provenance: recording.Provenance,
    rows: list[dict[str, Any]],
    wanted: list[tuple[str, int]],
) -> None:
    """Write the rows, diverged seeds, each contender's difference to the unquantized base, and the figure."""
    import numpy as np

    from qlora_kit import data, models, plots

    settings = [Experiment.from_dict(row.pop("experiment")) for row in rows]
    kept = ("model", "scheme", "double_quantization", "seed", "learning_rate", "contender", "device", "commit")
    diverged = [{**{key: row[key] for key in kept}, "message": row["diverged"]} for row in rows if "diverged" in row]
    rows = [row for row in rows if "diverged" not in row]
    labels = data.load(settings[0].data).test.labels
    device = environment(models.default_device())["device"]
    out = Path(options.out)
    result = recording.write(
        out,
        rows,
        provenance=provenance,
        command=recording.command_line("schemes.py"),
        makes=[{"device": device, "contender": name, "seed": seed} for name, seed in wanted],
        key=KEY,
        append=options.append,
        preset=options.preset,
        training=settings[-1].to_dict()["training"],
        diverged=diverged,
        labels={packing.checksum(labels): packing.pack_classes(labels)},
    )
    result = derived(result)
    write_json(out, result)
    if result["rows"]:
        plots.save(plots.schemes(result["rows"]), out.parent, out.stem)
    for name in dict.fromkeys(row["contender"] for row in rows):
        scores = [row["f1_macro"] for row in rows if row["contender"] == name]
        print(
            f"{name:12} macro F1 {np.mean(scores):.4f} of {len(scores)} seeds: {', '.join(f'{s:.4f}' for s in scores)}"
        )
    print(f"written: {out}")


def derived(result: dict[str, Any]) -> dict[str, Any]:
    """Return a record with each contender's difference to the unquantized base of its device, from all rows.

    Older differences of rows without predictions are kept if they still match these rows.
    """
    from qlora_kit import evaluation

    groups: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for row in result["rows"]:
        groups.setdefault(row["device"], {}).setdefault(row["contender"], {})[row["seed"]] = row
    older = result.get("differences", [])
    lines = []
    for device, contenders in groups.items():
        for name, by_seed in contenders.items():
            base = contenders.get("none", {})
            seeds = sorted(set(by_seed) & set(base))
            if name == "none" or not seeds:
                continue
            sides = [[side[seed] for seed in seeds] for side in (by_seed, base)]
            if all("predictions" in row for side in sides for row in side):
                truth = packing.unpack(result["labels"][sides[0][0]["labels"]])
                pair = [[packing.unpack(row["predictions"]) for row in side] for side in sides]
                difference = evaluation.paired_difference(*pair, truth, "f1_macro")
            else:
                means = [sum(row["f1_macro"] for row in side) / len(side) for side in sides]
                # An older line does not name its device; its value shows which one it is about.
                told = [
                    line["f1_macro"]
                    for line in older
                    if line["contender"] == name and abs(line["f1_macro"]["value"] - (means[0] - means[1])) < 1e-6
                ]
                if not told:
                    continue
                difference = told[0]
            line = {"contender": name, "against": "none", "device": device, "seeds": seeds, "f1_macro": difference}
            lines.append(line)
    return {**result, "differences": lines}


if __name__ == "__main__":
    sys.exit(main())
