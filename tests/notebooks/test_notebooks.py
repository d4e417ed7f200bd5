"""The runner, with real papermill runs of small notebooks in real kernels."""

from __future__ import annotations

import filecmp
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from qlora_kit import notebooks, schemas
from qlora_kit.config.preset import preset as load_preset
from qlora_kit.config.preset import resolve_preset
from qlora_kit.errors import KitError
from qlora_kit.notebooks.page import write_index
from qlora_kit.system.files import locked

PRESET = "minilm_banking77_smoke"
COMMON = 'preset = "auto"\nout = "runs/latest"\n'
RECORD = """
import json, pathlib
pathlib.Path(out, NAME).mkdir()
pathlib.Path(out, NAME + ".json").write_text(json.dumps({"preset": preset, "seen": seen, "metrics": {}}))
"""


def notebook(folder: Path, name: str, parameters: str, *cells: str, heading: str = "") -> Path:
    """Write a small notebook: parameters, the given cells, and its record."""
    tagged = new_code_cell(COMMON + parameters, metadata={"tags": ["parameters"]})
    body = [new_code_cell(source) for source in (*cells, RECORD.replace("NAME", repr(name)))]
    book = new_notebook(cells=[new_markdown_cell(f"# {heading or name}"), tagged, *body])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.ipynb"
    nbformat.write(book, path)
    return path


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """Two notebooks; the second fails while `flag` beside them is missing."""
    folder = tmp_path / "notebooks"
    notebook(folder, "01_first", 'steps = 3\nrate = 0.5\nwandb = "auto"\nquick = False', "seen = [steps, rate, wandb]")
    notebook(
        folder,
        "02_second",
        "steps = 7\nbatch = 1",
        f"# Look for the flag\nimport pathlib\nif not pathlib.Path({str(folder / 'flag')!r}).exists():\n"
        "    raise ValueError('no flag yet')\nseen = [steps, batch]",
    )
    return folder


def run(folder: Path, out: Path, *, preset: str = PRESET, **arguments: Any) -> str:
    stream = io.StringIO()
    notebooks.run_notebooks(preset, out, folder=folder, stream=stream, **arguments)
    return stream.getvalue()


def seen(out: Path, name: str) -> list[Any]:
    found: list[Any] = json.loads((out / f"{name}.json").read_text())["seen"]
    return found


def tree(out: Path) -> dict[str, str]:
    return {str(file.relative_to(out)): file.read_text() for file in out.rglob("*") if file.is_file()}


# --- parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ("step=1", ["'step'", "Did you mean 'steps'?"]),
        ("02_second.rate=1", ["'rate' in 02_second", "steps, batch"]),
        ("03_third.rate=1", ["notebook '03_third'", "02_second"]),
        ("steps=few", ["steps is 'few'", "whole number"]),
        ("steps=1.5", ["whole number"]),
        ("steps=true", ["whole number"]),
        ("rate=[1]", ["number"]),
        ("quick=3", ["true or false"]),
        ("steps=[a", ["no YAML"]),
        ("steps", ["name=value"]),
        ("steps=1 steps=2", ["twice"]),
        ("out=elsewhere", ["OUT=..."]),
        ("preset=auto", ["PRESET=..."]),
        ("wandb='a", ["open quote"]),
    ],
)
def test_a_bad_parameter_is_refused_before_anything_runs(books: Path, tmp_path: Path, params: str, words: list[str]):
    with pytest.raises(KitError) as caught:
        run(books, tmp_path / "out", params=params)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_parameter_of_a_notebook_that_is_not_to_run_is_refused_by_name(books: Path, tmp_path: Path):
    for params, words in (("batch=2", "02_second has it"), ("02.batch=2", "which is not to be run")):
        with pytest.raises(KitError, match=words):
            run(books, tmp_path / "out", notebooks="01", params=params)


def test_a_run_of_the_notebooks_is_not_kept_on_drive():
    for name in ("keep_in_drive", "02_finetune.keep_in_drive"):
        with pytest.raises(KitError, match="is opened in Colab: here OUT="):
            notebooks.assign_params({name: "true"}, notebooks.list_notebooks())
    with pytest.raises(KitError, match=r"'keep'\. ") as caught:
        notebooks.assign_params({"keep": "true"}, notebooks.list_notebooks())
    assert "keep_in_drive" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "default", "value"),
    [
        ("3", 1, 3),
        ("3.0", 1, 3),
        ("1e-3", 0.5, 1e-3),
        ("2", 0.5, 2.0),
        ("off", "auto", "off"),
        ("12", "", "12"),
        ("'12'", "", "12"),
        ("none", "auto", "none"),
        ("[a # b", "auto", "[a # b"),
        ("true", False, True),
        ("[1, 2]", [8], [1, 2]),
        ("7", None, 7),
        ("a=b", "", "a=b"),
    ],
)
def test_a_value_is_read_as_the_default_has_it(given: str, default: Any, value: Any, tmp_path: Path):
    path = notebook(tmp_path, "01_first", f"it = {default!r}")
    values = notebooks.assign_params(notebooks.split_params(f'it="{given}"'), {"01_first": path})
    assert values == {"01_first": {"it": value}}
    assert type(values["01_first"]["it"]) is type(value)


def test_one_notebooks_value_goes_before_the_general_one(books: Path):
    chosen = notebooks.list_notebooks(books)
    values = notebooks.assign_params(notebooks.split_params("02.steps=9 steps=8 02_second.batch=4"), chosen)
    assert values == {"01_first": {"steps": 8}, "02_second": {"steps": 9, "batch": 4}}


def test_notebooks_are_chosen_by_name_or_number(books: Path):
    there = notebooks.list_notebooks(books)
    assert list(notebooks.choose(None, there)) == list(notebooks.choose("", there)) == ["01_first", "02_second"]
    assert list(notebooks.choose("02 1", there)) == ["01_first", "02_second"]
    assert list(notebooks.choose(["02_second.ipynb"], there)) == ["02_second"]
    with pytest.raises(KitError, match="Did you mean '02_second'"):
        notebooks.choose("02_secnd", there)


def test_bad_presets_and_folders_are_refused_before_anything_runs(books: Path, tmp_path: Path, monkeypatch):
    with pytest.raises(KitError, match="Did you mean 'minilm_banking77_smoke'"):
        run(books, tmp_path / "out", preset="minilm_banking77_smok")
    home = tmp_path / "home"
    (home / "work").mkdir(parents=True)
    monkeypatch.chdir(home / "work")
    for out in (home, home / "work", Path("."), Path("..")):
        with pytest.raises(KitError, match="holds more than a run"):
            run(books, out)
    (home / "file").write_text("mine")
    with pytest.raises(KitError, match="is a file"):
        run(books, home / "file")
    with pytest.raises(KitError, match="no notebook"):
        run(home, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (home / "file").read_text() == "mine"


# --- running, failing, going on ---------------------------------------------------------------------------------


def test_a_run_that_failed_goes_on_and_a_finished_one_is_moved_aside(books: Path, tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(notebooks.NotebookFailed) as caught:
        run(books, out, params="steps=4")
    message = str(caught.value)
    assert message.endswith("ValueError: no flag yet")
    assert "cell 2/3" in message and "the same command again" in message
    kept = nbformat.read(out / "02_second.ipynb", as_version=4)
    assert any(output.get("ename") == "ValueError" for cell in kept.cells for output in cell.get("outputs", ()))
    assert json.loads((out / "run.json").read_text())["notebooks"]["02_second"]["state"] == "failed"
    assert seen(out, "01_first") == [4, 0.5, "auto"]
    assert "no flag yet" in (out / "index.html").read_text()
    first = (out / "01_first.ipynb").read_bytes()

    (books / "flag").touch()
    said = run(books, out, params="steps=4")
    assert "Going on with" in said and "after 01_first" in said
    assert "[1/1] 02_second  steps=4" in said and "Look for the flag" in said
    assert (out / "01_first.ipynb").read_bytes() == first
    assert seen(out, "02_second") == [4, 1]
    attempts = list(out.glob("cut_off/*/02_second.ipynb"))
    assert len(attempts) == 1 and "no flag yet" in attempts[0].read_text()

    before = tree(out)
    assert "it was finished" in run(books, out, params="steps=4", notebooks="01")
    (aside,) = tmp_path.glob("out-*")
    assert tree(aside) == before
    assert sorted(path.name for path in out.glob("*.ipynb")) == ["01_first.ipynb"]

    # Another notebook of the same run is added to it; other parameters are another run.
    assert "Going on with" in run(books, out, params="02.steps=4", notebooks="02")
    assert len(list(tmp_path.glob("out-*"))) == 1
    assert "01_first had other parameters" in run(books, out, params="steps=5", notebooks="01")
    assert len(list(tmp_path.glob("out-*"))) == 2


def test_bad_input_in_a_cell_is_one_line_and_the_notebook_keeps_the_traceback(
    tmp_path: Path,
):
    wrong = "# Your file\nfrom qlora_kit.errors import KitError\nraise KitError('rows.csv has\\nno rows')"
    notebook(tmp_path / "books", "01_own", "", "seen = []", wrong)
    out = tmp_path / "out"
    with pytest.raises(notebooks.NotebookFailed) as caught:
        run(tmp_path / "books", out)
    assert isinstance(caught.value, KitError)
    assert str(caught.value) == "01_own, cell 3/4: rows.csv has no rows"
    kept = nbformat.read(out / "01_own.ipynb", as_version=4)
    (error,) = [output for cell in kept.cells for output in cell.get("outputs", ()) if "traceback" in output]
    assert error["ename"] == "KitError" and len(error["traceback"]) > 1
    entry = json.loads((out / "run.json").read_text())["notebooks"]["01_own"]
    assert (entry["state"], entry["error"]) == ("failed", str(caught.value))


@pytest.mark.long
def test_a_wrong_file_of_ones_own_is_one_line_in_the_terminal(tmp_path: Path):
    (tmp_path / "rows.csv").write_text("text,label\n")
    command = [sys.executable, "-m", "qlora_kit", "run-notebooks", "--preset", PRESET, "--out", "out"]
    command += ["--notebooks", "00", "--params", "own_file=rows.csv"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    assert re.fullmatch(r"qlora_kit: 00_your_data, cell \d+/\d+: rows\.csv has no rows\n", done.stderr)
    assert "Traceback" in (tmp_path / "out" / "00_your_data.ipynb").read_text()


def test_changed_code_and_foreign_folders_are_moved_aside(books: Path, tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(notebooks.NotebookFailed):
        run(books, out)
    (books / "flag").touch()
    path = books / "01_first.ipynb"
    path.write_text(path.read_text().replace("seen = [", "seen = [0, "))
    assert "the code of 01_first or of the package was another" in run(books, out)
    assert seen(out, "01_first") == [0, 3, 0.5, "auto"]

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    assert "not the start of this run" in run(books, other, notebooks="01")
    (aside,) = tmp_path.glob("other-*")
    assert (aside / "thesis.txt").read_text() == "years of work"


def test_a_notebook_that_ends_without_its_record_has_failed(tmp_path: Path):
    notebook(tmp_path / "books", "01_quits", "", "raise SystemExit(0)")
    with pytest.raises(notebooks.NotebookFailed, match="without writing its record"):
        run(tmp_path / "books", tmp_path / "out")


def test_a_kernel_that_dies_is_told(tmp_path: Path):
    notebook(tmp_path / "books", "01_dies", "", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(notebooks.NotebookFailed, match="ended from outside"):
        run(tmp_path / "books", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["notebooks"]["01_dies"]["state"] == "failed"


def test_the_kernel_is_this_python_with_this_environment(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share"))
    # A kernelspec of the same name that would lead elsewhere.
    spec = tmp_path / "share" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    source = "import sys, os, qlora_kit\nseen = [sys.executable, os.environ['HF_HUB_OFFLINE'], qlora_kit.__file__]"
    notebook(tmp_path / "books", "01_where", "", source)
    run(tmp_path / "books", tmp_path / "out")
    assert seen(tmp_path / "out", "01_where") == [sys.executable, "1", str(notebooks.PACKAGE / "__init__.py")]


def test_auto_is_said_in_the_first_line_and_handed_on_by_name(tmp_path: Path):
    name, why = resolve_preset("auto")
    notebook(tmp_path / "books", "01_which", "", "seen = [preset]")
    said = run(tmp_path / "books", tmp_path / "out", preset="auto").splitlines()
    assert said[0] == f"PRESET=auto: {name} ({why})"
    assert seen(tmp_path / "out", "01_which") == [name]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["why"] == why


def test_what_a_cell_prints_is_shown_while_it_runs(tmp_path: Path):
    source = "print('epoch 1')\nprint('10%\\r20%\\r30%')\nimport sys\nprint('noise', file=sys.stderr)\nseen = []"
    notebook(tmp_path / "books", "01_prints", "", source)
    said = run(tmp_path / "books", tmp_path / "out").splitlines()
    assert "      epoch 1" in said and "      30%" in said
    assert not any("noise" in line for line in said)


def test_a_hostile_value_arrives_as_the_text_it_is(tmp_path: Path):
    value = "it's \\ \"quoted\"\n'''; raise SystemExit # {out} $HOME \u2028"
    notebook(tmp_path / "books", "01_text", 'it = ""', "seen = [it]")
    run(tmp_path / "books", tmp_path / "out", params={"it": value})
    assert seen(tmp_path / "out", "01_text") == [value]


def test_a_second_run_into_the_same_folder_says_so_and_stops(books: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    with locked(out), pytest.raises(KitError, match="another process is writing"):
        run(books, out)
    assert (out / "mine").read_text() == "x"
    assert not list(tmp_path.glob("out-*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_killed_or_stopped_run_leaves_no_kernel_and_is_picked_up(tmp_path: Path, number: int, code: int):
    pid, go = tmp_path / "pid", tmp_path / "go"
    notebook(tmp_path / "books", "01_first", "", "seen = [1]")
    notebook(
        tmp_path / "books",
        "02_slow",
        "",
        f"import os, pathlib, tempfile, time\nfolder = tempfile.TemporaryDirectory()\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\n"
        f"while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.05)\nseen = [2]",
    )
    script = (
        # A shell that runs the tests in the background has told them to ignore Ctrl-C.
        "import pathlib, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from qlora_kit.cli import main\nfrom qlora_kit.notebooks import finding, run_one\n"
        "finding.notebook_folder = lambda: pathlib.Path(sys.argv[3])\n"
        "sys.exit(main.main(['run-notebooks', '--preset', sys.argv[1], '--out', sys.argv[2]]))"
    )
    out, temporary = tmp_path / "out", tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-c", script, PRESET, str(out), str(tmp_path / "books")]
    env = {**os.environ, "PYTHONPATH": str(notebooks.PACKAGE.parent), "TMPDIR": str(temporary)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: pid.exists() and pid.read_text())
    with pytest.raises(KitError, match="another process is writing"):
        run(tmp_path / "books", out)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    kernel = int(pid.read_text())
    wait_for(lambda: not alive(kernel))
    if number != signal.SIGKILL:  # which nobody can answer
        assert said == "qlora_kit: stopped; the same command again goes on where it can\n"
        entry = json.loads((out / "run.json").read_text())["notebooks"]["02_slow"]
        assert entry["state"] == "stopped" and entry["seconds"] > 0
        assert list(temporary.iterdir()) == []
    go.touch()
    said = run(tmp_path / "books", out)
    assert "after 01_first" in said
    assert seen(out, "02_slow") == [2]


def test_a_run_that_is_stopped_before_its_kernel_is_there_says_one_line(tmp_path: Path):
    notebook(tmp_path / "books", "01_first", "", "seen = [1]")
    script = (
        "import pathlib, os, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from qlora_kit.cli import main\nfrom qlora_kit.notebooks import finding, run_one\n"
        "finding.notebook_folder = lambda: pathlib.Path(sys.argv[1])\n"
        "started = run_one._Stop.kernel_started\n"
        "def first_a_signal(*arguments):\n    os.kill(os.getpid(), signal.SIGINT)\n    started(*arguments)\n"
        "run_one._Stop.kernel_started = first_a_signal\n"
        "sys.exit(main.main(['run-notebooks', '--preset', sys.argv[2], '--out', sys.argv[3]]))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "books"), PRESET, str(tmp_path / "out")]
    env = {**os.environ, "PYTHONPATH": str(notebooks.PACKAGE.parent)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "qlora_kit: stopped; the same command again goes on where it can\n"
    assert json.loads((tmp_path / "out" / "run.json").read_text())["notebooks"]["01_first"]["state"] == "stopped"


# --- somebody else's OUT ----------------------------------------------------------------------------------------


def plant(link: Path, target: Path) -> None:
    """Put a symbolic link where a file or folder is or would be."""
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)


def test_no_link_in_a_folder_that_was_cut_off_leads_out_of_it(books: Path, tmp_path: Path):
    """A link is planted wherever the runner writes as it goes on, to something of ours and to what is not there."""
    out, cut, ours, nothing = (tmp_path / name for name in ("out", "cut", "ours", "nothing"))
    with pytest.raises(notebooks.NotebookFailed):
        run(books, out)
    shutil.copytree(out, cut)
    ours.mkdir()
    (ours / "thesis.txt").write_text("years of work")

    (books / "flag").touch()
    run(books, out)
    changed = filecmp.dircmp(cut, out)
    places = {*changed.right_only, *changed.diff_files} - {notebooks.STATE, ".lock"}
    assert places >= {"cut_off", "02_second.ipynb", "02_second.json", "02_second.html", "index.html"}
    # And where its notebooks write, and what it takes as it is.
    places |= {"02_second", "02_second/figure.png", "runs", "runs/name", "runs/name/adapter", "01_first.html"}
    for place in sorted(places):
        for target in (ours, ours / "thesis.txt", nothing, Path(*[".."] * (place.count("/") + 1), "nothing")):
            shutil.rmtree(out)
            shutil.copytree(cut, out)
            plant(out / place, target)
            with pytest.raises(KitError, match=f"{re.escape(str(out / place))} is a symbolic link that leads out of"):
                run(books, out)
            assert tree(ours) == {"thesis.txt": "years of work"} and not nothing.exists()
            assert not list(tmp_path.glob("out-*"))


def test_links_that_stay_in_the_folder_and_wandbs_own_are_no_hindrance(books: Path, tmp_path: Path):
    out, ours = tmp_path / "out", tmp_path / "ours"
    with pytest.raises(notebooks.NotebookFailed):
        run(books, out)
    ours.write_text("years of work")
    wandb = out / "runs" / "wandb" / "offline-run-20260102_030405-abcdefgh"
    (wandb / "logs").mkdir(parents=True)
    (wandb / "logs" / "debug-core.log").symlink_to(ours)
    (wandb.parent / "latest-run").symlink_to(wandb.name)
    # Were these followed, or the notebook that the state does not know of written over, something would be lost.
    plant(out / "02_second.ipynb", Path("01_first.ipynb"))
    plant(out / "02_second", Path("02_second"))
    (out / "02_second.json").hardlink_to(ours)
    state = json.loads((out / "run.json").read_text())
    del state["notebooks"]["02_second"]
    (out / "run.json").write_text(json.dumps(state))
    first = (out / "01_first.ipynb").read_bytes()
    (books / "flag").touch()
    assert "Going on with" in run(books, out)
    assert (out / "01_first.ipynb").read_bytes() == first and seen(out, "02_second") == [7, 1]
    assert ours.read_text() == "years of work"


@pytest.mark.parametrize("entries", [{"../x": {"state": "finished"}}, {"03_third": ["finished"]}, None])
def test_a_state_that_is_not_the_runners_own_is_moved_aside(books: Path, tmp_path: Path, entries: Any):
    """A notebook's name in run.json is a file's name on the page that is written: `../x` would be written outside."""
    out, ours, elsewhere = tmp_path / "out", tmp_path / "x.ipynb", tmp_path / "elsewhere.json"
    out.mkdir()
    shutil.copy(books / "01_first.ipynb", ours)
    experiment = hashlib.sha256(load_preset(PRESET).to_yaml().encode()).hexdigest()
    state = {"preset": PRESET, "experiment": experiment, "notebooks": entries or {}}
    elsewhere.write_text(json.dumps(state))
    if entries is None:
        plant(out / "run.json", elsewhere)
    else:
        shutil.copy(elsewhere, out / "run.json")
    assert "it is not the start of this run" in run(books, out, notebooks="01")
    assert not ours.with_suffix(".html").exists()
    assert json.loads(elsewhere.read_text()) == state
    assert len(list(tmp_path.glob("out-*"))) == 1


def wait_for(condition: Any, minutes: float = 1) -> None:
    for _ in range(int(1200 * minutes)):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"it did not happen within {minutes} minutes")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.long
def test_the_real_notebooks_killed_while_training_end_as_if_nothing_had_been(tmp_path: Path):
    env = {**os.environ, "PYTHONPATH": str(notebooks.PACKAGE.parent), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}

    def command(out: Path) -> list[str]:
        words = ["run-notebooks", "--preset", PRESET, "--notebooks", "02 03", "--out", str(out)]
        return [sys.executable, "-m", "qlora_kit", *words, "--params", "epochs=2 resamples=200"]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(command(whole), env=env, check=True)
    process = subprocess.Popen(command(cut), env=env, start_new_session=True)
    folder = cut / "runs" / f"{PRESET}_seed0"
    wait_for(lambda: list((folder / "checkpoints").glob("checkpoint-*")), minutes=10)
    process.kill()
    process.wait()
    # Its kernel notices within a second or two; until then it holds the run folder.
    wait_for(lambda: free(folder))
    done = subprocess.run(command(cut), env=env, check=True, capture_output=True, text=True)
    assert "Going on with" in done.stdout
    for name in ("training.json", "evaluation.json"):
        ended = [json.loads((out / "runs" / folder.name / name).read_text())["metrics"] for out in (whole, cut)]
        for metrics in ended:
            for baseline in metrics.get("baselines", {}).values():
                baseline.pop("seconds")
        assert ended[0] == ended[1], name
    assert json.loads((folder / "training.json").read_text())["timing"]["resumed_from_step"]
    _, problems = schemas.check([whole, cut])
    assert problems == []


def test_a_run_that_has_to_be_trained_first_is_told_of_before_and_found_afterwards(tiny_experiment, tmp_path, capsys):
    experiment = tiny_experiment("bert", data__limit=100, tracking__wandb="none")
    (tmp_path / "mine.yaml").write_text(experiment.to_yaml())
    out = tmp_path / "out"
    made, source = notebooks.open_run(str(tmp_path / "mine.yaml"), out=out, max_steps=1)
    told, _, progress = capsys.readouterr().out.partition("\n")
    assert told.startswith(
        f"There is no finished run of tiny_bert in {out / 'runs'} or in runs, so it is trained first"
    )
    assert "How long that takes was not measured" in told and "epoch" in progress
    assert "trained just now" in source
    found, source = notebooks.open_run(str(tmp_path / "mine.yaml"), out=out)
    assert found.path == made.path and "newest finished run of tiny_bert" in source
    assert capsys.readouterr().out == ""


def test_how_long_a_training_takes_is_what_the_project_measured():
    known = load_preset("minilm_banking77_qlora")
    recorded = json.loads((ROOT / "results" / "accuracy.json").read_text())["rows"]
    seconds = {
        cuda: sorted(
            row["train_seconds"]
            for row in recorded
            if row["preset"] == known.name and row["device"].startswith("NVIDIA") == cuda
        )
        for cuda in (True, False)
    }
    middle = {cuda: values[len(values) // 2] for cuda, values in seconds.items()}
    said = {cuda: notebooks.training_time(known, cuda=cuda) for cuda in (True, False)}
    assert said[False] == f"about {middle[False] / 60:.0f} minutes on AMD EPYC, 1 core"
    (gpu,) = {row["device"] for row in recorded if row["preset"] == known.name and row["device"].startswith("NVIDIA")}
    assert said[True] == f"about {middle[True]:.0f} seconds on {gpu}"
    half = known.override({"training.epochs": known.training.epochs / 2})
    assert f"about {middle[False] / 120:.0f} minutes" in notebooks.training_time(half, cuda=False)
    assert notebooks.training_time(known.override({"training.max_steps": 10}), cuda=False) == ""
    assert notebooks.training_time(load_preset("minilm_banking77_smoke"), cuda=False) == ""


def free(folder: Path) -> bool:
    try:
        with locked(folder):
            return True
    except KitError:
        return False


# --- index.html -------------------------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"


def test_the_page_shows_everything_and_lets_no_markup_in(tmp_path: Path):
    out = tmp_path / "out"
    (out / "03_evaluate").mkdir(parents=True)
    figure = b"\x89PNG\r\n\x1a\n" + b"picture"
    (out / "03_evaluate" / "01_confusions.png").write_bytes(figure)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (out / "03_evaluate" / "02_link.png").symlink_to(tmp_path / "secret.png")
    scores = {key: {"value": 0.9331, "low": 0.9244, "high": 0.9418} for key in ("accuracy", "f1_macro", "f1_weighted")}
    baseline = {
        **scores,
        "C": 1.0,
        "validation": {"1.0": 0.9},
        "ahead": {"f1_macro": {"value": 0.01, "low": 0, "high": 1}},
    }
    record = {
        "schema": 1,
        "notebook": "03_evaluate",
        "preset": HOSTILE,
        "experiment": {"name": HOSTILE},
        "metrics": {"test": scores, HOSTILE: scores, "baselines": {"tfidf_svm": baseline}},
        "memory": {"peak_bytes": 2**20 * 362, HOSTILE: HOSTILE},
        "timing": {"train_seconds": 460.2},
        "parameters": {"trainable": 4404224, "all": 359306240},
        "environment": {"device": HOSTILE, "versions": {"torch": HOSTILE}},
        "confusions": [{"true": HOSTILE, "count": 3, "examples": [HOSTILE]}],
        HOSTILE: HOSTILE,
    }
    (out / "03_evaluate.json").write_text(json.dumps(record))
    book = new_notebook(
        cells=[
            new_markdown_cell(f"# Title\n\n{HOSTILE}"),
            new_code_cell(
                HOSTILE,
                outputs=[
                    nbformat.v4.new_output("stream", name="stdout", text=HOSTILE),
                    nbformat.v4.new_output("display_data", data={"text/html": HOSTILE, "text/plain": HOSTILE}),
                    nbformat.v4.new_output("display_data", data={"application/javascript": "alert(3)"}),
                ],
            ),
        ]
    )
    nbformat.write(book, out / "03_evaluate.ipynb")
    entry = {"state": "failed", "seconds": 190, "error": HOSTILE, "parameters": {"run": HOSTILE, "out": "x"}}
    state = {
        "asked": HOSTILE,
        "preset": HOSTILE,
        "why": HOSTILE,
        "started": HOSTILE,
        "notebooks": {"03_evaluate": entry},
    }
    (out / "run.json").write_text(json.dumps(state))

    index = write_index(out).read_text()
    for shown in (
        "0.9331",
        "0.9244 to 0.9418",
        "macro F1",
        "TF-IDF",
        "362.0 MiB",
        "7:40",
        "4,404,224",
        "failed after 3:10",
    ):
        assert shown in index, shown
    assert index.count("data:image/png;base64,") == 1
    read = (out / "03_evaluate.html").read_text()
    assert "Title" in read
    for text in (index, read):
        # No tag but the page's own, and no attribute that runs anything.
        tags = re.findall(r"<[^>]*>", text)
        assert not [tag for tag in tags if re.match(r"<\s*(script|iframe|object)|<img src=x", tag) or "onerror" in tag]
        assert "default-src 'none'" in text and 'name="viewport"' in text
        assert "http://" not in text and "https://" not in text
    assert "alert(3)" not in read
