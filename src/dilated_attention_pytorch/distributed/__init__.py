"""Dilated attention of sequences that no single GPU holds: the steps are dealt to the ranks of a torch process group.

`dilated_attention` is that of the package with `group=`; `shard` and `unshard` deal the steps out and collect them.
docs/scale.md tells what travels, and what it costs.
"""

from .api import dilated_attention as dilated_attention
from .sequence import shard as shard
from .sequence import unshard as unshard

__all__ = ["dilated_attention", "shard", "unshard"]
