"""A frozen linear layer of 4-bit integers that adapters can be trained on.

bitsandbytes has nf4 and fp4 and no integers; PEFT's torchao layer takes int8 alone, transformers refuses to
train on HQQ, and quanto is no longer developed and unknown to PEFT. So this is the kit's own: packed codes
and doubly quantized block scales (`qlora_kit.quantization`), dequantized for each product, with the gradient
to its input and none to itself.

    quantize_linears_(model, Quantization("int4"), skip_modules=["classifier"], compute_dtype=torch.float32)
    model = get_peft_model(model, register(LoraConfig(...)))
"""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

# Before anything that imports bitsandbytes by itself.
from . import _bnb  # noqa: F401  # isort: skip
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from . import quantization
from .errors import KitError
from .quantization import NESTED_BLOCK_SIZE, Quantization

logger = logging.getLogger(__name__)


@functools.cache
def _pairs() -> torch.Tensor:
    """The two weights that each byte stands for, side by side in one 8-byte word: int64, [256].

    One look-up a byte then yields two float32 weights.
    """
    levels = quantization.codebook("int4")
    byte = torch.arange(256)
    return torch.stack((levels[byte >> 4], levels[byte & 15]), dim=1).contiguous().view(torch.int64).reshape(256)


@functools.cache
def _table(device: torch.device) -> torch.Tensor:
    return _pairs().to(device)


class Stored(NamedTuple):
    """What a layer keeps of its weight.

    Attributes:
        packed: Codes, uint8, [ceil(size / 2)]: two a byte, the first in the upper half.
        absmax: Block scales: uint8 codes, or float32 where `nested_absmax` is None; [ceil(size / block_size)].
        nested_absmax: float32, [ceil(blocks / 256)], or None.
        offset: float32, [], or None.
        block_size: Weights a scale.
        size: How many weights there are.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    offset: torch.Tensor | None
    block_size: int
    size: int


def dequantize_plain(stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    """Undo the packing in plain torch, on any device. The Triton kernel gives the same bits.

    Args:
        stored: What the layer keeps.
        dtype: Of the result; products are taken in float32 and rounded once.

    Returns:
        The weights, [size].
    """
    packed, absmax, nested_absmax, offset, block_size, size = stored
    values = _table(packed.device).index_select(0, packed.int()).view(torch.float32)
    scales = quantization.block_scales(absmax, nested_absmax, offset)
    whole = size // block_size
    values[: whole * block_size].view(-1, block_size).mul_(scales[:whole, None])
    if size % block_size:
        values[whole * block_size :].mul_(scales[whole])
    return values[:size].to(dtype)


# What Triton says it supports; on a T4 (7.5) torch's and bitsandbytes' own kernels do.
TRITON_CAPABILITY = (8, 0)


@functools.cache
def triton_kernel() -> Any:
    """Return `four_bit_triton.dequantize`; None where there is no Triton (Windows) or it cannot compile."""
    if torch.cuda.get_device_capability() < TRITON_CAPABILITY:
        return None
    try:
        from . import four_bit_triton

        codes, ones = torch.zeros(16, dtype=torch.uint8, device="cuda"), torch.ones(16, device="cuda")
        four_bit_triton.dequantize(Stored(codes, ones[:1], None, None, 32, 32), ones, None, torch.float16)
    except Exception as error:  # Triton and its compiler fail in many ways, and none of them is the user's doing
        logger.warning("4-bit layers go without the kit's CUDA kernel, slower (%s)", " ".join(str(error).split()))
        return None
    return four_bit_triton.dequantize


@functools.cache
def _levels(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return quantization.codebook("int4").to(device), quantization.dynamic_codebook().to(device)


def dequantize(stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    """Undo the packing with the fastest means at hand; arguments as for `dequantize_plain`."""
    kernel = triton_kernel() if stored.packed.is_cuda else None
    if kernel is None:
        return dequantize_plain(stored, dtype)
    return cast(torch.Tensor, kernel(stored, *_levels(stored.packed.device), dtype))


class _Product(torch.autograd.Function):
    """`x @ W.T + b` with W in 4 bits.

    Were W dequantized outside, autograd would keep it for the backward pass, and all layers' weights together
    in 16 bits are what quantization was to save. So only the packed tensors are kept, and W is made again:
    dL/dx = dL/dy @ W. There is no gradient to W.
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
            grad_bias = gradient.reshape(-1, ctx.shape[0]).sum(0)
        return grad_x, grad_bias, None, None, None, None, None, None


class Int4Linear(nn.Linear):
    """A linear layer whose weight is stored as 4-bit integers with block scales.

    It is an `nn.Linear`, so that PEFT and `target_modules="all-linear"` take it for one. What it stores are
    tensors of its state dict, so safetensors and `load_state_dict` work as for any module:

        weight         uint8, [ceil(out * in / 2)]: the packed codes
        absmax         uint8 codes of the block scales (float32 scales without double quantization), [blocks]
        nested_absmax  float32, [ceil(blocks / 256)], with double quantization
        offset         float32, [], with double quantization
        bias           as it was

    Casting the module (`.half()`) leaves the scales in float32.

    Args:
        in_features: Size of the input's last dimension.
        out_features: Size of the output's last dimension.
        bias: Whether there is one.
        spec: Scheme `int4`, with its block size and whether the scales are quantized too.
        compute_dtype: The dtype of the product; that of the input if None.
        transposed: Whether it stands for GPT-2's `Conv1D`, whose weight is [in, out]. The codes are of the
            [out, in] weight either way; it matters when the layer is turned back.
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
            module: The layer; it is not changed, and its bias is shared. One on the meta device gives empty
                storage for a state dict to be loaded into.
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
            stored = quantization.quantize(weight, spec)
            layer.weight = stored.packed
            layer.absmax, layer.nested_absmax, layer.offset = (
                stored.absmax,
                stored.nested_absmax,
                stored.offset,
            )
        return layer.train(module.training)

    @property
    def stored(self) -> Stored:
        """The stored tensors, with what is needed to undo them."""
        size = self.in_features * self.out_features
        return Stored(self.weight, self.absmax, self.nested_absmax, self.offset, self.spec.block_size, size)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight that the stored bits stand for, [out_features, in_features]."""
        return dequantize(self.stored, dtype).view(self.out_features, self.in_features)

    def to_full_precision(self, dtype: torch.dtype = torch.float32) -> nn.Linear | Conv1D:
        """Return a plain layer of the kind this one was made from, holding the dequantized weight."""
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
        result = _Product.apply(
            input.to(dtype),
            bias,
            self.weight,
            self.absmax,
            self.nested_absmax,
            self.offset,
            self.spec.block_size,
            self.out_features,
        )
        return result.to(input.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Int4Linear:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{super().extra_repr()}, spec={self.spec.label!r}, compute_dtype={self.compute_dtype}"


class LoraInt4Linear(LoraLinear):
    """LoRA on a `Int4Linear`: what PEFT makes of one once `register` has been called on its config.

    Forward, training, saving and loading are those of LoRA on any linear layer. Merging is not: 4-bit codes
    are so coarse that adding an adapter and rounding again takes most of it away. So merging puts a plain
    layer with the dequantized weight in the quantized one's place and adds the adapter to that, exactly;
    unmerging puts the quantized layer back.

    Raises:
        KitError: For a start of the adapters (`init_lora_weights`) that reads the full-precision weight.
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
        """Plain LoRA alone: DoRA and its like read the base weight, which is not there in floating point.

        Raises:
            KitError: For any other.
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
        """Put the quantized layer back, as it was to the last bit."""
        if self._quantized:
            (base,) = self._quantized
            self.base_layer = base.to(cast(torch.Tensor, self.base_layer.weight).device)
            self._quantized = ()
            self.fan_in_fan_out = False
        self.merged_adapters.clear()


def register(config: LoraConfig) -> LoraConfig:
    """Tell a LoRA config what int4 layers become, and return it.

    Without it PEFT takes them for ordinary linear layers, and everything but merging works. A config that is
    read back from a folder has to be told again:

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

    Embeddings, norms and biases stay as they are; so does a layer whose weight is shared with another module
    (an output layer tied to the embedding).

    Args:
        model: In floating point, on any device; on the meta device the layers are made empty.
        spec: Scheme `int4`.
        skip_modules: Names of modules to leave alone, with all below them: every head. `"classifier"` is any
            module of that name, `"encoder.layer.0"` that one.
        compute_dtype: The dtype of the products; that of the input if None.
        device: Where layers go, one by one, before they are quantized, and stay; None leaves each where it is. So a
            model from the host is never whole on a GPU in floating point.

    Returns:
        The same model.

    Raises:
        KitError: Another scheme, or nothing there to quantize.
    """
    if spec.scheme != "int4":
        raise KitError(
            f"quantize_linears_ makes 'int4' layers, not {spec.scheme!r}; for nf4, fp4 and int8 give "
            "transformers the configuration that bitsandbytes_config returns"
        )
    skipped = [f".{name}." for name in skip_modules]
    shared = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and not isinstance(module, Int4Linear)
        and shared[id(module.weight)] == 1
        and not any(skip in f".{name}." for skip in skipped)
    ]
    if not found or not found[0]:
        raise KitError("the model has no linear layer inside that could be quantized")
    for name in found:  # each is let go before the next is made
        plain: Any = model.get_submodule(name)
        plain = plain if device is None else plain.to(device)
        model.set_submodule(name, Int4Linear.from_module(plain, spec, compute_dtype))
        del plain
    return model
