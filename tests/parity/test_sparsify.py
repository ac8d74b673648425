"""SAEs that sparsify's own code writes and runs, read and run by ours.

The package lies in third_party/peers, as README's command puts it there; without it these tests are skipped.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dictionary_learning.formats import load_dictionary

PEERS = Path(__file__).parents[2] / "third_party" / "peers"

SPARSIFY = """
import sys, torch
from sparsify import SparseCoder
from sparsify.config import SparseCoderConfig
torch.manual_seed(0)
sae = SparseCoder(16, SparseCoderConfig(num_latents=64, k=4, **eval(sys.argv[1])))
with torch.no_grad():
    for parameter in sae.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    sae.save_to_disk(sys.argv[2])
    x_BD = torch.randn(50, 16)
    encoded = sae.encode(x_BD)
    f_BF = torch.zeros(50, 64).scatter(1, encoded.top_indices.long(), encoded.top_acts)
    # with multi_topk, what forward returns is the reconstruction by 4 k latents, which only its loss is for
    y_BD = sae.decode(encoded.top_acts, encoded.top_indices) if sae.cfg.multi_topk else sae(x_BD).sae_out
    torch.save({"x": x_BD, "f": f_BF, "y": y_BD}, sys.argv[2] + "/../expected.pt")
"""


@pytest.mark.skipif(not (PEERS / "sparsify").is_dir(), reason="sparsify is not in third_party/peers")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"activation": "groupmax"},
        {"multi_topk": True},
        {"transcode": True},
        {"transcode": True, "skip_connection": True},
    ],
    ids=str,
)
def test_what_sparsify_writes_computes_here_what_it_computes_there(settings, tmp_path):
    folder = tmp_path / "layers.3.mlp"
    environment = os.environ | {"PYTHONPATH": str(PEERS), "SPARSIFY_DISABLE_TRITON": "1"}
    command = [sys.executable, "-c", SPARSIFY, repr(settings), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    ae, config = load_dictionary(folder)
    torch.testing.assert_close(ae.encode(expected["x"]), expected["f"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ae(expected["x"]), expected["y"], rtol=1e-6, atol=2e-6)
    assert config["trainer"]["layer"] == 3 and config["trainer"]["site_out"] == "mlp"


TRANSCODER = """
import sys, torch
from sparsify import SparseCoder
from sparsify.config import SparseCoderConfig
torch.manual_seed(0)
theirs = SparseCoder(16, SparseCoderConfig(num_latents=64, k=4, transcode=True, skip_connection=True))
x_BD, y_BD = torch.randn(50, 16), torch.randn(50, 16)
with torch.no_grad():
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
theirs.fvu = theirs(x_BD, y_BD).fvu
theirs.fvu.backward()
kept = {name: parameter for name, parameter in theirs.named_parameters()}
torch.save({"x": x_BD, "y": y_BD, "loss": theirs.fvu.detach(),
            "weights": {name: p.detach() for name, p in kept.items()},
            "grads": {name: p.grad for name, p in kept.items()}}, sys.argv[1])
"""


@pytest.mark.skipif(not (PEERS / "sparsify").is_dir(), reason="sparsify is not in third_party/peers")
def test_a_topk_skip_transcoder_has_sparsifys_loss_and_gradients(tmp_path):
    """On the same weights; sparsify divides the squared error by the target's variance."""
    from dictionary_learning.trainers import TopKTrainer

    environment = os.environ | {"PYTHONPATH": str(PEERS), "SPARSIFY_DISABLE_TRITON": "1"}
    command = [sys.executable, "-c", TRANSCODER, str(tmp_path / "theirs.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = torch.load(tmp_path / "theirs.pt", weights_only=True)
    x_BD, y_BD, weights, grads = (theirs[name] for name in ("x", "y", "weights", "grads"))
    places = {"site": "mlp_in", "site_out": "mlp_out", "output_dim": 16, "skip": True}
    sizes = {"activation_dim": 16, "dict_size": 64, "k": 4, "layer": 0, "lm_name": "m", "steps": 9, "warmup_steps": 0}
    trainer = TopKTrainer(**sizes, **places, seed=0, device="cpu")
    ours = trainer.ae
    turned = {"encoder.weight": lambda t: t, "encoder.bias": lambda t: t, "b_dec": lambda t: t}
    turned |= {"decoder.weight": lambda t: t.T, "W_skip": lambda t: t.T}
    names = {"decoder.weight": "W_dec"}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(turned[name](weights[names.get(name, name)]))
    out = trainer.loss(x_BD, 1, y_BD)
    out.loss.backward()
    per_unit = len(x_BD) / (y_BD - y_BD.mean(0)).pow(2).sum()
    torch.testing.assert_close(out.loss.detach() * per_unit, theirs["loss"], rtol=1e-6, atol=1e-6)
    for name, parameter in ours.named_parameters():
        expected = turned[name](grads[names.get(name, name)])
        torch.testing.assert_close(parameter.grad * per_unit, expected, rtol=1e-5, atol=1e-7)
