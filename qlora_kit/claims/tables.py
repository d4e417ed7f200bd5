"""Verdicts as tables, text and records."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from ..system.files import plain
from .claims import QUOTED
from .judging import ARITHMETIC, REPORT, Verdict
from .limits import EXPLAINED, METHODS, RECIPE
from .records import Records, grouped, memory_rows

_ALIKE = (
    "source", "model", "precision", "batch", "length", "graphs", "lean", "embeddings", "prepare_for_kbit_training",
    "limit_bytes", "cublas_workspace", "checkpointing",
)  # fmt: skip


def table(verdicts: Sequence[Verdict], most: int = 3, between: str = "; ") -> list[dict[str, Any]]:
    """Return verdicts as rows of a readable table.

    Args:
        verdicts: What `check` returned, or some of it.
        most: How many figures to show for each; the record has all.
        between: What stands between two figures or devices; a line break gives each a line of its own.

    Returns:
        Rows with `#`, `claim`, `says` (its source), `measured`, `device`, `verdict`, `because`.
    """
    return [
        {
            "#": verdict.claim.name,
            "claim": verdict.claim.text,
            "says": verdict.claim.says,
            "measured": between.join(map(str, verdict.finding.figures[:most])),
            "device": (between if "\n" in between else ", ").join(verdict.devices[:most]),
            "verdict": verdict.finding.verdict,
            "because": verdict.finding.reason,
        }
        for verdict in verdicts
    ]


def markdown(verdicts: Sequence[Verdict]) -> str:
    """Return verdicts as a Markdown table: the claim, its source, the verdict, and the records that decided."""
    from ..plots.style import short_device

    rows = ["| | it is said that | by | verdict | decided by |", "|---|---|---|---|---|"]
    for verdict in verdicts:
        decided = dict.fromkeys(
            figure.source if figure.device == ARITHMETIC else f"{figure.source} ({short_device(figure.device)})"
            for figure in verdict.finding.figures
        )
        claim = verdict.claim
        rows.append(
            f"| {claim.name} | {claim.text} | {claim.says} | {verdict.finding.verdict} | {', '.join(decided)} |"
        )
    return "\n".join(rows)


def lines(verdicts: Sequence[Verdict], *groups: str) -> str:
    """Return the verdicts of some groups as text: claim and source, verdict, and reason."""
    chosen = [verdict for verdict in verdicts if verdict.claim.group in groups]
    return "\n\n".join(
        "\n".join(
            textwrap.fill(text, 100, initial_indent=first, subsequent_indent="     ")
            for text, first in (
                (f"{verdict.claim.text} ({verdict.claim.says})", f"{verdict.claim.name + '.':4} "),
                (f"{verdict.finding.verdict.upper()}: {verdict.finding.reason}", "     "),
            )
        )
        for verdict in chosen
    )


def to_record(verdicts: Sequence[Verdict]) -> dict[str, list[dict[str, Any]]]:
    """Return verdicts as the sections `claims` and `figures` of a notebook's record: rows of two tables."""
    claims = [
        {
            "number": verdict.claim.number,
            "part": verdict.claim.part,
            "claim": verdict.claim.text,
            "says": verdict.claim.says,
            "verdict": verdict.finding.verdict,
            "reason": verdict.finding.reason,
            "devices": list(verdict.devices),
            "command": verdict.finding.command or None,
        }
        for verdict in verdicts
    ]
    figures = [
        {"claim": verdict.claim.number, "part": verdict.claim.part, "decided": decided, **plain(figure)}
        for verdict in verdicts
        for figure, decided in (
            *((figure, True) for figure in verdict.finding.figures),
            *((figure, False) for figure in verdict.finding.beside),
        )
    ]
    return {"claims": claims, "figures": figures}


def settings() -> list[dict[str, Any]]:
    """Return the settings of the explained run beside those of the preset that reproduces it.

    Returns:
        Rows with `setting`, `explained`, `says` (its source), `preset` (the value in the kit's preset) and `equal`.
    """
    from ..config.preset import preset

    spec = preset(RECIPE).to_dict()
    found = []
    for name, value, says in QUOTED:
        node: Any = spec
        for key in name.split("."):
            node = node[key]
        ours = tuple(node) if isinstance(node, list) else node
        found.append({"setting": name, "explained": value, "says": says, "preset": ours, "equal": ours == value})
    return found


def attributed(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Return claims and settings that come from the run's later report, not from the explanation.

    Args:
        verdicts: What `check` returned.

    Returns:
        Rows with `what` and `where` (a claim's number, or the preset that has the setting).
    """
    found = [
        {"what": verdict.claim.text, "where": f"claim {verdict.claim.name}"}
        for verdict in verdicts
        if verdict.claim.says == REPORT
    ]
    return found + [
        {"what": f"{row['setting']}: {row['explained']}", "where": f"preset {RECIPE}"}
        for row in settings()
        if row["says"] == REPORT
    ]


def plans(records: Records) -> Iterator[dict[str, Any]]:
    """Yield rows for `plots.memory_parts` that show QLoRA, LoRA and full fine-tuning at one shape.

    They are measured rows of one record and device if there are any, preferably of the explained step, then of this
    machine; else the computed plans for a T4.
    """
    groups = grouped(memory_rows(records), *_ALIKE)
    shown = []
    for key, group in groups.items():
        ways = {
            row["method"]: row for row in group
            if row["method"] in METHODS and row.get("double_quantization") is not False
            and row["scheme"] == ("nf4" if row["method"] == "qlora" else "none")
        }  # fmt: skip
        if len(ways) > 1:
            row = next(iter(ways.values()))
            explained = row["model"] == EXPLAINED and (row["batch"], row["length"]) == (8, 128)
            checkpointed = bool(row.get("checkpointing"))
            rank = (not explained, row["device"] != records.device, not checkpointed, -len(ways), str(key))
            shown.append((rank, ways))
    if shown:
        ways = min(shown, key=lambda item: item[0])[1]
        for method in (name for name in METHODS if name in ways):
            row = ways[method]
            label = f"{METHODS[method]}, {row['batch']} x {row['length']}"
            yield {"label": label, "parts": row["parts"], "measured": row["peak_bytes"], "device": row["device"]}
        return
    for method, way in records.computed.get("ways", {}).items():
        label = f"{METHODS[method]}, {way['batch']} x {way['length']}"
        yield {"label": label, "parts": way["parts"], "device": f"planned for a {way['device']}"}
