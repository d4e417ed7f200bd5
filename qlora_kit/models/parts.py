"""What a model is made of: groups of weights, how many bits each takes, and which of them are trained.

QLoRA (arXiv 2305.14314, section 3) quantizes the linear layers of the frozen base, and nothing else: embeddings
and norms stay as they are, adapters and head are trained in full precision. This module counts that on the tensors
of a real model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..config.experiment import Experiment
from ..quantization.backend import linear_storage
from ..system.arguments import EXPERIMENT, takes
from ..system.safe_peft import peft
from .build import build
from .heads import head_modules, is_head_parameter
from .tokenizers import load_tokenizer

PARTS = (
    "base, linear layers",
    "base, embeddings",
    "base, other matrices",
    "base, norms and biases",
    "base, buffers",
    "head as it was",
    "adapters",
    "head",
)


@dataclasses.dataclass(frozen=True)
class Part:
    """A group of weights.

    Args:
        name: One of `PARTS`.
        parameters: How many numbers it stands for (a packed 4-bit weight counts as its numbers, not its bytes).
        bytes: Bytes that store them, scales included.
        stored_as: `4 bits`, `8 bits`, or the data type.
        trained: Whether training changes it.
    """

    name: str
    parameters: int
    bytes: int
    stored_as: str
    trained: bool

    @property
    def bits_per_parameter(self) -> float:
        """Bits per number."""
        return 8 * self.bytes / self.parameters


def anatomy(model: nn.Module) -> list[Part]:
    """Return a model's parts and their sizes.

    Args:
        model: As `models.build` returns it, with adapters or without.

    Returns:
        Its parts, the base's first; a part that the model does not have is left out. Their bytes add up to those of
        all weights and buffers. Gradients, optimizer and activations are not included.
    """
    heads = [] if isinstance(model, peft.PeftModel) else head_modules(model)
    found: dict[tuple[str, str, bool], list[int]] = {}
    seen: set[int] = set()

    def add(part: str, stored_as: str, trained: bool, parameters: int, size: int) -> None:
        sums = found.setdefault((part, stored_as, trained), [0, 0])
        sums[0] += parameters
        sums[1] += size

    for name, module in model.named_modules():
        stored = linear_storage(module)
        if stored is not None and stored.quantized and id(module.weight) not in seen:
            bits = f"{round(8 * stored.bytes / stored.parameters)} bits"
            add(part_of(name, module, heads), bits, False, stored.parameters, stored.bytes + stored.table_bytes)
            seen.update(id(tensor) for tensor in (module.weight, *module.buffers(recurse=False)))
        own: list[tuple[str, torch.Tensor]] = [
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ]
        for leaf, tensor in own:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                part = part_of(f"{name}.{leaf}", module, heads, leaf)
                if part.startswith("base") and not isinstance(tensor, nn.Parameter):
                    part = "base, buffers"
                dtype = str(tensor.dtype).removeprefix("torch.")
                add(part, dtype, tensor.requires_grad, tensor.numel(), tensor.numel() * tensor.element_size())
    parts = [
        Part(part, parameters, size, stored_as, trained)
        for (part, stored_as, trained), (parameters, size) in found.items()
        if parameters
    ]
    return sorted(parts, key=lambda part: (PARTS.index(part.name), -part.bytes))


@takes(experiment=EXPERIMENT)
def of_experiment(experiment: Experiment, label_names: Sequence[str]) -> list[Part]:
    """Build an experiment's model, return its parts, and free the model.

    Args:
        experiment: Which model, quantization and adapters.
        label_names: Names of the classes.

    Returns:
        Its parts, see `anatomy`.
    """
    pad = load_tokenizer(experiment.model).pad_token_id
    parts = anatomy(build(experiment, label_names, pad_token_id=pad))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return parts


def table(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Return parts as the rows of a table that people read, with their sum as the last row."""
    whole = Part(
        "all of it",
        sum(part.parameters for part in parts),
        sum(part.bytes for part in parts),
        "",
        False,
    )
    return [
        {
            "part": part.name,
            "stored as": part.stored_as,
            "numbers": f"{part.parameters:,}",
            "bits a number": f"{part.bits_per_parameter:.2f}",
            "MiB": f"{part.bytes / 2**20:.1f}",
            "trained": "yes" if part.trained else "",
        }
        for part in (*parts, whole)
    ]


def part_of(name: str, module: Any, heads: Sequence[str], leaf: str = "weight") -> str:
    """Return the part of a classifier that a tensor belongs to.

    Args:
        name: The module's name in the model.
        module: The module that holds the tensor.
        heads: Names of the head's modules.
        leaf: The tensor's name in the module.
    """
    path = f".{name}."
    if is_head_parameter(path) or any(path.startswith(f".{head}.") for head in heads):
        return "head"
    if ".original_module." in path:
        return "head as it was"
    if ".lora_" in path:
        return "adapters"
    if isinstance(module, nn.Embedding):
        return "base, embeddings"
    if leaf == "weight" and linear_storage(module):
        return "base, linear layers"
    tensor = getattr(module, leaf)
    # A mixture's experts, and convolutions.
    matrix = isinstance(tensor, nn.Parameter) and tensor.dim() > 1
    return "base, other matrices" if matrix else "base, norms and biases"
