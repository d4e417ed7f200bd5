"""What a T4 runs, on a larger GPU: fp16, 15 GiB, no flash attention, no kernels of Triton's. `pytest -m gpu`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

import qlora_kit as qk

pytestmark = pytest.mark.gpu


def imitated(folder: str) -> dict[str, Any]:
    """Fine-tune DialoGPT's shape as a T4 would, as graphs and eagerly; merge and predict."""
    import t4
    import torch
    import transformers

    from qlora_kit import models
    from qlora_kit.quantization.int4 import triton_kernel

    t4.imitate()
    assert triton_kernel() is None and not torch.backends.cuda.flash_sdp_enabled()
    base = Path(folder) / "base"
    shutil.copytree(models.SHAPES / "dialogpt-medium", base)
    config = transformers.AutoConfig.from_pretrained(base, n_layer=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    experiment = qk.preset("dialogpt-medium_banking77_qlora").override(
        {
            "model.name": str(base),
            "model.dropout": 0.0,
            "lora.dropout": 0.0,
            "training.precision": "fp16",
            "training.max_steps": 60,
            "training.logging_steps": 1,
            "data.limit": 600,
            "tracking.wandb": "none",
        }
    )
    runs = {
        graphs: qk.finetune(experiment.override({"training.graphs": graphs}), out=Path(folder) / graphs, progress=False)
        for graphs in ("auto", "none")
    }
    texts = list(qk.banking77().test.texts[:100])
    run = runs["auto"]
    merged = run.merge(Path(folder) / "merged", dtype="fp16", progress=False)
    return {
        "captured": run.training["graphs"]["captured"],
        "problem": run.training["graphs"]["problem"],
        "precision": run.training["precision"],
        "losses": {graphs: [entry["loss"] for entry in each.training["losses"]] for graphs, each in runs.items()},
        "logits": [run.predict(texts).logits.tolist() for _ in range(3)],  # eagerly, captured, replayed
        "peak": run.training["memory"]["peak_bytes"],
        "same_label": merged["validation"]["same_label"],
        "device": str(models.default_device()),
    }


def test_steps_predictions_and_merging_without_triton_and_flash_attention(tmp_path: Path):
    # In a process of its own: what is imitated holds for a whole process.
    code = "import json, sys, test_t4_gpu as t; print(json.dumps(t.imitated(sys.argv[1])))"
    paths = [str(Path(__file__).parent), str(ROOT / "benchmarks"), str(ROOT), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["captured"] > 4 and seen["problem"] is None and seen["precision"] == "fp16"
    assert np.allclose(seen["losses"]["auto"], seen["losses"]["none"], rtol=2e-3)
    eager, captured, replayed = (np.array(logits) for logits in seen["logits"])
    assert np.allclose(captured, eager, atol=1e-2) and np.array_equal(captured, replayed)
    # Of random weights, whose 4 bits and 16 bits tell 77 labels apart in much the same way.
    assert seen["same_label"] > 0.5 and seen["peak"] < 15 * 2**30
