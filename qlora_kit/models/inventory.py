"""List a base's weights: which are quantized, which are adapted, and which are not quantized and why.

Not every weight of a base can be stored in 4 bits or take an adapter. bitsandbytes and PEFT look for linear layers, but
a mixture keeps its experts in one weight of three dimensions, and SqueezeBERT keeps its projections in convolutions.
Users who ask for 4 bits should know how much of the base is in 4 bits, before the run and after it. An inventory is
made of a real model, or of its shapes alone on the meta device (as in `memory.plan`). Both say the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..config.experiment import Experiment
from ..quantization.backend import backend_of_layer, linear_storage
from ..quantization.layers import is_linear, why_table_whole, why_whole
from ..system.arguments import EXPERIMENT, MODULE, takes
from ..system.safe_bitsandbytes import bnb
from .heads import head_modules

KINDS = ("linear layers", "convolutions", "other matrices", "embeddings", "norms and biases")
"""Kinds of weights, by the module that holds them. `other matrices` are weights of two or more dimensions that have no
layer of their own, such as a mixture's experts."""

MULTIPLIED = KINDS[:3]
"""The kinds that states are multiplied by. 4-bit schemes are for these."""

TRAINED = {"adapters": "by adapters", "themselves": "yes"}
"""How tables name the ways in which weights are trained."""

MUCH = 0.2
"""There is a warning if a larger share of the weights in `MULTIPLIED` is not quantized."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Weights of the base that are treated the same.

    Args:
        kind: One of `KINDS`.
        stored_as: `nf4`, `fp4`, `int4`, `int8`, or the data type.
        quantized: Whether that is 4 or 8 bits.
        trained: `adapters` where adapters are trained beside them, `themselves`, or empty where nothing is.
        reason: Why they are not quantized although that was asked for, or why they have no adapters although states
            are multiplied by them; else empty.
        tensors: How many weight tensors.
        parameters: How many numbers they stand for.
        example: Name of the first tensor, in the base.
    """

    kind: str
    stored_as: str
    quantized: bool
    trained: str
    reason: str
    tensors: int
    parameters: int
    example: str


@dataclasses.dataclass(frozen=True)
class Inventory:
    """A base's weights, in groups.

    Args:
        groups: All its weights, each once, in the order of `KINDS`, the largest group of a kind first.
    """

    groups: tuple[Group, ...]

    @property
    def parameters(self) -> int:
        """How many numbers the base has."""
        return sum(group.parameters for group in self.groups)

    @property
    def whole_share(self) -> float:
        """Share of the weights in `MULTIPLIED` that are stored in 16 or 32 bits: 0 to 1."""
        multiplied = [group for group in self.groups if group.kind in MULTIPLIED]
        every = sum(group.parameters for group in multiplied)
        return sum(group.parameters for group in multiplied if not group.quantized) / every if every else 0.0

    def warning(self, experiment: Experiment) -> str | None:
        """Return a warning about weights not quantized although 4 or 8 bits were asked for, or None.

        Args:
            experiment: What was asked for.

        Returns:
            The warning, if more than `MUCH` of the weights in `MULTIPLIED` are not quantized, or no table of the
            embeddings is stored as `quantization.embeddings` asks.
        """
        spec = experiment.quantization
        words = []
        if spec.is_quantized and self.whole_share > MUCH:
            words.append(
                f"{self.whole_share:.0%} of the weights that {experiment.model.name} multiplies by stay in 16 or 32 "
                f"bits although quantization.scheme is {spec.scheme}: {self._whole(MULTIPLIED)}"
            )
        tables = [group for group in self.groups if group.kind == "embeddings"]
        if spec.embeddings != "none" and not any(group.quantized for group in tables):
            words.append(
                f"no embedding of {experiment.model.name} is stored in 4 bits although quantization.embeddings is "
                f"{spec.embeddings}: {self._whole(('embeddings',)) or 'it has none'}"
            )
        return "; ".join(words) or None

    def _whole(self, kinds: Sequence[str]) -> str:
        """Name the groups of some kinds that are not quantized, with the reason."""
        return ", ".join(
            f"{group.parameters:,} in {group.tensors} of its {group.kind} ({group.reason})"
            for group in self.groups
            if group.kind in kinds and not group.quantized
        )

    def __str__(self) -> str:
        # Groups of one kind and one way of storing are added up here.
        shares: dict[tuple[str, str], float] = {}
        for group in self.groups:
            key = (group.kind, group.stored_as)
            shares[key] = shares.get(key, 0.0) + group.parameters / self.parameters
        return ", ".join(f"{share:.1%} {kind} in {stored_as}" for (kind, stored_as), share in shares.items())

    def to_list(self) -> list[dict[str, Any]]:
        """Return the groups as dicts for JSON, each with `share`, its share of the base's numbers."""
        return [
            {**dataclasses.asdict(group), "share": group.parameters / max(self.parameters, 1)} for group in self.groups
        ]

    def table(self) -> list[dict[str, str]]:
        """Return the groups as rows of a table that people read."""
        return table(self.to_list())


def table(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return an inventory as rows of a table that people read.

    Args:
        groups: As `Inventory.to_list` and a run's `training.json` hold them.
    """
    return [
        {
            "of the base": group["kind"],
            "tensors": f"{group['tensors']:,}",
            "numbers": f"{group['parameters']:,}",
            "share": f"{group['share']:.1%}",
            "stored as": group["stored_as"],
            "trained": TRAINED.get(group["trained"], ""),
            "why": group["reason"],
        }
        for group in groups
    ]


@takes(model=MODULE, experiment=EXPERIMENT)
def take(model: nn.Module, experiment: Experiment) -> Inventory:
    """Make the inventory of a classifier's base.

    Args:
        model: As `models.build` or `models.build_classifier` made it from the experiment, on any device.
        experiment: What was asked for.

    Returns:
        The inventory, without the head, the adapters and buffers.
    """
    inner: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    heads = head_modules(inner)
    adapted = {id(module.get_base_layer()) for module in inner.modules() if isinstance(module, LoraLayer)}
    whole = why_whole(inner, heads)
    found: dict[tuple[str, str, bool, str, str], list[Any]] = {}
    seen: set[int] = set()
    for name, module in inner.named_modules():
        if name.split(".")[0] in heads or ".lora_" in f".{name}" or isinstance(module, LoraLayer):
            continue
        for leaf, weight, numbers in _weights(module):
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            kind = _kind(module, leaf, weight)
            stored_as, quantized = _stored_as(module, leaf, weight)
            trained = "themselves" if weight.requires_grad else ""
            if kind == "linear layers" and id(module) in adapted:
                trained = "adapters"
            reason = ""
            if not quantized:
                reason = _why_not_quantized(module, kind, whole.get(name), experiment)
            if not reason and kind in MULTIPLIED and not trained:
                reason = "not among lora.target_modules" if is_linear(module) else "adapters go on linear layers"
            group = found.setdefault((kind, stored_as, quantized, trained, reason), [0, 0, ""])
            group[0] += 1
            group[1] += numbers
            group[2] = group[2] or f"{name}.{leaf}".replace(".base_layer.", ".")
    groups = [Group(*key, *sums) for key, sums in found.items()]
    return Inventory(tuple(sorted(groups, key=lambda group: (KINDS.index(group.kind), -group.parameters))))


def _weights(module: nn.Module) -> list[tuple[str, torch.Tensor, int]]:
    """Return a module's own weights: name, tensor, and how many numbers it stands for."""
    stored = linear_storage(module)
    held: dict[str, Any] = dict(module.named_parameters(recurse=False))
    sizes = {leaf: weight.numel() for leaf, weight in held.items()}
    if stored is not None and stored.quantized:
        # A quantized weight is a packed tensor, and the kit's own layer keeps it in a buffer.
        held["weight"], sizes["weight"] = module.weight, stored.parameters
    elif held and isinstance(module, bnb.nn.Embedding4bit):
        sizes["weight"] = held["weight"].quant_state.shape.numel()
    return [(leaf, weight, sizes[leaf]) for leaf, weight in held.items()]


def _kind(module: nn.Module, leaf: str, weight: torch.Tensor) -> str:
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if leaf == "weight" and linear_storage(module) is not None:
        return "linear layers"
    if weight.dim() < 2:
        return "norms and biases"
    return "convolutions" if isinstance(module, _ConvNd) else "other matrices"


def _stored_as(module: Any, leaf: str, weight: Any) -> tuple[str, bool]:
    stored = linear_storage(module) if leaf == "weight" else None
    if stored is not None and stored.quantized:
        backend = backend_of_layer(module)
        assert backend is not None
        return backend.scheme_of(module), True
    if isinstance(module, bnb.nn.Embedding4bit):
        return weight.quant_state.quant_type, True
    return str(weight.dtype).removeprefix("torch."), False


def _why_not_quantized(module: Any, kind: str, known: str | None, experiment: Experiment) -> str:
    """Return why a weight is not quantized although that was asked for; empty if it was not asked for."""
    spec = experiment.quantization
    if kind == "embeddings":
        return "" if spec.embeddings == "none" else why_table_whole(module) or ""
    if kind == "norms and biases" or not spec.is_quantized:
        return ""
    if kind == "linear layers":
        return known or ""
    if kind == "convolutions":
        return "only linear layers are quantized, not convolutions"
    return f"{type(module).__name__} keeps it without a linear layer, and only linear layers are quantized"
