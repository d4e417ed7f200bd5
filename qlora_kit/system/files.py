"""Write files safely.

Each file is written under a temporary name, synced and renamed, so that it is complete or absent. A folder is locked
while it is written. Nothing is written through a link that leads elsewhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import functools
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import KitError
from .arguments import a_path, takes
from .environment import FULL
from .home import instead_of_home, is_writable


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_once(file: Path) -> str:
    """Return `sha256` of a file that is asked for many times; it is read again only if the file has changed."""
    found = file.stat()
    return _sha256_of(file, found.st_size, found.st_mtime_ns)


@functools.lru_cache
def _sha256_of(file: Path, size: int, changed: int) -> str:
    return sha256(file)


logger = logging.getLogger(__name__)
PARTIAL = ".partial"  # ending of a file's name while it is being written
# Errors of a file system without locks: a mounted cloud drive, or a network drive without its lock service.
NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK}
WANDB_RUN = re.compile(r"(offline-)?run-\d{8}_\d{6}-\w+")  # W&B's names for run folders


# --- files ------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Return `value` as JSON types: dicts, lists, strings, finite numbers, booleans, None.

    Dataclasses become dicts; paths become strings; numpy and torch scalars and arrays become numbers and lists; numbers
    that are not finite become None.

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


@takes(path=a_path("record.json"))
def write_json(path: str | Path, value: Any) -> None:
    """Write JSON to a temporary file, sync it, and rename it to `path`.

    Args:
        path: The file; its folder is created if it is missing.
        value: Anything that `plain` takes.

    Raises:
        KitError: When the disk is full. The old file stays unchanged.
    """
    write_text(path, as_json(value))


def as_json(value: Any) -> str:
    """Return the text that `write_json` writes for a value."""
    return json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text to a temporary file, sync it, and rename it to `path` (see `write_json`)."""
    path = Path(path)
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
        try:
            with open(aside, "x", encoding="utf-8", newline="") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def drop_partial(folder: Path) -> None:
    """Delete the files that a killed process left half written; no other process may be using the folder."""
    for left in folder.glob(f".*{PARTIAL}"):
        if left.is_file():
            left.unlink(missing_ok=True)


def move_into_place(made: Path, target: Path) -> None:
    """Sync everything under `made` to the disk and rename it to `target`: all of it appears, or nothing.

    Files get the permissions of a new file: some libraries make theirs readable only by the user. If another process
    was faster, its folder stays and `made` is deleted.
    """
    mode = _mode_of_new_files(made)
    for item in sorted(made.rglob("*")):
        if item.is_file():
            item.chmod(mode)
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
        Its new path.
    """
    stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    target, count = path.with_name(f"{path.name}-{stamp}"), 1
    while target.exists():
        count += 1
        target = path.with_name(f"{path.name}-{stamp}-{count}")
    path.rename(target)
    return target


def _mode_of_new_files(folder: Path) -> int:
    # Reading the umask would mean setting it, for every thread.
    probe = folder / f".{secrets.token_hex(4)}{PARTIAL}"
    with open(probe, "x") as stream:
        mode = os.fstat(stream.fileno()).st_mode & 0o777
    probe.unlink()
    return mode


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some file systems cannot sync a folder; the rename is still atomic.
        if path.is_file():
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def saving(path: str | Path) -> Iterator[None]:
    """Turn errors of a full or read-only disk into one clear error, in a block that saves to `path`.

    Raises:
        KitError: When the disk is full or writing is not allowed. Other errors are raised unchanged.
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
        if number in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            raise KitError(f"{path} cannot be written: {os.strerror(number)}. Choose another folder") from error
        # The folder itself cannot be made (below /proc, name too long). A missing file elsewhere has nothing to do with
        # the place to save.
        aims = {str(Path(path)), *map(str, Path(path).parents)}
        if isinstance(error, OSError) and str(error.filename) in aims:
            raise KitError(f"{path} cannot be made: {os.strerror(number or 0)}. Choose another folder") from error
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this process; a second process gets an error instead of writing into it.

    On a file system without locks, a warning says so and the block runs.

    Raises:
        KitError: When another process has locked it, or it cannot be locked for another reason.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # A folder from a stranger must not lead elsewhere: follow no link, truncate no file.
            descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise KitError(f"{folder / '.lock'} is a symbolic link: delete it, or choose another folder") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                words = f"another process is writing into {folder}; wait for it or choose another name"
            else:
                words = f"{folder} cannot be locked: {os.strerror(error.errno or 0)}. Choose another folder"
            raise KitError(words) from error
        logger.warning("%s is on a file system without locks: let no other process write into it meanwhile.", folder)
    try:
        yield
    finally:
        # Remove the folder if nothing was written. (It may have been moved in the meantime.)
        with contextlib.suppress(OSError):
            if os.listdir(folder) == [".lock"]:
                os.unlink(folder / ".lock")
                folder.rmdir()
        os.close(descriptor)


def has_file_locks(folder: Path) -> bool:
    """Return whether files in a folder can be locked as SQLite does it (POSIX locks; `locked` uses another kind)."""
    try:
        import fcntl
    except ImportError:  # Windows has locks of its own
        return True
    with tempfile.TemporaryFile(dir=folder) as file:  # no other process can hold it
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def refuse_links(folder: Path) -> None:
    """Refuse a run folder that is or contains a symbolic link: files would be written elsewhere.

    Raises:
        KitError: For a link; the message names the first.
    """
    # os.walk lists links to folders but does not follow them.
    inside = (Path(root) / name for root, folders, files in os.walk(folder) for name in sorted(folders + files))
    for item in (folder, *inside):
        if item.is_symlink():
            raise KitError(f"{item} is a symbolic link, and a run folder holds none: choose another name or folder")


def refuse_ways_out(folder: Path) -> None:
    """Refuse a folder that contains a symlink pointing outside it.

    The folder itself may be a symlink, because the user named it. W&B's own run folders are not checked: each contains
    a link to W&B's log, and their names are always new, so that nothing is written into an existing one.

    Raises:
        KitError: For such a link; the message names the first.
    """
    home = folder.resolve()
    for root, folders, files in os.walk(folder):
        if os.path.basename(root) == "wandb":
            folders[:] = [name for name in folders if not WANDB_RUN.fullmatch(name)]
        for item in (Path(root) / name for name in sorted(folders + files)):
            # realpath, because Path.resolve raises for circular links.
            if item.is_symlink() and not Path(os.path.realpath(item)).is_relative_to(home):
                raise KitError(
                    f"{item} is a symbolic link that leads out of {folder}: delete it, or choose another folder"
                )


def cache_folder() -> Path:
    """Return the folder for converted weights: `QLORA_KIT_CACHE`, or `~/.cache/qlora_kit`.

    Where neither is there and nothing can be written into the home, it is a folder of this process alone.
    """
    if told := os.environ.get("QLORA_KIT_CACHE"):
        return Path(told)
    folder = Path.home() / ".cache" / "qlora_kit"
    # A folder that somebody has filled may be read, though nothing can be added to it.
    if folder.is_dir() or is_writable(folder):
        return folder
    return instead_of_home() / ".cache" / "qlora_kit"
