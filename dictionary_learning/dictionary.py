"""The SAE modules: what is saved and loaded.  How one is trained stands in `trainers/`.

Parameter names, shapes and initial draws are those of the reference, so its files and seeds carry over.  Storage is one
layout for all: the rows of `encoder_FD` and `decoder_FD` are contiguous, one row a latent.

B tokens (any leading shape), D activation_dim, F dict_size, G groups.
"""

import math
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Dictionary(nn.Module):
    """Base of all SAEs: x_BD -> f_BF by `encode`, f_BF -> x_hat_BD by `decode`."""

    biases: ClassVar[tuple[str, ...]]  # what scales with the activations
    output_bias: ClassVar[str] = "b_dec"
    input_bias: str | None = None  # of the encoder, where this does not take the output bias from x first
    activation_dim: int
    dict_size: int
    encoder: nn.Linear  # where the class has them; others have W_enc and W_dec
    decoder: nn.Linear

    def encode(self, x_BD: Tensor) -> Tensor:
        raise NotImplementedError

    def decode(self, f_BF: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x_BD: Tensor, output_features: bool = False):
        """x_hat_BD, or (x_hat_BD, f_BF) with `output_features`."""
        f_BF = self.encode(x_BD)
        x_hat_BD = self.decode(f_BF)
        return (x_hat_BD, f_BF) if output_features else x_hat_BD

    @property
    def encoder_FD(self) -> Tensor:
        return self.encoder.weight

    @property
    def decoder_FD(self) -> Tensor:
        """One row a latent's direction; a view of the parameter."""
        return self.decoder.weight.T

    def with_unit_norm(self) -> Self:
        """Itself, as loading and exporting leave it: where decoder norms are free, features come in units of them."""
        return self

    @torch.no_grad()
    def scale_biases(self, scale: float) -> None:
        """Make SAE'(scale * x) = scale * SAE(x): features scale too, weights stay."""
        state = self.state_dict(keep_vars=True)
        for name in self.biases:
            state[name].mul_(scale)

    @torch.no_grad()
    def shift(self, mean_D: Tensor) -> None:
        """Make SAE'(x + mean) = SAE(x) + mean: features and weights stay."""
        state = self.state_dict(keep_vars=True)
        mean_D = mean_D.to(self.encoder_FD)
        state[self.output_bias].add_(mean_D)
        if self.input_bias is not None:
            state[self.input_bias].sub_(self.encoder_FD @ mean_D)

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """The module a state dict belongs to, with its weights; strict."""
        if "W_dec" in state:
            dict_size, activation_dim = state["W_dec"].shape
        else:
            activation_dim, dict_size = state["decoder.weight"].shape
        sae = cls(activation_dim, dict_size, **cls._settings(state))
        sae.load_state_dict(state)
        return sae

    @classmethod
    def _settings(cls, state: dict[str, Tensor]) -> dict:
        """Constructor arguments beyond the two sizes."""
        return {}

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """The SAE of a state-dict file (`ae.pt`), loaded as weights only."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        return cls.from_state(state).to(device=device, dtype=dtype)


def _empty_linear(in_dim: int, out_dim: int, bias: bool) -> nn.Linear:
    return nn.utils.skip_init(nn.Linear, in_dim, out_dim, bias=bias)  # pyright: ignore[reportReturnType]


def _draw_linear(weight: Tensor, bias: Tensor | None, generator: torch.Generator | None) -> None:
    """The default draws of `nn.Linear`, in its order, from a generator of one's own."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    if bias is not None:
        bound = 1 / math.sqrt(weight.shape[1])
        nn.init.uniform_(bias, -bound, bound, generator=generator)


def _rows(weight_DF: Tensor) -> nn.Parameter:
    """A (D, F) parameter whose columns are contiguous in memory."""
    return nn.Parameter(weight_DF.T.clone(memory_format=torch.contiguous_format).T)


def unit_rows(weight_FD: Tensor, eps: float = 0.0) -> Tensor:
    """Rows over (their norm + eps); a zero row stays zero."""
    norm_F1 = weight_FD.norm(dim=1, keepdim=True) + eps
    return weight_FD / norm_F1.clamp(min=torch.finfo(weight_FD.dtype).tiny)


class AutoEncoder(Dictionary):
    """ReLU SAE with a pre-encoder bias: f = relu(W_e (x - b) + b_e), x_hat = W_d f + b.

    Towards Monosemanticity, https://transformer-circuits.pub/2023/monosemantic-features
    """

    biases = ("encoder.bias", "bias")
    output_bias = "bias"

    def __init__(self, activation_dim: int, dict_size: int, generator: torch.Generator | None = None):
        super().__init__()
        self.activation_dim, self.dict_size = activation_dim, dict_size
        self.bias = nn.Parameter(torch.zeros(activation_dim))
        self.encoder = _empty_linear(activation_dim, dict_size, bias=True)
        self.decoder = _empty_linear(dict_size, activation_dim, bias=False)
        # the encoder's bias keeps its uniform draw: so does the reference's
        _draw_linear(self.encoder.weight, self.encoder.bias, generator)
        _draw_linear(self.decoder.weight, None, generator)
        w_DF = torch.randn(activation_dim, dict_size, generator=generator)
        w_DF = w_DF / w_DF.norm(dim=0, keepdim=True) * 0.1
        self.encoder.weight = nn.Parameter(w_DF.T.contiguous())
        self.decoder.weight = _rows(w_DF)

    def encode(self, x_BD: Tensor) -> Tensor:
        return torch.relu(self.encoder(x_BD - self.bias))

    def decode(self, f_BF: Tensor) -> Tensor:
        return self.decoder(f_BF) + self.bias

    def with_unit_norm(self) -> Self:
        norm_F = self.decoder_FD.norm(dim=1)
        if not torch.allclose(norm_F, torch.ones_like(norm_F)):
            self.normalize_decoder()
        return self

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Decoder columns to unit norm, their norms into the encoder: the same function; zero columns stay."""
        norm_F = self.decoder.weight.norm(dim=0)
        norm_F = torch.where(norm_F > 0, norm_F, 1)
        self.decoder.weight /= norm_F
        self.encoder.weight *= norm_F[:, None]
        self.encoder.bias.mul_(norm_F)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        normalize_decoder: bool = True,
    ) -> Self:
        """As the base; the decoder is brought to unit norm unless told otherwise."""
        sae = super().from_pretrained(path, device, dtype)
        if normalize_decoder:
            sae.normalize_decoder()
        return sae


class AutoEncoderNew(Dictionary):
    """ReLU SAE without pre-encoder bias: f = relu(W_e x + b_e), x_hat = W_d f + b_d.

    Anthropic's April update, https://transformer-circuits.pub/2024/april-update
    """

    biases = ("encoder.bias", "decoder.bias")
    output_bias, input_bias = "decoder.bias", "encoder.bias"

    def __init__(self, activation_dim: int, dict_size: int, generator: torch.Generator | None = None):
        super().__init__()
        self.activation_dim, self.dict_size = activation_dim, dict_size
        self.encoder = _empty_linear(activation_dim, dict_size, bias=True)
        self.decoder = _empty_linear(dict_size, activation_dim, bias=True)
        _draw_linear(self.encoder.weight, self.encoder.bias, generator)
        _draw_linear(self.decoder.weight, self.decoder.bias, generator)
        w_DF = torch.randn(activation_dim, dict_size, generator=generator)
        w_DF = w_DF / w_DF.norm(dim=0, keepdim=True) * 0.1
        self.encoder.weight = nn.Parameter(w_DF.T.contiguous())
        self.decoder.weight = _rows(w_DF)
        nn.init.zeros_(self.encoder.bias)
        nn.init.zeros_(self.decoder.bias)

    def encode(self, x_BD: Tensor) -> Tensor:
        return torch.relu(self.encoder(x_BD))

    def decode(self, f_BF: Tensor) -> Tensor:
        return self.decoder(f_BF)

    def forward(self, x_BD: Tensor, output_features: bool = False):
        """The features returned are weighted by the norms of their decoder columns, as their penalty is."""
        f_BF = self.encode(x_BD)
        x_hat_BD = self.decode(f_BF)
        return (x_hat_BD, f_BF * self.decoder.weight.norm(dim=0)) if output_features else x_hat_BD


class GatedAutoEncoder(Dictionary):
    """Gated SAE: f = 1[u + b_gate > 0] * relu(exp(r_mag) u + b_mag), u = W_e (x - b_dec).

    Rajamanoharan et al. 2024, https://arxiv.org/abs/2404.16014
    """

    biases = ("decoder_bias", "mag_bias", "gate_bias")
    output_bias = "decoder_bias"

    def __init__(self, activation_dim: int, dict_size: int, generator: torch.Generator | None = None):
        super().__init__()
        self.activation_dim, self.dict_size = activation_dim, dict_size
        self.decoder_bias = nn.Parameter(torch.zeros(activation_dim))
        self.encoder = _empty_linear(activation_dim, dict_size, bias=False)
        self.r_mag = nn.Parameter(torch.zeros(dict_size))
        self.gate_bias = nn.Parameter(torch.zeros(dict_size))
        self.mag_bias = nn.Parameter(torch.zeros(dict_size))
        self.decoder = _empty_linear(dict_size, activation_dim, bias=False)
        _draw_linear(self.encoder.weight, None, generator)
        _draw_linear(self.decoder.weight, None, generator)
        w_DF = torch.randn(activation_dim, dict_size, generator=generator)
        w_DF = w_DF / w_DF.norm(dim=0, keepdim=True)
        self.encoder.weight = nn.Parameter(w_DF.T.contiguous())
        self.decoder.weight = _rows(w_DF)

    def gate_and_features(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        """(relu of the gate's pre-activation, f), both BF: penalty and auxiliary loss see the first."""
        u_BF = self.encoder(x_BD - self.decoder_bias)
        pi_gate_BF = u_BF + self.gate_bias
        pi_mag_BF = self.r_mag.exp() * u_BF + self.mag_bias
        return torch.relu(pi_gate_BF), torch.where(pi_gate_BF > 0, torch.relu(pi_mag_BF), 0)

    def encode(self, x_BD: Tensor) -> Tensor:
        return self.gate_and_features(x_BD)[1]

    def decode(self, f_BF: Tensor) -> Tensor:
        return self.decoder(f_BF) + self.decoder_bias


class MatrixDictionary(Dictionary):
    """Weights held as W_enc (D, F) and W_dec (F, D), where the others hold an `nn.Linear` each."""

    W_enc: nn.Parameter
    W_dec: nn.Parameter

    @property
    def encoder_FD(self) -> Tensor:
        return self.W_enc.T

    @property
    def decoder_FD(self) -> Tensor:
        return self.W_dec


class JumpReluAutoEncoder(MatrixDictionary):
    """JumpReLU SAE: f = relu(z * 1[z > threshold]), z = x W_enc + b_enc, one threshold a latent.

    Rajamanoharan et al. 2024, https://arxiv.org/abs/2407.14435
    """

    biases = ("b_dec", "b_enc", "threshold")

    def __init__(
        self,
        activation_dim: int,
        dict_size: int,
        generator: torch.Generator | None = None,
        apply_b_dec_to_input: bool = False,
    ):
        super().__init__()
        self.activation_dim, self.dict_size = activation_dim, dict_size
        self.apply_b_dec_to_input = apply_b_dec_to_input
        self.input_bias = None if apply_b_dec_to_input else "b_enc"
        w_FD = torch.empty(dict_size, activation_dim)
        nn.init.kaiming_uniform_(w_FD, generator=generator)
        w_FD = unit_rows(w_FD)
        self.W_enc = _rows(w_FD.T)
        self.b_enc = nn.Parameter(torch.zeros(dict_size))
        self.W_dec = nn.Parameter(w_FD.clone())
        self.b_dec = nn.Parameter(torch.zeros(activation_dim))
        self.threshold = nn.Parameter(torch.full((dict_size,), 0.001))

    def pre_activations(self, x_BD: Tensor) -> Tensor:
        if self.apply_b_dec_to_input:
            x_BD = x_BD - self.b_dec
        return x_BD @ self.W_enc + self.b_enc

    def encode(self, x_BD: Tensor) -> Tensor:
        z_BF = self.pre_activations(x_BD)
        return torch.relu(torch.where(z_BF > self.threshold, z_BF, 0))

    def decode(self, f_BF: Tensor) -> Tensor:
        return f_BF @ self.W_dec + self.b_dec


class TopKDictionary(Dictionary):
    """What TopK, BatchTopK and Matryoshka share: k, the inference threshold, and the two ways to encode.

    Training keeps the k largest activations (of each token, or k a token over the batch).  Inference uses the threshold
    that training recorded, as a JumpReLU, so a token's features do not depend on its neighbours.  `threshold` is -1
    until it has been recorded; then, and with `use_threshold=False`, the k largest are kept.
    """

    k: Tensor
    threshold: Tensor
    b_dec: nn.Parameter

    def _add_buffers(self, k: int) -> None:
        if not (isinstance(k, int) and k > 0):
            raise ValueError(f"k must be a positive integer, not {k!r}.")
        self.register_buffer("k", torch.tensor(k, dtype=torch.int))
        self.register_buffer("threshold", torch.tensor(-1.0))

    @classmethod
    def _settings(cls, state: dict[str, Tensor]) -> dict:
        return {"k": int(state["k"])}

    @property
    def encoder_bias_F(self) -> Tensor:
        return self.encoder.bias

    def encode(self, x_BD: Tensor, use_threshold: bool | None = None) -> Tensor:
        """f_BF by the threshold (the default once it is recorded) or, with False, by exact top-k."""
        post_relu_BF = torch.relu(linear(x_BD - self.b_dec, self.encoder_FD, self.encoder_bias_F))
        if use_threshold is None:
            use_threshold = bool(self.threshold >= 0)
        if use_threshold:
            return torch.where(post_relu_BF > self.threshold, post_relu_BF, 0)
        return self.keep_largest(post_relu_BF)

    def keep_largest(self, post_relu_BF: Tensor) -> Tensor:
        """All but the selected entries set to zero."""
        n_tokens = post_relu_BF[..., 0].numel()
        flat_N = post_relu_BF.flatten()
        top = flat_N.topk(int(self.k) * n_tokens, sorted=False)
        return torch.zeros_like(flat_N).scatter(0, top.indices, top.values).view_as(post_relu_BF)

    def decode(self, f_BF: Tensor) -> Tensor:
        return linear(f_BF, self.decoder_FD.T) + self.b_dec

    @torch.no_grad()
    def scale_biases(self, scale: float) -> None:
        """As the base, the threshold included once it is recorded."""
        super().scale_biases(scale)
        self.threshold.copy_(torch.where(self.threshold >= 0, self.threshold * scale, self.threshold))


class BatchTopKSAE(TopKDictionary):
    """BatchTopK SAE: the k B largest activations of a batch of B tokens.

    Bussmann et al. 2024, https://arxiv.org/abs/2412.06410
    """

    biases = ("encoder.bias", "b_dec")

    def __init__(self, activation_dim: int, dict_size: int, k: int, generator: torch.Generator | None = None):
        super().__init__()
        self.activation_dim, self.dict_size = activation_dim, dict_size
        self._add_buffers(k)
        self.decoder = _empty_linear(dict_size, activation_dim, bias=False)
        self.encoder = _empty_linear(activation_dim, dict_size, bias=True)
        _draw_linear(self.decoder.weight, None, generator)
        w_DF = self.decoder.weight.detach()
        w_DF = w_DF / (w_DF.norm(dim=0, keepdim=True) + torch.finfo(w_DF.dtype).eps)
        self.encoder.weight = nn.Parameter(w_DF.T.contiguous())
        self.decoder.weight = _rows(w_DF)
        nn.init.zeros_(self.encoder.bias)
        self.b_dec = nn.Parameter(torch.zeros(activation_dim))


class AutoEncoderTopK(BatchTopKSAE):
    """TopK SAE: the k largest activations of each token.

    Gao et al. 2024, https://arxiv.org/abs/2406.04093
    """

    def keep_largest(self, post_relu_BF: Tensor) -> Tensor:
        top = post_relu_BF.topk(int(self.k), dim=-1, sorted=False)
        return torch.zeros_like(post_relu_BF).scatter(-1, top.indices, top.values)


class MatryoshkaBatchTopKSAE(MatrixDictionary, TopKDictionary):
    """Matryoshka BatchTopK SAE: latents in nested groups, each prefix of which reconstructs on its own.

    Bussmann et al. 2025, https://arxiv.org/abs/2503.17547.  Lower `active_groups` to use the first groups only.
    """

    biases = ("b_enc", "b_dec")
    group_sizes: Tensor

    def __init__(
        self,
        activation_dim: int,
        dict_size: int,
        k: int,
        group_sizes: list[int],
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if sum(group_sizes) != dict_size or min(group_sizes) <= 0:
            raise ValueError(f"group sizes must be positive and add up to dict_size {dict_size}, not {group_sizes}.")
        self.activation_dim, self.dict_size = activation_dim, dict_size
        self._add_buffers(k)
        self.register_buffer("group_sizes", torch.tensor(group_sizes))
        self.group_ends = torch.tensor(group_sizes).cumsum(0).tolist()
        self.active_groups = len(group_sizes)
        w_FD = torch.empty(dict_size, activation_dim)
        nn.init.kaiming_uniform_(w_FD, generator=generator)
        w_FD = unit_rows(w_FD, eps=torch.finfo(torch.float32).eps)
        self.W_enc = _rows(w_FD.T)
        self.b_enc = nn.Parameter(torch.zeros(dict_size))
        self.W_dec = nn.Parameter(w_FD.clone())
        self.b_dec = nn.Parameter(torch.zeros(activation_dim))

    @classmethod
    def _settings(cls, state: dict[str, Tensor]) -> dict:
        return {"k": int(state["k"]), "group_sizes": state["group_sizes"].tolist()}

    @property
    def encoder_bias_F(self) -> Tensor:
        return self.b_enc

    def encode(self, x_BD: Tensor, use_threshold: bool | None = None) -> Tensor:
        f_BF = super().encode(x_BD, use_threshold)
        end = self.group_ends[self.active_groups - 1]
        if end == self.dict_size:
            return f_BF
        return torch.where(torch.arange(self.dict_size, device=f_BF.device) < end, f_BF, 0)


class IdentityDict(Dictionary):
    """Returns what it gets: the ceiling of every metric."""

    biases = ()

    def __init__(self, activation_dim: int = 0):
        super().__init__()
        self.activation_dim = self.dict_size = activation_dim

    def encode(self, x_BD: Tensor) -> Tensor:
        return x_BD

    def decode(self, f_BF: Tensor) -> Tensor:
        return f_BF


DICTIONARIES: dict[str, type[Dictionary]] = {
    cls.__name__: cls
    for cls in (
        AutoEncoder,
        AutoEncoderNew,
        GatedAutoEncoder,
        JumpReluAutoEncoder,
        AutoEncoderTopK,
        BatchTopKSAE,
        MatryoshkaBatchTopKSAE,
    )
}
