"""Block-wise quantization in plain, readable torch: equal to bitsandbytes' CPU code to the last bit.

Sources: QLoRA (Dettmers et al. 2023, arXiv 2305.14314), sections 2 and 3, for the 4-bit types and double quantization;
8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861) for block-wise absmax and the dynamic 8-bit type;
LLM.int8() (arXiv 2208.07339).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config.quantization import FOUR_BIT, NESTED_BLOCK_SIZE, Quantization
from ..errors import KitError
from ..system.arguments import QUANTIZATION, TENSOR, takes
from .codebooks import _decision, _dynamic_table, codebook, dynamic_codebook

if TYPE_CHECKING:
    import torch

# --- quantize -----------------------------------------------------------------------------------------------

_SMALLEST_SCALE = 1e-38
"""Blocks whose largest weight is below this become zeros, as in bitsandbytes: its reciprocal would
overflow."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor stored in 4 bits.

    Attributes:
        spec: The scheme.
        shape: The original's shape.
        dtype: The original's dtype.
        packed: The codes, uint8, [ceil(n / 2)]: two per byte, the first in the upper half.
        absmax: One scale per block, float32, [blocks]; with double quantization their 8-bit codes, uint8.
        nested_absmax: With double quantization one scale for each 256 block scales, float32; else None.
        offset: With double quantization the mean of the block scales, float32, []; else None.
        levels: The codebook, float32, [16].
    """

    spec: Quantization
    shape: torch.Size
    dtype: torch.dtype
    packed: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    offset: torch.Tensor | None
    levels: torch.Tensor

    @property
    def codes(self) -> torch.Tensor:
        """The codes one by one: uint8, [n]."""
        import torch

        return torch.stack((self.packed >> 4, self.packed & 15), dim=1).reshape(-1)[: self.shape.numel()]

    @property
    def scales(self) -> torch.Tensor:
        """The block scales as they are used, i.e. after double quantization: float32, [blocks]."""
        return block_scales(self.absmax, self.nested_absmax, self.offset)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the tensor that the stored bits stand for, in its own shape.

        Args:
            dtype: Dtype of the result; the original's by default. The product is computed in float32 and rounded once.
        """
        values = self.levels.index_select(0, self.codes.int())
        return _times_blocks(values, self.scales, self.spec.block_size).reshape(self.shape).to(dtype or self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes that the stored tensors take (the codebooks, shared by all layers, not counted)."""
        stored = (self.packed, self.absmax, self.nested_absmax, self.offset)
        return sum(t.numel() * t.element_size() for t in stored if t is not None)

    @property
    def bits_per_parameter(self) -> float:
        """Bits stored for each original weight."""
        return 8 * self.nbytes / self.shape.numel()


@takes(tensor=TENSOR, spec=QUANTIZATION)
def quantize(tensor: torch.Tensor, spec: Quantization, *, levels: str | None = None) -> Quantized:
    """Store a tensor in 4 bits: scale each block by its largest magnitude, keep the nearest level's code.

    Agrees with bitsandbytes' CPU code for nf4 and fp4 to the last bit, and so rounds as it does: whole blocks are
    multiplied by 1 / absmax, but a last, shorter block is divided by absmax. A value exactly between two levels
    goes to the lower one.

    Args:
        tensor: Floating point, any shape; flattened row by row, blocks may span rows.
        spec: A 4-bit scheme.
        levels: Use this one of `CODEBOOKS` instead of the scheme's own (for comparisons).

    Returns:
        The codes, and what is needed to dequantize them.

    Raises:
        KitError: The scheme has no 4-bit codes, or the tensor is empty or holds NaN or infinity.
    """
    import torch

    if not spec.is_4bit:
        raise KitError(f"scheme {spec.scheme!r} has no 4-bit codes; 4-bit schemes: {', '.join(FOUR_BIT)}")
    if tensor.numel() == 0:
        raise KitError("an empty tensor cannot be quantized: it has no largest value")
    flat = tensor.detach().reshape(-1).float()
    if not torch.isfinite(flat).all():
        raise KitError("the tensor holds NaN or infinity: one such weight would erase its whole block")

    name = levels or spec.scheme
    absmax = _block_absmax(flat, spec.block_size)
    whole = flat.numel() // spec.block_size * spec.block_size
    reciprocals = 1.0 / absmax.clamp(min=_SMALLEST_SCALE)
    scaled = _times_blocks(flat, reciprocals, spec.block_size)
    if whole < flat.numel():
        absmax[-1].clamp_(min=_SMALLEST_SCALE)
        scaled[whole:] = flat[whole:] / absmax[-1]
    scaled.clamp_(-1, 1)
    if scaled.numel() % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])

    midpoints, code_of = (part.to(flat.device) for part in _decision(name))
    codes = code_of.index_select(0, torch.bucketize(scaled, midpoints, out_int32=True))
    packed = (codes[::2] << 4) | codes[1::2]
    nested_absmax = offset = None
    if spec.nested:
        offset = absmax.mean()
        if not torch.isfinite(offset):
            raise KitError("the weights are too large for double quantization: their scales' mean overflows")
        absmax, nested_absmax = _quantize_8bit(absmax - offset)
    table = codebook(name).to(flat.device)
    return Quantized(spec, tensor.shape, tensor.dtype, packed, absmax, nested_absmax, offset, table)


def block_scales(absmax: torch.Tensor, nested_absmax: torch.Tensor | None, offset: torch.Tensor | None) -> torch.Tensor:
    """Undo double quantization (QLoRA, section 3): code times the group's scale, plus the mean.

    Args:
        absmax: uint8 codes of the block scales, [blocks]; or the scales themselves, float32, returned as they
            are.
        nested_absmax: One scale for each `NESTED_BLOCK_SIZE` codes, float32, or None.
        offset: The mean that was subtracted before the scales were quantized, float32, [], or None.

    Returns:
        float32, [blocks].
    """
    if nested_absmax is None or offset is None:
        return absmax
    codes = _on(dynamic_codebook, absmax.device)[absmax.int()]
    return _times_blocks(codes, nested_absmax, NESTED_BLOCK_SIZE) + offset


@functools.cache
def _on(maker: Any, device: torch.device) -> torch.Tensor:
    """Return a constant table on a device, made once."""
    return maker().to(device)


def _block_absmax(flat: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return the largest magnitude in each block; the last block is shorter if the size does not divide."""
    import torch

    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % block_size))
    return padded.abs().reshape(-1, block_size).amax(dim=1)


def _times_blocks(flat: torch.Tensor, factors: torch.Tensor, block_size: int) -> torch.Tensor:
    """Multiply each block of a flat tensor by its factor; the last block may be shorter."""
    import torch

    whole = flat.numel() // block_size
    result = torch.empty_like(flat)
    torch.mul(
        flat[: whole * block_size].view(-1, block_size),
        factors[:whole, None],
        out=result[: whole * block_size].view(-1, block_size),
    )
    if flat.numel() % block_size:
        torch.mul(flat[whole * block_size :], factors[whole], out=result[whole * block_size :])
    return result


def _quantize_8bit(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize block scales (mean removed) to the dynamic 8-bit type in blocks of 256.

    bitsandbytes looks the code up in a table of 65,536 entries instead of searching the levels. So a value close
    to the middle between two levels can get the further one. This function does the same.

    Returns:
        uint8 codes, [n], and float32 absmax, [ceil(n / 256)].
    """
    import torch

    absmax = _block_absmax(values, NESTED_BLOCK_SIZE)
    # in a group of zeros 0 * (1 / 0) is NaN; bitsandbytes gives it code 0, and its scale of 0 makes it 0
    # again
    scaled = _times_blocks(values, 1.0 / absmax, NESTED_BLOCK_SIZE).clamp(-1, 1).nan_to_num(nan=-1.0)
    slots = torch.floor((scaled + 1) / 2 * 65535 + 0.5).long()
    return _on(_dynamic_table, values.device)[slots], absmax


# --- what it costs ------------------------------------------------------------------------------------------


@takes(tensor=TENSOR, spec=QUANTIZATION)
def roundtrip(tensor: torch.Tensor, spec: Quantization, *, levels: str | None = None) -> torch.Tensor:
    """Quantize and dequantize: return the weights that a layer of this scheme multiplies with.

    Args:
        tensor: Floating point; for `int8` of two dimensions, [out, in].
        spec: Any scheme; `none` returns the tensor itself.
        levels: Another codebook for a 4-bit scheme (see `quantize`).

    Returns:
        The same shape and dtype.

    Raises:
        KitError: As `quantize`; or int8 for a tensor that is not a matrix.
    """
    if spec.scheme == "none":
        return tensor
    if spec.scheme == "int8":
        codes, absmax = quantize_int8(tensor)
        return (codes.float() * (absmax[:, None] / 127)).to(tensor.dtype)
    return quantize(tensor, spec, levels=levels).dequantize()


def quantize_int8(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Store a weight in 8 bits with one scale per row, as LLM.int8() does (arXiv 2208.07339, section 3).

    bitsandbytes rounds the weight to half precision first, and so does this function. The other part of
    LLM.int8(), which multiplies outlier columns of the activations in 16 bits, is not about weights.

    Args:
        matrix: Floating point, [out, in].

    Returns:
        int8 codes, [out, in], and float32 absmax, [out]: a weight is code * absmax / 127.

    Raises:
        KitError: Not a matrix.
    """
    import torch

    if matrix.dim() != 2:
        raise KitError(f"int8 has one scale a row, so it takes a matrix, not {matrix.dim()} dimensions")
    halves = matrix.detach().half()
    absmax = halves.abs().amax(dim=1).float()
    factors = 127.0 / absmax
    return torch.round(halves * factors[:, None]).nan_to_num(nan=0.0).to(torch.int8), absmax
