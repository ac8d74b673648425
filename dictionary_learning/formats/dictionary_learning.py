"""Our own format, that of dictionary_learning and SAEBench: `config.json` + `ae.pt`, and `checkpoints/ae_{step}.pt`."""

import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from ..dictionary import DICTIONARIES, TRANSCODER, Dictionary, JumpReluAutoEncoder, TopKDictionary
from ..files import TensorFile, read_json, write_atomic, write_json
from .place import Place, Said, config_of

NAME = "dictionary_learning"
FILES = ("config.json", "ae.pt")
NO_WEIGHTS = ("optimizer.", "config.")  # of a backup


def targets(names: Collection[str]) -> list[str]:
    """The folder, or the checkpoints in one of its own, `checkpoints/ae_{step}.pt`."""
    checkpoints = sorted(
        (name for name in names if re.fullmatch(r"ae_\d+\.pt", name)), key=lambda name: int(name[3:-3])
    )
    return [""] if set(names) >= set(FILES) else checkpoints


def is_own(place: Place) -> bool:
    return not place.target or place.get_above(FILES[0]) is not None


def read(place: Place) -> tuple[Dictionary, dict[str, Any]]:
    """Its config is config.json's, with what other rooms count on beside it."""
    weights = place.target or FILES[1]
    said = place.get_above(FILES[0]) if place.target else place.get(FILES[0])
    assert said is not None
    config, path = read_json(said), place.get(weights)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict) or _class_name(trainer).removesuffix(TRANSCODER) not in DICTIONARIES:
        raise ValueError(
            f"{said} does not say which SAE this is: trainer.dict_class must be one of {', '.join(DICTIONARIES)}."
        )
    ae = _from_state(path, trainer, place.tensors(weights))
    for key in ("activation_dim", "dict_size", "k", "output_dim"):
        actual = getattr(ae, key, None)
        if actual is not None and trainer.get(key, actual) != actual:
            raise ValueError(
                f"{place.name}: {FILES[0]} says {key} {trainer[key]} but {weights} has {int(actual)}; "
                "the two files belong to different SAEs."
            )
    named = re.fullmatch(r"(\w+)_layer_(\d+)", str(trainer.get("submodule_name")))  # as "mlp_out_layer_3"
    site = str(trainer.get("site") or (named[1] if named else "resid_post"))
    full = config_of(place, NAME, ae, Said(site=site, site_out=trainer.get("site_out")))
    source = config.get("source") or full["source"]  # of one that was converted, where it came from
    buffer = config.get("buffer") or full["buffer"]
    for part, value in (("buffer", buffer), ("source", source)):
        if not isinstance(value, dict):
            raise ValueError(f"{said} says {part} {value!r}, which is no object; restore it from a copy.")
    layer = trainer.get("layer", int(named[2]) if named else None)
    known = {"layer": layer if isinstance(layer, int) and layer >= 0 else None}
    config = {**config, "trainer": full["trainer"] | trainer | known, "buffer": buffer, "source": source}
    return ae.with_unit_norm(), config


def _class_name(trainer: dict[str, Any]) -> str:
    return str(trainer.get("dict_class"))


def _from_state(path: Path, trainer: dict[str, Any], file: TensorFile) -> Dictionary:
    # the reference's training loop leaves a backup under the same name, with the norm factor not yet folded in
    start, norm_factor = "", 1.0
    if {"step", "norm_factor"} <= file.values.keys() | file.names:
        start = "ae."
        step, norm_factor = (
            file.values[key] if key in file.values else file.read(key) for key in ("step", "norm_factor")
        )
        warnings.warn(f"{path} is the backup of step {int(step)} of an unfinished run.", stacklevel=4)
    state = {name.removeprefix(start): file.read(name) for name in file.names if name.startswith(start)}
    name = _class_name(trainer)
    dict_class = DICTIONARIES[name.removesuffix(TRANSCODER)]
    if issubclass(dict_class, TopKDictionary):  # older files lack one or both
        if "k" not in state and "k" in trainer:
            state["k"] = torch.tensor(trainer["k"], dtype=torch.int)
        state.setdefault("threshold", torch.tensor(-1.0))
    try:
        ae = dict_class.from_state(state, is_transcoder=name.endswith(TRANSCODER))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not hold the weights of a {name} ({reason}).") from error
    ae.scale_biases(float(norm_factor))
    return ae


def write(folder: Path, ae: Dictionary, config: dict[str, Any]) -> None:
    """The weights come last: with them the folder is an SAE."""
    write_json(folder / FILES[0], config)
    if isinstance(ae, JumpReluAutoEncoder):  # whose state dict does not say whether b_dec is subtracted
        ae = ae.without_input_bias()
    save_weights(folder / FILES[1], ae)


def save_weights(path: str | Path, ae: Dictionary) -> None:
    """The plain state dict of an SAE (`ae.pt`, `checkpoints/ae_{step}.pt`), on the CPU."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in ae.state_dict().items()}
    write_atomic(path, lambda tmp: torch.save(state, tmp))
