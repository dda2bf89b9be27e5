"""Defects of known size and contrast on normal images, and whether a detector finds them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from flawsmith.data.tiling import Run
from flawsmith.evaluation.detection import Trials, Unit
from flawsmith.inference.predictor import flags
from flawsmith.progress import bar
from flawsmith.randomness import numpy_generator
from flawsmith.sequences import batched
from flawsmith.synthesis.config import SynthesizeSettings
from flawsmith.synthesis.generate import TripletGenerator
from flawsmith.synthesis.masks import log_uniform
from flawsmith.synthesis.sources.base import Candidate, Pixels

ROLE = "detection"  # of all that is drawn here
DIAMETERS = (3.0, 64.0)  # in pixels of what the detector sees, as far as the windows hold them
CONTRASTS = ((3.0, 11.0), (11.0, 40.0))  # grey levels; beyond, hardly any is found, or missed
NOTHING = 0.5  # grey levels: less is no defect

Judge = Callable[[NDArray[np.uint8]], NDArray[np.bool_]]
"""Images (B, 3, H, W) → whether each is flagged (B,)."""


def judge_by(run: Run, threshold: float, batch: int) -> Judge:
    """The verdicts of a network at a threshold, on `batch` images at once."""

    def judge(images: NDArray[np.uint8]) -> NDArray[np.bool_]:
        parts = batched(images, batch)
        scores = [run(np.stack(part).astype(np.float32) / np.float32(255))[1] for part in parts]
        return flags(np.concatenate(scores), threshold)

    return judge


def spots(settings: SynthesizeSettings, pixels: int) -> SynthesizeSettings:
    """The settings for spots of DIAMETERS in images of so many pixels.

    There are no ridges, whose area says little about their size. All are opaque and however faint are kept, because
    their contrast is varied afterwards.
    """
    low, high = (min(np.pi / 4 * diameter**2 / pixels, 0.5) for diameter in DIAMETERS)
    return replace(settings, area=(low, high), ridge_share=0.0, opacity=(1.0, 1.0), visibility=0.0)


def try_defects(
    maker: TripletGenerator, source: str, judge: Judge, plain: NDArray[np.int64], unit: Unit, count: int
) -> Trials:
    """Show `count` defects of one source to a detector, each at two of CONTRASTS, as far as it has them.

    They lie by turns on the normals of `maker` that `plain` lists. The size of a defect is that of its
    drawn mask; its contrast is the mean change of the mask's pixels and channels in the image that is judged.
    """
    names = [maker.twins.get(name, name) for name in maker.names]
    owners = {name: place for place, name in enumerate(dict.fromkeys(names))}
    rows: list[tuple[float, float, bool, int]] = []
    with bar(what=f"find {source}", total=count, unit="defect") as progress:
        for batch in _batches(maker, source, plain, count):
            made = [image for image, _ in maker.sources[source].make(batch)]
            shown = [
                one
                for item, image in zip(batch, made, strict=True)
                for one in _Shown.of(item, maker.normals[item.normal], image, maker.settings.seed)
            ]
            hits = judge(np.stack([one.image for one in shown]))
            for one, hit in zip(shown, hits, strict=True):
                if one.contrast >= NOTHING:
                    owner = owners[names[one.item.normal]]
                    rows.append((one.item.defect.outline.mask.sum(), one.contrast, hit, owner))
            progress.update(len(batch))
    areas, contrasts, found, images = np.asarray(rows, np.float64).reshape(-1, 4).T
    return Trials(unit.diameter(areas), contrasts, found > 0, images.astype(np.int64))


@dataclass(frozen=True, eq=False)
class _Shown:
    item: Candidate
    image: Pixels
    contrast: float

    @classmethod
    def of(cls, item: Candidate, normal: Pixels, made: Pixels, seed: int) -> "Iterator[_Shown]":
        """One defect at contrasts that are log-uniform within each of CONTRASTS, but no stronger than it was made."""
        generator, mask = numpy_generator(seed, ROLE, "contrast", item.source, item.number), item.defect.outline.mask
        change = made.astype(np.float32) - normal
        full = float(np.abs(change[:, mask]).mean())
        for bounds in CONTRASTS:
            share = np.float32(min(1.0, log_uniform(generator, bounds) / max(full, NOTHING)))
            image = np.rint(normal + share * change).astype(np.uint8)
            yield cls(item, image, float(np.abs(image.astype(np.float32) - normal)[:, mask].mean()))


def _batches(maker: TripletGenerator, source: str, plain: NDArray[np.int64], count: int) -> Iterator[list[Candidate]]:
    """The defects to try, those with windows of one size together."""
    alike: dict[int, list[Candidate]] = {}
    for number in range(count if plain.size else 0):
        index = int(plain[number % len(plain)])
        generator = numpy_generator(maker.settings.seed, ROLE, source, number)
        others = np.flatnonzero(np.arange(len(maker.normals)) != index)
        defect = maker.sources[source].draw(generator, index, others)
        alike.setdefault(defect.outline.window[2], []).append(Candidate(ROLE, number, index, source, defect))
    for _, items in sorted(alike.items()):
        yield from batched(items, maker.settings.batch)
