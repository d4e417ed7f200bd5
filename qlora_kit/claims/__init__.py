"""Check the claims of an explanation of QLoRA, sentence by sentence, against measurements.

A claim is a sentence, or half of one, with a rule. The rule reads records (results/, the notebooks' records, run
folders, and values computed from a model's shape and the data) and returns figures, a verdict and the reason for it. No
verdict is stored: if a record changes, the verdict follows. Each claim names its source: the explanation, or the run's
own later report.

Rows are compared only with rows of the same record made on the same device. Each rule documents the evidence that it
prefers: the explained model and its own training step before others. If several devices have that, this machine's
records decide, then GPUs', then CPUs'. The order of rows in a record never matters. Each figure says where it was
measured.

`judging` has figures, verdicts and intervals, `records` reads the records, `rules_...` are the rules, `claims` has the
sentences, `tables` shows verdicts.
"""

from __future__ import annotations

from .arithmetic import compute as compute
from .claims import CLAIMS as CLAIMS
from .claims import MISSING as MISSING
from .claims import QUOTED as QUOTED
from .claims import check as check
from .curves import curves as curves
from .curves import diverged as diverged
from .curves import roughness as roughness
from .curves import spikes as spikes
from .judging import EXPLANATION as EXPLANATION
from .judging import FAILS as FAILS
from .judging import HOLDS as HOLDS
from .judging import IMPLIED as IMPLIED
from .judging import IN_PART as IN_PART
from .judging import NO_MEASUREMENT as NO_MEASUREMENT
from .judging import REPORT as REPORT
from .judging import SAYS as SAYS
from .judging import UNDECIDED as UNDECIDED
from .judging import UNMEASURED as UNMEASURED
from .judging import VERDICTS as VERDICTS
from .judging import Claim as Claim
from .judging import Figure as Figure
from .judging import Finding as Finding
from .judging import Verdict as Verdict
from .judging import by_seed as by_seed
from .judging import in_words as in_words
from .judging import judge_sides as judge_sides
from .judging import seed_interval as seed_interval
from .judging import told_apart as told_apart
from .limits import COLLAPSED as COLLAPSED
from .limits import FEWEST_REPEATS as FEWEST_REPEATS
from .limits import FEWEST_SEEDS as FEWEST_SEEDS
from .limits import HALF as HALF
from .limits import MARGIN as MARGIN
from .limits import ONE_SCORE as ONE_SCORE
from .limits import RELEVANT as RELEVANT
from .limits import SIGNIFICANT as SIGNIFICANT
from .limits import SPIKE as SPIKE
from .records import _RESULTS as _RESULTS
from .records import Records as Records
from .records import _runs as _runs
from .records import find_results as find_results
from .records import of_one_model as of_one_model
from .records import read as read
from .rules_cost import ALL as ALL
from .rules_cost import NF4_BITS as NF4_BITS
from .rules_cost import NF4_BITS_OFF as NF4_BITS_OFF
from .rules_cost import SHARE as SHARE
from .rules_cost import TRAINABLE as TRAINABLE
from .rules_cost import checkpointing as checkpointing
from .rules_cost import counts as counts
from .rules_cost import fits_t4 as fits_t4
from .rules_cost import footprint as footprint
from .rules_cost import paged as paged
from .rules_cost import weights as weights
from .rules_quality import compressed as compressed
from .rules_quality import int4 as int4
from .rules_quality import schemes as schemes
from .rules_quality import stability as stability
from .rules_scores import LABELS as LABELS
from .rules_scores import RATE as RATE
from .rules_scores import SECONDS as SECONDS
from .rules_scores import STEP_OF_BEST as STEP_OF_BEST
from .rules_scores import TEST_F1 as TEST_F1
from .rules_scores import TEST_LOSS as TEST_LOSS
from .rules_scores import TRAIN_ROWS as TRAIN_ROWS
from .rules_scores import loss as loss
from .rules_scores import near as near
from .rules_scores import rows as rows
from .rules_scores import scores as scores
from .rules_time import speed as speed
from .tables import attributed as attributed
from .tables import lines as lines
from .tables import markdown as markdown
from .tables import plans as plans
from .tables import settings as settings
from .tables import table as table
from .tables import to_record as to_record
