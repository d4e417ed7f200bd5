from __future__ import annotations

import inspect
import re
import subprocess
import sys

import numpy as np
import pytest
import transformers

import qlora_kit as qk
from qlora_kit.config.experiment import Experiment, field_names
from qlora_kit.config.quantization import Quantization
from qlora_kit.config.sections import DataSpec, LoraSpec, ModelSpec, TrackingSpec, TrainingSpec


def test_importing_the_kit_is_light():
    code = (
        "import sys, qlora_kit; qlora_kit.preset('minilm_banking77_qlora'); "
        "heavy = {'torch', 'transformers', 'peft', 'sklearn', 'pandas', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_yaml_round_trip():
    for name in qk.presets():
        experiment = qk.preset(name)
        assert Experiment.from_yaml(experiment.to_yaml()) == experiment


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.epoch": 1}, r"no field 'training.epoch'. Did you mean 'training.epochs'\?"),
        ({"trainin.epochs": 1}, r"Did you mean 'training.epochs'\?"),
        ({"training.padding": "bucket"}, r"'bucket'. Did you mean 'buckets'\? Allowed: buckets, longest, max_length"),
        ({"lora.r": "many"}, "lora.r is 'many': allowed is a whole number"),
        ({"lora.r": 0}, "lora.r is 0: allowed is 1 or more"),
        ({"lora.r": True}, "lora.r is True: allowed is a whole number"),
        ({"training.learning_rate": -1}, "learning_rate is -1.0: allowed is a finite number above 0"),
        ({"training.learning_rate": float("nan")}, "learning_rate is nan"),
        ({"quantization.scheme": "nf5"}, r"'nf5'. Did you mean 'nf4'\?"),
        ({"data.validation": 1.5}, "data.validation is 1.5"),
        ({"lora": None}, "full fine-tuning .* of nf4 weights is not possible"),
        (
            {"lora": None, "quantization.scheme": "none", "quantization.embeddings": "nf4"},
            "full fine-tuning .* with embeddings in nf4 is not possible",
        ),
        ({"lora.bias": "all", "quantization.scheme": "int8"}, "lora.bias: all cannot go with .*int8"),
        ({"name": "../../etc"}, "cannot be the name of the experiment"),
        ({"training.early_stopping": 2, "training.keep_best": False}, "early_stopping needs .*keep_best"),
    ],
)
def test_bad_values_are_refused_with_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        qk.preset("minilm_banking77_qlora").override(changes)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (ModelSpec, {"name": "x", "pooling": "men"}, r"no model.pooling called 'men'. Did you mean 'mean'\?"),
        (ModelSpec, {"name": "x", "head": "cosin"}, r"no model.head called 'cosin'. Did you mean 'cosine'\?"),
        (DataSpec, {"too_long": "cutt"}, r"no data.too_long called 'cutt'. Did you mean 'cut'\? Allowed: cut, refuse"),
        (LoraSpec, {"bias": "lora"}, r"no lora.bias called 'lora'. Did you mean 'lora_only'\?"),
        (TrainingSpec, {"padding": "bucket"}, r"no training.padding called 'bucket'. Did you mean 'buckets'\?"),
        (TrainingSpec, {"precision": "bf-16"}, r"no training.precision called 'bf-16'. Did you mean 'bf16'\?"),
        (TrainingSpec, {"optimizer": ["sgd"]}, r"no training.optimizer called \['sgd'\]"),
        (TrackingSpec, {"wandb": "off"}, r"no tracking.wandb called 'off'. Did you mean 'offline'\?"),
    ],
)
def test_a_section_made_in_python_is_checked_as_one_from_yaml_is(section, values, message):
    with pytest.raises(qk.KitError, match=message):
        section(**values)
    tree = Experiment(name="a", model=ModelSpec("x")).to_dict()
    tree[section.__name__.removesuffix("Spec").lower()] = values
    with pytest.raises(qk.KitError, match=message):
        Experiment.from_dict(tree)


def test_numbers_are_read_as_yaml_means_them():
    experiment = Experiment.from_yaml(
        "name: a\nmodel: {name: x}\ntraining:\n  learning_rate: 1e-3\n  epochs: 3\n  batch_size: 8.0\n"
    )
    assert experiment.training.learning_rate == 1e-3
    assert experiment.training.epochs == 3.0
    assert experiment.training.batch_size == 8


def test_yaml_runs_no_code(tmp_path):
    target = tmp_path / "touched"
    hostile = f"name: a\nmodel: !!python/object/apply:os.system ['touch {target}']\n"
    with pytest.raises(ValueError, match="no valid YAML"):
        Experiment.from_yaml(hostile)
    assert not target.exists()


def test_a_preset_that_does_not_exist_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'minilm_banking77_qlora'"):
        qk.preset("minilm_banking77_qlor")
    with pytest.raises(ValueError, match="there is no experiment file"):
        qk.preset("missing.yaml")


def test_presets_are_what_the_contracts_list():
    models = ("dialogpt-medium", "minilm", "smollm2-135m")
    wanted = {f"{model}_banking77_{method}" for model in models for method in ("recipe", "qlora", "lora", "full")}
    wanted |= {f"mpnet_banking77_{method}" for method in ("qlora", "lora", "full")}
    assert set(qk.presets()) == {*wanted, "minilm_banking77_smoke"}
    for name in qk.presets():
        assert qk.preset(name).name == name


@pytest.mark.parametrize("model", ["dialogpt-medium", "minilm", "mpnet", "smollm2-135m"])
def test_methods_differ_in_what_they_say_they_differ_in(model):
    qlora, lora, full = (qk.preset(f"{model}_banking77_{method}") for method in ("qlora", "lora", "full"))
    assert qlora.quantization == Quantization("nf4", True)
    assert lora.quantization.scheme == full.quantization.scheme == "none"
    assert full.lora is None
    assert (qlora.lora.r, qlora.lora.alpha) == (lora.lora.r, lora.lora.alpha) == (16, 32)
    assert qlora.lora.target_modules == lora.lora.target_modules
    assert qlora.data == lora.data == full.data
    assert qlora.model == lora.model == full.model
    # The same budget: passes over the data and rows a step.
    assert qlora.training.epochs == lora.training.epochs == full.training.epochs
    assert qlora.training.batch_size == lora.training.batch_size == full.training.batch_size


def test_the_recipe_is_the_explained_one_to_the_letter():
    recipe = qk.preset("dialogpt-medium_banking77_recipe")
    assert recipe.model.name == "microsoft/DialoGPT-medium"
    assert recipe.quantization == Quantization("nf4", True, 64)
    assert recipe.lora == LoraSpec(r=16, alpha=32, dropout=0.1, target_modules=("c_attn", "c_proj"), bias="none")
    training = recipe.training
    assert (training.batch_size, training.epochs, training.learning_rate) == (8, 4, 4.62e-4)
    assert (training.weight_decay, training.warmup_steps) == (0.0905, 389)
    assert (training.optimizer, training.precision) == ("paged_adamw_8bit", "fp16")
    assert training.gradient_checkpointing and training.padding == "max_length"
    assert recipe.data.max_length == 128


def test_presets_say_their_command_and_what_each_knob_costs(pytestconfig):
    for file in sorted((pytestconfig.rootpath / "qlora_kit" / "presets").glob("*.yaml")):
        text = file.read_text()
        header = text.split("\n\n")[0]
        assert f"python -m qlora_kit finetune {file.stem}" in header
        assert f"make run-notebooks PRESET={file.stem}" in header
        assert not re.search(r"\bTODO\b", text)


def test_a_figure_in_a_presets_comment_is_what_the_library_computes(pytestconfig):
    folder = pytestconfig.rootpath / "qlora_kit" / "presets"
    data = qk.banking77()
    texts = [text for rows in data.splits().values() for text in rows.texts]
    for model in ("minilm", "smollm2-135m"):
        spec = qk.preset(f"{model}_banking77_recipe").model
        lengths = qk.data.token_lengths(qk.models.load_tokenizer(spec), texts)
        files = list(folder.glob(f"{model}_*.yaml"))
        assert files
        for file in files:
            text = file.read_text()
            assert "_smoke" in file.name or f"the longest question has {max(lengths)} tokens" in text, file.name
            mean = f"where a question has {lengths.mean():.0f} on average"
            assert "on average" not in text or mean in text, file.name

    shape = qk.preset("dialogpt-medium_banking77_recipe").override({"model.name": "shape:dialogpt-medium"})
    recipe, halves = (
        {name: size / 2**20 for name, size in qk.memory.plan(changed, batch=1, length=16, device="T4").parts.items()}
        for changed in (shape, shape.override({"training.prepare_for_kbit_training": False}))
    )
    kept = ("base, embeddings", "base, norms and biases")
    words = (
        f"embeddings and norms to fp32: {sum(recipe[name] for name in kept):.0f} MiB of the "
        f"{sum(recipe.get(name, 0) for name in qk.memory.WEIGHTS):.0f} that the base then takes, where 16 bits would "
        f"be {sum(halves[name] for name in kept):.0f}"
    )
    assert words in (folder / "dialogpt-medium_banking77_recipe.yaml").read_text()


def test_optimizers_and_schedules_are_names_that_transformers_has():
    known = {item.value for item in transformers.training_args.OptimizerNames}
    schedules = {item.value for item in transformers.SchedulerType}
    hints = inspect.get_annotations(TrainingSpec, eval_str=True)
    assert set(hints["optimizer"].__args__) <= known
    assert set(hints["schedule"].__args__) <= schedules


def test_auto_takes_the_embedded_model_without_a_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    name, why = qk.resolve_preset("auto")
    assert name == "minilm_banking77_qlora"
    assert "no CUDA GPU" in why


def test_every_field_can_be_overridden_by_its_name():
    experiment = Experiment(name="a", model=ModelSpec("x"))
    for name in field_names():
        node = experiment
        for part in name.split("."):
            node = getattr(node, part)
        assert experiment.override({name: node}) == experiment


HUGE = {
    "training.seed": (2**32, -1, 1.5),
    "training.batch_size": (1e30, 10**9, 0),
    "training.eval_batch_size": (2**40,),
    "training.gradient_accumulation": (10**9,),
    "training.max_steps": (10**18,),
    "training.epochs": (1e18, 0, float("nan"), float("inf")),
    "training.learning_rate": (1e300, 0.0, -0.0, float("inf"), 10**400),
    "training.head_learning_rate": (1e300,),
    "training.weight_decay": (1e300, float("nan")),
    "training.max_grad_norm": (1e300, float("inf")),
    "training.warmup_ratio": (float("nan"), 1.01),
    "training.label_smoothing": (float("nan"), 0.96),
    "training.warmup_steps": (10**12,),
    "training.threads": (10**9,),
    "training.workers": (10**9,),
    "lora.r": (10**9, 0),
    "lora.alpha": (float("nan"), float("inf"), 0, 1e300),
    "lora.dropout": (float("nan"), 1.0),
    "data.max_length": (10**12, 1),
    "data.limit": (10**12,),
    "data.split_seed": (2**32,),
    "data.validation": (float("nan"), 0.0),
    "data.test": (float("nan"), 7),
    "model.layers": (10**9,),
    "model.dropout": (float("nan"),),
    "quantization.block_size": (10**12, 64.5, float("nan")),
}


@pytest.mark.parametrize(("name", "values"), HUGE.items(), ids=HUGE)
def test_numbers_at_the_edge_are_refused_by_name(name, values):
    experiment = qk.preset("minilm_banking77_qlora")
    for value in values:
        with pytest.raises(qk.KitError, match=name.rpartition(".")[2].replace("_", "[_ ]")) as caught:
            experiment.override({name: value})
        assert "llowed" in str(caught.value) and len(str(caught.value)) < 300


def test_numbers_just_inside_the_edge_are_taken():
    inside = {"training.seed": 2**32 - 1, "data.split_seed": 2**32 - 1, "lora.r": 65536, "training.learning_rate": 1e30}
    changed = qk.preset("minilm_banking77_qlora").override({**inside, "training.weight_decay": -0.0})
    assert changed.training.seed == 2**32 - 1 and str(changed.training.weight_decay) == "0.0"


def test_numbers_of_numpy_are_numbers():
    values = {"lora.r": np.int64(4), "lora.alpha": np.float32(0.5), "training.learning_rate": np.float64(1e-3)}
    changed = qk.preset("minilm_banking77_qlora").override({**values, "training.batch_size": np.float64(8)})
    spec = changed.training
    assert (changed.lora.r, changed.lora.alpha, spec.learning_rate, spec.batch_size) == (4, 0.5, 1e-3, 8)
    assert {type(value) for value in (changed.lora.alpha, spec.learning_rate)} == {float}
    assert {type(value) for value in (changed.lora.r, spec.batch_size)} == {int}
    for value in (np.float64("nan"), np.float32("inf"), np.bool_(True), 10**400):
        with pytest.raises(qk.KitError, match=r"lora\.alpha is .*: allowed is a finite number"):
            changed.override({"lora.alpha": value})


@pytest.mark.parametrize(
    "make",
    [
        lambda: ModelSpec(name=3),
        lambda: ModelSpec(name="a\0b"),
        lambda: ModelSpec(name="x" * 300),
        lambda: ModelSpec(name="\ud800"),
        lambda: DataSpec(name="a\nb"),
        lambda: DataSpec(max_length="128"),
        lambda: LoraSpec(r="8"),
        lambda: LoraSpec(target_modules=[1]),
        lambda: TrainingSpec(batch_size="8"),
        lambda: TrainingSpec(seed=None),
        lambda: TrackingSpec(project="a/b"),
        lambda: TrackingSpec(project=""),
        lambda: Experiment(name="a", model="microsoft/DialoGPT-medium"),
        lambda: Experiment(name="a", model=ModelSpec("x"), training={"epochs": 1}),
        lambda: Experiment.from_dict([]),
        lambda: Experiment.from_dict({"name": "a", "model": 3}),
        lambda: Experiment.from_yaml("x" * 300),
        lambda: qk.preset("minilm_banking77_qlora").override("training.epochs=2"),
    ],
)
def test_values_of_another_type_are_refused_in_one_line(make):
    with pytest.raises(qk.KitError) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_part_of_a_section_changes_that_part_alone():
    whole = qk.preset("minilm_banking77_qlora")
    assert whole.override({"training": {"epochs": 3}}) == whole.override({"training.epochs": 3})
    assert whole.override({"lora": {"r": 4}, "data": {"limit": 90}}) == whole.override({"lora.r": 4, "data.limit": 90})
    assert whole.override({"lora": LoraSpec(r=4)}).lora == LoraSpec(r=4)
    full = whole.override({"lora": None, "quantization": {"scheme": "none"}})
    assert full.lora is None and full.override({"lora": {"r": 4}}).lora == LoraSpec(r=4)
    for changes, says in (
        ({"training": {"epochs": 3}, "training.epochs": 3}, "training.epochs is given twice"),
        ({"lora.r": 4, "lora": None}, "lora.r is given, and lora as a whole"),
        ({"training": {"epoch": 3}}, r"no field 'training.epoch'. Did you mean 'training.epochs'\?"),
        ({"training": 3}, "training is 3: allowed is a section"),
        ({3: 4}, "no field '3'"),
    ):
        with pytest.raises(qk.KitError, match=says):
            whole.override(changes)
    with pytest.raises(qk.KitError, match=r"lora.r cannot be set where lora is null"):
        full.override({"lora.r": 4})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("training.class_weight", "the kit's loss weighs every row alike"),
        ("training.bf16", "set training.precision to bf16"),
        ("training.max_length", r"Did you mean 'data.max_length'\?"),
        ("epochs", r"Did you mean 'training.epochs'\?"),
        ("training.lr", "Allowed: "),
    ],
)
def test_a_wish_that_the_kit_has_no_field_for_is_told_plainly(name, says):
    with pytest.raises(qk.KitError, match=f"there is no field '{name}'.*{says}") as caught:
        qk.preset("minilm_banking77_qlora").override({name: 1})
    assert "weight_decay'?" not in str(caught.value) and "mean 'training'?" not in str(caught.value)
