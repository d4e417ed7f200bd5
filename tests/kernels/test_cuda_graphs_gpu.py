"""CUDA graphs: the same mathematics as eager steps, and what happens where they can't be had. `pytest -m gpu`."""

from __future__ import annotations

import gc
import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from trainings import StopAt, Watch

import qlora_kit as qk
from qlora_kit import memory, models, training
from qlora_kit.kernels import cuda_graphs
from qlora_kit.kernels.randomness import checkpoint_contexts

pytestmark = pytest.mark.gpu
# The presets' optimizer: one launch for all adapters.
NO_DROPOUT = {"lora__dropout": 0.0, "model__dropout": 0.0, "training__optimizer": "adamw_torch_fused"}
# 50 steps and more: 154 rows by 16, over buckets of several widths, the last batch of each epoch short.
LONG = {"training__epochs": 6, "training__logging_steps": 1, "training__learning_rate": 1e-3}


def losses_of(run) -> np.ndarray:
    return np.array([entry["loss"] for entry in run.training["losses"]])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_fifty_steps_as_graphs_are_those_of_eager_steps(
    topics, tiny_experiment, tmp_path, name, precision, accumulation
):
    experiment = tiny_experiment(
        name, training__precision=precision, training__gradient_accumulation=accumulation, **NO_DROPOUT, **LONG
    )
    if accumulation > 1:
        experiment = experiment.override({"training.epochs": 12})
    eager = qk.finetune(
        experiment.override({"training.graphs": "none"}), data=topics, out=tmp_path / "eager", progress=False
    )
    run = qk.finetune(experiment, data=topics, out=tmp_path / "graphs", progress=False)
    assert eager.training["graphs"] is None
    assert run.training["graphs"]["captured"] > 2 and run.training["graphs"]["problem"] is None
    assert len(losses_of(run)) >= 50
    # A last bit of bf16 is 2**-8 of a value. The two begin to differ at an epoch's last batch: see the next test.
    assert np.allclose(losses_of(run), losses_of(eager), rtol=4e-3 if precision == "bf16" else 1e-3)
    one, other = (r.training["metrics"]["validation"]["loss"] for r in (run, eager))
    assert one == pytest.approx(other, rel=2e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_graphs_step_is_the_eager_step_to_the_last_bit(
    topics, tiny_experiment, tmp_path, monkeypatch, name, precision
):
    """From equal weights; a batch that is filled up adds its zeros in another order, in fp32."""
    step, seen = training.KitTrainer.training_step, []

    def both(trainer, model, inputs, *rest):
        captured, flat = trainer.graphs, trainer.gradients.flat
        if not trainer.prepared:
            return step(trainer, model, inputs, *rest)
        trainer.graphs = None
        loss, gradient = step(trainer, model, dict(inputs), *rest).clone(), flat.clone()
        trainer.graphs = captured
        flat.zero_()
        replayed = step(trainer, model, inputs, *rest)
        apart = float((gradient - flat).abs().max() / flat.abs().max())
        seen.append((len(inputs["input_ids"]), bool(loss == replayed), apart))
        return replayed

    monkeypatch.setattr(training.KitTrainer, "training_step", both)
    experiment = tiny_experiment(name, training__precision=precision, **NO_DROPOUT, **LONG)
    run = qk.finetune(experiment, data=topics, out=tmp_path, progress=False)
    assert run.training["graphs"]["captured"] > 2 and len(seen) >= 50
    full = experiment.training.batch_size
    assert all(same and apart == 0.0 for rows, same, apart in seen if rows == full)
    short = [apart for rows, _, apart in seen if rows < full]
    assert short and max(short) < 1e-6


@pytest.mark.parametrize("changes", [{"training__gradient_checkpointing": True}, {"quantization__scheme": "int4"},
                                     {"training__gradient_checkpointing": True, "training__gradient_accumulation": 3},
                                     {"lora__bias": "all"},
                                     {"lora": None, "quantization__scheme": "none"}])  # fmt: skip
def test_other_ways_of_training_are_those_of_eager_steps(topics, tiny_experiment, tmp_path, changes):
    rate = {"training__learning_rate": 1e-4} if "lora" in changes else {}
    # fp16: in bf16 one flip of a last bit is 0.4% of a logit.
    settings = {"training__precision": "fp16", "model__dropout": 0.0, **LONG, **rate}
    if "lora" not in changes:
        settings["lora__dropout"] = 0.0
    experiment = tiny_experiment("gpt2", **settings).override({k.replace("__", "."): v for k, v in changes.items()})
    eager = qk.finetune(
        experiment.override({"training.graphs": "none"}), data=topics, out=tmp_path / "eager", progress=False
    )
    run = qk.finetune(experiment, data=topics, out=tmp_path / "graphs", progress=False)
    assert run.training["graphs"]["captured"] > 2 and run.training["graphs"]["problem"] is None
    assert np.allclose(losses_of(run), losses_of(eager), rtol=1e-3)


def test_a_run_that_is_cut_off_goes_on_across_graphs(topics, tiny_experiment, tmp_path):
    experiment = tiny_experiment("gpt2", training__precision="fp16", training__checkpoint_steps=7, **NO_DROPOUT, **LONG)
    whole = qk.finetune(experiment, data=topics, out=tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        qk.finetune(experiment, data=topics, out=tmp_path / "cut", progress=False, callbacks=[StopAt(25)])
    again = qk.finetune(experiment, data=topics, out=tmp_path / "cut", progress=False)
    assert again.training["timing"]["resumed_from_step"] == 21
    assert np.allclose(losses_of(again), losses_of(whole), rtol=1e-3)


def test_dropout_differs_from_replay_to_replay_and_is_the_same_when_recomputed():
    device = torch.device("cuda")
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.ones((), device=device)) for _ in range(3)]
    gradients = cuda_graphs.Gradients(weights)

    def work(given):
        x = given["x"]
        for weight in weights:
            x = checkpoint(
                lambda x, w=weight: nn.functional.dropout(x, 0.5) * w, x,
                use_reentrant=False, preserve_rng_state=False, context_fn=checkpoint_contexts,
            )  # fmt: skip
        loss = x.sum()
        with gradients.summed():
            loss.backward()
        return loss.detach()

    captured = cuda_graphs.Graphs(device)
    inputs = {"x": torch.ones(4096, device=device)}
    captured.prepare("step", work, [inputs])
    assert len(captured) == 1 and captured.problem is None
    seen = set()
    for _ in range(20):
        gradients.flat.zero_()
        loss = captured.run("step", work, inputs)
        # Each weight is 1, so the loss is also its own derivative by each, if both passes dropped the same.
        for weight in weights:
            assert torch.allclose(weight.grad, loss)
        seen.add(loss.item())
    assert len(seen) > 10


def test_a_graph_that_goes_takes_nothing_from_others():
    device = torch.device("cuda")
    torch.manual_seed(0)
    one, other = torch.randn(64, 8192, device=device), torch.randn(8192, 64, device=device)
    inputs = {"x": one}
    first, second = cuda_graphs.Graphs(device), cuda_graphs.Graphs(device)
    for captured in (first, second):  # a product that is split, which takes cuBLAS's workspace
        captured.prepare("product", lambda given: given["x"] @ other, [inputs])
    assert first.problem is None and second.problem is None
    wanted = one @ other
    del first, captured
    gc.collect()
    torch.cuda.empty_cache()
    filling = [torch.full((2**20,), 7.0, device=device) for _ in range(64)]
    assert torch.allclose(second.run("product", lambda given: given["x"] @ other, inputs), wanted, rtol=1e-3)
    assert all((block == 7.0).all() for block in filling)
    third = cuda_graphs.Graphs(device)
    assert third._stream != second._stream


def test_an_operation_that_asks_the_host_runs_eagerly_and_is_told_once(topics, tiny_experiment, tmp_path, caplog):
    class Asking(Watch):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.register_forward_hook(lambda module, given, out: float(out.logits.sum()) and None)

    experiment = tiny_experiment("bert", training__precision="bf16")
    with caplog.at_level(logging.WARNING, logger="qlora_kit"):
        run = qk.finetune(experiment, data=topics, out=tmp_path, progress=False, callbacks=[Asking()])
    assert sum("cannot be captured" in record.message for record in caplog.records) == 1
    assert run.training["graphs"]["captured"] == 0 and run.training["graphs"]["problem"]
    assert losses_of(run)[-1] < losses_of(run)[0]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_predictions_as_graphs_are_those_of_eager_passes(topics, tiny_experiment, tmp_path, name):
    run = qk.finetune(tiny_experiment(name, training__precision="fp16"), data=topics, out=tmp_path, progress=False)
    texts = list(topics.test.texts)
    first = run.predict(texts).logits  # each shape for the first time: eagerly
    assert np.allclose(run.predict(texts).logits, first, atol=1e-2)  # captured
    assert np.allclose(run.predict(texts).logits, first, atol=1e-2)  # replayed
    assert np.allclose(run.predict(texts, batch_size=1).logits, first, atol=1e-2)
    model, _ = run.load()
    assert len(cuda_graphs.graphs_of_model(model, models.default_device())) > 0
    with model.disable_adapter():
        plain = run.predict(texts).logits
        assert not np.allclose(plain, first, atol=1e-2)
        assert np.allclose(run.predict(texts).logits, plain, atol=1e-2)
    assert np.allclose(run.predict(texts).logits, first, atol=1e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_graphs_take_no_more_memory_than_planned(tmp_path, checkpointing):
    experiment = qk.preset("dialogpt-medium_banking77_qlora").override(
        {
            "model.name": "shape:dialogpt-medium",
            "model.random_weights": True,
            "training.gradient_checkpointing": checkpointing,
            "training.max_steps": 12,
            "data.limit": 1000,
            "tracking.wandb": "none",
        }
    )
    run = qk.finetune(experiment, out=tmp_path, progress=False)
    taken = run.training["memory"]
    data = qk.data.load(experiment.data)
    tokenizer = models.load_tokenizer(experiment.model)
    longest = max(len(row) for row in qk.data.tokenize(tokenizer, data.train.texts, 128, "cut"))
    width = qk.data.bucket_width(longest)
    plan = memory.plan(experiment, length=width, labels=len(data.label_names))
    assert run.training["graphs"]["captured"] > 4
    assert plan.evaluation < plan.total
    assert taken["peak_bytes"] <= 1.02 * plan.total
    weights = sum(plan.parts.get(part, 0) for part in memory.WEIGHTS)
    assert run.training["graphs"]["start_bytes"] <= 1.05 * (plan.reserved - weights)
    assert taken["reserved_bytes"] == pytest.approx(max(plan.reserved, plan.evaluation), rel=0.1)


def test_steps_are_captured_where_there_is_hardly_more_room_than_the_plan_announces(tmp_path):
    class Cramped(Watch):
        def on_train_begin(self, args, state, control, **kwargs):
            torch.cuda.empty_cache()
            share = 1.15 * plan.reserved / torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(share)

    experiment = qk.preset("dialogpt-medium_banking77_qlora").override(
        {
            "model.name": "shape:dialogpt-medium",
            "model.random_weights": True,
            "training.batch_size": 32,
            "training.max_steps": 12,
            "data.limit": 1000,
            "tracking.wandb": "none",
        }
    )
    plan = memory.plan(experiment, length=128, labels=77)
    try:
        run = qk.finetune(experiment, out=tmp_path, progress=False, callbacks=[Cramped()])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert run.training["graphs"]["captured"] > 4 and run.training["graphs"]["problem"] is None
