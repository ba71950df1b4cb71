"""The whole of it with real processes: serve, listen, be killed, be told, learn, take over, go back.

    PYTHONPATH=. python tests/service_story.py [--short] [--folder FOLDER]

A service is sent recordings that are good, hostile, long and live, and is killed while it answers; clients say what the
recordings were, one of them the opposite; a retraining is killed while it trains, and started again; its candidate
takes over and is taken back, and the service follows. What the service answered is noted in FOLDER/accepted.txt; the
story itself may be killed and started again with the same folder, and in the end nothing that was ever accepted may be
missing. --short: notebooks of a few lines, a small corpus and rules that let anything through; otherwise the real ones,
which takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
from websockets.sync.client import connect

from deepfake_utils.demo import build_demo
from deepfake_utils.serving import retraining
from deepfake_utils.serving.records import Records
from deepfake_utils.serving.versions import Versions
from tests.service import Running, babble, encoded
from tests.small_retraining import EASY_RULES, SETTINGS, train_base, write_notebooks, write_rules

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = ("ann", "bob", "eve")  # eve says the opposite of the truth, also of recordings that the others have, too
HOSTILE = {
    "no audio at all": b"<html>" * 100,
    "nothing": b"",
    "a FLAC cut off in its head": encoded(babble(2))[:40],
    "what calls itself WAV": b"RIFF\xff\xff\xff\x7fWAVE" + bytes(range(256)) * 4,
}


class Story:
    """One telling, in a folder that may hold what an earlier one left."""

    def __init__(self, folder: Path, short: bool):
        self.folder, self.short, self.rows = folder, short, []
        folder.mkdir(parents=True, exist_ok=True)
        self.notebooks = folder / "notebooks" if short else ROOT / "notebooks"
        self.models, self.ledger = folder / "service" / "models", folder / "accepted.txt"
        self.scale = 0.1 if short else 1.0

    def say(self, what: str, result: str) -> None:
        """A row of the table, printed at once."""
        self.rows.append((what, result))
        print(f"{what:<44}{result}", flush=True)

    def tell(self) -> None:
        """All of it, in order."""
        self.make_base()
        self.start()
        try:
            self.send_good()
            self.send_hostile()
            self.send_long_and_live()
            self.give_feedback()
            self.learn()
            self.take_over_and_back()
            self.count()
        finally:
            self.service.stop()

    def make_base(self) -> None:
        """A first countermeasure, trained for a moment on the demo corpus."""
        corpus = build_demo(self.folder / "demo", scale=self.scale)
        base = self.folder / "base"
        if not (base / "02_train" / "result.json").is_file():
            if self.short:
                train_base(base, corpus, learning_rate=1e-5)
            else:
                parameters = {"preset": "short", "model": SETTINGS["model"], "epochs": 1, "crop_s": 1, "batch_size": 8}
                asked = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
                command = [sys.executable, ROOT / "notebooks" / "run.py", ROOT / "notebooks" / "02_train.ipynb"]
                command += ["--data", corpus.root, "--into", base, "-p", "time_budget_s", "0", *asked]
                subprocess.run(command, check=True, capture_output=True)
        if self.short and not self.notebooks.exists():
            write_notebooks(self.notebooks)
        rules = tomllib.loads(retraining.RULES.read_text(encoding="utf-8"))
        write_rules(self.folder / "rules.toml", rules, largest_share=0.25, **EASY_RULES if self.short else {})
        n = self.n_decided  # once it was learned from, a recording teaches nothing new
        heard = build_demo(self.folder / f"heard-{n}", seed=1 + n, scale=self.scale)
        self.heard = pd.concat(heard.protocol(split) for split in ("dev", "eval"))
        self.say("base", f"trained on {len(corpus.protocol('train'))} trials of the demo corpus")

    @property
    def n_decided(self) -> int:
        """How many retrainings ended with a decision, in all tellings."""
        return sum(line["event"] in ("promoted", "refused") for line in Versions(self.models).history())

    def start(self) -> None:
        """A service, with a token for each client."""
        self.service = Running(self.folder / "service", tokens={f"token of {name}": name for name in CLIENTS})
        self.url = f"sqlite:///{self.folder}/service/records.sqlite"

    def ask(self, client: str, method: str, address: str, **content) -> httpx.Response:
        """One request of a client's."""
        headers = {"Authorization": f"Bearer token of {client}"}
        return self.service.client.request(method, address, headers=headers, **content)

    def note(self, answer: dict) -> None:
        """Write down that an answer came: from now on it may not get lost."""
        with self.ledger.open("a") as ledger:
            ledger.write(answer["id"] + "\n")

    def send_good(self) -> None:
        """Every recording to be kept, from three clients at a time; half way the service is killed."""
        rows = list(self.heard.itertuples())
        shared, others = rows[:8], rows[8:]  # all clients have the first ones, of the others each has its own
        self.verdicts, lock, half = {}, threading.Lock(), threading.Event()

        def send(client: str, mine: list) -> None:
            for row in mine:
                recording = Path(row.path).read_bytes()
                while True:
                    try:
                        answer = self.ask(client, "POST", "/v1/score?keep=true", content=recording)
                    except (httpx.TransportError, RuntimeError):  # it was killed
                        time.sleep(0.2)
                        continue
                    if answer.status_code == 200:
                        break
                    time.sleep(0.1)
                with lock:
                    self.note(answer.json())
                    self.verdicts[answer.json()["id"]] = (client, row.label)
                    if len(self.verdicts) >= n / 2:
                        half.set()

        parts = {name: shared + others[i::3] for i, name in enumerate(CLIENTS)}
        n = sum(map(len, parts.values()))
        senders = [threading.Thread(target=send, args=part) for part in parts.items()]
        for sender in senders:
            sender.start()
        half.wait()
        self.service.kill()
        self.start()
        for sender in senders:
            sender.join()
        self.say("good recordings, killed half way", f"{len(self.verdicts)} of {n} answered")

    def send_hostile(self) -> None:
        """Things that are no recordings, each followed by one that is."""
        said = []
        for name, content in HOSTILE.items():
            answer = self.ask("eve", "POST", "/v1/score", content=content)
            assert 400 <= answer.status_code < 500 and answer.json()["detail"], f"{name}: {answer.text}"
            said.append(str(answer.status_code))
            self.note(self.ask("ann", "POST", "/v1/score", content=encoded(babble(2))).raise_for_status().json())
        self.say("hostile", f"{len(said)} refused ({', '.join(said)}), the next one served each time")

    def send_long_and_live(self) -> None:
        """A long recording as a job, with the service killed once it was accepted; and a stream."""
        recording = encoded(babble(30 if self.short else 700))
        job = self.ask("bob", "POST", "/v1/jobs", content=recording).raise_for_status().json()["id"]
        self.service.kill()
        self.start()
        while (state := self.ask("bob", "GET", f"/v1/jobs/{job}").json())["state"] in ("waiting", "running"):
            time.sleep(0.2)
        self.note(state["result"])
        self.say("long, killed after it was accepted", f"{state['state']}: {state['result']['seconds']:.0f} s")
        samples, n_windows = babble(12).astype("<i2"), 0
        with connect(self.service.url.replace("http", "ws") + "/v1/stream") as socket:
            socket.send(json.dumps({"sample_rate_hz": 16_000, "token": "token of bob"}))
            for chunk in np.array_split(samples, 24):
                socket.send(chunk.tobytes())
            socket.send(json.dumps({"end": True}))
            while (message := json.loads(socket.recv(60)))["type"] != "verdict":
                n_windows += message["type"] == "window"
        self.note(message)
        self.say("live", f"{n_windows} windows, then: {message['verdict']}")

    def give_feedback(self) -> None:
        """What every recording was, eve's turned round; somebody confirms it all."""
        records, n_flipped = Records(self.url), 0
        for id, (client, label) in self.verdicts.items():
            truth = "bonafide" if bool(label) != (client == "eve") else "spoof"
            n_flipped += client == "eve"
            told = self.ask(client, "POST", "/v1/feedback", json={"verdict_id": id, "truth": truth}).raise_for_status()
            self.note(told.json())
        n = records.confirm_feedback(*records.feedback()["id"])
        self.say("feedback", f"{n} confirmed, {n_flipped} of them turned round by eve")

    def learn(self) -> None:
        """A retraining, killed while it trains, and started again."""
        command = [
            sys.executable, "-m", "deepfake_utils", "retrain", "--feedback", self.url, "--base", self.folder / "base",
            "--models", self.models, "--notebooks", self.notebooks, "--rules", self.folder / "rules.toml",
            "-p", "epochs", "4",
        ]  # fmt: skip
        place = self.models / "retrainings" / str(1 + self.n_decided)
        with (self.folder / "retraining.txt").open("ab") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment())
            while process.poll() is None and not list(place.glob("run/02_train/*")):
                time.sleep(0.05)
            assert process.poll() is None, (self.folder / "retraining.txt").read_text()
            process.kill()
            process.wait()
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, env=environment())
            log.write(done.stdout.encode())
        assert done.returncode == 0, (self.folder / "retraining.txt").read_text()[-3000:]
        judged = pd.read_csv(place / "feedback.csv", keep_default_na=False)
        counts = judged.groupby(["client", "outcome"]).size()
        self.say("believed", "; ".join(f"{client} {n} {outcome}" for (client, outcome), n in counts.items()))
        assert ("eve", "accepted") not in counts.index, judged
        decision = Versions(self.models).history()[-1]
        self.promoted = decision["event"] == "promoted"
        self.say("retraining, killed while it trained", f"{decision['event']}: {'; '.join(decision['reasons'])[:200]}")

    def take_over_and_back(self) -> None:
        """The service follows a promotion and a rollback without a restart."""
        process = self.service.process.pid
        promoted = self.wait_for(Versions(self.models).current["version"])
        self.note(self.ask("ann", "POST", "/v1/score", content=encoded(babble(3))).raise_for_status().json())
        if self.promoted:
            command = [sys.executable, "-m", "deepfake_utils", "rollback", "--models", self.models]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment())
        back = self.wait_for(Versions(self.models).current["version"])
        assert self.service.process.pid == process and self.service.process.poll() is None
        self.say("in service", f"{promoted}, after rollback {back}, by the same process")

    def wait_for(self, version: str) -> str:
        """Wait until the service has taken up a version."""
        while self.ask("ann", "GET", "/ready").json()["model"] != version:
            time.sleep(0.1)
        return version

    def count(self) -> None:
        """Hold what was ever accepted against the records."""
        records = Records(self.url)
        known = set(records.verdicts()["id"]) | set(records.feedback()["id"])
        accepted = self.ledger.read_text().split()
        lost = [id for id in accepted if id not in known]
        self.say("accepted, in all tellings", f"{len(accepted)}, lost: {len(lost)}")
        assert not lost, lost
        assert not self.short or self.promoted  # its rules allow anything


def environment() -> dict:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a small corpus, notebooks of a few lines")
    parser.add_argument("--folder", type=Path, help="where everything goes; default: a new one that is deleted")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        Story((options.folder or Path(scratch)).resolve(), options.short).tell()


if __name__ == "__main__":
    main()
