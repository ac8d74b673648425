"""Transcoders: they read one place and predict another.

B tokens, D width of what is read, E of what is predicted, F latents.
"""

import copy

import pytest
import torch
from torch import nn

from demo_config import ARCHITECTURES
from dictionary_learning import trainers
from dictionary_learning.dictionary import DICTIONARIES
from dictionary_learning.formats import load_dictionary, save_sae
from dictionary_learning.sites import Tap
from dictionary_learning.training import Loop, make_runs, make_trainer, trainSAE

B, D, E, F, STEPS = 64, 8, 6, 32, 200
SPECIFIC = {
    "TopKTrainer": {"k": 4, "threshold_start_step": 4, "threshold_beta": 0.9, "auxk_alpha": 1 / 32},
    "BatchTopKTrainer": {"k": 4, "threshold_start_step": 4, "threshold_beta": 0.9},
    "MatryoshkaBatchTopKTrainer": {
        "k": 4,
        "threshold_start_step": 4,
        "threshold_beta": 0.9,
        "group_fractions": [0.25, 0.75],
    },
    "JumpReluTrainer": {"target_l0": 4.0, "sparsity_warmup_steps": 4, "bandwidth": 0.1},
    "GatedSAETrainer": {"l1_penalty": 0.05, "sparsity_warmup_steps": 4},
    "StandardTrainer": {"l1_penalty": 0.05, "sparsity_warmup_steps": 4, "resample_steps": 60},
    "StandardTrainerAprilUpdate": {"l1_penalty": 0.05, "sparsity_warmup_steps": 4},
    "PAnnealTrainer": {
        "initial_sparsity_penalty": 0.003,
        "sparsity_warmup_steps": 4,
        "anneal_start": 100,
        "p_end": 0.5,
    },
}
TRAINERS = [row.trainer for row in ARCHITECTURES.values()]


def config(name: str, **more) -> dict:
    common = {"trainer": getattr(trainers, name), "activation_dim": D, "dict_size": F, "layer": 1, "lm_name": "a-model"}
    common |= {
        "steps": STEPS,
        "lr": 1e-2,
        "warmup_steps": 2,
        "seed": 0,
        "device": "cpu",
        "dead_feature_threshold": 2000,
    }
    return common | SPECIFIC[name] | more


TARGET = {"site": "mlp_in", "site_out": "mlp_out", "output_dim": E}


@pytest.fixture(scope="module")
def pairs():
    """Batches of (x_BD, y_BE): y is a rectified map of x and an offset, far from x in scale."""
    generator = torch.Generator().manual_seed(0)
    w_DE = torch.randn(D, E, generator=generator)
    drawn = [torch.randn(B, D, generator=generator) + 1 for _ in range(STEPS)]
    return [(5 * x_BD, 0.1 * torch.relu(x_BD @ w_DE) + 0.3) for x_BD in drawn]


def trained(configs: list[dict], pairs, folder, center: bool = False) -> list:
    """Trained by the loop of a run, whose norm factors and means are those of the batches."""
    runs = make_runs(configs, [folder / f"trainer_{i}" for i in range(len(configs))], lambda *places: {})
    places = (Tap(1, "mlp_in"), Tap(1, "mlp_out"))
    means = {place: torch.cat(part).mean(0) for place, part in zip(places, zip(*pairs, strict=True), strict=True)}
    means = means if center else {place: torch.zeros_like(mean) for place, mean in means.items()}
    factors = {
        place: float((torch.cat(part) - means[place]).square().sum(1).mean().sqrt())
        for place, part in zip(places, zip(*pairs, strict=True), strict=True)
    }
    batches = iter([dict(zip(places, pair, strict=True)) for pair in pairs])
    Loop(runs, batches, factors, STEPS, show_progress=False, log_steps=10, means=means if center else {}).train()
    return runs


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_every_architecture_learns_to_predict_another_place(pairs, tmp_path, skip):
    runs = trained([config(name, **TARGET, skip=skip) for name in TRAINERS], pairs, tmp_path)
    x_BD, y_BE = (torch.cat(part) for part in zip(*pairs, strict=True))
    for name, run in zip(TRAINERS, runs, strict=True):
        assert run.failure is None and bool(run.trainer.stopped) is False, name
        ae, saved = load_dictionary(run.folder)
        y_hat_BE = ae(x_BD)  # of raw activations
        explained = 1 - (y_BE - y_hat_BE).square().sum() / (y_BE - y_BE.mean(0)).square().sum()
        assert explained > 0.3, (name, explained)
        trainer = saved["trainer"]
        assert (trainer["site"], trainer["site_out"], trainer["output_dim"]) == ("mlp_in", "mlp_out", E)
        assert trainer["dict_class"].endswith("Transcoder") and ae.is_transcoder and ae.output_dim == E
        assert trainer["norm_factor"] / trainer["norm_factor_out"] > 10
        if skip:
            assert ae.W_skip.shape == (D, E) and ae.W_skip.abs().max() > 0
            with pytest.raises(ValueError, match=r"decodes with what it encoded: call decode\(f, x\)"):
                ae.decode(ae.encode(x_BD))
        else:
            assert ae.W_skip is None


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("center", [False, True])
def test_folding_norm_factors_and_means_changes_nothing(pairs, tmp_path, name, center):
    """f of the saved transcoder is norm_out times f of the trained one, y is norm_out times its y plus the mean."""
    [run] = trained([config(name, **TARGET, skip=True)], pairs, tmp_path, center)
    x_BD = torch.cat([pair[0] for pair in pairs])
    saved = run.trainer.ae  # folded in place when it was written
    assert torch.allclose(load_dictionary(run.folder)[0](x_BD), saved(x_BD), atol=1e-4)
    factor_in, factor_out = (run.config["trainer"][key] for key in ("norm_factor", "norm_factor_out"))
    unfolded = copy.deepcopy(saved)
    if center:
        means = [torch.cat(part).mean(0) for part in zip(*pairs, strict=True)]
        unfolded.shift(-means[0], -means[1])
    else:
        means = [torch.zeros(D), torch.zeros(E)]
    unfolded.scale(1 / factor_in, 1 / factor_out)
    x_n_BD = (x_BD - means[0]) / factor_in
    assert torch.allclose(unfolded(x_n_BD) * factor_out + means[1], saved(x_BD), atol=1e-4)
    norm_F = saved.decoder_FD.norm(dim=1)
    if name not in ("StandardTrainerAprilUpdate",):
        assert torch.allclose(norm_F, torch.ones(F), atol=1e-3), "decoder directions keep their norms"


def test_a_transcoder_to_its_own_place_is_the_sae(pairs, tmp_path):
    """To the bit: site_out equal to site makes no transcoder."""
    batches = [pair[0] for pair in pairs]
    for name in TRAINERS:
        same = trainSAE(iter(batches), [config(name, site="mlp_in", site_out="mlp_in")], STEPS, verbose=False)[0]
        plain = trainSAE(iter(batches), [config(name)], STEPS, verbose=False)[0]
        for (key, value), other in zip(same.ae.state_dict().items(), plain.ae.state_dict().values(), strict=True):
            assert torch.equal(value, other), (name, key)


@pytest.mark.parametrize("name", TRAINERS)
def test_the_sparse_form_of_a_step_is_the_dense_one(pairs, name):
    """Loss and gradients of a transcoder, in the form that a late step takes where there is one."""
    steps = []
    for sparse in (False, True):
        trainer = make_trainer(config(name, **TARGET, skip=True))
        with torch.no_grad():
            for parameter in trainer.ae.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        if hasattr(trainer, "sparse"):
            trainer.sparse = sparse
        if hasattr(trainer, "screened"):
            trainer.screened = sparse
        out = trainer.loss(pairs[0][0], 10, pairs[0][1])
        out.loss.backward()
        steps.append((out.loss.detach(), {n: p.grad for n, p in trainer.ae.named_parameters() if p.grad is not None}))
    assert torch.allclose(steps[0][0], steps[1][0], rtol=1e-4)
    assert "W_skip" in steps[0][1]
    for key, grad in steps[0][1].items():
        assert torch.allclose(grad, steps[1][1][key], atol=1e-4, rtol=1e-3), key


def test_the_decoder_bias_starts_at_the_targets_median():
    trainer = make_trainer(config("TopKTrainer", **TARGET))
    x_BD = torch.randn(B, D, generator=torch.Generator().manual_seed(0))
    y_BE = torch.randn(B, E, generator=torch.Generator().manual_seed(1)) + 7
    trainer.initialize(x_BD, y_BE)
    assert torch.allclose(trainer.ae.b_dec.detach(), torch.full((E,), 7.0), atol=0.5)


def test_nothing_is_subtracted_from_what_a_transcoder_reads():
    for name, row in DICTIONARIES.items():
        keywords = {"k": 4} if "TopK" in name else {}
        keywords |= {"group_sizes": [16, 16]} if "Matryoshka" in name else {}
        ae = row(D, F, **keywords, output_dim=D)
        with torch.no_grad():
            ae.get_parameter(ae.output_bias).fill_(100.0)
        assert ae.subtracted_D is None and ae.encode(torch.zeros(3, D)).abs().max() < 50, name
        assert ae(torch.zeros(3, D)).mean() > 50


@pytest.mark.parametrize(
    "more", [{"skip": True}, {"output_dim": E}, {"site": "mlp_in", "skip": True}], ids=["skip", "width", "site"]
)
def test_a_skip_or_another_width_without_another_place_is_refused(more):
    with pytest.raises(ValueError, match="are for transcoders, whose site_out|are for transcoders: site_out must be"):
        make_trainer(config("TopKTrainer", **more))


def test_data_of_one_place_train_no_transcoder(pairs):
    with pytest.raises(ValueError, match="a transcoder needs the activations of two places"):
        trainSAE(iter([pair[0] for pair in pairs]), [config("TopKTrainer", **TARGET)], STEPS, verbose=False)


def test_a_transcoder_is_never_taken_for_an_sae_by_the_reference(tmp_path):
    """Its loader goes by dict_class, and knows none of these."""
    ae = DICTIONARIES["AutoEncoderTopK"](D, F, k=4, output_dim=D)
    trainer = {"dict_class": ae.class_name, "activation_dim": D, "dict_size": F, "k": 4, "layer": 1, "lm_name": "m"}
    save_sae(tmp_path, ae, {"trainer": trainer | {"site": "mlp_in", "site_out": "mlp_out"}, "buffer": {}})
    assert ae.class_name == "AutoEncoderTopKTranscoder" and ae.class_name not in DICTIONARIES
    read, _ = load_dictionary(tmp_path)
    assert isinstance(read, nn.Module) and read.is_transcoder
    x_BD = torch.randn(5, D)
    assert torch.equal(read(x_BD), ae(x_BD))
