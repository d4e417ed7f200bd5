"""Loss curves: their roughness, their spikes, and which diverged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .limits import SPIKE
from .records import Records


def roughness(curve: Mapping[str, Sequence[float | None]]) -> float | None:
    """Return the roughness of a run's gradient norms: the mean of |ln(next / this)| over consecutive logs.

    Spikes make it large; a slow rise or fall over the whole run hardly counts.

    Args:
        curve: With `grad_norm`, in the order of the steps; None if a step had none.

    Returns:
        The mean, or None for fewer than three norms.
    """
    norms = np.array([norm for norm in curve["grad_norm"] if norm], dtype=float)
    return float(np.abs(np.diff(np.log(norms))).mean()) if len(norms) > 2 else None


def spikes(curve: Mapping[str, Sequence[float | None]]) -> int:
    """Count a run's loss spikes: values above the five previous logs by more than `SPIKE` times the first loss.

    Args:
        curve: With `loss`, in the order of the steps; None if a step had none.
    """
    losses = [loss for loss in curve["loss"] if loss is not None]
    return sum(losses[place] > max(losses[place - 5 : place]) + SPIKE * losses[0] for place in range(5, len(losses)))


def diverged(curve: Mapping[str, Sequence[float | None]]) -> bool:
    """Return whether a run diverged: its last loss is not a finite number, or not below the first.

    Args:
        curve: With `loss`, in the order of the steps; None if a step had none.
    """
    last = curve["loss"][-1]
    known = [loss for loss in curve["loss"] if loss is not None and np.isfinite(loss)]
    return not known or last is None or not np.isfinite(last) or last >= known[0]


def curves(records: Records) -> list[dict[str, Any]]:
    """Return the loss and gradient norms of every run in records and run folders.

    Returns:
        Each with `label`, `method`, `model`, `scheme`, `double_quantization`, `seed`, `device`, `source`, `settings`
        (equal for runs that differ only in storage and seed), and the lists `step`, `loss` and `grad_norm`.
    """
    found = []
    for name in ("accuracy", "schemes"):
        for row in records.rows(name):
            if not row.get("curve", {}).get("step"):
                continue
            method = row.get("method") or ("lora" if row["scheme"] == "none" else "qlora")
            settings = re.sub(r"_(qlora|lora)$", "", row.get("preset", "")), row.get("learning_rate")
            found.append(
                {
                    **{key: row[key] for key in ("model", "scheme", "double_quantization", "seed", "device")},
                    "method": method,
                    "label": f"{method}, {row['scheme']}, seed {row['seed']}",
                    "source": f"results/{name}.json",
                    "settings": str(settings),
                    **row["curve"],
                }
            )
    for run in sorted(records.runs, key=lambda run: str(run["name"])):
        spec, losses = run["experiment"], run["training"]["losses"]
        if not losses:
            continue  # too short for a log
        scheme, lora = spec["quantization"]["scheme"], spec["lora"]
        method = "full" if lora is None else "lora" if scheme == "none" else "qlora"
        found.append(
            {
                "method": method,
                "model": spec["model"]["name"],
                "scheme": scheme,
                "double_quantization": spec["quantization"]["double_quantization"],
                "seed": spec["training"]["seed"],
                "device": run["environment"]["device"],
                "label": run["name"],
                "source": "runs",
                "settings": repr([spec["data"], lora, {**spec["training"], "seed": None}]),
                **{key: [row.get(key) for row in losses] for key in ("step", "loss", "grad_norm")},
            }
        )
    return found
