"""The command `presets`."""

from __future__ import annotations

import argparse
from importlib import resources

NAME = "presets"
SUMMARY = "list the presets, or print one as YAML with all its fields"
EXAMPLES = """\
examples:
  qlora-kit presets                                          their names, one a line, with what each is
  qlora-kit presets minilm_banking77_qlora                   all its fields
  qlora-kit presets minilm_banking77_qlora > mine.yaml
  qlora-kit finetune mine.yaml                               after changing it

A preset's name is MODEL_DATA_METHOD; `presets auto` prints the one that this machine would take.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("name", nargs="?", help="a preset, auto, or an experiment's YAML file")


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from ..config.names import presets
    from ..config.preset import preset

    if options.name:
        print(preset(options.name).to_yaml(), end="")
        return 0
    names = presets()
    width = max(map(len, names))
    folder = resources.files("qlora_kit") / "presets"
    for name in names:
        # Each file's first line is a comment that says what the preset is.
        title = (folder / f"{name}.yaml").read_text("utf-8").partition("\n")[0]
        print(f"{name:{width}}  {title.removeprefix('# ')}")
    return 0
