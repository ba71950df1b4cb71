"""A page that judges recordings in the browser: assembled into a folder that any web server can serve as it is.

The page, a small network with its card, Silero VAD to find speech, and onnxruntime-web to run both: nothing is fetched
from elsewhere once the page is there, and no audio leaves the computer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from deepfake_utils.conventions import CheckpointError, ConfigError
from deepfake_utils.files import atomic_write
from deepfake_utils.scoring.silero import silero_file
from deepfake_utils.scoring.weights import read_companion, weights_file

RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
PAGE_FILES = ("index.html", "page.js", "detector.js", "audio.js", "microphone.js")
_TIMEOUT_S = 300


def assemble(folder: str | os.PathLike, weights: str = "phone", runtime: str | os.PathLike | None = None) -> Path:
    """Write the page and all it needs into a folder.

    Args:
        folder: made where it does not exist; files of an earlier page are replaced.
        weights: "phone", whose log-odds are Python's to 1e-3; "laptop" or "tiny", whose rounding differs from engine to
            engine; or an exported .onnx with its card beside it, calibrated.
        runtime: folder of an unpacked onnxruntime-web package, or of its `dist`; None has npm fetch it.

    Returns:
        The folder.

    Raises:
        CheckpointError: the weights are no calibrated .onnx file.
        ConfigError: onnxruntime-web or Silero VAD cannot be had.
    """
    folder, model = Path(folder), weights_file(weights)
    card = read_companion(model)
    if model.suffix != ".onnx" or not {"calibration", "uncertain_log_odds"} <= set(card):
        raise CheckpointError(
            f"{model} cannot judge in a page: expected an .onnx file with its card beside it, as "
            "`python -m deepfake_utils export --target phone` writes them"
        )
    finder = silero_file()
    if finder is None:
        raise ConfigError("the page needs the detector of speech: pip install 'silero-vad>=6.2.3'")
    with tempfile.TemporaryDirectory() as fetched:
        dist = _runtime(Path(runtime) if runtime else _fetch(Path(fetched)))
        sources = {name: Path(__file__).parent / name for name in PAGE_FILES} | {
            name: dist / name for name in RUNTIME_FILES
        }
        sources |= {"model.onnx": model, "model.json": model.with_suffix(".json"), "speech.onnx": finder}
        for name, source in sources.items():
            with atomic_write(folder / name) as part:
                shutil.copyfile(source, part)
    return folder


def _runtime(folder: Path) -> Path:
    """The folder with onnxruntime-web's files in what was given."""
    for candidate in (folder, folder / "dist"):
        if all((candidate / name).is_file() for name in RUNTIME_FILES):
            return candidate
    raise ConfigError(f"{folder} is no onnxruntime-web package: expected {', '.join(RUNTIME_FILES)} in it or its dist")


def _fetch(folder: Path) -> Path:
    """The package, unpacked; npm checks its hash, and nothing of it is run."""
    npm = shutil.which("npm")
    if npm is None:
        raise ConfigError(
            f"npm is not installed: install it, or unpack {RUNTIME} yourself and name the folder (--runtime)"
        )
    command = [npm, "pack", "--silent", RUNTIME]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"`npm pack {RUNTIME}` did not end within {_TIMEOUT_S} s: fetch it by other means") from error
    packed = list(folder.glob("*.tgz"))
    if done.returncode or not packed:
        raise ConfigError(
            f"`npm pack {RUNTIME}` failed: {done.stderr.strip()[-300:]}; name an unpacked one (--runtime)"
        )
    with tarfile.open(packed[0]) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"
