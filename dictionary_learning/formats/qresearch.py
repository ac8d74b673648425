"""qresearch (DeepSeek-R1-Distill-Llama-8B-SAE-l19): one file at the root, with no config."""

from collections.abc import Collection
from typing import Any

from ..dictionary import Dictionary
from . import goodfire
from .place import Place

NAME = "qresearch"
TENSORS = {"encoder.weight", "decoder.weight"}


def targets(names: Collection[str]) -> list[str]:
    return goodfire.targets(names)


def is_own(place: Place) -> bool:
    return place.tensors(place.target).names >= TENSORS


def read(place: Place) -> tuple[Dictionary, dict[str, Any]]:
    return goodfire.read_relu(place, NAME, ("encoder", "decoder"), "deepseek-ai", {})
