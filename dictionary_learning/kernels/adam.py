"""One optimiser step in two passes over the weights: norms first, then everything that moves a weight.

The reference walks over the weights some 57 times a step: projection, clipping, a dozen elementwise operations of Adam,
renormalisation.  Here the first pass reads gradient and weight and leaves three numbers a row; the second reads and
writes weight and moments.  On the CPU each pass takes a few rows at a time, which stay in the cache between operations.

F rows (latents), D activation_dim; r rows at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CACHED_ENTRIES = 2**19  # of each of the four or five tensors of a pass: 2 MB in fp32


def _slices(rows: Tensor) -> Iterator[slice]:
    n = max(1, CACHED_ENTRIES // max(1, rows[:1].numel())) if rows.device.type == "cpu" else len(rows)
    return (slice(start, start + n) for start in range(0, len(rows), n))


def gradient_norms(
    grad: Tensor, weight_FD: Tensor | None = None, projection_eps: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """(sum of squares of the gradient, what to subtract of each weight row to make the gradient orthogonal to it).

    With weight rows w and gradient rows g the second is along_F = <g, w> / (|w| + projection_eps)^2, and the sum of
    squares is that of the projected gradient g - along w.  Without weights it is None, and nothing is projected.
    """
    if weight_FD is None:
        return torch.linalg.vector_norm(grad).square(), None
    squares, along = [], []
    for r in _slices(weight_FD):
        grad_rD, weight_rD = grad[r], weight_FD[r]
        norm_r = torch.linalg.vector_norm(weight_rD, dim=1)
        dot_r = torch.linalg.vecdot(grad_rD, weight_rD)
        divisor_r = (norm_r + projection_eps).clamp(min=torch.finfo(norm_r.dtype).tiny)
        along_r = dot_r / divisor_r / divisor_r  # twice: the square of a tiny norm would be zero
        grad_square_r = torch.linalg.vector_norm(grad_rD, dim=1).square()
        squares.append(grad_square_r - 2 * along_r * dot_r + (along_r * norm_r).square())
        along.append(along_r)
    return torch.cat(squares).clamp(min=0).sum(), torch.cat(along)


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
    scale: Tensor | None = None,
    along_F: Tensor | None = None,
    renorm_eps: float | None = None,
) -> None:
    """Adam (Kingma & Ba 2015, eps 1e-8) on a matrix of rows or a vector, in place; `grad` is left as it is.

    The gradient it follows is scale (grad - along_F weight).  `step`, a float32 scalar, counts this step already.
    Where `found_inf` is 1 nothing moves.  Last, rows are divided by their norm + renorm_eps, in any case.
    """
    for r in _slices(weight):
        weight_r, grad_r = weight[r], grad[r]
        if scale is not None:
            grad_r = grad_r * scale
        if along_F is not None:
            along_r = along_F[r] if scale is None else along_F[r] * scale
            grad_r = torch.addcmul(grad_r, weight_r, along_r[:, None], value=-1)
        torch.ops.aten._fused_adam_(
            [weight_r], [grad_r], [exp_avg[r]], [exp_avg_sq[r]], [], [step],
            lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=0.0, eps=1e-8,
            amsgrad=False, maximize=False, found_inf=found_inf,
        )  # fmt: skip
        if renorm_eps is not None:
            norm_r = torch.linalg.vector_norm(weight_r, dim=1) + renorm_eps
            weight_r.div_(norm_r.clamp(min=torch.finfo(norm_r.dtype).tiny)[:, None])
