"""What one side writes, the other reads: every class, both directions.  And what SAEBench's loader asks of a folder.

B tokens, D activation_dim, F dict_size.
"""

import json

import pytest
import torch
from cases import BUFFER, CASES, D, F
from side import look

from dictionary_learning.formats import find_saes, load_dictionary

SAVED = [*CASES, "AutoEncoderNew"]
# SAEBench's sae_bench/custom_saes/run_all_evals_dictionary_learning_saes.py: the trainers it dispatches on, and the
# tensors each loader takes
RELU = {"bias", "encoder.weight", "encoder.bias", "decoder.weight"}
TOP_K = {"b_dec", "k", "threshold", "encoder.weight", "encoder.bias", "decoder.weight"}
PLAIN = {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
SAEBENCH = {
    "StandardTrainer": RELU,
    "StandardTrainerAprilUpdate": RELU,
    "PAnnealTrainer": RELU,
    "GatedSAETrainer": {"decoder_bias", "r_mag", "gate_bias", "mag_bias", "encoder.weight", "decoder.weight"},
    "TopKTrainer": TOP_K,
    "BatchTopKTrainer": TOP_K,
    "MatryoshkaBatchTopKTrainer": {*PLAIN, "k", "group_sizes"},
    "JumpReluTrainer": PLAIN,
}


def agree(mine: list, theirs: list) -> None:
    assert len(mine) == len(theirs)
    for ours, others in zip(mine, theirs, strict=True):
        for a, b in zip(ours, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SAVED)
def test_the_reference_reads_what_we_write(name, ours, reference, x_BD):
    ae, _ = load_dictionary(ours.folder / name)
    agree(look(ae, x_BD), reference.looks["their_folder", name])


@pytest.mark.parametrize("name", SAVED)
def test_we_read_what_the_reference_writes(name, reference, x_BD):
    ae, config = load_dictionary(reference.folder / name)
    agree(look(ae, x_BD), reference.looks["folder", name])
    written = json.loads((reference.folder / name / "config.json").read_text())
    assert (
        config["trainer"].items() >= written["trainer"].items()
        and config["buffer"].items() >= written["buffer"].items()
    )


@pytest.mark.parametrize("name", CASES)
def test_a_folder_is_one_that_saebench_takes(name, ours):
    folder = ours.folder / name
    assert folder in find_saes(ours.folder)
    config = json.loads((folder / "config.json").read_text())
    state = torch.load(folder / "ae.pt", weights_only=True)
    trainer = config["trainer"]
    assert state.keys() == SAEBENCH[trainer["trainer_class"]]
    assert config["buffer"]["ctx_len"] == BUFFER["ctx_len"]
    assert (trainer["layer"], trainer["lm_name"]) == (3, "EleutherAI/pythia-70m-deduped")
    assert trainer["dict_size"] == F >= trainer["activation_dim"] == D
    assert isinstance(trainer.get("k", 1), int)
    decoder_FD = state["W_dec"] if "W_dec" in state else state["decoder.weight"].T
    if name != "standard_new":  # whose norms are free: SAEBench's ReLU loader normalises, and so does ours
        torch.testing.assert_close(decoder_FD.norm(dim=1), torch.ones(F), rtol=0, atol=1e-5)
    if "threshold" in state and state["threshold"].ndim == 0:
        assert state["threshold"] >= 0
    assert all(tensor.isfinite().all() for tensor in state.values())
