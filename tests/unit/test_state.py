"""The state of a run: the newest whole one comes back, and none of it is code."""

import os
import pickle
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from mutations import mutations
from saes import Malice

from dictionary_learning import state as states
from dictionary_learning.files import size_and_sum, write_json
from dictionary_learning.state import load_state, save_state

KILLED = """
import sys, torch
from dictionary_learning.state import save_state
step = 0
while True:
    step += 1
    save_state("resume", step, {"x": torch.full((200_000,), float(step))})
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_state(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    said = [5, *map(int, process.stdout.read().split())]
    process.wait()
    process.stdout.close()
    state = load_state(tmp_path / "resume")
    assert state is not None
    step = int(state.path.name.removeprefix("state_"))
    assert step >= said[-1] and torch.equal(state["x"], torch.full((200_000,), float(step)))


def state_of(step: int) -> dict:
    plain = {"list": [1, (2.5, None)], "text": "a", "rng": torch.Generator().get_state(), "flag": True, 3: {0: "b"}}
    return {"loop": {"step": step}, "trainers.0": {"w": torch.full((3, 4), float(step))}, "text.0": plain}


def assert_whole(state) -> int:
    """The step of a state, all of whose entries are as they were written."""
    assert state is not None
    step, expected = state["loop"]["step"], state_of(0)["text.0"]
    assert set(state) == {"loop", "trainers.0", "text.0"} and state.path.name == f"state_{step}"
    assert torch.equal(state["trainers.0"]["w"], torch.full((3, 4), float(step)))
    plain = state["text.0"]
    assert torch.equal(plain.pop("rng"), expected.pop("rng")) and plain == expected
    return step


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_states_are_kept_and_come_back(tmp_path):
    assert load_state(tmp_path / "resume") is None
    for step in (900, 1000, 1100):
        save_state(tmp_path / "resume", step, state_of(step))
    assert names(tmp_path / "resume") == ["state_1000", "state_1100"]
    assert assert_whole(load_state(tmp_path / "resume")) == 1100


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", states.CHECKSUMS])
def test_a_torn_state_is_passed_over_aloud_and_then_removed(name, tmp_path):
    for step in (1, 2):
        save_state(tmp_path, step, state_of(step))
    file = tmp_path / "state_2" / name
    content = file.read_bytes()
    for damaged in mutations(content, random.Random(0)):
        file.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step = assert_whole(load_state(tmp_path))
        assert step == 2 or "state_2 is damaged" in str(caught[0].message)
    file.unlink()
    (tmp_path / ".state_2.tmp").mkdir()
    (tmp_path / ".state_2.tmp" / "__0_0.distcp").write_bytes(b"killed while writing")
    with pytest.warns(UserWarning, match="state_2 is damaged"):
        assert assert_whole(load_state(tmp_path)) == 1
    save_state(tmp_path, 2, state_of(2))
    assert names(tmp_path) == ["state_1", "state_2"]
    assert assert_whole(load_state(tmp_path)) == 2


def test_a_state_that_is_there_already_is_not_given_up_for_a_new_one(tmp_path, monkeypatch):
    """A run that is stopped at the step where it was resumed."""
    save_state(tmp_path, 7, state_of(7))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    save_state(tmp_path, 7, state_of(7))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_damaged_states_of_later_steps_do_not_outlive_the_next_save(tmp_path):
    for step in (10, 20):
        save_state(tmp_path, step, state_of(step))
    (tmp_path / "state_20" / ".metadata").write_bytes(b"torn")
    save_state(tmp_path, 15, state_of(15))
    assert names(tmp_path) == ["state_10", "state_15"]


def test_if_every_state_is_damaged_that_is_said(tmp_path):
    for step in (1, 2):
        save_state(tmp_path, step, state_of(step))
        (tmp_path / f"state_{step}" / "__0_0.distcp").write_bytes(b"torn")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no state in .* can be resumed"):
        load_state(tmp_path)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_no_code_of_a_state_runs(name, tmp_path, monkeypatch):
    """Not even where the checksums are right."""
    monkeypatch.chdir(tmp_path)
    save_state("resume", 1, state_of(1))
    if name == ".metadata":
        Path("resume/state_1", name).write_bytes(pickle.dumps(Malice()))
    else:
        monkeypatch.setattr(Malice, "__module__", "builtins")
        save_state("resume", 2, {"loop": Malice()})
    folder = max(Path("resume").iterdir())
    sums = {file.name: size_and_sum(file) for file in folder.iterdir() if file.name != states.CHECKSUMS}
    write_json(folder / states.CHECKSUMS, sums)
    state = load_state("resume")
    assert state is not None and state.path == folder
    with pytest.raises(Exception, match="not written by this program|Weights only load failed"):
        state["loop"]
    assert not (tmp_path / "malice").exists()
