"""Sparse autoencoders on language models: text -> tokens -> activations -> batches -> SAE -> numbers -> plot."""

from importlib import import_module
from typing import Any

_HOME = {  # where each name of the package lives; read when it is asked for, since torch takes seconds to import
    "ActivationBuffer": "buffer",
    "AutoEncoder": "dictionary",
    "AutoEncoderNew": "dictionary",
    "AutoEncoderTopK": "dictionary",
    "BatchTopKSAE": "dictionary",
    "Dictionary": "dictionary",
    "GatedAutoEncoder": "dictionary",
    "IdentityDict": "dictionary",
    "JumpReluAutoEncoder": "dictionary",
    "MatryoshkaBatchTopKSAE": "dictionary",
    "evaluate": "evaluation",
    "evaluate_saes": "evaluation",
    "load_dictionary": "formats",
    "load_model": "model",
    "trainSAE": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
