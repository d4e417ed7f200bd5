"""Export a run: as a merged model, to the hub, or as a zip of results."""

# Must come first: nothing may import PEFT or bitsandbytes before it.
from ..system import safe_peft as safe_peft  # isort: skip
from .archive import NOT_ZIPPED as NOT_ZIPPED
from .archive import download_results as download_results
from .archive import zip_results as zip_results
from .card import PIPELINE as PIPELINE
from .card import card as card
from .estimator import RunClassifier as RunClassifier
from .hub import PUSHED as PUSHED
from .hub import push as push
from .hub import staged as staged
from .merge import PADDING as PADDING
from .merge import load_merged as load_merged
from .merge import merge as merge
from .merge import write_merged as write_merged
from .modeling_pooled import PooledForSequenceClassification as PooledForSequenceClassification
from .peft_folder import export_peft as export_peft
from .runtimes import export as export
