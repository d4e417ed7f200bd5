"""JSON and YAML that others may have written: a value is what it looks like, or the file is refused in one line."""

from __future__ import annotations

import os
import re

import pytest

import qlora_kit as qk
from qlora_kit import schemas
from qlora_kit.cli import main as cli
from qlora_kit.config.experiment import Experiment
from qlora_kit.errors import KitError
from qlora_kit.notebooks.parameters import _convert
from qlora_kit.system.files import write_json, write_text
from qlora_kit.system.manifest import NAME, of, problem
from qlora_kit.system.parsing import DEEPEST, MOST_JSON, MOST_YAML, dump_yaml, parse_json, parse_yaml, read_json


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("-7", -7),
        ("0x1F", 31),
        ("True", True),
        ("~", None),
        ("", None),
        ("2e", "2e"),
        ("1.2.3", "1.2.3"),
        ("off-line", "off-line"),
        ("'010'", "010"),
        ('"yes"', "yes"),
        ("[a, 1, null]", ["a", 1, None]),
    ],
)
def test_yaml_is_read_as_version_1_2_means_it(text, value):
    found = parse_yaml(f"\ufeffx: {text}\n", "file")["x"]
    assert found == value and type(found) is type(value)


DIFFERENT = (
    "010",
    "08",
    "1:30",
    "1:30.5",
    "1_000",
    "0b11",
    "0o17",
    "0x_1",
    "yes",
    "No",
    "on",
    "OFF",
    "2024-01-01",
    "=",
    "<<",
)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [(f"a: 1\nb: {text}\n", 2, "read differently by YAML 1.1 and 1.2") for text in DIFFERENT]
    + [
        ("a: 1\nb: 2\na: 3\n", 3, "the name 'a' stands twice"),
        ("a:\n  b: 1\n  c: 2\n  'b': 3\n", 4, "the name 'b' stands twice"),
        ("a: &x {b: 1}\nc: *x\n", 1, "anchors"),
        ("a: {b: 1}\nc: *x\n", 2, "anchors"),
        ("a: 1\n<<: {b: 2}\n", 2, "read differently"),
        ("a: !!int '3'\n", 1, "tags"),
        ("a: !mine 3\n", 1, "tags"),
        ("a: 1\n2: b\n", 2, "a name is a text"),
        ("a: 1\n---\nb: 2\n", 2, "another document"),
        ("a: 1\nb: 'c\n", 3, "end of stream"),
        ("x: " + "[" * 3000 + "]" * 3000, 1, "nested more than"),
        ("- " * 3000 + "x", 1, "nested more than"),
        ("a:\n" + "".join(" " * n + "a:\n" for n in range(1, 300)), 101, "nested more than"),
    ],
)
def test_yaml_that_could_mean_something_else_is_refused_with_its_line(text, line, says):
    with pytest.raises(KitError, match=rf"^file is no valid YAML, line {line}: .*{says}") as caught:
        parse_yaml(text, "file")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["x: " + "9" * 5000, "x: \0", "x: '\ud800'", "x: " + "a" * MOST_YAML])
def test_yaml_without_a_line_to_name_is_refused_all_the_same(text):
    with pytest.raises(KitError, match=r"^file is (no valid YAML|too large): ") as caught:
        parse_yaml(text, "file")
    assert "\n" not in str(caught.value)


def test_what_is_written_as_yaml_is_read_back():
    texts = [
        *DIFFERENT,
        "1e5",
        "1e-3",
        "null",
        "~",
        "",
        "true",
        "&a",
        "*a",
        "!a",
        "a: b",
        "# a",
        "- a",
        "é",
        "a\nb",
        ".inf",
    ]
    tree = {"texts": texts, "numbers": [1e-3, 1e-5, 1e300, 1.0, 2, -3], "others": [True, None, []], "more": {}}
    assert parse_yaml(dump_yaml(tree), "file") == tree
    experiment = qk.preset("minilm_banking77_qlora").override({"data.revision": "1e5", "model.revision": "010"})
    assert Experiment.from_yaml(experiment.to_yaml()) == experiment


def test_yaml_is_read_in_one_way_wherever_it_is_given(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("name: a\nmodel: {name: x}\ntraining:\n  seed: 010\n")
    with pytest.raises(KitError, match=rf"{file} is no valid YAML, line 4: 010 is read differently"):
        Experiment.from_yaml(file)
    assert cli.main(["plan", "shape:dialogpt-medium", "--set", "training.seed=010"]) == 2
    assert "--set training.seed=010 is no valid YAML, line 1: 010" in capsys.readouterr().err
    with pytest.raises(KitError, match=r"seed='010' is no YAML scalar: .*010 is read differently"):
        _convert("seed", "010", 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "a": 2}', "the name 'a' stands twice"),
        ("[NaN]", "NaN is no finite number"),
        ("[-Infinity]", "-Infinity is no finite number"),
        ("[1e999]", "1e999 is no finite number"),
        ("[" + "1" * 400 + "]", "has 400 digits"),
        ("[" + "1" * 5000 + "]", "has 5000 digits"),
        ("[" * 100_000, "nested more than"),
        ("[" * (DEEPEST + 2) + "]" * (DEEPEST + 2), "nested more than"),
        (r'["\ud83d"]', "surrogates not allowed"),
        ('{"a": 1', "Expecting"),
        ("", "Expecting value"),
    ],
)
def test_json_that_could_mean_something_else_is_refused(text, says):
    with pytest.raises(KitError, match=f"^file is no JSON: .*{says}") as caught:
        parse_json(text, "file")
    assert "\n" not in str(caught.value)


def test_json_is_read_as_it_stands():
    text = r'{"a": [1, -2.5, true, null, "\ud83d\ude00"], "b": {"a": 18446744073709551615}}'
    assert parse_json(text, "file") == {"a": [1, -2.5, True, None, "😀"], "b": {"a": 2**64 - 1}}
    assert parse_json("[" * DEEPEST + "]" * DEEPEST, "file")
    assert parse_json("[NaN]", "file", finite=False)[0] != 0


def test_what_is_no_file_or_too_large_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    with open(tmp_path / "huge.json", "wb") as stream:
        stream.truncate(MOST_JSON + 1)
    (tmp_path / "other.json").write_bytes("{}".encode("utf-16"))
    says = {
        "pipe": "is no file",
        "folder": "is no file",
        "huge": "is too large: allowed are 128 MiB",
        "gone": "is missing",
    }
    for name, words in {**says, "other": "is no JSON"}.items():
        file = tmp_path / f"{name}.json"
        with pytest.raises(KitError, match=re.escape(f"{file} {words}")):
            read_json(file)
    with pytest.raises(KitError, match="is no file"):
        Experiment.from_yaml(tmp_path / "pipe.json")


def test_a_newer_versions_file_is_called_that(tmp_path):
    file = tmp_path / "training.json"
    write_json(file, {"schema": 99, "labels": 3})
    with pytest.raises(KitError, match=r"made by a newer version of qlora_kit \(schema 99, this one reads 1\)"):
        schemas.read(file, "training.json")


def test_a_file_of_another_shape_is_refused_by_its_place(tmp_path):
    file = tmp_path / "run.json"
    for value, says in (
        ([], r"the whole: \[\] is not of type 'object'"),
        ({"preset": "a"}, "the whole: 'notebooks' is a required property"),
        ({"preset": "a", "notebooks": {"01_a": {"state": 3}}}, r"01_a.*state: 3 is not of type 'string'"),
    ):
        write_json(file, value)
        with pytest.raises(KitError, match=rf"run\.json: .*{says}"):
            schemas.read(file, "run.json")


def test_a_manifest_tells_what_is_not_as_it_was(tmp_path):
    folder = tmp_path / "folder"
    (folder / "part" / "deep").mkdir(parents=True)
    for name in ("part/a", "part/deep/b", "single", "other"):
        (folder / name).write_text(name)
    parts = ("part", "single", "later", "nowhere")
    write_json(folder / NAME, of(folder, parts, coming={"later": "text\n"}))
    assert problem(folder, parts) == "later is missing"
    write_text(folder / "later", "text\n")
    assert problem(folder, parts) is None
    (folder / "other").write_text("changed, and nobody asked")
    assert problem(folder, parts) is None

    def with_(change, back):
        change()
        found = problem(folder, parts)
        back()
        assert problem(folder, parts) is None
        return found

    b, c = folder / "part" / "deep" / "b", folder / "part" / "deep" / "c"
    assert (
        with_(lambda: b.write_text("b"), lambda: b.write_text("part/deep/b"))
        == "part/deep/b is damaged, or was changed"
    )
    assert with_(b.unlink, lambda: b.write_text("part/deep/b")) == "part/deep/b is missing"
    assert with_(c.touch, c.unlink) == "part/deep/c does not belong to it"
    assert with_(lambda: os.mkfifo(c), c.unlink) == "part/deep/c does not belong to it"
    (folder / "part").rename(tmp_path / "part")
    assert problem(folder, parts) == "part/a is missing"
    assert problem(folder, parts, may_lack=["part"]) is None
