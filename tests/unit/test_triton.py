"""The Triton kernels equal the torch functions they replace, and compile for the GPUs they are meant for.

With a GPU the kernels run on it.  Without one Triton interprets them, which it must be told before it is imported.
The interpreter rounds to bfloat16 towards zero, compiled kernels to nearest: without a GPU, what is written in bfloat16
is held to a unit in the last place alone (findings/triton_interpreter_bfloat16.sh).
"""

import os
import subprocess
import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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

R, F = 5, 11


def pairs(kind: str, index_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(row_N, latent_N, offsets_R, order_N, offsets_F): rows ascend; row 3 and the last latents have no pair."""
    generator = torch.Generator().manual_seed(1)
    n = 0 if kind == "no pair" else 40
    row_N = torch.tensor([0, 1, 2, 4])[torch.randint(4, (n,), generator=generator)].sort().values
    latent_N = torch.randint(F - 3, (n,), generator=generator)
    if kind == "one latent":
        latent_N[:] = 7
    if kind == "one latent but for nine pairs":  # chunks of 4 begin and end inside its bag
        latent_N[:6], latent_N[6:37], latent_N[37:] = 2, 7, 8
    order_N = latent_N.argsort(stable=True)
    first_of_row, first_of_latent = torch.arange(R), torch.arange(F)
    offsets = torch.searchsorted(row_N, first_of_row), torch.searchsorted(latent_N[order_N], first_of_latent)
    return tuple(x.to(DEVICE, index_dtype) for x in (row_N, latent_N, offsets[0], order_N, offsets[1]))


def assert_sums_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to the order of an fp32 sum of some ten terms of size 1, and one rounding to the result's dtype."""
    tolerance = 1e-5 if actual.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("dtype, index_dtype", [(torch.float32, torch.int64), (torch.bfloat16, torch.int32)])
@pytest.mark.parametrize("width", [1, 3, 20, 33, 300])  # 300 is two blocks of columns
def test_decode_sums_weighted_rows(draw, width, dtype, index_dtype):
    for kind in ("random", "one latent", "no pair"):
        row_N, latent_N, offsets_R, _, _ = pairs(kind, index_dtype)
        values_N, table_FD = draw(len(row_N)).to(dtype), draw(F, width).to(dtype)
        x_hat_RD = decode(latent_N, table_FD, offsets_R, values_N)
        terms_ND = values_N.float()[:, None] * table_FD.float()[latent_N.long()]
        assert x_hat_RD.dtype == dtype
        assert_sums_close(x_hat_RD, torch.zeros(R, width, device=DEVICE).index_add(0, row_N.long(), terms_ND))


@pytest.mark.parametrize("dtype, index_dtype", [(torch.float32, torch.int64), (torch.bfloat16, torch.int32)])
@pytest.mark.parametrize(  # 1100 columns are two blocks; chunks of 4 pairs split bags, chunks of 64 do not
    "width, chunk", [(1, 4), (3, 4), (20, 4), (33, 4), (1100, 4), (33, 64)]
)
def test_backward_passes_sum_over_the_pairs_of_a_latent(draw, width, dtype, index_dtype, chunk, monkeypatch):
    monkeypatch.setattr(triton_ops, "CHUNK", chunk)
    for kind in ("one latent", "one latent but for nine pairs", "no pair"):
        row_N, latent_N, _, order_N, offsets_F = pairs(kind, index_dtype)
        values_N, table_FD, grad_RD = draw(len(row_N)).to(dtype), draw(F, width).to(dtype), draw(R, width).to(dtype)
        row_N, latent_N, index = row_N.long(), latent_N.long(), (row_N, order_N, offsets_F)
        terms_ND = values_N.float()[:, None] * grad_RD.float()[row_N]
        expected_FD = torch.zeros(F, width, device=DEVICE).index_add(0, latent_N, terms_ND)
        expected_F = torch.zeros(F, device=DEVICE).index_add(0, latent_N, values_N.float())
        expected_N = (table_FD.float()[latent_N] * grad_RD.float()[row_N]).sum(1)

        grad_values_N, grad_table_FD = decoder_backward(values_N, table_FD, grad_RD, *index)
        grad_encoder_FD, grad_bias_F = encoder_backward(values_N, grad_RD, *index)

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
        ("TILE", 32),
        ("HISTOGRAM_TILE", 32),
        ("HISTOGRAM_PROGRAMS", 2),
    ]:
        monkeypatch.setattr(triton_ops, name, size)


@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width, k", [(1, 1), (33, 33), (33, 2), (200, 150), (512, 2), (520, 2)])
def test_topk_is_the_first_of_a_stable_sort(draw, small_blocks, width, k, dtype, kind):
    pre_BF = ENTRIES[kind](draw(3, width)).to(dtype)
    values_BK, index_BK = select_topk(pre_BF, k)
    expected_values_BK, expected_index_BK = largest(pre_BF, k)
    assert index_BK.equal(expected_index_BK)
    torch.testing.assert_close(values_BK, expected_values_BK, rtol=0, atol=0, equal_nan=True)


def guesses(threshold: torch.Tensor) -> list[torch.Tensor | None]:
    """None; good ones; one so low that the pool overflows; ones that too few entries exceed; no number."""
    numbers = [0.9 * threshold, threshold, -1.0, 1e9, torch.nan]
    return [None, *(torch.as_tensor(number, device=DEVICE).float() for number in numbers)]


@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width, n", [(1, 3), (33, 3), (33, 12), (33, 99)])
def test_batch_topk_is_the_first_of_a_stable_sort_whatever_the_guess(draw, small_blocks, width, n, dtype, kind):
    pre_BF = ENTRIES[kind](draw(3, width)).to(dtype)
    (expected_values_n,), (expected_flat_n,) = largest(pre_BF.view(1, -1), n)
    every_guess = (kind, n) in {("random", 3), ("few positive", 12)}
    for guess in guesses(expected_values_n.min())[: None if every_guess else 2]:
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


# -- without a GPU: compilation, and what the functions ask of the host

COMPILE = """
import sys
from types import SimpleNamespace
import torch, triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from dictionary_learning.kernels.triton_adam import adam_, gradient_norm
from dictionary_learning.kernels.triton_ops import (
    decode, decoder_backward, encoder_backward, select_batch_topk, select_topk
)

target = GPUTarget("cuda", int(sys.argv[1]), 32)
triton.runtime.driver.set_active(SimpleNamespace(
    get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
))
compiled = set()

def compile_only(kernel, grid):
    def launch(*args, **settings):
        result = kernel.run(*args, grid=grid, warmup=True, **settings)
        assert len(result.asm["cubin"]) > 1000
        compiled.add(kernel.fn.__name__)
    return launch

JITFunction.__getitem__ = compile_only
operations = set()

class Record(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        operations.add(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))

B, F, N = 8, 16, 256
one = torch.ones(())
long = lambda *shape: torch.zeros(shape, dtype=torch.int64)
for dtype in (torch.float32, torch.bfloat16):
    zeros = lambda *shape: torch.zeros(shape, dtype=dtype)
    for D in (512, 2304):
        operands = zeros(N), zeros(F, D), zeros(B, D), long(N), long(N), long(F)
        weight, bias = torch.zeros(F, D), torch.zeros(D)
        with Record():
            decode(long(N), operands[1], long(B), operands[0])
            decoder_backward(*operands)
            encoder_backward(operands[0], *operands[2:])
            if dtype == torch.float32:
                _, along_F = gradient_norm(weight, weight, 0.0)
                constrained = dict(divisor=one, along_F=along_F, renorm_eps=0.0)
                adam_(weight, weight, weight, weight, one, lr=one, betas=(0.9, 0.999), found_inf=one, **constrained)
                gradient_norm(bias, None)
                adam_(bias, bias, bias, bias, one, lr=1e-3, betas=(0.0, 0.999), found_inf=one)
    pre_BF = zeros(4, 16384)
    with Record():
        select_topk(pre_BF, 64)
        select_batch_topk(pre_BF, 256, one)
print(*sorted(compiled))
print(*sorted(operations))
"""

# none of them waits for the device, or has a shape that depends on data
ASYNCHRONOUS = set(
    "_to_copy arange cumsum detach empty empty_like new_empty new_zeros searchsorted select sqrt sub sum view "
    "zeros".split()
)


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_and_no_function_waits_for_the_device(capability, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMPILE, str(capability)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    compiled, operations = (set(line.split()) for line in result.stdout.splitlines())
    kernels = {name for module in (triton_adam, triton_ops) for name in vars(module) if name.endswith("_kernel")}
    assert compiled == kernels
    assert operations <= ASYNCHRONOUS
