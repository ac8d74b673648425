"""The optimiser step in two passes over the weights: projection, clipping, Adam and renormalisation, in Triton.

In torch these are some 26 passes: the fused Adam alone makes 7, and each of the others reads or writes a whole matrix.
Pass 1 (`gradient_norm`) reads what the clip has to know, pass 2 (`adam_`) does the rest.  The rules of `triton_ops`
hold: nothing waits for the device, a run repeats bit for bit.

F rows of a matrix of latents, D columns; R rows of one program.
"""

import math

import torch
import triton.language as tl
from torch import Tensor

from .triton_ops import cdiv, jit, next_power_of_2, on_its_device

ENTRIES = 4096  # of each operand that a program holds, 16 a thread: loads of 64 bytes a thread and operand in flight
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@jit
def _tile(n_entries, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """(row_R, at_RD, live_RD) of a program's rows: where their entries lie, and which there are."""
    row_R, d_D = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    at_RD = row_R.to(tl.int64)[:, None] * D + d_D[None, :]
    return row_R, at_RD, (d_D < D)[None, :] & (at_RD < n_entries)


@jit
def _norms_kernel(
    grad_ptr,
    weight_ptr,
    along_ptr,  # (F,)
    squares_ptr,  # (programs,)
    n_entries,
    D,
    projection_eps,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_R, at_RD, live_RD = _tile(n_entries, D, ROWS, BLOCK_D)
    grad_RD = tl.load(grad_ptr + at_RD, mask=live_RD, other=0).to(tl.float32)
    if weight_ptr is not None:
        weight_RD = tl.load(weight_ptr + at_RD, mask=live_RD, other=0).to(tl.float32)
        norm_R = tl.maximum(tl.sqrt_rn(tl.sum(weight_RD * weight_RD, axis=1)) + projection_eps, TINY)
        # divided twice: the square of a tiny norm would be zero
        along_R = tl.div_rn(tl.div_rn(tl.sum(grad_RD * weight_RD, axis=1), norm_R), norm_R)
        tl.store(along_ptr + row_R, along_R, mask=row_R.to(tl.int64) * D < n_entries)
        grad_RD -= along_R[:, None] * weight_RD
    tl.store(squares_ptr + tl.program_id(0), tl.sum(grad_RD * grad_RD))


@jit
def _scales_kernel(step_ptr, lr_ptr, lr, scales_ptr, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr):
    """Leaves lr / (1 - beta1^t) and sqrt(1 - beta2^t), worked out in float64."""
    t = tl.maximum(tl.load(step_ptr), 1).to(tl.float64)  # 0 where the first step is void
    lr = lr if lr_ptr is None else tl.load(lr_ptr)
    tl.store(scales_ptr, lr / (1 - tl.exp(t * LOG_BETA1)))
    tl.store(scales_ptr + 1, tl.sqrt(1 - tl.exp(t * LOG_BETA2)))


@jit
def _adam_kernel(
    weight_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    along_ptr,  # (F,)
    clip_ptr,
    found_inf_ptr,
    scales_ptr,
    n_entries,
    D,
    eps,
    renorm_eps,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    RENORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_R, at_RD, live_RD = _tile(n_entries, D, ROWS, BLOCK_D)
    void = tl.load(found_inf_ptr) != 0
    weight_RD = tl.load(weight_ptr + at_RD, mask=live_RD, other=0)
    grad_RD = tl.load(grad_ptr + at_RD, mask=live_RD, other=0).to(tl.float32)
    exp_avg_RD = tl.load(exp_avg_ptr + at_RD, mask=live_RD, other=0)
    exp_avg_sq_RD = tl.load(exp_avg_sq_ptr + at_RD, mask=live_RD, other=0)
    if along_ptr is not None:
        along_R = tl.load(along_ptr + row_R, mask=row_R.to(tl.int64) * D < n_entries, other=0)
        grad_RD -= along_R[:, None] * weight_RD
    if clip_ptr is not None:
        grad_RD = tl.div_rn(grad_RD, tl.load(clip_ptr))
    exp_avg_RD = BETA1 * exp_avg_RD + (1 - BETA1) * grad_RD
    exp_avg_sq_RD = BETA2 * exp_avg_sq_RD + (1 - BETA2) * grad_RD * grad_RD
    step_size, root_correction2 = tl.load(scales_ptr), tl.load(scales_ptr + 1)
    denominator_RD = tl.div_rn(tl.sqrt_rn(exp_avg_sq_RD), root_correction2) + eps
    moved_RD = weight_RD - tl.div_rn(step_size * exp_avg_RD, denominator_RD)
    weight_RD = tl.where(void, weight_RD, moved_RD)
    if RENORM:
        norm_R = tl.maximum(tl.sqrt_rn(tl.sum(weight_RD * weight_RD, axis=1)) + renorm_eps, TINY)
        weight_RD = tl.div_rn(weight_RD, norm_R[:, None])
    tl.store(weight_ptr + at_RD, weight_RD, mask=live_RD)
    tl.store(exp_avg_ptr + at_RD, exp_avg_RD, mask=live_RD & (void == 0))
    tl.store(exp_avg_sq_ptr + at_RD, exp_avg_sq_RD, mask=live_RD & (void == 0))


def _tiles(x: Tensor, whole_rows: bool) -> tuple[int, int, dict[str, int]]:
    """(columns, programs, launch parameters): as many rows a program as it can hold; where rows mean nothing, and for
    vectors, rows of `ENTRIES`.  Padding (2304 columns to 4096) costs idle lanes, and these kernels wait for memory.
    """
    width = x.shape[-1] if whole_rows else min(ENTRIES, x.numel())
    block_d, n_rows = next_power_of_2(width), cdiv(x.numel(), width)
    rows = min(max(1, ENTRIES // block_d), next_power_of_2(n_rows))
    num_warps = min(max(rows * block_d // 512, 1), 32)
    return width, cdiv(n_rows, rows), {"ROWS": rows, "BLOCK_D": block_d, "num_warps": num_warps}


@on_its_device
def gradient_norm(
    grad_FD: Tensor, weight_FD: Tensor | None = None, projection_eps: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """(norm of the gradient, fp32 scalar; along_F or None).  Without a weight, any shape.

    With a weight the gradient is first made orthogonal to its rows, g - along w with along = <g, w> / (|w| + eps)^2,
    but not written: `adam_` takes along_F.  Reads 4 F D bytes, 8 with a weight.
    """
    assert grad_FD.is_contiguous() and (weight_FD is None or weight_FD.is_contiguous())
    width, programs, meta = _tiles(grad_FD, weight_FD is not None)
    along_F = None if weight_FD is None else grad_FD.new_empty(len(grad_FD), dtype=torch.float32)
    squares = grad_FD.new_empty(programs, dtype=torch.float32)
    _norms_kernel[(programs,)](*(grad_FD, weight_FD, along_F, squares, grad_FD.numel(), width, projection_eps), **meta)
    return squares.sum().sqrt(), along_F


@on_its_device
def adam_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    found_inf: Tensor,
    divisor: Tensor | None = None,
    along_F: Tensor | None = None,
    renorm_eps: float | None = None,
    eps: float = 1e-8,
) -> None:
    """One step of `torch.optim.Adam(fused=True)`, in place, on the gradient (g - along w) / divisor; `grad` stays.

    All of one shape, contiguous; weights, moments and the scalars `step` and `found_inf` in fp32.  Where `found_inf` is
    not 0, weight and moments stay as they were.  `step` counts this step already.  Afterwards, in either case, rows are
    divided by (their norm + `renorm_eps`) unless that is None.  Reads 16 bytes a weight and writes 12.

    In a CUDA graph, `lr` must be a tensor: a float is part of the graph.
    """
    assert all(x.is_contiguous() and x.shape == weight.shape for x in (weight, grad, exp_avg, exp_avg_sq))
    width, programs, meta = _tiles(weight, along_F is not None or renorm_eps is not None)
    log_beta1, log_beta2 = (math.log(beta) if beta > 0 else -math.inf for beta in betas)
    scales = step.new_empty(2)
    is_tensor = isinstance(lr, Tensor)
    _scales_kernel[(1,)](
        *(step, lr if is_tensor else None, 0.0 if is_tensor else lr, scales),
        LOG_BETA1=log_beta1,
        LOG_BETA2=log_beta2,
        num_warps=1,
    )
    _adam_kernel[(programs,)](
        *(weight, grad, exp_avg, exp_avg_sq, along_F, divisor, found_inf, scales, weight.numel(), width),
        *(eps, renorm_eps or 0.0),
        BETA1=betas[0],
        BETA2=betas[1],
        RENORM=renorm_eps is not None,
        **meta,
    )
