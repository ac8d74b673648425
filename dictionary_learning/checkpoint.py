"""Every file format of the project, and every write that must survive a crash.

An SAE folder holds the same SAE twice: `config.json` + `ae.pt` for dictionary_learning and SAEBench, `cfg.json` +
`sae_weights.safetensors` for SAELens.  Whatever is read is read as tensors and plain data, never as code, and a file
that is damaged or of another kind is told in one sentence.

D activation_dim, F dict_size.
"""

import copy
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .dictionary import DICTIONARIES, AutoEncoder, Dictionary, JumpReluAutoEncoder, TopKDictionary
from .world import AgreedError, World

OURS = ("config.json", "ae.pt")
SAELENS = ("cfg.json", "sae_weights.safetensors")
CHECKSUMS = "checksums.json"  # of a state: {file: [bytes, sha256]}
SAELENS_VERSION = "6.54.12"  # whose format is written; SAELens drops the metadata of files that name none


# -- writing and reading files


def write_atomic(path: str | Path, content: bytes | Callable[[Path], object]) -> None:
    """Whatever happens meanwhile, `path` holds either all of its old content or all of the new.

    `content` is the bytes, or a function that writes them to the path it is given.  OSError if they cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.tmp")  # one name a file, so that what a kill left is overwritten
    try:
        tmp.touch()
        mode = tmp.stat().st_mode
        if isinstance(content, bytes):
            tmp.write_bytes(content)
        else:
            content(tmp)
            tmp.chmod(mode)  # safetensors makes files that only their owner can read
        _sync(tmp)
        os.replace(tmp, path)
        _sync(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors raise errors of their own
        reason = next((e for e in (error, error.__context__) if isinstance(e, OSError)), error)
        raise OSError(f"{path} could not be written ({reason}); what it held before is untouched.") from error
    finally:
        tmp.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: null in their place."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, value: Any) -> None:
    write_atomic(path, (json.dumps(_finite(value), indent=4, allow_nan=False) + "\n").encode())


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError if there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it from a copy.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(value).__name__}; restore it from a copy.")
    return value


def append_jsonl(path: str | Path, row: dict[str, Any]) -> None:
    """Add a line.  A kill can cut the last line short; readers leave such a line out."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(_finite(row), allow_nan=False) + "\n")


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of all complete lines; none if there is no such file."""
    if not Path(path).exists():
        return []
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} holds a line that is not valid JSON ({error}); delete that line.") from error


def rewind_jsonl(path: str | Path, step: int) -> None:
    """Keep the rows of the steps before `step`: what a run that resumes there has already said."""
    rows = [row for row in read_jsonl(path) if row["step"] < step]
    if Path(path).exists():
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _read_pt(path: Path) -> Any:
    """What `torch.save` wrote, weights only, on the CPU.

    Torch does not look at the checksums in its own files and would let a flipped bit of a weight pass.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage surfaces as any of a dozen types
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} is damaged or was not written by torch.save as plain tensors ({reason}); restore it from a copy."
        ) from error


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    # the format has no checksum, so one goes into its metadata
    write_atomic(path, lambda tmp: save_file(tensors, tmp, metadata={"sha256": _digest(tensors)}))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            expected = (file.metadata() or {}).get("sha256")
        if expected not in (None, _digest(tensors)):
            raise ValueError("its checksum is wrong")
        return tensors
    except Exception as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}); restore it from a copy.") from error


# -- SAE folders


def save_weights(path: str | Path, ae: Dictionary) -> None:
    """The plain state dict of an SAE (`ae.pt`, `checkpoints/ae_{step}.pt`), on the CPU."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in ae.state_dict().items()}
    write_atomic(path, lambda tmp: torch.save(state, tmp))


def save_sae(folder: str | Path, ae: Dictionary, config: dict[str, Any]) -> None:
    """Write an SAE that takes raw activations, in both formats.  `ae.pt` comes last: with it the folder is an SAE.

    config: {"trainer": ..., "buffer": ...}, which becomes config.json.  A BatchTopK or Matryoshka SAE that stopped
    before its threshold was set has no form in SAELens, and gets the first format only.
    """
    folder = Path(folder)
    if _has_saelens_form(ae):
        cfg, tensors = to_saelens(ae, config)
        _write_safetensors(folder / SAELENS[1], tensors)
        write_json(folder / SAELENS[0], cfg)
    write_json(folder / OURS[0], config)
    save_weights(folder / OURS[1], ae)


def find_saes(folder: str | Path) -> list[Path]:
    """The SAE folders below a folder (or itself), in natural order: layer 9 before layer 10."""
    found = [
        Path(root)
        for root, _, files in os.walk(folder)
        if any(set(pair) <= set(files) for pair in (OURS, SAELENS)) and "checkpoints" not in Path(root).parts
    ]
    return sorted(found, key=lambda path: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", str(path))])


def load_dictionary(path: str | Path, device: str | torch.device = "cpu") -> tuple[Dictionary, dict[str, Any]]:
    """(SAE in fp32, config) of a folder in dictionary_learning's or SAELens's format, or of user/repo/path on the Hub.

    config has the keys of config.json whatever the format; for a SAELens folder they are made from cfg.json.
    ReLU SAEs come with a unit-norm decoder.  ValueError for everything that is not a whole SAE.
    """
    folder = Path(path) if Path(path).exists() else _fetch(str(path))
    if all((folder / name).is_file() for name in OURS):
        config = read_json(folder / OURS[0])
        ae = _from_state(folder, config, _read_pt(folder / OURS[1]))
    elif all((folder / name).is_file() for name in SAELENS):
        ae, config = from_saelens(folder, read_json(folder / SAELENS[0]), _read_safetensors(folder / SAELENS[1]))
    else:
        raise ValueError(
            f"{folder} is not the folder of a trained SAE: it must hold {' and '.join(OURS)}, "
            f"or {' and '.join(SAELENS)}."
        )
    return _unit_norm(ae).to(device), config


def _unit_norm(ae: Dictionary) -> Dictionary:
    """As the reference on loading: where decoder norms were free in training, features come in units of them."""
    if isinstance(ae, AutoEncoder):
        norm_F = ae.decoder_FD.norm(dim=1)
        if not torch.allclose(norm_F, torch.ones_like(norm_F)):
            ae.normalize_decoder()
    return ae


def _from_state(folder: Path, config: dict[str, Any], state: Any) -> Dictionary:
    """The SAE of a config.json and the content of its ae.pt."""
    trainer = config.get("trainer")
    if not isinstance(trainer, dict) or str(trainer.get("dict_class")) not in DICTIONARIES:
        raise ValueError(
            f"{folder / OURS[0]} does not say which SAE this is: trainer.dict_class must be one of "
            f"{', '.join(DICTIONARIES)}."
        )
    # the reference's training loop leaves a backup under the same name, with the norm factor not yet folded in
    norm_factor = 1.0
    if isinstance(state, dict) and {"ae", "step", "norm_factor"} <= state.keys():
        warnings.warn(f"{folder / OURS[1]} is the backup of step {state['step']} of an unfinished run.", stacklevel=3)
        state, norm_factor = state["ae"], float(state["norm_factor"])
    ae = _build(folder / OURS[1], trainer["dict_class"], state)
    ae.scale_biases(norm_factor)
    for key in ("activation_dim", "dict_size", "k"):
        actual = getattr(ae, key, None)
        if actual is not None and trainer.get(key, actual) != actual:
            raise ValueError(
                f"{folder}: {OURS[0]} says {key} {trainer[key]} but {OURS[1]} has {int(actual)}; "
                "the two files belong to different SAEs."
            )
    return ae


def _build(path: Path, dict_class: str, state: Any) -> Dictionary:
    try:
        return DICTIONARIES[dict_class].from_state(state)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not hold the weights of a {dict_class} ({reason}).") from error


def _fetch(name: str) -> Path:
    """The local copy of an SAE folder on the Hub: its two files, nothing else."""
    parts = name.split("/")
    if len(parts) < 3 or any(part in ("", ".", "..") or "\\" in part for part in parts):
        raise ValueError(f"{name} does not exist: give an SAE folder, or user/repo/path of one on the Hub.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo, inside = "/".join(parts[:2]), parts[2:]
    reason: Exception | None = None
    for pair in (OURS, SAELENS):
        try:
            return Path([hf_hub_download(repo, "/".join([*inside, file])) for file in pair][0]).parent
        except (OSError, ValueError, EntryNotFoundError) as error:
            reason = error
            if isinstance(error, LocalEntryNotFoundError) or not isinstance(error, EntryNotFoundError):
                break  # not that the file is missing: the repository is, or the network
    raise ValueError(
        f"{name} is neither a local folder nor an SAE on the Hugging Face Hub "
        f"({type(reason).__name__}: {str(reason).strip().split(chr(10))[0]})."
    ) from reason


# -- SAELens


class _Format(NamedTuple):
    architecture: str  # how SAELens runs it
    trained_as: str  # how SAELens would call what was trained
    subtracts_b_dec: bool
    names: dict[str, str]  # SAELens's tensor: ours; a `.weight` is stored transposed


_LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight"}
_PLAIN = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
_TOP_K = {**_LINEAR, "b_enc": "encoder.bias", "b_dec": "b_dec"}
_THRESHOLD = {"threshold": "threshold"}
_GATES = {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}
# SAELens knows batchtopk and matryoshka in training only: a trained one is a jumprelu with one threshold for all
_FORMATS = {
    "AutoEncoder": _Format("standard", "standard", True, {**_LINEAR, "b_enc": "encoder.bias", "b_dec": "bias"}),
    "AutoEncoderNew": _Format(
        "standard", "standard", False, {**_LINEAR, "b_enc": "encoder.bias", "b_dec": "decoder.bias"}
    ),
    "GatedAutoEncoder": _Format("gated", "gated", True, {**_LINEAR, **_GATES, "b_dec": "decoder_bias"}),
    "AutoEncoderTopK": _Format("topk", "topk", True, _TOP_K),
    "BatchTopKSAE": _Format("jumprelu", "batchtopk", True, {**_TOP_K, **_THRESHOLD}),
    "MatryoshkaBatchTopKSAE": _Format("jumprelu", "matryoshka_batchtopk", True, {**_PLAIN, **_THRESHOLD}),
    "JumpReluAutoEncoder": _Format("jumprelu", "jumprelu", False, {**_PLAIN, **_THRESHOLD}),
}
# what a SAELens SAE of ours becomes; standard without b_dec at the input is an AutoEncoderNew
_CLASSES = {
    "standard": "AutoEncoder",
    "gated": "GatedAutoEncoder",
    "topk": "AutoEncoderTopK",
    "jumprelu": "JumpReluAutoEncoder",
}


def _has_saelens_form(ae: Dictionary) -> bool:
    """A jumprelu needs its threshold, which the top-k family sets in training."""
    is_jumprelu = _FORMATS[type(ae).__name__].architecture == "jumprelu"
    return not (is_jumprelu and isinstance(ae, TopKDictionary) and bool(ae.threshold < 0))


def to_saelens(ae: Dictionary, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(cfg.json, tensors) with which SAELens computes the same features and reconstructions.

    The hook has TransformerLens's name, for that is how SAELens loads models unless told otherwise.
    """
    if not _has_saelens_form(ae):
        raise ValueError(
            f"the threshold of this {type(ae).__name__} is not set: train past threshold_start_step before exporting."
        )
    trainer, buffer = config["trainer"], config.get("buffer", {})
    form = _FORMATS[type(ae).__name__]
    state = _unit_norm(copy.deepcopy(ae)).state_dict()
    tensors = {theirs: state[ours].detach().cpu() for theirs, ours in form.names.items()}
    tensors = {theirs: _turned(form.names[theirs], tensor).contiguous() for theirs, tensor in tensors.items()}
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].expand(ae.dict_size).contiguous()
    cfg = {
        "architecture": form.architecture,
        "d_in": ae.activation_dim,
        "d_sae": ae.dict_size,
        "dtype": str(tensors["W_dec"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": getattr(ae, "apply_b_dec_to_input", form.subtracts_b_dec),
        "normalize_activations": "none",  # folded into the biases
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "model_name": trainer.get("lm_name"),
            "model_class_name": "HookedTransformer",
            "hook_name": f"blocks.{trainer['layer']}.hook_resid_post" if "layer" in trainer else None,
            "hook_head_index": None,
            "context_size": buffer.get("ctx_len"),
            "prepend_bos": True,
            "exclude_special_tokens": bool(buffer.get("mask", False)),
            "dataset_path": buffer.get("dataset"),
            "training_architecture": form.trained_as,
            "training_architecture_details": _finite(trainer),
        },
    }
    if form.architecture == "topk":
        cfg |= {"k": int(state["k"]), "rescale_acts_by_decoder_norm": False}
    return cfg, tensors


def _turned(ours: str, tensor: Tensor) -> Tensor:
    return tensor.T if ours.endswith(".weight") else tensor


def from_saelens(folder: Path, cfg: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Dictionary, dict[str, Any]]:
    """(SAE, config) of a cfg.json and its tensors; ValueError for what our modules cannot compute."""
    path = folder / SAELENS[0]
    architecture = str(cfg.get("architecture", "standard"))
    if architecture not in _CLASSES:
        raise ValueError(f"{path} is of architecture {architecture!r}; {', '.join(_CLASSES)} can be loaded.")
    plain = {
        "normalize_activations": "none",
        "reshape_activations": "none",
        "finetuning_scaling_factor": False,
        "activation_fn": "topk" if architecture == "topk" else "relu",
        "activation_fn_str": "topk" if architecture == "topk" else "relu",
    }
    for key, value in plain.items():
        if cfg.get(key) not in (None, False, value):
            raise ValueError(f"{path} has {key} {cfg[key]!r}; only {value!r} can be loaded.")
    subtracts = cfg.get("apply_b_dec_to_input", True)
    dict_class = _CLASSES[architecture]
    if architecture == "standard" and not subtracts:
        dict_class = "AutoEncoderNew"
    form = _FORMATS[dict_class]
    if architecture != "jumprelu" and bool(subtracts) != form.subtracts_b_dec:
        raise ValueError(f"{path} has apply_b_dec_to_input {subtracts}, which no {architecture} SAE here can do.")
    if tensors.keys() != form.names.keys():
        raise ValueError(f"{folder / SAELENS[1]} must hold {sorted(form.names)}, and holds {sorted(tensors)}.")

    state = {ours: _turned(ours, tensors[theirs]) for theirs, ours in form.names.items()}
    if architecture == "topk":
        k = cfg.get("k")
        if not isinstance(k, int):
            raise ValueError(f"{path} must say k, the number of active latents, as an integer; it says {k!r}.")
        state |= {"k": torch.tensor(k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
        if cfg.get("rescale_acts_by_decoder_norm", False):  # top-k of f ||W_dec||: with the norms in the encoder, of f
            norm_F = tensors["W_dec"].norm(dim=1)
            state["encoder.weight"] = state["encoder.weight"] * norm_F[:, None]
            state["encoder.bias"] = state["encoder.bias"] * norm_F
            state["decoder.weight"] = state["decoder.weight"] / norm_F
    if architecture == "jumprelu" and tensors["threshold"].ndim == 0:
        state["threshold"] = tensors["threshold"].expand(tensors["b_enc"].shape)
    ae = _build(folder / SAELENS[1], dict_class, state)
    if isinstance(ae, JumpReluAutoEncoder):
        ae.apply_b_dec_to_input = bool(subtracts)
    if (cfg.get("d_in"), cfg.get("d_sae")) != (ae.activation_dim, ae.dict_size):
        raise ValueError(
            f"{path} says d_in {cfg.get('d_in')} and d_sae {cfg.get('d_sae')}, but the weights are "
            f"{ae.activation_dim} and {ae.dict_size}; the two files belong to different SAEs."
        )
    return ae, _config_of(cfg, ae, dict_class)


def _config_of(cfg: dict[str, Any], ae: Dictionary, dict_class: str) -> dict[str, Any]:
    """What of cfg.json has a place in config.json.  `layer` is None for hooks other than the residual stream."""
    metadata = cfg.get("metadata")
    said = {**cfg, **(metadata if isinstance(metadata, dict) else {})}  # version 5 has no metadata of its own
    hook = str(said.get("hook_name", said.get("hook_point")))
    # TransformerLens's name, or a Hugging Face module's; before block L is after block L - 1
    place = re.fullmatch(r".*\.(\d+)(\.hook_resid_pre|\.hook_resid_post)?", hook)
    layer = None if place is None else int(place[1]) - (place[2] == ".hook_resid_pre")
    trainer = {
        "trainer_class": said.get("training_architecture", dict_class),
        "dict_class": dict_class,
        "activation_dim": ae.activation_dim,
        "dict_size": ae.dict_size,
        "layer": layer,
        "lm_name": said.get("model_name"),
        "submodule_name": hook,
    }
    if isinstance(ae, TopKDictionary):
        trainer["k"] = int(ae.k)
    return {"trainer": trainer, "buffer": {"ctx_len": said.get("context_size")}}


# -- the state of a run


class SavedState(Mapping[str, Any]):
    """A state on the disk: its entries by name, each read when it is asked for, on the CPU."""

    def __init__(self, path: Path):
        self.path = path

    def __getitem__(self, name: str) -> Any:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict_loader import load

        entry: dict[str, Any] = {name: None}
        try:
            with _alone():
                load(entry, storage_reader=_state_reader(self.path), planner=_entry_planner(), no_dist=True)
        except CheckpointException as error:
            raise ValueError(f"{self.path} has no {name} that can be read ({_reason(error)}).") from error
        return entry[name][0]

    def __iter__(self) -> Iterator[str]:
        return iter(_state_reader(self.path).read_metadata().state_dict_metadata)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def save_state(
    folder: str | Path, step: int, entries: Mapping[str, Any], *, world: World | None = None, keep: int = 2
) -> Path:
    """Write the folder `state_{step}`, and keep the newest `keep` of them.

    entries: this rank's part of the state, by names that no other rank uses; tensors and plain data only.
    All ranks call it. The folder gets its name when all of it is on the disk, with a checksum of every file. States of
    later steps go too: they are damaged ones that `load_state` passed over. OSError, on all ranks, where it cannot be
    written.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    world = world or World()
    folder = Path(folder)
    path, tmp = folder / f"state_{step}", folder / f".state_{step}.tmp"

    def begin() -> bool:
        if path.exists() and _damage(path) is None:
            return False  # the run was stopped where it had been resumed
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        return True

    def write() -> dict[str, list]:
        """The size and checksum of each file that this rank wrote."""
        boxed = {name: [entry] for name, entry in entries.items()}  # torch has rules of its own for bare tensors
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            with _alone(), world.peers():
                save(boxed, storage_writer=FileSystemWriter(tmp), planner=planner, no_dist=world.size == 1)
        except CheckpointException as error:
            raise OSError(f"{path} could not be written ({_reason(error)}).") from error
        own = [*tmp.glob(f"__{world.rank}_*"), *([tmp / ".metadata"] if world.rank == 0 else [])]
        return {file.name: _size_and_sum(file) for file in own}

    def end(sums: dict[str, list]) -> None:
        write_json(tmp / CHECKSUMS, sums)
        shutil.rmtree(path, ignore_errors=True)  # a damaged one
        os.replace(tmp, path)
        _sync(folder)
        generations = _generations(folder)
        kept = [old for old in generations if _step(old) <= step][:keep]
        for old in [*folder.glob(".state_*.tmp"), *(old for old in generations if old not in kept)]:
            shutil.rmtree(old, ignore_errors=True)

    if world.together(begin, rank=0):
        try:
            sums = world.gather(world.together(write))
            world.together(lambda: end({name: value for part in sums for name, value in part.items()}), rank=0)
        except (OSError, ValueError):
            shutil.rmtree(tmp, ignore_errors=True)
            raise
    return path


def load_state(folder: str | Path, *, world: World | None = None) -> SavedState | None:
    """The newest whole state, the same on all ranks; None if there is no state at all, ValueError if none is whole."""
    world = world or World()
    first = None
    for path in world.together(lambda: _generations(Path(folder)), rank=0):
        found = world.gather(_damage(path, world))
        damage = next((sentence for sentence in found if sentence is not None), None)
        if damage is None:
            return SavedState(path)
        first = first or damage
        if world.rank == 0:
            warnings.warn(f"{path} is damaged; the state before it is tried.", stacklevel=2)
    if first is not None:
        raise AgreedError(f"no state in {folder} can be resumed: {first}")
    return None


def _size_and_sum(path: Path) -> list:
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _damage(path: Path, world: World | None = None) -> str | None:
    """What is wrong with a state, None if nothing is. Of several ranks each looks at its share of the files."""
    world = world or World()
    try:
        sums = read_json(path / CHECKSUMS)
        names = sorted(file.name for file in path.iterdir() if file.name != CHECKSUMS)
        if sorted(sums) != names:
            return f"{path} does not hold the files that its {CHECKSUMS} names"
        for name in names[world.rank :: world.size]:
            if _size_and_sum(path / name) != sums[name]:
                return f"the checksum of {path / name} is wrong"
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _reason(error: Any) -> str:
    """The first line of what went wrong on the first rank of torch's CheckpointException."""
    return str(next(iter(error.failures.values()))[0]).strip().split("\n")[0]


@contextmanager
def _alone() -> Iterator[None]:
    """Torch warns that a checkpoint is one process's, which is what we asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)")
        yield


def _entry_planner() -> Any:
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    class Planner(DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: Any) -> None:
            entry = torch.load(value, map_location="cpu", weights_only=True)
            self.state_dict[read_item.dest_index.fqn] = entry

    return Planner(flatten_state_dict=False, flatten_sharded_tensors=False)


def _state_reader(path: Path) -> Any:
    from torch.distributed.checkpoint import filesystem, metadata

    classes = (
        metadata.BytesStorageMetadata,
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        filesystem._StorageInfo,
        type(Path()),
    )

    class Unpickler(pickle.Unpickler):
        """Torch's list of what is where is a pickle: of these classes, and of no code."""

        def find_class(self, module: str, name: str) -> Any:
            found = {(cls.__module__, cls.__qualname__): cls for cls in classes}.get((module, name))
            if found is None:
                raise ValueError(f"{path} was not written by this program: it holds a {module}.{name}")
            return found

    class Reader(filesystem.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with open(path / ".metadata", "rb") as file:
                return Unpickler(file).load()

    return Reader(path)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("state_"))


def _generations(folder: Path) -> list[Path]:
    """The states, newest first."""
    named = [path for path in folder.glob("state_*") if path.name.removeprefix("state_").isdecimal()]
    return sorted(named, key=_step, reverse=True)
