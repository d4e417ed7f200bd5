"""The trackers besides W&B: TensorBoard, MLflow and trackio, each through transformers' own callback.

They get what the Trainer logs: losses, learning rate, gradient norm, validation metrics, speed and peak memory; its
arguments; the model's configuration, which names the labels; and trackio the adapters' settings, too. No text of a row
is among them. A run's test is logged in W&B alone.

Each keeps its own settings. TensorBoard writes into `OUT/tensorboard/NAME`, unless `TENSORBOARD_LOGGING_DIR` says
otherwise. MLflow writes where `MLFLOW_TRACKING_URI` or its own default says, into the experiment `tracking.project`
unless `MLFLOW_EXPERIMENT_NAME` says otherwise. trackio writes into its folder on this machine, and to a Space only if
`TRACKIO_SPACE_ID` names one.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.experiment import Experiment
from ..config.sections import TRACKERS, TrackingSpec
from ..errors import KitError
from .guarding import in_words, quiet_log_files

if TYPE_CHECKING:
    import wandb
    from transformers import Trainer

logger = logging.getLogger(__name__)

TITLES = {"tensorboard": "TensorBoard", "mlflow": "MLflow", "trackio": "trackio"}
"""How messages name each tracker that this file is about."""

# What transformers' callback imports of each package. An installation may be broken, or a folder have the name.
_IMPORTS: Mapping[str, Callable[[], Any]] = {
    "tensorboard": lambda: importlib.import_module("torch.utils.tensorboard"),
    "mlflow": lambda: importlib.import_module("mlflow").start_run,
    "trackio": lambda: importlib.import_module("trackio").init,
}
# A tracking server that does not answer must not hold a run for minutes, as MLflow's own values would.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def refuse_absent(spec: TrackingSpec) -> None:
    """Refuse a tracker whose package is not here, before anything is done for a run.

    Args:
        spec: Names the trackers. W&B is not asked for: the kit installs it, and a run goes on without it.

    Raises:
        KitError: With the command that installs the package.
    """
    for name in spec.trackers:
        if name not in TITLES:
            continue
        try:
            _IMPORTS[name]()
        except Exception as error:
            missing = isinstance(error, ModuleNotFoundError) or importlib.util.find_spec(name) is None
            why = "is not installed" if missing else f"cannot be imported ({in_words(error)})"
            raise KitError(
                f"tracking.to is {name}, and its package {why}: pip install 'qlora_kit[{name}]', or let tracking.to be "
                f"{', '.join(other for other in TRACKERS if other != name)} or none"
            ) from error


@contextlib.contextmanager
def reporting(experiment: Experiment, out: Path, name: str, run: wandb.Run | None) -> Iterator[list[str]]:
    """Say which trackers the Trainer reports to within a block, and end what they have open after it.

    Args:
        experiment: Names the trackers and the project.
        out: Folder of run folders.
        name: Name of the run and of its folder.
        run: The open W&B run; with None W&B is left out.

    Yields:
        What `TrainingArguments.report_to` takes.
    """
    others = [tracker for tracker in experiment.tracking.trackers if tracker in TITLES]
    settings = {}
    if "tensorboard" in others:
        # transformers' own place is in the folder of checkpoints, which goes when a run is finished.
        settings["TENSORBOARD_LOGGING_DIR"] = str(out / "tensorboard" / name)
    if "mlflow" in others:
        settings |= {"MLFLOW_EXPERIMENT_NAME": experiment.tracking.project, **_PATIENCE}
    added = {key: value for key, value in settings.items() if key not in os.environ}
    # The user's own run, open before this one, is not ended after it.
    users_own = "mlflow" in others and sys.modules["mlflow"].active_run() is not None
    os.environ.update(added)
    status = "FAILED"
    try:
        yield [*(["wandb"] if run is not None else []), *others]
        status = "FINISHED"
    finally:
        for key in added:
            os.environ.pop(key, None)
        if "mlflow" in others and not users_own:
            _attempt("mlflow", lambda: sys.modules["mlflow"].end_run(status))
        if "trackio" in others:
            # Its callback opens the run once more for the scores that come after the training.
            _attempt("trackio", lambda: sys.modules["trackio"].finish())


def guard_others(trainer: Trainer) -> None:
    """Keep failures of the trackers' callbacks from stopping a training: the first of each gives a warning.

    Args:
        trainer: The Trainer that has the callbacks.
    """
    from transformers.integrations import INTEGRATION_TO_CALLBACK

    for name in TITLES:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, INTEGRATION_TO_CALLBACK[name]):
                _guard(callback, name)


def _guard(callback: Any, name: str) -> None:
    failed = False

    def guarded(event: Callable[..., object]) -> Callable[..., None]:
        def call(*arguments: Any, **more: Any) -> None:
            nonlocal failed
            if not failed:
                failed = not _attempt(name, lambda: event(*arguments, **more))

        return call

    for event in dir(callback):
        if event.startswith("on_"):
            setattr(callback, event, guarded(getattr(callback, event)))


def _attempt(name: str, log: Callable[[], object]) -> bool:
    """Log; return whether it went well. A warning says what failed."""
    try:
        with quiet_log_files():
            log()
    except Exception as error:
        logger.warning("%s failed, and from here on it logs nothing of this run: %s.", TITLES[name], in_words(error))
        return False
    return True
