"""sparsify (EleutherAI/sae-*, skip-transcoder-*): `cfg.json` + `sae.safetensors` in a folder named after the module."""

import re
from collections.abc import Collection
from pathlib import PurePosixPath
from typing import Any

from ..dictionary import Dictionary, GeneralSAE
from .place import Place, Said, config_of, place_of_hook

NAME = "sparsify"
FILES = {"cfg.json", "sae.safetensors"}


def targets(names: Collection[str]) -> list[str]:
    return [""] if set(names) >= FILES else []


def read(place: Place) -> tuple[Dictionary, dict[str, Any]]:
    """Its SAEs subtract b_dec, its transcoders do not; the k largest are of relu(pre), unless it is `signed`."""
    file, cfg = place.tensors("sae.safetensors"), place.json("cfg.json")
    tensors = {"W_enc": file.turned("encoder.weight"), "b_enc": file.read("encoder.bias")}
    tensors |= {name: file.read(name) for name in ("W_dec", "b_dec")}
    transcode = bool(cfg.get("transcode", False))
    if "W_skip" in file.names:
        tensors["W_skip"] = file.turned("W_skip")
    activation = {"topk": "top_k", "groupmax": "group_max"}.get(str(cfg.get("activation", "topk")))
    if activation is None:
        raise ValueError(f"{place.name} has the activation {cfg['activation']!r}; topk and groupmax can be loaded.")
    if activation == "top_k" and cfg.get("signed"):
        activation = "abs_top_k"
    ae = GeneralSAE.folded(tensors, activation, cfg.get("k"), subtracts_b_dec=not transcode).simplest()
    hook = PurePosixPath(place.name).name
    layer, site = place_of_hook(hook) if re.search(r"\d", hook) else (None, "embed" if hook == "embed_tokens" else hook)
    run = place.json_above("config.json")  # of all the modules it trained on
    said = Said(
        lm_name=run.get("model"),
        lm_revision=run.get("revision"),
        layer=layer,
        site=site,
        submodule_name=hook,
        ctx_len=run.get("ctx_len"),
        trainer={"transcode": transcode},
    )
    if transcode:  # from the module's input to its output
        said.site, said.site_out = "resid_pre" if site == "resid_post" else place_of_hook(f"{hook}.input")[1], site
    return ae, config_of(place, NAME, ae, said)
