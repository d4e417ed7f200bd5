"""Runs a benchmark's rows as processes of their own, several at once, and keeps what is finished."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


def run_all(
    commands: Mapping[str, Sequence[str]], logs: Path, at_once: int, deadline: float = float("inf")
) -> list[str]:
    """Run commands, `at_once` at a time, each with a log of its own.

    Args:
        commands: By name, which is also the log's.
        logs: Folder of the logs.
        at_once: Processes at a time.
        deadline: None is begun after this moment of `time.monotonic()`; those that run are waited for.

    Returns:
        The names of those that failed; what was wrong stands at the end of their logs, and is printed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    todo, running, failed, started = list(commands), {}, [], time.monotonic()
    while todo or running:
        if todo and time.monotonic() > deadline:
            print(f"out of time: {len(todo)} not begun", flush=True)
            todo.clear()
        while todo and len(running) < at_once:
            name = todo.pop(0)
            with open(logs / f"{name}.log", "wb") as stream:
                running[subprocess.Popen(commands[name], stdout=stream, stderr=subprocess.STDOUT)] = name
        time.sleep(0.2)
        for process in [process for process in running if process.poll() is not None]:
            name = running.pop(process)
            word = "done" if process.returncode == 0 else "FAILED"
            print(f"[{time.monotonic() - started:6.0f} s] {word}: {name}; {len(todo) + len(running)} to go", flush=True)
            if process.returncode:
                failed.append(name)
                print("\n".join((logs / f"{name}.log").read_text(errors="replace").splitlines()[-5:]), file=sys.stderr)
    return failed
