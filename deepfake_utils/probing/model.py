"""Questions put to a countermeasure about single recordings, and a simple second system to hold it against."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from tqdm.auto import tqdm

from deepfake_utils.conventions import BONAFIDE, CROP_SAMPLES, SAMPLE_RATE_HZ, ConfigError
from deepfake_utils.models.aasist import AASIST
from deepfake_utils.models.lfcc import Lfcc
from deepfake_utils.scoring.score import SCORING_BATCH
from deepfake_utils.waveforms.decode import fit_length, from_int16

FFT_SAMPLES, HOP_SAMPLES = 512, 160  # of the time-frequency grid that relevance is told on: 32 ms every 10 ms


def window_scores(
    model: nn.Module,
    waveform: np.ndarray,
    *,
    window_s: float = 1.0,
    hop_s: float = 0.5,
    n_samples: int = CROP_SAMPLES,
) -> pd.DataFrame:
    """Score stretches of a clip, each as if it were a recording of its own.

    Args:
        model: a countermeasure in evaluation mode.
        waveform: samples (n,) at 16 kHz; the part up to n_samples is looked at, as in scoring.
        window_s, hop_s: length of a stretch and largest distance of their starts, seconds; a clip shorter than
            window_s is one stretch.
        n_samples: evaluated length; stretches are repeated end to end up to it, as short clips are.

    Returns:
        start_s, stop_s, score (logit of bona fide): one row a stretch.
    """
    waveform = np.asarray(waveform[:n_samples], dtype=np.float32)
    size, hop = int(window_s * SAMPLE_RATE_HZ), int(hop_s * SAMPLE_RATE_HZ)
    last = max(len(waveform) - size, 0)
    starts = np.linspace(0, last, -(-last // hop) + 1).astype(int)  # the last stretch ends with the clip
    stretches = np.stack([fit_length(waveform[start : start + size], n_samples) for start in starts])
    device = next(model.parameters()).device
    with torch.no_grad():
        logits = [model(batch.to(device)).logits for batch in torch.from_numpy(stretches).split(SCORING_BATCH)]
    scores = torch.cat(logits)[:, BONAFIDE].double().cpu().numpy()
    stops = np.minimum(starts + size, len(waveform))
    return pd.DataFrame({"start_s": starts / SAMPLE_RATE_HZ, "stop_s": stops / SAMPLE_RATE_HZ, "score": scores})


def relevance(
    model: nn.Module,
    waveform: np.ndarray,
    *,
    n_bands: int = 32,
    frame_s: float = 0.05,
    n_samples: int = CROP_SAMPLES,
) -> np.ndarray:
    """Return how much each cell of the time-frequency plane holds the score up (positive) or down (negative).

    The clip is taken apart by a short-time Fourier transform whose every coefficient has a gain of 1, and put
    together again before it goes into the model. The derivative of the score by those gains, summed over the
    coefficients of a cell, is the first-order change of the score when the cell is turned up, and with the other
    sign when it is turned down: gradient times input (A. Shrikumar et al., arXiv 1605.01713) in the
    time-frequency plane. It describes small changes; taking a cell away altogether may do something else.

    Args:
        model: a countermeasure in evaluation mode; its weights get no gradient.
        waveform: samples (n,) at 16 kHz; the part up to n_samples is looked at.
        n_bands: cells from 0 to 8 kHz; frame_s: length of a cell, seconds.

    Returns:
        (n_bands, frames), change of the logit of bona fide per unit gain.
    """
    like = next(model.parameters())
    device = like.device
    clip = torch.from_numpy(np.array(waveform[:n_samples])).to(like)
    window = torch.hann_window(FFT_SAMPLES).to(like)
    grid = {"n_fft": FFT_SAMPLES, "hop_length": HOP_SAMPLES, "window": window, "pad_mode": "constant"}
    spectrum = torch.stft(clip, **grid, return_complex=True)
    gain = torch.ones_like(spectrum.real, requires_grad=True)
    rebuilt = torch.istft(spectrum * gain, n_fft=FFT_SAMPLES, hop_length=HOP_SAMPLES, window=window, length=len(clip))
    repeated = rebuilt[torch.arange(n_samples, device=device) % len(clip)]
    # cuDNN differentiates a recurrent layer in training mode only.
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        score = model(repeated[None]).logits[0, BONAFIDE]
        (by_gain,) = torch.autograd.grad(score, gain)
    return _pool(by_gain.cpu().numpy(), n_bands, max(1, round(frame_s * SAMPLE_RATE_HZ / HOP_SAMPLES)))


def _pool(values: np.ndarray, n_bands: int, n_frames: int) -> np.ndarray:
    """Sums over cells of (bins, frames); the Nyquist bin goes to the last band."""
    bands = np.add.reduceat(values, np.linspace(0, len(values) - 1, n_bands, endpoint=False).astype(int), axis=0)
    return np.add.reduceat(bands, np.arange(0, values.shape[1], n_frames), axis=1)


@torch.no_grad()
def temporal_attention(model: nn.Module, waveform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how each span of a clip attends to the others in AASIST's temporal graph, and which spans pooling keeps.

    Args:
        model: an AASIST in evaluation mode, also one whose logits come from its loss.
        waveform: samples (n,) at 16 kHz, taken as they are.

    Returns:
        (N, N), row i is how span i spreads its attention, summing to 1; and (N,) bool.

    Raises:
        ConfigError: the model is no AASIST, so that it has no temporal graph.
    """
    aasist = next((module for module in model.modules() if isinstance(module, AASIST)), None)
    if aasist is None:
        raise ConfigError(f"temporal_attention: {type(model).__name__} has no temporal graph; expected an AASIST")
    attention, kept = aasist.attention_over_time(torch.from_numpy(waveform)[None].to(next(model.parameters())))
    is_kept = torch.zeros(attention.shape[1], dtype=torch.bool)
    is_kept[kept.flatten().cpu()] = True
    return attention[0].cpu().numpy(), is_kept.numpy()


def project(embeddings: np.ndarray, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Return embeddings (n, D) in two dimensions, (n, 2) each, by PCA and, from 20 trials on, by t-SNE.

    PCA is linear: what is apart in it is apart. t-SNE keeps neighbours together; distances between its clusters and
    their sizes mean nothing. The keys are titles that say how much variance PCA shows.
    """
    standard = StandardScaler().fit_transform(embeddings)
    pca = PCA(n_components=2, random_state=seed)
    points = pca.fit_transform(standard)
    maps = {f"PCA ({100 * pca.explained_variance_ratio_.sum():.0f} % of the variance)": points}
    if len(embeddings) >= 20:
        perplexity = min(30.0, len(embeddings) / 4)
        tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed)
        maps[f"t-SNE (perplexity {perplexity:g})"] = tsne.fit_transform(standard)
    return maps


def cepstral_statistics(source, *, progress: str | None = "LFCC") -> np.ndarray:
    """Return the mean and standard deviation over time of each LFCC of each clip, (n, 120).

    source: anything with len and `clip(i)` -> int16 (n,), as `waveforms.open_source` gives it.
    """
    lfcc = Lfcc()
    rows = []
    for i in tqdm(range(len(source)), desc=progress, unit="utt", leave=False, disable=progress is None):
        clip = from_int16(source.clip(i))
        clip = fit_length(clip, max(len(clip), 4 * lfcc.config.window_samples))
        features = lfcc(torch.from_numpy(clip)[None])[0]
        rows.append(torch.cat([features.mean(1), features.std(1)]).numpy())
    return np.stack(rows)


def fit_cepstral_baseline(statistics: np.ndarray, labels: np.ndarray) -> Pipeline:
    """Fit a logistic regression on LFCC statistics: a second system that costs seconds and hears no order in time.

    Its `.decision_function(statistics)` is the score, higher = more bona fide. Regularised (C = 0.1), classes weighted
    alike.
    """
    regression = LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000)
    return make_pipeline(StandardScaler(), regression).fit(statistics, labels)
