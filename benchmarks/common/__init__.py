"""Shared code of the benchmarks: records and their provenance, processes, and refusals.

A benchmark imports this package first, so that the clone's own `qlora_kit` is measured.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
