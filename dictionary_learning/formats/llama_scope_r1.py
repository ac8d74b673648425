"""Llama Scope R1 (fnlp/Llama-Scope-R1-Distill): `config.json` + `sae_weights.safetensors` of two linears."""

import warnings
from collections.abc import Collection
from typing import Any

from ..dictionary import Dictionary, GeneralSAE
from .llama_scope import linears, norm_at, places_of, scale
from .place import Place, Said, config_of

NAME = "Llama Scope R1"
FILES = {"config.json", "sae_weights.safetensors"}


def targets(names: Collection[str]) -> list[str]:
    return [""] if set(names) >= FILES and "cfg.json" not in names else []


def is_own(place: Place) -> bool:
    return "sae_type" not in place.json("config.json")


def read(place: Place) -> tuple[Dictionary, dict[str, Any]]:
    file, cfg = place.tensors("sae_weights.safetensors"), place.json("config.json")
    tensors = linears(file)
    if "log_jumprelu_threshold" not in file.names:
        raise ValueError(f"{place.name} has no log_jumprelu_threshold, so it is no SAE of {NAME}.")
    tensors["log_threshold"] = file.read("log_jumprelu_threshold")
    norms, hook = cfg.get("dataset_average_activation_norm"), cfg.get("hook_point_in")
    norm_in, norm_out = norm_at(norms, "in", hook), norm_at(norms, "out", cfg.get("hook_point_out", hook))
    if norm_in is None and cfg.get("norm_activation") != "inference":
        warnings.warn(
            f"{place.name} does not say the average norm of its activations (dataset_average_activation_norm in its "
            "config.json), so they are taken as they are.",
            stacklevel=4,
        )
    s_in = 1.0 if norm_in is None else scale(norm_in, len(tensors["W_enc"]), place)
    s_out = s_in if norm_out is None else scale(norm_out, tensors["W_dec"].shape[1], place)
    ranks = "ranks" if cfg.get("sparsity_include_decoder_norm") else None
    ae = GeneralSAE.folded(tensors, "jump_relu", scale_in=s_in, scale_out=s_out, decoder_norm=ranks).simplest()
    layer, site, site_out = places_of(cfg, place.number(r"L(\d+)R"), "resid_post")
    said = Said(
        lm_name="deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        layer=layer,
        site=site,
        site_out=site_out,
        submodule_name=hook if isinstance(hook, str) else None,
        ctx_len=1024,
        prepend_bos=True,
    )
    return ae, config_of(place, NAME, ae, said)
