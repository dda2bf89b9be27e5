"""Scores images from files, folders, videos or a stream of paths: what `flawsmith predict` does (but for --watch).

`sources` says where images come from, `readahead` decodes and scores them, `writers` leaves the results.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import TextIO

from flawsmith.data.images import MAX_PIXELS
from flawsmith.errors import UserError, tell_once
from flawsmith.files import atomic_folder, restore
from flawsmith.inference import video
from flawsmith.inference.predictor import Predictor
from flawsmith.inference.readahead import Decoded, Readahead, judge
from flawsmith.inference.serialise import describe
from flawsmith.inference.sources import STREAM, InputFile, Inputs, Unreadable, find_images, read_stream, tasks_of
from flawsmith.inference.writers import (
    LineRows,
    Pictures,
    Rows,
    check_formats,
    check_out,
    open_rows,
    picture_name,
    picture_names,
)
from flawsmith.progress import bar

WORKERS = 2  # threads that decode


@dataclass(frozen=True)
class FolderReport:
    """What became of the files; `total` is the sum of the others. `out` is None where no folder was asked for."""

    out: Path | None
    good: int
    defective: int
    unreadable: tuple[Unreadable, ...]
    passed_over: Mapping[str, int] = field(default_factory=dict)

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


def predict_folder(
    predictor: Predictor,
    inputs: Sequence[Path],
    out: Path | None,
    *,
    formats: Sequence[str] = ("csv", "json"),
    overlays: bool = True,
    masks: bool = False,
    lines: TextIO | None = None,
    batch: int = 8,
    workers: int = WORKERS,
    every: int = 1,
    max_pixels: int = MAX_PIXELS,
    stdin: int = 0,
) -> FolderReport:
    """Score all images of `inputs` and put results in `formats`, overlays and masks (if asked) into the folder `out`.

    A file that cannot be read gets the verdict `unreadable` with its reason, and the work goes on. `out` appears when
    all is done, replacing the results of an earlier run; memory does not grow with the number of images. The results
    do not depend on `workers`.

    Args:
        inputs: as `find_images`, video files too; or `-` alone: paths come on a stream, one a line, and are scored as
            they come.
        out: None leaves no files.
        lines: gets a JSON line for each file as soon as it is known.
        workers: threads that decode while the model works.
        every: of a video, frames 0, `every`, 2 `every`, ... are scored.
        stdin: the descriptor of the stream.

    Raises:
        UserError: no image was found, a format is unknown, or `out` holds anything but earlier results.
    """
    for name, value in (("batch", batch), ("workers", workers), ("every", every)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be 1 or more.")
    formats = check_formats(formats)
    is_stream = STREAM in inputs
    if is_stream and len(inputs) > 1:
        raise UserError("`-` (paths on standard input) stands alone; leave the other inputs out, or send them too.")
    given = Inputs((), (), {}) if is_stream else find_images(inputs, leave_out=out)
    files, passed_over = given.files, Counter(given.passed_over)
    has_video = any(file.path.suffix.lower() in video.SUFFIXES for file in files)
    if has_video:
        video.check_installed()
    counts: Counter[str] = Counter()
    unreadable: list[Unreadable] = []
    stop = Event()
    source: Iterable[InputFile | Unreadable] = (
        read_stream(stdin, out, stop, passed_over) if is_stream else given.in_order
    )

    with ExitStack() as stack:
        rows: list[Rows] = []
        pictures = None
        if out is not None:
            restore(out)
            check_out(out.resolve(), out, files)
            folder = stack.enter_context(atomic_folder(out))
            rows += [stack.enter_context(open_rows(folder, form, predictor)) for form in formats]
            pictures = Pictures(folder, predictor, overlays=overlays, masks=masks)
        if lines is not None:
            rows.append(stack.enter_context(LineRows(lines, is_followed=True)))
        name_of = _naming(files) if pictures is not None else picture_name
        total = None if is_stream or has_video else len(files) + len(given.unreadable)
        progress = stack.enter_context(bar(what=predictor.metadata.category, total=total, unit="image"))
        tasks = tasks_of(source, every, predictor.reading(max_pixels, "--max-megapixels"), stop)
        ahead = stack.enter_context(Readahead(tasks, workers, batch + workers, stop))
        for item, prediction in judge(ahead, predictor, batch, is_live=is_stream):
            if item.image is None or prediction is None:
                unreadable.append(Unreadable(item.name, item.reason))
                row = unreadable_row(item)
            else:
                if said := predictor.tiling.objection(*item.image.shape[1:]):
                    tell_once(
                        f"lost {predictor.metadata.category}", f"{item.name} loses detail, and maybe others do: {said}"
                    )
                row = {"file": item.name, **describe(prediction, predictor, *item.image.shape[1:])}
                counts[row["verdict"]] += 1
                if pictures is not None:
                    row |= pictures.add(name_of(item.name), item.image, prediction)
            for table in rows:
                table.add(row)
            progress.update()
    return FolderReport(out, counts["good"], counts["defective"], tuple(unreadable), passed_over)


def unreadable_row(item: Decoded) -> dict[str, str]:
    return {"file": item.name, "verdict": "unreadable", "error": item.reason}


def _naming(files: Iterable[InputFile]) -> Callable[[str], str]:
    """Names of pictures: of files known beforehand the plain ones, of frames and what comes later the long ones."""
    known = picture_names(file for file in files if file.path.suffix.lower() not in video.SUFFIXES)
    return lambda name: known.get(name) or picture_name(name)
