"""How often a drift report raises an alarm: without drift, and with a number moved by parts of its deviation.

    PYTHONPATH=. python tests/benchmarks/drift.py [--reports N]

100 reports take a minute or two, and tell a rate of 5 % from one of 12.

    PYTHONPATH=. python tests/benchmarks/drift.py --languages FOLDER [--weights FILE]

tells instead how often embeddings raise one on another language, and on another codec. FOLDER has a folder for each of
several languages, with recordings of one kind (of 2 to 10 s, 200 at most are looked at). The directions come from half
of them, a stream and what it is compared with from the other half.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from deepfake_utils import Detector
from deepfake_utils.augment.codecs import apply_codec, draw_codec
from deepfake_utils.conventions import SAMPLE_RATE_HZ, AudioError
from deepfake_utils.files import list_audio
from deepfake_utils.scoring.weights import SHIPPED
from deepfake_utils.serving import drift
from deepfake_utils.serving.embeddings import as_numbers, fit_projection
from deepfake_utils.waveforms.decode import read_audio
from tests.test_drift import draw

SIZES = ((150, 80), (1000, 500))  # recordings of the reference, and of the stream
SHIFTS = (0.1, 0.2, 0.3, 0.5)  # of a standard deviation of the level
MOST = 200  # recordings of a language
STREAM = 80  # recordings, drawn without replacement
CODECS = {"mp3": 24, "opus": 12, "amr": 7.4}  # kilobits a second
SNR_DB = 25.0
STILL = dict.fromkeys(drift.NUMBERS, 0.0)  # the other numbers, which do not drift


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=int, default=100)
    parser.add_argument("--languages", type=Path)
    parser.add_argument("--weights", default=str(SHIPPED["server"]))
    options = parser.parse_args()
    if options.languages:
        languages(Detector.load(options.weights), options.languages, options.reports)
    else:
        shifts(options.reports)


def shifts(n_reports: int) -> None:
    """Alarms on what is drawn like the reference, and with another level."""
    rng = np.random.default_rng(0)
    deviation = draw(rng, 10_000)["level_db"].std()
    print("% of reports with an alarm without drift, at 1, 5, 20 %; % that name the level at 1 %, moved by", SHIFTS)
    for n_reference, n in SIZES:
        still = [drift.find_drift(draw(rng, n_reference), draw(rng, n))["p"].min() for _ in range(n_reports)]
        alarms = [100 * np.mean(np.array(still) < rate) for rate in (0.01, 0.05, 0.2)]
        named = []
        for shift in SHIFTS:
            reports = [
                drift.find_drift(draw(rng, n_reference), draw(rng, n, level_db=shift * deviation)).set_index("what")
                for _ in range(n_reports // 5)
            ]
            named.append(100 * np.mean([report["drifted"]["level"] for report in reports]))
        print(f"{n_reference:>5} against {n:<5}", *(f"{x:8.1f}" for x in alarms), "  |", *(f"{x:8.1f}" for x in named))


def languages(detector: Detector, folder: Path, n_reports: int) -> None:
    """Alarms of embeddings: between languages that are projected out, are not, or are all but one; and on changes."""
    names = sorted(path.name for path in folder.iterdir())
    sound = {name: recordings(folder / name) for name in names}
    heard = {name: embeddings(detector, sound[name]) for name in names}
    rng = np.random.default_rng(0)
    half = {name: np.array_split(rng.permutation(values), 2) for name, values in heard.items()}
    print({name: len(values) for name, values in heard.items()})
    first = pd.concat([trials(len(half[name][0]), name) for name in names], ignore_index=True)
    values = np.concatenate([half[name][0] for name in names])
    fits = {"all languages out": fit_projection(values, first),
            "no language out": fit_projection(values, first.drop(columns="language"))}  # fmt: skip
    streams = [(a, b) for a in names for b in names if a != b]
    for title, fit in fits.items():
        shares = [alarms(half[a][1], half[b][1], fit, n_reports) for a, b in streams]
        print(f"{title}: {100 * np.mean(shares):.1f} % of reports on another language raise an alarm at 1 %, "
              f"{100 * max(shares):.1f} % at most")  # fmt: skip
    shares = []
    for left_out in names:
        rest = first["language"] != left_out
        fit = fit_projection(values[rest], first[rest])
        shares += [alarms(half[a][1], half[left_out][1], fit, n_reports) for a in names if a != left_out]
    print(f"a language that the reference lacks: {100 * np.mean(shares):.1f} % of reports")
    fit = fits["all languages out"]
    same = [alarms(half[name][1], None, fit, n_reports) for name in names]
    print(f"the same language: {100 * np.mean(same):.1f} %")
    for change in (*CODECS, "noise"):
        changed = embeddings(detector, [changed_by(change, samples) for samples in sound[names[0]]])
        share = alarms(half[names[0]][1], changed, fit, n_reports)
        print(f"{names[0]} through {change}: {100 * share:.1f} %")


def recordings(folder: Path) -> list[np.ndarray]:
    """Waveforms at 16 kHz of 2 to 10 s."""
    found = []
    for path in np.random.default_rng(0).permutation(sorted(list_audio(folder)[0])):
        try:
            samples = read_audio(path)
        except AudioError:
            continue
        if 2 <= len(samples) / SAMPLE_RATE_HZ <= 10:
            found.append(samples)
        if len(found) == MOST:
            break
    return found


def embeddings(detector: Detector, waveforms: list[np.ndarray]) -> np.ndarray:
    """(n, D) of those in which there is speech."""
    found = []
    for samples in waveforms:
        stream = detector.stream(SAMPLE_RATE_HZ)
        stream.push(samples)
        stream.finish()
        found.append(stream.embedding)
    return np.stack([value for value in found if value is not None])


def trials(n: int, language: str) -> pd.DataFrame:
    """Of one kind, in a language."""
    return pd.DataFrame({"label": 1, "attack": "-", "language": [language] * n})


def alarms(reference: np.ndarray, stream: np.ndarray | None, fit: dict, n_reports: int) -> float:
    """Share of reports at 1 % that name an embedding; without a stream, two parts of the reference are compared."""
    rng, named = np.random.default_rng(1), 0
    for _ in range(n_reports):
        before = rng.permutation(reference)
        now = before[len(before) // 2 :] if stream is None else rng.permutation(stream)
        before = before[: len(before) // 2] if stream is None else before
        tables = [as_numbers(side[:STREAM], fit).assign(**STILL) for side in (before, now)]
        report = drift.find_drift(*tables).set_index("what")
        named += report["drifted"].filter(like="embedding").any()
    return named / n_reports


def changed_by(change: str, samples: np.ndarray) -> np.ndarray:
    """A waveform through a codec, or with white noise."""
    generator, waveform = torch.Generator().manual_seed(0), torch.from_numpy(samples)[None]
    if change in CODECS:
        drawn = draw_codec(waveform.shape, generator, codec=change, kilobits_per_s=(CODECS[change],))
        return apply_codec(waveform, drawn)[0].numpy()
    noise = torch.randn(waveform.shape, generator=generator) * waveform.square().mean().sqrt() * 10 ** (-SNR_DB / 20)
    return (waveform + noise).clamp(-1, 1)[0].numpy()


if __name__ == "__main__":
    main()
