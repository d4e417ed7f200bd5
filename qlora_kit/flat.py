"""Tensors side by side in one: what is done to all of them is done at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw

ALIGNMENT = 128  # bytes, for the kernels that read a part alone


def side_by_side(like: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Make one tensor with a place for each of several.

    Args:
        like: Tensors of any shapes, on one device.
        dtype: Of the tensor that is made.

    Returns:
        The tensor, one-dimensional and not filled, and its parts: views with the shapes and strides of `like`.
    """
    step = ALIGNMENT // dtype.itemsize
    places = [0, *itertools.accumulate(-(-tensor.numel() // step) * step for tensor in like)]
    flat = torch.empty(places[-1], dtype=dtype, device=like[0].device)
    parts = [flat.as_strided(t.shape, t.stride(), place) for t, place in zip(like, places, strict=False)]
    return flat, parts


class FlatAdamW(torch.optim.AdamW):
    """AdamW in one launch for each group of weights, which lie side by side as their gradients and moments do.

    torch's own fused AdamW does a list of tensors in several launches, each of which fills a part of a GPU, and reads
    the list anew in Python at every step. State that is saved and loaded is torch's, weight by weight.

    Args:
        groups: As `torch.optim.AdamW` takes them, weights of one dtype. Each `grad` of a group is a part of one tensor
            in the group's order, as `side_by_side` makes it, and stays there. The weights are moved side by side.
        **arguments: As of `torch.optim.AdamW`, with `fused=True`; without `amsgrad` and `maximize`.
    """

    def __init__(self, groups: list[dict[str, Any]], **arguments: Any) -> None:
        super().__init__(groups, **arguments)
        self._flat = []
        for group in self.param_groups:
            trained = group["params"]
            weights, parts = side_by_side(trained, trained[0].dtype)
            weights.zero_()  # what lies between them too
            first, second = torch.zeros_like(weights), torch.zeros_like(weights)
            steps = torch.zeros((), dtype=torch.float32, device=weights.device)
            for weight, part in zip(trained, parts, strict=True):
                part.copy_(weight.detach())
                weight.data = part
                place = (part.shape, part.stride(), part.storage_offset())
                moments = {"exp_avg": first.as_strided(*place), "exp_avg_sq": second.as_strided(*place)}
                self.state[weight] = {"step": steps, **moments}
            gradient = trained[0].grad
            gradients = gradient.as_strided(weights.shape, (1,), gradient.storage_offset())
            self._flat.append((weights, gradients, first, second, steps))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every weight once; arguments as of `torch.optim.AdamW`, but for a closure, of which there is none."""
        for group, (weights, gradients, first, second, steps) in zip(self.param_groups, self._flat, strict=True):
            beta1, beta2 = group["betas"]
            adamw(
                [weights],
                [gradients],
                [first],
                [second],
                [],
                [steps],
                fused=True,
                # What `torch.amp.GradScaler` leaves here: a step whose gradients are not finite changes nothing.
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
                amsgrad=False,
                maximize=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what `torch.optim.AdamW` saves: the count of steps, which is a group's here, for each weight."""
        made = super().state_dict()
        state = {number: {**own, "step": own["step"].clone()} for number, own in made["state"].items()}
        return {**made, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over saved state; arguments as of `torch.optim.AdamW`."""
        held = {weight: dict(state) for weight, state in self.state.items()}
        super().load_state_dict(state_dict)
        for weight, state in held.items():
            for name, tensor in self.state[weight].items():
                state[name].copy_(tensor)
            self.state[weight] = state
