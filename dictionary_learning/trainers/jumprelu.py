"""JumpReLU SAEs.

Rajamanoharan et al. 2024, https://arxiv.org/abs/2407.14435

B tokens in the batch, D activation_dim, E output_dim, F dict_size.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..dictionary import JumpReluAutoEncoder
from ..kernels import Features, encode_above
from .standard import squared_error
from .trainer import LossOutput, SparseTrainer, SparsityWarmup, Terms, TrainerConfig, UnitNorm


@dataclass(kw_only=True)
class JumpReluConfig(SparsityWarmup, TrainerConfig):
    lr: float | None = 7e-5
    bandwidth: float = 0.001  # width of the kernel that estimates the thresholds' gradients
    sparsity_penalty: float = 1.0
    target_l0: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sparsity_warmup(self.steps, self.decay_start)
        self.check_range("target_l0", "bandwidth", positive=True)
        if self.target_l0 > self.dict_size:
            raise ValueError(f"target_l0 must be at most dict_size {self.dict_size}, got {self.target_l0}.")
        self.check_range("sparsity_penalty")


def _near(v: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """The rectangle kernel: 1 where |v - threshold| < bandwidth / 2."""
    return ((v - threshold) / bandwidth).abs() < 0.5


class JumpReLU(torch.autograd.Function):
    """z * 1[z > threshold]; the threshold's gradient by the rectangle kernel (section 3 of the paper).

    z is (B, F) with threshold (F,), or both are (N,): each pair with its latent's.
    """

    @staticmethod
    def forward(ctx, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(z > threshold, z, 0)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        z, threshold = ctx.saved_tensors
        near = torch.where(_near(z, threshold, ctx.bandwidth), grad, 0)
        grad_threshold = -(threshold / ctx.bandwidth) * near.sum_to_size(threshold.shape)
        return torch.where(z > threshold, grad, 0), grad_threshold, None


class Step(torch.autograd.Function):
    """1[v > threshold]; a gradient for the threshold only."""

    @staticmethod
    def forward(ctx, v: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(v, threshold)
        ctx.bandwidth = bandwidth
        return (v > threshold).to(v.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        v, threshold = ctx.saved_tensors
        near = torch.where(_near(v, threshold, ctx.bandwidth), grad, 0)
        return None, -near.sum_to_size(threshold.shape) / ctx.bandwidth, None


class JumpReluTrainer(SparseTrainer):
    """Squared error plus sparsity_penalty * (L0 / target_l0 - 1)^2."""

    Config = JumpReluConfig
    cfg: JumpReluConfig
    ae: JumpReluAutoEncoder
    dict_class = JumpReluAutoEncoder
    betas = (0.0, 0.999)
    unit_norm = UnitNorm(projection_eps=1e-6, renorm_eps=torch.finfo(torch.float32).eps)
    max_grad_norm = 1.0

    def encode(self, x_BD: Tensor) -> tuple[Features, Tensor]:
        """(f, sum over all B F entries of 1[f > threshold]), with the kernel's gradients for the thresholds."""
        ae, bandwidth = self.ae, self.cfg.bandwidth
        if not self.sparse:
            z = Features(ae.pre_activations(x_BD), shard=self.shard)
        else:  # an entry further below its threshold than the kernel reaches is zero and has no gradient
            z = encode_above(x_BD, ae.encoder_FD, ae.b_enc, None, ae.threshold - bandwidth / 2, self.shard)
        threshold = z.of_latent(ae.threshold)
        f = replace(z, values=JumpReLU.apply(z.values, threshold, bandwidth))
        # of the features, not of the pre-activations: the gradient is one-sided, as in the reference
        n_active = Step.apply(f.values, threshold, bandwidth).sum()
        if z.code is not None:
            # but the entries left out are features too, of value 0, which the kernel reaches where thresholds are small
            left_out_F = len(x_BD) - z.sum_over_tokens(torch.ones_like(f.values.detach()))
            n_active = (
                n_active + (Step.apply(torch.zeros_like(ae.threshold), ae.threshold, bandwidth) * left_out_F).sum()
            )
        return f, self.shard.sum(n_active)

    def loss(self, x_BD: Tensor, step: int, y_BE: Tensor | None = None) -> LossOutput:
        cfg = self.cfg
        x_BD = x_BD.to(self.ae.W_enc.dtype)
        y_BE = x_BD if y_BE is None else y_BE.to(x_BD.dtype)
        f, n_active = self.encode(x_BD)
        x_hat_BE = f.decode(self.ae.decoder_FD) + self.offset(x_BD)
        error = squared_error(y_BE, x_hat_BE)
        l0 = n_active / len(x_BD)
        sparsity = cfg.sparsity_penalty * (l0 / cfg.target_l0 - 1) ** 2 * cfg.sparsity_scale(step)
        loss = error + sparsity
        terms: Terms = {"l2_loss": error, "sparsity_loss": sparsity, "loss": loss}
        return LossOutput(loss, x_hat_BE, f, f.detach().fired(), terms)
