"""Triplets (normal, defect, mask): the disturbed reverse process, or a control, blended into normal images.

A *candidate* is fully decided by the seed, its role and its number; candidates are sampled in batches of windows of one
size, and those whose change nobody can see are dropped. The batch a candidate belongs to is decided by its number too,
so that any triplet can be made again bit for bit (kernels round differently for other batch sizes).

Whatever fills the masks (`synthesize.texture`) and outlines them (`synthesize.mask`), candidates share source images,
windows, blending and the rule of what can be seen. Some carry a shade or a pasted patch instead.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from numpy.typing import NDArray
from scipy import ndimage

from flawsmith.data.foreground import Foreground
from flawsmith.data.images import Mask
from flawsmith.data.triplets import FIT, VALIDATION
from flawsmith.devices import CPU, Compute
from flawsmith.diffusion.sampler import SamplingPlan, sample_disturbed
from flawsmith.diffusion.unet import Denoiser
from flawsmith.errors import UserError
from flawsmith.progress import bar
from flawsmith.randomness import numpy_generator, torch_generator
from flawsmith.synthesis.config import SynthesizeSettings
from flawsmith.synthesis.controls import cutpaste_texture, noise_mask, own_texture, rectangle_mask
from flawsmith.synthesis.masks import MaskDraw, feathered, sample_mask
from flawsmith.synthesis.shades import IlluminationDefect, sample_shade, shaded

CHUNK_BATCHES = 4  # candidates are drawn in chunks of so many batches, then grouped by window size
MAX_TRIES = 5  # candidates drawn for each triplet wanted before giving up
CLOSING = 2  # pixels: radius of the square that closes gaps in the mask of changed pixels
MIN_PIXELS = 4  # a visible defect has at least so many changed pixels
MIN_SEEN = 0.5  # share of a mark whose pixels have themselves changed, as the quality gate demands of most
OUTLINES = {"perlin": sample_mask, "noise": noise_mask, "rectangle": rectangle_mask}  # of `synthesize.mask`
SHADE = "shade"  # in the place of a texture
PATCH = "patch"
TEXTURE = "texture"  # of a candidate that carries neither: defects of `synthesize.texture`

Stream = tuple[str | int, ...]  # names of a random stream


@dataclass(frozen=True)
class DefectSpec:
    """What is drawn for one defect of a candidate before its texture is made.

    Attributes:
        texture: as `synthesize.texture`, or `shade`.
        donor: index of the normal image whose region is the texture; the source's own where there is no other.
        strength, start: of the disturbed reverse process.
        opacity: of the blend; 1 for what is pasted or shaded.
        stream: name of the random stream of the texture.
        shade: of a shade alone.
    """

    texture: str
    donor: int
    strength: float
    start: float
    opacity: float
    outline: MaskDraw
    stream: Stream
    shade: IlluminationDefect | None = None


@dataclass(frozen=True)
class TripletSpec:
    """All that is drawn for one triplet before any texture is made."""

    role: str
    number: int
    source: int  # index of the normal image
    defects: tuple[DefectSpec, ...]  # one or more; later ones are blended over earlier ones
    kind: str = TEXTURE  # or SHADE, PATCH: what `quotas` counts

    @property
    def outline(self) -> MaskDraw:
        """The first defect's: its window decides the candidate's batch."""
        return self.defects[0].outline


@dataclass(frozen=True)
class Triplet:
    """One accepted triplet: images (3, H, W) uint8 and the mask (H, W) of the pixels that really changed."""

    candidate: TripletSpec
    normal: NDArray[np.uint8]
    defect: NDArray[np.uint8]
    mask: Mask


@dataclass(frozen=True)
class TripletGenerator:
    """What every triplet of a category is made from.

    Attributes:
        denoiser, scheduler: needed for the texture `diffusion` alone.
        normals: (N, 3, H, W) uint8, the fit part at the model's size: images, or tiles of them.
        names: N file names, the manifest's name of each normal; tiles of one image share it.
        compute: where the denoiser lies, and its precision.
        places: of each normal the tile's top and left in pixels at working resolution; None for whole images.
        twins: name → the name whose picture it shows too, of the files that are copies.
    """

    denoiser: Denoiser | None
    scheduler: DDPMScheduler | None
    normals: NDArray[np.uint8]
    names: Sequence[str]
    foreground: Foreground
    settings: SynthesizeSettings
    compute: Compute = CPU
    places: Sequence[tuple[int, int] | None] = ()
    twins: Mapping[str, str] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the normals."""
        return self.normals.shape[2], self.normals.shape[3]

    def sources(self, role: str) -> NDArray[np.int64]:
        """Indices of the normals of one role: validation sources are those of a fixed share of the pictures, of which
        no training triplet uses any part or copy."""
        names = [self.twins.get(name, name) for name in self.names]
        files = {name: place for place, name in enumerate(dict.fromkeys(names))}
        order = numpy_generator(self.settings.seed, "sources").permutation(len(files))
        held = min(max(1, round(self.settings.validation_fraction * len(order))), len(order) - 1)
        chosen = order[:held] if role == VALIDATION else order[held:]
        return np.flatnonzero(np.isin([files[name] for name in names], chosen))

    def candidate(self, role: str, number: int) -> TripletSpec:
        """Draw candidate `number` of a role: the same one whenever it is asked for."""
        settings = self.settings
        generator = numpy_generator(settings.seed, "candidate", role, number)
        sources = self.sources(role)
        source = int(generator.choice(sources))
        allowed = self._allowed(source)
        # what is new has streams of its own, so that it moves no draw of a candidate without it
        for name, share, draw in (
            (SHADE, settings.shade_share, self._shade),
            (PATCH, settings.patch_share, self._patch),
        ):
            if numpy_generator(settings.seed, name, role, number).random() < share:
                return TripletSpec(role, number, source, (draw(generator, source, allowed, (role, number)),), name)
        count = int(numpy_generator(settings.seed, "defects", role, number).integers(*settings.defects, endpoint=True))
        if count > 1:  # the defects of one image share the area that a single one may have
            low, high = settings.area
            settings = replace(settings, area=(low, max(low, high / count)))
        defects = []
        for place in range(count):
            stream: Stream = (role, number, place) if place else (role, number)
            if place:
                generator = numpy_generator(settings.seed, "candidate", *stream)
            defects.append(self._defect(generator, settings, source, sources, allowed, stream))
        return TripletSpec(role, number, source, tuple(defects))

    def _defect(
        self,
        generator: np.random.Generator,
        settings: SynthesizeSettings,
        source: int,
        sources: NDArray[np.int64],
        allowed: Mask | None,
        stream: Stream,
    ) -> DefectSpec:
        strength, start, opacity = (
            float(generator.uniform(*bounds)) for bounds in (settings.strength, settings.start, settings.opacity)
        )
        outline = OUTLINES[settings.mask](generator, self.shape, settings, allowed)
        donor = source
        others = sources[sources != source]  # of the same role: the roles share no image in this way either
        if settings.texture == "own" and others.size:
            donor = int(numpy_generator(settings.seed, "donor", *stream).choice(others))
        opacity = 1.0 if settings.texture == "cutpaste" else opacity
        return DefectSpec(settings.texture, donor, strength, start, opacity, outline, stream)

    def _shade(self, generator: np.random.Generator, source: int, allowed: Mask | None, stream: Stream) -> DefectSpec:
        outline, shade = sample_shade(generator, self.normals[source], self.settings, allowed)
        return DefectSpec(SHADE, source, 0.0, 0.0, 1.0, outline, stream, shade)

    def _patch(self, generator: np.random.Generator, source: int, allowed: Mask | None, stream: Stream) -> DefectSpec:
        outline = rectangle_mask(generator, self.shape, self.settings, allowed)
        return DefectSpec("cutpaste", source, 0.0, 0.0, 1.0, outline, stream)

    def _allowed(self, index: int) -> Mask | None:
        """Where a normal image may have a defect; None is everywhere."""
        if not self.foreground.is_object:
            return None
        return self.foreground.mask(self.normals[index].astype(np.float32) / np.float32(255))

    def chunk(self, role: str, index: int) -> list[list[TripletSpec]]:
        """The candidates of one chunk as batches of equal windows, each at most `settings.batch` long."""
        size = CHUNK_BATCHES * self.settings.batch
        drawn = [self.candidate(role, number) for number in range(index * size, (index + 1) * size)]
        batches = []
        for side in sorted({candidate.outline.window[2] for candidate in drawn}):
            alike = [candidate for candidate in drawn if candidate.outline.window[2] == side]
            starts = range(0, len(alike), self.settings.batch)
            batches += [alike[first : first + self.settings.batch] for first in starts]
        return batches

    def make(self, batch: Sequence[TripletSpec]) -> list[Triplet | None]:
        """Make the textures of one batch and blend them in; None where the defect cannot be seen."""
        sampled = self._sample([(item, defect) for item in batch for defect in item.defects])
        return [self._blend(item, sampled) for item in batch]

    def _sample(self, wanted: Sequence[tuple[TripletSpec, DefectSpec]]) -> dict[Stream, NDArray[np.float32]]:
        """Textures (3, side, side) in [0, 255] from the disturbed reverse process, by the names of their streams."""
        settings = self.settings
        wanted = [(item, defect) for item, defect in wanted if defect.texture == "diffusion"]
        if not wanted:
            return {}
        if self.denoiser is None or self.scheduler is None:
            raise ValueError("the texture `diffusion` needs a denoiser and its scheduler")
        plan = SamplingPlan(settings.steps, settings.rule, settings.disturb_until, settings.octaves, self.compute)
        textures = {}
        for side in sorted({defect.outline.window[2] for _, defect in wanted}):
            alike = [(item, defect) for item, defect in wanted if defect.outline.window[2] == side]
            for first in range(0, len(alike), settings.batch):
                some = alike[first : first + settings.batch]
                windows = np.stack([_window(self.normals[item.source], defect) for item, defect in some])
                sampled = sample_disturbed(
                    self.denoiser,
                    self.scheduler,
                    torch.from_numpy(windows.astype(np.float32) / np.float32(127.5) - np.float32(1)),
                    [defect.start for _, defect in some],
                    [defect.strength for _, defect in some],
                    plan,
                    [torch_generator(settings.seed, "texture", *defect.stream) for _, defect in some],
                )
                pixels = ((sampled.numpy() + np.float32(1)) * np.float32(127.5)).astype(np.float32)
                textures.update({defect.stream: pixel for (_, defect), pixel in zip(some, pixels, strict=True)})
        return textures

    def _texture(
        self, item: TripletSpec, defect: DefectSpec, sampled: Mapping[Stream, NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """What fills the window of one defect, (3, side, side) in [0, 255]."""
        normal = self.normals[item.source]
        if defect.texture == "diffusion":
            texture = sampled[defect.stream]
        else:
            generator = numpy_generator(self.settings.seed, "texture", *defect.stream)
            if defect.texture == "cutpaste":
                texture = cutpaste_texture(generator, normal, defect.outline)
            else:
                allowed = self._allowed(defect.donor)
                texture = own_texture(generator, self.normals[defect.donor], defect.outline.window[2], allowed)
        if (normal == normal[:1]).all():  # a gray surface has gray defects
            texture = np.repeat(texture.mean(axis=0, keepdims=True), 3, axis=0)
        return texture

    def _blend(self, item: TripletSpec, sampled: Mapping[Stream, NDArray[np.float32]]) -> Triplet | None:
        """defect = normal + opacity * alpha * (texture - normal) inside each window, untouched outside."""
        settings, normal = self.settings, self.normals[item.source]
        first = item.defects[0]
        if first.shade is not None:
            return self._blend_shade(item, first.shade, first.outline.mask)
        defect, region = normal.copy(), np.zeros(normal.shape[1:], np.bool_)
        for part in item.defects:
            texture = self._texture(item, part, sampled)
            alpha = feathered(part.outline.mask, 0.0 if part.texture == "cutpaste" else settings.feather)
            inside = _window(defect, part).astype(np.float32)
            weight = np.float32(part.opacity) * _window(alpha[None], part)
            _window(defect, part)[:] = np.rint(np.clip(inside + weight * (texture - inside), 0, 255)).astype(np.uint8)
            region |= alpha > 0
        mask = changed_mask(normal, defect, region, settings.visibility)
        # what changed too little to be marked is put back, so that nothing changes far from the mask
        defect = np.where(ndimage.distance_transform_edt(~mask) <= settings.feather + 1, defect, normal)
        drawn = np.logical_or.reduce([part.outline.mask for part in item.defects])
        wanted = max(MIN_PIXELS, settings.min_changed * int(drawn.sum()))
        # closing may have drawn more of the mask than changed, on a lively texture or of loose pixels
        visible = _change(normal, defect)[mask] > settings.visibility * 255
        is_seen = mask.sum() >= wanted and visible.sum() >= MIN_SEEN * mask.sum()
        return Triplet(item, normal, defect, mask) if is_seen else None

    def _blend_shade(self, item: TripletSpec, shade: IlluminationDefect, mask: Mask) -> Triplet | None:
        """A shade fades out, so it is marked where its own change can be seen, whatever the texture under it adds."""
        settings, normal = self.settings, self.normals[item.source]
        defect = shaded(normal, shade, mask, settings.visibility)
        visible = _change(normal, defect)[mask] > settings.visibility * 255
        wanted = max(MIN_PIXELS, settings.min_changed * int(mask.sum()))
        return Triplet(item, normal, defect, mask) if visible.sum() >= wanted else None


def generate(maker: TripletGenerator, role: str, count: int) -> Iterator[Triplet]:
    """Yield `count` triplets of one role, of each kind as many as `quotas` says, in the order of their candidate
    numbers within each chunk.

    Kinds are drawn a candidate, but what is dropped differs: nearly every shade can be seen, many a defect cannot. So
    candidates of a kind that is complete are passed over.

    Raises:
        UserError: too many candidates of a kind left no visible change.
    """
    wanted, index = quotas(maker.settings, count), 0
    left, tried = dict(wanted), Counter[str]()
    with bar(what=f"synthesize {role}", total=count, unit="triplet") as progress:
        while any(left.values()):
            # a batch is made whole or not at all: what a triplet looks like depends on its company
            batches = [batch for batch in maker.chunk(role, index) if any(left[item.kind] for item in batch)]
            tried.update(item.kind for batch in batches for item in batch)
            results = [triplet for batch in batches for triplet in maker.make(batch) if triplet is not None]
            for triplet in sorted(results, key=lambda item: item.candidate.number):
                if left[triplet.candidate.kind]:
                    left[triplet.candidate.kind] -= 1
                    progress.update()
                    yield triplet
            index += 1
            for kind, missing in left.items():
                if missing and tried[kind] >= MAX_TRIES * max(wanted[kind], CHUNK_BATCHES * maker.settings.batch):
                    remedy = _REMEDIES[maker.settings.texture if kind == TEXTURE else kind]
                    raise UserError(
                        f"Only {wanted[kind] - missing} of {tried[kind]} synthetic {_NAMES[kind]} could be seen; "
                        f"{remedy}lower synthesize.min_changed or visibility."
                    )


def quotas(settings: SynthesizeSettings, count: int) -> dict[str, int]:
    """How many of `count` triplets of one role are of each kind: the settings' shares are shares of triplets.

    A share below 1 leaves one triplet at least to the rest.
    """
    left = count

    def part(share: float) -> int:
        return left if share == 1 else min(round(share * left), max(left - 1, 0))

    left -= (shades := part(settings.shade_share))
    left -= (patches := part(settings.patch_share))
    return {SHADE: shades, PATCH: patches, TEXTURE: left}


def remake(maker: TripletGenerator, role: str, number: int) -> Triplet | None:
    """Make the triplet of one candidate again, in the company of its own batch."""
    for batch in maker.chunk(role, number // (CHUNK_BATCHES * maker.settings.batch)):
        for place, candidate in enumerate(batch):
            if candidate.number == number:
                return maker.make(batch)[place]
    raise AssertionError("a chunk holds every number in its range")


def changed_mask(
    normal: NDArray[np.uint8], defect: NDArray[np.uint8], region: Mask, visibility: float
) -> NDArray[np.bool_]:
    """Where a defect can be seen: pixels of `region` (H, W) moved by more than `visibility` in any channel.

    Gaps of up to four pixels between changed pixels are closed (texture crosses its own brightness there); lone specks
    of fewer than four pixels are dropped.
    """
    changed = _change(normal, defect) > visibility * 255
    closed = ndimage.binary_closing(np.pad(changed, CLOSING), np.ones((2 * CLOSING + 1,) * 2, bool))
    mask = closed[CLOSING:-CLOSING, CLOSING:-CLOSING] & region
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= MIN_PIXELS)[labels]


_REMEDIES = {
    "diffusion": "raise synthesize.strength, start or opacity, or ",
    "own": "raise synthesize.opacity, or ",
    "cutpaste": "",
    SHADE: "raise synthesize.shade_change, or ",
    PATCH: "lower synthesize.patch_share, or ",
}
_NAMES = {SHADE: "shades", PATCH: "patches", TEXTURE: "defects"}


def _change(normal: NDArray[np.uint8], defect: NDArray[np.uint8]) -> NDArray[np.int16]:
    """(H, W): the change of the channel that changed most."""
    return np.asarray(np.abs(defect.astype(np.int16) - normal.astype(np.int16)).max(axis=0), np.int16)


def role_counts(settings: SynthesizeSettings) -> dict[str, int]:
    """How many triplets each role gets."""
    held = max(1, round(settings.validation_fraction * settings.triplets))
    return {FIT: settings.triplets - held, VALIDATION: held}


def _window(image: NDArray[Any], defect: DefectSpec) -> NDArray[Any]:
    top, left, side = defect.outline.window
    return image[:, top : top + side, left : left + side]
