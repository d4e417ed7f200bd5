"""Score and compare classifiers, from logits, labels and predictions alone."""

from .confusions import calibration as calibration
from .confusions import confusions as confusions
from .differences import differences_over_rows_and_seeds as differences_over_rows_and_seeds
from .differences import lead_in_words as lead_in_words
from .differences import paired_difference as paired_difference
from .resampling import MOST_RESAMPLES as MOST_RESAMPLES
from .resampling import RESAMPLES as RESAMPLES
from .scores import METRICS as METRICS
from .scores import KitMetrics as KitMetrics
from .scores import compute_metrics as compute_metrics
from .scores import confusion_matrix as confusion_matrix
from .scores import cross_entropy as cross_entropy
from .scores import metrics as metrics
from .scores import per_label as per_label
from .scores import probabilities as probabilities
from .verdict import BASELINE_NAMES as BASELINE_NAMES
from .verdict import Report as Report
