"""Centring: what is trained on lies around the origin, what is saved takes raw activations."""

import json

import pytest
import torch

from demo_config import ARCHITECTURES
from dictionary_learning.dictionary import DICTIONARIES
from dictionary_learning.formats import find_saes, load_dictionary
from dictionary_learning.model import LanguageModel


@pytest.mark.parametrize("name", DICTIONARIES)
def test_a_shifted_sae_does_at_x_plus_mean_what_it_did_at_x(name):
    D, F = 8, 24
    more = {"k": 4} if "TopK" in name else {}
    more |= {"group_sizes": [8, 16]} if "Matryoshka" in name else {}
    generator = torch.Generator().manual_seed(0)
    ae = DICTIONARIES[name](D, F, generator=generator, **more).double()
    with torch.no_grad():
        for parameter in ae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).abs())
    x_BD = torch.randn(50, D, generator=generator, dtype=torch.float64)
    mean_D = 10 * torch.randn(D, generator=generator, dtype=torch.float64)
    x_hat_BD, f_BF = ae(x_BD, output_features=True)
    assert (f_BF > 0).any()
    ae.shift(mean_D)
    shifted_BD, g_BF = ae(x_BD + mean_D, output_features=True)
    torch.testing.assert_close(g_BF, f_BF)
    torch.testing.assert_close(shifted_BD, x_hat_BD + mean_D)


def test_jump_relu_that_takes_b_dec_from_its_input_is_shifted_too():
    ae = DICTIONARIES["JumpReluAutoEncoder"](
        4, 8, generator=torch.Generator().manual_seed(0), apply_b_dec_to_input=True
    )
    x_BD, mean_D = torch.randn(20, 4, generator=torch.Generator().manual_seed(1)), torch.full((4,), 3.0)
    before_BD = ae(x_BD)
    ae.shift(mean_D)
    torch.testing.assert_close(ae(x_BD + mean_D), before_BD + mean_D)


@pytest.fixture
def offset(monkeypatch):
    """offset(by): from here on every activation of the model lies so much further along every axis."""
    whole = LanguageModel.activations
    return lambda by: monkeypatch.setattr(
        LanguageModel, "activations", lambda *args: {layer: x + by for layer, x in whole(*args).items()}
    )


def record(folder):
    return json.loads(next(folder.glob("*/run.json")).read_text())


def test_an_offset_changes_nothing_but_the_biases_of_what_is_centred(run, offset, tmp_path):
    flags = ["--architectures", *ARCHITECTURES, "--center", "--no_eval", "--no-mask", "--num_tokens", 1500]
    assert run(*flags, "--save_dir", tmp_path / "as_it_is") == 0
    offset(4.0)
    assert run(*flags, "--save_dir", tmp_path / "moved") == 0
    here, there = find_saes(tmp_path / "as_it_is"), find_saes(tmp_path / "moved")
    assert len(here) == len(there) == 8
    for one, two in zip(here, there, strict=True):
        ae, moved = load_dictionary(one)[0], load_dictionary(two)[0]
        ae.shift(torch.full((16,), 4.0))
        for name, tensor in ae.state_dict().items():
            torch.testing.assert_close(moved.state_dict()[name], tensor, rtol=0.02, atol=0.02, msg=f"{two}: {name}")
        assert json.loads((two / "config.json").read_text())["trainer"]["norm_factor"] == pytest.approx(
            json.loads((one / "config.json").read_text())["trainer"]["norm_factor"], rel=1e-4
        )


def test_the_ratio_of_mean_to_spread_is_told(run, offset, tmp_path, capsys):
    flags = ["--architectures", "batch_top_k", "--no_eval", "--num_tokens", 1500, "--no-mask", "--layers", 1, 3]
    assert run(*flags, "--save_dir", tmp_path / "as_it_is") == 0
    offset(4.0)
    assert run(*flags, "--save_dir", tmp_path / "moved") == 0
    told = capsys.readouterr().out.splitlines()[-2:]
    here, there = (record(tmp_path / name) for name in ("as_it_is", "moved"))
    for layer in ("1", "3"):
        ratio, factor = there["mean_to_std"][layer], there["norm_factors"][layer]
        spread = factor / (1 + ratio**2) ** 0.5  # |x|^2 is |mean|^2 + std^2
        assert ratio * spread == pytest.approx(16, rel=0.2)  # 4 in each of 16 dimensions
        assert spread == pytest.approx(
            here["norm_factors"][layer] / (1 + here["mean_to_std"][layer] ** 2) ** 0.5, rel=0.01
        )
        assert any(f"{ratio:.2f} in layer {layer}" in line for line in told)
    assert "--center" in " ".join(told)
