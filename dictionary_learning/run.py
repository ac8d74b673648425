"""The run folder, and the walk: train, evaluate, plot, report, upload."""

import json
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .buffer import ActivationBuffer, Mask
from .evaluation import evaluate_saes
from .files import read_json, write_atomic, write_json
from .formats import find_saes, load_dictionary
from .kernels import Shard, use_kernels
from .model import LanguageModel, load_model
from .plan import Plan, check_disk, check_text, checkpoint_steps, describe, memory, open_text, size_text
from .state import SavedState, load_state, save_state
from .sweep import INTERRUPTED, Architecture
from .tracking import Tracker, WandbRuns
from .training import Interrupted, Loop, make_runs, step_microseconds
from .world import job, restarted, spread


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
        settings = read_json(record)["settings"]
        plan.text_shards = plan.sweep.text_shards or settings.get("text_shards", 1)  # whatever the processes now
        refuse_changes(settings, json.loads(json.dumps(plan.settings())))
    elif plan.options.resume:
        raise ValueError(f"there is no run to resume in {plan.folder}.")
    elif plan.folder.exists() and any(plan.folder.iterdir()):
        raise ValueError(f"{plan.folder} exists and holds other things: choose another --save_dir.")
    begun = {
        "settings": plan.settings(),
        "command": shlex.join(["python", *plan.options.command]),
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
    packages = ("torch", "transformers", "datasets", "safetensors", "huggingface_hub")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def share_out(plan: Plan, shard: Shard) -> list[int]:
    """The owner of each SAE, a rank or a group of ranks, such that all have about the same work by the clock."""
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


def open_model(plan: Plan, last_layer: int | None = None) -> LanguageModel:
    """The run's language model, up to a layer or whole."""
    return load_model(
        plan.model_name,
        device=plan.device,
        dtype=getattr(torch, plan.sweep.dtype),
        last_layer=last_layer,
        attn_implementation=plan.sweep.attn_implementation,
        revision=plan.options.revision,
        trust_remote_code=plan.options.trust_remote_code,
    )


def make_buffer(
    plan: Plan, lm: LanguageModel, text: Any, readers: Mapping[int, Iterable[int]] | None = None
) -> ActivationBuffer:
    """The run's buffer over its text, or the shards of it; readers: the ranks that read each layer, default all."""
    sweep = plan.sweep
    return ActivationBuffer(
        text,
        lm,
        plan.layers,
        n_tokens=sweep.buffer_tokens,
        out_batch_size=sweep.sae_batch_size,
        device=plan.device,
        seed=sweep.random_seeds[0],
        mask=sweep.mask,
        max_norm_multiple=sweep.max_norm_multiple,
        world=plan.world,
        readers=None if readers is None else {layer: sorted(ranks) for layer, ranks in readers.items()},
    )


def train(
    plan: Plan,
    owners: list[int],
    shard: Shard,
    state: SavedState | None,
    tracker: Tracker,
    wandb_ids: list[str],
) -> None:

    sweep, world = plan.sweep, plan.world
    mine = [i for i, owner in enumerate(owners) if world.rank in plan.groups[owner]]
    led = plan.led(owners)
    readers: dict[int, set[int]] = {layer: set() for layer in plan.layers}
    for config, owner in zip(plan.configs, owners, strict=True):
        readers[config["layer"]].update(plan.groups[owner])
    lm = world.together(lambda: open_model(plan, last_layer=max(plan.layers)))
    world.connect(lm.device)
    n = plan.text_shards
    shards = world.together(
        lambda: [
            open_text(plan, lm.tokenizer, evaluation=False, shard=(s, n)) if s % world.size == world.rank else None
            for s in range(n)
        ]
    )
    buffer = make_buffer(plan, lm, shards, readers)
    if state is not None:
        buffer.load_state_dict(state)
    norm_factors = buffer.norm_factors
    about = {"dataset": sweep.dataset}
    runs = make_runs(plan.configs, plan.sae_folders, lambda layer: buffer.config(layer) | about, mine, shard)
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
        save_steps=checkpoint_steps(plan) if plan.options.save_checkpoints else (),
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
        sizes = ", ".join(f"{name} {size_text(size)}" for name, size in memory(plan).items())
        raise ValueError(
            f"{plan.device} is out of memory. It has to hold: {sizes}. Train fewer SAEs at a time (--architectures, "
            "--dictionary_widths, --target_l0s), or lower --sae_batch_size or --buffer_tokens."
        ) from error
    finally:
        for text in filter(None, shards):
            text.close()
    world.gather(None)  # every SAE is written
    world.together(lambda: finish_training(plan, buffer, loop, wandb_ids, time.monotonic() - started), rank=0)


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


def finish_training(plan: Plan, buffer: Any, loop: Any, wandb_ids: list[str], seconds: float) -> None:
    """Note in run.json that the SAEs are trained, and on what; the resume state has served."""
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
    world, saes, masks = plan.world, [], {}
    for folder in folders[len(folders) * world.rank // world.size : len(folders) * (world.rank + 1) // world.size]:
        try:
            ae, config = load_dictionary(folder)
            trained_on = str(config["trainer"].get("lm_name"))
            if Path(trained_on).name != Path(plan.model_name).name:
                raise ValueError(f"it was trained on {trained_on}: give --model_name {trained_on}")
        except (ValueError, OSError) as error:
            print(f"not evaluated: {folder}: {error}", file=sys.stderr)
            continue
        saes.append((str(folder), ae, int(config["trainer"]["layer"])))
        masks[str(folder)] = Mask.of({"mask": plan.sweep.mask} | config["buffer"])
    if not any(world.gather(len(saes))):
        raise ValueError(f"there is no SAE to evaluate in {', '.join(map(str, folders)) or plan.folder}.")
    parts = world.gather(world.together(lambda: evaluate_share(plan, saes, masks) if saes else {}))
    results = {Path(name): result for part in parts for name, result in part.items()}
    if world.rank == 0:
        print_table(results, plan.rows)
    return results


def evaluate_share(plan: Plan, saes: list[tuple[str, Any, int]], masks: dict[str, Mask]) -> dict[str, Any]:
    """Evaluate this rank's share of the SAEs, (folder, SAE, layer), and write what comes out into their folders."""
    lm = open_model(plan)
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
        raise ValueError(f"{plan.sweep.eval_dataset} has no text for evaluation: give another --eval_dataset.")
    evaluations = evaluate_saes(
        lm,
        saes,
        batches,
        masks=masks,
        hyperparameters={"dataset": plan.sweep.eval_dataset, "held_out": plan.held_out},
        show_progress=plan.world.rank == 0,
    )
    for name, evaluation in evaluations.items():
        write_json(Path(name) / "eval_results.json", evaluation.results)
        if evaluation.density_F is not None:
            density = {"density": evaluation.density_F.float().contiguous()}
            write_atomic(Path(name) / "density.safetensors", lambda tmp, density=density: save_file(density, tmp))
    return {name: evaluation.results for name, evaluation in evaluations.items()}


def print_table(evaluations: dict[Path, dict[str, Any]], architectures: Mapping[str, Architecture]) -> None:
    """A line for each SAE, and what is wrong with it."""
    names = {row.trainer: name for name, row in architectures.items()}
    rows: list[tuple[str, ...]] = [
        ("layer", "architecture", "width", "setting", "L0", "loss recovered", "variance explained", "alive")
    ]
    for folder, results in evaluations.items():
        trainer = read_json(folder / "config.json")["trainer"]
        architecture = str(names.get(trainer["trainer_class"], trainer["trainer_class"]))
        varies = architectures[architecture].varies if architecture in architectures else ""
        setting = f"{varies} {trainer.get(varies, '')}"
        numbers = ("l0", "frac_recovered", "frac_variance_explained", "frac_alive")
        cells = [f"{results[key]:.4g}" if results[key] is not None else "-" for key in numbers]
        rows.append((str(trainer["layer"]), architecture, str(trainer["dict_size"]), setting, *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for folder, results in evaluations.items():
        for kind in ("error", "warning"):
            if kind in results:
                print(f"{kind}: {folder}: {results[kind]}", file=sys.stderr)


# -- the walk


def check(plan: Plan) -> None:
    """Print the plan, and find out what stands in its way before anything is loaded."""
    print(describe(plan))
    check_disk(plan)
    check_text(plan)
    options = plan.options
    if options.hf_repo_id and not options.dry_run:
        from .hub import check_repo

        print(
            check_repo(options.hf_repo_id, options.private, run_folder=plan.folder, overwrite=options.overwrite)
            or f"uploads go to {options.hf_repo_id}"
        )


def carry_out(plan: Plan) -> int:
    """Train, evaluate, plot, report, upload; what an earlier part of the run has done is not done again."""
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
    try:
        if not trained:
            train(plan, owners, shard, state, tracker, [ids[i] for i in sorted(ids)])
        if not options.no_eval:
            results = evaluate(plan, plan.sae_folders)
            for n, i in enumerate(mine):
                if plan.sae_folders[i] in results:
                    tracker.summary(n, results[plan.sae_folders[i]])
            if world.rank == 0:
                plot(plan.folder)
    except Interrupted as stop:
        again = shlex.join(["python", *(word for word in options.command if word not in ("--resume", "--overwrite"))])
        world.tell(f"{stop}. Continue with: {again if world.size == 1 else 'the same command and'} --resume")
        return INTERRUPTED
    finally:
        for sentence in tracker.finish():
            print(sentence, file=sys.stderr)
    if world.rank > 0:
        return 0
    if options.report:
        from .report import write_reports

        write_reports(plan.folder, device=plan.device, trust_remote_code=options.trust_remote_code)
    return upload(plan.folder, options.hf_repo_id, options.private, options.overwrite) if options.hf_repo_id else 0


def evaluate_only(plan: Plan) -> int:
    for folder in map(Path, plan.options.eval_only or [plan.folder]):
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder.")
        evaluate(plan, find_saes(folder))
        if plan.world.rank == 0:
            plot(folder)
    return 0


def plot(folder: Path) -> None:
    from .plotting import plot_pareto

    for problem in plot_pareto([folder], folder / "pareto.png"):
        print(problem, file=sys.stderr)
    print(f"plot: {folder / 'pareto.png'}")


def upload(folder: str | Path, repo_id: str | None, private: bool, overwrite: bool) -> int:
    from .hub import upload_run

    if repo_id is None:
        raise ValueError("--upload_only needs --hf_repo_id USER/REPO.")
    print(f"uploaded to {upload_run(folder, repo_id, private=private, overwrite=overwrite)}")
    return 0
