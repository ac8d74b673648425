"""Which language model reads which text: all that an evaluation depends on beside the SAE, and how both are opened."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .data import open_batches
from .model import LanguageModel, load_model, model_identity
from .sweep import EVALUATION_SETTINGS, Options, Sweep
from .world import World


@dataclass
class Reading:
    """A model and its text, on a device; the base of a run's plan."""

    options: Options
    sweep: Sweep
    device: str
    world: World

    @property
    def held_out(self) -> bool:
        """Whether evaluation text is the held-out part of the training set."""
        return self.sweep.eval_dataset == self.sweep.dataset

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What tells the language model from others (`model.model_identity`)."""
        return model_identity(self.options.model_name, self.options.revision)

    def evaluation_settings(self) -> dict[str, Any]:
        """What the numbers of an evaluation depend on beside the SAE, as plain JSON values."""
        everything = vars(self.options) | vars(self.sweep)
        return {name: everything[name] for name in EVALUATION_SETTINGS}

    def open_model(self, last_layer: int | None = None) -> LanguageModel:
        """The language model, up to a layer or whole."""
        return load_model(
            self.options.model_name,
            device=self.device,
            dtype=getattr(torch, self.sweep.dtype),
            last_layer=last_layer,
            attn_implementation=self.sweep.attn_implementation,
            revision=self.options.revision,
            trust_remote_code=self.options.trust_remote_code,
        )

    def open_text(self, tokenizer: Any, *, evaluation: bool, shard: tuple[int, int] = (0, 1)) -> Any:
        """Batches of contexts, for training or for evaluation."""
        sweep = self.sweep
        eval_batch_size = sweep.eval_batch_size or max(sweep.llm_batch_size // 4, 1)
        return open_batches(
            sweep.eval_dataset if evaluation else sweep.dataset,
            tokenizer,
            context_length=sweep.context_length,
            batch_size=eval_batch_size if evaluation else sweep.llm_batch_size,
            text_column=sweep.text_column,
            split=sweep.split,
            subset=sweep.eval_subset if evaluation else sweep.subset,
            held_out=evaluation if self.held_out else None,
            epochs=1 if evaluation else sweep.epochs,
            mixed=sweep.mixed_dataset,
            chat_dataset=sweep.chat_dataset,
            chat_fraction=sweep.chat_fraction,
            chat_pack=sweep.pack_chats,
            seed=sweep.random_seeds[0],
            shard=shard,
        )
