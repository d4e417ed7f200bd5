"""Run one trial of a search: train and score the experiment with other settings."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from ..config.experiment import Experiment
from ..data.rows import TextData
from ..errors import TrainingError
from ..system.devices import default_device, trainers_device
from ..training.arguments import arguments_of_run
from ..training.finetune import start_head, trainer_data
from ..training.prepare import prepare_model, prepare_texts
from ..training.trainer import KitTrainer, order_of

if TYPE_CHECKING:
    import optuna


@dataclasses.dataclass(frozen=True)
class Searched:
    """What a search works on.

    Args:
        experiment: What every trial starts from.
        space: Values to try for each setting, by its dotted name, as `search` takes them.
        data: The data that trials are trained on and scored with.
        folder: The search's folder.
    """

    experiment: Experiment
    space: Mapping[str, Sequence[Any]]
    data: TextData
    folder: Path


# Names of the Trainer's arguments that a trial may change.
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


def _try_one(trainer: _Searcher, study: optuna.Study, prune: bool) -> None:
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
            # The seed depends on the number of trials done: a resumed search suggests the same settings.
            sampler=optuna.samplers.TPESampler(seed=trainer.start.training.seed + done),
            pruner=pruner,
        )
    except ValueError:
        # The Trainer asks for the best trial, and Optuna has none while all trials were pruned.
        if len(_ended(study)) == done or study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)):
            raise


# --- the Trainer ------------------------------------------------------------------------------------------------


class _Searcher(KitTrainer):
    """The kit's Trainer that takes its model and settings from a trial.

    Args:
        searched: What is searched.
    """

    def __init__(self, searched: Searched) -> None:
        experiment = searched.experiment
        self.start = experiment.override({"training.checkpoint_steps": None})
        self.best_epoch = experiment.training.keep_best
        self.space, self.data, self.folder = searched.space, searched.data, searched.folder
        self.tokenizer, tokens = prepare_texts(experiment, self.data)
        self.device = trainers_device(default_device())
        super().__init__(
            spec=self.start.training,
            lengths=[len(row) for row in tokens["train"]],
            model_init=self.build,
            args=self.make_arguments(self.start),
            **trainer_data(self.start, self.tokenizer, self.data, tokens),
        )

    def make_arguments(self, experiment: Experiment) -> transformers.TrainingArguments:
        """Return the Trainer's arguments for an experiment."""
        arguments = arguments_of_run(experiment, self.folder, device=self.device, rows=len(self.data.train))
        # A trial's weights are not kept, so no checkpoints are saved: there is none to resume from, and none for the
        # Trainer to load at the end for `keep_best`.
        arguments.save_strategy = transformers.trainer_utils.SaveStrategy.NO
        return arguments

    def of_trial(self, trial: optuna.Trial | None) -> Experiment:
        """Return a trial's experiment; for None, the one that every trial starts from."""
        return self.start if trial is None else self.start.override(_suggest(trial, self.space))

    def arguments_of(self, trial: optuna.Trial) -> dict[str, Any]:
        """Return the Trainer's arguments that differ by trial."""
        arguments = self.make_arguments(self.of_trial(trial))
        return {name: getattr(arguments, name) for name in _ARGUMENTS}

    def objective_of(self, metrics: Mapping[str, float]) -> float:
        """Return a trial's score: validation macro F1 of its last epoch, or of its best so far."""
        history = [entry["eval_f1_macro"] for entry in self.state.log_history if "eval_f1_macro" in entry]
        return max([*history, metrics["eval_f1_macro"]]) if self.best_epoch else metrics["eval_f1_macro"]

    def build(self, trial: optuna.Trial | None = None) -> torch.nn.Module:
        """Build a new model for a trial, and use the trial's settings."""
        experiment = self.of_trial(trial)
        spec = experiment.training
        self.spec = spec
        if spec.padding == "buckets":
            self.order = order_of(spec, self.lengths, self.device)
        prepared = prepare_model(experiment, self.data.label_names, self.tokenizer.pad_token_id)
        if experiment.model.head_init == "class_means":
            start_head(
                experiment, prepared.model, self.tokenizer, self.data, prepared.device, prepared.precision, False
            )
        # Seed here, as finetune does: equal settings give equal results.
        transformers.set_seed(spec.seed)
        return prepared.model

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: Any = None) -> Any:
        """Train a trial; if its loss is not finite or memory runs out, prune it and record the error."""
        import optuna

        self.let_go()
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except (TrainingError, torch.cuda.OutOfMemoryError) as error:
            if trial is None:
                raise
            trial.set_user_attr("error", str(error).partition("\n")[0])
            raise optuna.TrialPruned from error

    def let_go(self) -> None:
        """Free the model and all that belongs to it, so that it is not in memory beside the next one."""
        self.model = self.model_wrapped = None  # type: ignore[assignment]  # as the Trainer does after a trial
        self.optimizer = self.lr_scheduler = None
        self.graphs, self.gradients, self.trained = None, None, []
        handler = self.callback_handler
        handler.model = handler.optimizer = handler.lr_scheduler = None
        self.accelerator.free_memory()
        gc.collect()  # a model is a reference cycle, and so is the traceback of a failed trial
        torch.cuda.empty_cache()

    def _report_to_hp_search(self, trial: Any, step: int, metrics: dict[str, float]) -> None:
        # Report epochs, not steps: trials with different batch sizes have different steps.
        super()._report_to_hp_search(trial, math.ceil(self.state.epoch or 0), metrics)


def _value_of(experiment: Experiment, name: str) -> Any:
    section, _, field = name.partition(".")
    return experiment.to_dict()[section][field]


def _holds(values: Sequence[Any], value: Any) -> bool:
    if isinstance(values, tuple):
        return isinstance(value, (int, float)) and values[0] <= value <= values[1]
    return value in values


# Number of trials that run to their end before one may be pruned.
UNPRUNED = 3


def _ended(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Return the trials that ended: complete, or pruned because they were behind or failed."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
