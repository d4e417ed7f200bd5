"""Write a run for plain PEFT: adapters and head in a folder that PEFT opens without the kit."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from ..config.sections import HEADS
from ..errors import KitError
from ..models.build import build
from ..models.configuration import classifier_config, is_decoder
from ..models.heads import PooledClassifier, head_modules
from ..models.sources import EMBEDDED, name_for_others
from ..models.tokenizers import load_tokenizer
from ..quantization.bitsandbytes import bitsandbytes_config
from ..quantization.layers import quantizable, why_whole
from ..runs.predictor import Predictor
from ..system.arguments import RUN, a_path, takes
from ..system.devices import generators_kept, quiet
from ..system.files import move_into_place, saving, sha256, write_json, write_text
from ..system.parsing import read_json
from .card import card
from .merge import pooled_config, unquantized
from .place import new_place

logger = logging.getLogger(__name__)

ADAPTER, CONFIG, CODE = "adapter_model.safetensors", "adapter_config.json", "modeling_pooled.py"
# Schemes that bitsandbytes reads, so that PEFT can hold the base as it was in training.
READ_BY_BITSANDBYTES = ("nf4", "fp4", "int8")

USE = """Plain PEFT opens this folder, without qlora_kit:

```python
import torch
from peft import {names}
from transformers import {more}

{before}model = {call}
{after}tokenizer = AutoTokenizer.from_pretrained("this-folder"{trust})
batch = tokenizer(["a text"], padding=True, truncation=True, max_length={length}, return_tensors="pt")
with torch.inference_mode():
    ids = model.eval()({arguments}).logits.argmax(-1)
print([model.config.id2label[int(index)] for index in ids])
```

{notes}"""


AS_STORED = """for layer in model.modules():  # on some CPUs bitsandbytes would compute in bf16
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        layer.support_avx512bf16_for_cpu = False
"""


@dataclasses.dataclass(frozen=True)
class _Form:
    """How a run is opened by PEFT.

    Args:
        model: The classifier without weights, as the kit builds it.
        with_code: Whether `modeling_pooled.py` goes into the folder: transformers has no class for this head.
        base: The base's name on the hub, or its folder.
        revision: Its revision.
        tokenizer: The run's tokenizer.
    """

    model: Any
    with_code: bool
    base: str
    revision: str | None
    tokenizer: Any


@takes(run=RUN, to=a_path("peft"))
def export_peft(run: Predictor, to: str | Path) -> Path:
    """Write a run's adapters and head into a folder that plain PEFT opens, without the kit.

    `AutoPeftModelForSequenceClassification.from_pretrained(to, ...)` fetches the base by its name on the hub (an
    embedded base, too) and puts adapters and head on it. The folder's README.md has the lines. There are two forms:

    - The head is transformers' own: the folder has data alone.
    - The head is on a mean of states, or of cosines, which no class of transformers has: the folder has the class,
      `modeling_pooled.py`, and the call needs `trust_remote_code=True`. Without it the folder is refused; it is never
      opened with a random head.

    Where the base was quantized by bitsandbytes (`nf4`, `fp4`, `int8`), the lines give the `quantization_config` of the
    training. Without it, and for other schemes, the base is in fp32 and some labels may differ.

    Args:
        run: A finished run with adapters.
        to: Folder to write; it must not exist, or be empty.

    Returns:
        The folder.

    Raises:
        KitError: When `to` is there already, or in the run's folder; for a run without adapters, a base of random
            weights, some layers of a base under transformers' own head, and a head that cannot be written down.
    """
    target = new_place(run, to)
    form = _form(run)
    with saving(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".peft-") as aside:
            made = Path(aside) / "peft"
            made.mkdir()
            _write(run, form, made, str(target.resolve()))
            write_text(made / "README.md", card(run, use=_use(run, form)))
            if target.is_dir():
                target.rmdir()
            move_into_place(made, target)
    return target


def peft_files(run: Predictor, folder: Path, repo: str | None) -> str:
    """Write what PEFT opens into the folder of a run that will be pushed; return the card's lines on it.

    Args:
        run: A finished run with adapters.
        folder: The folder, with a run's files or empty. No file of a run has the name of one of these.
        repo: The repository's name, which PEFT will be given; None if it is not known.

    Raises:
        KitError: As `export_peft`.
    """
    form = _form(run)
    _write(run, form, folder, repo)
    return _use(run, form)


# --- what can be opened -----------------------------------------------------------------------------------------


def _form(run: Predictor) -> _Form:
    """Find out how PEFT can open a run; no weights are read."""
    experiment = run.experiment
    spec = experiment.model
    if experiment.lora is None:
        raise KitError("the run has no adapters: every weight was trained. merge writes the whole model")
    if spec.random_weights or spec.name.startswith("shape:"):
        raise KitError(f"the base of the run is {spec.name} with random weights, which nobody else has: use the run")
    if not HEADS[spec.head].merges:
        raise KitError(f"a {spec.head} head is no class of transformers, and nothing says how to write it down")
    tokenizer = load_tokenizer(spec, run.path / "tokenizer")
    meta = torch.device("meta")
    shapes = unquantized(experiment).override({"lora": None, "model.random_weights": True})
    with generators_kept(meta):
        model: Any = build(shapes, run.label_names, device=meta, pad_token_id=tokenizer.pad_token_id)
    pooled, decoder = isinstance(model, PooledClassifier), is_decoder(model.config)
    if spec.head == "cosine" and not pooled and not decoder:
        raise KitError(
            f"a cosine head on {type(model).__name__}'s own pooling is no class of transformers and cannot be "
            "written down in a few lines; train with model.pooling: mean, or with model.head: linear"
        )
    # transformers' class takes the last token that is no pad token: wrong where a text ends with that token.
    ends = decoder and tokenizer("a text").input_ids[-1:] == [tokenizer.pad_token_id]
    with_code = pooled or spec.head == "cosine" or ends
    if spec.layers is not None and not with_code:
        raise KitError(
            f"model.layers is {spec.layers}, and PEFT would open all layers of {spec.name}: merge writes the model"
        )
    base, revision = name_for_others(spec)
    if Path(base).expanduser().is_dir():
        base = str(Path(base).expanduser().resolve())
    return _Form(model, with_code, base, revision, tokenizer)


# --- what is written --------------------------------------------------------------------------------------------


def _write(run: Predictor, form: _Form, folder: Path, place: str | None) -> None:
    """Write adapters, head, configurations and tokenizer into a folder that will be found at `place`."""
    state, config = _renamed(run, form)
    # safetensors' own files are readable by their owner alone.
    (folder / ADAPTER).write_bytes(save(state, metadata={"format": "pt"}))
    fresh = classifier_config(run.experiment.model, run.label_names, pad_token_id=form.model.config.pad_token_id)
    if form.with_code:
        checksum = sha256(folder / ADAPTER)
        described = pooled_config(run, form.model, fresh, torch.float32)
        described.elsewhere = {"name": form.base, "revision": form.revision, "adapter": checksum}
        values = described.to_dict()
        values["base"] = _without(values["base"], "_name_or_path")  # a folder of this machine
        values["architectures"] = ["PooledForSequenceClassification"]
        values["auto_map"] = {
            "AutoConfig": "modeling_pooled.PooledConfig",
            "AutoModelForSequenceClassification": "modeling_pooled.PooledForSequenceClassification",
        }
        shutil.copyfile(Path(__file__).with_name(CODE), folder / CODE)
        # The class is in this folder, and it knows where the base is.
        config["base_model_name_or_path"] = place or form.base
        config["revision"] = checksum if place is not None and Path(place).is_absolute() else None
    else:
        # Labels and pad token, to be handed over. There are no weights beside it, so nothing opens it alone.
        values = {**fresh.to_dict(), "architectures": [type(form.model).__name__]}
        config["base_model_name_or_path"], config["revision"] = form.base, form.revision
    values["dtype"] = "float32"
    text = json.dumps(_without(values, "_name_or_path", "torch_dtype"), indent=2, sort_keys=True, default=str)
    write_text(folder / "config.json", f"{text}\n")
    write_json(folder / CONFIG, config)
    with quiet():
        form.tokenizer.save_pretrained(str(folder))


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}


def _renamed(run: Predictor, form: _Form) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return a run's trained weights and PEFT's config, named as the class names them that opens them."""
    adapter = run.path / "adapter"
    config: dict[str, Any] = read_json(adapter / CONFIG)
    heads, inner = head_modules(form.model), form.model.base_model_prefix
    own = form.with_code and not isinstance(form.model, PooledClassifier)
    before = "base_model.model."

    def renamed(name: str) -> str:
        first, dot, rest = name.partition(".")
        if not own:
            return name
        if first in heads:
            return f"classifier{dot}{rest}"
        if first != inner:
            raise KitError(f"{name} is neither in the base nor in the head of {type(form.model).__name__}")
        return f"base{dot}{rest}"

    state = {
        before + renamed(name.removeprefix(before)): weight
        for name, weight in load_file(str(adapter / ADAPTER)).items()
    }
    if own and "base_model.model.classifier.bias" not in state and run.experiment.model.head == "linear":
        weight = state["base_model.model.classifier.weight"]
        state["base_model.model.classifier.bias"] = weight.new_zeros(len(weight))  # the class has one
    # Runs of earlier versions name layers by their last parts only, and heads more than once.
    layers = {name.removeprefix(before).partition(".lora_")[0] for name in state if ".lora_" in name}
    config["target_modules"] = sorted(layers)
    config["modules_to_save"] = ["classifier"] if form.with_code else heads
    config["exclude_modules"] = None
    return state, config


# --- how it is opened -------------------------------------------------------------------------------------------


def _use(run: Predictor, form: _Form) -> str:
    """Return the card's lines that open the folder with plain PEFT."""
    experiment = run.experiment
    options = _quantization(run, form)
    more = ["AutoTokenizer", *(["BitsAndBytesConfig"] if options else []), *([] if form.with_code else ["AutoConfig"])]
    before, arguments = "", ['"this-folder"']
    if options:
        before += f"stored = BitsAndBytesConfig({options})\n"
    if form.with_code:
        arguments.append("trust_remote_code=True")
    else:
        before += (
            'config = AutoConfig.from_pretrained("this-folder")\n'
            'labels = {name: getattr(config, name) for name in ("id2label", "label2id", "pad_token_id")}\n'
        )
        arguments += ["**labels", "dtype=torch.float32"]
    if options:
        arguments.append("quantization_config=stored")
    kind = "AutoPeftModelForSequenceClassification"
    return USE.format(
        names=kind,
        more=", ".join(sorted(more)),
        before=before,
        call=f"{kind}.from_pretrained(\n    {', '.join(arguments)}\n)",
        after=AS_STORED if options and "4bit" in options and not form.with_code else "",
        trust=", trust_remote_code=True" if form.with_code else "",  # it reads config.json, too
        length=experiment.data.max_length,
        arguments="input_ids=batch.input_ids, attention_mask=batch.attention_mask",
        notes="\n".join(f"- {note}" for note in _notes(run, form, bool(options))),
    )


def _quantization(run: Predictor, form: _Form) -> str | None:
    """Return the arguments of the `BitsAndBytesConfig` that stores the base as in training; None if there is none."""
    spec = run.experiment.quantization
    if spec.scheme not in READ_BY_BITSANDBYTES or (spec.is_4bit and _uneven(form)):
        return None
    pooled = isinstance(form.model, PooledClassifier)
    heads = head_modules(form.model)
    inner = form.model.base_model if form.with_code else form.model
    whole = list(dict.fromkeys([*([] if pooled or form.with_code else heads), "lm_head", *why_whole(inner)]))
    config = bitsandbytes_config(spec, torch.float32, whole)
    assert config is not None
    if config.load_in_8bit:
        return f"load_in_8bit=True, llm_int8_skip_modules={whole}"
    return (
        f'\n    load_in_4bit=True,\n    bnb_4bit_quant_type="{spec.scheme}",\n'
        f"    bnb_4bit_use_double_quant={spec.double_quantization},\n"
        f"    bnb_4bit_compute_dtype=torch.float32,\n    llm_int8_skip_modules={json.dumps(whole)},\n"
    )


def _uneven(form: _Form) -> str | None:
    """Return a layer whose rows are no whole number of blocks, which bitsandbytes reads wrongly on some CPUs."""
    inner = form.model.base_model
    return next((name for name in quantizable(inner) if inner.get_submodule(name).weight.shape[1] % 64), None)


def _notes(run: Predictor, form: _Form, stored: bool) -> list[str]:
    """Return what the card says about an opened run: where it differs from the run, and what code runs."""
    spec, notes = run.experiment, []
    if form.with_code:
        notes.append(
            "transformers has no class for this head. `modeling_pooled.py` in this folder is that class; it needs "
            "torch and transformers alone. `trust_remote_code=True` runs it: read it first. Without that argument the "
            "folder is refused."
        )
        notes.append(
            "PEFT looks for the class where this folder was written. Was it moved? Then open it in two steps: "
            '`base = AutoModelForSequenceClassification.from_pretrained("this-folder", trust_remote_code=True'
            + (", quantization_config=stored" if stored else "")
            + ')`, and `model = PeftModel.from_pretrained(base, "this-folder")`.'
        )
    scheme = spec.quantization.scheme
    if stored:
        notes.append("Without `quantization_config` the base is in fp32, and some labels may differ from the run's.")
    elif spec.quantization.is_quantized:
        why = "PEFT cannot read"
        if scheme in READ_BY_BITSANDBYTES:  # 0.50.2; the kit reads them right
            why = (
                "bitsandbytes reads wrongly in this base on CPUs with AVX-512 "
                f"(the rows of {_uneven(form)} end within a block)"
            )
        notes.append(
            f"The base was stored in {scheme} in training, which {why}. Here it is in fp32, and some labels may differ "
            "from the run's."
        )
    if spec.quantization.embeddings != "none":
        notes.append(
            f"In training the embeddings were stored in {spec.quantization.embeddings}; here they are in fp32, and "
            "some labels may differ."
        )
    if _differs(spec.model.name):
        notes.append(
            f"The run was trained on a copy of {form.base} whose weights had been rounded to 4 bits before. The "
            "weights on the hub are the unrounded ones, so some labels may differ. `merge` writes those of the run."
        )
    return notes


def _differs(name: str) -> bool:
    """Return whether an embedded base has other weights than the model of its name on the hub."""
    return name.startswith("embedded:") and EMBEDDED[name.removeprefix("embedded:")].file.endswith(".gguf")
