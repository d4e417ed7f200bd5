"""Plan the memory of a run before it starts.

`plan` computes the memory of a training step, part by part, without weights and without a GPU. It runs one step of the
experiment's real model on shapes alone (`tape`) and replays the allocations (`allocator`). `fits` uses plans to find
what fits on a GPU. `measure` trains for a few steps and returns the memory that they took.

    print(qk.memory.plan(experiment, batch=8, length=128, device="T4"))
"""

from typing import Any

# Comes first: no module here may import PEFT or bitsandbytes before it.
from ..system import safe_peft as safe_peft  # isort: skip
from .devices import CONTEXT as CONTEXT
from .devices import DEVICES as DEVICES
from .devices import MIB as MIB
from .devices import Device as Device
from .devices import find_device as find_device
from .fits import LLAMA as LLAMA
from .fits import METHODS as METHODS
from .fits import Estimate as Estimate
from .fits import crossing as crossing
from .fits import fits as fits
from .fits import of_model as of_model
from .fits import same_shape as same_shape
from .fits import with_method as with_method
from .plan import MOST_TOKENS as MOST_TOKENS
from .plan import PARTS as PARTS
from .plan import WEIGHTS as WEIGHTS
from .plan import Plan as Plan
from .plan import plan as plan


def __getattr__(name: str) -> Any:
    # `measure` trains, so it is in `training`, a package above this one.
    from ..public import handed_on

    return handed_on("memory", name)
