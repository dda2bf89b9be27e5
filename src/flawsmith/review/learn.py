"""Turns verdicts that people agree on into data: good images to learn from, defective ones to be judged by.

    train/good/learned/<digest>.<suffix>           good, false alarms above all
    test/<defect>/<digest>.<suffix>                defective
    ground_truth/<defect>/<digest>_mask.png        where, if somebody drew boxes

No image that was there before changes its side of the fit/calibration split: the split ranks images by a hash of their
names, so new ones get names whose ranks lie on the side where they belong.
"""

import itertools
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flawsmith.data.dataset import GOOD_NAMES, MIN_CALIBRATION_IMAGES, Dataset, split_rank
from flawsmith.data.images import Mask, read_size, write_png
from flawsmith.data.statistics import find_copies, read_statistics, try_statistics
from flawsmith.data.walk import SUFFIXES, is_hidden
from flawsmith.demo.render import KINDS
from flawsmith.dvc import read_stages
from flawsmith.errors import UserError
from flawsmith.files import digest_file, digest_name, sole_writer
from flawsmith.layout import Layout
from flawsmith.review.verdicts import DEFECTIVE, GOOD, Box, Opinion

LEARNED = "train/good/learned"
NAME_DIGITS = 16  # of an image's digest, in the name of its copy


@dataclass(frozen=True)
class Copy:
    """An image to be copied, its digest, its place in the category's folder, and its mask if there is one."""

    source: Path
    image: str
    target: str
    mask: Mask | None = None

    @property
    def mask_target(self) -> str:
        """Where the mask belongs."""
        place = Path(self.target)
        return f"ground_truth/{place.parent.name}/{place.stem}_mask.png"


@dataclass(frozen=True)
class Plan:
    """What verdicts come to.

    Attributes:
        fit, calibration, defects: the copies to be made, by what they are for.
        left_out: a sentence for each image that is not copied.
    """

    fit: tuple[Copy, ...] = ()
    calibration: tuple[Copy, ...] = ()
    defects: tuple[Copy, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def copies(self) -> tuple[Copy, ...]:
        """All copies to be made."""
        return self.fit + self.calibration + self.defects


def readers(layout: Layout, plan: Plan) -> list[str]:
    """The stages that read what the plan changes, in dvc.yaml's order; those behind them run again, too."""
    data = "${data.root}/${item.category}"
    changed = {data, f"{data}/train"} if plan.fit or plan.calibration else {data}
    return [
        name for name, stage in read_stages(layout.root).items() if changed & {str(d) for d in stage.get("deps", [])}
    ]


def learn(layout: Layout, said: Sequence[Opinion], defect: str, dry_run: bool = False) -> Plan:
    """Copy the images that people agree on into the category's folder, all or none; returns the plan of it.

    Images that are there already are not copied again, so a second call changes nothing.

    Args:
        layout: of the category.
        said: the opinions (`verdicts.opinions`).
        defect: the folder in `test` for defective images.
        dry_run: copy nothing.

    Raises:
        UserError: the category cannot take images, or `defect` is no name for a type.
    """
    if not defect or defect != Path(defect).name or is_hidden(defect) or defect.casefold() in GOOD_NAMES:
        raise UserError(f"--defect {defect}: name a type of defect as a folder is named, such as `scratch`.")
    surface = layout.surface()
    if layout.reads_demo_data and layout.category in KINDS:
        raise UserError(
            f"{surface.folder} is rendered by the stage demo-data, which would remove what is put there; copy it to a "
            "category of your own, such as data/mine."
        )
    if dry_run:
        return _plan(layout, surface, said, defect)
    with sole_writer(surface.folder) as place:
        plan = _plan(layout, surface, said, defect)
        prefix = f".{digest_name(place.target.name)}-"  # what a killed run leaves, the next writer removes
        staged = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=place.room))
        try:
            _copy(plan.copies, staged, place.target)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return plan


def _copy(copies: Sequence[Copy], staged: Path, folder: Path) -> None:
    """Copy to `staged` first, where all that can fail fails, then rename into the category's folder."""
    masks = [copy.mask_target for copy in copies if copy.mask is not None]
    targets = [*masks, *(copy.target for copy in copies)]  # an image with its mask missing would never get it again
    for target in targets:
        (staged / target).parent.mkdir(parents=True, exist_ok=True)
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
    for copy in copies:
        shutil.copyfile(copy.source, staged / copy.target)
        if digest_file(staged / copy.target) != copy.image:
            raise UserError(f"{copy.source} changed while it was copied; nothing was learned, call again.")
        if copy.mask is not None:
            write_png(staged / copy.mask_target, copy.mask)
    for target in targets:
        (staged / target).rename(folder / target)


def _plan(layout: Layout, surface: Dataset, said: Sequence[Opinion], defect: str) -> Plan:
    test = surface.find_test()
    normals = surface.normals()
    present = {digest_file(path): path for path in (*test.images, *normals)}
    wanted, left_out = _readable(said, present)
    defects: list[Copy] = []
    has_good = any(test.name_of(path).split("/")[0].casefold() in GOOD_NAMES for path in test.images)
    for opinion, path in wanted:
        if opinion.verdict != DEFECTIVE:
            continue
        if not has_good:
            left_out.append(f"{path} is defective, but {test.folder}/{GOOD} holds no image, and a test set needs both.")
            continue
        name = f"{opinion.image[:NAME_DIGITS]}{path.suffix.lower()}"
        try:
            mask = _draw(opinion.boxes, read_size(path, layout.data.reading))
        except UserError as error:
            left_out.append(str(error))
            continue
        defects.append(Copy(path, opinion.image, f"test/{defect}/{name}", mask))
    goods = {path: opinion.image for opinion, path in wanted if opinion.verdict == GOOD}
    fit, calibration = _split(layout, normals, goods, left_out)
    return Plan(fit, calibration, tuple(defects), tuple(left_out))


def _readable(said: Iterable[Opinion], present: dict[str, Path]) -> tuple[list[tuple[Opinion, Path]], list[str]]:
    """The agreed opinions on images that are new, with their files, and sentences on all others."""
    wanted: list[tuple[Opinion, Path]] = []
    left_out = []
    for opinion in said:
        shown = opinion.paths[0]
        there = present.get(opinion.image)
        if not opinion.verdict:
            left_out.append(f"{shown}: people disagree, or somebody is unsure.")
        elif there is not None:
            is_good = there.parent.name.casefold() in GOOD_NAMES or LEARNED in there.as_posix()
            as_said = is_good == (opinion.verdict == GOOD)
            left_out.append(
                f"{shown} is in the data already, as {there}."
                if as_said
                else f"{shown} is {opinion.verdict} by all, but lies in the data as {there}; move it there by hand."
            )
        else:
            path = next((path for path in map(Path, opinion.paths) if _is_file(path, opinion.image)), None)
            if path is None:
                left_out.append(f"{shown} is gone, or not what people saw any more.")
            elif path.suffix.lower() not in SUFFIXES:
                left_out.append(f"{shown} has no suffix of an image ({', '.join(SUFFIXES)}).")
            else:
                wanted.append((opinion, path))
    return wanted, left_out


def _is_file(path: Path, image: str) -> bool:
    try:
        return path.is_file() and digest_file(path) == image
    except OSError:
        return False


def _draw(boxes: Sequence[Box], shape: tuple[int, int]) -> Mask | None:
    """A mask of `shape` (H, W) that is True in the boxes; None where there is nothing to draw."""
    mask = np.zeros(shape, np.bool_)
    for x, y, width, height in boxes:
        mask[y : y + height, x : x + width] = True
    return mask if mask.any() else None


def _split(
    layout: Layout, normals: Sequence[Path], goods: dict[Path, str], left_out: list[str]
) -> tuple[tuple[Copy, ...], tuple[Copy, ...]]:
    """The copies of good images (path → digest) for fit and for calibration; `left_out` gets what is not usable."""
    data, split = layout.data, layout.split()
    found, bad = try_statistics(list(goods), data.reading)
    left_out += bad.values()
    usable = [path for path in goods if path in found]
    statistics = read_statistics(normals, data.reading, layout.kept_statistics())
    groups = find_copies([*normals, *usable], [*statistics, *(found[path] for path in usable)])
    repeated = {path: group[0] for group in groups for path in group[1:]}
    kept = []
    for path in usable:
        if found[path].is_flat:
            left_out.append(f"{path} shows one value all over.")
        elif path in repeated:
            left_out.append(f"{path} shows the same picture as {repeated[path]}.")
        else:
            kept.append(path)
    copies = {path for group in split.copies for path in group[1:]}
    pictures = len([path for path in normals if path not in copies])
    # as many new ones calibrate as the split will demand more; then those that calibrate now stay the first
    total = max(MIN_CALIBRATION_IMAGES, round((pictures + len(kept)) * data.calibration_fraction))
    more = total - len(split.calibration)
    border = min(split_rank(path, data.split_seed) for path in split.fit if path not in copies)
    sides: tuple[list[Copy], list[Copy]] = ([], [])
    for number, path in enumerate(sorted(kept, key=goods.__getitem__)):
        calibrates = number < more
        target = _name(goods[path], path.suffix.lower(), data.split_seed, border, calibrates)
        sides[calibrates].append(Copy(path, goods[path], target))
    return tuple(sides[False]), tuple(sides[True])


def _name(image: str, suffix: str, seed: int, border: bytes, calibrates: bool) -> str:
    """The first of the names for an image whose rank lies on the side of the border where it belongs."""
    ends = itertools.chain([""], (f"-{number}" for number in itertools.count(1)))
    names = (f"{LEARNED}/{image[:NAME_DIGITS]}{end}{suffix}" for end in ends)
    return next(name for name in names if (split_rank(Path(name), seed) < border) == calibrates)
