"""Activations on disk: what is trained from them has the bits of what is trained from the text."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

import demo
from dictionary_learning import cache
from dictionary_learning.formats import find_saes

ROOT = Path(__file__).parents[2]
FLAGS = "--architectures p_anneal batch_top_k --epochs 20 --backup_steps 10".split()


@pytest.fixture(scope="module")
def fixed(tiny_model_folder, text_file, small) -> list[str]:
    return ["--model_name", str(tiny_model_folder), "--dataset", str(text_file), *small, *FLAGS]


@pytest.fixture(scope="module", params=["bos and outliers out", "everything in"])
def straight(request, fixed, tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """(run on layers 1 and 3, activations, its flags): written while it trained. Its files are small, to be several."""
    folder, mask = tmp_path_factory.mktemp("straight"), ["--max_norm_multiple", "1.02"]
    flags = [*fixed, *(mask if request.param == "bos and outliers out" else ["--no-mask"])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "FILE_BYTES", 30_000)
        command = [*flags, "--layers", "1", "3", "--save_dir", folder / "run", "--cache", folder / "cache"]
        assert demo.main(list(map(str, command))) == 0
    assert len(list((folder / "cache").rglob("*.safetensors"))) > 5
    return folder / "run", folder / "cache", flags


def main(*arguments) -> int:
    return demo.main(list(map(str, arguments)))


def settings_from_cache(flags: list[str]) -> list[str]:
    """Without what the activations say themselves."""
    return [word for word in flags if word != "--epochs" and word != "20"]


def assert_same(one: Path, two: Path, n: int) -> None:
    ours, theirs = find_saes(one), find_saes(two)
    assert len(ours) == len(theirs) == n
    for a, b in zip(ours, theirs, strict=True):
        weights = [torch.load(path / "ae.pt", weights_only=True) for path in (a, b)]
        assert weights[0].keys() == weights[1].keys()
        assert all(weights[0][name].equal(weights[1][name]) for name in weights[0]), b
        for name in ("config.json", "metrics.jsonl", "eval_results.json"):
            assert not (a / name).exists() or (a / name).read_text() == (b / name).read_text(), b / name
    records = [json.loads(next(folder.glob("*/run.json")).read_text()) for folder in (one, two)]
    for name in ("tokens", "norm_factors", "positions"):
        assert records[0][name] == records[1][name], name


def test_a_run_that_writes_activations_has_the_bits_of_one_that_does_not(straight, tmp_path):
    run, _, flags = straight
    assert main(*flags, "--layers", 1, 3, "--save_dir", tmp_path) == 0
    assert_same(run, tmp_path, 4)


def test_a_run_from_activations_has_the_bits_of_one_from_the_text(straight, tmp_path, monkeypatch):
    run, folder, flags = straight
    monkeypatch.setattr("dictionary_learning.reading.load_model", None)
    assert main(*settings_from_cache(flags), "--activations", folder, "--save_dir", tmp_path, "--no_eval") == 0
    monkeypatch.undo()
    assert main("--eval_only", next(tmp_path.glob("*/run.json")).parent) == 0
    assert_same(run, tmp_path, 4)


def test_so_has_a_run_on_some_of_the_layers_for_fewer_tokens_stopped_and_resumed(straight, tmp_path, stopped_after):
    _, folder, flags = straight
    fewer = ["--layers", "3", "--num_tokens", "2000", "--no_eval"]
    assert main(*flags, *fewer, "--save_dir", tmp_path / "text") == 0
    command = [*settings_from_cache(flags), *fewer, "--activations", folder, "--save_dir", tmp_path / "disk"]
    with stopped_after(17):
        assert main(*command) == 75
    assert main(*command, "--resume") == 0
    assert_same(tmp_path / "text", tmp_path / "disk", 2)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def writer(fixed, folder: Path, *more) -> list[str]:
    flags = [*fixed, "--layers", 1, 3, "--num_tokens", 2000, "--cache", folder, "--save_dir", folder.parent / "run"]
    return list(map(str, [*flags, *more]))


@pytest.fixture(scope="module")
def written(fixed, tmp_path_factory) -> Path:
    """Activations that were written without training."""
    folder = tmp_path_factory.mktemp("written") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "FILE_BYTES", 30_000)
        assert demo.main(writer(fixed, folder, "--cache_only")) == 0
    assert not (folder.parent / "run").exists()
    return folder


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(cache, "FILE_BYTES", 30_000)


@pytest.mark.parametrize("only", [["--cache_only"], ["--no_eval"]], ids=["writing", "training"])
def test_stopped_while_they_are_written_and_begun_again(only, fixed, written, small_files, tmp_path, stopped_after):
    command = writer(fixed, tmp_path / "cache", *only)
    with stopped_after(13):
        assert main(*command) == 75
    again = [] if "--cache_only" in only else ["--resume"]
    assert main(*command, *again) == 0
    assert content(tmp_path / "cache") == content(written)


def test_a_damaged_file_is_told_and_written_again(fixed, written, small_files, tmp_path, capsys):
    folder = shutil.copytree(written, tmp_path / "cache")
    path = sorted(folder.rglob("*.safetensors"))[2]
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    read = [*settings_from_cache(fixed), "--activations", folder, "--save_dir", tmp_path, "--num_tokens", 2000]
    assert main(*read, "--no_eval") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"{path} is damaged" in errors[0] and f"--cache {folder} --cache_only" in errors[0]
    with pytest.warns(UserWarning, match=f"{path.name} is damaged: the last 8 of 10 files are written again"):
        assert main(*writer(fixed, folder, "--cache_only")) == 0
    assert content(folder) == content(written)
    assert main(*read, "--no_eval", "--overwrite") == 0


def test_a_full_disk_is_told_and_what_is_written_stays_whole(
    fixed, written, small_files, tmp_path, capsys, monkeypatch
):
    n, save = [], cache.save_file

    def full(tensors, path):
        n.append(1)
        if len(n) == 4:
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(cache, "save_file", full)
    command = writer(fixed, tmp_path / "cache", "--cache_only")
    assert main(*command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "could not be written ([Errno 28] No space left on device)" in error
    assert cache.held(tmp_path / "cache", 1)[0] > 0
    assert main(*command) == 0
    assert content(tmp_path / "cache") == content(written)


def test_too_little_disk_is_told_before_anything_is_loaded(fixed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: os.statvfs_result and type("", (), {"free": 100_000}))
    assert main(*writer(fixed, tmp_path / "cache", "--cache_only")) == 2
    told = capsys.readouterr()
    assert "activations: 333 KB to write in" in told.out  # (2,000 + a buffer of 600) x 2 layers x 16 x 4 bytes
    assert "the run needs 333 KB on disk" in told.err


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--num_tokens", "4000"], "holds 2,468 activations of each layer, the run asks for 4,000: ask for fewer"),
        (["--layers", "1", "2"], "they are of layer 1, layer 3, not of layer 2"),
        (["--context_length", "16"], "they are of context_length 32, not 16"),
        (["--no-mask"], "they are of mask True, not False"),
        (["--cache", "x"], "give one of the two"),
    ],
)
def test_activations_that_do_not_fit_are_refused(flags, sentence, fixed, written, tmp_path, capsys):
    read = [*settings_from_cache(fixed), "--num_tokens", 2000, "--activations", written, "--save_dir", tmp_path]
    assert main(*read, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and re.search(sentence, error), error


@pytest.mark.parametrize("key", ["files", "file", "sum", "full", "batches", "text"])
def test_a_damaged_index_of_a_shard_is_one_sentence(key, fixed, written, tmp_path, capsys):
    folder = shutil.copytree(written, tmp_path / "cache")
    path = folder / "text_0" / "index.json"
    path.write_text(path.read_text().replace(f'"{key}"', f'"{key[1:]}"', 1))
    commands = [[*settings_from_cache(fixed), "--activations", folder], writer(fixed, folder, "--cache_only")]
    for command in commands:
        assert main(*command, "--num_tokens", 2000, "--save_dir", tmp_path) == 2
        assert capsys.readouterr().err.endswith(
            f"error: {path} is damaged: restore it from a copy, or write the activations anew.\n"
        )


def test_a_file_is_no_place_for_a_cache(fixed, tmp_path, capsys):
    (tmp_path / "notes").write_text("mine")
    assert main(*writer(fixed, tmp_path / "notes", "--cache_only")) == 2
    assert "notes exists and holds other things" in capsys.readouterr().err
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.parametrize(
    "name, value",
    [("settings", None), ("layers", "1"), ("model", None), ("held_out", 1), ("mask", None), ("context_length", "32")],
)
def test_an_index_that_says_what_cannot_be_is_one_sentence(name, value, fixed, written, tmp_path, capsys):
    folder = shutil.copytree(written, tmp_path / "copy")
    index = json.loads((folder / "index.json").read_text())
    (index if name in index else index["settings"])[name] = value
    (folder / "index.json").write_text(json.dumps(index))
    assert main(*settings_from_cache(fixed), "--activations", folder, "--save_dir", tmp_path / "saes") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "index" in error, error


def test_activations_of_another_model_are_refused(fixed, written, tiny_model_folder, tmp_path, capsys):
    other = shutil.copytree(tiny_model_folder, tmp_path / "other")
    read = [*settings_from_cache(fixed), "--num_tokens", 2000, "--activations", written, "--save_dir", tmp_path]
    assert main(*read, "--model_name", other) == 2
    assert f"they are of model_name {tiny_model_folder}, not {other}" in capsys.readouterr().err
    folder = shutil.copytree(written, tmp_path / "cache")
    index = json.loads((folder / "index.json").read_text())
    index["model"]["weights"] = "0"
    (folder / "index.json").write_text(json.dumps(index))
    read[read.index(written)] = folder
    assert main(*read) == 2
    assert "is another model by now" in capsys.readouterr().err
    assert main(*writer(fixed, folder, "--cache_only")) == 2
    assert "is another model now" in capsys.readouterr().err


def test_they_are_read_again_and_added_to(fixed, written, small_files, tmp_path):
    read = [*settings_from_cache(fixed), "--activations", written, "--save_dir", tmp_path, "--no_eval"]
    assert main(*read, "--num_tokens", 4500, "--epochs", 2, "--architectures", "batch_top_k") == 0
    folder = shutil.copytree(written, tmp_path / "cache")
    assert main(*writer(fixed, folder, "--cache_only", "--num_tokens", 3000)) == 0
    assert main(*writer(fixed, tmp_path / "straight", "--cache_only", "--num_tokens", 3000)) == 0
    assert content(folder) == content(tmp_path / "straight")


class Killed:
    """A writer in a process of its own, with small files."""

    SCRIPT = "import sys, demo\nfrom dictionary_learning import cache\ncache.FILE_BYTES = 30_000\n"
    SCRIPT += "sys.exit(demo.main(sys.argv[1:]))"

    def __init__(self, command: list[str]):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.SCRIPT, *command], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )


def kill_often(command: list[str], folder: Path, kills: int, seed: int) -> list[int]:
    """Kill a writer `kills` times, begin it again each time, and let it end.  Returns the files it had at each kill."""
    rng, moments = random.Random(seed), []
    for _ in range(kills):
        process = Killed(command).process
        before = len(list(folder.rglob("*.safetensors")))
        while len(list(folder.rglob("*.safetensors"))) <= before and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.communicate()
        moments.append(len(list(folder.rglob("*.safetensors"))))
    process = Killed(command).process
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return moments


def test_killed_while_they_are_written(fixed, written, tmp_path):
    moments = kill_often(writer(fixed, tmp_path / "cache", "--cache_only"), tmp_path / "cache", kills=2, seed=0)
    assert content(tmp_path / "cache") == content(written), moments


def test_a_cache_that_another_run_writes_is_left_to_it(fixed, written, tmp_path, capsys):
    command = writer(fixed, tmp_path / "cache", "--cache_only")
    first = Killed(command).process
    try:
        while not list((tmp_path / "cache").rglob("*.safetensors")) and first.poll() is None:
            time.sleep(0.001)
        first.send_signal(signal.SIGSTOP)  # it is in the midst of it
        for only in (["--cache_only"], ["--no_eval"]):
            assert main(*writer(fixed, tmp_path / "cache", *only)) == 2
            error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert error == [f"error: another run is writing {tmp_path / 'cache'}: wait until it has ended, or choose "
                             "another folder for --cache."]  # fmt: skip
    finally:
        first.send_signal(signal.SIGCONT)
        _, errors = first.communicate(timeout=300)
    assert first.returncode == 0, errors[-2000:]
    assert content(tmp_path / "cache") == content(written)


def test_two_processes_write_and_read_their_own_shards(fixed, tmp_path):
    from test_world import finish, torchrun

    flags = [*fixed, "--layers", 1, 3, "--num_tokens", 1500, "--text_shards", 2, "--no_eval"]
    both, one = tmp_path / "both", tmp_path / "one"
    write = [*flags, "--cache", both, "--cache_only"]
    code, output = finish(torchrun(2, list(map(str, write))))
    assert code == 0, output[-3000:]
    assert main(*flags, "--cache", one, "--save_dir", tmp_path / "text") == 0
    assert content(both) == content(one)
    read = [*settings_from_cache(flags), "--activations", both, "--save_dir", tmp_path / "disk"]
    code, output = finish(torchrun(2, list(map(str, read))))
    assert code == 0, output[-3000:]
    assert_same(tmp_path / "text", tmp_path / "disk", 4)


if __name__ == "__main__":  # python tests/e2e/test_cache.py 10
    with tempfile.TemporaryDirectory() as name:
        command = f"""--model_name tiny-python --layers 1 2 --num_tokens 100000 --device cpu --cache_only
            --save_dir {name}/run --cache""".split()
        folders = Path(name, "straight"), Path(name, "killed")
        kill_often([*command, str(folders[0])], folders[0], kills=0, seed=0)
        print("files at each kill:", kill_often([*command, str(folders[1])], folders[1], int(sys.argv[1]), seed=0))
        equal = content(folders[0]) == content(folders[1])
        print(f"{len(content(folders[0]))} files, {'equal to the bit' if equal else 'DIFFERENT'}")
