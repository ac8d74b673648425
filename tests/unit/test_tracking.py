"""W&B: an offline sweep read back from its files, and every way in which W&B can fail."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dictionary_learning.files import append_jsonl
from dictionary_learning.tracking import Tracker, WandbRuns, records

wandb = pytest.importorskip("wandb")

NAMES = [f"TopKTrainer-tiny-resid_post_layer_2_trainer_{i}" for i in range(2)]


def read_offline(folder: Path) -> dict:
    """What one offline run recorded: its settings, its rows in order, its summary, its metric definitions."""
    (path,) = folder.glob("*.wandb")
    run: dict = {"rows": [], "summary": {}, "metrics": {}}
    for record in records(path):
        match record.WhichOneof("record_type"):
            case "run":
                run |= {"id": record.run.run_id, "name": record.run.display_name, "group": record.run.run_group}
                run |= {"project": record.run.project, "entity": record.run.entity}
                run["config"] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            case "metric":
                run["metrics"][record.metric.name or record.metric.glob_name] = record.metric.step_metric
            case "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                run["rows"].append((record.history.step.num, row))
            case "summary":
                for item in record.summary.update:
                    run["summary"][item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return run


def offline_runs(folder: Path) -> list[dict]:
    wandb.teardown()  # a finished run's file is only then sure to be written
    return sorted(map(read_offline, (folder / "wandb").glob("offline-run-*")), key=lambda run: run.get("name", ""))


@pytest.fixture(autouse=True)
def own_wandb(monkeypatch, tmp_path):
    """No login, no settings and no network of the machine that runs the tests."""
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield
    wandb.teardown()


def sweep(folder: Path, **settings) -> WandbRuns:
    configs = [{"trainer_class": "TopKTrainer", "k": k, "group_sizes": [1, 2]} for k in (8, 16)]
    return WandbRuns(NAMES, configs, project="sweeps", group="run_folder", folder=folder, **settings)


def row(step: int, l0: float) -> dict:
    return {"step": step, "tokens": 64 * step, "loss": 1 / (step + 1), "l0": l0, "frac_variance_explained": 0.5}


def test_an_offline_sweep_reads_back(tmp_path):
    runs = sweep(tmp_path, entity="team")
    for step in (0, 100, 200):
        for i in range(2):
            runs.log(i, row(step, l0=8.0 * (i + 1)), step)
    for i in range(2):
        runs.summary(i, {"l0": 9.0 + i, "frac_recovered": 0.9, "hyperparameters": {"n_inputs": 4}, "cossim": None})
    (sentence,) = runs.finish()
    assert sentence.endswith(f"wandb sync --include-online {tmp_path / 'wandb'}")

    read = offline_runs(tmp_path)
    assert [run["name"] for run in read] == NAMES
    for i, run in enumerate(read):
        assert run["id"] == runs.ids[i]
        assert (run["project"], run["entity"], run["group"]) == ("sweeps", "team", "run_folder")
        assert run["config"]["k"] == 8 * (i + 1) and run["config"]["group_sizes"] == [1, 2]
        assert [step for step, _ in run["rows"]] == [0, 100, 200]
        for step, logged in run["rows"]:
            assert logged.items() >= row(step, l0=8.0 * (i + 1)).items()
        assert run["metrics"]["*"] == "step" and "tokens" in run["metrics"]
        assert run["summary"]["eval/l0"] == 9.0 + i and run["summary"]["eval/frac_recovered"] == 0.9
        assert run["summary"]["eval/cossim"] is None
        assert run["summary"]["l0"] == 8.0 * (i + 1)  # training's last value stays beside it


def test_a_resumed_sweep_goes_on_in_the_same_runs(tmp_path):
    first = sweep(tmp_path)
    first.finish()
    second = sweep(tmp_path, ids=first.ids)
    second.log(0, row(300, l0=1.0), 300)
    second.finish()
    assert second.ids == first.ids
    assert sorted(run["id"] for run in offline_runs(tmp_path)) == sorted(first.ids * 2)


def rows_of(folder: Path, name: str) -> list[tuple[int, dict]]:
    """What all offline files of a run have, without what W&B adds."""
    rows = [row for run in offline_runs(folder) if run.get("name") == name for row in run["rows"]]
    return [(step, {key: value for key, value in logged.items() if key[0] != "_"}) for step, logged in rows]


@pytest.mark.parametrize("kept", [0.0, 0.4, 0.97, 1.0])
def test_rows_that_a_killed_process_has_not_written_are_sent_once(tmp_path, kept):
    """The file of W&B ends anywhere, and the process had gone on behind the state that it is resumed from."""
    histories = [tmp_path / f"metrics_{i}.jsonl" for i in range(2)]
    steps = list(range(0, 20_000, 100))  # some 60 KB: W&B writes 32 KiB at a time
    first = sweep(tmp_path)
    for i in range(2):
        for step in steps:
            append_jsonl(histories[i], row(step, l0=float(i)))
            first.log(i, row(step, l0=float(i)), step)
    first.finish()
    wandb.teardown()
    for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb"):
        path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with histories[0].open("a") as file:
        file.write('{"step": 20000, "lo')

    second = sweep(tmp_path, ids=first.ids, histories=histories)
    for step in (19_900, 20_000, 20_100):  # resumed a row before the end
        second.log(1, row(step, l0=1.0), step)
    second.finish()
    assert sorted(rows_of(tmp_path, NAMES[0])) == [(step, row(step, l0=0.0)) for step in steps]
    assert sorted(rows_of(tmp_path, NAMES[1])) == [(step, row(step, l0=1.0)) for step in [*steps, 20_000, 20_100]]


def test_rows_of_a_process_that_was_killed_are_sent_once(tmp_path):
    program = f"""
import os, signal, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
import test_tracking
from dictionary_learning.files import append_jsonl
runs = test_tracking.sweep(Path({str(tmp_path)!r}), ids=["aaaa1111", "bbbb2222"])
for step in range(50):
    append_jsonl({str(tmp_path / "metrics.jsonl")!r}, test_tracking.row(step, l0=2.0))
    runs.log(0, test_tracking.row(step, l0=2.0), step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent)
    assert killed.returncode == -signal.SIGKILL
    histories = [tmp_path / "metrics.jsonl", tmp_path / "none.jsonl"]
    sweep(tmp_path, ids=["aaaa1111", "bbbb2222"], histories=histories).finish()
    assert sorted(rows_of(tmp_path, NAMES[0])) == [(step, row(step, l0=2.0)) for step in range(50)]


def test_an_online_run_goes_on_where_the_server_stands(tmp_path, monkeypatch):
    class Run:
        id, offline, starting_step = "aaaa1111", False, 3

        def __init__(self):
            self.steps = []

        def log(self, metrics, step):
            assert metrics == row(step, l0=1.0)
            self.steps.append(step)

        def define_metric(self, *_, **__):
            pass

        def finish(self):
            pass

    made = []
    monkeypatch.setattr(wandb, "init", lambda **_: made.append(Run()) or made[-1])
    for step in range(5):
        append_jsonl(tmp_path / "metrics.jsonl", row(step, l0=1.0))
    runs = WandbRuns(NAMES[:1], [{}], project="p", group="g", folder=tmp_path, ids=["aaaa1111"],
                     histories=[tmp_path / "metrics.jsonl"])  # fmt: skip
    for step in (4, 5):
        runs.log(0, row(step, l0=1.0), step)
    assert made[0].steps == [3, 4, 5] and runs.finish() == []


@pytest.mark.parametrize("key", [None, "k" * 40], ids=["no login", "no server"])
def test_without_login_or_server_the_runs_are_offline_and_the_end_says_so(tmp_path, monkeypatch, key):
    monkeypatch.setenv("WANDB_MODE", "online")
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    runs = sweep(tmp_path)
    runs.log(1, row(100, l0=3.0), 100)
    problem, command = runs.finish()
    assert problem.startswith("W&B cannot be reached") and "wandb sync" in command
    assert "k" * 40 not in problem + command
    assert [step for step, _ in offline_runs(tmp_path)[1]["rows"]] == [100]


def broken(*_, **__):
    raise RuntimeError(f"boom with {'s' * 40}")


def test_no_failure_of_wandb_reaches_training(tmp_path, monkeypatch):
    runs = sweep(tmp_path)
    monkeypatch.setattr(wandb.Run, "log", broken)
    runs.log(0, row(0, l0=1.0), 0)
    runs.log(0, row(100, l0=1.0), 100)  # given up, not tried again
    runs.summary(1, {"l0": 2.0})
    sentences = runs.finish()
    assert len(sentences) == 2 and "boom" in sentences[0]
    assert offline_runs(tmp_path)[1]["summary"]["eval/l0"] == 2.0


def test_runs_that_cannot_even_be_recorded_are_named_once_and_no_key_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s" * 40)
    monkeypatch.setattr(wandb, "init", broken)
    runs = sweep(tmp_path)
    runs.log(0, row(0, l0=1.0), 0)
    runs.summary(0, {"l0": 1.0})
    (sentence,) = runs.finish()
    assert "boom with ***" in sentence
    assert len(runs.ids) == 2


def test_a_refused_start_is_recorded_offline_instead(tmp_path, monkeypatch):
    real = wandb.init

    def refuse_online(*args, **kwargs):
        return real(*args, **kwargs) if kwargs["mode"] == "offline" else broken()

    monkeypatch.setattr(wandb, "init", refuse_online)
    runs = sweep(tmp_path)
    runs.log(0, row(0, l0=1.0), 0)
    assert len(runs.finish()) == 2
    assert len(offline_runs(tmp_path)) == 2


def test_what_is_still_unsent_at_the_end_is_not_waited_for_run_by_run(tmp_path, monkeypatch):
    runs = sweep(tmp_path)
    finished = []

    def times_out(run, *_):
        finished.append(run)
        raise TimeoutError

    real = wandb.Run.finish
    monkeypatch.setattr(wandb.Run, "finish", times_out)
    assert "wandb sync" in runs.finish()[-1]
    assert len(finished) == 1
    monkeypatch.setattr(wandb.Run, "finish", real)


def test_the_tracker_of_a_sweep_without_wandb_does_nothing():
    tracker = Tracker()
    tracker.log(0, {"loss": 1.0}, 0)
    tracker.summary(0, {"l0": 1.0})
    assert tracker.finish() == [] and tracker.ids == []
