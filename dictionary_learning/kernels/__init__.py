"""The hot operations of a training step, each a few lines of torch that any device runs."""

from .select import encode_active, encode_batch_topk, encode_topk
from .sparse import Code, sparse_decode

__all__ = ["Code", "encode_active", "encode_batch_topk", "encode_topk", "sparse_decode"]
