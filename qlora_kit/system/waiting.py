"""How the threads of torch's operations wait for work: asleep, unless the user has said otherwise.

OpenMP's threads share each operation, and by default those that have nothing to do spin: they ask again and again
whether there is more, and so keep a core busy. Alone on a machine that saves the time to wake them. Beside other work
each spinning thread takes its core from the thread that it waits for, and a training comes close to standing still.
Asleep (`OMP_WAIT_POLICY=passive`) they leave the core to whoever has work. results/waiting.json has what that costs on
an idle machine and what it saves on a busy one; `benchmarks/waiting.py` measures it.

The runtime reads the setting once, when torch is loaded.
"""

from __future__ import annotations

import os
import sys

# By any of these the user says how threads wait: of OpenMP, of GNU's runtime and of Intel's and LLVM's.
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_asleep() -> bool:
    """Let OpenMP's threads sleep while they wait, in this process and those that it starts.

    `import qlora_kit` calls this, so a terminal's commands, notebooks' kernels and your own programs have it, where
    they import the kit before torch.

    Returns:
        Whether that was set. False, and nothing is changed, where the user has set one of `SETTINGS`, or torch is
        loaded already and would not read it.
    """
    if "torch" in sys.modules or any(name in os.environ for name in SETTINGS):
        return False
    os.environ["OMP_WAIT_POLICY"] = "passive"
    return True
