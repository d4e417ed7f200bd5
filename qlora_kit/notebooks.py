"""Runs the notebooks in order with papermill: parameters checked first, a run that was cut off picked up again.

    OUT/
      index.html            everything below on one page
      run.json              what was run with which parameters and code, and how far it came
      02_finetune.ipynb     executed; kept as far as it came if it fails
      02_finetune.json      its record, written by the notebook
      02_finetune/*.png     its figures
      runs/NAME/            run folders

papermill alone only warns about a parameter that a notebook does not have and runs the defaults; here an unknown
one is refused, with the nearest that exists, before anything runs.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml

from .errors import KitError, nearest, unknown
from .experiment import Experiment, resolve_preset
from .experiment import preset as load_preset
from .records import (
    SCHEMA,
    Run,
    load_run,
    locked,
    move_aside,
    newest_run,
    plain,
    read_json,
    refuse_ways_out,
    saving,
    write_json,
)

PACKAGE = Path(__file__).resolve().parent
STATE = "run.json"
# What may lie in OUT before anything was run there.
_NOT_CONTENT = {".lock"}
_NAME = re.compile(r"\d\d_\w+")


class NotebookFailed(RuntimeError):
    """A notebook stopped. The message ends with the failing cell's error."""


# --- what there is to run ---------------------------------------------------------------------------------------


def notebook_folder() -> Path:
    """Return the folder of the notebooks: the packaged copy of an installed package, or the clone's `notebooks`.

    Raises:
        KitError: When there is neither.
    """
    for folder in (PACKAGE / "_notebooks", PACKAGE.parent / "notebooks"):
        if folder.is_dir():
            return folder
    raise KitError("the notebooks are not installed with this package; run from a clone, or name their folder")


def list_notebooks(folder: str | Path | None = None) -> dict[str, Path]:
    """Return the notebooks of a folder by name, e.g. `02_finetune`, in the order in which they run.

    Raises:
        KitError: When the folder holds none.
    """
    folder = Path(folder) if folder is not None else notebook_folder()
    found = {path.stem: path for path in sorted(folder.glob("*.ipynb")) if _NAME.fullmatch(path.stem)}
    if not found:
        raise KitError(f"there is no notebook in {str(folder)!r}: their names are like 02_finetune.ipynb")
    return found


def choose(wanted: str | Iterable[str] | None, available: Mapping[str, Path]) -> dict[str, Path]:
    """Pick notebooks by name or number.

    Args:
        wanted: Names (`02_finetune`) or numbers (`02`), as a list or in one text; empty or None for all.
        available: What `list_notebooks` returned.

    Returns:
        The picked notebooks, in the order in which they run.

    Raises:
        KitError: For one that does not exist, with the nearest that does.
    """
    names = wanted.replace(",", " ").split() if isinstance(wanted, str) else list(wanted or ())
    picked = {_find_notebook(name, available) for name in names}
    return {name: path for name, path in available.items() if name in picked or not names}


def _find_notebook(name: str, available: Mapping[str, Path]) -> str:
    stem = name.removesuffix(".ipynb")
    for candidate in available:
        if stem == candidate or (stem.isdigit() and candidate.split("_")[0] == stem.zfill(2)):
            return candidate
    raise unknown("notebook", name, available)


def notebook_parameters(path: str | Path) -> dict[str, Any]:
    """Read a notebook's parameters and their defaults from its cell tagged `parameters`.

    Args:
        path: The notebook.

    Returns:
        Default by name; empty where the notebook has no such cell.

    Raises:
        KitError: When the file is no notebook, or a default is not a plain value.
    """
    try:
        cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
        sources = [_source(cell) for cell in cells if "parameters" in cell["metadata"].get("tags", ())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KitError(f"{path} is no Jupyter notebook: {error}") from error
    values: dict[str, Any] = {}
    for source in sources[:1]:
        for node in ast.parse(source).body:
            target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
            if isinstance(node, ast.AnnAssign):
                target = node.target
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value and isinstance(target, ast.Name):
                try:
                    values[target.id] = ast.literal_eval(node.value)
                except ValueError as error:
                    raise KitError(f"{path}: the default of {target.id} is not a plain value") from error
    return values


def _source(cell: Mapping[str, Any]) -> str:
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


# --- parameters: refused before anything runs -------------------------------------------------------------------


def split_params(text: str | Iterable[str]) -> dict[str, str]:
    """Read `name=value 04_memory.batch=4` into a mapping; a value with spaces wants quotes.

    Raises:
        KitError: For a piece that has no `=`, or a name that is given twice.
    """
    pieces: list[str] = []
    for part in [text] if isinstance(text, str) else text:
        try:
            pieces += shlex.split(part)
        except ValueError as error:
            raise KitError(f"the parameters {part!r} have an open quote: {error}") from error
    values: dict[str, str] = {}
    for piece in pieces:
        name, equals, value = piece.partition("=")
        if not equals or not name:
            raise KitError(f"{piece!r} is no parameter: write name=value, or 04_memory.name=value for one notebook")
        if name in values:
            raise KitError(f"the parameter {name!r} is given twice")
        values[name] = value
    return values


def assign_params(
    params: Mapping[str, Any], chosen: Mapping[str, Path], available: Mapping[str, Path] | None = None
) -> dict[str, dict[str, Any]]:
    """Give every parameter to the notebooks it is meant for.

    Args:
        params: Values by `name` (for every notebook that has it) or `NOTEBOOK.name`. Texts are read as YAML
            scalars, and as the default's type where the notebook's default is a text.
        chosen: The notebooks that are to run.
        available: All notebooks, to say where a name would have been known; None for `chosen`.

    Returns:
        Values by notebook and name.

    Raises:
        KitError: For a name that no notebook to be run has, a notebook that is not to be run, or a value of
            another type than the default.
    """
    available = available or chosen
    defaults = {name: notebook_parameters(path) for name, path in chosen.items()}
    everywhere = sorted({name for known in defaults.values() for name in known})
    values: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    # Those for one notebook last: they go before the general ones.
    for key, value in sorted(params.items(), key=lambda item: "." in item[0]):
        prefix, dot, name = key.rpartition(".")
        if dot:
            notebook = _find_notebook(prefix, available)
            if notebook not in chosen:
                raise KitError(f"{key} is for {notebook}, which is not to be run: {', '.join(chosen)}")
            if name not in defaults[notebook]:
                raise _unknown_parameter(name, f" in {notebook}", defaults[notebook])
            takers = [notebook]
        else:
            takers = [notebook for notebook in chosen if name in defaults[notebook]]
            if not takers:
                elsewhere = [other for other in available if other not in chosen and _has(available[other], name)]
                hint = f" ({', '.join(elsewhere)} has it, but is not to be run)" if elsewhere else ""
                raise _unknown_parameter(name, hint, everywhere)
        if name in ("preset", "out"):
            raise KitError(f"{name} is no parameter of one notebook: give {name.upper()}=... (--{name}) for all")
        for notebook in takers:
            values[notebook][name] = _convert(key, value, defaults[notebook][name])
    return values


def _has(path: Path, name: str) -> bool:
    with contextlib.suppress(KitError):
        return name in notebook_parameters(path)
    return False


def _unknown_parameter(name: str, where: str, allowed: Iterable[str]) -> KitError:
    names = [candidate for candidate in allowed if candidate not in ("preset", "out")]
    guess = nearest(name, names)
    hint = f" Did you mean {guess!r}?" if guess else ""
    return KitError(f"there is no parameter {name!r}{where}.{hint} Allowed: {', '.join(names)}.")


def _convert(key: str, value: Any, default: Any) -> Any:
    """Return a value as the default's type has it, or raise KitError."""
    parsed = value
    # A text parameter takes the text as it stands (`wandb=off` is no false); of a quoted one, what is in the quotes.
    quoted = isinstance(value, str) and re.fullmatch(r"""'[^']*'|"[^"]*\"""", value.strip())
    if isinstance(value, str) and (quoted or not isinstance(default, str)):
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise KitError(f"{key}={value!r} is no YAML scalar: {' '.join(str(error).split())}") from error
    if isinstance(default, bool):
        if isinstance(parsed, bool):
            return parsed
        raise KitError(f"{key} is {value!r}: allowed is true or false")
    if isinstance(default, int):
        if isinstance(parsed, float) and parsed.is_integer():
            parsed = int(parsed)
        if isinstance(parsed, int) and not isinstance(parsed, bool):
            return parsed
        raise KitError(f"{key} is {value!r}: allowed is a whole number")
    if isinstance(default, float):
        # YAML 1.1 reads 1e-3 (no dot) as a text.
        with contextlib.suppress(TypeError, ValueError):
            if not isinstance(parsed, bool):
                return float(parsed)
        raise KitError(f"{key} is {value!r}: allowed is a number")
    if isinstance(default, str):
        if isinstance(parsed, str):
            return parsed
        raise KitError(f"{key} is {value!r}: allowed is a text")
    if isinstance(default, (list, tuple)):
        if isinstance(parsed, (list, tuple)):
            return list(parsed)
        raise KitError(f"{key} is {value!r}: allowed is a list, as in {key}='[1, 2]'")
    return plain(parsed)


# --- what identifies a run --------------------------------------------------------------------------------------


def code_hash(path: Path) -> str:
    """Return a SHA-256 over a notebook's source and the package's files: the code that a result comes from."""
    digest = hashlib.sha256(path.read_bytes())
    for file in sorted(PACKAGE.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts and "_notebooks" not in file.parts:
            digest.update(str(file.relative_to(PACKAGE)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is asked for: preset, and per notebook its file, parameters and code."""

    asked: str
    preset: str
    why: str
    experiment: str
    paths: Mapping[str, Path]
    parameters: Mapping[str, Mapping[str, Any]]
    code: Mapping[str, str]


def _difference(state: Mapping[str, Any], plan: _Plan) -> str | None:
    """Say why OUT cannot be gone on with, or return None where it can."""
    if state.get("preset") != plan.preset:
        return f"it ran the preset {state.get('preset')}"
    if state.get("experiment") != plan.experiment:
        return f"the preset {plan.preset} was another then"
    done: Mapping[str, Any] = state.get("notebooks", {})
    for name, entry in done.items():
        if name in plan.paths:
            if entry.get("parameters") != plan.parameters[name]:
                return f"{name} had other parameters"
            if entry.get("code") != plan.code[name]:
                return f"the code of {name} or of the package was another"
    if all(done.get(name, {}).get("state") == "finished" for name in plan.paths):
        return "it was finished"
    return None


# --- what notebooks begin with ----------------------------------------------------------------------------------


def choose_experiment(
    preset: str, *, seed: int = 0, epochs: float = 0, max_steps: int = 0, wandb: str = ""
) -> tuple[Experiment, str]:
    """Turn a notebook's parameters into an experiment.

    Args:
        preset: A preset, the path of an experiment's YAML file, or `auto`.
        seed: Seed of the head, the adapters, the order of rows and dropout.
        epochs: Passes over the training rows; 0 for the preset's own.
        max_steps: Stop after so many steps; 0 for the preset's own.
        wandb: Where it is logged, see `TrackingSpec`; empty for the preset's own.

    Returns:
        The experiment, and one sentence on why it is this one.
    """
    name, why = resolve_preset(preset)
    changes = {"training.epochs": epochs, "training.max_steps": max_steps, "tracking.wandb": wandb}
    return (
        load_preset(name).override({"training.seed": seed, **{key: value for key, value in changes.items() if value}}),
        why,
    )


def open_run(
    preset: str,
    *,
    run: str | Path = "",
    out: str | Path = "runs/latest",
    **changes: Any,
) -> tuple[Run, str]:
    """Find the run that a notebook is about, and train it first where there is none.

    Args:
        preset: Whose run it is, where none is named.
        run: A run folder, or empty for the newest finished one of the preset: below `OUT/runs`, else below `runs`.
        out: The folder OUT; a run that has to be trained goes into `OUT/runs`.
        **changes: As `choose_experiment` takes them, for a run that has to be trained.

    Returns:
        The run, and one sentence on where it comes from.
    """
    if run:
        return load_run(run), f"{run}, as asked for"
    experiment, why = choose_experiment(preset, **changes)
    for root in (Path(out) / "runs", Path("runs")):
        found = newest_run(experiment.name, root)
        if found is not None:
            return load_run(found), f"{found}, the newest finished run of {experiment.name} ({why})"
    from .training import EpochLines, finetune

    trained = finetune(experiment, out=Path(out) / "runs", callbacks=[EpochLines()])
    return trained, f"{trained.path}, trained just now: there was no run of {experiment.name} ({why})"


# --- the screen -------------------------------------------------------------------------------------------------


def spoken(seconds: float) -> str:
    """Return a time as people write it: `7 s`, `3:07`, `1:02:07`."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class _Screen:
    """Lines of progress; on a terminal also one last line that counts the seconds."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.live = stream.isatty()
        self.lock = threading.Lock()
        self.status: Callable[[], str] | None = None
        self.open_line = False

    def line(self, text: str = "") -> None:
        with self.lock:
            self._clear()
            print(text, file=self.stream, flush=True)

    def write(self, text: str) -> None:
        """Take what a cell prints, a line at a time, indented (the interface that papermill's stdout_file wants)."""
        lines = text.split("\n")
        if not lines[-1]:
            lines.pop()
        for line in lines:
            # Of a line drawn over and over, a progress bar, the last state.
            shown = line.rstrip("\r").rpartition("\r")[2].rstrip()
            if shown:
                self.line(f"      {shown}")

    def flush(self) -> None:
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


# --- running ----------------------------------------------------------------------------------------------------


def run_notebooks(
    preset: str = "auto",
    out: str | Path = "runs/latest",
    notebooks: str | Iterable[str] | None = None,
    params: Mapping[str, Any] | str | None = None,
    *,
    folder: str | Path | None = None,
    stream: TextIO | None = None,
) -> Path:
    """Run notebooks in order into one folder.

    Args:
        preset: A preset, the path of an experiment's YAML file, or `auto`.
        out: The folder OUT. One that was cut off is gone on with, from its first unfinished notebook, where
            parameters and code are the same; a finished or different one is renamed to `OUT-DATE` first.
        notebooks: Names or numbers of the notebooks; None for all.
        params: Values by `name` or `NOTEBOOK.name`, as a mapping or in one text (see `split_params`).
        folder: Where the notebooks are; None for the kit's own.
        stream: Where progress is printed; None for standard output.

    Returns:
        The path of `OUT/index.html`.

    Raises:
        KitError: For bad input, before anything has run; or when another run is writing into `out`.
        NotebookFailed: When a notebook stops. What it did is kept; the same call again goes on with it.
    """
    out = Path(out)
    screen = _Screen(stream or sys.stdout)
    _need_papermill()
    available = list_notebooks(folder)
    chosen = choose(notebooks, available)
    given = split_params(params) if isinstance(params, str) else dict(params or {})
    values = assign_params(given, chosen, available)
    name, why = resolve_preset(preset)
    screen.line(f"PRESET={preset}: {name} ({why})")
    for notebook, path in chosen.items():
        defaults = notebook_parameters(path)
        values[notebook].update({key: text for key, text in (("preset", name), ("out", str(out))) if key in defaults})
    plan = _Plan(
        asked=preset,
        preset=name,
        why=why,
        experiment=hashlib.sha256(load_preset(name).to_yaml().encode()).hexdigest(),
        paths=chosen,
        # As JSON has them, so that what is read back from run.json compares equal.
        parameters=json.loads(json.dumps(plain(values))),
        code={notebook: code_hash(path) for notebook, path in chosen.items()},
    )
    _refuse_precious(out)
    with contextlib.ExitStack() as locks:
        locks.enter_context(locked(out))
        state = _open(out, plan, screen, locks)
        return _run_all(out, plan, state, screen)


def _need_papermill() -> None:
    try:
        import ipykernel  # noqa: F401
        import nbconvert  # noqa: F401
        import papermill  # noqa: F401
    except ImportError as error:
        raise KitError(
            f'running notebooks needs the package {error.name}: pip install "qlora_kit[notebooks]"'
        ) from error


def _refuse_precious(out: Path) -> None:
    """Refuse an OUT that holds the working folder, a home or a repository: it would be renamed."""
    full = out.resolve()
    precious = {Path.cwd().resolve(), Path.home().resolve(), PACKAGE, *Path.cwd().resolve().parents}
    if full in precious or (full / ".git").exists():
        raise KitError(f"OUT is {str(out)!r}, which holds more than a run: name a folder of its own, as runs/latest")
    if full.exists() and not full.is_dir():
        raise KitError(f"OUT is {str(out)!r}, which is a file: name a folder, as runs/latest")
    if {"{", "}"} & set(str(out)):
        raise KitError(f"OUT is {str(out)!r}: papermill reads curly brackets in it as a pattern; leave them out")


def _open(out: Path, plan: _Plan, screen: _Screen, locks: contextlib.ExitStack) -> dict[str, Any]:
    """Make OUT ready: go on with what is there, or move it aside. Returns the state to go on from."""
    if any(item.name not in _NOT_CONTENT for item in out.iterdir()):
        state = _read_state(out)
        reason = _difference(state, plan) if state else "it is not the start of this run"
        if reason is None:
            # What was begun elsewhere, by whoever it was, is written into from here on.
            refuse_ways_out(out)
            finished = [name for name, entry in state["notebooks"].items() if entry["state"] == "finished"]
            words = f", after {', '.join(finished)}" if finished else ""
            screen.line(f"Going on with {out}{words}.")
            for name in plan.paths:
                if name not in finished:
                    _keep_attempt(out, name)
            return state
        # The old folder's lock stays held, so that a third run that saw the old name cannot slip in between.
        aside = move_aside(out)
        screen.line(f"{out} is there already ({reason}): moved to {aside}.")
        locks.enter_context(locked(out))
    return {
        "schema": SCHEMA,
        "asked": plan.asked,
        "preset": plan.preset,
        "why": plan.why,
        "experiment": plan.experiment,
        "started": _now(),
        "notebooks": {},
    }


def _read_state(out: Path) -> dict[str, Any]:
    """Return what OUT/run.json holds, or nothing where it is not this runner's: names in it become names of files."""
    state: Any = {}
    if not (out / STATE).is_symlink():
        with contextlib.suppress(KitError):
            state = read_json(out / STATE)
    entries = state.get("notebooks") if isinstance(state, dict) else None
    known = isinstance(entries, dict) and all(
        _NAME.fullmatch(name) and isinstance(entry, dict) and isinstance(entry.get("state"), str)
        for name, entry in entries.items()
    )
    return state if known else {}


def _keep_attempt(out: Path, name: str) -> None:
    """Put what a notebook that did not finish left behind into OUT/cut_off/DATE/, so that nothing is overwritten."""
    places = (out / f"{name}{ending}" for ending in (".ipynb", ".json", ".html", ""))
    left = [path for path in places if os.path.lexists(path)]
    if left:
        target = out / "cut_off" / datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S.%f")
        with saving(target):
            target.mkdir(parents=True)
            for path in left:
                path.rename(target / path.name)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _run_all(out: Path, plan: _Plan, state: dict[str, Any], screen: _Screen) -> Path:
    from .page import write_index

    begin = time.monotonic()
    todo = [name for name in plan.paths if state["notebooks"].get(name, {}).get("state") != "finished"]
    for place, name in enumerate(todo, 1):
        entry: dict[str, Any] = {
            "state": "running",
            "started": _now(),
            "parameters": dict(plan.parameters[name]),
            "code": plan.code[name],
        }
        state["notebooks"][name] = entry
        write_json(out / STATE, state)
        write_index(out)
        given = " ".join(f"{key}={value}" for key, value in entry["parameters"].items() if key not in ("preset", "out"))
        screen.line(f"[{place}/{len(todo)}] {name}{'  ' + given if given else ''}")
        start = time.monotonic()
        try:
            _execute(plan.paths[name], out / f"{name}.ipynb", entry["parameters"], screen, start)
            if not (out / f"{name}.json").is_file():
                raise NotebookFailed(f"{name} ended without writing its record {out / f'{name}.json'}")
            entry["state"] = "finished"
        except BaseException as error:
            entry["state"] = "failed"
            entry["error"] = _last_line(str(error)) or type(error).__name__
            if isinstance(error, NotebookFailed):
                raise NotebookFailed(f"{_where_it_stopped(out, name, start)}\n\n{error}") from error
            raise
        finally:
            entry["seconds"] = round(time.monotonic() - start, 3)
            write_json(out / STATE, state)
            write_index(out)
        screen.line(f"      {name} finished after {spoken(time.monotonic() - start)}")
    state["finished"] = _now()
    write_json(out / STATE, state)
    page = write_index(out)
    screen.line(f"All of {', '.join(plan.paths)} finished after {spoken(time.monotonic() - begin)}: open {page}")
    return page


def _where_it_stopped(out: Path, name: str, start: float) -> str:
    return (
        f"{name} stopped after {spoken(time.monotonic() - start)}. It is kept as far as it came in "
        f"{out / f'{name}.ipynb'}; the same command again goes on with it."
    )


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def _execute(source: Path, target: Path, parameters: Mapping[str, Any], screen: _Screen, start: float) -> None:
    """Run one notebook with papermill in a fresh kernel of this very Python; raise NotebookFailed if it stops."""
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    names = _cell_names(nbformat.read(source, as_version=4)["cells"])
    begun = _Begun(start)

    def cell_started(cell: Any, cell_index: int) -> None:
        # papermill adds a cell of its own behind the parameters; it belongs to them.
        if "injected-parameters" in cell["metadata"].get("tags", ()):
            return
        begun.cells += 1
        begun.title = f"cell {begun.cells}/{len(names)}"
        begun.start = time.monotonic()
        screen.line(f"    {begun.title}  {names[begun.cells - 1]}  (after {spoken(begun.start - start)})")

    screen.status = lambda: (
        f"    {source.stem}  {begun.title}  {spoken(time.monotonic() - begun.start)}"
        f"  (in all {spoken(time.monotonic() - start)})"
    )
    with screen.counting(), tempfile.TemporaryDirectory(prefix="qlora_kit_") as scratch, _quiet_papermill():
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
                kernel_manager_class=_own_python(scratch),
                on_cell_execute=cell_started,
                # Of a progress bar, its last state.
                coalesce_streams=True,
            )
        except PapermillExecutionError as error:
            raise NotebookFailed(_failure(error, begun.title)) from error
        except DeadKernelError as error:
            raise NotebookFailed(
                f"{begun.title}: the process of {source.stem} was ended from outside (out of memory is the usual "
                "reason: a smaller batch_size or another preset takes less)"
            ) from error


@dataclasses.dataclass
class _Begun:
    """The cell that was begun last: when, which of the code cells it is, and how it is called on the screen."""

    start: float
    cells: int = 0
    title: str = "the kernel's start"


def _cell_names(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the code cells do: the heading above, or else the cell's first line."""
    names, heading = [], ""
    for cell in cells:
        source = _source(cell)
        if cell["cell_type"] == "markdown":
            found = re.findall(r"^#+ +(.+)$", source, flags=re.MULTILINE)
            heading = found[-1].strip() if found else heading
        elif cell["cell_type"] == "code" and source.strip():
            first = source.strip().splitlines()[0]
            comment = first.lstrip("# ").removeprefix("@title ").strip()  # Colab shows that one as a form's title
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
    """Keep papermill's log lines off the screen, which says the same in fewer words; its warnings come through."""
    import logging

    logger = logging.getLogger("papermill")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def _own_python(scratch: str) -> type:
    """Return a kernel manager whose kernels are this very Python with this very package.

    Jupyter would look for an installed kernelspec named python3, which may be another Python's; this way nothing
    has to be installed, in the user's home least of all. The kernel inherits the environment (HF_HUB_OFFLINE
    and the like); start-up files of the user's own IPython are left out, for they would be part of the result.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    env = {"IPYTHONDIR": scratch, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    parent = str(PACKAGE.parent)
    if parent not in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        # A clone that is not installed, too.
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [parent, os.environ.get("PYTHONPATH")]))
    spec = KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=50"],
        display_name="Python 3",
        language="python",
        env=env,
    )

    # Sockets in a private folder instead of open ports, where the system has such and the path is not too long.
    sockets = {"transport": "ipc", "ip": f"{scratch}/kernel"} if os.name == "posix" and len(scratch) < 80 else {}

    class OwnPython(AsyncKernelManager):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs, **sockets)

        @property
        def kernel_spec(self) -> KernelSpec:
            return spec

    return OwnPython
