"""Gemma Scope 2 (google/gemma-scope-2-*): `params.safetensors`, mostly with `config.json`; SAEs and transcoders."""

import re
from collections.abc import Collection
from typing import Any

from ..dictionary import Dictionary, GeneralSAE
from .place import Place, Said, config_of, place_of_hook

NAME = "Gemma Scope 2"
# of the folder's name, where there is no config
FOLDERS = {
    "resid_post": ("resid_post", None),
    "mlp_out": ("mlp_out", None),
    "attn_out": ("attn_z", None),
    "transcoder": ("mlp_in", "mlp_out"),
}


def targets(names: Collection[str]) -> list[str]:
    return [""] if "params.safetensors" in names or "params_layer_0.safetensors" in names else []


def read(place: Place) -> tuple[Dictionary, dict[str, Any]]:
    if "params.safetensors" not in place.names:
        raise ValueError(f"{place.name} is a crosscoder or cross-layer transcoder of {NAME}, which cannot be loaded.")
    file, cfg = place.tensors("params.safetensors"), place.json_if_there("config.json")
    ours = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
    ours["affine_skip_connection"] = "W_skip"
    tensors = {ours[name]: file.read(name) for name in file.names if name in ours}
    ae = GeneralSAE.folded(tensors, "jump_relu").simplest()
    folder = place.search(r"(resid_post|mlp_out|attn_out|transcoder)")
    site, site_out = FOLDERS[folder[1]] if folder else ("resid_post", None)
    layer = place.number(r"layer_(\d+)")
    hook = cfg.get("hf_hook_point_in")
    if isinstance(hook, str):
        layer, site = place_of_hook(hook)
        out = place_of_hook(str(cfg.get("hf_hook_point_out") or hook))[1]
        site_out = out if out != site else None
    said = Said(
        lm_name=_model(place, cfg),
        layer=layer,
        site=site,
        site_out=site_out,
        submodule_name=hook,
        ctx_len=1024,
        prepend_bos=True,
        l0=cfg.get("l0"),
    )
    return ae, config_of(place, NAME, ae, said)


def _model(place: Place, cfg: dict[str, Any]) -> str | None:
    """Their configs say gemma-v3-4b-pt where the Hub says google/gemma-3-4b-pt; the smallest is there without -pt."""
    name = cfg.get("model_name")
    if not isinstance(name, str):
        repo = place.search(r"gemma-scope-2-(\w+-(?:pt|it))")
        name = f"gemma-3-{repo[1]}" if repo else None
    if name is None:
        return None
    return "google/" + re.sub(r"-v3\b", "-3", name.removeprefix("google/")).replace("-270m-pt", "-270m")
