"""Run folders and records that were changed, damaged or made by somebody else: one clear line, or a right result."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from trainings import weights_of

import qlora_kit as qk
from qlora_kit import claims, rerun, schemas
from qlora_kit.claims.records import _runs
from qlora_kit.errors import KitError
from qlora_kit.metrics.verdict import Report
from qlora_kit.notebooks.page import write_index
from qlora_kit.notebooks.run_all import _read_state
from qlora_kit.run import finished_runs, newest_run
from qlora_kit.runs.record import notebook_record
from qlora_kit.system.files import move_into_place, write_json, write_text
from qlora_kit.system.manifest import NAME, OF_A_RUN, of, problem_of_run

TEXTS = ["where is my card", "my card was swallowed by the machine"]
generated = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.data_too_large, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def tested(topics, tiny, tmp_path_factory):
    """Return a finished and tested run, what it was made of, and its predictions."""
    experiment = qk.Experiment(name="tiny", model=qk.ModelSpec(str(tiny("bert")))).override(
        {"lora": {"r": 4, "alpha": 8}, "training": {"max_steps": 2, "precision": "fp32", "threads": 1}}
    )
    run = qk.finetune(experiment, data=topics, out=tmp_path_factory.mktemp("runs"), progress=False)
    guess = list(topics.test.labels)
    row = {**qk.evaluation.metrics(guess, topics.test.labels, resamples=20), "predictions": guess}
    qk.evaluate(run, baselines={"tfidf_svm": row}, resamples=20, progress=False)
    return run, experiment, run.predict(TEXTS).logits


@pytest.fixture
def folder(tested, tmp_path):
    return Path(shutil.copytree(tested[0].path, tmp_path / "run"))


def seal(folder: Path) -> None:
    write_json(folder / NAME, of(folder, OF_A_RUN))


def edit(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def zeroed(file: Path) -> None:
    save_file({name: tensor * 0 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


CHANGES = {
    "labels swapped": ("training.json", lambda file: edit(file, lambda training: training["labels"].reverse())),
    "score edited": ("training.json", lambda file: edit(file, lambda training: training.update(steps=3))),
    "word edited": ("tokenizer/tokenizer.json", lambda file: replace(file, '"where"', '"wheee"')),
    "alpha edited": ("experiment.yaml", lambda file: replace(file, "alpha: 8.0", "alpha: 80.0")),
    "length edited": ("experiment.yaml", lambda file: replace(file, "max_length: 128", "max_length: 4")),
    "weights zeroed": ("adapter/adapter_model.safetensors", zeroed),
    "weights deleted": ("adapter/adapter_model.safetensors", Path.unlink),
    "tokenizer deleted": ("tokenizer/tokenizer.json", Path.unlink),
    "file added": ("tokenizer/added_tokens.json", lambda file: file.write_text("{}")),
    "weights added": ("adapter/model.safetensors", lambda file: file.write_bytes(b"x")),
    "checksum edited": ("environment.json", lambda file: edit(file, lambda e: e["checksums"].update(base="0" * 64))),
    "environment deleted": ("environment.json", Path.unlink),
    "row edited": ("data/test.jsonl", lambda file: replace(file, "card", "cart")),
    "row file deleted": ("data/train.jsonl", Path.unlink),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_finished_run_that_was_changed_is_refused_by_the_file(folder, change):
    name, make = CHANGES[change]
    qk.load_run(folder)
    make(folder / name)
    with pytest.raises(KitError, match=f"^{folder} is not the run that was finished: {name} ") as caught:
        qk.load_run(folder)
    assert "\n" not in str(caught.value)
    _, problems = schemas.check([folder])
    assert any(f"{folder}: {name} " in problem for problem in problems)


@pytest.mark.parametrize("name", ["training.json", "experiment.yaml"])
def test_a_check_finds_a_run_whatever_is_gone_from_its_folder(folder, name):
    (folder / name).unlink()
    for path in (folder, folder.parent):
        assert f"{folder}: {name} is missing" in schemas.check([path])[1]


def test_what_may_change_in_a_finished_run_does_not_matter(tested, folder):
    logits = tested[2]
    names = set(json.loads((folder / NAME).read_text())["sha256"])
    assert names >= {"experiment.yaml", "training.json", "environment.json", "data/labels.json"}
    assert not names & {"evaluation.json", "README.md", "tracking.json", ".lock", NAME}
    again = qk.load_run(folder)
    qk.evaluate(again, baselines=False, resamples=10, progress=False)
    again.write_card()
    shutil.rmtree(folder / "data")  # a run that is given to somebody else, without the rows
    assert np.array_equal(qk.load_run(folder).predict(TEXTS).logits, logits)
    with pytest.raises(KitError, match="such rows live in Python objects or in a run folder's data/"):
        qk.evaluate(folder, progress=False)


def test_a_prediction_is_what_the_model_says_of_each_text_by_itself_in_the_order_of_the_texts(tested, topics, capsys):
    run = qk.load_run(tested[0].path)
    model, tokenizer = run.load()
    assert not model.training and run.load()[0] is model and run.load()[1] is tokenizer  # loaded once
    assert model.config.pad_token_id == tokenizer.pad_token_id
    texts = [*topics.test.texts[:9], "card " * 300, *topics.validation.texts[:2]]  # one is cut
    encode = functools.partial(
        tokenizer,
        truncation=True,
        max_length=run.experiment.data.max_length,
        return_token_type_ids=False,
        return_tensors="pt",
    )
    with torch.inference_mode():
        alone = [model(**encode(text)) for text in texts]
    logits = torch.cat([output.logits for output in alone])
    found = run.predict(texts, batch_size=5)
    assert len(found) == len(texts) and found.logits.dtype == np.float32 and found.label_ids.dtype == np.int64
    assert np.allclose(found.logits, logits, atol=1e-5) and np.ptp(found.logits, axis=0).min() > 1e-3
    assert found.label_ids.tolist() == logits.argmax(1).tolist() and len(set(found.label_ids)) > 1
    assert found.labels == [run.label_names[index] for index in found.label_ids]
    assert found.probabilities.dtype == np.float64
    assert np.allclose(found.probabilities, logits.double().softmax(1), atol=1e-5)
    assert not capsys.readouterr().err  # no bar, unless it is given a name
    run.predict(texts, progress="asking")
    assert "asking: 100%" in capsys.readouterr().err
    nothing = run.predict([])
    assert len(nothing) == 0 and nothing.labels == [] and nothing.label_ids.dtype == np.int64
    assert nothing.logits.shape == nothing.probabilities.shape == (0, len(run.label_names))


def test_a_run_that_refuses_long_texts_refuses_them_in_predictions_as_well(folder):
    run = qk.load_run(folder)
    run.experiment = run.experiment.override({"data": {"too_long": "refuse", "max_length": 8}})
    assert len(run.predict(["where is my card"])) == 1
    with pytest.raises(KitError, match=r"set data\.too_long to cut"):
        run.predict(["where is my card", "card " * 9])


def test_a_card_written_anew_is_in_the_folder_and_says_what_the_test_found(tested, folder):
    run = qk.load_run(folder)
    (folder / "README.md").unlink()
    assert run.write_card() == folder / "README.md"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "pipeline_tag: text-classification" in card
    assert f"{run.evaluation['metrics']['test']['accuracy']['value']:.3f}" in card


def test_a_card_says_what_few_rows_leave_open(folder):
    file = folder / "evaluation.json"
    report = json.loads(file.read_text("utf-8"))
    score, (label, other, *_) = report["metrics"]["test"]["f1_macro"], report["per_label"]

    def card_with(low: float, high: float) -> str:
        score.update(value=low, low=low, high=high)
        file.write_text(json.dumps(report), "utf-8")
        return qk.load_run(folder).write_card().read_text(encoding="utf-8")

    card = card_with(0.4, 0.55)
    assert "\n- Its test score is unsure, as there are only 48 test rows.\n" in card and "no test row" not in card
    label |= {"support": 0, "recall": None, "f1": 0.0}
    other |= {"support": 1, "f1": 0.0}
    del report["data"]  # as in the first run folders
    card = card_with(0.4, 0.49)
    assert "Its test score is" not in card
    assert "- 1 of 6 labels has no test row: nothing is known of" in card
    assert f"`{other['label']}` (F1 0.00, 1 row)" in card and f"`{label['label']}` (F1 0.00" not in card


def test_a_merge_through_the_run_is_of_the_type_that_was_asked_for(tested, tmp_path, capsys):
    for dtype, stored in (({}, torch.float32), ({"dtype": "bf16"}, torch.bfloat16)):
        to = tmp_path / str(stored)
        assert tested[0].merge(to, progress=False, **dtype) and not capsys.readouterr().err
        weights = load_file(to / "model.safetensors")
        of_the_base = {value.dtype for name, value in weights.items() if name.startswith("base.")}
        assert of_the_base == {stored} and weights["classifier.weight"].dtype == torch.float32


def test_a_run_from_before_manifests_opens_and_says_that_it_cannot_be_checked(tested, folder, caplog):
    (folder / NAME).unlink()
    assert np.array_equal(qk.load_run(folder).predict(TEXTS).logits, tested[2])
    assert [record.message.startswith(f"{folder} has no manifest.json") for record in caplog.records] == [True]
    edit(folder / "training.json", lambda training: training["labels"].reverse())
    with pytest.raises(KitError, match=r"the labels in .*training\.json are not those of .*data"):
        qk.load_run(folder)


def test_labels_that_are_not_those_of_the_embedded_data_are_refused(tested, folder):
    shutil.rmtree(folder / "data")
    edit(folder / "training.json", lambda training: training["labels"].reverse())
    seal(folder)
    with pytest.raises(KitError, match="has other labels than"):
        qk.evaluate(folder, data=qk.data.load_saved(tested[0].path / "data"), progress=False)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("tokenizer.json", '"normalizer": {', '"normalizer": 3, "x": {'),
        ("tokenizer_config.json", '"do_lower_case": true', '"do_lower_case": "yes"'),
        ("tokenizer_config.json", '"model_max_length": 512', '"model_max_length": "many"'),
        ("tokenizer_config.json", '"stride": 0', '"stride": ' + "[" * 3000 + "]" * 3000),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_one_line(folder, name, old, new):
    replace(folder / "tokenizer" / name, old, new)
    seal(folder)
    with pytest.raises(KitError) as caught:
        qk.load_run(folder).predict(TEXTS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["training.json", "manifest.json"])
def test_a_run_with_a_newer_schema_is_called_newer(folder, file):
    edit(folder / file, lambda content: content.update(schema=99))
    with pytest.raises(KitError, match=r"made by a newer version of qlora_kit \(schema 99, this one reads 1\)"):
        qk.load_run(folder)


def test_a_field_of_a_newer_kit_is_told_as_that(folder):
    replace(folder / "experiment.yaml", "training:", "training:\n  lookahead: 3")
    seal(folder)
    with pytest.raises(KitError, match=r"experiment\.yaml: there is no field 'training\.lookahead'"):
        qk.load_run(folder)
    edit(folder / "environment.json", lambda environment: environment["versions"].update(qlora_kit="99.1.0"))
    seal(folder)
    with pytest.raises(KitError, match=rf"made by a newer version of qlora_kit \(99\.1\.0, this is {qk.__version__}\)"):
        qk.load_run(folder)


def test_a_kill_between_the_manifest_and_training_json_leaves_a_run_that_goes_on(tested, topics, tmp_path):
    run, experiment, _ = tested
    (tmp_path / "out").mkdir()
    cut = Path(shutil.copytree(run.path, tmp_path / "out" / run.path.name))
    edit(cut / NAME, lambda content: content["sha256"].update({"training.json": "0" * 64}))
    (cut / "training.json").unlink()
    again = qk.finetune(experiment, data=topics, out=tmp_path / "out", progress=False)
    assert again.path == cut and problem_of_run(cut) is None
    one, other = weights_of(run), weights_of(again)
    assert all((one[name] == other[name]).all() for name in one)


def test_a_damaged_run_keeps_its_checkpoints_and_is_not_taken_for_finished(tested, topics, tmp_path):
    run, experiment, _ = tested
    (tmp_path / "out").mkdir()
    damaged = Path(shutil.copytree(run.path, tmp_path / "out" / run.path.name))
    (damaged / "checkpoints").mkdir()
    zeroed(damaged / "adapter" / "adapter_model.safetensors")
    with pytest.raises(KitError, match="is not the run that was finished"):
        qk.finetune(experiment, data=topics, out=tmp_path / "out", progress=False)
    assert (damaged / "checkpoints").is_dir()


def test_files_of_a_run_have_the_permissions_of_any_new_file(tested, tmp_path):
    umask = os.umask(0o022)
    os.umask(umask)
    wrong = [
        file for file in tested[0].path.rglob("*") if file.is_file() and file.stat().st_mode & 0o777 != 0o666 & ~umask
    ]
    assert not wrong
    made = tmp_path / "made"
    made.mkdir()
    (made / "model.safetensors").touch(mode=0o600)
    os.umask(0o027)
    try:
        move_into_place(made, tmp_path / "there")
        write_text(tmp_path / "text", "")
    finally:
        os.umask(umask)
    files = [tmp_path / "there" / "model.safetensors", tmp_path / "text"]
    assert [oct(file.stat().st_mode & 0o777) for file in files] == ["0o640", "0o640"]
    assert [file.name for file in (tmp_path / "there").iterdir()] == ["model.safetensors"]


def test_what_is_pushed_has_a_manifest_of_its_own(tested, monkeypatch):
    run, _, logits = tested
    with qk.export.staged(run) as staged:
        assert not (staged / "data").exists()
        assert np.array_equal(qk.load_run(staged).predict(TEXTS).logits, logits)


def test_runs_that_cannot_be_opened_are_passed_over_and_said(folder, caplog):
    other = Path(shutil.copytree(folder, folder.with_name("other")))
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    with caplog.at_level(logging.WARNING):
        assert [run.path for run in finished_runs(folder.parent)] == [other]
        assert newest_run("tiny", folder.parent) == other
    assert f"Passed over {folder}: {folder} is not the run" in caplog.text


# ---- generated faults ----

VALUES = [None, True, [], {}, "", "x", "\n", "\0", -1, 0, 3.5, 10**18, 1e300, [[1]], {"a": {"b": 1}}, [None], "ü" * 300]


def places(value, path=()):
    """Yield the place of every value in JSON; of a long list the first ones."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


def fault_of_json(draw, text: str) -> bytes:
    """Return JSON text with one value gone, of another type, or with another's value."""
    content = json.loads(text)
    every = list(places(content))
    depth = draw(st.sampled_from(sorted({len(path) for path in every})))
    *path, last = draw(st.sampled_from([path for path in every if len(path) == depth]))
    node = content
    for key in path:
        node = node[key]
    how = draw(st.sampled_from(["gone", "other", "other", "twice", "deep", "swapped"]))
    if how == "gone":
        del node[last]
    elif how == "deep":
        node[last] = "DEEP"
        return json.dumps(content).replace('"DEEP"', "[" * 3000 + "]" * 3000).encode()
    elif how == "twice" and isinstance(last, str):
        return (
            json.dumps(content)
            .replace(json.dumps(last) + ":", f"{json.dumps(last)}: 1, {json.dumps(last)}:", 1)
            .encode()
        )
    elif how == "swapped" and isinstance(node, list) and len(node) > 1:
        node[0], node[1] = node[1], node[0]
    else:
        node[last] = draw(st.sampled_from(VALUES))
    return json.dumps(content).encode()


def fault_of_bytes(draw, content: bytes) -> bytes:
    """Return a file's bytes cut off, with one changed, empty, or in another encoding."""
    at = draw(st.integers(0, max(len(content) - 1, 0)))
    return draw(
        st.sampled_from(
            [
                content[:at],
                content[:at] + bytes([content[at] ^ 0x41]) + content[at + 1 :] if content else b"x",
                b"",
                content.decode("utf-8", "replace").encode("utf-16"),
                content + b"\xff",
                b"\0" * len(content),
            ]
        )
    )


def break_file(draw, file: Path) -> None:
    """Put a fault into a file, or something that is no file into its place."""
    how = draw(st.sampled_from(["bytes", "json", "json", "json", "gone", "folder", "pipe"]))
    if how == "json" and file.suffix == ".json":
        file.write_bytes(fault_of_json(draw, file.read_text(encoding="utf-8")))
    elif how in ("bytes", "json"):
        file.write_bytes(fault_of_bytes(draw, file.read_bytes()))
    else:
        file.unlink()
        if how == "folder":
            file.mkdir()
        elif how == "pipe":
            os.mkfifo(file)


def restore(file: Path, content: bytes) -> None:
    if file.is_dir():
        file.rmdir()
    else:
        file.unlink(missing_ok=True)
    file.write_bytes(content)


def one_line(work) -> object:
    """Return what some work returns, or None where it is refused in one line; anything else is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return work()
        except KitError as error:
            assert str(error).strip() and "\n" not in str(error), repr(str(error))
            return None


class Broken:
    """A copy of the run whose files are broken one after the other, and what is in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != ".lock"]
        self.contents = {file: file.read_bytes() for file in files}

    def restore(self, *names: str | Path) -> None:
        for name in names:
            restore(self.folder / name, self.contents[self.folder / name])


@pytest.fixture(scope="module")
def broken(tested, tmp_path_factory):
    return Broken(Path(shutil.copytree(tested[0].path, tmp_path_factory.mktemp("broken") / "run")))


@settings(generated, max_examples=150)
@given(st.data())
def test_a_run_folder_with_a_fault_is_refused_or_predicts_the_same(tested, broken, draw):
    folder, contents = broken.folder, broken.contents
    file = draw.draw(st.sampled_from(sorted(contents)))
    try:
        break_file(draw.draw, file)
        run = one_line(lambda: qk.load_run(folder))
        same = file.exists() and file.is_file() and file.read_bytes() == contents[file]
        if file.name == NAME:
            assert run is None or same or not file.exists()
        elif file.name not in ("evaluation.json", "README.md"):
            assert run is None or same, f"{file} was changed, and nobody said so"
        if run is not None:
            assert run.label_names == tested[0].label_names and run.experiment == tested[0].experiment
            one_line(lambda: run.evaluation)
            one_line(run.write_card)
            one_line(lambda: rerun._read(folder))
        one_line(lambda: schemas.check([folder]))
    finally:
        broken.restore("README.md", file.relative_to(folder))


@pytest.mark.long
@settings(generated, max_examples=150)
@given(st.data())
def test_a_report_with_a_fault_is_told_or_refused(tested, broken, draw):
    file = broken.folder / "evaluation.json"
    try:
        file.write_bytes(fault_of_json(draw.draw, file.read_text(encoding="utf-8")))
        run = qk.load_run(broken.folder)
        one_line(lambda: run.verdict)
        one_line(run.write_card)
        one_line(lambda: qk.evaluation.compare_runs([tested[0], run], resamples=2))
        for use in (Report.to_frame, Report.weakest, repr, Report._repr_html_):
            one_line(lambda use=use: use(run.evaluation) if run.evaluation else None)
        assert len(repr(run).splitlines()) in (2, 5)
    finally:
        broken.restore("evaluation.json", "README.md")


def records_of_a_run(folder: Path, contents) -> list[Path]:
    return [file for file in contents if file.parent == folder and file.suffix in (".json", ".yaml")]


def read_all(folder: Path) -> None:
    """Do what reads a run's records, and loads no weights."""
    run = one_line(lambda: qk.load_run(folder))
    if run is not None:
        one_line(lambda: run.evaluation)
        one_line(lambda: run.environment)
        one_line(run._check_base)
        one_line(lambda: qk.evaluation.data_of(run))
        one_line(lambda: qk.export.card(run))
        one_line(lambda: rerun._read(folder))
    one_line(lambda: claims.check(claims.Records(runs=_runs(folder.parent))))
    one_line(lambda: schemas.check([folder]))


@settings(generated, max_examples=100)
@given(st.data())
def test_records_of_a_run_without_a_manifest_are_read_or_refused(broken, draw):
    folder, contents = broken.folder, broken.contents
    file = draw.draw(st.sampled_from([file for file in records_of_a_run(folder, contents) if file.name != NAME]))
    try:
        (folder / NAME).unlink()
        break_file(draw.draw, file)
        read_all(folder)
    finally:
        broken.restore(NAME, file.relative_to(folder))


@pytest.mark.long
@settings(generated, max_examples=300)
@given(st.data())
def test_a_run_of_somebody_else_is_used_or_refused(topics, broken, draw):
    folder, contents = broken.folder, broken.contents
    file = draw.draw(st.sampled_from([file for file in contents if file.name not in (NAME, "README.md")]))
    try:
        break_file(draw.draw, file)
        one_line(lambda: seal(folder))
        read_all(folder)
        run = one_line(lambda: qk.load_run(folder))
        if run is not None and one_line(lambda: run.predict(TEXTS)) is not None:
            one_line(lambda: qk.evaluate(run, baselines=False, resamples=5, progress=False))
    finally:
        broken.restore("evaluation.json", NAME, file.relative_to(folder))


@pytest.fixture(scope="module")
def out(tested, tmp_path_factory):
    """Return an OUT with the records of two notebooks and the runner's, beside the reference results."""
    out, run = tmp_path_factory.mktemp("out") / "out", tested[0]
    made = {"preset": "tiny", "experiment": run.experiment, "environment": run.environment}
    made |= {key: run.training[key] for key in ("memory", "timing", "parameters")}
    for name, metrics in (("02_finetune", run.training["metrics"]), ("03_evaluate", run.evaluation["metrics"])):
        write_json(out / f"{name}.json", notebook_record(name, metrics=metrics, **made, run=str(run.path)))
    entry = {"state": "finished", "started": "2026-01-01T00:00:00+00:00", "parameters": {"seed": 0}, "seconds": 1.5}
    entries = {"02_finetune": {**entry, "code": "0"}, "03_evaluate": {**entry, "state": "failed", "error": "no"}}
    state = {
        "schema": 1,
        "asked": "auto",
        "preset": "tiny",
        "why": "so",
        "experiment": "0",
        "started": entry["started"],
    }
    write_json(out / "run.json", {**state, "notebooks": entries})
    shutil.copytree(ROOT / "results", out.parent / "results", ignore=shutil.ignore_patterns("*.png"))
    # Of the many rows a few are enough, and faster.
    for file in (out.parent / "results").glob("*.json"):
        edit(file, lambda content: content.update(rows=content["rows"][:12]))
    assert schemas.check([out, out.parent / "results"])[1] == []
    return out


@settings(generated, max_examples=60)
@given(st.data())
def test_records_with_a_fault_are_shown_and_judged_or_refused(out, draw):
    file = draw.draw(st.sampled_from(sorted([*out.glob("*.json"), *(out.parent / "results").glob("*.json")])))
    content = file.read_bytes()
    try:
        break_file(draw.draw, file)
        if file.parent == out:
            one_line(lambda: write_index(out))
            one_line(lambda: _read_state(out))
            one_line(lambda: rerun._read(file))
        found = one_line(lambda: claims.read(out.parent / "results", out, computed=False))
        if found is not None:
            verdicts = one_line(lambda: claims.check(found))
            assert verdicts is not None and claims.markdown(verdicts) and claims.to_record(verdicts)
        one_line(lambda: schemas.check([file.parent]))
    finally:
        restore(file, content)
