"""Published SAEs of every family, written to its definition: what ours makes of them is what the formula says.

B tokens, D activation_dim, E output_dim, F dict_size.
"""

import json
import math
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from mutations import mutations
from saes import Malice
from safetensors.torch import save_file
from torch import Tensor

from dictionary_learning.dictionary import AutoEncoderTopK, GeneralSAE
from dictionary_learning.formats import find_saes, load_dictionary
from dictionary_learning.formats.__main__ import main as convert
from dictionary_learning.results import said_by
from dictionary_learning.start import find_starts, load_start
from dictionary_learning.trainers import StandardTrainerAprilUpdate, TopKTrainer

B, D, E, F, K = 40, 8, 6, 24, 3


def tensors(n_out: int = D, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D, F), "W_dec": (F, n_out), "b_enc": (F,), "b_dec": (n_out,), "W_skip": (D, n_out)}
    made = {name: torch.randn(shape, generator=draw) / 3 for name, shape in shapes.items()}
    return made | {"threshold": 0.3 * torch.rand(F, generator=draw)}


@pytest.fixture
def x_BD():
    return 4 * torch.randn(B, D, generator=torch.Generator().manual_seed(1)) + 1


def linears(t: dict[str, Tensor], enc: str = "encoder", dec: str = "decoder") -> dict[str, Tensor]:
    return {
        f"{enc}.weight": t["W_enc"].T.contiguous(),
        f"{enc}.bias": t["b_enc"],
        f"{dec}.weight": t["W_dec"].T.contiguous(),
        f"{dec}.bias": t["b_dec"],
    }


def jump(pre_BF: Tensor, threshold: Tensor | float) -> Tensor:
    return torch.where(pre_BF > threshold, pre_BF, 0).relu()


def top(pre_BF: Tensor, k: int = K, score_BF: Tensor | None = None) -> Tensor:
    best = (pre_BF.relu() if score_BF is None else score_BF).topk(k).indices
    return torch.zeros_like(pre_BF).scatter(-1, best, pre_BF.relu().gather(-1, best))


def check(name: Path | str, x_BD: Tensor, f_BF: Tensor, y_BE: Tensor, **said) -> None:
    ae, config = load_dictionary(name)
    y, f = ae(x_BD, output_features=True)
    torch.testing.assert_close(ae.encode(x_BD), f_BF, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y, y_BE, rtol=1e-5, atol=1e-5)
    everything = config["trainer"] | config["source"] | config["source"]["stated"]
    assert {key: everything.get(key) for key in said} == said


def folder(tmp_path: Path, name: str, files: dict[str, dict]) -> Path:
    """Files by name: JSON, tensors, or what torch.save takes."""
    for file, content in files.items():
        path = tmp_path / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".json", ".yaml"):
            path.write_text(json.dumps(content))  # JSON is YAML
        elif path.suffix == ".npz":
            np.savez(path, **{key: value.numpy() for key, value in content.items()})
        elif path.suffix == ".safetensors":
            save_file({key: value.contiguous() for key, value in content.items()}, path)
        else:
            torch.save(content, path)
    return tmp_path / name


def test_gemma_scope(tmp_path, x_BD):
    t = tensors()
    t.pop("W_skip")
    name = "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
    path = folder(tmp_path, name, {"params.npz": t})
    f_BF = jump(x_BD @ t["W_enc"] + t["b_enc"], t["threshold"])
    said = dict(
        format="Gemma Scope", layer=20, site="resid_post", lm_name="google/gemma-2-2b", l0=71.0, prepend_bos=True
    )
    check(path, x_BD, f_BF, f_BF @ t["W_dec"] + t["b_dec"], **said)
    assert find_saes(tmp_path) == [path]


def test_what_a_name_tells_is_told_from_within_and_below_alike_names(tmp_path, monkeypatch):
    gemma, sparsify = (published(tensors())[name] for name in ("gemma", "layers.5"))
    path = folder(tmp_path / "layer_5" / "average_l0_3", "gemma-scope-2b-pt-res/layer_20/average_l0_71", gemma)
    for name, inside in ((path, tmp_path), (".", path), ("params.npz", path), ("../average_l0_71", path)):
        monkeypatch.chdir(inside)
        _, config = load_dictionary(name)
        assert config["trainer"]["layer"] == 20 and config["source"]["stated"] == {"l0": 71.0}
    monkeypatch.chdir(folder(tmp_path, "layers.7", sparsify))
    assert [load_dictionary(name)[1]["trainer"]["layer"] for name in (".", "sae.safetensors")] == [7, 7]


@pytest.mark.parametrize("affine", [False, True])
def test_gemma_scope_2_transcoders(affine, tmp_path, x_BD):
    t = tensors(E)
    stored = {name.lower(): t[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    if affine:
        stored["affine_skip_connection"] = t["W_skip"]
    block = "model.layers.7"
    cfg = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-1b-pt",
        "hf_hook_point_in": f"{block}.pre_feedforward_layernorm.output",
        "hf_hook_point_out": f"{block}.post_feedforward_layernorm.output",
        "l0": 20,
    }
    files = {"params.safetensors": stored, "config.json": cfg}
    path = folder(tmp_path, "transcoder_all/layer_7_width_16k_l0_small", files)
    f_BF = jump(x_BD @ t["W_enc"] + t["b_enc"], t["threshold"])
    y_BE = f_BF @ t["W_dec"] + t["b_dec"] + (x_BD @ t["W_skip"] if affine else 0)
    said = dict(layer=7, site="mlp_in", site_out="mlp_out", lm_name="google/gemma-3-1b-pt", l0=20.0)
    check(path, x_BD, f_BF, y_BE, **said)


def test_qwen_scope(tmp_path, x_BD):
    t = tensors()
    stored = {"W_enc": t["W_enc"].T, "W_dec": t["W_dec"].T, "b_enc": t["b_enc"], "b_dec": t["b_dec"]}
    cfg = {"model_type": "topk_sae", "base_model": "Qwen/Qwen3-1.7B", "k": K}
    path = folder(tmp_path, "Qwen", {"layer3.sae.pt": stored, "layer12.sae.pt": stored, "config.json": cfg})
    f_BF = top(x_BD @ t["W_enc"] + t["b_enc"])
    check(path / "layer12.sae.pt", x_BD, f_BF, f_BF @ t["W_dec"] + t["b_dec"], layer=12, k=K, lm_name="Qwen/Qwen3-1.7B")
    assert [sae.name for sae in find_saes(tmp_path)] == ["layer3.sae.pt", "layer12.sae.pt"]
    with pytest.raises(ValueError, match="holds 2 SAEs"):
        load_dictionary(path)


@pytest.mark.parametrize("kind", ["sae", "transcoder", "skip", "groupmax", "signed"])
def test_sparsify(kind, tmp_path, x_BD):
    t = tensors()
    stored = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    cfg = {"activation": "groupmax" if kind == "groupmax" else "topk", "k": K, "d_in": D, "num_latents": F}
    transcode = kind in ("transcoder", "skip")
    cfg |= {"transcode": transcode, "skip_connection": kind == "skip", "signed": kind == "signed"}
    if kind == "skip":
        stored["W_skip"] = t["W_skip"].T  # x @ W_skip.T
    path = folder(tmp_path, "layers.5.mlp", {"cfg.json": cfg, "sae.safetensors": stored})
    pre_BF = (x_BD if transcode else x_BD - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    if kind == "groupmax":
        groups_BKf = pre_BF.relu().unflatten(-1, (K, -1))
        f_BF = torch.where(groups_BKf == groups_BKf.amax(-1, keepdim=True), groups_BKf, 0).flatten(1)
    elif kind == "signed":
        best = pre_BF.abs().topk(K).indices
        f_BF = torch.zeros_like(pre_BF).scatter(-1, best, pre_BF.gather(-1, best))
    else:
        f_BF = top(pre_BF)
    y_BD = f_BF @ t["W_dec"] + t["b_dec"] + (x_BD @ t["W_skip"] if kind == "skip" else 0)
    check(
        path,
        x_BD,
        f_BF,
        y_BD,
        format="sparsify",
        layer=5,
        site="mlp_in" if transcode else "mlp",
        site_out="mlp",
    )


def test_llama_scope(tmp_path, x_BD):
    """Features fire above theta in units of raw activations: pre = s x W + b has to pass s theta."""
    t, theta, norm = tensors(), 0.2, 5.0
    cfg = {
        "hook_point_in": "blocks.15.hook_resid_post",
        "jump_relu_threshold": theta,
        "dataset_average_activation_norm": {"in": norm, "out": norm},
    }
    files = {"hyperparams.json": cfg, "checkpoints/final.safetensors": linears(t)}
    path = folder(tmp_path, "Llama3_1-8B-Base-L15R-8x", files)
    s = math.sqrt(D) / norm
    f_BF = jump(s * x_BD @ t["W_enc"] + t["b_enc"], theta * s)
    y_BD = (f_BF @ t["W_dec"] + t["b_dec"]) / s
    check(path, x_BD, f_BF, y_BD, layer=15, site="resid_post", lm_name="meta-llama/Llama-3.1-8B")
    assert find_saes(tmp_path) == [path]


def test_a_transcoder_of_llama_scope_says_its_places(tmp_path, x_BD):
    t, theta, norms = tensors(), 0.2, {"in": 5.0, "out": 2.0}
    cfg = {"hook_point_in": "blocks.15.ln2.hook_normalized", "hook_point_out": "blocks.15.hook_mlp_out"}
    cfg |= {"jump_relu_threshold": theta, "dataset_average_activation_norm": norms}
    files = {"hyperparams.json": cfg, "checkpoints/final.safetensors": linears(t)}
    path = folder(tmp_path, "Llama3_1-8B-Base-L15TC-8x", files)
    s_in, s_out = (math.sqrt(D) / norm for norm in norms.values())
    f_BF = jump(s_in * x_BD @ t["W_enc"] + t["b_enc"], theta * s_in)
    y_BD = (f_BF @ t["W_dec"] + t["b_dec"]) / s_out
    check(path, x_BD, f_BF, y_BD, layer=15, site="ln2.hook_normalized", site_out="mlp_out")


@pytest.mark.parametrize("keys", [None, ("in", "out"), ("in",), ("blocks.3.hook_resid_post",)])
def test_llama_scope_r1(keys, tmp_path, x_BD):
    t, norm = tensors(), 5.0
    stored = linears(t) | {"log_jumprelu_threshold": t["threshold"].log()}
    cfg = {"d_model": D, "hook_point_in": "blocks.3.hook_resid_post"}
    cfg["dataset_average_activation_norm"] = norm if keys is None else dict.fromkeys(keys, norm)
    path = folder(tmp_path, "L3R", {"config.json": cfg, "sae_weights.safetensors": stored})
    s = math.sqrt(D) / norm
    f_BF = jump(s * x_BD @ t["W_enc"] + t["b_enc"], t["threshold"])
    check(path, x_BD, f_BF, (f_BF @ t["W_dec"] + t["b_dec"]) / s, layer=3, format="Llama Scope R1")


@pytest.mark.parametrize("act_fn", ["topk", "jumprelu"])
def test_llamascopium(act_fn, tmp_path, x_BD):
    """What is kept is told by pre-activations times decoder norms; the features are the pre-activations."""
    t = tensors(E)
    hook_in, hook_out, norms = "blocks.4.ln2.hook_normalized", "blocks.4.hook_mlp_out", (5.0, 3.0)
    stored = {"W_E": t["W_enc"], "b_E": t["b_enc"], "W_D": t["W_dec"], "b_D": t["b_dec"]}
    stored |= {
        f"dataset_average_activation_norm.{h}": torch.tensor(n) for h, n in zip((hook_in, hook_out), norms, strict=True)
    }
    if act_fn == "jumprelu":
        stored["activation_function.log_jumprelu_threshold"] = t["threshold"].log()
    cfg = {"sae_type": "sae", "act_fn": act_fn, "top_k": K, "hook_point_in": hook_in, "hook_point_out": hook_out}
    cfg |= {"norm_activation": "dataset-wise"}
    path = folder(tmp_path, "layer4", {"config.json": cfg, "sae_weights.safetensors": stored})
    s_in, s_out = math.sqrt(D) / norms[0], math.sqrt(E) / norms[1]
    pre_BF, norm_F = s_in * x_BD @ t["W_enc"] + t["b_enc"], t["W_dec"].norm(dim=1)
    f_BF = top(pre_BF, score_BF=pre_BF.relu() * norm_F)
    if act_fn == "jumprelu":
        f_BF = torch.where(pre_BF * norm_F > t["threshold"], pre_BF, 0).relu()
    check(path, x_BD, f_BF, (f_BF @ t["W_dec"] + t["b_dec"]) / s_out, layer=4, site_out="mlp_out")


def test_goodfire_and_qresearch(tmp_path, x_BD):
    t = tensors()
    f_BF = (x_BD @ t["W_enc"] + t["b_enc"]).relu()
    names = {"Llama-3.1-8B-Instruct-SAE-l19.pth": ("encoder_linear", "decoder_linear")}
    names |= {"DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt": ("encoder", "decoder")}
    for name, pair in names.items():
        path = folder(tmp_path, "repo", {name: linears(t, *pair)}) / name
        check(path, x_BD, f_BF, f_BF @ t["W_dec"] + t["b_dec"], layer=19)
    assert len(find_saes(tmp_path)) == 2


@pytest.mark.parametrize("activation", ["TopK", "ReLU"])
def test_openai(activation, tmp_path, x_BD):
    t = tensors()
    state = {"pre_bias": t["b_dec"], "latent_bias": t["b_enc"], "stats_last_nonzero": torch.zeros(F)}
    state |= {"encoder.weight": t["W_enc"].T, "decoder.weight": t["W_dec"].T, "activation": activation}
    if activation == "TopK":
        state["activation_state_dict"] = {"k": K, "postact_fn": "ReLU"}
    path = folder(tmp_path, "resid_post_mlp", {"layer_6.pt": state}) / "layer_6.pt"
    mean, std = x_BD.mean(-1, keepdim=True), x_BD.std(-1, keepdim=True)
    z_BD = (x_BD - mean) / (std + 1e-5) if activation == "TopK" else x_BD
    pre_BF = (z_BD - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    f_BF = top(pre_BF) if activation == "TopK" else pre_BF.relu()
    y_BD = f_BF @ t["W_dec"] + t["b_dec"]
    if activation == "TopK":
        y_BD = y_BD * std + mean
    check(path, x_BD, f_BF, y_BD, layer=6, site="resid_post")


@pytest.mark.parametrize("kind", ["relu", "jump_relu", "skip"])
def test_circuit_tracer(kind, tmp_path, x_BD):
    t = tensors(E)
    stored = {"W_enc": t["W_enc"].T, "W_dec": t["W_dec"], "b_enc": t["b_enc"], "b_dec": t["b_dec"]}
    if kind == "jump_relu":
        stored["activation_function.threshold"] = t["threshold"]
    if kind == "skip":
        stored["W_skip"] = t["W_skip"].T
    cfg = {"model_name": "Qwen/Qwen3-4B", "feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    path = folder(tmp_path, "plt", {"layer_9.safetensors": stored, "config.yaml": cfg})
    pre_BF = x_BD @ t["W_enc"] + t["b_enc"]
    f_BF = jump(pre_BF, t["threshold"]) if kind == "jump_relu" else pre_BF.relu()
    y_BE = f_BF @ t["W_dec"] + t["b_dec"] + (x_BD @ t["W_skip"] if kind == "skip" else 0)
    check(path / "layer_9.safetensors", x_BD, f_BF, y_BE, layer=9, site="mlp_in", site_out="mlp")


def test_hook_z(tmp_path, x_BD):
    t = tensors()
    stored = {name: t[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    cfg = {"act_size": D, "dict_size": F, "act_name": "blocks.5.attn.hook_z"}
    path = folder(tmp_path, "z", {"gpt2_L5.pt": stored, "gpt2_L5_cfg.json": cfg}) / "gpt2_L5.pt"
    f_BF = ((x_BD - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    check(path, x_BD, f_BF, f_BF @ t["W_dec"] + t["b_dec"], layer=5, site="attn_z")


def saelens(architecture: str, t: dict[str, Tensor], **cfg) -> dict[str, dict]:
    stored = {name: t[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    base = {"architecture": architecture, "d_in": D, "d_sae": F, "apply_b_dec_to_input": False}
    metadata = {"model_name": "gpt2", "hook_name": "blocks.3.hook_resid_post"}
    return {"cfg.json": base | {"metadata": metadata} | cfg, "sae_weights.safetensors": stored}


@pytest.mark.parametrize("way", ["layer_norm", "constant_norm_rescale"])
def test_saelens_normalisations_equal_saelens_own(way, tmp_path, x_BD):
    sae_lens = pytest.importorskip("sae_lens")
    t = tensors()
    files = saelens("jumprelu", t, normalize_activations=way)
    files["sae_weights.safetensors"]["threshold"] = t["threshold"]
    config = sae_lens.JumpReLUSAEConfig(d_in=D, d_sae=F, normalize_activations=way, apply_b_dec_to_input=False)
    theirs = sae_lens.JumpReLUSAE(config)
    theirs.load_state_dict(files["sae_weights.safetensors"])
    with torch.no_grad():
        f_BF = theirs.encode(x_BD)
        y_BD = theirs.decode(f_BF)
    check(folder(tmp_path, "sae", files), x_BD, f_BF, y_BD, layer=3)


def test_saelens_checkpoints_and_transcoders(tmp_path, x_BD):
    t = tensors(E)
    f_BF = jump(x_BD @ t["W_enc"] + t["b_enc"], t["threshold"])
    y_BE = f_BF @ t["W_dec"] + t["b_dec"] + x_BD @ t["W_skip"]
    files = saelens("jumprelu_skip_transcoder", t, hook_name_out="blocks.3.hook_mlp_out")
    files["sae_weights.safetensors"] |= {"log_threshold": t["threshold"].log(), "W_skip": t["W_skip"].T}
    check(folder(tmp_path, "a", files), x_BD, f_BF, y_BE, site_out="mlp_out")
    files = saelens("batchtopk", tensors())
    files["sae_weights.safetensors"]["topk_threshold"] = torch.tensor(0.3)
    t = tensors()
    f_BF = jump(x_BD @ t["W_enc"] + t["b_enc"], 0.3)
    check(folder(tmp_path, "b", files), x_BD, f_BF, f_BF @ t["W_dec"] + t["b_dec"])


def test_an_older_saelens_folder(tmp_path, x_BD):
    """Version 5: its own names, defaults and a scaling_factor of ones."""
    t = tensors()
    stored = {name: t[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")} | {"scaling_factor": torch.ones(F)}
    cfg = {"d_in": D, "d_sae": F, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "model_name": "gpt2"}
    cfg |= {"hook_name": "blocks.3.hook_resid_post", "finetuning_scaling_factor": False, "normalize_activations": None}
    f_BF = top((x_BD - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    path = folder(tmp_path, "old", {"cfg.json": cfg, "sae_weights.safetensors": stored})
    check(path, x_BD, f_BF, f_BF @ t["W_dec"] + t["b_dec"], layer=3, k=K)


@pytest.mark.parametrize("architecture", ["topk", "gated"])
def test_what_does_not_subtract_b_dec_is_converted_exactly(architecture, tmp_path, x_BD):
    t = tensors()
    files = saelens(architecture, t, k=K)
    if architecture == "gated":
        stored = files["sae_weights.safetensors"]
        stored |= {"b_gate": t["b_enc"], "b_mag": stored.pop("b_enc") / 2, "r_mag": t["threshold"]}
    source, target = folder(tmp_path, "sae", files), tmp_path / "ours"
    assert convert([str(source), str(target)]) == 0
    (one, _), (other, config) = load_dictionary(source), load_dictionary(target)
    torch.testing.assert_close(one.encode(x_BD), other.encode(x_BD), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one(x_BD), other(x_BD), rtol=1e-5, atol=1e-5)
    assert config["source"]["format"] == "SAELens" and config["source"]["path"] == str(source)


def test_a_jumprelu_that_subtracts_b_dec_is_the_same_in_both_files(tmp_path, x_BD):
    files = saelens("jumprelu", t := tensors(), apply_b_dec_to_input=True)
    files["sae_weights.safetensors"]["threshold"] = t["threshold"]
    assert convert([str(folder(tmp_path, "sae", files)), str(tmp_path / "ours")]) == 0
    f_BF = jump((x_BD - t["b_dec"]) @ t["W_enc"] + t["b_enc"], t["threshold"])
    check(tmp_path / "ours", x_BD, f_BF, f_BF @ t["W_dec"] + t["b_dec"])
    started = load_start(str(tmp_path / "sae"))
    again = type(started).from_state(started.state_dict())  # what a trainer takes over
    torch.testing.assert_close(again.encode(x_BD), f_BF, rtol=1e-5, atol=1e-5)
    (tmp_path / "ours" / "ae.pt").unlink()
    check(tmp_path / "ours", x_BD, f_BF, f_BF @ t["W_dec"] + t["b_dec"])


def test_a_jumprelu_that_subtracts_b_dec_is_shifted_as_one(tmp_path, x_BD):
    files = saelens("jumprelu", t := tensors(), apply_b_dec_to_input=True)
    files["sae_weights.safetensors"]["threshold"] = t["threshold"]
    ae, _ = load_dictionary(folder(tmp_path, "sae", files))
    before, mean_D = ae(x_BD), torch.linspace(-1, 1, D)
    ae.shift(mean_D)
    torch.testing.assert_close(ae(x_BD + mean_D), before + mean_D, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "site, hook", [("mlp_out", "hook_mlp_out"), ("att", "attn.hook_z"), ("res", "hook_resid_post")]
)
def test_a_converted_sae_tells_saelens_its_place(site, hook, tmp_path):
    t = tensors()
    t.pop("W_skip")
    repo = {"mlp_out": "mlp"}.get(site, site)
    path = folder(tmp_path, f"google/gemma-scope-2b-pt-{repo}/layer_4/width_16k/average_l0_9", {"params.npz": t})
    assert convert([str(path), str(tmp_path / "ours")]) == 0
    assert json.loads((tmp_path / "ours" / "cfg.json").read_text())["metadata"]["hook_name"] == f"blocks.4.{hook}"
    (tmp_path / "ours" / "ae.pt").unlink()
    said = load_dictionary(tmp_path / "ours")[1]["trainer"]
    assert (said["layer"], said["lm_name"]) == (4, "google/gemma-2-2b")


def test_a_converted_transcoder_is_one_to_saelens_too(tmp_path, x_BD):
    t = tensors()
    stored = {"W_enc": t["W_enc"].T, "W_dec": t["W_dec"], "b_enc": t["b_enc"], "b_dec": t["b_dec"]}
    path = folder(tmp_path, "plt", {"layer_9.safetensors": stored}) / "layer_9.safetensors"
    assert convert([str(path), str(tmp_path / "ours")]) == 0
    cfg = json.loads((tmp_path / "ours" / "cfg.json").read_text())
    assert cfg["architecture"] == "transcoder" and cfg["d_out"] == D
    assert cfg["metadata"]["hook_name_out"] == "blocks.9.hook_mlp_out"
    f_BF = (x_BD @ t["W_enc"] + t["b_enc"]).relu()
    for _ in range(2):  # as ours, then as SAELens's
        check(tmp_path / "ours", x_BD, f_BF, f_BF @ t["W_dec"] + t["b_dec"], site="mlp_in", site_out="mlp_out")
        (tmp_path / "ours" / "ae.pt").unlink(missing_ok=True)


def starts_of(path: Path, trainer: type) -> list[str]:
    return find_starts(str(path), [{"activation_dim": D, "dict_size": F, "layer": 3, "trainer": trainer}], {})[0]


def test_what_one_of_our_classes_computes_can_be_a_start(tmp_path, x_BD):
    """A TopK SAE that subtracts nothing from its input, as ours does."""
    t = tensors()
    stored = {"W_enc": t["W_enc"].T, "W_dec": t["W_dec"].T, "b_enc": t["b_enc"], "b_dec": t["b_dec"]}
    path = folder(tmp_path, "Qwen", {"layer3.sae.pt": stored, "config.json": {"k": K}}) / "layer3.sae.pt"
    (name,) = starts_of(path, TopKTrainer)
    ae = load_start(name)
    assert type(ae) is AutoEncoderTopK
    f_BF = top(x_BD @ t["W_enc"] + t["b_enc"])
    torch.testing.assert_close(ae.encode(x_BD), f_BF, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ae(x_BD), f_BF @ t["W_dec"] + t["b_dec"], rtol=1e-5, atol=1e-5)


def test_a_transcoder_and_what_no_trained_class_computes_are_no_start(tmp_path):
    t = tensors()
    stored = {"W_enc": t["W_enc"].T, "W_dec": t["W_dec"], "b_enc": t["b_enc"], "b_dec": t["b_dec"]}
    transcoder = folder(tmp_path, "plt", {"layer_3.safetensors": stored}) / "layer_3.safetensors"
    with pytest.raises(ValueError, match=f"--init_from {transcoder} is a transcoder, and what is trained is none"):
        starts_of(transcoder, StandardTrainerAprilUpdate)
    normed = folder(tmp_path, "lens", saelens("topk", t, k=K, normalize_activations="layer_norm"))
    with pytest.raises(ValueError, match="is of class GeneralSAE, and TopKTrainer trains AutoEncoderTopK"):
        starts_of(normed, TopKTrainer)


def test_the_weights_file_of_a_folder_stands_for_the_folder(tmp_path):
    path = folder(tmp_path, "sae", {"params.npz": published(tensors())["gemma"]["params.npz"]})
    (one, config), (other, again) = load_dictionary(path), load_dictionary(path / "params.npz")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert config == again


def test_a_checkpoint_of_saelens_has_its_scale_beside_it(tmp_path, x_BD):
    t, s = tensors(), 0.5
    files = saelens("standard", t, normalize_activations="expected_average_only_in", apply_b_dec_to_input=True)
    path = folder(tmp_path, "sae", files | {"activation_scaler.json": {"scaling_factor": s}})
    f_BF = ((s * x_BD - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    check(path, x_BD, f_BF, (f_BF @ t["W_dec"] + t["b_dec"]) / s)


@pytest.mark.parametrize("family", ["SAELens", "Llama Scope R1"])
def test_a_scale_that_nothing_tells_is_warned_about(family, tmp_path):
    t = tensors()
    files = saelens("standard", t, normalize_activations=True)
    if family != "SAELens":
        stored = linears(t) | {"log_jumprelu_threshold": t["threshold"].log()}
        files = {"config.json": {"d_model": D}, "sae_weights.safetensors": stored}
    with pytest.warns(UserWarning, match="taken as they are"):
        assert load_dictionary(folder(tmp_path, "L3R", files))[1]["source"]["format"] == family


def test_sparsify_tells_model_and_context_above_its_folders(tmp_path):
    t = tensors()
    stored = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    folder(tmp_path, "run", {"config.json": {"model": "EleutherAI/pythia-160m", "ctx_len": 2048, "revision": "step3"}})
    path = folder(tmp_path, "run/layers.5", {"cfg.json": {"k": K, "d_in": D}, "sae.safetensors": stored})
    _, config = load_dictionary(path)
    assert (config["trainer"]["lm_name"], config["trainer"]["lm_revision"]) == ("EleutherAI/pythia-160m", "step3")
    assert config["buffer"]["ctx_len"] == 2048


def test_a_sparsify_sae_with_a_skip_subtracts_b_dec(tmp_path, x_BD):
    t = tensors()
    stored = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    cfg = {"k": K, "d_in": D, "skip_connection": True, "transcode": False}
    path = folder(tmp_path, "layers.5", {"cfg.json": cfg, "sae.safetensors": stored | {"W_skip": t["W_skip"].T}})
    f_BF = top((x_BD - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    check(path, x_BD, f_BF, f_BF @ t["W_dec"] + t["b_dec"] + x_BD @ t["W_skip"], site="resid_post")


@pytest.mark.parametrize(
    "name, said",
    [
        ("google/gemma-scope-2-270m-pt/resid_post/layer_5_width_16k_l0_medium", "google/gemma-3-270m"),
        ("google/gemma-scope-2-4b-it/resid_post/layer_9_width_16k_l0_medium", "google/gemma-3-4b-it"),
    ],
)
def test_gemma_scope_2_without_a_config(name, said, tmp_path):
    stored = {name.lower(): tensor for name, tensor in tensors().items() if name != "W_skip"}
    assert load_dictionary(folder(tmp_path, name, {"params.safetensors": stored}))[1]["trainer"]["lm_name"] == said


@pytest.mark.parametrize(
    "config, place", [({"submodule_name": "mlp_out_layer_7"}, (7, "mlp_out")), ({}, (None, "resid_post"))]
)
def test_a_reference_config_without_layer_and_buffer(config, place, tmp_path):
    t = tensors()
    state = {"bias": t["b_dec"], **linears(t)}
    state.pop("decoder.bias")
    files = {"config.json": {"trainer": {"dict_class": "AutoEncoder", **config}, "buffer": None}, "ae.pt": state}
    _, config = load_dictionary(folder(tmp_path, "sae", files))
    assert (config["trainer"]["layer"], config["trainer"]["site"]) == place and config["buffer"]["ctx_len"] is None


def published(t: dict[str, Tensor]) -> dict[str, dict[str, dict]]:
    """The files of one SAE of each family."""
    plain = {name: t[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    scope = {**plain, "threshold": t["threshold"]}
    turned = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    openmoss = {"W_E": t["W_enc"], "b_E": t["b_enc"], "W_D": t["W_dec"], "b_D": t["b_dec"]}
    qwen = {"W_enc": t["W_enc"].T, "W_dec": t["W_dec"].T, "b_enc": t["b_enc"], "b_dec": t["b_dec"]}
    openai = {"pre_bias": t["b_dec"], "latent_bias": t["b_enc"], "encoder.weight": t["W_enc"].T}
    openai |= {"decoder.weight": t["W_dec"].T, "activation": "TopK", "activation_state_dict": {"k": K}}
    norms = {"dataset_average_activation_norm": {"in": 5.0, "out": 5.0}}
    r1 = linears(t) | {"log_jumprelu_threshold": t["threshold"].log()}
    own = {"trainer": {"dict_class": "BatchTopKSAE", "k": K, "layer": 3, "lm_name": "a/b"}, "buffer": {"ctx_len": 128}}
    state = {**turned, "decoder.weight": t["W_dec"].T, "threshold": torch.tensor(0.2), "k": torch.tensor(K)}
    state.pop("W_dec")
    jumprelu = saelens("jumprelu", t)
    jumprelu["sae_weights.safetensors"]["threshold"] = t["threshold"]
    gated = saelens("gated", t)
    stored = gated["sae_weights.safetensors"]
    stored |= {"b_gate": t["b_enc"], "b_mag": stored.pop("b_enc") / 2, "r_mag": t["threshold"]}
    z_cfg = {"act_size": D, "dict_size": F, "act_name": "blocks.5.attn.hook_z"}
    return {
        "ours": {"config.json": own, "ae.pt": state},
        "gemma": {"params.npz": scope},
        "gemma2": {
            "params.safetensors": {name.lower(): tensor for name, tensor in scope.items()},
            "config.json": {"model_name": "gemma-v3-1b-pt", "l0": 20, "hf_hook_point_in": "model.layers.3.output"},
        },
        "layers.5": {"sae.safetensors": turned, "cfg.json": {"k": K, "d_in": D, "transcode": False}},
        "openmoss": {
            "sae_weights.safetensors": openmoss,
            "config.json": {"sae_type": "sae", "act_fn": "topk", "top_k": K},
        },
        "X-L15R-8x": {
            "hyperparams.json": {"jump_relu_threshold": 0.1, **norms},
            "checkpoints/final.safetensors": linears(t),
        },
        "L3R": {"config.json": {"d_model": D, **norms}, "sae_weights.safetensors": r1},
        "saelens": saelens("topk", t, k=K),
        "saelens_jumprelu": jumprelu,
        "saelens_gated": gated,
        "qwen": {"layer3.sae.pt": qwen, "config.json": {"k": K}},
        "openai": {"layer_6.pt": openai},
        "plt": {"layer_9.safetensors": {**plain, "W_enc": t["W_enc"].T}, "config.yaml": {"model_name": "a/b"}},
        "z": {"gpt2_L5.pt": plain, "gpt2_L5_cfg.json": z_cfg},
        "goodfire": {"Llama-3.1-8B-Instruct-SAE-l19.pth": linears(t, "encoder_linear", "decoder_linear")},
        "qresearch": {"DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt": linears(t)},
    }


NAMES = sorted(published(tensors()))


def weights_file(files: dict[str, dict]) -> str:
    return next(file for file in files if not file.endswith((".json", ".yaml")))


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_missing_or_of_another_shape_is_one_sentence(name, tmp_path):
    files = published(tensors())[name]
    file = weights_file(files)
    optional = {"k", "threshold"} if name == "ours" else set()  # which older files lack
    for key, tensor in files[file].items():
        if not isinstance(tensor, Tensor):
            continue
        changed = {"less": tensor[:-1] if tensor.ndim else tensor.expand(2), "doubled": torch.stack([tensor, tensor])}
        changed |= {"turned": tensor.T.contiguous()} if tensor.ndim == 2 else {}
        changed |= {"a number": tensor.flatten()[0]} if tensor.ndim and "threshold" not in key else {}
        for how, other in [*changed.items(), ("missing", None)]:
            if how == "missing" and key in optional:
                continue
            content = (
                {**files[file], key: other} if other is not None else {k: v for k, v in files[file].items() if k != key}
            )
            path = folder(tmp_path, name, {**files, file: content})
            with pytest.raises(ValueError) as told:
                load_dictionary(path)
            assert str(path) in str(told.value) and "\n" not in str(told.value), (key, how)


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_too_many_is_counted_and_told(name, tmp_path, x_BD):
    files = published(tensors())[name]
    file = weights_file(files)
    path = folder(tmp_path, name, files)
    before = load_dictionary(path)[0](x_BD)
    path = folder(tmp_path, name, {**files, file: files[file] | {"W_more": torch.ones(3), "b_more": torch.ones(2)}})
    if name.startswith("saelens"):  # whose files have no other tensors
        with pytest.raises(ValueError, match=r"\['W_more', 'b_more'\] that are not known"):
            load_dictionary(path)
    elif name == "ours":
        with pytest.raises(ValueError, match="W_more"):
            load_dictionary(path)
    else:
        with pytest.warns(UserWarning, match=f"{path}: 2 of its tensors, such as W_more, are none of .*: left out"):
            assert load_dictionary(path)[0](x_BD).equal(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes_are_read_as_the_numbers_that_they_are(name, dtype, tmp_path, x_BD):
    files = published(tensors())[name]
    file, answers = weights_file(files), []
    if file.endswith(".npz") and dtype is torch.bfloat16:
        pytest.skip("numpy has none")
    stored = {
        key: value.to(dtype) if key != "k" and isinstance(value, Tensor) else value
        for key, value in files[file].items()
    }
    rounded = {
        key: value.float() if key != "k" and isinstance(value, Tensor) else value for key, value in stored.items()
    }
    for part, content in (("stored", stored), ("rounded", rounded)):
        ae, _ = load_dictionary(folder(tmp_path / part, name, {**files, file: content}))
        assert {parameter.dtype for parameter in ae.parameters()} == {torch.float32}
        answers.append(ae(x_BD))
    assert answers[0].equal(answers[1]) and answers[0].any()


@pytest.mark.parametrize("name", NAMES)
def test_configs_with_nulls_strange_types_and_more_keys_are_read_or_told(name, tmp_path, x_BD):
    files = published(tensors())[name]
    for file in files:
        if not file.endswith((".json", ".yaml")):
            continue
        whole = files[file]
        path = folder(tmp_path, name, files)
        before = load_dictionary(path)[0](x_BD)
        assert load_dictionary(folder(tmp_path, name, {**files, file: whole | {"more": None}}))[0](x_BD).equal(before)
        parts = [(whole, lambda part: part)]
        for outer in ("trainer", "metadata", "buffer"):
            if outer in whole:
                parts.append((whole[outer], lambda part, outer=outer, whole=whole: {**whole, outer: part}))
        for part, put in parts:
            for key in part:
                for value in (None, [], {}, "text", -1, 1.5, True, [1], {"a": 1}, 10**400):
                    path = folder(tmp_path, name, {**files, file: put({**part, key: value})})
                    try:
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")
                            _, config = load_dictionary(path)
                    except ValueError as error:
                        assert str(path) in str(error) and "\n" not in str(error), (key, value)
                    else:
                        json.dumps([config, said_by(config)])


def test_damage_is_one_sentence_in_every_family(tmp_path):
    """Or, where a format has no checksums, a changed bit of a weight that stays finite."""
    folders = published(tensors())
    n_told = dict.fromkeys(folders, 0)
    for name, files in folders.items():
        path = folder(tmp_path, name, files)
        load_dictionary(path)
        for file in files:
            whole = (path / file).read_bytes()
            for damaged in mutations(whole, random.Random(0)):
                (path / file).write_bytes(damaged)
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # of a scale that a changed key does not say any more
                        ae, _ = load_dictionary(path)
                except ValueError as error:
                    n_told[name] += 1
                    assert str(path) in str(error) and "\n" not in str(error)
                else:
                    assert all(parameter.isfinite().all() for parameter in ae.parameters())
            (path / file).write_bytes(whole)
    assert min(n_told.values()) > 10, n_told


def test_a_decoder_row_of_zeros_makes_no_nan(tmp_path, x_BD):
    t = tensors()
    t["W_dec"][2] = 0
    ae, _ = load_dictionary(folder(tmp_path, "sae", saelens("topk", t, k=K, rescale_acts_by_decoder_norm=True)))
    assert ae(x_BD).isfinite().all()


def test_what_has_no_class_of_ours_is_not_converted(tmp_path, capsys):
    t = tensors(E)
    files = {
        "layer_9.safetensors": {"W_enc": t["W_enc"].T, "W_dec": t["W_dec"], "b_enc": t["b_enc"], "b_dec": t["b_dec"]}
    }
    cfg = {"activation": "topk", "k": K}  # keeps what is below 0
    path = folder(tmp_path, "plt", files | {"config.yaml": cfg})
    assert convert([str(path / "layer_9.safetensors"), str(tmp_path / "ours")]) == 2
    assert "no class of ours" in capsys.readouterr().err and not (tmp_path / "ours").exists()


@pytest.mark.parametrize("kind", ["relu", "jump_relu", "skip"])
def test_a_transcoder_is_converted_to_ours(kind, tmp_path, x_BD):
    t = tensors(E)
    stored = {"W_enc": t["W_enc"].T, "W_dec": t["W_dec"], "b_enc": t["b_enc"], "b_dec": t["b_dec"]}
    stored |= {"activation_function.threshold": t["threshold"]} if kind == "jump_relu" else {}
    stored |= {"W_skip": t["W_skip"].T} if kind == "skip" else {}
    path = folder(tmp_path, "plt", {"layer_9.safetensors": stored}) / "layer_9.safetensors"
    assert convert([str(path), str(tmp_path / "ours")]) == 0
    theirs, (ours, config) = load_dictionary(path)[0], load_dictionary(tmp_path / "ours")
    assert config["trainer"]["dict_class"].endswith("Transcoder") and config["trainer"]["output_dim"] == E
    assert torch.allclose(ours(x_BD), theirs(x_BD), atol=1e-5)
    assert torch.allclose(ours.encode(x_BD), theirs.encode(x_BD), atol=1e-5)


@pytest.mark.parametrize(
    "files, words",
    [
        ({"params_layer_0.safetensors": {"w_enc": torch.ones(2, 2)}}, "crosscoder"),
        ({"W_enc_0.safetensors": {"W_enc_0": torch.ones(2, 2)}}, "cross-layer"),
        ({"conf.yaml": {}, "latest_ckpt.safetensors": {"D": torch.ones(2)}}, "temporal"),
        ({"config.json": {"sae_type": "lorsa"}, "sae_weights.safetensors": {"W_E": torch.ones(2, 2)}}, "lorsa"),
        (
            {
                "config.json": {
                    "sae_type": "sae",
                    "hook_point_in": "blocks.4.ln2.hook_normalized",
                    "hook_point_out": "blocks.4.hook_mlp_out",
                    "norm_activation": "token-wise",
                },
                "sae_weights.safetensors": {"W_E": torch.ones(2, 2), "W_D": torch.ones(2, 2)},
            },
            "transcoder's target",
        ),
        ({"layer3.sae.pt": {"W_enc": Malice()}}, "layer3.sae.pt is damaged"),
        ({"params.npz": {"W_enc": torch.full((D, F), math.nan), "W_dec": torch.ones(F, D)}}, "params|finite|threshold"),
        (
            {"params.safetensors": {"w_enc": torch.ones(3, 4), "w_dec": torch.ones(4, 3)}},
            "lacks b_dec and b_enc and thr",
        ),
        ({"notes.txt": {}}, "is not a trained SAE"),
    ],
)
def test_what_cannot_be_opened_is_one_sentence(files, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = folder(tmp_path, "sae", files)
    with pytest.raises(ValueError, match=words) as told:
        load_dictionary(path)
    assert "\n" not in str(told.value) and not (tmp_path / "malice").exists()


def test_any_activation_dtype_is_taken(tmp_path, x_BD):
    t = tensors()
    for dtype in (torch.bfloat16, torch.float16):
        for architecture in ("standard", "topk"):
            ae, _ = load_dictionary(folder(tmp_path, f"{architecture}{dtype}", saelens(architecture, t, k=K)))
            assert ae(x_BD.to(dtype)).isfinite().all()
    assert isinstance(ae, GeneralSAE)
