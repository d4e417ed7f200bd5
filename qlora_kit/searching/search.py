"""Run a search: Optuna through transformers' Trainer, on validation rows only, continued if it was interrupted.

Each trial builds a new model. The trials are kept in a SQLite file, so that an interrupted search continues with the
missing ones. Test rows are never used: the best trial is the best on validation, and only a run trained with its
settings is tested.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import shutil
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import schemas
from ..config.experiment import Experiment
from ..config.names import safe_name
from ..data.loading import load
from ..data.rows import TextData
from ..errors import KitError, unknown
from ..models.tokenizers import load_tokenizer
from ..system.arguments import DATA, EXPERIMENT, FLAG, FOLDER, MAPPING, TEXT, WHOLE, a_path, takes
from ..system.devices import default_device
from ..system.environment import environment
from ..system.files import has_file_locks, locked, move_aside, plain, write_json, write_text
from ..system.parsing import SCHEMA, read_json
from ..system.showing import counted
from ..training.finetune import with_data
from ..training.prepare import prepare_model
from .space import SEARCHABLE, default_space
from .trial import Searched, _ended, _holds, _Searcher, _try_one, _value_of, _whole

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)


# The study's name in the search folder's own storage; in any other storage it has the search's name.
STUDY = "search"


class Search:
    """A search's folder: its trials, and the best one on validation.

    Args:
        path: The folder.

    Raises:
        KitError: When it holds no search.
    """

    @takes(path=a_path("runs/NAME_search"))
    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "search.json").is_file():
            raise KitError(f"{self.path} holds no search: search.json is missing")
        self.record: dict[str, Any] = schemas.read(self.path / "search.json", "search.json")
        self.experiment = Experiment.from_dict(self.record["experiment"], where=str(self.path / "search.json"))

    def __repr__(self) -> str:
        return f"Search({str(self.path)!r}, {counted(len(self.trials), 'trial')})"

    @property
    def trials(self) -> list[dict[str, Any]]:
        """The trials in their order: `number`, `parameters`, `state`, `f1_macro` on validation, `epochs`, `seconds`."""
        found: list[dict[str, Any]] = self.record["trials"]
        return found

    @property
    def best_trial(self) -> dict[str, Any]:
        """The trial with the best macro F1 on validation.

        Raises:
            KitError: When no trial finished.
        """
        done = [trial for trial in self.trials if trial["state"] == "complete"]
        if not done:
            reasons = {trial["error"] for trial in self.trials if trial["error"]}
            raise KitError(f"no trial of {self.path} was finished" + (f": {reasons.pop()}" if reasons else ""))
        return max(done, key=lambda trial: float(trial["f1_macro"]))

    @property
    def best(self) -> Experiment:
        """The experiment with the best trial's settings, ready for `qlora_kit.finetune`."""
        return self.experiment.override(self.best_trial["parameters"])


@takes(
    experiment=EXPERIMENT,
    space=MAPPING,
    trials=WHOLE,
    data=DATA,
    out=FOLDER,
    name=TEXT,
    storage=a_path("study.db"),
    prune=FLAG,
    progress=FLAG,
)
def search(
    experiment: Experiment,
    space: Mapping[str, Sequence[Any]] | None = None,
    *,
    trials: int = 20,
    data: TextData | None = None,
    out: str | Path = "runs",
    name: str | None = None,
    storage: str | Path | None = None,
    prune: bool = True,
    progress: bool = True,
) -> Search:
    """Search for the settings with the best macro F1 on the validation rows.

    Optuna's TPE sampler suggests them (Bergstra et al., Algorithms for Hyper-Parameter Optimization, NIPS 2011, section
    4). The first trial is the unchanged experiment, if the space contains its settings. A trial gives the same result
    as `finetune` with its settings; only its scores are kept. The best score of many trials is too optimistic: test the
    run that is trained with its settings afterwards.

    Args:
        experiment: The settings that every trial starts from. With `training.keep_best` a trial's score is that of its
            best epoch, else of its last.
        space: For each setting, by its dotted name (listed in `SEARCHABLE`), `(low, high)`, `(low, high, "log")`, or a
            list of choices: `{"training.learning_rate": (1e-4, 1e-2, "log"), "lora.r": [8, 16, 32]}`. None for
            `default_space`.
        trials: Total number of finished trials, pruned ones included. A search that has fewer (it was interrupted, or
            this number was raised) runs the missing ones.
        data: Data to use instead of what `experiment.data` names.
        out: Folder in which the search's folder is made.
        name: Name of the search's folder; by default the experiment's name and `_search`.
        storage: Optuna's SQLite file, by default `study.db` in the search's folder. On a drive that outlives the
            machine, it restores the search if the folder is lost. One file may hold several searches with different
            names.
        prune: Stop a trial after an epoch in which it is below the median of the earlier trials.
        progress: Show a progress bar.

    Returns:
        The search; its `best` is an experiment for `finetune`. The folder holds `search.json`, `best.yaml` and
        Optuna's storage `study.db`.

    Raises:
        KitError: Without the package optuna; for a space that cannot be searched, before anything is trained; for a
            storage that has another search of this name; and when another process works on the same search.
    """
    _import_optuna()
    if trials < 1:
        raise KitError(f"trials is {trials}: allowed is 1 or more")
    if space is None:
        space = default_space(experiment)
    _check(experiment, space)
    if data is None:
        data = load(experiment.data)
    else:
        experiment = with_data(experiment, data)
    folder = Path(out) / safe_name("search", name or f"{experiment.name}_search")
    begun = {
        "experiment": experiment.to_dict() | {"tracking": None},
        "space": {key: list(values) for key, values in space.items()},
        "data": data.checksum,
        "pruned": prune,
    }
    begun = plain(begun)
    where = {} if storage is None else {"storage": str(Path(storage).resolve())}
    if not (folder / "begun.json").is_file():
        # Refuse what no trial could train, before anything is written.
        prepare_model(experiment, data.label_names, load_tokenizer(experiment.model).pad_token_id)
        gc.collect()  # a model is a reference cycle, and would stay in memory beside a trial's
    _move_other_aside(folder, begun | where)
    with locked(folder), _stored(folder, storage, begun) as study:
        write_json(folder / "begun.json", begun | where)
        _run(study, Searched(experiment, space, data, folder), trials, prune, progress)
    return Search(folder)


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise KitError("a search needs Optuna: pip install 'optuna>=4.5'") from error
    return optuna


def _check(experiment: Experiment, space: Mapping[str, Sequence[Any]]) -> None:
    """Refuse a bad space before anything is trained: unknown settings, values not allowed, reversed ranges."""
    if not space:
        raise KitError("the space is empty: name a setting, such as training.learning_rate")
    for name, values in space.items():
        if name not in SEARCHABLE:
            raise unknown("setting to search", name, SEARCHABLE)
        if isinstance(values, tuple):
            low, high = values[:2] if len(values) in (2, 3) else (None, None)
            numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (low, high))
            if not numbers or not low < high or values[2:] not in ((), ("log",)) or (values[2:] and low <= 0):
                raise KitError(
                    f"the range of {name} is {values!r}: allowed is (low, high) or, above 0, (low, high, 'log'), with "
                    "low below high"
                )
            # Also try a fraction in between: the setting may allow only whole numbers.
            tried: Sequence[Any] = (low, high) if _whole(values) else (low, low + (high - low) / math.pi, high)
        elif isinstance(values, list) and values:
            tried = values
        else:
            raise KitError(f"{name} is {values!r}: allowed is a range (low, high) or a list of choices")
        for value in tried:
            if not isinstance(value, (bool, int, float, str, type(None))):
                raise KitError(f"a choice of {name} is {value!r}: allowed are numbers, texts, true, false and null")
            experiment.override({name: value})


def _move_other_aside(folder: Path, begun: Any) -> None:
    """Move a folder that holds another search to `NAME-DATE`."""
    if not (folder / "begun.json").is_file():
        return
    with locked(folder):
        same = read_json(folder / "begun.json") == begun
    if not same:
        logger.warning("%s held another search; it is now %s.", folder, move_aside(folder))


@contextlib.contextmanager
def _stored(folder: Path, storage: str | Path | None, begun: Any) -> Iterator[optuna.Study]:
    """Open the search's study for a block, in its folder or in the given SQLite file.

    Raises:
        KitError: When the file holds another search of this name, is no SQLite file, or is in use by another process.
    """
    import optuna
    import sqlalchemy

    file, name = (folder / "study.db", STUDY) if storage is None else (Path(storage), folder.name)
    with contextlib.ExitStack() as stack:
        if storage is not None:  # the folder's lock covers its own file
            stack.enter_context(locked(file.with_name(f"{file.name}.lock")))
        # Use SQLite's URI form: every character of a path can be escaped, and locks can be turned off. On a file system
        # without locks SQLite would otherwise refuse to work; one process, as here, is safe without them.
        address = f"file:{urllib.parse.quote(str(file.resolve()))}"
        ways = {"uri": "true"} | ({} if has_file_locks(file.parent) else {"vfs": "unix-none"})
        url = sqlalchemy.URL.create("sqlite", database=address, query=ways).render_as_string()
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        stack.callback(optuna.logging.set_verbosity, verbosity)
        try:
            opened = optuna.storages.RDBStorage(url)
        except sqlalchemy.exc.DatabaseError as error:
            raise KitError(f"{file} cannot be opened as Optuna's storage: {error.orig}") from error
        stack.callback(opened.engine.dispose)
        stack.callback(opened.remove_session)
        study = optuna.create_study(storage=opened, study_name=name, direction="maximize", load_if_exists=True)
        if study.user_attrs.get("begun", begun) != begun:
            raise KitError(
                f"{file} has another search called {name}: its experiment, space, data or pruning is not this "
                "one's. Choose another name, or another storage"
            )
        study.set_user_attr("begun", begun)
        yield study


def _run(study: optuna.Study, searched: Searched, trials: int, prune: bool, progress: bool) -> None:
    from tqdm.auto import tqdm

    bar = tqdm(total=trials, desc="search", unit="trial", disable=not progress)
    try:
        _tidy(study, searched.experiment, searched.space)
        bar.update(min(len(_ended(study)), trials))
        trainer = None
        while len(_ended(study)) < trials:
            if trainer is None:
                trainer = _Searcher(searched)
            _try_one(trainer, study, prune)
            _write(study, searched)
            done = [
                trial.value for trial in _ended(study) if trial.value is not None and trial.state.name == "COMPLETE"
            ]
            bar.update()
            bar.set_postfix_str(f"best validation macro F1 {max(done):.4f}" if done else "none finished yet")
        _write(study, searched)
    finally:
        bar.close()
        # The Trainer makes this folder, and nothing is written into it.
        shutil.rmtree(searched.folder / "checkpoints", ignore_errors=True)


def _tidy(study: optuna.Study, experiment: Experiment, space: Mapping[str, Sequence[Any]]) -> None:
    """Mark trials that a killed process left running as failed, and queue the unchanged experiment as the first."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    own = {name: _value_of(experiment, name) for name in space}
    if not _ended(study) and not waiting and all(_holds(values, own[name]) for name, values in space.items()):
        study.enqueue_trial(own)


def _write(study: optuna.Study, searched: Searched) -> None:
    """Write `search.json` and, once a trial is finished, `best.yaml`."""
    experiment, data, folder = searched.experiment, searched.data, searched.folder
    trials = [
        {
            "number": place,
            "parameters": trial.params,
            "state": trial.state.name.lower(),
            "f1_macro": trial.value if trial.state.name == "COMPLETE" else None,
            "epochs": [trial.intermediate_values[epoch] for epoch in sorted(trial.intermediate_values)],
            "seconds": trial.duration.total_seconds() if trial.duration else None,
            "error": trial.user_attrs.get("error"),
        }
        for place, trial in enumerate(_ended(study))
    ]
    write_json(
        folder / "search.json",
        {
            "schema": SCHEMA,
            "name": folder.name,
            "experiment": experiment.to_dict(),
            "space": {name: list(values) for name, values in searched.space.items()},
            "metric": "validation macro F1, " + ("best epoch" if experiment.training.keep_best else "last epoch"),
            "rows": {"train": len(data.train), "validation": len(data.validation)},
            "trials": trials,
            "environment": environment(default_device(), data_checksum=data.checksum),
        },
    )
    if any(trial["state"] == "complete" for trial in trials):
        write_text(folder / "best.yaml", Search(folder).best.to_yaml())
