"""The int4 layer: what it computes, its gradient, and its life under PEFT."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_kit import quantization
from qlora_kit.config.quantization import BLOCK_SIZES, Quantization
from qlora_kit.errors import KitError
from qlora_kit.quantization.int4 import Int4Linear, LoraInt4Linear, quantize_linears_, register

INT4 = Quantization("int4")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(out_features: int, in_features: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(in_features, out_features, bias=bias)
    layer.weight.data = normal(out_features, in_features)
    return layer


# --- the layer ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    block_size=st.sampled_from(BLOCK_SIZES),
    double=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_weight_is_the_references_whatever_the_shape(rows, columns, block_size, double, dtype):
    spec, layer = Quantization("int4", double, block_size), linear(rows, columns)
    stored = Int4Linear.from_module(layer, spec)
    expected = quantization.quantize(layer.weight, spec).dequantize(dtype)
    assert torch.equal(stored.dequantize(dtype), expected)


@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16])
def test_forward_multiplies_with_the_dequantized_weight(compute_dtype):
    layer, x = linear(96, 128), normal(2, 5, 128, seed=1)
    stored = Int4Linear.from_module(layer, INT4, compute_dtype)
    dtype = compute_dtype or torch.float32
    expected = nn.functional.linear(x.to(dtype), stored.dequantize(dtype), layer.bias.to(dtype)).float()
    result = stored(x)
    assert result.dtype == x.dtype and torch.equal(result, expected)
    assert stored(x.half()).dtype == torch.float16


def test_gradient_to_the_input_is_that_of_a_plain_layer():
    layer = linear(96, 128)
    stored, x = Int4Linear.from_module(layer, INT4), normal(2, 5, 128).requires_grad_()
    plain = stored.to_full_precision()
    weights = normal(2, 5, 96, seed=2)
    (mine,) = torch.autograd.grad((stored(x) * weights).sum(), x)
    (expected,) = torch.autograd.grad((plain(x) * weights).sum(), x)
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-5)


def test_gradcheck():
    stored = Int4Linear.from_module(linear(6, 10).double(), Quantization("int4", block_size=32))
    stored.bias.requires_grad_()
    x = normal(3, 10).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, bias: stored(x), (x, stored.bias))


def test_a_trainable_bias_gets_its_gradient_and_a_frozen_input_none():
    stored = Int4Linear.from_module(linear(8, 64), INT4)
    stored.bias.requires_grad_()
    weights = normal(3, 5, 8)
    (stored(normal(3, 5, 64)) * weights).sum().backward()
    torch.testing.assert_close(stored.bias.grad, weights.sum((0, 1)))


def test_backward_keeps_the_packed_weight_and_not_a_dequantized_one():
    stored, x = Int4Linear.from_module(linear(256, 256), INT4), normal(4, 256).requires_grad_()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        stored(x)
    assert sum(saved) < 256 * 256  # the weight in 16 bits would be twice as much


def test_it_trains_under_autocast_and_checkpointing():
    from torch.utils.checkpoint import checkpoint

    model = quantize_linears_(nn.Sequential(linear(64, 64), nn.GELU(), linear(64, 64)), INT4, (), torch.float32)
    x = normal(4, 64).requires_grad_()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    (again,) = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(again, expected)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().sum()
    (rough,) = torch.autograd.grad(loss, x)
    assert (rough - expected).norm() < 0.05 * expected.norm()


def test_conv1d_is_stored_by_rows_of_its_outputs_and_comes_back_as_conv1d():
    layer, x = Conv1D(48, 64), normal(2, 64)
    layer.weight.data = normal(64, 48)
    stored = Int4Linear.from_module(layer, INT4)
    assert (stored.in_features, stored.out_features) == (64, 48)
    assert torch.equal(stored.dequantize(), quantization.roundtrip(layer.weight.data.T.contiguous(), INT4))
    back = stored.to_full_precision()
    assert isinstance(back, Conv1D) and back.weight.shape == (64, 48)
    torch.testing.assert_close(back(x), stored(x))
    assert isinstance(Int4Linear.from_module(linear(8, 64, bias=False), INT4).to_full_precision(), nn.Linear)


def test_casting_the_module_leaves_the_scales_in_float32():
    for spec in (INT4, Quantization("int4", double_quantization=False)):
        stored = Int4Linear.from_module(linear(64, 64), spec)
        weight = stored.dequantize()
        for cast in (nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float16)):
            cast(stored)
            assert torch.equal(stored.dequantize(), weight)
        assert stored.bias.dtype == torch.float16


def test_what_it_says_of_itself_and_what_it_refuses():
    assert "int4" in repr(Int4Linear.from_module(linear(8, 64), INT4))
    with pytest.raises(KitError, match="int4"):
        Int4Linear(64, 64, spec=Quantization("nf4"))


# --- a model of them ----------------------------------------------------------------------------------------


def gpt2(seed: int = 0) -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(
        n_layer=2, n_embd=64, n_head=2, vocab_size=100, num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(seed)
    return transformers.GPT2ForSequenceClassification(config).eval()


def bert(seed: int = 0) -> transformers.PreTrainedModel:
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=2, intermediate_size=96, vocab_size=100, num_labels=3
    )
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification(config).eval()


IDS = torch.randint(3, 100, (6, 12), generator=torch.Generator().manual_seed(0))
MODELS = {"gpt2": (gpt2, "score", ["c_attn", "c_proj"]), "bert": (bert, "classifier", ["query", "value", "dense"])}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_layer_but_the_head_is_replaced(name):
    make, head, _ = MODELS[name]
    model = quantize_linears_(make(), INT4, [head])
    left = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and not isinstance(m, Int4Linear)]
    assert left == [head]
    assert quantization.storage(model).bits_per_parameter == pytest.approx(
        4.127, abs=0.02
    )  # layers this small: a group each


def test_skipping_goes_by_whole_names():
    model = nn.ModuleDict({"head": nn.ModuleDict({"a": linear(64, 64)}), "header": linear(64, 64), "b": linear(64, 64)})
    quantize_linears_(model, INT4, ["head"])
    assert [type(m).__name__ for m in (model["head"]["a"], model["header"], model["b"])] == [
        "Linear",
        "Int4Linear",
        "Int4Linear",
    ]


def test_a_tied_output_layer_stays_tied():
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
    )
    quantize_linears_(model, INT4)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.model.layers[0].mlp.up_proj, Int4Linear)


def test_layers_go_to_a_device_one_by_one_before_they_are_quantized(monkeypatch):
    # The meta device stands for a GPU: what goes there leaves the host.
    model, waiting = gpt2(), []
    plain = Int4Linear.from_module

    def counted(module, *args):
        assert module.weight.is_meta
        waiting.append(sum(isinstance(m, Conv1D) and not m.weight.is_meta for m in model.modules()))
        return plain(module, *args)

    monkeypatch.setattr(Int4Linear, "from_module", staticmethod(counted))
    quantize_linears_(model, INT4, ["score"], device=torch.device("meta"))
    assert waiting == list(reversed(range(len(waiting)))) and len(waiting) > 1
    assert all(m.weight.is_meta for m in model.modules() if isinstance(m, Int4Linear))
    assert not model.transformer.wte.weight.is_meta and not model.score.weight.is_meta


def test_a_model_with_nothing_to_quantize_is_refused():
    with pytest.raises(KitError, match="no linear layer"):
        quantize_linears_(nn.Sequential(nn.Embedding(3, 4)), INT4)
    with pytest.raises(KitError, match="no linear layer"):
        quantize_linears_(nn.Sequential(linear(64, 64)), INT4, ["0"])


@pytest.mark.parametrize("spec", [INT4, Quantization("int4", False, 128)], ids=lambda spec: spec.label)
@pytest.mark.parametrize("name", MODELS)
def test_state_dict_goes_through_safetensors(name, spec, tmp_path):
    make, head, _ = MODELS[name]
    model = quantize_linears_(make(), spec, [head])
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    state = load_file(tmp_path / "base.safetensors")

    other = quantize_linears_(make(seed=1), spec, [head])
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(model))

    with torch.device("meta"):
        empty = make()
    quantize_linears_(empty, spec, [head])
    empty.load_state_dict(state, assign=True, strict=name != "bert")
    if name == "gpt2":  # BERT has buffers that are not in its state dict, which a model on meta lacks
        assert torch.equal(logits(empty), logits(model))


def test_a_state_dict_of_another_spec_is_refused():
    state = quantize_linears_(gpt2(), INT4, ["score"]).state_dict()
    for spec in (Quantization("int4", False), Quantization("int4", block_size=128)):
        with pytest.raises(RuntimeError):
            quantize_linears_(gpt2(), spec, ["score"]).load_state_dict(state)


# --- under PEFT ---------------------------------------------------------------------------------------------


def adapted(name: str, **config: object) -> PeftModel:
    make, head, targets = MODELS[name]
    options = {"r": 4, "lora_alpha": 8, "target_modules": targets, "modules_to_save": [head], **config}
    torch.manual_seed(3)
    model = quantize_linears_(make(), INT4, [head], torch.float32)
    return get_peft_model(model, register(LoraConfig(task_type="SEQ_CLS", **options)))


def train(model: nn.Module, steps: int = 30) -> float:
    labels = torch.arange(len(IDS)) % 3
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("name", MODELS)
def test_adapters_attach_train_save_load_and_merge(name, tmp_path):
    make, head, _ = MODELS[name]
    model = adapted(name)
    assert any(isinstance(m, LoraInt4Linear) for m in model.modules())
    frozen = {n: t.clone() for n, t in model.state_dict().items() if t.dtype == torch.uint8}
    assert train(model) < 0.1
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in frozen.items())
    trained = logits(model)

    model.save_pretrained(tmp_path)
    config = register(PeftConfig.from_pretrained(tmp_path))
    loaded = PeftModel.from_pretrained(quantize_linears_(make(), INT4, [head], torch.float32), tmp_path, config=config)
    assert torch.equal(logits(loaded), trained)

    loaded.merge_adapter()
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-4, atol=1e-4)
    loaded.unmerge_adapter()
    assert torch.equal(logits(loaded), trained)
    with loaded.disable_adapter():
        assert not torch.allclose(logits(loaded), trained, atol=0.1)

    merged = loaded.merge_and_unload(safe_merge=True)
    for layer, module in list(merged.named_modules()):
        if isinstance(module, Int4Linear):  # it had no adapter
            merged.set_submodule(layer, module.to_full_precision())
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), trained, rtol=1e-4, atol=1e-4)


def test_merging_does_not_round_the_adapter_away():
    """Trap 8: an adapter smaller than a quantization step is lost when codes are what it is merged into."""
    layer = linear(64, 64)
    delta = 0.01 * normal(64, 1, seed=1) @ normal(1, 64, seed=2)
    stored = Int4Linear.from_module(layer, INT4)
    rounded = quantization.roundtrip(stored.dequantize() + delta, INT4) - stored.dequantize()
    assert (rounded - delta).norm() > 0.9 * delta.norm()  # the trap

    model = get_peft_model(nn.Sequential(stored), register(LoraConfig(r=1, lora_alpha=1, target_modules=["0"])))
    adapter = model.base_model.model[0]
    adapter.lora_A["default"].weight.data = normal(1, 64, seed=2)
    adapter.lora_B["default"].weight.data = 0.01 * normal(64, 1, seed=1)
    merged = model.merge_and_unload()[0]
    torch.testing.assert_close(merged.weight - stored.dequantize(), delta, rtol=0, atol=1e-6)


def test_an_adapter_trained_on_int4_loads_onto_the_full_precision_base(tmp_path):
    model = adapted("gpt2")
    train(model)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        merged = PeftModel.from_pretrained(gpt2(), tmp_path).merge_and_unload()
    assert type(merged.transformer.h[0].attn.c_attn) is Conv1D
    assert torch.equal(logits(merged).argmax(-1), logits(model).argmax(-1))


def test_without_registering_everything_but_merging_works():
    make, head, targets = MODELS["bert"]
    model = quantize_linears_(make(), INT4, [head])
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=targets, modules_to_save=[head]))
    assert train(model) < 0.1
    with pytest.raises(RuntimeError):
        model.merge_adapter()


def test_all_linear_finds_the_layers():
    model = adapted("bert", target_modules="all-linear", modules_to_save=None)
    assert sum(isinstance(m, LoraInt4Linear) for m in model.modules()) == 2 * 6 + 1  # and the pooler


def test_what_needs_the_full_precision_weight_is_refused():
    with pytest.raises(KitError, match="nf4"):
        adapted("bert", use_dora=True)
    with pytest.raises(KitError, match="pissa"):
        adapted("bert", init_lora_weights="pissa")


def test_two_adapters_merge_together_and_come_apart_exactly():
    model = adapted("bert")
    train(model, 5)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("default")
    before = logits(model)
    model.merge_adapter(["default", "other"])
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


def test_a_copy_of_a_model_is_a_model_of_its_own():
    model = adapted("bert")
    twin = copy.deepcopy(model)
    before = logits(model)
    train(twin, 3)
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)


def test_peft_is_told_through_the_config_alone():
    """The registration is this config's: another LoRA config in the same process is as it was."""
    register(LoraConfig())
    assert LoraConfig()._custom_modules is None
    assert peft.tuners.lora.Linear is LoraLinear
