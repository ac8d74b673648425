"""The SAE modules: what is saved and loaded.  How one is trained stands in `trainers/`.

Parameter names, shapes and initial draws are those of the reference, so its files and seeds carry over.  Storage is one
layout for all: the rows of `encoder_FD` and `decoder_FD` are contiguous, one row a latent.

B tokens (any leading shape), D activation_dim, E output_dim (D unless it is a transcoder), F dict_size, G groups.
"""

import math
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

TRANSCODER = "Transcoder"  # behind the class of an SAE


class Dictionary(nn.Module):
    """Base of all SAEs: x_BD -> f_BF by `encode`, f_BF -> x_hat_BD by `decode`.

    One that is made with an `output_dim` is a transcoder: it predicts activations y_BE of another place than the one it
    reads, so nothing is taken from x before it is encoded. With `skip` it adds x W_skip (D, E), which decoding then
    needs x for (skip transcoders: Paulo et al. 2025, https://arxiv.org/abs/2501.18823).
    """

    biases: ClassVar[tuple[str, ...]]  # what scales with the activations
    output_bias: ClassVar[str] = "b_dec"
    encoder_bias: ClassVar[str] = "encoder.bias"
    activation_dim: int
    dict_size: int
    subtracts_bias: ClassVar[bool] = True  # the output's, before it encodes
    is_transcoder = False
    W_skip: Any  # a parameter or None

    def __init__(self):
        super().__init__()
        self.register_parameter("W_skip", None)

    encoder: nn.Linear  # where the class has them; others have W_enc and W_dec
    decoder: nn.Linear

    def encode(self, x_BD: Tensor) -> Tensor:
        raise NotImplementedError

    def decode(self, f_BF: Tensor, x_BD: Tensor | None = None) -> Tensor:
        """x_hat_BE; ValueError without the activations that were encoded, where `needs_input`."""
        raise NotImplementedError

    def _make(self, activation_dim: int, dict_size: int, output_dim: int | None, skip: bool) -> int:
        """Note the sizes, make W_skip where there is one; returns E."""
        self.activation_dim, self.dict_size = activation_dim, dict_size
        self.is_transcoder, self._output_dim = output_dim is not None, output_dim or activation_dim
        if skip:
            self.W_skip = nn.Parameter(torch.zeros(activation_dim, self._output_dim))
        return self._output_dim

    @property
    def class_name(self) -> str:
        """In config.json: another one for transcoders, lest a reader take one for an SAE."""
        return type(self).__name__ + (TRANSCODER if self.is_transcoder else "")

    @property
    def needs_input(self) -> bool:
        """Whether `decode` needs the activations that were encoded."""
        return self.W_skip is not None

    @property
    def subtracted_D(self) -> Tensor | None:
        """What is taken from x before it is encoded: the output bias, or nothing."""
        return self.get_parameter(self.output_bias) if self.subtracts_bias and not self.is_transcoder else None

    def _centred(self, x_BD: Tensor) -> Tensor:
        x_BD, subtracted_D = self.like_weights(x_BD), self.subtracted_D
        return x_BD if subtracted_D is None else x_BD - subtracted_D

    def _with_skip(self, y_BE: Tensor, x_BD: Tensor | None) -> Tensor:
        if self.W_skip is None:
            return y_BE
        return y_BE + self.like_weights(self._given(x_BD)) @ self.W_skip

    def _given(self, x_BD: Tensor | None) -> Tensor:
        if x_BD is None:
            raise ValueError("this SAE decodes with what it encoded: call decode(f, x).")
        return x_BD

    def like_weights(self, x_BD: Tensor) -> Tensor:
        """In the weights' dtype: activations come as the language model has them."""
        return x_BD.to(self.encoder_FD.dtype)

    def forward(self, x_BD: Tensor, output_features: bool = False):
        """x_hat_BD, or (x_hat_BD, f_BF) with `output_features`."""
        f_BF = self.encode(x_BD)
        x_hat_BE = self.decode(f_BF, x_BD) if self.needs_input else self.decode(f_BF)
        return (x_hat_BE, f_BF) if output_features else x_hat_BE

    @property
    def output_dim(self) -> int:
        """The width of x_hat: that of x, but for transcoders."""
        return self._output_dim if self.is_transcoder else self.activation_dim

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
    def scale(self, scale_in: float, scale_out: float) -> None:
        """Make SAE'(scale_in * x) = scale_out * SAE(x): features scale as the outputs do, decoder directions stay."""
        self.scale_biases(scale_out)
        if scale_in != scale_out:
            self.encoder_FD.mul_(scale_out / scale_in)
            if self.W_skip is not None:
                self.W_skip.mul_(scale_out / scale_in)

    @torch.no_grad()
    def shift(self, mean_D: Tensor, mean_out_E: Tensor | None = None) -> None:
        """Make SAE'(x + mean) = SAE(x) + mean_out, by default the same mean: features and weights stay."""
        mean_D = mean_D.to(self.encoder_FD)
        mean_out_E = mean_D if mean_out_E is None else mean_out_E.to(self.encoder_FD)
        state = self.state_dict(keep_vars=True)
        state[self.output_bias].add_(mean_out_E if self.W_skip is None else mean_out_E - mean_D @ self.W_skip)
        if self.subtracted_D is None:
            self._shift_encoder(self.encoder_FD @ mean_D)

    def _shift_encoder(self, shift_F: Tensor) -> None:
        self.state_dict(keep_vars=True)[self.encoder_bias].sub_(shift_F)

    @classmethod
    def from_state(cls, state: dict[str, Tensor], is_transcoder: bool = False) -> Self:
        """The module a state dict belongs to, in float32; strict.  It takes the tensors over and copies none."""
        if "W_dec" in state:
            dict_size, output_dim = state["W_dec"].shape
            activation_dim = len(state["W_enc"])
        else:
            output_dim, dict_size = state["decoder.weight"].shape
            activation_dim = state["encoder.weight"].shape[1]
        target = {"output_dim": output_dim, "skip": "W_skip" in state} if is_transcoder else {}
        with torch.device("meta"):  # nothing is drawn, nothing takes memory
            sizes = activation_dim if target else output_dim, dict_size
            sae = cls(*sizes, **cls._settings(state), **target)  # pyright: ignore[reportCallIssue]
        floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        sae.load_state_dict(floats, assign=True)
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


class _EmptyLinear(nn.Linear):
    """An `nn.Linear` that draws no values: those come from `_draw_linear`, or from a file."""

    def reset_parameters(self) -> None:
        pass


def _draw_linear(weight: Tensor, bias: Tensor | None, generator: torch.Generator | None) -> None:
    """The default draws of `nn.Linear`, in its order, from a generator of one's own."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    if bias is not None:
        bound = 1 / math.sqrt(weight.shape[1])
        nn.init.uniform_(bias, -bound, bound, generator=generator)


def _rows(weight_DF: Tensor) -> nn.Parameter:
    """A (D, F) parameter whose columns are contiguous in memory."""
    return nn.Parameter(weight_DF.T.clone(memory_format=torch.contiguous_format).T)


def _normal_pair(
    activation_dim: int, output_dim: int, dict_size: int, generator: torch.Generator | None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(w_DF, w_EF) with columns of norm `scale`: one and the same where the widths are."""
    w_DF = _of_norm(_normal(activation_dim, dict_size, generator), scale)
    if output_dim == activation_dim:
        return w_DF, w_DF
    return w_DF, _of_norm(_normal(output_dim, dict_size, generator), scale)


# Without values (see `from_state`) draws and norms are of no use, and the first ones take torch seconds.
def _normal(activation_dim: int, dict_size: int, generator: torch.Generator | None) -> Tensor:
    w_DF = torch.empty(activation_dim, dict_size)
    return w_DF if w_DF.is_meta else w_DF.normal_(generator=generator)


def _of_norm(weight_DF: Tensor, norm: float = 1.0, eps: float = 0.0) -> Tensor:
    """Columns over (their norm + eps), times `norm`."""
    if weight_DF.is_meta:
        return weight_DF
    return weight_DF / (weight_DF.norm(dim=0, keepdim=True) + eps) * norm


def _uniform_pair(
    activation_dim: int, output_dim: int, dict_size: int, generator: torch.Generator | None, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(w_FD, w_FE) with rows of norm 1: one and the same where the widths are."""
    w_FD = torch.empty(dict_size, activation_dim)
    nn.init.kaiming_uniform_(w_FD, generator=generator)
    w_FD = unit_rows(w_FD, eps)
    if output_dim == activation_dim:
        return w_FD, w_FD
    w_FE = torch.empty(dict_size, output_dim)
    nn.init.kaiming_uniform_(w_FE, generator=generator)
    return w_FD, unit_rows(w_FE, eps)


def unit_rows(weight_FD: Tensor, eps: float = 0.0) -> Tensor:
    """Rows over (their norm + eps); a zero row stays zero."""
    if weight_FD.is_meta:
        return weight_FD
    norm_F1 = weight_FD.norm(dim=1, keepdim=True) + eps
    return weight_FD / norm_F1.clamp(min=torch.finfo(weight_FD.dtype).tiny)


def _check_k(k: Any, dict_size: int) -> None:
    if not (isinstance(k, int) and 0 < k <= dict_size):
        raise ValueError(f"k must be a positive integer of at most dict_size {dict_size}, not {k!r}.")


class AutoEncoder(Dictionary):
    """ReLU SAE with a pre-encoder bias: f = relu(W_e (x - b) + b_e), x_hat = W_d f + b.

    Towards Monosemanticity, https://transformer-circuits.pub/2023/monosemantic-features
    """

    biases = ("encoder.bias", "bias")
    output_bias = "bias"

    def __init__(
        self,
        activation_dim: int,
        dict_size: int,
        generator: torch.Generator | None = None,
        output_dim: int | None = None,
        skip: bool = False,
    ):
        super().__init__()
        E = self._make(activation_dim, dict_size, output_dim, skip)
        self.bias = nn.Parameter(torch.zeros(E))
        self.encoder = _EmptyLinear(activation_dim, dict_size, bias=True)
        self.decoder = _EmptyLinear(dict_size, E, bias=False)
        # the encoder's bias keeps its uniform draw: so does the reference's
        _draw_linear(self.encoder.weight, self.encoder.bias, generator)
        _draw_linear(self.decoder.weight, None, generator)
        w_DF, w_EF = _normal_pair(activation_dim, E, dict_size, generator, scale=0.1)
        self.encoder.weight = nn.Parameter(w_DF.T.contiguous())
        self.decoder.weight = _rows(w_EF)

    def encode(self, x_BD: Tensor) -> Tensor:
        return torch.relu(self.encoder(self._centred(x_BD)))

    def decode(self, f_BF: Tensor, x_BD: Tensor | None = None) -> Tensor:
        return self._with_skip(self.decoder(f_BF) + self.bias, x_BD)

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
    output_bias = "decoder.bias"
    subtracts_bias = False

    def __init__(
        self,
        activation_dim: int,
        dict_size: int,
        generator: torch.Generator | None = None,
        output_dim: int | None = None,
        skip: bool = False,
    ):
        super().__init__()
        E = self._make(activation_dim, dict_size, output_dim, skip)
        self.encoder = _EmptyLinear(activation_dim, dict_size, bias=True)
        self.decoder = _EmptyLinear(dict_size, E, bias=True)
        _draw_linear(self.encoder.weight, self.encoder.bias, generator)
        _draw_linear(self.decoder.weight, self.decoder.bias, generator)
        w_DF, w_EF = _normal_pair(activation_dim, E, dict_size, generator, scale=0.1)
        self.encoder.weight = nn.Parameter(w_DF.T.contiguous())
        self.decoder.weight = _rows(w_EF)
        nn.init.zeros_(self.encoder.bias)
        nn.init.zeros_(self.decoder.bias)

    def encode(self, x_BD: Tensor) -> Tensor:
        return torch.relu(self.encoder(self.like_weights(x_BD)))

    def decode(self, f_BF: Tensor, x_BD: Tensor | None = None) -> Tensor:
        return self._with_skip(self.decoder(f_BF), x_BD)

    def forward(self, x_BD: Tensor, output_features: bool = False):
        """The features returned are weighted by the norms of their decoder columns, as their penalty is."""
        f_BF = self.encode(x_BD)
        x_hat_BE = self.decode(f_BF, x_BD)
        return (x_hat_BE, f_BF * self.decoder.weight.norm(dim=0)) if output_features else x_hat_BE


class GatedAutoEncoder(Dictionary):
    """Gated SAE: f = 1[u + b_gate > 0] * relu(exp(r_mag) u + b_mag), u = W_e (x - b_dec).

    Rajamanoharan et al. 2024, https://arxiv.org/abs/2404.16014
    """

    biases = ("decoder_bias", "mag_bias", "gate_bias")
    output_bias = "decoder_bias"

    def __init__(
        self,
        activation_dim: int,
        dict_size: int,
        generator: torch.Generator | None = None,
        output_dim: int | None = None,
        skip: bool = False,
    ):
        super().__init__()
        E = self._make(activation_dim, dict_size, output_dim, skip)
        self.decoder_bias = nn.Parameter(torch.zeros(E))
        self.encoder = _EmptyLinear(activation_dim, dict_size, bias=False)
        self.r_mag = nn.Parameter(torch.zeros(dict_size))
        self.gate_bias = nn.Parameter(torch.zeros(dict_size))
        self.mag_bias = nn.Parameter(torch.zeros(dict_size))
        self.decoder = _EmptyLinear(dict_size, E, bias=False)
        _draw_linear(self.encoder.weight, None, generator)
        _draw_linear(self.decoder.weight, None, generator)
        w_DF, w_EF = _normal_pair(activation_dim, E, dict_size, generator)
        self.encoder.weight = nn.Parameter(w_DF.T.contiguous())
        self.decoder.weight = _rows(w_EF)

    def gate_and_features(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        """(relu of the gate's pre-activation, f), both BF: penalty and auxiliary loss see the first."""
        u_BF = self.encoder(self._centred(x_BD))
        pi_gate_BF = u_BF + self.gate_bias
        pi_mag_BF = self.r_mag.exp() * u_BF + self.mag_bias
        return torch.relu(pi_gate_BF), torch.where(pi_gate_BF > 0, torch.relu(pi_mag_BF), 0)

    def encode(self, x_BD: Tensor) -> Tensor:
        return self.gate_and_features(x_BD)[1]

    def decode(self, f_BF: Tensor, x_BD: Tensor | None = None) -> Tensor:
        return self._with_skip(self.decoder(f_BF) + self.decoder_bias, x_BD)

    def _shift_encoder(self, shift_F: Tensor) -> None:
        self.gate_bias.sub_(shift_F)
        self.mag_bias.sub_(self.r_mag.exp() * shift_F)


class MatrixDictionary(Dictionary):
    """Weights held as W_enc (D, F) and W_dec (F, D), where the others hold an `nn.Linear` each."""

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    encoder_bias = "b_enc"

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
        output_dim: int | None = None,
        skip: bool = False,
    ):
        super().__init__()
        E = self._make(activation_dim, dict_size, output_dim, skip)
        self.apply_b_dec_to_input = apply_b_dec_to_input
        w_FD, w_FE = _uniform_pair(activation_dim, E, dict_size, generator)
        self.W_enc = _rows(w_FD.T)
        self.b_enc = nn.Parameter(torch.zeros(dict_size))
        self.W_dec = nn.Parameter(w_FE.clone())
        self.b_dec = nn.Parameter(torch.zeros(E))
        self.threshold = nn.Parameter(torch.full((dict_size,), 0.001))

    @property
    def subtracted_D(self) -> Tensor | None:
        return self.b_dec if self.apply_b_dec_to_input else None

    @torch.no_grad()
    def without_input_bias(self) -> "JumpReluAutoEncoder":
        """The same features and reconstructions with nothing subtracted from x, as state dicts are read."""
        if not self.apply_b_dec_to_input:
            return self
        state = self.state_dict()
        return type(self).from_state(state | {"b_enc": state["b_enc"] - state["b_dec"] @ state["W_enc"]})

    def pre_activations(self, x_BD: Tensor) -> Tensor:
        return self._centred(x_BD) @ self.W_enc + self.b_enc

    def encode(self, x_BD: Tensor) -> Tensor:
        z_BF = self.pre_activations(x_BD)
        return torch.relu(torch.where(z_BF > self.threshold, z_BF, 0))

    def decode(self, f_BF: Tensor, x_BD: Tensor | None = None) -> Tensor:
        return self._with_skip(f_BF @ self.W_dec + self.b_dec, x_BD)


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
        _check_k(k, self.dict_size)
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
        return self.select(self.post_relu(x_BD), use_threshold)

    def post_relu(self, x_BD: Tensor) -> Tensor:
        """post_relu_BF, which both ways select from."""
        return torch.relu(linear(self._centred(x_BD), self.encoder_FD, self.encoder_bias_F))

    def select(self, post_relu_BF: Tensor, use_threshold: bool | None = None) -> Tensor:
        if use_threshold is None:
            use_threshold = bool(self.threshold >= 0)
        if use_threshold:
            return torch.where(post_relu_BF > self.threshold, post_relu_BF, 0)
        return self.keep_largest(post_relu_BF)

    def keep_largest(self, post_relu_BF: Tensor) -> Tensor:
        """All but the selected entries set to zero."""
        n_tokens = post_relu_BF[..., 0].numel()
        return _keep_largest(post_relu_BF.flatten(), int(self.k) * n_tokens).view_as(post_relu_BF)

    def decode(self, f_BF: Tensor, x_BD: Tensor | None = None) -> Tensor:
        return self._with_skip(linear(f_BF, self.decoder_FD.T) + self.b_dec, x_BD)

    @torch.no_grad()
    def scale_biases(self, scale: float) -> None:
        """As the base, the threshold included once it is recorded."""
        super().scale_biases(scale)
        self.threshold.copy_(torch.where(self.threshold >= 0, self.threshold * scale, self.threshold))


def _keep_largest(post_relu: Tensor, k: int) -> Tensor:
    """All but the k largest along the last dimension set to zero."""
    values = _as_numpy(post_relu) if post_relu.numel() > 0 else None
    if values is not None:
        # numpy's partition takes an eighth of the time of torch's topk
        column = post_relu.shape[-1] - k
        kth = np.partition(values, column)[..., column : column + 1]
        kept = torch.where(post_relu < torch.from_numpy(kth), 0, post_relu)
        if torch.count_nonzero(kept, dim=-1).max() <= k:  # nothing but ties, or NaN, makes more than k reach the k-th
            return kept
    top = post_relu.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(post_relu).scatter(-1, top.indices, top.values)


def _as_numpy(x: Tensor) -> np.ndarray | None:
    """The values of a float32 tensor of the CPU; None where there are none to see, as inside `torch.func.vmap`.

    `torch.jit.trace` would keep them as constants.
    """
    is_tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if x.device.type != "cpu" or x.dtype != torch.float32 or is_tracing:
        return None
    try:
        return x.detach().numpy()
    except RuntimeError:
        return None


class BatchTopKSAE(TopKDictionary):
    """BatchTopK SAE: the k B largest activations of a batch of B tokens.

    Bussmann et al. 2024, https://arxiv.org/abs/2412.06410
    """

    biases = ("encoder.bias", "b_dec")

    def __init__(
        self,
        activation_dim: int,
        dict_size: int,
        k: int,
        generator: torch.Generator | None = None,
        output_dim: int | None = None,
        skip: bool = False,
    ):
        super().__init__()
        E = self._make(activation_dim, dict_size, output_dim, skip)
        self._add_buffers(k)
        self.decoder = _EmptyLinear(dict_size, E, bias=False)
        self.encoder = _EmptyLinear(activation_dim, dict_size, bias=True)
        _draw_linear(self.decoder.weight, None, generator)
        w_EF = self.decoder.weight.detach()
        w_EF = _of_norm(w_EF, eps=torch.finfo(w_EF.dtype).eps)
        w_DF = w_EF if E == activation_dim else _normal_pair(activation_dim, activation_dim, dict_size, generator)[0]
        self.encoder.weight = nn.Parameter(w_DF.T.contiguous())
        self.decoder.weight = _rows(w_EF)
        nn.init.zeros_(self.encoder.bias)
        self.b_dec = nn.Parameter(torch.zeros(E))


class AutoEncoderTopK(BatchTopKSAE):
    """TopK SAE: the k largest activations of each token.

    Gao et al. 2024, https://arxiv.org/abs/2406.04093
    """

    def keep_largest(self, post_relu_BF: Tensor) -> Tensor:
        return _keep_largest(post_relu_BF, int(self.k))


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
        output_dim: int | None = None,
        skip: bool = False,
    ):
        super().__init__()
        if sum(group_sizes) != dict_size or min(group_sizes) <= 0:
            raise ValueError(f"group sizes must be positive and add up to dict_size {dict_size}, not {group_sizes}.")
        E = self._make(activation_dim, dict_size, output_dim, skip)
        self._add_buffers(k)
        self.register_buffer("group_sizes", torch.tensor(group_sizes))
        self.group_ends = list(accumulate(group_sizes))
        self.active_groups = len(group_sizes)
        w_FD, w_FE = _uniform_pair(activation_dim, E, dict_size, generator, eps=torch.finfo(torch.float32).eps)
        self.W_enc = _rows(w_FD.T)
        self.b_enc = nn.Parameter(torch.zeros(dict_size))
        self.W_dec = nn.Parameter(w_FE.clone())
        self.b_dec = nn.Parameter(torch.zeros(E))

    @classmethod
    def _settings(cls, state: dict[str, Tensor]) -> dict:
        return {"k": int(state["k"]), "group_sizes": state["group_sizes"].tolist()}

    @property
    def encoder_bias_F(self) -> Tensor:
        return self.b_enc

    def select(self, post_relu_BF: Tensor, use_threshold: bool | None = None) -> Tensor:
        f_BF = super().select(post_relu_BF, use_threshold)
        end = self.group_ends[self.active_groups - 1]
        if end == self.dict_size:
            return f_BF
        return torch.where(torch.arange(self.dict_size, device=f_BF.device) < end, f_BF, 0)


class GeneralSAE(MatrixDictionary):
    """The form of all published SAEs and transcoders, for those that none of the classes above computes.

        f = act((n(x) - pre_bias) W_enc + b_enc)        x_hat = undo(f W_dec + b_dec) + x W_skip

    n and its undoing see one token: "none"; "layer_norm": less the mean of its entries, over their standard deviation;
    "constant_norm": to norm sqrt(D).  act is one of `ACTIVATIONS`, or "gated": 1[u + b_gate > 0] relu(exp(r_mag) u +
    b_enc) with u = (n(x) - pre_bias) W_enc.

    tensors: W_enc (D, F), W_dec (F, E), b_enc (F), b_dec (E), and where there is one: pre_bias (D), W_skip (D, E),
    threshold (F), rank (F; what pre-activations are multiplied by to find the k largest), b_gate, r_mag (F).
    """

    ACTIVATIONS = ("relu", "jump_relu", "top_k", "signed_top_k", "abs_top_k", "batch_top_k", "group_max", "gated")
    NORMALIZERS = ("none", "layer_norm", "constant_norm")
    biases = ("b_enc", "b_dec", "pre_bias", "threshold", "b_gate")
    b_enc: nn.Parameter
    b_dec: nn.Parameter
    pre_bias: Any  # these are a parameter or None
    threshold: Any
    rank: Any
    b_gate: Any
    r_mag: Any
    k: Any  # an integer or None

    def __init__(
        self,
        tensors: dict[str, Tensor],
        activation: str = "relu",
        k: int | None = None,
        normalize: str = "none",
        undo: bool = True,
    ):
        super().__init__()
        assert activation in self.ACTIVATIONS and normalize in self.NORMALIZERS
        self.activation, self.k, self.normalize, self.undo = activation, k, normalize, undo
        for name in ("W_enc", "W_dec", "b_enc", "b_dec", "pre_bias", "W_skip", "threshold", "rank", "b_gate", "r_mag"):
            self.register_parameter(name, nn.Parameter(tensors[name]) if name in tensors else None)
        self.activation_dim, self.dict_size = self.W_enc.shape
        if "top_k" in activation or activation == "group_max":
            _check_k(k, self.dict_size)

    @property
    def output_dim(self) -> int:
        return self.W_dec.shape[1]

    @property
    def needs_input(self) -> bool:
        return self.W_skip is not None or (self.normalize != "none" and self.undo)

    @property
    def subtracted_D(self) -> Tensor | None:
        return self.pre_bias

    def _moments(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        """What a token is lessened by and divided by, both B1."""
        if self.normalize == "layer_norm":
            return x_BD.mean(-1, keepdim=True), x_BD.std(-1, keepdim=True)
        norm_B1 = x_BD.norm(dim=-1, keepdim=True)
        return torch.zeros_like(norm_B1), norm_B1 / math.sqrt(self.activation_dim)

    def encode(self, x_BD: Tensor) -> Tensor:
        x_BD = self.like_weights(x_BD)
        if self.normalize != "none":
            mean_B1, scale_B1 = self._moments(x_BD)
            # the published layer norms add their eps to the deviation, and do not when they undo it
            eps = 1e-5 if self.normalize == "layer_norm" else torch.finfo(x_BD.dtype).tiny
            x_BD = (x_BD - mean_B1) / (scale_B1 + eps)
        if self.pre_bias is not None:
            x_BD = x_BD - self.pre_bias
        if self.activation == "gated":
            u_BF = x_BD @ self.W_enc
            return torch.where(u_BF + self.b_gate > 0, torch.relu(self.r_mag.exp() * u_BF + self.b_enc), 0)
        return self._activate(x_BD @ self.W_enc + self.b_enc)

    def _activate(self, pre_BF: Tensor) -> Tensor:
        if self.activation == "relu":
            return torch.relu(pre_BF)
        if self.activation == "jump_relu":
            return torch.relu(torch.where(pre_BF > self.threshold, pre_BF, 0))
        signed = self.activation in ("signed_top_k", "abs_top_k")
        value_BF = pre_BF if signed else torch.relu(pre_BF)
        if self.activation == "group_max":  # of k groups of neighbours, the largest of each
            value_BGf = value_BF.unflatten(-1, (self.k, -1))
            top = value_BGf.max(-1, keepdim=True)
            return torch.zeros_like(value_BGf).scatter(-1, top.indices, top.values).flatten(-2)
        score_BF = value_BF.abs() if self.activation == "abs_top_k" else value_BF
        if self.rank is not None:
            score_BF = score_BF * self.rank
        k, shape = self.k, value_BF.shape
        if self.activation == "batch_top_k":
            k, value_BF, score_BF = k * value_BF[..., 0].numel(), value_BF.flatten(), score_BF.flatten()
        top = score_BF.topk(k, dim=-1, sorted=False).indices
        return torch.zeros_like(value_BF).scatter(-1, top, value_BF.gather(-1, top)).view(shape)

    def decode(self, f_BF: Tensor, x_BD: Tensor | None = None) -> Tensor:
        """x_hat_BE; ValueError without the activations that were encoded, where `needs_input`."""
        y_BE = f_BF @ self.W_dec + self.b_dec
        if self.normalize != "none" and self.undo:
            mean_B1, scale_B1 = self._moments(self.like_weights(self._given(x_BD)))
            y_BE = y_BE * scale_B1 + mean_B1
        return self._with_skip(y_BE, x_BD)

    @torch.no_grad()
    def scale_biases(self, scale: float) -> None:
        """As the base.  Where the input is normalised, features do not scale, and the output does by itself."""
        if self.normalize == "none":
            for name in self.biases:
                if getattr(self, name) is not None:
                    getattr(self, name).mul_(scale)
        elif not self.undo:
            self.W_dec.mul_(scale)
            self.b_dec.mul_(scale)

    @classmethod
    @torch.no_grad()
    def folded(
        cls,
        tensors: dict[str, Tensor],
        activation: str = "relu",
        k: int | None = None,
        *,
        normalize: str = "none",
        undo: bool = True,
        subtracts_b_dec: bool = False,
        scale_in: float = 1.0,
        scale_out: float = 1.0,
        decoder_norm: str | None = None,
    ) -> "GeneralSAE":
        """The form of tensors as they lie in a file, which are taken over and changed; ValueError if they do not fit.

        tensors: as in the class, threshold of one entry or F, and more: log_threshold,
        latent_scale (F; features are multiplied by it before they are decoded).
        subtracts_b_dec: b_dec is the pre_bias as well.
        scale_in, scale_out: the file's SAE takes scale_in x and predicts scale_out times its target; the features stay.
        decoder_norm: "unit" where the file's features are those of a unit-norm decoder: pre-activations are multiplied
        by the decoder's norms, features are divided by them; "ranks" where this is done to select features only.
        """
        tensors = dict(tensors)
        gates = {"b_gate", "r_mag"} if activation == "gated" else set()
        needed = {"W_enc", "W_dec", "b_enc", "b_dec", *gates, *(["threshold"] if activation == "jump_relu" else [])}
        if missing := needed - {name.removeprefix("log_") for name in tensors}:
            raise ValueError(f"it lacks {' and '.join(sorted(missing))}")
        W_enc_DF, W_dec_FE = tensors["W_enc"], tensors["W_dec"]
        if W_enc_DF.ndim != 2 or W_dec_FE.ndim != 2:
            raise ValueError(f"its encoder is {_shape(W_enc_DF)} and its decoder {_shape(W_dec_FE)}, not matrices")
        (n_in, dict_size), n_out = W_enc_DF.shape, W_dec_FE.shape[1]
        if "log_threshold" in tensors:
            tensors["threshold"] = tensors.pop("log_threshold").exp()
        if "threshold" in tensors and tensors["threshold"].numel() == 1:
            tensors["threshold"] = tensors["threshold"].reshape(1).expand(dict_size).clone()
        if subtracts_b_dec:
            tensors["pre_bias"] = tensors["b_dec"].clone()
        shapes = {"W_enc": (n_in, dict_size), "W_dec": (dict_size, n_out), "W_skip": (n_in, n_out)}
        shapes |= {"b_dec": (n_out,), "pre_bias": (n_in,)}
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != shapes.get(name, (dict_size,)):
                raise ValueError(
                    f"its {name} is {_shape(tensor)}, which does not fit an encoder of {n_in} x {dict_size} "
                    f"and a decoder of {_shape(W_dec_FE)}"
                )
        if decoder_norm is not None:
            norm_F = W_dec_FE.norm(dim=1)
            if activation == "jump_relu" and decoder_norm == "ranks":
                # a latent without direction has no features: its pre-activation is 0 times its own
                tensors["threshold"] /= torch.where(norm_F > 0, norm_F, 1)
                W_enc_DF *= norm_F > 0
                tensors["b_enc"] *= norm_F > 0
            elif decoder_norm == "ranks":
                tensors["rank"] = norm_F
            else:
                W_enc_DF *= norm_F
                tensors["b_enc"] *= norm_F
                W_dec_FE /= torch.where(norm_F > 0, norm_F, 1)[:, None]
        if "latent_scale" in tensors:
            W_dec_FE *= tensors.pop("latent_scale")[:, None]
        if scale_in != 1:
            W_enc_DF *= scale_in
            if "pre_bias" in tensors:
                tensors["pre_bias"] /= scale_in
            if "W_skip" in tensors:
                tensors["W_skip"] *= scale_in / scale_out
        if scale_out != 1:
            W_dec_FE /= scale_out
            tensors["b_dec"] /= scale_out
        return cls(tensors, activation, k, normalize, undo)

    def simplest(self) -> Dictionary:
        """The class above that computes the same features and outputs with the same tensors, or else itself."""
        subtracts = self.pre_bias is not None and torch.equal(self.pre_bias, self.b_dec)
        if self.normalize != "none" or self.rank is not None or (self.pre_bias is not None and not subtracts):
            return self
        own = self.state_dict()
        is_transcoder = self.output_dim != self.activation_dim or self.W_skip is not None
        if is_transcoder and subtracts:
            return self
        skip = {name: own[name] for name in ("W_skip",) if name in own}
        linears = {"encoder.weight": own["W_enc"].T, "decoder.weight": own["W_dec"].T, **skip}
        if self.activation == "relu":
            bias = "bias" if subtracts else "decoder.bias"
            state = {**linears, "encoder.bias": own["b_enc"], bias: own["b_dec"]}
            return (AutoEncoder if subtracts else AutoEncoderNew).from_state(state, is_transcoder)
        if self.activation == "jump_relu":
            state = {name: own[name] for name in own if name != "pre_bias"}
            sae = JumpReluAutoEncoder.from_state(state, is_transcoder)
            sae.apply_b_dec_to_input = subtracts
            return sae
        if self.activation == "gated" and (subtracts or is_transcoder):
            gates = {"r_mag": own["r_mag"], "gate_bias": own["b_gate"], "mag_bias": own["b_enc"]}
            return GatedAutoEncoder.from_state({**linears, **gates, "decoder_bias": own["b_dec"]}, is_transcoder)
        if self.activation in ("top_k", "batch_top_k") and (subtracts or is_transcoder):
            k = {"k": torch.tensor(self.k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
            state = {**linears, **k, "encoder.bias": own["b_enc"], "b_dec": own["b_dec"]}
            sae_class = AutoEncoderTopK if self.activation == "top_k" else BatchTopKSAE
            return sae_class.from_state(state, is_transcoder)
        return self

    @torch.no_grad()
    def converted(self) -> Dictionary:
        """The class above with the same outputs, its features in units of decoder norms where these rank them, and what
        is subtracted from the input moved into other biases; ValueError if none has them."""
        tensors = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        rank_F = tensors.pop("rank", None)
        if rank_F is not None:
            tensors["W_enc"] *= rank_F
            tensors["b_enc"] *= rank_F
            tensors["W_dec"] /= torch.where(rank_F > 0, rank_F, 1)[:, None]
        shift_D = tensors.pop("pre_bias", torch.zeros(self.activation_dim))
        is_transcoder = self.output_dim != self.activation_dim or self.W_skip is not None
        if self.activation in ("gated", "top_k", "batch_top_k") and not is_transcoder:
            tensors["pre_bias"] = tensors["b_dec"].clone()
            shift_D = shift_D - tensors["b_dec"]
        if shift_D.any():
            shift_F = shift_D @ tensors["W_enc"]
            if self.activation == "gated":
                tensors["b_gate"] -= shift_F
                shift_F = tensors["r_mag"].exp() * shift_F
            tensors["b_enc"] -= shift_F
        sae = type(self)(tensors, self.activation, self.k, self.normalize, self.undo).simplest()
        if isinstance(sae, GeneralSAE):
            traits = [self.activation.replace("_", "-")]
            traits += [f"{self.normalize} of its input"] if self.normalize != "none" else []
            raise ValueError(f"no class of ours computes it ({', '.join(traits)}).")
        return sae


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"


class IdentityDict(Dictionary):
    """Returns what it gets: the ceiling of every metric."""

    biases = ()

    def __init__(self, activation_dim: int = 0):
        super().__init__()
        self.activation_dim = self.dict_size = activation_dim

    def encode(self, x_BD: Tensor) -> Tensor:
        return x_BD

    def decode(self, f_BF: Tensor, x_BD: Tensor | None = None) -> Tensor:
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
