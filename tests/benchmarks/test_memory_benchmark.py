"""benchmarks/memory.py: its cells, and the one that trains as a user does, on the CPU."""

from __future__ import annotations

import dataclasses
import sys

import pytest
from conftest import ROOT

from qlora_kit.config.preset import preset

sys.path.insert(0, str(ROOT / "benchmarks"))
import memory as benchmark


def test_what_only_the_benchmark_sets_has_a_twin_without_it():
    cells = benchmark.cells()
    assert len({cell.name for cell in cells}) == len(cells)
    asking = [cell for cell in cells if cell.environment]
    assert {name for cell in asking for name, _ in cell.environment} == {"CUBLAS_WORKSPACE_CONFIG"}
    for cell in asking:
        assert "by this benchmark alone" in cell.note
        plain = dataclasses.replace(cell, environment=())
        assert any(dataclasses.replace(other, name=cell.name, note=cell.note) == plain for other in cells), cell.name


def test_the_shipped_preset_is_measured_as_it_is():
    (cell,) = (cell for cell in benchmark.cells() if cell.whole)
    shipped = preset("dialogpt-medium_banking77_qlora")
    assert cell.group == "recipe" and cell.alone and not cell.environment
    changes = {"model.name": "shape:dialogpt-medium", "model.random_weights": True}
    steps = {"training.max_steps": cell.steps, "tracking.wandb": "none"}
    assert cell.experiment == shipped.override({**changes, **steps})
    assert (cell.batch, cell.experiment.training.graphs) == (8, shipped.training.graphs)
    assert not cell.experiment.training.gradient_checkpointing


@pytest.mark.long
def test_training_as_a_user_does_says_what_it_took():
    smoke = preset("minilm_banking77_smoke").override(
        {"model.layers": 1, "data.limit": 80, "training.max_steps": 2, "tracking.wandb": "none"}
    )
    width = benchmark.widest(smoke)
    measured, graphs = benchmark.trained(smoke, width)
    assert measured.total > 0 and measured.reserved == measured.total  # the resident set, without a GPU
    assert graphs is False
    assert measured.batch == smoke.training.batch_size
    assert 20 < width == measured.length < smoke.data.max_length
    assert measured.step_seconds is None and measured.parameters[0] > 0
