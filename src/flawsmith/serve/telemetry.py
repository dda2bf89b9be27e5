"""What a server tells Prometheus of itself."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from flawsmith.serve.models import Loaded

SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
MARGINS = (-2.0, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


class Telemetry:
    """All counters of one server, in a registry of their own: two servers in one process do not mix."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.answers = Counter(
            "flawsmith_requests", "Answers to /v1/predict by HTTP status.", ["status"], registry=self._registry
        )
        self.verdicts = Counter("flawsmith_verdicts", "Images judged.", ["verdict"], registry=self._registry)
        self.seconds = Histogram(
            "flawsmith_predict_seconds", "From the first byte to the answer, of images judged.", buckets=SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self.phases = Histogram(
            "flawsmith_phase_seconds", "Time in a worker: decode, infer, draw.", ["phase"], buckets=SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self.margins = Histogram(
            "flawsmith_score_margin", "Score minus threshold: a drift of the line shows here first.", buckets=MARGINS,
            registry=self._registry,
        )  # fmt: skip
        self.admitted = Gauge("flawsmith_admitted", "Requests being read, waiting or judged.", registry=self._registry)
        self._model = Gauge(
            "flawsmith_model", "1 for the model that answers.", ["category", "version", "digest", "provider"],
            registry=self._registry,
        )  # fmt: skip
        self._changes = Counter(
            "flawsmith_model_changes", "Exchanges of the model.", ["outcome"], registry=self._registry
        )

    def note_change(self, loaded: Loaded | None) -> None:
        """`ModelSlot`'s `on_change`."""
        self._changes.labels("failed" if loaded is None else "done").inc()
        if loaded is not None:
            self._model.clear()
            model = loaded.predictor
            self._model.labels(model.metadata.category, loaded.version, model.digest, model.provider).set(1)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)
