"""What `flawsmith predict` is asked for, and what it reports at its end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from flawsmith.data.images import MAX_PIXELS
from flawsmith.errors import UserError
from flawsmith.inference.sources import Unreadable

CSV, JSON, LINES = "results.csv", "results.json", "results.jsonl"
FORMATS = {"csv": CSV, "json": JSON, "jsonl": LINES}


@dataclass(frozen=True)
class MqttOptions:
    """Where results are sent.

    Attributes:
        url: `mqtt://HOST[:PORT]`, or `mqtts://` for TLS.
        topic: that all results are published on.
        credentials: a YAML file as `mqtt.read_credentials` reads it.

    Raises:
        UserError: the URL is none of these or holds a login, or the topic cannot be published on.
    """

    url: str
    topic: str = "flawsmith/results"
    credentials: Path | None = None

    def __post_init__(self) -> None:
        if "@" in self.url:  # not shown: it holds a password
            raise UserError(
                "--mqtt holds a login, which others here could read; put it into the file of --mqtt-credentials."
            )
        self.broker  # noqa: B018 checks the URL
        if not self.topic or set(self.topic) & set("+#\0"):
            raise UserError(f"`{self.topic}` is no topic of MQTT to publish on; leave + and # out.")

    @property
    def broker(self) -> tuple[str, int, bool]:
        """The broker's host and port, and whether it is met over TLS."""
        try:
            parts = urlsplit(self.url)
            ports = {"mqtt": 1883, "mqtts": 8883}
            if parts.hostname and not (parts.path.strip("/") or parts.query or parts.fragment):
                return parts.hostname, parts.port or ports[parts.scheme], parts.scheme == "mqtts"
        except (KeyError, ValueError):
            pass
        raise UserError(f"`{self.url}` is no URL of a broker; write mqtt://HOST:PORT, or mqtts:// for TLS.")


@dataclass(frozen=True)
class PredictOptions:
    """How images are scored and what is written about them.

    Attributes:
        formats: keys of FORMATS: which files of results are written. A watch always writes jsonl.
        overlays: whether heat maps are drawn over the images.
        masks: whether masks of the regions are written.
        jsonl: gets a JSON line for each image as soon as it is known; `-` is standard output.
        batch: images scored together.
        workers: threads that decode.
        every: of a video, frames 0, `every`, 2 `every`, ... are scored.
        max_pixels: larger images are refused.
        poll: seconds between two looks of a watch.
        seconds: a watch ends after so long; None: never.
        idle: a watch ends when nothing has come for so many seconds; None: never.
        mqtt: where a watch sends its results; None: nowhere.

    Raises:
        UserError: a number is below 1, or a format is unknown.
    """

    formats: tuple[str, ...] = ("csv", "json")
    overlays: bool = True
    masks: bool = False
    jsonl: Path | None = None
    batch: int = 8
    workers: int = 2
    every: int = 1
    max_pixels: int = MAX_PIXELS
    poll: float = 0.5
    seconds: float | None = None
    idle: float | None = None
    mqtt: MqttOptions | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "workers", "every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        for form in self.formats:
            if form not in FORMATS:
                raise UserError(f"`{form}` is no format of results; use {', '.join(FORMATS)}.")


@dataclass(frozen=True)
class PredictReport:
    """How many images were good, defective and unreadable, and how many files of each kind were passed over.

    Attributes:
        out: the folder of the results; None where none was asked for.
        skipped: the unreadable files by name. A watch leaves it empty: their lines name them.
    """

    out: Path | None
    good: int
    defective: int
    unreadable: int
    passed_over: Mapping[str, int] = field(default_factory=dict)
    skipped: tuple[Unreadable, ...] = ()

    @property
    def total(self) -> int:
        """How many files were looked at."""
        return self.good + self.defective + self.unreadable

    def exit_code(self, fail_on_defect: bool = False) -> int:
        """Return 3 if `fail_on_defect` and a part is defective, 2 if files were skipped, else 0.

        A defect outweighs a skipped file: it answers the question that was asked.
        """
        if fail_on_defect and self.defective:
            return 3
        return 2 if self.skipped else 0
