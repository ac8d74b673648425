"""Seconds and memory from a file to the first features of a wide SAE, ours beside SAELens'.

    python benchmarks/open_sae.py [--dict_size 262144 --activation_dim 2304]

A JumpReLU of random weights in SAELens' format is written once; then each, in a process of its own and in turn, opens
the folder and encodes one batch of 16.  The table: median seconds, imports aside, and the peak of the process's memory
above what it has before it opens the folder, over the bytes of the weights in fp32.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
OURS = "from dictionary_learning import load_dictionary; open_sae = lambda folder: load_dictionary(folder)[0]"
THEIRS = "from sae_lens import SAE; open_sae = lambda folder: SAE.load_from_disk(folder)"
MEASURE = """
import json, re, sys, time, torch
torch.randn(64, 64) @ torch.randn(64, 64)
def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
before, start = memory("VmRSS"), time.perf_counter()
with torch.no_grad():
    f = open_sae(sys.argv[1]).encode(torch.ones(16, int(sys.argv[2])))
print(json.dumps({"seconds": time.perf_counter() - start, "bytes": memory("VmHWM") - before}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dict_size", type=int, default=262144)
    parser.add_argument("--activation_dim", type=int, default=2304)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    from safetensors.torch import save_file

    D, F = args.activation_dim, args.dict_size
    n_bytes = 4 * (2 * D * F + 2 * F + D)
    answers: dict[str, list[dict[str, float]]] = {"ours": [], "SAELens": []}
    with tempfile.TemporaryDirectory() as folder:
        weights = {"W_enc": torch.rand(D, F) - 0.5, "W_dec": torch.rand(F, D) - 0.5, "b_enc": torch.zeros(F)}
        weights |= {"b_dec": torch.zeros(D), "threshold": torch.full((F,), 0.1)}
        save_file(weights, f"{folder}/sae_weights.safetensors")
        del weights
        cfg = {"architecture": "jumprelu", "d_in": D, "d_sae": F, "apply_b_dec_to_input": False, "dtype": "float32"}
        cfg |= {"normalize_activations": "none", "reshape_activations": "none", "device": "cpu"}
        metadata = {"sae_lens_version": "6.54.12", "hook_name": "blocks.0.hook_resid_post", "model_name": "gpt2"}
        Path(folder, "cfg.json").write_text(json.dumps(cfg | {"metadata": metadata}))
        for _ in range(args.rounds):
            for name, code in (("ours", OURS), ("SAELens", THEIRS)):
                command = [sys.executable, "-c", code + MEASURE, folder, str(D)]
                done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
                answers[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{F:,} latents of width {D}: {n_bytes / 1e9:.2f} GB in fp32, {torch.get_num_threads()} threads")
    print("| | seconds to the first features | peak memory over the weights |\n|---|---|---|")
    for name, found in answers.items():
        seconds = statistics.median(answer["seconds"] for answer in found)
        print(f"| {name} | {seconds:.2f} | {max(answer['bytes'] for answer in found) / n_bytes:.2f} |")


if __name__ == "__main__":
    main()
