"""JumpReLU SAEs.

Rajamanoharan et al. 2024, https://arxiv.org/abs/2407.14435

B tokens in the batch, D activation_dim, F dict_size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dictionary import JumpReluAutoEncoder
from .standard import squared_error
from .trainer import LossOutput, SAETrainer, SparsityWarmup, Terms, TrainerConfig, UnitNorm


@dataclass(kw_only=True)
class JumpReluConfig(SparsityWarmup, TrainerConfig):
    lr: float | None = 7e-5
    bandwidth: float = 0.001  # width of the kernel that estimates the thresholds' gradients
    sparsity_penalty: float = 1.0
    target_l0: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sparsity_warmup(self.steps, self.decay_start)


def _near(v_BF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
    """The rectangle kernel: 1 where |v - threshold| < bandwidth / 2."""
    return ((v_BF - threshold_F) / bandwidth).abs() < 0.5


class JumpReLU(torch.autograd.Function):
    """z * 1[z > threshold]; the threshold's gradient by the rectangle kernel (section 3 of the paper)."""

    @staticmethod
    def forward(ctx, z_BF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z_BF, threshold_F)
        ctx.bandwidth = bandwidth
        return torch.where(z_BF > threshold_F, z_BF, 0)

    @staticmethod
    def backward(ctx, grad_BF: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        z_BF, threshold_F = ctx.saved_tensors
        near_BF = _near(z_BF, threshold_F, ctx.bandwidth)
        grad_threshold_F = -(threshold_F / ctx.bandwidth) * torch.where(near_BF, grad_BF, 0).sum(dim=0)
        return torch.where(z_BF > threshold_F, grad_BF, 0), grad_threshold_F, None


class Step(torch.autograd.Function):
    """1[v > threshold]; a gradient for the threshold only."""

    @staticmethod
    def forward(ctx, v_BF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(v_BF, threshold_F)
        ctx.bandwidth = bandwidth
        return (v_BF > threshold_F).to(v_BF.dtype)

    @staticmethod
    def backward(ctx, grad_BF: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        v_BF, threshold_F = ctx.saved_tensors
        near_BF = _near(v_BF, threshold_F, ctx.bandwidth)
        return None, -torch.where(near_BF, grad_BF, 0).sum(dim=0) / ctx.bandwidth, None


class JumpReluTrainer(SAETrainer):
    """Squared error plus sparsity_penalty * (L0 / target_l0 - 1)^2."""

    Config = JumpReluConfig
    cfg: JumpReluConfig
    ae: JumpReluAutoEncoder
    dict_class = JumpReluAutoEncoder
    betas = (0.0, 0.999)
    unit_norm = UnitNorm(projection_eps=1e-6, renorm_eps=torch.finfo(torch.float32).eps)
    max_grad_norm = 1.0

    def loss(self, x_BD: Tensor, step: int) -> LossOutput:
        cfg = self.cfg
        x_BD = x_BD.to(self.ae.W_enc.dtype)
        f_BF = JumpReLU.apply(self.ae.pre_activations(x_BD), self.ae.threshold, cfg.bandwidth)
        x_hat_BD = self.ae.decode(f_BF)
        error = squared_error(x_BD, x_hat_BD)
        # of the features, not of the pre-activations: the gradient is one-sided, as in the reference
        l0 = Step.apply(f_BF, self.ae.threshold, cfg.bandwidth).sum(dim=-1).mean()
        sparsity = cfg.sparsity_penalty * (l0 / cfg.target_l0 - 1) ** 2 * cfg.sparsity_scale(step)
        loss = error + sparsity
        terms: Terms = {"l2_loss": error, "sparsity_loss": sparsity, "loss": loss}
        return LossOutput(loss, x_hat_BD, f_BF, (f_BF.detach() > 0).any(dim=0), terms)
