"""Vocoders of one's own: small networks that make speech audible, trained for minutes on listed real speech.

A copy of a recording by a vocoder differs from it in the vocoder alone, and to learn from such copies generalises best
(X. Wang and J. Yamagishi, arXiv 2210.10570). These differ in what the vocoders of today differ in: they start from a
mel spectrum or from a code that is learned with them; they use transposed convolutions (HiFi-GAN, arXiv 2010.05646),
repeated samples, convolutions and snake activations (BigVGAN, arXiv 2206.04658) or an inverse Fourier transform (Vocos,
arXiv 2306.00814); they are trained with and without a critic (spectrograms at three resolutions: UnivNet, arXiv
2106.07889), half way and to the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torchaudio
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from deepfake_utils.conventions import SAMPLE_RATE_HZ
from deepfake_utils.files import atomic_write
from deepfake_utils.waveforms.decode import read_audio

CROP_SAMPLES = 6400  # a multiple of every hop
BATCH_SIZE = 8
SPECTRA = ((512, 128), (1024, 256), (2048, 512))  # FFT and hop of the spectral loss, and of the critic
N_RECORDINGS = 600  # of training speech that are kept in memory, 4 s of each


@dataclass(frozen=True)
class VocoderConfig:
    """One vocoder: what it hears, how it makes samples of it, and how it is trained."""

    rates: tuple[int, ...]  # factors from frames to samples; their product is the hop
    upsampling: str  # "transposed", "nearest" or "fourier"
    n_mels: int = 0  # of the mel spectrum that it hears; 0: it learns a code of its own
    code_channels: int = 16
    channels: int = 96
    critic: bool = True
    steps: int = 1500


VOCODERS = {
    "mel-transposed": VocoderConfig((8, 8, 4), "transposed", n_mels=80),
    "mel-nearest": VocoderConfig((5, 4, 4, 2), "nearest", n_mels=100),
    "mel-fourier": VocoderConfig((256,), "fourier", n_mels=80, channels=160, steps=2500),
    "mel-fourier-plain": VocoderConfig((160,), "fourier", n_mels=64, channels=160, critic=False, steps=3000),
    "code-transposed": VocoderConfig((5, 4, 4), "transposed", channels=64, critic=False),
    "code-nearest": VocoderConfig((4, 4, 4), "nearest", channels=64),
}


class Vocoder(nn.Module):
    """(batch, samples) -> the same, made anew; samples are a multiple of the hop."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.config, hop = config, int(np.prod(config.rates))
        self.hear = MelSpectrum(config.n_mels, hop) if config.n_mels else LearnedCode(config)
        n_heard = config.n_mels or config.code_channels
        make = FourierDecoder if config.upsampling == "fourier" else UpsamplingDecoder
        self.make = make(config, n_heard, hop)

    def forward(self, waveform: Tensor) -> Tensor:
        return self.make(self.hear(waveform))


class MelSpectrum(nn.Module):
    """Log mel spectrum (batch, mels, samples / hop) of windows of 64 ms."""

    def __init__(self, n_mels: int, hop: int) -> None:
        super().__init__()
        self.hop = hop
        bank = torchaudio.functional.melscale_fbanks(513, 0.0, SAMPLE_RATE_HZ / 2, n_mels, SAMPLE_RATE_HZ)
        self.register_buffer("bank", bank.T.contiguous(), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        mel = self.bank @ magnitude(waveform, 1024, self.hop)[..., :-1]
        return mel.clamp_min(1e-5).log() / 4 + 1


class LearnedCode(nn.Module):
    """A few channels (batch, channels, samples / hop) between -1 and 1 by strided convolutions, coarsened a little."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        layers, n_in = [nn.Conv1d(1, 12, 7, padding=3)], 12
        for rate in reversed(config.rates):
            layers += [nn.LeakyReLU(0.1), nn.Conv1d(n_in, 2 * n_in, 2 * rate + 1, stride=rate, padding=rate)]
            n_in *= 2
        self.layers = nn.Sequential(*layers, nn.LeakyReLU(0.1), nn.Conv1d(n_in, config.code_channels, 3, padding=1))
        self.hop = int(np.prod(config.rates))

    def forward(self, waveform: Tensor) -> Tensor:
        code = torch.tanh(self.layers(waveform[:, None])[..., : waveform.shape[1] // self.hop])
        return code + (torch.round(8 * code) / 8 - code).detach()  # 17 levels; its gradient is that of the identity


class Snake(nn.Module):
    """x + sin(a x)^2 / a, which repeats itself as voiced speech does."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.log_a = nn.Parameter(torch.zeros(n_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        a = self.log_a.exp()
        return x + torch.sin(a * x).square() / a


class UpsamplingDecoder(nn.Module):
    """Frames to samples in stages, each of half the channels, with residual convolutions."""

    def __init__(self, config: VocoderConfig, n_heard: int, hop: int) -> None:
        super().__init__()
        n, smooth = config.channels, config.upsampling == "nearest"
        activation = Snake if smooth else (lambda _: nn.LeakyReLU(0.1))
        layers: list[nn.Module] = [nn.Conv1d(n_heard, n, 7, padding=3)]
        for rate in config.rates:
            layers.append(activation(n))
            if smooth:
                layers += [nn.Upsample(scale_factor=rate), nn.Conv1d(n, n // 2, 2 * rate + 1, padding=rate)]
            else:
                odd = rate % 2
                layers.append(nn.ConvTranspose1d(n, n // 2, 2 * rate, rate, rate // 2 + odd, odd))
            n //= 2
            layers += [Residual(n, dilation, activation) for dilation in (1, 3, 9)]
        self.layers = nn.Sequential(*layers, activation(n), nn.Conv1d(n, 1, 7, padding=3))

    def forward(self, heard: Tensor) -> Tensor:
        return torch.tanh(self.layers(heard)[:, 0])


class Residual(nn.Module):
    """x + what two convolutions make of it."""

    def __init__(self, n: int, dilation: int, activation: Callable[[int], nn.Module]) -> None:
        super().__init__()
        dilated = nn.Conv1d(n, n, 3, padding=dilation, dilation=dilation)
        self.layers = nn.Sequential(activation(n), dilated, activation(n), nn.Conv1d(n, n, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class FourierDecoder(nn.Module):
    """Magnitudes and phases by convolutions at the rate of the frames, then the inverse Fourier transform."""

    def __init__(self, config: VocoderConfig, n_heard: int, hop: int) -> None:
        super().__init__()
        n, self.hop, self.n_fft = config.channels, hop, 4 * hop
        blocks = [Residual(n, dilation, lambda _: nn.GELU()) for dilation in (1, 2, 4, 1, 2, 4)]
        self.layers = nn.Sequential(
            nn.Conv1d(n_heard, n, 7, padding=3), *blocks, nn.GELU(), nn.Conv1d(n, self.n_fft + 2, 1)
        )
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)

    def forward(self, heard: Tensor) -> Tensor:
        size, phase = self.layers(F.pad(heard, (0, 1), mode="replicate")).chunk(2, dim=1)
        spectrum = torch.polar(size.clamp(max=5.0).exp(), phase)
        samples = heard.shape[2] * self.hop
        return torch.istft(spectrum, self.n_fft, self.hop, window=self.window, length=samples)


class Critic(nn.Module):
    """How real a log spectrogram looks, place by place."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((1, 8, (3, 1)), (8, 16, (2, 2)), (16, 16, (2, 2)), (16, 16, (2, 1)))
        self.layers = nn.ModuleList(nn.Conv2d(a, b, (5, 3), stride, (2, 1)) for a, b, stride in sizes)
        self.verdict = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, spectrogram: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, seen = (spectrogram + 1e-4).log()[:, None] / 4, []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.1)
            seen.append(x)
        return self.verdict(x), seen


def magnitude(waveform: Tensor, n_fft: int, hop: int) -> Tensor:
    """(batch, n_fft / 2 + 1, frames), differentiable where the signal is silent."""
    window = torch.hann_window(n_fft, device=waveform.device)
    spectrum = torch.stft(waveform, n_fft, hop, window=window, return_complex=True)
    return (spectrum.real.square() + spectrum.imag.square() + 1e-8).sqrt()


def spectral_loss(made: list[Tensor], real: list[Tensor]) -> Tensor:
    """Of magnitudes: relative distance, and that of their logarithms (R. Yamamoto et al., arXiv 1910.11480)."""
    distance = 0.0
    for m, r in zip(made, real, strict=True):
        distance = distance + (r - m).norm() / r.norm() + F.l1_loss((m + 1e-4).log(), (r + 1e-4).log())
    return distance / len(real)


def train_vocoder(config: VocoderConfig, recordings: list[np.ndarray], seed: int, name: str = "") -> list[dict]:
    """Weights of one vocoder half way and at its end.

    Args:
        config: one of VOCODERS, or another.
        recordings: waveforms at 16 kHz, float, at least CROP_SAMPLES long.
        seed: of weights and draws.
        name: for the progress bar.
    """
    rng, states = np.random.default_rng(seed), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vocoder, critics = Vocoder(config), nn.ModuleList(Critic() for _ in SPECTRA)
    settings = {"lr": 1e-3, "betas": (0.8, 0.99)}
    maker, judge = (torch.optim.AdamW(part.parameters(), **settings) for part in (vocoder, critics))
    rate = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1e-3, total_steps=config.steps, cycle_momentum=False)
    maker_rate, judge_rate = rate(maker), rate(judge)
    for step in (bar := tqdm(range(config.steps), desc=f"vocoder {name}", leave=False)):
        real = draw_crops(recordings, rng)
        made = vocoder(real)
        spectra = [[magnitude(x, *size) for size in SPECTRA] for x in (made, real)]
        loss = spectral_loss(*spectra)
        if not config.n_mels:  # a code can keep the samples themselves
            loss = loss + 5 * F.l1_loss(made, real)
        if config.critic and step > config.steps // 4:
            update(judge, sum(critic_loss(c, m.detach(), r) for c, m, r in zip(critics, *spectra, strict=True)))
            judge_rate.step()
            loss = loss + 0.3 * sum(maker_loss(c, m, r) for c, m, r in zip(critics, *spectra, strict=True))
        update(maker, loss)
        maker_rate.step()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
        if step + 1 in (config.steps // 2, config.steps):
            states.append({key: value.detach().clone() for key, value in vocoder.state_dict().items()})
    return states


def draw_crops(recordings: list[np.ndarray], rng: np.random.Generator) -> Tensor:
    """(BATCH_SIZE, CROP_SAMPLES) at random places, at levels between 0.1 and 0.9."""
    crops = []
    for i in rng.integers(len(recordings), size=BATCH_SIZE):
        start = rng.integers(len(recordings[i]) - CROP_SAMPLES + 1)
        crop = recordings[i][start : start + CROP_SAMPLES]
        crops.append(crop * rng.uniform(0.1, 0.9) / max(np.abs(recordings[i]).max(), 1e-3))
    return torch.tensor(np.stack(crops), dtype=torch.float32)


def critic_loss(critic: Critic, made: Tensor, real: Tensor) -> Tensor:
    """Least squares: 1 for real speech, 0 for what is made."""
    return critic(made)[0].square().mean() + (critic(real)[0] - 1).square().mean()


def maker_loss(critic: Critic, made: Tensor, real: Tensor) -> Tensor:
    """What the critic sees in a copy shall be what it sees in the original, and its verdict 1."""
    verdict, seen = critic(made)
    with torch.no_grad():
        expected = critic(real)[1]
    likeness = sum(F.l1_loss(a, b) for a, b in zip(seen, expected, strict=True))
    return (verdict - 1).square().mean() + 2 * likeness


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down the gradient of the loss, no longer than 5."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 5.0)
    optimizer.step()


def trained_vocoders(folder: Path, real: pd.DataFrame, seed: int, say: Callable[[str], None]) -> list[Vocoder]:
    """All VOCODERS at both ages, out of `folder/vocoders`, where they are trained if they are not there.

    Args:
        folder: the corpus.
        real: rows of its manifest to learn from: bona fide speech of the training split.
        seed: of weights and draws.
        say: where lines of text go.
    """
    vocoders, recordings = [], []
    for number, (name, config) in enumerate(VOCODERS.items()):
        files = [folder / "vocoders" / f"{name}-{seed}-{age}.safetensors" for age in ("half", "whole")]
        if not all(file.is_file() for file in files):
            if not recordings:
                say(f"training {len(VOCODERS)} vocoders on real speech of the corpus (some minutes each)")
                recordings = training_speech(folder, real, seed)
            for file, state in zip(files, train_vocoder(config, recordings, seed + number, name), strict=True):
                file.parent.mkdir(exist_ok=True)
                with atomic_write(file) as part:
                    save_file(state, part)
        for file in files:
            vocoder = Vocoder(config).eval()
            vocoder.load_state_dict(load_file(file))
            vocoders.append(vocoder)
    return vocoders


def training_speech(folder: Path, real: pd.DataFrame, seed: int) -> list[np.ndarray]:
    """At most N_RECORDINGS waveforms, as many of a small source as of a large one."""
    order = real.sample(frac=1, random_state=seed)
    chosen = order.assign(turn=order.groupby("source").cumcount()).sort_values("turn", kind="stable")[:N_RECORDINGS]
    waveforms = [read_audio(folder / path)[: 4 * SAMPLE_RATE_HZ] for path in chosen["path"]]
    return [waveform for waveform in waveforms if len(waveform) >= CROP_SAMPLES and np.abs(waveform).max() > 1e-3]


@torch.inference_mode()
def copy_by(vocoder: Vocoder, waveform: np.ndarray) -> np.ndarray:
    """The waveform (n,) at 16 kHz made anew, as long and as loud."""
    peak, hop = max(float(np.abs(waveform).max()), 1e-3), int(np.prod(vocoder.config.rates))
    padded = np.pad(0.5 * waveform / peak, (0, max(-len(waveform) % hop, 2048 - len(waveform))))
    made = vocoder(torch.tensor(padded, dtype=torch.float32)[None, : len(padded) // hop * hop])[0].numpy()
    return 2 * peak * made[: len(waveform)]
