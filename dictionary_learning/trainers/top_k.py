"""TopK SAEs, and what the whole top-k family shares: auxiliary loss, inference threshold, k-annealing.

Gao et al. 2024, https://arxiv.org/abs/2406.04093

B tokens in the batch, D activation_dim, E output_dim, F dict_size, N active pairs, A latents that may be dead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..dictionary import AutoEncoderTopK, Dictionary, TopKDictionary
from ..kernels import Features, encode_topk, screen
from .standard import squared_error
from .trainer import LossOutput, SAETrainer, Terms, TrainerConfig, UnitNorm


@dataclass(kw_only=True)
class TopKConfig(TrainerConfig):
    k: int
    auxk_alpha: float = 1 / 32
    threshold_beta: float = 0.999
    threshold_start_step: int = 1000
    k_anneal_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("auxk_alpha")
        if not 0 < self.k <= self.dict_size:
            raise ValueError(f"k must lie between 1 and dict_size {self.dict_size}, got {self.k}.")
        if self.k_anneal_steps is not None:
            if not 0 < self.k_anneal_steps < self.steps:
                raise ValueError(f"k_anneal_steps must lie between 0 and steps, got {self.k_anneal_steps}.")
            if self.k >= self.activation_dim:
                raise ValueError(f"k-annealing starts at activation_dim {self.activation_dim}, not above k {self.k}.")


@torch.no_grad()
def geometric_median(x_BD: Tensor, max_iter: int = 100, tol: float = 1e-5) -> Tensor:
    """The point with the least summed distance to the rows, by Weiszfeld's iteration."""
    guess_D = x_BD.mean(dim=0)
    for _ in range(max_iter):
        previous_D = guess_D
        # a row that equals the guess would get an infinite weight
        distance_B = (x_BD - guess_D).norm(dim=1).clamp(min=torch.finfo(x_BD.dtype).tiny)
        weight_B = 1 / distance_B
        weight_B = weight_B / weight_B.sum()
        guess_D = (weight_B[:, None] * x_BD).sum(dim=0)
        if (guess_D - previous_D).norm() < tol:
            break
    return guess_D


def begin_to_read(numbers: Tensor) -> Callable[[], list[int]]:
    """Send whole numbers on their way to the host; what is returned waits for them alone, not for later work."""
    if numbers.device.type != "cuda":
        return numbers.tolist
    on_host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True).copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(numbers.device))

    def read() -> list[int]:
        arrived.synchronize()
        return on_host.tolist()

    return read


class TopKTrainer(SAETrainer):
    """Squared error of the k largest activations, plus an auxiliary loss in which dead latents explain the residual."""

    Config = TopKConfig
    cfg: TopKConfig
    ae: TopKDictionary
    dict_class = AutoEncoderTopK
    unit_norm = UnitNorm(projection_eps=1e-6, renorm_eps=torch.finfo(torch.float32).eps)
    max_grad_norm = 1.0

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.k = self.cfg.k  # beside the buffer, so that no step reads it from the device
        self.top_k_aux = self.cfg.activation_dim // 2  # appendix B.1
        # whether products in bf16 precede those in fp32; part of the state, since values differ in the last bits
        self.screened = False
        # n_tokens, and what `_count_silent` says of them
        self._silent: tuple[int, Callable[[], list[int]]] | None = None

    def build(self) -> Dictionary:
        dict_class = self.cfg.dict_class or self.dict_class
        sizes = self.cfg.activation_dim, self.cfg.dict_size
        return dict_class(*sizes, k=self.cfg.k, generator=self.generator, **self.cfg.target)  # pyright: ignore[reportCallIssue]

    def initialize(self, x_BD: Tensor, y_BE: Tensor | None = None) -> None:
        if not self.begun:
            median_E = geometric_median((x_BD if y_BE is None else y_BE).float())
            # a batch that is not finite will stop the SAE, whose weights should not say so
            self.ae.b_dec.data = torch.where(median_E.isfinite().all(), median_E, 0).to(self.ae.b_dec.dtype)
        if self.device.type == "cpu" and x_BD.dtype == torch.float32:
            self.screened = screen.pays(len(x_BD), self.cfg.activation_dim, len(self.ae.encoder_FD), self.k)

    # -- what distinguishes the family's members

    def select(self, x_BD: Tensor) -> Features:
        """The features that take part in the reconstruction."""
        ae = self.ae
        return encode_topk(x_BD, ae.encoder_FD, ae.encoder_bias_F, ae.subtracted_D, self.k, self.shard, self.screened)

    def fired(self, f: Features) -> Tensor:
        """Bool (F,): the latents that count as active, here every selected one, even at zero."""
        assert f.code is not None
        fired_F = torch.zeros(f.code.dict_size, dtype=torch.bool, device=f.values.device)
        return fired_F.index_fill(0, f.code.latent_N, True)

    def smallest_active(self, out: LossOutput) -> Tensor:
        """Scalar: the mean over tokens of the smallest positive activation; +inf where no token has one."""
        least_B = out.f.smallest_of_token()
        active_B = least_B < torch.inf
        mean = torch.where(active_B, least_B, 0).sum() / active_B.sum()
        return torch.where(active_B.any(), mean, torch.inf)

    def reconstruct(self, x_BD: Tensor, f: Features, y_BE: Tensor) -> tuple[Tensor, Tensor, Terms]:
        """(x_hat_BE, reconstruction loss, logged terms)"""
        x_hat_BE = f.decode(self.ae.decoder_FD) + self.offset(x_BD)
        error = squared_error(y_BE, x_hat_BE)
        return x_hat_BE, error, {"l2_loss": error}

    # -- the step

    def loss(self, x_BD: Tensor, step: int, y_BE: Tensor | None = None) -> LossOutput:
        y_BE = x_BD if y_BE is None else y_BE
        f = self.select(x_BD)
        x_hat_BE, error, terms = self.reconstruct(x_BD, f, y_BE)
        fired_F = self.fired(f.detach())
        auxk, pre_norm, n_dead = self.auxiliary_loss(x_BD, y_BE, x_hat_BE, fired_F)
        loss = error + self.cfg.auxk_alpha * auxk
        terms |= {
            "auxk_loss": auxk,
            "loss": loss,
            "effective_l0": float(self.k),
            "dead_features": n_dead,
            "pre_norm_auxk_loss": pre_norm,
        }
        return LossOutput(loss, x_hat_BE, f, fired_F, terms)

    def auxiliary_loss(
        self, x_BD: Tensor, y_BE: Tensor, x_hat_BE: Tensor, fired_F: Tensor
    ) -> tuple[Tensor | float, Tensor | float, Tensor | int]:
        """(loss, the same before normalisation, number of dead latents); section 2.4 and appendix A.2 of the paper.

        The dead latents' largest activations reconstruct the residual, in units of the residual's variance.
        """
        n_own, n_all = self._silent_before(len(x_BD)) if self._may_have_dead(len(x_BD)) else (0, 0)
        if n_all == 0:
            return 0.0, -1.0, 0
        # these may be dead; which of them did not fire in this batch, only the device knows
        latent_A = self.num_tokens_since_fired.topk(n_own, sorted=False).indices.sort().values
        dead_F = self.silent_tokens(fired_F, len(x_BD)) >= self.dead_feature_threshold
        dead_A, n_dead = dead_F.index_select(0, latent_A), self.shard.sum(dead_F.sum())
        ae, k = self.ae, min(self.top_k_aux, n_all)
        encoder_AD, bias_A = ae.encoder_FD.index_select(0, latent_A), ae.encoder_bias_F.index_select(0, latent_A)
        c_D = ae.subtracted_D
        f_BA = torch.relu(linear(x_BD if c_D is None else x_BD - c_D, encoder_AD, bias_A))
        f_BA = torch.where(dead_A, f_BA, 0)
        top = f_BA.topk(min(k, n_own), dim=1, sorted=False)
        candidates_BK = torch.nn.functional.pad(top.values.detach(), (0, k - top.values.shape[1]), value=-torch.inf)
        chosen_BK = self.shard.largest_of_each_token(candidates_BK, k)[:, : top.values.shape[1]]
        f_BA = torch.zeros_like(f_BA).scatter(1, top.indices, torch.where(chosen_BK, top.values, 0))
        x_aux_BE = self.shard.sum(linear(f_BA, ae.decoder_FD.index_select(0, latent_A).T))
        residual_BE = (y_BE - x_hat_BE).detach()
        error = squared_error(residual_BE.float(), x_aux_BE.float())
        variance = squared_error(residual_BE.float(), residual_BE.mean(dim=0).float().expand_as(residual_BE))
        loss, some = (error / variance).nan_to_num(0.0), n_dead > 0
        return torch.where(some, loss, 0), torch.where(some, error.detach(), -1), n_dead

    def _may_have_dead(self, n_tokens: int) -> bool:
        """Whether a latent can have been silent for so long, which is no longer than training has lasted."""
        return self.cfg.auxk_alpha > 0 and self.tokens_seen + n_tokens >= self.dead_feature_threshold

    def _count_silent(self, n_tokens: int) -> Callable[[], list[int]]:
        """Begin to count the latents that will be dead if `n_tokens` more leave them silent: this share's, and all."""
        n_own = (self.num_tokens_since_fired + n_tokens >= self.dead_feature_threshold).sum()
        return begin_to_read(torch.stack([n_own, self.shard.sum(n_own)]))

    def _silent_before(self, n_tokens: int) -> list[int]:
        """That count, as it was begun after the step before: the device is then not waited for."""
        if self._silent is None or self._silent[0] != n_tokens:
            return self._count_silent(n_tokens)()
        return self._silent[1]()

    @torch.no_grad()
    def after_step(self, step: int, out: LossOutput) -> None:
        n_tokens = len(out.x_hat_BD)
        self._silent = (n_tokens, self._count_silent(n_tokens)) if self._may_have_dead(n_tokens) else None
        self.note_smallest(step, self.smallest_active(out))
        if self.cfg.k_anneal_steps is not None:
            done = min(step, self.cfg.k_anneal_steps) / self.cfg.k_anneal_steps
            self.k = int(self.cfg.activation_dim * (1 - done) + self.cfg.k * done)
            self.ae.k.fill_(self.k)

    def note_smallest(self, step: int, least: Tensor) -> None:
        """Move the inference threshold by what `smallest_active` says of a step."""
        threshold, beta, last = self.ae.threshold, self.cfg.threshold_beta, step == self.cfg.steps - 1
        if step > self.cfg.threshold_start_step or last:
            moved = torch.where(threshold < 0, least, beta * threshold + (1 - beta) * least)
            threshold.copy_(torch.where(least < torch.inf, moved, threshold))  # nothing active says nothing
        if last:  # however short or empty the run, what is saved has a threshold
            threshold.clamp_(min=0)

    @property
    def config(self) -> dict[str, Any]:
        return {**super().config, "k": self.k, "target_k": self.cfg.k, "top_k_aux": self.top_k_aux}

    def get_extra_state(self) -> dict[str, Any]:
        return {**super().get_extra_state(), "k": self.k, "screened": self.screened}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.k, self.screened, self._silent = state["k"], state.get("screened", False), None
