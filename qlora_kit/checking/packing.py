"""Pack many small numbers into a short text, so that a record can hold the raw data of its figures.

The text is e.g. `u1:eJz...`: numpy's name of the type (little-endian), and the bytes, compressed by zlib, in base64. It
can be read without numpy: `zlib.decompress(base64.b64decode(text.partition(":")[2]))`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import KitError

if TYPE_CHECKING:
    import numpy as np

KINDS = {"u1": "classes", "u2": "more than 256 classes", "u8": "nanoseconds", "f8": "other numbers"}
MOST_BYTES = 2**26  # unpacked: a record from a stranger must not fill the memory


def pack(values: Sequence[Any] | np.ndarray, kind: str) -> str:
    """Return numbers as a text.

    Args:
        values: The numbers, `[n]`.
        kind: One of `KINDS`; all but `f8` are for whole numbers.

    Raises:
        KitError: For an unknown kind, or numbers that it cannot hold exactly.
    """
    import numpy as np

    if kind not in KINDS:
        raise KitError(f"numbers are packed as one of {', '.join(KINDS)}, not as {kind}")
    given = np.asarray(values)
    packed = given.astype(f"<{kind}")
    if given.ndim != 1 or not (packed == given).all():
        raise KitError(f"these are no numbers in one row that {kind} holds exactly")
    return f"{kind}:{base64.b64encode(zlib.compress(packed.tobytes(), 9)).decode()}"


def pack_classes(classes: Sequence[int] | np.ndarray) -> str:
    """Return predicted or true classes `[rows]` as a text: compressed, one byte each (two for 256 classes or more)."""
    return pack(classes, "u1" if max(classes, default=0) < 256 else "u2")


def unpack(text: str) -> np.ndarray:
    """Return the numbers `[n]` in a text that `pack` made.

    Raises:
        KitError: For any other text, or one that would take more than 64 MiB.
    """
    import numpy as np

    kind, _, content = text.partition(":")
    try:
        if kind not in KINDS:
            raise ValueError(f"it starts with {kind[:10]!r}, and not with one of {', '.join(KINDS)}")
        reader = zlib.decompressobj()
        found = reader.decompress(base64.b64decode(content, validate=True), MOST_BYTES)
        if not reader.eof:
            raise ValueError("it is cut off, or takes more than 64 MiB")
        return np.frombuffer(found, f"<{kind}")
    except (ValueError, zlib.error, binascii.Error) as error:
        raise KitError(f"these are no packed numbers: {error}") from error


def checksum(classes: Sequence[int] | np.ndarray) -> str:
    """Return the SHA-256 of classes `[rows]`, as signed whole numbers of 64 bits."""
    import numpy as np

    return hashlib.sha256(np.asarray(classes, "<i8").tobytes()).hexdigest()
