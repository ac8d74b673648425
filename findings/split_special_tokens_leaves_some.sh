#!/usr/bin/env bash
# A text has "</s>" in it. Guess: with split_special_tokens=True (encode_special_tokens of tokenizers) it is text, and no
# id of a special token comes out, whatever the tokenizer.
#
# What happens: that holds for byte-level BPE. It does not for Unigram and WordLevel, whose vocabulary has the special
# tokens as pieces like any other: only the step that cuts them out beforehand is left away, and then the model itself
# finds "</s>" as its best piece. The id is that of the control token.
#
# tokenizers 0.23.3, transformers 5.23.0, 2026-11-27. Exits with 1 once that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXT = "one </s> two"
letters = sorted(set(TEXT) - {" "})


def bpe():
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def unigram():
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *[(letter, -5.0) for letter in letters]]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def words():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(TEXT.split())}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


found = {}
for make in (bpe, unigram, words):
    backend = make()
    backend.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    ids = tokenizer(TEXT, add_special_tokens=False, split_special_tokens=True).input_ids
    found[make.__name__] = tokenizer.eos_token_id in ids
    print(f"{make.__name__:8}", tokenizer.convert_ids_to_tokens(ids))
raise SystemExit(found != {"bpe": False, "unigram": True, "words": True})
PYTHON
