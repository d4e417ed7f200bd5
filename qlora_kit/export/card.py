"""Write a merged model's card, with the code to use the model."""

from __future__ import annotations

import inspect
from typing import Any

from ..models.configuration import load_config, resolve_pooling
from ..models.heads import CosineHead
from ..models.sources import find_base
from ..runs import card as cards
from ..runs.predictor import Predictor
from ..system.arguments import RUN, takes


def _pooling(run: Predictor) -> str:
    return resolve_pooling(run.experiment.model, load_config(run.experiment.model))


PIPELINE = """```python
from transformers import pipeline

classify = pipeline("text-classification", "this-folder")
print(classify(["a text"], truncation=True, max_length={length}))
```"""

LINES = """transformers has no class for this head; with these lines neither qlora_kit nor remote code is needed:

```python
import torch
from safetensors.torch import load_file
from torch.nn.functional import linear, normalize
from transformers import AutoModel, AutoTokenizer

folder, texts = "this-folder", ["a text"]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModel.from_pretrained(folder{arguments}).eval()
head = load_file(f"{{folder}}/head.safetensors")

batch = tokenizer(texts, padding=True, truncation=True, max_length={length}, return_tensors="pt")
mask = batch["attention_mask"]
with torch.no_grad():
    states = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state.float()
{pooled}
{logits}
print([model.config.id2label[place] for place in logits.argmax(dim=1).tolist()])
```"""


def _use(run: Predictor, plain: Any, layout: str) -> str:
    """Return the card's example code, which classifies with the folder of a plain transformers model."""
    if layout == "transformers":
        return PIPELINE.format(length=run.experiment.data.max_length)
    cosine = run.experiment.model.head == "cosine"
    # The mean does not use BERT's pooler, so the folder does not hold it.
    bare = "add_pooling_layer" in inspect.signature(type(plain)).parameters
    return LINES.format(
        arguments=", add_pooling_layer=False" if bare else "",
        length=run.experiment.data.max_length,
        pooled="pooled = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)"
        if _pooling(run) == "mean"
        else "pooled = states[torch.arange(len(texts)), mask.cumsum(1).argmax(1)]",
        logits=f'logits = {CosineHead.SCALE:g} * normalize(pooled, dim=-1) @ normalize(head["weight"], dim=-1).T'
        if cosine
        else 'logits = linear(pooled, head["weight"], head["bias"])',
    )


# --- the card and the hub ---------------------------------------------------------------------------------------


@takes(run=RUN)
def card(run: Predictor, **more: Any) -> str:
    """Return a run's model card from its folder, with test scores if the run was evaluated.

    Args:
        run: A finished run.
        **more: `merged` and `use`, as `cards.model_card` takes them.
    """
    return cards.model_card(
        run.experiment,
        run.training,
        find_base(run.experiment.model).licence,
        evaluation=run.evaluation,
        environment=run.environment,
        **more,
    )
