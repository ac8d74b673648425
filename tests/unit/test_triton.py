"""The Triton kernels equal the torch functions they replace, and compile for the GPUs they are meant for.

With a GPU the kernels run on it.  Without one Triton interprets them, which it must be told before it is imported.
"""

import os
import subprocess
import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from dictionary_learning.kernels import triton_adam, triton_ops  # noqa: E402
from dictionary_learning.kernels.triton_ops import (  # noqa: E402
    decode,
    decoder_backward,
    encoder_backward,
    select_batch_topk,
    select_topk,
)

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def draw():
    """draw(shape) = normal numbers, in fp32."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(DEVICE)


# -- embedding bags

R, F = 5, 19


def pairs(kind: str, index_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(row_N, latent_N, offsets_R, order_N, offsets_F): rows ascend; row 3 and the last latents have no pair."""
    generator = torch.Generator().manual_seed(1)
    n = 0 if kind == "no pair" else 60
    row_N = torch.tensor([0, 1, 2, 4])[torch.randint(4, (n,), generator=generator)].sort().values
    latent_N = torch.randint(F - 3, (n,), generator=generator)
    if kind == "one latent":
        latent_N[:] = 7
    if kind == "one latent in half":
        latent_N[10:40] = 7
    order_N = latent_N.argsort(stable=True)
    first_of_row, first_of_latent = torch.arange(R), torch.arange(F)
    offsets = torch.searchsorted(row_N, first_of_row), torch.searchsorted(latent_N[order_N], first_of_latent)
    return tuple(x.to(DEVICE, index_dtype) for x in (row_N, latent_N, offsets[0], order_N, offsets[1]))


def assert_sums_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to the order of an fp32 sum of some ten terms of size 1, and one rounding to the result's dtype."""
    tolerance = 1e-5 if actual.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 20, 33, 300])  # 300 is two blocks of columns
def test_decode_sums_weighted_rows(draw, width, dtype, index_dtype):
    for kind in ("random", "one latent", "no pair"):
        row_N, latent_N, offsets_R, _, _ = pairs(kind, index_dtype)
        values_N, table_FD = draw(len(row_N)).to(dtype), draw(F, width).to(dtype)
        x_hat_RD = decode(latent_N, table_FD, offsets_R, values_N)
        terms_ND = values_N.float()[:, None] * table_FD.float()[latent_N.long()]
        assert x_hat_RD.dtype == dtype
        assert_sums_close(x_hat_RD, torch.zeros(R, width, device=DEVICE).index_add(0, row_N.long(), terms_ND))


@pytest.mark.parametrize("chunk", [4, 64])  # bags that are split, and not
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 20, 33, 1100])  # 1100 is two blocks of columns
def test_backward_passes_sum_over_the_pairs_of_a_latent(draw, width, dtype, chunk, monkeypatch):
    monkeypatch.setattr(triton_ops, "CHUNK", chunk)
    for kind in ("random", "one latent", "one latent in half", "no pair"):
        row_N, latent_N, _, order_N, offsets_F = pairs(kind, torch.int64)
        values_N, table_FD, grad_RD = draw(len(row_N)).to(dtype), draw(F, width).to(dtype), draw(R, width).to(dtype)
        terms_ND = values_N.float()[:, None] * grad_RD.float()[row_N]
        expected_FD = torch.zeros(F, width, device=DEVICE).index_add(0, latent_N, terms_ND)
        expected_F = torch.zeros(F, device=DEVICE).index_add(0, latent_N, values_N.float())
        expected_N = (table_FD.float()[latent_N] * grad_RD.float()[row_N]).sum(1)

        grad_values_N, grad_table_FD = decoder_backward(values_N, table_FD, grad_RD, row_N, order_N, offsets_F)
        grad_encoder_FD, grad_bias_F = encoder_backward(values_N, grad_RD, row_N, order_N, offsets_F)

        assert grad_values_N.dtype == dtype and grad_table_FD.dtype == grad_encoder_FD.dtype == torch.float32
        torch.testing.assert_close(
            grad_values_N.float(), expected_N, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-4
        )
        for actual_FD in (grad_table_FD, grad_encoder_FD):
            torch.testing.assert_close(actual_FD, expected_FD, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad_bias_F, expected_F, rtol=1e-5, atol=1e-5)


# -- selection


def largest(pre_BF: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What both selections must return, by a stable sort."""
    post_BF = pre_BF.relu()
    index_BK = post_BF.float().sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    return post_BF.gather(1, index_BK), index_BK


ENTRIES = {
    "random": lambda pre: pre,
    "ties": lambda pre: pre.round(),
    "one value": lambda pre: torch.ones_like(pre),
    "few positive": lambda pre: pre - 2,
    "none positive": lambda pre: -pre.abs(),
    "NaN": lambda pre: pre.where(pre < 1.5, torch.nan),
}


@pytest.fixture
def small_blocks(monkeypatch):
    """So that small tensors take many programs, tiles and rounds."""
    for name, size in [
        ("ROW_PART", 64),
        ("BLOCK", 64),
        ("TILE", 16),
        ("HISTOGRAM_TILE", 32),
        ("HISTOGRAM_PROGRAMS", 3),
    ]:
        monkeypatch.setattr(triton_ops, name, size)


@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width, k", [(1, 1), (3, 2), (20, 20), (33, 5), (64, 1), (200, 4), (200, 150), (256, 3)])
def test_topk_is_the_first_of_a_stable_sort(draw, small_blocks, width, k, dtype, kind):
    pre_BF = ENTRIES[kind](draw(3, width)).to(dtype)
    values_BK, index_BK = select_topk(pre_BF, k)
    expected_values_BK, expected_index_BK = largest(pre_BF, k)
    assert index_BK.equal(expected_index_BK)
    torch.testing.assert_close(values_BK, expected_values_BK, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width, n", [(1, 4), (3, 1), (20, 80), (33, 20), (100, 7)])
def test_batch_topk_is_the_first_of_a_stable_sort_whatever_the_guess(draw, small_blocks, width, n, dtype, kind):
    pre_BF = ENTRIES[kind](draw(4, width)).to(dtype)
    (expected_values_n,), (expected_flat_n,) = largest(pre_BF.view(1, -1), n)
    # none; below and just at the n-th largest; so low that the pool overflows; too high; no number
    for guess in (None, 0.9 * expected_values_n.min(), expected_values_n.min(), -1.0, 1e9, torch.nan):
        guess = None if guess is None else torch.as_tensor(guess, device=DEVICE).float()
        values_n, flat_n = select_batch_topk(pre_BF, n, guess)
        assert flat_n.equal(expected_flat_n)
        torch.testing.assert_close(values_n, expected_values_n, rtol=0, atol=0, equal_nan=True)


def test_batch_topk_reads_only_the_pool_after_a_good_guess(draw, small_blocks, monkeypatch):
    pre_BF = draw(4, 100)
    (expected_values_n,), (expected_flat_n,) = largest(pre_BF.view(1, -1), 20)
    guess = 0.9 * expected_values_n.min()
    groups = pre_BF.view(-1, 4)  # of 16 bytes
    cold = groups.amax(1) < guess
    kernel = triton_ops._histogram_kernel

    class AfterTampering:
        def __getitem__(self, grid):
            groups[cold] = 100.0
            return kernel[grid]

    monkeypatch.setattr(triton_ops, "_histogram_kernel", AfterTampering())
    values_n, flat_n = select_batch_topk(pre_BF, 20, guess)
    assert flat_n.equal(expected_flat_n) and values_n.equal(expected_values_n)
