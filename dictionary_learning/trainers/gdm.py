"""Gated SAEs.

B tokens in the batch, D activation_dim, F dict_size.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear

from ..dictionary import GatedAutoEncoder
from .standard import StandardAprilConfig, squared_error
from .trainer import LossOutput, SAETrainer, Terms, UnitNorm


@dataclass(kw_only=True)
class GatedConfig(StandardAprilConfig):
    lr: float | None = 5e-5


class GatedSAETrainer(SAETrainer):
    """L1 penalty on the gate only, which also reconstructs through a frozen decoder.

    Rajamanoharan et al. 2024, https://arxiv.org/abs/2404.16014, eq. 8
    """

    Config = GatedConfig
    cfg: GatedConfig
    ae: GatedAutoEncoder
    dict_class = GatedAutoEncoder
    betas = (0.0, 0.999)
    unit_norm = UnitNorm(projection_eps=0.0, renorm_eps=0.0)

    def loss(self, x_BD: Tensor, step: int) -> LossOutput:
        gate_BF, f_BF = self.ae.gate_and_features(x_BD)
        x_hat_BD = self.ae.decode(f_BF)
        # only the gate and the encoder's bias learn from the gate's own reconstruction
        x_hat_gate_BD = linear(gate_BF, self.ae.decoder.weight.detach()) + self.ae.decoder_bias.detach()
        error, aux = squared_error(x_BD, x_hat_BD), squared_error(x_BD, x_hat_gate_BD)
        l1 = gate_BF.norm(p=1, dim=-1).mean()
        loss = error + self.cfg.l1_penalty * self.cfg.sparsity_scale(step) * l1 + aux
        terms: Terms = {"mse_loss": error, "sparsity_loss": l1, "aux_loss": aux, "loss": loss}
        return LossOutput(loss, x_hat_BD, f_BF, (f_BF.detach() > 0).any(dim=0), terms)
