"""What the service tells Prometheus of itself."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from deepfake_utils.serving.limits import Places
from deepfake_utils.serving.scorer import Heard, Scorer

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
LOG_ODDS = (-8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8)


class Metrics:
    """Counters of one process, in a registry of their own."""

    def __init__(self, scorer: Scorer, uploads: Places, streams: Places):
        self._registry = registry = CollectorRegistry()
        self._scorer = scorer
        self._requests = Counter(
            "deepfake_requests", "Requests answered", ["route", "status"], registry=registry
        )  # fmt: skip
        self._latency = Histogram(
            "deepfake_request_seconds", "From a request's head to its answer's end", ["route"], buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self._verdicts = Counter(
            "deepfake_verdicts", "Verdicts given; no_verdict is where there was too little speech", ["verdict"],
            registry=registry,
        )  # fmt: skip
        self._refused = Counter("deepfake_refused", "Recordings refused, by reason", ["reason"], registry=registry)
        self._speech = Counter("deepfake_speech_seconds", "Speech found in recordings", registry=registry)
        self._sound = Counter("deepfake_recording_seconds", "Length of recordings", registry=registry)
        self._scores = Histogram(
            "deepfake_log_odds", "Log-odds of real speech", buckets=LOG_ODDS, registry=registry
        )  # fmt: skip
        self._feedback = Counter("deepfake_feedback", "Feedback given, by what it was", ["truth"], registry=registry)
        self._serving = Gauge("deepfake_model", "1 for what is in service", ["version", "calibration"],
                              registry=registry)  # fmt: skip
        self._failing = Gauge("deepfake_pointer_failing", "1 while the pointer cannot be followed", registry=registry)
        for name, about, places in (
            ("waiting", "Recordings that wait or are looked at", scorer.waiting),
            ("uploads", "Uploads under way", uploads),
            ("streams", "Live streams", streams),
        ):
            Gauge(f"deepfake_{name}", about, registry=registry).set_function(lambda p=places: p.n_taken)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request; the route is the pattern of its address."""
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def heard(self, heard: Heard) -> None:
        """Count a verdict."""
        verdict = heard.verdict
        self._verdicts.labels(verdict.verdict.replace(" ", "_")).inc()
        self._sound.inc(verdict.duration_s)
        self._speech.inc(verdict.speech_s or 0.0)
        if verdict.log_odds is not None:
            self._scores.observe(verdict.log_odds)

    def refused(self, reason: str) -> None:
        """Count a recording that got no verdict, by the title of its problem."""
        self._refused.labels(reason).inc()

    def told(self, truth: str) -> None:
        """Count feedback."""
        self._feedback.labels(truth).inc()

    def text(self) -> bytes:
        """All of it as Prometheus reads it."""
        current = self._scorer.current
        self._serving.clear()
        self._serving.labels(current.version, current.calibration).set(1)
        self._failing.set(bool(self._scorer.problem))
        return generate_latest(self._registry)
