"""The client's modules: attention within segments along a snake or a Hilbert curve, every token asking.

`HilbertAttentionCore` takes hidden states and has projections, `HilbertAttentionTritonWrapper` takes q, k and v.
"""

from .auto_branches import auto_branches as auto_branches
from .hilbert_attention_core import HilbertAttentionCore as HilbertAttentionCore
from .hilbert_attention_core import HilbertAttentionFunction as HilbertAttentionFunction
from .hilbert_attention_core import create_hilbert_mapping as create_hilbert_mapping
from .hilbert_attention_core import hilbert_attention_kernel as hilbert_attention_kernel
from .hilbert_attention_core import standard_attention_kernel as standard_attention_kernel
from .hilbert_attention_triton_wrapper import HilbertAttentionTritonFixed as HilbertAttentionTritonFixed
from .hilbert_attention_triton_wrapper import HilbertAttentionTritonWrapper as HilbertAttentionTritonWrapper

__all__ = [
    "HilbertAttentionCore",
    "HilbertAttentionFunction",
    "HilbertAttentionTritonFixed",
    "HilbertAttentionTritonWrapper",
    "auto_branches",
    "create_hilbert_mapping",
    "hilbert_attention_kernel",
    "standard_attention_kernel",
]
