"""The schemes of bitsandbytes: its configuration, its linear layers, and 4-bit embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D

from ..config.quantization import NESTED_BLOCK_SIZE, SCHEMES, Quantization
from ..errors import KitError
from ..system.safe_bitsandbytes import MatMul8bitFp, bnb, keep_weights_as_stored_
from ..system.subclasses import subclass
from .backend import Backend, FourBits, LinearStorage, register
from .layers import quantizable, why_table_whole
from .packed import Stored, triton_kernel

if TYPE_CHECKING:
    import transformers


def bitsandbytes_config(
    spec: Quantization, compute_dtype: torch.dtype, skip_modules: Iterable[str]
) -> transformers.BitsAndBytesConfig | None:
    """Translate a spec into transformers' configuration of bitsandbytes.

    Args:
        spec: The wanted quantization.
        compute_dtype: The dtype that weights are dequantized to for the matrix products.
        skip_modules: Names of modules that stay as they are: every head (the first trap is a new head that
            becomes a 4-bit layer).

    Returns:
        The configuration, or None for `none` and for `int4`: bitsandbytes has no 4-bit integers, and
        `BitsAndBytesConfig(bnb_4bit_quant_type="int4")` fails only once the first weight is loaded. For
        `int4` use `qlora_kit.int4.quantize_linears_`.

    Raises:
        KitError: For a block size that transformers cannot set for bitsandbytes' layers.
    """
    if spec.scheme in ("none", "int4"):
        return None
    import transformers

    skip = list(skip_modules)
    options: dict[str, Any]
    if spec.scheme == "int8":
        options = {"load_in_8bit": True, "llm_int8_skip_modules": skip}
    else:
        if spec.block_size != 64:
            raise KitError(
                f"block_size={spec.block_size} cannot be trained with {spec.scheme}: transformers builds "
                "bitsandbytes' layers with blocks of 64. Use block_size=64, or scheme int4, which takes any."
            )
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": spec.scheme,
            "bnb_4bit_use_double_quant": spec.double_quantization,
            "bnb_4bit_compute_dtype": compute_dtype,
            "llm_int8_skip_modules": skip,
        }
    return transformers.BitsAndBytesConfig(**options)


def quantize_with_bitsandbytes_(
    model: nn.Module, quantization: Quantization, skip_modules: Sequence[str], compute_dtype: torch.dtype
) -> nn.Module:
    """Replace a loaded model's linear layers by bitsandbytes' own, in place.

    `from_pretrained` does the same while it reads a checkpoint, but only for layers of the usual classes. This function
    is for models without a checkpoint, and for the layers that `from_pretrained` leaves.

    Args:
        model: Holds linear layers (`layers.quantizable`) on the device where they stay.
        quantization: Scheme `none` (nothing is done), `int8`, `nf4` or `fp4`.
        skip_modules: Names of modules that stay as they are.
        compute_dtype: The dtype that weights are dequantized to.

    Returns:
        The model.
    """
    if quantization.scheme == "none":
        return model
    for name in quantizable(model, skip_modules):
        # One by one and without other references, so that each old layer is freed: a model of 7 B weights is never in
        # memory in 16 bits and in 4 bits at once.
        module: Any = model.get_submodule(name)
        weight = module.weight.data.t().contiguous() if isinstance(module, Conv1D) else module.weight.data
        out_features, in_features = weight.shape
        new: nn.Module
        if quantization.scheme == "int8":
            new = bnb.nn.Linear8bitLt(
                in_features,
                out_features,
                module.bias is not None,
                has_fp16_weights=False,
                threshold=6.0,  # as transformers sets it
                device="meta",
            )
            if weight.is_meta:
                new.weight = _int8_shape(weight)
            else:
                new.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(
                in_features,
                out_features,
                module.bias is not None,
                compute_dtype=compute_dtype,
                compress_statistics=quantization.double_quantization,
                quant_type=quantization.scheme,
                device="meta",
            )
            new.weight = _four_bit(weight, quantization.scheme, quantization.double_quantization, new)
        if module.bias is not None:
            new.bias = nn.Parameter(module.bias.data, requires_grad=False)
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], new if weight.is_meta else new.to(weight.device))
        del module, weight, new
    return keep_weights_as_stored_(model)


class _Table(bnb.nn.Embedding4bit):
    """A 4-bit embedding of bitsandbytes that can also be saved.

    bitsandbytes' own class refuses to be part of a state dict, so PEFT cannot save an adapter of the same model. The
    frozen table belongs to the base and is made again from the base's weights. Here its state dict holds what that of
    `Linear4bit` holds.
    """

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Embedding._save_to_state_dict(self, destination, prefix, keep_vars)
        weight: Any = self.weight
        for key, value in weight.quant_state.as_dict(packed=True).items():
            destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()


class _TableAsTensor(torch.Tensor):
    """The tensor that other code sees as the weight of a 4-bit embedding.

    Reading its shape, dtype or device costs nothing. An operation on its values gets the dequantized table: DeBERTa
    normalizes the rows of a table, and Gemma reads the dtype.
    """

    table: _Table

    @staticmethod
    def __new__(cls, table: _Table) -> _TableAsTensor:
        weight: Any = table.weight
        shape = weight.quant_state.shape
        made: Any = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=table.dtype, device=weight.device)
        made.table = table
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own way to have none

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch hands over the function too
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def values(seen: _TableAsTensor) -> torch.Tensor:
            weight: Any = seen.table.weight
            return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).to(seen.dtype)

        return func(*tree_map_only(cls, values, args), **tree_map_only(cls, values, kwargs or {}))


class Embedding4bit(bnb.nn.Embedding4bit):
    """An embedding whose table is stored in 4 bits. Whatever its class does besides the look-up stays the same.

    Attributes:
        table: The stored table.
    """

    table: _Table

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # a frozen table is not replaced
        """The table as a tensor of numbers; reading its values dequantizes all of them."""
        return _TableAsTensor(self.table)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look rows up: ids `[...]` to `[..., embedding_dim]`."""
        rows: torch.Tensor = self.table(input)
        return rows

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass  # `table` saves itself


def quantize_embeddings_(model: nn.Module, scheme: str) -> nn.Module:
    """Store a model's embeddings in 4 bits, in place; a look-up dequantizes only its own rows.

    Args:
        model: Holds `nn.Embedding` layers, or layers of subclasses, on the device where they stay. Those for which
            `layers.why_table_whole` returns a reason stay as they are.
        scheme: `nf4`, `fp4`, or `none` (nothing is done).

    Returns:
        The model.
    """
    if scheme == "none":
        return model
    for module in [module for module in model.modules() if isinstance(module, nn.Embedding)]:
        if why_table_whole(module) is not None:
            continue
        weight = module.weight.data
        table = _Table(module.num_embeddings, module.embedding_dim, quant_type=scheme, device="meta")
        table.dtype = weight.dtype
        table.weight = _four_bit(weight, scheme, False, table)
        del module.weight
        kind: Any = type(module)
        # A class that does more than the look-up (Gemma scales, OPT shifts positions) calls `super().forward` for it.
        plain = kind is nn.Embedding
        module.__class__ = Embedding4bit if plain else subclass(f"{kind.__name__}4bit", kind, Embedding4bit)
        module.table = table if weight.is_meta else table.to(weight.device)
    return model


def _four_bit(weight: torch.Tensor, scheme: str, nested: bool, module: Any) -> nn.Parameter:
    """Return a weight that is quantized when its module is moved; for a meta weight, return only the shapes."""
    if not weight.is_meta:
        return bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type=scheme, compress_statistics=nested, module=module
        )

    def empty(size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    blocks = -(-weight.numel() // 64)
    state = bnb.functional.QuantState(
        absmax=empty(blocks, torch.uint8 if nested else torch.float32),
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=64,
        code=empty(16, torch.float32),
        quant_type=scheme,
        offset=torch.empty((), dtype=torch.float32, device="meta") if nested else None,
        state2=bnb.functional.QuantState(
            absmax=empty(-(-blocks // 256), torch.float32),
            blocksize=256,
            code=empty(256, torch.float32),
            dtype=torch.float32,
        )
        if nested
        else None,
    )
    module.quant_state = state
    return bnb.nn.Params4bit(
        empty((weight.numel() + 1) // 2, torch.uint8)[:, None],
        requires_grad=False,
        quant_state=state,
        quant_type=scheme,
        compress_statistics=nested,
        module=module,
        bnb_quantized=True,
    )


def _int8_shape(weight: torch.Tensor) -> nn.Parameter:
    """Return the shapes that `Linear8bitLt` stores for a weight on the meta device."""
    shape = bnb.nn.Int8Params(torch.empty(weight.shape, dtype=torch.int8, device="meta"), requires_grad=False)
    shape.CB = shape.data
    shape.SCB = torch.empty(weight.shape[0], dtype=torch.float32, device="meta")
    return shape


# --- the backend --------------------------------------------------------------------------------------------------


class Linear4bitWithTrainedBias(bnb.nn.Linear4bit):
    """A 4-bit layer with a trained bias, which stays in 32 bits and gets a gradient.

    `Linear4bit.forward` casts its bias, in place, to the dtype that it computes in (0.50, nn/modules.py).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply: `[..., in_features]` to `[..., out_features]`."""
        weight: Any = self.weight
        rows = x.to(self.compute_dtype or x.dtype)
        product = bnb.matmul_4bit(rows, weight, quant_state=weight.quant_state)
        return (product + self.bias.to(rows.dtype)).to(x.dtype)


class Linear8bitOnCpu(bnb.nn.Linear8bitLt):
    """An 8-bit layer on the meta device that computes as `bnb.matmul` does on a CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply shapes: `[..., in_features]` to `[..., out_features]`."""
        weight: Any = self.weight
        self.state.is_training = self.training
        if weight.CB is not None:
            self.init_8bit_state()
        if self.bias is not None and self.bias.dtype != x.dtype:
            self.bias.data = self.bias.data.to(x.dtype)
        out: torch.Tensor = MatMul8bitFp.apply(x, self.weight, None, self.bias, self.state)
        if self.state.CB is not None:
            self.weight.data = self.state.CB
        return out


def dequantized(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight that 4-bit codes stand for, `[out_features, in_features]`.

    Args:
        packed: The codes, two per byte.
        state: bitsandbytes' `QuantState`.
        dtype: Dtype of the result.
    """
    # The dtype of bitsandbytes' own function is fixed, and a cast after it would be another pass over the weight.
    kernel = triton_kernel() if packed.is_cuda else None
    if kernel is not None and (not state.nested or state.state2.blocksize == NESTED_BLOCK_SIZE):
        nested, offset, scale_levels = (
            (state.state2.absmax, state.offset, state.state2.code) if state.nested else (None, None, None)
        )
        stored = Stored(packed, state.absmax, nested, offset, state.blocksize, math.prod(state.shape))
        values: torch.Tensor = kernel(stored, state.code, scale_levels, dtype)
        return values.view(state.shape)
    weight: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, _scales(state), state.blocksize, state.quant_type, state.shape, dtype
    )
    return weight


def _scales(state: Any) -> torch.Tensor:
    """Return the float32 scales of a `QuantState`'s blocks."""
    if not state.nested:
        return cast(torch.Tensor, state.absmax)
    return cast(torch.Tensor, bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset)


class BitsAndBytes(Backend):
    """Schemes `int8` (LLM.int8(), arXiv 2208.07339), `nf4` and `fp4` (QLoRA, arXiv 2305.14314)."""

    layers = (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit)

    def loading(
        self, spec: Quantization, skip_modules: Sequence[str], compute_dtype: torch.dtype, device: torch.device
    ) -> dict[str, Any]:
        """Quantize layer by layer while the checkpoint is read, on one device: a 4-bit model cannot be moved."""
        config = bitsandbytes_config(spec, compute_dtype, skip_modules)
        return {"device_map": {"": device}, "quantization_config": config}

    def quantize_(
        self,
        model: nn.Module,
        spec: Quantization,
        skip_modules: Sequence[str],
        compute_dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> nn.Module:
        """Quantize the layers that are left: transformers replaces exactly two classes, and Falcon's is a third."""
        return quantize_with_bitsandbytes_(model, spec, skip_modules, compute_dtype)

    def scheme_of(self, layer: Any) -> str:
        """Return `int8`, or the 4-bit type that the weight is stored in."""
        return "int8" if isinstance(layer, bnb.nn.Linear8bitLt) else layer.weight.quant_state.quant_type

    def storage(self, layer: Any) -> LinearStorage:
        """Measure codes, scales and code tables."""
        weight = layer.weight
        if isinstance(layer, bnb.nn.Linear8bitLt):
            scales = getattr(weight, "SCB", None)
            return LinearStorage(True, weight.numel(), _bytes(weight, layer.state.SCB if scales is None else scales), 0)
        state = getattr(weight, "quant_state", None)
        if state is None:  # not on its device yet
            return LinearStorage(False, weight.numel(), _bytes(weight), 0)
        stored, tables = _bytes(weight, state.absmax), _bytes(state.code)
        if state.nested:
            stored += _bytes(state.state2.absmax, state.offset)
            tables += _bytes(state.state2.code)
        return LinearStorage(True, state.shape.numel(), stored, tables)

    def shape(self, layer: Any) -> torch.Size:
        """Return the shape of the original weight; 4-bit codes are packed in one column."""
        shape: torch.Size = getattr(layer.weight, "quant_state", layer.weight).shape
        return shape

    def tables(self, weight: Any, module: Any) -> list[torch.Tensor]:
        """Return the scales and code tables of a quantized linear layer or embedding."""
        eight, four = getattr(module, "state", None), getattr(weight, "quant_state", None)
        tensors = [getattr(weight, "SCB", None), getattr(eight, "CB", None), getattr(eight, "SCB", None)]
        if four is not None:
            tensors += [four.absmax, four.code, four.offset]
            if four.nested:
                tensors += [four.state2.absmax, four.state2.code]
        return [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]

    def dense_weight(self, layer: Any, dtype: torch.dtype) -> torch.Tensor:
        """Dequantize a 4-bit weight."""
        return dequantized(layer.weight.data, layer.weight.quant_state, dtype)

    def four_bits(self, layer: Any) -> FourBits | None:
        """Return the codes of a 4-bit weight."""
        if isinstance(layer, bnb.nn.Linear8bitLt):
            return None
        state = layer.weight.quant_state
        return FourBits(layer.weight.data.flatten().cpu(), state.code.cpu(), _scales(state).cpu(), state.blocksize)

    def fuses(self, layer: Any) -> bool:
        """Return whether a layer is 4-bit: 8-bit layers multiply integers and have no dense weight."""
        return not isinstance(layer, bnb.nn.Linear8bitLt)

    def keeps_its_weight(self, layer: Any) -> bool:
        """Return whether a layer is 4-bit: those keep their dequantized weight."""
        return isinstance(layer, bnb.nn.Linear4bit)

    def waits_for_the_device(self, layer: Any) -> bool:
        """Return whether a layer is 8-bit: those ask the device where their input's outliers are."""
        return isinstance(layer, bnb.nn.Linear8bitLt)

    def precision(self, scheme: str, device: torch.device) -> str | None:
        """Return fp32 for 8-bit layers on a CPU: they have no bf16 product there, and casting only costs time."""
        return "fp32" if scheme == "int8" and device.type == "cpu" else None

    def rounds_its_input(self, scheme: str) -> bool:
        """Return whether it is `int8`: it rounds inputs, except columns with large values in any row of the batch."""
        return scheme == "int8"

    def peft_flags(self, scheme: str) -> tuple[str, ...]:
        """Return PEFT's flag for the scheme; without it PEFT uses another layer that takes more memory."""
        return ("is_loaded_in_8bit" if scheme == "int8" else "is_loaded_in_4bit",)

    def train_bias_(self, layer: Any) -> None:
        """Change a 4-bit layer's class; an 8-bit one cannot train its bias (`Experiment` refuses it)."""
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.__class__ = Linear4bitWithTrainedBias

    def inside_operations(self, kind: str) -> dict[Any, Any]:
        """Return the bodies of bitsandbytes' own kernels (backends/default/ops.py and backends/cuda/ops.py, 0.50)."""
        ops = torch.ops.bitsandbytes

        def gemm_4bit(
            a: Any, b: Any, shape: Any, absmax: Any, blocksize: int, quant_type: str, bias: Any = None,
            absmax_8bit: Any = None, absmax_code: Any = None, absmax_offset: Any = None,
        ) -> Any:  # fmt: skip
            """Multiply by a 4-bit weight. Takes what `torch.ops.bitsandbytes.gemm_4bit` does."""
            if kind == "cuda" and a.numel() // a.shape[-1] <= 32:
                return NotImplemented  # few rows: one fused kernel, nothing dequantized
            if absmax_8bit is not None:
                absmax = ops.dequantize_blockwise.default(absmax_8bit, absmax, absmax_code, 256, torch.float32)
                absmax = absmax + absmax_offset
            weight = ops.dequantize_4bit.default(b, absmax, blocksize, quant_type, shape, a.dtype)
            return nn.functional.linear(a, weight, bias)

        def vectorwise_quant(a: Any, threshold: float = 0.0) -> Any:
            stats = torch.empty(a.numel() // a.shape[-1], device=a.device, dtype=torch.float32)
            out = torch.empty(a.shape, device=a.device, dtype=torch.int8)
            columns = None
            if threshold > 0.0:
                outliers = a.abs() >= threshold
                outliers.any()
                columns = torch.empty(0, device=a.device, dtype=torch.int64)
                del outliers
            return out, stats, columns

        def scaled_mm(a: Any, b: Any, row_stats: Any, col_stats: Any, bias: Any = None, dtype: Any = None) -> Any:
            product = ops.int8_linear_matmul.default(a, b)
            out = torch.empty_like(product, dtype=torch.float16)
            return out.to(dtype or torch.float16)

        def mixed_scaled_mm(
            a: Any, ca: Any, cb: Any, sca: Any, scb: Any, outlier_cols: Any = None, bias: Any = None
        ) -> Any:
            return scaled_mm(ca, cb, sca, scb, bias, a.dtype), torch.empty(0, device=a.device, dtype=a.dtype)

        return {
            ops.gemm_4bit.default: gemm_4bit,
            ops.int8_vectorwise_quant.default: vectorwise_quant,
            ops.int8_scaled_mm.default: scaled_mm,
            ops.int8_mixed_scaled_mm.default: mixed_scaled_mm,
        }

    def plan_for_(self, model: nn.Module, kind: str) -> None:
        """Make 8-bit layers multiply as on a CPU if the plan is for one."""
        for module in model.modules():
            if kind == "cpu" and isinstance(module, bnb.nn.Linear8bitLt):
                module.__class__ = Linear8bitOnCpu


def _bytes(*tensors: torch.Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


register(BitsAndBytes(), {name: SCHEMES[name] for name in ("int8", "nf4", "fp4")})
