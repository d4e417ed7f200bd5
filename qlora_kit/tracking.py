"""W&B: what a run logs besides its folder; offline without a login, online with one."""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import evaluation
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


@contextlib.contextmanager
def opened(experiment: Experiment, out: Path, name: str) -> Iterator[wandb.Run | None]:
    """Open a W&B run for a block, online only where the user is logged in or asked for it.

    Args:
        experiment: Says whether, and in which project; it is the run's config.
        out: Folder that W&B makes its own folder `wandb/` in.
        name: Name of the run.

    Yields:
        The run, or None for no tracking. transformers' own callback logs into it.

    Raises:
        KitError: When `online` was asked for and W&B does not let us in. With `auto` that run is offline instead.
    """
    mode = wandb_mode(experiment.tracking.wandb)
    if mode is None:
        yield None
        return
    run = _init(experiment, out, name, mode)
    try:
        yield run
        run.finish()
    except BaseException:
        run.finish(exit_code=1)
        raise


def _init(experiment: Experiment, out: Path, name: str, mode: str) -> wandb.Run:
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
            reinit="finish_previous",
        )
    except wandb.Error as error:
        reason = " ".join(str(error).split())[:200]
        if mode != "online" or experiment.tracking.wandb == "online":
            raise KitError(
                f"W&B does not open a run: {reason}. Log in with `wandb login`, or set tracking.wandb to offline or "
                "none"
            ) from error
        logger.warning("W&B does not open an online run (%s); this one is offline (see `wandb sync`).", reason)
        return _init(experiment, out, name, "offline")


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
    import wandb

    objects: dict[str, Any] = {
        "validation/per_label": _table(evaluation.per_label(logits, labels, names)),
        "validation/confusions": _table(_confused(logits, labels, texts, names)),
    }
    # W&B cuts a table after that many rows, and a chart of part of a matrix would say something else.
    if len(names) ** 2 <= TABLE_ROWS:
        objects["validation/confusion_matrix"] = wandb.plot.confusion_matrix(
            y_true=list(labels), preds=logits.argmax(axis=1).tolist(), class_names=list(names), title="Validation"
        )
    run.log(objects)


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
