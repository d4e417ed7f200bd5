"""One training step on shapes alone, recorded on a tape."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..config.experiment import Experiment
from ..kernels import cuda_graphs
from ..models.heads import head_modules
from ..optimizers import UNPAGED, trained_embeddings
from ..quantization.storage import tables_of
from ..system.safe_peft import peft
from .devices import Device
from .tape import Tape, parameters_of


class _Step:
    """One training step as the Trainer runs it, on shapes alone, recorded on a tape."""

    def __init__(self, experiment: Experiment, model: nn.Module, tape: Tape, where: Device) -> None:
        self.spec = experiment.training
        self.model, self.tape, self.where = model, tape, where
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer: Any = None
        self.gradients: cuda_graphs.Gradients | None = None
        self.graphs = cuda_graphs.obstacle(experiment.training, model, where.kind) is None
        # cuBLAS keeps workspaces for each stream. Graphs are captured on a stream of their own, not on that of all the
        # rest, and the backward pass of adapted layers uses one more.
        branches = self.graphs and experiment.model.fused and experiment.lora is not None
        self.cublas = where.cublas * (2 if self.graphs else 1) + (where.cublas // 2 if branches else 0)

    def hold_weights(self) -> None:
        """Count the weights, by kind."""
        kinds = kinds_of_memory(self.model)
        for tensor in parameters_of(self.model):
            self.tape.hold(tensor, kinds.get(tensor.untyped_storage()._cdata, "base, norms and biases"))

    def hold_optimizer(self) -> int:
        """Make the optimizer's state, and return how many of its bytes lie outside torch's allocator."""
        self.tape.phase = "before"
        tensors, paged, self.optimizer = _optimizer_state(self.spec, self.model, self.where)
        for tensor in tensors:
            self.tape.hold(tensor, "optimizer")
        self._state = tensors
        if self.graphs:
            self.gradients = cuda_graphs.Gradients(self.trained)
            self.tape.hold(self.gradients.flat, "gradients")
            if self.gradients.twice:
                for parameter in self.trained:
                    parameter.grad = None
        elif self.spec.gradient_accumulation > 1:
            for parameter in self.trained:
                parameter.grad = torch.empty_like(parameter)
                self.tape.hold(parameter.grad, "gradients")
        return paged

    def run(self, batch: dict[str, torch.Tensor], autocast: Any) -> None:
        """Run forward, backward, clipping and the optimizer."""
        tape = self.tape
        for tensor in batch.values():
            tape.hold(tensor, "batch")
        before = {id(block) for block in tape.alive()}
        tape.phase = "forward"
        with autocast:
            loss = self.model(**batch).loss
        for block in tape.alive():
            if id(block) not in before:
                block.kind = "activations"
        tape.phase = "backward"
        scale = torch.empty((), device="meta")
        if self.spec.gradient_accumulation > 1:
            loss = loss / self.spec.gradient_accumulation
        # Not loss.backward(): a function mode is off inside a function that it handles, and recomputed layers need it.
        loss = loss * scale
        torch.autograd.graph._engine_run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
        del loss
        for parameter in self.trained:
            if parameter.grad is not None:
                tape.name(parameter.grad, "gradients")
        tape.phase = "optimizer"
        if self.spec.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.trained, self.spec.max_grad_norm)
        if self.optimizer is not None:
            self.optimizer.step()
        for parameter in self.trained:
            parameter.grad = None


def kinds_of_memory(model: nn.Module) -> dict[int, str]:
    """Return what each storage of a model is for."""
    from ..models.parts import part_of

    heads = [] if isinstance(model, peft.PeftModel) else head_modules(model)
    kinds: dict[int, str] = {}
    for name, module in model.named_modules():
        for leaf, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            part = part_of(f"{name}.{leaf}", module, heads, leaf)
            if part in ("adapters", "head"):
                part = "adapters and head"
            elif part == "base, buffers":
                part = "base, norms and biases"
            for held in (tensor, *tables_of(tensor, module)):
                kinds.setdefault(held.untyped_storage()._cdata, part)
    return kinds


# bitsandbytes, optim/optimizer.py: below the first size, a tensor's state is in 32 bits; below the second, not paged.
_MIN_8BIT, _MIN_PAGED = 4096, 100_000


def _optimizer_state(spec: Any, model: nn.Module, where: Device) -> tuple[list[torch.Tensor], int, Any]:
    """Make the optimizer's state for a model's trained parameters, on the meta device.

    Returns:
        Its tensors, its bytes in pages outside torch's allocator, and the optimizer if its step is to be run, else None
        (bitsandbytes' steps run in place and allocate nothing).
    """
    name = spec.optimizer
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if where.kind == "cpu":
        name = UNPAGED.get(name, name)

    def empty(shape: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tensors: list[torch.Tensor] = []
    if name in ("adamw_torch", "adamw_torch_fused"):
        fused = name == "adamw_torch_fused"
        optimizer = torch.optim.AdamW(trained, lr=1e-3, foreach=where.kind == "cuda" and not fused)
        for parameter in trained:
            state = optimizer.state[parameter]
            state["step"] = torch.tensor(1.0)
            state["exp_avg"], state["exp_avg_sq"] = empty(parameter.shape), empty(parameter.shape)
            tensors += [state["exp_avg"], state["exp_avg_sq"]]
        # The fused step runs in place.
        return tensors, 0, None if fused else optimizer
    if name == "sgd":
        return [], 0, torch.optim.SGD(trained, lr=1e-3, foreach=where.kind == "cuda")
    if name == "adafactor":
        for parameter in trained:
            shape = parameter.shape
            if len(shape) >= 2:
                tensors += [empty(shape[:-1]), empty((*shape[:-2], shape[-1]))]
            else:
                tensors.append(empty(shape))
        return tensors, 0, None
    eight, paged = "8bit" in name, "paged" in name
    outside = 0
    embeddings = {id(module.weight) for module in trained_embeddings(model)}
    whole = [not eight or parameter.numel() < _MIN_8BIT or id(parameter) in embeddings for parameter in trained]
    if not all(whole):
        tensors += [empty(256), empty(256)]  # the code tables, shared by all parameters
    for parameter, in_32_bits in zip(trained, whole, strict=True):
        size = parameter.numel()
        dtype = torch.float32 if in_32_bits else torch.uint8
        if paged and size >= _MIN_PAGED:
            outside += 2 * size * dtype.itemsize
        else:
            tensors += [empty(parameter.shape, dtype), empty(parameter.shape, dtype)]
        if not in_32_bits:
            tensors += [empty(-(-size // 256)), empty(-(-size // 256))]
    return tensors, outside, None
