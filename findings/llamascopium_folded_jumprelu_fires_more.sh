#!/usr/bin/env bash
# Llamascopium's fold of the activations' scale makes a JumpReLU SAE fire on other latents.
#
# One would guess: from_pretrained(..., fold_activation_scale=True) only moves the factor sqrt(d) / average norm from the
# activations into the weights, as its documentation says ("doesn't affect the encoding and decoding as a whole"), so the
# same latents fire and the reconstructions are equal.
# What happens: the encoder's weights stay and its bias is divided by the factor, so pre-activations are as many times
# larger, and the thresholds stay as they were. Here more than twice as many latents fire, and reconstructions differ by a
# third of the largest entry. With ReLU in place of JumpReLU, which has no thresholds, the guess holds.
#
# Seen with llamascopium 2.0.0b34, torch 2.13.0, transformer-lens 3.9.0, Python 3.11, 2026-11-27. Exits with 1 where that
# changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformer-lens==3.9.0 llamascopium==2.0.0b34
cat > "$folder/look.py" <<'PYTHON'
import sys

import torch
from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

torch.manual_seed(0)
hook, norm, folder = "blocks.0.hook_resid_post", 40.0, sys.argv[1]
x = 10 * torch.randn(1000, 16)
differences = {}
for act_fn in ("relu", "jumprelu"):
    config = SAEConfig(
        hook_point_in=hook, hook_point_out=hook, d_model=16, expansion_factor=4, act_fn=act_fn,
        norm_activation="dataset-wise", sparsity_include_decoder_norm=False, device="cpu", dtype=torch.float32,
    )
    sae = SparseAutoEncoder(config)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
        sae.set_dataset_average_activation_norm({hook: norm})
        if act_fn == "jumprelu":
            sae.activation_function.log_jumprelu_threshold.zero_()  # thresholds of 1
        sae.save_pretrained(f"{folder}/{act_fn}")
        config.save_hyperparameters(f"{folder}/{act_fn}")
        plain = SparseAutoEncoder.from_pretrained(f"{folder}/{act_fn}")
        factor = plain.compute_norm_factor(x, hook)
        features = plain.encode(x * factor)
        expected = plain.decode(features) / factor
        folded = SparseAutoEncoder.from_pretrained(f"{folder}/{act_fn}", fold_activation_scale=True)
        other = folded.encode(x)
        differences[act_fn] = float((folded.decode(other) - expected).abs().max() / expected.abs().max())
    counts = [float((f > 0).sum(1).float().mean()) for f in (features, other)]
    print(f"{act_fn}: latents a token {counts[0]:.2f}, folded {counts[1]:.2f};", end=" ")
    print(f"reconstructions differ by {differences[act_fn]:.1e} of the largest")
sys.exit(0 if differences["relu"] < 1e-5 and differences["jumprelu"] > 0.05 else 1)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py" "$folder"
