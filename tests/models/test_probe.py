"""Tokenizer against base, texts that stand alone, one last token, and what lies in a base's folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import DIALOGPT
from safetensors.torch import load_file, save_file
from torch import nn

import qlora_kit as qk
from qlora_kit import data, models
from qlora_kit.config.sections import ModelSpec
from qlora_kit.errors import KitError
from qlora_kit.models import probe
from qlora_kit.system.files import sha256
from qlora_kit.system.parsing import read_json

CPU = torch.device("cpu")
LABELS = ["a", "b", "c"]
TEXTS = ["where is my card", "the exchange rate of the euro against the pound is wrong again", "no"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "pad_token_id": 0}
GPT2 = {"n_embd": 32, "n_head": 2, "n_layer": 2, "vocab_size": 50257}


@pytest.fixture(scope="session")
def minilm():
    """Return MiniLM's tokenizer."""
    return models.load_tokenizer(ModelSpec("embedded:minilm"))


@pytest.fixture
def base(tmp_path, minilm):
    """Return a function that makes a folder with a tiny seeded base and a tokenizer, and an experiment on it."""

    def make(kind: str, tokenizer=minilm, overrides=None, auto=transformers.AutoModel, **config) -> qk.Experiment:
        folder = tmp_path / kind
        torch.manual_seed(0)
        made = auto.from_config(getattr(transformers, kind)(**{"vocab_size": 30522, **config}))
        made.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        settings = {"training.max_steps": 2, "training.precision": "fp32", "training.threads": 1}
        return qk.Experiment("x", ModelSpec(str(folder))).override({**settings, **(overrides or {})})

    return make


def build(experiment, **kwargs):
    tokenizer = models.load_tokenizer(experiment.model)
    model = models.build(experiment, LABELS, device=CPU, pad_token_id=tokenizer.pad_token_id, **kwargs)
    return model.eval(), tokenizer


def logits_of(model, tokenizer, texts, **kwargs):
    return models.forward_texts(model, tokenizer, texts, device=CPU, precision="fp32", max_length=128, **kwargs)


# --- tokenizer against base -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [("tokenizer.json",), ("tokenizer.json", "tokenizer_config.json")])
def test_a_folder_without_a_tokenizer_is_refused_before_anything_is_written(base, topics, tmp_path, lost):
    experiment = base("BertConfig", **SMALL)
    for file in lost:
        os.remove(f"{experiment.model.name}/{file}")
    with pytest.raises(KitError, match="knows no words") as caught:
        qk.finetune(experiment, data=topics, out=tmp_path / "runs", progress=False)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "runs").glob("*/*.*"))


@pytest.mark.parametrize(
    "added", [{"pad_token": "[NEW]"}, {"additional_special_tokens": ["[NEW]"]}, {"unk_token": "[NEW]"}, None]
)
def test_tokens_beyond_the_embeddings_are_refused_with_both_numbers(base, topics, tmp_path, added):
    tokenizer = models.load_tokenizer(ModelSpec("embedded:minilm"))
    if added is None:
        tokenizer.add_tokens(["[NEW]"])
    else:
        tokenizer.add_special_tokens(added)
    experiment = base("LlamaConfig", tokenizer, **SMALL)
    with pytest.raises(KitError, match=r"has 30523 tokens and the base embeddings for 30522.*'\[NEW\]'"):
        qk.finetune(experiment, data=topics, out=tmp_path / "runs", progress=False)
    assert not list((tmp_path / "runs").glob("*/*.*"))


def test_a_special_token_beyond_the_embeddings_that_no_text_has_is_refused_where_one_has_it(base):
    tokenizer = models.load_tokenizer(ModelSpec("embedded:minilm"))
    tokenizer.add_special_tokens({"eos_token": "[END]"})
    experiment = base("LlamaConfig", tokenizer, **SMALL)
    loaded = models.load_tokenizer(experiment.model)
    assert len(data.tokenize(loaded, TEXTS, 128)) == 3
    with pytest.raises(KitError, match=r"text 2 .*'\[END\]', number 30522, and the base embeddings for 30522"):
        data.tokenize(loaded, ["fine", "at an [END]"], 128)


def test_a_pad_token_without_an_embedding_is_refused(tiny_experiment):
    with pytest.raises(KitError, match=r"pad token is number 30522, and .* has embeddings for 30522"):
        models.build(tiny_experiment("gpt2"), LABELS, device=CPU, pad_token_id=30522)


@pytest.mark.parametrize("pooling", ["mean", "sequence_classification"])
def test_positions_go_by_the_bases_pad_token_and_padding_by_the_mask(base, pooling):
    # KLUE: RoBERTa's positions begin after the base's pad token, 1; the tokenizer pads with 0.
    overrides = {"quantization.scheme": "none", "model.pooling": pooling}
    experiment = base("RobertaConfig", overrides=overrides, **SMALL, pad_token_id=1, max_position_embeddings=514)
    model, tokenizer = build(experiment)
    assert (tokenizer.pad_token_id, model.config.pad_token_id) == (0, 1)
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    plain = transformers.AutoModel.from_pretrained(experiment.model.name).eval()
    mask = torch.ones_like(ids)
    with torch.no_grad():
        found = model.get_base_model().base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(found, plain(input_ids=ids, attention_mask=mask).last_hidden_state)
    alone = np.concatenate([logits_of(model, tokenizer, [text]) for text in TEXTS])
    assert np.allclose(logits_of(model, tokenizer, TEXTS), alone, atol=1e-6)


def test_the_share_of_unknown_tokens_is_reported_and_warned_of(minilm, topics):
    amharic = ["ሰላም ለዓለም", "where is my card", "ካርዴ የት ነው"]
    table = datasets.Dataset.from_dict({"text": amharic * 10, "label": ["a", "b", "a"] * 10})
    found = qk.text_classification(table, test=0.3).report(minilm)["tokens"]["train"]["unknown"]
    words = [text.split() for text in qk.text_classification(table, test=0.3).train.texts]
    unknown = sum(not word.isascii() for text in words for word in text)
    assert found == pytest.approx(unknown / sum(map(len, words)))
    with pytest.warns(UserWarning, match="56% of the tokens of 3 texts are unknown"):
        data.tokenize(minilm, amharic, 128)
    assert topics.report(minilm)["tokens"]["train"]["unknown"] == 0
    gpt2 = models.load_tokenizer(ModelSpec(str(DIALOGPT)))  # whose unknown token is the one that ends a text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.tokenize(minilm, ["one ም in twenty " + "words " * 19], 128)
        data.tokenize(gpt2, [text + gpt2.eos_token for text in amharic], 128)


# --- texts that stand alone -------------------------------------------------------------------------------------


class Mixes(nn.Module):
    """A classifier of token sums that can have each of the faults."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault, self.table, self.kind = fault, nn.Embedding(100, 3), "sparse"

    def forward(self, batch):
        ids, mask = batch["input_ids"], batch["attention_mask"].unsqueeze(-1)
        states = self.table(ids) * (1 if self.fault == "reads padding" else mask)
        if self.fault == "changes itself":
            self.kind = "full" if ids.shape[1] < 4 else self.kind
            states = states * (1.0 if self.kind == "full" else 0.9)
        if self.fault == "reads how wide a batch is" and ids.shape[1] > 16:
            states = states * 0.9
        logits = states[:, -1] if self.fault == "pools the last column" else states.sum(1)
        return (logits + (logits.mean(0) if self.fault == "reads neighbours" else 0)).detach()


@pytest.mark.parametrize(
    ("fault", "side", "problem"),
    [
        ("none", "right", None),
        ("none", "left", None),
        ("reads padding", "right", "padded on the right beside a longer one"),
        ("reads neighbours", "right", "padded on the right beside a longer one"),
        ("reads how wide a batch is", "right", "padded on the right beside a longer one"),
        ("pools the last column", "right", "padded on the right beside a longer one"),
        ("pools the last column", "left", None),
        ("changes itself", "right", "after a short one.*it changes itself: Mixes kind is now 'full'"),
    ],
)
def test_a_model_whose_texts_do_not_stand_alone_is_refused(fault, side, problem):
    torch.manual_seed(0)
    model = Mixes(fault)
    texts = probe.Texts(vocabulary=100, special={0}, pad_token_id=0, side=side, shortest=2, longest=32)

    def run():
        return probe.neighbours(model, model, texts, name="it", precision="fp32")

    if problem is None:
        found = run()
        assert found["padded"] < 1e-6 and found["again"] == 0 and found["side"] == side and found["texts"] == 5
    else:
        with pytest.raises(KitError, match=problem) as caught:
            run()
        assert "\n" not in str(caught.value)


def test_xlnet_is_padded_on_the_left_wherever_it_is_run(base, topics, tmp_path):
    run = qk.finetune(base("XLNetConfig", **XLNET), data=topics, out=tmp_path / "runs", progress=False)
    assert run.training["probe"]["side"] == "left" and run.training["probe"]["padded"] < 1e-5
    assert read_json(run.path / "tokenizer" / "tokenizer_config.json")["padding_side"] == "left"
    together = run.predict(TEXTS).logits
    alone = np.concatenate([run.predict([text]).logits for text in TEXTS])
    assert np.allclose(together, alone, atol=1e-6)
    states = models.embed(run.experiment, TEXTS, progress=None)
    assert np.allclose(
        states, np.concatenate([models.embed(run.experiment, [t], progress=None) for t in TEXTS]), atol=1e-6
    )
    # In training, too: the last column of each row is a token.
    from qlora_kit.training.finetune import trainer_data

    tokenizer = models.load_tokenizer(run.experiment.model)
    collate = trainer_data(
        run.experiment,
        tokenizer,
        topics,
        {"train": [], "validation": []}
        | {"train": [[1] for _ in topics.train.texts], "validation": [[1] for _ in topics.validation.texts]},
    )["data_collator"]
    assert collate([{"input_ids": [5], "attention_mask": [1]}, {"input_ids": [5, 6], "attention_mask": [1, 1]}])[
        "attention_mask"
    ].tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize(
    ("kind", "config", "overrides", "problem"),
    [
        ("FNetConfig", SMALL, {}, "padded on the right beside a longer one"),
        (
            "BigBirdConfig",
            SMALL | {"num_attention_heads": 1, "block_size": 4, "num_random_blocks": 1},
            {},
            "after a short one.*attention_type is now 'original_full'",
        ),
        ("NystromformerConfig", SMALL | {"num_landmarks": 8}, {}, r"cannot be run in fp32 \(RuntimeError"),
    ],
)
def test_bases_whose_texts_do_not_stand_alone_are_refused_before_anything_is_written(
    base, topics, tmp_path, kind, config, overrides, problem
):
    experiment = base(kind, overrides=overrides, **config)
    with pytest.raises(KitError, match=problem):
        qk.finetune(experiment, data=topics, out=tmp_path / "runs", progress=False)
    with pytest.raises(KitError, match=problem):
        qk.search(experiment, data=topics, out=tmp_path / "runs", trials=1, progress=False)
    assert not list((tmp_path / "runs").glob("*/*.*"))


def test_a_run_that_was_trained_before_is_opened_with_a_warning(base, caplog):
    experiment = base("FNetConfig", **SMALL)
    model, _ = build(experiment, trained=True)
    assert "Predictions would depend on other texts" in caplog.text and not hasattr(model, "neighbours")


def test_a_base_in_int8_is_compared_by_what_its_layers_round_and_says_nothing_of_each(caplog):
    """On a CPU too: they round what they are given, and columns with large values in any row are left out of that."""
    experiment = qk.preset("minilm_banking77_smoke").override({"quantization.scheme": "int8"})
    found = models.build(experiment, LABELS, device=CPU, pad_token_id=0).neighbours
    assert found["precision"] == "int8" and found["padded"] < found["tolerance"]
    assert "MatMul8bitLt" not in caplog.text


def test_a_probe_changes_no_random_number_and_no_weight(tiny_experiment):
    experiment = tiny_experiment("llama")
    states = []
    for pad in (None, 0):  # without a pad token there is no probe
        model = models.build(experiment, LABELS, device=CPU, pad_token_id=pad)
        states.append({"random": torch.get_rng_state(), **model.state_dict()})
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


# --- one last token ---------------------------------------------------------------------------------------------


def test_the_last_token_is_the_masks_on_either_side():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]])
    assert models.last_tokens(mask).tolist() == [1, 3, 3, 0]


@pytest.mark.parametrize("kind", ["GPT2Config", "LlamaConfig"])
def test_a_text_that_ends_in_the_pad_token_is_pooled_there(base, kind):
    config = GPT2 if kind == "GPT2Config" else SMALL
    model, _ = build(base(kind, overrides={"quantization.scheme": "none"}, **config))
    ids = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 7, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    inner = model.get_base_model()
    with torch.no_grad():
        states = inner.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        wanted = torch.stack([inner.score(states[:1, 3])[0], inner.score(states[1:, 2])[0]])
        for order in ([0, 1], [1, 0]):
            found = model(input_ids=ids[order], attention_mask=mask[order]).logits
            torch.testing.assert_close(found, wanted[order])
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3


@pytest.mark.parametrize("overrides", [{}, {"model.head": "cosine"}, {"lora": None}])
def test_a_merged_model_gives_texts_that_end_in_the_pad_token_the_same_labels(base, topics, tmp_path, overrides):
    gpt2 = transformers.AutoTokenizer.from_pretrained(DIALOGPT)
    rows = [
        (text + gpt2.eos_token, topics.label_names[label])
        for text, label in zip(topics.train.texts, topics.train.labels, strict=True)
    ]
    table = datasets.Dataset.from_dict({"text": [text for text, _ in rows], "label": [label for _, label in rows]})
    experiment = base(
        "GPT2Config",
        gpt2,
        {"quantization.scheme": "none", "training.max_steps": 8, "training.learning_rate": 1e-2, **overrides},
        **GPT2,
    )
    run = qk.finetune(experiment, data=qk.text_classification(table, test=0.2), out=tmp_path / "runs", progress=False)
    report = run.merge(tmp_path / "merged", progress=False)
    assert report["validation"]["same_label"] == 1.0
    assert report["validation"]["before"]["loss"]["value"] == pytest.approx(
        report["validation"]["after"]["loss"]["value"], abs=1e-5
    )
    if report["layout"] != "transformers":
        return
    texts = [text for text, _ in rows[:20]] + TEXTS
    classify = transformers.pipeline("text-classification", str(tmp_path / "merged"))
    assert [answer["label"] for answer in classify(texts, batch_size=8)] == run.predict(texts).labels
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.pad_token_id == classify.model.config.pad_token_id == 50257
    assert tokenizer(texts)["input_ids"] == run.load()[1](texts)["input_ids"]


# --- what lies in a base's folder -------------------------------------------------------------------------------


def test_a_base_with_an_adapter_beside_it_is_refused(base, topics, tmp_path):
    import peft

    experiment = base("LlamaConfig", auto=transformers.AutoModelForCausalLM, **SMALL)
    plain = transformers.AutoModelForCausalLM.from_pretrained(experiment.model.name)
    peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(experiment.model.name)
    with pytest.raises(KitError, match=r"holds an adapter beside the model \(adapter_config\.json\)"):
        qk.finetune(experiment, data=topics, out=tmp_path / "runs", progress=False)
    assert not list((tmp_path / "runs").glob("*/*.*"))


def test_a_configuration_does_not_say_how_a_model_is_run(base):
    experiment = base("BertConfig", **SMALL)
    file = f"{experiment.model.name}/config.json"
    with open(file) as stream:
        config = json.load(stream)
    wanted = logits_of(*build(experiment), TEXTS)
    config |= {"return_dict": False, "attn_implementation": "owner/kernel-of-the-hub", "output_hidden_states": True}
    with open(file, "w") as stream:
        json.dump(config | {"gradient_checkpointing": True}, stream)
    model, tokenizer = build(experiment)
    assert np.array_equal(logits_of(model, tokenizer, TEXTS), wanted)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_every_file_of_a_base_in_several_is_in_its_checksum(base, topics, tmp_path, suffix):
    experiment = base("LlamaConfig", overrides={"training.max_steps": 1}, **SMALL)
    folder, spec = tmp_path / "LlamaConfig", experiment.model
    one = models.find_base(spec).checksum
    assert one == sha256(folder / "model.safetensors")
    model = transformers.AutoModel.from_pretrained(folder)
    os.remove(folder / "model.safetensors")
    if suffix == "safetensors":
        model.save_pretrained(folder, max_shard_size="500KB")
        shards = sorted(folder.glob("model-*.safetensors"))
    else:
        state = list(model.state_dict().items())
        shards = [folder / f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
        for part, shard in zip((state[:3], state[3:]), shards, strict=True):
            torch.save(dict(part), shard)
        places = {name: shards[number >= 3].name for number, (name, _) in enumerate(state)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert len(shards) > 1
    found = [models.find_base(spec).checksum for _ in range(2)]
    run = qk.finetune(experiment, data=topics, out=tmp_path / "runs", progress=False)
    assert run.environment["checksums"]["base"] == found[0] == found[1] != one
    for shard in shards:
        kept = shard.read_bytes()
        shard.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        assert models.find_base(spec).checksum != found[0]
        with pytest.raises(KitError, match="was trained on other weights"):
            qk.load_run(run.path).predict(["hi"])
        shard.write_bytes(kept)
    os.remove(shards[-1])
    with pytest.raises(KitError, match=f"lacks {shards[-1].name}, one of the files that"):
        models.find_base(spec)


@pytest.mark.parametrize("index", ["[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{"])
def test_an_index_of_another_shape_is_refused_in_a_line(base, tmp_path, index):
    experiment = base("BertConfig", **SMALL)
    os.remove(tmp_path / "BertConfig" / "model.safetensors")
    (tmp_path / "BertConfig" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(KitError) as caught:
        models.find_base(experiment.model)
    assert "\n" not in str(caught.value) and "model.safetensors.index.json" in str(caught.value)


def test_the_files_of_a_base_in_the_hubs_cache_are_all_in_its_checksum(base, tmp_path):
    experiment = base("LlamaConfig", **SMALL)
    folder = tmp_path / "LlamaConfig"
    model = transformers.AutoModel.from_pretrained(folder)
    os.remove(folder / "model.safetensors")
    model.save_pretrained(folder, max_shard_size="500KB")
    snapshot = tmp_path / "models--tiny--llama" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    code = (
        "from qlora_kit import models; from qlora_kit.config import ModelSpec; from pathlib import Path\n"
        f"spec = ModelSpec('tiny/llama', revision={'0' * 40!r}); print('found', models.find_base(spec).checksum)\n"
        f"next(Path({str(snapshot)!r}).glob('model-*')).unlink(); print('partly', models.find_base(spec).checksum)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"found {models.find_base(experiment.model).checksum}\npartly None" in done.stdout


# --- widths, limits, messages -----------------------------------------------------------------------------------

OPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64, "word_embed_proj_dim": 16}


@pytest.mark.parametrize("overrides", [{"model.head": "cosine"}, {"model.pooling": "mean"}])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_head_is_as_wide_as_the_states_that_the_model_gives(base, overrides, device):
    experiment = base("OPTConfig", overrides={**overrides, "model.random_weights": device == "meta"}, **OPT)
    model = models.build(experiment, LABELS, device=torch.device(device), pad_token_id=0)
    (head,) = models.head_modules(model.get_base_model())
    assert model.get_base_model().get_submodule(head).weight.shape == (3, 16)
    if device == "cpu":
        tokenizer = models.load_tokenizer(experiment.model)
        assert logits_of(model, tokenizer, TEXTS).shape == (3, 3)
        assert models.embed(experiment, TEXTS, progress=None).shape == (3, 16)


@pytest.mark.parametrize(
    ("kind", "config", "positions"),
    [
        ("MptConfig", {"d_model": 32, "n_heads": 2, "n_layers": 1, "max_seq_len": 64}, 64),
        ("CTRLConfig", {"n_embd": 32, "dff": 64, "n_layer": 1, "n_head": 2, "n_positions": 64}, 64),
        ("BloomConfig", {"hidden_size": 32, "n_layer": 1, "n_head": 2, "seq_length": 64}, 64),
        ("OpenAIGPTConfig", {"n_embd": 32, "n_head": 2, "n_layer": 1, "n_positions": 64}, 64),
        ("OPTConfig", OPT | {"max_position_embeddings": 64}, 64),
        ("RobertaConfig", SMALL | {"max_position_embeddings": 66, "pad_token_id": 1}, 64),
        ("XLNetConfig", XLNET, None),
    ],
)
def test_how_many_tokens_a_text_can_have_is_found_under_any_name(kind, config, positions):
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(getattr(transformers, kind)(**config))
    assert models.positions_of(model) == positions
    if positions is not None:
        models.check_length(model, "it", positions)
        with pytest.raises(KitError, match="has 64 positions"):
            models.check_length(model, "it", positions + 1)


def test_a_table_of_positions_is_a_limit_whatever_the_configuration_says():
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(
            transformers.GPT2Config(n_embd=32, n_head=2, n_layer=1, n_positions=64)
        )
    model.config.n_positions = 512
    assert models.positions_of(model) == 64


def test_a_model_without_a_class_for_classification_is_told_what_works(base):
    experiment = base("GraniteConfig", **SMALL, num_key_value_heads=2)
    with pytest.raises(KitError, match=r"\(granite\) has no class for sequence .*: set model\.pooling: mean"):
        build(experiment)
    build(experiment.override({"model.pooling": "mean"}))


def test_checkpointing_is_refused_where_a_class_has_none(base, topics, tmp_path):
    experiment = base("XLNetConfig", overrides={"training.gradient_checkpointing": True}, **XLNET)
    with pytest.raises(KitError, match="cannot recompute its activations"):
        qk.finetune(experiment, data=topics, out=tmp_path / "runs", progress=False)
    assert not list((tmp_path / "runs").glob("*/*.*"))


def test_what_cannot_be_run_in_16_bits_is_refused_in_a_line(base, monkeypatch):
    # DeBERTa's mask is the lowest number of fp32, which is none of bf16.
    monkeypatch.setattr("qlora_kit.system.devices.cpu_has_bf16", lambda: True)
    experiment = base("DebertaConfig", overrides={"model.fused": False, "training.precision": "bf16"}, **SMALL)
    with pytest.raises(KitError, match=r"cannot be run in bf16 \(RuntimeError: .*training\.precision: fp32 may work"):
        build(experiment)
    build(experiment.override({"training.precision": "fp32"}))


def test_layers_that_compute_in_16_bits_are_allowed_its_rounding(base, minilm, monkeypatch):
    # As `prepare_for_kbit_training` leaves a base: all that is no 4-bit layer in fp32, and those compute in 16 bits.
    monkeypatch.setattr("qlora_kit.system.devices.cpu_has_bf16", lambda: True)
    experiment = base("BertConfig", overrides={"model.fused": False, "quantization.scheme": "nf4"}, **SMALL)
    model, _ = build(experiment)
    assert model.neighbours["precision"] == "fp32"
    layers = [module for module in model.modules() if getattr(module, "compute_dtype", None) is not None]
    assert layers
    for layer in layers:
        layer.compute_dtype = torch.bfloat16
    sixteen = experiment.override({"training.precision": "bf16"})
    found = sys.modules["qlora_kit.models.build"].neighbours(sixteen, model, CPU, minilm.pad_token_id)
    assert found["precision"] == "bf16" and found["tolerance"] == probe.TOLERANCE["bf16"]


def test_trained_weights_of_another_shape_are_refused(tiny_experiment, tmp_path):
    experiment = tiny_experiment("bert")
    models.save_adapter(models.build(experiment, LABELS, device=CPU), tmp_path / "adapter")
    wider = models.build(experiment.override({"lora.r": 8}), LABELS, device=CPU)
    with pytest.raises(KitError, match=r"has the shape \[4, 32\], and the model's is \[8, 32\]") as caught:
        models.load_weights_(wider, tmp_path / "adapter")
    assert "\n" not in str(caught.value)


# --- bases that cannot be read, or not be run -------------------------------------------------------------------


def cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def no_heads(folder):
    configured(folder, num_attention_heads=0)


def no_number(folder):
    configured(folder, hidden_size="x")


def configured(folder, **values):
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("damage", [cut, no_heads, no_number])
def test_whatever_a_library_raises_at_a_base_is_one_line(base, topics, tmp_path, damage):
    experiment = base("BertConfig", **SMALL)
    damage(tmp_path / "BertConfig")
    with pytest.raises(KitError, match="could not be loaded") as caught:
        qk.finetune(experiment, data=topics, out=tmp_path / "runs", progress=False)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "runs").glob("*/*.*"))


def test_a_base_whose_logits_are_not_finite_is_refused_before_training(base):
    experiment = base("BertConfig", **SMALL)
    file = f"{experiment.model.name}/model.safetensors"
    weights = load_file(file)
    weights["encoder.layer.0.attention.self.query.weight"][0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(KitError, match="logits that are not finite in fp32 before any training: its weights are dama"):
        build(experiment)


def test_a_mean_on_a_base_that_calls_its_pooler_whatever_it_is(base):
    # LayoutLM's forward does not ask whether there is a pooler.
    model, tokenizer = build(base("LayoutLMConfig", **SMALL))
    assert sum(weight.numel() for name, weight in model.named_parameters() if "pooler" in name) == 0
    alone = np.concatenate([logits_of(model, tokenizer, [text]) for text in TEXTS])
    assert np.allclose(logits_of(model, tokenizer, TEXTS), alone, atol=1e-6)


def test_weights_that_are_no_floats_are_refused(base, tmp_path):
    experiment = base("BertConfig", **SMALL)
    model, _ = build(experiment)
    models.save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: weight.to(torch.int8) for name, weight in load_file(file).items()}, file)
    with pytest.raises(KitError, match=r"holds torch\.int8, no trained weights"):
        models.load_weights_(model, tmp_path / "adapter")
