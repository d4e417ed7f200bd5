"""The pictures of results/, and whether they show what their record has."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import zlib
from typing import Any

from addressing import ROOT, Records

PICTURES = ("accuracy", "schemes", "speed")
"""Records that have a picture beside them."""


def picture(name: str, records: Records) -> Any:
    """Return the figure of a record.

    Args:
        name: One of `PICTURES`.
        records: Where it is read.
    """
    from qlora_kit import plots

    record = records.load(name)
    if name == "accuracy":
        sys.path.insert(0, str(ROOT / "benchmarks"))
        import accuracy

        return accuracy.figure(record)
    return plots.schemes(record["rows"]) if name == "schemes" else plots.speed(record["rows"], record.get("limit", ()))


def digest(figure: Any) -> str:
    """Return a checksum of what a figure shows: its words and its data, not its pixels, which differ by machine."""

    def plain(values: Any) -> Any:
        return [plain(value) for value in values] if hasattr(values, "__len__") else f"{float(values):.6g}"

    shown: list[Any] = [figure.get_suptitle(), figure.get_supxlabel()]
    shown += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        shown += [axes.get_title(loc="left"), axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
        shown += [text.get_text() for text in axes.texts]
        shown += [list(getattr(axis.get_major_formatter(), "seq", [])) for axis in (axes.xaxis, axes.yaxis)]
        shown += [plain(line.get_xydata()) for line in axes.lines]
        shown += [plain(patch.get_bbox().bounds) for patch in axes.patches if hasattr(patch, "get_bbox")]
        shown += [plain(points.get_offsets()) for points in axes.collections]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def png(figure: Any) -> bytes:
    """Return a figure as PNG that holds the checksum of what it shows."""
    bytes_ = figure.png()
    text = b"tEXt" + b"Shows\0" + digest(figure).encode()
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    end = bytes_.rindex(b"IEND") - 4
    return bytes(bytes_[:end] + chunk + bytes_[end:])


def stale_pictures(records: Records) -> list[str]:
    """Return the names of the pictures that do not show what their record has."""
    found = []
    for name in PICTURES:
        path = records.folder / f"{name}.png"
        if not path.is_file() or b"Shows\0" + digest(picture(name, records)).encode() not in path.read_bytes():
            found.append(name)
    return found
