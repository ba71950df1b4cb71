"""Front ends: from waveforms to the time-frequency maps that models look at."""

from deepfake_utils.frontends.lfcc import build_front_end
from deepfake_utils.frontends.sinc import SincFilters

__all__ = ["SincFilters", "build_front_end"]
