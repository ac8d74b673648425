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
