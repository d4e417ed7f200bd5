"""Run a benchmark's rows in separate processes, several at once."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def run_all(
    commands: Mapping[str, Sequence[str]], logs: Path, at_once: int, deadline: float = float("inf")
) -> list[str]:
    """Run commands, `at_once` at a time, each with its own log.

    Args:
        commands: Commands by name; the log has the same name.
        logs: Folder of the logs.
        at_once: Number of processes at a time.
        deadline: No command is started after this time of `time.monotonic()`; running ones are waited for.

    Returns:
        The names of the failed commands; the ends of their logs are printed.
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


class Worker:
    """A process that does a part of its work on command, and reports it as a line of JSON.

    Contenders that take turns this way are equally affected by other load on the machine.

    Args:
        command: The command that starts it. It reads words from its standard input and writes reports to its standard
            output; a report with the key `problem` says that it cannot go on.
    """

    def __init__(self, command: Sequence[str]) -> None:
        quiet = {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.problem: str | None = None
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | quiet
        )
        self.born = time.monotonic()
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def ask(self, word: str) -> dict[str, Any]:
        """Send a word and return the next report; {} if the process has ended."""
        self.tell(word)
        return self.hear()

    def tell(self, word: str) -> None:
        """Send a word."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{word}\n")
            self._process.stdin.flush()

    def hear(self, deadline: float | None = None) -> dict[str, Any]:
        """Return the next report; {} if the process has ended, or is late and is therefore killed.

        Args:
            deadline: Wait until this time of `time.monotonic()`; None waits without limit.
        """
        while True:
            try:
                line = self._lines.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self.problem = f"not ready after {time.monotonic() - self.born:.0f} s"
                self.stop()
                return {}
            if line is None:
                self.problem = self.problem or f"ended with code {self._process.wait()}"
                return {}
            if line.startswith("{"):
                report: dict[str, Any] = json.loads(line)
                self.problem = report.get("problem")
                return report

    def stop(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()
