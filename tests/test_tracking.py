"""W&B: offline without a login, read back from the run's own file."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from qlora_kit import records, tracking

CODE = """
import sys, qlora_kit as qk
from qlora_kit.experiment import Experiment
qk.finetune(
    Experiment.from_yaml(sys.argv[2]), data=qk.data.load_saved(sys.argv[1]), out=sys.argv[3], progress=False
)
"""


def test_the_mode_follows_login_environment_and_wish(monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
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


@pytest.mark.long
def test_a_real_offline_run_holds_the_experiment_and_the_metrics(topics, tiny_experiment, tmp_path):
    experiment = tiny_experiment("bert", tracking__wandb="offline")
    records.write_text(tmp_path / "experiment.yaml", experiment.to_yaml())
    topics.save(tmp_path / "data")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MY_TOKEN": "hf_plantedplantedplantedplanted"}
    arguments = [str(tmp_path / "data"), str(tmp_path / "experiment.yaml"), str(tmp_path / "runs")]
    result = subprocess.run([sys.executable, "-c", CODE, *arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (file,) = (tmp_path / "runs").glob("wandb/offline-run-*/run-*.wandb")
    raw = file.read_bytes()
    config, history = read(raw)
    assert config["training"]["seed"] == 0 and config["name"] == "tiny_bert"
    keys = set().union(*(set(row) for row in history))
    assert {"train/loss", "eval/loss", "eval/accuracy", "eval/f1_macro", "train/tokens_per_second"} <= keys, keys
    assert {"train/epoch_seconds", "train/peak_bytes"} <= keys, keys
    assert b"plantedplanted" not in raw


def read(raw: bytes):
    """Read config and history from a run's file: a LevelDB log of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

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
                history.append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                )
    return config, history
