"""Watches a folder of production images: what `flawsmith monitor` does with a model and its reference.

out/report.html   verdict, statistics, histogram and the highest-scoring images, for a person
out/drift.json    the same figures for a program
out/scores.csv    one row an image looked at, unreadable ones too
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flawsmith.data.images import MAX_PIXELS, FloatImage, read_image
from flawsmith.data.walk import count_sentence, printable
from flawsmith.errors import UserError
from flawsmith.files import atomic_folder, restore
from flawsmith.inference.predictor import Predictor
from flawsmith.inference.sources import InputFile, Unreadable, find_images
from flawsmith.inference.writers import check_out
from flawsmith.monitoring.config import MonitorSettings
from flawsmith.monitoring.drift import DriftReport, judge
from flawsmith.monitoring.reference import Measurement, measure
from flawsmith.monitoring.report import CSV, HTML, JSON, Picture, Watched, write_outputs
from flawsmith.progress import bar
from flawsmith.randomness import numpy_generator

if TYPE_CHECKING:
    from flawsmith.detector.teacher import Teacher

BATCH = 8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MonitorOutcome:
    """What became of a folder."""

    watched: Watched
    out: Path

    @property
    def report(self) -> DriftReport:
        """The verdict and what it rests on."""
        return self.watched.report

    @property
    def exit_code(self) -> int:
        """0: no drift; 3: drift. Unreadable files do not change it, since they are no part of the question."""
        return 3 if self.report.drifted else 0


@dataclass(frozen=True)
class Watcher:
    """A model with its frozen teacher and its answers on the calibration normals; `name` names it in the outputs."""

    predictor: Predictor
    teacher: "Teacher"
    reference: Measurement
    name: str = ""


def monitor_folder(
    watcher: Watcher, folder: Path, out: Path, settings: MonitorSettings, max_pixels: int = MAX_PIXELS
) -> MonitorOutcome:
    """Measure the images below `folder`, judge them against the reference, and put the results into the folder `out`.

    Of more than `settings.max_images` files so many are drawn at random, so that time and memory are bounded. A file
    that cannot be read is named, counted and skipped.

    Raises:
        UserError: there is no image, too few can be read, the reference does not belong to the model, or `out` holds
            anything but earlier results.
    """
    predictor, category = watcher.predictor, watcher.predictor.metadata.category
    given = find_images([folder], leave_out=out)
    found = given.files
    restore(out)
    check_out(out.resolve(), out, found, {HTML, JSON, CSV})
    with atomic_folder(out) as results:  # before the first image, so that it is told at once if it cannot be
        files = _draw(found, settings)
        unreadable = [Unreadable(printable(item.name), printable(item.reason)) for item in given.unreadable]

        def readable() -> Iterator[tuple[str, FloatImage]]:
            for file in bar(files, category, unit="image"):
                try:
                    image = predictor.tiling.prepare(read_image(file.path, predictor.reading(max_pixels)))
                except UserError as error:
                    unreadable.append(Unreadable(printable(file.name), _reason(error, file)))
                    continue
                yield printable(file.name), image

        told = count_sentence(len(files), given.passed_over, len(unreadable))
        log.info("%s: %s, of %d found (on %s).", category, told, len(found), predictor.provider)
        try:
            current = measure(predictor, watcher.teacher, readable(), BATCH)
        except UserError as error:
            if len(unreadable) == len(files) + len(given.unreadable):
                raise UserError(
                    f"None of the {len(unreadable)} images of {folder} can be read; {unreadable[0].reason}"
                ) from error
            raise
        generator = numpy_generator(settings.seed, "monitor", "permutations")
        report = judge(watcher.reference, current, predictor.threshold, settings, generator)
        watched = Watched(
            category=category,
            model=watcher.name,
            report=report,
            reference=watcher.reference,
            current=current,
            threshold=predictor.threshold,
            files_found=len(found) + len(given.unreadable),
            unreadable=tuple(unreadable),
            settings=settings,
        )
        write_outputs(results, watched, _highest(predictor, files, current, settings.gallery, max_pixels))
    return MonitorOutcome(watched, out)


def _draw(files: Sequence[InputFile], settings: MonitorSettings) -> list[InputFile]:
    """At most `settings.max_images` of the files, at random but the same for the same folder, in sorted order."""
    if len(files) <= settings.max_images:
        return list(files)
    generator = numpy_generator(settings.seed, "monitor", "files")
    chosen = sorted(generator.choice(len(files), settings.max_images, replace=False))
    return [files[index] for index in chosen]


def _highest(
    predictor: Predictor, files: Sequence[InputFile], current: Measurement, count: int, max_pixels: int
) -> Iterator[Picture]:
    """The highest-scoring images again, this time with their maps: keeping all maps would need memory for all."""
    paths = {printable(file.name): file.path for file in files}
    for index in current.scores.argsort(kind="stable")[::-1][:count]:
        name = str(current.names[index])
        try:
            image = read_image(paths[name], predictor.reading(max_pixels))
        except UserError as error:  # the line may have cleared it away meanwhile
            log.warning("Not drawn: %s", error)
            continue
        yield Picture.of(predictor, name, image)


def _reason(error: UserError, file: InputFile) -> str:
    return printable(str(error).replace(str(file.path), file.name))
