"""What both demo surfaces share: random fields, things lying on top, and the camera that turns light into pixels.

Lengths are in pixels of the finished image, light is linear (1 = a white card at full exposure). A larger image shows a
larger piece of the same product, not a finer picture of the same piece.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import fft, ndimage

from flawsmith.data.images import FloatImage

# (H, W), or (H, W, 3) for light and colour. float32 would show the same, but CPUs differ in the last bits, and those of
# float64 are too small to decide a pixel of 8 bits: every machine renders the same files.
Field = NDArray[np.float64]


def frequencies(size: int) -> tuple[Field, Field]:
    """Vertical and horizontal frequencies (cycles per pixel) of a real FFT: `(size, 1)` and `(1, size // 2 + 1)`."""
    return (
        fft.fftfreq(size)[:, None].astype(np.float64),
        fft.rfftfreq(size)[None, :].astype(np.float64),
    )


def strokes(
    impulses: NDArray[np.floating], angle: float, length: float, width: float, taper: float = 0.25
) -> NDArray[np.complex128]:
    """Spectrum of `impulses` `(N, N)`, each drawn out to a straight stroke; strokes wrap around the border.

    Working on the spectrum lets many kinds of stroke be added before one inverse transform. A stroke is a box of
    `length` softened at its ends by `taper` x length, times a Gaussian of `width` (standard deviation).
    """
    vertical, horizontal = frequencies(impulses.shape[0])
    along = horizontal * np.cos(angle) + vertical * np.sin(angle)
    across = vertical * np.cos(angle) - horizontal * np.sin(angle)
    decay = (along * (taper * length)) ** 2 + (across * width) ** 2
    kernel = np.sinc(along * length) * np.exp(-2 * np.pi**2 * decay)
    return np.asarray(fft.rfft2(impulses.astype(np.float64)) * kernel, np.complex128)


def from_spectrum(spectrum: NDArray[np.complex128], size: int) -> Field:
    """The real `(size, size)` field of a spectrum."""
    return np.asarray(fft.irfft2(spectrum, s=(size, size)), np.float64)


def norm(spectrum: NDArray[np.complex128]) -> float:
    """The square root of the sum of squares; `np.linalg.norm` is five times slower on complex numbers."""
    return float(np.sqrt(np.vdot(spectrum, spectrum).real))


def unit(field: Field) -> Field:
    """Shift and scale to mean 0 and standard deviation 1."""
    return np.asarray((field - field.mean()) / (field.std() + 1e-9), np.float64)


def smooth_field(generator: np.random.Generator, size: int, cells: int) -> Field:
    """A slowly varying field of about unit variance: `cells` independent values along a side, bicubic in between."""
    coarse = generator.standard_normal((cells + 3, cells + 3), dtype=np.float32)
    margin = 1.5 / (cells + 3)  # cut the border, where the interpolation has no neighbours
    inner = ((cells + 3) * margin, (cells + 3) * margin, (cells + 3) * (1 - margin), (cells + 3) * (1 - margin))
    resized = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC, box=inner)
    return np.asarray(resized, np.float64)


def pixel_grid(size: int) -> tuple[Field, Field]:
    """Rows and columns of pixel centres as `(size, 1)` and `(1, size)`."""
    line = np.arange(size, dtype=np.float64) + 0.5
    return line[:, None], line[None, :]


@dataclass(frozen=True)
class Overlay:
    """Something lying on the surface: it hides by `opacity` (H, W), shows `colour` (H, W, 3), and casts `shadow`."""

    opacity: Field
    colour: Field
    shadow: Field

    def over(self, light: Field, illumination: Field) -> Field:
        """The light `(H, W, 3)` of the surface with this on top; `illumination` (H, W) falls on both."""
        opacity = self.opacity[..., None]
        below = light * (1 - self.shadow[..., None]) * (1 - opacity)
        return np.asarray(below + opacity * self.colour * illumination[..., None], np.float64)


@dataclass(frozen=True)
class Camera:
    """Lens and sensor: vignette, focus, exposure, white balance, tone curve and grain.

    The grain is drawn once, so that two pictures of one camera differ only by what lay in front of it.
    """

    falloff: Field  # (H, W) lens vignette and uneven lamp, around 1
    balance: Field  # (3,) exposure times white balance
    blur: float  # standard deviation of the lens's point spread
    shot: float  # photon noise: standard deviation at full exposure
    read: float  # sensor noise: standard deviation in the dark
    noise: Field  # (H, W, 3) of unit variance

    def exposed(self, light: Field) -> Field:
        """Linear sensor values `(H, W, 3)` without noise."""
        sharp = light * self.falloff[..., None] * self.balance
        return np.asarray(ndimage.gaussian_filter(sharp, (self.blur, self.blur, 0), mode="nearest"), np.float64)

    def develop(self, light: Field, grain: bool = True) -> FloatImage:
        """A picture `(3, H, W)` in [0, 1] of linear light `(H, W, 3)`."""
        value = self.exposed(light)
        if grain:
            value = value + self.noise * np.sqrt(self.read**2 + self.shot**2 * np.maximum(value, 0))
        value = np.maximum(value, 0)
        value = np.where(value > 0.7, 0.7 + 0.3 * np.tanh((value - 0.7) / 0.3), value)  # a shoulder, not a clip
        return np.ascontiguousarray(_encode(np.asarray(value, np.float64)).transpose(2, 0, 1))


def draw_camera(generator: np.random.Generator, size: int) -> Camera:
    """One picture's camera: the same one all day, with the small drifts of lamp, focus and position."""
    rows, columns = pixel_grid(size)
    centre = size * (0.5 + 0.08 * generator.standard_normal(2))
    squared = ((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2) / (size / 2) ** 2
    direction = generator.uniform(0, 2 * np.pi)
    slope = (columns - size / 2) * np.cos(direction) + (rows - size / 2) * np.sin(direction)
    falloff = 1 - generator.uniform(0.06, 0.14) * squared + generator.uniform(0, 0.10) * slope / size
    falloff = falloff * (1 + 0.02 * smooth_field(generator, size, 3))
    balance = np.exp(0.05 * generator.standard_normal()) * (1 + 0.004 * generator.standard_normal(3))
    noise = generator.standard_normal((size, size, 3), dtype=np.float32).astype(np.float64)
    # demosaicing correlates neighbours and channels: pure white noise is what gives a rendering away
    noise = 0.75 * noise + 0.5 * noise.mean(axis=2, keepdims=True)
    noise = ndimage.gaussian_filter(noise, (0.45, 0.45, 0), mode="wrap")
    return Camera(
        falloff=np.asarray(falloff, np.float64),
        balance=np.asarray(balance, np.float64),
        blur=float(generator.uniform(0.45, 0.62)),
        shot=float(generator.uniform(0.018, 0.024)),
        read=0.004,
        noise=np.asarray(noise / noise.std(), np.float64),
    )


def _encode(linear: Field) -> FloatImage:
    """Linear light to sRGB (IEC 61966-2-1)."""
    low = linear * 12.92
    high = 1.055 * np.power(np.maximum(linear, (1e-4)), (1 / 2.4)) - 0.055
    return np.clip(np.where(linear <= 0.0031308, low, high), 0, 1).astype(np.float32)
