"""Merge a run's adapters into its base."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..config.experiment import Experiment
from ..config.sections import HEADS
from ..errors import KitError, unknown
from ..evaluation.report import data_of
from ..metrics.differences import paired_difference
from ..metrics.scores import metrics
from ..models.build import build
from ..models.configuration import classifier_config, is_decoder
from ..models.forward import forward_texts
from ..models.heads import CosineHead, PooledClassifier, head_modules, last_tokens, mean_pool
from ..models.tokenizers import load_tokenizer
from ..models.weights import load_trained
from ..runs.predictor import Predictor
from ..system.arguments import FLAG, RUN, TEXT, a_path, takes
from ..system.devices import COMPUTE_DTYPES, default_device, generators_kept, quiet
from ..system.environment import environment
from ..system.files import move_into_place, saving, write_json, write_text
from ..system.parsing import SCHEMA
from .card import _pooling, _use, card

logger = logging.getLogger(__name__)

HEAD = "head.safetensors"
PADDING = "<|padding of the merged model|>"  # a token that no text should contain


# --- merging ----------------------------------------------------------------------------------------------------


@takes(run=RUN, to=a_path("merged"), dtype=TEXT, progress=FLAG)
def merge(run: Predictor, to: str | Path, *, dtype: str = "fp32", progress: bool = True) -> dict[str, Any]:
    """Merge a run's adapters into its full-precision base, and measure what that changes.

    Adapters added to 4-bit weights would be rounded away. So they are added to the base's own weights, in fp32 on the
    CPU (4 bytes of memory per parameter). The result differs from the trained model, whose base was quantized: the
    scores of both on the run's validation rows are in the return value and in the folder's card. A fully fine-tuned run
    has nothing to merge and is saved as it is.

    Args:
        run: A finished run.
        to: Folder for the merged model; it must not exist, or be empty.
        dtype: Dtype of the stored weights: `fp32`, `fp16` or `bf16`. The head of the layout `encoder_and_head` stays
            fp32.
        progress: Show progress bars.

    Returns:
        What the folder's `merge.json` holds: `before` and `after` (the run's and the merged model's scores on the
        validation rows, with 95% intervals), `difference` (of macro F1, after minus before, on the same rows),
        `same_label` (share of the rows), `rows`, `dtype`, `trained_on`, and `layout`:

        - `transformers`: `AutoModelForSequenceClassification.from_pretrained(to)` and
          `pipeline("text-classification", to)` read it;
        - `encoder_and_head`: for a head that transformers has no class for (on a mean of states, or of cosines).
          `AutoModel.from_pretrained(to)` reads the base, `head.safetensors` holds the head, and the folder's card
          shows the lines that classify with both.

    Raises:
        KitError: When `to` exists and is not an empty folder, `dtype` is none of these, the data is no longer what the
            run was trained on, the head fits neither layout, or the base's class cannot be written and opened again.
            All of this is checked before any weight is read.
    """
    target = Path(to)
    if dtype not in COMPUTE_DTYPES:
        raise unknown("dtype", dtype, list(COMPUTE_DTYPES))
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise KitError(f"{target} is there already; nothing is overwritten: name a folder that is not")
    tokenizer = load_tokenizer(run.experiment.model, run.path / "tokenizer")
    _rehearse(run, tokenizer.pad_token_id, COMPUTE_DTYPES[dtype])
    data = data_of(run)
    with saving(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".merge-") as aside:
            made = Path(aside) / "model"
            model = _merged(run, tokenizer.pad_token_id)
            layout, use = _save(run, model, tokenizer, made, COMPUTE_DTYPES[dtype])
            tokenizer.save_pretrained(str(made))
            label = "validation" if progress else None
            before = run.predict(data.validation.texts, progress=label and "validation, before").logits
            after = _logits(run, made, tokenizer, data.validation.texts, label and "validation, after")
            truth = np.asarray(data.validation.labels)
            report = {
                "schema": SCHEMA,
                "name": run.experiment.name,
                "layout": layout,
                "dtype": dtype,
                "trained_on": run.experiment.quantization.label,
                "adapters": run.experiment.lora is not None,
                "rows": len(truth),
                "before": metrics(before, truth),
                "after": metrics(after, truth),
                "difference": paired_difference(after, before, truth),
                "same_label": float((before.argmax(axis=1) == after.argmax(axis=1)).mean()),
                "environment": environment(default_device(), data_checksum=data.checksum),
            }
            write_json(made / "merge.json", report)
            write_text(made / "README.md", card(run, merged=report, use=use))
            if target.is_dir():
                target.rmdir()
            move_into_place(made, target)
    return report


def _merged(run: Predictor, pad_token_id: int) -> Any:
    """Return the run's classifier with its adapters merged into the unquantized base, fp32, on the CPU."""
    model: Any = load_trained(
        _unquantized(run.experiment),
        run.label_names,
        run.path / "adapter",
        device=torch.device("cpu"),
        pad_token_id=pad_token_id,
    )
    return model if run.experiment.lora is None else model.merge_and_unload(safe_merge=True)


def _unquantized(experiment: Experiment) -> Experiment:
    return experiment.override(
        {
            "quantization": dataclasses.asdict(type(experiment.quantization)(scheme="none")),
            "model.lean": False,
            "training.precision": "fp32",
            "training.prepare_for_kbit_training": False,
        }
    )


def _rehearse(run: Predictor, pad_token_id: int, dtype: torch.dtype) -> None:
    """Try the merge on shapes alone, so that it cannot fail after the weights are computed.

    Raises:
        KitError: When the merged model could not be written or opened again.
    """
    meta = torch.device("meta")
    shapes = _unquantized(run.experiment).override({"lora": None, "model.random_weights": True})
    with generators_kept(meta):
        model = build(shapes, run.label_names, device=meta, pad_token_id=pad_token_id)
    try:
        kind, plain, layout = _plain(run, model, dtype)
        _use(run, plain, layout)
        config = type(plain.config).from_dict({**plain.config.to_dict(), "architectures": [type(plain).__name__]})
        with torch.device("meta"):
            opened = type(kind.from_config(config))
    except KitError:
        raise
    except Exception as error:  # any error here would otherwise come after minutes of work
        first = " ".join(str(error).split())[:200]
        raise KitError(
            f"{type(model).__name__} on {run.experiment.model.name} cannot be merged: {type(error).__name__}: {first}"
        ) from error
    if opened is not type(plain):
        raise KitError(
            f"{run.experiment.model.name} cannot be merged: what is written is a {type(plain).__name__}, and "
            f"transformers would open it as a {opened.__name__}"
        )


def _plain(run: Predictor, model: Any, dtype: torch.dtype) -> tuple[Any, Any, str]:
    """Return the Auto class, the plain transformers model to write, and the layout."""
    config = model.config
    head = run.experiment.model.head
    if not HEADS[head].merges:
        raise KitError(f"a {head} head is no class of transformers, and nothing says how to write it down: use the run")
    cosine = head == "cosine"
    kind: Any
    if isinstance(model, PooledClassifier) or cosine:
        if not isinstance(model, PooledClassifier) and not is_decoder(config):
            raise KitError(
                f"a cosine head on {type(model).__name__}'s own pooling is no class of transformers and cannot be "
                "written down in a few lines; train with model.pooling: mean, or with model.head: linear"
            )
        kind, source = transformers.AutoModel, model.base_model
        layout = "encoder_and_head"
    else:
        kind, source = transformers.AutoModelForSequenceClassification, model
        layout = "transformers"
    # Copy into a plain transformers model with a new config, without what the run changed for training.
    fresh_config = classifier_config(run.experiment.model, run.label_names, pad_token_id=config.pad_token_id)
    with torch.device("meta"):
        plain: Any = kind.from_config(fresh_config, dtype=dtype)
    if isinstance(getattr(source, "pooler", None), nn.Identity):
        plain.pooler = nn.Identity()
    state: dict[str, torch.Tensor] = {}
    known: set[int] = set()
    for name, tensor in source.state_dict().items():
        stored = tensor.to(dtype)
        storage = stored.untyped_storage()._cdata
        # safetensors refuses shared storages, and transformers leaves out only weights that it knows are tied.
        state[name] = stored.clone() if storage in known else stored
        known.add(storage)
    plain.load_state_dict(state, assign=True)
    return kind, plain, layout


def _save(run: Predictor, model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> tuple[str, str]:
    """Save a merged classifier for plain transformers; return the layout and the card's example code.

    The tokenizer may get another pad token.
    """
    _, plain, layout = _plain(run, model, dtype)
    with quiet():
        if layout == "transformers" and is_decoder(plain.config) and tokenizer.padding_side == "right":
            _pad_with_a_new_token_(plain, tokenizer)
        plain.save_pretrained(str(folder))
    if layout == "encoder_and_head":
        head = getattr(model, head_modules(model)[0])
        save_file({name: tensor.float().contiguous() for name, tensor in head.state_dict().items()}, folder / HEAD)
    return layout, _use(run, plain, layout)


def _pad_with_a_new_token_(model: Any, tokenizer: Any) -> None:
    """Give a merged decoder and its tokenizer a pad token that no text has, in place.

    The kit finds a text's last token by the mask. transformers' classes take the last token that is not the pad token,
    which is wrong if a text ends with it (DialoGPT ends its turns with this token, and is padded with it).
    """
    tokenizer.add_special_tokens({"pad_token": PADDING})
    place, rows = tokenizer.pad_token_id, model.get_input_embeddings().num_embeddings
    if place >= rows:
        model.resize_token_embeddings(place + 1, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[rows:] = 0
    for part in (model.config, model.config.get_text_config()):
        part.pad_token_id = place
    tokenizer.embeddings = max(place + 1, rows)


class _EncoderAndHead(nn.Module):
    """The computation of the card's example code as a module, to measure a merged folder."""

    def __init__(self, folder: Path, pooling: str, cosine: bool) -> None:
        super().__init__()
        self.base = transformers.AutoModel.from_pretrained(str(folder))
        self.head = nn.ParameterDict(load_file(str(folder / HEAD)))
        self.pooling, self.cosine = pooling, cosine

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SequenceClassifierOutput:
        states = self.base(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        if self.pooling == "mean":
            pooled = mean_pool(states, attention_mask)
        else:
            pooled = states[torch.arange(len(states), device=states.device), last_tokens(attention_mask)]
        weight = self.head["weight"]
        if self.cosine:
            directions = nn.functional.normalize(pooled, dim=-1)
            logits = CosineHead.SCALE * directions @ nn.functional.normalize(weight, dim=-1).T
        else:
            logits = nn.functional.linear(pooled, weight, self.head["bias"])
        return SequenceClassifierOutput(logits=logits)


@takes(run=RUN, folder=a_path("merged"))
def load_merged(run: Predictor, folder: str | Path) -> nn.Module:
    """Load what `merge` wrote, in its stored dtype.

    Args:
        run: The run that was merged.
        folder: The folder that `merge` wrote.

    Returns:
        A classifier in eval mode on this machine's GPU, or on the CPU. Its call takes `input_ids` and
        `attention_mask`, `[batch, length]`, and returns an output with `logits`, `[batch, classes]`.
    """
    model: Any
    with quiet():
        if (Path(folder) / HEAD).is_file():
            model = _EncoderAndHead(Path(folder), _pooling(run), run.experiment.model.head == "cosine")
        else:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(str(folder))
    model.eval().to(default_device())
    loaded: nn.Module = model
    return loaded


def _logits(run: Predictor, folder: Path, tokenizer: Any, texts: Any, progress: str | None) -> np.ndarray:
    """Return a merged folder's logits for texts; the model is loaded from disk."""
    return forward_texts(
        load_merged(run, folder),
        tokenizer,
        texts,
        device=default_device(),
        precision="fp32",  # as stored: no autocast
        max_length=run.experiment.data.max_length,
        too_long=run.experiment.data.too_long,
        progress=progress,
    )
