"""circuit-tracer's folder of per-layer transcoders: `layer_{i}.safetensors`, with `config.yaml`.

D activation_dim, F dict_size, E output_dim.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..dictionary import Dictionary, GeneralSAE
from ..files import write_atomic, write_safetensors
from .place import Place, Said, config_of, hook_of_place, place_of_hook

NAME = "circuit-tracer"
CONFIGS = ("config.yaml", "wandb-config.yaml", "wanb-config.yaml")  # the last as it is published


def targets(names: Collection[str]) -> list[str]:
    if any(re.fullmatch(r"W_enc_\d+\.safetensors", name) for name in names):
        return [""]
    layers = [name for name in names if re.fullmatch(r"layer_\d+\.safetensors", name)]
    return sorted(layers, key=lambda name: int(re.findall(r"\d+", name)[0]))


def read(place: Place) -> tuple[Dictionary, dict[str, Any]]:
    if not place.target:
        raise ValueError(f"{place.name} holds cross-layer transcoders, which cannot be loaded.")
    file = place.tensors(place.target)
    cfg = next((cfg for name in CONFIGS if (cfg := place.yaml_if_there(name))), {})
    tensors = {name: file.read(name) for name in ("W_dec", "b_enc", "b_dec") if name in file.names}
    tensors |= {name: file.turned(name) for name in ("W_enc", "W_skip") if name in file.names}
    activation, k = "relu", None
    if "activation_function.threshold" in file.names:
        activation, tensors["threshold"] = "jump_relu", file.read("activation_function.threshold")
    elif str(cfg.get("activation", "")).lower().replace("_", "") == "topk":
        activation, k = "signed_top_k", cfg.get("k")  # theirs keeps what is below 0
    ae = GeneralSAE.folded(tensors, activation, k).simplest()
    layer = int(re.findall(r"\d+", place.target)[0])
    hooks = [str(cfg.get(key, default)) for key, default in HOOKS.items()]
    site, site_out = (place_of_hook(f"{layer}.{hook}")[1] for hook in hooks)
    qwen = place.search(r"qwen3-(\d+(?:\.\d+)?)b")  # some of these have no config
    lm_name = cfg.get("model_name") or (f"Qwen/Qwen3-{qwen[1]}B" if qwen else None)
    said = Said(lm_name=lm_name, layer=layer, site=site, site_out=site_out, submodule_name=hooks[0])
    return ae, config_of(place, NAME, ae, said)


def write(folder: Path, saes: Mapping[int, Dictionary], trainer: Mapping[str, Any]) -> None:
    """The transcoders of all layers of a model, as circuit-tracer's loader opens them.

    trainer: of the config of any of them.  The top-k family goes by the threshold that it recorded in training.
    """
    for layer, ae in saes.items():
        state = ae.state_dict()
        tensors = {
            "W_enc": ae.encoder_FD,
            "W_dec": ae.decoder_FD,
            "b_enc": state[ae.encoder_bias],
            "b_dec": state[ae.output_bias],
        }
        if ae.W_skip is not None:
            tensors["W_skip"] = ae.W_skip.T
        if "threshold" in state:
            tensors["activation_function.threshold"] = state["threshold"].clamp(min=0).expand(ae.dict_size)
        detached = {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
        write_safetensors(folder / f"layer_{layer}.safetensors", detached)
    sites = zip(HOOKS, (trainer["site"], trainer["site_out"]), strict=True)
    hooks = {key: str(hook_of_place(0, site)).removeprefix("blocks.0.") for key, site in sites}
    lines = {"model_name": trainer["lm_name"], "model_kind": "transcoder_set", **hooks}
    text = "".join(f"{key}: {json.dumps(line)}\n" for key, line in lines.items())
    write_atomic(folder / "config.yaml", text.encode())


HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
