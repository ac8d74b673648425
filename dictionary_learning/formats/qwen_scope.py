"""Qwen-Scope (Qwen/SAE-Res-*): a file `layer{n}.sae.pt` for each layer at the root, with one `config.json`."""

import re
from collections.abc import Collection
from typing import Any

from ..dictionary import Dictionary, GeneralSAE
from .place import Place, Said, config_of

NAME = "Qwen-Scope"


def targets(names: Collection[str]) -> list[str]:
    return sorted(name for name in names if re.fullmatch(r"layer\d+\.sae\.pt", name))


def read(place: Place) -> tuple[Dictionary, dict[str, Any]]:
    file, cfg = place.tensors(place.target), place.json_if_there("config.json")
    tensors = {name: file.read(name) for name in ("b_enc", "b_dec") if name in file.names}
    tensors |= {name: file.turned(name) for name in ("W_enc", "W_dec") if name in file.names}
    k = cfg.get("k", place.number(r"-L0_(\d+)"))
    ae = GeneralSAE.folded(tensors, "top_k", k).simplest()
    model = place.search(r"SAE-Res-(.+?)-W\d+K")
    said = Said(
        lm_name=cfg.get("base_model") or (f"Qwen/{model[1]}" if model else None),
        layer=int(re.findall(r"\d+", place.target)[0]),
        l0=k,
    )
    return ae, config_of(place, NAME, ae, said)
