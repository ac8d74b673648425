"""Contests: every contestant works in a process of its own when it is asked, one after the other, so that whatever
slows the machine slows all.

Also the reference, the package dictionary-learning 0.1.0, where what it imports is not installed.
"""

import argparse
import importlib
import importlib.abc
import importlib.machinery
import json
import math
import os
import statistics
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "third_party" / "dictionary-learning-0.1.0"


class Contestant:
    """A process that works for each line it is sent, and answers with a line of JSON; its first one says it is ready.

    path: what its PYTHONPATH is. python: the interpreter of its environment.
    """

    def __init__(self, name: str, command: list[str], path: Path | str = ROOT, python: str = sys.executable):
        self.name = name
        environment = {**os.environ, "PYTHONPATH": str(path), "TQDM_DISABLE": "1"}
        self.process = subprocess.Popen(
            [python, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd="/",
        )
        self.ready = self._answer()
        self.answers: list[dict[str, Any]] = []  # of the rounds

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.name} stopped with code {self.process.wait()}")

    def ask(self, what: str = "go") -> dict[str, Any]:
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)
        return self._answer()

    def peak_bytes(self) -> int:
        """The most resident memory that the process has had: not ru_maxrss, which begins with what its parent had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class Relay:
    """Contestants whose turns follow one another, as one: the sum of their answers, and the largest peak of memory."""

    def __init__(self, name: str, runners: list[Contestant]):
        self.name, self.runners = name, runners
        self.answers: list[dict[str, Any]] = []

    def ask(self, what: str = "go") -> dict[str, Any]:
        answers = [runner.ask(what) for runner in self.runners]
        return {key: sum(answer[key] for answer in answers) for key in answers[0]}

    def peak_bytes(self) -> int:
        return max(runner.peak_bytes() for runner in self.runners)

    def stop(self) -> None:
        for runner in self.runners:
            runner.stop()


def place(where: str | None) -> tuple[Path | str, str]:
    """(PYTHONPATH, interpreter) of a peer: a folder with its package, or the Python of an environment that has it."""
    if where is None:
        return "", sys.executable
    return (Path(where).resolve(), sys.executable) if Path(where).is_dir() else ("", where)


def import_sparsify(device: str) -> Any:
    """The package; on the CPU without its Triton kernels, which it takes wherever Triton can be imported."""
    if device == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    return importlib.import_module("sparsify")


@contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """Meanwhile, where `busy`, one other process computes without a pause."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def enter(script: str, work: str, reference: Path | None, nnsight: str | None) -> list[Contestant]:
    """Ours, the reference if it is given (with nnsight too, given the Python of an environment that has it), the floor.

    Each is the script itself, with --contestant and --work.
    """
    command = [script, *sys.argv[1:], "--work", work, "--contestant"]
    contestants = [Contestant("ours", [*command, "ours"])]
    pythons = {"reference": sys.executable} | ({"reference, nnsight": nnsight} if nnsight else {})
    for name, python in pythons.items() if reference else ():
        contestants.append(Contestant(name, [*command, "reference"], reference.resolve(), python))
    return [*contestants, Contestant("floor", [*command, "floor"])]


def rounds(contestants: Sequence[Contestant | Relay], n_rounds: int) -> None:
    for _ in range(n_rounds):
        for contestant in contestants:
            contestant.answers.append(contestant.ask())


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, with those that contests with the reference share, and the flags left over."""
    parser.add_argument("--reference", type=Path, default=REFERENCE, help="folder with the package")
    parser.add_argument("--nnsight", metavar="PYTHON", help="of an environment with nnsight: one more contestant")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_known_args()


def answer(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def questions() -> Iterator[str]:
    """What a contestant's process is asked, until it is stopped."""
    return (line.strip() for line in sys.stdin)


def median_and_spread(values: list[float]) -> tuple[float, float]:
    """The median, and the interquartile range over it (of one value, NaN)."""
    if len(values) == 1:
        return values[0], math.nan
    low, median, high = statistics.quantiles(values, n=4)
    return median, (high - low) / median


def median_ratio(theirs: Contestant | Relay, ours: Contestant | Relay) -> float:
    """Of their seconds to ours, round by round."""
    return statistics.median(a["seconds"] / b["seconds"] for a, b in zip(theirs.answers, ours.answers, strict=True))


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def machine(device: str) -> str:
    what = torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    return f"torch {torch.__version__}, {what}, {device}"


class StubImports(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules for what the reference imports at its top and the contest does not use."""

    NAMES = {"circuitsvis", "datasets", "nnsight", "pandas", "plotly", "transformers", "umap", "wandb", "zstandard"}

    class Module(types.ModuleType):
        __path__: list[str] = []

        def __getattr__(self, name: str):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] in self.NAMES else None

    def create_module(self, spec):
        return self.Module(spec.name)

    def exec_module(self, module):
        pass


# -- the reference's language model


class _Stop(Exception):
    """Ends a forward pass at the layer that is read."""


@dataclass
class Saved:
    """What nnsight calls a proxy, of a value that is there already."""

    value: Any = None

    def save(self) -> "Saved":
        return self

    def stop(self) -> None:
        pass


class HookedModel:
    """What the reference's buffer asks of `nnsight.LanguageModel`, by a plain forward hook, as its later versions read
    activations: every trace tokenises the texts and runs the model up to the end of the layer.  It is its own
    submodule."""

    def __init__(self, model: Any, tokenizer: Any, block: torch.nn.Module):
        self.model, self.tokenizer, self.block, self.dtype = model, tokenizer, block, model.dtype
        self.output, self.inputs = Saved(), Saved()

    @contextmanager
    def trace(self, texts: list[str], scan: bool, validate: bool, invoker_args: dict[str, Any]) -> Iterator[None]:
        self.inputs.value = ((), self._tokenise(texts, **invoker_args))
        with self._hooked(stop=True), suppress(_Stop):
            self.model(**self.inputs.value[1])
        yield

    def run(self, texts: list[str], max_len: int, edit: Tensor | None = None, **options: Any) -> tuple[Any, Tensor]:
        """(inputs, logits_BLV) of the whole model, with `edit` in place of the layer's activations; these are saved."""
        inputs = self._tokenise(texts, truncation=True, max_length=max_len)
        with self._hooked(edit=edit):
            return inputs, self.model(**inputs, **options).logits

    def _tokenise(self, texts: list[str], **limits: Any) -> Any:
        return self.tokenizer(texts, return_tensors="pt", padding=True, **limits).to(self.model.device)

    @contextmanager
    def _hooked(self, stop: bool = False, edit: Tensor | None = None) -> Iterator[None]:
        def keep(_block, _args, output) -> Tensor | None:
            self.output.value = output
            if stop:
                raise _Stop
            return edit

        hook = self.block.register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()


def reference_model(folder: str, layer: int, device: str) -> tuple[Any, Any, Any]:
    """(model, submodule, transformers model) for the reference's buffer: nnsight's where it is installed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    sys.meta_path.append(StubImports())  # last, so that what is installed is what is imported
    import nnsight

    if isinstance(nnsight, StubImports.Module):
        hooked = HookedModel(model, tokenizer, model.gpt_neox.layers[layer])
        return hooked, hooked, model
    traced = nnsight.LanguageModel(model, tokenizer=tokenizer)
    return traced, traced.gpt_neox.layers[layer], model


def timed(function: Callable, record: Callable[[str], Any], part: str) -> Callable:
    """The function, with its seconds recorded under `part`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with record(part):
            return function(*args, **kwargs)

    return run
