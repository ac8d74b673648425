#!/usr/bin/env bash
# Triton's interpreter (TRITON_INTERPRET=1) rounds float32 to bfloat16 towards zero.
#
# One would guess: to nearest, as compiled kernels do (cvt.rn on NVIDIA GPUs) and as torch does, so that a kernel that
# writes bfloat16 has the same last bit under the interpreter as on a GPU.
# What happens: `x.to(tl.bfloat16)`, and storing float32 into a bfloat16 tensor, cut the low 16 bits off. Each value is
# off by up to a whole unit in the last place instead of half of one, always to the same side, so errors add up in sums.
# A bfloat16 kernel that is tested under the interpreter needs tolerances twice as wide, and its rounding is untested.
#
# Seen with triton 3.7.0, torch 2.13.0, Python 3.11, 2026-11-27. Exits with 1 where that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 triton==3.7.0 numpy
cat > "$folder/kernel.py" <<'PYTHON'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def cast(x_ptr, out_ptr, stored_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, x.to(tl.bfloat16))
    tl.store(stored_ptr + i, x)


x = torch.tensor([1 + 3 / 512, 1 + 3 / 256, -(1 + 3 / 512), 0.1])
out, stored = torch.empty(4, dtype=torch.bfloat16), torch.empty(4, dtype=torch.bfloat16)
cast[(1,)](x, out, stored, N=4)
cut = (x.view(torch.int32) & -65536).view(torch.float32)
print("float32:           ", x.tolist())
print("torch, to nearest: ", x.bfloat16().tolist())
print("the interpreter:   ", out.tolist())
print("the same, on store:", stored.tolist())
print("low 16 bits cut:   ", cut.tolist())
sys.exit(not (out.float().equal(cut) and stored.float().equal(cut) and not out.equal(x.bfloat16())))
PYTHON
cd "$folder" && TRITON_INTERPRET=1 venv/bin/python kernel.py
