"""SAELens' format: `cfg.json` + `sae_weights.safetensors`.

D activation_dim, F dict_size.
"""

import copy
import math
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..dictionary import Dictionary, GeneralSAE, TopKDictionary
from ..files import finite, write_json, write_safetensors
from .place import Place, Said, config_of, hook_of_place, place_of_hook

NAME = "SAELens"
FILES = ("cfg.json", "sae_weights.safetensors")
VERSION = "6.54.12"  # whose format is written; SAELens drops the metadata of files that name none


def targets(names: Collection[str]) -> list[str]:
    return [""] if set(names) >= set(FILES) else []


def read(place: Place) -> tuple[Dictionary, dict[str, Any]]:
    file, cfg = place.tensors(FILES[1]), place.json(FILES[0])
    # a checkpoint of an unfinished run has its factor beside it, not yet folded in
    factor = place.json_if_there("activation_scaler.json").get("scaling_factor")
    cfg = {**({} if factor is None else {"norm_scaling_factor": factor}), **cfg}
    return from_saelens(place, cfg, {name: file.read(name) for name in file.names})


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

# how each architecture of theirs activates; those of training too, whose checkpoints have thresholds of other names
_ACTIVATIONS = {
    "standard": "relu",
    "gated": "gated",
    "topk": "top_k",
    "abstopk": "abs_top_k",
    "jumprelu": "jump_relu",
    "batchtopk": "jump_relu",
    "matryoshka_batchtopk": "jump_relu",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jump_relu",
    "jumprelu_skip_transcoder": "jump_relu",
}
_NORMALIZERS = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
    "expected_average_only_in": "none",
}
_TENSORS = {
    "r_mag": "r_mag",
    "b_gate": "b_gate",
    "b_mag": "b_enc",
    "topk_threshold": "threshold",
    "scaling_factor": "latent_scale",
    **{name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "log_threshold", "W_skip")},
}


# topk ones it has none of: they are jumprelus with the threshold that training recorded
_TRANSCODERS = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder", "topk": "jumprelu_transcoder"}
_SKIPS = {"transcoder": "skip_transcoder", "jumprelu_transcoder": "jumprelu_skip_transcoder"}


def _site_out(config: dict[str, Any]) -> str | None:
    """Of a transcoder."""
    trainer = config["trainer"]
    site = trainer.get("site") or "resid_post"
    return None if (trainer.get("site_out") or site) == site else trainer["site_out"]


def _architecture(ae: Dictionary, config: dict[str, Any]) -> str | None:
    """As SAELens calls what computes it; None where it has nothing that does.  Its transcoders subtract nothing."""
    architecture = _FORMS[type(ae).__name__].architecture
    if _site_out(config) is None and not ae.is_transcoder:
        return architecture
    if ae.subtracted_D is not None or architecture not in _TRANSCODERS:
        return None
    return _TRANSCODERS[architecture] if ae.W_skip is None else _SKIPS[_TRANSCODERS[architecture]]


def has_form(ae: Dictionary, config: dict[str, Any]) -> bool:
    """A jumprelu needs its threshold, which the top-k family sets in training."""
    architecture = _architecture(ae, config)
    unset = isinstance(ae, TopKDictionary) and bool(ae.threshold < 0)
    return architecture is not None and not (unset and architecture.startswith("jumprelu"))


def to_saelens(ae: Dictionary, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(cfg.json, tensors) with which SAELens computes the same features and reconstructions.

    The hook has TransformerLens's name, for that is how SAELens loads models unless told otherwise.
    """
    architecture = _architecture(ae, config)
    if architecture is None:
        raise ValueError(f"SAELens has no transcoder that computes this {ae.class_name}.")
    if not has_form(ae, config):
        raise ValueError(
            f"the threshold of this {type(ae).__name__} is not set: train past threshold_start_step before exporting."
        )
    trainer, buffer = config["trainer"], config.get("buffer") or {}
    revision = trainer.get("lm_revision")
    form = _FORMS[type(ae).__name__]
    state = copy.deepcopy(ae).with_unit_norm().state_dict()
    tensors = {theirs: state[ours].detach().cpu() for theirs, ours in form.names.items()}
    site_out = _site_out(config)
    tensors = {theirs: _turned(form.names[theirs], tensor).contiguous() for theirs, tensor in tensors.items()}
    if architecture.startswith("jumprelu"):
        tensors.setdefault("threshold", state["threshold"].detach().cpu())
    if "W_skip" in state:
        tensors["W_skip"] = state["W_skip"].detach().cpu().T.contiguous()
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].expand(ae.dict_size).contiguous()
    cfg = {
        "architecture": architecture,
        "d_in": ae.activation_dim,
        "d_sae": ae.dict_size,
        "dtype": str(tensors["W_dec"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": ae.subtracted_D is not None,
        "normalize_activations": "none",  # folded into the biases
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": VERSION,
            "sae_lens_training_version": None,
            "model_name": trainer.get("lm_name"),
            "model_class_name": "HookedTransformer",
            "hook_name": hook_of_place(trainer.get("layer"), trainer.get("site") or "resid_post"),
            **{name: buffer[name] for name in ("hf_hook_name", "hf_hook_name_out") if buffer.get(name)},
            "hook_head_index": None,
            "model_from_pretrained_kwargs": {"revision": revision} if revision else {},
            "context_size": buffer.get("ctx_len"),
            "prepend_bos": bool(buffer.get("prepend_bos", True)),
            "exclude_special_tokens": bool(buffer.get("exclude_special_tokens", buffer.get("mask", False))),
            "dataset_path": buffer.get("dataset"),
            "training_architecture": form.trained_as,
            "training_architecture_details": finite(trainer),
        },
    }
    if architecture == "topk":
        cfg |= {"k": int(state["k"]), "rescale_acts_by_decoder_norm": False}
    if site_out is not None:
        cfg["d_out"] = ae.output_dim
        cfg["metadata"]["hook_name_out"] = hook_of_place(trainer.get("layer"), site_out)
    return cfg, tensors


def _turned(ours: str, tensor: Tensor) -> Tensor:
    return tensor.T if ours.endswith(".weight") else tensor


def from_saelens(
    place: Place, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Dictionary, dict[str, Any]]:
    """(SAE, config) of a cfg.json and its tensors, which are taken over; ValueError for what no class here computes."""
    metadata = cfg.get("metadata")
    cfg = {**cfg, **(metadata if isinstance(metadata, dict) else {})}  # version 5 has no metadata of its own
    ae = _build(f"{place.name}/{FILES[0]}", cfg, tensors)
    if (cfg.get("d_in"), cfg.get("d_sae")) != (ae.activation_dim, ae.dict_size):
        raise ValueError(
            f"{place.name}/{FILES[0]} says d_in {cfg.get('d_in')} and d_sae {cfg.get('d_sae')}, but the weights are "
            f"{ae.activation_dim} and {ae.dict_size}; the two files belong to different SAEs."
        )
    hook = str(cfg.get("hook_name", cfg.get("hook_point")))
    layer, site = place_of_hook(hook)
    site_out = place_of_hook(str(cfg["hook_name_out"]))[1] if cfg.get("hook_name_out") else None
    kwargs = cfg.get("model_from_pretrained_kwargs")
    said = Said(
        lm_name=cfg.get("model_name"),
        lm_revision=kwargs.get("revision") if isinstance(kwargs, dict) else None,
        layer=layer,
        site=site,
        site_out=site_out,
        submodule_name=hook,
        ctx_len=cfg.get("context_size"),
        prepend_bos=cfg.get("prepend_bos"),
        exclude_special_tokens=cfg.get("exclude_special_tokens"),
        l0=cfg.get("l0"),
        trainer={"trainer_class": str(cfg.get("training_architecture") or type(ae).__name__)},
    )
    return ae, config_of(place, NAME, ae, said)


def _build(path: str, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Dictionary:
    architecture = str(cfg.get("architecture", "standard"))
    asked = cfg.get("activation_fn", cfg.get("activation_fn_str"))
    if architecture == "standard" and str(asked).startswith("topk"):  # as version 5 calls it
        architecture = "topk"
    if architecture not in _ACTIVATIONS:
        raise ValueError(f"{path} is of architecture {architecture!r}; {', '.join(_ACTIVATIONS)} can be loaded.")
    way = cfg.get("normalize_activations") or "none"
    normalize = _NORMALIZERS.get("expected_average_only_in" if way is True else str(way))
    if normalize is None:
        raise ValueError(f"{path} has normalize_activations {way!r}; {', '.join(_NORMALIZERS)} can be loaded.")
    scale = 1.0
    if way in (True, "expected_average_only_in"):
        scale = cfg.get("norm_scaling_factor")
        if not isinstance(scale, int | float) or not 0 < scale < math.inf:
            scale = 1.0
            warnings.warn(
                f"{path} does not say by what activations were scaled (norm_scaling_factor), so they are taken as they "
                "are.",
                stacklevel=5,
            )
    unknown = sorted(tensors.keys() - _TENSORS.keys())
    missing = sorted({"W_enc", "W_dec"} - tensors.keys())
    if unknown or missing:
        raise ValueError(f"{path}: the weights have {unknown} that are not known, and lack {missing}.")
    if not cfg.get("finetuning_scaling_factor"):
        tensors = {name: tensor for name, tensor in tensors.items() if name != "scaling_factor"}
    own = {_TENSORS[name]: tensor for name, tensor in tensors.items()}
    if "W_skip" in own:
        own["W_skip"] = own["W_skip"].t()
    activation, k = _ACTIVATIONS[architecture], None
    needed = {"gated": {"b_gate", "r_mag", "b_enc"}, "jump_relu": {"threshold"}}.get(activation, set())
    if not needed <= own.keys() | ({"threshold"} if "log_threshold" in own else set()):
        raise ValueError(f"{path}: the weights of a {architecture} SAE must hold {sorted(needed)}.")
    if activation in ("top_k", "abs_top_k"):
        own.pop("threshold", None)
        k = cfg.get("k", (cfg.get("activation_fn_kwargs") or {}).get("k"))
        if not isinstance(k, int):
            raise ValueError(f"{path} must say k, the number of active latents, as an integer; it says {k!r}.")
    return GeneralSAE.folded(
        own,
        activation,
        k,
        normalize=normalize,
        undo="transcoder" not in architecture,  # theirs normalise what they read, and predict what is not normalised
        subtracts_b_dec=bool(cfg.get("apply_b_dec_to_input", True)) and "transcoder" not in architecture,
        scale_in=scale,
        scale_out=scale,
        decoder_norm="unit" if cfg.get("rescale_acts_by_decoder_norm") else None,
    ).simplest()
