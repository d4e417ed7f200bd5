"""Switch off the hub and W&B; a benchmark that needs neither imports this before transformers."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
