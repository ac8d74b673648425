"""One file a paper: how each kind of SAE is trained."""

from .batch_top_k import BatchTopKTrainer
from .gdm import GatedSAETrainer
from .jumprelu import JumpReluTrainer
from .matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from .p_anneal import PAnnealTrainer
from .standard import StandardTrainer, StandardTrainerAprilUpdate
from .top_k import TopKTrainer
from .trainer import LossOutput, SAETrainer, TrainerConfig

__all__ = [
    "BatchTopKTrainer",
    "GatedSAETrainer",
    "JumpReluTrainer",
    "LossOutput",
    "MatryoshkaBatchTopKTrainer",
    "PAnnealTrainer",
    "SAETrainer",
    "StandardTrainer",
    "StandardTrainerAprilUpdate",
    "TopKTrainer",
    "TrainerConfig",
]
