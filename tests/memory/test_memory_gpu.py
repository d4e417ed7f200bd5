"""Memory on a real GPU: the plan against the allocator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import qlora_kit as qk
from qlora_kit import memory
from qlora_kit.memory.allocator import Allocator

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
    assert plan.total == pytest.approx(measured.total, rel=0.05)


# Shapes that nothing was tuned on.
OTHERS = {
    "qwen2-0.5b": ("Qwen2Config", {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
                                   "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936,
                                   "tie_word_embeddings": True}),
    "opt-350m": ("OPTConfig", {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                               "ffn_dim": 4096, "vocab_size": 50272, "word_embed_proj_dim": 512,
                               "do_layer_norm_before": False}),
    "pythia-410m": ("GPTNeoXConfig", {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                                      "intermediate_size": 4096, "vocab_size": 50304}),
}  # fmt: skip


def planned_and_measured(folder: str, checkpointing: bool) -> list[int]:
    """Return the bytes of a step of 8 x 128: allocated and reserved, planned and then measured."""
    experiment = qk.Experiment("shape", qk.ModelSpec(folder, random_weights=True)).override(
        {"tracking.wandb": "none", "training.gradient_checkpointing": checkpointing, "training.graphs": "none"}
    )
    plan = memory.plan(experiment, batch=8, length=128)
    measured = memory.measure(experiment, batch=8, length=128, parts=False)
    return [plan.total, plan.reserved, measured.total, measured.reserved]


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_reserved_is_planned_within_10_percent(name: str, checkpointing: bool, tmp_path: Path):
    kind, values = OTHERS[name]
    getattr(transformers, kind)(**values).save_pretrained(tmp_path)
    total, reserved, allocated, held = alone(f"planned_and_measured({str(tmp_path)!r}, {checkpointing})")
    assert total == pytest.approx(allocated, rel=0.02)
    assert reserved == pytest.approx(held, rel=0.1)


def alone(call: str) -> list[int]:
    """Return what a function of this file does in a process of its own, where no earlier test has left segments."""
    code = f"import json, test_memory_gpu as t; print(json.dumps(t.{call}))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def allocate_and_free() -> list[int]:
    """Take and give back 2,000 pieces of memory, and return how much there was at most: torch's figures, then ours."""
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
    return [
        torch.cuda.max_memory_allocated(),
        torch.cuda.memory_reserved(),
        allocator.peak,
        allocator.reserved,
    ]


def test_the_allocator_counts_as_cudas_does():
    allocated, reserved, our_allocated, our_reserved = alone("allocate_and_free()")
    # Of two free pieces of one size the lower address is taken, and addresses are the driver's: which pieces are in use
    # may differ, and with them what is not split off, of less than 1 MiB each.
    assert allocated == pytest.approx(our_allocated, rel=0.05)
    assert reserved == pytest.approx(our_reserved, rel=0.1)
