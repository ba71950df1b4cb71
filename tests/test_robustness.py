"""The error of the same recordings under other conditions, against what can be said beforehand."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from deepfake_utils.conventions import BONAFIDE
from deepfake_utils.models.layers import CMOutput
from deepfake_utils.probing.robustness import CONDITIONS, condition_scores, robustness


class Loudness(nn.Module):
    """The louder, the more bona fide."""

    min_samples = 1

    def forward(self, waveform):
        level = waveform.square().mean(1, keepdim=True).log()
        return CMOutput(torch.cat([-level, level], dim=1), level)


class Clips:
    """Noise of rising loudness, as a source of waveforms."""

    utterances = np.array([f"u{i}" for i in range(9)])

    def __len__(self):
        return 9

    def clip(self, index):
        rng = np.random.default_rng(index)
        return (300 * (index + 1) * rng.uniform(-1, 1, 20_000)).astype(np.int16)


def test_every_condition_scores_every_clip_and_the_first_as_it_is():
    scores = condition_scores(Loudness(), Clips(), n_samples=16_000, device="cpu")
    assert list(scores) == list(CONDITIONS) and len(scores) == 9 and np.isfinite(scores.to_numpy()).all()
    expected = [np.log(np.mean((Clips().clip(i)[:16_000] / 32768) ** 2)) for i in range(9)]
    np.testing.assert_allclose(scores["as it is"], expected, rtol=1e-5)
    again = condition_scores(
        Loudness(), Clips(), {"noise 5 dB": CONDITIONS["noise 5 dB"]}, n_samples=16_000, device="cpu"
    )
    np.testing.assert_array_equal(again["noise 5 dB"], scores["noise 5 dB"])  # whatever else is asked
    # 5 dB of independent noise add 10 ** -0.5 of the power.
    np.testing.assert_allclose(scores["noise 5 dB"] - scores["as it is"], np.log(1 + 10**-0.5), atol=0.03)
    assert BONAFIDE == 1


def test_a_shift_of_all_scores_leaves_the_eer_and_shows_at_the_old_threshold():
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    clean = np.array([-4.0, -3, -2, 1.5, -1.5, 2, 3, 4])
    table = robustness(pd.DataFrame({"as it is": clean, "shifted": clean - 10}), labels).set_index("condition")
    assert table.loc["as it is", "eer"] == table.loc["shifted", "eer"] == pytest.approx(0.25)
    assert table.loc["shifted", ["real_rejected", "fake_accepted"]].tolist() == [1.0, 0.0]
    assert table.loc["as it is", ["real_rejected", "fake_accepted"]].tolist() == [0.25, 0.25]
