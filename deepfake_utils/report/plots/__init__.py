"""Pictures: each function takes data and returns a Matplotlib figure with axes, units and counts."""

from deepfake_utils.report.plots.analysis import (
    agreement,
    clip_under_the_lens,
    det_with_points,
    eer_bars,
    embedding_map,
    gap_parts,
    rejections_by_speaker,
    reliability_diagram,
    score_panels,
    tandem_cost,
    trimming,
)
from deepfake_utils.report.plots.basic import (
    attack_bars,
    clips,
    corpus_overview,
    det_curves,
    draw_spectrogram,
    score_histogram,
    spectrogram_grid,
    training_curves,
)
from deepfake_utils.report.plots.decisions import costs_of_uses, envelope, push_times, timeline
from deepfake_utils.report.plots.models import (
    artefact_costs,
    cepstra,
    cutoff_moves,
    filter_responses,
    graph_attention,
    model_comparison,
)
from deepfake_utils.report.plots.monitoring import drift_panels, verdicts_over_time

__all__ = [
    "agreement",
    "artefact_costs",
    "attack_bars",
    "cepstra",
    "clip_under_the_lens",
    "clips",
    "corpus_overview",
    "costs_of_uses",
    "cutoff_moves",
    "det_curves",
    "det_with_points",
    "draw_spectrogram",
    "drift_panels",
    "eer_bars",
    "embedding_map",
    "envelope",
    "filter_responses",
    "gap_parts",
    "graph_attention",
    "model_comparison",
    "push_times",
    "rejections_by_speaker",
    "reliability_diagram",
    "score_histogram",
    "score_panels",
    "spectrogram_grid",
    "tandem_cost",
    "timeline",
    "training_curves",
    "trimming",
    "verdicts_over_time",
]
