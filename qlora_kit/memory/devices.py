"""Devices that memory is planned for, and how much memory each has."""

from __future__ import annotations

import dataclasses
import os

import torch

from ..errors import unknown
from ..system.arguments import TEXT, takes
from ..system.devices import bf16_in_hardware

MIB = 1024**2
CONTEXT = 450 * MIB


@dataclasses.dataclass(frozen=True)
class Device:
    """What a plan needs to know of a GPU, or of the CPU.

    Args:
        name: Its name.
        bytes: Memory that a process can allocate on it (what `torch.cuda.mem_get_info` shows on an empty one, less
            the CUDA context); 0 for the CPU, whose memory depends on the machine.
        capability: Compute capability.
    """

    name: str
    bytes: int
    capability: tuple[int, int]

    @property
    def kind(self) -> str:
        """`cpu` or `cuda`."""
        return "cuda" if self.bytes else "cpu"

    @property
    def precision(self) -> str:
        """The precision that `auto` means on this device."""
        if self.kind == "cpu":
            return "fp32"
        return "bf16" if bf16_in_hardware(self.capability) else "fp16"

    @property
    def cublas(self) -> int:
        """Bytes that cuBLAS takes through torch's allocator.

        One workspace for the thread that runs the forward pass and one for autograd's: 32 MiB each on Hopper,
        8.125 on other GPUs, unless `CUBLAS_WORKSPACE_CONFIG` says otherwise (aten/src/ATen/cuda/CublasHandlePool.cpp).
        """
        if self.kind == "cpu":
            return 0
        chosen = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")
        sizes = [int(text) for text in chosen.split(":") if text.isdigit()]
        if len(sizes) >= 2:
            each = sum(size * count for size, count in zip(sizes[::2], sizes[1::2], strict=False)) * 1024
        else:
            each = 32 * MIB if self.capability[0] == 9 else 8 * MIB + 128 * 1024
        return 2 * each


DEVICES = {
    # Memory as torch.cuda.get_device_properties shows it on each.
    "T4": Device("T4", 15_095 * MIB - CONTEXT, (7, 5)),
    "L4": Device("L4", 22_563 * MIB - CONTEXT, (8, 9)),
    "3090": Device("3090", 24_124 * MIB - CONTEXT, (8, 6)),
    "4090": Device("4090", 24_081 * MIB - CONTEXT, (8, 9)),
    "A100-40": Device("A100-40", 40_326 * MIB - CONTEXT, (8, 0)),
    "A100-80": Device("A100-80", 81_038 * MIB - CONTEXT, (8, 0)),
    "H100": Device("H100", 81_008 * MIB - CONTEXT, (9, 0)),
    "cpu": Device("cpu", 0, (0, 0)),
}
"""Devices by name. `CONTEXT` is the memory that CUDA itself takes on each GPU: kernels, handles, stacks."""


@takes(device=TEXT)
def find_device(device: str | None = None) -> Device:
    """Return a device by name.

    Args:
        device: A name of `DEVICES`, or None for this machine's: its first GPU, or the CPU.

    Raises:
        KitError: For an unknown name.
    """
    if device is None or (device == "cuda" and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            return DEVICES["cpu"]
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, properties.total_memory - CONTEXT, (properties.major, properties.minor))
    names = {name.lower(): found for name, found in DEVICES.items()}
    if device.lower() not in names:
        raise unknown("device", device, DEVICES)
    return names[device.lower()]
