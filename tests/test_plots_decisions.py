"""Pictures of decisions show the numbers they were given: read back from the drawn artists."""

import numpy as np
import pandas as pd
import pytest

from deepfake_utils.report import plots, tables
from deepfake_utils.report.plots.decisions import ENVELOPE_S
from deepfake_utils.scoring.detector import USES

WINDOWS = pd.DataFrame({"start_s": [0.0, 2.0, 4.0], "end_s": [4.0, 6.0, 8.0], "log_odds": [2.0, 0.5, -3.0]})


def test_an_envelope_does_not_depend_on_the_blocks_it_came_in():
    samples = np.random.default_rng(0).uniform(-1, 1, 16_123).astype(np.float32)
    whole = plots.envelope([samples])
    assert np.array_equal(plots.envelope(np.split(samples, [1, 799, 5_000, 16_000])), whole)
    assert len(whole) == 21 and whole[:, 0].min() == samples.min() and whole[:, 1].max() == samples.max()
    assert plots.envelope([]).shape == (0, 2)


def test_a_timeline_shows_windows_by_kind_stretches_and_truth(tmp_path):
    extremes = np.tile([[-0.1, 0.2]], (int(8 / ENVELOPE_S), 1))
    figure = plots.timeline(
        WINDOWS, extremes, (0.0, 1.0), fake_stretches=[(4.0, 8.0)], truth=[(4.5, 7.5)], title="call.wav: real"
    )
    above, below = figure.axes
    lines = {c.get_label(): c.get_segments() for c in below.collections if c.get_label()[0] != "_"}
    assert {name: segments[0].tolist() for name, segments in lines.items()} == {
        "real (n = 1)": [[0, 2], [4, 2]], "uncertain (n = 1)": [[2, 0.5], [6, 0.5]], "fake (n = 1)": [[4, -3], [8, -3]],
    }  # fmt: skip
    assert [text.get_text() for text in above.get_legend().get_texts()] == ["sounds fake", "is fake"]
    assert above.get_title("left") == "call.wav: real" and below.get_xlim() == pytest.approx((0, 8))
    figure.savefig(tmp_path / "timeline.png")


def test_two_hours_are_drawn_with_no_more_columns_than_a_screen_has():
    figure = plots.timeline(WINDOWS, np.tile([[-0.5, 0.5]], (144_000, 1)), (0.0, 0.0))
    assert len(figure.axes[0].collections[0].get_paths()[0].vertices) < 4_100


def test_costs_of_uses_mark_the_threshold_and_the_blind_cost(tmp_path):
    curves = {name: {"dev": (np.array([-1.0, 1.0]), np.array([0.2, 0.1]))} for name in USES}
    mark = {"threshold": 0.5, "uncertain": [0.0, 1.0], "blind": 0.3}
    figure = plots.costs_of_uses(curves, dict.fromkeys(USES, mark))
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in shown] == list(USES)
    cost, threshold = (line.get_xydata().tolist() for line in shown[0].lines[:2])
    assert cost[1:3] == [[-1, 0.2], [1, 0.1]] and threshold[0][0] == threshold[1][0] == 0.5
    (left, _), (right, _) = ends = cost[0], cost[-1]  # beyond all log-odds the cost is that of one decision for all
    assert [left, right] == pytest.approx(shown[0].get_xlim()) and [at for _, at in ends] == [0.2, 0.1]
    assert left < -1 and right > 1 and shown[0].lines[0].get_drawstyle() == "steps-pre"
    figure.savefig(tmp_path / "uses.png")


def test_the_table_of_costs_states_use_threshold_and_interval():
    row = {"threshold": -1.5, "uncertain": [-2.0, -1.0], "real_rejected": 0.01, "fake_accepted": 0.4, "cost": 0.07,
           "cost_ci": [0.05, 0.09], "blind": 0.1, "least": 0.06, "undecided": 0.2}  # fmt: skip
    table = tables.cost_table(USES, {"call-centre": row, "forensic": row | {"cost_ci": None}})
    assert table["threshold (uncertain)"][0] == "-1.50 (-2.00 to -1.00)"
    assert table["cost (95 % interval)"].tolist() == ["0.07 (0.05 to 0.09)", "0.07"]
    assert table["% fake"].tolist() == ["0.1", "50"] and table.shape[1] <= 10
