"""What 4-bit quantization is: the spec that everything takes, and a reference that can be read.

`Quantization` names how the frozen base's linear layers are stored; `bitsandbytes_config` hands that to
transformers. The rest is the arithmetic behind it in plain torch, written to be read and to agree with
bitsandbytes' CPU code to the last bit: codebooks (`codebook`), blockwise absmax, double quantization and
packing (`quantize`), what it costs in bits (`bits_per_parameter`, `storage`) and in error
(`quantization_error`, `lloyd_max`).

Importing this module does not import torch.

Sources: QLoRA (Dettmers et al. 2023, arXiv 2305.14314), sections 2 and 3; 8-bit Optimizers via Block-wise
Quantization (arXiv 2110.02861) for blockwise absmax and the dynamic 8-bit type; LLM.int8() (arXiv
2208.07339).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import KitError, unknown

if TYPE_CHECKING:
    import torch
    import transformers

SCHEMES = ("none", "int8", "nf4", "fp4", "int4")
"""How a frozen linear layer can be stored: as it is, LLM.int8(), or one of three 4-bit codebooks."""

FOUR_BIT = ("nf4", "fp4", "int4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256
"""Double quantization's second level: this many block scales share one scale of their own."""


@dataclass(frozen=True)
class Quantization:
    """How the base's linear layers are stored while adapters are trained on them.

    Args:
        scheme: One of `SCHEMES`. `none` leaves them as they are; `int8` is LLM.int8(); `nf4` and `fp4` are
            bitsandbytes' 4-bit types; `int4` is this kit's own layer with the integers -7 to 7.
        double_quantization: Quantize the block scales once more (QLoRA, section 3). Means something for the
            4-bit schemes only and is ignored by the others, so that one override can change the scheme.
        block_size: Weights that share one scale; one of `BLOCK_SIZES`. Every 4-bit scheme can be measured at
            any of them; for training, nf4 and fp4 have 64 (transformers passes no other to bitsandbytes).
        embeddings: How the frozen embeddings are stored: `none` leaves them in the precision that is computed in
            (16 bits on a GPU); `nf4` and `fp4` take 4.5 bits a number, and a look-up dequantizes its rows.

    Raises:
        KitError: An unknown scheme or an impossible block size.
    """

    scheme: str = "nf4"
    double_quantization: bool = True
    block_size: int = 64
    embeddings: str = "none"

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise unknown("quantization scheme", self.scheme, SCHEMES)
        if self.embeddings not in ("none", "nf4", "fp4"):
            raise unknown("quantization of embeddings", self.embeddings, ("none", "nf4", "fp4"))
        if not isinstance(self.double_quantization, bool):
            raise KitError(f"double_quantization is true or false, not {self.double_quantization!r}")
        if isinstance(self.block_size, bool) or self.block_size not in BLOCK_SIZES:
            allowed = ", ".join(map(str, BLOCK_SIZES))
            raise KitError(f"there is no block size {self.block_size!r}. Allowed: {allowed}.")
        if not self.is_4bit and self.block_size != 64:
            raise KitError(
                f"scheme {self.scheme!r} has no blocks, so block_size={self.block_size} would do nothing; "
                f"block sizes belong to {', '.join(FOUR_BIT)}"
            )

    @property
    def is_4bit(self) -> bool:
        """Whether the weights are stored as 4-bit codes."""
        return self.scheme in FOUR_BIT

    @property
    def nested(self) -> bool:
        """Whether the block scales are themselves quantized: `double_quantization` where it applies."""
        return self.is_4bit and self.double_quantization

    @property
    def label(self) -> str:
        """A short name for tables and figures, e.g. `nf4` or `nf4, scales in fp32`."""
        rest = "" if self.embeddings == "none" else f", embeddings in {self.embeddings}"
        if not self.is_4bit:
            return self.scheme + rest
        block = "" if self.block_size == 64 else f", blocks of {self.block_size}"
        return self.scheme + ("" if self.double_quantization else ", scales in fp32") + block + rest


def bitsandbytes_config(
    spec: Quantization, compute_dtype: torch.dtype, skip_modules: Iterable[str]
) -> transformers.BitsAndBytesConfig | None:
    """Translate a spec into transformers' configuration of bitsandbytes.

    Args:
        spec: What is wanted.
        compute_dtype: The dtype that weights are dequantized to for the matrix products.
        skip_modules: Names of modules that stay as they are: every head (a fresh head turned into a 4-bit
            layer is trap number one).

    Returns:
        The configuration, or None for `none` and for `int4`: bitsandbytes has no 4-bit integers, and
        `BitsAndBytesConfig(bnb_4bit_quant_type="int4")` fails only once the first weight is loaded. For
        `int4` use `qlora_kit.int4.quantize_linears_`.

    Raises:
        KitError: A block size that bitsandbytes' layers cannot be given through transformers.
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


# --- codebooks ----------------------------------------------------------------------------------------------

CODEBOOKS = ("nf4", "fp4", "int4", "e2m1", "e3m0")
"""Sixteen levels by name: the three that train, and two 4-bit floats that the paper and the standards
have."""


def codebook(name: str) -> torch.Tensor:
    """Return the sixteen levels that a 4-bit code stands for.

    Args:
        name: One of `CODEBOOKS`. `e2m1` and `e3m0` are for comparison only; no layer stores them.

    Returns:
        float32, shape [16], in the order of the codes (so not always sorted), the largest magnitude that is
        used being 1.

    Raises:
        KitError: An unknown name.
    """
    makers = {
        "nf4": _nf4_levels,
        "fp4": _fp4_levels,
        "int4": _int4_levels,
        "e2m1": _e2m1_levels,
        "e3m0": _e3m0_levels,
    }
    if name not in makers:
        raise unknown("4-bit codebook", name, CODEBOOKS)
    import torch

    levels = torch.tensor(makers[name](), dtype=torch.float32)
    # code 0 of the symmetric integers (-8) is never used: see _int4_levels
    return levels / (7.0 if name == "int4" else levels.abs().max())


def _nf4_levels() -> list[float]:
    """NormalFloat4: levels that equally many normally distributed weights fall to (QLoRA, section 3).

    Trained weights are close to normal with mean zero. A code used more often than another wastes bits, so
    the paper wants levels at quantiles of the standard normal. Its equation 4,

        q_i = (Q(i / (2^k + 1)) + Q((i + 1) / (2^k + 1))) / 2,

    with Q the inverse of the normal's distribution function, cannot be used as it stands: Q(0) and Q(1) are
    infinite, and the usable i = 1..15 give 15 levels for 16 codes. An even number of symmetric levels would have no
    exact zero, which padding and pruned weights need. The text below the equation gives symmetry up: quantiles for
    the negative and the positive half separately, one more of these, and one zero.

    bitsandbytes' table, which everybody means by NF4, departs from the equation in three ways. It takes
    quantiles themselves, at evenly spaced probabilities, not midpoints between neighbours. It gives the
    positive half eight levels and the negative half seven (a zero shared). And the outermost probability is

        1 - (1/30 + 1/32) / 2 = 0.9677083,

    the mean of half a bin cut off at 15 and at 16 levels, so that the outermost level is finite. Dividing by
    it puts the levels in [-1, 1].

    To the last bit: the probabilities are spaced in float32 and 0.9677083 has seven digits.
    """
    import torch

    outermost = 0.9677083
    positive = torch.linspace(outermost, 0.5, 9, dtype=torch.float32)[:-1].tolist()
    negative = torch.linspace(outermost, 0.5, 8, dtype=torch.float32)[:-1].tolist()
    quantile = NormalDist().inv_cdf
    return sorted([-quantile(p) for p in negative] + [0.0] + [quantile(p) for p in positive])


def _fp4_levels() -> list[float]:
    """The 4-bit float of bitsandbytes, from its bits `s e e m`: sign, two bits of exponent, one of mantissa.

    The exponent field counts down: 01 stands for 8, 10 for 4, 11 for 2, and the mantissa adds half of that,
    so the levels are 2, 3, 4, 6, 8, 12. Field 00 is the subnormal pair, 0 and 1/16. In a float of the usual
    kind that last level would be half the smallest normal one, 1, and fill the gap below 2 (`e2m1`); 1/16
    lies so close to zero that its two codes (plus and minus) do little, and minus zero is a third.
    """
    magnitudes = [0.0, 2.0**-4]
    for exponent in (8.0, 4.0, 2.0):
        magnitudes += [exponent, exponent * 1.5]
    return magnitudes + [-m for m in magnitudes]


def _int4_levels() -> list[float]:
    """The integers -7 to 7, equally spaced and symmetric, so that 0 stays 0 and -w has the code of -w.

    Codes are k + 8. Fifteen of the sixteen are used: the sixteenth, code 0, would be -8, which is further out
    than the block's largest weight and so nearest to nothing. It is the price of symmetry; four bits then
    carry log2(15) = 3.907.
    """
    return [float(k) for k in range(-8, 8)]


def _e2m1_levels() -> list[float]:
    """The 4-bit float of the OCP microscaling standard: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    return magnitudes + [-m for m in magnitudes]


def _e3m0_levels() -> list[float]:
    """A sign and three bits of exponent: 0 and seven powers of two, and their negatives."""
    magnitudes = [0.0] + [2.0**k for k in range(7)]
    return magnitudes + [-m for m in magnitudes]


@functools.cache
def _decision(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Midpoints between neighbouring levels (float32, [15]), and the code of each of the 16 intervals."""
    import torch

    levels = codebook(name)
    order = torch.argsort(levels)  # not stable: which of fp4's two zeros comes first is torch's choice
    ascending = levels[order]
    return (ascending[:-1] + ascending[1:]) / 2, order.to(torch.uint8)


@functools.cache
def dynamic_codebook() -> torch.Tensor:
    """The signed 8-bit dynamic type that double quantization stores scales in (arXiv 2110.02861).

    A byte is a sign, a run of zeros that says by which power of ten to shrink, a one, and the rest is a
    linear fraction in [0.1, 1): seven decades, the largest with the finest steps.

    Returns:
        float32, shape [256], ascending, from -0.993 to 1.
    """
    import torch

    levels = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        fractions = (10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        levels += fractions + [-fraction for fraction in fractions]
    return torch.tensor(sorted(levels), dtype=torch.float32)


@functools.cache
def _dynamic_table() -> torch.Tensor:
    """The code nearest to each of 65,536 evenly spaced values in [-1, 1]: uint8, [65536]."""
    import torch

    levels = dynamic_codebook().double()
    grid = torch.arange(65536, dtype=torch.float64) / 65535 * 2 - 1
    return torch.bucketize(grid, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)


# --- quantize -----------------------------------------------------------------------------------------------

_SMALLEST_SCALE = 1e-38
"""Blocks whose largest weight is below this become zeros, as in bitsandbytes: its reciprocal would
overflow."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor stored in 4 bits.

    Attributes:
        spec: How.
        shape: The original's shape.
        dtype: The original's dtype.
        packed: The codes, uint8, [ceil(n / 2)]: two a byte, the first in the upper half.
        absmax: One scale a block, float32, [blocks]; with double quantization their 8-bit codes, uint8.
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
            dtype: Of the result; the original's by default. The product is taken in float32 and rounded once.
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


def quantize(tensor: torch.Tensor, spec: Quantization, *, levels: str | None = None) -> Quantized:
    """Store a tensor in 4 bits: scale each block by its largest magnitude, keep the nearest level's code.

    Agrees with bitsandbytes' CPU code for nf4 and fp4 to the last bit, which takes its roundings too: whole
    blocks are multiplied by 1 / absmax while a last, shorter block is divided by it, and a value exactly
    between two levels goes to the lower one.

    Args:
        tensor: Floating point, any shape; flattened row by row, blocks may span rows.
        spec: A 4-bit scheme.
        levels: Use this one of `CODEBOOKS` instead of the scheme's own (for comparisons).

    Returns:
        The codes and what is needed to undo them.

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
        offset: The mean that was taken off before the scales were quantized, float32, [], or None.

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
    """The largest magnitude in each block, the last block being shorter where the size does not divide."""
    import torch

    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % block_size))
    return padded.abs().reshape(-1, block_size).amax(dim=1)


def _times_blocks(flat: torch.Tensor, factors: torch.Tensor, block_size: int) -> torch.Tensor:
    """Multiply each block of a flat tensor by its factor, the last block being shorter maybe."""
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

    bitsandbytes looks the code up in a table of 65,536 entries rather than searching the levels, so a value
    close to the middle between two of them can get the further one. So does this.

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


def roundtrip(tensor: torch.Tensor, spec: Quantization, *, levels: str | None = None) -> torch.Tensor:
    """Quantize and dequantize: the weights that a layer of this scheme multiplies with.

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
    """Store a weight in 8 bits with one scale a row, as LLM.int8() does (arXiv 2208.07339, section 3).

    bitsandbytes rounds the weight to half precision first, and so does this. The other half of LLM.int8(),
    outlier columns of the activations multiplied in 16 bits, is not about weights.

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


def bits_per_parameter(
    spec: Quantization, *, in_features: int | None = None, dtype: torch.dtype | None = None
) -> float:
    """Compute the bits that a scheme stores for each weight of a linear layer (QLoRA, section 3).

    4 bits of code and 32 / 64 of scale make 4.5; with double quantization the scale takes 8 / 64, and its own
    scale 32 / (64 * 256): 4.127.

    Args:
        spec: The scheme.
        in_features: Length of a row, whose scale `int8` stores; without it the scale is left out.
        dtype: What `none` stores; float32 by default.

    Returns:
        Bits a weight. Layers whose size does not divide into blocks take a little more.
    """
    if spec.scheme == "none":
        return 32.0 if dtype is None else 8.0 * dtype.itemsize
    if spec.scheme == "int8":
        return 8.0 if in_features is None else 8.0 + 32.0 / in_features
    if not spec.double_quantization:
        return 4.0 + 32.0 / spec.block_size
    return 4.0 + 8.0 / spec.block_size + 32.0 / (spec.block_size * NESTED_BLOCK_SIZE)


@dataclass(frozen=True)
class Storage:
    """What a model's weights take, measured on its tensors.

    Attributes:
        linear_parameters: Weights of the linear layers that are counted (biases not).
        linear_bytes: Bytes that store them, scales included, constant tables not.
        table_bytes: Bytes of codebooks that bitsandbytes keeps a copy of in each layer.
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
        """Bits a weight of the linear layers."""
        return 8 * self.linear_bytes / self.linear_parameters

    @property
    def whole_bits_per_parameter(self) -> float:
        """Bits a weight of the whole model: what embeddings, norms and biases add."""
        return 8 * self.bytes / self.parameters


def storage(model: torch.nn.Module, skip_modules: Iterable[str] = ()) -> Storage:
    """Measure what a model's weights take, from the tensors that are really there.

    Args:
        model: A base without adapters, in any scheme. What counts as its linear layers is the quantized ones,
            or all of them where none is quantized.
        skip_modules: Names of linear layers not to count as such: the head.

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


class LinearStorage(NamedTuple):
    """What one linear layer's weight takes.

    Attributes:
        quantized: Whether it is stored in 4 or 8 bits.
        parameters: How many weights it stands for.
        bytes: What stores them, scales included.
        table_bytes: The codebooks that bitsandbytes keeps a copy of in every layer.
    """

    quantized: bool
    parameters: int
    bytes: int
    table_bytes: int


def linear_storage(module: Any) -> LinearStorage | None:
    """Measure a linear layer of any kind that the kit stores; None for any other module.

    Args:
        module: `nn.Linear`, GPT-2's `Conv1D`, bitsandbytes' `Linear4bit` and `Linear8bitLt`, or `Int4Linear`.
    """
    import torch

    def size(*tensors: torch.Tensor | None) -> int:
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    kind = type(module).__name__
    if kind == "Int4Linear":
        stored = size(module.weight, module.absmax, module.nested_absmax, module.offset)
        return LinearStorage(True, module.in_features * module.out_features, stored, 0)
    if kind == "Linear4bit" and getattr(module.weight, "quant_state", None) is not None:
        state = module.weight.quant_state
        stored, tables = size(module.weight, state.absmax), size(state.code)
        if state.nested:
            stored += size(state.state2.absmax, state.offset)
            tables += size(state.state2.code)
        return LinearStorage(True, state.shape.numel(), stored, tables)
    if kind == "Linear8bitLt":
        scales = getattr(module.weight, "SCB", None)
        stored = size(module.weight, module.state.SCB if scales is None else scales)
        return LinearStorage(True, module.weight.numel(), stored, 0)
    if isinstance(module, torch.nn.Linear) or kind == "Conv1D":
        return LinearStorage(False, module.weight.numel(), size(module.weight), 0)
    return None


def quantization_error(original: torch.Tensor, restored: torch.Tensor) -> dict[str, float]:
    """Measure how far the restored weights are from the original ones.

    Args:
        original: Any shape.
        restored: The same shape.

    Returns:
        `mse`, the mean squared error; `max`, the largest error; `snr_db`, 10 log10 of the mean square of the
        original over the mse (infinite where nothing is lost). Accumulated in float64.
    """
    exact = original.double()
    difference = exact - restored.double()
    mse = difference.square().mean().item()
    power = exact.square().mean().item()
    return {
        "mse": mse,
        "max": difference.abs().max().item(),
        "snr_db": 10 * math.log10(power / mse) if mse and power else math.inf,
    }


@functools.cache
def lloyd_max(levels: int = 16) -> tuple[tuple[float, ...], float]:
    """Return the best fixed levels for standard normal values, and the error they leave.

    No set of this many levels has a smaller mean squared error (Lloyd 1957, Max 1960). Each level is the mean
    of the values nearest to it, and each border lies midway between two levels; repeating the two steps
    converges.

    Args:
        levels: How many; even.

    Returns:
        The levels, ascending, and the mean squared error for unit variance: 0.0095 for 16 (20.22 dB).

    Raises:
        KitError: Fewer than two, or an odd number.
    """
    if levels < 2 or levels % 2:
        raise KitError(f"lloyd_max takes an even number of levels, not {levels}")
    normal = NormalDist()
    # many levels are best spread like a normal of three times the variance (Panter and Dite 1951): start there
    half = [math.sqrt(3) * normal.inv_cdf(0.5 + (2 * k + 1) / (2 * levels)) for k in range(levels // 2)]
    for _ in range(100_000):
        borders = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(half)), math.inf]
        masses = [normal.cdf(b) - normal.cdf(a) for a, b in itertools.pairwise(borders)]
        densities = [0.0 if math.isinf(b) else normal.pdf(b) for b in borders]
        better = [(densities[k] - densities[k + 1]) / masses[k] for k in range(len(half))]
        if max(abs(a - b) for a, b in zip(half, better, strict=True)) < 1e-7:
            break
        half = better
    # with each level the mean of its cell, the error is the variance less the levels' own mean square
    mse = 1.0 - 2 * sum(mass * level**2 for mass, level in zip(masses, better, strict=True))
    return tuple([-level for level in reversed(better)] + better), mse


# --- what it does to a model --------------------------------------------------------------------------------


def quantize_weights_(
    model: torch.nn.Module, spec: Quantization, skip_modules: Iterable[str] = (), *, levels: str | None = None
) -> torch.nn.Module:
    """Replace the weights of a model's linear layers by what quantization leaves of them, in place.

    The layers stay plain ones, so any scheme and codebook can be tried at full speed; they multiply with the
    same weights as the quantized layers would.

    Args:
        model: In floating point. GPT-2's `Conv1D` is quantized along its rows of [out, in], as for training.
        spec: The scheme.
        skip_modules: Names of modules to leave alone, with all below them.
        levels: Another codebook for a 4-bit scheme (see `quantize`).

    Returns:
        The same model. A weight shared with an embedding stays as it is.
    """
    import torch

    skipped = [f".{name}." for name in skip_modules]
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for name, module in model.named_modules():
        transposed = type(module).__name__ == "Conv1D"
        if not (transposed or isinstance(module, torch.nn.Linear)) or id(module.weight) in embedded:
            continue
        if any(skip in f".{name}." for skip in skipped):
            continue
        weight: torch.Tensor = module.weight.data
        restored = roundtrip(weight.T if transposed else weight, spec, levels=levels)
        module.weight.data = restored.T.contiguous() if transposed else restored
    return model


def window_losses(model: Any, token_ids: torch.Tensor, *, window: int = 256, batch_size: int = 8) -> torch.Tensor:
    """Measure how badly a language model predicts a text, window by window.

    Args:
        model: A causal language model of transformers, which is put into eval mode.
        token_ids: The text, int64, [tokens]; a last, shorter window is left out.
        window: Tokens that are read together; the first of each is not predicted.
        batch_size: Windows at once.

    Returns:
        The mean negative log-likelihood of a token in each window, in nats: float64, [windows]. Perplexity is
        the exponential of their mean.

    Raises:
        KitError: The text is shorter than one window.
    """
    import torch

    windows = token_ids[: token_ids.numel() // window * window].reshape(-1, window)
    if not len(windows):
        raise KitError(f"the text has {token_ids.numel()} tokens, fewer than one window of {window}")
    model.eval()
    losses = []
    with torch.inference_mode():
        for batch in windows.split(batch_size):
            batch = batch.to(model.device)
            logits = model(input_ids=batch).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            losses.append(loss.double().view(len(batch), -1).mean(dim=1).cpu())
    return torch.cat(losses)


def perplexity(
    losses: torch.Tensor, baseline: torch.Tensor | None = None, *, resamples: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Turn window losses into a perplexity, or into how many times a baseline's it is, with a 95% interval.

    Args:
        losses: From `window_losses`, [windows].
        baseline: The same windows under another model: the result is then the ratio of perplexities, and the
            interval is paired, so that how hard each window is drops out.
        resamples: Bootstrap samples of windows.
        seed: Of the bootstrap.

    Returns:
        `value`, `low` and `high`: percentile bootstrap over windows.
    """
    import torch

    values = losses if baseline is None else losses - baseline
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = values[picks].mean(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).exp().tolist()
    return {"value": values.mean().exp().item(), "low": low, "high": high}


def ratio_in_words(ratio: Mapping[str, float]) -> str:
    """Say what a ratio of perplexities shows of its first model against the other: lower is better.

    Args:
        ratio: `value`, `low` and `high`, from `perplexity` with a baseline.

    Returns:
        By how much it is ahead or behind, or that the two cannot be told apart: the interval has 1 in it.
    """
    if ratio["low"] <= 1 <= ratio["high"]:
        return "not told apart"
    return f"{'ahead' if ratio['value'] < 1 else 'behind'} by {abs(1 - ratio['value']):.1%}"
