"""Write a run as a folder that ONNX Runtime classifies with, and prove it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...data.batches import token_ids
from ...errors import KitError, unknown
from ...evaluation.report import data_of
from ...runs.card import code
from ...runs.predictor import Predictor
from ...system.arguments import FLAG, RUN, SHARE, TEXT, a_path, takes
from ...system.environment import environment
from ...system.files import move_into_place, plain, saving, write_json, write_text
from ...system.parsing import SCHEMA
from ..place import new_place

RUNTIME = "onnx"
WEIGHTS = ("as_trained", "fp32", "int8")
EMBEDDINGS = ("fp32", "int8")
# What the extra brings, by the names that are imported.
PACKAGES = ("onnx", "onnxscript", "onnxruntime")

README = """# {name}

A text classifier with {classes} labels for ONNX Runtime: token ids in, probabilities out. It was trained with
qlora_kit and needs nothing of it: `pip install onnxruntime tokenizers numpy`, and scikit-learn if you like.

```python
from classifier import TextClassifier

classify = TextClassifier()
print(classify.predict(["a text"]))
print(classify.predict_proba(["a text"]).max(axis=1))
```

Run it in this folder. Elsewhere, copy `classifier.py` to where your code is, and name this folder:
`TextClassifier("this-folder")`. It is an estimator of scikit-learn.
In another language: `model.onnx` takes `input_ids` and `attention_mask` (int64, texts by tokens) and returns `logits`
and `probabilities` (texts by labels, in the order of `labels.json`); `tokenizer.json` makes the ids, and
`settings.json` says how many tokens a text may have.

{stored}

| | |
|---|---|
| files | {megabytes:.1f} MB |
| rows with the label that the run itself gives | {equal_rows:,} of {rows:,} ({split}) |
| largest difference of a probability | {largest_difference:.2g} |
| one text | {milliseconds:.1f} ms, 95% under {most:.1f} ms |
| 64 texts at once | {samples_per_second:,.0f} texts a second |
| opened in | {start_seconds:.2f} s |

Measured on {device}; `export.json` has it all.
"""
STORED = {
    "as_trained": (
        "The weights are stored as they were trained: the frozen ones as `{trained_on}`, the adapters beside them. "
        "ONNX\nRuntime computes the products' weights once, when it opens the file."
    ),
    "fp32": "The weights are the trained ones, written out in fp32: the frozen ones with the adapters added.",
    "int8": (
        "The weights of the products are rounded to 8 bits, and their inputs at each call. So each text is computed "
        "alone."
    ),
}


@takes(run=RUN, to=a_path("served"), weights=TEXT, embeddings=TEXT, least_equal=SHARE, progress=FLAG)
def export(
    run: Predictor,
    to: str | Path,
    *,
    weights: str = "as_trained",
    embeddings: str = "fp32",
    least_equal: float = 1.0,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a run as a folder that ONNX Runtime classifies with on a CPU, and compare it with the run row by row.

    The folder needs nothing of the kit: `model.onnx`, the tokenizer, `labels.json`, `settings.json`, `classifier.py`
    (an estimator of scikit-learn), `export.json` and a README.md with the few lines that use it. Writing it needs
    `pip install "qlora_kit[export]"`; where it is used, onnxruntime, tokenizers and numpy are enough.

    Args:
        run: A finished run.
        to: A folder that does not exist, or is empty.
        weights: How the weights are stored. `as_trained`: the frozen ones as their 4-bit codes, adapters and head
            beside them; the runtime makes fp32 of them once, when it opens the file. `fp32`: the same numbers, written
            out. `int8`: rounded to 8 bits, and the inputs of products, too; small and fastest, but not equal.
        embeddings: `fp32`, or `int8`: the table of words in 8 bits with a scale for each 32 numbers, and in 16 bits the
            words of the training texts.
        least_equal: Least share of rows, 0 to 1, that get the label that `run.predict` gives. Below it, nothing is
            written.
        progress: Show a progress bar.

    Returns:
        What the folder's `export.json` holds: `runtime`, `weights`, `embeddings`, `bytes`, `equal_rows` of `rows`,
        `split` (`test`; `validation` for a run without test rows), `largest_difference` of a probability,
        `latency_seconds_p50` and `latency_seconds_p95` of one text, `samples_per_second` with 64 at once,
        `start_seconds`, `device`, `environment` and more.

    Raises:
        KitError: For an unknown way to store; when a package is missing, `to` is there or in the run's folder, the data
            is no longer what the run was trained on, the base cannot be traced, or the run's scheme cannot be exported;
            and when fewer rows are equal than `least_equal`.
    """
    for what, name, allowed in (
        ("way to store weights", weights, WEIGHTS),
        ("way to store embeddings", embeddings, EMBEDDINGS),
    ):
        if name not in allowed:
            raise unknown(what, name, allowed)
    versions = _versions()
    target = new_place(run, to)
    data = data_of(run)
    split, texts = next(
        (name, part.texts)
        for name, part in (("test", data.test), ("validation", data.validation), ("train", data.train))
        if len(part)
    )
    with saving(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as aside:
            made = Path(aside) / "classifier"
            made.mkdir()
            _write(run, made, weights, embeddings, data.train.texts)
            report = {
                "schema": SCHEMA,
                "name": run.experiment.name,
                "runtime": RUNTIME,
                "weights": weights,
                "embeddings": embeddings,
                "trained_on": run.experiment.quantization.label,
                "split": split,
                **_proved(run, made, texts, split if progress else None),
                "versions": versions,
            }
            report |= _where(data.checksum)
            _refuse_unequal(report, least_equal)
            write_json(made / "export.json", report)
            write_text(made / "README.md", _readme(run, report))
            if target.is_dir():
                target.rmdir()
            move_into_place(made, target)
    result: dict[str, Any] = plain(report)
    return result


def _versions() -> dict[str, str]:
    """Return the versions of what the export needs.

    Raises:
        KitError: When one of the packages is missing.
    """
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise KitError(
                f'an export to ONNX needs {package}, which is not installed here: pip install "qlora_kit[export]"'
            )
    return {package: importlib.metadata.version(package) for package in PACKAGES}


def _write(run: Predictor, folder: Path, weights: str, embeddings: str, known: Sequence[str]) -> None:
    """Write all but the proof: graph, tokenizer, labels, settings and the code that reads them.

    Args:
        run: The run.
        folder: Where to.
        weights: As `export` takes it.
        embeddings: As `export` takes it.
        known: Texts whose words keep 16 bits where embeddings have 8.
    """
    import onnx

    from .graph import embeddings_in_8_bits_, keep_as_trained_, products_in_8_bits, traced
    from .plain import plain_model

    tokenizer = run.load()[1]
    if not tokenizer.is_fast:
        raise KitError(
            f"the tokenizer of {run.experiment.model.name} ({type(tokenizer).__name__}) has no tokenizer.json, which "
            "the package tokenizers reads: this run can be used with the kit, or merged"
        )
    model, layers = plain_model(run)
    if weights == "as_trained" and any(layer.quantized and layer.codes is None for layer in layers.values()):
        raise KitError(
            f"layers of scheme {run.experiment.quantization.scheme} say no 4-bit codes (Backend.four_bits), so they "
            "cannot be stored as they were trained: use weights='fp32', the same numbers"
        )
    graph = traced(model, tokenizer.pad_token_id, run.experiment.model.name)
    if weights == "as_trained":
        keep_as_trained_(graph, layers)
    if embeddings == "int8":
        table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        table = table or model.base_model.get_input_embeddings()
        names = [name for name, module in model.named_modules() if module is table]
        tokens = {token for row in token_ids(tokenizer, list(known)) for token in row}
        embeddings_in_8_bits_(graph, f"model.{names[0]}.weight", np.array(sorted(tokens)))
    if weights == "int8":
        graph = products_in_8_bits(graph)
    onnx.save(graph, str(folder / "model.onnx"))
    tokenizer.save_pretrained(str(folder))
    write_json(folder / "labels.json", run.label_names)
    write_json(
        folder / "settings.json",
        {
            "max_length": run.experiment.data.max_length,
            "too_long": run.experiment.data.too_long,
            "truncation_side": tokenizer.truncation_side,
            "padding_side": tokenizer.padding_side,
            "pad_token_id": tokenizer.pad_token_id,
            # The inputs of products are rounded by the largest of all texts that are computed at once.
            "one_at_a_time": weights == "int8",
        },
    )
    shutil.copyfile(Path(__file__).with_name("classifier.py"), folder / "classifier.py")


def _proved(run: Predictor, folder: Path, texts: Any, progress: str | None) -> dict[str, Any]:
    from .proof import proof

    return proof(folder, list(texts), run.predict(texts, progress=progress))


def _where(data_checksum: str) -> dict[str, Any]:
    """Return the machine: ONNX Runtime computes on its CPU, whatever the run was loaded on."""
    from .plain import CPU

    found = environment(CPU, data_checksum=data_checksum)
    return {"device": found["device"], "environment": found}


def _refuse_unequal(report: dict[str, Any], least_equal: float) -> None:
    """Refuse an export of which fewer rows than wanted get the run's label.

    Raises:
        KitError: With the share, and how to allow it.
    """
    equal, rows = report["equal_rows"], report["rows"]
    if equal >= least_equal * rows:
        return
    allowed = math.floor(1000 * equal / rows) / 1000
    raise KitError(
        f"nothing was written: {equal:,} of {rows:,} {report['split']} rows ({equal / rows:.2%}) get the run's label "
        f"in weights={report['weights']!r}, embeddings={report['embeddings']!r}, and least_equal is {least_equal:g}. "
        f"least_equal={allowed:g} allows it"
    )


def _readme(run: Predictor, report: dict[str, Any]) -> str:
    return README.format(
        **report | {"name": code(run.experiment.name), "device": code(report["device"])},
        classes=len(run.label_names),
        stored=STORED[report["weights"]].format(**report),
        megabytes=report["bytes"] / 1e6,
        milliseconds=1e3 * report["latency_seconds_p50"],
        most=1e3 * report["latency_seconds_p95"],
    )
