"""The Python examples of README, run as they stand there, in order, in one session."""

import re
from pathlib import Path

import pytest
import torch

from dictionary_learning.dictionary import BatchTopKSAE
from dictionary_learning.formats import save_sae
from dictionary_learning.model import BUILT_IN, model_shape

README = Path(__file__).parents[2] / "README.md"


def examples() -> list[str]:
    """The code of every block that begins with ```python test."""
    return re.findall(r"^```python test\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def untrained_sae(folder: str) -> None:
    """An SAE on the built-in model where the examples look for one of the default run's."""
    width = model_shape("tiny-python").activation_dim
    ae = BatchTopKSAE(width, 4 * width, k=32, generator=torch.Generator().manual_seed(0))
    ae.threshold.fill_(0.1)
    layer = int(re.findall(r"layer_(\d+)", folder)[0])
    trainer = {"trainer_class": "BatchTopKTrainer", "dict_class": "BatchTopKSAE", "activation_dim": width}
    trainer |= {"dict_size": 4 * width, "k": 32, "layer": layer, "lm_name": "tiny-python"}
    save_sae(folder, ae, {"trainer": trainer, "buffer": {"ctx_len": 128}})


@pytest.mark.skipif(not BUILT_IN["tiny-python"].is_dir(), reason="the built-in model is not there")
def test_the_examples_of_the_readme_run_as_they_stand(tmp_path, monkeypatch):
    blocks = examples()
    assert blocks, "README has no block that begins with ```python test"
    monkeypatch.chdir(tmp_path)
    (folder,) = set(re.findall(r'load_dictionary\("(.*?)"', "\n".join(blocks)))
    untrained_sae(folder)
    session: dict = {}
    with torch.enable_grad():  # the examples turn gradients off, and the next test may want them
        for block in blocks:
            exec(compile(block, "README.md", "exec"), session)
    assert session["x_hat"].shape == session["x"].shape
    assert session["features"].count_nonzero() > 0
    assert not torch.equal(session["logits"], session["through_sae"])
    assert session["before"] != session["after"], "steering has to change what the model writes"
    assert not session["lm"].layers[session["layer"]]._forward_hooks, "and must be gone afterwards"


def test_an_architecture_is_added_as_the_readme_says(run, tmp_path, monkeypatch):
    """Its trainer and its row, as they stand in README, train and are evaluated like any other."""
    import demo_config
    from dictionary_learning import trainers

    (block,) = re.findall(r"^```python\n(class .*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    monkeypatch.setattr(demo_config, "ARCHITECTURES", rows := dict(demo_config.ARCHITECTURES))
    monkeypatch.setattr("demo.ARCHITECTURES", rows)
    names = {
        "StandardTrainer": trainers.StandardTrainer,
        "ARCHITECTURES": rows,
        "Architecture": demo_config.Architecture,
    }
    exec(compile(block, "README.md", "exec"), names)
    monkeypatch.setattr(trainers, "SquaredPenaltyTrainer", names["SquaredPenaltyTrainer"], raising=False)
    assert run("--architectures", "squared") == 0
    (results,) = tmp_path.rglob("eval_results.json")
    assert '"frac_recovered"' in results.read_text()
