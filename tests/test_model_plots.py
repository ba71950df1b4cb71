"""Pictures of the models: what is drawn is what was given, in the units on the axes."""

import numpy as np
import pandas as pd
import pytest

from deepfake_utils.models.sinc import SincFilters
from deepfake_utils.report import plots
from deepfake_utils.report.tables import artefact_table


def test_filter_responses_peak_inside_their_bands():
    bank = SincFilters(6, 1025, spacing="linear")
    figure = plots.filter_responses({"linear": bank.frequency_response(801)})
    (axis,) = figure.axes
    assert "(n = 6)" in axis.get_title() and "kHz" in axis.get_xlabel()
    for line, low_hz, high_hz in zip(axis.lines, *(edge.numpy() for edge in bank.cutoffs_hz()), strict=True):
        x, gain = map(np.asarray, line.get_data())
        inside = gain[(x > low_hz / 1000 + 0.1) & (x < high_hz / 1000 - 0.1)]
        np.testing.assert_allclose(inside, 1, atol=0.01)


def test_cutoff_moves_are_differences_in_hertz():
    before = np.array([[0.0, 1000.0], [1000.0, 3000.0]])
    figure = plots.cutoff_moves(before, before + np.array([[0.0, -2.0], [1.0, 5.0]]))
    lower, upper = figure.axes[0].lines[:2]
    assert lower.get_ydata().tolist() == [0, -2] and upper.get_ydata().tolist() == [1, 5]
    assert upper.get_xdata().tolist() == [1, 3] and "Hz" in figure.axes[0].get_ylabel()


def test_cepstra_are_standardised_over_all_clips_together():
    rng = np.random.default_rng(0)
    clips = {"a": 100 + 5 * rng.standard_normal((60, 50)), "b": 100 + 5 * rng.standard_normal((60, 80))}
    figure = plots.cepstra(clips)
    images = [np.asarray(axis.images[0].get_array()) for axis in figure.axes if axis.images][:2]
    together = np.concatenate(images, axis=1)
    np.testing.assert_allclose(together.mean(1), 0, atol=1e-9)
    np.testing.assert_allclose(together.std(1), 1)
    assert figure.axes[1].images[0].get_extent()[1] == pytest.approx(0.8)  # 80 frames of 10 ms


def test_graph_attention_shows_shares_and_the_nodes_kept():
    attention = np.full((4, 4), 0.1)
    attention[:, 2] = 0.7  # everyone looks at node 2
    kept = np.array([True, False, True, False])
    figure = plots.graph_attention(np.sin(np.arange(16_000) / 5), attention, kept, title="tone")
    received = next(axis for axis in figure.axes if "even share" in axis.get_ylabel())
    assert received.patches[0].get_data().values.tolist() == pytest.approx([0.4, 0.4, 2.8, 0.4])
    triangles = figure.axes[0].lines[0].get_xdata()
    assert triangles.tolist() == pytest.approx([0.125, 0.625]) and "2 nodes kept of 4" in figure.axes[0].get_title()


def test_model_comparison_puts_error_against_time_with_intervals():
    table = pd.DataFrame(
        {
            "eer": [0.1, 0.5],
            "low": [0.05, 0.4],
            "high": [0.2, 0.6],
            "score_s": [0.02, 0.3],
            "parameters": [3e5, 1.76e7],
        },
        index=["small", "large"],
    )
    (axis,) = plots.model_comparison(table).axes
    points = [container.lines[0].get_xydata()[0].tolist() for container in axis.containers]
    assert points == [pytest.approx([20, 10]), pytest.approx([300, 50])]
    spans = [container.lines[2][0].get_segments()[0][:, 1].tolist() for container in axis.containers]
    assert spans == [pytest.approx([5, 20]), pytest.approx([40, 60])]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a coin", "small, 0.3 M", "large, 18 M"]


def test_artefacts_are_drawn_by_time_and_by_size():
    table = pd.DataFrame(
        {
            "family": ["a", "a"], "numbers": ["float32", "int8"], "bytes": [2_000_000, 500_000], "ms": [8.0, 4.0],
            "eer": [0.2, 0.21], "low": [0.1, 0.11], "high": [0.3, 0.31], "lost": [np.nan, 0.01],
        },
        index=["a (float32)", "a (int8)"],
    )  # fmt: skip
    times, sizes = plots.artefact_costs(table).axes
    for axis, expected in ((times, [8, 4]), (sizes, [2, 0.5])):
        points = [container.lines[0].get_xydata()[0].tolist() for container in axis.containers]
        assert points == [pytest.approx([expected[0], 20]), pytest.approx([expected[1], 21])]
    colours = {container.lines[0].get_color() for container in times.containers}
    assert len(colours) == 1 and "MB" in sizes.get_xlabel() and "ms" in times.get_xlabel()
    shown = artefact_table(table)
    assert shown["points lost"].tolist() == ["-", "+1.00"] and shown["x real time"].tolist() == ["505", "1,009"]
    assert shown["95 % interval"][1] == "11.00 to 31.00" and shown["MB"].tolist() == ["2.000", "0.500"]
