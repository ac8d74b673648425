"""SAEs of other families, and checkpoints, from file to numbers, pictures and pages."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import demo
from dictionary_learning import plotting
from dictionary_learning.formats import find_saes
from dictionary_learning.report import main as report


@pytest.fixture(scope="module")
def trained(tiny_model_folder, text_file, small, tmp_path_factory) -> Path:
    """The SAE of a small run, with checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    command = ["--model_name", tiny_model_folder, "--dataset", text_file, *small, "--layers", 1, "--no_eval"]
    command += ["--architectures", "batch_top_k", "--save_dir", folder, "--save_checkpoints"]
    assert demo.main(list(map(str, command))) == 0
    return find_saes(folder)[0]


@pytest.fixture(scope="module")
def foreign(trained, tiny_model_folder, tmp_path_factory) -> dict[str, Path]:
    """The same SAE in the files of others, by family: a folder without a config, one with, and a file of its own."""
    state, top = torch.load(trained / "ae.pt", weights_only=True), tmp_path_factory.mktemp("foreign")
    W_enc, W_dec, b_dec = state["encoder.weight"].T, state["decoder.weight"].T, state["b_dec"]
    plain = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": state["encoder.bias"] - b_dec @ W_enc, "b_dec": b_dec}
    gemma = top / "gemma" / "layer_1" / "width_16k" / "average_l0_4"
    gemma.mkdir(parents=True)
    threshold = state["threshold"].expand(len(W_dec))
    np.savez(gemma / "params.npz", **{name: tensor.numpy() for name, tensor in plain.items()}, threshold=threshold)
    shutil.copytree(trained, top / "lens", ignore=lambda *_: ["ae.pt", "config.json", "checkpoints", "metrics.jsonl"])
    (top / "qwen").mkdir()
    turned = {name: tensor.T.contiguous() if tensor.ndim == 2 else tensor for name, tensor in plain.items()}
    torch.save(turned, top / "qwen" / "layer1.sae.pt")
    (top / "qwen" / "config.json").write_text(json.dumps({"k": 4, "base_model": str(tiny_model_folder)}))
    return {"Gemma Scope": gemma, "SAELens": top / "lens", "Qwen-Scope": top / "qwen" / "layer1.sae.pt"}


@pytest.fixture
def asked(tiny_model_folder, text_file, tmp_path) -> list[str]:
    """What evaluation is told where the SAEs do not say it."""
    flags = ["--model_name", tiny_model_folder, "--any_model", "--dataset", text_file, "--eval_num_inputs", 6]
    return list(map(str, [*flags, "--context_length", 32, "--device", "cpu", "--save_dir", tmp_path]))


def test_their_results_are_drawn_wherever_they_are_written(foreign, asked, tmp_path):
    assert demo.main(["--eval_only", *map(str, foreign.values()), *asked]) == 0
    folders = [foreign["Gemma Scope"].parents[2], foreign["SAELens"], tmp_path / "evaluated"]
    records, problems = plotting.read_runs(folders)
    assert problems == []
    assert [record.trainer["format"] for record in records] == list(foreign)
    assert [record.panel[1] for record in records] == [1, 1, 1] and all(record.results["l0"] > 0 for record in records)
    assert len({record.sweep for record in records}) == 3
    assert [record.style.label for record in records] == ["JumpReluAutoEncoder", "batchtopk", "GeneralSAE"]
    figure = plotting.pareto_figure(records)
    assert {line.get_marker() for axes in figure.axes for line in axes.lines} == {"X", "*"}


def test_contexts_that_the_model_cannot_read_are_told(foreign, asked, text_file, tiny_model_folder, capsys):
    """As long as the SAE says, or as the user."""
    flags = [flag for flag in asked if flag not in ("--context_length", "32")]
    path, sentence = str(foreign["Gemma Scope"]), "is more than the 128 tokens"
    assert demo.main(["--eval_only", path, *flags]) == 2
    assert f"--context_length 1024 {sentence}" in capsys.readouterr().err
    assert demo.main(["--eval_only", path, *flags, "--context_length", "129"]) == 2
    assert f"--context_length 129 {sentence}" in capsys.readouterr().err
    command = [path, "--dataset", text_file, "--model", tiny_model_folder, "--num_tokens", 200, "--device", "cpu"]
    assert report(list(map(str, command))) == 2
    assert f"error: --context_length 1024 {sentence}" in capsys.readouterr().err


def test_an_sae_that_is_named_twice_is_evaluated_once(foreign, asked, capsys):
    path = foreign["Gemma Scope"]
    assert demo.main(["--eval_only", str(path), f"{path}/", str(path.parents[2]), *asked]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("1 ")]) == 1


def test_files_of_like_names_have_results_of_their_own(foreign, asked, tmp_path, monkeypatch, capsys):
    """However they are spelled, and once each."""
    file = foreign["Qwen-Scope"]
    names = ["a/b/layer1.sae.pt", "a_b/layer1.sae.pt", ".a/b/layer1.sae.pt"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        shutil.copy(file, path)
        shutil.copy(file.parent / "config.json", path.parent)
    monkeypatch.chdir(tmp_path)
    assert demo.main(["--eval_only", *names, f"./{names[0]}", str(tmp_path / names[0]), *asked]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if "b/layer1.sae.pt" in line]) == 3
    written = [json.loads(path.read_text()) for path in tmp_path.rglob("eval_results.json")]
    assert len(written) == 3 and len({results["hyperparameters"]["sae"]["source"]["path"] for results in written}) == 3


def test_pages_are_written_of_folders_and_of_files(foreign, text_file, tiny_model_folder, tmp_path, capsys):
    flags = ["--dataset", text_file, "--model", tiny_model_folder, "--num_tokens", 200, "--device", "cpu"]
    flags += ["--context_length", 32]
    for family, path in foreign.items():
        assert report([str(path), "--save_dir", str(tmp_path), *map(str, flags)]) == 0
        page = Path(capsys.readouterr().out.strip())
        assert page.parent == (path if path.is_dir() else tmp_path / "evaluated" / str(path.resolve()).strip("/"))
        assert f"{path.stem}" in str(page) and page.stat().st_size > 10_000, family
    assert report([str(foreign["Qwen-Scope"].parent.parent), "--save_dir", str(tmp_path), *map(str, flags)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_what_a_page_cannot_be_made_of_is_told(foreign, tmp_path, capsys):
    path = tmp_path / "google" / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6"
    shutil.copytree(foreign["Gemma Scope"], path)
    for name, sentence in ((path, "it reads embed, which is no place in a layer"), ("nowhere", "does not exist")):
        assert report([str(name), "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: there is no SAE to report on in {name}: ") and error.count("\n") == 1
        assert sentence in error


def test_a_checkpoint_is_evaluated_and_shown_as_its_run_says(trained, tmp_path, capsys):
    checkpoints = sorted((trained / "checkpoints").glob("ae_*.pt"), key=lambda path: int(path.stem[3:]))
    assert len(checkpoints) > 3
    command = ["--eval_only", *map(str, [checkpoints[-1], trained]), "--save_dir", str(tmp_path), "--device", "cpu"]
    assert demo.main(command) == 0
    told = capsys.readouterr()
    assert "not evaluated" not in told.err and len([row for row in told.out.splitlines() if " k 4 " in row]) == 2
    results = json.loads(next(tmp_path.rglob("eval_results.json")).read_text())
    assert results["hyperparameters"]["settings"]["context_length"] == 32  # of run.json, as no flag says it
    assert results["l0"] != json.loads((trained / "eval_results.json").read_text())["l0"]
    assert report([command[1], "--num_tokens", "200", "--save_dir", str(tmp_path), "--device", "cpu"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_relative_to(tmp_path / "evaluated")
