"""Backends, which store frozen linear layers: what each must provide, and which are registered.

Each has its own file: `plain` (16 and 32 bits, GPT-2's `Conv1D` too), `bitsandbytes` (int8, nf4, fp4), `int4` (the
kit's own). To add one, write a subclass of `Backend` and register it; nothing else in the library names a scheme.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from peft import LoraConfig
from torch import nn

from ..config.quantization import SCHEMES, Quantization, Scheme
from ..errors import KitError, unknown


class LinearStorage(NamedTuple):
    """Memory of one linear layer's weight.

    Attributes:
        quantized: Whether it is stored in 4 or 8 bits.
        parameters: How many weights it stands for.
        bytes: Bytes that store them, scales included.
        table_bytes: Bytes of the codebooks; bitsandbytes keeps a copy in every layer.
    """

    quantized: bool
    parameters: int
    bytes: int
    table_bytes: int


class FourBits(NamedTuple):
    """A layer's frozen weight as codes of four bits, on the CPU: `levels[code] * scale of its block`.

    Attributes:
        packed: uint8, [ceil(size / 2)]: two codes per byte, the first in the upper half.
        levels: float32, [16].
        scales: float32, [ceil(size / block_size)].
        block_size: Weights per scale; they follow each other in the flat `[out_features, in_features]` weight.
    """

    packed: torch.Tensor
    levels: torch.Tensor
    scales: torch.Tensor
    block_size: int


class Backend:
    """A way to store frozen linear layers. A subclass must define the methods that raise NotImplementedError here.

    Attributes:
        layers: Classes of its layers: subclasses of `nn.Linear`, so that PEFT treats them as linear.
    """

    layers: ClassVar[tuple[type[nn.Module], ...]] = ()

    # --- creating layers ---

    def loading(
        self, spec: Quantization, skip_modules: Sequence[str], compute_dtype: torch.dtype, device: torch.device
    ) -> dict[str, Any]:
        """Return arguments for `from_pretrained`, so that it quantizes a checkpoint while reading it, or does not.

        Args:
            spec: The wanted quantization.
            skip_modules: Names of modules that stay as they are.
            compute_dtype: The dtype that weights are dequantized to.
            device: Where the model goes.
        """
        # Load on the host, so that a GPU need not hold the whole model in 16 bits before `quantize_`.
        return {"device_map": None, "quantization_config": None}

    def quantize_(
        self,
        model: nn.Module,
        spec: Quantization,
        skip_modules: Sequence[str],
        compute_dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> nn.Module:
        """Replace a model's linear layers (`layers.quantizable`) by this backend's, in place.

        Args:
            model: In floating point; on the meta device, layers get only their shapes.
            spec: The wanted quantization.
            skip_modules: Names of modules that stay as they are.
            compute_dtype: The dtype that weights are dequantized to.
            device: Where the model goes; None if it is there already.

        Returns:
            The model.
        """
        raise NotImplementedError

    # --- inspecting layers ---

    def scheme_of(self, layer: Any) -> str:
        """Return the scheme that one of its layers is stored in."""
        raise NotImplementedError

    def storage(self, layer: Any) -> LinearStorage:
        """Measure the memory of one of its layers."""
        raise NotImplementedError

    def shape(self, layer: Any) -> torch.Size:
        """Return the shape of a layer's original weight, `[out_features, in_features]`."""
        raise NotImplementedError

    def tables(self, weight: torch.Tensor, module: nn.Module) -> list[torch.Tensor]:
        """Return the scales and code tables that a module keeps for a weight outside its parameters and buffers.

        Args:
            weight: A parameter or buffer of the module.
            module: Any module, not only a layer of this backend.
        """
        return []

    # --- computing with layers ---

    def dense_weight(self, layer: Any, dtype: torch.dtype) -> torch.Tensor:
        """Return a layer's weight as numbers, `[out_features, in_features]` in `dtype`."""
        raise NotImplementedError

    def four_bits(self, layer: Any) -> FourBits | None:
        """Return a layer's weight as its codes, for an export that keeps them; None if it has no such codes."""
        return None

    def fuses(self, layer: Any) -> bool:
        """Return whether `kernels.fused_lora` may compute an adapted layer from `dense_weight`."""
        return True

    def keeps_its_weight(self, layer: Any) -> bool:
        """Return whether an unfused layer without adapter keeps its dequantized weight for the backward pass."""
        return False

    def waits_for_the_device(self, layer: Any) -> bool:
        """Return whether a forward pass waits for a value from the device, which a CUDA graph cannot do."""
        return False

    def precision(self, scheme: str, device: torch.device) -> str | None:
        """Return the precision that a scheme always needs on a device; None if the experiment sets it."""
        return None

    def rounds_its_input(self, scheme: str) -> bool:
        """Return whether layers also quantize their input, by row and by batch."""
        return False

    # --- adapting layers ---

    def peft_flags(self, scheme: str) -> tuple[str, ...]:
        """Return the names of the attributes that PEFT expects to be true on a model with this backend's layers."""
        return ()

    def lora_layers(self, config: LoraConfig) -> LoraConfig:
        """Set in PEFT's config which LoRA layer goes on this backend's layers, and return the config."""
        return config

    def train_bias_(self, layer: Any) -> None:
        """Change a layer whose bias is trained so that the bias stays in 32 bits, in place."""

    # --- planning memory ---

    def inside_operations(self, kind: str) -> dict[Any, Any]:
        """Return replacements for operations on the meta device, which show what these allocate inside.

        Args:
            kind: `cuda` or `cpu`.
        """
        return {}

    def plan_for_(self, model: nn.Module, kind: str) -> None:
        """Make layers on the meta device compute as on a kind of device (`cuda`, `cpu`), in place."""


_of_scheme: dict[str, Backend] = {}


def register(backend: Backend, schemes: Mapping[str, Scheme]) -> None:
    """Register a backend.

    Args:
        backend: The backend.
        schemes: The schemes that it stores, by the name in `quantization.scheme`.

    Raises:
        KitError: For a scheme that another backend has already, or a backend that lacks a method. Then none of the
            schemes is registered.
    """
    needed = ("quantize_", "scheme_of", "storage", "shape", "dense_weight")
    lacking = [name for name in needed if getattr(type(backend), name) is getattr(Backend, name)]
    if lacking:
        raise KitError(
            f"{type(backend).__name__} lacks {', '.join(lacking)}: a backend defines {', '.join(needed)} (see "
            "qlora_kit.quantization.backend.Backend)"
        )
    for name in schemes:
        if name in _of_scheme:
            raise KitError(f"there is a scheme {name!r} already, of {type(_of_scheme[name]).__name__}")
    SCHEMES.update(schemes)
    _of_scheme.update(dict.fromkeys(schemes, backend))
    _backend_of_class.cache_clear()


def backend_of(scheme: str) -> Backend:
    """Return the backend that stores a scheme.

    Raises:
        KitError: When there is none.
    """
    if scheme not in _of_scheme:
        raise unknown("quantization scheme", scheme, _of_scheme)
    return _of_scheme[scheme]


def backends() -> list[Backend]:
    """Return all backends, each once."""
    return list(dict.fromkeys(_of_scheme.values()))


@functools.cache
def _backend_of_class(kind: Any) -> Backend | None:
    # Quantized layers are `nn.Linear` too, so take the backend whose class comes first among the bases.
    found = [
        (kind.__mro__.index(layer), backend)
        for backend in backends()
        for layer in backend.layers
        if layer in kind.__mro__
    ]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def backend_of_layer(layer: nn.Module) -> Backend | None:
    """Return a linear layer's backend; None for any other module."""
    kind: Any = type(layer)
    return _backend_of_class(kind)


def linear_storage(module: Any) -> LinearStorage | None:
    """Measure the memory of a linear layer of any backend; return None for any other module.

    Args:
        module: Any module.
    """
    backend = backend_of_layer(module)
    return None if backend is None else backend.storage(module)


def dense_weight(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Return a frozen linear layer's weight as `[out_features, in_features]` in `dtype`, whatever its backend.

    Args:
        layer: A layer of any backend.
        dtype: Dtype of the result.
    """
    backend = backend_of_layer(layer)
    assert backend is not None, type(layer)
    return backend.dense_weight(layer, dtype)
