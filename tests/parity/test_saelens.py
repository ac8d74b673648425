"""Every architecture in the real SAELens: from `cfg.json` and, by SAELens's own converter, from `ae.pt`.

Needs the extra `interop`.

B tokens, D activation_dim, F dict_size.
"""

import importlib
import json
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cases import BUFFER, CASES, D, F

from dictionary_learning.dictionary import DICTIONARIES
from dictionary_learning.formats import load_dictionary

EXPECTED = {  # how SAELens calls it, and how it calls what was trained
    "standard": ("standard", "standard"),
    "standard_new": ("standard", "standard"),
    "p_anneal": ("standard", "standard"),
    "gated": ("gated", "gated"),
    "top_k": ("topk", "topk"),
    "batch_top_k": ("jumprelu", "batchtopk"),
    "matryoshka_batch_top_k": ("jumprelu", "matryoshka_batchtopk"),
    "jump_relu": ("jumprelu", "jumprelu"),
    "AutoEncoderNew": ("standard", "standard"),
}


@pytest.fixture(scope="session")
def sae_lens() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the packages that SAELens imports
        try:
            return importlib.import_module("sae_lens")
        except ImportError as error:
            pytest.fail(f"SAELens is not installed ({error}); pip install -e '.[interop]'", pytrace=False)


@torch.no_grad()
def agree(theirs, mine, x_BD: torch.Tensor) -> None:
    exact = (
        {"use_threshold": False} if type(mine).__name__ == "AutoEncoderTopK" else {}
    )  # SAELens has no threshold there
    f_BF = mine.encode(x_BD, **exact)
    assert (f_BF > 0).any()
    torch.testing.assert_close(theirs.encode(x_BD), f_BF, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.decode(f_BF), mine.decode(f_BF), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EXPECTED)
def test_saelens_opens_the_folder(name, sae_lens, ours, x_BD):
    theirs = sae_lens.SAE.load_from_disk(ours.folder / name)
    mine, config = load_dictionary(ours.folder / name)
    assert (theirs.cfg.d_in, theirs.cfg.d_sae) == (D, F)
    agree(theirs, mine, x_BD)

    architecture, trained_as = EXPECTED[name]
    metadata = theirs.cfg.metadata
    assert theirs.cfg.architecture() == architecture and metadata.training_architecture == trained_as
    assert (metadata.context_size, metadata.prepend_bos) == (BUFFER["ctx_len"], True)
    if name in CASES:
        assert metadata.hook_name == "blocks.3.hook_resid_post"
        assert metadata.model_name == "EleutherAI/pythia-70m-deduped"
        assert metadata.training_architecture_details["trainer_class"] == config["trainer"]["trainer_class"]


@pytest.mark.parametrize("name", CASES)
def test_saelens_converts_ae_pt(name, sae_lens, ours, x_BD, monkeypatch):
    loaders = importlib.import_module("sae_lens.loading.pretrained_sae_loaders")
    monkeypatch.setattr(loaders, "hf_hub_download", lambda repo_id, filename, **_: str(ours.folder / filename))

    def converter(path, device, cfg_overrides=None):
        cfg, state, _ = loaders.dictionary_learning_sae_huggingface_loader_1("user/repo", Path(path).name, device)
        return cfg, state

    theirs = sae_lens.SAE.load_from_disk(ours.folder / name, converter=converter)
    dict_class = json.loads((ours.folder / name / "config.json").read_text())["trainer"]["dict_class"]
    state = torch.load(ours.folder / name / "ae.pt", weights_only=True)
    agree(theirs, DICTIONARIES[dict_class].from_state(state), x_BD)  # the converter leaves decoder norms as they are


@pytest.mark.parametrize("name", EXPECTED)
def test_we_open_what_saelens_saves(name, sae_lens, ours, x_BD, tmp_path):
    theirs = sae_lens.SAE.load_from_disk(ours.folder / name)
    theirs.save_model(tmp_path)
    mine, config = load_dictionary(tmp_path)
    agree(theirs, mine, x_BD)
    assert config["buffer"]["ctx_len"] == BUFFER["ctx_len"]
    assert config["trainer"]["layer"] == (3 if name in CASES else None)


# -- what SAELens's own classes write, random, whatever we train

NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")
OF_SAES = [(name, way) for name in ("standard", "gated", "topk", "abstopk", "jumprelu") for way in NORMALIZATIONS]
OF_TRANSCODERS = [
    (f"{kind}transcoder", way) for kind in ("", "skip_", "jumprelu_", "jumprelu_skip_") for way in NORMALIZATIONS
]


def settings(sae_lens: ModuleType, architecture: str, **more) -> dict:
    hooks = {"hook_name": "blocks.3.hook_resid_post", "hook_name_out": "blocks.3.hook_mlp_out"}
    metadata = sae_lens.saes.sae.SAEMetadata(model_name="gpt2", **hooks)
    top_k = {"k": 5} if "topk" in architecture else {}
    return {"d_in": D, "d_sae": F, "metadata": metadata, **top_k, **more}


@torch.no_grad()
def randomized(sae):
    for name, parameter in sae.named_parameters():
        parameter.copy_((torch.rand_like if "threshold" in name else torch.randn_like)(parameter) / 3)
    return sae


@torch.no_grad()
def same(theirs, folder: Path, x_BD: torch.Tensor) -> None:
    mine, _ = load_dictionary(folder)
    f_BF = theirs.encode(x_BD)
    for ours, others in ((mine.encode(x_BD), f_BF), (mine(x_BD), theirs(x_BD))):
        torch.testing.assert_close(ours, others, rtol=1e-6, atol=1e-6 * float(others.abs().max()))


@pytest.mark.parametrize(("architecture", "way"), OF_SAES + OF_TRANSCODERS)
@pytest.mark.parametrize("switch", [False, True])
def test_what_saelens_writes_computes_here_what_it_computes_there(architecture, way, switch, sae_lens, x_BD, tmp_path):
    """switch: apply_b_dec_to_input and, for top-k, rescale_acts_by_decoder_norm."""
    more = {"normalize_activations": way, "apply_b_dec_to_input": switch}
    if "transcoder" in architecture:
        more |= {"d_out": D - 2, "apply_b_dec_to_input": False}
    elif "topk" in architecture:
        more |= {"rescale_acts_by_decoder_norm": switch}
    torch.manual_seed(0)
    sae_class, config_class = sae_lens.registry.get_sae_class(architecture)
    theirs = randomized(sae_class(config_class(**settings(sae_lens, architecture, **more))))
    theirs.save_model(tmp_path)
    same(theirs, tmp_path, x_BD)


@pytest.mark.parametrize("architecture", ["standard", "gated", "topk", "jumprelu", "batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("rescale", [False, True])
def test_a_training_checkpoint_of_saelens_is_its_inference_form(architecture, rescale, sae_lens, x_BD, tmp_path):
    more = {"rescale_acts_by_decoder_norm": rescale} if "topk" in architecture else {}
    if architecture.startswith("matryoshka"):
        more |= {"matryoshka_widths": [F // 4, F]}
    torch.manual_seed(0)
    sae_class, config_class = sae_lens.registry.get_sae_training_class(architecture)
    trained = randomized(sae_class(config_class(**settings(sae_lens, architecture, **more))))
    if hasattr(trained, "topk_threshold"):
        trained.topk_threshold = torch.tensor(1.3, dtype=torch.double)
    trained.save_model(tmp_path / "checkpoint")
    trained.save_inference_model(tmp_path / "final")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "final")
    same(theirs, tmp_path / "final", x_BD)
    with torch.no_grad():  # features may be in units of other decoder norms
        mine, _ = load_dictionary(tmp_path / "checkpoint")
        others = theirs(x_BD)
        torch.testing.assert_close(mine(x_BD), others, rtol=1e-6, atol=1e-6 * float(others.abs().max()))
