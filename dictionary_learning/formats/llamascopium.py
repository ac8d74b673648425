"""Llamascopium (OpenMOSS-Team/Llama-Scope-2-*): `config.json` with a `sae_type`, and `sae_weights.safetensors`."""

from collections.abc import Collection
from typing import Any

import torch

from ..dictionary import Dictionary, GeneralSAE
from .llama_scope import norm_at, scale
from .llama_scope_r1 import FILES
from .place import Place, Said, config_of, place_of_hook

NAME = "Llamascopium"
ACTIVATIONS = {"relu": "relu", "jumprelu": "jump_relu", "topk": "top_k", "batchtopk": "batch_top_k"}
NORM = "dataset_average_activation_norm"
NO_WEIGHTS = (NORM,)  # of a hook that is not scaled


def targets(names: Collection[str]) -> list[str]:
    return [""] if set(names) >= FILES and "cfg.json" not in names else []


def is_own(place: Place) -> bool:
    return "sae_type" in place.json("config.json")


def read(place: Place) -> tuple[Dictionary, dict[str, Any]]:
    """What is kept is chosen by pre-activations times decoder norms, unless its config says otherwise."""
    cfg = place.json("config.json")
    if cfg["sae_type"] not in ("sae", "transcoder"):
        raise ValueError(f"{place.name} is a {cfg['sae_type']} of {NAME}, which cannot be loaded.")
    activation = ACTIVATIONS.get(str(cfg.get("act_fn", "relu")))
    if activation is None:
        raise ValueError(f"{place.name} has act_fn {cfg['act_fn']!r}; {', '.join(ACTIVATIONS)} can be loaded.")
    if cfg.get("use_glu_encoder"):
        raise ValueError(f"{place.name} has a gated linear encoder (use_glu_encoder), which cannot be loaded.")
    file = place.tensors("sae_weights.safetensors")
    ours = {"W_E": "W_enc", "W_D": "W_dec", "b_E": "b_enc", "b_D": "b_dec"}
    ours["activation_function.log_jumprelu_threshold"] = "log_threshold"
    tensors = {ours[name]: file.read(name) for name in ours if name in file.names}
    if not cfg.get("use_decoder_bias", True):
        tensors.setdefault("b_dec", torch.zeros(tensors["W_dec"].shape[-1]))
    hook_in = str(cfg.get("hook_point_in"))
    hook_out = str(cfg.get("hook_point_out") or hook_in)
    way, scales = str(cfg.get("norm_activation", "none")), {"in": 1.0, "out": 1.0}
    if way == "dataset-wise":
        for end, hook, width in (("in", hook_in, len(tensors["W_enc"])), ("out", hook_out, tensors["W_dec"].shape[1])):
            name = f"{NORM}.{hook}"
            norm = float(file.read(name)) if name in file.names else norm_at(cfg.get(NORM), end, hook)
            scales[end] = scale(norm, width, place)
    elif way not in ("token-wise", "none", "inference") or (way == "token-wise" and hook_in != hook_out):
        what = "the transcoder's target" if way == "token-wise" else "the batch"
        raise ValueError(f"{place.name} has norm_activation {way!r}, which depends on {what} and cannot be loaded.")
    ae = GeneralSAE.folded(
        tensors,
        activation,
        cfg.get("top_k") if "top_k" in activation else None,
        normalize="constant_norm" if way == "token-wise" else "none",
        decoder_norm="ranks" if cfg.get("sparsity_include_decoder_norm", True) and activation != "relu" else None,
        scale_in=scales["in"],
        scale_out=scales["out"],
    ).simplest()
    layer, site = place_of_hook(hook_in)
    site_out = place_of_hook(hook_out)[1]
    said = Said(layer=layer, site=site, site_out=site_out if site_out != site else None, submodule_name=hook_in)
    return ae, config_of(place, NAME, ae, said)
