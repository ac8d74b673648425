"""A whole run of `demo.py`, small: a random model of 4 layers on a text file."""

import json
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

import demo

SMALL = """--num_tokens 3000 --sae_batch_size 50 --buffer_tokens 600 --context_length 32 --llm_batch_size 4
    --dictionary_widths 32 --learning_rates 0.003 --target_l0s 4 --standard_penalties 0.05 --p_anneal_penalties 0.05
    --gated_penalties 0.05 --log_steps 10 --eval_num_inputs 6 --device cpu""".split()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """120 documents of random words."""
    words, rng = [f"word{i}" for i in range(200)], random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(3, 60)))}) for _ in range(120)]
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="session")
def small() -> list[str]:
    return SMALL


@pytest.fixture
def stopped_after(monkeypatch) -> Callable[[int], AbstractContextManager[None]]:
    """Within stopped_after(n), SIGTERM comes with the n-th batch of the buffer."""
    from dictionary_learning.buffer import ActivationBuffer

    @contextmanager
    def stop(n: int) -> Iterator[None]:
        served, following = [], ActivationBuffer.__next__

        def next_and_stop(self):
            served.append(1)
            if len(served) == n:
                signal.raise_signal(signal.SIGTERM)
            return following(self)

        with monkeypatch.context() as patch:
            patch.setattr(ActivationBuffer, "__next__", next_and_stop)
            yield

    return stop


@pytest.fixture
def command(tiny_model_folder, text_file, tmp_path):
    """command(*flags) -> the arguments of a small run in tmp_path."""

    def arguments(*flags) -> list[str]:
        fixed = ["--model_name", str(tiny_model_folder), "--dataset", str(text_file), "--save_dir", str(tmp_path)]
        return [*fixed, "--layers", "1", *SMALL, *map(str, flags)]

    return arguments


@pytest.fixture
def run(command):
    """run(*flags) -> exit code of `demo.py` in this process."""
    return lambda *flags: demo.main(command(*flags))
