"""What SAEs measure: the settings under which each is evaluated, where its numbers are written, and the table of all.

An SAE of a run is evaluated as its run.json says, any other as its config says, unless the user says otherwise.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file

from .buffer import Mask
from .dictionary import Dictionary
from .evaluation import evaluate_saes
from .files import read_json, write_atomic, write_json
from .formats import WEIGHTS, find_saes, load_dictionary
from .model import LanguageModel, check_context, same_model
from .reading import Reading, recorded_settings, run_record
from .sites import RESID_POST, Place, route_of, tap_of
from .sweep import EVALUATION_SETTINGS, Architecture
from .world import World

RESULTS = "eval_results.json"
L0_GAP = 0.25  # between measured and stated L0, above which something is probably wrong


class Named(NamedTuple):
    """An SAE to be evaluated."""

    name: str  # what `load_dictionary` takes
    folder: Path  # that gets its results
    record: Path | None  # the run.json of its run


def find_named(name: str, save_dir: Path) -> list[Named]:
    """The SAEs that a folder, a file or a name on the Hub stands for; ValueError for a folder without any.

    The results of one that is no local folder go below `save_dir`, by its whole path: no two SAEs share a folder.
    """

    def one(path: Path, name: str) -> Named:
        elsewhere = save_dir / "evaluated" / (str(path.resolve()) if path.exists() else name).strip("/")
        record = run_record(path) if path.exists() else None
        return Named(name, path if path.is_dir() else elsewhere, record)

    path = Path(name)
    if path.is_file() and path.name in WEIGHTS:
        path = path.parent
    if not path.is_dir():
        return [one(path, name)]
    found = find_saes(path)
    if not found:
        raise ValueError(f"there is no SAE in {name}.")
    return [one(path, str(path)) for path in found]


@dataclass
class Subject:
    """A loaded SAE, with what it is evaluated on."""

    named: Named
    recorded: Mapping[str, Any]  # the settings of its run; empty where it has none
    ae: Dictionary
    config: dict[str, Any]
    reading: Reading

    @property
    def route(self) -> tuple[Place, Place]:
        """What it reads and what it reconstructs."""
        return route_of(self.config["trainer"])

    @cached_property
    def mask(self) -> Mask:
        """The positions at which it is scored: those of its training, or all of them."""
        return Mask.of(self.config.get("buffer") or {}) if self.reading.sweep.mask else Mask(drop_bos=False)

    def results_file(self) -> tuple[Path, list[str]]:
        """Where its results go, and how the settings differ from those of the results that stand beside.

        `eval_results.json` holds the results under the run's own settings, or the first ones of an SAE without a run.
        """
        path, now = self.named.folder / RESULTS, self.reading.evaluation_settings()
        before = {name: value for name, value in self.recorded.items() if name in EVALUATION_SETTINGS}
        if not before and path.is_file():
            before = read_json(path).get("hyperparameters", {}).get("settings", {})
        differing = {name: (before[name], now[name]) for name in before if before[name] != now[name]}
        if not differing:
            return path, []
        digest = hashlib.sha256(json.dumps(now, sort_keys=True).encode()).hexdigest()[:8]
        return path.with_name(f"eval_results_{digest}.json"), [
            f"{name} {was} -> {value}" for name, (was, value) in differing.items()
        ]


@dataclass
class Measured:
    """The results of one SAE, as the table shows them."""

    name: str
    trainer: dict[str, Any]
    stated: dict[str, float]
    settings: dict[str, Any]
    results: dict[str, Any]
    path: Path  # of the file that has them
    notes: list[str] = field(default_factory=list)  # for the user, beside errors and warnings


def evaluate(
    saes: Sequence[Named],
    reading_of: Callable[[Mapping[str, Any]], Reading],
    architectures: Mapping[str, Architecture],
    world: World,
) -> dict[str, Measured]:
    """Evaluate SAEs, write what comes out into their folders and print one table; returns what was measured by name.

    reading_of: from what the run or the config of an SAE says to what it is evaluated on. SAEs for which that is the
        same are evaluated together.
    Every rank takes a share of the SAEs. What stops one is told, and stops no other; ValueError where none is left.
    """
    by_folder = {named.folder.resolve(): named for named in reversed(saes)}  # one that was named twice counts once
    saes = list(reversed(by_folder.values()))
    share = saes[len(saes) * world.rank // world.size : len(saes) * (world.rank + 1) // world.size]
    groups: dict[str, list[Subject]] = {}
    failures: dict[str, str] = {}
    for named in share:
        try:
            subject = load(named, reading_of)
            kind = [subject.reading.evaluation_settings(), subject.reading.held_out]
            groups.setdefault(json.dumps(kind), []).append(subject)
        except (ValueError, OSError) as error:
            failures[named.name] = str(error)
    measured: list[Measured] = []
    lm, opened = None, ""
    for subjects in sorted(groups.values(), key=lambda subjects: _model_of(subjects[0].reading)):
        reading = subjects[0].reading
        try:
            if lm is None or opened != _model_of(reading):
                lm, opened = reading.open_model(), _model_of(reading)
            measured += measure(lm, subjects)
        except (ValueError, OSError) as error:
            failures |= {subject.named.name: str(error) for subject in subjects}
    for name, sentence in failures.items():
        print(f"not evaluated: {name}: {sentence}", file=sys.stderr)
    shares = world.gather((measured, failures))
    measured = [one for part, _ in shares for one in part]
    if not measured:
        reasons = list(dict.fromkeys(sentence for _, told in shares for sentence in told.values()))
        raise ValueError(f"no SAE could be evaluated: {reasons[0] if reasons else 'there is none'}")
    if world.rank == 0:
        print("\n".join(table(measured, architectures)))
        for one in measured:
            said = [f"{kind}: {one.results[kind]}" for kind in ("error", "warning") if kind in one.results]
            for sentence in [*said, *one.notes]:
                print(f"{one.name}: {sentence}", file=sys.stderr)
    return {one.name: one for one in measured}


def _model_of(reading: Reading) -> str:
    sweep, options = reading.sweep, reading.options
    return json.dumps([options.model_name, options.revision, sweep.dtype, sweep.attn_implementation])


def load(named: Named, reading_of: Callable[[Mapping[str, Any]], Reading]) -> Subject:
    """The SAE with what it is evaluated on; ValueError where it cannot be."""
    ae, config = load_dictionary(named.name)
    recorded = recorded_settings(named.record) if named.record else {}
    reading = reading_of(recorded or said_by(config))
    route_of(config["trainer"])  # or it says why there is none
    subject = Subject(named, recorded, ae, config, reading)
    _ = subject.mask  # a config that says what it cannot be stops no other
    check_model(config["trainer"], reading)
    return subject


def said_by(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config of an SAE says of the settings that it was trained in, by the names of our own.

    A value of another type than such a setting has says nothing.
    """
    trainer, buffer, source = (config.get(part) or {} for part in ("trainer", "buffer", "source"))
    lm_name = trainer.get("lm_name") or None
    said = {
        "model_name": lm_name,
        "revision": trainer.get("lm_revision") if lm_name else None,
        "context_length": buffer.get("ctx_len"),
        "mask": buffer.get("mask"),
        "prepend_bos": source.get("prepend_bos"),
        "exclude_special_tokens": source.get("exclude_special_tokens"),
    }
    if not (isinstance(ctx_len := said["context_length"], int) and ctx_len > 1):
        del said["context_length"]
    kinds: dict[str, Any] = {"context_length": int, "mask": bool, "prepend_bos": bool}
    kinds["exclude_special_tokens"] = bool | list
    return {name: value for name, value in said.items() if isinstance(value, kinds.get(name, str))}


def check_model(trainer: Mapping[str, Any], reading: Reading) -> None:
    """ValueError where the SAE was trained on another language model, as far as one can know, and it is not allowed."""
    options, trained_on = reading.options, trainer.get("lm_name")
    if options.any_model:
        return
    if not trained_on:
        raise ValueError("it does not say which language model it was trained on: give --model_name and --any_model.")
    identity = trainer.get("lm_identity")
    if identity is None:
        same = options.model_name == trained_on or _same_path(options.model_name, trained_on)
    else:
        same = same_model(identity, reading.identity)
    if not same:
        revision = f" --revision {identity['commit']}" if identity and "commit" in identity else ""
        raise ValueError(
            f"it was trained on {trained_on}, which {options.model_name} is not known to be: give --model_name "
            f"{trained_on}{revision}, or --any_model to evaluate it on another model."
        )


def _same_path(one: str, other: str) -> bool:
    return Path(one).exists() and Path(other).exists() and Path(one).samefile(other)


def measure(lm: LanguageModel, subjects: Sequence[Subject]) -> list[Measured]:
    """Evaluate SAEs on the one text of their reading, and write the results into their folders."""
    reading = subjects[0].reading
    sweep, settings = reading.sweep, reading.evaluation_settings()
    evaluations = evaluate_saes(
        lm,
        [(subject.named.name, subject.ae, subject.route) for subject in subjects],
        evaluation_batches(reading, lm),
        masks={subject.named.name: subject.mask for subject in subjects},
        hyperparameters={"dataset": sweep.eval_dataset, "held_out": reading.held_out, "settings": settings},
        show_progress=reading.world.rank == 0,
    )
    measured = []
    for subject in subjects:
        evaluation = evaluations[subject.named.name]
        path, differing = subject.results_file()
        one = Measured(
            subject.named.name,
            subject.config["trainer"],
            (subject.config.get("source") or {}).get("stated", {}),
            settings,
            evaluation.results,
            path,
        )
        if differing:
            one.notes.append(f"other settings than those of {RESULTS} ({'; '.join(differing)}): see {path}")
        one.notes += far_from_stated(one)
        if not subject.recorded:  # then no run.json, and maybe no config.json, tells which SAE this is
            sae = {"trainer": subject.config["trainer"], "source": subject.config.get("source")}
            evaluation.results["hyperparameters"] = {**evaluation.results["hyperparameters"], "sae": sae}
        write_json(path, evaluation.results)
        if evaluation.density_F is not None and path.name == RESULTS:
            density = {"density": evaluation.density_F.float().contiguous()}
            write_atomic(path.with_name("density.safetensors"), lambda tmp, density=density: save_file(density, tmp))
        measured.append(one)
    return measured


def evaluation_batches(reading: Reading, lm: LanguageModel) -> list[Any]:
    """The first contexts of the evaluation text, as many as are asked for."""
    check_context(reading.sweep.context_length, lm.context_limit, lm.name)
    text, n_left, batches = reading.open_text(lm.tokenizer, evaluation=True), reading.sweep.eval_num_inputs, []
    for batch in text:
        batches.append(tuple(tensor[:n_left] for tensor in batch))
        n_left -= len(batches[-1][0])
        if n_left <= 0:
            break
    text.close()
    if not batches:
        raise ValueError(f"{reading.sweep.eval_dataset} has no text for evaluation: give another --eval_dataset.")
    return batches


def far_from_stated(one: Measured) -> list[str]:
    """A sentence where the L0 is far from what the SAE's publisher states."""
    stated, l0 = one.stated.get("l0"), one.results.get("l0")
    if not stated or l0 is None or abs(l0 / stated - 1) <= L0_GAP:
        return []
    return [
        f"its L0 is {l0:.4g} here and {stated:.4g} as published: look at the bos (--prepend_bos), the scale and dtype "
        "of the activations, and the layer"
    ]


COLUMNS = {  # key of the results: heading
    "l0": "L0",
    "frac_recovered": "loss recovered",
    "frac_variance_explained": "variance explained",
    "frac_alive": "alive",
}


def table(measured: Sequence[Measured], architectures: Mapping[str, Architecture]) -> list[str]:
    """The lines of the table. What is the same for all SAEs and goes without saying has no column."""
    names = {row.trainer: name for name, row in architectures.items()}
    rows: list[dict[str, str]] = []
    for one in measured:
        trainer, sites = one.trainer, [tap_of(place).site for place in route_of(one.trainer)]
        architecture = str(names.get(str(trainer.get("trainer_class")), trainer.get("trainer_class")))
        varies = architectures[architecture].varies if architecture in architectures else "k"
        rows.append(
            {
                "SAE": one.name,
                "layer": str(trainer["layer"]),
                "site": "" if sites == [RESID_POST, RESID_POST] else " -> ".join(dict.fromkeys(sites)),
                "architecture": architecture,
                "width": str(trainer["dict_size"]),
                "setting": f"{varies} {trainer[varies]}" if varies in trainer else "",
                "seed": str(trainer.get("seed", "")),
                "lr": str(trainer.get("lr", "")),
                "model": one.settings["model_name"],
                "text": one.settings["eval_dataset"],
                "context": str(one.settings["context_length"]),
                "bos": "yes" if one.settings["prepend_bos"] else "no",
                "mask": "yes" if one.settings["mask"] else "no",
                **{heading: _number(one.results.get(key)) for key, heading in COLUMNS.items()},
                "stated L0": _number(one.stated.get("l0")),
                "ended early": "yes" if trainer.get("ended_early") else "",
            }
        )
    runs = {Path(one.name).parent.parent for one in measured}  # SAEs of one run need no names
    always = {"layer", "architecture", "width", "setting", *COLUMNS.values()}
    said = {name for name in ("site", "stated L0", "ended early") if any(row[name] not in ("", "-") for row in rows)}
    differs = {name for name in rows[0] if name != "SAE" and len({row[name] for row in rows}) > 1}
    asked = always | said | differs
    alike = len({tuple(row[name] for name in sorted(asked - set(COLUMNS.values()))) for row in rows}) < len(rows)
    asked |= {"SAE"} if len(runs) > 1 or alike else set()
    shown = [name for name in rows[0] if name in asked]
    lines = [shown, *([row[name] for name in shown] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(shown))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
