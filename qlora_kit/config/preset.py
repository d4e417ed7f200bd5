"""The presets that come with the kit, and which one fits this machine."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from ..errors import unknown
from ..system.arguments import PRESET, takes
from .experiment import Experiment
from .names import presets


@takes(name=PRESET)
def preset(name: str) -> Experiment:
    """Return a preset by name, or the experiment of a YAML file by path.

    Args:
        name: One of `presets()`, `auto` (see `resolve_preset`), or the path of a `.yaml` file.

    Returns:
        The experiment.

    Raises:
        KitError: When there is no such preset or file.
    """
    if name == "auto":
        name, _ = resolve_preset("auto")
    if name in presets():
        return Experiment.from_yaml((resources.files("qlora_kit") / "presets" / f"{name}.yaml").read_text("utf-8"))
    if str(name).endswith((".yaml", ".yml")):
        return Experiment.from_yaml(Path(name))
    raise unknown("preset", name, [*presets(), "auto"])


@takes(name=PRESET)
def resolve_preset(name: str = "auto") -> tuple[str, str]:
    """Return the preset that a name means on this machine, and why.

    Args:
        name: A preset, the path of a YAML file, or `auto`: with a CUDA GPU,
            `dialogpt-medium_banking77_qlora` if its weights are in the local cache or the hub can be reached;
            otherwise `minilm_banking77_qlora`, whose weights come from a Python package.

    Returns:
        The preset's name and one sentence with the reason.

    Raises:
        KitError: When there is no such preset or file.
    """
    if name != "auto":
        preset(name)
        return name, "asked for by name"
    from ..system.devices import cuda_available
    from ..system.hub import hub_weights

    big, small = "dialogpt-medium_banking77_qlora", "minilm_banking77_qlora"
    if not cuda_available():
        return small, "no CUDA GPU here, so the embedded MiniLM is fine-tuned on the CPU"
    hub_name = preset(big).model.name
    found, how = hub_weights(hub_name)
    if found:
        return big, f"a CUDA GPU, and {hub_name} {how}"
    return small, f"a CUDA GPU, but {hub_name} {how}, so the embedded MiniLM is fine-tuned"
