"""A trained run as a plain fp32 model: the same numbers, in classes that can be traced."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ...config.experiment import Experiment
from ...config.quantization import SCHEMES
from ...errors import KitError
from ...models.pretrained import build_classifier
from ...quantization.backend import FourBits, backend_of, backend_of_layer, dense_weight, linear_storage
from ...quantization.layers import is_linear
from ...runs.predictor import Predictor
from ...system.devices import generators_kept
from ...system.safe_peft import peft

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a linear layer's weight is made of: `codes` or `dense`, and `scaling * b @ a` where it has an adapter.

    Args:
        codes: The frozen weight in four bits; None where it is not stored so.
        dense: The frozen weight in float32, `[out_features, in_features]`.
        a: The adapter's first matrix, float32 `[rank, in_features]`, or None.
        b: The adapter's second matrix, float32 `[out_features, rank]`, or None.
        scaling: The adapter's factor.
        quantized: Whether the frozen weight is stored in 4 or 8 bits.
    """

    codes: FourBits | None
    dense: torch.Tensor
    a: torch.Tensor | None
    b: torch.Tensor | None
    scaling: float
    quantized: bool

    def whole(self) -> torch.Tensor:
        """Return the weight that the trained layer multiplies by, float32 `[out_features, in_features]`."""
        if self.a is None or self.b is None:
            return self.dense
        return torch.addmm(self.dense, self.b, self.a, alpha=self.scaling)


class Product(nn.Module):
    """`x @ weight + bias`, the weight `[in_features, out_features]`: traced, it keeps its name, and no copy turns it.

    Args:
        weight: Float32 `[out_features, in_features]`.
        bias: Float32 `[out_features]`, or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.T.contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().cpu())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply: `[..., in_features]` to `[..., out_features]`."""
        product = x @ self.weight
        return product if self.bias is None else product + self.bias


class Probabilities(nn.Module):
    """A classifier as a function of two tensors, which a graph is made of.

    Args:
        model: As `plain_model` returns it.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and probabilities, fp32 `[batch, classes]`, of ids and mask, int64 `[batch, length]`."""
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits.float()
        return logits, logits.softmax(-1)


def plain_model(run: Predictor) -> tuple[Any, dict[str, Trained]]:
    """Return a run's classifier in fp32 on the CPU, without quantization and adapters: its weights have both in them.

    Args:
        run: A finished run.

    Returns:
        The classifier in eval mode, and what the weights of its quantized and adapted layers are made of, by name.

    Raises:
        KitError: When the run's scheme also rounds inputs, which no weight shows.
    """
    scheme = run.experiment.quantization.scheme
    if backend_of(scheme).rounds_its_input(scheme):
        raise KitError(
            f"{run.path} was trained on a base in {scheme}, which rounds each layer's input, too, and ONNX Runtime has "
            f"no operation that rounds as it does. These can be exported: {', '.join(exported())}. `merge` writes this "
            "run on its unquantized base"
        )
    trained, tokenizer = run.load()
    inner = trained.get_base_model() if isinstance(trained, peft.PeftModel) else trained
    with generators_kept(CPU):
        model: Any = build_classifier(
            _shapes(run.experiment), run.label_names, device=CPU, pad_token_id=tokenizer.pad_token_id
        )
    layers: dict[str, Trained] = {}
    for name, module in list(model.named_modules()):
        source = _unwrapped(inner, name)
        found = _linear(source) if is_linear(module) else None
        if found is None:
            _copy_(module, source)
            continue
        model.set_submodule(name, Product(found.whole(), _base(source).bias))
        layers[name] = found
    # Written out in products and a softmax, which ONNX Runtime has; torch's own attention it does not know.
    model.base_model.set_attn_implementation("eager")
    return model.eval().requires_grad_(False), layers


def exported() -> list[str]:
    """Return the schemes whose layers compute from their weights alone, so that their runs can be exported."""
    return [name for name in SCHEMES if not backend_of(name).rounds_its_input(name)]


def _shapes(experiment: Experiment) -> Experiment:
    """Return an experiment whose model has the same shapes, unquantized and without adapters."""
    return experiment.override(
        {
            "quantization": dataclasses.asdict(type(experiment.quantization)(scheme="none")),
            "lora": None,
            "model.random_weights": True,
            "model.lean": False,
            "training.precision": "fp32",
            "training.prepare_for_kbit_training": False,
        }
    )


def _unwrapped(model: nn.Module, name: str) -> nn.Module:
    """Return a trained model's module by its name in the model without adapters."""
    found: Any = model
    for part in name.split(".") if name else ():
        found = getattr(_base(found), part)
        if isinstance(found, peft.utils.ModulesToSaveWrapper):
            found = found.modules_to_save[found.active_adapters[0]]
    return found


def _base(module: Any) -> Any:
    return module.base_layer if isinstance(module, LoraLayer) else module


def _linear(source: Any) -> Trained | None:
    """Return what a linear layer's weight is made of; None where it is a plain one, to be copied as it is."""
    base = _base(source)
    backend = backend_of_layer(base)
    if backend is None:
        return None
    codes = backend.four_bits(base)
    dense = dense_weight(base, torch.float32).detach().cpu().contiguous()
    stored = linear_storage(base)
    quantized = stored is not None and stored.quantized
    if not isinstance(source, LoraLayer):
        return Trained(codes, dense, None, None, 1.0, quantized) if quantized else None
    adapted: Any = source
    (name,) = adapted.active_adapters
    a, b = (matrices[name].weight.detach().float().cpu() for matrices in (adapted.lora_A, adapted.lora_B))
    return Trained(codes, dense, a, b, float(adapted.scaling[name]), quantized)


def _copy_(module: Any, source: Any) -> None:
    """Copy the weights and buffers of one module, without those of modules inside it, in place."""
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        # An embedding in four bits shows its table as numbers.
        tensor.data = getattr(source, name).detach().to(CPU, tensor.dtype).contiguous()
