"""Prepare device, precision, tokenizer, tokens and model, in the same way for all code that trains."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..config.experiment import Experiment
from ..data.batches import tokenize
from ..data.rows import TextData
from ..kernels import cuda_graphs
from ..models.build import build
from ..models.precision import precision_of
from ..models.tokenizers import load_tokenizer
from ..system.devices import default_device, trainers_device


@dataclasses.dataclass(frozen=True)
class PreparedModel:
    """A model to train, its device and its precision.

    Args:
        device: The first GPU, which the Trainer takes, or the CPU.
        precision: What a step computes in: `fp32`, `fp16` or `bf16`, never `auto`.
        model: The model from `models.build`, in training mode, with gradient checkpointing if the experiment asks for
            it. Trained weights are fp32; frozen weights have the dtype in which their scheme stores them.
    """

    device: torch.device
    precision: str
    model: nn.Module


@dataclasses.dataclass(frozen=True)
class Prepared(PreparedModel):
    """A model to train, its tokenizer and the tokenized texts.

    Args:
        tokenizer: The model's tokenizer; it says which token pads short rows (`pad_token_id`) and on which side.
        tokens: Token ids of the splits `train` and `validation`: one list of ints per row, in the order of the data's
            rows, not padded, with 1 to `data.max_length` tokens each.
    """

    tokenizer: Any
    tokens: dict[str, list[list[int]]]


def prepare(experiment: Experiment, data: TextData) -> Prepared:
    """Prepare everything for a training on this data.

    Args:
        experiment: What to train, and how.
        data: The data. Training and validation rows are tokenized; test rows are not touched.

    Raises:
        KitError: For texts that the model cannot read, a precision that the device does not support, and everything
            that `models.build` refuses.
    """
    tokenizer, tokens = prepare_texts(experiment, data)
    built = prepare_model(experiment, data.label_names, tokenizer.pad_token_id)
    return Prepared(built.device, built.precision, built.model, tokenizer, tokens)


def prepare_texts(experiment: Experiment, data: TextData) -> tuple[Any, dict[str, list[list[int]]]]:
    """Return only the tokenizer and the token ids (see `Prepared`), for several models on the same texts."""
    tokenizer = load_tokenizer(experiment.model)
    tokens = {
        split: tokenize(tokenizer, rows.texts, experiment.data.max_length, experiment.data.too_long)
        for split, rows in (("train", data.train), ("validation", data.validation))
    }
    return tokenizer, tokens


def prepare_model(experiment: Experiment, label_names: Sequence[str], pad_token_id: int) -> PreparedModel:
    """Prepare only the model: for a trial, or for a measurement, which has no texts.

    On a GPU this restarts the count of peak memory.

    Args:
        experiment: What to train, and how; torch gets `training.threads` threads.
        label_names: Names of the classes, in the order of their ids.
        pad_token_id: The tokenizer's pad token id.
    """
    if experiment.training.threads:
        torch.set_num_threads(experiment.training.threads)
    device = trainers_device(default_device())
    precision = precision_of(experiment, device)
    if device.type == "cuda":
        count_memory_anew(device)
    model = build(experiment, label_names, device=device, pad_token_id=pad_token_id, checkpointing=True)
    if experiment.model.random_weights and device.type == "cuda":
        # Random weights are made unquantized first: fine-tuning a checkpoint does not need that memory.
        count_memory_anew(device)
    return PreparedModel(device, precision, model)


def count_memory_anew(device: torch.device) -> None:
    """Free what earlier runs of this process left on a GPU, and restart the count of its peak memory.

    Args:
        device: The GPU.
    """
    gc.collect()  # an earlier run's Trainer is a reference cycle: its model would count as this one's
    cuda_graphs.clear_workspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
