"""Training from activations on the disk against training from the text, on the built-in model.

python benchmarks/cache.py [tokens]            write, train from the text, train from the disk, compare the bits
python benchmarks/cache.py --start [tokens]    loss recovered after a tenth of the tokens: from nothing, and from
                                               the SAEs of a whole run with --init_from, beside that run's own
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import demo
from dictionary_learning.files import read_json
from dictionary_learning.formats import find_saes
from dictionary_learning.training import Loop


def timed(action: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return action(*args)
        finally:
            seconds[0] += time.perf_counter() - start

    return run


def run(*flags: Any) -> float:
    """Seconds of a command that ends well."""
    start = time.perf_counter()
    assert demo.main([str(flag) for flag in flags]) == 0
    return time.perf_counter() - start


def cache(tokens: int) -> None:
    step = Loop._update_all
    with tempfile.TemporaryDirectory() as name:
        folder, asked, lines = Path(name), ["--num_tokens", tokens], []
        seconds = run(*asked, "--cache", folder / "cache", "--cache_only")
        size = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
        lines.append(f"write: {seconds:.1f} s, {size / 1e6:.0f} MB")
        speeds: dict[str, float] = {}
        for source, flags in {"text": [], "disk": ["--activations", folder / "cache"]}.items():
            inside = [0.0]
            Loop._update_all = timed(step, inside)
            run(*asked, *flags, "--no_eval", "--sae_threads", 1, "--save_dir", folder / source)
            record = read_json(next((folder / source).glob("*/run.json")))
            speeds[source] = record["tokens"] / record["seconds"]
            lines.append(
                f"train from the {source}: {record['seconds']:.1f} s, {speeds[source]:,.0f} tokens/s, "
                f"of which SAE steps {inside[0]:.1f} s"
            )
        pairs = list(zip(find_saes(folder / "text"), find_saes(folder / "disk"), strict=True))
        same = [
            all(one[key].equal(two[key]) for key in one)
            for one, two in ([torch.load(path / "ae.pt", weights_only=True) for path in pair] for pair in pairs)
        ]
        lines.append(f"{speeds['disk'] / speeds['text']:.2f}x; equal to the bit: {sum(same)} of {len(same)} SAEs")
    print("\n".join(lines))


def start(tokens: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few = ["--num_tokens", tokens // 10]
        runs = {"whole": ["--num_tokens", tokens], "a tenth": few, "a tenth, started from": few}
        lines = []
        for title, flags in runs.items():
            more = ["--init_from", folder / "whole"] if "started" in title else []
            run(*flags, *more, "--save_dir", folder / title)
            results = {path.name: read_json(path / "eval_results.json") for path in find_saes(folder / title)}
            recovered = ", ".join(f"{result['frac_recovered']:.4f}" for result in results.values())
            lines.append(f"{title}: loss recovered {recovered}")
    print("\n".join(lines))


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    (start if "--start" in sys.argv else cache)(*(numbers or [600_000]))
