"""Shared fixtures: tiny real models with random weights, tiny real data, no network, no tracking unless asked for."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"  # whatever the shell says: a tracked run makes a folder of its own

from pathlib import Path

import pytest

import qlora_kit as qk
from qlora_kit.config.experiment import Experiment
from qlora_kit.config.sections import DataSpec, LoraSpec, ModelSpec, TrainingSpec

ROOT = Path(__file__).resolve().parents[1]
DIALOGPT = ROOT / "qlora_kit" / "shapes" / "dialogpt-medium"

# One tiny config of each architecture that the kit says it takes.
ARCHITECTURES = {
    "bert": ("BertConfig", {"intermediate_size": 64}),
    "roberta": ("RobertaConfig", {"intermediate_size": 64, "pad_token_id": 0, "max_position_embeddings": 130}),
    "distilbert": ("DistilBertConfig", {"dim": 32, "hidden_dim": 64, "n_heads": 2, "n_layers": 2}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_head": 2, "n_layer": 2, "bos_token_id": 101, "eos_token_id": 102}),
    "llama": ("LlamaConfig", {"intermediate_size": 64, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2Config", {"intermediate_size": 64, "num_key_value_heads": 2}),
    "opt": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 0}),
    "gpt_neox": ("GPTNeoXConfig", {"intermediate_size": 64}),
}
ENCODERS = ("bert", "roberta", "distilbert")


def least_training(labels, name: str = "tiny") -> dict:
    """Return the least that a run folder's training.json may hold."""
    score = {"value": 0.5, "low": 0.4, "high": 0.6}
    return {
        "schema": 1,
        "name": name,
        "labels": list(labels),
        "rows": {"train": 4, "validation": 2, "test": 2},
        "steps": 1,
        "metrics": {"validation": dict.fromkeys(("accuracy", "f1_macro", "f1_weighted", "loss"), score)},
        "epochs": [],
        "losses": [],
        "parameters": {"trainable": 1, "all": 2},
        "precision": "fp32",
        "optimizer": "adamw_torch",
        "random_weights": False,
        "memory": {"peak_bytes": 1},
        "timing": dict.fromkeys(("train_seconds", "samples_per_second", "tokens_per_second", "total_seconds"), 1.0),
    }


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """Return a function from an architecture's name to a folder with a tiny seeded model and MiniLM's tokenizer."""
    import torch
    import transformers

    from qlora_kit import models

    root = tmp_path_factory.mktemp("tiny")
    tokenizer = models.load_tokenizer(ModelSpec("embedded:minilm"))

    def make(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            kind, extra = ARCHITECTURES[name]
            common = {"vocab_size": len(tokenizer)}
            if name not in ("distilbert", "gpt2"):
                common |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
            config = getattr(transformers, kind)(**common | extra)
            torch.manual_seed(0)
            auto = transformers.AutoModel if name in ENCODERS else transformers.AutoModelForCausalLM
            auto.from_config(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def topics() -> qk.TextData:
    """Return a small real data set: 240 of Banking77's questions about six intents."""
    full = qk.banking77()
    chosen = list(full.label_names[:6])
    rows = [
        (text, full.label_names[label])
        for split in (full.train, full.test)
        for text, label in zip(split.texts, split.labels, strict=True)
        if full.label_names[label] in chosen
    ]
    rows = [row for name in chosen for row in [row for row in rows if row[1] == name][:40]]
    import datasets

    table = datasets.Dataset.from_dict({"text": [text for text, _ in rows], "label": [label for _, label in rows]})
    return qk.text_classification(table, test=0.2, validation=0.2)


@pytest.fixture
def tiny_experiment(tiny):
    """Return a function that makes a tiny experiment of an architecture; keyword arguments are overrides."""

    def make(name: str = "bert", **changes) -> Experiment:
        experiment = Experiment(
            name=f"tiny_{name}",
            model=ModelSpec(str(tiny(name))),
            data=DataSpec(),
            lora=LoraSpec(r=4, alpha=8, dropout=0.1),
            # fp32, so that what is compared does not depend on the CPU it runs on
            training=TrainingSpec(
                epochs=2, batch_size=16, learning_rate=5e-3, precision="fp32", threads=1, logging_steps=2
            ),
        )
        return experiment.override({key.replace("__", "."): value for key, value in changes.items()})

    return make
