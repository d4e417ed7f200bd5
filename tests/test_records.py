"""Files that are whole or not there, and records that say what they were made with."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import transformers
from conftest import ROOT

from qlora_kit import finetune, models, preset, records
from qlora_kit.errors import KitError


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
    assert records.plain(given) == wanted
    assert json.loads(json.dumps(records.plain(given), allow_nan=False)) == wanted
    with pytest.raises(TypeError, match="object cannot be written"):
        records.plain(object())


def test_a_file_is_written_whole_and_read_back(tmp_path):
    file = tmp_path / "new" / "record.json"
    records.write_json(file, {"ä": [1, math.nan]})
    assert file.read_text(encoding="utf-8") == '{\n  "ä": [\n    1,\n    null\n  ]\n}\n'
    assert records.read_json(file) == {"ä": [1, None]}
    assert [item.name for item in file.parent.iterdir()] == ["record.json"]
    assert file.stat().st_mode & 0o777 == 0o644
    before = file.read_text()
    with pytest.raises(TypeError):
        records.write_json(file, {"x": object()})
    with pytest.raises(UnicodeEncodeError):
        records.write_text(file, "\ud800")
    assert file.read_text() == before and len(list(file.parent.iterdir())) == 1


def test_where_a_file_cannot_be_it_is_named(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(KitError, match=re.escape(f"{tmp_path / 'taken' / 'a.json'} cannot be written")):
        records.write_json(tmp_path / "taken" / "a.json", {})


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(KitError, match=r"gone\.json is missing"):
        records.read_json(tmp_path / "gone.json")
    for content in (b"{", b"\xff", b""):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(KitError, match=r"bad\.json is no JSON"):
            records.read_json(tmp_path / "bad.json")


def test_half_written_files_are_dropped_and_no_others(tmp_path):
    for name in (".a.json.x1.partial", "a.json", ".hidden", "b.partial"):
        (tmp_path / name).touch()
    (tmp_path / ".folder.partial").mkdir()
    records.drop_partial(tmp_path)
    assert sorted(item.name for item in tmp_path.iterdir()) == [".folder.partial", ".hidden", "a.json", "b.partial"]


def test_a_folder_is_moved_into_place_or_gives_way(tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    (made / "file").write_text("first")
    records.move_into_place(made, tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "first" and not made.exists()
    made.mkdir()
    (made / "file").write_text("second")
    records.move_into_place(made, tmp_path / "target")  # another process was faster
    assert (tmp_path / "target" / "file").read_text() == "first" and not made.exists()
    made.mkdir()
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match="Not a directory"):
        records.move_into_place(made, tmp_path / "taken")
    assert made.is_dir() and (tmp_path / "taken").read_text() == "a file"


def test_nothing_is_overwritten_by_moving_aside(tmp_path):
    names = []
    for i in range(3):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "which").write_text(str(i))
        names.append(records.move_aside(tmp_path / "run"))
    assert [(name / "which").read_text() for name in names] == ["0", "1", "2"]
    assert all(re.fullmatch(r"run-\d{4}-\d\d-\d\d-\d{6}(-\d)?", name.name) for name in names)


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
    with pytest.raises(KitError, match=re.escape(says)) as caught, records.saving("here"):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [KitError("mine"), OSError(errno.EIO, "disk"), RuntimeError("other"), KeyError("no")])
def test_other_errors_of_saving_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, records.saving("here"):
        raise error
    assert caught.value is error


def test_a_folder_is_one_processs_at_a_time(tmp_path):
    code = (
        "import sys; from pathlib import Path; from qlora_kit import records\n"
        "try:\n    with records.locked(Path(sys.argv[1])): print('taken')\n"
        "except records.KitError as error: print(error)"
    )

    def other():
        command = [sys.executable, "-c", code, str(tmp_path / "run")]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()

    with records.locked(tmp_path / "run"):
        assert other() == f"another process is writing into {tmp_path / 'run'}; wait for it or choose another name"
    assert other() == "taken"
    with pytest.raises(RuntimeError), records.locked(tmp_path / "run"):
        raise RuntimeError  # the lock goes with the block, however it ends
    with records.locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()  # nothing was written: nothing is left
    with records.locked(tmp_path / "run"):
        (tmp_path / "run" / "kept").touch()
    assert (tmp_path / "run" / "kept").exists()


def test_links_are_refused_wherever_they_are(tmp_path):
    run = tmp_path / "run"
    (run / "deep" / "deeper").mkdir(parents=True)
    (run / "file").touch()
    records.refuse_links(run)
    records.refuse_links(tmp_path / "not there yet")
    for place in (run / "link", run / "deep" / "deeper" / "link"):
        for target in (run / "file", run / "deep", tmp_path / "nowhere"):
            place.symlink_to(target)
            with pytest.raises(KitError, match=re.escape(f"{place} is a symbolic link")):
                records.refuse_links(run)
            place.unlink()
    (tmp_path / "alias").symlink_to(run)
    with pytest.raises(KitError, match="alias is a symbolic link"):
        records.refuse_links(tmp_path / "alias")


def test_links_that_lead_out_of_a_folder_are_refused_and_others_are_not(tmp_path):
    out, run = tmp_path / "out", "offline-run-20260102_030405-abcdefgh"
    for folder in (out / "deep" / "wandb" / run, tmp_path / "out-side"):
        folder.mkdir(parents=True)
    (out / "file").touch()
    for place in (out / "link", out / "deep" / "link", out / "deep" / "wandb" / "link", out / run):
        for inside in (out / "file", Path("deep"), out, Path("nowhere"), place):
            place.symlink_to(inside)
            records.refuse_ways_out(out)
            place.unlink()
        for outside in (tmp_path, tmp_path / "out-side", tmp_path / "nowhere", Path("..", "..", "..", "nowhere")):
            place.symlink_to(outside)
            with pytest.raises(KitError, match=re.escape(f"{place} is a symbolic link that leads out of {out}")):
                records.refuse_ways_out(out)
            place.unlink()
    (out / "deep" / "wandb" / run / "debug-core.log").symlink_to(tmp_path)  # W&B's own
    (tmp_path / "alias").symlink_to(out)
    records.refuse_ways_out(tmp_path / "alias")
    records.refuse_ways_out(tmp_path / "not there yet")


def test_an_environment_says_what_it_was_made_with():
    found = records.environment(data_checksum="d", base_checksum="b")
    assert found["checksums"] == {"data": "d", "base": "b"}
    assert found["device"] == found["cpu"] == records.cpu_name()
    assert re.search(r", \d+ cores?$", found["cpu"])
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "transformers", "peft", "bitsandbytes", "numpy"} <= found["versions"].keys()
    assert found["versions"]["numpy"] == np.__version__
    assert found["commit"] == records.commit()
    assert records.environment()["checksums"] == {"data": None, "base": None}
    import torch

    assert records.environment(torch.device("cpu"))["threads"] == torch.get_num_threads()


def test_the_commit_says_whether_files_differ(monkeypatch, tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    package = tmp_path / "package"
    package.mkdir()
    (package / "records.py").write_text("1")

    def commit():
        records.commit.cache_clear()
        try:
            return records.commit()
        finally:
            records.commit.cache_clear()

    monkeypatch.setattr(records, "__file__", str(package / "records.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() is None  # an installed package
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
    (package / "records.py").write_text("2")
    assert commit() == f"{head}+changes"


def test_a_notebooks_record_has_the_sections_that_others_read():
    record = records.notebook_record(
        "03_evaluate",
        preset="p",
        experiment=preset("minilm_banking77_qlora"),
        metrics={"test": {"accuracy": {"value": np.float64(0.5)}}},
        more=Path("x"),
    )
    assert list(record)[:9] == [
        "schema", "notebook", "preset", "experiment", "metrics", "memory", "timing", "parameters", "environment",
    ]  # fmt: skip
    assert record["schema"] == records.SCHEMA == 1 and (record["notebook"], record["preset"]) == ("03_evaluate", "p")
    assert record["experiment"]["name"] == "minilm_banking77_qlora"
    assert record["metrics"] == {"test": {"accuracy": {"value": 0.5}}} and record["more"] == "x"
    assert record["memory"] == record["timing"] == record["parameters"] == {}
    assert record["environment"]["versions"]["python"]
    assert records.notebook_record("a", preset="p", environment={"device": "d"})["environment"] == {"device": "d"}
    assert records.notebook_record("a", preset="p")["experiment"] == {}
    with pytest.raises(KitError, match="'schema' of its own"):
        records.notebook_record("a", preset="p", schema=2)


# ---- run folders ----


def finished(folder: Path, name: str = "minilm_banking77_qlora", labels=("a", "b")) -> Path:
    """Make the files that tell a finished run; no model is loaded by opening it."""
    for part in ("adapter", "tokenizer"):
        (folder / part).mkdir(parents=True)
    records.write_text(folder / "experiment.yaml", preset("minilm_banking77_qlora").override({"name": name}).to_yaml())
    records.write_json(folder / "training.json", {"labels": list(labels)})
    return folder


def test_a_run_folder_is_opened(tmp_path):
    run = records.load_run(finished(tmp_path / "run", labels=(1, "b")))
    assert run.label_names == ["1", "b"] and run.evaluation is None
    assert run.experiment.name == "minilm_banking77_qlora" and repr(run) == f"Run({str(run.path)!r})"
    records.write_json(run.path / "evaluation.json", {"metrics": {}})
    assert run.evaluation == {"metrics": {}}
    with pytest.raises(KitError, match=r"environment\.json is missing"):
        _ = run.environment
    with pytest.raises(KitError, match=rf"no run folder .*Did you mean {str(run.path)!r}\?"):
        records.load_run(tmp_path / "rnu")
    with pytest.raises(KitError, match="there is no run folder 'no/such/place'"):
        records.load_run("no/such/place")


def test_a_run_goes_with_the_base_that_it_was_trained_on_alone(tiny, topics, tiny_experiment, tmp_path):
    from safetensors.torch import load_file, save_file

    base, weights = tmp_path / "base", tmp_path / "base" / "model.safetensors"
    shutil.copytree(tiny("bert"), base)
    before = weights.read_bytes()
    experiment = tiny_experiment("bert", model__name=str(base), training__max_steps=2)
    run = finetune(experiment, data=topics, out=tmp_path, name="run", progress=False)
    assert run.environment["checksums"]["base"] == models.sha256(weights)
    logits = run.predict(["where is my card"]).logits
    state = {name: value + 0.05 if value.is_floating_point() else value for name, value in load_file(weights).items()}
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(
        KitError, match=rf"{run.path} was trained on other weights than {base} now holds .* train again"
    ):
        records.load_run(run.path).predict(["where is my card"])
    again = finetune(experiment, data=topics, out=tmp_path, name="run", progress=False)  # the other is moved aside
    assert again.environment["checksums"]["base"] == models.sha256(weights) and again.predict(["where is my card"])
    (aside,) = tmp_path.glob("run-*")
    weights.write_bytes(before)
    assert np.array_equal(records.load_run(aside).predict(["where is my card"]).logits, logits)
    # Weights that are gone, as from the hub's cache, say nothing against a finished run.
    weights.unlink()
    kept = finetune(experiment, data=topics, out=tmp_path, name="run", progress=False)
    assert kept.path == again.path and len(list(tmp_path.glob("run*"))) == 2


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
        return records.read_json(tmp_path / "run" / "environment.json")["checksums"]["base"], len(
            list(tmp_path.glob("run*"))
        )

    first = cut_off()
    assert first == cut_off() == (models.sha256(weights), 1)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert cut_off() == (models.sha256(weights), 2)


@pytest.mark.parametrize("part", ["experiment.yaml", "training.json", "adapter", "tokenizer"])
def test_an_unfinished_run_is_refused_by_what_is_missing(tmp_path, part):
    run = finished(tmp_path / "run")
    (run / part).rename(tmp_path / "elsewhere")
    with pytest.raises(KitError, match=f"no finished run: {part} is missing"):
        records.load_run(run)


def test_the_newest_run_of_a_preset_is_found(tmp_path):
    assert records.newest_run("mine", tmp_path) is None
    for age, (place, name) in enumerate([("a", "mine"), ("deep/er/b", "mine"), ("c", "other"), ("half", "mine")]):
        run = finished(tmp_path / place, name)
        os.utime(run / "training.json", (1000 + age, 1000 + age))
    (tmp_path / "half" / "tokenizer").rmdir()
    assert records.newest_run("mine", tmp_path) == tmp_path / "deep" / "er" / "b"
    assert records.newest_run("other", tmp_path) == tmp_path / "c"
    assert records.newest_run("nobody's", tmp_path) is None
