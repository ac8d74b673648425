"""Matryoshka BatchTopK SAEs.

Bussmann et al. 2025, https://arxiv.org/abs/2503.17547

B tokens in the batch, D activation_dim, E output_dim, F dict_size, G groups, N active pairs.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..dictionary import Dictionary, MatryoshkaBatchTopKSAE
from ..kernels import Features
from ..kernels.sparse import sparse_decode
from .batch_top_k import BatchTopKTrainer
from .standard import squared_error
from .top_k import TopKConfig
from .trainer import Terms


@dataclass(kw_only=True)
class MatryoshkaConfig(TopKConfig):
    group_fractions: list[float]
    group_weights: list[float] | None = None  # equal ones that add up to 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isclose(sum(self.group_fractions), 1.0):
            raise ValueError(f"group_fractions must add up to 1, got {self.group_fractions}.")
        if min(self.group_sizes) <= 0:
            raise ValueError(f"dict_size {self.dict_size} is too small for groups of {self.group_fractions}.")
        if self.group_weights is None:
            self.group_weights = [1 / len(self.group_fractions)] * len(self.group_fractions)
        if len(self.group_weights) != len(self.group_fractions):
            raise ValueError(
                f"group_weights must be as many as group_fractions ({len(self.group_fractions)}), "
                f"got {len(self.group_weights)}."
            )

    @property
    def group_sizes(self) -> list[int]:
        sizes = [int(fraction * self.dict_size) for fraction in self.group_fractions[:-1]]
        return [*sizes, self.dict_size - sum(sizes)]


class MatryoshkaBatchTopKTrainer(BatchTopKTrainer):
    """BatchTopK whose every prefix of groups must reconstruct the activations."""

    Config = MatryoshkaConfig
    cfg: MatryoshkaConfig
    ae: MatryoshkaBatchTopKSAE
    dict_class = MatryoshkaBatchTopKSAE

    def build(self) -> Dictionary:
        cfg = self.cfg
        dict_class = cfg.dict_class or self.dict_class
        groups = {"k": cfg.k, "group_sizes": cfg.group_sizes}
        return dict_class(cfg.activation_dim, cfg.dict_size, **groups, generator=self.generator, **cfg.target)  # pyright: ignore[reportCallIssue]

    def reconstruct(self, x_BD: Tensor, f: Features, y_BE: Tensor) -> tuple[Tensor, Tensor, Terms]:
        code, n_groups = f.code, len(self.cfg.group_fractions)
        assert code is not None
        # a latent's group, and one bag a (token, group): rows ascend, since the pairs ascend by token and latent
        ends_G = self.ae.group_sizes.cumsum(0)
        first = self.shard.rank * code.dict_size  # of this process's latents
        group_N = torch.searchsorted(ends_G, code.latent_N + first, right=True)
        row_N = code.token_N * n_groups + group_N
        parts = self.shard.sum(sparse_decode(f.values, self.ae.decoder_FD, code, row_N, len(x_BD) * n_groups))
        errors, x_hat_BE = [], self.offset(x_BD)
        for part_BE in parts.view(len(x_BD), n_groups, -1).unbind(1):  # each prefix adds a group to the one before
            x_hat_BE = x_hat_BE + part_BE
            errors.append(squared_error(y_BE, x_hat_BE))
        assert self.cfg.group_weights is not None
        errors_G = torch.stack([weight * error for weight, error in zip(self.cfg.group_weights, errors, strict=True)])
        # weighted and averaged: with weights 1/G each term counts 1/G^2, in the reference too
        error = errors_G.mean()
        terms: Terms = {
            "l2_loss": error,
            "min_l2_loss": errors_G.min(),
            "max_l2_loss": errors_G.max(),
        }
        return x_hat_BE, error, terms

    @property
    def config(self) -> dict[str, Any]:
        return {**super().config, "group_sizes": self.cfg.group_sizes}
