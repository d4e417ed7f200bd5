"""What training is given: the same for a run, a trial and a measurement."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from trainings import CPU

from qlora_kit import models, training
from qlora_kit.kernels.cuda_graphs import Gradients
from qlora_kit.training.trainer import make_train_and_zero_grad_cheap_

LABELS = ["a", "b", "c"]


def checkpointed(model) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_it_has_the_model_and_the_texts_as_the_model_reads_them(topics, tiny_experiment):
    experiment = tiny_experiment("bert", training__gradient_checkpointing=True)
    prepared = training.prepare(experiment, topics)
    assert (prepared.device, prepared.precision) == (CPU, "fp32")
    assert prepared.model.training and checkpointed(prepared.model)
    assert prepared.tokens.keys() == {"train", "validation"}  # nothing looks at the test
    for split, rows in prepared.tokens.items():
        texts = getattr(topics, split).texts
        assert [prepared.tokenizer.decode(ids, skip_special_tokens=True) for ids in rows[:3]] == [
            prepared.tokenizer.decode(prepared.tokenizer(text)["input_ids"], skip_special_tokens=True)
            for text in texts[:3]
        ]
        assert len(rows) == len(texts) and max(map(len, rows)) <= experiment.data.max_length
    wanted = models.build(experiment, topics.label_names, device=CPU, pad_token_id=prepared.tokenizer.pad_token_id)
    found = prepared.model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in wanted.state_dict().items())
    with pytest.raises(dataclasses.FrozenInstanceError):
        prepared.precision = "bf16"


@pytest.mark.parametrize("asked", [False, True])
def test_a_model_is_checkpointed_where_it_is_for_training_and_the_experiment_asks_for_it(tiny_experiment, asked):
    experiment = tiny_experiment("bert", training__gradient_checkpointing=asked)
    assert checkpointed(models.build(experiment, LABELS, device=CPU, checkpointing=True)) == asked
    assert not checkpointed(models.build(experiment, LABELS, device=CPU))


@pytest.mark.parametrize("flat", [False, True])
def test_a_models_train_and_zero_grad_do_the_same_when_they_are_cheap(tiny_experiment, flat):
    model = models.build(tiny_experiment("bert"), LABELS, device=CPU)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind = type(model)
    gradients = Gradients(trained) if flat else None
    for _ in range(2):  # a second Trainer takes the same model
        make_train_and_zero_grad_cheap_(model, trained, gradients)
    assert isinstance(model, kind) and str(model).startswith(f"{kind.__name__}WithCheapSteps(")
    assert type(copy.deepcopy(model)) is type(model)
    model.eval()
    assert not any(module.training for module in model.modules())
    assert model.train() is model and all(module.training for module in model.modules())
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter) if gradients is None else parameter.grad.fill_(1)
    model.zero_grad(set_to_none=False)
    assert all(not parameter.grad.any() for parameter in trained)
    model.zero_grad()
    # Gradients side by side stay where they are: graphs write into them.
    assert all((parameter.grad is None) == (gradients is None) for parameter in trained)
