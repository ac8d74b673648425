"""Uploads to a loopback Hub through huggingface_hub itself, and the model card with its snippets run as written."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import HubServer, Repo
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from dictionary_learning import dictionary, hub
from dictionary_learning.files import read_json, write_json
from dictionary_learning.formats import load_dictionary, save_sae
from dictionary_learning.hub import UploadError, check_repo, upload_run
from dictionary_learning.model_card import CARD_MARK, model_card

# huggingface_hub hands files to its HTTP client in a way that the latter calls old
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

D, F, LAYER = 16, 48, 1
SAES = [  # trainer class, dictionary, sparsity setting
    ("StandardTrainer", dictionary.AutoEncoder, {"l1_penalty": 0.04}),
    ("GatedSAETrainer", dictionary.GatedAutoEncoder, {"l1_penalty": 0.06}),
    ("TopKTrainer", dictionary.AutoEncoderTopK, {"k": 4}),
    ("BatchTopKTrainer", dictionary.BatchTopKSAE, {"k": 4}),
    ("MatryoshkaBatchTopKTrainer", dictionary.MatryoshkaBatchTopKSAE, {"k": 4}),
    ("JumpReluTrainer", dictionary.JumpReluAutoEncoder, {"target_l0": 4.0}),
]


def make_run(folder: Path, model_name: str, saes=SAES, **results) -> Path:
    """A run folder as a run leaves it, with random SAEs whose biases and thresholds matter."""
    generator = torch.Generator().manual_seed(0)
    for i, (trainer_class, dict_class, setting) in enumerate(saes):
        sizes = {"k": setting["k"]} if "k" in setting else {}
        sizes |= {"group_sizes": [F // 3, F - F // 3]} if "Matryoshka" in trainer_class else {}
        ae = dict_class(D, F, **sizes, generator=generator)
        state = ae.state_dict()
        for tensor in state.values():
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
        if "k" in setting:
            ae.threshold.fill_(0.2)
        trainer = {"trainer_class": trainer_class, "dict_class": dict_class.__name__, "activation_dim": D}
        trainer |= {"dict_size": F, "layer": LAYER, "lm_name": model_name, "seed": 0, "lr": 1e-3, "steps": 100}
        trainer |= {"submodule_name": f"resid_post_layer_{LAYER}", "wandb_name": f"{trainer_class}_trainer_{i}"}
        sae_folder = folder / f"resid_post_layer_{LAYER}" / f"trainer_{i}"
        save_sae(sae_folder, ae, {"trainer": trainer | setting, "buffer": {"ctx_len": 32}})
        measured = {"l0": 4.0 + i / 8, "frac_recovered": 0.8 + i / 100, "frac_variance_explained": 0.7}
        measured |= {"kl_divergence": 0.25, "frac_alive": 0.9, "n_tokens": 5000, "hyperparameters": {"n_inputs": 4}}
        write_json(sae_folder / "eval_results.json", measured | results)
    settings = {"model_name": model_name, "dataset": "team/texts", "eval_dataset": "team/texts", "mask": True}
    record = {"settings": settings, "command": "demo.py --layers 1", "versions": {"torch": "2.13.0"}, "tokens": 9000}
    write_json(folder / "run.json", record)
    (folder / "pareto.png").write_bytes(b"\x89PNG\0")
    return folder


def add_what_stays_here(folder: Path) -> None:
    for name in (
        "resume/state_7/__0_0.distcp",
        "wandb/run-1/run.wandb",
        ".cache/x",
        "__pycache__/y",
        "resid_post_layer_1/.z.tmp",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not for others")


@pytest.fixture
def run_folder(tmp_path) -> Path:
    return make_run(tmp_path / "saes" / "tiny_all", "team/tiny")


# -- the check


def test_the_check_creates_a_repo_and_finds_it_again(server):
    assert check_repo("alice/saes") is None
    assert check_repo("alice/saes") is None
    assert check_repo("alice/hidden", private=True) is None
    assert {name: repo.private for name, repo in server.repos.items()} == {"alice/saes": False, "alice/hidden": True}


@pytest.mark.parametrize("name", ["saes", "", "alice/", "a/b/c", "alice/sa es", "../saes", "alice/x--y", "-alice/x"])
def test_a_name_that_cannot_be_is_refused(server, name):
    with pytest.raises(ValueError, match="repo"):
        check_repo(name)
    assert server.requests == []


@pytest.mark.parametrize(
    "token, repo, advice",
    [
        (None, "alice/saes", "hf auth login"),
        ("hf_nobody", "alice/saes", "hf auth login"),
        ("hf_reader", "alice/saes", "write permission"),
        ("hf_reader", "alice/new", "write permission"),
        ("hf_bob", "alice/saes", "write permission"),
        ("hf_bob", "team/new", "write permission"),
    ],
)
def test_who_may_not_write_hears_it_before_training(server, monkeypatch, token, repo, advice):
    server.repos["alice/saes"] = Repo(private=False)
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match=advice) as caught:
        check_repo(repo)
    assert token is None or token not in str(caught.value)


def test_nothing_private_goes_to_a_public_repo(server):
    server.repos["alice/saes"] = Repo(private=False)
    with pytest.raises(ValueError, match="public repo"):
        check_repo("alice/saes", private=True)


def test_a_hub_out_of_reach_does_not_keep_a_run_from_training(server, monkeypatch):
    server.fail = lambda method, path: 503
    assert "cannot be reached" in (check_repo("alice/saes") or "")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in (check_repo("alice/saes") or "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in (check_repo("alice/saes") or "")


def test_no_error_shows_the_token(server, monkeypatch):
    def illegal(api):
        raise RuntimeError("Illegal header value b'Bearer hf_alice'")

    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", illegal)
    assert "Bearer ***" in (check_repo("alice/saes") or "")


# -- the upload


def test_a_run_arrives_whole_and_once(server, run_folder):
    expected = {f"tiny_all/{p.relative_to(run_folder)}": p.read_bytes() for p in run_folder.rglob("*") if p.is_file()}
    add_what_stays_here(run_folder)
    assert upload_run(run_folder, "alice/saes", retry_seconds=()) == f"{server.url}/alice/saes/tree/main/tiny_all"
    repo = server.repos["alice/saes"]
    assert {path: content for path, content in repo.files.items() if path.startswith("tiny_all/")} == expected
    assert repo.files.keys() - expected.keys() == {".gitattributes", "README.md"}
    assert {path.rpartition(".")[2] for path in repo.in_lfs} == {"pt", "safetensors", "png"}
    assert not any(b"hf_alice" in content for content in repo.files.values())

    commits = list(repo.commits)
    upload_run(run_folder, "alice/saes", retry_seconds=())
    assert repo.commits == commits


def test_a_layer_can_go_ahead_of_the_others(server, run_folder):
    (run_folder / "resid_post_layer_2").mkdir()
    (run_folder / "resid_post_layer_2" / "config.json").write_text("{}")
    upload_run(run_folder, "alice/saes", layer=2, retry_seconds=())
    paths = server.repos["alice/saes"].files.keys() - {".gitattributes"}
    assert paths == {"tiny_all/resid_post_layer_2/config.json", "tiny_all/run.json"}


def with_id(folder: Path, run_id: str, **more) -> Path:
    write_json(folder / "run.json", read_json(folder / "run.json") | {"run_id": run_id, **more})
    return folder


def in_repo(server, name: str) -> dict[str, bytes]:
    """The files in a folder of the repo, by their paths within it."""
    files = server.repos["alice/saes"].files
    return {path.removeprefix(f"{name}/"): content for path, content in files.items() if path.startswith(f"{name}/")}


def on_disk(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_gone_from_the_folder_is_gone_from_the_hub_and_nothing_else(server, run_folder):
    server.repos["alice/saes"] = Repo(private=False, files={"tiny_all_2/x": b"", "LICENSE": b"", "[a]": b""})
    (run_folder / "[resid]*").write_text("a name with the characters of a pattern")
    upload_run(run_folder, "alice/saes", retry_seconds=())
    (run_folder / "[resid]*").unlink()
    shutil.rmtree(run_folder / "resid_post_layer_1" / "trainer_5")
    (run_folder / "resid_post_layer_1" / "trainer_0" / "eval_results.json").unlink()
    n_commits = len(server.repos["alice/saes"].commits)
    upload_run(run_folder, "alice/saes", retry_seconds=())
    assert in_repo(server, "tiny_all") == on_disk(run_folder)
    others = {path for path in server.repos["alice/saes"].files if not path.startswith("tiny_all/")}
    assert others == {"tiny_all_2/x", "LICENSE", "[a]", "README.md"}
    assert server.repos["alice/saes"].commits[n_commits:] == ["Upload tiny_all", "Model card of tiny_all"]


def test_a_layer_deletes_in_its_own_folder_alone(server, run_folder):
    upload_run(run_folder, "alice/saes", retry_seconds=())
    before = in_repo(server, "tiny_all")
    shutil.rmtree(run_folder / "resid_post_layer_1" / "trainer_5")
    (run_folder / "resid_post_layer_2").mkdir()
    (run_folder / "resid_post_layer_2" / "config.json").write_text("{}")
    upload_run(run_folder, "alice/saes", layer=2, retry_seconds=())
    assert in_repo(server, "tiny_all") == before | {"resid_post_layer_2/config.json": b"{}"}
    upload_run(run_folder, "alice/saes", layer=1, retry_seconds=())
    assert in_repo(server, "tiny_all") == on_disk(run_folder)


def test_another_run_of_the_same_name_is_refused_and_with_overwrite_replaced(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hub.time, "sleep", pytest.fail)  # no waiting can help
    first = with_id(make_run(tmp_path / "a" / "tiny", "team/tiny"), "first")
    second = with_id(make_run(tmp_path / "b" / "tiny", "team/tiny", SAES[:2]), "second")
    upload_run(first, "alice/saes")
    before = dict(server.repos["alice/saes"].files)
    for layer in (None, 1):
        with pytest.raises(ValueError, match="alice/saes has another run under the name tiny: give --overwrite"):
            upload_run(second, "alice/saes", layer=layer)
    assert server.repos["alice/saes"].files == before
    upload_run(second, "alice/saes", overwrite=True)
    assert in_repo(server, "tiny") == on_disk(second)
    upload_run(second, "alice/saes")  # it is the same one now
    with pytest.raises(ValueError, match="another run"):
        upload_run(first, "alice/saes")
    upload_run(with_id(first, "first", overwrite=True), "alice/saes")  # asked for when the run began
    assert in_repo(server, "tiny") == on_disk(first)


def test_runs_without_an_id_are_told_by_their_settings(server, tmp_path):
    run = make_run(tmp_path / "a" / "tiny", "team/tiny", SAES[:1])
    upload_run(run, "alice/saes", retry_seconds=())
    upload_run(run, "alice/saes", retry_seconds=())
    with pytest.raises(ValueError, match="another run"):
        upload_run(make_run(tmp_path / "b" / "tiny", "team/other", SAES[:1]), "alice/saes", retry_seconds=())
    with pytest.raises(ValueError, match="another run"):  # a new one, where the Hub has an old one
        upload_run(with_id(run, "new"), "alice/saes", retry_seconds=())


def test_another_run_of_the_same_name_is_told_before_training(server, tmp_path):
    run = with_id(make_run(tmp_path / "a" / "tiny", "team/tiny", SAES[:1]), "first")
    assert check_repo("alice/saes", run_folder=run) is None
    upload_run(run, "alice/saes", retry_seconds=())
    assert check_repo("alice/saes", run_folder=run) is None
    assert check_repo("alice/saes", run_folder=tmp_path / "b" / "other") is None
    with pytest.raises(ValueError, match="another run under the name tiny"):
        check_repo("alice/saes", run_folder=tmp_path / "b" / "tiny")  # not yet begun
    assert check_repo("alice/saes", run_folder=tmp_path / "b" / "tiny", overwrite=True) is None


def test_a_card_that_lies_in_the_folder_for_want_of_room_stays_there(server, run_folder):
    server.repos["alice/saes"] = Repo(private=False, files={"README.md": b"# Mine\n"})
    for _ in range(2):
        upload_run(run_folder, "alice/saes", retry_seconds=())
        card = in_repo(server, "tiny_all")["README.md"]
    commits = server.repos["alice/saes"].commits
    assert CARD_MARK.encode() in card and commits == ["Upload tiny_all", "Model card of tiny_all"]


def test_an_upload_that_breaks_goes_on_where_it_stopped(server, run_folder):
    answers = iter([500, 502])
    server.fail = lambda method, path: next(answers, None) if "/commit/" in path else None
    upload_run(run_folder, "alice/saes", retry_seconds=(0, 0))
    assert "README.md" in server.repos["alice/saes"].files
    sent = [path for method, path in server.requests if method == "PUT"]
    assert len(sent) == len(set(sent)) == 13  # twelve weight files and the picture, each once


def test_an_upload_that_fails_leaves_the_command_that_finishes_it(server, run_folder):
    server.fail = lambda method, path: 500 if "/commit/" in path else None
    with pytest.raises(UploadError) as caught:
        upload_run(run_folder, "alice/saes", private=True, overwrite=True, retry_seconds=(0,))
    command = shlex.split(str(caught.value).rpartition(": ")[2])
    expected = ["--upload_only", str(run_folder), "--hf_repo_id", "alice/saes", "--private", "--overwrite"]
    assert command == ["python", "demo.py", *expected]
    assert "hf_alice" not in str(caught.value)

    server.fail = lambda method, path: None
    upload_run(command[3], command[5], private=True, retry_seconds=())
    assert server.repos["alice/saes"].private and "README.md" in server.repos["alice/saes"].files


def test_a_refused_upload_is_not_tried_again(server, run_folder, monkeypatch):
    server.repos["alice/saes"] = Repo(private=False)
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    monkeypatch.setattr(hub.time, "sleep", pytest.fail)
    with pytest.raises(UploadError, match="upload_only"):
        upload_run(run_folder, "alice/saes")
    assert server.repos["alice/saes"].files == {}


def test_a_run_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ValueError, match="no run folder"):
        upload_run(tmp_path / "nothing", "alice/saes")


# -- the card


def test_the_card_says_what_is_there_and_how_good_it_is(run_folder):
    card = model_card(run_folder, "alice/saes")
    assert card is not None
    data = ModelCard(card).data
    assert (data.base_model, data.datasets, data.license) == (["team/tiny"], ["team/texts"], "mit")
    assert {"sparse-autoencoder", "sae", "mechanistic-interpretability"} <= set(data.tags or [])
    for i, label in enumerate(["Standard", "Gated", "TopK", "BatchTopK", "Matryoshka", "JumpReLU"]):
        (row,) = re.findall(rf"^\| `trainer_{i}` \| {label} \|.*$", card, re.MULTILINE)
        assert f"| {4.0 + i / 8:.1f} | {0.8 + i / 100:.3f} | 0.700 | 0.250 | 90% |" in row
    assert "In doubt, take `resid_post_layer_1/trainer_5`" in card  # it recovers the most
    assert "](tiny_all/pareto.png)" in card and "demo.py --layers 1" in card and "torch 2.13.0" in card
    assert "`W_enc` (D, F)" in card and "`encoder.weight` (F, D)" in card


def edit_trainer(sae_folder: Path, **settings) -> None:
    config = read_json(sae_folder / "config.json")
    write_json(sae_folder / "config.json", config | {"trainer": config["trainer"] | settings})


def test_the_card_tells_seed_and_learning_rate_where_a_run_has_several(run_folder):
    alike = model_card(run_folder, "alice/saes") or ""
    assert "| setting | L0 |" in alike
    for i in range(6):
        edit_trainer(run_folder / "resid_post_layer_1" / f"trainer_{i}", seed=i % 2, lr=[1e-3, 3e-4][i // 3])
    card = model_card(run_folder, "alice/saes") or ""
    assert "| setting | seed | learning rate | L0 |" in card
    assert "| `trainer_3` | BatchTopK | 48 | k 4 | 1 | 0.0003 | 4.4 |" in card
    assert "| `trainer_4` | Matryoshka | 48 | k 4 | 0 | 0.0003 | 4.5 |" in card


def test_the_card_tells_what_ended_early_and_what_was_skipped(run_folder):
    edit_trainer(
        run_folder / "resid_post_layer_1" / "trainer_2", ended_early={"step": 19, "steps": 20, "tokens": 950_000}
    )
    record = read_json(run_folder / "run.json")
    write_json(run_folder / "run.json", record | {"skipped": {"empty": 1200, "not text": 34}, "rows": 4200})
    limits, _, training = (model_card(run_folder, "alice/saes") or "").partition("### Training")
    sentence = "`resid_post_layer_1/trainer_2` was trained on 950,000 tokens, 19 of 20 steps: the text ended."
    assert limits.count(sentence) == 1 and limits.count("the text ended") == 1
    assert "- Rows of the text that were skipped: 1,234 of 4,200 (1,200 empty, 34 not text)\n" in training
    write_json(run_folder / "run.json", record | {"skipped": {}, "rows": 4200})
    assert "skipped" not in (model_card(run_folder, "alice/saes") or "")


def test_the_card_tells_what_the_saes_started_from(run_folder):
    record = read_json(run_folder / "run.json")
    for started in ("alice/older/tiny_all", None):
        settings = record["settings"] | {"init_from": started}
        write_json(run_folder / "run.json", record | {"settings": settings})
        _, _, training = (model_card(run_folder, "alice/saes") or "").partition("### Training")
        assert ("- Started from: the SAEs of `alice/older/tiny_all`\n" in training) == (started is not None)
        assert ("Started from" in training) == (started is not None)


@pytest.mark.parametrize(
    "results, sentence",
    [
        ({"l0": 0.0, "frac_alive": 0.0, "warning": "no latent fires on this text."}, "no latent fires on this text."),
        ({"frac_alive": 0.25}, "75% of the latents of `resid_post_layer_1/trainer_0` did not fire"),
        ({"l0": 30.0}, "`resid_post_layer_1/trainer_0` has an L0 of 30 where 4 was asked for"),
        ({"l0": None, "frac_recovered": None, "error": "it is broken."}, "has no measurements"),
    ],
)
def test_the_card_says_what_is_wrong(tmp_path, results, sentence):
    card = model_card(make_run(tmp_path / "run", "team/tiny", SAES[3:4], **results), "alice/saes")
    assert card is not None and sentence in card.partition("### Known limits")[2]


def test_a_card_of_next_to_nothing(tmp_path):
    folder = make_run(tmp_path / "run", "/models/mine", SAES[:1])
    for name in ("run.json", "pareto.png"):
        (folder / name).unlink()
    (sae,) = (folder / "resid_post_layer_1").iterdir()
    for name in ("eval_results.json", "cfg.json", "sae_weights.safetensors"):
        (sae / name).unlink()
    card = model_card(folder, "alice/saes")
    assert card is not None and "has no measurements" in card and "pareto" not in card and "```python" not in card
    assert ModelCard(card).data.base_model is None


def test_a_card_keeps_other_runs_and_all_that_people_wrote(tmp_path):
    first = model_card(make_run(tmp_path / "first", "team/tiny", SAES[:1]), "alice/saes") or ""
    edited = first.replace("license: mit", "license: apache-2.0\nlanguage: en") + "\nCite us.\n"
    second = make_run(tmp_path / "second", "team/other", SAES[1:2])
    both = model_card(second, "alice/saes", edited) or ""
    assert [line for line in both.splitlines() if line.startswith("## ")] == ["## first", "## second"]
    data = ModelCard(both).data
    assert data.base_model == ["team/tiny", "team/other"] and data.license == "apache-2.0" and data.language == "en"
    assert both.count(CARD_MARK) == 1 and "Cite us." in both

    (second / "pareto.png").unlink()
    renewed = model_card(second, "alice/saes", both) or ""
    assert "second/pareto.png" in both and renewed == both.replace(
        "![Loss recovered against L0](second/pareto.png)\n\n", ""
    )


def test_somebodys_own_readme_stays_and_the_card_lies_in_the_run_folder(server, run_folder):
    server.repos["alice/saes"] = Repo(private=False, files={"README.md": b"# Mine\n"})
    upload_run(run_folder, "alice/saes", retry_seconds=())
    files = server.repos["alice/saes"].files
    assert files["README.md"] == b"# Mine\n"
    card = files["tiny_all/README.md"].decode()
    assert CARD_MARK in card and "](pareto.png)" in card


def test_a_readme_that_cannot_be_read_is_not_taken_for_none(server, run_folder, monkeypatch):
    server.repos["alice/saes"] = Repo(private=False, files={"README.md": b"# Mine\n"})
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    server.fail = lambda method, path: 503 if path.endswith("README.md") else None
    with pytest.raises(UploadError):
        upload_run(run_folder, "alice/saes", retry_seconds=())
    assert server.repos["alice/saes"].files["README.md"] == b"# Mine\n"


def test_a_licence_chosen_on_the_hub_stays(run_folder):
    card = model_card(run_folder, "alice/saes", "---\nlicense: cc-by-4.0\n---\n") or ""
    assert CARD_MARK in card and ModelCard(card).data.license == "cc-by-4.0" and card.count("license") == 1


# -- SAEs of other families, by name


def stored(content: dict, tmp_path: Path, name: str) -> bytes:
    (tmp_path / "file").mkdir(exist_ok=True)
    path = tmp_path / "file" / name
    save_file(content, path) if name.endswith(".safetensors") else torch.save(content, path)
    return path.read_bytes()


def test_a_file_at_the_root_and_a_folder_download_what_they_need(server, tmp_path, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    W_FD, b_F, b_D = torch.randn(12, 4, generator=draw), torch.zeros(12), torch.zeros(4)
    qwen = stored({"W_enc": W_FD, "W_dec": W_FD.T.clone(), "b_enc": b_F, "b_dec": b_D}, tmp_path, "layer3.sae.pt")
    coder = {"encoder.weight": W_FD, "encoder.bias": b_F, "W_dec": W_FD.clone(), "b_dec": b_D}
    sparsify = stored(coder, tmp_path, "sae.safetensors")
    server.repos["alice/saes"] = Repo(
        private=False,
        files={
            "layer3.sae.pt": qwen,
            "layer4.sae.pt": b"large",
            "config.json": b'{"k": 3, "model": "user/lm", "ctx_len": 64}',
            "layers.5/cfg.json": b'{"k": 2, "d_in": 4}',
            "layers.5/sae.safetensors": sparsify,
            "layers.5/notes.md": b"large",
        },
        commits=["all"],
    )
    ae, config = load_dictionary(f"alice/saes@{server.repos['alice/saes'].head}/layer3.sae.pt")
    assert torch.equal(ae.decoder_FD, W_FD) and (config["trainer"]["layer"], config["trainer"]["k"]) == (3, 3)
    ae, config = load_dictionary("alice/saes/layers.5")
    assert torch.equal(ae.decoder_FD, W_FD) and config["trainer"]["lm_name"] == "user/lm"
    assert config["source"]["path"] == "alice/saes/layers.5" and config["buffer"]["ctx_len"] == 64
    got = {path.rsplit("/", 1)[1] for method, path in server.requests if method == "GET" and "/resolve/" in path}
    assert got == {"layer3.sae.pt", "config.json", "cfg.json", "sae.safetensors"}


# -- there and back, by the client that users have: addresses and login come from the environment

CLIENT = """
import json, re, sys
from pathlib import Path
import torch
from huggingface_hub import snapshot_download
from dictionary_learning import load_dictionary
from dictionary_learning.hub import check_repo, upload_run
from dictionary_learning.model_card import _transformers_snippet
from dictionary_learning.plotting import read_runs

run_folder = Path(sys.argv[1])
assert check_repo("alice/saes", private=True) is None
upload_run(run_folder, "alice/saes", private=True)
copy = Path(snapshot_download("alice/saes"))
for path in filter(Path.is_file, run_folder.rglob("*")):
    assert (copy / run_folder.name / path.relative_to(run_folder)).read_bytes() == path.read_bytes(), path

def differs(code, record):
    found = {}
    exec(code, found)
    ae, _ = load_dictionary(copy / run_folder.name / record.folder.relative_to(run_folder))
    with torch.no_grad():
        x = found["x"]
        # SAELens, whose files the snippets read, runs a TopK SAE by its k
        options = {"use_threshold": False} if record.trainer["dict_class"] == "AutoEncoderTopK" else {}
        f = ae.encode(x, **options)
        assert f.count_nonzero() > 0
        torch.testing.assert_close(found["features"], f, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found["reconstruction"], ae.decode(f), atol=1e-5, rtol=1e-4)
        assert found["features"].shape == (len(found["tokens"]), ae.dict_size)

records, problems = read_runs([run_folder])
snippets = re.findall("```python\\n(.*?)\\n```", (copy / "README.md").read_text(), re.DOTALL)
differs(snippets[0], records[-1])
for record in records:
    where = f"{run_folder.name}/{record.folder.relative_to(run_folder).as_posix()}"
    differs(_transformers_snippet(record, "alice/saes", where, record.trainer["lm_name"]), record)
if "sae_lens" in sys.argv:
    found = {}
    exec(snippets[1], found)
    ae, _ = load_dictionary(copy / run_folder.name / records[-1].folder.relative_to(run_folder))
    torch.testing.assert_close(found["features"], ae.encode(found["x"]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["reconstruction"], ae(found["x"]), atol=1e-5, rtol=1e-4)
print("done")
"""


def run_client(tmp_path: Path, run_folder: Path, *arguments: str) -> None:
    with HubServer() as server:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_alice", "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", CLIENT, str(run_folder), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "done"


def test_there_and_back_with_the_snippets_of_the_card(tmp_path, tiny_model_folder):
    run_client(tmp_path, make_run(tmp_path / "tiny_all", str(tiny_model_folder)))


def test_there_and_back_into_saelens(tmp_path, tiny_model_folder):
    pytest.importorskip("sae_lens")
    run_client(tmp_path, make_run(tmp_path / "tiny_all", str(tiny_model_folder)), "sae_lens")
