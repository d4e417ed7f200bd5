r"""Imitate a Tesla T4 on a larger GPU, and train DialoGPT-medium's shape on it whole: results/t4.json.

    python benchmarks/t4.py                     # a few minutes on an H100
    python benchmarks/t4.py --recipe-steps 4504 # the explained recipe's four epochs as well, 20 minutes more

A T4 has 15 GiB, no bf16, no flash attention, and the kit's Triton kernels are not for it: the process gets that share
of the GPU's memory (`torch.cuda.set_per_process_memory_fraction`), computes in fp16, and goes without both. Its speed
is not imitated. Three runs, each in a process of its own: the kit's preset over its four epochs, evaluation and saving
included, and the explained recipe over `--recipe-steps` steps, as its preset is (`recipe`) and with reentrant
checkpointing, as the explanation has it (`recipe_fp16_reentrant`; all three compute in fp16). Every batch of the recipe
is as wide as the next, so its four epochs are their number times the median step, and the record says how many were
measured. Weights are random: no score is kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from common import recording
from common.refusals import told_in_a_line

KEY = ("device", "contender")
T4_BYTES = 15 * 2**30
MARK = 10
"""Steps between two readings of the clock."""
PRESETS = {
    "ours": "dialogpt-medium_banking77_qlora",
    "recipe": "dialogpt-medium_banking77_recipe",
    "recipe_fp16_reentrant": "dialogpt-medium_banking77_recipe",
}


@told_in_a_line
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe-steps", type=timed, default=100, help="steps of the recipe that are measured (100)")
    parser.add_argument("--our-steps", type=timed, default=None, help="steps of the kit's preset; all of four epochs")
    parser.add_argument("--out", default="results/t4.json")
    recording.add_options(parser, append=False)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(train(options.one[0], int(options.one[1]) or None)))
        return 0
    import torch

    from qlora_kit import models
    from qlora_kit.system.environment import environment

    provenance = recording.begin(options)
    if not torch.cuda.is_available():
        print("A T4 is imitated on a CUDA GPU, and there is none here.", file=sys.stderr)
        return 2
    here = environment(models.default_device())
    for contender in PRESETS:
        steps = (options.our_steps or 0) if contender == "ours" else options.recipe_steps
        print(f"{contender} ...", flush=True)
        done = subprocess.run(
            [sys.executable, __file__, "--one", contender, str(steps)], stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            return done.returncode
        row = json.loads(done.stdout.strip().splitlines()[-1]) | {"device": here["device"]}
        recording.write(  # save after each run, whatever happens next
            options.out,
            [provenance.stamped(row, here)],
            provenance=provenance,
            command=recording.command_line("t4.py"),
            makes=[{"device": here["device"], "contender": name} for name in PRESETS],
            key=KEY,
            append=True,
            imitated="T4",
        )
        print("{contender}: {samples_per_second:.1f} samples/s, four epochs in {epochs_seconds:.0f} s".format(**row))
    print(f"written: {options.out}")
    return 0


def timed(text: str) -> int:
    """Return a number of steps, refusing fewer than two readings of the clock."""
    if not text.isdigit() or int(text) < 2 * MARK:
        raise argparse.ArgumentTypeError(
            f"{text}: allowed are {2 * MARK} steps or more, for the clock is read every {MARK}"
        )
    return int(text)


def imitate() -> None:
    """Limit this process to what a T4 has; the caller must ask for fp16 itself."""
    import torch

    from qlora_kit.quantization import packed

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, T4_BYTES / total))
    torch.backends.cuda.enable_flash_sdp(False)
    packed.TRITON_CAPABILITY = (99, 0)
    packed.triton_kernel.cache_clear()


def train(contender: str, steps: int | None) -> dict[str, Any]:
    """Train a preset within a T4's memory, and return its row."""
    import torch
    from transformers import TrainerCallback

    import qlora_kit as qk
    from qlora_kit import training

    imitate()
    experiment = qk.preset(PRESETS[contender]).override(
        {
            "model.name": "shape:dialogpt-medium",
            "model.random_weights": True,
            "training.precision": "fp16",
            "training.max_steps": steps,
            "tracking.wandb": "none",
            **({"training.use_reentrant": True} if contender == "recipe_fp16_reentrant" else {}),
        }
    )

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % MARK == 0:
                torch.cuda.synchronize()
                self.marks.append(time.perf_counter())

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        run = qk.finetune(experiment, out=folder, progress=False, callbacks=[clock])
        record = run.training
    marked = [later - sooner for sooner, later in zip(clock.marks, clock.marks[1:], strict=False)]
    step_seconds, batch = statistics.median(marked) / MARK, experiment.training.batch_size
    every = training.total_steps(qk.preset(PRESETS[contender]).training, record["rows"]["train"])
    whole = record["steps"] == every
    return {
        "contender": contender,
        "preset": PRESETS[contender],
        "precision": record["precision"],
        "checkpointing": experiment.training.gradient_checkpointing,
        "use_reentrant": experiment.training.use_reentrant if experiment.training.gradient_checkpointing else None,
        "padding": experiment.training.padding,
        "batch": batch,
        "steps": record["steps"],
        "epochs_steps": every,
        "seed": experiment.training.seed,
        "learning_rate": experiment.training.learning_rate,
        "epochs": experiment.training.epochs if whole else None,
        "step_seconds": step_seconds,
        "repeats_seconds": marked,
        "steps_a_repeat": MARK,
        "samples_per_second": record["timing"]["samples_per_second"] if whole else batch / step_seconds,
        # If only some steps ran, the others are assumed to take as long; evaluation is then not included.
        "epochs_seconds": record["timing"]["train_seconds"] if whole else every * step_seconds,
        "measured": whole,
        "peak_bytes": record["memory"]["peak_bytes"],
        "reserved_bytes": record["memory"]["reserved_bytes"],
        "planned_bytes": record["memory"]["planned_bytes"],
        "limit_bytes": T4_BYTES,
        "graphs": record["graphs"],
    }


if __name__ == "__main__":
    sys.exit(main())
