"""Pre-activations in bf16, and how far they may lie from those in fp32: far cheaper, and enough to tell most pairs out.

The top-k family keeps few pairs.  A product in bf16 finds all pairs that may be above a bound; only these are worked
out in fp32, and what is chosen among them is what the fp32 product chooses, to the order of summation.

How far off: bf16 has 8 significant bits, so rounding to nearest gives z (1 + r) with |r| <= u = 2^-8.  Products of two
such numbers are exact in fp32, and so, with z and e rounded, each term z_i e_i is off by at most (2 u + u^2) |z_i e_i|,
and their sum by (2 u + u^2) |z| |e| (Cauchy and Schwarz).  The bias is off by u |c|.  Summing D + 1 terms in fp32, in
whatever order, adds at most (D + 1) 2^-23 (|z| |e| + |c|), here and once more in the fp32 value that is compared with.
Numbers below 2^-126 may be taken for 0, which `ABSOLUTE` covers many times.  The sum is last rounded to bf16; rounding
is monotone, so a sum of at least t still reaches t after both are rounded, and nothing has to be added for it.

b tokens and c latents of a tile, D activation_dim.
"""

import time
from functools import cache

import torch
from torch import Tensor

UNIT = 2.0**-8
ABSOLUTE = 1e-30
PAYS_FROM = 2.0  # times as fast as in fp32 a product must be, since the pairs kept are worked out again
# Multiplications of an encoder at least, and share of pairs kept at most. On two cores with AMX both take the same
# at 2^27 (D 192, F 2048, B 512, k 32), the screened one half of the time at 2^34 (D 512, F 16384, B 2048, k 64).
PAYS_MULTIPLICATIONS, PAYS_SPARSE = 2**30, 1 / 64


@cache
def bf16_is_faster() -> bool:
    """Whether this processor multiplies matrices in bf16 at least `PAYS_FROM` times as fast as in fp32, by doing it.

    With instructions for it, the ratio is 2 to 16; without, it is below 1.
    """
    z_bD, weight_cD = torch.ones(512, 512), torch.ones(1024, 512)
    seconds = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for _ in range(5):
        for dtype in seconds:
            z, weight = z_bD.to(dtype), weight_cD.to(dtype)
            out = torch.empty(512, 1024, dtype=dtype)
            start = time.perf_counter()
            torch.mm(z, weight.T, out=out)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds[torch.float32] > PAYS_FROM * seconds[torch.bfloat16]


def pays(n_tokens: int, activation_dim: int, dict_size: int, k: int) -> bool:
    """Whether to screen such batches, of which about k pairs a token are kept, on the CPU."""
    large = n_tokens * activation_dim * dict_size >= PAYS_MULTIPLICATIONS and k <= PAYS_SPARSE * dict_size
    return large and bf16_is_faster()


def slack(norm_b1: Tensor, weight_cD: Tensor, bias_c: Tensor) -> Tensor:
    """(b, 1): what a token's pre-activations in bf16, before they are rounded, may differ from fp32's at most."""
    summing = 2 * (weight_cD.shape[1] + 1) * 2.0**-23
    # the norms are rounded too; a thousandth more is ample
    largest = torch.linalg.vector_norm(weight_cD, dim=1).amax() * (1.001 * (2 * UNIT + UNIT**2 + summing))
    return (norm_b1 * largest).add_(bias_c.abs().amax() * (UNIT + summing) + ABSOLUTE)
