"""The contenders of benchmarks/speed.py: settings, Trainer and process of each.

A contender is a real `Trainer.train()`. `CONTENDERS` has its settings. The same entry pads its batches and is written
into its row.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

BORN = time.perf_counter()

MODELS = {
    "minilm": "minilm_banking77",
    "dialogpt-medium": "dialogpt-medium_banking77",
    "smollm2-135m": "smollm2-135m_banking77",
}
PROFILED = 50
"""Steps whose kernels are timed: as many batches as group_by_length sorts at a time, so that all widths occur."""
WIDTHS = (16, 24, 48, 128)
"""Widths in tokens for a contender that compiles for each width. Few, because each takes minutes: these multiples of 8
pad Banking77's grouped batches to 22 tokens on average (all multiples of 8: 18; their longest rows: 14.5)."""
PASSES = 3
"""Batches of each width before a compiled contender is timed: torch compiles in the first, captures a CUDA graph in the
second, and replays it from the third on."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """The settings of one contender.

    Attributes:
        says: A description in one line.
        padding: How its batches are padded: `max_length` (all to the preset's `data.max_length`), `longest` (each to
            its longest row), `grouped` (the same, rows grouped by length), `grouped_multiples_of_8` and
            `grouped_fixed_widths` (grouped, and padded further to a multiple of 8 or to the next of a few widths),
            `buckets` (the kit's way).
        trainer: The Trainer: `transformers`, `kit` or `unsloth`.
        optimizer: Its name in transformers; None for the kit's own Trainer, which takes the preset's.
        checkpointing: `reentrant`, `not reentrant`, or None for none.
        precision: Its own precision, whatever the race's is; None for the race's.
        compiled: The shapes that torch.compile compiles for: `dynamic` (once for all of them), `static` (once for
            each), or None if it is not compiled.
        mode: torch.compile's mode.
        kit_layers: Whether it has the kit's layers (`model.lean`, `model.fused`) instead of PEFT's own.
        kbit: Whether `prepare_model_for_kbit_training` is called, which casts embeddings and norms to fp32.
        dropout: Whether its adapters have the preset's dropout.
        waits: Whether the host waits for the GPU at every step. transformers' Trainer does so unless
            `logging_nan_inf_filter` is off; users who replay graphs to save host time turn it off.
        variant: Whether its rows go only to speed_variants.json.
    """

    says: str
    padding: str
    trainer: str = "transformers"
    optimizer: str | None = "adamw_torch_fused"
    checkpointing: str | None = None
    precision: str | None = None
    compiled: str | None = None
    mode: str | None = None
    kit_layers: bool = False
    kbit: bool = False
    dropout: bool = True
    waits: bool = True
    variant: bool = False

    @property
    def alike(self) -> bool:
        """Whether all batches have the same width, so that timing a few is enough."""
        return self.padding == "max_length"

    def precision_in(self, race: str, cuda: bool) -> str:
        """Return its precision in a race of this precision; without a GPU its own fp16 becomes fp32."""
        return race if self.precision is None else self.precision if cuda else "fp32"


_RECIPE: dict[str, Any] = {"padding": "max_length", "optimizer": "paged_adamw_8bit"}
CONTENDERS = {
    "recipe": Contender(
        "the explained recipe in the race's precision: padded to 128, checkpointing, paged 8-bit AdamW",
        checkpointing="not reentrant",
        **_RECIPE,
    ),
    "recipe_fp16_reentrant": Contender(
        "the recipe as the explanation has it: fp16, reentrant checkpointing, prepare_model_for_kbit_training",
        checkpointing="reentrant",
        precision="fp16",
        kbit=True,
        **_RECIPE,
    ),
    "recipe_lean": Contender(
        "the recipe, with layers and norms that keep less for the backward pass (`model.lean`, `model.fused`)",
        checkpointing="not reentrant",
        kit_layers=True,
        variant=True,
        **_RECIPE,
    ),
    "padded_longest": Contender("transformers' Trainer, each batch padded to its longest row", "longest"),
    "grouped": Contender('transformers\' Trainer with train_sampling_strategy="group_by_length"', "grouped"),
    "compiled": Contender(
        "grouped, torch_compile=True, compiled once for all widths (multiples of 8)",
        "grouped_multiples_of_8",
        compiled="dynamic",
    ),
    "compiled_graphs": Contender(
        'grouped, torch_compile_mode="reduce-overhead": compiled for each of a few widths, with CUDA graphs of torch',
        "grouped_fixed_widths",
        compiled="static",
        mode="reduce-overhead",
        waits=False,
    ),
    "compiled_graphs_dynamic": Contender(
        "the same, compiled once for all widths (multiples of 8), a CUDA graph of torch for each",
        "grouped_multiples_of_8",
        compiled="dynamic",
        mode="reduce-overhead",
        waits=False,
    ),
    "unsloth": Contender(
        "unsloth's model, grouped by length, without dropout, where it is installed and knows the shape",
        "grouped",
        trainer="unsloth",
        dropout=False,
    ),
    "ours_eager": Contender(
        "KitTrainer with training.graphs none", "buckets", trainer="kit", optimizer=None, kit_layers=True, waits=False
    ),
    "ours": Contender(
        "KitTrainer as a run has it", "buckets", trainer="kit", optimizer=None, kit_layers=True, waits=False
    ),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One contender in one race, as passed to its process.

    Attributes:
        model: A name of `MODELS`, or `MODEL:LAYERS` for its first layers.
        method: `qlora` or `lora`.
        contender: A name of `CONTENDERS`.
        precision: Its compute precision.
        batch: Rows a step.
        steps: Steps a repeat.
        widths: The fixed widths in tokens; the preset's `data.max_length` is added.
        cache: Folder for torch.compile's cache.
        only: Compile only for this width, and end; the compiled code stays in the cache for the race.
    """

    model: str
    method: str
    contender: str
    precision: str
    batch: int
    steps: int
    widths: tuple[int, ...] = WIDTHS
    cache: str | None = None
    only: int | None = None

    def to_json(self) -> str:
        """Return the entry as JSON, to be one argument of a command."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Entry:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        return cls(**{**values, "widths": tuple(values["widths"])})

    @property
    def spec(self) -> Contender:
        """The contender's settings."""
        return CONTENDERS[self.contender]

    @property
    def raced_steps(self) -> int:
        """Steps of a repeat: a tenth of `steps` (at least 3) if all batches have the same width."""
        return max(3, self.steps // 10) if self.spec.alike else self.steps

    @property
    def profiled_steps(self) -> int:
        """Steps whose kernels are timed."""
        return 20 if self.spec.alike else PROFILED


# --- its process ------------------------------------------------------------------------------------------------


def compete(entry: Entry) -> None:
    """Train until told to end, reporting each repeat as one line of JSON on standard output."""
    # A Trainer prints its logs; only reports may go to the parent process.
    sys.stdout = sys.stderr
    try:
        if entry.cache and entry.spec.compiled:
            # With torch's default folder, cache hits would depend on what else ran on this machine.
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = entry.cache
        trainer = trainer_of(entry)
        if entry.only is not None:
            trainer.args.max_steps = PASSES
            trainer.train()
            report({"start_seconds": time.perf_counter() - BORN, **compilations()})
            return
        watch = turns(entry)(trainer)
        trainer.add_callback(watch)
        watch.about = about(entry, trainer)
        trainer.train()
    except Exception as error:  # a contender that fails becomes a row and does not end the race
        report({"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


def report(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True, file=sys.__stdout__)


def about(entry: Entry, trainer: Any) -> dict[str, Any]:
    """Return the facts for a contender's row that come from its Trainer and the machine."""
    import torch

    from qlora_kit import models
    from qlora_kit.system.environment import environment

    found = environment(models.default_device())
    cpu, _, cores = found["cpu"].rpartition(", ")
    found["host"] = {"cpu": cpu, "cores": int(cores.split()[0]), "threads": torch.get_num_threads()}
    for package in ("triton", "unsloth") if entry.contender == "unsloth" else ("triton",):
        try:
            found["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    args = trainer.args
    return {
        "environment": found,
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "precision": "fp16" if args.fp16 else "bf16" if args.bf16 else "fp32",
        "widths": getattr(trainer, "raced_widths", None),
    }


def compilations() -> dict[str, Any]:
    """Return how many graphs torch.compile has made so far, and whether one came from its cache; {} if it is unused."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return {}
    counters = dynamo.counters
    hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    return {"compiled_graphs": counters["stats"]["unique_graphs"], "from_cache": hits > 0}


def turns(entry: Entry) -> Any:
    """Return a callback class that pauses a Trainer between repeats of `entry.raced_steps` steps."""
    import torch
    from transformers import TrainerCallback

    from qlora_kit.system.devices import peak_memory

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    class Turns(TrainerCallback):  # type: ignore[misc]
        def __init__(self, trainer: Any) -> None:
            self.about: dict[str, Any] = {}
            self.rows = self.tokens = self.done = 0
            # The first repeat does not count; a compiled contender sees every width in it.
            self.wanted = entry.raced_steps + getattr(trainer, "warming", 0)
            self.began = 0.0
            self.profiler: Any = None
            self.first = True
            collate = trainer.data_collator

            def counted(rows: Any) -> Any:
                made = collate(rows)
                self.rows += made["attention_mask"].shape[0]
                self.tokens += int(made["attention_mask"].sum())
                return made

            trainer.data_collator = counted
            vars(counted)["width"] = getattr(collate, "width", None)  # KitTrainer needs it

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if entry.spec.mode == "reduce-overhead":  # allows torch to reuse the memory of the previous step's graphs
                torch.compiler.cudagraph_mark_step_begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.first:  # the first step loads kernels and allocates memory
                wait()
                self.first = False
                self.turn(control, {"start_seconds": time.perf_counter() - BORN, **self.about, **compilations()})
                return
            self.done += 1
            if self.done < self.wanted:
                return
            wait()
            seconds = time.perf_counter() - self.began
            if self.profiler is not None:
                self.profiler.__exit__(None, None, None)
                busy = busy_seconds(self.profiler) / self.done
                report({"device_seconds": busy, "device_steps": self.done, **peak_memory()})
                control.should_training_stop = True
                return
            made = {"seconds": seconds, "steps": self.done, "samples": self.rows, "tokens": self.tokens}
            self.wanted = entry.raced_steps
            self.turn(control, {**made, "ready_seconds": time.perf_counter() - BORN, **compilations()})

        def turn(self, control: Any, values: dict[str, Any]) -> None:
            report(values)
            word = sys.stdin.readline().strip()
            if not word:  # the parent process has ended
                control.should_training_stop = True
                return
            if word == "end":
                if not torch.cuda.is_available():
                    report({"device_seconds": None, **peak_memory()})
                    control.should_training_stop = True
                    return
                self.wanted = entry.profiled_steps
                kinds = [torch.profiler.ProfilerActivity.CUDA]
                self.profiler = torch.profiler.profile(activities=kinds).__enter__()
            # The loader is always one batch ahead, so as many batches are counted as are trained.
            self.rows = self.tokens = self.done = 0
            wait()
            self.began = time.perf_counter()

    return Turns


def busy_seconds(profiler: Any) -> float:
    """Return the seconds in which a device ran at least one kernel or copy during profiling."""
    from torch.autograd import DeviceType

    events = [event for event in profiler.profiler.kineto_results.events() if event.device_type() == DeviceType.CUDA]
    return covered((event.start_ns(), event.start_ns() + event.duration_ns()) for event in events) / 1e9


def covered(intervals: Iterable[tuple[int, int]]) -> int:
    """Return the length of the union of intervals (begin, end)."""
    total = reached = 0
    for begin, end in sorted(intervals):
        total += max(end - max(begin, reached), 0)
        reached = max(reached, end)
    return total


# --- its Trainer ------------------------------------------------------------------------------------------------


def experiment_of(model: str, method: str, precision: str, batch: int, kit_layers: bool) -> Any:
    """Return the preset with the race's precision and batch; DialoGPT-medium gets random weights."""
    from qlora_kit.config.preset import preset

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
    if not kit_layers:  # without the savings that only the kit has
        experiment = experiment.override({"model.lean": False, "model.fused": False})
    return experiment


def widths_of(entry: Entry, lengths: Sequence[int], longest: int) -> list[int] | None:
    """Return the widths that a contender's batches can have, ascending; None if they are not fixed.

    Args:
        entry: The contender.
        lengths: Tokens of each training row.
        longest: The preset's `data.max_length`.
    """
    if entry.spec.padding == "grouped_fixed_widths":
        edges = sorted({*entry.widths, longest})
    elif entry.spec.padding == "grouped_multiples_of_8":
        edges = list(range(8, max(lengths) + 8, 8))
    else:
        return None
    # A width that no row needs never occurs.
    return [edge for before, edge in zip([0, *edges], edges, strict=False) if any(before < n <= edge for n in lengths)]


def first_rows(lengths: Sequence[int], widths: Sequence[int], batch: int) -> list[int]:
    """Return rows for `PASSES` batches of each width, widest first, so that everything is compiled before timing.

    Args:
        lengths: Tokens of each row.
        widths: All widths of batches, ascending; for each there is a row that needs it (see `widths_of`).
        batch: Rows of a batch.
    """
    rows: list[int] = []
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    for width in reversed(widths):
        fitting = [row for row in order if lengths[row] <= width]
        # The longest fitting rows give the batch its width; they are repeated if there are too few.
        chosen = fitting[-batch:]
        rows += (chosen * batch)[-batch:] * PASSES
    return rows


def trainer_of(entry: Entry) -> Any:
    """Build a contender's Trainer."""
    if entry.spec.trainer == "unsloth":
        return unsloth_trainer(entry)
    import tempfile

    from qlora_kit import data, models
    from qlora_kit import training  # isort: skip  # first: it imports bitsandbytes with care
    from transformers import TrainingArguments

    spec = entry.spec
    experiment = experiment_of(entry.model, entry.method, entry.precision, entry.batch, spec.kit_layers)
    if spec.trainer == "kit" and entry.contender == "ours_eager":
        experiment = experiment.override({"training.graphs": "none"})
    if spec.kbit and entry.method == "qlora":
        experiment = experiment.override({"training.prepare_for_kbit_training": True})
    text = data.banking77()
    tokenizer = models.load_tokenizer(experiment.model)
    tokens = data.tokenize(tokenizer, text.train.texts, experiment.data.max_length)
    rows = data.TokenizedDataset(tokens, text.train.labels)
    device = models.default_device()
    built = models.build(experiment, text.label_names, device=device, pad_token_id=tokenizer.pad_token_id)
    folder = tempfile.mkdtemp(prefix="speed-")
    widths = widths_of(entry, rows.lengths, experiment.data.max_length)
    if entry.only is not None:
        widths = [width for width in widths or [] if width == entry.only]
    collate = data.collator(
        tokenizer.pad_token_id,
        "max_length" if spec.padding == "max_length" else "longest",
        experiment.data.max_length,
        edges=data.edges_of(device) if spec.trainer == "kit" else widths,
    )
    if spec.trainer == "kit":
        ours = experiment.training
        arguments = training.training_arguments(
            ours, folder, device=device, precision=entry.precision, steps=10**6, progress=False
        )
        arguments.eval_strategy = arguments.save_strategy = "no"
        return training.KitTrainer(
            spec=ours, lengths=rows.lengths, model=built, args=arguments, train_dataset=rows, data_collator=collate
        )
    if spec.compiled:
        ready_to_compile(built, spec.compiled)
    if spec.checkpointing:
        training.enable_checkpointing(built, use_reentrant=spec.checkpointing == "reentrant")
    assert spec.optimizer is not None
    arguments = TrainingArguments(
        **settings(entry),
        output_dir=folder,
        learning_rate=experiment.training.learning_rate,
        optim=training.resolve_optimizer(spec.optimizer, device),
        use_cpu=device.type == "cpu",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)
    trainer = meeting_first(first_rows(rows.lengths, widths, entry.batch) if widths else [])(
        model=built, args=arguments, train_dataset=rows, data_collator=collate
    )
    trainer.raced_widths = widths
    return trainer


def ready_to_compile(built: Any, shapes: str) -> None:
    """Configure torch.compile as an expert would, so that nothing is compiled during timing.

    Args:
        built: The model.
        shapes: `dynamic` or `static`, as in `Contender.compiled`.
    """
    import bitsandbytes
    import torch._dynamo
    import torch._functorch.config
    import torch._inductor.config
    from torch.fx.experimental import _config as symbols

    if shapes == "dynamic":
        # Compile once for all widths, not for the first one and then again. Without use_duck_shape = False, torch would
        # compile again for a width that happens to equal the batch size.
        torch._dynamo.config.assume_static_by_default = False
        symbols.use_duck_shape = False
    else:
        torch._dynamo.config.automatic_dynamic_shapes = False
        torch._dynamo.config.recompile_limit = 64  # torch's default gives up after eight widths
    # By default torch does not cache graphs with autocast or an autograd function, and compiles most of them again.
    # Older versions lack these settings and only take longer.
    version = f"{torch.__version__}, bitsandbytes {bitsandbytes.__version__}"
    autocast = {f"torch.amp.autocast_mode.{name}": version for name in ("_enter_autocast", "_exit_autocast")}
    for config, name, value in (
        (torch._functorch.config, "autograd_cache_allow_custom_autograd_functions", True),
        (torch._inductor.config, "unsafe_marked_cacheable_functions", autocast),
    ):
        if hasattr(config, name):
            setattr(config, name, value)
    # transformers sets this in the first forward pass, and everything would be compiled again for the second.
    built.config.problem_type = "single_label_classification"


def meeting_first(first: list[int]) -> Any:
    """Return a subclass of transformers' Trainer that trains on given rows first.

    Args:
        first: Indices of rows, in whole batches; if empty, the Trainer itself is returned.
    """
    from torch.utils.data import Sampler
    from transformers import Trainer

    class First(Sampler):  # type: ignore[misc, type-arg]
        def __init__(self, then: Any) -> None:
            self.first, self.then = list(first), then

        def __iter__(self) -> Iterator[int]:
            first, self.first = self.first, []  # only in the first epoch
            yield from first
            yield from self.then

        def __len__(self) -> int:
            return len(self.first) + len(self.then)

    class Meeting(Trainer):  # type: ignore[misc]
        @property
        def warming(self) -> int:
            """Steps on the given rows, not counting the very first step."""
            return max(len(first) // int(self.args.train_batch_size) - 1, 0)

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return First(super()._get_train_sampler(train_dataset))

    return Meeting if first else Trainer


def settings(entry: Entry) -> dict[str, Any]:
    """Return the settings of a Trainer that is not the kit's."""
    return {
        "max_steps": 10**6,
        "per_device_train_batch_size": entry.batch,
        "bf16": entry.precision == "bf16",
        "fp16": entry.precision == "fp16",
        "train_sampling_strategy": "group_by_length" if entry.spec.padding.startswith("grouped") else "random",
        "torch_compile": entry.spec.compiled is not None,
        "torch_compile_mode": entry.spec.mode,
        # The last batch of an epoch has another shape, and would be compiled during the race.
        "dataloader_drop_last": entry.spec.compiled is not None,
        "logging_nan_inf_filter": entry.spec.waits,
        # Copies the next batch to the GPU while this one is computed.
        "accelerator_config": {"non_blocking": not entry.spec.waits},
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "label_names": ["labels"],
        "remove_unused_columns": False,
    }


def unsloth_trainer(entry: Entry) -> Any:
    """Build unsloth's own model with a Trainer, for the only shape here that it supports."""
    if entry.model != "smollm2-135m":
        raise ValueError(f"unsloth has no {entry.model}")
    import unsloth  # must come before transformers
    from transformers import Trainer, TrainingArguments

    from qlora_kit import data, models
    from qlora_kit.config.preset import preset

    experiment = preset(f"{MODELS[entry.model]}_{entry.method}")
    assert experiment.lora is not None and entry.spec.optimizer is not None
    source = models.find_base(experiment.model).source
    text = data.banking77()
    built, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        source,
        load_in_4bit=entry.method == "qlora",
        max_seq_length=experiment.data.max_length,
        num_labels=len(text.label_names),
        use_gradient_checkpointing=False,
    )
    built.config.pad_token_id = tokenizer.pad_token_id
    # Its fast kernels need adapters on every linear layer (its default and the preset's choice) and no dropout.
    built = unsloth.FastLanguageModel.get_peft_model(
        built, r=experiment.lora.r, lora_alpha=experiment.lora.alpha, lora_dropout=0, use_gradient_checkpointing=False
    )
    tokens = data.tokenize(tokenizer, text.train.texts, experiment.data.max_length)
    arguments = TrainingArguments(
        **settings(entry),
        output_dir="runs/speed-unsloth",
        learning_rate=experiment.training.learning_rate,
        optim=entry.spec.optimizer,
    )
    rows = data.TokenizedDataset(tokens, text.train.labels)
    return Trainer(
        model=built, args=arguments, train_dataset=rows, data_collator=data.collator(tokenizer.pad_token_id, "longest")
    )
