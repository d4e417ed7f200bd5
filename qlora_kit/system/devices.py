"""Devices and precisions: the machine's GPU or CPU, a run's precision, and its peak memory."""

from __future__ import annotations

import contextlib
import logging
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from ..errors import KitError

logger = logging.getLogger(__name__)

COMPUTE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# --- device and precision ---------------------------------------------------------------------------------------


def cuda_available() -> bool:
    """Return whether there is a CUDA GPU."""
    return torch.cuda.is_available()


def default_device() -> torch.device:
    """Return the device that runs use: the current CUDA GPU, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if cuda_available() else torch.device("cpu")


def bf16_in_hardware(capability: tuple[int, int]) -> bool:
    """Return whether a GPU of this compute capability multiplies bf16 in hardware.

    `torch.cuda.is_bf16_supported()` is also True on a T4 (7.5), where bf16 is emulated and slow.

    Args:
        capability: Major and minor, as `torch.cuda.get_device_capability` returns them.
    """
    return capability >= (8, 0)


def cpu_has_bf16() -> bool:
    """Return whether this machine's CPU multiplies bf16 in hardware (AVX512-BF16 or AMX)."""
    # Older versions of torch lack get_capabilities.
    able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return the precision a run computes in: `fp32`, `fp16` or `bf16`.

    Args:
        precision: The requested precision; `auto` chooses by the device.
        device: The run's device.

    Returns:
        The precision. A CPU with bf16 in hardware uses it for `auto` and `bf16`: it is faster than fp32. In all other
        cases a CPU computes in fp32 (with a warning if `fp16` or `bf16` was requested): without such instructions, 16
        bits take many times as long.

    Raises:
        KitError: For bf16 on a GPU that only emulates it.
    """
    if device.type == "meta":
        # A memory plan: its caller has already resolved the precision for the planned device.
        return "fp32" if precision == "auto" else precision
    if device.type != "cuda":
        able = cpu_has_bf16()
        if precision in ("auto", "fp32"):
            return "bf16" if able and precision == "auto" else "fp32"
        if precision == "bf16" and able:
            return "bf16"
        logger.warning("This CPU does not compute in %s; this run computes in fp32.", precision)
        return "fp32"
    hardware = bf16_in_hardware(torch.cuda.get_device_capability(device))
    if precision == "auto":
        return "bf16" if hardware else "fp16"
    if precision == "bf16" and not hardware:
        raise KitError(
            f"{torch.cuda.get_device_name(device)} has no bf16 in hardware (compute capability 8.0 and up has); "
            "use training.precision: fp16 or auto"
        )
    return precision


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and messages in a block; errors are still shown."""
    level = transformers.utils.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
            yield
    finally:
        transformers.utils.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


@contextlib.contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Restore, after a block, the random generators that `transformers.set_seed` seeds.

    Args:
        device: Only this GPU's generator is restored; touching another would create a context on it.
    """
    python, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpys)


def wait() -> None:
    """Wait until the GPU, if there is one, has finished; call it before reading a clock."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> dict[str, Any]:
    """Return this process's peak memory so far.

    Returns:
        `peak_bytes` and `reserved_bytes`: on CUDA the allocator's `max_memory_allocated` and
        `max_memory_reserved`; without a GPU the process's largest resident set (Python and libraries included)
        for both. `measure` says which.
    """
    if torch.cuda.is_available():
        return {
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "measure": "CUDA allocator",
        }
    peak = _most_resident()
    return {"peak_bytes": peak, "reserved_bytes": peak, "measure": "resident set of the process"}


def _most_resident() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    with contextlib.suppress(OSError, StopIteration):
        # Linux's own count. `getrusage` also includes the parent process's peak if that was larger.
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    import resource

    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def trainers_device(device: torch.device) -> torch.device:
    """Return a device if the Trainer would train on it, else refuse it.

    transformers' `TrainingArguments` always make the first GPU the current one (training_args.py, `_setup_devices`). A
    model on another GPU would be trained across two.

    Args:
        device: The device for a run.

    Raises:
        KitError: When it is a GPU other than the first.
    """
    if device.index:
        raise KitError(
            f"the current GPU is {device}, and transformers' Trainer takes the first that it sees: instead of "
            "torch.cuda.set_device, start Python with CUDA_VISIBLE_DEVICES set to the GPU that is meant"
        )
    return device
