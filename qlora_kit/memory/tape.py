"""Record what a training step allocates, tensor by tensor: on real tensors, or on shapes alone.

A `Tape` sees every operation that torch dispatches, also in the backward pass and in recomputation. It records which
storages each operation makes, and when they are freed. On the meta device nothing is computed and no weight is needed.
But modules, autograd and PEFT are the real ones, so what they keep is found, not modelled. `Stage` corrects what
differs between the meta device and a GPU: autocast, the attention kernel, and what operations allocate inside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..quantization.storage import tensors_of

aten = torch.ops.aten


@dataclasses.dataclass(eq=False, slots=True)
class Block:
    """A storage: what made it, and from when to when it lived.

    Args:
        bytes: Its size.
        made_by: Name of the operation; for a storage that existed before, what it is.
        phase: `before`, `forward`, `backward` or `optimizer`.
        recomputed: Whether a checkpointed layer made it while it was recomputed.
        born: Place of its first event.
        died: Place of its last event, or None while it lives.
        kind: What it is for; set once that is known.
    """

    bytes: int
    made_by: str
    phase: str
    recomputed: bool
    born: int
    died: int | None = None
    kind: str = ""


class Tape(TorchDispatchMode):
    """Records every storage that operations make on one device.

    Args:
        device: Type of the device whose storages count: `cpu`, `cuda` or `meta`.
        inside: Operations that allocate more inside than they return, with replacements that show these
            allocations.
    """

    def __init__(self, device: str, inside: dict[Any, Callable[..., Any]] | None = None) -> None:
        super().__init__()
        self.device = device
        self.inside = inside or {}
        self.events: list[tuple[Block, bool]] = []
        self.phase = "before"
        self.on_operation: Callable[[], None] | None = None
        self._alive: dict[int, tuple[Block, Any]] = {}

    def hold(self, tensor: torch.Tensor, kind: str) -> None:
        """Record a tensor that exists already, or set what a recorded one is for if that is not known."""
        block = self.block_of(tensor) or self._see(tensor, kind)
        if block is not None:
            block.kind = block.kind or kind

    def name(self, tensor: torch.Tensor, kind: str) -> None:
        """Set what a recorded tensor is for."""
        block = self.block_of(tensor)
        if block is not None:
            block.kind = kind

    def block_of(self, tensor: torch.Tensor) -> Block | None:
        """Return the block of a tensor's storage, or None if it was not recorded."""
        found = self._alive.get(tensor.untyped_storage()._cdata)
        return found[0] if found else None

    def alive(self) -> list[Block]:
        """Return the blocks that live now."""
        return [block for block, _ in self._alive.values()]

    def _see(self, tensor: torch.Tensor, made_by: str) -> Block | None:
        if tensor.device.type != self.device:
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return None
        size = storage.nbytes()
        if not size:
            return None
        recomputed = self.phase == "backward" and torch.is_grad_enabled()
        block = Block(size, made_by, self.phase, recomputed, len(self.events))
        self.events.append((block, True))

        def gone(_: Any) -> None:
            block.died = len(self.events)
            self.events.append((block, False))
            self._alive.pop(key, None)

        self._alive[key] = (block, weakref.ref(storage, gone))
        return block

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and record the storages that it made."""
        kwargs = kwargs or {}
        if self.on_operation is not None:
            self.on_operation()
        instead = self.inside.get(func)
        if instead is not None:
            with self:
                out = instead(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            self._see(out, func._schema.name)
        elif isinstance(out, (tuple, list)):
            for item in out:
                if isinstance(item, torch.Tensor):
                    self._see(item, func._schema.name)
                elif isinstance(item, (tuple, list)):
                    for inner in item:
                        if isinstance(inner, torch.Tensor):
                            self._see(inner, func._schema.name)
        return out


# --- make the meta device act like the planned device ------------------------------------------------------------

# aten/src/ATen/autocast_mode.h: what autocast runs in 16 bits, and what in fp32, on CUDA and on CPUs.
_SIXTEEN = {
    "linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "addmv", "addbmm", "baddbmm", "mv",
    "einsum", "conv1d", "conv2d", "scaled_dot_product_attention", "prelu", "chain_matmul",
}  # fmt: skip
_FP32 = {
    "pow", "__pow__", "__rpow__", "rsqrt", "reciprocal", "exp", "expm1", "log", "log10", "log2", "log1p", "acos",
    "asin", "cosh", "sinh", "tan", "erfinv", "softplus", "layer_norm", "group_norm", "rms_norm", "nll_loss",
    "cross_entropy", "mse_loss", "l1_loss", "smooth_l1_loss", "kl_div", "cosine_similarity", "logsumexp", "dist",
    "renorm", "cumsum", "cumprod", "prod", "sum", "softmax", "log_softmax", "norm",
}  # fmt: skip


_FP32_CPU = {"cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "kl_div", "prod"}


class Stage(TorchFunctionMode):
    """Makes the meta device act like the planned device.

    Autocast casts, and caches casts of trained weights, as CUDA's does. Attention uses the kernel that the device would
    use. A question about values (is every token real?) is answered by `padded`.

    Args:
        device: `cpu` or `cuda`.
        capability: Compute capability of the GPU.
        dtype: The dtype that autocast computes in, or None for no autocast.
        padded: Whether the batches have padding.
        fused: Whether attention on a CPU is the kit's own (`kernels.cpu_attention`), which is in fp32.
    """

    def __init__(
        self, device: str, capability: tuple[int, int], dtype: torch.dtype | None, padded: bool, fused: bool = True
    ) -> None:
        super().__init__()
        self.device, self.capability, self.padded = device, capability, padded
        self.dtype = dtype
        own = device == "cpu" and fused
        self.sixteen = _SIXTEEN - {"scaled_dot_product_attention"} if own else _SIXTEEN
        self.fp32 = _FP32 if device == "cuda" else _FP32_CPU
        self.casting = False
        self._casts: dict[int, torch.Tensor] = {}

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Cast as autocast does inside the block, a forward pass."""
        self.casting = self.dtype is not None
        try:
            yield
        finally:
            self.casting = False
            self._casts.clear()

    def forget_casts(self) -> None:
        """Free the casts of trained weights that a recomputed layer left."""
        if self._casts and not torch.is_grad_enabled():
            self._casts.clear()

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._cast(item, dtype) for item in value)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if dtype != torch.float32 and value.dtype == torch.float32 and value.requires_grad and value.is_leaf:
            key = id(value)
            if key not in self._casts:
                self._casts[key] = value.to(dtype)
            return self._casts[key]
        return value.to(dtype)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function as the planned device would."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__bool__" and args[0].device.type == "meta":
            return not self.padded
        if self.dtype is not None and (self.casting or torch.is_grad_enabled()):
            if name in self.sixteen:
                args = tuple(self._cast(item, self.dtype) for item in args)
                kwargs = {key: self._cast(item, self.dtype) for key, item in kwargs.items()}
            elif name in self.fp32:
                args = tuple(self._cast(item, torch.float32) for item in args)
                kwargs = {key: self._cast(item, torch.float32) for key, item in kwargs.items()}
        if name == "scaled_dot_product_attention" and args[0].device.type == "meta":
            return self._attention(*args, **kwargs)
        if name == "dropout" and self.device == "cuda" and args[0].device.type == "meta":
            return _fused_dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Run the kernel that torch would pick (aten/.../transformers/sdp_utils.cpp).

        Takes what `torch.nn.functional.scaled_dot_product_attention` does.
        """
        if self.device == "cpu":
            # With dropout, or when told to, the CPU uses plain products.
            if dropout_p == 0.0 and query.dim() == 4 and torch.backends.cuda.flash_sdp_enabled():
                bias = None
                if attn_mask is not None:
                    bias = attn_mask
                    if bias.dtype == torch.bool:
                        bias = torch.where(bias, 0.0, float("-inf")).to(query.dtype)
                    bias = bias.expand(query.shape[0], query.shape[1], -1, -1)
                if enable_gqa:
                    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
                out: torch.Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
                    query, key, value, dropout_p, is_causal, attn_mask=bias, scale=scale
                )[0]
                return out
            return _plain_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        sixteen = query.dtype in (torch.float16, torch.bfloat16)
        if attn_mask is None and sixteen and self.capability >= (8, 0):
            return aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, return_debug_mask=False, scale=scale
            )[0]
        bias = None
        if attn_mask is not None:
            bias = attn_mask
            if bias.dtype == torch.bool:
                bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(bias, float("-inf"))
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        if key.shape[1] != query.shape[1]:
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, query.requires_grad, dropout_p, is_causal, scale=scale
        )[0]


def _fused_dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    # A GPU keeps the mask as booleans (aten/src/ATen/native/Dropout.cpp); other devices keep it as numbers.
    if not training or p == 0.0 or inplace:
        return nn.functional.dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def _plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """Attend by plain products. Takes what `torch.nn.functional.scaled_dot_product_attention` does."""
    return aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def parameters_of(model: nn.Module) -> list[torch.Tensor]:
    """Return a model's weights, buffers and quantization tables, each storage once, in the model's order."""
    return [tensors[0] for tensors in tensors_of(model).values()]
