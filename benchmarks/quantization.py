"""Measure what each scheme costs in error and in perplexity: results/quantization.json.

    python benchmarks/quantization.py

On two CPU cores it takes most of an hour; what is done is kept in --work, so that it goes on where it was cut off.

Four subjects, each row with its `subject`:

    normal      error on normal samples, by scheme and block size, with Lloyd-Max's and Shannon's limits
    layer       error of every linear layer of MiniLM (never quantized before) and of SmolLM2
    embedding   how far MiniLM's sentence embeddings move
    perplexity  of real text under SmolLM2: Banking77's test questions, and the Python language reference

SmolLM2's weights come from a file that had 4 bits a weight once (Q4_1: blocks of 32, sixteen evenly spaced levels
between each block's smallest and largest). So "unquantized" here means what that file left, and evenly spaced levels
(int4) meet weights that are evenly spaced already. `smoothed` rows take that away: noise as wide as Q4_1's own step
is added first, so that the weights lie on no grid.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from qlora_kit import data, models, quantization, records  # noqa: E402
from qlora_kit.experiment import ModelSpec  # noqa: E402
from qlora_kit.quantization import BLOCK_SIZES, CODEBOOKS, Quantization  # noqa: E402

# name, spec, codebook: the schemes that train, then the paper's and the standards' 4-bit floats
SCHEMES: list[tuple[str, Quantization, str | None]] = [
    ("none", Quantization("none"), None),
    ("int8", Quantization("int8"), None),
    *((name, Quantization(name, double), None) for name in ("nf4", "fp4", "int4") for double in (True, False)),
    ("e2m1", Quantization("nf4", False), "e2m1"),
    ("e3m0", Quantization("nf4", False), "e3m0"),
]
SAMPLES = 2**20
SEEDS = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--subjects", nargs="+", default=["normal", "layer", "embedding", "perplexity"])
    parser.add_argument("--work", default="runs/quantization", help="folder of rows that are done")
    parser.add_argument("--out", default="results/quantization.json")
    options = parser.parse_args()
    subjects: dict[str, Iterator[tuple[str, Callable[[], Iterable[dict[str, Any]]]]]] = {
        "normal": iter([("normal", normal)]),
        "layer": iter([("layer", layers)]),
        "embedding": iter([("embedding", lambda: embeddings(options.device))]),
        "perplexity": perplexities(options.device, options.tokens, options.window),
    }
    rows: list[dict[str, Any]] = []
    for subject in options.subjects:
        for name, measure in subjects[subject]:
            file = Path(options.work) / f"{name}.json"
            if not file.is_file():
                records.write_json(file, list(measure()))
            rows += [{"subject": subject, **row} for row in records.read_json(file)]
            print(f"{name}: done", flush=True)
    compare_perplexities(rows)
    bases = {name: models.find_base(ModelSpec(name)).checksum for name in ("embedded:minilm", "embedded:smollm2-135m")}
    environment = records.environment(options.device, data_checksum=data.banking77().checksum)
    environment["checksums"]["base"] = bases
    result = {
        "schema": records.SCHEMA,
        "environment": environment,
        "command": " ".join(["python benchmarks/quantization.py", *sys.argv[1:]]),
        "rows": rows,
    }
    records.write_json(options.out, result)
    print(f"written: {options.out}")
    return 0


def normal() -> Iterator[dict[str, Any]]:
    """Error on normal samples; the interval is over seeds."""
    for name in CODEBOOKS:
        for double in (True, False):
            for block_size in BLOCK_SIZES:
                spec = Quantization("int4" if name == "int4" else "nf4", double, block_size)
                errors = []
                for seed in range(SEEDS):
                    tensor = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(seed))
                    restored = quantization.roundtrip(tensor, spec, levels=name)
                    errors.append(quantization.quantization_error(tensor, restored))
                snr = [error["snr_db"] for error in errors]
                half = 2.776 * float(np.std(snr, ddof=1)) / math.sqrt(SEEDS)  # Student's t, 4 degrees of freedom
                yield {
                    "scheme": name,
                    "double_quantization": double,
                    "block_size": block_size,
                    "bits_per_parameter": quantization.bits_per_parameter(spec),
                    "mse": float(np.mean([error["mse"] for error in errors])),
                    "max_error": max(error["max"] for error in errors),
                    "snr_db": {"value": float(np.mean(snr)), "low": np.mean(snr) - half, "high": np.mean(snr) + half},
                }
    matrix = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    error = quantization.quantization_error(matrix, quantization.roundtrip(matrix, Quantization("int8")))
    bits = quantization.bits_per_parameter(Quantization("int8"), in_features=1024)
    yield {"scheme": "int8", "bits_per_parameter": bits, **error}
    for levels in (8, 16, 32, 64, 128, 256):
        mse = quantization.lloyd_max(levels)[1]
        yield {
            "scheme": "lloyd_max",
            "bits_per_parameter": math.log2(levels),
            "mse": mse,
            "snr_db": -10 * math.log10(mse),
        }


def layers() -> Iterator[dict[str, Any]]:
    """Error of every linear layer of real weights."""
    for name in ("embedded:minilm", "embedded:smollm2-135m"):
        model = load(name)
        for layer, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear) or layer == "lm_head" or "pooler" in layer:
                continue
            weight = module.weight.data
            for scheme, spec, levels in SCHEMES[1:]:
                if scheme in ("fp4", "int4") and not spec.nested:
                    continue  # what double quantization adds shows with nf4
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


def kurtosis(weight: torch.Tensor) -> float:
    """3 for normal weights, more where outliers are common."""
    centred = weight.double() - weight.double().mean()
    return (centred.pow(4).mean() / centred.square().mean().square()).item()


def load(name: str) -> Any:
    base = models.find_base(ModelSpec(name))
    auto = transformers.AutoModel if name.endswith("minilm") else transformers.AutoModelForCausalLM
    with models.quiet():
        return auto.from_pretrained(base.source, dtype=torch.float32).eval()


def embeddings(device: str, texts: int = 770) -> Iterator[dict[str, Any]]:
    """Move of MiniLM's sentence embeddings (mean of the token states), by cosine, over test questions."""
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
    generator = np.random.default_rng(0)
    for scheme, spec, levels in SCHEMES[1:]:
        moved = embed(quantization.quantize_weights_(copy.deepcopy(plain), spec, ["pooler"], levels=levels))
        distance = (1 - (exact * moved).sum(dim=1)).numpy()
        means = distance[generator.integers(len(distance), size=(2000, len(distance)))].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        yield {
            "model": "embedded:minilm",
            "scheme": scheme,
            "double_quantization": spec.nested,
            "texts": len(questions),
            "cosine_distance": {"value": float(distance.mean()), "low": float(low), "high": float(high)},
        }


def texts() -> dict[str, str]:
    """Real English: customers' questions, shuffled, and the reference that every Python has with it."""
    from pydoc_data.topics import topics

    questions = list(data.banking77().test.texts)
    np.random.default_rng(0).shuffle(questions)
    return {
        "banking77 test questions": "\n".join(questions),
        "python language reference": "\n\n".join(topics[name] for name in sorted(topics)),
    }


def perplexities(device: str, tokens: int, window: int) -> Iterator[tuple[str, Callable[[], Iterable[dict[str, Any]]]]]:
    """Perplexity of each text in each scheme, by the weights it starts from; a unit of work for each."""
    for weights in ("as shipped", "smoothed"):
        for scheme, spec, levels in SCHEMES:
            # on smoothed weights what bears on the grid alone
            if weights == "smoothed" and (scheme in ("int8", "e3m0") or spec.nested):
                continue
            double = "_double" if spec.nested else ""
            unit = f"perplexity_{weights.replace(' ', '_')}_{scheme}{double}_{tokens}_{window}"
            yield unit, functools.partial(read_texts, device, tokens, window, weights, scheme, spec, levels)


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
    """Add how many times the unquantized model's perplexity each row has, and int4's: paired, text by text."""
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
    """Take the weights off Q4_1's grid: uniform noise as wide as each block of 32's step, seeded, in place."""
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            blocks = module.weight.data.view(-1, 32)
            step = (blocks.amax(dim=1) - blocks.amin(dim=1)) / 15
            blocks += (torch.rand(blocks.shape, generator=generator) - 0.5) * step[:, None]
    return model


if __name__ == "__main__":
    sys.exit(main())
