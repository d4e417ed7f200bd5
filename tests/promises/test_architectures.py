"""Every family of models through all that the kit does with one; the record of it is results/architectures.json."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from qlora_kit import schemas
from qlora_kit.system.parsing import read_json

sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    import architectures
finally:
    sys.path.remove(str(ROOT / "benchmarks"))

# The others take longer than a change can wait for.
QUICK = ("falcon", "mixtral", "squeezebert", "t5")
FAMILIES = [
    pytest.param(name, marks=[] if name in QUICK else [pytest.mark.long], id=name) for name in architectures.FAMILIES
]


@pytest.fixture(scope="module")
def elsewhere():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))  # new processes look for what they do there
        with architectures.new_processes() as run:
            yield run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return architectures.make_data(tmp_path_factory.mktemp("data") / "data.csv")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_goes_through_every_step_or_is_refused_before_anything_is_written(name, data, elsewhere, tmp_path):
    rows = architectures.passage(name, tmp_path, data, elsewhere)
    assert [row["step"] for row in rows] == list(architectures.STEPS)
    states = {row["step"]: row["state"] for row in rows}
    assert "fails" not in states.values(), [row for row in rows if row["state"] == "fails"]
    refused = architectures.FAMILIES[name].refused
    assert states == {step: "refused" if step in refused else "works" for step in states}, rows
    assert all(row["reason"] and "\n" not in row["reason"] for row in rows if row["state"] == "refused")


def test_a_wrong_result_is_a_step_that_fails(data, elsewhere, tmp_path, monkeypatch):
    passage = architectures.Passage

    def wrong(self: Any) -> None:
        raise architectures.Wrong("logits alone and in company are 0.1 apart")

    def unexpected(self: Any) -> None:
        raise TypeError("not callable")

    monkeypatch.setattr(passage, "predict", wrong)
    monkeypatch.setattr(passage, "merge", unexpected)
    monkeypatch.setattr(architectures, "STEPS", ("plan", "predict", "merge"))
    rows = architectures.passage("bert", tmp_path, data, elsewhere)
    assert [(row["state"], row["reason"]) for row in rows] == [
        ("works", None),
        ("fails", "Wrong: logits alone and in company are 0.1 apart"),
        ("fails", "TypeError: not callable"),
    ]


def test_rows_of_other_families_and_devices_stay(tmp_path):
    sha = "ab" * 20
    environment = {
        "device": "a CPU", "cpu": "a CPU", "threads": 1, "versions": {"python": "3.11"}, "commit": sha,
        "checksums": {"data": None, "base": None},
    }  # fmt: skip
    provenance = architectures.recording.Provenance(sha, False)

    def row(family: str, device: str, state: str, reason: str | None = None) -> dict[str, Any]:
        return {
            "model_type": family, "family": family, "task": "single_label", "step": "train", "state": state,
            "reason": reason, "device": device, "environment": environment, "commit": sha,
        }  # fmt: skip

    out = tmp_path / "results" / "architectures.json"
    out.parent.mkdir()

    def write(command: str, *rows: dict[str, Any]) -> None:
        architectures.write(out, list(rows), provenance, command, list(rows), True)

    write("first", row("t5", "a CPU", "works"), row("bert", "a GPU", "works"))
    write("second", row("t5", "a CPU", "refused", "an encoder-decoder"), row("bert", "a CPU", "works"))
    rows = read_json(out)["rows"]
    assert [(row["family"], row["device"], row["state"], row["command"]) for row in rows] == [
        ("bert", "a CPU", "works", "second"),
        ("bert", "a GPU", "works", "first"),
        ("t5", "a CPU", "refused", "second"),
    ]
    assert schemas.check([out]) == ([out], [])
    write("third", row("bert", "a CPU", "fails", "TypeError"))
    assert "'fails' is not one of" in schemas.check([out])[1][0]
