"""A real training process, killed again and again, ends in the same bits as one that was never killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_training import untimed, weights_of

import qlora_kit as qk
from qlora_kit import checkpoints, records

pytestmark = pytest.mark.long

CODE = """
import sys, qlora_kit as qk
from qlora_kit import training
from qlora_kit.experiment import Experiment
data = qk.data.load_saved(sys.argv[1])
print("started", flush=True)
qk.finetune(Experiment.from_yaml(sys.argv[2]), data=data, out=sys.argv[3], name="run", progress=False)
"""


def start(data, experiment, out):
    return subprocess.Popen(
        [sys.executable, "-c", CODE, str(data), str(experiment), str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


def test_killed_at_random_moments_and_resumed_it_is_the_same_run(topics, tiny_experiment, tmp_path):
    experiment = tiny_experiment("bert", training__epochs=20, training__checkpoint_steps=3)
    records.write_text(tmp_path / "experiment.yaml", experiment.to_yaml())
    data = topics.save(tmp_path / "data")
    arguments = (data, tmp_path / "experiment.yaml")
    finish(start(*arguments, tmp_path / "whole"))
    whole = qk.load_run(tmp_path / "whole" / "run")

    moments, kills, steps = random.Random(0), 0, set()
    for _ in range(6):
        process = start(*arguments, tmp_path / "cut")
        process.stdout.readline()  # the libraries are loaded
        try:
            process.wait(moments.uniform(0.5, 5.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        for checkpoint in checkpoints.listed(tmp_path / "cut" / "run" / "checkpoints"):
            assert checkpoints.problem(checkpoint) is None, "a checkpoint is half written"
            steps.add(checkpoints.step_of(checkpoint))
    finish(start(*arguments, tmp_path / "cut"))
    cut = qk.load_run(tmp_path / "cut" / "run")
    assert kills and len(steps) > 1
    one, other = weights_of(whole), weights_of(cut)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert untimed(cut.training) == untimed(whole.training)
