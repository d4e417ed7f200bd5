"""The same seed gives the same bits, and `rerun` says what differs where it does not."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from trainings import untimed, weights_of

import qlora_kit as qk
from qlora_kit import rerun
from qlora_kit.cli import main as cli
from qlora_kit.config.experiment import Experiment
from qlora_kit.config.sections import DataSpec, LoraSpec, ModelSpec, TrackingSpec, TrainingSpec
from qlora_kit.runs.record import notebook_record
from qlora_kit.system.files import write_json, write_text
from qlora_kit.system.manifest import NAME, OF_A_RUN, of
from qlora_kit.system.parsing import read_json


@pytest.fixture(scope="module")
def tested(topics, tiny, tmp_path_factory):
    """Return a run that was trained on a CSV file and tested with its baselines."""
    folder = tmp_path_factory.mktemp("reproducible")
    with open(folder / "topics.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        for split in topics.splits().values():
            writer.writerows(
                (text, topics.label_names[label]) for text, label in zip(split.texts, split.labels, strict=True)
            )
    experiment = Experiment(
        name="tiny_topics",
        model=ModelSpec(str(tiny("bert"))),
        data=DataSpec(name=str(folder / "topics.csv"), test=0.2, validation=0.2),
        lora=LoraSpec(r=4, alpha=8, dropout=0.1),
        # The experiment says nothing of threads: the record alone knows how many there were.
        training=TrainingSpec(epochs=2, batch_size=16, learning_rate=5e-3, threads=None, logging_steps=2),
        tracking=TrackingSpec(project="somebody-elses"),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run = qk.finetune(experiment, out=folder, progress=False)
        qk.evaluate(run, resamples=50, progress=False)
        yield run
    finally:
        torch.set_num_threads(before)


def copied(run, folder):
    shutil.copytree(run.path, folder)
    return folder


def sealed(folder):
    """Write a folder's manifest anew: it holds another run then, and not a damaged one."""
    write_json(folder / NAME, of(folder, OF_A_RUN))


def differing(comparison):
    return {section.name: section for section in comparison.results if section.differences}


def test_a_rerun_in_a_process_of_its_own_is_the_same_to_the_last_bit(tested, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "qlora_kit", "rerun", str(tested.path), "--out", str(tmp_path), "--json", "--quiet"],
        # Another number of threads than the record's: the record's is taken.
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["same"] and told["made_with"] == []
    sections = {section["name"]: section["values"] for section in told["results"]}
    assert sections["weights, by tensor"] > 10 and sections["training.json, losses"] > 10
    assert sections["evaluation.json, metrics"] > 40 and sections["evaluation.json, predictions"] >= 3 * 48
    again = qk.load_run(told["run"])
    assert again.path.parent == tmp_path
    one, other = weights_of(tested), weights_of(again)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert untimed(again.training) == untimed(tested.training)
    before, after = (rerun._without_intervals(untimed(run.evaluation)) for run in (tested, again))
    assert before == after
    assert again.experiment.tracking.trackers == ()


def test_the_recorded_threads_are_taken_for_training_and_for_the_test_and_given_back(tested, tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        short = tested.experiment.override({"training.max_steps": 2, "name": "short"})
        run = qk.finetune(short, out=tmp_path, progress=False)
        torch.set_num_threads(2)
        qk.evaluate(run, baselines=False, resamples=10, progress=False)
        torch.set_num_threads(1)
        comparison = rerun.run_again(run.path, tmp_path / "again", progress=False)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    again = qk.load_run(comparison.run)
    assert (again.environment["threads"], again.evaluation["environment"]["threads"]) == (3, 2)
    assert comparison.made_with == ()


def test_the_smallest_difference_there_is_is_told(tmp_path):
    recorded = {"metrics": {"loss": 0.7, "rows": [1, 2]}, "losses": [{"loss": 1.5}], "steps": 3, "timing": {"s": 1.0}}
    for path, changed in (
        ("loss", {**recorded, "metrics": {"loss": np.nextafter(0.7, 1), "rows": [1, 2]}}),
        ("[0].loss", {**recorded, "losses": [{"loss": np.nextafter(1.5, 0)}]}),
        ("steps", {**recorded, "steps": 4}),
        ("rows, length", {**recorded, "metrics": {"loss": 0.7, "rows": [1]}}),
    ):
        found = [one for part in rerun._sections("training.json", recorded, changed) for one in part.differences]
        assert [one.where for one in found] == [path] and found[0].by > 0
    same = {**recorded, "timing": {"s": 2.0}}
    assert not [one for part in rerun._sections("training.json", recorded, same) for one in part.differences]

    weights = {"a": torch.full((2, 3), 0.1), "b": torch.ones(4)}
    altered = {"a": torch.nextafter(weights["a"], torch.ones(2, 3)), "b": weights["b"]}
    runs = []
    for name, state in (("one", weights), ("other", altered)):
        (tmp_path / name / "adapter").mkdir(parents=True)
        save_file(state, tmp_path / name / "adapter" / "adapter_model.safetensors")
        runs.append(SimpleNamespace(path=tmp_path / name))
    section = rerun._weights(*runs)
    (tensor,) = section.differences
    assert (tensor.where, section.values) == ("a", 2) and 0 < tensor.by < 1e-7


def test_each_difference_is_told_with_its_size(tested, tmp_path, capsys):
    altered = copied(tested, tmp_path / "altered")
    environment = read_json(altered / "environment.json")
    environment["versions"]["torch"] = "2.0.0"
    environment["device"] = "Tesla T4"
    environment["checksums"] = {"data": environment["checksums"]["data"], "base": "0" * 64}
    write_json(altered / "environment.json", environment)
    training = read_json(altered / "training.json")
    training["losses"][1]["loss"] += 0.25
    del training["losses"][-1]
    write_json(altered / "training.json", training)
    file = altered / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    weights[name].view(-1)[3] += 0.5
    save_file(weights, file)
    sealed(altered)

    comparison = rerun.run_again(altered, tmp_path / "again", progress=False)
    assert not comparison.same
    made_with = {found.where: (found.recorded, found.now) for found in comparison.made_with}
    assert made_with.keys() == {"torch", "device", "base weights (SHA-256)"}
    assert made_with["torch"] == ("2.0.0", tested.environment["versions"]["torch"])
    found = differing(comparison)
    assert found.keys() == {"training.json, losses", "weights, by tensor"}
    loss, length = sorted(found["training.json, losses"].differences, key=lambda one: one.where)
    assert (loss.where, loss.by) == ("[1].loss", pytest.approx(0.25))
    assert (length.recorded, length.now) == (len(training["losses"]), len(training["losses"]) + 1)
    (tensor,) = found["weights, by tensor"].differences
    assert (tensor.where, tensor.by) == (name, pytest.approx(0.5))
    text = str(comparison)
    assert "torch: 2.0.0 -> " in text and text.endswith("different results")
    assert "weights, by tensor: 1 of" in text and "by 0.5 at most" in text

    # The command line: exit code 1, and an earlier rerun is moved aside, not taken for a new one.
    assert cli.main(["rerun", str(altered / "training.json"), "--out", str(tmp_path / "again"), "--quiet"]) == 1
    assert "different results" in capsys.readouterr().out
    assert len(list((tmp_path / "again").iterdir())) == 2


def test_a_notebooks_record_runs_again(tested, tmp_path):
    made = {"preset": "tiny_topics", "experiment": tested.experiment, "parameters": tested.training["parameters"]}
    two = notebook_record("02_finetune", metrics=tested.training["metrics"], environment=tested.environment, **made)
    write_json(tmp_path / "02_finetune.json", two)
    comparison = rerun.run_again(tmp_path / "02_finetune.json", tmp_path / "runs", progress=False)
    assert comparison.same and not comparison.made_with
    assert {section.name for section in comparison.results} == {"training.json, parameters", "training.json, metrics"}

    metrics = json.loads(json.dumps(tested.evaluation["metrics"]))
    metrics["baselines"] = {}
    metrics["test"]["accuracy"]["value"] -= 0.125
    three = notebook_record("03_evaluate", metrics=metrics, environment=tested.environment, **made)
    write_json(tmp_path / "03_evaluate.json", three)
    found = differing(rerun.run_again(tmp_path / "03_evaluate.json", tmp_path / "runs", progress=False))
    (worse,) = found.pop("evaluation.json, metrics").differences
    assert not found and (worse.where, worse.by) == ("test.accuracy.value", pytest.approx(0.125))


def test_other_rows_and_a_changed_file_are_told(tested, tmp_path):
    record = copied(tested, tmp_path / "record")
    shutil.rmtree(record / "data")
    with open(tested.experiment.data.name, encoding="utf-8", newline="") as stream:
        rows = list(stream)
    other = tmp_path / "other.csv"
    other.write_text("".join([rows[0], *rows[2:]]), encoding="utf-8", newline="")
    write_text(record / "experiment.yaml", tested.experiment.override({"data.name": str(other)}).to_yaml())
    (record / "evaluation.json").unlink()
    sealed(record)
    comparison = rerun.run_again(record, tmp_path / "runs", progress=False)
    (data,) = comparison.made_with
    assert data.where == "data (SHA-256)" and data.recorded == tested.environment["checksums"]["data"]
    assert {"training.json, rows", "training.json, losses", "weights, by tensor"} <= differing(comparison).keys()


@pytest.mark.parametrize(
    "case", ["missing", "no record", "no json", "results", "unfinished", "itself", "memory", "damaged"]
)
def test_what_cannot_be_run_again_is_refused_and_leaves_nothing(tested, tmp_path, case, capsys):
    def file(name, content):
        (tmp_path / name).write_text(content)
        return tmp_path / name

    out = tmp_path / "runs"
    if case == "missing":
        record, says = tmp_path / "nowhere", "no run folder"
    elif case == "no record":
        record, says = file("01_quantization.json", '{"experiment": {}, "metrics": {}}'), "no record of a training"
    elif case == "no json":
        record, says = file("02_finetune.json", "{"), "is no JSON"
    elif case == "results":
        record, says = file("rows.yaml", "rows: []"), "no record of a training"
    elif case == "unfinished":
        record, says = copied(tested, tmp_path / "half") / "experiment.yaml", "no finished run"
        (tmp_path / "half" / "training.json").unlink()
    elif case == "itself":
        record, out, says = tested.path, tested.path.parent, "is the record itself"
    elif case == "memory":
        experiment = tested.experiment.override({"data.name": "memory"}).to_dict()
        content = json.dumps({"experiment": experiment, "metrics": {"validation": {"accuracy": 1}}, "run": "runs/x"})
        record, says = file("02_finetune.json", content), r"runs/x"
    else:
        record, says = copied(tested, tmp_path / "damaged"), "training.json: the whole: [1] is not of"
        (record / "training.json").write_text("[1]")
    before = sorted(tested.path.parent.rglob("*"))
    assert cli.main(["rerun", str(record), "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert says in said.err and said.err.count("\n") == 1
    assert not (tmp_path / "runs").exists() and sorted(tested.path.parent.rglob("*")) == before


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_workers_do_not_change_a_bit(tested, tmp_path, workers):
    experiment = tested.experiment.override({"training.workers": workers})
    run = qk.finetune(experiment, out=tmp_path, progress=False)
    one, other = weights_of(tested), weights_of(run)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert untimed(run.training) == untimed(tested.training)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_predictions_do_not_depend_on_the_batch(topics, tiny_experiment, tmp_path, name):
    # BERT's are compared in test_training.py; decoders pool the last token, whose place padding moves.
    run = qk.finetune(tiny_experiment(name, training__max_steps=4), data=topics, out=tmp_path, progress=False)
    alone, *batched = (run.predict(topics.test.texts, batch_size=size).logits for size in (1, 7, 64))
    for logits in batched:
        assert abs(alone - logits).max() < 1e-5
