"""What a sweep is: the run's options, the grid and its settings, the schedules, and the keywords of every trainer.

The values stand in `demo_config.py`; here is what they mean. Every field with a help text is a flag of `demo.py`, so
nothing heavy is imported: `--help` answers at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from types import UnionType
from typing import Any, Self, get_args, get_origin

# What the numbers of an evaluation depend on beside the SAE.
EVALUATION_SETTINGS = (
    "model_name",
    "revision",
    "dataset",
    "split",
    "subset",
    "eval_dataset",
    "eval_text_column",
    "eval_split",
    "eval_subset",
    "mixed_dataset",
    "chat_dataset",
    "chat_split",
    "chat_subset",
    "chat_fraction",
    "pack_chats",
    "context_length",
    "prepend_bos",
    "dtype",
    "quantization",
    "mask",
    "exclude_special_tokens",
    "eval_num_inputs",
    "random_seeds",
)
INTERRUPTED = 75  # exit code of a run that was stopped where --resume continues it (EX_TEMPFAIL of sysexits.h)
ENDED_EARLY = 3  # of one whose text ended before the asked tokens: its SAEs are written, --resume takes more text


def option(text: str, default: Any = MISSING, **metadata: Any) -> Any:
    """A field with the help text of its flag, and what else its parser is told: choices, nargs, metavar, `least`."""
    return field(default=default, metadata={"help": text, **metadata})


@dataclass(kw_only=True)
class Options:
    """A run, beside its grid."""

    save_dir: str = option("folder in which the run gets its own", "saes")
    model_name: str = option("Hub id or folder of a causal LM", "tiny-python")
    revision: str | None = option("of the model on the Hub: branch, tag or commit", None)
    layers: list[int] | None = option("layers that the SAEs read (default: the middle one)", None, least=0)
    architectures: list[str] = option("which kinds of SAE", None, metavar="NAME")
    preset: str | None = option("a published recipe in place of the defaults", None)
    device: str | None = option("cuda, cuda:1, mps, cpu, ... (default: the first of them that is there)", None)
    llm_device: str | None = option("where the language model runs (default: --device, as the SAEs)", None)
    device_map: str | None = option(
        "spread the language model over all GPUs and the CPU (needs accelerate)", None, choices=("auto",)
    )
    dry_run: bool = option("check everything, print the plan, and stop", False)
    resume: bool = option("continue this run where its last state was saved", False)
    overwrite: bool = option("delete an earlier run of the same name first", False)
    save_checkpoints: bool = option("also write SAEs at log-spaced steps", False)
    no_eval: bool = option("train only", False)
    init_from: str | None = option(
        "start from this trained SAE, or from those of a run folder by layer, width and architecture", None
    )
    cache: str | None = option("also write the activations of the run's layers into this folder", None)
    cache_only: bool = option("write them and train nothing; a later run trains from them with --activations", False)
    activations: str | None = option("train from the activations in this folder instead of model and text", None)
    eval_only: list[str] | None = option(
        "evaluate these run or SAE folders, train nothing", None, nargs="*", metavar="FOLDER"
    )
    any_model: bool = option("evaluate SAEs on a model that may not be the one they were trained on", False)
    use_wandb: bool = option("log to Weights & Biases", False)
    hf_repo_id: str | None = option("USER/REPO on the Hub that gets the run folder at the end", None)
    private: bool = option("create that repo as a private one", False)
    upload_only: str | None = option("upload this run folder, do nothing else", None, metavar="FOLDER")
    circuit_tracer: bool = option("also write a run's transcoders of all layers as circuit-tracer opens them", False)
    report: bool = option("write a page of its latents for every SAE", False)
    shard_latents: int = option("under torchrun, split every SAE over N processes", 1, metavar="N")
    timeout_minutes: float = option("under torchrun, how long processes wait for each other", 20.0)
    trust_remote_code: bool = option("let the model's repo bring code of its own", False)
    command: list[str] = field(default_factory=list)  # what was typed


@dataclass(kw_only=True)
class Sweep:
    """The grid, and everything that a user varies from run to run."""

    # -- the grid
    num_tokens: int = option("activations each SAE is trained on")
    dictionary_widths: list[int] = option("latents of the SAEs")
    learning_rates: list[float] = option("peak learning rates")
    random_seeds: list[int] = option("seeds of the SAEs' weights; the first also seeds the data", least=0)
    target_l0s: list[float] = option("k of the top-k family, target L0 of jump_relu")
    standard_penalties: list[float] = option("L1 penalties of standard and standard_new")
    p_anneal_penalties: list[float] = option("penalties of p_anneal")
    gated_penalties: list[float] = option("L1 penalties of gated")
    # -- where in a layer
    sites: list[str] = option(
        "what the SAEs read: resid_pre resid_mid resid_post attn_out mlp_out attn_z mlp_in, or any module by its path "
        "with {layer} in it, its output or, with .input behind it, its input",
        metavar="SITE",
    )
    transcoder: str | None = option("predict the MLP's output from its input instead", choices=("mlp",))
    site_in: str | None = option("of other transcoders: the site that is read", metavar="SITE")
    site_out: str | None = option("and the site of the same layer that is predicted", metavar="SITE")
    skip: bool = option("transcoders also learn a linear path beside their latents")
    # -- schedules, in steps
    warmup_steps: int = option("linear warm-up of the learning rate", least=0)
    sparsity_warmup_steps: int = option("linear warm-up of the penalties", least=0)
    decay_start_fraction: float = option("share of the run after which the learning rate falls to 0")
    threshold_start_step: int = option("step after which the top-k family records its threshold", least=0)
    anneal_start: int = option("step at which p_anneal begins to lower p", least=0)
    dead_after_tokens: int = option("tokens of silence after which a latent counts as dead", least=0)
    k_anneal_steps: int | None = option("top-k family: fall from the model's width to k over so many steps", least=0)
    resample_steps: int | None = option(
        "standard, p_anneal: revive dead latents this often; no decay for them", least=0
    )
    # -- text
    dataset: str = option("Hub id, file or folder, or python-stdlib (default: by model)")
    eval_dataset: str = option("the same for evaluation (default: a held-out part of --dataset)")
    text_column: str = option("column of the dataset that holds the text; a.b is b inside a")
    split: str = option("split of the dataset")
    subset: str | None = option("subset (configuration) of a Hub --dataset, as sample-10BT of fineweb")
    eval_text_column: str | None = option("of --eval_dataset (default: --text_column)")
    eval_split: str | None = option("of --eval_dataset (default: --split)")
    eval_subset: str | None = option("of --eval_dataset (default: --subset, where both are the same dataset)")
    epochs: int = option("times the dataset may be read")
    shuffle: bool = option("read the training text in a seeded order instead of the dataset's own")
    skip_damaged: bool = option("go on after a damaged file of a dataset, and count it, instead of stopping")
    mixed_dataset: bool = option("mix conversations into the text")
    chat_dataset: str = option("conversations for --mixed_dataset")
    chat_split: str = option("of --chat_dataset")
    chat_subset: str | None = option("of --chat_dataset")
    chat_fraction: float = option("share of the tokens that --mixed_dataset takes from them")
    text_shards: int | None = option(
        "parts of the text that take turns; as many processes can run the language model (default: one for each)"
    )
    pack_chats: bool = option("pack chats together instead of one to a context")
    # -- the language model
    context_length: int = option("tokens a context")
    prepend_bos: bool = option("begin contexts with the tokenizer's bos, or what stands in for it")
    llm_batch_size: int = option("contexts the language model reads at a time")
    dtype: str = option("of the language model", choices=("float32", "bfloat16", "float16"))
    quantization: str | None = option(
        "weights of the language model in so many bits (needs bitsandbytes)", choices=("8bit", "4bit")
    )
    attn_implementation: str | None = option("of the language model: eager, sdpa, flash_attention_2")
    # -- the SAEs and their buffer
    sae_batch_size: int = option("activations a training step")
    buffer_tokens: int = option("activations the buffer shuffles among")
    autocast: str | None = option(
        "dtype of the SAEs' matmuls (default: bfloat16 on CUDA)", choices=("float32", "bfloat16")
    )
    kernels: str = option("of the SAEs' training steps; triton is for GPUs", choices=("torch", "triton"))
    sae_threads: int | None = option(
        "CPU threads that step SAEs side by side; 1: SAEs in turn, by all threads (default: by a measurement)"
    )
    mask: bool = option("leave out padding, the marks between documents and positions of outlying norm")
    exclude_special_tokens: bool = option("leave out every special token of the tokenizer, those of chats too")
    center: bool = option("subtract the layer's mean from the activations; saved SAEs take them raw all the same")
    max_norm_multiple: float = option("a norm above this many medians is an outlier")
    # -- evaluation, logging, saving
    eval_num_inputs: int = option("contexts of evaluation")
    eval_batch_size: int | None = option("contexts at a time in evaluation (default: llm_batch_size / 4)")
    log_steps: int = option("steps between two lines of metrics.jsonl")
    backup_steps: int = option("steps between two states that --resume can continue from", least=0)
    backup_minutes: float = option("minutes after which a state is written in any case")
    wandb_project: str = option("W&B project")
    wandb_entity: str | None = option("W&B entity")

    @classmethod
    def of(cls, defaults: Mapping[str, Mapping[str, Any]], **values: Any) -> Self:
        """The sweep of these values; defaults: of all others, in groups, as `demo_config.DEFAULTS` has them."""
        return cls(**{name: value for group in defaults.values() for name, value in group.items()} | values)


def check_recorded(settings: Mapping[str, Any], whose: str) -> None:
    """ValueError where a file says of a setting what no flag could: settings are read from files that people edit."""
    for known in (*fields(Options), *fields(Sweep)):
        value = settings.get(known.name)
        if known.name in settings and not _can_be(value, known.type, known.metadata):
            raise ValueError(f"{whose} says {known.name} {value!r}, which it cannot be; restore it from a copy")


def _can_be(value: Any, annotation: Any, metadata: Mapping[str, Any]) -> bool:
    if isinstance(annotation, UnionType):
        return any(_can_be(value, part, metadata) for part in get_args(annotation))
    if get_origin(annotation) is list:
        (inner,) = get_args(annotation)
        return isinstance(value, list) and bool(value) and all(_can_be(item, inner, metadata) for item in value)
    if annotation is float:
        return type(value) in (int, float)
    if value is None or type(value) is not annotation:  # of bool and int too
        return value is None and annotation is type(None)
    return value in metadata.get("choices", (value,)) and (annotation is not int or value >= metadata.get("least", 1))


@dataclass(frozen=True)
class Architecture:
    """One row of the grid: which trainer, which of its settings the sweep varies, and what else it is given."""

    trainer: str
    varies: str  # keyword of the trainer
    values: str  # field of Sweep
    schedule: tuple[str, ...]  # settings of `Schedule` it takes, beside warmup_steps and decay_start
    settings: dict[str, Any] = field(default_factory=dict)
    wandb_prefix: str | None = None  # where it is not the trainer's name


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


def check_sweep(sweep: Sweep, architectures: Sequence[str]) -> None:
    """ValueError for values that do not go together."""
    if "p_anneal" in architectures and sweep.resample_steps:
        raise ValueError("--resample_steps cannot be combined with p_anneal in one run: give it to standard alone.")
    if not 0 < sweep.decay_start_fraction < 1:
        raise ValueError(f"--decay_start_fraction must lie between 0 and 1, got {sweep.decay_start_fraction}.")
    if not sweep.max_norm_multiple > 0:
        raise ValueError(f"--max_norm_multiple must be a positive number, got {sweep.max_norm_multiple}.")
    if not sweep.backup_minutes >= 0:
        raise ValueError(f"--backup_minutes must be a number, not a negative one, got {sweep.backup_minutes}.")
    if max(sweep.random_seeds) >= 2**63:
        raise ValueError(f"--random_seeds must be below 2**63, got {max(sweep.random_seeds)}.")
    if sweep.num_tokens < 20 * sweep.sae_batch_size:
        raise ValueError(
            f"--num_tokens {sweep.num_tokens:,} is too few: with --sae_batch_size {sweep.sae_batch_size:,} a run of at "
            f"least 20 steps needs {20 * sweep.sae_batch_size:,}."
        )


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
        k_anneal_steps=sweep.k_anneal_steps or None,
        resample_steps=sweep.resample_steps or None,
        scaled=scaled,
    )


def _whole(k: float) -> int:
    if not float(k).is_integer():
        raise ValueError(f"--target_l0s must be whole numbers for the top-k family, got {k}.")
    return int(k)


def get_trainer_configs(
    sweep: Sweep,
    rows: Mapping[str, Architecture],
    model_name: str,
    layer: int,
    activation_dim: int,
    device: str,
    site: str = "resid_post",
    site_out: str | None = None,
    output_dim: int | None = None,
) -> list[dict[str, Any]]:
    """The SAEs of one place, in the order that numbers them: the keywords of their trainers, and `trainer`, the class.

    Order: architecture (that of the rows), seed, width, learning rate, sparsity.
    site_out, output_dim: of transcoders, what they predict and its width.
    """
    from . import trainers
    from .sites import name_of, place_at

    for name in ("dictionary_widths", "learning_rates", "random_seeds", *(row.values for row in rows.values())):
        values = getattr(sweep, name)
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} has a value twice, which would train the same SAE twice: {values}.")
    schedule = get_schedule(sweep)
    submodule_name = name_of(place_at(layer, site), place_at(layer, site_out or site))
    places: dict[str, Any] = {"site": site, "site_out": site_out or site}
    if site_out not in (None, site):
        places |= {"output_dim": output_dim, "skip": sweep.skip}
    configs: list[dict[str, Any]] = []
    for row in rows.values():
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
                                **places,
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
