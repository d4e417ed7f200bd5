"""Write a merged model's card, with the code to use the model."""

from __future__ import annotations

from typing import Any

from ..models.configuration import load_config, resolve_pooling
from ..runs import card as cards
from ..runs.predictor import Predictor
from ..system.arguments import RUN, takes


def _pooling(run: Predictor) -> str:
    return resolve_pooling(run.experiment.model, load_config(run.experiment.model))


PIPELINE = """```python
from transformers import pipeline

classify = pipeline("text-classification", "this-folder"{trust})
print(classify(["a text"], truncation=True, max_length={length}))
```"""

CODE = """transformers has no class for this head. `modeling_pooled.py` in this folder is that class; it needs torch
and transformers alone. `trust_remote_code=True` runs it: read it first. Without that argument, transformers refuses
the folder.

"""


def _use(run: Predictor, layout: str) -> str:
    """Return the card's example code, which classifies with a merged folder."""
    trust = layout != "transformers"
    use = PIPELINE.format(trust=", trust_remote_code=True" if trust else "", length=run.experiment.data.max_length)
    return CODE + use if trust else use


# --- the card and the hub ---------------------------------------------------------------------------------------


@takes(run=RUN)
def card(run: Predictor, **more: Any) -> str:
    """Return a run's model card from its folder, with test scores if the run was evaluated.

    Args:
        run: A finished run.
        **more: `merged` and `use`, as `cards.model_card` takes them.
    """
    return cards.of_run(run, **more)
