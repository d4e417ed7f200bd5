"""QLoRA made reproducible: an experiment goes in, a run folder comes out.

Names are imported when first used, so `import qlora_kit` costs milliseconds and needs neither torch nor
transformers until something is trained, measured or drawn. The import sets that torch's threads sleep while they wait
(see `system.waiting`), and gives a user without a home a temporary one (see `system.home`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .public import EXPORTS, MODULES
from .system.home import give_home
from .system.versions import VERSION as __version__
from .system.waiting import wait_briefly

# Before other libraries are loaded, which read their settings then.
give_home()
wait_briefly()

__all__ = ["__version__", *EXPORTS]

if TYPE_CHECKING:
    from .config.experiment import Experiment as Experiment
    from .config.names import presets as presets
    from .config.preset import preset as preset
    from .config.preset import resolve_preset as resolve_preset
    from .config.quantization import Quantization as Quantization
    from .config.sections import DataSpec as DataSpec
    from .config.sections import LoraSpec as LoraSpec
    from .config.sections import ModelSpec as ModelSpec
    from .config.sections import TrackingSpec as TrackingSpec
    from .config.sections import TrainingSpec as TrainingSpec
    from .data.loading import banking77 as banking77
    from .data.loading import text_classification as text_classification
    from .data.rows import TextData as TextData
    from .errors import KitError as KitError
    from .evaluation.report import evaluate as evaluate
    from .export.archive import download_results as download_results
    from .export.archive import zip_results as zip_results
    from .run import Run as Run
    from .run import load_run as load_run
    from .run import newest_run as newest_run
    from .searching.search import Search as Search
    from .searching.search import search as search
    from .training.finetune import finetune as finetune


def __getattr__(name: str) -> Any:
    if name in EXPORTS:
        return getattr(importlib.import_module(f".{EXPORTS[name]}", __name__), name)
    if name in MODULES:
        return importlib.import_module(f".{MODULES[name]}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *EXPORTS, *MODULES})
