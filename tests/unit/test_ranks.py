"""Who trains what, and the order of a text that is cut into shards; the exchange itself is in e2e/test_world.py."""

import random

import pytest
import torch
from test_buffer import LAYERS, TaggingLM, Texts, ids, text_ids

from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.world import World, spread


def test_the_work_is_spread_evenly_and_a_layer_over_few():
    assert spread([5, 3, 5, 3], [1, 1, 2, 2], 2) == [0, 0, 1, 1]
    assert spread([1], [0], 3) == [0]
    rng = random.Random(0)
    for _ in range(50):
        costs = [rng.randint(1, 100) for _ in range(rng.randint(1, 30))]
        n = rng.randint(1, 8)
        owners = spread(costs, [rng.randint(0, 3) for _ in costs], n)
        loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == owner) for owner in range(n)]
        # longest processing time first is at most 4/3 of the best, which is at least these two
        assert max(loads) <= 4 / 3 * max(max(costs), sum(costs) / n) + max(costs) / 3
        assert max(loads) - min(loads) <= max(costs)


class Shard(Texts):
    """Each n-th batch of `Texts`."""

    def __init__(self, s: int, n_shards: int, fail_at: int | None = None):
        super().__init__()
        self.s, self.n_shards, self.fail_at = s, n_shards, fail_at

    def __next__(self):
        if self.fail_at is not None and self.i >= self.fail_at:
            self.fail_at = None
            raise ConnectionError("gone")
        while (self.i // self.batch_size) % self.n_shards != self.s:
            if self.i >= self.n:
                raise StopIteration
            self.i += self.batch_size
        return super().__next__()


def buffer_of(shards, n_tokens=60):
    return ActivationBuffer(shards, TaggingLM(), LAYERS, n_tokens=n_tokens, out_batch_size=8)


@pytest.mark.parametrize("n_shards", [1, 2, 4, 30])
@pytest.mark.parametrize("n_tokens", [8, 60, 1000])
def test_shards_take_turns_so_their_text_comes_in_its_own_order(n_shards, n_tokens):
    """Even where some of them have nothing (14 batches in 30 shards)."""
    whole = list(buffer_of(Texts(), n_tokens))
    batches = list(buffer_of([Shard(s, n_shards) for s in range(n_shards)], n_tokens))
    assert sorted(ids(batches)) == text_ids()
    first = whole[0], batches[0]
    assert first[0][LAYERS[0]].equal(first[1][LAYERS[0]])
    if n_tokens < 1000:
        assert len(whole) == len(batches)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("fail_at", [0, 12, 30])
def test_a_shard_that_cannot_be_reached_loses_nothing_of_the_others(fail_at, resume):
    straight = list(buffer_of([Shard(s, 4) for s in range(4)]))
    buffer, served = buffer_of([Shard(s, 4, fail_at if s == 2 else None) for s in range(4)]), []
    with pytest.raises(ConnectionError, match="gone"):
        while True:
            served.append(next(buffer))
    if resume:
        state, buffer = buffer.state_dict(), buffer_of([Shard(s, 4) for s in range(4)])
        buffer.load_state_dict(state)
    served += list(buffer)
    assert len(served) == len(straight)
    assert all(one[layer].equal(two[layer]) for one, two in zip(served, straight, strict=True) for layer in LAYERS)


def test_a_world_of_one_returns_what_it_is_given():
    world = World()
    assert world.gather(3) == [3] and world.ask_largest(1, 0)() == [1, 0] and world.together(lambda: "x", rank=0) == "x"
    assert world.sum_(torch.ones(2)).tolist() == [1, 1]
    with pytest.raises(ValueError, match="^mine$"):
        world.together(lambda: (_ for _ in ()).throw(ValueError("mine")))
