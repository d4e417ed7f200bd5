"""How frozen weights are stored: the fields and their allowed combinations."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import KitError, described, unknown


@dataclass(frozen=True)
class Scheme:
    """A way to store a weight.

    Args:
        bits: Bits of one code; 0 if the weights are not quantized.
        blocks: Whether blocks of weights share a scale, so that double quantization is possible.
    """

    bits: int = 0
    blocks: bool = False


SCHEMES = {
    "none": Scheme(),
    "int8": Scheme(8),
    "nf4": Scheme(4, blocks=True),
    "fp4": Scheme(4, blocks=True),
    "int4": Scheme(4, blocks=True),
}
"""Ways to store a frozen linear layer: unchanged, LLM.int8(), or one of three 4-bit codebooks. Backends can register
more (`quantization.backend.register`)."""

FOUR_BIT = ("nf4", "fp4", "int4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256
"""Double quantization's second level: this many block scales share one second-level scale."""


@dataclass(frozen=True)
class Quantization:
    """How the base's linear layers are stored while adapters are trained on them.

    Args:
        scheme: One of `SCHEMES`. `none` leaves them as they are; `int8` is LLM.int8(); `nf4` and `fp4` are
            bitsandbytes' 4-bit types; `int4` is this kit's own layer with the integers -7 to 7.
        double_quantization: Quantize the block scales too (QLoRA, section 3). Only the 4-bit schemes use it; the
            others ignore it, so that a single override can change the scheme.
        block_size: Weights that share one scale; one of `BLOCK_SIZES`. Every 4-bit scheme can be measured at
            any of them; in training, nf4 and fp4 need 64 (transformers passes no other size to bitsandbytes).
        embeddings: How the frozen embeddings are stored: `none` keeps them in the compute precision (16 bits on a
            GPU); `nf4` and `fp4` take 4.5 bits a number, and a look-up dequantizes its rows.

    Raises:
        KitError: For an unknown scheme or a block size that is not allowed.
    """

    scheme: str = "nf4"
    double_quantization: bool = True
    block_size: int = 64
    embeddings: str = "none"

    def __post_init__(self) -> None:
        for what, value, kinds in (
            ("quantization scheme", self.scheme, SCHEMES),
            ("quantization of embeddings", self.embeddings, ("none", "nf4", "fp4")),
        ):
            if not isinstance(value, str) or value not in kinds:
                raise unknown(what, value if isinstance(value, str) else described(value), kinds)
        if not isinstance(self.double_quantization, bool):
            raise KitError(f"double_quantization is true or false, not {described(self.double_quantization)}")
        size = self.block_size
        if isinstance(size, bool) or not isinstance(size, int | float) or size not in BLOCK_SIZES:
            allowed = ", ".join(map(str, BLOCK_SIZES))
            raise KitError(f"there is no block size {described(self.block_size)}. Allowed: {allowed}.")
        object.__setattr__(self, "block_size", int(self.block_size))  # 64.0 is accepted too
        if not self.has_blocks and self.block_size != 64:
            with_blocks = [name for name, scheme in SCHEMES.items() if scheme.blocks]
            raise KitError(
                f"scheme {self.scheme!r} has no blocks, so block_size={self.block_size} would do nothing; "
                f"block sizes belong to {', '.join(with_blocks)}"
            )

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are quantized."""
        return SCHEMES[self.scheme].bits > 0

    @property
    def is_4bit(self) -> bool:
        """Whether the weights are stored as 4-bit codes."""
        return SCHEMES[self.scheme].bits == 4

    @property
    def has_blocks(self) -> bool:
        """Whether blocks of weights share a scale."""
        return SCHEMES[self.scheme].blocks

    @property
    def nested(self) -> bool:
        """Whether the block scales are quantized too: `double_quantization` if the scheme has blocks."""
        return self.has_blocks and self.double_quantization

    @property
    def label(self) -> str:
        """A short name for tables and figures, e.g. `nf4` or `nf4, scales in fp32`."""
        rest = "" if self.embeddings == "none" else f", embeddings in {self.embeddings}"
        if not self.has_blocks:
            return self.scheme + rest
        block = "" if self.block_size == 64 else f", blocks of {self.block_size}"
        return self.scheme + ("" if self.double_quantization else ", scales in fp32") + block + rest
