"""Open what a notebook works on: the experiment of its parameters, and the run."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from ..config.experiment import Experiment
from ..config.preset import preset as load_preset
from ..config.preset import resolve_preset
from ..run import Run, load_run, newest_run
from ..system.arguments import NUMBER, PRESET, RUN_FOLDER, TEXT, WHOLE, a_path, takes
from ..system.parsing import read_json


@takes(preset=PRESET, seed=WHOLE, epochs=NUMBER, max_steps=WHOLE, wandb=TEXT)
def choose_experiment(
    preset: str, *, seed: int = 0, epochs: float = 0, max_steps: int = 0, wandb: str = ""
) -> tuple[Experiment, str]:
    """Turn a notebook's parameters into an experiment.

    Args:
        preset: A preset, the path of an experiment's YAML file, or `auto`.
        seed: Seed of the head, the adapters, the order of rows and dropout.
        epochs: Passes over the training rows; 0 for the preset's own.
        max_steps: Stop after this many steps; 0 for the preset's own.
        wandb: Where it is logged, see `TrackingSpec`; empty for the preset's own.

    Returns:
        The experiment, and one sentence on why it is this one.
    """
    name, why = resolve_preset(preset)
    changes = {"training.epochs": epochs, "training.max_steps": max_steps, "tracking.wandb": wandb}
    return (
        load_preset(name).override({"training.seed": seed, **{key: value for key, value in changes.items() if value}}),
        why,
    )


@takes(preset=PRESET, run=RUN_FOLDER, out=a_path("runs/latest"))
def open_run(
    preset: str,
    *,
    run: str | Path = "",
    out: str | Path = "runs/latest",
    **changes: Any,
) -> tuple[Run, str]:
    """Find the run that a notebook works on; train it first if there is none.

    Args:
        preset: The preset of the run, if no run is named.
        run: A run folder, or empty for the newest finished one of the preset: below `OUT/runs`, else below `runs`.
        out: The folder OUT; a run that has to be trained goes into `OUT/runs`. The expected time is printed first.
        **changes: As `choose_experiment` takes them, for a run that has to be trained.

    Returns:
        The run, and one sentence on where it comes from.
    """
    if run:
        return load_run(run), f"{run}, as asked for"
    experiment, why = choose_experiment(preset, **changes)
    for root in (Path(out) / "runs", Path("runs")):
        found = newest_run(experiment.name, root)
        if found is not None:
            return load_run(found), f"{found}, the newest finished run of {experiment.name} ({why})"
    from ..system.devices import cuda_available
    from ..training.callbacks import EpochLines
    from ..training.finetune import finetune

    time = training_time(experiment, cuda=cuda_available())
    print(
        f"There is no finished run of {experiment.name} in {Path(out) / 'runs'} or in runs, so it is trained first. "
        f"{f'It took {time}' if time else 'How long that takes was not measured'}; the bar below shows what is left.",
        flush=True,
    )
    trained = finetune(experiment, out=Path(out) / "runs", callbacks=[EpochLines()])
    return trained, f"{trained.path}, trained just now: there was no run of {experiment.name} ({why})"


def training_time(experiment: Experiment, *, cuda: bool) -> str:
    """Return how long an experiment's training took, if the project measured it.

    Args:
        experiment: One of the presets; its number of epochs may differ.
        cuda: True for a GPU, False for a CPU.

    Returns:
        Words such as `about 8 minutes on AMD EPYC, 1 core`; empty if its preset was not measured or its steps are
        limited.
    """
    from ..claims.records import find_results

    if experiment.training.max_steps:
        return ""
    # In a record from a CPU, the device's name ends with its number of cores.
    rows = [
        row
        for row in read_json(find_results() / "accuracy.json")["rows"]
        if row["preset"] == experiment.name and bool(re.search(r"\d cores?$", row["device"])) != cuda
    ]
    if not rows:
        return ""
    whole = statistics.median(row["train_seconds"] for row in rows)
    seconds = whole * experiment.training.epochs / load_preset(experiment.name).training.epochs
    took = f"{seconds / 60:.0f} minutes" if seconds >= 100 else f"{seconds:.0f} seconds"
    return f"about {took} on {rows[0]['device']}"
