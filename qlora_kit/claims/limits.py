"""Fixed thresholds for verdicts, and the explained model, recipe and training step."""

from __future__ import annotations

METHODS = {"qlora": "QLoRA", "lora": "LoRA", "full": "full fine-tuning"}
EXPLAINED = "dialogpt-medium"
"""The explanation's model, by the name of its shape in results/."""
RECIPE = "dialogpt-medium_banking77_recipe"
"""The preset with the explained recipe."""
EXPLAINED_STEP = {"model": EXPLAINED, "batch": 8, "length": 128, "checkpointing": True}
"""The explained recipe's training step, by the keys of results/memory.json."""
MARGIN = 0.005
"""Difference of macro F1 within which two methods count as equal. It is below the 0.006 that fine-tuning gains over a
linear SVM on the frozen states (results/accuracy.json): with a wider band, the SVM would count as equal too."""
ONE_SCORE = 0.01
"""Difference of macro F1 within which two single runs count as the same: about two standard errors of one score on
3,080 rows."""
FEWEST_REPEATS = 5
"""Fewest timings whose range is used; the range of fewer says nothing."""
FEWEST_SEEDS = 3
"""Fewest pairs of seeds for an interval over seeds (with two it is 18 standard errors wide)."""
RELEVANT = 0.05
"""Smallest share of memory or step time that counts as a difference; less is noise or not worth mentioning."""
SIGNIFICANT = 0.1
"""Smallest saving of memory that counts as `significantly lower`: a tenth."""
HALF = 0.5
"""Largest share of the model's weight memory that may remain for `cuts the memory of the weights`."""
SPIKE = 0.1
"""Jump of the loss that counts as a spike: a tenth of the first loss."""
COLLAPSED = 0.1
"""Validation macro F1 below which a training counts as failed."""
