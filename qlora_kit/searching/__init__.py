"""Search for hyperparameters with Optuna, on validation rows only; an interrupted search continues."""

# Must come first: nothing may import PEFT or bitsandbytes before it.
from ..system import safe_peft as safe_peft  # isort: skip
from .search import STUDY as STUDY
from .search import Search as Search
from .search import search as search
from .space import SEARCHABLE as SEARCHABLE
from .space import default_space as default_space
from .space import parse_space as parse_space
from .trial import UNPRUNED as UNPRUNED
