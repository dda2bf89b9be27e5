"""Defects of the demo surfaces, each a change of what the surface is made of: its relief, its yarns, what lies on it.

A defect takes a surface and returns a copy with other fields, and the footprint `(H, W)` outside which it changes
nothing. Nothing here shares anything with the training synthesis: no Perlin mask, no blending, no diffusion.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from flawsmith.data.images import Mask
from flawsmith.demo.fabric import OVERSAMPLING, PITCH, Fabric, draw_hairs
from flawsmith.demo.metal import Metal
from flawsmith.demo.optics import Field, Overlay, pixel_grid

Piece = TypeVar("Piece", Metal, Fabric)
Generator = np.random.Generator
Range = tuple[float, float]
Path = NDArray[np.float64]  # (N, 2) rows and columns, a quarter of a pixel apart

LINT = np.array(  # reflectance of foreign fibres: dark wool, cotton, blue, red, brown hair
    [[0.03, 0.03, 0.035], [0.62, 0.61, 0.58], [0.05, 0.08, 0.22], [0.28, 0.05, 0.05], [0.09, 0.06, 0.04]]
)


# --- shapes -----------------------------------------------------------------------------------------------------------


def somewhere(generator: Generator, size: int) -> NDArray[np.float64]:
    """A place (row, column) not too near the border."""
    return generator.uniform(0.13, 0.87, 2) * size


def draw_path(generator: Generator, size: int, length: float, bend: float, heading: float | None = None) -> Path:
    """A curve through a random place: `bend` is how far its direction wanders, in radians over 30 pixels."""
    count = max(8, round(length * 4))
    start = generator.uniform(0, 2 * np.pi) if heading is None else heading
    knots = np.cumsum(generator.standard_normal(max(2, count // 120 + 2)) * bend)
    turn = np.interp(np.linspace(0, len(knots) - 1, count), np.arange(len(knots)), knots - knots.mean())
    turn = start + ndimage.gaussian_filter1d(turn, 20, mode="nearest")
    path = np.cumsum(np.stack([np.sin(turn), np.cos(turn)], axis=1) * 0.25, axis=0)
    return path - path[count // 2] + somewhere(generator, size)


def near_path(path: Path, size: int, reach: float) -> tuple[Field, Field, Field]:
    """Distance to a path (`reach` or more is inf), signed distance (positive on one side), and share of its length."""
    rows, columns = pixel_grid(size)
    points = np.stack(np.broadcast_arrays(rows, columns), axis=-1).reshape(-1, 2)
    found = cKDTree(path).query(points, distance_upper_bound=reach)
    distance, nearest = np.asarray(found[0]), np.asarray(found[1])
    known = np.isfinite(distance)
    nearest = np.where(known, nearest, 0)
    direction = np.gradient(path, axis=0)[nearest]
    step = points - path[nearest]
    side = np.sign(direction[:, 1] * step[:, 0] - direction[:, 0] * step[:, 1])
    signed = np.where(known, side * np.where(known, distance, 0), reach)
    share = nearest / (len(path) - 1)
    shape = (size, size)
    return (
        distance.reshape(shape).astype(np.float64),
        signed.reshape(shape).astype(np.float64),
        share.reshape(shape).astype(np.float64),
    )


@dataclass(frozen=True)
class Blob:
    """A closed irregular shape: `inside` (H, W) is the signed distance to its rim in pixels, positive inside."""

    inside: Field
    relative: Field  # (H, W) distance from the centre, 1 at the rim
    centre: NDArray[np.float64]
    radius: float


def draw_blob(generator: Generator, size: int, radius: float, roughness: float, scale: int = 1) -> Blob:
    """A disc, stretched, whose radius wanders with the direction; the field has `scale` samples a pixel."""
    centre = somewhere(generator, size)
    rows, columns = pixel_grid(size * scale)
    down, right = rows / scale - centre[0], columns / scale - centre[1]
    turn, stretch = generator.uniform(0, np.pi), generator.uniform(1, 1.5)
    long = (right * np.cos(turn) + down * np.sin(turn)) / stretch
    short = (down * np.cos(turn) - right * np.sin(turn)) * stretch**0.5
    angle = np.arctan2(short, long)
    rim = np.ones_like(angle)
    for order in range(2, 9):
        weight = roughness * generator.standard_normal() / order
        rim = rim + weight * np.cos(order * angle + generator.uniform(0, 2 * np.pi))
    rim, away = radius * np.maximum(rim, 0.3), np.hypot(long, short)
    return Blob(np.asarray(rim - away, np.float64), np.asarray(away / rim, np.float64), centre, radius)


def smooth_step(value: NDArray[np.floating]) -> Field:
    """0 below 0, 1 above 1, smooth in between."""
    clipped = np.clip(value, 0, 1)
    return np.asarray(clipped * clipped * (3 - 2 * clipped), np.float64)


def wobble(generator: Generator, share: Field, knots: int, low: float, high: float) -> Field:
    """Random values along a path, between `low` and `high`."""
    values = generator.uniform(low, high, knots)
    return np.interp(share, np.linspace(0, 1, knots), values).astype(np.float64)


# --- on both surfaces -------------------------------------------------------------------------------------------------


def _fibre(
    piece: Piece, generator: Generator, length: Range, half_width: Range, opacities: Range
) -> tuple[Piece, Mask]:
    """A foreign fibre lies on top and casts a soft shadow."""
    path = draw_path(generator, piece.size, generator.uniform(*length), generator.uniform(0.3, 1.0))
    half = generator.uniform(*half_width)
    colour = LINT[generator.integers(len(LINT))] * generator.uniform(0.8, 1.2)
    opacity = generator.uniform(*opacities)
    return _lay(
        piece, path, half, colour, opacity, lift=generator.uniform(0.6, 2.2), dark=opacity * generator.uniform(0.2, 0.5)
    )


def _lay(
    piece: Piece, path: Path, half: float, colour: NDArray[np.float64], opacity: float, lift: float, dark: float
) -> tuple[Piece, Mask]:
    """Put a thread of half width `half` along a path, `lift` pixels above the surface."""
    distance, signed, share = near_path(path, piece.size, 8)
    pointed = np.minimum(1, np.minimum(share, 1 - share) * len(path) / 4 / 3)  # thins out over the last 3 pixels
    cover = opacity * np.clip(half * pointed + 0.5 - distance, 0, 1)
    direction = path[-1] - path[0]
    normal = np.array([direction[1], -direction[0]]) / (np.hypot(*direction) + 1e-9)
    lit = 1 + 0.35 * np.clip(signed / half, -1, 1) * float(normal @ np.array(piece.lamp))
    fallen = near_path(path - lift * np.array(piece.lamp), piece.size, 8)[0]
    shadow = dark * np.exp(-((np.maximum(fallen - half * 0.5, 0) / 1.3) ** 2))
    overlay = Overlay(
        opacity=cover.astype(np.float64),
        colour=np.asarray(colour * lit[..., None], np.float64),
        shadow=shadow.astype(np.float64),
    )
    return replace(piece, overlay=overlay), (cover > 0) | (shadow > 0.01)


def _film(generator: Generator, blob: Blob, density: float, hue: NDArray[np.float64]) -> Field:
    """Transmission `(H, W, 3)` of what a dried drop left: a thin film, densest in a ring at its rim (coffee ring)."""
    ring = generator.uniform(1.2, 2.6)
    rim = np.exp(-(((blob.inside - ring) / ring) ** 2))
    film = smooth_step(blob.inside / 2) * generator.uniform(0.4, 0.8)
    inner = np.exp(-(((blob.inside - blob.radius * generator.uniform(0.35, 0.6)) / (1.5 * ring)) ** 2))
    amount = density * (film + rim + generator.uniform(0, 0.35) * inner)
    return np.asarray(np.exp(-amount[..., None] * hue), np.float64)


# --- on metal ---------------------------------------------------------------------------------------------------------


def metal_fibre(piece: Metal, generator: Generator) -> tuple[Metal, Mask]:
    """Lint from a wiping cloth."""
    return _fibre(piece, generator, (12, 70), (0.2, 0.5), (0.07, 0.25))


def metal_scratch(piece: Metal, generator: Generator) -> tuple[Metal, Mask]:
    """A point was dragged over the surface: a groove with burrs, its depth changing along the way."""
    turn = generator.uniform(np.deg2rad(12), np.deg2rad(168))
    path = draw_path(generator, piece.size, generator.uniform(12, 80), generator.uniform(0, 0.12), piece.angle + turn)
    width = generator.uniform(0.4, 0.9)
    steep = np.exp(generator.uniform(np.log(0.15), np.log(0.6)))  # slope of the flanks
    distance, _, share = near_path(path, piece.size, 10)
    fade = smooth_step(np.minimum(share, 1 - share) * 8) * wobble(generator, share, max(3, len(path) // 60), 0.5, 1.0)
    groove = np.exp(-((distance / width) ** 2) / 2)
    burr = np.exp(-(((distance - 2.4 * width) / (0.7 * width)) ** 2) / 2) * generator.uniform(0.1, 0.45)
    height = piece.height * (1 - fade * groove) + steep * width * fade * (burr - groove)
    gloss = piece.gloss * (1 + generator.uniform(0.0, 0.25) * steep * fade * groove)
    return replace(piece, height=height, gloss=gloss), distance < 5 * width


def metal_dent(piece: Metal, generator: Generator) -> tuple[Metal, Mask]:
    """Something blunt pressed the sheet in; the brushing bends with it."""
    blob = draw_blob(generator, piece.size, generator.uniform(5, 14), 0.12)
    steep = np.exp(generator.uniform(np.log(0.02), np.log(0.06)))
    bowl = np.exp(-2 * blob.relative**2) - 0.12 * np.exp(-(((blob.relative - 1.25) / 0.3) ** 2))
    return replace(piece, height=piece.height - steep * blob.radius * bowl), blob.relative < 2.2


def metal_stain(piece: Metal, generator: Generator) -> tuple[Metal, Mask]:
    """A drop of coolant dried."""
    blob = draw_blob(generator, piece.size, generator.uniform(5, 22), generator.uniform(0.1, 0.35))
    hue = np.array([1.0, 1.0, 1.0]) + generator.uniform(0, 1) * np.array([-0.25, 0.0, 0.45])
    density = np.exp(generator.uniform(np.log(0.022), np.log(0.07)))
    film = _film(generator, blob, density, hue)
    return replace(piece, tint=piece.tint * film), blob.inside > -6


def metal_pit(piece: Metal, generator: Generator) -> tuple[Metal, Mask]:
    """Corrosion ate a few small holes, sometimes with a rusty halo."""
    centre, spread = somewhere(generator, piece.size), generator.uniform(3, 11)
    rows, columns = pixel_grid(piece.size)
    height, bare = piece.height, np.zeros((piece.size, piece.size), np.float64)
    rust = np.zeros_like(bare)
    for _ in range(int(generator.integers(1, 4))):
        place = centre + spread * generator.standard_normal(2)
        radius = np.exp(generator.normal(np.log(0.75), 0.3))
        distance = np.hypot(rows - place[0], (columns - place[1]) / generator.uniform(0.8, 1.4)) / radius
        height = height - 0.2 * radius * np.exp(-(distance**2))
        bare = np.maximum(bare, np.exp(-(distance**4)) * generator.uniform(0.06, 0.28))
        rust = np.maximum(rust, np.exp(-((distance / 2.6) ** 2)))
    rust = rust * generator.uniform(0, 0.25) * (generator.random() < 0.6)
    tint = piece.tint * (1 - bare[..., None]) * np.exp(-rust[..., None] * np.array([0.5, 1.0, 1.6]))
    return replace(piece, height=height, tint=np.asarray(tint, np.float64)), (bare > 0.01) | (rust > 0.005)


# --- on cloth ---------------------------------------------------------------------------------------------------------


def fabric_fibre(piece: Fabric, generator: Generator) -> tuple[Fabric, Mask]:
    """A thread end or a hair: on a weave a thinner one is lost to any eye."""
    return _fibre(piece, generator, (30, 110), (0.55, 1.2), (0.5, 0.95))


def _pixels(samples: NDArray[np.bool_]) -> Mask:
    """A footprint in samples, in pixels and with room for the shading around it."""
    side = samples.shape[0] // OVERSAMPLING
    touched = np.asarray(samples.reshape(side, OVERSAMPLING, side, OVERSAMPLING).any(axis=(1, 3)), np.bool_)
    return np.asarray(ndimage.binary_dilation(touched, iterations=4), np.bool_)


def _yarn_segment(
    piece: Fabric, generator: Generator, length: Range, yarns: int = 1
) -> tuple[int, NDArray[np.bool_], Field, Field]:
    """A yarn (or some side by side) near a random place: which set, its samples, the position on it (-1..1), and a
    field that is 1 in a segment of random length and falls to 0 at its ends."""
    which = int(generator.integers(2))
    place = (somewhere(generator, piece.size) * OVERSAMPLING).astype(int)
    index, across = piece.crossing()[which]
    along = piece.place[1 - which]
    middle = along[place[0], place[1]]
    half = generator.uniform(*length) / 2
    segment = smooth_step((half - np.abs(along - middle)) / 3)
    count = index - index[place[0], place[1]]
    return which, (count >= 0) & (count < yarns), across, segment


def fabric_missing_thread(piece: Fabric, generator: Generator) -> tuple[Fabric, Mask]:
    """A yarn or two broke and left a gap, or thin out for a while."""
    which, samples, _, segment = _yarn_segment(piece, generator, (20, 90), int(generator.integers(1, 3)))
    least = 0.0 if generator.random() < 0.75 else generator.uniform(0.25, 0.5)
    thickness = [*piece.thickness]
    thickness[which] = np.where(samples, 1 - (1 - least) * segment, 1)
    return replace(piece, thickness=(thickness[0], thickness[1])), _pixels(samples & (segment > 0))


def fabric_slub(piece: Fabric, generator: Generator) -> tuple[Fabric, Mask]:
    """A yarn was spun too thick for a while: it swells and pushes its neighbours aside."""
    which, samples, across, segment = _yarn_segment(piece, generator, (16, 48))
    swell = generator.uniform(0.38, 0.6)
    pitch = PITCH[which]
    place = piece.place[which]
    centre = np.median((place - across * pitch / 2)[samples & (segment > 0)])
    away = place - centre
    bump = np.exp(-((away / (1.3 * pitch)) ** 2)) * segment
    moved = [*piece.place]
    moved[which] = np.asarray(centre + away * (1 - swell * bump), np.float64)
    swollen = replace(piece, place=(moved[0], moved[1]))
    same = swollen.crossing()[which][0] == np.median(piece.crossing()[which][0][samples])
    thickness = [*piece.thickness]
    thickness[which] = np.where(same, 1 + (1.2 * swell) * segment, 1)
    return replace(swollen, thickness=(thickness[0], thickness[1])), _pixels(bump > 0.01)


def fabric_hole(piece: Fabric, generator: Generator) -> tuple[Fabric, Mask]:
    """Yarns of both sets are cut through; each ends where it happened to break."""
    blob = draw_blob(generator, piece.size, generator.uniform(3.5, 10), 0.25, OVERSAMPLING)
    thickness: list[Field | None] = []
    for index, _ in piece.crossing():
        reach = generator.normal(0, 1.3, int(index.max()) + 1).astype(np.float64)
        thickness.append(smooth_step((1.0 - blob.inside - reach[index]) / 2.5))
    around = generator.uniform(0, 2 * np.pi, round(2.5 * blob.radius) + 2)[:, None]
    roots = blob.centre[::-1] + blob.radius * np.concatenate([np.cos(around), np.sin(around)], axis=1)
    hairs = np.maximum(piece.hairs, draw_hairs(generator, piece.size, roots, (60, 170)))  # the cut ends fray
    return replace(piece, thickness=(thickness[0], thickness[1]), hairs=hairs), _pixels(blob.inside > -12)


def fabric_stain(piece: Fabric, generator: Generator) -> tuple[Fabric, Mask]:
    """A liquid soaked in, followed the yarns and dried."""
    blob = draw_blob(generator, piece.size, generator.uniform(9, 32), generator.uniform(0.1, 0.3))
    hue = np.array([1.0, 1.0, 1.0]) + generator.uniform(0, 1) * np.array([-0.3, 0.05, 0.5])
    density = np.exp(generator.uniform(np.log(0.27), np.log(0.75)))
    wick = np.zeros((piece.size, piece.size), np.float64)
    for index, _ in piece.crossing():
        reach = generator.normal(0, 1.0, int(index.max()) + 1).astype(np.float64)
        wick += reach[index][::OVERSAMPLING, ::OVERSAMPLING]
    soaked = replace(blob, inside=blob.inside + wick)
    return replace(piece, tint=_film(generator, soaked, density, hue)), blob.inside > -9


METAL_DEFECTS: Mapping[str, Callable[[Metal, Generator], tuple[Metal, Mask]]] = {
    "dent": metal_dent,
    "fibre": metal_fibre,
    "pit": metal_pit,
    "scratch": metal_scratch,
    "stain": metal_stain,
}
FABRIC_DEFECTS: Mapping[str, Callable[[Fabric, Generator], tuple[Fabric, Mask]]] = {
    "fibre": fabric_fibre,
    "hole": fabric_hole,
    "missing_thread": fabric_missing_thread,
    "slub": fabric_slub,
    "stain": fabric_stain,
}
