"""What is trained on both sides.

B tokens in a batch, D activation_dim, F dict_size, S steps.
"""

B, D, F, S = 32, 16, 64, 120
NORM_FACTOR = 3.0
BUFFER = {"d_submodule": D, "io": "out", "n_ctxs": 8, "ctx_len": 128, "refresh_batch_size": 4, "out_batch_size": B}
COMMON = {
    "steps": S,
    "activation_dim": D,
    "dict_size": F,
    "layer": 3,
    "lm_name": "EleutherAI/pythia-70m-deduped",
    "lr": 3e-3,
    "warmup_steps": 10,
    "decay_start": 90,
    "seed": 7,
    "device": "cpu",
    "wandb_name": "parity",
    "submodule_name": "resid_post_layer_3",
}
TOP_K = {"k": 4, "auxk_alpha": 1 / 32, "threshold_start_step": 40}
# gentle: with p down to 0.2 the reference's own weights move by 1e-3 when its input changes by 1e-7
ANNEAL = {
    "lr": 3e-4,
    "anneal_start": 40,
    "p_start": 1.0,
    "p_end": 0.5,
    "n_sparsity_updates": 10,
    "sparsity_queue_length": 12,  # longer than from one event to the next
}
# name of the architecture: (module, trainer, what it has beyond the common settings)
CASES = {
    "standard": ("standard", "StandardTrainer", {"l1_penalty": 0.1, "sparsity_warmup_steps": 30}),
    "standard_new": ("standard", "StandardTrainerAprilUpdate", {"l1_penalty": 0.1, "sparsity_warmup_steps": 30}),
    "p_anneal": (
        "p_anneal",
        "PAnnealTrainer",
        {"initial_sparsity_penalty": 0.05, "sparsity_function": "Lp^p", "sparsity_warmup_steps": 30, **ANNEAL},
    ),
    "gated": ("gdm", "GatedSAETrainer", {"l1_penalty": 0.1, "sparsity_warmup_steps": 30}),
    "top_k": ("top_k", "TopKTrainer", {**TOP_K, "lr": None}),
    "batch_top_k": ("batch_top_k", "BatchTopKTrainer", TOP_K),
    "matryoshka_batch_top_k": (
        "matryoshka_batch_top_k",
        "MatryoshkaBatchTopKTrainer",
        {**TOP_K, "group_fractions": [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 32]},
    ),
    "jump_relu": (
        "jumprelu",
        "JumpReluTrainer",
        {"target_l0": 8.0, "bandwidth": 0.05, "sparsity_warmup_steps": 30},
    ),
}
DEAD_AFTER = 6 * B  # tokens
# these have a second form of the step for sparse features, which must give the same weights
SPARSE_FORMS = {f"{name}, sparse step": name for name in ("standard", "standard_new", "p_anneal", "gated", "jump_relu")}
