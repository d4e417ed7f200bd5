"""W&B: what a run logs besides its folder; offline without a login, online with one."""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from . import evaluation, records
from .errors import KitError
from .experiment import Experiment

if TYPE_CHECKING:
    import numpy as np
    import wandb

logger = logging.getLogger(__name__)

# How long W&B's server may take to let us in before a run goes on without it.
INIT_SECONDS = 30
# What W&B shows of one table.
TABLE_ROWS = 10_000
# The file of a run folder that says which W&B run its training was logged in.
FILE = "tracking.json"
# Before it an offline part did not say that it goes on with a run, and replaced what the run had (wandb/wandb#4624).
RESUMES_OFFLINE = Version("0.31")


@contextlib.contextmanager
def opened(experiment: Experiment, out: Path, name: str) -> Iterator[wandb.Run | None]:
    """Open a W&B run for a block, online only where the user is logged in or asked for it.

    Args:
        experiment: Says whether, and in which project; it is the run's config.
        out: Folder of run folders, which W&B makes its own folder `wandb/` in.
        name: Name of the run and of its folder, which is told which W&B run it is (see `log_test`).

    Yields:
        The run, or None for no tracking. transformers' own callback logs into it.

    Raises:
        KitError: When `online` was asked for and W&B does not let us in. With `auto` that run is offline instead.
    """
    mode = wandb_mode(experiment.tracking.wandb)
    if mode is None:
        # Of an earlier part of the training, which was cut off and tracked.
        (out / name / FILE).unlink(missing_ok=True)
        yield None
        return
    run = _init(experiment, out, name, mode)
    note = {"schema": records.SCHEMA, "id": run.id, "offline": run.offline, "steps": 0}
    records.write_json(out / name / FILE, note)
    try:
        yield run
        # Its steps, of which each log is one, not the Trainer's.
        records.write_json(out / name / FILE, note | {"steps": run.step})
        run.finish()
    except BaseException:
        run.finish(exit_code=1)
        raise


def _init(experiment: Experiment, out: Path, name: str, mode: str, resumed: str | None = None) -> wandb.Run:
    """Open a new run, or go on with the one of that id, beside whichever run the user has open."""
    import wandb

    out.mkdir(parents=True, exist_ok=True)
    try:
        return wandb.init(
            project=experiment.tracking.project,
            name=name,
            dir=str(out),
            mode=mode,  # type: ignore[arg-type]  # one of those
            config=experiment.to_dict(),
            settings=wandb.Settings(console="off", silent=mode == "offline", init_timeout=INIT_SECONDS),
            id=resumed,
            resume="allow" if resumed else None,
            # transformers' callback logs into the run that is open; into a resumed one nobody does but ourselves.
            reinit="create_new" if resumed else "finish_previous",
        )
    except wandb.Error as error:
        reason = " ".join(str(error).split())[:200]
        if mode != "online" or experiment.tracking.wandb == "online":
            raise KitError(
                f"W&B does not open a run: {reason}. Log in with `wandb login`, or set tracking.wandb to offline or "
                "none"
            ) from error
        logger.warning("W&B does not open an online run (%s); this one is offline (see `wandb sync`).", reason)
        return _init(experiment, out, name, "offline", resumed)


def log_validation(
    run: wandb.Run | None, logits: np.ndarray, labels: Sequence[int], texts: Sequence[str], names: Sequence[str]
) -> None:
    """Log how a trained model does on the validation rows, label by label, as W&B's own charts and tables.

    Args:
        run: The open run; with None nothing is done.
        logits: Of the validation rows, `[rows, classes]`.
        labels: Their true classes `[rows]`.
        texts: Their texts `[rows]`. Those that the model is most wrong about go to W&B with the table: to its
            servers only where the run is online.
        names: Label of each class.
    """
    if run is None:
        return
    run.log(
        {
            "validation/per_label": _table(evaluation.per_label(logits, labels, names)),
            "validation/confusions": _table(_confused(logits, labels, texts, names)),
            **_matrix("validation", labels, logits.argmax(axis=1).tolist(), names),
        }
    )


def log_test(run: records.Run, labels: Sequence[int], result: Mapping[str, Any]) -> None:
    """Log a run's test in the W&B run that its training was logged in: nothing where that was not tracked.

    What was trained offline is tested offline, in a second folder of the same W&B run: `wandb sync` makes one of both.

    Args:
        run: A finished run.
        labels: True classes of the test rows `[rows]`.
        result: What `evaluate` writes. Its texts are not logged.

    Raises:
        KitError: When `online` was asked for and W&B does not let us in; when the folder's note is damaged.
    """
    mode, note = wandb_mode(run.experiment.tracking.wandb), run.path / FILE
    if mode is None or not note.is_file():
        return
    begun = records.read_json(note)
    # It becomes part of a folder's name.
    named = isinstance(begun, dict) and re.fullmatch(r"[\w-]{1,64}", str(begun.get("id")))
    if not named or not isinstance(begun.get("steps"), int):
        raise KitError(f"{note} names no W&B run: delete it, and the test is not logged")
    import wandb

    if begun.get("offline"):
        mode = "offline"
    if mode == "offline" and Version(wandb.__version__) < RESUMES_OFFLINE:
        logger.warning(
            "W&B %s cannot go on with an offline run, so the test is not logged in it: pip install 'wandb>=%s'.",
            *(wandb.__version__, RESUMES_OFFLINE),
        )
        return
    tracked = _init(run.experiment, run.path.parent, run.path.name, mode, resumed=begun["id"])
    tracked.log(
        {
            **_numbers("test", result["metrics"]["test"]),
            "test/per_label": _table(result["per_label"]),
            **_against(result["metrics"]["baselines"]),
            **_matrix("test", labels, result["predictions"]["test"], result["labels"]),
            "train/global_step": run.training["steps"],  # what transformers' callback has for a horizontal axis
        },
        # An offline part does not know how many steps there were; two rows of one step would be one too many.
        step=max(begun["steps"], tracked.step),
    )
    tracked.finish()


def _numbers(name: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics as W&B takes them: a number each, the ends of an interval too."""
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
    """Return W&B's chart of the confusion matrix; nothing where it would show a part."""
    import wandb

    # W&B cuts a table after that many rows, and a chart of part of a matrix would say something else.
    if len(names) ** 2 > TABLE_ROWS:
        return {}
    chart = wandb.plot.confusion_matrix(
        y_true=list(labels), preds=list(predicted), class_names=list(names), title=split.capitalize()
    )
    return {f"{split}/confusion_matrix": chart}


def _confused(
    logits: np.ndarray, labels: Sequence[int], texts: Sequence[str], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return one row an example of the labels that are most often taken for one another."""
    return [
        {key: pair[key] for key in ("true", "predicted", "count", "share")} | example
        for pair in evaluation.confusions(logits, labels, names, texts, most=20)
        for example in pair["examples"]
    ]


def _table(rows: list[dict[str, Any]]) -> wandb.Table:
    import wandb

    columns: list[str | int] = list(rows[0]) if rows else ["nothing was confused"]
    return wandb.Table(columns=columns, data=[list(row.values()) for row in rows])


def wandb_mode(wanted: str) -> str | None:
    """Return W&B's mode: `online`, `offline`, or None for no tracking.

    Args:
        wanted: `auto`, `online`, `offline` or `none`, as in `TrackingSpec`. `auto` is `online` where the user
            is logged in (`WANDB_API_KEY`, or `wandb login` has left a key) and `offline` otherwise;
            the environment's `WANDB_MODE` decides before that.
    """
    if wanted == "none":
        return None
    if wanted != "auto":
        return wanted
    asked = os.environ.get("WANDB_MODE")
    if asked:
        return {"disabled": None, "dryrun": "offline"}.get(asked, asked)
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        # wandb keeps its key where NETRC says, if it says.
        if netrc.netrc(os.environ.get("NETRC")).authenticators("api.wandb.ai"):
            return "online"
    return "offline"
