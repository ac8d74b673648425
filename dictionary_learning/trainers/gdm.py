"""Gated SAEs.

B tokens in the batch, D activation_dim, E output_dim, F dict_size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dictionary import GatedAutoEncoder
from ..kernels import Features, encode_above
from .standard import StandardAprilConfig, squared_error
from .trainer import LossOutput, SparseTrainer, Terms, UnitNorm


@dataclass(kw_only=True)
class GatedConfig(StandardAprilConfig):
    lr: float | None = 5e-5


class GatedSAETrainer(SparseTrainer):
    """L1 penalty on the gate only, which also reconstructs through a frozen decoder.

    Rajamanoharan et al. 2024, https://arxiv.org/abs/2404.16014, eq. 8
    """

    Config = GatedConfig
    cfg: GatedConfig
    ae: GatedAutoEncoder
    dict_class = GatedAutoEncoder
    betas = (0.0, 0.999)
    unit_norm = UnitNorm(projection_eps=0.0, renorm_eps=0.0)

    def encode(self, x_BD: Tensor) -> tuple[Features, Features]:
        """(relu of the gate's pre-activation, f), at the same pairs."""
        ae = self.ae
        if not self.sparse:
            gate_BF, f_BF = ae.gate_and_features(x_BD)
            return Features(gate_BF, shard=self.shard), Features(f_BF, shard=self.shard)
        # the gate is open where u > -b_gate; u itself has no bias
        no_bias_F = torch.zeros_like(ae.gate_bias)
        u = encode_above(x_BD, ae.encoder_FD, no_bias_F, ae.subtracted_D, -ae.gate_bias, self.shard)
        gate_N = torch.relu(u.values + u.of_latent(ae.gate_bias))
        f_N = torch.relu(u.of_latent(ae.r_mag.exp()) * u.values + u.of_latent(ae.mag_bias))
        return Features(gate_N, u.code, self.shard), Features(f_N, u.code, self.shard)

    def loss(self, x_BD: Tensor, step: int, y_BE: Tensor | None = None) -> LossOutput:
        y_BE = x_BD if y_BE is None else y_BE
        gate, f = self.encode(x_BD)
        offset = self.offset(x_BD)
        x_hat_BE = f.decode(self.ae.decoder_FD) + offset
        # only the gate and the encoder's bias learn from the gate's own reconstruction
        x_hat_gate_BE = gate.decode(self.ae.decoder_FD.detach()) + offset.detach()
        error, aux = squared_error(y_BE, x_hat_BE), squared_error(y_BE, x_hat_gate_BE)
        l1 = gate.sum_over_latents(gate.values).mean()
        loss = error + self.cfg.l1_penalty * self.cfg.sparsity_scale(step) * l1 + aux
        terms: Terms = {"mse_loss": error, "sparsity_loss": l1, "aux_loss": aux, "loss": loss}
        return LossOutput(loss, x_hat_BE, f, f.detach().fired(), terms)
