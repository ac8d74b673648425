"""SAELens' format: `cfg.json` + `sae_weights.safetensors`.

D activation_dim, F dict_size.
"""

import copy
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dictionary import Dictionary, JumpReluAutoEncoder, TopKDictionary
from ..files import finite, read_json, read_safetensors, write_json, write_safetensors
from .dictionary_learning import build

FILES = ("cfg.json", "sae_weights.safetensors")
VERSION = "6.54.12"  # whose format is written; SAELens drops the metadata of files that name none


def read(folder: Path) -> tuple[Dictionary, dict[str, Any]]:
    return from_saelens(folder, read_json(folder / FILES[0]), read_safetensors(folder / FILES[1]))


def write(folder: Path, ae: Dictionary, config: dict[str, Any]) -> None:
    cfg, tensors = to_saelens(ae, config)
    write_safetensors(folder / FILES[1], tensors)
    write_json(folder / FILES[0], cfg)


class _Form(NamedTuple):
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
_FORMS = {
    "AutoEncoder": _Form("standard", "standard", True, {**_LINEAR, "b_enc": "encoder.bias", "b_dec": "bias"}),
    "AutoEncoderNew": _Form(
        "standard", "standard", False, {**_LINEAR, "b_enc": "encoder.bias", "b_dec": "decoder.bias"}
    ),
    "GatedAutoEncoder": _Form("gated", "gated", True, {**_LINEAR, **_GATES, "b_dec": "decoder_bias"}),
    "AutoEncoderTopK": _Form("topk", "topk", True, _TOP_K),
    "BatchTopKSAE": _Form("jumprelu", "batchtopk", True, {**_TOP_K, **_THRESHOLD}),
    "MatryoshkaBatchTopKSAE": _Form("jumprelu", "matryoshka_batchtopk", True, {**_PLAIN, **_THRESHOLD}),
    "JumpReluAutoEncoder": _Form("jumprelu", "jumprelu", False, {**_PLAIN, **_THRESHOLD}),
}
# what a SAELens SAE of ours becomes; standard without b_dec at the input is an AutoEncoderNew
_CLASSES = {
    "standard": "AutoEncoder",
    "gated": "GatedAutoEncoder",
    "topk": "AutoEncoderTopK",
    "jumprelu": "JumpReluAutoEncoder",
}


def has_form(ae: Dictionary) -> bool:
    """A jumprelu needs its threshold, which the top-k family sets in training."""
    is_jumprelu = _FORMS[type(ae).__name__].architecture == "jumprelu"
    return not (is_jumprelu and isinstance(ae, TopKDictionary) and bool(ae.threshold < 0))


def to_saelens(ae: Dictionary, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(cfg.json, tensors) with which SAELens computes the same features and reconstructions.

    The hook has TransformerLens's name, for that is how SAELens loads models unless told otherwise.
    """
    if not has_form(ae):
        raise ValueError(
            f"the threshold of this {type(ae).__name__} is not set: train past threshold_start_step before exporting."
        )
    trainer, buffer = config["trainer"], config.get("buffer", {})
    form = _FORMS[type(ae).__name__]
    state = copy.deepcopy(ae).with_unit_norm().state_dict()
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
            "sae_lens_version": VERSION,
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
            "training_architecture_details": finite(trainer),
        },
    }
    if form.architecture == "topk":
        cfg |= {"k": int(state["k"]), "rescale_acts_by_decoder_norm": False}
    return cfg, tensors


def _turned(ours: str, tensor: Tensor) -> Tensor:
    return tensor.T if ours.endswith(".weight") else tensor


def from_saelens(folder: Path, cfg: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Dictionary, dict[str, Any]]:
    """(SAE, config) of a cfg.json and its tensors; ValueError for what our modules cannot compute."""
    path = folder / FILES[0]
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
    form = _FORMS[dict_class]
    if architecture != "jumprelu" and bool(subtracts) != form.subtracts_b_dec:
        raise ValueError(f"{path} has apply_b_dec_to_input {subtracts}, which no {architecture} SAE here can do.")
    if tensors.keys() != form.names.keys():
        raise ValueError(f"{folder / FILES[1]} must hold {sorted(form.names)}, and holds {sorted(tensors)}.")

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
    ae = build(folder / FILES[1], dict_class, state)
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
