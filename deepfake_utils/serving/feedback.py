"""Which feedback is believed, and what a countermeasure learns from and is held against.

Feedback is a claim of somebody who may be mistaken, or may want the detector to learn a falsehood. Only what was
confirmed and whose recording was kept counts; what clients contradict each other on, and what the weights in service
surely contradict without a second client to bear it out, is put in quarantine; no client may fill the training list.
Several clients in one hand are beyond this: names of clients are worth what the tokens that they come from are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from deepfake_utils.conventions import LABEL_NAMES, ConfigError

ACCEPTED, QUARANTINED, LEFT_OUT = "accepted", "quarantined", "left out"
LABELS = {word: label for label, word in LABEL_NAMES.items()}


def claims_of(feedback: pd.DataFrame, verdicts: pd.DataFrame) -> pd.DataFrame:
    """What each client says of each recording, its last word alone.

    Args:
        feedback, verdicts: as `Records` gives them.

    Returns:
        sha256, client, label (1 = bona fide), path (of the recording), in order; of confirmed feedback whose recording
        was kept and is still there.
    """
    kept = verdicts.dropna(subset="kept_path").drop_duplicates("sha256").set_index("sha256")["kept_path"]
    recording_of = verdicts.set_index("id")["sha256"]
    said = feedback[feedback["confirmed"].astype(bool)].sort_values("at", kind="stable")
    claims = pd.DataFrame({
        "sha256": said["verdict_id"].map(recording_of),
        "client": said["client"].astype(str),
        "label": said["truth"].map(LABELS),
    })  # fmt: skip
    claims["path"] = claims["sha256"].map(kept)
    there = claims["path"].map(lambda path: isinstance(path, str) and Path(path).is_file()).astype(bool)
    return claims[there].drop_duplicates(["sha256", "client"], keep="last").sort_values(
        ["sha256", "client"], ignore_index=True
    )  # fmt: skip


def judge(claims: pd.DataFrame, log_odds: Mapping[str, float], rules: Mapping, n_training: int) -> pd.DataFrame:
    """Decide which recordings are learned from.

    Args:
        claims: from `claims_of`.
        log_odds: sha256 -> log-odds of bona fide by the weights in service.
        rules: the table `feedback` of the rules.
        n_training: trials of the training list without feedback.

    Returns:
        sha256, path, label, client (its first one, the source that it counts for), outcome ("accepted", "quarantined"
        or "left out"), reason, held_out; one row a recording, in order.
    """
    claims = claims.assign(log_odds=claims["sha256"].map(log_odds))
    n_agreeing = claims.groupby(["sha256", "label"])["client"].transform("nunique")
    against = np.where(claims["label"] == 1, -claims["log_odds"], claims["log_odds"])
    claims["contradicts"] = (against > rules["contradiction_log_odds"]) & (n_agreeing < rules["witnesses"])
    claims["outvoted"] = _outvoted(claims, rules["witnesses"])
    not_believed = _not_believed(claims, rules)
    rows = []
    for sha256, of_one in claims.groupby("sha256"):
        believed = of_one[~of_one["client"].isin(not_believed)]
        first = (believed if len(believed) else of_one).iloc[0]
        if believed.empty:
            outcome, reason = QUARANTINED, not_believed[first["client"]]
        elif believed["label"].nunique() > 1:
            outcome, reason = QUARANTINED, f"clients contradict each other: {', '.join(believed['client'])}"
        elif believed["contradicts"].any():
            says = f"the weights in service say the opposite, log-odds {first['log_odds']:+.1f}"
            outcome, reason = QUARANTINED, f"{says}, and fewer than {rules['witnesses']} clients say this"
        else:
            outcome, reason = ACCEPTED, ""
        rows.append({"sha256": sha256, "path": first["path"], "label": first["label"], "client": first["client"],
                     "outcome": outcome, "reason": reason})  # fmt: skip
    columns = ["sha256", "path", "label", "client", "outcome", "reason"]
    table = pd.DataFrame(rows, columns=columns)
    table["held_out"] = [_is_held_out(sha256, rules["held_out_share"]) for sha256 in table["sha256"]]
    return _capped(table, rules, n_training)


def _outvoted(claims: pd.DataFrame, witnesses: int) -> pd.Series:
    """Whether the majority of the other clients says the opposite of a recording, and so many of them.

    One against one settles nothing: else whoever contradicts a client on everything would silence it.
    """
    total = claims.groupby("sha256")["label"].transform("count")
    bonafide = claims.groupby("sha256")["label"].transform("sum")
    alike = np.where(claims["label"] == 1, bonafide, total - bonafide)
    return (total - alike > alike - 1) & (total - alike >= witnesses)


def _not_believed(claims: pd.DataFrame, rules: Mapping) -> dict[str, str]:
    """Clients none of whose claims count, and why."""
    found = {}
    is_shared = claims.groupby("sha256")["client"].transform("count") > 1
    for client, of_one in claims.groupby("client"):
        shared = of_one[is_shared[of_one.index]]
        for name, kind, words in (
            ("contradicts", of_one, "the weights in service surely say the opposite"),
            ("outvoted", shared, "other clients say the opposite"),
        ):
            n, k = len(kind), int(kind[name].sum())
            if n >= rules["fewest_recordings"] and k > rules["suspicious_share"] * n:
                found[client] = f"nothing of client {client} is believed: {words} of {k} of {n} recordings"
    return found


def _is_held_out(sha256: str, share: float) -> bool:
    """Whether a recording is held out: by itself, so that it stays so in every retraining to come."""
    return int(hashlib.sha256(f"held out {sha256}".encode()).hexdigest()[:8], 16) < share * 2**32


def _capped(table: pd.DataFrame, rules: Mapping, n_training: int) -> pd.DataFrame:
    """Leave out what one client has too much of, in the training list and, by the same number, in what is held out."""
    most = int(rules["largest_share"] * n_training)
    accepted = table[table["outcome"] == ACCEPTED]
    beyond = accepted[accepted.groupby(["client", "held_out"]).cumcount() >= most].index
    table.loc[beyond, "outcome"] = LEFT_OUT
    share = f"{100 * rules['largest_share']:g} %"
    table.loc[beyond, "reason"] = f"its client has {most} others: more would be over {share} of the training list"
    return table


def leave_out_known(table: pd.DataFrame, known: Callable[[Path], str]) -> pd.DataFrame:
    """Leave out recordings that are part of a test set, or of the training list already. known: path -> set, or ""."""
    table = table.copy()
    for i in table.index[table["outcome"] == ACCEPTED]:
        if where := known(Path(table.at[i, "path"])):
            table.loc[i, ["outcome", "reason"]] = LEFT_OUT, f"the same recording is in {where}"
    return table


def same_recordings(sets: Mapping[str, pd.DataFrame]) -> Callable[[Path], str]:
    """A function that says in which set of trials a file lies, byte for byte, "" if in none.

    Args:
        sets: name -> protocol. Files are read only where one of the same size is asked for.
    """
    of_size: dict[int, list[tuple[str, Path]]] = {}
    for name, trials in sets.items():
        for path in map(Path, trials["path"]):
            of_size.setdefault(path.stat().st_size, []).append((name, path))

    def known(path: Path) -> str:
        alike = of_size.get(path.stat().st_size, [])
        content = path.read_bytes() if alike else b""
        return next((name for name, other in alike if other.read_bytes() == content), "")

    return known


def check_rules(rules: Mapping, known: Mapping) -> None:
    """Refuse rules that lack a line or have an unknown one.

    Raises:
        ConfigError: names it.
    """
    for part, lines in known.items():
        given = rules.get(part, {})
        for name in sorted(set(lines) ^ set(given)):
            what = "is missing" if name in lines else "is unknown"
            raise ConfigError(f"rule {part}.{name} {what}: the rules that come with the package name all there are")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ConfigError(f"rule {part}.{name} is {value!r}: expected a number that is not negative")
