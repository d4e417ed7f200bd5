"""Time a training step of the kit's int4 against bitsandbytes' nf4 under LoRA: results/int4_step.json.

    python benchmarks/int4_step.py --device cuda

Same shape, batch, adapters, dtypes and seeds; steps of the contenders interleaved, so that what the machine does
besides falls on all alike; medians over the repeats. Weights are random, which speed and memory do not depend on.
`step_seconds` is a forward and backward pass and an AdamW step on one batch. On CUDA `device_seconds` is what its
kernels take, without the gaps between them (from the profiler), and `peak_bytes` the most bytes allocated at once,
each contender measured in a process of its own. A row keeps the seconds of each repeat.

Each shape and length is written when it is measured. The same command with `--append` goes on with the ones that are
missing, and `--seconds` ends it before it begins another.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from common import recording
from common.refusals import told_in_a_line

from qlora_kit import models
from qlora_kit.config.quantization import Quantization
from qlora_kit.quantization.int4 import quantize_linears_, register
from qlora_kit.system.environment import environment
from qlora_kit.system.safe_bitsandbytes import keep_weights_as_stored_
from qlora_kit.system.safe_peft import peft

CONTENDERS = {
    "nf4": Quantization("nf4"),
    "int4": Quantization("int4"),
    "nf4, scales in fp32": Quantization("nf4", double_quantization=False),
    "int4, scales in fp32": Quantization("int4", double_quantization=False),
}
SHAPES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "dialogpt-medium": (
        lambda: transformers.GPT2Config(n_layer=24, n_embd=1024, n_head=16, n_positions=1024, use_cache=False),
        ["c_attn", "c_proj"],
    ),
    "smollm2-135m": (
        lambda: transformers.LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, use_cache=False,
        ),
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
    "minilm": (
        lambda: transformers.BertConfig(
            hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
        ),
        ["query", "key", "value", "dense"],
    ),
}  # fmt: skip
KEY = ("device", "model", "precision", "batch", "length", "contender")
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@told_in_a_line
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=None)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lengths", nargs="+", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--precision", choices=PRECISIONS, default=None)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no shape and length after so long")
    parser.add_argument("--out", default="results/int4_step.json")
    recording.add_options(parser)
    parser.add_argument("--memory-of", nargs=3, metavar=("SHAPE", "NAME", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    options.precision = options.precision or ("bf16" if cuda and capable() else "fp16" if cuda else "fp32")
    options.shapes = options.shapes or (["dialogpt-medium", "smollm2-135m"] if cuda else ["minilm"])
    options.lengths = options.lengths or ([32, 128] if cuda else [24])
    options.repeats = options.repeats or (40 if cuda else 15)
    if options.memory_of:
        shape, name, length = options.memory_of
        print(json.dumps(memory(options, shape, name, int(length))))
        return 0
    return measure(options, recording.begin(options))


def measure(options: argparse.Namespace, provenance: recording.Provenance) -> int:
    """Time the missing shapes and lengths, and write each when it is done."""
    here, began = environment(options.device), time.monotonic()
    command = recording.command_line("int4_step.py")
    makes = [
        dict(zip(KEY, (here["device"], shape, options.precision, options.batch, length, name), strict=True))
        for shape in options.shapes
        for length in options.lengths
        for name in CONTENDERS
    ]
    done = recording.done(options.out, command, provenance) if options.append else []
    rows: list[dict[str, Any]] = [row for row in done if {name: row[name] for name in KEY} in makes]
    for shape in options.shapes:
        for length in options.lengths:
            of_field = [row for row in rows if (row["model"], row["length"]) == (shape, length)]
            if len(of_field) == len(CONTENDERS):
                print(f"{shape} length {length}: there already", flush=True)
                continue
            if time.monotonic() - began > options.seconds:
                print(f"out of time before {shape} length {length}: the same command again goes on", file=sys.stderr)
                return 1
            # An incomplete comparison is timed again as a whole, because its contenders are compared with each other.
            rows = [row for row in rows if row not in of_field]
            for row in compare(options, shape, length):
                rows.append(provenance.stamped(row, here))
                recording.write(
                    options.out,
                    rows,
                    provenance=provenance,
                    command=command,
                    makes=makes,
                    key=KEY,
                    append=options.append,
                )
    print(f"written: {options.out}")
    return 0


def capable() -> bool:
    return models.bf16_in_hardware(torch.cuda.get_device_capability())


def build(options: argparse.Namespace, shape: str, spec: Quantization) -> torch.nn.Module:
    """Return a shape's classifier with seeded random weights, quantized, with LoRA of rank 16."""
    make, targets = SHAPES[shape]
    config, dtype = make(), PRECISIONS[options.precision]
    config.num_labels, config.pad_token_id = 77, 0
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    heads = models.head_modules(model)
    model = model.to(dtype).to(options.device)  # bitsandbytes quantizes on the weight's device
    if spec.scheme == "int4":
        quantize_linears_(model, spec, heads, dtype)
    else:
        models.quantize_with_bitsandbytes_(model, spec, heads, dtype)
    for head in heads:
        model.get_submodule(head).float()
    lora = peft.LoraConfig(
        task_type="SEQ_CLS", r=16, lora_alpha=32, lora_dropout=0.1, target_modules=targets, modules_to_save=heads,
        exclude_modules=[f"{head}.*" for head in heads] if shape == "minilm" else None,
    )  # fmt: skip
    model = peft.get_peft_model(model, register(lora)).to(options.device).train()
    return keep_weights_as_stored_(model)


def step_of(options: argparse.Namespace, model: torch.nn.Module, length: int) -> Callable[[], None]:
    """Return a function that does one training step on a fixed batch."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 1000, (options.batch, length), generator=generator).to(options.device)
    labels = torch.randint(0, 77, (options.batch,), generator=generator).to(options.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    dtype = PRECISIONS[options.precision]

    def step() -> None:
        with torch.autocast(options.device, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def compare(options: argparse.Namespace, shape: str, length: int) -> Iterator[dict[str, Any]]:
    steps = {name: step_of(options, build(options, shape, spec), length) for name, spec in CONTENDERS.items()}
    for step in steps.values():
        for _ in range(3):
            step()
    wall: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(options.repeats):
        for name in list(steps) if repeat % 2 else list(reversed(steps)):
            wall[name].append(timed(steps[name], options.device))
    device = {name: kernel_seconds(step) if options.device == "cuda" else None for name, step in steps.items()}
    for name in steps:
        row = {
            "model": shape,
            "contender": name,
            "scheme": CONTENDERS[name].scheme,
            "double_quantization": CONTENDERS[name].double_quantization,
            "precision": options.precision,
            "batch": options.batch,
            "length": length,
            "step_seconds": statistics.median(wall[name]),
            "step_seconds_quartiles": quartiles(wall[name]),
            "device_seconds": device[name],
            "times_nf4": statistics.median(wall[name]) / statistics.median(wall["nf4"]),
            "repeats": options.repeats,
            "repeats_seconds": wall[name],
            "device": environment(options.device)["device"],
            **measured_apart(options, shape, name, length),
        }
        peak = f", peak {row['peak_bytes'] / 2**20:.1f} MiB" if row["peak_bytes"] else ""
        kernels = f", kernels {1e3 * row['device_seconds']:.2f} ms" if row["device_seconds"] else ""
        step_ms, times = 1e3 * row["step_seconds"], row["times_nf4"]
        print(f"{shape} length {length} {name}: {step_ms:.2f} ms, {times:.3f} of nf4's{kernels}{peak}", flush=True)
        yield row


def quartiles(seconds: list[float]) -> list[float]:
    """Return the first and the third quartile; a single value is both."""
    return statistics.quantiles(seconds, n=4)[::2] if len(seconds) > 1 else seconds * 2


def timed(step: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def kernel_seconds(step: Callable[[], None], steps: int = 5) -> float:
    """Return the summed time of a step's kernels on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / steps


def measured_apart(options: argparse.Namespace, shape: str, name: str, length: int) -> dict[str, Any]:
    """Return one contender's peak memory from a new process; None on a CPU, which has no such counter."""
    if options.device == "cpu":
        return {"peak_bytes": None, "model_bytes": None}
    command = [sys.executable, __file__, "--device", "cuda", "--batch", str(options.batch)]
    command += ["--precision", options.precision, "--memory-of", shape, name, str(length)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return found


def memory(options: argparse.Namespace, shape: str, name: str, length: int) -> dict[str, Any]:
    model = build(options, shape, CONTENDERS[name])
    torch.cuda.synchronize()
    step = step_of(options, model, length)
    stored = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    return {"peak_bytes": torch.cuda.max_memory_allocated(), "model_bytes": stored}


if __name__ == "__main__":
    sys.exit(main())
