"""W&B: what a run logs besides its folder; offline without a login, online with one."""

from __future__ import annotations

import contextlib
import netrc
import os
from collections.abc import Iterator
from pathlib import Path

from .experiment import Experiment


@contextlib.contextmanager
def opened(experiment: Experiment, out: Path, name: str) -> Iterator[bool]:
    """Open a W&B run for a block, online only where the user is logged in or asked for it."""
    mode = wandb_mode(experiment.tracking.wandb)
    if mode is None:
        yield False
        return
    import wandb

    out.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=experiment.tracking.project,
        name=name,
        dir=str(out),
        mode=mode,  # type: ignore[arg-type]  # one of those
        config=experiment.to_dict(),
        settings=wandb.Settings(console="off", silent=mode == "offline"),
        reinit="finish_previous",
    )
    try:
        yield True
        run.finish()
    except BaseException:
        run.finish(exit_code=1)
        raise


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
