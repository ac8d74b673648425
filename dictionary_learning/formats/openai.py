"""OpenAI's SAEs of GPT-2 small: a state dict with a `pre_bias`, in a .pt file."""

from collections.abc import Collection
from typing import Any

from ..dictionary import Dictionary, GeneralSAE
from .place import Place, Said, config_of

NAME = "OpenAI"
TENSORS = {"pre_bias", "latent_bias", "encoder.weight", "decoder.weight"}
NO_WEIGHTS = ("stats_last_nonzero", "activation_state_dict")
SITES = {
    "resid_post_mlp": "resid_post",
    "resid_post_attn": "resid_mid",
    "resid_delta_attn": "attn_out",
    "resid_delta_mlp": "mlp_out",
}


def targets(names: Collection[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(".pt") and "/" not in name)


def is_own(place: Place) -> bool:
    return place.tensors(place.target).names >= TENSORS


def read(place: Place) -> tuple[Dictionary, dict[str, Any]]:
    """TopK sees each token normalised by its mean and deviation; its pre_bias is subtracted, and added at the end."""
    file = place.tensors(place.target)
    tensors = {"W_enc": file.turned("encoder.weight"), "W_dec": file.turned("decoder.weight")}
    tensors |= {"b_enc": file.read("latent_bias"), "b_dec": file.read("pre_bias")}
    top_k = file.values.get("activation") == "TopK"
    k = file.values.get("activation_state_dict.k", 32) if top_k else None
    k = int(k) if isinstance(k, int) else k
    if "activation_state_dict.k" in file.names:
        k = int(file.read("activation_state_dict.k"))
    ae = GeneralSAE.folded(
        tensors,
        "top_k" if top_k else "relu",
        k,
        normalize="layer_norm" if top_k else "none",
        subtracts_b_dec=True,
    ).simplest()
    found = place.search(r"(resid_post_mlp|resid_post_attn|resid_delta_attn|resid_delta_mlp)")
    layer = place.number(r"layer_?(\d+)")
    said = Said("openai-community/gpt2", layer=layer, site=SITES[found[1]] if found else "resid_post", ctx_len=64)
    return ae, config_of(place, NAME, ae, said)
