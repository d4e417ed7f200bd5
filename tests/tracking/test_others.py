"""TensorBoard, read back from its own files; MLflow and trackio where they are installed, and refused where not."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest

import qlora_kit as qk
from qlora_kit import tracking
from qlora_kit.config.sections import TRACKERS, TrackingSpec

HERE = {name: importlib.util.find_spec(name) is not None for name in ("tensorboard", "mlflow", "trackio")}


@pytest.mark.parametrize(
    ("given", "kept", "names"),
    [
        ("tensorboard", "tensorboard", ("tensorboard",)),
        (["tensorboard"], "tensorboard", ("tensorboard",)),
        (["wandb", "mlflow"], ("wandb", "mlflow"), ("wandb", "mlflow")),
        ("none", "none", ()),
        (["none"], "none", ()),
    ],
)
def test_trackers_are_named_by_one_name_or_several(given, kept, names):
    spec = TrackingSpec(to=given)
    assert spec.to == kept and spec.trackers == names
    experiment = qk.preset("minilm_banking77_smoke").override({"tracking.to": given})
    assert qk.Experiment.from_yaml(experiment.to_yaml()) == experiment


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("tensorbord", "there is no tracking.to called 'tensorbord'. Did you mean 'tensorboard'?"),
        (["wandb", "comet_ml"], "there is no tracking.to called 'comet_ml'"),
        (["wandb", "none"], "tracking.to is ['wandb', 'none']: none goes with no other"),
        (["wandb", "mlflow", "wandb"], "tracking.to is ['wandb', 'mlflow', 'wandb']: wandb stands in it twice"),
        ([], "tracking.to is []: name one or more of wandb, tensorboard, mlflow, trackio, or none"),
        (3, "tracking.to is 3: allowed is a text or a list of names"),
    ],
)
def test_an_unknown_tracker_is_refused_with_the_nearest(given, words):
    with pytest.raises(qk.KitError, match="^" + re.escape(words)):
        TrackingSpec(to=given)


def test_asking_for_w_and_b_counts_more_than_an_older_none():
    smoke = qk.preset("minilm_banking77_smoke")
    assert smoke.tracking.wandb == "none" and smoke.tracking.trackers == ()
    for changes in ({"tracking.to": "wandb"}, {"tracking": {"to": ["wandb"]}}):
        asked = smoke.override(changes).tracking
        assert asked.wandb == "auto" and asked.trackers == ("wandb",)
    assert smoke.override({"tracking.to": "tensorboard"}).tracking.wandb == "none"
    assert smoke.override({"tracking.to": "wandb", "tracking.wandb": "offline"}).tracking.trackers == ("wandb",)
    assert smoke.override({"tracking": TrackingSpec(wandb="none")}).tracking.trackers == ()


@pytest.mark.parametrize(
    "changes",
    [{"tracking.to": ["mlflow", "wandb"], "tracking.wandb": "none"}, {"tracking": {"to": "wandb", "wandb": "none"}}],
)
def test_w_and_b_asked_for_and_forbidden_at_once_is_refused(changes):
    with pytest.raises(qk.KitError, match=r"^tracking\.to names wandb, and tracking\.wandb is none"):
        qk.preset("minilm_banking77_qlora").override(changes)


def test_w_and_b_stays_the_default_and_is_left_out_where_others_are_named(tiny_experiment):
    assert TrackingSpec().trackers == ("wandb",)
    experiment = tiny_experiment("bert", tracking__to=["tensorboard"], tracking__wandb="offline")
    with tracking.opened(experiment, Path("nowhere"), "mine") as run:
        assert run is None
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("name", [name for name, here in HERE.items() if not here])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(name, topics, tiny_experiment, tmp_path):
    others = ", ".join(other for other in TRACKERS if other != name)
    words = rf"^tracking.to is {name}, and its package is not installed: pip install 'qlora_kit\[{name}\]'"
    words += f", or let tracking.to be {others} or none$"
    with pytest.raises(qk.KitError, match=words):
        qk.finetune(tiny_experiment("bert", tracking__to=["wandb", name]), data=topics, out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(HERE["mlflow"], reason="MLflow itself is here")
def test_a_folder_of_the_package_s_name_is_not_taken_for_it(topics, tiny_experiment, tmp_path, monkeypatch):
    (tmp_path / "mlflow").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(qk.KitError, match=r"its package cannot be imported .*pip install"):
        qk.finetune(tiny_experiment("bert", tracking__to="mlflow"), data=topics, out=tmp_path / "runs")
    del sys.modules["mlflow"]


def scalars_of(folder: Path) -> dict[str, dict[int, float]]:
    """Return what TensorBoard reads in a folder: by name, the values by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


@pytest.mark.skipif(not HERE["tensorboard"], reason="the extra is not installed")
def test_tensorboard_has_the_losses_and_scores_and_stays_when_the_checkpoints_go(
    topics, tiny_experiment, tmp_path, monkeypatch
):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    experiment = tiny_experiment("bert", tracking__to="tensorboard", training__epochs=1, training__logging_steps=1)
    run = qk.finetune(experiment, data=topics, out=tmp_path, name="mine", progress=False)
    scalars = scalars_of(tmp_path / "tensorboard" / "mine")
    assert scalars["train/loss"] == {
        entry["step"]: pytest.approx(entry["loss"], rel=1e-6) for entry in run.training["losses"]
    }
    (epoch,) = run.training["epochs"]
    (score,) = scalars["eval/f1_macro"].values()
    assert score == pytest.approx(epoch["validation"]["f1_macro"])
    assert sorted(item.name for item in tmp_path.iterdir()) == ["mine", "tensorboard"]
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    (events,) = (tmp_path / "tensorboard" / "mine").iterdir()
    written = events.read_bytes()
    assert not [text for split in topics.splits().values() for text in split.texts if text.encode() in written]
    # A test is logged in W&B alone.
    qk.evaluate(run, data=topics, baselines=False, resamples=10, progress=False)
    assert scalars_of(tmp_path / "tensorboard" / "mine") == scalars


@pytest.mark.skipif(not HERE["tensorboard"], reason="the extra is not installed")
def test_a_tensorboard_that_cannot_write_costs_no_run(topics, tiny_experiment, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file" / "below"))
    experiment = tiny_experiment("bert", tracking__to="tensorboard", training__max_steps=2)
    run = qk.finetune(experiment, data=topics, out=tmp_path / "runs", progress=False)
    assert run.training["steps"] == 2
    (told,) = [record.getMessage() for record in caplog.records if record.name.startswith(tracking.__name__)]
    assert told.startswith("TensorBoard failed, and from here on it logs nothing of this run: ")


@pytest.mark.skipif(not HERE["mlflow"], reason="the extra is not installed")
def test_mlflow_has_the_losses_in_the_experiment_of_the_project(topics, tiny_experiment, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    experiment = tiny_experiment(
        "bert", tracking__to="mlflow", tracking__project="mine", training__max_steps=2, training__logging_steps=1
    )
    run = qk.finetune(experiment, data=topics, out=tmp_path / "runs", name="one", progress=False)
    assert mlflow.active_run() is None
    (found,) = mlflow.search_runs(experiment_names=["mine"], output_format="list")
    assert found.info.run_name == "one" and found.info.status == "FINISHED"
    assert found.data.metrics["loss"] == pytest.approx(run.training["losses"][-1]["loss"])
    written = (tmp_path / "mlflow.db").read_bytes()
    assert not [text for split in topics.splits().values() for text in split.texts if text.encode() in written]


@pytest.mark.skipif(not HERE["trackio"], reason="the extra is not installed")
def test_trackio_has_the_losses_in_the_project(topics, tiny_experiment, tmp_path, monkeypatch):
    import sqlite3

    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read at its first import
    from trackio import utils

    experiment = tiny_experiment(
        "bert", tracking__to="trackio", tracking__project="mine", training__max_steps=2, training__logging_steps=1
    )
    run = qk.finetune(experiment, data=topics, out=tmp_path / "runs", name="one", progress=False)
    with sqlite3.connect(utils.TRACKIO_DIR / "mine.db") as base:
        rows = base.execute("SELECT metrics FROM metrics WHERE run_name = 'one'").fetchall()
    logged = [json.loads(row) for (row,) in rows]
    losses = [row["train/loss"] for row in logged if "train/loss" in row]
    assert losses == [pytest.approx(entry["loss"]) for entry in run.training["losses"]]
    written = (utils.TRACKIO_DIR / "mine.db").read_bytes()
    assert not [text for split in topics.splits().values() for text in split.texts if text.encode() in written]
