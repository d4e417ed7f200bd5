"""benchmarks/int4_step.py, benchmarks/t4.py and processes.py: as few repeats and steps as can be timed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from qlora_kit.checking.check import check

sys.path.insert(0, str(ROOT / "benchmarks"))
from common.processes import Worker


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    name, *rest = arguments
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *rest], cwd=ROOT, capture_output=True, text=True
    )


def test_a_step_timed_once_is_its_own_median_and_quartiles(tmp_path: Path):
    out = tmp_path / "int4_step.json"
    done = benchmark(
        "int4_step.py", "--device", "cpu", "--batch", "1", "--lengths", "4", "--repeats", "1", "--out", str(out),
        "--from-changes",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 4
    for row in rows:
        assert row["step_seconds"] > 0
        assert row["step_seconds_quartiles"] == [row["step_seconds"]] * 2
        assert row["repeats_seconds"] == [row["step_seconds"]]
    assert check([out]).wrong == []


@pytest.mark.long
def test_ways_to_wait_are_timed_beside_each_load(tmp_path: Path):
    out = tmp_path / "waiting.json"
    # One process beside at most: what spins beside two takes long, as the record says.
    options = ("--steps", "1", "--repeats", "1", "--beside", "0", "1")
    done = benchmark("waiting.py", *options, "--out", str(out), "--from-changes")
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["way"] for row in rows} == {"spinning", "briefly", "asleep", "one_thread"}
    assert {row["beside"] for row in rows} == {0, 1} and len({(row["way"], row["beside"]) for row in rows}) == len(rows)
    for row in rows:
        assert row["step_seconds_range"] == [row["step_seconds"]] * 2 and row["turns"][0]["steps"] == 1
        assert (row["environment"]["threads"] == 1) == (row["way"] == "one_thread")
    assert check([out]).wrong == []


def test_fewer_processes_than_none_are_refused():
    done = benchmark("waiting.py", "--beside", "-1")
    assert done.returncode == 2 and "--beside" in done.stderr


@pytest.mark.parametrize("option", ["--steps", "--repeats"])
def test_turns_of_nothing_are_refused(option: str):
    done = benchmark("waiting.py", option, "0")
    assert done.returncode == 2 and f"{option} must be 1 or more" in done.stderr


@pytest.mark.parametrize("steps", ["19", "-1", "many"])
def test_steps_too_few_to_be_timed_are_refused(steps: str):
    done = benchmark("t4.py", f"--recipe-steps={steps}")
    assert done.returncode == 2
    assert f"{steps}: allowed are 20 steps or more" in done.stderr


def test_a_worker_that_is_late_is_ended_and_what_it_said_before_is_heard():
    worker = Worker([sys.executable, "-c", "import time; print('{\"step\": 1}', flush=True); time.sleep(600)"])
    assert worker.hear() == {"step": 1} and worker.problem is None
    assert worker.hear(time.monotonic() + 0.5) == {}
    assert worker.problem.startswith("not ready after")
    assert worker.ask("go") == {}


def test_a_worker_that_ends_says_how():
    worker = Worker([sys.executable, "-c", "raise SystemExit(3)"])
    assert worker.hear() == {} and worker.problem == "ended with code 3"
