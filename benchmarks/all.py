r"""Make every record of results/ again, command by command, as far as this machine can.

    python benchmarks/all.py --device cpu --list          # which commands, in which order, and how long each takes
    python benchmarks/all.py --device cpu                 # all of them, into results/; hours on two cores
    python benchmarks/all.py --device cuda --seconds 560 --out runs/made
    python benchmarks/all.py --device cuda --only memory t4 --out runs/made

The same call again goes on where the last one ended: a command is through when its record has all its rows, made with
the code that is here. `--seconds` ends a call in time: a command that can stop and go on gets what is left, and any
other is begun only where it is known to fit. The most telling records come first, so that a session on a rented GPU
that ends early has those.

On a machine without git, export there what `python benchmarks/recording.py` prints here. Copy the records back, and
put them into results/ with `python benchmarks/recording.py merge runs/made/*.json`. Then `python -m qlora_kit check
results` says whether everything is there, and `make figures` brings texts and pictures up to date.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import ROOT, recording
from common.refusals import told_in_a_line

from qlora_kit.errors import unknown
from qlora_kit.system.environment import is_gpu
from qlora_kit.system.files import write_text
from qlora_kit.system.parsing import read_json


@dataclasses.dataclass(frozen=True)
class Piece:
    """One command.

    Args:
        name: Its name for `--only`.
        record: The record that it writes, without `.json`.
        script: File in benchmarks/.
        arguments: Its arguments.
        about: Seconds that it takes, roughly; used if the record has no time.
        stops: Whether it accepts `--seconds` and can be continued.
        least: Seconds that must be left to start it, if it `stops`; with too few, a race drops contenders.
        cores: CPU cores that it may use; None for all.
        before: Name of the piece that this one prepares; it then writes no record itself.
    """

    name: str
    record: str
    script: str
    arguments: str
    about: float
    stops: bool = True
    least: float = 60
    cores: int | None = None
    before: str | None = None

    @property
    def command(self) -> str:
        """The command, as written in the record."""
        return recording.command_line(self.script, self.arguments.split())


RACE = (
    "recipe recipe_fp16_reentrant padded_longest grouped compiled compiled_graphs compiled_graphs_dynamic ours_eager "
    "ours lora/ours"
)


def races() -> list[Piece]:
    """Return the races on a GPU: for each batch size, compile beforehand, then race all contenders in one run."""
    found = []
    for batch in (8, 64, 32):
        prepared = f"--batches {batch} --methods qlora --contenders compiled_graphs --prepare"
        raced = f"--batches {batch} --methods qlora --contenders {RACE} --append"
        race = f"speed-{batch}"
        found += [
            Piece(f"{race}-prepare", "speed", "speed.py", prepared, 580, least=400, before=race),
            Piece(race, "speed", "speed.py", raced, 580, least=500),
        ]
    small = "--models smollm2-135m --methods qlora --contenders padded_longest grouped unsloth ours_eager ours --append"
    return found + [
        Piece(f"speed-smollm2-{batch}", "speed", "speed.py", f"{small} --batches {batch}", 580, least=400)
        for batch in (8, 32)
    ]


PIECES: Mapping[str, list[Piece]] = {
    "cpu": [
        Piece("accuracy", "accuracy", "accuracy.py", "--presets minilm_banking77_qlora --device cpu --append", 2000,
              cores=1),
        Piece("speed-fp32", "speed", "speed.py",
              "--models minilm --batches 32 --methods qlora --precisions fp32 --append", 240),
        Piece("speed-bf16", "speed", "speed.py", "--models minilm --batches 32 --precisions bf16 --append", 420),
        Piece("inference", "inference", "inference.py", "--append", 240, stops=False),
        Piece("export", "export", "export.py", "--append", 600, stops=False),
        Piece("memory", "memory", "memory.py", "--groups cpu", 400),
        Piece("quantization", "quantization", "quantization.py", "", 3000),
        *(
            Piece(f"soak{name}", "soak", "soak.py", words, 300, stops=False)
            for name, words in (("", ""), ("-one-shape", "--padding max_length"), ("-no-caches", "--caches off"))
        ),
        Piece("waiting", "waiting", "waiting.py", "--append", 900, stops=False),
        Piece("merging", "merging", "merging.py", "--epochs 2 --append", 700, stops=False),
        Piece("mutation", "mutation", "mutation.py", "--sample 25 --seed 3", 7200, stops=False),
    ],
    "cuda": [
        *races()[:2],
        Piece("memory", "memory", "memory.py", "", 300),
        Piece("accuracy", "accuracy", "accuracy.py",
              "--tune --seeds 0 1 2 3 4 --jobs 9 --device cuda --no-baseline --rows-only --append", 400),
        Piece("schemes", "schemes", "schemes.py", "--seeds 0 1 2 --device cuda --jobs 9 --append", 150),
        Piece("paging", "paging", "paging.py", "--append", 150, stops=False),
        Piece("t4", "t4", "t4.py", "--recipe-steps 60", 120, stops=False),
        Piece("int4_step", "int4_step", "int4_step.py", "--device cuda --append", 200),
        Piece("inference", "inference", "inference.py", "--append", 150, stops=False),
        Piece("merging", "merging", "merging.py", "--append", 200, stops=False),
        *races()[2:],
        Piece("accuracy-smollm2", "accuracy", "accuracy.py",
              "--presets smollm2-135m_banking77_qlora smollm2-135m_banking77_lora smollm2-135m_banking77_full --tune "
              "--jobs 9 --device cuda --no-baseline --rows-only --append", 1200),
        Piece("speed-fp16", "speed", "speed.py",
              "--models dialogpt-medium --batches 8 --methods qlora --contenders ours_eager ours "
              "--precisions fp32 fp16 --append", 300),
        Piece("soak", "soak", "soak.py", "", 120, stops=False),
        Piece("architectures", "architectures", "architectures.py", "--graphs --append", 600),
    ],
}  # fmt: skip


def entry_of(piece: Piece, record: Mapping[str, Any], device: str) -> dict[str, Any] | None:
    """Return a record's entry for a piece's command on this kind of device, or None."""
    for entry in record.get("commands", []):
        devices = {made.get("device", "") for made in recording.expand(entry["makes"])}
        if entry["command"] == piece.command and any(map(is_gpu, devices)) == (device == "cuda"):
            return dict(entry)
    return None


def record_of(piece: Piece, folder: Path) -> dict[str, Any]:
    """Return a piece's record in a folder; an empty one if it is missing."""
    file = folder / f"{piece.record}.json"
    found: dict[str, Any] = read_json(file) if file.is_file() else {"rows": []}
    return found


def through(piece: Piece, record: Mapping[str, Any], device: str, commit: str | None = None) -> bool:
    """Return whether a record has all rows of a piece's command, made with a commit's code (any code if None)."""
    entry = entry_of(piece, record, device)
    made = [row for row in record["rows"] if row.get("command") == piece.command]
    if commit is not None:
        same = {sha: recording.same_code(sha, commit) or sha == commit for sha in {row["commit"] for row in made}}
        made = [row for row in made if same[row["commit"]]]
    keys = recording.expand(entry["makes"]) if entry else []
    return bool(keys) and all(any(all(row.get(name) == key[name] for name in key) for row in made) for key in keys)


def stamp_of(piece: Piece, folder: Path) -> Path:
    """Return the file with the commit at which a piece that writes no record was completed."""
    return folder / f".{piece.name}"


def done_already(piece: Piece, pieces: list[Piece], folder: Path, device: str, commit: str | None) -> bool:
    """Return whether a piece need not be run: it is complete, or the piece that it prepares is."""
    if piece.before is None:
        return through(piece, record_of(piece, folder), device, commit)
    (prepared,) = [other for other in pieces if other.name == piece.before]
    stamp = stamp_of(piece, folder)
    return done_already(prepared, pieces, folder, device, commit) or (
        stamp.is_file() and stamp.read_text() == str(commit)
    )


def seconds_of(piece: Piece, folder: Path, device: str) -> tuple[float, str]:
    """Return how long a piece takes, and whether that is recorded or a guess."""
    for record in (record_of(piece, folder), record_of(piece, ROOT / "results")):
        entry = entry_of(piece, record, device)
        if entry is not None and "seconds" in entry and through(piece, record, device):
            return entry["seconds"], "recorded"
    return piece.about, "roughly"


def call(piece: Piece, options: argparse.Namespace, left: float) -> int:
    """Run a piece; return its exit code."""
    command = [sys.executable, str(ROOT / "benchmarks" / piece.script), *piece.arguments.split()]
    command += ["--out", str(Path(options.out) / f"{piece.record}.json")]
    if piece.record == "accuracy":
        command += ["--tuning", str(Path(options.out) / "tuning.json")] if "--tune" in command else []
    if piece.stops and left < float("inf"):
        command += ["--seconds", f"{left:.0f}"]
    if options.from_changes:
        command += ["--from-changes"]

    def few_cores() -> None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: piece.cores])

    pinned = few_cores if piece.cores and hasattr(os, "sched_setaffinity") else None
    return subprocess.run(command, cwd=ROOT, preexec_fn=pinned).returncode


@told_in_a_line
def main() -> int:
    """Run the missing pieces."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=PIECES, required=True)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these alone, by the names of --list")
    parser.add_argument("--list", action="store_true", help="say what there is to do, and do nothing")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end by then")
    parser.add_argument("--out", default=str(ROOT / "results"), help="folder of the records (results)")
    recording.add_options(parser, append=False)
    options = parser.parse_args()
    began, folder, pieces = time.monotonic(), Path(options.out), PIECES[options.device]
    for name in options.only:
        if name not in [piece.name for piece in pieces]:
            raise unknown("piece", name, [piece.name for piece in pieces])
    commit = recording.commit() if options.list else recording.begin(options).commit
    wanted = [piece for piece in pieces if not options.only or piece.name in options.only]
    done = {piece.name: done_already(piece, pieces, folder, options.device, commit) for piece in wanted}
    total = 0.0
    for piece in wanted:
        seconds, who = seconds_of(piece, folder, options.device)
        state = "through" if done[piece.name] else f"{seconds:.0f} s ({who})"
        total += 0 if done[piece.name] else seconds
        print(f"{piece.name:20} {state:20} {piece.command}", flush=True)
    print(f"{total:.0f} s to go", flush=True)
    if options.list:
        return 0
    failed, waiting = [], []
    for piece in wanted:
        if done[piece.name]:
            continue
        left = options.seconds - (time.monotonic() - began)
        seconds, _ = seconds_of(piece, folder, options.device)
        if left < (piece.least if piece.stops else seconds):
            waiting.append(piece.name)
            continue
        print(f"--- {piece.name}: {piece.command}", flush=True)
        code = call(piece, options, left)
        if piece.before is not None:
            if code == 0:
                write_text(stamp_of(piece, folder), str(commit))
            else:
                waiting.append(piece.name)
        elif not through(piece, record_of(piece, folder), options.device, commit):
            (waiting if code in (0, 1) and piece.stops else failed).append(piece.name)
    for word, names in (("not through yet", waiting), ("failed", failed)):
        if names:
            print(f"{word}: {', '.join(names)}", file=sys.stderr)
    return 1 if failed or waiting else 0


if __name__ == "__main__":
    sys.exit(main())
