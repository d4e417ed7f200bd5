"""A real training, killed again and again, ends in the same bits as one that was never killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from trainings import untimed, weights_of

import qlora_kit as qk
from qlora_kit.config.experiment import Experiment
from qlora_kit.system.files import write_json, write_text
from qlora_kit.system.parsing import read_json
from qlora_kit.training import checkpoints

pytestmark = pytest.mark.long

KILLS = 25
# What a life imports, imported once: a server forks each life from an interpreter that has it and has done nothing.
WARM = ("qlora_kit.training", "qlora_kit.memory", "transformers.models.bert.modeling_bert", "torch._dynamo")


def live(folder: str, out: str, event: int | None, prediction: int | None, log: str) -> None:
    """Train; die by SIGKILL before the given file event in `out`, or before the given batch of an evaluation."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from transformers import TrainerCallback

    torch.set_num_threads(1)
    seen = {"file events": 0, "predictions": 0}

    def count(what: str, last: int | None) -> None:
        seen[what] += 1
        if seen[what] == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(name: str, arguments: tuple) -> None:
        # Opening, making, renaming and removing of files, as Python itself tells of them.
        if name in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and out in str(arguments[0]):
            count("file events", event)

    class Watch(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            count("predictions", prediction)

    sys.addaudithook(watch)
    data = qk.data.load_saved(Path(folder) / "data")
    experiment = Experiment.from_yaml(Path(folder) / "experiment.yaml")
    qk.finetune(experiment, data=data, out=out, name="run", progress=False, callbacks=[Watch()])
    write_json(Path(folder) / "seen.json", seen)


class Lives:
    """Starts trainings that can be killed, each a process of its own."""

    def __init__(self, folder: Path, experiment: Experiment, data: qk.TextData) -> None:
        self.folder = folder
        write_text(folder / "experiment.yaml", experiment.to_yaml())
        data.save(folder / "data")
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(list(WARM))

    def start(self, out: str, event: int | None = None, prediction: int | None = None) -> multiprocessing.Process:
        log = str(self.folder / f"{out}.log")
        process = self.context.Process(
            target=live, args=(str(self.folder), str(self.folder / out), event, prediction, log)
        )
        process.start()
        return process

    def whole(self, out: str) -> qk.Run:
        """Let a training live to its end."""
        process = self.start(out)
        process.join()
        assert process.exitcode == 0, (self.folder / f"{out}.log").read_text()[-3000:]
        return qk.load_run(self.folder / out / "run")

    def killed(self, process: multiprocessing.Process, out: str, after: float | None = None) -> bool:
        """Kill a training after some seconds, or let it kill itself; say whether it was killed before its end."""
        process.join(after)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (self.folder / f"{out}.log").read_text()[-3000:]
        for checkpoint in checkpoints.listed(self.folder / out / "run" / "checkpoints"):
            assert checkpoints.problem(checkpoint) is None, "a checkpoint is half written"
        return process.exitcode != 0

    def steps(self, out: str) -> list[int]:
        return [checkpoints.step_of(found) for found in checkpoints.listed(self.folder / out / "run" / "checkpoints")]


@pytest.fixture
def begin(topics, tiny_experiment, tmp_path, monkeypatch):
    """Return a function that makes a training of some epochs, ready to be lived, and lets it live once unharmed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def make(epochs: int) -> tuple[Lives, qk.Run, dict[str, int]]:
        experiment = tiny_experiment("bert", training__epochs=epochs, training__checkpoint_steps=3)
        lives = Lives(tmp_path, experiment, topics)
        run = lives.whole("whole")
        return lives, run, read_json(tmp_path / "seen.json")

    return make


def assert_same(cut: qk.Run, whole: qk.Run) -> None:
    one, other = weights_of(whole), weights_of(cut)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert untimed(cut.training) == untimed(whole.training)
    files = [sorted(str(item.relative_to(run.path)) for item in run.path.rglob("*")) for run in (cut, whole)]
    assert files[0] == files[1], "a killed life left something behind"


def test_killed_at_random_moments_and_resumed_it_is_the_same_run(begin):
    seed = random.SystemRandom().randrange(2**32)
    print(f"random seed {seed}")
    moments = random.Random(seed)
    lives, run, _ = begin(epochs=20)
    started = time.monotonic()
    assert not lives.killed(lives.start("timed"), "timed")
    total = time.monotonic() - started
    training = qk.load_run(lives.folder / "timed" / "run").training["timing"]["train_seconds"]
    # Moments lie anywhere from a life's start to a share of the training that 25 lives hardly use up.
    longest = total - training + 3 * training / KILLS

    kills, runs, steps, started = 0, 0, set(), time.monotonic()
    while kills < KILLS or len(steps) <= 5:
        assert kills < 20 * KILLS, f"no life came far enough: checkpoints at steps {sorted(steps)} alone"
        if lives.killed(lives.start(f"cut{runs}"), f"cut{runs}", moments.uniform(0, longest)):
            kills += 1
            reached = set(lives.steps(f"cut{runs}"))
            if reached <= steps:
                longest *= 1.05  # starts slowed down by other work on the machine: leave more time for steps
            steps |= reached
        else:
            assert_same(qk.load_run(lives.folder / f"cut{runs}" / "run"), run)
            runs += 1
    print(f"{kills} kills in {time.monotonic() - started:.0f} s, with checkpoints at steps {sorted(steps)}")
    assert_same(lives.whole(f"cut{runs}"), run)


def test_killed_while_it_writes_files_or_evaluates_it_is_the_same_run(begin):
    seed = random.SystemRandom().randrange(2**32)
    print(f"random seed {seed}")
    moments = random.Random(seed)
    lives, run, seen = begin(epochs=20)
    assert seen["file events"] > 500 and seen["predictions"] >= 20
    # A life that goes on has fewer events before it, so each dies early in what is left to it.
    for _ in range(15):
        assert lives.killed(lives.start("cut", event=moments.randint(1, seen["file events"] // 10)), "cut")
    for _ in range(3):
        assert lives.killed(lives.start("cut", prediction=moments.randint(1, 2)), "cut")
    print(f"killed 18 times, with checkpoints at steps {lives.steps('cut')}")
    assert_same(lives.whole("cut"), run)


def test_killed_while_it_finishes_it_is_the_same_run(begin):
    # The last file events of all: adapter, tokenizer, records, and the checkpoints' removal.
    lives, run, seen = begin(epochs=2)
    for back in (0, 4, 12, 25, 40):
        out = f"cut{back}"
        assert lives.killed(lives.start(out, event=seen["file events"] - back), out)
        assert_same(lives.whole(out), run)


def test_two_at_once_do_not_disturb_each_other(begin):
    lives, run, _ = begin(epochs=6)
    both = [lives.start(out) for out in ("one", "other")]
    lock = lives.folder / "one" / "run" / "experiment.yaml"
    while both[0].is_alive() and not lock.is_file():
        time.sleep(0.01)
    # A third into the folder of the first: it says so and stops, and the first does not notice.
    third = lives.start("one")
    third.join()
    assert third.exitcode == 1
    assert "another process is writing into" in (lives.folder / "one.log").read_text()
    for out, process in zip(("one", "other"), both, strict=True):
        process.join()
        assert process.exitcode == 0, (lives.folder / f"{out}.log").read_text()[-3000:]
        assert_same(qk.load_run(lives.folder / out / "run"), run)
