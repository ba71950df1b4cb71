"""Pictures for error analysis show the numbers they were given: read back from the drawn artists."""

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
    words = []
    for axis in figure.axes:
        words += [axis.get_title(), axis.get_title("left"), axis.get_xlabel(), axis.get_ylabel()]
        words += [text.get_text() for text in [*axis.texts, *axis.get_xticklabels(), *axis.get_yticklabels()]]
        words += [text.get_text() for text in axis.get_legend().get_texts()] if axis.get_legend() else []
    return " | ".join(words)


def test_score_panels_hold_whole_densities_and_name_thresholds(separated, tmp_path):
    figure = plots.score_panels({"raw": (*separated, {"dev": 1.0}), "LLR": (*separated, {})})
    for axis in figure.axes:
        areas = [sum(p.get_height() * p.get_width() for p in c.patches) for c in axis.containers]
        assert areas == pytest.approx([1.0, 1.0])
    assert "dev: 1" in text_of(figure) and "spoof (n = 500)" in text_of(figure)
    figure.savefig(tmp_path / "panels.png")


def test_tandem_minimum_is_marked_where_it_is():
    thresholds = np.array([0.0, 1.0, 2.0, np.inf])
    figure = plots.tandem_cost({"2019": (np.array([1.0, 0.25, 0.5, 2.0]), thresholds)}, operating_point=2.0)
    marker = next(line for line in figure.axes[0].lines if line.get_marker() == "o")
    assert [float(marker.get_xdata()[0]), float(marker.get_ydata()[0])] == [1.0, 0.25]
    [curve] = (line for line in figure.axes[0].lines if line.get_label().startswith("2019"))
    assert curve.get_drawstyle() == "steps-pre"  # from 1.5 on as much is accepted as from 2.0 on
    between = plots.tandem_cost({"2019": (np.array([1.0, 0.25, 0.5, 2.0]), thresholds)}, operating_point=1.5)
    assert "costs 0.5000 (2019)" in text_of(between)
    words = text_of(figure)
    assert "minimum 0.2500 at 1" in words and "threshold chosen on dev: costs 0.5000 (2019)" in words


def test_gap_steps_lead_from_dev_to_eval():
    parts = pd.DataFrame({"what": ["bona fide", "A1", "A2"], "n": [9, 5, 5], "part": [0.02, 0.10, -0.03]})
    parts.attrs = {"dev_error": 0.05, "eval_error": 0.14}
    bars = plots.gap_parts(parts).axes[0].patches
    tops = [bar.get_y() + bar.get_height() for bar in bars]
    assert tops == pytest.approx([5, 7, 17, 14, 14])
    assert [bar.get_hatch() or "" for bar in bars][1:4] == ["", "", "//"]


def test_rejections_stand_in_the_order_of_the_table_with_their_counts():
    table = pd.DataFrame({"speaker": ["a", "b"], "n_bonafide": [4, 8], "p_miss": [0.25, 0.5], "low": 0.0, "high": 1.0})
    figure = plots.rejections_by_speaker(table)
    assert [bar.get_height() for bar in figure.axes[0].patches] == [25, 50]
    assert "b\nn = 8" in text_of(figure)


def test_eer_bars_keep_the_order_of_the_table():
    table = pd.DataFrame({"rule": ["duration", "level"], "eer": [0.2, 0.5], "low": [0.1, np.nan]})
    table["high"] = [0.3, np.nan]
    figure = plots.eer_bars(table, title="n = 7")
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([20, 50])
    assert "a coin" in text_of(figure) and "n = 7" in text_of(figure)


def test_reliability_puts_what_was_found_over_what_was_predicted():
    table = pd.DataFrame({"predicted": [0.2, 0.8], "observed": [0.1, 0.9], "n_bonafide": [1, 9], "n_spoof": [9, 1]})
    figure = plots.reliability_diagram(table, table)
    assert figure.axes[1].collections[0].get_offsets().tolist() == [[0.2, 0.1], [0.8, 0.9]]


def test_an_operating_point_without_errors_is_drawn_at_half_a_trial(separated):
    figure = plots.det_with_points({"eval": separated}, {"at dev": (0.3, 0.0)})
    x, y = next(line for line in figure.axes[0].lines if line.get_marker() == "X").get_data()
    assert norm.cdf([x[0], y[0]]) == pytest.approx([0.3, 0.001])
    assert "0.00 % real rejected, 30.00 % fake accepted" in text_of(figure)


def test_embeddings_show_every_clip_once_and_seen_attacks_unfilled():
    points = np.arange(12.0).reshape(6, 2)
    figure = plots.embedding_map({"PCA": points}, ["-", "-", "A1", "A1", "A2", "A2"], seen=["A1"])
    groups = figure.axes[0].collections
    assert sum(len(group.get_offsets()) for group in groups) == 6
    assert len(groups[0].get_facecolors()) == 0 and len(groups[1].get_facecolors()) == 1
    assert "A2 (n = 2)" in text_of(figure)


def test_a_clip_under_the_lens_shares_one_time_axis(tmp_path):
    waveform = 0.1 * np.random.default_rng(0).standard_normal(24000)
    windows = pd.DataFrame({"start_s": [0.0, 0.5], "stop_s": [1.0, 1.5], "score": [-1.0, 2.0]})
    figure = plots.clip_under_the_lens(waveform, windows, np.eye(4), whole=0.5, threshold=0.0, title="miss: u1")
    assert {axis.get_xlim() for axis in figure.axes[:4]} == {(0.0, 1.5)}
    assert figure.axes[3].images[0].get_extent() == [0, 1.5, 0, 8]
    figure.savefig(tmp_path / "lens.png")


def test_trimming_and_agreement_count_both_classes():
    scores, labels = np.array([1.0, 2.0, -1.0]), np.array([1, 1, 0])
    moved = plots.trimming(scores, scores - 0.5, labels, np.array([0.1, 0.2, 0.3]))
    assert moved.axes[1].collections[0].get_offsets()[:, 1].tolist() == [-0.5, -0.5]
    both = plots.agreement(scores, -scores, labels, names=("one", "two"), threshold=0.0)
    assert "bona fide (n = 2)" in text_of(both) and "only two accepts" in text_of(both)
