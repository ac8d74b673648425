"""Adam for an SAE, with what the papers ask of it: a decoder of unit norm, a clipped gradient.

F dict_size, D activation_dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels import WHOLE, Shard
from ..kernels.adam import norm_of
from ..kernels.backend import optimizer

# parameters that keep the reference's (D, F) shape; every matrix lies in memory as one contiguous row per latent
TRANSPOSED = {"W_enc", "decoder.weight"}
DECODERS = {"W_dec", "decoder.weight"}
REPLICATED = {"b_dec", "bias", "decoder.bias", "decoder_bias", "W_skip"}  # every other parameter is one of latents


def as_rows(name: str, parameter: Tensor) -> Tensor:
    """The (F, D) view of a matrix of an SAE; other tensors as they are."""
    return parameter.T if name in TRANSPOSED else parameter


def latent_dim(name: str) -> int | None:
    """The dimension of a parameter that counts latents."""
    return None if name in REPLICATED else int(name in TRANSPOSED)


def is_not_finite(value: Tensor) -> Tensor:
    """In two operations: what is infinite less itself is NaN, and NaN is not 0."""
    return value - value != 0


@dataclass(frozen=True)
class UnitNorm:
    """Keeps decoder rows at unit norm: gradients are made orthogonal to them, and norms restored after the step."""

    projection_eps: float
    renorm_eps: float


class ConstrainedAdam(nn.Module):
    """Moments and step of one SAE's Adam; `state_dict()` is what must survive a restart."""

    def __init__(
        self,
        ae: nn.Module,
        betas: tuple[float, float],
        unit_norm: UnitNorm | None,
        max_grad_norm: float | None,
        shard: Shard = WHOLE,
    ):
        super().__init__()
        self.betas, self.unit_norm, self.max_grad_norm, self.shard = betas, unit_norm, max_grad_norm, shard
        parameters = dict(ae.named_parameters())
        device = next(iter(parameters.values())).device
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), device=device))
        for name, parameter in parameters.items():
            for key in self.keys(name):
                self.register_buffer(key, torch.zeros_like(as_rows(name, parameter.detach())))

    @staticmethod
    def keys(name: str) -> tuple[str, str]:
        """Under which names the moments of a parameter are buffers here."""
        return f"{name.replace('.', '_')}_exp_avg", f"{name.replace('.', '_')}_exp_avg_sq"

    def moments(self, name: str) -> tuple[Tensor, Tensor]:
        """(exp_avg, exp_avg_sq) of a parameter, matrices as (F, D)."""
        exp_avg, exp_avg_sq = (self.get_buffer(key) for key in self.keys(name))
        return exp_avg, exp_avg_sq

    @torch.no_grad()
    def step(self, ae: nn.Module, lr: float, loss: Tensor, stopped: Tensor) -> None:
        """Move the parameters of `ae` by their gradients, and drop these.

        `stopped`, a bool scalar, becomes true where the loss or the gradient's norm is not finite, and as long as it is
        true nothing moves: the device sees to it, and the host does not have to look.
        """
        with_grad = [(name, parameter) for name, parameter in ae.named_parameters() if parameter.grad is not None]
        kernels, along = optimizer(), {}
        norms: dict[bool, list[Tensor]] = {True: [], False: []}  # of what every process has alike, and of latents
        for name, parameter in with_grad:
            assert parameter.grad is not None
            if name in REPLICATED:
                parameter.grad = self.shard.sum(parameter.grad)
            constrained = self.unit_norm is not None and name in DECODERS
            norm, along[name] = kernels.gradient_norm(
                as_rows(name, parameter.grad),
                as_rows(name, parameter) if constrained else None,
                self.unit_norm.projection_eps if self.unit_norm else 0.0,
            )
            norms[name in REPLICATED].append(norm)
        if self.shard.size > 1:
            norms[False] = [self.shard.sum(norm_of(norms[False]).square()).sqrt()]
        grad_norm = norm_of(norms[True] + norms[False])
        stopped.logical_or_(is_not_finite(loss + grad_norm))
        found_inf = stopped.float()
        self.steps += ~stopped
        divisor = None
        if self.max_grad_norm is not None:
            divisor = ((grad_norm + 1e-6) / self.max_grad_norm).clamp_(min=1.0).float()
        for name, parameter in with_grad:
            assert parameter.grad is not None
            kernels.adam_(
                as_rows(name, parameter),
                as_rows(name, parameter.grad),
                *self.moments(name),
                self.steps,
                lr=lr,
                betas=self.betas,
                found_inf=found_inf,
                divisor=divisor,
                along_F=along[name],
                renorm_eps=self.unit_norm.renorm_eps if self.unit_norm and name in DECODERS else None,
            )
            parameter.grad = None  # now, so that only one SAE at a time has gradients
