"""The grid, its order and its schedules; the flags that vary them."""

import argparse
import dataclasses

import pytest

import demo
from demo_config import ARCHITECTURES, DEFAULTS, LLM_CONFIG, PRESET_LAYERS, PRESETS
from dictionary_learning.plan import checkpoint_steps
from dictionary_learning.sweep import Sweep, get_schedule, get_trainer_configs


def parse(*flags) -> argparse.Namespace:
    return demo.build_parser().parse_args(list(map(str, flags)))


def grid(sweep: Sweep, architectures=tuple(ARCHITECTURES)):
    rows = {name: row for name, row in ARCHITECTURES.items() if name in architectures}
    return get_trainer_configs(sweep, rows, "EleutherAI/pythia-70m-deduped", 3, 512, "cpu")


def test_defaults_are_the_references():
    _, sweep = demo.resolve(parse("--model_name", "EleutherAI/pythia-70m-deduped"))
    schedule = get_schedule(sweep)
    assert (schedule.steps, schedule.decay_start) == (244140, 195312)
    assert (schedule.warmup_steps, schedule.sparsity_warmup_steps) == (1000, 5000)
    assert (schedule.threshold_start_step, schedule.threshold_beta) == (1000, 0.999)
    assert (schedule.anneal_start, schedule.dead_feature_threshold) == (10000, 10_000_000)
    assert schedule.scaled == {}
    configs = grid(sweep)
    assert len(configs) == 4 * 12 + 4 * 4
    assert [config["trainer"].__name__ for config in configs[::4]] == [
        *["PAnnealTrainer"] * 3,
        *["StandardTrainer"] * 3,
        *["StandardTrainerAprilUpdate"] * 3,
        *["GatedSAETrainer"] * 3,
        "TopKTrainer",
        "BatchTopKTrainer",
        "MatryoshkaBatchTopKTrainer",
        "JumpReluTrainer",
    ]


def test_grid_order_is_seed_width_learning_rate_sparsity():
    sweep = Sweep.of(
        DEFAULTS, random_seeds=[0, 1], dictionary_widths=[64, 128], learning_rates=[0.1, 0.2], target_l0s=[4, 8]
    )
    seen = [(c["seed"], c["dict_size"], c["lr"], c["k"]) for c in grid(sweep, ["batch_top_k"])]
    assert seen == sorted(seen) and len(set(seen)) == 16
    names = [config["wandb_name"] for config in grid(sweep, ["gated", "batch_top_k"])]
    assert names[0] == "GatedTrainer-EleutherAI/pythia-70m-deduped-resid_post_layer_3_trainer_0"
    assert [name.rsplit("_", 1)[1] for name in names] == [str(i) for i in range(len(names))]
    reversed_order = grid(sweep, ["batch_top_k", "gated"])  # the command line's order plays no part
    assert [config["wandb_name"] for config in reversed_order] == names


@pytest.mark.parametrize("num_tokens", [20 * 2048, 1_000_000, 2_560_000, 12_800_000])
def test_schedules_fit_runs_of_any_length(num_tokens):
    schedule = get_schedule(sweep := Sweep.of(DEFAULTS, num_tokens=num_tokens))
    for config in grid(sweep):
        config["trainer"].Config(**{name: value for name, value in config.items() if name != "trainer"})
    assert schedule.scaled  # and the plan says so
    assert schedule.threshold_start_step < schedule.steps - 1 and schedule.anneal_start < schedule.steps


def test_flags_come_before_preset_before_model_before_default():
    model = "google/gemma-2-2b"
    _, sweep = demo.resolve(parse("--model_name", model, "--preset", "saebench", "--num_tokens", "5e7", "--mask"))
    assert sweep.dtype == LLM_CONFIG[model]["dtype"] == "bfloat16"
    assert sweep.target_l0s == PRESETS["saebench"]["target_l0s"] == [20, 40, 80, 160, 320, 640]
    assert sweep.num_tokens == 50_000_000 and sweep.mask is True
    assert sweep.log_steps == DEFAULTS["evaluation, logging, saving"]["log_steps"]


def test_saebench_preset():
    for model, (layer,) in PRESET_LAYERS["saebench"].items():
        _, sweep = demo.resolve(parse("--model_name", model, "--preset", "saebench"))
        assert (sweep.num_tokens, sweep.dictionary_widths, sweep.mask) == (500_000_000, [4096, 16384, 65536], False)
        assert (sweep.context_length, sweep.sae_batch_size, sweep.learning_rates) == (1024, 2048, [3e-4])
        assert layer == {"EleutherAI/pythia-160m-deduped": 8, "google/gemma-2-2b": 12}[model]


def test_every_field_of_the_sweep_is_a_flag():
    flags = vars(parse())
    assert {field.name for field in dataclasses.fields(Sweep)} <= flags.keys()
    _, sweep = demo.resolve(
        parse("--dictionary_widths", 8, "1_6", "--learning_rates", "1e-3", "--target_l0s", "3.5", "--no-mask")
    )
    assert (sweep.dictionary_widths, sweep.learning_rates, sweep.target_l0s) == ([8, 16], [1e-3], [3.5])
    assert sweep.mask is False


def test_checkpoints_are_at_the_references_steps():
    plan = argparse.Namespace(schedule=argparse.Namespace(steps=244140))
    assert checkpoint_steps(plan) == [0, 244, 772, 2441, 7720, 24414, 77203]


@pytest.mark.parametrize("flag, value", [("--num_tokens", "-5"), ("--num_tokens", "many"), ("--dtype", "int8")])
def test_values_that_are_none_are_refused(flag, value, capsys):
    with pytest.raises(SystemExit):
        parse(flag, value)
    assert flag in capsys.readouterr().err
