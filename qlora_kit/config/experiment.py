"""The experiment: everything that decides a run's result, in one frozen dataclass, read from YAML.

An experiment sets the model, the data, how the frozen weights are stored, the adapters and the training. On a CPU, two
runs of equal experiments give bit-identical results if versions and thread counts are equal too; on a GPU they agree
closely.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from ..errors import KitError, nearest, shown
from ..system.arguments import CHANGES, PATH_OR_YAML, takes
from ..system.parsing import MOST_YAML, dump_yaml, parse_yaml, read_text
from .names import presets, safe_name
from .quantization import Quantization
from .sections import DataSpec, LoraSpec, ModelSpec, TrackingSpec, TrainingSpec
from .values import _hints, _plain, _section, _typed

# Settings of other libraries that the kit does not have, by the last part of the name, with a hint.
NOT_HAD = {
    "class_weight": "the kit's loss weighs every row alike",
    "class_weights": "the kit's loss weighs every row alike",
    "focal_loss": "the kit's loss is cross-entropy",
    "fp16": "set training.precision to fp16",
    "bf16": "set training.precision to bf16",
    "load_in_4bit": "set quantization.scheme to nf4",
    "load_in_8bit": "set quantization.scheme to int8",
    "num_epochs": "it is called training.epochs",
    "num_train_epochs": "it is called training.epochs",
    "use_dora": "the kit's adapters are plain LoRA",
    "use_rslora": "the kit's adapters are plain LoRA: set lora.alpha instead",
    "packing": "texts to classify are not packed; training.padding: buckets wastes few tokens",
}


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
        KitError: For a name that no folder can have, full fine-tuning of quantized weights, or trained biases in 8-bit
            layers.
    """

    name: str
    model: ModelSpec
    data: DataSpec = dataclasses.field(default_factory=DataSpec)
    quantization: Quantization = dataclasses.field(default_factory=Quantization)
    lora: LoraSpec | None = dataclasses.field(default_factory=LoraSpec)
    training: TrainingSpec = dataclasses.field(default_factory=TrainingSpec)
    tracking: TrackingSpec = dataclasses.field(default_factory=TrackingSpec)

    def __post_init__(self) -> None:
        _typed("", self)
        safe_name("experiment", self.name)
        if self.lora is None and self.quantization.is_quantized:
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

    @takes(changes=CHANGES)
    def override(self, changes: Mapping[str, Any]) -> Experiment:
        """Return a copy with some fields changed.

        Args:
            changes: New values by dotted name, e.g. `{"training.epochs": 2, "lora.r": 8}`, or by section: `{"training":
                {"epochs": 2}}` changes only that field. `{"lora": None}` turns the adapters off; a later section
                turns them on again.

        Returns:
            The changed experiment; this one is not modified.

        Raises:
            KitError: For an unknown name (the message has the nearest known one), a field that is given twice, or a
                value that is not allowed.
        """
        tree, changed = self.to_dict(), set[str]()
        for name, value in changes.items():
            _change(tree, str(name), value, changed)
        _settle_wandb(tree["tracking"], changes)
        changed_experiment: Experiment = _build(Experiment, tree, "")
        return changed_experiment

    def to_dict(self) -> dict[str, Any]:
        """Return the experiment as nested dicts, lists and scalars, ready for JSON or YAML."""
        plain: dict[str, Any] = _plain(self)
        return plain

    def to_yaml(self) -> str:
        """Return the experiment as YAML with every field, defaults included."""
        return dump_yaml(self.to_dict())

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
        try:
            built: Experiment = _build(Experiment, values, "")
        except KitError as error:
            raise KitError(f"{where}: {error}") from error
        return built

    @staticmethod
    @takes(source=PATH_OR_YAML)
    def from_yaml(source: str | Path) -> Experiment:
        """Read an experiment from a YAML file, or from YAML text if `source` has more than one line.

        Args:
            source: Path of a file, or the text itself.

        Returns:
            The experiment. Ambiguous values are refused (see `parsing.parse_yaml`).

        Raises:
            KitError: When the file does not exist, is not YAML, or has a wrong field.
        """
        if isinstance(source, str) and "\n" in source:
            text, where = source, "the YAML text"
        else:
            path = Path(source)
            if not os.path.exists(path):
                raise KitError(f"there is no experiment file {shown(str(path))}. Presets: {', '.join(presets())}.")
            text, where = read_text(path, MOST_YAML), str(path)
        return Experiment.from_dict(parse_yaml(text, where), where=where)


def data_spec(values: Mapping[str, Any]) -> DataSpec:
    """Build only the data section from a dict, with the checks of `Experiment.from_dict`.

    Raises:
        KitError: For an unknown field, or a value of the wrong type or range.
    """
    spec: DataSpec = _build(DataSpec, values, "data.")
    return spec


def field_names() -> list[str]:
    """Return the dotted name of every field that `Experiment.override` takes."""
    return list(_walk(Experiment, ""))


def _walk(cls: type, prefix: str) -> Iterator[str]:
    for name, hint in get_type_hints(cls).items():
        yield prefix + name
        section = _section(hint)
        if section is not None:
            yield from _walk(section, f"{prefix}{name}.")


def _change(tree: dict[str, Any], name: str, value: Any, changed: set[str]) -> None:
    """Change one field, or several fields of a section, in an experiment's nested dicts."""
    *sections, field = name.split(".")
    node: Any = tree
    for section in sections:
        node = node.get(section, {}) if isinstance(node, dict) else {}
        if node is None:
            raise KitError(f"{name} cannot be set where {section} is null: give the section, as {section}: {{...}}")
    if not isinstance(node, dict) or field not in node:
        raise _unknown_field(name)
    value = _plain(value)
    if isinstance(value, Mapping) and name in _sections():
        if node[field] is None:
            node[field] = _plain(_sections()[name]())
        for inner, item in value.items():
            _change(tree, f"{name}.{inner}", item, changed)
        return
    twice = next((other for other in changed if f"{other}.".startswith(f"{name}.")), None)
    if twice is not None:
        raise KitError(f"{twice} is given twice" if twice == name else f"{twice} is given, and {name} as a whole")
    changed.add(name)
    node[field] = value


def _settle_wandb(tracking: Any, changes: Mapping[str, Any]) -> None:
    """Let a change of `tracking.to` that names W&B undo an older `tracking.wandb: none`; refuse the two together."""
    section = changes.get("tracking")
    inside = section if isinstance(section, Mapping) else {}
    named = changes.get("tracking.to", inside.get("to"))
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list | tuple) or "wandb" not in names or tracking["wandb"] != "none":
        return
    if "tracking.wandb" in changes or "wandb" in inside:
        raise KitError("tracking.to names wandb, and tracking.wandb is none: leave out one of the two")
    tracking["wandb"] = "auto"


def _sections() -> dict[str, type]:
    """Return the experiment's sections by name."""
    found = {name: _section(hint) for name, hint in _hints(Experiment).items()}
    return {name: section for name, section in found.items() if section is not None}


def _unknown_field(name: str) -> KitError:
    """Return the error for a dotted name that is not a field."""
    section, dot, last = name.rpartition(".")
    if last.lower() in NOT_HAD:
        return KitError(f"there is no field {shown(name)}: {NOT_HAD[last.lower()]}")
    fields = {known: known.rpartition(".") for known in field_names()}
    # Suggest the same name in another section; otherwise a similar name in the given section.
    meant = [known for known, parts in fields.items() if parts[2] == last and parts[1]]
    inside = [parts[2] for parts in fields.values() if parts[0] == section]
    guess = nearest(last, inside, cutoff=0.6)
    meant = meant or ([f"{section}{dot}{guess}"] if guess else [])
    hint = f" Did you mean {' or '.join(map(repr, meant))}?" if meant else ""
    allowed = [f"{section}{dot}{field}" for field in inside] or fields
    return KitError(f"there is no field {shown(name)}.{hint} Allowed: {', '.join(allowed)}.")


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise KitError(
            f"{prefix.rstrip('.') or 'the whole'} must be a mapping of names to values, not {type(values).__name__}"
        )
    hints = _hints(cls)
    for name in values:
        if name not in hints:
            raise _unknown_field(f"{prefix}{name}")
    arguments = {}
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}"
        if field.name in values:
            value, section = values[field.name], _section(hints[field.name])
            arguments[field.name] = (
                _build(section, value, f"{name}.") if section is not None and isinstance(value, Mapping) else value
            )
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise KitError(f"{name} is missing")
    return cls(**arguments)
