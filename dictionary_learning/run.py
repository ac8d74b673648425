"""The run folder, and the walk: train, evaluate, plot, report, upload."""

import json
import platform
import shlex
import shutil
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import cache
from .buffer import ActivationBuffer, ActivationSource
from .data import skipped_sentence
from .dictionary import Dictionary
from .files import read_json, write_json
from .formats import EXPORT, load_dictionary
from .formats.circuit_tracer import write as write_transcoders
from .kernels import Shard, use_kernels
from .model import LanguageModel, resolve_device
from .plan import Plan, check_disk, check_text, checkpoint_steps, describe, memory, run_folder, size_text
from .reading import Reading, recorded_settings
from .results import RESULTS, Named, evaluate, find_named
from .sites import Place, by_key, name_of, place_at, words_of
from .start import load_start
from .state import SavedState, load_state, save_state
from .sweep import ENDED_EARLY, EVALUATION_SETTINGS, INTERRUPTED, Architecture, Options, Sweep, check_recorded
from .tracking import Tracker, WandbRuns
from .training import (
    Interrupted,
    Loop,
    TextEndedError,
    choose_workers,
    make_runs,
    signals_noted,
    step_microseconds,
)
from .world import World, job, restarted, spread


def prepare_folder(plan: Plan) -> dict[str, Any]:
    """Make the run folder, or find the run in it that is to be resumed.  Returns its run.json."""
    record = plan.folder / "run.json"
    if restarted() and record.exists() and read_json(record).get("job") == job():
        plan.options.resume = True  # what failed was this very run
    if plan.folder.exists() and plan.options.overwrite and not plan.options.resume:
        if any(plan.folder.iterdir()) and not record.exists():
            raise ValueError(f"{plan.folder} is not the folder of a run, so --overwrite leaves it alone.")
        shutil.rmtree(plan.folder)
    if record.exists():
        if not plan.options.resume:
            raise ValueError(
                f"{plan.folder} holds a run already: give --resume to continue it or --overwrite to replace it."
            )
        settings = recorded_settings(record)
        plan.text_shards = plan.sweep.text_shards or settings.get("text_shards") or 1  # whatever the processes now
    elif plan.options.resume:
        raise ValueError(f"there is no run to resume in {plan.folder}.")
    elif plan.folder.exists() and any(plan.folder.iterdir()):
        raise ValueError(f"{plan.folder} exists and holds other things: choose another --save_dir.")
    if not record.exists():
        content = {
            "run_id": uuid.uuid4().hex,
            "overwrite": plan.options.overwrite,  # of the Hub's copy too
            "settings": plan.settings(),
            "command": shlex.join(["python", *plan.options.command]),
            "versions": versions(),
            "job": job(),
        }
        write_json(record, content)
        return content
    content = read_json(record)
    changed = changes(content, json.loads(json.dumps(plan.settings())), plan.defaults)
    if changed or job() is not None:
        content["settings"] |= {name: now for name, (_, now) in changed.items()}
        content["changes"] = [*content.get("changes", []), *([changed] if changed else [])]
        write_json(record, content | {"job": job()})
    return content


# What may differ between a run and its continuation: it changes no weight.
FREE_TO_CHANGE = {
    "backup_steps",
    "backup_minutes",
    "log_steps",
    "wandb_project",
    "wandb_entity",
    "epochs",  # what they add begins where the text would have ended
    "skip_damaged",
    "eval_dataset",
    "eval_text_column",
    "eval_split",
    "eval_subset",
    "eval_num_inputs",
    "eval_batch_size",
}
# What else may differ where the text ended early: what is read next.
TEXT_TO_CHANGE = {"dataset", "split", "subset", "text_column", "chat_dataset", "chat_split", "chat_subset"}


def changes(
    record: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """{setting: (was, is)} of a run that is to be resumed; ValueError where its weights would not be the run's.

    defaults: of settings that did not exist when the run was begun.
    """
    before = {**defaults, **record["settings"]}
    changed = {name: (before.get(name), value) for name, value in now.items() if before.get(name) != value}
    free = FREE_TO_CHANGE | (TEXT_TO_CHANGE if record.get("ended_early") else set())
    were, are = before.get("sae_threads"), now.get("sae_threads")
    if are is None or (are > 1 and were != 1):  # side by side their number changes no bit, and the state keeps the way
        free |= {"sae_threads"}
    refused = [f"{name} was {was}, is {value}" for name, (was, value) in sorted(changed.items()) if name not in free]
    if refused:
        raise ValueError(f"the run was started with other settings, so it cannot be resumed: {'; '.join(refused)}.")
    return changed


def versions() -> dict[str, str]:
    packages = ("torch", "transformers", "datasets", "safetensors", "huggingface_hub")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def share_out(plan: Plan, shard: Shard) -> list[int]:
    """The owner of each SAE, a rank or a group of ranks, such that all have about the same work by the clock."""
    world, configs = plan.world, plan.configs
    if len(plan.groups) == 1:
        return [0] * len(configs)
    # what a step costs depends on these; an SAE of each kind is timed by one of the owners
    facts = ("dict_size", "activation_dim", "output_dim", "skip", "k")
    kinds = [(c["trainer"].__name__, *map(c.get, facts)) for c in configs]
    batch_size, autocast = plan.sweep.sae_batch_size, getattr(torch, plan.autocast)
    timed = {
        kind: step_microseconds(configs[kinds.index(kind)], batch_size, autocast, shard)
        for kind in list(dict.fromkeys(kinds))[world.rank // shard.size :: len(plan.groups)]
    }
    # every rank takes what it is told, so that all come to the same owners
    costs = {kind: cost for part in world.gather(timed) for kind, cost in part.items()}
    places = [(c["layer"], c["submodule_name"]) for c in configs]
    return spread([costs[kind] for kind in kinds], places, len(plan.groups))


def make_buffer(
    plan: Plan, lm: LanguageModel, text: Any, readers: Mapping[Place, Iterable[int]] | None = None
) -> ActivationBuffer:
    """The run's buffer over its text, or the shards of it; readers: the ranks that read each place, default all."""
    sweep = plan.sweep
    return ActivationBuffer(
        text,
        lm,
        plan.places,
        n_tokens=sweep.buffer_tokens,
        out_batch_size=sweep.sae_batch_size,
        device=plan.device,
        seed=sweep.random_seeds[0],
        mask=sweep.mask,
        max_norm_multiple=sweep.max_norm_multiple,
        world=plan.world,
        readers=None if readers is None else {place: sorted(ranks) for place, ranks in readers.items()},
        source=cache.CachedSource if plan.options.cache or plan.options.activations else ActivationSource,
    )


def open_source(plan: Plan) -> tuple[Any, list[Any]]:
    """The language model, or what says of which one the activations are, and the shards of its text.

    Shards that another rank reads are None.
    """
    world, options, n = plan.world, plan.options, plan.text_shards
    mine = [s for s in range(n) if s % world.size == world.rank]
    if options.activations:
        dtype = getattr(torch, plan.sweep.dtype)
        names = cache.read_index(options.activations).get("found", {}).get("hook_names", {})
        lm = cache.CachedModel(plan.model_name, plan.widths, names, dtype, torch.device(plan.device))
        texts = {}
    else:
        lm = plan.lm or world.together(lambda: plan.open_model(last_layer=max(plan.layers)))
        texts = world.together(lambda: {s: plan.open_text(lm.tokenizer, evaluation=False, shard=(s, n)) for s in mine})
    world.connect(lm.device)
    folder = options.cache or options.activations
    if folder and options.cache:
        world.together(lambda: cache.begin(folder, json.loads(json.dumps(plan.cached()))), rank=0)
    if folder:
        texts = world.together(
            lambda: {
                s: cache.CachedText(cache.shard_folder(folder, s), plan.places, texts.get(s), plan.sweep.epochs)
                for s in mine
            }
        )
    return lm, [texts.get(s) for s in range(n)]


def train(
    plan: Plan,
    owners: list[int],
    shard: Shard,
    state: SavedState | None,
    tracker: Tracker,
    wandb_ids: list[str],
) -> str | None:
    """Train this rank's SAEs.  Returns a sentence if the text ended before the asked tokens; the SAEs are written."""

    sweep, world = plan.sweep, plan.world
    mine = [i for i, owner in enumerate(owners) if world.rank in plan.groups[owner]]
    led = plan.led(owners)
    readers: dict[Place, set[int]] = {place: set() for place in plan.places}
    for config, owner in zip(plan.configs, owners, strict=True):
        for site in (config["site"], config["site_out"]):
            readers[place_at(config["layer"], site)].update(plan.groups[owner])
    lm, shards = open_source(plan)
    buffer = make_buffer(plan, lm, shards, readers)
    settings = plan.settings()
    text_settings = {name: settings[name] for name in sorted(TEXT_TO_CHANGE)}
    if state is not None:
        buffer.load_state_dict(state, new_text=state.get("text_settings", text_settings) != text_settings)
    norm_factors = buffer.spreads if sweep.center else buffer.norm_factors
    means = buffer.means if sweep.center else {}
    text = {"dataset": sweep.dataset}
    model = {"lm_revision": plan.options.revision, "lm_identity": plan.identity}
    runs = make_runs(plan.configs, plan.sae_folders, lambda *of: buffer.config(*of) | text, mine, shard, model)
    for run in runs if plan.starts else ():
        ae = load_start(plan.starts[run.index])
        if sweep.center:
            ae.shift(-means[run.place], -means[run.place_out])
        ae.scale(1 / norm_factors[run.place], 1 / norm_factors[run.place_out])
        run.trainer.start_from(ae)
        run.config["trainer"]["init_from"] = plan.starts[run.index]
    autocast = getattr(torch, plan.autocast)
    configs = [plan.configs[i] for i in mine]
    workers = sweep.sae_threads or choose_workers(configs, sweep.sae_batch_size, autocast, plan.device, shard)
    workers = min(world.gather(workers))  # the same way on every rank, as the state records one
    started, before = time.monotonic(), dict(buffer.seconds)

    def timings() -> dict[str, float]:
        spent = {name: seconds - before[name] for name, seconds in buffer.seconds.items()}
        return {**spent, "SAE": time.monotonic() - started - sum(spent.values())}

    def save(step: int, loop_state: dict[str, Any]) -> None:
        plain = {"wandb_ids": wandb_ids, "text_settings": text_settings} if world.rank == 0 else {}
        entries = {**loop_state, **buffer.state_dict(), **plain}
        save_state(plan.folder / "resume", step, entries, world=world)

    loop = Loop(
        runs,
        buffer,
        norm_factors,
        plan.schedule.steps,
        save_steps=checkpoint_steps(plan) if plan.options.save_checkpoints else (),
        log_steps=sweep.log_steps,
        autocast_dtype=autocast,
        backup_steps=sweep.backup_steps,
        backup_minutes=sweep.backup_minutes,
        save_state=save,
        track=lambda i, record: tracker.log(led.index(i), record, record["step"]),
        timings=timings,
        show_progress=world.rank == 0,
        world=world,
        workers=workers,
        means=means,
    )
    if state is not None:
        loop.load_state_dict(state)
        print(f"resumed at step {loop.step:,} of {loop.steps:,}")
    if loop.workers > 1:
        print(f"{loop.workers} threads step SAEs side by side (--sae_threads 1: all threads share each step)")
    ended: str | None = None
    with _closed(shards):
        try:
            loop.train()
        except TextEndedError as end:
            ended = str(end)
        except torch.OutOfMemoryError as error:
            sizes = ", ".join(f"{name} {size_text(size)}" for name, size in memory(plan).items())
            raise ValueError(
                f"{plan.device} is out of memory. It has to hold: {sizes}. Train fewer SAEs at a time "
                "(--architectures, --dictionary_widths, --target_l0s), or lower --sae_batch_size or --buffer_tokens."
            ) from error
        end_cache(plan, buffer)
    world.gather(None)  # every SAE is written
    seconds = time.monotonic() - started
    texts = world.gather([(text.skipped, text.n_read) for text in shards if text is not None])
    skipped = sum((skipped for part in texts for skipped, _ in part), Counter())
    n_read = sum(n for part in texts for _, n in part)
    about_text = {"rows": n_read, "skipped": dict(skipped)}
    world.together(lambda: finish_training(plan, buffer, loop, wandb_ids, seconds, ended, about_text), rank=0)
    if world.rank == 0 and (sentence := skipped_sentence(skipped, n_read)):
        print(sentence, file=sys.stderr)
    return ended


@contextmanager
def _closed(shards: Iterable[Any]) -> Iterator[None]:
    """The shards of the text, but those of other ranks, are closed after this."""
    try:
        yield
    finally:
        for text in filter(None, shards):
            text.close()


def end_cache(plan: Plan, buffer: ActivationBuffer) -> None:
    """What the buffer has read is in the cache, and what it found there too."""
    folder, source = plan.options.cache, buffer.source
    if folder is None:
        return
    assert isinstance(source, cache.CachedSource)
    plan.world.together(source.flush)
    found = {
        "positions": buffer.counts,
        "norm_factors": by_key(buffer.norm_factors),
        "mean_to_std": by_key(buffer.mean_to_std),
        "median_norms": by_key(buffer.median_norms),
        "hook_names": {name_of(place): buffer.lm.hook_name(place) for place in plan.places},
        "versions": versions(),
    }
    plan.world.together(lambda: cache.note(folder, **found), rank=0)


def write_cache(plan: Plan) -> int:
    """Write the activations that the run's SAEs would be trained on, and train none."""
    world, steps, ended = plan.world, plan.schedule.steps, False
    started = time.monotonic()
    lm, shards = open_source(plan)
    buffer = make_buffer(plan, lm, shards, dict.fromkeys(plan.places, [0]))
    again = "continue with the same command"
    with _closed(shards):
        try:
            with signals_noted() as signals:
                for step in tqdm(range(steps), unit="step", desc="activations", disable=world.rank > 0):
                    (stop,) = world.ask_largest(len(signals))()
                    if stop:
                        end_cache(plan, buffer)
                        world.tell(f"stopped after {step:,} of {steps:,} steps: {again}")
                        return INTERRUPTED
                    if next(buffer, None) is None:
                        ended = True
                        break
        except ConnectionError as error:
            end_cache(plan, buffer)
            world.tell(f"{error}: {again}")
            return INTERRUPTED
        end_cache(plan, buffer)
    folder, seconds = plan.options.cache, time.monotonic() - started
    assert folder is not None
    world.gather(None)  # every shard is written
    n_positions, size = cache.held(folder, plan.text_shards)
    print(f"{folder} holds {n_positions:,} activations of each place, {size_text(size)} ({seconds:.0f} s)")
    if ended:
        world.tell("the text ended before the asked tokens: give the same command more --epochs")
        return ENDED_EARLY
    return 0


def open_tracker(plan: Plan, mine: list[int], ids: list[str]) -> Tracker:
    """W&B runs for these SAEs, continued where the SAEs of the run have ids already; or what keeps nothing."""
    if not plan.options.use_wandb:
        return Tracker()
    return WandbRuns(
        [plan.configs[i]["wandb_name"] for i in mine],
        [{**plan.configs[i], "trainer": plan.configs[i]["trainer"].__name__} for i in mine],
        project=plan.sweep.wandb_project,
        entity=plan.sweep.wandb_entity,
        group=plan.folder.name,
        folder=plan.folder,
        ids=[ids[i] for i in mine] if ids else [],
        histories=[plan.sae_folders[i] / "metrics.jsonl" for i in mine],
    )


def finish_training(
    plan: Plan,
    buffer: ActivationBuffer,
    loop: Loop,
    wandb_ids: list[str],
    seconds: float,
    ended: str | None,
    about_text: dict[str, Any],
) -> None:
    """Note in run.json that the SAEs are trained, and on what; unless the text ended, the resume state has served."""
    record = plan.folder / "run.json"
    content = read_json(record) | {
        "trained": ended is None,
        "tokens": loop.tokens,
        "seconds": round(seconds, 1),
        "seconds_saving_state": round(loop.seconds_in_state, 2),
        "norm_factors": by_key(loop.norm_factors),
        "mean_to_std": by_key(buffer.mean_to_std),
        "positions": dict(buffer.counts),
        "sae_threads": loop.workers,
        "llm_batch_halvings": buffer.llm_batch_halvings,  # for want of memory
        "wandb_ids": wandb_ids,
        **about_text,
    }
    content.pop("ended_early", None)
    if ended is not None:
        content["ended_early"] = {"step": loop.step, "steps": loop.steps, "tokens": loop.tokens}
    write_json(record, content)
    if ended is None:
        shutil.rmtree(plan.folder / "resume", ignore_errors=True)
    print(f"trained on {loop.tokens:,} tokens in {seconds:.0f} s ({loop.tokens / max(seconds, 1e-9):,.0f} tokens/s)")
    ratios = ", ".join(f"{ratio:.2f} in {words_of(place)}" for place, ratio in buffer.mean_to_std.items())
    hint = "" if plan.sweep.center else " (--center subtracts the mean)"
    print(f"|mean| / std of the activations: {ratios}{hint}")


# -- the walk


def check(plan: Plan) -> None:
    """Print the plan, and find out what stands in its way before anything is loaded."""
    print(describe(plan))
    check_disk(plan)
    check_text(plan)
    options = plan.options
    if options.hf_repo_id and not options.dry_run:
        from .hub import check_repo

        place = {"private": options.private, "run_folder": plan.folder, "overwrite": options.overwrite}
        print(check_repo(options.hf_repo_id, **place) or f"uploads go to {options.hf_repo_id}")


def carry_out(plan: Plan) -> int:
    """Train, evaluate, plot, report, upload; what an earlier part of the run has done is not done again.

    Each stage after training is tried even if the one before failed; what is missing is told, with the command for it.
    """
    options, world, n_saes = plan.options, plan.world, len(plan.configs)
    record, plan.text_shards = world.together(lambda: (prepare_folder(plan), plan.text_shards), rank=0)
    trained = record.get("trained", False)
    state = None if trained else load_state(plan.folder / "resume", world=world)
    use_kernels(plan.sweep.kernels)
    shard = world.split(options.shard_latents)
    owners = [i % len(plan.groups) for i in range(n_saes)] if trained else share_out(plan, shard)
    mine = plan.led(owners)
    tracker = open_tracker(plan, mine, record.get("wandb_ids", []) if state is None else state["wandb_ids"])
    ids = {i: name for part in world.gather(dict(zip(mine, tracker.ids, strict=False))) for i, name in part.items()}
    ended: str | None = None
    stages = Stages()
    try:
        if not trained:
            ended = train(plan, owners, shard, state, tracker, [ids[i] for i in sorted(ids)])
        if options.circuit_tracer and world.rank == 0:
            with stages.stage("export for circuit-tracer"):
                export_transcoders(plan)
        if not options.no_eval:
            again = f"python demo.py --eval_only {shlex.quote(str(plan.folder))}"
            with stages.stage("evaluation", again):
                evaluate_run(plan, mine, tracker)
            with stages.stage("plot", again):
                if world.rank == 0:
                    plot(plan.folder)
    except Interrupted as stop:
        world.tell(f"{stop}. Continue with: {_command_again(plan)} --resume")
        return INTERRUPTED
    finally:
        for sentence in tracker.finish():
            print(sentence, file=sys.stderr)
    if world.rank > 0:
        return 0
    if options.report:
        with stages.stage("report", f"python -m dictionary_learning.report {shlex.quote(str(plan.folder))}"):
            from .report import write_reports

            write_reports(plan.folder, device=plan.device, trust_remote_code=options.trust_remote_code)
    if options.hf_repo_id:
        with stages.stage("upload"):  # its error names the command
            upload(options, plan.folder)
    if ended is not None:
        print(f"{ended} Continue with more text or --epochs: {_command_again(plan)} --resume", file=sys.stderr)
    return 2 if stages.failed else 0 if ended is None else ENDED_EARLY


@dataclass
class Stages:
    """The stages after training: one that fails is told, and stops no other."""

    failed: bool = False

    @contextmanager
    def stage(self, name: str, again: str | None = None) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            self.failed = True
            print(f"error: {name}: {error}" + (f"; then: {again}" if again else ""), file=sys.stderr)


def _command_again(plan: Plan) -> str:
    if plan.world.size > 1:
        return "the same command and"
    return shlex.join(["python", *(word for word in plan.options.command if word not in ("--resume", "--overwrite"))])


def evaluate_run(plan: Plan, mine: Sequence[int], tracker: Tracker) -> None:
    """Evaluate all SAEs of the run; of those that this rank tracks, note the results."""
    saes = [Named(str(folder), folder, plan.folder / "run.json") for folder in plan.sae_folders]
    results = evaluate(saes, lambda _: plan, plan.rows, plan.world)
    for n, i in enumerate(mine):
        if str(plan.sae_folders[i]) in results:
            tracker.summary(n, results[str(plan.sae_folders[i])].results)


def evaluate_only(
    resolve: Callable[[Mapping[str, Any]], tuple[Options, Sweep]], rows: Mapping[str, Architecture], world: World
) -> int:
    """Evaluate SAEs of any runs and families in one table.

    resolve: from what a run or a config says to what holds with the flags that were given.
    """
    options, _ = resolve({})
    device = str(world.place(resolve_device(options.device)))

    readings: dict[str, Reading] = {}  # SAEs of one run have one

    def reading(recorded: Mapping[str, Any]) -> Reading:
        check_recorded(recorded, "its config")
        # of what a file says nothing else is taken: that of somebody else's could ask for their code to be run
        names = (*EVALUATION_SETTINGS, "llm_batch_size", "eval_batch_size", "attn_implementation")
        said = {name: recorded[name] for name in names if name in recorded}
        new = Reading(*resolve(said), device, world, recorded=recorded)
        return readings.setdefault(json.dumps(recorded, sort_keys=True), new)

    names = options.eval_only or [str(run_folder(options))]
    saes = world.together(lambda: [sae for name in names for sae in find_named(name, Path(options.save_dir))])
    measured = evaluate(saes, reading, rows, world)
    for folder in filter(Path.is_dir, map(Path, names)) if world.rank == 0 else ():
        if any(one.path.name == RESULTS and one.path.is_relative_to(folder) for one in measured.values()):
            plot(folder)
    return 0


def export_transcoders(plan: Plan) -> None:
    """Write the run's transcoders for circuit-tracer: a folder for each of the grid, with its ones of all layers."""
    sets: dict[str, dict[int, tuple[Dictionary, dict[str, Any]]]] = {}
    for config, folder in zip(plan.configs, plan.sae_folders, strict=True):
        sets.setdefault(folder.name, {})[config["layer"]] = load_dictionary(folder)
    for name, saes in sets.items():
        place = plan.folder / EXPORT / name
        transcoders = {layer: ae for layer, (ae, _) in saes.items()}
        write_transcoders(place, transcoders, next(iter(saes.values()))[1]["trainer"])
        print(f"for circuit-tracer: {place}")


def plot(folder: Path) -> None:
    from .plotting import plot_pareto

    for problem in plot_pareto([folder], folder / "pareto.png"):
        print(problem, file=sys.stderr)
    print(f"plot: {folder / 'pareto.png'}")


def upload(options: Options, folder: str | Path) -> int:
    from .hub import upload_run

    if options.hf_repo_id is None:
        raise ValueError("--upload_only needs --hf_repo_id USER/REPO.")
    print(f"uploaded to {upload_run(folder, options.hf_repo_id, private=options.private, overwrite=options.overwrite)}")
    return 0
