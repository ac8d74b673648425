"""Files: whatever happens, the old content or the new."""

import json
import resource
from pathlib import Path

import pytest
import torch
from saes import config_of, make_sae

from dictionary_learning.files import append_jsonl, read_json, read_jsonl, rewind_jsonl, write_atomic, write_json
from dictionary_learning.formats import save_sae, save_weights
from dictionary_learning.state import save_state


def test_a_failed_write_leaves_the_old_content_and_no_leftovers(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def half(tmp: Path) -> None:
        tmp.write_bytes(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="could not be written .*No space left on device.* untouched"):
        write_atomic(path, half)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_loses_nothing(tmp_path):
    """The real thing: the kernel refuses to let files grow."""
    ae = make_sae("AutoEncoder")
    save_sae(tmp_path / "sae", ae, config_of(ae))
    save_state(tmp_path / "resume", 1, {"x": torch.ones(9999)})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        with pytest.raises(OSError, match="safetensors could not be written"):
            save_sae(tmp_path / "sae", ae, config_of(ae))
        with pytest.raises(OSError, match="ae.pt could not be written"):
            save_weights(tmp_path / "sae" / "ae.pt", ae)
        with pytest.raises(OSError, match="state_2 could not be written"):
            save_state(tmp_path / "resume", 2, {"x": torch.ones(9999)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_json_knows_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": [float("nan"), 1.5, (float("inf"),)], "b": {"c": None}})
    assert read_json(tmp_path / "a.json") == {"a": [None, 1.5, [None]], "b": {"c": None}}
    assert (tmp_path / "a.json").read_text().startswith('{\n    "a"')


def test_metrics_are_rewound_to_the_step_of_the_state(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rewind_jsonl(path, 5)
    assert read_jsonl(path) == [] and not path.exists()
    for step in range(0, 100, 10):
        append_jsonl(path, {"step": step, "loss": float("nan")})
    with open(path, "a") as file:
        file.write('{"step": 100, "lo')  # killed here
    assert [row["step"] for row in read_jsonl(path)] == list(range(0, 100, 10))
    rewind_jsonl(path, 40)
    append_jsonl(path, {"step": 40, "loss": 1.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 10, 20, 30, 40]
