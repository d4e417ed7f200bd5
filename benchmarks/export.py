r"""Compare what leaves the kit with the run, and time it: results/export.json.

    python benchmarks/export.py                            # the preset minilm_banking77_qlora, trained first
    python benchmarks/export.py --run runs/minilm_banking77_qlora_seed0
    python benchmarks/export.py --smoke --out runs/export.json --from-changes

`Run.export` writes the run for ONNX Runtime, its weights as trained, in fp32 and in int8, its table of words in fp32 or
int8, and classifies every test row in it and in the run (`equal_rows` of `rows`). Beside these stand torch's: `4bit` is
`Run.predict`, `merged` is what `Run.merge` writes in fp32. A row each.

Each is a process of its own, from texts to labels, tokenizer included, on all cores; those of ONNX Runtime import
nothing of the kit but the folder's classifier.py. They take turns, `--repeats` times: latency over `--texts` single
test questions, and the rate with 64 at once over as many. A row keeps the time of each call, from which its figures are
computed. `start_seconds` is the time to open the files.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import recording
from common.processes import Worker
from common.refusals import told_in_a_line

PRESET, SMOKE = "minilm_banking77_qlora", "minilm_banking77_smoke"
KEY = ("device", "model", "runtime", "weights", "embeddings")
VARIANTS = (
    ("onnx", "as_trained", "fp32"),
    ("onnx", "as_trained", "int8"),
    ("onnx", "fp32", "fp32"),
    ("onnx", "int8", "int8"),
    ("torch", "4bit", "fp32"),
    ("torch", "merged", "fp32"),
)
AT_ONCE = 64


@told_in_a_line
def main() -> int:
    """Export, compare and time, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default=None, help="a finished run instead of training one")
    parser.add_argument("--smoke", action="store_true", help="a small run, few texts and two turns: to try it")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="results/export.json")
    recording.add_options(parser)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        serve(*options.one)
        return 0
    if options.smoke:
        options.texts, options.repeats = 64, 2
    if options.texts < AT_ONCE or options.repeats < 1:
        parser.error(f"--texts must be {AT_ONCE} or more, and --repeats 1 or more")
    from qlora_kit.run import load_run
    from qlora_kit.system.environment import environment

    provenance = recording.begin(options)
    with tempfile.TemporaryDirectory() as folder:
        run = load_run(options.run) if options.run else trained(SMOKE if options.smoke else PRESET, folder)
        here = environment("cpu")
        rows = [provenance.stamped(row, here) for row in measured(run, Path(folder), options)]
    recording.write(
        options.out,
        rows,
        provenance=provenance,
        command=recording.command_line("export.py"),
        makes=[{name: row[name] for name in KEY} for row in rows],
        key=KEY,
        append=options.append,
    )
    print(f"written: {options.out}")
    return 0


def trained(name: str, folder: str) -> Any:
    """Train a preset."""
    from qlora_kit import training
    from qlora_kit.config.preset import preset

    return training.finetune(preset(name).override({"tracking.wandb": "none"}), out=folder, progress=False)


def measured(run: Any, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Write each variant, compare it with the run, race them all, and return their rows."""
    from qlora_kit.evaluation.report import data_of
    from qlora_kit.system.environment import environment

    texts = list(data_of(run).test.texts)
    expected = run.predict(texts)
    some = [texts[place * len(texts) // options.texts] for place in range(options.texts)]
    (folder / "texts.json").write_text(json.dumps(some), encoding="utf-8")
    compared = {}
    for variant in VARIANTS:
        compared[variant] = written(run, folder, variant, texts, expected)
        print(f"{' '.join(variant)}: {compared[variant]}", flush=True)
    ready, turns = race(run, folder, options.repeats)
    rows = []
    for variant in VARIANTS:
        row = {
            **dict(zip(KEY[2:], variant, strict=True)),
            "device": environment("cpu")["device"],
            "model": run.experiment.model.name,
            "trained_on": run.experiment.quantization.label,
            **compared[variant],
            "start_seconds": ready[variant].get("start_seconds"),
            "problem": ready[variant].get("problem"),
            **figures(turns[variant], options),
        }
        print(f"{' '.join(variant)}: {row['latency_seconds_p50']} s, {row['samples_per_second']} a second", flush=True)
        rows.append(row)
    return rows


def place_of(folder: Path, variant: Sequence[str]) -> Path:
    """Return a variant's folder."""
    return folder / "-".join(variant)


def written(run: Any, folder: Path, variant: Sequence[str], texts: list[str], expected: Any) -> dict[str, Any]:
    """Write a variant, and compare it with the run's predictions for the test rows.

    Returns:
        `bytes` (None for the run itself, whose base lies elsewhere), `rows`, `equal_rows` and `largest_difference`.
    """
    import numpy as np

    from qlora_kit.metrics.scores import probabilities

    runtime, weights, embeddings = variant
    target = place_of(folder, variant)
    if runtime == "onnx":
        made = run.export(runtime, target, weights=weights, embeddings=embeddings, least_equal=0.0, progress=False)
        return {name: made[name] for name in ("bytes", "rows", "equal_rows", "largest_difference")}
    if weights == "4bit":
        return {"bytes": None, "rows": len(texts), "equal_rows": len(texts), "largest_difference": 0.0}
    run.merge(target, progress=False)
    logits = merged_logits(target, run.experiment.data.max_length)(texts)
    return {
        "bytes": sum(file.stat().st_size for file in target.iterdir() if file.suffix not in (".md",)),
        "rows": len(texts),
        "equal_rows": int((logits.argmax(axis=1) == expected.label_ids).sum()),
        "largest_difference": float(np.abs(probabilities(logits) - expected.probabilities).max()),
    }


def race(run: Any, folder: Path, repeats: int) -> tuple[dict[Any, dict[str, Any]], dict[Any, list[dict[str, Any]]]]:
    """Time the variants in turns; return what each said when it was ready, and its turns."""
    workers = {}
    for variant in VARIANTS:
        place = str(run.path) if variant[1] == "4bit" else str(place_of(folder, variant))
        length = str(run.experiment.data.max_length)
        workers[variant] = Worker([sys.executable, __file__, "--one", *variant[:2], place, length])
    ready = {variant: {**worker.hear(), "problem": worker.problem} for variant, worker in workers.items()}
    turns: dict[Any, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for repeat in range(repeats):
        for variant in VARIANTS if repeat % 2 else reversed(VARIANTS):
            if workers[variant].problem is None:
                report = workers[variant].ask(f"go {folder / 'texts.json'}")
                turns[variant] += [report] if report else []
                ready[variant]["problem"] = workers[variant].problem
        print(f"repeat {repeat + 1} of {repeats}", flush=True)
    for worker in workers.values():
        worker.stop()
    return ready, turns


def figures(turns: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Return a row's latencies and rate, with the time of each call."""
    from qlora_kit.checking import packing
    from qlora_kit.checking.rules_cost import exported

    row: dict[str, Any] = {"texts": options.texts, "repeats": len(turns)}
    if not turns:
        names = ("one_nanoseconds", "batch_nanoseconds", "latency_seconds_p50", "latency_seconds_p95")
        return row | dict.fromkeys((*names, "samples_per_second"))
    for name in ("one", "batch"):
        row[f"{name}_nanoseconds"] = packing.pack([value for turn in turns for value in turn[name]], "u8")
    return row | exported(row)


# --- a variant --------------------------------------------------------------------------------------------------


def serve(runtime: str, weights: str, place: str, length: str) -> None:
    """Open a variant, then classify single texts and batches on each command from standard input."""
    try:
        began = time.perf_counter()
        classify = MAKERS[runtime, weights](Path(place), int(length))
        report: dict[str, Any] = {"start_seconds": time.perf_counter() - began}
    except Exception as error:  # a variant that fails becomes a row and does not end the benchmark
        report = {"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    print(json.dumps(report), flush=True)
    for line in sys.stdin:
        word, _, file = line.strip().partition(" ")
        if word != "go":
            continue
        texts = json.loads(Path(file).read_text(encoding="utf-8"))
        classify(texts[:AT_ONCE]), classify(texts[:1])
        one = [timed(classify, [text]) for text in texts]
        whole = range(0, len(texts) - len(texts) % AT_ONCE, AT_ONCE)
        print(json.dumps({"one": one, "batch": [timed(classify, texts[i : i + AT_ONCE]) for i in whole]}), flush=True)


def timed(classify: Callable[[Sequence[str]], Any], texts: Sequence[str]) -> int:
    """Return the nanoseconds of a call."""
    began = time.perf_counter_ns()
    classify(texts)
    return time.perf_counter_ns() - began


def in_onnx_runtime(folder: Path, length: int) -> Callable[[Sequence[str]], Any]:
    sys.path.insert(0, str(folder))
    from classifier import TextClassifier  # the folder's own

    return TextClassifier().open().predict


def in_four_bits(folder: Path, length: int) -> Callable[[Sequence[str]], Any]:
    from qlora_kit.run import load_run

    run = load_run(folder)
    run.load()
    return lambda texts: run.predict(texts, batch_size=AT_ONCE).labels


def merged(folder: Path, length: int) -> Callable[[Sequence[str]], Any]:
    classify = merged_logits(folder, length)
    return lambda texts: classify(texts).argmax(axis=1)


def merged_logits(folder: Path, length: int) -> Callable[[Sequence[str]], Any]:
    """Open what `Run.merge` wrote; return a function from texts to logits."""
    from qlora_kit import export, models  # isort: skip  # first: it imports bitsandbytes with care
    import transformers

    model, device = export.load_merged(folder), models.default_device()
    # Not the run's: a merged decoder has a pad token of its own.
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    return lambda texts: models.forward_texts(
        model, tokenizer, texts, device=device, precision="fp32", max_length=length
    )


MAKERS: dict[tuple[str, str], Callable[[Path, int], Callable[[Sequence[str]], Any]]] = {
    **dict.fromkeys((variant[:2] for variant in VARIANTS if variant[0] == "onnx"), in_onnx_runtime),
    ("torch", "4bit"): in_four_bits,
    ("torch", "merged"): merged,
}

if __name__ == "__main__":
    sys.exit(main())
