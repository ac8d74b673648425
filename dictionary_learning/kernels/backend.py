"""Which code does the hot operations: torch's, on every device, or our Triton kernels, on GPUs."""

from types import ModuleType

from torch import Tensor

from . import adam

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
