"""The hot operations of a training step, each a few lines of torch that any device runs."""

from .backend import use_kernels
from .select import encode_above, encode_batch_topk, encode_topk
from .shard import WHOLE, Shard
from .sparse import Code, Features

__all__ = ["WHOLE", "Code", "Features", "Shard", "encode_above", "encode_batch_topk", "encode_topk", "use_kernels"]
