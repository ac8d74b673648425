"""Gemma Scope (google/gemma-scope-*): `params.npz`, all else in the folders' names."""

from collections.abc import Collection
from typing import Any

from ..dictionary import Dictionary, GeneralSAE
from .place import Place, Said, config_of

NAME = "Gemma Scope"
SITES: dict[str, tuple[str, str | None]] = {
    "res": ("resid_post", None),
    "mlp": ("mlp_out", None),
    "att": ("attn_z", None),
    "transcoders": ("ln2.hook_normalized", "mlp_out"),  # read after the norm's division and before its gain
}


def targets(names: Collection[str]) -> list[str]:
    return [""] if "params.npz" in names else []


def read(place: Place) -> tuple[Dictionary, dict[str, Any]]:
    file = place.tensors("params.npz")
    ours = {"wenc": "W_enc", "wdec": "W_dec", "benc": "b_enc", "bdec": "b_dec", "threshold": "threshold"}
    ours |= {"we": "W_enc", "wd": "W_dec", "be": "b_enc", "bd": "b_dec"}  # as some transcoders have them
    tensors = {ours[key]: file.read(name) for name in file.names if (key := name.lower().replace("_", "")) in ours}
    ae = GeneralSAE.folded(tensors, "jump_relu").simplest()
    repo = place.search(r"gemma-scope-(\w+)-(pt|it)-(\w+)")
    size, kind, where = repo.groups() if repo else (None, None, "res")
    site, site_out = SITES.get(where or "res", ("resid_post", None))
    said = Said(
        lm_name=f"google/gemma-2-{size}{'-it' if kind == 'it' else ''}" if size else None,
        layer=place.number(r"layer_(\d+)"),
        site="embed" if place.search(r"(^|/)embedding/") else site,
        site_out=site_out,
        ctx_len=1024,
        prepend_bos=True,
        l0=place.number(r"average_l0_(\d+)"),
    )
    return ae, config_of(place, NAME, ae, said)
