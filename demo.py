"""Train, evaluate and share sparse autoencoders on a language model.

This file is the command line: flags and demo_config.py become a plan, and the plan is carried out.  What is done stands
in `dictionary_learning/`.

Started by torchrun, every process (rank) walks the same plan: each trains and evaluates its share of the SAEs and runs
the language model on its share of the text; rank 0 speaks, and writes what belongs to the whole run.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import demo_config
from demo_config import ARCHITECTURES, DEFAULTS, LLM_CONFIG, PRESETS
from dictionary_learning.sweep import ENDED_EARLY, INTERRUPTED, Options, Sweep, check_recorded, check_sweep

if TYPE_CHECKING:
    from dictionary_learning.plan import Plan
    from dictionary_learning.world import World

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
  python demo.py --layers 0 1 2 3 --transcoder mlp --skip --circuit_tracer --architectures batch_top_k
      transcoders of the built-in model's MLPs, for SAELens and circuit-tracer; --sites reads other places of a layer
  torchrun --nproc_per_node 8 demo.py --model_name google/gemma-2-2b --layers 5 12 19
      the same sweep on eight GPUs

exit codes: 0 done; 2 something to mend in the command or its surroundings; {ENDED_EARLY} the text ended before the
asked tokens, the SAEs are written, and --resume goes on with more text or --epochs; {INTERRUPTED} stopped after a saved
state (by a signal, for want of the network, or because a process was lost), to be continued with --resume; 130 stopped
at once by a second Ctrl-C.
"""


# -- flags


def build_parser() -> argparse.ArgumentParser:
    """All flags; one that is not given is None."""
    parser = argparse.ArgumentParser(
        description="Train, evaluate and share sparse autoencoders (SAEs) on a language model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags = {field.name: field for field in (*dataclasses.fields(Options), *dataclasses.fields(Sweep))}
    options = {name: field.default for name, field in flags.items() if field.default is not dataclasses.MISSING}
    options["architectures"] = demo_config.DEFAULT_ARCHITECTURES
    for title, values in {"the run": options, **DEFAULTS}.items():
        group = parser.add_argument_group(title)
        for name, value in values.items():
            _add(group, flags[name], value)
    return parser


def _add(group: Any, field: dataclasses.Field, value: Any) -> None:
    """The flag of a field; `value` is what it has where neither it nor a model's row or preset is given."""
    text = field.metadata["help"]
    if "default:" not in text and value is not False:
        words = value if isinstance(value, list) else [f"{value:_}" if type(value) is int else value or "none"]
        text += f" (default: {' '.join(map(str, words))})"
    group.add_argument(f"--{field.name}", default=None, help=text.replace("%", "%%"), **_kind(field))


def _kind(field: dataclasses.Field) -> dict[str, Any]:
    """How argparse reads the flag of a field, from its annotation and metadata."""
    told = {name: value for name, value in field.metadata.items() if name not in ("help", "least")}
    if field.type is bool:  # False of itself, or a value that a model's row or a preset may set
        return {"action": "store_true" if field.default is False else argparse.BooleanOptionalAction}
    annotation = str(field.type)
    kinds = {"float": float, "int": partial(_count, least=field.metadata.get("least", 1)), "str": str}
    kind = next(kinds[name] for name in kinds if name in annotation)
    many = {"nargs": "+"} if "list" in annotation else {}
    choices = {"architectures": {"choices": list(ARCHITECTURES)}, "preset": {"choices": list(PRESETS)}}
    return {"type": kind, **many, **choices.get(field.name, {}), **told}


def _count(text: str, least: int) -> int:
    """A whole number of at least so much, also written 50_000_000 or 5e7."""
    try:
        value = (
            int(text) if text.lstrip("+-").replace("_", "").isdecimal() else float(text)
        )  # a float rounds above 2**53
    except ValueError:
        value = float("nan")
    if not math.isfinite(value) or int(value) != value or value < least:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
    return int(value)


def resolve(args: argparse.Namespace, recorded: Mapping[str, Any] | None = None) -> tuple[Options, Sweep]:
    """Defaults, then the model's row, the preset, what an earlier run recorded, and the flags: the last one counts."""
    recorded = recorded or {}
    given = {name: value for name, value in vars(args).items() if value is not None}
    of_options, of_sweep = ({field.name for field in dataclasses.fields(cls)} for cls in (Options, Sweep))
    asked = {**recorded, **given}
    options = Options(**{name: value for name, value in asked.items() if name in of_options})
    options.architectures = options.architectures or demo_config.DEFAULT_ARCHITECTURES
    preset_layers = demo_config.PRESET_LAYERS.get(options.preset, {}) if options.preset else {}
    of_model = preset_layers.get(options.model_name) or demo_config.DEFAULT_LAYERS.get(options.model_name)
    options.layers = options.layers or of_model

    values = LLM_CONFIG.get(options.model_name, {}) | PRESETS.get(options.preset or "", {})
    sweep = Sweep.of(DEFAULTS, **values | {name: value for name, value in asked.items() if name in of_sweep})
    train_default, eval_default = demo_config.DEFAULT_DATASET
    sweep.eval_dataset = sweep.eval_dataset or sweep.dataset or eval_default
    sweep.dataset = sweep.dataset or train_default
    sweep.eval_split = sweep.eval_split or sweep.split
    sweep.eval_text_column = sweep.eval_text_column or sweep.text_column
    if sweep.eval_dataset == sweep.dataset:
        sweep.eval_subset = sweep.eval_subset or sweep.subset
    return options, sweep


def make_plan(args: argparse.Namespace, world: "World") -> "Plan":
    """What the flags ask for, resolved against the model and the machine; ValueError for what cannot work."""
    options, sweep = resolve(args)
    from dictionary_learning import cache, plan

    if options.activations:  # what they are of is not asked again
        index = cache.read_index(options.activations)
        said = {"layers": index["layers"], **index["settings"]}
        check_recorded(said, f"the index in {options.activations}")
        options, sweep = resolve(args, said)
    check_sweep(sweep, options.architectures)

    defaults = dataclasses.asdict(Sweep.of(DEFAULTS))
    return plan.make_plan(options, sweep, ARCHITECTURES, defaults, world)


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


class Terminated(BaseException):
    """SIGTERM, where no training step has to be finished first."""


def _terminate(*_: Any) -> None:
    raise Terminated


def walk(args: argparse.Namespace) -> int:
    """Run the command in the world that torchrun made, if it did; an error becomes a sentence and an exit code."""
    from dictionary_learning.world import AgreedError, LostProcess, World

    world = World()
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        world = World.start(resolve(args)[0].timeout_minutes)
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
    except Terminated:
        world.tell("stopped by SIGTERM; a run that has begun is continued with the same command and --resume")
        return INTERRUPTED
    except KeyboardInterrupt:
        world.tell("stopped at once; --resume continues from the last saved state")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def run(args: argparse.Namespace, world: "World") -> int:
    from dictionary_learning.run import carry_out, check, evaluate_only, upload, write_cache

    if args.upload_only is not None:
        return upload(resolve(args)[0], args.upload_only) if world.rank == 0 else 0
    if args.eval_only is not None:
        return evaluate_only(partial(resolve, args), ARCHITECTURES, world)
    plan = world.together(lambda: make_plan(args, world))
    world.together(lambda: check(plan), rank=0)
    if args.dry_run:
        return 0
    return write_cache(plan) if args.cache_only else carry_out(plan)


if __name__ == "__main__":
    code = main()
    if "WORLD_SIZE" in os.environ:
        # Threads of torch.distributed that still let go of Python objects can abort a process that ends in Python's
        # own way, and torchrun would end rank 0 with it.  All that has to be closed is closed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
