"""The one training step, shared by every architecture.

A trainer is a config dataclass, a few class attributes and a `loss` that reads and never writes.  What a step changes
is changed in one place, `update`, after the loss is known: logging can look at a loss as often as it likes.

B tokens in the batch, D activation_dim, E output_dim (D unless it is a transcoder), F dict_size.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..dictionary import Dictionary
from ..kernels import WHOLE, Features, Shard
from .optimizer import REPLICATED, ConstrainedAdam, UnitNorm, latent_dim


@dataclass(kw_only=True)
class TrainerConfig:
    """What every trainer is told; with its subclass's fields, the keywords of the constructor and `config.json`."""

    steps: int
    activation_dim: int
    dict_size: int
    layer: int
    lm_name: str
    lr: float | None = None
    warmup_steps: int = 1000
    decay_start: int | None = None
    seed: int | None = None
    device: str | torch.device | None = None  # cuda where there is one, else cpu
    wandb_name: str | None = None
    submodule_name: str | None = None
    dict_class: type[Dictionary] | None = None
    dead_feature_threshold: int = 10_000_000  # tokens of silence after which a latent counts as dead
    site: str = "resid_post"  # of the layer, whose activations are read
    site_out: str | None = None  # whose activations are predicted: of a transcoder another one
    output_dim: int | None = None  # of these, by default activation_dim
    skip: bool = False  # of a transcoder: it also learns a linear path from x to y

    def __post_init__(self) -> None:
        if self.lr is None:  # Gao et al. 2024, appendix A.3
            self.lr = 2e-4 / (self.dict_size / 2**14) ** 0.5
        self.site_out, self.output_dim = self.site_out or self.site, self.output_dim or self.activation_dim
        self.check_range("lr", "dict_size", "activation_dim", "output_dim", "steps", positive=True)
        if not self.is_transcoder and (self.skip or self.output_dim != self.activation_dim):
            raise ValueError(
                "skip and another output_dim are for transcoders: site_out must be another site than site."
            )
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"warmup_steps must be at least 0 and below steps, got {self.warmup_steps} of {self.steps}."
            )
        if self.decay_start is not None and not self.warmup_steps < self.decay_start < self.steps:
            raise ValueError(
                "decay_start must lie between warmup_steps and steps, "
                f"got warmup_steps {self.warmup_steps}, decay_start {self.decay_start}, steps {self.steps}."
            )

    @property
    def is_transcoder(self) -> bool:
        return self.site_out != self.site

    @property
    def target(self) -> dict[str, Any]:
        """What the constructor of an SAE is told of what it predicts."""
        return {"output_dim": self.output_dim, "skip": self.skip} if self.is_transcoder else {}

    def check_range(self, *names: str, positive: bool = False) -> None:
        """ValueError for settings of these names that are negative or no finite number; `positive`: or 0."""
        for name in names:
            value = getattr(self, name)
            if not 0 <= value < math.inf or (positive and value == 0):
                kind = "a positive number" if positive else "a number, not a negative one"
                raise ValueError(f"{name} must be {kind}, got {value}.")


@dataclass(kw_only=True)
class SparsityWarmup:
    """Mixin for trainers with a penalty: its weight rises linearly from 0 over `sparsity_warmup_steps`."""

    sparsity_warmup_steps: int | None = 2000

    def check_sparsity_warmup(self, steps: int, decay_start: int | None) -> None:
        warmup = self.sparsity_warmup_steps or 0
        if not 0 <= warmup < steps or (decay_start is not None and warmup >= decay_start):
            raise ValueError(
                "sparsity_warmup_steps must be at least 0 and below steps and decay_start, "
                f"got {warmup} with steps {steps}, decay_start {decay_start}."
            )

    def sparsity_scale(self, step: int) -> float:
        return min(step / self.sparsity_warmup_steps, 1.0) if self.sparsity_warmup_steps else 1.0


Terms = dict[str, Tensor | float]


class LossOutput(NamedTuple):
    """What a loss says of one batch."""

    loss: Tensor  # scalar
    x_hat_BD: Tensor  # (B, E) of a transcoder
    f: Features
    fired_F: Tensor  # bool: latents that were active in the batch
    terms: Terms  # logged scalars

    def detach(self) -> "LossOutput":
        terms: Terms = {k: v.detach() if isinstance(v, Tensor) else v for k, v in self.terms.items()}
        return LossOutput(self.loss.detach(), self.x_hat_BD.detach(), self.f.detach(), self.fired_F, terms)

    def l0(self) -> Tensor:
        """Mean number of active latents a token."""
        return self.f.n_active() / len(self.x_hat_BD)


class SAETrainer(nn.Module):
    """One SAE in training: `ae`, its optimiser, schedules and counters.

    A subclass sets the class attributes and writes `loss`; it may also override three hooks: `build` (make the SAE),
    `initialize` (the first batch is at hand) and `after_step` (state beyond the common counters).
    Everything that must survive a restart is in `state_dict()`.

    shard: this process's share of the latents; `ae`, optimiser and counters then hold no others, and every process of
    the shard's group must do the same steps on the same batches.
    """

    Config: ClassVar[type[TrainerConfig]] = TrainerConfig
    dict_class: ClassVar[type[Dictionary]]
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    unit_norm: ClassVar[UnitNorm | None] = None
    max_grad_norm: ClassVar[float | None] = None

    def __init__(self, *, shard: Shard = WHOLE, **settings: Any):
        super().__init__()
        self.cfg = self.Config(**settings)
        self.shard = shard
        self.device = torch.device(self.cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.generator = torch.Generator()
        if self.cfg.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.cfg.seed)
        self.ae = self.build()  # whole, so that a latent's initial weights do not depend on the split
        for name, parameter in self.ae.named_parameters():
            parameter.data = shard.cut(parameter.data, latent_dim(name))
        self.ae.to(self.device)
        self.optimizer = ConstrainedAdam(self.ae, self.betas, self.unit_norm, self.max_grad_norm, shard)
        self.dead_feature_threshold = self.cfg.dead_feature_threshold
        self.tokens_seen = 0
        self.begun = False  # whether the weights are trained ones
        self.num_tokens_since_fired: Tensor
        self.stopped: Tensor  # bool: a loss or gradient was not finite, and the weights have stayed as they were since
        silent_F = torch.zeros(self.cfg.dict_size, dtype=torch.long, device=self.device)
        self.register_buffer("num_tokens_since_fired", shard.cut(silent_F, 0))
        self.register_buffer("stopped", torch.zeros((), dtype=torch.bool, device=self.device))

    @torch.no_grad()
    def start_from(self, ae: Dictionary) -> None:
        """Take the weights and the threshold of a trained SAE of the same class and sizes, in place of random ones.

        It takes activations as they are trained on, over the norm factor. What selects stays this trainer's own: k.
        """
        assert type(ae) is type(self.ae)
        weights = dict(ae.named_parameters())
        for name, parameter in self.ae.named_parameters():
            # copied into place: storage keeps its layout
            parameter.copy_(self.shard.cut(weights[name].detach(), latent_dim(name)))
        if isinstance(threshold := dict(ae.named_buffers()).get("threshold"), Tensor):
            self.ae.get_buffer("threshold").copy_(threshold)
        self.begun = True

    # -- what a variant says

    def build(self) -> Dictionary:
        dict_class = self.cfg.dict_class or self.dict_class
        sizes = self.cfg.activation_dim, self.cfg.dict_size
        return dict_class(*sizes, generator=self.generator, **self.cfg.target)  # pyright: ignore[reportCallIssue]

    def loss(self, x_BD: Tensor, step: int, y_BE: Tensor | None = None) -> LossOutput:
        """The training loss of a batch at a step.  Reads, never writes.  y_BE: what a transcoder is to predict."""
        raise NotImplementedError

    def initialize(self, x_BD: Tensor, y_BE: Tensor | None = None) -> None:
        """Called once, with the first batch, before its loss; `begun` says whether the weights are trained ones."""

    def after_step(self, step: int, out: LossOutput) -> None:
        """Called after the weights have moved, with what the loss said before."""

    # -- the step

    def offset(self, x_BD: Tensor) -> Tensor:
        """What a reconstruction has beside its features: the output bias (E,), or (B, E) with the skip."""
        ae = self.ae
        bias_E = self.shard.once(ae.get_parameter(ae.output_bias))
        return bias_E if ae.W_skip is None else bias_E + x_BD @ self.shard.once(ae.W_skip)

    def update(self, step: int, activations: Tensor, targets: Tensor | None = None) -> LossOutput:
        """One optimiser step on activations x_BD; returns what the loss said of them before it.

        targets: y_BE at the same positions, which a transcoder is to predict.
        """
        batch = (activations,) if targets is None else (activations, targets)
        x_BD, *y_BE = (part.to(self.device) for part in batch)
        if step == 0:
            self.initialize(x_BD, *y_BE)
        out = self.loss(x_BD, step, *y_BE)
        out.loss.backward()
        with torch.autocast(self.device.type, enabled=False):
            self.optimizer.step(self.ae, self.lr(step), out.loss.detach(), self.stopped)
            self.num_tokens_since_fired.copy_(self.silent_tokens(out.fired_F, len(x_BD)))
            self.tokens_seen += len(x_BD)
            self.after_step(step, out)
        return out.detach()

    def lr(self, step: int) -> float:
        """Linear warm-up from 0, constant, linear decay from `decay_start` towards 0 at `steps`."""
        cfg = self.cfg
        assert cfg.lr is not None
        if step < cfg.warmup_steps:
            return cfg.lr * step / cfg.warmup_steps
        if cfg.decay_start is not None and step >= cfg.decay_start:
            return cfg.lr * (cfg.steps - step) / (cfg.steps - cfg.decay_start)
        return cfg.lr

    def silent_tokens(self, fired_F: Tensor, n_tokens: int) -> Tensor:
        """For each latent, the tokens of training since it last fired, this batch of `n_tokens` included."""
        return (self.num_tokens_since_fired + n_tokens).masked_fill_(fired_F, 0)

    def dead_features(self) -> Tensor:
        """Number of latents silent for `dead_feature_threshold` tokens or more."""
        return self.shard.sum((self.num_tokens_since_fired >= self.dead_feature_threshold).sum())

    # -- what is written down

    def latent_dims(self) -> dict[str, int]:
        """{name in state_dict(): dimension of the latents} of the tensors that have one."""
        names = [name for name, _ in self.ae.named_parameters() if name not in REPLICATED]
        counters = [name for name, counter in self.named_buffers(recurse=False) if counter.ndim]
        return (
            {f"ae.{name}": latent_dim(name) or 0 for name in names}
            | {f"optimizer.{key}": 0 for name in names for key in self.optimizer.keys(name)}
            | dict.fromkeys(counters, 0)
        )

    def load_shares(self, states: list[dict[str, Any]]) -> None:
        """Load the `state_dict()`s of all shares of a split into however many."""
        dims = self.latent_dims()
        joined = {
            name: self.shard.cut(torch.cat([state[name] for state in states], dims[name]), dims[name])
            if name in dims
            else value
            for name, value in states[0].items()
        }
        self.load_state_dict(joined)

    def whole_ae(self) -> Dictionary:
        """The SAE with all its latents: `ae` itself, or a copy on the CPU that every process of the group asks for."""
        if self.shard.size == 1:
            return self.ae
        whole = copy.deepcopy(self.ae).cpu()
        for name, parameter in whole.named_parameters():
            dim = latent_dim(name)
            if dim is not None:
                parameter.data = self.shard.gather(self.ae.get_parameter(name).detach(), dim).cpu()
        return whole

    @property
    def config(self) -> dict[str, Any]:
        """The `trainer` part of config.json."""
        fields = {field.name: getattr(self.cfg, field.name) for field in dataclasses.fields(self.cfg)}
        fields |= {
            "device": str(self.device),
            "dict_class": self.ae.class_name,
            "dead_feature_threshold": self.dead_feature_threshold,
        }
        return {"trainer_class": type(self).__name__, **fields}

    def get_extra_state(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "tokens_seen": self.tokens_seen}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.tokens_seen = state["tokens_seen"]


DENSITY_INTERVAL = 100  # steps between two looks at the density
# Share of active features below which the sparse form is surely the faster one.  On two cores the forms are level
# between 0.13 and 0.2 (D 512, F 8192, B 1024); on other devices they have not been timed, and the step stays dense.
SPARSE_BELOW = {"cpu": 0.06}


class SparseTrainer(SAETrainer):
    """A trainer whose features become sparse as it trains: `sparse` says which form of the step is the faster one.

    It follows the density measured every `DENSITY_INTERVAL` steps, and is part of the state, since the two forms differ
    in the last bits.
    """

    sparse = False

    def after_step(self, step: int, out: LossOutput) -> None:
        if step % DENSITY_INTERVAL == 0:
            density = float(out.l0()) / self.cfg.dict_size
            self.sparse = density < SPARSE_BELOW.get(self.device.type, 0.0)

    def get_extra_state(self) -> dict[str, Any]:
        return {**super().get_extra_state(), "sparse": self.sparse}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.sparse = state["sparse"]
