"""benchmarks/int4_step.py and benchmarks/t4.py: as few repeats and steps as can be timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


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
