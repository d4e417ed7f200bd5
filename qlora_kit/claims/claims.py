"""The sentences, each with its rule."""

from __future__ import annotations

from . import rules_cost as cost
from . import rules_quality as quality
from . import rules_scores as scores
from . import rules_time as time
from .judging import EXPLANATION, IMPLIED, REPORT, Claim, Verdict
from .records import Records

CLAIMS = (
    Claim(
        1, "size",
        "4,404,224 of 359,306,240 parameters are trained (1.2258%), with r=16, alpha=32 on c_attn and c_proj.",
        "The two numbers say which layers have adapters and whether the head is trained.", cost.counts,
    ),
    Claim(
        2, "memory", "NF4 with double quantization cuts the memory of the weights.",
        "Only linear layers are quantized: how much of the model are they?", cost.weights,
    ),
    Claim(
        3, "memory", "The memory footprint is significantly lower ...",
        "A saving, of the whole training step.", cost.footprint, "a",
    ),
    Claim(
        3, "memory", "... because about 1.23% of the parameters are trainable.",
        "A cause, and LoRA has the same trainable share.", cost.cause, "b",
    ),
    Claim(
        4, "speed", "QLoRA trains faster than LoRA.",
        "Weights in 4 bits have to be unpacked at every use.", time.speed,
    ),
    Claim(
        5, "memory", "Standard LoRA might not fit a T4.",
        "If it fits, memory is no reason for QLoRA at this size; from which size on is it?", cost.fits_t4,
    ),
    Claim(
        6, "schemes", "NF4 is better than int4 for normally distributed weights ...",
        "Better by the error of such weights.", quality.schemes, "a",
    ),
    Claim(
        6, "schemes", "... and so it serves a model and its task better.",
        "Which is why one would choose it: perplexity, and macro F1 after fine-tuning.", quality.schemes_in_use, "b",
        IMPLIED,
    ),
    Claim(
        7, "schemes", "int4 is an option beside NF4.",
        "Who sets it in bitsandbytes' configuration should get it, or an error.", quality.int4,
    ),
    Claim(
        8, "stability", "Double quantization improves stability.",
        "It rounds the scales once more, which can only add error.", quality.stability,
    ),
    Claim(
        9, "memory", "Paged optimizers handle large models.",
        "They page optimizer state, and adapters have little of it.", cost.paged,
    ),
    Claim(
        10, "memory", "Gradient checkpointing reduces memory.",
        "It gives up activations, which are not always what the peak is made of.", cost.checkpointing,
    ),
    Claim(
        11, "accuracy", "Validation F1 is about 0.91 at step 7,200.",
        "A step and a score should come from one run.", scores.validation_score, "a",
    ),
    Claim(
        11, "accuracy",
        "Test accuracy is 0.9351 and F1 0.9350 after 4 epochs in 1,568 s on a T4 (20.4 samples/s, batch 8, learning "
        "rate 4.62e-4, weight decay 0.0905, 389 warm-up steps).",
        "A rate, a time and a score should come from one run, and from the one that is explained.", scores.scores, "b",
        REPORT,
    ),
    Claim(
        12, "accuracy", "The test loss is 4.155.",
        "A classifier that is right nine times in ten cannot be as surprised as one that guesses.", scores.loss,
    ),
    Claim(
        13, "bookkeeping", "There are 9,002 training samples and 77 labels.",
        "Every count of steps follows from it.", scores.rows,
    ),
    Claim(
        14, "pictures", "The sticky notes (the adapters) are what is compressed.",
        "Which part is stored in 4 bits is what QLoRA is.", quality.compressed,
    ),
    Claim(
        15, "accuracy", "Quantization keeps near full-precision performance.",
        "It is the reason to use QLoRA at all, and needs more than one seed.", scores.near,
    ),
    Claim(
        16, "size", "Only A and B are updated.",
        "A classifier has a head, and an untrained head classifies nothing.", cost.updated,
    ),
    Claim(
        17, "size", "An adapter adds B·A·x to its layer's output.",
        "Alpha is among the settings, and in this formula it does nothing.", quality.factor,
    ),
    Claim(
        18, "accuracy", "LoRA is slightly better in some cases.",
        "A slight difference takes many seeds to be seen.", scores.lora_ahead,
    ),
    Claim(
        19, "speed", "fp16 optimizes computation.",
        "A T4 has fast units for it, and training keeps part of its numbers in fp32 all the same.", time.half_precision,
    ),
    Claim(
        20, "speed", "Paged optimizers make training faster.",
        "They move state where memory runs out; to move is work.", time.paging_time,
    ),
    Claim(
        21, "stability", "NF4 gives numerical stability.",
        "It is a coarser storage; what could become calmer by it?", quality.numerics,
    ),
    Claim(
        22, "pictures", "There is a special index.",
        "It is not said of what.", quality.special_index,
    ),
    Claim(
        23, "pictures", "Its memory is like a brain's.",
        "A picture, which readers take along.", quality.picture,
    ),
)  # fmt: skip

QUOTED = (
    ("quantization.scheme", "nf4", EXPLANATION),
    ("quantization.double_quantization", True, EXPLANATION),
    ("lora.r", 16, EXPLANATION),
    ("lora.alpha", 32, EXPLANATION),
    ("lora.dropout", 0.1, EXPLANATION),
    ("lora.target_modules", ("c_attn", "c_proj"), EXPLANATION),
    ("lora.bias", "none", EXPLANATION),
    ("model.pooling", "sequence_classification", EXPLANATION),
    ("data.max_length", 128, EXPLANATION),
    ("training.padding", "max_length", EXPLANATION),
    ("training.gradient_checkpointing", True, EXPLANATION),
    ("training.precision", "fp16", EXPLANATION),
    ("training.optimizer", "paged_adamw_8bit", EXPLANATION),
    ("training.batch_size", 8, REPORT),
    ("training.epochs", 4, REPORT),
    ("training.learning_rate", 4.62e-4, REPORT),
    ("training.weight_decay", 0.0905, REPORT),
    ("training.warmup_steps", 389, REPORT),
)
"""Settings of the explained run, by their names in an experiment, with their source. PEFT's task type `SEQ_CLS` is
`model.pooling: sequence_classification` here."""

MISSING = (
    ("a pad token", "GPT-2 has none: batches of more than one text fail, or the wrong token is pooled"),
    ("a head that stays whole", "transformers may store the fresh head in 4 bits, and then it cannot be trained"),
    ("a head that is saved", "PEFT saves adapters alone unless the head is among modules_to_save"),
    ("trained weights in fp32", "in fp16 the gradients cannot be unscaled: an error at the first step"),
    ("the name of the labels", "PEFT hides it from the Trainer, which then has no validation loss"),
    ("how checkpointing is done", "use_reentrant is set back by the Trainer unless it is among its own arguments"),
    ("which rows are for validation", "9,002 of 10,003 leave 1,001; the later report's rate fits a split of 8,002"),
    ("a seed", "without one nobody gets the same scores"),
)
"""What a run needs but the quoted settings do not say, and what goes wrong without it. The kit sets each."""


def check(records: Records) -> list[Verdict]:
    """Judge every claim.

    Args:
        records: See `read`.

    Returns:
        A verdict for each claim, in the order of `CLAIMS`.
    """
    return [Verdict(claim, claim.rule(records)) for claim in CLAIMS]
