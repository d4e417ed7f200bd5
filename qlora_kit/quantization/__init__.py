"""Quantized weights: codebooks, a bit-exact reference, and the layers that store them."""

# Comes first: no module here may import PEFT or bitsandbytes before it.
from ..system import safe_peft as safe_peft  # isort: skip
from ..config.quantization import BLOCK_SIZES as BLOCK_SIZES
from ..config.quantization import FOUR_BIT as FOUR_BIT
from ..config.quantization import NESTED_BLOCK_SIZE as NESTED_BLOCK_SIZE
from ..config.quantization import SCHEMES as SCHEMES
from ..config.quantization import Quantization as Quantization

# Each of these registers the schemes that it stores.
from . import bitsandbytes as bitsandbytes
from . import int4 as int4
from . import plain as plain
from .backend import LinearStorage as LinearStorage
from .backend import linear_storage as linear_storage
from .bitsandbytes import bitsandbytes_config as bitsandbytes_config
from .codebooks import CODEBOOKS as CODEBOOKS
from .codebooks import codebook as codebook
from .codebooks import dynamic_codebook as dynamic_codebook
from .loss import lloyd_max as lloyd_max
from .loss import perplexity as perplexity
from .loss import quantization_error as quantization_error
from .loss import quantize_weights_ as quantize_weights_
from .loss import ratio_in_words as ratio_in_words
from .loss import window_losses as window_losses
from .reference import Quantized as Quantized
from .reference import block_scales as block_scales
from .reference import quantize as quantize
from .reference import quantize_int8 as quantize_int8
from .reference import roundtrip as roundtrip
from .storage import Storage as Storage
from .storage import bits_per_parameter as bits_per_parameter
from .storage import storage as storage
