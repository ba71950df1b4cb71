"""The list of sources: which recording of which public repository is what, and the split it belongs to.

`sources.csv.xz` has one row a recording: source (owner/name of a GitHub repository), commit, path, hash (first 16
digits of git's SHA-1 of the file), bytes, seconds, label (bonafide, spoof, noise, rir), family (collection or system),
speaker ("" where the path does not tell), split, licence as its repository states it ("none stated" is just that),
note. Labels come from folder names and page tables; nobody listened to all of them.

Dev and eval are whole sources. A family of spoofs, or a known speaker, with recordings on both sides belongs to the
side that has most of them, and its other recordings are not in the list.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from deepfake_utils.conventions import ConfigError

LIST = Path(__file__).with_name("sources.csv.xz")
LICENCES = ("any", "stated")
NO_LICENCE = "none stated"
SPEECH = ("bonafide", "spoof")


def read_sources(licence: str = "any") -> pd.DataFrame:
    """Read the list of recordings.

    Args:
        licence: "stated" leaves out what comes without a licence; "any" keeps it.

    Returns:
        The columns of the module's docstring, one row a recording, ordered by source and path.

    Raises:
        ConfigError: `licence` is another word.
    """
    if licence not in LICENCES:
        raise ConfigError(f"licence {licence!r}: expected one of {', '.join(LICENCES)}")
    sources = pd.read_csv(LIST, dtype={"hash": str, "commit": str, "speaker": str}, keep_default_na=False)
    if licence == "stated":
        sources = sources[sources["licence"] != NO_LICENCE].reset_index(drop=True)
    return sources


def small_part(sources: pd.DataFrame, limit_bytes: int) -> pd.DataFrame:
    """Choose recordings of up to `limit_bytes` in all: in turn from every split, label and family, short files first.

    Args:
        sources: from `read_sources`.
        limit_bytes: of the files as they lie in their repositories.
    """
    speech = sources[sources["label"].isin(SPEECH)].sort_values(["bytes", "source", "path"], kind="stable")
    speech = speech[speech["seconds"] >= 1.0]
    in_family = speech.groupby(["split", "label", "family"]).cumcount()
    speech = speech.assign(in_family=in_family).sort_values("in_family", kind="stable")
    turn = speech.groupby(["split", "label"]).cumcount()  # every split and label grows alike, and its families in it
    chosen = speech.assign(turn=turn).sort_values("turn", kind="stable")
    return sources.loc[chosen.index[chosen["bytes"].cumsum() <= limit_bytes].sort_values()].reset_index(drop=True)
