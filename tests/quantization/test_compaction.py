from __future__ import annotations

import pytest
import torch

from qlora_kit import models
from qlora_kit.quantization.compaction import move_
from qlora_kit.quantization.storage import tensors_of


@pytest.mark.parametrize("scheme", ["nf4", "int8", "int4", "none"])
def test_weights_that_are_moved_keep_their_values_and_what_they_share(tiny_experiment, scheme):
    experiment = tiny_experiment("gpt2", quantization__scheme=scheme)
    model = models.build(experiment, ["a", "b"], device=torch.device("cpu"), pad_token_id=0).eval()
    first = next(model.parameters())
    model.register_buffer("part", first.detach().view(-1)[3:10])  # of another tensor's memory
    ids = torch.arange(1, 9)[None]

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

    before, objects = logits(), [id(weight) for weight in model.parameters()]
    storages = tensors_of(model)
    grouped = [[id(tensor) for tensor in tensors] for tensors in storages.values()]
    old = [tensors[0].untyped_storage() for tensors in storages.values()]  # held, so that no new one takes their place
    size = sum(storage.nbytes() for storage in old)
    move_(model, lambda storage: storage.clone())
    for storage in old:
        storage.fill_(0)  # nothing reads them any more

    assert torch.equal(logits(), before)
    assert [id(weight) for weight in model.parameters()] == objects
    after = tensors_of(model)
    assert [[id(tensor) for tensor in tensors] for tensors in after.values()] == grouped
    assert sum(tensors[0].untyped_storage().nbytes() for tensors in after.values()) == size
    assert model.part.data_ptr() == first.data_ptr() + 3 * first.element_size()
