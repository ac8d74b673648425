"""`--eval_only`: the run's own settings unless told otherwise, the run's own model, any SAEs in one table."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dictionary_learning.formats import find_saes
from dictionary_learning.model_card import model_card


@pytest.fixture
def trained(run, tmp_path):
    assert run("--architectures", "top_k", "standard", "--max_norm_multiple", 5) == 0
    return find_saes(tmp_path)


def results(path: Path, name: str = "eval_results.json") -> dict:
    return json.loads((path / name).read_text())


def run_bare(*flags) -> int:
    """Without the flags of the small run: what is not given here comes from run.json."""
    import demo

    return demo.main(["--device", "cpu", *map(str, flags)])


def test_a_run_is_evaluated_as_its_run_json_says(trained, capsys):
    before = [results(path) for path in trained]
    assert run_bare("--eval_only", trained[0].parents[1]) == 0
    assert [results(path) for path in trained] == before
    assert "other settings" not in capsys.readouterr().err


def test_results_under_other_settings_go_to_another_file_and_are_named(trained, capsys):
    before, files = results(trained[0]), set(trained[0].iterdir())
    assert run_bare("--eval_only", trained[0], "--context_length", 16, "--no-mask") == 0
    error = capsys.readouterr().err
    assert "context_length 32 -> 16" in error and "mask True -> False" in error
    assert results(trained[0]) == before
    (new,) = set(trained[0].iterdir()) - files
    assert new.name in error and results(trained[0], new.name)["hyperparameters"]["context_length"] == 16
    assert run_bare("--eval_only", trained[0], "--context_length", 16, "--no-mask") == 0
    assert len(set(trained[0].iterdir()) - files) == 1


def test_a_model_of_the_same_last_name_is_another_model(command, tiny_model_folder, tmp_path, capsys):
    import demo

    models = [tmp_path / run / "final" for run in ("run_a", "run_b")]
    for i, folder in enumerate(models):
        shutil.copytree(tiny_model_folder, folder)
        if i:
            from safetensors.torch import load_file, save_file

            weights = {name: tensor + 0.01 for name, tensor in load_file(folder / "model.safetensors").items()}
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    flags = ["--save_dir", tmp_path / "saes", "--architectures", "top_k", "--no_eval"]
    assert demo.main(command("--model_name", models[0], *flags)) == 0
    (path,) = find_saes(tmp_path / "saes")
    trainer = json.loads((path / "config.json").read_text())["trainer"]
    assert trainer["lm_identity"]["path"] == str(models[0].resolve()) and trainer["lm_revision"] is None
    assert run_bare("--eval_only", path, "--model_name", models[1]) == 2
    assert "--any_model" in capsys.readouterr().err and not (path / "eval_results.json").exists()
    assert run_bare("--eval_only", path) == 0
    # moved, it is the same model still
    models[0].rename(tmp_path / "elsewhere")
    assert run_bare("--eval_only", path, "--model_name", tmp_path / "elsewhere") == 0
    assert run_bare("--eval_only", path, "--model_name", models[1], "--any_model") == 0


def test_a_saelens_folder_is_evaluated(trained, tmp_path, tiny_model_folder, capsys):
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("cfg.json", "sae_weights.safetensors"):
        shutil.copy(trained[1] / name, alone / name)
    assert run_bare("--eval_only", alone, "--dataset", results(trained[1])["hyperparameters"]["dataset"],
                    "--eval_num_inputs", 6) == 0, capsys.readouterr().err  # fmt: skip
    assert results(alone)["l0"] is not None
    assert "architecture" in capsys.readouterr().out


def test_one_sae_that_cannot_be_evaluated_stops_no_other(trained, tmp_path, capsys):
    for i, change in enumerate(
        [{"buffer": None}, {"buffer": {}}, {"trainer": {"layer": None}}, {"trainer": {"lm_name": None}}]
    ):
        copy = tmp_path / "more" / f"trainer_{i}"
        shutil.copytree(trained[0], copy)
        config = json.loads((copy / "config.json").read_text())
        config["buffer"] = change.get("buffer", config["buffer"])
        config["trainer"] |= change.get("trainer", {})
        (copy / "config.json").write_text(json.dumps(config))
    dataset = results(trained[0])["hyperparameters"]["dataset"]
    flags = ("--dataset", dataset, "--eval_num_inputs", 6, "--context_length", 32)
    code = run_bare("--eval_only", tmp_path / "more", *flags)
    error = capsys.readouterr().err
    assert code == 0, error
    assert error.count("not evaluated") == 2
    assert "which layer it reads" in error and "--model_name" in error and "None" not in error


def test_several_runs_are_one_table(trained, run, tmp_path, capsys):
    assert run("--save_dir", tmp_path / "other", "--architectures", "gated", "--no_eval") == 0
    (other,) = find_saes(tmp_path / "other")
    capsys.readouterr()
    assert run_bare("--eval_only", trained[0], trained[1], other) == 0
    head, *rows = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith("plot")]
    assert head.split()[0] == "SAE" and len(rows) == 3
    assert {row.split()[0] for row in rows} == {str(trained[0]), str(trained[1]), str(other)}


@pytest.mark.parametrize(
    "name, value",
    [
        *[("context_length", value) for value in ("32", None, 1.5, True)],
        *[("eval_num_inputs", 0), ("mask", "yes"), ("mask", None), ("random_seeds", 0), ("random_seeds", [])],
        *[("dtype", "float64"), ("dtype", 32), ("eval_dataset", 5), ("chat_fraction", "a tenth"), ("model_name", None)],
        *[
            ("eval_text_column", ["text"]),
            ("llm_batch_size", None),
            ("eval_batch_size", "all"),
            ("quantization", "2bit"),
        ],
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(name, value, trained, capsys):
    path = trained[0].parents[1] / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"settings": record["settings"] | {name: value}}))
    assert run_bare("--eval_only", path.parent) == 2
    assert f"{name} {value!r}" in capsys.readouterr().err


NO_RUNS = ["", "[1]", "{}", '{"settings": null}', '{"settings": [1]}', '{"settings": {', '{"settings": {}}']


@pytest.mark.parametrize("content", NO_RUNS)
def test_a_damaged_run_stops_no_other(content, trained, run, tmp_path, capsys):
    assert run("--save_dir", tmp_path / "other", "--architectures", "gated", "--no_eval") == 0
    (other,) = find_saes(tmp_path / "other")
    (trained[0].parents[1] / "run.json").write_text(content)
    capsys.readouterr()
    assert run_bare("--eval_only", trained[0], other) == 0
    told = capsys.readouterr()
    assert "run.json" in told.err and "gated" in told.out


@pytest.mark.parametrize(
    "name, value", [*[("changes", value) for value in (3, [3], [{"dataset": 3}])], ("ended_early", 3)]
)
def test_a_record_that_cannot_be_is_one_sentence(name, value, trained, run, capsys):
    path = trained[0].parents[1] / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    assert run_bare("--eval_only", path.parent) == 2 and "run.json does not tell" in capsys.readouterr().err
    assert run("--architectures", "top_k", "standard", "--max_norm_multiple", 5, "--resume") == 2
    assert "run.json does not tell" in capsys.readouterr().err


@pytest.mark.parametrize(
    "part, value",
    [
        *[("buffer", {"median_norm": value, "max_norm_multiple": 10.0}) for value in ("x", -1.0, [1])],
        *[("buffer", {"median_norm": 1.0}), ("buffer", {"mask": "yes"}), ("buffer", 3), ("source", [1])],
    ],
)
def test_a_config_that_says_what_cannot_be_stops_no_other(part, value, trained, capsys):
    path = trained[0] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: value}))
    capsys.readouterr()
    assert run_bare("--eval_only", trained[0], trained[1]) == 0
    assert f"not evaluated: {trained[0]}" in capsys.readouterr().err


def corpus(path: Path, word: str, n: int = 120) -> Path:
    rows = [{"text": " ".join(f"{word}{i * j % 97}" for j in range(1, 40))} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_whose_training_text_is_gone_is_evaluated_on_its_evaluation_text(run, tmp_path, capsys):
    train, held = corpus(tmp_path / "train.jsonl", "a"), corpus(tmp_path / "eval.jsonl", "b")
    assert run("--architectures", "top_k", "--dataset", train, "--eval_dataset", held) == 0
    (path,) = find_saes(tmp_path)
    before = results(path)
    train.rename(tmp_path / "moved.jsonl")
    assert run_bare("--eval_only", path) == 0 and results(path) == before
    other = corpus(tmp_path / "other.jsonl", "c")
    capsys.readouterr()
    assert run_bare("--eval_only", path, "--eval_dataset", other) == 2
    assert "say where it is with --dataset" in capsys.readouterr().err
    assert run_bare("--eval_only", path, "--eval_dataset", other, "--dataset", tmp_path / "moved.jsonl") == 0


def test_what_is_held_out_stays_so_where_the_training_text_is_gone(run, tmp_path):
    train = corpus(tmp_path / "train.jsonl", "a", 400)
    held = tmp_path / "copy.jsonl"
    held.write_bytes(train.read_bytes())
    assert run("--architectures", "top_k", "--dataset", train, "--eval_dataset", held) == 0
    (path,) = find_saes(tmp_path)
    before = results(path)
    train.unlink()
    assert run_bare("--eval_only", path) == 0 and results(path) == before
    assert before["hyperparameters"]["held_out"]


def test_every_text_that_a_run_was_resumed_with_is_held_out(run, tmp_path, no_estimate):
    first, second = corpus(tmp_path / "first.jsonl", "a"), corpus(tmp_path / "second.jsonl", "b")
    held = corpus(tmp_path / "eval.jsonl", "c")
    flags = ("--architectures", "top_k", "--num_tokens", 40_000, "--eval_dataset", held)
    assert run(*flags, "--dataset", first) == 3
    assert run(*flags, "--dataset", second, "--resume", "--epochs", 9) == 0
    (path,) = find_saes(tmp_path)
    for text, is_held_out in ((first, True), (second, True), (held, False)):
        assert run_bare("--eval_only", path, "--eval_dataset", text, "--eval_num_inputs", 3) == 0
        newest = max(path.glob("eval_results*.json"), key=lambda file: file.stat().st_mtime_ns)
        assert results(path, newest.name)["hyperparameters"]["held_out"] is is_held_out


def test_training_alone_needs_no_evaluation_text(run, tmp_path, capsys):
    empty = tmp_path / "eval.jsonl"
    empty.write_text("\n")
    assert run("--architectures", "top_k", "--eval_dataset", empty, "--no_eval") == 0
    assert run("--architectures", "top_k", "--eval_dataset", empty, "--overwrite") == 2


def test_an_sae_may_be_named_twice_and_by_its_weights(trained, capsys):
    before = results(trained[0])
    (trained[0] / "eval_results.json").unlink()
    names = [trained[0].parents[1], f"{trained[0]}/", trained[0] / "ae.pt", trained[0] / "sae_weights.safetensors"]
    assert run_bare("--eval_only", *names) == 0 and results(trained[0]) == before
    lines = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith("plot")]
    assert len(lines) == 1 + len(trained)
    (trained[0] / "eval_results.json").unlink()
    assert run_bare("--eval_only", trained[0] / "ae.pt") == 0 and results(trained[0]) == before


def test_saes_that_look_alike_in_the_table_are_named(trained, tmp_path, capsys):
    flags = ["--any_model", "--model_name", json.loads((trained[0] / "config.json").read_text())["trainer"]["lm_name"]]
    text = json.loads((trained[0].parents[1] / "run.json").read_text())["settings"]["dataset"]
    copies = [shutil.copytree(trained[0], tmp_path / name) for name in ("one", "two")]
    capsys.readouterr()
    assert run_bare("--eval_only", *copies, *flags, "--dataset", text, "--eval_num_inputs", 3) == 0
    out = capsys.readouterr().out
    assert all(str(path) in out for path in copies)


def test_an_empty_folder_is_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run_bare("--eval_only", tmp_path / "empty") == 2
    assert str(tmp_path / "empty") in capsys.readouterr().err


@pytest.fixture
def no_estimate(monkeypatch):
    """Text that is far too little is refused before training; here it is to end in the middle of it."""
    monkeypatch.setattr("dictionary_learning.run.check_text", lambda plan: None)


def test_a_run_that_ends_early_is_finished_marked_and_goes_on(run, tmp_path, capsys, no_estimate):
    flags = ("--architectures", "top_k", "standard", "--num_tokens", 40_000)
    assert run(*flags) == 3
    told = capsys.readouterr()
    assert "text ended" in told.err and "--resume" in told.err and "ended early" in told.out
    saes = find_saes(tmp_path)
    record = json.loads((tmp_path / saes[0].parents[1] / "run.json").read_text())
    assert not record["trained"] and record["ended_early"]["tokens"] < 40_000
    before = []
    for path in saes:
        assert json.loads((path / "config.json").read_text())["trainer"]["ended_early"]["step"] > 0
        assert results(path)["l0"] is not None
        before.append(torch.load(path / "ae.pt", weights_only=True))
    card = model_card(saes[0].parents[1], "alice/saes")
    assert card is not None and card.count("steps: the text ended.") == len(saes)
    assert run(*flags, "--resume", "--no_eval") == 3  # no more text, so as before
    for path, state in zip(saes, before, strict=True):
        again = torch.load(path / "ae.pt", weights_only=True)
        assert all(again[name].equal(state[name]) for name in state)
    assert run(*flags, "--resume", "--epochs", 3) == 0
    record = json.loads((tmp_path / saes[0].parents[1] / "run.json").read_text())
    assert record["trained"] and "ended_early" not in record and record["settings"]["epochs"] == 3
    assert record["changes"] == [{"epochs": [1, 3]}]
    for path in saes:
        config = json.loads((path / "config.json").read_text())
        assert "ended_early" not in config["trainer"]
        steps = [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps)) and steps[-1] == 799


def test_a_run_that_ended_early_goes_on_with_other_text(run, text_file, tmp_path, no_estimate):
    flags = ("--architectures", "top_k", "--num_tokens", 40_000, "--no_eval")
    assert run(*flags) == 3
    more = tmp_path / "more.jsonl"
    more.write_text(text_file.read_text().replace("word", "term"))
    assert run(*flags, "--resume", "--dataset", more) == 0
    (path,) = find_saes(tmp_path)
    assert json.loads((path.parents[1] / "run.json").read_text())["settings"]["dataset"] == str(more)


@pytest.mark.parametrize("in_a_file_of_its_own", [False, True])
def test_a_run_that_ended_early_goes_on_with_what_is_added(in_a_file_of_its_own, run, text_file, tmp_path, no_estimate):
    texts = tmp_path / "texts"
    texts.mkdir()
    rows = text_file.read_text()
    (texts / "a.jsonl").write_text(rows)
    flags = ("--architectures", "top_k", "--num_tokens", 40_000, "--no_eval", "--dataset", texts)
    assert run(*flags) == 3
    more = rows.replace("word", "term") * 3
    (texts / ("b.jsonl" if in_a_file_of_its_own else "a.jsonl")).write_text(
        more if in_a_file_of_its_own else rows + more
    )
    assert run(*flags, "--resume") == 0
    (path,) = find_saes(tmp_path)
    assert json.loads((path.parents[1] / "run.json").read_text())["rows"] == 4 * rows.count("\n")


def test_other_text_is_needed_for_the_tokens_that_are_left_alone(run, text_file, tmp_path, monkeypatch, capsys):
    flags = ("--architectures", "top_k", "--num_tokens", 40_000, "--no_eval")
    with monkeypatch.context() as patched:
        patched.setattr("dictionary_learning.run.check_text", lambda plan: None)
        assert run(*flags) == 3
    (path,) = find_saes(tmp_path)
    record = json.loads((path.parents[1] / "run.json").read_text())
    assert 10_000 < record["ended_early"]["tokens"] < 36_000
    more, few = tmp_path / "more.jsonl", tmp_path / "few.jsonl"
    few.write_text("".join(text_file.read_text().replace("word", "tiny").splitlines(True)[:3]))
    more.write_text(text_file.read_text().replace("word", "term"))
    capsys.readouterr()
    assert run(*flags, "--resume", "--dataset", few) == 2
    error = capsys.readouterr().err
    assert "--epochs" in error and "--num_tokens" not in error
    assert run(*flags, "--resume", "--dataset", more) == 0


def test_a_run_begun_before_a_setting_existed_is_resumed(run, tmp_path, capsys):
    flags = ("--architectures", "top_k", "--no_eval")
    assert run(*flags) == 0
    (path,) = find_saes(tmp_path)
    record = path.parents[1] / "run.json"
    content = json.loads(record.read_text())
    for name in ("kernels", "shuffle", "prepend_bos", "skip_damaged"):
        del content["settings"][name]
    record.write_text(json.dumps(content))
    assert run(*flags, "--resume", "--log_steps", 5, "--eval_num_inputs", 3) == 0
    assert run(*flags, "--resume", "--no-prepend_bos") == 2
    assert "prepend_bos was True, is False" in capsys.readouterr().err


def test_a_state_of_an_older_version_is_resumed(run, text_file, tmp_path, no_estimate):
    """Then it had no text_settings, of files only the place, no marks, and nothing of columns and damaged files."""
    from dictionary_learning.state import load_state, save_state

    flags = ("--architectures", "top_k", "--num_tokens", 40_000, "--no_eval")
    weights = []
    for name in ("now", "then"):
        assert run(*flags, "--save_dir", tmp_path / name) == 3
        (path,) = find_saes(tmp_path / name)
        if name == "then":
            folder = path.parents[1] / "resume"
            state = dict(load_state(folder) or {})
            del state["text_settings"]
            contexts = state["text.0"]["batches"]["contexts"]
            for missing in ("n_seen", "found_column"):
                del contexts["documents"][missing]
            files = contexts["documents"]["rows"].pop("rows")
            del files["damaged"], contexts["marks"]
            contexts["documents"]["rows"] = files
            shutil.rmtree(folder)
            save_state(folder, state["loop"]["step"], state)
        assert run(*flags, "--save_dir", tmp_path / name, "--resume", "--epochs", 3) == 0
        weights.append(torch.load(path / "ae.pt", weights_only=True))
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_a_failing_stage_stops_no_later_one(run, tmp_path, monkeypatch, capsys):
    calls = []

    def fail(*_args, **_options):
        raise ValueError("no page today")

    monkeypatch.setattr("dictionary_learning.report.write_reports", fail)
    monkeypatch.setattr("dictionary_learning.plotting.plot_pareto", fail)
    monkeypatch.setattr("dictionary_learning.hub.check_repo", lambda *_, **__: None)
    monkeypatch.setattr("dictionary_learning.hub.upload_run", lambda folder, *_, **__: calls.append(folder) or "there")
    assert run("--architectures", "top_k", "--report", "--hf_repo_id", "user/repo") == 2
    error = capsys.readouterr().err
    assert "python -m dictionary_learning.report" in error and "python demo.py --eval_only" in error
    assert len(calls) == 1


def test_zeros_of_seeds_and_schedules_are_values(run, tmp_path):
    flags = ("--random_seeds", 0, 1, "--warmup_steps", 0, "--sparsity_warmup_steps", 0, "--threshold_start_step", 0)
    flags += ("--anneal_start", 0, "--k_anneal_steps", 0, "--resample_steps", 0, "--backup_steps", 0, "--layers", 0)
    assert run("--architectures", "top_k", "p_anneal", "--no_eval", *flags) == 0
    assert len(find_saes(tmp_path)) == 4


def test_one_sae_in_seven_families_measures_the_same(run, tmp_path, tiny_model_folder, text_file, capsys):
    """A trained BatchTopK SAE, written by each family's definition: the same numbers in every row."""
    import math

    import numpy as np
    from safetensors.torch import save_file

    assert run("--save_dir", tmp_path / "run", "--architectures", "batch_top_k", "--layers", 1) == 0
    (own,) = find_saes(tmp_path / "run")
    state = torch.load(own / "ae.pt", weights_only=True)
    W_enc, W_dec, b_dec = state["encoder.weight"].T, state["decoder.weight"].T, state["b_dec"]
    b_enc, theta = state["encoder.bias"] - b_dec @ W_enc, state["threshold"]
    plain = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "threshold": theta.expand(len(b_enc))}
    D, norm = len(W_enc), 3.0
    s = math.sqrt(D) / norm
    # of activations scaled by s, with features s times as large
    scaled = {
        "encoder.weight": W_enc.T,
        "encoder.bias": s * b_enc,
        "decoder.weight": W_dec.T,
        "decoder.bias": s * b_dec,
    }

    def write(name: str, file: str, tensors: dict, **configs) -> None:
        path = tmp_path / "others" / name / file
        path.parent.mkdir(parents=True)
        if path.suffix == ".npz":
            np.savez(path, **{key: value.numpy() for key, value in tensors.items()})
        else:
            save_file({key: value.contiguous() for key, value in tensors.items()}, path)
        for config, content in configs.items():
            (tmp_path / "others" / name / f"{config}.json").write_text(json.dumps(content))

    write("scope/layer_1/average_l0_4", "params.npz", plain)
    write("resid_post/layer_1_width", "params.safetensors", {name.lower(): value for name, value in plain.items()})
    norms = {"in": norm, "out": norm}
    cfg = {"hook_point_in": "blocks.1.hook_resid_post", "dataset_average_activation_norm": norms}
    write("X-L1R-8x", "checkpoints/final.safetensors", scaled, hyperparams=cfg | {"jump_relu_threshold": float(theta)})
    write(
        "L1R",
        "sae_weights.safetensors",
        scaled | {"log_jumprelu_threshold": (s * plain["threshold"]).log()},
        config=cfg,
    )
    stored = {"W_E": W_enc, "b_E": b_enc, "W_D": W_dec, "b_D": b_dec}
    stored["activation_function.log_jumprelu_threshold"] = (plain["threshold"] * W_dec.norm(dim=1)).log()
    write("amber", "sae_weights.safetensors", stored, config=cfg | {"sae_type": "sae", "act_fn": "jumprelu"})
    lens = tmp_path / "others" / "lens"
    lens.mkdir()
    for name in ("cfg.json", "sae_weights.safetensors"):
        shutil.copy(own / name, lens / name)

    saes = [own, *find_saes(tmp_path / "others")]
    flags = ("--model_name", tiny_model_folder, "--any_model", "--dataset", text_file, "--eval_dataset", text_file)
    flags += ("--eval_num_inputs", 6, "--context_length", 32, "--no-mask", "--save_dir", tmp_path)
    capsys.readouterr()
    assert run_bare("--eval_only", *saes, *flags) == 0, capsys.readouterr().err
    head, *rows = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith("plot")]
    assert len(rows) == 7
    for column in ("L0", "loss recovered", "variance explained"):
        start = head.index(column)
        assert len({row[start : start + 6] for row in rows}) == 1, "\n".join([head, *rows])
