"""Most laws are tested on text whose every position has a token id of its own, and a model that writes it into x."""

import io
import json
from types import SimpleNamespace

import pytest
import torch

from dictionary_learning.buffer import ActivationBuffer, position_mask
from dictionary_learning.data import MARK
from dictionary_learning.model import load_model

BOS, LAYERS, D = 0, (1, 3), 4


class Texts:
    """Batches of n texts of 6 positions: bos, then ids that never repeat; every third text is padded at its end."""

    def __init__(self, n: int = 40, batch_size: int = 3):
        self.n, self.batch_size, self.i = n, batch_size, 0

    def __next__(self):
        if self.i >= self.n:
            raise StopIteration
        texts_B = torch.arange(self.i, min(self.i + self.batch_size, self.n))
        self.i += len(texts_B)
        tokens_BL = 1 + 6 * texts_B[:, None] + torch.arange(6)
        tokens_BL[:, 0] = BOS
        mask_BL = (texts_B[:, None] % 3 != 2) | (torch.arange(6) < 4)
        return tokens_BL, torch.where(tokens_BL == BOS, MARK, mask_BL.int())

    def __iter__(self):
        return self

    def state_dict(self):
        return {"i": self.i}

    def load_state_dict(self, state):
        self.i = state["i"]


class TaggingLM:
    """x = (token id + layer / 10, 1000, 0, 0), and in the layers of `outliers` 100 times that at its token ids."""

    name, device, dtype = "a model", torch.device("cpu"), torch.float32

    def width(self, place):
        return D

    def hook_name(self, place):
        return f"blocks.{place}"

    def __init__(self, outliers: dict[int, set[int]] | None = None, most_texts: int = 1000):
        self.outliers, self.most_texts = outliers or {}, most_texts

    def activations(self, tokens_BL, mask_BL, layers):
        if len(tokens_BL) > self.most_texts:
            raise torch.OutOfMemoryError
        x_by_layer = {}
        for layer in layers:
            x_BLD = torch.zeros(*tokens_BL.shape, D, dtype=self.dtype)
            x_BLD[..., 0], x_BLD[..., 1] = tokens_BL + layer / 10, 1000
            x_BLD[torch.isin(tokens_BL, torch.tensor([*self.outliers.get(layer, set())]))] *= 100
            x_by_layer[layer] = x_BLD
        return x_by_layer


def make(texts=None, lm=None, layers=LAYERS, n_tokens=60, out_batch_size=8, **options):
    return ActivationBuffer(
        texts or Texts(), lm or TaggingLM(), layers, n_tokens=n_tokens, out_batch_size=out_batch_size, **options
    )


def ids(batches, layer=LAYERS[0]):
    """The token ids that were served, in order."""
    return [round(x - layer / 10) for batch in batches for x in batch[layer][:, 0].tolist()]


def text_ids(with_bos=False):
    tokens_BL, mask_BL = next(Texts(batch_size=1000))
    return tokens_BL[mask_BL > 0 if with_bos else mask_BL == 1].tolist()


@pytest.mark.parametrize("llm_batch_size, n_tokens, out_batch_size", [(3, 60, 8), (1, 8, 8), (40, 9, 5), (7, 10**4, 3)])
def test_every_unmasked_position_is_served_exactly_once(llm_batch_size, n_tokens, out_batch_size):
    buffer = make(Texts(batch_size=llm_batch_size), n_tokens=n_tokens, out_batch_size=out_batch_size)
    batches = list(buffer)
    assert sorted(ids(batches)) == text_ids()
    assert ids(batches) != text_ids()  # shuffled
    sizes = [len(batch[1]) for batch in batches]
    assert set(sizes[:-1]) == {out_batch_size} and 0 < sizes[-1] <= out_batch_size
    assert list(buffer) == []


def test_all_layers_serve_the_same_positions():
    for batch in make():
        assert batch.keys() == set(LAYERS)
        torch.testing.assert_close(
            batch[3] - batch[1], torch.tensor([0.2, 0, 0, 0]).expand_as(batch[1]), atol=1e-4, rtol=0
        )


def test_what_is_served_depends_on_the_seed_alone():
    batches = list(make())
    same = dict(
        again=make(),
        llm_batch=make(Texts(batch_size=11)),
        one_layer=make(layers=[LAYERS[0]]),
        in_halves=make(lm=TaggingLM(most_texts=1)),
    )
    for buffer in same.values():
        assert all(torch.equal(batch[1], other[1]) for batch, other in zip(batches, buffer, strict=True))
    assert ids(make(seed=1)) != ids(batches)
    global_state = torch.get_rng_state()
    list(make())
    assert torch.equal(torch.get_rng_state(), global_state)


def test_batches_mix_the_whole_buffer():
    first = ids([next(make(n_tokens=150, out_batch_size=50))])
    assert min(first) < 40 and max(first) > 140  # the first fill holds ids up to about 200


def test_the_buffer_is_filled_in_place_when_half_is_read():
    texts = Texts()
    buffer = make(texts, n_tokens=40, out_batch_size=8)
    where = {layer: rows.data_ptr() for layer, rows in buffer._rows_CD.items()}
    read = []
    for batch in buffer:
        read.append(texts.i)
        assert len(batch[1].untyped_storage()) // 4 <= 8 * D  # a batch does not hold on to the buffer
    # 40 rows, 8 a batch: 24 are unread after two batches, 16, fewer than half, after three
    assert read[0] == read[1] == read[2] < read[3] == read[4] == read[5] < read[6]
    assert where == {layer: rows.data_ptr() for layer, rows in buffer._rows_CD.items()}


@pytest.mark.parametrize("step", range(0, 24, 3))
def test_a_resumed_buffer_serves_the_same_bits(step):
    lm = TaggingLM(outliers={3: {9, 40, 41, 200}})
    straight = list(make(lm=lm))
    buffer = make(lm=lm, seed=5)
    buffer.generator.manual_seed(0)
    for _ in range(step):
        next(buffer)
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    list(buffer)
    file.seek(0)
    resumed = make(Texts(), lm, seed=7)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    rest = list(resumed)
    assert len(rest) == len(straight) - step
    for batch, other in zip(rest, straight[step:], strict=True):
        assert all(torch.equal(batch[layer], other[layer]) for layer in LAYERS)
    for name in ["counts", "median_norms", "norm_factors", "norm_bound"]:
        assert getattr(resumed, name) == getattr(buffer, name)
    assert resumed.config(1) == buffer.config(1)


@pytest.mark.parametrize("out_batch_size, n_measured", [(8, 60), (1, 60), (1, 100)])
def test_the_norm_factor_is_that_of_the_first_batches_served(out_batch_size, n_measured):
    n_tokens = 60 if n_measured == 60 else 200
    buffer = make(n_tokens=n_tokens, out_batch_size=out_batch_size)
    norm_factors = buffer.norm_factors
    if n_measured == 60:  # the first fill: the first 60 unmasked positions of the text
        tokens = torch.tensor(text_ids()[:60])
    else:  # 100 batches, and no fill before they are served
        tokens = torch.tensor(ids([next(buffer) for _ in range(100)]))
    for layer in LAYERS:
        expected = ((tokens.double() + layer / 10) ** 2 + 1000**2).mean().sqrt().item()
        assert norm_factors[layer] == pytest.approx(expected, rel=1e-6)
    assert buffer.norm_factors == norm_factors
    n_left = len(text_ids()) - (100 if n_measured == 100 else 0)
    assert len(ids(buffer)) == n_left  # what was measured is served


def test_outliers_in_any_layer_are_dropped_from_all_and_everything_is_counted():
    # median norm about 1000, so that 100 times as large is out; padding and bos are counted as what they are
    padding = 6 * 2 + 1 + 4
    lm = TaggingLM(outliers={1: {2, 50, BOS}, 3: {50, 70, padding}})
    buffer = make(lm=lm)
    assert sorted(ids(buffer)) == sorted(set(text_ids()) - {2, 50, 70})
    n_padding = 13 * 2
    assert buffer.counts == {"tokens": 240 - n_padding, "padding": n_padding, "bos": 40, "nonfinite": 0, "outliers": 3}


def test_without_mask_only_padding_is_dropped():
    buffer = make(lm=TaggingLM(outliers={1: {2, 50}}), mask=False)
    assert len(ids(buffer, layer=3)) == len(text_ids(with_bos=True)) == 240 - buffer.counts["padding"]
    assert buffer.counts["bos"] == buffer.counts["outliers"] == 0
    assert buffer.median_norms == {} and buffer.norm_bound is None and buffer.config(1)["median_norm"] is None


def test_the_median_is_that_of_the_first_llm_batch_without_bos_and_padding():
    buffer = make(Texts(batch_size=3), lm=TaggingLM(outliers={1: {BOS}}), max_norm_multiple=7.0)
    tokens = torch.tensor(text_ids()[:13])  # 5, 5 and 3 inner positions
    for layer in LAYERS:
        assert buffer.median_norms[layer] == pytest.approx((1000**2 + (tokens[6].item() + layer / 10) ** 2) ** 0.5)
        assert buffer.norm_bound[layer] == 7 * buffer.median_norms[layer]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_the_mask_drops_and_counts_marks_padding_outliers_and_what_is_not_finite(number):
    mask_BL = torch.tensor([[MARK, 1, MARK, 1, 1, 1, 0, 0]], dtype=torch.uint8)
    x_BLD = torch.ones(1, 8, D, dtype=torch.bfloat16)
    x_BLD[0, 3], x_BLD[0, 4, 0] = 50, number
    args = mask_BL, {2: x_BLD}
    keep_BL, counts = position_mask(*args, norm_bound={2: 20.0})
    assert keep_BL.tolist() == [[False, True, False, False, False, True, False, False]]
    assert counts == {"tokens": 6, "padding": 2, "bos": 2, "nonfinite": 1, "outliers": 1}
    finite_BL = mask_BL > 0
    finite_BL[0, 4] = False
    assert torch.equal(position_mask(*args)[0], finite_BL & (mask_BL != MARK))
    assert torch.equal(position_mask(*args, drop_bos=False)[0], finite_BL)
    assert torch.equal(position_mask(mask_BL.bool(), {2: x_BLD})[0], finite_BL)  # bools tell no marks


@pytest.mark.parametrize("most_texts, halvings", [(8, 0), (7, 1), (4, 1), (3, 2), (1, 3)])
def test_out_of_memory_halves_the_llm_batch_and_loses_no_text(most_texts, halvings):
    buffer = make(Texts(batch_size=8), TaggingLM(most_texts=most_texts))
    assert sorted(ids(buffer)) == text_ids()
    assert buffer.llm_batch_halvings == halvings


def test_out_of_memory_with_a_single_text():
    with pytest.raises(ValueError, match="no memory to run a model on one text of 6 tokens"):
        next(make(lm=TaggingLM(most_texts=0)))


def test_the_config_records_the_buffer_and_the_mask():
    buffer = make(Texts(batch_size=5), max_norm_multiple=9.0)
    config = buffer.config(3)
    assert json.loads(json.dumps(config)) == config
    expected = dict(
        d_submodule=D,
        io="out",
        n_ctxs=10,
        ctx_len=6,
        refresh_batch_size=5,
        out_batch_size=8,
        device="cpu",
        mask=True,
        max_norm_multiple=9.0,
        median_norm=buffer.median_norms[3],
    )
    assert expected.items() <= config.items()
    assert buffer.seconds.keys() == {"text", "llm"}


def test_it_serves_a_real_models_activations_in_its_dtype(tiny_model_folder):
    lm = load_model(str(tiny_model_folder), dtype=torch.bfloat16, last_layer=2)
    buffer = make(Texts(batch_size=40), lm, layers=[0, 2], n_tokens=1000)
    tokens_BL, mask_BL = next(Texts(batch_size=40))
    x_by_layer = lm.activations(tokens_BL, mask_BL, [0, 2])
    keep_BL = position_mask(mask_BL, x_by_layer, buffer.norm_bound)[0]
    batches = list(buffer)
    for layer in [0, 2]:
        served = torch.cat([batch[layer] for batch in batches])
        assert served.dtype == torch.bfloat16 and not served.requires_grad
        assert sorted(map(tuple, served.tolist())) == sorted(map(tuple, x_by_layer[layer][keep_BL].tolist()))


def test_a_buffer_smaller_than_a_batch():
    with pytest.raises(ValueError, match="a buffer of 7 tokens is smaller than a batch of 8"):
        make(n_tokens=7)


@pytest.mark.parametrize("n", [0, 1])
def test_too_little_text_for_one_batch(n):
    with pytest.raises(ValueError, match=f"the text has {5 * n} positions to train on, fewer than a batch of 8"):
        next(make(Texts(n)))


def test_a_model_without_a_single_number(monkeypatch):
    lm = TaggingLM()
    broken = SimpleNamespace(**{name: getattr(lm, name) for name in ("name", "device", "dtype", "width")})
    broken.activations = lambda tokens, mask, layers: {
        layer: torch.full((*tokens.shape, D), float("nan"), dtype=lm.dtype) for layer in layers
    }
    with pytest.raises(ValueError, match="112 of 112 positions have activations of a model that are not finite"):
        next(make(lm=broken, mask=False))
    with pytest.raises(ValueError, match="104 of 128 positions .* are not finite in torch.float32"):
        next(make(lm=broken))


class OverflowingLM(TaggingLM):
    """In float16, with activations that are not finite at some token ids, in layer 3 alone."""

    name, dtype = "a model", torch.float16

    def __init__(self, ids: set[int]):
        super().__init__()
        self.ids = torch.tensor([*ids])

    def activations(self, tokens_BL, mask_BL, layers):
        x_by_layer = super().activations(tokens_BL.clamp(max=2000), mask_BL, layers)
        x_by_layer[3][torch.isin(tokens_BL, self.ids)] *= torch.inf
        return x_by_layer


@pytest.mark.parametrize("mask", [True, False])
def test_activations_that_overflow_are_counted_apart_left_out_and_warned_about_with_the_dtype_to_use(mask):
    texts = Texts(n=400, batch_size=50)  # 2400 positions, 266 of them padding
    buffer = make(texts, OverflowingLM({8, 2000}), n_tokens=5000, mask=mask)
    with pytest.warns(UserWarning, match="2 of 2,134 positions .* torch.float16: .*--dtype bfloat16") as warned:
        batches = list(buffer)
    assert len(warned) == 1
    assert buffer.counts == {"tokens": 2134, "padding": 266, "bos": 400 * mask, "nonfinite": 2, "outliers": 0}
    assert sum(len(batch[1]) for batch in batches) == 2134 - 400 * mask - 2
    assert all(x_BD.isfinite().all() for batch in batches for x_BD in batch.values())
    assert all(norm < 5000 for norm in buffer.norm_factors.values())


def test_more_than_a_thousandth_of_the_positions_that_overflow_is_an_error():
    with pytest.raises(ValueError, match="3 of 2,134 positions .* torch.float16: .*--dtype bfloat16"):
        next(make(Texts(n=400, batch_size=50), OverflowingLM({8, 1000, 2000}), n_tokens=5000))


def test_a_state_of_before_something_was_counted_can_be_continued():
    straight, buffer = list(make()), make()
    served = [next(buffer) for _ in range(5)]
    state = buffer.state_dict()
    del state["source"]["counts"]["nonfinite"]
    resumed = make()
    resumed.load_state_dict(state)
    served += list(resumed)
    assert all(torch.equal(one[1], other[1]) for one, other in zip(served, straight, strict=True))
    assert resumed.counts["nonfinite"] == 0


class FailingTexts(Texts):
    """Fails once, before the text of a given number."""

    def __init__(self, fail_at: int):
        super().__init__()
        self.fail_at = fail_at

    def __next__(self):
        if self.fail_at is not None and self.i >= self.fail_at:
            self.fail_at = None
            raise ConnectionError
        return super().__next__()


@pytest.mark.parametrize("fail_at", [15, 18, 30])
@pytest.mark.parametrize("resume", [False, True])
def test_an_error_of_the_text_in_the_middle_of_a_fill_loses_nothing(resume, fail_at):
    """By going on after it, or by resuming from a state taken then: the same batches as without it."""
    straight = list(make())
    buffer, served = make(FailingTexts(fail_at)), []
    with pytest.raises(ConnectionError):
        while True:
            served.append(next(buffer))
    assert 0 < len(served) < len(straight)
    if resume:
        file = io.BytesIO()
        torch.save(buffer.state_dict(), file)
        file.seek(0)
        buffer = make()
        buffer.load_state_dict(torch.load(file, weights_only=True))
    served += list(buffer)
    assert len(served) == len(straight)
    for one, other in zip(served, straight, strict=True):
        assert all(one[layer].equal(other[layer]) for layer in LAYERS)


@pytest.mark.parametrize("most_texts", [3, 1000])
def test_reading_ahead_changes_nothing_that_is_served(most_texts):
    for n_texts in (9, 20, 40, 41):
        plain, ahead = (
            list(make(Texts(n_texts), TaggingLM(most_texts=most_texts), works_ahead=w)) for w in (False, True)
        )
        assert len(plain) == len(ahead) > 2
        for one, two in zip(plain, ahead, strict=True):
            assert all(torch.equal(one[layer], two[layer]) for layer in LAYERS)


@pytest.mark.parametrize("step", [1, 4, 9, 17])
@pytest.mark.parametrize("before, after", [(True, False), (False, True), (True, True)])
def test_a_resumed_buffer_that_read_ahead_serves_the_same_bits(step, before, after, tmp_path):
    straight = list(make(works_ahead=False))
    buffer = make(works_ahead=before)
    served = [next(buffer) for _ in range(step)]
    torch.save(buffer.state_dict(), tmp_path / "state")
    resumed = make(seed=7, works_ahead=after)
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for rest in (list(buffer), list(resumed)):
        assert len(served) + len(rest) == len(straight)
        for one, two in zip(straight, [*served, *rest], strict=True):
            assert all(torch.equal(one[layer], two[layer]) for layer in LAYERS)


def test_an_error_met_ahead_is_raised_where_the_rows_are_needed_and_nothing_is_lost():
    straight = list(make(works_ahead=False))
    buffer, served, errors = make(FailingTexts(18), works_ahead=True), [], 0
    while True:
        try:
            served.append(next(buffer))
        except ConnectionError:
            errors += 1
        except StopIteration:
            break
    assert errors == 1 and len(served) == len(straight)
    for one, two in zip(straight, served, strict=True):
        assert all(torch.equal(one[layer], two[layer]) for layer in LAYERS)
