"""How OpenMP's threads wait, as its runtime itself says at its start."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from qlora_kit.system.waiting import SETTINGS, SPINS

KIT_FIRST = "import qlora_kit; import torch"
TORCH_FIRST = "import torch; import qlora_kit; import os; print('OMP_WAIT_POLICY' in os.environ)"
TERMINAL = "from qlora_kit.__main__ import main; import torch"
# A notebook's kernel, as the runner starts it, inherits the environment of the process that imported the kit.
CHILD = "import subprocess, sys, qlora_kit; subprocess.run([sys.executable, '-c', 'import torch'])"


def told(program: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a program; the OpenMP runtime that it loads prints its settings on standard error."""
    kept = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=kept | {"PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "verbose"} | settings,
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.parametrize("program", [KIT_FIRST, TERMINAL, CHILD])
def test_threads_sleep_after_a_short_wait(program):
    settings = told(program).stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in settings and f"GOMP_SPINCOUNT = '{SPINS}'" in settings


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"OMP_WAIT_POLICY": "active"}, "OMP_WAIT_POLICY = 'ACTIVE'"),
        ({"GOMP_SPINCOUNT": "1234"}, "GOMP_SPINCOUNT = '1234'"),
    ],
)
def test_what_the_user_has_set_stays(settings, line):
    assert line in told(KIT_FIRST, **settings).stderr
    program = "import os, qlora_kit; print(os.environ.get('OMP_WAIT_POLICY'))"
    assert told(program, **settings).stdout.strip() == settings.get("OMP_WAIT_POLICY", "None")
    assert told(program, KMP_BLOCKTIME="1").stdout.strip() == "None"


def test_nothing_is_set_where_torch_is_loaded_already():
    assert told(TORCH_FIRST).stdout.strip() == "False"
