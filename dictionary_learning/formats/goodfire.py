"""Goodfire (Goodfire/Llama-*-SAE-l*): one file at the root, with no config; all else is in its name."""

import re
from collections.abc import Collection
from typing import Any

from ..dictionary import Dictionary, GeneralSAE
from .place import Place, Said, config_of

NAME = "Goodfire"
TENSORS = {"encoder_linear.weight", "decoder_linear.weight"}
L0 = {"Llama-3.3-70B-Instruct": 121, "Llama-3.1-8B-Instruct": 91}


def targets(names: Collection[str]) -> list[str]:
    return sorted(name for name in names if re.fullmatch(r"[^/]+-SAE-l\d+\.pth?", name))


def is_own(place: Place) -> bool:
    return place.tensors(place.target).names >= TENSORS


def read(place: Place) -> tuple[Dictionary, dict[str, Any]]:
    return read_relu(place, NAME, ("encoder_linear", "decoder_linear"), "meta-llama", L0)


def read_relu(
    place: Place, family: str, linears: tuple[str, str], owner: str, l0: dict[str, int]
) -> tuple[Dictionary, dict[str, Any]]:
    """A ReLU SAE of two `nn.Linear`s, of a model and a layer that the file's name tells."""
    file, tensors = place.tensors(place.target), {}
    for end, linear in zip(("enc", "dec"), linears, strict=True):
        tensors[f"W_{end}"] = file.turned(f"{linear}.weight")
        if f"{linear}.bias" in file.names:
            tensors[f"b_{end}"] = file.read(f"{linear}.bias")
    ae = GeneralSAE.folded(tensors).simplest()
    found = re.fullmatch(r"(.+)-SAE-l(\d+)\.pth?", place.target)
    model, layer = found.groups() if found else ("", None)
    said = Said(lm_name=f"{owner}/{model}" if model else None, layer=int(layer) if layer else None, l0=l0.get(model))
    return ae, config_of(place, family, ae, said)
