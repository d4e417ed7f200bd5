"""Evaluate a run: metrics with intervals, baselines on the same rows, typical errors.

A score on a few thousand rows is an estimate: with 3,080 rows an accuracy of 0.93 has a standard error of 0.0045. So
every metric has a 95% interval, and classifiers are compared on the same resampled rows. Functions that need only
logits and labels are in `metrics`.
"""

# Must come first: nothing may import PEFT or bitsandbytes before it.
from ..system import safe_peft as safe_peft  # isort: skip
from ..metrics.confusions import calibration as calibration
from ..metrics.confusions import confusions as confusions
from ..metrics.differences import differences_over_rows_and_seeds as differences_over_rows_and_seeds
from ..metrics.differences import lead_in_words as lead_in_words
from ..metrics.differences import paired_difference as paired_difference
from ..metrics.resampling import MOST_RESAMPLES as MOST_RESAMPLES
from ..metrics.resampling import RESAMPLES as RESAMPLES
from ..metrics.scores import METRICS as METRICS
from ..metrics.scores import KitMetrics as KitMetrics
from ..metrics.scores import compute_metrics as compute_metrics
from ..metrics.scores import confusion_matrix as confusion_matrix
from ..metrics.scores import cross_entropy as cross_entropy
from ..metrics.scores import metrics as metrics
from ..metrics.scores import per_label as per_label
from ..metrics.scores import probabilities as probabilities
from ..metrics.verdict import BASELINE_NAMES as BASELINE_NAMES
from ..metrics.verdict import Report as Report
from ..metrics.verdict import verdict as verdict
from .baselines import BASELINE_C as BASELINE_C
from .baselines import baselines as baselines
from .comparing import compare_runs as compare_runs
from .report import data_of as data_of
from .report import evaluate as evaluate
