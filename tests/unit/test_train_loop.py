"""The loop as a library: `trainSAE` on an iterator of tensors."""

import copy
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dictionary_learning.formats import load_dictionary
from dictionary_learning.kernels import Shard
from dictionary_learning.threads import workers_pool
from dictionary_learning.trainers import BatchTopKTrainer, StandardTrainer
from dictionary_learning.training import Loop, choose_workers, make_runs, signals_noted, trainSAE

D, F, B, STEPS = 8, 32, 64, 50
COMMON = {"steps": STEPS, "activation_dim": D, "dict_size": F, "layer": 0, "lm_name": "m", "lr": 1e-2,
          "warmup_steps": 2, "seed": 0, "device": "cpu"}  # fmt: skip
CONFIGS = [
    {"trainer": BatchTopKTrainer, "k": 4, "threshold_start_step": 10, "threshold_beta": 0.9, **COMMON},
    {"trainer": StandardTrainer, "l1_penalty": 0.01, "sparsity_warmup_steps": None, **COMMON},
]


class Batches:
    """Sparse combinations of fixed directions, times 20."""

    def __init__(self, n: int):
        self.generator = torch.Generator().manual_seed(0)
        self.directions = torch.randn(16, D, generator=self.generator)
        self.left, self.drawn = n, []

    def __iter__(self):
        return self

    def __next__(self) -> torch.Tensor:
        if not self.left:
            raise StopIteration
        self.left -= 1
        self.drawn.append((torch.rand(B, 16, generator=self.generator) < 0.1).float() @ self.directions * 20)
        return self.drawn[-1]


@pytest.mark.parametrize("norm_batches", [1, 7, STEPS])
def test_each_batch_is_trained_on_once_and_saved_saes_take_raw_activations(norm_batches, tmp_path):
    data, configs = Batches(STEPS), copy.deepcopy(CONFIGS)
    trainers = trainSAE(data, configs, STEPS, save_dir=tmp_path, norm_batches=norm_batches, verbose=False)
    assert configs == CONFIGS and len(data.drawn) == STEPS
    factor = torch.cat(data.drawn[:norm_batches]).square().sum(1).mean().sqrt()
    x_BD = data.drawn[-1]
    for i, trainer in enumerate(trainers):
        assert trainer.tokens_seen == STEPS * B
        ae, config = load_dictionary(tmp_path / f"trainer_{i}")
        assert config["trainer"]["norm_factor"] == pytest.approx(float(factor), rel=1e-5)
        torch.testing.assert_close(ae(x_BD), trainer.ae(x_BD), rtol=1e-4, atol=1e-4)
        assert (ae(x_BD) - x_BD).norm() < 0.7 * (x_BD - x_BD.mean(0)).norm()


def test_data_that_end_early_are_an_error():
    with pytest.raises(ValueError, match=r"ended after 1,920 .*step 30 of 50"):
        trainSAE(Batches(30), CONFIGS, STEPS, norm_batches=5, verbose=False)


def test_the_first_interrupt_is_noted_and_the_second_acts_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        with signals_noted() as noted:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert noted == ["SIGTERM", "SIGINT"]
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def trained(workers: int, tmp_path, steps: int = STEPS, state=None) -> Loop:
    """The loop of six SAEs after so many steps."""
    configs = [{**config, "seed": seed} for config in CONFIGS for seed in range(3)]
    runs = make_runs(configs, [tmp_path / f"{workers}_{i}" for i in range(6)], lambda *places: {})
    batches = ({0: x_BD} for x_BD in Batches(STEPS))
    loop = Loop(runs, batches, {0: 1.0}, STEPS, log_steps=7, show_progress=False, workers=workers)
    if state is not None:
        loop.load_state_dict(state)
    loop.steps = steps
    loop.train()
    return loop


def test_saes_that_are_stepped_side_by_side_have_the_bits_and_logs_of_one_after_another(tmp_path):
    loops = [trained(workers, tmp_path) for workers in (1, 2, 5)]
    for runs in zip(*(loop.runs for loop in loops), strict=True):
        states = [run.trainer.ae.state_dict() for run in runs]
        assert all(states[0][name].equal(state[name]) for state in states for name in state)
        logs = {run.metrics_file.read_text() for run in runs}
        assert len(logs) == 1 and len(logs.pop().splitlines()) == 8


def test_a_resumed_loop_steps_saes_as_it_did_before(tmp_path):
    """As many threads in an operation, since more would add up parts of sums."""
    for before, now, then in [(1, 2, 1), (2, 1, 2), (2, 5, 5)]:
        state = trained(before, tmp_path, 3).state_dict()
        assert trained(now, tmp_path, 4, state).workers == then


def test_shares_of_saes_are_never_stepped_side_by_side(tmp_path):
    """Their steps talk to other processes, which take the SAEs in turn."""
    state = trained(2, tmp_path, 3).state_dict()
    runs = make_runs(CONFIGS, [None] * 2, lambda *places: {}, shard=Shard(0, 2))
    with pytest.raises(ValueError, match="leave --sae_threads out"):
        Loop(runs, iter([]), {0: 1.0}, STEPS, workers=2)
    loop = Loop(runs, iter([]), {0: 1.0}, STEPS)
    for run in runs:
        state[f"trainers.{run.index}.0"] = {"state": run.trainer.state_dict(), "failure": None, "shares": 2}
    loop.load_state_dict(state)
    assert loop.workers == 1


def test_an_sae_that_fails_beside_others_stops_alone(tmp_path):
    runs = make_runs(CONFIGS, [tmp_path / "0", tmp_path / "1"], lambda *places: {})
    with torch.no_grad():
        runs[0].trainer.ae.encoder.weight[0, 0] = torch.inf
    Loop(runs, ({0: x} for x in Batches(STEPS)), {0: 1.0}, STEPS, show_progress=False, workers=2).train()
    assert runs[0].failure is not None and runs[1].failure is None


def test_each_worker_has_one_thread_and_the_others_keep_theirs():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with workers_pool(2) as pool:
            together = threading.Barrier(2)
            assert set(pool.map(lambda _: (together.wait(), torch.get_num_threads())[1], range(2))) == {1}
            with ThreadPoolExecutor() as other:
                assert other.submit(torch.get_num_threads).result() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("slow, workers", [("side by side", 1), ("one after another", 2)])
def test_the_faster_way_is_chosen_and_nothing_of_the_run_is_touched(slow, workers, monkeypatch):
    threads, generator = torch.get_num_threads(), torch.get_rng_state()
    update, seconds = BatchTopKTrainer.update, [0]

    def slowly(self, step, x_BD):
        seconds[0] += 1 + ((torch.get_num_threads() == 1) == (slow == "side by side"))
        return update(self, step, x_BD)

    monkeypatch.setattr(BatchTopKTrainer, "update", slowly)
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])
    try:
        torch.set_num_threads(2)
        assert choose_workers(CONFIGS[:1] * 3, B, torch.float32, "cpu") == workers
        assert torch.get_num_threads() == 2 and torch.get_rng_state().equal(generator)
        large = [{**CONFIGS[0], "activation_dim": 2**12, "dict_size": 2**16}] * 3
        for configs, device in ((CONFIGS[:1], "cpu"), (CONFIGS, "cuda"), (large, "cpu")):
            assert choose_workers(configs, B, torch.float32, device) == 1
        torch.set_num_threads(1)
        assert choose_workers(CONFIGS, B, torch.float32, "cpu") == 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("config", CONFIGS)
def test_activations_that_are_all_zero_are_refused(config):
    with pytest.raises(ValueError, match="all activations are zero"):
        trainSAE(iter([torch.zeros(B, D)] * STEPS), [config], STEPS, verbose=False)
