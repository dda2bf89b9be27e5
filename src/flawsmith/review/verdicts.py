"""What people say of images: a file of JSON lines that is only ever appended to, and what they agree on.

A line holds who, when, the digest of the model that had judged (empty if unknown), the SHA-256 of the image's file, its
path, the verdict, and boxes [x, y, width, height] in pixels of the upright image that say where.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from flawsmith.errors import UserError

GOOD, DEFECTIVE, UNSURE = VERDICTS = ("good", "defective", "unsure")
MAX_BOXES = 100
FARTHEST = 1_000_000  # pixels; no image that is read is as wide

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Verdict:
    """What one person said of one image.

    Raises:
        ValueError: a value cannot be what it should be.
    """

    who: str
    when: str
    model: str
    image: str
    path: str
    verdict: str
    boxes: tuple[Box, ...] = ()

    def __post_init__(self) -> None:
        texts = (self.who, self.when, self.model, self.image, self.path)
        if not all(isinstance(text, str) for text in texts) or not self.who.strip():
            raise ValueError("who, when, model, image and path must be texts, and somebody must have said it")
        if datetime.fromisoformat(self.when).tzinfo is None:
            raise ValueError("when must name its offset from UTC")
        if self.verdict not in VERDICTS:
            raise ValueError(f"the verdict is none of {', '.join(VERDICTS)}")
        object.__setattr__(self, "boxes", check_boxes(self.boxes))
        if self.boxes and self.verdict != DEFECTIVE:
            raise ValueError("only a defective image has boxes")

    @property
    def age(self) -> tuple[datetime, str, tuple[Box, ...], str]:
        """What decides which of two verdicts is newer; the rest decides between two of one moment."""
        return datetime.fromisoformat(self.when), self.verdict, self.boxes, self.path


@dataclass(frozen=True)
class Opinion:
    """What is said of one image in all.

    Attributes:
        image: SHA-256 of its file.
        verdict: what all say; empty where they disagree or somebody is unsure.
        paths: where people saw it, sorted.
        boxes: all that they drew, sorted.
    """

    image: str
    verdict: str
    paths: tuple[str, ...]
    boxes: tuple[Box, ...]


def check_boxes(boxes: object) -> tuple[Box, ...]:
    """Boxes from JSON values.

    Raises:
        ValueError: they are no list of boxes of a pixel or more, or too many.
    """
    if not isinstance(boxes, list | tuple) or len(boxes) > MAX_BOXES:
        raise ValueError(f"boxes must be a list of at most {MAX_BOXES}")
    for box in boxes:
        if not isinstance(box, list | tuple) or len(box) != 4 or not all(type(value) is int for value in box):
            raise ValueError("a box must be four whole numbers: x, y, width, height")
        if not all(0 <= value <= FARTHEST for value in box) or min(box[2:]) < 1:
            raise ValueError("a box must lie in the image and cover a pixel at least")
    return tuple((box[0], box[1], box[2], box[3]) for box in boxes)


def now() -> str:
    """This moment as ISO 8601, in UTC, with microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def append(path: Path, verdict: Verdict) -> None:
    """Add a line to the file, which is made if need be; it is on the disk when this returns.

    A line that a crash tore was never confirmed to anybody and is taken back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = f"{json.dumps(asdict(verdict), allow_nan=False)}\n".encode()
    with FileLock(path.with_name(f".{path.name}.lock.tmp")), path.open("ab+") as stream:
        stream.seek(0)
        end = stream.read().rfind(b"\n") + 1
        stream.truncate(end)
        try:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
        except OSError:
            os.truncate(path, end)
            raise


def read_verdicts(path: Path) -> list[Verdict]:
    """All whole lines of the file.

    Raises:
        UserError: it is missing, or a line is damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file; name one that `flawsmith review` has written.")
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break  # torn by a crash
        try:
            found.append(Verdict(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged in line {number} ({error}); mend or remove that line.") from error
    return found


def newest(verdicts: Iterable[Verdict]) -> dict[tuple[str, str], Verdict]:
    """(image, who) → the newest verdict of one person on one image. The order of the lines does not matter."""
    return {(one.image, one.who): one for one in sorted(verdicts, key=lambda one: one.age)}


def opinions(verdicts: Iterable[Verdict]) -> list[Opinion]:
    """What is said of each image, sorted by digest; agreed is what all say who said something, and are sure of."""
    by_image: dict[str, list[Verdict]] = {}
    for (image, _), verdict in newest(verdicts).items():
        by_image.setdefault(image, []).append(verdict)
    return [_opinion(image, said) for image, said in sorted(by_image.items())]


def _opinion(image: str, said: Sequence[Verdict]) -> Opinion:
    kinds = {one.verdict for one in said}
    return Opinion(
        image,
        next(iter(kinds)) if len(kinds) == 1 and UNSURE not in kinds else "",
        tuple(sorted({one.path for one in said})),
        tuple(sorted({box for one in said for box in one.boxes})),
    )
