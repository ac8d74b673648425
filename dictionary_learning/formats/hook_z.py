"""SAEs of GPT-2's attention heads (ckkissane's): `NAME.pt` + `NAME_cfg.json`."""

from collections.abc import Collection
from typing import Any

from ..dictionary import Dictionary, GeneralSAE
from .place import Place, Said, config_of, place_of_hook

NAME = "hook_z"


def targets(names: Collection[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(".pt") and f"{name.removesuffix('.pt')}_cfg.json" in names)


def read(place: Place) -> tuple[Dictionary, dict[str, Any]]:
    file, cfg = place.tensors(place.target), place.json(f"{place.target.removesuffix('.pt')}_cfg.json")
    tensors = {name: file.read(name) for name in ("W_enc", "W_dec", "b_enc", "b_dec") if name in file.names}
    ae = GeneralSAE.folded(tensors, subtracts_b_dec=True).simplest()
    hook = str(cfg.get("act_name"))
    layer, site = place_of_hook(hook)
    said = Said("openai-community/gpt2", layer=layer, site=site, submodule_name=hook, ctx_len=128, prepend_bos=True)
    return ae, config_of(place, NAME, ae, said)
