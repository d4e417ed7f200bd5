"""The values that a code stands for: NF4, FP4, INT4, E2M1, E3M0 and 8-bit dynamic."""

from __future__ import annotations

import functools
from statistics import NormalDist
from typing import TYPE_CHECKING

from ..errors import unknown
from ..system.arguments import TEXT, takes

if TYPE_CHECKING:
    import torch

# --- codebooks ----------------------------------------------------------------------------------------------

CODEBOOKS = ("nf4", "fp4", "int4", "e2m1", "e3m0")
"""Codebooks of sixteen levels, by name: three for training, and two 4-bit floats from the paper and the
standards."""


@takes(name=TEXT)
def codebook(name: str) -> torch.Tensor:
    """Return the sixteen levels that a 4-bit code stands for.

    Args:
        name: One of `CODEBOOKS`. `e2m1` and `e3m0` are for comparison only; no layer stores them.

    Returns:
        float32, shape [16], in the order of the codes (so not always sorted). The largest magnitude that is
        used is 1.

    Raises:
        KitError: For an unknown name.
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
    """Return NormalFloat4's levels: equally many normally distributed weights fall to each (QLoRA, section 3).

    Trained weights are close to normal with mean zero. A code used more often than another wastes bits, so
    the paper wants levels at quantiles of the standard normal. Its equation 4,

        q_i = (Q(i / (2^k + 1)) + Q((i + 1) / (2^k + 1))) / 2,

    with Q the inverse of the normal's distribution function, cannot be used as it stands: Q(0) and Q(1) are
    infinite, and the usable i = 1..15 give 15 levels for 16 codes. An even number of symmetric levels would have no
    exact zero, which padding and pruned weights need. The text below the equation gives symmetry up: it takes the
    quantiles of the negative and the positive half separately, one more of the positive half, and one zero.

    bitsandbytes' table, which everybody means by NF4, differs from the equation in three ways. It takes the
    quantiles themselves, at evenly spaced probabilities, not midpoints between neighbours. It gives the
    positive half eight levels and the negative half seven (they share the zero). And the outermost probability is

        1 - (1/30 + 1/32) / 2 = 0.9677083.

    This cuts off half a bin, the mean for 15 and for 16 levels, so that the outermost level is finite. Dividing by
    that level puts all levels in [-1, 1].

    To the last bit: the probabilities are spaced in float32 and 0.9677083 has seven digits.
    """
    import torch

    outermost = 0.9677083
    positive = torch.linspace(outermost, 0.5, 9, dtype=torch.float32)[:-1].tolist()
    negative = torch.linspace(outermost, 0.5, 8, dtype=torch.float32)[:-1].tolist()
    quantile = NormalDist().inv_cdf
    return sorted([-quantile(p) for p in negative] + [0.0] + [quantile(p) for p in positive])


def _fp4_levels() -> list[float]:
    """Return the levels of bitsandbytes' 4-bit float, bits `s e e m`: sign, two of exponent, one of mantissa.

    The exponent field counts down: 01 stands for 8, 10 for 4, 11 for 2, and the mantissa adds half of that,
    so the levels are 2, 3, 4, 6, 8, 12. Field 00 is the subnormal pair, 0 and 1/16. In a usual float (`e2m1`)
    that last level would be half the smallest normal one, 1, and fill the gap below 2. But 1/16 is so close to
    zero that its two codes (plus and minus) do little. Minus zero is a third code that does little.
    """
    magnitudes = [0.0, 2.0**-4]
    for exponent in (8.0, 4.0, 2.0):
        magnitudes += [exponent, exponent * 1.5]
    return magnitudes + [-m for m in magnitudes]


def _int4_levels() -> list[float]:
    """Return the integers -7 to 7, equally spaced and symmetric, so that 0 stays 0 and -w gets the negative level.

    Codes are k + 8. Fifteen of the sixteen are used. The sixteenth, code 0, would be -8. That is further out than
    the block's largest weight, so no weight is nearest to it. This is the price of symmetry: four bits then carry
    only log2(15) = 3.907.
    """
    return [float(k) for k in range(-8, 8)]


def _e2m1_levels() -> list[float]:
    """Return the 4-bit float of the OCP microscaling standard: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    return magnitudes + [-m for m in magnitudes]


def _e3m0_levels() -> list[float]:
    """Return the levels of a sign and three bits of exponent: 0, seven powers of two, and their negatives."""
    magnitudes = [0.0] + [2.0**k for k in range(7)]
    return magnitudes + [-m for m in magnitudes]


@functools.cache
def _decision(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the midpoints between neighbouring levels (float32, [15]), and the code of each of the 16 intervals."""
    import torch

    levels = codebook(name)
    order = torch.argsort(levels)  # not stable: which of fp4's two zeros comes first is torch's choice
    ascending = levels[order]
    return (ascending[:-1] + ascending[1:]) / 2, order.to(torch.uint8)


@functools.cache
def dynamic_codebook() -> torch.Tensor:
    """Return the levels of the signed 8-bit dynamic type, in which double quantization stores scales.

    A byte has a sign, a run of zeros that gives the power of ten to shrink by, a one, and then a linear fraction
    in [0.1, 1). There are seven decades, the largest with the finest steps (arXiv 2110.02861).

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
    """Return the code nearest to each of 65,536 evenly spaced values in [-1, 1]: uint8, [65536]."""
    import torch

    levels = dynamic_codebook().double()
    grid = torch.arange(65536, dtype=torch.float64) / 65535 * 2 - 1
    return torch.bucketize(grid, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
