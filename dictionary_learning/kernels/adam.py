"""One optimiser step in two passes over the weights: norms first, then everything that moves a weight.

The reference walks over the weights some 57 times a step: projection, clipping, a dozen elementwise operations of Adam,
renormalisation.  Here the first pass projects the gradient and takes its norm; the second reads and writes weight and
moments.  On the CPU each pass takes a few rows at a time, which stay in the cache between operations.

F rows (latents), D activation_dim; r rows at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CACHED_ENTRIES = 2**19  # of each of the four or five tensors of a pass: 2 MB in fp32
TINY = torch.finfo(torch.float32).tiny


def _slices(rows: Tensor) -> Iterator[slice]:
    n = max(1, CACHED_ENTRIES // max(1, rows[:1].numel())) if rows.device.type == "cpu" else len(rows)
    return (slice(start, start + n) for start in range(0, len(rows), n))


def gradient_norm(grad: Tensor, weight_FD: Tensor | None = None, projection_eps: float = 0.0) -> tuple[Tensor, None]:
    """(norm of the gradient, None: nothing is left to subtract of it).

    With weight rows w, gradient rows g are first made orthogonal to them, in place: g - <g, w> / (|w| + eps)^2 w.
    """
    if weight_FD is None:
        return torch.linalg.vector_norm(grad), None
    norms = []
    for r in _slices(weight_FD):
        grad_rD, weight_rD = grad[r], weight_FD[r]
        divisor_r = torch.linalg.vector_norm(weight_rD, dim=1).add_(projection_eps).clamp_(min=TINY)
        # divided twice: the square of a tiny norm would be zero
        along_r = torch.linalg.vecdot(grad_rD, weight_rD).div_(divisor_r).div_(divisor_r)
        norms.append(torch.linalg.vector_norm(grad_rD.addcmul_(weight_rD, along_r[:, None], value=-1)))
    return norm_of(norms), None


def norm_of(norms: list[Tensor]) -> Tensor:
    """That of all parts together, from those of the parts."""
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def adam_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    found_inf: Tensor,
    divisor: Tensor | None = None,
    along_F: None = None,
    renorm_eps: float | None = None,
) -> None:
    """Adam (Kingma & Ba 2015, eps 1e-8) on a matrix of rows or a vector, in place.

    The gradient it follows is grad / divisor, and is left in `grad`.  `step`, a float32 scalar, counts this step
    already.  Where `found_inf` is 1 nothing moves.  Last, rows are divided by their norm + renorm_eps, in any case.
    """
    # torch's fused Adam walks over the memory and takes all to lie alike
    assert all(x.is_contiguous() and x.shape == weight.shape for x in (weight, grad, exp_avg, exp_avg_sq))
    for r in [...] if renorm_eps is None else _slices(weight):
        weight_r = weight[r]
        torch.ops.aten._fused_adam_(
            [weight_r], [grad[r]], [exp_avg[r]], [exp_avg_sq[r]], [], [step],
            lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=0.0, eps=1e-8,
            amsgrad=False, maximize=False, grad_scale=divisor, found_inf=found_inf,
        )  # fmt: skip
        if renorm_eps is not None:
            weight_r.div_(torch.linalg.vector_norm(weight_r, dim=1).add_(renorm_eps).clamp_(min=TINY)[:, None])
