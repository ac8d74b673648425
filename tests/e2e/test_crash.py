"""A run killed at random moments, saves among them, and resumed each time, ends as if nothing had happened.

The suite kills 4 times; `python tests/e2e/test_crash.py 20` kills 20 times and prints the moments.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
STEPS = 600
FLAGS = f"""--dataset python-stdlib --model_name tiny-python --layers 1 --architectures p_anneal batch_top_k
    --num_tokens {64 * STEPS} --sae_batch_size 64 --buffer_tokens 2048 --context_length 64 --llm_batch_size 8
    --dictionary_widths 256 --learning_rates 0.001 --target_l0s 8 --p_anneal_penalties 0.05 --log_steps 5
    --backup_steps 4 --no_eval --device cpu""".split()


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "demo.py"), "--save_dir", str(folder), *FLAGS, *more]


def start(arguments: list[str]) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(arguments, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-2000:]


def steps_saved(folder: Path) -> int:
    states = [int(path.name.removeprefix("state_")) for path in folder.glob("*/resume/state_*")]
    return max(states, default=0)


def crash(folder: Path, kills: int, seed: int) -> list[str]:
    """Kill a run `kills` times while it goes on, resume it each time, and let it end.  Returns the moments."""
    rng, moments = random.Random(seed), []
    for i in range(kills):
        process = start(command(folder, *(["--resume"] if i else [])))
        before, goal = steps_saved(folder), (i + 1) * STEPS * 9 // (10 * kills)
        while steps_saved(folder) < max(before + 1, goal - STEPS // (2 * kills)):
            assert process.poll() is None, process.stderr and process.stderr.read()[-2000:]
            time.sleep(0.005)
        if i % 2:  # in the middle of a save
            deadline = time.monotonic() + 20
            while not list(folder.glob("*/resume/.*.tmp")) and time.monotonic() < deadline:
                pass
        else:
            time.sleep(rng.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        saving = bool(list(folder.glob("*/resume/.*.tmp")))
        moments.append(f"kill {i + 1}: last state of step {steps_saved(folder)}{', during a save' if saving else ''}")
    finish(start(command(folder, "--resume")))
    return moments


def same(straight: Path, crashed: Path) -> int:
    """Compare every SAE's weights to the bit and its metrics to the letter; the number of SAEs."""
    files = sorted(straight.rglob("ae.pt"))
    for file in files:
        other = crashed / file.relative_to(straight)
        one, two = torch.load(file, weights_only=True), torch.load(other, weights_only=True)
        assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one), file
        metrics = [path.with_name("metrics.jsonl").read_text() for path in (file, other)]
        assert metrics[0] == metrics[1], file
        steps = [json.loads(line)["step"] for line in metrics[0].splitlines()]
        assert steps == [*range(0, STEPS, 5), STEPS - 1]
    return len(files)


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    process = start(command(tmp_path / "straight"))
    moments = crash(tmp_path / "crashed", kills=4, seed=0)
    finish(process)
    assert same(tmp_path / "straight", tmp_path / "crashed") == 2, moments


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        finish(start(command(Path(folder, "straight"))))
        print("\n".join(crash(Path(folder, "crashed"), int(sys.argv[1]), seed=int(time.time()))))
        print(f"{same(Path(folder, 'straight'), Path(folder, 'crashed'))} SAEs equal to the bit, metrics complete")
