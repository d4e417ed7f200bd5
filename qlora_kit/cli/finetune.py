"""The command `finetune`."""

from __future__ import annotations

import argparse

from .experiment import add_experiment, read_experiment

NAME = "finetune"
SUMMARY = "train an experiment into a run folder"
EXAMPLES = """\
examples:
  python -m qlora_kit finetune minilm_banking77_qlora
  python -m qlora_kit finetune minilm_banking77_qlora --set training.epochs=2 --set lora.r=8
  python -m qlora_kit finetune minilm_banking77_qlora --set training.seed=1 --out runs/seeds
  python -m qlora_kit finetune my_experiment.yaml
  python -m qlora_kit finetune minilm_banking77_qlora --name tickets --data train.csv --test test.csv

`presets NAME` prints every field that --set takes. The same command again goes on with a run that was cut off.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    add_experiment(parser)
    parser.add_argument("--out", default="runs", help="folder of the run folders (runs)")
    parser.add_argument("--name", help="name of the run folder (the experiment's name and the seed)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from ..config.names import safe_name

    spec = read_experiment(options)
    if options.name is not None:
        safe_name("run", options.name)
    from ..training.callbacks import EpochLines
    from ..training.finetune import finetune

    lines = [] if options.quiet else [EpochLines()]
    run = finetune(spec, out=options.out, name=options.name, progress=not options.quiet, callbacks=lines)
    print(run.path)
    return 0
