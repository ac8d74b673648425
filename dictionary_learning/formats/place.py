"""Where an SAE lies: a folder or a file, here or on the Hub, and the files beside it; and what is said of it."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..dictionary import Dictionary
from ..files import TensorFile, read_json, read_yaml


@dataclass
class Place:
    """A folder, or one file of it.

    name: as the user gave it, but all of its path. names: the files of the folder and of those in it, by relative path.
    get: the file of such a name on this machine, downloaded if need be. target: the file that is the SAE, "" for the
    folder. get_above: as get, for the folder above; None where it has no such file. opened: the files of tensors that
    were asked for.
    """

    name: str
    names: Collection[str]
    get: Callable[[str], Path]
    target: str = ""
    get_above: Callable[[str], Path | None] = lambda file: None
    opened: list[TensorFile] = field(default_factory=list)

    def json(self, file: str) -> dict[str, Any]:
        return read_json(self.get(file))

    def json_if_there(self, file: str) -> dict[str, Any]:
        return self.json(file) if file in self.names else {}

    def json_above(self, file: str) -> dict[str, Any]:
        path = self.get_above(file)
        return {} if path is None else read_json(path)

    def yaml_if_there(self, file: str) -> dict[str, Any]:
        return read_yaml(self.get(file)) if file in self.names else {}

    def tensors(self, file: str) -> TensorFile:
        self.opened.append(TensorFile(self.get(file)))
        return self.opened[-1]

    def search(self, pattern: str) -> re.Match[str] | None:
        """In the name of the place, the file included: what many publishers say nowhere else.

        The last match, as a folder above may be called alike.
        """
        return next(reversed([*re.finditer(pattern, f"{self.name}/{self.target}")]), None)

    def number(self, pattern: str) -> int | None:
        found = self.search(pattern)
        return None if found is None else int(found[1])


# Of TransformerLens's hooks and of Hugging Face's modules, which come after the block. The output of a module that some
# families pass through one more norm keeps its own name: `mlp_out` is what comes out of that norm.
SITES = {
    "": "resid_post",
    "hook_resid_post": "resid_post",
    "hook_resid_mid": "resid_mid",
    "hook_resid_pre": "resid_pre",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "hook_mlp_in": "mlp_in",
    "mlp.hook_in": "mlp_in",
    "mlp.hook_out": "mlp",
    "attn.hook_z": "attn_z",
    "output": "resid_post",
    "mlp.input": "mlp_in",
    "self_attn.o_proj.input": "attn_z",
    "pre_feedforward_layernorm.output": "mlp_in",
    "post_feedforward_layernorm.output": "mlp_out",
}


def place_of_hook(hook: str) -> tuple[int | None, str]:
    """(layer, site) of a hook of TransformerLens or a module of Hugging Face; what has no name here keeps its own, as
    the path of a module in the block.

    What goes into block L is what comes out of block L - 1.
    """
    found = re.fullmatch(r"(?:.*\.)?(\d+)(?:\.(.*))?", hook)
    if found is None:
        return None, hook
    layer, rest = int(found[1]), found[2] or ""
    site = SITES.get(rest, rest)
    return (layer - 1, "resid_post") if site == "resid_pre" and layer > 0 else (layer, site)


HOOKS = {  # TransformerLens's, of block L
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "attn_z": "attn.hook_z",
    "mlp_in": "mlp.hook_in",
    "mlp_out": "hook_mlp_out",
    "mlp": "mlp.hook_out",
}


def hook_of_place(layer: int | None, site: str) -> str | None:
    """The other way round: TransformerLens's name; a module's path comes without its {layer}; None without a layer."""
    if layer is None:
        return "hook_embed" if site == "embed" else None
    if "{layer}" in site:
        return site.replace("{layer}", str(layer))
    return f"blocks.{layer}.{HOOKS.get(site, site)}"


@dataclass
class Said:
    """What a publisher says of an SAE, in names or configs; None where nothing is said."""

    lm_name: str | None = None
    lm_revision: str | None = None
    layer: int | None = None
    site: str = "resid_post"
    site_out: str | None = None  # of a transcoder
    submodule_name: str | None = None  # the hook as they name it
    ctx_len: int | None = None
    prepend_bos: bool | None = None
    exclude_special_tokens: bool | list[int] | None = None
    l0: float | None = None
    frac_variance_explained: float | None = None
    trainer: dict[str, Any] = field(default_factory=dict)  # more for config["trainer"]


def config_of(place: Place, family: str, ae: Dictionary, said: Said) -> dict[str, Any]:
    """The config of an SAE in the form of config.json, whatever the family (`formats.load_dictionary`)."""
    if said.site_out in (None, said.site) and ae.output_dim != ae.activation_dim:
        raise ValueError(
            f"it takes {ae.activation_dim} dimensions and gives {ae.output_dim}, though it is no transcoder"
        )
    trainer = {
        "trainer_class": said.trainer.get("trainer_class", type(ae).__name__),
        "dict_class": ae.class_name,
        "activation_dim": ae.activation_dim,
        "dict_size": ae.dict_size,
        "layer": said.layer,
        "lm_name": said.lm_name,
        **({"lm_revision": said.lm_revision} if said.lm_revision else {}),
        "submodule_name": said.submodule_name or said.site,
        "site": said.site,
        "site_out": said.site_out or said.site,
        **said.trainer,
    }
    if ae.output_dim != ae.activation_dim or ae.is_transcoder:
        trainer["output_dim"] = ae.output_dim
    k = getattr(ae, "k", None)
    if k is not None:
        trainer["k"] = int(k)
    stated = {"l0": said.l0, "frac_variance_explained": said.frac_variance_explained}
    source = {
        "format": family,
        "path": place.name,
        "prepend_bos": said.prepend_bos,
        "exclude_special_tokens": said.exclude_special_tokens,
        "stated": {key: float(value) for key, value in stated.items() if isinstance(value, int | float)},
    }
    return {"trainer": trainer, "buffer": {"ctx_len": said.ctx_len}, "source": source}
