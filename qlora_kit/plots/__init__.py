"""Every figure of the kit, in one style: from plain data to a matplotlib figure.

The palette is Okabe and Ito's, which colour-blind readers can tell apart. Text is large enough to read on a phone.
Figures don't use pyplot, so none is left open, and a notebook shows a figure once, when it is the last line of a cell.
"""

from .cost import PART_COLOURS as PART_COLOURS
from .cost import anatomy as anatomy
from .cost import memory_against_time as memory_against_time
from .cost import memory_crossing as memory_crossing
from .cost import memory_parts as memory_parts
from .data import class_sizes as class_sizes
from .data import padding as padding
from .data import token_lengths as token_lengths
from .errors import confusion_matrix as confusion_matrix
from .errors import most_confused as most_confused
from .errors import reliability as reliability
from .quantization import SCHEME_COLOURS as SCHEME_COLOURS
from .quantization import bits_against_error as bits_against_error
from .quantization import block_before_after as block_before_after
from .quantization import codebooks as codebooks
from .quantization import error_by_block_size as error_by_block_size
from .quantization import error_by_layer as error_by_layer
from .quantization import outlier_in_block as outlier_in_block
from .quantization import perplexity_ratios as perplexity_ratios
from .quantization import schemes as schemes
from .quantization import weight_histogram as weight_histogram
from .racing import CONTENDER_NAMES as CONTENDER_NAMES
from .racing import races as races
from .racing import speed as speed
from .scores import accuracy as accuracy
from .scores import f1_by_label as f1_by_label
from .scores import intervals as intervals
from .scores import metric_intervals as metric_intervals
from .style import BLACK as BLACK
from .style import BLUE as BLUE
from .style import DPI as DPI
from .style import GREEN as GREEN
from .style import GREY as GREY
from .style import METHOD_COLOURS as METHOD_COLOURS
from .style import METHOD_NAMES as METHOD_NAMES
from .style import ORANGE as ORANGE
from .style import PALE as PALE
from .style import PALETTE as PALETTE
from .style import PINK as PINK
from .style import RED as RED
from .style import SKY as SKY
from .style import STYLE as STYLE
from .style import WIDTH as WIDTH
from .style import YELLOW as YELLOW
from .style import KitFigure as KitFigure
from .style import new as new
from .style import save as save
from .style import short_device as short_device
from .style import smooth as smooth
from .style import styled as styled
from .training import search_trials as search_trials
from .training import stability as stability
from .training import training_curves as training_curves
