"""Files: whatever happens, the old content or the new."""

import gc
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from saes import config_of, make_sae
from safetensors.torch import save_file

from dictionary_learning.files import (
    TensorFile,
    append_jsonl,
    read_json,
    read_jsonl,
    rewind_jsonl,
    write_atomic,
    write_json,
)
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


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what is mapped is read from /proc")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz"])
def test_half_precision_is_read_in_pieces_and_nothing_stays_mapped(suffix, tmp_path, monkeypatch):
    """What stayed mapped would take memory beside the float32 weights."""
    monkeypatch.setattr(TensorFile, "PIECE", 50)
    whole = torch.randn(40, 10).half()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"ae": {"W": whole}, "step": 3}, path)
    elif suffix == ".safetensors":
        save_file({"ae.W": whole}, path)
    else:
        np.savez(path, **{"ae.W": whole.numpy()})
    gc.disable()  # nothing waits for it
    try:
        read = TensorFile(path).read("ae.W")
        assert str(path) not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()
    assert read.dtype == torch.float32 and torch.equal(read, whole.float())
