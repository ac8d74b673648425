"""SAEs that start from trained ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import demo
from demo_config import ARCHITECTURES
from dictionary_learning.formats import find_saes, load_dictionary


@pytest.fixture(scope="module")
def trained(tiny_model_folder, text_file, small, tmp_path_factory) -> Path:
    """One SAE of every architecture on each of two layers, and a second width of one."""
    folder = tmp_path_factory.mktemp("trained")
    fixed = ["--model_name", str(tiny_model_folder), "--dataset", str(text_file), *small, "--no_eval"]
    command = [*fixed, "--layers", "1", "3", "--architectures", *ARCHITECTURES, "--save_dir", str(folder)]
    assert demo.main([*command, "--num_tokens", "1500"]) == 0
    return folder


def run_of(folder: Path) -> Path:
    return next(folder.glob("*/run.json")).parent


def test_they_start_as_the_trained_ones_of_their_layer_width_and_architecture(trained, run, tmp_path):
    flags = ["--layers", 3, 1, "--architectures", *ARCHITECTURES, "--num_tokens", 1500, "--no_eval"]
    flags += ["--dictionary_widths", 32]
    assert run(*flags, "--init_from", trained, "--save_checkpoints", "--save_dir", tmp_path / "new") == 0
    before, after = find_saes(trained), find_saes(tmp_path / "new")
    assert len(before) == len(after) == 16
    for old, new in zip(before, after, strict=True):  # of the same names
        config = json.loads((new / "config.json").read_text())["trainer"]
        assert config["init_from"] == str(old)
        ae, _ = load_dictionary(old)
        start = torch.load(new / "checkpoints" / "ae_0.pt", weights_only=True)
        assert start.keys() == ae.state_dict().keys()
        for name, tensor in ae.state_dict().items():
            torch.testing.assert_close(start[name], tensor, msg=f"{new}: {name}")
        end = load_dictionary(new)[0]
        assert not end.decoder_FD.equal(ae.decoder_FD)


def test_one_sae_is_the_start_of_a_whole_grid(trained, run, tmp_path):
    one = next(path for path in find_saes(trained) if "Batch" in (path / "config.json").read_text())
    flags = ["--layers", 0, 2, "--architectures", "batch_top_k", "--target_l0s", 3, 6, "--num_tokens", 1500]
    assert run(*flags, "--init_from", one, "--save_checkpoints", "--no_eval", "--save_dir", tmp_path / "new") == 0
    for new in find_saes(tmp_path / "new"):
        start = torch.load(new / "checkpoints" / "ae_0.pt", weights_only=True)
        torch.testing.assert_close(start["encoder.weight"], load_dictionary(one)[0].encoder_FD.detach())
        assert int(start["k"]) in (3, 6)  # its own


def test_a_start_of_another_place_or_model_is_told(trained, tiny_model_folder, run, tmp_path, capsys):
    one = next(path for path in find_saes(trained) if "Batch" in (path / "config.json").read_text())
    flags = ["--architectures", "batch_top_k", "--num_tokens", 1500, "--dry_run", "--init_from", one]
    capsys.readouterr()
    assert run(*flags, "--layers", 1) == 0 and str(one) + " is of" not in capsys.readouterr().out
    assert run(*flags, "--layers", 1, 2, "--sites", "resid_post", "mlp_out") == 0
    sentence = f"{one} is of layer 1, and starts what is trained on layer 2, mlp_out of layer 1, mlp_out of layer 2\n"
    assert sentence in capsys.readouterr().out
    other = shutil.copytree(tiny_model_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    for start in (one, run_of(trained)):
        assert run(*flags[:-1], start, "--layers", 1, "--model_name", other) == 0
        sentence = f"{one} is of {tiny_model_folder}, which is not known to be the language model of this run\n"
        assert sentence in capsys.readouterr().out


def test_the_start_changes_nothing_else_and_survives_a_stop(trained, run, tmp_path, stopped_after):
    flags = ["--architectures", "batch_top_k", "standard", "--num_tokens", 1500, "--no_eval", "--init_from", trained]
    assert run(*flags, "--save_dir", tmp_path / "straight") == 0
    with stopped_after(12):
        assert run(*flags, "--save_dir", tmp_path / "stopped") == 75
    assert run(*flags, "--save_dir", tmp_path / "stopped", "--resume") == 0
    pairs = zip(find_saes(tmp_path / "straight"), find_saes(tmp_path / "stopped"), strict=True)
    for one, two in pairs:
        ours, theirs = (torch.load(path / "ae.pt", weights_only=True) for path in (one, two))
        assert all(ours[name].equal(theirs[name]) for name in ours)
        lines = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
        assert lines[0]["lr"] == 0 < lines[-1]["lr"]  # a warm-up of its own


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--dictionary_widths", 64], "has no SAE of layer 1, 64 latents, BatchTopKSAE"),
        (["--layers", 2], "has no SAE of layer 2, 32 latents, BatchTopKSAE"),
    ],
)
def test_a_grid_that_no_sae_of_the_run_fits_is_refused(flags, sentence, trained, run, capsys):
    assert run("--architectures", "batch_top_k", *flags, "--init_from", run_of(trained)) == 2
    error = capsys.readouterr().err
    assert error == f"error: --init_from {run_of(trained)} {sentence}.\n"


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--dictionary_widths", 64], "has 32 latents, not 64: give --dictionary_widths 32"),
        (["--architectures", "jump_relu"], "is of class BatchTopKSAE, and JumpReluTrainer trains JumpReluAutoEncoder"),
        (["--model_name", "tiny-python"], "takes 16 dimensions, and the model has 192"),
    ],
)
def test_one_sae_that_does_not_fit_is_refused(flags, sentence, trained, run, capsys):
    one = next(path for path in find_saes(trained) if "BatchTopKTrainer" in (path / "config.json").read_text())
    assert run("--architectures", "batch_top_k", *flags, "--init_from", one) == 2
    assert capsys.readouterr().err == f"error: --init_from {one} {sentence}.\n"


def test_several_that_fit_as_well_are_told(trained, run, capsys, tmp_path):
    folder = shutil.copytree(run_of(trained), tmp_path / "twice")
    one = next(path for path in find_saes(folder) if "BatchTopKTrainer" in (path / "config.json").read_text())
    shutil.copytree(one, one.with_name("trainer_99"))
    assert run("--architectures", "batch_top_k", "--init_from", folder) == 2
    assert "has several SAEs of layer 1, 32 latents, BatchTopKSAE" in capsys.readouterr().err
