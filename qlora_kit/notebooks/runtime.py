"""The machine that a notebook runs on: what the set-up cell prints about it, and where results are kept."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import KitError, show_warnings_plainly
from ..system.host import COLAB as COLAB
from ..system.host import DRIVE as DRIVE
from ..system.host import KAGGLE as KAGGLE
from ..system.host import OWN as OWN
from ..system.host import Host as Host
from ..system.host import host, on_drive

# Packages that every notebook needs.
NEEDED = ("torch", "transformers", "peft", "bitsandbytes", "datasets")


def ready() -> None:
    """Print what a notebook has here: the kit's version, W&B's login from Colab's secrets, the GPU or how to get one.

    Raises:
        KitError: When this kernel lacks a package that the kit needs, for example in a clone whose `.venv` is not the
            kernel.
    """
    from ..system.versions import VERSION

    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise KitError(
            f"this kernel's Python, {sys.executable}, lacks {', '.join(missing)}: in a clone run `make venv` once, and "
            "choose .venv/bin/python for the kernel"
        )
    import torch

    warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are plain text then
    show_warnings_plainly()
    print("qlora_kit", VERSION)
    if host() is COLAB and _take_wandb_key():
        print("W&B: logged in with WANDB_API_KEY from Colab's secrets, so runs are logged online.")
    if torch.cuda.is_available():
        _say_gpu()
    elif host().gpu:
        _say_no_gpu()


def _take_wandb_key() -> bool:
    """Copy WANDB_API_KEY from Colab's secrets into the environment; return whether that was done."""
    if os.environ.get("WANDB_API_KEY"):
        return False
    try:
        key = importlib.import_module("google.colab.userdata").get("WANDB_API_KEY")
    except Exception:  # no key, no permission to read it, or no browser to ask in
        return False
    if key:
        os.environ["WANDB_API_KEY"] = key
    return bool(key)


def _say_gpu() -> None:
    import torch

    count, first = torch.cuda.device_count(), torch.cuda.get_device_properties(0)
    others = f" There are {count} GPUs; the kit trains on the first." if count > 1 else ""
    print(f"GPU: {first.name}, {first.total_memory / 2**30:.0f} GiB.{others}")


def _say_no_gpu() -> None:
    from ..config.preset import preset
    from .opening import training_time

    time = training_time(preset("minilm_banking77_qlora"), cuda=False)
    print(
        f"No GPU. For one: {host().gpu}, then run all cells. Without it the notebooks fine-tune MiniLM (23 M "
        f"parameters) on the CPU{f', which took {time}' if time else ''}."
    )


def changed(before: Mapping[str, str], kept: Sequence[str]) -> str | None:
    """Return the reason why a notebook cannot go on after its set-up cell has installed the kit.

    Args:
        before: Versions of the packages by name, taken before the installation.
        kept: Beginnings of the names of packages that should not have changed.

    Returns:
        One line: a package that should not have changed did, or one that was already imported has another version now.
        None if the notebook can go on.
    """
    # Reversed, so that of two packages with one name the first found is kept: Python imports that one.
    after = {package.name: package.version for package in reversed(list(importlib.metadata.distributions()))}
    differ = [name for name in sorted(before) if before[name] != after.get(name)]
    moved = [f"{name} {before[name]} to {after.get(name)}" for name in differ if name.lower().startswith(tuple(kept))]
    if moved:
        return (
            f"The installation has changed what should stay as it is: {', '.join(moved)}. Take a new runtime, and "
            "please report this."
        )
    imported = {
        name
        for module, names in importlib.metadata.packages_distributions().items()
        if module in sys.modules
        for name in names
    }
    stale = [name for name in differ if name in imported]
    if stale:
        return (
            f"Restart the runtime once ({host().restart}), then run all cells: {', '.join(stale)} had been imported "
            "before the installation changed it."
        )
    return None


def place(out: str | Path, *, in_drive: bool = False) -> str:
    """Return where a notebook's results go: `out`, or in Colab, if wanted, a folder on the user's Drive.

    Args:
        out: The folder OUT.
        in_drive: Mount the user's Drive (Colab asks for permission) and use the folder of this name in `qlora_kit` on
            it.

    Returns:
        The folder; it is not created.

    Raises:
        KitError: With `in_drive`: outside Colab, for an absolute path that is not on Drive, or when Drive cannot be
            mounted.
    """
    if not in_drive:
        return str(out)
    if host() is not COLAB:
        raise KitError("keep_in_drive is for Colab, which can mount your Drive: here, let `out` be a folder that stays")
    if Path(out).is_absolute() and not on_drive(out):
        raise KitError(f"out is {str(out)!r}, which is not on Drive: with keep_in_drive allowed is a relative path")
    try:
        importlib.import_module("google.colab.drive").mount(str(DRIVE))
    except Exception as error:
        raise KitError(f"Drive cannot be mounted ({error}): allow it, or set keep_in_drive = False") from error
    return str(DRIVE / "MyDrive" / "qlora_kit" / out)  # a path that is on Drive already stays as it is
