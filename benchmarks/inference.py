r"""Time predictions as a user serves them: results/inference.json.

    python benchmarks/inference.py                         # this machine's default model
    python benchmarks/inference.py --run runs/latest/runs/minilm_banking77_qlora_seed0

Variants, each in a process of its own, from a list of texts to their labels, tokenizer included:

    4bit        `Run.predict` of a QLoRA run
    pipeline    transformers' pipeline on the same 4-bit model, with PEFT's layers and transformers' attention
    merged16    the run merged into its full-precision base by `Run.merge`, stored in 16 bits
    frozen_svm  a linear SVM on the 4-bit base's frozen embeddings

Without `--run` the preset is trained for a few steps first: speed does not depend on what was learned. The processes
take turns, `--repeats` times: latency at batch 1 over `--texts` single test questions (percentiles over all repeats),
throughput at batch 64 over `--texts` at a time (median over the repeats). `peak_bytes` is the most that the process
used: on CUDA of the GPU, on a CPU of memory. A row keeps the time of each call, from which its figures are computed.
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

KEY = ("device", "model", "variant", "batch")
BATCHES = (1, 64)
VARIANTS = ("4bit", "pipeline", "merged16", "frozen_svm")
# The SVM's speed depends on the number of classes, not on the number of training rows.
SVM_ROWS = 1000


@told_in_a_line
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default=None, help="default: MiniLM on a CPU, DialoGPT-medium's shape on CUDA")
    parser.add_argument("--run", default=None, help="a finished QLoRA run instead")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="results/inference.json")
    recording.add_options(parser)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        serve(options.one[0], options.one[1], options.texts)
        return 0
    from qlora_kit import models
    from qlora_kit.run import load_run
    from qlora_kit.system.environment import environment

    provenance = recording.begin(options)
    with tempfile.TemporaryDirectory() as folder:
        run = load_run(options.run) if options.run else trained(options.preset, folder)
        here = environment(models.default_device())
        makes = [
            dict(zip(KEY, (here["device"], run.experiment.model.name, variant, batch), strict=True))
            for variant in VARIANTS
            for batch in BATCHES
        ]
        rows = [provenance.stamped(row, here) for row in race(run, options)]
    recording.write(
        options.out,
        rows,
        provenance=provenance,
        command=recording.command_line("inference.py"),
        makes=makes,
        key=KEY,
        append=options.append,
    )
    print(f"written: {options.out}")
    return 0


def trained(name: str | None, folder: str) -> Any:
    """Train a preset for a few steps."""
    import torch

    from qlora_kit import training
    from qlora_kit.config.preset import preset

    changes: dict[str, Any] = {"training.max_steps": 4, "tracking.wandb": "none", "model.head_init": "random"}
    if name is None and torch.cuda.is_available():
        name = "dialogpt-medium_banking77_qlora"
        changes |= {"model.name": "shape:dialogpt-medium", "model.random_weights": True}
    experiment = preset(name or "minilm_banking77_qlora").override(changes)
    return training.finetune(experiment, out=folder, progress=False)


def race(run: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the variants in turns, and return their rows."""
    workers: dict[str, Worker] = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--texts", str(options.texts), "--one", variant, str(run.path)]
        workers[variant] = Worker(command)
        workers[variant].tell("start")
    for variant, worker in workers.items():
        worker.hear()
        print(f"{variant}: {worker.problem or 'ready'}", flush=True)
    turns: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for repeat in range(options.repeats):
        for variant in VARIANTS if repeat % 2 else reversed(VARIANTS):
            worker = workers[variant]
            report = worker.ask("go") if worker.problem is None else {}
            if worker.problem is None:
                turns[variant].append(report)
        print(f"repeat {repeat + 1} of {options.repeats}", flush=True)
    rows = []
    for variant, worker in workers.items():
        worker.stop()
        rows += rows_of(run, variant, turns[variant], worker.problem, options)
    return rows


def rows_of(
    run: Any, variant: str, turns: list[dict[str, Any]], problem: str | None, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Build a variant's two rows: for single texts, and for batches of 64."""
    from qlora_kit import models
    from qlora_kit.checking import packing
    from qlora_kit.checking.rules_cost import latencies
    from qlora_kit.system.environment import environment

    common: dict[str, Any] = {
        "model": run.experiment.model.name,
        "variant": variant,
        "scheme": "none" if variant == "merged16" else run.experiment.quantization.scheme,
        "peak_bytes": max((turn["peak_bytes"] for turn in turns), default=None),
        "texts": options.texts,
        "repeats": len(turns),
        "problem": problem,
        "device": environment(models.default_device())["device"],
    }
    rows = []
    for batch in BATCHES:
        calls = [value for turn in turns for value in turn[f"batch_{batch}"]]
        row = {**common, "batch": batch, "call_nanoseconds": packing.pack(calls, "u8") if calls else None}
        if calls:
            row |= latencies(calls, len(turns), batch)
            middle, most = 1e3 * row["latency_seconds_p50"], 1e3 * row["latency_seconds_p95"]
            rate = row["samples_per_second"]
            print(f"{variant} batch {batch}: {middle:.1f} ms (95% {most:.1f}), {rate:.0f} samples/s", flush=True)
        else:
            row |= dict.fromkeys(("latency_seconds_p50", "latency_seconds_p95", "samples_per_second"))
        rows.append(row)
    return rows


# --- a variant --------------------------------------------------------------------------------------------------


def serve(variant: str, folder: str, count: int) -> None:
    """Classify single texts, then batches, on each command from standard input."""
    from qlora_kit import data
    from qlora_kit.run import load_run
    from qlora_kit.system.devices import peak_memory

    run = load_run(folder)
    texts = list(data.banking77().test.texts)[:: 3080 // count][:count]
    try:
        classify = MAKERS[variant](run)
        classify(texts[:64]), classify(texts[:1])
    except Exception as error:  # a variant that fails becomes a row and does not end the benchmark
        print(json.dumps({"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}), flush=True)
        return
    print(json.dumps({"ready": True}), flush=True)
    for word in sys.stdin:
        if word.strip() != "go":
            continue
        single = [timed(classify, [text]) for text in texts]
        batches = [timed(classify, texts[i : i + 64]) for i in range(0, count - count % 64, 64)]
        report = {"batch_1": single, "batch_64": batches, "peak_bytes": peak_memory()["peak_bytes"]}
        print(json.dumps(report), flush=True)


def timed(classify: Callable[[Sequence[str]], Any], texts: Sequence[str]) -> int:
    """Return the nanoseconds of a call."""
    began = time.perf_counter_ns()
    classify(texts)
    return time.perf_counter_ns() - began


def four_bit(run: Any) -> Callable[[Sequence[str]], Any]:
    return lambda texts: run.predict(texts, batch_size=64).labels


def pipeline(run: Any) -> Callable[[Sequence[str]], Any]:
    from qlora_kit import models  # isort: skip  # first: it imports bitsandbytes with care
    import torch
    from transformers import TextClassificationPipeline
    from transformers.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # it logs its hundred supported classes as an error
    run.experiment = run.experiment.override({"model.fused": False})
    model, tokenizer = run.load()
    inner: Any = model.get_base_model()
    device = models.default_device()
    if isinstance(inner, models.PooledClassifier):
        # Attributes that a pipeline needs of a model from outside transformers.
        inner.device, inner.dtype, inner.can_generate = device, torch.float32, lambda: False
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    classify = TextClassificationPipeline(model=inner, tokenizer=tokenizer, device=device)
    length = run.experiment.data.max_length
    precision = models.resolve_precision("auto", device) if device.type == "cuda" else "fp32"

    def labels(texts: Sequence[str]) -> Any:
        with models.computing(device, precision):
            return classify(list(texts), batch_size=64, truncation=True, max_length=length)

    return labels


def merged(run: Any) -> Callable[[Sequence[str]], Any]:
    import transformers

    from qlora_kit import export, models

    device = models.default_device()
    dtype = "fp16" if models.resolve_precision("auto", device) == "fp16" else "bf16"
    with tempfile.TemporaryDirectory() as folder:
        run.merge(Path(folder) / "merged", dtype=dtype, progress=False)
        model = export.load_merged(Path(folder) / "merged")
        # Its own, for the pad token. The kit's loader takes no folder with code, which a pooled head brings.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(Path(folder) / "merged")

    def labels(texts: Sequence[str]) -> Any:
        logits = models.forward_texts(
            model, tokenizer, texts, device=device, precision="fp32", max_length=run.experiment.data.max_length
        )
        return [run.label_names[place] for place in logits.argmax(1)]

    return labels


def frozen_svm(run: Any) -> Callable[[Sequence[str]], Any]:
    from sklearn.svm import LinearSVC

    from qlora_kit import data, models

    device = models.default_device()
    tokenizer = models.load_tokenizer(run.experiment.model)
    names = run.label_names
    base = models.build_classifier(run.experiment, names, device=device, pad_token_id=tokenizer.pad_token_id)
    precision = models.resolve_precision("auto", device)

    def states(texts: Sequence[str]) -> Any:
        return models.forward_texts(
            base,
            tokenizer,
            texts,
            device=device,
            precision=precision,
            max_length=run.experiment.data.max_length,
            states=True,
        )

    train = data.banking77().train
    some = range(0, len(train), len(train) // SVM_ROWS)
    svm = LinearSVC(C=1.0, random_state=0)
    svm.fit(states([train.texts[place] for place in some]), [train.labels[place] for place in some])
    return lambda texts: [names[place] for place in svm.predict(states(texts))]


MAKERS: dict[str, Callable[[Any], Callable[[Sequence[str]], Any]]] = {
    "4bit": four_bit,
    "pipeline": pipeline,
    "merged16": merged,
    "frozen_svm": frozen_svm,
}

if __name__ == "__main__":
    sys.exit(main())
