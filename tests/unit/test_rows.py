"""What people bring as text: which files are read, how, and in which order."""

import bz2
import gzip
import itertools
import json
import lzma
import os
from collections import Counter

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard
from datasets import Dataset
from test_data import TEXTS, assert_resumes, write_jsonl

from dictionary_learning.data import (
    Documents,
    HubRows,
    PackedContexts,
    Source,
    open_batches,
    open_documents,
    overlap,
    skipped_sentence,
)

ROWS = [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def table(rows):
    import pyarrow

    return pyarrow.Table.from_pylist(rows)


# Formats


def long_window(data: bytes) -> bytes:
    """As `zstd --long=28` writes it: readers refuse such windows unless they are told not to."""
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return stream.compress(data) + stream.flush()


def feather(path):
    import pyarrow.feather

    pyarrow.feather.write_feather(table(ROWS), path)


def ipc(path):
    import pyarrow

    with pyarrow.ipc.new_file(path, table(ROWS).schema) as file:
        file.write_table(table(ROWS), max_chunksize=7)


def delimited(delimiter):
    def quoted(value):
        return '"' + value.replace('"', '""') + '"'

    lines = [delimiter.join(map(quoted, row.values())) for row in [{"id": "id", "text": "text"}, *ROWS]]
    return "\n".join(lines).encode()


FORMATS = {
    "a.ndjson": LINES.encode(),
    "A.JSONL": LINES.encode(),
    "a.csv": delimited(","),
    "a.tsv": delimited("\t"),
    "a.CSV.GZ": __import__("gzip").compress(delimited(",")),
    "a.jsonl.bz2": bz2.compress(LINES.encode()),
    "a.jsonl.xz": lzma.compress(LINES.encode()),
    "a.jsonl.zst": long_window(LINES.encode()) + zstandard.compress(b'{"text": "a second frame"}\n'),
    "data.json": json.dumps({"version": "1", "data": ROWS}).encode(),
    "pretty.json": json.dumps({"data": ROWS}, indent=1).encode(),
    "a.feather": feather,
    "a.arrow": ipc,
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_formats_that_people_bring(name, tmp_path):
    path, content = tmp_path / name, FORMATS[name]
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    extra = ["a second frame"] * name.endswith("zst")
    assert list(open_documents(str(path))) == TEXTS + extra
    assert_resumes(lambda: open_documents(str(path)), [1, 20])


@pytest.mark.parametrize("name", ["a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst"])
def test_a_compressed_file_that_was_cut_short_is_not_a_shorter_one(name, tmp_path):
    (tmp_path / name).write_bytes(FORMATS[name][:-9])
    with pytest.raises(ValueError, match=f"cannot read .*{name}"):
        list(open_documents(str(tmp_path / name)))


def test_a_csv_record_of_another_length_is_skipped_and_counted(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nwhole,1\nHello, world,2\nlast,3\n")
    documents = open_documents(str(tmp_path / "a.csv"))
    assert list(documents) == ["whole", "last"]
    assert documents.skipped == {"not text": 1}


def test_a_column_within_a_column(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"a": {"b": text}} for text in TEXTS] + [{"a": None}])
    documents = open_documents(path, text_column="a.b")
    assert list(documents) == TEXTS and documents.skipped == {"not text": 1}
    whole = write_jsonl(tmp_path / "b.jsonl", [{"a.b": "whole", "a": {"b": "no"}}])
    assert list(open_documents(whole, text_column="a.b")) == ["whole"]


def test_token_ids_are_documents_as_they_are(tmp_path, tokenizer):
    ids = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    path = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": [0, *row, 0]} for row in ids])
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in TEXTS])
    packed = PackedContexts(open_documents(path, text_column="input_ids"), tokenizer, 16)
    assert list(packed) == list(PackedContexts(open_documents(text), tokenizer, 16))


def test_a_text_file_is_documents_of_whole_paragraphs(tmp_path):
    paragraphs = [f"{i} " + "word " * (i % 90) + "end." for i in range(800)]
    path = tmp_path / "book.txt"
    path.write_bytes(("\ufeff" + "\r\n\r\n".join(paragraphs)).encode())
    documents = list(open_documents(str(path)))
    assert "".join(documents) == "\n\n".join(paragraphs)
    assert 20 < len(documents) and max(map(len, documents)) < 9000
    assert all(document.split()[0].isdigit() and document.rstrip().endswith("end.") for document in documents)
    held_out, others = (list(open_documents(str(path), held_out=side)) for side in (True, False))
    assert held_out and sorted(held_out + others) == sorted(documents)
    assert Counter(open_documents(str(path), shuffle=1)) == Counter(documents)  # the same documents from anywhere
    (tmp_path / "line.txt").write_text("ä" * 20_000)
    assert "".join(open_documents(str(tmp_path / "line.txt"))) == "ä" * 20_000


# Which files


def test_of_a_saved_folder_only_what_its_state_names_is_read(tmp_path):
    import shutil

    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    Dataset.from_list(ROWS).save_to_disk(tmp_path, num_shards=2)
    for stale in ("cache-1234.arrow", "data-00000-of-00001.arrow"):
        shutil.copy(tmp_path / "data-00000-of-00002.arrow", tmp_path / stale)
    assert list(open_documents(str(tmp_path))) == TEXTS
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match="lacks data-00001-of-00002.arrow, which its state.json names"):
        open_documents(str(tmp_path))


@pytest.mark.parametrize(
    "names, split, chosen",
    [
        (["train-0.jsonl", "test.jsonl"], "train", ["train-0.jsonl"]),
        (["my-train-0.jsonl", "valid.jsonl"], "train", ["my-train-0.jsonl"]),
        (["training/a.jsonl", "dev/a.jsonl", "train.jsonl"], "train", ["training/a.jsonl"]),
        (["training/a.jsonl", "dev/a.jsonl"], "validation", ["dev/a.jsonl"]),
        (["a.jsonl", "eval_b.jsonl"], "train", ["a.jsonl"]),
        (["a.jsonl", "contest.jsonl"], "train", ["a.jsonl", "contest.jsonl"]),
    ],
)
def test_the_files_of_a_split_are_those_that_load_dataset_takes_and_the_choice_is_told(names, split, chosen, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, [{"text": name}])
    documents = open_documents(str(tmp_path), split=split)
    assert list(documents) == chosen
    left_out = sorted(set(names) - set(chosen))
    assert len(documents.notes) == bool(left_out)
    assert all(name in documents.notes[0] for name in left_out + chosen if left_out)
    if set(chosen) != set(names) and "my-train-0.jsonl" not in names and "a.jsonl" not in names:  # more than it says
        from datasets import load_dataset_builder

        files = (load_dataset_builder(str(tmp_path)).config.data_files or {})[split]
        assert [os.path.relpath(file, tmp_path) for file in files] == chosen


def test_linked_folders_are_read(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "texts").mkdir()
    write_jsonl(tmp_path / "elsewhere" / "a.jsonl", [{"text": "linked"}])
    (tmp_path / "texts" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "texts")
    assert list(open_documents(str(tmp_path / "texts"))) == ["linked"]


def test_text_is_the_same_by_its_files_whatever_they_are_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "other").mkdir()
    for split in ("train", "test"):
        write_jsonl(tmp_path / "texts" / f"{split}.jsonl", [{"text": split}])
    write_jsonl(tmp_path / "other" / "c.jsonl", [{"text": "another"}])
    (tmp_path / "link").symlink_to("texts")
    texts = Source("texts")
    for same in ("./texts", "texts/", str(tmp_path / "texts"), "texts/train.jsonl", "link"):
        assert overlap(texts, Source(same)) and overlap(Source(same), texts)
    assert not overlap(texts, Source("texts", split="test")) and not overlap(texts, Source("other"))
    os.link("texts/train.jsonl", "other/b.jsonl")
    assert overlap(texts, Source("other"))
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "texts" / "train.jsonl").read_bytes())
    assert overlap(texts, Source("copy.jsonl"))
    assert overlap(Source("python-stdlib"), Source("python-stdlib")) and not overlap(texts, Source("python-stdlib"))
    hub = Source("user/set", subset="en")
    assert overlap(hub, Source("User/set")) and overlap(hub, Source("user/set", split="train+test"))
    assert not overlap(hub, Source("user/set", split="test")) and not overlap(hub, Source("user/other"))


def test_the_same_documents_in_another_form_are_the_same_text(tmp_path):
    rows = [{"text": f"document {i}", "body": f"body {i}"} for i in range(60)]
    texts, other = Source(str(tmp_path / "a.jsonl")), Source(str(tmp_path / "other.jsonl"))
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "other.jsonl", [{"text": f"another {i}"} for i in range(60)])
    write_jsonl(tmp_path / "part.jsonl", rows[40:])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "a.json").write_text(json.dumps(rows[::-1]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for name in ("part.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "saved"):
        same = Source(str(tmp_path / name))
        assert overlap(texts, same) and overlap(same, texts) and not overlap(other, same), name
    assert not overlap(texts, Source(str(tmp_path / "a.parquet"), text_column="body"))
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "train.jsonl", rows)
    write_jsonl(tmp_path / "folder" / "test.jsonl", rows[:5])
    assert overlap(Source(str(tmp_path / "folder")), Source(str(tmp_path / "folder"), split="test"))


@pytest.mark.parametrize("split", ["train[:10]", "train+test"])
def test_a_file_has_no_parts_of_splits(split, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "all of it"}])
    with pytest.raises(ValueError, match="only Hub datasets have parts"):
        open_documents(str(tmp_path / "a.jsonl"), split=split)


def test_shuffled_text_that_has_grown_is_in_another_order(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": f"document {i}"} for i in range(60)])
    documents = open_documents(str(path), shuffle=0)
    next(documents)
    state = documents.state_dict()
    open_documents(str(path), shuffle=0).load_state_dict(state)
    write_jsonl(path, [{"text": f"document {i}"} for i in range(61)])
    with pytest.raises(ValueError, match="its shuffled order is another"):
        open_documents(str(path), shuffle=0).load_state_dict(state)


# Columns and rows


def test_what_nobody_asked_for_is_no_obstacle(tmp_path):
    """Numbers of more digits than Python converts, and a date that it has no name for, where the column is missing."""
    rows = [f'{{"n": {"9" * 5000}, "text": "document {i}"}}' for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "a.json").write_text(f"[{', '.join(rows)}]")
    for name in ("a.jsonl", "a.json"):
        assert list(open_documents(str(tmp_path / name))) == [f"document {i}" for i in range(3)]
    far = pyarrow.array([10**18]).cast(pyarrow.timestamp("us"))
    table = pyarrow.table({"body": ["a text"], "when": far})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.feather.write_feather(table, tmp_path / "a.feather")
    for name in ("a.parquet", "a.feather"):
        with pytest.raises(ValueError, match="no column 'text'; its columns are: 'body', 'when'"):
            open_documents(str(tmp_path / name))
        assert list(open_documents(str(tmp_path / name), text_column="body")) == ["a text"]


def test_token_ids_are_whole_numbers_that_a_tensor_holds(tmp_path):
    lists = [[1, 2], [2**63], [2**70], [-1], [True], [1.0], [[1]], []]
    write_jsonl(tmp_path / "a.jsonl", [{"text": ids} for ids in lists])
    documents = open_documents(str(tmp_path / "a.jsonl"))
    assert list(documents) == [[1, 2]] and documents.skipped == {"not text": 7}


def test_a_byte_that_is_no_text_is_named_by_its_line(tmp_path):
    lines = ["text", *(f"line {i}" for i in range(2, 3000)), "caf\xe9", "more"]
    (tmp_path / "a.csv").write_bytes("\n".join(lines).encode("latin-1"))
    with pytest.raises(ValueError, match=r"cannot read .*a\.csv: line 3000: "):
        list(open_documents(str(tmp_path / "a.csv")))


def test_a_column_that_nobody_asked_for_is_not_read(tmp_path):
    import pyarrow
    import pyarrow.parquet

    far = pyarrow.array([10**15] * 2, pyarrow.timestamp("ms"))  # beyond the year 9999
    rows = pyarrow.table({"text": ["one", "two"], "date": far})
    pyarrow.parquet.write_table(rows, tmp_path / "a.parquet")
    assert list(open_documents(str(tmp_path / "a.parquet"))) == ["one", "two"]


def test_a_first_row_without_the_column_is_one_row_that_is_skipped(tmp_path):
    documents = open_documents(write_jsonl(tmp_path / "a.jsonl", [{"id": 1}, *ROWS]))
    assert list(documents) == TEXTS and documents.skipped == {"not text": 1}


def test_a_bad_line_is_named_by_its_line_of_the_file(tmp_path):
    lines = LINES.splitlines()
    lines[40:40] = ["", '{"text": "half']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for shuffle in (None, 0):
        with pytest.raises(ValueError, match="a.jsonl: line 42: "):
            list(open_documents(str(tmp_path / "a.jsonl"), shuffle=shuffle))


def test_what_is_skipped_is_told_and_warned_about_above_one_in_ten(tmp_path, tokenizer):
    rows = [{"text": "word"}] * 200 + [{"text": ""}] * 4000
    batches = open_batches(
        write_jsonl(tmp_path / "a.jsonl", rows), tokenizer, context_length=8, batch_size=4, prefetch=0
    )
    assert len(list(batches)) > 1
    assert (batches.skipped, batches.n_read) == ({"empty": 4000}, 4200)
    sentence = skipped_sentence(batches.skipped, batches.n_read)
    assert sentence == "warning: 4,000 of 4,200 rows of the text were skipped: 4,000 empty"
    assert skipped_sentence(Counter(empty=420), 4200).startswith("420 of") and not skipped_sentence(Counter(), 4200)


def test_a_damaged_file_ends_the_text_or_is_skipped_and_counted(tmp_path):
    import pyarrow.parquet

    for i in range(3):
        pyarrow.parquet.write_table(table(ROWS[20 * i : 20 * i + 20]), tmp_path / f"{i}.parquet")
    (tmp_path / "1.parquet").write_bytes((tmp_path / "1.parquet").read_bytes()[:-40])
    with pytest.raises(ValueError, match="cannot read .*1.parquet"):
        list(open_documents(str(tmp_path)))
    documents = open_documents(str(tmp_path), skip_damaged=True, epochs=2)
    assert list(documents) == 2 * (TEXTS[:20] + TEXTS[40:])
    assert documents.skipped.total() == 2 and "1.parquet" in next(iter(documents.skipped))


# Order


def two_languages(folder, n=300):
    """Python in many files, German in one of as many bytes."""
    import pyarrow.parquet

    python, size = [f"def f{i}():\n" + "    return 1\n" * (i % 40) for i in range(n)], 0
    for i in range(10):
        part = [{"text": text} for text in python[i::10]]
        pyarrow.parquet.write_table(table(part), folder / f"a-python-{i}.parquet", compression="none")
    size = sum(file.stat().st_size for file in folder.iterdir())
    german = list(itertools.takewhile(lambda i: 60 * i < size, range(10**6)))
    rows = [{"text": f"Satz {i}. " + "Das ist ein Haus, "[: i % 18] * 6} for i in german]
    pyarrow.parquet.write_table(table(rows), folder / "z-german.parquet", compression="none", use_dictionary=False)
    return python, [row["text"] for row in rows]


def test_shuffled_text_holds_all_of_a_folder_from_its_start(tmp_path):
    python, german = two_languages(tmp_path)
    texts = list(open_documents(str(tmp_path), shuffle=0))
    assert Counter(texts) == Counter(python + german)
    share = sum(map(len, python)) / sum(map(len, python + german))
    for start in (0, 100):
        some = texts[start : start + 200]
        found = sum(len(text) for text in some if text.startswith("def")) / sum(map(len, some))
        assert abs(found - share) < 0.2
    assert texts == list(open_documents(str(tmp_path), shuffle=0)) != list(open_documents(str(tmp_path), shuffle=1))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "feather", "python-stdlib"])
def test_shuffled_text_loses_nothing_and_resumes(kind, tmp_path):
    import gzip

    import pyarrow.parquet

    dataset = str(tmp_path / f"a.{kind}")
    if kind == "python-stdlib":
        dataset = kind
    elif kind == "jsonl":
        write_jsonl(tmp_path / f"a.{kind}", ROWS)
    elif kind == "jsonl.gz":
        (tmp_path / f"a.{kind}").write_bytes(gzip.compress(LINES.encode()))
    elif kind == "parquet":
        pyarrow.parquet.write_table(table(ROWS), tmp_path / f"a.{kind}", row_group_size=17)
    else:
        feather(tmp_path / f"a.{kind}")
    in_order = list(open_documents(dataset, held_out=kind == "python-stdlib" or None))
    shuffled = list(open_documents(dataset, held_out=kind == "python-stdlib" or None, shuffle=3))
    assert Counter(shuffled) == Counter(in_order)
    assert kind == "jsonl.gz" or shuffled != in_order  # one packed file has no parts
    assert_resumes(
        lambda: open_documents(dataset, held_out=kind == "python-stdlib" or None, shuffle=3, epochs=2),
        [0, 5, len(in_order), len(in_order) + 3],
    )


# The Hub


class Sharded:
    """Six shards of a dataset, of which one cannot be read; like `datasets.IterableDataset`."""

    num_shards, column_names = 6, None

    def __init__(self, error=None, shards=range(6)):
        self.error, self.shards, self.row = error, list(shards), 0

    def shard(self, num_shards, index):
        assert num_shards == self.num_shards
        return Sharded(self.error, range(index, index + 1))

    def __iter__(self):
        for shard in self.shards:
            for row in range(self.row, 10):
                if self.error is not None and shard == 2 and row == 4:
                    raise self.error
                self.row = row + 1
                yield {"text": TEXTS[10 * shard + row]}

    def state_dict(self):
        return {"row": self.row}

    def load_state_dict(self, state):
        self.row = state["row"] if state else 0


@pytest.mark.parametrize(
    "error", [ValueError("Invalid Parquet"), OSError("Corrupt snappy data"), EOFError("cut short")]
)
def test_a_damaged_shard_is_no_lost_network(error, monkeypatch):
    slept = []
    monkeypatch.setattr("dictionary_learning.data.hub.time.sleep", slept.append)

    def rows(**options):
        name = "part-{}-of-{}.parquet".format
        return HubRows("user/set", lambda revision: (Sharded(error), "abc"), shard_name=name, **options)

    with pytest.raises(ValueError, match="cannot read user/set, part-2-of-6.parquet: "):
        list(rows())
    assert not slept
    documents = Documents(rows(skip_damaged=True), "user/set")
    assert list(documents) == TEXTS[:24] + TEXTS[30:]
    assert documents.skipped.total() == 1 and "part-2-of-6" in next(iter(documents.skipped))


def test_a_shuffled_hub_stream_reads_its_shards_side_by_side_and_resumes(monkeypatch):
    from dictionary_learning.data import hub

    monkeypatch.setattr(hub, "open_hub", lambda source, revision: (Sharded(), "abc"))
    texts = list(open_documents("user/set", shuffle=0))
    assert Counter(texts) == Counter(TEXTS)
    assert len({TEXTS.index(text) // 10 for text in texts[:6]}) >= 5
    assert_resumes(lambda: open_documents("user/set", shuffle=0, epochs=2), [0, 7, 59, 61])


def test_a_hub_dataset_comes_from_the_cache_at_once_where_there_is_no_network(tmp_path, monkeypatch):
    import huggingface_hub

    commit = "a" * 40
    folder = tmp_path / "datasets--user--set"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    write_jsonl(folder / "snapshots" / commit / "train.jsonl", ROWS)

    def no_network(self, name, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_network)
    snapshot = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: snapshot(name, cache_dir=tmp_path, **options)
    )
    documents = open_documents("user/set")
    assert list(documents) == TEXTS and documents.state_dict()["rows"]["revision"] == commit
    with pytest.raises(ConnectionError, match="cannot reach user/nowhere"):
        open_documents("user/nowhere")
