"""Run one notebook in a kernel of the current Python, and stop it at a signal."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import signal
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import KitError, NotebookFailed, NotebookRefused, Terminated
from .finding import PACKAGE, source_of
from .screen import Screen, duration


def run_notebook(source: Path, target: Path, parameters: Mapping[str, Any], screen: Screen, start: float) -> None:
    """Run one notebook with papermill in a new kernel of the current Python.

    Args:
        source: The notebook.
        target: Where the notebook is written, as far as it was executed.
        parameters: Values by name.
        screen: Where progress is printed.
        start: When it was started, by `time.monotonic`.

    Raises:
        NotebookFailed: When a cell fails, or the kernel was killed from outside; `NotebookRefused` for a cell's
            `KitError`.
        KeyboardInterrupt: On SIGINT; on SIGTERM and SIGHUP it is `Terminated`.
    """
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    names = _cell_names(nbformat.read(source, as_version=4)["cells"])
    begun = _Begun(start)

    def cell_started(cell: Any, cell_index: int) -> None:
        stop.raise_if_told()
        stop.in_cells = True
        # papermill adds its own cell after the parameters; do not count it.
        if "injected-parameters" in cell["metadata"].get("tags", ()):
            return
        begun.cells += 1
        begun.title = f"cell {begun.cells}/{len(names)}"
        begun.start = time.monotonic()
        screen.line(f"    {begun.title}  {names[begun.cells - 1]}  (after {duration(begun.start - start)})")

    screen.status = lambda: (
        f"    {source.stem}  {begun.title}  {duration(time.monotonic() - begun.start)}"
        f"  (in all {duration(time.monotonic() - start)})"
    )
    with (
        screen.counting(),
        tempfile.TemporaryDirectory(prefix="qlora_kit_") as scratch,
        _quiet_papermill(),
        _Stop() as stop,
    ):
        try:
            papermill.execute_notebook(
                source,
                target,
                parameters=dict(parameters),
                progress_bar=False,
                stdout_file=screen,
                autosave_cell_every=10,
                kernel_name="python3",
                start_timeout=300,
                kernel_manager_class=_own_python(scratch, stop),
                on_cell_execute=cell_started,
                # Keeps only the last state of a progress bar.
                coalesce_streams=True,
            )
        except Exception as error:
            stop.raise_if_told()
            if isinstance(error, PapermillExecutionError):
                if error.ename == KitError.__name__:
                    said = " ".join(str(error.evalue).split())
                    raise NotebookRefused(f"{source.stem}, {begun.title}: {said}") from error
                raise NotebookFailed(_failure(error, begun.title)) from error
            if isinstance(error, DeadKernelError):
                raise NotebookFailed(
                    f"{begun.title}: the process of {source.stem} was ended from outside (out of memory is the usual "
                    "reason: a smaller batch_size or another preset takes less)"
                ) from error
            raise
        stop.raise_if_told()


class _Stop:
    """Handle SIGINT, SIGTERM and SIGHUP while a notebook runs: stop the kernel instead of this process.

    An exception raised by a signal could end papermill's event loop anywhere: it would report a dead kernel, and leave
    tasks that each print a traceback. So the running cell is interrupted, papermill ends as it does after any error in
    a cell, and only then is the signal's exception raised. A kernel that does not react, or has not started yet, is
    killed; a second signal kills it, too.
    """

    GRACE = 20.0  # seconds for a cell to end: a training saves what it has

    def __init__(self) -> None:
        self.kernel: int | None = None  # its process id
        self.in_cells = False
        self._told: int | None = None
        self._before: dict[int, Any] = {}
        self._timer = threading.Timer(self.GRACE, self._signal_kernel, [signal.SIGKILL])

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
                # An ignored signal (nohup) stays ignored.
                if number not in self._before and signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: object) -> None:
        first, self._told = self._told is None, number
        # The kernel's end is expected now: keep papermill from logging it.
        logging.getLogger("papermill").setLevel(logging.CRITICAL)
        if first and self.in_cells:
            self._timer.start()
            self._signal_kernel(signal.SIGINT)
        else:
            self._signal_kernel(signal.SIGKILL)

    def _signal_kernel(self, number: int) -> None:
        if self.kernel is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.kernel, number)

    def kernel_started(self, pid: int) -> None:
        """Note the kernel's process id, and kill the kernel at once if a signal has already come."""
        self.kernel = pid
        if self._told is not None:
            self._signal_kernel(signal.SIGKILL)
        self.raise_if_told()

    def raise_if_told(self) -> None:
        """Raise the exception of the signal, if one has come."""
        if self._told == signal.SIGINT:
            raise KeyboardInterrupt
        if self._told is not None:
            raise Terminated(self._told)


@dataclasses.dataclass
class _Begun:
    """The cell that started last: its start time, its number among the code cells, and its title on the screen."""

    start: float
    cells: int = 0
    title: str = "the kernel's start"


def _cell_names(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the code cells' names: the first line if it is a comment, else the heading above, else the first line."""
    names, heading = [], ""
    for cell in cells:
        source = source_of(cell)
        if cell["cell_type"] == "markdown":
            found = re.findall(r"^#+ +(.+)$", source, flags=re.MULTILINE)
            heading = found[-1].strip() if found else heading
        elif cell["cell_type"] == "code" and source.strip():
            first = source.strip().splitlines()[0]
            comment = first.lstrip("# ").removeprefix("@title ").strip()  # Colab shows `@title` as a form's title
            names.append(comment if first.startswith("#") else heading or first)
    return names


def _failure(error: Any, title: str) -> str:
    """Return the failing cell and its error, the error last."""
    source = "\n".join(f"    {line}" for line in error.source.strip().splitlines())
    trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).strip()
    last = f"{error.ename}: {error.evalue}".strip().rstrip(":")
    if not trace.endswith(last):
        trace = f"{trace}\n{last}"
    return f"{title}:\n{source}\n\n{trace}".strip()


@contextlib.contextmanager
def _quiet_papermill() -> Iterator[None]:
    """Hide papermill's log lines, because the screen says the same in fewer words; let its warnings through."""
    logger = logging.getLogger("papermill")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


# An ending kernel sometimes flushes its stderr after its sockets are closed. tornado then logs a traceback in the
# terminal (ipykernel 7.1, kernelbase.process_control), which has nothing to do with the notebook.
_KERNEL = (
    "import logging, runpy; logging.getLogger('tornado.general').setLevel(logging.CRITICAL); "
    "runpy.run_module('ipykernel_launcher', run_name='__main__', alter_sys=True)"
)


def _own_python(scratch: str, stop: _Stop) -> type:
    """Return a kernel manager class whose kernels run the current Python with the current package.

    Jupyter would look for an installed kernelspec named python3, which may belong to another Python. This way nothing
    has to be installed, least of all in the user's home. The kernel inherits the environment (HF_HUB_OFFLINE and the
    like). The user's own IPython start-up files are left out, because they could change the result.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    env = {"IPYTHONDIR": scratch, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    parent = str(PACKAGE.parent)
    if parent not in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        # So that a clone that is not installed works, too.
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [parent, os.environ.get("PYTHONPATH")]))
    spec = KernelSpec(
        argv=[sys.executable, "-c", _KERNEL, "-f", "{connection_file}", "--log-level=50"],
        display_name="Python 3",
        language="python",
        env=env,
    )

    # Use sockets in a private folder instead of open ports, if the system has them and the path is not too long.
    sockets = {"transport": "ipc", "ip": f"{scratch}/kernel"} if os.name == "posix" and len(scratch) < 80 else {}

    class OwnPython(AsyncKernelManager):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs, **sockets)

        @property
        def kernel_spec(self) -> KernelSpec:
            return spec

        async def start_kernel(self, **kwargs: Any) -> None:  # type: ignore[override]  # as the class above has it
            await super().start_kernel(**kwargs)
            provisioner: Any = self.provisioner
            stop.kernel_started(provisioner.pid)

    return OwnPython
