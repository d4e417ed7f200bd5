"""Bits per parameter: computed for a scheme, and measured on a real model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..config.quantization import NESTED_BLOCK_SIZE, SCHEMES, Quantization
from ..errors import KitError
from ..system.arguments import QUANTIZATION, takes
from .backend import LinearStorage, backends, linear_storage


@takes(spec=QUANTIZATION)
def bits_per_parameter(
    spec: Quantization, *, in_features: int | None = None, dtype: torch.dtype | None = None
) -> float:
    """Compute the bits that a scheme stores for each weight of a linear layer (QLoRA, section 3).

    4 bits of code and 32 / 64 of scale make 4.5; with double quantization the scale takes 8 / 64, and its own
    scale 32 / (64 * 256): 4.127.

    Args:
        spec: The scheme.
        in_features: Length of a row: `int8` stores one scale per row. Without it the scale is left out.
        dtype: The dtype that `none` stores; float32 by default.

    Returns:
        Bits per weight. Layers whose size does not divide into blocks take a little more.
    """
    if spec.scheme == "none":
        return 32.0 if dtype is None else 8.0 * dtype.itemsize
    if spec.scheme == "int8":
        return 8.0 if in_features is None else 8.0 + 32.0 / in_features
    bits = float(SCHEMES[spec.scheme].bits)
    if not spec.has_blocks:
        return bits
    if not spec.double_quantization:
        return bits + 32.0 / spec.block_size
    return bits + 8.0 / spec.block_size + 32.0 / (spec.block_size * NESTED_BLOCK_SIZE)


@dataclass(frozen=True)
class Storage:
    """Memory of a model's weights, measured on its tensors.

    Attributes:
        linear_parameters: Weights of the linear layers that are counted, without biases.
        linear_bytes: Bytes that store them, with scales, without constant tables.
        table_bytes: Bytes of codebooks; bitsandbytes keeps a copy in each layer.
        parameters: Weights of the whole model, each shared tensor once.
        bytes: Bytes of the whole model, tables included.
    """

    linear_parameters: int
    linear_bytes: int
    table_bytes: int
    parameters: int
    bytes: int

    @property
    def bits_per_parameter(self) -> float:
        """Bits per weight of the linear layers."""
        return 8 * self.linear_bytes / self.linear_parameters

    @property
    def whole_bits_per_parameter(self) -> float:
        """Bits per weight of the whole model, with embeddings, norms and biases."""
        return 8 * self.bytes / self.parameters


def storage(model: torch.nn.Module, skip_modules: Iterable[str] = ()) -> Storage:
    """Measure the memory of a model's weights, from its actual tensors.

    Args:
        model: A base without adapters, in any scheme. Only quantized layers count as its linear layers, or all
            linear layers if none is quantized.
        skip_modules: Names of linear layers that do not count as such: the head.

    Returns:
        The counts, in parameters and bytes.

    Raises:
        KitError: The model has no linear layer.
    """
    seen: set[int] = set()
    rows: list[LinearStorage] = []
    rest_parameters = rest_bytes = 0
    skipped = [f".{name}." for name in skip_modules]
    for name, module in model.named_modules():
        stored = linear_storage(module)
        skip = any(skip in f".{name}." for skip in skipped)
        if stored is not None and not skip and id(module.weight) not in seen:
            rows.append(stored)
            seen.add(id(module.weight))
            seen.update(id(buffer) for buffer in module.buffers(recurse=False))
    for module in model.modules():  # embeddings in 4 bits, where asked for
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and id(module.weight) not in seen:
            seen.add(id(module.weight))
            rest_parameters += state.shape.numel()
            held = (module.weight, state.absmax, state.code, *((state.state2.absmax,) if state.nested else ()))
            rest_bytes += sum(tensor.numel() * tensor.element_size() for tensor in held)
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            rest_parameters += tensor.numel()
            rest_bytes += tensor.numel() * tensor.element_size()
    if not rows:
        raise KitError("the model has no linear layer to measure")
    some = any(row.quantized for row in rows)
    counted = [row for row in rows if row.quantized or not some]
    return Storage(
        linear_parameters=sum(row.parameters for row in counted),
        linear_bytes=sum(row.bytes for row in counted),
        table_bytes=sum(row.table_bytes for row in rows),
        parameters=rest_parameters + sum(row.parameters for row in rows),
        bytes=rest_bytes + sum(row.bytes + row.table_bytes for row in rows),
    )


def tensors_of(model: nn.Module) -> dict[int, list[torch.Tensor]]:
    """Return a model's weights, buffers and quantization tables, grouped by storage, in the model's order."""
    found: dict[int, dict[int, torch.Tensor]] = {}
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            for held in (tensor, *tables_of(tensor, module)):
                found.setdefault(held.untyped_storage()._cdata, {}).setdefault(id(held), held)
    return {storage: list(tensors.values()) for storage, tensors in found.items()}


def tables_of(weight: torch.Tensor, module: nn.Module) -> list[torch.Tensor]:
    """Return the scales and code tables that belong to a quantized weight.

    Args:
        weight: A parameter or buffer of the module.
        module: A linear layer of any backend, a 4-bit embedding, or any other.
    """
    return [tensor for backend in backends() for tensor in backend.tables(weight, module)]
