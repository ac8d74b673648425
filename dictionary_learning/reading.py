"""Which language model reads which text: all that an evaluation depends on beside the SAE, and how both are opened."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .data import Source, open_batches, overlap
from .model import LanguageModel, generation_eos_ids, load_model, model_identity, text_marks
from .sweep import EVALUATION_SETTINGS, Options, Sweep
from .world import World


@dataclass
class Reading:
    """A model and its text, on a device; the base of a run's plan."""

    options: Options
    sweep: Sweep
    device: str
    world: World

    def source(self, evaluation: bool) -> Source:
        """The text without its chats."""
        sweep = self.sweep
        if evaluation:
            return Source(sweep.eval_dataset, sweep.eval_split, sweep.eval_subset, sweep.eval_text_column)
        return Source(sweep.dataset, sweep.split, sweep.subset, sweep.text_column)

    @cached_property
    def held_out(self) -> bool:
        """Whether training and evaluation share text, so that a held-out part of it is for evaluation alone.

        Of chats that is always so: both take them from one dataset.
        """
        return overlap(self.source(evaluation=False), self.source(evaluation=True))

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
        """Batches of contexts, for training or for evaluation, which is drawn from all of its text."""
        sweep, source = self.sweep, self.source(evaluation)
        marks = text_marks(tokenizer, generation_eos_ids(self.options.model_name, self.options.revision))
        eval_batch_size = sweep.eval_batch_size or max(sweep.llm_batch_size // 4, 1)
        return open_batches(
            source.dataset,
            tokenizer,
            context_length=sweep.context_length,
            batch_size=eval_batch_size if evaluation else sweep.llm_batch_size,
            text_column=source.text_column,
            split=source.split,
            subset=source.subset,
            held_out=evaluation if self.held_out else None,
            epochs=1 if evaluation else sweep.epochs,
            mixed=sweep.mixed_dataset,
            chat_dataset=sweep.chat_dataset,
            chat_split=sweep.chat_split,
            chat_subset=sweep.chat_subset,
            chat_held_out=evaluation,
            chat_fraction=sweep.chat_fraction,
            chat_pack=sweep.pack_chats,
            marks=marks,
            prepend_bos=sweep.prepend_bos,
            exclude_special_tokens=sweep.exclude_special_tokens,
            shuffle=evaluation or sweep.shuffle,
            skip_damaged=sweep.skip_damaged,
            seed=sweep.random_seeds[0],
            shard=shard,
        )
