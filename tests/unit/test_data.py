"""Text: nothing lost, nothing doubled, and every stream goes on exactly where it stood."""

import copy
import gc
import gzip
import itertools
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from mutations import mutations

from dictionary_learning import data
from dictionary_learning.data import (
    BUILT_IN,
    MARK,
    PADDING,
    TEXT,
    ChatContexts,
    Context,
    Documents,
    FileRows,
    HubRows,
    MixedContexts,
    PackedContexts,
    Prefetched,
    Stream,
    TextBatches,
    default_system_prompt,
    is_held_out,
    open_batches,
    open_documents,
    python_stdlib,
)
from dictionary_learning.data.chats import render

TEXTS = [f"text {i}: " + "ab\ncd ef"[: i % 9] * (i % 5) for i in range(60)]
QWEN_PROMPT = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
QWEN = (
    "{% if messages[0]['role'] != 'system' %}{{ '" + QWEN_PROMPT.replace("\n", "\\n") + "' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{{ '<|system|>Today is ' + strftime_now('%d %b %Y') + '<|end|>' }}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('no system messages') }}{% endif %}{% endfor %}"
)


class FromList(Stream):
    """Any list as a stream."""

    saved = ("index",)

    def __init__(self, items):
        self.items, self.index = items, 0

    def __next__(self):
        if self.index == len(self.items):
            raise StopIteration
        self.index += 1
        return self.items[self.index - 1]


def chats(n=40, length=60):
    """Conversations of one or two turns, of different lengths."""
    turns = ["u" * (i % length) + str(i) for i in range(2 * n)]
    return [
        [{"role": "user", "content": turns[i]}, {"role": "assistant", "content": turns[-i]}][: 1 + i % 2]
        for i in range(n)
    ]


def chat_tokenizer(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def assert_resumes(make, cuts):
    """From every cut, and from another point after that, the rest is what a straight run gives."""
    straight = list(make())
    assert straight
    for cut in cuts:
        cut = min(cut, len(straight))
        stream = make()
        before = list(itertools.islice(stream, cut))
        again = make()
        again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert again.state_dict() == stream.state_dict()
        between = list(itertools.islice(again, 3))
        last = make()
        next(last)  # a stream that is already under way
        last.load_state_dict(json.loads(json.dumps(again.state_dict())))
        assert before + between + list(last) == straight


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr("dictionary_learning.data.contexts.CHUNK_CHARACTERS", 40)


@pytest.fixture
def no_network(monkeypatch):
    """A Hub without network: any lookup of a revision gives one."""
    import huggingface_hub

    class Info:
        sha = "abc"

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, **options: Info)


# Rows and documents


def write_dataset(kind, folder):
    """TEXTS in this form; the path to open, and the texts in the order they are to come."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "jsonl":
        (folder / "a.jsonl").write_text(lines)
    elif kind == "json":
        (folder / "a.json").write_text(json.dumps(rows, indent=2))
    elif kind == "jsonl.zst":
        (folder / "a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    elif kind == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet", row_group_size=17)
    elif kind == "folder of jsonl":
        for i in range(4):
            write_jsonl(folder / f"{i}.jsonl", rows[15 * i : 15 * i + 15])
        return folder
    elif kind == "folder of txt":
        for i, text in enumerate(TEXTS):
            (folder / f"{i:02}.txt").write_text(text)
        return folder
    elif kind == "save_to_disk":
        from datasets import Dataset, disable_progress_bars

        disable_progress_bars()
        Dataset.from_list(rows).save_to_disk(folder, num_shards=3)
        return folder
    return folder / f"a.{kind}"


KINDS = ["jsonl", "json", "jsonl.zst", "jsonl.gz", "parquet", "folder of jsonl", "folder of txt", "save_to_disk"]


@pytest.mark.parametrize("kind", KINDS)
def test_local_datasets_give_their_texts_in_order_and_resume(kind, tmp_path):
    path = str(write_dataset(kind, tmp_path))
    assert list(open_documents(path)) == TEXTS
    assert_resumes(lambda: open_documents(path, epochs=2), [0, 1, 14, 15, 17, 59, 60, 61, 119, 120])


def test_hub_streams_resume(tmp_path):
    datasets = pytest.importorskip("datasets")

    def open_dataset(revision):
        rows = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
        return rows.to_iterable_dataset(num_shards=4), revision or "abc"

    def make():
        return Documents(HubRows("user/set", open_dataset), "user/set", epochs=2)

    assert list(make()) == 2 * TEXTS
    assert_resumes(make, [0, 1, 14, 15, 16, 60, 61, 120])


def test_the_built_in_corpus_resumes_and_is_the_standard_library():
    held_out, others = dict(python_stdlib(held_out=True)), dict(python_stdlib(held_out=False))
    assert held_out.keys().isdisjoint(others) and len(others) > 500
    assert all(map(is_held_out, held_out))
    texts = [text for text in held_out.values() if text.strip()]
    assert list(open_documents(BUILT_IN, held_out=True)) == texts
    assert_resumes(lambda: open_documents(BUILT_IN, held_out=True), [7])


def test_held_out_and_other_documents_are_disjoint_and_complete(tmp_path):
    texts = [f"number {i}" for i in range(400)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    held_out, others = list(open_documents(path, held_out=True)), list(open_documents(path, held_out=False))
    assert sorted(held_out + others) == sorted(texts)
    assert 5 <= len(held_out) <= 40
    assert set(held_out) == set(filter(is_held_out, texts))


def test_shards_are_disjoint_and_complete(tmp_path):
    path = str(write_dataset("jsonl", tmp_path))
    shards = [list(open_documents(path, shard=(rank, 3), epochs=2)) for rank in range(3)]
    assert shards[1] == 2 * TEXTS[1::3]
    assert sorted(sum(shards, [])) == sorted(2 * TEXTS)


def test_rows_that_are_no_text_are_skipped_and_counted(tmp_path):
    values = ["one", "", " \n", None, 3, ["x"], "\ud800", "two"]
    rows = [{"text": value} for value in values] + [{"other": "x"}, ["a list"], None]
    documents = open_documents(write_jsonl(tmp_path / "a.jsonl", rows))
    assert list(documents) == ["one", "two"]
    assert documents.skipped == {"empty": 2, "not text": 7}
    assert documents.n_documents == 2


def test_a_folder_is_read_by_split(tmp_path):
    (tmp_path / "test").mkdir()
    write_jsonl(tmp_path / "train-0.jsonl", [{"text": "train"}])
    write_jsonl(tmp_path / "test" / "0.jsonl", [{"text": "test"}])
    (tmp_path / "dataset_info.json").write_text("{}")
    assert list(open_documents(str(tmp_path))) == ["train"]
    assert list(open_documents(str(tmp_path), split="test")) == ["test"]
    with pytest.raises(ValueError, match="no file in .* of a split 'validation'"):
        open_documents(str(tmp_path), split="validation")


def test_another_text_column(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "content": "hello"}])
    assert list(open_documents(path, text_column="content")) == ["hello"]
    with pytest.raises(ValueError, match="no column 'text'; its columns are: 'id', 'content'"):
        open_documents(path)


def test_bad_local_datasets(tmp_path):
    import zstandard

    def refuses(dataset, match, **settings):
        with pytest.raises(ValueError, match=match) as error:
            open_documents(str(dataset), **settings)
        assert "\n" not in str(error.value)

    refuses(tmp_path / "none.jsonl", "there is no file or folder")
    refuses("nowhere.jsonl", "there is no file or folder")
    refuses("./nowhere", "there is no file or folder")
    refuses(tmp_path, "no text in")
    refuses(write_jsonl(tmp_path / "empty.jsonl", []), "no document to read")
    refuses(write_jsonl(tmp_path / "blank.jsonl", [{"text": " "}]), r"no document to read \(1 rows, 1 empty\)")
    text = next(text for text in TEXTS if not is_held_out(text))
    refuses(write_jsonl(tmp_path / "one.jsonl", [{"text": text}]), "no held-out document", held_out=True)
    refuses(tmp_path / "one.jsonl", "epochs must be at least 1", epochs=0)
    refuses(BUILT_IN, "has no split 'test'", split="test")
    for name, content in {
        "a.xls": b"a,b\n1,2\n",
        "a.jsonl": b'{"text": "a',
        "b.jsonl": b"\xff\xfe\x00",
        "c.jsonl": b"[" * 100_000,
        "a.json": b'{"text": 1\n',
        "a.parquet": b"PAR1 and so on PAR1",
        "a.arrow": b"\xff\xff\xff\xff1234",
        "a.txt.zst": zstandard.compress(bytes(range(128)) * 99)[:-5],
    }.items():
        (tmp_path / name).write_bytes(content)
        refuses(tmp_path / name, "no text in" if name == "a.xls" else "cannot read .*a|cannot read .*jsonl")
    refuses(tmp_path, "several kinds")


# The Hub


class Flaky:
    """A dataset whose connection breaks before each of these rows, once; like `datasets.IterableDataset`."""

    def __init__(self, breaks, error=ConnectionError):
        self.breaks, self.error, self.opened = set(breaks), error, []

    def open(self, revision):
        self.opened.append(revision)
        return FlakyRows(self), "abc"


class FlakyRows:
    def __init__(self, source):
        self.source, self.row = source, 0

    def __iter__(self):
        for row in range(self.row, len(TEXTS)):
            if row in self.source.breaks:
                self.source.breaks.remove(row)
                raise self.source.error("gone")
            self.row = row + 1
            yield {"text": TEXTS[row]}

    def state_dict(self):
        return {"row": self.row}

    def load_state_dict(self, state):
        self.row = state["row"] if state else 0

    num_shards, column_names = 1, None


@pytest.mark.parametrize("error", [ConnectionError, TimeoutError])
def test_a_stream_that_breaks_goes_on_where_it_was(error):
    source = Flaky([1, 2, 30, 59], error)
    documents = Documents(HubRows("user/set", source.open, retry_waits_s=(0,)), "user/set", epochs=2)
    assert list(documents) == 2 * TEXTS
    assert source.opened == [None, "abc", "abc", "abc", "abc"]  # the same revision each time


def test_waits_grow_and_start_over_after_a_row(monkeypatch):
    slept = []
    monkeypatch.setattr("dictionary_learning.data.hub.time.sleep", slept.append)
    source = Flaky([10, 20])
    attempts = itertools.count()

    def open_dataset(revision):
        if next(attempts) in (1, 2, 4):
            raise ConnectionError("gone")
        return source.open(revision)

    assert [row["text"] for row in HubRows("user/set", open_dataset, (1, 2, 4))] == TEXTS
    assert slept == [1, 2, 4, 1, 2]


def test_a_stream_that_stays_away_is_a_connection_error_and_its_state_is_good():
    source = Flaky([5])
    rows = HubRows("user/set", source.open, retry_waits_s=())
    documents = Documents(rows, "user/set")
    assert list(itertools.islice(documents, 5)) == TEXTS[:5]
    with pytest.raises(ConnectionError, match="user/set broke off and 0 attempts"):
        next(documents)
    again = Documents(HubRows("user/set", Flaky([]).open), "user/set")
    again.load_state_dict(documents.state_dict())
    assert list(again) == TEXTS[5:]


def test_packing_does_not_end_quietly_after_an_error(tokenizer):
    contexts = PackedContexts(Documents(HubRows("user/set", Flaky([5]).open, ()), "user/set"), tokenizer, 16)
    with pytest.raises(ConnectionError):
        next(contexts)
    with pytest.raises(AssertionError):
        list(contexts)
    contexts.load_state_dict(contexts.state_dict())
    assert list(contexts) == list(PackedContexts(FromList(TEXTS), tokenizer, 16))


def test_what_is_wrong_with_a_hub_dataset_is_said(monkeypatch, no_network):
    datasets = pytest.importorskip("datasets")
    not_found = datasets.exceptions.DatasetNotFoundError

    def says(error, kind, match):
        def load_dataset(*args, **kwargs):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(kind, match=match) as raised:
            open_documents("user/set")
        assert "\n" not in str(raised.value)

    says(
        not_found("Dataset 'user/set' is a gated dataset on the Hub."),
        ValueError,
        "accept its licence at https.*hf auth",
    )
    says(not_found("Dataset 'user/set' doesn't exist"), ValueError, "no file, folder or Hub dataset is called user/set")
    says(ConnectionError("Couldn't reach it"), ConnectionError, "cannot reach user/set")
    says(ValueError('Unknown split "x".\nShould be one of [..]'), ValueError, "Unknown split")


def test_a_hub_dataset_is_opened_with_its_split_subset_and_revision(monkeypatch, no_network):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"text": "hello"}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(open_documents("user/set", subset="en", split="test")) == ["hello"]
    assert asked == [(("user/set", "en"), {"split": "test", "streaming": True, "revision": "abc"})]


def test_tokens_are_estimated(tmp_path, tokenizer):
    documents = open_documents(str(write_dataset("jsonl", tmp_path)), epochs=3)
    exact = 3 * sum(len(ids) for ids in tokenizer(TEXTS, add_special_tokens=False)["input_ids"])
    assert abs(data.estimate_tokens(documents, tokenizer) / exact - 1) < 0.01


# Contexts


def tokens_of(contexts):
    return [context.tokens for context in contexts]


def joined(texts, tokenizer):
    """What packing must hold: the texts' tokens with an eos between."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [token for i, document in enumerate(ids) for token in ([0] if i else []) + document]


@pytest.mark.parametrize("length", [2, 7, 64, 10_000])
def test_packing_loses_no_token(length, tokenizer, small_chunks):
    contexts = tokens_of(PackedContexts(FromList(TEXTS), tokenizer, length))
    assert all(context[0] == tokenizer.bos_token_id for context in contexts)
    assert all(len(context) == length for context in contexts[:-1]) and 1 < len(contexts[-1]) <= length
    assert [token for context in contexts for token in context[1:]] == joined(TEXTS, tokenizer)


def test_packing_uses_eos_where_there_is_no_bos(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    tokenizer.bos_token = None
    eos = tokenizer.eos_token_id
    assert [context.tokens[0] for context in PackedContexts(FromList(TEXTS), tokenizer, 50)][:3] == [eos] * 3
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a bos nor an eos"):
        PackedContexts(FromList(TEXTS), tokenizer, 50)


def test_a_long_document_is_read_once_and_loses_nothing(tokenizer, small_chunks):
    text = " ".join(TEXTS) + "x" * 100
    read = []

    class Counting:
        name_or_path, bos_token_id, eos_token_id, pad_token_id = "counting", 0, 0, 0

        def __call__(self, texts, **options):
            read.extend(texts)
            return tokenizer(texts, **options)

    contexts = tokens_of(PackedContexts(FromList(["a", text, "b"]), Counting(), 16))
    assert "".join(read) == "a" + text + "b"
    assert max(map(len, read)) <= 40
    assert [token for context in contexts for token in context[1:]] == joined(["a", text, "b"], tokenizer)


@pytest.mark.parametrize("length", [2, 16, 1000])
def test_packing_resumes_everywhere(length, tokenizer, small_chunks):
    texts = [*TEXTS[:20], " ".join(TEXTS[:10]), *TEXTS[20:25]]
    assert_resumes(lambda: PackedContexts(FromList(texts), tokenizer, length), [*range(12), 40, 60])


def test_a_state_passes_through_a_weights_only_load(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    batches = open_batches(path, tokenizer, context_length=16, batch_size=2)
    next(batches)
    torch.save(batches.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == batches.state_dict()
    batches.close()


@pytest.mark.parametrize("template", [QWEN, LLAMA_3, MISTRAL])
def test_chats_are_whole_and_start_with_one_bos(template, tokenizer, small_chunks):
    tokenizer = chat_tokenizer(tokenizer, template)
    conversations = chats()
    contexts = tokens_of(ChatContexts(FromList(conversations), tokenizer, 50, system_prompt=""))
    assert all(context[0] == 0 and context[1] != 0 and len(context) <= 50 for context in contexts)
    for conversation in conversations:
        text = render(tokenizer, conversation).removeprefix(tokenizer.bos_token)
        ids, found = tokenizer(text, add_special_tokens=False)["input_ids"], []
        while len(found) < len(ids):
            found += contexts.pop(0)[1:]
        assert found == ids  # no context holds tokens of two chats
    assert not contexts


def test_packed_chats_follow_each_other_in_full_contexts(tokenizer):
    tokenizer = chat_tokenizer(tokenizer, QWEN)
    conversations = chats()
    contexts = tokens_of(ChatContexts(FromList(conversations), tokenizer, 50, system_prompt="", pack=True))
    assert {len(context) for context in contexts[:-1]} == {50}
    text = "".join(tokenizer.apply_chat_template(chat, tokenize=False) for chat in conversations)
    assert tokenizer.decode([token for context in contexts for token in context[1:]]) == text


def test_the_default_system_prompt_is_read_off_the_template(tokenizer):
    assert default_system_prompt(chat_tokenizer(tokenizer, QWEN)) == QWEN_PROMPT
    assert default_system_prompt(chat_tokenizer(tokenizer, LLAMA_3)) == "<|system|>Today is 26 Jul 2024<|end|>"
    assert default_system_prompt(chat_tokenizer(tokenizer, MISTRAL)) == ""
    with pytest.raises(ValueError, match="has no chat template"):
        default_system_prompt(tokenizer)
    with pytest.raises(ValueError, match="chat template of .* fails"):
        default_system_prompt(chat_tokenizer(tokenizer, "{{ raise_exception('never') }}"))


def test_the_system_prompt_is_removed_from_most_chats(tokenizer):
    tokenizer = chat_tokenizer(tokenizer, QWEN)
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    conversations = [own if i % 4 == 0 else chats()[i % 30] for i in range(400)]

    def texts(seed, **settings):
        contexts = ChatContexts(FromList(conversations), tokenizer, 1000, seed=seed, **settings)
        return [tokenizer.decode(context.tokens[1:]) for context in contexts]

    with_prompt = [text.startswith(QWEN_PROMPT) for text in texts(0)]
    assert 10 <= sum(with_prompt) <= 60  # a tenth of 300
    assert all("Be brief." in text for text in texts(0)[::4])  # kept as they are
    assert texts(0) == texts(0) != texts(1)
    assert sum(text.startswith(QWEN_PROMPT) for text in texts(0, removal_fraction=0.0)) == 300
    assert not any(text.startswith(QWEN_PROMPT) for text in texts(0, removal_fraction=1.0))


def test_a_chat_that_the_template_refuses_is_skipped_and_counted(tokenizer):
    conversations = chats(10) + [[{"role": "system", "content": "Be brief."}]]
    contexts = ChatContexts(FromList(conversations), chat_tokenizer(tokenizer, MISTRAL), 1000)
    assert len(list(contexts)) == 10
    assert contexts.skipped == {"refused by the chat template (TemplateError: no system messages)": 1}


def test_conversations_are_found_and_checked(tmp_path):
    good = chats(2)[1]
    bad = [None, "text", [], [{"role": "user"}], [{"role": "user", "content": None}], [3]]
    for column in ("conversation", "messages"):
        path = write_jsonl(tmp_path / f"{column}.jsonl", [{column: chat} for chat in [good, *bad]])
        conversations = open_documents(path, chats=True)
        assert list(conversations) == [good]
        assert conversations.skipped == {"not a conversation": 5, "empty": 1}
    with pytest.raises(ValueError, match="no column 'conversation' or 'messages'"):
        open_documents(write_jsonl(tmp_path / "text.jsonl", [{"text": "a"}]), chats=True)


@pytest.mark.parametrize("pack", [False, True])
def test_chats_resume_everywhere(pack, tokenizer, small_chunks):
    tokenizer = chat_tokenizer(tokenizer, QWEN)
    assert_resumes(lambda: ChatContexts(FromList(chats()), tokenizer, 50, pack=pack), range(0, 100, 6))


def mixed(tokenizer, fraction, n=300):
    texts, conversations = FromList(TEXTS * 30), FromList(chats(n))
    return MixedContexts(
        PackedContexts(texts, tokenizer, 64), ChatContexts(conversations, tokenizer, 64, system_prompt=""), fraction
    )


@pytest.mark.parametrize("fraction", [0.1, 0.35])
def test_the_share_of_chats_is_kept_in_tokens(fraction, tokenizer):
    tokenizer = chat_tokenizer(tokenizer, MISTRAL)
    n_tokens = n_chat = 0
    for i, (context, _) in enumerate(mixed(tokenizer, fraction)):
        n_tokens += len(context)
        n_chat += len(context) * ("[INST]" in tokenizer.decode(context) or "u" in tokenizer.decode(context))
        assert i < 30 or abs(n_chat / n_tokens - fraction) < 0.05
    assert n_tokens > 9_000 and abs(n_chat / n_tokens - fraction) < 0.01


def test_the_mix_resumes_and_ends_with_the_first_stream_that_ends(tokenizer):
    tokenizer = chat_tokenizer(tokenizer, MISTRAL)
    assert_resumes(lambda: mixed(tokenizer, 0.3, n=20), [0, 1, 2, 5, 20])
    for fraction in (0.0, 1.0, -1, 2):
        with pytest.raises(ValueError, match="between 0 and 1"):
            MixedContexts(FromList([]), FromList([]), fraction)


# Batches


def contexts_of(lists):
    return FromList([Context(tokens, [0]) for tokens in lists])


def test_batches_are_padded_at_the_end_and_masked():
    contexts = [Context([1, 2, 3], [0, 2]), Context([4, 5], []), Context([6, 7, 8], [0])]
    (tokens_BL, mask_BL), (last_BL, last_mask_BL) = TextBatches(FromList(contexts), 2, pad_id=9)
    assert tokens_BL.tolist() == [[1, 2, 3], [4, 5, 9]] and tokens_BL.dtype == torch.int64
    assert mask_BL.tolist() == [[MARK, TEXT, MARK], [TEXT, TEXT, PADDING]] and mask_BL.dtype == torch.uint8
    assert last_BL.tolist() == [[6, 7, 8]] and last_mask_BL.tolist() == [[MARK, TEXT, TEXT]]
    with pytest.raises(ValueError, match="at least 1 context"):
        TextBatches(FromList([]), 0, pad_id=0)


@pytest.mark.parametrize("prefetch", [False, True])
def test_the_state_after_an_error_misses_no_batch(prefetch, tokenizer, small_chunks):
    def make(breaks):
        rows = HubRows("user/set", Flaky(breaks).open, retry_waits_s=())
        batches = TextBatches(PackedContexts(Documents(rows, "user/set"), tokenizer, 16), 3, 0)
        return AsLists(Prefetched(batches) if prefetch else batches)

    batches, before = make([30]), []
    with pytest.raises(ConnectionError):
        for batch in batches:
            before.append(batch)
    again = make([])
    again.load_state_dict(batches.state_dict())
    assert len(before) > 3 and before + list(again) == list(make([]))


@pytest.fixture
def chat_file(tmp_path):
    return write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats(100)])


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("kind", ["plain", "mixed"])
def test_the_whole_chain_resumes(kind, prefetch, tokenizer, tmp_path, chat_file, small_chunks):
    tokenizer = chat_tokenizer(tokenizer, QWEN)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])

    def make():
        return AsLists(
            open_batches(
                path,
                tokenizer,
                context_length=32,
                batch_size=3,
                epochs=2,
                mixed=kind == "mixed",
                chat_dataset=chat_file,
                chat_fraction=0.3,
                prefetch=prefetch,
            )
        )

    assert_resumes(make, [0, 1, 2, 7, 1000])
    gc.collect()


class AsLists(Stream):
    """Batches that can be compared."""

    saved = ("batches",)

    def __init__(self, batches):
        self.batches = batches

    def __next__(self):
        return [part.tolist() for part in next(self.batches)]


def test_the_mix_is_refused_before_anything_is_opened(tokenizer):
    with pytest.raises(ValueError, match="has no chat template"):
        open_batches("user/nowhere", tokenizer, context_length=8, batch_size=1, mixed=True)


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetching_is_invisible_and_leaves_no_thread(tokenizer):
    items = [[1, i] for i in range(1, 40)]
    straight = [tokens.tolist() for tokens, _ in TextBatches(contexts_of(items), 2, 0)]
    batches = Prefetched(TextBatches(contexts_of(items), 2, 0), depth=3)
    assert [tokens.tolist() for tokens, _ in itertools.islice(batches, 4)] == straight[:4]
    assert batches.state_dict() == {"batches": {"contexts": {"index": 8}}}
    assert len(prefetch_threads()) == 1
    batches.close()
    assert not prefetch_threads()
    assert batches.state_dict() == {"batches": {"contexts": {"index": 8}}}
    batches.load_state_dict(batches.state_dict())
    assert [tokens.tolist() for tokens, _ in batches] == straight[4:]
    assert next(batches, None) is None
    batches.close()
    batches.close()


def test_an_error_of_the_thread_comes_in_its_turn():
    batches = Prefetched(TextBatches(contexts_of([[1], [2], 3, [4]]), 1, 0), depth=4)
    assert next(batches)[0].item() == 1 and next(batches)[0].item() == 2
    for _ in range(2):
        with pytest.raises(TypeError):
            next(batches)
    assert batches.state_dict() == {"batches": {"contexts": {"index": 2}}}
    batches.close()


def test_a_script_that_forgets_to_close_still_ends(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "for name in ('datasets', 'transformers', 'wandb', 'huggingface_hub'):\n"
        "    sys.modules[name] = None\n"
        "from dictionary_learning.data import Prefetched, FileRows\n"
        "rows = FileRows(list(range(10**6)), lambda file, start: [file][start:])\n"
        "print(next(Prefetched(rows)), next(held := Prefetched(rows)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[2])}
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, env=environment)
    assert (result.returncode, result.stderr) == (0, "")


def test_file_rows_skip_what_was_read():
    opened = []

    def read(file, start):
        opened.append((file, start))
        return [(file, row) for row in range(start, 3)]

    rows = FileRows("ab", read)
    assert [next(rows) for _ in range(4)][-1] == ("b", 0)
    again = FileRows("ab", read)
    again.load_state_dict(rows.state_dict())
    assert list(again) == [("b", 1), ("b", 2)] and opened[-1] == ("b", 1)
    with pytest.raises(ValueError, match="had 2 files when this state was saved, now 3"):
        FileRows("aab", read).load_state_dict(rows.state_dict())


def test_what_is_added_at_the_end_of_files_is_read_when_they_are_gone_on_with():
    length = {"a": 3, "b": 2}

    def read(file, start):
        return [(file, row) for row in range(start, length[file])]

    rows = FileRows("ab", read)
    assert len(list(rows)) == 5 and next(rows, None) is None
    length |= {"a": 4, "b": 4, "c": 1}
    again = FileRows("abc", read)
    again.load_state_dict(rows.state_dict())
    assert list(again) == [("b", 2), ("b", 3), ("c", 0)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.zst", "jsonl.gz", "parquet", "save_to_disk"])
def test_a_damaged_dataset_is_one_sentence_or_read(kind, tmp_path):
    """What is read of a damaged file is text; what is not is one sentence with its name."""
    path = write_dataset(kind, tmp_path)
    file = path if path.is_file() else next(path.glob("*.arrow"))
    content, n_told = file.read_bytes(), 0
    for damaged in mutations(content, random.Random(0)):
        file.write_bytes(damaged)
        try:
            assert all(isinstance(text, str) and text.strip() for text in open_documents(str(path)))
        except ValueError as error:
            n_told += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert n_told >= 1
