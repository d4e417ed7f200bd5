"""Memory on a real GPU: the plan against the allocator."""

from __future__ import annotations

import pytest
import torch

import qlora_kit as qk
from qlora_kit import memory
from qlora_kit.tape import Allocator

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("method", "scheme"), [("qlora", "nf4"), ("lora", "none"), ("qlora", "int8")])
def test_planned_is_measured_within_5_percent(method: str, scheme: str, checkpointing: bool):
    experiment = memory.with_method(qk.preset("dialogpt-medium_banking77_recipe"), method, scheme).override(
        {
            "model.name": "shape:dialogpt-medium",
            "model.random_weights": True,
            "training.gradient_checkpointing": checkpointing,
            "training.prepare_for_kbit_training": False,
        }
    )
    plan = memory.plan(experiment, batch=8, length=128)
    measured = memory.measure(experiment, batch=8, length=128, steps=1)
    assert measured.fits
    # Earlier tests of this process have left cuBLAS workspaces and caches; they are part of both.
    assert plan.total == pytest.approx(measured.total, rel=0.05)


def test_the_allocator_counts_as_cudas_does():
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    allocator = Allocator()
    generator = torch.Generator().manual_seed(0)
    held: list = []
    for _ in range(2000):
        if held and torch.rand((), generator=generator) < 0.45:
            place = int(torch.randint(len(held), (), generator=generator))
            tensor, piece = held.pop(place)
            del tensor
            allocator.give_back(piece)
        else:
            size = int(2 ** (24 * torch.rand((), generator=generator).item()))
            held.append((torch.empty(size, dtype=torch.uint8, device="cuda"), allocator.take(size)))
    # Of two free pieces of one size the lower address is taken, and addresses are the driver's: which pieces are in use
    # may differ, and with them what is not split off, of less than 1 MiB each.
    assert torch.cuda.max_memory_allocated() - start == pytest.approx(allocator.peak, rel=0.05)
    assert torch.cuda.memory_reserved() - reserved == pytest.approx(allocator.reserved, rel=0.1)
