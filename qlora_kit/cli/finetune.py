"""The command `finetune`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ..system.showing import counted
from .experiment import add_experiment, read_experiment
from .terminal import harmless, off_stdout

if TYPE_CHECKING:
    from ..config.experiment import Experiment
    from ..data.rows import TextData

NAME = "finetune"
SUMMARY = "train an experiment into a run folder"
EXAMPLES = """\
examples:
  qlora-kit finetune minilm_banking77_qlora
  qlora-kit finetune minilm_banking77_qlora --set training.epochs=2 --set lora.r=8
  qlora-kit finetune minilm_banking77_qlora --set training.seed=1 --out runs/seeds
  qlora-kit finetune my_experiment.yaml
  qlora-kit finetune minilm_banking77_qlora --name tickets --data train.csv --test test.csv

`presets NAME` prints every field that --set takes. The same command again goes on with a run that was cut off. The
last lines say how good the run is, and the next command; with --quiet there is only the run's folder.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    add_experiment(parser)
    parser.add_argument("--out", default="runs", help="folder of the run folders (runs)")
    parser.add_argument("--name", help="name of the run folder (the experiment's name and the seed)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars, and only the run's folder is printed")


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from ..config.names import safe_name

    spec = read_experiment(options)
    if options.name is not None:
        safe_name("run", options.name)
    from ..data.loading import load

    data = load(spec.data)
    if not options.quiet:
        _begin(spec, data, Path(options.out) / (options.name or f"{spec.name}_seed{spec.training.seed}"))
    with off_stdout():
        from ..training.callbacks import EpochLines
        from ..training.finetune import finetune

    lines = [] if options.quiet else [EpochLines()]
    run = finetune(spec, data=data, out=options.out, name=options.name, progress=not options.quiet, callbacks=lines)
    if options.quiet:
        print(run.path)
        return 0
    print(run.verdict)
    command, more = ("evaluate", "") if run.evaluation is None else ("predict", ' "a text"')
    print(harmless(f"next: qlora-kit {command} {shlex.quote(str(run.path))}{more}"))
    return 0


def _begin(spec: Experiment, data: TextData, folder: Path) -> None:
    """Print one line about what begins. torch, which knows the device, takes seconds: what is known comes first."""
    method = "full fine-tuning" if spec.lora is None else f"LoRA on {spec.quantization.label}"
    steps = spec.training.steps_for(len(data.train))
    words = (
        f"{counted(len(data.train), 'row')}, {counted(len(data.label_names), 'label')}; {spec.model.name}, {method}, "
        f"{counted(steps, 'step')}, into {folder}"
    )
    print(harmless(words), end="", flush=True)
    try:
        print(f", on {_device()}", end="")
    finally:
        print(flush=True)


def _device() -> str:
    import torch

    from ..system.environment import cpu_name

    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
