"""P-annealing: the L1 penalty slowly becomes an Lp penalty with p < 1.

Karvonen et al. 2024, https://arxiv.org/abs/2408.00113

B tokens in the batch, D activation_dim, F dict_size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import Features
from .standard import StandardConfig, StandardTrainer
from .trainer import LossOutput, Terms


@dataclass(kw_only=True)
class PAnnealConfig(StandardConfig):
    sparsity_function: str = "Lp"  # or "Lp^p"
    initial_sparsity_penalty: float = 0.1
    anneal_start: int = 15000
    anneal_end: int | None = None  # the end of training
    p_start: float = 1.0
    p_end: float = 0.0
    n_sparsity_updates: int | str = 10  # or "continuous"
    sparsity_queue_length: int = 10
    seed: int | None = 42

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("initial_sparsity_penalty")
        if self.sparsity_function not in ("Lp", "Lp^p"):
            raise ValueError(f"sparsity_function must be 'Lp' or 'Lp^p', not {self.sparsity_function!r}.")
        if not 0 <= self.anneal_start < (self.anneal_end or self.steps):
            raise ValueError(
                f"anneal_start must lie before {self.anneal_end or self.steps}, the end of annealing, "
                f"got {self.anneal_start}."
            )


class PAnnealTrainer(StandardTrainer):
    """Standard, with sum f^p in place of sum f; p falls in steps, and the penalty's weight is matched at each.

    At each event the weight is multiplied by the ratio of the old penalty to the new over the last few batches, so the
    sparsity term does not jump.  The first event only arms the second, and with `anneal_end` at the end of training the
    last one is never reached: both as in the reference.
    """

    Config = PAnnealConfig
    cfg: PAnnealConfig

    def __init__(self, **settings):
        super().__init__(**settings)
        cfg = self.cfg
        end = cfg.anneal_end or cfg.steps
        n = cfg.n_sparsity_updates if isinstance(cfg.n_sparsity_updates, int) else end - cfg.anneal_start + 1
        self.event_steps: list[int] = torch.linspace(cfg.anneal_start, end, n, dtype=int).tolist()  # pyright: ignore
        self.event_ps: list[float] = torch.linspace(cfg.p_start, cfg.p_end, n).tolist()
        self.p = cfg.p_start
        self.next_p: float | None = None
        self.sparsity_coeff = cfg.initial_sparsity_penalty
        self.events_passed = 0
        self.queue: list[tuple[Tensor, Tensor]] = []  # (penalty at p, penalty at the next p) of the last batches

    def lp(self, f: Features, p: float) -> Tensor:
        sum_B = f.sum_over_latents(f.values.pow(p))
        return (sum_B if self.cfg.sparsity_function == "Lp^p" else sum_B.pow(1 / p)).mean()

    def penalty(self, f: Features, step: int) -> tuple[Tensor, Terms]:
        lp = self.lp(f, self.p)
        scaled = lp * self.sparsity_coeff * self.cfg.sparsity_scale(step)
        return scaled, {
            "p": self.p,
            "next_p": self.p if self.next_p is None else self.next_p,
            "lp_loss": lp,
            "scaled_lp_loss": scaled,
            "sparsity_coeff": self.sparsity_coeff,
        }

    @torch.no_grad()
    def after_step(self, step: int, out: LossOutput) -> None:
        super().after_step(step, out)
        if self.next_p is not None:
            pair = (torch.as_tensor(out.terms["lp_loss"]).detach(), self.lp(out.f.detach(), self.next_p))
            self.queue = [*self.queue, pair][-self.cfg.sparsity_queue_length :]
        if self.events_passed < len(self.event_steps) and step == self.event_steps[self.events_passed]:
            if self.next_p is not None:
                old, new = (sum(float(value) for value in column) for column in zip(*self.queue, strict=True))
                self.sparsity_coeff *= old / new if new > 0 else 1.0
            self.p = self.event_ps[self.events_passed]
            self.events_passed += 1
            last = self.events_passed == len(self.event_ps)
            self.next_p = self.cfg.p_end if last else self.event_ps[self.events_passed]

    @property
    def config(self) -> dict[str, Any]:
        return {**super().config, "sparsity_penalty": self.sparsity_coeff}

    def get_extra_state(self) -> dict[str, Any]:
        annealing = {name: getattr(self, name) for name in ("p", "next_p", "sparsity_coeff", "events_passed", "queue")}
        return {**super().get_extra_state(), "annealing": annealing}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        for name, value in state["annealing"].items():
            setattr(self, name, value)
