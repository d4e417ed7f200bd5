"""Write a run for another library to open, by that library's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import KitError, unknown
from ..runs.predictor import Predictor
from ..system.arguments import FLAG, RUN, SHARE, TEXT, a_path, takes

RUNTIMES = ("onnx", "peft")


@takes(run=RUN, runtime=TEXT, to=a_path("served"), weights=TEXT, embeddings=TEXT, least_equal=SHARE, progress=FLAG)
def export(
    run: Predictor,
    runtime: str,
    to: str | Path,
    *,
    weights: str = "as_trained",
    embeddings: str = "fp32",
    least_equal: float = 1.0,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a run as a folder that another library opens without the kit.

    Args:
        run: A finished run.
        runtime: `onnx`: ONNX Runtime, with the whole model in the folder (see `export.onnx.export`). `peft`: PEFT, with
            the adapters and the head; the base is fetched by its name (see `export.export_peft`).
        to: A folder that does not exist, or is empty.
        weights: For `onnx`: how the weights are stored.
        embeddings: For `onnx`: how the table of words is stored.
        least_equal: For `onnx`: least share of rows, 0 to 1, that get the run's label.
        progress: Show a progress bar.

    Returns:
        For `onnx`, what the folder's `export.json` holds. For `peft`, `runtime` and `folder`.

    Raises:
        KitError: For an unknown runtime; for `peft` with what is for `onnx` alone; and as the two functions.
    """
    if runtime not in RUNTIMES:
        raise unknown("runtime", runtime, RUNTIMES)
    if runtime == "onnx":
        from .onnx import export as export_onnx

        return export_onnx(run, to, weights=weights, embeddings=embeddings, least_equal=least_equal, progress=progress)
    if (weights, embeddings, least_equal) != ("as_trained", "fp32", 1.0):
        raise KitError(
            "PEFT's folder holds the adapters as they were trained: weights, embeddings and least_equal are for the "
            "runtime onnx alone"
        )
    from .peft_folder import export_peft

    return {"runtime": runtime, "folder": str(export_peft(run, to))}
