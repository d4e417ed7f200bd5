"""Train for long and watch memory: results/soak.json.

    python benchmarks/soak.py; python benchmarks/soak.py --padding max_length; python benchmarks/soak.py --caches off
    python benchmarks/soak.py --steps 20000 --out runs/soak.json

2,000 steps on this machine's GPU, or on its CPU.

The model is all-MiniLM-L6-v2 with the adapters and the 4-bit base of `minilm_banking77_qlora`; on a CPU only its first
two layers, so that it takes minutes. A checkpoint is written every 100 steps and an evaluation is made every 200, so
that what these leave behind would be seen as well. Memory is what is held between two steps: the process's resident
set; with glibc, what of it malloc has handed out (the rest is free, and kept for later); and on a GPU what torch's
allocator has handed out and reserved.

On a CPU that has bf16 in hardware, oneDNN and torch's layer over it each keep what they have compiled for a product of
one shape, 1,024 of them by default. Batches padded to their longest text have as many shapes as texts have lengths, so
memory grows at the first batch of each length, then no more, and the rare lengths come late. The two other rows tell
that growth from a leak, which would be in them too: with `--padding max_length` there is one shape, and with `--caches
off` every shape is there and nothing is kept (and the compiling makes it slower).
A row a device, padding and caches; the file's other rows stay.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import tempfile
from typing import Any

# The library first: it imports bitsandbytes safely.
from common import recording
from common.refusals import told_in_a_line

import qlora_kit as qk
from qlora_kit import models

# isort: split
import psutil
import torch
from transformers import TrainerCallback

PRESET = "minilm_banking77_qlora"
KEY = ("device", "padding", "caches")
# How many compiled products oneDNN keeps, and how many ideep keeps, the layer between oneDNN and torch (which crashes
# at 0).
CACHES_OFF = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "LRU_CACHE_CAPACITY": "1"}
WARM = 200  # steps after which memory must not grow: everything has been allocated once
ROWS_A_STEP = 8
CHANGES = {
    "data.limit": WARM * ROWS_A_STEP,  # one epoch, and so one evaluation, every `WARM` steps
    "training.batch_size": ROWS_A_STEP,
    "training.checkpoint_steps": WARM // 2,
    "training.threads": 1,
    "tracking.wandb": "none",
}


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2` (malloc/malloc.h)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def handed_out() -> int | None:
    """Return the bytes that malloc has allocated and that are not freed, or None without glibc 2.33 or newer."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return None
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)


class Memory(TrainerCallback):
    """Record the memory in use between two steps, every `every` steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.process = psutil.Process()
        self.rows: list[dict[str, int]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure before a step, when the previous step's evaluation and checkpoint are done."""
        if state.global_step and state.global_step % self.every == 0:
            self.measure(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure once more after the last step's evaluation and checkpoint."""
        self.measure(state.global_step)

    def measure(self, step: int) -> None:
        """Add a row, and print it."""
        row = {"step": step, "resident_bytes": self.process.memory_info().rss}
        in_use = handed_out()
        if in_use is not None:
            row["malloc_bytes"] = in_use
        if torch.cuda.is_available():
            row |= {"allocated_bytes": torch.cuda.memory_allocated(), "reserved_bytes": torch.cuda.memory_reserved()}
        self.rows.append(row)
        print(", ".join(f"{name.removesuffix('_bytes')} {value:,}" for name, value in row.items()), flush=True)


def growth(rows: list[dict[str, int]], start: int) -> dict[str, float]:
    """Return how much each kind of memory grew from a step to the end, in per cent."""
    first = next(row for row in rows if row["step"] >= start)
    return {name.removesuffix("_bytes"): 100 * (rows[-1][name] / first[name] - 1) for name in first if name != "step"}


def soak(steps: int, every: int, padding: str, caches: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train, and return the row and its environment."""
    cuda = torch.cuda.is_available()
    experiment = qk.preset(PRESET).override(
        {
            **CHANGES,
            "data.max_length": 32,  # so that one shape is not mostly padding
            "model.layers": None if cuda else 2,
            "training.epochs": steps / WARM,
            "training.max_steps": steps,
            "training.padding": padding,
        }
    )
    memory = Memory(every)
    with tempfile.TemporaryDirectory() as folder:
        run = qk.finetune(experiment, out=folder, progress=False, callbacks=[memory])
        losses = [entry["loss"] for entry in run.training["losses"]]
        environment = run.environment
        timing = run.training["timing"]
    row = {
        "model": experiment.model.name,
        "layers": experiment.model.layers,
        "method": "qlora",
        "scheme": experiment.quantization.scheme,
        "batch": ROWS_A_STEP,
        "padding": padding,
        "caches": caches,
        "steps": steps,
        "seed": experiment.training.seed,
        "learning_rate": experiment.training.learning_rate,
        "evaluations": len(run.training["epochs"]),
        "from_step": WARM,
        "growth_percent": growth(memory.rows, WARM),
        "second_half_growth_percent": growth(memory.rows, steps // 2),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "train_seconds": timing["train_seconds"],
        "device": environment["device"],
        "kind": models.default_device().type,
        "memory": memory.rows,
    }
    return row, environment


@told_in_a_line
def main() -> int:
    """Run it and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps (2000)")
    parser.add_argument("--every", type=int, default=50, help="steps between two measurements (50)")
    parser.add_argument("--padding", choices=("buckets", "max_length"), default="buckets")
    parser.add_argument("--caches", choices=("on", "off"), default="on", help="whether oneDNN keeps what it compiles")
    parser.add_argument("--out", default="results/soak.json")
    recording.add_options(parser, append=False)
    options = parser.parse_args()
    if options.steps <= WARM + options.every:
        parser.error(f"--steps must be more than {WARM + options.every}: memory is compared with that at step {WARM}")
    os.environ["WANDB_MODE"] = "disabled"
    if options.caches == "off":
        os.environ.update(CACHES_OFF)  # both are read at the first product
    provenance = recording.begin(options)
    row, environment = soak(options.steps, options.every, options.padding, options.caches)
    recording.write(
        options.out,
        [provenance.stamped(row, environment)],
        provenance=provenance,
        command=recording.command_line("soak.py"),
        makes=[row],
        key=KEY,
        append=True,
    )
    for name, percent in row["growth_percent"].items():
        half = row["second_half_growth_percent"][name]
        print(f"{name}: {percent:+.2f}% from step {WARM} to step {options.steps}, {half:+.2f}% over the second half")
    return 0


if __name__ == "__main__":
    sys.exit(main())
