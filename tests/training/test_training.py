from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from trainings import CLASS_MEANS, CPU, Evil, StopAt, StopAtTheEnd, Watch, nearest_class_means, untimed, weights_of
from transformers import TrainerCallback

import qlora_kit as qk
from qlora_kit import memory, models, training
from qlora_kit.config.sections import TrainingSpec
from qlora_kit.system.devices import _most_resident
from qlora_kit.system.manifest import of
from qlora_kit.training import checkpoints
from qlora_kit.training.summary import _rate, _step_seconds


@pytest.fixture(scope="module")
def finished(topics, tiny, tmp_path_factory):
    """Return a finished tiny run and its experiment."""
    from qlora_kit.config.experiment import Experiment
    from qlora_kit.config.sections import LoraSpec, ModelSpec

    experiment = Experiment(
        name="tiny_bert",
        model=ModelSpec(str(tiny("bert"))),
        lora=LoraSpec(r=4, alpha=8, dropout=0.1),
        training=TrainingSpec(
            epochs=3, batch_size=16, learning_rate=5e-3, threads=1, logging_steps=2, checkpoint_steps=4
        ),
    )
    return qk.finetune(experiment, data=topics, out=tmp_path_factory.mktemp("runs"), progress=False), experiment


def test_a_run_folder_holds_what_the_contracts_say(finished):
    run, experiment = finished
    found = {item.relative_to(run.path).parts[0] for item in run.path.rglob("*") if item.is_file()}
    assert found == {
        "experiment.yaml",
        "adapter",
        "tokenizer",
        "training.json",
        "README.md",
        "environment.json",
        "manifest.json",
        "data",  # the rows were handed over as objects: evaluation needs the run folder alone
        ".lock",
    }
    assert not [item for item in run.path.rglob("*") if item.suffix in (".bin", ".pt", ".pth", ".pkl")]
    record = run.training
    assert record["rows"] == {
        split: len(rows) for split, rows in qk.data.load_saved(run.path / "data").splits().items()
    }
    assert len(record["epochs"]) == 3
    assert record["steps"] == training.total_steps(experiment.training, record["rows"]["train"])
    for epoch in record["epochs"]:
        assert set(epoch["validation"]) == {"accuracy", "f1_macro", "f1_weighted", "loss"}
        assert epoch["timing"]["tokens_per_second"] > epoch["timing"]["samples_per_second"] > 0
        assert epoch["memory"]["peak_bytes"] > 0
    f1 = record["metrics"]["validation"]["f1_macro"]
    assert f1["low"] <= f1["value"] <= f1["high"]
    assert record["metrics"]["validation"]["f1_macro"]["value"] == pytest.approx(
        record["epochs"][-1]["validation"]["f1_macro"]
    )
    assert run.environment["checksums"]["data"] == qk.data.load_saved(run.path / "data").checksum
    assert run.environment["threads"] == 1


def test_the_loss_falls_and_is_the_golden_one(finished):
    """Losses at a fixed seed: a change of these numbers is a change of what the kit trains."""
    run, _ = finished
    losses = [entry["loss"] for entry in run.training["losses"]]
    assert losses[-1] < losses[0]
    assert np.allclose(losses[:4], GOLDEN, rtol=2e-3), losses[:4]


# Rounding differs between processors and versions of torch in the last digits, not in the third.
GOLDEN = [1.7997, 1.8195, 1.7824, 1.8050]


def test_the_plan_of_a_run_is_that_of_its_longest_rows_in_training_and_in_evaluation(topics, tiny_experiment, tmp_path):
    experiment = tiny_experiment("bert", training__max_steps=1)
    texts = tuple(" ".join([text] * 2) for text in topics.validation.texts)
    data = dataclasses.replace(topics, validation=dataclasses.replace(topics.validation, texts=texts))
    run = qk.finetune(experiment, data=data, out=tmp_path, progress=False)
    tokenizer = models.load_tokenizer(experiment.model)
    longest = {
        name: max(len(row) for row in qk.data.tokenize(tokenizer, split.texts, 128, "cut"))
        for name, split in data.splits().items()
    }
    assert longest["train"] < longest["validation"] < 128
    plan = qk.memory.plan(
        run.experiment,
        length=longest["train"],
        evaluation_length=longest["validation"],
        labels=len(data.label_names),
        device="cpu",
    )
    assert run.training["memory"]["planned_bytes"] == plan.evaluation > plan.total
    alike = qk.memory.plan(run.experiment, length=longest["train"], labels=len(data.label_names), device="cpu")
    assert alike.total == plan.total and alike.evaluation < plan.evaluation


def test_real_tokens_are_counted_not_padding(finished, topics):
    run, experiment = finished
    tokenizer = models.load_tokenizer(experiment.model)
    tokens = sum(len(row) for row in qk.data.tokenize(tokenizer, topics.train.texts, 128, "cut"))
    epoch = run.training["epochs"][0]["timing"]
    assert epoch["tokens_per_second"] * epoch["seconds"] == pytest.approx(tokens)
    assert epoch["samples_per_second"] * epoch["seconds"] == pytest.approx(len(topics.train))


@pytest.mark.parametrize("step", [2, 6, 11, 13, 21])
def test_a_run_that_was_cut_off_ends_in_the_same_bits(finished, topics, tmp_path, step):
    run, experiment = finished
    with pytest.raises(KeyboardInterrupt):
        qk.finetune(experiment, data=topics, out=tmp_path, progress=False, callbacks=[StopAt(step)])
    (cut,) = tmp_path.glob("tiny*")
    saved = [checkpoints.step_of(item) for item in checkpoints.listed(cut / "checkpoints")]
    assert not (cut / "training.json").exists()
    with pytest.raises(ValueError, match="no finished run"):
        qk.load_run(cut)
    again = qk.finetune(experiment, data=topics, out=tmp_path, progress=False)
    timing, epochs = again.training["timing"], again.training["epochs"]
    assert timing["resumed_from_step"] == (max(saved) if saved else None)
    # What came before the checkpoint in the epoch that was cut off, nobody timed to the end of it.
    timed = again.training["steps"] - max(saved, default=0) % epochs[0]["step"]
    assert timing["step_seconds"] == pytest.approx(sum(epoch["timing"]["seconds"] for epoch in epochs) / timed)
    one, other = weights_of(run), weights_of(again)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert untimed(again.training) == untimed(run.training)


def test_a_damaged_checkpoint_is_passed_over_with_a_word(finished, topics, tmp_path, caplog):
    run, experiment = finished
    with pytest.raises(KeyboardInterrupt):
        qk.finetune(experiment, data=topics, out=tmp_path, progress=False, callbacks=[StopAt(11)])
    (cut,) = tmp_path.glob("tiny*")
    newest, before = checkpoints.listed(cut / "checkpoints")[:2]
    weights = newest / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    again = qk.finetune(experiment, data=topics, out=tmp_path, progress=False)
    assert "adapter/adapter_model.safetensors is damaged" in caplog.text
    assert again.training["timing"]["resumed_from_step"] == checkpoints.step_of(before)
    assert all(torch.equal(weights_of(run)[name], value) for name, value in weights_of(again).items())


def test_checkpoints_are_whole_and_hold_no_pickle(topics, tiny_experiment, tmp_path):
    # Trap 18: training_args.bin is a pickle, and files are written straight into the checkpoint.
    experiment = tiny_experiment("bert", training__checkpoints="keep")
    run = qk.finetune(experiment, data=topics, out=tmp_path, progress=False)
    kept = checkpoints.listed(run.path / "checkpoints")
    assert len(kept) == 2
    for checkpoint in kept:
        assert checkpoints.problem(checkpoint) is None
        assert not (checkpoint / "training_args.bin").exists()
        for item in checkpoint.rglob("*"):
            if item.suffix in (".pt", ".pth", ".bin"):
                with torch.serialization.safe_globals(_numpy_state()):
                    torch.load(item, weights_only=True)
    assert not list((run.path / "checkpoints").glob(".aside-*"))


def _numpy_state():
    # What transformers allows for numpy's random state.
    return [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32)), type(np.dtype(np.int64))]


def test_a_hostile_pickle_in_a_checkpoint_does_not_run(finished, topics, tmp_path):
    _, experiment = finished
    with pytest.raises(KeyboardInterrupt):
        qk.finetune(experiment, data=topics, out=tmp_path, progress=False, callbacks=[StopAt(11)])
    (cut,) = tmp_path.glob("tiny*")
    target = tmp_path / "unpickled"
    for checkpoint in checkpoints.listed(cut / "checkpoints"):
        with open(checkpoint / "optimizer.pt", "wb") as stream:
            pickle.dump(Evil(target), stream)
        # As an attacker would: with a manifest that agrees.
        sealed = of(checkpoint)
        (checkpoint / checkpoints.MANIFEST).write_text(json.dumps(sealed))
    with pytest.raises(Exception, match=r"[Ww]eights.only|pickle"):
        qk.finetune(experiment, data=topics, out=tmp_path, progress=False)
    assert not target.exists()


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished, topics, tmp_path):
    run, experiment = finished
    again = qk.finetune(experiment, data=topics, out=tmp_path, progress=False)
    assert untimed(again.training) == untimed(run.training)
    other = qk.finetune(experiment.override({"training.seed": 1}), data=topics, out=tmp_path, progress=False)
    assert untimed(other.training)["losses"] != untimed(run.training)["losses"]
    assert {item.name for item in tmp_path.glob("*/")} == {"tiny_bert_seed0", "tiny_bert_seed1"}


class Seen(TrainerCallback):
    """Notes what training begins with, and the rows of each of its batches."""

    def __init__(self) -> None:
        self.rows: list[list[list[int]]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.seed = torch.initial_seed()
        self.trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

        def note(module, args, kwargs):
            if module.training:
                lengths = kwargs["attention_mask"].sum(1).tolist()
                self.rows.append([row[:n] for row, n in zip(kwargs["input_ids"].tolist(), lengths, strict=True)])

        model.get_base_model().register_forward_pre_hook(note, with_kwargs=True)


def seen_in_training(experiment, data, out, **more):
    seen = Seen()
    run = qk.finetune(experiment, data=data, out=out, progress=False, callbacks=[seen], **more)
    return run, seen


@pytest.mark.parametrize("padding", ["buckets", "longest"])
def test_the_seed_is_that_of_the_order_of_rows_and_of_dropout(topics, tiny_experiment, tmp_path, padding):
    def order(seed: int, name: str) -> list:
        experiment = tiny_experiment(
            "bert", training__seed=seed, training__padding=padding, training__max_steps=2, lora__dropout=0.0
        )
        _, seen = seen_in_training(experiment, topics, tmp_path, name=name)
        assert seen.seed == seed  # dropout draws from the generator that it was given to
        return seen.rows

    first, again, other = order(5, "first"), order(5, "again"), order(6, "other")
    assert first == again != other
    spec = TrainingSpec(seed=5)
    arguments = training.training_arguments(spec, tmp_path, device=CPU, precision="fp32", steps=1, progress=False)
    assert arguments.seed == arguments.data_seed == 5


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # Shares of the peak rate at steps 0 to 9: up over the warm-up, then as the schedule has it.
        ({"warmup_steps": 2}, [0, 1 / 2, *(1 - n / 8 for n in range(8))]),
        ({"warmup_ratio": 0.35}, [0, 1 / 4, 2 / 4, 3 / 4, *(1 - n / 6 for n in range(6))]),
        ({"warmup_steps": 0, "warmup_ratio": 0.5}, [1 - n / 10 for n in range(10)]),
        ({"warmup_steps": 2, "schedule": "cosine"}, [0, 1 / 2, *((1 + np.cos(np.pi * n / 8)) / 2 for n in range(8))]),
        ({"warmup_steps": 2, "schedule": "constant_with_warmup"}, [0, 1 / 2, *[1] * 8]),
        ({"schedule": "constant"}, [1] * 10),
    ],
)
def test_the_learning_rate_is_what_warm_up_and_schedule_make_of_it(tmp_path, changes, expected):
    spec = TrainingSpec(learning_rate=0.25, optimizer="sgd", **changes)
    arguments = training.training_arguments(spec, tmp_path, device=CPU, precision="fp32", steps=10, progress=False)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=arguments.learning_rate)
    schedule = transformers.get_scheduler(
        arguments.lr_scheduler_type, optimizer, num_warmup_steps=arguments.warmup_steps, num_training_steps=10
    )
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.25 * share for share in expected])


@pytest.mark.parametrize(
    ("rows", "changes", "steps"),
    [
        (160, {"batch_size": 16, "epochs": 2}, 20),
        (161, {"batch_size": 16, "epochs": 2}, 22),  # the last batch has one row
        (160, {"batch_size": 16, "epochs": 2, "gradient_accumulation": 3}, 8),  # the last step has one batch
        (161, {"batch_size": 16, "epochs": 1, "gradient_accumulation": 10}, 2),
        (160, {"batch_size": 16, "epochs": 0.25}, 3),
        (160, {"batch_size": 16, "epochs": 2, "max_steps": 7}, 7),
        (3, {"batch_size": 16, "epochs": 5}, 5),
    ],
)
def test_steps_are_counted_as_the_trainer_counts_them(topics, tmp_path, rows, changes, steps):
    spec = TrainingSpec(**changes)
    assert training.total_steps(spec, rows) == steps
    settings = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=spec.batch_size, num_train_epochs=spec.epochs, use_cpu=True,
        gradient_accumulation_steps=spec.gradient_accumulation, max_steps=spec.max_steps or -1, report_to="none",
    )  # fmt: skip
    trainer = transformers.Trainer(torch.nn.Linear(1, 1), settings, train_dataset=[{"x": 0}] * rows)
    found = trainer.set_initial_training_values(settings, trainer.get_train_dataloader())
    assert found[-1] == steps


def test_speed_is_that_of_the_epochs_that_were_timed():
    spec = TrainingSpec(batch_size=4, gradient_accumulation=2)
    epochs = {
        1.0: {"epoch_rows": 20, "epoch_seconds": 6.0, "epoch_tokens": 600},  # three steps of up to eight rows
        2.0: {"epoch_rows": 8, "epoch_seconds": 2.0, "epoch_tokens": 100},  # one
    }
    assert _step_seconds(epochs, spec) == 8.0 / 4
    assert _rate(epochs, "epoch_rows") == 28 / 8 and _rate(epochs, "epoch_tokens") == 700 / 8
    assert _step_seconds({}, spec) is None and _rate({}, "epoch_rows") is None


def test_loader_workers_are_as_many_as_were_asked_for(tmp_path):
    for workers in (0, 2):
        arguments = training.training_arguments(
            TrainingSpec(workers=workers), tmp_path, device=CPU, precision="fp32", steps=1,
            progress=False,
        )  # fmt: skip
        assert arguments.dataloader_num_workers == workers


# One step without warm-up and without dropout: what it did can be computed.
ONE_STEP = {
    "training__max_steps": 1,
    "training__logging_steps": 1,
    "training__schedule": "constant",
    "training__warmup_ratio": 0.0,
    "training__optimizer": "sgd",
    "training__learning_rate": 1.0,
    "lora__dropout": 0.0,
    "model__dropout": 0.0,
}


def moved(run, seen):
    """Return how far all trained weights together have moved."""
    after = weights_of(run)
    before = {name.replace(".default", "").replace("modules_to_save.", ""): p for name, p in seen.trained.items()}
    assert before.keys() == after.keys()
    return torch.stack([(after[name] - p).norm() for name, p in before.items()]).norm().item()


def test_gradients_are_clipped_to_the_norm_that_was_asked_for(topics, tiny_experiment, tmp_path):
    norms = {}
    for most in (0.0, 1e-3):
        experiment = tiny_experiment("bert", **ONE_STEP, training__max_grad_norm=most)
        run, seen = seen_in_training(experiment, topics, tmp_path, name=f"{most}")
        (entry,) = run.training["losses"]
        norms[most] = entry["grad_norm"]  # before clipping
        assert entry["grad_norm"] > 0.1
        # SGD at a learning rate of 1 moves the weights by the gradient.
        assert moved(run, seen) == pytest.approx(most or entry["grad_norm"], rel=1e-3)
    assert norms[0.0] == pytest.approx(norms[1e-3])


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_label_smoothing_spreads_its_share_of_the_target_over_all_labels(topics, tiny_experiment, tmp_path, name):
    smoothing = 0.4
    experiment = tiny_experiment(name, **ONE_STEP, training__label_smoothing=smoothing)
    run, seen = seen_in_training(experiment, topics, tmp_path)
    tokenizer = models.load_tokenizer(experiment.model)
    labels = dict(zip(map(tuple, qk.data.tokenize(tokenizer, topics.train.texts, 128, "cut")), topics.train.labels,
                      strict=True))  # fmt: skip
    (batch,) = seen.rows
    model = models.build(experiment, topics.label_names, device=CPU, pad_token_id=tokenizer.pad_token_id).eval()
    with torch.no_grad():
        shares = torch.cat(
            [
                model(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long)).logits
                for row in batch
            ]
        ).log_softmax(-1)
    plain = -shares[torch.arange(len(batch)), [labels[tuple(row)] for row in batch]].mean().item()
    expected = (1 - smoothing) * plain - smoothing * shares.mean().item()
    assert abs(expected - plain) > 1e-3
    assert run.training["losses"][0]["loss"] == pytest.approx(expected, abs=1e-4)


def test_a_run_that_was_cut_off_does_not_go_on_with_other_rows(topics, tiny_experiment, tmp_path, caplog):
    experiment = tiny_experiment("bert", training__epochs=1, training__checkpoint_steps=2)
    with pytest.raises(KeyboardInterrupt):
        qk.finetune(experiment, data=topics, out=tmp_path, progress=False, callbacks=[StopAt(5)])
    labels = (*topics.train.labels[1:], topics.train.labels[0])
    other = dataclasses.replace(topics, train=dataclasses.replace(topics.train, labels=labels))
    run = qk.finetune(experiment, data=other, out=tmp_path, progress=False)
    assert run.training["timing"]["resumed_from_step"] is None
    assert run.environment["checksums"]["data"] == other.checksum != topics.checksum
    assert "held another run; it is now" in caplog.text
    (aside,) = (item for item in tmp_path.iterdir() if item != run.path)
    assert [checkpoints.step_of(item) for item in checkpoints.listed(aside / "checkpoints")] == [4, 2]
    # Nor is a finished run of other rows taken for one of these.
    again = qk.finetune(experiment, data=topics, out=tmp_path, progress=False)
    assert again.environment["checksums"]["data"] == topics.checksum


def test_training_starts_from_the_class_means_where_that_was_asked_for(topics, tiny_experiment, tmp_path):
    experiment = tiny_experiment("bert", **CLASS_MEANS)
    means, score = nearest_class_means(experiment, topics)
    run, seen = seen_in_training(experiment, topics, tmp_path)
    (head,) = (value for name, value in seen.trained.items() if models.is_head_parameter(name))
    assert np.allclose(head.numpy(), means, atol=1e-5)
    assert run.training["metrics"]["validation"]["f1_macro"]["value"] == pytest.approx(score)
    random = qk.finetune(
        experiment.override({"model.head_init": "random"}), data=topics, out=tmp_path, name="random", progress=False
    )
    assert random.training["metrics"]["validation"]["f1_macro"]["value"] < score - 0.1


def test_a_finished_run_is_returned_and_another_is_moved_aside(finished, topics, tmp_path, caplog):
    run, experiment = finished
    here = tmp_path / "runs"
    shutil.copytree(run.path, here / "mine")
    before = (here / "mine" / "training.json").stat().st_mtime_ns
    same = qk.finetune(experiment, data=topics, out=here, name="mine", progress=False)
    assert (same.path / "training.json").stat().st_mtime_ns == before
    qk.finetune(experiment.override({"training.epochs": 1}), data=topics, out=here, name="mine", progress=False)
    assert "held another run" in caplog.text
    (aside,) = [item for item in here.iterdir() if item.name != "mine"]
    kept = qk.load_run(aside)
    assert untimed(kept.training) == untimed(run.training)
    assert qk.load_run(here / "mine").experiment.training.epochs == 1


def test_two_runs_into_one_folder_do_not_mix(finished, topics, tmp_path):
    from qlora_kit.system.files import locked

    _, experiment = finished
    with (
        locked(tmp_path / "tiny_bert_seed0"),
        pytest.raises(ValueError, match="another process is writing into"),
    ):
        qk.finetune(experiment, data=topics, out=tmp_path, progress=False)


def test_bad_input_leaves_no_run_folder(topics, tiny_experiment, tmp_path):
    for changes, message in (
        ({"model__name": "./nowhere"}, "no model folder"),
        ({"lora__target_modules": ["no_such_layer"]}, "no_such_layer"),
        ({"data__too_long": "refuse", "data__max_length": 8}, "token"),
        # Its tokenizer would take 512.
        ({"architecture": "roberta", "data__max_length": 130}, r"data\.max_length is 130: .* has 129 positions"),
    ):
        experiment = tiny_experiment(changes.pop("architecture", "bert"), **changes)
        data = topics
        if "data__max_length" in changes:
            data = dataclasses.replace(topics, spec=experiment.data)
        with pytest.raises(ValueError, match=message):
            qk.finetune(experiment, data=data, out=tmp_path, progress=False)
        assert not list(tmp_path.rglob("experiment.yaml"))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_checkpointing_is_the_users_kind_and_changes_no_loss(topics, tiny_experiment, tmp_path, name, use_reentrant):
    # Trap 5: use_reentrant is reset by the Trainer.
    watch = Watch()
    plain = tiny_experiment(name, training__epochs=1)
    first = qk.finetune(plain, data=topics, out=tmp_path / "plain", progress=False)
    experiment = plain.override({"training.gradient_checkpointing": True, "training.use_reentrant": use_reentrant})
    second = qk.finetune(experiment, data=topics, out=tmp_path / "checkpointed", progress=False, callbacks=[watch])
    functions = [
        m._gradient_checkpointing_func for m in watch.model.modules() if hasattr(m, "_gradient_checkpointing_func")
    ]
    assert functions
    assert {function.keywords["use_reentrant"] for function in functions} == {use_reentrant}
    losses = [[entry["loss"] for entry in run.training["losses"]] for run in (first, second)]
    assert np.allclose(*losses, rtol=1e-4)


def test_adapters_and_head_have_learning_rates_of_their_own(topics, tiny_experiment, tmp_path):
    watch = Watch()
    experiment = tiny_experiment(
        "bert", training__head_learning_rate=0.02, training__weight_decay=0.1, training__epochs=1
    )
    qk.finetune(experiment, data=topics, out=tmp_path, progress=False, callbacks=[watch])
    groups = [
        (group["initial_lr"], group["weight_decay"], sum(p.numel() for p in group["params"]))
        for group in watch.optimizer.param_groups
    ]
    trainable = sum(p.numel() for p in watch.model.parameters() if p.requires_grad)
    assert sum(count for *_, count in groups) == trainable
    assert {(rate, decay) for rate, decay, _ in groups} == {(5e-3, 0.1), (0.02, 0.1), (0.02, 0.0)}
    (bias,) = [count for rate, decay, count in groups if (rate, decay) == (0.02, 0.0)]
    assert bias == len(topics.label_names)


def test_one_device_a_process(topics, tiny_experiment, tmp_path):
    # Trap 6: device_map="auto" spreads the model; several GPUs would mean DataParallel.
    watch = Watch()
    qk.finetune(tiny_experiment("bert", training__epochs=1), data=topics, out=tmp_path, callbacks=[watch])
    assert watch.args.n_gpu <= 1
    assert {parameter.device for parameter in watch.model.parameters()} == {models.default_device()}
    assert getattr(watch.model.get_base_model().base, "hf_device_map", {"": 0}).keys() == {""}


def test_a_gpu_that_the_trainer_would_not_take_is_refused():
    for device in (CPU, torch.device("cuda"), torch.device("cuda", 0)):
        assert training.trainers_device(device) == device
    with pytest.raises(ValueError, match=r"the current GPU is cuda:1, .* CUDA_VISIBLE_DEVICES"):
        training.trainers_device(torch.device("cuda", 1))


def test_paged_optimizers_have_a_plain_one_off_cuda(caplog):
    # Trap 10: paged optimizers exist on CUDA only.
    assert training.resolve_optimizer("paged_adamw_8bit", CPU) == "adamw_8bit"
    assert "paged_adamw_8bit exists on CUDA only; this run takes adamw_8bit" in caplog.text
    assert training.resolve_optimizer("paged_adamw_32bit", CPU) == "adamw_torch"
    assert training.resolve_optimizer("paged_adamw_8bit", torch.device("cuda", 0)) == "paged_adamw_8bit"


def test_an_8_bit_optimizer_trains_and_resumes_on_the_cpu(topics, tiny_experiment, tmp_path):
    experiment = tiny_experiment("gpt2", training__optimizer="paged_adamw_8bit", training__checkpoint_steps=4)
    whole = qk.finetune(experiment, data=topics, out=tmp_path / "whole", progress=False)
    assert whole.training["optimizer"] == "adamw_8bit"
    with pytest.raises(KeyboardInterrupt):
        qk.finetune(experiment, data=topics, out=tmp_path / "cut", progress=False, callbacks=[StopAt(6)])
    again = qk.finetune(experiment, data=topics, out=tmp_path / "cut", progress=False)
    assert all(torch.equal(weights_of(whole)[name], value) for name, value in weights_of(again).items())


def test_8_bit_optimizers_keep_embeddings_in_32_bits_and_later_runs_as_they_are(topics, tiny_experiment, tmp_path):
    def kept(name: str, **changes) -> dict[str, torch.dtype]:
        experiment = tiny_experiment("bert", training__optimizer="adamw_8bit", training__max_steps=1, **changes)
        watch = Watch()
        qk.finetune(experiment, data=topics, out=tmp_path, name=name, progress=False, callbacks=[watch])
        # The plan counts what there is, byte for byte.
        tensors = [t for state in watch.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        plan = memory.plan(experiment, labels=6, device="cpu")
        assert plan.parts["optimizer"] == sum(held.values())
        return {
            name: watch.optimizer.state[parameter]["state1"].dtype
            for name, parameter in watch.model.named_parameters()
            if parameter.requires_grad and parameter.numel() >= 4096
        }

    full = kept("full", lora=None, quantization__scheme="none")
    assert {name.split(".")[-2] for name in full} == {"word_embeddings", "position_embeddings"}
    assert set(full.values()) == {torch.float32}
    assert set(kept("lora", lora__r=128).values()) == {torch.uint8}


def test_an_epochs_loss_is_the_mean_over_its_steps(topics, tiny_experiment, tmp_path):
    each, three = (
        qk.finetune(
            tiny_experiment("bert", training__logging_steps=every),
            data=topics,
            out=tmp_path,
            name=f"{every}",
            progress=False,
        ).training
        for every in (1, 3)
    )
    ends = [0, *(epoch["step"] for epoch in each["epochs"])]
    means = [np.mean([row["loss"] for row in each["losses"][i:j]]) for i, j in itertools.pairwise(ends)]
    assert all(np.diff(ends) % 3)  # so that the last loss of an epoch is that of fewer steps
    for record in (each, three):
        assert [epoch["loss"] for epoch in record["epochs"]] == pytest.approx(means, abs=1e-4)
    # A run that was cut off in its second epoch has the same losses: none from before its checkpoint is lost.
    experiment = tiny_experiment("bert", training__logging_steps=3)
    with pytest.raises(KeyboardInterrupt):
        qk.finetune(experiment, data=topics, out=tmp_path, name="cut", progress=False, callbacks=[StopAt(13)])
    again = qk.finetune(experiment, data=topics, out=tmp_path, name="cut", progress=False).training
    assert again["losses"] == three["losses"] and again["timing"]["resumed_from_step"] == ends[1]


def test_evaluation_has_a_loss(finished):
    # Trap 11: PEFT hides the labels from the Trainer, and eval_loss is missing.
    run, _ = finished
    assert all(np.isfinite(epoch["validation"]["loss"]) for epoch in run.training["epochs"])


def test_threads_are_set_and_recorded(topics, tiny_experiment, tmp_path):
    # Trap 21: sums depend on the number of threads.
    before = torch.get_num_threads()
    try:
        experiment = tiny_experiment("bert", training__threads=2, training__max_steps=2)
        run = qk.finetune(experiment, data=topics, out=tmp_path, progress=False)
        assert torch.get_num_threads() == run.environment["threads"] == 2
    finally:
        torch.set_num_threads(before)


def test_only_arguments_that_old_and_new_transformers_share_are_used():
    # Trap 22: names changed between 5.17 and 5.24.
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(training.training_arguments))
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "TrainingArguments"
    ]
    used = {keyword.arg for keyword in calls[0].keywords}
    gone_or_new = {
        "group_by_length", "train_sampling_strategy", "activation_checkpointing", "activation_checkpointing_kwargs",
        "gradient_checkpointing", "gradient_checkpointing_kwargs", "warmup_ratio", "no_cuda", "evaluation_strategy",
        "overwrite_output_dir", "save_safetensors", "logging_dir", "restore_callback_states_from_checkpoint",
    }  # fmt: skip
    assert used and not used & gone_or_new


@pytest.mark.parametrize(("own", "given", "rows"), [(None, None, 16), (5, None, 5), (5, 7, 7)])
def test_an_evaluation_has_the_rows_that_were_asked_for(tmp_path, own, given, rows):
    spec = TrainingSpec(batch_size=16, eval_batch_size=own)
    arguments = training.training_arguments(
        spec, tmp_path, device=CPU, precision="fp32", steps=1, progress=False, eval_rows=given
    )
    assert arguments.per_device_eval_batch_size == rows


def test_buckets_pad_less_than_shuffled_batches(topics, tiny_experiment, tmp_path):
    seen = {}
    for padding in ("buckets", "longest", "max_length"):
        experiment = tiny_experiment("bert", training__padding=padding, training__epochs=1, data__max_length=64)
        watch = Watch()

        class Count(TrainerCallback):
            cells = 0

            def on_train_begin(self, args, state, control, model=None, **kwargs):
                def count(module, args, kwargs):
                    Count.cells += kwargs["input_ids"].numel()

                model.get_base_model().register_forward_pre_hook(count, with_kwargs=True)

        qk.finetune(
            experiment,
            data=dataclasses.replace(topics, spec=experiment.override({"data.name": "memory"}).data),
            out=tmp_path / padding,
            progress=False,
            callbacks=[Count(), watch],
        )
        seen[padding] = Count.cells
    assert seen["buckets"] < seen["longest"] < seen["max_length"]


def test_a_loss_that_is_not_finite_stops_the_run_and_says_what_to_try(topics, tiny_experiment, tmp_path):
    experiment = tiny_experiment(
        "bert", training__learning_rate=1e30, training__warmup_ratio=0.0, training__max_grad_norm=0
    )
    with pytest.raises(training.TrainingError, match=r"at step \d+ \(learning rate \de\+29\)\. Try a learning rate"):
        qk.finetune(experiment, data=topics, out=tmp_path, progress=False)
    assert not list(tmp_path.rglob("training.json"))


def test_the_best_epoch_is_kept_on_wish_and_training_stops_early(topics, tiny_experiment, tmp_path):
    experiment = tiny_experiment(
        "bert", training__epochs=12, training__keep_best=True, training__early_stopping=2, training__learning_rate=0.02
    )
    run = qk.finetune(experiment, data=topics, out=tmp_path, progress=False)
    scores = {epoch["step"]: epoch["validation"]["f1_macro"] for epoch in run.training["epochs"]}
    assert scores[run.training["best_step"]] == max(scores.values())
    assert run.training["metrics"]["validation"]["f1_macro"]["value"] == pytest.approx(max(scores.values()))


STOPS_EARLY = {
    "training__epochs": 12,
    "training__keep_best": True,
    "training__early_stopping": 3,
    "training__learning_rate": 0.02,
}


@pytest.mark.parametrize(
    ("changes", "cut"),
    [
        (STOPS_EARLY, StopAt(22)),
        (STOPS_EARLY, StopAtTheEnd()),
        ({"training__max_steps": 6}, StopAtTheEnd()),
        ({"training__epochs": 1.5}, StopAtTheEnd()),
        ({"training__max_steps": 6, "training__checkpoint_steps": 3}, StopAtTheEnd()),
    ],
)
def test_a_run_that_is_cut_off_ends_where_it_would_have_ended(topics, tiny_experiment, tmp_path, changes, cut):
    experiment = tiny_experiment("bert", **changes)
    whole = qk.finetune(experiment, data=topics, out=tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        qk.finetune(experiment, data=topics, out=tmp_path / "cut", progress=False, callbacks=[cut])
    again = qk.finetune(experiment, data=topics, out=tmp_path / "cut", progress=False)
    assert again.training["timing"]["resumed_from_step"]
    assert again.training["steps"] == whole.training["steps"]
    assert again.training["best_step"] == whole.training["best_step"]
    one, other = weights_of(whole), weights_of(again)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("file", ["données.csv", f"{'long' * 40}.csv"])
def test_a_presets_run_on_a_file_of_any_name_has_a_name(tmp_path, file):
    path = tmp_path / file
    path.write_text("text,label\n" + "".join(f"{word} {i},{word}\n" for i in range(10) for word in ("card", "loan")))
    data = qk.text_classification(str(path), test=0.2, validation=0.2)
    name = training.with_data(qk.preset("minilm_banking77_qlora"), data).name
    assert name.startswith("minilm_") and name.endswith("_qlora") and name.isascii()


def test_what_an_experiment_asks_of_its_data_holds_for_data_that_is_handed_over(topics, tiny_experiment, tmp_path):
    # The longest of these texts has more than 12 tokens.
    experiment = tiny_experiment("bert", training__max_steps=1, data__max_length=12, data__too_long="refuse")
    with pytest.raises(qk.KitError, match=r"more than data\.max_length=12"):
        qk.finetune(experiment, data=topics, out=tmp_path / "runs", progress=False)
    with pytest.raises(qk.KitError, match=r"data\.split_seed is 1 in the experiment and 0 in the data"):
        qk.finetune(experiment.override({"data.split_seed": 1}), data=topics, out=tmp_path / "runs", progress=False)
    assert not list((tmp_path / "runs").glob("*/experiment.yaml"))
    run = qk.finetune(experiment.override({"data.too_long": "cut"}), data=topics, out=tmp_path, progress=False)
    assert run.experiment.data == dataclasses.replace(topics.spec, max_length=12)
    again = qk.finetune(run.experiment, data=qk.data.load_saved(run.path / "data"), out=tmp_path, progress=False)
    assert again.path == run.path  # the same run, found finished
    with pytest.raises(qk.KitError, match=r"data\.limit is 20 in the experiment"):
        qk.search(experiment.override({"data.limit": 20}), trials=1, data=topics, out=tmp_path / "runs")


def test_no_step_is_saved_twice(topics, tiny_experiment, tmp_path):
    experiment = tiny_experiment(
        "bert", training__max_steps=6, training__checkpoint_steps=3, training__checkpoints="keep"
    )
    run = qk.finetune(experiment, data=topics, out=tmp_path, progress=False)
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == ["checkpoint-3", "checkpoint-6"]


def test_the_best_epoch_is_found_in_a_folder_that_was_moved(topics, tiny_experiment, tmp_path):
    experiment = tiny_experiment("bert", **STOPS_EARLY)
    whole = qk.finetune(experiment, data=topics, out=tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        qk.finetune(experiment, data=topics, out=tmp_path / "here", progress=False, callbacks=[StopAtTheEnd()])
    (tmp_path / "here").rename(tmp_path / "there")
    again = qk.finetune(experiment, data=topics, out=tmp_path / "there", progress=False)
    assert again.training["best_step"] < again.training["steps"]
    assert again.training["metrics"]["validation"]["f1_macro"] == whole.training["metrics"]["validation"]["f1_macro"]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_two_batches_of_8_are_one_of_16(topics, tiny_experiment, tmp_path, name, smoothing):
    changes = {
        "model__pooling": "sequence_classification",
        "model__dropout": 0.0,
        "lora__dropout": 0.0,
        "training__padding": "longest",
        "training__label_smoothing": smoothing,
        "training__max_steps": 4,
        "training__logging_steps": 1,
    }
    one = qk.finetune(tiny_experiment(name, **changes), data=topics, out=tmp_path / "16", progress=False)
    halves = {"training__batch_size": 8, "training__gradient_accumulation": 2}
    two = qk.finetune(tiny_experiment(name, **changes, **halves), data=topics, out=tmp_path / "8", progress=False)
    for key in ("loss", "grad_norm"):
        expected = [entry[key] for entry in one.training["losses"]]
        assert [entry[key] for entry in two.training["losses"]] == pytest.approx(expected, rel=2e-3)


def test_a_validation_loss_is_the_plain_one_whatever_the_training_smooths(topics, tiny_experiment, tmp_path):
    losses = {}
    for smoothing in (0.0, 0.4):
        experiment = tiny_experiment("bert", training__label_smoothing=smoothing, training__learning_rate=0.05)
        found = qk.finetune(experiment, data=topics, out=tmp_path / str(smoothing), progress=False).training
        at_the_end = found["metrics"]["validation"]["loss"]["value"]
        assert found["epochs"][-1]["validation"]["loss"] == pytest.approx(at_the_end, rel=1e-5)
        losses[smoothing] = found["losses"][0]["loss"]
    assert losses[0.0] != losses[0.4]


def test_full_fine_tuning_trains_everything_and_is_restored(topics, tiny_experiment, tmp_path):
    experiment = tiny_experiment("bert", quantization__scheme="none", lora=None, training__epochs=1)
    run = qk.finetune(experiment, data=topics, out=tmp_path, progress=False)
    assert run.training["parameters"]["trainable"] == run.training["parameters"]["all"]
    assert (run.path / "adapter" / "model.safetensors").is_file()
    logits = run.predict(topics.validation.texts).logits
    score = qk.evaluation.compute_metrics(logits, topics.validation.labels)["f1_macro"]
    assert score == pytest.approx(run.training["metrics"]["validation"]["f1_macro"]["value"])


def test_predictions_do_not_depend_on_the_batch(finished, topics):
    run, _ = finished
    texts = topics.test.texts
    by_size = [run.predict(texts, batch_size=size).logits for size in (1, 7, 64)]
    assert np.allclose(by_size[0], by_size[1], atol=1e-5)
    assert np.allclose(by_size[0], by_size[2], atol=1e-5)
    with pytest.raises(ValueError, match="list of texts"):
        run.predict("one text")
    with pytest.raises(ValueError, match="text 1 is ' '"):
        run.predict(["a", " "])
    assert run.predict([]).labels == []


def test_no_room_on_the_disk_is_one_clear_message(finished, topics, tmp_path, monkeypatch):
    import errno
    import os

    run, experiment = finished
    real = os.fsync

    def full(descriptor):
        if training_json_is_next[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor)

    training_json_is_next = [False]

    class Fill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            training_json_is_next[0] = state.global_step >= 8

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="no room left on the disk"):
        qk.finetune(experiment, data=topics, out=tmp_path, progress=False, callbacks=[Fill()])
    training_json_is_next[0] = False
    monkeypatch.setattr(os, "fsync", real)
    again = qk.finetune(experiment, data=topics, out=tmp_path, progress=False)
    assert again.training["timing"]["resumed_from_step"] == 4
    assert all(torch.equal(weights_of(run)[name], value) for name, value in weights_of(again).items())


@pytest.mark.long
def test_peak_memory_is_this_processs_own():
    held = np.ones(2**27)  # 1 GiB, which the process that is measured does not have
    code = "from qlora_kit.system import devices; print(devices._most_resident())"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert 2**26 < int(result.stdout) < _most_resident() - held.nbytes // 2
