"""Published SAEs, one module a family: which files are its own (`targets`, `is_own`), and how they are read (`read`).

What a file holds beyond what is read is counted and told, but for names that begin with one of the family's NO_WEIGHTS.

Whatever is opened comes as one of our seven classes where one of them computes it, else as `dictionary.GeneralSAE`,
with a config of the same form:

    {"trainer": {"trainer_class", "dict_class", "activation_dim", "dict_size", "layer", "lm_name", "submodule_name",
                 "site", "site_out", "k" where there is one, "lm_revision" where one is stated, and more},
     "buffer": {"ctx_len", and more},
     "source": {"format", "path", "prepend_bos", "exclude_special_tokens",
                "stated": {"l0", "frac_variance_explained"} as far as these are stated}}

What nobody says is None. An SAE folder of ours holds the same SAE twice, for dictionary_learning and SAEBench and for
SAELens.
"""

import os
import re
import warnings
from collections.abc import Collection
from functools import cache
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..dictionary import Dictionary
from ..network import is_offline
from . import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    hook_z,
    llama_scope,
    llama_scope_r1,
    llamascopium,
    openai,
    qresearch,
    qwen_scope,
    saelens,
    sparsify,
    temporal,
)
from .dictionary_learning import save_weights
from .place import Place

__all__ = ["find_saes", "load_dictionary", "save_sae", "save_weights"]

FAMILIES: tuple[ModuleType, ...] = (  # in the order in which a folder is asked whose it is
    dictionary_learning,
    saelens,
    gemma_scope,
    gemma_scope_2,
    qwen_scope,
    sparsify,
    llama_scope,
    llamascopium,
    llama_scope_r1,
    circuit_tracer,
    hook_z,
    goodfire,
    qresearch,
    openai,
    temporal,
)
EXPORT = "circuit_tracer"  # in a run's folder, its transcoders once more as that package opens them
# a folder of one SAE goes by its weights' file too
WEIGHTS = ("ae.pt", "sae_weights.safetensors", "params.npz", "params.safetensors", "sae.safetensors")
UNSURE = (openai,)  # whose files have no names of their own, so that none is looked for


def save_sae(folder: str | Path, ae: Dictionary, config: dict[str, Any]) -> None:
    """Write an SAE that takes raw activations, in both formats.  `ae.pt` comes last: with it the folder is an SAE.

    config: {"trainer": ..., "buffer": ...}, which becomes config.json.  A BatchTopK or Matryoshka SAE that stopped
    before its threshold was set has no form in SAELens, and gets the first format only.
    """
    folder = Path(folder)
    if saelens.has_form(ae, config):
        saelens.write(folder, ae, config)
    dictionary_learning.write(folder, ae, config)


def find_saes(folder: str | Path) -> list[Path]:
    """The SAEs below a folder (or itself), in natural order: layer 9 before layer 10.

    A folder each, or a file where a family has one for each SAE. What lies below an SAE folder (its checkpoints) is
    none of its own, unless it is the folder asked.
    """
    found = []
    for root, folders, files in os.walk(folder):
        if EXPORT in folders:
            folders.remove(EXPORT)
        targets = _targets(_names(Path(root)), [family for family in FAMILIES if family not in UNSURE])
        found += [Path(root, target) for target in targets]
        if "" in targets:
            folders.clear()
        elif "checkpoints" in folders and "config.json" in files:  # it is still in training
            folders.remove("checkpoints")
    return sorted(found, key=lambda path: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", str(path))])


def load_dictionary(name: str | Path, device: str | torch.device = "cpu") -> tuple[Dictionary, dict[str, Any]]:
    """(SAE in fp32, config) of a folder, a file, or a name on the Hub: USER/REPO[@REVISION][/FOLDER or /FILE].

    A local path wins over the Hub, of which only the files needed are downloaded; the weights' file of a folder stands
    for the folder. Features are in the units of the family's own package: ReLU SAEs of dictionary_learning come with a
    unit-norm decoder. ValueError for everything that is not a whole SAE, or is of a family that cannot be loaded.
    """
    place = local_place(Path(name)) if Path(name).exists() else hub_place(str(name))
    if place.target in WEIGHTS:
        place.target = ""
    candidates = [family for family in FAMILIES if place.target in _targets(place.names, [family])]
    if not place.target and not candidates:
        files = _targets(place.names, FAMILIES)
        if len(files) > 1:
            raise ValueError(f"{name} holds {len(files)} SAEs, a file each: name one of them, such as {files[0]}.")
        if files:
            place.target = files[0]
            candidates = [family for family in FAMILIES if place.target in _targets(place.names, [family])]
    family = next((one for one in candidates if not hasattr(one, "is_own") or one.is_own(place)), None)
    if family is None:
        raise ValueError(
            f"{name} is not a trained SAE: it must be a folder with {' and '.join(dictionary_learning.FILES)}, or with "
            f"{' and '.join(saelens.FILES)}, or of another family that is known ({_families()})."
        )
    place.opened.clear()
    try:
        ae, config = family.read(place)
    except (KeyError, AttributeError, IndexError, TypeError, RuntimeError, OverflowError, ValueError) as error:
        if isinstance(error, ValueError) and place.name in str(error):
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{name} is not an SAE of {family.NAME} as it is known ({reason}).") from error
    broken = [key for key, tensor in ae.state_dict().items() if not _all_finite(tensor)]
    if broken:
        raise ValueError(f"{name} has weights that are not finite, in {broken[0]}; restore it from a copy.")
    left = sorted(key for file in place.opened for key in file.unread if not key.startswith(_no_weights(family)))
    if left:
        what = f"{len(left)} of its tensors, such as {left[0]}, are none of {family.NAME} as it is known"
        warnings.warn(f"{name}: {what}: left out", stacklevel=2)
    return ae.to(device), config


def _no_weights(family: ModuleType) -> tuple[str, ...]:
    """How the names of what a family's files hold beside the weights begin."""
    return getattr(family, "NO_WEIGHTS", ())


def _all_finite(tensor: Tensor) -> bool:
    """No mask as large as the tensor, nor a copy in order.

    One nan or infinity makes the sum one, whatever the rest; the sum alone overflows only where weights are huge, and
    their extremes then tell.
    """
    tensor = tensor.T if tensor.ndim == 2 and tensor.T.is_contiguous() else tensor
    if not tensor.is_floating_point() or bool(tensor.sum().isfinite()):
        return True
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def _families() -> str:
    return ", ".join(family.NAME for family in FAMILIES[2:])


def _targets(names: Collection[str], families: Collection[ModuleType]) -> list[str]:
    return list(dict.fromkeys(target for family in families for target in family.targets(names)))


def _names(folder: Path) -> set[str]:
    """The files of a folder, and of the folders in it."""
    files = [*folder.glob("*"), *folder.glob("checkpoints/*")]
    return {path.relative_to(folder).as_posix() for path in files if path.is_file()}


def local_place(path: Path) -> Place:
    path = path.absolute()
    folder, target = (path, "") if path.is_dir() else (path.parent, path.name)
    above = folder.parent

    def get_above(file: str) -> Path | None:
        return above / file if (above / file).is_file() else None

    return Place(str(folder), _names(folder), lambda file: folder / file, target, get_above)


def hub_place(name: str) -> Place:
    """The place of USER/REPO[@REVISION][/FOLDER or /FILE] on the Hub; what is needed is downloaded when it is read."""
    parts = name.split("/")
    if len(parts) < 2 or any(part in ("", ".", "..") or "\\" in part for part in parts):
        raise ValueError(f"{name} does not exist: give an SAE folder or file, or user/repo/path of one on the Hub.")
    import huggingface_hub

    (user, repo, *inside), revision = parts, None
    if "@" in repo:
        repo, revision = repo.split("@", 1)
    repo_id, offline, why = f"{user}/{repo}", is_offline(name), "the Hub cannot be reached"
    try:
        listed = None if offline else huggingface_hub.HfApi().list_repo_files(repo_id, revision=revision)
    except Exception as error:  # the HTTP client's own errors differ between versions of huggingface_hub
        listed, why = None, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    if listed is None and (listed := _cached_files(repo_id, revision)) is None:
        raise ValueError(f"{name} is neither a local folder nor an SAE on the Hugging Face Hub ({why}).")
    path = "/".join(inside)
    folder, target = (path.rpartition("/")[0], inside[-1]) if path in listed else (path, "")
    start = f"{folder}/" if folder else ""
    names = {file.removeprefix(start) for file in listed if file.startswith(start)}

    @cache
    def download(file: str) -> Path:
        try:
            return Path(huggingface_hub.hf_hub_download(repo_id, file, revision=revision, local_files_only=offline))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{file} of {name} could not be downloaded ({str(error).strip().splitlines()[0]})."
            ) from error

    def get_above(file: str) -> Path | None:
        path = str(PurePosixPath(folder).parent / file)
        return download(path) if folder and path in listed else None

    return Place(f"{repo_id}/{folder}".rstrip("/"), names, lambda file: download(start + file), target, get_above)


def _cached_files(repo_id: str, revision: str | None) -> list[str] | None:
    """The files of a repo in the local cache, None where there are none."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
