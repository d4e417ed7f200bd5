"""Where a notebook's kernel runs: Colab, Kaggle or the user's own machine."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Host:
    """The service that runs the kernel.

    Args:
        name: Its name; empty for the user's own machine.
        restart: The menu path to restart a kernel.
        gpu: The menu path to choose a GPU; empty if there is none.
    """

    name: str
    restart: str
    gpu: str = ""


COLAB = Host("Colab", "Runtime > Restart session", "Runtime > Change runtime type > T4 GPU")
KAGGLE = Host("Kaggle", "Run > Restart & clear cell outputs", "Settings > Accelerator > GPU T4 x2")
OWN = Host("", "Kernel > Restart")  # Jupyter, VS Code, or the runner


def host() -> Host:
    """Return the service that runs this kernel."""
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:  # first, because Kaggle's image is built from Colab's
        return KAGGLE
    return COLAB if "google.colab" in sys.modules else OWN  # Colab's kernel has imported it


DRIVE = Path("/content/drive")  # the usual mount point of Google Drive in Colab


def on_drive(folder: str | Path) -> bool:
    """Return whether a folder is on the Google Drive mounted in Colab."""
    return Path(folder).is_relative_to(DRIVE)
