#!/usr/bin/env bash
# SAELens' own reader of sparsify folders gives other weights than sparsify runs with.
#
# One would guess: sae_lens has a loader for EleutherAI's sparsify format, so a folder that sparsify saves opens in it with
# the decoder as it lies in the file (num_latents x d_in) and b_dec subtracted from the input, as sparsify's SAEs do.
# What happens: the loader returns W_dec transposed (d_in x num_latents where its own layout is d_sae x d_in), and says
# apply_b_dec_to_input False for a folder with normalize_decoder (the default), so the input is not centred.
#
# Seen with sae-lens 6.54.12, eai-sparsify 1.3.3, torch 2.13.0, Python 3.11, 2026-11-27. Exits with 1 where that changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 sae-lens==6.54.12
"$folder/venv/bin/pip" install --quiet --no-deps eai-sparsify==1.3.3 natsort==8.4.0 schedulefree==1.4.1
cat > "$folder/look.py" <<'PYTHON'
import os
import sys

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
import torch
from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader
from sparsify import SparseCoder
from sparsify.config import SparseCoderConfig

torch.manual_seed(0)
sae = SparseCoder(16, SparseCoderConfig(num_latents=64, k=4))
path = sys.argv[1] + "/layers.3"
sae.save_to_disk(path)
cfg, weights = sparsify_disk_loader(path, device="cpu", cfg_overrides={"model_name": "gpt2"})
x = torch.randn(5, 16)
with torch.no_grad():
    sae.b_dec.add_(1.0)
    centred = torch.equal(sae.encode(x).pre_acts, torch.relu(sae.encoder(x - sae.b_dec)))
print("sparsify: W_dec", list(sae.W_dec.shape), "subtracts b_dec:", centred)
print("SAELens:  W_dec", list(weights["W_dec"].shape), "subtracts b_dec:", cfg["apply_b_dec_to_input"])
same = list(weights["W_dec"].shape) == [64, 16] or cfg["apply_b_dec_to_input"]
sys.exit(1 if same or not centred else 0)
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$folder"
