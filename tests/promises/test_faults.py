"""Bad data, a full disk, no memory, two at once, losses that are no numbers: one message, and nothing half made."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import warnings
from collections import Counter
from pathlib import Path

import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trainings import CPU, untimed, weights_of
from transformers import TrainerCallback

import qlora_kit as qk
from qlora_kit import memory, models, training
from qlora_kit.errors import KitError
from qlora_kit.training import checkpoints
from qlora_kit.training.summary import _plan_says, _readable_memory

# ---- bad data: a good table, and one fault at a known place ----

LABELS = ("card", "cash", "カード", "نقد", "x,y", 'q"q')
SPACES = ("", " ", "\t", "\u00a0", "\u3000\u2003")
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(str.strip)
ODD = st.sampled_from(
    ["🙂👩‍👩‍👧‍👦", "שלום עולם", "مرحبا", "two\nlines", 'say "hi", twice', "=1+1", "e\u0301", "word " * 20_000]
)
PLAIN = st.text("abc xyz", min_size=1, max_size=12).filter(str.strip)


def tables(texts):
    """Tables in which each of two or more labels has six rows or more, so that there is enough to hold out."""
    return st.integers(2, 4).flatmap(
        lambda classes: st.lists(texts, min_size=6 * classes, max_size=7 * classes).map(
            lambda found: [(text, LABELS[i % classes]) for i, text in enumerate(found)]
        )
    )


def lines(rows, header=("text", "label")) -> list[bytes]:
    """Each row as a CSV file has it, the header first; a row may span lines."""
    found = []
    for row in (header, *rows):
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerow(row)
        found.append(stream.getvalue().encode())
    return found


def with_cell(row: bytes, new: bytes) -> bytes:
    """Put `new` before a row's text, within its quotes where it has any."""
    return row[:1] + new + row[1:] if row.startswith(b'"') else new + row


# What is done to a row, and the word that the message has besides the row's line.
ROW_FAULTS = {
    "no text": (lambda row, text, label, space: lines([(space, label)])[1], "empty"),
    "no label": (lambda row, text, label, space: lines([(text, space)])[1], "label"),
    "too few columns": (lambda row, text, label, space: lines([(text,)])[1], "1 columns where the header has 2"),
    "too many columns": (lambda row, text, label, space: lines([(text, label, label)])[1], "3 columns where"),
    "NUL": (lambda row, text, label, space: with_cell(row, b"\0"), "NUL"),
    "latin-1": (lambda row, text, label, space: with_cell(row, "caf\xe9 ".encode("latin-1")), "0xe9 is not UTF-8"),
    "a lone surrogate": (lambda row, text, label, space: with_cell(row, b"\xed\xa0\x80"), "0xed is not UTF-8"),
    "cut within a character": (lambda row, text, label, space: with_cell(row, "é".encode()[:1]), "0xc3 is not UTF-8"),
}
FILE_FAULTS = {
    "UTF-16": (lambda raw: raw.decode().encode("utf-16"), "UTF-16"),
    "UTF-16 without a mark": (lambda raw: raw.decode().encode("utf-16-le"), "NUL|not UTF-8"),
    "UTF-32": (lambda raw: raw.decode().encode("utf-32"), "UTF-16"),
    "no text column": (lambda raw: raw.replace(b"text,label", b"txt,label", 1), "'txt'|txt, label"),
    "no label column": (lambda raw: raw.replace(b"text,label", b"text,kind", 1), "text, kind"),
    "two text columns": (lambda raw: b"text,label,text\n" + b"a,b,c\n", "2 columns called 'text'"),
    "header alone": (lambda raw: b"text,label\n", "no rows"),
    "nothing": (lambda raw: b"", "is empty"),
    "blank": (lambda raw: b" \n\t\n", "is empty"),
    "one label": (lambda raw: b"text,label\n" + b"a,b\n" * 20, "two or more"),
}
HARMLESS = {
    "as it is": lambda raw: raw,
    "BOM": lambda raw: b"\xef\xbb\xbf" + raw,
    "no last line break": lambda raw: raw.removesuffix(b"\n"),
    "blank lines at the end": lambda raw: raw + b"\n\n",
}
generated = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.data_too_large, HealthCheck.too_slow],
)


def refused(path, tmp_path, says: str, **fields) -> str:
    """Train on a file that has to be refused; return what is said. Nothing may be made."""
    experiment = qk.preset("minilm_banking77_qlora").override(
        {"data.name": str(path), "data.test": 0.2, "data.validation": 0.2, **fields}
    )
    with pytest.raises(KitError) as caught:
        qk.finetune(experiment, out=tmp_path / "runs", progress=False)
    assert not (tmp_path / "runs").exists(), "a run folder is left"
    assert re.search(says, str(caught.value)), (says, str(caught.value))
    return str(caught.value)


def write_parquet(path, rows) -> None:
    texts, labels = (list(column) for column in zip(*rows, strict=True))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), path)


def read_right(source, rows) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = qk.text_classification(source, test=0.2, validation=0.2)
    got = Counter(
        (text, data.label_names[label])
        for split in data.splits().values()
        for text, label in zip(split.texts, split.labels, strict=True)
    )
    assert got == Counter(rows)


@settings(generated, max_examples=60)
@given(st.data())
def test_odd_files_are_read_right(tmp_path, draw):
    rows = draw.draw(tables(WORDS | ODD))
    change = HARMLESS[draw.draw(st.sampled_from(sorted(HARMLESS)))]
    path = tmp_path / "rows.csv"
    path.write_bytes(change(b"".join(lines(rows))))
    read_right(path, rows)
    write_parquet(tmp_path / "rows.parquet", rows)
    read_right(tmp_path / "rows.parquet", rows)


@settings(generated, max_examples=160)
@given(st.data())
def test_a_bad_row_is_refused_by_its_line(tmp_path, draw):
    fault, says = ROW_FAULTS[draw.draw(st.sampled_from(sorted(ROW_FAULTS)))]
    rows = draw.draw(tables(WORDS | ODD))
    at = draw.draw(st.integers(0, len(rows) - 1))
    written = lines(rows)
    line = 1 + b"".join(written[: at + 1]).count(b"\n")
    written[at + 1] = fault(written[at + 1], *rows[at], draw.draw(st.sampled_from(SPACES)))
    (tmp_path / "rows.csv").write_bytes(b"".join(written))
    said = refused(tmp_path / "rows.csv", tmp_path, says)
    assert f"rows.csv, line {line}:" in said


@settings(generated, max_examples=40)
@given(st.data())
def test_an_unclosed_quote_is_refused_by_its_line(tmp_path, draw):
    rows = draw.draw(tables(PLAIN))
    rows = [(text, ("card", "cash")[i % 2]) for i, (text, _) in enumerate(rows)]
    at = draw.draw(st.integers(0, len(rows) - 1))
    written = lines(rows)
    written[at + 1] = b'"' + written[at + 1]
    (tmp_path / "rows.csv").write_bytes(b"".join(written))
    assert f"rows.csv, line {at + 2}:" in refused(tmp_path / "rows.csv", tmp_path, "double quote")


@settings(generated, max_examples=40)
@given(st.sampled_from(sorted(FILE_FAULTS)), tables(PLAIN))
def test_a_bad_file_is_refused_by_its_name(tmp_path, name, rows):
    fault, says = FILE_FAULTS[name]
    (tmp_path / "rows.csv").write_bytes(fault(b"".join(lines(rows))))
    assert "rows.csv" in refused(tmp_path / "rows.csv", tmp_path, says)


@settings(generated, max_examples=40)
@given(st.data())
def test_bad_values_of_a_parquet_file_are_refused_by_their_row(tmp_path, draw):
    rows = draw.draw(tables(PLAIN))
    texts, labels = [list(column) for column in zip(*rows, strict=True)]
    at = draw.draw(st.integers(0, len(rows) - 1))
    column, value = draw.draw(
        st.sampled_from([(texts, None), (texts, " "), (texts, "a\0"), (labels, None), (labels, "")])
    )
    column[at] = value
    write_parquet(tmp_path / "rows.parquet", list(zip(texts, labels, strict=True)))
    assert f"rows.parquet, row {at + 1}:" in refused(tmp_path / "rows.parquet", tmp_path, "text|label")


@settings(generated, max_examples=40)
@given(st.data())
def test_labels_of_mixed_types_are_refused_by_their_row(draw):
    rows = draw.draw(tables(PLAIN))
    other = draw.draw(st.sampled_from([1, True, 2.5, b"card", ["card"], float("inf")]))
    at = draw.draw(st.integers(0, len(rows) - 1))
    frame = pandas.DataFrame({"text": [text for text, _ in rows], "label": [label for _, label in rows]}, dtype=object)
    frame.at[at, "label"] = other
    with pytest.raises(KitError, match=rf"row {at + 1}: label "):
        qk.text_classification(frame, test=0.2, validation=0.2)


@settings(generated, max_examples=40)
@given(st.data())
def test_a_label_that_training_lacks_is_refused_by_its_line(tmp_path, draw):
    rows = draw.draw(tables(PLAIN))
    at = draw.draw(st.integers(0, len(rows) - 1))
    test = [*rows[:at], (rows[at][0], "cards"), *rows[at + 1 :]]
    (tmp_path / "train.csv").write_bytes(b"".join(lines(rows)))
    (tmp_path / "test.csv").write_bytes(b"".join(lines(test)))
    said = refused(
        tmp_path / "train.csv", tmp_path, "'cards' is none of the", **{"data.test": str(tmp_path / "test.csv")}
    )
    assert f"test.csv, line {at + 2}:" in said


@settings(generated, max_examples=40)
@given(st.integers(2, 12), st.integers(0, 12))
def test_one_row_per_label_is_trained_on_or_refused(tmp_path, single, more):
    rows = [(f"text {i}", f"label {i}") for i in range(single)] + [(f"more {i}", "label 0") for i in range(more)]
    path = tmp_path / "rows.csv"
    path.write_bytes(b"".join(lines(rows)))
    # A fifth is held out for testing and a fifth of the rest for validation; each label keeps a row to train on.
    test = -(-len(rows) // 5)
    if len(rows) - test - -(-(len(rows) - test) // 5) < single:
        assert "rows.csv" in refused(path, tmp_path, "too few to hold out")
    else:
        read_right(path, rows)


def test_a_file_cut_off_at_any_byte_is_a_whole_beginning_or_refused(tmp_path):
    rows = [(f"text {i}, with\na line", ("card", "cash", "top up")[i % 3]) for i in range(18)]
    whole, path = b"".join(lines(rows)), tmp_path / "rows.csv"
    right = 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                data = qk.text_classification(path, test=0.2, validation=0.2)
        except KitError as error:
            assert "rows.csv" in str(error)
            continue
        right += 1
        read = sum(len(split) for split in data.splits().values())
        read_right(path, rows[:read])
    assert right > 20  # ends of rows, with and without the line break
    write_parquet(path.with_suffix(".parquet"), rows)
    whole, path = path.with_suffix(".parquet").read_bytes(), path.with_suffix(".parquet")
    for at in range(len(whole)):
        path.write_bytes(whole[:at])
        with pytest.raises(KitError, match=r"rows\.parquet"):
            qk.text_classification(path, test=0.2, validation=0.2)


# ---- training: no room, no memory, a loss that is no number ----


class At(TrainerCallback):
    """Does something at the beginning of one step."""

    def __init__(self, step: int, action) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action(**kwargs)


def no_memory(**kwargs):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture(scope="module")
def experiment(tiny):
    from qlora_kit.config.experiment import Experiment
    from qlora_kit.config.sections import LoraSpec, ModelSpec, TrainingSpec

    return Experiment(
        name="tiny_bert",
        model=ModelSpec(str(tiny("bert"))),
        lora=LoraSpec(r=4, alpha=8, dropout=0.1),
        training=TrainingSpec(epochs=2, batch_size=16, learning_rate=5e-3, threads=1, checkpoint_steps=4),
    )


@pytest.fixture(scope="module")
def whole(experiment, topics, tmp_path_factory):
    return qk.finetune(experiment, data=topics, out=tmp_path_factory.mktemp("whole"), progress=False)


def assert_same(run, whole):
    one, other = weights_of(whole), weights_of(run)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert untimed(run.training) == untimed(whole.training)


@pytest.fixture
def small_disk(tmp_path):
    """Return a disk of its own and a function that sets its size in KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"a small disk cannot be made here: {made.stderr.strip()}")
    yield disk, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.long
def test_a_full_disk_is_told_and_with_more_room_it_goes_on_to_the_same_bits(small_disk, whole, experiment, topics):
    disk, resize = small_disk
    run, refusals = None, set()
    for size in range(40, 4000, 100):
        resize(size)
        try:
            run = qk.finetune(experiment, data=topics, out=disk, progress=False)
            break
        except KitError as error:
            assert "no room left on the disk" in str(error), error
            refusals.add(type(error.__cause__).__name__)
        for checkpoint in checkpoints.listed(disk / "tiny_bert_seed0" / "checkpoints"):
            assert checkpoints.problem(checkpoint) is None
    # Python's own words, and those of libraries that write by themselves (which of them, the sizes decide).
    assert "OSError" in refusals and len(refusals) > 1, refusals
    assert_same(run, whole)
    assert sorted(p.name for p in run.path.iterdir()) == sorted(p.name for p in whole.path.iterdir())


def test_no_memory_on_the_gpu_is_told_and_what_was_saved_goes_on(whole, experiment, topics, tmp_path):
    with pytest.raises(training.TrainingError, match=r"batch 16 of up to 128 tokens\. Try training.batch_size 8 with"):
        qk.finetune(experiment, data=topics, out=tmp_path, progress=False, callbacks=[At(6, no_memory)])
    assert_same(qk.finetune(experiment, data=topics, out=tmp_path, progress=False), whole)


def test_the_plan_says_which_batch_would_fit(experiment):
    device = memory.Device("small", 80 * 2**20, (7, 5))
    said = _plan_says(experiment.override({"training.batch_size": 512}), device)
    batches = {how: int(batch) for batch, how in re.findall(r"batch (\d+) (with|without) checkpointing", said)}
    assert "80 MiB" in said and batches.keys() == {"with", "without"}
    for how, batch in batches.items():
        estimate = memory.Estimate(experiment.override({"training.gradient_checkpointing": how == "with"}), device)
        assert estimate.bytes(batch, 128) <= device.bytes < estimate.bytes(2 * batch, 128)
    assert "which fits: look whether something else" in _plan_says(experiment, device)
    said = _plan_says(experiment.override({"training.eval_batch_size": 4096}), device)
    assert re.search(r"of 80 MiB, and [\d,]+ MiB for an evaluation of 4,096 rows", said) and "fits" not in said
    tiny = memory.Device("tiny", 2**20, (7, 5))
    assert "not even one row would fit" in _plan_says(experiment, tiny)


def test_an_error_is_told_even_where_there_is_no_plan(experiment, caplog):
    broken = experiment.override({"model.name": "./nowhere"})
    assert _plan_says(broken, memory.DEVICES["T4"]) == ""
    assert "no memory plan" in caplog.text
    with pytest.raises(training.TrainingError, match="memory does not suffice"), _readable_memory(broken):
        no_memory()


def test_a_run_that_diverges_keeps_its_best_checkpoint(experiment, topics, tmp_path):
    def leap(optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] = 1e30

    # Two good epochs of ten steps, then one step that is far too long.
    changes = {"training.epochs": 4, "training.logging_steps": 1, "training.checkpoint_steps": None}
    spec = experiment.override(changes)
    with pytest.raises(training.TrainingError) as caught:
        qk.finetune(spec, data=topics, out=tmp_path, progress=False, callbacks=[At(22, leap)])
    said = re.search(
        r"(loss|grad_norm) is (nan|inf) at step (\d+) \(learning rate (\S+)\)\. "
        r"Try a learning rate of 0\.0017.*Kept: (\S+)",
        str(caught.value),
    )
    assert said and int(said[3]) in (23, 24) and 0 < float(said[4]) < 5e-3
    kept = Path(said[5])
    assert kept.name in ("checkpoint-10", "checkpoint-20") and checkpoints.problem(kept) is None
    model = models.build(spec, topics.label_names, device=CPU, pad_token_id=0)
    models.load_weights_(model, kept / "adapter")
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.is_floating_point())
    # A gentler experiment begins anew, and what is kept is moved aside, not lost.
    again = qk.finetune(spec.override({"training.epochs": 1}), data=topics, out=tmp_path, progress=False)
    (aside,) = [item for item in tmp_path.iterdir() if item != again.path]
    assert checkpoints.problem(aside / "checkpoints" / kept.name) is None


@pytest.mark.parametrize("damage", ["missing", "shortened", "changed", "added", "no manifest", "strange manifest"])
def test_a_damaged_checkpoint_of_any_kind_is_passed_over(experiment, topics, tmp_path, caplog, damage):
    def fill(folder):
        for name in ("a.safetensors", "optimizer.pt"):
            (folder / name).write_bytes(bytes(range(256)))

    before, newest = (checkpoints.write(tmp_path, step, fill) for step in (9, 10))
    file = newest / "optimizer.pt"
    if damage == "missing":
        file.unlink()
    elif damage == "shortened":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "changed":
        file.write_bytes(b"x" + file.read_bytes()[1:])
    elif damage == "added":
        (newest / "training_args.bin").write_bytes(b"x")
    elif damage == "no manifest":
        (newest / checkpoints.MANIFEST).unlink()
    else:
        (newest / checkpoints.MANIFEST).write_text('{"sha256": ["optimizer.pt"]}')
    assert checkpoints.newest_whole(tmp_path) == before
    assert f"Passed over {newest}" in caplog.text
