"""Time a training step with the optimizer's state in pages and outside of them: results/paging.json.

    python benchmarks/paging.py            # two minutes or so on a GPU: pages are CUDA's
    python benchmarks/paging.py --any-device --from-changes --models minilm --length 16 --out /tmp/paging.json

The same 8-bit AdamW, on SmolLM2-135M's shape with every weight trained, where its state is large, and on
DialoGPT-medium's with adapters, where it is small. The contenders take turns (`memory.race`), and a row keeps each
turn's time, for a single timing tells nothing. Models have random weights: time does not depend on what they are.
`--any-device` is for a try-out: without CUDA nothing lies in pages.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from common import recording
from common.refusals import told_in_a_line

from qlora_kit import memory, models
from qlora_kit.config.preset import preset
from qlora_kit.errors import KitError
from qlora_kit.system.environment import environment

# The method for each model, and the model's name in an experiment; the last model is for trying out.
MODELS = {
    "smollm2-135m": ("full", "shape:smollm2-135m"),
    "dialogpt-medium": ("qlora", "shape:dialogpt-medium"),
    "minilm": ("qlora", "embedded:minilm"),
}
OPTIMIZERS = {"adamw_8bit": False, "paged_adamw_8bit": True}
KEY = ("model", "method", "optimizer", "device")


@told_in_a_line
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS)[:2], metavar="MODEL")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5, help="a turn; its time is their median")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each contender")
    parser.add_argument("--any-device", action="store_true", help="without a GPU too, where pages do nothing")
    parser.add_argument("--out", default="results/paging.json")
    recording.add_options(parser)
    options = parser.parse_args()
    provenance = recording.begin(options)
    device = models.default_device()
    if device.type != "cuda" and not options.any_device:
        raise KitError("there is no CUDA GPU, and pages are CUDA's: nothing to time")
    here = environment(device)
    makes = [
        {"model": model, "method": MODELS[model][0], "optimizer": optimizer, "device": here["device"]}
        for model in options.models
        for optimizer in OPTIMIZERS
    ]
    rows: list[dict[str, Any]] = []
    for model in options.models:
        rows += [provenance.stamped(row, here) for row in one(model, options, here["device"])]
        # Write after each case: an interrupted call loses only the current case.
        recording.write(
            options.out, rows, provenance=provenance, command=recording.command_line("paging.py"), makes=makes, key=KEY,
            append=options.append,
        )  # fmt: skip
    print(f"written: {options.out}")
    return 0


def one(model: str, options: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """Return a row for each optimizer, timed in turns."""
    method, name = MODELS[model]
    targets = ["c_attn", "c_proj"] if model == "dialogpt-medium" else "all-linear"
    experiment = preset("dialogpt-medium_banking77_recipe").override(
        {
            "model.name": name,
            "model.random_weights": True,
            "lora.target_modules": targets,
            "training.prepare_for_kbit_training": False,
            "training.precision": "auto",
            "training.warmup_steps": 0,
            "training.learning_rate": 1e-4,
            "tracking.wandb": "none",
        }
    )
    scheme = "nf4" if method == "qlora" else "none"
    ways = {name: (method, scheme, {"training.optimizer": name}) for name in OPTIMIZERS}
    found = memory.race(
        experiment, ways, batch=options.batch, length=options.length, steps=options.steps, repeats=options.repeats
    )
    rows = []
    for row in found:
        each = row["step_seconds_each"]
        rows.append(
            {
                "model": model,
                "method": method,
                "scheme": scheme,
                "optimizer": row["label"],
                "paged": OPTIMIZERS[row["label"]],
                **{key: row[key] for key in ("batch", "length", "steps", "step_seconds", "step_seconds_each")},
                "device": device,
            }
        )
        ends = f"{min(each):.4f} to {max(each):.4f} s" if each else "out of memory"
        print(f"{model}, {row['label']}: {len(each)} turns, {ends}", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
