"""Texts and labels: read, checked, split, reported, tokenized and batched.

Banking77 comes with the package. Anything else is a file (CSV, TSV, JSON, Parquet, Excel), several of them, a table as
a Python object or a data set on the hub, with one column of texts and one of labels. Bad rows are refused with the file
and the row. Nothing is guessed silently, and no remote code is run.
"""

from .batches import BUCKET_EDGES as BUCKET_EDGES
from .batches import PADDINGS as PADDINGS
from .batches import UNKNOWN_SHARE as UNKNOWN_SHARE
from .batches import Collator as Collator
from .batches import LengthBatchSampler as LengthBatchSampler
from .batches import TokenizedDataset as TokenizedDataset
from .batches import bucket_width as bucket_width
from .batches import collator as collator
from .batches import edges_of as edges_of
from .batches import padding_waste as padding_waste
from .batches import token_lengths as token_lengths
from .batches import tokenize as tokenize
from .batches import unknown_share as unknown_share
from .loading import BANKING77_SHA256 as BANKING77_SHA256
from .loading import TEST_SHARE as TEST_SHARE
from .loading import banking77 as banking77
from .loading import load as load
from .loading import settled as settled
from .loading import text_classification as text_classification
from .rows import LEAK_WARNED as LEAK_WARNED
from .rows import Split as Split
from .rows import TextData as TextData
from .rows import leak_in_words as leak_in_words
from .rows import load_saved as load_saved
