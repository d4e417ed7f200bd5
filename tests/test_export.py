"""Merged models, cards, what is pushed, and the zip: read back by what others would read them with."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard, constants

import qlora_kit as qk
from qlora_kit import cards, export, records

TEXTS = ["Where is my card?", "I still have not got the card that I ordered, what now", "top up"]

# Every scheme, Conv1D, both layouts, both poolings, both heads, and full fine-tuning.
CASES = {
    "bert nf4": ("bert", {"quantization__scheme": "nf4"}),
    "bert int4 cosine": ("bert", {"quantization__scheme": "int4", "model__head": "cosine"}),
    "distilbert none": ("distilbert", {"quantization__scheme": "none"}),
    "roberta classifier": (
        "roberta",
        {"quantization__scheme": "nf4", "model__pooling": "sequence_classification", "lora__bias": "all"},
    ),
    "gpt2 fp4": ("gpt2", {"quantization__scheme": "fp4", "lora__target_modules": ["c_attn", "c_proj"]}),
    "gpt2 int8": ("gpt2", {"quantization__scheme": "int8", "lora__target_modules": ["c_attn"], "model__lean": True}),
    "llama nf4 cosine": ("llama", {"quantization__scheme": "nf4", "model__head": "cosine"}),
    "qwen2 full": ("qwen2", {"quantization__scheme": "none", "lora": None, "training__learning_rate": 1e-3}),
}


@pytest.fixture
def trained(topics, tiny_experiment, tmp_path):
    """Return a function that trains one of the cases."""

    def make(case: str, **changes) -> qk.Run:
        name, case_changes = CASES[case]
        experiment = tiny_experiment(name, **case_changes, **changes)
        return qk.finetune(experiment, data=topics, out=tmp_path / "runs", progress=False)

    return make


@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_is_read_by_plain_transformers(case, trained, topics, tmp_path):
    run = trained(case)
    report = run.merge(tmp_path / "merged", progress=False)
    assert report == records.read_json(tmp_path / "merged" / "merge.json")
    texts = [text.strip() for text in (*TEXTS, *topics.validation.texts)]
    plain = {"transformers": _by_pipeline, "encoder_and_head": _by_the_cards_lines}[report["layout"]]
    # What the base's quantization changes is measured, and nothing else may: against the same adapters unquantized.
    unquantized = export._merged(run, run.load()[1].pad_token_id)
    expected = _logits(unquantized, run, texts).argmax(axis=1)
    assert plain(tmp_path / "merged", texts) == [topics.label_names[place] for place in expected]
    if run.experiment.quantization.scheme == "none":
        assert report["same_label"] == 1.0 and report["difference"]["value"] == 0.0
    share = np.mean([a == b for a, b in zip(run.predict(texts).labels, plain(tmp_path / "merged", texts), strict=True)])
    assert share > 0.6
    truth = np.asarray(topics.validation.labels)
    before = run.predict(topics.validation.texts).label_ids
    assert report["before"]["accuracy"]["value"] == pytest.approx((before == truth).mean())
    after = np.array([topics.label_names.index(name) for name in plain(tmp_path / "merged", texts)[len(TEXTS) :]])
    assert report["after"]["accuracy"]["value"] == pytest.approx((after == truth).mean())
    config = transformers.AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.problem_type == "single_label_classification"  # whatever the base was: a pipeline goes by it
    card = (tmp_path / "merged" / "README.md").read_text()
    assert (
        f"{report['before']['f1_macro']['value']:.4f}" in card and f"{report['after']['f1_macro']['value']:.4f}" in card
    )
    assert not [item.name for item in (tmp_path / "merged").iterdir() if item.suffix in (".bin", ".pt", ".pth")]


def _logits(model, run, texts) -> np.ndarray:
    from qlora_kit import models

    return models.forward_texts(
        model, run.load()[1], texts, device=torch.device("cpu"), precision="fp32", max_length=128
    )


def _by_pipeline(folder, texts) -> list[str]:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # The tiny decoders have MiniLM's tokenizer; a decoder's own gives no token types.
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    classify = transformers.pipeline("text-classification", str(folder), tokenizer=tokenizer)
    assert classify.model.config.id2label == model.config.id2label
    return [answer["label"] for answer in classify(texts, truncation=True, max_length=128)]


def _by_the_cards_lines(folder, texts) -> list[str]:
    card = (folder / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    asked = 'folder, texts = "this-folder", ["a text"]'
    assert asked in lines and "qlora_kit" not in lines
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(lines.replace(asked, f"folder, texts = {str(folder)!r}, {texts!r}"), {})
    answer: list[str] = yaml.safe_load(shown.getvalue())
    return answer


def test_a_merged_model_needs_no_kit(trained, topics, tmp_path):
    trained("gpt2 fp4").merge(tmp_path / "merged", progress=False)
    code = (
        "import sys, transformers\n"
        "sys.modules['qlora_kit'] = None\n"
        "kind = transformers.AutoModelForSequenceClassification\n"
        "m, info = kind.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        "print(sorted(m.config.id2label.values())[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "merged")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == min(topics.label_names)


def test_half_precision_halves_the_file_and_nothing_is_overwritten(trained, tmp_path):
    run = trained("qwen2 full")
    run.merge(tmp_path / "whole", progress=False)
    run.merge(tmp_path / "half", dtype="bf16", progress=False)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert 0.45 < sizes[1] / sizes[0] < 0.55
    with pytest.raises(qk.KitError, match="nothing is overwritten"):
        run.merge(tmp_path / "whole", progress=False)
    with pytest.raises(qk.KitError, match="bf16"):
        run.merge(tmp_path / "other", dtype="bfloat16")
    assert {item.name for item in tmp_path.iterdir()} == {"runs", "whole", "half"}


def test_what_is_pushed_holds_no_rows_no_folders_and_no_secrets(trained, topics, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_plantedplantedplantedplanted")
    run = trained("bert nf4", training__checkpoints="keep")
    qk.evaluate(run, baselines=False, progress=False)
    assert (run.path / "checkpoints").is_dir() and (run.path / "data").is_dir()
    with export.staged(run) as folder:
        names = {item.name for item in folder.iterdir()}
        assert names == {*export.PUSHED}
        text = "".join(item.read_bytes().decode("utf-8", "replace") for item in folder.rglob("*") if item.is_file())
        again = qk.load_run(folder)
        assert again.predict(TEXTS).labels == run.predict(TEXTS).labels
    assert "plantedplanted" not in text
    assert str(tmp_path) not in text
    for split in topics.splits().values():
        assert not [row for row in split.texts if row in text]


def test_a_card_is_valid_and_gains_the_tests_figures(trained):
    run = trained("bert nf4")
    before = ModelCard.load(run.path / "README.md")
    assert {result.dataset_split for result in before.data.eval_results} == {"validation"}
    assert "Not tested yet" in before.text
    report = qk.evaluate(run, baselines=False, progress=False)
    after = ModelCard.load(run.write_card())
    found = {(result.dataset_split, result.metric_type): result.metric_value for result in after.data.eval_results}
    for split in ("test", "validation"):
        scores = (report if split == "test" else run.training)["metrics"][split]
        assert found[split, "f1"] == pytest.approx(scores["f1_macro"]["value"], abs=5e-5)
        shown = (
            f"{scores['f1_macro']['value']:.4f} ({scores['f1_macro']['low']:.4f} to {scores['f1_macro']['high']:.4f})"
        )
        assert shown in after.text
    for heading in ("Use", "Data", "Method", "Metrics", "Limits", "Licence"):
        assert f"## {heading}\n" in after.text
    assert (
        after.data.library_name == "peft" and after.data.base_model is None
    )  # a folder on this disk is no base's name


def test_the_embedded_base_and_its_licence_stand_in_the_card():
    experiment = qk.preset("minilm_banking77_qlora")
    score = {"value": 0.5, "low": 0.25, "high": 0.75}
    training = {
        "labels": ["a", "b"],
        "rows": {"train": 9002, "validation": 1001, "test": 3080},
        "steps": 10,
        "precision": "fp32",
        "optimizer": "adamw_torch",
        "random_weights": False,
        "parameters": {"trainable": 10, "all": 100},
        "metrics": {"validation": dict.fromkeys(("accuracy", "f1_macro", "f1_weighted", "loss"), score)},
    }
    card = ModelCard(cards.model_card(experiment, training, "Apache-2.0"))
    assert card.data.license == "apache-2.0" and card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert card.data.datasets == ["PolyAI/banking77"]
    assert "The base: Apache-2.0. The data: CC BY 4.0." in card.text
    random = ModelCard(cards.model_card(experiment, {**training, "random_weights": True}, "Apache-2.0"))
    assert random.data.eval_results is None and "random weights" in random.text


def test_a_hostile_label_is_text_in_a_card():
    hostile = "x` <script>alert(1)</script>\n---\nlicense: mit\n| a | [b](javascript:c)"
    assert cards.code(hostile) == "`x scriptalert(1)/script---license: mit a  [b](javascript:c)`"
    assert cards.code("`<>\n") == "`?`"


def test_a_push_is_refused_for_what_no_hub_takes(trained, monkeypatch):
    run = trained("bert nf4")
    for name in ("no-owner", "a/b/c", "owner/na me", ""):
        with pytest.raises(qk.KitError, match="is no name of a repository"):
            run.push_to_hub(name)
    with pytest.raises(qk.KitError, match="merged=True"):
        run.push_to_hub("owner/name")
    assert constants.HF_HUB_OFFLINE
    with pytest.raises(qk.KitError, match="HF_HUB_OFFLINE is set"):
        run.push_to_hub("owner/name", merged=True)


def test_results_go_into_one_zip_without_checkpoints_and_rows(trained, tmp_path):
    trained("bert nf4", training__checkpoints="keep")
    (tmp_path / "runs" / "wandb").mkdir(exist_ok=True)
    (tmp_path / "runs" / "wandb" / "log").write_text("x")
    (tmp_path / "runs" / "02_finetune.json").write_text("{}")
    (tmp_path / "private").write_text("a key")
    (tmp_path / "runs" / "figure.png").symlink_to(tmp_path / "private")  # planted by whoever made the folder
    made = qk.zip_results(tmp_path / "runs")
    assert made == tmp_path / "runs.zip"
    names = zipfile.ZipFile(made).namelist()
    assert "runs/02_finetune.json" in names and "runs/tiny_bert_seed0/training.json" in names
    assert not [name for name in names if {"checkpoints", "wandb", "data"} & set(name.split("/")) or "/." in name]
    assert "runs/figure.png" not in names
    with zipfile.ZipFile(qk.zip_results(tmp_path / "runs", tmp_path / "runs" / "again.zip")) as archive:
        assert archive.namelist() == names
        assert json.loads(archive.read("runs/02_finetune.json")) == {}
    (tmp_path / "empty").mkdir()
    with pytest.raises(qk.KitError, match="nothing in"):
        qk.zip_results(tmp_path / "empty")
    with pytest.raises(qk.KitError, match="no folder"):
        qk.zip_results(tmp_path / "missing")


def test_results_are_downloaded_in_colab_and_elsewhere_only_told_of(tmp_path, capsys, monkeypatch):
    out = tmp_path / "latest"
    out.mkdir()
    (out / "02_finetune.json").write_text("{}")
    assert qk.download_results(out) is None
    assert capsys.readouterr().out == f"Everything is in {out}. As one file: qk.zip_results({str(out)!r})\n"
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]

    # Colab's own module is in no package: what stands in for it here is a browser that notes what it is handed.
    handed: list[str] = []
    (files := types.ModuleType("google.colab.files")).download = handed.append
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setitem(sys.modules, "google.colab.files", files)
    made = qk.download_results(out)
    assert made == tmp_path / "latest.zip" and handed == [str(made)]
    assert zipfile.ZipFile(made).namelist() == ["latest/02_finetune.json"]
    assert capsys.readouterr().out == ""
