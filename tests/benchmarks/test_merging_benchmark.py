"""benchmarks/merging.py: its ways on a tiny model, its record, and what `check` finds wrong in one."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

import qlora_kit as qk
from qlora_kit import evaluation, schemas
from qlora_kit.checking import packing
from qlora_kit.checking.check import check
from qlora_kit.system.files import write_json
from qlora_kit.system.safe_bitsandbytes import keep_weights_as_stored_

sys.path.insert(0, str(ROOT / "benchmarks"))
import merging
from accuracy import predicted
from common import recording

SHA = "ab" * 20
BY = recording.Provenance(SHA, False)
HERE = {"device": "a CPU", "threads": 1, "versions": {}, "commit": SHA, "checksums": {"data": None, "base": None}}
TRUTH = np.arange(240) % 4


@pytest.fixture(scope="module")
def run(topics, tiny, tmp_path_factory) -> qk.Run:
    experiment = qk.preset("minilm_banking77_qlora").override(
        {"model.name": str(tiny("bert")), "training.max_steps": 12, "training.precision": "fp32", "training.threads": 1,
         "training.learning_rate": 1e-2, "tracking.wandb": "none", "name": "merged"}
    )  # fmt: skip
    return qk.finetune(experiment, data=topics, out=tmp_path_factory.mktemp("merging"), progress=False)


@pytest.mark.long
def test_every_way_is_scored_with_the_same_head(run, topics):
    texts = list(topics.test.texts)
    found = {way: (dtype, logits, more) for way, dtype, logits, more in merging.scored(run, texts)}
    assert tuple(found) == merging.WAYS
    assert [dtype for dtype, _, _ in found.values()] == ["nf4", "nf4", "fp32", "fp16", "bf16", "nf4", "nf4"]
    trained = found["as_trained"][1]
    assert np.allclose(trained, run.predict(texts).logits, atol=1e-5)
    # The adapters switched off by PEFT, which leaves the trained head in its place.
    model, _ = qk.load_run(run.path).load()
    off = qk.load_run(run.path)
    for layer in merging.adapted(off.load()[0]).values():
        layer.enable_adapters(False)
    assert np.allclose(found["no_adapter"][1], off.predict(texts).logits, atol=1e-4)
    assert not np.allclose(found["no_adapter"][1], trained, atol=1e-2)
    assert len(merging.adapted(model)) == 6 * model.config.num_hidden_layers  # every linear layer of the encoder
    assert np.allclose(found["merged_fp32"][1], found["merged_fp16"][1], atol=0.05)
    for way, (_, _, more) in found.items():
        assert (more["rounding_error"] is not None) == way.startswith("merged_nf4"), way


@pytest.mark.parametrize("of_base", [False, True])
def test_weights_are_merged_and_rounded_as_bitsandbytes_does(run, of_base):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from qlora_kit.quantization.backend import dense_weight

    before, merged = qk.load_run(run.path), qk.load_run(run.path)
    old = merging.adapted(before.load()[0])
    told = merging.merge_into_nf4_(merged, of_base=of_base)
    new = merging.adapted(merged.load()[0])
    errors, sizes = [], []
    for name, layer in old.items():
        start = dense_weight(layer.base_layer, torch.float32)
        gain = layer.get_delta_weight("default").float()
        found = dense_weight(new[name].base_layer, torch.float32)
        assert all(not part.weight.any() for part in new[name].lora_B.values())
        if not of_base:
            packed = quantize_4bit(start + gain, quant_type="nf4", compress_statistics=True)
            assert torch.allclose(found, dequantize_4bit(*packed).float(), atol=1e-6)
            errors.append(float((found - start - gain).detach().square().sum()))
            sizes.append(float(gain.detach().square().sum()))
    if not of_base:
        assert told["rounding_error"] == pytest.approx((sum(errors) / sum(sizes)) ** 0.5, rel=1e-3)
    assert 0 < told["codes_changed"] < 1


@pytest.mark.long
def test_a_merged_model_that_plain_transformers_opens_in_nf4_is_merged_nf4_of_base(run, topics, tmp_path, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    tokenizer = qk.export.write_merged(run, tmp_path / "merged")
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["classifier"],
    )  # fmt: skip
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", quantization_config=four_bits, trust_remote_code=True
    ).eval()
    keep_weights_as_stored_(opened)  # some CPUs read layers as narrow as these wrongly
    same = qk.load_run(run.path)
    merging.merge_into_nf4_(same, of_base=True)
    texts = list(topics.test.texts)[:32]
    words = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = opened(words["input_ids"], words["attention_mask"]).logits.float().numpy()
    assert np.allclose(logits, same.predict(texts).logits, atol=0.02)


def small(tmp_path: Path) -> dict[str, Any]:
    """Return a record of three seeds, as the benchmark writes it."""
    rows = []
    wrong = dict(zip(merging.WAYS, (0.1, 0.4, 0.12, 0.12, 0.13, 0.35, 0.15), strict=True))
    for seed in range(3):
        hard = np.random.default_rng(9).random(len(TRUTH)) + np.random.default_rng(seed).normal(0, 0.02, len(TRUTH))
        guesses = {way: np.where(hard < share, (TRUTH + 1) % 4, TRUTH) for way, share in wrong.items()}
        for way, guess in guesses.items():
            scores = evaluation.compute_metrics(guess, TRUTH)
            row = {"preset": "p", "model": "m", "way": way, "dtype": "nf4", "seed": seed, "learning_rate": 1e-3,
                   "steps": 5, "precision": "fp32", "accuracy": scores["accuracy"], "f1_macro": scores["f1_macro"],
                   "same_label": float((guess == guesses["as_trained"]).mean()), "logits_error": 0.1,
                   "largest_difference": 0.2, "codes_changed": None, "rounding_error": None, "device": "a CPU",
                   **predicted(guess.tolist(), TRUTH.tolist())}  # fmt: skip
            rows.append(BY.stamped(row, HERE))
    labels = {packing.checksum(TRUTH): packing.pack_classes(TRUTH)}
    record = recording.write(tmp_path / "m.json", rows, provenance=BY, command="python merging", makes=rows,
                             key=merging.KEY, append=False, labels=labels)  # fmt: skip
    return merging.derived(record)


def test_a_record_is_computed_again_and_each_change_is_found(tmp_path: Path):
    record = small(tmp_path)
    assert schemas.problems(record, schemas.of_results("merging")) == []
    assert [line["way"] for line in record["gains"]] == list(merging.WAYS[2:])
    kept = {line["way"]: line["f1_macro"]["value"] for line in record["gains"]}
    assert kept["merged_fp32"] > 0.8 and kept["merged_nf4"] < 0.4

    def wrong(change: Any) -> str:
        changed = copy.deepcopy(record)
        change(changed)
        write_json(tmp_path / "results" / "merging.json", changed)
        return "\n".join(check([tmp_path / "results" / "merging.json"]).wrong)

    assert wrong(lambda record: None) == ""
    assert "accuracy" in wrong(lambda record: record["rows"][3].update(accuracy=0.5))
    assert "same_label" in wrong(lambda record: record["rows"][3].update(same_label=0.5))
    assert "f1_macro.low" in wrong(lambda record: record["gains"][0]["f1_macro"].update(low=0.1))
    assert "f1_macro" in wrong(lambda record: record["gains"][0].update(f1_macro=None))
    assert "seeds" in wrong(lambda record: record["gains"][1].update(seeds=[0]))
    assert "merged_nf4 on a CPU is missing" in wrong(lambda record: record["gains"].pop(3))
    assert "no rows of two seeds" in wrong(lambda record: record["gains"][0].update(way="else", device="a CPU"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds takes two or more"),
        (["--preset", "minilm_banking77_lora"], "minilm_banking77_lora is no QLoRA on a base in NF4"),
    ],
)
def test_what_shows_nothing_is_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["merging.py", *arguments])
    assert merging.main() == 2
    assert message in capsys.readouterr().err
