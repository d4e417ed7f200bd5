"""Log runs to W&B: online with a login, offline without one.

What W&B gets, and what `wandb sync` uploads of an offline run:

- the experiment: every setting, the paths of data files and the names of their columns included; the Trainer's
  arguments and the adapters' settings; the model's configuration, which names the labels;
- by step and epoch: losses, learning rate, gradient norm, validation metrics, speed, peak memory;
- after training: precision, recall and F1 by label, the confusion matrix, and the pairs of labels most often confused,
  on validation rows; after `evaluate` the same on test rows, with the baselines' scores;
- what W&B itself takes of the machine: its name, processors, GPUs, disk and memory and how busy they are, the operating
  system, the versions of Python and of the installed packages, the program's path and arguments, and the commit and
  address of the git repository that it is started in.

No text of a row is among them, unless the data is Banking77 or `tracking.log_texts` is true: then three validation
texts for each pair of labels that are often confused. Code is not uploaded, nor what the program prints, nor, unless
you set `WANDB_LOG_MODEL`, the adapters and checkpoints.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import netrc
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from packaging.version import Version

from ..config.experiment import Experiment
from ..config.sections import TrackingSpec
from ..errors import KitError
from ..metrics.confusions import confusions
from ..metrics.scores import per_label
from ..runs.folder import RunFolder
from ..system.files import write_json
from ..system.home import instead_of_home, is_writable
from ..system.parsing import SCHEMA, read_json
from .guarding import in_words, quiet_log_files

if TYPE_CHECKING:
    import numpy as np
    import wandb
    from transformers import Trainer

logger = logging.getLogger(__name__)

# Seconds to wait for W&B's server before a run goes on without it.
INIT_SECONDS = 30
# The most rows of a table that W&B shows.
TABLE_ROWS = 10_000
# W&B writes its log in blocks of this many bytes: with less free disk space it stops in the middle.
BLOCK = 2**15
# The file in a run folder that names the W&B run of its training.
FILE = "tracking.json"
# W&B's server, by the names under which `wandb login` has kept a key for it: today's, and the one before.
HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")
# Before this version an offline part did not say that it continues a run, and replaced what the run had
# (wandb/wandb#4624).
RESUMES_OFFLINE = Version("0.31")


# Ids of open runs whose logging has failed.
_failed: set[str] = set()


@contextlib.contextmanager
def opened(experiment: Experiment, out: Path, name: str) -> Iterator[wandb.Run | None]:
    """Open a W&B run for a block, online only if the user is logged in or asked for it.

    Args:
        experiment: Says whether to log and in which project; it becomes the run's config.
        out: Folder of run folders; W&B makes its own folder `wandb/` in it.
        name: Name of the run and of its folder; a file in the folder notes the W&B run (see `log_test`).

    Yields:
        The run, or None for no tracking: if none is wanted, or none can be opened (a warning says why). transformers'
        own callback logs into it.

    Raises:
        KitError: When `online` was asked for and W&B opens no run. With `auto` the run is offline instead.
    """
    mode, file = _wanted(experiment.tracking), out / name / FILE
    # Delete the note of an earlier part of the training, which was tracked and interrupted.
    file.unlink(missing_ok=True)
    run = None if mode is None else _init(experiment, out, name, mode)
    if run is None:
        yield None
        return
    if run.offline:
        _resumes_offline("its test will not be logged in it")
    note = {"schema": SCHEMA, "id": run.id, "offline": run.offline, "steps": 0}
    _attempt(run, lambda: write_json(file, note))
    try:
        yield run
        # W&B's steps, one per log, not the Trainer's.
        _attempt(run, lambda: write_json(file, note | {"steps": run.step}))
    except BaseException:
        _finish(run, exit_code=1)
        raise
    _finish(run)


def _attempt(run: wandb.Run, log: Callable[[], object]) -> None:
    """Log into an open run. The first failure gives a warning, and nothing more is logged into that run."""
    if run.id in _failed:
        return
    try:
        with quiet_log_files():
            log()
    except Exception as error:
        _failed.add(run.id)
        logger.warning("W&B failed, and from here on this run is not logged: %s.", in_words(error))


def _finish(run: wandb.Run, exit_code: int = 0) -> None:
    """End an open run, so that its log is sent or written. After a failure do not warn again."""
    try:
        with quiet_log_files():
            run.finish(exit_code=exit_code)
        # W&B's own process writes the log of an offline run, and does not report a full disk.
        if run.offline and shutil.disk_usage(run.dir).free < BLOCK:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), run.dir)
    except Exception as error:
        if run.id not in _failed:
            logger.warning("W&B failed as it ended, and its log may not be whole: %s.", in_words(error))
    _failed.discard(run.id)


def _init(experiment: Experiment, out: Path, name: str, mode: str, resumed: str | None = None) -> wandb.Run | None:
    """Open a new run, or resume the one with the given id beside any run that the user has open.

    Returns:
        The run; None, after a warning, if W&B opens none, not even an offline one.

    Raises:
        KitError: When a new run must be `online` and W&B opens none.
    """
    try:
        _find_folders()
        import wandb

        out.mkdir(parents=True, exist_ok=True)
        with quiet_log_files():
            return wandb.init(
                project=experiment.tracking.project,
                name=name,
                dir=str(out),
                mode=mode,  # type: ignore[arg-type]  # one of those
                config=experiment.to_dict(),
                settings=wandb.Settings(console="off", silent=mode == "offline", init_timeout=INIT_SECONDS),
                id=resumed,
                resume="allow" if resumed else None,
                # transformers' callback logs into the open run; only this module logs into a resumed one.
                reinit="create_new" if resumed else "finish_previous",
            )
    except Exception as error:
        reason = in_words(error)
        if experiment.tracking.wandb == "online" and not resumed:
            raise KitError(
                f"W&B does not open a run: {reason}. Log in with `wandb login`, or set tracking.wandb to offline or "
                "none"
            ) from error
        if mode == "online":
            logger.warning("W&B does not open an online run (%s); this one is offline (see `wandb sync`).", reason)
            return _init(experiment, out, name, "offline", resumed)
        logger.warning("W&B does not open a run, so nothing is logged: %s.", reason)
        return None


def _find_folders() -> None:
    """Let W&B keep its own files in a temporary folder, where it would keep them in a home that cannot be written.

    It reads these settings when it is imported and when it opens its first run. Folders that the user has named stay.
    """
    places = {
        "WANDB_DATA_DIR": os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share",
        "WANDB_CACHE_DIR": os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache",
    }
    for name, place in places.items():
        if name not in os.environ and not is_writable(Path(place) / "wandb"):
            os.environ[name] = str(instead_of_home() / name.lower())


def guard_callback(run: wandb.Run | None, trainer: Trainer) -> None:
    """Keep failures of transformers' own W&B callback from stopping a training.

    Args:
        run: The open run; with None nothing is done.
        trainer: The Trainer that has the callback.
    """
    if run is None:
        return
    from transformers.integrations import WandbCallback

    def guarded(event: Callable[..., object]) -> Callable[..., None]:
        return lambda *arguments, **more: _attempt(run, lambda: event(*arguments, **more))

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, WandbCallback):
            for name in dir(callback):
                if name.startswith("on_"):
                    setattr(callback, name, guarded(getattr(callback, name)))


def may_quote(experiment: Experiment) -> bool:
    """Return whether texts of an experiment's rows may go into a log that others read: public ones, or if asked."""
    return experiment.data.is_public or experiment.tracking.log_texts


def log_validation(
    run: wandb.Run | None,
    logits: np.ndarray,
    labels: Sequence[int],
    texts: Sequence[str] | None,
    names: Sequence[str],
) -> None:
    """Log a trained model's results on the validation rows, label by label, as W&B's own charts and tables.

    Args:
        run: The open run; with None nothing is done.
        logits: Logits of the validation rows, `[rows, classes]`.
        labels: Their true classes `[rows]`.
        texts: Their texts `[rows]`, of which those that the model is most wrong about go into W&B's table; None for
            texts that are to stay here (see `may_quote`): then the table has the confused labels alone.
        names: Label of each class.
    """
    if run is None:
        return
    _attempt(
        run,
        lambda: run.log(
            {
                "validation/per_label": _table(per_label(logits, labels, names)),
                "validation/confusions": _table(_confused(logits, labels, texts, names)),
                **_matrix("validation", labels, logits.argmax(axis=1).tolist(), names),
            }
        ),
    )


def read_note(run: RunFolder) -> dict[str, Any] | None:
    """Return a run folder's note on the W&B run of its training: `id`, `offline` and `steps`.

    Returns:
        The note; None if the training was not tracked, or the test must not be.

    Raises:
        KitError: When the note is damaged.
    """
    file = run.path / FILE
    if _wanted(run.experiment.tracking) is None or not file.is_file():
        return None
    note = read_json(file)
    # The id becomes part of a folder's name.
    named = isinstance(note, dict) and re.fullmatch(r"[\w-]{1,64}", str(note.get("id")))
    if not named or not isinstance(note.get("steps"), int):
        raise KitError(f"{file} names no W&B run: delete it, and the test is not logged")
    return dict(note)


def log_test(run: RunFolder, labels: Sequence[int], result: Mapping[str, Any]) -> None:
    """Log a run's test in the W&B run of its training; do nothing if that was not tracked.

    The test of an offline training is offline too, in a second folder of the same W&B run; `wandb sync` joins both. If
    W&B fails, a warning says so, and the results that `evaluate` wrote stay.

    Args:
        run: A finished run.
        labels: True classes of the test rows `[rows]`.
        result: What `evaluate` writes. Its texts are not logged.

    Raises:
        KitError: When the folder's note is damaged (see `read_note`).
    """
    note, mode = read_note(run), _wanted(run.experiment.tracking)
    if note is None or mode is None:
        return
    if note.get("offline"):
        mode = "offline"
    if mode == "offline" and not _resumes_offline("the test is not logged in it"):
        return
    tracked = _init(run.experiment, run.path.parent, run.path.name, mode, resumed=note["id"])
    if tracked is None:
        return
    _attempt(
        tracked,
        lambda: tracked.log(
            {
                **_numbers("test", result["metrics"]["test"]),
                "test/per_label": _table(result["per_label"]),
                **_against(result["metrics"]["baselines"]),
                **_matrix("test", labels, result["predictions"]["test"], result["labels"]),
                "train/global_step": run.training["steps"],  # the horizontal axis of transformers' callback
            },
            # An offline part does not know how many steps there were, and two logs must not share a step.
            step=max(note["steps"], tracked.step),
        ),
    )
    _finish(tracked)


def _resumes_offline(lost: str) -> bool:
    """Return whether this W&B can resume an offline run; if not, warn about what is lost."""
    import wandb

    if Version(wandb.__version__) >= RESUMES_OFFLINE:
        return True
    logger.warning(
        "W&B %s cannot go on with an offline run, so %s: log in to W&B, or pip install 'wandb>=%s'.",
        *(wandb.__version__, lost, RESUMES_OFFLINE),
    )
    return False


def _numbers(name: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics as W&B takes them: one number each, ends of intervals included."""
    numbers = {}
    for key, metric in metrics.items():
        if isinstance(metric, Mapping):
            numbers[f"{name}/{key}"] = metric["value"]
            numbers |= {f"{name}/{key}_{end}": metric[end] for end in ("low", "high")}
        else:
            numbers[f"{name}/{key}"] = metric
    return numbers


def _against(baselines: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table of the baselines' scores on the test rows, and of the run's lead in macro F1 over each."""
    rows = []
    for name, row in baselines.items():
        scores = {key: row[key]["value"] for key in ("accuracy", "f1_macro", "f1_weighted")}
        ahead = row["ahead"]["f1_macro"]
        lead = {"ahead": ahead["value"], "ahead_low": ahead["low"], "ahead_high": ahead["high"]}
        rows.append({"baseline": name, **scores, **lead})
    return {"test/baselines": _table(rows)} if rows else {}


def _matrix(split: str, labels: Sequence[int], predicted: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """Return W&B's chart of the confusion matrix; nothing if it would show only a part."""
    import wandb

    # W&B cuts a table after this many rows, and a chart of part of a matrix would be wrong.
    if len(names) ** 2 > TABLE_ROWS:
        return {}
    chart = wandb.plot.confusion_matrix(
        y_true=list(labels), preds=list(predicted), class_names=list(names), title=split.capitalize()
    )
    return {f"{split}/confusion_matrix": chart}


def _confused(
    logits: np.ndarray, labels: Sequence[int], texts: Sequence[str] | None, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the labels most often confused: one row per example text, or without texts one per pair of labels."""
    pairs = confusions(logits, labels, names, texts if texts is not None else [""] * len(labels), most=20)
    return [
        {key: pair[key] for key in ("true", "predicted", "count", "share")} | example
        for pair in pairs
        for example in (pair["examples"] if texts is not None else [{}])
    ]


def _table(rows: list[dict[str, Any]]) -> wandb.Table:
    import wandb

    columns: list[str | int] = list(rows[0]) if rows else ["nothing was confused"]
    return wandb.Table(columns=columns, data=[list(row.values()) for row in rows])


def _wanted(spec: TrackingSpec) -> str | None:
    """Return W&B's mode for a run, or None where it is not to be tracked there."""
    return wandb_mode(spec.wandb) if "wandb" in spec.trackers else None


def wandb_mode(wanted: str) -> str | None:
    """Return W&B's mode: `online`, `offline`, or None for no tracking.

    Args:
        wanted: `auto`, `online`, `offline` or `none`, as in `TrackingSpec`. `auto` is no tracking if the environment's
            `WANDB_DISABLED` is true, and what its `WANDB_MODE` says if that is set; else `online` if the user is logged
            in (`WANDB_API_KEY`, or a key that `wandb login` has left), and `offline` otherwise.
    """
    if wanted == "none":
        return None
    if wanted != "auto":
        return wanted
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return None
    asked = os.environ.get("WANDB_MODE")
    if asked:
        return {"disabled": None, "dryrun": "offline"}.get(asked, asked)
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        # wandb keeps its key in the file that NETRC names, if it is set.
        keys, own = netrc.netrc(os.environ.get("NETRC")), os.environ.get("WANDB_BASE_URL")
        if any(map(keys.authenticators, [urlsplit(own).netloc] if own else HOSTS)):
            return "online"
    return "offline"
