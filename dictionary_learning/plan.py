"""What a run will do: the flags resolved against the model and the machine, and checked before a weight is loaded."""

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import cache
from .data import estimate_tokens, open_documents
from .model import (
    LanguageModel,
    ModelShape,
    check_context,
    load_tokenizer,
    model_identity,
    model_shape,
    needs_extra,
    resolve_device,
    same_model,
)
from .reading import Reading, recorded_settings, source_of
from .sites import RESID_POST, TRANSCODERS, Place, check_sites, in_order, place_at, tap_of, words_of
from .start import find_starts
from .sweep import Architecture, Options, Schedule, Sweep, get_schedule, get_trainer_configs
from .world import World

# what circuit-tracer computes
TRACED = ("standard", "standard_new", "jump_relu", "top_k", "batch_top_k", "matryoshka_batch_top_k")


@dataclass
class Plan(Reading):
    """Everything that is known before a weight is loaded."""

    schedule: Schedule
    folder: Path
    model_name: str
    layers: list[int]
    architectures: list[str]
    text_shards: int
    routes: list[tuple[Place, Place]]  # what SAEs read and what they reconstruct, of another place if transcoders
    widths: dict[Place, int]  # of all places
    activation_dim: int
    n_layers: int
    llm_parameters: int
    rows: Mapping[str, Architecture]  # of all architectures there are
    configs: list[dict[str, Any]]  # of all places, in order
    defaults: Mapping[str, Any]  # of all settings
    starts: list[str]  # what each SAE starts from; empty: from random weights
    of_starts: list[str]  # what is to be said of these
    lm: LanguageModel | None = None  # up to the deepest layer, where it had to be asked for its places

    @property
    def places(self) -> list[Place]:
        """All that are read, in order."""
        return in_order(self.widths)

    @property
    def autocast(self) -> str:
        return self.sweep.autocast or ("bfloat16" if self.device.startswith("cuda") else "float32")

    @property
    def groups(self) -> list[list[int]]:
        """The ranks of each owner of SAEs: with --shard_latents N, N neighbours."""
        n = self.options.shard_latents
        return [list(range(first, first + n)) for first in range(0, self.world.size, n)]

    def led(self, owners: list[int]) -> list[int]:
        """The SAEs that this rank writes: of its group's, if it is the first of the group."""
        return [i for i, owner in enumerate(owners) if self.world.rank == self.groups[owner][0]]

    @property
    def sae_folders(self) -> list[Path]:
        folders, n_before = [], Counter()
        for config in self.configs:
            place = config["submodule_name"]
            folders.append(self.folder / place / f"trainer_{n_before[place]}")
            n_before[place] += 1
        return folders

    def settings(self) -> dict[str, Any]:
        """What makes two runs the same run: `run.json` keeps it, `--resume` compares it."""
        return {
            "model_name": self.model_name,
            "revision": self.options.revision,
            "layers": self.layers,
            "architectures": self.architectures,
            "preset": self.options.preset,
            **dataclasses.asdict(self.sweep),
            "text_shards": self.text_shards,
            "eval_is_held_out": self.held_out,
            "autocast": self.autocast,
            "save_checkpoints": self.options.save_checkpoints,
            "init_from": self.options.init_from,
            "cache": self.options.cache,
            "activations": self.options.activations,
        }

    def cached(self) -> dict[str, Any]:
        """What the index of activations of this run's text says of them."""
        settings = self.settings()
        return {
            "settings": {name: settings[name] for name in cache.SETTINGS},
            "layers": self.layers,
            "places": [[*tap_of(place), width] for place, width in self.widths.items()],
            "activation_dim": self.activation_dim,
            "model": self.identity,
            "held_out": self.held_out,
            "seed": self.sweep.random_seeds[0],  # of the text's order
        }


def run_folder(options: Options) -> Path:
    """`<save_dir>/<model>_<arch>_<arch>...`; a local model goes by the name of its folder."""
    name = Path(options.model_name).resolve().name if os.path.isdir(options.model_name) else options.model_name
    return Path(options.save_dir) / "_".join([name.replace("/", "_"), *options.architectures])


def make_plan(
    options: Options, sweep: Sweep, rows: Mapping[str, Architecture], defaults: Mapping[str, Any], world: World
) -> Plan:
    """Resolve a run; ValueError for what cannot work.

    options: with the architectures; without layers it is the middle one.
    rows: all architectures, in the order that numbers the SAEs. defaults: of the settings of runs that do not say them.
    """
    schedule, name = get_schedule(sweep), options.model_name
    device = str(world.place(resolve_device(options.device)))
    place = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    shape = model_shape(name, **place)
    layers = options.layers or [shape.n_layers // 2]
    if len(set(layers)) != len(layers):
        raise ValueError(f"--layers names a layer twice: {layers}.")
    shape = model_shape(name, last_layer=max(layers), **place)
    for layer in layers:
        if not 0 <= layer < shape.n_layers:
            raise ValueError(f"model {name} has layers 0 to {shape.n_layers - 1}, not {layer}.")
    pairs = site_pairs(options, sweep)
    routes = [(place_at(layer, site), place_at(layer, site_out)) for site, site_out in pairs for layer in layers]
    check_context(sweep.context_length, shape.context_limit, name)
    check_cache(options, sweep)
    reading = Reading(options, sweep, device, world)
    widths, lm = find_widths(reading, routes, shape.activation_dim)
    check_circuit_tracer(options, routes, widths, shape)
    asked = {key: row for key, row in rows.items() if key in options.architectures}
    configs = [
        config
        for place, place_out in routes
        for config in get_trainer_configs(
            sweep,
            asked,
            name,
            tap_of(place).layer,
            widths[place],
            device,
            tap_of(place).site,
            tap_of(place_out).site,
            widths[place_out],
        )
    ]
    for config in configs:  # the trainers' own checks, before anything is loaded
        config["trainer"].Config(**{key: value for key, value in config.items() if key != "trainer"})
    check_split(options, sweep, world)
    check_placement(options, sweep, world)
    if sweep.kernels == "triton" and not device.startswith("cuda"):
        raise ValueError(f"--kernels triton needs a GPU, not --device {device}.")
    if sweep.buffer_tokens < 2 * sweep.sae_batch_size:
        raise ValueError(
            f"--buffer_tokens {sweep.buffer_tokens:,} must hold at least two batches of --sae_batch_size "
            f"{sweep.sae_batch_size:,}."
        )
    starts, of_starts = [], []
    if options.init_from:
        starts, of_starts = find_starts(options.init_from, configs, model_identity(name, options.revision))
    record = run_folder(options) / "run.json"
    plan = Plan(
        recorded=recorded_settings(record) if options.resume and record.is_file() else {},
        options=options,
        sweep=sweep,
        schedule=schedule,
        folder=run_folder(options),
        model_name=name,
        layers=layers,
        architectures=options.architectures,
        device=device,
        world=world,
        text_shards=sweep.text_shards or cache.n_shards(options.cache) or world.size,
        routes=routes,
        widths=widths,
        lm=lm,
        activation_dim=shape.activation_dim,
        n_layers=shape.n_layers,
        llm_parameters=shape.n_parameters,
        rows=rows,
        configs=configs,
        defaults=defaults,
        starts=starts,
        of_starts=of_starts,
    )
    if options.activations:
        check_activations(plan, options.activations)
    return plan


def site_pairs(options: Options, sweep: Sweep) -> list[tuple[str, str]]:
    """[(the site that is read, the site that is reconstructed)]; ValueError for what does not go together."""
    one_of = "--sites, --transcoder, or --site_in with --site_out"
    if (sweep.site_in is None) != (sweep.site_out is None):
        raise ValueError("a transcoder needs both --site_in and --site_out.")
    if sweep.transcoder is not None and sweep.site_in is not None:
        raise ValueError(f"--transcoder and --site_in both say what a transcoder reads: give one of {one_of}.")
    if sweep.transcoder is not None and sweep.transcoder not in TRANSCODERS:
        raise ValueError(f"there is no --transcoder {sweep.transcoder}, only {', '.join(TRANSCODERS)}.")
    if len(set(sweep.sites)) < len(sweep.sites):
        raise ValueError(f"--sites names a site twice: {' '.join(sweep.sites)}.")
    pair = TRANSCODERS[sweep.transcoder] if sweep.transcoder else (sweep.site_in, sweep.site_out)
    pairs = [(site, site) for site in sweep.sites] if pair[0] is None or pair[1] is None else [(pair[0], pair[1])]
    if pair[0] is not None and sweep.sites != [RESID_POST]:
        raise ValueError(f"--sites are for SAEs, and this is a transcoder: give one of {one_of}.")
    check_sites(site for pair in pairs for site in pair)
    is_transcoder = pairs[0][0] != pairs[0][1]
    for name, is_asked in {"skip": sweep.skip, "circuit_tracer": options.circuit_tracer}.items():
        if is_asked and not is_transcoder:
            raise ValueError(f"--{name} is for transcoders: give --transcoder mlp, or --site_in and --site_out.")
    return pairs


def find_widths(
    reading: Reading, routes: list[tuple[Place, Place]], activation_dim: int
) -> tuple[dict[Place, int], LanguageModel | None]:
    """(the width of every place, the model if it had to be loaded); ValueError where the model has no such place.

    Only the model itself can say where in a block its places are.
    """
    places = in_order(place for route in routes for place in route)
    if all(isinstance(place, int) for place in places):
        return dict.fromkeys(places, activation_dim), None
    if reading.options.activations:
        held = cache.widths(reading.options.activations)
        missing = [words_of(place) for place in places if place not in held]
        if missing:
            there = ", ".join(words_of(place) for place in held)
            raise ValueError(f"{reading.options.activations} holds {there}, not {', '.join(missing)}.")
        return {place: held[place] for place in places}, None
    lm = reading.open_model(last_layer=max(tap_of(place).layer for place in places))
    return {place: lm.width(place) for place in places}, lm


def check_circuit_tracer(
    options: Options, routes: list[tuple[Place, Place]], widths: Mapping[Place, int], shape: ModelShape
) -> None:
    """ValueError where the run's transcoders would be no set that circuit-tracer opens."""
    if not options.circuit_tracer:
        return
    layers = {tap_of(place).layer for place, _ in routes}
    if layers != set(range(shape.n_layers)):
        every = " ".join(map(str, range(shape.n_layers)))
        raise ValueError(f"circuit-tracer wants a transcoder of every layer: give --layers {every}.")
    if any(widths[place] != shape.activation_dim for route in routes for place in route):
        raise ValueError(f"circuit-tracer wants transcoders of {shape.activation_dim} dimensions in and out.")
    if unknown := set(options.architectures) - set(TRACED):
        raise ValueError(f"circuit-tracer has no {', '.join(sorted(unknown))} transcoders, only {', '.join(TRACED)}.")


def check_cache(options: Options, sweep: Sweep) -> None:
    if options.cache_only and not options.cache:
        raise ValueError("--cache_only needs --cache FOLDER, which gets the activations.")
    if options.cache and options.activations:
        raise ValueError("--cache writes activations and --activations reads them: give one of the two.")


def check_activations(plan: Plan, folder: str) -> None:
    """ValueError where the activations on the disk are not those that the run asks for, or too few."""
    index, asked, sweep = cache.read_index(folder), plan.cached(), plan.sweep
    differs = [
        f"they are of {name} {index['settings'].get(name)}, not {value}"
        for name, value in asked["settings"].items()
        if index["settings"].get(name) != value
    ]
    held = cache.widths(folder)
    missing = [words_of(place) for place in plan.places if place not in held]
    if missing:
        differs.append(f"they are of {', '.join(map(words_of, held))}, not of {', '.join(missing)}")
    if not same_model(index["model"], asked["model"]):
        differs.append(f"{plan.model_name} is another model by now")
    if plan.held_out and not index["held_out"]:
        differs.append(f"{sweep.eval_dataset} would be evaluated on text that is among them (name an --eval_dataset)")
    if differs:
        raise ValueError(f"the activations in {folder} do not fit the run: {'; '.join(differs)}.")
    n_positions = sweep.epochs * cache.held(folder, plan.text_shards)[0]
    if n_positions < plan.schedule.steps * sweep.sae_batch_size:
        raise ValueError(
            f"{folder} holds {n_positions:,} activations of each layer{' in all epochs' if sweep.epochs > 1 else ''}, "
            f"the run asks for {sweep.num_tokens:,}: ask for fewer with --num_tokens, read them again with --epochs, "
            "or write more with --cache."
        )


def check_placement(options: Options, sweep: Sweep, world: World) -> None:
    """ValueError where the language model cannot be placed as asked, before anything is downloaded."""
    if options.llm_device is not None and options.device_map is not None:
        raise ValueError("--llm_device and --device_map both place the language model: give one of the two.")
    for flag in ("llm_device", "device_map"):
        if world.size > 1 and getattr(options, flag) is not None:
            raise ValueError(f"--{flag} is for one process, and torchrun started {world.size}.")
    if options.llm_device is not None:
        resolve_device(options.llm_device)
    if options.device_map is not None:
        needs_extra("accelerate", "device_map", f"--device_map {options.device_map}")
    for package in ("bitsandbytes", "accelerate") if sweep.quantization is not None else ():
        needs_extra(package, "quantization", f"--quantization {sweep.quantization}")


def check_split(options: Options, sweep: Sweep, world: World) -> None:
    n = options.shard_latents
    if world.size % n:
        raise ValueError(f"--shard_latents {n} needs a multiple of {n} processes from torchrun, not {world.size}.")
    for width in sweep.dictionary_widths:
        if width % n:
            raise ValueError(f"--shard_latents {n} cannot split {width} latents evenly.")
    if n > 1 and sweep.resample_steps:
        raise ValueError("--shard_latents cannot be combined with --resample_steps.")


@dataclass
class Needs:
    """Bytes a run will take."""

    llm: int
    buffer: int
    saes: int
    step: int
    disk: int
    cache: int  # in --cache, beside what it holds


def needs(plan: Plan) -> Needs:
    """Weights, two moments and one gradient at a time in fp32; the disk holds each SAE twice, and two states."""
    sweep = plan.sweep
    parameters = []
    for c in plan.configs:
        D, F, E = c["activation_dim"], c["dict_size"], c.get("output_dim") or c["activation_dim"]
        parameters.append((D + E) * F + F + E + (D * E if c.get("skip") else 0))
    width = max(c["dict_size"] for c in plan.configs)
    element = 4 if sweep.dtype == "float32" else 2
    row = sum(plan.widths.values()) * element
    buffer = sweep.buffer_tokens * row
    n_files = 2 + (len(checkpoint_steps(plan)) if plan.options.save_checkpoints else 0)
    text = sweep.buffer_tokens + sweep.num_tokens  # the buffer is full to the end
    cached = text * row if plan.options.cache else 0
    there = cache.held(plan.options.cache, plan.text_shards)[1] if plan.options.cache else 0
    return Needs(
        llm=plan.llm_parameters * element,
        buffer=buffer,
        saes=12 * sum(parameters) // plan.world.size,
        step=4 * (max(parameters) + 2 * sweep.sae_batch_size * width) // plan.options.shard_latents,
        disk=4 * n_files * sum(parameters) + 3 * (12 * sum(parameters) + buffer),
        cache=max(cached - there, 0),
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
    fractions = [0.0, *torch.logspace(-3, 0, 7).tolist()[:-1]]
    return sorted({int(plan.schedule.steps * fraction) for fraction in fractions})


def describe(plan: Plan) -> str:
    """The plan in a few lines."""
    sweep, schedule = plan.sweep, plan.schedule
    pairs = list(dict.fromkeys(tuple(tap_of(place).site for place in route) for route in plan.routes))
    kind = "SAEs" if pairs[0][0] == pairs[0][1] else "transcoders"
    skip = " with a skip" if sweep.skip else ""
    said = [site if site == site_out else f"{site} -> {site_out}{skip}" for site, site_out in pairs]
    wide = {f"D = {width} at {words_of(place)}" for place, width in plan.widths.items() if width != plan.activation_dim}
    sites = [f"sites: {'; '.join([', '.join(said), *sorted(wide)])}"] if said != [RESID_POST] else []
    scaled = [f"{name} {asked:g} -> {used:g}" for name, (asked, used) in schedule.scaled.items()]
    lines = [
        f"{plan.model_name}: layers {', '.join(map(str, plan.layers))} of {plan.n_layers}, "
        f"D = {plan.activation_dim}, {sweep.dtype}, on {plan.device}",
        f"{len(plan.configs)} {kind}: {', '.join(plan.architectures)}; widths {sweep.dictionary_widths}",
        *sites,
        f"{schedule.steps * sweep.sae_batch_size:,} tokens = {schedule.steps:,} steps of {sweep.sae_batch_size:,}, "
        f"SAEs in {plan.autocast}",
        f"text: {sweep.dataset}{' + ' + sweep.chat_dataset if sweep.mixed_dataset else ''}; "
        f"evaluation: {'held-out part of ' if plan.held_out else ''}{sweep.eval_dataset}",
        *([f"short run, so schedules are scaled: {'; '.join(scaled)}"] if scaled else []),
        "memory: " + ", ".join(f"{name} {size_text(size)}" for name, size in memory(plan).items()),
        *([] if plan.options.cache_only else [f"disk: {size_text(needs(plan).disk)} in {plan.folder}"]),
        *(
            [f"activations: {size_text(needs(plan).cache)} to write in {plan.options.cache}"]
            if plan.options.cache
            else []
        ),
        *([f"the SAEs start from {plan.options.init_from}"] if plan.starts else []),
        *plan.of_starts,
        *([f"activations: read from {plan.options.activations}"] if plan.options.activations else []),
        *([f"{plan.world.size} processes share the SAEs and the text"] if plan.world.size > 1 else []),
    ]
    return "\n".join(lines)


def size_text(n_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def check_disk(plan: Plan) -> None:
    need, options = needs(plan), plan.options
    places = [] if options.cache_only else [("--save_dir", plan.folder, need.disk)]
    places += [("--cache", Path(options.cache), need.cache)] if options.cache else []
    needed: dict[int, int] = {}  # by file system
    for flag, parent, size in places:
        while not parent.exists():
            parent = parent.absolute().parent
        device = parent.stat().st_dev
        needed[device] = needed.get(device, 0) + size
        free = shutil.disk_usage(parent).free
        if free < needed[device]:
            raise ValueError(
                f"the run needs {size_text(needed[device])} on disk, and {parent} has {size_text(free)} free."
            )
        if not os.access(parent, os.W_OK):
            raise ValueError(f"{parent} cannot be written to: choose another {flag}.")


def check_text(plan: Plan) -> None:
    """Open all text before training, print what there is to say of it, and count it where that is quick.

    Raises ValueError where a text cannot be read, or is too little for the tokens asked.
    """
    sweep, source = plan.sweep, plan.source(evaluation=False)
    tokenizer = load_tokenizer(plan.model_name, plan.options.revision, plan.options.trust_remote_code)
    notes: list[str] = []
    evaluated = not (plan.options.cache_only or plan.options.no_eval)
    read = [*([] if plan.options.activations else [False]), *([True] if evaluated else [])]
    for evaluation in read:
        text = plan.open_text(tokenizer, evaluation=evaluation)
        try:
            if next(text, None) is None:
                flag = "--eval_dataset" if evaluation else "--dataset"
                raise ValueError(f"{plan.source(evaluation).dataset} has no text to read: give another {flag}.")
            notes += text.notes
        finally:
            text.close()
    print("\n".join(dict.fromkeys(notes)), end="\n" if notes else "")
    if plan.options.activations:
        return
    documents = open_documents(
        source.dataset,
        text_column=source.text_column,
        split=source.split,
        subset=source.subset,
        held_out=False if plan.held_out else None,
        epochs=sweep.epochs,
        skip_damaged=sweep.skip_damaged,
    )
    tokens = estimate_tokens(documents, tokenizer)
    asked, remedy = sweep.num_tokens, "give more text, ask for fewer with --num_tokens, or read it again with --epochs"
    if ended := plan.recorded.get("ended_early"):  # the tokens asked stay, and other text is for those that are left
        asked -= ended["tokens"] if source != source_of(plan.recorded, evaluation=False) else 0
        remedy = "give more text, or read it again with --epochs"
    asked *= 1 - sweep.chat_fraction if sweep.mixed_dataset else 1
    if tokens is not None and tokens < 0.9 * asked:  # near the limit, training will tell
        raise ValueError(
            f"{source.dataset} has about {tokens:,} tokens{' in all epochs' if sweep.epochs > 1 else ''}, the run asks "
            f"for {round(asked):,}: {remedy}."
        )
