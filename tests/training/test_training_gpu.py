"""What only a CUDA GPU shows: 16-bit training, paged optimizers, resuming, memory. `pytest -m gpu` runs it."""

from __future__ import annotations

import contextlib
import gc

import numpy as np
import pytest
import torch
from trainings import StopAt, Watch, weights_of
from transformers import TrainerCallback

import qlora_kit as qk
from qlora_kit import models
from qlora_kit.errors import TrainingError

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int4", "int8", "none"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_every_scheme_trains_in_every_precision(topics, tiny_experiment, tmp_path, name, scheme, precision):
    watch = Watch()
    experiment = tiny_experiment(name, quantization__scheme=scheme, training__precision=precision)
    run = qk.finetune(experiment, data=topics, out=tmp_path, progress=False, callbacks=[watch])
    losses = [entry["loss"] for entry in run.training["losses"]]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert run.training["precision"] == precision
    assert {p.dtype for p in watch.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.device.type for p in watch.model.parameters()} == {"cuda"}
    assert run.training["memory"]["measure"] == "CUDA allocator"
    # Read back from the folder, the scores are those of the end of training.
    again = qk.load_run(run.path).predict(topics.validation.texts).logits
    score = qk.evaluation.compute_metrics(again, topics.validation.labels)["accuracy"]
    assert score == pytest.approx(run.training["metrics"]["validation"]["accuracy"]["value"], abs=0.06)


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch_fused"])
def test_optimizers_train_and_resume(topics, tiny_experiment, tmp_path, optimizer):
    experiment = tiny_experiment("gpt2", training__optimizer=optimizer, training__checkpoint_steps=4)
    whole = qk.finetune(experiment, data=topics, out=tmp_path / "whole", progress=False)
    assert whole.training["optimizer"] == optimizer
    with pytest.raises(KeyboardInterrupt):
        qk.finetune(experiment, data=topics, out=tmp_path / "cut", progress=False, callbacks=[StopAt(6)])
    again = qk.finetune(experiment, data=topics, out=tmp_path / "cut", progress=False)
    assert again.training["timing"]["resumed_from_step"] == 4
    one, other = weights_of(whole), weights_of(again)
    for name, value in one.items():
        assert torch.allclose(value, other[name], atol=2e-3), name


def test_checkpointing_saves_memory_and_changes_no_loss(topics, tiny_experiment, tmp_path):
    seen = {}
    for on in (False, True):
        gc.collect()  # what earlier runs left
        torch.cuda.empty_cache()
        experiment = tiny_experiment("llama", training__gradient_checkpointing=on, lora__dropout=0.0)
        run = qk.finetune(experiment, data=topics, out=tmp_path / str(on), progress=False)
        seen[on] = [entry["loss"] for entry in run.training["losses"]], run.training["memory"]["peak_bytes"]
    assert np.allclose(seen[True][0], seen[False][0], rtol=2e-2)
    assert seen[True][1] < seen[False][1]


def test_a_gpu_that_runs_out_says_what_would_fit_and_keeps_what_was_saved(topics, tiny_experiment, tmp_path):
    experiment = tiny_experiment(
        "gpt2", training__checkpoint_steps=4, training__graphs="none", training__precision="fp32", lora__dropout=0.0
    )
    whole = qk.finetune(experiment, data=topics, out=tmp_path / "whole", progress=False)

    class Filled(TrainerCallback):
        """Take what the process has left of memory, and let it have no more."""

        def __init__(self) -> None:
            self.held: list = []

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 6:
                total = torch.cuda.get_device_properties(0).total_memory
                torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
                for size in (2**20, 2**14, 2**9):
                    with contextlib.suppress(torch.cuda.OutOfMemoryError):
                        while True:
                            self.held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))

    filled = Filled()
    try:
        with pytest.raises(TrainingError, match=r"the GPU's memory does not suffice for batch 16(.|\n)*Try ") as caught:
            qk.finetune(experiment, data=topics, out=tmp_path / "cut", progress=False, callbacks=[filled])
    finally:
        filled.held.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert isinstance(caught.value.__cause__, torch.cuda.OutOfMemoryError)
    again = qk.finetune(experiment, data=topics, out=tmp_path / "cut", progress=False)
    assert again.training["timing"]["resumed_from_step"] == 4
    one, other = weights_of(whole), weights_of(again)
    for name, value in one.items():
        assert torch.allclose(value, other[name], atol=2e-3), name


def test_bf16_is_taken_where_the_hardware_has_it():
    # Torch's own answer.
    hardware = torch.cuda.is_bf16_supported(including_emulation=False)
    device = models.default_device()
    assert models.resolve_precision("auto", device) == ("bf16" if hardware else "fp16")
    with contextlib.nullcontext() if hardware else pytest.raises(qk.KitError, match="no bf16 in hardware"):
        assert models.resolve_precision("bf16", device) == "bf16"
