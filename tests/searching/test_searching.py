"""Hyperparameter search: real trials of tiny models, killed and gone on with, and never a look at test rows."""

from __future__ import annotations

import csv
import dataclasses
import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from trainings import CLASS_MEANS, nearest_class_means

import qlora_kit as qk
from qlora_kit import models, searching, training
from qlora_kit.cli import main as cli
from qlora_kit.config.experiment import Experiment
from qlora_kit.searching.search import _check
from qlora_kit.searching.trial import Searched, _Searcher
from qlora_kit.system import files
from qlora_kit.system.files import write_text
from qlora_kit.system.parsing import read_json
from qlora_kit.training.prepare import PreparedModel

CPU = torch.device("cpu")
SPACE = {"training.learning_rate": (1e-4, 3e-2, "log"), "lora.r": [2, 4, 8], "training.batch_size": [8, 16]}


@pytest.fixture
def start(tiny_experiment):
    return tiny_experiment("bert", quantization__scheme="nf4", training__epochs=1, tracking__wandb="none")


def figures(search: qk.Search) -> list:
    return [(trial["parameters"], trial["state"], trial["epochs"], trial["error"]) for trial in search.trials]


@pytest.mark.long
def test_the_best_trial_is_what_finetune_reaches_with_its_settings(start, topics, tmp_path):
    start = start.override({"training.epochs": 2})
    found = qk.search(start, SPACE, trials=3, data=topics, out=tmp_path, progress=False)
    assert [trial["state"] for trial in found.trials] == ["complete"] * 3
    # The experiment as it is comes first, and each trial has its own settings.
    assert found.trials[0]["parameters"] == {
        "training.learning_rate": start.training.learning_rate,
        "lora.r": start.lora.r,
        "training.batch_size": start.training.batch_size,
    }
    assert len({str(trial["parameters"]) for trial in found.trials}) == 3
    assert found.best.data == topics.spec
    assert found.best_trial["f1_macro"] == max(trial["f1_macro"] for trial in found.trials)
    assert Experiment.from_yaml(found.path / "best.yaml") == found.best
    # Whatever was trained before it: each trial's model is made anew.
    for trial in found.trials:
        run = qk.finetune(
            start.override(trial["parameters"]), data=topics, out=tmp_path, name=f"run{trial['number']}", progress=False
        )
        epochs = [epoch["validation"]["f1_macro"] for epoch in run.training["epochs"]]
        assert epochs == trial["epochs"]
    assert not (found.path / "checkpoints").exists()


@pytest.mark.long
def test_a_trial_stops_early_where_finetune_does(start, topics, tmp_path):
    start = start.override(
        {"training.epochs": 8, "training.keep_best": True, "training.early_stopping": 1, "training.learning_rate": 0.02}
    )
    space = {"training.learning_rate": [0.02, 0.01]}
    found = qk.search(start, space, trials=4, prune=False, data=topics, out=tmp_path, progress=False)
    runs = {}
    for rate in space["training.learning_rate"]:
        experiment = start.override({"training.learning_rate": rate})
        runs[rate] = qk.finetune(experiment, data=topics, out=tmp_path, name=f"{rate}", progress=False)
    assert {trial["parameters"]["training.learning_rate"] for trial in found.trials} == runs.keys()
    assert min(len(run.training["epochs"]) for run in runs.values()) < 8
    for trial in found.trials:
        run = runs[trial["parameters"]["training.learning_rate"]]
        epochs = [epoch["validation"]["f1_macro"] for epoch in run.training["epochs"]]
        assert trial["epochs"] == np.maximum.accumulate(epochs).tolist()  # a trial tells the best so far
        assert trial["f1_macro"] == run.training["metrics"]["validation"]["f1_macro"]["value"]


def test_a_trial_starts_from_the_class_means_as_finetune_does(tiny_experiment, topics, tmp_path):
    start = tiny_experiment("bert", **CLASS_MEANS, tracking__wandb="none")
    space = {"model.head_init": ["class_means", "random"]}
    (first,) = qk.search(start, space, trials=1, data=topics, out=tmp_path, progress=False).trials
    assert first["parameters"] == {"model.head_init": "class_means"}
    assert first["f1_macro"] == pytest.approx(nearest_class_means(start, topics)[1])


TRIED = {
    "training.batch_size": 8,
    "training.epochs": 3,
    "training.gradient_accumulation": 2,
    "training.head_learning_rate": 0.25,
    "training.learning_rate": 0.125,
    "training.max_grad_norm": 0.5,
    "training.optimizer": "adafactor",
    "training.schedule": "cosine",
    "training.warmup_ratio": 0.5,
    "training.warmup_steps": 7,
    "training.weight_decay": 0.25,
    "lora.r": 8,
    "lora.alpha": 3,
    "lora.dropout": 0.5,
    "lora.target_modules": "all-linear",
    "lora.bias": "all",
    "model.dropout": 0.5,
    "model.head": "cosine",
    "model.head_init": "class_means",
    "model.pooling": "sequence_classification",
    "quantization.double_quantization": False,
    "quantization.scheme": "fp4",
}


def test_a_trial_is_trained_with_every_setting_that_can_be_searched(start, topics, tmp_path, monkeypatch):
    import optuna

    assert TRIED.keys() == set(searching.SEARCHABLE)
    start = start.override({"training.gradient_checkpointing": True})
    space = {name: [value] for name, value in TRIED.items() if name.startswith("training.")}
    trainer = _Searcher(Searched(start, space, topics, tmp_path))
    trial = optuna.trial.FixedTrial({name: values[0] for name, values in space.items()})
    expected = start.override({name: values[0] for name, values in space.items()})
    # As the Trainer does with what it is given for a trial.
    arguments = trainer.args
    for name, value in trainer.arguments_of(trial).items():
        setattr(arguments, name, value)
    wanted = training.training_arguments(
        expected.training,
        tmp_path / "checkpoints",
        device=CPU,
        precision="fp32",
        steps=training.total_steps(expected.training, len(topics.train)),
        progress=False,
        eval_rows=training.evaluation_rows(expected, "cpu"),
    ).to_dict()
    found = arguments.to_dict()
    # Where and under which name trackers log is the run's own.
    own = {"save_strategy", "logging_dir", "project", "run_name"}
    assert {name for name in wanted if found[name] != wanted[name]} <= own
    model = trainer.build(trial)
    assert trainer.spec == expected.training and trainer.order.batch_size == 16
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    groups = trainer.create_optimizer(model).param_groups
    assert {group["lr"] for group in groups} == {0.125, 0.25}

    built = []
    monkeypatch.setattr(
        "qlora_kit.searching.trial.prepare_model",
        lambda experiment, *args: built.append(experiment) or PreparedModel(CPU, "fp32", model),
    )
    monkeypatch.setattr("qlora_kit.searching.trial.start_head", lambda *args: None)
    head = {"model.head": "cosine"}
    for name, value in TRIED.items():
        if not name.startswith("training."):
            given = {name: value} | (head if name == "model.head_init" else {})
            trainer.space = {key: [choice] for key, choice in given.items()}
            trainer.build(optuna.trial.FixedTrial(given))
            assert built.pop() == trainer.start.override(given)


@pytest.mark.parametrize(("keep_best", "reached"), [(True, 0.8), (False, 0.7)])
def test_a_trial_counts_with_the_epoch_whose_weights_finetune_keeps(keep_best, reached):
    history = [{"loss": 1.0}, {"eval_f1_macro": 0.6}, {"eval_f1_macro": 0.8}, {"eval_f1_macro": 0.7}]
    trainer = SimpleNamespace(state=SimpleNamespace(log_history=history), best_epoch=keep_best)
    assert _Searcher.objective_of(trainer, {"eval_f1_macro": 0.7}) == reached


def test_test_rows_are_never_looked_at(start, topics, tmp_path):
    other = dataclasses.replace(topics, test=dataclasses.replace(topics.test, labels=topics.test.labels[::-1]))
    one, two = (
        qk.search(start, SPACE, trials=2, data=data, out=tmp_path, name=name, progress=False)
        for name, data in (("one", topics), ("two", other))
    )
    assert figures(one) == figures(two)
    assert "test" not in one.record["rows"]


@pytest.mark.long
def test_a_search_goes_on_with_what_is_missing_and_another_is_moved_aside(start, topics, tmp_path):
    whole = qk.search(start, SPACE, trials=3, data=topics, out=tmp_path, name="whole", progress=False)
    part = qk.search(start, SPACE, trials=2, data=topics, out=tmp_path, name="part", progress=False)
    before = (part.path / "search.json").read_bytes()
    assert figures(part) == figures(whole)[:2]
    rest = qk.search(start, SPACE, trials=3, data=topics, out=tmp_path, name="part", progress=False)
    assert figures(rest) == figures(whole)
    again = qk.search(start, SPACE, trials=3, data=topics, out=tmp_path, name="part", progress=False)
    assert figures(again) == figures(whole)
    other = qk.search(start, {"lora.r": [2, 4]}, trials=1, data=topics, out=tmp_path, name="part", progress=False)
    assert len(other.trials) == 1
    (aside,) = (item for item in tmp_path.iterdir() if item.name.startswith("part-"))
    assert figures(qk.Search(aside)) == figures(whole) and before != (other.path / "search.json").read_bytes()


@pytest.mark.long
def test_a_storage_elsewhere_brings_a_lost_search_back(start, topics, tmp_path):
    drive = tmp_path / "drive" / "trials.db"

    def tried(trials: int, out: str, space=SPACE, name: str = "mine", storage=drive) -> qk.Search:
        return qk.search(
            *(start, space), trials=trials, data=topics, out=tmp_path / out, name=name, storage=storage, progress=False
        )

    part = tried(1, "lost")
    assert not (part.path / "study.db").exists()
    # Another machine, where there is only the drive.
    whole = tried(2, "new")
    assert len(whole.trials) == 2 and figures(whole)[:1] == figures(part)
    # A search of another name has trials of its own there; another search of this name is refused.
    assert len(tried(1, "new", name="other").trials) == 1
    with pytest.raises(qk.KitError, match="has another search called mine"):
        tried(3, "third", space={"lora.r": [2, 4]})
    assert not (tmp_path / "third" / "mine").exists()
    # The same folder without the drive is another search: what it holds is not overwritten.
    assert len(tried(1, "new", storage=None).trials) == 1
    (aside,) = (item for item in (tmp_path / "new").iterdir() if item.name.startswith("mine-"))
    assert figures(qk.Search(aside)) == figures(whole)
    assert [item.name for item in drive.parent.iterdir()] == ["trials.db"]


def test_a_storage_that_is_none_or_in_use_is_refused(start, topics, tmp_path):
    (tmp_path / "notes.txt").write_text("no storage, " * 100)
    for storage, message in ((tmp_path / "notes.txt", "not a database"), (tmp_path, "unable to open")):
        with pytest.raises(qk.KitError, match=message):
            qk.search(start, SPACE, trials=1, data=topics, out=tmp_path / "out", storage=storage, progress=False)
    locked = files.locked(tmp_path / "used.db.lock")
    with locked, pytest.raises(qk.KitError, match="another process is writing"):
        qk.search(start, SPACE, trials=1, data=topics, out=tmp_path / "out", storage=tmp_path / "used.db")
    assert not list((tmp_path / "out").iterdir())


def test_a_space_is_read_as_a_terminal_writes_it():
    pieces = ["training.learning_rate=1e-4:1e-2:log", "lora.r=4,8,16", "training.epochs=1:3", "lora.dropout=0:0.2"]
    pieces += ["training.schedule=linear,cosine", "quantization.double_quantization=true,false"]
    pieces += ["training.warmup_steps=null,10", "lora.target_modules=all-linear"]
    assert searching.parse_space(pieces) == {
        "training.learning_rate": (1e-4, 1e-2, "log"),
        "lora.r": [4, 8, 16],
        "training.epochs": (1, 3),
        "lora.dropout": (0, 0.2),
        "training.schedule": ["linear", "cosine"],
        "quantization.double_quantization": [True, False],
        "training.warmup_steps": [None, 10],
        "lora.target_modules": ["all-linear"],
    }
    for piece, message in (("lora.r", "has no values"), ("lora.r=", "has no values"), ("lora.r=a:b", "is no range")):
        with pytest.raises(qk.KitError, match=message):
            searching.parse_space([piece])


def test_by_default_the_space_is_around_the_experiment(start):
    rate = start.training.learning_rate
    space = searching.default_space(start)
    assert space == {"training.learning_rate": (rate / 10, rate * 3, "log"), "lora.r": [4, 8, 16]}
    assert searching.default_space(start.override({"lora.r": 2}))["lora.r"] == [2, 4, 8, 16]
    whole = start.override({"lora": None, "quantization.scheme": "none"})
    assert list(searching.default_space(whole)) == ["training.learning_rate"]
    _check(start, space)


@pytest.fixture
def terminal(start, topics, tmp_path, monkeypatch):
    """Return the arguments of a search from a terminal, in a folder with an experiment and a CSV file."""
    with open(tmp_path / "topics.csv", "w", newline="") as file:
        rows = zip(topics.train.texts, topics.train.labels, strict=True)
        csv.writer(file).writerows([("text", "label"), *((text, topics.label_names[label]) for text, label in rows)])
    write_text(tmp_path / "start.yaml", start.to_yaml())
    monkeypatch.chdir(tmp_path)
    return ["search", "start.yaml", "--data", "topics.csv", "--test", "0.2", "--set", "data.validation=0.2", "--quiet"]


def test_a_search_in_a_terminal_ends_with_the_best_experiment(terminal, capsys):
    terminal += ["--name", "mine", "--space", "training.learning_rate=1e-7,5e-3", "--storage", "trials.db"]
    assert cli.main([*terminal, "--trials", "1"]) == 0
    capsys.readouterr()
    assert cli.main([*terminal, "--trials", "3"]) == 0
    found = qk.Search("runs/mine")
    *trials, best, path = capsys.readouterr().out.splitlines()
    assert trials == [
        f"trial   {trial['number']}  macro F1 {trial['f1_macro']:.4f}  "
        f"training.learning_rate={trial['parameters']['training.learning_rate']:g}"
        for trial in found.trials
    ]
    assert len(trials) == 3
    winner, rows = found.best_trial, found.record["rows"]["validation"]
    assert best == f"best: trial {winner['number']}, macro F1 {winner['f1_macro']:.4f} on {rows} validation rows"
    assert path == "runs/mine/best.yaml"
    assert Experiment.from_yaml(path) == found.best and found.best.training.learning_rate == 5e-3


def test_bad_input_to_a_search_is_one_line_and_a_search_without_a_result_a_failure(terminal, capsys, monkeypatch):
    def refused(*more: str) -> str:
        assert cli.main([*terminal, *more]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("qlora_kit: ") and said.err.count("\n") == 1
        return said.err

    assert "Did you mean 'training.learning_rate'" in refused("--space", "training.learning_rat=1e-4:1e-2")
    assert "low below high" in refused("--space", "training.learning_rate=1e-2:1e-4")
    assert "has no values" in refused("--space", "lora.r")
    assert "trials is 0" in refused("--trials", "0")
    assert "invalid int value: 'many'" in refused("--trials", "many")
    assert "Did you mean 'training.epochs'" in refused("--set", "training.epoch=1")
    assert "not a database" in refused("--storage", "topics.csv")
    assert "cannot be the name of" in refused("--name", "../elsewhere")
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "optuna", None)
        assert "pip install 'optuna" in refused()
    assert not list(Path("runs").iterdir())

    lost = ["--set", "training.learning_rate=1e30", "--set", "training.max_grad_norm=1e30", "--trials", "1"]
    assert cli.main([*terminal, *lost, "--space", "training.learning_rate=1e30,1e29"]) == 1
    said = capsys.readouterr()
    assert "could not go on" in said.out and "no trial of runs/tiny_bert_search was finished" in said.err


def test_a_trial_whose_loss_is_lost_is_told_and_the_search_goes_on(start, topics, tmp_path):
    space = {"training.learning_rate": [1e30, 5e-3], "training.max_grad_norm": [0.0, 1e30]}
    found = qk.search(
        start.override({"training.learning_rate": 1e30, "training.max_grad_norm": 1e30}),
        space,
        trials=1,
        data=topics,
        out=tmp_path,
        progress=False,
    )
    assert found.trials[0]["state"] == "pruned" and "learning rate" in found.trials[0]["error"]
    with pytest.raises(qk.KitError, match=r"no trial of .* was finished"):
        _ = found.best
    assert not (found.path / "best.yaml").exists()


@pytest.mark.long
def test_one_model_is_in_memory_at_a_time(start, topics, tmp_path, monkeypatch):
    build, made, alive = models.build, [], []

    def watched(*args, **kwargs):
        alive.append(sum(model() is not None for model in made))
        model = build(*args, **kwargs)
        made.append(weakref.ref(next(model.parameters())))
        return model

    monkeypatch.setattr(sys.modules["qlora_kit.training.prepare"], "build", watched)
    # The first one's loss is lost, and its traceback holds on to its model.
    space = {"training.learning_rate": [1e30, 5e-3]}
    start = start.override({"training.learning_rate": 1e30, "training.max_grad_norm": 1e30})
    gc.disable()
    try:
        found = qk.search(start, space, trials=5, prune=False, data=topics, out=tmp_path, progress=False)
    finally:
        gc.enable()
    assert {trial["state"] for trial in found.trials} == {"complete", "pruned"}
    assert len(alive) >= 5 and not any(alive)


@pytest.mark.long
def test_a_trial_behind_the_others_is_pruned(start, topics, tmp_path):
    space = {"training.learning_rate": [5e-3, 1e-7]}  # one that learns, and one that hardly moves
    found = qk.search(start, space, trials=6, data=topics, out=tmp_path, progress=False)
    pruned = [trial for trial in found.trials if trial["state"] == "pruned"]
    assert pruned and all(trial["f1_macro"] is None and trial["error"] is None for trial in pruned)
    for trial in pruned:
        assert trial["number"] >= searching.UNPRUNED
        earlier = [other["epochs"][-1] for other in found.trials[: trial["number"]] if other["f1_macro"]]
        assert trial["epochs"][-1] < np.median(earlier)
    unpruned = qk.search(start, space, trials=6, prune=False, data=topics, out=tmp_path, name="all", progress=False)
    assert [trial["state"] for trial in unpruned.trials] == ["complete"] * 6


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "space is empty"),
        ({"training.learning_rat": (1e-4, 1e-2)}, "training.learning_rate"),
        ({"training.seed": [0, 1]}, "setting to search"),
        ({"training.learning_rate": (1e-2, 1e-4)}, "low below high"),
        ({"training.learning_rate": (0.0, 1e-4, "log")}, "above 0"),
        ({"training.learning_rate": (1e-4, 1e-2, "lin")}, "log"),
        ({"training.learning_rate": ("a", "b")}, "low below high"),
        ({"training.batch_size": (8.0, 17.0)}, "a whole number"),
        ({"training.learning_rate": 1e-3}, "a range"),
        ({"training.learning_rate": [-1.0]}, "above 0"),
        ({"lora.target_modules": [["query"]]}, "allowed are numbers"),
        ({"quantization.scheme": ["int3"]}, "int4"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_before_anything_is_written(start, space, message, tmp_path):
    with pytest.raises(qk.KitError, match=message):
        qk.search(start, space, out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_no_trials_and_no_search_are_refused(start, tmp_path):
    with pytest.raises(qk.KitError, match="1 or more"):
        qk.search(start, SPACE, trials=0, out=tmp_path)
    with pytest.raises(qk.KitError, match=r"search.json is missing"):
        qk.Search(tmp_path)


def test_without_optuna_the_message_says_what_to_install(start, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(qk.KitError, match="pip install 'optuna"):
        qk.search(start, SPACE, out=tmp_path)


KILLED = """
import sys, qlora_kit as qk
from qlora_kit.config import Experiment
space = {"training.learning_rate": (1e-4, 3e-2, "log"), "lora.r": [2, 4, 8], "training.batch_size": [8, 16]}
qk.search(
    Experiment.from_yaml(sys.argv[1]), space, trials=4, data=qk.data.load_saved(sys.argv[2]), out=sys.argv[3],
    name="killed", progress=False
)
"""


@pytest.mark.long
def test_a_killed_search_ends_as_one_that_was_not(start, topics, tmp_path):
    write_text(tmp_path / "start.yaml", start.to_yaml())
    topics.save(tmp_path / "data")
    data = qk.data.load_saved(tmp_path / "data")
    whole = qk.search(start, SPACE, trials=4, data=data, out=tmp_path, name="whole", progress=False)
    arguments = [sys.executable, "-c", KILLED, *(str(tmp_path / name) for name in ("start.yaml", "data", ""))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(arguments, env=environment)
    record = tmp_path / "killed" / "search.json"
    while not (record.is_file() and read_json(record)["trials"]):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)  # into the next trial
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(read_json(record)["trials"]) < 4
    subprocess.run(arguments, env=environment, check=True)
    assert figures(qk.Search(tmp_path / "killed")) == figures(whole)
    assert searching.Search(whole.path).best == qk.Search(tmp_path / "killed").best


def test_the_figure_shows_every_trial():
    trials = [
        {
            "number": 0,
            "parameters": {"training.learning_rate": 1e-3},
            "state": "complete",
            "f1_macro": 0.5,
            "epochs": [0.5],
        },
        {
            "number": 1,
            "parameters": {"training.learning_rate": 1e-2},
            "state": "pruned",
            "f1_macro": None,
            "epochs": [0.1],
        },
        {
            "number": 2,
            "parameters": {"training.learning_rate": 2e-3},
            "state": "complete",
            "f1_macro": 0.7,
            "epochs": [0.7],
        },
        {"number": 3, "parameters": {"training.learning_rate": 1e9}, "state": "pruned", "f1_macro": None, "epochs": []},
    ]
    by_trial, by_rate = qk.plots.search_trials({"trials": trials}).axes
    shown = [points.get_offsets().tolist() for points in by_trial.collections]
    assert shown == [[[0.0, 0.5], [2.0, 0.7]], [[1.0, 0.1]]]
    assert by_trial.lines[0].get_ydata().tolist() == [0.5, 0.7]
    assert [points.get_offsets().tolist() for points in by_rate.collections] == [
        [[1e-3, 0.5], [2e-3, 0.7]],
        [[1e-2, 0.1]],
    ]
    (alone,) = qk.plots.search_trials({"trials": [trials[0] | {"parameters": {"lora.r": 4}}]}).axes
    assert alone.get_xlabel() == "trial"
