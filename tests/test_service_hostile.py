"""Clients that mean harm, or know no better: a clear answer, memory that stays flat, and the next one is served."""

import gzip
import hashlib
import io
import json
import socket
import struct
import threading
import time
import wave
import zlib
from contextlib import ExitStack

import httpx
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("silero_vad", reason="speech is not told from noise without it")

from websockets.sync.client import connect

from deepfake_utils.scoring.detector import SHIPPED
from deepfake_utils.serving.limits import Limits
from tests.service import Running, babble, encoded

pytestmark = pytest.mark.skipif(not SHIPPED.is_file(), reason="no weights are shipped with this version")
LIMITS = {"upload_bytes": 4 * 2**20, "grace_s": 1.0, "bytes_per_s": 200_000, "concurrent": 1, "queue": 2, "uploads": 20}
GROWTH_MB = 60  # of memory that a test may leave; decoders and allocators keep some


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    running = Running(tmp_path_factory.mktemp("hostile"), LIMITS)
    running.client.post("/v1/score", content=encoded(babble()))  # what is loaded once is loaded
    yield running
    running.stop()


@pytest.fixture
def victim(hostile):
    """The service; afterwards it must be as it was."""
    before_mb = hostile.memory_mb
    yield hostile
    for _ in range(20):  # what is full is full for a moment only
        answer = hostile.client.post("/v1/score", content=encoded(babble()))
        if answer.status_code != 503:
            break
        time.sleep(0.25)
    assert answer.status_code == 200, answer.text
    assert hostile.memory_mb < before_mb + GROWTH_MB


def refused(answer: httpx.Response, *statuses: int) -> str:
    """The text of a refusal, which must be one that says what to do."""
    assert answer.status_code in statuses, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.json()["detail"]


def checksum(content: bytes, n_bits: int, polynomial: int) -> bytes:
    """A cyclic redundancy check, the highest bit first, from zero on."""
    value = 0
    for byte in content:
        value ^= byte << (n_bits - 8)
        for _ in range(8):
            value = (value << 1) ^ (polynomial if value >> (n_bits - 1) else 0)
            value &= (1 << n_bits) - 1
    return value.to_bytes(n_bits // 8, "big")


def silent_flac(hours: float, *, is_stated: bool, rate_hz: int = 8000) -> bytes:
    """Silence in a byte for every 5,000 samples: frames of 65,535 samples that are all the same (RFC 9639)."""
    block = 65_535
    n_frames = round(hours * 3600 * rate_hz / block)
    about = rate_hz << 44 | 0 << 41 | 15 << 36 | (n_frames * block if is_stated else 0)
    info = struct.pack(">HH", block, block) + bytes(6) + about.to_bytes(8, "big") + bytes(16)
    frames = []
    for number in range(n_frames):
        name = chr(number).encode("utf-8", "surrogatepass")  # numbers are written as UTF-8 writes letters
        head = b"\xff\xf8\x70\x08" + name + struct.pack(">H", block - 1)
        frame = head + checksum(head, 8, 0x07) + bytes(3)
        frames.append(frame + checksum(frame, 16, 0x8005))
    return b"fLaC\x80" + len(info).to_bytes(3, "big") + info + b"".join(frames)


def test_a_flac_of_nothing_is_one(victim):
    answer = victim.client.post("/v1/score", content=silent_flac(0.1, is_stated=True))
    assert answer.json()["verdict"] == "no verdict" and answer.json()["seconds"] == pytest.approx(360, rel=0.02)


@pytest.mark.parametrize("is_stated", [True, False])
def test_ten_hours_of_silence_in_sixty_kilobytes(victim, is_stated):
    recording = silent_flac(10, is_stated=is_stated)
    assert len(recording) < 2**16
    assert "more than 600 s" in refused(victim.client.post("/v1/score", content=recording), 413)


def lying_headers() -> dict[str, bytes]:
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(babble(1).tobytes())
    honest = sound.getvalue()
    flac = bytearray(encoded(babble(1)))
    flac[21] |= 0x0F  # 2^36 samples
    flac[22:26] = b"\xff" * 4
    return {
        "WAV of a gigabyte": honest[:40] + struct.pack("<I", 2**30) + honest[44:],
        "WAV at 1 Hz": honest[:24] + struct.pack("<I", 1) + honest[28:],
        "WAV of 65,535 channels": honest[:22] + struct.pack("<H", 65_535) + honest[24:],
        "WAV of samples without a bit": honest[:34] + bytes(2) + honest[36:],
        "WAV in a format that nobody has": honest[:20] + b"\xfe\xff" + honest[22:],
        "FLAC of a year": bytes(flac),
        "FLAC cut in half": encoded(babble(1))[:8000],
        "nothing but a name": b"fLaC",
        "noise": np.random.default_rng(0).bytes(100_000),
        "a playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "a page": b"<html><body>audio</body></html>",
    }


@pytest.mark.parametrize("kind", lying_headers())
def test_headers_that_lie(victim, kind):
    answer = victim.client.post("/v1/score", content=lying_headers()[kind])
    if kind.startswith("WAV of a gigabyte"):  # as a pipe leaves it: what is there is read, and that is said
        assert answer.json()["seconds"] == 1 and "its header promises" in answer.json()["warnings"][0]
    else:
        assert len(refused(answer, 413, 422)) > 30


def test_a_picture_of_a_hundred_million_pixels(victim):
    side = 10_000
    packer, packed = zlib.compressobj(9), b""
    for _ in range(side):
        packed += packer.compress(bytes(1 + 3 * side))
    packed += packer.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    assert len(png) < LIMITS["upload_bytes"]
    peak_mb, stop = [victim.memory_mb], threading.Event()

    def watch():
        while not stop.wait(0.01):
            peak_mb[0] = max(peak_mb[0], victim.memory_mb)

    watcher = threading.Thread(target=watch)
    before_mb = victim.memory_mb
    watcher.start()
    refused(victim.client.post("/v1/score", content=png), 422)
    stop.set()
    watcher.join()
    assert peak_mb[0] < before_mb + 3 * GROWTH_MB


def head(path: str = "/v1/score", *lines: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


def status_of(answer: bytes) -> int:
    return int(answer.split()[1]) if answer else 0


def test_an_upload_that_states_too_much_is_refused_unread(victim):
    answer = victim.raw(head("/v1/score", f"Content-Length: {10**12}"))
    assert status_of(answer) == 413 and b"4,194,304 bytes" in answer


def test_an_upload_without_end(victim):
    block = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    answer = victim.raw(head("/v1/score", "Transfer-Encoding: chunked"), *[block] * 200)
    assert status_of(answer) == 413

    started = time.monotonic()
    assert status_of(victim.raw(head("/v1/score", "Transfer-Encoding: chunked"), repeated=block)) in (0, 413)
    assert time.monotonic() - started < 20


def test_an_upload_that_brings_less_than_it_states(victim):
    answer = victim.raw(head("/v1/score", "Content-Length: 100000"), b"x" * 1000)
    assert status_of(answer) == 408 and b"1,000 bytes came" in answer


def test_an_upload_that_brings_more_than_it_states(victim):
    recording = encoded(babble(2))
    answer = victim.raw(head("/v1/score", f"Content-Length: {len(recording)}"), recording + b"NONSENSE\r\n\r\n")
    assert status_of(answer) == 200 and b"400 Bad Request" in answer


def test_clients_that_leave_in_the_middle(victim):
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", victim.port)) as connection:
            connection.sendall(head("/v1/score", "Content-Length: 1000000") + bytes(1000))


def test_more_slow_clients_than_uploads_at_a_time(victim):
    slow = [socket.create_connection(("127.0.0.1", victim.port)) for _ in range(LIMITS["uploads"] + 5)]
    try:
        for connection in slow:
            connection.sendall(head("/v1/score", "Content-Length: 1000000") + b"x")
        time.sleep(0.3)
        assert victim.client.get("/health").status_code == 200
        assert "uploads are under way" in refused(victim.client.post("/v1/score", content=b"x" * 100), 503)
        time.sleep(1.5)  # all of them have had their time
    finally:
        for connection in slow:
            connection.close()


def test_live_connections_that_say_nothing_take_no_place(victim):
    address = f"ws://127.0.0.1:{victim.port}/v1/stream"
    with ExitStack() as silent:
        for _ in range(Limits.streams + 1):
            silent.enter_context(connect(address))
        with connect(address) as socket:
            socket.send('{"sample_rate_hz": 16000}')
            assert json.loads(socket.recv(30))["type"] == "ready"


def test_a_head_that_never_ends(victim):
    started = time.monotonic()
    assert status_of(victim.raw(b"POST /v1/score HTTP/1.1\r\nX: ", timeout_s=30)) in (0, 400)
    assert time.monotonic() - started < 20
    assert status_of(victim.raw(b"POST /v1/score HTTP/1.1\r\nX: " + b"a" * 200_000)) in (0, 400)


def test_ten_thousand_files_in_one_form(victim):
    part = b'--B\r\nContent-Disposition: form-data; name="f%d"; filename="%d.wav"\r\n\r\nRIFF\r\n'
    body = b"".join(part % (i, i) for i in range(10_000)) + b"--B--\r\n"
    answer = victim.client.post("/v1/score", content=body, headers={"Content-Type": "multipart/form-data; boundary=B"})
    assert "files" in refused(answer, 400)


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=" + "B" * 5000])
def test_forms_that_are_none(victim, kind):
    refused(victim.client.post("/v1/score", content=b"--B\r\n\r\n", headers={"Content-Type": kind}), 400)


FIRST, SECOND = babble(5, seed=1), babble(7, seed=2)
SEVERAL = ["FLAC FLAC", "WAV WAV", "AIFF AIFF", "CAF CAF", "FLAC WAV", "WAV FLAC", "WAV OGG", "OGG WAV", "MP3 WAV"]


@pytest.mark.parametrize("kinds", SEVERAL)
def test_several_recordings_one_after_the_other_are_refused(victim, kinds):
    """What would be judged by the first alone, which may be as real as one likes."""
    first, second = (encoded(*pair) for pair in zip((FIRST, SECOND), kinds.split(), strict=True))
    said = refused(victim.client.post("/v1/score?keep=true", content=first + second), 422)
    near = int(said.partition("byte ")[2].split()[0].replace(",", ""))
    assert len(first) <= near < len(first) + 16 and "in a request of its own" in said
    assert not any((victim.folder / "kept").rglob(hashlib.sha256(first + second).hexdigest()))
    job = victim.client.post("/v1/jobs", content=first + second).raise_for_status().json()["id"]
    while (told := victim.client.get(f"/v1/jobs/{job}").json())["state"] in ("waiting", "running"):
        time.sleep(0.1)
    assert (told["state"], told["result"]["title"]) == ("failed", "several recordings")


@pytest.mark.parametrize("kind", ["OGG", "MP3"])
def test_streams_one_after_the_other_are_one(victim, kind):
    answer = victim.client.post("/v1/score", content=encoded(FIRST, kind) + encoded(SECOND, kind))
    assert answer.json()["seconds"] == pytest.approx(12, abs=0.2)


def test_a_recording_that_holds_what_others_begin_with_is_one(victim):
    """A WAV wrapped in a WAV, one whose writer did not know its length, a FLAC with a WAV's header in its own."""
    sound = encoded(FIRST, "WAV")
    wrapped = sound[:40] + struct.pack("<I", len(sound)) + sound
    piped = sound[:40] + b"\xff" * 4 + sound[44:] + sound
    flac = encoded(FIRST)
    foreign = b"\x02" + struct.pack(">I", 4 + 44)[1:] + b"riff" + sound[:44]
    for recording in (wrapped, piped, flac[:42] + foreign + flac[42:]):
        assert victim.client.post("/v1/score", content=recording).json().get("seconds", 0) >= 5, recording[:60]


def form_of(*parts: tuple[str, bytes]) -> bytes:
    """A form of parts, each the end of its Content-Disposition and its content."""
    return (
        b"".join(
            b"--B\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (about.encode(), content)
            for about, content in parts
        )
        + b"--B--\r\n"
    )


@pytest.mark.parametrize(
    "parts, said",
    [
        (['name="file"; filename="a.flac"', 'name="file"; filename="b.flac"'], "Maximum number of files is 1"),
        (['name="a"; filename="a.flac"', 'name="b"; filename="b.flac"'], "Maximum number of files is 1"),
        (['name="file"; filename="a.flac"', 'name="other"'], "a field 'other', which is no file"),
        (['name="file"'], "a field 'file', which is no file"),
        ([], "no recording in the form"),
    ],
)
@pytest.mark.parametrize("address", ["/v1/score", "/v1/jobs"])
def test_forms_of_anything_but_one_file_are_refused(victim, address, parts, said):
    body = form_of(*((about, encoded(FIRST[:16_000], "OGG")) for about in parts))
    kind = "Multipart/Form-Data; boundary=B"  # in whatever case
    told = refused(victim.client.post(address, content=body, headers={"Content-Type": kind}), 400)
    assert said in told and "curl -F file=@call.m4a" in told


@pytest.mark.parametrize("kept", ["-F keep=true", "?kept=true"])
def test_a_wish_that_is_not_understood_is_not_passed_over(victim, kept):
    if kept.startswith("?"):
        assert "kept" in refused(victim.client.post(f"/v1/score{kept}", content=encoded(FIRST)), 422)
    else:
        form = {"data": {"keep": "true"}, "files": {"file": encoded(FIRST)}}
        assert "/v1/score?keep=true" in refused(victim.client.post("/v1/score", **form), 400)


def test_content_that_is_encoded_once_more_is_refused(victim):
    as_gzip = {"content": gzip.compress(encoded(FIRST, "WAV")), "headers": {"Content-Encoding": "gzip"}}
    for address in ("/v1/score", "/v1/jobs", "/v1/feedback"):
        assert "gzip" in refused(victim.client.post(address, **as_gzip), 415)


def test_many_tiny_files_one_after_the_other(victim):
    statuses = {victim.client.post("/v1/score", content=b"RIFF%d" % i).status_code for i in range(200)}
    assert statuses == {422}


@pytest.mark.parametrize(
    "name", ["../../../../tmp/owned", "/etc/passwd", "a\\..\\b", "x" * 5000, "\u202egpj.exe", "%00"]
)
def test_names_are_no_paths(victim, name):
    answer = victim.client.post("/v1/score?keep=true", files={"file": (name, encoded(babble()))})
    assert answer.status_code in (200, 400)
    inside = {path.name for path in victim.folder.rglob("*") if path.is_file()}
    assert all(len(name) == 64 or name.startswith("records.sqlite") for name in inside), inside


@pytest.mark.parametrize(
    "bomb",
    [
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b'{"verdict_id": "x", "truth": "spoof", "note": "' + b"n" * 60_000 + b'"}',
        b'{"verdict_id": ' + b"9" * 60_000 + b"}",
        b"\xff\xfe\x00",
        b"",
    ],
)
def test_json_bombs(victim, bomb):
    refused(victim.client.post("/v1/feedback", content=bomb), 422)


def test_what_postgresql_does_not_take_never_gets_there(postgres_url, tmp_path):
    """Zero bytes, and an address that is as long as a proxy lets it be."""
    running = Running(tmp_path, database=postgres_url)
    try:
        scored = running.client.post("/v1/score", content=encoded(babble(2)), headers={"X-Forwarded-For": "a" * 5000})
        id = scored.raise_for_status().json()["id"]
        refused(running.client.post("/v1/feedback", json={"verdict_id": id, "truth": "spoof", "note": "a\0b"}), 422)
        refused(running.client.post("/v1/feedback", json={"verdict_id": "\0", "truth": "spoof"}), 404)
        refused(running.client.get("/v1/jobs/%00"), 404)
    finally:
        running.stop()


def test_a_large_json_bomb(victim):
    refused(victim.client.post("/v1/feedback", content=b"[" * 10_000_000), 413)


def test_more_than_there_is_room_for(victim):
    """One is looked at, two wait; the others are told so at once, and those who were let in get their verdict."""
    recording, answers = encoded(babble(60)), []

    def ask():
        answers.append(httpx.post(f"{victim.url}/v1/score", content=recording, timeout=60))

    asking = [threading.Thread(target=ask) for _ in range(12)]
    for one in asking:
        one.start()
    for one in asking:
        one.join()
    statuses = sorted(answer.status_code for answer in answers)
    assert set(statuses) == {200, 503} and statuses.count(200) >= 3
    busy = next(answer for answer in answers if answer.status_code == 503)
    assert busy.headers["retry-after"] and json.loads(busy.text)["limit"] == {"concurrent": 1, "queue": 2}


def test_a_method_or_address_that_is_none(victim):
    refused(victim.client.get("/v1/score"), 405)
    refused(victim.client.get("/../../etc/passwd"), 404)
    refused(victim.client.post("/v1/score?keep=perhaps", content=b"x"), 422)
