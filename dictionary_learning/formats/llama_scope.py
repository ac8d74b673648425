"""Llama Scope (fnlp/Llama3_1-8B-Base-LX*): `hyperparams.json` + `checkpoints/final.safetensors`."""

import math
from collections.abc import Collection
from typing import Any

from ..dictionary import Dictionary, GeneralSAE
from ..files import TensorFile
from .place import Place, Said, config_of, place_of_hook

NAME = "Llama Scope"
FILES = {"hyperparams.json", "checkpoints/final.safetensors"}
SITES = {"R": "resid_post", "A": "attn_out", "M": "mlp_out"}
LINEARS = {
    "W_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "W_dec": "decoder.weight",
    "b_dec": "decoder.bias",
}


def targets(names: Collection[str]) -> list[str]:
    return [""] if set(names) >= FILES else []


def linears(file: TensorFile) -> dict[str, Any]:
    """The four tensors of two `nn.Linear`s."""
    there = {ours: theirs for ours, theirs in LINEARS.items() if theirs in file.names}
    return {ours: (file.turned if ours.startswith("W") else file.read)(theirs) for ours, theirs in there.items()}


def norm_at(norms: Any, end: str, hook: Any) -> Any:
    """The average norm of activations that a config states for its "in" or "out" or by the hook's name; or None."""
    return norms.get(end, norms.get(str(hook))) if isinstance(norms, dict) else norms


def scale(norm: Any, width: int, place: Place) -> float:
    """What activations of this average norm are multiplied by: to sqrt(width)."""
    if not isinstance(norm, int | float) or not 0 < norm < math.inf:
        raise ValueError(f"{place.name} does not say the average norm of its activations, by which they are scaled.")
    return math.sqrt(width) / norm


def places_of(cfg: dict[str, Any], layer: int | None, site: str) -> tuple[int | None, str, str | None]:
    """(layer, site, site_out) by the config's hooks, or these where it names none; site_out of a transcoder only."""
    hook_in, hook_out = cfg.get("hook_point_in"), cfg.get("hook_point_out")
    if isinstance(hook_in, str):
        layer, site = place_of_hook(hook_in)
    site_out = place_of_hook(hook_out)[1] if isinstance(hook_out, str) else site
    return layer, site, site_out if site_out != site else None


def read(place: Place) -> tuple[Dictionary, dict[str, Any]]:
    """Its threshold is that of features of raw activations: of those of scaled ones it is as many times larger."""
    cfg = place.json("hyperparams.json")
    tensors = linears(place.tensors("checkpoints/final.safetensors"))
    norms = cfg.get("dataset_average_activation_norm") or {}
    s_in = scale(norms.get("in"), len(tensors["W_enc"]), place)
    s_out = scale(norms.get("out", norms.get("in")), tensors["W_dec"].shape[1], place)
    threshold = cfg.get("jump_relu_threshold")
    if not isinstance(threshold, int | float):
        raise ValueError(f"{place.name} does not say its jump_relu_threshold.")
    tensors["threshold"] = tensors["b_enc"].new_tensor(threshold * s_in)
    ae = GeneralSAE.folded(tensors, "jump_relu", scale_in=s_in, scale_out=s_out).simplest()
    found, hook = place.search(r"-L(\d+)([RAM])-"), cfg.get("hook_point_in")
    layer, site = (int(found[1]), SITES[found[2]]) if found else (None, "resid_post")
    layer, site, site_out = places_of(cfg, layer, site)
    said = Said(
        lm_name="meta-llama/Llama-3.1-8B",
        layer=layer,
        site=site,
        site_out=site_out,
        submodule_name=hook if isinstance(hook, str) else None,
        ctx_len=1024,
        prepend_bos=True,
    )
    return ae, config_of(place, NAME, ae, said)
