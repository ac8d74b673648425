"""Both sides of the comparison, trained once a session on the same batches, and the table of measured gaps.

The reference is `dictionary-learning==0.1.0` from the package registry, in a folder of its own:

    pip install --no-deps --target third_party/dictionary-learning-0.1.0 dictionary-learning==0.1.0

Where the submodule `third_party/dictionary_learning` is checked out, the suite runs against it as well.

B tokens in a batch, D activation_dim, F dict_size, S steps.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import side
import torch
from cases import BUFFER, CASES, COMMON, DEAD_AFTER, NORM_FACTOR, SPARSE_FORMS, B, D, F, S

from dictionary_learning.dictionary import AutoEncoderNew
from dictionary_learning.formats import save_sae
from dictionary_learning.trainers import trainer as trainer_module

THIRD_PARTY = Path(__file__).parents[2] / "third_party"
INSTALL = "pip install --no-deps --target third_party/dictionary-learning-0.1.0 dictionary-learning==0.1.0"
REFERENCES = {"0.1.0": THIRD_PARTY / "dictionary-learning-0.1.0"}
if (THIRD_PARTY / "dictionary_learning" / "dictionary_learning").is_dir():
    REFERENCES["submodule"] = THIRD_PARTY / "dictionary_learning"


@pytest.fixture(scope="session")
def batches_SBD() -> torch.Tensor:
    """Sparse sums of a few directions, off centre: some latents find nothing to do."""
    # with some other seeds a latent stands at the edge of firing, and the reference's own weights move by 1e-3
    # when its input changes by 1e-7: there is nothing to compare there
    generator = torch.Generator().manual_seed(1)
    directions_KD = torch.randn(24, D, generator=generator)
    active_SBK = torch.rand(S, B, 24, generator=generator) < 0.1
    strength_SBK = torch.rand(S, B, 24, generator=generator)
    noise_SBD = 0.05 * torch.randn(S, B, D, generator=generator)
    return (active_SBK * strength_SBK) @ directions_KD + noise_SBD + 0.5 * torch.randn(D, generator=generator)


@pytest.fixture(scope="session")
def x_BD(batches_SBD) -> torch.Tensor:
    """Raw activations: in the units in which saved SAEs work."""
    return NORM_FACTOR * batches_SBD[-1]


@pytest.fixture(scope="session")
def cases() -> dict[str, dict]:
    return {
        name: {
            "module": module,
            "trainer": trainer,
            "settings": {**COMMON, **settings},
            "dead_feature_threshold": DEAD_AFTER,
        }
        for name, (module, trainer, settings) in CASES.items()
    }


@pytest.fixture(scope="session")
def ours(cases, batches_SBD, tmp_path_factory) -> SimpleNamespace:
    """records: of training, by architecture or sparse form; folder: the SAEs by architecture, and an AutoEncoderNew."""
    folder, records, threads = tmp_path_factory.mktemp("ours"), {}, torch.get_num_threads()
    for name, case in cases.items():
        trainer, records[name] = side.train(case, batches_SBD)
        trainer.ae.scale_biases(NORM_FACTOR)
        save_sae(folder / name, trainer.ae, {"trainer": trainer.config, "buffer": BUFFER})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "DENSITY_INTERVAL", 1)
        patch.setitem(trainer_module.SPARSE_BELOW, "cpu", 1.1)
        for form, name in SPARSE_FORMS.items():
            trainer, records[form] = side.train(cases[name], batches_SBD)
            assert trainer.sparse
    torch.set_num_threads(threads)
    new_config = {"trainer": {"dict_class": "AutoEncoderNew", "activation_dim": D, "dict_size": F}, "buffer": BUFFER}
    save_sae(folder / "AutoEncoderNew", AutoEncoderNew(D, F), new_config)
    return SimpleNamespace(records=records, folder=folder)


@pytest.fixture(scope="session", params=REFERENCES)
def reference(request, cases, batches_SBD, x_BD, ours, tmp_path_factory) -> SimpleNamespace:
    """The same of the reference, and looks[whose, name]: what its SAEs make of x_BD after loading a folder."""
    package = REFERENCES[request.param]
    if not (package / "dictionary_learning").is_dir():
        pytest.fail(f"the reference is not installed; in the root of the repository: {INSTALL}", pytrace=False)
    exchange = tmp_path_factory.mktemp("reference")
    question = {
        "cases": cases,
        "batches_SBD": batches_SBD,
        "x_BD": x_BD,
        "norm_factor": NORM_FACTOR,
        "buffer": BUFFER,
        "sizes": {"activation_dim": D, "dict_size": F},
        "folder": str(exchange / "saes"),
        "their_folder": str(ours.folder),
    }
    torch.save(question, exchange / "request.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, side.__file__, package, exchange / "request.pt", exchange / "answer.pt"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = torch.load(exchange / "answer.pt")
    return SimpleNamespace(name=request.param, folder=exchange / "saes", **answer)


def pytest_terminal_summary(terminalreporter) -> None:
    """A table of the measured gaps: largest |ours - reference| over largest |reference|, the worst tensor's."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    rows = [value for report in reports for key, value in report.user_properties if key == "gap"]
    if rows:
        terminalreporter.section("gap to the reference after training")
        for reference, architecture, gap, tensor, bound in rows:
            terminalreporter.write_line(f"{reference:10} {architecture:26} {gap:8.1e} < {bound:.0e}   {tensor}")
