"""One self-contained HTML page per SAE, to look at its latents: `python -m dictionary_learning.report FOLDER`.

The page needs no server and no network. It is assets/report.html with the data put in as gzipped JSON, which the
browser unpacks as it is needed.

B contexts, L positions, N unmasked tokens, D activation_dim, F dict_size, V vocabulary, M events (a latent firing on a
token), W tokens of a window, H bins of a histogram.
"""

import argparse
import base64
import gzip
import hashlib
import html
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import reduce
from torch import Tensor
from tqdm import tqdm

from dictionary_learning.buffer import Mask, position_mask
from dictionary_learning.data import BUILT_IN, EVAL_DATASET, open_batches
from dictionary_learning.dictionary import Dictionary
from dictionary_learning.files import read_json, write_atomic
from dictionary_learning.formats import load_dictionary
from dictionary_learning.model import BUILT_IN as BUILT_IN_MODELS
from dictionary_learning.model import LanguageModel, check_context, load_model, resolve_device
from dictionary_learning.plotting import ARCHITECTURE_STYLES
from dictionary_learning.reading import evaluation_text, recorded_settings
from dictionary_learning.results import RESULTS, find_named, said_by
from dictionary_learning.sites import Place, route_of, words_of, writes_residual
from dictionary_learning.tokenizer import TextMarks

TEMPLATE = Path(__file__).parent / "assets" / "report.html"

TOP, SAMPLES = 16, 32  # events kept of each latent: its strongest, one a context, and random ones
SHOWN_OF_A_QUARTER = 3  # of the random ones, sorted by strength
BEFORE, AFTER = 20, 12  # tokens of a window around an event
BINS = 64
LOGITS, NEIGHBOURS = 8, 8
CHUNK = 128  # latents unpacked together
TOKENS_AT_A_TIME = 4096  # in the model
ENTRIES_AT_A_TIME = 2**26  # of tokens times latents: 256 MiB in float32

# key of eval_results.json: what it is called on the page
MEASURED = {"l0": "L0", "frac_recovered": "Loss recovered", "frac_variance_explained": "Variance explained"}


class Events(NamedTuple):
    """Places where latents fire; `score_M` decides which are kept."""

    latent_M: Tensor
    score_M: Tensor
    value_M: Tensor
    context_M: Tensor
    position_M: Tensor
    window_MW: Tensor  # activations from BEFORE tokens before to AFTER tokens after; bfloat16, 0 outside the context

    def best(self, per_latent: int) -> "Events":
        """The `per_latent` of highest score of every latent: sorted by latent, then from the highest score down."""
        order_M = self.score_M.argsort(descending=True, stable=True)
        order_M = order_M[self.latent_M[order_M].argsort(stable=True)]
        latent_M = self.latent_M[order_M]
        rank_M = torch.arange(len(latent_M), device=latent_M.device) - torch.searchsorted(latent_M, latent_M)
        order_M = order_M[rank_M < per_latent]
        return Events(*(column[order_M] for column in self))


def _windows(f_BLF: Tensor, b_M: Tensor, l_M: Tensor, latent_M: Tensor) -> Tensor:
    l_MW = l_M[:, None] + torch.arange(-BEFORE, AFTER + 1, device=l_M.device)
    length = f_BLF.shape[1]
    window_MW = f_BLF[b_M[:, None], l_MW.clamp(0, length - 1), latent_M[:, None]]
    return torch.where((l_MW >= 0) & (l_MW < length), window_MW, 0).bfloat16()


class LatentStatistics:
    """What one pass over text tells about every latent of an SAE, without a loop over latents or tokens."""

    def __init__(self, dict_size: int, device: torch.device):
        self.dict_size, self.device = dict_size, device
        self.n_tokens = 0
        self.count_F = torch.zeros(dict_size, dtype=torch.long, device=device)
        self.sum_F = torch.zeros(dict_size, device=device)
        self.max_F = torch.zeros(dict_size, device=device)
        # bins of equal width, from 0 to a range that doubles for a latent when it fires more strongly than ever
        self.histogram_FH = torch.zeros(dict_size, BINS, dtype=torch.long, device=device)
        self.range_F = torch.full((dict_size,), 2.0**-30, device=device)
        self.l0_counts = torch.zeros(dict_size + 1, dtype=torch.long, device=device)
        self.generator = torch.Generator(device).manual_seed(0)
        none = torch.zeros(0, dtype=torch.long, device=device)
        windows = torch.zeros(0, BEFORE + 1 + AFTER, dtype=torch.bfloat16, device=device)
        self.strongest = self.sampled = Events(none, none.float(), none.float(), none, none, windows)

    def update(self, f_BLF: Tensor, keep_BL: Tensor, first_context: int) -> None:
        """Add contexts; the activations of masked positions must be 0."""
        peak_BF, at_BF = f_BLF.max(1)
        b_M, l_M, latent_M = f_BLF.nonzero(as_tuple=True)
        value_M = f_BLF[b_M, l_M, latent_M]
        l0_BL = torch.bincount(b_M * keep_BL.shape[1] + l_M, minlength=keep_BL.numel()).view_as(keep_BL)
        self.n_tokens += int(keep_BL.sum())
        self.l0_counts += torch.bincount(l0_BL[keep_BL], minlength=self.dict_size + 1)
        self.count_F += torch.bincount(latent_M, minlength=self.dict_size)
        self.sum_F += f_BLF.sum((0, 1))
        self.max_F = torch.maximum(self.max_F, peak_BF.amax(0))
        self._add_to_histogram(latent_M, value_M)

        # random events, which are those of the highest random scores; and the strongest one of each context
        random_M = torch.rand(len(latent_M), device=self.device, generator=self.generator)
        events = Events(latent_M, random_M, value_M, b_M, l_M, empty := f_BLF.new_empty(0))
        self.sampled = self._merge(self.sampled, SAMPLES, events, f_BLF, first_context)
        b_M, latent_M = peak_BF.nonzero(as_tuple=True)
        peak_M, l_M = peak_BF[b_M, latent_M], at_BF[b_M, latent_M]
        events = Events(latent_M, peak_M, peak_M, b_M, l_M, empty)
        self.strongest = self._merge(self.strongest, TOP, events, f_BLF, first_context)

    def _add_to_histogram(self, latent_M: Tensor, value_M: Tensor) -> None:
        while (low_F := self.max_F >= self.range_F).any():
            halves = reduce(self.histogram_FH[low_F], "f (half two) -> f half", "sum", two=2)
            self.histogram_FH[low_F] = torch.cat([halves, torch.zeros_like(halves)], dim=1)
            self.range_F = torch.where(low_F, 2 * self.range_F, self.range_F)
        bin_M = (value_M / self.range_F[latent_M] * BINS).long()
        counts = torch.bincount(latent_M * BINS + bin_M, minlength=self.dict_size * BINS)
        self.histogram_FH += counts.view(-1, BINS)

    def _merge(self, kept: Events, per_latent: int, new: Events, f_BLF: Tensor, first_context: int) -> Events:
        """The best of both; `new` counts its contexts from 0 and has no windows yet."""
        n_F = torch.bincount(kept.latent_M, minlength=self.dict_size)
        worst_F = torch.full_like(self.max_F, torch.inf).scatter_reduce(0, kept.latent_M, kept.score_M, "amin")
        better_M = (n_F[new.latent_M] < per_latent) | (new.score_M > worst_F[new.latent_M])
        latent_M, score_M, value_M, b_M, l_M = (column[better_M] for column in new[:-1])
        windows_MW = _windows(f_BLF, b_M, l_M, latent_M)
        better = Events(latent_M, score_M, value_M, b_M + first_context, l_M, windows_MW)
        return Events(*map(torch.cat, zip(kept, better, strict=True))).best(per_latent)


# ---- what the weights tell


@torch.no_grad()
def logit_effects(decoder_FD: Tensor, unembedding_VD: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, logits), each (F, 2, LOGITS): what a unit of each latent adds to the logits, its largest values and its
    smallest. It is read off the direct path, without the upper layers and the final norm; the mean over the
    vocabulary, which no probability depends on, is taken out."""
    tokens, logits = [], []
    for rows_MD in decoder_FD.split(max(1, ENTRIES_AT_A_TIME // len(unembedding_VD))):
        logits_MV = rows_MD @ unembedding_VD.T
        logits_MV -= logits_MV.mean(1, keepdim=True)
        ends = [logits_MV.topk(min(LOGITS, logits_MV.shape[1]), largest=largest) for largest in (True, False)]
        tokens.append(torch.stack([end.indices for end in ends], 1).cpu())
        logits.append(torch.stack([end.values for end in ends], 1).cpu())
    return torch.cat(tokens), torch.cat(logits)


@torch.no_grad()
def nearest_latents(decoder_FD: Tensor) -> tuple[Tensor, Tensor]:
    """(latents, cosines), each (F, NEIGHBOURS) or fewer columns where F has no more others: the latents whose decoder
    directions are most like each one's."""
    unit_FD = torch.nn.functional.normalize(decoder_FD, dim=1)
    latents, cosines = [], []
    for first, rows_MD in zip(range(0, len(unit_FD), 1024), unit_FD.split(1024), strict=True):
        cosine_MF = rows_MD @ unit_FD.T
        cosine_MF[:, first : first + len(rows_MD)].fill_diagonal_(-2)
        top = cosine_MF.topk(min(NEIGHBOURS, len(unit_FD) - 1))
        latents.append(top.indices.cpu())
        cosines.append(top.values.cpu())
    return torch.cat(latents), torch.cat(cosines)


# ---- the page


class Vocabulary:
    """Numbers the tokens of a page from 0 in the order in which they are asked for."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.numbers: dict[int, int] = {}

    def __getitem__(self, token: int) -> int:
        return self.numbers.setdefault(token, len(self.numbers))

    def strings(self) -> list[str]:
        """Each token's text. Decoded behind another one: at the start of a text some tokenizers drop a space."""
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        anchor = self.tokenizer.encode("a", add_special_tokens=False)[-1:]
        before = self.tokenizer.decode(anchor, **options)
        return [self.tokenizer.decode([*anchor, token], **options).removeprefix(before) for token in self.numbers]


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def page_data(
    statistics: LatentStatistics,
    ae: Dictionary,
    lm: LanguageModel,
    contexts: list[list[int]],
    about: dict[str, Any],
    has_effects: bool = True,
) -> dict[str, Any]:
    """The objects that the page unpacks: `index` at once, `texts` and `latents-{i}` as they are needed.

    contexts: the token ids of the contexts read, in their order. about: entries added to the index.
    has_effects: whether the decoder writes into the residual stream, from which a direct path leads to the logits.
    """
    decoder_FD = ae.decoder_FD.detach().to(lm.device, torch.float32)
    effect_tokens = effect_logits = torch.zeros(ae.dict_size, 2, 0)
    if has_effects:
        unembedding = lm.model.get_output_embeddings()
        if unembedding is None:
            raise ValueError(f"{lm.name} has no unembedding to read the latents' effect on the output from")
        unembedding_VD = unembedding.weight.detach().float()[: len(lm.tokenizer)]
        effect_tokens, effect_logits = logit_effects(decoder_FD, unembedding_VD)
    neighbours, cosines = nearest_latents(decoder_FD)
    max_F, range_F, count_F = (a.cpu() for a in (statistics.max_F, statistics.range_F, statistics.count_F))
    vocabulary, texts, number_of_context = Vocabulary(lm.tokenizer), [], {}

    def examples(events: Events) -> list[list[list[Any]]]:
        """By latent: [context, peak, first token shown, levels from 0 to 255, activation] of each of its events."""
        by_latent: list[list[list[Any]]] = [[] for _ in max_F]
        levels_MW = (events.window_MW.cpu().float() / max_F[events.latent_M.cpu(), None] * 255).ceil().clamp(max=255)
        columns = (events.latent_M, events.value_M, events.context_M, events.position_M, levels_MW.int())
        for latent, value, context, position, levels in zip(*(c.tolist() for c in columns), strict=True):
            if context not in number_of_context:
                number_of_context[context] = len(texts)
                texts.append([vocabulary[token] for token in contexts[context]])
            start, end = max(0, position - BEFORE), min(len(contexts[context]), position + AFTER + 1)
            levels = levels[start - position + BEFORE : end - position + BEFORE]
            by_latent[latent].append([number_of_context[context], position, start, levels, _round(value)])
        return by_latent

    latents, fires = [], []
    everything = zip(examples(statistics.strongest), examples(statistics.sampled), strict=True)
    for i, (strongest, sampled) in enumerate(everything):
        peaks = Counter(texts[context][position] for context, position, *_ in strongest)
        fires.append([token for token, _ in peaks.most_common(5)])
        bin_width = float(range_F[i]) / BINS
        promotes, suppresses = (
            [[vocabulary[token], _round(logit)] for token, logit in zip(tokens, logits, strict=True)]
            for tokens, logits in zip(effect_tokens[i].tolist(), effect_logits[i].tolist(), strict=True)
        )
        latents.append(
            {
                "groups": _groups(strongest, sampled),
                "histogram": statistics.histogram_FH[i, : int(max_F[i] / bin_width) + 1].tolist(),
                "bin": _round(bin_width),
                "promotes": promotes,
                "suppresses": suppresses,
                "similar": [[j, _round(c)] for j, c in zip(neighbours[i].tolist(), cosines[i].tolist(), strict=True)],
            }
        )
    n_tokens = max(statistics.n_tokens, 1)
    index = (
        about
        | {
            "chunk": CHUNK,
            "tokens": statistics.n_tokens,
            "density": [_round(count / n_tokens) for count in count_F.tolist()],
            "mean": [_round(mean) for mean in (statistics.sum_F.cpu() / count_F.clamp(min=1)).tolist()],
            "max": [_round(value) for value in max_F.tolist()],
            "cosine": [_round(cosine) for cosine in cosines[:, :1].flatten().tolist()],  # of an only latent, none
            "fires": fires,
            "promotes": [[token for token, _ in latent["promotes"][:3]] for latent in latents],
            "l0": _l0_histogram(statistics.l0_counts.cpu()),
            "vocabulary": vocabulary.strings(),
        }
    )
    chunks = {f"latents-{i}": latents[i * CHUNK : (i + 1) * CHUNK] for i in range(-(-len(latents) // CHUNK))}
    return {"index": index, "texts": texts, **chunks}


def _groups(strongest: list[list[Any]], sampled: list[list[Any]]) -> list[tuple[str, str, list[list[Any]]]]:
    """(heading, note, examples): the strongest events, then random ones, by quarters of their strength.

    The quarters need enough samples; a latent with fewer gets those that are not among its strongest.
    """
    groups = [("Strongest", "at most one of each context", strongest)] if strongest else []
    sampled = sorted(sampled, key=lambda example: -example[-1])
    quarter = len(sampled) // 4
    if quarter < SHOWN_OF_A_QUARTER:
        shown = {(context, position) for context, position, *_ in strongest}
        others = [example for example in sampled if tuple(example[:2]) not in shown]
        return groups + [("Others", "drawn at random", others)] * bool(others)
    for i, name in enumerate(("Strongest quarter", "Second quarter", "Third quarter", "Weakest quarter")):
        members = sampled[i * quarter : (i + 1) * quarter]
        note = f"drawn at random, from {members[-1][-1]:.3g} to {members[0][-1]:.3g}"
        groups.append((name, note, members[:: quarter // SHOWN_OF_A_QUARTER][:SHOWN_OF_A_QUARTER]))
    return groups


def _l0_histogram(counts: Tensor) -> dict[str, Any]:
    """The number of tokens by L0, in at most BINS bins of `width` from 0 up."""
    l0s = torch.arange(len(counts))
    most = int(l0s[counts > 0].max()) if counts.any() else 0
    width = -(-(most + 1) // BINS)
    padded = torch.nn.functional.pad(counts[: most + 1], (0, -(most + 1) % width))
    mean = float((l0s * counts).sum() / counts.sum().clamp(min=1))
    return {"width": width, "counts": reduce(padded, "(bin n) -> bin", "sum", n=width).tolist(), "mean": _round(mean)}


def render(title: str, objects: dict[str, Any]) -> str:
    """The page. Nothing in it can be taken for markup: the title is escaped, the data base64; and the browser is told
    to run no other script than the template's own."""
    template = TEMPLATE.read_text(encoding="utf-8")
    script = template.partition("<script>")[2].partition("</script>")[0]
    packed = {name: _packed(value) for name, value in objects.items()}
    values = {
        "title": html.escape(title),
        "script_hash": "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "data": "\n".join(f'<script type="application/gzip" id="{id}">{data}</script>' for id, data in packed.items()),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _packed(value: Any) -> str:
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


# ---- runs


class Subject(NamedTuple):
    """An SAE, and what is gathered about it."""

    folder: Path
    ae: Dictionary
    config: dict[str, Any]
    statistics: LatentStatistics

    @property
    def route(self) -> tuple[Place, Place]:
        """What it reads, and what it reconstructs or predicts."""
        return route_of(self.config["trainer"])

    def update(self, mask_BL: Tensor, x_by_place: Mapping[Place, Tensor], first_context: int) -> None:
        mask, x_BLD = Mask.of(self.config.get("buffer") or {}), x_by_place[self.route[0]]
        read = {place: x_by_place[place] for place in self.route}
        keep_BL, _ = position_mask(mask_BL, read, mask.bounds(*read), mask.drop_bos)
        at_a_time = max(1, ENTRIES_AT_A_TIME // (x_BLD.shape[1] * self.ae.dict_size))
        for x_bLD, keep_bL in zip(x_BLD.split(at_a_time), keep_BL.split(at_a_time), strict=True):
            f_bLF = x_bLD.new_zeros(*x_bLD.shape[:2], self.ae.dict_size, dtype=torch.float32)
            f_NF = self.ae.encode(x_bLD[keep_bL].float())
            if not f_NF.sum().isfinite():
                raise ValueError(f"the SAE in {self.folder} gives activations that are not finite")
            f_bLF[keep_bL] = f_NF
            self.statistics.update(f_bLF, keep_bL, first_context)
            first_context += len(x_bLD)

    def about(self, lm: LanguageModel, text: str) -> dict[str, Any]:
        """What the page says of the SAE itself."""
        trainer = self.config["trainer"]
        style = ARCHITECTURE_STYLES.get(trainer["trainer_class"])
        architecture = style.label if style else trainer["trainer_class"]
        setting = next((key for key in ("k", "target_l0", "l1_penalty", "sparsity_penalty") if key in trainer), None)
        name = f"{architecture}, {setting} {trainer[setting]:g}" if setting else architecture
        facts = {"Model": lm.name, "Place": words_of(*self.route), "Architecture": architecture}
        source = self.config.get("source") or {}
        facts |= {"Source": f"{source.get('path')} ({source.get('format')})"} if source else {}
        facts |= {"Folder": "/".join(self.folder.absolute().parts[-3:]), "Text": text}
        results_file = self.folder / RESULTS
        results = read_json(results_file) if results_file.is_file() else {}
        for key, label in MEASURED.items():
            if results.get(key) is not None:
                facts[label] = f"{results[key]:.4g}"
        subtitle = f"{lm.name}, {words_of(*self.route)}, {self.ae.dict_size:,} latents"
        return {"name": name, "subtitle": subtitle, "facts": list(facts.items())}


@torch.no_grad()
def gather(
    lm: LanguageModel, saes: Sequence[tuple[Path, Dictionary, dict[str, Any]]], batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[list[Subject], list[list[int]]]:
    """Run every SAE (folder, SAE, config) over the same text, with one pass of the model up to the deepest layer.

    Returns the subjects and the token ids of every context, without padding. Raises ValueError for an SAE that does
    not fit the model.
    """
    subjects = []
    for folder, ae, config in saes:
        if ae.activation_dim != (size := lm.width(route_of(config["trainer"])[0])):
            raise ValueError(f"{folder} reads activations of size {ae.activation_dim}, those of {lm.name} are {size}")
        statistics = LatentStatistics(ae.dict_size, lm.device)
        subjects.append(Subject(folder, ae.to(lm.device, torch.float32), config, statistics))
    contexts: list[list[int]] = []
    for tokens_BL, mask_BL in batches:
        x_by_place = lm.activations(tokens_BL, mask_BL, {place for subject in subjects for place in subject.route})
        for subject in subjects:
            subject.update(mask_BL, x_by_place, len(contexts))
        contexts += [row[mask].tolist() for row, mask in zip(tokens_BL, mask_BL > 0, strict=True)]
    return subjects, contexts


def write_reports(
    name: str | Path,
    *,
    save_dir: str | Path = "saes",
    model: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    dataset: str | None = None,
    split: str | None = None,
    subset: str | None = None,
    text_column: str | None = None,
    context_length: int | None = None,
    num_tokens: int = 500_000,
    device: str | None = None,
) -> list[Path]:
    """Write `report.html` for an SAE, or into every SAE folder in a folder; returns the pages.

    name: as `load_dictionary` takes it, or a folder of several SAEs. The page of what is no folder here goes into one
    below `save_dir`, as its evaluation does.
    What is not given is as in the evaluation of the SAE's run, which its run.json tells: the model and how it is
    loaded, and the text with its split, subset, column, chats and context length. Without one, the model, the context
    length and the bos are those of its config, and the text python-stdlib's held-out part for the built-in model, else
    `data.EVAL_DATASET`. Reading ends with the text, or with the batch that makes it `num_tokens`.
    trust_remote_code is never taken from a file: a run folder of somebody else's would run their code.
    Raises ValueError where there is no SAE or it cannot be run; one that cannot be loaded is warned about.
    """
    groups: dict[str, tuple[Mapping[str, Any], list[tuple[Path, Dictionary, dict[str, Any]]]]] = {}
    failures: dict[str, str] = {}
    for named in find_named(str(name), Path(save_dir)):
        try:
            ae, config = load_dictionary(named.name)
            route_of(config["trainer"])  # or it says why there is none
            settings = (recorded_settings(named.record) if named.record else {}) or said_by(config)
        except (ValueError, OSError) as error:
            failures[named.name] = str(error)
            continue
        group = groups.setdefault(json.dumps(settings, sort_keys=True), (settings, []))
        group[1].append((named.folder, ae, config))
    if not groups:
        raise ValueError(f"there is no SAE to report on in {name}: {next(iter(failures.values()))}")
    for failed, sentence in failures.items():
        warnings.warn(f"no report of {failed}: {sentence}", stacklevel=2)
    pages = []
    for run, saes in groups.values():
        lm_name = model or run.get("model_name")
        if not lm_name:
            raise ValueError(f"{saes[0][0]} does not say which model it was trained on: give --model")
        lm = load_model(
            lm_name,
            device=resolve_device(device),
            dtype=getattr(torch, dtype or run.get("dtype", "float32")),
            attn_implementation=attn_implementation or run.get("attn_implementation"),
            revision=revision or (run.get("revision") if lm_name == run.get("model_name") else None),
            trust_remote_code=trust_remote_code,
        )
        built_in = lm_name in BUILT_IN_MODELS
        default = {"eval_dataset": BUILT_IN if built_in else EVAL_DATASET, "eval_is_held_out": built_in}
        text = evaluation_text({**default, **run})
        if dataset is not None:  # of which the run's split and chats tell nothing
            text = {key: value for key, value in text.items() if key not in ("split", "subset", "mixed")}
            text |= {"dataset": dataset, "held_out": dataset == BUILT_IN or None}
        given = {"split": split, "subset": subset, "text_column": text_column, "context_length": context_length}
        text |= {key: value for key, value in given.items() if value is not None}
        lengths = [(config.get("buffer") or {}).get("ctx_len") or 128 for _, _, config in saes]
        pages += _write_pages(lm, saes, {"context_length": max(lengths), **text}, num_tokens)
    return pages


def _write_pages(
    lm: LanguageModel, saes: list[tuple[Path, Dictionary, dict[str, Any]]], text: dict[str, Any], num_tokens: int
) -> list[Path]:
    """text: what `open_batches` is told, beside the tokenizer and the size of its batches."""
    check_context(text["context_length"], lm.context_limit, lm.name)
    batch_size = max(1, TOKENS_AT_A_TIME // text["context_length"])
    marks = TextMarks(lm.bos_id, lm.separator_id, lm.pad_id)
    batches = open_batches(tokenizer=lm.tokenizer, batch_size=batch_size, marks=marks, prefetch=0, **text)
    n_batches = -(-num_tokens // (batch_size * text["context_length"]))
    with tqdm(islice(batches, n_batches), "reading", n_batches) as bar:
        subjects, contexts = gather(lm, saes, bar)
    pages = []
    what = f"held-out part of {text['dataset']}" if text["held_out"] else text["dataset"]
    for subject in tqdm(subjects, "writing"):
        about = subject.about(lm, what)
        has_effects = writes_residual(subject.route[1])
        objects = page_data(subject.statistics, subject.ae, lm, contexts, about, has_effects)
        page = render(f"{about['name']}: {about['subtitle']}", objects)
        write_atomic(subject.folder / "report.html", page.encode())
        pages.append(subject.folder / "report.html")
    return pages


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m dictionary_learning.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", help="an SAE's folder, file or USER/REPO/PATH on the Hub, or a folder that holds some")
    parser.add_argument(
        "--save_dir", default="saes", help="gets the page of what is no folder here (default: %(default)s)"
    )
    parser.add_argument("--model", help="Hub id or folder of the model (default: that of the run)")
    parser.add_argument("--revision", help="of the model on the Hub (default: the run's)")
    parser.add_argument("--dtype", help="of the model (default: the run's)", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--attn_implementation", help="of the model (default: the run's)")
    parser.add_argument("--trust_remote_code", action="store_true", help="let the model's repo bring code of its own")
    parser.add_argument("--dataset", help="Hub id, file, folder or python-stdlib (default: the run's for evaluation)")
    parser.add_argument("--split", help="of the dataset (default: the run's)")
    parser.add_argument("--subset", help="of a dataset on the Hub (default: the run's)")
    parser.add_argument("--text_column", help="column of the dataset that holds the text (default: the run's)")
    parser.add_argument("--context_length", type=int, help="tokens of a context (default: the run's or the SAE's)")
    parser.add_argument("--num_tokens", type=int, default=500_000, help="tokens to read (default: %(default)s)")
    parser.add_argument("--device", help="cuda, mps, cpu, ... (default: the first of these that is there)")
    arguments = vars(parser.parse_args(argv))
    try:
        for page in write_reports(arguments.pop("name"), **arguments):
            sys.stdout.write(f"{page}\n")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
