"""Same seed, settings and batches, same SAE: every trainer against the reference itself, fp32 on the CPU.

B tokens in a batch, F dict_size.
"""

import pytest
import torch
from cases import CASES, COMMON, DEAD_AFTER, SPARSE_FORMS, S

TOP_K_FAMILY = ("top_k", "batch_top_k", "matryoshka_batch_top_k")
COUNTING = (*TOP_K_FAMILY, "jump_relu")  # the reference counts silent latents in these
CLIPPED = ("standard_new", *TOP_K_FAMILY, "jump_relu")
# x^p with p < 1 has an unbounded slope at 0, which magnifies rounding
BOUNDS = {name: 1e-4 if name == "p_anneal" else 1e-5 for name in CASES}

each_architecture = pytest.mark.parametrize("name", CASES)


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over largest value; infinite if one is not finite."""
    scale = theirs.abs().max().double()
    difference = (ours.double() - theirs.double()).abs().max()
    relative = float(difference / scale) if scale > 0 else float(difference)
    return relative if relative == relative else float("inf")


@each_architecture
def test_initial_weights_are_equal_to_the_bit(name, ours, reference):
    mine, theirs = ours.records[name]["initial"], reference.records[name]["initial"]
    assert mine.keys() == theirs.keys()
    for key in theirs:
        assert mine[key].dtype == theirs[key].dtype and torch.equal(mine[key], theirs[key]), key


@pytest.mark.parametrize("form", [*CASES, *SPARSE_FORMS])
def test_trained_weights_agree(form, ours, reference, record_property):
    name = SPARSE_FORMS.get(form, form)
    mine, theirs = ours.records[form]["final"], reference.records[name]["final"]
    gaps = {key: gap(mine[key], theirs[key]) for key in theirs}
    worst = max(gaps, key=lambda key: gaps[key])
    record_property("gap", (reference.name, form, gaps[worst], worst, BOUNDS[name]))
    assert gaps[worst] < BOUNDS[name], gaps


@each_architecture
def test_configs_say_at_least_what_the_reference_says(name, ours, reference):
    mine, theirs = ours.records[name]["config"], reference.records[name]["config"]
    assert theirs.keys() <= mine.keys()
    measured = {"sparsity_penalty"} if name == "p_anneal" else set()  # follows from the activations
    assert {key: mine[key] for key in theirs if key not in measured} == {
        key: theirs[key] for key in theirs if key not in measured
    }


@pytest.mark.parametrize("name", COUNTING)
def test_silent_latents_are_counted_alike_at_every_step(name, ours, reference):
    for step, (mine, theirs) in enumerate(zip(*traces(name, ours, reference), strict=True)):
        assert torch.equal(mine["silent_F"], theirs["silent_F"]), step


@pytest.mark.parametrize("name", TOP_K_FAMILY)
def test_the_threshold_starts_and_moves_alike(name, ours, reference):
    for step, (mine, theirs) in enumerate(zip(*traces(name, ours, reference), strict=True)):
        assert (mine["threshold"] < 0) == (theirs["threshold"] < 0), step
        assert gap(mine["threshold"], theirs["threshold"]) < 1e-5, step


def test_p_and_its_penalty_follow_the_same_schedule(ours, reference):
    mine, theirs = traces("p_anneal", ours, reference)
    for key in ("p", "next_p"):
        assert [counted[key] for counted in mine] == [counted[key] for counted in theirs]
    assert changes(mine, "sparsity_coeff") == changes(theirs, "sparsity_coeff")
    for a, b in zip(mine, theirs, strict=True):
        assert a["sparsity_coeff"] == pytest.approx(b["sparsity_coeff"], rel=1e-5)


@each_architecture
def test_the_run_covers_what_it_is_meant_to(name, reference):
    """On the reference's side, so that a slip of ours cannot hide what the comparison no longer covers."""
    record = reference.records[name]
    moved = [key for key in record["final"] if not torch.equal(record["final"][key], record["initial"][key])]
    assert set(moved) >= record["final"].keys() - {"k", "group_sizes"}
    if name in CLIPPED:
        over = sum(norm > 1 for norm in record["grad_norms"])
        assert over >= 5 and len(record["grad_norms"]) == S
    if name in COUNTING:
        assert any((counted["silent_F"] >= DEAD_AFTER).any() for counted in record["trace"])
    if name in TOP_K_FAMILY:
        started = [bool(counted["threshold"] >= 0) for counted in record["trace"]]
        assert started.index(True) == 41 < COMMON["decay_start"]
    if name == "p_anneal":
        assert len(changes(record["trace"], "p")) > 5 and len(changes(record["trace"], "sparsity_coeff")) > 5


def traces(name, ours, reference):
    return ours.records[name]["trace"], reference.records[name]["trace"]


def changes(trace: list[dict], key: str) -> list[int]:
    """The steps after which a value is another than before."""
    return [step for step in range(1, len(trace)) if trace[step][key] != trace[step - 1][key]]
