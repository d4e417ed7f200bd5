"""The int4 layer on CUDA: the kernel against the plain version, training, and CUDA graphs."""

from __future__ import annotations

import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import qlora_kit as qk
from qlora_kit import models, quantization
from qlora_kit.config.quantization import BLOCK_SIZES, Quantization
from qlora_kit.quantization.bitsandbytes import dequantized
from qlora_kit.quantization.int4 import Int4Linear, dequantize, quantize_linears_, register, triton_kernel
from qlora_kit.quantization.packed import dequantize_plain
from qlora_kit.system.safe_bitsandbytes import bnb

pytestmark = pytest.mark.gpu


def stored(rows: int, columns: int, spec: Quantization) -> Int4Linear:
    layer = nn.Linear(columns, rows)
    layer.weight.data = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return Int4Linear.from_module(layer, spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_kernel_gives_the_plain_versions_bits(block_size, double, dtype):
    for rows, columns in ((1, 1), (3, 7), (64, 64), (65, 63), (300, 1000), (1024, 1024)):
        layer = stored(rows, columns, Quantization("int4", double, block_size))
        on_cpu = layer.dequantize(dtype)
        layer = layer.to("cuda")
        kernel = dequantize(layer.stored, dtype).cpu().view(rows, columns)
        plain = dequantize_plain(layer.stored, dtype).cpu().view(rows, columns)
        assert torch.equal(plain, on_cpu)
        assert torch.equal(kernel, on_cpu)


def test_the_kernel_is_what_layers_use():
    assert triton_kernel() is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_the_kernel_gives_bitsandbytes_bits(scheme, double, dtype):
    for rows, columns in ((64, 64), (130, 64), (300, 1000), (1024, 4096)):
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).cuda()
        packed, state = bnb.functional.quantize_4bit(weight, quant_type=scheme, compress_statistics=double)
        state.dtype = dtype
        theirs = bnb.functional.dequantize_4bit(packed, state)
        assert torch.equal(dequantized(packed, state, dtype), theirs)


def test_quantizing_on_the_gpu_gives_the_cpus_codes():
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    for scheme in ("nf4", "fp4", "int4"):
        spec = Quantization(scheme, double_quantization=False)
        cpu, gpu = quantization.quantize(weight, spec), quantization.quantize(weight.cuda(), spec)
        assert torch.equal(gpu.packed.cpu(), cpu.packed) and torch.equal(gpu.absmax.cpu(), cpu.absmax)


def test_forward_and_gradient_match_a_plain_layer():
    layer = stored(512, 256, Quantization("int4")).to("cuda")
    layer.compute_dtype = torch.float16
    plain = layer.to_full_precision(torch.float32)
    x = torch.randn(8, 16, 256, device="cuda", requires_grad=True)
    weights = torch.randn(8, 16, 512, device="cuda")
    result, expected = layer(x), plain(x)
    torch.testing.assert_close(result, expected, rtol=1e-2, atol=0.1)
    (mine,) = torch.autograd.grad((result * weights).sum(), x)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_trains_under_lora_with_autocast(dtype):
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no bf16 in this GPU's hardware")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).cuda()
    model = quantize_linears_(model, Quantization("int4"), (), dtype)
    model = get_peft_model(model, register(LoraConfig(r=8, lora_alpha=16, target_modules=["0", "2"])))
    x, y = torch.randn(32, 64, device="cuda"), torch.randn(32, 64, device="cuda")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        with torch.autocast("cuda", dtype):
            loss = nn.functional.mse_loss(model(x).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_pretrained_base_is_never_whole_on_the_gpu():
    held, most = {}, {}
    for scheme in ("none", "int4"):
        gc.collect()  # a model that is let go refers to itself
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        experiment = qk.preset("minilm_banking77_qlora").override({"quantization.scheme": scheme})
        # Without a pad token it is not probed, for which cuBLAS would take memory of its own.
        model = models.build(experiment, ["a", "b"], device=torch.device("cuda"))
        held[scheme] = torch.cuda.memory_allocated() - before
        most[scheme] = torch.cuda.max_memory_allocated() - before
        del model
    # More than it keeps is one layer alone: the largest has 1536 x 384 weights, and its codes are made in a few passes.
    assert held["int4"] < held["none"] - 10 * 2**20
    assert most["int4"] < held["int4"] + 8 * 4 * 1536 * 384
    assert most["int4"] < held["none"]


def test_it_can_be_captured_in_a_cuda_graph():
    layer = stored(256, 256, Quantization("int4")).to("cuda")
    layer.compute_dtype = torch.float16
    x = torch.randn(8, 256, device="cuda", requires_grad=True)
    fresh = torch.randn(8, 256, device="cuda", requires_grad=True)
    eager = layer(fresh).detach()
    callable_layer = torch.cuda.make_graphed_callables(layer, (x,))
    torch.testing.assert_close(callable_layer(fresh), eager, rtol=1e-3, atol=1e-2)
    callable_layer(fresh).sum().backward()
    assert fresh.grad is not None


def test_backward_memory_is_that_of_one_dequantized_layer():
    size, layers = 2048, 8
    model = nn.Sequential(*(stored(size, size, Quantization("int4")) for _ in range(layers))).cuda()
    for layer in model:
        layer.compute_dtype = torch.float16
    x = torch.randn(4, size, device="cuda", dtype=torch.float16, requires_grad=True)
    model(x).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(x).sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 2.5 * 2 * size * size  # all of them in 16 bits would be 8 times 2 * size * size
