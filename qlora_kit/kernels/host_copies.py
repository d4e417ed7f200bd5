"""Tensors that a model makes on the host in every step, copied to the device once for its CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# The tensors that some work copied from the host: each on the host, and its copy on the device.
Copies = list[tuple[torch.Tensor, torch.Tensor]]


class _HostFirst(TorchFunctionMode):
    """Makes `torch.tensor(values, device=cuda)` on the host, then moves it: no mode sees the move that torch makes."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func not in (torch.tensor, torch.as_tensor, torch.asarray) or device is None:
            return func(*args, **kwargs)
        if torch.device(device).type != self.device.type or isinstance(args[0] if args else None, torch.Tensor):
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "device": "cpu"}).to(device)


class HostCopies(TorchDispatchMode):
    """Makes it possible to capture work that makes a tensor on the host and moves it to the device.

    A graph cannot copy from the host's ordinary memory. But captured work depends on its inputs' shapes alone, and so
    does such a tensor (MPNet's relative positions, in transformers before 5.23). So the capture uses the copies of the
    first pass.

    Args:
        device: Where tensors are moved to.
        made: The copies that an earlier pass of the same work recorded, used in their order; None to record them.

    Attributes:
        noted: The recorded copies.
    """

    def __init__(self, device: torch.device, made: Copies | None = None) -> None:
        super().__init__()
        self.device = device
        self.noted: Copies = []
        self._made = None if made is None else iter(made)
        self._first = _HostFirst(device)

    def __enter__(self) -> Any:
        """Begin; a tensor made of numbers on the device is now made on the host and moved, so that the move is seen."""
        self._first.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """End."""
        super().__exit__(*error)
        self._first.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; record a copy from the host, or use the recorded one."""
        kwargs = kwargs or {}
        host = self._moved(func, args, kwargs)
        if host is None:
            return func(*args, **kwargs)
        if self._made is None:
            result = func(*args, **kwargs)
            self.noted.append((host.clone(), result.clone()))  # clones: either may be changed in place
            return result
        before, on_device = next(self._made, (None, None))
        if before is None or on_device is None or before.dtype != host.dtype or not torch.equal(before, host):
            # Not the same tensor as in the first pass: the capture fails with an error.
            return func(*args, **kwargs)
        return args[0].copy_(on_device) if func is aten.copy_.default else on_device.clone()

    def _moved(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
        """Return the host's tensor that an operation moves to the device, or None."""
        if func is aten.copy_.default:
            target, host = args[0], args[1]
            return host if host.device.type == "cpu" and target.device.type == self.device.type else None
        # In inference mode `to` itself arrives here, not `_to_copy`.
        if func.overloadpacket not in (aten._to_copy, aten.to) or args[0].device.type != "cpu":
            return None
        targets = [kwargs.get("device"), *(value for value in args if isinstance(value, torch.device))]
        moves = any(target is not None and torch.device(target).type == self.device.type for target in targets)
        host = args[0]
        return host if moves else None
