"""SAE folders: what one side writes the other reads, and what is damaged or foreign is one sentence."""

import math
import random
import subprocess
import sys

import pytest
import torch
from hub_server import Repo
from mutations import mutations
from saes import D, F, K, Malice, config_of, make_sae

from dictionary_learning.dictionary import DICTIONARIES
from dictionary_learning.files import write_json
from dictionary_learning.formats import dictionary_learning, find_saes, load_dictionary, saelens, save_sae
from dictionary_learning.formats.dictionary_learning import save_weights
from dictionary_learning.formats.place import Place
from dictionary_learning.formats.saelens import from_saelens, to_saelens
from dictionary_learning.network import _say_offline


@pytest.fixture
def x_BD():
    return torch.randn(32, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=DICTIONARIES)
def ae(request):
    return make_sae(request.param)


@pytest.fixture
def folder(ae, tmp_path):
    save_sae(tmp_path / "sae", ae, config_of(ae))
    return tmp_path / "sae"


# -- SAE folders


def test_an_sae_comes_back_to_the_bit(ae, folder):
    loaded, config = load_dictionary(folder)
    assert type(loaded) is type(ae)
    assert config.pop("source")["format"] == "dictionary_learning"
    said = config_of(ae)
    assert config["buffer"] == said["buffer"] and config["trainer"].items() >= said["trainer"].items()
    assert loaded.state_dict().keys() == ae.state_dict().keys()
    for name, tensor in ae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor) and loaded.state_dict()[name].dtype == tensor.dtype


def test_the_folder_holds_four_files_and_no_leftovers(folder):
    assert {path.name for path in folder.iterdir()} == {*dictionary_learning.FILES, *saelens.FILES}
    assert find_saes(folder) == [folder]


def test_the_saelens_half_computes_the_same(ae, folder, x_BD):
    (folder / "ae.pt").unlink()
    loaded, config = load_dictionary(folder)
    encode = {"use_threshold": False} if type(ae).__name__ == "AutoEncoderTopK" else {}
    torch.testing.assert_close(loaded.encode(x_BD), ae.encode(x_BD, **encode))
    torch.testing.assert_close(loaded.decode(loaded.encode(x_BD)), ae.decode(ae.encode(x_BD, **encode)))
    assert config["trainer"]["layer"] == 3 and config["trainer"]["lm_name"] == "user/lm"
    assert config["buffer"]["ctx_len"] == 128
    assert (config["trainer"]["activation_dim"], config["trainer"]["dict_size"]) == (D, F)


def test_saelens_files_become_the_same_files_again(ae, tmp_path):
    cfg, tensors = to_saelens(ae, config_of(ae))
    again, config = from_saelens(place(tmp_path), cfg, tensors)
    cfg_2, tensors_2 = to_saelens(again, config)
    assert tensors_2.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensors_2[name], tensor)
    assert {**cfg_2, "metadata": None} == {**cfg, "metadata": None}


def test_relu_saes_come_with_a_unit_norm_decoder_and_the_same_function(tmp_path, x_BD):
    ae = make_sae("AutoEncoder")
    with torch.no_grad():
        ae.decoder_FD.mul_(torch.linspace(0.1, 2.0, F)[:, None])
    save_sae(tmp_path, ae, config_of(ae))
    assert torch.equal(torch.load(tmp_path / "ae.pt")["decoder.weight"], ae.decoder_FD.T)  # stored as trained
    for _ in ("dictionary_learning", "SAELens"):
        loaded, _config = load_dictionary(tmp_path)
        torch.testing.assert_close(loaded.decoder_FD.norm(dim=1), torch.ones(F))
        torch.testing.assert_close(loaded(x_BD), ae(x_BD))
        (tmp_path / "ae.pt").unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_without_a_threshold_there_is_no_saelens_form(name, tmp_path):
    ae = make_sae(name)
    ae.threshold.fill_(-1)
    with pytest.raises(ValueError, match=f"threshold of this {name} is not set"):
        to_saelens(ae, config_of(ae))
    save_sae(tmp_path, ae, config_of(ae))
    assert {path.name for path in tmp_path.iterdir()} == {*dictionary_learning.FILES}
    assert torch.equal(load_dictionary(tmp_path)[0].decoder_FD, ae.decoder_FD)


def test_saved_weights_are_plain_contiguous_cpu_tensors(ae, tmp_path):
    save_weights(tmp_path / "checkpoints" / "ae_10.pt", ae)
    state = torch.load(tmp_path / "checkpoints" / "ae_10.pt", weights_only=True)
    assert type(state) is dict
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in state.values())


def test_a_backup_of_the_reference_is_folded_and_named(ae, folder, x_BD):
    n = 3.0
    whole = make_sae(type(ae).__name__)
    whole.scale_biases(n)
    backup = {"step": 7, "ae": ae.state_dict(), "optimizer": {}, "config": {}, "norm_factor": n}
    torch.save(backup, folder / "ae.pt")
    with pytest.warns(UserWarning, match="backup of step 7"):
        loaded, _ = load_dictionary(folder)
    torch.testing.assert_close(loaded(x_BD), whole(x_BD))


def test_half_precision_files_are_loaded_in_full(tmp_path):
    ae = make_sae("GatedAutoEncoder")
    save_sae(tmp_path, ae.bfloat16(), config_of(ae))
    for name in dictionary_learning.FILES:  # first as ours, then as SAELens's
        assert next(load_dictionary(tmp_path)[0].parameters()).dtype == torch.float32
        (tmp_path / name).unlink()


@pytest.mark.parametrize("scale, told", [(1.0, ["nan", "inf", "-inf", "both"]), (1e38, [])])
def test_a_weight_that_is_not_finite_is_told_and_a_huge_one_is_none(scale, told, tmp_path):
    """The sums of these overflow, though each of them is finite."""
    ae = make_sae("JumpReluAutoEncoder")
    with torch.no_grad():
        ae.W_enc.fill_(scale)
    save_sae(tmp_path, ae, config_of(ae))
    assert load_dictionary(tmp_path)[0].W_enc.equal(ae.W_enc)
    values = {"nan": [math.nan], "inf": [math.inf], "-inf": [-math.inf], "both": [math.inf, -math.inf]}
    for name in told:
        with torch.no_grad():
            ae.W_enc[3, 4 : 4 + len(values[name])] = torch.tensor(values[name])
        save_sae(tmp_path, ae, config_of(ae))
        with pytest.raises(ValueError, match="has weights that are not finite, in W_enc"):
            load_dictionary(tmp_path)


@pytest.mark.parametrize("name", DICTIONARIES)
def test_opening_computes_nothing_without_values(name, tmp_path):
    """On the meta device the first product or quotient makes torch import its compiler, which takes seconds."""
    ae = make_sae(name)
    save_sae(tmp_path, ae, config_of(ae))
    code = "import sys; from dictionary_learning import load_dictionary; load_dictionary(sys.argv[1])\n"
    code += "assert 'torch._dynamo' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_checkpoint_opens_by_its_file_with_the_config_above_it(ae, tmp_path, x_BD):
    save_sae(tmp_path / "trainer_0", ae, config_of(ae))
    early = make_sae(type(ae).__name__)
    early.scale_biases(0.5)
    for step in (9, 10):
        save_weights(tmp_path / "trainer_0" / "checkpoints" / f"ae_{step}.pt", early)
    for path in (tmp_path / "trainer_0" / "checkpoints" / f"ae_{step}.pt" for step in (9, 10)):
        loaded, config = load_dictionary(path)
        assert torch.equal(loaded(x_BD), early(x_BD)) and not torch.equal(loaded(x_BD), ae(x_BD))
        assert config["trainer"]["layer"] == 3 and config["buffer"]["ctx_len"] == 128
    assert find_saes(tmp_path) == [tmp_path / "trainer_0"]
    assert [path.name for path in find_saes(tmp_path / "trainer_0" / "checkpoints")] == ["ae_9.pt", "ae_10.pt"]
    (tmp_path / "trainer_0" / "ae.pt").unlink()  # as while it trains
    (tmp_path / "trainer_0" / "sae_weights.safetensors").unlink()
    assert find_saes(tmp_path) == []
    assert torch.equal(load_dictionary(path)[0](x_BD), early(x_BD))
    (tmp_path / "trainer_0" / "config.json").unlink()
    with pytest.raises(ValueError, match="is not a trained SAE"):
        load_dictionary(path)


def test_saes_are_found_in_natural_order_and_checkpoints_are_not_saes(tmp_path):
    ae = make_sae("AutoEncoder")
    for place in ("layer_10/trainer_0", "layer_9/trainer_11", "layer_9/trainer_2", "layer_9/trainer_2/checkpoints"):
        save_sae(tmp_path / place, ae, config_of(ae))
    (tmp_path / "layer_9" / "trainer_3").mkdir()
    write_json(tmp_path / "layer_9" / "trainer_3" / "config.json", {})  # still in training
    found = [path.relative_to(tmp_path).as_posix() for path in find_saes(tmp_path)]
    assert found == ["layer_9/trainer_2", "layer_9/trainer_11", "layer_10/trainer_0"]


# -- SAELens variations


def place(folder) -> Place:
    return Place(str(folder), (), lambda file: folder / file)


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.8.hook_resid_post", 8),
        ("blocks.8.hook_resid_pre", 7),
        ("gpt_neox.layers.3", 3),
        ("blocks.8.hook_mlp_out", 8),
        ("blocks.8.attn.hook_z", 8),
        (None, None),
    ],
)
def test_the_layer_of_a_saelens_sae_is_that_of_its_residual_stream(hook, layer, tmp_path):
    cfg, tensors = to_saelens(make_sae("AutoEncoder"), config_of(make_sae("AutoEncoder")))
    cfg["metadata"]["hook_name"] = hook
    assert from_saelens(place(tmp_path), cfg, tensors)[1]["trainer"]["layer"] == layer


def test_topk_rescaled_by_decoder_norms_is_folded(tmp_path, x_BD):
    ae = make_sae("AutoEncoderTopK")
    cfg, tensors = to_saelens(ae, config_of(ae))
    norm_F = torch.linspace(0.5, 2.0, F)
    tensors["W_dec"] = tensors["W_dec"] * norm_F[:, None]
    pre_BF = (x_BD - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    top = (pre_BF * norm_F).topk(K)
    f_BF = torch.zeros(len(x_BD), F).scatter(1, top.indices, top.values.relu())
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    loaded, _ = from_saelens(place(tmp_path), {**cfg, "rescale_acts_by_decoder_norm": True}, copies)
    torch.testing.assert_close(loaded.encode(x_BD), f_BF)
    torch.testing.assert_close(loaded(x_BD), f_BF / norm_F @ tensors["W_dec"] + tensors["b_dec"])


def test_a_scalar_threshold_holds_for_all_latents(tmp_path):
    ae = make_sae("BatchTopKSAE")
    cfg, tensors = to_saelens(ae, config_of(ae))
    loaded, _ = from_saelens(place(tmp_path), cfg, {**tensors, "threshold": torch.tensor(0.5)})
    assert torch.equal(loaded.threshold, torch.full((F,), 0.5))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"architecture": "crosscoder"}, "architecture 'crosscoder'"),
        ({"architecture": ["topk"]}, "can be loaded"),
        ({"normalize_activations": "whitening"}, "normalize_activations 'whitening'"),
        ({"k": None}, "must say k"),
        ({"k": 3.5}, "must say k"),
        ({"k": 0}, "k must be a positive integer"),
        ({"d_sae": 17}, "d_sae 17"),
        ({"architecture": "gated"}, "must hold"),
    ],
)
def test_what_a_saelens_sae_needs_and_we_lack_is_said(change, sentence, tmp_path):
    cfg, tensors = to_saelens(make_sae("AutoEncoderTopK"), config_of(make_sae("AutoEncoderTopK")))
    with pytest.raises(ValueError, match=sentence):
        from_saelens(place(tmp_path), {**cfg, **change}, tensors)


# -- damage


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("", "not valid JSON"),
        ("[1]", "must hold a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ("{}", "trainer.dict_class must be one of"),
        ('{"trainer": {"dict_class": "Evil"}}', "trainer.dict_class must be one of"),
        ('{"trainer": {"dict_class": ["AutoEncoder"]}}', "trainer.dict_class must be one of"),
        ('{"trainer": {"dict_class": "BatchTopKSAE", "k": 3}}', "does not hold the weights of a BatchTopKSAE"),
        ('{"trainer": {"dict_class": "AutoEncoder", "dict_size": 17}}', "dict_size 17"),
        ('{"trainer": {"dict_class": "AutoEncoder", "activation_dim": "6"}}', "activation_dim 6"),
    ],
)
def test_a_wrong_config_is_told(config, sentence, tmp_path):
    ae = make_sae("AutoEncoder")
    save_sae(tmp_path, ae, config_of(ae))
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=sentence):
        load_dictionary(tmp_path)


def test_the_reference_refuses_another_k_and_so_do_we(tmp_path):
    ae = make_sae("AutoEncoderTopK")
    config = config_of(ae)
    save_sae(tmp_path, ae, config)
    config["trainer"]["k"] = K + 1
    write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match=f"k {K + 1}"):
        load_dictionary(tmp_path)


@pytest.mark.parametrize(
    "state", [[1], {}, {"ae": 1}, {"encoder.weight": torch.zeros(3)}, {"decoder.weight": torch.zeros(D, F)}, None]
)
def test_a_foreign_pt_file_is_told(state, tmp_path):
    ae = make_sae("AutoEncoder")
    save_sae(tmp_path, ae, config_of(ae))
    torch.save(state, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="ae.pt (does not hold the weights of a|is damaged .* no tensors by name)"):
        load_dictionary(tmp_path)


def test_no_code_of_a_checkpoint_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ae = make_sae("AutoEncoder")
    save_sae(tmp_path / "sae", ae, config_of(ae))
    torch.save({"bias": Malice()}, tmp_path / "sae" / "ae.pt")
    with pytest.raises(ValueError, match="ae.pt is damaged or was not written by torch.save as plain tensors"):
        load_dictionary(tmp_path / "sae")
    assert not (tmp_path / "malice").exists()


def test_an_unfinished_folder_and_a_file_are_told(tmp_path):
    write_json(tmp_path / "config.json", {"trainer": {}})
    with pytest.raises(ValueError, match="is not a trained SAE"):
        load_dictionary(tmp_path)
    with pytest.raises(ValueError, match="is not a trained SAE"):
        load_dictionary(tmp_path / "config.json")


@pytest.mark.parametrize("name", [*dictionary_learning.FILES, *saelens.FILES])
def test_damage_is_one_sentence_or_harmless_and_touches_nothing(name, ae, folder):
    if name in saelens.FILES:
        (folder / "ae.pt").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    whole = load_dictionary(folder)[0].state_dict()
    n_told = 0
    for damaged in mutations(before[name], random.Random(0)):
        (folder / name).write_bytes(damaged)
        try:
            loaded = load_dictionary(folder)[0].state_dict()
        except ValueError as error:
            n_told += 1
            assert str(folder) in str(error) and "\n" not in str(error)
        else:
            weights = {key for key in whole if key != "k"}  # a changed digit of k in cfg.json cannot be known
            assert weights <= loaded.keys() and all(torch.equal(loaded[key], whole[key]) for key in weights)
        after = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert after == {**before, name: damaged}
    assert n_told > 10


# -- the Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of one repository, user/repo, whose files lie under tmp_path / "hub"; the names asked for are kept."""
    import huggingface_hub

    asked, top = [], tmp_path / "hub"

    def listed(self, repo_id, revision=None):
        if repo_id != "user/repo" or revision not in (None, "v2"):
            raise OSError("no such repository")
        return [path.relative_to(top).as_posix() for path in top.rglob("*") if path.is_file()]

    def download(repo_id, filename, revision=None, local_files_only=False):
        asked.append((repo_id, filename))
        return str(top / filename)

    monkeypatch.setattr("dictionary_learning.formats.is_offline", lambda name: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("none")))
    monkeypatch.chdir(tmp_path)
    return asked


def test_an_sae_of_the_hub_is_two_files(hub, tmp_path):
    ae = make_sae("GatedAutoEncoder")
    save_sae(tmp_path / "hub" / "run" / "trainer_0", ae, config_of(ae))
    loaded, _ = load_dictionary("user/repo/run/trainer_0")
    assert torch.equal(loaded.decoder_FD, ae.decoder_FD)
    assert set(hub) == {("user/repo", "run/trainer_0/config.json"), ("user/repo", "run/trainer_0/ae.pt")}
    for name in dictionary_learning.FILES:
        (tmp_path / "hub" / "run" / "trainer_0" / name).unlink()
    loaded, _ = load_dictionary("user/repo/run/trainer_0")
    assert torch.equal(loaded.decoder_FD, ae.decoder_FD)
    assert set(hub[2:]) == {("user/repo", f"run/trainer_0/{name}") for name in saelens.FILES}
    assert torch.equal(load_dictionary("user/repo@v2/run/trainer_0")[0].decoder_FD, ae.decoder_FD)


def test_a_checkpoint_of_the_hub_has_the_config_above_it(hub, tmp_path):
    ae = make_sae("BatchTopKSAE")
    save_sae(tmp_path / "hub" / "run" / "trainer_0", ae, config_of(ae))
    save_weights(tmp_path / "hub" / "run" / "trainer_0" / "checkpoints" / "ae_5.pt", ae)
    loaded, config = load_dictionary("user/repo/run/trainer_0/checkpoints/ae_5.pt")
    assert torch.equal(loaded.decoder_FD, ae.decoder_FD) and config["trainer"]["layer"] == 3
    assert {name for _, name in hub} == {"run/trainer_0/config.json", "run/trainer_0/checkpoints/ae_5.pt"}


@pytest.mark.parametrize("how", ["fails", "is gone"])
def test_without_the_hub_its_saes_come_from_the_cache_or_are_told_at_once(how, server, out_of_reach, tmp_path, capsys):
    _say_offline.cache_clear()
    ae = make_sae("GatedAutoEncoder")
    save_sae(tmp_path / "sae", ae, config_of(ae))
    files = {f"run/{path.name}": path.read_bytes() for path in (tmp_path / "sae").iterdir()}
    server.repos["alice/saes"] = Repo(private=False, files=files, commits=["SAEs"])
    load_dictionary("alice/saes/run")
    out_of_reach(how)
    assert torch.equal(load_dictionary("alice/saes/run")[0].decoder_FD, ae.decoder_FD)
    told = "the Hub cannot be reached: alice/saes/run is looked for in the local cache\n"
    assert capsys.readouterr().err.count(told) == 1
    for name in ("alice/seas/run", "alice/saes@v2/run"):
        with pytest.raises(
            ValueError, match=f"{name} is neither a local folder nor .* \\(the Hub cannot be reached\\)"
        ):
            load_dictionary(name)


def test_a_local_path_wins_over_the_hub(hub, tmp_path):
    ae = make_sae("GatedAutoEncoder")
    save_sae(tmp_path / "user" / "repo" / "trainer_0", ae, config_of(ae))
    load_dictionary("user/repo/trainer_0")
    assert hub == []


@pytest.mark.parametrize(
    "name", ["user/repo/missing", "other/repo/trainer_0", "nowhere", "./a/b/c", "/a/b/c", "user/repo/../x", "a//b", ""]
)
def test_a_name_that_leads_nowhere_is_told(name, hub):
    if name == "":
        name = "user/repo/a\\..\\b"
    with pytest.raises(
        ValueError,
        match="(does not exist|neither a local folder nor an SAE on the Hugging Face Hub|is not a trained SAE)",
    ):
        load_dictionary(name)
    assert all(".." not in filename for _, filename in hub)
