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
    floor               the bare forward of the same tokens up to the layer, and x E^T for every SAE of every step

Contestants work in processes of their own, in turn, for --refills refills of the buffer with all the steps between.
The table: median trained tokens a second, the spread (interquartile range over median), the ratio of seconds to `ours`
in the same round (median of ratios), and where the time goes, in microseconds a trained token, from one more round in
which CUDA is waited for at every change of part.  `text` is what the run waits for text and tokens, `LLM` the model's
own code, `buffer` all else that the buffer does, `SAE` all else.
"""

import argparse
import json
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

    def time_llm(self, model: Any, block: torch.nn.Module) -> None:
        """From the embedding to the end of the block, whoever calls the model and whatever hooks it has there."""
        model.get_input_embeddings().register_forward_pre_hook(lambda *_: self.add("LLM", -1))
        forward = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self.add("LLM", 1)
            return output

        block.forward = run


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
    with open(f"{folder}/texts", "w") as file:
        for _ in range(0, steps * sweep.sae_batch_size, sweep.llm_batch_size * sweep.context_length):
            file.writelines(json.dumps(tokenizer.decode(context)) + "\n" for context in next(text)[0].tolist())
    text.close()
    trainers = [{"module": c["trainer"].__module__, "trainer": c["trainer"].__name__} for c in plan.configs]
    return {
        "steps_a_refill": steps_a_refill,
        "steps_a_segment": args.refills * steps_a_refill,
        "steps": steps,
        "model": str(BUILT_IN[plan.model_name]),
        "texts": f"{folder}/texts",
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
    from dictionary_learning.training import Loop, make_runs

    sweep, clock = plan.sweep, Clock(plan.device)
    lm, text = load_ours(plan)
    clock.time_llm(lm.model, lm.layers[work["layer"]])
    buffer = make_buffer(plan, lm, TimedText(text, clock))
    norm_factors = buffer.norm_factors
    runs = make_runs(plan.configs, [None] * len(plan.configs), buffer.config)
    options = {"log_steps": sweep.log_steps, "autocast_dtype": getattr(torch, plan.autocast), "show_progress": False}
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
    unknown = ("dead_feature_threshold", "k_anneal_steps")  # of ours alone, and here at the reference's value
    configs = [{name: value for name, value in config.items() if name not in unknown} for config in work["configs"]]
    for config in configs:
        config["trainer"] = getattr(import_module(config.pop("module")), config["trainer"])
    options: Any = {"device": work["device"], "autocast_dtype": getattr(torch, work["autocast"])}
    batches: Any = Paced(buffer, work, clock, NORM_BATCHES)
    trainSAE(batches, configs, steps=work["steps"], normalize_activations=True, **options)


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
    args, args.demo_flags = contest.parse(parser)
    if args.contestant == "reference":
        reference(json.loads(args.work.read_text()))
    elif args.contestant:
        run = {"ours": ours, "floor": floor}[args.contestant]
        run(make_plan(args), json.loads(args.work.read_text()))
    else:
        compete(args)


def compete(args: argparse.Namespace) -> None:
    plan = make_plan(args)
    sweep = plan.sweep
    with tempfile.TemporaryDirectory() as folder:
        work = make_work(plan, args, folder)
        Path(folder, "work").write_text(json.dumps(work, default=str))
        contestants = contest.enter(__file__, f"{folder}/work", args.reference, args.nnsight)
        contest.rounds(contestants, args.rounds)
        exact = [contestant.ask("exact") for contestant in contestants]
        for contestant in contestants:
            contestant.stop()
    n_steps, n_tokens = work["steps_a_segment"], work["steps_a_segment"] * sweep.sae_batch_size
    print(f"{contest.machine(args.device)}, {args.rounds} rounds of {n_steps} steps of {sweep.sae_batch_size} tokens")
    print(f"{plan.model_name} ({sweep.dtype}), layer {plan.layers[0]}, {len(plan.configs)} SAEs: ", end="")
    print(f"{', '.join(plan.architectures)}; widths {sweep.dictionary_widths}, SAEs in {plan.autocast}")
    print(f"| contestant | tokens/s | spread | ratio to ours | {' | '.join(f'{part}, us/token' for part in PARTS)} |")
    print("|---|---|---|---|---|---|---|---|")
    for contestant, parts in zip(contestants, exact, strict=True):
        speed, spread = contest.median_and_spread([n_tokens / answer["seconds"] for answer in contestant.answers])
        ratio = contest.median_ratio(contestant, contestants[0])
        cells = [contestant.name, f"{speed:,.0f}", f"{spread:.0%}", f"{ratio:.2f}"]
        print(f"| {' | '.join([*cells, *(f'{parts[part] / n_tokens * 1e6:.2f}' for part in PARTS)])} |")


if __name__ == "__main__":
    main()
