"""Pictures carry the numbers they claim: read back from the drawn artists."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from deepfake_utils.report import plots


@pytest.fixture
def separated():
    """Quantiles of two unit Gaussians 2 apart: EER Phi(-1) = 15.87 %."""
    quantiles = norm.ppf((np.arange(500) + 0.5) / 500)
    return np.concatenate([quantiles + 2, quantiles]), np.repeat([1, 0], 500)


def text_of(figure) -> str:
    axes = figure.axes
    words = [t.get_text() for axis in axes for t in axis.texts + axis.get_xticklabels()]
    for axis in axes:
        words += [axis.get_title(), axis.get_title("left"), axis.get_xlabel(), axis.get_ylabel()]
        words += [t.get_text() for t in axis.get_legend().get_texts()] if axis.get_legend() else []
    return " | ".join(words)


def test_histogram_densities_integrate_to_one_and_counts_are_named(separated):
    figure = plots.score_histogram(*separated, threshold=1.0)
    areas = [sum(p.get_height() * p.get_width() for p in c.patches) for c in figure.axes[0].containers]
    assert areas == pytest.approx([1.0, 1.0])
    assert "bona fide (n = 500)" in text_of(figure) and "threshold 1" in text_of(figure)


def test_det_curve_passes_through_its_marked_eer(separated):
    figure = plots.det_curves({"gaussians": separated})
    curve, marker = figure.axes[0].lines[:2]
    x, y = marker.get_data()
    assert x[0] == y[0]
    distance = np.hypot(curve.get_xdata() - x[0], curve.get_ydata() - y[0]).min()
    assert distance < 0.05
    assert "EER 15.8" in text_of(figure) or "EER 15.9" in text_of(figure)


def test_curves_have_no_colour_of_a_class(separated):
    """Blue is bona fide and vermilion spoof, so dev and eval, systems and forms are neither."""
    columns = ("train_loss", "dev_eer", "best_dev_eer", "learning_rate")
    history = pd.DataFrame({"epoch": [1, 2], **dict.fromkeys(columns, 0.1)})
    figures = [plots.det_curves({"dev": separated, "eval": separated}), plots.training_curves(history)]
    figures.append(plots.tandem_cost({form: (np.ones(2), np.arange(2.0)) for form in ("2019", "2021")}))
    drawn = {line.get_color() for figure in figures for axis in figure.axes for line in axis.lines}
    assert len(drawn) > 3 and not drawn & set(plots.basic.CLASS_COLOUR.values())


def test_det_curve_of_a_perfect_system_is_drawn():
    figure = plots.det_curves({"perfect": (np.array([0.0, 1.0]), np.array([0, 1]))})
    assert all(np.isfinite(line.get_xydata()).all() for line in figure.axes[0].lines)
    assert "no error at all is drawn as half an error" in text_of(figure)


def test_attack_bars_show_percent_in_falling_order():
    table = pd.DataFrame(
        {"attack": ["A1", "A2"], "eer": [0.1, 0.2], "n": [10, 20], "low": [0.05, 0.1], "high": [0.2, 0.3]}
    )
    figure = plots.attack_bars(table, overall=0.15, seen=["A1"])
    assert [bar.get_height() for bar in figure.axes[0].patches] == pytest.approx([20, 10])
    assert "A2\nn = 20" in text_of(figure) and "pooled 15.00 %" in text_of(figure)


@pytest.mark.parametrize("selecting, kept", [("dev_eer", [2, 10]), ("dev_macro_eer", [3, 15])])
def test_training_curves_mark_the_kept_epoch(selecting, kept):
    history = pd.DataFrame({"epoch": [1, 2, 3], "train_loss": [1, 0.5, 0.2], "dev_eer": [0.3, 0.1, 0.2],
                            "dev_macro_eer": [0.3, 0.25, 0.15], "learning_rate": [1e-3, 1e-3, 1e-4]})  # fmt: skip
    figure = plots.training_curves(history.assign(best_dev_eer=history[selecting].cummin()))
    assert f"kept: epoch {kept[0]}, {kept[1]:.2f} %" in text_of(figure)
    assert figure.axes[1].collections[0].get_offsets()[0].tolist() == pytest.approx(kept)
    assert [line.get_label() for line in figure.axes[1].lines] == ["all trials", "mean over sources"]


def test_one_epoch_alone_has_a_whole_number_under_it():
    history = pd.DataFrame({"epoch": [1], "train_loss": [1], "dev_eer": [0.3], "best_dev_eer": [0.3],
                            "learning_rate": [1e-3]})  # fmt: skip
    for axis in plots.training_curves(history).axes:
        low, high = axis.get_xlim()
        assert [tick for tick in axis.get_xticks() if low <= tick <= high] == [1]


def test_clips_and_corpus_overview_render(tmp_path):
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    figure = plots.clips({"bona fide": tone, "spoof": tone})
    mesh = figure.axes[2].collections[0].get_array()
    rows = np.asarray(mesh).reshape(257, -1).mean(axis=1)
    assert abs(np.argmax(rows) * 8000 / 256 - 1000) < 40  # the tone is where it should be
    protocol = pd.DataFrame({"split": ["train"] * 3, "attack": ["-", "A1", "A1"]})
    overview = plots.corpus_overview(protocol)
    assert "train (n = 3)" in text_of(overview)
    overview.savefig(tmp_path / "overview.png")
