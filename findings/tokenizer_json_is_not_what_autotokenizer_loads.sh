#!/usr/bin/env bash
# A folder has a tokenizer.json. Guess: AutoTokenizer gives the ids of that file, as tokenizers.Tokenizer.from_file does.
#
# What happens: where tokenizer_config.json names a class such as GPT2Tokenizer and the model is of another type, the
# tokenizer is made anew from the file's vocabulary and merges, with the pre-tokenizer of the class. A file that splits
# numbers into digits loses that: "2023" becomes 20 23 for 2 0 2 3, without a warning.
#
# transformers 5.23.0, tokenizers 0.23.3, 2026-11-27. Exits with 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import json
import os

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
merges = [("2", "0"), ("2", "3"), ("20", "23")]
vocab |= {left + right: len(vocab) + i for i, (left, right) in enumerate(merges)}
vocab["<|endoftext|>"] = len(vocab)
file = Tokenizer(models.BPE(vocab, merges))
digits = pre_tokenizers.Digits(individual_digits=True)
file.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
file.add_special_tokens(["<|endoftext|>"])

os.mkdir("model")
file.save("model/tokenizer.json")
with open("model/config.json", "w") as config:
    json.dump({"model_type": "llama"}, config)
with open("model/tokenizer_config.json", "w") as config:
    json.dump({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}, config)

loaded = AutoTokenizer.from_pretrained("model")
by_file = Tokenizer.from_file("model/tokenizer.json").encode("in 2023").tokens
by_class = loaded.convert_ids_to_tokens(loaded("in 2023").input_ids)
print("tokenizer.json says  ", by_file)
print("AutoTokenizer gives  ", by_class, "as a", type(loaded).__name__)
raise SystemExit(by_file == by_class)
PYTHON
