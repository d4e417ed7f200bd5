"""Hyperparameter search: Optuna through transformers' Trainer, on validation rows alone, going on where it was killed.

Each trial builds its model anew. Tried settings are kept in a SQLite file, so that a search that was cut off goes on
with the trials that are missing. Test rows are never looked at: the best trial is the best on validation, and only a
run trained with its settings is tested.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from . import models, records, training
from .data import TextData, load, tokenize
from .errors import KitError, unknown
from .experiment import Experiment, safe_name

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)

# What a trial may change. The data, the seed and the precision are the same for all trials, or they could not be
# compared; what else is left out changes what a run costs, not what it learns.
SEARCHABLE = (
    "lora.r",
    "lora.alpha",
    "lora.dropout",
    "lora.target_modules",
    "lora.bias",
    "model.dropout",
    "model.head",
    "model.head_init",
    "model.pooling",
    "quantization.double_quantization",
    "quantization.scheme",
    "training.batch_size",
    "training.epochs",
    "training.gradient_accumulation",
    "training.head_learning_rate",
    "training.learning_rate",
    "training.max_grad_norm",
    "training.optimizer",
    "training.schedule",
    "training.warmup_ratio",
    "training.warmup_steps",
    "training.weight_decay",
)
# The Trainer's names for what a trial may change of its arguments.
_ARGUMENTS = (
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "max_grad_norm",
    "num_train_epochs",
    "optim",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
    "warmup_steps",
    "weight_decay",
)
# So many trials run whole before one may be pruned.
UNPRUNED = 3
# What the study is called in the storage of its own folder; in a storage elsewhere it has the search's name.
STUDY = "search"


class Search:
    """A search's folder: what was tried, and what was best on validation.

    Args:
        path: The folder.

    Raises:
        KitError: When it holds no search.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "search.json").is_file():
            raise KitError(f"{self.path} holds no search: search.json is missing")
        self.record: dict[str, Any] = records.read_json(self.path / "search.json")
        self.experiment = Experiment.from_dict(self.record["experiment"])

    def __repr__(self) -> str:
        return f"Search({str(self.path)!r}, {len(self.trials)} trials)"

    @property
    def trials(self) -> list[dict[str, Any]]:
        """The trials in their order: `number`, `parameters`, `state`, `f1_macro` on validation, `epochs`, `seconds`."""
        found: list[dict[str, Any]] = self.record["trials"]
        return found

    @property
    def best_trial(self) -> dict[str, Any]:
        """The trial with the best macro F1 on validation.

        Raises:
            KitError: When none was finished.
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


def default_space(experiment: Experiment) -> dict[str, Sequence[Any]]:
    """Return what is searched where nothing is named: the learning rate around the experiment's, and LoRA's rank.

    Args:
        experiment: What every trial starts from; the space holds its settings.
    """
    rate = experiment.training.learning_rate
    space: dict[str, Sequence[Any]] = {"training.learning_rate": (rate / 10, rate * 3, "log")}
    if experiment.lora is not None:
        space["lora.r"] = sorted({4, 8, 16, experiment.lora.r})
    return space


def parse_space(pieces: Sequence[str]) -> dict[str, Sequence[Any]]:
    """Read a space as a terminal writes it.

    Args:
        pieces: `FIELD=LOW:HIGH` and `FIELD=LOW:HIGH:log` for a range, `FIELD=A,B,C` for choices.

    Returns:
        The space, as `search` takes it.

    Raises:
        KitError: For a piece without values, and for a range that is not made of numbers.
    """
    space: dict[str, Sequence[Any]] = {}
    for piece in pieces:
        name, _, values = piece.partition("=")
        if not values:
            raise KitError(f"{piece!r} has no values: write training.learning_rate=1e-4:1e-2:log, or lora.r=4,8,16")
        low, *rest = values.split(":")
        if not rest:
            space[name] = [_value(choice) for choice in values.split(",")]
            continue
        ends = (_value(low), _value(rest[0]))
        if not all(isinstance(end, (int, float)) for end in ends):
            raise KitError(f"{piece!r} is no range: write two numbers, as {name}=1e-4:1e-2:log")
        space[name] = (*ends, *rest[1:])
    return space


def _value(text: str) -> Any:
    """Return a setting's value from its text: a number, true, false, null, or the text itself."""
    for kind in (int, float):
        # YAML would take 1e-4, without a dot, for a text.
        with contextlib.suppress(ValueError):
            return kind(text)
    return {"true": True, "false": False, "null": None}.get(text, text)


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
    4). The first trial is the experiment as it is, where the space holds it. A trial gives the result that `finetune`
    gives with its settings; nothing of it is kept but its figures. With many trials the best score is a choice among
    many and flatters: the test is for the run that is trained with it afterwards.

    Args:
        experiment: What every trial starts from. With `training.keep_best` a trial counts with its best epoch, else
            with its last.
        space: By a setting's dotted name (`SEARCHABLE` lists them) `(low, high)`, `(low, high, "log")`, or a list of
            choices: `{"training.learning_rate": (1e-4, 1e-2, "log"), "lora.r": [8, 16, 32]}`. None for `default_space`.
        trials: Finished trials to have in the end, pruned ones included. A search that has fewer, because it was cut
            off or because this number was raised, goes on with those that are missing.
        data: The data, where it is not what `experiment.data` names.
        out: Folder that the search's folder is made in.
        name: Its name; by default the experiment's and `_search`.
        storage: Optuna's SQLite file, by default `study.db` in the search's folder. Elsewhere, on a drive that outlives
            the machine, it brings the search back where the folder is lost; it may hold searches of other names too.
        prune: Stop a trial after an epoch in which it is behind the median of the earlier ones.
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
        experiment = training.with_data(experiment, data)
    folder = Path(out) / safe_name("search", name or f"{experiment.name}_search")
    begun = {
        "experiment": experiment.to_dict() | {"tracking": None},
        "space": {key: list(values) for key, values in space.items()},
        "data": data.checksum,
        "pruned": prune,
    }
    begun = records.plain(begun)
    where = {} if storage is None else {"storage": str(Path(storage).resolve())}
    _move_other_aside(folder, begun | where)
    with records.locked(folder), _stored(folder, storage, begun) as study:
        records.write_json(folder / "begun.json", begun | where)
        _run(study, experiment, space, trials, data, folder, prune, progress)
    return Search(folder)


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise KitError("a search needs Optuna: pip install 'optuna>=4.5'") from error
    return optuna


def _check(experiment: Experiment, space: Mapping[str, Sequence[Any]]) -> None:
    """Refuse a space before anything is trained: unknown settings, values that are not allowed, ranges upside down."""
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
            # One on the way, too, for a setting that only whole numbers are allowed for.
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
    with records.locked(folder):
        same = records.read_json(folder / "begun.json") == begun
    if not same:
        logger.warning("%s held another search; it is now %s.", folder, records.move_aside(folder))


@contextlib.contextmanager
def _stored(folder: Path, storage: str | Path | None, begun: Any) -> Iterator[optuna.Study]:
    """Open the search's study, in its folder or in the SQLite file that is named, for a block.

    Raises:
        KitError: When the file has another search of this name, is no such file, or another process works on it.
    """
    import optuna
    import sqlalchemy

    file, name = (folder / "study.db", STUDY) if storage is None else (Path(storage), folder.name)
    with contextlib.ExitStack() as stack:
        if storage is not None:  # the folder's own is locked with it
            stack.enter_context(records.locked(file.with_name(f"{file.name}.lock")))
        url = sqlalchemy.URL.create("sqlite", database=str(file.resolve())).render_as_string()
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


def _run(
    study: optuna.Study,
    experiment: Experiment,
    space: Mapping[str, Sequence[Any]],
    trials: int,
    data: TextData,
    folder: Path,
    prune: bool,
    progress: bool,
) -> None:
    from tqdm.auto import tqdm

    bar = tqdm(total=trials, desc="search", unit="trial", disable=not progress)
    try:
        _tidy(study, experiment, space)
        bar.update(min(len(_ended(study)), trials))
        trainer = None
        while len(_ended(study)) < trials:
            if trainer is None:
                trainer = _make_trainer(experiment, space, data, folder)
            _try_one(trainer, study, experiment, prune)
            _write(study, experiment, space, data, folder)
            done = [
                trial.value for trial in _ended(study) if trial.value is not None and trial.state.name == "COMPLETE"
            ]
            bar.update()
            bar.set_postfix_str(f"best validation macro F1 {max(done):.4f}" if done else "none finished yet")
        _write(study, experiment, space, data, folder)
    finally:
        bar.close()
        # The Trainer makes it, and nothing is written into it.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _ended(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Return the trials that have a result: finished, or stopped because they were behind or could not go on."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _tidy(study: optuna.Study, experiment: Experiment, space: Mapping[str, Sequence[Any]]) -> None:
    """Give up trials that a killed process has left running, and queue the experiment as it is as the first one."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    own = {name: _value_of(experiment, name) for name in space}
    if not _ended(study) and not waiting and all(_holds(values, own[name]) for name, values in space.items()):
        study.enqueue_trial(own)


def _value_of(experiment: Experiment, name: str) -> Any:
    section, _, field = name.partition(".")
    return experiment.to_dict()[section][field]


def _holds(values: Sequence[Any], value: Any) -> bool:
    if isinstance(values, tuple):
        return isinstance(value, (int, float)) and values[0] <= value <= values[1]
    return value in values


def _suggest(trial: optuna.Trial, space: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Return a trial's settings by dotted name."""
    chosen: dict[str, Any] = {}
    for name, values in space.items():
        if isinstance(values, list):
            chosen[name] = trial.suggest_categorical(name, values)
        else:
            suggest = trial.suggest_int if _whole(values) else trial.suggest_float
            chosen[name] = suggest(name, values[0], values[1], log=len(values) == 3)
    return chosen


def _whole(values: Sequence[Any]) -> bool:
    return isinstance(values[0], int) and isinstance(values[1], int)


def _try_one(trainer: _Searcher, study: optuna.Study, experiment: Experiment, prune: bool) -> None:
    """Run one trial through the Trainer's own interface."""
    import optuna

    pruner: Any = optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED) if prune else optuna.pruners.NopPruner()
    done = len(_ended(study))
    try:
        trainer.hyperparameter_search(
            hp_space=trainer.arguments_of,
            compute_objective=trainer.objective_of,
            n_trials=1,
            direction="maximize",
            backend="optuna",
            storage=study._storage,
            study_name=study.study_name,
            load_if_exists=True,
            # Seeded by what is done already: a search that was cut off suggests what it would have suggested.
            sampler=optuna.samplers.TPESampler(seed=experiment.training.seed + done),
            pruner=pruner,
        )
    except ValueError:
        # The Trainer asks for the best trial, and Optuna has none while every one was stopped.
        if len(_ended(study)) == done or study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)):
            raise


def _write(
    study: optuna.Study, experiment: Experiment, space: Mapping[str, Sequence[Any]], data: TextData, folder: Path
) -> None:
    """Write `search.json` and, once a trial is finished, `best.yaml`."""
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
    records.write_json(
        folder / "search.json",
        {
            "schema": records.SCHEMA,
            "name": folder.name,
            "experiment": experiment.to_dict(),
            "space": {name: list(values) for name, values in space.items()},
            "metric": "validation macro F1, " + ("best epoch" if experiment.training.keep_best else "last epoch"),
            "rows": {"train": len(data.train), "validation": len(data.validation)},
            "trials": trials,
            "environment": records.environment(models.default_device(), data_checksum=data.checksum),
        },
    )
    if any(trial["state"] == "complete" for trial in trials):
        records.write_text(folder / "best.yaml", Search(folder).best.to_yaml())


# --- the Trainer ------------------------------------------------------------------------------------------------


def _make_trainer(
    experiment: Experiment, space: Mapping[str, Sequence[Any]], data: TextData, folder: Path
) -> _Searcher:
    tokenizer = models.load_tokenizer(experiment.model)
    tokens = {
        split: tokenize(tokenizer, rows.texts, experiment.data.max_length, experiment.data.too_long)
        for split, rows in (("train", data.train), ("validation", data.validation))
    }
    if experiment.training.threads:
        torch.set_num_threads(experiment.training.threads)
    return _Searcher(experiment=experiment, space=space, data=data, tokenizer=tokenizer, tokens=tokens, folder=folder)


class _Searcher(training.KitTrainer):
    """The kit's Trainer, whose model and settings come from a trial."""

    def __init__(
        self,
        *,
        experiment: Experiment,
        space: Mapping[str, Sequence[Any]],
        data: TextData,
        tokenizer: Any,
        tokens: Mapping[str, list[list[int]]],
        folder: Path,
    ) -> None:
        self.start = experiment.override({"training.checkpoint_steps": None})
        self.best_epoch = experiment.training.keep_best
        self.space, self.data, self.tokenizer, self.folder = space, data, tokenizer, folder
        self.device = training.trainers_device(models.default_device())
        super().__init__(
            spec=self.start.training,
            lengths=[len(row) for row in tokens["train"]],
            model_init=self.build,
            args=self.make_arguments(self.start),
            **training.trainer_data(self.start, tokenizer, data, tokens),
        )

    def make_arguments(self, experiment: Experiment) -> transformers.TrainingArguments:
        """Return the Trainer's arguments for an experiment."""
        spec = experiment.training
        arguments = training.training_arguments(
            spec,
            self.folder / "checkpoints",
            device=self.device,
            precision=models.precision_of(experiment, self.device),
            steps=training.total_steps(spec, len(self.data.train)),
            tracked=False,
            progress=False,
            eval_rows=training.evaluation_rows(experiment, self.device.type),
        )
        # A trial's weights are not kept: there is no checkpoint to go on from, nor one for the Trainer to go back to at
        # the end, where `keep_best` wants the best.
        arguments.save_strategy = transformers.trainer_utils.SaveStrategy.NO
        return arguments

    def of_trial(self, trial: optuna.Trial | None) -> Experiment:
        """Return a trial's experiment; what every trial starts from for None."""
        return self.start if trial is None else self.start.override(_suggest(trial, self.space))

    def arguments_of(self, trial: optuna.Trial) -> dict[str, Any]:
        """Return the Trainer's arguments that differ by trial."""
        arguments = self.make_arguments(self.of_trial(trial))
        return {name: getattr(arguments, name) for name in _ARGUMENTS}

    def objective_of(self, metrics: Mapping[str, float]) -> float:
        """Return what a trial has reached: validation macro F1, of its last epoch or of its best so far."""
        history = [entry["eval_f1_macro"] for entry in self.state.log_history if "eval_f1_macro" in entry]
        return max([*history, metrics["eval_f1_macro"]]) if self.best_epoch else metrics["eval_f1_macro"]

    def build(self, trial: optuna.Trial | None = None) -> torch.nn.Module:
        """Build a trial's model anew, and take over its settings."""
        experiment = self.of_trial(trial)
        spec = experiment.training
        self.spec = spec
        if spec.padding == "buckets":
            self.order = training.order_of(spec, self.lengths, self.device)
        model = models.build(
            experiment, self.data.label_names, device=self.device, pad_token_id=self.tokenizer.pad_token_id
        )
        if spec.gradient_checkpointing:
            training.enable_checkpointing(model, spec.use_reentrant)
        if experiment.model.head_init == "class_means":
            precision = models.precision_of(experiment, self.device)
            training.start_head(experiment, model, self.tokenizer, self.data, self.device, precision, False)
        # finetune's random numbers start here too: equal settings give equal results.
        transformers.set_seed(spec.seed)
        return model

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: Any = None) -> Any:
        """Train a trial; one whose loss or memory is beyond limits ends as a pruned one that says why."""
        import optuna

        self.let_go()
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except (training.TrainingError, torch.cuda.OutOfMemoryError) as error:
            if trial is None:
                raise
            trial.set_user_attr("error", str(error).partition("\n")[0])
            raise optuna.TrialPruned from error

    def let_go(self) -> None:
        """Let go of the model and of all that hangs on it: before the next one is built, or two would be in memory."""
        self.model = self.model_wrapped = None  # type: ignore[assignment]  # as the Trainer does after a trial
        self.optimizer = self.lr_scheduler = None
        self.graphs, self.gradients, self.trained = None, None, []
        handler = self.callback_handler
        handler.model = handler.optimizer = handler.lr_scheduler = None
        self.accelerator.free_memory()
        gc.collect()  # a model refers to itself, and so does the traceback of a trial that could not go on
        torch.cuda.empty_cache()

    def _report_to_hp_search(self, trial: Any, step: int, metrics: dict[str, float]) -> None:
        # Trials with other batch sizes have other steps; epochs are what they have in common.
        super()._report_to_hp_search(trial, math.ceil(self.state.epoch or 0), metrics)
