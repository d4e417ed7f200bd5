"""A frozen linear layer of 4-bit integers that adapters can be trained on.

bitsandbytes has nf4 and fp4, but no integers. PEFT's torchao layer takes only int8, transformers refuses to
train on HQQ, and quanto is no longer developed and not supported by PEFT. So the kit has its own layer: packed
codes and doubly quantized block scales (`qlora_kit.quantization`), dequantized for each product. Its input gets
a gradient, its weight gets none.

    quantize_linears_(model, Quantization("int4"), skip_modules=["classifier"], compute_dtype=torch.float32)
    model = get_peft_model(model, register(LoraConfig(...)))
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ..config.quantization import NESTED_BLOCK_SIZE, SCHEMES, Quantization
from ..errors import KitError
from .backend import Backend, FourBits, LinearStorage
from .backend import register as register_backend
from .codebooks import codebook, dynamic_codebook
from .layers import quantizable
from .packed import TRITON_CAPABILITY as TRITON_CAPABILITY
from .packed import Stored, dequantize_plain, triton_kernel
from .reference import block_scales, quantize


@functools.cache
def _levels(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return codebook("int4").to(device), dynamic_codebook().to(device)


def dequantize(stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize by the fastest method available; arguments as for `dequantize_plain`."""
    kernel = triton_kernel() if stored.packed.is_cuda else None
    if kernel is None:
        return dequantize_plain(stored, dtype)
    return cast(torch.Tensor, kernel(stored, *_levels(stored.packed.device), dtype))


class _Product(torch.autograd.Function):
    """`x @ W.T + b` with W in 4 bits, of a matrix `x` `[tokens, in_features]`.

    If W were dequantized outside, autograd would keep it for the backward pass. Then all layers' weights would be
    in memory in 16 bits, which quantization is there to avoid. So only the packed tensors are kept, and W is
    dequantized again: dL/dx = dL/dy @ W. W gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        nested_absmax: torch.Tensor | None,
        offset: torch.Tensor | None,
        block_size: int,
        out_features: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(packed, absmax, nested_absmax, offset)
        ctx.block_size, ctx.shape = block_size, (out_features, x.shape[-1])
        stored = Stored(packed, absmax, nested_absmax, offset, block_size, math.prod(ctx.shape))
        weight = dequantize(stored, x.dtype)
        return functional.linear(x, weight.view(ctx.shape), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            packed, absmax, nested_absmax, offset = ctx.saved_tensors
            stored = Stored(packed, absmax, nested_absmax, offset, ctx.block_size, math.prod(ctx.shape))
            weight = dequantize(stored, gradient.dtype)
            grad_x = gradient @ weight.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_bias = gradient.sum(0)
        return grad_x, grad_bias, None, None, None, None, None, None


class Int4Linear(nn.Linear):
    """A linear layer whose weight is stored as 4-bit integers with block scales.

    It is a subclass of `nn.Linear`, so PEFT and `target_modules="all-linear"` treat it as one. All that it stores
    is in its state dict, so safetensors and `load_state_dict` work as for any module:

        weight         uint8, [ceil(out * in / 2)]: the packed codes
        absmax         uint8 codes of the block scales (float32 scales without double quantization), [blocks]
        nested_absmax  float32, [ceil(blocks / 256)], with double quantization
        offset         float32, [], with double quantization
        bias           unchanged

    Casting the module (`.half()`) leaves the scales in float32.

    Args:
        in_features: Size of the input's last dimension.
        out_features: Size of the output's last dimension.
        bias: Whether there is one.
        spec: Scheme `int4`, with its block size and whether the scales are quantized too.
        compute_dtype: The dtype of the product; that of the input if None.
        transposed: Whether it replaces GPT-2's `Conv1D`, whose weight is [in, out]. The codes are those of the
            [out, in] weight in any case; this matters only when the layer is turned back.
        device: Where the (uninitialized) storage is made.

    Raises:
        KitError: The spec is not `int4`.
    """

    weight: torch.Tensor  # a buffer: requires_grad_ must not reach it
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    offset: torch.Tensor | None
    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        spec: Quantization | None = None,
        compute_dtype: torch.dtype | None = None,
        transposed: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would make a float weight first
        spec = spec or Quantization("int4")
        if spec.scheme != "int4":
            raise KitError(f"Int4Linear stores scheme 'int4', not {spec.scheme!r}")
        self.in_features, self.out_features = in_features, out_features
        self.spec, self.compute_dtype, self.transposed = spec, compute_dtype, transposed

        size = in_features * out_features
        blocks = -(-size // spec.block_size)
        self.register_buffer("weight", torch.empty(-(-size // 2), dtype=torch.uint8, device=device))
        if spec.nested:
            groups = -(-blocks // NESTED_BLOCK_SIZE)
            self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8, device=device))
            self.register_buffer("nested_absmax", torch.empty(groups, dtype=torch.float32, device=device))
            self.register_buffer("offset", torch.empty((), dtype=torch.float32, device=device))
        else:
            self.register_buffer("absmax", torch.empty(blocks, dtype=torch.float32, device=device))
            self.register_buffer("nested_absmax", None)
            self.register_buffer("offset", None)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device), requires_grad=False)

    @classmethod
    def from_module(
        cls, module: nn.Linear | Conv1D, spec: Quantization, compute_dtype: torch.dtype | None = None
    ) -> Int4Linear:
        """Quantize a linear layer or a GPT-2 `Conv1D`.

        Args:
            module: The layer. It is not changed, and its bias is shared. If it is on the meta device, the new
                layer has empty storage, into which a state dict can be loaded.
            spec: Scheme `int4`.
            compute_dtype: The dtype of the product; that of the input if None.
        """
        transposed = isinstance(module, Conv1D)
        weight = module.weight.detach()
        weight = weight.T if transposed else weight
        layer = cls(
            weight.shape[1],
            weight.shape[0],
            bias=False,
            spec=spec,
            compute_dtype=compute_dtype,
            transposed=transposed,
            device="meta" if weight.is_meta else None,
        )
        layer.bias = cast("nn.Parameter | None", module.bias)
        if not weight.is_meta:
            stored = quantize(weight, spec)
            layer.weight = stored.packed
            layer.absmax, layer.nested_absmax, layer.offset = (
                stored.absmax,
                stored.nested_absmax,
                stored.offset,
            )
        return layer.train(module.training)

    @property
    def stored(self) -> Stored:
        """The stored tensors, with what is needed to dequantize them."""
        size = self.in_features * self.out_features
        return Stored(self.weight, self.absmax, self.nested_absmax, self.offset, self.spec.block_size, size)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the dequantized weight, [out_features, in_features]."""
        return dequantize(self.stored, dtype).view(self.out_features, self.in_features)

    def to_full_precision(self, dtype: torch.dtype = torch.float32) -> nn.Linear | Conv1D:
        """Return a plain layer of the kind this one was made from, with the dequantized weight."""
        weight = self.dequantize(dtype)
        layer: nn.Linear | Conv1D
        with torch.device("meta"):
            if self.transposed:
                layer = Conv1D(self.out_features, self.in_features)
            else:
                layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        layer.weight = nn.Parameter(weight.T.contiguous() if self.transposed else weight, requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True), requires_grad=False)
        return layer.train(self.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Multiply: [..., in_features] to [..., out_features], in the input's dtype."""
        dtype = self.compute_dtype or input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        # The function takes and returns matrices: torch forbids in-place changes to a view that it returns.
        result = _Product.apply(
            input.to(dtype).reshape(-1, self.in_features),
            bias,
            self.weight,
            self.absmax,
            self.nested_absmax,
            self.offset,
            self.spec.block_size,
            self.out_features,
        )
        return result.view(*input.shape[:-1], self.out_features).to(input.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Int4Linear:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        return f"{super().extra_repr()}, spec={self.spec.label!r}, compute_dtype={self.compute_dtype}"


class LoraInt4Linear(LoraLinear):
    """LoRA on an `Int4Linear`: the layer that PEFT makes after `register` was called on its config.

    Forward, training, saving and loading are those of LoRA on any linear layer. Merging is different: 4-bit codes
    are so coarse that adding an adapter and rounding again loses most of the adapter. So merging replaces the
    quantized layer by a plain one with the dequantized weight, and adds the adapter to that, exactly. Unmerging
    puts the quantized layer back.

    Raises:
        KitError: For a value of `init_lora_weights` that starts from the full-precision weight.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        if config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
            raise KitError(
                f"init_lora_weights={config.init_lora_weights!r} starts from the full-precision weight, "
                "which an int4 layer no longer has. Allowed: true, false, gaussian, orthogonal."
            )
        config.fan_in_fan_out = False  # also for Conv1D: the codes are of the [out, in] weight
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self._quantized: tuple[Int4Linear, ...] = ()  # a tuple, so that it is no submodule

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> Any:
        """Refuse all but plain LoRA: DoRA and similar methods read a base weight in floating point, which is gone.

        Raises:
            KitError: For any other variant.
        """
        variant = super().resolve_lora_variant(config=config, **kwargs)
        if variant is not None:
            raise KitError(f"int4 layers take plain LoRA, not {type(variant).__name__}; use scheme 'nf4' for it")
        return None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the dequantized weight; arguments as PEFT's."""
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        base = self.get_base_layer()
        if isinstance(base, Int4Linear):
            self._quantized = (base,)
            self.base_layer = base.to_full_precision(base.compute_dtype or torch.float32)
            self.fan_in_fan_out = base.transposed
        super().merge(safe_merge=safe_merge, adapter_names=names)

    def unmerge(self) -> None:
        """Put the quantized layer back, equal to the last bit."""
        if self._quantized:
            (base,) = self._quantized
            self.base_layer = base.to(cast(torch.Tensor, self.base_layer.weight).device)
            self._quantized = ()
            self.fan_in_fan_out = False
        self.merged_adapters.clear()


def register(config: LoraConfig) -> LoraConfig:
    """Set the LoRA layer for int4 layers in a LoRA config, and return the config.

    Without it PEFT treats them as ordinary linear layers, and everything but merging works. A config that is
    read from a folder has to be registered again:

        config = register(PeftConfig.from_pretrained(folder))
        model = PeftModel.from_pretrained(base, folder, config=config)
    """
    config._register_custom_module({Int4Linear: LoraInt4Linear})
    return config


def quantize_linears_(
    model: nn.Module,
    spec: Quantization,
    skip_modules: Iterable[str] = (),
    compute_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> nn.Module:
    """Replace a model's linear layers and GPT-2 `Conv1D`s by 4-bit integer ones, in place.

    Embeddings, norms and biases stay as they are; so does what `layers.quantizable` leaves out, such as a layer whose
    weight is shared with another module (an output layer tied to the embedding).

    Args:
        model: In floating point, on any device; on the meta device the layers are made empty.
        spec: Scheme `int4`.
        skip_modules: Names of modules to skip, with all modules inside them: every head. `"classifier"` means any
            module of that name, `"encoder.layer.0"` only that one.
        compute_dtype: The dtype of the products; that of the input if None.
        device: Where each layer is moved before it is quantized, one by one; None leaves it where it is. So a GPU
            never holds the whole model in floating point.

    Returns:
        The same model.

    Raises:
        KitError: For another scheme, or if there is nothing to quantize.
    """
    if spec.scheme != "int4":
        raise KitError(
            f"quantize_linears_ makes 'int4' layers, not {spec.scheme!r}; for nf4, fp4 and int8 give "
            "transformers the configuration that bitsandbytes_config returns"
        )
    found = quantizable(model, skip_modules)
    if not found or not found[0]:
        raise KitError("the model has no linear layer inside that could be quantized")
    for name in found:  # each old layer is freed before the next is quantized
        plain: Any = model.get_submodule(name)
        plain = plain if device is None else plain.to(device)
        model.set_submodule(name, Int4Linear.from_module(plain, spec, compute_dtype))
        del plain
    return model


class Int4(Backend):
    """Scheme `int4`: the integers -7 to 7."""

    layers = (Int4Linear,)

    def quantize_(
        self,
        model: nn.Module,
        spec: Quantization,
        skip_modules: Sequence[str],
        compute_dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> nn.Module:
        """Quantize with `quantize_linears_`, and move the rest of the model to the device."""
        quantize_linears_(model, spec, skip_modules, compute_dtype, device)
        return model if device is None else model.to(device)

    def scheme_of(self, layer: Any) -> str:
        """Return `int4`."""
        return "int4"

    def storage(self, layer: Any) -> LinearStorage:
        """Measure codes and scales."""
        kept = (layer.weight, layer.absmax, layer.nested_absmax, layer.offset)
        stored = sum(tensor.numel() * tensor.element_size() for tensor in kept if tensor is not None)
        return LinearStorage(True, layer.in_features * layer.out_features, stored, 0)

    def shape(self, layer: Any) -> torch.Size:
        """Return the shape of the original weight."""
        return torch.Size((layer.out_features, layer.in_features))

    def dense_weight(self, layer: Any, dtype: torch.dtype) -> torch.Tensor:
        """Dequantize the weight."""
        weight: torch.Tensor = layer.dequantize(dtype)
        return weight

    def four_bits(self, layer: Any) -> FourBits:
        """Return the codes of the weight."""
        stored: Stored = layer.stored
        scales = block_scales(stored.absmax, stored.nested_absmax, stored.offset)
        return FourBits(stored.packed.cpu(), codebook("int4"), scales.cpu(), stored.block_size)

    def lora_layers(self, config: LoraConfig) -> LoraConfig:
        """Set the LoRA layer for int4 layers: see `register`."""
        return register(config)


register_backend(Int4(), {"int4": SCHEMES["int4"]})
