"""An SAE whose latents are split over processes trains as one process trains it."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from demo_config import ARCHITECTURES, DEFAULTS
from dictionary_learning.kernels import WHOLE, Shard
from dictionary_learning.sweep import Sweep, get_trainer_configs
from dictionary_learning.trainers.trainer import SAETrainer, SparseTrainer

B, D, F, K, STEPS = 32, 12, 64, 2, 100
SWEEP = Sweep.of(
    DEFAULTS,
    num_tokens=STEPS * B,
    sae_batch_size=B,
    dictionary_widths=[F],
    learning_rates=[3e-3],
    target_l0s=[K],
    standard_penalties=[0.1],
    p_anneal_penalties=[0.02],
    gated_penalties=[0.1],
    dead_after_tokens=3 * B,  # so that the auxiliary loss takes part
    threshold_start_step=20,
)
SPARSE = [name for name in ARCHITECTURES if "top_k" not in name]  # these have a dense and a sparse form of the step
CASES = [*ARCHITECTURES, *(f"{name}, sparse" for name in SPARSE)]


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(30, D, generator=generator) / D**0.5
    return [(torch.rand(B, 30, generator=generator) < 0.1).float() @ directions for _ in range(STEPS)]


def trained(case: str, shard: Shard) -> SAETrainer:
    name, _, form = case.partition(", ")
    (config,) = get_trainer_configs(SWEEP, {name: ARCHITECTURES[name]}, "model", 0, D, "cpu")
    if name == "p_anneal":  # gentle: with p near 0 rounding grows a thousandfold, in the reference too
        config |= {"lr": 3e-4, "p_end": 0.5}
    trainer = config.pop("trainer")(**config, shard=shard)
    for step, x_BD in enumerate(batches()):
        if isinstance(trainer, SparseTrainer):
            trainer.sparse = bool(form)
        out = trainer.update(step, x_BD)
    trainer.said = torch.tensor([float(out.loss), float(out.l0()), float(trainer.dead_features())])
    return trainer


def worker(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    shard = Shard(rank, size, dist.group.WORLD)
    found = {}
    for case in CASES[: None if size == 2 else len(ARCHITECTURES)]:
        trainer = trained(case, shard)
        found[case] = (trainer.whole_ae().state_dict(), trainer.said)
    ties = torch.arange(size * 6).reshape(size, 6)[rank]  # flat indices: the lowest belong to rank 0
    found["ties"] = shard.largest_of_batch(torch.tensor([1.0, 0, 0, 0, 0, 0]), ties, 8).tolist()
    found["few"] = shard.largest_of_batch(torch.ones(2), ties[:2], 100).tolist()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def split(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    mp.spawn(worker, (request.param, str(folder)), request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@functools.cache
def trained_whole(case: str) -> SAETrainer:
    return trained(case, WHOLE)


@pytest.mark.parametrize("case", CASES)
def test_split_latents_train_as_whole_ones(split, case):
    trainer = trained_whole(case)
    whole = trainer.whole_ae().state_dict()
    assert float(trainer.said[1]) > 0.5  # something is active
    for weights, said in (found[case] for found in split if case in found):
        assert weights.keys() == whole.keys()
        for name in whole:
            torch.testing.assert_close(weights[name], whole[name], atol=1e-5, rtol=0, msg=f"{case}: {name}")
        torch.testing.assert_close(said, trainer.said, atol=1e-4, rtol=1e-5)


def test_ties_go_to_the_lowest_index(split):
    size = len(split)
    taken = [found["ties"] for found in split]
    zeros = 8 - size  # every process has one 1, the rest of the eight are zeros
    assert taken[0] == [True] + [i < zeros for i in range(5)]
    assert all(rank == [True, *([False] * 5)] for rank in taken[1:]) or zeros > 5
    assert all(found["few"] == [True, True] for found in split)


def test_the_auxiliary_loss_took_part():
    assert trained_whole("batch_top_k").said[2] > 0


def test_latents_that_cannot_be_split_evenly_are_refused():
    with pytest.raises(ValueError, match="64 latents cannot be split evenly over 3 processes"):
        Shard(0, 3).cut(torch.zeros(64, D), 0)
