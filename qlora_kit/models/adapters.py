"""LoRA adapters through PEFT: the layers they go on, their config, and what is trained."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..config.experiment import Experiment
from ..errors import KitError, unknown
from ..kernels.fused_lora import fuse_
from ..quantization.backend import backend_of, backend_of_layer, linear_storage
from ..quantization.layers import is_linear, matrices_of
from ..system.devices import quiet
from ..system.safe_peft import peft
from .heads import check_head, head_modules
from .sources import name_for_others


def _adapted(experiment: Experiment, model: nn.Module) -> nn.Module:
    """Return a classifier with an experiment's adapters on it."""
    assert experiment.lora is not None
    model.requires_grad_(False)
    if experiment.training.prepare_for_kbit_training:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    heads = head_modules(model)
    config = lora_config(experiment, model)
    leaves = sorted({name.rpartition(".")[2] for name in linear_layers(model) if name.split(".")[0] not in heads})
    with quiet(), _targets_as_they_are():
        try:
            adapted = peft.get_peft_model(model, config)
        except ValueError as error:  # for Mamba: its kernels read a linear layer's weight, so PEFT refuses it
            raise KitError(
                f"PEFT puts no adapters on {experiment.model.name} so: {' '.join(str(error).split())[:200]} "
                f"(its linear layers are {', '.join(leaves)}: name others of them in lora.target_modules)"
            ) from error
    if experiment.lora.bias != "none":
        _train_biases_in_fp32_(adapted)
    # PEFT would write the folder it was loaded from, which means nothing on another machine.
    named = adapted.peft_config["default"]
    named.base_model_name_or_path, named.revision = name_for_others(experiment.model)
    check_head(adapted, heads)
    if experiment.model.fused:
        fuse_(adapted)
    return adapted


@contextlib.contextmanager
def _targets_as_they_are() -> Iterator[None]:
    """Keep PEFT from reading targets as names of a mixture's experts, each of which was a layer in transformers 4.

    For DeepSeek and similar models PEFT removes `gate_proj`, a linear layer of the shared experts, from the targets and
    puts adapters on the experts' weight (0.21, utils/transformers_weight_conversion.py).
    """
    conversion: Any = importlib.import_module("peft.utils.transformers_weight_conversion")
    before = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *args, **kwargs: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = before


def _train_biases_in_fp32_(model: nn.Module) -> None:
    """Cast biases that are trained with the adapters from the base's dtype to fp32, in place."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in model.modules():
        backend, bias = backend_of_layer(module), getattr(module, "bias", None)
        if backend is not None and bias is not None and bias.requires_grad:
            backend.train_bias_(module)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's linear layers by name, however they are stored (GPT-2's `Conv1D` included)."""
    # bitsandbytes' layers and the kit's own are nn.Linear too.
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def lora_config(experiment: Experiment, model: nn.Module) -> peft.LoraConfig:
    """Return PEFT's config for an experiment's adapters on a classifier.

    Args:
        experiment: Has a `lora` section.
        model: The classifier without adapters.

    Returns:
        The config: the head in `modules_to_save` and never among the targets.

    Raises:
        KitError: When the base has no linear layer, or a target module names none of them, or also something else.
    """
    lora = experiment.lora
    assert lora is not None
    heads = head_modules(model)
    linears = linear_layers(model)
    in_head = [name for name in linears if name.split(".")[0] in heads]
    in_base = [name for name in linears if name not in in_head]
    if not in_base:
        raise KitError(
            f"{experiment.model.name} has no linear layer to put an adapter on (its matrices are those of "
            f"{matrices_of(model, heads)}); with lora: null every weight of it is trained"
        )
    if lora.target_modules == "all-linear":
        # Full names: a module that takes no adapter may have the same last part (ConvBERT's `dense`).
        targets = in_base
    else:
        targets = list(lora.target_modules)
        for target in targets:
            _check_target(experiment.model.name, target, model, heads, in_base)
    config = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT computes alpha / r: any number will do
        lora_dropout=lora.dropout,
        target_modules=targets,
        # A target such as "dense" also names layers in RoBERTa's head.
        exclude_modules=in_head or None,
        bias=lora.bias,
        modules_to_save=heads,
    )
    return backend_of(experiment.quantization.scheme).lora_layers(config)


def _check_target(base: str, target: str, model: nn.Module, heads: Sequence[str], linears: Sequence[str]) -> None:
    """Refuse a target that names anything but linear layers of the base: PEFT could not adapt it."""

    def named(name: str) -> bool:
        return (name == target or name.endswith(f".{target}")) and name.split(".")[0] not in heads

    # Some weights have no layer of their own, such as a mixture's experts.
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name, _ in model.named_parameters() if named(name)}
    others = {name: f"a weight of {type(owner).__name__}" for name, owner in owners.items()}
    others |= {name: f"a {type(module).__name__}" for name, module in model.named_modules() if named(name)}
    if not others:
        leaves = sorted({name.rpartition(".")[2] for name in linears})
        raise unknown(f"linear layer in {base} to put an adapter on, called", target, leaves)
    wanted = [name for name in linears if named(name)]
    for name in others:
        if name in wanted:
            continue
        instead = (
            f"name layers in full, such as {wanted[0]}" if wanted else "take all-linear, which names those that do"
        )
        raise KitError(
            f"lora.target_modules: {target!r} names {name}, {others[name]}, which takes no adapter (only linear layers "
            f"do); {instead}"
        )


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Count parameters as PEFT does: a packed 4-bit weight counts as the numbers it stands for.

    Args:
        model: With or without adapters.

    Returns:
        Trainable parameters, and all of them.
    """
    if isinstance(model, peft.PeftModel):
        trainable, everything = model.get_nb_trainable_parameters()
    else:
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        everything = sum(p.numel() for p in model.parameters())
    # PEFT counts only parameters, but a layer may keep its codes in buffers.
    in_buffers = [linear_storage(module) for module in model.modules() if "weight" in module._buffers]
    return int(trainable), int(everything + sum(stored.parameters for stored in in_buffers if stored is not None))
