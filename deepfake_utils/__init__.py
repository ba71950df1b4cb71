"""Train, score and understand detectors of AI-generated speech.

The names below are the stable surface; they are imported on first use, so that the metrics can be used
without loading torch.
"""

from importlib import import_module

import pandas as pd

# Names of files are bytes, and not all of them are UTF-8, which pandas 3 asks of text where it finds pyarrow installed.
pd.set_option("mode.string_storage", "python")

__version__ = "0.1.0"

_HOME = {
    "Detector": "deepfake_utils.scoring.detector",
    "find_corpora": "deepfake_utils.corpora",
    "load_model": "deepfake_utils.scoring.weights",
    "score_files": "deepfake_utils.scoring.score",
    "score_protocol": "deepfake_utils.scoring.score",
    "fit": "deepfake_utils.training.loop",
    "TrainingConfig": "deepfake_utils.training.config",
    "evaluate": "deepfake_utils.evaluation",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"deepfake_utils has no {name!r}: its names are {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
