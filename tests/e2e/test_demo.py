"""`demo.py` from flags to folder: what it writes, what does not change a weight, what it refuses."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from demo_config import ARCHITECTURES
from dictionary_learning.evaluation import REFERENCE_METRICS
from dictionary_learning.files import read_jsonl
from dictionary_learning.formats import find_saes, load_dictionary

DEMO = Path(__file__).parents[2] / "demo.py"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "ae.pt", weights_only=True)


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].equal(theirs[name]), (a, name)


def finite(value) -> bool:
    return all(map(finite, value.values())) if isinstance(value, dict) else (
        value is None or not isinstance(value, float) or math.isfinite(value)
    )  # fmt: skip


def test_all_architectures_on_two_layers_with_two_widths(run, tmp_path):
    code = run("--architectures", *ARCHITECTURES, "--layers", 1, 3, "--dictionary_widths", 32, 64, "--save_checkpoints")
    assert code == 0
    (folder,) = tmp_path.iterdir()
    saes = find_saes(folder)
    assert len(saes) == 2 * 2 * len(ARCHITECTURES)
    assert [path.parent.name for path in saes[:16]] == ["resid_post_layer_1"] * 16
    assert [path.name for path in saes[:16]] == [f"trainer_{i}" for i in range(16)]
    order = [json.loads((path / "config.json").read_text())["trainer"]["trainer_class"] for path in saes[:16:2]]
    assert order == [row.trainer for row in ARCHITECTURES.values()]
    for path in saes:
        names = {file.name for file in path.iterdir()}
        assert {
            "config.json",
            "ae.pt",
            "cfg.json",
            "sae_weights.safetensors",
            "eval_results.json",
            "metrics.jsonl",
        } <= names
        assert {f.name for f in (path / "checkpoints").iterdir()} >= {"ae_0.pt", "ae_18.pt"}
        config = json.loads((path / "config.json").read_text())
        assert config["buffer"]["ctx_len"] == 32 and config["trainer"]["norm_factor"] > 0
        results = json.loads((path / "eval_results.json").read_text())
        assert list(results)[: len(REFERENCE_METRICS) + 1] == [*REFERENCE_METRICS, "hyperparameters"]
        assert all(results[name] is not None and math.isfinite(results[name]) for name in REFERENCE_METRICS), results
        assert finite(results) and "error" not in results
        steps = [row["step"] for row in read_jsonl(path / "metrics.jsonl")]
        assert steps == [0, 10, 20, 30, 40, 50, 59]
    assert (folder / "pareto.png").stat().st_size > 10_000
    assert json.loads((folder / "run.json").read_text())["trained"] is True
    assert not list(folder.rglob("*.tmp")) and not (folder / "resume").exists()
    names_of_config = [str(path.parent) for path in folder.rglob("config.json")]
    assert sorted(names_of_config) == sorted(map(str, saes))  # SAEBench takes every such file for an SAE


def test_saved_saes_and_checkpoints_take_raw_activations(run, tmp_path, tiny_model_folder):
    """On raw activations a trained SAE has an error far below their norm; with unscaled biases it would not."""
    from dictionary_learning.model import load_model

    assert run("--architectures", "batch_top_k", "--save_checkpoints", "--no_eval", "--num_tokens", 8000) == 0
    (path,) = find_saes(tmp_path)
    ae, config = load_dictionary(path)
    lm = load_model(str(tiny_model_folder))
    tokens_BL = torch.tensor(lm.tokenizer(["word1 word2 word3"])["input_ids"])
    x_LD = lm.activations(tokens_BL, torch.ones_like(tokens_BL), [1])[1][0].float()
    factor = config["trainer"]["norm_factor"]
    assert 0.5 < x_LD.norm(dim=1).mean() / factor < 2
    assert (ae(x_LD) - x_LD).norm() < 0.8 * (x_LD - ae.b_dec).norm()
    first = torch.load(path / "checkpoints" / "ae_0.pt", weights_only=True)
    assert not first["b_dec"].any() and first["threshold"] == -1


def test_nothing_else_changes_a_weight(run, command, tmp_path, monkeypatch):
    """The set of SAEs beside it, logging, W&B, checkpoints, states, evaluation: the same weights to the bit."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    assert run("--save_dir", alone, "--architectures", "batch_top_k", "--no_eval", "--log_steps", 60) == 0
    flags = ["--log_steps", 7, "--save_checkpoints", "--backup_steps", 13, "--use_wandb"]
    assert run("--save_dir", beside, "--architectures", "jump_relu", "batch_top_k", "gated", *flags) == 0
    (one,) = find_saes(alone)
    (other,) = [p for p in find_saes(beside) if "BatchTopK" in (p / "config.json").read_text()]
    assert_same_weights(one, other)


def test_same_command_same_bits(run, tmp_path):
    for name in ("a", "b"):
        assert (
            run("--save_dir", tmp_path / name, "--architectures", "matryoshka_batch_top_k", "standard", "--no_eval")
            == 0
        )
    for one, other in zip(find_saes(tmp_path / "a"), find_saes(tmp_path / "b"), strict=True):
        assert_same_weights(one, other)


def start(arguments: list[str], **options) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(DEMO), *arguments], stderr=subprocess.PIPE, text=True, env=env, **options
    )


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr and process.stderr.read()
        time.sleep(0.02)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, errors = process.communicate(timeout=240)
    return process.returncode, errors


def test_killed_and_interrupted_runs_resume_to_the_same_bits(command, tmp_path):
    """SIGKILL, then SIGTERM, then to the end: as if nothing had happened, and every metric once."""
    flags = ["--architectures", "p_anneal", "batch_top_k", "--no_eval", "--num_tokens", "20000", "--epochs", "20"]
    flags += ["--backup_steps", "25"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    code, errors = finish(start(command("--save_dir", straight, *flags)))
    assert code == 0, errors

    arguments = command("--save_dir", broken, *flags)
    process = start(arguments)
    wait_for(lambda: list(broken.glob("*/resume/state_50")), process)
    process.send_signal(signal.SIGKILL)
    finish(process)
    process = start([*arguments, "--resume"])
    wait_for(lambda: list(broken.glob("*/resume/state_125")), process)
    process.send_signal(signal.SIGTERM)
    code, errors = finish(process)
    assert code == 75 and "--resume" in errors
    code, errors = finish(start([*arguments, "--resume"]))
    assert code == 0, errors

    for one, other in zip(find_saes(straight), find_saes(broken), strict=True):
        assert_same_weights(one, other)
        assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()


def test_resume_before_the_first_state_starts_anew_and_after_the_last_step_trains_nothing(run, tmp_path, monkeypatch):
    from dictionary_learning.training import Loop

    update, flags = Loop._update_all, ("--architectures", "top_k", "--log_steps", 3)
    assert run("--save_dir", tmp_path / "straight", *flags) == 0

    def die(self, x_by_layer):
        if self.step == 12:
            raise RuntimeError("killed")
        update(self, x_by_layer)

    monkeypatch.setattr(Loop, "_update_all", die)
    with pytest.raises(RuntimeError, match="killed"):
        run("--save_dir", tmp_path / "killed", *flags)
    monkeypatch.setattr(Loop, "_update_all", update)
    assert run("--save_dir", tmp_path / "killed", *flags, "--resume") == 0
    (one,), (other,) = find_saes(tmp_path / "straight"), find_saes(tmp_path / "killed")
    assert_same_weights(one, other)
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()

    monkeypatch.setattr("dictionary_learning.run.train", lambda *_: pytest.fail("it is trained already"))
    (other / "eval_results.json").unlink()
    assert run("--save_dir", tmp_path / "killed", *flags, "--resume") == 0
    assert (other / "eval_results.json").exists()


def test_the_number_of_threads_side_by_side_may_change_on_resuming(run, tmp_path, stopped_after, capsys):
    flags = ["--architectures", "batch_top_k", "standard", "top_k", "--no_eval", "--num_tokens", 1500]
    side_by_side = [*flags, "--sae_threads", 2]
    assert run(*side_by_side, "--save_dir", tmp_path / "straight") == 0
    for name, again in {"more": ["--sae_threads", 3], "unsaid": []}.items():
        with stopped_after(12):
            assert run(*side_by_side, "--save_dir", tmp_path / name) == 75
        capsys.readouterr()
        assert run(*flags, "--sae_threads", 1, "--save_dir", tmp_path / name, "--resume") == 2
        assert "sae_threads was 2, is 1." in capsys.readouterr().err  # which would change the last bits
        assert run(*flags, *again, "--save_dir", tmp_path / name, "--resume") == 0
        for one, other in zip(find_saes(tmp_path / "straight"), find_saes(tmp_path / name), strict=True):
            assert_same_weights(one, other)


def test_resume_refuses_other_settings_and_says_which(run, tmp_path, capsys):
    assert run("--architectures", "top_k", "--no_eval") == 0
    assert run("--architectures", "top_k", "--no_eval", "--resume", "--learning_rates", 0.1) == 2
    assert "learning_rates was [0.003], is [0.1]" in capsys.readouterr().err


def test_an_existing_run_is_kept_unless_told_otherwise(run, tmp_path, capsys):
    assert run("--architectures", "top_k", "--no_eval") == 0
    (path,) = find_saes(tmp_path)
    before = weights(path)
    assert run("--architectures", "top_k", "--no_eval") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert all(weights(path)[name].equal(before[name]) for name in before)
    assert run("--architectures", "top_k", "--no_eval", "--overwrite", "--random_seeds", 1) == 0
    assert not weights(path)["encoder.weight"].equal(before["encoder.weight"])


def test_overwrite_does_not_delete_what_is_not_a_run(run, tmp_path, tiny_model_folder, capsys):
    folder = tmp_path / f"{tiny_model_folder.name}_top_k"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    assert run("--architectures", "top_k", "--overwrite") == 2
    assert (folder / "thesis.tex").exists()


def test_dry_run_writes_nothing_and_loads_no_weights(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dictionary_learning.reading.load_model", lambda *a, **k: pytest.fail("weights were loaded"))
    assert run("--architectures", "top_k", "standard", "--dry_run") == 0
    out = capsys.readouterr().out
    assert "2 SAEs" in out and "3,000 tokens = 60 steps of 50" in out and "short run" in out
    assert not list(tmp_path.iterdir())


def test_evaluation_alone_and_a_broken_folder_beside(run, tmp_path, capsys):
    assert run("--architectures", "top_k", "standard", "--no_eval") == 0
    first, second = find_saes(tmp_path)
    (first / "ae.pt").write_bytes((first / "ae.pt").read_bytes()[:100])
    assert run("--eval_only", first.parent.parent) == 0
    assert str(first) in capsys.readouterr().err
    assert not (first / "eval_results.json").exists() and (second / "eval_results.json").exists()


def test_an_sae_is_not_evaluated_on_another_model(run, tmp_path, capsys):
    assert run("--architectures", "top_k", "--no_eval") == 0
    (path,) = find_saes(tmp_path)
    assert run("--model_name", "tiny-python", "--eval_only", path) == 2
    assert "it was trained on" in capsys.readouterr().err and not (path / "eval_results.json").exists()


def test_a_sae_that_blows_up_stops_alone(run, tmp_path, capsys):
    code = run("--architectures", "standard", "top_k", "--standard_penalties", "1e38", 0.05, "--log_steps", 5)
    assert code == 0
    broken, fine, _ = find_saes(tmp_path)
    assert "failure" in json.loads((broken / "config.json").read_text())["trainer"]
    assert all(tensor.isfinite().all() for tensor in weights(broken).values())
    assert "failure" not in json.loads((fine / "config.json").read_text())["trainer"]
    assert len(read_jsonl(fine / "metrics.jsonl")) > len(read_jsonl(broken / "metrics.jsonl"))


def test_out_of_memory_in_a_step_says_what_takes_it_and_which_flags_shrink_it(run, monkeypatch, capsys):
    def update(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("dictionary_learning.trainers.TopKTrainer.update", update)
    assert run("--architectures", "top_k") == 2
    error = capsys.readouterr().err
    assert "activation buffer" in error and "--sae_batch_size" in error


def test_text_that_breaks_off_is_saved_and_resumed(run, tmp_path, monkeypatch, capsys):
    from dictionary_learning.data import FileRows

    flags = ("--architectures", "batch_top_k", "--no_eval", "--num_tokens", 20000, "--epochs", 4)
    monkeypatch.setattr("dictionary_learning.data.contexts.CHUNK_CHARACTERS", 1000)
    assert run("--save_dir", tmp_path / "straight", *flags) == 0
    read, rows = FileRows.__next__, iter(range(60))

    def break_off(self):
        if next(rows, None) is None:
            raise ConnectionError("the network is gone")
        return read(self)

    monkeypatch.setattr("dictionary_learning.run.check_text", lambda plan: None)  # it reads everything once
    monkeypatch.setattr(FileRows, "__next__", break_off)
    assert run("--save_dir", tmp_path / "broken", *flags) == 75
    error = capsys.readouterr().err
    assert "the network is gone" in error and "--resume" in error
    monkeypatch.setattr(FileRows, "__next__", read)
    assert run("--save_dir", tmp_path / "broken", *flags, "--resume") == 0
    (one,), (other,) = find_saes(tmp_path / "straight"), find_saes(tmp_path / "broken")
    assert_same_weights(one, other)


def test_a_disk_that_is_too_small_is_noticed_before_training(run, tmp_path, monkeypatch, capsys):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("dictionary_learning.plan.shutil.disk_usage", lambda _: usage)
    assert run("--architectures", "top_k") == 2
    assert "free" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--model_name", "no/such-model-anywhere"], "no/such-model-anywhere"),
        (["--layers", 9], "0 to 3"),
        (["--layers", 1, 1], "twice"),
        (["--device", "cuda:7"], "cuda:7"),
        (["--device", "toaster"], "toaster"),
        (["--text_column", "body"], "text"),
        (["--dataset", "/nowhere/at/all.jsonl"], "/nowhere/at/all.jsonl"),
        (["--buffer_tokens", 60], "buffer_tokens"),
        (["--num_tokens", 100], "num_tokens"),
        (["--num_tokens", 1_000_000], "--epochs"),
        (["--context_length", 4096], "context_length"),
        (["--target_l0s", 33, "--architectures", "top_k"], "dict_size"),
        (["--architectures", "matryoshka_batch_top_k", "--dictionary_widths", 24], "too small for groups"),
        (["--target_l0s", 33, "--architectures", "jump_relu"], "dict_size"),
        (["--target_l0s", "inf"], "whole numbers"),
        (["--target_l0s", "nan"], "whole numbers"),
        (["--random_seeds", 2**63], "--random_seeds"),
        (["--max_norm_multiple", 0], "--max_norm_multiple"),
        (["--max_norm_multiple", "nan"], "--max_norm_multiple"),
        (["--backup_minutes", "nan"], "--backup_minutes"),
        (["--resume"], "no run to resume"),
        (["--upload_only", "saes"], "hf_repo_id"),
        (["--eval_only", "/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_work_is_one_clear_sentence(run, capsys, flags, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(*(["--architectures", "top_k"] if "--architectures" not in flags else []), *flags) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line


def test_unknown_architecture_and_flag(run, capsys):
    for flags in (["--architectures", "mega_sae"], ["--frobnicate"]):
        with pytest.raises(SystemExit) as stop:
            run(*flags)
        assert stop.value.code == 2
        assert flags[-1] in capsys.readouterr().err


@pytest.mark.parametrize("text", ["abc", "1.5", "nan", "inf", "1e400", "0", "-1", ""])
def test_what_is_no_whole_number_is_said(text, run, capsys):
    with pytest.raises(SystemExit):
        run("--epochs", text)
    assert f"argument --epochs: {text} is not a whole number of at least 1" in capsys.readouterr().err


def test_whole_numbers_are_taken_as_they_are_written():
    import demo

    args = demo.build_parser().parse_args(
        "--num_tokens 5e7 --buffer_tokens 50_000 --random_seeds 9007199254740993".split()
    )
    assert (args.num_tokens, args.buffer_tokens, args.random_seeds) == (50_000_000, 50_000, [2**53 + 1])


@pytest.mark.parametrize("stage", ["evaluate_run", "plot", "open_source"])
def test_sigterm_beside_training_is_said_too(stage, run, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(f"dictionary_learning.run.{stage}", lambda *_: signal.raise_signal(signal.SIGTERM))
        assert run("--architectures", "top_k") == 75
    assert "--resume" in capsys.readouterr().err and signal.getsignal(signal.SIGTERM) is before
    assert run("--architectures", "top_k", "--resume") == 0


def test_an_empty_dataset_is_refused(run, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    assert run("--architectures", "top_k", "--dataset", tmp_path / "empty.jsonl") == 2
    assert "empty.jsonl" in capsys.readouterr().err


def test_help_is_quick_because_it_imports_nothing_heavy():
    code = "import sys; sys.argv = ['demo.py', '--help']\ntry:\n    import demo; demo.main()\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'transformers', 'datasets', 'wandb', 'matplotlib'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=DEMO.parent)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--target_l0s" in done.stdout and "Qwen/Qwen3-8B" in done.stdout
