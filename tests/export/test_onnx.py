"""A run in ONNX Runtime: opened where there is no kit, and compared with the run row by row."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qlora_kit as qk
from qlora_kit import schemas
from qlora_kit.cli.main import main
from qlora_kit.system.parsing import read_json

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# Stored in each way that can leave, pooled and classified in each way, encoders and decoders, trained biases.
CASES = {
    "bert nf4 cosine": ("bert", {"quantization__scheme": "nf4", "model__head": "cosine", "lora__bias": "all"}),
    "gpt2 int4": ("gpt2", {"quantization__scheme": "int4", "lora__target_modules": ["c_attn", "c_proj"]}),
    "distilbert fp4": ("distilbert", {"quantization__scheme": "fp4", "quantization__double_quantization": False}),
    "roberta none": ("roberta", {"quantization__scheme": "none", "model__pooling": "sequence_classification"}),
    "llama nf4": ("llama", {"quantization__scheme": "nf4", "model__lean": True}),
    "qwen2 full": ("qwen2", {"quantization__scheme": "none", "lora": None, "training__learning_rate": 1e-3}),
}
# The kit, torch and transformers cannot be imported where this runs.
ALONE = """
import json, sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("qlora_kit", "torch", "transformers", "peft", "bitsandbytes"):
            raise ImportError(name)

sys.meta_path.insert(0, Nothing())
sys.path.insert(0, sys.argv[1])
from classifier import TextClassifier

classify = TextClassifier(sys.argv[1])
texts = json.load(sys.stdin)
print(json.dumps({"labels": classify.predict(texts).tolist(), "shares": classify.predict_proba(texts).tolist(),
                  "classes": classify.classes_.tolist(), "alone": [classify.predict([text])[0] for text in texts[:9]]}))
"""


def answers(folder: Path, texts: list[str]) -> dict:
    command = [sys.executable, "-c", ALONE, str(folder)]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_equal(run: qk.Run, folder: Path, texts: list[str]) -> float:
    """Check that a folder gives the run's label to every text; return the largest difference of a probability."""
    expected, found = run.predict(texts), answers(folder, texts)
    assert found["labels"] == expected.labels and found["alone"] == expected.labels[:9]
    assert found["classes"] == sorted(run.label_names)
    columns = [run.label_names.index(name) for name in found["classes"]]
    return float(np.abs(np.array(found["shares"]) - expected.probabilities[:, columns]).max())


@pytest.fixture
def trained(topics, tiny_experiment, tmp_path):
    """Return a function that trains one of the cases."""

    def make(case: str, data=topics, **changes) -> qk.Run:
        name, case_changes = CASES[case]
        experiment = tiny_experiment(name, **case_changes, **changes)
        return qk.finetune(experiment, data=data, out=tmp_path / "runs", progress=False)

    return make


# Tracing a model takes seconds: the quick tests trace one.
@pytest.mark.parametrize(
    "case", [next(iter(CASES)), *(pytest.param(c, marks=pytest.mark.long) for c in list(CASES)[1:])]
)
def test_what_leaves_gives_the_runs_labels_where_there_is_no_kit(case, trained, topics, tmp_path):
    run = trained(case)
    folder = tmp_path / "served"
    made = run.export("onnx", folder, progress=False)
    assert made == read_json(folder / "export.json") and not schemas.problems(made, "export.json")
    assert made["weights"] == "as_trained" and made["equal_rows"] == made["rows"] == len(topics.test)
    texts = [*topics.test.texts, *topics.train.texts[:40], "top up " * 200, "card", "é ü ß 卡"]
    assert check_equal(run, folder, texts) < 1e-4
    modes = {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    (tmp_path / "new").touch()
    assert modes == {stat.S_IMODE((tmp_path / "new").stat().st_mode)}
    assert not [item for item in tmp_path.iterdir() if item.name.startswith(".export")]
    said = (folder / "model.onnx").read_bytes()
    assert str(qk.__path__[0]).encode() not in said and b"site-packages" not in said, "paths of this machine"


@pytest.mark.long
def test_the_frozen_weights_stay_in_four_bits_and_the_adapters_beside_them(trained, tmp_path):
    from onnx import numpy_helper

    run = trained("bert nf4 cosine")
    run.export("onnx", tmp_path / "served", progress=False)
    graph = onnx.load(tmp_path / "served" / "model.onnx").graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    trained_model = run.load()[0].get_base_model()
    layer = trained_model.base.encoder.layer[0].attention.self.query
    name = "model.base.encoder.layer.0.attention.self.query.weight"
    assert name not in constants  # it is made when the file is opened
    np.testing.assert_array_equal(constants[f"{name}.codes"], layer.base_layer.weight.flatten().numpy())
    np.testing.assert_array_equal(constants[f"{name}.lora_A"], layer.lora_A["default"].weight.detach().numpy())
    np.testing.assert_array_equal(constants[f"{name}.lora_B"], layer.lora_B["default"].weight.detach().numpy())


@pytest.mark.long
def test_in_32_bits_and_in_8_and_what_is_asked_for(trained, topics, tmp_path):
    from qlora_kit.export.onnx.proof import opened

    run = trained("bert nf4 cosine")
    sizes = {}
    for name, weights, embeddings in (("a", "as_trained", "int8"), ("b", "fp32", "fp32"), ("c", "int8", "int8")):
        made = run.export(
            "onnx", tmp_path / name, weights=weights, embeddings=embeddings, least_equal=0.9, progress=False
        )
        sizes[name] = made["bytes"]
        assert made["embeddings"] == embeddings and made["equal_rows"] >= 0.9 * made["rows"]
        assert made["bytes"] == sum(
            file.stat().st_size for file in (tmp_path / name).iterdir() if file.name not in ("README.md", "export.json")
        )
    assert sizes["b"] > 1.5 * sizes["a"]
    # Inputs that are rounded together would make a text's probabilities depend on those beside it.
    in_8_bits, some = opened(tmp_path / "c"), list(topics.test.texts[:12])
    alone = np.concatenate([in_8_bits.predict_proba([text]) for text in some])
    np.testing.assert_array_equal(in_8_bits.predict_proba(some), alone)
    assert check_equal(run, tmp_path / "b", list(topics.test.texts)) < 1e-4
    readme = (tmp_path / "b" / "README.md").read_text()
    assert f"{made['rows']} of {made['rows']} (test)" in readme
    _, issues = schemas.check([tmp_path / "a"])
    assert not issues
    with pytest.raises(qk.KitError, match="in the run's own folder"):
        run.export("onnx", run.path / "served", progress=False)
    with pytest.raises(qk.KitError, match="nothing is overwritten"):
        run.export("onnx", tmp_path / "a", progress=False)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"runtime": "onx"}, "there is no runtime 'onx'. Did you mean 'onnx'?"),
        ({"weights": "fp16"}, "there is no way to store weights 'fp16'. Did you mean 'fp32'?"),
        ({"embeddings": "int4"}, "there is no way to store embeddings 'int4'. Did you mean 'int8'?"),
        ({"least_equal": 1.5}, "takes a number from 0 to 1 as least_equal"),
    ],
)
def test_what_cannot_be_asked_for(given, words, trained, tmp_path):
    run = trained("bert nf4 cosine", training__max_steps=1)
    with pytest.raises(qk.KitError, match=re.escape(words)):
        run.export(**{"runtime": "onnx", "to": tmp_path / "served", **given})
    assert not (tmp_path / "served").exists()


@pytest.mark.long
def test_what_gives_other_labels_is_not_handed_out(trained, tmp_path, monkeypatch):
    run = trained("bert nf4 cosine")
    right = type(run).predict

    def wrong(self, texts, **more):
        predictions = right(self, texts, **more)
        predictions.label_ids[:3] = (predictions.label_ids[:3] + 1) % len(self.label_names)
        return predictions

    monkeypatch.setattr(type(run), "predict", wrong)
    rows = run.training["rows"]["test"]
    words = f"nothing was written: {rows - 3} of {rows} test rows .* least_equal=0\\.9\\d* allows it"
    with pytest.raises(qk.KitError, match=words) as caught:
        run.export("onnx", tmp_path / "served", progress=False)
    assert [item.name for item in tmp_path.iterdir()] == ["runs"]
    allowed = float(re.findall(r"least_equal=([\d.]+) allows", str(caught.value))[0])
    assert run.export("onnx", tmp_path / "served", least_equal=allowed, progress=False)["equal_rows"] == rows - 3


def test_a_scheme_that_rounds_inputs_is_refused(topics, tiny_experiment, tmp_path):
    experiment = tiny_experiment("bert", quantization__scheme="int8", training__max_steps=1)
    run = qk.finetune(experiment, data=topics, out=tmp_path / "runs", progress=False)
    with pytest.raises(qk.KitError, match=r"int8, which rounds each layer's input.*exported: none, nf4, fp4, int4"):
        run.export("onnx", tmp_path / "served", progress=False)
    assert not (tmp_path / "served").exists()


def test_without_the_packages_the_message_says_what_to_install(trained, tmp_path, monkeypatch):
    run = trained("bert nf4 cosine", training__max_steps=1)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(qk.KitError, match=r'needs onnxscript, .*pip install "qlora_kit\[export\]"'):
        run.export("onnx", tmp_path / "served", progress=False)


HOSTILE = ["</table><script>alert(1)</script>", "`|`\x1b[31m|", "=1+1", "名前", 'a "quoted"\nname', "z" * 300]


@pytest.mark.long
def test_an_estimator_of_scikit_learn_with_any_labels(topics, trained, tmp_path):
    import pickle

    from sklearn.base import clone
    from sklearn.frozen import FrozenEstimator
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer

    from qlora_kit.export.onnx.proof import opened

    rows = [
        {"text": text, "label": HOSTILE[label]}
        for split in (topics.train, topics.validation, topics.test)
        for text, label in zip(split.texts, split.labels, strict=True)
    ]
    data = qk.text_classification(rows, test=0.2, validation=0.2)
    run = trained("bert nf4 cosine", data=data)
    folder = tmp_path / "served"
    run.export("onnx", folder, progress=False)
    readme = (folder / "README.md").read_text()
    assert "script" not in readme and "\x1b" not in readme
    assert json.loads((folder / "labels.json").read_text()) == run.label_names
    texts = list(data.test.texts)
    labels = run.predict(texts).labels
    classify = opened(folder)
    lower = FunctionTransformer(lambda given: [text.lower() for text in given])
    piped = make_pipeline(lower, FrozenEstimator(classify)).fit(texts, labels)
    assert piped.predict(texts).tolist() == run.predict([text.lower() for text in texts]).labels
    again = clone(classify)
    assert again is not classify and again.predict(np.array(texts, dtype=object)).tolist() == labels
    assert sorted(classify.classes_) == classify.classes_.tolist()
    assert (classify.classes_[classify.predict_proba(texts).argmax(axis=1)] == labels).all()
    assert classify.score(texts, labels) == 1.0
    assert classify.predict([]).tolist() == [] and classify.predict_proba([]).shape == (0, len(run.label_names))
    assert "_session" not in classify.__getstate__() and pickle.dumps(again.__getstate__())
    with pytest.raises(NotImplementedError, match="FrozenEstimator"):
        classify.fit(texts, labels)
    for bad, words in (
        ("a text", "a list of texts is needed"),
        ({"a": 1}, "a list of texts is needed"),
        (["a text", ""], "text 1 is '': allowed are texts with"),
        ([" \u200b"], "text 0"),
        ([None], "text 0 is None"),
        (["\ud800 a"], "no valid Unicode"),
        (np.array([["a", "b"]]), "one column"),
    ):
        with pytest.raises(ValueError, match=words):
            classify.predict(bad)


@pytest.mark.long
def test_a_text_that_is_too_long_is_refused_where_the_run_refuses_it(topics, trained, tmp_path):
    from qlora_kit.export.onnx.proof import opened

    run = trained("bert nf4 cosine", data__too_long="refuse")
    run.export("onnx", tmp_path / "served", progress=False)
    with pytest.raises(ValueError, match=r"text 1 .* has more than 128 tokens"):
        opened(tmp_path / "served").predict(["a text", "top up " * 200])


@pytest.mark.long
def test_a_terminal_exports(trained, tmp_path, capsys):
    run = trained("bert nf4 cosine")
    assert main(["export", str(run.path), str(tmp_path / "served"), "--embeddings", "int8", "--quiet"]) == 0
    rows = run.training["rows"]["test"]
    said = capsys.readouterr().out
    assert said.startswith(f"{rows} of {rows} test rows get the run's label; ") and said.endswith(
        f"{tmp_path}/served\n"
    )
    assert main(["export", str(run.path), str(tmp_path / "x"), "--least-equal", "99"]) == 2
    assert "--least-equal is 99.0: allowed is 0 to 1" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize(("weights", "embeddings"), [("as_trained", "fp32"), ("fp32", "fp32")])
def test_minilm_gives_every_test_row_the_runs_label(weights, embeddings, tmp_path):
    experiment = qk.preset("minilm_banking77_qlora").override({"training.max_steps": 120, "tracking.wandb": "none"})
    run = qk.finetune(experiment, out=tmp_path / "runs", progress=False)
    made = run.export("onnx", tmp_path / "served", weights=weights, embeddings=embeddings, progress=False)
    assert made["equal_rows"] == made["rows"] == 3080
    assert check_equal(run, tmp_path / "served", list(qk.banking77().test.texts)) < 1e-4
