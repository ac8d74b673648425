"""The loop as a library: `trainSAE` on an iterator of tensors."""

import copy
import os
import signal

import pytest
import torch

from dictionary_learning.formats import load_dictionary
from dictionary_learning.trainers import BatchTopKTrainer, StandardTrainer
from dictionary_learning.training import signals_noted, trainSAE

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
