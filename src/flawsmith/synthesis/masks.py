"""Where a synthetic defect sits and what outline it has: one local region or cluster, cut out of Perlin noise.

A defect is sampled by diffusion in a small square window only, so a mask must close by itself inside its window. Both
kinds of outline get there in the same way: every candidate pixel has a *reach*, the radius of the smallest falloff that
admits it, and the mask is the set of pixels of reach below R. R is solved for the area wanted and bounded by the first
candidate on the window's margin, so that no shape is ever cut straight.

- `perlin`: noise n above a threshold that rises with the distance d from the centre, n - t > (1 - t)(d / R)^2.
- `ridge`: a level line of the noise, thinning out with the distance: |n - t| / |grad n| < h (1 - (d / R)^2), where the
  left side is the distance to the line to first order; h, half the width, never falls below half a pixel.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from flawsmith.data.images import Mask, Shape
from flawsmith.errors import UserError
from flawsmith.synthesis.config import SynthesizeSettings
from flawsmith.synthesis.perlin import FloatField, perlin_noise

PieceKind = Literal["missing", "bent", "moved"]
MaskKind = Literal["perlin", "ridge", "noise", "rectangle", "scar", "shade", PieceKind]  # all but two drawn elsewhere
Window = tuple[int, int, int]  # top, left, side in pixels

TRIES = 64  # outlines drawn for one mask before giving up
MIN_SPECK = 4  # a connected part of fewer pixels is no part of a defect (unless the whole mask is as small)
MAX_PARTS = 8  # connected parts of a cluster; more would be confetti
FILL = 0.4  # share of a window's inner square that a closed shape can fill
RIDGE_ASPECT = (1.0, 12.0)  # stretch of a ridge's lattice: 1 winds like a crack, 12 runs straight like a scratch
RIDGE_WIDTH = (1.0, 4.0)  # pixels at the thickest place
RIDGE_LEVEL = 0.15  # level lines from -0.15 to 0.15: off 0, where every line passes through lattice points
RIDGE_PERIOD = 12.0  # least pixels across a ridge's lattice, where there is a choice; closer lines would merge
RIDGE_LENGTH = 12.0  # least length in pixels
RIDGE_TAPER = 0.7  # mean over greatest width
BLOB_ASPECT = (1.0, 3.0)
_EIGHT = np.ones((3, 3), bool)


@dataclass(frozen=True, eq=False)
class MaskDraw:
    """A mask and all that was drawn for it.

    Attributes:
        mask: `(H, W)` bool, never empty, True only inside the window.
        kind: `perlin` (blobs, flecks, clusters) or `ridge` (lines of 1-4 px); `noise`, `rectangle` and `scar` are
            controls, `shade` is a large soft change of light.
        period: lattice period in pixels (for a ridge the one across it); the side of the blocks of `noise`, the shorter
            side of a `rectangle` or `scar`.
        threshold: level of the noise in [-1, 1]: where a `perlin` mask begins, or whose line a ridge follows; of the
            white noise in [0, 1] for `noise`; 0 for the other kinds.
        angle: of the lattice, or of a scar, in radians, in [0, pi).
        window: top, left, side in pixels; the mask keeps `margin(feather)` px from those of its borders that lie inside
            the image (what is pasted or shaded has no soft edge in a window, and may touch them). A defect may run over
            the edge of the image, as real ones do.
    """

    mask: Mask
    kind: MaskKind
    period: float
    threshold: float
    angle: float
    window: Window


def margin(feather: float) -> int:
    """Pixels between a mask and its window's inner borders: the soft edge, and as much untouched texture again."""
    return int(np.ceil(2 * feather)) + 1


def sample_mask(
    generator: np.random.Generator, shape: Shape, settings: SynthesizeSettings, foreground: Mask | None = None
) -> MaskDraw:
    """Draw one defect mask for an image.

    The place is uniform over the foreground; the area (of a ridge its length and width) is log-uniform in
    `settings.area`, as far as windows and foreground can hold it; the window is the smallest that does.

    Args:
        generator: source of everything drawn.
        shape: height and width of the image in pixels.
        settings: section `synthesize`.
        foreground: `(H, W)` bool, where a defect may be; None is everywhere.

    Raises:
        UserError: the foreground is empty, no window can hold the least area, or no outline in range was found.
    """
    limits = WindowLimits.of(shape, settings, foreground)
    spec = _MaskSpec.draw(generator, settings.ridge_share, (limits.low, limits.most), limits.largest)
    side = limits.window(spec.extent)

    for attempt in range(TRIES):
        row, column = limits.places.draw(generator)
        top, left = window_around((row, column), side, shape)
        here = np.s_[top : top + side, left : left + side]
        allowed = np.ones((side, side), bool) if foreground is None else foreground[here]
        outline = _Outline.draw(generator, spec, settings)
        reach = outline.reach(generator, (row - top, column - left), allowed)
        closed = _close(reach, spec.area, on_margin((top, left, side), shape, limits.rim))
        wanted = spec.area / 2 if attempt < TRIES // 2 else 0  # keeps the areas as they were drawn, while it can
        if max(limits.low, wanted) <= closed.sum() <= limits.high:
            mask = np.zeros(shape, bool)
            mask[here] = closed
            return MaskDraw(mask, spec.kind, outline.period, outline.threshold, outline.angle, (top, left, side))
    remedy = "lower synthesize.ridge_share" if spec.kind == "ridge" else "lower synthesize.perlin_threshold"
    raise UserError(
        f"No {spec.kind} mask of {limits.low} to {limits.high} pixels was found in {TRIES} tries; widen "
        f"synthesize.area or {remedy}."
    )


@dataclass(frozen=True, eq=False)
class Places:
    """Where the centre of a defect may lie: anywhere, or on the foreground."""

    shape: Shape  # height and width of the image in pixels
    listed: NDArray[np.intp] | None  # flat indices of the foreground; None is everywhere

    @classmethod
    def of(cls, shape: Shape, foreground: Mask | None) -> "Places":
        """All pixels of `foreground` `(H, W)`.

        Raises:
            UserError: it is empty.
        """
        if foreground is not None and foreground.shape != shape:
            raise ValueError(f"foreground must be {shape}, not {foreground.shape}")
        listed = None if foreground is None else np.flatnonzero(foreground)
        if listed is not None and not listed.size:
            raise UserError("The foreground is empty, so there is no place for a defect; check the normal images.")
        return cls(shape, listed)

    def draw(self, generator: np.random.Generator) -> tuple[int, int]:
        """One place (row, column), all alike likely."""
        listed, (height, width) = self.listed, self.shape
        place = generator.integers(height * width) if listed is None else listed[generator.integers(listed.size)]
        return divmod(int(place), width)


@dataclass(frozen=True, eq=False)
class WindowLimits:
    """The law of areas and windows, the same for every kind of mask that is sampled in a window."""

    places: Places
    rim: int  # pixels between mask and window
    windows: tuple[int, ...]  # sides in pixels, ascending
    low: int  # least and largest area in pixels,
    high: int
    most: int  # and the largest that a window can hold
    largest: int  # side of the square that the largest window leaves to a mask

    @classmethod
    def of(cls, shape: Shape, settings: SynthesizeSettings, foreground: Mask | None) -> "WindowLimits":
        """The limits for masks in an image of height and width `shape`.

        Raises:
            UserError: the foreground is empty or too small, or no window can hold the least area.
        """
        places, area = Places.of(shape, foreground), shape[0] * shape[1]
        rim = margin(settings.feather)
        windows = tuple(sorted(side for side in set(settings.windows) if 2 * rim < side <= min(shape)))
        largest = windows[-1] - 2 * rim if windows else 0
        low, high = max(1, int(np.ceil(settings.area[0] * area))), int(settings.area[1] * area)
        most = min(high, int(FILL * largest**2))
        if low > most:
            raise UserError(
                f"synthesize.area asks for defects of {low} to {high} pixels in {shape[1]} x {shape[0]}, but the "
                f"synthesize.windows {list(settings.windows)} hold at most {int(FILL * largest**2)}; change one of "
                "them."
            )
        if places.listed is not None and places.listed.size < low:
            raise UserError(
                f"The foreground has {places.listed.size} pixels, the smallest defect {low}; lower synthesize.area."
            )
        return cls(places, rim, windows, low, high, most, largest)

    def window(self, extent: float) -> int:
        """The smallest window that leaves a square of side `extent`, else the largest there is."""
        return next(side for side in self.windows if side - 2 * self.rim >= extent or side == self.windows[-1])


def feathered(mask: Mask, width: float) -> FloatField:
    """A soft alpha `(H, W)` float32 in [0, 1]: 1 on the mask, falling smoothly to 0 at `width` px outside of it.

    The ramp lies outside, so a line of one pixel keeps its full opacity and a larger mask has nowhere a lower alpha.
    alpha = 1 - (3 u^2 - 2 u^3), where u is the distance to the nearest mask pixel over `width`; a width of 1 or less is
    the hard mask.
    """
    alpha = mask.astype(np.float32)
    if width <= 1 or not mask.any():
        return alpha
    pad = int(np.ceil(width))
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = np.s_[max(0, rows[0] - pad) : rows[-1] + pad + 1, max(0, columns[0] - pad) : columns[-1] + pad + 1]
    u = np.clip(ndimage.distance_transform_edt(~mask[box]) / width, 0, 1)
    alpha[box] = 1 - u * u * (3 - 2 * u)
    return alpha


@dataclass(frozen=True)
class _MaskSpec:
    """What is drawn once for a mask, whatever outlines fail, so that retries do not favour what is easy."""

    kind: MaskKind
    area: float  # in pixels
    width: float  # of a ridge at its thickest place, in pixels; 0 for `perlin`
    extent: float  # side of the square it needs, in pixels

    @classmethod
    def draw(
        cls, generator: np.random.Generator, ridge_share: float, area: tuple[int, int], largest: int
    ) -> "_MaskSpec":
        if generator.random() >= ridge_share:
            pixels = log_uniform(generator, area)
            return cls("perlin", pixels, 0.0, float(np.sqrt(pixels / FILL)))
        width, length = log_uniform(generator, RIDGE_WIDTH), log_uniform(generator, (RIDGE_LENGTH, largest))
        pixels = float(np.clip(RIDGE_TAPER * width * length, *area))
        return cls("ridge", pixels, width, pixels / (RIDGE_TAPER * width))


@dataclass(frozen=True)
class _Outline:
    """The random parameters of one outline, apart from its place."""

    spec: _MaskSpec
    period: float
    threshold: float
    angle: float
    aspect: float
    octaves: int
    persistence: float
    parts: int  # most connected parts that are kept

    @classmethod
    def draw(cls, generator: np.random.Generator, spec: _MaskSpec, settings: SynthesizeSettings) -> "_Outline":
        ridge = spec.kind == "ridge"
        diameter = 2 * np.sqrt(spec.area / np.pi)
        low, high = (RIDGE_PERIOD, np.inf) if ridge else (diameter / 4, diameter * 2)
        periods = [period for period in settings.perlin_periods if low <= period <= high]
        nearest = min(settings.perlin_periods, key=lambda period: abs(np.log(period / np.clip(period, low, high))))
        return cls(
            spec=spec,
            period=float(generator.choice(periods or [nearest])),
            threshold=float(generator.uniform(*((-RIDGE_LEVEL, RIDGE_LEVEL) if ridge else settings.perlin_threshold))),
            angle=float(generator.uniform(0, np.pi)),
            aspect=log_uniform(generator, RIDGE_ASPECT if ridge else BLOB_ASPECT),
            octaves=int(generator.integers(1, 4)),
            persistence=float(generator.uniform(0.2, 0.4) if ridge else generator.uniform(0.4, 0.7)),
            parts=int(generator.choice([1, 1, 1, 2, 3] if ridge else [1, 1, 2, 4, MAX_PARTS])),
        )

    def reach(self, generator: np.random.Generator, centre: tuple[int, int], allowed: Mask) -> FloatField:
        """The radius of the falloff at which each pixel of the window joins the mask; infinite where it never does."""
        origin = generator.uniform(0, 1000, 2)  # a lattice point anywhere, so that the centre is not always at a zero
        noise = perlin_noise(
            allowed.shape,
            (self.period, self.period * self.aspect),
            generator,
            self.angle,
            self.octaves,
            self.persistence,
            (float(origin[0]), float(origin[1])),
        )
        if self.spec.kind == "ridge":
            return self._ridge_reach(noise, centre, allowed)
        distance = distance_to(allowed.shape, centre, self.angle, min(self.aspect, 2.0))
        above = noise - np.float32(self.threshold)
        candidates = allowed & (above > 0)
        reach = np.full_like(noise, np.inf)
        reach[candidates] = distance[candidates] * np.sqrt((1 - self.threshold) / above[candidates])
        return _keep_parts(reach, self.parts)

    def _ridge_reach(self, noise: FloatField, centre: tuple[int, int], allowed: Mask) -> FloatField:
        slope_y, slope_x = np.gradient(noise)
        from_line = np.abs(noise - np.float32(self.threshold)) / (np.hypot(slope_y, slope_x) + np.float32(1e-6))
        reach = np.full_like(noise, np.inf)
        spine = allowed & (from_line < 0.5)
        if not spine.any():
            return reach
        # the falloff is centred on the line, at its place nearest to the centre drawn
        away = np.where(spine, distance_to(noise.shape, centre), np.inf)
        on_line = divmod(int(away.argmin()), noise.shape[1])
        distance = distance_to(noise.shape, on_line)
        half = self.spec.width / 2
        shoulder = np.clip((from_line - 0.5) / max(half - 0.5, 1e-6), 0, 1)  # 0 on the spine, 1 at the full half width
        candidates = allowed & ((shoulder < 1) | spine)
        reach[candidates] = distance[candidates] / np.sqrt(1 - shoulder[candidates])
        return _keep_parts(reach, self.parts)


def log_uniform(generator: np.random.Generator, bounds: tuple[float, float]) -> float:
    """One number of log-uniform law in `bounds`, both positive."""
    return float(np.exp(generator.uniform(*np.log(bounds))))


def distance_to(shape: tuple[int, ...], centre: tuple[int, int], angle: float = 0.0, aspect: float = 1.0) -> FloatField:
    """Distance to `centre` in pixels, `(H, W)`, stretched `aspect` times along `angle` at equal area; never 0."""
    y = (np.arange(shape[0], dtype=np.float32) - centre[0])[:, None]
    x = (np.arange(shape[1], dtype=np.float32) - centre[1])[None, :]
    cos, sin, root = np.float32(np.cos(angle)), np.float32(np.sin(angle)), np.float32(np.sqrt(aspect))
    result: FloatField = np.hypot((cos * y - sin * x) * root, (sin * y + cos * x) / root)
    return np.maximum(result, np.float32(0.1))


def window_around(centre: tuple[int, int], side: int, shape: Shape) -> tuple[int, int]:
    """Top and left of the window of this side around `centre`, moved so that it lies inside the image."""
    top, left = (int(np.clip(at - side // 2, 0, length - side)) for at, length in zip(centre, shape, strict=True))
    return top, left


def on_margin(window: Window, shape: Shape, rim: int) -> Mask:
    """The window's pixels too near to those of its borders that are not the image's."""
    top, left, side = window
    result = np.zeros((side, side), bool)
    for cut, strip in (
        (top > 0, np.s_[:rim, :]),
        (left > 0, np.s_[:, :rim]),
        (top + side < shape[0], np.s_[-rim:, :]),
        (left + side < shape[1], np.s_[:, -rim:]),
    ):
        if cut:
            result[strip] = True
    return result


def _keep_parts(reach: FloatField, parts: int) -> FloatField:
    """Only the `parts` connected sets of candidates that are reached first."""
    labels, count = ndimage.label(np.isfinite(reach), _EIGHT)
    if count <= parts:
        return reach
    first = ndimage.minimum(reach, labels, np.arange(1, count + 1))
    kept = np.zeros(count + 1, bool)
    kept[1 + np.argsort(first, kind="stable")[:parts]] = True
    return np.where(kept[labels], reach, np.float32(np.inf))


def _close(reach: FloatField, target: float, forbidden: Mask) -> Mask:
    """The pixels of least reach, about `target` of them, none on the margin; specks and confetti dropped."""
    limit = reach[forbidden].min() if forbidden.any() else np.inf
    inside = np.sort(reach[reach < limit])
    if not inside.size:
        return np.zeros_like(forbidden)
    radius = inside[min(round(target), inside.size) - 1]
    mask = reach <= radius
    labels, _ = ndimage.label(mask, _EIGHT)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    kept = sizes >= min(MIN_SPECK, sizes.max())
    kept[np.argsort(-sizes, kind="stable")[MAX_PARTS:]] = False
    return kept[labels]
