"""The command `plan`."""

from __future__ import annotations

import argparse
import json
import os

from ..config.names import presets
from .experiment import read_changes
from .terminal import off_stdout

NAME = "plan"
SUMMARY = "say what a training step will take, and how far a GPU reaches"
EXAMPLES = """\
examples:
  qlora-kit plan minilm_banking77_qlora
  qlora-kit plan dialogpt-medium_banking77_qlora --batch 8 --length 128 --device T4
  qlora-kit plan shape:llama-7b --device T4 --length 512 --set training.gradient_checkpointing=true
  qlora-kit plan shape:llama-7b --device T4 --length 512 --fits

Nothing is downloaded but a model's configuration, and no GPU is needed. Shapes without weights: shape:dialogpt-medium,
smollm2-135m, llama-1.1b, llama-3b, llama-7b, llama-13b, llama-30b, llama-65b.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument(
        "model", help="a preset, an experiment's YAML file, a model's folder or hub name, or shape:NAME"
    )
    parser.add_argument("--batch", type=int, help="rows a step (the experiment's)")
    parser.add_argument("--length", type=int, help="tokens a row (the experiment's longest)")
    parser.add_argument("--device", help="T4, L4, 3090, 4090, A100-40, A100-80, H100 or cpu (this machine's)")
    parser.add_argument("--fits", action="store_true", help="the largest batch and length for each method instead")
    parser.add_argument("--json", action="store_true", help="as JSON, in bytes")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field, as quantization.scheme=int8"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    if _only_on_the_hub(options.model):
        from ..system.hub import refuse_out_of_reach

        refuse_out_of_reach(options.model)  # before the imports below, which take seconds
    with off_stdout():
        from ..memory.devices import find_device
        from ..memory.fits import fits, of_model
        from ..memory.plan import plan

    spec = of_model(options.model).override(read_changes(options.set))
    if options.fits:
        batchless = options.length or spec.data.max_length
        rows = fits(spec, device=options.device or find_device(), length=batchless)
        if options.json:
            print(json.dumps(rows))
            return 0
        print(f"{spec.model.name} on {options.device or find_device().name}, length {rows[0]['length']}")
        for row in rows:
            method = {"full": "full fine-tuning", "lora": "LoRA, 16 bits"}.get(row["method"], f"QLoRA, {row['scheme']}")
            how = "checkpointing" if row["checkpointing"] else ""
            room = (
                f"batch up to {row['batch']}, or one row of {row['longest']} tokens" if row["batch"] else "does not fit"
            )
            print(f"  {method:18} {how:14} {row['planned_bytes'] / 2**20:>10,.0f} MiB at batch 1   {room}")
        return 0
    planned = plan(spec, batch=options.batch, length=options.length, device=options.device)
    print(json.dumps(planned.to_dict()) if options.json else planned)
    return 0


def _only_on_the_hub(name: str) -> bool:
    """Return whether a name can only be a model's on the hub: OWNER/NAME that is no folder here."""
    place = name.startswith((".", "~", "/")) or os.path.isdir(name) or name.endswith((".yaml", ".yml"))
    return name.count("/") == 1 and name not in presets() and not place
