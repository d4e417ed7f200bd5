"""Merge a run's adapters into its base."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import nn

from ..config.experiment import Experiment
from ..config.sections import HEADS
from ..errors import KitError, unknown
from ..evaluation.report import data_of
from ..models.build import build
from ..models.configuration import classifier_config, is_decoder
from ..models.forward import forward_texts
from ..models.heads import CosineHead, PooledClassifier, head_modules
from ..models.sources import find_base
from ..models.tokenizers import load_tokenizer
from ..models.weights import load_trained
from ..runs.predictor import Predictor
from ..system.arguments import FLAG, RUN, TEXT, a_path, takes
from ..system.devices import COMPUTE_DTYPES, default_device, generators_kept, quiet
from ..system.environment import environment
from ..system.files import move_into_place, saving, write_json, write_text
from ..system.parsing import SCHEMA, read_json
from .before_and_after import compared
from .card import _pooling, _use, card
from .modeling_pooled import PooledConfig, PooledForSequenceClassification
from .place import new_place

if TYPE_CHECKING:
    from ..data.rows import TextData

logger = logging.getLogger(__name__)

WITH_CODE = "with_code"
PADDING = "<|padding of the merged model|>"  # a token that no text should contain


# --- merging ----------------------------------------------------------------------------------------------------


@takes(run=RUN, to=a_path("merged"), dtype=TEXT, progress=FLAG)
def merge(run: Predictor, to: str | Path, *, dtype: str = "fp32", progress: bool = True) -> dict[str, Any]:
    """Merge a run's adapters into its full-precision base, and measure what that changes.

    Adapters added to 4-bit weights would be rounded away. So they are added to the base's own weights, in fp32 on the
    CPU (4 bytes of memory per parameter). The result differs from the trained model, whose base was quantized: the
    scores of both on the run's validation and test rows are in the return value and in the folder's card. Probabilities
    differ, too: a limit for `reject_below` that was chosen on the run has to be chosen again. A fully fine-tuned run
    has nothing to merge and is saved as it is.

    Args:
        run: A finished run.
        to: Folder for the merged model; it must not exist, or be empty.
        dtype: Dtype of the stored weights: `fp32`, `fp16` or `bf16`. The head of the layout `with_code` stays fp32.
        progress: Show progress bars.

    Returns:
        What the folder's `merge.json` holds: `validation` and `test` (None for a run without test rows), each what
        `before_and_after.compared` returns: `rows`, `before` and `after` (the run's and the merged model's scores, with
        95% intervals), `difference` (of macro F1, after minus before, on the same rows), `same_label` (share of the
        rows), `largest_difference` (of any probability) and `limit`; `dtype`, `trained_on`, `environment` with the
        checksums of data and base; and `layout`:

        - `transformers`: `AutoModelForSequenceClassification.from_pretrained(to)` and
          `pipeline("text-classification", to)` read it;
        - `with_code`: for a head that transformers has no class for (on a mean of states, or of cosines). The folder
          holds the class, `modeling_pooled.py`, and the same calls read it with `trust_remote_code=True`. Without it
          they refuse the folder; they never open it with a random head.

    Raises:
        KitError: When `to` exists and is not an empty folder or is in the run's folder, `dtype` is none of these, the
            data is no longer what the run was trained on, the head fits neither layout, or the base's class cannot be
            written and opened again. All of this is checked before any weight is read.
    """
    if dtype not in COMPUTE_DTYPES:
        raise unknown("dtype", dtype, list(COMPUTE_DTYPES))
    target = new_place(run, to)
    tokenizer = load_tokenizer(run.experiment.model, run.path / "tokenizer")
    _rehearse(run, tokenizer.pad_token_id, COMPUTE_DTYPES[dtype])
    data = data_of(run)
    with saving(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".merge-") as aside:
            made = Path(aside) / "model"
            layout, use = _write(run, tokenizer, made, COMPUTE_DTYPES[dtype])
            base = find_base(run.experiment.model)
            report = {
                "schema": SCHEMA,
                "name": run.experiment.name,
                "layout": layout,
                "dtype": dtype,
                "trained_on": run.experiment.quantization.label,
                "adapters": run.experiment.lora is not None,
                **_compared(run, made, tokenizer, data, progress),
                "environment": environment(
                    default_device(),
                    data_checksum=data.checksum,
                    base_checksum=base.checksum,
                    base_config_checksum=base.configuration,
                ),
            }
            write_json(made / "merge.json", report)
            write_text(made / "README.md", card(run, merged=report, use=use))
            if target.is_dir():
                target.rmdir()
            move_into_place(made, target)
    return report


@takes(run=RUN, to=a_path("merged"), dtype=TEXT)
def write_merged(run: Predictor, to: str | Path, *, dtype: str = "fp32") -> Any:
    """Write a run's merged model as `merge` does, but without comparing it: no `merge.json`, no card.

    Args:
        run: A finished run.
        to: A folder that does not exist yet.
        dtype: As in `merge`.

    Returns:
        The tokenizer that was written; it may have another pad token than the run's.
    """
    tokenizer = load_tokenizer(run.experiment.model, run.path / "tokenizer")
    _write(run, tokenizer, Path(to), COMPUTE_DTYPES[dtype])
    return tokenizer


def _write(run: Predictor, tokenizer: Any, folder: Path, dtype: torch.dtype) -> tuple[str, str]:
    """Write the merged model and its tokenizer; return the layout and the card's example code."""
    model = _merged(run, tokenizer.pad_token_id)
    layout, use = _save(run, model, tokenizer, folder, dtype)
    tokenizer.save_pretrained(str(folder))
    return layout, use


def _compared(run: Predictor, folder: Path, tokenizer: Any, data: TextData, progress: bool) -> dict[str, Any]:
    """Return the report's `validation` and `test`; None for a split without rows."""
    merged = load_merged(folder)
    found: dict[str, Any] = {}
    for name, rows in (("validation", data.validation), ("test", data.test)):
        if not len(rows):
            found[name] = None
            continue
        before = run.predict(rows.texts, progress=f"{name}, before" if progress else None).logits
        after = _logits(run, merged, tokenizer, rows.texts, f"{name}, after" if progress else None)
        found[name] = compared(before, after, rows.labels)
    return found


def _merged(run: Predictor, pad_token_id: int) -> Any:
    """Return the run's classifier with its adapters merged into the unquantized base, fp32, on the CPU."""
    model: Any = load_trained(
        unquantized(run.experiment),
        run.label_names,
        run.path / "adapter",
        device=torch.device("cpu"),
        pad_token_id=pad_token_id,
    )
    return model if run.experiment.lora is None else model.merge_and_unload(safe_merge=True)


def unquantized(experiment: Experiment) -> Experiment:
    """Return the experiment with its base in full precision, as it is merged and handed on."""
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
    shapes = unquantized(run.experiment).override({"lora": None, "model.random_weights": True})
    with generators_kept(meta):
        model = build(shapes, run.label_names, device=meta, pad_token_id=pad_token_id)
    try:
        plain, layout = _plain(run, model, dtype)
        # What the Auto class would open the base's config as, once its class is written into it.
        kind: Any = transformers.AutoModel
        wanted = plain.base if layout == WITH_CODE else plain
        if layout != WITH_CODE:
            kind = transformers.AutoModelForSequenceClassification
        config = type(wanted.config).from_dict({**wanted.config.to_dict(), "architectures": [type(wanted).__name__]})
        with torch.device("meta"):
            opened = type(kind.from_config(config))
    except KitError:
        raise
    except Exception as error:  # any error here would otherwise come after minutes of work
        first = " ".join(str(error).split())[:200]
        raise KitError(
            f"{type(model).__name__} on {run.experiment.model.name} cannot be merged: {type(error).__name__}: {first}"
        ) from error
    if opened is not type(wanted):
        raise KitError(
            f"{run.experiment.model.name} cannot be merged: what is written is a {type(wanted).__name__}, and "
            f"transformers would open it as a {opened.__name__}"
        )


def _plain(run: Predictor, model: Any, dtype: torch.dtype) -> tuple[Any, str]:
    """Return the plain transformers model to write, and the layout."""
    config = model.config
    head = run.experiment.model.head
    if not HEADS[head].merges:
        raise KitError(f"a {head} head is no class of transformers, and nothing says how to write it down: use the run")
    pooled = isinstance(model, PooledClassifier)
    if head == "cosine" and not pooled and not is_decoder(config):
        raise KitError(
            f"a cosine head on {type(model).__name__}'s own pooling is no class of transformers and cannot be "
            "written down in a few lines; train with model.pooling: mean, or with model.head: linear"
        )
    # Copy into a plain transformers model with a new config, without what the run changed for training.
    fresh = classifier_config(run.experiment.model, run.label_names, pad_token_id=config.pad_token_id)
    with torch.device("meta"):
        if pooled or head == "cosine":
            plain: Any = PooledForSequenceClassification(pooled_config(run, model, fresh, dtype))
            plain.base.to(dtype)
            sources = {"base": model.base_model, "classifier": getattr(model, head_modules(model)[0])}
            layout = WITH_CODE
        else:
            plain = transformers.AutoModelForSequenceClassification.from_config(fresh, dtype=dtype)
            sources, layout = {"": model}, "transformers"
    state: dict[str, torch.Tensor] = {}
    known: set[int] = set()
    for place, source in sources.items():
        for name, tensor in source.state_dict().items():
            stored = tensor.float() if place == "classifier" else tensor.to(dtype)
            storage = stored.untyped_storage()._cdata
            # safetensors refuses shared storages, and transformers leaves out only weights that it knows are tied.
            state[f"{place}.{name}".lstrip(".")] = stored.clone() if storage in known else stored
            known.add(storage)
    unread = isinstance(getattr(getattr(plain, "base", None), "pooler", None), nn.Identity)
    plain.load_state_dict(
        {name: tensor for name, tensor in state.items() if not (unread and name.startswith("base.pooler."))},
        assign=True,
    )
    return plain, layout


def pooled_config(run: Predictor, model: Any, base: transformers.PretrainedConfig, dtype: torch.dtype) -> PooledConfig:
    """Return the configuration of a merged classifier that transformers has no class for."""
    own = dict(base.to_dict())
    # One configuration may stand for two classes (Funnel's); AutoModel goes by the name that is written here.
    own["architectures"] = [type(transformers.AutoModel.from_config(base)).__name__]
    own["dtype"] = str(dtype).removeprefix("torch.")
    cosine = run.experiment.model.head == "cosine"
    return PooledConfig(
        base=own,
        pooling=_pooling(run) if isinstance(model, PooledClassifier) else "last",
        head="cosine" if cosine else "linear",
        scale=CosineHead.SCALE if cosine else 1.0,
        width=getattr(model, head_modules(model)[0]).weight.shape[1],
        id2label=base.id2label,
        label2id=base.label2id,
        pad_token_id=base.pad_token_id,
        problem_type=base.problem_type,
        dtype=dtype,
    )


def _save(run: Predictor, model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> tuple[str, str]:
    """Save a merged classifier for plain transformers; return the layout and the card's example code.

    The tokenizer may get another pad token.
    """
    plain, layout = _plain(run, model, dtype)
    with quiet():
        if layout == WITH_CODE:
            # transformers copies the file of the classes into the folder, and names them in config.json.
            PooledConfig.register_for_auto_class()
            PooledForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
        elif is_decoder(plain.config) and tokenizer.padding_side == "right":
            _pad_with_a_new_token_(plain, tokenizer)
        plain.save_pretrained(str(folder))
    return layout, _use(run, layout)


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


@takes(folder=a_path("merged"))
def load_merged(folder: str | Path) -> nn.Module:
    """Load what `merge` wrote, in its stored dtype.

    Args:
        folder: The folder that `merge` wrote.

    Returns:
        A classifier in eval mode on this machine's GPU, or on the CPU. Its call takes `input_ids` and
        `attention_mask`, `[batch, length]`, and returns an output with `logits`, `[batch, classes]`.
    """
    file = Path(folder) / "config.json"
    kind: Any = transformers.AutoModelForSequenceClassification
    if file.is_file() and read_json(file).get("model_type") == PooledConfig.model_type:
        # The kit's own copy of the class: no code of the folder runs.
        kind = PooledForSequenceClassification
    elif (Path(folder) / "head.safetensors").is_file():
        raise KitError(
            f"{folder} was merged by an earlier version, whose layout is no longer read: merge the run again"
        )
    with quiet():
        model = kind.from_pretrained(str(folder))
    model.eval().to(default_device())
    loaded: nn.Module = model
    return loaded


def _logits(run: Predictor, merged: nn.Module, tokenizer: Any, texts: Any, progress: str | None) -> np.ndarray:
    """Return a merged model's logits for texts."""
    return forward_texts(
        merged,
        tokenizer,
        texts,
        device=default_device(),
        precision="fp32",  # as stored: no autocast
        max_length=run.experiment.data.max_length,
        too_long=run.experiment.data.too_long,
        progress=progress,
    )
