"""Run notebooks in order into one folder, and continue an interrupted run.

    OUT/
      index.html            everything below on one page
      run.json              what was run with which parameters and code, and how far it came
      02_finetune.ipynb     executed; kept as far as it came if it fails
      02_finetune.json      its record, written by the notebook
      02_finetune/*.png     its figures
      runs/NAME/            run folders

A finished folder is renamed before another run goes there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from .. import schemas
from ..config.preset import preset as load_preset
from ..config.preset import resolve_preset
from ..errors import KitError, NotebookFailed, NotebookRefused, Terminated
from ..system.arguments import PARAMS, PRESET, TEXTS, a_path, takes
from ..system.files import locked, move_aside, plain, refuse_ways_out, saving, write_json
from ..system.parsing import SCHEMA
from .finding import NOTEBOOK_NAME, PACKAGE, choose, list_notebooks
from .parameters import assign_params, notebook_parameters, split_params
from .run_one import run_notebook
from .screen import Screen, duration

STATE = "run.json"
# Files that may be in OUT before anything was run there.
_NOT_CONTENT = {".lock"}


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is asked for: the preset, and for each notebook its file, parameters and code hash."""

    asked: str
    preset: str
    why: str
    experiment: str
    paths: Mapping[str, Path]
    parameters: Mapping[str, Mapping[str, Any]]
    code: Mapping[str, str]


def code_hash(path: Path) -> str:
    """Return the SHA-256 of a notebook's source and the package's files: the code that a result comes from."""
    digest = hashlib.sha256(path.read_bytes())
    for file in sorted(PACKAGE.rglob("*")):
        if file.is_file() and not {"__pycache__", "_notebooks", "_results"} & set(file.parts):
            digest.update(str(file.relative_to(PACKAGE)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _difference(state: Mapping[str, Any], plan: _Plan) -> str | None:
    """Return why the run in OUT cannot be continued, or None if it can."""
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


@takes(preset=PRESET, out=a_path("runs/latest"), notebooks=TEXTS, params=PARAMS, folder=a_path("notebooks"))
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
        out: The folder OUT. An interrupted run in it continues from its first unfinished notebook, if parameters and
            code are the same; a finished or different one is renamed to `OUT-DATE` first.
        notebooks: Names or numbers of the notebooks; None for all.
        params: Values by `name` or `NOTEBOOK.name`, as a mapping or in one text (see `split_params`).
        folder: Where the notebooks are; None for the kit's own.
        stream: Where progress is printed; None for standard output.

    Returns:
        The path of `OUT/index.html`.

    Raises:
        KitError: For bad input, before anything has run; or when another run is writing into `out`.
        NotebookFailed: When a notebook stops. What it did is kept; the same call again continues with it. For bad
            input, such as a wrong file, it is `NotebookRefused`, which is a KitError of one line, too.
        KeyboardInterrupt: On SIGINT, after what was done is saved. SIGTERM and SIGHUP raise
            `qlora_kit.errors.Terminated` in the same way, if nobody else handles them.
    """
    out = Path(out)
    screen = Screen(stream or sys.stdout)
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
        # Converted to JSON and back, so that they equal what is read from run.json.
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
    """Refuse an OUT that holds the working folder, a home or a repository, because OUT may be renamed."""
    full = out.resolve()
    precious = {Path.cwd().resolve(), Path.home().resolve(), PACKAGE, *Path.cwd().resolve().parents}
    if full in precious or (full / ".git").exists():
        raise KitError(f"OUT is {str(out)!r}, which holds more than a run: name a folder of its own, as runs/latest")
    if full.exists() and not full.is_dir():
        raise KitError(f"OUT is {str(out)!r}, which is a file: name a folder, as runs/latest")
    if {"{", "}"} & set(str(out)):
        raise KitError(f"OUT is {str(out)!r}: papermill reads curly brackets in it as a pattern; leave them out")


def _open(out: Path, plan: _Plan, screen: Screen, locks: contextlib.ExitStack) -> dict[str, Any]:
    """Prepare OUT: continue the run in it, or move it aside. Return the state to continue from."""
    if any(item.name not in _NOT_CONTENT for item in out.iterdir()):
        state = _read_state(out)
        reason = _difference(state, plan) if state else "it is not the start of this run"
        if reason is None:
            # The run may have been started elsewhere by somebody else, and is written into from here on.
            refuse_ways_out(out)
            finished = [name for name, entry in state["notebooks"].items() if entry["state"] == "finished"]
            words = f", after {', '.join(finished)}" if finished else ""
            screen.line(f"Going on with {out}{words}.")
            for name in plan.paths:
                if name not in finished:
                    _keep_attempt(out, name)
            return state
        # Keep the old folder's lock, so that a third run that saw the old name cannot start in between.
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
    """Return what OUT/run.json holds, or {} if this runner did not write it: its names become file names."""
    state: Any = {}
    if not (out / STATE).is_symlink():
        with contextlib.suppress(KitError):
            state = schemas.read(out / STATE, "run.json")
    return state if all(map(NOTEBOOK_NAME.fullmatch, state.get("notebooks", {}))) else {}


def _keep_attempt(out: Path, name: str) -> None:
    """Move the files of an unfinished notebook into OUT/cut_off/DATE/, so that nothing is overwritten."""
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


def _run_all(out: Path, plan: _Plan, state: dict[str, Any], screen: Screen) -> Path:
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
        given = " ".join(f"{key}={value}" for key, value in entry["parameters"].items() if key not in ("preset", "out"))
        start = time.monotonic()
        try:
            write_json(out / STATE, state)
            write_index(out)
            screen.line(f"[{place}/{len(todo)}] {name}{'  ' + given if given else ''}")
            run_notebook(plan.paths[name], out / f"{name}.ipynb", entry["parameters"], screen, start)
            if not (out / f"{name}.json").is_file():
                raise NotebookFailed(f"{name} ended without writing its record {out / f'{name}.json'}")
            entry["state"] = "finished"
        except BaseException as error:
            entry["state"] = "stopped" if isinstance(error, (KeyboardInterrupt, Terminated)) else "failed"
            entry["error"] = _last_line(str(error)) or type(error).__name__
            if isinstance(error, NotebookFailed) and not isinstance(error, NotebookRefused):
                raise NotebookFailed(f"{_where_it_stopped(out, name, start)}\n\n{error}") from error
            raise
        finally:
            entry["seconds"] = round(time.monotonic() - start, 3)
            write_json(out / STATE, state)
            write_index(out)
        screen.line(f"      {name} finished after {duration(time.monotonic() - start)}")
    state["finished"] = _now()
    write_json(out / STATE, state)
    page = write_index(out)
    screen.line(f"All of {', '.join(plan.paths)} finished after {duration(time.monotonic() - begin)}: open {page}")
    return page


def _where_it_stopped(out: Path, name: str, start: float) -> str:
    return (
        f"{name} stopped after {duration(time.monotonic() - start)}. It is kept as far as it came in "
        f"{out / f'{name}.ipynb'}; the same command again goes on with it."
    )


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
