"""What the terminal says: its own options instead of Python's arguments, and warnings without code."""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

import qlora_kit as qk
from qlora_kit.cli import main as cli
from qlora_kit.cli.experiment import add_experiment, read_experiment
from qlora_kit.config.names import named_after
from qlora_kit.errors import KitError, KitWarning, either, in_terminal, warn
from qlora_kit.training.finetune import with_data

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "qlora_kit"
ROWS = "text,label\n" + "".join(f"hello number {i},a\ngood bye {i},b\n" for i in range(20))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a small table."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tickets.csv").write_text(ROWS)
    return tmp_path


def read(*words: str):
    parser = argparse.ArgumentParser()
    add_experiment(parser)
    return read_experiment(parser.parse_args([*words]))


# --- names ------------------------------------------------------------------------------------------------------


def test_a_run_on_own_data_has_one_name_in_python_and_in_the_terminal(folder: Path):
    in_python = with_data(qk.preset("minilm_banking77_smoke"), qk.text_classification("tickets.csv", test=0.2))
    assert read("minilm_banking77_smoke", "--data", "tickets.csv", "--test", "0.2").name == in_python.name
    assert in_python.name == "minilm_tickets_smoke"
    assert read("minilm_banking77_smoke").name == "minilm_banking77_smoke"
    assert read("minilm_banking77_smoke", "--set", "data.name=tickets.csv").name == "minilm_tickets_smoke"
    chosen = read("minilm_banking77_smoke", "--data", "tickets.csv", "--set", "name=my_banking77_run")
    assert chosen.name == "my_banking77_run"
    # An experiment of one's own, about one's own data, has its name already.
    Path("mine.yaml").write_text(in_python.override({"name": "of_banking77_too"}).to_yaml())
    assert read("mine.yaml", "--data", "tickets.csv").name == "of_banking77_too"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("banking77", "a_banking77_b"),
        ("data/my file.csv", "a_my-file_b"),
        ("parts/*.csv", "a_data_b"),
        ("owner/name", "a_name_b"),
    ],
)
def test_an_experiment_is_named_after_its_data(data: str, name: str):
    assert named_after("a_banking77_b", data) == name


# --- words ------------------------------------------------------------------------------------------------------


def test_the_words_are_those_that_the_user_writes():
    assert either("test=0.2", "--test 0.2") == "test=0.2"
    with in_terminal():
        assert either("test=0.2", "--test 0.2") == "--test 0.2"
    assert either("test=0.2", "--test 0.2") == "test=0.2"


def calls_of_either() -> list[tuple[str, str]]:
    """Return each place that has words for the terminal, and the words."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "either":
                found.append((str(path.relative_to(PACKAGE)), ast.unparse(node.args[1])))
    return found


def test_every_option_that_a_message_names_exists():
    known = set()
    for action in cli.make_parser()._actions:
        for parser in (getattr(action, "choices", None) or {}).values():
            known |= set(parser._option_string_actions)
    calls = calls_of_either()
    assert len(calls) > 5
    for place, words in calls:
        assert set(re.findall(r"--[\w-]+", words)) <= known, place


@pytest.mark.parametrize(
    ("words", "says", "never"),
    [
        (["--label", "topic"], "choose them with --text and --label", "text="),
        (["--test", "2"], "--test is 2.0: allowed is a fraction", "data.test"),
        (["--data", "banking77", "--text", "message"], "leave --text out", "data.text"),
        (["--data", "memory"], "name a file with --data", "finetune("),
        (["--set", "data.validation=4"], "data.validation is 4.0", "--validation"),
    ],
)
def test_an_error_names_the_option_that_was_given(folder, capsys, words: list[str], says: str, never: str):
    data = [] if "--data" in words else ["--data", "tickets.csv"]
    assert cli.main(["finetune", "minilm_banking77_smoke", *data, *words]) == 2
    said = capsys.readouterr().err
    assert says in said and never not in said and said.count("\n") == 1


def test_an_argument_with_an_option_of_its_name_is_named_by_it(folder: Path, capsys):
    assert cli.main(["search", "minilm_banking77_smoke", "--trials", "0"]) == 2
    assert "qlora_kit: --trials is 0: allowed is 1 or more" in capsys.readouterr().err
    with pytest.raises(KitError, match=r"^trials is 0"):
        qk.search(qk.preset("minilm_banking77_smoke"), trials=0)


def test_in_python_the_same_errors_name_the_arguments(folder: Path):
    with pytest.raises(KitError, match="choose them with text= and label="):
        qk.text_classification("tickets.csv", label="topic")


# --- warnings ---------------------------------------------------------------------------------------------------


def test_a_warning_names_the_line_of_the_user(folder: Path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qk.text_classification("tickets.csv")
        line = sys._getframe().f_lineno - 1
        warn("from here")
    assert [item.filename for item in caught] == [__file__, __file__]
    assert [item.lineno for item in caught] == [line, line + 2]
    assert all(item.category is KitWarning for item in caught)
    assert "no test data was named: 10% of tickets.csv is held out for it (test=0.1" in str(caught[0].message)


def test_in_a_terminal_and_in_the_kits_notebooks_a_warning_is_one_line(folder: Path):
    terminal = """
        from qlora_kit.errors import in_terminal, plain_warnings
        import qlora_kit as qk
        with in_terminal(), plain_warnings():
            qk.text_classification("tickets.csv")
    """
    notebook = """
        import qlora_kit as qk
        qk.runtime.ready()
        qk.text_classification("tickets.csv")
        import warnings
        warnings.warn("of another library")
    """
    said = run(terminal)
    assert said == "warning: no test data was named: 10% of tickets.csv is held out for it " + (
        "(--test 0.1 says so without this message)\n"
    )
    said = run(notebook)
    assert said.startswith("warning: no test data was named: 10% of tickets.csv is held out for it (test=0.1 says")
    assert said.splitlines()[1].endswith("UserWarning: of another library")


def run(code: str) -> str:
    """Run code in a Python of its own; return what it says on standard error."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=300
    )
    return done.stderr
