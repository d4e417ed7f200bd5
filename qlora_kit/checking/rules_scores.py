"""Compute scores and differences again from predictions, and check the choices of tuning."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from . import packing
from .record import CLOSE_FP32, Record, Row

RESAMPLES = 100_000  # for an interval over rows and seeds; `thorough` draws as many as the record has


def _labels_of(book: Record) -> dict[str, Any]:
    """Return the true classes by checksum, after checking the checksums."""
    import numpy as np

    from ..data.loading import banking77

    found = {}
    for told, packed in book.content.get("labels", {}).items():
        labels = packing.unpack(packed).astype(np.int64)
        book.same("the record", "the checksum of labels", told, packing.checksum(labels))
        found[told] = labels
    of = {id(row): _data_of(row, book) for row in book.rows if "labels" in row and _data_of(row, book)}
    if of:
        known = banking77()
        theirs = packing.checksum(np.asarray(known.test.labels))
        for row in book.rows:
            if of.get(id(row)) == known.checksum:
                book.same(book.where(row), "labels", row["labels"], theirs)
    return found


def _data_of(row: Row, book: Record) -> str | None:
    checksum: str | None = (row.get("environment") or book.content["environment"]).get("checksums", {}).get("data")
    return checksum


def _scored(book: Record, labels: Mapping[str, Any]) -> dict[int, Any]:
    """Compare scores with those of the packed predictions; return the predictions by row index."""
    import numpy as np

    from ..metrics.scores import compute_metrics

    found: dict[int, Any] = {}
    for place, row in enumerate(book.rows):
        if "accuracy" not in row:
            continue
        if not isinstance(row.get("predictions"), str):
            book.lacks(row, "rows without their predictions")
            continue
        found[place] = packing.unpack(row["predictions"]).astype(np.int64)
        scores = compute_metrics(found[place], labels[row["labels"]])
        for key in ("accuracy", "f1_macro"):
            book.same(book.where(row), key, row[key], scores[key])
    return found


def accuracy(book: Record) -> None:
    """Compute scores, means over seeds and differences from the predictions."""
    from ..metrics.scores import metrics

    labels = _labels_of(book)
    predictions = _scored(book, labels)
    groups = book.groups("preset", "device")
    _summary(book, groups, "f1_macro")
    baselines = book.content.get("baselines") or {}
    known: dict[str, Any] = {}
    for name, baseline in baselines.items():
        where = f"baseline {name}"
        best = max(baseline["validation"].items(), key=lambda tried: (tried[1], -float(tried[0])))[0]
        book.same(where, "C", baseline["C"], float(best))
        if "predictions" not in baseline:
            book.lacks(baseline, "baselines without their predictions")
            continue
        known[name] = packing.unpack(baseline["predictions"]).astype("int64")
        for key, value in metrics(known[name], labels[baseline["labels"]]).items():
            book.metric(where, key, baseline[key], value)
    together = []
    for line in book.content.get("differences", []):
        where = f"{line['of']} over {line['over']} ({line['device']})"
        sides = [_Side(line[side], line["device"], book, predictions, known) for side in ("of", "over")]
        lacking = [side.name for side in sides if side.score("f1_macro") is None]
        for name in lacking:
            book.say(f"{where}: the record has nothing of {name} on this device")
        if not lacking and "over_what" in line:
            together.append((line, where))
        elif not lacking:
            _difference(book, line, where, sides[0], sides[1], labels)
    _over_rows_and_seeds(book, together, predictions, known, labels)


class _Side:
    """One side of a difference: the rows of a preset on a device, or a baseline."""

    def __init__(
        self, name: str, device: str, book: Record, predictions: Mapping[int, Any], baselines: Mapping[str, Any]
    ) -> None:
        self.name = name
        places = [place for place, row in enumerate(book.rows) if (row["preset"], row["device"]) == (name, device)]
        self.rows = [book.rows[place] for place in places]
        self.baseline: Row | None = (book.content.get("baselines") or {}).get(name) if not places else None
        self.classes = [predictions[place] for place in places if place in predictions]
        if self.baseline is not None and name in baselines:
            self.classes = [baselines[name]]
        self.whole = len(self.classes) == max(len(self.rows), 1)
        self.labels: str | None = (self.rows[0] if self.rows else self.baseline or {}).get("labels")

    def score(self, metric: str) -> float | None:
        """Return the mean over seeds, or the baseline's score; None if the record has neither."""
        if self.rows:
            return statistics.fmean(row[metric] for row in self.rows)
        return self.baseline[metric]["value"] if self.baseline is not None else None


def _difference(book: Record, line: Row, where: str, of: _Side, over: _Side, labels: Mapping[str, Any]) -> None:
    """Compare an interval over test rows, and the one over seeds if there is one."""
    from ..claims.judging import by_seed, seed_interval
    from ..metrics.differences import paired_difference

    whole = of.whole and over.whole
    if not whole:
        book.lacks(line, "intervals without the predictions behind them")
    for metric in ("f1_macro", "accuracy"):
        if whole:
            again = paired_difference(of.classes, over.classes, labels[str(of.labels)], metric)
            book.metric(where, metric, line[metric], again)
        else:
            gap = (of.score(metric) or 0) - (over.score(metric) or 0)
            book.same(where, f"{metric}.value", line[metric]["value"], gap, 1e-6)
        if "over_seeds" in line:
            gaps = by_seed(of.rows, over.rows, metric)
            book.same(where, "over_seeds.pairs", line["over_seeds"]["pairs"], len(gaps))
            told, computed = line["over_seeds"][metric], seed_interval(gaps)
            if told is None or computed is None:
                book.same(where, f"over_seeds.{metric}", told, computed)
            else:
                book.metric(where, f"over_seeds.{metric}", told, computed)


def _over_rows_and_seeds(
    book: Record,
    lines: Sequence[tuple[Row, str]],
    predictions: Mapping[int, Any],
    baselines: Mapping[str, Any],
    labels: Mapping[str, Any],
) -> None:
    """Compare intervals over both test rows and seeds; those of a device share their resamples."""
    from ..metrics.differences import differences_over_rows_and_seeds

    for device in dict.fromkeys(line["device"] for line, _ in lines):
        mine = [(line, where) for line, where in lines if line["device"] == device]
        contenders: dict[str, Any] = {}
        truth: Any = None
        for name in (line[side] for line, _ in mine for side in ("of", "over")):
            side = _Side(name, device, book, predictions, baselines)
            if not side.whole:
                book.say(f"{name} on {device}: predictions are missing, so there is no interval over rows and seeds")
                return
            seeds = [row["seed"] for row in side.rows]
            contenders[name] = dict(zip(seeds, side.classes, strict=True)) if seeds else side.classes[0]
            truth = labels[str(side.labels)]
        drawn = max(line["f1_macro"]["resamples"] for line, _ in mine)
        most = drawn if book.thorough else min(drawn, RESAMPLES)
        again = differences_over_rows_and_seeds(
            contenders,
            [(line["of"], line["over"]) for line, _ in mine],
            truth,
            shown=len(lines),
            tolerance=0,
            most=most,
        )
        for (line, where), found in zip(mine, again, strict=True):
            told = line["f1_macro"]
            book.same(where, "shown", line["shown"], len(lines))
            book.same(where, "f1_macro.seeds", told["seeds"], found["seeds"])
            book.same(where, "f1_macro.value", told["value"], found["value"], 1e-6)
            if most == drawn:
                book.same(where, "f1_macro.end_error", told["end_error"], found["end_error"], 1e-3)
            for end in ("low", "high"):
                # Fewer resamples make the ends less certain: allow five standard errors, hardly ever exceeded.
                room = CLOSE_FP32 * abs(told["value"]) + (5 * found["end_error"] if most < drawn else 1e-7)
                if abs(told[end] - found[end]) > room:
                    book.same(where, f"f1_macro.{end} (over rows and seeds)", told[end], found[end])


def _summary(book: Record, groups: Mapping[tuple[Any, ...], list[Row]], score: str) -> None:
    """Compare the summary's means and standard deviations with the rows."""
    lines = book.content.get("summary", [])
    told = [(line["preset"], line["device"]) for line in lines]
    for preset, device in groups:
        if (preset, device) not in told:
            book.say(f"summary: {preset} on {device} is missing")
    for line in lines:
        where = f"summary of {line['preset']} on {line['device']}"
        rows = groups.get((line["preset"], line["device"]), [])
        values = [row[score] for row in rows]
        book.same(where, "seeds", sorted(line["seeds"]), sorted(row["seed"] for row in rows))
        book.same(where, f"mean_{score}", line[f"mean_{score}"], statistics.fmean(values) if values else None)
        spread = statistics.stdev(values) if len(values) > 1 else None
        book.same(where, "standard_deviation", line["standard_deviation"], spread)


def tuning(book: Record) -> None:
    """Compare each chosen setting with the best of the tried ones."""
    groups = book.groups("preset")
    for line in book.content["chosen"]:
        where = f"chosen for {line['preset']}"
        rows = groups.get((line["preset"],), [])
        known = [row for row in rows if row["validation_f1_macro"] is not None]
        book.same(where, "settings", line["settings"], len(rows))
        if not known:
            book.say(f"{where}: no setting was tried that did not diverge")
            continue
        best = max(known, key=lambda row: row["validation_f1_macro"])
        book.same(where, "tried", line["tried"], best["tried"])
        book.same(where, "validation_f1_macro", line["validation_f1_macro"], best["validation_f1_macro"])
        if "at_the_edge" in line:
            (name,) = best["tried"]
            values = sorted(row["tried"][name] for row in rows)
            book.same(where, "at_the_edge", line["at_the_edge"], best["tried"][name] in (values[0], values[-1]))
    for preset in (row["preset"] for row in book.rows):
        if preset not in [line["preset"] for line in book.content["chosen"]]:
            book.say(f"nothing is chosen for {preset}")
            return


def schemes(book: Record) -> None:
    """Compute scores and differences from the predictions."""
    from ..metrics.differences import paired_difference

    labels = _labels_of(book)
    predictions = _scored(book, labels)
    for line in book.content.get("differences", []):
        where = f"{line['contender']} against {line['against']}"
        device = line.get("device", book.rows[0]["device"])
        sides = []
        for name in (line["contender"], line["against"]):
            found = {row["seed"]: place for place, row in enumerate(book.rows)
                     if (row.get("contender"), row["device"]) == (name, device)}  # fmt: skip
            sides.append(found)
        seeds = sorted(set(sides[0]) & set(sides[1]))
        book.same(where, "seeds", line["seeds"], seeds)
        places = [[side[seed] for seed in seeds] for side in sides]
        if all(place in predictions for place in itertools.chain(*places)):
            pair = [[predictions[place] for place in side] for side in places]
            truth = labels[book.rows[places[0][0]]["labels"]]
            book.metric(where, "f1_macro", line["f1_macro"], paired_difference(pair[0], pair[1], truth))
        else:
            means = [statistics.fmean(book.rows[place]["f1_macro"] for place in side) for side in places]
            book.same(where, "f1_macro.value", line["f1_macro"]["value"], means[0] - means[1], 1e-6)
            book.lacks(line, "intervals without the predictions behind them")


def merging(book: Record) -> None:
    """Compute scores, equal labels and the gains kept from the predictions."""
    from ..metrics.gains import gains_kept

    labels = _labels_of(book)
    predictions = _scored(book, labels)
    found: dict[str, dict[str, dict[int, Any]]] = {}
    truths: dict[str, Any] = {}
    for place, row in enumerate(book.rows):
        if place in predictions:
            found.setdefault(row["device"], {}).setdefault(row["way"], {})[row["seed"]] = predictions[place]
            truths[row["device"]] = labels[row["labels"]]
    for place, row in enumerate(book.rows):
        trained = found.get(row["device"], {}).get("as_trained", {}).get(row["seed"])
        if place in predictions and trained is not None:
            book.same(book.where(row), "same_label", row["same_label"], float((predictions[place] == trained).mean()))
    told = {(line["device"], line["way"]): line for line in book.content["gains"]}
    for device, ways in found.items():
        seeds = sorted(set.intersection(*(set(by_seed) for by_seed in ways.values())))
        if len(seeds) < 2 or not {"as_trained", "no_adapter"} <= set(ways):
            continue
        common = {way: {seed: by_seed[seed] for seed in seeds} for way, by_seed in ways.items()}
        again = gains_kept(common, truths[device], whole="as_trained", nothing="no_adapter")
        for way, share in again.items():
            where, line = f"gain kept by {way} on {device}", told.pop((device, way), None)
            if line is None:
                book.say(f"{where} is missing")
                continue
            book.same(where, "seeds", line["seeds"], seeds)
            if share is None or line["f1_macro"] is None:
                book.same(where, "f1_macro", line["f1_macro"], share)
            else:
                book.metric(where, "f1_macro", line["f1_macro"], share, CLOSE_FP32)
    for device, way in told:
        book.say(f"gain kept by {way} on {device}: the record has no rows of two seeds for it")
