"""The optimiser of two passes equals the sequence of torch's own operations that it replaces."""

import copy

import pytest
import torch

from dictionary_learning.dictionary import AutoEncoderTopK
from dictionary_learning.kernels import adam, backend, use_kernels
from dictionary_learning.trainers.optimizer import ConstrainedAdam, UnitNorm

D, F = 20, 12


@pytest.fixture(params=["torch", "triton"])
def entries(request, monkeypatch):
    """entries(n): both ways to do a step, and how many entries each takes at a time."""
    if request.param == "triton":
        pytest.importorskip("triton")
    use_kernels(request.param)
    name = "CACHED_ENTRIES" if request.param == "torch" else "ENTRIES"
    yield lambda n: monkeypatch.setattr(backend.optimizer(), name, n)
    use_kernels("torch")


class TorchSequence:
    """Projection, clipping, torch's Adam, renormalisation: each on its own, over all weights."""

    def __init__(self, ae, betas, unit_norm, max_grad_norm):
        self.unit_norm, self.max_grad_norm = unit_norm, max_grad_norm
        self.adam = torch.optim.Adam(ae.parameters(), betas=betas, fused=True)

    def step(self, ae, lr: float, void: bool) -> None:
        grad_FD, weight_FD = ae.decoder.weight.grad.T, ae.decoder.weight.data.T
        if self.unit_norm is not None:
            unit_FD = weight_FD / (weight_FD.norm(dim=1, keepdim=True) + self.unit_norm.projection_eps)
            grad_FD -= (grad_FD * unit_FD).sum(1, keepdim=True) * unit_FD
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(ae.parameters(), self.max_grad_norm)
        if not void:
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
        if self.unit_norm is not None:
            weight_FD /= weight_FD.norm(dim=1, keepdim=True) + self.unit_norm.renorm_eps


@pytest.mark.parametrize("n", [64, 2**17])  # several pieces of a matrix, and one
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999)])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("unit_norm", [None, UnitNorm(1e-6, torch.finfo(torch.float32).eps), UnitNorm(0.0, 0.0)])
def test_ten_steps_equal_those_of_torch(entries, unit_norm, max_grad_norm, betas, n):
    entries(n)
    generator = torch.Generator().manual_seed(0)
    ours = AutoEncoderTopK(D, F, k=3, generator=generator)
    theirs = copy.deepcopy(ours)
    optimizer = ConstrainedAdam(ours, betas, unit_norm, max_grad_norm)
    sequence = TorchSequence(theirs, betas, unit_norm, max_grad_norm)
    stopped = torch.tensor(False)
    for step in range(10):
        void, lr = step == 9, 1e-2 * (10 - step) / 10 * (step > 0)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            gradient = torch.randn(mine.shape, generator=generator) * (0.01 if step == 5 else 1)  # 5: not clipped
            mine.grad, other.grad = torch.empty_like(mine).copy_(gradient), torch.empty_like(other).copy_(gradient)
        loss = torch.tensor(torch.nan if void else 1.0)
        optimizer.step(ours, lr, loss, stopped)
        sequence.step(theirs, lr, void)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert bool(stopped) and optimizer.steps == 9
    assert all(parameter.grad is None for parameter in ours.parameters())
    exp_avg_FD, exp_avg_sq_FD = optimizer.moments("decoder.weight")
    reference = sequence.adam.state[theirs.decoder.weight]
    torch.testing.assert_close(exp_avg_FD, reference["exp_avg"].T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(exp_avg_sq_FD, reference["exp_avg_sq"].T, rtol=1e-5, atol=1e-7)


def test_a_gradient_that_is_not_finite_stops_everything(entries):
    ae = AutoEncoderTopK(D, F, k=3, generator=torch.Generator().manual_seed(0))
    optimizer = ConstrainedAdam(ae, (0.9, 0.999), None, 1.0)
    before = {name: value.clone() for name, value in (ae.state_dict() | optimizer.state_dict()).items()}
    stopped = torch.tensor(False)
    for grad in (torch.nan, 1.0):  # and it stays stopped
        for parameter in ae.parameters():
            parameter.grad = torch.full_like(parameter, grad)
        optimizer.step(ae, 1e-3, torch.tensor(1.0), stopped)
    assert bool(stopped)
    assert all(value.equal(before[name]) for name, value in (ae.state_dict() | optimizer.state_dict()).items())


def test_a_gradient_along_the_weight_leaves_nothing_to_follow():
    weight_FD = torch.randn(F, D, generator=torch.Generator().manual_seed(0))
    grad_FD = 3 * weight_FD
    norm, _ = adam.gradient_norm(grad_FD, weight_FD)
    torch.testing.assert_close(grad_FD, torch.zeros(F, D), atol=1e-5, rtol=0)
    assert 0 <= float(norm) < 1e-4


def test_a_row_of_zeros_has_no_direction():
    weight_FD = torch.zeros(F, D)
    grad_FD = torch.ones(F, D)
    norm, _ = adam.gradient_norm(grad_FD, weight_FD)
    assert grad_FD.equal(torch.ones(F, D))
    torch.testing.assert_close(norm, torch.tensor(float(F * D)).sqrt())


def test_a_matrix_whose_rows_are_not_contiguous_is_no_matter_for_adam(entries):
    """Both forms walk over the memory: a decoder in nn.Linear's layout would move by another weight's gradient."""
    weight_FD = torch.ones(D, F).T
    contiguous = [torch.ones(F, D) for _ in range(3)]
    with pytest.raises(AssertionError):
        backend.optimizer().adam_(
            weight_FD, *contiguous, torch.ones(()), lr=1e-3, betas=(0.9, 0.999), found_inf=torch.zeros(())
        )


def test_kernels_of_another_name_are_refused():
    with pytest.raises(ValueError, match="kernels must be torch or triton, not 'cuda'"):
        use_kernels("cuda")
