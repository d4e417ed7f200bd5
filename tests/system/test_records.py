"""Files that are whole or not there, and records that say what they were made with."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import transformers
from conftest import ROOT, least_training

from qlora_kit.config.preset import preset
from qlora_kit.errors import KitError
from qlora_kit.run import finished_runs, load_run, newest_run
from qlora_kit.runs.folder import _version
from qlora_kit.runs.predictor import Predictions
from qlora_kit.runs.record import notebook_record
from qlora_kit.system import environment as system_environment
from qlora_kit.system.environment import commit, cpu_name, environment
from qlora_kit.system.files import (
    drop_partial,
    has_file_locks,
    locked,
    move_aside,
    move_into_place,
    plain,
    refuse_links,
    refuse_ways_out,
    saving,
    sha256,
    write_json,
    write_text,
)
from qlora_kit.system.parsing import SCHEMA, read_json
from qlora_kit.training.finetune import finetune


@dataclass
class Point:
    x: float
    place: Path


def test_plain_turns_what_a_record_holds_into_json():
    given = {
        1: Point(0.5, Path("a/b")),
        "array": np.array([[1, 2], [3, 4]]),
        "scalars": (np.float32(0.5), np.int64(3), np.bool_(True)),
        "numbers": [math.nan, math.inf, -math.inf, 1.5, True, None],
        "words": "text",
        "set": {7},
    }
    wanted = {
        "1": {"x": 0.5, "place": "a/b"},
        "array": [[1, 2], [3, 4]],
        "scalars": [0.5, 3, True],
        "numbers": [None, None, None, 1.5, True, None],
        "words": "text",
        "set": [7],
    }
    assert plain(given) == wanted
    assert json.loads(json.dumps(plain(given), allow_nan=False)) == wanted
    with pytest.raises(TypeError, match="object cannot be written"):
        plain(object())


def test_a_file_is_written_whole_and_read_back(tmp_path):
    file = tmp_path / "new" / "record.json"
    write_json(file, {"ä": [1, math.nan]})
    assert file.read_text(encoding="utf-8") == '{\n  "ä": [\n    1,\n    null\n  ]\n}\n'
    assert read_json(file) == {"ä": [1, None]}
    assert [item.name for item in file.parent.iterdir()] == ["record.json"]
    assert file.stat().st_mode & 0o777 == 0o644
    before = file.read_text()
    with pytest.raises(TypeError):
        write_json(file, {"x": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "\ud800")
    assert file.read_text() == before and len(list(file.parent.iterdir())) == 1


def test_where_a_file_cannot_be_it_is_named(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(KitError, match=re.escape(f"{tmp_path / 'taken' / 'a.json'} cannot be written")):
        write_json(tmp_path / "taken" / "a.json", {})


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(KitError, match=r"gone\.json is missing"):
        read_json(tmp_path / "gone.json")
    for content in (b"{", b"\xff", b""):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(KitError, match=r"bad\.json is no JSON"):
            read_json(tmp_path / "bad.json")


def test_half_written_files_are_dropped_and_no_others(tmp_path):
    for name in (".a.json.x1.partial", "a.json", ".hidden", "b.partial"):
        (tmp_path / name).touch()
    (tmp_path / ".folder.partial").mkdir()
    drop_partial(tmp_path)
    assert sorted(item.name for item in tmp_path.iterdir()) == [".folder.partial", ".hidden", "a.json", "b.partial"]


def test_a_folder_is_moved_into_place_or_gives_way(tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    (made / "file").write_text("first")
    move_into_place(made, tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "first" and not made.exists()
    made.mkdir()
    (made / "file").write_text("second")
    move_into_place(made, tmp_path / "target")  # another process was faster
    assert (tmp_path / "target" / "file").read_text() == "first" and not made.exists()
    made.mkdir()
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match="Not a directory"):
        move_into_place(made, tmp_path / "taken")
    assert made.is_dir() and (tmp_path / "taken").read_text() == "a file"


@pytest.fixture
def disk(monkeypatch):
    """Return a list that notes, in order, which file or folder is synced and which is renamed, by its inode."""
    done: list[tuple[str, int]] = []

    def noting(name: str, inode):
        real = getattr(os, name)

        def call(*args, **kwargs):
            done.append((name, inode(*args)))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    noting("fsync", lambda descriptor: os.fstat(descriptor).st_ino)
    for name in ("rename", "replace"):
        noting(name, lambda source, target: os.stat(source).st_ino)
    return done


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_is_before_the_call_ends(tmp_path, disk):
    for write in (lambda file: write_text(file, "x"), lambda file: write_json(file, {"x": 1})):
        disk.clear()
        file = tmp_path / "record"
        write(file)
        inode, folder = (item.stat().st_ino for item in (file, tmp_path))
        assert disk == [("fsync", inode), ("replace", inode), ("fsync", folder)]


def test_a_folder_is_on_the_disk_before_it_has_its_name_and_its_name_is_before_the_call_ends(tmp_path, disk):
    made, target = tmp_path / "made", tmp_path / "there" / "target"
    for folder in (made / "inner" / "innermost", target.parent):
        folder.mkdir(parents=True)
    for file in (made / "a", made / "inner" / "b", made / "inner" / "innermost" / "c"):
        file.write_text(file.name)
    parts = {made.stat().st_ino, *(item.stat().st_ino for item in made.rglob("*"))}
    move_into_place(made, target)
    place = disk.index(("rename", target.stat().st_ino))
    assert len(parts) == 6 and set(disk[:place]) == {("fsync", part) for part in parts}
    assert disk[place + 1 :] == [("fsync", target.parent.stat().st_ino)]


def test_nothing_is_overwritten_by_moving_aside(tmp_path):
    names = []
    for i in range(3):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "which").write_text(str(i))
        names.append(move_aside(tmp_path / "run"))
    assert [(name / "which").read_text() for name in names] == ["0", "1", "2"]
    assert all(re.fullmatch(r"run-\d{4}-\d\d-\d\d-\d{6}(-\d)?", name.name) for name in names)
    of_second: dict[str, list[str]] = {}
    for name in names:
        _, stamp, count = re.fullmatch(r"(run)-([\d-]{17})(?:-(\d))?", name.name).groups()
        of_second.setdefault(stamp, []).append(count)
    # Those of one second are counted: the first has no number, the next is the second.
    assert all(counts == [None, "2", "3"][: len(counts)] for counts in of_second.values())


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space"), "no room left on the disk for here"),
        (OSError(errno.EDQUOT, "Quota"), "no room left on the disk for here"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), "no room left on the disk"),
        (Exception("No space left on device (os error 28)"), "no room left on the disk"),
        (OSError(errno.EACCES, "x"), "here cannot be written: Permission denied. Choose another folder"),
        (OSError(errno.EROFS, "x"), "here cannot be written: Read-only file system"),
        (OSError(errno.ENOTDIR, "x"), "here cannot be written: Not a directory"),
    ],
)
def test_what_stops_saving_is_one_message(error, says):
    with pytest.raises(KitError, match=re.escape(says)) as caught, saving("here"):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [KitError("mine"), OSError(errno.EIO, "disk"), RuntimeError("other"), KeyError("no")])
def test_other_errors_of_saving_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, saving("here"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("folder", ["/proc/nowhere/model", "/tmp/" + 300 * "a" + "/model"])
def test_a_folder_that_cannot_be_made_is_told_in_one_line(folder):
    with pytest.raises(KitError, match=r"cannot be made: .*Choose another folder"), saving(folder):
        Path(folder).parent.mkdir(parents=True)


def test_a_missing_file_elsewhere_is_not_told_as_a_matter_of_where_to_save(tmp_path):
    with pytest.raises(FileNotFoundError), saving(tmp_path / "model"):
        (tmp_path / "other").read_text()


def test_a_folder_is_one_processs_at_a_time(tmp_path):
    code = (
        "import sys; from pathlib import Path; from qlora_kit.errors import KitError\n"
        "from qlora_kit.system.files import locked\n"
        "try:\n    with locked(Path(sys.argv[1])): print('taken')\n"
        "except KitError as error: print(error)"
    )

    def other():
        command = [sys.executable, "-c", code, str(tmp_path / "run")]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()

    with locked(tmp_path / "run"):
        assert other() == f"another process is writing into {tmp_path / 'run'}; wait for it or choose another name"
    assert other() == "taken"
    with pytest.raises(RuntimeError), locked(tmp_path / "run"):
        raise RuntimeError  # the lock goes with the block, however it ends
    with locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()  # nothing was written: nothing is left
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "kept").touch()
    assert (tmp_path / "run" / "kept").exists()


def test_a_folder_that_cannot_be_held_is_named_with_the_reason(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with (
            pytest.raises(KitError, match=rf"^{re.escape(str(folder))} cannot be written: ") as caught,
            locked(folder),
        ):
            pytest.fail("it was held")
        assert isinstance(caught.value.__cause__, OSError)
    run = tmp_path / "deep" / "er" / "run"
    with locked(run):  # folders above it are made
        assert [item.name for item in run.iterdir()] == [".lock"]
        assert (run / ".lock").stat().st_mode & 0o777 == 0o644
    assert not run.exists() and run.parent.is_dir()
    run.mkdir()
    (tmp_path / "target").write_text("a stranger's")
    (run / ".lock").symlink_to(tmp_path / "target")
    words = f"{run / '.lock'} is a symbolic link: delete it, or choose another"
    with pytest.raises(KitError, match=re.escape(words)), locked(run):
        pytest.fail("it was held")
    assert (tmp_path / "target").read_text() == "a stranger's"
    (run / ".lock").unlink()
    (run / ".lock").mkdir()
    with pytest.raises(KitError, match=rf"^{re.escape(str(run))} cannot be written: Is a"), locked(run):
        pytest.fail("it was held")


def test_links_are_refused_wherever_they_are(tmp_path):
    run = tmp_path / "run"
    (run / "deep" / "deeper").mkdir(parents=True)
    (run / "file").touch()
    refuse_links(run)
    refuse_links(tmp_path / "not there yet")
    for place in (run / "link", run / "deep" / "deeper" / "link"):
        for target in (run / "file", run / "deep", tmp_path / "nowhere"):
            place.symlink_to(target)
            with pytest.raises(KitError, match=re.escape(f"{place} is a symbolic link")):
                refuse_links(run)
            place.unlink()
    (tmp_path / "alias").symlink_to(run)
    with pytest.raises(KitError, match="alias is a symbolic link"):
        refuse_links(tmp_path / "alias")


def test_links_that_lead_out_of_a_folder_are_refused_and_others_are_not(tmp_path):
    out, run = tmp_path / "out", "offline-run-20260102_030405-abcdefgh"
    for folder in (out / "deep" / "wandb" / run, tmp_path / "out-side"):
        folder.mkdir(parents=True)
    (out / "file").touch()
    for place in (out / "link", out / "deep" / "link", out / "deep" / "wandb" / "link", out / run):
        for inside in (out / "file", Path("deep"), out, Path("nowhere"), place):
            place.symlink_to(inside)
            refuse_ways_out(out)
            place.unlink()
        for outside in (tmp_path, tmp_path / "out-side", tmp_path / "nowhere", Path("..", "..", "..", "nowhere")):
            place.symlink_to(outside)
            with pytest.raises(KitError, match=re.escape(f"{place} is a symbolic link that leads out of {out}")):
                refuse_ways_out(out)
            place.unlink()
    (out / "deep" / "wandb" / run / "debug-core.log").symlink_to(tmp_path)  # W&B's own
    (tmp_path / "alias").symlink_to(out)
    refuse_ways_out(tmp_path / "alias")
    refuse_ways_out(tmp_path / "not there yet")


def test_an_environment_says_what_it_was_made_with():
    found = environment(data_checksum="d", base_checksum="b")
    assert found["checksums"] == {"data": "d", "base": "b"}
    assert found["device"] == found["cpu"] == cpu_name()
    assert re.search(r", \d+ cores?$", found["cpu"])
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "transformers", "peft", "bitsandbytes", "numpy"} <= found["versions"].keys()
    assert found["versions"]["numpy"] == np.__version__
    assert found["commit"] == commit()
    assert environment()["checksums"] == {"data": None, "base": None}
    import torch

    assert environment(torch.device("cpu"))["threads"] == torch.get_num_threads()
    assert "base_config" not in environment(base_checksum="b")["checksums"]
    assert environment(base_config_checksum="c")["checksums"]["base_config"] == "c"


def test_an_environment_names_the_gpu_that_did_the_work_beside_the_cpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    for device, name in (("cuda:1", "GPU 1"), (torch.device("cuda:0"), "GPU 0"), ("cpu", cpu_name())):
        found = environment(device)
        assert (found["device"], found["cpu"]) == (name, cpu_name())


def test_a_processor_is_named_with_the_cores_that_may_be_used(monkeypatch):
    def named() -> str:
        cpu_name.cache_clear()
        return cpu_name()

    whole = named()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5, 6}, raising=False)
    assert named() == whole.rpartition(",")[0] + ", 3 cores"
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {7}, raising=False)
    assert named().endswith(", 1 core")
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS has none
    for count, words in ((4, ", 4 cores"), (1, ", 1 core"), (None, ", 1 core")):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert named().endswith(words)
    monkeypatch.setattr(
        Path, "read_text", lambda *given, **more: "vendor_id : x\nmodel name\t: A  CPU: 2 \nmodel name : B"
    )
    assert named() == "A  CPU: 2, 1 core"  # the first line that has it, and all of it
    monkeypatch.setattr(Path, "read_text", lambda *given, **more: "vendor_id : x")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "some machine")
    assert named() == "some machine, 1 core"
    monkeypatch.undo()
    assert named() == whole


def test_an_environment_without_torch_knows_no_threads_and_loads_none():
    script = (
        "import sys; from qlora_kit import records\nprint(records.environment()['threads'], 'torch' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["None", "False"], done.stderr


def test_the_commit_says_whether_files_differ(monkeypatch, tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("1")

    def commit():
        system_environment.commit.cache_clear()
        try:
            return system_environment.commit()
        finally:
            system_environment.commit.cache_clear()

    monkeypatch.setattr("qlora_kit.system.environment.__file__", str(package / "system" / "environment.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() is None  # an installed package
    monkeypatch.setenv("QLORA_KIT_COMMIT", "4f" * 20)
    assert commit() == "4f" * 20  # a copy that was told its commit
    monkeypatch.setenv("QLORA_KIT_COMMIT", "main")
    assert commit() is None
    monkeypatch.delenv("QLORA_KIT_COMMIT")
    (tmp_path / ".gitignore").write_text("package\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "somebody's own"]):
        subprocess.run([*git, *command], check=True)
    assert commit() is None  # installed inside of a repository that does not hold it
    for command in (["add", "-f", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert commit() == head
    (tmp_path / "elsewhere").touch()
    assert commit() == head  # the package alone counts
    (package / "__init__.py").write_text("2")
    assert commit() == f"{head}+changes"


@pytest.mark.parametrize(
    ("note", "commit"),
    [
        ({"url": "https://x/y", "vcs_info": {"vcs": "git", "commit_id": "4f" * 20}}, "4f" * 20),
        ({"url": "file:///y", "dir_info": {"editable": True}}, "None"),
        ({"vcs_info": {"commit_id": "main"}}, "None"),
        ({"vcs_info": None}, "None"),
        ([], "None"),
        (None, "None"),
    ],
)
def test_the_commit_of_an_installed_package_is_the_one_that_pip_noted(tmp_path, note, commit):
    package, noted = tmp_path / "qlora_kit", tmp_path / "qlora_kit-0.1.0.dist-info"
    shutil.copytree(
        ROOT / "qlora_kit", package, ignore=shutil.ignore_patterns("__pycache__", "datasets", "shapes", "presets")
    )
    noted.mkdir()
    (noted / "METADATA").write_text("Metadata-Version: 2.1\nName: qlora_kit\nVersion: 0.1.0\n")
    if note is not None:
        (noted / "direct_url.json").write_text(json.dumps(note))
    assert commit_of(package, tmp_path) == commit
    if note:  # what was noted of one copy says nothing about another
        other = tmp_path / "other" / "qlora_kit"
        shutil.copytree(package, other)
        assert commit_of(other, tmp_path / "other", tmp_path) == "None"


def commit_of(package: Path, *paths: Path) -> str:
    """Return the commit that the package which is found first on `paths` takes for its own."""
    script = "import qlora_kit.system.environment as e; print(e.__file__); print(e.commit())"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd="/")
    file, found = done.stdout.splitlines()
    assert file == str(package / "system" / "environment.py"), done.stderr
    return found


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK])
def test_where_a_file_system_has_no_locks_that_is_said_and_work_goes_on(tmp_path, monkeypatch, caplog, number):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    assert caplog.messages == [
        f"{tmp_path / 'run'} is on a file system without locks: let no other process write into it meanwhile."
    ]
    assert has_file_locks(tmp_path)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert not has_file_locks(tmp_path)
    assert not [item.name for item in tmp_path.iterdir() if item.name != "run"]


def test_a_lock_that_fails_is_another_process_only_where_there_is_one(tmp_path, monkeypatch):
    for number, words in ((errno.EWOULDBLOCK, "another process is writing into"), (errno.EIO, "cannot be locked: Inp")):

        def refuse(*arguments, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", refuse)
        with pytest.raises(KitError, match=words), locked(tmp_path / "run"):
            pass


def test_a_notebooks_record_has_the_sections_that_others_read():
    record = notebook_record(
        "03_evaluate",
        preset="p",
        experiment=preset("minilm_banking77_qlora"),
        metrics={"test": {"accuracy": {"value": np.float64(0.5)}}},
        more=Path("x"),
    )
    assert list(record)[:9] == [
        "schema", "notebook", "preset", "experiment", "metrics", "memory", "timing", "parameters", "environment",
    ]  # fmt: skip
    assert record["schema"] == SCHEMA == 1 and (record["notebook"], record["preset"]) == ("03_evaluate", "p")
    assert record["experiment"]["name"] == "minilm_banking77_qlora"
    assert record["metrics"] == {"test": {"accuracy": {"value": 0.5}}} and record["more"] == "x"
    assert record["memory"] == record["timing"] == record["parameters"] == {}
    assert record["environment"]["versions"]["python"]
    assert notebook_record("a", preset="p", environment={"device": "d"})["environment"] == {"device": "d"}
    assert notebook_record("a", preset="p")["experiment"] == {}
    with pytest.raises(KitError, match="'schema' of its own"):
        notebook_record("a", preset="p", schema=2)


# ---- run folders ----


def finished(folder: Path, name: str = "minilm_banking77_qlora", labels=("a", "b")) -> Path:
    """Make the files that tell a finished run; no model is loaded by opening it."""
    for part in ("adapter", "tokenizer"):
        (folder / part).mkdir(parents=True)
    write_text(folder / "experiment.yaml", preset("minilm_banking77_qlora").override({"name": name}).to_yaml())
    write_json(folder / "training.json", least_training(labels, name))
    return folder


def test_a_run_folder_is_opened(tmp_path):
    run = load_run(finished(tmp_path / "run", labels=("1", "b")))
    assert run.label_names == ["1", "b"] and run.evaluation is None
    assert run.experiment.name == "minilm_banking77_qlora" and repr(run).startswith(f"Run {run.path}: ")
    write_json(run.path / "evaluation.json", {"metrics": {}})
    with pytest.raises(KitError, match=r"evaluation\.json: the whole: 'schema' is a required property"):
        _ = run.evaluation
    with pytest.raises(KitError, match=r"environment\.json is missing"):
        _ = run.environment
    with pytest.raises(KitError, match=rf"no run folder .*Did you mean {str(run.path)!r}\?"):
        load_run(tmp_path / "rnu")
    with pytest.raises(KitError, match="there is no run folder 'no/such/place'"):
        load_run("no/such/place")


def test_a_run_goes_with_the_base_that_it_was_trained_on_alone(tiny, topics, tiny_experiment, tmp_path):
    from safetensors.torch import load_file, save_file

    base, weights = tmp_path / "base", tmp_path / "base" / "model.safetensors"
    shutil.copytree(tiny("bert"), base)
    before = weights.read_bytes()
    experiment = tiny_experiment("bert", model__name=str(base), training__max_steps=2)
    run = finetune(experiment, data=topics, out=tmp_path, name="run", progress=False)
    assert run.environment["checksums"]["base"] == sha256(weights)
    logits = run.predict(["where is my card"]).logits
    state = {name: value + 0.05 if value.is_floating_point() else value for name, value in load_file(weights).items()}
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(
        KitError, match=rf"{run.path} was trained on other weights than {base} now holds .* train again"
    ):
        load_run(run.path).predict(["where is my card"])
    again = finetune(experiment, data=topics, out=tmp_path, name="run", progress=False)  # the other is moved aside
    assert again.environment["checksums"]["base"] == sha256(weights) and again.predict(["where is my card"])
    (aside,) = tmp_path.glob("run-*")
    weights.write_bytes(before)
    assert np.array_equal(load_run(aside).predict(["where is my card"]).logits, logits)
    # Weights that are gone, as from the hub's cache, say nothing against a finished run.
    weights.unlink()
    kept = finetune(experiment, data=topics, out=tmp_path, name="run", progress=False)
    assert kept.path == again.path and len(list(tmp_path.glob("run*"))) == 2


def test_a_run_goes_with_the_configuration_that_it_was_trained_on_alone(tiny, topics, tiny_experiment, tmp_path):
    base, config = tmp_path / "base", tmp_path / "base" / "config.json"
    shutil.copytree(tiny("bert"), base)
    experiment = tiny_experiment("bert", model__name=str(base), training__max_steps=1)
    run = finetune(experiment, data=topics, out=tmp_path, name="run", progress=False)
    logits, values = run.predict(["where is my card"]).logits, json.loads(config.read_text())
    config.write_text(json.dumps({**values, "layer_norm_eps": 0.5}))
    with pytest.raises(KitError, match=rf"{run.path} was trained on another config.json than {base} now holds"):
        load_run(run.path).predict(["where is my card"])
    finetune(experiment, data=topics, out=tmp_path, name="run", progress=False)
    (aside,) = tmp_path.glob("run-*")
    # Another version writes the same in another order, and its own number.
    config.write_text(json.dumps({**dict(reversed(values.items())), "transformers_version": "9.0"}))
    assert np.array_equal(load_run(aside).predict(["where is my card"]).logits, logits)


def test_a_run_that_was_cut_off_goes_on_from_its_own_base_alone(tiny, topics, tiny_experiment, tmp_path):
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    base, weights = tmp_path / "base", tmp_path / "base" / "model.safetensors"
    shutil.copytree(tiny("bert"), base)
    experiment = tiny_experiment("bert", model__name=str(base), training__max_steps=2)

    def cut_off():
        with pytest.raises(KeyboardInterrupt):
            finetune(experiment, data=topics, out=tmp_path, name="run", progress=False, callbacks=[Stop()])
        return read_json(tmp_path / "run" / "environment.json")["checksums"]["base"], len(list(tmp_path.glob("run*")))

    first = cut_off()
    assert first == cut_off() == (sha256(weights), 1)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert cut_off() == (sha256(weights), 2)


@pytest.mark.parametrize("part", ["experiment.yaml", "training.json", "adapter", "tokenizer"])
def test_an_unfinished_run_is_refused_by_what_is_missing(tmp_path, part):
    run = finished(tmp_path / "run")
    (run / part).rename(tmp_path / "elsewhere")
    with pytest.raises(KitError, match=f"no finished run: {part} is missing"):
        load_run(run)


def test_the_newest_run_of_a_preset_is_found(tmp_path):
    assert newest_run("mine", tmp_path) is None
    for age, (place, name) in enumerate([("a", "mine"), ("deep/er/b", "mine"), ("c", "other"), ("half", "mine")]):
        run = finished(tmp_path / place, name)
        os.utime(run / "training.json", (1000 + age, 1000 + age))
    (tmp_path / "half" / "tokenizer").rmdir()
    assert newest_run("mine", tmp_path) == tmp_path / "deep" / "er" / "b"
    assert newest_run("other", tmp_path) == tmp_path / "c"
    assert newest_run("nobody's", tmp_path) is None


def test_runs_are_looked_for_in_runs_where_nothing_else_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert newest_run("mine") is None
    finished(tmp_path / "runs" / "a", "mine")
    finished(tmp_path / "b", "mine")
    assert newest_run("mine") == Path("runs", "a")


def test_finished_runs_come_newest_first_and_those_that_cannot_be_opened_are_said(tmp_path, caplog):
    for age, (place, name) in enumerate([("old", "mine"), ("b", "mine"), ("a", "other"), ("half", "mine")]):
        run = finished(tmp_path / place, name)
        os.utime(run / "training.json", (1000 + age // 2, 1000 + age // 2))  # two of each second
    (tmp_path / "half" / "tokenizer").rmdir()

    def found(*preset: str) -> list[str]:
        caplog.clear()
        return [run.path.name for run in finished_runs(tmp_path, *preset)]

    assert found() == ["a", "old", "b"]  # of one second, the last by name goes first
    (line,) = [message for message in caplog.messages if message.startswith("Passed over")]
    assert line.startswith(f"Passed over {tmp_path / 'half'}: ") and "tokenizer is missing" in line
    assert found("mine") == ["old", "b"] and found("other") == ["a"]
    assert not [message for message in caplog.messages if message.startswith("Passed over")]  # it is another's
    (tmp_path / "a" / "experiment.yaml").write_text("name: [")
    assert found() == ["old", "b"] and len([line for line in caplog.messages if "Passed over" in line]) == 2


@pytest.mark.parametrize(
    ("older", "newer"),
    [("0.1.0", "0.2.0"), ("0.9.0", "0.10.0"), ("1.2.3", "1.2.4"), ("1.2", "1.2.1"), ("0.1.0+local.9", "0.1.1")],
)
def test_versions_are_compared_by_their_numbers(older, newer):
    assert _version(older) < _version(newer)
    assert _version(f"{newer}+abc7.1") == _version(newer)


def test_what_a_folder_cannot_be_made_in_is_named_and_other_errors_are_not(tmp_path):
    long = tmp_path / ("n" * 300) / "record.json"
    with pytest.raises(KitError, match=re.escape(f"{long} cannot be made: File name too long. Choose another folder")):
        write_text(long, "x")
    with pytest.raises(FileNotFoundError), saving(tmp_path / "here"):
        (tmp_path / "elsewhere" / "missing").read_text()  # not a matter of where to save


def test_nothing_is_written_over_a_file_that_another_process_is_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda size: "ab" * size)
    other = tmp_path / ".record.json.abababab.partial"
    other.write_text("another's")
    with pytest.raises(KitError, match="cannot be written: File exists"):
        write_text(tmp_path / "record.json", "mine")
    assert not (tmp_path / "record.json").exists()


def test_lines_are_written_as_they_are_on_every_system(tmp_path):
    for text in ("a\nb\r\nc", ""):
        write_text(tmp_path / "text", text)
        assert (tmp_path / "text").read_bytes() == text.encode()
    write_text(str(tmp_path / "a" / "b" / "text"), "ü")
    assert (tmp_path / "a" / "b" / "text").read_bytes() == b"\xc3\xbc"


def test_a_warning_of_a_run_without_a_manifest_names_the_folder_and_the_file(tmp_path, caplog):
    run = finished(tmp_path / "run")
    load_run(run)
    (line,) = caplog.messages
    assert line.startswith(f"{run} has no manifest.json, so whether files in it were changed cannot be said")


def test_predictions_are_as_many_as_their_texts():
    found = Predictions(["a", "b"], np.array([0, 1]), np.full((2, 2), 0.5), np.zeros((2, 2), np.float32))
    assert len(found) == 2
