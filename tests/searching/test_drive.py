"""A run and a search on what a mounted cloud drive is: no locks, no links, and a sync that takes its time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

import qlora_kit as qk
from qlora_kit.searching.search import _stored

# What the C library's calls do there. Go and Rust programs (W&B's core) call the kernel past it.
DRIVE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <unistd.h>

static int slow(const char *name, int file) {
    usleep(20000);
    return ((int (*)(int))dlsym(RTLD_NEXT, name))(file);
}
int fsync(int file) { return slow("fsync", file); }
int fdatasync(int file) { return slow("fdatasync", file); }
int flock(int file, int what) { errno = ENOTSUP; return -1; }
int symlink(const char *to, const char *at) { errno = ENOTSUP; return -1; }
int link(const char *to, const char *at) { errno = ENOTSUP; return -1; }
static int control(const char *name, int file, int what, void *argument) {
    if (what == F_GETLK || what == F_SETLK || what == F_SETLKW) { errno = ENOSYS; return -1; }
    return ((int (*)(int, int, ...))dlsym(RTLD_NEXT, name))(file, what, argument);
}
#define FROM_ARGUMENTS(NAME) int NAME(int file, int what, ...) { \
    va_list more; va_start(more, what); void *argument = va_arg(more, void *); va_end(more); \
    return control(#NAME, file, what, argument); }
FROM_ARGUMENTS(fcntl)
FROM_ARGUMENTS(fcntl64)
"""
WORK = """
import sys, qlora_kit as qk
from qlora_kit.config import Experiment
data, experiment, out = qk.data.load_saved(sys.argv[1]), Experiment.from_yaml(sys.argv[2]), sys.argv[3]
run = qk.finetune(experiment, data=data, out=out, progress=False)
qk.evaluate(run, baselines=False, data=data, resamples=10, progress=False)
space = {"training.learning_rate": (1e-4, 3e-2, "log")}
for trials in (1, 2):  # the second time it goes on with what is there
    qk.search(experiment.override({"tracking.wandb": "none"}), space, trials=trials, data=data, out=out, progress=False)
qk.zip_results(out)
"""


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a library that makes every file system such a one, for a process that loads it first."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs Linux and a C compiler")
    folder = tmp_path_factory.mktemp("drive")
    (folder / "drive.c").write_text(DRIVE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "drive.so", folder / "drive.c", "-ldl"], check=True)
    return folder / "drive.so"


def test_the_imitation_refuses_sqlite_unless_it_does_without_locks(drive: Path, tmp_path: Path):
    script = """
import sqlite3, pathlib, sys
from qlora_kit import records
folder = pathlib.Path(sys.argv[1])
print(records.has_file_locks(folder))
for ways in ("", "?vfs=unix-none"):
    try:
        with sqlite3.connect(f"file:{folder}/study.db{ways}", uri=True) as study:
            print(*study.execute("create table t (x)"), "made")
    except sqlite3.OperationalError as error:
        print(error)
"""
    env = {**os.environ, "LD_PRELOAD": str(drive), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.stdout == "False\ndisk I/O error\nmade\n", done.stderr


def test_a_study_on_a_drive_keeps_what_it_had(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["qlora_kit.searching.search"], "has_file_locks", lambda folder: False)
    folder = tmp_path / "a {search}, 50%?"  # what has a meaning in addresses and templates
    folder.mkdir()
    with _stored(folder, None, {"a": 1}) as study:
        assert "vfs=unix-none" in str(study._storage._backend.url)
        study.tell(study.ask(), 0.5)
    with _stored(folder, None, {"a": 1}) as study:
        assert [trial.value for trial in study.trials] == [0.5]
    monkeypatch.undo()  # the drive's folder, copied to a disk
    with _stored(folder, None, {"a": 1}) as study:
        assert [trial.value for trial in study.trials] == [0.5]
    assert [item.name for item in folder.iterdir()] == ["study.db"]


@pytest.mark.long
def test_a_run_and_a_search_on_a_drive_are_those_on_a_disk(drive, topics, tiny_experiment, tmp_path):
    experiment = tiny_experiment("bert", quantization__scheme="nf4", tracking__wandb="offline")
    topics.save(tmp_path / "data")
    (tmp_path / "mine.yaml").write_text(experiment.to_yaml())
    free = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    ended = {}
    for place, preload in (("disk", ""), ("drive", str(drive))):
        out = tmp_path / place
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", WORK, str(tmp_path / "data"), str(tmp_path / "mine.yaml"), str(out)],
            env={**free, "LD_PRELOAD": preload, "PYTHONPATH": str(ROOT), "NETRC": str(tmp_path / "none")},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        print(place, f"{time.monotonic() - begun:.0f} s")
        assert ("on a file system without locks" in done.stderr) == (place == "drive")
        run, search = qk.load_run(out / "tiny_bert_seed0"), qk.Search(out / "tiny_bert_search")
        trials = [(trial["parameters"], trial["f1_macro"]) for trial in search.trials]
        ended[place] = (run.evaluation["metrics"]["test"], run.training["losses"], trials)
        assert len(trials) == 2 and (tmp_path / f"{place}.zip").is_file()
        assert len(list(out.glob("wandb/offline-run-*/run-*.wandb"))) == 2  # the training, and its test
    assert json.dumps(ended["disk"]) == json.dumps(ended["drive"])
