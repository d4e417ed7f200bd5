"""Run texts through a model: logits and embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..config.experiment import Experiment
from ..kernels import cuda_graphs
from ..system.devices import default_device
from ..system.safe_peft import peft
from .build import neighbours
from .configuration import layers_of
from .heads import mean_pool
from .precision import computing, precision_of
from .pretrained import build_classifier
from .tokenizers import load_tokenizer

MOST_EVAL_ROWS = 64


def evaluation_rows(experiment: Experiment, device: str, batch: int | None = None) -> int:
    """Return how many rows a forward pass in evaluation has (`training.eval_batch_size`, or a number computed here).

    A run that fits the GPU in training must not fail at its first evaluation. With checkpointing the backward pass
    keeps one layer's activations at a time, more than a forward pass of as many rows keeps. Without checkpointing it
    keeps every layer's, so a forward pass has room for more rows. Half the number of layers times the rows is safe.

    Args:
        experiment: What is trained, and how.
        device: `cuda` or `cpu`; on a CPU an evaluation has 64 rows.
        batch: Rows per training step; by default the experiment's.

    Raises:
        KitError: When the base's configuration cannot be read.
    """
    spec = experiment.training
    if spec.eval_batch_size is not None:
        return spec.eval_batch_size
    if device == "cpu":
        return MOST_EVAL_ROWS
    rows = 1 if spec.gradient_checkpointing else max(layers_of(experiment.model) // 2, 1)
    return min((batch or spec.batch_size) * rows, MOST_EVAL_ROWS)


def forward_texts(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    device: torch.device,
    precision: str,
    max_length: int,
    batch_size: int = 64,
    too_long: str = "cut",
    states: bool = False,
    progress: str | None = None,
) -> np.ndarray:
    """Run a classifier over texts, in batches of similar length.

    Args:
        model: As `build` or `load_trained` returns it.
        tokenizer: Its tokenizer.
        texts: The texts.
        device: Where the model is.
        precision: `fp32`, `fp16` or `bf16`. A CPU always computes this in fp32.
        max_length: Longest text in tokens.
        batch_size: Texts per forward pass.
        too_long: `cut` or `refuse`, as in `DataSpec`.
        states: Return the base's pooled states instead of the logits.
        progress: Label of a progress bar, or None for none.

    Returns:
        Float32 `[len(texts), classes]` (or `[len(texts), hidden]`), in the order of `texts`. A text's row does
        not depend on the texts beside it, except for rounding (1e-5).
    """
    from tqdm.auto import tqdm

    from ..data.batches import collator, edges_of, tokenize
    from ..data.tables import texts_of

    ids = tokenize(tokenizer, texts_of(texts, call="forward_texts"), max_length, too_long)
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    rows: list[np.ndarray | None] = [None] * len(ids)
    if model.training:  # `eval` visits all modules, which takes milliseconds: much for a single text
        model.eval()
    pad = collator(tokenizer.pad_token_id, max_length=max_length, side=tokenizer.padding_side, edges=edges_of(device))
    # A graph repeats what was captured, so its name says which adapters were on.
    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    adapters = (layer.active_adapters, layer.disable_adapters, layer.merged_adapters) if layer is not None else ()
    kind = f"forward {precision} {states} {adapters}"
    replayed = (
        cuda_graphs.graphs_of_model(model, device)
        if device.type == "cuda" and not cuda_graphs.asks_the_host(model)
        else None
    )

    def work(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with cuda_graphs.without_cudnn_attention(device):
            return _pooled_states(model, batch) if states else model(**batch).logits

    bar = tqdm(total=len(ids), desc=progress, unit="text", disable=progress is None)
    with torch.inference_mode(), computing(device, "fp32" if device.type == "cpu" else precision), bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = pad([{"input_ids": ids[row], "attention_mask": [1] * len(ids[row])} for row in chosen])
            if replayed is None:
                result = work({name: value.to(device) for name, value in batch.items()})
            else:
                few = min(batch_size, 1 << (len(chosen) - 1).bit_length())  # a power of two: few shapes
                batch = cuda_graphs.pad_rows(batch, few)
                result = replayed.run(kind, work, batch)[: len(chosen)]
            for row, values in zip(chosen, result.float().cpu().numpy(), strict=True):
                rows[row] = values
            bar.update(len(chosen))
    return np.stack([row for row in rows if row is not None]) if rows else np.zeros((0, 0), np.float32)


def _pooled_states(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inner: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    states = inner.base_model(**batch).last_hidden_state
    # Frozen decoders' states are averaged, too: without training, the last token's state holds little information.
    return mean_pool(states, batch["attention_mask"])


def embed(
    experiment: Experiment, texts: Sequence[str], *, batch_size: int = 64, progress: str | None = "embedding"
) -> np.ndarray:
    """Embed texts with an experiment's frozen base, stored as the experiment stores it, without adapters.

    Args:
        experiment: Names the base, its quantization and the longest text.
        texts: The texts.
        batch_size: Texts per forward pass.
        progress: Label of a progress bar, or None for none.

    Returns:
        Mean-pooled states, float32 `[len(texts), hidden]`.

    Raises:
        KitError: As `build_classifier`.
    """
    device = default_device()
    tokenizer = load_tokenizer(experiment.model)
    model = build_classifier(experiment, ["a", "b"], device=device, pad_token_id=tokenizer.pad_token_id)
    neighbours(experiment, model, device, tokenizer.pad_token_id)
    return forward_texts(
        model,
        tokenizer,
        texts,
        device=device,
        precision=precision_of(experiment, device),
        max_length=experiment.data.max_length,
        batch_size=batch_size,
        states=True,
        progress=progress,
    )
