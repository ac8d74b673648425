"""Tokens a second of a whole training run, from text to SAE steps, ours beside the reference's.

    python benchmarks/pipeline.py
    python benchmarks/pipeline.py --architectures batch_top_k --dictionary_widths 4096 --nnsight PYTHON

The run is `demo.py`'s on the built-in model and text; flags that are not in --help go to demo.py.  The reference is
dictionary-learning 0.1.0: its trainSAE, its trainers with the same settings and its ActivationBuffer, which is given
the contexts that we train on as text.  Both have the same model, layer, grid, batch sizes and buffer; both normalise,
and neither writes anything.  A latent counts as dead after 10 million tokens, as is fixed in the reference: neither
computes an auxiliary loss.

    reference           its buffer reads the model by a plain hook, as its later versions do (`contest.HookedModel`)
    reference, nnsight  the package as it is, with --nnsight: the Python of an environment that has nnsight 0.3
    saelens             6.54, with --peer saelens[=WHERE]: one SAE by LanguageModelSAETrainingRunner, several at once by
                        MultiSAETrainingRunner; top_k and batch_top_k alone
    sparsify            1.3.3, with --peer sparsify[=WHERE]: its Trainer with Adam; top_k alone, and one SAE at a time:
                        every SAE is a run and a process of its own, whose seconds are added up
    ours at CHECKOUT    with --against CHECKOUT, a folder with another version of this project: its own pipeline.py
    floor               the bare forward of the same tokens up to the layer, and x E^T for every SAE of every step

WHERE is a folder with the package or the Python of an environment that has it; without it, this Python.

Contestants work in processes of their own, in turn, for --refills refills of the buffer with all the steps between.
Steady state is timed: what comes before the first turn (imports, loading, the first refill, norm factors) is not, and
nor is an end, as no run is let come to one.  Nobody logs, evaluates, or writes a file.  A turn ends where the next
batch is asked for, and begins there, for each of them:

    ours, reference     text is read and tokenised, the model run up to the layer, the buffer shuffled, the SAEs stepped
    saelens             the same from contexts tokenised beforehand, the way its documentation advises; its model is
                        AutoModelForCausalLM, stopped at the layer; half of its buffer is served, then refilled; it
                        normalises; other settings are its defaults
    sparsify            contexts tokenised beforehand, as it must have them; the model is run to its last layer, once
                        for every SAE, as its Trainer does; no buffer: a step's batch is whole contexts in their order;
                        it does not normalise; other settings are its defaults
    floor               neither text nor buffer

The table: median trained tokens a second; the same times the number of SAEs; the spread (interquartile range over
median); the ratio of seconds to `ours` in the same round (median of ratios); the peak memory of the process (all of its
resident memory on the CPU since it began, imports and loading too; of several processes, the largest one's); and where
the time goes, in microseconds a trained token, from one more round in which CUDA is waited for at every change of part.
`text` is what the run waits for text and tokens, `LLM` the model's own code, `buffer` all else that the buffer does,
`SAE` all else.

With --busy all of it is done twice: with nothing else running, and beside a process that computes without a pause from
before the contestants start, so that whatever they measure at their start they measure beside it.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import contest
import torch

NORM_BATCHES = 102  # that the reference takes from the buffer for its norm factor
PARTS = ("text", "LLM", "buffer", "SAE")
SAELENS = {"TopKTrainer": "TopKTrainingSAEConfig", "BatchTopKTrainer": "BatchTopKTrainingSAEConfig"}
PEERS = {"saelens": {*SAELENS}, "sparsify": {"TopKTrainer"}}  # and whose SAEs they train here


class Clock:
    """Seconds by part; where `exact`, the device has finished each part before the next begins."""

    def __init__(self, device: str):
        self.device, self.exact = device, False
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self.add(part, -1)
        yield
        self.add(part, 1)

    def add(self, part: str, sign: int) -> None:
        if self.exact:
            contest.synchronize(self.device)
        self.seconds[part] += sign * time.perf_counter()

    def time_between(self, first: torch.nn.Module, last: torch.nn.Module, *parts: str) -> None:
        """From the start of one module to the end of another, whoever calls them and whatever hooks they have."""

        def add(sign: int) -> None:
            for part in parts:
                self.add(part, sign)

        first.register_forward_pre_hook(lambda *_: add(-1))
        forward = last.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            add(1)
            return output

        last.forward = run

    def time_llm(self, model: Any, block: torch.nn.Module) -> None:
        """From the embedding to the end of the block."""
        self.time_between(model.get_input_embeddings(), block, "LLM")


class TimedText:
    """Batches of text, and how long they are waited for."""

    def __init__(self, text: Any, clock: Clock):
        self.text, self.clock = text, clock

    def __next__(self) -> Any:
        with self.clock("text"):
            return next(self.text)

    def state_dict(self) -> dict[str, Any]:
        return self.text.state_dict()


class Paced:
    """The same batches in segments, each when it is asked for; the first refill and `n_before` batches are no part."""

    def __init__(self, batches: Iterator, work: dict[str, Any], clock: Clock, n_before: int = 0):
        self.batches, self.work, self.clock = batches, work, clock
        self.n_left = n_before + work["steps_a_refill"]
        self.questions = contest.questions()
        self.started: float | None = None

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        if self.n_left == 0:
            self._next_segment()
        self.n_left -= 1
        with self.clock("batches"):
            return next(self.batches)

    def _next_segment(self) -> None:
        contest.synchronize(self.clock.device)
        if self.started is None:
            contest.answer(ready=True)
        else:
            seconds, parts = time.perf_counter() - self.started, self.clock.seconds
            parts["SAE"] = seconds - parts["batches"]
            parts["buffer"] = parts.pop("batches") - parts["text"] - parts["LLM"]
            contest.answer(seconds=seconds, **parts)
        self.clock.exact = next(self.questions) == "exact"
        self.n_left = self.work["steps_a_segment"]
        self.clock.seconds.clear()
        self.started = time.perf_counter()


def make_plan(args: argparse.Namespace) -> Any:
    sys.path.append(str(contest.ROOT))
    import demo
    from dictionary_learning.world import World

    flags = ["--device", args.device, "--architectures", *args.architectures, *args.demo_flags]
    plan = demo.make_plan(demo.build_parser().parse_args(flags), World())
    for config in plan.configs:
        config["dead_feature_threshold"] = 10_000_000
    return plan


def make_work(plan: Any, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What the contestants need, as JSON; the reference's text is what our contexts say, one a line."""
    from dictionary_learning.model import BUILT_IN, load_tokenizer

    sweep, steps = plan.sweep, plan.schedule.steps
    # both buffers fill up when fewer than half of their positions are unread
    steps_a_refill = sweep.buffer_tokens // 2 // sweep.sae_batch_size + 1
    if steps < (1 + (args.rounds + 1) * args.refills) * steps_a_refill:
        raise SystemExit(f"a run of {steps} steps is too short: give more --num_tokens")
    tokenizer = load_tokenizer(plan.model_name)
    text = plan.open_text(tokenizer, evaluation=False)
    n_tokens = (steps + NORM_BATCHES) * sweep.sae_batch_size + sweep.buffer_tokens  # so that nobody begins again
    n_batches = math.ceil(n_tokens / (sweep.llm_batch_size * sweep.context_length))
    tokens_NL = torch.cat([next(text)[0] for _ in range(n_batches)])
    text.close()
    torch.save(tokens_NL, f"{folder}/tokens")
    with open(f"{folder}/texts", "w") as file:
        file.writelines(json.dumps(tokenizer.decode(context)) + "\n" for context in tokens_NL.tolist())
    trainers = [{"module": c["trainer"].__module__, "trainer": c["trainer"].__name__} for c in plan.configs]
    return {
        "steps_a_refill": steps_a_refill,
        "steps_a_segment": args.refills * steps_a_refill,
        "steps": steps,
        "model": str(BUILT_IN[plan.model_name]),
        "texts": f"{folder}/texts",
        "tokens": f"{folder}/tokens",
        "layer": plan.layers[0],
        "device": plan.device,
        "autocast": plan.autocast,
        "configs": [config | trainer for config, trainer in zip(plan.configs, trainers, strict=True)],
        "buffer": {
            "d_submodule": plan.activation_dim,
            "n_ctxs": sweep.buffer_tokens // sweep.context_length,
            "ctx_len": sweep.context_length,
            "refresh_batch_size": sweep.llm_batch_size,
            "out_batch_size": sweep.sae_batch_size,
            "device": plan.device,
        },
    }


# -- the contestants


def load_ours(plan: Any) -> tuple[Any, Any]:
    lm = plan.open_model(last_layer=plan.layers[0])
    return lm, plan.open_text(lm.tokenizer, evaluation=False)


def ours(plan: Any, work: dict[str, Any]) -> None:
    from dictionary_learning.run import make_buffer
    from dictionary_learning.training import Loop, choose_workers, make_runs

    sweep, clock = plan.sweep, Clock(plan.device)
    lm, text = load_ours(plan)
    lm.activations = contest.timed(lm.activations, clock, "LLM")  # its passes run side by side, on several threads
    buffer = make_buffer(plan, lm, TimedText(text, clock))
    norm_factors = buffer.norm_factors
    runs = make_runs(plan.configs, [None] * len(plan.configs), buffer.config)
    autocast = getattr(torch, plan.autocast)
    workers = sweep.sae_threads or choose_workers(plan.configs, sweep.sae_batch_size, autocast, plan.device)
    options = {"log_steps": sweep.log_steps, "autocast_dtype": autocast, "show_progress": False, "workers": workers}
    Loop(runs, Paced(buffer, work, clock), norm_factors, work["steps"], **options).train()


def reference(work: dict[str, Any]) -> None:
    clock = Clock(work["device"])
    model, submodule, transformers_model = contest.reference_model(work["model"], work["layer"], work["device"])
    clock.time_llm(transformers_model, transformers_model.gpt_neox.layers[work["layer"]])
    from dictionary_learning.buffer import ActivationBuffer
    from dictionary_learning.training import trainSAE

    def texts() -> Iterator[str]:
        while True:
            with open(work["texts"]) as file:
                yield from map(json.loads, file)

    buffer: Any = ActivationBuffer(texts(), model, submodule, **work["buffer"])
    buffer.text_batch = contest.timed(buffer.text_batch, clock, "text")
    tokenizer_class = type(model.tokenizer)
    tokenizer_class.__call__ = contest.timed(tokenizer_class.__call__, clock, "text")
    # of ours alone, and here at the reference's value
    unknown = ("dead_feature_threshold", "k_anneal_steps", "site", "site_out")
    configs = [{name: value for name, value in config.items() if name not in unknown} for config in work["configs"]]
    for config in configs:
        config["trainer"] = getattr(import_module(config.pop("module")), config["trainer"])
    options: Any = {"device": work["device"], "autocast_dtype": getattr(torch, work["autocast"])}
    batches: Any = Paced(buffer, work, clock, NORM_BATCHES)
    trainSAE(batches, configs, steps=work["steps"], normalize_activations=True, **options)


def contexts(work: dict[str, Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": torch.load(work["tokens"]).numpy()}).with_format("torch")


def saelens(work: dict[str, Any]) -> None:
    import sae_lens

    clock, configs, buffer = Clock(work["device"]), work["configs"], work["buffer"]
    saes: Any = {
        str(i): getattr(sae_lens, SAELENS[config["trainer"]])(
            d_in=config["activation_dim"],
            d_sae=config["dict_size"],
            k=config["k"],
            device=work["device"],
            normalize_activations="expected_average_only_in",
        )
        for i, config in enumerate(configs)
    }
    hook = f"gpt_neox.layers.{work['layer']}"
    options: Any = {
        "model_name": work["model"],
        "model_class_name": "AutoModelForCausalLM",
        "context_size": buffer["ctx_len"],
        "prepend_bos": False,
        "n_batches_in_buffer": buffer["n_ctxs"],  # its buffer holds this many contexts, not batches
        "store_batch_size_prompts": buffer["refresh_batch_size"],
        "train_batch_size_tokens": buffer["out_batch_size"],
        "training_tokens": work["steps"] * buffer["out_batch_size"],
        "n_batches_for_norm_estimate": NORM_BATCHES,
        "dead_feature_window": configs[0]["dead_feature_threshold"] // buffer["out_batch_size"],
        "lr": configs[0]["lr"],
        "lr_warm_up_steps": configs[0]["warmup_steps"],
        "device": work["device"],
        "autocast": work["autocast"] == "bfloat16",
        "logger": sae_lens.LoggingConfig(log_to_wandb=False),
        "checkpoint_path": None,
        "output_path": None,
    }
    runner: Any
    if len(saes) == 1:
        config: Any = sae_lens.LanguageModelSAERunnerConfig(sae=saes["0"], hook_name=hook, verbose=False, **options)
        runner = sae_lens.LanguageModelSAETrainingRunner(config, override_dataset=contexts(work))
        store = runner.activations_store
        runner.activations_store = Paced(store, work, clock, NORM_BATCHES)
    else:
        config = sae_lens.MultiSAETrainingRunnerConfig(saes=saes, hook_names=hook, **options)
        runner = sae_lens.MultiSAETrainingRunner(config, override_dataset=contexts(work))
        store = runner.activations_store
        batches = Paced(store.get_multi_hook_data_loader(), work, clock, NORM_BATCHES)
        store.get_multi_hook_data_loader = lambda: batches
    store.iterable_sequences = TimedText(store.iterable_sequences, clock)
    clock.time_llm(runner.model.model, runner.model.model.gpt_neox.layers[work["layer"]])
    runner.run()


class PacedDataset:
    """The same dataset, each batch that a DataLoader asks for when Paced gives it."""

    def __init__(self, dataset: Any, n_a_batch: int, work: dict[str, Any], clock: Clock):
        self.dataset = dataset
        starts = range(0, len(dataset) - n_a_batch + 1, n_a_batch)
        batches = (dataset.__getitems__(range(start, start + n_a_batch)) for start in starts)
        self.batches = Paced(TimedText(batches, clock), work, clock)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> Any:
        return next(self.batches)


def sparsify(work: dict[str, Any]) -> None:
    from tqdm import tqdm
    from transformers import AutoModel

    package = contest.import_sparsify(work["device"])
    package.trainer.tqdm = lambda **options: tqdm(disable=True)  # it would show its bar whatever TQDM_DISABLE says
    clock = Clock(work["device"])
    (config,) = work["configs"]
    model = AutoModel.from_pretrained(work["model"], dtype=torch.float32).to(work["device"])
    block, after = [*model.layers, model.final_layer_norm][work["layer"] :][:2]
    # it has no buffer: its SAE steps within the model's forward pass, which runs to its end
    clock.time_between(model.get_input_embeddings(), block, "batches", "LLM")
    clock.time_between(after, model.final_layer_norm, "batches", "LLM")
    n_contexts = work["buffer"]["out_batch_size"] // work["buffer"]["ctx_len"]
    train_config = package.TrainConfig(
        package.SaeConfig(num_latents=config["dict_size"], k=config["k"]),
        batch_size=n_contexts,
        layers=[work["layer"]],
        optimizer="adam",
        lr=config["lr"],
        lr_warmup_steps=config["warmup_steps"],
        save_every=work["steps"] + 2,  # never
        log_to_wandb=False,
    )
    package.Trainer(train_config, PacedDataset(contexts(work), n_contexts, work, clock), model).fit()


def floor(plan: Any, work: dict[str, Any]) -> None:
    lm, text = load_ours(plan)
    tokens_BL, mask_BL = next(text)
    text.close()
    encoders = [torch.randn(c["dict_size"], c["activation_dim"], device=plan.device) for c in plan.configs]
    x_BD = torch.randn(plan.sweep.sae_batch_size, plan.activation_dim, device=plan.device)
    n_batches = work["steps_a_segment"] * len(x_BD) / tokens_BL.numel()
    contest.answer(ready=True)
    for _ in contest.questions():
        start = time.perf_counter()
        for _ in range(round(n_batches)):
            lm.activations(tokens_BL, mask_BL, plan.layers)
        contest.synchronize(plan.device)
        llm = (time.perf_counter() - start) * n_batches / round(n_batches)
        start = time.perf_counter()
        for _ in range(work["steps_a_segment"]):
            for encoder_FD in encoders:
                torch.mm(x_BD, encoder_FD.T)
        contest.synchronize(plan.device)
        sae = time.perf_counter() - start
        contest.answer(seconds=llm + sae, text=0, LLM=llm, buffer=0, SAE=sae)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=["top_k", "batch_top_k"])
    parser.add_argument("--refills", type=int, default=1, help="of the buffer, in each contestant's turn")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME[=WHERE]", help=f"{' or '.join(PEERS)}")
    parser.add_argument("--against", action="append", default=[], type=Path, metavar="CHECKOUT", help="of this project")
    parser.add_argument("--no_reference", action="store_true", help="leave it out")
    parser.add_argument("--busy", action="store_true", help="once more, beside a process that computes all the time")
    args, args.demo_flags = contest.parse(parser)
    run_of_work = {"reference": reference, "saelens": saelens, "sparsify": sparsify}
    if args.contestant in run_of_work:
        run_of_work[args.contestant](json.loads(args.work.read_text()))
    elif args.contestant:
        run = {"ours": ours, "floor": floor}[args.contestant]
        run(make_plan(args), json.loads(args.work.read_text()))
    else:
        compete(args)


def check_peers(peers: dict[str, str | None], work: dict[str, Any]) -> None:
    """Refuse what a peer cannot train."""
    for name in peers:
        if name not in PEERS:
            raise SystemExit(f"there is no peer {name}: {', '.join(PEERS)}")
        if unknown := sorted({config["trainer"] for config in work["configs"]} - PEERS[name]):
            raise SystemExit(f"{name} does not train {', '.join(unknown)} here: give other --architectures")
    if "sparsify" in peers and work["buffer"]["out_batch_size"] % work["buffer"]["ctx_len"]:
        raise SystemExit("sparsify trains on whole contexts: give a --sae_batch_size that --context_length divides")


def enter(args: argparse.Namespace, peers: dict[str, str | None], work: dict[str, Any], folder: str) -> list[Any]:
    """All contestants, ours first; sparsify is as many processes as SAEs."""
    reference = None if args.no_reference else args.reference
    ours, *references, floor = contest.enter(__file__, f"{folder}/work", reference, args.nnsight)
    flags = ["--device", args.device, "--refills", str(args.refills), "--architectures", *args.architectures]
    flags += [*args.demo_flags, "--work", f"{folder}/work", "--contestant", "ours"]
    earlier = [
        contest.Contestant(f"ours at {path.name}", [str(path / "benchmarks" / "pipeline.py"), *flags], path)
        for path in map(Path.resolve, args.against)
    ]

    def start(name: str, label: str, configs: list[dict[str, Any]]) -> contest.Contestant:
        file = Path(folder, f"work_{label}")
        file.write_text(json.dumps(work | {"configs": configs}, default=str))
        command = [__file__, "--work", str(file), "--contestant", name]
        return contest.Contestant(name, command, *contest.place(peers[name]))

    def enter_peer(name: str) -> Any:
        if name == "saelens":
            return start(name, name, work["configs"])
        return contest.Relay(name, [start(name, f"{name}_{i}", [c]) for i, c in enumerate(work["configs"])])

    return [ours, *earlier, *references, *map(enter_peer, peers), floor]


def compete(args: argparse.Namespace) -> None:
    plan = make_plan(args)
    sweep = plan.sweep
    peers: dict[str, str | None] = {name: where or None for name, _, where in (p.partition("=") for p in args.peer)}
    with tempfile.TemporaryDirectory() as folder:
        work = make_work(plan, args, folder)
        check_peers(peers, work)
        Path(folder, "work").write_text(json.dumps(work, default=str))
        n_steps, batch_size = work["steps_a_segment"], sweep.sae_batch_size
        print(f"{contest.machine(args.device)}, {args.rounds} rounds of {n_steps} steps of {batch_size} tokens")
        print(f"{plan.model_name} ({sweep.dtype}), layer {plan.layers[0]}, {len(plan.configs)} SAEs: ", end="")
        print(f"{', '.join(plan.architectures)}; widths {sweep.dictionary_widths}, SAEs in {plan.autocast}")
        for busy in (False, True) if args.busy else (False,):
            print("one other process busy:" if busy else "no other process of ours:")
            with contest.neighbour(busy):
                contestants = enter(args, peers, work, folder)
                contest.rounds(contestants, args.rounds)
                exact = [contestant.ask("exact") for contestant in contestants]
            show(contestants, exact, n_steps * batch_size, len(plan.configs))
            for contestant in contestants:
                contestant.stop()


def show(contestants: list[Any], exact: list[dict[str, float]], n_tokens: int, n_saes: int) -> None:
    """The table: of n_tokens a turn, and where they go in the `exact` round."""
    columns = ["contestant", "tokens/s", "SAE-tokens/s", "spread", "ratio to ours", "peak MiB"]
    columns += [f"{part}, us/token" for part in PARTS]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for contestant, parts in zip(contestants, exact, strict=True):
        speed, spread = contest.median_and_spread([n_tokens / answer["seconds"] for answer in contestant.answers])
        ratio = contest.median_ratio(contestant, contestants[0])
        cells = [contestant.name, f"{speed:,.0f}", f"{speed * n_saes:,.0f}", f"{spread:.0%}", f"{ratio:.2f}"]
        cells.append(f"{contestant.peak_bytes() / 2**20:.0f}")
        print(f"| {' | '.join([*cells, *(f'{parts[part] / n_tokens * 1e6:.2f}' for part in PARTS)])} |", flush=True)


if __name__ == "__main__":
    main()
