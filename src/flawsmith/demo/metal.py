"""Brushed steel: a height field of countless directional scratches under a lamp.

The sheen is the Gaussian lobe of Ward's anisotropic model (Ward, SIGGRAPH 1992): narrow along the brushing, wide
across it, centred where the local slope turns the surface halfway between lamp and camera. Grooves therefore glint on
one flank and darken on the other.
"""

from dataclasses import dataclass

import numpy as np

from flawsmith.demo.optics import (
    Camera,
    Field,
    Overlay,
    draw_camera,
    from_spectrum,
    norm,
    pixel_grid,
    smooth_field,
    strokes,
    unit,
)


@dataclass(frozen=True)
class Metal:
    """One piece of brushed steel in front of one camera; a defect is a copy with other fields."""

    height: Field  # (H, W) pixels
    angle: float  # of the brushing, radians from the horizontal
    half: tuple[Field, Field]  # (H, W) slopes along and across the brushing that would mirror the lamp
    gloss: Field  # (H, W) strength of the sheen, around 1
    tint: Field  # (H, W, 3) or (3,) reflectance
    camera: Camera
    overlay: Overlay | None = None

    @property
    def size(self) -> int:
        return self.height.shape[0]

    @property
    def lamp(self) -> tuple[float, float]:
        """Direction (row, column) in which the lamp lies, of length 1."""
        along, across = (float(field.mean()) for field in self.half)
        row = along * np.sin(self.angle) + across * np.cos(self.angle)
        column = along * np.cos(self.angle) - across * np.sin(self.angle)
        norm = float(np.hypot(row, column)) + 1e-9
        return row / norm, column / norm

    def light(self) -> Field:
        """Linear light `(H, W, 3)` towards the camera."""
        # np.gradient's one-sided border slopes would stand out: they are steeper than central ones
        down = np.pad((self.height[2:] - self.height[:-2]) / 2, ((1, 1), (0, 0)), mode="edge")
        right = np.pad((self.height[:, 2:] - self.height[:, :-2]) / 2, ((0, 0), (1, 1)), mode="edge")
        cosine, sine = np.cos(self.angle), np.sin(self.angle)
        # the surface normal tilts against the slope
        along = -(right * cosine + down * sine)
        across = -(down * cosine - right * sine)
        lobe = ((along - self.half[0]) / ROUGHNESS[0]) ** 2 + ((across - self.half[1]) / ROUGHNESS[1]) ** 2
        sheen = np.exp(-lobe) * self.gloss
        upright = 1 / np.sqrt(1 + along**2 + across**2)
        room = 0.16 * upright * (1 + 0.5 * across)  # the rest of the room, brighter on the lamp's side
        light = (room + 0.42 * sheen)[..., None] * self.tint
        if self.overlay is not None:
            light = self.overlay.over(light, np.ones_like(self.height))
        return np.asarray(light, np.float64)


ROUGHNESS = (0.30, 0.55)  # slopes: standard deviation of the lobe along and across the brushing, times sqrt 2


def draw_metal(generator: np.random.Generator, size: int) -> Metal:
    """A new piece: the brush's angle, density and pressure, the alloy's tone and the lamp's place vary a little."""
    angle = float(np.deg2rad(generator.normal(0, 2.5)))
    pressure = float(np.exp(0.10 * generator.standard_normal()))
    rows, columns = pixel_grid(size)
    along = (columns - size / 2) * np.cos(angle) + (rows - size / 2) * np.sin(angle)
    across = (rows - size / 2) * np.cos(angle) - (columns - size / 2) * np.sin(angle)
    half_along = 0.05 * generator.standard_normal() + along / 256 * generator.uniform(0.15, 0.28)
    half_across = 0.26 + 0.02 * generator.standard_normal() + across / 256 * 0.10
    tone = _tone(generator, size, angle)
    gloss = 1 + 0.07 * tone + 0.04 * smooth_field(generator, size, 2)
    steel = np.array([0.985, 1.0, 1.02]) * (1 + 0.003 * generator.standard_normal(3))
    return Metal(
        height=pressure * _brushing(generator, size, angle),
        angle=angle,
        half=(np.asarray(half_along, np.float64), np.asarray(half_across, np.float64)),
        gloss=np.asarray(gloss, np.float64),
        tint=np.asarray(steel, np.float64),
        camera=draw_camera(generator, size),
    )


def _brushing(generator: np.random.Generator, size: int, angle: float) -> Field:
    """Height of the scratches: a dense fine grain, plus single grooves of exponential depth and finite length."""
    dense = np.zeros((size, size // 2 + 1), np.complex128)
    for length, width, weight in ((40, 0.3, 1.3), (120, 0.5, 1.0), (260, 1.5, 0.6)):
        turned = angle + float(np.deg2rad(generator.normal(0, 0.6)))
        layer = strokes(generator.standard_normal((size, size), dtype=np.float32), turned, length, width)
        dense += (weight * size / norm(layer)) * layer
    height = 0.13 * unit(from_spectrum(dense, size))
    density = float(np.exp(0.2 * generator.standard_normal()))
    grooves = np.zeros_like(dense)
    for length, width, rate in ((12, 0.35, 1.2e-2), (30, 0.35, 8e-3), (70, 0.4, 3e-3), (160, 0.55, 6e-4)):
        for _ in range(2):
            turned = angle + float(np.deg2rad(generator.normal(0, 1.5)))
            hit = generator.random((size, size), dtype=np.float32) < rate * density / 2
            depth = hit * generator.exponential(1.0, (size, size)) * (width * 2.5)
            grooves += strokes(depth, turned, length, width, taper=0.06)
    return np.asarray(height - 0.24 * from_spectrum(grooves, size), np.float64)


def _tone(generator: np.random.Generator, size: int, angle: float) -> Field:
    """Broad bands along the brushing where the belt bit harder; unit variance."""
    spectrum = np.zeros((size, size // 2 + 1), np.complex128)
    for length, width, weight in ((180, 2.5, 0.8), (300, 9.0, 1.0)):
        layer = strokes(generator.standard_normal((size, size), dtype=np.float32), angle, length, width)
        spectrum += (weight * size / norm(layer)) * layer
    return unit(from_spectrum(spectrum, size))
