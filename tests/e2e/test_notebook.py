"""graphing.ipynb runs from top to bottom on any run folder, and is stored without outputs."""

import json
import math
from pathlib import Path

import pytest

from dictionary_learning.plotting import ARCHITECTURE_STYLES

ROOT = Path(__file__).parents[2]


def read_notebook():
    import nbformat

    return nbformat.read(ROOT / "graphing.ipynb", as_version=4)


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """A finished run: every architecture, two widths, two layers, three settings."""
    import numpy as np
    from safetensors.numpy import save_file

    settings = [(name, width, l0) for name in ARCHITECTURE_STYLES for width in (32, 64) for l0 in (4, 8, 16)]
    for layer in (1, 2):
        for i, (name, width, l0) in enumerate(settings):
            folder = tmp_path / "run" / f"resid_post_layer_{layer}" / f"trainer_{i}"
            folder.mkdir(parents=True)
            trainer = {"trainer_class": name, "dict_class": "AutoEncoder", "dict_size": width, "layer": layer}
            (folder / "config.json").write_text(json.dumps({"trainer": trainer | {"lm_name": "m"}, "buffer": {}}))
            score = 1 - 1 / l0
            results = {"l0": l0, "frac_recovered": score, "frac_variance_explained": score, "kl_divergence": 1 / l0}
            (folder / "eval_results.json").write_text(json.dumps(results | {"frac_alive": 1.0}))
            history = [{"tokens": t, "l0": l0, "loss": math.exp(-t), "dead_features": t} for t in range(3)]
            (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, history)))
            save_file({"density": np.linspace(0, 0.1, width, dtype=np.float32)}, folder / "density.safetensors")
    return tmp_path / "run"


def test_the_notebook_is_stored_without_outputs():
    for cell in read_notebook().cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


def test_the_notebook_runs_from_top_to_bottom(run_folder, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    notebook = read_notebook()
    first_code_cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "RUN_FOLDERS = " in first_code_cell.source
    first_code_cell.source = f"RUN_FOLDERS = [{str(run_folder)!r}]"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "{'SAEs': 96, 'run folders': 1, 'problems': []}" in [
        output.get("data", {}).get("text/plain") for output in outputs
    ]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 7
