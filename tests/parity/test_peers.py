"""Transcoders and SAEs that circuit-tracer's and Llamascopium's own code writes and runs, read and run by ours.

The packages lie in third_party/peers, as README's command puts them there; without them these tests are skipped.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dictionary_learning.formats import load_dictionary

PEERS = Path(__file__).parents[2] / "third_party" / "peers"

CIRCUIT_TRACER = """
import sys, torch
from pathlib import Path
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, load_transcoder_set
torch.manual_seed(0)
x_BD, cpu = 3 * torch.randn(50, 16), torch.device("cpu")
for kind in ("relu", "jump_relu", "skip"):
    act = JumpReLU(torch.rand(64), 0.1) if kind == "jump_relu" else torch.relu
    mine = SingleLayerTranscoder(16, 64, act, 0, kind == "skip", device=cpu, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in mine.named_parameters():
            if "threshold" not in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    folder = Path(sys.argv[1]) / kind
    folder.mkdir()
    mine.to_safetensors(str(folder / "layer_0.safetensors"))
    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    lines = {"model_name": "google/gemma-2-2b", "model_kind": "transcoder_set", **hooks}
    (folder / "config.yaml").write_text("".join(f"{key}: {value}\\n" for key, value in lines.items()))
    lazy = {"lazy_encoder": False, "lazy_decoder": False}
    [read] = load_transcoder_set({0: str(folder / "layer_0.safetensors")}, "", **hooks, device=cpu, **lazy)
    with torch.no_grad():
        torch.save({"x": x_BD, "f": read.encode(x_BD), "y": read(x_BD)}, folder / "expected.pt")
"""

LLAMASCOPIUM = """
import itertools, sys, torch
from pathlib import Path
from llamascopium.models.sae import SAEConfig, SparseAutoEncoder
torch.manual_seed(0)
x_BD = 3 * torch.randn(50, 16)
READS, PREDICTS = "blocks.4.ln2.hook_normalized", "blocks.4.hook_mlp_out"
kinds = itertools.product(("relu", "topk", "jumprelu", "batchtopk"), ("dataset-wise", "token-wise", "inference"),
                          (True, False), (READS, PREDICTS))
for i, (act_fn, norm, with_norm, hook) in enumerate(kinds):
    if norm == "token-wise" and hook != PREDICTS:
        continue
    sizes = {"d_model": 16, "expansion_factor": 4, "top_k": 5, "device": "cpu", "dtype": torch.float32}
    config = SAEConfig(hook_point_in=hook, hook_point_out=PREDICTS, act_fn=act_fn, norm_activation=norm,
                       sparsity_include_decoder_norm=with_norm, use_decoder_bias=i % 3 > 0, **sizes)
    sae = SparseAutoEncoder(config)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
        if norm == "dataset-wise":
            sae.set_dataset_average_activation_norm({PREDICTS: 3.0} | ({READS: 5.0} if hook == READS else {}))
        folder = Path(sys.argv[1]) / f"{act_fn} {norm} {with_norm} {hook == PREDICTS}"
        sae.save_pretrained(folder)
        sae.cfg.save_hyperparameters(folder)
        f_BF = sae.encode(sae.normalize_activations({hook: x_BD})[hook])
        y_BD = sae.decode(f_BF) / sae.compute_norm_factor(x_BD, PREDICTS)
        torch.save({"x": x_BD, "f": f_BF, "y": y_BD}, folder / "expected.pt")
"""


def written(script: str, folder: Path) -> list[Path]:
    """The folders that the peer made."""
    environment = os.environ | {"PYTHONPATH": str(PEERS)}
    command = [sys.executable, "-W", "ignore", "-c", script, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return sorted(folder.iterdir())


@torch.no_grad()
def agree(sae: Path, folder: Path) -> dict:
    expected = torch.load(folder / "expected.pt", weights_only=True)
    ae, config = load_dictionary(sae)
    assert expected["f"].count_nonzero() > 0
    for mine, theirs in ((ae.encode(expected["x"]), expected["f"]), (ae(expected["x"]), expected["y"])):
        # a millionth of the largest: an entry near 0 is a difference of larger ones
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))
    return config["trainer"]


@pytest.mark.skipif(not (PEERS / "circuit_tracer").is_dir(), reason="circuit-tracer is not in third_party/peers")
def test_what_circuit_tracer_writes_computes_here_what_it_computes_there(tmp_path):
    folders = written(CIRCUIT_TRACER, tmp_path)
    assert len(folders) == 3
    for folder in folders:
        trainer = agree(folder / "layer_0.safetensors", folder)
        assert (trainer["site"], trainer["site_out"]) == ("resid_mid", "mlp_out")
        assert (trainer["layer"], trainer["lm_name"]) == (0, "google/gemma-2-2b")


@pytest.mark.skipif(not (PEERS / "llamascopium").is_dir(), reason="Llamascopium is not in third_party/peers")
def test_what_llamascopium_writes_computes_here_what_it_computes_there(tmp_path):
    folders = written(LLAMASCOPIUM, tmp_path)
    assert len(folders) == 40
    for folder in folders:
        trainer = agree(folder, folder)
        assert (trainer["layer"], trainer["site_out"]) == (4, "mlp_out"), folder
