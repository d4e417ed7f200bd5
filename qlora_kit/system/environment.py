"""The machine, versions and code commit that a record stores."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .showing import counted
from .versions import VERSION

if TYPE_CHECKING:
    import torch

# Messages of safetensors, tokenizers and torch for a full disk: they have their own writers and raise no OSError.
FULL = re.compile("No space left on device|Disk quota exceeded|iostream error|inline_container")
_COMMIT = r"[0-9a-f]{40,64}"
RECORDED_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "evaluate",
    "scikit-learn",
    "numpy",
    "safetensors",
)


# --- where it was made ------------------------------------------------------------------------------------------


def environment(
    device: torch.device | str | None = None,
    *,
    data_checksum: str | None = None,
    base_checksum: str | None = None,
    base_config_checksum: str | None = None,
) -> dict[str, Any]:
    """Describe the machine, versions and code that a record was made with.

    Args:
        device: Where the work was done; None for the CPU.
        data_checksum: SHA-256 of the data.
        base_checksum: SHA-256 of the base's weights, if they are local.
        base_config_checksum: SHA-256 of the base's configuration, if it is a file that may change.

    Returns:
        Names of device and CPU, threads, versions of Python and the packages, the commit of the code (with
        `+changes` if files differ from it), and checksums.
    """
    kind = str(device) if device is not None else "cpu"
    name = cpu_name()
    threads = None
    if "torch" in sys.modules:
        import torch

        threads = torch.get_num_threads()
        if kind.startswith("cuda"):
            name = torch.cuda.get_device_name(torch.device(kind))
    versions = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    versions["qlora_kit"] = VERSION
    return {
        "device": name,
        "cpu": cpu_name(),
        "threads": threads,
        "versions": versions,
        "commit": commit(),
        "checksums": {
            "data": data_checksum,
            "base": base_checksum,
            **({"base_config": base_config_checksum} if base_config_checksum else {}),
        },
    }


@functools.cache
def cpu_name() -> str:
    """Return the processor's name and number of usable cores, e.g. `AMD EPYC, 2 cores`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {counted(cores, 'core')}"


def is_gpu(device: str) -> bool:
    """Return whether a record's device name is a GPU: a CPU's name ends in its number of cores (`cpu_name`)."""
    return bool(device) and re.search(r"\d cores?$", device) is None


@functools.cache
def commit() -> str | None:
    """Return the git commit of the library's source: of the clone, or the one that pip installed, else None.

    For code copied out of git, set `QLORA_KIT_COMMIT` to its commit.
    """
    told = os.environ.get("QLORA_KIT_COMMIT", "")
    if re.fullmatch(_COMMIT, told):
        return told
    file = Path(__file__).resolve().parents[1] / "__init__.py"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        # A package installed inside another repository does not belong to that repository.
        git("ls-files", "--error-unmatch", "--", file.name)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return _installed_commit(file)


def _installed_commit(file: Path) -> str | None:
    """Return the commit that pip recorded when it installed this package from a repository (PEP 610), or None."""
    try:
        package = importlib.metadata.distribution("qlora_kit")
        # The installed copy of the package may not be the one that runs.
        if Path(str(package.locate_file(f"{file.parent.name}/{file.name}"))).resolve() != file:
            return None
        found = str(json.loads(package.read_text("direct_url.json") or "{}")["vcs_info"]["commit_id"])
    except (importlib.metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        return None
    return found if re.fullmatch(_COMMIT, found) else None
