"""Writes what `flawsmith predict` leaves, image by image, so that no result is held in memory.

out/results.csv     one row a file, in the order of the inputs, unreadable ones too
out/results.json    the same with the regions above the pixel threshold, which only a defective image has
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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import chain, repeat
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawsmith.data.images import Mask, write_png
from flawsmith.errors import UserError, is_of_all
from flawsmith.files import LOST, digest_name, fit_name, is_ours
from flawsmith.inference.draw import draw_prediction
from flawsmith.inference.options import FORMATS, PredictOptions
from flawsmith.inference.predictor import Predictor
from flawsmith.inference.prefetch import Answer
from flawsmith.inference.regions import region_mask
from flawsmith.inference.serialise import describe
from flawsmith.inference.sources import STREAM, InputFile

OVERLAYS, MASKS = "overlays", "masks"
RESULTS = frozenset({*FORMATS.values(), OVERLAYS, MASKS})
COLUMNS = ("file", "verdict", "score", "threshold", "relative_score", "peak_x", "peak_y", "peak_value", "regions",
           "width", "height", "error")  # fmt: skip

Row = Mapping[str, Any]  # as `make_row` makes it
Write = Callable[[Row], object]

log = logging.getLogger(__name__)


def make_row(answer: Answer, predictor: Predictor) -> dict[str, Any]:
    """Say what came of one file, as JSON values; the verdict on one that could not be read is `unreadable`."""
    if answer.image is None or answer.prediction is None:
        return {"file": answer.name, "verdict": "unreadable", "error": str(answer.error)}
    return {"file": answer.name, **describe(answer.prediction, predictor, *answer.image.shape[1:])}


@contextmanager
def open_rows(folder: Path, form: str, predictor: Predictor) -> Iterator[Write]:
    """Open the file of one format in `folder`; yields the function that adds a row to it."""
    # surrogateescape: a file name that is no valid UTF-8 is written back as it was
    with (folder / FORMATS[form]).open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        if form == "csv":
            table = csv.writer(stream, lineterminator="\n")
            table.writerow(COLUMNS)
            yield lambda row: table.writerow(_flat(row))
        elif form == "jsonl":
            yield lambda row: print(json_line(row), file=stream)
        else:
            stream.write(f'{{\n"model": {json.dumps(describe_model(predictor), sort_keys=True)},\n"images": [')
            breaks = chain(["\n"], repeat(",\n"))
            yield lambda row: print(next(breaks), json_line(row), sep="", end="", file=stream)
            stream.write("\n]\n}\n")  # not after an error: the file is thrown away then


@contextmanager
def open_lines(target: Path) -> Iterator[Write]:
    """Open a file that someone follows, `-` for standard output; yields the function that adds a JSON line to it.

    Raises:
        UserError: the file cannot be written, or nobody reads the lines any more.
    """
    try:  # a copy of standard output: a reader that leaves must not trip us at the end
        stream = (
            os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
            if target == STREAM
            else target.open("w", encoding="utf-8")
        )
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}); name another file.") from error

    def write(row: Row) -> None:
        try:
            stream.write(f"{json_line(row)}\n")
            stream.flush()
        except BrokenPipeError as error:
            raise UserError(
                "Nobody reads the JSON lines any more (the pipe was closed), so the work has stopped; read them to "
                "the end, or write them to a folder with --format jsonl."
            ) from error
        except OSError as error:
            error.filename = error.filename or ("Standard output" if target == STREAM else str(target))
            raise

    try:
        yield write
    finally:
        with suppress(OSError):  # each line was flushed, so nothing is lost
            stream.close()


class Pictures:
    """Writes overlays and masks below `folder`, with the names that `picture_names` or `picture_name` gave."""

    def __init__(self, folder: Path, predictor: Predictor, options: PredictOptions) -> None:
        self._folder, self._predictor = folder, predictor
        self._kinds = [*([OVERLAYS] if options.overlays else []), *([MASKS] if options.masks else [])]

    def add(self, name: str, answer: Answer) -> dict[str, str]:
        """Write what is asked for of an image that was read; returns where it lies in the folder, for the row.

        A picture that the file system does not take is left out and named in the log: the image has its verdict.

        Raises:
            OSError: no picture can be written there any more, such as on a full disk.
        """
        written: dict[str, str] = {}
        image, prediction = answer.image, answer.prediction
        if image is None or prediction is None:
            return written
        for kind in self._kinds:
            if kind == OVERLAYS:
                pixels: NDArray[np.uint8] | Mask = draw_prediction(image, prediction, self._predictor)
            else:
                threshold = self._predictor.regions_above(prediction)
                pixels = region_mask(prediction.anomaly_map, threshold, *image.shape[1:])
            try:
                written[kind.removesuffix("s")] = self._write(kind, name, pixels)
            except OSError as error:
                if is_of_all(error):
                    raise
                log.warning("%s is not in %s (%s).", name, kind, error.strerror or error)
        return written

    def _write(self, kind: str, name: str, pixels: NDArray[np.uint8] | Mask) -> str:
        """Write under `name`, or under a digest of it where the file system does not take it, or another file has it:
        some file systems do not tell apart upper and lower case, or two ways to write one letter."""
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
    """/a/part.jpg → a/part.jpg.png, never out of the folder: for files whose siblings are not known beforehand."""
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", "//", ".")]
    return _fitted("/".join("__" if part == ".." else part for part in parts) + ".png")


def describe_model(predictor: Predictor) -> dict[str, Any]:
    """Return the model's metadata with the thresholds in force, and where it computes."""
    return {
        **asdict(predictor.metadata),
        "input_shape": list(predictor.input_shape),
        "threshold": predictor.threshold,
        "pixel_threshold": predictor.pixel_threshold,
        "provider": predictor.provider,
    }


def json_line(row: Row) -> str:
    """One row as JSON on one line; NaN is refused, for it is no JSON."""
    return json.dumps(row, allow_nan=False)


def check_out(
    target: Path,
    given: Path,
    files: Iterable[InputFile],
    ours: Collection[str] = RESULTS,
    what: str = "earlier results",
) -> None:
    """Refuse a folder for results that holds anything but `ours`, which the sentence calls `what`.

    Raises:
        UserError: it is a file, it holds something else, or one of `files` lies in it.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"{given} is a file; name a folder for the results.")
    found = os.listdir(target) if target.is_dir() else []  # noqa: PTH208 names are all that counts
    others = {name for name in found if not is_ours(name)} - {*ours, LOST}
    if others or any(file.path.resolve().is_relative_to(target) for file in files):
        example = f" (such as {sorted(others)[0]})" if others else ""
        raise UserError(f"{given} holds files that are no {what}{example}; name a new folder for --out.")


def _flat(row: Row) -> list[Any]:
    """A row of the table: the number of regions stands for the regions."""
    return [{**row, "regions": row.get("region_count", "")}.get(column, "") for column in COLUMNS]


def _fitted(name: str) -> str:
    return "/".join(map(fit_name, name.split("/")))


def _folded(name: str) -> str:
    """Alike for names that some file systems take for the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
