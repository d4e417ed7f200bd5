"""Time training while the machine has other work, by how threads wait for each other: results/waiting.json.

    python benchmarks/waiting.py --append
    python benchmarks/waiting.py --repeats 2 --steps 5 --out runs/waiting.json

The preset `minilm_banking77_qlora` on this machine's CPU, with all its cores, in four ways. `spinning` is what
OpenMP's runtime does by itself: a thread without work asks for some time whether there is more, and its core is busy
meanwhile. `briefly` is what the kit sets (`qlora_kit.system.waiting`): it asks for a moment and then sleeps. `asleep`
sleeps at once. `one_thread` has nobody to wait for. Beside them run processes that loop without end, `--beside` says
how many: by default none, one for every other core, and one for each core.

A way is a process that stays; the ways take turns, and each turn times some steps, fewer where the time for a turn ends
first. `step_seconds` is the median over the turns of a turn's mean, for some steps of a turn are short and others wait
long; `turns` has each turn's steps and seconds. A row a device, way and number of processes beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from common import recording
from common.processes import Worker
from common.refusals import told_in_a_line

from qlora_kit.system.waiting import SETTINGS, SPINS

PRESET = "minilm_banking77_qlora"
WAYS = ("spinning", "briefly", "asleep", "one_thread")
KEY = ("device", "way", "beside")
WARM = 3  # steps before the first turn
TURN = 30.0  # seconds after which a turn ends with the step that runs


@told_in_a_line
def main() -> int:
    """Time the ways in turns and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps a turn (20)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way beside each load (5)")
    parser.add_argument("--beside", type=int, nargs="+", default=loads(), help="processes beside, one load each")
    parser.add_argument("--out", default="results/waiting.json")
    recording.add_options(parser)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        train(options.one)
        return 0
    for name in ("steps", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    if min(options.beside) < 0:
        parser.error("--beside takes whole numbers from 0 on")
    provenance = recording.begin(options)
    ready, turns = race(options.steps, options.repeats, sorted(set(options.beside)))
    rows = [
        provenance.stamped(row_of(ready[way], way, beside, turns[way, beside]), ready[way]["environment"])
        for way, beside in turns
    ]
    recording.write(
        options.out,
        rows,
        provenance=provenance,
        command=recording.command_line("waiting.py"),
        makes=[{name: row[name] for name in KEY} for row in rows],
        key=KEY,
        append=options.append,
    )
    print(f"written: {options.out}")
    return 0


def loads() -> list[int]:
    """Return how many processes run beside the training: none, one for every other core, one for each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({0, max(1, cores // 2), cores})


def race(
    steps: int, repeats: int, loads: list[int]
) -> tuple[dict[str, dict[str, Any]], dict[tuple[str, int], list[dict[str, float]]]]:
    """Let the ways take turns beside each load.

    Args:
        steps: Steps of a turn.
        repeats: Turns of each way beside each load.
        loads: How many processes run beside, for each load.

    Returns:
        By way its `environment` and `batch` size, and by way and load its turns, each with its `steps` and `seconds`.
    """
    workers = {way: Worker([sys.executable, __file__, "--one", way]) for way in WAYS}
    ready: dict[str, dict[str, Any]] = {}
    turns: dict[tuple[str, int], list[dict[str, float]]] = {(way, load): [] for load in loads for way in WAYS}
    try:
        for way, worker in workers.items():
            ready[way] = worker.hear()
            if worker.problem is not None:
                raise SystemExit(f"{way}: {worker.problem}")
        for repeat in range(repeats):
            for load in loads:
                beside = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(load)]
                try:
                    time.sleep(0.5)
                    for way in WAYS if repeat % 2 else reversed(WAYS):
                        turn = workers[way].ask(str(steps))
                        if not turn:
                            raise SystemExit(f"{way}: {workers[way].problem}")
                        turns[way, load].append(turn)
                        each = turn["seconds"] / turn["steps"]
                        print(f"{repeat + 1} of {repeats}, {load} beside, {way}: {each:.3f} s a step", flush=True)
                finally:
                    for process in beside:
                        process.kill()
                        process.wait()
    finally:
        for worker in workers.values():
            worker.stop()
    return ready, turns


def row_of(ready: dict[str, Any], way: str, beside: int, turns: list[dict[str, float]]) -> dict[str, Any]:
    """Return the row of a way beside a load; `ready` is what the way said at its start."""
    each = [turn["seconds"] / turn["steps"] for turn in turns]
    middle = statistics.median(each)
    return {
        "preset": PRESET,
        "device": ready["environment"]["device"],
        "way": way,
        "beside": beside,
        "batch": ready["batch"],
        "step_seconds": middle,
        "step_seconds_range": [min(each), max(each)],
        "samples_per_second": ready["batch"] / middle,
        "repeats": len(turns),
        "turns": turns,
    }


# --- a way --------------------------------------------------------------------------------------------------------


def train(way: str) -> None:
    """Train in turns: for each number of steps on standard input, time so many, and report them.

    Args:
        way: One of `WAYS`.
    """
    for name in (*SETTINGS, "OMP_NUM_THREADS"):
        os.environ.pop(name, None)
    # As the kit would do at its import, which was that of this file: too early, for the shell's own settings counted.
    if way == "briefly":
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    elif way != "spinning":
        os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import qlora_kit as qk
    from qlora_kit import models  # noqa: F401  # imports bitsandbytes with care, before transformers

    # isort: split
    from transformers import TrainerCallback

    from qlora_kit.system.environment import environment

    class Turns(TrainerCallback):
        """Wait for a word before each turn, and time its steps."""

        wanted, seconds, began = 0, list[float](), 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= WARM and (len(self.seconds) >= self.wanted or sum(self.seconds) > TURN):
                report = {"steps": len(self.seconds), "seconds": sum(self.seconds)}
                first = {"environment": environment("cpu"), "batch": args.per_device_train_batch_size}
                print(json.dumps(report if self.seconds else first), flush=True)
                self.wanted, self.seconds = int(sys.stdin.readline() or sys.exit()), []
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step > WARM:
                self.seconds.append(time.perf_counter() - self.began)

    changes = {
        "tracking.wandb": "none",
        "training.max_steps": 100_000,
        "training.threads": 1 if way == "one_thread" else None,
        "model.head_init": "random",
    }
    with tempfile.TemporaryDirectory() as folder:
        qk.finetune(qk.preset(PRESET).override(changes), out=folder, progress=False, callbacks=[Turns()])


if __name__ == "__main__":
    sys.exit(main())
