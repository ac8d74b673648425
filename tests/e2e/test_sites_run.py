"""Whole runs at sites other than the output of a block, and of transcoders."""

import importlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml

import demo
from dictionary_learning import report
from dictionary_learning.formats import find_saes, load_dictionary
from dictionary_learning.model import load_model
from dictionary_learning.sites import Tap, place_at

PEERS = Path(__file__).parents[2] / "third_party" / "peers"
SITES = ["resid_post", "resid_pre", "attn_out", "mlp_out", "attn_z", "mlp_in"]
INNER = "gpt_neox.layers.{layer}.mlp.dense_4h_to_h.input"


def main(*words) -> int:
    return demo.main(list(map(str, words)))


def only_run(folder: Path) -> Path:
    [path] = [path for path in folder.iterdir() if (path / "run.json").exists()]
    return path


def weights(path: Path) -> dict:
    return torch.load(path / "ae.pt", weights_only=True)


def same(one: Path, two: Path) -> bool:
    a, b = weights(one), weights(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def base(tiny_model_folder, text_file, small) -> list[str]:
    return ["--model_name", str(tiny_model_folder), "--dataset", str(text_file), *small, "--sae_threads", "1"]


@pytest.fixture(scope="module")
def at_all_sites(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sites")
    words = ["--save_dir", folder, "--layers", "1", "3", "--sites", *SITES, INNER, "--architectures", "top_k"]
    assert main(*base, *words) == 0
    return only_run(folder)


@pytest.fixture(scope="module")
def transcoders(base, tmp_path_factory) -> Path:
    """Of all layers, with a skip, exported."""
    folder = tmp_path_factory.mktemp("transcoders")
    words = ["--layers", "0", "1", "2", "3", "--transcoder", "mlp", "--skip", "--circuit_tracer"]
    architectures = ["--architectures", "standard", "jump_relu", "batch_top_k", "top_k"]
    assert main(*base, "--save_dir", folder, *words, *architectures) == 0
    return only_run(folder)


def test_one_pass_trains_and_measures_saes_of_every_site(at_all_sites, capsys):
    folders = {path.parent.name: path for path in find_saes(at_all_sites)}
    inner = "gpt_neox.layers.1.mlp.dense_4h_to_h.input_layer_1"
    assert {f"{site}_layer_{layer}" for site in SITES for layer in (1, 3)} <= folders.keys() and inner in folders
    for name, path in folders.items():
        results, config = (json.loads((path / file).read_text()) for file in ("eval_results.json", "config.json"))
        assert "error" not in results and results["loss_zero"] != results["loss_original"], name
        assert config["trainer"]["site"] == config["trainer"]["site_out"]
        assert config["trainer"]["activation_dim"] == (32 if "dense" in name else 16)
        assert config["buffer"]["hf_hook_name"].startswith("gpt_neox.layers.")
    assert (at_all_sites / "pareto.png").exists()
    names = {name: json.loads((path / "cfg.json").read_text())["metadata"] for name, path in folders.items()}
    assert names["attn_z_layer_1"]["hook_name"] == "blocks.1.attn.hook_z"
    assert names["mlp_out_layer_3"]["hook_name"] == "blocks.3.hook_mlp_out"
    assert names["mlp_out_layer_3"]["hf_hook_name"] == "gpt_neox.layers.3.mlp"
    assert names["mlp_in_layer_3"]["hf_hook_name"] == "gpt_neox.layers.3.post_attention_layernorm"
    assert names["attn_z_layer_3"]["hf_hook_name"] == "gpt_neox.layers.3.attention.dense.input"


def test_the_block_outputs_among_them_are_those_of_a_run_of_their_own(base, at_all_sites, tmp_path):
    """Where no position is an outlier at any site, other sites beside change nothing."""
    assert main(*base, "--save_dir", tmp_path, "--layers", "1", "3", "--architectures", "top_k", "--no_eval") == 0
    record = json.loads((at_all_sites / "run.json").read_text())
    assert record["positions"]["outliers"] == 0
    for layer in (1, 3):
        part = f"resid_post_layer_{layer}/trainer_0"
        assert same(at_all_sites / part, only_run(tmp_path) / part)


def test_evaluated_again_and_reported(at_all_sites, capsys):
    before = {path: (path / "eval_results.json").read_text() for path in find_saes(at_all_sites)}
    assert main("--eval_only", at_all_sites, "--device", "cpu") == 0
    table = capsys.readouterr().out
    assert "site" in table and "attn_z" in table
    for path, text in before.items():
        assert (path / "eval_results.json").read_text() == text
    assert report.main([str(at_all_sites), "--num_tokens", "500", "--device", "cpu"]) == 0
    for path in before:
        assert (path / "report.html").exists()


def test_the_cards_snippet_reads_the_site_and_gives_the_features(at_all_sites, transcoders, monkeypatch, capsys):
    import huggingface_hub

    from dictionary_learning.model_card import _transformers_snippet, model_card
    from dictionary_learning.plotting import read_runs

    for run_folder in (at_all_sites, transcoders):
        assert "alice/saes" in (model_card(run_folder, "alice/saes") or "")
        for record in read_runs([run_folder])[0]:
            root = run_folder.parent
            monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _repo, file, root=root: root / file)
            path = record.folder.relative_to(run_folder.parent).as_posix()
            found: dict = {}
            exec(_transformers_snippet(record, "alice/saes", path, record.trainer["lm_name"]), found)
            ae, _ = load_dictionary(record.folder)
            lm = load_model(record.trainer["lm_name"])
            tokens_BL = torch.tensor([[found["start"], *found["tokens"]]])
            place = place_at(record.trainer["layer"], record.trainer["site"])
            x_BLW = lm.activations(tokens_BL, torch.ones_like(tokens_BL), [place])[place]
            assert torch.allclose(found["x"], x_BLW[0, 1:], atol=1e-5), path
            if record.trainer["trainer_class"] != "TopKTrainer" or ae.is_transcoder:  # SAELens runs one by its k
                assert torch.allclose(found["features"], ae.encode(x_BLW[0, 1:]), atol=1e-4), path
                assert torch.allclose(found["reconstruction"], ae(x_BLW[0, 1:]), atol=1e-4), path


def test_metrics_are_those_of_plain_hooks(at_all_sites, base):
    """The L0 and explained variance of an attn_z SAE, computed once more by hand."""
    path = next(path for path in find_saes(at_all_sites) if path.parent.name == "attn_z_layer_1")
    ae, config = load_dictionary(path)
    lm = load_model(config["trainer"]["lm_name"])
    tokens_BL = torch.randint(1, 250, (4, 32), generator=torch.Generator().manual_seed(0))
    seen = []
    dense = lm.layers[1].attention.dense
    handle = dense.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        logits = lm.model(tokens_BL).logits
        handle.remove()
        x_hat, f = ae(seen[0], output_features=True)
        replaced = dense.register_forward_pre_hook(lambda _m, args: (x_hat,))
        with_hat = lm.model(tokens_BL).logits
        replaced.remove()
    loss = torch.nn.functional.cross_entropy
    losses = [loss(one[:, :-1].flatten(0, 1), tokens_BL[:, 1:].flatten()) for one in (logits, with_hat)]
    from dictionary_learning.buffer import Mask
    from dictionary_learning.evaluation import evaluate_saes

    text = [(tokens_BL, torch.ones_like(tokens_BL))]
    results = evaluate_saes(lm, [("it", ae, Tap(1, "attn_z"))], text, masks={"it": Mask(drop_bos=False)})["it"].results
    assert results["l0"] == pytest.approx(float((f != 0).sum(-1).double().mean()), rel=1e-6)
    assert results["loss_original"] == pytest.approx(float(losses[0]), rel=1e-5)
    assert results["loss_reconstructed"] == pytest.approx(float(losses[1]), rel=1e-5)


def test_stopped_and_resumed_at_sites_it_ends_with_the_same_bits(base, tmp_path):
    words = [
        *base,
        "--layers",
        "1",
        "2",
        "--transcoder",
        "mlp",
        "--skip",
        "--architectures",
        "batch_top_k",
        "--no_eval",
    ]
    assert main(*words, "--save_dir", tmp_path / "straight") == 0
    command = [
        sys.executable,
        "demo.py",
        *map(str, words),
        "--save_dir",
        str(tmp_path / "resumed"),
        "--backup_steps",
        "7",
    ]
    from dictionary_learning import training

    done = []
    with pytest.MonkeyPatch.context() as patch:
        own = training.Loop._update_all

        def stop_at_20(self, x_by_place):
            if self.step == 20 and not done:
                done.append(1)
                raise KeyboardInterrupt
            return own(self, x_by_place)

        patch.setattr(training.Loop, "_update_all", stop_at_20)
        assert main(*command[2:]) == 130
    assert main(*command[2:], "--resume") == 0
    one, two = (find_saes(only_run(tmp_path / name)) for name in ("straight", "resumed"))
    assert len(one) == 2 and all(map(same, one, two))


def test_from_disk_sites_and_transcoders_train_to_the_same_bits(base, tmp_path):
    words = [*base, "--layers", "1", "2", "--transcoder", "mlp", "--architectures", "top_k", "--no_eval"]
    assert main(*words, "--save_dir", tmp_path / "run", "--cache", tmp_path / "cache") == 0
    settings = ["--num_tokens", "3000", "--dictionary_widths", "32", "--learning_rates", "0.003", "--target_l0s", "4"]
    settings += ["--sae_batch_size", "50", "--buffer_tokens", "600", "--log_steps", "10", "--sae_threads", "1"]
    from_disk = ["--activations", tmp_path / "cache", "--architectures", "top_k", "--no_eval", "--device", "cpu"]
    assert main(*settings, *from_disk, "--transcoder", "mlp", "--save_dir", tmp_path / "again") == 0
    one, two = (find_saes(only_run(tmp_path / name)) for name in ("run", "again"))
    assert len(one) == 2 and all(map(same, one, two))
    for a, b in zip(one, two, strict=True):
        assert (a / "config.json").read_text() == (b / "config.json").read_text()
    assert main(*settings, *from_disk, "--sites", "mlp_out", "--layers", "2", "--save_dir", tmp_path / "sae") == 0


def test_what_the_disk_lacks_is_one_sentence(base, tmp_path, capsys):
    assert main(*base, "--layers", "1", "--architectures", "top_k", "--cache", tmp_path / "cache", "--cache_only") == 0
    words = ["--activations", tmp_path / "cache", "--architectures", "top_k", "--save_dir", tmp_path, "--device", "cpu"]
    assert main(*words, "--sites", "mlp_out") == 2
    assert "holds layer 1, not mlp_out of layer 1." in capsys.readouterr().err


def test_transcoders_are_complete_and_the_models_loss_is_with_the_mlp_replaced(transcoders):
    saes = find_saes(transcoders)
    assert len(saes) == 16 and {path.parent.name for path in saes} == {
        f"mlp_in_to_mlp_out_layer_{layer}" for layer in range(4)
    }
    ae, config = load_dictionary(saes[0])
    assert ae.is_transcoder and config["trainer"]["skip"]
    lm = load_model(config["trainer"]["lm_name"])
    tokens_BL = torch.randint(1, 250, (4, 32), generator=torch.Generator().manual_seed(0))
    text = [(tokens_BL, torch.ones_like(tokens_BL))]
    from dictionary_learning.buffer import Mask
    from dictionary_learning.evaluation import evaluate_saes

    route = (Tap(0, "mlp_in"), Tap(0, "mlp_out"))
    results = evaluate_saes(lm, [("it", ae, route)], text, masks={"it": Mask(drop_bos=False)})["it"].results
    y = []
    handle = lm.layers[0].mlp.register_forward_hook(lambda _m, args, out: y.append((args[0], out)) or ae(args[0]))
    with torch.no_grad():
        logits = lm.model(tokens_BL).logits
        handle.remove()
        x_ND, y_ND = (part.flatten(0, 1) for part in y[0])
        y_hat_ND = ae(x_ND)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BL[:, 1:].flatten())
    assert results["loss_reconstructed"] == pytest.approx(float(expected), rel=1e-5)
    explained = 1 - (y_ND - y_hat_ND).square().sum() / (y_ND - y_ND.mean(0)).square().sum()
    assert results["frac_variance_explained"] == pytest.approx(float(explained), abs=1e-4)


def test_saelens_opens_every_transcoder(transcoders):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the packages that SAELens imports
        try:
            sae_lens = importlib.import_module("sae_lens")
        except ImportError:
            pytest.skip("sae-lens is not installed")
        x_BD = 3 * torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
        for path in find_saes(transcoders):
            theirs, (ours, _) = sae_lens.SAE.load_from_disk(str(path)), load_dictionary(path)
            metadata = json.loads((path / "cfg.json").read_text())["metadata"]
            layer = path.parent.name[-1]
            assert theirs.cfg.architecture().endswith("skip_transcoder")
            assert metadata["hook_name"] == f"blocks.{layer}.mlp.hook_in"
            assert metadata["hook_name_out"] == f"blocks.{layer}.hook_mlp_out"
            assert torch.allclose(theirs.encode(x_BD), ours.encode(x_BD), atol=1e-5)
            assert torch.allclose(theirs(x_BD), ours(x_BD), atol=1e-4)


CIRCUIT_TRACER = """
import sys, torch, yaml
from pathlib import Path
from huggingface_hub import constants
constants.HF_HUB_ENABLE_HF_TRANSFER = False  # circuit-tracer 0.5 asks for what newer Hub libraries no longer have
from circuit_tracer.utils.hf_utils import load_transcoders
folder = Path(sys.argv[1])
config = yaml.safe_load((folder / "config.yaml").read_text())
layers = len(list(folder.glob("layer_*.safetensors")))
config |= {"scan": "", "transcoders": [str(folder / f"layer_{i}.safetensors") for i in range(layers)]}
loaded = load_transcoders(config, device=torch.device("cpu"), lazy_decoder=False)
x_BD = 3 * torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    found = [(loaded[i].encode(x_BD), loaded[i](x_BD)) for i in range(layers)]
torch.save({"f": [f for f, _ in found], "y": [y for _, y in found], "in": loaded.feature_input_hook,
            "out": loaded.feature_output_hook}, folder / "found.pt")
"""


@pytest.mark.skipif(not (PEERS / "circuit_tracer").is_dir(), reason="circuit-tracer is not in third_party/peers")
def test_circuit_tracer_opens_the_exported_sets(transcoders):
    x_BD = 3 * torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    sets = sorted((transcoders / "circuit_tracer").iterdir())
    assert [path.name for path in sets] == [f"trainer_{i}" for i in range(4)]
    for folder in sets:
        environment = os.environ | {"PYTHONPATH": str(PEERS)}
        command = [sys.executable, "-c", CIRCUIT_TRACER, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found = torch.load(folder / "found.pt", weights_only=True)
        (folder / "found.pt").unlink()
        assert (found["in"], found["out"]) == ("mlp.hook_in", "hook_mlp_out")
        for layer in range(4):
            ours, _ = load_dictionary(transcoders / f"mlp_in_to_mlp_out_layer_{layer}" / folder.name)
            again, _ = load_dictionary(folder / f"layer_{layer}.safetensors")
            for f, y in [(ours.encode(x_BD), ours(x_BD)), (again.encode(x_BD), again(x_BD))]:
                assert torch.allclose(found["f"][layer], f, atol=1e-5), (folder, layer)
                assert torch.allclose(found["y"][layer], y, atol=1e-4), (folder, layer)


def test_the_exported_sets_are_no_further_saes_of_the_run(transcoders):
    assert all("circuit_tracer" not in str(path) for path in find_saes(transcoders))
    assert len(find_saes(transcoders / "circuit_tracer" / "trainer_0")) == 4
    assert yaml.safe_load((transcoders / "circuit_tracer/trainer_0/config.yaml").read_text())["model_kind"] == (
        "transcoder_set"
    )


def test_transcoders_start_from_trained_ones(base, transcoders, tmp_path, capsys):
    words = [*base, "--layers", "1", "--architectures", "top_k", "--save_dir", tmp_path, "--no_eval", "--overwrite"]
    assert main(*words, "--transcoder", "mlp", "--skip", "--init_from", transcoders) == 0
    assert main(*words, "--transcoder", "mlp", "--init_from", transcoders) == 2
    assert "has no SAE of mlp_in -> mlp_out of layer 1, 32 latents" in capsys.readouterr().err
    assert main(*words, "--sites", "mlp_out", "--init_from", transcoders) == 2
    assert "has no SAE of mlp_out of layer 1" in capsys.readouterr().err


def test_a_site_of_its_own_in_and_out_is_an_sae(base, tmp_path):
    words = [*base, "--layers", "1", "--architectures", "top_k", "--no_eval"]
    assert main(*words, "--save_dir", tmp_path / "sae", "--sites", "mlp_out") == 0
    assert main(*words, "--save_dir", tmp_path / "pair", "--site_in", "mlp_out", "--site_out", "mlp_out") == 0
    [one], [two] = (find_saes(only_run(tmp_path / name)) for name in ("sae", "pair"))
    assert same(one, two) and one.parent.name == two.parent.name == "mlp_out_layer_1"


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--sites resid_mid", "cannot read resid_mid of layer 1 of .*: it has no resid_mid: its attention"),
        ("--sites mlp_outs", "there is no site 'mlp_outs': give one of resid_pre"),
        ("--sites mlp_out mlp_out", "--sites names a site twice: mlp_out mlp_out"),
        ("--sites gpt_neox.layers.1.mlp", r"gpt_neox.layers.1.mlp is one module of one layer: write \{layer\}"),
        ("--sites gpt_neox.layers.{layer}.mpl", "it has no module gpt_neox.layers.1.mpl"),
        ("--sites gpt_neox.layers.{layer}.mlp.dense_h_to_4h.weight", "it has no module gpt_neox.layers.1.mlp"),
        ("--site_in gpt_neox.layers.0.mlp.input --site_out mlp_out", r"one module of one layer: write \{layer\}"),
        ("--site_in mlp_in", "a transcoder needs both --site_in and --site_out"),
        ("--skip", "--skip is for transcoders: give --transcoder mlp"),
        ("--sites mlp_out --skip", "--skip is for transcoders: give --transcoder mlp"),
        ("--circuit_tracer", "--circuit_tracer is for transcoders: give --transcoder mlp"),
        ("--transcoder mlp --sites mlp_out", "--sites are for SAEs, and this is a transcoder"),
        ("--transcoder mlp --site_in mlp_in --site_out mlp_out", "both say what a transcoder reads"),
        ("--transcoder mlp --circuit_tracer", "circuit-tracer wants a transcoder of every layer: give --layers 0 1"),
        ("--site_in attn_z --site_out gpt_neox.layers.{layer}.mlp.dense_h_to_4h --circuit_tracer --layers 0 1 2 3",
         "circuit-tracer wants transcoders of 16 dimensions in and out"),
        ("--transcoder mlp --circuit_tracer --layers 0 1 2 3 --architectures gated",
         "circuit-tracer has no gated transcoders, only standard"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_leaves_nothing(run, tmp_path, capsys, flags, sentence):
    import re

    assert run(*flags.split()) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: ") and re.search(sentence, told), told
    assert list(tmp_path.iterdir()) == []
