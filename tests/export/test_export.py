"""Merged models, cards, what is pushed, and the zip: read back by what others would read them with."""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading
import types
import zipfile
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard, constants
from markdown_it import MarkdownIt

import qlora_kit as qk
from qlora_kit import export, models
from qlora_kit.export.hub import _without_folders
from qlora_kit.export.merge import _merged, _rehearse, _save
from qlora_kit.runs import card
from qlora_kit.runs import card as cards
from qlora_kit.system.parsing import read_json

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
    assert report == read_json(tmp_path / "merged" / "merge.json")
    texts = [text.strip() for text in (*TEXTS, *topics.validation.texts)]
    plain = {"transformers": _by_pipeline, "with_code": _by_the_cards_lines}[report["layout"]]
    # What the base's quantization changes is measured, and nothing else may: against the same adapters unquantized.
    unquantized = _merged(run, run.load()[1].pad_token_id)
    expected = _logits(unquantized, run, texts).argmax(axis=1)
    assert plain(tmp_path / "merged", texts) == [topics.label_names[place] for place in expected]
    known = report["validation"]
    if run.experiment.quantization.scheme == "none":
        assert known["same_label"] == 1.0 and known["difference"]["value"] == 0.0
    share = np.mean([a == b for a, b in zip(run.predict(texts).labels, plain(tmp_path / "merged", texts), strict=True)])
    assert share > 0.6
    truth = np.asarray(topics.validation.labels)
    before = run.predict(topics.validation.texts).label_ids
    assert known["before"]["accuracy"]["value"] == pytest.approx((before == truth).mean())
    after = np.array([topics.label_names.index(name) for name in plain(tmp_path / "merged", texts)[len(TEXTS) :]])
    assert known["after"]["accuracy"]["value"] == pytest.approx((after == truth).mean())
    tested = np.asarray(topics.test.labels)
    right = (_logits(unquantized, run, topics.test.texts).argmax(axis=1) == tested).mean()
    assert report["test"]["after"]["accuracy"]["value"] == pytest.approx(right)
    assert report["test"]["rows"] == len(tested)
    checksums = report["environment"]["checksums"]
    assert checksums["base"] and checksums == run.environment["checksums"]
    config = transformers.PretrainedConfig.get_config_dict(tmp_path / "merged")[0]
    config = types.SimpleNamespace(**config)
    assert config.problem_type == "single_label_classification"  # whatever the base was: a pipeline goes by it
    card = (tmp_path / "merged" / "README.md").read_text()
    for name in ("validation", "test"):
        rows = report[name]
        shown = [rows["before"]["f1_macro"]["value"], rows["after"]["f1_macro"]["value"], rows["difference"]["value"]]
        assert f"on the {rows['rows']:,} {name} rows" in card and all(f"{abs(one):.4f}" in card for one in shown)
        assert f"differ by up to\n{rows['largest_difference']:.3f}." in card
    worst = max((report[name]["limit"] for name in ("validation", "test")), key=lambda limit: limit["share"])
    told = f"a limit of {worst['at']:.3f}, {worst['share']:.2%} of" if worst["share"] else "no limit makes a difference"
    assert "has to be chosen again" in card and told in card
    assert not [item.name for item in (tmp_path / "merged").iterdir() if item.suffix in (".bin", ".pt", ".pth")]


@pytest.mark.parametrize("better", [True, False])
def test_the_difference_of_a_merge_is_after_minus_before(trained, topics, tmp_path, monkeypatch, better):
    run = trained("distilbert none", training__max_steps=1)
    truth = np.asarray(topics.validation.labels)
    splits = (topics.validation, topics.test)
    right = {text: label for rows in splits for text, label in zip(rows.texts, rows.labels, strict=True)}
    count = len(topics.label_names)

    def after(run, merged, tokenizer, texts, progress) -> np.ndarray:
        # In place of the merged model's: all right, or all wrong.
        return np.eye(count)[[(right[text] + (not better)) % count for text in texts]]

    monkeypatch.setattr(sys.modules["qlora_kit.export.merge"], "_logits", after)
    report = run.merge(tmp_path / "merged", progress=False)["validation"]
    before = report["before"]["f1_macro"]["value"]
    assert 0 < before < 1 and report["after"]["f1_macro"]["value"] == float(better)
    difference = report["difference"]
    assert difference["value"] == pytest.approx(better - before)
    assert difference["low"] <= difference["value"] <= difference["high"]
    guessed = run.predict(topics.validation.texts).label_ids
    assert report["same_label"] == pytest.approx((guessed == (truth + (not better)) % count).mean())


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
    assert '["a text"]' in lines and "qlora_kit" not in lines
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.MonkeyPatch.context() as patch:
        # transformers copies the folder's code there before it runs it.
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder.parent / "modules"))
        exec(lines.replace('"this-folder"', repr(str(folder))).replace('["a text"]', repr(texts)), {})
    answer: list[dict[str, str]] = yaml.safe_load(shown.getvalue())
    return [one["label"] for one in answer]


def _alone(code, folder) -> subprocess.CompletedProcess[str]:
    # transformers copies the folder's code into its cache before it runs it.
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder.parent / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)


def test_a_merged_model_with_code_is_refused_by_whoever_does_not_trust_it(trained, tmp_path):
    folder = tmp_path / "merged"
    assert trained("bert nf4").merge(folder, progress=False)["layout"] == "with_code"
    # Without its code transformers would take its own class, and fill the head with random numbers.
    code = (
        "import sys, transformers\n"
        "sys.modules['qlora_kit'] = None\n"
        "folder = sys.argv[1]\n"
        "for call in (\n"
        "    lambda: transformers.AutoModelForSequenceClassification.from_pretrained(folder),\n"
        "    lambda: transformers.AutoModel.from_pretrained(folder),\n"
        "    lambda: transformers.pipeline('text-classification', folder),\n"
        "):\n"
        "    try:\n"
        "        call()\n"
        "        print('ANSWER opened')\n"
        "    except ValueError as error:\n"
        "        print('ANSWER', 'trust_remote_code' in str(error))\n"
        "kind = transformers.AutoModelForSequenceClassification\n"
        "m, info = kind.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        "print('ANSWER', type(m).__name__)\n"
    )
    done = _alone(code, folder)
    assert done.returncode == 0, done.stderr
    with pytest.raises(qk.KitError, match="has code of its own, which the kit does not run"):
        models.load_config(qk.ModelSpec(str(folder)))
    # transformers prints, too: it asks whether the code is trusted.
    answers = re.findall(r"ANSWER (\w+)", done.stdout)
    assert answers == ["True", "True", "True", "PooledForSequenceClassification"]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_head_of_a_merged_model_stays_whole(trained, tmp_path, dtype):
    run = trained("llama nf4 cosine")
    run.merge(tmp_path / "merged", dtype=dtype, progress=False)
    model = export.load_merged(tmp_path / "merged")
    assert model.classifier.weight.dtype == torch.float32
    assert {weight.dtype for weight in model.base.parameters()} == {
        {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    }


def test_files_of_a_merged_model_have_ordinary_permissions(trained, tmp_path):
    trained("bert nf4").merge(tmp_path / "merged", progress=False)
    (tmp_path / "new").touch()
    expected = (tmp_path / "new").stat().st_mode & 0o777
    files = [item for item in (tmp_path / "merged").rglob("*") if item.is_file()]
    assert {item.name: item.stat().st_mode & 0o777 for item in files} == {item.name: expected for item in files}


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
        assert names == {*export.PUSHED, "manifest.json"}
        text = "".join(item.read_bytes().decode("utf-8", "replace") for item in folder.rglob("*") if item.is_file())
        again = qk.load_run(folder)
        assert again.predict(TEXTS).labels == run.predict(TEXTS).labels
    assert "plantedplanted" not in text
    assert str(tmp_path) not in text
    for split in topics.splits().values():
        assert not [row for row in split.texts if row in text]


@pytest.mark.parametrize("name", ["/home/me/train.csv", "owner/name"])
def test_a_pushed_experiment_names_data_files_without_their_folders(name):
    files = {"data.name": name, "data.test": "/home/me/test.csv", "data.validation": "/home/me/parts/*.csv"}
    spec = _without_folders(qk.preset("minilm_banking77_qlora").override(files)).data
    assert (spec.test, spec.validation) == ("test.csv", "*.csv")
    assert spec.name == ("owner/name" if name == "owner/name" else "train.csv")


def test_a_card_is_valid_and_gains_the_tests_figures(trained):
    run = trained("bert nf4")
    before = ModelCard.load(run.path / "README.md")
    assert {result.dataset_split for result in before.data.eval_results} == {"validation"}
    assert "Not tested yet" in before.text
    report = qk.evaluate(run, baselines=False, progress=False)
    after = ModelCard.load(run.path / "README.md")
    assert "Not tested yet" not in after.text
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


def test_a_test_brings_the_card_up_to_date_and_leaves_one_that_was_changed(trained, caplog):
    run = trained("bert nf4", training__max_steps=2)
    card = run.path / "README.md"
    fresh = card.read_text()
    assert fresh == cards.of_run(run) and cards.is_as_written(run)
    qk.evaluate(run, baselines=False, progress=False, resamples=100)
    tested = card.read_text()
    assert tested == cards.of_run(run) != fresh
    # Tested again: the card is that of the test before, and goes on to this one's.
    qk.evaluate(run, baselines=False, progress=False, resamples=200)
    again = card.read_text()
    assert again == cards.of_run(run) != tested and not caplog.records
    # By hand, the end of a line at the end included; nobody's words are lost, and a line says so.
    for mine in (again + "My own words.\n", again.replace("\n", "\r\n")):
        card.write_bytes(mine.encode())
        qk.evaluate(run, baselines=False, progress=False, resamples=100)
        assert card.read_bytes() == mine.encode()
        assert "README.md was changed by hand" in caplog.text and "Run.write_card()" in caplog.text
        caplog.clear()
    run.write_card()
    assert card.read_text() == cards.of_run(run)
    card.unlink()
    qk.evaluate(run.path, baselines=False, progress=False, resamples=100)
    assert card.read_text() == cards.of_run(run)
    # A damaged report does not stop a new one; what the card was cannot be known then.
    (run.path / "evaluation.json").write_text("{")
    qk.evaluate(run, baselines=False, progress=False, resamples=100)
    assert "is left as it is" in caplog.text
    assert qk.load_run(run.path).evaluation is not None


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


HOSTILE = [
    "x` <script>alert(1)</script>\n---\nlicense: mit\n| a | [b](javascript:c)",
    "`<>\n",
    "``",
    "\x1b[2Jgone",
    "\u202eevil",
    " two spaces ",
    "a\\|b",
    "<img src=x onerror=alert(1)>",
    "*bold* _b_ ![](http://a.b/c.png) &lt;",
    "",
]


@pytest.mark.parametrize("label", HOSTILE)
def test_a_hostile_label_is_shown_in_a_card_and_acts_as_nothing(label):
    shown = card.code(label)
    assert "\n" not in shown and shown.isprintable()
    # As the hub and GitHub read it: one piece of code, with every character of the label.
    (paragraph, inline, _) = MarkdownIt("gfm-like", {"linkify": False}).parse(f"Labels: {shown}, `next`")
    assert paragraph.type == "paragraph_open"
    assert [piece.type for piece in inline.children] == ["text", "code_inline", "text", "code_inline"]
    spelled = "".join(c if c.isprintable() else repr(c)[1:-1] for c in label)
    assert inline.children[1].content == (spelled or " ")


def test_a_long_label_is_cut_off_in_a_card():
    assert card.code("a" * 5000) == f"`{'a' * (cards.MOST_CHARACTERS - 1)}…`"


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


class Hub(http.server.BaseHTTPRequestHandler):
    """What a push asks of the hub, answered on this machine: who one is, what is there, and what is committed."""

    there: ClassVar[dict[str, bool]] = {}  # whether each repository is private
    makes_private = True
    role = "write"
    asked: ClassVar[list[str]] = []
    committed: ClassVar[dict[str, dict[str, bytes]]] = {}
    messages: ClassVar[list[str]] = []

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, found: object, code: int = 200) -> None:
        text = json.dumps(found).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        if code == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(f"GET {path}")
        if path == "/api/whoami-v2":
            known = self.headers["Authorization"] == "Bearer hf_me"
            self.answer(
                {"name": "me", "type": "user", "auth": {"accessToken": {"role": self.role}}}, 200 if known else 401
            )
        elif path.removeprefix("/api/models/") in self.there:
            name = path.removeprefix("/api/models/")
            self.answer({"id": name, "private": self.there[name], "sha": "0" * 40, "siblings": []})
        else:
            self.answer({"error": "not found"}, 404)

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(f"POST {path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            code = 409 if name in self.there else 200
            self.there.setdefault(
                name, (asked.get("private") or asked.get("visibility") == "private") and self.makes_private
            )
            self.answer({"url": f"http://{self.headers['Host']}/{name}"}, code)
        elif path.endswith("/preupload/main"):
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self.answer({"files": [{**file, "shouldIgnore": False} for file in files]})
        elif path.endswith("/commit/main"):
            name = path.removeprefix("/api/models/").removesuffix("/commit/main")
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.messages.append(line["value"]["summary"])
                else:
                    content = base64.b64decode(line["value"]["content"])
                    self.committed.setdefault(name, {})[line["value"]["path"]] = content
            self.answer({"commitUrl": f"http://{self.headers['Host']}/{name}/commit/1", "commitOid": "1" * 40})
        else:
            self.answer({})


@pytest.fixture
def hub(monkeypatch):
    """Start a stand-in for the hub on this machine, and let the real client talk to it."""
    import huggingface_hub

    kind = type("Fresh", (Hub,), {"there": {}, "asked": [], "committed": {}, "messages": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for module in (constants, huggingface_hub.hf_api):
        monkeypatch.setattr(module, "ENDPOINT", f"http://127.0.0.1:{server.server_port}", raising=False)
    huggingface_hub.close_session()
    yield kind
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


@pytest.fixture
def from_a_folder(topics, tiny, tmp_path):
    """Return a run that was trained on files in a folder whose name is nobody's business."""
    folder = tmp_path / "secret_customer"
    folder.mkdir()
    names = topics.label_names
    for part, split in (("train", topics.train), ("test", topics.test)):
        rows = zip(split.texts, split.labels, strict=True)
        frame = pd.DataFrame([(text, names[label]) for text, label in rows], columns=["text", "label"])
        frame.to_csv(folder / f"{part}.csv", index=False)
    data = qk.text_classification(folder / "train.csv", test=str(folder / "test.csv"))
    spec = qk.TrainingSpec(max_steps=1, batch_size=8, precision="fp32", threads=1)
    tracking = qk.TrackingSpec(wandb="none")
    base = qk.ModelSpec("embedded:minilm", layers=1)
    experiment = qk.Experiment("tickets", base, training=spec, tracking=tracking)
    return qk.finetune(experiment, data=data, out=tmp_path / "secret_runs", name="secret_name", progress=False)


def test_a_run_is_pushed_privately_and_without_the_names_of_folders(hub, from_a_folder):
    assert from_a_folder.push_to_hub("me/tickets") == f"{constants.ENDPOINT}/me/tickets"
    assert hub.there == {"me/tickets": True} and hub.messages == ["Upload tickets"]
    files = hub.committed["me/tickets"]
    for_peft = {"adapter_config.json", "adapter_model.safetensors", "config.json", "modeling_pooled.py"}
    for_peft |= {"tokenizer.json", "tokenizer_config.json"}
    assert {name.partition("/")[0] for name in files} == {*export.PUSHED, "manifest.json", *for_peft}
    for name, content in files.items():
        assert b"secret_" not in content, name
    pushed = qk.Experiment.from_yaml(files["experiment.yaml"].decode())
    assert (pushed.data.name, pushed.data.test) == ("train.csv", "test.csv")
    for part in ("adapter/adapter_model.safetensors", "training.json"):
        assert files[part] == (from_a_folder.path / part).read_bytes()
    # Again, into what is there: the whole model.
    assert from_a_folder.push_to_hub("me/tickets", merged=True).endswith("/me/tickets")
    merged = hub.committed["me/tickets"]
    assert {"model.safetensors", "merge.json", "README.md"} <= set(merged)
    for name, content in merged.items():
        assert b"secret_" not in content, name


def test_a_public_repository_is_no_place_for_a_private_push(hub, from_a_folder, monkeypatch):
    hub.there["me/open"] = False
    with monkeypatch.context() as context:
        context.setattr("qlora_kit.export.hub.staged", None)  # no work is done for what is refused
        with pytest.raises(qk.KitError, match="me/open is there already and is public"):
            from_a_folder.push_to_hub("me/open", merged=True)
    assert not [asked for asked in hub.asked if asked.startswith("POST")]
    assert from_a_folder.push_to_hub("me/open", private=False) and "me/open" in hub.committed
    # A hub that makes it public all the same: nothing is uploaded.
    hub.makes_private = False
    with pytest.raises(qk.KitError, match="me/new is there already and is public"):
        from_a_folder.push_to_hub("me/new")
    assert "me/new" not in hub.committed


def test_what_the_hub_does_not_take_is_told_before_any_work(hub, from_a_folder, monkeypatch):
    monkeypatch.setattr("qlora_kit.export.hub.staged", None)
    with pytest.raises(qk.KitError, match="the hub refuses me/tickets: Invalid user token"):
        from_a_folder.push_to_hub("me/tickets", token="hf_other")
    hub.role = "read"
    with pytest.raises(qk.KitError, match="may only read"):
        from_a_folder.push_to_hub("me/tickets")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(qk.KitError, match="cannot be reached, so nothing is pushed: ConnectError"):
        from_a_folder.push_to_hub("me/tickets", merged=True)


@pytest.mark.parametrize("name", ["private/rows.csv", "/home/me/rows.parquet", "C:\\me\\rows.tsv", "~/me/rows.csv"])
def test_only_the_file_of_a_path_is_pushed(name):
    experiment = qk.preset("minilm_banking77_smoke").override({"data.name": name, "data.test": name})
    assert "me" not in _without_folders(experiment).data.name.split(".")[0]
    assert _without_folders(experiment).data.test.startswith("rows.")
    on_hub = experiment.override({"data.name": "owner/rows-v1.5", "data.test": "/home/me/rows.csv"})
    assert _without_folders(on_hub).data.name == "owner/rows-v1.5"
    assert _without_folders(on_hub).data.test == "rows.csv"


def test_results_go_into_one_zip_without_checkpoints_and_rows(trained, tmp_path):
    trained("bert nf4", training__checkpoints="keep")
    offline, online = (f"wandb/{kind}run-20260101_000000-abc" for kind in ("offline-", ""))
    synced = [f"{offline}/run-abc.wandb", f"{offline}/files/media/table/t.json"]  # what `wandb sync` uploads
    left = [f"{offline}/logs/debug.log", f"{offline}/tmp/code/x", "wandb/debug.log", f"{online}/run-abc.wandb"]
    for name in (*synced, *left):
        (tmp_path / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / name).write_text("x")
    (tmp_path / "runs" / "02_finetune.json").write_text('{"schema": 1}')
    (tmp_path / "private").write_text("a key")
    (tmp_path / "runs" / "figure.png").symlink_to(tmp_path / "private")  # planted by whoever made the folder
    made = qk.zip_results(tmp_path / "runs")
    assert made == tmp_path / "runs.zip"
    names = zipfile.ZipFile(made).namelist()
    assert "runs/02_finetune.json" in names and "runs/tiny_bert_seed0/training.json" in names
    assert not [name for name in names if {"checkpoints", "data"} & set(name.split("/")) or "/." in name]
    assert [name for name in names if "wandb" in name] == sorted(f"runs/{name}" for name in synced)
    assert "runs/figure.png" not in names
    with zipfile.ZipFile(qk.zip_results(tmp_path / "runs", tmp_path / "runs" / "again.zip")) as archive:
        assert archive.namelist() == names
        assert json.loads(archive.read("runs/02_finetune.json")) == {"schema": 1}
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
    # Downloads of several notebooks lie side by side in one folder of the browser's.
    made = qk.download_results(out, "02_finetune")
    assert made == tmp_path / "02_finetune.zip" and handed[1:] == [str(made)]
    assert zipfile.ZipFile(made).namelist() == ["latest/02_finetune.json"]
    assert capsys.readouterr().out == ""
    # What is on Drive stays: nothing is to be downloaded.
    monkeypatch.setattr("qlora_kit.system.host.DRIVE", tmp_path)
    assert qk.download_results(out, "02_finetune") is None and len(handed) == 2
    assert capsys.readouterr().out.startswith(f"Everything is in {out}, on your Drive.")


# --- what makes a merge impossible ------------------------------------------------------------------------------


def test_what_cannot_be_merged_is_refused_before_any_weight_is_read(trained, tmp_path):
    run = trained("bert nf4", model__pooling="sequence_classification", model__head="cosine", training__max_steps=1)
    (run.path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="a cosine head on BertForSequenceClassification's own pooling is no class"):
        _rehearse(run, 0, torch.float32)


def test_a_configuration_that_stands_for_two_classes_is_merged(tmp_path):
    # transformers has two base classes for Funnel's configuration.
    config = transformers.FunnelConfig(
        vocab_size=200, d_model=32, n_head=2, d_head=16, d_inner=64, block_sizes=[1, 1], num_decoder_layers=1,
        pad_token_id=0,
    )  # fmt: skip
    transformers.FunnelModel(config).save_pretrained(tmp_path / "base")
    experiment = qk.Experiment("funnel", qk.ModelSpec(str(tmp_path / "base"))).override(
        {"quantization.scheme": "none", "lora": None, "training.precision": "fp32"}
    )
    run = types.SimpleNamespace(experiment=experiment, label_names=["a", "b"])
    _rehearse(run, 0, torch.float32)
    model = models.build(experiment, ["a", "b"], device=torch.device("cpu")).eval()
    # Two names of one storage, which safetensors refuses and the class does not know of.
    first, last = model.base.encoder.blocks[0][0].ffn, model.base.decoder.layers[0].ffn
    last.linear_1.weight = first.linear_1.weight
    layout, use = _save(run, model, None, tmp_path / "merged", torch.float32)
    assert layout == "with_code" and "trust_remote_code=True" in use
    opened = export.load_merged(tmp_path / "merged")
    assert type(opened.base) is transformers.FunnelModel
    batch = {"input_ids": torch.arange(3, 19).view(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    with torch.no_grad():
        assert torch.equal(opened(**batch).logits, model(**batch).logits)
    first, last = opened.base.encoder.blocks[0][0].ffn, opened.base.decoder.layers[0].ffn
    assert torch.equal(last.linear_1.weight, first.linear_1.weight)
