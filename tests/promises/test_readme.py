"""README is held to what it says: its ten lines run as they stand, its links lead somewhere (figures: test_figures)."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import qlora_kit as qk

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def questions(tmp_path):
    """Write a user's own CSV: other column names, four topics."""
    full = qk.banking77()
    names = full.label_names[:4]
    with open(tmp_path / "questions.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "question", "topic"])
        for number, (text, label) in enumerate(zip(full.train.texts, full.train.labels, strict=True)):
            if full.label_names[label] in names and number % 4 == 0:
                writer.writerow([number, text, full.label_names[label]])
    return tmp_path


def ten_lines() -> str:
    (code,) = re.findall(r"<!-- ten lines.*?-->\n```python\n(.*?)```", README, re.DOTALL)
    return code


def test_the_ten_lines_are_no_more_than_ten():
    assert len([line for line in ten_lines().splitlines() if line.strip()]) <= 10


def test_the_ten_lines_run_as_they_stand(questions):
    result = subprocess.run(
        [sys.executable, "-c", ten_lines()],
        cwd=questions,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    score, labels = result.stdout.strip().splitlines()[-2:]
    assert {"value", "low", "high"} <= set(json.loads(score.replace("'", '"')))
    assert labels.startswith("['")
    (run,) = (questions / "runs").glob("*/evaluation.json")
    assert run.parent.name == "minilm_questions_qlora_seed0"


def test_every_link_into_the_repository_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
