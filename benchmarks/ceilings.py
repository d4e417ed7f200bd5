"""Compute the speed limit of a training step on a device: the `limit` of results/speed.json.

The limit is the step's minimal work divided by the device's measured rates. Work is counted only for real tokens: the
operations of the step's matrix products, and the bytes of frozen weights (read twice) and of trained weights, gradients
and AdamW's state. The rates are measured with a large matrix product and a copy.
"""

from __future__ import annotations

import re
import time
from typing import Any

from contenders import experiment_of


def limit(model: str, method: str, precision: str, batch: int) -> dict[str, Any]:
    """Count a step's operations and bytes, and divide them by this device's measured rates."""
    import numpy as np
    import torch

    from qlora_kit import data, models, quantization
    from qlora_kit.system.environment import environment  # isort: skip  # first: it imports bitsandbytes with care
    from transformers import PreTrainedModel

    experiment = experiment_of(model, method, precision, batch, True)
    device = models.default_device()
    text = data.banking77()
    tokenizer = models.load_tokenizer(experiment.model)
    length = max(1, round(float(np.mean(data.token_lengths(tokenizer, text.train.texts)))))
    built = models.build(experiment, text.label_names, device=device, pad_token_id=tokenizer.pad_token_id)
    for module in built.modules():
        if isinstance(module, PreTrainedModel):  # torch cannot count fused attention with fewer keys than queries
            module.set_attn_implementation("eager")
    ids = torch.ones((batch, length), dtype=torch.long, device=device)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    with operations() as counter, models.computing(device, precision):
        loss = built(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
    trained = sum(p.numel() * p.element_size() for p in built.parameters() if p.requires_grad)
    stored = quantization.storage(built).linear_bytes
    # Frozen weights are read in the forward and the backward pass. For a trained weight, the value, the gradient and
    # two moments are each read and written once.
    moved = 2 * stored + 2 * 4 * trained
    ceilings = {"flops_per_second": matmul_ceiling(device, precision), "bytes_per_second": copy_ceiling(device)}
    flops = counter.total
    seconds = max(flops / ceilings["flops_per_second"], moved / ceilings["bytes_per_second"])
    return {
        "model": model,
        "method": method,
        "precision": precision,
        "batch": batch,
        "length": length,
        "flops": flops,
        "bytes": moved,
        **ceilings,
        "seconds": seconds,
        "samples_per_second": batch / seconds,
        "device": environment(device)["device"],
    }


def operations() -> Any:
    """Return a context that counts the operations of all matrix products in its `total`.

    torch's `FlopCounterMode` silently skips in-place products (`addmm_`). Here they are counted too, and a product
    without a formula is an error.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Operations(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            out = func(*args, **kwargs)
            name = func.overloadpacket.__name__
            known = flop_registry.get(func.overloadpacket) or flop_registry.get(
                getattr(torch.ops.aten, name.rstrip("_"), None)
            )
            if known is not None:
                self.total += known(*args, **kwargs, out_val=out)
            elif re.search(r"mm|matmul|linear|conv|attention|einsum|bilinear|(^|_)(mv|dot|ger)(_|$)", name):
                raise NotImplementedError(f"{func}: there is no formula for the operations of this product")
            return out

    return Operations()


def best_time(work: Any, device: Any, repeats: int = 10) -> float:
    import torch

    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def matmul_ceiling(device: Any, precision: str) -> float:
    """Return the most operations a second of large matrix products, with sizes from 1024 to 8192."""
    import torch

    from qlora_kit.system.devices import COMPUTE_DTYPES

    most = 0.0
    for size in (1024, 2048) if device.type == "cpu" else (2048, 4096, 8192):
        one = torch.randn(size, size, device=device).to(COMPUTE_DTYPES[precision])
        most = max(most, 2 * size**3 / best_time(lambda one=one: one @ one, device))
    return most


def copy_ceiling(device: Any) -> float:
    """Return the bytes a second, read plus written, of copying 256 MiB."""
    import torch

    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * 2**28 / best_time(lambda: target.copy_(source), device)
