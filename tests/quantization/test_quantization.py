"""The spec, the codebooks, the costs: what `qlora_kit.quantization` says of itself."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
import transformers
from torch import nn

from qlora_kit import quantization
from qlora_kit.config.quantization import BLOCK_SIZES, SCHEMES, Quantization
from qlora_kit.errors import KitError
from qlora_kit.quantization.codebooks import CODEBOOKS
from qlora_kit.quantization.int4 import quantize_linears_
from qlora_kit.system.safe_bitsandbytes import bnb


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the spec -----------------------------------------------------------------------------------------------


def test_spec_is_frozen_and_its_default_is_the_papers():
    spec = Quantization()
    assert (spec.scheme, spec.double_quantization, spec.block_size) == ("nf4", True, 64)
    with pytest.raises(FrozenInstanceError):
        spec.scheme = "fp4"  # type: ignore[misc]


def test_importing_the_spec_does_not_import_torch():
    code = "import sys; from qlora_kit.config import Quantization; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"scheme": "nf5"}, "nf4"),
        ({"scheme": "int44"}, "int4"),
        ({"block_size": 48}, "64"),
        ({"block_size": True}, "64"),
        ({"embeddings": "int8"}, "embeddings.*none, nf4, fp4"),
        ({"double_quantization": "yes"}, "true or false"),
        ({"scheme": "int8", "block_size": 128}, "nf4, fp4, int4"),
    ],
)
def test_a_bad_spec_is_refused_with_what_is_allowed(fields, says):
    with pytest.raises(KitError, match=says):
        Quantization(**fields)


def test_one_override_changes_the_scheme():
    """Double quantization is ignored where it means nothing, so nf4's default is no obstacle."""
    assert [replace(Quantization(), scheme=scheme).nested for scheme in SCHEMES] == [False, False, True, True, True]


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_bitsandbytes_config_carries_the_spec(scheme, double):
    spec = Quantization(scheme, double_quantization=double)
    config = quantization.bitsandbytes_config(spec, torch.float16, ["score"])
    assert config.bnb_4bit_quant_type == scheme and config.bnb_4bit_use_double_quant == double
    assert config.bnb_4bit_compute_dtype == torch.float16 and config.llm_int8_skip_modules == ["score"]
    assert quantization.bitsandbytes_config(Quantization("int8"), torch.float16, ["score"]).load_in_8bit
    assert quantization.bitsandbytes_config(Quantization("none"), torch.float16, []) is None


def test_bitsandbytes_config_refuses_a_block_size_that_would_be_ignored():
    with pytest.raises(KitError, match="64"):
        quantization.bitsandbytes_config(Quantization("nf4", block_size=128), torch.float32, [])


# --- trap 12: bitsandbytes has no int4 ----------------------------------------------------------------------


def test_trap_12_int4_never_reaches_bitsandbytes():
    """The trap: `BitsAndBytesConfig(bnb_4bit_quant_type="int4")` is accepted, and a layer made so fails."""
    trap = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="int4")
    with pytest.raises((ValueError, NotImplementedError)):
        bnb.functional.quantize_4bit(normal(64), quant_type=trap.bnb_4bit_quant_type)

    assert quantization.bitsandbytes_config(Quantization("int4"), torch.float32, []) is None
    model = quantize_linears_(nn.Sequential(nn.Linear(64, 64)), Quantization("int4"))
    assert type(model[0]).__name__ == "Int4Linear"
    with pytest.raises(KitError, match="none, int8, nf4, fp4, int4"):
        Quantization("bnb_int4")
    with pytest.raises(KitError, match="nf4"):
        quantize_linears_(nn.Sequential(nn.Linear(64, 64)), Quantization("nf4"))


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("in_features", [16, 32, 48, 64, 96, 312, 384, 416, 576])
def test_bitsandbytes_multiplies_with_what_it_stored_whatever_the_width(in_features, scheme):
    """On a CPU with AVX-512 it takes another block's scale at widths like 96 and 416, but for `_bnb._FlatRows`."""
    layer = bnb.nn.Linear4bit(in_features, 128, bias=False, compress_statistics=False, quant_type=scheme)
    weight = normal(128, in_features)
    layer.load_state_dict({"weight": weight})
    layer = layer.to("cpu")
    expected = quantization.roundtrip(weight, Quantization(scheme, double_quantization=False))
    x = torch.eye(in_features, requires_grad=True)
    torch.testing.assert_close(layer(x).T, expected, rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(gradient[0], expected.sum(0), rtol=1e-4, atol=1e-4)


# --- codebooks ----------------------------------------------------------------------------------------------


def test_codebooks_are_bitsandbytes_own():
    for name in ("nf4", "fp4"):
        assert torch.equal(quantization.codebook(name), bnb.functional.get_4bit_type(name, device="cpu"))
    assert torch.equal(quantization.dynamic_codebook(), bnb.functional.create_dynamic_map())


def test_codebooks_do_not_depend_on_the_programs_own_dtype():
    """In float64 NF4's quantiles round differently, and weights stored with bitsandbytes would be read back wrong."""
    code = (
        "import torch; torch.set_default_dtype(torch.float64); from qlora_kit import quantization as q; "
        "print([q.codebook(name).tolist() for name in q.CODEBOOKS], q.dynamic_codebook().tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    own = [quantization.codebook(name).tolist() for name in CODEBOOKS]
    assert done.stdout.strip() == f"{own} {quantization.dynamic_codebook().tolist()}"


def test_codebooks_span_minus_one_to_one_with_zero_among_them():
    for name in CODEBOOKS:
        levels = quantization.codebook(name)
        used = levels[levels.abs() <= 1]
        assert (used.min(), used.max()) == (-1, 1) and 0 in used
    with pytest.raises(KitError, match="nf4"):
        quantization.codebook("nf")


def test_nf4_is_the_paper_in_spirit_and_not_its_equation_to_the_letter():
    """Equation 4 taken literally gives 15 finite levels; bitsandbytes' NF4 has 16, one of them zero."""
    from statistics import NormalDist

    quantile, n = NormalDist().inv_cdf, 2**4 + 1
    literal = [(quantile(i / n) + quantile((i + 1) / n)) / 2 for i in range(1, n - 1)]
    assert len(literal) == 15
    nf4 = quantization.codebook("nf4")
    assert len(set(nf4.tolist())) == 16 and (nf4 < 0).sum() == 7 and (nf4 > 0).sum() == 8


def test_the_sixteenth_code_of_int4_is_never_used():
    stored = quantization.quantize(normal(100_000), Quantization("int4"))
    assert set(stored.codes.tolist()) == set(range(1, 16))
    mirrored = quantization.quantize(-normal(100_000), Quantization("int4"))
    assert torch.equal(mirrored.dequantize(), -stored.dequantize())


def test_fp4s_smallest_level_is_a_sixteenth_of_the_standards():
    fp4, e2m1 = quantization.codebook("fp4"), quantization.codebook("e2m1")
    assert set(fp4.tolist()) - set(e2m1.tolist()) == {x for x in fp4.tolist() if 0 < abs(x) < 0.1}
    assert math.isclose(
        min(x for x in e2m1.tolist() if x > 0) / min(x for x in fp4.tolist() if x > 0), 16, rel_tol=1e-6
    )


# --- quantize -----------------------------------------------------------------------------------------------


def test_zero_stays_zero_and_the_largest_weight_of_a_block_is_exact():
    tensor = normal(64 * 50)
    tensor[::7] = 0
    for scheme in ("nf4", "fp4", "int4"):
        restored = quantization.roundtrip(tensor, Quantization(scheme, double_quantization=False))
        assert (restored[::7] == 0).all()
        blocks, back = tensor.view(50, 64), restored.view(50, 64)
        largest = blocks.abs().argmax(dim=1, keepdim=True)
        exact = blocks.gather(1, largest)
        # nf4's -1 and 1 are both levels, so whichever sign the largest weight has, it is kept
        torch.testing.assert_close(back.gather(1, largest), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [64 * 3 + 10, 64 * 3 + 11, 7])
def test_a_last_block_that_is_shorter_has_a_scale_of_its_own(size):
    tensor = normal(size)
    tensor[-(size % 64) :] *= 1e-3
    restored = quantization.roundtrip(tensor, Quantization("nf4", double_quantization=False))
    measured = quantization.quantization_error(tensor[-(size % 64) :], restored[-(size % 64) :])
    assert measured["snr_db"] > 15
    assert restored.shape == (size,)


def test_another_codebook_is_the_one_that_is_used():
    tensor, spec = normal(64 * 4), Quantization("nf4", double_quantization=False)
    restored = quantization.roundtrip(tensor, spec, levels="e2m1")
    levels = quantization.codebook("e2m1") * tensor.view(4, 64).abs().amax(dim=1)[:, None]
    assert (restored.view(4, 64)[..., None] - levels[:, None]).abs().amin(dim=-1).max() < 1e-6
    assert not torch.equal(restored, quantization.roundtrip(tensor, spec))


def test_each_weight_gets_its_nearest_level():
    tensor = normal(64 * 64)
    for name in CODEBOOKS:
        stored = quantization.quantize(tensor, Quantization("nf4", False), levels=name)
        levels = quantization.codebook(name)
        scaled = tensor.view(-1, 64) / stored.scales[:, None]
        best = (scaled[..., None] - levels).abs().amin(dim=-1)
        chosen = (scaled - levels[stored.codes.long()].view(-1, 64)).abs()
        torch.testing.assert_close(chosen, best, rtol=0, atol=1e-6)


def test_shape_and_dtype_survive():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tensor = normal(3, 5, 7).to(dtype)
        for scheme in ("nf4", "fp4", "int4"):
            restored = quantization.roundtrip(tensor, Quantization(scheme))
            assert restored.shape == tensor.shape and restored.dtype == dtype


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_cannot_be_quantized_is_refused(bad):
    tensor = normal(64)
    tensor[3] = bad
    with pytest.raises(KitError, match="NaN or infinity"):
        quantization.quantize(tensor, Quantization())
    with pytest.raises(KitError, match="empty"):
        quantization.quantize(torch.empty(0), Quantization())
    with pytest.raises(KitError, match="nf4, fp4, int4"):
        quantization.quantize(normal(64), Quantization("int8"))
    with pytest.raises(KitError, match="too large"):
        quantization.quantize(torch.full((256,), 3e38), Quantization())


def test_int8_agrees_with_bitsandbytes():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight = normal(48, 96).to(dtype)
        weight[5] = 0
        layer = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
        codes, absmax = quantization.quantize_int8(weight)
        assert torch.equal(codes, layer.data) and torch.equal(absmax, layer.SCB)
    with pytest.raises(KitError, match="matrix"):
        quantization.quantize_int8(normal(64))


# --- bits ---------------------------------------------------------------------------------------------------


def test_bits_per_parameter_are_the_papers():
    assert quantization.bits_per_parameter(Quantization("nf4", double_quantization=False)) == 4.5
    assert round(quantization.bits_per_parameter(Quantization("nf4")), 3) == 4.127
    assert quantization.bits_per_parameter(Quantization("none")) == 32
    assert quantization.bits_per_parameter(Quantization("none"), dtype=torch.bfloat16) == 16
    assert quantization.bits_per_parameter(Quantization("int8"), in_features=128) == 8.25


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("double", [True, False])
def test_computed_bits_are_those_of_the_stored_tensors(block_size, double):
    spec = Quantization("int4", double, block_size)
    stored = quantization.quantize(normal(1024, 1024), spec)
    offset = 32 / 1024**2 if double else 0
    assert stored.bits_per_parameter == pytest.approx(quantization.bits_per_parameter(spec) + offset, abs=1e-12)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(50, 256), "a": nn.Linear(256, 512), "b": nn.Linear(512, 256, bias=False)}
    )
    model["head"] = nn.Linear(256, 3)
    return model


def bnb_layer(layer: nn.Linear, spec: Quantization) -> nn.Module:
    made = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        quant_type=spec.scheme,
        compress_statistics=spec.double_quantization,
    )
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("scheme", ["nf4", "int4"])
def test_storage_is_measured_on_the_real_tensors(scheme, double):
    spec, model = Quantization(scheme, double), small_model()
    if scheme == "int4":
        quantize_linears_(model, spec, ["head"])
    else:
        model["a"], model["b"] = bnb_layer(model["a"], spec), bnb_layer(model["b"], spec)
    measured = quantization.storage(model, ["head"])
    assert measured.linear_parameters == 2 * 256 * 512
    assert measured.bits_per_parameter == pytest.approx(quantization.bits_per_parameter(spec), abs=1e-3)
    others = 50 * 256 + 512 + 3 * 256 + 3
    assert measured.parameters == measured.linear_parameters + others
    assert measured.bytes == measured.linear_bytes + measured.table_bytes + 4 * others
    assert (measured.table_bytes > 0) == (scheme == "nf4")  # bitsandbytes keeps its codebooks in every layer
    # To the byte: whatever a layer holds beside its bias and the codebooks.
    if scheme == "int4":
        held = [tensor for name in "ab" for tensor in model[name].buffers()]
    else:
        packed = [model[name].weight for name in "ab"]
        held = [*packed, *(weight.quant_state.absmax for weight in packed)]
        if double:
            held += [x for weight in packed for x in (weight.quant_state.state2.absmax, weight.quant_state.offset)]
    assert measured.linear_bytes == sum(tensor.numel() * tensor.element_size() for tensor in held)


def test_storage_of_a_plain_and_of_an_int8_model():
    model = small_model()
    plain = quantization.storage(model, ["head"])
    assert plain.bits_per_parameter == 32 == plain.whole_bits_per_parameter
    assert plain.parameters == sum(p.numel() for p in model.parameters())
    layer = bnb.nn.Linear8bitLt(256, 512, has_fp16_weights=False)
    layer.load_state_dict(model["a"].state_dict())
    model["a"] = layer.to("cpu")
    measured = quantization.storage(model, ["head"])
    expected = quantization.bits_per_parameter(Quantization("int8"), in_features=256)
    assert measured.linear_parameters == 256 * 512 and measured.bits_per_parameter == expected
    model["a"](normal(2, 256))  # bitsandbytes moves the scales out of the weight
    assert model["a"].weight.SCB is None and quantization.storage(model, ["head"]) == measured
    with pytest.raises(KitError, match="no linear layer"):
        quantization.storage(nn.Embedding(3, 4))


def test_embeddings_in_4_bits_are_counted_as_the_weights_they_stand_for():
    model = nn.ModuleDict({"x": nn.Linear(64, 64, bias=False)})
    for name, rows in (("words", 3000), ("places", 500)):
        model[name] = bnb.nn.Embedding4bit(rows, 64)
    measured = quantization.storage(model.to("cpu"))
    assert measured.linear_parameters == 64 * 64 and measured.parameters == 64 * 64 + 3500 * 64
    # Half a byte a weight, 4 for the scale of 64, and the codebook of each.
    assert measured.bytes == 4 * 64 * 64 + 3500 * (32 + 4) + 2 * 16 * 4


def test_each_kind_of_linear_layer_is_told_apart_and_others_are_none():
    from transformers.pytorch_utils import Conv1D

    int4 = quantize_linears_(nn.Sequential(nn.Linear(64, 32)), Quantization("int4", False))[0]
    for layer, quantized, size in (
        (nn.Linear(64, 32), False, 4 * 64 * 32),
        (Conv1D(32, 64), False, 4 * 64 * 32),
        (bnb_layer(nn.Linear(64, 32), Quantization("nf4", False)), True, 32 * (32 + 4)),
        (int4, True, 32 * (32 + 4)),
    ):
        found = quantization.linear_storage(layer)
        assert (found.quantized, found.parameters, found.bytes) == (quantized, 64 * 32, size)
    assert quantization.linear_storage(nn.Embedding(3, 4)) is None


def test_a_shared_weight_is_counted_once():
    model = nn.ModuleDict({"embedding": nn.Embedding(30, 64), "x": nn.Linear(64, 64, bias=False)})
    model["out"] = nn.Linear(64, 30, bias=False)
    model["out"].weight = model["embedding"].weight
    assert quantization.storage(model, ["out"]).parameters == 64 * 64 + 30 * 64
    quantization.quantize_weights_(model, Quantization("nf4"))
    assert torch.equal(model["out"].weight, model["embedding"].weight)


# --- error --------------------------------------------------------------------------------------------------


def test_error_measures():
    exact = torch.tensor([3.0, -4.0])
    measured = quantization.quantization_error(exact, exact + torch.tensor([0.0, 1.0]))
    assert measured["mse"] == 0.5 and measured["max"] == 1
    assert measured["snr_db"] == pytest.approx(10 * math.log10(12.5 / 0.5))
    assert quantization.quantization_error(exact, exact)["snr_db"] == math.inf


def test_lloyd_max_is_the_known_optimum():
    """Max (1960), table 1: distortion 0.3634, 0.1175, 0.03454, 0.00950 for 2, 4, 8, 16 levels."""
    for levels, mse in ((2, 0.3634), (4, 0.1175), (8, 0.03454), (16, 0.0095)):
        assert quantization.lloyd_max(levels)[1] == pytest.approx(mse, rel=1e-3)
    best, mse = quantization.lloyd_max(16)
    samples = normal(1_000_000).double()
    nearest = (samples[:, None].float() - torch.tensor(best)).abs().argmin(dim=1)
    measured = (samples - torch.tensor(best, dtype=torch.float64)[nearest]).square().mean()
    assert measured.item() == pytest.approx(mse, rel=0.01)
    with pytest.raises(KitError, match="even"):
        quantization.lloyd_max(15)


def test_order_of_schemes_on_normal_weights():
    """NF4 is best at every block size. bitsandbytes' FP4 is behind the plain integers, whatever its name promises."""
    tensor = normal(2**18)

    def snr(name: str, block_size: int = 64) -> float:
        stored = quantization.quantize(tensor, Quantization("nf4", block_size=block_size), levels=name)
        return quantization.quantization_error(tensor, stored.dequantize())["snr_db"]

    for block_size in (32, 64, 256, 4096):
        assert snr("nf4", block_size) > snr("int4", block_size) > snr("fp4", block_size) - 0.1
    assert snr("nf4") > snr("e2m1") > snr("int4") > snr("fp4") > snr("e3m0")


def test_double_quantization_adds_little_error():
    tensor = normal(2**18)
    once = quantization.roundtrip(tensor, Quantization("nf4", double_quantization=False))
    twice = quantization.roundtrip(tensor, Quantization("nf4"))
    without, with_it = (quantization.quantization_error(tensor, x)["mse"] for x in (once, twice))
    assert 1 < with_it / without < 1.01


def test_an_outlier_spoils_its_block_and_no_other():
    tensor = normal(64 * 4)
    spoilt = tensor.clone()
    spoilt[70] = 100.0
    error = (quantization.roundtrip(spoilt, Quantization("nf4", False)) - spoilt).view(4, 64)
    before = (quantization.roundtrip(tensor, Quantization("nf4", False)) - tensor).view(4, 64)
    assert torch.equal(error[[0, 2, 3]], before[[0, 2, 3]])
    assert error[1].square().sum() > 20 * before[1].square().sum()


# --- a model under it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int4", "int8"])
def test_quantize_weights_leaves_what_the_real_layer_multiplies_with(scheme):
    spec, layer, x = Quantization(scheme), nn.Linear(256, 96, bias=False), normal(4, 256)
    layer.weight.data = normal(96, 256, seed=1)
    if scheme == "int4":
        real = quantize_linears_(nn.Sequential(nn.Linear(256, 96, bias=False)), spec)[0].from_module(layer, spec)
        weight = real.dequantize()
    elif scheme == "int8":
        made = bnb.nn.Linear8bitLt(256, 96, bias=False, has_fp16_weights=False)
        made.load_state_dict(layer.state_dict())
        made = made.to("cpu")
        weight = made.weight.data * made.weight.SCB[:, None] / 127
    else:
        made = bnb_layer(layer, spec)
        weight = bnb.functional.dequantize_4bit(made.weight.data, made.weight.quant_state)
    model = quantization.quantize_weights_(nn.ModuleDict({"x": layer}), spec)
    torch.testing.assert_close(model["x"](x), x @ weight.T, rtol=1e-5, atol=1e-4)


def test_quantize_weights_takes_conv1d_along_the_rows_that_training_takes():
    from transformers.pytorch_utils import Conv1D

    layer, spec = Conv1D(48, 64), Quantization("nf4")
    layer.weight.data = normal(64, 48)
    expected = quantization.roundtrip(layer.weight.data.T, spec).T
    model = quantization.quantize_weights_(nn.ModuleDict({"c": layer, "head": nn.Linear(64, 3)}), spec, ["head"])
    assert torch.equal(model["c"].weight, expected)
    layer.weight.data = normal(64, 48)
    quantization.quantize_weights_(model, spec, ["head"], levels="e2m1")
    assert torch.equal(layer.weight, quantization.roundtrip(normal(64, 48).T, spec, levels="e2m1").T)


def tiny_language_model() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def test_window_losses_are_the_models_own_loss():
    model, ids = tiny_language_model(), torch.randint(0, 64, (100,), generator=torch.Generator().manual_seed(0))
    losses = quantization.window_losses(model, ids, window=32, batch_size=2)
    assert losses.shape == (3,)
    with torch.no_grad():
        expected = [model(input_ids=part[None], labels=part[None]).loss for part in ids[:96].view(3, 32)]
    torch.testing.assert_close(losses, torch.stack(expected).double(), rtol=1e-5, atol=1e-6)
    with pytest.raises(KitError, match="fewer than one window"):
        quantization.window_losses(model, ids[:10], window=32)


def test_perplexity_has_an_interval_and_a_ratio_is_paired():
    hard = torch.linspace(1, 4, 40, dtype=torch.float64)  # windows that differ a lot
    alone = quantization.perplexity(hard)
    assert alone["low"] < alone["value"] < alone["high"]
    assert alone["value"] == pytest.approx(math.exp(2.5))
    ratio = quantization.perplexity(hard + 0.1, hard)  # and a difference that does not
    assert ratio["low"] == pytest.approx(ratio["high"]) == pytest.approx(math.exp(0.1))
    assert quantization.perplexity(hard) == alone


def test_a_ratio_is_put_into_words_as_its_interval_says():
    words = quantization.ratio_in_words
    assert words({"value": 0.943, "low": 0.919, "high": 0.966}) == "ahead by 5.7%"
    assert words({"value": 1.25, "low": 1.2, "high": 1.3}) == "behind by 25.0%"
    for low, high in ((0.893, 1.003), (0.9, 1.0), (1.0, 1.1), (1.0, 1.0)):
        assert words({"value": (low + high) / 2, "low": low, "high": high}) == "not told apart"
