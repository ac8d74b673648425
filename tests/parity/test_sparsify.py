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
