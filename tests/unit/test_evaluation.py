"""Laws of the metrics: what is exact is tested as exact, the rest against direct formulas on whole tensors.

B contexts, L positions, N tokens, D activation_dim, F dict_size.
"""

import json
import math
import re
import threading

import pytest
import torch
from torch.nn.functional import cross_entropy

from dictionary_learning.buffer import Mask
from dictionary_learning.data import MARK
from dictionary_learning.dictionary import (
    AutoEncoder,
    AutoEncoderTopK,
    BatchTopKSAE,
    Dictionary,
    GatedAutoEncoder,
    IdentityDict,
    JumpReluAutoEncoder,
    MatryoshkaBatchTopKSAE,
)
from dictionary_learning.evaluation import REFERENCE_METRICS, Metrics, Ratios, evaluate, evaluate_saes
from dictionary_learning.model import load_model

D, F, L, CONTEXTS, LAYER = 16, 64, 12, 7, 1


class ZeroDict(IdentityDict):
    """Reconstructs everything as 0."""

    def decode(self, f_BF):
        return torch.zeros_like(f_BF)


class Broken(IdentityDict):
    def encode(self, x_BD):
        raise RuntimeError("no kernel for this")


def load(folder, dtype=torch.float32):
    """The tiny model with larger weights: as initialised, it hardly uses its layers."""
    lm = load_model(str(folder), dtype=dtype)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.ndim == 2:
                parameter *= 8
    return lm


@pytest.fixture(scope="module")
def lm(tiny_model_folder):
    return load(tiny_model_folder)


@pytest.fixture(scope="module")
def text(lm):
    """(tokens_BL, mask_BL) of all contexts, which the model itself wrote: a marked bos first, two of them padded."""
    generator = torch.Generator().manual_seed(1)
    tokens_BL = torch.zeros(CONTEXTS, 1, dtype=torch.long)
    while tokens_BL.shape[1] < L:
        logits_BLV, _ = lm.run(tokens_BL, torch.ones_like(tokens_BL))
        letters_BV = logits_BLV[:, -1, 1:].softmax(-1)
        tokens_BL = torch.cat([tokens_BL, 1 + letters_BV.multinomial(1, generator=generator)], dim=1)
    mask_BL = torch.ones(CONTEXTS, L, dtype=torch.uint8)
    mask_BL[:, 0] = MARK
    mask_BL[2, 8:] = mask_BL[5, 3:] = 0
    return tokens_BL, mask_BL


def sae(cls: type[Dictionary], seed=0, **settings) -> Dictionary:
    return cls(D, F, generator=torch.Generator().manual_seed(seed), **settings)


def with_threshold(cls, **settings):
    dictionary = sae(cls, k=6, **settings)
    dictionary.threshold.fill_(0.3)
    return dictionary


def every_sae():
    return [
        ("standard", sae(AutoEncoder), LAYER),
        ("gated", sae(GatedAutoEncoder), LAYER),
        ("jump_relu", sae(JumpReluAutoEncoder), LAYER),
        ("top_k", with_threshold(AutoEncoderTopK), LAYER),
        ("batch_top_k", with_threshold(BatchTopKSAE), LAYER),
        ("matryoshka", with_threshold(MatryoshkaBatchTopKSAE, group_sizes=[16, 48]), 2),
    ]


def in_batches(text, size):
    return list(zip(*(tensor.split(size) for tensor in text), strict=True))


def scored(text):
    """Positions whose predictions count: not bos, and a real token follows."""
    mask_BL = text[1]
    scored_BL = mask_BL == 1
    scored_BL[:, :-1] &= mask_BL[:, 1:] > 0
    scored_BL[:, -1] = False
    return scored_BL


def random_reconstruction(n=21):
    generator = torch.Generator().manual_seed(2)
    x_ND = 3 + torch.randn(n, D, generator=generator)
    x_hat_ND = x_ND + 0.3 * torch.randn(n, D, generator=generator)
    f_NF = torch.relu(torch.randn(n, F, generator=generator) - 1)
    return x_ND, x_hat_ND, f_NF


def sums(x_ND, x_hat_ND, f_NF, batch_size=None, **options):
    metrics, n = Metrics(), len(x_ND)
    for parts in zip(*(t.split(batch_size or n) for t in (x_ND, x_hat_ND, f_NF)), strict=True):
        metrics.update(*parts, **options)
    return metrics.compute()


# -- what activations alone say


def test_metrics_equal_their_formulas_on_whole_tensors():
    x_ND, x_hat_ND, f_NF = (tensor.double() for tensor in random_reconstruction())
    results = sums(*random_reconstruction(), batch_size=4)
    norm_N, norm_hat_N, dot_N = x_ND.norm(dim=1), x_hat_ND.norm(dim=1), (x_ND * x_hat_ND).sum(1)
    variance = ((x_ND - x_ND.mean(0)) ** 2).sum()
    density_F = (f_NF > 0).double().mean(0)
    expected = {
        "l0": (f_NF > 0).sum(1).double().mean(),
        "l1_loss": f_NF.sum(1).mean(),
        "l2_loss": (x_ND - x_hat_ND).norm(dim=1).mean(),
        "frac_variance_explained": 1 - ((x_ND - x_hat_ND) ** 2).sum() / variance,
        "frac_variance_explained_centered": 1 - (x_ND - x_hat_ND).var(0).sum() / x_ND.var(0).sum(),
        "cossim": (dot_N / norm_N / norm_hat_N).mean(),
        "l2_ratio": (norm_hat_N / norm_N).mean(),
        "relative_reconstruction_bias": (norm_hat_N**2).sum() / dot_N.sum(),
        "frac_alive": (density_F > 0).double().mean(),
        "freq_over_1_percent": (density_F > 0.01).double().mean(),
        "freq_over_10_percent": (density_F > 0.1).double().mean(),
        "n_tokens": len(x_ND),
        "l2_loss_stderr": (x_ND - x_hat_ND).norm(dim=1).std() / math.sqrt(len(x_ND)),
    }
    assert {name: results[name] for name in expected} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_of_half_precision_are_counted_exactly(dtype):
    generator = torch.Generator().manual_seed(0)
    f_NF = torch.relu(torch.randn(600, 700, generator=generator) * 200).to(dtype)  # float16 sums overflow
    metrics = Metrics()
    metrics.update(torch.randn(600, 4, generator=generator), torch.zeros(600, 4), f_NF)
    results, density_F = metrics.compute(), metrics.density_F()
    assert results["l0"] == pytest.approx(float((f_NF > 0).sum(1).double().mean()), rel=1e-9)
    assert results["l1_loss"] == pytest.approx(float(f_NF.double().sum(1).mean()), rel=1e-9)
    assert density_F is not None and density_F.equal((f_NF > 0).double().mean(0).float())


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_metrics_do_not_depend_on_the_batch_size(batch_size):
    assert sums(*random_reconstruction(), batch_size=batch_size) == pytest.approx(
        sums(*random_reconstruction()), rel=1e-9
    )


def test_a_constant_offset_lowers_variance_explained_but_not_the_centered_one():
    x_ND, x_hat_ND, f_NF = random_reconstruction()
    before, after = sums(x_ND, x_hat_ND, f_NF), sums(x_ND, x_hat_ND + 0.5, f_NF)
    assert after["frac_variance_explained"] < before["frac_variance_explained"] - 0.1
    name = "frac_variance_explained_centered"
    assert after[name] == pytest.approx(before[name], abs=1e-6)


def test_variance_explained_survives_a_mean_far_from_zero():
    x_ND = torch.randn(1000, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error_ND = 0.1 * x_ND.roll(1, 0)
    f_NF = torch.zeros(1000, F)
    near, far = (sums(x_ND + c, x_ND + c + error_ND, f_NF, batch_size=10) for c in (0, 1e8))
    assert far["frac_variance_explained"] == pytest.approx(near["frac_variance_explained"], abs=1e-6)


def test_vectors_of_zeros_give_numbers_or_none_but_never_nan():
    x_ND, zero_ND, f_NF = torch.zeros(4, D), torch.zeros(4, D), torch.zeros(4, F)
    results = sums(x_ND, zero_ND, f_NF)
    undefined = ("frac_variance_explained", "cossim", "l2_ratio", "relative_reconstruction_bias")
    assert [results[name] for name in undefined] == [None] * 4
    x_ND[0] = 1
    results = sums(x_ND, zero_ND, f_NF)
    assert (results["cossim"], results["l2_ratio"], results["relative_reconstruction_bias"]) == (0, 0, None)
    json.dumps(results, allow_nan=False)


def test_standard_errors_take_a_context_as_one_sample():
    value_N = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, repeated = Ratios(), Ratios()
    tokens.add(value=value_N, n=torch.ones(60))
    repeated.add(value=5 * value_N, n=torch.full((60,), 5.0))  # each token five times over in its context
    classic = float(value_N.std()) / math.sqrt(60)
    assert tokens.stderr("value", "n") == pytest.approx(classic, rel=1e-9)
    assert repeated.stderr("value", "n") == pytest.approx(classic, rel=1e-9)
    assert tokens.stderr("n", "n") == 0
    single = Ratios()
    single.add(value=torch.ones(1), n=torch.ones(1))
    assert single.stderr("value", "n") is None


def test_evaluate_reads_batches_of_tensors_or_of_one_layer():
    dictionary, x_ND = sae(AutoEncoder), torch.randn(30, D, generator=torch.Generator().manual_seed(0))
    results = evaluate(dictionary, iter(x_ND.split(10)), n_batches=3)
    assert results == evaluate(dictionary, [{3: part_ND} for part_ND in x_ND.split(10)], n_batches=3)
    assert results["n_tokens"] == 30
    assert results == pytest.approx(evaluate(dictionary, [x_ND]), rel=1e-5)
    with pytest.raises(ValueError, match="needs 4 batches of activations, but there are only 3"):
        evaluate(dictionary, x_ND.split(10), n_batches=4)


# -- what the model loses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_identity_recovers_exactly_1_and_a_zero_sae_exactly_0(tiny_model_folder, text, dtype):
    saes = [("identity", IdentityDict(D), LAYER), ("zero", ZeroDict(D), LAYER), ("last", IdentityDict(D), 3)]
    evaluations = evaluate_saes(load(tiny_model_folder, dtype), saes, in_batches(text, 3))
    for name in ("identity", "last"):
        identity = evaluations[name].results
        exact = ("frac_recovered", "frac_recovered_mean_ablation", "kl_score", "frac_variance_explained")
        assert [identity[metric] for metric in exact] == [1] * 4
        assert identity["loss_reconstructed"] == identity["loss_original"]
        assert (identity["kl_divergence"], identity["frac_recovered_stderr"]) == (0, 0)
    zero = evaluations["zero"].results
    assert (zero["frac_recovered"], zero["kl_score"], zero["frac_recovered_stderr"]) == (0, 0, 0)
    assert zero["loss_reconstructed"] == zero["loss_zero"] != zero["loss_original"]


def test_losses_equal_those_of_the_model_with_its_layer_overwritten(lm, text):
    tokens_BL, mask_BL = text
    dictionary = sae(AutoEncoder)
    results = evaluate_saes(lm, [("sae", dictionary, LAYER)], in_batches(text, CONTEXTS))["sae"].results
    keep_BL, scored_BL = mask_BL == 1, scored(text)
    x_mean_D = lm.activations(*text, [LAYER])[LAYER][keep_BL].mean(0)

    def log_probs(replace) -> torch.Tensor:
        def hook(_module, _args, output):
            output[keep_BL] = replace(output[keep_BL])
            return output

        handle = lm.layers[LAYER].register_forward_hook(hook)
        with torch.no_grad():
            logits_BLV = lm.model(tokens_BL, attention_mask=(mask_BL > 0).long(), use_cache=False).logits
        handle.remove()
        return logits_BLV.double().log_softmax(-1)

    def loss(log_p_BLV) -> float:
        targets_BL = tokens_BL.roll(-1, dims=1)
        return float(cross_entropy(log_p_BLV[scored_BL], targets_BL[scored_BL]))

    original, reconstructed = log_probs(lambda x_ND: x_ND), log_probs(dictionary)
    kl_BL = (original.exp() * (original - reconstructed)).sum(-1)
    zero, mean = loss(log_probs(torch.zeros_like)), loss(log_probs(lambda x_ND: x_mean_D.expand_as(x_ND)))
    expected = {
        "loss_original": loss(original),
        "loss_reconstructed": loss(reconstructed),
        "loss_zero": zero,
        "loss_mean_ablated": mean,
        "kl_divergence": float(kl_BL[scored_BL].mean()),
        "frac_recovered": (zero - loss(reconstructed)) / (zero - loss(original)),
        "frac_recovered_mean_ablation": (mean - loss(reconstructed)) / (mean - loss(original)),
        "n_loss_tokens": int(scored_BL.sum()),
        "n_tokens": int(keep_BL.sum()),
    }
    assert {name: results[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_no_result_depends_on_the_batch_size(lm, text, batch_size):
    """Up to the noise of the model's own float32 arithmetic, which depends on the shape of its batch."""
    whole = evaluate_saes(lm, every_sae(), in_batches(text, CONTEXTS))
    parts = evaluate_saes(lm, every_sae(), in_batches(text, batch_size))
    for name, (results, density_F) in parts.items():
        expected = whole[name].results
        assert results.pop("hyperparameters") == expected.pop("hyperparameters")
        assert results == pytest.approx(expected, rel=1e-3, abs=1e-5)
        torch.testing.assert_close(density_F, whole[name].density_F)


def test_results_do_not_depend_on_the_other_saes(lm, text):
    together = evaluate_saes(lm, every_sae(), in_batches(text, 3))
    for subject in every_sae():
        alone = evaluate_saes(lm, [subject], in_batches(text, 3))
        assert alone[subject[0]].results == together[subject[0]].results


def test_both_ways_of_the_top_k_family_encode_once(lm, text, monkeypatch):
    n_encoded = 0

    def post_relu(ae, x_ND):
        nonlocal n_encoded
        n_encoded += len(x_ND)
        return torch.relu(torch.nn.functional.linear(x_ND - ae.b_dec, ae.encoder_FD, ae.encoder_bias_F))

    monkeypatch.setattr(BatchTopKSAE, "post_relu", post_relu)
    ((results, _),) = evaluate_saes(
        lm, [("top_k", with_threshold(AutoEncoderTopK), LAYER)], in_batches(text, 3)
    ).values()
    assert n_encoded == results["n_tokens"] > 0 and results["l0"] != results["topk_l0"]


@pytest.mark.parametrize("many_logits", [False, True])
def test_batches_of_text_are_shared_out_to_threads_unless_their_logits_are_many(
    many_logits, tiny_model_folder, text, monkeypatch
):
    lm = load(tiny_model_folder)
    expected = evaluate_saes(lm, every_sae(), in_batches(text, 2))
    used: set[tuple[str, int]] = set()
    lm.layers[-1].register_forward_hook(
        lambda *_: used.add((threading.current_thread().name.split("_")[0], torch.get_num_threads()))
    )
    if many_logits:
        monkeypatch.setattr("dictionary_learning.evaluation.LOGITS_AT_A_TIME", 1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        shared = evaluate_saes(lm, every_sae(), in_batches(text, 2))
    finally:
        torch.set_num_threads(threads)
    assert used == ({("MainThread", 3)} if many_logits else {("workers", 1)})
    for name, (results, density_F) in shared.items():
        tolerance = {"rel": 1e-3, "abs": 1e-5} if many_logits else {"rel": 0, "abs": 0}
        assert results.pop("hyperparameters") == expected[name].results.pop("hyperparameters")
        assert results == pytest.approx(expected[name].results, **tolerance)
        torch.testing.assert_close(density_F, expected[name].density_F)


class Counting:
    """The model, with a count of how often its upper layers run."""

    def __init__(self, lm):
        self.lm, self.n_run_from = lm, 0

    def __getattr__(self, name):
        return getattr(self.lm, name)

    def run_from(self, *args):
        self.n_run_from += 1
        return self.lm.run_from(*args)


def test_every_sae_has_its_own_mask_whatever_the_others_of_its_layer_have(lm, text):
    """Also where another one's leaves nothing; and what masks have in common is computed once."""
    mask_BL = text[1]
    norms_N = lm.activations(*text, [LAYER])[LAYER][mask_BL == 1].norm(dim=1)
    low, middle = float(norms_N.quantile(0.3)), float(norms_N.quantile(0.6))
    masks = {"low": Mask(norm_bound=low), "middle": Mask(norm_bound=middle), "same": Mask(norm_bound=middle + 1e-6)}
    masks |= {"all": Mask(drop_bos=False), "none": Mask(norm_bound=1e-9), "free": Mask()}
    saes = [(name, sae(AutoEncoder), LAYER) for name in masks]
    counting = Counting(lm)
    together = evaluate_saes(counting, saes, in_batches(text, CONTEXTS), masks=masks)
    # zero and mean for each of: low, middle and same, all, free; and each SAE that has something to be scored on
    assert counting.n_run_from == 4 * 2 + 5
    for subject in saes:
        name = subject[0]
        if name == "none":
            assert "the evaluation text is too little" in together[name].results["error"]
            continue
        alone = evaluate_saes(lm, [subject], in_batches(text, CONTEXTS), masks=masks)[name]
        assert together[name].results == alone.results
        assert torch.equal(together[name].density_F, alone.density_F)
    n_tokens = {name: evaluation.results["n_tokens"] for name, evaluation in together.items()}
    assert n_tokens["low"] == int((norms_N <= low).sum()) < n_tokens["middle"] == n_tokens["same"] < n_tokens["free"]
    assert n_tokens["all"] == int((mask_BL > 0).sum())


def test_the_mask_of_an_sae_is_that_of_its_training():
    assert Mask.of({"mask": True, "median_norm": 3.0, "max_norm_multiple": 10.0}) == Mask(True, 30.0)
    assert Mask.of({"mask": False, "median_norm": None, "max_norm_multiple": None}) == Mask(False, None)
    assert Mask.of({}) == Mask(True, None)  # of another library


class Overflowing:
    """The model in float16, whose activations are not finite at some positions of a layer."""

    dtype = torch.float16

    def __init__(self, lm, positions: list[tuple[int, int]]):
        self.lm, self.positions = lm, tuple(zip(*positions, strict=True))

    def __getattr__(self, name):
        return getattr(self.lm, name)

    def activations(self, *args):
        x_by_layer = self.lm.activations(*args)
        x_by_layer[LAYER][self.positions] = torch.inf
        return x_by_layer

    def run(self, *args):
        logits_BLV, x_by_layer = self.lm.run(*args)
        for layer in x_by_layer.keys() & {LAYER}:
            x_by_layer[layer][self.positions] = torch.inf
        return logits_BLV, x_by_layer

    def run_from(self, layer, x_BLD, *text):
        return self.lm.run_from(layer, x_BLD.nan_to_num(posinf=0), *text)


def test_activations_that_overflow_are_counted_apart_and_said(lm, text):
    tokens_BL, mask_BL = (tensor.repeat(40, 1) for tensor in text)
    saes, n_tokens = [("sae", sae(AutoEncoder), LAYER), ("other", sae(AutoEncoder), 2)], int((mask_BL > 0).sum())
    for positions in ([(0, 3), (1, 4)], [(7 * i, 3) for i in range(n_tokens // 1000 + 1)]):
        overflowing = Overflowing(lm, positions)
        evaluations = evaluate_saes(overflowing, saes, [(tokens_BL, mask_BL)])
        sentence = f"{len(positions)} of {n_tokens:,} positions .* not finite in torch.float16: .*--dtype bfloat16"
        results = evaluations["sae"].results
        assert re.search(sentence, results["error" if len(positions) > 2 else "warning"])
        counted = results["hyperparameters"]["positions"]
        assert (counted["nonfinite"], counted["outliers"]) == (len(positions), 0)
        if len(positions) == 2:
            assert results["n_tokens"] == n_tokens - 40 * CONTEXTS - 2
        assert not {"error", "warning"} & evaluations["other"].results.keys()
    with pytest.raises(ValueError, match=sentence):  # it is the only one
        evaluate_saes(overflowing, saes[:1], [(tokens_BL, mask_BL)])


def test_results_have_the_references_keys_first_and_are_plain_finite_json(lm, text):
    settings = {"dataset": "letters"}
    for results, density_F in evaluate_saes(lm, every_sae(), in_batches(text, 3), hyperparameters=settings).values():
        assert list(results)[:13] == [*REFERENCE_METRICS, "hyperparameters"]
        assert all(math.isfinite(results[name]) for name in REFERENCE_METRICS)
        assert {"n_inputs": 7, "context_length": L, "dataset": "letters"}.items() <= results["hyperparameters"].items()
        json.dumps(results, allow_nan=False)
        assert density_F is not None and density_F.shape == (F,)
        assert results["frac_alive"] == float((density_F > 0).float().mean())


# -- masked positions


class Meddled:
    """The model, with other activations where the mask excludes a position."""

    def __init__(self, lm, text):
        self.lm, self.excluded, self.spliced = lm, text[1] != 1, []

    def __getattr__(self, name):
        return getattr(self.lm, name)

    def _meddle(self, x_by_layer):
        for x_BLD in x_by_layer.values():
            x_BLD[self.excluded] += 1000
        return x_by_layer

    def activations(self, *args):
        return self._meddle(self.lm.activations(*args))

    def run(self, *args):
        logits_BLV, x_by_layer = self.lm.run(*args)
        return logits_BLV, self._meddle(x_by_layer)

    def run_from(self, layer, x_BLD, *text):
        self.spliced.append(x_BLD[self.excluded])
        x_BLD[self.excluded] -= 1000
        return self.lm.run_from(layer, x_BLD, *text)


def test_masked_positions_keep_their_activation_and_count_nowhere(lm, text):
    saes, batches = [("top_k", with_threshold(AutoEncoderTopK), LAYER)], in_batches(text, CONTEXTS)
    clean, meddled_lm = evaluate_saes(lm, saes, batches), Meddled(lm, text)
    meddled = evaluate_saes(meddled_lm, saes, batches)["top_k"].results
    expected = clean["top_k"].results
    assert meddled.pop("hyperparameters") == expected.pop("hyperparameters")
    assert meddled == pytest.approx(expected, rel=1e-3, abs=1e-4)  # x + 1000 - 1000 is x up to rounding
    for metric in ("l0", "l2_loss", "frac_variance_explained", "topk_frac_variance_explained"):
        assert meddled[metric] == expected[metric]
    original_ND = lm.activations(*text, [LAYER])[LAYER][meddled_lm.excluded]
    assert len(meddled_lm.spliced) == 4  # zero, mean, threshold, top-k
    for spliced_ND in meddled_lm.spliced:
        torch.testing.assert_close(spliced_ND, original_ND + 1000)


def test_the_mask_follows_its_policy(lm, text):
    saes, batches = [("sae", sae(AutoEncoder), LAYER)], in_batches(text, 3)
    mask_BL = text[1]
    n_real, n_bos = int((mask_BL > 0).sum()), CONTEXTS
    norms_N = lm.activations(*text, [LAYER])[LAYER][mask_BL == 1].norm(dim=1)
    bound = float(norms_N.median()) + 1e-3
    masks = [Mask(drop_bos=False), Mask(), Mask(norm_bound=bound)]
    unmasked, default, bounded = (evaluate_saes(lm, saes, batches, masks={"sae": m})["sae"].results for m in masks)
    assert default == evaluate_saes(lm, saes, batches)["sae"].results
    assert unmasked["n_tokens"] == n_real == unmasked["n_loss_tokens"] + CONTEXTS
    assert default["n_tokens"] == n_real - n_bos
    assert bounded["n_tokens"] == int((norms_N <= bound).sum()) < default["n_tokens"]
    settings = bounded["hyperparameters"]
    assert settings["norm_bound"] == bound
    n_outliers = default["n_tokens"] - bounded["n_tokens"]
    expected = {"tokens": n_real, "padding": int((mask_BL == 0).sum()), "bos": n_bos}
    expected |= {"nonfinite": 0, "outliers": n_outliers}
    assert settings["positions"] == expected
    assert bounded["loss_original"] != default["loss_original"]


def test_text_without_a_position_to_evaluate_is_one_clear_error(lm):
    only_bos = (torch.zeros(2, 3, dtype=torch.long), torch.full((2, 3), MARK))
    for batches in ([], [only_bos]):
        with pytest.raises(ValueError, match="evaluation text"):
            evaluate_saes(lm, [("sae", sae(AutoEncoder), LAYER)], batches)


# -- top-k, and SAEs that fail


@pytest.mark.parametrize("cls", [AutoEncoderTopK, BatchTopKSAE])
def test_exact_top_k_stands_beside_the_threshold(lm, text, cls):
    dictionary = with_threshold(cls)
    with torch.no_grad():
        dictionary.encoder.bias += 5  # so that k latents are positive
    results = evaluate_saes(lm, [("sae", dictionary, LAYER)], in_batches(text, 3))["sae"].results
    assert results["k"] == results["topk_l0"] == 6
    assert results["l0"] > 20  # the threshold lets far more pass
    assert results["topk_frac_recovered"] != results["frac_recovered"]
    assert "warning" not in results


def test_a_threshold_never_recorded_is_said(lm, text):
    results = evaluate_saes(lm, [("sae", sae(BatchTopKSAE, k=6), LAYER)], in_batches(text, 3))["sae"].results
    assert "threshold was never recorded" in results["warning"]
    assert results["frac_recovered"] == results["topk_frac_recovered"]


def test_a_broken_sae_is_reported_and_the_others_are_as_without_it(lm, text):
    nan = sae(AutoEncoder)
    torch.nn.init.constant_(nan.bias, math.nan)
    silent = sae(JumpReluAutoEncoder)
    torch.nn.init.constant_(silent.threshold, 1e9)
    broken = [
        ("nan", nan, LAYER, "not finite"),
        ("narrow", AutoEncoder(8, F), LAYER, "8 dimensions, but the model has 16"),
        ("deep", sae(AutoEncoder), 4, "layers 0 to 3"),
        ("raises", Broken(D), 2, "no kernel for this"),
    ]
    good = [("silent", silent, LAYER), *every_sae()]
    batches = in_batches(text, 3)
    evaluations = evaluate_saes(lm, [subject[:3] for subject in broken] + good, batches)
    for name, _, _, sentence in broken:
        results, density_F = evaluations[name]
        assert sentence in results["error"]
        assert [results[metric] for metric in REFERENCE_METRICS] == [None] * 12 and density_F is None
        json.dumps(results, allow_nan=False)
    assert evaluations["silent"].results["warning"] == "no latent fires on this text."
    alone = evaluate_saes(lm, every_sae(), batches)
    for name in alone:
        assert evaluations[name].results == alone[name].results
    only_broken = evaluate_saes(lm, [("deep", sae(AutoEncoder), 4)], batches)
    assert "layers 0 to 3" in only_broken["deep"].results["error"]
