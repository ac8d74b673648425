"""Which code does the hot operations: torch's, on every device, or our Triton kernels, on GPUs."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from . import adam

T = TypeVar("T")

_triton_ops: ModuleType | None = None
_optimizer: ModuleType = adam


def use_kernels(name: str) -> None:
    """Choose "torch" or "triton" for the whole process.  Raises ValueError where there is no Triton."""
    global _triton_ops, _optimizer
    if name not in ("torch", "triton"):
        raise ValueError(f"kernels must be torch or triton, not {name!r}.")
    if name == "torch":
        _triton_ops, _optimizer = None, adam
        return
    try:
        from . import triton_adam, triton_ops
    except ImportError as error:
        raise ValueError(f"--kernels triton needs the triton package, which cannot be imported ({error}).") from error
    _triton_ops, _optimizer = triton_ops, triton_adam


def triton_ops() -> ModuleType | None:
    """The kernels of `triton_ops`, None with "torch"."""
    return _triton_ops


def optimizer() -> ModuleType:
    """`adam` or `triton_adam`, which have the same functions."""
    return _optimizer


def on_cpu(tensor: Tensor) -> bool:
    """Whether numpy can work on it, and a wait costs nothing."""
    return tensor.device.type == "cpu"


PIECE_ENTRIES = 2**17  # of a tensor that numpy works on, some 50 microseconds: less is not worth a call to a thread


@cache
def _threads(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, "pieces")


def in_pieces(function: Callable[[slice], T], n_rows: int, width: int) -> list[T]:
    """The results for the rows of a matrix, split over as many threads as torch's operations have here.

    The function should leave Python's lock, as numpy's do, and torch's operations take all threads in any case.
    """
    n = min(torch.get_num_threads(), n_rows * width // PIECE_ENTRIES)
    if n <= 1:
        return [function(slice(0, n_rows))]
    ends = [n_rows * i // n for i in range(n + 1)]
    pieces = [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]
    first, *others = pieces
    waiting = [_threads(n - 1).submit(function, piece) for piece in others]
    return [function(first), *(call.result() for call in waiting)]
