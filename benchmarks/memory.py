"""Measure what training takes on a GPU, beside what was planned: results/memory.json.

    python benchmarks/memory.py                     # everything; about four minutes on an H100
    python benchmarks/memory.py --groups recipe t4  # some of it
    python benchmarks/memory.py --groups cpu        # what a machine without a GPU can measure

Every row is a process of its own, so that the allocator's peak is that row's. Rows run side by side as far as the
GPU's memory reaches; those of the groups `recipe`, `t4` and `optimizers` run alone and have `step_seconds`, the others
have `shared_step_seconds`. Models have random weights: memory and speed do not depend on them. The same command again
goes on with the rows that are missing. Bytes are read from the allocator; the seconds of each step are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import recording
from common.refusals import told_in_a_line

from qlora_kit.config.experiment import Experiment
from qlora_kit.config.preset import preset
from qlora_kit.system.environment import cpu_name, environment
from qlora_kit.system.files import write_json
from qlora_kit.system.parsing import read_json

KEY = ("device", "name")
GROUPS = ("recipe", "t4", "alike", "grid", "optimizers", "cpu")
T4_BYTES = 15 * 1024**3
SHAPES = {
    "dialogpt-medium": ((8, 128), (4, 256)),
    "smollm2-135m": ((8, 128), (4, 512)),
    "llama-1.1b": ((8, 128), (2, 512)),
    "llama-7b": ((4, 128), (1, 512)),
}
# method, scheme, double quantization
METHODS = (
    ("qlora", "nf4", True),
    ("lora", "none", True),
    ("qlora", "int8", True),
    ("qlora", "nf4", False),
    ("full", "none", True),
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row to measure."""

    name: str
    group: str
    model: str
    method: str
    experiment: Experiment
    batch: int
    length: int
    steps: int = 3
    alone: bool = False
    limit: int | None = None
    environment: tuple[tuple[str, str], ...] = ()
    note: str = ""
    whole: bool = False  # train like a real run, with its own batches and graphs, not with `memory.measure`


def cells() -> list[Cell]:
    """Return every cell, the most informative first."""
    found: list[Cell] = []
    # The explained recipe, and the same training with less memory.
    recipe = shape(preset("dialogpt-medium_banking77_recipe"), "dialogpt-medium").override(
        {"training.warmup_steps": 0, "tracking.wandb": "none"}
    )
    sixteen = recipe.override({"training.prepare_for_kbit_training": False})
    lean = sixteen.override({"model.lean": True, "model.fused": True})
    least = lean.override({"quantization.embeddings": "nf4"})
    # The kit does not set this variable; it must be set before CUDA starts. Each such row has a twin without it.
    small = (("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8"),)
    asked = "; CUBLAS_WORKSPACE_CONFIG is set by this benchmark alone"
    sixteen_bits = "embeddings in 16 bits, lean activations, cuBLAS workspaces "
    for name, experiment, variables, note in (
        ("recipe", recipe, (), "the explained recipe"),
        ("ours_16bit_embeddings", lean, small, f"{sixteen_bits}of 8 MiB{asked}"),
        ("ours_4bit_embeddings", least, small, f"embeddings in 4 bits, cuBLAS workspaces of 8 MiB{asked}"),
        ("recipe_16bit_embeddings", sixteen, (), "the recipe without prepare_model_for_kbit_training"),
        ("ours_32mib_cublas", lean, (), f"{sixteen_bits}as they are"),
        ("ours_4bit_embeddings_32mib_cublas", least, (), "embeddings in 4 bits: the least of the kit by itself"),
        ("recipe_8mib_cublas", recipe, small, f"the explained recipe, cuBLAS workspaces of 8 MiB{asked}"),
    ):
        found.append(
            Cell(name, "recipe", "dialogpt-medium", "recipe" if name.startswith("recipe") else "qlora", experiment,
                 8, 128, 12, True, None, variables, note)
        )  # fmt: skip
    # The preset with its defaults: no checkpointing, batches only as wide as needed, CUDA graphs.
    shipped = shape(preset("dialogpt-medium_banking77_qlora"), "dialogpt-medium").override(
        {"training.max_steps": 60, "tracking.wandb": "none"}
    )
    found.append(
        Cell("preset", "recipe", "dialogpt-medium", "qlora", shipped, shipped.training.batch_size,
             shipped.data.max_length, 60, True, None, (), "the preset as it is shipped, evaluation included", True)
    )  # fmt: skip
    # 7 B in a T4's memory: the paper's adapters (r=64 on every linear layer) and the kit's (r=16).
    for rank, scheme, optimizer in (
        (64, "nf4", "paged_adamw_32bit"),
        (64, "none", "adamw_torch"),
        (64, "none", "paged_adamw_32bit"),
        (16, "nf4", "paged_adamw_32bit"),
        (16, "none", "adamw_torch"),
    ):
        method = "qlora" if scheme == "nf4" else "lora"
        experiment = base("llama-7b", method, scheme, True, True, rank).override(
            {"training.precision": "fp16", "training.optimizer": optimizer, "training.max_grad_norm": 0.3}
        )
        name = f"t4_{scheme}_r{rank}_{optimizer}"
        found.append(Cell(name, "t4", "llama-7b", method, experiment, 1, 512, 10, True, T4_BYTES))
    for model, shapes in SHAPES.items():
        for batch, length in shapes:
            for checkpointing in (True, False):
                for method, scheme, nested in METHODS:
                    if method == "full" and model == "llama-7b":
                        continue  # 16 bytes a weight: 99 GiB before the first activation
                    name = f"{model}_{method}_{scheme}{'' if nested else '-single'}_{batch}x{length}"
                    name += "_checkpointing" if checkpointing else ""
                    experiment = base(model, method, scheme, nested, checkpointing)
                    found.append(Cell(name, "grid", model, method, experiment, batch, length))
    # The recipe's own precision; the two differ only in how the base is stored.
    for method, scheme in (("qlora", "nf4"), ("lora", "none")):
        experiment = base("dialogpt-medium", method, scheme, True, True).override({"training.precision": "fp16"})
        note = "the recipe's precision, alike in all but storage"
        found.append(
            Cell(f"alike_{method}_fp16", "alike", "dialogpt-medium", method, experiment, 8, 128, 12, True, note=note)
        )
    # Optimizers where their state is large: every weight of SmolLM2 is trained.
    for optimizer in ("adamw_torch", "paged_adamw_32bit", "adamw_8bit", "paged_adamw_8bit"):
        experiment = base("smollm2-135m", "full", "none", True, True).override({"training.optimizer": optimizer})
        found.append(Cell(f"optimizer_{optimizer}", "optimizers", "smollm2-135m", "full", experiment, 8, 128, 10, True))
    # The same measurements without a GPU.
    for method, scheme, nested in (*METHODS, ("qlora", "fp4", True), ("qlora", "int4", True)):
        for checkpointing in (False, True):
            experiment = preset("minilm_banking77_full" if method == "full" else "minilm_banking77_qlora").override(
                {
                    "quantization.scheme": scheme,
                    "quantization.double_quantization": nested,
                    "training.gradient_checkpointing": checkpointing,
                }
            )
            name = f"cpu_{method}_{scheme}{'' if nested else '-single'}{'_checkpointing' if checkpointing else ''}"
            found.append(Cell(name, "cpu", "minilm", method, experiment, 8, 64))
    return found


def shape(experiment: Experiment, name: str) -> Experiment:
    return experiment.override({"model.name": f"shape:{name}", "model.random_weights": True})


def base(model: str, method: str, scheme: str, nested: bool, checkpointing: bool, rank: int = 16) -> Experiment:
    experiment = shape(preset("dialogpt-medium_banking77_recipe"), model).override(
        {
            "quantization.scheme": scheme,
            "quantization.double_quantization": nested,
            "model.fused": True,
            "training.gradient_checkpointing": checkpointing,
            "training.prepare_for_kbit_training": False,
            "training.precision": "bf16",
            "training.optimizer": "adamw_torch" if method == "full" else "paged_adamw_8bit",
            "training.warmup_steps": 0,
            "training.learning_rate": 1e-4,
            "tracking.wandb": "none",
        }
    )
    if method == "full":
        return experiment.override({"lora": None})
    targets = ["c_attn", "c_proj"] if model == "dialogpt-medium" else "all-linear"
    return experiment.override({"lora.target_modules": targets, "lora.r": rank})


# --- one cell, in a process of its own --------------------------------------------------------------------------


def one(cell: Cell, file: Path) -> None:
    """Plan, ask for room on the GPU, measure, write the row."""
    import torch

    from qlora_kit import memory, models

    cuda = cell.group != "cpu"
    device = models.default_device()
    if cuda and device.type != "cuda":
        raise SystemExit(f"{cell.name} needs a GPU")
    length = widest(cell.experiment) if cell.whole else cell.length
    plan = memory.plan(cell.experiment, batch=cell.batch, length=length, device=None)
    weights = 2 * plan.parameters[1]
    print(f"NEED {max(plan.reserved, weights) + 1536 * 1024**2}", flush=True)
    sys.stdin.readline()
    if cell.limit:
        torch.cuda.set_per_process_memory_fraction(cell.limit / torch.cuda.get_device_properties(0).total_memory)
    started = time.perf_counter()
    if cell.whole:
        measured, graphs = trained(cell.experiment, length)
    else:
        measured = memory.measure(cell.experiment, batch=cell.batch, length=length, steps=cell.steps)
        graphs = False
    print(f"MEASURED {time.perf_counter() - started:.1f} s", flush=True)
    spec = cell.experiment
    difference = plan.total / measured.total - 1 if measured.total else None
    row = {
        "name": cell.name,
        "group": cell.group,
        "model": cell.model,
        "method": cell.method,
        "scheme": spec.quantization.scheme,
        "double_quantization": spec.quantization.nested if spec.quantization.is_4bit else None,
        "precision": measured.precision,
        "optimizer": spec.training.optimizer,
        "checkpointing": spec.training.gradient_checkpointing,
        "graphs": graphs,
        "batch": cell.batch,
        "length": length,
        "planned_bytes": plan.total,
        "peak_bytes": measured.total,
        "step_seconds": measured.step_seconds if cell.alone else None,
        "device": measured.device if cuda else cpu_name(),
        "fits": measured.fits,
        "difference": difference,
        "planned_reserved_bytes": plan.reserved,
        "reserved_bytes": measured.reserved,
        "planned_parts": plan.parts,
        "parts": measured.parts,
        "planned_paged_bytes": plan.paged,
        "paged_bytes": measured.paged,
        "lora_r": spec.lora.r if spec.lora else None,
        "lean": spec.model.lean,
        "embeddings": spec.quantization.embeddings,
        "prepare_for_kbit_training": spec.training.prepare_for_kbit_training,
        "limit_bytes": cell.limit,
        "cublas_workspace": dict(cell.environment).get("CUBLAS_WORKSPACE_CONFIG"),
        "cublas_workspace_set_by": "this benchmark alone" if cell.environment else None,
        "note": cell.note,
        "trainable_parameters": plan.parameters[0],
        "parameters": plan.parameters[1],
    }
    if not cell.alone:
        row["shared_step_seconds"] = measured.step_seconds
    row["step_seconds_each"] = measured.step_seconds_each
    if cell.group in ("recipe", "t4") and not cell.whole:
        row["losses"] = measured.losses
    write_json(file, recording.stamped(row, environment(device if cuda else None)))
    found = f"{measured.total / 2**20:,.1f} MiB, {difference:+.2%}" if measured.total else "out of memory"
    print(f"{cell.name}: planned {plan.total / 2**20:,.1f} MiB, measured {found}")
    print(json.dumps({"planned": plan.parts, "measured": measured.parts}))
    print(json.dumps({"phase": [plan.phase, measured.phase], "planned": plan.details, "measured": measured.details}))


def widest(experiment: Experiment) -> int:
    """Return the tokens of a preset's widest batch, padding included."""
    from qlora_kit import data, models

    tokenizer = models.load_tokenizer(experiment.model)
    longest = max(data.token_lengths(tokenizer, data.load(experiment.data).train.texts))
    edges = data.edges_of(models.default_device())
    return data.collator(0, "longest", experiment.data.max_length, edges=edges).width(longest)


def trained(experiment: Experiment, length: int) -> tuple[Any, bool]:
    """Train a preset like a user. The widest batch comes first, so that few steps are enough to reach the peak.

    Args:
        experiment: The preset.
        length: Tokens of its widest batch.

    Returns:
        Its measured memory, evaluation included, and whether CUDA graphs were used.
    """
    import tempfile

    import qlora_kit as qlora_kit
    from qlora_kit import memory

    with tempfile.TemporaryDirectory() as folder:
        run = qlora_kit.finetune(experiment, out=folder, progress=False)
        record, device = run.training, run.environment["device"]
    counts = record["parameters"]
    measured = memory.Measured(
        experiment=experiment,
        batch=experiment.training.batch_size,
        length=length,
        device=device,
        precision=record["precision"],
        fits=True,
        total=record["memory"]["peak_bytes"],
        reserved=record["memory"]["reserved_bytes"],
        parts={},
        paged=0,
        step_seconds=None,  # capturing the graphs takes longer than so few steps
        losses=[],
        parameters=(counts["trainable"], counts["all"]),
    )
    return measured, bool((record["graphs"] or {}).get("captured"))


# --- all of them ------------------------------------------------------------------------------------------------


class Worker:
    """A cell's process: it plans, reports how much memory it needs, waits, and measures."""

    def __init__(self, cell: Cell, folder: Path) -> None:
        self.cell, self.need, self.granted = cell, 0, False
        self.file = folder / f"{cell.name}.json"
        self.log = (folder / f"{cell.name}.log").open("w")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **dict(cell.environment)}
        if cell.group == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        else:
            environment["OMP_NUM_THREADS"] = "2"
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--cell", cell.name, str(self.file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )

    def read(self) -> None:
        """Read its output so far."""
        stream = self.process.stdout
        assert stream is not None
        while select.select([stream], [], [], 0)[0]:
            line = stream.readline()
            if not line:
                return
            self.log.write(line)
            self.log.flush()
            if line.startswith("NEED "):
                self.need = int(line.split()[1])

    def go(self) -> None:
        """Let it measure."""
        self.granted = True
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()


def run(todo: list[Cell], folder: Path, jobs: int, room: int, seconds: float) -> list[str]:
    """Run cells in parallel as long as they fit into `room` bytes; return the names of those that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    started, waiting, failed = time.monotonic(), list(todo), []
    workers: list[Worker] = []
    while waiting or workers:
        while waiting and len(workers) < jobs:
            workers.append(Worker(waiting.pop(0), folder))
        for worker in list(workers):
            worker.read()
            if worker.process.poll() is None:
                continue
            worker.read()
            workers.remove(worker)
            worker.log.close()
            if worker.process.returncode:
                failed.append(worker.cell.name)
            word = "FAILED" if worker.process.returncode else "done"
            left = len(waiting) + len(workers)
            print(f"[{time.monotonic() - started:5.0f} s] {word}: {worker.cell.name}; {left} to go", flush=True)
        measuring = [worker for worker in workers if worker.granted]
        alone = any(worker.cell.alone for worker in measuring)
        for worker in workers:
            if worker.granted or not worker.need or alone:
                continue
            if worker.cell.alone:
                if measuring:
                    break  # it runs next, when the others are done
                worker.go()
                break
            if sum(other.need for other in measuring) + worker.need <= room or not measuring:
                worker.go()
                measuring.append(worker)
        if time.monotonic() - started > seconds:
            for worker in workers:
                worker.process.kill()
            print(f"stopped after {seconds:.0f} s with {len(waiting) + len(workers)} cells to go", flush=True)
            return failed
        time.sleep(0.05)
    return failed


@told_in_a_line
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, help="which groups (those that this machine can run)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only cells with one of these in their name")
    parser.add_argument("--out", default="results/memory.json")
    parser.add_argument("--runs", default="runs/memory", help="folder of the rows and logs")
    parser.add_argument("--jobs", type=int, default=min(14, os.cpu_count() or 1), help="processes at once")
    parser.add_argument("--room", type=float, default=76e9, help="bytes of the GPU that rows may share")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long; the rest is for next time")
    parser.add_argument("--again", action="store_true", help="measure what is there already, too")
    parser.add_argument("--list", action="store_true", help="say which cells there are")
    recording.add_options(parser, append=False)
    parser.add_argument("--cell", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    by_name = {cell.name: cell for cell in cells()}
    if options.cell:
        one(by_name[options.cell[0]], Path(options.cell[1]))
        return 0
    groups = options.groups or ([group for group in GROUPS if group != "cpu"] if _gpu() else ["cpu"])
    folder = Path(options.runs)
    wanted = [cell for cell in by_name.values() if cell.group in groups]
    if options.only:
        wanted = [cell for cell in wanted if any(text in cell.name for text in options.only)]
    if options.list:
        print("\n".join(cell.name for cell in wanted))
        return 0
    provenance = recording.begin(options)
    todo = [cell for cell in wanted if options.again or finished(folder, cell, provenance) is None]
    for cell in todo:
        (folder / f"{cell.name}.json").unlink(missing_ok=True)
    jobs = 1 if groups == ["cpu"] else options.jobs
    failed = run(todo, folder, jobs, int(options.room), options.seconds)
    made = [row for cell in wanted if (row := finished(folder, cell, provenance)) is not None]
    gather(Path(options.out), made, wanted, provenance)
    for name in failed:
        print(f"{name}: {(folder / f'{name}.log').read_text()[-600:]}", file=sys.stderr)
    return 0 if len(made) == len(wanted) else 1


def finished(folder: Path, cell: Cell, provenance: recording.Provenance) -> dict[str, Any] | None:
    """Return an earlier call's row if committed code made it, else None."""
    file = folder / f"{cell.name}.json"
    row = read_json(file) if file.is_file() else {}
    return row if "name" in row and provenance.takes(row) else None


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def gather(out: Path, rows: list[dict[str, Any]], wanted: list[Cell], provenance: recording.Provenance) -> None:
    """Add the rows to the record, keeping the rows that are already there."""
    if not rows:
        return
    device = rows[0]["device"]
    record = recording.write(
        out,
        rows,
        provenance=provenance,
        command=recording.command_line("memory.py"),
        makes=[{"device": device, "name": cell.name} for cell in wanted],
        key=KEY,
        append=True,
    )
    known = [row for row in record["rows"] if row["difference"] is not None]
    if known:
        worst = max(known, key=lambda row: abs(row["difference"]))
        told = f"{worst['name']} {worst['difference']:+.2%}"
        print(f"{len(record['rows'])} rows; worst planned against measured: {told}")


if __name__ == "__main__":
    sys.exit(main())
