"""What users edit: the values of a sweep, the models, the grid's rows, the presets.

What each value means, `dictionary_learning/sweep.py` says, and `python demo.py --help`; each can also be given as the
flag of the same name.  A run's values are those of DEFAULTS, overridden by its model's row in LLM_CONFIG, then by its
preset, then by the flags.
"""

from typing import Any

from dictionary_learning.sweep import Architecture

TINY_MODEL = "tiny-python"

DEFAULTS: dict[str, dict[str, Any]] = {
    "the grid": dict(
        num_tokens=500_000_000,
        dictionary_widths=[2**14, 2**16],
        learning_rates=[3e-4],
        random_seeds=[0],
        target_l0s=[80, 160],
        standard_penalties=[0.012, 0.015, 0.02, 0.03, 0.04, 0.06],
        p_anneal_penalties=[0.006, 0.008, 0.01, 0.015, 0.02, 0.025],
        gated_penalties=[0.012, 0.018, 0.024, 0.04, 0.06, 0.08],
    ),
    "where in a layer": dict(
        sites=["resid_post"],
        transcoder=None,
        site_in=None,
        site_out=None,
        skip=False,
    ),
    "schedules, in steps; scaled down where a run is too short for them": dict(
        warmup_steps=1000,
        sparsity_warmup_steps=5000,
        decay_start_fraction=0.8,
        threshold_start_step=1000,
        anneal_start=10000,
        dead_after_tokens=10_000_000,
        k_anneal_steps=None,
        resample_steps=None,
    ),
    "text": dict(
        dataset=None,
        eval_dataset=None,
        text_column="text",
        split="train",
        subset=None,
        eval_text_column=None,
        eval_split=None,
        eval_subset=None,
        epochs=1,
        shuffle=False,
        skip_damaged=False,
        mixed_dataset=False,
        chat_dataset="lmsys/lmsys-chat-1m",
        chat_split="train",
        chat_subset=None,
        chat_fraction=0.1,
        text_shards=None,
        pack_chats=False,
    ),
    "the language model": dict(
        context_length=1024,
        prepend_bos=True,
        llm_batch_size=16,
        dtype="float32",
        quantization=None,
        attn_implementation=None,
    ),
    "the SAEs and their buffer": dict(
        sae_batch_size=2048,
        buffer_tokens=250_000,
        autocast=None,
        kernels="torch",
        sae_threads=None,
        mask=True,
        exclude_special_tokens=False,
        max_norm_multiple=10.0,
        center=False,
    ),
    "evaluation, logging, saving": dict(
        eval_num_inputs=200,
        eval_batch_size=None,
        log_steps=100,
        backup_steps=1000,
        backup_minutes=30.0,
        wandb_project="sae-sweep",
        wandb_entity=None,
    ),
}

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
