"""Sparse autoencoders on language models: text -> tokens -> activations -> batches -> SAE -> numbers -> plot."""

from .buffer import ActivationBuffer
from .dictionary import (
    AutoEncoder,
    AutoEncoderNew,
    AutoEncoderTopK,
    BatchTopKSAE,
    Dictionary,
    GatedAutoEncoder,
    IdentityDict,
    JumpReluAutoEncoder,
    MatryoshkaBatchTopKSAE,
)
from .evaluation import evaluate, evaluate_saes
from .formats import load_dictionary
from .model import load_model
from .training import trainSAE

__all__ = [
    "ActivationBuffer",
    "AutoEncoder",
    "AutoEncoderNew",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "Dictionary",
    "GatedAutoEncoder",
    "IdentityDict",
    "JumpReluAutoEncoder",
    "MatryoshkaBatchTopKSAE",
    "evaluate",
    "evaluate_saes",
    "load_dictionary",
    "load_model",
    "trainSAE",
]
