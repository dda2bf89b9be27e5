"""What `flawsmith predict` is asked for, and what it reports at its end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flawsmith.data.images import MAX_PIXELS
from flawsmith.errors import UserError
from flawsmith.inference.sources import Unreadable

CSV, JSON, LINES = "results.csv", "results.json", "results.jsonl"
FORMATS = {"csv": CSV, "json": JSON, "jsonl": LINES}


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
