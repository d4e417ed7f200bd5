"""QLoRA made reproducible: an experiment goes in, a run folder comes out.

Names are imported when first used, so `import qlora_kit` costs milliseconds and needs neither torch nor
transformers until something is trained, measured or drawn.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module that holds it
_EXPORTS = {
    "KitError": "errors",
    "Experiment": "experiment",
    "ModelSpec": "experiment",
    "DataSpec": "experiment",
    "LoraSpec": "experiment",
    "TrainingSpec": "experiment",
    "TrackingSpec": "experiment",
    "preset": "experiment",
    "presets": "experiment",
    "resolve_preset": "experiment",
    "Quantization": "quantization",
    "TextData": "data",
    "banking77": "data",
    "text_classification": "data",
    "finetune": "training",
    "evaluate": "evaluation",
    "Run": "records",
    "load_run": "records",
    "newest_run": "records",
    "zip_results": "export",
    "download_results": "export",
    "Search": "searching",
    "search": "searching",
}
_MODULES = (
    "anatomy",
    "claims",
    "cards",
    "data",
    "errors",
    "evaluation",
    "experiment",
    "export",
    "int4",
    "memory",
    "models",
    "notebooks",
    "plots",
    "quantization",
    "records",
    "rerun",
    "searching",
    "tracking",
    "training",
)

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from .data import TextData as TextData
    from .data import banking77 as banking77
    from .data import text_classification as text_classification
    from .errors import KitError as KitError
    from .evaluation import evaluate as evaluate
    from .experiment import DataSpec as DataSpec
    from .experiment import Experiment as Experiment
    from .experiment import LoraSpec as LoraSpec
    from .experiment import ModelSpec as ModelSpec
    from .experiment import TrackingSpec as TrackingSpec
    from .experiment import TrainingSpec as TrainingSpec
    from .experiment import preset as preset
    from .experiment import presets as presets
    from .experiment import resolve_preset as resolve_preset
    from .export import download_results as download_results
    from .export import zip_results as zip_results
    from .quantization import Quantization as Quantization
    from .records import Run as Run
    from .records import load_run as load_run
    from .records import newest_run as newest_run
    from .searching import Search as Search
    from .searching import search as search
    from .training import finetune as finetune


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, *_MODULES})
