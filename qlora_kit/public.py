"""The public names and the module that defines each: one table for the package and its messages."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

EXPORTS = {
    "KitError": "errors",
    "Experiment": "config.experiment",
    "ModelSpec": "config.sections",
    "DataSpec": "config.sections",
    "LoraSpec": "config.sections",
    "TrainingSpec": "config.sections",
    "TrackingSpec": "config.sections",
    "preset": "config.preset",
    "presets": "config.names",
    "resolve_preset": "config.preset",
    "Quantization": "config.quantization",
    "TextData": "data.rows",
    "banking77": "data.loading",
    "text_classification": "data.loading",
    "finetune": "training.finetune",
    "evaluate": "evaluation.report",
    "Run": "run",
    "load_run": "run",
    "newest_run": "run",
    "RunClassifier": "export.estimator",
    "zip_results": "export.archive",
    "download_results": "export.archive",
    "Search": "searching.search",
    "search": "searching.search",
}
"""Public functions and classes (`qlora_kit.NAME`), with the module that defines each."""

MODULES = {
    "anatomy": "models.parts",
    "arguments": "system.arguments",
    "cards": "runs.card",
    "claims": "claims",
    "config": "config",
    "data": "data",
    "errors": "errors",
    "evaluation": "evaluation",
    "experiment": "config",
    "export": "export",
    "int4": "quantization.int4",
    "inventory": "models.inventory",
    "memory": "memory",
    "metrics": "metrics",
    "models": "models",
    "notebooks": "notebooks",
    "plots": "plots",
    "quantization": "quantization",
    "records": "run",
    "rerun": "rerun",
    "runtime": "notebooks.runtime",
    "searching": "searching",
    "tracking": "tracking",
    "training": "training",
}
"""Public modules (`qlora_kit.NAME`), with their real paths. Notebooks of version 0.1.0 use other names for some."""

HANDED_ON = {
    "memory": {
        "Measured": "training.watcher",
        "measure": "training.measure",
        "compare": "training.measure",
        "race": "training.measure",
    },
    "notebooks": {
        "PACKAGE": "notebooks.finding",
        "STATE": "notebooks.run_all",
        "assign_params": "notebooks.parameters",
        "choose": "notebooks.finding",
        "choose_experiment": "notebooks.opening",
        "code_hash": "notebooks.run_all",
        "duration": "notebooks.screen",
        "list_notebooks": "notebooks.finding",
        "notebook_folder": "notebooks.finding",
        "notebook_parameters": "notebooks.parameters",
        "open_run": "notebooks.opening",
        "run_notebooks": "notebooks.run_all",
        "split_params": "notebooks.parameters",
        "spoken": "notebooks.screen",
        "training_time": "notebooks.opening",
    },
    "records": {
        "FULL": "system.environment",
        "NO_LOCKS": "system.files",
        "PARTIAL": "system.files",
        "Predictions": "runs.predictor",
        "Predictor": "runs.predictor",
        "RECORDED_PACKAGES": "system.environment",
        "RunFolder": "runs.folder",
        "SCHEMA": "system.parsing",
        "WANDB_RUN": "system.files",
        "as_json": "system.files",
        "commit": "system.environment",
        "cpu_name": "system.environment",
        "drop_partial": "system.files",
        "environment": "system.environment",
        "has_file_locks": "system.files",
        "locked": "system.files",
        "move_aside": "system.files",
        "move_into_place": "system.files",
        "notebook_record": "runs.record",
        "plain": "system.files",
        "read_json": "system.parsing",
        "refuse_links": "system.files",
        "refuse_ways_out": "system.files",
        "saving": "system.files",
        "write_json": "system.files",
        "write_text": "system.files",
    },
}
"""Names that a module re-exports from another; they are imported on first use.

Measuring memory needs training, so its code is in `training`, not in `memory`. Notebooks start with `qk.runtime`, which
has to work without the packages that other files of `notebooks` need. Notebooks of version 0.1.0 use the name `records`
for files, environment and runs.
"""


def module_named(call: Callable[..., Any]) -> str:
    """Return the public name of a function's module, e.g. `memory` for `training.measure.measure`.

    Args:
        call: A function or class of the package.
    """
    module = call.__module__.removeprefix("qlora_kit.")
    for name, handed_on in HANDED_ON.items():
        if handed_on.get(call.__qualname__) == module:
            return name
    known = [name for name, path in MODULES.items() if f"{module}.".startswith(f"{path}.")]
    return max(known, key=lambda name: len(MODULES[name]), default=module.rpartition(".")[2])


def handed_on(module: str, name: str) -> Any:
    """Return an object that a module re-exports from another.

    Args:
        module: The module's public name, a key of `HANDED_ON`.
        name: The object's name.

    Raises:
        AttributeError: When the module does not re-export this name.
    """
    if name not in HANDED_ON[module]:
        raise AttributeError(f"module 'qlora_kit.{module}' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qlora_kit.{HANDED_ON[module][name]}"), name)
