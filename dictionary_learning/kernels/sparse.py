"""Sparse codes and the three products a training step needs of them.

With z_b = x_b - b_dec, the chosen pairs (b, f), their values v = relu(<z_b, e_f> + c_f) and the gradient G_b of the
reconstruction, one step needs (and nothing of size B x F):

    x_hat_b = sum_f v w_f        dv = <G_b, w_f>         dw_f = sum_b v G_b
    de_f = sum_b dv z_b          dc_f = sum_b dv         db_dec = -E^T dc   (beside what b_dec gets as a decoder bias)

The sums are one operation, an embedding bag with per-sample weights: bags are tokens for x_hat, latents for dw and de.

B tokens, D activation_dim, F dict_size, N chosen pairs, R rows decoded to (B, or B x groups for Matryoshka).
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .backend import on_cpu, triton_ops
from .shard import WHOLE, Shard


@dataclass(eq=False)
class Code:
    """N chosen (token, latent) pairs, tokens ascending."""

    token_N: Tensor
    latent_N: Tensor
    n_tokens: int
    dict_size: int

    @cached_property
    def token_by_latent_N(self) -> Tensor:
        return self.token_N.index_select(0, self.by_latent[0])

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor]:
        """(order_N, offsets_F): the pairs sorted by latent, and where each latent's begin."""
        order_N = _stable_order(self.latent_N, self.dict_size)
        return order_N, _offsets(self.latent_N.index_select(0, order_N), self.dict_size)


@dataclass(eq=False)
class Features:
    """What an encoder says of a batch: all B x F values, or only those of chosen pairs, which the rest follow alike.

    values: f_BF where `code` is None, else f_N of its pairs; every other value is zero.
    shard: which of the SAE's latents they are; sums over latents and reconstructions are of all of them.
    """

    values: Tensor
    code: Code | None = None
    shard: Shard = WHOLE

    def of_latent(self, values_F: Tensor) -> Tensor:
        """Per-latent values, in a shape that goes with `values`."""
        return values_F if self.code is None else values_F.index_select(0, self.code.latent_N)

    def sum_over_latents(self, values: Tensor) -> Tensor:
        """(B,): each token's sum of something of the shape of `values`."""
        if self.code is None:
            return self.shard.sum(values.sum(dim=-1))
        return self.shard.sum(values.new_zeros(self.code.n_tokens).index_add(0, self.code.token_N, values))

    def sum_over_tokens(self, values: Tensor) -> Tensor:
        """(F,): each latent's sum."""
        if self.code is None:
            return values.sum(dim=0)
        return values.new_zeros(self.code.dict_size).index_add(0, self.code.latent_N, values)

    def smallest_of_token(self) -> Tensor:
        """(B,): each token's smallest positive value, +inf where it has none."""
        values = torch.where(self.values > 0, self.values, torch.inf).float()
        if self.code is None:
            return self.shard.min(values.amin(dim=-1))
        none_B = values.new_full((self.code.n_tokens,), torch.inf)
        return self.shard.min(none_B.scatter_reduce(0, self.code.token_N, values, "amin"))

    def smallest(self) -> Tensor:
        """Scalar: the smallest positive value, +inf where there is none."""
        if self.values.numel() == 0:
            return self.shard.min(self.values.new_full((), torch.inf, dtype=torch.float32))
        return self.shard.min(torch.where(self.values > 0, self.values, torch.inf).float().amin())

    def n_active(self) -> Tensor:
        """Scalar: the values that are not zero."""
        return self.shard.sum(torch.count_nonzero(self.values))

    def fired(self) -> Tensor:
        """Bool (F,): the latents with a positive value."""
        if self.code is None:
            return (self.values > 0).any(dim=0)
        fired_F = torch.zeros(self.code.dict_size, dtype=torch.bool, device=self.values.device)
        return fired_F.index_put((self.code.latent_N,), self.values > 0, accumulate=True)

    def decode(self, decoder_FD: Tensor) -> Tensor:
        """x_hat_BD without bias."""
        if self.code is None:
            return self.shard.sum(self.values @ decoder_FD)
        code = self.code
        return self.shard.sum(sparse_decode(self.values, decoder_FD, code, code.token_N, code.n_tokens))

    def dense(self) -> Tensor:
        """f_BF; differentiable."""
        if self.code is None:
            return self.values
        f_BF = self.values.new_zeros(self.code.n_tokens, self.code.dict_size)
        return f_BF.index_put((self.code.token_N, self.code.latent_N), self.values)

    def detach(self) -> "Features":
        return replace(self, values=self.values.detach())


def _stable_order(key_N: Tensor, n_keys: int) -> Tensor:
    """The indices that sort whole numbers below `n_keys`."""
    if on_cpu(key_N) and n_keys <= 2**16:  # a radix sort in two passes
        return torch.from_numpy(key_N.numpy().astype(np.uint16).argsort(kind="stable"))
    return key_N.argsort(stable=True)


def _offsets(key_N: Tensor, n_bags: int) -> Tensor:
    """Where each bag begins in a list of pairs that is sorted by `key_N`; unlike a count, without waiting for a GPU."""
    return torch.searchsorted(key_N, torch.arange(n_bags, device=key_N.device))


def _bag(index_N: Tensor, table: Tensor, offsets: Tensor, weights_N: Tensor) -> Tensor:
    """The weighted sum of table rows of each bag."""
    return torch.nn.functional.embedding_bag(index_N, table, offsets, mode="sum", per_sample_weights=weights_N)


def dots(left_RD: Tensor, row_N: Tensor, right_FD: Tensor, latent_N: Tensor) -> Tensor:
    """<left_RD[row], right_FD[latent]> of every pair, without an (N, D) tensor."""
    unused = row_N[:0]  # where bags begin, which `row_N` says too
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(left_RD, right_FD, latent_N, unused, row_N, 0, -1)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values_N: Tensor, decoder_FD: Tensor, code: Code, row_N: Tensor, n_rows: int) -> Tensor:
        table_FD = decoder_FD.to(values_N.dtype)  # under autocast, as a matmul would cast it
        offsets_R = _offsets(row_N, n_rows)
        ctx.save_for_backward(values_N, table_FD, row_N, offsets_R)
        ctx.code, ctx.weight_dtype, ctx.rows_are_tokens = code, decoder_FD.dtype, row_N is code.token_N
        decode = _bag if (kernels := triton_ops()) is None else kernels.decode
        return decode(code.latent_N, table_FD, offsets_R, values_N)

    @staticmethod
    def backward(ctx, grad_RD: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        values_N, table_FD, row_N, offsets_R = ctx.saved_tensors
        grad_RD = grad_RD.to(values_N.dtype).contiguous()
        if (kernels := triton_ops()) is not None:  # both in one walk
            grads = kernels.decoder_backward(values_N, table_FD, grad_RD, row_N, *ctx.code.by_latent)
            return grads[0], grads[1].to(ctx.weight_dtype), None, None, None
        grad_values_N = grad_decoder_FD = None
        if ctx.needs_input_grad[0]:
            grad_values_N = dots(grad_RD, row_N, table_FD, ctx.code.latent_N)
        if ctx.needs_input_grad[1]:
            order_N, offsets_F = ctx.code.by_latent
            code, sorted_values_N = ctx.code, values_N.index_select(0, order_N)
            sorted_row_N = code.token_by_latent_N if ctx.rows_are_tokens else row_N.index_select(0, order_N)
            grad_decoder_FD = _bag(sorted_row_N, grad_RD, offsets_F, sorted_values_N).to(ctx.weight_dtype)
        return grad_values_N, grad_decoder_FD, None, None, None


def sparse_decode(values_N: Tensor, decoder_FD: Tensor, code: Code, row_N: Tensor, n_rows: int) -> Tensor:
    """x_hat_RD: the sum of v w_f over the pairs of each row, without bias; rows must ascend along the pairs."""
    return _SparseDecode.apply(values_N, decoder_FD, code, row_N, n_rows)  # pyright: ignore[reportReturnType]


class _PreActivations(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre_N: Tensor, z_BD: Tensor, encoder_FD: Tensor, bias_F: Tensor, b_dec_D: Tensor, code: Code):
        ctx.save_for_backward(z_BD, encoder_FD)
        ctx.code = code
        return pre_N.clone()

    @staticmethod
    def backward(ctx, grad_N: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        z_BD, encoder_FD = ctx.saved_tensors
        code: Code = ctx.code
        order_N, offsets_F = code.by_latent
        if (kernels := triton_ops()) is not None:
            grad_encoder_FD, grad_bias_F = kernels.encoder_backward(grad_N, z_BD, code.token_N, order_N, offsets_F)
        else:
            sorted_grad_N = grad_N.index_select(0, order_N).to(z_BD.dtype)
            grad_encoder_FD = _bag(code.token_by_latent_N, z_BD, offsets_F, sorted_grad_N)
            grad_bias_F = encoder_FD.new_zeros(code.dict_size)
            grad_bias_F.index_add_(0, code.latent_N, grad_N.to(encoder_FD.dtype))
        grad_encoder_FD, grad_bias_F = grad_encoder_FD.to(encoder_FD.dtype), grad_bias_F.to(encoder_FD.dtype)
        # summed over the batch first, the gradient through x - b_dec is a matrix-vector product, not a matmul
        grad_b_dec_D = -(grad_bias_F @ encoder_FD) if ctx.needs_input_grad[4] else None
        return None, None, grad_encoder_FD, grad_bias_F, grad_b_dec_D, None


def pre_activations(
    pre_N: Tensor, z_BD: Tensor, encoder_FD: Tensor, bias_F: Tensor, b_dec_D: Tensor, code: Code
) -> Tensor:
    """`pre_N` = <z_b, e_f> + c_f at the pairs of `code`, with gradients to e, c and b_dec (z = x - b_dec)."""
    return _PreActivations.apply(pre_N, z_BD, encoder_FD, bias_F, b_dec_D, code)  # pyright: ignore[reportReturnType]
