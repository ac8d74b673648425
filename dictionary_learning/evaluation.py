"""How good an SAE is on held-out text: by its reconstructions, and by what the model loses when it reads through them.

Every metric is a ratio of float64 sums over all tokens, never a mean of ratios of batches, so none depends on the batch
size. Standard errors take contexts as independent, the tokens of one context not.

B contexts in the batch, L positions, P all B L of them, N some, mostly the unmasked, V vocabulary, D activation_dim,
E output_dim (D unless it is a transcoder), F dict_size, S samples (contexts), M summed quantities.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from dictionary_learning.buffer import Mask, nonfinite_sentence, position_mask, too_many_nonfinite
from dictionary_learning.dictionary import AutoEncoderTopK, Dictionary, TopKDictionary
from dictionary_learning.model import LanguageModel
from dictionary_learning.sites import Place, Tap, tap_of
from dictionary_learning.threads import workers

# Tokens an SAE sees at a time. It bounds the N x F tensors, and it is the "batch" of a per-batch top-k: unmasked
# neighbours of one context, lest the result depend on the evaluation's batch size.
GROUP_TOKENS = 2048

LOGITS_AT_A_TIME = 2**25  # in float32: 128 MiB a tensor
CACHED_LOGITS = 2**17  # the same on the CPU, for each thread: what stays in its cache takes 0.7 of the time

# the keys of the reference's eval_results.json, and what exact top-k reports beside its SAE's default
REFERENCE_METRICS = (
    "l2_loss l1_loss l0 frac_variance_explained cossim l2_ratio relative_reconstruction_bias "
    "loss_original loss_reconstructed loss_zero frac_recovered frac_alive"
).split()
TOPK_METRICS = "l0 l2_loss frac_variance_explained loss_reconstructed frac_recovered kl_divergence frac_alive".split()

Results = dict[str, Any]
Text = tuple[Tensor, Tensor]  # tokens_BL, mask_BL


class Evaluation(NamedTuple):
    """What `evaluate_saes` says about one SAE."""

    results: Results  # eval_results.json: numbers, None where there is no number; "error" or "warning" where need be
    density_F: Tensor | None  # share of the tokens on which each latent fires; None for an SAE that failed


class Ratios:
    """Sums of several quantities over samples: their ratios, and the standard errors of these.

    A sample is a set of tokens taken as independent of all others: a context, or a token where there are no contexts.
    """

    def __init__(self):
        self.names: list[str] = []
        self.n_samples = 0
        self._sum_M = self._products_MM = torch.zeros((), dtype=torch.float64)

    def add(self, lengths: list[int] | None = None, **quantities_N: Tensor) -> None:
        """N more samples: the sum of each quantity within each of them. With `lengths`, each so many rows are one."""
        self.names = list(quantities_N)
        rows_SM = torch.stack(list(quantities_N.values()), dim=1)
        if lengths is not None:
            rows_SM = torch.stack([rows_nM.sum(0) for rows_nM in rows_SM.split(lengths)])
        rows_SM = rows_SM.cpu().double()
        self.n_samples += len(rows_SM)
        self._sum_M = self._sum_M + rows_SM.sum(0)
        self._products_MM = self._products_MM + rows_SM.T @ rows_SM

    def add_all(self, more: "Ratios") -> None:
        """The samples of another."""
        self.names = more.names or self.names
        self.n_samples += more.n_samples
        self._sum_M = self._sum_M + more._sum_M
        self._products_MM = self._products_MM + more._products_MM

    def sum(self, name: str) -> float:
        return float(self._sum_M[self.names.index(name)]) if self.n_samples else 0.0

    def ratio(self, top: str, bottom: str) -> float | None:
        """Sum of `top` over sum of `bottom`, None where the latter is 0."""
        return self.sum(top) / self.sum(bottom) if self.sum(bottom) else None

    def stderr(self, top: str, bottom: str) -> float | None:
        """Standard error of that ratio r by linearisation, None for fewer than two samples.

        sqrt(S / (S - 1) * sum_s (top_s - r bottom_s)^2) / |sum_s bottom_s|, Cochran, Sampling Techniques, chapter 6
        """
        r = self.ratio(top, bottom)
        if r is None or self.n_samples < 2:
            return None
        weights_M = torch.zeros(len(self.names), dtype=torch.float64)
        weights_M[self.names.index(top)] += 1
        weights_M[self.names.index(bottom)] -= r
        squares = max(float(weights_M @ self._products_MM @ weights_M), 0.0)
        return math.sqrt(squares * self.n_samples / (self.n_samples - 1)) / abs(self.sum(bottom))


class Metrics:
    """Metrics of reconstructions, from sums over tokens.

    centre_E: what is taken from x before it is squared: near the mean, a variance keeps its digits. By default the mean
        of the first tokens.
    """

    def __init__(self, centre_E: Tensor | None = None):
        self.ratios, self.centre_E = Ratios(), centre_E
        self.n_tokens = 0
        self._x_sum_D = self._error_sum_D = self._fired_F = torch.zeros((), dtype=torch.float64)

    def update(self, x_ND: Tensor, x_hat_ND: Tensor, f_NF: Tensor, samples: list[int] | None = None) -> None:
        """Add N tokens; `samples` says how many neighbours at a time are one sample, by default each token."""
        wide = torch.float32 if x_ND.device.type == "mps" else torch.float64  # mps has no float64
        x_ND, x_hat_ND = x_ND.to(wide), x_hat_ND.to(wide)
        if self.centre_E is None:
            self.centre_E = x_ND.mean(0)
        f_NF = f_NF.float() if f_NF.dtype in (torch.bfloat16, torch.float16) else f_NF  # counts of theirs are rounded
        # as numbers, which are counted several times faster than bools are; float32 counts exactly up to 2^24
        active_NF = torch.ne(f_NF, 0, out=torch.empty_like(f_NF))
        error_ND, centred_ND = x_ND - x_hat_ND, x_ND - self.centre_E.to(wide)
        norm_N, norm_hat_N, error_N = (
            torch.linalg.vector_norm(part_ND, dim=1) for part_ND in (x_ND, x_hat_ND, error_ND)
        )
        dot_N = torch.linalg.vecdot(x_ND, x_hat_ND)
        tiny = torch.finfo(wide).tiny
        quantities_N = {
            "tokens": torch.ones_like(norm_N),
            "l0": active_NF.sum(1),
            # a few rows at a time, since torch copies what it adds up in float64
            "l1_loss": torch.cat([f_nF.sum(1, dtype=wide) for f_nF in f_NF.split(_rows_at_a_time(f_NF))]),
            "l2_loss": error_N,
            # zero vectors: a token with x = 0 is left out of these two, one with x_hat = 0 has cosine 0
            "nonzero": norm_N > 0,
            "cossim": dot_N / (norm_N * norm_hat_N).clamp(min=tiny),
            "l2_ratio": torch.where(norm_N > 0, norm_hat_N / norm_N.clamp(min=tiny), 0),
            "x_hat_sq": norm_hat_N**2,
            "dot": dot_N,
            "error_sq": error_N**2,
            "centred_sq": torch.linalg.vecdot(centred_ND, centred_ND),
        }
        self.ratios.add(samples, **quantities_N)
        self.n_tokens += len(x_ND)
        self._x_sum_D = self._x_sum_D + centred_ND.sum(0).cpu()
        self._error_sum_D = self._error_sum_D + error_ND.sum(0).cpu()
        self._fired_F = self._fired_F + active_NF.sum(0).cpu().double()

    def add_all(self, more: "Metrics") -> None:
        """The tokens of another with the same centre."""
        self.ratios.add_all(more.ratios)
        self.n_tokens += more.n_tokens
        self._x_sum_D = self._x_sum_D + more._x_sum_D
        self._error_sum_D = self._error_sum_D + more._error_sum_D
        self._fired_F = self._fired_F + more._fired_F

    def density_F(self) -> Tensor | None:
        """Share of the tokens on which each latent fires, None before the first."""
        return (self._fired_F / self.n_tokens).float() if self.n_tokens else None

    def compute(self) -> Results:
        """The metrics of all tokens so far; every value None before the first.

        frac_variance_explained = 1 - sum ||x - x_hat||^2 / sum ||x - mean x||^2, which a constant offset lowers; the
        `_centered` one has the residual's variance above, as the reference does, and does not see an offset.
        relative_reconstruction_bias = sum ||x_hat||^2 / sum <x, x_hat>.
        """
        n, error_sq, density_F = max(self.n_tokens, 1), self.ratios.sum("error_sq"), self.density_F()
        variance = self.ratios.sum("centred_sq") - float((self._x_sum_D**2).sum()) / n
        error_variance = error_sq - float((self._error_sum_D**2).sum()) / n

        def share(above: float) -> float | None:
            return None if density_F is None else float((density_F > above).double().mean())

        means = {name: (name, "tokens") for name in ("l0", "l1_loss", "l2_loss")}
        means |= {name: (name, "nonzero") for name in ("cossim", "l2_ratio")}
        return {name: self.ratios.ratio(*mean) for name, mean in means.items()} | {
            "relative_reconstruction_bias": self.ratios.ratio("x_hat_sq", "dot"),
            "frac_variance_explained": 1 - error_sq / variance if variance > 0 else None,
            "frac_variance_explained_centered": 1 - error_variance / variance if variance > 0 else None,
            "frac_alive": share(0),
            "freq_over_1_percent": share(0.01),
            "freq_over_10_percent": share(0.1),
            "n_tokens": self.n_tokens,
            **{f"{name}_stderr": self.ratios.stderr(*mean) for name, mean in means.items()},
        }


@torch.no_grad()
def evaluate(
    dictionary: Dictionary,
    activations: Iterable[Tensor | dict[int, Tensor]],
    max_len: int = 128,
    batch_size: int = 128,
    io: str = "out",
    device: str | torch.device = "cpu",
    n_batches: int = 1,
) -> Results:
    """The metrics of `Metrics.compute` on `n_batches` batches of activations (N, D), or {layer: (N, D)} of one layer.

    The arguments are the reference's. `max_len`, `batch_size` and `io` belong to its loss recovered and change nothing
    here: that needs the whole model and its text, see `evaluate_saes`. Standard errors take tokens as independent.
    Raises ValueError when the activations end before `n_batches`.
    """
    metrics, iterator = Metrics(), iter(activations)
    for i in range(n_batches):
        x_ND = next(iterator, None)
        if x_ND is None:
            raise ValueError(f"evaluation needs {n_batches} batches of activations, but there are only {i}.")
        if isinstance(x_ND, dict):
            (x_ND,) = x_ND.values()
        x_ND = x_ND.to(device, torch.float32)
        metrics.update(x_ND, *dictionary(x_ND, output_features=True))
    return metrics.compute()


class Predictions(NamedTuple):
    """What the model itself predicts at all P = B L positions of a batch of text."""

    q_PV: Tensor  # probabilities, float32
    cross_entropy_BL: Tensor  # of the next token, in nats; float64, on the CPU
    negentropy_BL: Tensor  # sum q log q, likewise


def predictions(logits_BLV: Tensor, tokens_BL: Tensor) -> Predictions:
    """The model's own; q is written over the logits where it can be: a copy can be larger than the model."""
    q_PV = rearrange(logits_BLV.float(), "b l v -> (b l) v")
    sums = []
    for logits_NV, next_N in _pieces(tokens_BL, q_PV):
        log_q_NV = logits_NV.log_softmax(-1)
        q_NV = torch.exp(log_q_NV, out=logits_NV)
        sums.append(_cross_entropies(log_q_NV, q_NV, next_N))
    return Predictions(q_PV, *_by_position(sums, tokens_BL))


def token_losses(logits_BLV: Tensor, own: Predictions, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of the next token, and KL(q || p), in nats: two (B, L) float64 tensors on the CPU.

    logits_BLV: of p. own: of q, the model itself. The last position has no next token; its cross entropy means nothing.
    """
    sums = []
    for logits_NV, q_NV, next_N in _pieces(tokens_BL, rearrange(logits_BLV, "b l v -> (b l) v"), own.q_PV):
        sums.append(_cross_entropies(logits_NV.float().log_softmax(-1), q_NV, next_N))
    cross_entropy_BL, q_log_p_BL = _by_position(sums, tokens_BL)
    return cross_entropy_BL, own.negentropy_BL - q_log_p_BL


def _pieces(tokens_BL: Tensor, *tensors_PV: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """A few positions N at a time: of each tensor its (N, V), and the next tokens (N,)."""
    n = _rows_at_a_time(tensors_PV[0])
    next_P = tokens_BL.roll(-1, dims=1).flatten().to(tensors_PV[0].device)
    return zip(*(tensor.split(n) for tensor in (*tensors_PV, next_P)), strict=True)


def _cross_entropies(log_p_NV: Tensor, q_NV: Tensor, next_N: Tensor) -> Tensor:
    """(2, N): -log p of the next token, and sum q log p."""
    return torch.stack([-log_p_NV.gather(1, next_N[:, None]).squeeze(1), torch.linalg.vecdot(q_NV, log_p_NV)])


def _rows_at_a_time(values_NV: Tensor) -> int:
    on_cpu, width = values_NV.device.type == "cpu", values_NV.shape[-1]
    return max(1, (CACHED_LOGITS * torch.get_num_threads() if on_cpu else LOGITS_AT_A_TIME) // width)


def _by_position(sums: list[Tensor], tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
    whole = torch.cat(sums, dim=1).cpu().double()
    first_BL, second_BL = rearrange(whole, "two (b l) -> two b l", b=len(tokens_BL))
    return first_BL, second_BL


def all_finite(x: Tensor) -> bool:
    """Told by its extremes, which are nan where an element is: far cheaper than to ask each."""
    return x.numel() == 0 or bool(torch.stack(torch.aminmax(x)).isfinite().all())


class Site:
    """A place of the model on one batch of text, and the losses that its SAEs are compared with.

    A position is reconstructed where it is unmasked (`keep_BL`), and its prediction scored where a real token follows.
    Masked positions keep the model's own activation. What SAEs read is x_ND, what they reconstruct y_NE: the same, but
    for transcoders.
    """

    def __init__(
        self,
        lm: LanguageModel,
        scope: "Scope",
        text: Text,
        x_by_place: Mapping[Place, Tensor],
        own: Predictions,
        keep_BL: Tensor,
    ):
        self.lm, self.place, self.text = lm, scope.place_out, text
        self.y_BLE, self.own, self.keep_BL, self.mean_E = x_by_place[scope.place_out], own, keep_BL, scope.mean_E
        self.below_BLD = x_by_place.get(tap_of(scope.place_out).layer - 1)
        self.y_NE, self.lengths = self.y_BLE[keep_BL].float(), keep_BL.sum(1).tolist()
        same = scope.place == scope.place_out
        self.x_ND = self.y_NE if same else x_by_place[scope.place][keep_BL].float()
        followed_BL = (text[1] > 0).cpu().roll(-1, dims=1)
        followed_BL[:, -1] = False
        self.scored_BL = keep_BL.cpu() & followed_BL
        self.n_scored_S = self._by_context(torch.ones(followed_BL.shape, dtype=torch.float64))
        self.original_S = self._by_context(own.cross_entropy_BL)
        if not self.original_S.isfinite().all():
            raise ValueError(f"the loss of {lm.name} in {lm.dtype} is not finite on this text: try another dtype.")
        self.zero_S, self.zero_kl_S = self.losses(torch.zeros_like(scope.mean_E))
        self.mean_S, _ = self.losses(scope.mean_E)

    def _by_context(self, loss_BL: Tensor) -> Tensor:
        """(S,): the sum in each context that has a scored position."""
        return torch.where(self.scored_BL, loss_BL, 0).sum(1)[self.scored_BL.any(1)]

    def losses(self, x_hat_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy and KL, (S,) sums by context, with x_hat_NE (or one E for all) at the unmasked positions."""
        y_BLE = self.y_BLE.clone()
        y_BLE[self.keep_BL] = x_hat_NE.to(y_BLE.dtype)
        logits_BLV = self.lm.run_from(self.place, y_BLE, *self.text, self.below_BLD)
        cross_entropy_BL, kl_BL = token_losses(logits_BLV, self.own, self.text[0])
        return self._by_context(cross_entropy_BL), self._by_context(kl_BL)


def groups_of(lengths: list[int]) -> list[list[int]]:
    """Contexts of these lengths in groups of at most GROUP_TOKENS; a longer one in several."""
    groups: list[list[int]] = []
    for length in lengths:
        for start in range(0, length, GROUP_TOKENS):
            n = min(length - start, GROUP_TOKENS)
            if groups and sum(groups[-1]) + n <= GROUP_TOKENS:
                groups[-1].append(n)
            else:
                groups.append([n])
    return groups


class Scores:
    """The sums of one SAE, run in one way: h_NH, what its ways have in common, and x_ND -> (x_hat_NE, f_NF).

    apart: what it makes of a token depends on the others, so it is never given those of two contexts.
    centre_E: as in `Metrics`.
    """

    def __init__(
        self, run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], apart: bool, centre_E: Tensor | None = None
    ):
        self.run, self.apart = run, apart
        self.metrics, self.losses = Metrics(centre_E), Ratios()
        self._x_hats: list[Tensor] = []

    def add_all(self, more: "Scores") -> None:
        """The sums of another batch."""
        self.metrics.add_all(more.metrics)
        self.losses.add_all(more.losses)

    def reconstruct(self, x_ND: Tensor, y_NE: Tensor, h_NH: Tensor, lengths: list[int]) -> None:
        """Add the next contexts of a batch, of these lengths."""
        if self.apart:
            ran = [self.run(h_nH, x_nD) for h_nH, x_nD in zip(h_NH.split(lengths), x_ND.split(lengths), strict=True)]
            x_hat_NE, f_NF = map(torch.cat, zip(*ran, strict=True))
        else:
            x_hat_NE, f_NF = self.run(h_NH, x_ND)
        self.metrics.update(y_NE, x_hat_NE, f_NF, samples=lengths)
        self._x_hats.append(x_hat_NE)

    def splice(self, site: Site) -> None:
        """Add the losses with what was reconstructed. ValueError where the SAE makes something that is not a number."""
        x_hat_NE = torch.cat(self._x_hats)
        self._x_hats.clear()
        if not all_finite(x_hat_NE):
            raise ValueError("its reconstruction has values that are not finite.")
        reconstructed_S, kl_S = site.losses(x_hat_NE)
        if not reconstructed_S.isfinite().all():
            raise ValueError("the model's loss is not finite with its reconstruction.")
        self.losses.add(
            tokens=site.n_scored_S,
            loss_original=site.original_S,
            loss_reconstructed=reconstructed_S,
            loss_zero=site.zero_S,
            loss_mean_ablated=site.mean_S,
            kl_divergence=kl_S,
            kl_zero=site.zero_kl_S,
            kl_recovered=site.zero_kl_S - kl_S,
            # an identity SAE's two sums are equal to the last bit, so it recovers exactly 1
            recovered=site.zero_S - reconstructed_S,
            recoverable=site.zero_S - site.original_S,
            mean_recovered=site.mean_S - reconstructed_S,
            mean_recoverable=site.mean_S - site.original_S,
        )

    def compute(self) -> Results:
        """`Metrics.compute`, and the losses in nats a token.

        frac_recovered = (L_zero - L_reconstructed) / (L_zero - L_original), of summed losses. The same with the mean
        activation in place of zero is frac_recovered_mean_ablation, and with the KL in place of the loss kl_score.
        """
        names = ("loss_original", "loss_reconstructed", "loss_zero", "loss_mean_ablated", "kl_divergence")
        ratios = {name: (name, "tokens") for name in names} | {
            "frac_recovered": ("recovered", "recoverable"),
            "frac_recovered_mean_ablation": ("mean_recovered", "mean_recoverable"),
            "kl_score": ("kl_recovered", "kl_zero"),
        }
        results = self.metrics.compute() | {"n_loss_tokens": round(self.losses.sum("tokens"))}
        results |= {name: self.losses.ratio(*ratio) for name, ratio in ratios.items()}
        return results | {f"{name}_stderr": self.losses.stderr(*ratio) for name, ratio in ratios.items()}


class Subject:
    """An SAE under evaluation: scored as it runs by default and, in the top-k family, by exact top-k; or its error."""

    def __init__(self, sae: Dictionary, where: Place | tuple[Place, Place], mask: Mask, lm: LanguageModel):
        self.sae, self.mask = sae.to(lm.device, torch.float32), mask
        self.place, self.place_out = (where, where) if isinstance(where, int | Tap) else where
        self.error: str | None = None
        self.ways = self._ways()
        layers = {tap_of(place).layer for place in (self.place, self.place_out)}
        if missing := [layer for layer in layers if not 0 <= layer < lm.n_layers]:
            self.error = f"there is no layer {missing[0]}: model {lm.name} has layers 0 to {lm.n_layers - 1}."
            return
        try:
            widths = lm.width(self.place), lm.width(self.place_out)
        except ValueError as error:
            self.error = str(error)
            return
        if sae.activation_dim != widths[0]:
            self.error = f"it takes {sae.activation_dim} dimensions, but the model has {widths[0]}."
        elif sae.output_dim != widths[1]:
            self.error = f"it gives {sae.output_dim} dimensions, but the model has {widths[1]}."

    @property
    def scope(self) -> tuple[Place, Place, Mask]:
        return self.place, self.place_out, self.mask

    def _ways(self, centre_E: Tensor | None = None) -> list[Scores]:
        sae = self.sae

        if not isinstance(sae, TopKDictionary):
            return [Scores(lambda _, x_ND: sae(x_ND, output_features=True), False, centre_E)]

        def run(use_threshold: bool | None, post_relu_NF: Tensor, x_ND: Tensor) -> tuple[Tensor, Tensor]:
            f_NF = sae.select(post_relu_NF, use_threshold)
            return sae.decode(f_NF, x_ND), f_NF

        of_batch = not isinstance(sae, AutoEncoderTopK)  # whose k are those of a token
        threshold_unknown = bool(sae.threshold < 0)
        return [
            Scores(partial(run, None), of_batch and threshold_unknown, centre_E),
            Scores(partial(run, False), of_batch, centre_E),
        ]

    def measure(self, site: Site) -> list[Scores] | str:
        """The sums of one batch of this SAE's place, or why there are none. Changes nothing, so threads may."""
        ways = self._ways(site.mean_E)
        try:
            groups = groups_of(site.lengths)
            sizes = [sum(lengths) for lengths in groups]
            for lengths, x_ND, y_NE in zip(groups, site.x_ND.split(sizes), site.y_NE.split(sizes), strict=True):
                h_NH = self.sae.post_relu(x_ND) if isinstance(self.sae, TopKDictionary) else x_ND
                for way in ways:
                    way.reconstruct(x_ND, y_NE, h_NH, lengths)
            for way in ways:
                way.splice(site)
        except (ValueError, RuntimeError) as error:
            return str(error)
        return ways

    def add(self, measured: list[Scores] | str) -> None:
        """Add a batch, unless this SAE has failed; a failure is kept, and stops no other SAE."""
        if self.error is not None:
            return
        if isinstance(measured, str):
            self.error, self.ways = measured, self._ways()  # the sums of half a text are no result
            return
        for way, more in zip(self.ways, measured, strict=True):
            way.add_all(more)

    def evaluation(self, hyperparameters: Results, warning: str | None) -> Evaluation:
        """The results, the reference's keys first; warning: what to say of the text they were measured on."""
        default, *rest = (way.compute() for way in self.ways)
        results = {name: default[name] for name in REFERENCE_METRICS} | {"hyperparameters": hyperparameters} | default
        if isinstance(self.sae, TopKDictionary):
            results |= {"k": int(self.sae.k)} | {f"topk_{name}": rest[0][name] for name in TOPK_METRICS}
        warnings = [warning] if warning else []
        if results["frac_alive"] == 0:
            warnings.append("no latent fires on this text.")
        elif isinstance(self.sae, TopKDictionary) and self.sae.threshold < 0:
            warnings.append("its threshold was never recorded: these are the results of exact top-k.")
        if self.error is not None:
            results["error"] = self.error
        elif warnings:
            results["warning"] = " ".join(warnings)
        return Evaluation(results, self.ways[0].metrics.density_F())


class Scope:
    """The positions of the whole text at which SAEs of one place with one mask are scored."""

    def __init__(self, lm: LanguageModel, place: Place, place_out: Place, mask: Mask):
        self.lm, self.place, self.place_out, self.mask = lm, place, place_out, mask
        self.keep: list[Tensor] = []  # a keep_BL for every batch
        self.positions: Counter[str] = Counter()  # the counts of `position_mask`
        self._sum_E = torch.zeros(lm.width(place_out), dtype=torch.float64)

    def add(self, text: Text, x_by_place: Mapping[Place, Tensor]) -> None:
        read = {place: x_by_place[place] for place in (self.place, self.place_out)}
        keep_BL, counts = position_mask(text[1], read, self.mask.bounds(*read), self.mask.drop_bos)
        self.keep.append(keep_BL)
        self.positions.update(counts)
        self._sum_E += x_by_place[self.place_out][keep_BL].cpu().double().sum(0)

    @property
    def n_kept(self) -> int:
        return self.positions["tokens"] - sum(self.positions[why] for why in ("bos", "nonfinite", "outliers"))

    @property
    def mean_E(self) -> Tensor:
        """Of what is reconstructed at these positions."""
        return (self._sum_E / self.n_kept).float().to(self.lm.device)

    @property
    def fault(self) -> str | None:
        """Why nothing can be scored here, if so."""
        if self.positions and too_many_nonfinite(self.positions):
            return nonfinite_sentence(self.positions, self.lm)
        too_little = "the evaluation text is too little: it has nothing but bos, padding and outliers."
        return None if self.n_kept else too_little

    def same_positions(self, other: "Scope") -> bool:
        same = (self.place, self.place_out) == (other.place, other.place_out)
        return same and all(map(torch.equal, self.keep, other.keep))


def _survey(lm: LanguageModel, texts: list[Text], subjects: Iterable[Subject]) -> dict[Any, Scope]:
    """A first pass over the text. Raises ValueError where it is of no use to any of the subjects."""
    scopes = {s.scope: Scope(lm, *s.scope) for s in subjects if s.error is None}
    places = {place for scope in scopes.values() for place in (scope.place, scope.place_out)}
    for text in texts if places else ():
        x_by_place = lm.activations(*text, places)
        for scope in scopes.values():
            scope.add(text, x_by_place)
    faults = [scope.fault for scope in scopes.values()]
    if faults and all(faults):
        raise ValueError(faults[0])
    for subject in subjects:
        if subject.error is None:
            subject.error = scopes[subject.scope].fault
    return scopes


def _threads_for(lm: LanguageModel, texts: list[Text]) -> int:
    """How many threads measure a batch of text each, with operations of one thread: as many as there are, where the
    logits are few; of many, all threads share one batch, whose operations are large."""
    n_logits = max(tokens_BL.numel() for tokens_BL, _ in texts) * lm.n_embeddings if texts else 1
    many = lm.device.type != "cpu" or n_logits > LOGITS_AT_A_TIME
    return 1 if many else max(1, min(torch.get_num_threads(), len(texts), LOGITS_AT_A_TIME // n_logits))


@torch.no_grad()
def _measure(
    lm: LanguageModel, text: Text, places: set[Place], members: list[tuple[Scope, Tensor, list[Subject]]]
) -> list[tuple[Subject, list[Scores] | str]]:
    """What a batch of text says of every SAE that has not failed; members: scope, its keep_BL here, its SAEs."""
    logits_BLV, x_by_place = lm.run(*text, places)
    own = predictions(logits_BLV, text[0])
    del logits_BLV
    measured = []
    for scope, keep_BL, group in members:
        if keep_BL.any():
            site = Site(lm, scope, text, x_by_place, own, keep_BL)
            measured += [(subject, subject.measure(site)) for subject in group if subject.error is None]
    return measured


@torch.no_grad()
def evaluate_saes(
    lm: LanguageModel,
    saes: Sequence[tuple[str, Dictionary, Place | tuple[Place, Place]]],
    batches: Iterable[Text],
    *,
    masks: Mapping[str, Mask] | None = None,
    hyperparameters: Results | None = None,
    show_progress: bool = False,
) -> dict[str, Evaluation]:
    """Evaluate SAEs of any places of one model on the same text, each as if it were alone.

    The whole model runs once a batch for all SAEs, and its upper layers twice for each place (zero and mean ablation),
    or for each mask where SAEs of a place have masks that tell positions of this text apart.
    Then only the layers above the splice run, once for each SAE and once more for the exact top-k of the top-k family
    (keys `topk_*`; a per-batch top-k is taken over at most `GROUP_TOKENS` unmasked neighbours of one context). They
    run by themselves: the last bits of a matmul follow the size of its batch, so neighbours in it would be seen.
    The SAEs are moved to the model's device, in float32 whatever the dtype of the model.
    On the CPU, worker threads measure several batches at the same time (`_threads_for`); what they say is added up in
    the order of the text, so no sum depends on who was first.

    saes: (name, SAE of raw activations, its place or, of a transcoder, the place it reads and the one it predicts);
        what is returned has these names.
    batches: (tokens_BL, mask_BL), the mask as in `position_mask`; all of them are used, and held in memory.
    masks: by name, the positions at which an SAE is scored, best those of its training (`Mask.of`); no entry: `Mask()`.
        All others keep the model's own activation and are not scored, as padding always is.
    hyperparameters: recorded beside ours (the dataset, ...).

    An SAE that fails does not stop the others: its metrics are None, and "error" says why. Raises ValueError where the
    text leaves nothing to evaluate on, or the model itself has no finite activations or loss on it.
    """
    texts, masks = list(batches), masks or {}
    subjects = {name: Subject(sae, where, masks.get(name, Mask()), lm) for name, sae, where in saes}
    assert len(subjects) == len(saes), "two SAEs have the same name"
    scopes = _survey(lm, texts, subjects.values())
    members: list[tuple[Scope, list[Subject]]] = []  # those of one entry have the same place and positions
    for subject in (subject for subject in subjects.values() if subject.error is None):
        scope = scopes[subject.scope]
        group = next((group for first, group in members if first.same_positions(scope)), None)
        if group is None:
            members.append((scope, group := []))
        group.append(subject)

    places = {place for scope, _ in members for place in (scope.place, scope.place_out)}
    # to run on from inside a block, the lower ones need not run again
    inside = (tap_of(scope.place_out).layer for scope, _ in members if not isinstance(scope.place_out, int))
    places |= {layer - 1 for layer in inside if layer > 0}
    n_tokens = sum(int((mask_BL > 0).sum()) for _, mask_BL in texts)
    bar = tqdm(total=n_tokens, desc="evaluating", unit=" tokens", unit_scale=True, disable=not show_progress)
    n_threads = _threads_for(lm, texts) if members else 1
    lms: SimpleQueue[LanguageModel] = SimpleQueue()
    for each in [lm] if n_threads == 1 else lm.copies(n_threads):
        lms.put(each)

    def measure(i: int) -> list[tuple[Subject, list[Scores] | str]]:
        lm = lms.get()
        try:
            return _measure(lm, texts[i], places, [(scope, scope.keep[i], group) for scope, group in members])
        finally:
            lms.put(lm)

    in_turn = map if n_threads == 1 else workers(n_threads).map
    for text, measured in zip(texts, in_turn(measure, range(len(texts))), strict=True):
        for subject, sums in measured:
            subject.add(sums)
        bar.update(int((text[1] > 0).sum()))
    bar.close()

    settings = {
        "n_inputs": sum(len(tokens_BL) for tokens_BL, _ in texts),
        "context_length": max((tokens_BL.shape[1] for tokens_BL, _ in texts), default=0),
        "n_tokens": n_tokens,
        "topk_group_tokens": GROUP_TOKENS,
        **(hyperparameters or {}),
    }
    evaluations = {}
    for name, subject in subjects.items():
        scope = scopes.get(subject.scope)
        positions = dict(scope.positions) if scope else {}
        own_settings = {"drop_bos": subject.mask.drop_bos, "norm_bound": subject.mask.norm_bound}
        warning = nonfinite_sentence(positions, lm) if positions else None
        evaluations[name] = subject.evaluation(settings | own_settings | {"positions": positions}, warning)
    return evaluations
