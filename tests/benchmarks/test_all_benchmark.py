"""benchmarks/all.py: every command exists, and a call goes on with what is not there yet."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from qlora_kit.system.parsing import read_json

sys.path.insert(0, str(ROOT / "benchmarks"))
import all as everything
from common import recording
from contenders import CONTENDERS

PIECES = [(device, piece) for device, pieces in everything.PIECES.items() for piece in pieces]
SHA = "ab" * 20
NOT_YET = ("paging", "merging")  # records that are still to be made


@pytest.mark.parametrize(("device", "piece"), PIECES, ids=lambda value: getattr(value, "name", value))
def test_a_command_has_a_script_that_knows_its_options_and_a_record(device: str, piece: Any):
    script = (ROOT / "benchmarks" / piece.script).read_text()
    options = re.findall(r"--[a-z0-9-]+", piece.arguments) + ["--out"] + (["--seconds"] if piece.stops else [])
    shared = (ROOT / "benchmarks" / "common" / "recording.py").read_text()
    for option in options:
        assert f'"{option}"' in script or (f'"{option}"' in shared and "recording.add_options(" in script), option
    if piece.script == "speed.py" and "--contenders" in piece.arguments:
        named = piece.arguments.partition("--contenders ")[2].partition(" --")[0].split()
        assert {name.removeprefix("lora/") for name in named} <= set(CONTENDERS)
    assert piece.before is None or piece.before in [other.name for _, other in PIECES]
    assert (ROOT / "results" / f"{piece.record}.json").is_file() or piece.record in NOT_YET


def test_every_record_is_made_by_a_command():
    made = {piece.record for _, piece in PIECES}
    shipped = {file.stem for file in (ROOT / "results").glob("*.json")}
    # These two are written beside another: what --tune tried, and races with more than the usual contenders.
    assert shipped - {"tuning", "speed_variants"} <= made
    names = [piece.name for piece in everything.PIECES["cuda"]]
    assert len(set(names)) == len(names)


def test_a_piece_is_through_when_all_rows_are_there_of_the_same_code(tmp_path: Path):
    piece = everything.Piece("soak", "soak", "soak.py", "--padding max_length", 100)
    by = recording.Provenance(SHA, False)

    def row(device: str, padding: str) -> dict[str, Any]:
        return by.stamped({"device": device, "padding": padding}, {"device": device})

    def write(rows: list[dict[str, Any]], makes: list[dict[str, Any]]) -> dict[str, Any]:
        return recording.write(
            tmp_path / "soak.json", rows, provenance=by, command=piece.command, makes=makes,
            key=("device", "padding"), append=True,
        )  # fmt: skip

    assert not everything.through(piece, everything.record_of(piece, tmp_path), "cpu")
    both = [row("a CPU, 2 cores", "a"), row("a CPU, 2 cores", "b")]
    part = write(both[:1], both)
    assert not everything.through(piece, part, "cpu") and everything.seconds_of(piece, tmp_path, "cpu")[1] == "roughly"
    whole = write(both, both)
    assert everything.through(piece, whole, "cpu", SHA) and not everything.through(piece, whole, "cpu", "cd" * 20)
    # The same command on a GPU is another piece of work.
    assert not everything.through(piece, whole, "cuda", SHA)
    assert everything.seconds_of(piece, tmp_path, "cpu")[1] == "recorded"
    gpu = [row("a GPU", "a")]
    assert everything.through(piece, write(gpu, gpu), "cuda", SHA)
    assert everything.through(piece, read_json(tmp_path / "soak.json"), "cpu", SHA)


def test_what_is_only_prepared_is_not_prepared_again(tmp_path: Path):
    race = everything.Piece("race", "soak", "soak.py", "", 100)
    first = everything.Piece("race-prepare", "soak", "soak.py", "--caches off", 100, before="race")
    both = [first, race]
    assert not everything.done_already(first, both, tmp_path, "cpu", SHA)
    everything.stamp_of(first, tmp_path).write_text(SHA)
    assert everything.done_already(first, both, tmp_path, "cpu", SHA)
    assert not everything.done_already(first, both, tmp_path, "cpu", "cd" * 20)
    assert not everything.done_already(race, both, tmp_path, "cpu", SHA)


def test_the_list_says_what_is_to_do_and_a_wrong_name_is_told():
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        script = [sys.executable, str(ROOT / "benchmarks" / "all.py"), *arguments]
        return subprocess.run(script, cwd=ROOT, capture_output=True, text=True)

    listed = run("--device", "cuda", "--only", "memory", "t4", "--list")
    assert listed.returncode == 0
    (memory, t4, total) = listed.stdout.splitlines()
    assert memory.startswith("memory ") and memory.endswith("python benchmarks/memory.py")
    assert t4.endswith("python benchmarks/t4.py --recipe-steps 60") and total.endswith("s to go")
    wrong = run("--device", "cpu", "--only", "memori")
    assert wrong.returncode == 2 and "Did you mean 'memory'?" in wrong.stderr
