"""Run folders and records: what was done, with what, and what came of it.

Everything here is written aside, synced and renamed, so that a file either is whole or is not there; and read
without unpickling anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import KitError, nearest
from .experiment import Experiment

if TYPE_CHECKING:
    import numpy as np
    import torch

SCHEMA = 1
# What safetensors, tokenizers and torch say of a disk that is full: they write by themselves and raise no OSError.
FULL = re.compile("No space left on device|Disk quota exceeded|iostream error|inline_container")
PARTIAL = ".partial"  # how the name of a file ends while it is being written
WANDB_RUN = re.compile(r"(offline-)?run-\d{8}_\d{6}-\w+")  # how W&B names a run's folder
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

# --- files ------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Return `value` as what JSON knows: dicts, lists, strings, finite numbers, booleans, None.

    Dataclasses become dicts, paths strings, numpy and torch scalars and arrays numbers and lists; a number that
    is not finite becomes None.

    Raises:
        TypeError: For anything else.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (Path, os.PathLike)):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, (Sequence, set, frozenset)):
        return [plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON aside, sync it, and rename it into place.

    Args:
        path: The file; its folder is made where it is missing.
        value: Anything that `plain` takes.

    Raises:
        KitError: When there is no room on the disk. What was there before stays as it was.
    """
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file aside, sync it, and rename it into place (see `write_json`)."""
    path = Path(path)
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
        try:
            with open(descriptor, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(aside, 0o644)
            os.replace(aside, path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
        _sync(path.parent)


def drop_partial(folder: Path) -> None:
    """Delete the files in a folder that a killed process was writing; the folder must be this process's alone."""
    for left in folder.glob(f".*{PARTIAL}"):
        if left.is_file():
            left.unlink(missing_ok=True)


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        KitError: When it is missing or is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise KitError(f"{path} is missing") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise KitError(f"{path} is no JSON: {error}") from error


def move_into_place(made: Path, target: Path) -> None:
    """Sync everything under `made` to the disk and rename it to `target`: all of it is there, or none.

    Where another process was faster, its folder stays and `made` is dropped.
    """
    for item in sorted(made.rglob("*")):
        _sync(item)
    _sync(made)
    try:
        os.rename(made, target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(made)
    _sync(target.parent)


def move_aside(path: Path) -> Path:
    """Rename a file or folder to `NAME-DATE`, so that nothing is overwritten.

    Returns:
        Where it is now.
    """
    stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    target, count = path.with_name(f"{path.name}-{stamp}"), 1
    while target.exists():
        count += 1
        target = path.with_name(f"{path.name}-{stamp}-{count}")
    path.rename(target)
    return target


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some file systems cannot sync a folder; the rename is atomic all the same.
        if path.is_file():
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def saving(path: str | Path) -> Iterator[None]:
    """Turn a full or read-only disk into one clear error for a block that saves to `path`.

    Raises:
        KitError: When the disk is full, or nothing may be written there. Other errors come through.
    """
    try:
        yield
    except KitError:
        raise
    except Exception as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or (number is None and FULL.search(str(error))):
            raise KitError(
                f"there is no room left on the disk for {path}. What was saved before is whole; make room (or "
                "choose another folder) and run the same command again"
            ) from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise KitError(f"{path} cannot be written: {os.strerror(number)}. Choose another folder") from error
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; a second one is told so instead of writing into it.

    Raises:
        KitError: When another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # A folder that comes from a stranger must not lead elsewhere: no link is followed, nothing is emptied.
            descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise KitError(f"{folder / '.lock'} is a symbolic link: delete it, or choose another folder") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise KitError(f"another process is writing into {folder}; wait for it or choose another name") from error
    try:
        yield
    finally:
        # What was refused before anything was written leaves no folder behind. (It may have been moved meanwhile.)
        with contextlib.suppress(OSError):
            if os.listdir(folder) == [".lock"]:
                os.unlink(folder / ".lock")
                folder.rmdir()
        os.close(descriptor)


def refuse_links(folder: Path) -> None:
    """Refuse a run folder that is or holds a symbolic link: what is written into it would land elsewhere.

    Raises:
        KitError: Naming the first.
    """
    # os.walk follows no link to a folder, and lists it.
    inside = (Path(root) / name for root, folders, files in os.walk(folder) for name in sorted(folders + files))
    for item in (folder, *inside):
        if item.is_symlink():
            raise KitError(f"{item} is a symbolic link, and a run folder holds none: choose another name or folder")


def refuse_ways_out(folder: Path) -> None:
    """Refuse a folder with a symbolic link in it that leads out of it, and so what is written through it.

    The folder itself may be one, for whoever named it knows where it leads. W&B's own run folders are left out: each
    holds a link to W&B's log, and their names are new each time, so that nothing is written into one that is there.

    Raises:
        KitError: Naming the first.
    """
    home = folder.resolve()
    for root, folders, files in os.walk(folder):
        if os.path.basename(root) == "wandb":
            folders[:] = [name for name in folders if not WANDB_RUN.fullmatch(name)]
        for item in (Path(root) / name for name in sorted(folders + files)):
            # realpath, since Path.resolve raises at links that lead in a circle.
            if item.is_symlink() and not Path(os.path.realpath(item)).is_relative_to(home):
                raise KitError(
                    f"{item} is a symbolic link that leads out of {folder}: delete it, or choose another folder"
                )


# --- where it was made ------------------------------------------------------------------------------------------


def environment(
    device: torch.device | str | None = None,
    *,
    data_checksum: str | None = None,
    base_checksum: str | None = None,
) -> dict[str, Any]:
    """Describe what a record was made with.

    Args:
        device: Where the work was done; None for the CPU.
        data_checksum: SHA-256 of the data.
        base_checksum: SHA-256 of the base's weights, where they are a file.

    Returns:
        Device and CPU by name, threads, versions of Python and the packages, the commit of the code (with
        `+changes` where files differ from it), and checksums.
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
    for package in (*RECORDED_PACKAGES, "qlora_kit"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "device": name,
        "cpu": cpu_name(),
        "threads": threads,
        "versions": versions,
        "commit": commit(),
        "checksums": {"data": data_checksum, "base": base_checksum},
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
    return f"{name}, {cores} core{'s' if cores > 1 else ''}"


@functools.cache
def commit() -> str | None:
    """Return the git commit of the library's source, or None for an installed package."""
    file = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        # A package that is installed inside of somebody's repository is no part of it.
        git("ls-files", "--error-unmatch", "--", file.name)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def notebook_record(
    notebook: str,
    *,
    preset: str,
    experiment: Experiment | None = None,
    metrics: Mapping[str, Any] | None = None,
    memory: Mapping[str, Any] | None = None,
    timing: Mapping[str, Any] | None = None,
    parameters: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """Put a notebook's record together, in the shape that others read.

    Args:
        notebook: Name of the notebook, e.g. `03_evaluate`.
        preset: Name of the preset it ran.
        experiment: The experiment, where it ran one.
        metrics: By split, e.g. `{"test": {"accuracy": {"value": ..., "low": ..., "high": ...}}}`.
        memory: Bytes.
        timing: Seconds and rates.
        parameters: Numbers of parameters, `trainable` and `all`.
        environment: As `environment` returns it.
        **extra: Further sections.

    Returns:
        The record, to be written with `write_json`.

    Raises:
        KitError: For a further section whose name is one of the record's own.
    """
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "notebook": notebook,
        "preset": preset,
        "experiment": experiment.to_dict() if experiment else {},
        "metrics": dict(metrics or {}),
        "memory": dict(memory or {}),
        "timing": dict(timing or {}),
        "parameters": dict(parameters or {}),
        "environment": dict(environment if environment is not None else globals()["environment"]()),
    }
    taken = set(extra) & set(record)
    if taken:
        raise KitError(f"a record has a section {taken.pop()!r} of its own")
    result: dict[str, Any] = plain({**record, **extra})
    return result


# --- run folders ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a run says about some texts.

    Args:
        labels: Predicted label of each text.
        label_ids: The same as ids, int64 `[texts]`.
        probabilities: Softmax of the logits, float64 `[texts, classes]`.
        logits: Float32 `[texts, classes]`.
    """

    labels: list[str]
    label_ids: np.ndarray
    probabilities: np.ndarray
    logits: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


class Run:
    """A finished run's folder.

    Args:
        path: The folder.

    Raises:
        KitError: When the folder is missing or holds no finished run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            siblings = [item.name for item in self.path.parent.iterdir()] if self.path.parent.is_dir() else []
            guess = nearest(self.path.name, siblings)
            hint = f" Did you mean {str(self.path.parent / guess)!r}?" if guess else ""
            raise KitError(f"there is no run folder {str(self.path)!r}.{hint}")
        for name in ("experiment.yaml", "training.json", "adapter", "tokenizer"):
            if not (self.path / name).exists():
                raise KitError(
                    f"{self.path} is no finished run: {name} is missing. Call finetune with the same experiment "
                    "and folder again: it goes on where it stopped"
                )
        self.experiment = Experiment.from_yaml(self.path / "experiment.yaml")
        self._model: Any = None
        self._tokenizer: Any = None

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @functools.cached_property
    def training(self) -> dict[str, Any]:
        """What `training.json` holds: validation metrics by epoch, timing, memory."""
        values: dict[str, Any] = read_json(self.path / "training.json")
        return values

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """What `evaluation.json` holds, or None before `qlora_kit.evaluate`."""
        file = self.path / "evaluation.json"
        return read_json(file) if file.is_file() else None

    @functools.cached_property
    def environment(self) -> dict[str, Any]:
        """What `environment.json` holds: device, versions, checksums."""
        values: dict[str, Any] = read_json(self.path / "environment.json")
        return values

    @property
    def label_names(self) -> list[str]:
        """Names of the classes, in the order of their ids."""
        return [str(name) for name in self.training["labels"]]

    def load(self) -> tuple[Any, Any]:
        """Load the trained model, once.

        Returns:
            The model in eval mode, on the GPU where there is one, and its tokenizer.

        Raises:
            KitError: When the base is not the one that the run was trained on, or weights are missing or do not fit.
        """
        if self._model is None:
            from . import models

            self._check_base()
            self._tokenizer = models.load_tokenizer(self.experiment.model, self.path / "tokenizer")
            self._model = models.load_trained(
                self.experiment,
                self.label_names,
                self.path / "adapter",
                pad_token_id=self._tokenizer.pad_token_id,
            )
        return self._model, self._tokenizer

    def _check_base(self) -> None:
        """Refuse another base than the run was trained on, where both are files whose checksums are known."""
        from . import models

        spec = self.experiment.model
        # A run folder whose records have been left out still predicts; random weights are read from no file.
        if spec.random_weights or not (self.path / "environment.json").is_file():
            return
        trained_on, found = self.environment.get("checksums", {}).get("base"), models.find_base(spec).checksum
        if trained_on and found and trained_on != found:
            raise KitError(
                f"{self.path} was trained on other weights than {spec.name} now holds (checksum {trained_on[:12]}… "
                f"against {found[:12]}…): its adapters mean nothing on these. Bring the base back as it was, or train "
                "again"
            )

    @functools.cached_property
    def evaluation_rows(self) -> int:
        """Texts a forward pass, where nothing else is asked for: what its training's evaluations would have here."""
        from . import models, training

        return training.evaluation_rows(self.experiment, models.default_device().type)

    def predict(
        self, texts: Sequence[str], *, batch_size: int | None = None, progress: str | None = None
    ) -> Predictions:
        """Classify texts.

        Args:
            texts: The texts. A single string is refused, for its letters would be taken for texts.
            batch_size: Texts a forward pass, by default `evaluation_rows`; the result does not depend on it beyond
                rounding.
            progress: Label of a progress bar, or None for none.

        Returns:
            Labels, probabilities and logits, in the order of the texts.

        Raises:
            KitError: For a single string, an empty text, or something that is no text.
        """
        if isinstance(texts, str):
            raise KitError("predict takes a list of texts: write predict([text])")
        texts = list(texts)
        for place, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise KitError(f"text {place} is {text!r}: allowed are texts with at least one visible character")
        import numpy as np

        from . import evaluation, models

        model, tokenizer = self.load()
        device = models.default_device()
        logits = models.forward_texts(
            model,
            tokenizer,
            texts,
            device=device,
            precision=models.precision_of(self.experiment, device),
            max_length=self.experiment.data.max_length,
            batch_size=self.evaluation_rows if batch_size is None else batch_size,
            too_long=self.experiment.data.too_long,
            progress=progress,
        ).reshape(len(texts), len(self.label_names))
        ids = logits.argmax(axis=1) if len(texts) else np.zeros(0, np.int64)
        return Predictions([self.label_names[index] for index in ids], ids, evaluation.probabilities(logits), logits)

    def merge(self, to: str | Path, *, dtype: str = "fp32", progress: bool = True) -> dict[str, Any]:
        """Merge the adapters into the full-precision base, for plain transformers (see `export.merge`)."""
        from . import export

        return export.merge(self, to, dtype=dtype, progress=progress)

    def write_card(self) -> Path:
        """Write the model card anew, with the test's figures once the run is evaluated; return its path."""
        from . import export

        write_text(self.path / "README.md", export.card(self))
        return self.path / "README.md"

    def push_to_hub(self, repo: str, *, private: bool = True, token: str | None = None, merged: bool = False) -> str:
        """Upload adapters, tokenizer, card and records to the hub, or the merged model (see `export.push`)."""
        from . import export

        return export.push(self, repo, private=private, token=token, merged=merged)


def load_run(folder: str | Path) -> Run:
    """Open a finished run's folder; its model is loaded at the first prediction.

    Args:
        folder: The run folder.

    Returns:
        The run.

    Raises:
        KitError: When the folder is missing or holds no finished run.
    """
    return Run(folder)


def newest_run(preset: str, root: str | Path = "runs") -> Path | None:
    """Find the newest finished run of a preset anywhere under a folder.

    Args:
        preset: Name of the experiment.
        root: Where to look.

    Returns:
        Its run folder, or None where there is none.
    """
    found: list[tuple[float, Path]] = []
    for file in Path(root).glob("**/training.json"):
        with contextlib.suppress(KitError, OSError):
            if Run(file.parent).experiment.name == preset:
                found.append((file.stat().st_mtime, file.parent))
    return max(found)[1] if found else None
