"""Compute what needs no measurement: counts, memory plans and codes."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

from .limits import EXPLAINED, RECIPE


def compute() -> dict[str, Any]:
    """Compute what needs no measurement, from the shape of DialoGPT-medium, the data, PEFT and bitsandbytes.

    Returns:
        `data` (`rows`, `train`, `labels`), `recipe` (`batch_size`, `epochs`), `ways` (the memory plans of `qlora`,
        `lora` and `full` at the explained recipe's batch on a T4: bytes and numbers of parameters), `head` (its
        parameters), `trained` (trained parameters of the recipe by kind: `A`, `B`, `head`, `other`), `factor`
        (`r`, `alpha`, and `times`: what PEFT's layer adds, divided by B·A·x), `codes` (`levels` in NF4's table,
        `exact`: whether a dequantized weight is its code's level times its block's scale), `padding` (`pad` and `end`:
        the model's own tokens, or None), `four_bit_types` (of `bitsandbytes` and the `kit`).
    """
    import torch

    from ..config.preset import preset
    from ..config.quantization import FOUR_BIT
    from ..data.loading import banking77
    from ..memory.fits import with_method
    from ..memory.plan import plan
    from ..models.build import build
    from ..models.configuration import load_config
    from ..models.heads import head_modules
    from ..system.safe_bitsandbytes import bnb

    rows = banking77()
    recipe = preset(RECIPE)
    shape = recipe.override({"model.name": f"shape:{EXPLAINED}", "model.random_weights": True})
    ways = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' own, about names that older versions need
        for method, scheme in (("qlora", "nf4"), ("lora", "none"), ("full", "none")):
            spec = with_method(shape, method, scheme)
            if method != "qlora":
                spec = spec.override({"training.prepare_for_kbit_training": False})
            planned = plan(spec, device="T4", labels=len(rows.label_names))
            ways[method] = {
                "trainable": planned.parameters[0],
                "all": planned.parameters[1],
                "device": planned.device.name,
                "device_bytes": planned.device.bytes,
                **{key: getattr(planned, key) for key in ("batch", "length", "total", "reserved", "paged", "parts")},
                "optimizer": spec.training.optimizer,
                "precision": planned.precision,
            }
        model = build(shape, rows.label_names, device=torch.device("meta"), pad_token_id=0)
    types = []
    for name in FOUR_BIT:
        with contextlib.suppress(ValueError):
            bnb.functional.quantize_4bit(torch.ones(64, 64), quant_type=name)
            types.append(name)
    config: Any = load_config(shape.model)
    lora = recipe.lora
    assert lora is not None
    return {
        "data": {
            "rows": len(rows.train) + len(rows.validation),
            "train": len(rows.train),
            "labels": len(rows.label_names),
        },
        "recipe": {"batch_size": recipe.training.batch_size, "epochs": recipe.training.epochs},
        "ways": ways,
        "head": config.hidden_size * len(rows.label_names),
        "trained": _trained(model, set(head_modules(model))),
        "factor": {"r": lora.r, "alpha": lora.alpha, "times": _factor(lora.r, lora.alpha)},
        "codes": _codes(recipe.quantization),
        "padding": {"pad": config.pad_token_id, "end": config.eos_token_id},
        "four_bit_types": {"bitsandbytes": types, "kit": list(FOUR_BIT)},
    }


def _trained(model: Any, heads: set[str]) -> dict[str, int]:
    """Count a model's trained parameters by kind."""
    found = {"A": 0, "B": 0, "head": 0, "other": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")
            kind = "A" if "lora_A" in parts else "B" if "lora_B" in parts else "head" if heads & {*parts} else "other"
            found[kind] += parameter.numel()
    return found


def _factor(r: int, alpha: float) -> float:
    """Return the term that PEFT's adapters add to a layer's output, as a multiple of B·A·x."""
    import torch

    from ..system.safe_peft import peft

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        scale: Any = alpha  # annotated as int in PEFT, but its layers accept a float
        config = peft.LoraConfig(r=r, lora_alpha=scale, target_modules=["0"], init_lora_weights=False)
        model: Any = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 24)), config)
        layer = model.base_model.model[0]
        x = torch.randn(8, 32)
        with torch.no_grad():
            added = layer(x) - layer.base_layer(x)
            product = layer.lora_B["default"](layer.lora_A["default"](x))
    return float((added * product).sum() / (product * product).sum())


def _codes(spec: Any) -> dict[str, Any]:
    """Return how many levels a scheme has, and whether dequantized weights are a level times their block's scale."""
    import torch

    from ..system.safe_bitsandbytes import bnb

    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type=spec.scheme)
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).reshape(-1, 64).long()
    levels = state.code[codes] * state.absmax.reshape(-1, 1)
    restored = bnb.functional.dequantize_4bit(packed, state).reshape(-1, 64)
    return {"levels": len(state.code), "exact": bool(torch.allclose(levels, restored, rtol=1e-5, atol=1e-6))}
