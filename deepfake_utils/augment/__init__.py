"""Augmentation of batches of waveforms, on their device; chance is drawn apart from its use."""

from .effects import draw_band_mask
from .recipes import EFFECTS, RECIPES, build_augmentation
from .recordings import read_recordings

__all__ = ["EFFECTS", "RECIPES", "build_augmentation", "draw_band_mask", "read_recordings"]
