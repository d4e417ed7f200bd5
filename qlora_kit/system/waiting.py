"""How the threads of torch's operations wait for work: a moment awake, then asleep, unless the user says otherwise.

OpenMP's threads share each operation, and by default those that have nothing to do spin: they ask again and again
whether there is more, and so keep a core busy. Alone on a machine that saves the time to wake them. Beside other work
each spinning thread takes its core from the thread that it waits for, and a training becomes slow.

So they ask `SPINS` times, which is enough between most operations of a step, and then sleep. results/waiting.json has
what that costs on an idle machine and what it saves on a busy one; `benchmarks/waiting.py` measures it.

The runtime reads the setting once, when torch is loaded.
"""

from __future__ import annotations

import os
import sys

# By any of these the user says how threads wait: of OpenMP, of GNU's runtime and of Intel's and LLVM's.
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

# A hundredth of what GNU's runtime has by itself. Of five numbers from none to a third of that, this one kept most of
# the speed of an idle machine and most of that of a busy one.
SPINS = 3000


def wait_briefly() -> bool:
    """Let OpenMP's threads sleep after a short wait, in this process and those that it starts.

    `import qlora_kit` calls this, so a terminal's commands, notebooks' kernels and your own programs have it, where
    they import the kit before torch. GNU's runtime, which torch brings on Linux, reads `GOMP_SPINCOUNT`; others know
    `OMP_WAIT_POLICY` alone, and let threads sleep at once.

    Returns:
        Whether that was set. False, and nothing is changed, where the user has set one of `SETTINGS`, or torch is
        loaded already and would not read it.
    """
    if "torch" in sys.modules or any(name in os.environ for name in SETTINGS):
        return False
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": str(SPINS)}
    return True
