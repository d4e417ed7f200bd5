"""An optional package that is older than PEFT wants, as Colab's torchao is: adapters work as if it were not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import ROOT

import qlora_kit as qk

SCHEMES = ("none", "int8", "nf4", "fp4", "int4")

# PEFT is imported first and has refused once, as in a notebook that uses it before the kit.
SCRIPT = """
import json
import sys
from pathlib import Path

import peft
import torch

def adapt():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"])).merge_and_unload()

try:
    adapt()
except ImportError as error:
    print(error)

import test_torchao

logits = test_torchao.train_reload_and_merge(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
adapt()
print(json.dumps(logits))
"""


def train_reload_and_merge(file: Path, out: Path, schemes: Sequence[str]) -> dict[str, list[list[float]]]:
    """Return the logits of two texts by scheme."""
    logits = {}
    for scheme in schemes:
        experiment = qk.preset(str(file)).override({"quantization.scheme": scheme})
        run = qk.load_run(qk.finetune(experiment, out=out, name=scheme, progress=False).path)
        run.merge(out / "merged" / scheme, progress=False)
        logits[scheme] = run.predict(["card 1", "cash 2"]).logits.tolist()
    return logits


def beside(packages: Path, file: Path, schemes: Sequence[str]) -> tuple[str, dict[str, list[list[float]]]]:
    """Do the same in a new process that has a folder of packages more; return what it printed first, too."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(file), str(packages / "runs"), *schemes],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (packages, Path(__file__).parent, ROOT / "tests", ROOT))),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *said, logits = done.stdout.splitlines()
    return "\n".join(said), json.loads(logits)


@pytest.fixture
def file(tiny_experiment, tmp_path):
    rows = [f"{place} {name},{name}" for name in ("card", "cash", "rate") for place in range(12)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(rows))
    data = {"data__name": str(tmp_path / "rows.csv"), "data__test": 0.2, "data__validation": 0.2}
    (file := tmp_path / "experiment.yaml").write_text(tiny_experiment(**data, training__max_steps=2).to_yaml())
    return file


def distribution(folder: Path, name: str, version: str) -> None:
    """Lay a package into a folder: its version is all that is looked at, and importing it fails the test."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(f"raise AssertionError('{name} was imported')\n")
    metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_adapters_are_trained_and_merged_beside_packages_too_old_for_peft(file, tmp_path):
    distribution(tmp_path / "old", "torchao", "0.10.0")
    distribution(tmp_path / "old", "gptqmodel", "2.0.0")
    said, logits = beside(tmp_path / "old", file, ("none", "int4"))
    assert "incompatible version of" in said, "PEFT itself does not mind any more"
    assert logits.keys() == {"none", "int4"}


@pytest.mark.long
def test_adapters_of_every_scheme_are_trained_and_merged_beside_colabs_torchao(file, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "colab")]
    subprocess.run([*command, "torchao==0.10.0"], check=True)
    said, logits = beside(tmp_path / "colab", file, SCHEMES)
    assert "incompatible version of torchao" in said
    assert logits == train_reload_and_merge(file, tmp_path / "without", SCHEMES)
