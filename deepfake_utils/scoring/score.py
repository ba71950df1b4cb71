"""Scores: a trained countermeasure over a protocol or over any recordings. Higher means more bona fide.

Recordings go through `score_crops`: they are decoded ahead by a thread, to float32 and never rounded to 16 bits.
Waveforms that lie opened (a store holds 16 bits) go through `compute_outputs`, and a `Stream` judges its windows as
they come; all of them end in `forward`, in float32 on batches of one length.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from deepfake_utils.conventions import (
    AUDIO_SUFFIXES,
    BONAFIDE,
    CROP_SAMPLES,
    SAMPLE_RATE_HZ,
    SPOOF,
    AudioError,
    ScoreError,
)
from deepfake_utils.files import describe_passed_over, list_audio
from deepfake_utils.machine import keep_freed_memory, pick_device
from deepfake_utils.models.layers import CMOutput
from deepfake_utils.models.losses import WeightedCrossEntropy
from deepfake_utils.scoring.weights import is_untrained
from deepfake_utils.waveforms import decode as audio
from deepfake_utils.waveforms.batches import eval_batches

SCORE_KIND = WeightedCrossEntropy.score_kind
SCORING_BATCH = 16  # utterances
_END = object()


def score_crops(
    model: Callable[[torch.Tensor], CMOutput],
    items: Iterable[tuple[object, np.ndarray | None]],
    *,
    batch_size: int = SCORING_BATCH,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[object, np.ndarray | None]]:
    """The one scoring loop: things with a waveform each -> the same things with their logits, in order.

    Args:
        model: a countermeasure, or anything that maps (B, T) waveforms to a `CMOutput`.
        items: pairs (thing, waveform (T,)), made ahead of the model by a thread; (thing, None) comes out again in its
            place, so that ends and errors can travel with the waveforms.
        batch_size: waveforms a batch; a batch is cut short only at the end.

    Yields:
        (thing, logits (2,) float64), or (thing, None).
    """
    waiting, crops = [], []

    def scored() -> Iterator[tuple[object, np.ndarray | None]]:
        logits = iter(
            forward(model, torch.from_numpy(np.stack(crops)), device).logits.double().numpy() if crops else ()
        )
        for thing, has_waveform in waiting:
            yield thing, next(logits) if has_waveform else None
        waiting.clear()
        crops.clear()

    with closing(made_ahead(iter(items), 2 * batch_size)) as ahead:
        for thing, waveform in ahead:
            waiting.append((thing, waveform is not None))
            if waveform is not None:
                crops.append(waveform)
            if len(crops) == batch_size:
                yield from scored()
        yield from scored()


@torch.no_grad()
def forward(model: Callable, waveform: torch.Tensor, device: torch.device | str) -> CMOutput:
    """One batch (B, T) through the model on `device`; its output in float32 in host memory."""
    output = model(waveform.to(device))
    return CMOutput(output.logits.float().cpu(), output.embedding.float().cpu())


def made_ahead(items: Iterator, depth: int) -> Iterator:
    """Yield the items in order while a thread makes up to `depth` of the following ones."""
    pool, patient = ThreadPoolExecutor(1), True
    try:
        under_way = deque(pool.submit(next, items, _END) for _ in range(depth))
        while (item := under_way.popleft().result()) is not _END:
            under_way.append(pool.submit(next, items, _END))
            yield item
    except KeyboardInterrupt:
        patient = False  # the thread may read a pipe in which nothing will come
        raise
    finally:
        pool.shutdown(wait=patient, cancel_futures=True)


@contextmanager
def evaluating(model: Callable, device: str = "auto") -> Iterator[torch.device]:
    """A model ready to score, on its device, for the length of a block; afterwards it is in its mode of before.

    Anything but an `nn.Module` is left as it is and computes on the CPU. Warns of weights that were never trained.
    """
    if not isinstance(model, nn.Module):
        yield torch.device("cpu")
        return
    if is_untrained(model):
        warnings.warn(
            "this model has fresh, untrained weights: its scores mean nothing; give load_model a weights file, or the "
            'name of published ones: load_model(weights="aasist")',
            stacklevel=4,
        )
    torch_device = pick_device(device).device
    keep_freed_memory()
    was_training = model.training
    model.to(torch_device).eval()
    try:
        yield torch_device
    finally:
        model.train(was_training)


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
        device: where to compute; None is where the model is.
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
            output = forward(model, batch.waveform, device)
            logits.append(output.logits)
            if with_embeddings:
                embeddings.append(output.embedding)
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
    """Score every trial of a protocol on its first `n_samples`, as the corpora's published scores are computed.

    Args:
        model: a countermeasure, as `load_model` gives it; moved to the device, its mode restored afterwards.
        protocol: trials with the columns of `conventions.PROTOCOL_COLUMNS`.
        source: waveforms already opened for these rows (a store rounds them to 16 bits), else they are decoded here.
        device: "auto", "cpu" or "cuda".

    Returns:
        utterance, score, logit_spoof, logit_bonafide: one row a trial, in protocol order.

    Raises:
        ScoreError: a score is NaN or infinite; the text names the utterances.
        AudioError: a recording cannot be read.

    >>> from deepfake_utils import find_corpora, load_model, score_protocol  # doctest: +SKIP
    >>> trials = find_corpora("data")[0].protocol("eval")  # doctest: +SKIP
    >>> scores = score_protocol(load_model(weights="aasist"), trials)  # doctest: +SKIP
    """
    with evaluating(model, device) as torch_device:
        if source is not None:
            logits, _ = compute_outputs(
                model, source, n_samples=n_samples, batch_size=batch_size, device=torch_device, progress=progress
            )
        else:
            paths = [Path(path) for path in protocol["path"]]
            rows = list(_scored_files(model, paths, n_samples, batch_size, torch_device, progress))
            unreadable = [(row.problem, utterance) for row, utterance in zip(rows, protocol["utterance"], strict=True)]
            for problem, utterance in unreadable:
                if problem:
                    raise AudioError(f"utterance {utterance}: {problem}")
            logits = np.array([row.logits for row in rows]).reshape(-1, 2)
    return _refuse_non_finite(score_frame(protocol["utterance"], logits), "utterance")


def score_frame(utterances: pd.Series, logits: np.ndarray) -> pd.DataFrame:
    """Logits (N, 2) as a table: utterance, score, logit_spoof, logit_bonafide."""
    scores = _score_columns(logits)
    scores.insert(0, "utterance", np.asarray(utterances))
    return scores


def score_files(
    paths: str | os.PathLike | Iterable[str | os.PathLike],
    model: Callable[[torch.Tensor], CMOutput],
    *,
    n_samples: int = CROP_SAMPLES,
    batch_size: int = SCORING_BATCH,
    device: str = "auto",
    progress: str | None = "scoring",
) -> pd.DataFrame:
    """Score the first `n_samples` of recordings of any format; an unreadable one does not stop the others.

    This is what corpora's protocols ask for. To have whole recordings looked at, use a `Detector`.

    Args:
        paths: audio files and folders (searched through for audio files).
        model: a countermeasure, as `load_model` gives it, or anything that maps (B, T) waveforms to a
            `CMOutput`, such as `onnx.OnnxScorer`.
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
    with evaluating(model, device) as torch_device:
        rows = list(_scored_files(model, files, n_samples, batch_size, torch_device, progress))
    read = [row for row in rows if not row.problem]
    scores = _score_columns(np.array([row.logits for row in read]).reshape(-1, 2))
    scores.insert(0, "path", [str(row.path) for row in read])
    scores["duration_s"] = [row.duration_s for row in read]
    scores.attrs["unreadable"] = {str(row.path): row.problem for row in rows if row.problem}
    return _refuse_non_finite(scores, "path")


class _ScoredFile(NamedTuple):
    path: Path
    duration_s: float = 0.0
    problem: str = ""
    logits: np.ndarray | None = None


def _scored_files(model, paths, n_samples, batch_size, device, progress) -> Iterator[_ScoredFile]:
    """The recordings in order, each with the logits of its first `n_samples` or with what is wrong with it."""

    def first_crops() -> Iterator[tuple[_ScoredFile, np.ndarray | None]]:
        for path in paths:
            try:
                waveform, duration_s = _beginning(path, n_samples)
            except AudioError as error:
                yield _ScoredFile(path, problem=str(error)), None
            else:
                yield _ScoredFile(path, duration_s), audio.fit_length(waveform, n_samples)

    with tqdm(total=len(paths), desc=progress, unit="file", disable=progress is None, leave=False) as bar:
        for file, logits in score_crops(model, first_crops(), batch_size=batch_size, device=device):
            bar.update()
            yield file._replace(logits=logits)


def _beginning(path: Path, n_samples: int) -> tuple[np.ndarray, float]:
    """The first samples of a recording and its length in seconds; the rest is decoded, for damage, and not kept."""
    kept, n_kept, n_decoded = [], 0, 0
    for block in audio.iter_audio(path):
        if n_kept < n_samples:
            kept.append(block[: n_samples - n_kept].copy())
            n_kept += len(kept[-1])
        n_decoded += len(block)
    return np.concatenate(kept), n_decoded / SAMPLE_RATE_HZ


def find_audio(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """The recordings among `paths`; see `list_recordings`."""
    return list_recordings(paths)[0]


def list_recordings(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> tuple[list[Path], str]:
    """Recordings named by themselves or by the folders they lie in, in the order given and each once.

    Returns:
        Their paths, and what was passed over in the folders, in words ("" if nothing was).

    Raises:
        AudioError: a path does not exist or is an address, or there is no recording at all.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    found, passed_over = [], Counter()
    for path in given:
        name = os.fspath(path)
        if os.path.isdir(name):
            inside, others = list_audio(name)
            found += inside
            passed_over += others
        elif name == "-" or os.path.lexists(name):  # a broken link is unreadable, not unknown
            found.append(name)
        elif re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", name):
            raise AudioError(f"{name} is an address: recordings are read from files; download it and name the file")
        else:
            raise AudioError(f"{name} does not exist: expected an audio file or a folder of audio files")
    described = describe_passed_over(passed_over)
    if not found:
        raise AudioError(
            f"no audio file in {', '.join(map(str, given)) or 'an empty list'}: looked for {', '.join(AUDIO_SUFFIXES)}"
            + (f"; {described}" if described else "")
        )
    return [Path(name) for name in dict.fromkeys(found)], described


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
