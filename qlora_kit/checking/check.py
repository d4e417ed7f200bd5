"""Compute the figures of the records in results/ again from their raw data.

`python -m qlora_kit check results` reports two kinds of problems. *Wrong*: a figure that does not follow from the raw
data or from other rows; a row that its command does not make, or that is missing; a commit that is not in this
repository. *Not shown*: a figure that cannot be computed again, because the row has no commit, comes from a changed
tree, or lacks its predictions or seconds. The report names the command that makes the rows again.

Some figures have no raw data in any record: bytes counted by an allocator, the time a GPU was busy, a test loss, scores
on validation rows, errors of quantized weights. Only the row's command can measure them again. For these, only
consistency within the record is checked (`consistency`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import KitError, nearest
from ..system.parsing import read_json
from . import consistency, rules_cost, rules_scores
from .record import Record, Report


def check(files: Iterable[str | Path], *, thorough: bool = False) -> Report:
    """Compute the figures of records in results/ again, and compare.

    Args:
        files: The records; they must match their schemas (run `schemas.check` first).
        thorough: Draw all resamples of intervals over rows and seeds again, which takes minutes. Otherwise only the
            first 100,000 are drawn, and the tolerance for the ends is wider.

    Returns:
        The problems, in the order of the files.

    Raises:
        KitError: For a file that is not JSON.
    """
    report, strange = Report(), []
    for path in map(Path, files):
        book = Record(path, read_json(path), thorough, report)
        try:
            book.check()
            _check_figures(book)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
            # A record changed by hand may lack anything; report it and go on.
            what = error if isinstance(error, KitError) else f"it cannot be computed again ({error!r})"
            report.wrong.append(f"{path}: {what}")
        book.close()
        strange += [] if book.in_git else [str(path)]
    if strange:
        report.not_checked.append(f"whether commits are of the main branch, for no git knows {', '.join(strange)}")
    return report


def _check_figures(book: Record) -> None:
    """Compute a record's figures again, if there is a rule for its name."""
    rule = RULES.get(book.name)
    if rule is not None:
        rule(book)
    elif book.name not in consistency.ALIKE:
        known = sorted({*RULES, *consistency.ALIKE})
        near = nearest(book.name, known)
        told = f"nearest is {near}" if near else f"known are {', '.join(known)}"
        book.report.not_checked.append(f"{book.path}: its figures, for no benchmark's record has this name; {told}")


RULES: dict[str, Callable[[Record], None]] = {
    "accuracy": rules_scores.accuracy,
    "tuning": rules_scores.tuning,
    "schemes": rules_scores.schemes,
    "merging": rules_scores.merging,
    "speed": rules_cost.speed,
    "speed_variants": rules_cost.speed,
    "inference": rules_cost.inference,
    "export": rules_cost.exports,
    "int4_step": rules_cost.int4_step,
    "t4": rules_cost.t4,
    "memory": rules_cost.memory,
    "paging": rules_cost.paging,
    "soak": rules_cost.soak,
    "waiting": rules_cost.waiting,
    "mutation": rules_cost.mutation,
    "quantization": rules_cost.quantization,
}
