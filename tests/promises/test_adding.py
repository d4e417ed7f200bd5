"""A scheme and a head are added in one file: this one. Both are trained on, planned, evaluated and opened again."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import qlora_kit as qk
from qlora_kit.config.quantization import SCHEMES, Scheme
from qlora_kit.config.sections import HEADS, Head
from qlora_kit.errors import KitError
from qlora_kit.models import heads
from qlora_kit.quantization import backend
from qlora_kit.quantization.layers import quantizable
from qlora_kit.training.trainer import make_train_and_zero_grad_cheap_


class Linear2bit(nn.Linear):
    """A frozen linear layer of 2 bits: four codes a byte, one scale a row, the values -3, -1, 1 and 3."""

    weight: torch.Tensor  # type: ignore[assignment]  # the codes, a buffer

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach().float()
        scale = torch.ones(len(weight), 1, device=weight.device) if weight.is_meta else weight.abs().mean(1, True) / 2
        codes = ((weight / scale + 3) / 2).round().clamp(0, 3).to(torch.uint8).view(-1, 4)
        places = torch.tensor([1, 4, 16, 64], dtype=torch.uint8, device=codes.device)
        self.register_buffer("weight", (codes * places).sum(1, dtype=torch.uint8))
        self.register_buffer("scale", scale)
        self.register_parameter("bias", layer.bias)

    def numbers(self) -> torch.Tensor:
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=self.weight.device)
        codes = (self.weight[:, None] >> shifts) & 3
        return (codes.float() * 2 - 3).view(self.out_features, self.in_features) * self.scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.numbers().to(input.dtype), self.bias)


class TwoBits(backend.Backend):
    layers = (Linear2bit,)

    def quantize_(self, model: nn.Module, spec: Any, skip_modules: Any, compute_dtype: Any, device: Any = None) -> Any:
        for name in quantizable(model, skip_modules):
            model.set_submodule(name, Linear2bit(model.get_submodule(name)))
        return model if device is None else model.to(device)

    def scheme_of(self, layer: Any) -> str:
        return "two_bits"

    def storage(self, layer: Any) -> backend.LinearStorage:
        weights = layer.in_features * layer.out_features
        return backend.LinearStorage(True, weights, layer.weight.numel() + 4 * layer.scale.numel(), 0)

    def shape(self, layer: Any) -> torch.Size:
        return torch.Size((layer.out_features, layer.in_features))

    def dense_weight(self, layer: Any, dtype: torch.dtype) -> torch.Tensor:
        return layer.numbers().to(dtype)


class SquaredHead(nn.Linear):
    """A head that looks at the squares of the states, too."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input + input.square())


@pytest.fixture
def added():
    backend.register(TwoBits(), {"two_bits": Scheme(2)})
    heads.register_head("squared", SquaredHead, Head())
    yield
    del SCHEMES["two_bits"], backend._of_scheme["two_bits"], HEADS["squared"], heads._layers["squared"]
    backend._backend_of_class.cache_clear()


def test_a_scheme_and_a_head_are_added_in_one_file(added, topics, tiny_experiment, tmp_path):
    changes = {"quantization.scheme": "two_bits", "model.head": "squared", "model.pooling": "mean"}
    experiment = tiny_experiment().override(changes)
    before = qk.models.build_classifier(experiment, topics.label_names, device=torch.device("cpu"))
    layers = [module for module in before.modules() if isinstance(module, Linear2bit)]
    assert layers and isinstance(before.classifier, SquaredHead)
    run = qk.finetune(experiment, data=topics, out=tmp_path, progress=False)
    assert all(torch.isfinite(torch.tensor(epoch["loss"])) for epoch in run.training["epochs"])
    texts = topics.test.texts[:8]
    again = qk.load_run(run.path)
    assert torch.equal(torch.tensor(run.predict(texts).logits), torch.tensor(again.predict(texts).logits))
    model, _ = again.load()
    assert any("FusedLinear" in type(module).__name__ for module in model.modules())  # as fast as the kit's own
    plan = qk.memory.plan(experiment, batch=2, length=16, device="T4", labels=4)
    whole = qk.memory.plan(
        experiment.override({"quantization.scheme": "none"}), batch=2, length=16, device="T4", labels=4
    )
    assert plan.total < whole.total
    kinds = {group.stored_as for group in qk.inventory.take(model, experiment).groups}
    assert "two_bits" in kinds
    with pytest.raises(KitError, match="a squared head is no class of transformers"):
        run.merge(tmp_path / "merged", progress=False)
    assert qk.evaluate(run, data=topics, baselines=False, resamples=100, progress=False)["metrics"]["test"]["accuracy"]


def test_what_is_there_is_not_added_again(added):
    with pytest.raises(KitError, match="there is a scheme 'two_bits' already, of TwoBits"):
        backend.register(TwoBits(), {"two_bits": Scheme(2)})
    with pytest.raises(KitError, match="there is a head 'linear' already"):
        heads.register_head("linear", nn.Linear, Head())
    with pytest.raises(KitError, match=r"no quantization scheme 'two_bit'.*'two_bits'"):
        qk.Quantization("two_bit")
    assert dataclasses.replace(qk.Quantization("two_bits")).label == "two_bits"


def test_a_backend_that_lacks_a_method_is_refused():
    class Half(TwoBits):
        storage = backend.Backend.storage

    with pytest.raises(KitError, match="Half lacks storage: a backend defines quantize_"):
        backend.register(Half(), {"half": Scheme(2)})
    assert "half" not in SCHEMES


@pytest.mark.parametrize("scheme", ["none", "nf4", "int4"])
def test_a_model_is_pickled_and_copied_whole(scheme, tiny_experiment, topics):
    changes = {"quantization.scheme": scheme, "model.lean": True, "lora.dropout": 0.0}
    model = qk.models.build(tiny_experiment().override(changes), topics.label_names, device=torch.device("cpu"))
    make_train_and_zero_grad_cheap_(model, [], None)
    batch = {"input_ids": torch.arange(3, 11).view(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.int64)}
    names = {type(module).__name__ for module in model.modules()}
    assert any(name.startswith("Fused") for name in names) and "LeanLayerNorm" in names
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert torch.equal(other(**batch).logits, expected)
            assert {type(module).__name__ for module in other.modules()} == names
            assert other.train().training and not model.training


def test_a_whole_model_is_saved_under_its_own_name(tiny_experiment, topics, tmp_path):
    changes = {"quantization.scheme": "none", "lora": None, "model.pooling": "sequence_classification"}
    model = qk.models.build(tiny_experiment().override(changes), topics.label_names, device=torch.device("cpu"))
    make_train_and_zero_grad_cheap_(model, list(model.parameters()), None)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
    assert "BertForSequenceClassificationWithCheapSteps(" in str(model)
