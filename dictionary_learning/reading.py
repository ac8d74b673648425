"""Which language model reads which text: all that an evaluation depends on beside the SAE, and how both are opened."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .data import Source, open_batches, overlap
from .files import read_json
from .model import LanguageModel, generation_eos_ids, load_model, model_identity, text_marks
from .sweep import EVALUATION_SETTINGS, Options, Sweep, check_recorded
from .world import World


def evaluation_text(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `data.open_batches` for the text on which a run is evaluated; tokenizer and batches aside.

    settings: of its run.json. Evaluation text is drawn from all of the text. Where the settings of an older run say
    nothing of a split or a column for evaluation, they are those of training; the subset too, if the text is the
    held-out part of the training set. What they lack altogether is left to `open_batches`.
    """
    held_out = settings["eval_is_held_out"]
    before = {"split": "split", "text_column": "text_column"} | ({"subset": "subset"} if held_out else {})
    names = {argument: f"eval_{argument}" for argument in ("dataset", "split", "subset", "text_column")}
    names = {argument: name if name in settings else before.get(argument, "") for argument, name in names.items()}
    names |= {"mixed": "mixed_dataset", "chat_pack": "pack_chats"}
    same = "context_length prepend_bos exclude_special_tokens skip_damaged".split()
    names |= {name: name for name in [*same, "chat_dataset", "chat_split", "chat_subset", "chat_fraction"]}
    given = {argument: settings[name] for argument, name in names.items() if name in settings}
    fixed = {"held_out": held_out or None, "chat_held_out": True, "shuffle": True}
    return given | fixed | {"seed": settings.get("random_seeds", [0])[0]}


def run_record(sae: Path) -> Path | None:
    """The run.json of an SAE's run, which lies in the folder of its layer's folder; None where there is none.

    sae: its folder, or the file of one of its checkpoints.
    """
    folder = sae.absolute() if sae.is_dir() else sae.absolute().parents[1]
    places = [path / "run.json" for path in (folder, *folder.parents[:2])]
    return next((place for place in places if place.is_file()), None)


def recorded_settings(record: Path) -> dict[str, Any]:
    """The settings in a run.json, under "earlier" those with which a resumed run began, and where it "ended_early".

    Raises ValueError where it has none, or what no settings can be.
    """
    content = read_json(record)
    settings, changes, ended = content.get("settings"), content.get("changes", []), content.get("ended_early")
    damage = ValueError(f"{record} does not tell of a run what it should; restore it from a copy.")
    if not isinstance(settings, dict) or not {"model_name", "eval_dataset"} <= settings.keys():
        raise damage
    try:
        _ = ended is None or int(ended["tokens"])
        before = [{name: was for name, (was, _) in changed.items()} for changed in changes]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damage from error
    check_recorded(settings, str(record))
    earlier = list(itertools.accumulate(reversed(before), lambda now, was: now | was, initial=settings))[1:]
    return settings | {"earlier": earlier, "ended_early": ended}


def source_of(settings: Mapping[str, Any], evaluation: bool) -> Source:
    """The text without its chats."""
    split, column = settings.get("split", "train"), settings.get("text_column", "text")
    if not evaluation:
        return Source(settings["dataset"], split, settings.get("subset"), column)
    split, column = settings.get("eval_split") or split, settings.get("eval_text_column") or column
    return Source(settings["eval_dataset"], split, settings.get("eval_subset"), column)


@dataclass
class Reading:
    """A model and its text, on a device; the base of a run's plan."""

    options: Options
    sweep: Sweep
    device: str
    world: World
    recorded: Mapping[str, Any] = field(default_factory=dict, kw_only=True)  # what is recorded of the run, if any

    def source(self, evaluation: bool) -> Source:
        return source_of(vars(self.sweep), evaluation)

    @cached_property
    def held_out(self) -> bool:
        """Whether training and evaluation share text, so that a held-out part of it is for evaluation alone.

        Of chats that is always so: both take them from one dataset. A run has been trained on every text that it was
        resumed with; what its run.json says of its evaluation text holds, and must do where its text is gone.
        """
        evaluation, now = self.source(evaluation=True), self.source(evaluation=False)
        if "dataset" not in self.recorded:
            return overlap(now, evaluation)
        trained_on = {source_of(settings, False) for settings in (self.recorded, *self.recorded.get("earlier", []))}
        if evaluation == source_of(self.recorded, True) and (said := self.recorded.get("eval_is_held_out")):
            return said
        there = {source for source in {now, *trained_on} if source.is_there}
        if any(overlap(source, evaluation) for source in there):
            return True
        if now not in there and evaluation != source_of(self.recorded, True):
            raise ValueError(
                f"{now.dataset}, which was trained on, is not here, so nobody knows whether {evaluation.dataset} "
                "shares documents with it: say where it is with --dataset."
            )
        return False

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
            device=self.options.llm_device or self.device,
            dtype=getattr(torch, self.sweep.dtype),
            last_layer=last_layer,
            attn_implementation=self.sweep.attn_implementation,
            revision=self.options.revision,
            trust_remote_code=self.options.trust_remote_code,
            quantization=self.sweep.quantization,
            device_map=self.options.device_map,
        )

    def open_text(self, tokenizer: Any, *, evaluation: bool, shard: tuple[int, int] = (0, 1)) -> Any:
        """Batches of contexts, for training or for evaluation, which is drawn from all of its text."""
        sweep = self.sweep
        if evaluation:
            text = evaluation_text(vars(sweep) | {"eval_is_held_out": self.held_out})
            batch_size = sweep.eval_batch_size or max(sweep.llm_batch_size // 4, 1)
        else:
            same = "dataset split subset text_column context_length prepend_bos exclude_special_tokens skip_damaged"
            same += " epochs shuffle chat_dataset chat_split chat_subset chat_fraction"
            text = {name: getattr(sweep, name) for name in same.split()}
            text |= {
                "held_out": False if self.held_out else None,
                "chat_held_out": False,
                "seed": sweep.random_seeds[0],
            }
            text |= {"mixed": sweep.mixed_dataset, "chat_pack": sweep.pack_chats}
            batch_size = sweep.llm_batch_size
        marks = text_marks(tokenizer, generation_eos_ids(self.options.model_name, self.options.revision))
        return open_batches(tokenizer=tokenizer, batch_size=batch_size, marks=marks, shard=shard, **text)
