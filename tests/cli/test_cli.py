"""The command line: exit codes, one line for bad input, help that teaches."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qlora_kit import __version__
from qlora_kit.cli import main as cli
from qlora_kit.config.names import presets
from qlora_kit.errors import KitError
from qlora_kit.run import load_run

ROOT = Path(__file__).resolve().parents[2]
NAMES = tuple(command.NAME for command in cli.COMMANDS)


def kit(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "qlora_kit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, encoding="utf-8")


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that has to be refused; return its one line."""
    assert cli.main([*map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("qlora_kit: ") and said.err.count("\n") == 1 and said.err.endswith("\n")
    return said.err


def test_help_teaches_by_example(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == 0
    plain = capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        cli.main(["--help"])
    assert done.value.code == 0
    assert capsys.readouterr().out == plain
    for command in NAMES:
        assert command in plain
    assert "tickets.csv" in plain and 'predict runs/minilm_banking77_qlora_seed0 "My card' in plain
    for command in NAMES:
        assert f"examples:\n  qlora-kit {command}" in help_of(capsys, command)
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"{__version__}\n"


def help_of(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    with pytest.raises(SystemExit) as done:
        cli.main([*command, "--help"])
    assert done.value.code == 0
    return capsys.readouterr().out


def test_every_example_is_a_command_that_parses(capsys: pytest.CaptureFixture[str]):
    for command in ((), *((name,) for name in NAMES)):
        text = re.sub(r" \\\n +", " ", help_of(capsys, *command))
        lines = [line.strip() for line in text.splitlines() if line.startswith("  qlora-kit ")]
        assert len(lines) > 1, command
        for line in lines:
            # Behind three spaces stands what the command does; behind < or > what the shell takes.
            words = shlex.split(re.split(r" {3,}| [<>] ", line)[0])[1:]
            assert cli.make_parser().parse_args(words).command == words[0], line


def test_every_option_says_what_it_is_for():
    (commands,) = (a for a in cli.make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert tuple(commands.choices) == NAMES
    for name, command in commands.choices.items():
        assert all(action.help for action in command._actions), name


def test_every_command_is_a_file_of_its_name():
    files = {path.stem for path in Path(cli.__file__).parent.glob("*.py") if "\nNAME = " in path.read_text()}
    assert files == {name.replace("-", "_") for name in NAMES}
    for command in cli.COMMANDS:
        assert command.__name__ == f"qlora_kit.cli.{command.NAME.replace('-', '_')}"


def test_usage_names_the_command_that_is_installed(tmp_path: Path):
    for arguments in (["--help"], ["plan", "--help"]):
        said = kit(*arguments, cwd=tmp_path)
        assert said.returncode == 0 and said.stdout.startswith("usage: qlora-kit "), said.stdout
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    module, _, name = scripts["qlora-kit"].partition(":")
    assert getattr(importlib.import_module(module), name) is cli.main


def test_presets_are_listed_and_printed(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["presets"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == presets()
    assert all(re.fullmatch(r"[\w.-]+ +[A-Z][^#]{20,}\.", line) for line in listed.splitlines()), listed
    assert cli.main(["presets", "minilm_banking77_smoke"]) == 0
    assert "limit: 600" in capsys.readouterr().out


def test_bad_input_ends_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert "Did you mean 'finetune'" in refused(capsys, "finetun", "x")
    assert "Did you mean 'minilm_banking77_qlora'" in refused(capsys, "finetune", "minilm_banking77_qlor")
    assert "Did you mean 'minilm_banking77_qlora'" in refused(
        capsys, "run-notebooks", "--preset", "minilm_banking77_qlor"
    )
    assert "--help" in refused(capsys, "finetune")
    assert "--wrong" in refused(capsys, "presets", "--wrong")
    smoke = ("finetune", "minilm_banking77_smoke", "--out", tmp_path / "runs")
    assert "training.epochs" in refused(capsys, *smoke, "--set", "training.epoch=1")
    assert "write --set" in refused(capsys, *smoke, "--set", "training.epochs")
    own = (*smoke, "--data", "a.csv", "--set")
    assert "data.name is given twice, as 'b.csv' and as 'a.csv'" in refused(capsys, *own, "data.name=b.csv")
    assert "training.epochs is given twice" in refused(capsys, *own, "training.epochs=1", "--set", "training.epochs=2")
    assert "leave --text out" in refused(capsys, *smoke, "--text", "question")
    assert "cannot be the name of" in refused(capsys, *smoke, "--name", "../../elsewhere")
    assert "no run folder" in refused(capsys, "evaluate", tmp_path / "nothing")
    assert "no run folder" in refused(capsys, "predict", tmp_path / "nothing", "a text")
    assert "is 0" in refused(capsys, "predict", tmp_path, "a text", "--top", "0")
    assert "no file or folder" in refused(capsys, "check", tmp_path / "nothing")
    out = ("run-notebooks", "--preset", "minilm_banking77_smoke", "--out", tmp_path / "out")
    assert "Did you mean 'epochs'" in refused(capsys, *out, "--params", "epoch=1")
    assert "Did you mean '02_finetune'" in refused(capsys, *out, "--notebooks", "02_finetun")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "out").exists()


def test_what_no_file_can_be_called_ends_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    long = "x" * 5000
    for command in (("presets", long), ("plan", long), ("evaluate", long), ("check", long), ("predict", long, "a")):
        assert refused(capsys, *command)
    assert "anchors (&) and aliases" in refused(capsys, "plan", "minilm_banking77_smoke", "--set", "lora.r=&a [*a]")
    assert "beyond any GPU" in refused(capsys, "plan", "minilm_banking77_smoke", "--batch", str(10**30))


def test_a_terminal_without_unicode_and_one_that_is_closed_end_in_no_traceback(tmp_path: Path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "COLUMNS": "1"}
    command = [sys.executable, "-m", "qlora_kit", "presets"]
    said = subprocess.run([*command, "caf\u00e9"], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert said.returncode == 2 and "caf\\xe9" in said.stderr and said.stderr.count("\n") == 1
    said = subprocess.run(["bash", "-c", f"{shlex.join(command)} 2>&1 | head -n 1"], capture_output=True, env=env)
    assert said.stdout.count(b"\n") == 1 and b"Traceback" not in said.stdout + said.stderr
    said = subprocess.run(["bash", "-c", f"{shlex.join([*command, 'x'])} 2>&1 | true"], capture_output=True, env=env)
    assert said.stderr == b""


def test_a_command_that_is_told_to_end_says_one_line(tmp_path: Path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = "import os, signal, sys\nfrom qlora_kit.cli import main as cli, presets\n" + (
        "presets.run = lambda options: os.kill(os.getpid(), int(sys.argv[1]))\nsys.exit(cli.main(['presets']))"
    )
    for number, code in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        command = [sys.executable, "-c", script, str(int(number))]
        said = subprocess.run(command, capture_output=True, text=True, env=env)
        assert (said.returncode, said.stderr) == (
            code,
            "qlora_kit: stopped; the same command again goes on where it can\n",
        )
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_bad_file_ends_in_one_line_of_the_whole_process(tmp_path: Path):
    (tmp_path / "good.csv").write_text("message,team\n" + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(20)))
    done = kit(
        *("finetune", "minilm_banking77_smoke", "--data", "good.csv", "--test", "0.2"),
        *("--text", "messag", "--label", "team"),
        cwd=tmp_path,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("qlora_kit: ") and done.stderr.count("\n") == 1
    assert "Did you mean 'message'" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_options_may_stand_between_texts():
    def parsed(*words: str) -> argparse.Namespace:
        return cli.make_parser().parse_args(words)

    for words in (
        ("predict", "RUN", "--json", "--top", "1", "a text", "b"),
        ("predict", "RUN", "a text", "--json", "b", "--top", "1"),
        ("predict", "--top", "1", "RUN", "--json", "a text", "b"),
        ("predict", "--top=1", "--json", "RUN", "a text", "--", "b"),
    ):
        found = parsed(*words)
        assert (found.folder, found.texts, found.json, found.top) == ("RUN", ["a text", "b"], True, 1), words
    assert parsed("predict", "RUN", "--json").texts == []
    assert parsed("predict", "RUN", "--json", "--", "--top", "-5 euros").texts == ["--top", "-5 euros"]
    assert parsed("finetune", "--set", "a=1", "x", "--set", "b=2").set == ["a=1", "b=2"]
    assert parsed("check", "a", "b").paths == ["a", "b"]
    with pytest.raises(KitError, match="required: RUN"):
        parsed("predict", "--json")
    with pytest.raises(KitError, match="unrecognized arguments: --js"):
        parsed("predict", "RUN", "--js", "a text")


def test_a_failure_is_no_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "01_bad.json").write_text(json.dumps({"schema": 1}))
    assert cli.main(["check", str(tmp_path / "01_bad.json")]) == 1
    assert "'notebook' is a required property" in capsys.readouterr().out
    assert cli.main(["check", str(ROOT / "tests")]) == 1
    assert "0 records" in capsys.readouterr().out


def test_own_rows_from_training_to_prediction(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    moods = {"happy": ["what a fine day", "I love this", "great news today"], "cross": ["I am fed up", "this is awful"]}
    rows = [f'"{text}, {i}",{mood}' for i in range(12) for mood, texts in moods.items() for text in texts]
    (tmp_path / "moods.csv").write_text("message,mood\n" + "\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    train = ["finetune", "minilm_banking77_smoke", "--name", "moods", "--quiet", "--set", "training.epochs=1"]
    train += ["--data", "moods.csv", "--text", "message", "--label", "mood", "--test", "0.2"]
    more = ["--set", "training.batch_size=8", "--set", "data.validation=0.2"]
    assert cli.main([*train, *more]) == 0
    assert capsys.readouterr().out == "runs/moods\n"

    monkeypatch.setattr("sys.stdin", io.StringIO("I love this day\nawful, I am fed up\n\n \n"))
    assert cli.main(["predict", "runs/moods", "--json"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["text"], row["label"]) for row in said] == [
        ("I love this day", "happy"),
        ("awful, I am fed up", "cross"),
    ]
    assert all(sum(row["probabilities"].values()) == pytest.approx(1) for row in said)
    assert cli.main(["predict", "runs/moods", "I love this", "--top", "1"]) == 0
    assert capsys.readouterr().out.startswith("I love this\n    happy ")
    monkeypatch.setattr("sys.stdin", io.StringIO("I love this\n"))
    assert cli.main(["predict", "runs/moods", "-", "--top", "1"]) == 0
    assert capsys.readouterr().out.startswith("I love this\n    happy ")
    monkeypatch.setattr("sys.stdin", io.StringIO("I love this\n\nI am fed up\n"))
    assert "line 2 of standard input is blank" in refused(capsys, "predict", "runs/moods")
    assert "give - alone, or texts alone" in refused(capsys, "predict", "runs/moods", "I love this", "-")
    assert cli.main(["predict", "runs/moods", "moods.csv"]) == 2
    assert "'moods.csv' is a file, not a text: write predict RUN < moods.csv" in capsys.readouterr().err

    assert cli.main(["evaluate", "runs/moods", "--no-baselines", "--quiet"]) == 0
    said = capsys.readouterr().out
    path, verdict = said.splitlines()[-2:]
    assert "f1_macro" in said and "\nweakest labels: " in said and path == "runs/moods/evaluation.json"
    assert verdict == load_run("runs/moods").verdict and "no baseline was tested beside it" in verdict
    assert re.search(r"^\d+ of 12 test texts \(\d+\.\d%\) also stand in training or validation", said, re.MULTILINE)
    assert cli.main(["evaluate", "runs/moods", "--no-baselines", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said.pop("verdict") == verdict and said == load_run("runs/moods").evaluation

    # The same command again, not quiet: what begins, how good the run is and what comes next.
    assert cli.main([word for word in train if word != "--quiet"] + more) == 0
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d+ rows, 2 labels; embedded:minilm, LoRA on nf4, \d+ steps, into runs/moods, on .+", said[0])
    assert said[-2:] == [verdict, 'next: qlora-kit predict runs/moods "a text"']

    assert cli.main(["predict", "runs/moods", "--reject-below", "1", "I love this", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] is None
    assert cli.main(["predict", "I love this", "--reject-below", "1", "--top", "1"]) == 2
    assert "there is no run folder 'I love this'" in capsys.readouterr().err
    for share in ("nan", "1.5", "-0.1"):
        assert f"--reject-below is {share}: allowed is 0 to 1" in refused(
            capsys, "predict", "runs/moods", "a", f"--reject-below={share}"
        )
    assert cli.main(["check", "runs/moods"]) == 0
    assert "2 records checked, 0 problems" in capsys.readouterr().out
