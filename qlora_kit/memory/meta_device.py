"""Build a model on the meta device: shapes and dtypes without memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..config.experiment import Experiment
from ..errors import KitError
from ..kernels.cpu_attention import use_cpu_attention_
from ..models.build import build
from ..models.configuration import load_config
from ..models.precision import precision_of
from ..quantization.backend import backends
from ..system.devices import generators_kept
from .devices import Device


def _skeleton(experiment: Experiment, precision: str, labels: int, where: Device) -> nn.Module:
    """Build the experiment's model on the meta device: every shape and dtype, no weight."""
    # A CPU stores in fp32 what is not quantized (`models.build_classifier`).
    stored = "fp32" if where.kind == "cpu" else precision
    # Each plan sets the length of texts itself; 2 fits any model.
    changed = experiment.override({"training.precision": stored, "model.random_weights": True, "data.max_length": 2})
    # The config's own pad token, not another one: RoBERTa and similar models compute positions from it.
    config: Any = load_config(experiment.model)
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    names = [f"label {place}" for place in range(labels)]
    meta = torch.device("meta")
    with generators_kept(meta):
        model = build(changed, names, device=meta, pad_token_id=pad or 0, checkpointing=True)
    model = model.to("meta")
    for backend in backends():
        backend.plan_for_(model, where.kind)
    if where.kind == "cpu" and experiment.model.fused:
        use_cpu_attention_(model)
    return model


@contextlib.contextmanager
def _autocast_flag(dtype: torch.dtype | None) -> Iterator[None]:
    """Set the autocast flag that PEFT and `fused_lora` read, as the Trainer does around a step in 16 bits."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or before[1])
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def _batch(batch: int, length: int) -> dict[str, torch.Tensor]:
    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device="meta")

    return {
        "input_ids": integers(batch, length),
        "attention_mask": integers(batch, length),
        "labels": integers(batch),
    }


# --- what operations allocate inside ----------------------------------------------------------------------------


def _inside(where: Device) -> dict[Any, Any]:
    """Return replacements for some operations on the meta device, which show what these allocate inside.

    Backends add their own. On a CPU, torch converts a mask of booleans to numbers for a product; a GPU reads booleans.
    """
    aten = torch.ops.aten

    def native_dropout(a: Any, p: float, train: bool | None) -> Any:
        kept = torch.empty(a.shape, device=a.device, dtype=torch.bool)
        return a * kept.to(a.dtype), kept

    def native_dropout_backward(a: Any, kept: Any, scale: float) -> Any:
        return a * kept.to(a.dtype) * scale

    def grouped_mm(a: Any, b: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
        # For a mixture's experts: the meta device takes only bf16, but a GPU and a CPU multiply in any precision.
        rows = (offs.shape[0], a.shape[-2]) if a.dim() == b.dim() == 2 else (a.shape[-2],)
        if a.dim() == 3:
            rows = (a.shape[0], a.shape[1]) if b.dim() == 3 else (a.shape[1],)
        return torch.empty((*rows, b.shape[-1]), device=a.device, dtype=out_dtype or a.dtype)

    on_cpu = {
        aten.native_dropout.default: native_dropout,
        aten.native_dropout_backward.default: native_dropout_backward,
    }
    return {
        **(on_cpu if where.kind == "cpu" else {}),
        aten._grouped_mm.default: grouped_mm,
        **{name: body for backend in backends() for name, body in backend.inside_operations(where.kind).items()},
    }


def _precision(experiment: Experiment, where: Device) -> str:
    wanted = experiment.training.precision
    if where.kind == "cpu":
        return precision_of(experiment, torch.device("cpu"))
    if wanted == "auto":
        return where.precision
    if wanted == "bf16" and where.precision != "bf16":
        raise KitError(f"a {where.name} has no bf16 in hardware: use training.precision fp16 or auto")
    return wanted
