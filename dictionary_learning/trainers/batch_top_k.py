"""BatchTopK SAEs.

Bussmann et al. 2024, https://arxiv.org/abs/2412.06410

B tokens in the batch, D activation_dim, F dict_size, N active pairs.
"""

from typing import Any

import torch
from torch import Tensor

from ..dictionary import BatchTopKSAE
from ..kernels import Features, encode_batch_topk
from .top_k import TopKTrainer
from .trainer import LossOutput


class BatchTopKTrainer(TopKTrainer):
    """TopK with the k B largest activations of the batch in place of the k largest of each token."""

    dict_class = BatchTopKSAE

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        # a value that will probably lie below the next batch's smallest selected one; it saves work and changes nothing
        self.guess: Tensor | None = None

    def select(self, x_BD: Tensor) -> Features:
        ae, n = self.ae, self.k * len(x_BD)
        return encode_batch_topk(
            x_BD, ae.encoder_FD, ae.encoder_bias_F, ae.subtracted_D, n, self.guess, self.shard, self.screened
        )

    def fired(self, f: Features) -> Tensor:
        return f.fired()

    def smallest_active(self, out: LossOutput) -> Tensor:
        """Scalar: the smallest positive activation of the batch; +inf where there is none."""
        return out.f.smallest()

    def note_smallest(self, step: int, least: Tensor) -> None:
        super().note_smallest(step, least)
        self.guess = torch.where(least < torch.inf, 0.95 * least, 0)
