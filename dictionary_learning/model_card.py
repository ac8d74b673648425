"""The README.md of a repo of SAEs: what they are, how good they measured, how to use them.

A card has a section for each run in the repo, between marks. An upload writes the section of its own run and leaves
everything else as it is, so that cards can be edited and runs added.

L tokens of the text, D activation_dim, F dict_size.
"""

import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .files import read_json
from .plotting import SAERecord, read_runs

CARD_MARK = "<!-- dictionary_learning: an upload renews the section of its run; the rest of this file is yours -->"
METADATA = {
    "license": "mit",
    "library_name": "saelens",
    "tags": ["sparse-autoencoder", "sae", "mechanistic-interpretability"],
}

COLUMNS = {  # key of eval_results.json: heading of the table and format
    "l0": ("L0", ".1f"),
    "frac_recovered": ("loss recovered", ".3f"),
    "frac_variance_explained": ("variance explained", ".3f"),
    "kl_divergence": ("KL", ".3f"),
    "frac_alive": ("alive", ".0%"),
}
EXPLANATION = (
    "Measured on held-out text. L0: active latents a token. Loss recovered: 1 is the model's own loss, 0 the loss with "
    "the layer's output set to zero. Variance explained: 1 - sum ‖x - x̂‖² / sum ‖x - mean x‖². KL: nats a token from "
    "the model's own predictions. Alive: latents that fired at least once."
)
SPARSITY_SETTINGS = ("k", "target_l0", "l1_penalty", "sparsity_penalty")

# How an `architecture` of cfg.json turns x_LD into features_LF; {x} stands for x or x - b_dec.
ENCODERS = {
    "standard": 'features = torch.relu({x} @ sae["W_enc"] + sae["b_enc"])',
    "jumprelu": 'pre = {x} @ sae["W_enc"] + sae["b_enc"]\nfeatures = torch.relu(pre) * (pre > sae["threshold"])',
    "topk": (
        'top = torch.relu({x} @ sae["W_enc"] + sae["b_enc"]).topk({k})\n'
        'features = torch.zeros(len(x), len(sae["W_dec"])).scatter(1, top.indices, top.values)'
    ),
    "gated": (
        'pre = {x} @ sae["W_enc"]\n'
        'features = (pre + sae["b_gate"] > 0) * torch.relu(pre * sae["r_mag"].exp() + sae["b_mag"])'
    ),
}


def model_card(run_folder: str | Path, repo_id: str, present: str = "", at_root: bool = True) -> str | None:
    """The text of README.md with this run's section renewed or added; None where `present` is somebody's own.

    present: the README.md that is there. Metadata alone, as the Hub makes it for a new repo, counts as none, and stays.
    at_root: whether the file will lie at the root of the repo, beside the run folder, or in the run folder.
    """
    from huggingface_hub import metadata_load, metadata_save

    run_folder = Path(run_folder)
    body = re.sub(r"\A\s*---\s*\n.*?^---\s*$", "", present, count=1, flags=re.DOTALL | re.MULTILINE)
    if body.strip() and CARD_MARK not in body:
        return None
    records = read_runs([run_folder])[0]
    run = read_json(run_folder / "run.json") if (run_folder / "run.json").is_file() else {}
    settings = run.get("settings", {})
    lm_names = [record.trainer.get("lm_name") for record in records]
    model = str(next(filter(None, [settings.get("model_name"), *lm_names]), "a language model"))

    picture = f"{quote(run_folder.name)}/pareto.png" if at_root else "pareto.png"
    start, end = f"<!-- run {run_folder.name} -->", f"<!-- end of run {run_folder.name} -->"
    section = f"{start}\n{_section(run_folder, repo_id, model, run, records, picture)}\n{end}"
    text = present if body.strip() else f"{present.rstrip()}\n{CARD_MARK}\n\n{_introduction(model)}\n"
    if start in text and end in text:
        text = text.partition(start)[0] + section + text.partition(end)[2]
    else:
        text = f"{text.rstrip()}\n\n{section}\n"

    with tempfile.TemporaryDirectory() as folder:  # the Hub's own reader and writer of metadata work on files
        path = Path(folder) / "README.md"
        path.write_text(text.lstrip(), encoding="utf-8", newline="\n")
        metadata = METADATA | (metadata_load(path) or {})
        for key, name in (("base_model", model), ("datasets", settings.get("dataset"))):
            names = metadata.get(key) or []
            names = [names] if isinstance(names, str) else names
            if _is_hub_id(name) and name not in names:
                metadata[key] = [*names, name]
        metadata_save(path, metadata)
        return path.read_text(encoding="utf-8")


def _is_hub_id(name: Any) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def _link(name: str, kind: str = "") -> str:
    return f"[{name}](https://huggingface.co/{kind}{name})" if _is_hub_id(name) else f"`{name}`"


def _introduction(model: str) -> str:
    return f"""# Sparse autoencoders for {model.rstrip("/").rpartition("/")[2]}

A sparse autoencoder (SAE) writes an activation vector of {_link(model)} as a sum of a few out of thousands of
directions. These are its *latents*, and many of them stand for something that a person can name, as single coordinates
of the model rarely do. Every folder of this repo that is named in a table below holds one SAE, in two formats: `ae.pt`
and `config.json` for [dictionary_learning](https://github.com/saprmarks/dictionary_learning) and SAE Bench,
`sae_weights.safetensors` and `cfg.json` for [SAELens](https://github.com/decoderesearch/SAELens). All read and write
raw activations: nothing has to be normalised."""


def _section(
    run_folder: Path, repo_id: str, model: str, run: dict[str, Any], records: list[SAERecord], picture: str
) -> str:
    example = _recommended(records)
    parts = [f"## {run_folder.name}", *_tables(run_folder, records), EXPLANATION]
    if example is not None and 0 < example.results.get("l0", 0) <= 100:
        parts.append(
            f"**In doubt, take {_name(run_folder, example)}**: it recovers the most loss of those with at most 100 "
            "active latents a token."
        )
    if (run_folder / "pareto.png").is_file():
        parts.append(f"![Loss recovered against L0]({picture})")
    parts += ["### Known limits", _bullets(_limits(run_folder, run, records))]
    if example is not None:
        path = f"{run_folder.name}/{example.folder.relative_to(run_folder).as_posix()}"
        parts += ["### Use with plain transformers", _python(_transformers_snippet(example, repo_id, path, model))]
        parts += ["### Use with SAELens", _python(_saelens_snippet(example, repo_id, path))]
    parts += ["### Tensors", _tensors(records), "### Training", _bullets(_training(run, records))]
    return "\n\n".join(parts)


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _python(code: str) -> str:
    return f"```python\n{code}\n```"


def _name(run_folder: Path, record: SAERecord) -> str:
    return f"`{record.folder.relative_to(run_folder).as_posix()}`"


def settings_that_vary(records: Sequence[SAERecord]) -> dict[str, str]:
    """Of the settings without a column of their own, those in which the SAEs differ: {key of config.json: heading}."""
    headings = {"seed": "seed", "lr": "learning rate"}
    return {key: heading for key, heading in headings.items() if len({r.trainer.get(key) for r in records}) > 1}


def _tables(run_folder: Path, records: list[SAERecord]) -> list[str]:
    """Settings and measurements, a table for each layer's folder."""
    varying = settings_that_vary(records)
    headings = ["SAE", "architecture", "width", "setting", *varying.values()]
    headings += [heading for heading, _ in COLUMNS.values()]
    tables: dict[Path, list[list[str]]] = {}
    for record in records:
        setting = next((f"{key} {record.trainer[key]:g}" for key in SPARSITY_SETTINGS if record.trainer.get(key)), "")
        numbers = [
            format(record.results[key], form) if key in record.results else "–" for key, (_, form) in COLUMNS.items()
        ]
        own = [f"{record.trainer[key]:g}" if record.trainer.get(key) is not None else "–" for key in varying]
        row = [f"`{record.folder.name}`", record.style.label, f"{record.width:,}", setting, *own, *numbers]
        tables.setdefault(record.folder.parent, []).append(row)
    ruler = ["---"] * 2 + ["---:"] * (len(headings) - 2)
    return [
        f"`{parent.relative_to(run_folder.parent).as_posix()}`\n\n"
        + "\n".join(f"| {' | '.join(cells)} |" for cells in [headings, ruler, *rows])
        for parent, rows in tables.items()
    ]


def _recommended(records: list[SAERecord]) -> SAERecord | None:
    """The SAE of the snippets: of those measured at an L0 of at most 100, the one that recovers the most loss."""
    usable = [record for record in records if (record.folder / "cfg.json").is_file()]
    measured = [record for record in usable if {"l0", "frac_recovered"} <= record.results.keys()]
    sparse = [record for record in measured if 0 < record.results["l0"] <= 100]
    if sparse:
        return max(sparse, key=lambda record: record.results["frac_recovered"])
    return min(measured, key=lambda record: record.results["l0"]) if measured else next(iter(usable), None)


def _limits(run_folder: Path, run: dict[str, Any], records: list[SAERecord]) -> list[str]:
    """What was measured against these SAEs, and what was not measured."""
    limits = []
    for record in records:
        name, l0, alive = _name(run_folder, record), record.results.get("l0"), record.results.get("frac_alive")
        said = [record.trainer.get("failure"), *record.said.values()]
        limits += [f"{name}: {sentence}" for sentence in said if sentence]
        if ended := record.trainer.get("ended_early"):
            of_all = f", {ended['step']:,} of {ended['steps']:,} steps" if "steps" in ended else ""
            limits.append(f"{name} was trained on {ended['tokens']:,} tokens{of_all}: the text ended.")
        asked = record.trainer.get("k") or record.trainer.get("target_l0")
        if l0 is None:
            limits.append(f"{name} has no measurements.")
        elif asked and not 0.75 < l0 / asked < 1.25:
            limits.append(f"{name} has an L0 of {l0:.3g} where {asked:g} was asked for.")
        if alive is not None and alive < 0.5:
            limits.append(f"{1 - alive:.0%} of the latents of {name} did not fire in the evaluation.")
    n_tokens = max((record.results.get("n_tokens", 0) for record in records), default=0)
    if n_tokens:
        limits.append(f"Measured on {n_tokens:,.0f} tokens: a latent that did not fire there is dead or merely rare.")
    if any("k" in record.trainer for record in records):
        limits.append(
            "TopK, BatchTopK and Matryoshka are meant to be used with the threshold that they recorded in training, so "
            "the number of active latents is k only on average (SAELens runs TopK with exactly k)."
        )
    if run.get("settings", {}).get("mask"):
        limits.append(
            "The first position of every context and positions of outlying norm were left out of training and "
            "measurement; what the SAEs say there means nothing."
        )
    return limits + [
        "What a latent stands for has to be read from the texts on which it fires; no labels come with it.",
        "The licence is that of the SAEs. The model and the text that they were trained on have their own.",
    ]


def _transformers_snippet(record: SAERecord, repo_id: str, path: str, model: str) -> str:
    cfg = read_json(record.folder / "cfg.json")
    x = '(x - sae["b_dec"])' if cfg.get("apply_b_dec_to_input", True) else "x"
    architecture = re.sub("_?(skip_)?transcoder$", "", cfg["architecture"]) or "standard"
    encode = ENCODERS[architecture].format(x=x, k=cfg.get("k"))
    skip = ' + x @ sae["W_skip"].T' if "skip" in cfg["architecture"] else ""
    built_in = model == "tiny-python"  # comes with the package, and is not on the Hub
    name = 'files("dictionary_learning") / "assets/tiny-python"' if built_in else json.dumps(model)
    code = f"""import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{path}"
sae = load_file(hf_hub_download("{repo_id}", f"{{folder}}/sae_weights.safetensors"))
name = {name}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)

{_hook(record, cfg)}
start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
tokens = tokenizer("def area(width, height):", add_special_tokens=False).input_ids
with torch.no_grad():
    model(torch.tensor([[start, *tokens]]))
x = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
x = x.reshape(-1, x.shape[-1])[1:]  # (tokens, {record.trainer["activation_dim"]}), without the start token

{encode}  # (tokens, {record.width})
reconstruction = features @ sae["W_dec"] + sae["b_dec"]{skip}
for token, row in zip(tokens, features):
    strongest = row.topk(3)
    print(repr(tokenizer.decode([token])), strongest.indices.tolist(), strongest.values.tolist())"""
    return f"from importlib.resources import files\n\n{code}" if built_in else code


def _hook(record: SAERecord, cfg: dict[str, Any]) -> str:
    """The lines that collect what the SAE reads."""
    layer, name, site = record.trainer["layer"], cfg["metadata"].get("hf_hook_name"), record.trainer.get("site")
    out = cfg["metadata"].get("hf_hook_name_out")
    if site in (None, "resid_post") or not name:
        return f"""# x: the residual stream after block {layer}
outputs = []
blocks = next(m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList))
blocks[{layer}].register_forward_hook(lambda block, inputs, output: outputs.append(output))"""
    end = f", from which {record.trainer['site_out']} is predicted ({out})" if out else ""
    module = name.removesuffix(".input")
    kind, seen = ("", "output") if module == name else ("_pre", "inputs[0]")
    arguments = "module, inputs" if kind else "module, inputs, output"
    return f"""# x: {site} of layer {layer}{end}
outputs = []
module = model.get_submodule("{module}")
module.register_forward{kind}_hook(lambda {arguments}: outputs.append({seen}) and None)"""


def _saelens_snippet(record: SAERecord, repo_id: str, path: str) -> str:
    return f"""import torch
from sae_lens import SAE

folder = "{path}"
sae = SAE.from_pretrained("{repo_id}", folder)
x = torch.randn(4, {record.trainer["activation_dim"]})  # in place of activations
features = sae.encode(x)  # (4, {record.width})
reconstruction = {"sae(x)  # with the skip" if record.trainer.get("skip") else "sae.decode(features)"}"""


def _tensors(records: list[SAERecord]) -> str:
    """Names and shapes in both files, a row an architecture."""
    import torch
    from safetensors import safe_open

    def cell(shapes: Mapping[str, Sequence[int]], sizes: dict[int, str]) -> str:
        named = {name: ", ".join(sizes.get(size, str(size)) for size in shape) for name, shape in shapes.items()}
        return "<br>".join(f"`{name}` ({shape})" for name, shape in named.items())

    rows = ["| architecture | `ae.pt` | `sae_weights.safetensors` |", "| --- | --- | --- |"]
    for label, record in {record.style.label: record for record in records}.items():
        sizes = {record.trainer["activation_dim"]: "D", record.width: "F"}
        ours, theirs = {}, {}
        if (record.folder / "ae.pt").is_file():
            state = torch.load(record.folder / "ae.pt", map_location="meta", mmap=True, weights_only=True)
            ours = {name: value.shape for name, value in state.items() if isinstance(value, torch.Tensor)}
        if (record.folder / "sae_weights.safetensors").is_file():
            with safe_open(record.folder / "sae_weights.safetensors", framework="pt") as file:
                theirs = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
        rows.append(f"| {label} | {cell(ours, sizes)} | {cell(theirs, sizes)} |")
    return "\n".join(rows) + "\n\nD: coordinates of the residual stream. F: latents. (): a single number."


def _skipped(run: dict[str, Any]) -> str:
    """How many rows of the training text were left out, and why."""
    skipped = run.get("skipped") or {}
    if not skipped:
        return ""
    why = ", ".join(f"{n:,} {reason}" for reason, n in skipped.items())
    return f"{sum(skipped.values()):,}" + (f" of {run['rows']:,}" if run.get("rows") else "") + f" ({why})"


def _training(run: dict[str, Any], records: list[SAERecord]) -> list[str]:
    settings = run.get("settings", {})

    def spread(key: str) -> str:
        values = {record.trainer[key] for record in records if record.trainer.get(key) is not None}
        return ", ".join(f"{value:,g}" for value in sorted(values))  # several: the tables tell whose is which

    command = re.sub(r"^\S*/", "", run.get("command", ""))  # where the program lies is nobody's concern
    facts = {
        "Model": _link(settings["model_name"]) if "model_name" in settings else "",
        "Text": _link(settings["dataset"], "datasets/") if "dataset" in settings else "",
        "Text of the evaluation": _link(settings["eval_dataset"], "datasets/") if "eval_dataset" in settings else "",
        "Started from": f"the SAEs of `{settings['init_from']}`" if settings.get("init_from") else "",
        "Tokens": f"{run['tokens']:,}" if "tokens" in run else "",
        "Rows of the text that were skipped": _skipped(run),
        "Context length": settings.get("context_length", ""),
        "Steps": spread("steps"),
        "Batch size": settings.get("sae_batch_size", ""),
        "Learning rate": spread("lr"),
        "Seed": spread("seed"),
        "Precision": f"model in {settings['dtype']}, SAEs in {settings.get('autocast')}" if "dtype" in settings else "",
        "Command": f"`python {command}`" if command else "",
        "Versions": ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items()),
    }
    known = [f"{name}: {value}" for name, value in facts.items() if value != ""]
    return [*known, "Every setting: `run.json`, and `config.json` of each SAE"]
