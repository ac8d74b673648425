"""What a sweep is made of: the grid, the models, the presets.  Edit here, or give the flag of the same name.

Every field of `Sweep` is a flag of `demo.py`.  A run's values are the field's default, overridden by its model's row in
LLM_CONFIG, then by its preset, then by the flags.  Nothing heavy is imported, so that `--help` answers at once.
"""

from dataclasses import dataclass, field
from typing import Any

TINY_MODEL = "tiny-python"


def option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field with the help text of its flag."""
    metadata = {"help": text, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class Sweep:
    # -- the grid
    num_tokens: int = option(500_000_000, "activations each SAE is trained on")
    dictionary_widths: list[int] = option([2**14, 2**16], "latents of the SAEs")
    learning_rates: list[float] = option([3e-4], "peak learning rates")
    random_seeds: list[int] = option([0], "seeds of the SAEs' weights; the first also seeds the data")
    target_l0s: list[float] = option([80, 160], "k of the top-k family, target L0 of jump_relu")
    standard_penalties: list[float] = option(
        [0.012, 0.015, 0.02, 0.03, 0.04, 0.06], "L1 penalties of standard and standard_new"
    )
    p_anneal_penalties: list[float] = option([0.006, 0.008, 0.01, 0.015, 0.02, 0.025], "penalties of p_anneal")
    gated_penalties: list[float] = option([0.012, 0.018, 0.024, 0.04, 0.06, 0.08], "L1 penalties of gated")
    # -- schedules, in steps; scaled down where a run is too short for them
    warmup_steps: int = option(1000, "linear warm-up of the learning rate")
    sparsity_warmup_steps: int = option(5000, "linear warm-up of the penalties")
    decay_start_fraction: float = option(0.8, "share of the run after which the learning rate falls to 0")
    threshold_start_step: int = option(1000, "step after which the top-k family records its threshold")
    anneal_start: int = option(10000, "step at which p_anneal begins to lower p")
    dead_after_tokens: int = option(10_000_000, "tokens of silence after which a latent counts as dead")
    k_anneal_steps: int | None = option(None, "top-k family: fall from the model's width to k over so many steps")
    resample_steps: int | None = option(None, "standard, p_anneal: revive dead latents this often; no decay for them")
    # -- text
    dataset: str | None = option(None, "Hub id, file or folder, or python-stdlib; default by model")
    eval_dataset: str | None = option(None, "the same for evaluation; default: a held-out part of --dataset")
    text_column: str = option("text", "column of the dataset that holds the text")
    split: str = option("train", "split of both datasets")
    subset: str | None = option(None, "subset (configuration) of a Hub --dataset, as sample-10BT of fineweb")
    epochs: int = option(1, "times the dataset may be read")
    chat_dataset: str = option("lmsys/lmsys-chat-1m", "conversations for --mixed_dataset")
    chat_fraction: float = option(0.1, "share of the tokens that --mixed_dataset takes from them")
    text_shards: int | None = option(
        None, "parts of the text that take turns; as many processes can run the language model; default: one for each"
    )
    pack_chats: bool = option(False, "pack chats together instead of one to a context")
    # -- the language model
    context_length: int = option(1024, "tokens a context")
    llm_batch_size: int = option(16, "contexts the language model reads at a time")
    dtype: str = option("float32", "of the language model", ("float32", "bfloat16", "float16"))
    attn_implementation: str | None = option(None, "of the language model: eager, sdpa, flash_attention_2")
    # -- the SAEs and their buffer
    sae_batch_size: int = option(2048, "activations a training step")
    buffer_tokens: int = option(250_000, "activations the buffer shuffles among")
    autocast: str | None = option(None, "dtype of the SAEs' matmuls; default bfloat16 on CUDA", ("float32", "bfloat16"))
    kernels: str = option("torch", "of the SAEs' training steps; triton is for GPUs", ("torch", "triton"))
    mask: bool = option(True, "leave out bos, padding and positions of outlying norm")
    max_norm_multiple: float = option(10.0, "a norm above this many medians is an outlier")
    # -- evaluation, logging, saving
    eval_num_inputs: int = option(200, "contexts of evaluation")
    eval_batch_size: int | None = option(None, "contexts at a time in evaluation; default: llm_batch_size / 4")
    log_steps: int = option(100, "steps between two lines of metrics.jsonl")
    backup_steps: int = option(1000, "steps between two states that --resume can continue from")
    backup_minutes: float = option(30.0, "minutes after which a state is written in any case")
    wandb_project: str = option("sae-sweep", "W&B project")
    wandb_entity: str | None = option(None, "W&B entity")


# How each model is run where it is known; any other causal LM runs with the defaults above.
LLM_CONFIG: dict[str, dict[str, Any]] = {
    TINY_MODEL: dict(
        dataset="python-stdlib",
        context_length=128,
        llm_batch_size=32,
        sae_batch_size=512,
        buffer_tokens=51_200,
        num_tokens=600_000,
        dictionary_widths=[1024],
        learning_rates=[1e-3],
        target_l0s=[16, 32, 64],
        standard_penalties=[0.08, 0.14, 0.24],
        p_anneal_penalties=[0.03, 0.06, 0.12],
        gated_penalties=[0.1, 0.18, 0.3],
        log_steps=50,
        eval_num_inputs=128,
    ),
    "EleutherAI/pythia-70m-deduped": dict(llm_batch_size=64),
    "EleutherAI/pythia-160m-deduped": dict(llm_batch_size=32),
    "google/gemma-2-2b": dict(llm_batch_size=4, dtype="bfloat16"),
    "Qwen/Qwen3-8B": dict(llm_batch_size=4, context_length=2048, dtype="bfloat16"),
    "Qwen/Qwen2.5-Coder-32B-Instruct": dict(llm_batch_size=4, context_length=2048, dtype="bfloat16"),
}

# What a bare `python demo.py` runs, and every run in which these are not given.
DEFAULT_ARCHITECTURES = ["top_k", "batch_top_k"]
DEFAULT_LAYERS = {TINY_MODEL: [2]}
DEFAULT_DATASET = ("HuggingFaceFW/fineweb", "monology/pile-uncopyrighted")  # of Hub models: training, evaluation


@dataclass(frozen=True)
class Architecture:
    """One row of the grid: which trainer, which of its settings the sweep varies, and what else it is given."""

    trainer: str
    varies: str  # keyword of the trainer
    values: str  # field of Sweep
    schedule: tuple[str, ...]  # settings of `Schedule` it takes, beside warmup_steps and decay_start
    settings: dict[str, Any] = field(default_factory=dict)
    wandb_prefix: str | None = None  # where it is not the trainer's name


TOPK_SCHEDULE = ("threshold_start_step", "threshold_beta", "k_anneal_steps")

# In the order that numbers the trainers.
ARCHITECTURES: dict[str, Architecture] = {
    "p_anneal": Architecture(
        "PAnnealTrainer",
        "initial_sparsity_penalty",
        "p_anneal_penalties",
        ("sparsity_warmup_steps", "anneal_start", "resample_steps"),
        {"sparsity_function": "Lp^p", "p_start": 1.0, "p_end": 0.2},
    ),
    "standard": Architecture(
        "StandardTrainer", "l1_penalty", "standard_penalties", ("sparsity_warmup_steps", "resample_steps")
    ),
    "standard_new": Architecture(
        "StandardTrainerAprilUpdate",
        "l1_penalty",
        "standard_penalties",
        ("sparsity_warmup_steps",),
        wandb_prefix="StandardTrainerNew",
    ),
    "gated": Architecture(
        "GatedSAETrainer", "l1_penalty", "gated_penalties", ("sparsity_warmup_steps",), wandb_prefix="GatedTrainer"
    ),
    "top_k": Architecture("TopKTrainer", "k", "target_l0s", TOPK_SCHEDULE),
    "batch_top_k": Architecture("BatchTopKTrainer", "k", "target_l0s", TOPK_SCHEDULE),
    "matryoshka_batch_top_k": Architecture(
        "MatryoshkaBatchTopKTrainer",
        "k",
        "target_l0s",
        TOPK_SCHEDULE,
        {"group_fractions": [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 32]},
    ),
    "jump_relu": Architecture("JumpReluTrainer", "target_l0", "target_l0s", ("sparsity_warmup_steps",)),
}


# SAE Bench's recipe; each value with its source.
#   widths, L0 targets, 500M tokens, batch 2048, lr 3e-4   SAE Bench, https://arxiv.org/abs/2503.09532, on training
#   context length 1024, penalties, schedules              demo_config.py of adamkarvonen/dictionary_learning_demo
#   the Pile for training and evaluation                   the same, before May 2025, when the SAEs were trained
#   no mask                                                the same: every position was trained on
PRESETS: dict[str, dict[str, Any]] = {
    "saebench": dict(
        num_tokens=500_000_000,
        dictionary_widths=[2**12, 2**14, 2**16],
        learning_rates=[3e-4],
        random_seeds=[0],
        target_l0s=[20, 40, 80, 160, 320, 640],
        dataset="monology/pile-uncopyrighted",
        eval_dataset="monology/pile-uncopyrighted",
        context_length=1024,
        sae_batch_size=2048,
        mask=False,
    ),
}
PRESET_LAYERS = {"saebench": {"EleutherAI/pythia-160m-deduped": [8], "google/gemma-2-2b": [12]}}


@dataclass(frozen=True)
class Schedule:
    """The steps at which a run's schedules begin and end, and what had to be scaled down for them to fit."""

    steps: int
    warmup_steps: int
    sparsity_warmup_steps: int
    decay_start: int
    threshold_start_step: int
    threshold_beta: float
    anneal_start: int
    dead_feature_threshold: int
    k_anneal_steps: int | None
    resample_steps: int | None
    scaled: dict[str, tuple[Any, Any]]  # name -> (asked, used)


# The largest share of a run that each schedule may take.
SHORT_RUN_SHARES = {
    "warmup_steps": 0.05,
    "sparsity_warmup_steps": 0.25,
    "threshold_start_step": 0.1,
    "anneal_start": 0.25,
    "dead_after_tokens": 0.1,
}
THRESHOLD_WINDOW = (1000, 0.05)  # steps the threshold averages over, and the largest share of a run


def get_schedule(sweep: Sweep) -> Schedule:
    """The schedules of a run, each cut to its share of a run that is too short for it."""
    steps = sweep.num_tokens // sweep.sae_batch_size
    scaled: dict[str, tuple[Any, Any]] = {}

    def fit(name: str, total: int) -> int:
        asked = getattr(sweep, name)
        used = min(asked, int(SHORT_RUN_SHARES[name] * total))
        if used != asked:
            scaled[name] = (asked, used)
        return used

    asked_window, share = THRESHOLD_WINDOW
    window = max(min(asked_window, int(share * steps)), 1)
    if window != asked_window:
        scaled["threshold_beta"] = (1 - 1 / asked_window, 1 - 1 / window)
    return Schedule(
        steps=steps,
        warmup_steps=fit("warmup_steps", steps),
        sparsity_warmup_steps=fit("sparsity_warmup_steps", steps),
        decay_start=int(steps * sweep.decay_start_fraction),
        threshold_start_step=fit("threshold_start_step", steps),
        threshold_beta=1 - 1 / window,
        anneal_start=fit("anneal_start", steps),
        dead_feature_threshold=fit("dead_after_tokens", sweep.num_tokens),
        k_anneal_steps=sweep.k_anneal_steps,
        resample_steps=sweep.resample_steps,
        scaled=scaled,
    )


def _whole(k: float) -> int:
    if k != int(k):
        raise ValueError(f"--target_l0s must be whole numbers for the top-k family, got {k}.")
    return int(k)


def get_trainer_configs(
    sweep: Sweep, architectures: list[str], model_name: str, layer: int, activation_dim: int, device: str
) -> list[dict[str, Any]]:
    """The SAEs of one layer, in the order that numbers them: the keywords of their trainers, and `trainer`, the class.

    Order: architecture (that of ARCHITECTURES), seed, width, learning rate, sparsity.
    """
    from dictionary_learning import trainers

    schedule = get_schedule(sweep)
    submodule_name = f"resid_post_layer_{layer}"
    configs: list[dict[str, Any]] = []
    for row in (row for name, row in ARCHITECTURES.items() if name in architectures):
        prefix = row.wandb_prefix or row.trainer
        resampled = "resample_steps" in row.schedule and schedule.resample_steps is not None
        for seed in sweep.random_seeds:
            for width in sweep.dictionary_widths:
                for lr in sweep.learning_rates:
                    for value in getattr(sweep, row.values):
                        configs.append(
                            {
                                "trainer": getattr(trainers, row.trainer),
                                "activation_dim": activation_dim,
                                "dict_size": width,
                                "seed": seed,
                                "lr": lr,
                                row.varies: _whole(value) if row.varies == "k" else value,
                                "device": device,
                                "layer": layer,
                                "lm_name": model_name,
                                "submodule_name": submodule_name,
                                "wandb_name": f"{prefix}-{model_name}-{submodule_name}_trainer_{len(configs)}",
                                "steps": schedule.steps,
                                "warmup_steps": schedule.warmup_steps,
                                "decay_start": None if resampled else schedule.decay_start,
                                "dead_feature_threshold": schedule.dead_feature_threshold,
                                **{name: getattr(schedule, name) for name in row.schedule},
                                **row.settings,
                            }
                        )
    return configs
