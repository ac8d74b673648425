"""Figures from run folders: what is read, what is reported, what is drawn, and that matplotlib is left alone."""

import json
import math
import sys
from pathlib import Path

import pytest

from dictionary_learning import plotting
from dictionary_learning.plotting import (
    ARCHITECTURE_STYLES,
    density_figure,
    pareto_figure,
    read_runs,
    training_figure,
)


def write_sae(
    run: Path, number: int, trainer_class="TopKTrainer", layer=1, width=32, results=None, history=0, density=False
) -> Path:
    """An SAE folder as the reference library leaves it, with a history and densities where asked."""
    folder = run / f"resid_post_layer_{layer}" / f"trainer_{number}"
    folder.mkdir(parents=True)
    trainer = {"trainer_class": trainer_class, "dict_class": "AutoEncoderTopK", "dict_size": width, "layer": layer}
    trainer |= {"activation_dim": 16, "lm_name": "some/model", "seed": 0, "lr": 3e-4}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 16}}))
    if results is None:
        results = {"l0": 2.0**number, "frac_recovered": 0.9, "frac_alive": 1.0, "kl_divergence": 0.1}
    (folder / "eval_results.json").write_text(json.dumps(results))
    if history:
        lines = [{"step": i, "tokens": 8 * i, "loss": 2.0, "l0": 4.0, "dead_features": None} for i in range(history)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if density:
        import numpy as np
        from safetensors.numpy import save_file

        save_file({"density": np.linspace(0, 0.5, width, dtype=np.float32)}, folder / "density.safetensors")
    return folder


def texts(figure) -> str:
    """Everything written in a figure."""
    return "\n".join(artist.get_text() for artist in figure.findobj(match=lambda a: hasattr(a, "get_text")))


def legend_labels(figure) -> list[str]:
    return [text.get_text().strip() for text in figure.legends[0].get_texts()]


def test_every_architecture_has_a_label_a_marker_and_a_colour_of_its_own():
    import dictionary_learning.trainers as trainers

    assert len(ARCHITECTURE_STYLES) == 8
    assert all(hasattr(trainers, name) for name in ARCHITECTURE_STYLES)
    for feature in ("label", "marker", "colour"):
        assert len({getattr(style, feature) for style in ARCHITECTURE_STYLES.values()}) == 8


def test_every_sae_is_a_point_and_every_sweep_a_line(tmp_path):
    names = [*ARCHITECTURE_STYLES, "TrainerOfTomorrow"]
    for layer in (1, 3):
        for i, (name, width, setting) in enumerate((n, w, s) for n in names for w in (32, 64) for s in range(3)):
            results = {"l0": 4.0 * 2**setting, "frac_recovered": 0.8 + setting / 20}
            write_sae(tmp_path, i, name, layer, width, results)
    records, problems = read_runs([tmp_path])
    figure = pareto_figure(records)
    assert not problems and len(records) == 2 * len(names) * 2 * 3
    assert len(figure.axes) == 2
    for ax in figure.axes:
        assert ax.get_xscale() == "log"
        assert [len(line.get_xydata()) for line in ax.lines] == [3] * len(names) * 2
        assert all(list(line.get_xdata()) == sorted(line.get_xdata()) for line in ax.lines)
    labels = [style.label for style in ARCHITECTURE_STYLES.values()]
    assert legend_labels(figure) == ["Architecture", *labels, "TrainerOfTomorrow", "Latents", "64", "32"]


@pytest.mark.parametrize("metric", [*plotting.PARETO_METRICS, "cossim"])
def test_any_metric_of_the_results_can_be_drawn(tmp_path, metric):
    for i in range(3):
        write_sae(tmp_path, i, results={"l0": 2.0**i, metric: 0.5})
    records, _ = read_runs([tmp_path])
    assert len(pareto_figure(records, metric).axes[0].lines[0].get_xydata()) == 3


def test_plot_pareto_writes_the_picture_and_tells_what_it_could_not_read(tmp_path):
    write_sae(tmp_path, 0)
    (write_sae(tmp_path, 1) / "eval_results.json").unlink()
    [problem] = plotting.plot_pareto([tmp_path], tmp_path / "pareto.png")
    assert "trainer_1" in problem and "eval_results.json is missing" in problem
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_broken_files_are_reported_and_stop_nothing(tmp_path):
    (write_sae(tmp_path, 0) / "eval_results.json").write_text('{"l0": 3')
    (write_sae(tmp_path, 1) / "eval_results.json").write_text("[1]")
    (write_sae(tmp_path, 2) / "config.json").write_text("{}")
    (write_sae(tmp_path, 3, history=2) / "metrics.jsonl").write_text('{"st')
    write_sae(tmp_path, 4, results={"l0": None, "error": "it broke"})
    write_sae(tmp_path, 5)
    records, problems = read_runs([tmp_path])
    assert [record.folder.name for record in records] == [f"trainer_{i}" for i in (0, 1, 3, 4, 5)]
    expected = ["trainer_0", "trainer_1", "'trainer'", "metrics.jsonl", "it broke"]
    for problem, what in zip(problems, expected, strict=True):
        assert what in problem
    assert len(pareto_figure(records).axes[0].lines) == 1
    assert training_figure(records).axes == []


def test_a_history_that_a_kill_has_cut_keeps_its_whole_lines(tmp_path):
    path = write_sae(tmp_path, 0, history=5) / "metrics.jsonl"
    path.write_text(path.read_text()[:-20] + '\n[1]\n{"step": "x", "tokens": 99, "loss": "much"}\n')
    records, [problem] = read_runs([tmp_path])
    assert "metrics.jsonl has 2 of 7 lines broken" in problem
    assert [line["tokens"] for line in records[0].history] == [0, 8, 16, 24, 99]
    figure = training_figure(records, ["loss", "l0"])
    assert list(figure.axes[0].lines[0].get_xdata()) == [0, 8, 16, 24, 99]
    figure.canvas.draw()


@pytest.mark.parametrize("name", [None, 7])
def test_a_model_that_has_no_name_is_drawn_beside_others(tmp_path, name):
    for i, lm_name in enumerate([name, "some/model"]):
        folder = write_sae(tmp_path, i, history=3, density=True)
        config = json.loads((folder / "config.json").read_text())
        config["trainer"]["lm_name"] = lm_name
        (folder / "config.json").write_text(json.dumps(config))
    records, problems = read_runs([tmp_path])
    assert not problems
    for draw in (pareto_figure, training_figure, density_figure):
        figure = draw(records)
        figure.canvas.draw()
        assert ("7, layer 1" if name else "unknown model, layer 1") in texts(figure) and "model, layer 1" in texts(
            figure
        )


def test_densities_that_are_broken_are_counted_and_stop_no_other(tmp_path):
    from safetensors.numpy import save_file

    write_sae(tmp_path, 0, density=True)
    cut, other, empty = (write_sae(tmp_path, i, density=True) / "density.safetensors" for i in (1, 2, 3))
    cut.write_bytes(cut.read_bytes()[:-9])
    save_file({}, other)
    empty.write_bytes(b"")
    figure = density_figure(read_runs([tmp_path])[0])
    assert "not drawn: 3 of 4 SAEs, whose density.safetensors is broken" in texts(figure)
    assert len(figure.axes[0].lines) == 1
    (tmp_path / "resid_post_layer_1" / "trainer_0" / "density.safetensors").unlink()
    assert "not drawn: 3 of 3 SAEs" in texts(density_figure(read_runs([tmp_path])[0]))


def test_numbers_that_are_not_finite_are_no_numbers(tmp_path):
    write_sae(tmp_path, 0, results={"l0": math.nan, "frac_recovered": None, "frac_alive": 0.5})
    write_sae(tmp_path, 1, results={"l0": 0.0, "frac_recovered": 0.1})
    write_sae(tmp_path, 2)
    records, _ = read_runs([tmp_path])
    assert records[0].results == {"frac_alive": 0.5}
    figure = pareto_figure(records)
    assert "2 of 3 SAEs" in texts(figure)


def test_a_run_of_the_reference_without_loss_recovered_says_so_and_draws_the_rest(tmp_path):
    for i in range(3):
        write_sae(
            tmp_path, i, results={"l0": 2.0**i, "frac_variance_explained": 0.5, "hyperparameters": {"n_inputs": 2}}
        )
    records, problems = read_runs([tmp_path])
    assert not problems
    assert "none of the 3 SAEs has l0 and frac_recovered" in texts(pareto_figure(records))
    assert len(pareto_figure(records, "frac_variance_explained").axes[0].lines) == 1
    assert "none of the 3 SAEs has a metrics.jsonl" in texts(training_figure(records))
    assert "none of the 3 SAEs has a density.safetensors" in texts(density_figure(records))


def test_training_curves_have_a_row_for_every_quantity_and_a_line_for_every_sae(tmp_path):
    for i, layer in enumerate([1, 1, 2]):
        write_sae(tmp_path, i, layer=layer, history=5)
    records, _ = read_runs([tmp_path])
    figure = training_figure(records, ["loss", "l0", "dead_features", "threshold"])
    assert [len(ax.lines) for ax in figure.axes] == [2, 1] * 4
    assert list(figure.axes[0].lines[0].get_xdata()) == [0, 8, 16, 24, 32]
    assert all(math.isnan(value) for value in figure.axes[-1].lines[0].get_ydata())  # not recorded: a gap, not an error
    figure.canvas.draw()


def test_density_histograms_count_every_latent_that_fires(tmp_path):
    write_sae(tmp_path, 0, "TopKTrainer", density=True)
    write_sae(tmp_path, 1, "GatedSAETrainer", density=True)
    write_sae(tmp_path, 2)
    figure = density_figure(read_runs([tmp_path])[0])
    assert len(figure.axes) == 2
    for ax in figure.axes:
        assert sum(ax.lines[0].get_ydata()) == pytest.approx(31 / 32)  # one of 32 latents has density 0
        assert "3% never fire" in texts(ax)


def test_folders_that_do_not_exist_or_hold_nothing(tmp_path):
    with pytest.raises(ValueError, match="no run folder to read"):
        read_runs([])
    with pytest.raises(ValueError, match="there is no run folder .*nowhere"):
        read_runs([tmp_path / "nowhere"])
    records, [problem] = read_runs([tmp_path])
    assert records == [] and "holds no SAE" in problem
    assert "none of the 0 SAEs" in texts(pareto_figure(records))


def test_matplotlib_is_left_alone(tmp_path):
    import matplotlib

    before, had_pyplot = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    write_sae(tmp_path, 0, history=3, density=True)
    records, _ = read_runs([tmp_path])
    for draw in (pareto_figure, training_figure, density_figure):
        draw(records).savefig(tmp_path / "figure.png")
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot
