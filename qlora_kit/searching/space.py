"""Settings that a search may change, and the values to try."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from ..config.experiment import Experiment
from ..errors import KitError
from ..system.arguments import EXPERIMENT, LIST, takes

# What a trial may change. Data, seed and precision stay the same, so that trials can be compared. Other settings that
# are left out change what a run costs, not what it learns.
SEARCHABLE = (
    "lora.r",
    "lora.alpha",
    "lora.dropout",
    "lora.target_modules",
    "lora.bias",
    "model.dropout",
    "model.head",
    "model.head_init",
    "model.pooling",
    "quantization.double_quantization",
    "quantization.scheme",
    "training.batch_size",
    "training.epochs",
    "training.gradient_accumulation",
    "training.head_learning_rate",
    "training.learning_rate",
    "training.max_grad_norm",
    "training.optimizer",
    "training.schedule",
    "training.warmup_ratio",
    "training.warmup_steps",
    "training.weight_decay",
)


@takes(experiment=EXPERIMENT)
def default_space(experiment: Experiment) -> dict[str, Sequence[Any]]:
    """Return the default space: learning rates around the experiment's, and LoRA ranks.

    Args:
        experiment: The settings that every trial starts from; the space contains them.
    """
    rate = experiment.training.learning_rate
    space: dict[str, Sequence[Any]] = {"training.learning_rate": (rate / 10, rate * 3, "log")}
    if experiment.lora is not None:
        space["lora.r"] = sorted({4, 8, 16, experiment.lora.r})
    return space


@takes(pieces=LIST)
def parse_space(pieces: Sequence[str]) -> dict[str, Sequence[Any]]:
    """Read a space from command-line arguments.

    Args:
        pieces: `FIELD=LOW:HIGH` and `FIELD=LOW:HIGH:log` for a range, `FIELD=A,B,C` for choices.

    Returns:
        The space, as `search` takes it.

    Raises:
        KitError: For a piece without values, or a range whose ends are not numbers.
    """
    space: dict[str, Sequence[Any]] = {}
    for piece in pieces:
        name, _, values = piece.partition("=")
        if not values:
            raise KitError(f"{piece!r} has no values: write training.learning_rate=1e-4:1e-2:log, or lora.r=4,8,16")
        low, *rest = values.split(":")
        if not rest:
            space[name] = [_value(choice) for choice in values.split(",")]
            continue
        ends = (_value(low), _value(rest[0]))
        if not all(isinstance(end, (int, float)) for end in ends):
            raise KitError(f"{piece!r} is no range: write two numbers, as {name}=1e-4:1e-2:log")
        space[name] = (*ends, *rest[1:])
    return space


def _value(text: str) -> Any:
    """Return a setting's value from its text: a number, true, false, null, or the text itself."""
    for kind in (int, float):
        # YAML would read 1e-4, which has no dot, as a text.
        with contextlib.suppress(ValueError):
            return kind(text)
    return {"true": True, "false": False, "null": None}.get(text, text)
