"""Dead latents with and without --center, on the built-in model as it is and with an offset added to its activations.

    python benchmarks/center.py [tokens] [offset]

Prints the table of README: the share of latents that are dead at the end, mean over the SAEs of an architecture.
"""

import json
import sys
import tempfile
from pathlib import Path

import demo
from dictionary_learning.files import read_json, read_jsonl
from dictionary_learning.formats import find_saes
from dictionary_learning.model import LanguageModel

ARCHITECTURES = ("standard", "gated", "jump_relu")


def main(tokens: int = 300_000, offset: float = 4.0) -> None:
    whole = LanguageModel.activations
    print(f"{tokens:,} tokens a run\n\n| activations | mean / std | center | " + " | ".join(ARCHITECTURES) + " |")
    print("|---|---|---|" + "---|" * len(ARCHITECTURES))
    for by in (0.0, offset):
        LanguageModel.activations = lambda *args, by=by: {k: x + by for k, x in whole(*args).items()}
        for center in ([], ["--center"]):
            with tempfile.TemporaryDirectory() as folder:
                flags = ["--save_dir", folder, "--num_tokens", str(tokens), "--no_eval", "--architectures"]
                assert demo.main([*flags, *ARCHITECTURES, *center]) == 0
                shares: dict[str, list[float]] = {}
                for path in find_saes(folder):
                    trainer = read_json(path / "config.json")["trainer"]
                    dead = read_jsonl(path / "metrics.jsonl")[-1]["dead_features"] / trainer["dict_size"]
                    shares.setdefault(trainer["trainer_class"], []).append(dead)
                record = json.loads(next(Path(folder).glob("*/run.json")).read_text())
                (ratio,) = record["mean_to_std"].values()
                cells = " | ".join(f"{100 * sum(values) / len(values):.1f} %" for values in shares.values())
                name = f"{by:g} added to each coordinate" if by else "as they are"
                print(f"| {name} | {ratio:.2f} | {'yes' if center else 'no'} | {cells} |", flush=True)


if __name__ == "__main__":
    main(*(kind(word) for kind, word in zip((int, float), sys.argv[1:], strict=False)))
