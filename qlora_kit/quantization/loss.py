"""What quantization costs: error of weights, the best levels, perplexity of a language model."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from ..config.quantization import Quantization
from ..errors import KitError
from ..system.arguments import COUNT, TENSOR, takes
from .reference import roundtrip

if TYPE_CHECKING:
    import torch


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


@takes(levels=COUNT)
@functools.cache
def lloyd_max(levels: int = 16) -> tuple[tuple[float, ...], float]:
    """Return the best fixed levels for standard normal values, and their error.

    No set of this many levels has a smaller mean squared error (Lloyd 1957, Max 1960). Each level is the mean
    of the values nearest to it, and each border lies midway between two levels; repeating the two steps
    converges.

    Args:
        levels: How many; even.

    Returns:
        The levels, ascending, and the mean squared error for unit variance: 0.0095 for 16 (20.22 dB).

    Raises:
        KitError: For fewer than two levels, or an odd number.
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
    # each level is the mean of its cell, so the error is the variance minus the levels' own mean square
    mse = 1.0 - 2 * sum(mass * level**2 for mass, level in zip(masses, better, strict=True))
    return tuple([-level for level in reversed(better)] + better), mse


# --- what it does to a model --------------------------------------------------------------------------------


def quantize_weights_(
    model: torch.nn.Module, spec: Quantization, skip_modules: Iterable[str] = (), *, levels: str | None = None
) -> torch.nn.Module:
    """Quantize the weights of a model's linear layers and dequantize them again, in place.

    The layers stay plain ones, so any scheme and codebook can be tried at full speed; they multiply with the
    same weights as the quantized layers would.

    Args:
        model: In floating point. GPT-2's `Conv1D` is quantized along the rows of [out, in], as for training.
        spec: The scheme.
        skip_modules: Names of modules to skip, with all modules inside them.
        levels: Another codebook for a 4-bit scheme (see `quantize`).

    Returns:
        The same model. What `layers.quantizable` leaves out, such as a weight shared with an embedding, stays as it
        is.
    """
    from transformers.pytorch_utils import Conv1D

    from .layers import quantizable

    for name in quantizable(model, skip_modules):
        module: Any = model.get_submodule(name)
        transposed = isinstance(module, Conv1D)
        weight: torch.Tensor = module.weight.data
        restored = roundtrip(weight.T if transposed else weight, spec, levels=levels)
        module.weight.data = restored.T.contiguous() if transposed else restored
    return model


def window_losses(model: Any, token_ids: torch.Tensor, *, window: int = 256, batch_size: int = 8) -> torch.Tensor:
    """Measure how badly a language model predicts a text, window by window.

    Args:
        model: A causal language model of transformers, which is put into eval mode.
        token_ids: The text, int64, [tokens]; a last, shorter window is left out.
        window: Tokens that are read together; the first token of each window is not predicted.
        batch_size: Windows per forward pass.

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


@takes(losses=TENSOR, baseline=TENSOR, resamples=COUNT)
def perplexity(
    losses: torch.Tensor, baseline: torch.Tensor | None = None, *, resamples: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Compute the perplexity from window losses, or its ratio to a baseline's, with a 95% interval.

    Args:
        losses: From `window_losses`, [windows].
        baseline: Losses of another model on the same windows. The result is then the ratio of perplexities, and
            the interval is paired, so that the difficulty of each window cancels out.
        resamples: Bootstrap samples of windows.
        seed: Seed of the bootstrap.

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
    """Say whether a ratio of perplexities puts its first model ahead of the other: lower is better.

    Args:
        ratio: `value`, `low` and `high`, from `perplexity` with a baseline.

    Returns:
        How far it is ahead or behind, or that the two cannot be told apart, because the interval contains 1.
    """
    if ratio["low"] <= 1 <= ratio["high"]:
        return "not told apart"
    return f"{'ahead' if ratio['value'] < 1 else 'behind'} by {abs(1 - ratio['value']):.1%}"
