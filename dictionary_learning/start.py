"""Where the SAEs of a grid start: from trained ones, in place of random weights."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .dictionary import Dictionary, GeneralSAE, JumpReluAutoEncoder
from .formats import find_saes, load_dictionary
from .pretrained import same_model
from .sites import route_of, words_of

# What tells the SAEs of one layer, width and architecture from each other, in the order in which it is asked.
APART = ("trainer_class", "k", "target_l0", "l1_penalty", "initial_sparsity_penalty", "lr", "seed")


def find_starts(
    name: str, configs: Sequence[Mapping[str, Any]], identity: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """What each SAE of a grid starts from: the SAE of this name, or, of those in a run folder, the one that matches it.
    And a sentence for each that is of another place or language model than what it starts.

    name: as `load_dictionary` takes it, or a folder of several SAEs. configs: the keywords of the trainers, and
    `trainer`, the class. identity: of the language model (`pretrained.model_identity`). ValueError where an SAE of the
    grid has none that fits, or several that fit as well.
    """
    saes = [str(path) for path in find_saes(name)] if Path(name).is_dir() else []
    if len(saes) < 2:
        ae, config = _load(saes[0] if saes else name)
        for one in configs:
            if (mismatch := _mismatch(ae, config["trainer"], one)) is not None:
                raise ValueError(f"--init_from {name} {mismatch}.")
        path = saes[0] if saes else name
        return [path] * len(configs), _of_elsewhere(path, config["trainer"], configs, identity)
    known = [(path, *_facts(path)) for path in saes]
    starts = [_match(name, known, one) for one in configs]
    trainers = {path: trainer for path, _, trainer in known if path in starts}
    return starts, [note for path in trainers for note in _of_elsewhere(path, trainers[path], [], identity)]


def _of_elsewhere(
    path: str, trainer: Mapping[str, Any], configs: Sequence[Mapping[str, Any]], identity: Mapping[str, Any]
) -> list[str]:
    """What to say of an SAE that starts these of a grid and is of another place or language model."""
    notes, lm_name, theirs = [], trainer.get("lm_name"), trainer.get("lm_identity")
    with suppress(ValueError):  # it says no place
        own = route_of(trainer)
        if others := list(dict.fromkeys(words_of(*route) for route in map(route_of, configs) if route != own)):
            notes.append(f"{path} is of {words_of(*own)}, and starts what is trained on {', '.join(others)}")
    if lm_name and not (same_model(theirs, identity) if theirs else lm_name == identity.get("id")):
        notes.append(f"{path} is of {lm_name}, which is not known to be the language model of this run")
    return notes


def load_start(path: str) -> Dictionary:
    """The SAE on the CPU; it takes raw activations."""
    ae = _load(path)[0]
    return ae.without_input_bias() if isinstance(ae, JumpReluAutoEncoder) else ae


def _load(path: str) -> tuple[Dictionary, dict[str, Any]]:
    """As one of the classes that are trained, if one of them computes it."""
    ae, config = load_dictionary(path)
    with suppress(ValueError):
        ae = ae.converted() if isinstance(ae, GeneralSAE) else ae
    return ae, config


def _facts(path: str) -> tuple[Dictionary, dict[str, Any]]:
    ae, config = _load(path)
    return ae.to("meta"), config["trainer"]  # its shapes are enough


def _match(name: str, known: Sequence[tuple[str, Dictionary, dict[str, Any]]], config: Mapping[str, Any]) -> str:
    route, width = route_of(config), config["dict_size"]
    wanted = f"{words_of(*route)}, {width} latents, {_dict_class(config).__name__}"
    fit = [
        (path, trainer)
        for path, ae, trainer in known
        if trainer.get("layer") is not None and route_of(trainer) == route and _mismatch(ae, trainer, config) is None
    ]
    if not fit:
        raise ValueError(f"--init_from {name} has no SAE of {wanted}.")
    asked = {**config, "trainer_class": config["trainer"].__name__}
    for key in APART:
        same = [(path, trainer) for path, trainer in fit if key in asked and trainer.get(key) == asked[key]]
        fit = same or fit
    if len(fit) > 1:
        paths = " and ".join(path for path, _ in fit[:2])
        raise ValueError(f"--init_from {name} has several SAEs of {wanted}, as {paths}: give the folder of one.")
    return fit[0][0]


def _dict_class(config: Mapping[str, Any]) -> type[Dictionary]:
    return config.get("dict_class") or config["trainer"].dict_class


def _mismatch(ae: Dictionary, trainer: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """In what an SAE is none that the trainer of a config could train; None where it is."""
    if _is_transcoder(trainer) != _is_transcoder(config):
        return "is a transcoder, and what is trained is none" if _is_transcoder(trainer) else "is no transcoder"
    if ae.activation_dim != config["activation_dim"]:
        return f"takes {ae.activation_dim} dimensions, and the model has {config['activation_dim']}"
    output_dim, is_transcoder = config.get("output_dim") or config["activation_dim"], "output_dim" in config
    if ae.output_dim != output_dim:
        return f"gives {ae.output_dim} dimensions, and the model has {output_dim}"
    if is_transcoder != ae.is_transcoder:
        advice = "is a transcoder: give --transcoder mlp, or --site_in and --site_out"
        return "is no transcoder" if is_transcoder else advice
    if (ae.W_skip is not None) != bool(config.get("skip")):
        return "has no skip" if config.get("skip") else "has a skip: give --skip"
    if ae.dict_size != config["dict_size"]:
        return f"has {ae.dict_size} latents, not {config['dict_size']}: give --dictionary_widths {ae.dict_size}"
    wanted = _dict_class(config)
    # standard and p_anneal train one class, and start from each other
    if type(ae) is not wanted:
        return f"is of class {type(ae).__name__}, and {config['trainer'].__name__} trains {wanted.__name__}"
    groups = config.get("group_fractions")
    if groups is not None and len(groups) != len(trainer.get("group_fractions") or groups):
        return f"has {len(trainer['group_fractions'])} groups, not {len(groups)}"
    return None


def _is_transcoder(said: Mapping[str, Any]) -> bool:
    site = said.get("site", "resid_post")
    return said.get("site_out", site) != site
