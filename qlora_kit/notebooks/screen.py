"""Show progress on the terminal while notebooks run."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import TextIO


def duration(seconds: float) -> str:
    """Return a time as people write it: `7 s`, `3:07`, `1:02:07`."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


spoken = duration  # its name in notebooks of version 0.1.0


class Screen:
    """Lines of progress; on a terminal also one last line that counts the seconds."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.live = stream.isatty()
        self.lock = threading.Lock()
        self.status: Callable[[], str] | None = None
        self.open_line = False

    def line(self, text: str = "") -> None:
        """Print a line above the one that counts seconds."""
        with self.lock:
            self._clear()
            print(text, file=self.stream, flush=True)

    def write(self, text: str) -> None:
        """Print a cell's output line by line, indented (papermill's stdout_file needs this method)."""
        lines = text.split("\n")
        if not lines[-1]:
            lines.pop()
        for line in lines:
            # A progress bar redraws its line: show only the last state.
            shown = line.rstrip("\r").rpartition("\r")[2].rstrip()
            if shown:
                self.line(f"      {shown}")

    def flush(self) -> None:
        """Flush the stream (papermill's stdout_file needs this method, too)."""
        self.stream.flush()

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Redraw the last line every second while the block runs, on a terminal."""
        if not self.live:
            yield
            return
        stop = threading.Event()

        def redraw() -> None:
            while not stop.wait(1.0):
                with self.lock:
                    if self.status is not None:
                        width = shutil.get_terminal_size().columns - 1
                        self._clear()
                        self.stream.write(self.status()[:width])
                        self.stream.flush()
                        self.open_line = True

        thread = threading.Thread(target=redraw, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            with self.lock:
                self._clear()
                self.status = None

    def _clear(self) -> None:
        if self.open_line:
            self.stream.write("\r\033[K")
            self.open_line = False
