"""Published SAEs, one module a format: its files (`FILES`), how a folder is read and, where we write it, written.

An SAE folder of ours holds the same SAE twice, for dictionary_learning and SAEBench and for SAELens.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch

from ..dictionary import Dictionary
from . import dictionary_learning, saelens
from .dictionary_learning import save_weights

__all__ = ["find_saes", "load_dictionary", "save_sae", "save_weights"]

FORMATS = (dictionary_learning, saelens)  # in the order in which a folder is asked whose it is


def save_sae(folder: str | Path, ae: Dictionary, config: dict[str, Any]) -> None:
    """Write an SAE that takes raw activations, in both formats.  `ae.pt` comes last: with it the folder is an SAE.

    config: {"trainer": ..., "buffer": ...}, which becomes config.json.  A BatchTopK or Matryoshka SAE that stopped
    before its threshold was set has no form in SAELens, and gets the first format only.
    """
    folder = Path(folder)
    if saelens.has_form(ae):
        saelens.write(folder, ae, config)
    dictionary_learning.write(folder, ae, config)


def find_saes(folder: str | Path) -> list[Path]:
    """The SAE folders below a folder (or itself), in natural order: layer 9 before layer 10."""
    found = [
        Path(root)
        for root, _, files in os.walk(folder)
        if any(set(form.FILES) <= set(files) for form in FORMATS) and "checkpoints" not in Path(root).parts
    ]
    return sorted(found, key=lambda path: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", str(path))])


def load_dictionary(path: str | Path, device: str | torch.device = "cpu") -> tuple[Dictionary, dict[str, Any]]:
    """(SAE in fp32, config) of a folder in dictionary_learning's or SAELens's format, or of user/repo/path on the Hub.

    config has the keys of config.json whatever the format; for a SAELens folder they are made from cfg.json.
    ReLU SAEs come with a unit-norm decoder.  ValueError for everything that is not a whole SAE.
    """
    folder = Path(path) if Path(path).exists() else _fetch(str(path))
    form = next((form for form in FORMATS if all((folder / name).is_file() for name in form.FILES)), None)
    if form is None:
        pairs = ", or ".join(" and ".join(form.FILES) for form in FORMATS)
        raise ValueError(f"{folder} is not the folder of a trained SAE: it must hold {pairs}.")
    ae, config = form.read(folder)
    return ae.with_unit_norm().to(device), config


def _fetch(name: str) -> Path:
    """The local copy of an SAE folder on the Hub: its two files, nothing else."""
    parts = name.split("/")
    if len(parts) < 3 or any(part in ("", ".", "..") or "\\" in part for part in parts):
        raise ValueError(f"{name} does not exist: give an SAE folder, or user/repo/path of one on the Hub.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo, inside = "/".join(parts[:2]), parts[2:]
    reason: Exception | None = None
    for form in FORMATS:
        try:
            return Path([hf_hub_download(repo, "/".join([*inside, file])) for file in form.FILES][0]).parent
        except (OSError, ValueError, EntryNotFoundError) as error:
            reason = error
            if isinstance(error, LocalEntryNotFoundError) or not isinstance(error, EntryNotFoundError):
                break  # not that the file is missing: the repository is, or the network
    raise ValueError(
        f"{name} is neither a local folder nor an SAE on the Hugging Face Hub "
        f"({type(reason).__name__}: {str(reason).strip().split(chr(10))[0]})."
    ) from reason
