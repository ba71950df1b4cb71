"""Drift: alarms as rare as promised without it, and raised with it."""

import json
import re
import shutil
import time
from threading import Event
from types import SimpleNamespace

import jupytext
import nbformat
import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from deepfake_utils import Detector
from deepfake_utils.__main__ import main
from deepfake_utils.conventions import ConfigError, ScoreError
from deepfake_utils.demo import build_demo
from deepfake_utils.scoring.weights import SHIPPED
from deepfake_utils.serving import drift
from deepfake_utils.serving.embeddings import as_numbers, fit_projection
from deepfake_utils.serving.headless import NOTEBOOKS
from deepfake_utils.serving.limits import Places
from deepfake_utils.serving.metrics import Metrics
from deepfake_utils.serving.records import Records
from deepfake_utils.serving.scorer import InService, listen_to
from deepfake_utils.serving.versions import Versions
from tests.conftest import DEMO_SCALE


def draw(rng, n: int, **changes) -> pd.DataFrame:
    """Recordings of a service: level, duration and score hang together, bandwidths tie, a tenth has no verdict."""
    shared = rng.normal(size=n)
    table = pd.DataFrame({
        "score": 2 * rng.choice([-1, 1], n) + rng.normal(size=n) + 0.5 * shared,
        "level_db": -25 + 4 * shared + 3 * rng.normal(size=n),
        "bandwidth_hz": 15.625 * rng.integers(200, 512, n),
        "seconds": np.exp(1.5 + 0.5 * shared + 0.5 * rng.normal(size=n)),
        "client": [f"client {i}" for i in range(n)],
    })  # fmt: skip
    table["score"] = table["score"].where(rng.uniform(size=n) > changes.get("no_verdict", 0.1))
    for name in changes.keys() & set(drift.NUMBERS):
        table[name] += changes[name]
    return table


def test_without_drift_alarms_are_as_rare_as_chosen():
    rng, n_reports = np.random.default_rng(1), 400
    smallest = np.array([drift.find_drift(draw(rng, 150), draw(rng, 80))["p"].min() for _ in range(n_reports)])
    for false_alarms in (0.01, 0.05, 0.2):
        n_alarms = int((smallest < false_alarms).sum())
        assert n_alarms <= binom.ppf(0.999, n_reports, false_alarms)
        assert n_alarms >= binom.ppf(0.001, n_reports, false_alarms / 3)  # nor do they never come


@pytest.mark.parametrize(
    "what, change",
    [("score", {"score": -1.0}), ("level", {"level_db": -3.0}), ("bandwidth", {"bandwidth_hz": -800.0}),
     ("duration", {"seconds": 3.0}), ("no verdict", {"no_verdict": 0.25})],
)  # fmt: skip
def test_with_drift_the_number_that_moved_is_named(what, change):
    rng, found = np.random.default_rng(2), []
    for _ in range(10):
        report = drift.find_drift(draw(rng, 600), draw(rng, 400, **change)).set_index("what")
        found.append(report["drifted"][what])
        assert report["drifted"].drop(what).sum() <= 1
    assert np.mean(found) >= 0.9


def test_a_shift_too_small_to_see_is_seen_in_more_recordings():
    rng = np.random.default_rng(3)
    moved = [drift.find_drift(draw(rng, n), draw(rng, n, level_db=-1.0)).set_index("what") for n in (50, 2000)]
    assert [bool(report["drifted"]["level"]) for report in moved] == [False, True]


def test_where_clients_are_many_each_counts_once():
    """Few talkative clients make a stream that repeats itself; taken by recording it would raise false alarms."""
    rng, alarms = np.random.default_rng(4), {"client": 0, "recording": 0}
    for _ in range(40):
        talkative = rng.choice(120, 1500, p=rng.dirichlet(np.full(120, 0.2)))
        stream = draw(rng, 120).iloc[talkative]
        chosen, words = drift.sample(stream)
        assert chosen["client"].is_unique and "one a client" in words
        reference = draw(rng, 300)
        alarms["client"] += bool(drift.find_drift(reference, chosen)["drifted"].any())
        alarms["recording"] += bool(drift.find_drift(reference, stream)["drifted"].any())
    assert alarms["client"] <= binom.ppf(0.999, 40, drift.FALSE_ALARMS) < alarms["recording"]


def test_few_recordings_and_impossible_rates_are_refused():
    table = draw(np.random.default_rng(0), 19)
    with pytest.raises(ScoreError, match="19 in the stream.*at least 20"):
        drift.find_drift(draw(np.random.default_rng(0), 50), table)
    with pytest.raises(ConfigError, match="false_alarms is 5"):
        drift.find_drift(table, table, 5)


def test_a_reference_is_made_of_recordings_and_kept_beside_the_weights(tmp_path):
    trials = build_demo(tmp_path / "demo", scale=DEMO_SCALE).protocol("dev")
    reference = drift.make_reference(Detector.load(whole=False), trials)
    assert len(reference) == len(trials) and reference["score"].notna().all()
    assert reference["seconds"].between(1, 4).all() and reference["level_db"].between(-60, 0).all()
    path = drift.write_reference(tmp_path / "w.safetensors", reference, "demo, dev")
    again = drift.read_reference(tmp_path / "w.safetensors")
    measured = ["label", *drift.NUMBERS]
    pd.testing.assert_frame_equal(again[measured], reference[measured], check_dtype=False)
    pd.testing.assert_frame_equal(again, reference, check_dtype=False, rtol=5e-3)  # embeddings have three digits
    assert again.attrs == reference.attrs | {"made_from": "demo, dev"}
    path.write_text(json.dumps({"score": [1, 2]}))
    with pytest.raises(ConfigError, match="damaged.*deepfake-utils reference"):
        drift.read_reference(tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="have no reference"):
        drift.read_reference(tmp_path / "other.safetensors")
    for suffix in (".onnx", ".json"):
        shutil.copy(SHIPPED["phone"].with_suffix(suffix), tmp_path)
    assert main(["reference", str(tmp_path / "phone.onnx"), "--data", str(tmp_path / "demo"), "--most", "5"]) == 0
    made = drift.read_reference(tmp_path / "phone.onnx")
    assert 0 < len(made) <= 5 and made.attrs["made_from"].startswith(f"{len(made)} recordings of dev of")


def test_the_shipped_weights_have_a_reference():
    reference = drift.read_reference(SHIPPED["server"])
    assert len(reference) >= 500 and reference["score"].notna().mean() > 0.8
    assert SHIPPED["server"].with_suffix(".reference.json").stat().st_size < 80_000


# What the network's last layer sees.

WIDTH = 12
LANGUAGES = np.random.default_rng(8).normal(size=(4, WIDTH))  # where each lies


def speak(rng, n: int, *languages: int, moved: float = 0.0) -> tuple[np.ndarray, pd.DataFrame]:
    """Embeddings of recordings of two kinds in some languages, and their trials; moved by a new codec, say."""
    spoken, label = rng.choice(languages, n), rng.integers(0, 2, n)
    noise = rng.normal(size=(n, WIDTH)) * np.linspace(2, 0.5, WIDTH)
    change = np.full(WIDTH, moved / np.sqrt(WIDTH))
    embeddings = LANGUAGES[spoken] + 6 * label[:, None] * np.eye(WIDTH)[0] + noise + change
    return embeddings, pd.DataFrame({"label": label, "attack": "-", "language": spoken.astype(str)})


def embedded(embeddings: np.ndarray, projection: dict, rng) -> pd.DataFrame:
    table = draw(rng, len(embeddings)).join(as_numbers(embeddings, projection))
    table.attrs["embedding"] = projection
    return table


def share_of_alarms(projected: bool, *, n_reports: int = 20, **stream) -> float:
    """Of reports in which an embedding is named, where the reference has languages 0, 1 and 2."""
    rng = np.random.default_rng(9)
    embeddings, trials = speak(rng, 600, 0, 1, 2)
    projection = fit_projection(embeddings, trials if projected else trials.drop(columns="language"))
    reference = embedded(embeddings, projection, rng)
    named = []
    for _ in range(n_reports):
        heard, _ = speak(rng, 100, *stream.get("languages", (0, 1, 2)), moved=stream.get("moved", 0.0))
        report = drift.find_drift(reference, embedded(heard, projection, rng), 0.05).set_index("what")
        named.append(report["drifted"].filter(like="embedding").any())
    return float(np.mean(named))


def test_a_language_that_the_reference_knows_is_no_drift_of_embeddings_and_a_codec_is():
    at_most = binom.ppf(0.999, 20, 0.05) / 20
    assert share_of_alarms(True) <= at_most
    for language in (0, 1, 2):
        assert share_of_alarms(True, languages=(language,)) <= at_most
    assert share_of_alarms(False, languages=(1,)) > 0.9
    assert share_of_alarms(True, languages=(3,)) > 0.5  # one that it does not know
    assert share_of_alarms(True, moved=3.0) > 0.9


def test_directions_are_orthonormal_and_without_what_languages_differ_in():
    embeddings, trials = speak(np.random.default_rng(10), 900, 0, 1, 2)
    projection = fit_projection(list(embeddings) + [None], pd.concat([trials, trials[:1]]))
    directions = np.array(projection["directions"])
    assert directions.shape == (4, WIDTH) and projection["languages"] == ["0", "1", "2"]
    np.testing.assert_allclose(directions @ directions.T, np.eye(4), atol=1e-4)
    means = [embeddings[(trials["language"] == name) & (trials["label"] == 1)].mean(axis=0) for name in "012"]
    assert np.abs(directions @ (means[0] - means[1])).max() < 1e-3
    assert np.abs(directions @ (means[0] - means[2])).max() < 1e-3


def test_few_recordings_of_a_language_say_nothing_of_it():
    embeddings, trials = speak(np.random.default_rng(11), 70, 0, 1, 2)  # some 12 of a label and language
    assert fit_projection(embeddings, trials)["languages"] == []
    assert fit_projection([None] * 3, trials[:3]) is None and fit_projection([np.zeros(0)] * 3, trials[:3]) is None


def test_where_embeddings_cannot_be_compared_the_report_says_why():
    rng = np.random.default_rng(12)
    embeddings, trials = speak(rng, 100, 0)
    reference = embedded(embeddings, fit_projection(embeddings, trials), rng)
    stream = draw(rng, 60).assign(id=[f"{i}" for i in range(60)])
    heard = pd.Series(list(embeddings[:30]), index=stream["id"][:30])  # the older half was recorded without
    tested, why = drift.with_embeddings(stream, heard, reference)
    assert why == "" and tested["embedding_1"].notna().sum() == 30
    np.testing.assert_allclose(tested["embedding_2"][:30], reference["embedding_2"][:30])
    assert "embedding 4" in drift.find_drift(reference, tested)["what"].tolist()
    for other, of, words in (
        (heard, draw(rng, 100), "make it anew"),
        (heard[:0], reference, "recorded without"),
        (heard.map(lambda value: value[:5]), reference, "not the 12 numbers"),
    ):
        untested, why = drift.with_embeddings(stream, other, of)
        assert untested is stream and words in why
        assert len(drift.find_drift(reference, untested)) == 5


def test_a_verdict_is_recorded_with_the_embedding_that_the_reference_has_of_it(tmp_path):
    trials = build_demo(tmp_path / "demo", scale=DEMO_SCALE).protocol("dev")
    detector, records = Detector.load(whole=False), Records(f"sqlite:///{tmp_path}/records.sqlite")
    reference = drift.make_reference(detector, trials)
    with open(trials["path"][3], "rb") as file:
        heard = listen_to(file, InService(detector, "v"), 600, Event())
    id = records.add_verdict(client="c", sha256="0" * 64, **heard.columns)
    numbers, why = drift.with_embeddings(records.verdicts(), records.embeddings([id]), reference)
    found, expected = numbers.filter(like="embedding_"), reference.filter(like="embedding_")
    assert why == "" and len(expected.columns) >= 2
    assert found.loc[0].tolist() == pytest.approx(expected.loc[3].tolist(), rel=1e-3, abs=1e-4)


# The report.


def fill(records: Records, n: int, embeddings: np.ndarray, **changes) -> None:
    table, rng = draw(np.random.default_rng(6), n, **changes), np.random.default_rng(7)
    for i, row in enumerate(table.itertuples()):
        score = None if np.isnan(row.score) else row.score
        word = "no verdict" if score is None else "real" if score > 0.5 else "fake" if score < -0.5 else "uncertain"
        id = records.add_verdict(
            client=row.client, sha256=f"{i:064x}", score=score, verdict=word, model="base-1", calibration="c",
            seconds=row.seconds, speech_seconds=1.0, level_db=row.level_db, bandwidth_hz=row.bandwidth_hz,
            embedding=embeddings[i],
            at=time.time() - 86_400 * rng.uniform(0, 6),
        )  # fmt: skip
        if i % 10 == 0:
            records.add_feedback(id, client=row.client, truth="bonafide", confirmed=i % 20 == 0)


def test_the_report_is_a_notebook_with_pictures_that_show(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # as in the README: the records are named from where the command is given
    weights = tmp_path / "models" / "base-1" / "weights.safetensors"
    Versions(tmp_path / "models").take_over("installed", weights, "base-1")
    rng = np.random.default_rng(5)
    embeddings, trials = speak(rng, 300, 0, 1)
    reference = embedded(embeddings, fit_projection(embeddings, trials), rng)
    drift.write_reference(weights, reference.drop(columns="client"), "dev of a corpus")
    url = "sqlite:///records.sqlite"
    fill(Records(url), 120, speak(rng, 120, 0, moved=6.0)[0], level_db=-6.0)
    code = main(["monitor", "--database", url, "--models", str(tmp_path / "models"), "--out", str(tmp_path / "out")])
    assert code == 0 and "drift: level, embedding" in capsys.readouterr().out
    executed = nbformat.read(tmp_path / "out" / "monitor.ipynb", as_version=4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert len(list((tmp_path / "out" / "monitor" / "figures").glob("*.png"))) == 3
    assert "Languages projected out of the embeddings: 0, 1." in str(outputs)
    assert not any("<Figure" in str(output) for output in outputs)


def test_a_mistyped_folder_of_models_is_not_made(tmp_path, capsys):
    command = ["monitor", "--database", "sqlite://", "--models", str(tmp_path / "nowhere"), "--out", str(tmp_path)]
    assert main(command) == 2 and "nowhere: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("days", ["0", "-1", "nan", "1e9"])
def test_a_time_that_is_none_is_refused_before_anything_is_rendered(days, tmp_path, capsys):
    command = ["monitor", "--database", "sqlite://", "--models", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*command, "--days", days]) == 2
    assert "how many days" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_report_is_a_pair():
    text, notebook = jupytext.read(NOTEBOOKS / "monitor.py"), nbformat.read(NOTEBOOKS / "monitor.ipynb", as_version=4)
    cells = [[(cell.cell_type, cell.source) for cell in half.cells] for half in (text, notebook)]
    assert cells[0] == cells[1], "run `make sync`"
    bootstrap = jupytext.read(NOTEBOOKS / "02_train.py").cells[1].source
    assert text.cells[1].source == bootstrap


def test_every_number_on_the_dashboard_is_one_that_the_service_tells():
    text = (NOTEBOOKS.parent / "deepfake_utils" / "serving" / "grafana.json").read_text()
    assert {panel["type"] for panel in json.loads(text)["panels"]} >= {"timeseries", "heatmap", "table", "stat"}
    in_service = SimpleNamespace(version="v", calibration="c")
    places = (Places(1, "uploads"), Places(1, "streams"))
    scorer = SimpleNamespace(waiting=Places(1, "recordings"), current=in_service, problem="")
    lines = Metrics(scorer, *places).text().decode()
    ending = {"counter": "", "gauge": "", "histogram": "_bucket"}  # a counter's name ends in _total already
    told = {name + ending[kind] for name, kind in re.findall(r"# TYPE (\w+) (\w+)", lines)}
    asked = set(re.findall(r"\bdeepfake_\w+", text))
    assert asked <= told, asked - told


def test_a_file_that_is_no_database_is_told_in_a_line(tmp_path, capsys):
    (tmp_path / "records.sqlite").write_text("no database at all, but text")
    for database in (f"sqlite:///{tmp_path}/records.sqlite", str(tmp_path / "records.sqlite")):
        out = tmp_path / "out"
        assert main(["monitor", "--database", database, "--models", str(tmp_path), "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("deepfake_utils: ") and "Traceback" not in said and not out.exists(), said
