"""No home, a home that cannot be written, a user without a name: runs are trained and tested all the same."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT

import qlora_kit as qk
from qlora_kit.system import home
from qlora_kit.system.files import cache_folder, write_text

# The process has a user of no name, who may read and write what root may: no passwd entry, no HOME, no USER. What asks
# for permissions instead of trying is told of that user's, so what the process makes is for everybody.
NAMELESS = """
import os
os.umask(0)
for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
    os.environ.pop(name, None)
os.setresgid(54321, 0, 0)
os.setresuid(54321, 0, 0)
"""
WORK = """
import json, sys
import qlora_kit as qk
from qlora_kit import plots
from qlora_kit.system.files import cache_folder, write_text
folder, data, experiment = sys.argv[1:]
run = qk.finetune(
    qk.Experiment.from_yaml(experiment), data=qk.data.load_saved(data), out=folder + "/runs", name="mine",
    progress=False,
)
qk.evaluate(run, resamples=10, baselines=False, progress=False)
cache_folder().mkdir(parents=True, exist_ok=True)
write_text(cache_folder() / "weights", "x")
import matplotlib.pyplot as plt
plt.figure().savefig(folder + "/figure.png")
print(run.predict(["Where is my card?"]).labels)
"""


def at_work(folder: Path, topics, experiment, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Train, test, predict and draw in a process of its own."""
    topics.save(folder / "data")
    write_text(folder / "experiment.yaml", experiment.to_yaml())
    names = ("XDG_", "WANDB_", "MPLCONFIGDIR", "QLORA_KIT_CACHE", "NETRC")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(names)}
    return subprocess.run(
        [sys.executable, "-c", before + WORK, str(folder), str(folder / "data"), str(folder / "experiment.yaml")],
        env=kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("before", "environment"),
    [
        pytest.param("", {"HOME": "/proc"}, id="a home that cannot be written"),
        pytest.param("", {"HOME": "/proc/none"}, id="a home that cannot be made"),
        pytest.param(
            "",
            {
                "HOME": "/proc", "XDG_CACHE_HOME": "/proc", "XDG_DATA_HOME": "/proc", "XDG_CONFIG_HOME": "/proc",
                "MPLCONFIGDIR": "/proc/mpl", "WANDB_DIR": "/proc/wandb",
            },
            id="folders for caches that cannot be written",
        ),
        pytest.param(
            NAMELESS, {}, id="a user without a name",
            marks=pytest.mark.skipif(
                not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may become another user"
            ),
        ),
    ],
)  # fmt: skip
def test_a_run_needs_no_home(before, environment, topics, tiny_experiment):
    with tempfile.TemporaryDirectory() as folder:  # not below pytest's own, which is its user's alone
        Path(folder).chmod(0o777)
        run_without_home(Path(folder), before, environment, topics, tiny_experiment)


def run_without_home(tmp_path: Path, before: str, environment: dict[str, str], topics, tiny_experiment) -> None:
    experiment = tiny_experiment("bert", tracking__wandb="offline", training__max_steps=2)
    done = at_work(tmp_path, topics, experiment, before, **environment)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    # Not even the log is lost, nor anything left in the folder that it was started in.
    assert "W&B" not in done.stderr, done.stderr
    assert list(tmp_path.glob("runs/wandb/offline-run-*/files/media/table/validation/per_label*"))
    assert qk.load_run(tmp_path / "runs" / "mine").evaluation["metrics"]["test"]
    assert {item.name for item in tmp_path.iterdir()} == {"data", "experiment.yaml", "figure.png", "runs"}


def test_converted_weights_are_kept_in_the_home_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.delenv("QLORA_KIT_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "qlora_kit"
    monkeypatch.setenv("HOME", "/proc")
    elsewhere = cache_folder()
    assert elsewhere.is_relative_to(home.instead_of_home()) and elsewhere == cache_folder()
    assert home.instead_of_home().stat().st_mode & 0o077 == 0  # nobody else's weights are found there
    monkeypatch.setenv("QLORA_KIT_CACHE", "/proc/mine")
    assert cache_folder() == Path("/proc/mine")  # what the user has named stays
