"""The page in a real browser, on real files: the log-odds of Python, and nothing sent anywhere."""

import shutil
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile

from deepfake_utils.__main__ import main
from deepfake_utils.browser import PAGE_FILES, RUNTIME_FILES, assemble
from deepfake_utils.conventions import CheckpointError, ConfigError
from deepfake_utils.demo.voice import draw_speaker, speak
from deepfake_utils.scoring import weights as room
from deepfake_utils.scoring.detector import SHIPPED, Detector
from deepfake_utils.waveforms.resample import resample
from tests.browser import Browser

TIMEOUT_S = 180  # a machine may be busy


class Handler(SimpleHTTPRequestHandler):
    """A plain static server that keeps what was asked for."""

    asked: list = []

    def log_message(self, *_):
        self.asked.append((self.command, self.path))


class Page(Browser):
    """A browser on the page, with one of its models at a time."""

    def open(self, name: str):
        """The page with that model, once it is ready."""
        self.name = name
        self.call("Page.navigate", url=f"{self.address}/{name}/")
        ready = "location.pathname == '/%s/' && document.getElementById('state')?.textContent == 'Ready.'"
        self.until(ready % name, TIMEOUT_S)

    def judge(self, path: Path) -> dict:
        """The page's result for a file."""
        self.js("window.result = null")
        self.choose("#file", path)
        return self.until("window.result", TIMEOUT_S)


# INT8 rounds: where two engines' spectra differ in the seventh digit, an activation now and then takes the next step.
# Then the log-odds move by as much as rounding moves them at all, of which the card has the root mean square.
TOLERANCE = {"phone": 1e-3, "laptop": 5 * room.read_companion(room.ASSETS / "laptop.onnx")["log_odds_rms"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed: the page's runtime cannot be fetched")
    for name in TOLERANCE:
        if not room.SHIPPED[name].is_file():
            pytest.skip(f"no {name} model is shipped with these weights yet")
    folder = tmp_path_factory.mktemp("page")
    try:
        phone = assemble(folder / "phone", "phone")
        assemble(folder / "laptop", "laptop", phone)
        return folder
    except ConfigError as error:
        if "npm pack" in str(error):
            pytest.skip(f"the page's runtime cannot be fetched: {error}")
        raise


@pytest.fixture(scope="module")
def browser(folder, tmp_path_factory):
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if executable is None:
        pytest.skip("Chromium is not installed")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    heard = tmp_path_factory.mktemp("heard") / "microphone.wav"
    soundfile.write(heard, resample(babble(6), 16_000), 16_000)
    browser = Page(executable, tmp_path_factory.mktemp("profile"), heard)
    try:
        browser.address = f"http://127.0.0.1:{server.server_address[1]}"
        browser.open("phone")
        yield browser
    finally:
        browser.close()
        server.shutdown()


def babble(duration_s: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    sound = speak(draw_speaker(rng), int(16_000 * duration_s), rng)
    return 0.5 * sound / np.abs(sound).max()


def same_as_python(browser: Page, path: Path) -> int:
    """Compare the page's windows of a file with the detector's; how many there are."""
    page, expected, tolerance = browser.judge(path), Detector.load(browser.name)(path), TOLERANCE[browser.name]
    assert [window["startS"] for window in page["windows"]] == pytest.approx([w.start_s for w in expected.windows])
    found = np.array([window["logOdds"] for window in page["windows"]])
    assert np.abs(found - [window.log_odds for window in expected.windows]).max(initial=0) < tolerance
    assert abs(page["logOdds"] - expected.log_odds) < tolerance
    return len(found)


@pytest.mark.parametrize("name", ["phone", "laptop"])
def test_real_files_get_the_log_odds_of_python(browser, reference_data, name):
    browser.open(name)
    files = sorted((reference_data / "asvspoof2019_subset").rglob("*.flac"))[::60][:3]
    assert sum(same_as_python(browser, path) for path in files) >= len(files)
    assert browser.js("document.getElementById('timeline').hidden") is False


@pytest.mark.parametrize(
    "rate_hz, n_channels, subtype", [(48_000, 2, "PCM_24"), (44_100, 1, "PCM_16"), (8_000, 1, "FLOAT")]
)
def test_any_rate_and_number_of_channels(browser, tmp_path, rate_hz, n_channels, subtype):
    path = tmp_path / f"{rate_hz}.wav"
    sound = np.interp(np.arange(int(9 * rate_hz)) * 16_000 / rate_hz, np.arange(9 * 16_000), babble(9))
    soundfile.write(path, np.stack([sound, 0.5 * sound][:n_channels], axis=1), rate_hz, subtype=subtype)
    assert same_as_python(browser, path) > 1


def test_silence_gets_no_verdict_and_what_is_no_audio_an_error(browser, tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(80_000), 16_000)
    assert browser.judge(tmp_path / "silence.wav")["word"] == "no verdict"
    (tmp_path / "text.wav").write_text("no audio")
    assert browser.judge(tmp_path / "text.wav")["error"]
    assert "did not work" in browser.js("document.getElementById('state').textContent")


def test_the_microphone_is_heard(browser):
    browser.js("window.result = null")
    browser.js("document.getElementById('microphone').click()")
    browser.until("document.getElementById('microphone').textContent == 'Stop'", TIMEOUT_S)
    time.sleep(6)
    browser.js("document.getElementById('microphone').click()")
    result = browser.until("window.result", TIMEOUT_S)
    assert result["name"] == "microphone" and "error" not in result


def test_only_the_page_itself_was_asked_for(browser):
    assert {command for command, _ in Handler.asked} == {"GET"}
    files = {"", *PAGE_FILES, *RUNTIME_FILES, "model.onnx", "model.json", "speech.onnx"}
    known = {f"/{name}/{file}" for name in TOLERANCE for file in files}
    assert {path for _, path in Handler.asked} <= known | {"/favicon.ico"}
    refused = "fetch('http://localhost:9/', {method: 'POST', body: 'x'}).then(() => 'sent', (problem) => 'refused')"
    assert browser.js(refused) == "refused"


def test_what_cannot_be_assembled_is_refused_in_words(tmp_path, capsys):
    with pytest.raises(CheckpointError, match="card beside it"):
        assemble(tmp_path / "page", SHIPPED)
    assert main(["browser", str(tmp_path / "page"), "--runtime", str(tmp_path)]) == 2
    assert "no onnxruntime-web package" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()
