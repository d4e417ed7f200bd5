"""Check records: compute their figures again from the raw data, and compare them with presets, other rows and commands.

`python -m qlora_kit check` calls `check`; the rules for figures are in `rules_scores` and `rules_cost`.
"""

from .check import check as check
from .record import Report as Report
