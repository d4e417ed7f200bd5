"""What a merge keeps of what an adapter learned, in 32, 16 and 4 bits: results/merging.json.

    python benchmarks/merging.py                     # the preset as it is, seeds 0 1 2
    python benchmarks/merging.py --epochs 2          # fewer epochs, for a CPU
    python benchmarks/merging.py --seeds 0 1 --epochs 1 --out runs/merging.json

Each seed is a process of its own: it trains the preset, whose base is in NF4, and scores the test rows in these ways,
all with the same trained head:

    as_trained            the base in NF4, adapters beside it
    no_adapter            the base in NF4 alone
    merged_fp32           adapters added to the base that was never quantized, as `Run.merge` does
    merged_fp16           the same, stored in 16 bits
    merged_bf16
    merged_nf4            added to the base as NF4 holds it, and rounded to NF4 again
    merged_nf4_of_base    added to the base that was never quantized, and rounded to NF4

`gains` says which share of the adapters' gain in macro F1 each way keeps: (way - no_adapter) / (as_trained -
no_adapter), with an interval over test rows and seeds (`qlora_kit.metrics.gains`). A row says besides how many labels
are those of `as_trained`, how far its logits are from these (relative to their size) and its probabilities at most;
and for weights that were rounded again, how many of the 4-bit numbers changed, and how large the error of rounding is
beside what the adapters add.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accuracy import predicted
from common import recording
from common.processes import run_all
from common.refusals import told_in_a_line

from qlora_kit.checking import packing
from qlora_kit.config.experiment import Experiment
from qlora_kit.config.preset import preset
from qlora_kit.errors import KitError
from qlora_kit.metrics.gains import gains_kept
from qlora_kit.system.files import plain, write_json
from qlora_kit.system.parsing import read_json

WHOLE, NOTHING = "as_trained", "no_adapter"
WAYS = (WHOLE, NOTHING, "merged_fp32", "merged_fp16", "merged_bf16", "merged_nf4", "merged_nf4_of_base")
KEY = ("device", "way", "seed")
ROWS = 256  # texts a forward pass: each unpacks the 4-bit weights once


@told_in_a_line
def main() -> int:
    """Make the missing seeds, then write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="minilm_banking77_qlora", help="its base must be in NF4")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=None, help="other than the preset's")
    parser.add_argument("--steps", type=int, default=None, help="end each training after so many (for a try-out)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--runs", default="runs/merging", help="folder of the run folders")
    parser.add_argument("--out", default="results/merging.json")
    recording.add_options(parser)
    parser.add_argument("--one", type=int, metavar="SEED", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if preset(options.preset).quantization.scheme != "nf4" or preset(options.preset).lora is None:
        raise KitError(f"{options.preset} is no QLoRA on a base in NF4, which is what is merged here")
    if len(set(options.seeds)) < 2:
        raise KitError("--seeds takes two or more: one seed tells nothing of others")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.one is not None:
        one(experiment(options, options.one), Path(options.runs))
        return 0
    provenance, folder = recording.begin(options), Path(options.runs)
    todo = {
        f"seed{seed}": [sys.executable, __file__, *sys.argv[1:], "--one", str(seed)]
        for seed in options.seeds
        if not finished(options, provenance, folder, seed)
    }
    print(f"{len(options.seeds)} seeds, {len(options.seeds) - len(todo)} of them there already", flush=True)
    run_all(todo, folder / "logs", 1)
    made = [seed for seed in options.seeds if finished(options, provenance, folder, seed)]
    if made:
        write(options, provenance, [read_json(file_of(folder, seed)) for seed in made])
    return 0 if len(made) == len(options.seeds) else 1


def experiment(options: argparse.Namespace, seed: int) -> Experiment:
    """Return what is trained with a seed."""
    changes = {"training.epochs": options.epochs, "training.max_steps": options.steps}
    wanted = {key: value for key, value in changes.items() if value is not None}
    return preset(options.preset).override({**wanted, "training.seed": seed, "tracking.wandb": "none"})


def file_of(folder: Path, seed: int) -> Path:
    """Return the file that holds a seed's rows."""
    return folder / f"seed{seed}.json"


def finished(options: argparse.Namespace, provenance: recording.Provenance, folder: Path, seed: int) -> bool:
    """Return whether a seed's rows exist and were made with these settings and committed code."""
    if not file_of(folder, seed).is_file():
        return False
    made = read_json(file_of(folder, seed))
    same = made["experiment"] == plain(experiment(options, seed).to_dict())
    return bool(same and all(provenance.takes(row) for row in made["rows"]))


def one(settings: Experiment, folder: Path) -> None:
    """Train with one seed, score all ways, and write the rows."""
    import numpy as np

    import qlora_kit as qk
    from qlora_kit import evaluation

    seed = settings.training.seed
    run = qk.finetune(settings, out=folder, name=f"seed{seed}", progress=False)
    test = evaluation.data_of(run).test
    trained: Any = None
    rows = []
    for way, dtype, logits, more in scored(run, list(test.texts)):
        trained = logits if way == WHOLE else trained
        shares = [evaluation.probabilities(side) for side in (logits, trained)]
        scores = evaluation.compute_metrics(logits, test.labels)
        row = {
            "preset": settings.name,
            "model": settings.model.name,
            "way": way,
            "dtype": dtype,
            "seed": seed,
            "learning_rate": settings.training.learning_rate,
            "steps": run.training["steps"],
            "accuracy": scores["accuracy"],
            "f1_macro": scores["f1_macro"],
            "same_label": float((logits.argmax(1) == trained.argmax(1)).mean()),
            "logits_error": float(np.linalg.norm(logits - trained) / np.linalg.norm(trained)),
            "largest_difference": float(np.abs(shares[0] - shares[1]).max()),
            **more,
            "precision": run.training["precision"],
            "device": run.environment["device"],
            **predicted(logits.argmax(1).tolist(), test.labels),
        }
        rows.append(recording.stamped(row, run.environment))
        print(f"{way}: macro F1 {row['f1_macro']:.4f}, the same label for {row['same_label']:.2%}", flush=True)
    labels = {packing.checksum(test.labels): packing.pack_classes(test.labels)}
    write_json(file_of(folder, seed), {"experiment": plain(settings.to_dict()), "rows": rows, "labels": labels})


# --- the ways ---------------------------------------------------------------------------------------------------


def scored(run: Any, texts: list[str]) -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """Yield each way with the dtype of its weights, its logits `[rows, classes]`, and more about rounded weights."""
    import tempfile

    from qlora_kit import export, models
    from qlora_kit.run import load_run

    nothing: dict[str, Any] = {"codes_changed": None, "rounding_error": None}
    for way in WAYS:
        if way in ("merged_fp32", "merged_fp16", "merged_bf16"):
            dtype = way.rpartition("_")[2]
            with tempfile.TemporaryDirectory() as folder:
                tokenizer = export.write_merged(run, Path(folder) / "merged", dtype=dtype)
                merged = export.load_merged(Path(folder) / "merged")
                logits = models.forward_texts(
                    merged,
                    tokenizer,
                    texts,
                    device=models.default_device(),
                    precision="fp32",  # as stored: no autocast
                    max_length=run.experiment.data.max_length,
                    too_long=run.experiment.data.too_long,
                    batch_size=ROWS,
                )
            yield way, dtype, logits, nothing
            continue
        fresh, about = load_run(run.path), nothing
        if way == NOTHING:
            take_adapters_off_(fresh)
        elif way != WHOLE:
            about = merge_into_nf4_(fresh, of_base=way == "merged_nf4_of_base")
        yield way, "nf4", fresh.predict(texts, batch_size=ROWS).logits, about


def adapted(model: Any) -> dict[str, Any]:
    """Return PEFT's layers with adapters by their names."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_B") and module.lora_B}


def added(layer: Any) -> Any:
    """Return what a layer's adapter adds to its weight, fp32 `[out_features, in_features]`."""
    (name,) = layer.active_adapters
    return (layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float()) * layer.scaling[name]


def take_adapters_off_(run: Any) -> None:
    """Make a run's adapters add nothing, in place; the trained head stays."""
    import torch

    with torch.no_grad():
        for layer in adapted(run.load()[0]).values():
            for weight in layer.lora_B.values():
                weight.weight.zero_()


def merge_into_nf4_(run: Any, *, of_base: bool) -> dict[str, float]:
    """Add a run's adapters to its weights and round these to NF4, in place.

    Args:
        run: A run; its model is loaded.
        of_base: Add them to the weights that were never quantized; otherwise to those that NF4 holds.

    Returns:
        `codes_changed` (share of the 4-bit numbers that differ from those in training) and `rounding_error` (of the
        merged weights, relative to what the adapters add).
    """
    import torch

    from qlora_kit import models
    from qlora_kit.quantization.backend import dense_weight

    model, tokenizer = run.load()
    whole: dict[str, Any] = {}
    if of_base:
        unquantized = run.experiment.override({"quantization.scheme": "none", "training.precision": "fp32"})
        base = models.load_trained(
            unquantized, run.label_names, run.path / "adapter", pad_token_id=tokenizer.pad_token_id
        )
        whole = {name: layer.base_layer for name, layer in adapted(base).items()}
    changed = numbers = 0
    errors = sizes = 0.0
    with torch.no_grad():
        for name, layer in adapted(model).items():
            old = layer.base_layer.weight
            gain = added(layer)
            wanted = dense_weight(whole[name] if of_base else layer.base_layer, torch.float32) + gain
            layer.base_layer.weight = in_nf4(wanted, run.experiment.quantization, layer.base_layer.compute_dtype)
            pair = [weight.data.view(torch.uint8) for weight in (old, layer.base_layer.weight)]
            for shift in (0, 4):  # two numbers a byte
                changed += int(((pair[0] >> shift & 15) != (pair[1] >> shift & 15)).sum())
            numbers += wanted.numel()
            errors += float((dense_weight(layer.base_layer, torch.float32) - wanted).square().sum())
            sizes += float(gain.square().sum())
    take_adapters_off_(run)
    return {"codes_changed": changed / numbers, "rounding_error": (errors / sizes) ** 0.5}


def in_nf4(weight: Any, spec: Any, compute_dtype: Any) -> Any:
    """Return a weight `[out_features, in_features]` as bitsandbytes stores it."""
    from torch import nn

    from qlora_kit import models

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    holder = nn.Sequential(linear)
    models.quantize_with_bitsandbytes_(holder, spec, [], compute_dtype)
    return holder[0].weight


# --- the record -------------------------------------------------------------------------------------------------


def write(options: argparse.Namespace, provenance: recording.Provenance, made: list[dict[str, Any]]) -> None:
    """Write the rows of all seeds, and the gains kept."""
    rows = [row for seed in made for row in seed["rows"]]
    device = rows[0]["device"]
    result = recording.write(
        options.out,
        rows,
        provenance=provenance,
        command=recording.command_line("merging.py"),
        makes=[{"device": device, "way": way, "seed": seed} for way in WAYS for seed in options.seeds],
        key=KEY,
        append=options.append,
        labels={checksum: packed for seed in made for checksum, packed in seed["labels"].items()},
    )
    result = derived(result)
    write_json(options.out, result)
    for line in result["gains"]:
        kept = line["f1_macro"]
        told = "the gain is not told apart from nothing"
        if kept:
            told = f"keeps {kept['value']:.3f} of the gain ({kept['low']:.3f} to {kept['high']:.3f})"
        print(f"{line['way']}: {told}")
    print(f"written: {options.out}")


def derived(result: dict[str, Any]) -> dict[str, Any]:
    """Return a record with the share of the gain that each way keeps, by device, from all its rows."""
    lines = []
    for device in dict.fromkeys(row["device"] for row in result["rows"]):
        by_way: dict[str, dict[int, Mapping[str, Any]]] = {}
        for row in result["rows"]:
            if row["device"] == device:
                by_way.setdefault(row["way"], {})[row["seed"]] = row
        seeds = sorted(set.intersection(*(set(by_way.get(way, {})) for way in WAYS)))
        if len(seeds) < 2:
            continue
        classes = {
            way: {seed: packing.unpack(by_way[way][seed]["predictions"]).astype("int64") for seed in seeds}
            for way in WAYS
        }
        truth = packing.unpack(result["labels"][by_way[WHOLE][seeds[0]]["labels"]]).astype("int64")
        kept = gains_kept(classes, truth, whole=WHOLE, nothing=NOTHING)
        lines += [{"way": way, "device": device, "seeds": seeds, "f1_macro": share} for way, share in kept.items()]
    return {**result, "gains": lines}


if __name__ == "__main__":
    sys.exit(main())
