"""Optimizers: which one a device has, AdamW over one flat tensor, and 32-bit states for embeddings."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.optim.adamw import adamw

from .kernels.side_by_side import side_by_side
from .system.safe_bitsandbytes import bnb

logger = logging.getLogger(__name__)


class FlatAdamW(torch.optim.AdamW):
    """AdamW with one launch for each group of weights: its weights, gradients and moments are each one flat tensor.

    torch's own fused AdamW needs several launches for a list of tensors, each of which fills a part of a GPU, and reads
    the list again in Python at every step. State is saved and loaded in torch's format, weight by weight.

    Args:
        groups: As for `torch.optim.AdamW`, with weights of one dtype. The `grad`s of a group must be parts of one
            tensor in the group's order, as `side_by_side` makes it, and stay there. The weights are moved into such a
            tensor, too.
        **arguments: As for `torch.optim.AdamW`, with `fused=True`; without `amsgrad` and `maximize`.
    """

    def __init__(self, groups: list[dict[str, Any]], **arguments: Any) -> None:
        super().__init__(groups, **arguments)
        self._flat = []
        for group in self.param_groups:
            trained = group["params"]
            weights, parts = side_by_side(trained, trained[0].dtype)
            weights.zero_()  # the gaps between them, too
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
        """Update every weight once; arguments as of `torch.optim.AdamW`, but a closure is not supported."""
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
                # Set by `torch.amp.GradScaler`: a step whose gradients are not finite changes nothing.
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
        """Return what `torch.optim.AdamW` saves; each weight gets a copy of its group's count of steps."""
        made = super().state_dict()
        state = {number: {**own, "step": own["step"].clone()} for number, own in made["state"].items()}
        return {**made, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load saved state; arguments as of `torch.optim.AdamW`."""
        held = {weight: dict(state) for weight, state in self.state.items()}
        super().load_state_dict(state_dict)
        for weight, state in held.items():
            for name, tensor in self.state[weight].items():
                state[name].copy_(tensor)
            self.state[weight] = state


# The plain optimizer that replaces a paged one where there is no CUDA.
UNPAGED = {"paged_adamw_8bit": "adamw_8bit", "paged_adamw_32bit": "adamw_torch"}


def trained_embeddings(model: torch.nn.Module) -> list[torch.nn.Embedding]:
    """Return the embeddings whose own weights are trained: 8-bit optimizers keep their state in 32 bits.

    transformers' Trainer does the same (trainer.py, `create_optimizer`), and so does the optimizers' paper (Dettmers
    et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861, section 2.3).

    Args:
        model: A model, with or without adapters.
    """
    return [
        module for module in model.modules() if isinstance(module, torch.nn.Embedding) and module.weight.requires_grad
    ]


def keep_embeddings_in_32_bits(optimizer: Any, model: torch.nn.Module) -> None:
    """Make an 8-bit optimizer of bitsandbytes keep 32-bit states for embeddings whose own weights are trained."""
    # Its own manager, not the one that all optimizers of a process share. That one would keep every trained model in
    # memory, and would keep 32-bit states for later models' parameters that have the same index.
    optimizer.mng = manager = bnb.optim.GlobalOptimManager.__new__(bnb.optim.GlobalOptimManager)
    manager.initialize()
    for module in trained_embeddings(model):
        manager.register_module_override(module, "weight", {"optim_bits": 32})


def resolve_optimizer(name: str, device: torch.device) -> str:
    """Return the optimizer that a device has: without CUDA, the plain one replaces a paged one.

    Args:
        name: Name of the optimizer in transformers.
        device: Where it runs.
    """
    if device.type == "cuda" or name not in UNPAGED:
        return name
    logger.warning("%s exists on CUDA only; this run takes %s.", name, UNPAGED[name])
    return UNPAGED[name]
