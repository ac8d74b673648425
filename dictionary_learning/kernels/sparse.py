"""Sparse codes and the three products a training step needs of them.

With z_b = x_b - b_dec, the active pairs (b, f), their values v = relu(<z_b, e_f> + c_f) and the gradient G_b of the
reconstruction, one step needs (and nothing of size B x F):

    x_hat_b = sum_f v w_f        dv = <G_b, w_f>         dw_f = sum_b v G_b
    de_f = sum_b dv z_b          dc_f = sum_b dv         db_dec = -E^T dc   (beside what b_dec gets as a decoder bias)

The sums are one operation, an embedding bag with per-sample weights: bags are tokens for x_hat, latents for dw and de.

B tokens, D activation_dim, F dict_size, N active pairs, R rows decoded to (B, or B x groups for Matryoshka).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(eq=False)
class Code:
    """N active (token, latent) pairs in token order; their values are a tensor of its own, so that autograd sees it."""

    token_N: Tensor
    latent_N: Tensor
    n_tokens: int
    dict_size: int

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor]:
        """(order_N, offsets_F): the pairs sorted by latent, and where each latent's begin."""
        order_N = torch.argsort(self.latent_N, stable=True)
        return order_N, _offsets(self.latent_N, self.dict_size)

    def dense(self, values_N: Tensor) -> Tensor:
        """f_BF with `values_N` at the pairs and zero elsewhere; differentiable."""
        f_BF = values_N.new_zeros(self.n_tokens, self.dict_size)
        return f_BF.index_put((self.token_N, self.latent_N), values_N)

    def fired(self, values_N: Tensor) -> Tensor:
        """Bool mask_F of the latents with a positive value."""
        fired_F = torch.zeros(self.dict_size, dtype=torch.bool, device=values_N.device)
        return fired_F.index_put((self.latent_N,), values_N > 0, accumulate=True)


def _offsets(key_N: Tensor, n_bags: int) -> Tensor:
    """Where each bag begins in a list of pairs that is sorted by `key_N`."""
    counts = torch.bincount(key_N, minlength=n_bags)
    return counts.cumsum(0) - counts


def _bag(index_N: Tensor, table: Tensor, offsets: Tensor, weights_N: Tensor) -> Tensor:
    return torch.nn.functional.embedding_bag(index_N, table, offsets, mode="sum", per_sample_weights=weights_N)


def _dots(grad_RD: Tensor, row_N: Tensor, offsets_R: Tensor, table_FD: Tensor, latent_N: Tensor) -> Tensor:
    """<grad_RD[row], table_FD[latent]> of every pair, without an (N, D) tensor."""
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_RD, table_FD, latent_N, offsets_R, row_N, 0, -1
    )


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values_N: Tensor, decoder_FD: Tensor, code: Code, row_N: Tensor, n_rows: int) -> Tensor:
        # under autocast both are cast as a matmul would cast them; the sum over a bag is fp32 inside the kernel
        table_FD, weights_N = decoder_FD.to(values_N.dtype), values_N
        offsets_R = _offsets(row_N, n_rows)
        ctx.save_for_backward(weights_N, table_FD, row_N, offsets_R)
        ctx.code, ctx.weight_dtype = code, decoder_FD.dtype
        return _bag(code.latent_N, table_FD, offsets_R, weights_N)

    @staticmethod
    def backward(ctx, grad_RD: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        values_N, table_FD, row_N, offsets_R = ctx.saved_tensors
        grad_RD = grad_RD.to(values_N.dtype).contiguous()
        grad_values_N = _dots(grad_RD, row_N, offsets_R, table_FD, ctx.code.latent_N)
        order_N, offsets_F = ctx.code.by_latent
        grad_decoder_FD = _bag(row_N[order_N], grad_RD, offsets_F, values_N[order_N])
        return grad_values_N, grad_decoder_FD.to(ctx.weight_dtype), None, None, None


def sparse_decode(values_N: Tensor, decoder_FD: Tensor, code: Code, row_N: Tensor, n_rows: int) -> Tensor:
    """x_hat_RD: the sum of v w_f over the pairs of each row, without bias; rows must ascend along the pairs."""
    return _SparseDecode.apply(values_N, decoder_FD, code, row_N, n_rows)  # pyright: ignore[reportReturnType]


class _ActiveValues(torch.autograd.Function):
    """The values of chosen pairs as a differentiable function of the encoder, for a choice already made."""

    @staticmethod
    def forward(ctx, values_N: Tensor, z_BD: Tensor, encoder_FD: Tensor, bias_F: Tensor, b_dec_D: Tensor, code: Code):
        ctx.save_for_backward(values_N, z_BD, encoder_FD)
        ctx.code = code
        return values_N.clone()

    @staticmethod
    def backward(ctx, grad_N: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        values_N, z_BD, encoder_FD = ctx.saved_tensors
        code: Code = ctx.code
        grad_N = torch.where(values_N > 0, grad_N, 0)  # the ReLU
        order_N, offsets_F = code.by_latent
        grad_encoder_FD = _bag(code.token_N[order_N], z_BD, offsets_F, grad_N[order_N].to(z_BD.dtype))
        grad_bias_F = encoder_FD.new_zeros(code.dict_size).index_add_(0, code.latent_N, grad_N.to(encoder_FD.dtype))
        # summed over the batch first, the gradient through x - b_dec is a matrix-vector product, not a matmul
        grad_b_dec_D = -(grad_bias_F @ encoder_FD)
        return None, None, grad_encoder_FD.to(encoder_FD.dtype), grad_bias_F, grad_b_dec_D, None


def active_values(
    values_N: Tensor, z_BD: Tensor, encoder_FD: Tensor, bias_F: Tensor, b_dec_D: Tensor, code: Code
) -> Tensor:
    """`values_N` = relu(<z_b, e_f> + c_f) at the pairs of `code`, with gradients to e, c and b_dec (z = x - b_dec)."""
    return _ActiveValues.apply(values_N, z_BD, encoder_FD, bias_F, b_dec_D, code)  # pyright: ignore[reportReturnType]
