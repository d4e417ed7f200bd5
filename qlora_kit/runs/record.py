"""Build the record that a notebook writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config.experiment import Experiment
from ..errors import KitError
from ..system.environment import environment as describe_environment
from ..system.files import plain
from ..system.parsing import SCHEMA


def notebook_record(
    notebook: str,
    *,
    preset: str,
    experiment: Experiment | None = None,
    metrics: Mapping[str, Any] | None = None,
    memory: Mapping[str, Any] | None = None,
    timing: Mapping[str, Any] | None = None,
    parameters: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """Return a notebook's record, in the form that the kit reads.

    Args:
        notebook: Name of the notebook, e.g. `03_evaluate`.
        preset: Name of the preset it ran.
        experiment: The experiment, if it ran one.
        metrics: Metrics by split, e.g. `{"test": {"accuracy": {"value": ..., "low": ..., "high": ...}}}`.
        memory: Bytes.
        timing: Seconds and rates.
        parameters: Numbers of parameters, `trainable` and `all`.
        environment: As `system.environment.environment` returns it.
        **extra: More sections.

    Returns:
        The record, to be written with `write_json`.

    Raises:
        KitError: For an extra section whose name the record already uses.
    """
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "notebook": notebook,
        "preset": preset,
        "experiment": experiment.to_dict() if experiment else {},
        "metrics": dict(metrics or {}),
        "memory": dict(memory or {}),
        "timing": dict(timing or {}),
        "parameters": dict(parameters or {}),
        "environment": dict(environment if environment is not None else describe_environment()),
    }
    taken = set(extra) & set(record)
    if taken:
        raise KitError(f"a record has a section {taken.pop()!r} of its own")
    result: dict[str, Any] = plain({**record, **extra})
    return result
