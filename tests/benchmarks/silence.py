"""What the leading silence of ASVspoof 2019 LA is worth to a published AASIST: where it looks, and what it then says.

    python tests/benchmarks/silence.py --data LA --weights AASIST.pth      # 80 s on one core

Takes the first 50 recordings of each class of the dev split. Leading silence is what `trimmed.speech_span` says: whole
10 ms frames before the first one within 40 dB of the loudest. A clip is called spoofed where the log odds of bona fide
(the difference of the two logits) are below 0. Attention is the share that the first of 29 spans (0.14 s) receives
from all spans, in units of an even share.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepfake_utils import find_corpora, load_model
from deepfake_utils.conventions import BONAFIDE, CROP_SAMPLES, SAMPLE_RATE_HZ, SPOOF
from deepfake_utils.probing.model import temporal_attention
from deepfake_utils.waveforms.decode import fit_length, read_audio
from deepfake_utils.waveforms.trimmed import speech_span

N_RECORDINGS = 50  # of each class


def look(model, waveform: np.ndarray) -> tuple[float, float]:
    """Attention of the first span, in even shares, and the log odds of bona fide."""
    clip = fit_length(waveform, CROP_SAMPLES)
    attention, _ = temporal_attention(model, clip)
    with torch.no_grad():
        logits = model(torch.from_numpy(clip)[None]).logits[0]
    return len(attention) * attention[:, 0].mean(), float(logits[BONAFIDE] - logits[SPOOF])


def describe(name: str, measured: list[tuple[float, float]]) -> None:
    """One line: attention, log odds, and how many are called what."""
    attention, odds = np.transpose(measured)
    low, middle, high = np.percentile(attention, (10, 50, 90))
    print(
        f"{name:<34} attention median {middle:4.1f} (8 of 10: {low:4.1f} to {high:4.1f})   "
        f"log odds median {np.median(odds):5.1f}   {np.sum(odds >= 0)} called bona fide, {np.sum(odds < 0)} spoofed"
    )


def main() -> None:
    """Look at both classes as recorded, at bona fide clips without their silence, at spoofs with somebody's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with ASVspoof 2019 LA")
    parser.add_argument("--weights", help="published AASIST.pth")
    options = parser.parse_args()
    if not (options.data and options.weights):  # `make bench` has neither
        print("Nothing measured: this needs --data and --weights.")
        return
    model = load_model("aasist", weights=options.weights)
    dev = find_corpora(options.data, name="asvspoof2019_la")[0].protocol("dev")
    bonafide, spoof = (
        [read_audio(path) for path in dev.loc[dev["label"] == label, "path"].head(N_RECORDINGS)]
        for label in (BONAFIDE, SPOOF)
    )
    starts = [speech_span(clip)[0] for clip in bonafide]
    silences = [clip[:start] for clip, start in zip(bonafide, starts, strict=True)]
    print(f"leading silence of bona fide clips: median {np.median(starts) / SAMPLE_RATE_HZ:.2f} s")
    describe("bona fide", [look(model, clip) for clip in bonafide])
    describe("spoofed", [look(model, clip) for clip in spoof])
    trimmed = [look(model, clip[start:]) for clip, start in zip(bonafide, starts, strict=True)]
    describe("bona fide, silence cut off", trimmed)
    moved = [look(model, np.concatenate(pair)) for pair in zip(silences, spoof, strict=True)]
    describe("spoofed, after a bona fide silence", moved)


if __name__ == "__main__":
    main()
