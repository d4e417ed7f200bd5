"""Log runs to trackers, in addition to their folders: W&B, and by choice TensorBoard, MLflow and trackio.

The log must never cost a run. So whatever fails here while a run trains or is tested gives one warning, and the run
goes on without its log. The only errors come before training: if a tracker's package is not here, or if W&B was to be
`online` and opens no run.
"""

from .others import guard_others as guard_others
from .others import refuse_absent as refuse_absent
from .others import reporting as reporting
from .weights_and_biases import FILE as FILE
from .weights_and_biases import RESUMES_OFFLINE as RESUMES_OFFLINE
from .weights_and_biases import guard_callback as guard_callback
from .weights_and_biases import log_test as log_test
from .weights_and_biases import log_validation as log_validation
from .weights_and_biases import may_quote as may_quote
from .weights_and_biases import opened as opened
from .weights_and_biases import read_note as read_note
from .weights_and_biases import wandb_mode as wandb_mode
