"""Save trained weights, load them into a model, and open them as a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, load_model, save_model
from torch import nn

from ..config.experiment import Experiment
from ..errors import KitError
from ..system.devices import default_device, generators_kept
from ..system.files import write_json
from ..system.parsing import read_json
from ..system.safe_peft import peft
from .build import build
from .heads import head_modules

# --- saving, loading, predicting --------------------------------------------------------------------------------


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Save what was trained: adapters and head (PEFT's safetensors and config), or the whole model.

    Args:
        model: As `build` made it.
        folder: A folder that does not exist yet.
    """
    folder.mkdir(parents=True)
    if isinstance(model, peft.PeftModel):
        # "auto" would ask the hub whether the vocabulary has changed.
        model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
        # PEFT's card is an empty form; the run folder has its own.
        (folder / "README.md").unlink(missing_ok=True)
        _name_each_module_once(model, folder / "adapter_config.json")
    else:
        save_model(model, str(folder / "model.safetensors"))


def _name_each_module_once(model: peft.PeftModel, file: Path) -> None:
    """Write into PEFT's config the full name of each adapted layer, and of each head, once.

    PEFT shortens a long list to last parts such as `dense`. Those fit layers of another class on the same base, whose
    adapters PEFT would then leave empty, with a warning only. A full name that is not there is an error.
    """
    inner = model.get_base_model()
    config = read_json(file)
    config["target_modules"] = sorted(
        name for name, module in inner.named_modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
    )
    config["modules_to_save"] = head_modules(inner)
    config["exclude_modules"] = None  # the full names leave nothing to exclude
    write_json(file, config)


def load_trained(
    experiment: Experiment,
    label_names: Sequence[str],
    adapter: Path,
    *,
    device: torch.device | None = None,
    pad_token_id: int | None = None,
) -> nn.Module:
    """Build an experiment's model with the trained weights of a run folder.

    Args:
        experiment: The run's experiment.
        label_names: Names of the run's classes.
        adapter: The run's folder `adapter/`.
        device: Where the model goes.
        pad_token_id: The tokenizer's pad token id.

    Returns:
        The model in eval mode. The caller's random state does not change.

    Raises:
        KitError: When weights are missing or do not fit.
    """
    device = device or default_device()
    with generators_kept(device):
        model = build(experiment, label_names, device=device, pad_token_id=pad_token_id, trained=True)
        load_weights_(model, adapter)
    return model.eval()


def load_weights_(model: nn.Module, folder: Path) -> None:
    """Load what `save_adapter` saved into a model that `build` made, in place.

    Raises:
        KitError: When a file is missing, damaged, or does not hold every trained weight in its shape.
    """
    with_adapter = isinstance(model, peft.PeftModel)
    file = folder / ("adapter_model.safetensors" if with_adapter else "model.safetensors")
    if not file.is_file():
        raise KitError(f"{file} is missing: {folder} holds no trained weights of this experiment")
    try:
        if not with_adapter:
            load_model(model, str(file))
            return
        state = load_file(str(file))
    except Exception as error:
        raise KitError(f"{file} cannot be read: {' '.join(str(error).split())[:300]}") from error
    wanted = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    lost, strange = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if lost or strange:
        raise KitError(
            f"{file} does not fit the model: {len(lost)} trained weights are missing and {len(strange)} do not "
            f"belong, the first {(lost or strange)[0]!r}"
        )
    for name, weight in wanted.items():
        if state[name].shape != weight.shape:
            raise KitError(
                f"{file} does not fit the model: {name!r} has the shape {list(state[name].shape)}, and the model's is "
                f"{list(weight.shape)}"
            )
        if not state[name].is_floating_point():
            raise KitError(f"{file} does not fit the model: {name!r} holds {state[name].dtype}, no trained weights")
    peft.set_peft_model_state_dict(model, state)
