"""Precision: what an experiment computes in on a device, and autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..config.experiment import Experiment
from ..quantization.backend import backend_of
from ..system.arguments import EXPERIMENT, takes
from ..system.devices import COMPUTE_DTYPES, resolve_precision


@takes(experiment=EXPERIMENT)
def precision_of(experiment: Experiment, device: torch.device) -> str:
    """Return the precision that an experiment computes in on a device.

    Args:
        experiment: Its `training.precision` is the wanted precision.
        device: Where it runs.

    Returns:
        As `resolve_precision`, but always `fp32` for 8-bit layers on a CPU: bitsandbytes has no bf16 product for them
        there, and casting would only cost time.
    """
    scheme = experiment.quantization.scheme
    own = backend_of(scheme).precision(scheme, device)
    return own or resolve_precision(experiment.training.precision, device)


@contextlib.contextmanager
def computing(device: torch.device, precision: str) -> Iterator[None]:
    """Run a block's matrix products in `precision` (autocast), outside of the Trainer."""
    if precision == "fp32":
        yield
    else:
        # No cache on CUDA: a graph would read casts that autocast had cached, and they are gone when it is replayed.
        with torch.autocast(device.type, dtype=COMPUTE_DTYPES[precision], cache_enabled=device.type != "cuda"):
            yield
