"""Laws of the trainers: what a step may change, and what may not change a step."""

import copy
import dataclasses
import math

import pytest
import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from demo_config import ARCHITECTURES, DEFAULTS
from dictionary_learning import trainers
from dictionary_learning.dictionary import TopKDictionary
from dictionary_learning.kernels import screen
from dictionary_learning.sweep import Sweep, get_trainer_configs
from dictionary_learning.trainers import StandardTrainer, TopKTrainer, top_k
from dictionary_learning.trainers import trainer as trainer_module
from dictionary_learning.trainers.top_k import geometric_median

D, F, B, STEPS = 12, 48, 32, 60
SWEEP = Sweep.of(
    DEFAULTS,
    num_tokens=STEPS * B,
    sae_batch_size=B,
    dictionary_widths=[F],
    learning_rates=[3e-3],
    target_l0s=[4],
    standard_penalties=[0.1],
    p_anneal_penalties=[0.1],
    gated_penalties=[0.1],
)
NAMES = list(ARCHITECTURES)
TOPK_FAMILY = [name for name, row in ARCHITECTURES.items() if row.varies == "k"]  # always sparse


def make(name: str, **changes):
    (config,) = get_trainer_configs(SWEEP, {name: ARCHITECTURES[name]}, "model", 0, D, "cpu")
    trainer_class = config.pop("trainer")
    return trainer_class(**config | changes)


def batches(n: int, seed: int = 0):
    """Sparse combinations of fixed directions: something an SAE can learn."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(30, D, generator=generator) / D**0.5
    return [(torch.rand(B, 30, generator=generator) < 0.1).float() @ directions for _ in range(n)]


def train(trainer, data, start: int = 0):
    outs = [trainer.update(step, x_BD) for step, x_BD in enumerate(data, start)]
    return outs[-1]


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.ae.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].equal(b[name]), name


@pytest.mark.parametrize("name", NAMES)
def test_loss_reads_and_never_writes(name):
    trainer, data = make(name), batches(20)
    train(trainer, data)
    before = copy.deepcopy(trainer.state_dict())
    trainer.loss(data[0], 20)
    after = trainer.state_dict()
    assert str(before) == str(after)
    assert_same(weights(trainer), {k.removeprefix("ae."): v for k, v in before.items() if k.startswith("ae.")})


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_weights_whatever_else_happens(name):
    one = make(name)
    train(one, batches(15))
    torch.manual_seed(123)
    torch.rand(7)
    make("standard")  # another trainer in the process
    two = make(name)
    train(two, batches(15))
    assert_same(weights(one), weights(two))
    other = make(name, seed=1)
    assert not other.ae.encoder_FD.equal(make(name).ae.encoder_FD)


@pytest.mark.parametrize("name", NAMES)
def test_global_generator_is_left_alone(name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(make(name), batches(5))
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("name", NAMES)
def test_resume_equals_a_straight_run(name, tmp_path):
    data = batches(STEPS)
    straight = make(name)
    train(straight, data)
    first = make(name)
    train(first, data[:37])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = make(name)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(second, data[37:], start=37)
    assert_same(weights(straight), weights(second))
    assert straight.config == second.config


@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_error(name):
    trainer, data = make(name), batches(STEPS)
    first = trainer.loss(data[0], 0)
    last = train(trainer, data)
    assert (data[-1] - last.x_hat_BD).norm() < (data[0] - first.x_hat_BD).norm()


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "as on a gpu"])
@pytest.mark.parametrize(
    "name, sparse", [(name, True) for name in NAMES] + [(name, False) for name in NAMES if name not in TOPK_FAMILY]
)
def test_bfloat16_matmuls_learn_as_much_with_weights_in_float32(name, sparse, gpu, monkeypatch, as_on_a_gpu):
    if gpu:
        as_on_a_gpu()
    monkeypatch.setattr(trainer_module, "SPARSE_BELOW", {"cpu": 1.1 if sparse else 0.0})
    lost = {}
    for dtype in (torch.float32, torch.bfloat16):
        trainer, data = make(name), batches(STEPS)
        for step, x_BD in enumerate(data):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                trainer.update(step, x_BD.to(dtype))
        assert {tensor.dtype for tensor in trainer.parameters()} == {torch.float32}
        assert all(moment.dtype == torch.float32 for moment in trainer.optimizer.buffers())
        assert not trainer.stopped
        assert getattr(trainer, "sparse", True) == sparse
        out = trainer.loss(data[-1], STEPS).detach()
        lost[dtype] = float((data[-1] - out.x_hat_BD).square().sum() / data[-1].square().sum())
    assert 0 < lost[torch.float32] < 0.9
    assert lost[torch.bfloat16] != lost[torch.float32]
    # jump_relu's kernel is hardly wider than the steps between numbers in bfloat16
    assert lost[torch.bfloat16] == pytest.approx(lost[torch.float32], rel=0.15 if name == "jump_relu" else 0.05)


@pytest.mark.parametrize("name", NAMES)
def test_decoder_norms(name):
    """Unit norm after every step, except for standard_new, whose norms are free."""
    trainer = make(name)
    for step, x_BD in enumerate(batches(10)):
        trainer.update(step, x_BD)
        norms_F = trainer.ae.decoder_FD.norm(dim=1)
        if name == "standard_new":
            assert (norms_F < 0.5).all()
        else:
            torch.testing.assert_close(norms_F, torch.ones(F), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_first_step_has_learning_rate_zero(name):
    trainer, (x_BD,) = make(name), batches(1)
    before = weights(trainer)
    trainer.update(0, x_BD)
    assert trainer.ae.encoder_FD.equal(make(name).ae.encoder_FD)
    for bias in {"encoder.bias", "b_enc", "mag_bias"} & before.keys():
        assert trainer.ae.state_dict()[bias].equal(before[bias])


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_that_is_not_finite_stops_the_sae_with_its_last_weights(name):
    trainer, data = make(name), batches(12)
    train(trainer, data[:10])
    before = weights(trainer)
    broken = data[10].clone()
    broken[3, 2] = torch.nan
    trainer.update(10, broken)
    assert trainer.stopped
    trainer.update(11, data[11])
    for parameter in dict(trainer.ae.named_parameters()):
        torch.testing.assert_close(trainer.ae.state_dict()[parameter], before[parameter], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", TOPK_FAMILY)
def test_topk_family(name):
    trainer, data = make(name, k=4), batches(STEPS)
    last = train(trainer, data)
    assert isinstance(trainer.ae, TopKDictionary)
    assert last.l0() <= 4
    assert trainer.ae.threshold > 0
    exact_BF = trainer.ae.encode(data[-1], use_threshold=False)
    assert (exact_BF != 0).sum() <= 4 * B
    by_threshold_BF = trainer.ae.encode(data[-1])
    assert by_threshold_BF.equal(torch.where(by_threshold_BF > trainer.ae.threshold, by_threshold_BF, 0))


@pytest.mark.parametrize("negative_thresholds", [False, True])
@pytest.mark.parametrize("name", ["standard", "standard_new", "p_anneal", "gated", "jump_relu"])
def test_sparse_and_dense_form_of_a_step_agree(name, negative_thresholds):
    """In loss and gradients; for JumpReLU also where a threshold is so small that the kernel reaches features of 0."""
    grads, losses = [], []
    for sparse in (False, True):
        trainer = make(name).double()
        train(trainer, [x_BD.double() for x_BD in batches(20)])
        if name == "jump_relu":
            with torch.no_grad():
                trainer.ae.threshold[: F // 2] = -0.0003 if negative_thresholds else 0.0004
                trainer.ae.threshold[F // 2 :] = 0.05
        trainer.sparse = sparse
        out = trainer.loss(batches(1, seed=9)[0].double(), 20)
        losses.append(out.loss)
        grads.append(torch.autograd.grad(out.loss, list(trainer.ae.parameters())))
        assert out.f.dense().shape == (B, F)
    torch.testing.assert_close(losses[0], losses[1])
    for dense, sparse in zip(*grads, strict=True):
        torch.testing.assert_close(dense, sparse)


def test_threshold_start_is_strict_and_a_row_with_nothing_active_is_left_out():
    trainer, data = make("top_k", threshold_start_step=3), batches(6)
    train(trainer, data[:4])
    assert trainer.ae.threshold == -1
    x_BD = data[4].clone()
    with torch.no_grad():
        trainer.ae.encoder.bias.fill_(-1e3)
        trainer.ae.encoder.bias[0] = 1.0
        trainer.ae.encoder.weight[0] = 0
    trainer.update(4, x_BD)
    assert trainer.ae.threshold == 1.0  # the only positive activation, of every row


def test_dead_latents_are_revived_by_the_auxiliary_loss():
    trainer, data = make("batch_top_k", dead_feature_threshold=5 * B), batches(STEPS)
    with torch.no_grad():
        trainer.ae.encoder.bias[: F // 2] = -1e3
    trainer.update(0, data[0])
    for step in range(1, 8):
        out = trainer.update(step, data[step])
    assert out.terms["dead_features"] >= F // 2
    with torch.no_grad():
        trainer.ae.encoder.bias[: F // 2] = -0.3
    out = trainer.loss(data[8], 8)
    assert out.terms["auxk_loss"] > 0
    grads_FD = torch.autograd.grad(out.terms["auxk_loss"], trainer.ae.encoder.weight)[0]
    dead_F = trainer.silent_tokens(out.fired_F, B) >= trainer.dead_feature_threshold
    assert dead_F.any() and not dead_F.all()
    assert grads_FD[dead_F].any() and not grads_FD[~dead_F].any()


class NoWaiting(TorchDispatchMode):
    """Refuses operations for whose result, or its shape, the host would have to wait, and tensors made of its lists."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operation.tags)
        assert not waits and operation.overloadpacket is not torch.ops.aten.lift_fresh, operation
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_no_step_waits_for_the_device(name, monkeypatch, as_on_a_gpu):
    as_on_a_gpu()
    step = 0

    def begin_to_read(numbers):
        with _disable_current_modes():  # a copy that nothing waits for
            on_host, begun_in = numbers.tolist(), step

        def read():
            assert begun_in < step, "not there yet"
            return on_host

        return read

    trainer, data = make(name, dead_feature_threshold=3 * B), batches(8)
    with torch.no_grad():
        trainer.ae.encoder_FD[F // 2 :] = 0
    for step in range(5):
        trainer.update(step, data[step])
    monkeypatch.setattr(top_k, "begin_to_read", begin_to_read)
    trainer.update(5, data[5])
    with NoWaiting():
        for step in (6, 7):
            out = trainer.update(step, data[step])
    if name in TOPK_FAMILY:
        assert out.terms["dead_features"] > 0 and out.terms["auxk_loss"] > 0


def test_the_auxiliary_loss_is_of_the_dead_latents_alone_when_others_revive_in_the_batch():
    trainer, data = make("top_k", dead_feature_threshold=3 * B), batches(3)
    for step in range(2):
        trainer.update(step, data[step])
    state = trainer.state_dict()
    state["num_tokens_since_fired"] = torch.full((F,), 3 * B)
    trainer.load_state_dict(state)
    ae, out = trainer.ae, trainer.loss(data[2], 2)
    dead_F = ~out.fired_F
    assert dead_F.any() and not dead_F.all() and out.terms["dead_features"] == dead_F.sum()
    f_BF = torch.where(dead_F, torch.relu(linear(data[2] - ae.b_dec, ae.encoder_FD, ae.encoder_bias_F)), 0)
    top = f_BF.topk(min(D // 2, int(dead_F.sum())), dim=1)
    x_aux_BD = torch.zeros_like(f_BF).scatter(1, top.indices, top.values) @ ae.decoder_FD
    residual_BD = data[2] - out.x_hat_BD
    expected = (residual_BD - x_aux_BD).square().sum() / (residual_BD - residual_BD.mean(0)).square().sum()
    torch.testing.assert_close(out.terms["auxk_loss"], expected)


def test_k_annealing_ends_at_k():
    trainer = make("batch_top_k", k_anneal_steps=20)
    ks = []
    for step, x_BD in enumerate(batches(30)):
        trainer.update(step, x_BD)
        ks.append(int(trainer.ae.k))
    assert ks[0] == D and ks == sorted(ks, reverse=True) and ks[20:] == [4] * 10
    assert trainer.config["k"] == 4


def test_resampling_points_dead_latents_at_badly_reconstructed_tokens():
    trainer = StandardTrainer(
        steps=100, activation_dim=D, dict_size=F, layer=0, lm_name="m", lr=1e-3, l1_penalty=0.0, warmup_steps=5,
        sparsity_warmup_steps=None, resample_steps=10, seed=0, device="cpu",
    )  # fmt: skip
    with torch.no_grad():
        trainer.ae.encoder.bias[:6] = -1e3
    data = batches(11)
    train(trainer, data)
    assert (trainer.ae.encoder.bias[:6] == 0).all()
    torch.testing.assert_close(trainer.ae.decoder_FD[:6].norm(dim=1), torch.ones(6))
    tokens_BD = data[10] / data[10].norm(dim=1, keepdim=True).clamp(min=1e-9)
    assert ((trainer.ae.decoder_FD[:6] @ tokens_BD.T).amax(1) > 0.999).all()
    exp_avg_FD, _ = trainer.optimizer.moments("encoder.weight")
    assert not exp_avg_FD[:6].any() and exp_avg_FD[6:].any()


def test_p_falls_in_steps_and_the_penalty_does_not_jump():
    trainer = make("p_anneal", anneal_start=10, n_sparsity_updates=5, sparsity_queue_length=3)
    seen = []
    for step, x_BD in enumerate(batches(STEPS)):
        out = trainer.update(step, x_BD)
        seen.append((trainer.p, float(out.terms["scaled_lp_loss"])))
    ps = [p for p, _ in seen]
    assert ps[0] == 1.0 and ps == sorted(ps, reverse=True)
    assert len(set(ps)) == 4  # the last event, at the end of training, is never reached
    jumps = [abs(seen[i + 1][1] / seen[i][1] - 1) for i in range(15, STEPS - 1) if ps[i] != ps[i + 1]]
    assert len(jumps) == 3 and max(jumps) < 0.5


def test_config_rebuilds_the_trainer():
    for name in NAMES:
        trainer = make(name)
        config = trainer.config
        fields = trainer.Config.__dataclass_fields__
        again = type(trainer)(**{key: config[key] for key in fields if key in config and key != "dict_class"})
        assert again.config == config


def test_geometric_median_of_equal_rows_is_that_row():
    row_D = torch.tensor([1.0, -2.0, 3.0])
    assert geometric_median(row_D.expand(5, 3)).equal(row_D)
    assert geometric_median(row_D[None]).equal(row_D)


def test_geometric_median_resists_an_outlier():
    x_BD = torch.randn(101, 3, generator=torch.Generator().manual_seed(0))
    x_BD[0] = 1e6
    assert geometric_median(x_BD).norm() < 1


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"warmup_steps": 100}, "warmup_steps"),
        ({"decay_start": 2}, "decay_start"),
        ({"k": 0}, "k must lie"),
        ({"k": F + 1}, "k must lie"),
        ({"k_anneal_steps": 0}, "k_anneal_steps"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        TopKTrainer(**{"steps": 50, "activation_dim": D, "dict_size": F, "layer": 0, "lm_name": "m", "k": 4,
                       "warmup_steps": 5, "device": "cpu", **settings})  # fmt: skip


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, 0.0])
@pytest.mark.parametrize(
    "trainer, name, may_be_0",
    [
        ("JumpReluTrainer", "target_l0", False),
        ("JumpReluTrainer", "bandwidth", False),
        ("JumpReluTrainer", "sparsity_penalty", True),
        ("StandardTrainer", "l1_penalty", True),
        ("StandardTrainerAprilUpdate", "l1_penalty", True),
        ("GatedSAETrainer", "l1_penalty", True),
        ("PAnnealTrainer", "initial_sparsity_penalty", True),
        ("TopKTrainer", "auxk_alpha", True),
        ("BatchTopKTrainer", "lr", False),
    ],
)
def test_no_penalty_target_or_rate_is_negative_or_no_number(trainer, name, may_be_0, value):
    own = {"k": 4} if "TopK" in trainer else {}
    own |= {"anneal_start": 10} if trainer == "PAnnealTrainer" else {}
    own |= {"sparsity_warmup_steps": 5} if not {"TopKTrainer", "BatchTopKTrainer"} & {trainer} else {}
    settings = {"steps": 50, "activation_dim": D, "dict_size": F, "layer": 0, "lm_name": "m", "warmup_steps": 5, **own}
    config = getattr(trainers, trainer).Config
    if value == 0 and may_be_0:
        assert getattr(config(**settings, **{name: value}), name) == 0
    else:
        with pytest.raises(ValueError, match=f"{name} must be a .*number.*, got {value}"):
            config(**settings, **{name: value})


@pytest.mark.parametrize(
    "name", ["dictionary_widths", "learning_rates", "random_seeds", "target_l0s", "gated_penalties"]
)
def test_a_grid_that_has_a_value_twice_is_refused(name):
    values = getattr(SWEEP, name)
    sweep = dataclasses.replace(SWEEP, **{name: [*values, values[0] + 1, float(values[0])]})
    with pytest.raises(ValueError, match=f"--{name} has a value twice"):
        get_trainer_configs(sweep, ARCHITECTURES, "m", 0, D, "cpu")


@pytest.mark.parametrize("name", TOPK_FAMILY)
def test_a_screened_step_is_that_of_fp32(name, monkeypatch):
    """It learns the same, its metrics' form is part of the state, and bf16 is screened with where it pays alone."""
    trained = {}
    for screened in (False, True):
        monkeypatch.setattr(screen, "pays", lambda *shape, screened=screened: screened)
        trained[screened] = make(name)
        train(trained[screened], batches(STEPS))
        assert trained[screened].screened == screened
        resumed = make(name)
        resumed.load_state_dict(trained[screened].state_dict())
        assert resumed.screened == screened
    for one, two in zip(*(trainer.ae.parameters() for trainer in trained.values()), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("first", [0.0, torch.nan])
@pytest.mark.parametrize("name", NAMES)
def test_weights_stay_finite_whatever_the_first_batches_are(name, first):
    trainer = make(name)
    train(trainer, [torch.full((B, D), first)] * 3)
    assert bool(trainer.stopped) == (first != 0)
    assert all(parameter.isfinite().all() for parameter in trainer.ae.parameters())


class Operations(TorchDispatchMode):
    """Counts what a step asks of a device: every operation but those that only look at a tensor in another way."""

    VIEWS = {"alias", "as_strided", "detach", "expand", "lift_fresh", "permute", "select", "slice", "squeeze", "t"} | {
        "transpose", "unbind", "unsqueeze", "view", "_unsafe_view"}  # fmt: skip

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += function.overloadpacket.__name__ not in self.VIEWS
        return function(*args, **(kwargs or {}))


OPERATIONS = {  # of a sparse step: on the CPU, and on the way that a GPU takes
    "p_anneal": (89, 92),
    "standard": (83, 86),
    "standard_new": (86, 89),
    "gated": (117, 120),
    "top_k": (100, 102),
    "batch_top_k": (107, 98),
    "matryoshka_batch_top_k": (153, 144),
    "jump_relu": (138, 141),
}


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "as on a gpu"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_takes_no_more_operations_than_before(name, gpu, monkeypatch, as_on_a_gpu):
    """Each costs a launch, and on the CPU a wait for all threads.  Where there are fewer, write the new number down."""
    if gpu:
        as_on_a_gpu()
    monkeypatch.setattr(trainer_module, "SPARSE_BELOW", {"cpu": 1.1})
    trainer, data = make(name, threshold_start_step=3) if name in TOPK_FAMILY else make(name), batches(7)
    train(trainer, data[:6])
    with Operations() as operations:
        trainer.update(6, data[6])
    assert operations.n == OPERATIONS[name][gpu]
