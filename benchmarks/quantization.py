"""Measure what each scheme costs in error and in perplexity: results/quantization.json.

    python benchmarks/quantization.py

On two CPU cores it takes most of an hour; what is done is kept in --work, so that it goes on where it was cut off, and
`--seconds` cuts it off by itself.

Four subjects, each row with its `subject`:

    normal      error on normal samples, by scheme and block size, with Lloyd-Max's and Shannon's limits
    layer       error of every linear layer of MiniLM (never quantized before) and of SmolLM2
    embedding   how far MiniLM's sentence embeddings move
    perplexity  of real text under SmolLM2: Banking77's test questions, and the Python language reference

SmolLM2's weights come from a file that had 4 bits a weight once (Q4_1: blocks of 32, sixteen evenly spaced levels
between each block's smallest and largest). So "unquantized" here means what that file left, and evenly spaced levels
(int4) meet weights that are evenly spaced already. `smoothed` rows take that away: noise as wide as Q4_1's own step
is added first, so that the weights lie on no grid.

Rows keep what they were computed from, where that is small: the value of each draw, the distance of each text, the loss
of each window. Errors of layers are of weights that are too many to keep.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from common import recording
from common.refusals import told_in_a_line

from qlora_kit import claims, data, models, quantization
from qlora_kit.checking import packing
from qlora_kit.checking.record import mean_with_interval
from qlora_kit.config.quantization import BLOCK_SIZES, Quantization
from qlora_kit.config.sections import ModelSpec
from qlora_kit.quantization.codebooks import CODEBOOKS
from qlora_kit.system.environment import environment
from qlora_kit.system.files import write_json
from qlora_kit.system.parsing import read_json

# name, spec, codebook: the schemes for training, then the 4-bit floats of the paper and of standards
SCHEMES: list[tuple[str, Quantization, str | None]] = [
    ("none", Quantization("none"), None),
    ("int8", Quantization("int8"), None),
    *((name, Quantization(name, double), None) for name in ("nf4", "fp4", "int4") for double in (True, False)),
    ("e2m1", Quantization("nf4", False), "e2m1"),
    ("e3m0", Quantization("nf4", False), "e3m0"),
]
KEY = ("subject", "model", "weights", "text", "layer", "scheme", "double_quantization", "block_size", "levels")
SAMPLES = 2**20
SEEDS = 5
LLOYD_MAX = (8, 16, 32, 64, 128, 256)
BASES = ("embedded:minilm", "embedded:smollm2-135m")
TEXTS = ("banking77 test questions", "python language reference")


@told_in_a_line
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--subjects", nargs="+", default=["normal", "layer", "embedding", "perplexity"])
    parser.add_argument("--work", default="runs/quantization", help="folder of rows that are done")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no part after so long")
    parser.add_argument("--out", default="results/quantization.json")
    recording.add_options(parser)
    options = parser.parse_args()
    return measure(options, recording.begin(options))


def measure(options: argparse.Namespace, provenance: recording.Provenance) -> int:
    """Measure the missing parts, and write all that are done."""
    began, complete = time.monotonic(), True
    subjects: dict[str, Iterator[tuple[str, Callable[[], Iterable[dict[str, Any]]]]]] = {
        "normal": iter([("normal", normal)]),
        "layer": iter([("layer", layers)]),
        "embedding": iter([("embedding", lambda: embeddings(options.device))]),
        "perplexity": perplexities(options.device, options.tokens, options.window),
    }
    bases = {name: models.find_base(ModelSpec(name)).checksum for name in BASES}
    here = environment(options.device, data_checksum=data.banking77().checksum)
    here["checksums"]["base"] = bases
    rows: list[dict[str, Any]] = []
    for subject in options.subjects:
        for name, make in subjects[subject]:
            file = Path(options.work) / f"{name}.json"
            part = read_json(file) if file.is_file() else []
            if not (part and provenance.takes(part[0])):
                if time.monotonic() - began > options.seconds:
                    complete = False
                    continue
                part = [recording.stamped({"subject": subject, **row}, here) for row in make()]
                write_json(file, part)
            rows += part
            print(f"{name}: done", flush=True)
    if not complete:
        print("out of time: the same command again goes on", file=sys.stderr)
    compare_perplexities(rows)
    recording.write(
        options.out,
        rows,
        provenance=provenance,
        command=recording.command_line("quantization.py"),
        makes=keys(options.subjects),
        key=KEY,
        append=options.append,
    )
    print(f"written: {options.out}")
    return 0 if complete else 1


def keys(subjects: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the key of each row to be measured, without measuring."""
    nothing = dict.fromkeys(KEY)
    if "normal" in subjects:
        normal_row = {**nothing, "subject": "normal"}
        for name, double, block_size in itertools.product(CODEBOOKS, (True, False), BLOCK_SIZES):
            yield {**normal_row, "scheme": name, "double_quantization": double, "block_size": block_size}
        yield {**normal_row, "scheme": "int8"}
        for levels in LLOYD_MAX:
            yield {**normal_row, "scheme": "lloyd_max", "levels": levels}
    if "layer" in subjects:
        for name in BASES:
            for layer, _ in linear_layers(load(name)):
                for scheme, spec, _ in layer_schemes():
                    about = {"subject": "layer", "model": name, "layer": layer}
                    yield {**nothing, **about, "scheme": scheme, "double_quantization": spec.nested}
    if "embedding" in subjects:
        for scheme, spec, _ in SCHEMES[1:]:
            about = {"subject": "embedding", "model": BASES[0]}
            yield {**nothing, **about, "scheme": scheme, "double_quantization": spec.nested}
    if "perplexity" in subjects:
        for weights, (scheme, spec, _) in read_schemes():
            for text in TEXTS:
                about = {"subject": "perplexity", "model": BASES[1], "weights": weights, "text": text}
                yield {**nothing, **about, "scheme": scheme, "double_quantization": spec.nested}


def normal() -> Iterator[dict[str, Any]]:
    """Yield rows of errors on normal samples; the interval is over seeds."""
    for name in CODEBOOKS:
        for double in (True, False):
            for block_size in BLOCK_SIZES:
                spec = Quantization("int4" if name == "int4" else "nf4", double, block_size)
                errors = []
                for seed in range(SEEDS):
                    tensor = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(seed))
                    restored = quantization.roundtrip(tensor, spec, levels=name)
                    errors.append(quantization.quantization_error(tensor, restored))
                draws = {key: [error[key] for error in errors] for key in ("snr_db", "mse", "max")}
                yield {
                    "scheme": name,
                    "double_quantization": double,
                    "block_size": block_size,
                    "bits_per_parameter": quantization.bits_per_parameter(spec),
                    "mse": float(np.mean(draws["mse"])),
                    "max_error": max(draws["max"]),
                    "snr_db": claims.seed_interval(draws["snr_db"]),
                    "draws": draws,
                }
    matrix = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    error = quantization.quantization_error(matrix, quantization.roundtrip(matrix, Quantization("int8")))
    bits = quantization.bits_per_parameter(Quantization("int8"), in_features=1024)
    yield {"scheme": "int8", "bits_per_parameter": bits, **error}
    for levels in LLOYD_MAX:
        mse = quantization.lloyd_max(levels)[1]
        yield {
            "scheme": "lloyd_max",
            "levels": levels,
            "bits_per_parameter": math.log2(levels),
            "mse": mse,
            "snr_db": -10 * math.log10(mse),
        }


def layers() -> Iterator[dict[str, Any]]:
    """Yield rows of errors of every linear layer, with real weights."""
    for name in BASES:
        for layer, module in linear_layers(load(name)):
            weight = module.weight.data
            for scheme, spec, levels in layer_schemes():
                error = quantization.quantization_error(weight, quantization.roundtrip(weight, spec, levels=levels))
                yield {
                    "model": name,
                    "layer": layer,
                    "scheme": scheme,
                    "double_quantization": spec.nested,
                    "parameters": weight.numel(),
                    "kurtosis": kurtosis(weight),
                    **error,
                }


def linear_layers(model: Any) -> Iterator[tuple[str, torch.nn.Linear]]:
    for layer, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and layer != "lm_head" and "pooler" not in layer:
            yield layer, module


def layer_schemes() -> list[tuple[str, Quantization, str | None]]:
    """Return the schemes to measure by layer; only nf4 is measured without double quantization too."""
    return [entry for entry in SCHEMES[1:] if entry[0] not in ("fp4", "int4") or entry[1].nested]


def kurtosis(weight: torch.Tensor) -> float:
    """Return the kurtosis: 3 for normal weights, more if outliers are common."""
    centred = weight.double() - weight.double().mean()
    return (centred.pow(4).mean() / centred.square().mean().square()).item()


def load(name: str) -> Any:
    base = models.find_base(ModelSpec(name))
    auto = transformers.AutoModel if name.endswith("minilm") else transformers.AutoModelForCausalLM
    with models.quiet():
        return auto.from_pretrained(base.source, dtype=torch.float32).eval()


def embeddings(device: str, texts: int = 770) -> Iterator[dict[str, Any]]:
    """Yield rows of how far MiniLM's sentence embeddings (means of token states) of test questions move, by cosine."""
    tokenizer = models.load_tokenizer(ModelSpec("embedded:minilm"))
    plain = load("embedded:minilm")
    questions = list(data.banking77().test.texts[::4][:texts])
    batches = [
        tokenizer(questions[i : i + 77], padding=True, return_tensors="pt") for i in range(0, len(questions), 77)
    ]

    def embed(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            parts = []
            for batch in batches:
                moved = {key: value.to(device) for key, value in batch.items()}
                states = model.to(device)(**moved).last_hidden_state
                parts.append(models.mean_pool(states, moved["attention_mask"]).cpu())
        return torch.nn.functional.normalize(torch.cat(parts).double(), dim=1)

    exact = embed(plain)
    for scheme, spec, levels in SCHEMES[1:]:
        moved = embed(quantization.quantize_weights_(copy.deepcopy(plain), spec, ["pooler"], levels=levels))
        distance = (1 - (exact * moved).sum(dim=1)).numpy()
        yield {
            "model": "embedded:minilm",
            "scheme": scheme,
            "double_quantization": spec.nested,
            "texts": len(questions),
            "cosine_distance": mean_with_interval(distance),
            "distances": packing.pack(distance, "f8"),
        }


def texts() -> dict[str, str]:
    """Return real English texts: customers' questions, shuffled, and the language reference that comes with Python."""
    from pydoc_data.topics import topics

    questions = list(data.banking77().test.texts)
    np.random.default_rng(0).shuffle(questions)
    reference = "\n\n".join(topics[name] for name in sorted(topics))
    return dict(zip(TEXTS, ("\n".join(questions), reference), strict=True))


def perplexities(device: str, tokens: int, window: int) -> Iterator[tuple[str, Callable[[], Iterable[dict[str, Any]]]]]:
    """Yield a unit of work for each scheme and kind of weights: it measures the perplexity of each text."""
    for weights, (scheme, spec, levels) in read_schemes():
        double = "_double" if spec.nested else ""
        unit = f"perplexity_{weights.replace(' ', '_')}_{scheme}{double}_{tokens}_{window}"
        yield unit, functools.partial(read_texts, device, tokens, window, weights, scheme, spec, levels)


def read_schemes() -> Iterator[tuple[str, tuple[str, Quantization, str | None]]]:
    """Yield the kind of weights that a scheme is applied to, and the scheme."""
    for weights in ("as shipped", "smoothed"):
        for scheme, spec, levels in SCHEMES:
            # on smoothed weights, only the schemes that matter for the question of the grid
            if weights == "as shipped" or not (scheme in ("int8", "e3m0") or spec.nested):
                yield weights, (scheme, spec, levels)


def read_texts(
    device: str, tokens: int, window: int, weights: str, scheme: str, spec: Quantization, levels: str | None
) -> Iterator[dict[str, Any]]:
    name = "embedded:smollm2-135m"
    tokenizer = models.load_tokenizer(ModelSpec(name))
    model = load(name)
    if weights == "smoothed":
        smooth(model)
    quantization.quantize_weights_(model, spec, ["lm_head"], levels=levels).to(device)
    for text, content in texts().items():
        ids = torch.tensor(tokenizer(content)["input_ids"][:tokens])
        losses = quantization.window_losses(model, ids, window=window)
        yield {
            "model": name,
            "weights": weights,
            "text": text,
            "scheme": scheme,
            "double_quantization": spec.nested,
            "tokens": len(losses) * window,
            "window": window,
            "perplexity": quantization.perplexity(losses),
            "window_losses": losses.tolist(),
        }


def compare_perplexities(rows: list[dict[str, Any]]) -> None:
    """Add to each row the ratios of its perplexity to the unquantized model's and to int4's, paired by text."""
    found = {
        (row["weights"], row["text"], row["scheme"]): torch.tensor(row["window_losses"], dtype=torch.float64)
        for row in rows
        if row["subject"] == "perplexity" and not row["double_quantization"]
    }
    for row in rows:
        if row["subject"] == "perplexity":
            losses = torch.tensor(row["window_losses"], dtype=torch.float64)
            for name, scheme in (("ratio", "none"), ("ratio_to_int4", "int4")):
                against = found.get((row["weights"], row["text"], scheme))
                if against is not None:
                    row[name] = quantization.perplexity(losses, against)


def smooth(model: Any) -> Any:
    """Move the weights off Q4_1's grid in place: add seeded uniform noise as wide as the step of each block of 32."""
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            blocks = module.weight.data.view(-1, 32)
            step = (blocks.amax(dim=1) - blocks.amin(dim=1)) / 15
            blocks += (torch.rand(blocks.shape, generator=generator) - 0.5) * step[:, None]
    return model


if __name__ == "__main__":
    sys.exit(main())
