"""Load a data set: Banking77 from the package, files, Python objects, the hub."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ..config.experiment import data_spec
from ..config.sections import DataSpec
from ..errors import KitError, either, nearest, unknown, warn
from ..system.arguments import DATA_SPEC, takes
from ..system.showing import counted
from .formats import format_of
from .labels import composed, look_of
from .reading import are_files, existing_files, parse_csv, read_files
from .rows import Split, TextData, names_of_labels, twins, warn_of_leaks
from .splitting import stratified, undivided
from .tables import Rows, first_line, is_dict_of_tables, is_table, read_table, short

# Checked on every load: a line-ending filter or a manual edit would otherwise change scores silently.
BANKING77_SHA256 = {
    "train.csv": "b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b",
    "test.csv": "d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d",
    "categories.json": "53261da888122daf2d120d925458631d9619e15d82e56052e7a42e535ce32b63",
}
TEST_SHARE = 0.1  # held out if a single file or table has no test data
_VALIDATION_NAMES = ("validation", "valid", "val", "dev")  # what data sets call their own validation split


@takes(spec=DATA_SPEC)
def load(spec: DataSpec) -> TextData:
    """Load the data set of a spec.

    Args:
        spec: Its `name` is `banking77`, a file (see `sources.read_files`), a pattern of files such as `parts/*.csv`, or
            a data set on the hub (`owner/name`, tried only if no such file exists and the name is no path).

    Returns:
        The data. The split depends only on `spec.split_seed`: equal specs on equal files give equal rows. Splits made
        here keep equal texts (see `splitting.fold`) on one side; for ready-made splits, overlaps cause a warning.

    Raises:
        KitError: For a wrong file, column, row or name; the message says which one and what is allowed.
    """
    if spec.name == "memory":
        raise KitError(
            "data.name is 'memory': such rows live in Python objects or in a run folder's data/; "
            + either(
                "hand them over as finetune(..., data=text_classification(...)) or read them with load_saved(folder)",
                "name a file with --data",
            )
        )
    if spec.name == "banking77":
        return _banking77(spec)
    return _from_sources(spec, spec.name, spec.validation, spec.test)


def banking77(**fields: Any) -> TextData:
    """Load Banking77, which comes with the package: 13,083 questions of bank customers with 77 intents.

    Args:
        **fields: Fields of `DataSpec`, e.g. `limit=300`, `split_seed=1`, `max_length=64`.

    Returns:
        9,002 training, 1,001 validation and 3,080 test rows, unless `fields` say otherwise. Labels are in
        the order of the data set's own categories.json.
    """
    return load(_spec(name="banking77", **fields))


def text_classification(
    train: Any,
    *,
    test: Any = None,
    text: str = "text",
    label: str = "label",
    validation: Any = 0.1,
    seed: int = 0,
    **fields: Any,
) -> TextData:
    """Make a data set from your own rows.

    Args:
        train: Path to a file that ends in .csv, .tsv, .jsonl, .json (each also with .gz), .parquet or .xlsx, a list of
            such paths or a pattern (`parts/*.csv`); a list of dicts or a dict of columns; a pandas DataFrame, an Arrow
            table or a `datasets.Dataset`; a dict of such tables, e.g. a `datasets.DatasetDict` (its `train` is used);
            or a data set on the hub (`owner/name`).
        test: Test rows in any of these forms; or a fraction of the rows; or, for a dict of tables or a hub
            data set, the name of a split. None takes the split `test` if there is one, and else holds out
            10% and says so.
        text: The column of the texts.
        label: The column of the labels: text or whole numbers.
        validation: Fraction of the training rows held out for validation, stratified by label; or separate rows, as
            for `test`. If the data has its own validation split (`validation`, `valid`, `val` or `dev`), that split is
            used, unless you give a fraction other than the default.
        seed: Seed of the splits.
        **fields: Further fields of `DataSpec`: `max_length`, `too_long`, `limit`, `revision`.

    Returns:
        The data, stratified; labels sorted (whole numbers by value, text by code point). Splits made here keep equal
        texts (see `splitting.fold`) on one side; for ready-made splits, overlaps cause a warning.

    Raises:
        KitError: For wrong data or arguments, with the file, the row and what is allowed.
    """
    for name, meant in (("split_seed", "seed"), ("name", "train")):
        if name in fields:
            raise KitError(f"text_classification has no field {name!r}: give {meant}=")
    train, test, validation = (_plain(thing) for thing in (train, test, validation))
    if isinstance(validation, bool) or not (isinstance(validation, float | int | str) or _holds_rows(validation)):
        raise KitError(
            f"validation is a {type(validation).__name__}: allowed is a fraction of the training rows, as in "
            "validation=0.1, or rows of their own: a file, a table, the name of a split"
        )
    if isinstance(test, bool | int):
        raise KitError(f"test is {test!r}: allowed is a fraction between 0 and 1, as in test=0.2, a file or a table")
    if isinstance(train, str) and train == "banking77" and not (test is None and isinstance(validation, float)):
        raise KitError("banking77 comes with its own test rows: give a fraction for validation and leave test out")
    named = isinstance(train, str) and isinstance(test, str | float | None) and isinstance(validation, str | float)
    spec = _spec(
        name=train if named else "memory",
        test=test if named or isinstance(test, float) else None,
        text=text,
        label=label,
        validation=validation if named or isinstance(validation, float | int) else None,
        split_seed=seed,
        **fields,
    )
    return load(spec) if named else _from_sources(spec, train, validation, test)


def settled(asked: DataSpec, data: TextData) -> DataSpec:
    """Merge an experiment's data section with the spec of the data that was passed in.

    A field counts as set if it differs from `DataSpec`'s default. If only one side sets it, that value is used. If both
    set it to different values, it is refused. So is a field that only the experiment sets, if it decides how rows are
    read or split: that is already done.

    Args:
        asked: The experiment's data section.
        data: The data to train on instead.

    Returns:
        The merged section.

    Raises:
        KitError: With the name of the field and both values.
    """
    default, made = DataSpec(), data.spec
    held = {}
    for field in dataclasses.fields(DataSpec):
        wish, was, usual = (getattr(spec, field.name) for spec in (asked, made, default))
        if wish in (was, usual):
            continue
        # Texts are cut later, when a run reads them; a limit changes nothing if there are few enough rows.
        open_still = field.name in ("max_length", "too_long") or (field.name == "limit" and len(data.train) <= wish)
        if not open_still or was != usual:
            raise KitError(
                f"data.{field.name} is {wish!r} in the experiment and {was!r} in the data that was handed over: make "
                f"them agree, by override({{'data.{field.name}': {was!r}}}) or where the data is made"
            )
        held[field.name] = wish
    return dataclasses.replace(made, **held)


# ---- where rows come from ----


def _banking77(spec: DataSpec) -> TextData:
    default = DataSpec()
    for name in ("test", "revision", "text", "label"):
        if getattr(spec, name) != getattr(default, name):
            raise KitError(
                f"banking77 comes with its own test rows and columns, in one version: leave data.{name} out, or name "
                "your own data"
            )
    if not isinstance(spec.validation, float):
        raise KitError(f"data.validation is {spec.validation!r}: for banking77 allowed is a fraction between 0 and 1")
    folder = resources.files("qlora_kit") / "datasets" / "banking77"
    content = {}
    for name, expected in BANKING77_SHA256.items():
        try:
            content[name] = (folder / name).read_bytes()
        except OSError as error:
            raise KitError(f"{folder / name} is missing: install qlora_kit again") from error
        if hashlib.sha256(content[name]).hexdigest() != expected:
            raise KitError(f"{folder / name} is not Banking77's as published (its checksum differs): install again")
    names = tuple(json.loads(content["categories.json"]))
    train = parse_csv(content["train.csv"], "banking77/train.csv", "text", "category")
    test = parse_csv(content["test.csv"], "banking77/test.csv", "text", "category")
    return _from_parts(spec, train, spec.validation, test, names)


def _spec(**fields: Any) -> DataSpec:
    known = [field.name for field in dataclasses.fields(DataSpec)]
    for name in fields:
        if name not in known:
            raise unknown("field of DataSpec", name, known)
    return data_spec({name: _plain(value) for name, value in fields.items()})


def _plain(thing: Any) -> Any:
    """Return a path as a string and a NumPy number as a Python number."""
    if isinstance(thing, os.PathLike):
        return os.fspath(thing)
    return thing.item() if isinstance(thing, np.generic) and not isinstance(thing, str) else thing


def _holds_rows(thing: Any) -> bool:
    return is_table(thing) or isinstance(thing, list | tuple | Mapping)


def _from_sources(spec: DataSpec, train: Any, validation: Any, test: Any) -> TextData:
    """Read training, validation and test rows, each from its source."""
    tables: Mapping[str, Any] = {}
    source = "the data"
    files = existing_files(train) if isinstance(train, str) else None
    if is_dict_of_tables(train):
        tables = train
    elif isinstance(train, str) and files is None:
        tables, source = _hub_tables(train, spec.revision), train
    elif spec.revision is not None:
        what = f"{train} is a file" if isinstance(train, str) else f"this is a {type(train).__name__}"
        raise KitError(f"data.revision is for data sets on the hub, and {what}: leave it out")
    if tables and "train" not in tables:
        raise KitError(f"{source}: {unknown('split', 'train', tables)}")
    test = _own_split(test, None, tables, ("test",), source)
    others = [name for name in _VALIDATION_NAMES if not (isinstance(test, str) and name == test)]
    validation = _own_split(validation, DataSpec.validation, tables, others, source)
    unused = [name for name in tables if name not in ("train", *(s for s in (test, validation) if isinstance(s, str)))]
    if unused:
        names, are = ", ".join(map(short, unused[:10])), "s {} are" if len(unused) > 1 else " {} is"
        take = either("test= and validation= take", "--test and --set data.validation=NAME take")
        warn(f"{source}: its own split{are.format(names)} not used; {take} a split's name")

    def rows(thing: Any, what: str) -> Rows:
        if isinstance(thing, str) and thing in tables:
            return read_table(tables[thing], spec.text, spec.label, f"{source}, split {thing}")
        if isinstance(thing, str) and tables and format_of(Path(thing)) is None:
            raise KitError(f"{source}: {unknown('split', thing, tables)}")
        if isinstance(thing, str):
            found = existing_files(thing)
            if found is None:
                raise KitError(f"data.{what}: there is no file {thing!r}")
            return read_files(found, spec.text, spec.label)
        if are_files(thing):
            found = [file for name in thing for file in existing_files(os.fspath(name)) or ()]
            return read_files(found, spec.text, spec.label)
        return read_table(thing, spec.text, spec.label, what)

    return _from_parts(
        spec,
        rows("train" if tables else train, "train"),
        validation if isinstance(validation, float | int) else rows(validation, "validation"),
        test if isinstance(test, float | None) else rows(test, "test"),
    )


def _own_split(asked: Any, default: Any, tables: Mapping[str, Any], names: Sequence[str], source: str) -> Any:
    """Return the value asked for, or, if that is the default, the name of the data's own split if it has one."""
    own = [name for name in names if name in tables]
    if not own or not isinstance(asked, float | None):
        return asked
    if asked == default:
        if len(own) > 1:
            raise KitError(f"{source}: {' and '.join(map(repr, own))} can both be the validation rows: name one")
        return own[0]
    return asked


def _hub_tables(name: str, revision: str | None) -> Mapping[str, Any]:
    import datasets

    try:
        tables: Mapping[str, Any] = datasets.load_dataset(name, revision=revision)
    except Exception as error:  # the hub's errors have no common base class: network, name, licence, format
        raise KitError(
            f"the hub data set {name!r} could not be loaded ({type(error).__name__}: "
            f"{first_line(error)}). A file is named with its ending, e.g. data/train.csv."
        ) from error
    return tables


# ---- splitting ----


def _from_parts(
    spec: DataSpec,
    train: Rows,
    validation: Rows | float,
    test: Rows | float | None,
    names: tuple[str, ...] | None = None,
) -> TextData:
    """Split, limit and check rows; every TextData is made here."""
    names = names_of_labels(train) if names is None else names
    if len(names) < 2:
        raise KitError(f"{train.source}: every row has the label {names[0]!r}; a classifier needs two or more")
    index = {composed(name): i for i, name in enumerate(names)}
    rng = np.random.RandomState(spec.split_seed % 2**32)
    pool = _as_split(train, index)
    if isinstance(test, Rows):
        held = _as_split(test, index)
    else:
        if test is None:
            test = TEST_SHARE
            said = either(f"test={TEST_SHARE}", f"--test {TEST_SHARE}")
            warn(
                f"no test data was named: {TEST_SHARE:.0%} of {train.source} is held out for it "
                f"({said} says so without this message)"
            )
        pool, held = _hold_out(pool, test, rng, train.source, "test")
    if isinstance(validation, Rows):
        chosen = _as_split(validation, index)
    else:
        pool, chosen = _hold_out(pool, validation, rng, train.source, "validation")
        single = [names[i] for i, count in sorted(Counter(pool.labels).items()) if count == 1]
        kept_whole = [name for name in single if train.labels.count(name) == 1]
        if kept_whole:
            warn(
                f"{train.source}: {counted(len(kept_whole), 'label')} {'has' if len(kept_whole) == 1 else 'have'} one "
                f"row only, which is trained on and never validated: {', '.join(map(short, kept_whole[:5]))}"
            )
    if spec.limit is not None and spec.limit < len(pool):
        classes = len(set(pool.labels))
        if spec.limit < classes:
            raise KitError(f"data.limit is {spec.limit}, but there are {classes} labels: allowed is {classes} or more")
        share = spec.limit / len(pool)
        pool = pool.take(stratified(pool.labels, spec.limit, rng, least=1))
        chosen = chosen.take(stratified(chosen.labels, max(1, round(len(chosen) * share)), rng))
        held = held.take(stratified(held.labels, max(1, round(len(held) * share)), rng))
    data = TextData(spec=spec, label_names=names, train=pool, validation=chosen, test=held)
    warn_of_leaks(data)
    return data


def _as_split(rows: Rows, index: Mapping[str, int]) -> Split:
    for label, place in zip(rows.labels, rows.places, strict=True):
        if composed(label) not in index:
            twin = next((name for name in index if look_of(name) == look_of(label)), None)
            if twin is not None:
                raise KitError(f"{place}: {twins(label, twin)}")
            guess = nearest(label, index)
            raise KitError(
                f"{place}: label {short(label)} is none of the {len(index)} labels of "
                "the training rows" + (f"; did you mean {guess!r}?" if guess else "")
            )
    return Split(tuple(rows.texts), tuple(index[composed(label)] for label in rows.labels))


def _hold_out(pool: Split, share: float, rng: np.random.RandomState, source: str, what: str) -> tuple[Split, Split]:
    """Hold out `share` of the rows, stratified; every label keeps at least one row in the first part."""
    size = math.ceil(len(pool) * share - 1e-9)
    classes = len(set(pool.labels))
    if size > len(pool) - classes:
        raise KitError(
            f"{source}: {counted(len(pool), 'row')} of {counted(classes, 'label')} are too few to hold out {size} for "
            f"{what} (data.{what}={share:g}) and keep one of each label to train on"
        )
    chosen = undivided(pool.texts, pool.labels, stratified(pool.labels, size, rng, keep=1), rng)
    rest = np.setdiff1d(np.arange(len(pool)), chosen)
    return pool.take(rest.tolist()), pool.take(chosen)
