"""Figures of a countermeasure from its scores: metrics, intervals, calibration, score files, comparisons."""

from deepfake_utils.evaluation.evaluate import evaluate

__all__ = ["evaluate"]
