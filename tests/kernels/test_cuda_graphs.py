"""What of the CUDA graphs works without a GPU: gradients side by side, batches filled up, and who is refused."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from torch import nn

import qlora_kit as qk
from qlora_kit import models, training
from qlora_kit.config.sections import TrainingSpec
from qlora_kit.kernels import cuda_graphs
from qlora_kit.kernels.host_copies import HostCopies
from qlora_kit.kernels.side_by_side import ALIGNMENT, side_by_side
from qlora_kit.optimizers import FlatAdamW


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.mark.parametrize("max_norm", [0.05, 100.0])
@pytest.mark.parametrize("twice", [True, False])
def test_gradients_side_by_side_are_those_of_autograd_summed_and_clipped(max_norm, twice):
    ours, theirs = net(), net()
    gradients = cuda_graphs.Gradients(list(ours.parameters()))
    assert gradients.twice
    gradients.twice = twice
    for seed in (1, 2):  # accumulated over two batches
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(seed))
        with gradients.summed():
            ours(x).square().mean().backward()
        theirs(x).square().mean().backward()
    norm = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    assert torch.allclose(gradients.clip_(max_norm), norm)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine.grad, other.grad, rtol=1e-5, atol=1e-8)
    gradients.flat.zero_()
    assert not any(weight.grad.any() for weight in ours.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_side_by_side_are_apart_and_aligned(dtype):
    like = [torch.zeros(3, 5), torch.zeros(64), torch.zeros(()), torch.zeros(4, 6).T]
    whole, parts = side_by_side(like, dtype)
    whole.zero_()
    for number, (part, tensor) in enumerate(zip(parts, like, strict=True), start=1):
        assert part.shape == tensor.shape and part.stride() == tensor.stride() and part.dtype == dtype
        assert part.storage_offset() * part.element_size() % ALIGNMENT == 0
        part.fill_(number)
    assert all((part == number).all() for number, part in enumerate(parts, start=1))
    assert int((whole != 0).sum()) == sum(tensor.numel() for tensor in like)


def test_adamw_side_by_side_is_torchs_and_each_takes_over_the_others_state():
    def groups(model):
        first, second = model[0], model[2]
        return [
            {"params": [first.weight, second.weight], "weight_decay": 0.1, "lr": 1e-2},
            {"params": [first.bias, second.bias], "weight_decay": 0.0, "lr": 3e-3},
        ]

    def flat_adamw(model):
        cuda_graphs.Gradients([weight for group in groups(model) for weight in group["params"]])
        return FlatAdamW(groups(model), fused=True)

    def train(model, optimizer, steps):
        for seed in steps:
            x = torch.randn(4, 7, generator=torch.Generator().manual_seed(seed))
            for weight in model.parameters():
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.zero_()
            model(x).square().mean().backward()
            optimizer.step()

    def same(one, other):  # torch rounds the end of a tensor, which is no whole vector, its own way
        both = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in both)

    ours, theirs = net(), net()
    flats, plain = flat_adamw(ours), torch.optim.AdamW(groups(theirs), fused=True)
    train(ours, flats, range(5))
    train(theirs, plain, range(5))
    assert same(ours, theirs) and not same(ours, net())
    again, swapped = net(), net()
    again.load_state_dict(theirs.state_dict())
    swapped.load_state_dict(ours.state_dict())
    resumed, other = flat_adamw(again), torch.optim.AdamW(groups(swapped), fused=True)
    resumed.load_state_dict(copy.deepcopy(plain.state_dict()))
    other.load_state_dict(copy.deepcopy(flats.state_dict()))
    for model, optimizer in ((ours, flats), (theirs, plain), (again, resumed), (swapped, other)):
        train(model, optimizer, range(5, 9))
    assert same(ours, theirs) and same(ours, again) and same(ours, swapped)


def test_adapters_side_by_side_are_saved_and_loaded_in_place(tiny_experiment, tmp_path):
    def adapted():
        experiment = tiny_experiment("gpt2", training__precision="fp32")
        model = models.build(experiment, list("abc"), pad_token_id=0)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        cuda_graphs.Gradients(trained)
        return model, trained, FlatAdamW([{"params": trained}], lr=0.1, fused=True)

    model, trained, optimizer = adapted()
    for weight in trained:
        weight.grad.fill_(1.0)
    optimizer.step()
    models.save_adapter(model, tmp_path / "adapter")
    other, weights, _ = adapted()
    places = [weight.data_ptr() for weight in weights]
    models.load_weights_(other, tmp_path / "adapter")
    assert places == [weight.data_ptr() for weight in weights]
    assert all(torch.equal(one, two) for one, two in zip(trained, weights, strict=True))


def test_adamw_side_by_side_changes_nothing_where_a_gradient_is_not_finite():
    model = net()
    before = copy.deepcopy(model.state_dict())
    cuda_graphs.Gradients(list(model.parameters()))
    optimizer = FlatAdamW([{"params": list(model.parameters())}], fused=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.full((1, 7), torch.inf)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert scaler.get_scale() < 2**16
    model.zero_grad(set_to_none=False)
    scaler.scale(model(torch.ones(1, 7)).sum()).backward()
    scaler.step(optimizer)
    assert not torch.equal(before["0.weight"], model[0].weight)


def test_a_step_that_fails_leaves_the_gradients_where_they_were():
    model = net()
    gradients = cuda_graphs.Gradients(list(model.parameters()))
    with pytest.raises(ZeroDivisionError), gradients.summed():
        model(torch.ones(1, 7)).sum().backward()
        raise ZeroDivisionError
    assert all(w.grad is part for w, part in zip(model.parameters(), gradients.parts, strict=True))
    assert not gradients.flat.any()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_rows_that_fill_a_batch_up_change_neither_loss_nor_gradient(tiny_experiment, name):
    model = models.build(
        tiny_experiment(name, lora__dropout=0.0, training__precision="fp32"), list("abc"), pad_token_id=0
    ).eval()
    batch = {
        "input_ids": torch.arange(10, 22).view(3, 4),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]),
        "labels": torch.tensor([0, 1, 2]),
    }
    seen = []
    for given in (batch, cuda_graphs.pad_rows(batch, 8)):
        model.zero_grad()
        out = model(**given)
        out.loss.backward()
        seen.append((out.loss, out.logits[:3], {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (loss, logits, gradients), (again, filled_logits, filled_gradients) = seen
    assert torch.allclose(loss, again, rtol=1e-5) and torch.allclose(logits, filled_logits, atol=1e-5)
    for key, gradient in gradients.items():
        assert torch.allclose(gradient, filled_gradients[key], rtol=1e-4, atol=1e-7), key
    assert cuda_graphs.pad_rows(batch, 3).keys() == batch.keys() and len(cuda_graphs.pad_rows(batch, 2)["labels"]) == 3
    assert "labels" not in cuda_graphs.pad_rows({k: v for k, v in batch.items() if k != "labels"}, 8)


def test_what_cannot_be_captured_is_known_beforehand(tiny_experiment):
    def why(spec: TrainingSpec, device: str = "cuda", **changes) -> str | None:
        return cuda_graphs.obstacle(
            spec, models.build(tiny_experiment("bert", **changes), list("ab"), pad_token_id=0), device
        )

    assert why(TrainingSpec()) is None
    assert why(TrainingSpec(gradient_checkpointing=True)) is None
    assert "8-bit" in why(TrainingSpec(), quantization__scheme="int8")
    assert "use_reentrant" in why(TrainingSpec(gradient_checkpointing=True, use_reentrant=True))
    assert "none" in why(TrainingSpec(graphs="none"))
    assert "CUDA device" in why(TrainingSpec(), "cpu")
    mixed = net()
    mixed[0].double()
    assert "several dtypes" in cuda_graphs.obstacle(TrainingSpec(), mixed, "cuda")


def test_on_a_cpu_it_says_once_that_steps_run_eagerly(topics, tiny_experiment, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="qlora_kit"):
        run = qk.finetune(tiny_experiment("bert", training__epochs=1), data=topics, out=tmp_path, progress=False)
    assert sum("eagerly" in record.message for record in caplog.records) == 1
    assert run.training["graphs"] is None


def test_the_widths_that_are_captured_are_those_that_come(tiny_experiment, tmp_path):
    lengths = np.random.RandomState(0).randint(3, 90, 500).tolist()
    rows = qk.data.TokenizedDataset([[1] * n for n in lengths], [0] * len(lengths))
    collate = qk.data.collator(0, max_length=128, edges=qk.data.BUCKET_EDGES)
    for padding, accumulation in (("buckets", 1), ("buckets", 3), ("longest", 1)):
        spec = TrainingSpec(batch_size=16, gradient_accumulation=accumulation, padding=padding, epochs=2)
        arguments = training.training_arguments(
            spec, tmp_path, device=torch.device("cpu"), precision="fp32", steps=1, progress=False
        )
        trainer = training.KitTrainer(
            spec=spec,
            lengths=lengths,
            model=net(),
            args=arguments,
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=collate,
        )
        if trainer.order is not None:  # as on a GPU
            trainer.order = copy.copy(trainer.order)
            trainer.order.edges = qk.data.BUCKET_EDGES
        loader, seen = trainer.get_train_dataloader(), set()
        for epoch in range(2):
            if trainer.order is not None:
                trainer.order.set_epoch(epoch)
            seen |= {batch["input_ids"].shape[1] for batch in loader}
        assert seen <= set(trainer.widths()) <= set(qk.data.BUCKET_EDGES)
        assert trainer.widths() == sorted(trainer.widths(), reverse=True)
        if padding == "buckets":
            assert seen == set(trainer.widths())


def mpnets_positions(x):
    """Relative positions as MPNet numbers them in transformers 5.17: on the host."""
    places = torch.arange(x.shape[1], dtype=torch.long)
    return (places[None, :] - places[:, None]).to(x.device).add_(x.shape[1])


@pytest.mark.parametrize("inference", [True, False])
def test_what_the_first_pass_copied_from_the_host_serves_the_capture(inference):
    # The meta device stands for a GPU: what comes from the host, and how often, does not depend on values.
    device = torch.device("meta")
    x = torch.empty(2, 5, device=device)

    def work():
        made = torch.empty(3, device=device).copy_(torch.arange(3))
        slopes = torch.tensor([1.0, 0.5], device=device)  # as BLOOM makes them: moved where no mode would see it
        return mpnets_positions(x), made, slopes, x + torch.tensor(2.0)  # a number of the host is no copy

    with torch.inference_mode(inference):
        with HostCopies(device) as first:
            work()
        places = [[b - a for b in range(5)] for a in range(5)]
        assert [host.tolist() for host, _ in first.noted] == [[0, 1, 2], [1.0, 0.5], places]
        assert all(there.is_meta for _, there in first.noted)
        with Copied(device) as seen, HostCopies(device, first.noted) as again:
            work()
        assert not again.noted and not seen.copies
        # Another tensor than the first time is copied, which a capture refuses.
        with Copied(device) as seen, HostCopies(device, [(torch.zeros(3, dtype=torch.long), x)]):
            torch.arange(3).to(device)
        assert seen.copies == 1


class Copied(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the copies from the host that are really made."""

    def __init__(self, device):
        super().__init__()
        self.copies, self.device = 0, device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        from_host = any(isinstance(a, torch.Tensor) and a.device.type == "cpu" and a.dim() for a in args)
        self.copies += from_host and isinstance(out, torch.Tensor) and out.device.type == self.device.type
        return out
