"""Augmentation of batches of waveforms, on their device; chance is drawn apart from its use."""

from deepfake_utils.augment.effects import draw_band_mask
from deepfake_utils.augment.recipes import EFFECTS, RECIPES, build_augmentation
from deepfake_utils.augment.recordings import read_recordings

__all__ = ["EFFECTS", "RECIPES", "build_augmentation", "draw_band_mask", "read_recordings"]
