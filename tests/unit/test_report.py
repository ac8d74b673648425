"""The feature report: what the pass gathers equals what a loop would find, and the page can hold any text safely."""

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from dictionary_learning import report
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderTopK
from dictionary_learning.formats import save_sae
from dictionary_learning.model import load_model
from dictionary_learning.reading import evaluation_text
from dictionary_learning.report import (
    LatentStatistics,
    logit_effects,
    nearest_latents,
    page_data,
    render,
    write_reports,
)

D, F = 16, 24
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;{{data}}"


@pytest.fixture(scope="module")
def lm(tiny_model_folder):
    return load_model(str(tiny_model_folder))


def random_features(n_contexts=12, length=40, latents=F, seed=0):
    """(f_BLF, keep_BL): sparse features; latent 0 never fires, latent 1 nearly always; a tenth is masked."""
    generator = torch.Generator().manual_seed(seed)
    f_BLF = torch.rand(n_contexts, length, latents, generator=generator)
    share_F = torch.linspace(0, 0.3, latents)
    share_F[1] = 0.9
    f_BLF *= torch.rand(f_BLF.shape, generator=generator) < share_F
    keep_BL = torch.rand(n_contexts, length, generator=generator) < 0.9
    return f_BLF * keep_BL[..., None] * (1 + 10 * torch.arange(latents)), keep_BL


def gathered(f_BLF, keep_BL, at_a_time=5) -> LatentStatistics:
    statistics, first = LatentStatistics(f_BLF.shape[-1], torch.device("cpu")), 0
    for f, keep in zip(f_BLF.split(at_a_time), keep_BL.split(at_a_time), strict=True):
        statistics.update(f, keep, first)
        first += len(f)
    return statistics


def test_sums_and_histograms_count_every_event():
    f_BLF, keep_BL = random_features()
    statistics = gathered(f_BLF, keep_BL)
    flat_NF = f_BLF.flatten(0, 1)
    assert statistics.n_tokens == keep_BL.sum()
    assert torch.equal(statistics.count_F, (flat_NF > 0).sum(0))
    torch.testing.assert_close(statistics.sum_F, flat_NF.sum(0))
    assert torch.equal(statistics.max_F, flat_NF.amax(0))
    l0_N = (f_BLF > 0).sum(2)[keep_BL]
    assert torch.equal(statistics.l0_counts, torch.bincount(l0_N, minlength=F + 1))
    for latent in range(1, F):
        values, width = flat_NF[:, latent], float(statistics.range_F[latent]) / report.BINS
        expected = torch.bincount((values[values > 0] / width).long(), minlength=report.BINS)
        assert torch.equal(statistics.histogram_FH[latent], expected)
        assert report.BINS // 2 <= values.max() / width < report.BINS  # the bins fit the latent's own scale


def test_the_strongest_events_are_those_a_loop_would_find():
    f_BLF, keep_BL = random_features(n_contexts=30)
    strongest = gathered(f_BLF, keep_BL).strongest
    for latent in range(F):
        mine = strongest.latent_M == latent
        peaks = [(float(f[:, latent].max()), context) for context, f in enumerate(f_BLF) if f[:, latent].any()]
        expected = sorted(peaks, reverse=True)[: report.TOP]
        assert list(zip(strongest.value_M[mine].tolist(), strongest.context_M[mine].tolist(), strict=True)) == expected


def test_sampled_events_are_distinct_and_real_and_as_many_as_there_are():
    f_BLF, keep_BL = random_features(n_contexts=30)
    sampled = gathered(f_BLF, keep_BL).sampled
    places = torch.stack([sampled.context_M, sampled.position_M, sampled.latent_M], 1)
    assert len(places.unique(dim=0)) == len(places)
    assert torch.equal(f_BLF[tuple(places.T)], sampled.value_M) and (sampled.value_M > 0).all()
    events_F = (f_BLF > 0).sum((0, 1))
    assert torch.equal(torch.bincount(sampled.latent_M, minlength=F), events_F.clamp(max=report.SAMPLES))


def test_samples_are_drawn_fairly_from_all_of_the_text():
    f_BLF = torch.ones(200, 10, 1)
    contexts_M = gathered(f_BLF, torch.ones(200, 10, dtype=torch.bool), at_a_time=20).sampled.context_M
    assert len(contexts_M) == report.SAMPLES and 70 < contexts_M.float().mean() < 130


def test_the_result_does_not_depend_on_the_batches():
    f_BLF, keep_BL = random_features()
    one, other = gathered(f_BLF, keep_BL, 1).strongest, gathered(f_BLF, keep_BL, 12).strongest
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_windows_show_the_activations_around_the_event_and_nothing_outside_its_context():
    f_BLF, keep_BL = random_features()
    events = gathered(f_BLF, keep_BL).strongest
    for latent, context, position, window_W in zip(
        events.latent_M, events.context_M, events.position_M, events.window_MW, strict=True
    ):
        around = range(int(position) - report.BEFORE, int(position) + report.AFTER + 1)
        expected = [float(f_BLF[context, at, latent]) if 0 <= at < f_BLF.shape[1] else 0.0 for at in around]
        torch.testing.assert_close(window_W.float(), torch.tensor(expected), rtol=2**-8, atol=0)


def test_logit_effects_and_neighbours_are_those_of_the_whole_matrices(monkeypatch):
    monkeypatch.setattr(report, "ENTRIES_AT_A_TIME", 5 * 50)
    decoder_FD, unembedding_VD = torch.randn(F, D), torch.randn(50, D)
    tokens, logits = logit_effects(decoder_FD, unembedding_VD)
    whole_FV = decoder_FD @ unembedding_VD.T
    whole_FV -= whole_FV.mean(1, keepdim=True)
    torch.testing.assert_close(logits[:, 0], whole_FV.sort(descending=True).values[:, : report.LOGITS])
    torch.testing.assert_close(logits[:, 1], whole_FV.sort().values[:, : report.LOGITS])
    torch.testing.assert_close(whole_FV.gather(1, tokens[:, 0]), logits[:, 0])

    latents, cosines = nearest_latents(decoder_FD)
    cosine_FF = torch.nn.functional.cosine_similarity(decoder_FD[:, None], decoder_FD[None], dim=2)
    torch.testing.assert_close(cosine_FF.gather(1, latents), cosines)
    torch.testing.assert_close(cosine_FF.fill_diagonal_(-2).amax(1), cosines[:, 0])


def test_token_texts_join_to_the_text(lm):
    text = "def f(x):\n    return x  # a\tb"
    vocabulary = report.Vocabulary(lm.tokenizer)
    ids = [vocabulary[token] for token in lm.tokenizer.encode(text)]
    strings = vocabulary.strings()
    assert "".join(strings[i] for i in ids) == text


class Page(HTMLParser):
    """What a browser makes of a page: its title, and the content of each script element."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.scripts, self.title, self._place = [], [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._place = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        self._place = ""

    def handle_data(self, data):
        if self._place == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self._place == "title":
            self.title += data

    def objects(self) -> dict:
        return {a["id"]: json.loads(gzip.decompress(base64.b64decode(text))) for a, text in self.scripts if "id" in a}


def test_no_text_can_leave_its_place_in_the_page():
    objects = {"index": {HOSTILE: [HOSTILE]}, "texts": [[1, 2]]}
    text = render(HOSTILE, objects)
    page = Page(text)
    assert page.title == HOSTILE and page.objects() == objects
    assert "img" not in page.tags
    [(_, script)] = [(attributes, script) for attributes, script in page.scripts if "type" not in attributes]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy and policy[1] == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_the_template_asks_for_nothing_from_outside_and_never_writes_markup():
    template = report.TEMPLATE.read_text()
    assert not re.search(
        r"https?://|src=|@import|url\(|innerHTML|insertAdjacent|document\.write|outerHTML|eval\(", template
    )


def test_the_page_holds_what_was_gathered(lm):
    f_BLF, keep_BL = random_features(length=20)
    ae = AutoEncoder(D, F, torch.Generator().manual_seed(0))
    contexts = torch.randint(1, 257, (12, 20), generator=torch.Generator().manual_seed(0)).tolist()
    objects = page_data(gathered(f_BLF, keep_BL), ae, lm, contexts, {"name": "an SAE"})
    index, texts = objects["index"], objects["texts"]
    json.dumps(objects, allow_nan=False)
    assert index["name"] == "an SAE" and index["density"][0] == 0 and index["fires"][0] == []
    latents = [latent for i in range(-(-F // index["chunk"])) for latent in objects[f"latents-{i}"]]
    assert len(latents) == F and latents[0]["groups"] == []
    assert [len(index[key]) for key in ("density", "mean", "max", "cosine", "fires", "promotes")] == [F] * 6
    for i, latent in enumerate(latents[1:], start=1):
        assert sum(latent["histogram"]) == (f_BLF[..., i] > 0).sum()
        for heading, _, examples in latent["groups"]:
            for context, position, start, levels, value in examples:
                assert 0 <= start <= position < start + len(levels) <= len(texts[context])
                assert levels[position - start] == pytest.approx(255 * value / index["max"][i], abs=2)
                assert heading != "Strongest" or levels[position - start] == max(levels)
    assert all(len(text) == 20 for text in texts)


def write_saes(folder: Path, model_folder: Path, n: int = 2, activation_dim: int = D, latents: int = F) -> list[Path]:
    folders, k = [], min(4, latents)
    for i in range(n):
        ae = AutoEncoderTopK(activation_dim, latents, k=k, generator=torch.Generator().manual_seed(i))
        trainer = {"trainer_class": "TopKTrainer", "dict_class": "AutoEncoderTopK", "k": k, "dict_size": latents}
        trainer |= {"layer": 1}
        trainer |= {"lm_name": str(model_folder), "activation_dim": activation_dim}
        trainer |= {"submodule_name": "resid_post_layer_1"}
        folders.append(folder / "resid_post_layer_1" / f"trainer_{i}")
        save_sae(folders[-1], ae, {"trainer": trainer, "buffer": {"ctx_len": 16}})
    return folders


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{HOSTILE} number {i}\n" * 3}) + "\n" for i in range(20)))
    return path


def test_reports_of_a_run_folder(tiny_model_folder, text_file, tmp_path):
    folders = write_saes(tmp_path / "run", tiny_model_folder)
    pages = write_reports(tmp_path / "run", dataset=str(text_file), num_tokens=600, device="cpu")
    assert pages == [folder / "report.html" for folder in folders]
    objects = Page(pages[0].read_text()).objects()
    index = objects["index"]
    assert 400 <= index["tokens"] <= 8192 and index["l0"]["mean"] <= 4
    assert {"Model", "Place", "Text"} <= {name for name, _ in index["facts"]}
    bos = index["vocabulary"].index("<|endoftext|>")
    for latent in objects["latents-0"]:  # the mask of training holds here: no latent is shown firing on bos
        for _, _, examples in latent["groups"]:
            assert all(objects["texts"][context][position] != bos for context, position, *_ in examples)


def run_of(folder: Path, model_folder: Path, dataset: Path, **settings) -> list[Path]:
    """A run folder with one SAE, whose run.json has these settings."""
    folders = write_saes(folder, Path("a/model/that/moved"), n=1)
    settings = {"model_name": str(model_folder), "eval_dataset": str(dataset), "eval_is_held_out": False} | settings
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    return folders


def words_of(page: Path) -> tuple[set[str], set[int]]:
    """The words of the texts on a page, and how long its contexts are."""
    objects = Page(page.read_text()).objects()
    vocabulary = objects["index"]["vocabulary"]
    texts = ["".join(vocabulary[token] for token in text) for text in objects["texts"]]
    return set(re.findall(r"[a-z]{4,}", " ".join(texts))) - {"endoftext"}, set(map(len, objects["texts"]))


@pytest.fixture
def splits(tmp_path) -> Path:
    """A folder of texts whose words tell their split and their column."""
    for split in ("train", "test", "dev"):
        rows = [{"text": f"{split}text " * 9, "body": f"{split}body " * 9} for _ in range(30)]
        (tmp_path / "splits").mkdir(exist_ok=True)
        (tmp_path / "splits" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "splits"


def test_the_run_tells_which_model_and_text_it_was_evaluated_on(tiny_model_folder, splits, tmp_path):
    settings = {"split": "test", "subset": None, "text_column": "body", "context_length": 24, "dtype": "float32"}
    [folder] = run_of(tmp_path / "run", tiny_model_folder, splits, **settings)
    [page] = write_reports(folder, num_tokens=200, device="cpu")
    assert ["Text", str(splits)] in Page(page.read_text()).objects()["index"]["facts"]
    words, lengths = words_of(page)
    assert "testbody" in words and all(word in "testbody" for word in words)  # contexts cut words
    assert max(lengths) == 24
    # what is said in the call goes before what the run says
    [page] = write_reports(folder, num_tokens=200, device="cpu", split="dev", text_column="text")
    assert "devtext" in words_of(page)[0] and not any("body" in word for word in words_of(page)[0])


def test_every_run_below_a_folder_tells_its_own_text(tiny_model_folder, splits, tmp_path):
    for split in ("test", "dev"):
        run_of(tmp_path / "saes" / split, tiny_model_folder, splits, split=split, text_column="text")
    pages = write_reports(tmp_path / "saes", num_tokens=200, device="cpu")
    assert [any("testtext" in word for word in words_of(page)[0]) for page in pages] == [False, True]


def test_the_text_of_an_evaluation_is_what_its_settings_say():
    settings = {"dataset": "team/texts", "eval_dataset": "team/texts", "eval_is_held_out": True, "split": "train"}
    settings |= {"subset": "en", "text_column": "body", "context_length": 32, "random_seeds": [7, 8], "dtype": "x"}
    settings |= {"mixed_dataset": True, "chat_dataset": "team/chats", "chat_fraction": 0.2, "pack_chats": True}
    expected = {"dataset": "team/texts", "held_out": True, "seed": 7, "split": "train", "subset": "en"}
    expected |= {"text_column": "body", "context_length": 32, "chat_held_out": True, "shuffle": True}
    expected |= {"mixed": True, "chat_dataset": "team/chats", "chat_fraction": 0.2, "chat_pack": True}
    assert evaluation_text(settings) == expected
    other = evaluation_text(settings | {"eval_dataset": "team/other", "eval_is_held_out": False})
    assert (other["held_out"], "subset" in other) == (None, False)  # the subset is one of the training set
    own = {"eval_split": "validation", "eval_subset": "de", "eval_text_column": "content"}
    assert evaluation_text(settings | own).items() >= {
        "split": "validation", "subset": "de", "text_column": "content"
    }.items()  # fmt: skip


def test_the_model_is_loaded_as_the_run_loaded_it_but_runs_code_of_its_own_only_when_told(
    tiny_model_folder, splits, tmp_path, monkeypatch
):
    told = {}

    def load(name, **options):
        told.update(options, name=name)
        return load_model(str(tiny_model_folder))

    monkeypatch.setattr(report, "load_model", load)
    settings = {"model_name": "team/model", "revision": "v2", "dtype": "bfloat16", "attn_implementation": "eager"}
    settings |= {"trust_remote_code": True, "split": "test"}
    [folder] = run_of(tmp_path / "run", tiny_model_folder, splits, **settings)
    write_reports(folder, num_tokens=200, device="cpu")
    expected = {"name": "team/model", "revision": "v2", "dtype": torch.bfloat16, "attn_implementation": "eager"}
    assert told.items() >= (expected | {"trust_remote_code": False}).items()
    command = ["--model", "team/other", "--dtype", "float16", "--attn_implementation", "sdpa", "--trust_remote_code"]
    assert report.main([str(folder), "--num_tokens", "200", "--device", "cpu", *command]) == 0
    expected = {"name": "team/other", "revision": None, "dtype": torch.float16, "attn_implementation": "sdpa"}
    assert told.items() >= (expected | {"trust_remote_code": True}).items()


def test_a_report_of_one_latent(tiny_model_folder, text_file, tmp_path):
    write_saes(tmp_path / "run", tiny_model_folder, n=1, latents=1)
    [page] = write_reports(tmp_path / "run", dataset=str(text_file), num_tokens=200, device="cpu")
    objects = Page(page.read_text()).objects()
    assert objects["index"]["cosine"] == [] and len(objects["index"]["density"]) == 1
    assert [latent["similar"] for latent in objects["latents-0"]] == [[]]


def test_broken_saes_are_warned_about_and_stop_no_other(tiny_model_folder, text_file, tmp_path):
    first, second, third = write_saes(tmp_path / "run", tiny_model_folder, n=3)
    (first / "ae.pt").write_bytes(b"broken")
    state = torch.load(third / "ae.pt", weights_only=True)
    torch.save(state | {"b_dec": torch.full((D,), torch.nan)}, third / "ae.pt")
    with pytest.warns(UserWarning) as warnings:
        [page] = write_reports(tmp_path / "run", dataset=str(text_file), num_tokens=200, device="cpu")
    assert page == second / "report.html"
    sentences = [str(warning.message) for warning in warnings]
    assert len(sentences) == 2 and str(first) in sentences[0] and "not finite" in sentences[1]


def test_what_a_user_gets_wrong_is_one_sentence(tiny_model_folder, text_file, tmp_path, capsys):
    def error_of(*arguments) -> str:
        assert report.main([*map(str, arguments), "--device", "cpu"]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        return next(line for line in lines if line.startswith("error: "))

    assert "there is no SAE in" in error_of(tmp_path)
    write_saes(tmp_path / "wide", tiny_model_folder, n=1, activation_dim=D + 1)
    assert "activations of size 17, those of" in error_of(tmp_path / "wide", "--dataset", text_file)
    write_saes(tmp_path / "run", tiny_model_folder, n=1)
    assert "no-such-model" in error_of(tmp_path / "run", "--model", tmp_path / "no-such-model")
    assert "there is no file" in error_of(tmp_path / "run", "--dataset", tmp_path / "nowhere.jsonl")
