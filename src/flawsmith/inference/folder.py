"""Scores images from files, folders, videos or a stream of paths: what `flawsmith predict` does without --watch.

`sources` says where images come from, `prefetch` decodes and scores them, `writers` leaves the results.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Event

from flawsmith.errors import UserError, tell_once
from flawsmith.files import atomic_folder, restore
from flawsmith.inference import video
from flawsmith.inference.options import PredictOptions, PredictReport
from flawsmith.inference.predictor import Predictor
from flawsmith.inference.prefetch import predict_stream
from flawsmith.inference.sources import STREAM, InputFile, Inputs, Unreadable, find_images, read_stream, tasks_of
from flawsmith.inference.writers import (
    Pictures,
    Write,
    check_out,
    make_row,
    open_lines,
    open_rows,
    picture_name,
    picture_names,
)
from flawsmith.progress import bar


def predict_folder(
    predictor: Predictor, inputs: Sequence[Path], out: Path | None, options: PredictOptions, stdin: int = 0
) -> PredictReport:
    """Score all images of `inputs` and put tables, overlays and masks into the folder `out`, as the options ask.

    A file that cannot be read gets the verdict `unreadable` with its reason, and the work goes on. `out` appears when
    all is done, replacing the results of an earlier run. Memory does not grow with the number of images. The results
    do not depend on `options.workers`.

    Args:
        inputs: as `find_images`, video files too; or `-` alone: paths come on a stream, one a line, and are scored as
            they come.
        out: None leaves no files.
        stdin: the descriptor of that stream.

    Raises:
        UserError: no image was found, or `out` holds anything but earlier results.
    """
    is_stream = STREAM in inputs
    if is_stream and len(inputs) > 1:
        raise UserError("`-` (paths on standard input) stands alone; leave the other inputs out, or send them too.")
    given = Inputs() if is_stream else find_images(inputs, leave_out=out)
    passed_over = Counter(given.passed_over)
    has_video = any(video.is_video(file.path) for file in given.files)
    if has_video:
        video.check_installed()
    counts: Counter[str] = Counter()
    skipped: list[Unreadable] = []
    stop = Event()
    source = read_stream(stdin, out, stop, passed_over) if is_stream else given.in_order
    tasks = tasks_of(source, options.every, predictor.reading(options.max_pixels, "--max-megapixels"), stop)

    with ExitStack() as stack:
        tables: list[Write] = []
        pictures = None
        lines = [] if options.jsonl is None else [stack.enter_context(open_lines(options.jsonl))]
        if out is not None:
            restore(out)
            check_out(out.resolve(), out, given.files)
            folder = stack.enter_context(atomic_folder(out))
            tables = [
                stack.enter_context(open_rows(folder, form, predictor)) for form in dict.fromkeys(options.formats)
            ]
            pictures = Pictures(folder, predictor, options)
        name_picture = _naming(given.files)
        total = None if is_stream or has_video else len(given.in_order)
        progress = stack.enter_context(bar(what=predictor.metadata.title, total=total, unit="image"))
        answers = predict_stream(tasks, predictor, options.batch, options.workers, stop)
        for answer in stack.enter_context(closing(answers)):
            row = make_row(answer, predictor)
            counts[row["verdict"]] += 1
            if answer.error is not None:
                skipped.append(Unreadable(answer.name, row["error"]))
            elif answer.image is not None and (said := predictor.tiling.objection(*answer.image.shape[1:])):
                key = f"lost {predictor.metadata.category}"
                tell_once(key, f"{answer.name} loses detail, and maybe others do: {said}")
            if pictures is not None:
                row |= pictures.add(name_picture(answer.name), answer)
            for write in (*tables, *lines):
                write(row)
            progress.update()
    return PredictReport(out, counts["good"], counts["defective"], len(skipped), passed_over, tuple(skipped))


def _naming(files: Iterable[InputFile]) -> Callable[[str], str]:
    """Name pictures: files known beforehand get short names, frames and what comes on a stream long ones."""
    known = picture_names(file for file in files if not video.is_video(file.path))
    return lambda name: known.get(name) or picture_name(name)
