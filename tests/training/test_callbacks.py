"""The printed line of an epoch: how far it is, how long is left, and whose memory it tells."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from qlora_kit.training import EpochLines, callbacks


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (5399, "90 min"), (5401, "1.5 h"), (36_000, "10.0 h")],
)
def test_a_time_is_told_in_the_unit_that_suits_it(seconds: float, said: str):
    assert callbacks._spoken(seconds) == said


def test_an_epochs_line_says_how_long_is_left_and_whose_memory(monkeypatch, tmp_path, capsys):
    now = [100.0]
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now[0])
    args = TrainingArguments(output_dir=str(tmp_path), num_train_epochs=4, report_to=[])
    speed = {"epoch_seconds": 60.0, "samples_per_second": 5.0, "tokens_per_second": 50.0, "peak_bytes": 2**30}
    state, lines = TrainerState(max_steps=40, global_step=10), EpochLines()

    def line(step: int) -> str:
        state.global_step, state.epoch, state.log_history = step, step / 10, [{**speed, "step": step}]
        lines.on_evaluate(args, state, TrainerControl(), metrics={"eval_loss": 0.5, "eval_f1_macro": 0.75})
        return capsys.readouterr().out

    assert "left" not in line(10)  # an evaluation before the training has begun
    lines.on_train_begin(args, state, TrainerControl())  # goes on at step 10
    assert "left" not in line(10)
    now[0] += 60  # ten steps of this process took 60 s, so the other twenty take 120
    said = line(20)
    assert said.startswith("epoch 2 of 4, step 20 of 40; validation loss 0.5000; macro F1 0.7500; 5.0 samples/s")
    whose = "" if torch.cuda.is_available() else r" \(whole process\)"
    assert re.search(rf"; peak{whose} 1,024 MiB; about 2 min left$", said.strip())
    assert "left" not in line(40)
