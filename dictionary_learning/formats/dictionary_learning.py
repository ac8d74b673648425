"""Our own format, that of dictionary_learning and SAEBench: `config.json` + `ae.pt`."""

import warnings
from pathlib import Path
from typing import Any

import torch

from ..dictionary import DICTIONARIES, Dictionary
from ..files import read_json, read_pt, write_atomic, write_json

FILES = ("config.json", "ae.pt")


def read(folder: Path) -> tuple[Dictionary, dict[str, Any]]:
    config = read_json(folder / FILES[0])
    return _from_state(folder, config, read_pt(folder / FILES[1])), config


def write(folder: Path, ae: Dictionary, config: dict[str, Any]) -> None:
    """The weights come last: with them the folder is an SAE."""
    write_json(folder / FILES[0], config)
    save_weights(folder / FILES[1], ae)


def save_weights(path: str | Path, ae: Dictionary) -> None:
    """The plain state dict of an SAE (`ae.pt`, `checkpoints/ae_{step}.pt`), on the CPU."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in ae.state_dict().items()}
    write_atomic(path, lambda tmp: torch.save(state, tmp))


def _from_state(folder: Path, config: dict[str, Any], state: Any) -> Dictionary:
    """The SAE of a config.json and the content of its ae.pt."""
    trainer = config.get("trainer")
    if not isinstance(trainer, dict) or str(trainer.get("dict_class")) not in DICTIONARIES:
        raise ValueError(
            f"{folder / FILES[0]} does not say which SAE this is: trainer.dict_class must be one of "
            f"{', '.join(DICTIONARIES)}."
        )
    # the reference's training loop leaves a backup under the same name, with the norm factor not yet folded in
    norm_factor = 1.0
    if isinstance(state, dict) and {"ae", "step", "norm_factor"} <= state.keys():
        warnings.warn(f"{folder / FILES[1]} is the backup of step {state['step']} of an unfinished run.", stacklevel=4)
        state, norm_factor = state["ae"], float(state["norm_factor"])
    ae = build(folder / FILES[1], trainer["dict_class"], state)
    ae.scale_biases(norm_factor)
    for key in ("activation_dim", "dict_size", "k"):
        actual = getattr(ae, key, None)
        if actual is not None and trainer.get(key, actual) != actual:
            raise ValueError(
                f"{folder}: {FILES[0]} says {key} {trainer[key]} but {FILES[1]} has {int(actual)}; "
                "the two files belong to different SAEs."
            )
    return ae


def build(path: Path, dict_class: str, state: Any) -> Dictionary:
    try:
        return DICTIONARIES[dict_class].from_state(state)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not hold the weights of a {dict_class} ({reason}).") from error
