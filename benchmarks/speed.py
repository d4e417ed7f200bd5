r"""Race ways of training against each other: results/speed.json and results/speed.png.

    python benchmarks/speed.py                          # this machine's default model; on a GPU DialoGPT-medium's shape
    python benchmarks/speed.py --models minilm --batches 32 --precisions fp32 bf16 --contenders grouped ours

Contenders, each a real `Trainer.train()` on Banking77's questions in a process of its own:

    recipe          the explained recipe: padded to 128, gradient checkpointing, paged 8-bit AdamW
    recipe_lean     the same Trainer, with layers and norms that keep less for the backward pass (`model.lean`, `fused`)
    padded_longest  transformers' Trainer, each batch padded to its longest row
    grouped         transformers' Trainer with train_sampling_strategy="group_by_length"
    compiled        grouped, with torch_compile=True; widths are multiples of 8, as any other is compiled for anew
    compiled_graphs the same with mode="reduce-overhead" (its own CUDA graphs) and few widths of batches
    unsloth         unsloth's model and Trainer, without dropout, where it is installed and knows the shape
    ours_eager      KitTrainer with training.graphs none
    ours            KitTrainer as a run has it

All but `recipe_lean` and `ours` have PEFT's own layers and transformers' own attention. The processes are built (side
by side on CUDA, where compiling takes minutes), then take turns: each trains `--steps` steps (of the recipe, whose
batches are all as wide, a tenth) while the others wait, `--repeats` times over, so that what the machine does besides
falls on all alike (a GPU's host varies by two). `step_seconds` and `samples_per_second` are medians over the repeats,
data loading, clipping and optimizer included; `start_seconds` is from the process's start to its first finished step.
On CUDA `device_seconds` is what a step's kernels take (from the profiler, in a repeat of its own; `ours` runs some side
by side, and their sum is more than the step) and `peak_bytes` the most bytes allocated; on a CPU the former does not
exist and the latter is the resident set. Weights are random where the model's own are not on this machine: speed and
memory do not depend on them.

`limit` counts what a step cannot do without (operations of its matrix products; bytes of frozen weights read twice and
of trained weights, gradients and AdamW's state) for real tokens alone, over the ceilings that this device reaches in a
matrix product and a copy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from processes import Worker  # noqa: E402

BORN = time.perf_counter()

MODELS = {
    "minilm": "minilm_banking77",
    "dialogpt-medium": "dialogpt-medium_banking77",
    "smollm2-135m": "smollm2-135m_banking77",
}
CONTENDERS = (
    "recipe",
    "recipe_lean",
    "padded_longest",
    "grouped",
    "compiled",
    "compiled_graphs",
    "unsloth",
    "ours_eager",
    "ours",
)
# Ways beside those that results/speed.json is about: a race with one of them stands whole in `speed_variants.json` too.
VARIANTS = ("recipe_lean", "compiled_graphs")
PADDING = {
    "recipe": "max_length",
    "recipe_lean": "max_length",
    "padded_longest": "longest",
    "grouped": "grouped",
    "compiled": "grouped_multiples_of_8",
    "compiled_graphs": "grouped_multiples_of_8",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        nargs="+",
        type=known_model,
        default=None,
        metavar="MODEL",
        help=f"of {', '.join(MODELS)}; MODEL:6 is its first six layers, which torch.compile is through with sooner",
    )
    parser.add_argument("--methods", nargs="+", choices=["qlora", "lora"], default=["qlora", "lora"])
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=[*CONTENDERS, *(f"lora/{name}" for name in CONTENDERS)],
        default=None,
        metavar="CONTENDER",
        help=f"of {', '.join(CONTENDERS)}; lora/CONTENDER races with LoRA whatever --methods says",
    )
    parser.add_argument("--batches", nargs="+", type=int, default=None)
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "fp16", "bf16"], default=None)
    parser.add_argument("--steps", type=int, default=50, help="a repeat; group_by_length sorts 50 batches at a time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--at-once", action="store_true", help="start all batches' contenders together, to compile at once"
    )
    parser.add_argument(
        "--patience", type=float, default=1800, help="seconds until a contender has started and warmed up"
    )
    parser.add_argument("--out", default="results/speed.json")
    parser.add_argument("--append", action="store_true", help="keep the rows of --out that this command does not make")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        model, method, contender, precision, batch = options.one
        compete(model, method, contender, precision, int(batch), options.steps)
        return 0
    return race_all(options)


def race_all(options: argparse.Namespace) -> int:
    import torch

    from qlora_kit import models, plots, records

    cuda = torch.cuda.is_available()
    options.models = options.models or (["dialogpt-medium"] if cuda else ["minilm"])
    options.batches = options.batches or ([8, 32, 64] if cuda else [32])
    native = models.resolve_precision("auto", models.default_device())
    options.precisions = options.precisions or ([native] if cuda else sorted({"fp32", native}))
    # On a CPU compiling takes minutes a shape, and the kit captures no graphs there: ours is ours_eager.
    options.contenders = options.contenders or (
        list(CONTENDERS) if cuda else ["recipe", "padded_longest", "grouped", "ours"]
    )
    out = Path(options.out)
    variants = out.with_name(f"{out.stem}_variants.json")
    before = {path: records.read_json(path) if options.append and path.is_file() else {} for path in (out, variants)}
    rows, apart = (before[path].get("rows", []) for path in (out, variants))
    limits = before[out].get("limit", [])
    environment = records.environment(models.default_device())
    now = " ".join(["python benchmarks/speed.py", *sys.argv[1:]])
    head = {"schema": records.SCHEMA, "environment": environment}
    for model in options.models:
        for precision in options.precisions:
            fields: dict[int, list[Racer]] = {}
            for batch in options.batches:
                if batch not in fields:
                    fields |= start(options, model, precision, options.batches if options.at_once else [batch])
                rows_before, apart_before = rows, apart
                for made in race(options, fields[batch]):
                    # A contender that could not start has no device of its own to tell.
                    made = [{**row, "device": row["device"] or environment["device"]} for row in made]
                    made = [{**row, "command": now, "environment": environment} for row in made]
                    rows = merged(rows_before, [row for row in made if row["contender"] not in VARIANTS])
                    # What is measured is kept, whatever happens next.
                    records.write_json(out, head | told(rows) | {"limit": limits})
                    if any(row["contender"] in VARIANTS for row in made):
                        apart = merged(apart_before, made)
                        records.write_json(variants, head | told(apart))
                methods = dict.fromkeys(method for method, _ in entries(options))
                limits = merged(limits, [limit(model, method, precision, batch) for method in methods])
                records.write_json(out, head | told(rows) | {"limit": limits})
    plots.save(plots.speed(rows, limits), out.parent, out.stem)
    print(f"written: {options.out}")
    return 0


def told(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a record's rows, and every command that made one of them: only rows of one command raced each other."""
    return {"command": "; ".join(dict.fromkeys(row["command"] for row in rows)), "rows": rows}


PROFILED = 2  # steps whose kernels are added up
# A row takes the place of one of the same race alone: what raced at another time stays beside it.
KEYS = ("model", "contender", "method", "precision", "batch", "device", "command")


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in KEYS)

    made = {key(row) for row in new}
    return [row for row in old if key(row) not in made] + new


def known_model(text: str) -> str:
    """Return a model's name, with the number of its layers where that is told."""
    name, _, layers = text.partition(":")
    if name not in MODELS or (layers or "1").strip("0123456789"):
        raise argparse.ArgumentTypeError(f"{text}: allowed is one of {', '.join(MODELS)}, or MODEL:LAYERS")
    return text


def entries(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Return who races: method and contender."""
    plain = [(method, name) for method in options.methods for name in options.contenders if "/" not in name]
    return plain + [("lora", name.removeprefix("lora/")) for name in options.contenders if "/" in name]


# --- the driver -------------------------------------------------------------------------------------------------


class Racer(Worker):
    """A contender's process: it trains a repeat's steps whenever it is told to."""

    def __init__(
        self, options: argparse.Namespace, model: str, method: str, contender: str, precision: str, batch: int
    ):
        self.key = {"model": model, "contender": contender, "method": method, "precision": precision, "batch": batch}
        self.times: list[dict[str, float]] = []
        own = ["--steps", str(options.steps), "--one", model, method, contender, precision, str(batch)]
        super().__init__([sys.executable, __file__, *own])
        self.start: dict[str, Any] = {}
        self.tell("go")

    def begin(self, patience: float) -> None:
        """Wait for its first step, and for a repeat that does not count: other widths may be compiled for then."""
        deadline = self.born + patience
        self.start = self.hear(deadline)
        if self.problem is None:
            self.hear(deadline)
        ready = f"first step after {self.start['start_seconds']:.1f} s" if self.problem is None else self.problem
        print("{model} {method} {contender} {precision} batch {batch}: ".format(**self.key) + str(ready), flush=True)


def start(options: argparse.Namespace, model: str, precision: str, batches: list[int]) -> dict[int, list[Racer]]:
    """Start a process for each contender, and return those of each batch once all are ready to race."""
    import torch

    fields: dict[int, list[Racer]] = {batch: [] for batch in batches}
    # QLoRA and LoRA of a contender race in one field: their ratio is a claim too.
    for batch in batches:
        for method, contender in entries(options):
            racer = Racer(options, model, method, contender, precision, batch)
            fields[batch].append(racer)
            if not torch.cuda.is_available():
                racer.begin(options.patience)
    if torch.cuda.is_available():
        for racer in (racer for field in fields.values() for racer in field):
            racer.begin(options.patience)
    return fields


def race(options: argparse.Namespace, racers: list[Racer]) -> Iterator[list[dict[str, Any]]]:
    """Let all contenders of one model, precision and batch take turns; after each repeat, yield the rows so far."""
    able = [racer for racer in racers if racer.problem is None]
    for repeat in range(options.repeats):
        for racer in able if repeat % 2 else reversed(able):
            report = racer.ask("go")
            if racer.problem is None:
                racer.times.append(report)
            else:
                print("{method} {contender} stopped: ".format(**racer.key) + racer.problem, flush=True)
        print(f"repeat {repeat + 1} of {options.repeats}", flush=True)
        able = [racer for racer in able if racer.problem is None]
        yield [row_of(racer, {}) for racer in racers]
    ends = [racer.ask("end") if racer.problem is None else {} for racer in racers]
    for racer in racers:
        racer.stop()
    rows = [row_of(racer, end) for racer, end in zip(racers, ends, strict=True)]
    for row in rows:
        if row["samples_per_second"]:
            print("{method} {contender} {precision} batch {batch}: {samples_per_second:.1f} samples/s".format(**row))
    yield rows


def row_of(racer: Racer, end: dict[str, Any]) -> dict[str, Any]:
    """Put a row together: medians over the repeats, and what the process told when it ended."""
    rates = [time["samples"] / time["seconds"] for time in racer.times]
    median = statistics.median
    return {
        **racer.key,
        "scheme": "nf4" if racer.key["method"] == "qlora" else "none",
        "double_quantization": racer.key["method"] == "qlora",
        "padding": PADDING.get(racer.key["contender"], "buckets"),
        "samples_per_second": median(rates) if rates else None,
        "samples_per_second_range": [min(rates), max(rates)] if rates else None,
        "tokens_per_second": median(t["tokens"] / t["seconds"] for t in racer.times) if rates else None,
        "step_seconds": median(t["seconds"] / t["steps"] for t in racer.times) if rates else None,
        "device_seconds": end.get("device_seconds"),
        "peak_bytes": end.get("peak_bytes"),
        "start_seconds": racer.start.get("start_seconds"),
        "optimizer": racer.start.get("optimizer"),
        "problem": racer.problem,
        "repeats": len(racer.times),
        "device": racer.start.get("device"),
    }


# --- a contender ------------------------------------------------------------------------------------------------


def compete(model: str, method: str, contender: str, precision: str, batch: int, steps: int) -> None:
    """Train until told to end, reporting each repeat as one line of JSON on standard output."""
    try:
        trainer = trainer_of(model, method, contender, precision, batch)
        from qlora_kit import models, records

        # Where every batch is as wide as the next, a tenth of the steps say as much.
        watch = turns(max(3, steps // 10) if contender.startswith("recipe") else steps)(trainer)
        trainer.add_callback(watch)
        watch.about = {
            "device": records.environment(models.default_device())["device"],
            "optimizer": str(getattr(trainer.args.optim, "value", trainer.args.optim)),
        }
        trainer.train()
    except Exception as error:  # a contender that cannot is a row, not the end of the race
        report({"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


def report(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


def turns(steps: int) -> Any:
    """Return a callback class that holds a Trainer between repeats of `steps` steps."""
    import torch
    from transformers import TrainerCallback

    from qlora_kit.training import peak_memory

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    class Turns(TrainerCallback):  # type: ignore[misc]
        def __init__(self, trainer: Any) -> None:
            self.about: dict[str, Any] = {}
            self.rows = self.tokens = self.done = 0
            self.began = 0.0
            self.profiler: Any = None
            self.first = True
            collate = trainer.data_collator

            def counted(rows: Any) -> Any:
                made = collate(rows)
                self.rows += made["attention_mask"].shape[0]
                self.tokens += int(made["attention_mask"].sum())
                return made

            counted.width = getattr(collate, "width", None)
            trainer.data_collator = counted

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.first:  # the first step: kernels are loaded, memory is taken
                wait()
                self.first = False
                self.turn(control, {"start_seconds": time.perf_counter() - BORN, **self.about})
                return
            self.done += 1
            if self.done < (steps if self.profiler is None else min(steps, PROFILED)):
                return
            wait()
            seconds = time.perf_counter() - self.began
            if self.profiler is not None:
                self.profiler.__exit__(None, None, None)
                device = sum(e.self_device_time_total for e in self.profiler.key_averages()) / 1e6 / self.done
                report({"device_seconds": device, **peak_memory()})
                control.should_training_stop = True
                return
            self.turn(control, {"seconds": seconds, "steps": steps, "samples": self.rows, "tokens": self.tokens})

        def turn(self, control: Any, values: dict[str, Any]) -> None:
            report(values)
            if sys.stdin.readline().strip() == "end":
                if not torch.cuda.is_available():
                    report({"device_seconds": None, **peak_memory()})
                    control.should_training_stop = True
                    return
                kinds = [torch.profiler.ProfilerActivity.CUDA]
                self.profiler = torch.profiler.profile(activities=kinds).__enter__()
            # The loader is a batch ahead all along: as many batches are counted as are trained.
            self.rows = self.tokens = self.done = 0
            wait()
            self.began = time.perf_counter()

    return Turns


def trainer_of(model: str, method: str, contender: str, precision: str, batch: int) -> Any:
    """Build a contender's Trainer."""
    if contender == "unsloth":
        return unsloth_trainer(model, method, precision, batch)
    import tempfile

    from qlora_kit import data, models, training  # isort: skip  # first: it imports bitsandbytes with care
    from transformers import Trainer, TrainingArguments

    ours = contender.startswith("ours")
    experiment = experiment_of(model, method, precision, batch, ours or contender == "recipe_lean")
    if contender == "ours_eager":
        experiment = experiment.override({"training.graphs": "none"})
    text = data.banking77()
    tokenizer = models.load_tokenizer(experiment.model)
    tokens = data.tokenize(tokenizer, text.train.texts, experiment.data.max_length)
    rows = data.TokenizedDataset(tokens, text.train.labels)
    device = models.default_device()
    built = models.build(experiment, text.label_names, device=device, pad_token_id=tokenizer.pad_token_id)
    folder = Path(tempfile.mkdtemp(prefix="speed-"))
    kind = "max_length" if contender.startswith("recipe") else "longest"
    few = ours or contender == "compiled_graphs"
    edges = data.edges_of(device) if few else None
    collate = data.collator(
        tokenizer.pad_token_id,
        kind,
        experiment.data.max_length,
        pad_to_multiple_of=8 if contender == "compiled" else None,
        edges=edges,
    )
    if ours:
        spec = experiment.training
        arguments = training.training_arguments(
            spec, folder, device=device, precision=precision, steps=10**6, tracked=False, progress=False
        )
        arguments.eval_strategy = arguments.save_strategy = "no"
        return training.KitTrainer(
            spec=spec, lengths=rows.lengths, model=built, args=arguments, train_dataset=rows, data_collator=collate
        )
    if contender.startswith("compiled"):
        import torch._dynamo

        # Widths differ from the start: compiled once for all of them, not for the first and then again.
        torch._dynamo.config.assume_static_by_default = False
        # transformers sets it in the first forward pass, and all would be compiled anew for the second.
        built.config.problem_type = "single_label_classification"
    if contender.startswith("recipe"):
        training.enable_checkpointing(built, use_reentrant=False)
    wanted = "paged_adamw_8bit" if contender.startswith("recipe") else "adamw_torch_fused"
    arguments = TrainingArguments(
        **settings(batch, precision),
        output_dir=str(folder),
        learning_rate=experiment.training.learning_rate,
        optim=training.resolve_optimizer(wanted, device),
        train_sampling_strategy="group_by_length" if PADDING[contender].startswith("grouped") else "random",
        torch_compile=contender.startswith("compiled"),
        torch_compile_mode="reduce-overhead" if contender == "compiled_graphs" else None,
        use_cpu=device.type == "cpu",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return Trainer(model=built, args=arguments, train_dataset=rows, data_collator=collate)


def settings(batch: int, precision: str) -> dict[str, Any]:
    """Return what every Trainer that is not the kit's is told alike."""
    return {
        "max_steps": 10**6,
        "per_device_train_batch_size": batch,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "label_names": ["labels"],
        "remove_unused_columns": False,
    }


def experiment_of(model: str, method: str, precision: str, batch: int, ours: bool) -> Any:
    """Return the preset at the race's precision and batch, with random weights where its own are not here."""
    from qlora_kit.experiment import preset

    name, _, layers = model.partition(":")
    changes: dict[str, Any] = {
        "model.layers": int(layers) if layers else None,
        "training.precision": precision,
        "training.batch_size": batch,
        "training.max_steps": 10**6,
        "training.logging_steps": 500,
    }
    if name == "dialogpt-medium":
        changes |= {"model.name": "shape:dialogpt-medium", "model.random_weights": True}
    experiment = preset(f"{MODELS[name]}_{method}").override(changes)
    if not ours:  # what people have: no saving that the kit alone knows
        experiment = experiment.override({"model.lean": False, "model.fused": False})
    return experiment


def unsloth_trainer(model: str, method: str, precision: str, batch: int) -> Any:
    """Build unsloth's own model and Trainer, on the one shape here that it supports."""
    if model != "smollm2-135m":
        raise ValueError(f"unsloth has no {model}")
    import unsloth  # must come before transformers
    from transformers import Trainer, TrainingArguments

    from qlora_kit import data, models
    from qlora_kit.experiment import preset

    experiment = preset(f"{MODELS[model]}_{method}")
    assert experiment.lora is not None
    source = models.find_base(experiment.model).source
    text = data.banking77()
    built, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        source,
        load_in_4bit=method == "qlora",
        max_seq_length=experiment.data.max_length,
        num_labels=len(text.label_names),
        use_gradient_checkpointing=False,
    )
    built.config.pad_token_id = tokenizer.pad_token_id
    # Its kernels are for every linear layer, which is its default and the preset's choice, and for no dropout.
    built = unsloth.FastLanguageModel.get_peft_model(
        built, r=experiment.lora.r, lora_alpha=experiment.lora.alpha, lora_dropout=0, use_gradient_checkpointing=False
    )
    tokens = data.tokenize(tokenizer, text.train.texts, experiment.data.max_length)
    arguments = TrainingArguments(
        **settings(batch, precision),
        output_dir="runs/speed-unsloth",
        learning_rate=experiment.training.learning_rate,
        optim="adamw_torch_fused",
        train_sampling_strategy="group_by_length",
    )
    rows = data.TokenizedDataset(tokens, text.train.labels)
    return Trainer(
        model=built, args=arguments, train_dataset=rows, data_collator=data.collator(tokenizer.pad_token_id, "longest")
    )


# --- what cannot be done without --------------------------------------------------------------------------------


def limit(model: str, method: str, precision: str, batch: int) -> dict[str, Any]:
    """Count a step's operations and bytes, and divide them by what this device reaches."""
    import numpy as np
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from qlora_kit import data, models, quantization, records  # isort: skip  # first: it imports bitsandbytes with care
    from transformers import PreTrainedModel

    experiment = experiment_of(model, method, precision, batch, True)
    device = models.default_device()
    text = data.banking77()
    tokenizer = models.load_tokenizer(experiment.model)
    length = max(1, round(float(np.mean(data.token_lengths(tokenizer, text.train.texts)))))
    built = models.build(experiment, text.label_names, device=device, pad_token_id=tokenizer.pad_token_id)
    for module in built.modules():
        if isinstance(module, PreTrainedModel):  # torch counts no fused attention with fewer keys than queries
            module.set_attn_implementation("eager")
    ids = torch.ones((batch, length), dtype=torch.long, device=device)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    counter = FlopCounterMode(display=False)
    with counter, models.computing(device, precision):
        loss = built(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
    trained = sum(p.numel() * p.element_size() for p in built.parameters() if p.requires_grad)
    stored = quantization.storage(built).linear_bytes
    # Frozen weights are read in the forward and in the backward pass; of a trained weight, the value, gradient and two
    # moments are read and written once.
    moved = 2 * stored + 2 * 4 * trained
    ceilings = {"flops_per_second": matmul_ceiling(device, precision), "bytes_per_second": copy_ceiling(device)}
    flops = counter.get_total_flops()
    seconds = max(flops / ceilings["flops_per_second"], moved / ceilings["bytes_per_second"])
    return {
        "model": model,
        "method": method,
        "precision": precision,
        "batch": batch,
        "length": length,
        "flops": flops,
        "bytes": moved,
        **ceilings,
        "seconds": seconds,
        "samples_per_second": batch / seconds,
        "device": records.environment(device)["device"],
    }


def best_time(work: Any, device: Any, repeats: int = 10) -> float:
    import torch

    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def matmul_ceiling(device: Any, precision: str) -> float:
    """Return the most operations a second that a large matrix product reaches, of sizes 1024 to 8192."""
    import torch

    from qlora_kit.models import COMPUTE_DTYPES

    most = 0.0
    for size in (1024, 2048) if device.type == "cpu" else (2048, 4096, 8192):
        one = torch.randn(size, size, device=device).to(COMPUTE_DTYPES[precision])
        most = max(most, 2 * size**3 / best_time(lambda one=one: one @ one, device))
    return most


def copy_ceiling(device: Any) -> float:
    """Return the bytes a second that a copy of 256 MiB moves, read and written."""
    import torch

    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * 2**28 / best_time(lambda: target.copy_(source), device)


if __name__ == "__main__":
    sys.exit(main())
