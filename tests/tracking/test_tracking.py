"""W&B: offline without a login, read back from the run's own file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from conftest import ROOT
from packaging.version import Version
from transformers import TrainerCallback

import qlora_kit as qk
from qlora_kit import evaluation, tracking
from qlora_kit.config.experiment import Experiment
from qlora_kit.config.sections import ModelSpec, TrackingSpec
from qlora_kit.system.files import write_json, write_text
from qlora_kit.tracking import weights_and_biases

FINETUNE = """
import sys, qlora_kit as qk
from qlora_kit.config import Experiment
qk.finetune(
    Experiment.from_yaml(sys.argv[2]), data=qk.data.load_saved(sys.argv[1]), out=sys.argv[3], progress=False
)
"""


@pytest.fixture
def wandb_free(monkeypatch, tmp_path):
    """Take the shell's own W&B settings away; nobody is logged in."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def tracked(mode: str) -> Experiment:
    return Experiment(name="tracked", model=ModelSpec("embedded:minilm"), tracking=TrackingSpec(wandb=mode))


def test_the_mode_follows_login_environment_and_wish(monkeypatch, wandb_free, tmp_path):
    assert tracking.wandb_mode("none") is None
    assert tracking.wandb_mode("offline") == "offline"
    assert tracking.wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert tracking.wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracking.wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracking.wandb_mode("auto") is None
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert tracking.wandb_mode("auto") is None
    monkeypatch.setenv("WANDB_DISABLED", "false")
    assert tracking.wandb_mode("auto") == "online"
    monkeypatch.delenv("WANDB_API_KEY")
    for host in weights_and_biases.HOSTS:
        (tmp_path / "netrc").write_text(f"machine {host} login user password secret\n")
        assert tracking.wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.example:8080")
    assert tracking.wandb_mode("auto") == "offline"
    (tmp_path / "netrc").write_text("machine wandb.example:8080 login user password secret\n")
    assert tracking.wandb_mode("auto") == "online"


def test_the_installed_w_and_b_keeps_its_key_where_the_kit_looks(wandb_free):
    import wandb

    assert urlsplit(wandb.Settings().base_url).netloc in weights_and_biases.HOSTS


def test_nothing_stands_before_what_a_command_prints(wandb_free):
    # transformers prints a line as it is imported where WANDB_MODE is offline.
    done = subprocess.run(
        [sys.executable, "-c", "import qlora_kit.training; print('{}')"],
        env=os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "{}\n", done.stderr
    assert "offline" in done.stderr


def test_none_makes_no_run_and_no_folder(tmp_path):
    with tracking.opened(tracked("none"), tmp_path, "mine") as run:
        assert run is None
        tracking.log_validation(run, np.eye(2), [0, 1], ["a", "b"], ["x", "y"])
    assert list(tmp_path.iterdir()) == []
    # A training whose first part was tracked, and whose second is not: its test is not logged.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / tracking.FILE).write_text("{}")
    with tracking.opened(tracked("none"), tmp_path, "mine"):
        assert list((tmp_path / "mine").iterdir()) == []


def test_a_tracked_training_logs_its_losses_and_scores_in_the_project_that_was_named(
    wandb_free, topics, tiny_experiment, tmp_path
):
    experiment = tiny_experiment(
        "bert", tracking__wandb="offline", tracking__project="mine alone", training__max_steps=2,
        training__logging_steps=1,
    )  # fmt: skip
    run = qk.finetune(experiment, data=topics, out=tmp_path, progress=False)
    file = written(tmp_path)
    assert opened_as(file).project == "mine alone"
    _, history = read(file)
    assert [row["train/loss"] for row in history if "train/loss" in row] == [
        pytest.approx(entry["loss"]) for entry in run.training["losses"]
    ]
    (epoch,) = run.training["epochs"]
    scores = [row["eval/f1_macro"] for row in history if "eval/f1_macro" in row]
    assert scores and scores[0] == pytest.approx(epoch["validation"]["f1_macro"])
    assert [record.exit.exit_code for record in records_of(file) if record.HasField("exit")] == [0]


def test_a_training_that_fails_is_no_success_in_wandb(wandb_free, tmp_path):
    with pytest.raises(KeyboardInterrupt), tracking.opened(tracked("offline"), tmp_path, "mine"):
        raise KeyboardInterrupt
    codes = [record.exit.exit_code for record in records_of(written(tmp_path)) if record.HasField("exit")]
    assert codes == [1]


def test_texts_are_logged_where_they_are_public_or_the_user_asks(tiny_experiment):
    own = tiny_experiment("bert", data__name="rows.csv")
    assert not tracking.may_quote(own)
    assert tracking.may_quote(own.override({"tracking.log_texts": True}))
    assert tracking.may_quote(tiny_experiment("bert", data__name="banking77"))
    # Rows of the user's own beside Banking77's.
    assert not tracking.may_quote(tiny_experiment("bert", data__name="banking77", data__validation="rows.csv"))


def test_a_pair_that_is_confused_is_logged_without_its_texts(wandb_free, tmp_path):
    with tracking.opened(tracked("offline"), tmp_path, "mine") as run:
        tracking.log_validation(run, np.eye(2)[[1, 1, 0]], [0, 0, 1], None, ["x", "y"])
    file = written(tmp_path)
    (logged,) = read(file)[1]
    kept = table(file, logged["validation/confusions"])
    assert kept["columns"] == ["true", "predicted", "count", "share"]
    assert kept["data"] == [["x", "y", 2, 1.0], ["y", "x", 1, 1.0]]


@pytest.fixture
def trained(wandb_free, topics, tiny_experiment, tmp_path):
    """Return a finished run that W&B tracked offline."""
    experiment = tiny_experiment("bert", tracking__wandb="offline", training__epochs=1)
    return qk.finetune(experiment, data=topics, out=tmp_path, name="mine", progress=False)


@pytest.mark.skipif(
    Version(metadata.version("wandb")) < tracking.RESUMES_OFFLINE,
    reason="this W&B cannot go on with an offline run: the kit says so, see below",
)
def test_the_test_goes_into_the_run_of_the_training(trained, topics, tmp_path):
    import wandb

    users_own = wandb.init(mode="offline", dir=str(tmp_path / "elsewhere"), settings=wandb.Settings(silent=True))
    baselines = evaluation.baselines(topics, resamples=50, progress=False)
    result = qk.evaluate(trained, baselines=baselines, resamples=50, progress=False)
    assert wandb.run is users_own  # the user's own run goes on
    users_own.finish()
    training, testing = all_written(tmp_path)
    first, second = opened_as(training), opened_as(testing)
    assert first.run_id == second.run_id and first.display_name == second.display_name == "mine"
    # By this `wandb sync` adds the second part to the first.
    assert not first.resume and second.resume

    (logged,) = read(testing)[1]
    assert logged["_step"] == max(row["_step"] for row in read(training)[1]) + 1
    scores = result["metrics"]["test"]
    for name in ("accuracy", "f1_macro", "f1_weighted", "loss"):
        assert [logged[f"test/{name}{end}"] for end in ("", "_low", "_high")] == [
            scores[name][end] for end in ("value", "low", "high")
        ]
    assert logged["train/global_step"] == trained.training["steps"]
    matrix = table(testing, logged["test/confusion_matrix_table"])
    assert [row[:2] for row in matrix["data"][:2]] == [[topics.label_names[0], name] for name in topics.label_names[:2]]
    counts = np.array([count for *_, count in matrix["data"]]).reshape(len(topics.label_names), -1)
    assert counts.tolist() == result["confusion_matrix"]
    per_label = table(testing, logged["test/per_label"])
    assert [row[0] for row in per_label["data"]] == list(topics.label_names)
    against = table(testing, logged["test/baselines"])
    (svm,) = (dict(zip(against["columns"], row, strict=True)) for row in against["data"])
    ahead = result["metrics"]["baselines"]["tfidf_svm"]["ahead"]["f1_macro"]
    assert svm["baseline"] == "tfidf_svm" and svm["f1_macro"] == baselines["tfidf_svm"]["f1_macro"]["value"]
    assert [svm["ahead"], svm["ahead_low"], svm["ahead_high"]] == [ahead["value"], ahead["low"], ahead["high"]]
    # The texts of the test stay here.
    files = [item.read_bytes() for item in testing.parent.rglob("*") if item.is_file()]
    assert not [text for text in topics.test.texts for file in files if text.encode() in file]


def test_a_test_is_not_logged_where_that_is_not_wanted_or_would_do_harm(trained, topics, tmp_path, monkeypatch, caplog):
    import wandb

    def tested() -> int:
        """Evaluate; return how many parts there are to the W&B run."""
        qk.evaluate(trained, baselines=False, data=topics, resamples=10, progress=False)
        return len(all_written(tmp_path))

    with monkeypatch.context() as context:
        context.setattr(wandb, "__version__", "0.30.0")
        assert tested() == 1
    assert "W&B 0.30.0 cannot go on with an offline run" in caplog.text
    # And it is said before a training, when there is time to do something about it.
    caplog.clear()
    with monkeypatch.context() as context:
        context.setattr(wandb, "__version__", "0.31.0")
        with tracking.opened(tracked("offline"), tmp_path / "later", "mine"):
            assert "W&B" not in caplog.text
    with monkeypatch.context() as context:
        context.setattr(wandb, "__version__", "0.30.0")
        with tracking.opened(tracked("offline"), tmp_path / "later", "mine"):
            assert (
                "offline run, so its test will not be logged in it: log in to W&B, or pip install 'wandb>=0.31'"
                in caplog.text
            )
    silent = trained.experiment.override({"tracking.wandb": "none"})
    with monkeypatch.context() as context:
        context.setattr(trained, "experiment", silent)
        assert tested() == 1
    with monkeypatch.context() as context:
        context.setattr(trained, "experiment", silent.override({"tracking.wandb": "auto"}))
        context.setenv("WANDB_MODE", "disabled")
        assert tested() == 1
    for damaged in ([], {"id": "../../elsewhere", "offline": True, "steps": 1}, {"id": "abc", "steps": "many"}):
        write_json(trained.path / tracking.FILE, damaged)
        with pytest.raises(qk.KitError, match="names no W&B run"):
            tested()
    (trained.path / tracking.FILE).unlink()
    assert tested() == 1


def test_77_labels_are_logged_as_a_chart_and_two_tables(wandb_free, tmp_path):
    rows, names = qk.banking77().validation, qk.banking77().label_names
    logits = 4 * np.eye(len(names))[list(rows.labels)] + np.random.default_rng(0).normal(size=(len(rows), len(names)))
    with tracking.opened(tracked("offline"), tmp_path, "mine") as run:
        tracking.log_validation(run, logits, rows.labels, rows.texts, names)
    file = written(tmp_path)
    config, history = read(file)
    assert config["name"] == "tracked" and config["lora"]["r"] == tracked("none").lora.r
    logged = {key: value for row in history for key, value in row.items()}
    matrix = table(file, logged["validation/confusion_matrix_table"])
    counts = np.array([count for *_, count in matrix["data"]]).reshape(len(names), len(names))
    assert (counts == evaluation.confusion_matrix(logits, rows.labels, len(names))).all()
    per_label = table(file, logged["validation/per_label"])
    assert [row[0] for row in per_label["data"]] == list(names)
    f1 = np.mean([row[per_label["columns"].index("f1")] for row in per_label["data"]])
    assert f1 == pytest.approx(evaluation.compute_metrics(logits, rows.labels)["f1_macro"])
    confused = table(file, logged["validation/confusions"])
    assert confused["columns"] == ["true", "predicted", "count", "share", "text", "confidence"]
    place = dict(zip(rows.texts, zip(rows.labels, logits.argmax(axis=1), strict=True), strict=True))
    for true, predicted, *_, text, _ in confused["data"]:
        assert place[text] == (names.index(true), names.index(predicted)) and true != predicted
    assert sum(item.stat().st_size for item in tmp_path.rglob("*") if item.is_file()) < 2**20


def test_where_nothing_is_confused_the_tables_are_empty_and_the_chart_is_there(wandb_free, tmp_path):
    names = [f"label {place}" for place in range(101)]
    with tracking.opened(tracked("offline"), tmp_path, "mine") as run:
        tracking.log_validation(run, np.eye(101), list(range(101)), names, names)
    file = written(tmp_path)
    (logged,) = read(file)[1]
    assert table(file, logged["validation/confusions"])["data"] == []
    assert len(table(file, logged["validation/per_label"])["data"]) == 101
    # 101 times 101 cells are more than W&B shows of a table.
    assert "validation/confusion_matrix_table" not in logged


@pytest.fixture
def wandb_that_cannot_write(wandb_free, monkeypatch, tmp_path, request):
    """Take from W&B what it needs to write a table, in the way that the parameter says."""
    if request.param == "its folder is none":
        monkeypatch.setenv("WANDB_DATA_DIR", os.devnull)
        yield
        return
    folder = tmp_path / "wandb"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no file system can be mounted here")
    yield
    import wandb

    wandb.teardown()
    subprocess.run(["umount", str(folder)], check=True)


class Stopped(Exception):
    pass


class StopAtStep(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stopped


@pytest.mark.skipif(
    Version(metadata.version("wandb")) < tracking.RESUMES_OFFLINE,
    reason="this W&B cannot go on with an offline run: the kit says so, see below",
)
@pytest.mark.parametrize("wandb_that_cannot_write", ["its folder is none", "16k", "60k"], indirect=True)
def test_a_run_is_trained_resumed_and_tested_though_its_log_fails(
    wandb_that_cannot_write, topics, tiny_experiment, tmp_path, caplog, capfd
):
    experiment = tiny_experiment("bert", tracking__wandb="offline", training__checkpoint_steps=4, training__epochs=1)

    def told() -> int:
        """Return how many warnings there were about W&B since the last call."""
        found = [record.getMessage() for record in caplog.records if record.name.startswith(tracking.__name__)]
        caplog.clear()
        assert all("W&B" in text and "\n" not in text for text in found), found
        return len(found)

    with pytest.raises(Stopped):
        qk.finetune(experiment, data=topics, out=tmp_path, name="mine", progress=False, callbacks=[StopAtStep(6)])
    assert told() <= 1
    run = qk.finetune(experiment, data=topics, out=tmp_path, name="mine", progress=False)
    assert run.training["timing"]["resumed_from_step"] == 4
    assert told() == 1
    result = qk.evaluate(run, data=topics, baselines=False, resamples=10, progress=False)
    assert told() == 1
    assert run.evaluation == result
    assert "Traceback" not in capfd.readouterr().err


def test_the_run_is_whole_before_w_and_b_is_given_the_last(trained, topics, tmp_path, monkeypatch):
    import wandb

    class Killed(BaseException):
        pass

    def killed(*arguments, **more):
        raise Killed

    experiment = trained.experiment
    # As a kill would: nothing that is not saved yet can be saved any more.
    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "finish", killed)
    with pytest.raises(Killed):
        qk.finetune(experiment, data=topics, out=tmp_path, name="other", progress=False)
    monkeypatch.undo()
    assert qk.load_run(tmp_path / "other").training["steps"] == trained.training["steps"]


@pytest.mark.long  # wandb tries for 12 seconds, twice
def test_a_server_that_does_not_answer_is_no_reason_not_to_train(monkeypatch, wandb_free, tmp_path, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(weights_and_biases, "INIT_SECONDS", 2)
    with tracking.opened(tracked("auto"), tmp_path, "mine") as run:
        run.log({"loss": 1.0})
    assert "this one is offline" in caplog.text
    _, history = read(written(tmp_path))
    assert [row["loss"] for row in history] == [1.0]
    refused = pytest.raises(qk.KitError, match="W&B does not open a run")
    with refused, tracking.opened(tracked("online"), tmp_path, "mine"):
        pass


@pytest.mark.long
def test_a_process_whose_log_cannot_be_written_trains_and_ends_well(topics, tiny_experiment, tmp_path):
    result = trained_in_a_process(topics, tiny_experiment, tmp_path, WANDB_DATA_DIR=os.devnull)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.count("W&B failed") == 1
    assert qk.load_run(tmp_path / "runs" / "tiny_bert_seed0").training["steps"] == 20


@pytest.mark.long
def test_a_real_offline_run_holds_the_experiment_and_the_metrics(topics, tiny_experiment, tmp_path):
    result = trained_in_a_process(topics, tiny_experiment, tmp_path, MY_TOKEN="hf_plantedplantedplantedplanted")
    assert result.returncode == 0, result.stderr
    file = written(tmp_path / "runs")
    config, history = read(file)
    assert config["training"]["seed"] == 0 and config["name"] == "tiny_bert"
    keys = set().union(*(set(row) for row in history))
    assert {"train/loss", "eval/loss", "eval/accuracy", "eval/f1_macro", "train/tokens_per_second"} <= keys, keys
    assert {"train/epoch_seconds", "train/peak_bytes"} <= keys, keys
    assert {"validation/confusion_matrix_table", "validation/per_label", "validation/confusions"} <= keys, keys
    # No text of the user's rows is in anything that `wandb sync` would upload.
    texts = [text.encode() for split in topics.splits().values() for text in split.texts]
    files = [item.read_bytes() for item in (tmp_path / "runs" / "wandb").rglob("*") if item.is_file()]
    assert not [text for text in texts for content in files if text in content]
    (logged,) = [row["validation/confusions"] for row in history if "validation/confusions" in row]
    assert table(file, logged)["columns"] == ["true", "predicted", "count", "share"]
    # The validation rows' scores must not pass for test scores.
    assert not [key for key in keys if key.startswith("test/")], keys
    assert b"plantedplanted" not in file.read_bytes()


def trained_in_a_process(topics, tiny_experiment, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Train a tiny experiment, tracked offline, in a process of its own; its run folder is below `folder / "runs"`."""
    experiment = tiny_experiment("bert", tracking__wandb="offline")
    write_text(folder / "experiment.yaml", experiment.to_yaml())
    topics.save(folder / "data")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-c", FINETUNE, *(str(folder / name) for name in ("data", "experiment.yaml", "runs"))],
        env=kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


def table(file: Path, reference: dict) -> dict:
    """Read a table that a run's file refers to."""
    return json.loads((file.parent / "files" / reference["path"]).read_text())


def written(out: Path) -> Path:
    """Return the file of the one offline run under a folder, once it is whole."""
    (file,) = all_written(out)
    return file


def all_written(out: Path) -> list[Path]:
    """Return the files of the offline runs under a folder, oldest first, once they are whole."""
    import wandb

    wandb.teardown()  # its own process may still be writing when a run has ended
    return sorted(out.glob("wandb/offline-run-*/run-*.wandb"))


def opened_as(file: Path):
    """Return how a run was opened."""
    return next(record.run for record in records_of(file) if record.HasField("run"))


def read(file: Path):
    """Read config and history from a run's file."""
    config, history = {}, []
    for record in records_of(file):
        for update in record.run.config.update if record.HasField("run") else record.config.update:
            config[update.key] = json.loads(update.value_json)
        if record.HasField("history"):
            row = {}
            for item in record.history.item:
                *outer, last = [item.key] if item.key else item.nested_key
                node = row
                for key in outer:
                    node = node.setdefault(key, {})
                node[last] = json.loads(item.value_json)
            history.append(row)
    return config, history


def records_of(file: Path):
    """Read a run's file: a LevelDB log of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    raw = file.read_bytes()
    part, place = b"", 7
    while place + 7 <= len(raw):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        size, kind = int.from_bytes(raw[place + 4 : place + 6], "little"), raw[place + 6]
        part += raw[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            yield record
