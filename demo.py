"""Train, evaluate and share sparse autoencoders on a language model.

This file is the command line: it turns flags and demo_config.py into a plan, checks it, and walks the plan through
training, evaluation, plot and upload.  The science is in `dictionary_learning/`.

Started by torchrun, every process (rank) walks the same plan: each trains and evaluates its share of the SAEs and runs
the language model on its share of the text; rank 0 speaks, and writes what belongs to the whole run.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import demo_config
from demo_config import ARCHITECTURES, LLM_CONFIG, PRESETS, TINY_MODEL, Schedule, Sweep

if TYPE_CHECKING:
    from dictionary_learning.state import SavedState

    from dictionary_learning.kernels import Shard
    from dictionary_learning.tracking import Tracker
    from dictionary_learning.world import World

INTERRUPTED = 75  # exit code of a run that a signal stopped and --resume continues (EX_TEMPFAIL of sysexits.h)

EXAMPLES = f"""\
examples:
  python demo.py
      a small sweep on the built-in model and text; nothing is downloaded
  python demo.py --save_dir saes --model_name EleutherAI/pythia-70m-deduped --layers 3 \\
      --architectures standard jump_relu batch_top_k top_k gated
  python demo.py --model_name google/gemma-2-2b --layers 5 12 19 --architectures batch_top_k --preset saebench
      gated model: accept its licence on the Hub and run `hf auth login` first
  python demo.py --save_dir saes --model_name Qwen/Qwen3-8B --layers 9 18 27 --architectures batch_top_k \\
      --mixed_dataset --use_wandb --hf_repo_id USER/REPO
  python demo.py --model_name ./my-finetune --layers 12 --dataset ./texts --text_column body --epochs 2
      any causal LM and any text, from the Hub or the disk
  torchrun --nproc_per_node 8 demo.py --model_name google/gemma-2-2b --layers 5 12 19
      the same sweep on eight GPUs

exit codes: 0 done, 2 something to mend in the command or its surroundings, {INTERRUPTED} stopped after a saved state
(by a signal, for want of text, or because a process was lost) and resumable with --resume, 130 stopped at once by a
second Ctrl-C.
"""


# -- flags


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train, evaluate and share sparse autoencoders (SAEs) on a language model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run = parser.add_argument_group("the run")
    run.add_argument("--save_dir", default="saes", help="folder in which the run gets its own (default: saes)")
    run.add_argument(
        "--model_name", default=TINY_MODEL, help=f"Hub id or folder of a causal LM (default: {TINY_MODEL})"
    )
    run.add_argument("--revision", help="of the model on the Hub: branch, tag or commit")
    run.add_argument(
        "--layers", type=int, nargs="+", help="layers whose output the SAEs read (default: the middle one)"
    )
    run.add_argument(
        "--architectures", nargs="+", choices=list(ARCHITECTURES), metavar="NAME", help=_architectures_help()
    )
    run.add_argument("--preset", choices=list(PRESETS), help="a published recipe in place of the defaults")
    run.add_argument(
        "--device", help="cuda, cuda:1, mps, cpu, ... (default: the first of cuda, mps, cpu that is there)"
    )
    run.add_argument("--mixed_dataset", action="store_true", help="mix conversations into the text (--chat_*)")
    run.add_argument("--dry_run", action="store_true", help="check everything, print the plan, and stop")
    run.add_argument("--resume", action="store_true", help="continue this run where its last state was saved")
    run.add_argument("--overwrite", action="store_true", help="delete an earlier run of the same name first")
    run.add_argument("--save_checkpoints", action="store_true", help="also write SAEs at log-spaced steps")
    run.add_argument("--no_eval", action="store_true", help="train only")
    run.add_argument(
        "--eval_only", nargs="*", metavar="FOLDER", help="evaluate these run or SAE folders, train nothing"
    )
    run.add_argument("--use_wandb", action="store_true", help="log to Weights & Biases")
    run.add_argument("--hf_repo_id", help="USER/REPO on the Hub that gets the run folder at the end")
    run.add_argument("--private", action="store_true", help="create that repo as a private one")
    run.add_argument("--upload_only", metavar="FOLDER", help="upload this run folder, do nothing else")
    run.add_argument("--report", action="store_true", help="write a page of its latents for every SAE")
    run.add_argument(
        "--shard_latents", type=_count, default=1, metavar="N", help="under torchrun, split every SAE over N processes"
    )
    run.add_argument(
        "--timeout_minutes", type=float, default=20, help="under torchrun, how long processes wait for each other"
    )
    run.add_argument("--trust_remote_code", action="store_true", help="let the model's repo bring code of its own")

    sweep = parser.add_argument_group("the sweep (defaults: demo_config.py)")
    for field in dataclasses.fields(Sweep):
        sweep.add_argument(f"--{field.name}", default=None, help=field.metadata["help"], **_kind(field))
    return parser


def _architectures_help() -> str:
    return f"any of: {' '.join(ARCHITECTURES)} (default: {' '.join(demo_config.DEFAULT_ARCHITECTURES)})"


def _kind(field: dataclasses.Field) -> dict[str, Any]:
    """How argparse reads the flag of a field of Sweep, from its annotation."""
    annotation = str(field.type)
    if field.type is bool:
        return {"action": argparse.BooleanOptionalAction}
    kinds: dict[str, Any] = {"int": _count, "float": float, "str": str}
    kind = next(kinds[name] for name in ("float", "int", "str") if name in annotation)
    many = {"nargs": "+"} if "list" in annotation else {}
    choices = {"choices": field.metadata["choices"]} if field.metadata["choices"] else {}
    return {"type": kind, **many, **choices}


def _count(text: str) -> int:
    """An integer, also written 50_000_000 or 5e7."""
    value = float(text)
    if not value.is_integer() or value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(value)


def resolve_sweep(args: argparse.Namespace) -> Sweep:
    """Defaults, overridden by the model's row, the preset and the flags, in this order."""
    flags = {field.name: getattr(args, field.name) for field in dataclasses.fields(Sweep)}
    given = {name: value for name, value in flags.items() if value is not None}
    values = LLM_CONFIG.get(args.model_name, {}) | PRESETS.get(args.preset, {}) | given
    sweep = Sweep(**values)
    if "p_anneal" in (args.architectures or []) and sweep.resample_steps:
        raise ValueError("--resample_steps cannot be combined with p_anneal in one run: give it to standard alone.")
    if not 0 < sweep.decay_start_fraction < 1:
        raise ValueError(f"--decay_start_fraction must lie between 0 and 1, got {sweep.decay_start_fraction}.")
    if sweep.num_tokens < 20 * sweep.sae_batch_size:
        raise ValueError(
            f"--num_tokens {sweep.num_tokens:,} is too few: with --sae_batch_size {sweep.sae_batch_size:,} a run of at "
            f"least 20 steps needs {20 * sweep.sae_batch_size:,}."
        )
    return sweep


# -- the plan


@dataclass
class Plan:
    """Everything that is known before a weight is loaded."""

    args: argparse.Namespace
    sweep: Sweep
    schedule: Schedule
    folder: Path
    model_name: str
    layers: list[int]
    architectures: list[str]
    device: str
    world: "World"
    text_shards: int
    activation_dim: int
    n_layers: int
    llm_parameters: int
    configs: list[dict[str, Any]]  # of all layers, in order
    dataset: str
    eval_dataset: str
    held_out: bool  # evaluation text is the held-out part of the training set

    @property
    def autocast(self) -> str:
        return self.sweep.autocast or ("bfloat16" if self.device.startswith("cuda") else "float32")

    @property
    def groups(self) -> list[list[int]]:
        """The ranks of each owner of SAEs: with --shard_latents N, N neighbours."""
        n = self.args.shard_latents
        return [list(range(first, first + n)) for first in range(0, self.world.size, n)]

    def led(self, owners: list[int]) -> list[int]:
        """The SAEs that this rank writes: of its group's, if it is the first of the group."""
        return [i for i, owner in enumerate(owners) if self.world.rank == self.groups[owner][0]]

    @property
    def sae_folders(self) -> list[Path]:
        folders, n_before = [], dict.fromkeys(self.layers, 0)
        for config in self.configs:
            layer = config["layer"]
            folders.append(self.folder / f"resid_post_layer_{layer}" / f"trainer_{n_before[layer]}")
            n_before[layer] += 1
        return folders

    def settings(self) -> dict[str, Any]:
        """What makes two runs the same run: `run.json` keeps it, `--resume` compares it."""
        return {
            "model_name": self.model_name,
            "revision": self.args.revision,
            "layers": self.layers,
            "architectures": self.architectures,
            "preset": self.args.preset,
            "mixed_dataset": self.args.mixed_dataset,
            **dataclasses.asdict(self.sweep),
            "text_shards": self.text_shards,
            "dataset": self.dataset,
            "eval_dataset": self.eval_dataset,
            "eval_is_held_out": self.held_out,
            "autocast": self.autocast,
            "save_checkpoints": self.args.save_checkpoints,
        }


def run_folder(args: argparse.Namespace, architectures: list[str]) -> Path:
    """`<save_dir>/<model>_<arch>_<arch>...`; a local model goes by the name of its folder."""
    name = Path(args.model_name).resolve().name if os.path.isdir(args.model_name) else args.model_name
    return Path(args.save_dir) / "_".join([name.replace("/", "_"), *architectures])


def make_plan(args: argparse.Namespace, world: "World") -> Plan:
    """Resolve the flags against the model and the machine; ValueError for what cannot work."""
    sweep = resolve_sweep(args)
    schedule = demo_config.get_schedule(sweep)
    from dictionary_learning.model import model_shape, resolve_device

    device = str(world.place(resolve_device(args.device)))
    shape = model_shape(args.model_name, revision=args.revision, trust_remote_code=args.trust_remote_code)
    layers = args.layers or _default_layers(args, shape.n_layers)
    if len(set(layers)) != len(layers):
        raise ValueError(f"--layers names a layer twice: {layers}.")
    shape = model_shape(
        args.model_name, last_layer=max(layers), revision=args.revision, trust_remote_code=args.trust_remote_code
    )
    for layer in layers:
        if not 0 <= layer < shape.n_layers:
            raise ValueError(f"model {args.model_name} has layers 0 to {shape.n_layers - 1}, not {layer}.")
    if shape.context_limit is not None and sweep.context_length > shape.context_limit:
        raise ValueError(
            f"--context_length {sweep.context_length} is more than the {shape.context_limit} tokens "
            f"{args.model_name} can read."
        )
    architectures = args.architectures or demo_config.DEFAULT_ARCHITECTURES
    configs = [
        config
        for layer in layers
        for config in demo_config.get_trainer_configs(
            sweep, architectures, args.model_name, layer, shape.activation_dim, device
        )
    ]
    for config in configs:  # the trainers' own checks, before anything is loaded
        config["trainer"].Config(**{name: value for name, value in config.items() if name != "trainer"})
    check_split(args, sweep, world)
    if sweep.kernels == "triton" and not device.startswith("cuda"):
        raise ValueError(f"--kernels triton needs a GPU, not --device {device}.")
    if sweep.buffer_tokens < 2 * sweep.sae_batch_size:
        raise ValueError(
            f"--buffer_tokens {sweep.buffer_tokens:,} must hold at least two batches of --sae_batch_size "
            f"{sweep.sae_batch_size:,}."
        )
    train_default, eval_default = demo_config.DEFAULT_DATASET
    dataset = sweep.dataset or train_default
    eval_dataset = sweep.eval_dataset or (eval_default if sweep.dataset is None else dataset)
    return Plan(
        args=args,
        sweep=sweep,
        schedule=schedule,
        folder=run_folder(args, architectures),
        model_name=args.model_name,
        layers=layers,
        architectures=architectures,
        device=device,
        world=world,
        text_shards=sweep.text_shards or world.size,
        activation_dim=shape.activation_dim,
        n_layers=shape.n_layers,
        llm_parameters=shape.n_parameters,
        configs=configs,
        dataset=dataset,
        eval_dataset=eval_dataset,
        held_out=eval_dataset == dataset,
    )


def check_split(args: argparse.Namespace, sweep: Sweep, world: "World") -> None:
    n = args.shard_latents
    if world.size % n:
        raise ValueError(f"--shard_latents {n} needs a multiple of {n} processes from torchrun, not {world.size}.")
    for width in sweep.dictionary_widths:
        if width % n:
            raise ValueError(f"--shard_latents {n} cannot split {width} latents evenly.")
    if n > 1 and sweep.resample_steps:
        raise ValueError("--shard_latents cannot be combined with --resample_steps.")


def _default_layers(args: argparse.Namespace, n_layers: int) -> list[int]:
    preset = demo_config.PRESET_LAYERS.get(args.preset or "", {})
    return preset.get(args.model_name) or demo_config.DEFAULT_LAYERS.get(args.model_name) or [n_layers // 2]


@dataclass
class Needs:
    """Bytes a run will take."""

    llm: int
    buffer: int
    saes: int
    step: int
    disk: int


def needs(plan: Plan) -> Needs:
    """Weights, two moments and one gradient at a time in fp32; the disk holds each SAE twice, and two states."""
    sweep = plan.sweep
    parameters = [2 * c["activation_dim"] * c["dict_size"] + c["dict_size"] + c["activation_dim"] for c in plan.configs]
    width = max(c["dict_size"] for c in plan.configs)
    element = 4 if sweep.dtype == "float32" else 2
    buffer = sweep.buffer_tokens * len(plan.layers) * plan.activation_dim * element
    n_files = 2 + (len(checkpoint_steps(plan)) if plan.args.save_checkpoints else 0)
    return Needs(
        llm=plan.llm_parameters * element,
        buffer=buffer,
        saes=12 * sum(parameters) // plan.world.size,
        step=4 * (max(parameters) + 2 * sweep.sae_batch_size * width) // plan.args.shard_latents,
        disk=4 * n_files * sum(parameters) + 3 * (12 * sum(parameters) + buffer),
    )


def memory(plan: Plan) -> dict[str, int]:
    """Bytes of memory by what takes them."""
    need = needs(plan)
    return {
        "language model": need.llm,
        "activation buffer": need.buffer,
        "SAEs and optimisers": need.saes,
        "one training step, at most": need.step,
    }


def checkpoint_steps(plan: Plan) -> list[int]:
    """0 and six log-spaced steps up to a third of the run."""
    import torch

    fractions = [0.0, *torch.logspace(-3, 0, 7).tolist()[:-1]]
    return sorted({int(plan.schedule.steps * fraction) for fraction in fractions})


def print_plan(plan: Plan) -> None:
    sweep, schedule = plan.sweep, plan.schedule
    scaled = [f"{name} {asked:g} -> {used:g}" for name, (asked, used) in schedule.scaled.items()]
    lines = [
        f"{plan.model_name}: layers {', '.join(map(str, plan.layers))} of {plan.n_layers}, "
        f"D = {plan.activation_dim}, {sweep.dtype}, on {plan.device}",
        f"{len(plan.configs)} SAEs: {', '.join(plan.architectures)}; widths {sweep.dictionary_widths}",
        f"{schedule.steps * sweep.sae_batch_size:,} tokens = {schedule.steps:,} steps of {sweep.sae_batch_size:,}, "
        f"SAEs in {plan.autocast}",
        f"text: {plan.dataset}{' + ' + sweep.chat_dataset if plan.args.mixed_dataset else ''}; "
        f"evaluation: {'held-out part of ' if plan.held_out else ''}{plan.eval_dataset}",
        *([f"short run, so schedules are scaled: {'; '.join(scaled)}"] if scaled else []),
        "memory: " + ", ".join(f"{name} {_size(size)}" for name, size in memory(plan).items()),
        f"disk: {_size(needs(plan).disk)} in {plan.folder}",
        *([f"{plan.world.size} processes share the SAEs and the text"] if plan.world.size > 1 else []),
    ]
    print("\n".join(lines))


def _size(n_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def check_disk(plan: Plan) -> None:
    parent = plan.folder
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needs(plan).disk:
        raise ValueError(f"the run needs {_size(needs(plan).disk)} on disk, and {parent} has {_size(free)} free.")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{parent} cannot be written to: choose another --save_dir.")


def check_text(plan: Plan) -> None:
    """Where it can be known soon: is there text enough for the tokens asked?"""
    from dictionary_learning.data import estimate_tokens, open_documents
    from dictionary_learning.model import load_tokenizer

    sweep, args = plan.sweep, plan.args
    documents = open_documents(
        plan.dataset,
        text_column=sweep.text_column,
        split=sweep.split,
        subset=sweep.subset,
        held_out=False if plan.held_out else None,
        epochs=sweep.epochs,
    )
    tokens = estimate_tokens(documents, load_tokenizer(plan.model_name, args.revision, args.trust_remote_code))
    asked = sweep.num_tokens * (1 - sweep.chat_fraction if args.mixed_dataset else 1)
    if tokens is not None and tokens < 0.9 * asked:  # near the limit, training will tell
        raise ValueError(
            f"{plan.dataset} has about {tokens:,} tokens{' in all epochs' if sweep.epochs > 1 else ''}, the run asks "
            f"for {round(asked):,}: give more text, ask for fewer with --num_tokens, or read it again with --epochs."
        )


# -- the run


def open_text(plan: Plan, tokenizer: Any, *, evaluation: bool, shard: tuple[int, int] = (0, 1)) -> Any:
    """Batches of contexts, for training or for evaluation."""
    from dictionary_learning.data import open_batches

    sweep = plan.sweep
    return open_batches(
        plan.eval_dataset if evaluation else plan.dataset,
        tokenizer,
        context_length=sweep.context_length,
        batch_size=(sweep.eval_batch_size or max(sweep.llm_batch_size // 4, 1)) if evaluation else sweep.llm_batch_size,
        text_column=sweep.text_column,
        split=sweep.split,
        subset=None if evaluation and not plan.held_out else sweep.subset,
        held_out=evaluation if plan.held_out else None,
        epochs=1 if evaluation else sweep.epochs,
        mixed=plan.args.mixed_dataset,
        chat_dataset=sweep.chat_dataset,
        chat_fraction=sweep.chat_fraction,
        chat_pack=sweep.pack_chats,
        seed=sweep.random_seeds[0],
        shard=shard,
    )


def prepare_folder(plan: Plan) -> dict[str, Any]:
    """Make the run folder, or find the run in it that is to be resumed.  Returns its run.json."""
    from dictionary_learning.files import read_json, write_json

    from dictionary_learning.world import job, restarted

    record = plan.folder / "run.json"
    if restarted() and record.exists() and read_json(record).get("job") == job():
        plan.args.resume = True  # what failed was this very run
    if plan.folder.exists() and plan.args.overwrite and not plan.args.resume:
        if any(plan.folder.iterdir()) and not record.exists():
            raise ValueError(f"{plan.folder} is not the folder of a run, so --overwrite leaves it alone.")
        shutil.rmtree(plan.folder)
    if record.exists():
        if not plan.args.resume:
            raise ValueError(
                f"{plan.folder} holds a run already: give --resume to continue it or --overwrite to replace it."
            )
        settings = read_json(record)["settings"]
        plan.text_shards = plan.sweep.text_shards or settings.get("text_shards", 1)  # whatever the processes now
        refuse_changes(settings, json.loads(json.dumps(plan.settings())))
    elif plan.args.resume:
        raise ValueError(f"there is no run to resume in {plan.folder}.")
    elif plan.folder.exists() and any(plan.folder.iterdir()):
        raise ValueError(f"{plan.folder} exists and holds other things: choose another --save_dir.")
    begun = {
        "settings": plan.settings(),
        "command": shlex.join(["python", *plan.args.command]),
        "versions": versions(),
    }
    content = (read_json(record) if record.exists() else begun) | {"job": job()}
    if not record.exists() or content["job"] is not None:
        write_json(record, content)
    return content


# What may differ between a run and its continuation: it changes no weight.
FREE_TO_CHANGE = {
    "backup_steps",
    "backup_minutes",
    "wandb_project",
    "wandb_entity",
    "eval_num_inputs",
    "eval_batch_size",
}


def refuse_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    names = sorted((before.keys() | now.keys()) - FREE_TO_CHANGE)
    changed = [f"{n} was {before.get(n)}, is {now.get(n)}" for n in names if before.get(n) != now.get(n)]
    if changed:
        raise ValueError(f"the run was started with other settings, so it cannot be resumed: {'; '.join(changed)}.")


def versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "transformers", "datasets", "safetensors", "huggingface_hub")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def share_out(plan: Plan, shard: "Shard") -> list[int]:
    """The owner of each SAE, a rank or a group of ranks, such that all have about the same work by the clock."""
    import torch

    from dictionary_learning.training import step_microseconds
    from dictionary_learning.world import spread

    world, configs = plan.world, plan.configs
    if len(plan.groups) == 1:
        return [0] * len(configs)
    # what a step costs depends on these; an SAE of each kind is timed by one of the owners
    kinds = [(c["trainer"].__name__, c["dict_size"], c.get("k")) for c in configs]
    batch_size, autocast = plan.sweep.sae_batch_size, getattr(torch, plan.autocast)
    timed = {
        kind: step_microseconds(configs[kinds.index(kind)], batch_size, autocast, shard)
        for kind in list(dict.fromkeys(kinds))[world.rank // shard.size :: len(plan.groups)]
    }
    # every rank takes what it is told, so that all come to the same owners
    costs = {kind: cost for part in world.gather(timed) for kind, cost in part.items()}
    return spread([costs[kind] for kind in kinds], [c["layer"] for c in configs], len(plan.groups))


def train(
    plan: Plan,
    owners: list[int],
    shard: "Shard",
    state: "SavedState | None",
    tracker: "Tracker",
    wandb_ids: list[str],
) -> None:
    import torch
    from dictionary_learning.state import save_state

    from dictionary_learning.buffer import ActivationBuffer
    from dictionary_learning.model import load_model
    from dictionary_learning.training import Loop, make_runs

    sweep, world = plan.sweep, plan.world
    mine = [i for i, owner in enumerate(owners) if world.rank in plan.groups[owner]]
    led = plan.led(owners)
    readers: dict[int, set[int]] = {layer: set() for layer in plan.layers}
    for config, owner in zip(plan.configs, owners, strict=True):
        readers[config["layer"]].update(plan.groups[owner])
    lm = world.together(
        lambda: load_model(
            plan.model_name,
            device=plan.device,
            dtype=getattr(torch, sweep.dtype),
            last_layer=max(plan.layers),
            attn_implementation=sweep.attn_implementation,
            revision=plan.args.revision,
            trust_remote_code=plan.args.trust_remote_code,
        )
    )
    world.connect(lm.device)
    n = plan.text_shards
    shards = world.together(
        lambda: [
            open_text(plan, lm.tokenizer, evaluation=False, shard=(s, n)) if s % world.size == world.rank else None
            for s in range(n)
        ]
    )
    buffer = ActivationBuffer(
        shards,
        lm,
        plan.layers,
        n_tokens=sweep.buffer_tokens,
        out_batch_size=sweep.sae_batch_size,
        device=plan.device,
        seed=sweep.random_seeds[0],
        mask=sweep.mask,
        max_norm_multiple=sweep.max_norm_multiple,
        world=world,
        readers={layer: sorted(ranks) for layer, ranks in readers.items()},
    )
    if state is not None:
        buffer.load_state_dict(state)
    norm_factors = buffer.norm_factors
    runs = make_runs(
        plan.configs, plan.sae_folders, lambda layer: {**buffer.config(layer), "dataset": plan.dataset}, mine, shard
    )
    started, before = time.monotonic(), dict(buffer.seconds)

    def timings() -> dict[str, float]:
        spent = {name: seconds - before[name] for name, seconds in buffer.seconds.items()}
        return {**spent, "SAE": time.monotonic() - started - sum(spent.values())}

    def save(step: int, loop_state: dict[str, Any]) -> None:
        entries = {**loop_state, **buffer.state_dict()} | ({"wandb_ids": wandb_ids} if world.rank == 0 else {})
        save_state(plan.folder / "resume", step, entries, world=world)

    loop = Loop(
        runs,
        buffer,
        norm_factors,
        plan.schedule.steps,
        save_steps=checkpoint_steps(plan) if plan.args.save_checkpoints else (),
        log_steps=sweep.log_steps,
        autocast_dtype=getattr(torch, plan.autocast),
        backup_steps=sweep.backup_steps,
        backup_minutes=sweep.backup_minutes,
        save_state=save,
        track=lambda i, record: tracker.log(led.index(i), record, record["step"]),
        timings=timings,
        show_progress=world.rank == 0,
        world=world,
    )
    if state is not None:
        loop.load_state_dict(state)
        print(f"resumed at step {loop.step:,} of {loop.steps:,}")
    try:
        loop.train()
    except torch.OutOfMemoryError as error:
        sizes = ", ".join(f"{name} {_size(size)}" for name, size in memory(plan).items())
        raise ValueError(
            f"{plan.device} is out of memory. It has to hold: {sizes}. Train fewer SAEs at a time (--architectures, "
            "--dictionary_widths, --target_l0s), or lower --sae_batch_size or --buffer_tokens."
        ) from error
    finally:
        for text in filter(None, shards):
            text.close()
    world.gather(None)  # every SAE is written
    world.together(lambda: finish_training(plan, buffer, loop, wandb_ids, time.monotonic() - started), rank=0)


def open_tracker(plan: Plan, mine: list[int], ids: list[str]) -> "Tracker":
    """W&B runs for these SAEs, continued where the SAEs of the run have ids already; or what keeps nothing."""
    from dictionary_learning.tracking import Tracker, WandbRuns

    if not plan.args.use_wandb:
        return Tracker()
    return WandbRuns(
        [plan.configs[i]["wandb_name"] for i in mine],
        [{**plan.configs[i], "trainer": plan.configs[i]["trainer"].__name__} for i in mine],
        project=plan.sweep.wandb_project,
        entity=plan.sweep.wandb_entity,
        group=plan.folder.name,
        folder=plan.folder,
        ids=[ids[i] for i in mine] if ids else [],
    )


def finish_training(plan: Plan, buffer: Any, loop: Any, wandb_ids: list[str], seconds: float) -> None:
    """Note in run.json that the SAEs are trained, and on what; the resume state has served."""
    from dictionary_learning.files import read_json, write_json

    record = plan.folder / "run.json"
    write_json(
        record,
        read_json(record)
        | {
            "trained": True,
            "tokens": loop.tokens,
            "seconds": round(seconds, 1),
            "seconds_saving_state": round(loop.seconds_in_state, 2),
            "norm_factors": loop.norm_factors,
            "positions": dict(buffer.counts),
            "llm_batch_halvings": buffer.llm_batch_halvings,  # for want of memory
            "wandb_ids": wandb_ids,
        },
    )
    shutil.rmtree(plan.folder / "resume", ignore_errors=True)
    print(f"trained on {loop.tokens:,} tokens in {seconds:.0f} s ({loop.tokens / max(seconds, 1e-9):,.0f} tokens/s)")


# -- evaluation


def evaluate(plan: Plan, folders: list[Path]) -> dict[Path, dict[str, Any]]:
    """Evaluate SAE folders on the same held-out text; returns the results of those that could be loaded."""
    from dictionary_learning.formats import load_dictionary

    world, saes, norm_bounds = plan.world, [], {}
    for folder in folders[len(folders) * world.rank // world.size : len(folders) * (world.rank + 1) // world.size]:
        try:
            ae, config = load_dictionary(folder)
            trained_on = str(config["trainer"].get("lm_name"))
            if Path(trained_on).name != Path(plan.model_name).name:
                raise ValueError(f"it was trained on {trained_on}: give --model_name {trained_on}")
        except (ValueError, OSError) as error:
            print(f"not evaluated: {folder}: {error}", file=sys.stderr)
            continue
        layer = int(config["trainer"]["layer"])
        saes.append((str(folder), ae, layer))
        if config["buffer"].get("median_norm"):
            norm_bounds[layer] = config["buffer"]["median_norm"] * config["buffer"]["max_norm_multiple"]
    shares = world.gather((len(saes), norm_bounds))
    if not any(n for n, _ in shares):
        raise ValueError(f"there is no SAE to evaluate in {', '.join(map(str, folders)) or plan.folder}.")
    norm_bounds = {layer: bound for _, bounds in shares for layer, bound in bounds.items()}
    parts = world.gather(world.together(lambda: evaluate_share(plan, saes, norm_bounds) if saes else {}))
    results = {Path(name): result for part in parts for name, result in part.items()}
    if world.rank == 0:
        print_table(results)
    return results


def evaluate_share(plan: Plan, saes: list[tuple[str, Any, int]], norm_bounds: dict[int, float]) -> dict[str, Any]:
    """Evaluate this rank's share of the SAEs, (folder, SAE, layer), and write what comes out into their folders."""
    import torch
    from dictionary_learning.files import write_atomic, write_json
    from safetensors.torch import save_file

    from dictionary_learning.evaluation import evaluate_saes
    from dictionary_learning.model import load_model

    lm = load_model(
        plan.model_name,
        device=plan.device,
        dtype=getattr(torch, plan.sweep.dtype),
        attn_implementation=plan.sweep.attn_implementation,
        revision=plan.args.revision,
        trust_remote_code=plan.args.trust_remote_code,
    )
    text = open_text(plan, lm.tokenizer, evaluation=True)
    batches, n_contexts = [], 0
    for tokens_BL, mask_BL in text:
        n = plan.sweep.eval_num_inputs - n_contexts
        batches.append((tokens_BL[:n], mask_BL[:n]))
        n_contexts += len(batches[-1][0])
        if n_contexts >= plan.sweep.eval_num_inputs:
            break
    text.close()
    if not batches:
        raise ValueError(f"{plan.eval_dataset} has no text for evaluation: give another --eval_dataset.")
    evaluations = evaluate_saes(
        lm,
        saes,
        batches,
        mask=plan.sweep.mask,
        norm_bounds=norm_bounds,
        hyperparameters={"dataset": plan.eval_dataset, "held_out": plan.held_out},
        show_progress=plan.world.rank == 0,
    )
    for name, evaluation in evaluations.items():
        write_json(Path(name) / "eval_results.json", evaluation.results)
        if evaluation.density_F is not None:
            density = {"density": evaluation.density_F.float().contiguous()}
            write_atomic(Path(name) / "density.safetensors", lambda tmp, density=density: save_file(density, tmp))
    return {name: evaluation.results for name, evaluation in evaluations.items()}


def print_table(evaluations: dict[Path, dict[str, Any]]) -> None:
    from dictionary_learning.files import read_json

    trainer_names = {row.trainer: name for name, row in ARCHITECTURES.items()}
    rows: list[tuple[str, ...]] = [
        ("layer", "architecture", "width", "setting", "L0", "loss recovered", "variance explained", "alive")
    ]
    for folder, results in evaluations.items():
        trainer = read_json(folder / "config.json")["trainer"]
        architecture = trainer_names.get(trainer["trainer_class"], trainer["trainer_class"])
        varies = ARCHITECTURES[architecture].varies if architecture in ARCHITECTURES else ""
        setting = f"{varies} {trainer.get(varies, '')}"
        numbers = ("l0", "frac_recovered", "frac_variance_explained", "frac_alive")
        cells = [f"{results[key]:.4g}" if results[key] is not None else "-" for key in numbers]
        rows.append((str(trainer["layer"]), str(architecture), str(trainer["dict_size"]), setting, *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for folder, results in evaluations.items():
        for kind in ("error", "warning"):
            if kind in results:
                print(f"{kind}: {folder}: {results[kind]}", file=sys.stderr)


# -- commands


def main(argv: list[str] | None = None) -> int:
    with contextlib.ExitStack() as stack:
        if os.environ.get("RANK", "0") != "0":
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        args = parse(argv)
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        return walk(args)


def parse(argv: list[str] | None) -> argparse.Namespace:
    try:
        with contextlib.redirect_stderr(sys.stdout if os.environ.get("RANK", "0") != "0" else sys.stderr):
            args = build_parser().parse_args(argv)
    except SystemExit:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # torchrun ends all processes with the first that fails: let rank 0 say why
        raise
    args.command = ["demo.py", *(sys.argv[1:] if argv is None else argv)]
    return args


def walk(args: argparse.Namespace) -> int:
    """Run the command in the world that torchrun made, if it did; an error becomes a sentence and an exit code."""
    from dictionary_learning.world import AgreedError, LostProcess, World

    world = World()
    try:
        world = World.start(args.timeout_minutes)
        code = run(args, world)
        if code == INTERRUPTED:
            world.gather(None)  # torchrun ends all processes with the first that ends like this
        world.close()
        return code
    except LostProcess as lost:
        world.tell(f"{lost}; continue with the same command and --resume")
        return INTERRUPTED
    except (ValueError, OSError) as error:
        whose = "" if world.size == 1 or isinstance(error, AgreedError) else f"rank {world.rank}: "
        world.tell(f"error: {whose}{error}")
        return 2
    except KeyboardInterrupt:
        world.tell("stopped at once; --resume continues from the last saved state")
        return 130


def run(args: argparse.Namespace, world: "World") -> int:
    if args.upload_only is not None:
        return upload(args, Path(args.upload_only)) if world.rank == 0 else 0
    plan = world.together(lambda: make_plan(args, world))
    if args.eval_only is not None:
        return evaluate_only(plan)
    world.together(lambda: check(plan), rank=0)
    return 0 if args.dry_run else carry_out(plan)


def check(plan: Plan) -> None:
    """Print the plan, and find out what stands in its way before anything is loaded."""
    print_plan(plan)
    check_disk(plan)
    check_text(plan)
    args = plan.args
    if args.hf_repo_id and not args.dry_run:
        from dictionary_learning.hub import check_repo

        print(check_repo(args.hf_repo_id, private=args.private) or f"uploads go to {args.hf_repo_id}")


def carry_out(plan: Plan) -> int:
    """Train, evaluate, plot, report, upload; what an earlier part of the run has done is not done again."""
    from dictionary_learning.state import load_state

    from dictionary_learning.kernels import use_kernels
    from dictionary_learning.training import Interrupted

    args, world, n_saes = plan.args, plan.world, len(plan.configs)
    record, plan.text_shards = world.together(lambda: (prepare_folder(plan), plan.text_shards), rank=0)
    trained = record.get("trained", False)
    state = None if trained else load_state(plan.folder / "resume", world=world)
    use_kernels(plan.sweep.kernels)
    shard = world.split(args.shard_latents)
    owners = [i % len(plan.groups) for i in range(n_saes)] if trained else share_out(plan, shard)
    mine = plan.led(owners)
    tracker = open_tracker(plan, mine, record.get("wandb_ids", []) if state is None else state["wandb_ids"])
    ids = {i: name for part in world.gather(dict(zip(mine, tracker.ids, strict=False))) for i, name in part.items()}
    try:
        if not trained:
            train(plan, owners, shard, state, tracker, [ids[i] for i in sorted(ids)])
        if not args.no_eval:
            results = evaluate(plan, plan.sae_folders)
            for n, i in enumerate(mine):
                if plan.sae_folders[i] in results:
                    tracker.summary(n, results[plan.sae_folders[i]])
            if world.rank == 0:
                plot(plan.folder)
    except Interrupted as stop:
        again = shlex.join(["python", *(word for word in args.command if word not in ("--resume", "--overwrite"))])
        world.tell(f"{stop}. Continue with: {again if world.size == 1 else 'the same command and'} --resume")
        return INTERRUPTED
    finally:
        for sentence in tracker.finish():
            print(sentence, file=sys.stderr)
    if world.rank > 0:
        return 0
    if args.report:
        from dictionary_learning.report import write_reports

        write_reports(plan.folder, device=plan.device)
    return upload(args, plan.folder) if args.hf_repo_id else 0


def evaluate_only(plan: Plan) -> int:
    from dictionary_learning.formats import find_saes

    for folder in map(Path, plan.args.eval_only or [plan.folder]):
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder.")
        evaluate(plan, find_saes(folder))
        if plan.world.rank == 0:
            plot(folder)
    return 0


def plot(folder: Path) -> None:
    from dictionary_learning.plotting import plot_pareto

    for problem in plot_pareto([folder], folder / "pareto.png"):
        print(problem, file=sys.stderr)
    print(f"plot: {folder / 'pareto.png'}")


def upload(args: argparse.Namespace, folder: Path) -> int:
    from dictionary_learning.hub import upload_run

    if args.hf_repo_id is None:
        raise ValueError("--upload_only needs --hf_repo_id USER/REPO.")
    print(f"uploaded to {upload_run(folder, args.hf_repo_id, private=args.private)}")
    return 0


if __name__ == "__main__":
    code = main()
    if "WORLD_SIZE" in os.environ:
        # Threads of torch.distributed that still let go of Python objects can abort a process that ends in Python's
        # own way, and torchrun would end rank 0 with it.  All that has to be closed is closed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
