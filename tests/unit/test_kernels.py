"""Every kernel equals the dense computation it replaces: values, gradients, ties, empty rows."""

import operator

import pytest
import torch
from torch.nn.functional import linear

from dictionary_learning.kernels import Features, backend, encode_above, encode_batch_topk, encode_topk, screen, select
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


# -- screening in bf16


def screened_pairs(f: Features) -> tuple[list[int], torch.Tensor]:
    """(flat indices of the pairs that are not zero, their values)"""
    flat_N = f.code.token_N * f.code.dict_size + f.code.latent_N
    order_N = flat_N.argsort()
    kept_N = order_N[f.values.index_select(0, order_N) > 0]
    return flat_N[kept_N].tolist(), f.values.detach()[kept_N]


def rows_between_bf16_numbers(generator, n: int, width: int) -> torch.Tensor:
    """Each entry as far from a bf16 number as it can be, those of a row all to one side: rounding errors add up."""
    whole = torch.randint(128, 136, (n, width), generator=generator)  # / 256: bf16 numbers, the next one 1 / 256 away
    sign = torch.randint(0, 2, (n, 1), generator=generator) * 2 - 1
    return (whole + 0.5 + sign * 0.001) / 256


SCREENED = {
    "normal": lambda g, n, d: torch.randn(n, d, generator=g) / d**0.5,
    "errors that add up": rows_between_bf16_numbers,
    "rows of many sizes": lambda g, n, d: torch.randn(n, d, generator=g) * torch.logspace(-6, 4, n)[:, None],
    "all alike": lambda g, n, d: torch.ones(n, d) + 1e-3 * torch.randn(n, d, generator=g),
    "cancelling": lambda g, n, d: torch.randn(n, d, generator=g).sign() * (1 + 2**-9),
}


@pytest.mark.parametrize("tile", [(64, 64 * 64), (2048, 2**21)])  # many tiles, and one
@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
@pytest.mark.parametrize("rows", SCREENED)
def test_screening_chooses_what_fp32_chooses(rows, kind, tile, monkeypatch):
    monkeypatch.setattr(select, "TILE_TOKENS", tile[0])
    monkeypatch.setattr(select, "TILE_ENTRIES", tile[1])
    generator = torch.Generator().manual_seed(0)
    n_tokens, width, dict_size, k = 96, 96, 1024, 10
    x_BD, encoder_FD = SCREENED[rows](generator, n_tokens, width), SCREENED[rows](generator, dict_size, width)
    bias_F, b_dec_D = 0.01 * torch.randn(dict_size, generator=generator), torch.zeros(width)
    for guess in (None, torch.tensor(0.05), torch.tensor(1e9)) if kind == "batch_topk" else (None,):
        chosen = []
        for screened in (False, True):
            if kind == "topk":
                f = encode_topk(x_BD, encoder_FD, bias_F, b_dec_D, k, screened=screened)
                assert len(f.values) == k * n_tokens and (f.code.token_N.diff() >= 0).all()
            else:
                f = encode_batch_topk(x_BD, encoder_FD, bias_F, b_dec_D, k * n_tokens, guess, screened=screened)
                assert len(f.values) == k * n_tokens
            chosen.append(screened_pairs(f))
        exact_BF = torch.relu(linear(x_BD.double(), encoder_FD.double(), bias_F.double()))
        magnitude = torch.linalg.vector_norm(x_BD, dim=1)[:, None] * torch.linalg.vector_norm(encoder_FD, dim=1)
        off_BF = width * 2**-23 * magnitude + 1e-6  # what the order of summation may change
        for flat, values in chosen:
            index = torch.tensor(flat)
            assert ((values - exact_BF.flatten()[index]).abs() <= off_BF.flatten()[index]).all()
            # whatever is chosen in one form alone is as large as what is not, to that order
            left_BF = exact_BF.flatten().index_fill(0, index, -1).view_as(exact_BF) - off_BF
            kept_BF = torch.full_like(exact_BF, torch.inf).flatten().index_copy(0, index, exact_BF.flatten()[index])
            kept_BF = kept_BF.view_as(exact_BF) + off_BF
            if kind == "topk":
                assert (left_BF.amax(1) <= kept_BF.amin(1)).all()
            else:
                assert left_BF.max() <= kept_BF.min()
        assert len(set(chosen[0][0]) ^ set(chosen[1][0])) <= 0.02 * k * n_tokens or rows == "all alike"


@pytest.mark.parametrize("rows", SCREENED)
def test_bf16_lies_within_the_bound(rows):
    """And for some rows the bound is nearly reached: it is no wider than it has to be."""
    generator = torch.Generator().manual_seed(1)
    width = 256
    z_bD, weight_cD = SCREENED[rows](generator, 64, width), SCREENED[rows](generator, 128, width)
    bias_c = torch.zeros(128)
    norm_b1 = torch.linalg.vector_norm(z_bD, dim=1, keepdim=True)
    off_bc = z_bD.double() @ weight_cD.double().T - z_bD.bfloat16().double() @ weight_cD.bfloat16().double().T
    allowed_b1 = screen.slack(norm_b1, weight_cD, bias_c)
    assert (off_bc.abs() <= allowed_b1).all()
    if rows == "errors that add up":
        assert (off_bc.abs() > 0.9 * allowed_b1).any()
    computed_bc = torch.addmm(bias_c.bfloat16(), z_bD.bfloat16(), weight_cD.bfloat16().T)
    exact_bc = z_bD.double() @ weight_cD.double().T
    # a sum of at least t reaches t, both rounded to bf16
    assert (computed_bc >= (exact_bc - allowed_b1).to(torch.bfloat16)).all()
    assert (computed_bc <= (exact_bc + allowed_b1).to(torch.bfloat16)).all()


def test_screening_is_for_large_sparse_batches_where_bf16_is_faster(monkeypatch):
    for faster in (False, True):
        monkeypatch.setattr(screen, "bf16_is_faster", lambda faster=faster: faster)
        assert screen.pays(2048, 512, 16384, 64) == faster
        assert not screen.pays(32, 16, 128, 4) and not screen.pays(2048, 512, 16384, 8192)


# -- pieces


def test_pieces_of_a_matrix_make_the_whole(monkeypatch):
    monkeypatch.setattr(backend, "PIECE_ENTRIES", 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    values = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    rows = backend.in_pieces(lambda rows: list(range(rows.start, rows.stop)), *values.shape)
    assert len(rows) == 3 and sum(rows, []) == list(range(50))
    assert select._kth_largest(values, 3).equal(values.topk(3, dim=1).values[:, -1])
    for bound in (torch.tensor(0.3), torch.randn(50, 1), torch.randn(7)):
        found = select._where(operator.gt, values, bound)
        assert found.equal((values > bound).flatten().nonzero().squeeze(1))
