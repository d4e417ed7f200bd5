"""What is quantized and what is not, counted on a model that was really built."""

from __future__ import annotations

import pytest

import qlora_kit as qk
from qlora_kit import models
from qlora_kit.models.parts import anatomy


def built(method: str):
    experiment = qk.preset(f"minilm_banking77_{method}")
    return models.build(experiment, [f"label {i}" for i in range(77)], pad_token_id=0)


def test_only_the_bases_linear_layers_are_quantized_and_only_adapters_and_head_are_trained():
    model = built("qlora")
    parts = {part.name: part for part in anatomy(model)}
    assert {name for name, part in parts.items() if part.stored_as.endswith("bits")} == {"base, linear layers"}
    assert {name for name, part in parts.items() if part.trained} == {"adapters", "head"}
    linear = parts["base, linear layers"]
    # 6 layers of 4 matrices 384 x 384 and 2 of 384 x 1536; 4.127 bits a parameter and small tables on top.
    assert linear.parameters == 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert 4.127 < linear.bits_per_parameter < 4.2
    assert parts["head"].parameters == 384 * 77
    assert parts["head"].stored_as == parts["adapters"].stored_as == "float32"


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_the_parts_are_all_of_the_model(method: str):
    model = built(method)
    parts = anatomy(model)
    trainable, everything = models.trainable_parameters(model)
    assert sum(part.parameters for part in parts if part.trained) == trainable
    assert sum(part.parameters for part in parts if part.name != "base, buffers") == everything
    assert {part.name for part in parts if part.trained} >= {"head"}
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    assert sum(part.bytes for part in parts) >= sum(t.numel() * t.element_size() for t in tensors)
