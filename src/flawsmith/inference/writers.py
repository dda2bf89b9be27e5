"""The files that `flawsmith predict` leaves: tables and lines row by row, so that none of them is held in memory, and
pictures.

out/results.csv     one row a file, in the order of the inputs, unreadable ones too
out/results.json    the same with the regions above the pixel threshold, which a defective image alone has
out/results.jsonl   the images of results.json, one line each
out/overlays/...    one PNG an image, in the folders of the input
out/masks/...       the same: {0, 255}, white in the regions, of the original's size
"""

import csv
import json
import logging
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Protocol, TextIO

import numpy as np
from numpy.typing import NDArray

from flawsmith.data.images import FloatImage, Mask, write_png
from flawsmith.errors import UserError, is_of_all
from flawsmith.files import LOST, digest_name, fit_name, is_ours
from flawsmith.inference.draw import draw_prediction
from flawsmith.inference.predictor import Prediction, Predictor
from flawsmith.inference.regions import region_mask
from flawsmith.inference.sources import STREAM, InputFile

CSV, JSON, LINES, OVERLAYS, MASKS = "results.csv", "results.json", "results.jsonl", "overlays", "masks"
FORMATS = {"csv": CSV, "json": JSON, "jsonl": LINES}
COLUMNS = (
    "file",
    "verdict",
    "score",
    "threshold",
    "relative_score",
    "peak_x",
    "peak_y",
    "peak_value",
    "regions",
    "width",
    "height",
    "error",
)


log = logging.getLogger(__name__)


class Rows(Protocol):
    """Takes one row a file, as `serialise.describe` makes it."""

    def add(self, row: Mapping[str, Any]) -> None: ...

    def __enter__(self) -> "Rows": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class CsvRows:
    """results.csv: without the regions, but with their number."""

    def __init__(self, path: Path) -> None:
        # surrogateescape: a file name that is no valid UTF-8 is written back as it was
        self._stream = path.open("w", newline="", encoding="utf-8", errors="surrogateescape")
        self._table = csv.writer(self._stream, lineterminator="\n")

    def __enter__(self) -> "CsvRows":
        self._table.writerow(COLUMNS)
        return self

    def add(self, row: Mapping[str, Any]) -> None:
        flat = {**row, "regions": row.get("region_count", "")}
        self._table.writerow([flat.get(column, "") for column in COLUMNS])

    def __exit__(self, *_: object) -> None:
        self._stream.close()


class JsonRows:
    """results.json: `model` and the list `images`."""

    def __init__(self, path: Path, predictor: Predictor) -> None:
        self._stream = path.open("w", encoding="utf-8")
        self._model = describe_model(predictor)
        self._is_first = True

    def __enter__(self) -> "JsonRows":
        self._stream.write(f'{{\n"model": {json.dumps(self._model, sort_keys=True)},\n"images": [')
        return self

    def add(self, row: Mapping[str, Any]) -> None:
        self._stream.write(f"{'' if self._is_first else ','}\n{json_line(row)}")
        self._is_first = False

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # a failure must not be hidden by that of finishing a file that is thrown away
            self._stream.write("\n]\n}\n")
        self._stream.close()


class LineRows:
    """JSON lines: results.jsonl, or a stream that someone follows, flushed line by line. Does not close the stream."""

    def __init__(self, stream: TextIO, *, is_followed: bool) -> None:
        self._stream, self._is_followed = stream, is_followed
        name = getattr(stream, "name", "")
        self._name = name if isinstance(name, str) else "Standard output"

    def __enter__(self) -> "LineRows":
        return self

    def add(self, row: Mapping[str, Any]) -> None:
        try:
            self._stream.write(f"{json_line(row)}\n")
            if self._is_followed:
                self._stream.flush()
        except BrokenPipeError as error:
            raise UserError(
                "Nobody reads the JSON lines any more (the pipe was closed), so the work has stopped; read them to "
                "the end, or write them to a folder with --format jsonl."
            ) from error
        except OSError as error:
            error.filename = error.filename or self._name
            raise

    def __exit__(self, *_: object) -> None:
        """The stream belongs to whoever opened it."""


class Pictures:
    """Writes overlays and masks below `folder`, with the names that `picture_names` or `picture_name` gave."""

    def __init__(self, folder: Path, predictor: Predictor, *, overlays: bool, masks: bool) -> None:
        self._folder, self._predictor = folder, predictor
        self._kinds = [*([OVERLAYS] if overlays else []), *([MASKS] if masks else [])]

    def add(self, name: str, image: FloatImage, prediction: Prediction) -> dict[str, str]:
        """Write what is asked for; returns where it lies, relative to the folder, for the row.

        A picture that the file system does not take is left out and named in the log: the image has its verdict.

        Raises:
            OSError: no picture can be written there any more, such as on a full disk.
        """
        written = {}
        for kind in self._kinds:
            height, width = image.shape[1:]
            pixels = (
                draw_prediction(image, prediction, self._predictor)
                if kind == OVERLAYS
                else region_mask(prediction.anomaly_map, self._predictor.regions_above(prediction), height, width)
            )
            try:
                written[kind.removesuffix("s")] = self._write(kind, name, pixels)
            except OSError as error:
                if is_of_all(error):
                    raise
                log.warning("%s is not in %s (%s).", name, kind, error.strerror or error)
        return written

    def _write(self, kind: str, name: str, pixels: NDArray[np.uint8] | Mask) -> str:
        """Under `name`, or under a digest of it where the file system does not take it, or another has it already:
        some do not tell apart case, or ways to write the same letter."""
        plain = PurePosixPath(kind, name)
        place = self._folder / plain
        try:
            if not place.exists() or place.name in os.listdir(place.parent):  # noqa: PTH208 names are all that counts
                write_png(place, pixels)
                return str(plain)
        except OSError as error:
            if is_of_all(error):
                raise
        plain = PurePosixPath(kind, f"{digest_name(name)}.png")
        write_png(self._folder / plain, pixels)
        return str(plain)


def picture_names(files: Iterable[InputFile]) -> dict[str, str]:
    """a/part.jpg → a/part.png, or a/part.jpg.png where a sibling would get the same name, or that with a digest."""
    names = {file.name: _fitted(str(Path(file.name).with_suffix(".png"))) for file in files}
    for longer in (lambda name: f"{name}.png", lambda name: f"{name}~{digest_name(name)}.png"):
        taken = Counter(map(_folded, names.values()))
        names = {name: old if taken[_folded(old)] == 1 else _fitted(longer(name)) for name, old in names.items()}
    return names


def picture_name(name: str) -> str:
    """Where the other names are not known beforehand: /a/part.jpg → a/part.jpg.png, and never out of the folder."""
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", "//", ".")]
    return _fitted("/".join("__" if part == ".." else part for part in parts) + ".png")


def _fitted(name: str) -> str:
    return "/".join(map(fit_name, name.split("/")))


def _folded(name: str) -> str:
    """Alike for names that some file systems take for the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def describe_model(predictor: Predictor) -> dict[str, Any]:
    """The model's metadata with the thresholds in force, and where it computes."""
    return {
        **asdict(predictor.metadata),
        "threshold": predictor.threshold,
        "pixel_threshold": predictor.pixel_threshold,
        "provider": predictor.provider,
    }


def json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False)


@contextmanager
def open_lines(target: Path | None) -> Iterator[TextIO | None]:
    """A stream for `LineRows`: a file, or a copy of standard output for `-` (a reader that leaves must not trip us)."""
    if target is None:
        yield None
        return
    try:
        stream = (
            os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
            if target == STREAM
            else target.open("w", encoding="utf-8")
        )
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}); name another file.") from error
    try:
        yield stream
    finally:
        with suppress(OSError):  # each line was flushed, so nothing is lost
            stream.close()


def open_rows(folder: Path, form: str, predictor: Predictor) -> Rows:
    """The writer of one format in `folder`."""
    path = folder / FORMATS[form]
    if form == "csv":
        return CsvRows(path)
    return JsonRows(path, predictor) if form == "json" else _LineFile(path)


class _LineFile(LineRows):
    def __init__(self, path: Path) -> None:
        super().__init__(path.open("w", encoding="utf-8"), is_followed=False)

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def check_formats(formats: Iterable[str]) -> tuple[str, ...]:
    """Each once, in the order given.

    Raises:
        UserError: one is unknown.
    """
    chosen = tuple(dict.fromkeys(formats))
    for form in chosen:
        if form not in FORMATS:
            raise UserError(f"`{form}` is no format of results; use {', '.join(FORMATS)}.")
    return chosen


RESULTS = frozenset({*FORMATS.values(), OVERLAYS, MASKS})


def check_out(target: Path, given: Path, files: Iterable[InputFile], ours: Collection[str] = RESULTS) -> None:
    """`out` is replaced as a whole, so it must be new, empty, or hold earlier results (`ours`) and nothing else.

    Raises:
        UserError: it does not, or one of `files` lies in it.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"{given} is a file; name a folder for the results.")
    found = os.listdir(target) if target.is_dir() else []  # noqa: PTH208 names are all that counts
    others = {name for name in found if not is_ours(name)} - {*ours, LOST}
    if others or any(file.path.resolve().is_relative_to(target) for file in files):
        example = f" (such as {sorted(others)[0]})" if others else ""
        raise UserError(f"{given} holds files that are no earlier results{example}; name a new folder for --out.")
