"""What leaves a run folder: a merged model for plain transformers, what is pushed to the hub, one zip of results."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import logging
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from . import cards, evaluation, models, records
from .errors import KitError, unknown
from .experiment import Experiment
from .records import Run

logger = logging.getLogger(__name__)

HEAD = "head.safetensors"
# What is pushed of a run folder. Its checkpoints and its data stay, and so does evaluation.json, which quotes test
# rows: its figures are in the card.
PUSHED = ("README.md", "experiment.yaml", "training.json", "environment.json", "adapter", "tokenizer")
# What a zip of results leaves out: what is large, what is W&B's own, and the rows of the user's data.
NOT_ZIPPED = ("checkpoints", "wandb", "data")


# --- merging ----------------------------------------------------------------------------------------------------


def merge(run: Run, to: str | Path, *, dtype: str = "fp32", progress: bool = True) -> dict[str, Any]:
    """Merge a run's adapters into its full-precision base, and measure what that changes.

    Added to weights of 4 bits the adapters would be rounded away, so they are added to the base's own weights, in
    fp32 on the CPU (4 bytes a parameter of memory). That is not the function that was trained, in which the base was
    quantized: the score of both on the run's validation rows is part of the result and of the folder's card. A fully
    fine-tuned run has nothing to merge and is saved as it is.

    Args:
        run: A finished run.
        to: Folder for the merged model; it must not exist, or be empty.
        dtype: What weights are stored in: `fp32`, `fp16` or `bf16`. The head of the second kind below stays fp32.
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
        KitError: When `to` is taken, `dtype` is none of those, the data is no longer what the run was trained on,
            or the head fits neither layout.
    """
    target = Path(to)
    if dtype not in models.COMPUTE_DTYPES:
        raise unknown("dtype", dtype, list(models.COMPUTE_DTYPES))
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise KitError(f"{target} is there already; nothing is overwritten: name a folder that is not")
    data = evaluation.data_of(run)
    tokenizer = models.load_tokenizer(run.experiment.model, run.path / "tokenizer")
    with records.saving(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".merge-") as aside:
            made = Path(aside) / "model"
            layout = _save(run, _merged(run, tokenizer.pad_token_id), made, models.COMPUTE_DTYPES[dtype])
            tokenizer.save_pretrained(str(made))
            label = "validation" if progress else None
            before = run.predict(data.validation.texts, progress=label and "validation, before").logits
            after = _logits(run, made, tokenizer, data.validation.texts, label and "validation, after")
            truth = np.asarray(data.validation.labels)
            report = {
                "schema": records.SCHEMA,
                "name": run.experiment.name,
                "layout": layout,
                "dtype": dtype,
                "trained_on": run.experiment.quantization.label,
                "adapters": run.experiment.lora is not None,
                "rows": len(truth),
                "before": evaluation.metrics(before, truth),
                "after": evaluation.metrics(after, truth),
                "difference": evaluation.paired_difference(after, before, truth),
                "same_label": float((before.argmax(axis=1) == after.argmax(axis=1)).mean()),
                "environment": records.environment(models.default_device(), data_checksum=data.checksum),
            }
            records.write_json(made / "merge.json", report)
            records.write_text(made / "README.md", card(run, merged=report, use=_use(run, made, layout)))
            if target.is_dir():
                target.rmdir()
            records.move_into_place(made, target)
    return report


def _merged(run: Run, pad_token_id: int) -> Any:
    """Return the run's classifier with its adapters merged into the unquantized base, fp32, on the CPU."""
    plain = run.experiment.override(
        {
            "quantization": dataclasses.asdict(type(run.experiment.quantization)(scheme="none")),
            "model.lean": False,
            "training.precision": "fp32",
            "training.prepare_for_kbit_training": False,
        }
    )
    model: Any = models.load_trained(
        plain, run.label_names, run.path / "adapter", device=torch.device("cpu"), pad_token_id=pad_token_id
    )
    return model if run.experiment.lora is None else model.merge_and_unload(safe_merge=True)


def _save(run: Run, model: Any, folder: Path, dtype: torch.dtype) -> str:
    """Save a merged classifier for plain transformers; return the layout."""
    config = model.config
    heads = models.head_modules(model)
    cosine = run.experiment.model.head == "cosine"
    kind: Any
    if isinstance(model, models.PooledClassifier) or cosine:
        if not isinstance(model, models.PooledClassifier) and not models.is_decoder(config):
            raise KitError(
                f"a cosine head on {type(model).__name__}'s own pooling is no class of transformers and cannot be "
                "written down in a few lines; train with model.pooling: mean, or with model.head: linear"
            )
        kind, source = transformers.AutoModel, model.base_model
        layout = "encoder_and_head"
    else:
        kind, source = transformers.AutoModelForSequenceClassification, model
        layout = "transformers"
    # Into a model of transformers' own, whose config says what the run changed for training no more.
    fresh_config = models.classifier_config(run.experiment.model, run.label_names, pad_token_id=config.pad_token_id)
    with torch.device("meta"):
        plain: Any = kind.from_config(fresh_config, dtype=dtype)
    if getattr(source, "pooler", False) is None:
        plain.pooler = None
    plain.load_state_dict({name: tensor.to(dtype) for name, tensor in source.state_dict().items()}, assign=True)
    with models.quiet():
        plain.save_pretrained(str(folder))
    if layout == "encoder_and_head":
        head = getattr(model, heads[0])
        save_file({name: tensor.float().contiguous() for name, tensor in head.state_dict().items()}, folder / HEAD)
    return layout


class _EncoderAndHead(nn.Module):
    """What the card's lines compute, as a module, for measuring a merged folder."""

    def __init__(self, folder: Path, pooling: str, cosine: bool) -> None:
        super().__init__()
        self.base = transformers.AutoModel.from_pretrained(str(folder))
        self.head = nn.ParameterDict(load_file(str(folder / HEAD)))
        self.pooling, self.cosine = pooling, cosine

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SequenceClassifierOutput:
        states = self.base(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        if self.pooling == "mean":
            pooled = models.mean_pool(states, attention_mask)
        else:
            last = attention_mask.sum(1) - 1
            pooled = states[torch.arange(len(last), device=last.device), last]
        weight = self.head["weight"]
        if self.cosine:
            directions = nn.functional.normalize(pooled, dim=-1)
            logits = models.CosineHead.SCALE * directions @ nn.functional.normalize(weight, dim=-1).T
        else:
            logits = nn.functional.linear(pooled, weight, self.head["bias"])
        return SequenceClassifierOutput(logits=logits)


def load_merged(run: Run, folder: str | Path) -> nn.Module:
    """Load what `merge` wrote, in the dtype that it is stored in.

    Args:
        run: The run that was merged.
        folder: Where to.

    Returns:
        A classifier in eval mode on this machine's GPU, or on the CPU. Its call takes `input_ids` and
        `attention_mask`, `[batch, length]`, and returns an output with `logits`, `[batch, classes]`.
    """
    model: Any
    with models.quiet():
        if (Path(folder) / HEAD).is_file():
            model = _EncoderAndHead(Path(folder), _pooling(run), run.experiment.model.head == "cosine")
        else:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(str(folder))
    model.eval().to(models.default_device())
    loaded: nn.Module = model
    return loaded


def _logits(run: Run, folder: Path, tokenizer: Any, texts: Any, progress: str | None) -> np.ndarray:
    """Classify texts with a merged folder, read back from the disk."""
    return models.forward_texts(
        load_merged(run, folder),
        tokenizer,
        texts,
        device=models.default_device(),
        precision="fp32",  # as stored: no autocast
        max_length=run.experiment.data.max_length,
        too_long=run.experiment.data.too_long,
        progress=progress,
    )


def _pooling(run: Run) -> str:
    return models.resolve_pooling(run.experiment.model, models.load_config(run.experiment.model))


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


def _use(run: Run, folder: Path, layout: str) -> str:
    """Return the card's lines that classify with a merged folder."""
    if layout == "transformers":
        return PIPELINE.format(length=run.experiment.data.max_length)
    cosine = run.experiment.model.head == "cosine"
    config = transformers.AutoConfig.from_pretrained(str(folder))
    kind: Any = transformers.models.auto.modeling_auto.MODEL_MAPPING[type(config)]
    # BERT's pooler is not on the way to the mean, and not in the folder.
    bare = "add_pooling_layer" in inspect.signature(kind).parameters
    return LINES.format(
        arguments=", add_pooling_layer=False" if bare else "",
        length=run.experiment.data.max_length,
        pooled="pooled = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)"
        if _pooling(run) == "mean"
        else "pooled = states[torch.arange(len(texts)), mask.sum(1) - 1]",
        logits=f'logits = {models.CosineHead.SCALE:g} * normalize(pooled, dim=-1) @ normalize(head["weight"], dim=-1).T'
        if cosine
        else 'logits = linear(pooled, head["weight"], head["bias"])',
    )


# --- the card and the hub ---------------------------------------------------------------------------------------


def card(run: Run, **more: Any) -> str:
    """Return a run's model card with all that the run folder knows: the test's figures once it is evaluated.

    Args:
        run: A finished run.
        **more: `merged` and `use`, as `cards.model_card` takes them.
    """
    return cards.model_card(
        run.experiment,
        run.training,
        models.find_base(run.experiment.model).licence,
        evaluation=run.evaluation,
        environment=run.environment,
        **more,
    )


@contextlib.contextmanager
def staged(run: Run, *, merged: bool = False) -> Iterator[Path]:
    """Put what `push` uploads into a folder of its own, for a block: look into it before you push.

    Args:
        run: A finished run.
        merged: The merged model instead of the adapters.

    Yields:
        A temporary folder: of a run, what `PUSHED` names, with a card that has the test's figures, and without the
        names of folders on this machine; else what `merge` writes.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        if merged:
            merge(run, folder, progress=False)
        else:
            folder.mkdir()
            for name in PUSHED:
                source = run.path / name
                if source.is_dir():
                    shutil.copytree(source, folder / name)
                elif source.is_file():
                    shutil.copyfile(source, folder / name)
            records.write_text(folder / "experiment.yaml", _without_folders(run.experiment).to_yaml())
            records.write_text(folder / "README.md", card(run))
        yield folder


def _without_folders(experiment: Experiment) -> Experiment:
    """Return the experiment with the names of data files, but not the folders that they lie in."""
    spec = experiment.data
    files = {"data.name": spec.name, "data.test": spec.test}
    on_hub = spec.name.count("/") == 1 and not Path(spec.name).exists() and not spec.name.startswith((".", "~"))
    if on_hub:
        return experiment
    return experiment.override({key: Path(file).name for key, file in files.items() if isinstance(file, str)})


def push(run: Run, repo: str, *, private: bool = True, token: str | None = None, merged: bool = False) -> str:
    """Upload a run to the hub: the adapters with tokenizer, card and records, or the merged model.

    Args:
        run: A finished run.
        repo: `owner/name`; made where it is not there.
        private: Whether the repository is private. An existing public one is refused unless this is False.
        token: The hub's; None takes the one that `hf auth login` or `HF_TOKEN` left.
        merged: Upload the merged model (see `merge`) instead of the adapters.

    Returns:
        The repository's address.

    Raises:
        KitError: Without a network (`HF_HUB_OFFLINE`), for a name that the hub does not take, without a login, for
            a base that nobody else has, and where the hub refuses.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors, utils

    try:
        utils.validate_repo_id(repo)
    except errors.HFValidationError as error:
        raise KitError(f"{repo!r} is no name of a repository on the hub: {error}") from error
    if repo.count("/") != 1:
        raise KitError(f"{repo!r} is no name of a repository on the hub: allowed is owner/name")
    base = Path(run.experiment.model.name).expanduser()
    if base.is_dir() and not merged:
        raise KitError(
            f"the base is the folder {str(base)!r} on this machine: nobody could load adapters to it. Push the whole "
            "model with merged=True"
        )
    if constants.HF_HUB_OFFLINE:
        raise KitError("HF_HUB_OFFLINE is set, so nothing is pushed; unset it and call again")
    api = huggingface_hub.HfApi(token=token)
    try:
        with staged(run, merged=merged) as folder:
            api.create_repo(repo, private=private, exist_ok=True)
            if private and not api.repo_info(repo).private:
                raise KitError(f"{repo} is there already and is public: push to another, or say private=False")
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Upload {run.path.name}")
    except errors.LocalTokenNotFoundError as error:
        raise KitError("the hub needs a login: call `hf auth login` once, or give a token") from error
    except errors.HfHubHTTPError as error:
        raise KitError(f"the hub refuses {repo}: {' '.join(str(error).split())[:300]}") from error
    return f"{constants.ENDPOINT}/{repo}"


# --- one file of everything -------------------------------------------------------------------------------------


def zip_results(out: str | Path, to: str | Path | None = None) -> Path:
    """Put a folder's results into one zip, to be downloaded from a machine that will be gone (Colab's).

    Args:
        out: A folder with notebooks, records and run folders, such as `runs/latest`, or one run folder.
        to: The zip; by default `OUT.zip` beside the folder. One that is there is replaced.

    Returns:
        The zip. Checkpoints, W&B's folder, the user's data rows and symbolic links are left out.

    Raises:
        KitError: When there is no such folder or nothing in it.
    """
    folder = Path(out)
    if not folder.is_dir():
        raise KitError(f"there is no folder {str(folder)!r} to zip")
    target = Path(to) if to is not None else folder.resolve().with_name(f"{folder.resolve().name}.zip")
    files = [
        file
        for file in sorted(folder.rglob("*"))
        # A link in a stranger's folder may lead to what nobody wanted to hand on.
        if file.is_file()
        and not file.is_symlink()
        and not any(part in NOT_ZIPPED or part.startswith(".") for part in file.relative_to(folder).parts)
        and file.resolve() != target.resolve()
    ]
    if not files:
        raise KitError(f"there is nothing in {str(folder)!r} to zip")
    aside = target.with_name(f".{target.name}{records.PARTIAL}")
    with records.saving(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
                for file in files:
                    archive.write(file, Path(folder.resolve().name) / file.relative_to(folder))
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)
    return target


def download_results(out: str | Path) -> Path | None:
    """Hand a folder's results to the browser where Colab is, whose disk is gone when the runtime ends; else say where.

    Args:
        out: As `zip_results` takes it.

    Returns:
        The zip that is downloaded; None outside Colab, where nothing is made.

    Raises:
        KitError: As `zip_results`, in Colab.
    """
    if "google.colab" not in sys.modules:  # in Colab the kernel has imported it
        print(f"Everything is in {out}. As one file: qk.zip_results({str(out)!r})")
        return None
    made = zip_results(out)
    importlib.import_module("google.colab.files").download(str(made))
    return made
