"""The tables say what the evaluation found, and the page holds all of it without needing anything else."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from deepfake_utils import evaluate
from deepfake_utils.evaluation import compare
from deepfake_utils.evaluation.calibration import PRESETS, fit_calibration, operating_point
from deepfake_utils.evaluation.metrics import compute_eer
from deepfake_utils.report import page, tables
from deepfake_utils.serving.drift import find_drift
from deepfake_utils.training.config import TrainingConfig


@pytest.fixture(scope="module")
def case():
    """300 trials of 10 speakers: attack A2 is hard, one attack's name would break a careless page."""
    rng = np.random.default_rng(0)
    keys = pd.DataFrame({"utterance": [f"u{i}" for i in range(300)], "label": np.repeat([1, 0, 0], 100)})
    keys["attack"] = np.repeat(["-", "<A1>", "A2"], 100)
    keys["speaker"] = [f"s{i % 10}" for i in range(300)]
    keys["codec"] = np.where(np.arange(300) % 2, "alaw", "none")
    score = rng.normal(np.repeat([2.0, -2.0, 1.0], 100))
    return keys[["utterance"]].assign(score=score), keys


@pytest.fixture(scope="module")
def result(case):
    return evaluate(*case, by=["codec"], n_bootstrap=50, attack_intervals=True)


class Page(HTMLParser):
    """Everything a page loads or links, its visible words, and whether its tags close."""

    void = {"meta", "img", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.links, self.words = [], [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def read_page(path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_attack_table_is_sorted_and_its_shares_are_whole(result):
    table = tables.attack_table(result)
    assert table["attack"].tolist() == ["A2", "<A1>", "bona fide"]
    assert table["share of all errors %"].astype(float).sum() == pytest.approx(100, abs=0.2)
    assert table["EER %"][0] == f"{100 * result['per_attack']['A2']['eer']:.2f}"
    assert re.fullmatch(r"[\d.]+ to [\d.]+", table["95 % interval"][0])


def test_headlines_leave_out_what_could_not_be_computed(result):
    table = tables.headline_table(result).set_index("figure")
    assert "min t-DCF, 2019" not in table.index
    assert table.loc["EER", "value"] == f"{100 * result['eer']:.2f}"
    assert float(table.loc["EER", "95 % interval"].split()[0]) <= float(table.loc["EER", "value"])


def test_breakdown_and_threshold_tables_carry_their_numbers(case, result):
    table = tables.breakdown_table(result, "codec").set_index("codec")
    assert table.loc["alaw", "EER % against its own trials"] == f"{100 * result['by']['codec']['alaw']['eer']:.2f}"
    assert "against" not in table
    scores, keys = case
    llrs = fit_calibration(scores["score"], keys["label"]).llr(scores["score"])
    points = {use: operating_point(llrs, keys["label"], use, n_bootstrap=20) for use in PRESETS}
    uses = tables.threshold_table(points).set_index("use")
    assert set(uses.index) == set(PRESETS)
    assert uses.loc["forensic triage", "LLR threshold"] == "3.00"
    assert (uses["cost"].astype(float) >= uses["least possible"].astype(float)).all()


def test_comparison_table_names_its_reference(case):
    scores, keys = case
    systems = {"one": scores["score"].to_numpy(), "two": -scores["score"].to_numpy()}
    compared = compare.compare(systems, keys["label"], keys["speaker"], n_bootstrap=20)
    table = tables.comparison_table(compared)
    assert table["difference (points)"][0] == "reference" and table["difference (points)"][1].startswith("+")
    assert table["95 % interval, paired"][1].endswith("by speaker")


def test_the_page_needs_nothing_but_itself(case, result, tmp_path):
    path = page.write_html(tmp_path / "report.html", result, title="A & B", notice="only a demo")
    read = read_page(path)
    assert read.links and all(link.startswith("data:image/png;base64,") for link in read.links)
    assert all(base64.b64decode(link.split(",")[1]).startswith(b"\x89PNG") for link in read.links)
    words = " ".join(read.words)
    assert "a high score says bona fide" in words and "(95 % interval " in words
    kinds = re.findall(r'<table[^>]*class="dataframe (\w+)"', path.read_text(encoding="utf-8"))
    assert kinds == ["meaning", "figures", "figures"]  # the last column is a sentence in the first one alone
    for said in ("A & B", "only a demo", "<A1>", "alaw", f"{100 * result['eer']:.2f}", "10 speakers", "by speaker"):
        assert said in words
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_page_of_one_phase_takes_the_whole_score_file(case, tmp_path):
    scores, keys = case
    keys = keys.assign(phase=np.where(np.arange(300) % 3, "eval", "progress"))
    result = evaluate(scores, keys, phase="eval", n_bootstrap=0)
    read = read_page(page.write_html(tmp_path / "r.html", result))
    assert f"{result['n_bonafide']} bona fide and {result['n_spoof']} spoofed trials" in " ".join(read.words)


def test_the_curves_go_the_way_the_table_goes(case, monkeypatch, tmp_path):
    """Scores in a frame whose high values mean spoof: turned for the pictures as for the figures."""
    scores, keys = case
    turned = scores.assign(score=-scores["score"])
    drawn = {}
    monkeypatch.setattr(page.plots, "det_with_points", lambda systems, points: drawn.update(systems) or Figure())
    result = evaluate(turned, keys, higher_is="spoof", n_bootstrap=0)
    page.write_html(tmp_path / "r.html", result)
    assert compute_eer(*drawn["scores"]).eer == pytest.approx(result["eer"]) and result["eer"] < 0.4


def test_a_long_breakdown_is_cut_with_a_word_about_it(case, tmp_path):
    scores, keys = case
    result = evaluate(scores, keys.assign(session=np.arange(300) // 3), by="session", n_bootstrap=0)
    words = " ".join(read_page(page.write_html(tmp_path / "r.html", result)).words)
    assert "40 more rows are not shown" in words


def test_the_real_evaluation_with_its_tandem_curve(reference_data, tmp_path):
    published = reference_data / "published_scores"
    (asv,) = (reference_data / "asvspoof2019_subset").rglob("*asv.eval.gi.trl.scores.txt")
    from deepfake_utils.evaluation.scorefile import read_scores
    from deepfake_utils.protocols import read_keys

    scores = read_scores(published / "rawgat_st_mul.LA.eval.txt")
    protocol = read_keys(published / "ASVspoof2019.LA.cm.eval.trl.txt")
    result = evaluate(scores, protocol, asv, n_bootstrap=0)
    read = read_page(page.write_html(tmp_path / "r.html", result, asv))
    words = " ".join(read.words)
    assert "1.06" in words and "0.0335" in words and "Tandem cost" in words and len(read.links) == 4


def test_settings_that_depart_from_the_paper_are_in_words_and_units():
    here = TrainingConfig(crop_samples=16_000, class_weights=(0.5, 0.5), schedule="one_cycle", clip_norm=5.0)
    table = tables.settings_table(here.to_dict(), TrainingConfig().to_dict()).set_index("setting")
    assert table.loc["training clip (s)"].tolist() == ["1", "4.037"]
    assert table.loc["weights of spoof, bona fide"].tolist() == ["0.5, 0.5", "0.1, 0.9"]
    assert table.loc["schedule", "here"] == "one cycle" and table.loc["highest gradient norm (0: any)", "here"] == "5"
    assert len(table) == 4 and not any("_" in text for text in table.to_string())


def test_drift_is_told_in_words_and_units():
    rng = np.random.default_rng(0)
    made = {"score": rng.normal(size=50), "level_db": -25.0, "bandwidth_hz": 5430.0, "seconds": rng.uniform(1, 9, 50)}
    reference = pd.DataFrame(made)
    reference.loc[:4, "score"] = np.nan
    table = tables.drift_table(find_drift(reference, reference.assign(level_db=-31.0))).set_index("median or share")
    assert table.loc["level (dB re full scale)"].tolist() == ["-25", "-31", "50 and 50", "1.00", "under 0.001", "yes"]
    assert table.loc["without a verdict (%)", ["in the reference", "in the service", "drift"]].tolist() == [
        "10",
        "10",
        "no",
    ]
    assert not any("_" in name for name in table.columns)
