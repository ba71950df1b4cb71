"""Scores: a trained countermeasure over a protocol or over any recordings. Higher means more bona fide."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from deepfake_utils.conventions import BONAFIDE, CROP_SAMPLES, SAMPLE_RATE_HZ, SPOOF, AudioError, ScoreError
from deepfake_utils.machine import pick_device
from deepfake_utils.waveforms import decode as audio
from deepfake_utils.waveforms import open_source
from deepfake_utils.waveforms.batches import eval_batches

SCORE_KIND = "logit of bona fide, higher is more bona fide"
SCORING_BATCH = 16  # utterances


@torch.no_grad()
def compute_outputs(
    model: nn.Module,
    source,
    *,
    n_samples: int = CROP_SAMPLES,
    batch_size: int = SCORING_BATCH,
    device: torch.device | None = None,
    with_embeddings: bool = False,
    progress: str | None = "scoring",
) -> tuple[np.ndarray, np.ndarray | None]:
    """Run a countermeasure over every clip of a source, in order, in float32.

    Args:
        model: a countermeasure; its mode is restored afterwards.
        source: from `waveforms.open_source`.
        n_samples: evaluated length; longer clips are cut, shorter ones repeated.
        with_embeddings: also return the (N, D) embeddings.
        progress: label of the progress bar, None for no bar.

    Returns:
        Logits (N, 2) float32 and embeddings (N, D) or None.
    """
    device = device or next(model.parameters()).device
    was_training = model.training
    model.eval()
    logits, embeddings = [], []
    bar = tqdm(total=len(source), desc=progress, unit="utt", disable=progress is None, leave=False)
    try:
        for batch in eval_batches(source, batch_size=batch_size, n_samples=n_samples, device=device):
            output = model(batch.waveform)
            logits.append(output.logits.float().cpu())
            if with_embeddings:
                embeddings.append(output.embedding.float().cpu())
            bar.update(len(batch.index))
    finally:
        bar.close()
        model.train(was_training)
    return torch.cat(logits).numpy(), torch.cat(embeddings).numpy() if with_embeddings else None


def score_protocol(
    model: nn.Module,
    protocol: pd.DataFrame,
    *,
    source=None,
    n_samples: int = CROP_SAMPLES,
    batch_size: int = SCORING_BATCH,
    device: str = "auto",
    progress: str | None = "scoring",
) -> pd.DataFrame:
    """Score every trial of a protocol.

    Args:
        model: a countermeasure, as `load_model` gives it; moved to the device.
        protocol: trials with the columns of `conventions.PROTOCOL_COLUMNS`.
        source: waveforms already opened for these rows, else they are opened here.
        device: "auto", "cpu" or "cuda".

    Returns:
        utterance, score, logit_spoof, logit_bonafide: one row a trial, in protocol order.

    Raises:
        ScoreError: a score is NaN or infinite; the text names the utterances.
        AudioError: a recording cannot be read.

    >>> from deepfake_utils import find_corpora, load_model, score_protocol  # doctest: +SKIP
    >>> trials = find_corpora("data")[0].protocol("eval")  # doctest: +SKIP
    >>> scores = score_protocol(load_model("aasist", weights="AASIST.pth"), trials)  # doctest: +SKIP
    """
    torch_device = pick_device(device).device
    source = source if source is not None else open_source(protocol, kind="files")
    logits, _ = compute_outputs(
        model.to(torch_device), source,
        n_samples=n_samples, batch_size=batch_size, device=torch_device, progress=progress,
    )  # fmt: skip
    return _refuse_non_finite(score_frame(protocol["utterance"], logits), "utterance")


def score_frame(utterances: pd.Series, logits: np.ndarray) -> pd.DataFrame:
    """Logits (N, 2) as a table: utterance, score, logit_spoof, logit_bonafide."""
    scores = _score_columns(logits)
    scores.insert(0, "utterance", np.asarray(utterances))
    return scores


def score_files(
    paths: str | os.PathLike | Iterable[str | os.PathLike],
    model: nn.Module,
    *,
    n_samples: int = CROP_SAMPLES,
    batch_size: int = SCORING_BATCH,
    device: str = "auto",
    progress: str | None = "scoring",
) -> pd.DataFrame:
    """Score recordings of any format the decoders read; an unreadable one does not stop the others.

    Args:
        paths: audio files and folders (searched through for audio files).
        model: a countermeasure, as `load_model` gives it, or anything that maps (B, T) waveforms to a
            `CMOutput`, such as `export.OnnxScorer`.
        n_samples: evaluated length; longer clips are cut, shorter ones repeated.

    Returns:
        path, score, logit_spoof, logit_bonafide, duration_s: one row a readable recording, in the order found.
        `.attrs["unreadable"]` maps the path of each other one to what is wrong with it.

    Raises:
        AudioError: a path does not exist, or no audio file is found at all.
        ScoreError: a score is NaN or infinite.

    >>> from deepfake_utils import load_model, score_files
    >>> import numpy, soundfile, tempfile
    >>> recording = tempfile.mkdtemp() + "/hum.wav"
    >>> soundfile.write(recording, 0.1 * numpy.sin(numpy.arange(16000) / 20), 16000)
    >>> scores = score_files([recording], load_model("aasist-l"), progress=None)
    >>> list(scores.columns)
    ['path', 'score', 'logit_spoof', 'logit_bonafide', 'duration_s']
    """
    files = find_audio(paths)
    torch_device = torch.device("cpu")
    if isinstance(model, nn.Module):
        torch_device = pick_device(device).device
        model.to(torch_device).eval()
    read, logits, unreadable = [], [], {}
    bar = tqdm(total=len(files), desc=progress, unit="file", disable=progress is None, leave=False)
    for start in range(0, len(files), batch_size):
        clips = []
        for path in files[start : start + batch_size]:
            try:
                waveform = audio.read_audio(path)
            except AudioError as error:
                unreadable[str(path)] = str(error)
                continue
            read.append({"path": str(path), "duration_s": len(waveform) / SAMPLE_RATE_HZ})
            clips.append(audio.fit_length(waveform, n_samples))
        if clips:
            with torch.no_grad():
                output = model(torch.from_numpy(np.stack(clips)).to(torch_device))
            logits.append(output.logits.float().cpu().numpy())
        bar.update(min(batch_size, len(files) - start))
    bar.close()
    columns = ["path", "score", "logit_spoof", "logit_bonafide", "duration_s"]
    scores = pd.DataFrame(read, columns=["path", "duration_s"])
    scores = scores.join(_score_columns(np.concatenate(logits) if logits else np.zeros((0, 2))))[columns]
    scores.attrs["unreadable"] = unreadable
    return _refuse_non_finite(scores, "path")


def find_audio(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """The audio files among `paths`, folders searched through in sorted order.

    Raises:
        AudioError: a path does not exist, or there is no audio file at all.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    found: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in audio.AUDIO_SUFFIXES and p.is_file())
        elif path.exists():
            found.append(path)
        else:
            raise AudioError(f"{path} does not exist: expected an audio file or a folder of audio files")
    if not found:
        raise AudioError(
            f"no audio file in {', '.join(map(str, given)) or 'an empty list'}: "
            f"looked for {', '.join(audio.AUDIO_SUFFIXES)}"
        )
    return list(dict.fromkeys(found))


def _score_columns(logits: np.ndarray) -> pd.DataFrame:
    logits = logits.astype(np.float64)
    columns = {"score": BONAFIDE, "logit_spoof": SPOOF, "logit_bonafide": BONAFIDE}
    return pd.DataFrame({name: logits[:, column] for name, column in columns.items()})


def _refuse_non_finite(scores: pd.DataFrame, key: str) -> pd.DataFrame:
    bad = scores[~np.isfinite(scores[["logit_spoof", "logit_bonafide"]]).all(axis=1)]
    if len(bad):
        raise ScoreError(
            f"{len(bad)} of {len(scores)} scores are not finite, first {', '.join(map(str, bad[key].head(5)))}: "
            "check the weights, and that neither half precision nor a damaged recording is involved"
        )
    return scores
