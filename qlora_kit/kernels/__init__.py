"""Make a training step fast: CUDA graphs, fused LoRA layers, attention on a CPU, small activations."""

# Comes first: no module here may import PEFT or bitsandbytes before it.
from ..system import safe_peft as safe_peft  # isort: skip
