"""LoRA's layer as one operation gives what PEFT's chain of modules gives."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer

from qlora_kit import models
from qlora_kit.kernels.fused_lora import _rows

BATCH = {
    "input_ids": torch.arange(1000, 1076).view(4, 19),
    "attention_mask": torch.tensor([[1] * 19, [1] * 19, [1] * 11 + [0] * 8, [1] * 7 + [0] * 12]),
    "labels": torch.tensor([0, 1, 2, 3]),
}


def step(experiment, precision="fp32", fused=True):
    """Return a training step's logits and the gradients of every trained weight."""
    experiment = experiment.override({"model.fused": fused})
    model = models.build(experiment, ["a", "b", "c", "d"], pad_token_id=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide A's gradient
            parameter.data.normal_(std=0.05, generator=generator)
    torch.manual_seed(0)
    with models.computing(torch.device("cpu"), precision):
        out = model(**BATCH)
    out.loss.backward()
    return out.logits.detach().float(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("scheme", ["none", "nf4", "fp4", "int4"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_step_is_that_of_peft(name, scheme, dropout, tiny_experiment):
    experiment = tiny_experiment(name, quantization__scheme=scheme, lora__dropout=dropout)
    logits, gradients = step(experiment)
    peft_logits, peft_gradients = step(experiment, fused=False)
    assert torch.allclose(logits, peft_logits, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == peft_gradients.keys()
    for key, gradient in gradients.items():
        assert torch.allclose(gradient, peft_gradients[key], rtol=1e-4, atol=1e-7), key
    assert any(gradient.abs().max() > 0 for key, gradient in gradients.items() if "lora_A" in key)


@pytest.mark.parametrize("scheme", ["nf4", "int4"])
def test_frozen_layers_without_an_adapter_compute_as_theirs_do(scheme, tiny_experiment):
    experiment = tiny_experiment("gpt2", quantization__scheme=scheme, lora__target_modules=["c_attn"])
    logits, gradients = step(experiment)
    peft_logits, peft_gradients = step(experiment, fused=False)
    assert torch.allclose(logits, peft_logits, rtol=1e-5, atol=1e-6)
    for key, gradient in gradients.items():
        assert torch.allclose(gradient, peft_gradients[key], rtol=1e-4, atol=1e-7), key


@pytest.mark.parametrize("scheme", ["none", "nf4", "int4"])
def test_what_a_layer_returns_may_be_changed_in_place(scheme, tiny_experiment):
    # Falcon adds one branch to the other so; autograd refuses it of a view that a function of its own returns.
    experiment = tiny_experiment("bert", quantization__scheme=scheme, lora__target_modules=["query"], lora__dropout=0.0)
    model = models.build(experiment, ["a", "b"], device=torch.device("cpu"))
    attention = model.get_base_model().base.encoder.layer[0].attention.self
    for layer in (attention.query, attention.value):  # with an adapter and without
        x = torch.randn(2, 3, 32, requires_grad=True)
        wanted = torch.autograd.grad((layer(x) * 2 + 1).square().sum(), x)[0]
        changed = layer(x)
        changed.mul_(2).add_(1)
        assert torch.equal(torch.autograd.grad(changed.square().sum(), x)[0], wanted)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_get_their_gradient(bias, tiny_experiment):
    experiment = tiny_experiment("gpt2", lora__bias=bias, lora__target_modules=["c_attn"], lora__dropout=0.0)
    gradients, peft_gradients = step(experiment)[1], step(experiment, fused=False)[1]
    biases = [key for key in gradients if key.endswith("bias") and "attn" in key]
    assert biases and gradients.keys() == peft_gradients.keys()
    for key in gradients:
        assert (gradients[key] is None) == (peft_gradients[key] is None), key
        assert gradients[key] is None or torch.allclose(gradients[key], peft_gradients[key], rtol=1e-4, atol=1e-7), key
    assert all(gradients[key].abs().max() > 0 for key in biases)


def test_weights_that_change_between_steps_are_cast_anew(tiny_experiment):
    model = models.build(tiny_experiment("bert", lora__dropout=0.0), list("abcd"), pad_token_id=0)
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    x = torch.randn(5, layer.in_features)
    seen = []
    for value in (0.0, 0.3):
        with torch.no_grad():
            layer.lora_B["default"].weight.data.fill_(value)  # by `data`, which no version counts
        with models.computing(torch.device("cpu"), "bf16"):
            seen.append((model(**BATCH).logits, layer(x)))  # in the model's forward pass, and by itself
    (before, alone), (after, alone_after) = seen
    assert not torch.allclose(before, after) and not torch.allclose(alone, alone_after)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_in_bf16_it_is_as_near_to_fp32_as_peft_is(name, tiny_experiment):
    experiment = tiny_experiment(name, lora__dropout=0.0)
    exact = step(experiment)[1]

    def away(gradients):
        return max(float((gradients[key] - exact[key]).norm() / exact[key].norm()) for key in exact)

    ours, theirs = away(step(experiment, "bf16")[1]), away(step(experiment, "bf16", fused=False)[1])
    assert 0 < ours < 2 * theirs


@pytest.mark.parametrize("scheme", ["none", "nf4", "int4"])
def test_layers_that_do_more_than_plain_lora_stay_with_peft(tiny_experiment, scheme):
    def logits_of_each_state(fused: bool) -> dict[str, torch.Tensor]:
        experiment = tiny_experiment("bert", quantization__scheme=scheme, model__fused=fused)
        model = models.build(experiment, ["a", "b", "c", "d"], pad_token_id=0).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(generator=generator)
            found = {"adapted": model(**BATCH).logits}
            with model.disable_adapter():
                found["disabled"] = model(**BATCH).logits
            if scheme != "int4":  # PEFT merges into no layer of the kit's own
                model.merge_adapter()
                found["merged"] = model(**BATCH).logits
                model.unmerge_adapter()
            for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
                for part in (layer.lora_A, layer.lora_B):
                    part["second"] = copy.deepcopy(part["default"])
                layer.lora_dropout["second"] = torch.nn.Identity()
                layer.scaling["second"] = 3.0
                layer._active_adapter = ["default", "second"]
            found["two at once"] = model(**BATCH).logits
        return found

    ours, theirs = logits_of_each_state(True), logits_of_each_state(False)
    for state, expected in theirs.items():
        assert torch.allclose(ours[state], expected, rtol=1e-5, atol=1e-5), state
    for state in ("disabled", "two at once"):
        assert not torch.allclose(ours[state], ours["adapted"], atol=1e-2), state
    if scheme == "none":  # 4 bits would round what is merged
        assert torch.allclose(ours["merged"], ours["adapted"], rtol=1e-4, atol=1e-4)


def test_int8_layers_are_left_alone(tiny_experiment):
    model = models.build(tiny_experiment("bert", quantization__scheme="int8"), ["a", "b"], pad_token_id=0)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert layers and not any("forward" in vars(layer) for layer in layers)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_longer_texts_take_torchs_own_attention(name, tiny_experiment, monkeypatch):
    experiment = tiny_experiment(name, lora__dropout=0.0)
    ours = step(experiment)[0]
    monkeypatch.setattr("qlora_kit.kernels.cpu_attention.PLAIN_UP_TO", 4)
    assert torch.allclose(ours, step(experiment)[0], rtol=1e-5, atol=1e-6)


def test_query_key_and_value_share_one_cast_of_their_input(tiny_experiment):
    model = models.build(tiny_experiment("bert", lora__dropout=0.0), ["a", "b"], pad_token_id=0)
    inputs = {key: BATCH[key] for key in ("input_ids", "attention_mask")}
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with models.computing(torch.device("cpu"), "bf16"), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(**inputs)
    rows = [t for t in kept if t.dtype == torch.bfloat16 and t.shape == (4 * 19, 32)]
    storages = [t.untyped_storage()._cdata for t in rows]
    # Two layers, each with an input of query, key and value.
    assert sorted(storages.count(s) for s in set(storages))[-2:] == [3, 3]
    with torch.inference_mode(), models.computing(torch.device("cpu"), "bf16"):
        assert torch.isfinite(model(**inputs).logits).all()


def test_a_changed_input_is_cast_again():
    x = torch.ones(2, 3)
    first = _rows(x, torch.bfloat16)
    assert _rows(x, torch.bfloat16) is first
    x += 1
    assert _rows(x, torch.bfloat16).eq(2).all()
