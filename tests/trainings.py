"""What tests of training share: callbacks that stop or look, and ways to compare two runs."""

import numpy as np
import torch
from transformers import TrainerCallback

import qlora_kit as qk
from qlora_kit import models

CPU = torch.device("cpu")


class StopAt(TrainerCallback):
    """Cuts a run off at a step, as a killed process would: nothing after the step is done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and not control.should_save:
            raise KeyboardInterrupt


class StopAtTheEnd(TrainerCallback):
    """Cuts a run off between its last checkpoint and its record."""

    def on_train_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


class Watch(TrainerCallback):
    def __init__(self) -> None:
        self.optimizer = self.model = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.model, self.optimizer, self.args = model, optimizer, args


def weights_of(run):
    from safetensors.torch import load_file

    return load_file(run.path / "adapter" / "adapter_model.safetensors")


def untimed(record):
    """Return a record without what differs between two equal runs: times and memory."""
    if isinstance(record, dict):
        return {key: untimed(value) for key, value in record.items() if key not in ("timing", "seconds", "memory")}
    return [untimed(value) for value in record] if isinstance(record, list) else record


class Evil:
    """Says so in a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


CLASS_MEANS = {
    "model__head": "cosine",
    "model__head_init": "class_means",
    "training__epochs": 1,
    "training__learning_rate": 1e-9,  # so that the start is the end
}


def nearest_class_means(experiment, data):
    """Return the macro F1 on the validation rows of the nearest class mean of the untrained model's states."""
    tokenizer = models.load_tokenizer(experiment.model)
    model = models.build(experiment, data.label_names, device=CPU, pad_token_id=tokenizer.pad_token_id)
    train, validation = (
        models.forward_texts(
            model, tokenizer, split.texts, device=CPU, precision="fp32", max_length=128, states=True
        ).astype(float)
        for split in (data.train, data.validation)
    )
    directions = train / np.linalg.norm(train, axis=1, keepdims=True)
    labels = np.array(data.train.labels)
    means = np.stack([directions[labels == place].sum(0) for place in range(len(data.label_names))])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return means, qk.evaluation.compute_metrics(validation @ means.T, data.validation.labels)["f1_macro"]
