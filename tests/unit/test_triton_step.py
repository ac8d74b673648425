"""A whole training step on the Triton kernels equals one on torch's."""

import pytest
import torch

from demo_config import ARCHITECTURES, DEFAULTS
from dictionary_learning.kernels import use_kernels
from dictionary_learning.sweep import Sweep, get_trainer_configs
from dictionary_learning.trainers.trainer import SparseTrainer

pytest.importorskip("triton")

B, D, F, STEPS = 8, 12, 32, 30
SWEEP = Sweep.of(
    DEFAULTS,
    num_tokens=STEPS * B,
    sae_batch_size=B,
    dictionary_widths=[F],
    learning_rates=[3e-3],
    target_l0s=[3],
    standard_penalties=[0.1],
    p_anneal_penalties=[0.02],
    gated_penalties=[0.1],
    threshold_start_step=2,
)


def trained(name: str, kernels: str):
    use_kernels(kernels)
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        (config,) = get_trainer_configs(SWEEP, {name: ARCHITECTURES[name]}, "model", 0, D, device)
        trainer = config.pop("trainer")(**config)
        generator = torch.Generator().manual_seed(0)
        for step in range(6):
            if isinstance(trainer, SparseTrainer):
                trainer.sparse = True
            trainer.update(step, torch.randn(B, D, generator=generator))
    finally:
        use_kernels("torch")
    return trainer


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_six_steps_are_the_same(name):
    ours, theirs = trained(name, "triton"), trained(name, "torch")
    for (key, value), expected in zip(ours.ae.state_dict().items(), theirs.ae.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-5, msg=f"{name}: {key}")
    assert ours.num_tokens_since_fired.equal(theirs.num_tokens_since_fired)
