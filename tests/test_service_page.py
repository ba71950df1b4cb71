"""The page of the service in a real browser, used by keyboard and as a screen reader meets it."""

import shutil

import pytest
import soundfile

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("silero_vad", reason="speech is not told from noise without it")

from deepfake_utils.scoring.detector import SHIPPED
from deepfake_utils.serving.records import Records
from tests.browser import Browser
from tests.service import Running, babble

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(not SHIPPED.is_file(), reason="no weights are shipped with this version"),
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    running = Running(tmp_path_factory.mktemp("page"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("recordings") / "call.wav"
    soundfile.write(path, babble(8), 16_000)
    return path


@pytest.fixture
def page(running, recording, tmp_path):
    browser = Browser(CHROMIUM, tmp_path / "profile", recording)
    browser.call("Page.navigate", url=running.url)
    browser.until("document.readyState == 'complete' && document.getElementById('limits').textContent != ''")
    yield browser
    browser.close()


def test_a_recording_is_dropped_judged_and_disputed_by_keyboard(running, recording, page):
    assert ("heading", "Is this speech real?") in page.spoken()
    page.choose("#file", recording)
    page.until("!document.getElementById('answer').hidden")
    word = page.js("document.getElementById('word').textContent")
    assert word in (
        "This sounds like a person speaking",
        "This sounds made or altered by a machine",
        "It cannot be told",
    )
    assert page.js("document.activeElement.id") == "answer"  # a screen reader goes there, and reads its heading
    n_bars, n_rows = page.js(
        "[document.querySelectorAll('#timeline rect').length, document.querySelectorAll('#windows tr').length]"
    )
    assert n_bars == n_rows == 3
    caption, reason = page.js("['figcaption', '#reason'].map(name => document.querySelector(name).textContent)")
    assert "up, green" in caption and "down, red" in caption and caption.endswith("from 0 to 8.0 s")
    assert reason[0].isupper() and reason.endswith(".")
    spoken = page.spoken()
    assert ("region", word) in spoken, spoken
    assert any("of 3 windows sound fake" in name for _, name in spoken), spoken

    for _ in range(3):  # the table's summary, the button
        page.press("Tab", 9)
        if page.js("document.activeElement.id") == "wrong":
            break
    assert page.js("document.activeElement.id") == "wrong"
    page.press("Enter", 13, "\r")
    page.until("document.activeElement.name == 'truth'")  # the first of the choices has the focus
    page.press(" ", 32, " ")
    page.js("document.querySelector('[name=note]').focus()")
    page.call("Input.insertText", text="It was me")
    page.press("Tab", 9)
    page.press("Enter", 13, "\r")
    page.until("document.getElementById('status').textContent.startsWith('Thank you')")
    feedback = Records(f"sqlite:///{running.folder}/records.sqlite").feedback()
    assert feedback[["truth", "note"]].values.tolist() == [["bonafide", "It was me"]]
    assert all(address.startswith((running.url, "data:")) for address in page.addresses), page.addresses


def test_the_microphone_is_recorded(page):
    page.js("document.getElementById('record').click()")
    page.until("document.getElementById('record').getAttribute('aria-pressed') == 'true'")
    page.js("new Promise(done => setTimeout(done, 6000))")
    page.js("document.getElementById('record').click()")
    page.until("!document.getElementById('answer').hidden || document.getElementById('status').className == 'problem'")
    assert page.js("document.getElementById('status').textContent") == ""
    assert page.js("document.getElementById('word').textContent") != ""


def test_what_cannot_be_read_is_said(page, tmp_path):
    (tmp_path / "letter.txt").write_text("no recording")
    page.choose("#file", tmp_path / "letter.txt")
    page.until("document.getElementById('status').className == 'problem'")
    assert "the recording cannot be decoded" in page.js("document.getElementById('status').textContent")
    assert ("status", "") in page.spoken() or any("cannot be decoded" in name for _, name in page.spoken())


def test_of_several_recordings_none_is_passed_over(page, recording):
    page.choose("#file", recording)
    page.until("!document.getElementById('answer').hidden")
    page.js("""(() => {
        const several = new DataTransfer();
        for (const name of ["one.wav", "two.wav"]) several.items.add(new File(["sound"], name));
        document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: several, bubbles: true}));
    })()""")
    page.until("document.getElementById('status').className == 'problem'")
    assert "2 files at once" in page.js("document.getElementById('status').textContent")
    assert page.js("document.getElementById('answer').hidden")


def test_every_field_has_a_name(page):
    fields = [name for role, name in page.spoken() if role in ("button", "checkbox", "textbox", "radio")]
    assert fields and all(fields)
