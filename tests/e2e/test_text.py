"""Text as users bring it, seen from the command line: what is held out, what is opened when, what is told."""

import json
import os
from pathlib import Path

import pytest


@pytest.fixture
def texts(tmp_path, text_file) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text(text_file.read_text())
    return folder


def record(tmp_path: Path) -> dict:
    (path,) = (tmp_path / "saes").glob("*/run.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("other", ["./{}", "{}/", "{absolute}", "{}/a.jsonl"])
def test_the_same_text_by_another_name_is_held_out(other, run, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = other.format(texts.name, absolute=texts.resolve())
    flags = ("--save_dir", "saes", "--dataset", texts.name, "--eval_dataset", name, "--architectures", "top_k")
    assert run(*flags, "--eval_num_inputs", 2) == 0
    assert record(tmp_path)["settings"]["eval_is_held_out"] is True
    (results,) = (tmp_path / "saes").rglob("eval_results.json")
    assert json.loads(results.read_text())["hyperparameters"]["held_out"] is True


@pytest.mark.parametrize(
    "rows, flags, words",
    [
        (None, (), "nowhere.jsonl"),
        ('{"body": "some text"}\n' * 9, (), "'text'"),
        ("\n", (), "eval.jsonl"),
    ],
)
def test_evaluation_text_that_cannot_be_read_is_told_before_training(rows, flags, words, run, tmp_path, capsys):
    path = tmp_path / ("nowhere.jsonl" if rows is None else "eval.jsonl")
    if rows is not None:
        path.write_text(rows)
    for more in ((), ("--dry_run",)):
        assert run("--save_dir", tmp_path / "saes", "--architectures", "top_k", "--eval_dataset", path, *more) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "saes").exists()


def test_evaluation_text_may_have_a_column_of_its_own(run, tmp_path):
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps({"body": f"some text of its own, number {i}"}) + "\n" for i in range(60)))
    flags = ("--save_dir", tmp_path / "saes", "--architectures", "top_k", "--eval_dataset", path)
    assert run(*flags, "--eval_text_column", "body") == 0
    assert record(tmp_path)["settings"]["eval_is_held_out"] is False


def test_rows_that_are_skipped_are_told_and_recorded(run, texts, tmp_path, capsys):
    lines = (texts / "a.jsonl").read_text().splitlines()
    (texts / "a.jsonl").write_text("\n".join(line + '\n{"text": ""}' for line in lines) + "\n")
    assert run("--save_dir", tmp_path / "saes", "--dataset", texts, "--architectures", "top_k", "--no_eval") == 0
    content = record(tmp_path)
    assert content["skipped"]["empty"] > 10 and content["rows"] > content["skipped"]["empty"]
    assert "warning: " in capsys.readouterr().err


def test_shuffled_text_is_the_same_each_time_and_resumed(run, texts, tmp_path):
    from dictionary_learning.formats import find_saes

    flags = ("--dataset", texts, "--architectures", "top_k", "--no_eval", "--shuffle")
    weights = []
    for name, more in (("a", ()), ("b", ()), ("c", ("--no-shuffle",))):
        assert run("--save_dir", tmp_path / name, *flags, *more) == 0
        (path,) = find_saes(tmp_path / name)
        weights.append((path / "ae.pt").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_files_that_are_chosen_and_left_out_are_printed(run, texts, tmp_path, capsys):
    (texts / "train.jsonl").write_bytes((texts / "a.jsonl").read_bytes())
    (texts / "notes.jsonl").write_text('{"text": "not for training"}\n')
    os.remove(texts / "a.jsonl")
    assert run("--save_dir", tmp_path / "saes", "--dataset", texts, "--architectures", "top_k", "--dry_run") == 0
    out = capsys.readouterr().out
    assert "train.jsonl" in out and "notes.jsonl" in out
