"""Misuse as a library: an argument of another kind is refused in one line that names the call that is meant."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest

import qlora_kit as qk
from qlora_kit import claims, evaluation, export, memory, models, notebooks, quantization
from qlora_kit import data as kit_data
from qlora_kit.config.sections import DataSpec, LoraSpec, ModelSpec, TrackingSpec, TrainingSpec
from qlora_kit.errors import described
from qlora_kit.models import parts
from qlora_kit.system.parsing import read_json

FRAME = pd.DataFrame({"text": ["a b", "c d"], "label": ["x", "y"]})
NEVER = (
    b"x",
    2.5,
    FRAME,
    datasets.Dataset.from_pandas(FRAME),
    object(),
    print,
    qk.Experiment,
    np.zeros(3),
    {1: 2},
    [7],
)


@pytest.fixture(scope="module")
def experiment() -> qk.Experiment:
    return qk.preset("minilm_banking77_smoke")


def refused(call) -> str:
    """Return the one line of the KitError that a call raises."""
    with pytest.raises(qk.KitError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_call_that_is_meant_is_named(experiment):
    name = "minilm_banking77_smoke"
    for call, expected in {
        lambda: qk.finetune(name): f"finetune takes an Experiment as experiment, not the str {name!r}: "
        f"write finetune(preset({name!r}))",
        lambda: qk.finetune(Path("mine.yaml")): "write finetune(preset('mine.yaml'))",
        lambda: qk.finetune(experiment.to_dict()): "not a dict: write finetune(Experiment.from_dict(values))",
        lambda: qk.finetune(None): "not None: write finetune(preset('minilm_banking77_qlora'))",
        lambda: qk.finetune(qk.Experiment): "not the class Experiment",
        lambda: qk.finetune(experiment, data=FRAME): "finetune takes a TextData as data, not a DataFrame: write "
        "finetune(..., data=text_classification(rows))",
        lambda: qk.finetune(experiment, data="rows.csv"): "write finetune(..., data=text_classification('rows.csv'))",
        lambda: qk.finetune(experiment, data=experiment.data): "write finetune(..., data=data.load(spec))",
        lambda: qk.finetune(experiment, out=None): "finetune takes a path as out, not None",
        lambda: qk.finetune(experiment, name=5): "finetune takes a text as name, not the int 5",
        lambda: qk.finetune(experiment, resume="no"): "takes True or False as resume, not the str 'no'",
        lambda: qk.finetune(experiment, callbacks=[qk.training.EpochLines]): "callbacks=[EpochLines()]",
        lambda: qk.finetune(experiment, callbacks=qk.training.EpochLines()): "callbacks=[EpochLines()]",
        lambda: qk.inventory.take(5, 6): "inventory.take takes a torch model as model, not the int 5",
        lambda: qk.quantization.perplexity(5): "quantization.perplexity takes a torch tensor as losses, not the int 5",
        lambda: qk.search(name): f"write search(preset({name!r}))",
        lambda: qk.search(experiment, [("lora.r", 8)]): "search takes a mapping of names as space, not a list",
        lambda: qk.search(experiment, trials="10"): "search takes a whole number as trials, not the str '10'",
        lambda: qk.evaluate(experiment): "evaluate takes a Run or its folder as run, not an Experiment: write "
        "evaluate(finetune(experiment))",
        lambda: qk.load_run(None): "load_run takes a path as folder, not None: write load_run('runs/NAME')",
        lambda: qk.load_run("a\0b"): "load_run takes a path as folder, not the str 'a\\x00b'",
        lambda: qk.Run(3): "Run takes a path as path, not the int 3",
        lambda: memory.plan(name): f"memory.plan takes an Experiment as experiment, not the str {name!r}: write "
        f"memory.plan(preset({name!r}))",
        lambda: memory.plan(experiment, batch=2.5): "memory.plan takes a whole number as batch, not the float 2.5",
        lambda: memory.plan(experiment, batch=10**30): "is beyond any GPU: allowed are 16,777,216 tokens a step",
        lambda: memory.fits(3): "memory.fits takes an Experiment or a model's name as model, not the int 3",
        lambda: export.merge("runs/x", "y"): "export.merge takes a Run as run",
        lambda: models.load_tokenizer(experiment): "write models.load_tokenizer(experiment.model)",
        lambda: kit_data.load("rows.csv"): "data.load takes a DataSpec as spec",
        lambda: experiment.override("training.epochs=2"): "Experiment.override takes a mapping of names as changes",
        lambda: notebooks.choose_experiment(experiment): "takes a preset's name or the path of a YAML file as preset",
    }.items():
        assert expected in refused(call)


def test_what_is_left_to_its_default_may_be_none(experiment):
    assert memory.plan(experiment, batch=None, length=8, device="cpu").batch == experiment.training.batch_size
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'experiment'"):
        qk.finetune()


def test_merge_and_push_refuse_before_any_work(trained):
    assert "Run.merge takes a path as to, not the int 123: write Run.merge('merged')" in refused(
        lambda: trained.merge(123)
    )
    assert "Run.push_to_hub takes a text as repo, not None" in refused(lambda: trained.push_to_hub(None))
    assert "takes True or False as private" in refused(lambda: trained.push_to_hub("me/mine", private="yes"))
    assert "takes a TextData as data" in refused(lambda: qk.evaluate(trained, data=FRAME))
    assert "a whole number of 1 or more as batch_size" in refused(lambda: qk.evaluate(trained, batch_size=0))
    assert "evaluate takes" in refused(lambda: qk.evaluate(trained, resamples=0))
    assert "finetune takes" in refused(lambda: qk.finetune(trained)) and "run.experiment" in refused(
        lambda: qk.finetune(trained)
    )
    assert not (trained.path / "evaluation.json").exists()


@pytest.fixture(scope="module")
def trained(topics, tiny, tmp_path_factory):
    spec = TrainingSpec(max_steps=1, batch_size=8, precision="fp32", threads=1)
    tracking = TrackingSpec(wandb="none")
    experiment = qk.Experiment("tiny", ModelSpec(str(tiny("bert"))), training=spec, tracking=tracking)
    return qk.finetune(experiment, data=topics, out=tmp_path_factory.mktemp("runs"), progress=False)


def test_predict_takes_whole_numbers_and_names(trained):
    for given in ({"batch_size": 0}, {"batch_size": "8"}):
        assert "Run.predict takes a whole number of 1 or more" in refused(lambda g=given: trained.predict(["a"], **g))
    assert "Run.predict takes a text as progress" in refused(lambda: trained.predict(["a"], progress=True))
    with pytest.raises(TypeError, match=r"^Run\.predict\(\) missing 1 required positional argument: 'texts'"):
        trained.predict()


def test_no_public_call_fails_with_anything_but_one_line(experiment):
    calls = [
        qk.finetune, qk.search, qk.evaluate, qk.load_run, qk.Run, qk.Search, qk.newest_run, qk.zip_results,
        qk.download_results, qk.preset, qk.resolve_preset, qk.Experiment.from_yaml, qk.Experiment.from_dict,
        experiment.override, memory.plan, memory.fits, memory.measure, memory.of_model, memory.with_method,
        memory.find_device, memory.same_shape, lambda value: memory.plan(experiment, device=value),
        lambda value: memory.plan(experiment, length=value), lambda value: list(memory.compare(value, {})),
        lambda value: memory.crossing(device=value), lambda value: qk.finetune(experiment, callbacks=[value]),
        lambda value: qk.finetune(experiment, data=value), lambda value: qk.search(experiment, space=value),
        lambda value: qk.search(experiment, storage=value), export.push, export.card, export.merge,
        kit_data.load, kit_data.load_saved, models.find_base, models.load_tokenizer, parts.of_experiment,
        quantization.bits_per_parameter, quantization.codebook, quantization.lloyd_max,
        lambda value: quantization.roundtrip(value, qk.Quantization()), notebooks.choose_experiment,
        notebooks.open_run, notebooks.run_notebooks, lambda value: notebooks.run_notebooks("auto", params=value),
        lambda value: notebooks.choose(value, {}), notebooks.split_params, notebooks.notebook_parameters,
        notebooks.list_notebooks, claims.read, claims.find_results, read_json,
        lambda value: evaluation.metrics(value, [0, 1]), lambda value: evaluation.metrics(np.eye(2), value),
        lambda value: evaluation.compute_metrics(value, [0, 1]),
        lambda value: qk.Experiment(value, experiment.model),
        lambda value: qk.Experiment("a", value),
        *(lambda value, name=name: dataclasses.replace(experiment, **{name: value}) for name in
          ("data", "quantization", "lora", "training", "tracking")),
    ]  # fmt: skip
    for place, call in enumerate(calls):
        for value in NEVER:
            try:
                call(value)
            except qk.KitError as error:
                assert "\n" not in str(error), (place, value)
            except TypeError as error:  # Python's own, of an argument that is missing
                assert "missing" in str(error), (place, value)
            else:
                raise AssertionError(f"call {place} takes {value!r}")


@pytest.mark.parametrize("kind", [ModelSpec, DataSpec, LoraSpec, TrainingSpec, TrackingSpec, qk.Quantization])
def test_no_field_of_a_section_takes_what_it_cannot_use(kind):
    given = {"name": "a"} if kind is ModelSpec else {}
    for field in dataclasses.fields(kind):
        for value in (b"x", FRAME, object(), print, qk.Experiment, np.zeros(3), {1: 2}, [7]):
            assert field.name in refused(lambda f=field, v=value: kind(**given | {f.name: v})).replace(" ", "_")


def test_classes_are_whole_numbers_and_are_not_rounded():
    assert "labels are numbers" in refused(lambda: evaluation.metrics(np.eye(2), [0.5, 1]))
    assert "predicted classes are numbers" in refused(lambda: evaluation.compute_metrics([0.7, 1], [0, 1]))
    assert evaluation.compute_metrics(np.array([0.0, 1.0]), [0, 1])["accuracy"] == 1.0


def test_a_value_is_described_in_a_few_words():
    assert described("x" * 100) == f"the str {repr('x' * 100)[:57]}..."
    assert described(FRAME) == "a DataFrame"
    assert described(datasets.Dataset.from_pandas(FRAME)) == "a Dataset"
    assert described(True) == "the bool True"
