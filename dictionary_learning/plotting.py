"""Figures of trained SAEs, from the files in their folders: Pareto plots, training curves, density histograms.

`read_runs` reads a list of run folders, those of the reference library too, into plain records. Each `*_figure`
function turns records into a matplotlib Figure of its own: pyplot and matplotlib's global settings are never touched.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dictionary_learning.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Style:
    label: str
    marker: str
    colour: str


# One row per architecture, in the order of the legend. The colours (after Okabe and Ito) stay apart for colour-blind
# readers, the markers without any colour.
ARCHITECTURE_STYLES = {
    "StandardTrainer": Style("Standard", "o", "#8A8A8A"),
    "StandardTrainerAprilUpdate": Style("Standard (April)", "v", "#1A1A1A"),
    "PAnnealTrainer": Style("P-Anneal", "P", "#CC79A7"),
    "GatedSAETrainer": Style("Gated", "D", "#D55E00"),
    "JumpReluTrainer": Style("JumpReLU", "X", "#E69F00"),
    "TopKTrainer": Style("TopK", "s", "#009E73"),
    "BatchTopKTrainer": Style("BatchTopK", "^", "#0072B2"),
    "MatryoshkaBatchTopKTrainer": Style("Matryoshka", "h", "#56B4E9"),
}

# class of an SAE: what trains such here
COMPUTES_AS = {
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderNew": "StandardTrainerAprilUpdate",
    "GatedAutoEncoder": "GatedSAETrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
}

# key of eval_results.json: (its name, what its values mean, whether its axis is logarithmic)
PARETO_METRICS = {
    "frac_recovered": ("Loss recovered", "1 is the model itself, 0 the layer's output set to zero", False),
    "frac_variance_explained": ("Variance explained", "1 is a perfect reconstruction", False),
    "frac_alive": ("Latents alive", "share of the latents that fire at least once in the evaluation", False),
    "kl_divergence": ("KL divergence", "nats per token from the model's own predictions, lower is better", True),
}

# key of metrics.jsonl: (its name, whether its axis is logarithmic)
TRAINING_QUANTITIES = {
    "frac_variance_explained": ("Variance explained", False),
    "l0": ("L0", True),
    "dead_features": ("Dead latents", False),
    "loss": ("Loss", True),
}

WIDTH_LINES = ["-", (0, (3.5, 1.5)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2))]  # from the widest dictionary down
INK, FAINT, GRID = "#222222", "#6B6B6B", "#E6E6E6"


@dataclass(frozen=True)
class SAERecord:
    """One SAE folder: `trainer` is that part of its config.json, or what its results say of an SAE without a run (and
    its "format"), `results` the finite numbers of its eval_results.json, `said` its sentences ("error", "warning"),
    `history` the finite numbers of the lines of its metrics.jsonl; empty where a file is missing or broken."""

    folder: Path
    trainer: dict[str, Any]
    results: dict[str, float]
    said: dict[str, str]
    history: list[dict[str, float]]

    @property
    def style(self) -> Style:
        """That of its trainer; of one that is not known, the looks of what computes alike, under a name of its own."""
        name = self.trainer["trainer_class"]
        alike = ARCHITECTURE_STYLES.get(COMPUTES_AS.get(str(self.trainer.get("dict_class")), ""))
        other = Style(name, "*", "#7F3FBF") if alike is None else dataclasses.replace(alike, label=name)
        return ARCHITECTURE_STYLES.get(name, other)

    @property
    def width(self) -> int:
        return self.trainer["dict_size"]

    @property
    def panel(self) -> tuple[str, int, str]:
        """What shares one set of axes: the model, the layer and the site."""
        site = self.trainer.get("site") or "resid_post"
        site_out = self.trainer.get("site_out") or site
        words = "" if (site, site_out) == ("resid_post",) * 2 else " -> ".join(dict.fromkeys((site, site_out)))
        return str(self.trainer.get("lm_name") or "unknown model"), self.trainer["layer"], words

    @property
    def sweep(self) -> tuple:
        """What one line of a Pareto plot connects: all but the sparsity setting."""
        return self.trainer["trainer_class"], self.width, *(self.trainer.get(key) for key in ("seed", "lr", "format"))


def read_runs(run_folders: Iterable[str | Path]) -> tuple[list[SAERecord], list[str]]:
    """Every SAE in the run folders, and a sentence for each file that is missing or broken.

    An SAE whose config.json cannot be used is left out. Raises ValueError if no folder is given or one does not exist.
    """
    run_folders = [Path(folder) for folder in run_folders]
    if not run_folders:
        raise ValueError("there is no run folder to read: name at least one")
    records: list[SAERecord] = []
    problems: list[str] = []
    for run_folder in run_folders:
        if not run_folder.is_dir():
            raise ValueError(f"there is no run folder {run_folder}")
        # not `find_saes`: results are worth a picture without the weights
        folders = sorted(
            {path.parent for name in ("config.json", "eval_results.json") for path in run_folder.rglob(name)}
        )
        if not folders:
            problems.append(f"{run_folder} holds no SAE: there is no config.json and no eval_results.json in it")
        for folder in folders:
            results = _read(folder / "eval_results.json", _object, told := []) or {}
            trainer = _trainer_of_results(results) or _read(folder / "config.json", _trainer_settings, problems)
            if trainer is None:
                continue
            problems += told
            if "error" in results:
                problems.append(f"{folder} could not be evaluated: {results['error']}")
            said = {key: value for key, value in results.items() if key in ("error", "warning") and value}
            # the reference library writes no history, so a missing one is no problem
            lines, broken = [], 0
            if (folder / "metrics.jsonl").is_file():
                lines, broken = _read(folder / "metrics.jsonl", _lines, problems) or ([], 0)
            if broken:
                problems.append(
                    f"{folder / 'metrics.jsonl'} has {broken} of {len(lines) + broken} lines broken: not read"
                )
            records.append(SAERecord(folder, trainer, _numbers(results), said, [_numbers(line) for line in lines]))
    return records, problems


def plot_pareto(run_folders: Iterable[str | Path], path: str | Path) -> list[str]:
    """Draw loss recovered against L0 for all SAEs in the run folders into the file `path` (png, pdf or svg).

    Returns what could not be read, a sentence each. Raises ValueError as `read_runs` does.
    """
    records, problems = read_runs(run_folders)
    figure, path = pareto_figure(records), Path(path)
    write_atomic(path, lambda part: figure.savefig(part, format=path.suffix.removeprefix("."), dpi=200))
    return problems


def pareto_figure(records: Sequence[SAERecord], metric: str = "frac_recovered") -> "Figure":
    """`metric` (a key of `PARETO_METRICS`, or any other number of eval_results.json) against L0: a panel per layer, a
    line per architecture and width, a point per SAE. A footnote counts the SAEs that cannot be drawn."""
    name, meaning, logarithmic = PARETO_METRICS.get(metric, (metric, "", False))
    drawn = [r for r in records if r.results.get("l0", 0) > 0 and metric in r.results]
    if logarithmic:
        drawn = [r for r in drawn if r.results[metric] > 0]
    if not drawn:
        return _empty_figure(f"{name}: none of the {len(records)} SAEs has l0 and {metric} in its eval_results.json")
    missing = f"not drawn: {len(records) - len(drawn)} of {len(records)} SAEs, without {metric} or with an L0 of 0"
    notes = [meaning] * bool(meaning) + [missing] * (len(drawn) < len(records))
    figure, panels = _grid(drawn, f"{name} against sparsity", "; ".join(notes), rows=[name], height=3.3)
    widths = _widths(drawn)
    for panel, [ax] in panels.items():
        here = [record for record in drawn if record.panel == panel]
        for sweep in dict.fromkeys(record.sweep for record in here):
            line = sorted((r for r in here if r.sweep == sweep), key=lambda record: record.results["l0"])
            strokes, marks = _strokes(line[0], widths), _marks(line[0].style, filled=line[0].width == widths[0])
            ax.plot([r.results["l0"] for r in line], [r.results[metric] for r in line], **strokes, **marks)
        ax.set_xlabel("L0 (active latents per token)")
        _logarithmic(ax, "x")
        if logarithmic:
            _logarithmic(ax, "y")
    _legend(figure, drawn, widths, markers=True)
    return figure


def training_figure(records: Sequence[SAERecord], quantities: Sequence[str] = tuple(TRAINING_QUANTITIES)) -> "Figure":
    """What metrics.jsonl says of the training: a row per quantity (its keys), a column per layer, a line per SAE."""
    import numpy as np
    from matplotlib.ticker import EngFormatter

    drawn = [record for record in records if record.history]
    if not drawn:
        return _empty_figure(f"Training curves: none of the {len(records)} SAEs has a metrics.jsonl")
    note = "a line per SAE, the stronger the larger its L0"
    names, logarithmic = zip(*(TRAINING_QUANTITIES.get(key, (key, False)) for key in quantities), strict=True)
    figure, panels = _grid(drawn, "Training", note, rows=names, height=2.1)
    widths, strengths = _widths(drawn), _strengths(drawn)
    for panel, column in panels.items():
        for key, ax, is_logarithmic in zip(quantities, column, logarithmic, strict=True):
            for record in (r for r in drawn if r.panel == panel):
                # what was not recorded becomes NaN, which is a gap in the line
                tokens, values = (np.array([h.get(k) for h in record.history], dtype=float) for k in ("tokens", key))
                ax.plot(tokens, values, **_strokes(record, widths, strengths[record.folder]))
            if is_logarithmic:
                _logarithmic(ax, "y")
        column[-1].set_xlabel("Training tokens")
        column[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    _legend(figure, drawn, widths)
    return figure


def density_figure(records: Sequence[SAERecord]) -> "Figure":
    """Histograms of how often latents fire, from density.safetensors (`density` (F,) float32, the share of evaluated
    tokens on which each latent is active): a row per architecture, a column per layer, a line per SAE. Latents that
    never fire have no place on the logarithmic axis; their share is written into the panel."""
    import numpy as np

    there = [record for record in records if (record.folder / "density.safetensors").is_file()]
    if not there:
        return _empty_figure(f"Latent densities: none of the {len(records)} SAEs has a density.safetensors")
    densities = {record.folder: _density(record.folder / "density.safetensors") for record in there}
    drawn = [record for record in there if densities[record.folder] is not None]
    broken = f"not drawn: {len(there) - len(drawn)} of {len(there)} SAEs, whose density.safetensors is broken"
    if not drawn:
        return _empty_figure(f"Latent densities, {broken}")
    note = "share of the tokens on which a latent fires; a line per SAE, the stronger the larger its L0"
    note += f"; {broken}" * (len(drawn) < len(there))
    labels = [style.label for style in _styles(drawn)]
    figure, panels = _grid(drawn, "Density of the latents", note, rows=labels, height=1.1)
    widths, strengths = _widths(drawn), _strengths(drawn)
    edges = np.linspace(-7, 0, 57)
    for panel, column in panels.items():
        for label, ax in zip(labels, column, strict=True):
            silent = []
            for record in (r for r in drawn if r.panel == panel and r.style.label == label):
                density_F = densities[record.folder]
                counts, _ = np.histogram(np.log10(density_F[density_F > 0]), bins=edges)
                strokes = _strokes(record, widths, strengths[record.folder])
                ax.plot((edges[1:] + edges[:-1]) / 2, counts / density_F.size, **strokes)
                silent.append(float((density_F == 0).mean()))
            if silent:
                shares = " to ".join(dict.fromkeys(f"{share:.0%}" for share in (min(silent), max(silent))))
                ax.text(0.02, 0.9, f"{shares} never fire", transform=ax.transAxes, color=FAINT, size=8, va="top")
            ax.set_ylim(bottom=0)
            ax.set_yticks([])
            ax.yaxis.label.set(rotation=0, ha="right", va="center")
        column[-1].set_xlabel("Density")
        column[-1].xaxis.set_major_formatter(lambda power, _: f"$10^{{{power:.0f}}}$")
    _legend(figure, drawn, widths)
    return figure


# ---- reading


def _read(path: Path, parse: Callable[[str], Any], problems: list[str]) -> Any:
    """The parsed file, or None and a sentence more in `problems`."""
    try:
        return parse(path.read_text())
    except FileNotFoundError:
        problems.append(f"{path} is missing")
    except (OSError, ValueError, TypeError, KeyError) as error:
        problems.append(f"{path} cannot be used: {type(error).__name__}: {error}")
    return None


def _trainer_settings(text: str) -> dict[str, Any]:
    trainer = json.loads(text)["trainer"]
    needed = {"trainer_class": str, "dict_size": int, "layer": int}
    if unsaid := [key for key in needed if trainer.get(key) is None]:
        raise ValueError(f"its trainer does not say its {' and '.join(unsaid)}")
    return trainer | {key: kind(trainer[key]) for key, kind in needed.items()}


def _trainer_of_results(results: dict[str, Any]) -> dict[str, Any] | None:
    """What the results of an SAE without a run say of it; None where they say nothing."""
    try:
        sae = results["hyperparameters"]["sae"]
        return _trainer_settings(json.dumps(sae)) | {"format": (sae.get("source") or {}).get("format")}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _object(text: str) -> dict[str, Any]:
    return dict(json.loads(text))


def _lines(text: str) -> tuple[list[dict[str, Any]], int]:
    """(the lines that are whole, how many are not): a kill cuts the last one."""
    lines: list[dict[str, Any]] = []
    broken = 0
    for line in text.splitlines():
        try:
            lines.append(_object(line))
        except (ValueError, TypeError):
            broken += 1
    return lines, broken


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in values.items() if _is_number(value)}


def _density(path: Path) -> Any:
    """density_F, an array, or None where the file is broken."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        density_F = load_file(path)["density"]
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    return density_F if density_F.ndim == 1 and density_F.size else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# ---- drawing


def _grid(
    records: Sequence[SAERecord], title: str, note: str, rows: Sequence[str], height: float
) -> "tuple[Figure, dict[tuple[str, int, str], list[Axes]]]":
    """A figure and, for each panel, its column of axes, one for each name in `rows`. A single row wraps after four."""
    from matplotlib.figure import Figure

    panels = sorted({record.panel for record in records})
    wraps = len(rows) == 1
    across = min(4, len(panels)) if wraps else len(panels)
    down = math.ceil(len(panels) / across) * len(rows)
    size = max(6.5, 2.2 + 3.5 * across), 0.9 + height * down
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplots(down, across, sharex=True, sharey=True if wraps else "row", squeeze=False)
    columns = [[ax] for ax in axes.flat] if wraps else [list(column) for column in axes.T]
    for [unused] in columns[len(panels) :]:
        unused.remove()
    for ax, name in zip(axes[:, 0], itertools.cycle(rows)):
        ax.set_ylabel(name, color=INK)
    figure.suptitle(title, x=0.012, ha="left", size=13, weight="bold", color=INK)
    figure.supxlabel(note, x=0.012, ha="left", size=8.5, color=FAINT)
    for (model, layer, site), column in zip(panels, columns, strict=False):
        where = f"{site} of layer {layer}" if site else f"layer {layer}"
        column[0].set_title(f"{model.split('/')[-1]}, {where}", size=10.5, color=INK)
        for ax in column:
            ax.grid(True, color=GRID, linewidth=0.8)
            ax.set_axisbelow(True)
            ax.spines[["top", "right"]].set_visible(False)
            ax.spines[["left", "bottom"]].set_color(FAINT)
            ax.tick_params(which="both", color=FAINT, labelcolor=INK, labelsize=9)
        column[-1].tick_params(labelbottom=True)
    return figure, dict(zip(panels, columns, strict=False))


def _empty_figure(sentence: str) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.5), layout="constrained", facecolor="white")
    figure.suptitle(sentence, x=0.012, ha="left", size=11, color=FAINT)
    return figure


def _styles(records: Iterable[SAERecord]) -> list[Style]:
    """The styles in use, in the order of the table, unknown architectures last."""
    known = list(ARCHITECTURE_STYLES.values())
    used = {record.style for record in records}
    return sorted(used, key=lambda style: (known.index(style) if style in known else len(known), style.label))


def _widths(records: Iterable[SAERecord]) -> list[int]:
    return sorted({record.width for record in records}, reverse=True)


def _dashes(width: int, widths: list[int]) -> Any:
    return WIDTH_LINES[widths.index(width) % len(WIDTH_LINES)]


def _strokes(record: SAERecord, widths: list[int], alpha: float = 1.0) -> dict[str, Any]:
    dashes = _dashes(record.width, widths)
    return {"color": record.style.colour, "linestyle": dashes, "linewidth": 1.5, "alpha": alpha}


def _marks(style: Style, filled: bool) -> dict[str, Any]:
    """Markers of the widest dictionary are filled and rimmed in white, so that they stay apart where they overlap."""
    face, rim = (style.colour, "white") if filled else ("white", style.colour)
    size = 8.5 if filled else 7
    return {"marker": style.marker, "markersize": size, "markerfacecolor": face, "markeredgecolor": rim}


def _strengths(records: Sequence[SAERecord]) -> dict[Path, float]:
    """For every SAE the opacity of its line: its rank by L0 among those of its panel and sweep."""
    strengths: dict[Path, float] = {}
    for key in {(record.panel, record.sweep) for record in records}:
        alike = [record for record in records if (record.panel, record.sweep) == key]
        alike.sort(key=lambda record: record.results.get("l0", 0))
        strengths |= {record.folder: 0.35 + 0.65 * (i + 1) / len(alike) for i, record in enumerate(alike)}
    return strengths


def _logarithmic(ax: "Axes", which: str) -> None:
    """A log axis whose labels are plain numbers at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis, set_scale = (ax.xaxis, ax.set_xscale) if which == "x" else (ax.yaxis, ax.set_yscale)
    set_scale("log", nonpositive="mask")
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: "Figure", records: Sequence[SAERecord], widths: list[int], markers: bool = False) -> None:
    from matplotlib.lines import Line2D

    def heading(text: str) -> Line2D:
        return Line2D([], [], linestyle="none", label=text)

    handles = [heading("Architecture")]
    for style in _styles(records):
        marks = _marks(style, filled=True) if markers else {}
        handles.append(Line2D([], [], color=style.colour, linewidth=1.5, label=style.label, **marks))
    handles.append(heading("\nLatents"))
    for width in widths:
        marks = _marks(Style("", "o", FAINT), filled=width == widths[0]) if markers else {}
        handles.append(Line2D([], [], color=FAINT, linestyle=_dashes(width, widths), label=f"{width:,}", **marks))
    place = {"loc": "outside right center", "handlelength": 2.6, "frameon": False}
    legend = figure.legend(handles=handles, fontsize=9.5, labelcolor=INK, **place)
    for text in legend.get_texts():
        if text.get_text().strip() in ("Architecture", "Latents"):
            text.set_fontweight("bold")
