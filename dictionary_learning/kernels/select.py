"""The encoder with the selection fused in: which (token, latent) pairs are active, and their values.

On the CPU the encoder runs in chunks of tokens that stay in the cache, and each chunk leaves only its candidates: no
B x F tensor is ever written.  On other devices the chunk is the whole batch.

B tokens, D activation_dim, F dict_size, N active pairs.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .sparse import Code, active_values

CHUNK_ENTRIES = 2**22  # of fp32: 16 MB, half of a common last-level cache


def _post_relu_chunks(z_BD: Tensor, encoder_FD: Tensor, bias_F: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first token, relu(z E^T + c)) for one chunk of tokens after another; the buffer is reused."""
    n_tokens, dict_size = len(z_BD), len(encoder_FD)
    rows = max(1, CHUNK_ENTRIES // dict_size) if z_BD.device.type == "cpu" else n_tokens
    buffer = z_BD.new_empty(min(rows, n_tokens), dict_size)
    for start in range(0, n_tokens, rows):
        z_bD = z_BD[start : start + rows]
        out = buffer[: len(z_bD)]
        torch.addmm(bias_F.to(z_BD.dtype), z_bD, encoder_FD.T, out=out)
        yield start, out.relu_()


def _encode(
    x_BD: Tensor,
    encoder_FD: Tensor,
    bias_F: Tensor,
    b_dec_D: Tensor,
    choose: Callable[[Callable[[], Iterator[tuple[int, Tensor]]]], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Code]:
    with torch.no_grad():
        device = x_BD.device.type
        autocast = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False):
            z_BD = x_BD - b_dec_D
            weight_FD = encoder_FD
            if autocast:
                dtype = torch.get_autocast_dtype(device)
                z_BD, weight_FD = z_BD.to(dtype), encoder_FD.to(dtype)
            values_N, flat_N = choose(lambda: _post_relu_chunks(z_BD, weight_FD, bias_F))
    dict_size = len(encoder_FD)
    code = Code(flat_N // dict_size, flat_N % dict_size, len(x_BD), dict_size)
    return active_values(values_N, z_BD, encoder_FD, bias_F, b_dec_D, code), code


def encode_topk(x_BD: Tensor, encoder_FD: Tensor, bias_F: Tensor, b_dec_D: Tensor, k: int) -> tuple[Tensor, Code]:
    """(values_N, code) of the k largest post-ReLU values of each token, N = B k; zeros may be among them."""

    def choose(chunks):
        values, flat = [], []
        for start, post_relu_bF in chunks():
            top = post_relu_bF.topk(k, dim=1, sorted=False)
            first_of_row = torch.arange(start, start + len(post_relu_bF), device=x_BD.device) * post_relu_bF.shape[1]
            values.append(top.values.flatten())
            flat.append((top.indices + first_of_row[:, None]).flatten())
        return torch.cat(values), torch.cat(flat)

    return _encode(x_BD, encoder_FD, bias_F, b_dec_D, choose)


def encode_active(x_BD: Tensor, encoder_FD: Tensor, bias_F: Tensor, b_dec_D: Tensor) -> tuple[Tensor, Code]:
    """(values_N, code) of every positive post-ReLU value: a plain ReLU encoder, sparsely."""
    return _encode(
        x_BD, encoder_FD, bias_F, b_dec_D, lambda chunks: _above(chunks, torch.zeros((), device=x_BD.device))
    )


def encode_batch_topk(
    x_BD: Tensor, encoder_FD: Tensor, bias_F: Tensor, b_dec_D: Tensor, n: int, guess: Tensor | None = None
) -> tuple[Tensor, Code]:
    """(values_N, code) of the batch's n largest post-ReLU values; of equal ones the lowest flat index wins.

    Values of zero contribute nothing and are left out, so N <= n.  `guess`, a scalar, may hold a value believed to lie
    below the n-th largest (last step's, say, times 0.9): a good one saves time, a bad one costs a second pass; the
    result never depends on it, since a bound that at least n values exceed cannot cut one of the n largest.
    """

    def choose(chunks):
        if x_BD.device.type != "cpu":  # one radix select: no data-dependent shapes, no host sync
            ((_, post_relu_BF),) = chunks()
            top = post_relu_BF.flatten().topk(n, sorted=False)
            flat_N, order = top.indices.sort()
            return top.values[order], flat_N
        values_N, flat_N = _above(chunks, torch.zeros(()) if guess is None else guess.clamp(min=0))
        if guess is not None and len(values_N) < n:
            values_N, flat_N = _above(chunks, torch.zeros(()))
        return _largest(values_N, flat_N, n)

    return _encode(x_BD, encoder_FD, bias_F, b_dec_D, choose)


def _above(chunks, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Values strictly above `bound` and their flat indices, ascending."""
    values, flat = [], []
    for start, post_relu_bF in chunks():
        index = torch.nonzero(post_relu_bF.flatten() > bound).squeeze(1)
        values.append(post_relu_bF.flatten()[index])
        flat.append(index + start * post_relu_bF.shape[1])
    return torch.cat(values), torch.cat(flat)


def _largest(values_N: Tensor, flat_N: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest of the candidates, still in ascending order of index; among equals the first."""
    if len(values_N) <= n:
        return values_N, flat_N
    threshold = values_N.topk(n, sorted=False).values.min()
    keep_N = values_N > threshold
    ties = torch.nonzero(values_N == threshold).squeeze(1)
    keep_N[ties[: n - int(keep_N.sum())]] = True
    return values_N[keep_N], flat_N[keep_N]
