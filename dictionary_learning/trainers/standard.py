"""Standard SAEs: an L1 penalty on the features.

B tokens in the batch, D activation_dim, E output_dim, F dict_size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ..dictionary import AutoEncoder
from ..kernels import Features, encode_above
from .trainer import LossOutput, SparseTrainer, SparsityWarmup, Terms, TrainerConfig, UnitNorm


@dataclass(kw_only=True)
class StandardAprilConfig(SparsityWarmup, TrainerConfig):
    lr: float | None = 1e-3
    l1_penalty: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sparsity_warmup(self.steps, self.decay_start)
        self.check_range("l1_penalty")


@dataclass(kw_only=True)
class StandardConfig(StandardAprilConfig):
    resample_steps: int | None = None  # revive dead latents this often; excludes decay_start

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resample_steps is not None:
            if self.decay_start is not None:
                raise ValueError("resample_steps restarts the learning rate, so decay_start must be None with it.")
            if not 0 < self.resample_steps < self.steps:
                raise ValueError(f"resample_steps must lie between 0 and steps, got {self.resample_steps}.")


def squared_error(x_BD: Tensor, x_hat_BD: Tensor) -> Tensor:
    """Summed over D, mean over B."""
    return mse_loss(x_hat_BD, x_BD, reduction="sum") / len(x_BD)


class ReLUTrainer(SparseTrainer):
    """Squared error plus a penalty on the features of an `AutoEncoder`; the subclass says which penalty."""

    ae: AutoEncoder
    dict_class = AutoEncoder

    def penalty(self, f: Features, step: int) -> tuple[Tensor, Terms]:
        """(what is added to the squared error, logged terms)"""
        raise NotImplementedError

    def encode(self, x_BD: Tensor) -> Features:
        if not self.sparse:
            return Features(self.ae.encode(x_BD), shard=self.shard)
        ae = self.ae
        return encode_above(x_BD, ae.encoder_FD, ae.encoder.bias, ae.subtracted_D, 0.0, self.shard)

    def loss(self, x_BD: Tensor, step: int, y_BE: Tensor | None = None) -> LossOutput:
        y_BE = x_BD if y_BE is None else y_BE
        f = self.encode(x_BD)
        x_hat_BE = f.decode(self.ae.decoder_FD) + self.offset(x_BD)
        error = squared_error(y_BE, x_hat_BE)
        penalty, terms = self.penalty(f, step)
        loss = error + penalty
        l2 = (y_BE - x_hat_BE).detach().norm(dim=-1).mean()
        terms = {"l2_loss": l2, "mse_loss": error, **terms, "loss": loss}
        return LossOutput(loss, x_hat_BE, f, f.detach().fired(), terms)


class StandardTrainer(ReLUTrainer):
    """L1 penalty, unit-norm decoder, optional resampling of dead latents.

    Towards Monosemanticity, https://transformer-circuits.pub/2023/monosemantic-features
    """

    Config = StandardConfig
    cfg: StandardConfig
    unit_norm = UnitNorm(projection_eps=0.0, renorm_eps=0.0)

    def __init__(self, **settings):
        super().__init__(**settings)
        self.steps_since_active: Tensor
        self.register_buffer("steps_since_active", torch.zeros_like(self.num_tokens_since_fired))
        if self.cfg.resample_steps is not None and self.shard.size > 1:
            raise ValueError("resample_steps cannot be combined with latents that are split over processes.")

    def penalty(self, f: Features, step: int) -> tuple[Tensor, Terms]:
        l1 = f.sum_over_latents(f.values).mean()
        return self.cfg.l1_penalty * self.cfg.sparsity_scale(step) * l1, {"sparsity_loss": l1}

    def lr(self, step: int) -> float:
        """With resampling, the warm-up starts anew at each."""
        if self.cfg.resample_steps is None:
            return super().lr(step)
        assert self.cfg.lr is not None
        return self.cfg.lr * min((step % self.cfg.resample_steps) / max(self.cfg.warmup_steps, 1), 1.0)

    def update(self, step: int, activations: Tensor, targets: Tensor | None = None) -> LossOutput:
        out = super().update(step, activations, targets)
        if self.cfg.resample_steps is not None:
            self.steps_since_active.copy_(torch.where(out.fired_F, 0, self.steps_since_active + 1))
            if step > 0 and step % self.cfg.resample_steps == 0:
                dead_F = self.steps_since_active > self.cfg.resample_steps / 2
                y_BE = activations if targets is None else targets
                self._resample(dead_F, activations.to(self.device), y_BE.to(self.device))
        return out

    @torch.no_grad()
    def _resample(self, dead_F: Tensor, x_BD: Tensor, y_BE: Tensor) -> None:
        """Point dead latents at tokens drawn in proportion to their reconstruction error."""
        dead_n = torch.nonzero(dead_F).squeeze(1)[: len(x_BD)]
        if len(dead_n) == 0:
            return
        losses_B = (y_BE - self.ae(x_BD)).float().norm(dim=-1).cpu()
        drawn_n = torch.multinomial(losses_B, len(dead_n), replacement=False, generator=self.generator)
        direction_nD, direction_nE = (part[drawn_n.to(self.device)].float() for part in (x_BD, y_BE))
        ae = self.ae
        alive_norm = ae.encoder_FD[~dead_F].norm(dim=1).mean().nan_to_num(1.0)  # 1 where none is alive
        ae.encoder_FD[dead_n] = direction_nD * alive_norm * 0.2
        ae.decoder_FD[dead_n] = direction_nE / direction_nE.norm(dim=1, keepdim=True).clamp(min=1e-12)
        ae.encoder.bias[dead_n] = 0  # pyright: ignore
        for name in ("encoder.weight", "encoder.bias", "decoder.weight"):
            for moment in self.optimizer.moments(name):
                moment[dead_n] = 0


class StandardTrainerAprilUpdate(ReLUTrainer):
    """L1 penalty weighted by decoder norms, which are free; gradients clipped to norm 1.

    Anthropic's April update, https://transformer-circuits.pub/2024/april-update
    """

    Config = StandardAprilConfig
    cfg: StandardAprilConfig
    max_grad_norm = 1.0

    def penalty(self, f: Features, step: int) -> tuple[Tensor, Terms]:
        l1 = f.sum_over_latents(f.values * f.of_latent(self.ae.decoder_FD.norm(dim=1))).mean()
        return self.cfg.l1_penalty * self.cfg.sparsity_scale(step) * l1, {"sparsity_loss": l1}
