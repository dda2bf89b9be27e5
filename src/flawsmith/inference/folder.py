"""Scores folders of images and leaves a table, a JSON file and heat maps: what `flawsmith predict` does.

out/results.csv    one row a file, in sorted order, unreadable ones too
out/results.json   the same with the regions above the pixel threshold
out/overlays/...   one PNG an image, in the folders of the input
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from flawsmith.errors import UserError
from flawsmith.files import atomic_folder
from flawsmith.images import MAX_PIXELS, SUFFIXES, FloatImage, read_image, write_png
from flawsmith.inference.overlay import draw_overlay
from flawsmith.inference.predictor import Prediction, Predictor
from flawsmith.inference.regions import find_peak, find_regions

MAX_REGIONS = 100  # a file: a map that is hot all over must not fill the disk
HELD_PIXELS = 16_000_000  # a batch is closed early when its originals reach this (about 200 MB as floats)
CSV, JSON, OVERLAYS = "results.csv", "results.json", "overlays"
COLUMNS = (
    "file",
    "verdict",
    "score",
    "threshold",
    "peak_x",
    "peak_y",
    "peak_value",
    "regions",
    "width",
    "height",
    "error",
)


@dataclass(frozen=True)
class InputFile:
    """A file to score: where it lies, and its name in the results (relative, with forward slashes)."""

    path: Path
    name: str


@dataclass(frozen=True)
class Unreadable:
    """A file that could not be scored, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class FolderReport:
    """What became of the files; `total` is the sum of the others."""

    out: Path
    good: int
    defective: int
    unreadable: tuple[Unreadable, ...]

    @property
    def total(self) -> int:
        return self.good + self.defective + len(self.unreadable)

    def exit_code(self, fail_on_defect: bool = False) -> int:
        """0: all files read; 2: some could not be read; 3: `fail_on_defect` is asked for and a part is defective.

        A defect found outweighs an unreadable file: it answers the question that was asked.
        """
        if fail_on_defect and self.defective:
            return 3
        return 2 if self.unreadable else 0


def find_images(inputs: Sequence[Path], leave_out: Path | None = None) -> list[InputFile]:
    """List the images of files and folders (searched recursively), each once, sorted by name.

    Names are relative to the folder itself if one is given, else to the nearest folder that holds all inputs. In
    folders, hidden files and files without an image suffix are passed over; a file named explicitly is always kept.
    Nothing below `leave_out` counts, so that results are never taken for inputs.

    Raises:
        UserError: an input does not exist, or there is no image at all.
    """
    if not inputs:
        raise UserError("No input was given; name at least one image or folder.")
    skipped = None if leave_out is None else _absolute(leave_out)
    found: set[Path] = set()
    bases = []
    for given in inputs:
        path = _absolute(given)
        if path.is_dir():
            bases.append(path)
            found.update(_images_below(path, skipped))
        elif path.is_file():
            bases.append(path.parent)
            found.add(path)
        else:
            raise UserError(f"{given} does not exist; check the path.")
    if not found:
        names = ", ".join(str(path) for path in inputs)
        raise UserError(f"{names} holds no image ({', '.join(SUFFIXES)}); name a folder that does.")
    base = Path(os.path.commonpath(bases))
    files = [InputFile(path, path.relative_to(base).as_posix()) for path in found]
    return sorted(files, key=lambda file: file.name)


def predict_folder(
    predictor: Predictor,
    inputs: Sequence[Path],
    out: Path,
    *,
    batch: int = 8,
    overlays: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> FolderReport:
    """Score all images of `inputs` and put results.csv, results.json and (if asked) overlays into the folder `out`.

    A file that cannot be read gets the verdict `unreadable` with its reason, and the work goes on. `out` appears when
    all is done, replacing the results of an earlier run; memory does not grow with the number of files.

    Raises:
        UserError: no image was found, or `out` holds anything but earlier results.
    """
    if batch < 1:
        raise UserError(f"batch is {batch}; it must be 1 or more.")
    files = find_images(inputs, leave_out=out)
    target = out.resolve()  # what a link points to is replaced, not the link
    _check_out(target, out, files)
    pictures = _overlay_names(files) if overlays else {}
    counts: Counter[str] = Counter()
    unreadable: list[Unreadable] = []
    pending: list[tuple[InputFile, FloatImage | str]] = []  # an image, or why there is none

    with (
        atomic_folder(target) as folder,
        _Results(folder, predictor) as results,
        tqdm(total=len(files), desc=predictor.metadata.category, unit="image", disable=None) as progress,
    ):

        def flush() -> None:
            images = [image for _, image in pending if not isinstance(image, str)]
            predictions = iter(predictor.predict(images))
            for file, image in pending:
                if isinstance(image, str):
                    unreadable.append(Unreadable(file.name, image))
                    results.add({"file": file.name, "verdict": "unreadable", "error": image})
                    continue
                prediction = next(predictions)
                row = describe(prediction, predictor, image.shape[1], image.shape[2])
                counts[row["verdict"]] += 1
                results.add({"file": file.name, **row})
                if overlays:
                    write_png(folder / OVERLAYS / pictures[file.name], draw(image, prediction, predictor))
            progress.update(len(pending))
            pending.clear()

        held = 0
        for file in files:
            try:
                image = read_image(file.path, max_pixels)
                pending.append((file, image))
                held += image.shape[1] * image.shape[2]
            except UserError as error:
                pending.append((file, str(error).replace(str(file.path), file.name)))
            if len(pending) >= batch or held >= HELD_PIXELS:
                flush()
                held = 0
        if pending:
            flush()
    return FolderReport(out, counts["good"], counts["defective"], tuple(unreadable))


def describe(prediction: Prediction, predictor: Predictor, height: int, width: int) -> dict[str, Any]:
    """A prediction as plain JSON values, places in pixels of the `height` x `width` original."""
    peak, peak_x, peak_y = find_peak(prediction.anomaly_map, height, width)
    regions = find_regions(prediction.anomaly_map, predictor.pixel_threshold, height, width)
    return {
        "verdict": "defective" if prediction.is_defective else "good",
        "score": _short(prediction.score),
        "threshold": _short(predictor.threshold),
        "peak_x": peak_x,
        "peak_y": peak_y,
        "peak_value": _short(peak),
        "width": width,
        "height": height,
        "region_count": len(regions),
        "regions": [
            {**asdict(region), "area": _short(region.area), "peak": _short(region.peak)}
            for region in regions[:MAX_REGIONS]
        ],
    }


class _Results:
    """Writes both tables row by row, so that nothing of them is held in memory."""

    def __init__(self, folder: Path, predictor: Predictor) -> None:
        self._folder, self._predictor = folder, predictor
        self._first = True

    def __enter__(self) -> "_Results":
        # surrogateescape: a file name that is no valid UTF-8 is written back as it was
        self._csv = (self._folder / CSV).open("w", newline="", encoding="utf-8", errors="surrogateescape")
        self._json = (self._folder / JSON).open("w", encoding="utf-8")
        self._table = csv.writer(self._csv, lineterminator="\n")
        self._table.writerow(COLUMNS)
        model = {
            **asdict(self._predictor.metadata),
            "threshold": self._predictor.threshold,
            "pixel_threshold": self._predictor.pixel_threshold,
        }
        self._json.write(f'{{\n"model": {json.dumps(model, sort_keys=True)},\n"images": [')
        return self

    def add(self, row: dict[str, Any]) -> None:
        flat = {**row, "regions": row.get("region_count", "")}
        self._table.writerow([flat.get(column, "") for column in COLUMNS])
        self._json.write(f"{'' if self._first else ','}\n{json.dumps(row, allow_nan=False)}")
        self._first = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._json.write("\n]\n}\n")
        self._json.close()
        self._csv.close()


def draw(image: FloatImage, prediction: Prediction, predictor: Predictor) -> NDArray[np.uint8]:
    """The overlay of an image `(3, H, W)`: heat, outline and verdict; `(H, W, 3)`."""
    verdict = "DEFECTIVE" if prediction.is_defective else "good"
    relation = ">" if prediction.is_defective else "<="
    return draw_overlay(
        image,
        prediction.anomaly_map,
        (predictor.metadata.map_low, predictor.metadata.map_high),
        predictor.pixel_threshold,
        f"{verdict}  {prediction.score:.3g} {relation} {predictor.threshold:.3g}",
        prediction.is_defective,
    )


def _overlay_names(files: Iterable[InputFile]) -> dict[str, str]:
    """a/part.jpg → a/part.png, or a/part.jpg.png where a sibling would get the same name."""
    stems = {file.name: str(Path(file.name).with_suffix(".png")) for file in files}
    taken = Counter(stem.lower() for stem in stems.values())  # lower: some file systems do not tell case apart
    return {name: stem if taken[stem.lower()] == 1 else f"{name}.png" for name, stem in stems.items()}


def _check_out(target: Path, given: Path, files: Iterable[InputFile]) -> None:
    """`out` is replaced as a whole, so it must be new, empty, or hold earlier results and nothing else."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{given} is a file; name a folder for the results.")
    others = {path.name for path in target.iterdir()} - {CSV, JSON, OVERLAYS} if target.is_dir() else set()
    if others or any(file.path.resolve().is_relative_to(target) for file in files):
        example = f" (such as {sorted(others)[0]})" if others else ""
        raise UserError(f"{given} holds files that are no earlier results{example}; name a new folder for --out.")


def _images_below(folder: Path, skipped: Path | None) -> Iterable[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        inside = skipped is not None and path.is_relative_to(skipped)
        if path.suffix.lower() in SUFFIXES and not hidden and not inside and path.is_file():
            yield path


def _absolute(path: Path) -> Path:
    """Without resolving links: DVC links data files into place, and their names here are the ones that count."""
    return Path(os.path.normpath(path.absolute()))


def _short(value: float) -> float:
    """7 significant digits: all that float32 holds."""
    return float(f"{value:.7g}")
