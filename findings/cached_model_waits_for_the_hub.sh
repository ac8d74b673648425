#!/usr/bin/env bash
# A model lies in the local cache as `hf download` leaves it, and the Hub cannot be reached: connections are refused at
# once. Guess: AutoTokenizer fails once, takes the cache, and is there in a second, as AutoConfig is.
#
# What happens: it asks for every optional file that the model never had (added_tokens.json, special_tokens_map.json,
# chat_template.jinja and more), each with five retries after 1, 2, 4, 8 and 8 seconds: two minutes, and then it loads.
# With local_files_only=True it is there at once. (Files that AutoTokenizer itself once missed while the Hub answered are
# marked in the cache as missing, and are not asked for.)
#
# huggingface_hub 2.4.0, transformers 5.23.0, 2026-11-27. Exits with 1 once that has changed. Takes three minutes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 huggingface_hub==2.4.0
commit=0123456789012345678901234567890123456789
cache=$folder/hub/models--someone--model
snapshot=$cache/snapshots/$commit
mkdir -p "$cache/refs" "$snapshot"
printf %s $commit > "$cache/refs/main"
echo '{"model_type": "gpt2"}' > "$snapshot/config.json"
echo '{"tokenizer_class": "PreTrainedTokenizerFast"}' > "$snapshot/tokenizer_config.json"
"$folder/venv/bin/python" -c '
import sys
from tokenizers import Tokenizer, models
Tokenizer(models.WordLevel({"word": 0}, unk_token="word")).save(sys.argv[1])
' "$snapshot/tokenizer.json"
unset HF_HUB_OFFLINE
HF_ENDPOINT=http://127.0.0.1:9 HF_HUB_CACHE=$folder/hub "$folder/venv/bin/python" - <<'PYTHON'
import time

from transformers import AutoConfig, AutoTokenizer

seconds = {}
for loader in (AutoConfig, AutoTokenizer):
    for local_files_only in (True, False):
        start = time.perf_counter()
        loader.from_pretrained("someone/model", local_files_only=local_files_only)
        seconds[loader, local_files_only] = time.perf_counter() - start
        print(f"{loader.__name__}, local_files_only={local_files_only}: {time.perf_counter() - start:.1f} s")
slow = seconds.pop((AutoTokenizer, False))
raise SystemExit(not (max(seconds.values()) < 5 < 20 < slow))
PYTHON
