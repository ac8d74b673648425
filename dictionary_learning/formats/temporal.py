"""Temporal SAEs (canrager/temporalSAEs): they need whole sequences, so they are known by name and refused."""

from collections.abc import Collection
from typing import NoReturn

from .place import Place

NAME = "temporal SAEs"


def targets(names: Collection[str]) -> list[str]:
    return [""] if set(names) >= {"conf.yaml", "latest_ckpt.safetensors"} else []


def read(place: Place) -> NoReturn:
    raise ValueError(f"{place.name} is a temporal SAE, which reads whole sequences and cannot be loaded.")
