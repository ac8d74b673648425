"""Every kernel equals the dense computation it replaces: values, gradients, ties, empty rows."""

import pytest
import torch
from torch.nn.functional import linear

from dictionary_learning.kernels import Features, encode_above, encode_batch_topk, encode_topk, select
from dictionary_learning.kernels.sparse import sparse_decode

# B tokens, D activation_dim, F dict_size
B, D, F = 24, 8, 40


@pytest.fixture
def encoder():
    """(x_BD, encoder_FD, bias_F, b_dec_D) in float64; decoder rows follow as a fifth."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, D), (F, D), (F,), (D,), (F, D)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def dense_features(kind: str, x_BD, encoder_FD, bias_F, b_dec_D, k: int):
    post_relu_BF = torch.relu(linear(x_BD - b_dec_D, encoder_FD, bias_F))
    if kind == "topk":
        top = post_relu_BF.topk(k, dim=1)
        return torch.zeros_like(post_relu_BF).scatter(1, top.indices, top.values)
    if kind == "batch_topk":
        top = post_relu_BF.flatten().topk(k * len(x_BD))
        return torch.zeros_like(post_relu_BF).flatten().scatter(0, top.indices, top.values).view_as(post_relu_BF)
    return post_relu_BF


def sparse_features(kind: str, x_BD, encoder_FD, bias_F, b_dec_D, k: int) -> Features:
    if kind == "topk":
        return encode_topk(x_BD, encoder_FD, bias_F, b_dec_D, k)
    if kind == "batch_topk":
        return encode_batch_topk(x_BD, encoder_FD, bias_F, b_dec_D, k * len(x_BD))
    return encode_above(x_BD, encoder_FD, bias_F, b_dec_D, 0.0)


# tokens and entries of a tile; None: no tiles, as on a GPU
@pytest.mark.parametrize("tile", [(1, 10), (5, 5 * 10), (7, 7 * 16), (2048, 2**21), None])
@pytest.mark.parametrize("kind", ["topk", "batch_topk", "above"])
@pytest.mark.parametrize("k", [1, 7, F])
def test_sparse_step_equals_dense_autograd(encoder, kind, k, tile, monkeypatch, as_on_a_gpu):
    if tile is None:
        as_on_a_gpu()
    else:
        monkeypatch.setattr(select, "TILE_TOKENS", tile[0])
        monkeypatch.setattr(select, "TILE_ENTRIES", tile[1])
    x_BD, encoder_FD, bias_F, b_dec_D, decoder_FD = encoder
    leaves = [encoder_FD, bias_F, b_dec_D, decoder_FD]

    f_BF = dense_features(kind, x_BD.detach(), encoder_FD, bias_F, b_dec_D, k)
    expected = f_BF @ decoder_FD + b_dec_D
    # the values enter the loss on their own too, as in an L1 penalty
    expected_grads = torch.autograd.grad(expected.pow(2).sum() + f_BF.pow(2).sum(), leaves)

    f = sparse_features(kind, x_BD.detach(), encoder_FD, bias_F, b_dec_D, k)
    x_hat_BD = f.decode(decoder_FD) + b_dec_D
    grads = torch.autograd.grad(x_hat_BD.pow(2).sum() + f.sum_over_latents(f.values.pow(2)).sum(), leaves)

    torch.testing.assert_close(f.dense(), f_BF)
    torch.testing.assert_close(x_hat_BD, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)
    assert f.fired().equal((f_BF > 0).any(0))
    torch.testing.assert_close(f.sum_over_tokens(f.values), f_BF.sum(0))
    torch.testing.assert_close(f.sum_over_latents(f.values * f.of_latent(bias_F)), (f_BF * bias_F).sum(1))


def test_batch_topk_takes_exactly_n_and_the_lowest_index_among_ties(encoder):
    _, encoder_FD, bias_F, b_dec_D, _ = encoder
    ones_FD, zeros_F, zeros_D = torch.ones_like(encoder_FD), torch.zeros_like(bias_F), torch.zeros_like(b_dec_D)
    x_BD = torch.zeros(B, D, dtype=torch.float64)
    x_BD[:, 0] = torch.randperm(B, generator=torch.Generator().manual_seed(0)) + 1  # of every latent at that token
    f = encode_batch_topk(x_BD, ones_FD, zeros_F, zeros_D, n=3 * F + 5)
    assert len(f.values) == 3 * F + 5
    rows = x_BD[:, 0].argsort(descending=True)
    flat = (f.code.token_N * F + f.code.latent_N).tolist()
    expected = [int(row) * F + i for row in rows[:3] for i in range(F)] + [int(rows[3]) * F + i for i in range(5)]
    assert flat == sorted(expected)


@pytest.mark.parametrize("guess", [0.0, 0.5, 2.0, 1e9])
def test_batch_topk_does_not_depend_on_the_guess(encoder, guess):
    x_BD, encoder_FD, bias_F, b_dec_D, _ = encoder
    plain = encode_batch_topk(x_BD, encoder_FD, bias_F, b_dec_D, 5 * B)
    guessed = encode_batch_topk(x_BD, encoder_FD, bias_F, b_dec_D, 5 * B, torch.tensor(guess))
    assert plain.dense().equal(guessed.dense())


def test_nothing_active_reconstructs_the_bias(encoder):
    x_BD, encoder_FD, _, b_dec_D, decoder_FD = encoder
    bias_F = torch.full((F,), -1e6, dtype=torch.float64, requires_grad=True)
    f = encode_batch_topk(x_BD, encoder_FD, bias_F, b_dec_D, 3 * B)
    x_hat_BD = f.decode(decoder_FD) + b_dec_D
    assert len(f.values) == 0
    assert x_hat_BD.equal(b_dec_D.expand(B, D))
    x_hat_BD.sum().backward()
    assert not encoder_FD.grad.any() and not decoder_FD.grad.any() and not bias_F.grad.any()


def test_rows_may_be_finer_than_tokens(encoder):
    """Bags of (token, half of the latents), as Matryoshka decodes its groups."""
    x_BD, encoder_FD, bias_F, b_dec_D, decoder_FD = encoder
    f = encode_batch_topk(x_BD, encoder_FD, bias_F, b_dec_D, 6 * B)
    row_N = f.code.token_N * 2 + (f.code.latent_N >= F // 2)
    parts_B2D = sparse_decode(f.values, decoder_FD, f.code, row_N, 2 * B).view(B, 2, D)
    f_BF = f.dense()
    halves = [f_BF[:, : F // 2] @ decoder_FD[: F // 2], f_BF[:, F // 2 :] @ decoder_FD[F // 2 :]]
    torch.testing.assert_close(parts_B2D, torch.stack(halves, dim=1))
