"""benchmarks/int4_step.py, benchmarks/t4.py and benchmarks/speed.py: as few repeats and steps as can be timed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from processes import Worker


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    name, *rest = arguments
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *rest], cwd=ROOT, capture_output=True, text=True
    )


def test_a_step_timed_once_is_its_own_median_and_quartiles(tmp_path: Path):
    out = tmp_path / "int4_step.json"
    done = benchmark(
        "int4_step.py", "--device", "cpu", "--batch", "1", "--lengths", "4", "--repeats", "1", "--out", str(out)
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 4
    for row in rows:
        assert row["step_seconds"] > 0
        assert row["step_seconds_quartiles"] == [row["step_seconds"]] * 2


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


@pytest.mark.long
def test_races_stand_beside_each_other_and_who_is_late_is_left_behind(tmp_path: Path):
    out = tmp_path / "speed.json"
    race = ["speed.py", "--models", "minilm:1", "--batches", "2", "--precisions", "fp32", "--methods", "qlora"]
    race += ["--steps", "1", "--out", str(out), "--append"]
    done = benchmark(*race, "--repeats", "2", "--contenders", "grouped", "ours", "lora/ours")
    assert done.returncode == 0, done.stderr
    first = json.loads(out.read_text())
    assert {(row["contender"], row["method"], row["repeats"]) for row in first["rows"]} == {
        ("grouped", "qlora", 2),
        ("ours", "qlora", 2),
        ("ours", "lora", 2),
    }
    assert all(row["samples_per_second"] > 0 and row["model"] == "minilm:1" for row in first["rows"])
    assert [(row["method"], row["batch"]) for row in first["limit"]] == [("qlora", 2), ("lora", 2)]
    assert out.with_suffix(".png").is_file()

    done = benchmark(*race, "--repeats", "1", "--contenders", "grouped", "--patience", "0")
    assert done.returncode == 0, done.stderr
    both = json.loads(out.read_text())
    assert both["rows"][:3] == first["rows"]
    late = both["rows"][3]
    assert (late["contender"], late["repeats"], late["samples_per_second"]) == ("grouped", 0, None)
    assert late["problem"].startswith("not ready after")
    assert both["command"].count("python benchmarks/speed.py") == 2

    done = benchmark("speed.py", "--models", "minlm")
    assert done.returncode == 2 and "minlm: allowed is one of minilm" in done.stderr
