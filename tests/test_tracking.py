"""W&B: offline without a login, read back from the run's own file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import qlora_kit as qk
from qlora_kit import evaluation, records, tracking
from qlora_kit.experiment import Experiment, ModelSpec, TrackingSpec

FINETUNE = """
import sys, qlora_kit as qk
from qlora_kit.experiment import Experiment
qk.finetune(
    Experiment.from_yaml(sys.argv[2]), data=qk.data.load_saved(sys.argv[1]), out=sys.argv[3], progress=False
)
"""


@pytest.fixture
def wandb_free(monkeypatch, tmp_path):
    """Take the shell's own W&B settings away; nobody is logged in."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def tracked(mode: str) -> Experiment:
    return Experiment(name="tracked", model=ModelSpec("embedded:minilm"), tracking=TrackingSpec(wandb=mode))


def test_the_mode_follows_login_environment_and_wish(monkeypatch, wandb_free, tmp_path):
    assert tracking.wandb_mode("none") is None
    assert tracking.wandb_mode("offline") == "offline"
    assert tracking.wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert tracking.wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracking.wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracking.wandb_mode("auto") is None
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert tracking.wandb_mode("auto") == "online"


def test_none_makes_no_run_and_no_folder(tmp_path):
    with tracking.opened(tracked("none"), tmp_path, "mine") as run:
        assert run is None
        tracking.log_validation(run, np.eye(2), [0, 1], ["a", "b"], ["x", "y"])
    assert list(tmp_path.iterdir()) == []


def test_77_labels_are_logged_as_a_chart_and_two_tables(wandb_free, tmp_path):
    rows, names = qk.banking77().validation, qk.banking77().label_names
    logits = 4 * np.eye(len(names))[list(rows.labels)] + np.random.default_rng(0).normal(size=(len(rows), len(names)))
    with tracking.opened(tracked("offline"), tmp_path, "mine") as run:
        tracking.log_validation(run, logits, rows.labels, rows.texts, names)
    file = written(tmp_path)
    config, history = read(file)
    assert config["name"] == "tracked" and config["lora"]["r"] == tracked("none").lora.r
    logged = {key: value for row in history for key, value in row.items()}
    matrix = table(file, logged["validation/confusion_matrix_table"])
    counts = np.array([count for *_, count in matrix["data"]]).reshape(len(names), len(names))
    assert (counts == evaluation.confusion_matrix(logits, rows.labels, len(names))).all()
    per_label = table(file, logged["validation/per_label"])
    assert [row[0] for row in per_label["data"]] == list(names)
    f1 = np.mean([row[per_label["columns"].index("f1")] for row in per_label["data"]])
    assert f1 == pytest.approx(evaluation.compute_metrics(logits, rows.labels)["f1_macro"])
    confused = table(file, logged["validation/confusions"])
    assert confused["columns"] == ["true", "predicted", "count", "share", "text", "confidence"]
    place = dict(zip(rows.texts, zip(rows.labels, logits.argmax(axis=1), strict=True), strict=True))
    for true, predicted, *_, text, _ in confused["data"]:
        assert place[text] == (names.index(true), names.index(predicted)) and true != predicted
    assert sum(item.stat().st_size for item in tmp_path.rglob("*") if item.is_file()) < 2**20


def test_where_nothing_is_confused_the_tables_are_empty_and_the_chart_is_there(wandb_free, tmp_path):
    names = [f"label {place}" for place in range(101)]
    with tracking.opened(tracked("offline"), tmp_path, "mine") as run:
        tracking.log_validation(run, np.eye(101), list(range(101)), names, names)
    file = written(tmp_path)
    (logged,) = read(file)[1]
    assert table(file, logged["validation/confusions"])["data"] == []
    assert len(table(file, logged["validation/per_label"])["data"]) == 101
    # 101 times 101 cells are more than W&B shows of a table.
    assert "validation/confusion_matrix_table" not in logged


@pytest.mark.long  # wandb tries for 12 seconds, twice
def test_a_server_that_does_not_answer_is_no_reason_not_to_train(monkeypatch, wandb_free, tmp_path, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(tracking, "INIT_SECONDS", 2)
    with tracking.opened(tracked("auto"), tmp_path, "mine") as run:
        run.log({"loss": 1.0})
    assert "this one is offline" in caplog.text
    _, history = read(written(tmp_path))
    assert [row["loss"] for row in history] == [1.0]
    refused = pytest.raises(qk.KitError, match="W&B does not open a run")
    with refused, tracking.opened(tracked("online"), tmp_path, "mine"):
        pass


@pytest.mark.long
def test_a_real_offline_run_holds_the_experiment_and_the_metrics(topics, tiny_experiment, tmp_path):
    experiment = tiny_experiment("bert", tracking__wandb="offline")
    records.write_text(tmp_path / "experiment.yaml", experiment.to_yaml())
    topics.save(tmp_path / "data")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MY_TOKEN": "hf_plantedplantedplantedplanted"}
    arguments = [str(tmp_path / "data"), str(tmp_path / "experiment.yaml"), str(tmp_path / "runs")]
    result = subprocess.run(
        [sys.executable, "-c", FINETUNE, *arguments], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    file = written(tmp_path / "runs")
    config, history = read(file)
    assert config["training"]["seed"] == 0 and config["name"] == "tiny_bert"
    keys = set().union(*(set(row) for row in history))
    assert {"train/loss", "eval/loss", "eval/accuracy", "eval/f1_macro", "train/tokens_per_second"} <= keys, keys
    assert {"train/epoch_seconds", "train/peak_bytes"} <= keys, keys
    assert {"validation/confusion_matrix_table", "validation/per_label", "validation/confusions"} <= keys, keys
    # The validation rows' scores must not pass for test scores.
    assert not [key for key in keys if key.startswith("test/")], keys
    assert b"plantedplanted" not in file.read_bytes()


def table(file: Path, reference: dict) -> dict:
    """Read a table that a run's file refers to."""
    return json.loads((file.parent / "files" / reference["path"]).read_text())


def written(out: Path) -> Path:
    """Return the file of the one offline run under a folder, once it is whole."""
    import wandb

    wandb.teardown()  # its own process may still be writing when a run has ended
    (file,) = out.glob("wandb/offline-run-*/run-*.wandb")
    return file


def read(file: Path):
    """Read config and history from a run's file: a LevelDB log of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    raw = file.read_bytes()
    config, history, part, place = {}, [], b"", 7
    while place + 7 <= len(raw):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        size, kind = int.from_bytes(raw[place + 4 : place + 6], "little"), raw[place + 6]
        part += raw[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            for update in record.run.config.update if record.HasField("run") else record.config.update:
                config[update.key] = json.loads(update.value_json)
            if record.HasField("history"):
                row = {}
                for item in record.history.item:
                    *outer, last = [item.key] if item.key else item.nested_key
                    node = row
                    for key in outer:
                        node = node.setdefault(key, {})
                    node[last] = json.loads(item.value_json)
                history.append(row)
    return config, history
