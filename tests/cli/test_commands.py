"""Commands that stand beside training: compare, merge, zip, push, completion, plan without a network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qlora_kit as qk
from qlora_kit.cli import main as cli
from qlora_kit.config.experiment import Experiment
from qlora_kit.config.sections import LoraSpec, ModelSpec, TrackingSpec, TrainingSpec
from qlora_kit.data.loading import load
from qlora_kit.errors import KitError
from qlora_kit.evaluation import compare_runs, metrics, paired_difference
from qlora_kit.system.hub import refuse_out_of_reach, shape_like
from qlora_kit.training.finetune import with_data

ROOT = Path(__file__).resolve().parents[2]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that has to be refused; return its one line."""
    assert cli.main([*map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err


@pytest.fixture(scope="module")
def runs(tiny, topics, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the folders of two tested runs that differ in seed and rank."""
    made = []
    out = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        experiment = Experiment(
            name="tiny_bert",
            model=ModelSpec(str(tiny("bert"))),
            lora=LoraSpec(r=4 + seed, alpha=8, dropout=0.0),
            training=TrainingSpec(epochs=1, batch_size=32, learning_rate=5e-3, threads=1, seed=seed),
            tracking=TrackingSpec(wandb="none"),
        )
        run = qk.finetune(experiment, data=topics, out=out, progress=False)
        qk.evaluate(run, baselines=False, resamples=50, progress=False)
        made.append(run.path)
    return made


# ---- compare ----


def test_runs_are_compared_on_the_same_rows(runs, topics):
    found = compare_runs(runs, resamples=200)
    assert json.loads(json.dumps(found)) == found
    assert found["rows"] == len(topics.test) and [row["run"] for row in found["runs"]] == [*map(str, runs)]
    guesses = [qk.load_run(run).evaluation["predictions"]["test"] for run in runs]
    for row, guess in zip(found["runs"], guesses, strict=True):
        for name in ("accuracy", "f1_macro"):
            assert row[name]["value"] == metrics(guess, topics.test.labels, resamples=5)[name]["value"]
    (gap,) = found["differences"]
    assert (gap["run"], gap["minus"]) == (str(runs[1]), str(runs[0]))
    for name in ("accuracy", "f1_macro"):
        assert gap[name] == paired_difference(guesses[1], guesses[0], topics.test.labels, name, resamples=200)
    assert found["settings"] == {"lora.r": [4, 5], "training.seed": [0, 1]}
    back = compare_runs([qk.load_run(run) for run in reversed(runs)], resamples=200)
    assert back["differences"][0]["f1_macro"]["value"] == pytest.approx(-gap["f1_macro"]["value"])


def test_a_terminal_compares_runs(runs, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["compare", *map(str, runs)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("on 48 test rows") and said[1].startswith(str(runs[0]))
    assert said[3].startswith(f"{runs[1]} minus {runs[0]}") and said[4].startswith(
        (f"{runs[1]} is ", f"{runs[1]} shows no clear difference from ")
    )
    assert said[4].endswith(f" {runs[0]} in macro F1")
    assert said[5] == "the scores are unsure, as there are only 48 test rows"
    assert said[6:] == ["settings that differ:", "  lora.r: 4, 5", "  training.seed: 0, 1"]
    assert cli.main(["compare", "--json", *map(str, runs)]) == 0
    assert json.loads(capsys.readouterr().out) == compare_runs(runs)


def edited(run: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Copy a run whose evaluation.json is changed."""
    copy = Path(shutil.copytree(run, to))
    report = json.loads((copy / "evaluation.json").read_text("utf-8"))
    change(report)
    (copy / "evaluation.json").write_text(json.dumps(report), "utf-8")
    return copy


def test_a_run_and_its_copy_are_not_told_apart(runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = edited(runs[0], tmp_path / "copy", lambda report: None)
    found = compare_runs([runs[0], copy])
    (gap,) = found["differences"]
    assert gap["f1_macro"]["low"] < gap["f1_macro"]["value"] == 0 < gap["f1_macro"]["high"]
    assert f"{copy} gives every test row the same label as {runs[0]}" in found["notes"] and found["settings"] == {}
    assert cli.main(["compare", str(runs[0]), str(copy)]) == 0
    said = capsys.readouterr().out
    assert "shows no clear difference from" in said and "the same label as" in said and "no setting differs" in said


@pytest.mark.parametrize(
    ("guess", "words"),
    [
        (99, "predicts class 99, and 6 labels have the classes 0 to 5"),
        (-1, "-1 is less than the minimum of 0"),
        ("0", "'0' is not of type 'integer'"),
        (0.5, "0.5 is not of type 'integer'"),
        (None, "None is not of type 'integer'"),
    ],
)
def test_damaged_predictions_are_refused(runs, guess, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = edited(runs[1], tmp_path / "copy", lambda report: report["predictions"]["test"].__setitem__(0, guess))
    assert words in refused(capsys, "compare", runs[0], copy)


def test_what_cannot_be_compared_is_refused(
    runs, topics, tiny_experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    one = runs[0]
    assert "two or more run folders: write compare RUN RUN" in refused(capsys, "compare", one)
    assert "is given twice" in refused(capsys, "compare", one, one)
    with pytest.raises(KitError, match="takes two or more runs"):
        compare_runs(str(one))
    copy = Path(shutil.copytree(runs[1], tmp_path / "copy"))
    report = json.loads((copy / "evaluation.json").read_text("utf-8"))
    (copy / "evaluation.json").unlink()
    assert "is not tested yet: call qlora-kit evaluate " in refused(capsys, "compare", one, copy)
    del report["predictions"]
    (copy / "evaluation.json").write_text(json.dumps(report), "utf-8")
    assert "has no predictions of the test rows" in refused(capsys, "compare", one, copy)

    def other(name: str, data: qk.TextData) -> Path:
        experiment = tiny_experiment("bert", training__epochs=1, tracking__wandb="none")
        run = qk.finetune(experiment, data=data, out=tmp_path, name=name, progress=False)
        qk.evaluate(run, baselines=False, resamples=5, progress=False)
        return run.path

    table = [
        {"text": text, "label": topics.label_names[label]}
        for split in topics.splits().values()
        for text, label in zip(split.texts, split.labels, strict=True)
    ]
    rows = qk.text_classification(table, test=0.2, validation=0.2, seed=5)
    assert "was tested on other rows than" in refused(capsys, "compare", one, other("rows", rows))
    fewer = [row for row in table if row["label"] != topics.label_names[0]]
    labels = qk.text_classification(fewer, test=0.2, validation=0.2)
    said = refused(capsys, "compare", one, other("labels", labels))
    assert f"only one of them has {topics.label_names[0]!r}" in said


# ---- merge, zip, push, completion ----


def test_a_terminal_merges_and_zips(runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = tmp_path / "merged"
    assert cli.main(["merge", str(runs[0]), str(target), "--quiet"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert re.match(r"on \d+ validation rows: macro F1 0\.\d+ before, 0\.\d+ after; ", said[0])
    assert re.match(r"on \d+ test rows: macro F1 0\.\d+ before, 0\.\d+ after; ", said[1])
    assert said[2:] == [str(target)]
    assert (target / "merge.json").is_file() and (target / "config.json").is_file()
    assert "nothing is overwritten" in refused(capsys, "merge", runs[0], target)
    assert "there is no dtype 'fp8'" in refused(capsys, "merge", runs[0], tmp_path / "x", "--dtype", "fp8")

    assert cli.main(["zip", str(runs[0]), "--to", str(tmp_path / "run.zip")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run.zip'}\n"
    names = zipfile.ZipFile(tmp_path / "run.zip").namelist()
    assert f"{runs[0].name}/training.json" in names and not any("/data/" in name for name in names)
    # Example texts of one's rows leave only where they are asked for.
    assert cli.main(["zip", str(runs[0]), "--to", str(tmp_path / "texts.zip"), "--texts"]) == 0
    capsys.readouterr()
    whole = (runs[0] / "evaluation.json").read_bytes()
    kept = {
        name: zipfile.ZipFile(tmp_path / name).read(f"{runs[0].name}/evaluation.json")
        for name in ("run.zip", "texts.zip")
    }
    assert kept["texts.zip"] == whole != kept["run.zip"]
    assert "there is no folder" in refused(capsys, "zip", tmp_path / "nothing")
    (tmp_path / "a.zip").mkdir()
    for name, wrong in (("a.txt", "does not end in .zip"), ("a.zip", "is a folder")):
        assert f"--to is {str(tmp_path / name)!r}, which {wrong}" in refused(
            capsys, "zip", runs[0], "--to", tmp_path / name
        )
    assert not (tmp_path / "a.txt").exists()


def test_a_push_without_a_network_is_refused_in_one_line(runs, capsys: pytest.CaptureFixture[str]):
    assert "nobody could load adapters to it" in refused(capsys, "push", runs[0], "me/tickets")
    assert "HF_HUB_OFFLINE is set" in refused(capsys, "push", runs[0], "me/tickets", "--merged")
    assert "allowed is owner/name" in refused(capsys, "push", runs[0], "tickets")


def test_a_shell_completes_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert cli.main(["completion", "bash"]) == 0
    script = tmp_path / "qlora-kit"
    script.write_text(capsys.readouterr().out)
    ask = f"""source {script}; COMP_WORDS=(qlora-kit "$@"); COMP_CWORD=$#; COMP_LINE="qlora-kit $*"
        complete -p qlora-kit | grep -o -- '-F [^ ]*' | cut -c4- > {tmp_path}/function
        $(cat {tmp_path}/function) qlora-kit "${{@: -1}}"; printf '%s\\n' "${{COMPREPLY[@]}}\""""

    def completed(*words: str) -> list[str]:
        done = subprocess.run(["bash", "-c", ask, "bash", *words], capture_output=True, text=True)
        return sorted(word.strip() for word in done.stdout.split())

    assert completed("fine") == ["finetune"] and completed("comp") == ["compare", "completion"]
    assert completed("evaluate", "--no") == ["--no-baselines"]
    assert cli.main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef qlora-kit")
    assert "Allowed: bash, zsh" in refused(capsys, "completion", "fish")


def test_completion_without_its_package_says_what_to_install(monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "pip install 'qlora_kit[completion]'" in refused(capsys, "completion", "bash")


# ---- plan without a network ----


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("meta-llama/Llama-2-7b-hf", "shape:llama-7b"),
        ("Qwen/Qwen2.5-0.5B", "shape:llama-1.1b"),
        ("mistralai/Mixtral-8x7B-v0.1", "shape:llama-7b"),
        ("microsoft/DialoGPT-medium", "shape:dialogpt-medium"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "shape:smollm2-135m"),
        ("meta-llama/Llama-2-70b", "shape:llama-65b"),
        ("someone/dialogpt-large", "shape:dialogpt-medium"),
        ("zzz/0b", "shape:"),
        ("zzz/qqq", "shape:"),
    ],
)
def test_a_model_has_a_shape_most_like_it(name: str, shape: str):
    assert shape_like(name).startswith(shape)


def test_a_plan_of_a_model_out_of_reach_names_a_shape(capsys: pytest.CaptureFixture[str]):
    said = refused(capsys, "plan", "meta-llama/Llama-2-7b-hf")
    assert "not in the local cache, and HF_HUB_OFFLINE is set" in said and "plan shape:llama-7b, which is most" in said
    with pytest.raises(KitError, match="plan shape:llama-7b"):
        qk.memory.fits("meta-llama/Llama-2-7b-hf", device="T4")
    with pytest.raises(KitError, match="plan shape:"):
        refuse_out_of_reach("gpt2")


def test_a_plan_of_a_model_out_of_reach_is_refused_before_torch_is_loaded(tmp_path: Path):
    script = (
        "import sys\nfrom qlora_kit.cli import main as cli\n"
        "print(cli.main(['plan', 'meta-llama/Llama-2-7b-hf']), 'torch' in sys.modules)"
    )
    # Nothing listens on port 9: the hub's client cannot connect, and says so at once.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    env |= {"HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout.split() == ["2", "False"], done.stderr
    assert "the hub does not answer" in done.stderr and "shape:llama-7b" in done.stderr


# ---- what stands on standard output, and when ----


def test_the_first_line_of_a_training_does_not_wait_for_torch(tmp_path: Path):
    script = """
import sys
from qlora_kit.cli import main as cli
class Out:
    def write(self, text):
        if not hasattr(self, "first"):
            self.first = text, "torch" in sys.modules
            raise KeyboardInterrupt
    def flush(self): pass
sys.stdout, kept = Out(), sys.stdout
cli.main(["finetune", "minilm_banking77_smoke", "--name", "tickets"])
print(*sys.stdout.first, sep=chr(10), file=kept)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.stdout.splitlines() == [
        "600 rows, 77 labels; embedded:minilm, LoRA on nf4, 38 steps, into runs/tickets",
        "False",
    ], done.stderr


def test_json_stands_alone_on_standard_output(runs, capsys: pytest.CaptureFixture[str]):
    for command in (["compare", *map(str, runs), "--json"], ["plan", "minilm_banking77_smoke", "--json"]):
        assert cli.main(command) == 0
        assert json.loads(capsys.readouterr().out)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    command = ["predict", str(runs[0]), "a text", "--json"]
    done = subprocess.run([sys.executable, "-m", "qlora_kit", *command], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    # transformers prints when its Trainer is imported, before the command finds out that it cannot go on.
    command = ["search", "minilm_banking77_smoke", "--space", "x"]
    done = subprocess.run([sys.executable, "-m", "qlora_kit", *command], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert "WANDB offline" in done.stderr, "transformers prints it no more, so this shows nothing"


@pytest.mark.parametrize("limit", [None, 300])
def test_data_that_the_terminal_loads_is_the_data_of_the_experiment(limit: int | None, tmp_path: Path):
    (tmp_path / "a.csv").write_text("message,team\n" + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(400)))
    own = {"data.name": str(tmp_path / "a.csv"), "data.test": 0.2, "data.text": "message", "data.label": "team"}
    for changes in ({}, own):
        spec = qk.preset("minilm_banking77_qlora").override({**changes, "data.limit": limit})
        assert with_data(spec, load(spec.data)) == spec
