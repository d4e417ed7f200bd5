"""What 4-bit quantization is: the spec that everything takes.

`Quantization` names how the frozen base's linear layers are stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

    Raises:
        KitError: An unknown scheme or an impossible block size.
    """

    scheme: str = "nf4"
    double_quantization: bool = True
    block_size: int = 64

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise unknown("quantization scheme", self.scheme, SCHEMES)
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
        if not self.is_4bit:
            return self.scheme
        block = "" if self.block_size == 64 else f", blocks of {self.block_size}"
        return self.scheme + ("" if self.double_quantization else ", scales in fp32") + block


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
        `BitsAndBytesConfig(bnb_4bit_quant_type="int4")` fails only once the first weight is loaded. For `int4`
        use `qlora_kit.int4.quantize_linears_`.

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
                "bitsandbytes' layers with blocks of 64. Use block_size=64, or scheme='int4', which takes any."
            )
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": spec.scheme,
            "bnb_4bit_use_double_quant": spec.double_quantization,
            "bnb_4bit_compute_dtype": compute_dtype,
            "llm_int8_skip_modules": skip,
        }
    return transformers.BitsAndBytesConfig(**options)
