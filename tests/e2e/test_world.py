"""A run spread over processes: the same bits as in one, stopped, killed and resumed in any number of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import demo
from dictionary_learning.formats import find_saes

ROOT = Path(__file__).parents[2]
FLAGS = """--layers 1 3 --architectures p_anneal batch_top_k jump_relu --num_tokens 20000 --epochs 20 --backup_steps 25
    --text_shards 4""".split()


@pytest.fixture
def arguments(command):
    """arguments(save_dir, *flags) -> the arguments of a small run on two layers."""
    return lambda save_dir, *flags: command("--save_dir", save_dir, *FLAGS, *flags)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_model_folder, text_file, small) -> Path:
    """The run in one process, evaluated."""
    folder = tmp_path_factory.mktemp("straight")
    fixed = ["--model_name", str(tiny_model_folder), "--dataset", str(text_file), "--save_dir", str(folder)]
    assert demo.main([*fixed, *small, *FLAGS]) == 0
    return folder


def torchrun(n: int, arguments: list[str], *options: str) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *options, str(ROOT / "demo.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*launcher, "--timeout_minutes", "1", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def wait_for_state(folder: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob(f"*/resume/state_{step}")):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout and process.stdout.read()[-3000:]
        time.sleep(0.01)


def pid_of(rank: int, process: subprocess.Popen) -> int:
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"torchrun has no process of rank {rank}")


def assert_same(straight: Path, other: Path, evaluated: bool = False) -> None:
    saes, others = find_saes(straight), find_saes(other)
    assert len(saes) == len(others) == 6
    for one, two in zip(saes, others, strict=True):
        ours, theirs = (torch.load(path / "ae.pt", weights_only=True) for path in (one, two))
        assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours), two
        for name in ("metrics.jsonl", "config.json", *(["eval_results.json"] if evaluated else [])):
            assert (one / name).read_text() == (two / name).read_text(), two / name
    records = [json.loads(next(folder.glob("*/run.json")).read_text()) for folder in (straight, other)]
    for name in ("settings", "tokens", "norm_factors", "positions"):
        assert records[0][name] == records[1][name]
    assert not list(other.glob("*/resume"))


def test_four_processes_make_the_bits_of_one(straight, arguments, tmp_path):
    code, output = finish(torchrun(4, arguments(tmp_path)))
    assert code == 0, output[-3000:]
    assert_same(straight, tmp_path, evaluated=True)
    assert output.count("trained on 20,000 tokens") == output.count("plot: ") == 1
    assert list(tmp_path.glob("*/pareto.png"))


def test_stopped_in_two_processes_and_resumed_in_one_and_in_three(straight, arguments, tmp_path):
    stopped = tmp_path / "stopped"
    process = torchrun(2, arguments(stopped, "--no_eval"))
    wait_for_state(stopped, 50, process)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code != 0 and output.count("Continue with") == 1, output[-3000:]
    assert 'demo.py", line' not in output  # no traceback but torchrun's own
    shutil.copytree(stopped, tmp_path / "again")
    assert demo.main(arguments(stopped, "--no_eval", "--resume")) == 0
    assert_same(straight, stopped)
    code, output = finish(torchrun(3, arguments(tmp_path / "again", "--no_eval", "--resume")))
    assert code == 0 and "resumed at step" in output, output[-3000:]
    assert_same(straight, tmp_path / "again")


@pytest.mark.parametrize(
    "loss, minutes, seconds",
    [
        pytest.param(signal.SIGKILL, "1", 30, id="killed"),  # seen at once
        pytest.param(signal.SIGSTOP, "0.2", 90, id="silent"),  # and torchrun kills a deaf process after 30 s
    ],
)
def test_a_process_is_lost_and_the_others_say_so_and_end(loss, minutes, seconds, straight, arguments, tmp_path):
    process = torchrun(2, arguments(tmp_path, "--no_eval", "--timeout_minutes", minutes))
    wait_for_state(tmp_path, 50, process)
    start = time.monotonic()
    os.kill(pid_of(1, process), loss)
    code, output = finish(process)
    assert code != 0 and time.monotonic() - start < seconds
    assert output.count("a process of the run was lost") == 1 and 'demo.py", line' not in output, output[-3000:]
    assert demo.main(arguments(tmp_path, "--no_eval", "--resume")) == 0
    assert_same(straight, tmp_path)


def test_torchrun_restarts_a_run_whose_process_is_killed(straight, arguments, tmp_path):
    """And it goes on with its last state, though the command does not say --resume."""
    process = torchrun(2, arguments(tmp_path, "--no_eval"), "--max-restarts", "1")
    wait_for_state(tmp_path, 50, process)
    os.kill(pid_of(0, process), signal.SIGKILL)
    code, output = finish(process)
    assert code == 0 and "resumed at step" in output, output[-3000:]
    assert_same(straight, tmp_path)


def test_what_the_user_got_wrong_is_said_once(arguments, tmp_path):
    code, output = finish(torchrun(2, arguments(tmp_path, "--layers", "9")))
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code != 0 and len(errors) == 1 and "4 layers (0 to 3), not 9" in errors[0], output[-3000:]


def test_latents_split_over_two_and_four_processes(command, tmp_path):
    """Stopped with each SAE split in two, resumed with it split in four: what one process trains, to rounding."""
    flags = ["--architectures", "batch_top_k", "jump_relu", "--num_tokens", 5000, "--backup_steps", 20]
    straight, split = tmp_path / "straight", tmp_path / "split"
    assert demo.main(command("--save_dir", straight, *flags, "--text_shards", 2)) == 0
    process = torchrun(2, command("--save_dir", split, *flags, "--shard_latents", 2))
    wait_for_state(split, 20, process)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code != 0 and output.count("Continue with") == 1, output[-3000:]
    code, output = finish(torchrun(4, command("--save_dir", split, *flags, "--shard_latents", 4, "--resume")))
    assert code == 0 and "resumed at step" in output, output[-3000:]
    saes, others = find_saes(straight), find_saes(split)
    assert len(saes) == len(others) == 2
    for one, two in zip(saes, others, strict=True):
        ours, theirs = (torch.load(path / "ae.pt", weights_only=True) for path in (one, two))
        for name, tensor in ours.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-4, msg=f"{two}: {name}")
        lines = [(path / "metrics.jsonl").read_text().splitlines() for path in (one, two)]
        assert [json.loads(line)["step"] for line in lines[0]] == [json.loads(line)["step"] for line in lines[1]]
        results = [json.loads((path / "eval_results.json").read_text()) for path in (one, two)]
        assert results[0].keys() == results[1].keys()
        assert abs(results[0]["l0"] - results[1]["l0"]) < 0.05


def test_a_split_that_does_not_come_out_even_is_refused(arguments, tmp_path, capsys):
    assert demo.main(arguments(tmp_path, "--shard_latents", 2)) == 2
    assert "--shard_latents 2 needs a multiple of 2 processes" in capsys.readouterr().err
