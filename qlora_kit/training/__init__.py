"""Train an experiment: the Trainer, its checkpoints, and the finished run folder."""

# Must come first: nothing may import PEFT or bitsandbytes before it.
from ..system import safe_peft as safe_peft  # isort: skip
from ..errors import TrainingError as TrainingError
from ..models.build import enable_checkpointing as enable_checkpointing
from ..models.forward import MOST_EVAL_ROWS as MOST_EVAL_ROWS
from ..models.forward import evaluation_rows as evaluation_rows
from ..optimizers import UNPAGED as UNPAGED
from ..optimizers import resolve_optimizer as resolve_optimizer
from ..optimizers import trained_embeddings as trained_embeddings
from ..system.devices import peak_memory as peak_memory
from ..system.devices import trainers_device as trainers_device
from ..system.devices import wait as wait
from .arguments import total_steps as total_steps
from .arguments import training_arguments as training_arguments
from .callbacks import EarlyStopping as EarlyStopping
from .callbacks import EpochLines as EpochLines
from .finetune import finetune as finetune
from .finetune import start_head as start_head
from .finetune import trainer_data as trainer_data
from .finetune import with_data as with_data
from .prepare import Prepared as Prepared
from .prepare import count_memory_anew as count_memory_anew
from .prepare import prepare as prepare
from .trainer import KEPT_CHECKPOINTS as KEPT_CHECKPOINTS
from .trainer import KitTrainer as KitTrainer
from .trainer import order_of as order_of
